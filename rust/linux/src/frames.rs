//! The frame store: where each frame lies in a memfd, and when its place may be punched.
//!
//! A *slot* is one page of a sparse memfd. A frame is written into a fresh slot, once; pages are
//! merged onto it by mapping the slot privately over them, so copy-on-write is the kernel's.
//!
//! # Layout of a memfd
//! * The *dense extent* from offset 0: single frames and short runs, one after the other. A lone
//!   frame in a sparse range costs 593 bytes of kernel memory, a dense one 10.
//! * *Mirrors* above it: one for each region, as long as the region. A run of at least
//!   [`MIRROR_RUN`] neighbouring pages takes the slots that mirror its place, so that neighbours
//!   stay neighbours over batch borders, and a run of duplicates is one mapping.
//!
//! # When bytes go
//! A slot is used once. When no page shows its frame any more it is *punched* (finding F7: a pipe
//! may still hold the page; a punched page stays whole for it, an overwritten one would not), and
//! its number is not used again: what is still mapped there by pages that were written since reads
//! as zero if their owner discards them, as anonymous memory does. Holes cost nothing, and a memfd
//! has 2^31 slots; when they are used up a new generation begins.
//!
//! # Generations
//! A fork child maps the frames, too. Each generation has a memfd and *canaries*
//! ([`crate::sys::canary`]), which tell whether any descendant, however it was forked, is left that
//! may still map this generation's frames. While one is, nothing of it is punched, and new frames go
//! to a new generation; when the last is gone, what died meanwhile is punched.
//!
//! # Invariants
//! * F-1. A slot is written before it is bound to a frame, and never after.
//! * F-2. A slot is punched only when no page of this process shows it (the scanner has released
//!   its frame, or it was never mapped) and, unless it was never mapped, its generation's
//!   canaries say that nobody else is left, asked under [`NoFork`].
//! * F-3. Views are read-only for everyone but the writer below, and not inherited by children.
//!
//! # Departures from the plan
//! The plan reused punched slots and probed for forks by moving a canary page to and fro, which fails
//! for ever after any fork, and which any copy of that page misleads. Counting inherited mappings
//! instead tells when the last child has gone, needs no userfaultfd, and depends on no page. Not
//! reusing slots removes the case of foreign bytes altogether.

use crate::error::Error;
use crate::fork::NoFork;
use crate::sys::canary::Canaries;
use crate::sys::live::Live;
use crate::sys::mapping::{Advice, Mapping, Protection, Sharing};
use crate::sys::memfd::{Memfd, WriteStop};
use crate::sys::process::Resource;
use crate::{fork, sys};
use pagemerge_core::{FrameId, Reason, RegionId};
use std::collections::{HashMap, HashSet, hash_map};
use std::rc::Rc;

/// Runs of at least so many pages go to the mirror.
pub(crate) const MIRROR_RUN: u32 = 8;
/// Slots of a memfd: dense below, mirrors above.
const SLOTS: u32 = 1 << 31;
const DENSE_SLOTS: u32 = 1 << 28;
/// Slots of one view: 64 MiB with pages of 4 KiB.
const VIEW_SLOTS: u32 = 1 << 14;

/// A page of a generation's memfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    generation: u32,
    index: u32,
}

impl Slot {
    pub(crate) fn plus(self, pages: u32) -> Self {
        Self {
            index: self.index + pages,
            ..self
        }
    }
}

/// A mirror: the slots that stand for one region's pages.
struct Mirror {
    base: u32,
    used: crate::bitmap::Bitmap,
}

/// The engine's own mapping of a stretch of slots.
struct View {
    mapping: Rc<Mapping>,
    /// Frames that lie in it.
    alive: u32,
}

struct Generation {
    memfd: Rc<Memfd>,
    canaries: Canaries,
    /// Forks heard of when it was made.
    forks: u64,
    /// Full: no new frames.
    closed: bool,
    dense_next: u32,
    mirror_next: u32,
    mirrors: HashMap<RegionId, Mirror>,
    /// Frames that pages may show.
    alive: u64,
    /// Runs of slots whose frames are dead: (first, count).
    dead: Vec<(u32, u32)>,
    views: HashMap<u32, View>,
}

fn file_size_limit() -> Option<u64> {
    // What cannot be asked is not a limit; a write would say so.
    sys::process::limit(Resource::FileSize).ok().flatten()
}

