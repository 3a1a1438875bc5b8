//! Carrying out requests to merge: frames are prepared, then pages go through as many short windows as
//! it takes.

use super::{HEADROOM_BYTES, LinuxSpace};
use crate::eligible;
use crate::error::Error;
use crate::frames::Slot;
use crate::settings::{Barrier, Remerge};
use crate::sys::Span;
use crate::sys::pagemap::{Categories, Query};
use crate::sys::uffd::Modes;
use crate::window::{Hold, Job, Target, Verdict};
use pagemerge_core::{Attempt, PageId, Reason, Request};
use std::time::Instant;

/// Memory that new frames do not take: the kernel's own needs for them come out of it.
const KEPT_FREE_BYTES: u64 = 1 << 20;
/// Pages between two that are asked about, at most, for one question about both.
const NEAR: usize = 16;
/// Pages between two runs of zero pages, at most, for one stretch of both. Each of them is hashed once
/// more for it (0.4 us), and a registration of its own would take 5 us.
const BRIDGED: usize = 6;
/// Runs that a stretch saves time for, at least, so that the pages between are worth it.
const WORTH_BRIDGING: usize = 8;

/// A request to merge one page, on its way through windows.
pub(super) struct Item {
    pub(super) job: Job,
    pub(super) ticket: Ticket,
}

/// Whose request it is.
#[derive(Clone, Copy)]
pub(super) struct Ticket {
    pub(super) request: usize,
    pub(super) page: PageId,
    /// The fresh slot that it fills, for a promotion.
    pub(super) fresh: Option<Slot>,
}

/// Whether nothing has been said yet about a request.
pub(super) fn untried(outcome: Attempt<()>) -> bool {
    outcome == Attempt::Refused(Reason::NotTried)
}

impl LinuxSpace {
    fn target(&mut self, slot: Slot) -> Result<Target, Reason> {
        let (view, at) = self.frames.view(slot)?;
        let (memfd, offset) = self.frames.place_of(slot);
        Ok(Target::Frame {
            memfd,
            offset,
            view,
            at,
        })
    }

    /// Writes the frames-to-be of all promotions: neighbours get neighbouring slots.
    pub(super) fn prepare_promotions(
        &mut self,
        requests: &[Request],
        outcomes: &mut [Attempt<()>],
    ) -> Result<Vec<Item>, Error> {
        let mut wanted: Vec<(PageId, usize)> = requests
            .iter()
            .enumerate()
            .filter_map(|(at, request)| match request {
                Request::Promote { page, .. } if untried(outcomes[at]) => Some((*page, at)),
                _ => None,
            })
            .collect();
        let mut items = Vec::with_capacity(wanted.len());
        if wanted.is_empty() {
            return Ok(items);
        }
        self.frames.begin_batch()?;
        wanted.sort_unstable();
        // Frames take memory before their pages give any back. At a group's limit, one too many would
        // bring in the OOM killer.
        let mut affordable = self.headroom.map_or(usize::MAX, |(bytes, _)| {
            let frames = bytes.saturating_sub(KEPT_FREE_BYTES) / self.page as u64;
            usize::try_from(frames).unwrap_or(usize::MAX)
        });
        let mut rest = wanted.as_slice();
        while let Some(&(first, at)) = rest.first() {
            if affordable == 0 {
                outcomes[at] = Attempt::Refused(Reason::NoMemory);
                rest = &rest[1..];
                continue;
            }
            let Some((region, index)) = self.region_of(first) else {
                outcomes[at] = Attempt::Gone;
                rest = &rest[1..];
                continue;
            };
            let room = affordable.min(region.pages() - index);
            let run = (1..rest.len().min(room))
                .find(|&n| rest[n].0.0 != first.0 + u32::try_from(n).unwrap_or(u32::MAX))
                .unwrap_or_else(|| rest.len().min(room));
            let live = region.live.part(index * self.page, run * self.page);
            let (id, pages) = (region.id, region.pages());
            let count = u32::try_from(run).expect("a batch is small");
            let index = u32::try_from(index).expect("a region's pages fit 32 bits");
            let pages = u32::try_from(pages).expect("a region's pages fit 32 bits");
            let (wrote, stop) = match self.frames.place(id, pages, index, count) {
                Err(reason) => (Err(reason), Some(reason)),
                Ok(slot) => {
                    let (done, stop) = self.frames.write(slot, live);
                    if done < count {
                        self.frames.abandon(slot.plus(done), count - done);
                    }
                    (Ok((slot, done)), stop)
                }
            };
            let done = wrote.map_or(0, |(_, done)| done);
            affordable -= done as usize;
            for (n, &(page, at)) in rest[..run].iter().enumerate() {
                let n = u32::try_from(n).expect("a batch is small");
                let slot = match wrote {
                    Ok((slot, done)) if n < done => slot.plus(n),
                    // Only the page at which it stopped is to blame; the others are asked again in
                    // the next pass.
                    _ => {
                        let why = stop.filter(|_| n == done || wrote.is_err());
                        outcomes[at] = Attempt::Refused(why.unwrap_or(Reason::NotTried));
                        continue;
                    }
                };
                match self.target(slot) {
                    Ok(target) => {
                        let live = live.part(n as usize * self.page, self.page);
                        let job = Job::new(live, target);
                        let ticket = Ticket {
                            request: at,
                            page,
                            fresh: Some(slot),
                        };
                        items.push(Item { job, ticket });
                    }
                    Err(reason) => {
                        self.frames.abandon(slot, 1);
                        outcomes[at] = Attempt::Refused(reason);
                    }
                }
            }
            rest = &rest[run..];
        }
        Ok(items)
    }

