//! `LinuxSpace`: the algorithm's door to live memory.
//!
//! It observes pages (one or two system calls for a window of them), hashes and compares them, and
//! carries out requests: frames are prepared first, then [`crate::window`] opens as many short
//! windows as it takes.
//!
//! # The rooms
//! Regions, and the trait, are here; [`observe`] tells what pages are, [`merge`] and [`unshare`] carry
//! requests out, [`aside`] knows what is left alone, [`huge`] what is worth splitting, [`budget`] counts
//! mappings.
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
//! * L5. Pages that the caller has set aside, or whose owner is known to have locked them or the like, are
//!   neither hashed nor copied nor tracked ([`aside`]).
//!
//! # Cost
//! One bit of metadata for each page, in leaves that are made when a page in them is merged; 2 ns to
//! observe a page, 2 ns more to arm it. Empty address space is leapt over ([`PageSpace::next_present`]).

mod aside;
mod budget;
mod huge;
mod merge;
mod observe;
mod quick;
mod unshare;

use crate::barrier;
use crate::bitmap::Bitmap;
use crate::eligible::{self, Eligible, Readable};
use crate::error::Error;
use crate::frames::{FrameStore, Slot};
use crate::hash::{HashKey, PageHasher};
use crate::mappings;
use crate::probe::capabilities;
use crate::settings::{Barrier, EngineSettings, Remerge};
use crate::survey::Survey;
use crate::sys::live::Live;
use crate::sys::mapping::is_mapped;
use crate::sys::pagemap::{Categories, PageRegion, Pagemap};
use crate::sys::phase::{Phase, enter};
use crate::sys::procmap::Procmap;
use crate::sys::thread::spawn_scoped;
use crate::sys::uffd::{Features, Modes, RegisterStop, Userfaultfd};
use crate::sys::{self, Span};
use crate::watch::Watches;
use crate::window::{MAX_PAGES, Windows, mapped_over};
use aside::Ranges;
use budget::Budget;
use huge::Huge;
use pagemerge_core::{
    Attempt, Content, Digest, FrameId, Look, Nid, PageId, PageSpace, PageState, Reason, RegionId,
    Registered, Request, SettingError, TreeOrder, Window,
};
use quick::Quick;
use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Pages of `digest` below which no extra threads are worth their start.
const THREADS_FROM_PAGES: usize = 256;
/// Memory that must be free, besides what a batch needs, for it to begin without paying first.
const HEADROOM_BYTES: u64 = 16 << 20;
/// For how long a series of batches of un-merging needs one look at the list of mappings.
const UNSHARING_SERIES: Duration = Duration::from_millis(100);
/// With so much left, asking again can wait for [`HEADROOM_FRESH`]: nobody uses it up meanwhile.
const HEADROOM_PLENTY: u64 = 1 << 30;
const HEADROOM_FRESH: Duration = Duration::from_millis(50);

const STATE: Categories = Categories::PRESENT
    .and(Categories::SWAPPED)
    .and(Categories::FILE)
    .and(Categories::HUGE)
    .and(Categories::ZERO_PAGE)
    .and(Categories::WRITTEN)
    .and(Categories::WP_ALLOWED);

