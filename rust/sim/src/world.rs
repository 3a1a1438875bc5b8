//! `World`: one simulated run. A program that writes, a scanner that merges, memory in between, and
//! everything that must hold after each event.
//!
//! The seed decides settings, habits of memory and temper of the program; events come from the seed's
//! stream, or from a script when a failure is replayed.

use crate::event::{Event, Flavour, Op, Temper};
use crate::fault::{Action, Faults, Remerge};
use crate::model;
use crate::rng::Rng;
use crate::space::{Backing, Habits, SimSpace};
use pagemerge_core::{
    AdvisorMode, ChangeError, Clock, FrameId, PageId, RegionId, RunMode, Scanner, SettingError,
    Settings, StepReport, Tick, TraceSink, TreeOrder, UnmergeError, UnregisterError, check,
};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

/// Keeps every trace event, so that two runs can be compared.
#[derive(Clone, Debug, Default)]
struct Recorder(Arc<Mutex<Vec<pagemerge_core::Event>>>);

impl TraceSink for Recorder {
    fn event(&mut self, event: pagemerge_core::Event) {
        self.0
            .lock()
            .expect("no holder of this lock can panic")
            .push(event);
    }
}

/// How much of what can happen did happen in a run: a test that never saw a lost race or a full chain
/// has proved nothing about them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Full scans.
    pub passes: u64,
    /// Merges done.
    pub merges: u64,
    /// Merged pages that were seen to have been written.
    pub broken: u64,
    /// Writers that got in between.
    pub races: u64,
    /// Requests that did not end as done.
    pub refusals: u64,
    /// Failures of the space as a whole.
    pub errors: u64,
    /// Times that everything came to rest and the counters were what the contents say.
    pub settled: u64,
    /// Most chains seen at once.
    pub chains: u64,
    /// Most zero pages seen at once.
    pub zero_pages: u64,
}

impl std::ops::AddAssign for Coverage {
    fn add_assign(&mut self, other: Self) {
        self.passes += other.passes;
        self.merges += other.merges;
        self.broken += other.broken;
        self.races += other.races;
        self.refusals += other.refusals;
        self.errors += other.errors;
        self.settled += other.settled;
        self.chains = self.chains.max(other.chains);
        self.zero_pages = self.zero_pages.max(other.zero_pages);
    }
}

/// One simulated run.
#[derive(Debug)]
pub struct World {
    temper: Temper,
    rng: Rng,
    script: Option<VecDeque<Event>>,
    events: Vec<Event>,
    scanner: Scanner,
    space: SimSpace,
    clock: Clock,
    faults: Faults,
    retired: Vec<RegionId>,
    recorder: Recorder,
    coverage: Coverage,
}

impl World {
    /// The run of `seed`, drawing its own events.
    ///
    /// # Panics
    /// When the scanner does not accept settings that are in range.
    #[must_use]
    pub fn new(flavour: Flavour, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let temper = Temper::draw(flavour, &mut rng);
        let settings = draw_settings(&mut rng);
        let habits = draw_habits(flavour, &mut rng);
        let mut scanner = Scanner::new(settings.clone()).expect("drawn settings are in range");
        let recorder = Recorder::default();
        scanner.set_trace(Some(Box::new(recorder.clone())));
        let mut space = SimSpace::new(habits);
        space.set_rules(settings.max_page_sharing, settings.merge_across_nodes);
        Self {
            temper,
            // A stream of its own, so that a new setting or habit does not change every seed's events.
            rng: Rng::new(!seed),
            script: None,
            events: Vec::new(),
            scanner,
            space,
            clock: Clock {
                now: Tick(1_000),
                cpu_nanos: 0,
            },
            faults: Faults::default(),
            retired: Vec::new(),
            recorder,
            coverage: Coverage::default(),
        }
    }

    /// The run of `seed` in which these events happen and no others.
    #[must_use]
    pub fn scripted(flavour: Flavour, seed: u64, script: &[Event]) -> Self {
        Self {
            script: Some(script.iter().copied().collect()),
            ..Self::new(flavour, seed)
        }
    }

    /// Whether there is another event to come.
    #[must_use]
    pub fn goes_on(&self) -> bool {
        match &self.script {
            Some(script) => !script.is_empty(),
            None => self.events.len() <= self.temper.events,
        }
    }

