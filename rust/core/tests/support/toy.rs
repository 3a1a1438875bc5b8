//! `Toy`: memory small enough to see through, for the tests of this crate.
//!
//! A page's bytes are eight of them. The toy is strict: it panics when the scanner asks for something
//! that no memory should be asked for, and it knows what each page must read as.
#![allow(dead_code)] // Each test uses a part of it.
#![allow(unreachable_pub)] // It is a module of several crates.

use pagemerge_core::{
    Attempt, Clock, Content, Digest, FrameId, Look, Nid, PageId, PageSpace, PageState, Reason,
    RegionId, Request, Scanner, Settings, StepReport, Tick, Window, Written, check,
};
use std::cmp::Ordering;
use std::collections::BTreeMap;

pub type Bytes = [u8; 8];

pub const ZERO: Bytes = [0; 8];

/// Bytes for a number, in an order that has nothing to do with the number's; never zero.
pub fn bytes(tag: u64) -> Bytes {
    mix(tag.wrapping_add(1)).to_be_bytes()
}

fn mix(n: u64) -> u64 {
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (n ^ (n >> 31)) | 1
}

/// A seeded source of numbers.
#[derive(Clone, Debug)]
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        (mix(self.0) >> 1) % sides
    }

    pub fn page(&mut self, pages: usize) -> u32 {
        u32::try_from(self.roll(pages as u64)).expect("a toy is small")
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    Nothing,
    Own,
    /// The zero page, put there by the engine.
    Zeroed,
    Frame(FrameId),
}

#[derive(Clone, Copy, Debug)]
pub struct Page {
    pub shown: Shown,
    /// What a reader must see.
    pub bytes: Bytes,
    pub written: bool,
    /// Requests about it are refused.
    pub refuses: Option<Reason>,
    /// It is reported as not eligible.
    pub barred: Option<Reason>,
    /// Nobody can tell what it is.
    pub hidden: bool,
    /// The frame that the scanner has not been heard about since the page left it.
    left: Option<FrameId>,
}

/// Memory has failed, on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outage;

impl std::fmt::Display for Outage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("memory has failed")
    }
}

impl std::error::Error for Outage {}

#[derive(Debug)]
pub struct Toy {
    pub pages: Vec<Page>,
    pub frames: BTreeMap<FrameId, Bytes>,
    /// Whether writes are tracked; otherwise `Written::Unknown` is all that is said.
    pub tracks: bool,
    /// Pages that refuse are found out before they are moved: they do not count as written after that.
    pub refuses_early: bool,
    /// Hashes are cut to so many bits, to make them collide.
    pub hash_bits: u32,
    /// Hashes tell zero from not zero, and nothing else.
    pub only_zero: bool,
    /// NUMA nodes, over which pages are dealt out in turn.
    pub nodes: u16,
    /// Calls until all of them fail.
    pub calls_left: Option<u32>,
    /// Writes that happen just before the next `apply`.
    pub race: Vec<(PageId, Bytes)>,
    /// Rolls for a write before each call.
    pub racer: Option<Dice>,
    pub requests: Vec<Request>,
    pub hashed: u64,
    pub compared: u64,
    pub observed: u64,
    pub applied: u64,
}

impl Toy {
    pub fn new(tracks: bool) -> Self {
        Self {
            pages: Vec::new(),
            frames: BTreeMap::new(),
            tracks,
            refuses_early: false,
            hash_bits: 64,
            only_zero: false,
            nodes: 1,
            calls_left: None,
            race: Vec::new(),
            racer: None,
            requests: Vec::new(),
            hashed: 0,
            compared: 0,
            observed: 0,
            applied: 0,
        }
    }

    fn reach(&mut self, end: u32) {
        let nothing = Page {
            shown: Shown::Nothing,
            bytes: ZERO,
            written: true,
            refuses: None,
            barred: None,
            hidden: false,
            left: None,
        };
        if self.pages.len() < end as usize {
            self.pages.resize(end as usize, nothing);
        }
    }

    fn leave(&mut self, page: PageId) {
        let it = &mut self.pages[page.index()];
        if let Shown::Frame(frame) = it.shown {
            it.left = Some(frame);
        }
    }

    /// The program writes to a page.
    pub fn write(&mut self, page: PageId, bytes: Bytes) {
        self.reach(page.0 + 1);
        self.leave(page);
        let it = &mut self.pages[page.index()];
        (it.shown, it.bytes, it.written) = (Shown::Own, bytes, true);
    }

