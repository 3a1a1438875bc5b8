//! `Engine`: what a program holds. Regions, settings, run modes; every call is a job of the merging
//! thread, cut into slices so that nobody waits long.
//!
//! # Invariants
//! * [`EngineState`] (the scanner, the space and everything that owns a descriptor) is made, used
//!   and dropped on the merging thread only.
//! * A handle that has crossed a fork does nothing but say so; dropping it does nothing at all.
//! * The last handle un-merges everything before it is gone: no memory is let go merged.

use crate::eligible::Eligible;
use crate::error::Error;
use crate::extent::{Digester, Extent};
use crate::probe::capabilities;
use crate::settings::{Barrier, EngineSettings};
use crate::space::{LinuxSpace, SpaceStats};
use crate::sys::Span;
use crate::sys::live::Live;
use crate::sys::mapping::Mapping;
use crate::sys::phase::{Phase, enter};
use crate::{ballast, fork, sys, worker};
use pagemerge_core::{
    ChangeError, Clock, Event, RegionId, RegionStats, RunMode, Scanner, Stats, StepReport, Tick,
    TraceSink, UnmergeError, UnregisterError,
};
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Pages that one slice of work examines at most: some 10 ms in the worst case, so that other jobs
/// and `stop` get their turn.
const SLICE_PAGES: u32 = 1024;

/// Records of this size and more are asked for before they grow: smaller ones fit the ballast.
const LARGE_RECORDS: usize = 512 << 10;
/// Slices after which the size of records is looked at again.
const STEPS_BETWEEN_SIZES: u32 = 16;
/// How long background merging waits when there is no memory for records.
const SHORT_OF_MEMORY: Duration = Duration::from_millis(100);

/// Events kept until somebody takes them; older ones are dropped and counted.
const EVENTS_KEPT: usize = 1 << 16;

/// A registered region. Never reused, so a stale handle is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RegionHandle {
    id: u64,
    /// Whole pages that are registered.
    pub pages: u32,
    /// Address of the first of them.
    pub addr: usize,
}

impl RegionHandle {
    /// A new one, for these whole pages.
    fn of(span: Span) -> Result<Self, Error> {
        let pages = u32::try_from(span.pages()).map_err(|_| {
            Error::Limit(format!(
                "a region has at most {} pages, got {}",
                u32::MAX,
                span.pages()
            ))
        })?;
        Ok(Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            pages,
            addr: span.start,
        })
    }
}

/// The counters of an engine at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineStats {
    /// The algorithm's: every sysfs counter, and ours.
    pub core: Stats,
    /// Live memory's.
    pub space: SpaceStats,
    /// Bytes that the engine uses for its own records, in all.
    pub metadata_bytes: u64,
    /// What keeps pages still while they are merged.
    pub barrier: Barrier,
    /// Whether writes are tracked by the kernel.
    pub write_tracking: bool,
    /// `run`: 1 means that the background thread merges.
    pub run: RunMode,
    /// The current `pages_to_scan`, which the advisor may have rewritten.
    pub pages_to_scan: u32,
    /// CPU time that this engine's scanning has used, in nanoseconds.
    pub cpu_nanos: u64,
    /// Why background merging ended by itself, if it did.
    pub last_error: Option<String>,
}

/// A registered region as the engine knows it.
struct Member {
    handle: RegionHandle,
    id: RegionId,
    /// The buffer as it was given, partial pages included.
    buffer: Span,
    domain: String,
    /// The mapping of an arena: a region of our own memory has a share of it.
    own: Option<Arc<Mapping>>,
}

/// Memory that is lent ([`Extent`]).
struct Lot {
    /// Held until its region has ended, which is what the region's promise rests on.
    memory: Arc<Mapping>,
    domain: String,
    state: LotState,
}

enum LotState {
    /// There has been nothing to compare it with.
    Waiting,
    Registered(RegionHandle),
    Refused,
}

/// What a slice of synchronous work tells its caller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Slice {
    examined: u32,
    pass_done: bool,
    idle: bool,
}

#[derive(Default)]
struct EventLog {
    events: VecDeque<Event>,
    dropped: u64,
}

struct LogSink(Arc<Mutex<EventLog>>);

impl TraceSink for LogSink {
    fn event(&mut self, event: Event) {
        let mut log = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if log.events.len() == EVENTS_KEPT {
            log.events.pop_front();
            log.dropped += 1;
        }
        log.events.push_back(event);
    }
}

/// An engine as it lives on the merging thread.
pub(crate) struct EngineState {
    scanner: Scanner,
    space: LinuxSpace,
    settings: EngineSettings,
    regions: HashMap<u64, Member>,
    /// What is lent, by its number.
    lots: HashMap<u64, Lot>,
    /// Some may be waiting to be registered.
    lots_wait: bool,
    /// Unregistered regions whose records the scanner still has (`lagging_records`).
    lagging: HashMap<(usize, u32, String), RegionId>,
    started: Instant,
    cpu_nanos: u64,
    /// When the next background batch (or the rest of this one) is due; `None` while not running
    /// or while nothing is registered.
    due: Option<Instant>,
    /// Pages left of the batch under way.
    batch_left: u32,
    /// The next step begins a full scan.
    between_scans: bool,
    /// Bytes of all records, as of lately, and steps made.
    records_bytes: usize,
    steps: u32,
    last_error: Option<String>,
}