    /// Lets the next event happen, if there is one. The last event of a run that is not scripted is
    /// always [`Op::Settle`].
    ///
    /// # Panics
    /// When something that must hold at the end of this kind of event does not.
    pub fn random_event(&mut self) {
        if !self.goes_on() {
            return;
        }
        let event = match &mut self.script {
            Some(script) => script.pop_front().expect("goes_on said so"),
            None if self.events.len() == self.temper.events => Event {
                seed: self.rng.bits(),
                op: Op::Settle,
            },
            None => self.temper.event(&mut self.rng),
        };
        // Recorded before it happens: the last one in the list is the one that failed.
        self.events.push(event);
        self.perform(event);
    }

    /// Everything that must hold between any two events.
    ///
    /// # Panics
    /// When it does not, naming it.
    pub fn verify(&mut self) {
        self.assert_reads_match();
        self.assert_consistent();
    }

    /// The oracle: every page reads as it was last written.
    ///
    /// # Panics
    /// When one does not.
    pub fn assert_reads_match(&self) {
        self.space.assert_reads_match();
    }

    /// The scanner's invariants, and its counters where they must be exact at any time.
    ///
    /// # Panics
    /// When one does not hold.
    pub fn assert_consistent(&mut self) {
        check::assert_all(&self.scanner);
        self.space.calmly(
            |space| match check::all_with_contents(&self.scanner, space) {
                Ok(Ok(())) => {}
                Ok(Err(broken)) => panic!("{broken}"),
                Err(error) => panic!("the space failed without an order: {error}"),
            },
        );
        let stats = self.scanner.stats();
        let known = stats.pages_shared + stats.pages_sharing + stats.pages_unshared;
        assert_eq!(
            stats.rmap_items,
            known + stats.pages_volatile,
            "every record is in exactly one state: {stats:?}"
        );
        assert!(
            self.space.truth().merged <= stats.pages_shared + stats.pages_sharing,
            "more pages are merged ({:?}) than are counted: {stats:?}",
            self.space.truth()
        );
        assert!(
            self.space.truth().zeroed <= stats.ksm_zero_pages,
            "more pages are on the zero page ({:?}) than are counted: {stats:?}",
            self.space.truth()
        );
        self.coverage.chains = self.coverage.chains.max(stats.stable_node_chains);
        self.coverage.zero_pages = self.coverage.zero_pages.max(stats.ksm_zero_pages);
    }

    /// What has happened so far.
    #[must_use]
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    /// What the scanner has traced so far.
    ///
    /// # Panics
    /// Never: no holder of the recorder's lock can panic.
    #[must_use]
    pub fn traced(&self) -> Vec<pagemerge_core::Event> {
        self.recorder
            .0
            .lock()
            .expect("no holder of this lock can panic")
            .clone()
    }

    /// What the run has been through.
    #[must_use]
    pub fn coverage(&self) -> Coverage {
        Coverage {
            merges: self.scanner.stats().pages_merged,
            broken: self.scanner.stats().cow_broken,
            races: self.space.interference().0,
            refusals: self.space.refusals(),
            errors: self.space.errors_injected(),
            ..self.coverage
        }
    }

    /// The scanner.
    #[must_use]
    pub fn scanner(&self) -> &Scanner {
        &self.scanner
    }

    /// The memory.
    #[must_use]
    pub fn space(&self) -> &SimSpace {
        &self.space
    }

    // ------------------------------------------------------------------------- events

    fn perform(&mut self, event: Event) {
        self.space.set_faults(self.faults, event.seed);
        let mut rng = Rng::new(!event.seed);
        match event.op {
            Op::Act { page, action } => {
                if let Some(page) = self.space.nth_page(page) {
                    self.space.act(page, action);
                }
            }
            Op::Fill {
                page,
                pages,
                value,
                stride,
            } => self.fill(page, pages, value, stride),
            Op::Race {
                points,
                page,
                action,
            } => self.space.arm(points, page, action),
            Op::Step { budget } => {
                self.step(budget);
            }
            Op::Pass => {
                self.pass(&mut rng);
            }
            Op::Register { pages, domain } => self.register(pages, domain, &mut rng),
            Op::Unregister { region } => self.unregister(region),
            Op::Revive { region } => self.revive(region),
            Op::Forget { region } => self.forget(region),
            Op::Discard { page, pages, tell } => self.discard(page, pages, tell),
            Op::Dissolve { page, pages } => self.dissolve(page, pages),
            Op::Settings => self.change_settings(&mut rng),
            Op::Run(mode) => self.set_run(mode),
            Op::Refresh => self.refresh(),
            Op::Wait { millisecs } => self.clock.now.0 += u64::from(millisecs),
            Op::Faults(faults) => self.faults = faults,
            Op::Settle => self.settle(&mut rng),
        }
        if self.faults.are_off() {
            self.space.set_faults(Faults::default(), 0);
        }
    }

