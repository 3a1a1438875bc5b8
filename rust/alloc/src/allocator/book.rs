//! The books of an allocator: which pages of which arena belong to whom. Numbers only; nothing here touches
//! memory, so a model can check it ([`Book::check`]).
//!
//! # The life of a run of pages
//! ```text
//!   free -- take --> live -- give --> dirty -- flush --> away -- back --> free
//!                     ^                 |
//!                     +----- take ------+   (zeroed by writing)
//! ```
//! * *free*: reads as zero. Neighbours are joined at once.
//! * *live*: somebody's.
//! * *dirty*: given back, and full of what its owner left. Kept for the next one of its class.
//! * *away*: being discarded.
//!
//! # Invariants (proved by [`Book::check`])
//! * B1. The runs of an arena follow one another without a gap, and each is in one state.
//! * B2. No two free runs are neighbours, and the set of free runs has exactly these.
//! * B3. A dirty run is in the list of its class, an away run in the set of those.
//! * B4. The counters are the sums that they claim to be.
//!
//! # Cost
//! Eight bytes for each page of an arena, beside the data and touched only where runs begin and end; 24
//! bytes for each free run and each that is away. Taking a dirty run and giving one back cost no search; taking a free run and
//! joining neighbours cost the logarithm of the number of free runs.

use super::classes::class_of;
use pagemerge_linux::Run;
use std::collections::{BTreeMap, BTreeSet};

/// What an entry of a [`BTreeSet`] or [`BTreeMap`] of two numbers takes, about.
const ENTRY_BYTES: usize = 24;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    Live,
    Dirty,
    Away,
}

/// The state and the pages of a run, as its first and its last page have them.
#[derive(Clone, Copy, Debug, Default)]
struct Tag(u32);

/// Pages that a tag can tell of.
const MOST_PAGES: u32 = (1 << 30) - 1;

impl Tag {
    fn new(state: State, pages: u32) -> Self {
        assert!(pages <= MOST_PAGES, "an arena of {pages} pages");
        Self((state as u32) << 30 | pages)
    }

    fn state(self) -> State {
        [State::Free, State::Live, State::Dirty, State::Away][(self.0 >> 30) as usize]
    }

    fn pages(self) -> u32 {
        self.0 & MOST_PAGES
    }
}

/// An arena in the books.
#[derive(Debug)]
struct Ground<A> {
    arena: A,
    pages: u32,
    use_: Use,
}

#[derive(Debug)]
enum Use {
    /// One block has all of it.
    Whole { bytes: usize },
    /// Runs of many. A run's first and last page have its tag; what others have is old. Where a live run
    /// begins, `live` has by how much its payload is shorter, plus one, and elsewhere 0.
    Shared { tags: Vec<Tag>, live: Vec<u32> },
}

/// A dirty run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Dirty {
    addr: usize,
    /// So many pages from its beginning are not zero, perhaps.
    pages: u32,
}

/// Pages of an arena, by the arena's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) arena: usize,
    pub(crate) run: Run,
}

/// A block that has been taken.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Taken<A> {
    pub(crate) addr: usize,
    /// Bytes at its beginning that have to be made zero first: where, and how many.
    pub(crate) zero: Option<(A, usize, usize)>,
}

/// What has come back.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Given<A> {
    /// A run among others.
    Run,
    /// All of an arena, which is out of the books now: its bytes.
    Whole(A, usize),
}

/// How a block is to change its size.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Resized<A> {
    /// It has, where it is. Bytes that are no longer its own have to be made zero: where, and how many.
    InPlace(Option<(A, usize, usize)>),
    /// It has to move; this is its size.
    Moves(usize),
}

/// The numbers of an allocator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sums {
    pub(crate) allocations: usize,
    pub(crate) live_bytes: usize,
    /// Pages that live blocks have bytes in.
    pub(crate) live_pages: usize,
    pub(crate) dirty_pages: usize,
    pub(crate) away_pages: usize,
    /// Pages of all arenas.
    pub(crate) pages: usize,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Book<A> {
    page: usize,
    grounds: BTreeMap<usize, Ground<A>>,
    /// Pages and address.
    free: BTreeSet<(u32, usize)>,
    dirty: Vec<Vec<Dirty>>,
    /// Address and pages.
    away: BTreeMap<usize, u32>,
    /// Shared arenas that are free as a whole.
    empty: usize,
    sums: Sums,
}

