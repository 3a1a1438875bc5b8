//! The scan: pages are taken, decided on, and what was decided is carried out. The heart of the engine.
//!
//! [`Scanner::step`] takes pages from the cursor, decides for each of them, and has memory carry the
//! decisions out. In content order that is one page at a time, as ksmd does it. In digest order it is
//! a batch of up to [`BATCH`] pages: one call hashes them all, then each is decided on in turn, then
//! one call does everything that was decided.
//!
//! * `cursor` says which page comes next, and deals with those that need no more than a look.
//! * `sweep` looks at merged pages before a scan, to learn which of them have been written.
//! * `batch` hashes pages and decides on them: `cmp_and_merge_page`.
//! * `conclude` draws the conclusions from what became of the plans.
//!
//! # A scan that is left out
//! If the last scan passed over all pages, nothing has been asked of the engine since, and memory says that
//! nothing has changed since that one began ([`PageSpace::is_still`]), the next would pass over all of them
//! again. It is begun and ended, and counted, and looks at nothing.
//!
//! # What bounds a step
//! The budget bounds what is examined. What is only looked at, in the scan and in the sweep before it,
//! is bounded by [`Scanner::set_look_limit`]: a step that comes that far returns, and the next goes on.
//!
//! # Invariants (proved by [`crate::check`])
//! * P1 and P2 stand in `cursor`, P3 in `batch`, P4 in `sweep`.
//!
//! # Cost
//! A step costs what `cursor` says of pages passed over, and `batch` of pages examined; a scan besides a
//! look at each chunk of records that has lost one.
//!
//! # Departures from ksmd
//! * When the last region goes in mid-scan, that scan is void: it is not counted.

mod batch;
mod conclude;
mod cursor;
mod sweep;

use self::cursor::{Next, Visit};
use crate::regions::RING;
use crate::scanner::{RunMode, Scanner, StepReport};
use crate::{AdvisorMode, Clock, Event, Look, PageSpace, TreeOrder};
pub(crate) use batch::Batch;
#[cfg(test)]
pub(crate) use batch::leave_a_plan;
pub(crate) use cursor::Cursor;

/// Pages in one window, and in one batch.
pub(crate) const BATCH: usize = 512;

