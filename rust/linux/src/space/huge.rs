//! Huge pages: they are left whole while pages are only looked at, and are split only when enough of
//! their pages would merge.
//!
//! Splitting one costs some 0.3 ms, once, and from then on 511 more entries of the page tables, and the
//! misses of the processor's TLB that they bring with them. Merging one page saves 4 KiB.
//!
//! # What splits a huge page
//! * Protecting a part of it. So where the kernel is asked to protect pages, what is asked is widened to
//!   the borders of the huge pages that it would cut ([`Region::widened`]), and what the kernel calls written
//!   beyond what was wanted is remembered until it is (invariant K2 of [`super::quick`]).
//! * The owner's write to a huge page that is protected as one: the kernel splits it, since it keeps the mark
//!   for each page then. Nothing can be done about that where writes are tracked.
//! * Merging one page of it: moving it out takes it apart.
//! * The border of a region inside of it, where writes are tracked: they are not tracked beyond.
//!
//! # What is worth splitting
//! A request to merge a page of a whole huge page counts for that huge page, once for each page, and is
//! refused by name until `thp_min_duplicates` of its pages have been asked for, in this round or the last. A
//! round is one pass, or with `smart_scan`, which may leave a page out eight times in a row, nine. Then what
//! is asked for goes through, and what was refused follows when it is asked for again.
//!
//! With more than a huge page has pages, nothing ever is: then whole huge pages are left alone, and not
//! protected either, so that their owner's writes do not split them.
//!
//! A new frame whose every other page is refused like that would be nobody's but its first page's: that
//! promotion is refused, too.
//!
//! # Invariants
//! * H1. A huge page is known as whole only by a look, and asked about once more before anything of it is
//!   refused: who merges nothing because of a huge page that is gone would never be told.
//! * H2. What is counted is counted for huge pages with refusals, and goes when nobody has asked for a
//!   whole round, or with the region.
//!
//! # Cost
//! A bit for each 2 MiB; 200 bytes for each huge page with refusals. No call to the kernel where there are no
//! huge pages, and one for each of those that a batch of requests touches.

use super::merge::{Item, untried};
use super::{LinuxSpace, Region};
use crate::sys::Span;
use crate::sys::pagemap::{Categories, Query};
use pagemerge_core::{Attempt, FrameId, PageId, Reason, RegionId, Request};
use std::collections::BTreeMap;

/// Bits of one word of a huge page's pages.
const WORD: usize = u64::BITS as usize;
/// Passes in which smart scan looks at every page once, at least.
const SMART_ROUND: u32 = 9;

/// Pages of one huge page that were asked for.
#[derive(Clone, Debug)]
struct Asked {
    round: u32,
    now: Box<[u64]>,
    last: Box<[u64]>,
}

impl Asked {
    fn new(pages: usize, round: u32) -> Self {
        let none = vec![0; pages.div_ceil(WORD)].into_boxed_slice();
        Self {
            round,
            now: none.clone(),
            last: none,
        }
    }

    fn note(&mut self, page: usize, round: u32) {
        if self.round != round {
            std::mem::swap(&mut self.now, &mut self.last);
            self.now.fill(0);
            if self.round + 1 != round {
                self.last.fill(0);
            }
            self.round = round;
        }
        self.now[page / WORD] |= 1 << (page % WORD);
    }

    /// How many different pages.
    fn count(&self) -> u32 {
        let both = self.now.iter().zip(&self.last);
        both.map(|(now, last)| (now | last).count_ones()).sum()
    }

    fn bytes(&self) -> usize {
        size_of::<(usize, Self)>() + (self.now.len() + self.last.len()) * size_of::<u64>()
    }
}

/// What is known of huge pages.
#[derive(Debug)]
pub(super) struct Huge {
    /// Pages in one; `None` where the kernel cannot tell of them.
    pub(super) pages: Option<usize>,
    /// Pages of one that have to be asked for.
    min: u32,
    /// One has been seen.
    seen: bool,
    /// Huge pages with refusals, by address.
    asked: BTreeMap<usize, Asked>,
    round: u32,
    /// Passes in this round so far, and in every round.
    passes: (u32, u32),
}

impl Huge {
    pub(super) fn new(page: usize, tells: bool) -> Self {
        Self {
            // What one table of the last level holds: as many entries as fit a page.
            pages: tells.then_some(page / size_of::<u64>()),
            min: 1,
            seen: false,
            asked: BTreeMap::new(),
            round: 1,
            passes: (0, 1),
        }
    }

    pub(super) fn set(&mut self, min: u32, smart_scan: bool) {
        self.min = min;
        self.passes.1 = if smart_scan { SMART_ROUND } else { 1 };
        if min <= 1 {
            self.asked.clear();
        }
    }

