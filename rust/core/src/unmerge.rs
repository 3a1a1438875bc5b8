//! The way back: giving pages their own copies, and dropping what is known of a region.
//!
//! A page that cannot be un-merged stays merged, recorded and counted; memory is never let go while
//! it shows a frame.

use crate::rbtree::NIL;
use crate::regions::{Life, RING, Region};
use crate::rmap::{ATTACHED, CHUNK, EXISTS, RECHECK, UNSTABLE, ZERO};
use crate::scanner::{RunMode, Scanner, UnmergeError, UnregisterError};
use crate::{
    Attempt, Event, FrameId, PageId, PageSpace, PageState, Reason, RegionId, Request, Written,
};

/// Pages that stayed merged, and why the last of them did.
#[derive(Clone, Copy, Debug, Default)]
struct Kept {
    pages: u32,
    reason: Option<Reason>,
}

impl Kept {
    fn add(&mut self, reason: Reason) {
        self.pages += 1;
        self.reason = Some(reason);
    }
}

impl Scanner {
    /// Ends the merging of a region (`MADV_UNMERGEABLE`): each of its pages gets its own copy back,
    /// then its records are dropped; at once, or with
    /// [`lagging_records`](crate::Settings::lagging_records) when the next pass comes by.
    ///
    /// # Errors
    /// When pages could not be un-merged (they stay merged, and the region registered), when there is
    /// no such region, or when memory fails as a whole.
    #[doc(alias = "MADV_UNMERGEABLE")]
    pub fn unregister<S: PageSpace>(
        &mut self,
        space: &mut S,
        region: RegionId,
    ) -> Result<(), UnregisterError<S::Error>> {
        self.stir();
        self.page_size = space.page_size();
        if self
            .regions
            .find(region)
            .is_none_or(|r| r.life != Life::Registered)
        {
            return Err(UnregisterError::NotRegistered(region));
        }
        let kept = self
            .unshare_region(space, region)
            .map_err(UnregisterError::Space)?;
        if let Some(reason) = kept.reason {
            return Err(UnregisterError::Refused {
                pages: kept.pages,
                reason,
            });
        }
        if self.settings.lagging_records {
            self.regions.get_mut(region).life = Life::Unregistered;
            self.lingering += 1;
        } else {
            self.drop_items(region, self.regions.get(region).first);
            self.drop_region(region);
            self.emit(Event::Exit { mm: region });
        }
        Ok(())
    }

    /// How many pages un-merging a region would have to copy, as far as is known: those that show a frame
    /// or were put onto the zero page. [`Scanner::refresh`] makes it current.
    pub fn pages_to_copy(&self, region: RegionId) -> u32 {
        let Some(it) = self.regions.find(region) else {
            return 0;
        };
        let (mut from, mut pages) = (it.first, 0);
        while let Some(page) = self.records.find(from, it.end(), ATTACHED | ZERO) {
            let item = self.records.get(page);
            pages += u32::from(item.is(ZERO) || item.shows_frame());
            from = page.0 + 1;
        }
        pages
    }

    /// Registers a region again that was unregistered and has not been passed since, with the records
    /// that it still has. Says whether there was one; only with
    /// [`lagging_records`](crate::Settings::lagging_records).
    pub fn revive(&mut self, region: RegionId) -> bool {
        self.stir();
        if self
            .regions
            .find(region)
            .is_none_or(|r| r.life != Life::Unregistered)
        {
            return false;
        }
        self.regions.get_mut(region).life = Life::Registered;
        self.lingering -= 1;
        true
    }