    /// The program lets a page go.
    pub fn discard(&mut self, page: PageId) {
        self.leave(page);
        let it = &mut self.pages[page.index()];
        (it.shown, it.bytes, it.written) = (Shown::Nothing, ZERO, true);
    }

    /// What a reader sees.
    pub fn read(&self, page: PageId) -> Bytes {
        let it = &self.pages[page.index()];
        match it.shown {
            Shown::Own => it.bytes,
            Shown::Nothing | Shown::Zeroed => ZERO,
            Shown::Frame(frame) => self.frames[&frame],
        }
    }

    /// Panics unless every page reads as it was last written, and no frame is without pages.
    pub fn assert_reads_match(&self) {
        let mut used: BTreeMap<FrameId, u32> = BTreeMap::new();
        for (n, page) in (0..).zip(&self.pages) {
            assert_eq!(self.read(PageId(n)), page.bytes, "page {n} reads wrong");
            if let Shown::Frame(frame) = page.shown {
                *used.entry(frame).or_default() += 1;
            }
        }
    }

    fn call(&mut self) -> Result<(), Outage> {
        if let Some(left) = &mut self.calls_left {
            *left = left.checked_sub(1).ok_or(Outage)?;
        }
        if let Some(mut dice) = self.racer.take() {
            if !self.pages.is_empty() && dice.roll(4) == 0 {
                let page = PageId(dice.page(self.pages.len()));
                if dice.roll(5) == 0 {
                    self.discard(page);
                } else {
                    self.write(page, bytes(dice.roll(4)));
                }
            }
            self.racer = Some(dice);
        }
        Ok(())
    }

    fn bytes_of(&self, content: Content) -> Option<Bytes> {
        match content {
            Content::Page(page) => {
                let it = &self.pages[page.index()];
                let there = it.shown == Shown::Own && it.barred.is_none() && !it.hidden;
                there.then_some(it.bytes)
            }
            Content::Frame(frame) => Some(
                *self
                    .frames
                    .get(&frame)
                    .expect("a frame is compared while it exists"),
            ),
        }
    }

    pub fn nid(&self, page: PageId) -> Nid {
        Nid(u16::try_from(page.0 % u32::from(self.nodes)).expect("a remainder fits"))
    }

    pub fn hash(&self, bytes: Bytes) -> Digest {
        let told = if self.only_zero && bytes != ZERO {
            u64::MAX
        } else {
            u64::from_be_bytes(bytes)
        };
        let hash = mix(told) >> (64 - self.hash_bits);
        Digest {
            hash,
            zero: bytes == ZERO,
        }
    }

    fn carry_out(&mut self, request: Request) -> Attempt<()> {
        let page = request.page();
        if let Request::Share { frame, .. } = request
            && !self.frames.contains_key(&frame)
        {
            return Attempt::Gone;
        }
        let it = &mut self.pages[page.index()];
        if let Request::Unshare { frame, .. } = request {
            let shown = frame.map_or(Shown::Zeroed, Shown::Frame);
            if it.shown != shown {
                return Attempt::Changed;
            }
            if let Some(reason) = it.refuses {
                return Attempt::Refused(reason);
            }
            (it.shown, it.written) = (Shown::Own, true);
            return Attempt::Done(());
        }
        if it.shown != Shown::Own {
            return Attempt::Gone;
        }
        assert!(
            it.left.is_none(),
            "{page:?} is merged again before it was said to have parted"
        );
        if self.refuses_early
            && let Some(reason) = it.refuses
        {
            return Attempt::Refused(reason);
        }
        // Moved out and back, as real memory does.
        it.written = true;
        if let Some(reason) = it.refuses {
            return Attempt::Refused(reason);
        }
        match request {
            Request::Promote { frame, .. } => {
                let taken = self.frames.insert(frame, it.bytes);
                assert!(taken.is_none(), "{frame:?} is made a second time");
                it.shown = Shown::Frame(frame);
            }
            Request::Share { frame, .. } => {
                if self.frames[&frame] != it.bytes {
                    return Attempt::Changed;
                }
                it.shown = Shown::Frame(frame);
            }
            Request::Zero { .. } => {
                if it.bytes != ZERO {
                    return Attempt::Changed;
                }
                it.shown = Shown::Zeroed;
            }
            Request::Unshare { .. } => unreachable!("dealt with above"),
        }
        Attempt::Done(())
    }
}

