//! Giving pages copies of their own: back into anonymous memory where that is safe, else in place.

use super::{
    HEADROOM_BYTES, HEADROOM_FRESH, HEADROOM_PLENTY, LinuxSpace, UNSHARING_SERIES, for_runs,
};
use crate::accounting::{self, Bound};
use crate::eligible;
use crate::mappings;
use crate::restore::Restore;
use crate::settings::Barrier;
use crate::sys::Span;
use crate::sys::live::Live;
use crate::sys::phase::{Phase, enter};
use crate::sys::procmap::QueryStop;
use crate::sys::uffd::Modes;
use crate::watch::Watches;
use crate::window::MAX_PAGES;
use pagemerge_core::{Attempt, FrameId, PageId, PageState, Reason, RegionId, Request, Written};
use std::time::Instant;

/// A request to give one page its own copy.
struct Parting {
    live: Live,
    page: PageId,
    region: RegionId,
    frame: Option<FrameId>,
    request: usize,
}

impl LinuxSpace {
    /// How much memory is left, asked once for a batch, and not more often than it can matter.
    pub(super) fn look_at_headroom(&mut self) {
        let now = Instant::now();
        let fresh = |at: Instant| now.duration_since(at) < HEADROOM_FRESH;
        if self
            .headroom
            .is_some_and(|(bytes, at)| bytes > HEADROOM_PLENTY && fresh(at))
        {
            return;
        }
        self.headroom = accounting::headroom().ok().map(|bytes| (bytes, now));
    }

    /// Bytes that may go into copies when pages are un-merged, what bounds them, and what is to be left
    /// besides; `None` where that cannot be asked.
    pub(crate) fn room_for_copies(&self) -> Option<(u64, Bound, u64)> {
        let (bytes, bound) = accounting::room().ok()?;
        // What a batch keeps free, and the run that is being prepared.
        let kept = HEADROOM_BYTES / 4 + 2 * (MAX_PAGES * self.page) as u64;
        Some((bytes, bound, kept))
    }

    /// Gives pages copies of their own, a run at a time: those that were never written move back into
    /// anonymous memory, the others (and all, where nothing holds writers off) are populated in place
    /// (finding F3).
    pub(super) fn unshare(&mut self, requests: &[Request], outcomes: &mut [Attempt<()>]) {
        let _phase = enter(Phase::Unshare);
        let mut pages: Vec<Parting> = Vec::new();
        for (at, request) in requests.iter().enumerate() {
            if let Request::Unshare { page, frame } = *request {
                let Some((region, place)) = self.region_of(page) else {
                    outcomes[at] = Attempt::Gone;
                    continue;
                };
                pages.push(Parting {
                    live: region.live.part(place * self.page, self.page),
                    page,
                    region: region.id,
                    frame,
                    request: at,
                });
            }
        }
        if pages.is_empty() {
            return;
        }
        self.headroom = None;
        self.look_at_headroom();
        if self
            .unshared_at
            .is_none_or(|at| at.elapsed() > self.survey.patience(UNSHARING_SERIES))
        {
            self.survey_anew();
        }
        self.unshared_at = Some(Instant::now());
        pages.sort_by_key(|parting| parting.live.span().start);
        let mut rest = pages.as_slice();
        while !rest.is_empty() {
            let run = rest
                .windows(2)
                .position(|two| {
                    // Memory of two regions may be neighbours, whose pages have other numbers.
                    two[0].region != two[1].region
                        || two[0].live.span().end() != two[1].live.span().start
                        || two[0].frame.is_some() != two[1].frame.is_some()
                })
                .map_or(rest.len(), |at| at + 1)
                .min(MAX_PAGES);
            self.unshare_run(&rest[..run], outcomes);
            rest = &rest[run..];
        }
    }