impl EngineState {
    fn new(settings: &EngineSettings) -> Result<Self, Error> {
        let _phase = enter(Phase::Create);
        settings.validate()?;
        let space = LinuxSpace::new(settings)?;
        let scanner = Scanner::new(settings.scan.clone())?;
        // The scanner has put the advisor's start in the place of `pages_to_scan`.
        let settings = EngineSettings {
            scan: scanner.settings().clone(),
            ..settings.clone()
        };
        Ok(Self {
            scanner,
            space,
            settings,
            regions: HashMap::new(),
            lots: HashMap::new(),
            lots_wait: false,
            lagging: HashMap::new(),
            started: Instant::now(),
            cpu_nanos: 0,
            due: None,
            batch_left: 0,
            between_scans: true,
            records_bytes: 0,
            steps: 0,
            last_error: None,
        })
    }

    fn clock(&self) -> Clock {
        // Milliseconds since the engine was made fit 64 bits for half a billion years.
        #[allow(clippy::cast_possible_truncation)]
        let now = self.started.elapsed().as_millis() as u64;
        Clock {
            now: Tick(now),
            cpu_nanos: self.cpu_nanos,
        }
    }

    /// Whether there is memory for what a slice may add to the records. Those of large regions grow in
    /// steps as large as they are.
    fn has_room_for_records(&self) -> bool {
        !ballast::is_short()
            && (self.records_bytes < LARGE_RECORDS || ballast::has_room(2 * self.records_bytes))
    }

    /// One slice of scanning, its CPU time accounted.
    fn step(&mut self, budget: u32) -> Result<StepReport, Error> {
        if !self.has_room_for_records() {
            return Err(Error::no_memory("scan"));
        }
        if self.between_scans {
            self.register_lots();
            self.space.begin_pass(self.scanner.has_swept());
            self.between_scans = false;
        }
        self.space.begin_step();
        let cpu = sys::process::thread_cpu_time();
        let clock = self.clock();
        let report = self.scanner.step(&mut self.space, clock, budget);
        self.cpu_nanos += nanos(sys::process::thread_cpu_time().saturating_sub(cpu));
        let report = report?;
        if report.full_scan_done || self.steps.is_multiple_of(STEPS_BETWEEN_SIZES) {
            self.between_scans |= report.full_scan_done;
            let bytes = self.scanner.stats().metadata_bytes + self.space.metadata_bytes();
            self.records_bytes = usize::try_from(bytes).unwrap_or(usize::MAX / 4);
        }
        self.steps = self.steps.wrapping_add(1);
        self.drop_lagging();
        Ok(report)
    }

    /// Lets go of unregistered regions whose records are gone.
    fn drop_lagging(&mut self) {
        let (scanner, space) = (&self.scanner, &mut self.space);
        self.lagging.retain(|_, id| {
            let lags = scanner.region_stats(*id).is_some();
            if !lags {
                space.remove_region(*id);
            }
            lags
        });
    }

    pub(crate) fn due(&self) -> Option<Instant> {
        if self.scanner.run() == RunMode::Merge {
            return self.due;
        }
        self.space.watches_last_until()
    }

    /// One slice of background work.
    pub(crate) fn background_slice(&mut self) {
        if self.scanner.run() != RunMode::Merge {
            self.due = None;
            let over = self.space.watches_last_until();
            if over.is_some_and(|over| over <= Instant::now()) {
                self.space.end_watches_at_rest();
            }
            return;
        }
        if !self.has_room_for_records() {
            // The program has used up a limit, and may give something back.
            self.due = Some(Instant::now() + SHORT_OF_MEMORY);
            return;
        }
        if self.batch_left == 0 {
            self.batch_left = self.scanner.pages_to_scan();
        }
        match self.step(self.batch_left.min(SLICE_PAGES)) {
            Ok(report) => {
                self.batch_left = self.batch_left.saturating_sub(report.examined);
                let now = Instant::now();
                self.due = if report.idle {
                    self.batch_left = 0;
                    None
                } else if report.full_scan_done || self.batch_left == 0 {
                    self.batch_left = 0;
                    Some(now + Duration::from_millis(self.settings.scan.sleep_millisecs.into()))
                } else {
                    Some(now)
                };
            }
            Err(error) => {
                tracing::error!(%error, "background merging ended");
                self.last_error = Some(error.to_string());
                self.due = None;
                // Stopping keeps everything as it is, so it cannot fail.
                let _ = self.scanner.set_run(&mut self.space, RunMode::Stop);
            }
        }
    }

    fn slice(&mut self, budget: u32) -> Result<Slice, Error> {
        let report = self.step(budget.min(SLICE_PAGES))?;
        Ok(Slice {
            examined: report.examined,
            pass_done: report.full_scan_done,
            idle: report.idle,
        })
    }

    /// Pages of `span` that are registered with this engine, or lent by it.
    fn overlap(&self, span: Span) -> usize {
        let lent = self
            .lots
            .values()
            .filter_map(|lot| lot.memory.span().intersection(span));
        self.space
            .overlap(span)
            .max(lent.map(Span::pages).sum::<usize>())
    }

    /// How many of them are arenas'.
    fn overlap_with_arenas(&self, span: Span) -> usize {
        self.regions
            .values()
            .filter_map(|member| member.own.as_ref()?.span().intersection(span))
            .map(Span::pages)
            .sum()
    }

