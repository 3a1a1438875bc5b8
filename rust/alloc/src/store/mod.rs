//! The store: bytes that are deduplicated on the way in.
//!
//! [`Store::put`] takes bytes and gives a [`Blob`] for them. Equal values are one entry; whole pages that
//! values have in common are held once; what is left of a value behind its last whole page is packed.
//!
//! # The rooms
//! * [`values`]: which values there are, and how many handles each has.
//! * [`pages`]: whole pages, in extents of the engine's frames.
//! * [`heap`]: values under a page, and odd tails.
//! * [`blob`]: handles, which read without any lock.
//!
//! # The life of a value
//! 1. **Hashed**, page by page by the engine's own keyed hash, without any lock; the value's hash is that
//!    of its pages' digests and its tail.
//! 2. **Looked up.** If there is a value with this hash, every byte is compared with it, and the new
//!    handle is one more of the same entry.
//! 3. **Taken apart** otherwise: a page of zeroes is only counted, a page that is held already (compared in
//!    full) is shared, and the others are copied into fresh neighbouring slots. The tail goes to the heap.
//! 4. **Read** where it lies.
//! 5. **Released** with its last handle: pages that no other value has are given back, in batches.
//!
//! All of this runs on the calling thread: a trip to the merging thread would cost more than all the rest.
//! That thread is told of extents, 2 to 64 MiB at a time, and of what is to be given back.
//!
//! # Invariants
//! * St-1. A put that fails leaves the store as it was.
//! * St-2. `inner` is locked for lookups, compares and copies, never while anybody else's code runs, and
//!   never in a fork child. Dropping a handle never waits for it.
//! * St-3. In a fork child nothing of the parent's is dropped, locked or written.
//!
//! # Cost
//! See `docs/design.md` for what was measured. Metadata: 27 bytes and a table's share (6 to 12) for each
//! value, for large ones some 120 more, 0.7 % for each page.

mod blob;
mod error;
mod free;
mod heap;
mod pages;
mod room;
mod values;

pub use blob::{Blob, Window};
pub use error::Error;

use blob::{Large, PLAIN, Place, Run, Runs, Tail};
use heap::{GRANULE, Heap};
use pagemerge_linux::{Digester, Engine, Hashing, Source, page_size};
use pages::Pages;
use std::mem;
use std::ops::{Deref, DerefMut, Range};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use values::{FLOOR, Values, Where};

/// What a store holds at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Bytes that were put and are still held by some handle: each handle counts in full.
    pub logical_bytes: u64,
    /// Bytes held for contents: pages, and blocks of the heap with their rounding.
    pub unique_bytes: u64,
    /// Bytes held for everything else: indexes, records, lists.
    pub metadata_bytes: u64,
    /// Bytes that have memory and hold nothing: made ahead, or freed and not given back yet.
    pub spare_bytes: u64,
    /// Different values. (Those too short to be worth an entry are not among them.)
    pub entries: u64,
    /// Handles.
    pub blobs: u64,
    /// Different pages.
    pub pages: u64,
    /// Bytes that were put, ever.
    pub put_bytes: u64,
    /// Puts, ever.
    pub puts: u64,
    /// Puts that found their value there already, ever.
    pub hits: u64,
    /// Bytes copied side by side for views, in the whole process, while those live.
    pub copied_bytes: u64,
}

#[derive(Debug)]
struct Inner {
    values: Values,
    pages: Pages,
    heap: Heap,
    large: Vec<Option<Arc<Large>>>,
    free_large: Vec<u32>,
    /// Beside the large values themselves: their lists of runs.
    large_bytes: u64,
    logical: u64,
    blobs: u64,
    puts: u64,
    put_bytes: u64,
    hits: u64,
}

/// A store, shared by its handles.
#[derive(Debug)]
pub(crate) struct Shared {
    engine: Engine,
    digester: Digester,
    domain: String,
    max_bytes: AtomicU64,
    inner: Mutex<Inner>,
    /// Handles that were dropped while somebody else had `inner`: whoever drops one may hold locks of
    /// his own (Python's), and does not wait. Locked for a moment only.
    dropped: Mutex<Vec<(Place, u32)>>,
}

