//! What a caller gets for his bytes: a handle that reads them, without any lock.
//!
//! # Invariants
//! * B-1. A handle has all that reading takes: its segment, or its list of pages with their extents. So
//!   a fork child reads what it inherited, whatever lock another thread of the parent held.
//! * B-2. The bytes of a handle neither change nor move. What is copied for a view stays until its last
//!   user is gone.
//! * B-3. Dropping a handle in a fork child does nothing: what it holds is its parent's.

use super::Shared;
use super::pages::Stretch;
use super::room;
use pagemerge_linux::{Segment, Source, accounting, page_size};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

/// Bytes copied for views, in the whole process.
static COPIED: AtomicU64 = AtomicU64::new(0);

/// From here on the copy is of the whole value, so that all its users can share it.
const SHARED_FROM: usize = 256 << 10;

/// So many zeroes can be read in one piece.
const ZEROES: usize = 16 << 20;
static ZERO: OnceLock<Segment> = OnceLock::new();

/// Has zeroes ready to be read, also by fork children.
pub(super) fn ready_zeroes() -> io::Result<()> {
    if ZERO.get().is_none() {
        let zeroes = Segment::new(ZEROES)?;
        // Somebody else may have been quicker.
        let _ = ZERO.set(zeroes);
    }
    Ok(())
}

fn zeroes(len: usize) -> Source<'static> {
    ZERO.get()
        .expect("they were made ready with the first store")
        .bytes(0, len)
}

/// Neighbouring pages of a large value.
#[derive(Debug)]
pub(super) struct Run {
    /// `None`: zeroes.
    pub(super) stretch: Option<Arc<Stretch>>,
    /// The first page, within its stretch.
    pub(super) first: u32,
    /// The last one may hold the value's odd end, and be a part only.
    pub(super) pages: u32,
}

/// The runs of a value: most have one.
#[derive(Debug)]
pub(super) enum Runs {
    One(Run),
    Many(Box<[Run]>),
}

impl Runs {
    pub(super) fn as_slice(&self) -> &[Run] {
        match self {
            Self::One(run) => std::slice::from_ref(run),
            Self::Many(runs) => runs,
        }
    }

    pub(super) fn heap_bytes(&self) -> usize {
        match self {
            Self::One(_) => 0,
            Self::Many(runs) => size_of_val(&**runs),
        }
    }
}

/// The odd end of a large value, if it is in the heap.
#[derive(Debug)]
pub(super) struct Tail {
    pub(super) segment: Arc<Segment>,
    /// Its first granule, by the heap's count.
    pub(super) at: u32,
    /// Where it begins in the segment.
    pub(super) offset: u32,
    pub(super) len: u32,
}

/// A value of a page or more.
#[derive(Debug)]
pub(super) struct Large {
    pub(super) runs: Runs,
    pub(super) tail: Option<Tail>,
    pub(super) len: usize,
    /// What was materialized, while somebody uses it.
    view: Mutex<Weak<Buffer>>,
}

impl Large {
    pub(super) fn new(runs: Runs, tail: Option<Tail>, len: usize) -> Self {
        Self {
            runs,
            tail,
            len,
            view: Mutex::new(Weak::new()),
        }
    }

