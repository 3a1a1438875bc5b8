//! Faults on purpose, at every call and in every phase: whatever fails, and however, the memory reads
//! back right, nothing waits for ever, and the engine goes on or says why not.
//!
//! Needs the feature `inject`: `cargo test -p pagemerge-linux --features inject --test injected`.
//!
//! # How
//! A *life* is a whole history of an engine: probing, making it, registering, merging, writing to
//! merged pages, merging again, discarding, un-merging, forgetting, evaluating, counting, closing;
//! with another thread that reads and writes the same memory all the time. A life without faults tells
//! which call is made in which phase, and how often. Then each of these *sites* (a call in a phase)
//! is struck with every error number that its manual page lists (`support/faults.rs`), with
//! interruptions, delays, partial results and false reports, at its first, a middle and a late use,
//! once, a few times and for ever, one plan a life. Panics strike before and after each of them.
//!
//! `CONTEXTS` are faults that are there to reach calls that are made only when others fail.
//!
//! After each life the oracle looks at every byte, at the flags of every mapping, at the descriptors of
//! the merging thread, and at what the engine said: an error names its error number, and an engine that
//! merged nothing names a reason.
//!
//! # How much
//! `make test` runs a share of the plans that changes with the seed (`PAGEMERGE_SEED`, printed);
//! `make faults` (`PAGEMERGE_FAULTS=all`) runs all of them, prints the table of sites, and fails if a
//! site was never struck.

mod support;

use pagemerge_linux::core::{Reason, RunMode};
use pagemerge_linux::evaluate::{FileOptions, evaluate_files, evaluate_memory};
use pagemerge_linux::inject::{self, Effect, Plan};
use pagemerge_linux::{Barrier, Engine, EngineSettings, Error, Remerge, accounting};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use support::engines::{self, engine, merge, reasons, register, scan, settings, skipped};
use support::faults::{ANSWERS, LIES, PARTIAL};
use support::os::{self, Memory, Random, page_size};
use support::{case, scenario_with};

const PAGES: usize = 96;
const EVER: u32 = u32::MAX;

/// Equal pages in runs and alone, zero pages, strangers.
fn content(page: usize) -> u64 {
    match page % 8 {
        0 => 0,
        1 | 2 => 1_000 + (page % 16) as u64,
        7 => page as u64 + 100_000,
        _ => (page % 24) as u64 + 1,
    }
}

fn filled_with(pages: usize) -> Memory {
    let memory = Memory::new(pages);
    (0..pages).for_each(|page| memory.fill(page, content(page)));
    memory
}

fn filled() -> Memory {
    filled_with(PAGES)
}

fn assert_reads_right(memory: &Memory, when: &str) {
    (0..memory.pages()).for_each(|page| memory.assert_shows(page, content(page), when));
}

// ------------------------------------------------------------------------------------ a life

/// What holds pages still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum World {
    /// The full barrier, with everything that this kernel has.
    Full,
    /// The full barrier of Linux 6.0: no moves, no tracking, no page scan.
    Old,
    /// The program's own accesses only.
    User,
    /// Nothing.
    Bare,
}

const WORLDS: [(World, &str, &str); 4] = [
    (World::Full, "full", ""),
    (World::Old, "old", "no-move,no-wp-async,no-pagemap-scan"),
    (World::User, "user", ""),
    (World::Bare, "bare", "no-wp-async"),
];

impl World {
    fn of_environment() -> Self {
        let name = std::env::var("PAGEMERGE_WORLD").unwrap_or_default();
        let found = WORLDS.iter().find(|(_, known, _)| *known == name);
        found.map_or(Self::Full, |(world, _, _)| *world)
    }

