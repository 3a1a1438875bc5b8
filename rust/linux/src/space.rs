//! `LinuxSpace`: the algorithm's door to live memory.
//!
//! It observes pages (one or two system calls for a window of them), hashes and compares them, and
//! carries out requests: frames are prepared first, then [`crate::window`] opens as many short
//! windows as it takes.
//!
//! # What is remembered of a page
//! One bit: whether a frame was mapped over it (`mapped`), so that what lies there now is a private
//! mapping of a memfd. All else is asked of the kernel, since nobody tells us about copy-on-write:
//!
//! | mapped | the kernel says | so the page is |
//! |---|---|---|
//! | no | PRESENT | an ordinary page |
//! | no | PFNZERO | on the zero page |
//! | no | SWAPPED, or nothing | absent (SWAPPED is a write-protection marker, as a rule) |
//! | yes | FILE, or neither PRESENT nor SWAPPED | still merged |
//! | yes | PRESENT without FILE | broken: written since, a copy of its own |
//! | yes | SWAPPED | unknown: it may be a broken page in swap (finding F4) |
//!
//! # Invariants
//! * L1. Memory is changed in [`PageSpace::apply`] and by its owner's own wish (`discard`, `forget`).
//! * L2. Merged mappings are never registered for write-protection (F4: their markers would look like
//!   swapped pages); broken pages are, from their first watch on.
//! * L3. With write tracking, the bit that was set by our own moving back is reported as a write; the
//!   algorithm knows that it asked for the attempt, and looks at the bytes.
//! * L4. The owner's promise ([`Live`]) covers every page of a region until it is removed.
//!
//! # Cost
//! One bit of metadata for each page; 2 ns to observe a page, 2 ns more to arm it.

use crate::barrier;
use crate::bitmap::Bitmap;
use crate::eligible::{self, Eligible, Readable};
use crate::error::Error;
use crate::frames::{FrameStore, Slot};
use crate::hash::PageHasher;
use crate::probe::capabilities;
use crate::restore::Restore;
use crate::settings::{Barrier, EngineSettings, Remerge};
use crate::sys::live::Live;
use crate::sys::pagemap::{Categories, Entry, PageRegion, Pagemap, Query, ScanStop};
use crate::sys::procmap::Procmap;
use crate::sys::uffd::{Features, Modes, RegisterStop, Userfaultfd};
use crate::sys::{self, Span};
use crate::watch::{Quiet, Watches};
use crate::window::{Hold, Job, MAX_PAGES, Target, Verdict, Windows, mapped_over};
use crate::{accounting, mappings};
use pagemerge_core::{
    Attempt, Content, Digest, FrameId, Look, Nid, PageId, PageSpace, PageState, Reason, RegionId,
    Registered, Request, SettingError, Window, Written,
};
use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Pages of `digest` below which no extra threads are worth their start.
const THREADS_FROM_PAGES: usize = 256;
/// Memory that must be free, besides what a batch needs, for it to begin without paying first.
const HEADROOM_BYTES: u64 = 16 << 20;
/// How old a look at the list of mappings may be: reading it costs 5 us a mapping.
const SURVEY_FRESH: Duration = Duration::from_secs(1);
/// With so much left, asking again can wait for [`HEADROOM_FRESH`]: nobody uses it up meanwhile.
const HEADROOM_PLENTY: u64 = 1 << 30;
const HEADROOM_FRESH: Duration = Duration::from_millis(50);

const STATE: Categories = Categories::PRESENT
    .and(Categories::SWAPPED)
    .and(Categories::FILE)
    .and(Categories::ZERO_PAGE)
    .and(Categories::WRITTEN)
    .and(Categories::WP_ALLOWED);

/// Live memory's own counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpaceStats {
    /// Mappings that this process has.
    pub mappings: u64,
    /// Mappings that merging may use, of `vm.max_map_count`.
    pub mapping_budget: u64,
    /// Frames that exist.
    pub frames: u64,
    /// Bytes that the frames' memfds really hold.
    pub frames_bytes: u64,
    /// Frame generations: one more after each fork while a child lives.
    pub generations: u64,
    /// Windows opened so far.
    pub windows: u64,
    /// Pages that one window gave back because they were written, ever.
    pub lost_races: u64,
    /// Bytes of bookkeeping.
    pub metadata_bytes: u64,
}

struct Region {
    id: RegionId,
    first: PageId,
    live: Live,
    /// A frame was mapped over the page, and nothing else since.
    mapped: Bitmap,
    /// Pages that hold, or held, a thread's own data: (page of the region, why). They stay excluded:
    /// thread stacks are used again, and a page that came back would have lost its written bit.
    excluded: Vec<(usize, Reason)>,
    /// Registered for write tracking.
    tracked: bool,
    /// Not unregistered (unregistered regions may linger, see `lagging_records`).
    attached: bool,
    /// The owner's choice about huge pages, for mappings that replace his.
    huge: Option<bool>,
    /// What the owner has changed about the memory since, which a new mapping would undo, and when
    /// that was looked at.
    altered: Vec<(Span, Reason)>,
    surveyed: Option<Instant>,
}

impl Region {
    fn pages(&self) -> usize {
        self.live.span().pages()
    }
}

