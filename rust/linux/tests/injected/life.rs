//! One life of an engine under faults, and the oracle.

use crate::sites::struck_by;
use crate::support::engines::{self, reasons, register, scan, settings};
use crate::support::os::{self, Memory, page_size};
use pagemerge_linux::core::RunMode;
use pagemerge_linux::evaluate::{FileOptions, evaluate_files, evaluate_memory};
use pagemerge_linux::inject::{self, Effect, Plan};
use pagemerge_linux::{Barrier, Engine, EngineSettings, Error, RegionHandle, accounting};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

pub(super) const PAGES: usize = 96;
pub(super) const EVER: u32 = u32::MAX;

/// Equal pages in runs and alone, zero pages, strangers.
pub(super) fn content(page: usize) -> u64 {
    match page % 8 {
        0 => 0,
        1 | 2 => 1_000 + (page % 16) as u64,
        7 => page as u64 + 100_000,
        _ => (page % 24) as u64 + 1,
    }
}

pub(super) fn filled_with(pages: usize) -> Memory {
    let memory = Memory::new(pages);
    (0..pages).for_each(|page| memory.fill(page, content(page)));
    memory
}

pub(super) fn filled() -> Memory {
    filled_with(PAGES)
}

pub(super) fn assert_reads_right(memory: &Memory, when: &str) {
    (0..memory.pages()).for_each(|page| memory.assert_shows(page, content(page), when));
}

/// What holds pages still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum World {
    /// The full barrier, with everything that this kernel has.
    Full,
    /// The full barrier of Linux 6.0: no moves, no tracking, no page scan.
    Old,
    /// The program's own accesses only.
    User,
    /// Nothing.
    Bare,
}

pub(super) const WORLDS: [(World, &str, &str); 4] = [
    (World::Full, "full", ""),
    (World::Old, "old", "no-move,no-wp-async,no-pagemap-scan"),
    (World::User, "user", ""),
    (World::Bare, "bare", "no-wp-async"),
];

impl World {
    pub(super) fn of_environment() -> Self {
        let name = std::env::var("PAGEMERGE_WORLD").unwrap_or_default();
        let found = WORLDS.iter().find(|(_, known, _)| *known == name);
        found.map_or(Self::Full, |(world, _, _)| *world)
    }

    pub(super) fn settings(self) -> EngineSettings {
        let mut settings = settings();
        settings.quiet_millisecs = 1;
        settings.threads = 2;
        settings.scan.merge_across_nodes = false;
        settings.barrier = match self {
            Self::Full | Self::Old => None,
            Self::User => Some(Barrier::User),
            Self::Bare => Some(Barrier::None),
        };
        settings
    }
}

/// What a life under faults came to.
#[derive(Debug, Default)]
pub(super) struct Life {
    /// What the engine and the other functions said.
    pub(super) errors: Vec<String>,
    /// Pages that were merged while the fault lasted.
    pub(super) merged: u64,
    /// Reasons that were given meanwhile.
    pub(super) reasons: BTreeSet<&'static str>,
    /// Calls that the plan struck (not those of its context).
    pub(super) struck: u64,
    /// A panic has ended the engine.
    pub(super) broken: bool,
}

impl Life {
    fn note<T>(&mut self, got: Result<T, Error>) -> Option<T> {
        got.map_err(|error| self.errors.push(error.to_string()))
            .ok()
    }

    fn note_io<T>(&mut self, got: std::io::Result<T>) -> Option<T> {
        got.map_err(|error| self.errors.push(error.to_string()))
            .ok()
    }
}

/// Somebody who uses the memory all the time: reads every page, and writes to some without changing a
/// byte, so that others are merged undisturbed.
pub(super) fn toucher(memory: &Memory, stop: &AtomicBool, rounds: &AtomicUsize) {
    let mut at = 0;
    while !stop.load(Ordering::Relaxed) {
        at = (at + 7) % memory.pages();
        let word = memory.word(at, at % 512);
        if at % 8 == 5 {
            word.fetch_add(0, Ordering::Relaxed);
        } else {
            word.load(Ordering::Relaxed);
        }
        rounds.fetch_add(1, Ordering::Relaxed);
        thread::sleep(Duration::from_micros(30));
    }
}

