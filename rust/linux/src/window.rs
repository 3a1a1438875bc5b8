//! The merge window: the short time in which pages are held still, compared and mapped over.
//!
//! This is the protocol that survived 2.2 billion racing writes (live-memory findings, section 4).
//! A caller prepares everything first (frames are written, views are mapped, reasons to refuse are
//! known), then [`Windows::run`] opens one window over a few *runs* of neighbouring pages:
//!
//! 1. **Open.** `UFFDIO_REGISTER(WP | MISSING)` on exactly each run (finding F1: never on more than is
//!    taken out again, and only `UNREGISTER` takes MISSING away), then `UFFDIO_MOVE` into staging. From
//!    here on whoever touches these pages waits, or (a device) has made the move impossible.
//! 2. **Barrier.** Take the mmap lock for writing once, so that a debugger or `/proc/PID/mem` writer
//!    that already holds a page finishes (F5).
//! 3. **Compare** each staged page with its frame (or with zero). Nothing is merged on a digest.
//! 4. **Close.** Equal pages: map the frame over, or install the zero page. All others: move back, page
//!    by page if it does not work at once, else copy (F10); then take the exact run out of MISSING.
//!    Wake whoever waits.
//!
//! Runs that are to become zero pages, and lie close together, are registered as one *stretch*, with what
//! lies between them ([`Job::bridged`]): a registration costs six times what the rest of such a run does.
//! The pages between stay where they are. When the stretch is taken out of MISSING, as one, they lose
//! their write protection: the kernel calls them written, and they are looked at as if they were.
//!
//! Where pages cannot be moved (they were written after merging, so they live in a mapping of a
//! file; or the kernel is older than 6.8) the window is *in place*: the pages stay where they are, under a
//! synchronous write-protection that [`crate::watch`] has held for the whole quiet time (F2).
//! Without any barrier the window is in place and holds nothing: the caller promised.
//!
//! # Invariants
//! * W1. Inside a window: no allocation, no lock, no log, no registered memory touched but by these
//!   calls, no way out but through [`OpenWindow::close`], which also runs while unwinding.
//! * W2. When `close` returns, every page of every run shows the bytes that it showed before, no stretch
//!   is registered for MISSING, and no thread waits for it.
//! * W3. Staging is registered for write-protection only (a stray reader must not hang), refuses huge
//!   pages and is not inherited by children.
//! * W4. Forks wait for the window ([`NoFork`]).
//! * W5. Staging is empty when a window opens, and what the kernel says of a move that did not end well
//!   is not believed: the page tables are.
//!
//! # Cost
//! About 3.5 us to register and move a run, 3.5 us for each new mapping, and 0.3 us for each page
//! compared, on the machine described in the findings; 1.5 us for a run within a stretch, and 0.1 us for
//! each page between. 300 us to move the first page out of a huge page, so a window has one of those at most.

use crate::fork::NoFork;
use crate::sys::Span;
use crate::sys::live::{self, Live};
use crate::sys::mapping::{self, Advice, MapStop, Mapping, MmapLock, Protection, Sharing};
use crate::sys::memfd::Memfd;
use crate::sys::pagemap::{Entry, Pagemap};
use crate::sys::phase::{Phase, enter};
use crate::sys::process;
use crate::sys::procmap::{Procmap, QueryStop};
use crate::sys::uffd::{FillStop, Modes, MoveStop, RegisterStop, Userfaultfd};
use crate::watch::Watches;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;

/// Pages of one window at most; staging has room for so many.
pub(crate) const MAX_PAGES: usize = 512;
/// Mappings that one window makes at most.
const MAX_MAPPINGS: usize = 32;

/// Pages of staging that are wiped at once.
const WIPED_AT_ONCE: usize = 16;

/// How often a move is tried again that met something in staging.
const MOVING_TRIES: u32 = 8;
/// How often the page tables are asked before not knowing is accepted.
const READING_TRIES: u32 = 3;
/// How often closing is tried where it should need no memory, but does.
const CLOSING_TRIES: u32 = 10_000;

/// Runs noted at most as still registered for missing pages.
const UNCLOSED: usize = 4096;
/// How often a window's closing begins again that panicked.
const CLOSING_PANICS: u32 = 3;
/// How often a page is offered to a place that the kernel says is not there, though something is.
const RETURNING_TRIES: u32 = 100;
/// How often a page is offered to a place that refuses it before it is carried there by `mremap`.
const CARRYING_TRIES: u32 = 1000;

/// Estimates that bound how long a window holds its pages, in nanoseconds.
const RUN_NANOS: u64 = 3_500;
const BRIDGED_RUN_NANOS: u64 = 1_500;
const BETWEEN_NANOS: u64 = 100;
const MAPPING_NANOS: u64 = 3_500;
const PAGE_NANOS: u64 = 350;
const SPLIT_NANOS: u64 = 300_000;

/// What a page is to become.
#[derive(Clone, Debug)]
pub(crate) enum Target {
    /// A private mapping of `offset` in `memfd`, whose bytes the engine sees in `view` at `at`.
    Frame {
        memfd: Rc<Memfd>,
        offset: u64,
        view: Rc<Mapping>,
        at: usize,
    },
    /// The zero page.
    Zero,
}