    fn fill(&mut self, page: u32, pages: u8, value: u8, stride: u8) {
        for number in 0..pages {
            let Some(page) = self.space.nth_page(page.wrapping_add(number.into())) else {
                return;
            };
            let value = value.wrapping_add(number.wrapping_mul(stride)) % 32;
            self.space.act(page, Action::Write(value));
        }
    }

    /// One step; none if the space failed by order.
    fn step(&mut self, budget: u32) -> Option<StepReport> {
        let errors = self.space.errors_injected();
        let before = self.scanner.stats();
        self.clock.now.0 += 1;
        match self.scanner.step(&mut self.space, self.clock, budget) {
            Ok(report) => {
                let after = self.scanner.stats();
                assert!(
                    report.examined <= budget,
                    "{report:?} goes beyond the budget {budget}"
                );
                assert_eq!(
                    after.pages_scanned - before.pages_scanned,
                    u64::from(report.examined),
                    "pages_scanned counts examinations"
                );
                assert_eq!(
                    after.full_scans - before.full_scans,
                    u64::from(report.full_scan_done),
                    "full_scans counts completed passes"
                );
                if self.scanner.run() == RunMode::Unmerge {
                    assert!(
                        report.idle && report.examined == 0,
                        "run=2 scanned: {report:?}"
                    );
                }
                self.clock.cpu_nanos += u64::from(report.examined) * 1_000;
                self.coverage.passes += u64::from(report.full_scan_done);
                Some(report)
            }
            Err(error) => {
                assert!(
                    self.space.errors_injected() > errors,
                    "the step failed although the space did not: {error}"
                );
                None
            }
        }
    }

    /// Steps until a full scan is done. False if that cannot be: no regions, everything un-merged
    /// on purpose, or the space failed by order.
    fn pass(&mut self, rng: &mut Rng) -> bool {
        let budgets: &[u32] = &[1, 3, 10, 100, 600, u32::MAX];
        let pages: u32 = self.space.regions().map(|(_, _, pages, _)| pages).sum();
        let budget = rng.pick(&budgets[usize::from(pages > 200) * 3..]);
        for _ in 0..u64::from(pages) * 2 + 64 {
            match self.step(budget) {
                None => return false,
                Some(report) if report.idle => return false,
                Some(report) if report.full_scan_done => return true,
                Some(_) => {}
            }
        }
        panic!("a full scan of {pages} pages did not end, with a budget of {budget}");
    }

    fn register(&mut self, pages: u32, domain: u8, rng: &mut Rng) {
        let known: u32 = self.space.regions().map(|(_, _, pages, _)| pages).sum();
        if known + pages > self.temper.all_pages {
            return;
        }
        let domain = ["", "tenant-a", "tenant-b"][usize::from(domain) % 3];
        let new = self
            .scanner
            .register(pages, domain)
            .expect("page numbers are not used up");
        self.space.add_region(new.region, new.first, pages, domain);
        let live = |space: &SimSpace, id| space.regions().any(|(other, ..)| other == id);
        self.retired
            .retain(|id| *id != new.region && live(&self.space, *id));
        // Most programs bring their data with them.
        if rng.below(4) > 0 {
            let (value, contents) = (rng.below(12), 1 + rng.below(6));
            for page in 0..pages {
                let value = (value + rng.below(contents)) % 16;
                let value = u8::try_from(value).expect("below 16");
                self.space.act(new.first.plus(page), Action::Write(value));
            }
        }
    }

    fn nth_live(&self, number: u32) -> Option<(RegionId, PageId, u32)> {
        let live: Vec<_> = self.space.regions().filter(|(.., live)| *live).collect();
        let (region, first, pages, _) = *live.get(number as usize % live.len().max(1))?;
        Some((region, first, pages))
    }