    /// An arena, whose mapping was made a moment ago; `huge` is what the kernel was told about huge pages.
    pub(crate) fn register_own(
        &mut self,
        mapping: Arc<Mapping>,
        domain: &str,
        huge: Option<bool>,
    ) -> Result<RegionHandle, Error> {
        // The caller of `scan` promises that nobody writes then, and can only know of what he has himself.
        if self.space.barrier() == Barrier::None {
            return Err(Error::ArenaNeedsBarrier {
                why: LinuxSpace::why_no_barrier(),
            });
        }
        let live = Live::own(&mapping);
        let handle = RegionHandle::of(live.span())?;
        self.register(handle, live, live.span(), domain, Some((mapping, huge)))?;
        Ok(handle)
    }

    /// The end of an arena: its bytes are nobody's, so nothing is given back to it. What windows left of it
    /// in userfaultfd goes with the mapping, which this gives the region's share of back.
    pub(crate) fn end_own(&mut self, handle: RegionHandle) -> Result<(), Error> {
        let _phase = enter(Phase::Forget);
        let id = self.region(handle)?;
        self.scanner.forget(&mut self.space, id)?;
        self.space.remove_region(id);
        self.drop_handle(handle);
        Ok(())
    }

    /// Stops, and un-merges all that its owners have registered themselves. Arenas stay.
    fn release(&mut self) -> Result<(), Error> {
        let _phase = enter(Phase::Close);
        self.set_run(RunMode::Stop)?;
        self.unmerge_all(|member| member.own.is_none())
    }

    fn region(&self, handle: RegionHandle) -> Result<RegionId, Error> {
        self.regions
            .get(&handle.id)
            .map(|member| member.id)
            .ok_or(Error::NotRegistered)
    }

    fn register(
        &mut self,
        handle: RegionHandle,
        live: Live,
        buffer: Span,
        domain: &str,
        own: Option<(Arc<Mapping>, Option<bool>)>,
    ) -> Result<(), Error> {
        let _phase = enter(Phase::Register);
        // Its directories grow with its size, if slowly.
        let large = handle.pages as usize / 512;
        if !self.has_room_for_records() || large > LARGE_RECORDS && !ballast::has_room(large) {
            return Err(Error::no_memory("register memory"));
        }
        let key = (handle.addr, handle.pages, domain.to_owned());
        let revived = self
            .lagging
            .remove(&key)
            .filter(|id| self.scanner.revive(*id));
        let id = if let Some(id) = revived {
            self.space.reattach(id)?;
            id
        } else {
            self.space.untrack_again();
            // What we have just mapped can be merged: the list of mappings need not be read for that.
            let found = match &own {
                Some((_, huge)) => Eligible {
                    huge: *huge,
                    ..Eligible::default()
                },
                None => self.space.check_mergeable(live.span())?,
            };
            let got = self
                .scanner
                .register(handle.pages, domain)
                .map_err(|e| Error::Limit(e.to_string()))?;
            if let Err(error) = self.space.add_region(got, live, &found) {
                // It has no records yet, so there is nothing that could fail to be dropped.
                let _ = self.scanner.forget(&mut self.space, got.region);
                return Err(error);
            }
            got.region
        };
        let member = Member {
            handle,
            id,
            buffer,
            domain: domain.to_owned(),
            own: own.map(|(mapping, _)| mapping),
        };
        self.regions.insert(handle.id, member);
        if self.scanner.run() == RunMode::Merge && self.due.is_none() {
            self.due = Some(Instant::now());
        }
        Ok(())
    }

    /// Refuses, with the figures and before anything is changed, to un-merge `regions` if there is not
    /// memory for all the copies: running into a limit half-way would bring in the OOM killer.
    fn has_room_to_unmerge(&mut self, regions: &[RegionId]) -> Result<(), Error> {
        let stats = regions
            .iter()
            .filter_map(|id| self.scanner.region_stats(*id));
        let recorded: u64 = stats
            .map(|it| it.ksm_merging_pages + it.ksm_zero_pages)
            .sum();
        if recorded == 0 {
            return Ok(());
        }
        // Where it cannot be asked, each batch finds out.
        let Some((available, bound, kept)) = self.space.room_for_copies() else {
            return Ok(());
        };
        let needed = |pages: u64| pages * crate::page_size() as u64 + kept;
        if needed(recorded) <= available {
            return Ok(());
        }
        // Pages that were written since have their copies already.
        self.space.begin_sweep(self.scanner.has_swept());
        self.scanner.refresh(&mut self.space)?;
        let pages = regions
            .iter()
            .map(|id| u64::from(self.scanner.pages_to_copy(*id)))
            .sum();
        if pages == 0 || needed(pages) <= available {
            return Ok(());
        }
        Err(Error::UnmergeMemory {
            pages,
            needed: needed(pages),
            available,
            bound,
        })
    }

    fn unregister(&mut self, handle: RegionHandle) -> Result<(), Error> {
        let _phase = enter(Phase::Unregister);
        let id = self.region(handle)?;
        self.has_room_to_unmerge(&[id])?;
        // What the owner did to this memory since another region was un-merged is to be seen.
        self.space.survey_for_unregistering();
        self.unmerge_region(handle, id)
    }

