//! Memory that is lent to whoever keeps bytes of its own: extents of frame slots, segments of ordinary
//! memory, views that lay pieces side by side, and the hash that goes with them.
//!
//! All of it is safe to use from any thread, needs no descriptor and no call of the merging thread but
//! for lending an extent and giving one back, and takes no lock.
//!
//! # Invariants
//! * E-1. A slot of an extent is written once. It is given back, punched by the frame store when no
//!   process maps it any more, and its number is not used again (invariants F-1 and F-2 of
//!   [`crate::frames`]). Dealing each slot out once is the borrower's business; that no other slot can
//!   be reached through an extent is checked here.
//! * E-2. Fork children inherit what is read (segments, views, and the reading side of extents), and not
//!   what is written: an extent's writing side would be theirs and their parent's alike.
//! * E-3. What belongs to a parent is never unmapped in a child: its addresses may be something else
//!   there by then.
//! * E-4. An extent outlives its engine. Its pages stay as long as it is mapped; only giving back single
//!   pages has no effect any more.
//!
//! # Cost
//! Lending is a job of the merging thread and two mappings. Pages are made by [`Extent::prepare`] in
//! stretches, since faults one by one take several times as long.

use crate::fork;
use crate::hash::{HashKey, PageHasher};
use crate::sys::kept::{self, Kept, Source};
use crate::sys::mapping::{Advice, AdviseStop, Mapping, Protection};
use crate::worker;
use pagemerge_core::Digest;
use std::io;
use std::mem;
use std::sync::Arc;

/// Where an extent lies among its engine's frames.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lot {
    pub(crate) engine: u64,
    pub(crate) generation: u32,
    pub(crate) first: u32,
    pub(crate) pages: u32,
}

/// Fresh neighbouring slots of an engine's frames, lent to be written once.
///
/// Pages that were made and are not given back before it ends keep their memory until the engine ends.
#[derive(Debug)]
pub struct Extent {
    lot: Lot,
    /// Taken only by drop.
    write: Option<Mapping>,
    read: Option<Mapping>,
    epoch: (u64, u32),
    forks: u64,
}

impl Extent {
    pub(crate) fn new(lot: Lot, write: Mapping, read: Mapping) -> Self {
        Self {
            lot,
            write: Some(write),
            read: Some(read),
            epoch: fork::epoch(),
            forks: fork::forks(),
        }
    }

    fn reading(&self) -> &Mapping {
        self.read.as_ref().expect("only drop takes it")
    }

    fn writing(&self) -> &Mapping {
        self.write.as_ref().expect("only drop takes it")
    }

    /// How many pages it has.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.lot.pages
    }

    /// Whether new pages should still go here: after a fork they belong into another extent, because
    /// nothing of this one can be given back while the child lives.
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.forks == fork::forks()
    }

    /// Makes pages, so that writing them takes no faults and cannot fail for want of memory.
    ///
    /// # Errors
    /// No memory for them. Some may have been made.
    ///
    /// # Panics
    /// When they are not inside.
    pub fn prepare(&self, first: u32, pages: u32) -> io::Result<()> {
        let part = self
            .writing()
            .span()
            .page_run(first as usize, pages as usize);
        match self.writing().advise_part(part, Advice::PopulateWrite) {
            // A kernel that does not know the advice: writing makes them.
            Ok(()) | Err(AdviseStop::Invalid) => Ok(()),
            Err(stop) => Err(stop.into()),
        }
    }

    /// Writes a page that nobody was ever shown, and that [`prepare`](Self::prepare) has made. Only in
    /// the process that was lent the extent.
    ///
    /// # Panics
    /// When it is not inside, `page` is not a page, or the process is another.
    pub fn write(&self, at: u32, pages: Source<'_>) {
        let page = crate::page_size();
        assert!(
            pages.len().is_multiple_of(page),
            "whole pages are written to an extent"
        );
        Kept::within(self.writing(), at as usize * page, pages.len()).write(pages);
    }

    /// Bytes of it as their writer sees them, only in the process that was lent the extent: these are
    /// mapped already.
    ///
    /// # Panics
    /// When they are not inside.
    #[must_use]
    pub fn written(&self, at: usize, len: usize) -> Source<'_> {
        Kept::within(self.writing(), at, len).as_source()
    }

    /// Bytes of it.
    ///
    /// # Panics
    /// When they are not inside.
    #[must_use]
    pub fn bytes(&self, at: usize, len: usize) -> Source<'_> {
        Kept::within(self.reading(), at, len).as_source()
    }

    /// Gives pages back that nobody reads any more: runs of (first page, number). Their memory goes when
    /// no fork child is left that might read them.
    pub fn give_back(&self, runs: Vec<(u32, u32)>) {
        let Lot {
            engine,
            generation,
            first,
            pages,
        } = self.lot;
        assert!(
            runs.iter()
                .all(|(at, count)| at.checked_add(*count).is_some_and(|end| end <= pages)),
            "what is given back is not of this extent"
        );
        if self.epoch != fork::epoch() {
            return;
        }
        worker::post(engine, move |engine| {
            let runs = runs.into_iter().map(|(at, count)| (first + at, count));
            engine.take_back(generation, runs);
        });
    }
}

impl Drop for Extent {
    fn drop(&mut self) {
        let (write, read) = (self.write.take(), self.read.take());
        if self.epoch != fork::epoch() {
            mem::forget((write, read));
            return;
        }
        drop((write, read));
        let lot = self.lot;
        worker::post(lot.engine, move |engine| {
            engine.end_lot(lot.generation, lot.pages);
        });
    }
}

/// Ordinary memory for bytes that come and go: children have a copy of it.
#[derive(Debug)]
pub struct Segment {
    /// Taken only by drop.
    memory: Option<Mapping>,
    process: (u64, u32),
}