    /// A full pass begins.
    pub(super) fn begin_pass(&mut self) {
        self.passes.0 += 1;
        if self.passes.0 >= self.passes.1 {
            self.passes.0 = 0;
            self.round += 1;
            let round = self.round;
            self.asked.retain(|_, asked| asked.round + 1 >= round);
        }
    }

    /// Whether nothing is worth splitting a huge page.
    pub(super) fn never(&self) -> bool {
        self.pages.is_some_and(|pages| self.min as usize > pages)
    }

    /// What lies there is somebody else's from now on.
    pub(super) fn forget(&mut self, span: Span) {
        self.asked
            .retain(|&address, _| !(span.start..span.end()).contains(&address));
    }

    pub(super) fn bytes(&self) -> usize {
        self.asked.values().map(Asked::bytes).sum()
    }
}

/// One huge page, or what of it lies in a region.
#[derive(Clone, Copy, Debug)]
struct Block {
    /// Its number in the region.
    number: usize,
    /// Its pages in the region.
    first: usize,
    end: usize,
}

impl Region {
    /// How many places for huge pages it touches.
    pub(super) fn blocks(start: usize, pages: usize, huge: Option<usize>) -> usize {
        huge.map_or(0, |huge| (start % huge + pages).div_ceil(huge))
    }

    /// The place for a huge page in which a page lies.
    fn block(&self, at: usize, page: usize, huge: usize) -> Block {
        // Pages of the first one that lie before the region.
        let before = self.live.span().start / page % huge;
        let number = (at + before) / huge;
        Block {
            number,
            first: (number * huge).saturating_sub(before),
            end: ((number + 1) * huge - before).min(self.pages()),
        }
    }

    /// A page is not part of a whole huge page any more.
    pub(super) fn note_parted(&mut self, at: usize, page: usize, huge: Option<usize>) {
        if let Some(huge) = huge {
            let number = self.block(at, page, huge).number;
            self.whole.set(number, false);
        }
    }

    /// The end of the place for a huge page in which a page lies.
    pub(super) fn block_end(&self, at: usize, page: usize, huge: usize) -> usize {
        self.block(at, page, huge).end
    }

    /// Pages `from..to`, and what else has to be protected so that no huge page is cut: nothing that is left
    /// alone (there, it is cut), and nothing that a frame was mapped over.
    pub(super) fn widened(
        &self,
        (from, to): (usize, usize),
        page: usize,
        huge: Option<usize>,
    ) -> (usize, usize) {
        let Some(huge) = huge.filter(|_| from < to) else {
            return (from, to);
        };
        let may = |first: usize, end: usize| {
            first < end
                && !self.mapped.any(first, end)
                && self.left_alone((first, end), page).is_empty()
        };
        let (low, high) = (self.block(from, page, huge), self.block(to - 1, page, huge));
        let from = if self.whole.get(low.number) && may(low.first, from) {
            low.first
        } else {
            from
        };
        let to = if self.whole.get(high.number) && may(to, high.end) {
            high.end
        } else {
            to
        };
        (from, to)
    }
}

impl LinuxSpace {
    /// Notes which huge pages a look at pages `from..to` has found whole: `told_huge` has their pages.
    pub(super) fn note_huge(&mut self, id: RegionId, (from, to): (usize, usize)) {
        let (page, Some(huge)) = (self.page, self.huge.pages) else {
            return;
        };
        let told = std::mem::take(&mut self.told_huge);
        self.huge.seen |= !told.is_empty();
        if let Some(region) = self.region_mut(id) {
            let mut runs = told.iter().peekable();
            let mut at = from;
            while at < to {
                let block = region.block(at, page, huge);
                let end = block.end.min(to);
                while runs.next_if(|&&(_, last)| from + last <= at).is_some() {}
                let whole = runs.peek().is_some_and(|&&(first, _)| from + first < end);
                region.whole.set(block.number, whole);
                at = end;
            }
        }
        self.told_huge = told;
    }

    /// Whether `page` is of a whole huge page now. Where nobody can tell, it counts as not.
    fn is_whole(&mut self, page: Span) -> bool {
        let query = Query {
            all_of: Categories::HUGE.and(Categories::PRESENT),
            any_of: Categories::NONE,
            max_pages: 1,
            ..Query::look(Categories::HUGE)
        };
        let mut whole = false;
        self.scan(page, &query, |_, _, _| whole = true).is_ok() && whole
    }

