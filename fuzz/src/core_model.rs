//! The scanner against a naive model of KSM: see [`crate::naive`] for what the model knows.
//!
//! An input is a choice of settings and a list of what happens: programs write, discard, register and
//! unregister; the scan goes on for some pages; settings and run modes change; and, in *rough* inputs,
//! requests are refused, pages are hidden, memory fails, and writes race with the scanner's own calls.
//!
//! # What is checked
//! * Always, after each event: every page reads what was last written to it; no frame is used that does
//!   not exist, nor released while it is shown (the toy memory sees to these); every invariant
//!   ([`check`](pagemerge_core::check)).
//! * Always, whenever all is looked at: the counters of what is shared say what is there.
//! * At rest: nothing is left that could merge, and with nothing merged before the counts of frames and
//!   sharers are those that the number of equal pages gives.
//! * As long as nothing rough has happened: after each step, which page shows what, and each counter, are
//!   those of the model.

use crate::naive::Model;
use crate::toy::{Bytes, Shown, World, ZERO, bytes};
use arbitrary::{Arbitrary, Unstructured};
use pagemerge_core::{
    AdvisorMode, Event, FrameId, PageId, Reason, RegionId, RunMode, Settings, TraceSink, TreeOrder,
    UnmergeError, UnregisterError,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

const DOMAINS: [&str; 3] = ["", "red", "blue"];
const MOST_REGIONS: usize = 6;
const MOST_PAGES: u8 = 12;

#[derive(Arbitrary, Debug)]
struct Setup {
    kernel: bool,
    smart_scan: bool,
    use_zero_pages: bool,
    max_page_sharing: u8,
    prune: bool,
    two_nodes: bool,
    advisor: bool,
    rough: bool,
}

#[derive(Arbitrary, Debug)]
enum Op {
    Register {
        pages: u8,
        domain: u8,
        contents: u32,
    },
    Write {
        page: u8,
        content: u8,
    },
    Discard {
        page: u8,
    },
    /// Discarded through the engine.
    Vacate {
        page: u8,
    },
    Step {
        budget: u8,
    },
    Scan,
    Unregister {
        region: u8,
    },
    Revive,
    Forget {
        region: u8,
    },
    Unmerge,
    Refresh,
    Rest,
    Smart,
    Zero,
    Limit {
        to: u8,
    },
    Rough(Rough),
}

#[derive(Arbitrary, Debug)]
enum Rough {
    Refuse {
        page: u8,
    },
    Bar {
        page: u8,
    },
    Hide {
        page: u8,
    },
    Outage {
        calls: u8,
        budget: u8,
    },
    /// Writes race with the calls of one step.
    Race {
        seed: u8,
        budget: u8,
    },
    Write {
        page: u8,
        content: u8,
        budget: u8,
    },
    Tracking,
    Order,
    Nodes,
    Hashes {
        bits: u8,
    },
    Looks {
        pages: u8,
    },
}

/// What the scanner says that it does.
#[derive(Default)]
struct Heard(Arc<Mutex<Vec<Event>>>);

impl TraceSink for Heard {
    fn event(&mut self, event: Event) {
        self.0.lock().expect("nobody panics with it").push(event);
    }
}

struct Case {
    world: World,
    model: Model,
    heard: Arc<Mutex<Vec<Event>>>,
    /// Region, first page, pages, domain.
    live: Vec<(RegionId, PageId, u32, usize)>,
    gone: Vec<(RegionId, PageId, u32, usize)>,
    rough: bool,
}

/// Runs the events that `input` describes.
///
/// # Panics
/// When something is wrong.
pub fn run(input: &[u8]) {
    let mut input = Unstructured::new(input);
    let Ok(setup) = Setup::arbitrary(&mut input) else {
        return;
    };
    let show = std::env::var_os("PAGEMERGE_SHOW").is_some();
    if show {
        println!("{setup:?}");
    }
    let mut case = Case::new(&setup);
    // (What is asked of an empty input is a zero, not an error.)
    while !input.is_empty()
        && let Ok(op) = Op::arbitrary(&mut input)
    {
        if show {
            println!("{op:?}");
        }
        case.event(&op);
        case.world.check();
        case.compare();
    }
    case.end();
}

impl Case {
    fn new(setup: &Setup) -> Self {
        let base = if setup.kernel {
            Settings::kernel_defaults()
        } else {
            Settings::default()
        };
        let settings = Settings {
            smart_scan: setup.smart_scan,
            use_zero_pages: setup.use_zero_pages,
            max_page_sharing: 2 + u32::from(setup.max_page_sharing % 4),
            stable_node_chains_prune_millisecs: if setup.prune { 0 } else { 5 },
            merge_across_nodes: !setup.two_nodes,
            advisor_mode: if setup.advisor {
                AdvisorMode::ScanTime
            } else {
                AdvisorMode::None
            },
            ..base
        };
        let mut world = World::new(settings.clone());
        world.toy.nodes = if setup.two_nodes { 2 } else { 1 };
        let heard = Heard::default();
        let list = Arc::clone(&heard.0);
        world.scanner.set_trace(Some(Box::new(heard)));
        Self {
            model: Model::new(setup.kernel, &settings, world.toy.nodes),
            world,
            heard: list,
            live: Vec::new(),
            gone: Vec::new(),
            rough: setup.rough,
        }
    }

    fn page(&self, number: u8) -> Option<PageId> {
        let all: u32 = self.live.iter().map(|it| it.2).sum();
        let mut at = u32::from(number).checked_rem(all)?;
        for &(_, first, pages, _) in &self.live {
            if at < pages {
                return Some(first.plus(at));
            }
            at -= pages;
        }
        None
    }

    fn content(number: u8) -> Bytes {
        match number % 6 {
            0 => ZERO,
            other => bytes(other.into()),
        }
    }

    fn write(&mut self, page: PageId, content: Bytes) {
        self.world.toy.write(page, content);
        self.model.write(page.0, Some(content));
    }

    fn event(&mut self, op: &Op) {
        match *op {
            Op::Register {
                pages,
                domain,
                contents,
            } if self.live.len() + self.gone.len() < MOST_REGIONS => {
                self.register(1 + u32::from(pages % MOST_PAGES), domain % 3, contents);
            }
            Op::Write { page, content } => {
                if let Some(page) = self.page(page) {
                    self.write(page, Self::content(content));
                }
            }
            Op::Discard { page } => {
                if let Some(page) = self.page(page) {
                    self.world.toy.discard(page);
                    self.model.write(page.0, None);
                }
            }
            Op::Vacate { page } => {
                if let Some(page) = self.page(page) {
                    self.removed();
                    self.world.toy.discard(page);
                    let World { scanner, toy, .. } = &mut self.world;
                    scanner.vacated(toy, page, 1).expect("the toy works");
                    let removed = self.removed();
                    self.model.vacated(page.0, &removed);
                }
            }
            Op::Step { budget } => self.step(u32::from(budget % 48)),
            Op::Scan => self.scan(),
            Op::Unregister { region } => self.unregister(region),
            Op::Revive => {
                if let Some(it) = self.gone.pop()
                    && self.world.scanner.revive(it.0)
                {
                    self.live.push(it);
                    self.model.revive(it.0);
                }
            }
            Op::Forget { region } => self.forget(region),
            Op::Unmerge => self.unmerge(),
            Op::Refresh => {
                self.refresh();
                self.true_counters();
            }
            Op::Rest => self.rest(),
            Op::Smart => self.change(|new| new.smart_scan ^= true),
            Op::Zero => self.change(|new| new.use_zero_pages ^= true),
            Op::Limit { to } => self.change(|new| new.max_page_sharing = 2 + u32::from(to % 4)),
            Op::Rough(ref rough) if self.rough => {
                self.model.exact = false;
                self.rough(rough);
            }
            Op::Rough(_) | Op::Register { .. } => {}
        }
    }

    fn register(&mut self, pages: u32, domain: u8, contents: u32) {
        let bytes: Vec<Option<Bytes>> = (0..pages)
            .map(|n| {
                let number = (contents >> (n % 8 * 4)) & 15;
                let number = u8::try_from(number).expect("four bits");
                (number != 15).then(|| Self::content(number))
            })
            .collect();
        let domain = usize::from(domain);
        let (region, first) = self.world.add_to(DOMAINS[domain], &bytes);
        self.live.push((region, first, pages, domain));
        // Names of regions are used again.
        self.gone.retain(|it| it.0 != region);
        self.model.register(region, first.0, domain, &bytes);
    }

    /// One step of the scanner, and of the model.
    fn step_once(&mut self, budget: u32) -> bool {
        self.heard.lock().expect("nobody panics with it").clear();
        let report = self.world.step(budget);
        let shown: BTreeMap<u32, FrameId> = (0..)
            .zip(&self.world.toy.pages)
            .filter_map(|(page, it)| match it.shown {
                Shown::Frame(frame) => Some((page, frame)),
                _ => None,
            })
            .collect();
        let removed = self.removed();
        let stats = self.world.scanner.stats();
        let done = self
            .model
            .step(budget, &shown, &removed, stats.pages_unshared);
        if self.model.exact {
            assert_eq!(report.full_scan_done, done, "the end of the scan");
        }
        report.full_scan_done
    }

    fn step(&mut self, budget: u32) {
        if !self.model.exact || !self.model.tree_may_lie() {
            self.step_once(budget);
            return;
        }
        // Page by page, so that what cannot be foreseen can be seen.
        for _ in 0..budget {
            let done = self.step_once(1);
            self.compare();
            if done || !self.model.exact {
                return;
            }
        }
    }

    fn scan(&mut self) {
        if self.world.scanner.stats().regions == 0 {
            return;
        }
        for _ in 0..10_000 {
            let before = self.world.scanner.stats().full_scans;
            let wary = self.model.exact && self.model.tree_may_lie();
            self.step(if wary { 1 } else { u32::MAX });
            let now = self.world.scanner.stats();
            if now.full_scans != before || now.regions == 0 {
                return;
            }
        }
        panic!("a full scan does not end");
    }

    /// The frames of which the scanner has said that they are removed.
    fn removed(&self) -> Vec<FrameId> {
        let mut heard = self.heard.lock().expect("nobody panics with it");
        heard
            .drain(..)
            .filter_map(|event| match event {
                Event::RemoveKsmPage { pfn } => Some(pfn),
                _ => None,
            })
            .collect()
    }

    fn refresh(&mut self) {
        let World { scanner, toy, .. } = &mut self.world;
        scanner.refresh(toy).expect("the toy works");
        self.model.refresh();
    }

    fn unregister(&mut self, region: u8) {
        if self.live.is_empty() {
            return;
        }
        let at = usize::from(region) % self.live.len();
        let it = self.live[at];
        self.removed();
        let World { scanner, toy, .. } = &mut self.world;
        match scanner.unregister(toy, it.0) {
            Ok(()) => {
                self.live.swap_remove(at);
                self.gone.push(it);
                let removed = self.removed();
                self.model.unregister(it.0, &removed);
            }
            Err(UnregisterError::Refused { .. }) => self.model.exact = false,
            Err(other) => panic!("{other}"),
        }
        if !self.world.scanner.settings().lagging_records {
            self.gone.clear();
        }
    }

    fn forget(&mut self, region: u8) {
        if self.live.is_empty() {
            return;
        }
        let at = usize::from(region) % self.live.len();
        let (region, first, pages, _) = self.live.swap_remove(at);
        self.removed();
        for page in (0..pages).map(|n| first.plus(n)) {
            self.world.toy.discard(page);
        }
        let World { scanner, toy, .. } = &mut self.world;
        scanner.forget(toy, region).expect("the toy works");
        let removed = self.removed();
        self.model.forget(region, &removed);
    }

    fn unmerge(&mut self) {
        let World { scanner, toy, .. } = &mut self.world;
        self.heard.lock().expect("nobody panics with it").clear();
        match scanner.set_run(toy, RunMode::Unmerge) {
            Ok(()) => {
                assert_eq!(scanner.stats().rmap_items, 0);
                assert!(toy.frames.is_empty(), "frames are left: {:?}", toy.frames);
                let clear = |page: &crate::toy::Page| {
                    page.refuses.is_none() && page.barred.is_none() && !page.hidden
                };
                let tame = toy.pages.iter().all(clear) && toy.hash_bits == 64;
                let stats = scanner.stats();
                let settings = scanner.settings().clone();
                self.model
                    .unmerge(&toy.pages, &settings, &stats, tame && !self.rough);
            }
            Err(UnmergeError::Refused { .. }) => self.model.exact = false,
            Err(other) => panic!("{other}"),
        }
        scanner
            .set_run(toy, RunMode::Merge)
            .expect("it un-merges nothing");
        self.removed();
    }

    fn change(&mut self, how: impl FnOnce(&mut Settings)) {
        let before = self.world.scanner.settings().clone();
        let mut new = before.clone();
        how(&mut new);
        self.removed();
        let World { scanner, toy, .. } = &mut self.world;
        if scanner.change_settings(toy, new).is_err() {
            assert_eq!(*scanner.settings(), before, "nothing changes on error");
            return;
        }
        let now = scanner.settings().clone();
        let removed = self.removed();
        self.model.change(&now, &removed);
    }

    fn rough(&mut self, rough: &Rough) {
        match *rough {
            Rough::Refuse { page } => {
                if let Some(page) = self.page(page) {
                    let it = &mut self.world.toy.pages[page.index()].refuses;
                    *it = it.is_none().then_some(Reason::Pinned);
                }
            }
            Rough::Bar { page } => {
                if let Some(page) = self.page(page) {
                    let it = &mut self.world.toy.pages[page.index()].barred;
                    *it = it.is_none().then_some(Reason::Mlocked);
                }
            }
            Rough::Hide { page } => {
                if let Some(page) = self.page(page) {
                    self.world.toy.pages[page.index()].hidden ^= true;
                }
            }
            Rough::Outage { calls, budget } => {
                self.world.toy.calls_left = Some(u32::from(calls % 32));
                // Whether it fails or not, everything is checked afterwards.
                let _ = self.world.try_step(budget.into());
                self.world.toy.calls_left = None;
            }
            Rough::Race { seed, budget } => {
                self.world.toy.racer = Some(crate::toy::Dice(seed.into()));
                self.world.step(budget.into());
                self.world.toy.racer = None;
            }
            Rough::Write {
                page,
                content,
                budget,
            } => {
                if let Some(page) = self.page(page) {
                    self.world.toy.race.push((page, Self::content(content)));
                    self.world.step(budget.into());
                    self.world.toy.race.clear();
                }
            }
            Rough::Tracking => self.change(|new| new.write_tracking ^= true),
            Rough::Order => self.change(|new| {
                new.tree_order = match new.tree_order {
                    TreeOrder::Digest => TreeOrder::Content,
                    TreeOrder::Content => TreeOrder::Digest,
                };
            }),
            Rough::Nodes => self.change(|new| new.merge_across_nodes ^= true),
            Rough::Hashes { bits } => {
                // One way of hashing for all that is known.
                if self.world.scanner.stats().rmap_items == 0 && self.live.is_empty() {
                    self.world.toy.hash_bits = 1 + u32::from(bits % 4);
                }
            }
            Rough::Looks { pages } => {
                self.world.scanner.set_look_limit(1 + u32::from(pages % 40));
            }
        }
    }

    /// Compares with the model.
    fn compare(&self) {
        if !self.model.exact {
            return;
        }
        for (page, it) in (0..).zip(&self.world.toy.pages) {
            self.model.assert_shows(page, it.shown);
        }
        self.model.assert_counters(&self.world.scanner.stats());
        for it in &self.live {
            let own = self.world.scanner.region_stats(it.0);
            self.model.assert_region(it.0, own.expect("a live region"));
        }
    }

    /// What is there, counted in memory: after a look at everything the counters must say so.
    fn true_counters(&self) {
        let stats = self.world.scanner.stats();
        let seen = |page: &&crate::toy::Page| !page.hidden;
        let pages = &self.world.toy.pages;
        if pages.iter().any(|page| page.hidden) {
            return;
        }
        let zero = pages
            .iter()
            .filter(seen)
            .filter(|it| it.shown == Shown::Zeroed);
        assert_eq!(stats.ksm_zero_pages, zero.count() as u64, "ksm_zero_pages");
        let mut sharers: BTreeMap<FrameId, u64> = BTreeMap::new();
        for page in pages {
            if let Shown::Frame(frame) = page.shown {
                *sharers.entry(frame).or_default() += 1;
            }
        }
        let there: BTreeSet<FrameId> = self.world.toy.frames.keys().copied().collect();
        let shown: BTreeSet<FrameId> = sharers.keys().copied().collect();
        assert_eq!(
            there, shown,
            "a frame that nobody shows, or one that is not there"
        );
        // What has parted is listed until the scan passes.
        let merged: u64 = sharers.values().sum();
        assert!(stats.pages_shared >= sharers.len() as u64, "{stats:?}");
        assert!(
            stats.pages_shared + stats.pages_sharing >= merged,
            "{stats:?}"
        );
    }

    /// Ends all trouble, scans until everything stands still, and checks that nothing is left to do.
    fn rest(&mut self) {
        for page in &mut self.world.toy.pages {
            (page.refuses, page.barred, page.hidden) = (None, None, false);
        }
        if self.live.is_empty() {
            return;
        }
        self.change(|new| new.smart_scan = false);
        let fresh = self.world.scanner.stats().rmap_items == 0;
        let before: Vec<_> = self.world.toy.pages.clone();
        for _ in 0..7 {
            self.scan();
            self.compare();
        }
        let row = self.world.row();
        self.scan();
        assert_eq!(self.world.row(), row, "it does not come to rest");
        self.refresh();
        self.true_counters();

        let settings = self.world.scanner.settings().clone();
        let stats = self.world.scanner.stats();
        let max = settings.max_page_sharing as usize;
        // The pages that may share a frame: those alone, and the sharers of each frame.
        let mut groups: BTreeMap<_, (usize, BTreeMap<FrameId, usize>)> = BTreeMap::new();
        let mut zeroes = 0;
        for &(_, first, pages, domain) in &self.live {
            for page in (0..pages).map(|n| first.plus(n)) {
                let it = self.world.toy.pages[page.index()];
                assert_eq!(it.bytes, before[page.index()].bytes);
                let nid = if settings.merge_across_nodes {
                    0
                } else {
                    self.world.toy.nid(page).0
                };
                let group = groups.entry((domain, nid, it.bytes)).or_default();
                match it.shown {
                    Shown::Nothing => {}
                    Shown::Zeroed => zeroes += 1,
                    Shown::Own => group.0 += 1,
                    Shown::Frame(frame) => *group.1.entry(frame).or_default() += 1,
                }
            }
        }
        let (mut shared, mut sharing, mut alone) = (0, 0, 0);
        for ((.., content), (single, frames)) in &groups {
            let zero = *content == ZERO && settings.use_zero_pages;
            assert!(
                *single <= 1 && !(zero && *single > 0),
                "{content:?}: {single} not merged"
            );
            let full = frames.values().all(|&sharers| sharers >= max);
            assert!(
                *single == 0 || full,
                "{content:?}: one is alone, {frames:?} have room"
            );
            if fresh {
                // The kernel's own sum: full frames, one more for a rest of two or more.
                let all = single + frames.values().sum::<usize>();
                let frames_due = all / max + usize::from(all % max > 1);
                assert_eq!((*single == 1, frames.len()), (all % max == 1, frames_due));
            }
            shared += frames.len() as u64;
            sharing += frames.values().sum::<usize>() as u64 - frames.len() as u64;
            alone += *single as u64;
        }
        assert_eq!(
            (
                stats.pages_shared,
                stats.pages_sharing,
                stats.pages_unshared
            ),
            (shared, sharing, alone),
            "{groups:?}"
        );
        assert_eq!((stats.pages_volatile, stats.ksm_zero_pages), (0, zeroes));
    }

    /// Un-merges everything: nothing may be left.
    fn end(mut self) {
        for page in &mut self.world.toy.pages {
            (page.refuses, page.barred, page.hidden) = (None, None, false);
        }
        while !self.live.is_empty() {
            self.unregister(0);
        }
        for _ in 0..2 {
            self.scan();
        }
        self.world.check();
        self.compare();
        let stats = self.world.scanner.stats();
        assert_eq!(
            (stats.rmap_items, stats.regions, stats.ksm_zero_pages),
            (0, 0, 0)
        );
        assert!(
            self.world.toy.frames.is_empty(),
            "{:?}",
            self.world.toy.frames
        );
    }
}