    /// The bytes from `at` to `at + len`, piece by piece.
    fn pieces(&self, at: usize, len: usize) -> impl Iterator<Item = Source<'_>> {
        let page = page_size();
        let mut start = 0;
        let runs = self.runs.as_slice().iter().flat_map(move |run| {
            let begin = start;
            let bytes = run.pages as usize * page;
            start += bytes;
            let (from, to) = (at.max(begin), (at + len).min(begin + bytes));
            // Zeroes come in pieces of what there is of them.
            let step = if run.stretch.is_some() { bytes } else { ZEROES };
            (from..to.max(from)).step_by(step).map(move |from| {
                let len = step.min(to - from);
                match &run.stretch {
                    Some(stretch) => {
                        let place = run.first as usize * page + (from - begin);
                        stretch.extent.bytes(place, len)
                    }
                    None => zeroes(len),
                }
            })
        });
        let tail = self.tail.iter().filter_map(move |tail| {
            let begin = self.len - tail.len as usize;
            let (from, to) = (at.max(begin), (at + len).min(self.len));
            (from < to).then(|| {
                tail.segment
                    .bytes(tail.offset as usize + from - begin, to - from)
            })
        });
        runs.chain(tail)
    }

    /// All of it in one piece, shared with whoever has that already.
    fn buffer(&self) -> io::Result<Arc<Buffer>> {
        // Never waits: in a fork child the lock may be held by nobody.
        let mut cached = self.view.try_lock().ok();
        if let Some(found) = cached.as_ref().and_then(|cached| cached.upgrade()) {
            return Ok(found);
        }
        let made = Arc::new(Buffer::copied(self.len, self.pieces(0, self.len))?);
        if let Some(cached) = &mut cached {
            **cached = Arc::downgrade(&made);
        }
        Ok(made)
    }
}

/// For shorter copies nobody looks first at what memory is left.
const LOOKED_AT: usize = 1 << 20;

/// Bytes that were copied side by side because somebody wanted them in one piece.
#[derive(Debug)]
pub(super) struct Buffer(Box<[u8]>);

impl Buffer {
    fn copied<'a>(len: usize, pieces: impl Iterator<Item = Source<'a>>) -> io::Result<Self> {
        // At a memory limit the kernel would end the program instead of saying no.
        let left = || accounting::headroom().unwrap_or(u64::MAX);
        if len >= LOOKED_AT && left() < len as u64 + room::RESERVE {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(len)?;
        bytes.resize(len, 0);
        let mut done = 0;
        for piece in pieces {
            piece.copy_to(&mut bytes[done..done + piece.len()]);
            done += piece.len();
        }
        COPIED.fetch_add(len as u64, Ordering::Relaxed);
        Ok(Self(bytes.into_boxed_slice()))
    }

    fn bytes(&self, at: usize, len: usize) -> Source<'_> {
        Source::from(&self.0[at..at + len])
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        COPIED.fetch_sub(self.0.len() as u64, Ordering::Relaxed);
    }
}

/// Bytes copied for views in this process, now.
pub(super) fn copied_bytes() -> u64 {
    COPIED.load(Ordering::Relaxed)
}

/// Where a handle's bytes are.
#[derive(Debug)]
pub(super) enum Place {
    Empty,
    Small {
        /// Less than a page, and no page is larger than 64 KiB.
        len: u16,
        /// The first granule, by the heap's count.
        at: u32,
        segment: Arc<Segment>,
    },
    Large(Arc<Large>),
}

impl Place {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Empty => 0,
            Self::Small { len, .. } => usize::from(*len),
            Self::Large(large) => large.len,
        }
    }
}

/// Bytes that a store keeps. They never change.
///
/// Reading takes no lock and works in fork children, too. When the last handle of a value is dropped,
/// its bytes go, as far as no other value shares them.
#[derive(Debug)]
pub struct Blob {
    pub(super) store: Arc<Shared>,
    pub(super) place: Place,
    /// The value's number; [`PLAIN`] for bytes that only this handle has.
    pub(super) number: u32,
}

/// In place of a number: the bytes belong to the handle alone.
pub(super) const PLAIN: u32 = u32::MAX;

/// Some of a blob's bytes in one piece: where they are, and what has to live for as long as they are
/// read, besides the blob itself.
#[derive(Debug)]
pub struct Window {
    address: usize,
    buffer: Option<Arc<Buffer>>,
}

impl Window {
    /// The first byte.
    #[must_use]
    pub fn as_ptr(&self) -> *const u8 {
        std::ptr::with_exposed_provenance(self.address)
    }

    /// Whether it has to be kept for as long as the bytes are read. If not, the blob will do.
    #[must_use]
    pub fn is_needed(&self) -> bool {
        self.buffer.is_some()
    }
}

