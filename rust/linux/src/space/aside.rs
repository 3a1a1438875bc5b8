//! Pages that are left alone: set aside by the caller, or changed by their owner since he registered
//! them.
//!
//! # What holds for them
//! * They are not hashed, their writes are not tracked, no frame is made of their bytes, and none is
//!   mapped over them. They are looked at only as far as counting them takes.
//! * What the caller has set aside stays so until the region ends, whatever else is changed.
//!
//! # What the owner has changed
//! A new mapping would undo locks, protections, and what children and core dumps are to get
//! (`DONTFORK`, `DONTDUMP`). The kernel tells of those in `smaps` only, and reading that costs 5 us a
//! mapping, so what is known may be somewhat old: in the background for as long as keeps the price below
//! 2 % of the time, and a second at most unless that would take more than 5 % of it. A call
//! (`scan`, `settle`, `merge`, un-merging) looks anew, so whatever was changed before a call is kept by it:
//! unless reading takes more than 50 ms (ten thousand mappings), where calls that scan make do with a list
//! for twenty times as long as that. What is changed in that time may be lost, but for locks and
//! protections, which the kernel sees itself when pages are moved.
//!
//! Nothing cheaper tells: `PROCMAP_QUERY` has no such flags, and an advice to a whole mapping leaves its
//! borders where they are.

use super::merge::untried;
use super::{LinuxSpace, Region, end_watches};
use crate::sys::Span;
use pagemerge_core::{Attempt, PageId, PageState, Reason, RegionId, Request};
use std::time::{Duration, Instant};

/// How old a look at the list of mappings may be at most, unless reading it takes very long.
const OLDEST: Duration = Duration::from_secs(1);

/// Ranges of pages, `from` to before `to`: in ascending order, with others between them.
#[derive(Debug, Default)]
pub(super) struct Ranges(Vec<(usize, usize)>);

impl Ranges {
    fn add(&mut self, from: usize, to: usize) {
        // All that overlap it, or touch it, become one with it.
        let first = self.0.partition_point(|&(_, end)| end < from);
        let last = self.0.partition_point(|&(start, _)| start <= to);
        let joined = self.0[first..last]
            .iter()
            .fold((from, to), |(from, to), &(start, end)| {
                (from.min(start), to.max(end))
            });
        self.0.splice(first..last, [joined]);
    }

    /// Those parts that lie in `from..to`.
    fn within(&self, from: usize, to: usize) -> impl Iterator<Item = (usize, usize)> {
        let first = self.0.partition_point(|&(_, end)| end <= from);
        self.0[first..]
            .iter()
            .take_while(move |&&(start, _)| start < to)
            .map(move |&(start, end)| (start.max(from), end.min(to)))
    }

    fn has(&self, page: usize) -> bool {
        self.within(page, page + 1).next().is_some()
    }

    pub(super) fn bytes(&self) -> usize {
        self.0.capacity() * size_of::<(usize, usize)>()
    }
}

impl Region {
    /// Which pages of `from..to` are left alone, and why: (page after `from`, pages, reason).
    pub(super) fn left_alone(
        &self,
        (from, to): (usize, usize),
        page: usize,
    ) -> Vec<(usize, usize, Reason)> {
        let start = self.live.span().start;
        let asked = self.live.part(from * page, (to - from) * page).span();
        let known = self
            .altered
            .partition_point(|(part, _)| part.end() <= asked.start);
        let altered = self.altered[known..].iter().map_while(|&(span, reason)| {
            let part = span.intersection(asked)?;
            Some(((part.start - start) / page, part.pages(), reason))
        });
        let records = self
            .records
            .iter()
            .filter(|(page, _)| (from..to).contains(page))
            .map(|&(page, reason)| (page, 1, reason));
        let aside = self.aside.within(from, to);
        let aside = aside.map(|(first, end)| (first, end - first, Reason::Excluded));
        // The caller's own wish is the reason that he expects to read, so it comes last.
        altered
            .chain(records)
            .chain(aside)
            .map(|(first, pages, reason)| (first - from, pages, reason))
            .collect()
    }
}

impl LinuxSpace {
    /// Sets pages `from..to` of a region aside. They have been un-merged.
    pub(crate) fn set_aside(&mut self, id: RegionId, (from, to): (usize, usize)) {
        let (page, moves) = (self.page, self.moves);
        let Some(&first) = self.by_id.get(&id) else {
            return;
        };
        let Some(region) = self.regions.get_mut(&first) else {
            return;
        };
        region.aside.add(from, to);
        if let Some(watches) = &mut self.watches {
            // What was written after merging may be waiting for its quiet time.
            end_watches(watches, region, (from, to), page, moves);
        }
    }

    /// Answers requests about pages that are left alone, before anything is made of their bytes.
    pub(super) fn refuse_left_alone(&mut self, requests: &[Request], outcomes: &mut [Attempt<()>]) {
        for (request, outcome) in requests.iter().zip(outcomes) {
            if let Request::Promote { page, .. }
            | Request::Share { page, .. }
            | Request::Zero { page } = *request
                && untried(*outcome)
                && let Some(reason) = self.bars(page)
            {
                *outcome = Attempt::Refused(reason);
            }
        }
    }

    /// Why a page is left alone, if it is.
    pub(super) fn bars(&mut self, page: PageId) -> Option<Reason> {
        let (region, at) = self.region_of(page)?;
        if region.aside.has(at) {
            return Some(Reason::Excluded);
        }
        let span = region.live.part(at * self.page, self.page).span();
        self.altered(page, span)
    }