impl Target {
    /// Whether one mapping can cover a page with this target and its neighbour with `next`.
    fn continues(&self, next: &Self, page: usize) -> bool {
        match (self, next) {
            (Self::Zero, Self::Zero) => true,
            (
                Self::Frame {
                    memfd: a,
                    offset: x,
                    ..
                },
                Self::Frame {
                    memfd: b,
                    offset: y,
                    ..
                },
            ) => Rc::ptr_eq(a, b) && x + page as u64 == *y,
            _ => false,
        }
    }
}

/// A page in a window.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    /// The page.
    pub(crate) live: Live,
    /// What it is to become.
    pub(crate) target: Target,
    /// What lies between the page before and this one, both to become zero pages, is ordinary memory of
    /// the same mapping, whose writes may be told of without having been: both may be in one stretch.
    pub(crate) bridged: bool,
    /// Its move takes a huge page apart.
    pub(crate) splits: bool,
    /// Set by the window.
    pub(crate) verdict: Verdict,
}

impl Job {
    pub(crate) fn new(live: Live, target: Target) -> Self {
        Self {
            live,
            target,
            bridged: false,
            splits: false,
            verdict: Verdict::Untried,
        }
    }

    /// Whether it is to become a zero page.
    pub(crate) fn is_zero(&self) -> bool {
        matches!(self.target, Target::Zero)
    }
}

/// How a page left its window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The window did not come to it.
    Untried,
    /// It shows its target now.
    Merged,
    /// Its bytes are not its target's.
    Differs,
    /// Somebody else holds it: pinned, or shared by a fork.
    Busy,
    /// Nothing is there.
    Absent,
    /// What is mapped there is not what it was: another protection, locked, or gone.
    WrongMapping,
    /// The kernel refused, before anything was given up, for lack of memory or mappings.
    NoMemory,
    /// The mapping is sealed.
    Sealed,
    /// The program uses userfaultfd there itself.
    Foreign,
    /// A write ended its quiet time.
    NotQuiet,
    /// The kernel moved it and said that it did not: put back, and not to be merged this time.
    Denied,
}

/// How pages are held still.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Hold<'a> {
    /// Moved out of reach (anonymous memory, kernel 6.8). `tracked`: they are registered for write
    /// tracking, and are to be again.
    Moved {
        uffd: &'a Userfaultfd,
        tracked: bool,
    },
    /// Left in place under a watch's write-protection.
    Watched(&'a Watches),
    /// Not at all: the caller promised that nobody writes.
    Nothing,
}

/// Where a page of an open window is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// At home, not held.
    Home,
    /// On its way to staging: only the page tables know where it is.
    Moving,
    /// In staging, or held in place.
    Held,
    /// A frame has been mapped over it.
    Mapped,
    /// The zero page has been put there, in the same mapping.
    Zeroed,
    /// There was no page.
    Nowhere,
}

/// A run of neighbouring pages: jobs `first .. first + pages`.
#[derive(Clone, Copy, Debug)]
struct Run {
    first: usize,
    pages: usize,
    /// Runs of the stretch that begins here; 0 if it began before.
    stretch: usize,
    /// Registered for missing pages, and not closed yet.
    open: bool,
}

/// What every window needs, made once.
#[derive(Debug)]
pub(crate) struct Windows {
    page: usize,
    /// Registered for write-protection only. `None` where pages cannot be moved.
    staging: Option<Mapping>,
    pub(crate) lock: MmapLock,
    places: Vec<Place>,
    runs: Vec<Run>,
    /// Mappings made by [`Windows::pay_first`].
    scratch: Vec<Mapping>,
    maps: Rc<Procmap>,
    pagemap: Rc<Pagemap>,
    /// Room for the page table entries of a window's pages, at home and in staging.
    tables: Vec<Entry>,
    /// Staging is empty, and nothing but its page tables says what it holds.
    clean: bool,
    /// Windows opened since the engine was made.
    pub(crate) opened: u64,
    /// Runs that are still registered for missing pages, because the kernel did not take them out:
    /// whoever touches an absent page there would wait for ever, so it is asked again before one can
    /// come to be. Has room for [`UNCLOSED`], so that noting one allocates nothing.
    pub(crate) unclosed: Vec<Span>,
}

impl Windows {
    /// `uffd` is `None` where pages cannot be moved.
    pub(crate) fn new(
        page: usize,
        uffd: Option<&Userfaultfd>,
        maps: Rc<Procmap>,
        pagemap: Rc<Pagemap>,
    ) -> io::Result<Self> {
        let staging = match uffd {
            None => None,
            Some(uffd) => Some(new_staging(page, uffd)?),
        };
        Ok(Self {
            page,
            staging,
            lock: MmapLock::new()?,
            places: vec![Place::Home; MAX_PAGES],
            runs: Vec::with_capacity(MAX_PAGES),
            scratch: Vec::with_capacity(2 * MAX_PAGES),
            maps,
            pagemap,
            tables: vec![Entry::default(); 2 * MAX_PAGES],
            clean: true,
            opened: 0,
            unclosed: Vec::with_capacity(UNCLOSED),
        })
    }