/// Keeps bytes, each content once. Handles of one store share it.
///
/// ```
/// use pagemerge_alloc::Store;
/// use pagemerge_linux::{Engine, EngineSettings};
///
/// let store = Store::new(Engine::new(EngineSettings::default())?, "", None)?;
/// let one = store.put(&[7; 10_000][..])?;
/// let other = store.put(&vec![7; 10_000][..])?;
/// assert!(one.is_same(&other) && one.to_vec() == [7; 10_000]);
/// let stats = store.stats()?;
/// assert_eq!((stats.entries, stats.logical_bytes), (1, 20_000));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Store(Arc<Shared>);

/// A large value as it was hashed.
struct Hashed {
    /// Of each whole page: its digest, and whether it is zero.
    pages: Vec<(u64, bool)>,
    hash: u64,
}

fn hash_large(hashing: &Hashing, source: Source<'_>) -> Result<Hashed, Error> {
    let page = page_size();
    let whole = source.len() / page;
    let mut state = source.len() as u64;
    let mut pages = room_for(whole)?;
    for at in 0..whole {
        let next = (at + 1 < whole).then(|| source.part((at + 1) * page, page));
        let digest = hashing.page(source.part(at * page, page), next);
        state = hashing.more(state, digest.hash);
        pages.push((digest.hash, digest.zero));
    }
    let tail = source.part(whole * page, source.len() - whole * page);
    if !tail.is_empty() {
        state = hashing.more(state, hashing.bytes(tail));
    }
    Ok(Hashed { pages, hash: state })
}

/// A list that will have `len` members.
fn room_for<T>(len: usize) -> Result<Vec<T>, Error> {
    let mut list = Vec::new();
    list.try_reserve_exact(len)
        .map_err(|e| Error::no_memory(len * size_of::<T>(), e.into()))?;
    Ok(list)
}

impl Store {
    /// A store over `engine`. Its pages never share a frame with those of another domain; `max_bytes`
    /// bounds unique bytes and metadata together.
    ///
    /// # Errors
    /// A closed or forked engine, or no memory.
    pub fn new(engine: Engine, domain: &str, max_bytes: Option<u64>) -> Result<Self, Error> {
        let digester = engine.digester()?;
        blob::ready_zeroes().map_err(|e| Error::no_memory(0, e))?;
        Ok(Self(Arc::new(Shared {
            engine,
            digester,
            domain: domain.to_owned(),
            max_bytes: AtomicU64::new(max_bytes.unwrap_or(u64::MAX)),
            inner: Mutex::new(Inner::new(domain)),
            dropped: Mutex::default(),
        })))
    }

    /// Keeps `bytes`.
    ///
    /// # Errors
    /// [`Error::Full`] over the limit, no memory, or a closed or forked engine. The store is as it was.
    pub fn put<'a>(&self, bytes: impl Into<Source<'a>>) -> Result<Blob, Error> {
        self.0.here()?;
        Shared::put(&self.0, bytes.into())
    }

    /// Keeps `bytes` unless somebody else is using the store, for callers who have others wait while they
    /// wait.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub fn try_put<'a>(&self, bytes: impl Into<Source<'a>>) -> Option<Result<Blob, Error>> {
        let kept = self
            .0
            .here()
            .and_then(|()| Shared::put_unless(&self.0, bytes.into(), false));
        kept.transpose()
    }

    /// What is held.
    ///
    /// # Errors
    /// In a fork child.
    pub fn stats(&self) -> Result<StoreStats, Error> {
        self.0.here()?;
        let stats = self.0.lock().stats();
        Ok(stats)
    }

    /// The domain.
    #[must_use]
    pub fn domain(&self) -> &str {
        &self.0.domain
    }

    /// The limit of unique bytes and metadata together.
    #[must_use]
    pub fn max_bytes(&self) -> Option<u64> {
        let max = self.0.max_bytes.load(Ordering::Relaxed);
        (max != u64::MAX).then_some(max)
    }

    /// Sets that limit. What is held already stays.
    pub fn set_max_bytes(&self, max: Option<u64>) {
        self.0
            .max_bytes
            .store(max.unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Whether this process is the one that made the store.
    #[must_use]
    pub fn is_here(&self) -> bool {
        self.0.engine.is_here()
    }
}

/// `inner`, locked. What others drop meanwhile is released when it is let go.
struct Held<'a> {
    shared: &'a Shared,
    /// Taken only by drop.
    inner: Option<MutexGuard<'a, Inner>>,
}

