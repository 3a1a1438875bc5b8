//! The dedup allocator: equal values become equal pages.
//!
//! A scanner merges pages that happen to be equal. malloc makes that rare: blocks begin anywhere in a page,
//! with the allocator's own words between them. Here every block begins on a page, what lies between its end
//! and the end of its page is zero, nothing else is in its pages, and all of them are registered for
//! merging from the beginning. So two equal values are equal page by page, whenever and in whatever order
//! they were allocated.
//!
//! # The rooms
//! * [`classes`](mod@classes): how many pages a block gets.
//! * [`book`]: which pages belong to whom. No memory is touched there.
//! * [`heap`]: the books, the arenas, and who waits for whom.
//! * [`block`]: memory that frees itself.
//!
//! # What holds
//! * Memory comes zeroed. No byte of an owner is ever seen by the next one: it is overwritten, or its page is
//!   discarded, before the address is given out again.
//! * Memory that was freed goes back to the machine: at once for large blocks, in batches for others; a few MiB
//!   are kept for the next block of the size.
//! * Blocks outlive whatever happens to the engine. When it is closed, or in a fork child, they are ordinary
//!   memory.
//! * Any thread may allocate and free. Freeing never fails.
//!
//! # Cost
//! A page at least for each block. Eight bytes of metadata for each page, where blocks begin and end. What a
//! block costs beyond its bytes is half a page on average; a block of 64 KiB 3 %.

mod block;
mod book;
mod classes;
mod heap;

pub use block::Block;

use heap::Heap;
use pagemerge_linux::{Engine, Error, page_size};
use std::sync::Arc;

/// How an allocator is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Pages of one domain may share a frame, those of different ones never do.
    pub domain: String,
    /// Pages that are mapped and registered at a time; a block of more than a quarter of that gets an arena
    /// of its own.
    pub arena_pages: u32,
}

/// Bytes of address space in an arena.
const ARENA_BYTES: usize = 64 << 20;

impl Default for Options {
    fn default() -> Self {
        let pages = u32::try_from(ARENA_BYTES / page_size());
        Self {
            domain: String::new(),
            arena_pages: pages.expect("pages have a byte at least"),
        }
    }
}

impl Options {
    /// Blocks of more pages have an arena of their own.
    fn largest_pages(&self) -> u32 {
        (self.arena_pages / 4).max(1)
    }
}

/// Every error of the allocator.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AllocatorError {
    /// The kernel has no such memory, or no room in the address space.
    #[error("cannot allocate {bytes} bytes: {source}")]
    Memory {
        /// What was asked for.
        bytes: usize,
        /// Why not.
        source: Error,
    },
    /// No arena has so many pages.
    #[error(
        "cannot allocate {bytes} bytes: the largest block has 2^30 - 1 pages, which are 4 TiB with pages of 4 KiB"
    )]
    TooLarge {
        /// What was asked for.
        bytes: usize,
    },
    /// No block begins there.
    #[error("no block of this allocator begins at {addr:#x}")]
    NoBlock {
        /// The address.
        addr: usize,
    },
    /// An earlier panic, which is a bug of this library, has left the books half written.
    #[error(
        "this allocator has been broken by a panic; its blocks stay as they are, and nothing more can \
         be allocated"
    )]
    Broken,
}

/// The counters of an allocator at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllocatorStats {
    /// Blocks that are in use.
    pub allocations: usize,
    /// What was asked for, for them.
    pub live_bytes: usize,
    /// Bytes of the pages that they are in, and of those that have been freed and are not given back yet.
    /// What of it is really in memory, merged or not, is the kernel's to tell.
    pub held_bytes: usize,
    /// Address space of all arenas.
    pub reserved_bytes: usize,
    /// The allocator's own records. (The engine's are in its own counters.)
    pub metadata_bytes: usize,
    /// Arenas, those of large blocks included.
    pub arenas: usize,
    /// Why an arena is not merged, if the engine has refused one.
    pub not_merging: Option<String>,
}

/// Allocates memory that is registered with an engine. See the module.
///
/// A handle: clones share one allocator, and blocks hold it.
#[derive(Clone, Debug)]
pub struct Allocator(Arc<Heap>);

impl Allocator {
    /// Makes one. No memory is mapped before the first block.
    ///
    /// The engine is not started: call [`Engine::start`] or [`Engine::settle`] to have the blocks merged.
    /// It lives as long as the allocator and its blocks do.
    #[must_use]
    pub fn new(engine: &Engine, options: Options) -> Self {
        Self(Arc::new(Heap::new(engine, options)))
    }

    fn heap(&self) -> &Heap {
        &self.0
    }

    /// The engine.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        self.0.engine()
    }

    /// A block of `bytes` bytes, all zero.
    ///
    /// # Errors
    /// [`AllocatorError::Memory`].
    ///
    /// # Example
    /// ```
    /// use pagemerge_alloc::allocator::{Allocator, Options};
    /// use pagemerge_linux::{Engine, EngineSettings};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let engine = Engine::new(EngineSettings::default())?;
    /// let allocator = Allocator::new(&engine, Options::default());
    /// let blocks: Vec<_> = (0..10)
    ///     .map(|_| allocator.allocate(10_000))
    ///     .collect::<Result<_, _>>()?;
    /// for block in &blocks {
    ///     block.write(0, &[7; 10_000])?;
    /// }
    /// // All three pages of each, the last one included.
    /// let stats = engine.settle(32, &mut || true)?;
    /// assert_eq!(stats.core.pages_merged, 30);
    /// # Ok(())
    /// # }
    /// ```
    pub fn allocate(&self, bytes: usize) -> Result<Block, AllocatorError> {
        let addr = self.0.allocate(bytes)?;
        Ok(Block::new(self.clone(), addr, bytes))
    }

    /// The same as an address, for foreign interfaces: to be given to [`free`](Self::free). The block does
    /// not hold the allocator, which must be kept.
    ///
    /// # Errors
    /// As [`allocate`](Self::allocate).
    pub fn allocate_at(&self, bytes: usize) -> Result<usize, AllocatorError> {
        self.0.allocate(bytes)
    }

    /// Frees what begins at `addr`; `false` if nothing does.
    #[allow(clippy::must_use_candidate, reason = "the deed is the point")]
    pub fn free(&self, addr: usize) -> bool {
        self.0.free(addr)
    }

    /// Gives the block at `addr` another size, and perhaps another address, which is returned. What it gains
    /// reads as zero.
    ///
    /// # Errors
    /// [`AllocatorError::NoBlock`], [`AllocatorError::Memory`]; then nothing has changed.
    pub fn resize(&self, addr: usize, bytes: usize) -> Result<usize, AllocatorError> {
        self.0.resize(addr, bytes)
    }

    /// How many bytes the block has that begins at `addr`; `None` if none does.
    #[must_use]
    pub fn size_of(&self, addr: usize) -> Option<usize> {
        self.0.payload(addr)
    }

    /// Gives everything back that no block has, and waits until that is done.
    ///
    /// # Errors
    /// Only a broken allocator.
    pub fn trim(&self) -> Result<(), AllocatorError> {
        self.0.trim()
    }

    /// The counters now.
    ///
    /// # Errors
    /// Only a broken allocator.
    pub fn stats(&self) -> Result<AllocatorStats, AllocatorError> {
        self.0.stats()
    }

    /// Proves the invariants of its books, for tests.
    ///
    /// # Errors
    /// The first that does not hold.
    #[doc(hidden)]
    pub fn check(&self) -> Result<(), String> {
        self.0.check()
    }
}