/// All frames of one engine.
pub(crate) struct FrameStore {
    page: usize,
    generations: HashMap<u32, Generation>,
    current: u32,
    /// The slot of each frame; `index == u32::MAX` for none.
    slots: Vec<Slot>,
    /// Shared memory is given huge pages here: frames are then written through a mapping that
    /// refuses them (8 scattered frames would take 16 MiB).
    huge_shmem: bool,
    has_dead: bool,
}

const NO_SLOT: Slot = Slot {
    generation: 0,
    index: u32::MAX,
};

impl FrameStore {
    pub(crate) fn new(page: usize) -> Result<Self, Error> {
        let mut store = Self {
            page,
            generations: HashMap::new(),
            current: 0,
            slots: Vec::new(),
            huge_shmem: sys::memfd::huge_pages_by_default(),
            has_dead: false,
        };
        store.begin_generation()?;
        Ok(store)
    }

    fn begin_generation(&mut self) -> Result<(), Error> {
        let bytes = u64::from(SLOTS) * self.page as u64;
        if let Some(limit) = file_size_limit()
            && limit < bytes
        {
            return Err(Error::Limit(format!(
                "RLIMIT_FSIZE is {limit} bytes, and a file that grows past it would end the \
                 program by SIGXFSZ; raise it (ulimit -f unlimited)"
            )));
        }
        let memfd = Memfd::create(c"pagemerge", bytes).map_err(|e| {
            Error::os(
                format!("cannot create a memfd of {bytes} sparse bytes"),
                e.into(),
            )
        })?;
        let canaries = Canaries::new()
            .map_err(|e| Error::os("cannot make a fork canary (memfd)", e.into()))?;
        let number = self.generations.keys().max().map_or(1, |last| last + 1);
        self.generations.insert(
            number,
            Generation {
                memfd: Rc::new(memfd),
                canaries,
                forks: fork::forks(),
                closed: false,
                dense_next: 0,
                mirror_next: DENSE_SLOTS,
                mirrors: HashMap::new(),
                alive: 0,
                dead: Vec::new(),
                views: HashMap::new(),
            },
        );
        self.current = number;
        Ok(())
    }

    fn current(&mut self) -> &mut Generation {
        self.generations
            .get_mut(&self.current)
            .expect("the current generation exists")
    }

    /// To be called before a batch makes new frames: after a fork they go to a new generation, which
    /// can be punched while the child lives. (A fork that nobody told us of costs no more than that:
    /// punching asks the canaries.)
    pub(crate) fn begin_batch(&mut self) -> Result<(), Error> {
        let current = self.current();
        if !current.closed && current.forks == fork::forks() {
            return Ok(());
        }
        if !current.closed && current.alive == 0 && current.dead.is_empty() {
            // No child can map what was never there.
            current.forks = fork::forks();
            return Ok(());
        }
        self.begin_generation()
    }

    /// Fresh neighbouring slots for `pages` neighbouring pages of `region`, the first of which is
    /// its page number `at` of `region_pages`.
    pub(crate) fn place(
        &mut self,
        region: RegionId,
        region_pages: u32,
        at: u32,
        pages: u32,
    ) -> Result<Slot, Reason> {
        let number = self.current;
        let generation = self.current();
        if pages >= MIRROR_RUN {
            if !generation.mirrors.contains_key(&region)
                && SLOTS - generation.mirror_next >= region_pages
            {
                let base = generation.mirror_next;
                generation.mirror_next += region_pages;
                let used = crate::bitmap::Bitmap::new(region_pages as usize);
                generation.mirrors.insert(region, Mirror { base, used });
            }
            if let Some(mirror) = generation.mirrors.get_mut(&region)
                && !mirror.used.any(at as usize, (at + pages) as usize)
            {
                for page in at..at + pages {
                    mirror.used.set(page as usize, true);
                }
                return Ok(Slot {
                    generation: number,
                    index: mirror.base + at,
                });
            }
        }
        if DENSE_SLOTS - generation.dense_next < pages {
            generation.closed = true;
            return Err(Reason::FramesFull);
        }
        let index = generation.dense_next;
        generation.dense_next += pages;
        Ok(Slot {
            generation: number,
            index,
        })
    }