impl<A: Clone> Book<A> {
    /// For pages of so many bytes, and shared arenas of at most so many pages.
    pub(crate) fn new(page: usize, largest: u32) -> Self {
        Self {
            page,
            grounds: BTreeMap::new(),
            free: BTreeSet::new(),
            dirty: vec![Vec::new(); class_of(largest).index + 1],
            away: BTreeMap::new(),
            empty: 0,
            sums: Sums::default(),
        }
    }

    pub(crate) fn sums(&self) -> Sums {
        self.sums
    }

    pub(crate) fn arenas(&self) -> impl Iterator<Item = &A> {
        self.grounds.values().map(|ground| &ground.arena)
    }

    pub(crate) fn arena_at(&self, addr: usize) -> Option<&A> {
        self.grounds.get(&addr).map(|ground| &ground.arena)
    }

    /// Bytes of the books themselves.
    pub(crate) fn bytes(&self) -> usize {
        let tags = |ground: &Ground<A>| match &ground.use_ {
            Use::Whole { .. } => 0,
            Use::Shared { tags, live } => tags.capacity() * 4 + live.capacity() * 4,
        };
        let grounds = self.grounds.values();
        let grounds: usize = grounds
            .map(|ground| tags(ground) + size_of::<Ground<A>>() + ENTRY_BYTES)
            .sum();
        let dirty = self.dirty.iter();
        let dirty: usize = dirty
            .map(|list| list.capacity() * size_of::<Dirty>() + size_of::<Vec<Dirty>>())
            .sum();
        size_of::<Self>() + grounds + dirty + (self.free.len() + self.away.len()) * ENTRY_BYTES
    }

    /// How many pages hold `bytes` bytes; `None` when no arena has so many.
    pub(crate) fn pages_for(&self, bytes: usize) -> Option<u32> {
        Self::pages_in(self.page, bytes)
    }

    /// The same, for pages of `page` bytes.
    pub(crate) fn pages_in(page: usize, bytes: usize) -> Option<u32> {
        let pages = u32::try_from(bytes.max(1).div_ceil(page)).ok()?;
        (pages <= MOST_PAGES).then_some(pages)
    }

    /// A new arena for many blocks, all of it zero.
    pub(crate) fn add(&mut self, addr: usize, pages: u32, arena: A) {
        let use_ = Use::Shared {
            tags: vec![Tag::default(); pages as usize],
            live: vec![0; pages as usize],
        };
        self.put(addr, pages, arena, use_);
        self.empty += 1;
        self.mark(Place::of(addr, 0, pages), State::Free);
        self.free.insert((pages, addr));
    }

    /// A new arena for one block of `bytes` bytes, which begins where it does.
    pub(crate) fn add_whole(&mut self, addr: usize, pages: u32, bytes: usize, arena: A) {
        self.put(addr, pages, arena, Use::Whole { bytes });
        self.count_in(bytes);
    }

    fn put(&mut self, addr: usize, pages: u32, arena: A, use_: Use) {
        let ground = Ground { arena, pages, use_ };
        let old = self.grounds.insert(addr, ground);
        assert!(old.is_none(), "two arenas at {addr:#x}");
        self.sums.pages += pages as usize;
    }

    fn count_in(&mut self, bytes: usize) {
        self.sums.allocations += 1;
        self.sums.live_bytes += bytes;
        self.sums.live_pages += bytes.max(1).div_ceil(self.page);
    }

    fn count_out(&mut self, bytes: usize) {
        self.sums.allocations -= 1;
        self.sums.live_bytes -= bytes;
        self.sums.live_pages -= bytes.max(1).div_ceil(self.page);
    }

    /// The arena that has `addr`, and which of its pages that is.
    fn find(&self, addr: usize) -> Option<(usize, u32)> {
        let (&arena, ground) = self.grounds.range(..=addr).next_back()?;
        let at = addr - arena;
        let page = u32::try_from(at / self.page).ok()?;
        (at.is_multiple_of(self.page) && page < ground.pages).then_some((arena, page))
    }

    fn ground(&self, arena: usize) -> &Ground<A> {
        &self.grounds[&arena]
    }

    /// The tag of a page where a run begins or ends, and there is one.
    fn tag(&self, arena: usize, page: u32) -> Tag {
        match &self.ground(arena).use_ {
            Use::Shared { tags, .. } => tags[page as usize],
            Use::Whole { .. } => unreachable!("an arena of one block has no runs"),
        }
    }

