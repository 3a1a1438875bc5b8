//! What pages are now: the kernel's answers, put together with what is remembered (see [`super`]).

use super::{LinuxSpace, STATE, aside, count_outside};
use crate::eligible::{self, Readable};
use crate::error::Error;
use crate::settings::{Barrier, Remerge};
use crate::sys::Span;
use crate::sys::live::Live;
use crate::sys::pagemap::{Categories, Entry, Query, ScanStop};
use crate::watch::{Quiet, Watches};
use pagemerge_core::{Look, PageId, PageState, Reason, RegionId, Window, Written};
use std::time::Instant;

impl LinuxSpace {
    /// Asks the kernel about `span` and calls `tell` with (page of the span, pages, categories).
    pub(super) fn scan(
        &mut self,
        span: Span,
        query: &Query,
        mut tell: impl FnMut(usize, usize, Categories),
    ) -> Result<(), Error> {
        if !self.has_scan {
            return self.read_entries(span, query, tell);
        }
        let mut rest = span;
        while !rest.is_empty() {
            let got = match self.pagemap.scan(rest, query, &mut self.scanned) {
                Ok(got) => got,
                // The owner's remap has ended the tracking of a part: nothing is told of it here,
                // and the other scan does not call it tracked.
                Err(ScanStop::NotTracked) if query.must_be_tracked => return Ok(()),
                Err(stop) => {
                    return Err(Error::os(
                        format!("cannot look at {} pages (PAGEMAP_SCAN)", rest.pages()),
                        stop.into(),
                    ));
                }
            };
            for region in &self.scanned[..got.regions] {
                let at = region.span();
                tell(
                    (at.start - span.start) / self.page,
                    at.pages(),
                    region.categories(),
                );
            }
            if query.max_pages > 0 && got.regions > 0 {
                break;
            }
            rest = Span::between(
                got.walk_end.max(rest.start + self.page).min(span.end()),
                span.end(),
            );
        }
        Ok(())
    }

    /// The first page of `span` at which the kernel has anything. It goes by page tables, so empty
    /// address space costs next to nothing.
    pub(super) fn first_there(&mut self, span: Span) -> Result<Option<usize>, Error> {
        let here = Categories::PRESENT.and(Categories::SWAPPED);
        let query = Query {
            max_pages: 1,
            ..Query::look(here)
        };
        let mut first = None;
        self.scan(span, &query, |at, _, _| {
            first.get_or_insert(at);
        })?;
        Ok(first)
    }

    /// The same from each page's entry, for kernels before 6.7. A zero page is not marked there: it is
    /// a present page that is nobody's own and holds nothing but zeroes.
    fn read_entries(
        &mut self,
        span: Span,
        query: &Query,
        mut tell: impl FnMut(usize, usize, Categories),
    ) -> Result<(), Error> {
        let mut entries = vec![Entry::default(); span.pages()];
        let read = self
            .pagemap
            .entries(span.start, &mut entries)
            .map_err(|e| {
                Error::os(
                    format!("cannot read {} entries of /proc/self/pagemap", span.pages()),
                    e.into(),
                )
            })?;
        for (at, entry) in entries[..read].iter().enumerate() {
            let mut seen = Categories::NONE;
            let shared = entry.is_present() && !entry.is_file() && !entry.is_exclusive();
            for (is, category) in [
                (entry.is_present(), Categories::PRESENT),
                (entry.is_swapped(), Categories::SWAPPED),
                (entry.is_file(), Categories::FILE),
                (!entry.is_protected(), Categories::WRITTEN),
                (
                    shared && self.reads_zero(span.page_run(at, 1)),
                    Categories::ZERO_PAGE,
                ),
            ] {
                if is {
                    seen = seen | category;
                }
            }
            if seen.has(query.all_of)
                && (query.any_of == Categories::NONE || seen.any(query.any_of))
            {
                tell(at, 1, seen);
            }
        }
        Ok(())
    }

