//! `SimSpace`: memory made of vectors, which keeps its promises and sees to it that the scanner
//! keeps its own.
//!
//! Two memories live side by side. One is what the program wrote last, a plain copy for each page:
//! the oracle. The other is what merging has made of it: absent, the zero page, a frame, or bytes of
//! its own. [`SimSpace::assert_reads_match`] says that a reader cannot tell them apart.
//!
//! # Invariants
//! * M1. A frame's bytes never change between the `Promote` that made it and its release; there is no
//!   code that could change them.
//! * M2. A page shows a frame only if their bytes were equal at that moment, in `apply`, after every
//!   writer of that moment had its turn.
//! * M3. All sharers of a frame are in the domain (and, with [`SimSpace::set_rules`], on the node) of
//!   its first page, and there are at most `max_page_sharing` of them.
//!
//! # What it panics at
//! Whatever would be a defect of the scanner: a frame that does not exist, a name used twice, a frame
//! released while a page shows it or before its last page was reported as parted, a page parted twice,
//! a request for a page that is merged already or whose region is not registered, a window that leaves
//! its region, and a violation of M3.
//!
//! # Writers
//! The space counts every chance that another thread would have to get in between (*points*): before
//! and after each look at a page, and before each request. [`SimSpace::arm`] lets the program do
//! something at a point that is so many points away.

use crate::content;
use crate::fault::{Action, Condition, Faults, Remerge, SimError};
use crate::rng::Rng;
use pagemerge_core::{
    Attempt, Content, Digest, FrameId, Look, Nid, PageId, PageSpace, PageState, Reason, RegionId,
    Request, Window, Written,
};
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

/// What stands behind a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Nothing: reads as zeroes.
    Absent,
    /// The zero page, placed there by a `Zero` request (`ours`) or by a read of absent memory.
    Zero {
        /// Placed by request.
        ours: bool,
    },
    /// A frame.
    Frame(FrameId),
    /// Bytes of its own.
    Own(Box<[u8]>),
}

/// One page of the program.
#[derive(Clone, Debug)]
struct Page {
    backing: Backing,
    /// The last write, the oracle's half; `None` reads as zeroes.
    expected: Option<Box<[u8]>>,
    /// Written since the last scan look.
    written: bool,
    /// Was merged once and has bytes of its own again, in what would be a file mapping.
    broken: bool,
    /// Put onto the zero page by request, and not seen anywhere else since.
    zero_marked: bool,
    /// Scan looks since the last write, for [`Remerge::Quiet`].
    quiet: u8,
    condition: Condition,
    /// What the last digest saw: the basis of the next promotion.
    basis: Option<Box<[u8]>>,
    nid: Nid,
}

impl Page {
    fn absent(nid: Nid) -> Self {
        Self {
            backing: Backing::Absent,
            expected: None,
            written: true,
            broken: false,
            zero_marked: false,
            quiet: 0,
            condition: Condition::Fine,
            basis: None,
            nid,
        }
    }
}

/// A run of pages under one name.
#[derive(Clone, Debug)]
struct Region {
    first: PageId,
    pages: Vec<Page>,
    domain: String,
    /// Registered. A region that is not is memory of the program like any other: only the program
    /// may touch it.
    live: bool,
}

/// A shared page.
#[derive(Clone, Debug)]
struct Frame {
    bytes: Box<[u8]>,
    /// The pages that the scanner has put there and not yet seen parting.
    attached: BTreeSet<PageId>,
    domain: String,
    nid: Nid,
}

/// How this memory behaves in general. Set once.
#[derive(Clone, Copy, Debug)]
pub struct Habits {
    /// Bytes in a page.
    pub page_size: usize,
    /// The digest's key.
    pub key: u64,
    /// How many bits a digest has. With few of them, different pages collide all the time.
    pub digest_bits: u32,
    /// Writes are tracked.
    pub tracking: bool,
    /// Writes to pages that were merged once are tracked as well.
    pub tracking_broken: bool,
    /// Looks of kind `Sweep` tell whether a page was written, too.
    pub sweep_tells: bool,
    /// A page that was written after it was hashed is promoted all the same, with its new bytes.
    pub promotes_blindly: bool,
    /// The rule for pages that were merged and have been written.
    pub remerge: Remerge,
    /// The quiet time is noticed in `apply` instead of in `observe`. (Pages that are left alone for good
    /// must be seen in `observe`: as candidates they would keep their twins from merging.)
    pub remerge_late: bool,
    /// NUMA nodes.
    pub nodes: u16,
}

impl Default for Habits {
    fn default() -> Self {
        Self {
            page_size: 64,
            key: 1,
            digest_bits: 64,
            tracking: false,
            tracking_broken: true,
            promotes_blindly: false,
            sweep_tells: false,
            remerge: Remerge::Always,
            remerge_late: false,
            nodes: 1,
        }
    }
}