impl PageSpace for Toy {
    type Error = Outage;

    fn page_size(&self) -> usize {
        4096
    }

    fn observe(
        &mut self,
        window: Window,
        look: Look,
        into: &mut [PageState],
    ) -> Result<(), Outage> {
        self.call()?;
        assert_eq!(into.len(), window.pages as usize);
        assert!((1..=512).contains(&window.pages), "{window:?}");
        self.observed += u64::from(window.pages);
        for (n, state) in (window.first.0..).zip(into) {
            let tracks = self.tracks;
            let it = &mut self.pages[n as usize];
            if it.hidden {
                *state = PageState::Unknown;
                continue;
            }
            *state = match (it.shown, it.barred) {
                (Shown::Nothing, _) => PageState::Absent,
                (Shown::Zeroed, _) => PageState::ZeroPage,
                (Shown::Frame(_), _) => PageState::Merged,
                (Shown::Own, Some(reason)) => PageState::Ineligible(reason),
                (Shown::Own, None) if !tracks => PageState::Resident(Written::Unknown),
                (Shown::Own, None) => PageState::Resident(if it.written {
                    Written::Yes
                } else {
                    Written::No
                }),
            };
            if look == Look::Scan {
                it.written = false;
            }
        }
        Ok(())
    }

    fn next_present(&mut self, window: Window) -> Result<Option<PageId>, Outage> {
        self.call()?;
        let end = window.first.0 + window.pages;
        assert!(
            window.pages > 0 && end as usize <= self.pages.len(),
            "{window:?}"
        );
        let here = |n: &u32| {
            let it = &self.pages[*n as usize];
            it.hidden || it.shown != Shown::Nothing
        };
        Ok((window.first.0..end).find(here).map(PageId))
    }

    fn nids(&mut self, window: Window, into: &mut [Nid]) -> Result<(), Outage> {
        self.call()?;
        for (page, nid) in (window.first.0..).zip(into) {
            *nid = self.nid(PageId(page));
        }
        Ok(())
    }

    fn digest(&mut self, pages: &[PageId], into: &mut [Attempt<Digest>]) -> Result<(), Outage> {
        self.call()?;
        for (page, digest) in pages.iter().zip(into) {
            self.hashed += 1;
            *digest = match self.bytes_of(Content::Page(*page)) {
                None => Attempt::Gone,
                Some(bytes) => Attempt::Done(self.hash(bytes)),
            };
        }
        Ok(())
    }

    fn digest_frames(
        &mut self,
        frames: &[FrameId],
        into: &mut [Attempt<Digest>],
    ) -> Result<(), Outage> {
        self.call()?;
        for (frame, digest) in frames.iter().zip(into) {
            *digest = Attempt::Done(self.hash(self.frames[frame]));
        }
        Ok(())
    }

    fn compare(&mut self, a: Content, b: Content) -> Result<Attempt<Ordering>, Outage> {
        self.call()?;
        self.compared += 1;
        Ok(match (self.bytes_of(a), self.bytes_of(b)) {
            (Some(a), Some(b)) => Attempt::Done(a.cmp(&b)),
            _ => Attempt::Gone,
        })
    }

    fn apply(&mut self, requests: &[Request], outcomes: &mut [Attempt<()>]) -> Result<(), Outage> {
        for (page, bytes) in std::mem::take(&mut self.race) {
            self.write(page, bytes);
        }
        self.applied += 1;
        assert_eq!(requests.len(), outcomes.len());
        for (request, outcome) in requests.iter().zip(outcomes) {
            self.call()?;
            assert_eq!(*outcome, Attempt::Refused(Reason::NotTried));
            *outcome = self.carry_out(*request);
            self.requests.push(*request);
        }
        Ok(())
    }

    fn parted(&mut self, page: PageId, frame: FrameId) {
        let left = self.pages[page.index()].left.take();
        assert_eq!(
            left,
            Some(frame),
            "{page:?} did not leave {frame:?} on its own"
        );
    }

    fn release(&mut self, frame: FrameId) -> Result<(), Outage> {
        let shown = self
            .pages
            .iter()
            .position(|page| page.shown == Shown::Frame(frame));
        assert_eq!(shown, None, "{frame:?} is released while it is shown");
        assert!(
            self.frames.remove(&frame).is_some(),
            "{frame:?} is released twice"
        );
        self.call()
    }
}