    /// Whether a page of a region is readable and all zero.
    fn reads_zero(&self, page: Span) -> bool {
        let region = self
            .regions
            .values()
            .find(|region| region.live.span().covers(page));
        region.is_some_and(|region| {
            let offset = page.start - region.live.span().start;
            Readable::new(&self.maps).covers(page) && region.live.part(offset, page.len).is_zero()
        })
    }

    /// Looks at pages `range` of a region, each of them, and notes what they are.
    pub(super) fn look_in_full(
        &mut self,
        window: Window,
        (from, to): (usize, usize),
        look: Look,
        into: &mut [PageState],
    ) -> Result<(), Error> {
        let page = self.page;
        let Some(region) = self.region_mut(window.region) else {
            return Ok(());
        };
        let (live, tracked) = (region.live, region.tracked);
        let mut left_alone = region.left_alone((from, to), page);
        let mapped: Vec<bool> = (from..to).map(|at| region.mapped.get(at)).collect();
        let live = live.part(from * page, (to - from) * page);
        let arm = tracked && look == Look::Scan;
        let broken = self.look(live, arm, &|at| mapped[at], into)?;
        self.note_huge(window.region, (from, to));
        if self.huge.never() {
            let whole = self.told_huge.iter();
            let whole = whole.map(|&(first, end)| (first, end - first, Reason::HugePage));
            left_alone.splice(..0, whole);
        }
        for (at, pages) in aside::tell(&left_alone, into) {
            if arm {
                let part = (from + at, from + at + pages);
                self.take_written(window.region, part, &mut into[at..at + pages])?;
            }
        }
        if look == Look::Scan {
            self.refuse_unwritable(live, into);
            for (at, pages, protected) in broken {
                self.judge_broken(live, (at, at + pages), protected, window.first, into);
            }
            if !self.moves {
                self.judge_unmovable(live, &mapped, into);
            }
            self.note_look(window.region, from, into);
            self.doubt_unsure_zeroes(window.region);
        }
        Ok(())
    }

    /// What the kernel says of `live`, whose pages were mapped over as `mapped` tells; nothing is
    /// changed. Fills `into`, and collects pages that were written after merging: (page, pages,
    /// write-protected).
    pub(super) fn look(
        &mut self,
        live: Live,
        tracked: bool,
        mapped: &dyn Fn(usize) -> bool,
        into: &mut [PageState],
    ) -> Result<Vec<(usize, usize, bool)>, Error> {
        for (at, state) in into.iter_mut().enumerate() {
            *state = if mapped(at) {
                PageState::Merged
            } else {
                PageState::Absent
            };
        }
        let mut broken: Vec<(usize, usize, bool)> = Vec::new();
        let mut huge = std::mem::take(&mut self.told_huge);
        huge.clear();
        let here = Categories::PRESENT.and(Categories::SWAPPED);
        let told = if self.tells_guards {
            STATE.and(Categories::GUARD)
        } else {
            STATE
        };
        let query = Query {
            any_of: here,
            ..Query::look(told)
        };
        self.scan(live.span(), &query, |first, pages, seen| {
            let present = seen.has(Categories::PRESENT);
            let file = seen.has(Categories::FILE);
            if seen.has(Categories::HUGE) {
                huge.push((first, first + pages));
            }
            let ordinary = if seen.has(Categories::GUARD) {
                PageState::Ineligible(Reason::Guard)
            } else if !present {
                // Where writes are tracked, what says SWAPPED is a marker of that, as a rule.
                let swapped = seen.has(Categories::SWAPPED) && !seen.has(Categories::WP_ALLOWED);
                if swapped {
                    PageState::Ineligible(Reason::Swapped)
                } else {
                    PageState::Absent
                }
            } else if seen.has(Categories::ZERO_PAGE) {
                PageState::ZeroPage
            } else if file {
                // Somebody mapped a file over registered memory.
                PageState::Ineligible(Reason::FileBacked)
            } else if tracked && seen.has(Categories::WP_ALLOWED) {
                PageState::Resident(Written::No)
            } else {
                PageState::Resident(Written::Unknown)
            };
            for (at, state) in (first..).zip(&mut into[first..first + pages]) {
                *state = match (mapped(at), present, file) {
                    (false, ..) => ordinary,
                    (true, _, true) => PageState::Merged,
                    (true, false, _) => PageState::Unknown,
                    (true, true, false) => {
                        let protected = !seen.has(Categories::WRITTEN);
                        match broken.last_mut() {
                            Some((from, n, p)) if *from + *n == at && *p == protected => *n += 1,
                            _ => broken.push((at, 1, protected)),
                        }
                        PageState::Resident(Written::Unknown)
                    }
                };
            }
        })?;
        self.told_huge = huge;
        Ok(broken)
    }