    fn settings(self) -> EngineSettings {
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
struct Life {
    /// What the engine and the other functions said.
    errors: Vec<String>,
    /// Pages that were merged while the fault lasted.
    merged: u64,
    /// Reasons that were given meanwhile.
    reasons: BTreeSet<&'static str>,
    /// Calls that the plan struck (not those of its context).
    struck: u64,
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

    /// An injected panic has ended the engine.
    fn is_broken(&self) -> bool {
        self.errors
            .iter()
            .any(|e| e.contains("has ended unexpectedly"))
    }
}

/// Somebody who uses the memory all the time: reads every page, and writes to some without changing a
/// byte, so that others are merged undisturbed.
fn toucher(memory: &Memory, stop: &AtomicBool, rounds: &AtomicUsize) {
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
fn registered(memory: &Memory, flag: &str) -> Vec<String> {
    os::mappings_of(memory)
        .iter()
        .filter(|vma| vma.has(flag))
        .map(|vma| format!("{:x}-{:x}", vma.start, vma.end))
        .collect()
}

/// Descriptors that the merging thread has open, by what they are.
fn descriptors() -> BTreeMap<String, usize> {
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
fn file_to_evaluate() -> std::path::PathBuf {
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
struct Shape {
    world: World,
    pages: usize,
}

/// Lives through everything with `context` and `plan` armed.
fn live(shape: Shape, context: &[Plan], plan: Option<&Plan>) -> Life {
    let when = format!("{plan:?} in {context:?}, {shape:?}");
    let mut life = Life::default();
    let before = plan.map(struck_by);
    let memory = Arc::new(filled_with(shape.pages));
    let given_up = filled_with(24);
    let directory = file_to_evaluate();
    let (stop, rounds) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicUsize::new(0)),
    );
    let user = (shape.world != World::Bare).then(|| {
        let (memory, stop, rounds) = (Arc::clone(&memory), Arc::clone(&stop), Arc::clone(&rounds));
        thread::spawn(move || toucher(&memory, &stop, &rounds))
    });
    inject::disarm_all();
    context.iter().chain(plan).for_each(inject::arm_plan);

    let _ = pagemerge_linux::probe_again();
    let engine = life
        .note(Engine::new(shape.world.settings()))
        .unwrap_or_else(|| {
            inject::disarm_all();
            let made = Engine::new(shape.world.settings());
            made.unwrap_or_else(|error| panic!("{when}: no engine afterwards: {error}"))
        });
    let enlist = |life: &mut Life, memory: &Memory| {
        life.note(engines::try_register(
            &engine,
            memory.addr(),
            memory.len(),
            "",
        ))
        .or_else(|| {
            inject::disarm_all();
            life.note(engines::try_register(
                &engine,
                memory.addr(),
                memory.len(),
                "",
            ))
        })
    };
    let region = enlist(&mut life, &memory);
    let lost = enlist(&mut life, &given_up);
    let pass = |life: &mut Life| {
        thread::sleep(Duration::from_micros(1500));
        if let Some(stats) = life.note(engine.scan(None, &mut || true)) {
            life.merged = life.merged.max(stats.core.pages_merged);
            life.reasons
                .extend(reasons(&stats).into_iter().map(|(name, _)| name));
            life.errors.extend(stats.last_error);
        }
    };
    (0..4).for_each(|_| pass(&mut life));
    assert_reads_right(&memory, &when);
    // The same bytes again, so that the oracle stays as it is; the page is broken all the same.
    (0..shape.pages)
        .step_by(5)
        .for_each(|page| memory.fill(page, content(page)));
    (0..4).for_each(|_| pass(&mut life));
    assert_reads_right(&memory, &when);
    // The owner discards pages of which some are merged, and touches them.
    let discarded = 10..14;
    let done = life
        .note(engine.discard(memory.at(10), 4 * page_size()))
        .is_some();
    for page in discarded.clone() {
        let gone = memory.shows(page, 0);
        assert!(
            gone || !done && memory.shows(page, content(page)),
            "{when}: page {page} after discard; {}",
            os::describe(memory.at(page))
        );
        memory.fill(page, content(page));
    }
    life.note(engine.set_run(RunMode::Unmerge));
    assert_reads_right(&memory, &when);
    life.note(engine.set_run(RunMode::Stop));
    (0..3).for_each(|_| pass(&mut life));
    assert_reads_right(&memory, &when);
    life.note(engine.stats());
    if let Some(region) = region {
        life.note(engine.region_stats(region));
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
        let paths = [directory.clone()];
        life.note(evaluate_files(&paths, &options, &mut |_| true));
    }
    life.note_io(accounting::pss());
    life.note_io(accounting::descendants(std::process::id()));
    life.note_io(accounting::headroom());
    if let Some(lost) = lost {
        life.note(engine.forget(lost));
    }
    let unregistered = region.is_some_and(|region| life.note(engine.unregister(region)).is_some());
    assert_reads_right(&memory, &when);
    life.struck = plan.map_or(0, |plan| struck_by(plan) - before.unwrap_or(0));
    let lasted = life.errors.clone();
    inject::disarm_all();

    // Nothing fails any more.
    if life.is_broken() {
        let told = engine.stats().map(drop);
        let said = told
            .as_ref()
            .err()
            .map(ToString::to_string)
            .unwrap_or_default();
        assert!(
            said.contains("injected panic"),
            "{when}: a broken engine says {said:?}"
        );
        assert_eq!(
            registered(&memory, "um"),
            [""; 0],
            "{when}: still waits for missing pages"
        );
        assert_reads_right(&memory, &when);
    } else {
        for region in region.into_iter().filter(|_| !unregistered) {
            let got = engine.unregister(region);
            assert!(
                got.is_ok(),
                "{when}: cannot be un-merged although nothing fails: {got:?}"
            );
        }
        assert_reads_right(&memory, &when);
        // It goes on.
        let again = engines::try_register(&engine, memory.addr(), memory.len(), "");
        let again = again.unwrap_or_else(|error| panic!("{when}: cannot register: {error}"));
        // Some of that may be broken, and so left alone where nothing can be watched.
        let fresh = filled_with(24);
        let other = register(&engine, &fresh);
        let mut stats = scan(&engine);
        let started = Instant::now();
        while stats.core.pages_sharing == 0 && started.elapsed() < Duration::from_secs(20) {
            thread::sleep(Duration::from_millis(1));
            stats = scan(&engine);
        }
        assert!(
            stats.core.pages_sharing > 0,
            "{when}: merges nothing any more: {:?}",
            reasons(&stats)
        );
        assert_reads_right(&memory, &when);
        assert!(
            engine.unregister(again).is_ok(),
            "{when}: un-merging in the end"
        );
        assert_reads_right(&memory, &when);
        assert_reads_right(&fresh, &when);
        assert!(
            engine.unregister(other).is_ok(),
            "{when}: un-merging in the end"
        );
        assert_reads_right(&fresh, &when);
        engine
            .close()
            .unwrap_or_else(|error| panic!("{when}: {error}"));
        for flag in ["um", "uw"] {
            assert_eq!(
                registered(&memory, flag),
                [""; 0],
                "{when}: {flag} after close"
            );
        }
    }
    // Whoever uses the memory runs on.
    let now = rounds.load(Ordering::Relaxed);
    if let Some(user) = user {
        os::wait_for("a thread that uses the memory", || {
            rounds.load(Ordering::Relaxed) > now + 2
        });
        stop.store(true, Ordering::Relaxed);
        user.join().expect("it only reads and writes");
    }
    assert_reads_right(&memory, &when);
    life.judge(plan, &lasted, &when);
    life
}

impl Life {
    /// Whatever failed must have been told.
    fn judge(&self, plan: Option<&Plan>, lasted: &[String], when: &str) {
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
        match plan.effect {
            Effect::Fail(errno) => {
                let number = format!("os error {errno})");
                let kind = std::io::Error::from_raw_os_error(errno).to_string();
                for error in lasted {
                    let told = error.contains(&number)
                        || error.contains(&kind)
                        // What says what is refused, and why, in words of its own.
                        || ["cannot un-merge:", "is not available", "RLIMIT", "cannot register", "memfd"]
                            .iter()
                            .any(|words| error.contains(words));
                    assert!(told, "{when}: {error:?} does not say {number}");
                }
            }
            Effect::PanicBefore | Effect::PanicAfter => {
                // Most panics end an engine; those of the helper and of the caller's own thread do not.
            }
            _ => {}
        }
        assert!(
            self.merged > 0 || !self.reasons.is_empty() || !lasted.is_empty(),
            "{when}: nothing was merged, and nobody said why"
        );
    }
}

// ------------------------------------------------------------------------------------ sites and plans

type Site = (&'static str, &'static str);

fn counts() -> BTreeMap<Site, (u64, u64)> {
    let rows = inject::table().into_iter();
    rows.map(|(call, phase, passed, struck)| ((call, phase), (passed, struck)))
        .collect()
}

fn struck_by(plan: &Plan) -> u64 {
    let here = |site: &Site| site.0 == plan.call && plan.phase.is_none_or(|phase| phase == site.1);
    counts()
        .iter()
        .filter(|(site, _)| here(site))
        .map(|(_, count)| count.1)
        .sum()
}

const fn fail(call: &'static str, phase: &'static str, errno: i32, skip: u32, times: u32) -> Plan {
    Plan {
        call,
        phase: Some(phase),
        effect: Effect::Fail(errno),
        skip,
        times,
    }
}

/// Faults that lead to calls which are made only then.
const CONTEXTS: &[&[Plan]] = &[
    &[],
    &[fail("UffdMove", "WindowOpen", libc::EBUSY, 1, 3)],
    &[
        fail("MmapFrames", "WindowReplace", libc::EPERM, 0, EVER),
        fail("UffdMove", "WindowClose", libc::EBUSY, 0, EVER),
    ],
    &[
        fail("MmapFrames", "WindowReplace", libc::ENOMEM, 0, 4),
        fail("ProcmapQuery", "WindowReplace", libc::ENOTTY, 0, 4),
    ],
    &[
        fail("UffdUnregister", "WindowClose", libc::EINVAL, 0, 6),
        fail("MmapFrames", "WindowReplace", libc::EPERM, 0, 6),
    ],
    &[fail("Mremap", "RestoreWindow", libc::EINVAL, 0, EVER)],
    &[fail("Userfaultfd", "Probe", libc::EPERM, 0, 1)],
];

/// What a site is struck with, given how often it is passed in a life.
fn plans_for(site: Site, passes: u64) -> Vec<Plan> {
    let (call, phase) = site;
    let plan = |effect, skip, times| Plan {
        call,
        phase: Some(phase),
        effect,
        skip,
        times,
    };
    let passes = u32::try_from(passes).unwrap_or(u32::MAX);
    let answers = ANSWERS.iter().find(|answers| answers.call == call);
    let answers = answers.unwrap_or_else(|| panic!("{call} is not in the table of errors"));
    let mut uses = vec![(0, 1), (0, EVER)];
    uses.extend(
        [(2, 3), (10, 1), (39, 7)]
            .into_iter()
            .filter(|(skip, _)| *skip < passes),
    );
    let mut plans = Vec::new();
    for errno in answers.errnos {
        plans.extend(uses.iter().map(|(skip, times)| {
            // A call that is interrupted for ever is never made.
            let times = if *errno == libc::EINTR {
                (*times).min(5)
            } else {
                *times
            };
            plan(Effect::Fail(*errno), *skip, times)
        }));
    }
    if !answers.errnos.contains(&libc::EINTR) {
        plans.push(plan(Effect::Fail(libc::EINTR), passes / 3, 2));
    }
    plans.push(plan(Effect::DelayBefore(400), 0, 3));
    plans.push(plan(Effect::DelayAfter(400), passes / 2, 3));
    if PARTIAL.contains(&call) {
        plans.push(plan(Effect::Short(2), 0, EVER));
        plans.push(plan(Effect::Short(7), passes / 2, 3));
        plans.push(plan(Effect::Short(EVER), 0, 2));
    }
    for (_, errnos) in LIES.iter().filter(|(lying, _)| *lying == call) {
        for errno in *errnos {
            plans.push(plan(Effect::Lie(*errno), 0, 1));
            plans.push(plan(Effect::Lie(*errno), passes / 2, 3));
            plans.push(plan(Effect::Lie(*errno), 0, 40));
        }
    }
    plans
}

/// Phases in which panics end an engine and nobody else: its thread's, and its helper's.
fn may_panic(phase: &str) -> bool {
    !["Elsewhere", "Probe", "Evaluate", "Start"].contains(&phase)
}

fn panics_for(site: Site, passes: u64) -> Vec<Plan> {
    if !may_panic(site.1) {
        return Vec::new();
    }
    let passes = u32::try_from(passes).unwrap_or(u32::MAX);
    let mut skips = vec![0, passes / 2, passes - 1];
    skips.dedup();
    let effects = [Effect::PanicBefore, Effect::PanicAfter];
    effects
        .into_iter()
        .flat_map(|effect| skips.iter().map(move |skip| (effect, *skip)))
        .map(|(effect, skip)| Plan {
            call: site.0,
            phase: Some(site.1),
            effect,
            skip,
            times: 1,
        })
        .collect()
}

/// Whether all plans are to run, or a share that changes with the seed.
fn wants_all() -> bool {
    std::env::var("PAGEMERGE_FAULTS").is_ok_and(|value| value == "all")
}

/// The plans of this world in a fixed order: those that are made of `make`.
fn all_plans(shape: Shape, make: impl Fn(Site, u64) -> Vec<Plan>) -> Vec<(&'static [Plan], Plan)> {
    let mut known = BTreeSet::new();
    let mut found = Vec::new();
    for context in CONTEXTS {
        let before = counts();
        // Twice, since what another thread does makes some calls rare.
        for _ in 0..2 {
            live_in_context(shape, context);
        }
        let after = counts();
        for (site, (passed, _)) in after {
            let passes = passed - before.get(&site).map_or(0, |(passed, _)| *passed);
            if passes > 0 && known.insert(site) && site.0 != "Enter" {
                found.extend(
                    make(site, passes.div_ceil(2))
                        .into_iter()
                        .map(|plan| (*context, plan)),
                );
            }
        }
    }
    found
}

/// A life in which only the context's own faults strike.
fn live_in_context(shape: Shape, context: &[Plan]) {
    // Judged like a plan: the first of the context is.
    let (first, rest) = context
        .split_first()
        .map_or((None, context), |(f, r)| (Some(f), r));
    drop(live(shape, rest, first));
}

/// Runs this process's share of `plans`.
fn run_plans(shape: Shape, plans: &[(&'static [Plan], Plan)]) {
    let share: usize = number("PAGEMERGE_SHARE").unwrap_or(1);
    let offset: usize = number("PAGEMERGE_OFFSET").unwrap_or(0);
    let (mut lived, mut met, mut told) = (0, 0, 0);
    let mut kinds = BTreeSet::new();
    for (context, plan) in plans.iter().skip(offset % share).step_by(share) {
        // The last line says what hangs, if anything does.
        println!("life: {plan:?} in {context:?}");
        let started = Instant::now();
        let life = live(shape, context, Some(plan));
        println!("lived for {:?}, struck {}", started.elapsed(), life.struck);
        lived += 1;
        met += u64::from(life.struck > 0);
        told += u64::from(!life.errors.is_empty() || !life.reasons.is_empty());
        kinds.extend(
            life.errors
                .into_iter()
                .map(|e| e.chars().take(60).collect::<String>()),
        );
    }
    println!("sum: {} {lived} {met} {told}", plans.len());
    for (call, phase, passed, struck) in inject::table() {
        println!("row: {call} {phase} {passed} {struck}");
    }
}

fn number(name: &str) -> Option<usize> {
    std::env::var(name).ok()?.parse().ok()
}

/// A scenario: this process's share of all faults but panics.
fn share_of_faults() {
    let shape = Shape {
        world: World::of_environment(),
        pages: number("PAGEMERGE_PAGES").unwrap_or(PAGES),
    };
    let plans = all_plans(shape, plans_for);
    run_plans(shape, &plans);
    check_leaks();
}

/// A scenario: this process's share of panics. Engines that have panicked are kept, so nothing is said
/// about what is left.
fn share_of_panics() {
    std::panic::set_hook(Box::new(|_| {}));
    let shape = Shape {
        world: World::of_environment(),
        pages: PAGES,
    };
    let plans = all_plans(shape, panics_for);
    run_plans(shape, &plans);
}

/// When all engines are closed, and all memory is unmapped, nothing of theirs is left.
fn check_leaks() {
    let left: Vec<_> = descriptors()
        .into_iter()
        .filter(|(what, _)| what != "/dev/null")
        .collect();
    assert_eq!(left, [], "descriptors of the merging thread");
    let frames: Vec<_> = os::mappings(0, usize::MAX / 2)
        .into_iter()
        .filter(|vma| vma.name.contains("memfd:pagemerge"))
        .map(|vma| vma.name)
        .collect();
    assert!(frames.is_empty(), "mappings of frames are left: {frames:?}");
}

/// Shares that one run of `make test` divides the plans into.
const SHARES: usize = 12;

/// Starts shares of `scenario` in all worlds, as many at a time as there are processors, and sums up.
fn in_all_worlds(scenario: &'static str, pieces: usize, limit: Duration) {
    let seed = os::seed();
    println!("figure: seed {seed}");
    let mut jobs = Vec::new();
    for (_, world, pretend) in WORLDS {
        if wants_all() {
            jobs.extend((0..pieces).map(|offset| (world, pretend, pieces, offset)));
        } else {
            let share = SHARES * pieces;
            jobs.push((
                world,
                pretend,
                share,
                usize::try_from(seed % 10_000).unwrap_or(0) % share,
            ));
        }
    }
    let jobs = std::sync::Mutex::new(jobs);
    let results = std::sync::Mutex::new(Vec::new());
    let workers = thread::available_parallelism()
        .map_or(1, usize::from)
        .min(2);
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let job = jobs.lock().expect("nobody panics with it").pop();
                    let Some((world, pretend, share, offset)) = job else {
                        return;
                    };
                    let (share, offset) = (share.to_string(), offset.to_string());
                    let variables = [
                        ("PAGEMERGE_WORLD", world),
                        ("PAGEMERGE_PRETEND", pretend),
                        ("PAGEMERGE_SHARE", &share),
                        ("PAGEMERGE_OFFSET", &offset),
                    ];
                    let ended = scenario_with(scenario, &variables).end(limit);
                    results
                        .lock()
                        .expect("nobody panics with it")
                        .push((world, ended));
                }
            });
        }
    });
    let mut table: BTreeMap<(String, String), (u64, u64)> = BTreeMap::new();
    let (mut plans, mut lived, mut met, mut told) = (BTreeMap::new(), 0, 0, 0);
    for (world, ended) in results.into_inner().expect("nobody panics with it") {
        if ended.hung || !ended.status.success() {
            let last: Vec<_> = ended.output.lines().rev().take(12).collect();
            let last: Vec<_> = last.into_iter().rev().collect();
            panic!(
                "{scenario} in world {world}: {}{}\n{}\n{}",
                ended.status,
                if ended.hung { ", hangs" } else { "" },
                ended.where_it_hung,
                last.join("\n")
            );
        }
        for line in ended.output.lines() {
            let mut words = line.split(' ');
            match words.next() {
                Some("row:") => {
                    let mut next = || words.next().unwrap_or_default().to_owned();
                    let (call, phase, passed, struck) = (next(), next(), next(), next());
                    let row = table.entry((call, phase)).or_default();
                    row.0 += passed.parse::<u64>().unwrap_or(0);
                    row.1 += struck.parse::<u64>().unwrap_or(0);
                }
                Some("sum:") => {
                    let numbers: Vec<u64> = words.filter_map(|word| word.parse().ok()).collect();
                    plans.insert(world, numbers[0]);
                    (lived, met, told) = (lived + numbers[1], met + numbers[2], told + numbers[3]);
                }
                _ => {}
            }
        }
    }
    table.retain(|(call, _), _| call != "Enter");
    let sites = table.len();
    let unstruck: Vec<_> = table
        .iter()
        .filter(|(_, count)| count.1 == 0)
        .map(|(site, _)| site)
        .collect();
    let all: u64 = plans.values().sum();
    println!(
        "figure: {scenario}: {sites} sites (call and phase), {all} plans in {} worlds, {lived} lived \
         through, {met} met, {told} of them told of; {} sites struck",
        plans.len(),
        sites - unstruck.len()
    );
    assert!(
        met > lived / 2,
        "most plans were never met: this proved little"
    );
    if wants_all() && scenario == "share_of_faults" {
        println!(
            "figure: {:<24} {:<16} {:>9} {:>8}",
            "call", "phase", "passed", "struck"
        );
        for ((call, phase), (passed, struck)) in &table {
            println!("figure: {call:<24} {phase:<16} {passed:>9} {struck:>8}");
        }
        assert!(
            unstruck.is_empty(),
            "sites that were never struck: {unstruck:?}"
        );
        let never: Vec<_> = inject::calls()
            .filter(|call| !table.keys().any(|(known, _)| known == call))
            .filter(|call| !PROCESS_ONLY.contains(call) && !["Enter", "Nothing"].contains(call))
            .collect();
        assert!(never.is_empty(), "calls that were never made: {never:?}");
    }
}

