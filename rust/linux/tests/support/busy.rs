//! A program at work on memory that is being merged: writers that know what each of their pages must
//! hold, and the engine in the background. Tests disturb it and see that nobody notices.
//!
//! # The oracle
//! Each page belongs to one writer (neighbours to different ones), and only that writer knows what
//! it last wrote there: a content out of a few, so that pages merge all the time, and at most one
//! word that differs. It compares the whole page with that before each step. What a page must hold is
//! kept in the writer's own records, which no engine knows of.

use super::engines::{assert_nothing_merged, settings};
use super::os::{self, Memory, Random};
use pagemerge_linux::{Barrier, Engine, EngineSettings, RegionHandle, Remerge};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Steps between two pauses of a writer.
const BURST: u32 = 16;

/// What is to work.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) pages: usize,
    /// Contents in play; number 0 is all zero.
    pub(crate) contents: usize,
    /// Memory that may have huge pages.
    pub(crate) huge: bool,
    pub(crate) writers: usize,
    pub(crate) remerge: Remerge,
    pub(crate) barrier: Option<Barrier>,
    /// Whether writers let the kernel write, too (`read(2)` from a pipe).
    pub(crate) system_calls: bool,
    pub(crate) write_tracking: bool,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            pages: 2048,
            contents: 8,
            huge: false,
            writers: 2,
            remerge: Remerge::Quiet,
            barrier: None,
            system_calls: true,
            write_tracking: true,
        }
    }
}

/// What a page must hold.
#[derive(Clone, Copy, Debug)]
struct Right {
    content: u64,
    odd: Option<(usize, u64)>,
}

impl Right {
    fn word(self, index: usize) -> u64 {
        match self.odd {
            Some((at, value)) if at == index => value,
            _ => os::word_of(self.content, index),
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    /// Writers do nothing while it is set, and count themselves here when they have seen it.
    hold: AtomicBool,
    held: AtomicU64,
    checked: AtomicU64,
    written: AtomicU64,
}

/// A program at work.
#[derive(Debug)]
pub(crate) struct Busy {
    pub(crate) memory: Arc<Memory>,
    pub(crate) engine: Engine,
    region: RegionHandle,
    shared: Arc<Shared>,
    writers: Vec<JoinHandle<Vec<(usize, Right)>>>,
}

fn check(memory: &Memory, page: usize, right: Right, when: &str) {
    for index in 0..os::page_size() / 8 {
        let (seen, right) = (memory.load(page, index), right.word(index));
        assert!(
            seen == right,
            "{when}: page {page} word {index} is {seen:#x}, not {right:#x}; {}",
            os::describe(memory.at(page))
        );
    }
}

fn work(
    memory: &Memory,
    shared: &Shared,
    mut own: Vec<(usize, Right)>,
    seed: u64,
    plan: &Plan,
) -> Vec<(usize, Right)> {
    let mut random = Random::new(seed);
    let (read, write) = os::pipe();
    let words = os::page_size() / 8;
    while !shared.stop.load(Ordering::Relaxed) {
        if shared.hold.load(Ordering::SeqCst) {
            shared.held.fetch_add(1, Ordering::SeqCst);
            while shared.hold.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_micros(100));
            }
            shared.held.fetch_sub(1, Ordering::SeqCst);
        }
        for _ in 0..BURST {
            let at = random.below(own.len());
            let (page, right) = &mut own[at];
            check(memory, *page, *right, "before a step");
            match random.below(4) {
                0 => {
                    *right = Right {
                        content: random.below(plan.contents) as u64,
                        odd: None,
                    };
                    memory.fill(*page, right.content);
                }
                1 => {
                    let index = random.below(words);
                    let before = right.word(index);
                    memory.store(*page, index, !before);
                    assert_eq!(memory.load(*page, index), !before, "page {page}: just now");
                    memory.store(*page, index, before);
                }
                step => {
                    // The word that was odd is as it should be again.
                    if let Some((index, _)) = right.odd.take() {
                        memory.store(*page, index, right.word(index));
                    } else {
                        let (index, value) = (random.below(words), random.next());
                        if step == 2 && plan.system_calls {
                            let from = (&raw const value).addr();
                            os::write_from(write.as_raw_fd(), from, 8).expect("room in the pipe");
                            let to = memory.at(*page) + index * 8;
                            let got = os::read_to(read.as_raw_fd(), to, 8);
                            assert_eq!(got.expect("read never fails for a window"), 8);
                        } else {
                            memory.store(*page, index, value);
                        }
                        right.odd = Some((index, value));
                    }
                }
            }
            check(memory, *page, *right, "after a step");
            shared.checked.fetch_add(2, Ordering::Relaxed);
            shared.written.fetch_add(1, Ordering::Relaxed);
        }
        thread::sleep(Duration::from_micros(random.next() % 1000));
    }
    own
}

impl Busy {
    /// Starts the writers and, where there is a barrier, the background.
    pub(crate) fn start(plan: &Plan) -> Self {
        let memory = if plan.huge {
            Memory::huge(plan.pages)
        } else {
            Memory::new(plan.pages)
        };
        Self::over(plan, Arc::new(memory))
    }