    /// Refuses pages whose owner has taken a permission away: they cannot be protected, so they would
    /// seem to be written all the time. (Of others that are unwritten that is known.)
    pub(super) fn refuse_unwritable(&self, live: Live, into: &mut [PageState]) {
        let mut known = Readable::new(&self.maps);
        for (at, state) in into.iter_mut().enumerate() {
            if matches!(state, PageState::Resident(Written::Yes | Written::Unknown)) {
                let page = live.part(at * self.page, self.page);
                if let Some(reason) = known.refusal(page.span()) {
                    *state = PageState::Ineligible(reason);
                }
            }
        }
    }

    /// Takes the written bits of tracked pages and protects them again, each in one moment, so that
    /// a write is seen now or next time. It must have the last word over [`look`](Self::look).
    ///
    /// Huge pages are protected as a whole, and what the kernel says of pages beyond `from..to` is kept for
    /// the look at them.
    pub(super) fn take_written(
        &mut self,
        id: RegionId,
        (from, to): (usize, usize),
        into: &mut [PageState],
    ) -> Result<(), Error> {
        let (page, huge) = (self.page, self.huge.pages);
        let Some(region) = self.region_mut(id) else {
            return Ok(());
        };
        let (first, end) = region.widened((from, to), page, huge);
        let span = region.live.part(first * page, (end - first) * page).span();
        let mut beyond = std::mem::take(&mut self.told_written);
        beyond.clear();
        let mut unsure = std::mem::take(&mut self.unsure_zeroes);
        let query = Query {
            must_be_tracked: false,
            ..Query::written_and_protect(Categories::WRITTEN.and(Categories::PRESENT))
        };
        let asked = self.scan(span, &query, |at, pages, _| {
            let (begin, end) = (first + at, first + at + pages);
            for page in begin.max(from)..end.min(to) {
                let state = &mut into[page - from];
                if *state == PageState::ZeroPage {
                    unsure.push(page);
                }
                if *state == PageState::Resident(Written::No) {
                    *state = PageState::Resident(Written::Yes);
                }
            }
            for (begin, end) in [(begin, end.min(from)), (begin.max(to), end)] {
                if begin < end {
                    beyond.push((begin, end));
                }
            }
        });
        self.note_written(id, &beyond);
        self.told_written = beyond;
        self.unsure_zeroes = unsure;
        asked
    }