    pub(super) fn prepare_joins(
        &mut self,
        requests: &[Request],
        outcomes: &mut [Attempt<()>],
    ) -> Vec<Item> {
        let mut items = Vec::new();
        for (at, request) in requests.iter().enumerate() {
            if !untried(outcomes[at]) {
                continue;
            }
            let (page, target) = match *request {
                Request::Zero { page } => (page, Ok(Target::Zero)),
                Request::Share { page, frame } => {
                    let Some(slot) = self.frames.slot(frame) else {
                        outcomes[at] = Attempt::Gone;
                        continue;
                    };
                    (page, self.target(slot))
                }
                _ => continue,
            };
            match (target, self.live(page)) {
                (Ok(target), Some(live)) => {
                    let job = Job::new(live, target);
                    let ticket = Ticket {
                        request: at,
                        page,
                        fresh: None,
                    };
                    items.push(Item { job, ticket });
                }
                (Err(reason), _) => outcomes[at] = Attempt::Refused(reason),
                (_, None) => outcomes[at] = Attempt::Gone,
            }
        }
        items
    }

    fn is_mapped(&self, page: PageId) -> bool {
        self.region_of(page)
            .is_some_and(|(region, at)| region.mapped.get(at))
    }

    pub(super) fn is_tracked(&self, page: PageId) -> bool {
        self.region_of(page)
            .is_some_and(|(region, _)| region.tracked)
    }

    /// Takes `items` through windows: what can be moved, then what stays in place.
    pub(super) fn merge(&mut self, items: Vec<Item>, outcomes: &mut [Attempt<()>]) {
        let (mut moved, mut in_place): (Vec<Item>, Vec<Item>) = items
            .into_iter()
            .partition(|item| self.moves && !self.is_mapped(item.ticket.page));
        moved.sort_by_key(|item| item.job.live.span().start);
        in_place.sort_by_key(|item| item.job.live.span().start);
        if let Some(reason) = self.forbidden {
            for item in moved.drain(..).chain(in_place.drain(..)) {
                self.finish(&item.ticket, &item.job, Some(reason), outcomes);
            }
            return;
        }
        let mut moved = if self.tracking {
            self.drop_written(moved, outcomes)
        } else {
            moved
        };
        self.bridge(&mut moved);
        self.note_splits(&mut moved);
        let busy = self.pass_through(moved, true, outcomes);
        let mut again = Vec::new();
        for item in busy {
            match self.cure_busy(&item) {
                Ok(()) => again.push(item),
                Err(reason) => self.finish(&item.ticket, &item.job, Some(reason), outcomes),
            }
        }
        // Curing has set their written bits, so that question is not asked again.
        for item in self.pass_through(again, true, outcomes) {
            self.finish(&item.ticket, &item.job, Some(Reason::Pinned), outcomes);
        }
        let in_place = self.hold_in_place(in_place, outcomes);
        self.pass_through(in_place, false, outcomes);
    }

    /// A page that a fork shared once refuses to be moved for ever, until it is written. Without a
    /// child that still shares it, faulting it in for writing cures that, and copies nothing.
    fn cure_busy(&self, item: &Item) -> Result<(), Reason> {
        let span = item.job.live.span();
        let entry = self.pagemap.entry(span.start).map_err(|_| Reason::Other)?;
        if !entry.is_exclusive() {
            return Err(Reason::SharedByFork);
        }
        item.job
            .live
            .populate_write()
            .map_err(|_| eligible::reason_at(span))
    }