    /// Counts a page that is asked for, if it is of a whole huge page, and returns the address of that.
    /// `known` has what the kernel has said in this batch.
    fn count_in_huge_page(
        &mut self,
        page: PageId,
        huge: usize,
        known: &mut BTreeMap<usize, bool>,
    ) -> Option<usize> {
        let (region, at) = self.region_of(page)?;
        let number = region.block(at, self.page, huge).number;
        if !region.whole.get(number) {
            return None;
        }
        let (id, span) = (
            region.id,
            region.live.part(at * self.page, self.page).span(),
        );
        let address = span.start - span.start % (huge * self.page);
        if !*known.entry(address).or_insert_with(|| self.is_whole(span)) {
            self.huge.asked.remove(&address);
            self.region_mut(id)?.whole.set(number, false);
            return None;
        }
        let round = self.huge.round;
        let asked = self.huge.asked.entry(address);
        let asked = asked.or_insert_with(|| Asked::new(huge, round));
        asked.note((span.start - address) / self.page, round);
        Some(address)
    }

    /// Notes of which of `items`, sorted by address, the moves will take huge pages apart.
    pub(super) fn note_splits(&self, items: &mut [Item]) {
        let (true, Some(huge)) = (self.huge.seen, self.huge.pages) else {
            return;
        };
        let mut last = None;
        for item in items {
            let Some((region, at)) = self.region_of(item.ticket.page) else {
                continue;
            };
            let number = region.block(at, self.page, huge).number;
            let this = Some((region.id, number));
            item.job.splits = region.whole.get(number) && this != last;
            last = this;
        }
    }

    /// Refuses what would split a huge page that is not worth it yet.
    pub(super) fn refuse_in_huge_pages(
        &mut self,
        requests: &[Request],
        outcomes: &mut [Attempt<()>],
    ) {
        let Some(huge) = self
            .huge
            .pages
            .filter(|_| self.huge.seen && self.huge.min > 1)
        else {
            return;
        };
        // All are counted before the first is refused.
        let (mut concerned, mut known) = (Vec::new(), BTreeMap::new());
        for (at, request) in requests.iter().enumerate() {
            if !matches!(request, Request::Unshare { .. })
                && untried(outcomes[at])
                && let Some(address) = self.count_in_huge_page(request.page(), huge, &mut known)
            {
                concerned.push((at, address));
            }
        }
        for &(at, address) in &concerned {
            let asked = self.huge.asked.get(&address);
            if asked.is_some_and(|asked| asked.count() < self.huge.min) {
                outcomes[at] = Attempt::Refused(Reason::HugePage);
            }
        }
        if !concerned.is_empty() {
            refuse_lonely_frames(requests, outcomes);
        }
    }
}

/// Refuses promotions whose frame nobody is left to join: the first page would be merged with its own copy,
/// and un-merged again.
fn refuse_lonely_frames(requests: &[Request], outcomes: &mut [Attempt<()>]) {
    let mut joining: BTreeMap<FrameId, bool> = BTreeMap::new();
    for (request, outcome) in requests.iter().zip(&*outcomes) {
        if let Request::Share { frame, .. } = *request {
            let refused = *outcome == Attempt::Refused(Reason::HugePage);
            *joining.entry(frame).or_default() |= !refused;
        }
    }
    for (request, outcome) in requests.iter().zip(outcomes) {
        if let Request::Promote { frame, .. } = request
            && untried(*outcome)
            && joining.get(frame) == Some(&false)
        {
            *outcome = Attempt::Refused(Reason::HugePage);
        }
    }
}

#[cfg(test)]
#[allow(unsafe_code, reason = "the promise of `register`")]
mod tests {
    use super::*;
    use crate::eligible::Eligible;
    use crate::settings::EngineSettings;
    use crate::sys::live::Live;
    use crate::sys::mapping::{Advice, Mapping, Protection};
    use crate::sys::page_size;
    use pagemerge_core::{Look, PageSpace, PageState, Registered, Window, Written};

    #[test]
    fn pages_asked_for_count_once_for_this_round_and_the_last() {
        let mut asked = Asked::new(512, 1);
        asked.note(3, 1);
        asked.note(3, 1);
        asked.note(511, 1);
        assert_eq!(asked.count(), 2);
        asked.note(3, 2);
        asked.note(70, 2);
        assert_eq!(asked.count(), 3);
        // 511 was not asked for again.
        asked.note(70, 3);
        assert_eq!(asked.count(), 2);
        asked.note(1, 5);
        assert_eq!(asked.count(), 1);
    }

    #[test]
    fn counts_go_when_nobody_asks_for_a_round() {
        let mut huge = Huge::new(4096, true);
        huge.set(32, true);
        huge.asked.insert(0, Asked::new(512, huge.round));
        let empty = |huge: &Huge| huge.asked.is_empty() && huge.bytes() == 0;
        (0..2 * SMART_ROUND - 1).for_each(|_| huge.begin_pass());
        assert!(!empty(&huge));
        huge.begin_pass();
        assert!(empty(&huge));
        huge.set(32, false);
        huge.asked.insert(0, Asked::new(512, huge.round));
        huge.begin_pass();
        assert!(!empty(&huge));
        huge.begin_pass();
        assert!(empty(&huge));
        for address in [1 << 21, 2 << 21, 3 << 21] {
            huge.asked.insert(address, Asked::new(512, huge.round));
        }
        huge.forget(Span::new(2 << 21, 1 << 21));
        let left: Vec<usize> = huge.asked.keys().copied().collect();
        assert_eq!(left, [1 << 21, 3 << 21]);
    }