impl Blob {
    /// How many bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.place.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes from `at` to `at + len`, piece by piece: where they are, not copied.
    ///
    /// # Panics
    /// When they are not all inside.
    pub fn pieces(&self, at: usize, len: usize) -> impl Iterator<Item = Source<'_>> {
        assert!(
            at <= self.len() && len <= self.len() - at,
            "{len} bytes at {at} are not all in a blob of {}",
            self.len()
        );
        let (small, large) = match &self.place {
            Place::Small {
                at: first, segment, ..
            } if len > 0 => {
                let place = super::heap::offset_of(*first) + at;
                (Some(segment.bytes(place, len)), None)
            }
            Place::Large(large) if len > 0 => (None, Some(large.pieces(at, len))),
            _ => (None, None),
        };
        small.into_iter().chain(large.into_iter().flatten())
    }

    /// Copies the bytes from `at` on.
    ///
    /// # Panics
    /// When they are not all inside.
    pub fn read(&self, at: usize, into: &mut [u8]) {
        let mut done = 0;
        for piece in self.pieces(at, into.len()) {
            piece.copy_to(&mut into[done..done + piece.len()]);
            done += piece.len();
        }
    }

    /// Copies all bytes.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len()];
        self.read(0, &mut bytes);
        bytes
    }

    /// Whether the bytes from `at` on are these.
    ///
    /// # Panics
    /// When so many are not inside.
    #[must_use]
    pub fn equals(&self, at: usize, bytes: Source<'_>) -> bool {
        let mut done = 0;
        self.pieces(at, bytes.len()).all(|piece| {
            let from = done;
            done += piece.len();
            piece.same(bytes.part(from, piece.len()))
        })
    }

    /// Whether `len` bytes from `at` on are those of `other` from `there` on.
    ///
    /// # Panics
    /// When so many are not inside of both.
    #[must_use]
    pub fn equals_blob(&self, at: usize, other: &Self, there: usize, len: usize) -> bool {
        if self.is_same(other) && at == there {
            return true;
        }
        let mut done = 0;
        self.pieces(at, len).all(|piece| {
            let from = there + done;
            done += piece.len();
            other.equals(from, piece)
        })
    }

    /// Whether both are handles of one value.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.store, &other.store)
            && self.number == other.number
            && self.number != PLAIN
    }

    /// `len` bytes from `at` on in one piece. Where they are not, they are copied; all users of a value
    /// share the copy.
    ///
    /// # Errors
    /// No memory for that.
    ///
    /// # Panics
    /// When they are not all inside.
    pub fn window(&self, at: usize, len: usize) -> io::Result<Window> {
        let mut pieces = self.pieces(at, len);
        let Some(first) = pieces.next() else {
            return Ok(Window {
                address: zeroes(1).as_ptr().expose_provenance(),
                buffer: None,
            });
        };
        if first.len() == len {
            return Ok(Window {
                address: first.as_ptr().expose_provenance(),
                buffer: None,
            });
        }
        let Place::Large(large) = &self.place else {
            unreachable!("small values are in one piece");
        };
        let (buffer, at) = if len < large.len && len < SHARED_FROM {
            let copied = Buffer::copied(len, self.pieces(at, len))?;
            (Arc::new(copied), 0)
        } else {
            (large.buffer()?, at)
        };
        Ok(Window {
            address: buffer.bytes(at, len).as_ptr().expose_provenance(),
            buffer: Some(buffer),
        })
    }

    /// This handle's fair share of what is held: bytes that several values or handles share are divided
    /// among them. All blobs' shares make up the store's unique bytes.
    ///
    /// # Errors
    /// In a fork child.
    pub fn charged_bytes(&self) -> Result<u64, super::Error> {
        self.store.charged(self)
    }
}

impl Drop for Blob {
    fn drop(&mut self) {
        let place = std::mem::replace(&mut self.place, Place::Empty);
        self.store.release(place, self.number);
    }
}