    /// The same over memory that the test has prepared.
    pub(crate) fn over(plan: &Plan, memory: Arc<Memory>) -> Self {
        let seed = os::seed();
        println!("seed {seed}");
        for page in 0..memory.pages() {
            memory.fill(page, (page % plan.contents) as u64);
        }
        let mut wanted = EngineSettings {
            remerge: plan.remerge,
            barrier: plan.barrier,
            ..settings()
        };
        wanted.scan.write_tracking = plan.write_tracking;
        let engine = Engine::new(wanted).expect("an engine");
        let region = super::engines::register(&engine, &memory);
        let shared = Arc::new(Shared::default());
        let writers = (0..plan.writers)
            .map(|me| {
                let own = (me..memory.pages())
                    .step_by(plan.writers)
                    .map(|page| {
                        let content = (page % plan.contents) as u64;
                        (page, Right { content, odd: None })
                    })
                    .collect();
                let (memory, shared) = (Arc::clone(&memory), Arc::clone(&shared));
                let (plan, seed) = (plan.clone(), seed ^ ((me as u64) << 40));
                thread::spawn(move || work(&memory, &shared, own, seed, &plan))
            })
            .collect();
        if plan.barrier != Some(Barrier::None) {
            engine.start().expect("a barrier");
        }
        Self {
            memory,
            engine,
            region,
            shared,
            writers,
        }
    }

    /// Lets go of the memory for a while: every page is the program's own then.
    pub(crate) fn without_the_engine(&mut self, act: impl FnOnce(&Memory)) {
        self.engine.unregister(self.region).expect("un-merged");
        act(&self.memory);
        self.region = super::engines::register(&self.engine, &self.memory);
    }

    /// Merges done so far.
    pub(crate) fn merges(&self) -> u64 {
        self.engine.stats().expect("stats").core.pages_merged
    }

    /// Waits until another `pages` have been merged.
    pub(crate) fn goes_on(&self, pages: u64, when: &str) {
        let before = self.merges();
        os::wait_for(when, || {
            self.assert_alive();
            self.merges() >= before + pages
        });
    }

    /// # Panics
    /// When a writer has found wrong bytes.
    pub(crate) fn assert_alive(&self) {
        let over = self.writers.iter().any(JoinHandle::is_finished);
        assert!(!over, "a writer has ended");
    }

    /// Lets the writers rest while `act` runs: nobody writes meanwhile.
    pub(crate) fn while_nobody_writes<R>(&self, act: impl FnOnce() -> R) -> R {
        self.shared.hold.store(true, Ordering::SeqCst);
        os::wait_for("the writers to rest", || {
            self.assert_alive();
            self.shared.held.load(Ordering::SeqCst) == self.writers.len() as u64
        });
        let done = act();
        self.shared.hold.store(false, Ordering::SeqCst);
        os::wait_for("the writers to go on", || {
            self.shared.held.load(Ordering::SeqCst) == 0
        });
        done
    }

    /// Ends the writers; what each page must hold can be asked of the result.
    pub(crate) fn stop_writing(self) -> Rest {
        self.shared.stop.store(true, Ordering::Relaxed);
        let mut right = Vec::new();
        for writer in self.writers {
            right.extend(writer.join().expect("a writer found nothing wrong"));
        }
        Rest {
            memory: self.memory,
            engine: self.engine,
            right,
            written: self.shared.written.load(Ordering::Relaxed),
            checked: self.shared.checked.load(Ordering::Relaxed),
        }
    }

    /// The end: everything is as its writer left it, merged and un-merged. The merges done.
    pub(crate) fn finish(self) -> Tally {
        let rest = self.stop_writing();
        rest.check("when the writers had ended");
        let stats = rest.engine.stats().expect("stats");
        assert_eq!(stats.last_error, None, "background merging ended");
        let tally = Tally {
            written: rest.written,
            checked: rest.checked,
            merges: stats.core.pages_merged,
            broken: stats.core.cow_broken,
            windows: stats.space.windows,
            lost_races: stats.space.lost_races,
        };
        rest.engine.close().expect("closed");
        rest.check("when the engine was closed");
        assert_nothing_merged(&rest.memory);
        tally
    }
}

/// What was done.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    written: u64,
    checked: u64,
    pub(crate) merges: u64,
    broken: u64,
    windows: u64,
    lost_races: u64,
}

impl Tally {
    pub(crate) fn add(&mut self, other: &Self) {
        self.written += other.written;
        self.checked += other.checked;
        self.merges += other.merges;
        self.broken += other.broken;
        self.windows += other.windows;
        self.lost_races += other.lost_races;
    }

    pub(crate) fn tell(&self) {
        println!(
            "figure: {} writes, {} page checks, {} merges, {} broken, {} windows, {} lost races",
            self.written, self.checked, self.merges, self.broken, self.windows, self.lost_races
        );
    }
}

/// A program whose writers have ended.
#[derive(Debug)]
pub(crate) struct Rest {
    pub(crate) memory: Arc<Memory>,
    pub(crate) engine: Engine,
    right: Vec<(usize, Right)>,
    written: u64,
    checked: u64,
}

impl Rest {
    /// # Panics
    /// Unless every page is as its writer left it.
    pub(crate) fn check(&self, when: &str) {
        for (page, right) in &self.right {
            check(&self.memory, *page, *right, when);
        }
    }
}