/// Calls that are made once in the life of a process: see [`starting_can_fail_and_be_tried_again`].
const PROCESS_ONLY: &[&str] = &[
    "CloseRange",
    "OpenNull",
    "MemfdNull",
    "Sigmask",
    "Atfork",
    "SpawnMerging",
    // Needs more pages: see [`hashing_threads_that_cannot_be_started_are_done_without`].
    "SpawnHashing",
];

/// Goal: no single fault at any site loses a byte, hangs, leaks, or is kept silent.
fn any_call_that_fails_loses_nothing() {
    in_all_worlds("share_of_faults", 4, Duration::from_secs(3000));
}

/// Goal: a panic of ours at any site, in every phase of windows and of everything else, loses nothing:
/// the engine says so and is closed to further calls, and the program runs on.
fn any_panic_loses_nothing() {
    in_all_worlds("share_of_panics", 8, Duration::from_secs(3000));
}

/// Goal: every name of a call is in the table of errors, and every entry is a call.
fn every_call_has_its_errors() {
    let known: BTreeSet<_> = ANSWERS.iter().map(|answers| answers.call).collect();
    let calls: BTreeSet<_> = inject::calls().filter(|call| *call != "Enter").collect();
    assert_eq!(known, calls);
    for answers in ANSWERS {
        assert!(
            !answers.errnos.is_empty() && answers.page.contains('('),
            "{}",
            answers.call
        );
    }
    let errnos: usize = ANSWERS.iter().map(|answers| answers.errnos.len()).sum();
    println!(
        "figure: {} calls, {errnos} pairs of call and error number",
        calls.len()
    );
}