/// What is true of the merged memory at this moment, counted without the scanner's help.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Truth {
    /// Frames that exist.
    pub frames: u64,
    /// Frames that a page shows.
    pub frames_shown: u64,
    /// Pages that show a frame.
    pub merged: u64,
    /// Pages on the zero page by request.
    pub zeroed: u64,
}

/// One registered page, for a model that wants to say what the scanner should make of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageView {
    /// Which page.
    pub page: PageId,
    /// Its region.
    pub region: RegionId,
    /// Its region's domain.
    pub domain: String,
    /// Its node.
    pub nid: Nid,
    /// What a reader finds.
    pub bytes: Box<[u8]>,
    /// What stands behind it.
    pub backing: Backing,
    /// `observe` calls it ineligible, now and as long as nothing changes.
    pub left_alone: bool,
}

/// Simulated memory. See the module's header.
#[derive(Debug)]
pub struct SimSpace {
    habits: Habits,
    regions: BTreeMap<RegionId, Region>,
    by_first: BTreeMap<PageId, RegionId>,
    frames: BTreeMap<FrameId, Frame>,
    /// Names whose `Promote` failed in the batch that is being carried out.
    stillborn: BTreeSet<FrameId>,
    /// Pages that were found parted by a failed `Unshare`; the scanner may report them or not.
    parted_by_unshare: BTreeSet<(PageId, FrameId)>,
    /// Points to wait, which page (modulo all pages), and what happens to it.
    armed: Vec<(u32, u32, Action)>,
    faults: Faults,
    rng: Rng,
    errors_injected: u64,
    refusals: u64,
    digests: u64,
    points: u64,
    actions_done: u64,
    /// Anything that happened to any page, or to a region.
    changes: u64,
    /// What `changes` was when a scan, and when a sweep, last asked whether there were any.
    asked: [Option<u64>; 2],
    stills: u64,
    max_sharers: usize,
    separate_nodes: bool,
}

impl SimSpace {
    /// Empty memory with these habits.
    #[must_use]
    pub fn new(habits: Habits) -> Self {
        Self {
            habits,
            regions: BTreeMap::new(),
            by_first: BTreeMap::new(),
            frames: BTreeMap::new(),
            stillborn: BTreeSet::new(),
            parted_by_unshare: BTreeSet::new(),
            armed: Vec::new(),
            faults: Faults::default(),
            rng: Rng::new(0),
            errors_injected: 0,
            refusals: 0,
            digests: 0,
            points: 0,
            actions_done: 0,
            changes: 0,
            asked: [None; 2],
            stills: 0,
            max_sharers: usize::MAX,
            separate_nodes: false,
        }
    }

    /// How often a scan or a sweep was told that nothing had changed.
    #[must_use]
    pub fn stills(&self) -> u64 {
        self.stills
    }

    /// How this memory behaves in general.
    #[must_use]
    pub fn habits(&self) -> &Habits {
        &self.habits
    }

    /// Tells the space which of the scanner's settings it is to police.
    pub fn set_rules(&mut self, max_page_sharing: u32, merge_across_nodes: bool) {
        self.max_sharers = max_page_sharing as usize;
        self.separate_nodes = !merge_across_nodes;
    }

    /// Sets what goes wrong from now on. `seed` determines when.
    pub fn set_faults(&mut self, faults: Faults, seed: u64) {
        self.faults = faults;
        self.rng = Rng::new(seed);
    }

    /// Lets the program do `action` to page number `page` (modulo all pages) when `points` more
    /// points have gone by.
    pub fn arm(&mut self, points: u32, page: u32, action: Action) {
        self.armed.push((points, page, action));
    }

    /// Forgets what is armed.
    pub fn disarm(&mut self) {
        self.armed.clear();
    }

    /// Runs `what` while nothing goes wrong and nobody gets in between: for looking at things.
    pub fn calmly<T>(&mut self, what: impl FnOnce(&mut Self) -> T) -> T {
        let (faults, armed) = (self.faults, std::mem::take(&mut self.armed));
        let (rng, points) = (self.rng.clone(), self.points);
        self.faults = Faults::default();
        let answer = what(self);
        (self.faults, self.armed) = (faults, armed);
        (self.rng, self.points) = (rng, points);
        answer
    }

    /// How often the space as a whole has failed by order. A caller that gets an error from the
    /// scanner compares: an error that nobody injected is a defect.
    #[must_use]
    pub fn errors_injected(&self) -> u64 {
        self.errors_injected
    }

    /// How many requests were refused.
    #[must_use]
    pub fn refusals(&self) -> u64 {
        self.refusals
    }

    /// How many digests were asked for.
    #[must_use]
    pub fn digests(&self) -> u64 {
        self.digests
    }