    fn mark(&mut self, place: Place, state: State) {
        let Some(Ground {
            use_: Use::Shared { tags, .. },
            ..
        }) = self.grounds.get_mut(&place.arena)
        else {
            unreachable!("an arena of one block has no runs");
        };
        let (first, pages) = (place.run.first as usize, place.run.pages);
        let tag = Tag::new(state, pages);
        tags[first] = tag;
        tags[first + pages as usize - 1] = tag;
    }

    fn addr(&self, place: Place) -> usize {
        place.arena + place.run.first as usize * self.page
    }

    fn live_entry(&mut self, place: Place) -> &mut u32 {
        let ground = self.grounds.get_mut(&place.arena);
        match ground.map(|ground| &mut ground.use_) {
            Some(Use::Shared { live, .. }) => &mut live[place.run.first as usize],
            _ => unreachable!("an arena of one block has no runs"),
        }
    }

    /// The live run that begins at `addr`, with its payload.
    fn live(&self, addr: usize) -> Option<(Place, usize)> {
        let (arena, first) = self.find(addr)?;
        let Use::Shared { tags, live } = &self.ground(arena).use_ else {
            return None;
        };
        let slack = live[first as usize].checked_sub(1)? as usize;
        let pages = tags[first as usize].pages();
        Some((
            Place::of(arena, first, pages),
            pages as usize * self.page - slack,
        ))
    }

    /// A run becomes live.
    fn begin(&mut self, place: Place, bytes: usize) {
        self.mark(place, State::Live);
        self.set_payload(place, bytes);
        self.count_in(bytes);
    }

    fn set_payload(&mut self, place: Place, bytes: usize) {
        let slack = place.run.pages as usize * self.page - bytes;
        *self.live_entry(place) =
            u32::try_from(slack + 1).expect("a run is little longer than its payload");
    }

    /// How many bytes the block at `addr` has, if there is one.
    pub(crate) fn payload(&self, addr: usize) -> Option<usize> {
        let (arena, first) = self.find(addr)?;
        match &self.ground(arena).use_ {
            Use::Whole { bytes } => (first == 0).then_some(*bytes),
            Use::Shared { .. } => self.live(addr).map(|(_, bytes)| bytes),
        }
    }

    /// The arena of the block at `addr`, and the pages that its bytes are in.
    pub(crate) fn pages_of(&self, addr: usize) -> Option<(A, Run)> {
        let bytes = self.payload(addr)?;
        let (arena, first) = self.find(addr)?;
        let pages = self.pages_for(bytes)?;
        Some((self.ground(arena).arena.clone(), Run { first, pages }))
    }

    /// A block for `bytes` bytes, if there is room. It is not for those that get an arena of their own.
    pub(crate) fn take(&mut self, bytes: usize) -> Option<Taken<A>> {
        let class = class_of(self.pages_for(bytes)?);
        if let Some(dirty) = self.dirty[class.index].pop() {
            let (arena, first) = self.find(dirty.addr).expect("a dirty run is in an arena");
            self.sums.dirty_pages -= dirty.pages as usize;
            self.begin(Place::of(arena, first, class.pages), bytes);
            let offset = first as usize * self.page;
            let zero = dirty.pages as usize * self.page;
            return Some(Taken {
                addr: dirty.addr,
                zero: Some((self.ground(arena).arena.clone(), offset, zero)),
            });
        }
        // The shortest that is long enough, and of those the one at the lowest address.
        let (pages, addr) = *self.free.range((class.pages, 0)..).next()?;
        self.take_free(addr, pages, class.pages);
        let (arena, first) = self.find(addr).expect("a free run is in an arena");
        self.begin(Place::of(arena, first, class.pages), bytes);
        Some(Taken { addr, zero: None })
    }

    /// Takes the first `wanted` pages of a free run.
    fn take_free(&mut self, addr: usize, pages: u32, wanted: u32) {
        self.free.remove(&(pages, addr));
        let (arena, first) = self.find(addr).expect("a free run is in an arena");
        if pages == self.ground(arena).pages {
            self.empty -= 1;
        }
        if wanted < pages {
            let rest = Place::of(arena, first + wanted, pages - wanted);
            self.mark(rest, State::Free);
            self.free.insert((pages - wanted, self.addr(rest)));
        }
    }