    fn unmerge_region(&mut self, handle: RegionHandle, id: RegionId) -> Result<(), Error> {
        let span = Span::new(handle.addr, handle.pages as usize * crate::page_size());
        self.space.close_again(span)?;
        self.scanner
            .unregister(&mut self.space, id)
            .map_err(|e| match e {
                UnregisterError::Refused { pages, reason } => Error::Unmerge {
                    pages: pages.into(),
                    reason,
                },
                UnregisterError::Space(e) => e,
                other => Error::Worker(other.to_string()),
            })?;
        let domain = self.drop_handle(handle);
        if self.settings.scan.lagging_records {
            self.space.detach_region(id);
            self.lagging.insert((handle.addr, handle.pages, domain), id);
        } else {
            self.dissolve_frames_under(id);
            self.space.remove_region(id);
        }
        Ok(())
    }

    /// A page that was written after merging keeps its copy in a mapping of its old frame. Its owner
    /// is about to have it for himself, and an allocator that discards it expects zeroes; so frames
    /// that others still share are taken apart, after which their slots are holes. Those others
    /// merge again in the next passes. (Exactly like the kernel, with `lagging_records`, their
    /// counters must not move.)
    fn dissolve_frames_under(&mut self, id: RegionId) {
        let frames = self.space.frames_left_under(id);
        if frames.is_empty() {
            return;
        }
        match self.scanner.dissolve(&mut self.space, &frames) {
            Ok(0) => {}
            Ok(pages) => tracing::warn!(
                pages,
                "frames stay under written pages of a region that ended: other pages that share \
                 them could not be un-merged"
            ),
            Err(error) => tracing::warn!(%error, "frames stay under a region that ended"),
        }
    }

    fn drop_handle(&mut self, handle: RegionHandle) -> String {
        let member = self.regions.remove(&handle.id);
        member.map(|member| member.domain).unwrap_or_default()
    }

    fn forget(&mut self, handle: RegionHandle) -> Result<(), Error> {
        let _phase = enter(Phase::Forget);
        let id = self.region(handle)?;
        let span = Span::new(handle.addr, handle.pages as usize * crate::page_size());
        self.space.close_again(span)?;
        self.space.blank_region(id)?;
        self.scanner.forget(&mut self.space, id)?;
        self.space.remove_region(id);
        self.drop_handle(handle);
        Ok(())
    }

    /// Returns how many pages of the region have any of these bytes.
    fn exclude(&mut self, handle: RegionHandle, addr: usize, len: usize) -> Result<u32, Error> {
        let member = self.regions.get(&handle.id).ok_or(Error::NotRegistered)?;
        let (id, buffer) = (member.id, member.buffer);
        let end = addr
            .checked_add(len)
            .filter(|&end| addr >= buffer.start && end <= buffer.end())
            .ok_or(Error::NotInBuffer { bytes: len })?;
        let page = crate::page_size();
        let pages = handle.pages as usize;
        // Outwards: no page may merge that has one of these bytes. The buffer's first and last bytes
        // may lie in pages that are not wholly its own, and so not registered.
        let from = addr.saturating_sub(handle.addr) / page;
        let to = end.saturating_sub(handle.addr).div_ceil(page).min(pages);
        if len == 0 || from >= to {
            return Ok(0);
        }
        let first = self.space.page_of(id, from).ok_or(Error::NotRegistered)?;
        let count = u32::try_from(to - from).expect("a region's pages fit 32 bits");
        self.scanner
            .set_aside(&mut self.space, first, count)
            .map_err(|e| match e {
                UnmergeError::Refused { pages, reason } => Error::Exclude {
                    pages: pages.into(),
                    reason,
                },
                UnmergeError::Space(e) => e,
                other => Error::Worker(other.to_string()),
            })?;
        self.space.set_aside(id, (from, to));
        Ok(count)
    }

    pub(crate) fn discard(&mut self, addr: usize, len: usize) -> Result<(), Error> {
        let _phase = enter(Phase::Discard);
        let (first, pages) = self.space.discard(addr, len)?;
        self.scanner.vacated(&mut self.space, first, pages)
    }

    /// Takes note of memory that is lent.
    fn add_lot(&mut self, number: u64, memory: Arc<Mapping>, domain: String) {
        let lot = Lot {
            memory,
            domain,
            state: LotState::Waiting,
        };
        self.lots.insert(number, lot);
        self.lots_wait = true;
    }

    /// Whether nothing is registered but what is lent.
    fn is_for_lots_only(&self) -> bool {
        let registered = self.lots.keys().filter(|lot| self.has_registered(**lot));
        registered.count() == self.regions.len()
    }

    /// Registers what is lent, once there is other memory that it might equal.
    fn register_lots(&mut self) {
        if !self.lots_wait || !self.lots_may_merge() {
            return;
        }
        if self.is_for_lots_only() {
            return;
        }
        self.lots_wait = false;
        let waiting: Vec<u64> = self
            .lots
            .iter()
            .filter(|(_, lot)| matches!(lot.state, LotState::Waiting))
            .map(|(number, _)| *number)
            .collect();
        for number in waiting {
            let Some(lot) = self.lots.get(&number) else {
                continue;
            };
            let (memory, domain) = (Arc::clone(&lot.memory), lot.domain.clone());
            // As it was advised: pages that come back into other memory would stay mappings of their own.
            let state = match self.register_own(memory, &domain, Some(false)) {
                Ok(handle) => LotState::Registered(handle),
                // Locked memory is refused, for one. It is kept without sharing.
                Err(Error::NotMergeable { .. }) => LotState::Refused,
                Err(error) => {
                    tracing::debug!(%error, "lent memory is not merged yet");
                    self.lots_wait = true;
                    LotState::Waiting
                }
            };
            if let Some(lot) = self.lots.get_mut(&number) {
                lot.state = state;
            }
        }
    }