    fn unregister(&mut self, number: u32) {
        let Some((region, ..)) = self.nth_live(number) else {
            return;
        };
        let errors = self.space.errors_injected();
        match self.scanner.unregister(&mut self.space, region) {
            Ok(()) => {
                // What was read before is read now, even though nothing of it is shared any more.
                self.space.assert_reads_match();
                self.space.retire_region(region);
                if self.scanner.settings().lagging_records {
                    self.retired.push(region);
                } else {
                    self.space.remove_region(region);
                }
            }
            Err(UnregisterError::Refused { pages, reason }) => {
                // A page that was refused may have been written since, and is not merged any more.
                let stuck = self.stuck(region);
                assert!(
                    u64::from(pages) >= stuck,
                    "{pages} pages of {region:?} stay, and not {stuck}: {reason}"
                );
            }
            Err(UnregisterError::Space(error)) => {
                assert!(
                    self.space.errors_injected() > errors,
                    "not by order: {error}"
                );
            }
            Err(other) => panic!("{other}"),
        }
    }

    fn dissolve(&mut self, page: u32, pages: u8) {
        let shown = (0..pages)
            .filter_map(|number| self.space.nth_page(page.wrapping_add(number.into())))
            .filter_map(|page| self.space.shows(page));
        // Twice, and one that never was: neither may matter.
        let mut frames: Vec<FrameId> = shown.chain([FrameId(u32::MAX - 1)]).collect();
        frames.extend(frames.first().copied());
        let errors = self.space.errors_injected();
        match self.scanner.dissolve(&mut self.space, &frames) {
            Ok(kept) => {
                let still = model::merged(
                    &self.space.view(),
                    |page| matches!(page.backing, Backing::Frame(frame) if frames.contains(&frame)),
                );
                assert!(still <= u64::from(kept), "{still} pages stay, not {kept}");
            }
            Err(error) => assert!(
                self.space.errors_injected() > errors,
                "not by order: {error}"
            ),
        }
    }

    /// Pages of the region that are merged in one way or the other.
    fn stuck(&self, region: RegionId) -> u64 {
        model::merged(&self.space.view(), |page| page.region == region)
    }

    fn revive(&mut self, number: u32) {
        if self.retired.is_empty() {
            return;
        }
        let region = self
            .retired
            .swap_remove(number as usize % self.retired.len());
        if self.scanner.revive(region) {
            self.space.revive_region(region);
        } else {
            self.space.remove_region(region);
        }
    }

    /// The owner frees the memory: nothing is mapped there by the time the scanner hears of it.
    fn forget(&mut self, number: u32) {
        let Some((region, first, pages)) = self.nth_live(number) else {
            return;
        };
        for page in 0..pages {
            self.space.act(first.plus(page), Action::Discard);
        }
        let errors = self.space.errors_injected();
        if let Err(error) = self.scanner.forget(&mut self.space, region) {
            assert!(
                self.space.errors_injected() > errors,
                "not by order: {error}"
            );
            // Dead memory cannot be held back by an error: the owner tries again.
            self.space.set_faults(Faults::default(), 0);
            self.scanner
                .forget(&mut self.space, region)
                .expect("forgetting again works when nothing fails");
        }
        assert!(
            self.scanner
                .region_stats(region)
                .is_none_or(|stats| !stats.ksm_mergeable),
            "{region:?} is still registered after it was forgotten"
        );
        self.space.remove_region(region);
    }

    fn discard(&mut self, page: u32, pages: u8, tell: bool) {
        let Some(start) = self.space.nth_page(page) else {
            return;
        };
        let (_, first, length, live) = self
            .space
            .regions()
            .find(|(_, first, length, _)| (*first..first.plus(*length)).contains(&start))
            .expect("nth_page names a page of a region");
        let pages = u32::from(pages).min(first.0 + length - start.0);
        for page in 0..pages {
            self.space.act(start.plus(page), Action::Discard);
        }
        if tell && live {
            let errors = self.space.errors_injected();
            if let Err(error) = self.scanner.vacated(&mut self.space, start, pages) {
                assert!(
                    self.space.errors_injected() > errors,
                    "not by order: {error}"
                );
            }
        }
    }