// ------------------------------------------------------------------------------------ at random

/// A scenario: writers, readers and forks while random plans, several at a time, strike wherever they
/// strike. Every increment must be there in the end, and every child must see right bytes.
fn random_faults_under_writers() {
    const WRITERS: usize = 2;
    let world = World::of_environment();
    let seed = os::seed();
    println!("figure: seed {seed} in world {world:?}");
    let mut random = Random::new(seed);
    let memory = Arc::new(filled());
    let start: Vec<Vec<u64>> = (0..WRITERS)
        .map(|who| (0..PAGES).map(|page| memory.load(page, who)).collect())
        .collect();
    let engine = Engine::new(EngineSettings {
        remerge: Remerge::Quiet,
        ..world.settings()
    });
    let engine = engine.expect("an engine");
    let region = register(&engine, &memory);
    engine.start().expect("merging in the background");
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..WRITERS)
        .map(|who| {
            let (stop, memory) = (Arc::clone(&stop), Arc::clone(&memory));
            let mut random = Random::new(seed ^ who as u64 + 1);
            thread::spawn(move || {
                let mut counts = vec![0_u64; PAGES];
                while !stop.load(Ordering::Relaxed) {
                    // Mostly a few pages, so that others become equal and are merged.
                    let among = if random.below(10) == 0 { PAGES } else { 8 };
                    let page = random.below(among);
                    memory.word(page, who).fetch_add(1, Ordering::Relaxed);
                    counts[page] += 1;
                    if counts[page].is_multiple_of(4) {
                        thread::sleep(Duration::from_micros(50));
                    }
                }
                counts
            })
        })
        .collect();
    let (begun, struck) = (Instant::now(), inject::strikes());
    let (mut plans, mut forks, mut recovered) = (0, 0, 0);
    while begun.elapsed() < os::stress_time() {
        inject::disarm_all();
        for _ in 0..=random.below(4) {
            inject::arm_plan(&random_plan(&mut random));
            plans += 1;
        }
        thread::sleep(Duration::from_micros(500 + random.next() % 6000));
        match random.below(12) {
            0 => drop(engine.set_run(RunMode::Unmerge)),
            1 => drop(engine.stats()),
            2 => {
                forks += 1;
                let child = if random.below(2) == 0 && world != World::User {
                    os::fork(|| i32::from(!still_right(&memory)))
                } else {
                    // Only what no window can hide from it: a raw fork inside one sees zeroes.
                    os::raw_fork(|| 0)
                };
                assert_eq!(child.wait(), 0, "seed {seed}: bytes in a child");
            }
            _ => {}
        }
        // Errors end background merging; it is begun again.
        inject::disarm_all();
        recovered += u32::from(engine.run().expect("an open engine") != RunMode::Merge);
        engine.start().expect("merging again");
    }
    inject::disarm_all();
    stop.store(true, Ordering::Relaxed);
    let counts: Vec<Vec<u64>> = writers
        .into_iter()
        .map(|w| w.join().expect("it counted"))
        .collect();
    engine.stop().expect("stopped");
    let stats = engine.stats().expect("stats");
    println!(
        "figure: {world:?}: {plans} plans, {} strikes, {} merges, {forks} forks, {recovered} new starts, {} increments",
        inject::strikes() - struck,
        stats.core.pages_merged,
        counts.iter().flatten().sum::<u64>()
    );
    assert!(
        stats.core.pages_merged > 0,
        "nothing merged: this proved nothing"
    );
    assert!(
        inject::strikes() > struck,
        "nothing was struck: this proved nothing"
    );
    let check = |when: &str| {
        for (who, counts) in counts.iter().enumerate() {
            for (page, count) in counts.iter().enumerate() {
                let now = memory.load(page, who);
                let added = now.wrapping_sub(start[who][page]);
                assert_eq!(
                    added, *count,
                    "seed {seed}, {when}: page {page} of writer {who}"
                );
            }
        }
        assert!(
            still_right(&memory),
            "seed {seed}, {when}: words that nobody wrote"
        );
    };
    check("merged");
    engine.unregister(region).expect("un-merged");
    check("un-merged");
    engine.close().expect("closed");
    assert_eq!(registered(&memory, "uw"), [""; 0], "after close");
    drop(memory);
    check_leaks();
}