/// Every mapping of the range that some userfaultfd has, by `flag`.
pub(super) fn registered(memory: &Memory, flag: &str) -> Vec<String> {
    os::mappings_of(memory)
        .iter()
        .filter(|vma| vma.has(flag))
        .map(|vma| format!("{:x}-{:x}", vma.start, vma.end))
        .collect()
}

/// Descriptors that the merging thread has open, by what they are.
pub(super) fn descriptors() -> BTreeMap<String, usize> {
    let mut found = BTreeMap::new();
    for task in fs::read_dir("/proc/self/task")
        .expect("our threads")
        .flatten()
    {
        let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        if name.trim() != "pagemerge" {
            continue;
        }
        for fd in fs::read_dir(task.path().join("fd"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let what = fs::read_link(fd.path()).unwrap_or_default();
            *found
                .entry(what.to_string_lossy().into_owned())
                .or_insert(0) += 1;
        }
    }
    found
}

/// A small file with data, a hole, and twins.
pub(super) fn file_to_evaluate() -> std::path::PathBuf {
    use std::os::unix::fs::FileExt;
    let directory = os::temporary("faults");
    let _ = fs::create_dir_all(&directory);
    let path = directory.join("file");
    if !path.exists() {
        let file = fs::File::create(&path).expect("a file");
        file.set_len(1 << 20).expect("its length");
        file.write_all_at(&[7; 3 * 4096], 1 << 16)
            .expect("its data");
    }
    directory
}

/// What a life looks like apart from its faults.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) world: World,
    pub(super) pages: usize,
    /// Faults of several kinds at once, one of which may lead to errors that no plan names.
    pub(super) combined: bool,
}

/// Somebody who uses the memory while the engine works on it.
struct User {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicUsize>,
    thread: thread::JoinHandle<()>,
}

impl User {
    fn of(memory: &Arc<Memory>) -> Self {
        let (stop, rounds) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let thread = {
            let (memory, stop, rounds) =
                (Arc::clone(memory), Arc::clone(&stop), Arc::clone(&rounds));
            thread::spawn(move || toucher(&memory, &stop, &rounds))
        };
        Self {
            stop,
            rounds,
            thread,
        }
    }

    /// Sees it run on, and ends it.
    fn end(self) {
        let now = self.rounds.load(Ordering::Relaxed);
        os::wait_for("a thread that uses the memory", || {
            self.rounds.load(Ordering::Relaxed) > now + 2
        });
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("it only reads and writes");
    }
}

/// An engine with its memory, and what comes of it.
struct History {
    when: String,
    life: Life,
    memory: Arc<Memory>,
    /// Memory that its owner gives up.
    given_up: Memory,
    engine: Engine,
    region: Option<RegionHandle>,
    lost: Option<RegionHandle>,
}

/// Lives through everything with `context` and `plan` armed.
pub(super) fn live(shape: Shape, context: &[Plan], plan: Option<&Plan>) -> Life {
    let when = format!("{plan:?} in {context:?}, {shape:?}");
    let memory = Arc::new(filled_with(shape.pages));
    let user = (shape.world != World::Bare).then(|| User::of(&memory));
    let before = plan.map_or(0, struck_by);
    inject::disarm_all();
    context.iter().chain(plan).for_each(inject::arm_plan);

    let mut history = History::begin(when.clone(), shape, &memory);
    history.merge_and_break();
    history.discard();
    history.unmerge_and_merge();
    history.look_on();
    let unregistered = history.let_go();
    history.life.struck = plan.map_or(0, struck_by) - before;
    let lasted = history.life.errors.clone();
    inject::disarm_all();

    // Nothing fails any more.
    history.life.broken = matches!(history.engine.stats(), Err(Error::Worker(_)));
    if history.life.broken {
        history.assert_broken();
    } else {
        history.go_on(unregistered);
    }
    user.into_iter().for_each(User::end);
    assert_reads_right(&memory, &when);
    history.life.judge(shape, (context, plan), &lasted, &when);
    history.life
}