    /// Copies live pages into as many fresh slots. Returns how many were written, and why it stopped
    /// if it did. The bytes are a snapshot that other threads may have torn: they must be compared
    /// in a window before anything is mapped.
    pub(crate) fn write(&mut self, slot: Slot, from: Live) -> (u32, Option<Reason>) {
        let pages = u32::try_from(from.span().len / self.page).expect("a run of a region's pages");
        if self.huge_shmem {
            for page in 0..pages {
                let source = from.part(page as usize * self.page, self.page);
                let copied = self
                    .view(slot.plus(page))
                    .and_then(|(view, at)| source.copy_to(&view, at).map_err(|_| Reason::NoMemory));
                if let Err(reason) = copied {
                    return (page, Some(reason));
                }
            }
            return (pages, None);
        }
        let generation = &self.generations[&slot.generation];
        let wrote = from.write_to(&generation.memfd, u64::from(slot.index) * self.page as u64);
        let done = u32::try_from(wrote.bytes / self.page).expect("no more than was asked for");
        (
            done,
            wrote.stopped.map(|stop| match stop {
                WriteStop::Full | WriteStop::TooBig => Reason::FramesFull,
                WriteStop::NoMemory => Reason::NoMemory,
                WriteStop::SourceGone => Reason::Unmapped,
                _ => Reason::Other,
            }),
        )
    }

    /// Names a written slot.
    pub(crate) fn bind(&mut self, frame: FrameId, slot: Slot) {
        if self.slots.len() <= frame.index() {
            if self.slots.capacity() <= frame.index() {
                // By an eighth, not to the double: see the nodes of the stable trees.
                let more = frame.index() + 1 - self.slots.len();
                self.slots.reserve_exact(more + self.slots.len() / 8 + 64);
            }
            self.slots.resize(frame.index() + 1, NO_SLOT);
        }
        debug_assert_eq!(self.slots[frame.index()], NO_SLOT, "a frame has one slot");
        self.slots[frame.index()] = slot;
        let generation = self.generations.get_mut(&slot.generation);
        let generation = generation.expect("a slot's generation exists");
        generation.alive += 1;
        // It was compared through this view, so the view is there.
        let view = generation.views.get_mut(&(slot.index / VIEW_SLOTS));
        view.expect("a frame has a view").alive += 1;
    }

    pub(crate) fn slot(&self, frame: FrameId) -> Option<Slot> {
        self.slots
            .get(frame.index())
            .copied()
            .filter(|slot| *slot != NO_SLOT)
    }

    /// The file and offset of a slot, for mapping it.
    pub(crate) fn place_of(&self, slot: Slot) -> (Rc<Memfd>, u64) {
        let generation = &self.generations[&slot.generation];
        (
            Rc::clone(&generation.memfd),
            u64::from(slot.index) * self.page as u64,
        )
    }

    /// The engine's own view of a slot: a mapping, and where the slot is in it.
    pub(crate) fn view(&mut self, slot: Slot) -> Result<(Rc<Mapping>, usize), Reason> {
        let page = self.page;
        let generation = self
            .generations
            .get_mut(&slot.generation)
            .ok_or(Reason::Other)?;
        let number = slot.index / VIEW_SLOTS;
        let view = match generation.views.entry(number) {
            hash_map::Entry::Occupied(view) => view.into_mut(),
            hash_map::Entry::Vacant(none) => {
                let bytes = VIEW_SLOTS as usize * page;
                let offset = u64::from(number) * bytes as u64;
                let protection = if self.huge_shmem {
                    Protection::ReadWrite
                } else {
                    Protection::Read
                };
                let view = Mapping::file(
                    &generation.memfd,
                    offset,
                    bytes,
                    protection,
                    Sharing::Shared,
                )
                .map_err(|_| Reason::NoMemory)?;
                // Children have no use for it. Where the kernel refuses a hint nothing is lost but
                // some memory.
                let _ = view.advise(Advice::DontFork);
                let _ = view.advise(Advice::NoHugePage);
                none.insert(View {
                    mapping: Rc::new(view),
                    alive: 0,
                })
            }
        };
        Ok((
            Rc::clone(&view.mapping),
            (slot.index % VIEW_SLOTS) as usize * page,
        ))
    }

    /// The living frames among the slots that lie under `stretches`: (file number, offset, bytes), as
    /// the list of mappings tells them.
    pub(crate) fn under(&self, stretches: &[(u64, u64, usize)]) -> Vec<FrameId> {
        let files: HashMap<u64, u32> = self
            .generations
            .iter()
            .filter_map(|(number, generation)| Some((generation.memfd.inode().ok()?, *number)))
            .collect();
        let page = self.page as u64;
        let slots: HashSet<(u32, u64)> = stretches
            .iter()
            .filter_map(|(inode, offset, bytes)| {
                let first = offset / page;
                Some((*files.get(inode)?, first..first + *bytes as u64 / page))
            })
            .flat_map(|(file, slots)| slots.map(move |slot| (file, slot)))
            .collect();
        if slots.is_empty() {
            return Vec::new();
        }
        (0..)
            .zip(&self.slots)
            .filter(|(_, slot)| slots.contains(&(slot.generation, slot.index.into())))
            .map(|(frame, _)| FrameId(frame))
            .collect()
    }

