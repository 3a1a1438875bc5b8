//! What all actors share: the arenas, the engines, the end of the run; and how a failure is told.

use crate::arena::Arena;
use crate::engines::Lead;
use crate::sequences::{Counters, Sequences};
use crate::support::os::{self, Random};
use crate::support::{self, raw};
use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Actions of each actor that are kept for the story of a failure.
const KEPT: usize = 4096;
/// Actions of the story that are printed for each actor, beside those on the page concerned.
const TOLD: usize = 12;
/// An action that takes longer hangs: a shared, noisy machine makes none take so long.
pub(crate) const HANGS: Duration = Duration::from_secs(120);

/// One action, as it is remembered.
#[derive(Clone, Copy, Debug)]
struct Action {
    at_micros: u64,
    what: &'static str,
    arena: usize,
    page: usize,
    pages: usize,
    detail: u64,
}

/// What is remembered of an actor.
#[derive(Debug)]
pub(crate) struct Log {
    name: String,
    ring: Mutex<VecDeque<Action>>,
    /// When the action under way began, in microseconds of the run; 0 while there is none.
    since: AtomicU64,
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) seed: u64,
    pub(crate) replay: String,
    pub(crate) arenas: Vec<Arena>,
    pub(crate) engines: Vec<Lead>,
    pub(crate) sequences: Sequences,
    pub(crate) counters: Counters,
    pub(crate) began: Instant,
    pub(crate) ends: Instant,
    over: AtomicBool,
    failed: AtomicBool,
    pub(crate) logs: Mutex<Vec<&'static Log>>,
    pub(crate) totals: Mutex<BTreeMap<String, u64>>,
}

impl World {
    pub(crate) fn new(
        seed: u64,
        replay: String,
        time: Duration,
        arenas: Vec<Arena>,
        engines: Vec<Lead>,
    ) -> Self {
        let began = Instant::now();
        Self {
            seed,
            replay,
            arenas,
            engines,
            sequences: Sequences::new(),
            counters: Counters::new(),
            began,
            ends: began + time,
            over: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            logs: Mutex::new(Vec::new()),
            totals: Mutex::new(BTreeMap::new()),
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    pub(crate) fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    pub(crate) fn micros(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// The end of the run: tells what was seen, by whom, and what everybody did before. The process
    /// is left as it is at this moment, so nobody else can spoil the picture.
    pub(crate) fn fail(&self, who: &str, arena: usize, page: usize, story: &str) -> ! {
        if self.failed.swap(true, Ordering::SeqCst) {
            // The first one tells.
            loop {
                std::thread::sleep(Duration::from_secs(1));
            }
        }
        let mut text = format!(
            "TORTURE FAILED after {:?}: {who}: {story}\n",
            self.began.elapsed()
        );
        if let Some(place) = self.arenas.get(arena) {
            let at = place.at(page);
            let _ = writeln!(
                text,
                "  arena {} page {page} at {at:x}: {}; home class {}",
                place.name,
                os::describe(at),
                place.home(page)
            );
        }
        text += &self.history(arena, page);
        let _ = writeln!(
            text,
            "seed {}; the same choices again (not the same timing):\n  {}",
            self.seed, self.replay
        );
        println!("{text}");
        if std::env::var_os("PAGEMERGE_TORTURE_KEEP").is_some() {
            println!("kept for a debugger: process {}", std::process::id());
            std::thread::sleep(Duration::from_secs(3600));
        }
        raw::leave_now(1);
    }

    /// What everybody did lately, and what anybody did to this page.
    fn history(&self, arena: usize, page: usize) -> String {
        let mut text = String::new();
        let logs: Vec<&Log> = self.logs.lock().expect("nobody panics with it").clone();
        let mut here = Vec::new();
        for log in &logs {
            let Ok(ring) = log.ring.try_lock() else {
                continue;
            };
            let touches =
                |a: &&Action| a.arena == arena && (a.page..a.page + a.pages.max(1)).contains(&page);
            here.extend(ring.iter().filter(touches).map(|a| (*a, log.name.as_str())));
            let _ = writeln!(text, "  {} lately:", log.name);
            for action in ring.iter().rev().take(TOLD).rev() {
                let _ = writeln!(text, "    {}", self.tell(action));
            }
        }
        here.sort_by_key(|(action, _)| action.at_micros);
        let _ = writeln!(text, "  the page's history (what is still remembered):");
        for (action, who) in here {
            let _ = writeln!(text, "    {who}: {}", self.tell(&action));
        }
        text
    }

    fn tell(&self, action: &Action) -> String {
        let name = self
            .arenas
            .get(action.arena)
            .map_or("-", |arena| arena.name);
        format!(
            "{:>12} us {} {name} page {} +{} ({:#x})",
            action.at_micros, action.what, action.page, action.pages, action.detail
        )
    }

    /// Looks after everybody: an action that never ends is told with what each thread does.
    pub(crate) fn watch(&self) {
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let now = self.micros();
            let limit = u64::try_from(HANGS.as_micros()).unwrap_or(u64::MAX);
            let logs: Vec<&Log> = self.logs.lock().expect("nobody panics with it").clone();
            for log in logs {
                let since = log.since.load(Ordering::Relaxed);
                if since > 0 && now.saturating_sub(since) > limit {
                    println!("{}", support::threads_of(std::process::id()));
                    self.fail(
                        &log.name,
                        usize::MAX,
                        0,
                        "hangs: its last action does not end",
                    );
                }
            }
        }
    }
}

/// An actor: its name, its choices, its memory of what it did.
pub(crate) struct Me {
    pub(crate) world: &'static World,
    pub(crate) name: String,
    pub(crate) random: Random,
    pub(crate) counts: BTreeMap<String, u64>,
    pub(crate) away: VecDeque<(usize, usize, u8)>,
    log: &'static Log,
}

impl Me {
    pub(crate) fn new(world: &'static World, name: &str, number: usize) -> Self {
        let name = format!("{name}{number}");
        // Whoever else takes part, an actor's choices follow from the seed and its own name.
        let own = name.bytes().fold(world.seed, |seed, byte| {
            (seed ^ u64::from(byte))
                .wrapping_mul(0x0100_0000_01b3)
                .rotate_left(23)
        });
        Self::brief(world, &name, own)
    }

    /// For a thread that lives for a moment: its log is that of all others with its name.
    pub(crate) fn brief(world: &'static World, name: &str, seed: u64) -> Self {
        let mut logs = world.logs.lock().expect("nobody panics with it");
        let known = logs.iter().copied().find(|log| log.name == name);
        let log = known.unwrap_or_else(|| {
            let log: &'static Log = Box::leak(Box::new(Log {
                name: name.to_owned(),
                ring: Mutex::new(VecDeque::with_capacity(KEPT)),
                since: AtomicU64::new(0),
            }));
            logs.push(log);
            log
        });
        drop(logs);
        Self {
            world,
            name: name.to_owned(),
            random: Random::new(seed),
            counts: BTreeMap::new(),
            away: VecDeque::new(),
            log,
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.world.is_over()
    }