    /// How many armed actions have taken place, and at how many points others could have.
    #[must_use]
    pub fn interference(&self) -> (u64, u64) {
        (self.actions_done, self.points)
    }

    // ------------------------------------------------------------------------- regions

    /// Takes over a region as the scanner has registered it. All its pages are absent.
    ///
    /// # Panics
    /// When its name or one of its page numbers belongs to a registered region.
    pub fn add_region(&mut self, region: RegionId, first: PageId, pages: u32, domain: &str) {
        self.changes += 1;
        let end = first.plus(pages);
        let clash: Vec<RegionId> = self
            .regions
            .iter()
            .filter(|(id, old)| {
                **id == region || (old.first < end && first < old.first.plus(old.len()))
            })
            .map(|(id, _)| *id)
            .collect();
        for id in clash {
            assert!(
                !self.regions[&id].live,
                "{region:?} from {first:?} on was given numbers of {id:?}, which is registered"
            );
            self.remove_region(id);
        }
        let nodes = self.habits.nodes.max(1);
        let pages = (0..pages)
            .map(|page| {
                let spread = crate::rng::mix(u64::from(first.0 + page)) % u64::from(nodes);
                Page::absent(Nid(u16::try_from(spread).expect("below a u16")))
            })
            .collect();
        let domain = domain.to_owned();
        self.regions.insert(
            region,
            Region {
                first,
                pages,
                domain,
                live: true,
            },
        );
        self.by_first.insert(first, region);
    }

    /// The region is registered no more. Its memory stays with the program until it is removed, or
    /// until the scanner gives its numbers away.
    ///
    /// # Panics
    /// When one of its pages still shows a frame, or the zero page by request.
    pub fn retire_region(&mut self, region: RegionId) {
        self.changes += 1;
        let old = self
            .regions
            .get_mut(&region)
            .expect("the world retires what it has added");
        old.live = false;
        for (number, page) in old.pages.iter_mut().enumerate() {
            assert!(
                !matches!(
                    page.backing,
                    Backing::Frame(_) | Backing::Zero { ours: true }
                ),
                "page {number} of {region:?} was left merged when the region was let go"
            );
        }
    }

    /// The scanner has taken the region back with its records.
    ///
    /// # Panics
    /// When there is no such region.
    pub fn revive_region(&mut self, region: RegionId) {
        self.changes += 1;
        self.regions
            .get_mut(&region)
            .expect("only a region that is known can be revived")
            .live = true;
    }

    /// The program frees the region's memory.
    ///
    /// # Panics
    /// When there is no such region.
    pub fn remove_region(&mut self, region: RegionId) {
        self.changes += 1;
        let old = self
            .regions
            .remove(&region)
            .expect("the world removes what it has added");
        self.by_first.remove(&old.first);
    }

