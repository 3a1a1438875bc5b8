//! `Scanner`: the engine's state, and what its owner may do with it between two steps.
//!
//! What belongs to one concern stands with that concern: stepping in `scan`, un-merging in `unmerge`.
//! Here are registering, settings, counters.

use crate::advisor::Advisor;
use crate::forest::Forest;
use crate::regions::{Life, Regions};
use crate::rmap::{Records, low32};
use crate::scan::{Batch, Cursor};
use crate::settings::KERNEL_PAGES_TO_SCAN;
use crate::stable_tree::StableNodes;
use crate::stats::{Counters, profit};
use crate::{
    AdvisorMode, Attempt, Content, Event, Look, PageId, PageSpace, Reason, RegionId, RegionStats,
    SettingError, Settings, Stats, Tick, TraceSink, TreeOrder, Work,
};
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use thiserror::Error;

/// What the engine does with its time: the kernel's `run` file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum RunMode {
    /// 0: nothing; what is merged stays merged.
    #[default]
    Stop,
    /// 1: scan and merge.
    Merge,
    /// 2: everything has been un-merged, and nothing is scanned.
    Unmerge,
}

/// A region as [`Scanner::register`] has taken it in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registered {
    /// Its name from now on.
    pub region: RegionId,
    /// Its first page; the others follow in ascending order.
    pub first: PageId,
}

/// What one step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepReport {
    /// Pages examined, at most the budget.
    pub examined: u32,
    /// Pages looked at to learn whether they have to be examined, those passed over included. A step
    /// ends early when this gets far ahead: see [`Scanner::set_look_limit`].
    pub looked: u32,
    /// Whether a full scan has ended with this step.
    pub full_scan_done: bool,
    /// Whether there was nothing to do: no region, or everything is un-merged on purpose.
    pub idle: bool,
}

/// Why a region was not registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// It has no pages.
    #[error("cannot register a region without a whole page in it")]
    NoPages,
    /// Page numbers are used up.
    #[error(
        "cannot register {pages} pages: the engine's page numbers are used up or too scattered; \
         unregister other regions first or use a second engine"
    )]
    Full {
        /// How many were asked for.
        pages: u32,
    },
}

/// Why a region was not unregistered.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum UnregisterError<E> {
    /// There is no such region, or it is unregistered already.
    #[error("cannot unregister region {0:?}: it is not registered")]
    NotRegistered(RegionId),
    /// Some pages could not be given their own copy. They stay merged, the region stays registered.
    /// Counted when each was tried: a write may have parted one of them since.
    #[error("cannot unregister the region: {pages} of its pages stay merged ({reason}); try again")]
    Refused {
        /// How many.
        pages: u32,
        /// Why, for the last of them.
        reason: Reason,
    },
    /// Memory failed as a whole.
    #[error(transparent)]
    Space(E),
}

/// Why not everything was un-merged. The run mode is [`RunMode::Stop`] then, as in the kernel.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum UnmergeError<E> {
    /// Some pages could not be given their own copy and stay merged.
    #[error("cannot un-merge everything: {pages} pages stay merged ({reason}); try again")]
    Refused {
        /// How many.
        pages: u32,
        /// Why, for the last of them.
        reason: Reason,
    },
    /// Memory failed as a whole.
    #[error(transparent)]
    Space(E),
}

/// Why settings were not changed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ChangeError<E> {
    /// A setting was not accepted.
    #[error(transparent)]
    Setting(#[from] SettingError),
    /// Memory failed as a whole.
    #[error(transparent)]
    Space(E),
}

/// The two trees of one domain and NUMA node.
#[derive(Clone, Debug, Default)]
pub(crate) struct TreePair {
    /// The stable tree.
    pub(crate) stable: Forest,
    /// The unstable tree.
    pub(crate) unstable: Forest,
}

impl TreePair {
    fn bytes(&self) -> usize {
        self.stable.bytes() + self.unstable.bytes()
    }
}

