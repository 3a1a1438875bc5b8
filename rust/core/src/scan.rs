//! The scan: which page comes next, and what is done with it. The heart of the engine.
//!
//! [`Scanner::step`] takes pages from the cursor, decides for each of them, and has memory carry the
//! decisions out. In content order that is one page at a time, as ksmd does it. In digest order it is
//! a batch of up to [`BATCH`] pages: one call hashes them all, then each is decided on in turn, then
//! one call does everything that was decided.
//!
//! # Plans that come to nothing
//! A page may find its twin while that twin's frame is only planned. Such a frame's node is
//! *tentative*, and the page plans to join it. If the frame is not made after all, the node is taken
//! out again, its tree partner goes back among the candidates, and the pages that wanted to join are
//! decided on once more, in their order, without the page that failed. The same goes for pages that were
//! turned away because a frame was full, when one of those that were to fill it has failed. So one page
//! that cannot be merged does not hold up its twins; and since each round leaves out at least one page,
//! or one attempt with the zero page, for good, the rounds end.
//!
//! There may be many rounds: with 500 pinned pages of equal bytes, one for each. So once a promotion has
//! failed, the twins wait for the outcome of the next one instead of planning to join it, and are neither
//! compared nor asked for again in vain: a page costs one decision, whatever fails around it.
//!
//! # What is calm
//! By the kernel's rule a page is calm when its hash is that of the last look. Where memory knows
//! what was written, a page not written is calm, and one written is volatile without being hashed. If
//! also the order is by digest, pages that are merged, or unwritten candidates, are passed over: they
//! are neither counted as scanned nor taken from the budget.
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
//! * P1. The cursor is between two scans or at a page of a region in the scan list.
//! * P2. The window that has been looked at lies within that region, from the cursor on.
//! * P3. Between two steps no plan is left.
//! * P4. A sweep that is to go on does so at a page of a region, or has come to the end of the list; and
//!   no scan is running.
//!
//! # Cost
//! A page passed over costs a few nanoseconds here and no call. Nothing is allocated once the batch
//! has grown to its size.
//!
//! # Departures from ksmd
//! * A frame that has lost its last page is known from a sweep over merged pages when a scan begins;
//!   with [`lagging_records`](crate::Settings::lagging_records) in content order, when a step does.
//! * No page is refused for belonging to the same huge page as its twin: memory splits those.
//! * When the last region goes in mid-scan, that scan is void: it is not counted.

use crate::forest::{Forest, go_side_by_side};
use crate::rbtree::NIL;
use crate::regions::{Life, RING, Region};
use crate::rmap::{
    ATTACHED, BROKEN, COUNTED_EVEN, COUNTED_ODD, EXISTS, HASHED, RECHECK, RmapItem, UNSTABLE, ZERO,
    low32,
};
use crate::scanner::{RunMode, Scanner, StepReport, TreePair};
use crate::smart_scan;
use crate::stable_tree::{Spot, StableFound};
use crate::unstable_tree::UnstableFound;
use crate::{
    AdvisorMode, Attempt, Clock, Content, Digest, Event, FrameId, Look, Nid, PageId, PageSpace,
    PageState, Reason, RegionId, Request, TreeOrder, Window, Written,
};
use std::collections::BTreeSet;
use std::ops::Range;

/// Pages in one window, and in one batch.
pub(crate) const BATCH: usize = 512;

/// Pages in the first window beyond a gap.
const ISLAND: u32 = 16;

/// Searches for which it is worth while to go side by side.
const SIDE_BY_SIDE: usize = 8;

/// How many pages looked at a call costs as much time as.
const LOOK_PRICE: u32 = 64;

/// What a candidate is that can be passed over while nobody writes to it.
const SETTLED: u16 = EXISTS | UNSTABLE | HASHED;

/// The same for a page that is not zero where only zero pages are merged: no candidate.
const NOT_ZERO: u16 = EXISTS | HASHED;

/// `EFAULT`, as trace events show a failed merge.
const FAILED: i32 = -14;

/// How far the scan has come (the kernel's `ksm_scan`).
#[derive(Clone, Debug)]
pub(crate) struct Cursor {
    /// The region, or [`RING`] when no region is left in this scan.
    pub(crate) region: u32,
    /// The next page.
    pub(crate) at: u32,
    /// Whether the region has been registered at any time during this visit.
    touched: bool,
    /// What pages from `window_first` on were when they were looked at.
    window: Vec<PageState>,
    window_first: u32,
    /// Their NUMA nodes, if those matter.
    nids: Vec<Nid>,
    /// Nothing was at the page before `at`: there may be more of that.
    in_gap: bool,
    /// There was a gap before `at`, and nothing is known of what follows.
    alone: bool,
}

impl Default for Cursor {
    fn default() -> Self {
        Self {
            region: RING,
            at: 0,
            touched: false,
            window: Vec::new(),
            window_first: 0,
            nids: Vec::new(),
            in_gap: false,
            alone: false,
        }
    }
}

impl Cursor {
    /// Moves to the beginning of a region.
    pub(crate) fn enter(&mut self, region: u32, first: u32) {
        (self.region, self.at, self.touched) = (region, first, false);
        (self.in_gap, self.alone) = (true, false);
        self.drop_window();
    }

    pub(crate) fn drop_window(&mut self) {
        self.window.clear();
        self.nids.clear();
    }

    /// The pages looked at and not visited yet: the first, and what they were.
    pub(crate) fn rest(&self) -> (u32, &[PageState]) {
        let visited = self.at.saturating_sub(self.window_first) as usize;
        (self.at, self.window.get(visited..).unwrap_or(&[]))
    }