    /// Every region that the program knows: name, first page, pages, and whether it is registered.
    pub fn regions(&self) -> impl Iterator<Item = (RegionId, PageId, u32, bool)> + '_ {
        self.regions
            .iter()
            .map(|(id, region)| (*id, region.first, region.len(), region.live))
    }

    fn region_of(&self, page: PageId) -> Option<RegionId> {
        let (_, id) = self.by_first.range(..=page).next_back()?;
        let region = &self.regions[id];
        (page < region.first.plus(region.len())).then_some(*id)
    }

    /// Whether the page belongs to a registered region.
    #[must_use]
    pub fn is_live(&self, page: PageId) -> bool {
        self.region_of(page)
            .is_some_and(|id| self.regions[&id].live)
    }

    fn page(&self, page: PageId) -> &Page {
        let id = self
            .region_of(page)
            .unwrap_or_else(|| panic!("{page:?} belongs to no region"));
        let region = &self.regions[&id];
        &region.pages[(page.0 - region.first.0) as usize]
    }

    /// A page to which something happens.
    fn page_mut(&mut self, page: PageId) -> &mut Page {
        self.changes += 1;
        self.noted(page)
    }

    /// A page of which something is noted.
    fn noted(&mut self, page: PageId) -> &mut Page {
        let id = self
            .region_of(page)
            .unwrap_or_else(|| panic!("{page:?} belongs to no region"));
        let region = self
            .regions
            .get_mut(&id)
            .expect("region_of returns what exists");
        &mut region.pages[(page.0 - region.first.0) as usize]
    }

    /// Page number `number`, modulo all pages that the program has; none if it has none.
    #[must_use]
    pub fn nth_page(&self, number: u32) -> Option<PageId> {
        let total: u32 = self.regions.values().map(Region::len).sum();
        let mut left = number.checked_rem(total)?;
        for region in self.regions.values() {
            if left < region.len() {
                return Some(region.first.plus(left));
            }
            left -= region.len();
        }
        None
    }

    // ------------------------------------------------------------------------- the program's side

    /// The program writes `bytes`, a whole page.
    ///
    /// # Panics
    /// When it is not a whole page, or `page` belongs to no region.
    pub fn write(&mut self, page: PageId, bytes: Box<[u8]>) {
        assert_eq!(
            bytes.len(),
            self.habits.page_size,
            "the program writes whole pages"
        );
        let was_merged = matches!(self.page(page).backing, Backing::Frame(_));
        let at = self.page_mut(page);
        at.expected = Some(bytes.clone());
        at.backing = Backing::Own(bytes);
        at.written = true;
        at.quiet = 0;
        at.broken |= was_merged;
        if at.condition == Condition::Swapped {
            at.condition = Condition::Fine;
        }
    }

    /// The program does something to a page.
    pub fn act(&mut self, page: PageId, action: Action) {
        self.actions_done += 1;
        let size = self.habits.page_size;
        match action {
            Action::Write(value) => self.write(page, content::palette(value, size)),
            Action::Poke { at, byte } => {
                let mut bytes = self.read(page);
                bytes[usize::from(at) % size] = byte;
                self.write(page, bytes);
            }
            Action::Rewrite => {
                let bytes = self.read(page);
                self.write(page, bytes);
            }
            Action::Discard => {
                let at = self.page_mut(page);
                // What the scanner has been told before, it still believes.
                *at = Page {
                    zero_marked: at.zero_marked,
                    basis: at.basis.take(),
                    ..Page::absent(at.nid)
                };
            }
            Action::Touch => {
                let at = self.page_mut(page);
                // A zero page that was discarded and then read looks to everybody as it did before (the
                // kernel has a bit in the page table for the difference, we have none): left out here,
                // since the counters could not but be wrong by one.
                if at.backing == Backing::Absent && !at.zero_marked {
                    at.backing = Backing::Zero { ours: false };
                }
            }
            Action::Become(condition) => self.page_mut(page).condition = condition,
        }
    }

    /// Breaks the page behind the program's back, as a wrong merge would: to see that
    /// [`SimSpace::assert_reads_match`] notices.
    pub fn corrupt(&mut self, page: PageId) {
        let mut bytes = self.read(page);
        bytes[0] ^= 1;
        self.page_mut(page).backing = Backing::Own(bytes);
    }

    /// What a reader finds in the page.
    ///
    /// # Panics
    /// When the page shows a frame that does not exist.
    #[must_use]
    pub fn read(&self, page: PageId) -> Box<[u8]> {
        self.bytes_of(self.page(page)).into()
    }

    fn bytes_of<'a>(&'a self, page: &'a Page) -> &'a [u8] {
        match &page.backing {
            Backing::Absent | Backing::Zero { .. } => self.zeroes(),
            Backing::Frame(frame) => &self.frame(*frame, "a page shows").bytes,
            Backing::Own(bytes) => bytes,
        }
    }

    fn zeroes(&self) -> &'static [u8] {
        static ZEROES: [u8; 65_536] = [0; 65_536];
        &ZEROES[..self.habits.page_size]
    }

    fn frame(&self, frame: FrameId, who: &str) -> &Frame {
        self.frames
            .get(&frame)
            .unwrap_or_else(|| panic!("{who} {frame:?}, which does not exist"))
    }

    /// The oracle: every page reads as it was last written.
    ///
    /// # Panics
    /// When one does not, naming it.
    pub fn assert_reads_match(&self) {
        for (id, region) in &self.regions {
            for (number, page) in region.pages.iter().enumerate() {
                let want = page.expected.as_deref().unwrap_or(self.zeroes());
                let got = self.bytes_of(page);
                assert!(
                    got == want,
                    "page {number} of {id:?} reads {got:x?} through {:?}, but {want:x?} was written",
                    page.backing
                );
            }
        }
    }

    /// Which frame a page shows.
    #[must_use]
    pub fn shows(&self, page: PageId) -> Option<FrameId> {
        match self.page(page).backing {
            Backing::Frame(frame) => Some(frame),
            _ => None,
        }
    }

    /// What stands behind a page.
    ///
    /// # Panics
    /// When the page belongs to no region.
    #[must_use]
    pub fn backing(&self, page: PageId) -> &Backing {
        &self.page(page).backing
    }

    /// Counts, without asking the scanner.
    #[must_use]
    pub fn truth(&self) -> Truth {
        let mut shown = BTreeSet::new();
        let mut truth = Truth {
            frames: self.frames.len() as u64,
            ..Truth::default()
        };
        for page in self.regions.values().flat_map(|region| &region.pages) {
            match page.backing {
                Backing::Frame(frame) => {
                    shown.insert(frame);
                    truth.merged += 1;
                }
                Backing::Zero { ours: true } => truth.zeroed += 1,
                _ => {}
            }
        }
        truth.frames_shown = shown.len() as u64;
        truth
    }

    /// Every page of every registered region.
    #[must_use]
    pub fn view(&self) -> Vec<PageView> {
        let mut all = Vec::new();
        for (id, region) in self.regions.iter().filter(|(_, region)| region.live) {
            for (page, number) in region.pages.iter().zip(0..) {
                all.push(PageView {
                    page: region.first.plus(number),
                    region: *id,
                    domain: region.domain.clone(),
                    nid: page.nid,
                    bytes: self.bytes_of(page).into(),
                    backing: page.backing.clone(),
                    left_alone: matches!(page.condition, Condition::Ineligible(_))
                        || (page.broken && self.habits.remerge == Remerge::Never),
                });
            }
        }
        all
    }

    /// Makes every page of every registered region one that can be merged, but for those that
    /// `observe` calls ineligible.
    pub fn cure(&mut self) {
        self.changes += 1;
        for page in self
            .regions
            .values_mut()
            .flat_map(|region| &mut region.pages)
        {
            if !matches!(page.condition, Condition::Ineligible(_)) {
                page.condition = Condition::Fine;
            }
        }
    }

    // ------------------------------------------------------------------------- the scanner's side

    /// A moment at which another thread could come in between.
    fn point(&mut self) {
        self.points += 1;
        if self.armed.is_empty() {
            return;
        }
        let mut due = Vec::new();
        self.armed.retain_mut(|(points, page, action)| {
            let waits = *points > 0;
            if waits {
                *points -= 1;
            } else {
                due.push((*page, *action));
            }
            waits
        });
        for (number, action) in due {
            if let Some(page) = self.nth_page(number) {
                self.act(page, action);
            }
        }
    }

    fn fail(&mut self, chance: u8, what: &'static str) -> Result<(), SimError> {
        if self.rng.chance(chance) {
            self.errors_injected += 1;
            return Err(SimError(what));
        }
        Ok(())
    }

    /// Why the page cannot be read or attempted now.
    fn obstacle(&self, page: &Page) -> Option<Reason> {
        match page.condition {
            Condition::Fine => None,
            Condition::Ineligible(reason) | Condition::Refusing(reason) => Some(reason),
            Condition::Swapped => Some(Reason::Swapped),
        }
        .or_else(|| self.left_as_broken(page))
    }

    fn left_as_broken(&self, page: &Page) -> Option<Reason> {
        if !page.broken || !matches!(page.backing, Backing::Own(_)) {
            return None;
        }
        match self.habits.remerge {
            Remerge::Always => None,
            Remerge::Quiet(looks) => (page.quiet < looks).then_some(Reason::NotQuiet),
            Remerge::Never => Some(Reason::Broken),
        }
    }

    fn state(&mut self, at: PageId, look: Look) -> PageState {
        let spurious = self.rng.chance(self.faults.spurious);
        let (tracking, habits) = (self.habits.tracking, self.habits);
        let page = self.noted(at);
        page.zero_marked &= matches!(page.backing, Backing::Zero { .. });
        match page.backing {
            Backing::Absent => return PageState::Absent,
            Backing::Zero { .. } => return PageState::ZeroPage,
            Backing::Frame(_) if page.condition == Condition::Swapped => return PageState::Unknown,
            Backing::Frame(_) => return PageState::Merged,
            Backing::Own(_) => {}
        }
        match page.condition {
            Condition::Ineligible(reason) => return PageState::Ineligible(reason),
            Condition::Swapped if page.broken => return PageState::Unknown,
            Condition::Swapped => return PageState::Absent,
            Condition::Fine | Condition::Refusing(_) => {}
        }
        if look == Look::Scan {
            page.quiet = page.quiet.saturating_add(1);
        }
        if !(habits.remerge_late && matches!(habits.remerge, Remerge::Quiet(_)))
            && let Some(reason) = self.left_as_broken(self.page(at))
        {
            // The written bit is kept for the look that can report it.
            return PageState::Ineligible(reason);
        }
        let page = self.noted(at);
        let known = tracking && (!page.broken || habits.tracking_broken);
        let written = match look {
            Look::Sweep if !habits.sweep_tells => Written::Unknown,
            _ if !known => Written::Unknown,
            _ if page.written || spurious => Written::Yes,
            _ => Written::No,
        };
        if look == Look::Scan {
            page.written = false;
        }
        PageState::Resident(written)
    }

    fn assert_window(&self, window: Window, length: usize) {
        let region = self
            .regions
            .get(&window.region)
            .filter(|region| region.live)
            .unwrap_or_else(|| panic!("{window:?} is of a region that is not registered"));
        assert!(window.pages > 0, "{window:?} is empty");
        assert!(
            window.first >= region.first
                && window.first.plus(window.pages) <= region.first.plus(region.len()),
            "{window:?} leaves its region"
        );
        assert_eq!(
            length, window.pages as usize,
            "the answer must be as long as {window:?}"
        );
    }

    fn assert_registered(&self, page: PageId, what: &str) {
        assert!(
            self.is_live(page),
            "{what} of {page:?}, which is not registered"
        );
    }

    fn digest_of(&self, bytes: &[u8]) -> Digest {
        Digest {
            hash: content::digest(self.habits.key, bytes, self.habits.digest_bits),
            zero: bytes.iter().all(|byte| *byte == 0),
        }
    }

    fn digest_one(&mut self, at: PageId) -> Attempt<Digest> {
        self.assert_registered(at, "digest");
        self.digests += 1;
        let lost = self.rng.chance(self.faults.look);
        let page = self.page(at);
        if page.backing == Backing::Absent {
            return Attempt::Gone;
        }
        if page.condition == Condition::Swapped {
            return Attempt::Refused(Reason::Swapped);
        }
        if lost {
            self.refusals += 1;
            return match self.rng.below(3) {
                0 => Attempt::Changed,
                1 => Attempt::Gone,
                _ => Attempt::Refused(Reason::NoMemory),
            };
        }
        let bytes: Box<[u8]> = self.read(at);
        let digest = self.digest_of(&bytes);
        self.noted(at).basis = Some(bytes);
        Attempt::Done(digest)
    }

    /// The bytes of one side of a comparison, or why there are none.
    fn obtain(&self, content: Content) -> Attempt<Box<[u8]>> {
        match content {
            Content::Frame(frame) => {
                Attempt::Done(self.frame(frame, "a comparison is with").bytes.clone())
            }
            // A search may meet a page whose region has been let go since it was put into the tree.
            Content::Page(page) if !self.is_live(page) => Attempt::Gone,
            Content::Page(at) => {
                let page = self.page(at);
                match page.backing {
                    Backing::Absent | Backing::Zero { .. } => Attempt::Gone,
                    _ if page.condition == Condition::Swapped => Attempt::Refused(Reason::Swapped),
                    _ => Attempt::Done(self.bytes_of(page).into()),
                }
            }
        }
    }

    /// Why an attempt on the page comes to nothing, whatever is asked. Draws the same numbers
    /// whatever the answer is.
    fn hindrance(&mut self, at: PageId, chance: u8) -> Option<Attempt<()>> {
        let (refused, lost) = (self.rng.chance(chance), self.rng.chance(self.faults.race));
        let page = self.page(at);
        match page.backing {
            Backing::Absent | Backing::Zero { .. } => return Some(Attempt::Gone),
            Backing::Frame(frame) => panic!("{at:?} shows {frame:?} already"),
            Backing::Own(_) => {}
        }
        if let Some(reason) = self.obstacle(page) {
            return Some(Attempt::Refused(reason));
        }
        if refused {
            return Some(Attempt::Refused(self.rng.pick(&[
                Reason::Pinned,
                Reason::SharedByFork,
                Reason::MappingBudget,
                Reason::FramesFull,
            ])));
        }
        lost.then_some(Attempt::Changed)
    }

    fn promote(&mut self, at: PageId, name: FrameId) -> Attempt<()> {
        assert!(
            !self.frames.contains_key(&name),
            "{name:?} is promoted though it exists"
        );
        let hindrance = self.hindrance(at, self.faults.promote);
        let page = self.page(at);
        let stale = page
            .basis
            .as_deref()
            .is_some_and(|basis| basis != self.bytes_of(page));
        let outcome = match hindrance {
            Some(outcome) => outcome,
            None if stale && !self.habits.promotes_blindly => Attempt::Changed,
            None => Attempt::Done(()),
        };
        if !outcome.is_done() {
            self.stillborn.insert(name);
            return outcome;
        }
        self.stillborn.remove(&name);
        let region = self.region_of(at).expect("the page was looked up before");
        let frame = Frame {
            bytes: self.read(at),
            attached: BTreeSet::from([at]),
            domain: self.regions[&region].domain.clone(),
            nid: self.page(at).nid,
        };
        self.frames.insert(name, frame);
        self.place(at, Backing::Frame(name));
        outcome
    }

    fn share(&mut self, at: PageId, name: FrameId, chance: u8) -> Attempt<()> {
        let hindrance = self.hindrance(at, chance);
        if !self.frames.contains_key(&name) && self.stillborn.contains(&name) {
            return Attempt::Gone;
        }
        let frame = self.frame(name, "a page is to share");
        let region = self.region_of(at).expect("the page was looked up before");
        assert_eq!(
            self.regions[&region].domain, frame.domain,
            "{at:?} is to share {name:?} of another domain"
        );
        if self.separate_nodes {
            assert_eq!(
                self.page(at).nid,
                frame.nid,
                "{at:?} is to share {name:?} of another node"
            );
        }
        if let Some(outcome) = hindrance {
            return outcome;
        }
        if *self.bytes_of(self.page(at)) != *frame.bytes {
            return Attempt::Changed;
        }
        let sharers = frame
            .attached
            .iter()
            .filter(|page| self.shows_now(**page, name))
            .count();
        assert!(
            sharers < self.max_sharers,
            "{at:?} is to be sharer number {} of {name:?}; the limit is {}",
            sharers + 1,
            self.max_sharers
        );
        self.frames
            .get_mut(&name)
            .expect("looked up above")
            .attached
            .insert(at);
        self.place(at, Backing::Frame(name));
        Attempt::Done(())
    }

    fn zero(&mut self, at: PageId) -> Attempt<()> {
        if let Some(outcome) = self.hindrance(at, self.faults.zero) {
            return outcome;
        }
        if self.read(at).iter().any(|byte| *byte != 0) {
            return Attempt::Changed;
        }
        self.place(at, Backing::Zero { ours: true });
        self.page_mut(at).zero_marked = true;
        Attempt::Done(())
    }

    fn unshare(&mut self, at: PageId, name: Option<FrameId>) -> Attempt<()> {
        let refused = self.rng.chance(self.faults.unshare);
        if let Some(frame) = name {
            let frame = self.frame(frame, "a page is to leave");
            assert!(
                frame.attached.contains(&at),
                "{at:?} is to leave {name:?}, where it is not"
            );
        }
        let parted = match (&self.page(at).backing, name) {
            (Backing::Frame(shown), Some(frame)) => {
                assert_eq!(
                    *shown, frame,
                    "{at:?} is to leave a frame that it does not show"
                );
                None
            }
            (Backing::Zero { ours: true }, None) => None,
            (Backing::Absent, _) => Some(Attempt::Gone),
            _ => Some(Attempt::Changed),
        };
        if let Some(outcome) = parted {
            if let Some(frame) = name {
                self.parted_by_unshare.insert((at, frame));
                self.frames
                    .get_mut(&frame)
                    .expect("checked above")
                    .attached
                    .remove(&at);
            }
            return outcome;
        }
        if refused {
            return Attempt::Refused(Reason::NoMemory);
        }
        if let Some(frame) = name {
            self.frames
                .get_mut(&frame)
                .expect("checked above")
                .attached
                .remove(&at);
        }
        let bytes = self.read(at);
        let page = self.page_mut(at);
        page.backing = Backing::Own(bytes);
        page.written = true;
        page.quiet = 0;
        page.broken |= name.is_some();
        if page.condition == Condition::Swapped {
            page.condition = Condition::Fine;
        }
        Attempt::Done(())
    }

    fn shows_now(&self, page: PageId, frame: FrameId) -> bool {
        self.region_of(page).is_some() && self.shows(page) == Some(frame)
    }

    fn place(&mut self, at: PageId, backing: Backing) {
        let page = self.page_mut(at);
        page.backing = backing;
        page.written = true;
        page.broken = false;
        page.quiet = 0;
        page.basis = None;
    }

    fn carry_out(&mut self, request: Request, partner: bool) -> Attempt<()> {
        let at = request.page();
        self.assert_registered(at, "a change");
        let outcome = match request {
            Request::Promote { page, frame } => self.promote(page, frame),
            Request::Share { page, frame } => {
                let chance = if partner {
                    self.faults.partner
                } else {
                    self.faults.share
                };
                self.share(page, frame, chance)
            }
            Request::Zero { page } => self.zero(page),
            Request::Unshare { page, frame } => self.unshare(page, frame),
        };
        if !outcome.is_done() {
            self.refusals += 1;
            // A page that was moved out and back reads as written, though nobody wrote.
            if self.rng.chance(self.faults.spurious) {
                self.page_mut(at).written = true;
            }
        }
        outcome
    }
}