impl Deref for Held<'_> {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        self.inner.as_ref().expect("only drop takes it")
    }
}

impl DerefMut for Held<'_> {
    fn deref_mut(&mut self) -> &mut Inner {
        self.inner.as_mut().expect("only drop takes it")
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.inner = None;
        self.shared.release_dropped();
    }
}

impl Shared {
    fn here(&self) -> Result<(), Error> {
        if self.engine.is_here() {
            Ok(())
        } else {
            Err(Error::Forked)
        }
    }

    fn lock(&self) -> Held<'_> {
        // What panics while it holds the lock is a bug here; the records are changed in steps that leave
        // nothing dangling.
        self.held(self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// With what was dropped before released.
    fn held<'a>(&'a self, mut inner: MutexGuard<'a, Inner>) -> Held<'a> {
        inner.release_all(mem::take(&mut *self.dropped()));
        Held {
            shared: self,
            inner: Some(inner),
        }
    }

    fn try_lock(&self) -> Option<MutexGuard<'_, Inner>> {
        match self.inner.try_lock() {
            Ok(inner) => Some(inner),
            Err(TryLockError::Poisoned(inner)) => Some(inner.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Releases what was dropped while somebody had `inner`. Who has it now does so in the end.
    fn release_dropped(&self) {
        while !self.dropped().is_empty()
            && let Some(mut inner) = self.try_lock()
        {
            inner.release_all(mem::take(&mut *self.dropped()));
        }
    }

    fn dropped(&self) -> MutexGuard<'_, Vec<(Place, u32)>> {
        self.dropped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(this: &Arc<Self>, source: Source<'_>) -> Result<Blob, Error> {
        let kept = Self::put_unless(this, source, true)?;
        Ok(kept.expect("it has waited"))
    }

    /// Keeps bytes; `None` where somebody else has the lock and this is not to wait.
    fn put_unless(
        this: &Arc<Self>,
        source: Source<'_>,
        waits: bool,
    ) -> Result<Option<Blob>, Error> {
        let lock = || {
            if waits {
                return Some(this.lock());
            }
            this.try_lock().map(|inner| this.held(inner))
        };
        let len = source.len();
        let kept = if len == 0 {
            let counted = lock().map(|mut inner| inner.count_put(0));
            counted.map(|()| (Place::Empty, PLAIN))
        } else if len < FLOOR {
            let inner = lock();
            inner.map(|mut it| it.put_plain(source, this)).transpose()?
        } else if len < page_size() {
            let hashing = this.digester.begin();
            let hash = hashing.bytes(source);
            let put = |mut it: Held<'_>| it.put_small(source, hash, &hashing, this);
            lock().map(put).transpose()?
        } else {
            let hashing = this.digester.begin();
            let hashed = hash_large(&hashing, source)?;
            let put = |mut it: Held<'_>| it.put_large(source, &hashed, &hashing, this);
            lock().map(put).transpose()?
        };
        Ok(kept.map(|(place, number)| Blob {
            store: Arc::clone(this),
            place,
            number,
        }))
    }

    /// A handle is dropped.
    fn release(&self, place: Place, number: u32) {
        if self.here().is_err() {
            mem::forget(place);
            return;
        }
        if let Some(mut inner) = self.try_lock() {
            return inner.release(&place, number);
        }
        self.dropped().push((place, number));
        // Unless it was let go in this moment.
        self.release_dropped();
    }

    fn charged(&self, blob: &Blob) -> Result<u64, Error> {
        self.here()?;
        Ok(self.lock().charged(blob))
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.here().is_err() {
            // It may have been copied in the middle of a change.
            let inner = self.inner.get_mut().unwrap_or_else(PoisonError::into_inner);
            mem::forget(mem::replace(inner, Inner::new("")));
            let dropped = self
                .dropped
                .get_mut()
                .unwrap_or_else(PoisonError::into_inner);
            mem::forget(mem::take(dropped));
        }
    }
}

impl Inner {
    fn new(domain: &str) -> Self {
        Self {
            values: Values::new(),
            pages: Pages::new(domain),
            heap: Heap::new(page_size()),
            large: Vec::new(),
            free_large: Vec::new(),
            large_bytes: 0,
            logical: 0,
            blobs: 0,
            puts: 0,
            put_bytes: 0,
            hits: 0,
        }
    }

    fn count_put(&mut self, len: usize) {
        self.blobs += 1;
        self.puts += 1;
        self.put_bytes += len as u64;
        self.logical += len as u64;
    }

    fn unique_bytes(&self) -> u64 {
        self.pages.live() * page_size() as u64 + self.heap.used_bytes()
    }

    fn metadata_bytes(&self) -> u64 {
        self.values.metadata_bytes()
            + self.pages.metadata_bytes()
            + self.heap.metadata_bytes()
            + self.large_bytes
            + (self.large.capacity() * 8 + self.free_large.capacity() * 4) as u64
    }

    fn stats(&self) -> StoreStats {
        StoreStats {
            logical_bytes: self.logical,
            unique_bytes: self.unique_bytes(),
            metadata_bytes: self.metadata_bytes(),
            spare_bytes: self.pages.spare() * page_size() as u64 + self.heap.free_bytes(),
            entries: self.values.len() as u64,
            blobs: self.blobs,
            pages: self.pages.indexed(),
            put_bytes: self.put_bytes,
            puts: self.puts,
            hits: self.hits,
            copied_bytes: blob::copied_bytes(),
        }
    }

    /// Refuses what would exceed the limit.
    fn fits(&self, asked: u64, shared: &Shared) -> Result<(), Error> {
        let max = shared.max_bytes.load(Ordering::Relaxed);
        if max == u64::MAX {
            return Ok(());
        }
        let held = self.unique_bytes() + self.metadata_bytes();
        if held.saturating_add(asked) > max {
            return Err(Error::Full { asked, held, max });
        }
        Ok(())
    }

    fn put_plain(&mut self, source: Source<'_>, shared: &Shared) -> Result<(Place, u32), Error> {
        self.fits(rounded(source.len()), shared)?;
        let at = self.heap.keep(source)?;
        self.count_put(source.len());
        Ok((self.small(at, source.len()), PLAIN))
    }

    fn small(&self, at: u32, len: usize) -> Place {
        Place::Small {
            len: u16::try_from(len).expect("less than a page"),
            at,
            segment: Arc::clone(self.heap.place(at).0),
        }
    }

    fn heap_bytes(&self, at: u32, len: usize) -> Source<'_> {
        let (segment, offset) = self.heap.place(at);
        segment.bytes(offset, len)
    }

    fn put_small(
        &mut self,
        source: Source<'_>,
        hash: u64,
        hashing: &Hashing,
        shared: &Shared,
    ) -> Result<(Place, u32), Error> {
        let len = source.len();
        let wanted = u32::try_from(len).expect("less than a page");
        let found = self.values.find(hash, |place| match place {
            Where::Heap(at, length) => length == wanted && self.heap_bytes(at, len).same(source),
            Where::Large(_) => false,
        });
        if let Some(number) = found
            && let Where::Heap(at, _) = self.values.place(number)
        {
            self.values.hold(number);
            self.count_put(len);
            self.hits += 1;
            return Ok((self.small(at, len), number));
        }
        self.fits(rounded(len) + ENTRY, shared)?;
        self.values.make_room()?;
        let at = self.heap.keep(source)?;
        // What is kept has the hash of what is kept, whatever became of the source meanwhile.
        let hash = if source.is_steady() {
            hash
        } else {
            hashing.bytes(self.heap_bytes(at, len))
        };
        let number = self.values.insert(hash, Where::Heap(at, wanted));
        self.count_put(len);
        Ok((self.small(at, len), number))
    }

    /// Whether a large value's bytes are those of `source`.
    fn large_equals(&self, number: u32, source: Source<'_>, hashed: &Hashed) -> bool {
        let page = page_size();
        let Some(large) = self.large[number as usize].as_deref() else {
            return false;
        };
        if large.len != source.len() {
            return false;
        }
        let mut at = 0;
        let pages = large.runs.as_slice().iter().all(|run| {
            let (first, pages) = (at, run.pages as usize);
            at += pages;
            match &run.stretch {
                Some(stretch) => {
                    // The last page may be a part only.
                    let bytes = (pages * page).min(large.len - first * page);
                    let start = run.first as usize * page;
                    let there = stretch.extent.bytes(start, bytes);
                    there.same(source.part(first * page, bytes))
                }
                // All bytes of these pages have been looked at to find that.
                None => hashed.pages[first..first + pages]
                    .iter()
                    .all(|(_, zero)| *zero),
            }
        });
        pages
            && large.tail.as_ref().is_none_or(|tail| {
                let (from, len) = (source.len() - tail.len as usize, tail.len as usize);
                self.heap_bytes(tail.at, len).same(source.part(from, len))
            })
    }

    fn put_large(
        &mut self,
        source: Source<'_>,
        hashed: &Hashed,
        hashing: &Hashing,
        shared: &Shared,
    ) -> Result<(Place, u32), Error> {
        let len = source.len();
        let found = self.values.find(hashed.hash, |place| match place {
            Where::Large(number) => self.large_equals(number, source, hashed),
            Where::Heap(..) => false,
        });
        if let Some(number) = found
            && let Where::Large(large) = self.values.place(number)
            && let Some(large) = &self.large[large as usize]
        {
            let place = Place::Large(Arc::clone(large));
            self.values.hold(number);
            self.count_put(len);
            self.hits += 1;
            return Ok((place, number));
        }
        let page = page_size();
        let tail = len % page;
        let fresh = self.fresh_pages(hashed)?;
        // A value that shares nothing lies in one piece if its odd end does not go elsewhere. That is worth
        // a thirty-second of it at most.
        let whole = tail > 0 && fresh == hashed.pages.len() && (page - tail) * PADDING <= len;
        let asked = if whole {
            ((fresh + 1) * page) as u64
        } else {
            (fresh * page) as u64 + rounded(tail)
        };
        self.fits(asked + ENTRY + LARGE_ENTRY, shared)?;
        self.values.make_room()?;
        self.pages.make_room(fresh)?;
        let places = u32::try_from(fresh + usize::from(whole)).map_err(|_| Error::TooMuch)?;
        let mut places = if places == 0 {
            0..0
        } else {
            let first = self.pages.allocate(&shared.engine, places)?;
            first..first + places
        };
        let taken = self.take_pages(source, hashed, &mut places, hashing, shared);
        let packed = match taken {
            Ok((mut runs, changed)) if whole && places.len() == 1 => {
                // Nothing was found after all, so the place behind the last page is left.
                let last = places.start;
                places = 0..0;
                self.pages.keep_part(last, source.part(len - tail, tail));
                if let Runs::One(run) = &mut runs {
                    run.pages += 1;
                }
                Ok((runs, changed, None))
            }
            Ok((runs, changed)) if tail > 0 => {
                match self.heap.keep(source.part(len - tail, tail)) {
                    Ok(at) => Ok((runs, changed, Some(at))),
                    Err(error) => Err((runs, error)),
                }
            }
            Ok((runs, changed)) => Ok((runs, changed, None)),
            Err(failed) => Err(failed),
        };
        let left = u32::try_from(places.len()).expect("no more than there were");
        self.pages.give_up(places.start, left);
        let (runs, changed, packed) = match packed {
            Ok(taken) => taken,
            Err((runs, error)) => {
                // Last, since their lot may go with them.
                self.drop_runs(&runs);
                return Err(error);
            }
        };
        let hash = if changed || tail > 0 && !source.is_steady() {
            self.hash_kept(&runs, packed, len, hashing)
        } else {
            hashed.hash
        };
        let tail = packed.map(|at| {
            let (segment, offset) = self.heap.place(at);
            Tail {
                segment: Arc::clone(segment),
                at,
                offset: u32::try_from(offset).expect("a segment is small"),
                len: u32::try_from(tail).expect("less than a page"),
            }
        });
        self.large_bytes += (LARGE_BYTES + runs.heap_bytes()) as u64;
        let large = Arc::new(Large::new(runs, tail, len));
        let place = Place::Large(Arc::clone(&large));
        let at = if let Some(at) = self.free_large.pop() {
            self.large[at as usize] = Some(large);
            at
        } else {
            if self.large.len() == self.large.capacity() {
                self.large.reserve_exact(self.large.len() / 8 + 8);
            }
            self.large.push(Some(large));
            u32::try_from(self.large.len() - 1).expect("no more than there are values")
        };
        let number = self.values.insert(hash, Where::Large(at));
        self.count_put(len);
        Ok((place, number))
    }

    /// How many different pages of a value are not held yet, by their digests.
    fn fresh_pages(&self, hashed: &Hashed) -> Result<usize, Error> {
        let mut fresh = room_for(hashed.pages.len())?;
        for (digest, zero) in &hashed.pages {
            if !zero && !self.pages.may_have(*digest) {
                fresh.push(*digest);
            }
        }
        fresh.sort_unstable();
        fresh.dedup();
        Ok(fresh.len())
    }

    /// Shares or copies each page; copies go to `places`, and to others when those are used up. Also says
    /// whether anything that was copied has another digest than what was hashed. With an error come the
    /// pages that were taken until then.
    fn take_pages(
        &mut self,
        source: Source<'_>,
        hashed: &Hashed,
        places: &mut Range<u32>,
        hashing: &Hashing,
        shared: &Shared,
    ) -> Result<(Runs, bool), (Runs, Error)> {
        let page = page_size();
        let mut runs: Vec<Run> = Vec::new();
        let mut changed = false;
        for (at, (digest, zero)) in hashed.pages.iter().enumerate() {
            if *zero {
                match runs.last_mut() {
                    Some(Run {
                        stretch: None,
                        pages,
                        ..
                    }) => *pages += 1,
                    _ => runs.push(Run {
                        stretch: None,
                        first: 0,
                        pages: 1,
                    }),
                }
                continue;
            }
            let bytes = source.part(at * page, page);
            let number = if let Some(number) = self.pages.find(*digest, bytes) {
                self.pages.hold(number);
                number
            } else {
                // More than were counted: a page that has an equal digest, and no more.
                let place = match places.next() {
                    Some(place) => Ok(place),
                    None => self
                        .pages
                        .make_room(1)
                        .and_then(|()| self.pages.allocate(&shared.engine, 1)),
                };
                let place = match place {
                    Ok(place) => place,
                    Err(error) => return Err((Runs::Many(runs.into_boxed_slice()), error)),
                };
                let now = self
                    .pages
                    .keep(place, bytes, *digest, |kept| hashing.page(kept, None).hash);
                changed |= now != *digest;
                place
            };
            let (stretch, place) = self.pages.place(number);
            match runs.last_mut() {
                Some(Run {
                    stretch: Some(last),
                    first,
                    pages,
                }) if Arc::ptr_eq(last, stretch) && *first + *pages == place => *pages += 1,
                _ => runs.push(Run {
                    stretch: Some(Arc::clone(stretch)),
                    first: place,
                    pages: 1,
                }),
            }
        }
        let runs = if runs.len() == 1 {
            Runs::One(runs.pop().expect("just counted"))
        } else {
            Runs::Many(runs.into_boxed_slice())
        };
        Ok((runs, changed))
    }

    /// The hash of a value by what is kept of it.
    fn hash_kept(&self, runs: &Runs, packed: Option<u32>, len: usize, hashing: &Hashing) -> u64 {
        let page = page_size();
        let zero = vec![0; page];
        let zero = hashing.page(Source::from(&zero[..]), None).hash;
        let (mut state, mut left) = (len as u64, len);
        for run in runs.as_slice() {
            for at in run.first..run.first + run.pages {
                let bytes = page.min(left);
                left -= bytes;
                let digest = match &run.stretch {
                    None => zero,
                    Some(stretch) => {
                        let kept = stretch.extent.bytes(at as usize * page, bytes);
                        if bytes == page {
                            hashing.page(kept, None).hash
                        } else {
                            hashing.bytes(kept)
                        }
                    }
                };
                state = hashing.more(state, digest);
            }
        }
        if let Some(at) = packed {
            state = hashing.more(state, hashing.bytes(self.heap_bytes(at, left)));
        }
        state
    }

    fn drop_runs(&mut self, runs: &Runs) {
        for run in runs.as_slice() {
            let Some(stretch) = &run.stretch else {
                continue;
            };
            for at in run.first..run.first + run.pages {
                self.pages.release(stretch.first_number() + at);
            }
        }
    }

    fn release_all(&mut self, dropped: Vec<(Place, u32)>) {
        for (place, number) in dropped {
            self.release(&place, number);
        }
    }

    /// A handle goes.
    fn release(&mut self, place: &Place, number: u32) {
        let len = place.len();
        self.blobs -= 1;
        self.logical -= len as u64;
        if number == PLAIN {
            if let Place::Small { at, .. } = place {
                self.heap.release(*at, len);
            }
            return;
        }
        match self.values.release(number) {
            None => {}
            Some(Where::Heap(at, len)) => self.heap.release(at, len as usize),
            Some(Where::Large(at)) => {
                let Some(large) = self.large[at as usize].take() else {
                    return;
                };
                self.free_large.push(at);
                self.large_bytes -= (LARGE_BYTES + large.runs.heap_bytes()) as u64;
                self.drop_runs(&large.runs);
                self.pages.settle();
                if let Some(tail) = &large.tail {
                    self.heap.release(tail.at, tail.len as usize);
                }
                if self.values.len() == 0 {
                    (self.large, self.free_large) = (Vec::new(), Vec::new());
                }
            }
        }
    }

    fn charged(&self, blob: &Blob) -> u64 {
        let handles = match blob.number {
            PLAIN => 1,
            number => u64::from(self.values.refs(number)),
        };
        let bytes = match &blob.place {
            Place::Empty => 0,
            Place::Small { len, .. } => rounded(usize::from(*len)),
            Place::Large(large) => {
                let page = u32::try_from(page_size()).map_or(0.0, f64::from);
                let mut bytes = 0.0;
                for run in large.runs.as_slice() {
                    let Some(stretch) = &run.stretch else {
                        continue;
                    };
                    for at in run.first..run.first + run.pages {
                        let refs = self.pages.refs(stretch.first_number() + at);
                        bytes += page / f64::from(refs);
                    }
                }
                let tail = large
                    .tail
                    .as_ref()
                    .map_or(0, |tail| rounded(tail.len as usize));
                #[allow(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "a share of what is held"
                )]
                let pages = bytes.round() as u64;
                pages + tail
            }
        };
        bytes.div_ceil(handles)
    }
}