    /// Drops a region whose memory is being freed, without un-merging it. Frames that no page of
    /// another region shows are released.
    ///
    /// # Errors
    /// When memory fails as a whole; the region is then still there.
    pub fn forget<S: PageSpace>(
        &mut self,
        space: &mut S,
        region: RegionId,
    ) -> Result<(), S::Error> {
        self.stir();
        self.page_size = space.page_size();
        let Some(&it) = self.regions.find(region) else {
            return Ok(());
        };
        if it.life == Life::Dead {
            return Ok(());
        }
        self.absent(space, it.first, it.end())?;
        if it.life == Life::Unregistered {
            self.lingering -= 1;
        }
        self.emit(Event::Exit { mm: region });
        let here = self.cursor.region == region.0;
        if here {
            self.cursor.drop_window();
        }
        if !self.settings.lagging_records || (!here && it.items == 0) {
            self.regions.get_mut(region).life = Life::Dead;
            self.drop_items(region, it.first);
            self.drop_region(region);
            return Ok(());
        }
        self.regions.get_mut(region).life = Life::Dead;
        self.lingering += 1;
        if !here {
            // So that the running scan comes by soon.
            self.regions.move_after(region, self.cursor.region);
        }
        Ok(())
    }

    /// Sets pages aside: those that are merged get their own copies back, and all of them leave the
    /// trees at once, so that nothing is merged with them. From then on memory reports them as
    /// [`PageState::Ineligible`].
    ///
    /// # Errors
    /// When pages could not be un-merged (they stay merged), or when memory fails as a whole; then none
    /// must be taken as set aside.
    pub fn set_aside<S: PageSpace>(
        &mut self,
        space: &mut S,
        first: PageId,
        pages: u32,
    ) -> Result<(), UnmergeError<S::Error>> {
        self.stir();
        self.page_size = space.page_size();
        self.absorb_window();
        let end = first.0.saturating_add(pages).min(self.regions.page_end());
        let kept = self
            .unshare_pages(space, first.0, end)
            .map_err(UnmergeError::Space)?;
        if let Some(reason) = kept.reason {
            return Err(UnmergeError::Refused {
                pages: kept.pages,
                reason,
            });
        }
        let mut from = first.0;
        while let Some(page) = self.records.find(from, end, EXISTS) {
            self.drop_item(page);
            from = page.0 + 1;
        }
        Ok(())
    }

    /// Takes note that the owner has just discarded these pages (`MADV_DONTNEED`). With
    /// [`lagging_records`](crate::Settings::lagging_records) their records wait for the next pass.
    ///
    /// # Errors
    /// When memory fails as a whole.
    pub fn vacated<S: PageSpace>(
        &mut self,
        space: &mut S,
        first: PageId,
        pages: u32,
    ) -> Result<(), S::Error> {
        self.stir();
        self.page_size = space.page_size();
        let end = first.0.saturating_add(pages).min(self.regions.page_end());
        let noticed = self.absent(space, first.0, end);
        self.cursor.rewrite(first.0, end, PageState::Absent);
        if !self.settings.lagging_records {
            let mut from = first.0;
            while let Some(page) = self.records.find(from, end, EXISTS) {
                self.drop_item(page);
                from = page.0 + 1;
            }
        }
        noticed
    }

    /// Changes the run mode. `Unmerge`, when it was another, un-merges all regions and forgets every
    /// record; the regions stay registered.
    ///
    /// # Errors
    /// When not everything could be un-merged; the mode is then `Stop`.
    pub fn set_run<S: PageSpace>(
        &mut self,
        space: &mut S,
        run: RunMode,
    ) -> Result<(), UnmergeError<S::Error>> {
        self.stir();
        self.page_size = space.page_size();
        let before = std::mem::replace(&mut self.run, run);
        if run == RunMode::Unmerge && before != RunMode::Unmerge {
            let done = self.unmerge_all(space);
            if done.is_err() {
                self.run = RunMode::Stop;
            }
            return done;
        }
        Ok(())
    }