    /// The userfaultfd that staging was registered with is gone, and every run is out of it.
    pub(crate) fn begin_anew(&mut self) {
        self.clean = false;
        if let Some(old) = self.staging.take() {
            // Those addresses are never used again, as in [`Windows::run`].
            let _ = old.advise(Advice::DontNeed);
            let _ = old.into_span();
        }
        self.unclosed.clear();
    }

    /// Makes room for noting runs again, outside of windows.
    pub(crate) fn reserve_unclosed(&mut self) {
        let room = UNCLOSED.max(self.unclosed.len());
        self.unclosed.reserve(room - self.unclosed.len());
    }

    fn neighbours(&self, jobs: &[Job], at: usize) -> bool {
        at > 0 && jobs[at - 1].live.span().start + self.page == jobs[at].live.span().start
    }

    /// Whether the page of `jobs[at]` begins a run in the same stretch as the page before.
    fn bridged(&self, jobs: &[Job], at: usize) -> bool {
        at > 0
            && jobs[at].bridged
            && !self.neighbours(jobs, at)
            && jobs[at - 1].is_zero()
            && jobs[at].is_zero()
    }

    /// How many of `jobs` (sorted by address) one window may take without holding them longer than
    /// about `max_pause_micros`. At least one.
    pub(crate) fn fit(&self, jobs: &[Job], max_pause_micros: u32) -> usize {
        let limit = u64::from(max_pause_micros) * 1000;
        let (mut nanos, mut mappings) = (0, 0);
        for (at, job) in jobs.iter().enumerate().take(MAX_PAGES) {
            nanos += PAGE_NANOS;
            nanos += if job.splits { SPLIT_NANOS } else { 0 };
            if self.bridged(jobs, at) {
                let between = job.live.span().start - jobs[at - 1].live.span().end();
                nanos += BRIDGED_RUN_NANOS + (between / self.page) as u64 * BETWEEN_NANOS;
            } else {
                let run = !self.neighbours(jobs, at);
                let mapping = run || !jobs[at - 1].target.continues(&job.target, self.page);
                nanos += if run { RUN_NANOS } else { 0 };
                nanos += if mapping { MAPPING_NANOS } else { 0 };
                mappings += usize::from(mapping);
            }
            if at > 0 && (nanos > limit || mappings > MAX_MAPPINGS) {
                return at;
            }
        }
        jobs.len().min(MAX_PAGES)
    }

    /// Mappings that a window over `jobs` may add to the process at worst, while it is open or
    /// afterwards.
    pub(crate) fn mappings_needed(&self, jobs: &[Job]) -> u64 {
        let pieces = (0..jobs.len())
            .filter(|&at| {
                let run = !self.neighbours(jobs, at) && !self.bridged(jobs, at);
                run || !jobs[at - 1].target.continues(&jobs[at].target, self.page)
            })
            .count();
        2 * pieces as u64
    }

    /// Makes as many mappings as the next window will need room for. The window gives each back right
    /// before it maps a frame over, so that near a memory limit it cannot run out of memory after an
    /// old mapping is gone (finding F11). If they cannot be made, the window must not be opened.
    pub(crate) fn pay_first(&mut self, jobs: &[Job]) -> bool {
        let frame = jobs.iter().find_map(|job| match &job.target {
            Target::Frame { memfd, offset, .. } => Some((memfd, *offset)),
            Target::Zero => None,
        });
        let Some((memfd, offset)) = frame else {
            return true;
        };
        let rw = Protection::ReadWrite;
        while (self.scratch.len() as u64) < self.mappings_needed(jobs) {
            let made = Mapping::file(memfd, offset, self.page, rw, Sharing::Private);
            let Ok(mapping) = made else {
                self.scratch.clear();
                return false;
            };
            self.scratch.push(mapping);
        }
        true
    }