    /// Without a barrier it is the callers who see to it that nobody writes while pages are merged, and
    /// they cannot know who writes here. With the one for user mode a system call that reads this memory
    /// could fail, and whoever makes it has never registered any.
    fn lots_may_merge(&self) -> bool {
        self.space.barrier() == Barrier::Full
    }

    /// Whether a lot's memory may be merged.
    pub(crate) fn has_registered(&self, number: u64) -> bool {
        self.lots.get(&number).is_some_and(|lot| match lot.state {
            LotState::Registered(handle) => self.regions.contains_key(&handle.id),
            LotState::Waiting | LotState::Refused => false,
        })
    }

    /// Whoever was lent this memory has no use for it any more.
    pub(crate) fn end_lot(&mut self, number: u64) {
        let Some(lot) = self.lots.get(&number) else {
            return;
        };
        if let LotState::Registered(handle) = lot.state
            && self.regions.contains_key(&handle.id)
            && let Err(error) = self.end_own(handle)
        {
            // Its memory stays for as long as something of it may be merged.
            tracing::warn!(%error, "lent memory could not be taken back");
            return;
        }
        self.lots.remove(&number);
    }

    fn set_run(&mut self, run: RunMode) -> Result<(), Error> {
        if run == RunMode::Merge && self.space.barrier() == Barrier::None {
            return Err(Error::NeedsBarrier {
                why: LinuxSpace::why_no_barrier(),
            });
        }
        if run == RunMode::Unmerge && self.scanner.run() != RunMode::Unmerge {
            let regions: Vec<RegionId> = self.regions.values().map(|member| member.id).collect();
            if let Err(error) = self.has_room_to_unmerge(&regions) {
                // As after any un-merging that fails. Stopping cannot.
                let _ = self.scanner.set_run(&mut self.space, RunMode::Stop);
                self.due = None;
                return Err(error);
            }
        }
        self.scanner
            .set_run(&mut self.space, run)
            .map_err(|e| match e {
                UnmergeError::Refused { pages, reason } => Error::Unmerge {
                    pages: pages.into(),
                    reason,
                },
                UnmergeError::Space(e) => e,
                other => Error::Worker(other.to_string()),
            })?;
        self.batch_left = 0;
        match run {
            RunMode::Merge => {
                self.last_error = None;
                self.due.get_or_insert_with(Instant::now);
            }
            RunMode::Stop => self.due = None,
            RunMode::Unmerge => {
                self.space.settle();
                self.due = None;
                self.between_scans = true;
                self.drop_lagging();
            }
        }
        Ok(())
    }

    fn set(&mut self, new: &EngineSettings) -> Result<(), Error> {
        new.validate()?;
        self.space.check_settings(new)?;
        self.scanner
            .change_settings(&mut self.space, new.scan.clone())
            .map_err(|e| match e {
                ChangeError::Setting(e) => Error::Setting(e),
                ChangeError::Space(e) => e,
                // The enum may grow; whatever it is, nothing was changed.
                other => Error::Worker(other.to_string()),
            })?;
        self.space.change_settings(new);
        if new.scan.sleep_millisecs != self.settings.scan.sleep_millisecs && self.due.is_some() {
            self.due = Some(Instant::now());
        }
        self.settings = EngineSettings {
            scan: self.scanner.settings().clone(),
            ..new.clone()
        };
        Ok(())
    }

    fn stats(&mut self) -> Result<EngineStats, Error> {
        let _phase = enter(Phase::Stats);
        self.space.begin_sweep(self.scanner.has_swept());
        self.scanner.refresh(&mut self.space)?;
        Ok(self.counted())
    }

    /// The counters as they stand.
    fn counted(&mut self) -> EngineStats {
        let core = self.scanner.stats();
        let space = self.space.stats();
        EngineStats {
            metadata_bytes: core.metadata_bytes + space.metadata_bytes,
            core,
            space,
            barrier: self.space.barrier(),
            write_tracking: self.space.write_tracking(),
            run: self.scanner.run(),
            pages_to_scan: self.scanner.pages_to_scan(),
            cpu_nanos: self.cpu_nanos,
            last_error: self.last_error.clone(),
        }
    }

    /// Takes out of userfaultfd what windows could not take out.
    pub(crate) fn let_waiters_go(&mut self) {
        // What still cannot be is told to nobody: this engine has ended.
        let _ = self.space.close_again(Span::default());
    }

    /// Un-merges everything. What cannot be un-merged stays merged, and the engine with it.
    fn close(&mut self) -> Result<(), Error> {
        let _phase = enter(Phase::Close);
        self.unmerge_all(|_| true)
    }