    /// The block at `addr` is nobody's any more. `None`: there is none.
    pub(crate) fn give(&mut self, addr: usize) -> Option<Given<A>> {
        let (arena, first) = self.find(addr)?;
        if let Use::Whole { bytes } = self.ground(arena).use_ {
            if first != 0 {
                return None;
            }
            self.count_out(bytes);
            let ground = self.grounds.remove(&arena)?;
            self.sums.pages -= ground.pages as usize;
            return Some(Given::Whole(
                ground.arena,
                ground.pages as usize * self.page,
            ));
        }
        let (place, bytes) = self.live(addr)?;
        self.count_out(bytes);
        *self.live_entry(place) = 0;
        self.mark(place, State::Dirty);
        let pages = self.pages_for(bytes).expect("it was taken");
        self.sums.dirty_pages += pages as usize;
        let class = class_of(place.run.pages);
        self.dirty[class.index].push(Dirty { addr, pages });
        Some(Given::Run)
    }

    /// Changes the size of the block at `addr` where that can be done in its place.
    pub(crate) fn resize(&mut self, addr: usize, bytes: usize) -> Option<Resized<A>> {
        let old = self.payload(addr)?;
        let (arena, first) = self.find(addr)?;
        let have = match self.ground(arena).use_ {
            Use::Whole { .. } => self.ground(arena).pages,
            Use::Shared { .. } => self.tag(arena, first).pages(),
        };
        let wanted = self.pages_for(bytes).map(class_of);
        match &mut self.grounds.get_mut(&arena)?.use_ {
            Use::Whole { bytes: payload } => {
                // Such a one has the pages that it needs, and no more.
                if bytes.max(1).div_ceil(self.page) != have as usize {
                    return Some(Resized::Moves(old));
                }
                *payload = bytes;
            }
            Use::Shared { .. } => {
                if wanted.is_none_or(|class| class.pages != have) {
                    return Some(Resized::Moves(old));
                }
                self.set_payload(Place::of(arena, first, have), bytes);
            }
        }
        self.count_out(old);
        self.count_in(bytes);
        let zero = (bytes < old).then(|| {
            let offset = first as usize * self.page;
            let arena = self.ground(arena).arena.clone();
            (arena, offset + bytes, old - bytes)
        });
        Some(Resized::InPlace(zero))
    }

    /// All dirty runs go away: for each arena the pages that are to be discarded, neighbours as one.
    pub(crate) fn flush(&mut self) -> Vec<(usize, A, Vec<Run>)> {
        let lists = self.dirty.iter_mut();
        let mut runs: Vec<usize> = lists
            .flat_map(|list| list.drain(..))
            .map(|dirty| dirty.addr)
            .collect();
        self.sums.dirty_pages = 0;
        runs.sort_unstable();
        let mut batches: Vec<(usize, A, Vec<Run>)> = Vec::new();
        for addr in runs {
            let (arena, first) = self.find(addr).expect("a dirty run is in an arena");
            let pages = self.tag(arena, first).pages();
            match batches.last_mut() {
                Some((at, _, runs)) if *at == arena => {
                    let last = runs.last_mut().expect("a batch has a run");
                    if last.first + last.pages == first {
                        last.pages += pages;
                    } else {
                        runs.push(Run { first, pages });
                    }
                }
                _ => {
                    let ground = self.ground(arena).arena.clone();
                    batches.push((arena, ground, vec![Run { first, pages }]));
                }
            }
        }
        for (arena, _, runs) in &batches {
            for &run in runs {
                let place = Place { arena: *arena, run };
                self.mark(place, State::Away);
                self.away.insert(self.addr(place), run.pages);
                self.sums.away_pages += run.pages as usize;
            }
        }
        batches
    }

    /// What is away at the moment.
    pub(crate) fn away(&self) -> Vec<Place> {
        let place = |(&addr, &pages): (&usize, &u32)| {
            let (arena, first) = self.find(addr).expect("an away run is in an arena");
            Place::of(arena, first, pages)
        };
        self.away.iter().map(place).collect()
    }

    /// A run that was away is back, and reads as zero. (One that is not away is passed over: somebody has
    /// brought it back by other means.)
    pub(crate) fn back(&mut self, place: Place) {
        let addr = place.arena + place.run.first as usize * self.page;
        if self.away.get(&addr) != Some(&place.run.pages) {
            return;
        }
        self.away.remove(&addr);
        self.sums.away_pages -= place.run.pages as usize;
        let (arena, whole) = (place.arena, self.ground(place.arena).pages);
        let (mut first, mut pages) = (place.run.first, place.run.pages);
        if first > 0 {
            let before = self.tag(arena, first - 1);
            if before.state() == State::Free {
                first -= before.pages();
                pages += before.pages();
                self.free
                    .remove(&(before.pages(), arena + first as usize * self.page));
            }
        }
        let end = first + pages;
        if end < whole {
            let after = self.tag(arena, end);
            if after.state() == State::Free {
                pages += after.pages();
                self.free
                    .remove(&(after.pages(), arena + end as usize * self.page));
            }
        }
        let joined = Place::of(arena, first, pages);
        self.mark(joined, State::Free);
        self.free.insert((pages, self.addr(joined)));
        self.empty += usize::from(pages == whole);
    }