/// The engine: what is registered, what is known of each page, and how far the scan has come.
///
/// It owns no memory and no thread. Whoever drives it calls [`Scanner::step`] with a
/// [`PageSpace`] and the time, and sleeps in between as [`Settings::sleep_millisecs`] says.
#[doc(alias = "ksmd")]
pub struct Scanner {
    pub(crate) settings: Settings,
    /// What `pages_to_scan` is at present; the advisor rewrites it.
    pub(crate) pages_to_scan: u32,
    pub(crate) advisor: Advisor,
    pub(crate) trace: Option<Box<dyn TraceSink>>,
    pub(crate) run: RunMode,
    pub(crate) regions: Regions,
    pub(crate) records: Records,
    pub(crate) stable: StableNodes,
    pub(crate) trees: Vec<TreePair>,
    pub(crate) tree_of: BTreeMap<(u32, u16), u32>,
    pub(crate) cursor: Cursor,
    pub(crate) batch: Batch,
    pub(crate) counters: Counters,
    pub(crate) work: Work,
    /// Full scans completed (the kernel's `seqnr`).
    pub(crate) seq: u64,
    /// Whether a full scan has begun and not ended.
    pub(crate) in_scan: bool,
    /// Where the sweep at the beginning of a full scan goes on: region and page.
    pub(crate) sweeping: Option<(u32, u32)>,
    /// New frames whose nodes are still outside of the trees.
    pub(crate) waiting: Vec<u32>,
    /// Trees and hashes for which two contents have been told apart since the running scan began.
    pub(crate) clashes: BTreeSet<(u32, u64)>,
    /// There were more than are remembered.
    pub(crate) many_clashes: bool,
    /// How many pages a step may look at beyond those that it examines.
    pub(crate) look_limit: u32,
    /// How many of those are left to the running step.
    pub(crate) look_left: u32,
    /// How many it has looked at so far.
    pub(crate) looked: u32,
    /// Regions in the scan list that are not registered any more.
    pub(crate) lingering: u32,
    /// The hash of a page of zeroes, once one has been met.
    pub(crate) zero_hash: Option<u64>,
    /// The last sweep over merged and zero pages has come to its end.
    pub(crate) swept: bool,
    /// Nothing has come of the running scan so far: it has passed over all pages.
    pub(crate) idle_so_far: bool,
    /// Nothing came of the last scan, and nothing has been asked of this engine since.
    pub(crate) idle: bool,
    /// The time of the running step.
    pub(crate) now: Tick,
    pub(crate) page_size: usize,
}

/// How many pages a step looks at beyond those that it examines, unless asked otherwise.
const LOOK_LIMIT: u32 = 65_536;

impl std::fmt::Debug for Scanner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scanner")
            .field("settings", &self.settings)
            .field("run", &self.run)
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