/// An odd end may leave so much of its page empty: a value's length divided by this.
const PADDING: usize = 32;
/// What a value takes in the index, for the limit.
const ENTRY: u64 = 32;
/// What a large one takes besides.
const LARGE_ENTRY: u64 = 128;
/// A large value with its counts of handles, as the allocator rounds it.
const LARGE_BYTES: usize = (size_of::<Large>() + 16 + 8).next_multiple_of(16);

/// Bytes that a block of the heap takes.
fn rounded(len: usize) -> u64 {
    (len.div_ceil(GRANULE) * GRANULE) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagemerge_linux::EngineSettings;

    /// Goal: whoever cannot wait is told, and what is dropped meanwhile goes as soon as the store is let go.
    #[test]
    fn nobody_waits_who_cannot_and_what_is_dropped_meanwhile_goes() {
        let engine = Engine::new(EngineSettings::default()).unwrap();
        let store = Store::new(engine, "", None).unwrap();
        let blob = store.put(&[7_u8; 10_000][..]).unwrap();
        let held = store.0.lock();
        for len in [0, 10, 100, 10_000] {
            assert!(store.try_put(&vec![1; len][..]).is_none(), "{len}");
        }
        drop(blob);
        assert_eq!(held.blobs, 1, "its turn comes");
        drop(held);
        assert!(store.0.dropped().is_empty());
        assert_eq!(store.stats().unwrap().blobs, 0);
        let kept = store.try_put(&[1_u8; 100][..]).unwrap().unwrap();
        assert_eq!(kept.len(), 100);
    }
}