impl History {
    fn begin(when: String, shape: Shape, memory: &Arc<Memory>) -> Self {
        let mut life = Life::default();
        let _ = pagemerge_linux::probe_again();
        let made = life.note(Engine::new(shape.world.settings()));
        let engine = made.unwrap_or_else(|| {
            inject::disarm_all();
            let made = Engine::new(shape.world.settings());
            made.unwrap_or_else(|error| panic!("{when}: no engine afterwards: {error}"))
        });
        let mut history = Self {
            when,
            life,
            memory: Arc::clone(memory),
            given_up: filled_with(24),
            engine,
            region: None,
            lost: None,
        };
        history.region = history.enlist((memory.addr(), memory.len()));
        history.lost = history.enlist((history.given_up.addr(), history.given_up.len()));
        history
    }

    fn enlist(&mut self, (addr, len): (usize, usize)) -> Option<RegionHandle> {
        let first = self
            .life
            .note(engines::try_register(&self.engine, addr, len, ""));
        first.or_else(|| {
            inject::disarm_all();
            self.life
                .note(engines::try_register(&self.engine, addr, len, ""))
        })
    }

    fn pass(&mut self) {
        thread::sleep(Duration::from_micros(1500));
        let life = &mut self.life;
        if let Some(stats) = life.note(self.engine.scan(None, &mut || true)) {
            life.merged = life.merged.max(stats.core.pages_merged);
            life.reasons
                .extend(reasons(&stats).into_iter().map(|(name, _)| name));
            life.errors.extend(stats.last_error);
        }
    }

    fn merge_and_break(&mut self) {
        (0..4).for_each(|_| self.pass());
        assert_reads_right(&self.memory, &self.when);
        // The same bytes again, so that the oracle stays as it is; the page is broken all the same.
        for page in (0..self.memory.pages()).step_by(5) {
            self.memory.fill(page, content(page));
        }
        (0..4).for_each(|_| self.pass());
        assert_reads_right(&self.memory, &self.when);
    }

    /// The owner discards pages of which some are merged, and touches them.
    fn discard(&mut self) {
        let (memory, when) = (&self.memory, &self.when);
        let got = self.engine.discard(memory.at(10), 4 * page_size());
        let done = self.life.note(got).is_some();
        for page in 10..14 {
            let gone = memory.shows(page, 0);
            assert!(
                gone || !done && memory.shows(page, content(page)),
                "{when}: page {page} after discard; {}",
                os::describe(memory.at(page))
            );
            memory.fill(page, content(page));
        }
    }

    fn unmerge_and_merge(&mut self) {
        self.life.note(self.engine.set_run(RunMode::Unmerge));
        assert_reads_right(&self.memory, &self.when);
        self.life.note(self.engine.set_run(RunMode::Stop));
        (0..3).for_each(|_| self.pass());
        assert_reads_right(&self.memory, &self.when);
    }

    /// Everything that only looks.
    fn look_on(&mut self) {
        let (life, memory) = (&mut self.life, &self.memory);
        life.note(self.engine.stats());
        if let Some(region) = self.region {
            life.note(self.engine.region_stats(region));
        }
        #[allow(unsafe_code, reason = "the promise of `evaluate_memory`")]
        // SAFETY: the memory stays mapped.
        let evaluated = unsafe { evaluate_memory(&[(memory.addr(), memory.len())], &mut || true) };
        life.note(evaluated);
        for keep_going in [false, true] {
            let options = FileOptions {
                recursive: true,
                keep_going,
                ..FileOptions::default()
            };
            life.note(evaluate_files(&[file_to_evaluate()], &options, &mut |_| {
                true
            }));
        }
        life.note_io(accounting::pss());
        life.note_io(accounting::descendants(std::process::id()));
        life.note_io(accounting::headroom());
    }