    /// Opens one window over `jobs`, which are sorted by address, all different, and passed
    /// [`fit`](Self::fit); closes it, and leaves a verdict on each.
    pub(crate) fn run(&mut self, hold: Hold<'_>, jobs: &mut [Job]) {
        assert!(jobs.len() <= MAX_PAGES, "a window of {} pages", jobs.len());
        self.runs.clear();
        let mut head = 0;
        for at in 0..jobs.len() {
            jobs[at].verdict = Verdict::Untried;
            let bridged = self.bridged(jobs, at);
            // A run in a stretch is nothing but zero pages.
            let same = self.neighbours(jobs, at) && jobs[at - 1].is_zero() == jobs[at].is_zero();
            match self.runs.last_mut() {
                Some(run) if same => run.pages += 1,
                _ => {
                    if bridged {
                        self.runs[head].stretch += 1;
                    } else {
                        head = self.runs.len();
                    }
                    self.runs.push(Run {
                        first: at,
                        pages: 1,
                        stretch: usize::from(!bridged),
                        open: false,
                    });
                }
            }
        }
        self.places[..jobs.len()].fill(Place::Home);
        if !self.clean
            && let Hold::Moved { uffd, .. } = hold
        {
            // Leftovers would be taken for pages that have been moved there, and an old translation
            // for a page that is not there any more.
            if !self.staging.as_ref().is_some_and(wipe) {
                let Ok(fresh) = new_staging(self.page, uffd) else {
                    return;
                };
                if let Some(old) = self.staging.replace(fresh) {
                    // Those addresses are never used again.
                    let _ = old.advise(Advice::DontNeed);
                    let _ = old.into_span();
                }
            }
            self.clean = true;
        }
        self.opened += 1;
        let places = &mut self.places[..jobs.len()];
        let (page, staging) = (self.page, self.staging.as_ref());

        let _no_fork = NoFork::wait();
        let mut open = OpenWindow {
            page,
            staging,
            hold,
            jobs,
            places,
            runs: &mut self.runs,
            scratch: &mut self.scratch,
            maps: &self.maps,
            pagemap: &self.pagemap,
            tables: &mut self.tables,
            clean: &mut self.clean,
            unclosed: &mut self.unclosed,
        };
        open.hold_still();
        let calm = {
            let _phase = enter(Phase::WindowBarrier);
            matches!(hold, Hold::Nothing) || self.lock.wait_for_readers().is_ok()
        };
        // Without the barrier nothing may be believed: everything goes back.
        if calm {
            open.compare();
            open.replace();
        }
        // `open` closes here, as it would if anything above panicked.
        drop(open);
        self.scratch.clear();
    }
}

/// A window that is open. Dropping it closes it (invariant W2).
struct OpenWindow<'a> {
    page: usize,
    staging: Option<&'a Mapping>,
    hold: Hold<'a>,
    jobs: &'a mut [Job],
    places: &'a mut [Place],
    runs: &'a mut [Run],
    scratch: &'a mut Vec<Mapping>,
    maps: &'a Procmap,
    pagemap: &'a Pagemap,
    tables: &'a mut [Entry],
    clean: &'a mut bool,
    unclosed: &'a mut Vec<Span>,
}