/// Live memory's own counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpaceStats {
    /// Mappings that this process has; where it has many, as counted up to some seconds ago.
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
    /// What pages were at the last look in full, and which were written since (see [`quick`]).
    own: Bitmap,
    zero: Bitmap,
    written: Bitmap,
    /// Which huge pages were whole at the last look, by their numbers (see [`huge`]).
    whole: Bitmap,
    /// Pages that hold, or held, a thread's own data: (page of the region, why). They stay so:
    /// thread stacks are used again, and a page that came back would have lost its written bit.
    records: Vec<(usize, Reason)>,
    /// Set aside by the caller.
    aside: Ranges,
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
    /// Nothing of it is merged by a list of mappings that was read before this.
    since: Instant,
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
    /// For [`Self::watches`], while there are none: opened when the engine is made, because a program
    /// may give up its right to do so (servers do) before the first page is written.
    spare: Option<Userfaultfd>,
    windows: Windows,
    frames: FrameStore,
    key: Arc<HashKey>,
    regions: BTreeMap<u32, Region>,
    by_id: HashMap<RegionId, u32>,
    remerge: Remerge,
    quiet: Duration,
    max_pause_micros: u32,
    threads: usize,
    budget: Budget,
    /// Whether pages of this process are pinned for long, once that was asked in this pass.
    pinned: Option<bool>,
    /// Why nothing may be merged in this pass, if so: as of its beginning.
    forbidden: Option<Reason>,
    lost_races: u64,
    /// Only zero from not zero is told by digests.
    zero_only: bool,
    /// Memory of dropped regions that the kernel did not take out of write tracking.
    still_tracked: Vec<Span>,
    /// Quiet pages have had the owner's changes looked at in this pass.
    surveyed_in_pass: bool,
    /// The list of mappings, and when the last thing happened that an older one does not do for.
    survey: Survey,
    survey_since: Instant,
    /// When pages were last un-merged: a series of batches needs one look at the mappings.
    unshared_at: Option<Instant>,
    /// Bytes left before a limit, and when that was asked; `None` where it cannot be asked.
    headroom: Option<(u64, Instant)>,
    scanned: Vec<PageRegion>,
    quick: Quick,
    /// The mapping that was found readable last, while a batch is decided on: until the next look or
    /// window.
    readable: Span,
    huge: Huge,
    /// Room for what the kernel tells.
    told_written: Vec<(usize, usize)>,
    told_huge: Vec<(usize, usize)>,
    /// Zero pages of a look that were written before they were protected, perhaps after they were looked at.
    unsure_zeroes: Vec<usize>,
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
            // Where it cannot be had it is asked for again when it is needed, and then said.
            spare: if chosen == Barrier::None {
                None
            } else {
                watching_uffd(chosen).ok()
            },
            windows,
            key: Arc::new(HashKey::draw()?),
            regions: BTreeMap::new(),
            by_id: HashMap::new(),
            remerge: settings.remerge,
            quiet: Duration::from_millis(settings.quiet_millisecs.into()),
            max_pause_micros: settings.max_pause_micros,
            threads: settings.threads as usize,
            budget: Budget::new(settings.reserved_mappings),
            pinned: None,
            forbidden: None,
            lost_races: 0,
            zero_only: settings.scan.zero_only,
            still_tracked: Vec::new(),
            surveyed_in_pass: false,
            survey: Survey::default(),
            survey_since: Instant::now(),
            unshared_at: None,
            headroom: None,
            scanned: vec![PageRegion::EMPTY; MAX_PAGES],
            quick: Quick::new(moves && tracking && can.pagemap_scan && by_digest(settings)),
            readable: Span::default(),
            huge: {
                let mut huge = Huge::new(page, can.pagemap_scan);
                huge.set(settings.thp_min_duplicates, settings.scan.smart_scan);
                huge
            },
            told_written: Vec::new(),
            told_huge: Vec::new(),
            unsure_zeroes: Vec::new(),
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
        self.quick.on = self.moves && self.tracking && self.has_scan && by_digest(new);
        self.zero_only = new.scan.zero_only;
        self.remerge = new.remerge;
        self.quiet = Duration::from_millis(new.quiet_millisecs.into());
        self.max_pause_micros = new.max_pause_micros;
        self.threads = new.threads as usize;
        self.budget.reserve(new.reserved_mappings);
        self.huge.set(new.thp_min_duplicates, new.scan.smart_scan);
    }

    /// What is looked at once for each full pass.
    ///
    /// `swept`: the last sweep over merged pages has come to its end.
    pub(crate) fn begin_pass(&mut self, swept: bool) {
        let _phase = enter(Phase::BeginPass);
        self.settle();
        self.untrack_again();
        // What is still left is told to whoever discards or unregisters.
        let _ = self.close_again(Span::default());
        self.budget.doubt();
        let pages = self.regions.values().map(Region::pages).sum();
        self.quick.begin_pass(pages, swept);
        self.huge.begin_pass();
        self.pinned = None;
        self.surveyed_in_pass = false;
        // What cannot be looked at may be there: a process that changes its root directory loses sight
        // of /proc.
        self.forbidden = match eligible::network_direct_io() {
            Ok(false) => None,
            Ok(true) => Some(Reason::NetworkDirectIo),
            Err(_) => Some(Reason::ProcUnreadable),
        };
        self.survey.drop_old();
        let records = eligible::thread_records().unwrap_or_else(|_| {
            self.forbidden = Some(Reason::ProcUnreadable);
            Vec::new()
        });
        self.look_at_what_was_left_alone();
        for region in self.regions.values_mut() {
            let span = region.live.span();
            for record in records.iter().filter_map(|at| at.intersection(span)) {
                let first = (record.start - span.start) / self.page;
                for page in first..first + record.pages() {
                    if !region.records.iter().any(|(known, _)| *known == page) {
                        region.records.push((page, Reason::ThreadStack));
                    }
                }
            }
        }
    }

    /// A step of the scan begins: what was known of mappings may have changed since the last one.
    pub(crate) fn begin_step(&mut self) {
        self.readable = Span::default();
    }

    /// The secret of this engine's digests.
    pub(crate) fn key(&self) -> Arc<HashKey> {
        Arc::clone(&self.key)
    }

    /// Gives back what nobody shows any more. Cheap when there is nothing.
    pub(crate) fn settle(&mut self) {
        let _phase = enter(Phase::Settle);
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
    pub(crate) fn check_mergeable(&mut self, span: Span) -> Result<Eligible, Error> {
        let now = Instant::now();
        let unread = |e| Error::os("cannot read the list of mappings (/proc/self/smaps)", e);
        let (list, read) = self
            .survey
            .for_registering(span, &self.maps)
            .map_err(unread)?;
        match eligible::check(span, &list) {
            // An old list may still show what is over: our own registration of this very memory.
            Err(_) if read < now => {
                let (list, read) = self.survey.newer_than(now).map_err(unread)?;
                let found = eligible::check(span, &list)?;
                Ok(Eligible {
                    read: Some(read),
                    ..found
                })
            }
            found => Ok(Eligible {
                read: (read >= now).then_some(read),
                ..found?
            }),
        }
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
            own: Bitmap::new(live.span().pages()),
            zero: Bitmap::new(live.span().pages()),
            written: Bitmap::new(live.span().pages()),
            whole: Bitmap::new(Region::blocks(
                live.span().start / self.page,
                live.span().pages(),
                self.huge.pages,
            )),
            records: Vec::new(),
            aside: Ranges::default(),
            tracked: false,
            attached: true,
            huge: found.huge,
            altered: found.left_alone.clone(),
            surveyed: found.read,
            // By an old list its pages are looked up once more.
            since: found.read.unwrap_or_else(Instant::now),
        };
        // What was counted outside of all regions lies inside now.
        self.budget.forget_outside();
        for part in &found.frames {
            let first = (part.start - live.span().start) / self.page;
            for page in first..first + part.pages() {
                region.mapped.set(page, true);
                // Or a copy: nobody knows yet.
                region.own.set(page, true);
            }
        }
        if self.tracking
            && let Some(uffd) = &self.uffd
        {
            track(&mut region, uffd, self.page, &mut self.still_tracked).map_err(
                |stop| match stop {
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
                },
            )?;
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
            region.aside = Ranges::default();
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
        region.forget_state(0, region.pages());
        if self.tracking
            && let Some(uffd) = &self.uffd
        {
            // Where it fails, digests decide.
            let _ = track(region, uffd, self.page, &mut self.still_tracked);
        }
        Ok(())
    }

    /// Takes runs out of MISSING that a window could not take out. Says whether none of `span` is left.
    ///
    /// # Errors
    /// When the kernel still does not do it: a page of `span` that became absent would make whoever
    /// touches it wait for ever.
    pub(crate) fn close_again(&mut self, span: Span) -> Result<(), Error> {
        let Some(uffd) = self
            .uffd
            .as_ref()
            .filter(|uffd| !self.windows.unclosed.is_empty() && !uffd.is_ended())
        else {
            return Ok(());
        };
        let (page, mut left) = (self.page, Ok(()));
        // Each stays in the list until it is done, whatever happens meanwhile.
        let mut at = 0;
        while let Some(&run) = self.windows.unclosed.get(at) {
            let region = self
                .regions
                .values()
                .find(|region| region.live.span().covers(run));
            // A region that has gone took its runs with it.
            let Some(region) = region else {
                self.windows.unclosed.swap_remove(at);
                continue;
            };
            let first = (run.start - region.live.span().start) / page;
            let mut stop = None;
            // Frames are never registered (invariant L2).
            for_runs(region, false, (first, first + run.pages()), page, |part| {
                match uffd.unregister(part.span()) {
                    Ok(()) if region.tracked => {
                        // Where it fails, digests decide.
                        let _ = uffd.register(part.span(), Modes::WriteProtect);
                    }
                    Ok(()) => {}
                    // Nothing is registered where nothing is mapped.
                    Err(_) if !is_mapped(part.span()) => {}
                    // It will never be done otherwise.
                    Err(stop) if stop.errno().is_forbidden() && uffd.end(&self.pagemap).is_ok() => {
                    }
                    Err(error) => stop = Some(error),
                }
            });
            // What lies there has lost its protection with it.
            self.quick.forget();
            let Some(stop) = stop else {
                self.windows.unclosed.swap_remove(at);
                continue;
            };
            tracing::warn!(%stop, %run, "a window's pages cannot be taken out of userfaultfd");
            if run.overlaps(span) && left.is_ok() {
                left = Err(Error::os(
                    format!(
                        "cannot let {} pages of a window go (UFFDIO_UNREGISTER)",
                        run.pages()
                    ),
                    stop.into(),
                ));
            }
            at += 1;
        }
        self.windows.reserve_unclosed();
        left
    }

    fn untrack(&mut self, id: RegionId) {
        let Some(first) = self.by_id.get(&id) else {
            return;
        };
        let Some(region) = self.regions.get_mut(first) else {
            return;
        };
        let (page, pages) = (self.page, region.pages());
        self.huge.forget(region.live.span());
        if let Some(watches) = &mut self.watches {
            // Also where no watch is on: pages stay registered after their first.
            end_watches(watches, region, (0, pages), page, self.moves);
        }
        if std::mem::take(&mut region.tracked)
            && let Some(uffd) = &self.uffd
        {
            for_runs(region, false, (0, pages), page, |run| {
                if uffd.unregister(run.span()).is_err() {
                    self.still_tracked.push(run.span());
                }
            });
        }
    }

    /// Lets go of what could not be let go of when its region was dropped: it would be refused as another
    /// userfaultfd's when it is registered again. Where it fails because nothing is registered there any
    /// more, there is nothing left to do.
    pub(crate) fn untrack_again(&mut self) {
        self.open_again();
        if let Some(watches) = &mut self.watches {
            watches.end_again();
        }
        if let Some(uffd) = &self.uffd {
            self.still_tracked
                .retain(|span| uffd.unregister(*span).is_err() && is_mapped(*span));
        }
    }

    /// A window had to end the userfaultfd, because nothing else would have let its waiters go on: begins
    /// anew with another one, if that can be had by now.
    fn open_again(&mut self) {
        if !self.uffd.as_ref().is_some_and(Userfaultfd::is_ended) {
            return;
        }
        // Nothing is protected any more.
        self.quick.forget();
        let can = capabilities();
        let mut features = Features::WP | Features::WP_UNPOPULATED;
        if can.write_tracking {
            features = features | Features::WP_ASYNC;
        }
        if self.moves {
            features = features | Features::MOVE;
        }
        let Ok(uffd) = barrier::open_uffd(self.barrier, features) else {
            return;
        };
        self.windows.begin_anew();
        self.quick.forget();
        self.still_tracked.clear();
        for region in self.regions.values_mut() {
            if std::mem::take(&mut region.tracked) {
                // Where it fails, digests decide.
                let _ = track(region, &uffd, self.page, &mut self.still_tracked);
            }
        }
        self.uffd = Some(uffd);
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
    ///
    /// Pages that he has locked are refused, as the kernel does, and before anything is given up.
    pub(crate) fn discard(&mut self, addr: usize, len: usize) -> Result<(PageId, u32), Error> {
        let page = self.page;
        let span = Span::new(addr, len).whole_pages();
        if span.is_empty() {
            return Err(Error::TooSmall {
                bytes: len,
                page_size: page,
            });
        }
        self.close_again(span)?;
        let live = self
            .regions
            .values()
            .find(|region| region.attached && region.live.span().covers(span))
            .map(|region| {
                let at = span.start - region.live.span().start;
                region.live.part(at, span.len)
            })
            .ok_or(Error::NotInRegion { bytes: len })?;
        if live.may_refuse_dont_need() {
            self.refuse_locked(span)?;
        }
        let region = self
            .regions
            .values_mut()
            .find(|region| region.attached && region.live.span().covers(span))
            .ok_or(Error::NotInRegion { bytes: len })?;
        let first = (span.start - region.live.span().start) / page;
        let range = (first, first + span.pages());
        region.forget_state(range.0, range.1);
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
            let attempted = format!(
                "cannot discard {} pages (MADV_DONTNEED); some of them may read as zero already, the \
                 others keep their bytes",
                span.pages()
            );
            Error::os(attempted, e.into())
        })?;
        let count = u32::try_from(span.pages()).expect("a region's pages fit 32 bits");
        let first = u32::try_from(first).expect("a region's pages fit 32 bits");
        Ok((region.first.plus(first), count))
    }

    /// All merged and zero pages are going to be looked at.
    pub(crate) fn begin_sweep(&mut self, swept: bool) {
        self.quick.begin_sweep(swept);
    }

    /// Refuses to discard locked pages, by that name.
    fn refuse_locked(&mut self, span: Span) -> Result<(), Error> {
        let pages = span.pages();
        let (list, _) = self.survey.newer_than(Instant::now()).map_err(|e| {
            let attempted = format!(
                "cannot discard {pages} pages: some may be locked, and the list of mappings \
                 (/proc/self/smaps) cannot be read to tell; nothing was discarded"
            );
            Error::os(attempted, e)
        })?;
        let locked: usize = list
            .altered(span)
            .iter()
            .filter(|(_, reason)| *reason == Reason::Mlocked)
            .map(|(part, _)| part.pages())
            .sum();
        if locked == 0 {
            return Ok(());
        }
        let attempted = format!(
            "cannot discard {pages} pages: {locked} of them are {} memory; nothing was discarded: \
             munlock it first",
            Reason::Mlocked
        );
        Err(Error::os(
            attempted,
            io::Error::from_raw_os_error(libc::EINVAL),
        ))
    }

    pub(crate) fn stats(&mut self) -> SpaceStats {
        self.settle();
        let outside = || count_outside(&self.maps, &self.regions);
        self.budget.count_for_stats(&outside);
        SpaceStats {
            mappings: self.budget.used,
            mapping_budget: self.budget.allowed(),
            frames: self.frames.frames(),
            frames_bytes: self.frames.allocated_bytes(),
            generations: self.frames.generations() as u64,
            windows: self.windows.opened,
            lost_races: self.lost_races,
            metadata_bytes: self.metadata_bytes(),
        }
    }

    pub(crate) fn metadata_bytes(&self) -> u64 {
        let bitmaps: usize = self
            .regions
            .values()
            .map(|region| {
                let bits = [
                    &region.mapped,
                    &region.own,
                    &region.zero,
                    &region.written,
                    &region.whole,
                ];
                bits.map(Bitmap::bytes).iter().sum::<usize>() + region.aside.bytes()
            })
            .sum();
        self.frames.metadata_bytes()
            + (bitmaps + self.huge.bytes()) as u64
            + self.watches.as_ref().map_or(0, Watches::metadata_bytes)
    }

    /// The `at`th page of a region.
    pub(crate) fn page_of(&self, id: RegionId, at: usize) -> Option<PageId> {
        let first = *self.by_id.get(&id)?;
        Some(PageId(first).plus(u32::try_from(at).ok()?))
    }

    fn region_of(&self, page: PageId) -> Option<(&Region, usize)> {
        let (first, region) = self.regions.range(..=page.0).next_back()?;
        let at = (page.0 - first) as usize;
        (at < region.pages() && region.attached).then_some((region, at))
    }

    /// The same, to change what is known of it; also where it is only kept for its records.
    fn known_of(&mut self, page: PageId) -> Option<(&mut Region, usize)> {
        let (first, region) = self.regions.range_mut(..=page.0).next_back()?;
        let at = (page.0 - first) as usize;
        (at < region.pages()).then_some((region, at))
    }

    /// Whether so many more mappings may be made.
    fn has_room(&mut self, needed: u64) -> bool {
        let outside = || count_outside(&self.maps, &self.regions);
        self.budget.has_room(needed, &outside)
    }

    /// Whether quick looks tell all there is to tell.
    fn all_is_looked_at_quickly(&self) -> bool {
        self.regions.values().all(|region| {
            let all = (0, region.pages());
            region.attached && region.tracked && region.left_alone(all, self.page).is_empty()
        })
    }

    fn live(&self, page: PageId) -> Option<Live> {
        self.region_of(page)
            .map(|(region, at)| region.live.part(at * self.page, self.page))
    }

    fn set_mapped(&mut self, page: PageId, to: bool) {
        let (bytes, huge) = (self.page, self.huge.pages);
        if let Some((region, at)) = self.known_of(page) {
            region.mapped.set(at, to);
            region.forget_state(at, at + 1);
            region.note_parted(at, bytes, huge);
        }
    }

    /// When the watches of an engine at rest are to end. (Pages that cannot be moved back wait under
    /// them for a scan.)
    pub(crate) fn watches_last_until(&self) -> Option<Instant> {
        let watches = self.watches.as_ref().filter(|_| self.moves)?;
        watches.last_until(self.quiet)
    }

    /// The watches, and their thread, are made when the first page needs one.
    fn watches(&mut self) -> Result<&mut Watches, Reason> {
        if self.watches.as_ref().is_some_and(Watches::is_over) {
            self.watches = None;
        }
        if self.watches.is_none() {
            let uffd = match self.spare.take() {
                Some(spare) => spare,
                None => watching_uffd(self.barrier).map_err(|_| Reason::Broken)?,
            };
            let made = Watches::new(uffd, Rc::clone(&self.pagemap), self.page);
            self.watches = Some(made.map_err(|_| Reason::NoMemory)?);
        }
        Ok(self.watches.as_mut().expect("just made"))
    }
}