    fn unshare_run(&mut self, run: &[Parting], outcomes: &mut [Attempt<()>]) {
        let live = run[0].live.joined(run[run.len() - 1].live);
        // What cannot be asked is not refused: the kernel has the last word.
        let left = self.headroom.map_or(u64::MAX, |(bytes, _)| bytes);
        let needed = live.span().len as u64;
        if left < HEADROOM_BYTES / 4 + needed {
            for parting in run {
                outcomes[parting.request] = Attempt::Refused(Reason::NoMemory);
            }
            return;
        }
        self.headroom = self.headroom.map(|(bytes, at)| (bytes - needed, at));
        if let Some(watches) = &mut self.watches
            && watches.any_in(live.span())
        {
            watches.end(live);
        }
        let mut done = vec![false; run.len()];
        if left > 4 * HEADROOM_BYTES + needed {
            self.restore_run(live, run, &mut done);
        }
        let mut at = 0;
        while at < run.len() {
            let same = done[at..].iter().take_while(|&&d| d == done[at]).count();
            let part = &run[at..at + same];
            let live = part[0].live.joined(part[same - 1].live);
            let populated = done[at] || live.populate_write().is_ok();
            for parting in part {
                if !done[at] {
                    self.doubt(parting.page);
                }
                let outcome = if populated || parting.live.populate_write().is_ok() {
                    Attempt::Done(())
                } else {
                    Attempt::Refused(eligible::reason_at(parting.live.span()))
                };
                outcomes[parting.request] = outcome;
            }
            at += same;
        }
    }

    /// Living frames under pages of a region that have copies of their own: whoever discards such a
    /// page is shown the frame, for as long as any other page shares it.
    pub(crate) fn frames_left_under(&self, id: RegionId) -> Vec<FrameId> {
        let region = self.by_id.get(&id).and_then(|at| self.regions.get(at));
        let Some(region) = region else {
            return Vec::new();
        };
        let mut stretches = Vec::new();
        for_runs(region, true, (0, region.pages()), self.page, |run| {
            stretches.extend(self.files_under(run.span()));
        });
        self.frames.under(&stretches)
    }

    /// Which file lies under each part of `span`, and where in it: (file number, offset, bytes).
    fn files_under(&self, span: Span) -> Vec<(u64, u64, usize)> {
        let stretch = |mapping: Span, inode: u64, offset: u64| {
            let part = mapping.intersection(span)?;
            Some((
                inode,
                offset + (part.start - mapping.start) as u64,
                part.len,
            ))
        };
        let mut found = Vec::new();
        let mut at = span.start;
        while at < span.end() {
            match self.maps.at(at) {
                Ok(mapping) => {
                    found.extend(stretch(mapping.span, mapping.inode, mapping.offset));
                    at = mapping.span.end();
                }
                Err(QueryStop::Missing) => {
                    // What cannot be read is left as it is, and reads right as it is.
                    let all = mappings::read(span).unwrap_or_default();
                    return all
                        .iter()
                        .filter_map(|vma| stretch(vma.span, vma.inode, vma.offset))
                        .collect();
                }
                Err(_) => at += self.page,
            }
        }
        found
    }

    /// Moves what it can of `run` back into anonymous memory, and books it.
    fn restore_run(&mut self, live: Live, run: &[Parting], done: &mut [bool]) {
        let views: Option<Vec<_>> = run
            .iter()
            .map(|parting| {
                let slot = self.frames.slot(parting.frame?)?;
                self.frames.view(slot).ok()
            })
            .collect();
        let huge = self
            .region_of(run[0].page)
            .and_then(|(region, _)| region.huge);
        if self.barrier == Barrier::None
            || self.altered(run[0].page, live.span()).is_some()
            || !self.has_room(4)
            || self.watches().is_err()
        {
            return;
        }
        let (Some(views), Some(mut restore)) = (views, self.restore()) else {
            return;
        };
        restore.unbroken(live, &views, huge, done);
        self.book_restored(live, run[0].page, done);
    }