    /// Brings what is known of pages up to date after they have changed by our own doing.
    pub(crate) fn rewrite(&mut self, first: u32, end: u32, state: PageState) {
        let window_end = self.window_first + low32(self.window.len());
        let (first, end) = (first.max(self.window_first), end.min(window_end));
        if first < end {
            let (from, to) = (first - self.window_first, end - self.window_first);
            self.window[from as usize..to as usize].fill(state);
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.window.capacity() * size_of::<PageState>() + self.nids.capacity() * size_of::<Nid>()
    }
}

/// A page that is being examined.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    page: PageId,
    region: RegionId,
    tree: u32,
    /// The hash of its bytes, once it is known.
    hash: u64,
    hashed: bool,
    /// Calm only if the hash is that of the last look.
    by_hash: bool,
    /// The zero page has been tried.
    zero_tried: bool,
}

/// What has been decided for a page.
#[derive(Clone, Copy, Debug)]
enum Plan {
    /// Put it onto the zero page.
    Zero,
    /// Put it onto the frame of a node.
    Join { node: u32 },
    /// Make a frame of it, and put its partner onto that.
    Pair { partner: PageId, node: u32 },
}

/// A frame made in this round.
#[derive(Clone, Copy, Debug)]
struct Made {
    /// The page of which it was made.
    page: PageId,
    node: u32,
    /// The partner, if it refused to join: a candidate again, should the frame come to nothing.
    refused: Option<PageId>,
}

/// What is under way in a step. Empty between steps, but keeps its room.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    candidates: Vec<Candidate>,
    plans: Vec<(Candidate, Plan)>,
    requests: Vec<Request>,
    outcomes: Vec<Attempt<()>>,
    to_hash: Vec<PageId>,
    digests: Vec<Attempt<Digest>>,
    again: Vec<Candidate>,
    /// Pages that have become candidates because the frames with their bytes are full, or will be.
    turned_away: Vec<Candidate>,
    /// Such a frame has got room, because a page that was to join has failed.
    gave_room: bool,
    made: Vec<Made>,
    failed: Vec<u32>,
    /// Trees and hashes of which the last promotion in this batch has failed.
    failing: BTreeSet<(u32, u64)>,
    /// Those of them of which another is planned in this round.
    trying: BTreeSet<(u32, u64)>,
    frames: Vec<FrameId>,
    states: Vec<PageState>,
    /// Where searches side by side have come to.
    ways: Vec<(u64, u32)>,
}

impl Batch {
    pub(crate) fn is_empty(&self) -> bool {
        self.candidates.is_empty() && self.plans.is_empty() && self.again.is_empty()
    }

    pub(crate) fn bytes(&self) -> usize {
        (self.candidates.capacity() + self.again.capacity() + self.turned_away.capacity())
            * size_of::<Candidate>()
            + self.plans.capacity() * size_of::<(Candidate, Plan)>()
            + self.requests.capacity() * size_of::<Request>()
            + self.outcomes.capacity() * size_of::<Attempt<()>>()
            + self.to_hash.capacity() * size_of::<PageId>()
            + self.digests.capacity() * size_of::<Attempt<Digest>>()
            + self.made.capacity() * size_of::<Made>()
            + self.frames.capacity() * size_of::<FrameId>()
            + self.states.capacity() * size_of::<PageState>()
            + self.ways.capacity() * size_of::<(u64, u32)>()
    }
}

/// How far a sweep came.
struct Swept {
    /// How many pages it has passed.
    pages: u32,
    /// Region and page to go on from, if it has not come to the end.
    rest: Option<(u32, u32)>,
}

/// What the cursor found.
enum Visit {
    /// A page that has been dealt with by looking at it.
    Settled,
    /// A page to examine.
    Examine(Candidate),
}

/// How far the cursor came.
enum Next {
    /// To a page that the budget is charged for.
    Page(Visit),
    /// To as many pages as a step may look at.
    LookedEnough,
    /// To the end of the scan.
    End,
}

/// Flags that no record has, and a hash that none keeps (its lowest bits are not kept).
const NO_FLAGS: u16 = u16::MAX;
const NO_HASH: u64 = 1;