impl OpenWindow<'_> {
    /// Memory of the jobs `first .. first + pages`, which are neighbours.
    fn live(&self, first: usize, pages: usize) -> Live {
        // The promise holds for each page, so for a run of them.
        self.jobs[first]
            .live
            .joined(self.jobs[first + pages - 1].live)
    }

    fn hold_still(&mut self) {
        let _phase = enter(Phase::WindowOpen);
        match self.hold {
            Hold::Nothing => self.places.fill(Place::Held),
            Hold::Watched(watches) => {
                watches.enter_window();
                for (job, place) in self.jobs.iter_mut().zip(self.places.iter_mut()) {
                    if watches.still_quiet(job.live.span().start) {
                        *place = Place::Held;
                    } else {
                        job.verdict = Verdict::NotQuiet;
                    }
                }
            }
            Hold::Moved { uffd, tracked } => {
                let mut at = 0;
                while at < self.runs.len() {
                    let end = at + self.runs[at].stretch;
                    // Should anything panic in between, it counts as open.
                    self.runs[at].open = true;
                    self.runs[at].open = self.open(uffd, tracked, at);
                    if self.runs[at].open {
                        for run in at..end {
                            self.move_out(uffd, self.runs[run]);
                        }
                    }
                    at = end;
                }
            }
        }
    }

    /// The memory of the stretch that begins with run `head`, and the jobs in it.
    fn stretch(&self, head: usize) -> (Span, std::ops::Range<usize>) {
        let (first, last) = (
            self.runs[head],
            self.runs[head + self.runs[head].stretch - 1],
        );
        let jobs = first.first..last.first + last.pages;
        let start = self.jobs[jobs.start].live.span().start;
        let end = self.jobs[jobs.end - 1].live.span().end();
        (Span::between(start, end), jobs)
    }

    /// Registers a stretch for missing pages. If that fails, what was registered of it (it may lie in
    /// several mappings) is taken back; that needs no room, and where there is nothing to take back
    /// but no room to look, nothing was registered there.
    fn open(&mut self, uffd: &Userfaultfd, tracked: bool, head: usize) -> bool {
        let (span, jobs) = self.stretch(head);
        let Err(stop) = uffd.register(span, Modes::Both) else {
            return true;
        };
        let several = self.runs[head].stretch > 1;
        if several && stop != RegisterStop::NoMemory {
            // Something else lies between them, and the kernel looks at all of it before it changes
            // anything. In the next pass, each run is registered by itself.
            for job in &mut self.jobs[jobs] {
                job.verdict = Verdict::Denied;
            }
            return false;
        }
        if uffd.unregister(span).is_err() {
            // Where registering is forbidden nothing was registered.
            if !stop.errno().is_forbidden() && !uffd.is_ended() {
                self.note_unclosed(span);
            }
        } else if tracked {
            // Where it fails, digests decide.
            let _ = uffd.register(span, Modes::WriteProtect);
        }
        let verdict = match stop {
            RegisterStop::NoMemory => Verdict::NoMemory,
            RegisterStop::Foreign => Verdict::Foreign,
            _ => Verdict::WrongMapping,
        };
        for job in &mut self.jobs[jobs] {
            job.verdict = verdict;
        }
        false
    }

    /// The kernel has not taken `span` out of MISSING.
    fn note_unclosed(&mut self, span: Span) {
        // Beyond this room, thousands of runs, it is given up.
        if self.unclosed.len() < self.unclosed.capacity() && !self.unclosed.contains(&span) {
            self.unclosed.push(span);
        }
    }

    fn move_out(&mut self, uffd: &Userfaultfd, run: Run) {
        let staging = self
            .staging
            .expect("pages are moved only where there is staging");
        let end = run.first + run.pages;
        let (mut at, mut one_by_one, mut tries) = (run.first, false, 0);
        // Pages before `at` are away, or have been given up with a verdict.
        while at < end {
            if self.places[at] != Place::Home {
                at += 1;
                continue;
            }
            let there = self.group(at, end, |place| place == Place::Home);
            let to = if one_by_one { at + 1 } else { there };
            // Should anything panic before what the kernel did is noted, they are looked for.
            self.places[at..to].fill(Place::Moving);
            let moved = self
                .live(at, to - at)
                .move_out(uffd, staging, at * self.page);
            let Some(stop) = moved.stopped else {
                self.places[at..to].fill(Place::Held);
                at = to;
                continue;
            };
            self.places[at..to].fill(Place::Home);
            let several = to - at > 1;
            let told = at + moved.bytes / self.page;
            let first = self.believe_the_page_tables(staging, at, told, to);
            let Some((left, stray)) = first else { continue };
            let moved_some = left > at;
            at = left;
            match stop {
                // The kernel looks at the mapping of the whole range first. Perhaps only some of
                // these pages have become another mapping.
                MoveStop::WrongMapping if several && !moved_some => {
                    one_by_one = true;
                    continue;
                }
                // A stray reader of staging has got itself a page there: it is nobody's. Or the
                // kernel stumbled over what it had just moved itself.
                MoveStop::Present if tries < MOVING_TRIES => {
                    if stray {
                        let part = staging.span().page_run(at, 1);
                        // If it fails the next move says so again.
                        let _ = staging.advise_part(part, Advice::DontNeed);
                    }
                    tries += 1;
                    continue;
                }
                MoveStop::Changing if tries < MOVING_TRIES => {
                    tries += 1;
                    continue;
                }
                _ => {}
            }
            self.jobs[at].verdict = match stop {
                // The page tables have just shown it there.
                MoveStop::Missing => Verdict::Untried,
                MoveStop::WrongMapping | MoveStop::NotSupported => Verdict::WrongMapping,
                MoveStop::NoMemory => Verdict::NoMemory,
                _ => Verdict::Busy,
            };
            at += 1;
            tries = 0;
        }
    }

    /// After a move that did not end well: which of the pages `from..to` are in staging all the same?
    ///
    /// What the kernel says of it cannot be believed: 6.18 answers EEXIST now and then for pages, up to
    /// a whole batch, that it has moved. (Taking such a page for a stray one, and discarding it, lost
    /// one page in some hundred thousand windows under racing writers.) The page tables can: nobody
    /// fills a place in this run while it is registered for missing pages, so a page whose home is
    /// empty and whose place in staging is not has been moved.
    ///
    /// A page from `told` on, up to which the kernel said that it had come, is put back and nothing else:
    /// since the kernel took its own move for one that did not happen, nothing says that it has flushed
    /// the old translation, and a writer that still has it writes to the page wherever it lies. At home
    /// that is right; a frame in its place would lose the write.
    ///
    /// Returns the first page that is still at home, and whether something lies in its place in
    /// staging; `None` if none is.
    fn believe_the_page_tables(
        &mut self,
        staging: &Mapping,
        from: usize,
        told: usize,
        to: usize,
    ) -> Option<(usize, bool)> {
        let (home, away) = self.tables.split_at_mut(MAX_PAGES);
        let (home, away) = (&mut home[..to - from], &mut away[..to - from]);
        let (home_at, away_at) = (
            self.jobs[from].live.span().start,
            staging.span().page_run(from, to - from).start,
        );
        let read = |start, into: &mut [Entry]| {
            let wanted = into.len();
            (0..READING_TRIES).any(|_| self.pagemap.entries(start, into) == Ok(wanted))
        };
        if !read(home_at, home) || !read(away_at, away) {
            // Not knowing, put all of them back and merge none: what is not in staging is found to be
            // at home then.
            self.places[from..to].fill(Place::Held);
            for job in &mut self.jobs[from..to] {
                job.verdict = Verdict::Busy;
            }
            return None;
        }
        let mut first = None;
        for at in from..to {
            let (home, away) = (home[at - from], away[at - from]);
            if is_empty(home) && !is_empty(away) {
                self.places[at] = Place::Held;
                if at >= told {
                    self.jobs[at].verdict = Verdict::Denied;
                }
            } else if is_empty(home) {
                self.jobs[at].verdict = Verdict::Absent;
                self.places[at] = Place::Nowhere;
            } else if first.is_none() {
                first = Some((at, !is_empty(away)));
            }
        }
        first
    }

    fn compare(&mut self) {
        let _phase = enter(Phase::WindowCompare);
        let moved = matches!(self.hold, Hold::Moved { .. });
        for (at, job) in self.jobs.iter_mut().enumerate() {
            if self.places[at] != Place::Held || job.verdict != Verdict::Untried {
                continue;
            }
            let equal = match (&job.target, self.staging.filter(|_| moved)) {
                (Target::Frame { view, at: seen, .. }, Some(staging)) => {
                    live::same((staging, at * self.page), (view, *seen), self.page)
                }
                (Target::Zero, Some(staging)) => live::zero((staging, at * self.page), self.page),
                (Target::Frame { view, at: seen, .. }, None) => job.live.same_as(view, *seen),
                (Target::Zero, None) => job.live.is_zero(),
            };
            job.verdict = if equal {
                Verdict::Merged
            } else {
                Verdict::Differs
            };
        }
    }

    /// Puts frames and zero pages in the place of what was found equal, a run at a time.
    fn replace(&mut self) {
        let _phase = enter(Phase::WindowReplace);
        for at in 0..self.runs.len() {
            let run = self.runs[at];
            let end = run.first + run.pages;
            let mut from = run.first;
            while from < end {
                if self.jobs[from].verdict != Verdict::Merged {
                    from += 1;
                    continue;
                }
                let mut to = from + 1;
                while to < end
                    && self.jobs[to].verdict == Verdict::Merged
                    && self.jobs[to - 1]
                        .target
                        .continues(&self.jobs[to].target, self.page)
                {
                    to += 1;
                }
                self.replace_piece(from, to - from);
                from = to;
            }
        }
    }

    fn replace_piece(&mut self, from: usize, pages: usize) {
        let live = self.live(from, pages);
        // Their room is what this mapping takes, and the border that it cuts.
        self.scratch.truncate(self.scratch.len().saturating_sub(2));
        let (done, place, verdict) = match &self.jobs[from].target {
            Target::Frame { memfd, offset, .. } => {
                match mapped_over(self.maps, live, || live.map_frames(memfd, *offset)) {
                    Ok(()) => (pages, Place::Mapped, Verdict::Merged),
                    Err(MapStop::Sealed) => (0, Place::Mapped, Verdict::Sealed),
                    Err(_) => (0, Place::Mapped, Verdict::NoMemory),
                }
            }
            Target::Zero => match self.hold {
                Hold::Moved { uffd, .. } => {
                    let filled = live.fill_zero(uffd);
                    (filled.bytes / self.page, Place::Zeroed, Verdict::NoMemory)
                }
                Hold::Watched(_) | Hold::Nothing => {
                    match mapped_over(self.maps, live, || live.map_fresh()) {
                        Ok(()) => {
                            // Without it the zero page comes at the first touch.
                            let _ = live.populate_read();
                            (pages, Place::Mapped, Verdict::Merged)
                        }
                        Err(MapStop::Sealed) => (0, Place::Mapped, Verdict::Sealed),
                        Err(_) => (0, Place::Mapped, Verdict::NoMemory),
                    }
                }
            },
        };
        self.places[from..from + done].fill(place);
        for job in &mut self.jobs[from + done..from + pages] {
            job.verdict = verdict;
        }
    }

    /// The end of `from`'s group: jobs of the run up to `end` whose place satisfies `is`.
    fn group(&self, from: usize, end: usize, is: impl Fn(Place) -> bool) -> usize {
        (from..end).find(|&at| !is(self.places[at])).unwrap_or(end)
    }

    /// Can be called again if it has panicked: it goes on with what is not at home yet.
    fn close(&mut self) {
        let _phase = enter(Phase::WindowClose);
        match self.hold {
            Hold::Nothing => {}
            Hold::Watched(watches) => {
                for (at, job) in self.jobs.iter().enumerate() {
                    if self.places[at] == Place::Held {
                        watches.let_go(job.live);
                    }
                }
                for run in self.runs.iter() {
                    watches.wake(self.live(run.first, run.pages));
                }
                watches.leave_window();
            }
            Hold::Moved { uffd, tracked } => {
                let staging = self.staging.expect("as in move_out");
                let (mut ended, mut opened) = (false, false);
                for head in 0..self.runs.len() {
                    if self.runs[head].open {
                        opened = true;
                        ended |= self.close_moved(uffd, staging, tracked, head);
                    }
                }
                if opened {
                    self.let_go_on(uffd, ended);
                }
                let used = staging.span().page_run(0, self.jobs.len());
                // What is left there are pages whose frames are mapped now.
                *self.clean &= staging.advise_part(used, Advice::DontNeed).is_ok();
            }
        }
    }

    /// Closes the stretch that begins with run `head`. Says whether a range could not be taken out of
    /// MISSING because that is forbidden.
    fn close_moved(
        &mut self,
        uffd: &Userfaultfd,
        staging: &Mapping,
        tracked: bool,
        head: usize,
    ) -> bool {
        let runs = head..head + self.runs[head].stretch;
        for run in runs.clone() {
            self.bring_home(uffd, staging, self.runs[run]);
        }
        if runs.len() > 1 {
            // No frames are mapped in it.
            let (span, jobs) = self.stretch(head);
            return match stop_waiting(uffd, span, tracked) {
                Err(RegisterStop::Invalid) => self.take_out_by_page(uffd, span, jobs, tracked),
                done => self.judge_taken_out(uffd, span, done),
            };
        }
        let run = self.runs[head];
        let (mut at, end, mut ended) = (run.first, run.first + run.pages, false);
        while at < end {
            let mapped = self.group(at, end, |place| place == Place::Mapped);
            let open = self.group(mapped, end, |place| place != Place::Mapped);
            if open > mapped {
                let span = self.live(mapped, open - mapped).span();
                ended |= self.take_out(uffd, span, tracked);
            }
            at = open;
        }
        ended
    }

    /// Puts back what is still in staging of a run.
    fn bring_home(&mut self, uffd: &Userfaultfd, staging: &Mapping, run: Run) {
        let (mut at, end) = (run.first, run.first + run.pages);
        while at < end {
            if self.places[at] == Place::Moving {
                *self.clean = false;
                self.put_one_back(uffd, staging, at);
                self.places[at] = Place::Home;
            }
            let held = self.group(at, end, |place| place == Place::Held);
            if held > at {
                self.put_back(uffd, staging, at, held - at);
            }
            at = held.max(at + 1);
        }
    }

    /// Takes a stretch out of MISSING into which its owner has mapped something meanwhile that cannot be
    /// asked about: that has nothing of ours any more, and the rest is taken out all the same.
    fn take_out_by_page(
        &mut self,
        uffd: &Userfaultfd,
        span: Span,
        jobs: std::ops::Range<usize>,
        tracked: bool,
    ) -> bool {
        let (mut ended, mut next) = (false, jobs.start);
        for at in 0..span.pages() {
            let page = span.page_run(at, 1);
            let held = next < jobs.end && self.jobs[next].live.span() == page;
            next += usize::from(held);
            match stop_waiting(uffd, page, tracked) {
                Err(RegisterStop::Invalid) if !held => {}
                done => ended |= self.judge_taken_out(uffd, page, done),
            }
        }
        ended
    }

    /// Takes `span` out of MISSING; if that fails, it is noted. Says whether it is forbidden.
    fn take_out(&mut self, uffd: &Userfaultfd, span: Span, tracked: bool) -> bool {
        let done = stop_waiting(uffd, span, tracked);
        self.judge_taken_out(uffd, span, done)
    }

    fn judge_taken_out(
        &mut self,
        uffd: &Userfaultfd,
        span: Span,
        done: Result<(), RegisterStop>,
    ) -> bool {
        match done {
            Ok(()) => false,
            Err(stop) if stop.errno().is_forbidden() => true,
            Err(_) if uffd.is_ended() => false,
            Err(_) => {
                self.note_unclosed(span);
                false
            }
        }
    }

    /// Wakes whoever waits for a page of this window, in one call for all that lies between its first and
    /// its last.
    fn let_go_on(&self, uffd: &Userfaultfd, ended: bool) {
        let first = self.jobs[0].live.span().start;
        let last = self.jobs[self.jobs.len() - 1].live.span().end();
        let span = Span::between(first, last);
        let woken = (0..READING_TRIES).any(|_| uffd.wake(span).is_ok());
        if (ended || !woken) && !uffd.is_ended() {
            // Somebody may wait here for ever, and nothing else is left that would let him go on. No
            // window opens after this, and writes are not tracked any more.
            let _ = (0..READING_TRIES).any(|_| uffd.end(self.pagemap).is_ok());
        }
    }

    /// Puts pages back from staging: at once, else page by page, else as copies, else (where no ioctl may
    /// be called any more, or waiting does not help) by `mremap`. It does not give up while there is
    /// anywhere to put them (finding F10): their readers wait rather than lose.
    fn put_back(&mut self, uffd: &Userfaultfd, staging: &Mapping, first: usize, pages: usize) {
        let moved = self
            .live(first, pages)
            .move_back(uffd, staging, first * self.page);
        if moved.is_complete() {
            self.places[first..first + pages].fill(Place::Home);
            return;
        }
        // The count is not believed here either, and neither are this thread's translations of staging
        // from now on.
        *self.clean = false;
        for at in first..first + pages {
            self.put_one_back(uffd, staging, at);
            self.places[at] = Place::Home;
        }
    }

    fn put_one_back(&self, uffd: &Userfaultfd, staging: &Mapping, at: usize) {
        let (live, away) = (self.live(at, 1), staging.span().page_run(at, 1).start);
        let home = live.span();
        let is_there = |at: usize| self.pagemap.entry(at).map(|entry| !is_empty(entry));
        for tries in 1_u32.. {
            // A copy of an empty place in staging would be a page of zeroes.
            if is_there(away) == Ok(false)
                || live.move_back(uffd, staging, at * self.page).is_complete()
            {
                return;
            }
            let carried = || live.carry_back(staging, at * self.page).is_ok();
            let done = match live.copy_back(uffd, staging, at * self.page).stopped {
                None => true,
                // It is back already, if the page tables say so, too.
                Some(FillStop::Present) if is_there(home.start) == Ok(true) => true,
                // The owner has unmapped it, or mapped something else there: nobody misses it.
                Some(FillStop::Missing | FillStop::WrongMapping) => {
                    tries >= RETURNING_TRIES || !mapping::is_mapped(home)
                }
                // Forbidden; or "the process is ending", which this thread would not live to see.
                Some(stop) if stop == FillStop::Exiting || stop.errno().is_forbidden() => {
                    tries >= READING_TRIES && carried()
                }
                // Waiting has not helped: memory that stays short, or a kernel that denies it for a reason
                // nobody knew of. Carrying it takes none, and cuts the mapping instead.
                Some(_) => {
                    tries >= CARRYING_TRIES
                        && (is_there(home.start), is_there(away)) == (Ok(false), Ok(true))
                        && mapping::is_mapped(home)
                        && carried()
                }
            };
            if done {
                return;
            }
            process::give_way();
        }
    }
}