    fn unmerge_all<S: PageSpace>(&mut self, space: &mut S) -> Result<(), UnmergeError<S::Error>> {
        self.absorb_window();
        let mut kept = Kept::default();
        for region in self.regions.in_order() {
            if self.regions.get(region).life == Life::Registered {
                let here = self
                    .unshare_region(space, region)
                    .map_err(UnmergeError::Space)?;
                kept.pages += here.pages;
                kept.reason = here.reason.or(kept.reason);
            }
            self.drop_items(region, self.regions.get(region).first);
            if self.regions.get(region).life == Life::Dead {
                self.lingering -= 1;
                self.drop_region(region);
            }
        }
        self.purge_stable_trees();
        self.drop_deserted_domains();
        if let Some(reason) = kept.reason {
            return Err(UnmergeError::Refused {
                pages: kept.pages,
                reason,
            });
        }
        self.discard_unstable_trees();
        self.cursor.enter(RING, 0);
        self.in_scan = false;
        self.sweeping = None;
        self.seq = 0;
        self.counters.skipped_last = self.counters.skipped_now;
        self.counters.skipped_now.fill(0);
        self.records.free_empty_chunks(0, self.records.end());
        Ok(())
    }

    /// Takes frames apart: every page that shows one of them gets its own copy, whichever region it
    /// is of, and may merge again from the next pass on. Frames that there are not (any more) are
    /// passed over. Returns how many pages stay merged because memory refused.
    ///
    /// # Errors
    /// When memory fails as a whole; what was done until then is recorded.
    pub fn dissolve<S: PageSpace>(
        &mut self,
        space: &mut S,
        frames: &[FrameId],
    ) -> Result<u32, S::Error> {
        self.stir();
        self.page_size = space.page_size();
        self.absorb_window();
        let mut kept = Kept::default();
        for &frame in frames {
            let Some(node) = self.stable.living(frame) else {
                continue;
            };
            let mut requests = Vec::with_capacity(node.mapped as usize);
            let mut at = node.head;
            while at != NIL {
                let (page, item) = (PageId(at), self.records.get(PageId(at)));
                at = item.next();
                if item.shows_frame() {
                    let frame = Some(frame);
                    requests.push(Request::Unshare { page, frame });
                }
            }
            for requests in requests.chunks(CHUNK) {
                self.carry_out(space, requests, &mut kept)?;
            }
        }
        Ok(kept.pages)
    }

    /// Gives each page of a region that shows a frame or the zero page through us its own copy.
    fn unshare_region<S: PageSpace>(
        &mut self,
        space: &mut S,
        region: RegionId,
    ) -> Result<Kept, S::Error> {
        if self.cursor.region == region.0 {
            self.absorb_window();
        }
        let &Region { first, .. } = self.regions.get(region);
        self.unshare_pages(space, first, self.regions.get(region).end())
    }

    /// Does so for the pages from `first` to before `end`.
    fn unshare_pages<S: PageSpace>(
        &mut self,
        space: &mut S,
        first: u32,
        end: u32,
    ) -> Result<Kept, S::Error> {
        let mut kept = Kept::default();
        let mut requests = Vec::with_capacity(CHUNK);
        let mut from = first;
        loop {
            requests.clear();
            while requests.len() < CHUNK
                && let Some(page) = self.records.find(from, end, ATTACHED | ZERO)
            {
                from = page.0 + 1;
                let item = self.records.get(page);
                if item.is(ZERO) {
                    requests.push(Request::Unshare { page, frame: None });
                } else if item.shows_frame() {
                    requests.push(Request::Unshare {
                        page,
                        frame: Some(FrameId(item.node())),
                    });
                }
            }
            if requests.is_empty() {
                return Ok(kept);
            }
            self.carry_out(space, &requests, &mut kept)?;
        }
    }

    /// Has memory un-merge pages, and records to the last of them what has taken effect, whatever
    /// fails meanwhile.
    fn carry_out<S: PageSpace>(
        &mut self,
        space: &mut S,
        requests: &[Request],
        kept: &mut Kept,
    ) -> Result<(), S::Error> {
        let mut outcomes = vec![Attempt::Refused(Reason::NotTried); requests.len()];
        let mut done = space.apply(requests, &mut outcomes);
        for (request, outcome) in requests.iter().zip(outcomes) {
            done = done.and(self.unshared(space, *request, outcome, kept));
        }
        done
    }