/// How many of these pages, before the first that is another case, have not changed: those not written
/// have the flags `settled` and not the hash `never`, merged ones have the flags `merged`.
///
/// A pass over memory at rest is this loop. It is a function of its own because, as a part of another,
/// it was compiled to a tenth more time.
#[inline(never)]
fn unchanged(
    states: &[PageState],
    items: &[RmapItem],
    (settled, merged): (u16, u16),
    never: u64,
) -> usize {
    const COUNTED: u16 = COUNTED_EVEN | COUNTED_ODD;
    let pages = states.iter().zip(items);
    let unchanged = pages.take_while(|(state, item)| match state {
        PageState::Resident(Written::No) => {
            item.only(SETTLED | RECHECK | COUNTED) == settled && item.hash() != never
        }
        PageState::Merged => item.only(ATTACHED | BROKEN | COUNTED) == merged,
        PageState::Absent => item.only(EXISTS | ZERO) == 0,
        PageState::ZeroPage => item.only(EXISTS) == 0,
        PageState::Unknown => true,
        _ => false,
    });
    unchanged.count()
}

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

    // ---------------------------------------------------------------- which page comes next

    /// Begins a full scan, or goes on beginning it. Returns whether it has begun.
    fn begin_scan<S: PageSpace>(&mut self, space: &mut S, clock: Clock) -> Result<bool, S::Error> {
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
    fn note_looked(&mut self, pages: u32, charge: u32) {
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

    /// At the beginning of a step in mid-scan: looks again where nothing is lost by it.
    fn catch_up<S: PageSpace>(&mut self, space: &mut S) -> Result<(), S::Error> {
        let by_content = self.settings.tree_order == TreeOrder::Content;
        if by_content && self.settings.lagging_records {
            self.sweep_all(space)?;
        }
        if self.settings.keeps_unstable() {
            return Ok(());
        }
        let (at, rest) = self.cursor.rest();
        if !self.settings.write_tracking || rest.is_empty() {
            self.cursor.drop_window();
            return Ok(());
        }
        // What was written before the last look will not be said again.
        let mut before = std::mem::take(&mut self.batch.states);
        before.clear();
        before.extend_from_slice(rest);
        let window = Window {
            region: RegionId(self.cursor.region),
            first: PageId(at),
            pages: low32(before.len()),
        };
        let looked = self.look(space, window);
        if looked.is_ok() {
            for (now, before) in self.cursor.window.iter_mut().zip(&before) {
                if *now == PageState::Resident(Written::No)
                    && *before == PageState::Resident(Written::Yes)
                {
                    *now = *before;
                }
            }
        }
        self.batch.states = before;
        looked
    }

    /// Moves the cursor to the beginning of a region, or to the end of the scan.
    pub(crate) fn enter_region(&mut self, region: u32) {
        let (region, first) = self.beginning(region);
        self.cursor.enter(region, first);
    }

    /// A region and its first page; or the end of the list, and no page in particular.
    pub(crate) fn beginning(&self, region: u32) -> (u32, u32) {
        let it = self.regions.find(RegionId(region));
        (region, it.map_or(0, |it| it.first))
    }

    /// Looks at a window, and makes it the cursor's.
    fn look<S: PageSpace>(&mut self, space: &mut S, window: Window) -> Result<(), S::Error> {
        self.cursor.drop_window();
        let mut states = std::mem::take(&mut self.cursor.window);
        let mut nids = std::mem::take(&mut self.cursor.nids);
        states.resize(window.pages as usize, PageState::Unknown);
        let mut looked = space.observe(window, Look::Scan, &mut states);
        if looked.is_ok() && !self.settings.merge_across_nodes {
            nids.resize(window.pages as usize, Nid(0));
            looked = space.nids(window, &mut nids);
        }
        if looked.is_err() {
            // What memory knew of writes may be used up, and has not reached us.
            self.doubt_window(window);
            return looked;
        }
        if self.settings.keeps_unstable() {
            // Candidates that are not what they were must not be met by the pages before them.
            for (page, state) in (window.first.0..).map(PageId).zip(&states) {
                match state {
                    PageState::Resident(Written::Yes) => self.seen_written(page),
                    PageState::Absent | PageState::ZeroPage | PageState::Ineligible(_)
                        if self.records.get(page).is(UNSTABLE) =>
                    {
                        self.leave_unstable(page);
                    }
                    _ => {}
                }
            }
        } else {
            // Pages that nobody can tell about are not visited. A mark as a candidate tells only odd scans
            // from even ones, so it must not be carried from one scan over the next.
            for (page, state) in (window.first.0..).map(PageId).zip(&states) {
                if *state == PageState::Unknown && self.records.get(page).is(UNSTABLE) {
                    self.leave_unstable(page);
                }
            }
        }
        self.cursor.window_first = window.first.0;
        (self.cursor.window, self.cursor.nids) = (states, nids);
        Ok(())
    }

    fn doubt_window(&mut self, window: Window) {
        self.stir();
        let end = window.first.0 + window.pages;
        let mut from = window.first.0;
        while let Some(page) = self.records.find(from, end, HASHED) {
            if self.records.get(page).is(UNSTABLE) {
                self.leave_unstable(page);
            }
            self.doubt_hash(page);
            from = page.0 + 1;
        }
    }

    /// Goes to the next page that the budget is charged for.
    fn next_page<S: PageSpace>(&mut self, space: &mut S, clock: Clock) -> Result<Next, S::Error> {
        if !self.in_scan && !self.begin_scan(space, clock)? {
            return Ok(Next::LookedEnough);
        }
        while self.cursor.region != RING {
            let id = RegionId(self.cursor.region);
            let region = *self.regions.get(id);
            if region.life == Life::Registered {
                self.cursor.touched = true;
                while self.cursor.at < region.end() {
                    let (_, rest) = self.cursor.rest();
                    if rest.is_empty() {
                        if self.look_left == 0 {
                            return Ok(Next::LookedEnough);
                        }
                        let left = region.end() - self.cursor.at;
                        if std::mem::take(&mut self.cursor.in_gap) && left > low32(BATCH) {
                            self.leap(space, id, region.end())?;
                            self.cursor.alone = true;
                            continue;
                        }
                        // Beyond a gap there may be no more than a page or two before the next.
                        let alone = std::mem::take(&mut self.cursor.alone);
                        let at_most = if alone { ISLAND } else { low32(BATCH) };
                        let pages = (region.end() - self.cursor.at).min(at_most);
                        let first = PageId(self.cursor.at);
                        self.look(
                            space,
                            Window {
                                region: id,
                                first,
                                pages,
                            },
                        )?;
                        // A call has its price, however few the pages.
                        self.note_looked(pages, pages.max(LOOK_PRICE));
                        let last = self.cursor.window.last();
                        self.cursor.in_gap = last == Some(&PageState::Absent);
                    }
                    self.pass_over_settled();
                    let (at, rest) = self.cursor.rest();
                    let Some(&state) = rest.first() else { continue };
                    let place = (at - self.cursor.window_first) as usize;
                    let nid = self.cursor.nids.get(place).map_or(0, |nid| nid.0);
                    self.cursor.at += 1;
                    if let Some(visit) = self.visit(space, (id, &region), PageId(at), state, nid)? {
                        return Ok(Next::Page(visit));
                    }
                }
            }
            // Done with this region. Records that have not been passed belong to pages that are gone.
            let from = if region.life == Life::Dead {
                region.first
            } else {
                self.cursor.at
            };
            self.drop_items(id, from);
            if self.cursor.touched && region.life != Life::Dead {
                self.enter_region(self.regions.after(id.0));
            } else {
                self.lingering -= 1;
                self.drop_region(id);
                self.in_scan = true;
            }
        }
        Ok(Next::End)
    }

    /// Moves the cursor over pages where nothing is and of which nothing is known, so that a pass
    /// costs by the pages that are there. Asked only in a gap: dense regions make no extra call.
    fn leap<S: PageSpace>(
        &mut self,
        space: &mut S,
        region: RegionId,
        end: u32,
    ) -> Result<(), S::Error> {
        let at = self.cursor.at;
        // Whatever has a record is visited.
        let known = self.records.find(at, end, u16::MAX).map_or(end, |p| p.0);
        if known == at {
            return Ok(());
        }
        let window = Window {
            region,
            first: PageId(at),
            pages: known - at,
        };
        let next = space.next_present(window)?;
        self.note_looked(0, LOOK_PRICE);
        self.cursor.at = next.map_or(known, |page| page.0.clamp(at, known));
        Ok(())
    }

    /// The hash of candidates that are examined in each pass: a page of zeroes whose attempt with the
    /// zero page has failed is to have another.
    fn never_settled(&self) -> Option<u64> {
        self.zero_hash.filter(|_| self.settings.use_zero_pages)
    }

    /// What the record of a page says that has been examined, and has nothing to gain while nobody
    /// writes to it.
    fn settled(&self) -> u16 {
        if self.settings.zero_only {
            NOT_ZERO
        } else {
            SETTLED
        }
    }

    /// Advances over pages at the cursor for which nothing has changed.
    fn pass_over_settled(&mut self) {
        while self.pass_over_some() > 0 {}
    }

    fn pass_over_some(&mut self) -> usize {
        let (settled, merged) = if self.settings.keeps_unstable() {
            (self.settled(), ATTACHED)
        } else {
            (NO_FLAGS, NO_FLAGS)
        };
        let never = self.never_settled().unwrap_or(NO_HASH);
        let (at, rest) = self.cursor.rest();
        if rest.is_empty() {
            return 0;
        }
        let passed = match self.records.stretch(PageId(at)) {
            Ok(items) => unchanged(rest, items, (settled, merged), never),
            Err(missing) => rest[..rest.len().min(missing)]
                .iter()
                .take_while(|state| {
                    matches!(
                        state,
                        PageState::Absent | PageState::ZeroPage | PageState::Unknown
                    )
                })
                .count(),
        };
        self.cursor.at += low32(passed);
        passed
    }

    /// Deals with the page at the cursor as far as looking goes. `None` if the budget is not charged.
    fn visit<S: PageSpace>(
        &mut self,
        space: &mut S,
        (id, region): (RegionId, &Region),
        page: PageId,
        state: PageState,
        nid: u16,
    ) -> Result<Option<Visit>, S::Error> {
        self.stir();
        self.notice(space, page, state)?;
        let item = *self.records.get(page);
        let written = match state {
            PageState::Unknown => return Ok(None),
            PageState::Absent | PageState::ZeroPage => {
                self.drop_item(page);
                return Ok(None);
            }
            PageState::Ineligible(reason) => {
                self.note_skip(page, reason);
                self.drop_item(page);
                return Ok(None);
            }
            PageState::Merged => {
                if !item.shows_frame() {
                    // Merged by somebody else, or by memory without our asking.
                    self.note_skip(page, Reason::Other);
                    self.drop_item(page);
                    return Ok(None);
                }
                self.uncount_earlier(page);
                let settled = !self.settings.keeps_unstable();
                return Ok(settled.then_some(Visit::Settled));
            }
            PageState::Resident(written) => written,
        };

        if !item.is(EXISTS) {
            self.create_item(page);
        }
        self.uncount_earlier(page);
        // Whether we know better than by the hash.
        let written = match written {
            _ if !self.settings.write_tracking => Written::Unknown,
            Written::No
                if self.settings.keeps_unstable()
                    && item.only(SETTLED | RECHECK) == self.settled()
                    && self.never_settled() != Some(item.hash()) =>
            {
                return Ok(None);
            }
            _ if item.is(RECHECK) => Written::Unknown,
            // The hash is that of the bytes before the merge.
            Written::No if item.is(BROKEN) => Written::Unknown,
            other => other,
        };
        if written == Written::Yes {
            self.detach(page);
            self.drop_hash(page);
            return Ok(Some(Visit::Settled));
        }
        if self.settings.write_tracking && written == Written::Unknown {
            // This look has used up what memory knew of writes. Until the page is hashed, which may be
            // much later, its hash must not be taken for that of its bytes.
            self.doubt_hash(page);
        }
        if self.settings.smart_scan {
            let item = self.records.get_mut(page);
            let mut looks = item.looks();
            let left_out = smart_scan::leave_out(&mut looks);
            item.set_looks(looks);
            if left_out {
                self.counters.smart_skipped += 1;
                self.detach(page);
                return Ok(None);
            }
        }
        let known = if written == Written::No {
            item.kept_hash()
        } else {
            None
        };
        Ok(Some(Visit::Examine(Candidate {
            page,
            region: id,
            tree: self.tree(region.domain, nid),
            hash: known.unwrap_or(0),
            hashed: known.is_some(),
            by_hash: written == Written::Unknown,
            zero_tried: false,
        })))
    }

    /// Forgets that a page was counted as left alone in an earlier scan.
    fn uncount_earlier(&mut self, page: PageId) {
        let earlier = if self.seq % 2 == 1 {
            COUNTED_EVEN
        } else {
            COUNTED_ODD
        };
        if self.records.get(page).is(earlier) {
            self.records.get_mut(page).clear(earlier);
        }
    }

    /// Looks at all merged and zero pages, to learn which of them are still what they were.
    pub(crate) fn sweep_all<S: PageSpace>(&mut self, space: &mut S) -> Result<(), S::Error> {
        self.swept = false;
        let mut from = Some(self.beginning(self.regions.after(RING)));
        while let Some(place) = from {
            from = self.sweep(space, place, u32::MAX)?.rest;
        }
        self.swept = true;
        Ok(())
    }

    /// Does so from one place on, for at most `limit` pages.
    fn sweep<S: PageSpace>(
        &mut self,
        space: &mut S,
        (mut at, mut page): (u32, u32),
        limit: u32,
    ) -> Result<Swept, S::Error> {
        let mut states = std::mem::take(&mut self.batch.states);
        let mut left = limit;
        let mut swept = Ok(());
        while at != RING && swept.is_ok() {
            let region = RegionId(at);
            let it = *self.regions.get(region);
            if it.merging + it.zero > 0 && it.life == Life::Registered {
                // By the stretches in which there are records: what lies between costs nothing.
                while swept.is_ok()
                    && left > 0
                    && let Some((first, after)) = self.records.next_chunk(page, it.end())
                {
                    let after = after.min(first.saturating_add(left));
                    swept = self.sweep_region(space, region, first..after, &mut states);
                    left -= after - first;
                    page = after;
                }
                if left == 0 && self.records.next_chunk(page, it.end()).is_some() {
                    break;
                }
            }
            (at, page) = self.beginning(self.regions.after(at));
        }
        self.batch.states = states;
        swept?;
        Ok(Swept {
            pages: limit - left,
            rest: (at != RING).then_some((at, page)),
        })
    }

    /// Looks at the merged and zero pages among these.
    fn sweep_region<S: PageSpace>(
        &mut self,
        space: &mut S,
        region: RegionId,
        pages: Range<u32>,
        states: &mut Vec<PageState>,
    ) -> Result<(), S::Error> {
        let Range { start, end } = pages;
        let Some(first) = self.records.find(start, end, ATTACHED | ZERO) else {
            return Ok(());
        };
        let window = Window {
            region,
            first,
            pages: end - first.0,
        };
        states.clear();
        states.resize(window.pages as usize, PageState::Unknown);
        space.observe(window, Look::Sweep, states)?;
        let mut done = Ok(());
        for (page, &state) in (first.0..).map(PageId).zip(states.iter()) {
            if !matches!(state, PageState::Merged | PageState::Unknown) {
                self.stir();
                done = done.and(self.notice(space, page, state));
            }
        }
        done
    }

    // ---------------------------------------------------------------- what is done with it

    /// Examines the pages collected: hashes those that need it, then decides and acts in rounds.
    fn examine_batch<S: PageSpace>(&mut self, space: &mut S) -> Result<(), S::Error> {
        if self.batch.candidates.is_empty() {
            return Ok(());
        }
        let mut candidates = std::mem::take(&mut self.batch.candidates);
        let hashed = self.hash_and_keep_calm(space, &mut candidates);
        self.warm_up(&candidates);
        let mut done = hashed;
        while done.is_ok() && !candidates.is_empty() {
            done = self.round(space, &mut candidates);
        }
        candidates.clear();
        self.batch.candidates = candidates;
        self.batch.failing.clear();
        done
    }

    /// Goes the ways that the searches for all candidates are going to go, so that those find them in
    /// the cache.
    fn warm_up(&mut self, candidates: &[Candidate]) {
        if candidates.len() < SIDE_BY_SIDE || self.settings.tree_order == TreeOrder::Content {
            return;
        }
        let trees = &self.trees;
        let begin = |ways: &mut Vec<(u64, u32)>, which: fn(&TreePair) -> &Forest| {
            ways.clear();
            ways.extend(candidates.iter().map(|it| {
                let tree = which(&trees[it.tree as usize]);
                (it.hash, tree.root(it.hash))
            }));
        };
        let ways = &mut self.batch.ways;
        begin(ways, |trees| &trees.stable);
        go_side_by_side(&self.stable, ways);
        begin(ways, |trees| &trees.unstable);
        go_side_by_side(&self.records, ways);
    }

    /// Hashes candidates where needed, and keeps those of them that are calm.
    fn hash_and_keep_calm<S: PageSpace>(
        &mut self,
        space: &mut S,
        candidates: &mut Vec<Candidate>,
    ) -> Result<(), S::Error> {
        let Batch {
            to_hash, digests, ..
        } = &mut self.batch;
        to_hash.clear();
        to_hash.extend(candidates.iter().filter(|c| !c.hashed).map(|c| c.page));
        digests.clear();
        digests.resize(to_hash.len(), Attempt::Refused(Reason::NotTried));
        if !to_hash.is_empty() {
            space.digest(to_hash, digests)?;
        }
        let digests = std::mem::take(&mut self.batch.digests);
        let mut answers = digests.iter();
        candidates.retain_mut(|candidate| {
            if candidate.hashed {
                return true;
            }
            match answers.next() {
                Some(&Attempt::Done(digest)) => self.is_calm(candidate, digest),
                Some(&Attempt::Refused(reason)) => {
                    self.note_skip(candidate.page, reason);
                    false
                }
                _ => {
                    self.drop_hash(candidate.page);
                    false
                }
            }
        });
        self.batch.digests = digests;
        Ok(())
    }

    /// Records a page's new hash, and says whether the page has been calm.
    fn is_calm(&mut self, candidate: &mut Candidate, digest: Digest) -> bool {
        let hash = digest.kept();
        if digest.zero {
            self.zero_hash = Some(hash);
        }
        (candidate.hash, candidate.hashed) = (hash, true);
        let item = self.records.get_mut(candidate.page);
        let same = item.kept_hash() == Some(hash);
        item.set_hash(hash);
        item.set(HASHED);
        item.clear(RECHECK);
        same || !candidate.by_hash
    }

    /// Decides on each candidate, has the decisions carried out, and leaves those candidates that
    /// have to be decided on again.
    fn round<S: PageSpace>(
        &mut self,
        space: &mut S,
        candidates: &mut Vec<Candidate>,
    ) -> Result<(), S::Error> {
        self.batch.plans.clear();
        self.batch.requests.clear();
        self.batch.turned_away.clear();
        self.batch.trying.clear();
        self.batch.gave_room = false;
        let mut done = Ok(());
        for candidate in candidates.drain(..) {
            if done.is_ok() {
                done = self.cmp_and_merge_page(space, candidate);
            }
        }
        let Batch {
            requests, outcomes, ..
        } = &mut self.batch;
        outcomes.clear();
        outcomes.resize(requests.len(), Attempt::Refused(Reason::NotTried));
        if done.is_ok() && !requests.is_empty() {
            done = space.apply(requests, outcomes);
        }
        let sound = done.is_ok();
        let concluded = self.conclude(space, sound);
        candidates.append(&mut self.batch.again);
        done.and(concluded)
    }

    /// Decides what becomes of one page: the kernel's function of this name, but for the hash, which
    /// has been taken, and the acting, which [`Scanner::conclude`] sees to.
    ///
    /// The page is in no structure. It ends in one, or in a plan, or in neither and is volatile.
    fn cmp_and_merge_page<S: PageSpace>(
        &mut self,
        space: &mut S,
        candidate: Candidate,
    ) -> Result<(), S::Error> {
        let Candidate {
            page, tree, hash, ..
        } = candidate;
        if self.batch.trying.contains(&(tree, hash)) {
            self.batch.again.push(candidate);
            return Ok(());
        }
        self.work.decisions += 1;

        // A page of zeroes needs no frame.
        let zero = self.zero_hash == Some(hash);
        if self.settings.use_zero_pages && zero && !candidate.zero_tried {
            self.plan(candidate, Plan::Zero, &[Request::Zero { page }]);
            return Ok(());
        }

        if self.settings.zero_only {
            return Ok(());
        }

        // Is there a frame with its bytes, or one planned?
        let wanted = (Content::Page(page), hash);
        let (spot, tied) = match self.stable_search(space, tree, wanted, true)? {
            StableFound::Lost => return Ok(()),
            StableFound::Room { node, .. } => {
                self.stable.get_mut(node).pending += 1;
                self.stable.note(node);
                let share = Request::Share {
                    page,
                    frame: FrameId(node),
                };
                self.plan(candidate, Plan::Join { node }, &[share]);
                return Ok(());
            }
            StableFound::No { spot, tied } => (spot, tied),
        };

        // Is there a candidate with its bytes? If not, it is one now.
        let partner = match self.unstable_search_or_insert(space, tree, page, hash)? {
            UnstableFound::Lost => return Ok(()),
            UnstableFound::Inserted => {
                if matches!(spot, Spot::Beside(_)) {
                    self.batch.turned_away.push(candidate);
                }
                return Ok(());
            }
            UnstableFound::Partner(partner) => partner,
        };
        self.batch.turned_away.retain(|it| it.page != partner);
        let node = self.stable.new_tentative(tree, hash, page);
        if self.settings.tree_order == TreeOrder::Digest {
            // Later pages of this batch are to find the node, and not to find the partner.
            self.link_node(node, spot);
            self.stable.get_mut(node).doubtful = tied;
            self.leave_unstable(partner);
        }
        if self.batch.failing.contains(&(tree, hash)) {
            self.batch.trying.insert((tree, hash));
        }
        let frame = FrameId(node);
        self.plan(
            candidate,
            Plan::Pair { partner, node },
            &[
                Request::Promote { page, frame },
                Request::Share {
                    page: partner,
                    frame,
                },
            ],
        );
        Ok(())
    }

    fn plan(&mut self, candidate: Candidate, plan: Plan, requests: &[Request]) {
        self.batch.plans.push((candidate, plan));
        self.batch.requests.extend_from_slice(requests);
    }

    /// Draws the conclusions from how the requests ended. When memory has failed (not `sound`), nothing
    /// more is asked of it, and what is not done is given up.
    fn conclude<S: PageSpace>(&mut self, space: &mut S, sound: bool) -> Result<(), S::Error> {
        let plans = std::mem::take(&mut self.batch.plans);
        let outcomes = std::mem::take(&mut self.batch.outcomes);
        let mut ended = outcomes.iter().copied();
        let mut next = || ended.next().expect("each request has an outcome");
        let mut done = Ok(());
        for &(candidate, plan) in &plans {
            match plan {
                Plan::Zero => self.conclude_zero(candidate, next(), sound),
                Plan::Join { node } => self.conclude_join(candidate, node, next(), sound),
                Plan::Pair { partner, node } => {
                    let (promoted, shared) = (next(), next());
                    let back = self.conclude_pair(candidate, partner, node, promoted, shared);
                    if back && sound && done.is_ok() {
                        done = self.put_back(space, candidate.tree, partner);
                    }
                }
            }
        }
        (self.batch.plans, self.batch.outcomes) = (plans, outcomes);
        self.batch.plans.clear();
        if self.batch.gave_room {
            for candidate in std::mem::take(&mut self.batch.turned_away) {
                if self.records.get(candidate.page).is(UNSTABLE) {
                    self.leave_unstable(candidate.page);
                    if sound {
                        self.batch.again.push(candidate);
                    }
                }
            }
        }
        let settled = self.settle_made(space, sound);
        while let Some(node) = self.batch.failed.pop() {
            self.stable.free(node);
        }
        done.and(settled)
    }

    fn conclude_zero(&mut self, mut candidate: Candidate, outcome: Attempt<()>, sound: bool) {
        let Candidate { page, region, .. } = candidate;
        if outcome != Attempt::Refused(Reason::NotTried) {
            let err = if outcome.is_done() { 0 } else { FAILED };
            self.emit(Event::MergeOnePage {
                pfn: page,
                rmap_item: page,
                mm: region,
                err,
            });
        }
        if outcome.is_done() {
            self.counters.merged_ever += 1;
            self.mark_zero(page);
            if !self.settings.lagging_records {
                self.drop_item(page);
            }
        } else {
            self.failed(page, outcome);
            candidate.zero_tried = true;
            if sound {
                self.batch.again.push(candidate);
            }
        }
    }

    fn conclude_join(
        &mut self,
        candidate: Candidate,
        node: u32,
        outcome: Attempt<()>,
        sound: bool,
    ) {
        let Candidate { page, region, .. } = candidate;
        let was_full = !self.has_room(node);
        let it = self.stable.get_mut(node);
        it.pending -= 1;
        let failed = it.failed;
        self.stable.note(node);
        if failed {
            if sound {
                self.batch.again.push(candidate);
            }
            return;
        }
        self.trace_merge(Some(node), page, region, outcome);
        if outcome.is_done() {
            self.attach_merged(page, node);
        } else {
            self.failed(page, outcome);
            self.distrust(page, outcome);
            self.batch.gave_room |= was_full;
        }
    }

    /// Returns whether the partner has to be put back among the candidates: when the frame has not been
    /// made. One that refuses to join a frame that stays is left out, so that the next pass tries again.
    fn conclude_pair(
        &mut self,
        candidate: Candidate,
        partner: PageId,
        node: u32,
        promoted: Attempt<()>,
        shared: Attempt<()>,
    ) -> bool {
        let Candidate {
            page,
            region,
            tree,
            hash,
            ..
        } = candidate;
        self.trace_merge(None, page, region, promoted);
        let was_full = !self.has_room(node);
        self.stable.get_mut(node).pending -= 2;
        self.stable.note(node);
        let waits = self.records.get(partner).is(UNSTABLE);
        if !promoted.is_done() {
            self.failed(page, promoted);
            self.distrust(page, promoted);
            self.unlink_tentative(node);
            self.stable.get_mut(node).failed = true;
            self.batch.failed.push(node);
            self.batch.failing.insert((tree, hash));
            return !waits;
        }

        self.stable.get_mut(node).frame = true;
        self.batch.failing.remove(&(tree, hash));
        let mm = self.regions.of(partner);
        self.trace_merge(Some(node), partner, mm, shared);
        let mut back = None;
        if shared.is_done() {
            if waits {
                self.leave_unstable(partner);
            }
            self.attach_merged(partner, node);
        } else {
            self.failed(partner, shared);
            let refused = matches!(shared, Attempt::Refused(_));
            if !waits && !refused {
                // Its bytes are not what its place among the candidates said.
                self.distrust(partner, shared);
            }
            back = (!waits && refused).then_some(partner);
            self.batch.gave_room |= was_full;
        }
        self.attach_merged(page, node);
        self.batch.made.push(Made {
            page,
            node,
            refused: back,
        });
        false
    }

    /// Confirms the frames made in this round, or takes back those that nobody joined.
    fn settle_made<S: PageSpace>(&mut self, space: &mut S, sound: bool) -> Result<(), S::Error> {
        let mut made = std::mem::take(&mut self.batch.made);
        let mut requests = std::mem::take(&mut self.batch.requests);
        requests.clear();
        for &Made { page, node, .. } in &made {
            if sound && self.stable.get(node).len < 2 {
                requests.push(Request::Unshare {
                    page,
                    frame: Some(FrameId(node)),
                });
            }
        }
        let mut outcomes = std::mem::take(&mut self.batch.outcomes);
        outcomes.clear();
        outcomes.resize(requests.len(), Attempt::Refused(Reason::NotTried));
        let mut done = Ok(());
        if !requests.is_empty() {
            done = space.apply(&requests, &mut outcomes);
        }
        let mut ended = outcomes.iter().copied();
        made.retain(
            |&Made {
                 page,
                 node,
                 refused,
             }| {
                if !sound || self.stable.get(node).len > 1 {
                    return true;
                }
                match ended.next().expect("each request has an outcome") {
                    Attempt::Refused(reason) => {
                        self.note_skip(page, reason);
                        true
                    }
                    outcome => {
                        let tree = self.stable.get(node).tree;
                        let taken = self.take_back(space, page, node, outcome);
                        if done.is_ok() {
                            done = taken;
                        }
                        if let Some(partner) = refused
                            && done.is_ok()
                        {
                            done = self.put_back(space, tree, partner);
                        }
                        false
                    }
                }
            },
        );
        for &Made { node, .. } in &made {
            self.stable.get_mut(node).stand_in = NIL;
            self.stable.note(node);
        }
        if !sound || done.is_err() {
            self.have_wait(made.iter().map(|it| it.node));
        } else if self.settings.tree_order == TreeOrder::Content {
            for &Made { node, .. } in &made {
                done = done.and(self.place(space, node));
            }
        } else if !made.is_empty() {
            done = self.verify_keys(space, &made);
        }
        (self.batch.made, self.batch.requests, self.batch.outcomes) = (made, requests, outcomes);
        self.batch.made.clear();
        done
    }

    /// Moves those of the new frames to their right places whose pages can have been written between
    /// being hashed or compared and becoming a frame.
    fn verify_keys<S: PageSpace>(&mut self, space: &mut S, made: &[Made]) -> Result<(), S::Error> {
        let mut digests = std::mem::take(&mut self.batch.digests);
        digests.clear();
        digests.resize(made.len(), Attempt::Refused(Reason::NotTried));
        let mut frames = std::mem::take(&mut self.batch.frames);
        frames.clear();
        frames.extend(made.iter().map(|it| FrameId(it.node)));
        let mut done = space.digest_frames(&frames, &mut digests);
        if done.is_err() {
            self.have_wait(made.iter().map(|it| it.node));
            digests.clear();
        }
        // All out before the first is put in again: those that stay are in the right order.
        frames.clear();
        for (&Made { node, .. }, &digest) in made.iter().zip(&digests) {
            let it = *self.stable.get(node);
            let hash = match digest {
                Attempt::Done(digest) => digest.kept(),
                _ => it.hash,
            };
            if hash != it.hash || it.doubtful {
                self.unlink_tentative(node);
                let it = self.stable.get_mut(node);
                (it.hash, it.doubtful) = (hash, false);
                frames.push(FrameId(node));
            }
        }
        for frame in &frames {
            done = done.and(self.place(space, frame.0));
        }
        self.batch.frames = frames;
        self.batch.digests = digests;
        done
    }

    /// Forgets a frame that only the page has joined of which it was made, and which has its own copy
    /// again.
    fn take_back<S: PageSpace>(
        &mut self,
        space: &mut S,
        page: PageId,
        node: u32,
        outcome: Attempt<()>,
    ) -> Result<(), S::Error> {
        let parted = if outcome.is_done() {
            self.part(space, page)
        } else {
            self.part_noticed(space, page)
        };
        self.unlist_all(node, false);
        self.unlink_tentative(node);
        self.stable.free(node);
        self.counters.merged_ever -= 1;
        self.doubt_hash(page);
        self.cursor
            .rewrite(page.0, page.0 + 1, PageState::Resident(Written::Yes));
        parted
    }

    fn attach_merged(&mut self, page: PageId, node: u32) {
        self.attach(page, node);
        self.cursor.rewrite(page.0, page.0 + 1, PageState::Merged);
    }

    fn trace_merge(&mut self, node: Option<u32>, page: PageId, mm: RegionId, outcome: Attempt<()>) {
        if outcome != Attempt::Refused(Reason::NotTried) {
            self.emit(Event::MergeWithKsmPage {
                ksm_page: node.map(FrameId),
                pfn: page,
                rmap_item: page,
                mm,
                err: if outcome.is_done() { 0 } else { FAILED },
            });
        }
    }

    /// Notes that something was not done to a page.
    fn failed(&mut self, page: PageId, outcome: Attempt<()>) {
        if let Attempt::Refused(reason) = outcome {
            self.note_skip(page, reason);
        }
        self.doubt_hash(page);
    }

    /// Where writes are tracked, drops the hash of a page whose bytes turned out to be others: nothing
    /// else might ever have it hashed again. (By the kernel's rule the next look hashes it anyway.)
    fn distrust(&mut self, page: PageId, outcome: Attempt<()>) {
        if self.settings.write_tracking && !matches!(outcome, Attempt::Refused(_)) {
            self.drop_hash(page);
        }
    }

    /// Puts a partner back among the candidates.
    fn put_back<S: PageSpace>(
        &mut self,
        space: &mut S,
        tree: u32,
        page: PageId,
    ) -> Result<(), S::Error> {
        let hash = self.records.get(page).hash();
        // If another candidate has its bytes by now, it waits for the next scan.
        let _ = self.unstable_search_or_insert(space, tree, page, hash)?;
        Ok(())
    }
}

/// Breaks a promise, for the tests of `check`.
#[cfg(test)]
pub(crate) fn leave_a_plan(scanner: &mut Scanner) {
    scanner.batch.candidates.push(Candidate {
        page: PageId(0),
        region: RegionId(0),
        tree: 0,
        hash: 0,
        hashed: false,
        by_hash: false,
        zero_tried: false,
    });
}