    /// Pages that are merged where they are must be under a watch first. Those that may be merged
    /// without quiet time get one that begins now.
    fn hold_in_place(&mut self, items: Vec<Item>, outcomes: &mut [Attempt<()>]) -> Vec<Item> {
        if items.is_empty() {
            return items;
        }
        if self.barrier == Barrier::None {
            // The caller promised that nobody writes during the call. But what is pinned may be
            // written after it, by a device that goes on with the page that it knows.
            if !eligible::has_pinned_pages() {
                return items;
            }
            for item in items {
                self.finish(&item.ticket, &item.job, Some(Reason::Pinned), outcomes);
            }
            return Vec::new();
        }
        let now = Instant::now();
        let always = self.remerge == Remerge::Always;
        let (mut ready, mut refused) = (Vec::new(), Vec::new());
        match self.watches() {
            Err(reason) => refused.extend(items.into_iter().map(|item| (item, reason))),
            Ok(watches) => {
                for item in items {
                    if watches.is_watched(item.job.live.span().start)
                        || always && watches.begin(item.job.live, now).is_ok()
                    {
                        ready.push(item);
                    } else {
                        refused.push((item, Reason::NotQuiet));
                    }
                }
            }
        }
        for (item, reason) in refused {
            self.finish(&item.ticket, &item.job, Some(reason), outcomes);
        }
        ready
    }

    /// Finds the zero pages of `items`, sorted by address, that one stretch may hold (see
    /// [`crate::window`]): many close together, and between them only ordinary pages that are known.
    fn bridge(&self, items: &mut [Item]) {
        let pieces = items.chunk_by_mut(|one, next| self.may_bridge(one, next));
        for piece in pieces {
            let at = |item: &Item| item.job.live.span();
            let neighbours = |n: usize| at(&piece[n - 1]).end() == at(&piece[n]).start;
            let runs = 1 + (1..piece.len()).filter(|&n| !neighbours(n)).count();
            if runs >= WORTH_BRIDGING {
                piece[1..]
                    .iter_mut()
                    .for_each(|item| item.job.bridged = true);
            }
        }
    }

    fn may_bridge(&self, one: &Item, next: &Item) -> bool {
        let (Some((region, from)), Some((same, to))) = (
            self.region_of(one.ticket.page),
            self.region_of(next.ticket.page),
        ) else {
            return false;
        };
        let between = from + 1..to;
        one.job.is_zero()
            && next.job.is_zero()
            && region.id == same.id
            && between.len() <= BRIDGED
            // Left alone, or mapped by its owner since, is what is not of its own.
            && between.clone().all(|page| region.own.get(page) && !region.mapped.get(page))
    }

    /// What a stretch has taken the protection of is looked at in full next time, and counts as written:
    /// no fault tells of its writes.
    fn doubt_between(&mut self, jobs: &[Job], tickets: &[Ticket]) {
        for at in 1..jobs.len() {
            if jobs[at].bridged {
                let pages = tickets[at - 1].page.0 + 1..tickets[at].page.0;
                pages.for_each(|page| self.doubt(PageId(page)));
            }
        }
    }

    /// Windows over `items`, sorted by address. Returns what was busy.
    fn pass_through(
        &mut self,
        items: Vec<Item>,
        moved: bool,
        outcomes: &mut [Attempt<()>],
    ) -> Vec<Item> {
        let (mut jobs, tickets): (Vec<Job>, Vec<Ticket>) = items
            .into_iter()
            .map(|item| (item.job, item.ticket))
            .unzip();
        let mut done = 0;
        while done < jobs.len() {
            let fit = self.windows.fit(&jobs[done..], self.max_pause_micros);
            let (these, now) = (&mut jobs[done..done + fit], &tickets[done..done + fit]);
            done += fit;
            let needed = self.windows.mappings_needed(these);
            let refused = if !self.has_room(needed) {
                Some(Reason::MappingBudget)
            } else if self
                .headroom
                .is_some_and(|(bytes, _)| bytes < HEADROOM_BYTES)
                && !self.windows.pay_first(these)
            {
                Some(Reason::NoMemory)
            } else {
                None
            };
            if let Some(reason) = refused {
                for (ticket, job) in now.iter().zip(&jobs[done - fit..done]) {
                    self.finish(ticket, job, Some(reason), outcomes);
                }
                continue;
            }
            let tracked = self.is_tracked(now[0].page);
            let hold = match (&self.uffd, &self.watches) {
                (Some(uffd), _) if moved => Hold::Moved { uffd, tracked },
                (_, Some(watches)) if self.barrier != Barrier::None => Hold::Watched(watches),
                _ => Hold::Nothing,
            };
            self.windows.run(hold, these);
            self.budget.used += needed;
            self.doubt_between(&jobs[done - fit..done], now);
            for (ticket, job) in now.iter().zip(&jobs[done - fit..done]) {
                if job.verdict != Verdict::Busy {
                    self.finish(ticket, job, None, outcomes);
                }
            }
        }
        let all = jobs.into_iter().zip(tickets);
        all.filter(|(job, _)| job.verdict == Verdict::Busy)
            .map(|(mut job, ticket)| {
                // That was said of another page before it.
                job.bridged = false;
                Item { job, ticket }
            })
            .collect()
    }

