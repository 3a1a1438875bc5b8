//! The sweep: a look at all merged and zero pages, to learn which of them are still what they were.
//!
//! It comes before each scan, so that frames which no page shows any more are known to be gone before pages
//! are compared with them; and whenever the caller asks for counters that are current.
//!
//! # Invariants (proved by [`crate::check`])
//! * P4. A sweep that is to go on does so at a page of a region, or has come to the end of the list; and
//!   no scan is running.
//!
//! # Cost
//! One call for each 512 pages among which there are records of merged ones, within the limit of a
//! step; nothing for what lies between.
//!
//! # Departures from ksmd
//! A frame that has lost its last page is known from here when a scan begins; with
//! [`lagging_records`](crate::Settings::lagging_records) in content order, when a step does.

use crate::regions::{Life, RING};
use crate::rmap::{ATTACHED, ZERO};
use crate::scanner::Scanner;
use crate::{Look, PageId, PageSpace, PageState, RegionId, Window};
use std::ops::Range;

/// How far a sweep came.
pub(super) struct Swept {
    /// How many pages it has passed.
    pub(super) pages: u32,
    /// Region and page to go on from, if it has not come to the end.
    pub(super) rest: Option<(u32, u32)>,
}

impl Scanner {
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
    pub(super) fn sweep<S: PageSpace>(
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
}