impl Region {
    fn len(&self) -> u32 {
        u32::try_from(self.pages.len()).expect("a region is registered with a u32 of pages")
    }
}

impl PageSpace for SimSpace {
    type Error = SimError;

    fn page_size(&self) -> usize {
        self.habits.page_size
    }

    fn is_still(&mut self, look: Look) -> bool {
        let [scan, sweep] = self.asked;
        let now = Some(self.changes);
        let before = match look {
            Look::Scan => {
                self.asked = [now; 2];
                scan
            }
            Look::Sweep => {
                self.asked = [scan, now];
                sweep
            }
        };
        let still = self.habits.tracking && self.faults.spurious == 0 && before == now;
        self.stills += u64::from(still);
        still
    }

    fn observe(
        &mut self,
        window: Window,
        look: Look,
        into: &mut [PageState],
    ) -> Result<(), SimError> {
        self.assert_window(window, into.len());
        self.point();
        self.fail(self.faults.look_error, "observe")?;
        for (page, slot) in (window.first.0..).zip(into.iter_mut()) {
            *slot = self.state(PageId(page), look);
            self.point();
        }
        Ok(())
    }

    fn next_present(&mut self, window: Window) -> Result<Option<PageId>, SimError> {
        self.fail(self.faults.look_error, "next_present")?;
        let mut pages = (window.first.0..window.first.0 + window.pages).map(PageId);
        Ok(pages.find(|page| self.state(*page, Look::Sweep) != PageState::Absent))
    }