/// Live memory as one engine sees it. Lives on the merging thread.
pub(crate) struct LinuxSpace {
    page: usize,
    barrier: Barrier,
    pagemap: Rc<Pagemap>,
    maps: Rc<Procmap>,
    /// Tracks writes, and moves pages; dropped before what it may still hold.
    uffd: Option<Userfaultfd>,
    tracking: bool,
    /// Write tracking as it was asked for.
    wants_tracking: bool,
    moves: bool,
    has_scan: bool,
    tells_guards: bool,
    watches: Option<Watches>,
    windows: Windows,
    frames: FrameStore,
    hasher: PageHasher,
    regions: BTreeMap<u32, Region>,
    by_id: HashMap<RegionId, u32>,
    remerge: Remerge,
    quiet: Duration,
    max_pause_micros: u32,
    threads: usize,
    budget: Budget,
    /// Whether pages of this process are pinned for long, once that was asked in this pass.
    pinned: Option<bool>,
    /// `O_DIRECT` on a network file system is in use, as of the beginning of this pass.
    network_io: bool,
    lost_races: u64,
    /// Quiet pages have had the owner's changes looked at in this pass.
    surveyed_in_pass: bool,
    /// When pages were last un-merged: a series of batches needs one look at the mappings.
    unshared_at: Option<Instant>,
    /// Bytes left before a limit, and when that was asked; `None` where it cannot be asked.
    headroom: Option<(u64, Instant)>,
    scanned: Vec<PageRegion>,
}

/// How many mappings may still be made.
#[derive(Clone, Copy, Debug)]
struct Budget {
    max: u64,
    reserved: u64,
    /// Counted, plus what we have added since.
    used: u64,
    /// A count has found no room; counting again waits for the next pass.
    exhausted: bool,
}

impl Budget {
    fn new(reserved: Option<u64>) -> Self {
        let max = capabilities().max_map_count;
        let mut budget = Self {
            max,
            reserved: 0,
            used: 0,
            exhausted: false,
        };
        budget.reserve(reserved);
        budget.recount();
        budget
    }

    fn reserve(&mut self, reserved: Option<u64>) {
        self.reserved = reserved
            .unwrap_or_else(|| (self.max / 10).max(1000))
            .min(self.max);
    }

    fn allowed(&self) -> u64 {
        self.max - self.reserved
    }

    fn recount(&mut self) {
        // What cannot be counted is taken as it was.
        if let Ok(now) = mappings::count() {
            self.used = now;
        }
        self.exhausted = false;
    }

    fn has_room(&mut self, needed: u64) -> bool {
        if self.used + needed <= self.allowed() {
            return true;
        }
        if self.exhausted {
            return false;
        }
        self.recount();
        self.exhausted = self.used + needed > self.allowed();
        !self.exhausted
    }
}

/// A request to give one page its own copy.
struct Parting {
    live: Live,
    page: PageId,
    frame: Option<FrameId>,
    request: usize,
}

/// A request to merge one page, on its way through windows.
struct Item {
    job: Job,
    request: usize,
    page: PageId,
    /// The fresh slot that it fills, for a promotion.
    fresh: Option<Slot>,
}

impl LinuxSpace {
    pub(crate) fn new(settings: &EngineSettings) -> Result<Self, Error> {
        let can = capabilities();
        let chosen = barrier::choose(settings.barrier)?;
        let page = sys::page_size();
        let pagemap = Rc::new(
            Pagemap::own().map_err(|e| Error::os("cannot open /proc/self/pagemap", e.into()))?,
        );
        let maps = Rc::new(
            Procmap::own().map_err(|e| Error::os("cannot open /proc/self/maps", e.into()))?,
        );
        let moves = chosen != Barrier::None && can.move_pages;
        // Where pages cannot be moved they are merged under a second userfaultfd's protection, and
        // memory can be registered with one only.
        let tracking = settings.scan.write_tracking
            && can.write_tracking
            && (moves || chosen == Barrier::None);
        let uffd = if tracking || moves {
            let mut features = Features::WP | Features::WP_UNPOPULATED;
            if can.write_tracking {
                features = features | Features::WP_ASYNC;
            }
            if moves {
                features = features | Features::MOVE;
            }
            Some(barrier::open_uffd(chosen, features)?)
        } else {
            None
        };
        let seed = sys::process::random_u64()
            .map_err(|e| Error::os("cannot draw a random seed for digests", e.into()))?;
        let windows = Windows::new(
            page,
            uffd.as_ref().filter(|_| moves),
            Rc::clone(&maps),
            Rc::clone(&pagemap),
        )
        .map_err(|e| Error::os("cannot map the staging area for windows", e))?;
        Ok(Self {
            page,
            barrier: chosen,
            frames: FrameStore::new(page)?,
            pagemap,
            maps,
            uffd,
            tracking,
            wants_tracking: settings.scan.write_tracking,
            moves,
            has_scan: can.pagemap_scan,
            tells_guards: can.guard_pages,
            watches: None,
            windows,
            hasher: PageHasher::new(seed),
            regions: BTreeMap::new(),
            by_id: HashMap::new(),
            remerge: settings.remerge,
            quiet: Duration::from_millis(settings.quiet_millisecs.into()),
            max_pause_micros: settings.max_pause_micros,
            threads: settings.threads as usize,
            budget: Budget::new(settings.reserved_mappings),
            pinned: None,
            network_io: false,
            lost_races: 0,
            surveyed_in_pass: false,
            unshared_at: None,
            headroom: None,
            scanned: vec![PageRegion::EMPTY; MAX_PAGES],
        })
    }

    pub(crate) fn barrier(&self) -> Barrier {
        self.barrier
    }

    pub(crate) fn write_tracking(&self) -> bool {
        self.tracking
    }

    pub(crate) fn why_no_barrier() -> String {
        let reasons = &capabilities().reasons;
        reasons
            .get("barrier")
            .cloned()
            .unwrap_or_else(|| "barrier=\"none\" was asked for".into())
    }