/// A scanner and its toy memory.
#[derive(Debug)]
pub struct World {
    pub scanner: Scanner,
    pub toy: Toy,
    pub now: Tick,
}

impl World {
    pub fn new(settings: Settings) -> Self {
        let toy = Toy::new(settings.write_tracking);
        let scanner = Scanner::new(settings).expect("the settings are in range");
        Self {
            scanner,
            toy,
            now: Tick(0),
        }
    }

    /// Registers a region with these pages; `None` is a page never touched.
    pub fn add(&mut self, pages: &[Option<Bytes>]) -> (RegionId, PageId) {
        self.add_to("", pages)
    }

    pub fn add_to(&mut self, domain: &str, pages: &[Option<Bytes>]) -> (RegionId, PageId) {
        let count = u32::try_from(pages.len()).expect("a toy is small");
        let added = self
            .scanner
            .register(count, domain)
            .expect("page numbers suffice");
        self.toy.reach(added.first.0 + count);
        for (n, page) in (added.first.0..).map(PageId).zip(pages) {
            match page {
                Some(bytes) => self.toy.write(n, *bytes),
                None => self.toy.discard(n),
            }
        }
        (added.region, added.first)
    }

    pub fn same(&mut self, tag: u64, count: usize) -> (RegionId, PageId) {
        self.add(&vec![Some(bytes(tag)); count])
    }

    pub fn unique(&mut self, from: u64, count: u64) -> (RegionId, PageId) {
        let pages: Vec<_> = (from..from + count).map(|tag| Some(bytes(tag))).collect();
        self.add(&pages)
    }

    pub fn try_step(&mut self, budget: u32) -> Result<StepReport, Outage> {
        self.now.0 += 1;
        let clock = Clock {
            now: self.now,
            cpu_nanos: 0,
        };
        let report = self.scanner.step(&mut self.toy, clock, budget);
        self.check();
        report
    }

    pub fn step(&mut self, budget: u32) -> StepReport {
        self.try_step(budget).expect("the toy works")
    }

    /// Goes on to the end of the running full scan, or through a whole one.
    pub fn scan(&mut self) {
        for _ in 0..1_000_000 {
            if self.step(u32::MAX).full_scan_done {
                return;
            }
        }
        panic!("a full scan does not end");
    }

    pub fn scans(&mut self, count: u32) {
        for _ in 0..count {
            self.scan();
        }
    }

    pub fn check(&mut self) {
        check::assert_all(&self.scanner);
        let (calls_left, racer) = (self.toy.calls_left.take(), self.toy.racer.take());
        let compared = self.toy.compared;
        let proof = check::all_with_contents(&self.scanner, &mut self.toy);
        proof.expect("the toy works").expect("frames are in order");
        self.toy.compared = compared;
        (self.toy.calls_left, self.toy.racer) = (calls_left, racer);
        self.toy.assert_reads_match();
    }

    /// shared, sharing, unshared, volatile, chains, dups, zero, profit.
    pub fn row(&self) -> [i64; 8] {
        let s = self.scanner.stats();
        let n = |n: u64| i64::try_from(n).expect("a toy is small");
        [
            n(s.pages_shared),
            n(s.pages_sharing),
            n(s.pages_unshared),
            n(s.pages_volatile),
            n(s.stable_node_chains),
            n(s.stable_node_dups),
            n(s.ksm_zero_pages),
            s.general_profit,
        ]
    }

    /// How many pages show each frame, largest first.
    pub fn groups(&self) -> Vec<usize> {
        let mut by_frame: BTreeMap<FrameId, usize> = BTreeMap::new();
        for page in &self.toy.pages {
            if let Shown::Frame(frame) = page.shown {
                *by_frame.entry(frame).or_default() += 1;
            }
        }
        let mut groups: Vec<usize> = by_frame.into_values().collect();
        groups.sort_unstable_by(|a, b| b.cmp(a));
        groups
    }

    pub fn frame(&self, page: PageId) -> Option<FrameId> {
        match self.toy.pages[page.index()].shown {
            Shown::Frame(frame) => Some(frame),
            _ => None,
        }
    }
}

/// The kernel's ways without smart scan.
pub fn plain() -> Settings {
    Settings {
        smart_scan: false,
        ..Settings::kernel_defaults()
    }
}

/// Our own ways without smart scan.
pub fn ours() -> Settings {
    Settings {
        smart_scan: false,
        use_zero_pages: false,
        ..Settings::default()
    }
}