    /// Whether the caller has set a page aside.
    pub(super) fn is_aside(&self, page: PageId) -> bool {
        self.region_of(page)
            .is_some_and(|(region, at)| region.aside.has(at))
    }

    /// Why a new mapping must not take the place of `span`, whose first page is `page`: its owner has
    /// changed it since he registered it.
    pub(super) fn altered(&mut self, page: PageId, span: Span) -> Option<Reason> {
        let (&first, _) = self.regions.range(..=page.0).next_back()?;
        self.look_at_owners_changes(first);
        let altered = &self.regions.get(&first)?.altered;
        let at = altered.partition_point(|(part, _)| part.end() <= span.start);
        let (part, reason) = altered.get(at)?;
        part.overlaps(span).then_some(*reason)
    }

    /// Looks at what the owner of the region with this first page has changed, unless what is known is
    /// fresh.
    fn look_at_owners_changes(&mut self, first: u32) {
        let oldest = Instant::now().checked_sub(self.survey.lasts(OLDEST, self.budget.used));
        let Some(region) = self.regions.get_mut(&first) else {
            return;
        };
        let since = self.survey_since.max(region.since);
        let since = oldest.map_or(since, |oldest| oldest.max(since));
        if region.surveyed.is_some_and(|at| at >= since) {
            return;
        }
        let read = self.survey.newer_than(since).ok();
        let all = region.live.span();
        // What cannot be looked at may have been changed.
        region.altered = read.as_ref().map_or_else(
            || vec![(all, Reason::ProcUnreadable)],
            |(list, _)| list.altered(all),
        );
        region.surveyed = Some(read.map_or_else(Instant::now, |(_, at)| at));
    }

    /// What the owner did to a region since another one was un-merged is to be seen, unless looking
    /// takes so long that ten thousand regions would not end in any time.
    pub(crate) fn survey_for_unregistering(&mut self) {
        if !self.survey.still_serves() {
            self.survey_anew();
        }
    }

    /// What owners changed before a call that scans, or a pass in which pages come back, is kept by it, unless
    /// looking takes very long.
    pub(crate) fn survey_for_scanning(&mut self) {
        if !(self.survey.is_long() && self.survey.still_serves()) {
            self.survey_anew();
        }
    }

    /// Where pages leave for anonymous memory, what is known of the owner's changes must be newer than
    /// this pass, or this un-merging; and a call keeps what was changed before it.
    pub(crate) fn survey_anew(&mut self) {
        self.survey_since = Instant::now();
    }

    /// At the beginning of a pass: what was left alone may not have to be any more.
    pub(super) fn look_at_what_was_left_alone(&mut self) {
        let firsts: Vec<u32> = self
            .regions
            .iter()
            .filter(|(_, region)| !region.altered.is_empty())
            .map(|(&first, _)| first)
            .collect();
        for first in firsts {
            self.look_at_owners_changes(first);
        }
    }
}

/// Tells of `into` what is left alone, and returns what is not: (page, pages), in ascending order.
pub(super) fn tell(
    left_alone: &[(usize, usize, Reason)],
    into: &mut [PageState],
) -> Vec<(usize, usize)> {
    let mut alone = vec![false; if left_alone.is_empty() { 0 } else { into.len() }];
    for &(first, pages, reason) in left_alone {
        for at in first..first + pages {
            alone[at] = true;
            if matches!(into[at], PageState::Resident(_) | PageState::Ineligible(_)) {
                into[at] = PageState::Ineligible(reason);
            }
        }
    }
    if left_alone.is_empty() {
        return vec![(0, into.len())];
    }
    let mut others = Vec::new();
    let mut at = 0;
    while at < alone.len() {
        let same = alone[at..]
            .iter()
            .take_while(|&&it| it == alone[at])
            .count();
        if !alone[at] {
            others.push((at, same));
        }
        at += same;
    }
    others
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagemerge_core::Written;

    /// Goal: ranges are the set of pages that was added. Method: the same with one flag for each page,
    /// for all orders of a few ranges.
    #[test]
    fn ranges_are_what_was_added_in_any_order() {
        let parts = [(3, 5), (5, 7), (9, 10), (0, 1), (4, 9), (12, 15), (1, 3)];
        for skip in 0..parts.len() {
            let mut ranges = Ranges::default();
            let mut flags = [false; 20];
            for n in 0..parts.len() - skip / 2 {
                let (from, to) = parts[(n * (skip + 1)) % parts.len()];
                ranges.add(from, to);
                flags[from..to].fill(true);
                for (page, &flag) in flags.iter().enumerate() {
                    assert_eq!(ranges.has(page), flag, "{page} in {ranges:?}");
                }
                let apart = ranges.0.windows(2).all(|two| two[0].1 < two[1].0);
                assert!(apart, "{ranges:?}");
            }
            let mut seen = [false; 20];
            for (from, to) in ranges.within(2, 13) {
                assert!(2 <= from && from < to && to <= 13);
                seen[from..to].fill(true);
            }
            assert_eq!(seen[2..13], flags[2..13]);
        }
    }

    #[test]
    fn what_is_left_alone_is_told_and_the_rest_is_returned() {
        let own = PageState::Resident(Written::No);
        let mut states = [own, own, PageState::Absent, own, own];
        let alone = [(1, 2, Reason::Mlocked), (1, 1, Reason::Excluded)];
        assert_eq!(tell(&alone, &mut states), [(0, 1), (3, 2)]);
        assert_eq!(
            states,
            [
                own,
                PageState::Ineligible(Reason::Excluded),
                PageState::Absent,
                own,
                own
            ]
        );
        assert_eq!(tell(&[], &mut states), [(0, 5)]);
    }
}