impl Scanner {
    /// Makes an engine without regions.
    ///
    /// # Errors
    /// When a setting is out of range, or `pages_to_scan` is asked for while the advisor decides it.
    ///
    /// ```
    /// use pagemerge_core::{AdvisorMode, Scanner, Settings};
    /// let by_hand = Settings {
    ///     advisor_mode: AdvisorMode::None,
    ///     pages_to_scan: 4000,
    ///     ..Settings::default()
    /// };
    /// let mut scanner = Scanner::new(by_hand)?;
    /// let registered = scanner.register(256, "")?;
    /// assert_eq!(scanner.region_stats(registered.region).unwrap().ksm_rmap_items, 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn new(settings: Settings) -> Result<Self, SettingError> {
        settings.validate()?;
        let mut settings = settings;
        if settings.advisor_mode == AdvisorMode::ScanTime {
            let start = settings.advisor_start();
            let untouched = [
                start,
                KERNEL_PAGES_TO_SCAN,
                Settings::default().pages_to_scan,
            ];
            if !untouched.contains(&settings.pages_to_scan) {
                return Err(left_to_the_advisor(settings.pages_to_scan));
            }
            settings.pages_to_scan = start;
        }
        Ok(Self {
            pages_to_scan: settings.pages_to_scan,
            stable: StableNodes::new(settings.max_page_sharing),
            settings,
            advisor: Advisor::default(),
            trace: None,
            run: RunMode::Stop,
            regions: Regions::new(),
            records: Records::default(),
            trees: Vec::new(),
            tree_of: BTreeMap::new(),
            cursor: Cursor::default(),
            batch: Batch::default(),
            counters: Counters::default(),
            work: Work::default(),
            seq: 0,
            in_scan: false,
            sweeping: None,
            waiting: Vec::new(),
            clashes: BTreeSet::new(),
            many_clashes: false,
            look_limit: LOOK_LIMIT,
            look_left: 0,
            looked: 0,
            lingering: 0,
            zero_hash: None,
            swept: false,
            idle_so_far: false,
            idle: false,
            now: Tick(0),
            page_size: 4096,
        })
    }

    /// The settings, as they were asked for: see [`Settings`] on `pages_to_scan`.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// How many pages a batch should examine now: the setting, or what the advisor has made of it.
    pub fn pages_to_scan(&self) -> u32 {
        self.pages_to_scan
    }

    /// What the engine does with its time. [`Scanner::step`] works in any mode but `Unmerge`.
    pub fn run(&self) -> RunMode {
        self.run
    }

    /// Lets a step look at so many pages (at least 1) beyond those that it examines, before it returns
    /// without having used up its budget. Pages for which nothing has changed cost no budget, and there
    /// can be millions of them in a row; this is what bounds the time of a step over them. The default
    /// is 65,536.
    ///
    /// In content order, looking for broken frames when a scan begins is one piece, whatever the limit,
    /// as the counters are to be the kernel's.
    pub fn set_look_limit(&mut self, pages: u32) {
        self.look_limit = pages.max(1);
    }

    /// Sends trace events to `sink` from now on, or nowhere.
    pub fn set_trace(&mut self, sink: Option<Box<dyn TraceSink>>) {
        self.trace = sink;
    }

    /// Replaces the settings, field by field by the kernel's rules.
    ///
    /// # Errors
    /// When a value is out of range, or cannot change now. Nothing has changed then.
    pub fn change_settings<S: PageSpace>(
        &mut self,
        space: &mut S,
        new: Settings,
    ) -> Result<(), ChangeError<S::Error>> {
        self.stir();
        self.page_size = space.page_size();
        self.may_change(&new)?;
        let other_trees = self.settings.merge_across_nodes != new.merge_across_nodes
            || self.settings.tree_order != new.tree_order;
        if other_trees
            || self.settings.write_tracking != new.write_tracking
            || self.settings.zero_only != new.zero_only
        {
            // By the old ways, before the new ones hold. (With `zero_only` memory need not tell contents
            // apart, so no hash from then is believed.)
            self.absorb_window();
            self.disband_unstable_trees();
        }
        let old = std::mem::replace(&mut self.settings, new);
        let new = &mut self.settings;
        match (old.advisor_mode, new.advisor_mode) {
            (AdvisorMode::None, AdvisorMode::ScanTime) => {
                self.advisor = Advisor::default();
                new.pages_to_scan = new.advisor_start();
                self.pages_to_scan = new.pages_to_scan;
            }
            (AdvisorMode::ScanTime, AdvisorMode::None) => {
                if new.pages_to_scan == old.pages_to_scan {
                    new.pages_to_scan = KERNEL_PAGES_TO_SCAN;
                }
                self.pages_to_scan = new.pages_to_scan;
            }
            (AdvisorMode::None, AdvisorMode::None) => self.pages_to_scan = new.pages_to_scan,
            (AdvisorMode::ScanTime, AdvisorMode::ScanTime) => {}
        }
        let limit_changes = old.max_page_sharing != new.max_page_sharing;
        if other_trees || limit_changes {
            self.purge_stable_trees();
            self.drop_deserted_domains();
            for tree in &mut self.trees {
                debug_assert_eq!(tree.stable.len(), 0, "nothing is shared");
                tree.stable.begin_anew();
                if other_trees {
                    tree.unstable.begin_anew();
                }
            }
        }
        if limit_changes {
            // Nothing is shared, so nothing is left of the trees.
            self.stable
                .set_max_page_sharing(self.settings.max_page_sharing);
        }
        Ok(())
    }

    fn may_change(&self, new: &Settings) -> Result<(), SettingError> {
        new.validate()?;
        let old = &self.settings;
        let scan_time = AdvisorMode::ScanTime;
        if old.advisor_mode == scan_time
            && new.advisor_mode == scan_time
            && new.pages_to_scan != old.pages_to_scan
        {
            return Err(left_to_the_advisor(new.pages_to_scan));
        }
        let busy = |name, why: String| Err(SettingError::Busy { name, why });
        let shared = self.counters.shared;
        for (name, changes) in [
            (
                "max_page_sharing",
                new.max_page_sharing != old.max_page_sharing,
            ),
            (
                "merge_across_nodes",
                new.merge_across_nodes != old.merge_across_nodes,
            ),
            // Who asks for it relies on it: what is shared would stay so, and tell.
            ("zero_only", new.zero_only && !old.zero_only),
        ] {
            if changes && shared != 0 {
                return busy(
                    name,
                    format!("pages_shared is {shared}; un-merge everything first (run = 2)"),
                );
            }
        }
        if new.tree_order != old.tree_order && self.counters.items != 0 {
            let items = self.counters.items;
            return busy(
                "tree_order",
                format!("{items} pages have records; un-merge everything first (run = 2)"),
            );
        }
        Ok(())
    }

    /// Adds a region of `pages` pages to the scan list (`MADV_MERGEABLE`), just before the place that
    /// the scan has reached, so that the running scan does not visit it any more. Pages of different
    /// domains never share a frame.
    ///
    /// # Errors
    /// When it has no pages, or page numbers do not suffice.
    ///
    /// ```
    /// use pagemerge_core::{RegisterError, Scanner, Settings};
    /// let mut scanner = Scanner::new(Settings::default())?;
    /// let small = scanner.register(10, "tenant-a")?;
    /// let large = scanner.register(1 << 20, "tenant-b")?;
    /// // Pages are numbered through, in the order of their addresses.
    /// assert_eq!(small.first.plus(10), large.first);
    /// assert_eq!(scanner.stats().regions, 2);
    /// assert_eq!(scanner.register(0, ""), Err(RegisterError::NoPages));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "MADV_MERGEABLE")]
    pub fn register(&mut self, pages: u32, domain: &str) -> Result<Registered, RegisterError> {
        self.stir();
        if pages == 0 {
            return Err(RegisterError::NoPages);
        }
        let region = self
            .regions
            .add(pages, domain, self.cursor.region)
            .ok_or(RegisterError::Full { pages })?;
        self.records.reach(self.regions.page_end());
        self.emit(Event::Enter { mm: region });
        Ok(Registered {
            region,
            first: PageId(self.regions.get(region).first),
        })
    }

    /// The counters. `ksm_zero_pages` is as of the last look at the pages in question:
    /// [`Scanner::refresh`] makes it current.
    pub fn stats(&self) -> Stats {
        let c = &self.counters;
        let page = self.page_size as u64;
        let mut skipped = c.skipped_last;
        for (shown, now) in skipped.iter_mut().zip(c.skipped_now) {
            *shown = now.max(*shown);
        }
        Stats {
            pages_shared: c.shared,
            pages_sharing: c.sharing,
            pages_unshared: c.unshared,
            pages_volatile: c.items.saturating_sub(c.shared + c.sharing + c.unshared),
            pages_scanned: c.scanned,
            pages_skipped: c.smart_skipped,
            full_scans: self.seq,
            stable_node_chains: self.stable.chains,
            stable_node_dups: self.stable.dups,
            ksm_zero_pages: c.zero,
            general_profit: profit(c.sharing + c.zero, page, c.items),
            rmap_items: c.items,
            pages_merged: c.merged_ever,
            cow_broken: c.cow_broken,
            metadata_bytes: self.metadata_bytes() as u64,
            skipped,
            regions: self.regions.count() as u64,
        }
    }

    /// What the algorithm itself has had to do so far.
    pub fn work(&self) -> Work {
        self.work
    }

    /// The counters of one region, while it is in the scan list.
    pub fn region_stats(&self, region: RegionId) -> Option<RegionStats> {
        let region = self.regions.find(region)?;
        let (items, merging, zero) = (
            u64::from(region.items),
            u64::from(region.merging),
            u64::from(region.zero),
        );
        Some(RegionStats {
            ksm_rmap_items: items,
            ksm_zero_pages: zero,
            ksm_merging_pages: merging,
            ksm_process_profit: profit(merging + zero, self.page_size as u64, items),
            ksm_merge_any: false,
            ksm_mergeable: region.life == Life::Registered,
        })
    }

    fn metadata_bytes(&self) -> usize {
        size_of::<Self>()
            + self.records.bytes()
            + self.stable.bytes()
            + self.regions.bytes()
            + self.trees.capacity() * size_of::<TreePair>()
            + self.trees.iter().map(TreePair::bytes).sum::<usize>()
            + self.cursor.bytes()
            + self.batch.bytes()
            + self.waiting.capacity() * size_of::<u32>()
            + self.clashes.len() * 2 * size_of::<(u32, u64)>()
    }

    /// The trees of a domain and NUMA node.
    pub(crate) fn tree(&mut self, domain: u32, nid: u16) -> u32 {
        let next = low32(self.trees.len());
        let tree = *self.tree_of.entry((domain, nid)).or_insert(next);
        if tree == next {
            self.trees.push(TreePair::default());
        }
        tree
    }

    /// The order of one content of a tree before another, by the settings; `None` if it cannot be told.
    pub(crate) fn order<S: PageSpace>(
        &mut self,
        space: &mut S,
        tree: u32,
        (content, hash): (Content, u64),
        (other, key): (Content, u64),
    ) -> Result<Option<Ordering>, S::Error> {
        if self.settings.tree_order == TreeOrder::Digest && hash != key {
            return Ok(Some(hash.cmp(&key)));
        }
        let Attempt::Done(order) = space.compare(content, other)? else {
            return Ok(None);
        };
        if self.settings.keeps_unstable() && order != Ordering::Equal {
            self.clash(tree, hash);
        }
        Ok(Some(order))
    }

    /// Whether the last sweep over merged and zero pages, of a scan or of [`Scanner::refresh`], has come to
    /// its end.
    pub fn has_swept(&self) -> bool {
        self.swept
    }

    /// Looks at all merged and zero pages and takes note of those that are not any more, without any
    /// other effect: `ksm_zero_pages` is current afterwards, the lagging counters lag as before.
    ///
    /// # Errors
    /// When memory fails as a whole.
    pub fn refresh<S: PageSpace>(&mut self, space: &mut S) -> Result<(), S::Error> {
        self.page_size = space.page_size();
        // (Asked in any case: the answer is about the time since it was asked.)
        if space.is_still(Look::Sweep) && self.swept {
            return Ok(());
        }
        self.sweep_all(space)
    }
}

fn left_to_the_advisor(pages: u32) -> SettingError {
    SettingError::Invalid {
        name: "pages_to_scan",
        value: pages.to_string(),
        need: "be left to the advisor while advisor_mode is scan-time".into(),
    }
}