    /// Looks once more at the written bit of what is to be moved: I/O that holds a page by a plain
    /// reference, which no move would notice, has set it when it began (finding F6).
    fn drop_written(&mut self, items: Vec<Item>, outcomes: &mut [Attempt<()>]) -> Vec<Item> {
        let query = Query {
            all_of: Categories::WRITTEN.and(Categories::WP_ALLOWED),
            any_of: Categories::NONE,
            ..Query::look(Categories::WRITTEN)
        };
        let at = |item: &Item| item.job.live.span();
        let mut written: Vec<Span> = Vec::new();
        let near = items.chunk_by(|one, next| at(next).start - at(one).end() <= NEAR * self.page);
        let stretches: Vec<Span> = near
            .map(|items| Span::between(at(&items[0]).start, at(&items[items.len() - 1]).end()))
            .collect();
        for stretch in stretches {
            // A look that fails finds nothing, and the window's own comparison still decides.
            let _ = self.scan(stretch, &query, |first, pages, _| {
                written.push(stretch.page_run(first, pages));
            });
        }
        let mut written = written.into_iter().peekable();
        // Where a huge page was protected as a whole, the kernel has told of some of its pages already,
        // and does not do so again.
        let told = |page: PageId| {
            let found = self.region_of(page);
            found.is_some_and(|(region, at)| region.written.get(at))
        };
        let told: Vec<bool> = items.iter().map(|item| told(item.ticket.page)).collect();
        let mut kept = Vec::with_capacity(items.len());
        for (mut item, told) in items.into_iter().zip(told) {
            let span = at(&item);
            while written.next_if(|w| w.end() <= span.start).is_some() {}
            if told || written.peek().is_some_and(|w| w.overlaps(span)) {
                item.job.verdict = Verdict::Differs;
                self.finish(&item.ticket, &item.job, None, outcomes);
            } else {
                kept.push(item);
            }
        }
        kept
    }

    /// Books how one request ended.
    fn finish(
        &mut self,
        ticket: &Ticket,
        job: &Job,
        refused: Option<Reason>,
        outcomes: &mut [Attempt<()>],
    ) {
        let span = job.live.span();
        let outcome = match (refused, job.verdict) {
            (Some(reason), _) => Attempt::Refused(reason),
            (None, Verdict::Merged) => Attempt::Done(()),
            (None, Verdict::Differs) => {
                self.lost_races += 1;
                Attempt::Changed
            }
            // It may well be equal: the algorithm looks at it again.
            (None, Verdict::Denied) => Attempt::Changed,
            (None, Verdict::Absent) => Attempt::Gone,
            (None, Verdict::NoMemory) => Attempt::Refused(Reason::NoMemory),
            (None, Verdict::Sealed) => Attempt::Refused(Reason::Sealed),
            (None, Verdict::Foreign) => Attempt::Refused(Reason::ForeignUserfaultfd),
            (None, Verdict::NotQuiet) => Attempt::Refused(Reason::NotQuiet),
            (None, Verdict::WrongMapping) => Attempt::Refused(eligible::reason_at(span)),
            (None, Verdict::Busy) => Attempt::Refused(Reason::Pinned),
            (None, Verdict::Untried) => Attempt::Refused(Reason::Other),
        };
        outcomes[ticket.request] = outcome;
        if refused.is_none()
            && let Some(watches) = &mut self.watches
        {
            // Merged or let go by its window: its watch is over either way.
            watches.forget(span);
        }
        if outcome != Attempt::Done(()) {
            self.doubt(ticket.page);
            if let Some(slot) = ticket.fresh {
                self.frames.abandon(slot, 1);
            }
            return;
        }
        let was_mapped = self.is_mapped(ticket.page);
        match job.target {
            Target::Frame { .. } => self.set_mapped(ticket.page, true),
            Target::Zero => {
                self.set_mapped(ticket.page, false);
                self.note_fresh_zero(ticket.page);
                if (was_mapped || !self.moves) && self.is_tracked(ticket.page) {
                    // It lies in a fresh mapping now. Where it cannot be tracked, digests decide.
                    if let Some(uffd) = &self.uffd {
                        let _ = uffd.register(span, Modes::WriteProtect);
                    }
                }
            }
        }
    }
}