    /// Gives up slots that were written but never mapped by any page.
    pub(crate) fn abandon(&mut self, slot: Slot, pages: u32) {
        let page = self.page as u64;
        if let Some(generation) = self.generations.get(&slot.generation) {
            // Nobody maps them, so nothing depends on the punch; a failure costs memory only.
            let _ = generation
                .memfd
                .punch(u64::from(slot.index) * page, u64::from(pages) * page);
        }
    }

    /// The scanner has released `frame`: no page of this process shows it.
    pub(crate) fn release(&mut self, frame: FrameId) {
        let Some(slot) = self.slot(frame) else { return };
        self.slots[frame.index()] = NO_SLOT;
        let Some(generation) = self.generations.get_mut(&slot.generation) else {
            return;
        };
        generation.alive -= 1;
        let view = generation.views.get_mut(&(slot.index / VIEW_SLOTS));
        view.expect("a view stays while a frame lies in it").alive -= 1;
        match generation.dead.last_mut() {
            Some((first, count)) if *first + *count == slot.index => *count += 1,
            Some((first, count)) if slot.index + 1 == *first => {
                *first -= 1;
                *count += 1;
            }
            _ => generation.dead.push((slot.index, 1)),
        }
        self.has_dead = true;
    }

    /// Punches what is dead in generations that no other process maps, and gives up views and old
    /// generations that hold nothing any more.
    pub(crate) fn punch_dead(&mut self) {
        if !self.has_dead {
            return;
        }
        let page = self.page as u64;
        let mut left = false;
        let _no_fork = NoFork::wait();
        for generation in self.generations.values_mut() {
            if generation.dead.is_empty() {
                continue;
            }
            if !generation.canaries.nobody_else() {
                left = true;
                continue;
            }
            generation.dead.sort_unstable();
            let mut runs = generation.dead.drain(..).peekable();
            let mut kept = Vec::new();
            while let Some((first, mut count)) = runs.next() {
                while let Some((_, more)) = runs.next_if(|(next, _)| *next == first + count) {
                    count += more;
                }
                let at = u64::from(first) * page;
                if generation.memfd.punch(at, u64::from(count) * page).is_err() {
                    kept.push((first, count));
                }
            }
            drop(runs);
            left |= !kept.is_empty();
            // Whatever touched a view as a whole (`mlockall` does) has filled its holes with pages.
            for number in generation
                .views
                .iter()
                .filter(|(_, v)| v.alive == 0)
                .map(|(n, _)| *n)
            {
                let bytes = u64::from(VIEW_SLOTS) * page;
                // A failure costs memory only.
                let _ = generation.memfd.punch(u64::from(number) * bytes, bytes);
            }
            generation.dead = kept;
        }
        for generation in self.generations.values_mut() {
            generation.views.retain(|_, view| view.alive > 0);
        }
        let current = self.current;
        self.generations
            .retain(|number, g| *number == current || g.alive > 0 || !g.dead.is_empty());
        self.has_dead = left;
    }

    /// A region is gone: its mirrors are not needed for new frames.
    pub(crate) fn drop_region(&mut self, region: RegionId) {
        for generation in self.generations.values_mut() {
            generation.mirrors.remove(&region);
        }
    }

    /// Bytes that the memfds really hold.
    pub(crate) fn allocated_bytes(&self) -> u64 {
        self.generations
            .values()
            .filter_map(|g| g.memfd.allocated_bytes().ok())
            .sum()
    }

    pub(crate) fn frames(&self) -> u64 {
        self.generations.values().map(|g| g.alive).sum()
    }

    pub(crate) fn generations(&self) -> usize {
        self.generations.len()
    }

    pub(crate) fn metadata_bytes(&self) -> u64 {
        let mirrors: usize = self
            .generations
            .values()
            .flat_map(|g| g.mirrors.values())
            .map(|mirror| mirror.used.bytes())
            .sum();
        (self.slots.capacity() * size_of::<Slot>() + mirrors) as u64
    }
}