impl Segment {
    /// `len` bytes, whole pages.
    ///
    /// # Errors
    /// No memory, or no mapping left.
    pub fn new(len: usize) -> io::Result<Self> {
        Ok(Self {
            memory: Some(Mapping::anonymous(len, Protection::ReadWrite)?),
            process: fork::epoch(),
        })
    }

    fn memory(&self) -> &Mapping {
        self.memory.as_ref().expect("only drop takes it")
    }

    /// Makes the pages that these bytes lie in, so that writing cannot fail for want of memory.
    ///
    /// # Errors
    /// No memory for them.
    ///
    /// # Panics
    /// When they are not inside.
    pub fn prepare(&self, at: usize, len: usize) -> io::Result<()> {
        let page = crate::page_size();
        let first = at / page;
        let pages = (at + len).div_ceil(page) - first;
        let part = self.memory().span().page_run(first, pages);
        match self.memory().advise_part(part, Advice::PopulateWrite) {
            Ok(()) | Err(AdviseStop::Invalid) => Ok(()),
            Err(stop) => Err(stop.into()),
        }
    }

    /// Writes bytes.
    ///
    /// # Panics
    /// When that is not inside.
    pub fn write(&self, at: usize, bytes: Source<'_>) {
        Kept::within(self.memory(), at, bytes.len()).write(bytes);
    }

    /// Bytes of it.
    ///
    /// # Panics
    /// When they are not inside.
    #[must_use]
    pub fn bytes(&self, at: usize, len: usize) -> Source<'_> {
        Kept::within(self.memory(), at, len).as_source()
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        let memory = self.memory.take();
        if self.process != fork::epoch() {
            mem::forget(memory);
        }
    }
}

/// One piece of a [`View`].
#[derive(Clone, Copy, Debug)]
pub enum Piece<'a> {
    /// Pages of an extent: the first, and how many.
    Pages(&'a Extent, u32, u32),
    /// Pages of zeroes.
    Zeroes(u32),
    /// A part of a page, at the end only.
    Tail(Source<'a>),
}

/// Pieces side by side, to be read as one.
#[derive(Debug)]
pub struct View {
    memory: Mapping,
    mappings: usize,
}

impl View {
    /// Lays pieces side by side. Pages are shown, not copied; a tail is copied.
    ///
    /// # Errors
    /// No memory or no mapping left.
    ///
    /// # Panics
    /// When a tail is not at the end.
    pub fn of(pieces: &[Piece<'_>]) -> io::Result<Self> {
        let page = crate::page_size();
        let pages = |piece: &Piece<'_>| match piece {
            Piece::Pages(_, _, pages) | Piece::Zeroes(pages) => *pages as usize,
            Piece::Tail(_) => 1,
        };
        let all: usize = pieces.iter().map(pages).sum();
        let mut memory = Mapping::anonymous(all * page, Protection::ReadWrite)?;
        let (mut at, mut mappings) = (0, 1);
        for (number, piece) in pieces.iter().enumerate() {
            match *piece {
                Piece::Pages(extent, first, count) => {
                    let run = extent
                        .reading()
                        .span()
                        .page_run(first as usize, count as usize);
                    kept::show(extent.reading(), run, &mut memory, at)?;
                    mappings += 1;
                }
                Piece::Zeroes(_) => mappings += 1,
                Piece::Tail(bytes) => {
                    assert!(number + 1 == pieces.len(), "a tail is at the end");
                    Kept::within(&memory, at, bytes.len()).write(bytes);
                }
            }
            at += pages(piece) * page;
        }
        Ok(Self { memory, mappings })
    }

    /// How many mappings it takes, at most.
    #[must_use]
    pub fn mappings(&self) -> usize {
        self.mappings
    }

    /// Bytes of it.
    ///
    /// # Panics
    /// When they are not inside.
    #[must_use]
    pub fn bytes(&self, at: usize, len: usize) -> Source<'_> {
        Kept::within(&self.memory, at, len).as_source()
    }
}

/// An engine's hash, for bytes of the caller's: what is kept under its digests can meet the engine's
/// frames. Only in the process that made the engine.
#[derive(Clone, Debug)]
pub struct Digester {
    /// Taken only by drop.
    key: Option<Arc<HashKey>>,
    epoch: (u64, u32),
}

impl Digester {
    pub(crate) fn new(key: Arc<HashKey>) -> Self {
        Self {
            key: Some(key),
            epoch: fork::epoch(),
        }
    }

    /// Makes ready to hash, for a short time: the secret is on the stack meanwhile.
    ///
    /// In a child of the process that made the engine, which does not get the secret, the program ends.
    #[must_use]
    pub fn begin(&self) -> Hashing {
        Hashing(self.key.as_ref().expect("only drop takes it").hasher())
    }
}

impl Drop for Digester {
    fn drop(&mut self) {
        let key = self.key.take();
        if self.epoch != fork::epoch() {
            mem::forget(key);
        }
    }
}

/// Ready to hash.
#[derive(Debug)]
pub struct Hashing(PageHasher);

impl Hashing {
    /// The digest of a page: the engine's.
    ///
    /// # Panics
    /// Unless it is as long as a page.
    #[must_use]
    pub fn page(&self, page: Source<'_>) -> Digest {
        page.digest(&self.0)
    }

    /// The hash of any bytes, up to a page, the number included.
    ///
    /// # Panics
    /// When there are more.
    #[must_use]
    pub fn bytes(&self, bytes: Source<'_>) -> u64 {
        bytes.hash(&self.0)
    }

    /// The hash of a sequence that has the hash `before`, with one more number at its end.
    #[must_use]
    pub fn more(&self, before: u64, number: u64) -> u64 {
        self.0.hash_more(before, number)
    }
}