impl Drop for OpenWindow<'_> {
    fn drop(&mut self) {
        let mut closed = catch_unwind(AssertUnwindSafe(|| self.close()));
        for _ in 0..CLOSING_PANICS {
            if closed.is_ok() {
                return;
            }
            // A bug of ours, but not one that may cost the program its pages: the rest is done.
            *self.clean = false;
            let again = catch_unwind(AssertUnwindSafe(|| self.close()));
            if again.is_ok() {
                break;
            }
            closed = again;
        }
        if let Err(panic) = closed
            && !std::thread::panicking()
        {
            resume_unwind(panic);
        }
    }
}

/// Replaces what is mapped at `place` by `act`. Should the kernel run out of memory after it has taken
/// the old mapping away, the place would be a hole, and nothing but trying again fills it: what is to
/// lie there is equal to what lay there.
pub(crate) fn mapped_over(
    maps: &Procmap,
    place: Live,
    mut act: impl FnMut() -> Result<(), MapStop>,
) -> Result<(), MapStop> {
    loop {
        match act() {
            Err(MapStop::NoMemory) if is_hole(maps, place) => process::give_way(),
            other => return other,
        }
    }
}

/// Whether nothing is mapped there any more.
fn is_hole(maps: &Procmap, place: Live) -> bool {
    match maps.at(place.span().start) {
        Ok(_) => false,
        Err(QueryStop::NotMapped) => true,
        // Before Linux 6.11 this cannot be asked like that.
        Err(_) => !mapping::is_mapped(place.span()),
    }
}