    fn unmerge_all(&mut self, which: impl Fn(&Member) -> bool) -> Result<(), Error> {
        let all: Vec<(RegionHandle, RegionId)> = self
            .regions
            .values()
            .filter(|member| which(member))
            .map(|member| (member.handle, member.id))
            .collect();
        let regions: Vec<RegionId> = all.iter().map(|(_, id)| *id).collect();
        self.has_room_to_unmerge(&regions)?;
        // One look at the mappings for all regions.
        self.space.survey_anew();
        for (handle, id) in all {
            self.unmerge_region(handle, id)?;
        }
        Ok(())
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

struct Handle {
    id: u64,
    epoch: (u64, u32),
    mark: u64,
    /// It has been closed, by any of its handles.
    closed: AtomicBool,
    events: Arc<Mutex<EventLog>>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        if self.epoch != fork::epoch() {
            return;
        }
        let id = self.id;
        let closed = worker::call_engine(id, EngineState::close);
        match closed {
            Ok(()) => drop(worker::call(move |stage| stage.remove(id))),
            Err(Error::Closed) => {}
            Err(error) => {
                tracing::error!(%error, "an engine was dropped and could not un-merge everything");
            }
        }
    }
}

/// Merges equal pages of the memory registered with it.
///
/// A handle: clones share one engine, and the last one to go un-merges everything.
#[derive(Clone)]
pub struct Engine(Arc<Handle>);

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("id", &self.0.id)
            .finish_non_exhaustive()
    }
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

impl Engine {
    /// Makes an engine.
    ///
    /// # Errors
    /// A setting out of range, a barrier that is not available here, or a limit of this process
    /// that makes frames impossible.
    pub fn new(settings: EngineSettings) -> Result<Self, Error> {
        settings.validate()?;
        // Probing opens descriptors; the first look happens on the caller's side so that its
        // reasons are there even when the thread cannot start.
        let _ = capabilities();
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        worker::call(move |stage| {
            EngineState::new(&settings).map(|engine| stage.add(id, engine))
        })??;
        Ok(Self(Arc::new(Handle {
            id,
            epoch: fork::epoch(),
            mark: fork::mark(),
            closed: AtomicBool::new(false),
            events: Arc::new(Mutex::new(EventLog::default())),
        })))
    }

    /// Its number on the merging thread.
    pub(crate) fn id(&self) -> u64 {
        self.0.id
    }

    /// Whether this process made it.
    pub(crate) fn is_ours(&self) -> bool {
        self.0.epoch == fork::epoch()
    }