/// Without the kernel's order there are no rules of the kernel's about what is looked at when.
fn by_digest(settings: &EngineSettings) -> bool {
    settings.scan.tree_order == TreeOrder::Digest
}

/// What write-protects the pages that are watched, and tells of their writers.
fn watching_uffd(barrier: Barrier) -> Result<Userfaultfd, Error> {
    barrier::open_uffd(
        barrier,
        Features::WP | Features::WP_UNPOPULATED | Features::WP_HUGETLBFS_SHMEM,
    )
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

/// Tracks writes to every page over which no frame was mapped (invariant L2). If that fails, nothing of
/// it stays registered; where the kernel does not see to that, `left` gets what does.
fn track(
    region: &mut Region,
    uffd: &Userfaultfd,
    page: usize,
    left: &mut Vec<Span>,
) -> Result<(), RegisterStop> {
    let pages = region.pages();
    let mut at = 0;
    while at < pages {
        let end = region.mapped.next(true, at, pages);
        if end > at {
            let span = region.live.part(at * page, (end - at) * page).span();
            if let Err(stop) = uffd.register(span, Modes::WriteProtect) {
                // The run that failed may be registered in part, unless another userfaultfd has it.
                let end = if stop == RegisterStop::Foreign {
                    at
                } else {
                    end
                };
                let done = region.live.part(0, end * page).span();
                if end > 0 && uffd.unregister(done).is_err() {
                    left.push(done);
                }
                return Err(stop);
            }
        }
        at = region.mapped.next(false, end, pages);
    }
    region.tracked = true;
    // Of this memory nothing is to be taken out any more.
    left.retain(|span| !region.live.span().overlaps(*span));
    Ok(())
}

/// Mappings outside of all regions.
fn count_outside(maps: &Procmap, regions: &BTreeMap<u32, Region>) -> Option<u64> {
    let mut spans: Vec<Span> = regions.values().map(|region| region.live.span()).collect();
    spans.sort_unstable_by_key(|span| span.start);
    mappings::count_outside(maps, &spans)
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
                format!(
                    "cannot map fresh memory over {} merged pages; merged pages before them may read as \
                     zero already, all others keep their bytes",
                    end - at
                ),
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
        region.forget_state(at, end);
        at = region.mapped.next(true, end, to);
    }
    Ok(())
}