    /// What cannot be changed once the engine is made.
    pub(crate) fn check_settings(&self, new: &EngineSettings) -> Result<(), Error> {
        if new.barrier.is_some_and(|barrier| barrier != self.barrier) {
            return Err(SettingError::Busy {
                name: "barrier",
                why: "it is fixed when the engine is made".into(),
            }
            .into());
        }
        if new.scan.write_tracking != self.wants_tracking {
            return Err(SettingError::Busy {
                name: "write_tracking",
                why: "it is fixed when the engine is made".into(),
            }
            .into());
        }
        Ok(())
    }

    pub(crate) fn change_settings(&mut self, new: &EngineSettings) {
        self.remerge = new.remerge;
        self.quiet = Duration::from_millis(new.quiet_millisecs.into());
        self.max_pause_micros = new.max_pause_micros;
        self.threads = new.threads as usize;
        self.budget.reserve(new.reserved_mappings);
    }

    /// What is looked at once for each full pass.
    pub(crate) fn begin_pass(&mut self) {
        self.settle();
        self.budget.recount();
        self.pinned = None;
        self.surveyed_in_pass = false;
        self.network_io = eligible::network_direct_io();
        for region in self.regions.values_mut() {
            let span = region.live.span();
            for record in eligible::thread_records(span) {
                let first = (record.start - span.start) / self.page;
                for page in first..first + record.pages() {
                    if !region.excluded.iter().any(|(known, _)| *known == page) {
                        region.excluded.push((page, Reason::ThreadStack));
                    }
                }
            }
        }
    }

    /// Gives back what nobody shows any more. Cheap when there is nothing.
    pub(crate) fn settle(&mut self) {
        self.frames.punch_dead();
    }

    /// Pages of `span` that are registered here.
    pub(crate) fn overlap(&self, span: Span) -> usize {
        self.regions
            .values()
            .filter(|region| region.attached)
            .filter_map(|region| region.live.span().intersection(span))
            .map(Span::pages)
            .sum()
    }

    /// Refuses, by name, memory that cannot be merged.
    pub(crate) fn check_mergeable(span: Span) -> Result<Eligible, Error> {
        eligible::check(span)
    }

    pub(crate) fn add_region(
        &mut self,
        got: Registered,
        live: Live,
        found: &Eligible,
    ) -> Result<(), Error> {
        // A lagging region of the same memory, if any, is not this one.
        let mut region = Region {
            id: got.region,
            first: got.first,
            live,
            mapped: Bitmap::new(live.span().pages()),
            excluded: Vec::new(),
            tracked: false,
            attached: true,
            huge: found.huge,
            altered: Vec::new(),
            surveyed: Some(Instant::now()),
        };
        for part in &found.frames {
            let first = (part.start - live.span().start) / self.page;
            for page in first..first + part.pages() {
                region.mapped.set(page, true);
            }
        }
        if self.tracking
            && let Some(uffd) = &self.uffd
        {
            track(&mut region, uffd, self.page).map_err(|stop| match stop {
                RegisterStop::Foreign => Error::NotMergeable {
                    pages: live.span().pages(),
                    refused: live.span().pages(),
                    reason: Reason::ForeignUserfaultfd,
                    advice: mappings::what_to_do(Reason::ForeignUserfaultfd),
                },
                _ => Error::os(
                    format!(
                        "cannot track writes to {} pages (UFFDIO_REGISTER)",
                        region.pages()
                    ),
                    stop.into(),
                ),
            })?;
        }
        self.by_id.insert(got.region, got.first.0);
        self.regions.insert(got.first.0, region);
        Ok(())
    }

    fn region_mut(&mut self, id: RegionId) -> Option<&mut Region> {
        let first = *self.by_id.get(&id)?;
        self.regions.get_mut(&first)
    }

    /// The region was unregistered, but its records linger: nothing of it is mapped or eligible.
    pub(crate) fn detach_region(&mut self, id: RegionId) {
        self.untrack(id);
        if let Some(region) = self.region_mut(id) {
            region.attached = false;
        }
        self.settle();
    }

    /// A lingering region is registered again.
    pub(crate) fn reattach(&mut self, id: RegionId) -> Result<(), Error> {
        let Some(&first) = self.by_id.get(&id) else {
            return Err(Error::NotRegistered);
        };
        let Some(region) = self.regions.get_mut(&first) else {
            return Err(Error::NotRegistered);
        };
        region.attached = true;
        if self.tracking
            && let Some(uffd) = &self.uffd
        {
            // Where it fails, digests decide.
            let _ = track(region, uffd, self.page);
        }
        Ok(())
    }

    fn untrack(&mut self, id: RegionId) {
        let Some(first) = self.by_id.get(&id) else {
            return;
        };
        let Some(region) = self.regions.get_mut(first) else {
            return;
        };
        let (page, pages) = (self.page, region.pages());
        if let Some(watches) = &mut self.watches {
            // Also where no watch is on: pages stay registered after their first.
            end_watches(watches, region, (0, pages), page, self.moves);
        }
        if std::mem::take(&mut region.tracked)
            && let Some(uffd) = &self.uffd
        {
            for_runs(region, false, (0, pages), page, |run| {
                // It fails only where nothing is registered any more.
                let _ = uffd.unregister(run.span());
            });
        }
    }

    /// Drops a region: its memory is no longer ours to touch.
    pub(crate) fn remove_region(&mut self, id: RegionId) {
        self.untrack(id);
        if let Some(first) = self.by_id.remove(&id) {
            self.regions.remove(&first);
        }
        self.frames.drop_region(id);
        self.settle();
    }