    fn change_settings(&mut self, rng: &mut Rng) {
        let old = self.scanner.settings().clone();
        let mut new = old.clone();
        for _ in 0..=rng.below(3) {
            match rng.below(12) {
                0 | 1 => new.max_page_sharing = rng.pick(&[0, 1, 2, 3, 5, 256, u32::MAX]),
                2 => new.merge_across_nodes ^= true,
                3 => new.use_zero_pages ^= true,
                4 => new.smart_scan ^= true,
                5 => new.stable_node_chains_prune_millisecs = rng.pick(&[0, 2000, u32::MAX]),
                6 => new.pages_to_scan = rng.pick(&[0, 10, 100]),
                7 => new.advisor_mode = rng.pick(&[AdvisorMode::None, AdvisorMode::ScanTime]),
                8 => new.advisor_target_scan_time = u64::from(rng.below(3)),
                9 => new.write_tracking ^= true,
                10 => new.tree_order = rng.pick(&[TreeOrder::Digest, TreeOrder::Content]),
                _ => new.advisor_max_cpu = rng.below(200),
            }
        }
        let shared = self.scanner.stats().pages_shared;
        let structural = new.max_page_sharing != old.max_page_sharing
            || new.merge_across_nodes != old.merge_across_nodes;
        let out_of_range = !(2..=2_147_483_647).contains(&new.max_page_sharing)
            || new.advisor_target_scan_time == 0;
        let (errors, outcome) = (
            self.space.errors_injected(),
            self.scanner.change_settings(&mut self.space, new.clone()),
        );
        match outcome {
            Ok(()) => {
                assert!(!out_of_range, "{new:?} was accepted");
                assert!(
                    !structural || shared == 0,
                    "{new:?} was accepted with {shared} frames"
                );
                self.space
                    .set_rules(new.max_page_sharing, new.merge_across_nodes);
            }
            Err(ChangeError::Space(error)) => {
                assert!(
                    self.space.errors_injected() > errors,
                    "not by order: {error}"
                );
                let now = self.scanner.settings();
                self.space
                    .set_rules(now.max_page_sharing, now.merge_across_nodes);
            }
            Err(ChangeError::Setting(error)) => {
                assert_eq!(
                    *self.scanner.settings(),
                    old,
                    "a refused change changed something"
                );
                if let SettingError::Busy { name, .. } = &error
                    && ["max_page_sharing", "merge_across_nodes"].contains(name)
                {
                    assert!(structural && shared > 0, "{error}, with {shared} frames");
                }
            }
            Err(other) => panic!("{other}"),
        }
    }

    fn set_run(&mut self, mode: RunMode) {
        let errors = self.space.errors_injected();
        let before = self.scanner.run();
        match self.scanner.set_run(&mut self.space, mode) {
            Ok(()) => {
                assert_eq!(self.scanner.run(), mode);
                if mode == RunMode::Unmerge && before != mode {
                    let (stats, truth) = (self.scanner.stats(), self.space.truth());
                    let left = stats.rmap_items
                        + stats.full_scans
                        + stats.ksm_zero_pages
                        + stats.stable_node_chains
                        + stats.stable_node_dups;
                    assert_eq!(left, 0, "everything is un-merged, but {stats:?}");
                    assert_eq!(truth.merged + truth.zeroed, 0, "left merged: {truth:?}");
                }
            }
            Err(UnmergeError::Space(error)) => {
                assert!(
                    self.space.errors_injected() > errors,
                    "not by order: {error}"
                );
            }
            Err(UnmergeError::Refused { pages, reason }) => {
                let truth = self.space.truth();
                let stuck = truth.merged + truth.zeroed;
                assert!(
                    u64::from(pages) >= stuck,
                    "{pages} pages stay merged, and not {stuck}: {reason}"
                );
                assert_eq!(
                    self.scanner.run(),
                    RunMode::Stop,
                    "a failed unmerge stops the scan"
                );
            }
            Err(other) => panic!("{other}"),
        }
    }

    /// Only the zero pages' counter may move, and then it must be right.
    fn refresh(&mut self) {
        let before = self.scanner.stats();
        let errors = self.space.errors_injected();
        self.space.disarm();
        match self.scanner.refresh(&mut self.space) {
            Ok(()) => {
                let after = self.scanner.stats();
                assert_eq!(after.ksm_zero_pages, self.space.truth().zeroed, "refreshed");
                let lagging = |stats: pagemerge_core::Stats| {
                    [
                        stats.pages_shared,
                        stats.pages_sharing,
                        stats.pages_unshared,
                        stats.pages_volatile,
                        stats.rmap_items,
                        stats.stable_node_chains,
                        stats.stable_node_dups,
                        stats.full_scans,
                        stats.pages_scanned,
                    ]
                };
                assert_eq!(
                    lagging(before),
                    lagging(after),
                    "refreshing moved a lagging counter"
                );
            }
            Err(error) => {
                assert!(
                    self.space.errors_injected() > errors,
                    "not by order: {error}"
                );
            }
        }
    }