impl PageSpace for LinuxSpace {
    type Error = Error;

    fn is_still(&mut self, look: Look) -> bool {
        self.quick.is_still(look) && self.all_is_looked_at_quickly()
    }

    fn page_size(&self) -> usize {
        self.page
    }

    fn observe(&mut self, window: Window, look: Look, into: &mut [PageState]) -> Result<(), Error> {
        let _phase = enter(Phase::Observe);
        self.readable = Span::default();
        into.fill(PageState::Absent);
        let page = self.page;
        let Some(region) = self.region_mut(window.region) else {
            return Ok(());
        };
        if !region.attached {
            return Ok(());
        }
        let from = (window.first.0 - region.first.0) as usize;
        let range = (from, from + window.pages as usize);
        let quickly = region.tracked && region.left_alone(range, page).is_empty();
        if quickly && self.quick.goes() {
            self.look_quickly(window, range, look, into)
        } else {
            let begun = Instant::now();
            let looked = self.look_in_full(window, range, look, into);
            self.quick.note_full_look(begun);
            looked
        }
    }

    fn next_present(&mut self, window: Window) -> Result<Option<PageId>, Error> {
        if !self.has_scan {
            // Entries are 8 bytes for each page, there or not.
            return Ok(Some(window.first));
        }
        let page = self.page;
        let Some(region) = self.region_mut(window.region) else {
            return Ok(None);
        };
        if !region.attached {
            return Ok(None);
        }
        let from = (window.first.0 - region.first.0) as usize;
        let to = from + window.pages as usize;
        // What a frame was mapped over counts as there, whether the kernel has a page or not.
        let mapped = region.mapped.next(true, from, to);
        let mut next = (mapped < to).then_some(mapped);
        if mapped > from {
            let live = region.live.part(from * page, (mapped - from) * page);
            if let Some(first) = self.first_there(live.span())? {
                next = Some(from + first);
            }
        }
        Ok(next.map(|at| {
            let offset = u32::try_from(at - from).expect("it is in the window");
            window.first.plus(offset)
        }))
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
        let _phase = enter(Phase::Digest);
        // (place in `into`, page), for what may be read.
        let mut readable: Vec<(usize, Live)> = Vec::with_capacity(pages.len());
        let maps = Rc::clone(&self.maps);
        let mut known = Readable::new(&maps);
        for (at, &page) in pages.iter().enumerate() {
            if self.is_aside(page) {
                into[at] = Attempt::Refused(Reason::Excluded);
                continue;
            }
            match self.live(page) {
                Some(live) if self.is_swapped(live) => {
                    into[at] = Attempt::Refused(Reason::Swapped);
                }
                Some(live) => match known.refusal(live.span()) {
                    None => readable.push((at, live)),
                    Some(reason) => into[at] = Attempt::Refused(reason),
                },
                None => into[at] = Attempt::Gone,
            }
        }
        self.readable = known.known();
        if self.zero_only {
            for (at, live) in readable {
                into[at] = Attempt::Done(PageHasher::zero_or_not(live.is_zero()));
            }
            return Ok(());
        }
        let hasher = &self.key.hasher();
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
                    let worker = spawn_scoped("pagemerge-hash", scope, move || hash(part));
                    (part, worker)
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
        let hasher = self.key.hasher();
        for (&frame, into) in frames.iter().zip(into) {
            let view = self.frames.slot(frame).map(|slot| self.frames.view(slot));
            *into = match view {
                Some(Ok((view, at))) => Attempt::Done(sys::live::digest((&view, at), &hasher)),
                Some(Err(reason)) => Attempt::Refused(reason),
                None => Attempt::Gone,
            };
        }
        Ok(())
    }

    fn compare(&mut self, a: Content, b: Content) -> Result<Attempt<Ordering>, Error> {
        let _phase = enter(Phase::Digest);
        let maps = Rc::clone(&self.maps);
        let mut known = Readable::knowing(&maps, self.readable);
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
        if known.known() != Span::default() {
            self.readable = known.known();
        }
        Ok(order.map_or(Attempt::Gone, Attempt::Done))
    }

    fn apply(&mut self, requests: &[Request], outcomes: &mut [Attempt<()>]) -> Result<(), Error> {
        let _phase = enter(Phase::Prepare);
        self.readable = Span::default();
        self.unshare(requests, outcomes);
        // First, since what is refused here needs no list of mappings.
        self.refuse_in_huge_pages(requests, outcomes);
        self.refuse_left_alone(requests, outcomes);
        self.refuse_swapped(requests, outcomes);
        self.look_at_headroom();
        let promotions = self.prepare_promotions(requests, outcomes)?;
        let slots: Vec<(usize, Slot)> = promotions
            .iter()
            .filter_map(|item| item.ticket.fresh.map(|slot| (item.ticket.request, slot)))
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
}