    fn nids(&mut self, window: Window, into: &mut [Nid]) -> Result<(), SimError> {
        self.assert_window(window, into.len());
        self.fail(self.faults.look_error, "nids")?;
        for (page, slot) in (window.first.0..).zip(into.iter_mut()) {
            *slot = self.page(PageId(page)).nid;
        }
        Ok(())
    }

    fn digest(&mut self, pages: &[PageId], into: &mut [Attempt<Digest>]) -> Result<(), SimError> {
        assert_eq!(pages.len(), into.len(), "one digest for each page");
        self.fail(self.faults.look_error, "digest")?;
        for (page, slot) in pages.iter().zip(into.iter_mut()) {
            self.point();
            *slot = self.digest_one(*page);
        }
        self.point();
        Ok(())
    }

    fn digest_frames(
        &mut self,
        frames: &[FrameId],
        into: &mut [Attempt<Digest>],
    ) -> Result<(), SimError> {
        assert_eq!(frames.len(), into.len(), "one digest for each frame");
        self.fail(self.faults.look_error, "digest_frames")?;
        for (frame, slot) in frames.iter().zip(into.iter_mut()) {
            self.point();
            let digest = self.digest_of(&self.frame(*frame, "digest of").bytes);
            *slot = Attempt::Done(digest);
        }
        Ok(())
    }