    /// Draws the conclusion from one request to un-merge.
    fn unshared<S: PageSpace>(
        &mut self,
        space: &mut S,
        request: Request,
        outcome: Attempt<()>,
        kept: &mut Kept,
    ) -> Result<(), S::Error> {
        let page = request.page();
        let merged = matches!(request, Request::Unshare { frame: Some(_), .. });
        match outcome {
            Attempt::Refused(reason) => {
                kept.add(reason);
                self.note_skip(page, reason);
            }
            Attempt::Done(()) if merged => {
                self.doubt_hash(page);
                return self.part(space, page);
            }
            // It was not merged any more when memory came to it.
            Attempt::Changed | Attempt::Gone if merged => return self.part_noticed(space, page),
            Attempt::Done(()) | Attempt::Changed | Attempt::Gone => self.unmark_zero(page),
        }
        Ok(())
    }

    /// Book-keeping for pages that are gone.
    fn absent<S: PageSpace>(
        &mut self,
        space: &mut S,
        first: u32,
        end: u32,
    ) -> Result<(), S::Error> {
        let mut from = first;
        let mut done = Ok(());
        while let Some(page) = self.records.find(from, end, ATTACHED | ZERO) {
            done = done.and(self.notice(space, page, PageState::Absent));
            from = page.0 + 1;
        }
        done
    }

    /// Drops the records of a region's pages from `from` on, but for those that still show a frame.
    pub(crate) fn drop_items(&mut self, region: RegionId, from: u32) {
        let end = self.regions.get(region).end();
        let mut from = from;
        while let Some(page) = self.records.find(from, end, EXISTS) {
            if !self.records.get(page).shows_frame() {
                self.drop_item(page);
            }
            from = page.0 + 1;
        }
    }

    /// Takes a region without records out of the scan list.
    pub(crate) fn drop_region(&mut self, region: RegionId) {
        if self.cursor.region == region.0 {
            let next = self.regions.after(region.0);
            self.enter_region(next);
        }
        if self.sweeping.is_some_and(|(at, _)| at == region.0) {
            self.sweeping = Some(self.beginning(self.regions.after(region.0)));
        }
        let it = self.regions.get(region);
        self.records.free_empty_chunks(it.first, it.end());
        let deserted = self.regions.remove(region);
        if self.regions.is_empty() && self.cursor.region == RING {
            // Nothing is left to scan: the running scan, if any, is void.
            self.in_scan = false;
        }
        if let Some(domain) = deserted {
            self.desert(domain);
        }
    }

    /// Gives up a domain without regions, unless empty chains are to linger in it as in the kernel.
    fn desert(&mut self, domain: u32) {
        let of_domain: Vec<u32> = self
            .tree_of
            .range((domain, 0)..=(domain, u16::MAX))
            .map(|(_, &tree)| tree)
            .collect();
        if !self.settings.lagging_records {
            for &tree in &of_domain {
                self.purge_stable_tree(tree);
            }
        }
        let empty = |&tree: &u32| self.trees[tree as usize].stable.len() == 0;
        if of_domain.iter().all(empty) {
            self.regions.drop_domain(domain);
        }
    }

    /// Gives up all domains without regions.
    pub(crate) fn drop_deserted_domains(&mut self) {
        for domain in self.regions.deserted_domains() {
            self.desert(domain);
        }
    }

    /// Keeps what is worth keeping of the window that has been looked at and not been visited: that
    /// pages in it were written, which will not be said again.
    pub(crate) fn absorb_window(&mut self) {
        let (first, states) = self.cursor.rest();
        let written: Vec<PageId> = (first..)
            .zip(states)
            .filter(|&(_, &state)| state == PageState::Resident(Written::Yes))
            .map(|(page, _)| PageId(page))
            .collect();
        if self.settings.write_tracking {
            for page in written {
                self.seen_written(page);
            }
        }
        self.cursor.drop_window();
    }

    /// Takes the place among the candidates and the hash from a page that has been written.
    pub(crate) fn seen_written(&mut self, page: PageId) {
        let item = *self.records.get(page);
        if item.is(RECHECK) || !item.is(EXISTS) {
            return;
        }
        if item.is(UNSTABLE) {
            self.leave_unstable(page);
        }
        self.drop_hash(page);
    }
}
