//! Which page comes next: where the scan has come to, and what looking alone settles.
//!
//! The cursor looks at a window of pages at a time, passes over those for which nothing has changed, and
//! hands out those that are to be examined. Over gaps it leaps to the next page that is there.
//!
//! # What is calm
//! By the kernel's rule a page is calm when its hash is that of the last look. Where memory knows
//! what was written, a page not written is calm, and one written is volatile without being hashed. If
//! also the order is by digest, pages that are merged, or unwritten candidates, are passed over: they
//! are neither counted as scanned nor taken from the budget.
//!
//! # Invariants (proved by [`crate::check`])
//! * P1. The cursor is between two scans or at a page of a region in the scan list.
//! * P2. The window that has been looked at lies within that region, from the cursor on.
//!
//! # Cost
//! A page passed over costs a few nanoseconds here and no call.

use super::BATCH;
use super::batch::Candidate;
use crate::regions::{Life, RING, Region};
use crate::rmap::{
    ATTACHED, BROKEN, COUNTED_EVEN, COUNTED_ODD, EXISTS, HASHED, RECHECK, RmapItem, UNSTABLE, ZERO,
    low32,
};
use crate::scanner::Scanner;
use crate::{
    Clock, Look, Nid, PageId, PageSpace, PageState, Reason, RegionId, TreeOrder, Window, Written,
    smart_scan,
};

/// Pages in the first window beyond a gap.
const ISLAND: u32 = 16;

/// How many pages looked at a call costs as much time as.
const LOOK_PRICE: u32 = 64;

/// What a candidate is that can be passed over while nobody writes to it.
const SETTLED: u16 = EXISTS | UNSTABLE | HASHED;

/// The same for a page that is not zero where only zero pages are merged: no candidate.
const NOT_ZERO: u16 = EXISTS | HASHED;

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

/// What the cursor found.
pub(super) enum Visit {
    /// A page that has been dealt with by looking at it.
    Settled,
    /// A page to examine.
    Examine(Candidate),
}

/// How far the cursor came.
pub(super) enum Next {
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
    /// Goes to the next page that the budget is charged for.
    pub(super) fn next_page<S: PageSpace>(
        &mut self,
        space: &mut S,
        clock: Clock,
    ) -> Result<Next, S::Error> {
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

    /// At the beginning of a step in mid-scan: looks again where nothing is lost by it.
    pub(super) fn catch_up<S: PageSpace>(&mut self, space: &mut S) -> Result<(), S::Error> {
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
}