    /// The owner is giving the memory up: fresh zero memory takes the place of what was merged.
    pub(crate) fn blank_region(&mut self, id: RegionId) -> Result<(), Error> {
        self.untrack(id);
        let page = self.page;
        let maps = Rc::clone(&self.maps);
        let Some(region) = self.region_mut(id) else {
            return Err(Error::NotRegistered);
        };
        let (all, live) = ((0, region.pages()), region.live);
        let blanked = blank(&maps, region, all, page);
        if let Some(watches) = &self.watches {
            // As in `discard`.
            watches.wake(live);
        }
        blanked
    }

    /// The owner's `MADV_DONTNEED`. Returns the pages that are empty now.
    pub(crate) fn discard(&mut self, addr: usize, len: usize) -> Result<(PageId, u32), Error> {
        let page = self.page;
        let span = Span::new(addr, len).whole_pages();
        if span.is_empty() {
            return Err(Error::TooSmall {
                bytes: len,
                page_size: page,
            });
        }
        let region = self
            .regions
            .values_mut()
            .find(|region| region.attached && region.live.span().covers(span))
            .ok_or(Error::NotInRegion { bytes: len })?;
        let first = (span.start - region.live.span().start) / page;
        let live = region.live.part(first * page, span.len);
        let range = (first, first + span.pages());
        if let Some(watches) = &mut self.watches {
            end_watches(watches, region, range, page, self.moves);
        }
        let blanked = blank(&self.maps, region, range, page);
        if let Some(watches) = &self.watches {
            // Whoever met a protection that could not be taken away waits for what lies there now.
            watches.wake(live);
        }
        blanked?;
        if region.tracked
            && let Some(uffd) = &self.uffd
        {
            // Where it fails, digests decide.
            let _ = uffd.register(span, Modes::WriteProtect);
        }
        live.dont_need().map_err(|e| {
            Error::os(
                format!("cannot discard {} pages (MADV_DONTNEED)", span.pages()),
                e.into(),
            )
        })?;
        let count = u32::try_from(span.pages()).expect("a region's pages fit 32 bits");
        let first = u32::try_from(first).expect("a region's pages fit 32 bits");
        Ok((region.first.plus(first), count))
    }

    pub(crate) fn stats(&mut self) -> SpaceStats {
        self.settle();
        self.budget.recount();
        let bitmaps: usize = self
            .regions
            .values()
            .map(|region| region.mapped.bytes())
            .sum();
        SpaceStats {
            mappings: self.budget.used,
            mapping_budget: self.budget.allowed(),
            frames: self.frames.frames(),
            frames_bytes: self.frames.allocated_bytes(),
            generations: self.frames.generations() as u64,
            windows: self.windows.opened,
            lost_races: self.lost_races,
            metadata_bytes: self.frames.metadata_bytes()
                + bitmaps as u64
                + self.watches.as_ref().map_or(0, Watches::metadata_bytes),
        }
    }

    fn region_of(&self, page: PageId) -> Option<(&Region, usize)> {
        let (first, region) = self.regions.range(..=page.0).next_back()?;
        let at = (page.0 - first) as usize;
        (at < region.pages() && region.attached).then_some((region, at))
    }

    fn live(&self, page: PageId) -> Option<Live> {
        self.region_of(page)
            .map(|(region, at)| region.live.part(at * self.page, self.page))
    }

    fn set_mapped(&mut self, page: PageId, to: bool) {
        if let Some((&first, region)) = self.regions.range_mut(..=page.0).next_back() {
            region.mapped.set((page.0 - first) as usize, to);
        }
    }

    /// The watches, and their thread, are made when the first page needs one.
    fn watches(&mut self) -> Result<&mut Watches, Reason> {
        if self.watches.is_none() {
            let features = Features::WP | Features::WP_UNPOPULATED | Features::WP_HUGETLBFS_SHMEM;
            let uffd = barrier::open_uffd(self.barrier, features).map_err(|_| Reason::Broken)?;
            let made = Watches::new(uffd, Rc::clone(&self.pagemap), self.page);
            self.watches = Some(made.map_err(|_| Reason::NoMemory)?);
        }
        Ok(self.watches.as_mut().expect("just made"))
    }

    // ------------------------------------------------------------------ observe

    /// Asks the kernel about `span` and calls `tell` with (page of the span, pages, categories).
    fn scan(
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
                Err(ScanStop::NotTracked) => return Ok(()),
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
            rest = Span::between(
                got.walk_end.max(rest.start + self.page).min(span.end()),
                span.end(),
            );
        }
        Ok(())
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

    /// What the kernel says of `live`, whose pages were mapped over as `mapped` tells; nothing is
    /// changed. Fills `into`, and collects pages that were written after merging: (page, pages,
    /// write-protected).
    fn look(
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
        Ok(broken)
    }