    // ------------------------------------------------------------------------- at rest

    /// Ends all trouble, scans until nothing changes, and compares with the model.
    fn settle(&mut self, rng: &mut Rng) {
        self.faults = Faults::default();
        self.space.set_faults(self.faults, 0);
        self.space.disarm();
        self.space.cure();
        if self.scanner.run() == RunMode::Unmerge {
            self.set_run(RunMode::Merge);
        }
        // Smart scan may keep two equal pages from ever meeting (as in the kernel), so what is
        // reached at rest is a question to the algorithm without it.
        let smart = self.scanner.settings().smart_scan;
        self.set_smart_scan(false);
        let patience = 3 + match self.space.habits().remerge {
            Remerge::Quiet(looks) => u32::from(looks),
            Remerge::Always | Remerge::Never => 0,
        };
        let (mut calm, mut last) = (0, None);
        for _ in 0..60 {
            if !self.pass(rng) {
                break;
            }
            self.verify();
            let stats = self.scanner.stats();
            let figures = [
                stats.pages_shared,
                stats.pages_sharing,
                stats.pages_unshared,
                stats.pages_volatile,
                stats.ksm_zero_pages,
                stats.stable_node_dups,
                stats.pages_merged,
            ];
            calm = if last == Some(figures) { calm + 1 } else { 0 };
            last = Some(figures);
            if calm >= patience {
                break;
            }
        }
        if self.nth_live(0).is_some() {
            assert!(
                calm >= patience,
                "the scan does not come to rest: {:?}",
                self.scanner.stats()
            );
            self.refresh();
            model::assert_at_rest(&self.scanner, &self.space);
            self.coverage.settled += 1;
        }
        self.set_smart_scan(smart);
    }

    fn set_smart_scan(&mut self, on: bool) {
        let settings = Settings {
            smart_scan: on,
            ..self.scanner.settings().clone()
        };
        self.scanner
            .change_settings(&mut self.space, settings)
            .expect("smart_scan may change at any time");
    }
}

fn draw_settings(rng: &mut Rng) -> Settings {
    let base = if rng.below(2) == 0 {
        Settings::default()
    } else {
        Settings::kernel_defaults()
    };
    let mut settings = Settings {
        max_page_sharing: rng.pick(&[2, 2, 3, 4, 5, 8, 256]),
        stable_node_chains_prune_millisecs: rng.pick(&[0, 0, 2000, u32::MAX]),
        use_zero_pages: rng.below(2) == 0,
        smart_scan: rng.below(2) == 0,
        merge_across_nodes: rng.below(3) > 0,
        advisor_mode: rng.pick(&[AdvisorMode::None, AdvisorMode::ScanTime]),
        advisor_target_scan_time: rng.pick(&[1, 2, 200]),
        ..base
    };
    // Also the mixtures that neither set of defaults has.
    match rng.below(6) {
        0 => settings.tree_order = TreeOrder::Content,
        1 => settings.tree_order = TreeOrder::Digest,
        2 => settings.write_tracking ^= true,
        3 => settings.lagging_records ^= true,
        _ => {}
    }
    settings
}

fn draw_habits(flavour: Flavour, rng: &mut Rng) -> Habits {
    Habits {
        page_size: rng.pick(&[16, 64, 64, 80]),
        key: rng.bits(),
        digest_bits: rng.pick(&[0, 1, 2, 4, 64, 64]),
        tracking: rng.below(4) > 0,
        tracking_broken: rng.below(2) == 0,
        sweep_tells: rng.below(2) == 0,
        remerge: match (flavour, rng.below(6)) {
            (_, 0) => Remerge::Never,
            (_, 1) => Remerge::Quiet(1 + u8::try_from(rng.below(4)).expect("below 4")),
            _ => Remerge::Always,
        },
        remerge_late: rng.below(3) == 0,
        nodes: rng.pick(&[1, 2, 3]),
        // New habits are drawn last, so that the event lists of earlier failures can still be replayed.
        promotes_blindly: rng.below(3) == 0,
    }
}