    /// Remembers what begins now.
    pub(crate) fn begin(
        &self,
        what: &'static str,
        arena: usize,
        page: usize,
        pages: usize,
        detail: u64,
    ) {
        let now = self.world.micros().max(1);
        self.log.since.store(now, Ordering::Relaxed);
        let mut ring = self.log.ring.lock().expect("nobody panics with it");
        if ring.len() == KEPT {
            ring.pop_front();
        }
        ring.push_back(Action {
            at_micros: now,
            what,
            arena,
            page,
            pages,
            detail,
        });
    }

    /// Nothing is under way any more.
    pub(crate) fn done(&self) {
        self.log.since.store(0, Ordering::Relaxed);
    }

    pub(crate) fn count(&mut self, what: &str, by: u64) {
        if let Some(count) = self.counts.get_mut(what) {
            *count += by;
        } else {
            self.counts.insert(what.to_owned(), by);
        }
    }

    pub(crate) fn most(&mut self, what: &str, value: u64) {
        let most = self.counts.entry(what.to_owned()).or_default();
        *most = value.max(*most);
    }

    /// A pause of up to so many microseconds.
    pub(crate) fn pause(&mut self, micros: usize) {
        self.done();
        std::thread::sleep(Duration::from_micros(
            self.random.below(micros.max(1)) as u64
        ));
    }

    /// A longer pause that ends with the run.
    pub(crate) fn rest(&mut self, millis: usize) {
        self.done();
        let until = Instant::now() + Duration::from_millis(self.random.below(millis.max(1)) as u64);
        while Instant::now() < until && !self.is_over() {
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub(crate) fn chance(&mut self, per_cent: usize) -> bool {
        self.random.below(100) < per_cent
    }

    pub(crate) fn fail(&self, arena: usize, page: usize, story: &str) -> ! {
        let story = format!("{story}\n  counted so far: {:?}", self.counts);
        self.world.fail(&self.name, arena, page, &story)
    }
}

impl Drop for Me {
    fn drop(&mut self) {
        self.done();
        let mut totals = self.world.totals.lock().expect("nobody panics with it");
        for (name, count) in &self.counts {
            let total = totals.entry(name.clone()).or_default();
            if name.starts_with("longest") {
                *total = (*total).max(*count);
            } else {
                *total += count;
            }
        }
    }
}