    /// Whether pages that were written after merging (or, on a kernel that cannot move pages, any
    /// pages) may be merged where they are.
    fn judge_in_place(
        &mut self,
        run: Live,
        protected: bool,
        remerge: Remerge,
        into: &mut [PageState],
    ) {
        let refuse = |into: &mut [PageState], why| into.fill(PageState::Ineligible(why));
        if self.barrier == Barrier::None || remerge == Remerge::Always {
            return;
        }
        // In user mode a system call that writes to a watched page fails, and a watch is long.
        if remerge == Remerge::Never || self.barrier == Barrier::User {
            return refuse(into, Reason::Broken);
        }
        if *self.pinned.get_or_insert_with(eligible::has_pinned_pages) {
            return refuse(into, Reason::Pinned);
        }
        let (now, quiet, page) = (Instant::now(), self.quiet, self.page);
        if let Err(reason) = self.watches() {
            return refuse(into, reason);
        }
        let Some(watches) = &mut self.watches else {
            return;
        };
        let budget = &mut self.budget;
        let (maps, regions) = (&self.maps, &self.regions);
        let mut unwatched: Option<usize> = None;
        // Each stretch that is to be watched may become a mapping of its own between two others, so room
        // is asked for, and taken, stretch by stretch.
        let mut begin = |from: usize, watches: &mut Watches, into: &mut [PageState]| {
            if !budget.has_room(2, &|| count_outside(maps, regions)) {
                return into.fill(PageState::Ineligible(Reason::MappingBudget));
            }
            let part = run.part(from * page, into.len() * page);
            // A run that cannot be watched now is asked again in the next pass.
            if watches.begin(part, now).is_ok() {
                budget.used += 2;
            }
        };
        for at in 0..into.len() {
            let address = run.span().start + at * page;
            let (told, idle) = match watches.look(address, protected, quiet, now) {
                Quiet::No => (PageState::Ineligible(Reason::NotQuiet), true),
                Quiet::NotYet => (PageState::Ineligible(Reason::NotQuiet), false),
                Quiet::Newly => (PageState::Resident(Written::Yes), false),
                Quiet::Still => (PageState::Resident(Written::No), false),
                Quiet::Resting => {
                    watches.give_up(run.part(at * page, page));
                    (PageState::Ineligible(Reason::NotQuiet), false)
                }
            };
            into[at] = told;
            match (idle, unwatched) {
                (true, None) => unwatched = Some(at),
                (false, Some(from)) => {
                    begin(from, watches, &mut into[from..at]);
                    unwatched = None;
                }
                _ => {}
            }
        }
        if let Some(from) = unwatched {
            begin(from, watches, &mut into[from..]);
        }
    }

    /// Judges those of the broken pages `from..to` of a window that nothing else speaks against.
    pub(super) fn judge_broken(
        &mut self,
        live: Live,
        (from, to): (usize, usize),
        protected: bool,
        first: PageId,
        into: &mut [PageState],
    ) {
        let is_resident = |state: &PageState| matches!(state, PageState::Resident(_));
        let remerge = self.remerge;
        let mut at = from;
        while at < to {
            let pages = into[at..to].iter().take_while(|s| is_resident(s)).count();
            if pages > 0 {
                let run = live.part(at * self.page, pages * self.page);
                let into = &mut into[at..at + pages];
                self.judge_in_place(run, protected, remerge, into);
                if self.moves && remerge == Remerge::Quiet {
                    let offset = u32::try_from(at).expect("a window is small");
                    self.restore_found_quiet(run, first.plus(offset), into);
                }
            }
            at += pages.max(1);
        }
    }

    /// Without `UFFDIO_MOVE`, every ordinary page goes through a watch, like a broken one.
    pub(super) fn judge_unmovable(&mut self, run: Live, mapped: &[bool], into: &mut [PageState]) {
        if self.barrier == Barrier::None {
            return;
        }
        // These were not merged before, so `never` has nothing to say about them.
        let remerge = match self.remerge {
            Remerge::Always => Remerge::Always,
            Remerge::Quiet | Remerge::Never => Remerge::Quiet,
        };
        for at in 0..into.len() {
            if !mapped[at] && matches!(into[at], PageState::Resident(_)) {
                let page = run.part(at * self.page, self.page);
                let entry = self.pagemap.entry(page.span().start);
                let protected = entry.is_ok_and(Entry::is_protected);
                self.judge_in_place(page, protected, remerge, &mut into[at..=at]);
            }
        }
    }
}