/// Staging: registered for write-protection only (invariant W3).
fn new_staging(page: usize, uffd: &Userfaultfd) -> io::Result<Mapping> {
    let staging = Mapping::anonymous(MAX_PAGES * page, Protection::ReadWrite)?;
    staging.advise(Advice::NoHugePage)?;
    staging.advise(Advice::DontFork)?;
    uffd.register(staging.span(), Modes::WriteProtect)?;
    Ok(staging)
}

/// Empties staging, and has every processor forget what it knew of it. What lies there is nobody's: a
/// frame is mapped in its place, or it is back. Only a page that is taken away makes the kernel flush
/// the translation of its address, so there must be one everywhere first; a few at a time, because
/// this may be near a memory limit.
fn wipe(staging: &Mapping) -> bool {
    staging.advise(Advice::DontNeed).is_ok()
        && (0..MAX_PAGES).step_by(WIPED_AT_ONCE).all(|first| {
            let part = staging.span().page_run(first, WIPED_AT_ONCE);
            [Advice::PopulateWrite, Advice::DontNeed]
                .into_iter()
                .all(|advice| staging.advise_part(part, advice).is_ok())
        })
}

/// Nothing is there: neither a page nor one in swap.
fn is_empty(entry: Entry) -> bool {
    !entry.is_present() && !entry.is_swapped()
}

/// Takes a range out of MISSING (finding F1: only UNREGISTER does), and tracks its writes again.
fn stop_waiting(uffd: &Userfaultfd, span: Span, tracked: bool) -> Result<(), RegisterStop> {
    // Closing exactly what was opened needs no room. If the kernel says otherwise, trying again for a
    // while is all there is; all pages are back, so what stays registered harms nobody until the
    // owner discards one of them. Any other answer means that it is not mapped as it was.
    let mut tries = 0;
    while let Err(stop) = uffd.unregister(span) {
        tries += 1;
        let most = if stop == RegisterStop::NoMemory {
            CLOSING_TRIES
        } else {
            READING_TRIES
        };
        if tries >= most {
            return Err(stop);
        }
        process::give_way();
    }
    if tracked {
        // If it fails, these pages are judged by their digests from now on.
        let _ = uffd.register(span, Modes::WriteProtect);
    }
    Ok(())
}