impl Scanner {
    /// Examines at most `budget` pages. Ends early with the end of a full scan, or when it has looked
    /// at [many more](Scanner::set_look_limit) than it has examined: call it again. Never sleeps,
    /// spawns, locks, or reads a clock.
    ///
    /// # Errors
    /// When memory fails as a whole. What had been done by then is recorded, the rest is undone, and
    /// the pages in question count as volatile.
    ///
    /// ```
    /// use pagemerge_core::{
    ///     Attempt, Clock, Content, Digest, FrameId, Look, PageId, PageSpace, PageState, Request,
    ///     Scanner, Settings, Tick, Window, Written,
    /// };
    /// use std::{cmp::Ordering, collections::BTreeMap, convert::Infallible};
    ///
    /// /// Memory whose pages are numbers and are never written.
    /// #[derive(Default)]
    /// struct Numbers {
    ///     pages: Vec<u64>,
    ///     frames: BTreeMap<FrameId, u64>,
    ///     shown: BTreeMap<PageId, FrameId>,
    /// }
    ///
    /// impl Numbers {
    ///     fn read(&self, content: Content) -> u64 {
    ///         match content {
    ///             Content::Page(page) => self.pages[page.index()],
    ///             Content::Frame(frame) => self.frames[&frame],
    ///         }
    ///     }
    /// }
    ///
    /// impl PageSpace for Numbers {
    ///     type Error = Infallible;
    ///     fn page_size(&self) -> usize { 8 }
    ///     fn observe(&mut self, w: Window, _: Look, into: &mut [PageState]) -> Result<(), Infallible> {
    ///         for (page, state) in (w.first.0..).map(PageId).zip(into) {
    ///             *state = match self.shown.contains_key(&page) {
    ///                 true => PageState::Merged,
    ///                 false => PageState::Resident(Written::No),
    ///             };
    ///         }
    ///         Ok(())
    ///     }
    ///     fn digest(&mut self, pages: &[PageId], into: &mut [Attempt<Digest>]) -> Result<(), Infallible> {
    ///         for (page, digest) in pages.iter().zip(into) {
    ///             let hash = self.pages[page.index()];
    ///             *digest = Attempt::Done(Digest { hash, zero: hash == 0 });
    ///         }
    ///         Ok(())
    ///     }
    ///     fn compare(&mut self, a: Content, b: Content) -> Result<Attempt<Ordering>, Infallible> {
    ///         Ok(Attempt::Done(self.read(a).cmp(&self.read(b))))
    ///     }
    ///     fn apply(&mut self, asked: &[Request], ended: &mut [Attempt<()>]) -> Result<(), Infallible> {
    ///         for (request, outcome) in asked.iter().zip(ended) {
    ///             *outcome = match *request {
    ///                 Request::Promote { page, frame } => {
    ///                     self.frames.insert(frame, self.pages[page.index()]);
    ///                     self.shown.insert(page, frame);
    ///                     Attempt::Done(())
    ///                 }
    ///                 Request::Share { page, frame } if self.frames.contains_key(&frame) => {
    ///                     self.shown.insert(page, frame);
    ///                     Attempt::Done(())
    ///                 }
    ///                 _ => Attempt::Gone,
    ///             };
    ///         }
    ///         Ok(())
    ///     }
    ///     fn release(&mut self, frame: FrameId) -> Result<(), Infallible> {
    ///         self.frames.remove(&frame);
    ///         Ok(())
    ///     }
    /// }
    ///
    /// let mut memory = Numbers { pages: vec![7, 3, 7, 7], ..Numbers::default() };
    /// let mut scanner = Scanner::new(Settings::default())?;
    /// scanner.register(4, "")?;
    /// let clock = Clock { now: Tick(0), cpu_nanos: 0 };
    /// while !scanner.step(&mut memory, clock, 100)?.full_scan_done {}
    /// let stats = scanner.stats();
    /// assert_eq!((stats.pages_shared, stats.pages_sharing, stats.pages_unshared), (1, 2, 1));
    /// assert_eq!(memory.shown[&PageId(0)], memory.shown[&PageId(3)]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn step<S: PageSpace>(
        &mut self,
        space: &mut S,
        clock: Clock,
        budget: u32,
    ) -> Result<StepReport, S::Error> {
        let mut report = StepReport::default();
        if self.run == RunMode::Unmerge || self.regions.is_empty() {
            report.idle = true;
            return Ok(report);
        }
        self.page_size = space.page_size();
        self.now = clock.now;
        if budget == 0 {
            return Ok(report);
        }
        self.look_left = self.look_limit;
        self.looked = 0;
        if !self.waiting.is_empty() {
            self.stir();
            self.place_waiting(space)?;
        }
        if self.in_scan {
            self.catch_up(space)?;
        }
        let by_page = self.settings.tree_order == TreeOrder::Content;
        let room = if by_page { 1 } else { BATCH };
        loop {
            let (mut scan_ends, mut enough) = (false, false);
            while report.examined < budget && self.batch.candidates.len() < room {
                let next = self.next_page(space, clock).inspect_err(|_| {
                    self.batch.candidates.clear();
                })?;
                let visit = match next {
                    Next::Page(visit) => visit,
                    Next::LookedEnough => {
                        enough = true;
                        break;
                    }
                    Next::End => {
                        scan_ends = true;
                        break;
                    }
                };
                report.examined += 1;
                self.counters.scanned += 1;
                // What the budget pays for does not count as looked at beyond it.
                self.look_left = self.look_left.saturating_add(1);
                if let Visit::Examine(candidate) = visit {
                    self.detach(candidate.page);
                    self.batch.candidates.push(candidate);
                }
            }
            self.examine_batch(space)?;
            report.looked = self.looked;
            if scan_ends {
                self.end_scan(clock);
                report.full_scan_done = true;
                return Ok(report);
            }
            if enough || report.examined >= budget {
                return Ok(report);
            }
        }
    }

    /// Begins a full scan, or goes on beginning it. Returns whether it has begun.
    pub(super) fn begin_scan<S: PageSpace>(
        &mut self,
        space: &mut S,
        clock: Clock,
    ) -> Result<bool, S::Error> {
        if self.sweeping.is_none() {
            self.advisor.scan_starts(clock);
            if self.has_nothing_to_do(space) {
                self.start_at(RING);
                return Ok(true);
            }
        }
        if self.settings.tree_order == TreeOrder::Content {
            self.sweep_all(space)?;
        } else {
            let from = match self.sweeping {
                Some(from) => from,
                None => self.beginning(self.regions.after(RING)),
            };
            // Should memory fail, the next step begins again here.
            self.sweeping = Some(from);
            self.swept = false;
            let swept = self.sweep(space, from, self.look_left)?;
            self.note_looked(swept.pages, swept.pages);
            if swept.rest.is_some() {
                self.sweeping = swept.rest;
                return Ok(false);
            }
        }
        (self.sweeping, self.swept) = (None, true);
        self.start_at(self.regions.after(RING));
        Ok(true)
    }

    fn start_at(&mut self, region: u32) {
        self.emit(Event::StartScan {
            seq: self.seq,
            rmap_entries: self.counters.items,
        });
        if !self.settings.keeps_unstable() {
            self.discard_unstable_trees();
        }
        self.recall_clashes();
        self.in_scan = true;
        self.enter_region(region);
    }

    /// Whether the scan that begins would pass over all pages, as the last one did.
    fn has_nothing_to_do<S: PageSpace>(&mut self, space: &mut S) -> bool {
        let still = space.is_still(Look::Scan);
        self.idle_so_far = self.settings.keeps_unstable();
        still
            && self.idle
            && self.idle_so_far
            && self.lingering == 0
            && self.clashes.is_empty()
            && !self.many_clashes
    }

    /// Something has happened that the next scan must not be left out for.
    pub(crate) fn stir(&mut self) {
        (self.idle, self.idle_so_far) = (false, false);
    }

    /// Counts pages looked at, and charges the running step for them.
    pub(super) fn note_looked(&mut self, pages: u32, charge: u32) {
        self.looked = self.looked.saturating_add(pages);
        self.look_left = self.look_left.saturating_sub(charge);
    }

    /// Ends a full scan.
    fn end_scan(&mut self, clock: Clock) {
        if self.settings.advisor_mode == AdvisorMode::ScanTime {
            let advice = self
                .advisor
                .scan_stops(&self.settings, self.pages_to_scan, clock);
            self.pages_to_scan = advice.pages_to_scan;
            self.emit(Event::Advisor {
                scan_time: advice.scan_time,
                pages_to_scan: u64::from(advice.pages_to_scan),
                cpu_percent: advice.cpu_percent,
            });
        }
        self.emit(Event::StopScan {
            seq: self.seq,
            rmap_entries: self.counters.items,
        });
        self.seq += 1;
        self.in_scan = false;
        self.idle = self.idle_so_far;
        if !self.settings.keeps_unstable() {
            self.discard_unstable_trees();
        }
        self.counters.skipped_last = self.counters.skipped_now;
        self.counters.skipped_now.fill(0);
        self.records.free_empty_chunks(0, self.records.end());
    }
}