    fn on<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut EngineState) -> Result<R, Error> + Send + 'static,
    ) -> Result<R, Error> {
        if self.0.epoch != fork::epoch() {
            return Err(Error::Forked);
        }
        worker::call_engine(self.0.id, work)
    }

    /// Registers the whole pages inside `addr .. addr + len` for merging (`MADV_MERGEABLE`).
    ///
    /// `domain` keeps contents apart: pages of different domains never share a frame.
    ///
    /// # Errors
    /// Memory that holds no whole page, cannot be merged (with the reason), or is registered
    /// already.
    ///
    /// # Safety
    /// Until [`unregister`](Self::unregister), [`forget`](Self::forget) or
    /// [`close`](Self::close) has returned, the memory must stay mapped as it is: not unmapped,
    /// moved, remapped or handed to an owner that does such things. (Reading and writing it, from
    /// any thread and by any system call, is what it is for.)
    #[allow(
        unsafe_code,
        reason = "the promise about foreign memory is made here, by the caller"
    )]
    pub unsafe fn register(
        &self,
        addr: usize,
        len: usize,
        domain: &str,
    ) -> Result<RegionHandle, Error> {
        let page = crate::page_size();
        let start = addr.checked_next_multiple_of(page).unwrap_or(usize::MAX);
        let end = addr.saturating_add(len) / page * page;
        let pages = end.saturating_sub(start) / page;
        if pages == 0 {
            return Err(Error::TooSmall {
                bytes: len,
                page_size: page,
            });
        }
        let handle = RegionHandle::of(Span::between(start, end))?;
        let domain = domain.to_owned();
        // SAFETY: our caller promises that the memory stays mapped as it is until the region is
        // dropped; that it is private anonymous memory is checked before anything touches it.
        let live = unsafe { Live::promised(Span::between(start, end)) };
        if self.0.epoch != fork::epoch() {
            return Err(Error::Forked);
        }
        let id = self.0.id;
        worker::call(move |stage| {
            // Two engines that merged the same pages would take each other's frames for files.
            match stage
                .engines()
                .map(|engine| engine.overlap(live.span()))
                .sum()
            {
                0 => stage
                    .on(id, |engine| {
                        engine.register(handle, live, Span::new(addr, len), &domain, None)
                    })
                    .and_then(|done| done),
                pages => {
                    let span = live.span();
                    match stage.engines().map(|e| e.overlap_with_arenas(span)).sum() {
                        0 => Err(Error::Overlaps { pages }),
                        pages => Err(Error::InArena { pages }),
                    }
                }
            }
        })??;
        Ok(handle)
    }

    /// Gives every page of the region its own copy back (`MADV_UNMERGEABLE`) and drops it.
    ///
    /// # Errors
    /// [`Error::UnmergeMemory`] when there is not memory for all the copies: nothing is changed then.
    /// [`Error::Unmerge`] when pages could not be given back: they stay merged and registered.
    pub fn unregister(&self, region: RegionHandle) -> Result<(), Error> {
        self.on(move |engine| engine.unregister(region))
    }

    /// Drops a region whose owner is giving the memory up: its contents are lost, and what was
    /// merged reads as zero afterwards. Cheaper than `unregister`, and it cannot run out of memory.
    ///
    /// # Errors
    /// A region that is not registered.
    pub fn forget(&self, region: RegionHandle) -> Result<(), Error> {
        self.on(move |engine| engine.forget(region))
    }

    /// Sets bytes of a region aside: their pages never merge from now on, until the region is
    /// unregistered. Pages that are merged already get their own copies back first. Returns how many
    /// pages of the region have any of these bytes.
    ///
    /// # Errors
    /// [`Error::NotInBuffer`], or [`Error::Exclude`] when pages could not be un-merged; then nothing is
    /// set aside.
    pub fn exclude(&self, region: RegionHandle, addr: usize, len: usize) -> Result<u32, Error> {
        self.on(move |engine| engine.exclude(region, addr, len))
    }

    /// The owner's `MADV_DONTNEED`: the whole pages inside the range read as zero afterwards.
    /// Waits for windows.
    ///
    /// # Errors
    /// Pages that no region of this engine has, or that are locked (`EINVAL`, as from the kernel): nothing
    /// is discarded then. A limit of mappings: the text says what is left.
    pub fn discard(&self, addr: usize, len: usize) -> Result<(), Error> {
        self.on(move |engine| engine.discard(addr, len))
    }

    /// One full pass from where the scan is to the end of the pass, or `pages` pages.
    ///
    /// The counters are those at its end. Which merged pages have been written is known in them as of its
    /// beginning; [`stats`](Self::stats) looks again.
    ///
    /// `between` is called between slices, on this thread; when it says `false` the work stops.
    ///
    /// # Errors
    /// [`Error::Interrupted`], or what makes the engine unusable.
    pub fn scan(
        &self,
        pages: Option<u32>,
        between: &mut dyn FnMut() -> bool,
    ) -> Result<EngineStats, Error> {
        let mut left = pages.unwrap_or(u32::MAX);
        let mut first = true;
        while left > 0 {
            let budget = left;
            let begins = std::mem::take(&mut first);
            let slice = self.on(move |engine| {
                if begins {
                    engine.space.survey_for_scanning();
                }
                engine.slice(budget)
            })?;
            if slice.pass_done && pages.is_none() {
                // It has looked at all merged pages when it began.
                return self.on(|engine| Ok(engine.counted()));
            }
            if slice.pass_done || slice.idle {
                break;
            }
            if pages.is_some() {
                left = left.saturating_sub(slice.examined);
            }
            if !between() {
                return Err(Error::Interrupted);
            }
        }
        self.stats()
    }

    /// Full passes until the counters stand still, `max_scans` at most.
    ///
    /// # Errors
    /// As [`scan`](Self::scan).
    pub fn settle(
        &self,
        max_scans: u32,
        between: &mut dyn FnMut() -> bool,
    ) -> Result<EngineStats, Error> {
        let mut last = self.stats()?;
        let mut unchanged = 0;
        for _ in 0..max_scans {
            let now = self.scan(None, between)?;
            unchanged = if at_rest(&last.core, &now.core) {
                unchanged + 1
            } else {
                0
            };
            last = now;
            // One is not enough: a page that was written since the last call is only found to have
            // been written by the first pass, and merges in the next.
            if unchanged == 2 {
                break;
            }
        }
        Ok(last)
    }

    /// Lends memory that this engine knows of: as soon as it has other memory to merge, these pages may
    /// share frames with it, within `domain`.
    ///
    /// # Errors
    /// A closed or forked engine, no memory or no mapping left.
    pub fn lend_extent(&self, pages: u32, domain: &str) -> Result<Extent, Error> {
        let memory = Extent::map(pages)
            .map_err(|e| Error::os(format!("cannot map {pages} pages to keep bytes in"), e))?;
        let number = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let (known, domain) = (Arc::clone(&memory), domain.to_owned());
        if !self.is_here() {
            return Err(Error::Forked);
        }
        if self.0.closed.load(Ordering::Relaxed) {
            return Err(Error::Closed);
        }
        // Nobody waits: the merging thread may be busy for a while, and knows of the memory before it
        // begins another pass.
        worker::post_to(self.0.id, move |engine| {
            if let Some(engine) = engine {
                engine.add_lot(number, known, domain);
            }
        });
        Ok(Extent::new(self.0.id, number, memory, pages))
    }

    /// The hash by which this engine orders pages, for bytes of the caller's.
    ///
    /// # Errors
    /// Only a closed or forked engine.
    pub fn digester(&self) -> Result<Digester, Error> {
        self.on(|engine| Ok(Digester::new(engine.space.key())))
    }

    /// Whether this process is the one that made the engine. Takes no system call.
    #[must_use]
    pub fn is_here(&self) -> bool {
        self.0.mark == fork::mark()
    }

    /// `run = 1`: merges in the background.
    ///
    /// # Errors
    /// [`Error::NeedsBarrier`] where nothing keeps a page still.
    pub fn start(&self) -> Result<(), Error> {
        self.set_run(RunMode::Merge)
    }

    /// `run = 0`: stops merging and keeps what is merged. Returns when the slice under way is done.
    ///
    /// # Errors
    /// Only a closed or forked engine.
    pub fn stop(&self) -> Result<(), Error> {
        self.set_run(RunMode::Stop)
    }

    /// The run mode.
    ///
    /// # Errors
    /// Only a closed or forked engine.
    pub fn run(&self) -> Result<RunMode, Error> {
        self.on(|engine| Ok(engine.scanner.run()))
    }

    /// Sets the run mode; 2 un-merges everything.
    ///
    /// # Errors
    /// [`Error::NeedsBarrier`]; [`Error::UnmergeMemory`] or [`Error::Unmerge`] when pages could not be
    /// given back: the mode is 0 then.
    pub fn set_run(&self, run: RunMode) -> Result<(), Error> {
        self.on(move |engine| engine.set_run(run))
    }

    /// The settings in force.
    ///
    /// # Errors
    /// Only a closed or forked engine.
    pub fn settings(&self) -> Result<EngineSettings, Error> {
        self.on(|engine| {
            let mut settings = engine.settings.clone();
            settings.scan.pages_to_scan = engine.scanner.pages_to_scan();
            Ok(settings)
        })
    }

    /// Replaces the settings; nothing is changed on error.
    ///
    /// # Errors
    /// The first setting that is out of range or cannot be changed now.
    pub fn set(&self, settings: EngineSettings) -> Result<(), Error> {
        self.on(move |engine| engine.set(&settings))
    }

    /// Changes the settings by `change`, which sees those in force; nothing is changed on error.
    /// What other threads and the advisor change at the same time is not lost.
    ///
    /// `change` runs on the merging thread: it must not call an engine, nor drop the last handle of one.
    ///
    /// # Errors
    /// As [`set`](Self::set).
    pub fn update(
        &self,
        change: impl FnOnce(&mut EngineSettings) + Send + 'static,
    ) -> Result<(), Error> {
        self.on(move |engine| {
            let mut settings = engine.settings.clone();
            change(&mut settings);
            engine.set(&settings)
        })
    }

    /// The counters now. Zero pages are checked against the page tables first.
    ///
    /// # Errors
    /// Only a closed, forked or unusable engine.
    pub fn stats(&self) -> Result<EngineStats, Error> {
        self.on(EngineState::stats)
    }

    /// One region's share, under the names of `/proc/PID/ksm_stat`.
    ///
    /// # Errors
    /// A region that is not registered.
    pub fn region_stats(&self, region: RegionHandle) -> Result<RegionStats, Error> {
        self.on(move |engine| {
            let id = engine.region(region)?;
            engine.space.begin_sweep(engine.scanner.has_swept());
            engine.scanner.refresh(&mut engine.space)?;
            engine.scanner.region_stats(id).ok_or(Error::NotRegistered)
        })
    }

    /// Records trace events from now on, or stops recording.
    ///
    /// # Errors
    /// Only a closed or forked engine.
    pub fn set_events(&self, on: bool) -> Result<(), Error> {
        let log = Arc::clone(&self.0.events);
        self.on(move |engine| {
            engine
                .scanner
                .set_trace(on.then(|| Box::new(LogSink(log)) as Box<dyn TraceSink>));
            Ok(())
        })
    }

    /// Takes the events recorded since last time, oldest first, and how many were dropped because
    /// nobody took them.
    pub fn take_events(&self) -> (Vec<Event>, u64) {
        if self.0.epoch != fork::epoch() {
            // The log may have been locked by a thread that the fork left behind.
            return (Vec::new(), 0);
        }
        let mut log = self.0.events.lock().unwrap_or_else(PoisonError::into_inner);
        let dropped = std::mem::take(&mut log.dropped);
        (log.events.drain(..).collect(), dropped)
    }

    /// Stops background merging and un-merges all regions but arenas: for whoever drops his handle of an
    /// engine whose arenas others still use. It ends with the last of them.
    ///
    /// # Errors
    /// As [`close`](Self::close). A closed engine is fine.
    pub fn release(&self) -> Result<(), Error> {
        match self.on(EngineState::release) {
            Err(Error::Closed) => Ok(()),
            other => other,
        }
    }

    /// Un-merges everything and ends the engine; later calls say [`Error::Closed`]. Closing twice
    /// is fine.
    ///
    /// # Errors
    /// [`Error::UnmergeMemory`] or [`Error::Unmerge`] when pages could not be given back; then the engine
    /// stays open.
    pub fn close(&self) -> Result<(), Error> {
        let id = self.0.id;
        match self.on(EngineState::close) {
            Ok(()) => {
                self.0.closed.store(true, Ordering::Relaxed);
                worker::call(move |stage| stage.remove(id))
            }
            Err(Error::Closed) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Whether a pass changed nothing that another pass could build on. `pages_unshared` and
/// `pages_volatile` trade places for ever under smart scan, so only what is merged counts, and
/// records that are still new.
fn at_rest(before: &Stats, after: &Stats) -> bool {
    let state = |s: &Stats| {
        (
            s.pages_shared,
            s.pages_sharing,
            s.ksm_zero_pages,
            s.rmap_items,
            s.pages_unshared + s.pages_volatile,
            s.pages_merged,
        )
    };
    state(before) == state(after)
}