    /// Says whether the region was unregistered.
    fn let_go(&mut self) -> bool {
        if let Some(lost) = self.lost {
            self.life.note(self.engine.forget(lost));
        }
        let got = self.region.map(|region| self.engine.unregister(region));
        let done = got.is_some_and(|got| self.life.note(got).is_some());
        assert_reads_right(&self.memory, &self.when);
        done
    }

    /// A panic has ended this engine: it says so, and has let the memory be.
    fn assert_broken(&self) {
        let (memory, when) = (&self.memory, &self.when);
        let said = self
            .engine
            .stats()
            .map(drop)
            .map_err(|error| error.to_string());
        let said = said.err().unwrap_or_default();
        assert!(
            said.contains("injected panic"),
            "{when}: a broken engine says {said:?}"
        );
        let waiting = registered(memory, "um");
        assert_eq!(waiting, [""; 0], "{when}: still waits for missing pages");
        assert_reads_right(memory, when);
    }

    /// Lets go of what could not be let go of, merges again, and is closed.
    fn go_on(&self, unregistered: bool) {
        let (engine, memory, when) = (&self.engine, &self.memory, &self.when);
        for region in self.region.into_iter().filter(|_| !unregistered) {
            let got = engine.unregister(region);
            assert!(
                got.is_ok(),
                "{when}: cannot be un-merged although nothing fails: {got:?}"
            );
        }
        assert_reads_right(memory, when);
        let again = engines::try_register(engine, memory.addr(), memory.len(), "");
        let again = again.unwrap_or_else(|error| panic!("{when}: cannot register: {error}"));
        // Some of that may be broken, and so left alone where nothing can be watched.
        let fresh = filled_with(24);
        let other = register(engine, &fresh);
        let mut stats = scan(engine);
        let started = Instant::now();
        while stats.core.pages_sharing == 0 && started.elapsed() < Duration::from_secs(20) {
            thread::sleep(Duration::from_millis(1));
            stats = scan(engine);
        }
        let sharing = stats.core.pages_sharing;
        assert!(
            sharing > 0,
            "{when}: merges nothing any more: {:?}",
            reasons(&stats)
        );
        for (region, memory) in [(again, &**memory), (other, &fresh)] {
            assert_reads_right(memory, when);
            let got = engine.unregister(region);
            assert!(got.is_ok(), "{when}: un-merging in the end: {got:?}");
            assert_reads_right(memory, when);
        }
        engine
            .close()
            .unwrap_or_else(|error| panic!("{when}: {error}"));
        for flag in ["um", "uw"] {
            assert_eq!(
                registered(memory, flag),
                [""; 0],
                "{when}: {flag} after close"
            );
        }
    }
}

impl Life {
    /// Whatever failed must have been told.
    fn judge(
        &self,
        shape: Shape,
        (context, plan): (&[Plan], Option<&Plan>),
        lasted: &[String],
        when: &str,
    ) {
        let Some(plan) = plan else {
            assert!(
                self.errors.is_empty() && self.merged > 0,
                "{when}: {self:?}"
            );
            return;
        };
        if self.struck == 0 {
            return;
        }
        if !shape.combined && matches!(plan.effect, Effect::Fail(_)) {
            let errnos = context
                .iter()
                .chain([plan])
                .filter_map(|plan| match plan.effect {
                    Effect::Fail(errno) => Some(errno),
                    _ => None,
                });
            let numbers: Vec<String> = errnos
                .flat_map(|errno| {
                    let kind = std::io::Error::from_raw_os_error(errno).to_string();
                    [format!("os error {errno})"), kind]
                })
                .collect();
            // What says what is refused, and why, in words of its own.
            let words = [
                "cannot un-merge:",
                "is not available",
                "RLIMIT",
                "cannot register",
                "memfd",
            ];
            for error in lasted {
                let told = numbers.iter().any(|number| error.contains(number))
                    || words.iter().any(|words| error.contains(words));
                assert!(told, "{when}: {error:?} says none of {numbers:?}");
            }
        }
        assert!(
            self.merged > 0 || !self.reasons.is_empty() || !lasted.is_empty(),
            "{when}: nothing was merged, and nobody said why"
        );
    }
}