/// Whether all words that no writer counts in are as they were.
fn still_right(memory: &Memory) -> bool {
    (0..PAGES).all(|page| {
        (2..page_size() / 8)
            .step_by(3)
            .all(|index| memory.load(page, index) == os::word_of(content(page), index))
    })
}

fn random_plan(random: &mut Random) -> Plan {
    let answers = &ANSWERS[random.below(ANSWERS.len())];
    let number = |random: &mut Random, end: usize| u32::try_from(random.below(end)).expect("small");
    let lies = LIES.iter().find(|(call, _)| *call == answers.call);
    let effect = match (random.below(10), lies) {
        (0, _) if PARTIAL.contains(&answers.call) => Effect::Short(2 + number(random, 5)),
        (1 | 2, Some((_, errnos))) => Effect::Lie(errnos[random.below(errnos.len())]),
        (3, _) => Effect::DelayBefore(number(random, 400)),
        (4, _) => Effect::DelayAfter(number(random, 400)),
        (5, _) => Effect::Fail(libc::EINTR),
        _ => Effect::Fail(answers.errnos[random.below(answers.errnos.len())]),
    };
    Plan {
        call: answers.call,
        phase: None,
        effect,
        skip: number(random, 6),
        times: 1 + number(random, 4),
    }
}

/// Goal: faults in combination, at any moment, under writers and forks, lose no increment.
fn faults_in_combination_lose_no_increment() {
    for (world, name, pretend) in WORLDS {
        if world != World::Bare {
            let variables = [("PAGEMERGE_WORLD", name), ("PAGEMERGE_PRETEND", pretend)];
            let limit = os::stress_time() * 4 + Duration::from_secs(120);
            scenario_with("random_faults_under_writers", &variables)
                .end(limit)
                .expect_success();
        }
    }
}

// ------------------------------------------------------------------------------------ by name

/// Goal: a frame store that is full is a reason, not an error, and nothing is lost.
fn full_frame_store_is_a_reason() {
    let memory = filled();
    let engine = engine(Remerge::Quiet);
    register(&engine, &memory);
    scan(&engine);
    inject::arm("Pwrite", libc::ENOSPC, 0, EVER);
    let stats = merge(&engine);
    assert_eq!(stats.core.pages_shared, 0, "no frame can be made");
    assert!(
        skipped(&stats, Reason::FramesFull) > 0,
        "{:?}",
        reasons(&stats)
    );
    assert_reads_right(&memory, "the memfd is full");
    inject::disarm_all();
    let stats = merge(&engine);
    assert!(stats.core.pages_sharing > 0, "{:?}", reasons(&stats));
    assert_reads_right(&memory, "the memfd has room again");
}

/// The memory that [`tear_holes`] looks at.
static TORN: (AtomicUsize, AtomicUsize) = (AtomicUsize::new(0), AtomicUsize::new(0));
static HOLES: AtomicU64 = AtomicU64::new(0);