    fn compare(&mut self, a: Content, b: Content) -> Result<Attempt<Ordering>, SimError> {
        self.point();
        self.fail(self.faults.look_error, "compare")?;
        let frames = matches!((a, b), (Content::Frame(_), Content::Frame(_)));
        // Two frames that exist can always be compared.
        if self.rng.chance(self.faults.look) && !frames {
            self.refusals += 1;
            return Ok(match self.rng.below(3) {
                0 => Attempt::Changed,
                1 => Attempt::Gone,
                _ => Attempt::Refused(Reason::NoMemory),
            });
        }
        Ok(match (self.obtain(a), self.obtain(b)) {
            (Attempt::Done(a), Attempt::Done(b)) => Attempt::Done(a.cmp(&b)),
            (Attempt::Refused(reason), _) | (_, Attempt::Refused(reason)) => {
                Attempt::Refused(reason)
            }
            _ => Attempt::Gone,
        })
    }

    fn apply(
        &mut self,
        requests: &[Request],
        outcomes: &mut [Attempt<()>],
    ) -> Result<(), SimError> {
        assert_eq!(
            requests.len(),
            outcomes.len(),
            "one outcome for each request"
        );
        assert!(
            outcomes
                .iter()
                .all(|outcome| *outcome == Attempt::Refused(Reason::NotTried)),
            "outcomes come in as not tried"
        );
        self.stillborn.clear();
        let mut promoted = None;
        for (request, slot) in requests.iter().zip(outcomes.iter_mut()) {
            self.point();
            self.fail(self.faults.apply_error, "apply")?;
            let partner =
                matches!(request, Request::Share { frame, .. } if promoted == Some(*frame));
            *slot = self.carry_out(*request, partner);
            promoted = match request {
                Request::Promote { frame, .. } => Some(*frame),
                _ => None,
            };
        }
        self.point();
        Ok(())
    }

    fn parted(&mut self, page: PageId, frame: FrameId) {
        if self.parted_by_unshare.remove(&(page, frame)) {
            return;
        }
        assert!(
            !self.shows_now(page, frame),
            "{page:?} was reported as parted but shows {frame:?}"
        );
        let known = self
            .frames
            .get_mut(&frame)
            .unwrap_or_else(|| panic!("{page:?} parted from {frame:?}, which does not exist"));
        assert!(
            known.attached.remove(&page),
            "{page:?} parted from {frame:?}, where it is not"
        );
    }

    fn release(&mut self, frame: FrameId) -> Result<(), SimError> {
        let known = self.frame(frame, "release of");
        for page in &known.attached {
            assert!(
                !self.shows_now(*page, frame),
                "{frame:?} is released but {page:?} shows it"
            );
        }
        assert!(
            known.attached.is_empty(),
            "{frame:?} is released, but {:?} were never reported as parted",
            known.attached
        );
        // The name is free even if giving the place back has failed: the place is lost then.
        self.frames.remove(&frame);
        self.parted_by_unshare.retain(|(_, of)| *of != frame);
        self.fail(self.faults.release_error, "release")
    }
}
