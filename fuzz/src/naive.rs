//! A naive model of KSM: plain lists of pages and frames, searched from end to end, without trees,
//! hashes or batches. Written from the kernel's behaviour and our documented departures from it, to
//! disagree with the scanner where either is wrong.
//!
//! # What it does not decide
//! Some choices show only in who shares with whom: which of several frames with room a page joins, and
//! when a search happens to pass a frame that has lost its pages. The model takes these from what is
//! seen in memory and heard from the trace, and checks that they are allowed.
//!
//! In the kernel's order an unstable tree may be searched in vain when pages in it have been written. Then
//! (and only then) a match may be missed: see [`Model::tree_may_lie`].
//!
//! # What it does not know
//! What a write does to a page that has been looked at and not been visited yet, and everything rough. It
//! stops being `exact` then, until everything is un-merged.

use crate::toy::{self, Bytes, Shown, ZERO};
use pagemerge_core::{FrameId, RegionId, RegionStats, Settings, Stats, TreeOrder};
use std::collections::{BTreeMap, BTreeSet};

/// Domain and node: pages of different trees never meet.
type Tree = (usize, u32);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shows {
    Nothing,
    Own,
    Zero,
    Frame(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Nothing,
    Own { changed: bool },
    Zero,
    Frame,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Nowhere,
    /// In the unstable tree of that scan.
    Candidate(u64),
    Sharer {
        frame: usize,
        broken: bool,
    },
}

#[derive(Clone, Copy, Debug)]
struct Item {
    /// The bytes at the last examination, which is all that a hash knows.
    hash: Option<Bytes>,
    doubted: bool,
    place: Place,
    age: u8,
    skips: u8,
}

#[derive(Clone, Copy, Debug)]
struct Page {
    shows: Shows,
    bytes: Bytes,
    changed: bool,
    /// Counted as put onto the zero page.
    zeroed: bool,
    item: Option<Item>,
    tree: Tree,
    region: RegionId,
}

#[derive(Clone, Debug)]
struct Frame {
    name: FrameId,
    bytes: Bytes,
    tree: Tree,
    listed: Vec<u32>,
    /// Sharers not known to have parted.
    mapped: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Registered,
    Unregistered,
    Dead,
}

#[derive(Clone, Copy, Debug)]
struct Region {
    id: RegionId,
    first: u32,
    end: u32,
    life: Life,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    page: u32,
    known: bool,
    by_hash: bool,
}

enum Next {
    End,
    Settled,
    Examine(Candidate),
}

/// What the scanner must have done.
#[derive(Debug)]
pub struct Model {
    /// Whether it still knows everything.
    pub exact: bool,
    kernel: bool,
    smart: bool,
    zero: bool,
    most: usize,
    nodes: u32,
    /// In the order of the scan.
    regions: Vec<Region>,
    order_known: bool,
    cursor: Option<RegionId>,
    at: u32,
    touched: bool,
    /// Pages looked at and not visited yet.
    window: Option<BTreeMap<u32, Seen>>,
    in_scan: bool,
    seq: u64,
    pages: BTreeMap<u32, Page>,
    frames: Vec<Option<Frame>>,
    names: BTreeMap<FrameId, usize>,
    clashes: BTreeSet<(Tree, Bytes)>,
    removed: Vec<FrameId>,
    scanned: u64,
    skipped: u64,
}

impl Model {
    /// A model of a scanner with these settings: `kernel` says that they are the kernel's ways.
    pub fn new(kernel: bool, settings: &Settings, nodes: u16) -> Self {
        assert_eq!(kernel, settings.tree_order == TreeOrder::Content);
        assert_eq!(
            (kernel, !kernel),
            (settings.lagging_records, settings.write_tracking)
        );
        Self {
            exact: true,
            kernel,
            smart: settings.smart_scan,
            zero: settings.use_zero_pages,
            most: settings.max_page_sharing as usize,
            nodes: if settings.merge_across_nodes {
                1
            } else {
                nodes.into()
            },
            regions: Vec::new(),
            order_known: true,
            cursor: None,
            at: 0,
            touched: false,
            window: None,
            in_scan: false,
            seq: 0,
            pages: BTreeMap::new(),
            frames: Vec::new(),
            names: BTreeMap::new(),
            clashes: BTreeSet::new(),
            removed: Vec::new(),
            scanned: 0,
            skipped: 0,
        }
    }

    // ------------------------------------------------------------------ what the program does

    /// A page is written, or discarded.
    pub fn write(&mut self, page: u32, bytes: Option<Bytes>) {
        if !self.exact {
            return;
        }
        if self
            .window
            .as_ref()
            .is_some_and(|rest| rest.contains_key(&page))
        {
            self.exact = false;
        }
        self.set(page, bytes);
    }

    fn set(&mut self, page: u32, bytes: Option<Bytes>) {
        let page = self.page(page);
        page.shows = if bytes.is_some() {
            Shows::Own
        } else {
            Shows::Nothing
        };
        (page.bytes, page.changed) = (bytes.unwrap_or(ZERO), true);
    }

    /// A region is registered.
    pub fn register(&mut self, id: RegionId, first: u32, domain: usize, bytes: &[Option<Bytes>]) {
        if !self.exact {
            self.order_known = false;
            return;
        }
        let end = first + u32::try_from(bytes.len()).expect("a region is small");
        let at = self.position(self.cursor);
        let life = Life::Registered;
        self.regions.insert(
            at,
            Region {
                id,
                first,
                end,
                life,
            },
        );
        for (page, &bytes) in (first..).zip(bytes) {
            self.pages.insert(
                page,
                Page {
                    shows: Shows::Nothing,
                    bytes: ZERO,
                    changed: true,
                    zeroed: false,
                    item: None,
                    tree: (domain, page % self.nodes),
                    region: id,
                },
            );
            self.set(page, bytes);
        }
    }

    /// Pages are discarded through the engine.
    pub fn vacated(&mut self, page: u32, removed: &[FrameId]) {
        if !self.exact {
            return;
        }
        self.set(page, None);
        self.notice(page, Seen::Nothing);
        if let Some(window) = &mut self.window
            && let Some(seen) = window.get_mut(&page)
        {
            *seen = Seen::Nothing;
        }
        if !self.kernel {
            self.drop_item(page);
        }
        self.hear(removed);
    }

    /// A region is unregistered, and nothing in it is refused.
    pub fn unregister(&mut self, id: RegionId, removed: &[FrameId]) {
        if !self.exact {
            self.order_known = false;
            return;
        }
        let region = self.region(id);
        self.unshare(region);
        if self.kernel {
            self.region_mut(id).life = Life::Unregistered;
        } else {
            self.drop_items(region, region.first);
            self.drop_region(id);
        }
        self.hear(removed);
    }

    /// It is registered again.
    pub fn revive(&mut self, id: RegionId) {
        if !self.exact {
            self.order_known = false;
            return;
        }
        self.region_mut(id).life = Life::Registered;
    }

    /// A region's memory is gone.
    pub fn forget(&mut self, id: RegionId, removed: &[FrameId]) {
        if !self.exact {
            self.order_known = false;
            return;
        }
        let region = self.region(id);
        for page in region.first..region.end {
            self.set(page, None);
            self.notice(page, Seen::Nothing);
        }
        let here = self.cursor == Some(id);
        if here {
            self.window = None;
        }
        let none = self.items(region) == 0;
        self.region_mut(id).life = Life::Dead;
        if !self.kernel || (!here && none) {
            self.drop_items(region, region.first);
            self.drop_region(id);
        } else if !here {
            // To the place right behind the cursor.
            self.regions.retain(|it| it.id != id);
            let at = self.cursor.map_or(0, |_| self.position(self.cursor) + 1);
            let life = Life::Dead;
            self.regions.insert(at, Region { life, ..region });
        }
        self.hear(removed);
    }

    /// Everything has been un-merged: from here on all is known again, unless something `tame` is not.
    pub fn unmerge(&mut self, now: &[toy::Page], settings: &Settings, stats: &Stats, tame: bool) {
        self.exact = tame && self.order_known;
        self.change(settings, &[]);
        (self.scanned, self.skipped) = (stats.pages_scanned, stats.pages_skipped);
        self.regions.retain(|it| it.life != Life::Dead);
        for (number, page) in &mut self.pages {
            let it = now[*number as usize];
            page.shows = match it.shown {
                Shown::Nothing => Shows::Nothing,
                Shown::Own => Shows::Own,
                other => panic!("page {number} shows {other:?} after un-merging"),
            };
            (page.bytes, page.changed) = (it.bytes, it.written);
            (page.zeroed, page.item) = (false, None);
        }
        self.frames.clear();
        self.names.clear();
        self.enter(None);
        (self.in_scan, self.seq) = (false, 0);
    }

    /// Settings that the model knows have changed.
    pub fn change(&mut self, to: &Settings, removed: &[FrameId]) {
        self.smart = to.smart_scan;
        self.zero = to.use_zero_pages;
        self.most = to.max_page_sharing as usize;
        if self.exact {
            self.hear(removed);
        }
    }

    /// Everything merged is looked at.
    pub fn refresh(&mut self) {
        if self.exact {
            self.sweep();
        }
    }

    // ------------------------------------------------------------------ the scan

    /// Whether pages in an unstable tree have changed in it, in the kernel's order: then a search may end
    /// in any way that merges nothing, and the scan is to go on page by page.
    pub fn tree_may_lie(&self) -> bool {
        self.kernel && self.pages.values().any(|page| self.lies(page))
    }

    fn lies(&self, page: &Page) -> bool {
        let Some(item) = page
            .item
            .filter(|item| item.place == Place::Candidate(self.seq))
        else {
            return false;
        };
        page.shows != Shows::Own
            || item.hash != Some(page.bytes)
            || self.region(page.region).life != Life::Registered
    }

    /// One step over at most `budget` pages. `shown` and `removed` are what came of it, and `unshared`
    /// the scanner's own count. Returns whether a scan has ended.
    pub fn step(
        &mut self,
        budget: u32,
        shown: &BTreeMap<u32, FrameId>,
        removed: &[FrameId],
        unshared: u64,
    ) -> bool {
        if !self.exact || budget == 0 || self.regions.is_empty() {
            return false;
        }
        if self.kernel || !self.in_scan {
            self.sweep();
        }
        if !self.in_scan {
            for (tree, bytes) in std::mem::take(&mut self.clashes) {
                self.recall(tree, bytes);
            }
            self.in_scan = true;
            self.enter(self.regions.first().map(|it| it.id));
        }
        // Whenever in this step a search passed them, nothing could tell the difference.
        self.removed.clear();
        for name in removed {
            if let Some(&frame) = self.names.get(name)
                && self.frame(frame).mapped == 0
            {
                self.remove_frame(frame);
            }
        }
        let (mut left, mut ended) = (budget, false);
        let mut batch = Vec::new();
        while left > 0 && !ended {
            match self.next() {
                Next::End => ended = true,
                Next::Settled => left -= 1,
                Next::Examine(candidate) => {
                    left -= 1;
                    self.detach(candidate.page);
                    batch.push(candidate);
                }
            }
            if self.kernel {
                self.examine(&mut batch, shown, unshared);
            }
        }
        self.scanned += u64::from(budget - left);
        self.examine(&mut batch, shown, unshared);
        if ended {
            self.seq += 1;
            self.in_scan = false;
        }
        if self.exact {
            let mut heard = removed.to_vec();
            heard.sort_unstable();
            self.removed.sort_unstable();
            assert_eq!(heard, self.removed, "frames removed");
        }
        ended
    }

    fn next(&mut self) -> Next {
        while let Some(id) = self.cursor {
            let region = self.region(id);
            if region.life == Life::Registered {
                self.touched = true;
                while self.at < region.end {
                    let page = self.at;
                    let seen = if self.kernel {
                        self.seen(page)
                    } else {
                        if self.window.is_none() {
                            self.look(page, region.end);
                        }
                        let window = self.window.as_mut().expect("it has just been made");
                        window.remove(&page).expect("a page ahead is in the window")
                    };
                    self.at += 1;
                    if let Some(next) = self.visit(page, seen) {
                        return next;
                    }
                }
            }
            let dead = region.life == Life::Dead;
            self.drop_items(region, if dead { region.first } else { self.at });
            if self.touched && !dead {
                self.enter(self.after(id));
            } else {
                self.drop_region(id);
                self.in_scan = true;
            }
        }
        Next::End
    }

    fn seen(&self, page: u32) -> Seen {
        let page = &self.pages[&page];
        match page.shows {
            Shows::Nothing => Seen::Nothing,
            Shows::Zero => Seen::Zero,
            Shows::Frame(_) => Seen::Frame,
            Shows::Own => Seen::Own {
                changed: page.changed,
            },
        }
    }

    /// Looks at the rest of a region, and so uses up what is known of writes.
    fn look(&mut self, from: u32, end: u32) {
        let mut window = BTreeMap::new();
        for page in from..end {
            let seen = self.seen(page);
            window.insert(page, seen);
            match seen {
                Seen::Own { changed: true } => self.seen_written(page),
                Seen::Nothing | Seen::Zero => self.leave_candidates(page),
                _ => {}
            }
            self.page(page).changed = false;
        }
        self.window = Some(window);
    }

    fn seen_written(&mut self, page: u32) {
        if self.item(page).is_some_and(|item| !item.doubted) {
            self.leave_candidates(page);
            if let Some(item) = self.item(page) {
                item.hash = None;
            }
        }
    }

    fn visit(&mut self, page: u32, seen: Seen) -> Option<Next> {
        self.notice(page, seen);
        let changed = match seen {
            Seen::Nothing | Seen::Zero => {
                self.drop_item(page);
                return None;
            }
            Seen::Frame => return self.kernel.then_some(Next::Settled),
            Seen::Own { changed } => changed,
        };
        let (smart, zero, kernel) = (self.smart, self.zero, self.kernel);
        let item = self.page(page).item.get_or_insert(Item {
            hash: None,
            doubted: false,
            place: Place::Nowhere,
            age: 0,
            skips: 0,
        });
        // Whether the bytes are those of the hash; `None` if only hashing can tell.
        let mut written = (!kernel).then_some(changed);
        let again = zero && item.hash == Some(ZERO);
        if written == Some(false)
            && matches!(item.place, Place::Candidate(_))
            && item.hash.is_some()
            && !item.doubted
            && !again
        {
            return None;
        }
        if item.doubted || (!changed && matches!(item.place, Place::Sharer { .. })) {
            written = None;
        }
        if written == Some(true) {
            (item.hash, item.doubted) = (None, false);
            self.detach(page);
            return Some(Next::Settled);
        }
        if smart && leave_out(item) {
            if !kernel && written.is_none() && item.hash.is_some() {
                item.doubted = true;
            }
            self.skipped += 1;
            self.detach(page);
            return None;
        }
        Some(Next::Examine(Candidate {
            page,
            known: written == Some(false) && item.hash.is_some(),
            by_hash: written.is_none(),
        }))
    }

    fn examine(
        &mut self,
        batch: &mut Vec<Candidate>,
        shown: &BTreeMap<u32, FrameId>,
        unshared: u64,
    ) {
        let mut beside = Vec::new();
        for Candidate {
            page,
            known,
            by_hash,
        } in batch.drain(..)
        {
            let bytes = self.pages[&page].bytes;
            assert_eq!(self.pages[&page].shows, Shows::Own, "page {page}");
            let item = self.item(page).expect("it has been visited");
            let same = item.hash == Some(bytes);
            assert!(!known || same, "a write that nobody told");
            (item.hash, item.doubted) = (Some(bytes), false);
            if (same || !by_hash) && self.exact {
                self.merge(page, shown, unshared, &mut beside);
            }
        }
        for (tree, bytes) in beside {
            self.recall(tree, bytes);
        }
    }

    /// What becomes of a calm page. Notes in `beside` new frames whose bytes others have, too.
    fn merge(
        &mut self,
        page: u32,
        shown: &BTreeMap<u32, FrameId>,
        unshared: u64,
        beside: &mut Vec<(Tree, Bytes)>,
    ) {
        let Page { bytes, tree, .. } = self.pages[&page];
        if self.zero && bytes == ZERO {
            let it = self.page(page);
            (it.shows, it.zeroed, it.changed) = (Shows::Zero, true, true);
            if !self.kernel {
                self.drop_item(page);
            }
            return;
        }

        let equal: Vec<usize> = (0..self.frames.len())
            .filter(|&at| {
                let frame = self.frames[at].as_ref();
                frame.is_some_and(|it| it.mapped > 0 && (it.tree, it.bytes) == (tree, bytes))
            })
            .collect();
        let room = |&at: &usize| self.frame(at).listed.len() < self.most;
        if equal.iter().any(room) {
            let name = shown.get(&page);
            let name = name.unwrap_or_else(|| panic!("page {page} has not joined a frame"));
            let frame = self.names.get(name).copied();
            let joined = frame.filter(|it| equal.contains(it) && room(it));
            let joined = joined.unwrap_or_else(|| panic!("page {page} has joined {name:?}"));
            self.attach(page, joined);
            return;
        }

        let here: Vec<u32> = self
            .pages
            .iter()
            .filter(|&(_, it)| it.tree == tree && self.in_tree(it))
            .map(|(&number, _)| number)
            .collect();
        let partner = if self.kernel {
            let lies = here.iter().any(|it| self.lies(&self.pages[it]));
            let is_equal = |number: &u32| {
                let it = &self.pages[number];
                it.shows == Shows::Own
                    && it.bytes == bytes
                    && self.region(it.region).life == Life::Registered
            };
            if lies {
                match shown.get(&page) {
                    Some(name) => {
                        let other = shown.iter().find(|&(it, at)| *it != page && at == name);
                        let (&other, _) = other.expect("a frame of two");
                        assert!(
                            here.contains(&other) && is_equal(&other),
                            "{page} met {other}"
                        );
                        Some(other)
                    }
                    // In the tree, or in none.
                    None if unshared == self.unshared() => return,
                    None => None,
                }
            } else {
                here.into_iter().find(is_equal)
            }
        } else {
            let hash =
                |number: &&u32| self.pages[number].item.and_then(|it| it.hash) == Some(bytes);
            let same: Vec<u32> = here.iter().filter(hash).copied().collect();
            match same[..] {
                [] => None,
                [other] if self.pages[&other].shows != Shows::Own => return,
                [other] if self.pages[&other].bytes == bytes => Some(other),
                [_] => {
                    self.clashes.insert((tree, bytes));
                    None
                }
                // Which of them is met depends on the shape of the tree.
                _ => {
                    self.exact = false;
                    return;
                }
            }
        };

        let Some(partner) = partner else {
            let seq = self.seq;
            self.item(page).expect("it is examined").place = Place::Candidate(seq);
            return;
        };
        let name = shown.get(&page);
        let name = *name.unwrap_or_else(|| panic!("pages {page} and {partner} have not merged"));
        assert_eq!(
            shown.get(&partner),
            Some(&name),
            "pages {page} and {partner}"
        );
        let frame = self.frames.len();
        let taken = self.names.insert(name, frame);
        assert_eq!(taken, None, "{name:?} is in use");
        self.frames.push(Some(Frame {
            name,
            bytes,
            tree,
            listed: Vec::new(),
            mapped: 0,
        }));
        self.leave_candidates(partner);
        self.attach(partner, frame);
        self.attach(page, frame);
        if !equal.is_empty() {
            beside.push((tree, bytes));
        }
    }

    // ------------------------------------------------------------------ who is where

    fn in_tree(&self, page: &Page) -> bool {
        match page.item.map(|item| item.place) {
            Some(Place::Candidate(seq)) => !self.kernel || seq == self.seq,
            _ => false,
        }
    }

    fn attach(&mut self, page: u32, frame: usize) {
        let it = self.frames[frame].as_mut().expect("a frame that is there");
        it.listed.push(page);
        it.mapped += 1;
        // A candidate that has been looked at may find its twin before it is visited.
        if let Some(seen) = self.window.as_mut().and_then(|it| it.get_mut(&page)) {
            *seen = Seen::Frame;
        }
        let it = self.page(page);
        (it.shows, it.changed) = (Shows::Frame(frame), true);
        let broken = false;
        it.item.as_mut().expect("it is examined").place = Place::Sharer { frame, broken };
    }

    fn leave_candidates(&mut self, page: u32) {
        if let Some(item) = self.item(page)
            && matches!(item.place, Place::Candidate(_))
        {
            item.place = Place::Nowhere;
        }
    }

    fn detach(&mut self, page: u32) {
        self.leave_candidates(page);
        let place = self.item(page).map(|item| item.place);
        if let Some(Place::Sharer { frame, broken }) = place {
            assert!(broken, "page {page} still shows its frame");
            if self.frame(frame).mapped == 0 {
                self.remove_frame(frame);
                return;
            }
            let most = self.most;
            let it = self.frames[frame].as_mut().expect("a frame that is there");
            let was_full = it.listed.len() >= most;
            it.listed.retain(|&other| other != page);
            let (tree, bytes) = (it.tree, it.bytes);
            self.item(page).expect("it has one").place = Place::Nowhere;
            if was_full {
                self.recall(tree, bytes);
            }
        }
    }

    /// Where candidates are kept: those with these bytes are to be examined again.
    fn recall(&mut self, tree: Tree, bytes: Bytes) {
        if self.kernel {
            return;
        }
        for page in self.pages.values_mut().filter(|page| page.tree == tree) {
            if let Some(item) = &mut page.item
                && matches!(item.place, Place::Candidate(_))
                && item.hash == Some(bytes)
            {
                item.place = Place::Nowhere;
            }
        }
    }

    fn remove_frame(&mut self, frame: usize) {
        let it = self.frames[frame].take().expect("a frame that is there");
        assert_eq!(it.mapped, 0, "{it:?} still has pages");
        for page in it.listed {
            self.item(page).expect("a sharer has one").place = Place::Nowhere;
        }
        self.names.remove(&it.name);
        self.removed.push(it.name);
    }

    /// What the scanner has removed besides what it visited: all of it must have lost its pages.
    fn hear(&mut self, removed: &[FrameId]) {
        for name in removed {
            if let Some(&frame) = self.names.get(name) {
                self.remove_frame(frame);
            }
        }
        self.removed.clear();
    }

    fn sweep(&mut self) {
        for region in self.regions.clone() {
            if region.life == Life::Registered {
                for page in region.first..region.end {
                    self.notice(page, self.seen(page));
                }
            }
        }
    }

    fn notice(&mut self, page: u32, seen: Seen) {
        let it = self.page(page);
        it.zeroed &= seen == Seen::Zero;
        if seen != Seen::Frame {
            self.part(page);
        }
    }

    fn part(&mut self, page: u32) {
        if let Some(item) = self.item(page)
            && let Place::Sharer { frame, broken } = &mut item.place
            && !std::mem::replace(broken, true)
        {
            let frame = *frame;
            self.frames[frame]
                .as_mut()
                .expect("a frame that is there")
                .mapped -= 1;
        }
    }

    /// Gives all pages of a region their own bytes.
    fn unshare(&mut self, region: Region) {
        if self.cursor == Some(region.id)
            && let Some(rest) = self.window.take()
        {
            for (page, seen) in rest {
                if seen == (Seen::Own { changed: true }) {
                    self.seen_written(page);
                }
            }
        }
        for page in region.first..region.end {
            let it = self.page(page);
            it.zeroed = false;
            if matches!(it.shows, Shows::Zero | Shows::Frame(_)) {
                (it.shows, it.changed) = (Shows::Own, true);
            }
            let bytes = it.bytes;
            if let Some(item) = &mut it.item
                && matches!(item.place, Place::Sharer { broken: false, .. })
            {
                item.doubted = item.hash == Some(bytes) || item.hash.is_some();
            }
            self.part(page);
        }
    }

    fn drop_item(&mut self, page: u32) {
        self.detach(page);
        self.page(page).item = None;
    }

    fn drop_items(&mut self, region: Region, from: u32) {
        for page in from..region.end {
            self.drop_item(page);
        }
    }

    fn drop_region(&mut self, id: RegionId) {
        let next = self.after(id);
        self.regions.retain(|it| it.id != id);
        if self.cursor == Some(id) {
            self.enter(next);
        }
        if self.regions.is_empty() && self.cursor.is_none() {
            self.in_scan = false;
        }
    }

    fn enter(&mut self, region: Option<RegionId>) {
        self.cursor = region;
        self.at = region.map_or(0, |id| self.region(id).first);
        (self.touched, self.window) = (false, None);
    }

    fn position(&self, id: Option<RegionId>) -> usize {
        let found = self.regions.iter().position(|it| Some(it.id) == id);
        found.unwrap_or(self.regions.len())
    }

    fn after(&self, id: RegionId) -> Option<RegionId> {
        self.regions
            .get(self.position(Some(id)) + 1)
            .map(|it| it.id)
    }

    fn region(&self, id: RegionId) -> Region {
        self.regions[self.position(Some(id))]
    }

    fn region_mut(&mut self, id: RegionId) -> &mut Region {
        let at = self.position(Some(id));
        &mut self.regions[at]
    }

    fn page(&mut self, page: u32) -> &mut Page {
        self.pages.get_mut(&page).expect("a registered page")
    }

    fn item(&mut self, page: u32) -> Option<&mut Item> {
        self.page(page).item.as_mut()
    }

    fn frame(&self, frame: usize) -> &Frame {
        self.frames[frame].as_ref().expect("a frame that is there")
    }

    fn items(&self, region: Region) -> u64 {
        let pages = self.pages.range(region.first..region.end);
        pages.filter(|(_, page)| page.item.is_some()).count() as u64
    }

    fn unshared(&self) -> u64 {
        let place = |page: &&Page| {
            matches!(
                page.item,
                Some(Item {
                    place: Place::Candidate(_),
                    ..
                })
            )
        };
        self.pages.values().filter(place).count() as u64
    }

    // ------------------------------------------------------------------ what must be seen

    /// Asserts what a page shows.
    ///
    /// # Panics
    /// When it is something else.
    pub fn assert_shows(&self, number: u32, shown: Shown) {
        let Some(page) = self.pages.get(&number) else {
            return;
        };
        let right = match page.shows {
            Shows::Nothing => shown == Shown::Nothing,
            Shows::Own => shown == Shown::Own,
            Shows::Zero => shown == Shown::Zeroed,
            // A frame that nobody lists may show in memory that is not registered any more.
            Shows::Frame(frame) => shown == Shown::Frame(self.frame(frame).name),
        };
        assert!(right, "page {number} shows {shown:?} instead of {page:?}");
    }

    /// Asserts the counters.
    ///
    /// # Panics
    /// When one is wrong.
    pub fn assert_counters(&self, stats: &Stats) {
        let frames = || {
            self.frames
                .iter()
                .flatten()
                .filter(|it| !it.listed.is_empty())
        };
        let shared = frames().count() as u64;
        let sharing = frames().map(|it| it.listed.len() as u64 - 1).sum::<u64>();
        let items = self.pages.values().filter(|it| it.item.is_some()).count() as u64;
        let unshared = self.unshared();
        let zero = self.pages.values().filter(|it| it.zeroed).count() as u64;
        let expected = [
            ("pages_shared", shared, stats.pages_shared),
            ("pages_sharing", sharing, stats.pages_sharing),
            ("pages_unshared", unshared, stats.pages_unshared),
            ("rmap_items", items, stats.rmap_items),
            (
                "pages_volatile",
                items - shared - sharing - unshared,
                stats.pages_volatile,
            ),
            ("ksm_zero_pages", zero, stats.ksm_zero_pages),
            ("pages_scanned", self.scanned, stats.pages_scanned),
            ("pages_skipped", self.skipped, stats.pages_skipped),
            ("full_scans", self.seq, stats.full_scans),
            ("regions", self.regions.len() as u64, stats.regions),
        ];
        for (name, model, scanner) in expected {
            assert_eq!(scanner, model, "{name}: {stats:?}");
        }
        let saved = i64::try_from((sharing + zero) * 4096).expect("it is small");
        let paid = i64::try_from(items * 64).expect("it is small");
        assert_eq!(stats.general_profit, saved - paid);
    }

    /// Asserts a region's counters.
    ///
    /// # Panics
    /// When one is wrong.
    pub fn assert_region(&self, id: RegionId, stats: RegionStats) {
        let region = self.region(id);
        let pages = || {
            self.pages
                .range(region.first..region.end)
                .map(|(_, page)| page)
        };
        let sharer = |page: &&Page| {
            matches!(
                page.item,
                Some(Item {
                    place: Place::Sharer { .. },
                    ..
                })
            )
        };
        let merging = pages().filter(sharer).count() as u64;
        let zero = pages().filter(|page| page.zeroed).count() as u64;
        let told = (
            stats.ksm_rmap_items,
            stats.ksm_merging_pages,
            stats.ksm_zero_pages,
        );
        assert_eq!(told, (self.items(region), merging, zero), "{region:?}");
        assert!(stats.ksm_mergeable);
    }
}

/// Smart scan: whether this look at a page is left out. Pages are looked at three times; after that a look
/// that is not left out is followed by 1, 2, 4 or 8 that are, by age.
fn leave_out(item: &mut Item) -> bool {
    let age = item.age;
    item.age = age.saturating_add(1);
    if age < 3 {
        return false;
    }
    if item.skips > 0 {
        item.skips -= 1;
        return true;
    }
    item.skips = match age {
        0..=3 => 1,
        4..=5 => 2,
        6..=8 => 4,
        _ => 8,
    };
    false
}