/// Unmaps every page of [`TORN`] that is away in a window: what the kernel leaves behind when memory
/// runs out in the middle of mapping over something.
fn tear_holes() {
    let (start, pages) = (TORN.0.load(Ordering::SeqCst), TORN.1.load(Ordering::SeqCst));
    for page in 0..pages {
        let at = start + page * page_size();
        let entry = os::entry(at);
        if !entry.is_present() && !entry.is_swapped() {
            os::call(libc::SYS_munmap, &[at, page_size()]).expect("a hole");
            HOLES.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// Unmaps all of [`TORN`] but its first page.
fn tear_the_rest() {
    let (start, pages) = (TORN.0.load(Ordering::SeqCst), TORN.1.load(Ordering::SeqCst));
    let len = (pages - 1) * page_size();
    os::call(libc::SYS_munmap, &[start + page_size(), len]).expect("a hole");
    HOLES.fetch_add(1, Ordering::SeqCst);
}

/// Goal: ENOMEM from `mmap` after the old mapping is gone (finding F11) loses nothing: the hole is filled
/// before anybody sees it. Method: the injected call really unmaps the pages, and then fails.
fn hole_that_mapping_a_frame_left_is_filled() {
    for times in [1, 3, 20] {
        let memory = filled();
        let engine = engine(Remerge::Quiet);
        let region = register(&engine, &memory);
        scan(&engine);
        TORN.0.store(memory.addr(), Ordering::SeqCst);
        TORN.1.store(PAGES, Ordering::SeqCst);
        HOLES.store(0, Ordering::SeqCst);
        inject::on_strike(tear_holes);
        inject::arm_plan(&Plan {
            call: "MmapFrames",
            phase: None,
            effect: Effect::Instead(libc::ENOMEM),
            skip: 0,
            times,
        });
        let stats = merge(&engine);
        inject::disarm_all();
        assert!(
            HOLES.load(Ordering::SeqCst) > 0,
            "no hole: this proved nothing"
        );
        assert!(stats.core.pages_sharing > 0, "{:?}", reasons(&stats));
        assert_reads_right(&memory, "after holes");
        engine.unregister(region).expect("un-merged");
        assert_reads_right(&memory, "un-merged after holes");
    }
}

/// The same when un-merging: `mremap` takes the merged pages away and then finds no memory.
fn hole_that_unmerging_left_is_filled() {
    let memory = Memory::new(9);
    memory.fill(0, 7);
    (1..9).for_each(|page| memory.fill(page, 99));
    let engine = engine(Remerge::Quiet);
    let region = register(&engine, &memory);
    merge(&engine);
    assert_eq!(engines::merged_pages(&memory), 8, "{:?}", engine.stats());
    TORN.0.store(memory.addr(), Ordering::SeqCst);
    TORN.1.store(9, Ordering::SeqCst);
    HOLES.store(0, Ordering::SeqCst);
    inject::on_strike(tear_the_rest);
    inject::arm_plan(&Plan {
        call: "Mremap",
        phase: None,
        effect: Effect::Instead(libc::ENOMEM),
        skip: 0,
        times: 3,
    });
    engine.unregister(region).expect("un-merged");
    inject::disarm_all();
    assert!(
        HOLES.load(Ordering::SeqCst) > 0,
        "no hole: this proved nothing"
    );
    memory.assert_shows(0, 7, "un-merged");
    (1..9).for_each(|page| memory.assert_shows(page, 99, "un-merged"));
}

/// Goal: moves that the kernel refuses because a page is busy, or because the address space is being
/// changed, are a reason, and end when that ends.
fn busy_moves_are_a_reason() {
    for errno in [libc::EBUSY, libc::EAGAIN] {
        let memory = filled();
        let engine = engine(Remerge::Quiet);
        register(&engine, &memory);
        inject::arm("UffdMove", errno, 0, EVER);
        let stats = merge(&engine);
        // Zero pages need no move to stay what they are; nothing else is merged.
        assert_eq!(stats.core.pages_sharing, 0, "{errno}");
        assert!(
            skipped(&stats, Reason::Pinned) > 0,
            "{errno}: {:?}",
            reasons(&stats)
        );
        assert_reads_right(&memory, "moves are refused");
        inject::disarm_all();
        let stats = merge(&engine);
        assert!(
            stats.core.pages_sharing > 0,
            "{errno}: {:?}",
            reasons(&stats)
        );
        assert_reads_right(&memory, "moves work again");
    }
}

/// Goal: signals everywhere change nothing. Method: every call is interrupted three times before it
/// works, a dozen calls at a time.
fn interruptions_everywhere_change_nothing() {
    let calls: Vec<_> = inject::calls().filter(|call| *call != "Enter").collect();
    for group in calls.chunks(12) {
        let memory = filled();
        inject::disarm_all();
        for call in group {
            inject::arm_plan(&Plan {
                call,
                phase: None,
                effect: Effect::Fail(libc::EINTR),
                skip: 0,
                times: 3,
            });
        }
        let engine = Engine::new(settings()).or_else(|_| Engine::new(settings()));
        let engine = engine
            .or_else(|_| Engine::new(settings()))
            .expect("an engine in the end");
        let register = || engines::try_register(&engine, memory.addr(), memory.len(), "");
        let region = register()
            .or_else(|_| register())
            .or_else(|_| register())
            .or_else(|_| register());
        let region = region.expect("registered in the end");
        for _ in 0..12 {
            let _ = engine.scan(None, &mut || true);
            thread::sleep(Duration::from_millis(6));
        }
        assert_reads_right(&memory, "interrupted");
        assert!(
            engines::merged_pages(&memory) > 0,
            "{group:?}: nothing was merged in the end"
        );
        let let_go = (0..4).find_map(|_| engine.unregister(region).ok());
        assert!(
            let_go.is_some(),
            "{group:?}: cannot be un-merged in the end"
        );
        assert_reads_right(&memory, "un-merged");
        inject::disarm_all();
    }
}

/// The window left its pages registered for missing pages when `UFFDIO_UNREGISTER` failed otherwise than
/// for lack of memory: whoever touched a page there after discarding it waited for ever.
fn window_that_could_not_be_closed_is_closed_before_pages_are_discarded() {
    let memory = filled();
    let engine = engine(Remerge::Quiet);
    let region = register(&engine, &memory);
    scan(&engine);
    // Frames cannot be mapped, so windows put their pages back, and then are not closed.
    inject::arm("MmapFrames", libc::EPERM, 0, EVER);
    inject::arm("UffdUnregister", libc::EINVAL, 0, EVER);
    merge(&engine);
    assert_ne!(
        registered(&memory, "um"),
        [""; 0],
        "nothing was left open: this proved nothing"
    );
    let refused = engine.discard(memory.addr(), memory.len());
    let said = refused.expect_err("pages would become traps").to_string();
    assert!(
        said.contains("UFFDIO_UNREGISTER") && said.contains("os error 22"),
        "{said}"
    );
    let refused = engine.unregister(region).expect_err("the same");
    assert!(refused.to_string().contains("os error 22"), "{refused}");
    assert_reads_right(&memory, "not closed");
    inject::disarm_all();
    engine
        .discard(memory.at(16), 16 * page_size())
        .expect("discarded");
    (16..32).for_each(|page| memory.assert_shows(page, 0, "discarded"));
    scan(&engine);
    assert_eq!(
        registered(&memory, "um"),
        [""; 0],
        "a pass closes what is left"
    );
    engine.unregister(region).expect("un-merged");
}

/// A panic on the helper thread left the page that was written protected for ever: its writer, and the
/// merging thread after it, waited for ever.
fn panic_of_the_helper_leaves_no_writer_waiting() {
    std::panic::set_hook(Box::new(|_| {}));
    for (call, effect) in [
        ("Enter", Effect::PanicBefore),
        ("Poll", Effect::PanicAfter),
        ("UffdRead", Effect::PanicBefore),
        ("UffdRead", Effect::PanicAfter),
        ("UffdHelperWriteprotect", Effect::PanicBefore),
        ("UffdHelperWriteprotect", Effect::PanicAfter),
        ("UffdWake", Effect::PanicBefore),
        ("UffdWake", Effect::PanicAfter),
    ] {
        let memory = filled();
        let mut settings = settings();
        settings.quiet_millisecs = 60_000;
        let engine = Engine::new(settings).expect("an engine");
        let region = register(&engine, &memory);
        merge(&engine);
        let broken: Vec<usize> = (0..PAGES)
            .filter(|page| engines::merged(&memory)[*page])
            .collect();
        assert!(broken.len() > 8, "{call}: too few merged pages");
        broken
            .iter()
            .for_each(|&page| memory.fill(page, content(page)));
        scan(&engine); // all of them are watched from here on
        let before = inject::strikes();
        inject::arm_plan(&Plan {
            call,
            phase: Some("Helper"),
            effect,
            skip: 1,
            times: 2,
        });
        broken
            .iter()
            .for_each(|&page| memory.fill(page, content(page)));
        assert!(
            inject::strikes() > before,
            "{call}: no panic: this proved nothing"
        );
        inject::disarm_all();
        assert_reads_right(&memory, "written to watched pages");
        engine.unregister(region).expect("un-merged");
        engine.close().expect("closed");
    }
}

/// Goal: a panic in one engine leaves the others, and new ones, as they are.
fn panic_in_one_engine_leaves_the_others() {
    std::panic::set_hook(Box::new(|_| {}));
    let (hit, spared) = (filled(), filled());
    let (one, other) = (engine(Remerge::Quiet), engine(Remerge::Quiet));
    register(&one, &hit);
    let region = register(&other, &spared);
    scan(&one);
    inject::arm_plan(&Plan {
        call: "UffdMove",
        phase: Some("WindowOpen"),
        effect: Effect::PanicAfter,
        skip: 2,
        times: 1,
    });
    let said = (0..6).find_map(|_| one.scan(None, &mut || true).err());
    let said = said.expect("the panic is told").to_string();
    assert!(said.contains("injected panic after UffdMove"), "{said}");
    assert_reads_right(&hit, "after a panic");
    let again = one
        .stats()
        .expect_err("closed to further calls")
        .to_string();
    assert!(again.contains("injected panic"), "{again}");
    let stats = merge(&other);
    assert!(stats.core.pages_sharing > 0, "{:?}", reasons(&stats));
    assert_reads_right(&spared, "another engine");
    other.unregister(region).expect("un-merged");
    let third = engine(Remerge::Quiet);
    register(&third, &spared);
    assert!(merge(&third).core.pages_sharing > 0);
    drop(one);
    assert_reads_right(&hit, "the handle is gone");
    // In the background it is told, too.
    let fourth = engine(Remerge::Quiet);
    let memory = filled();
    register(&fourth, &memory);
    inject::arm_plan(&Plan {
        call: "Enter",
        phase: Some("WindowCompare"),
        effect: Effect::PanicBefore,
        skip: 0,
        times: 1,
    });
    fourth.start().expect("started");
    os::wait_for("the panic is told", || fourth.stats().is_err());
    assert_reads_right(&memory, "a panic in the background");
    assert!(merge(&third).core.pages_sharing > 0);
}

/// Goal: a panic while a window closes, which is itself under way because of a panic or not, leaves no
/// page away.
fn panics_while_a_window_closes_leave_no_page_away() {
    std::panic::set_hook(Box::new(|_| {}));
    for times in 1..=3 {
        for first in [
            None,
            Some("WindowOpen"),
            Some("WindowCompare"),
            Some("WindowReplace"),
        ] {
            for call in [
                "Enter",
                "UffdMove",
                "UffdUnregister",
                "UffdRegister",
                "UffdWake",
                "MadviseDontNeed",
            ] {
                let memory = filled();
                let engine = engine(Remerge::Quiet);
                register(&engine, &memory);
                scan(&engine);
                inject::arm("MmapFrames", libc::EPERM, 0, EVER);
                if let Some(phase) = first {
                    inject::arm_plan(&Plan {
                        call: "Enter",
                        phase: Some(phase),
                        effect: Effect::PanicBefore,
                        skip: 3,
                        times: 1,
                    });
                }
                inject::arm_plan(&Plan {
                    call,
                    phase: Some("WindowClose"),
                    effect: Effect::PanicAfter,
                    skip: 1,
                    times,
                });
                (0..4).for_each(|_| drop(engine.scan(None, &mut || true)));
                inject::disarm_all();
                let when = format!("{times} panics at {call}, first in {first:?}");
                assert_reads_right(&memory, &when);
                assert_eq!(registered(&memory, "um"), [""; 0], "{when}");
                assert!(engine.stats().is_err(), "{when}: it was told");
            }
        }
    }
}

/// Goal: where no thread can be started for hashing, the merging thread does it.
fn hashing_threads_that_cannot_be_started_are_done_without() {
    let memory = filled_with(1200);
    let mut settings = settings();
    settings.threads = 2;
    let engine = Engine::new(settings).expect("an engine");
    register(&engine, &memory);
    inject::arm("SpawnHashing", libc::EAGAIN, 0, EVER);
    let before = inject::strikes();
    let stats = merge(&engine);
    assert!(
        inject::strikes() > before,
        "no thread was wanted: this proved nothing"
    );
    assert!(stats.core.pages_sharing > 0, "{:?}", reasons(&stats));
    assert_reads_right(&memory, "hashed without threads");
}

/// What is made to fail in [`starts_in_the_end`]: call, error number (or 0 for a panic), calls to skip.
const START: &str = "PAGEMERGE_START";

/// A scenario: the first engine of a process cannot be made, the next can.
fn starts_in_the_end() {
    let plan = std::env::var(START).expect("a plan");
    let words: Vec<&str> = plan.split(' ').collect();
    let call = inject::calls()
        .find(|call| *call == words[0])
        .expect("a call");
    let number = |at: usize| words[at].parse::<i32>().expect("a number");
    let errno = number(1);
    if words[0] == "MemfdNull" {
        inject::arm("OpenNull", libc::EMFILE, 0, EVER);
    }
    inject::arm_plan(&Plan {
        call,
        phase: None,
        effect: if errno == 0 {
            Effect::PanicBefore
        } else {
            Effect::Fail(errno)
        },
        skip: number(2).unsigned_abs(),
        times: 1,
    });
    let before = inject::strikes();
    let first = catch_unwind(AssertUnwindSafe(|| Engine::new(settings())));
    assert!(inject::strikes() > before, "never met");
    inject::disarm_all();
    // Neither forks nor other engines wait for what was not started.
    assert_eq!(os::fork(|| 0).wait(), 0);
    match &first {
        Ok(Ok(_)) => {}
        Ok(Err(error)) if errno != 0 => {
            let said = error.to_string();
            assert!(
                said.contains(&format!("os error {errno}")),
                "{plan}: {said}"
            );
        }
        Ok(Err(error)) => assert!(
            error.to_string().contains("did not start"),
            "{plan}: {error}"
        ),
        Err(_) => assert_eq!(errno, 0, "{plan}: a panic that nobody injected"),
    }
    let memory = filled();
    let engine = Engine::new(settings()).expect("an engine in the end");
    let region = register(&engine, &memory);
    assert!(merge(&engine).core.pages_sharing > 0, "{plan}");
    engine.unregister(region).expect("un-merged");
    assert_reads_right(&memory, &plan);
    let child = os::fork(|| i32::from(!still_right(&memory)));
    assert_eq!(child.wait(), 0, "{plan}: forks are watched");
}

/// Goal: what fails while the merging thread is started is an error with its number, and not for good.
fn starting_can_fail_and_be_tried_again() {
    let mut tried = 0;
    for answers in ANSWERS
        .iter()
        .filter(|answers| PROCESS_ONLY.contains(&answers.call) && answers.call != "SpawnHashing")
    {
        let errnos = answers.errnos.iter().filter(|errno| **errno != libc::EINTR);
        for errno in errnos.chain([&0]) {
            let plan = format!("{} {errno} 0", answers.call);
            println!("start: {plan}");
            scenario_with("starts_in_the_end", &[(START, &plan)])
                .end(Duration::from_secs(60))
                .expect_success();
            tried += 1;
        }
    }
    println!("figure: {tried} failed starts");
}

// ------------------------------------------------------------------------------------ no way around

/// Goal: no call of the crate goes past the injection point. Method: the sources are read.
///
/// * A call of the C library stands within a few lines below the name of its `Call`. (Not so what cannot
///   fail: see `CANNOT_FAIL`.)
/// * Files and threads of the standard library are used in `sys/files.rs` and `sys/thread.rs` only.
/// * Each name of a call stands at one place, so that a name is a site.
fn no_call_goes_past_the_injection_point() {
    const CANNOT_FAIL: [&str; 4] = ["sysconf", "__errno_location", "sigfillset", "sched_yield"];
    const STANDARD: [&str; 9] = [
        "fs::read",
        "fs::metadata",
        "fs::symlink",
        "fs::write",
        "File::open",
        "File::create",
        "Builder::new",
        "thread::spawn",
        ".open(path",
    ];
    let mut sites: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut calls = 0;
    for path in sources() {
        let text = fs::read_to_string(&path).expect("a source");
        let name = path
            .to_string_lossy()
            .rsplit_once("/src/")
            .expect("in src")
            .1
            .to_owned();
        if name == "sys/inject.rs" {
            continue;
        }
        let end = text.find("#[cfg(test)]\nmod tests").unwrap_or(text.len());
        let end = text
            .find("#[cfg(test)]\npub(crate) mod kinds")
            .unwrap_or(end)
            .min(end);
        let lines: Vec<&str> = text[..end].lines().collect();
        for (at, line) in lines.iter().enumerate() {
            let place = format!("{name}:{}", at + 1);
            let code = line.split("//").next().unwrap_or_default();
            for part in code.split("libc::").skip(1) {
                let word: String = part
                    .chars()
                    .take_while(|c| c.is_alphanumeric() || *c == '_')
                    .collect();
                let is_call = part[word.len()..].starts_with('(');
                if !is_call || CANNOT_FAIL.contains(&word.as_str()) || word.starts_with('W') {
                    continue;
                }
                calls += 1;
                let above = lines[at.saturating_sub(9)..=at].join("\n");
                let routed = ["checked", "numbered", "uninterrupted"]
                    .iter()
                    .any(|way| above.contains(way));
                assert!(
                    routed,
                    "{place}: libc::{word} goes past the injection point"
                );
            }
            if !["sys/files.rs", "sys/thread.rs"].contains(&name.as_str()) {
                for word in STANDARD {
                    let past = code.contains(word)
                        && !code.contains(&format!("files::{}", &word[4.min(word.len())..]))
                        && !code.contains(&format!("files{}", word.trim_start_matches("fs")));
                    assert!(
                        !past,
                        "{place}: {word} belongs in sys/files.rs or sys/thread.rs"
                    );
                }
            }
            for part in code.split("Call::").skip(1) {
                let word: String = part.chars().take_while(|c| c.is_alphanumeric()).collect();
                let only_asks = ["asked(", "run_to_reason("]
                    .iter()
                    .any(|way| code.contains(way));
                if !only_asks && word != "NAMED" && !word.is_empty() {
                    sites.entry(word).or_default().push(place.clone());
                }
            }
        }
    }
    assert!(calls > 40, "the sources were not found");
    for call in inject::calls() {
        let places = sites.get(call).map_or(&[][..], Vec::as_slice);
        // Advice is made into names by a macro.
        let advice = call.starts_with("Madvise");
        assert!(advice || places.len() == 1, "{call} stands at {places:?}");
    }
    println!(
        "figure: {calls} calls of the C library, {} names",
        inject::calls().count()
    );
}

fn sources() -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    let mut next = vec![std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    while let Some(directory) = next.pop() {
        for entry in fs::read_dir(directory).expect("the sources").flatten() {
            let path = entry.path();
            if path.is_dir() {
                next.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") {
                found.push(path);
            }
        }
    }
    found
}

fn main() -> ExitCode {
    support::run(vec![
        case!(every_call_has_its_errors),
        case!(no_call_goes_past_the_injection_point),
        case!(any_call_that_fails_loses_nothing).seconds(3600),
        case!(any_panic_loses_nothing).seconds(3600),
        case!(faults_in_combination_lose_no_increment).seconds(3600),
        case!(full_frame_store_is_a_reason),
        case!(hole_that_mapping_a_frame_left_is_filled),
        case!(hole_that_unmerging_left_is_filled),
        case!(busy_moves_are_a_reason),
        case!(interruptions_everywhere_change_nothing),
        case!(window_that_could_not_be_closed_is_closed_before_pages_are_discarded),
        case!(panic_of_the_helper_leaves_no_writer_waiting),
        case!(panic_in_one_engine_leaves_the_others),
        case!(panics_while_a_window_closes_leave_no_page_away),
        case!(hashing_threads_that_cannot_be_started_are_done_without),
        case!(starting_can_fail_and_be_tried_again),
        case!(share_of_faults).hidden(),
        case!(share_of_panics).hidden(),
        case!(random_faults_under_writers).hidden(),
        case!(starts_in_the_end).hidden(),
    ])
}