    /// Refuses pages whose owner has taken a permission away: they cannot be protected, so they would
    /// seem to be written all the time. (Of others that are unwritten that is known.)
    fn refuse_unwritable(&self, live: Live, into: &mut [PageState]) {
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

    /// Why a new mapping must not take the place of `span`, whose first page is `page`: its owner has
    /// changed it since he registered it. What is known may be as old as [`SURVEY_FRESH`]; changes of
    /// protection and locks the kernel sees itself when pages are moved.
    fn altered(&mut self, page: PageId, span: Span) -> Option<Reason> {
        let (_, region) = self.regions.range_mut(..=page.0).next_back()?;
        let now = Instant::now();
        if region
            .surveyed
            .is_none_or(|at| now.duration_since(at) >= SURVEY_FRESH)
        {
            region.altered = eligible::altered(region.live.span());
            region.surveyed = Some(now);
        }
        let found = region.altered.iter().find(|(part, _)| part.overlaps(span));
        found.map(|(_, reason)| *reason)
    }

    /// Where pages leave for anonymous memory, what is known of the owner's changes must be newer than
    /// this pass, or this un-merging.
    fn survey_anew(&mut self) {
        for region in self.regions.values_mut() {
            region.surveyed = None;
        }
    }

    /// Takes the written bits of tracked pages and protects them again, each in one moment, so that
    /// a write is seen now or next time. It must have the last word over [`look`](Self::look).
    fn take_written(&mut self, span: Span, into: &mut [PageState]) -> Result<(), Error> {
        let query = Query {
            must_be_tracked: false,
            ..Query::written_and_protect(Categories::WRITTEN.and(Categories::PRESENT))
        };
        self.scan(span, &query, |first, pages, _| {
            for state in &mut into[first..first + pages] {
                if *state == PageState::Resident(Written::No) {
                    *state = PageState::Resident(Written::Yes);
                }
            }
        })
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
        let has_room = self.budget.has_room(2);
        let watches = match self.watches() {
            Ok(watches) => watches,
            Err(reason) => return refuse(into, reason),
        };
        let mut unwatched: Option<usize> = None;
        let begin = |from: usize, to: usize, watches: &mut Watches| {
            let part = run.part(from * page, (to - from) * page);
            // A run that cannot be watched now is asked again in the next pass.
            u64::from(has_room && watches.begin(part, now).is_ok()) * 2
        };
        let mut added = 0;
        for (at, state) in into.iter_mut().enumerate() {
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
            *state = told;
            match (idle, unwatched) {
                (true, None) => unwatched = Some(at),
                (false, Some(from)) => {
                    added += begin(from, at, watches);
                    unwatched = None;
                }
                _ => {}
            }
        }
        if let Some(from) = unwatched {
            added += begin(from, into.len(), watches);
        }
        if !has_room {
            for state in into
                .iter_mut()
                .filter(|s| **s == PageState::Ineligible(Reason::NotQuiet))
            {
                *state = PageState::Ineligible(Reason::MappingBudget);
            }
        }
        self.budget.used += added;
    }

    // ------------------------------------------------------------------ apply

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

    /// How much memory is left, asked once for a batch, and not more often than it can matter.
    fn look_at_headroom(&mut self) {
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

    /// Gives pages copies of their own, a run at a time: those that were never written move back into
    /// anonymous memory, the others (and all, where nothing holds writers off) are populated in place
    /// (finding F3).
    fn unshare(&mut self, requests: &[Request], outcomes: &mut [Attempt<()>]) {
        let mut pages: Vec<Parting> = Vec::new();
        for (at, request) in requests.iter().enumerate() {
            if let Request::Unshare { page, frame } = *request {
                match self.live(page) {
                    Some(live) => pages.push(Parting {
                        live,
                        page,
                        frame,
                        request: at,
                    }),
                    None => outcomes[at] = Attempt::Gone,
                }
            }
        }
        if pages.is_empty() {
            return;
        }
        self.headroom = None;
        self.look_at_headroom();
        if self
            .unshared_at
            .is_none_or(|at| at.elapsed() > SURVEY_FRESH / 10)
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
                    two[0].live.span().end() != two[1].live.span().start
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
            || !self.budget.has_room(4)
            || self.watches().is_err()
        {
            return;
        }
        let (Some(views), Some(watches)) = (views, &mut self.watches) else {
            return;
        };
        Restore {
            page: self.page,
            pagemap: &self.pagemap,
            maps: &self.maps,
            lock: &self.windows.lock,
            watches,
            scanned: &mut self.scanned,
        }
        .unbroken(live, &views, huge, done);
        self.book_restored(live, run[0].page, done);
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
    fn restore_found_quiet(&mut self, run: Live, first: PageId, into: &mut [PageState]) {
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
                    self.survey_anew();
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

    /// Moves pages that were merged, written, and quiet since, back into anonymous memory.
    fn restore_quiet(&mut self, run: Live, first: PageId) -> Vec<bool> {
        let mut done = vec![false; run.span().pages()];
        self.look_at_headroom();
        let left = self.headroom.map_or(u64::MAX, |(bytes, _)| bytes);
        let huge = self.region_of(first).and_then(|(region, _)| region.huge);
        let Some(watches) = &mut self.watches else {
            return done;
        };
        if left < 4 * HEADROOM_BYTES + run.span().len as u64 {
            watches.end(run);
            return done;
        }
        Restore {
            page: self.page,
            pagemap: &self.pagemap,
            maps: &self.maps,
            lock: &self.windows.lock,
            watches,
            scanned: &mut self.scanned,
        }
        .quiet(run, huge, &mut done);
        self.book_restored(run, first, &done);
        done
    }

    /// Writes the frames-to-be of all promotions: neighbours get neighbouring slots.
    fn prepare_promotions(
        &mut self,
        requests: &[Request],
        outcomes: &mut [Attempt<()>],
    ) -> Result<Vec<Item>, Error> {
        let mut wanted: Vec<(PageId, usize)> = requests
            .iter()
            .enumerate()
            .filter_map(|(at, request)| match request {
                Request::Promote { page, .. } => Some((*page, at)),
                _ => None,
            })
            .collect();
        let mut items = Vec::with_capacity(wanted.len());
        if wanted.is_empty() {
            return Ok(items);
        }
        self.frames.begin_batch()?;
        wanted.sort_unstable();
        let mut rest = wanted.as_slice();
        while let Some(&(first, at)) = rest.first() {
            let Some((region, index)) = self.region_of(first) else {
                outcomes[at] = Attempt::Gone;
                rest = &rest[1..];
                continue;
            };
            let room = region.pages() - index;
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
                        let job = Job {
                            live,
                            target,
                            verdict: Verdict::Untried,
                        };
                        items.push(Item {
                            job,
                            request: at,
                            page,
                            fresh: Some(slot),
                        });
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

    fn prepare_joins(&mut self, requests: &[Request], outcomes: &mut [Attempt<()>]) -> Vec<Item> {
        let mut items = Vec::new();
        for (at, request) in requests.iter().enumerate() {
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
                    let job = Job {
                        live,
                        target,
                        verdict: Verdict::Untried,
                    };
                    items.push(Item {
                        job,
                        request: at,
                        page,
                        fresh: None,
                    });
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

    fn is_tracked(&self, page: PageId) -> bool {
        self.region_of(page)
            .is_some_and(|(region, _)| region.tracked)
    }

    /// Takes `items` through windows: what can be moved, then what stays in place.
    fn merge(&mut self, items: Vec<Item>, outcomes: &mut [Attempt<()>]) {
        let mut items = items;
        items.retain(|item| match self.altered(item.page, item.job.live.span()) {
            None => true,
            Some(reason) => {
                self.finish(item, Some(reason), outcomes);
                false
            }
        });
        let (mut moved, mut in_place): (Vec<Item>, Vec<Item>) = items
            .into_iter()
            .partition(|item| self.moves && !self.is_mapped(item.page));
        moved.sort_by_key(|item| item.job.live.span().start);
        in_place.sort_by_key(|item| item.job.live.span().start);
        if self.network_io && !(moved.is_empty() && in_place.is_empty()) {
            for item in moved.drain(..).chain(in_place.drain(..)) {
                self.finish(&item, Some(Reason::NetworkDirectIo), outcomes);
            }
            return;
        }
        let moved = if self.tracking {
            self.drop_written(moved, outcomes)
        } else {
            moved
        };
        let busy = self.pass_through(moved, true, outcomes);
        let mut again = Vec::new();
        for item in busy {
            match self.cure_busy(&item) {
                Ok(()) => again.push(item),
                Err(reason) => self.finish(&item, Some(reason), outcomes),
            }
        }
        // Curing has set their written bits, so that question is not asked again.
        for item in self.pass_through(again, true, outcomes) {
            self.finish(&item, Some(Reason::Pinned), outcomes);
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
        if self.barrier == Barrier::None || items.is_empty() {
            return items;
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
            self.finish(&item, Some(reason), outcomes);
        }
        ready
    }

    /// Windows over `items`, sorted by address. Returns what was busy.
    fn pass_through(
        &mut self,
        mut items: Vec<Item>,
        moved: bool,
        outcomes: &mut [Attempt<()>],
    ) -> Vec<Item> {
        let mut busy = Vec::new();
        let mut jobs: Vec<Job> = items.iter().map(|item| item.job.clone()).collect();
        let mut done = 0;
        while done < jobs.len() {
            let fit = self.windows.fit(&jobs[done..], self.max_pause_micros);
            let (these, now) = (&mut jobs[done..done + fit], &items[done..done + fit]);
            done += fit;
            let needed = self.windows.mappings_needed(these);
            let refused = if !self.budget.has_room(needed) {
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
                for item in now {
                    self.finish(item, Some(reason), outcomes);
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
            let verdicts: Vec<Verdict> = these.iter().map(|job| job.verdict).collect();
            for (at, verdict) in verdicts.into_iter().enumerate() {
                let item = &mut items[done - fit + at];
                item.job.verdict = verdict;
                if verdict != Verdict::Busy {
                    let item = Item {
                        job: item.job.clone(),
                        ..*item
                    };
                    self.finish(&item, None, outcomes);
                }
            }
        }
        for item in items {
            if item.job.verdict == Verdict::Busy {
                busy.push(item);
            }
        }
        busy
    }

    /// Looks once more at the written bit of what is to be moved: I/O that holds a page by a plain
    /// reference, which no move would notice, has set it when it began (finding F6).
    fn drop_written(&mut self, items: Vec<Item>, outcomes: &mut [Attempt<()>]) -> Vec<Item> {
        let mut written: Vec<usize> = Vec::new();
        let mut at = 0;
        while at < items.len() {
            let mut end = at + 1;
            while end < items.len()
                && items[end - 1].job.live.span().end() == items[end].job.live.span().start
            {
                end += 1;
            }
            let span = items[at].job.live.joined(items[end - 1].job.live).span();
            let query = Query {
                all_of: Categories::WRITTEN.and(Categories::WP_ALLOWED),
                any_of: Categories::NONE,
                ..Query::look(Categories::WRITTEN)
            };
            // A look that fails finds nothing, and the window's own comparison still decides.
            let _ = self.scan(span, &query, |first, pages, _| {
                written.extend(at + first..at + first + pages);
            });
            at = end;
        }
        let mut written = written.into_iter().peekable();
        let mut kept = Vec::with_capacity(items.len());
        for (at, mut item) in items.into_iter().enumerate() {
            if written.next_if_eq(&at).is_some() {
                item.job.verdict = Verdict::Differs;
                self.finish(&item, None, outcomes);
            } else {
                kept.push(item);
            }
        }
        kept
    }

    /// Books how one request ended.
    fn finish(&mut self, item: &Item, refused: Option<Reason>, outcomes: &mut [Attempt<()>]) {
        let span = item.job.live.span();
        let outcome = match (refused, item.job.verdict) {
            (Some(reason), _) => Attempt::Refused(reason),
            (None, Verdict::Merged) => Attempt::Done(()),
            (None, Verdict::Differs) => {
                self.lost_races += 1;
                Attempt::Changed
            }
            (None, Verdict::Absent) => Attempt::Gone,
            (None, Verdict::NoMemory) => Attempt::Refused(Reason::NoMemory),
            (None, Verdict::Sealed) => Attempt::Refused(Reason::Sealed),
            (None, Verdict::Foreign) => Attempt::Refused(Reason::ForeignUserfaultfd),
            (None, Verdict::NotQuiet) => Attempt::Refused(Reason::NotQuiet),
            (None, Verdict::WrongMapping) => Attempt::Refused(eligible::reason_at(span)),
            (None, Verdict::Busy) => Attempt::Refused(Reason::Pinned),
            (None, Verdict::Untried) => Attempt::Refused(Reason::Other),
        };
        outcomes[item.request] = outcome;
        if refused.is_none()
            && let Some(watches) = &mut self.watches
        {
            // Merged or let go by its window: its watch is over either way.
            watches.forget(span);
        }
        if outcome != Attempt::Done(()) {
            if let Some(slot) = item.fresh {
                self.frames.abandon(slot, 1);
            }
            return;
        }
        let was_mapped = self.is_mapped(item.page);
        match item.job.target {
            Target::Frame { .. } => self.set_mapped(item.page, true),
            Target::Zero => {
                self.set_mapped(item.page, false);
                if (was_mapped || !self.moves) && self.is_tracked(item.page) {
                    // It lies in a fresh mapping now. Where it cannot be tracked, digests decide.
                    if let Some(uffd) = &self.uffd {
                        let _ = uffd.register(span, Modes::WriteProtect);
                    }
                }
            }
        }
    }
}

/// Calls `act` for each run of pages in `from..to` over which a frame was mapped, or was not.
fn for_runs(
    region: &Region,
    mapped: bool,
    (from, to): (usize, usize),
    page: usize,
    mut act: impl FnMut(Live),
) {
    let mut at = region.mapped.next(mapped, from, to);
    while at < to {
        let end = region.mapped.next(!mapped, at, to);
        act(region.live.part(at * page, (end - at) * page));
        at = region.mapped.next(mapped, end, to);
    }
}

/// Ends all watches in `range`, a run at a time: the kernel takes nothing away from a range in which
/// another userfaultfd has a page, and ours for tracking has those over which no frame was mapped.
fn end_watches(
    watches: &mut Watches,
    region: &Region,
    range: (usize, usize),
    page: usize,
    moves: bool,
) {
    for_runs(region, true, range, page, |run| watches.end(run));
    if !moves {
        for_runs(region, false, range, page, |run| watches.end(run));
    }
}

/// Tracks writes to every page over which no frame was mapped (invariant L2).
fn track(region: &mut Region, uffd: &Userfaultfd, page: usize) -> Result<(), RegisterStop> {
    let pages = region.pages();
    let mut at = 0;
    while at < pages {
        let end = region.mapped.next(true, at, pages);
        if end > at {
            let span = region.live.part(at * page, (end - at) * page).span();
            if let Err(stop) = uffd.register(span, Modes::WriteProtect) {
                // What is registered already goes, with what is not.
                let _ = uffd.unregister(region.live.span());
                return Err(stop);
            }
        }
        at = region.mapped.next(false, end, pages);
    }
    region.tracked = true;
    Ok(())
}

/// Maps fresh memory over whatever of pages `from..to` frames were mapped over.
fn blank(
    maps: &Procmap,
    region: &mut Region,
    (from, to): (usize, usize),
    page: usize,
) -> Result<(), Error> {
    let mut at = region.mapped.next(true, from, to);
    while at < to {
        let end = region.mapped.next(false, at, to);
        let live = region.live.part(at * page, (end - at) * page);
        mapped_over(maps, live, || live.map_fresh()).map_err(|e| {
            Error::os(
                format!("cannot map fresh memory over {} merged pages", end - at),
                e.into(),
            )
        })?;
        if let Some(huge) = region.huge {
            // A hint: without it only the speed of later use may differ.
            let _ = live.advise_huge(huge);
        }
        for page in at..end {
            region.mapped.set(page, false);
        }
        at = region.mapped.next(true, end, to);
    }
    Ok(())
}

impl PageSpace for LinuxSpace {
    type Error = Error;

    fn page_size(&self) -> usize {
        self.page
    }

    fn observe(&mut self, window: Window, look: Look, into: &mut [PageState]) -> Result<(), Error> {
        into.fill(PageState::Absent);
        let Some(region) = self.region_mut(window.region) else {
            return Ok(());
        };
        if !region.attached {
            return Ok(());
        }
        let from = (window.first.0 - region.first.0) as usize;
        let to = from + window.pages as usize;
        let (live, tracked) = (region.live, region.tracked);
        let excluded = region.excluded.clone();
        let mapped: Vec<bool> = (from..to).map(|at| region.mapped.get(at)).collect();
        let live = live.part(from * self.page, (to - from) * self.page);
        let arm = tracked && look == Look::Scan;
        let broken = self.look(live, arm, &|at| mapped[at], into)?;
        if arm {
            self.take_written(live.span(), into)?;
        }
        if look == Look::Scan {
            self.refuse_unwritable(live, into);
        }
        for (page, reason) in excluded {
            if (from..to).contains(&page) && matches!(into[page - from], PageState::Resident(_)) {
                into[page - from] = PageState::Ineligible(reason);
            }
        }
        if look == Look::Scan {
            for (at, pages, protected) in broken {
                self.judge_broken(live, (at, at + pages), protected, window.first, into);
            }
            if !self.moves {
                self.judge_unmovable(live, &mapped, into);
            }
        }
        Ok(())
    }

    fn nids(&mut self, window: Window, into: &mut [Nid]) -> Result<(), Error> {
        into.fill(Nid(0));
        if let Some(region) = self.region_mut(window.region) {
            let from = (window.first.0 - region.first.0) as usize;
            let live = region.live;
            for (at, nid) in into.iter_mut().enumerate() {
                *nid = Nid(live
                    .part((from + at) * self.page, self.page)
                    .numa_node()
                    .unwrap_or(0));
            }
        }
        Ok(())
    }

    fn digest(&mut self, pages: &[PageId], into: &mut [Attempt<Digest>]) -> Result<(), Error> {
        // (place in `into`, page), for what may be read.
        let mut readable: Vec<(usize, Live)> = Vec::with_capacity(pages.len());
        let maps = Rc::clone(&self.maps);
        let mut known = Readable::new(&maps);
        for (at, &page) in pages.iter().enumerate() {
            match self.live(page) {
                Some(live) => match known.refusal(live.span()) {
                    None => readable.push((at, live)),
                    Some(reason) => into[at] = Attempt::Refused(reason),
                },
                None => into[at] = Attempt::Gone,
            }
        }
        let hasher = &self.hasher;
        let threads = self
            .threads
            .min(readable.len() / (THREADS_FROM_PAGES / 2))
            .max(1);
        if threads == 1 {
            for (n, &(at, live)) in readable.iter().enumerate() {
                let next = readable.get(n + 1).map(|(_, live)| *live);
                into[at] = Attempt::Done(live.digest(hasher, next));
            }
            return Ok(());
        }
        let share = readable.len().div_ceil(threads);
        let hash = |part: &[(usize, Live)]| -> Vec<(usize, Digest)> {
            part.iter()
                .map(|(at, live)| (*at, live.digest(hasher, None)))
                .collect()
        };
        let hash = &hash;
        let done: Vec<Vec<(usize, Digest)>> = std::thread::scope(|scope| {
            let workers: Vec<_> = readable
                .chunks(share)
                .map(|part| {
                    let named = std::thread::Builder::new().name("pagemerge-hash".into());
                    (part, named.spawn_scoped(scope, move || hash(part)))
                })
                .collect();
            workers
                .into_iter()
                .map(|(part, worker)| match worker {
                    Ok(worker) => worker.join().expect("hashing does not panic"),
                    // Where no thread can be started, this one does the work.
                    Err(_) => hash(part),
                })
                .collect()
        });
        for (at, digest) in done.into_iter().flatten() {
            into[at] = Attempt::Done(digest);
        }
        Ok(())
    }

    fn digest_frames(
        &mut self,
        frames: &[FrameId],
        into: &mut [Attempt<Digest>],
    ) -> Result<(), Error> {
        for (&frame, into) in frames.iter().zip(into) {
            let view = self.frames.slot(frame).map(|slot| self.frames.view(slot));
            *into = match view {
                Some(Ok((view, at))) => Attempt::Done(sys::live::digest((&view, at), &self.hasher)),
                Some(Err(reason)) => Attempt::Refused(reason),
                None => Attempt::Gone,
            };
        }
        Ok(())
    }

    fn compare(&mut self, a: Content, b: Content) -> Result<Attempt<Ordering>, Error> {
        let maps = Rc::clone(&self.maps);
        let mut known = Readable::new(&maps);
        let order = match (a, b) {
            (Content::Page(a), Content::Page(b)) => match (self.live(a), self.live(b)) {
                (Some(a), Some(b)) if known.covers(a.span()) && known.covers(b.span()) => {
                    Some(a.compare(b))
                }
                _ => None,
            },
            (Content::Page(page), Content::Frame(frame)) => {
                self.compare_with_frame(page, frame, &mut known)
            }
            (Content::Frame(frame), Content::Page(page)) => self
                .compare_with_frame(page, frame, &mut known)
                .map(Ordering::reverse),
            (Content::Frame(a), Content::Frame(b)) => {
                match (self.frames.slot(a), self.frames.slot(b)) {
                    (Some(a), Some(b)) => match (self.frames.view(a), self.frames.view(b)) {
                        (Ok((a, x)), Ok((b, y))) => {
                            Some(sys::live::order((&a, x), (&b, y), self.page))
                        }
                        _ => None,
                    },
                    _ => None,
                }
            }
        };
        Ok(order.map_or(Attempt::Gone, Attempt::Done))
    }

    fn apply(&mut self, requests: &[Request], outcomes: &mut [Attempt<()>]) -> Result<(), Error> {
        self.unshare(requests, outcomes);
        self.look_at_headroom();
        let promotions = self.prepare_promotions(requests, outcomes)?;
        let slots: Vec<(usize, Slot)> = promotions
            .iter()
            .filter_map(|item| item.fresh.map(|slot| (item.request, slot)))
            .collect();
        self.merge(promotions, outcomes);
        for (at, slot) in slots {
            if let (Request::Promote { frame, .. }, Attempt::Done(())) =
                (requests[at], outcomes[at])
            {
                self.frames.bind(frame, slot);
            }
        }
        let joins = self.prepare_joins(requests, outcomes);
        self.merge(joins, outcomes);
        Ok(())
    }

    fn release(&mut self, frame: FrameId) -> Result<(), Error> {
        self.frames.release(frame);
        Ok(())
    }
}

impl LinuxSpace {
    fn compare_with_frame(
        &mut self,
        page: PageId,
        frame: FrameId,
        known: &mut Readable<'_>,
    ) -> Option<Ordering> {
        let live = self.live(page).filter(|live| known.covers(live.span()))?;
        let (view, at) = self.frames.view(self.frames.slot(frame)?).ok()?;
        Some(live.compare_with(&view, at))
    }

    /// Judges those of the broken pages `from..to` of a window that nothing else speaks against.
    fn judge_broken(
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
    fn judge_unmovable(&mut self, run: Live, mapped: &[bool], into: &mut [PageState]) {
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