    #[test]
    fn frames_that_nobody_may_join_are_not_made() {
        let page = |n| PageId(n);
        let (lonely, joined) = (FrameId(1), FrameId(2));
        let requests = [
            Request::Promote {
                page: page(0),
                frame: lonely,
            },
            Request::Share {
                page: page(1),
                frame: lonely,
            },
            Request::Promote {
                page: page(2),
                frame: joined,
            },
            Request::Share {
                page: page(3),
                frame: joined,
            },
            Request::Share {
                page: page(4),
                frame: joined,
            },
        ];
        let untried = Attempt::Refused(Reason::NotTried);
        let refused = Attempt::Refused(Reason::HugePage);
        let mut outcomes = [untried, refused, untried, refused, untried];
        refuse_lonely_frames(&requests, &mut outcomes);
        assert_eq!(outcomes, [refused, refused, untried, refused, untried]);
    }

    /// What would break finding F6's remedy: a huge page is protected as a whole for a look at its second
    /// half, and what the kernel knew of a write to its first half, which had been looked at before, is used
    /// up by that. Method: small pages that are taken for a huge page, so that it runs anywhere.
    #[test]
    fn writes_told_of_beyond_a_look_are_reported_and_not_merged_over() {
        let (page, pages) = (page_size(), 512);
        let memory = Mapping::anonymous(2 * pages * page, Protection::ReadWrite).unwrap();
        memory.advise(Advice::NoHugePage).unwrap();
        let start = memory.span().start.next_multiple_of(pages * page);
        let span = Span::new(start, pages * page);
        let write = |at: usize, value: u8| {
            // SAFETY: a byte of the test's own mapping, to which there is no reference.
            unsafe { span.page_run(at, 1).as_mut_ptr().write_volatile(value) };
        };
        (0..pages).for_each(|at| write(at, 1));
        let settings = EngineSettings::default();
        let mut space = LinuxSpace::new(&settings).expect("an engine's door to memory");
        space.huge.pages = Some(pages);
        let (region, first) = (RegionId(1), PageId(0));
        // SAFETY: `memory` outlives `space`, and nobody else uses it.
        let live = unsafe { Live::promised(span) };
        let found = Eligible::default();
        space
            .add_region(Registered { region, first }, live, &found)
            .unwrap();
        let window = Window {
            region,
            first,
            pages: 512,
        };
        let mut states = vec![PageState::Absent; pages];
        for written in [Written::Yes, Written::No] {
            space.observe(window, Look::Scan, &mut states).unwrap();
            assert!(states.iter().all(|it| *it == PageState::Resident(written)));
        }

        let block = space
            .region_mut(region)
            .unwrap()
            .block(0, page, pages)
            .number;
        space.region_mut(region).unwrap().whole.set(block, true);
        write(3, 1);
        let mut half = vec![PageState::Resident(Written::No); 100];
        space.take_written(region, (300, 400), &mut half).unwrap();
        assert!(
            half.iter()
                .all(|it| *it == PageState::Resident(Written::No))
        );
        assert!(
            space
                .pagemap
                .entry(span.page_run(3, 1).start)
                .unwrap()
                .is_protected()
        );

        let frame = FrameId(9);
        let requests = [3, 7]
            .map(PageId)
            .map(|page| Request::Promote { page, frame });
        let mut outcomes = [Attempt::Refused(Reason::NotTried)];
        space.apply(&requests[..1], &mut outcomes).unwrap();
        assert_eq!(outcomes, [Attempt::Changed]);
        for written in [Written::Yes, Written::No] {
            space.observe(window, Look::Scan, &mut states).unwrap();
            let told = |at: usize| if at == 3 { written } else { Written::No };
            for (at, state) in states.iter().enumerate() {
                assert_eq!(*state, PageState::Resident(told(at)), "page {at}");
            }
        }
        for request in requests {
            let mut outcomes = [Attempt::Refused(Reason::NotTried)];
            space.apply(&[request], &mut outcomes).unwrap();
            assert_eq!(outcomes, [Attempt::Done(())], "nothing was written since");
            space
                .apply(
                    &[Request::Unshare {
                        page: request.page(),
                        frame: Some(frame),
                    }],
                    &mut outcomes,
                )
                .unwrap();
            space.release(frame).unwrap();
        }
        space.remove_region(region);
    }
}