    /// What moving pages back takes, once there are watches.
    fn restore(&mut self) -> Option<Restore<'_>> {
        Some(Restore {
            page: self.page,
            pagemap: &self.pagemap,
            maps: &self.maps,
            lock: &self.windows.lock,
            watches: self.watches.as_mut()?,
            scanned: &mut self.scanned,
        })
    }

    /// Books which pages of `run`, the first of which is `first`, lie in anonymous memory again.
    fn book_restored(&mut self, run: Live, first: PageId, done: &[bool]) {
        let tracked = self.is_tracked(first);
        let mut at = 0;
        while at < done.len() {
            let same = done[at..].iter().take_while(|&&d| d == done[at]).count();
            if done[at] {
                for page in at..at + same {
                    let page = u32::try_from(page).expect("a window is small");
                    self.set_mapped(first.plus(page), false);
                }
                if tracked && let Some(uffd) = &self.uffd {
                    let span = run.part(at * self.page, same * self.page).span();
                    // Where it fails, digests decide.
                    let _ = uffd.register(span, Modes::WriteProtect);
                }
            }
            at += same;
        }
    }

    /// Moves pages of `run` that are found quiet back into anonymous memory, where they are like any
    /// others; those that could not be moved wait for another quiet time.
    pub(super) fn restore_found_quiet(&mut self, run: Live, first: PageId, into: &mut [PageState]) {
        let is_quiet = |state: &PageState| matches!(state, PageState::Resident(_));
        let mut at = 0;
        while at < into.len() {
            let quiet = into[at..]
                .iter()
                .take_while(|state| is_quiet(state))
                .count();
            if quiet > 0 {
                let part = run.part(at * self.page, quiet * self.page);
                let offset = u32::try_from(at).expect("a window is small");
                if !std::mem::replace(&mut self.surveyed_in_pass, true) {
                    self.survey_for_scanning();
                }
                let altered = self.altered(first.plus(offset), part.span());
                let done = if altered.is_some() {
                    if let Some(watches) = &mut self.watches {
                        watches.end(part);
                    }
                    vec![false; quiet]
                } else {
                    self.restore_quiet(part, first.plus(offset))
                };
                for (state, done) in into[at..].iter_mut().zip(done) {
                    *state = if done {
                        PageState::Resident(Written::Yes)
                    } else {
                        PageState::Ineligible(altered.unwrap_or(Reason::NotQuiet))
                    };
                }
            }
            at += quiet.max(1);
        }
    }

    /// No scan comes by: pages that have been quiet go back into anonymous memory now, and no watch
    /// stays. (A debugger's write to a watched page is refused, not delayed; it must get through some
    /// time.)
    pub(crate) fn end_watches_at_rest(&mut self) {
        let runs = self.watches.as_ref().map_or_else(Vec::new, Watches::runs);
        self.surveyed_in_pass = false;
        let pinned = eligible::has_pinned_pages();
        for run in runs {
            let regions = self.regions.values().filter_map(|region| {
                let span = region.live.span().intersection(run)?;
                let at = span.start - region.live.span().start;
                let first = u32::try_from(at / self.page).ok()?;
                Some((region.live.part(at, span.len), region.first.plus(first)))
            });
            for (live, first) in regions.collect::<Vec<_>>() {
                for from in (0..live.span().pages()).step_by(MAX_PAGES) {
                    let pages = (live.span().pages() - from).min(MAX_PAGES);
                    let part = live.part(from * self.page, pages * self.page);
                    let offset = u32::try_from(from).expect("a region's pages fit 32 bits");
                    if pinned {
                        if let Some(watches) = &mut self.watches {
                            watches.end(part);
                        }
                    } else {
                        let mut states = vec![PageState::Resident(Written::No); pages];
                        self.restore_found_quiet(part, first.plus(offset), &mut states);
                    }
                }
            }
        }
    }

    /// Moves pages that were merged, written, and quiet since, back into anonymous memory.
    fn restore_quiet(&mut self, run: Live, first: PageId) -> Vec<bool> {
        let mut done = vec![false; run.span().pages()];
        self.look_at_headroom();
        let left = self.headroom.map_or(u64::MAX, |(bytes, _)| bytes);
        let huge = self.region_of(first).and_then(|(region, _)| region.huge);
        let Some(mut restore) = self.restore() else {
            return done;
        };
        if left < 4 * HEADROOM_BYTES + run.span().len as u64 {
            restore.watches.end(run);
            return done;
        }
        restore.quiet(run, huge, &mut done);
        self.book_restored(run, first, &done);
        done
    }
}