    /// Takes arenas that are free as a whole out of the books, but for `spare` of them.
    pub(crate) fn drop_empty(&mut self, spare: usize) -> Vec<A> {
        let mut gone = Vec::new();
        while self.empty > spare {
            // The longest runs are the last; one that is a whole arena need not be the very last.
            let found = self.free.iter().rev().find(|(pages, addr)| {
                self.grounds
                    .get(addr)
                    .is_some_and(|ground| ground.pages == *pages)
            });
            let Some(&(pages, addr)) = found else {
                unreachable!("{} arenas are free as a whole", self.empty);
            };
            self.free.remove(&(pages, addr));
            self.empty -= 1;
            self.sums.pages -= pages as usize;
            gone.extend(self.grounds.remove(&addr).map(|ground| ground.arena));
        }
        gone
    }

    /// Proves the invariants.
    ///
    /// # Errors
    /// The first that does not hold.
    pub(crate) fn check(&self) -> Result<(), String> {
        let mut sums = Sums::default();
        let (mut free, mut away, mut dirty) = (BTreeSet::new(), BTreeMap::new(), BTreeMap::new());
        let mut empty = 0;
        for (&arena, ground) in &self.grounds {
            sums.pages += ground.pages as usize;
            let (tags, live) = match &ground.use_ {
                Use::Whole { bytes } => {
                    sums.allocations += 1;
                    sums.live_bytes += bytes;
                    sums.live_pages += bytes.max(&1).div_ceil(self.page);
                    continue;
                }
                Use::Shared { tags, live } => (tags, live),
            };
            let (mut first, mut before_is_free) = (0, false);
            while first < ground.pages {
                let tag = tags[first as usize];
                let (pages, addr) = (tag.pages(), arena + first as usize * self.page);
                if pages == 0 || first + pages > ground.pages {
                    return Err(format!("B1: a run of {pages} pages at {addr:#x}"));
                }
                if tags[(first + pages) as usize - 1].0 != tag.0 {
                    return Err(format!("B1: the run at {addr:#x} ends with another tag"));
                }
                let begins = live[first as usize];
                let inside = &live[first as usize + 1..(first + pages) as usize];
                if inside.iter().any(|&entry| entry != 0)
                    || (begins != 0) != (tag.state() == State::Live)
                {
                    return Err(format!(
                        "B1: a live run begins within, or not, at {addr:#x}"
                    ));
                }
                match tag.state() {
                    State::Live => {
                        let bytes = pages as usize * self.page + 1 - begins as usize;
                        sums.allocations += 1;
                        sums.live_bytes += bytes;
                        sums.live_pages += bytes.max(1).div_ceil(self.page);
                    }
                    State::Free => {
                        if before_is_free {
                            return Err(format!("B2: two free runs meet at {addr:#x}"));
                        }
                        empty += usize::from(pages == ground.pages);
                        free.insert((pages, addr));
                    }
                    State::Dirty => {
                        dirty.insert(addr, class_of(pages).index);
                    }
                    State::Away => {
                        sums.away_pages += pages as usize;
                        away.insert(addr, pages);
                    }
                }
                before_is_free = tag.state() == State::Free;
                first += pages;
            }
        }
        let mut listed = BTreeMap::new();
        for (index, list) in self.dirty.iter().enumerate() {
            for run in list {
                sums.dirty_pages += run.pages as usize;
                if listed.insert(run.addr, index).is_some() {
                    return Err(format!("B3: {:#x} is in two lists", run.addr));
                }
            }
        }
        if free != self.free {
            return Err("B2: the set of free runs has others".into());
        }
        if listed != dirty || away != self.away {
            return Err("B3: the lists of dirty or away runs have others".into());
        }
        if sums != self.sums || empty != self.empty {
            return Err(format!(
                "B4: the counters say {:?} and {} empty arenas, not {sums:?} and {empty}",
                self.sums, self.empty
            ));
        }
        Ok(())
    }
}

impl Place {
    fn of(arena: usize, first: u32, pages: u32) -> Self {
        Self {
            arena,
            run: Run { first, pages },
        }
    }
}
