//! Memory that is lent to whoever keeps bytes of its own, and the hash that goes with it.
//!
//! An [`Extent`] is ordinary memory that its engine knows of: as soon as the engine has other memory to
//! compare it with, it registers the extent, too, and pages that are equal share a frame. So whatever
//! keeps pages here shares them with merged regions by the ordinary scan, and never notices.
//!
//! All of it can be used from any thread, and takes no lock.
//!
//! # Invariants
//! * E-1. An extent's memory is unmapped when its last holder lets go of it: the borrower, or the engine,
//!   which does when its region has ended. So the promise behind [`Live`] holds by itself.
//! * E-2. Pages are given back on the merging thread only ([`Extent::discard`]), so that no window is
//!   open over them.
//! * E-3. What belongs to a parent process is never unmapped in a child.
//! * E-4. An extent outlives its engine.
//!
//! # Why not the frames' files
//! Pages that are written into a memfd by memory cost 2.9 us each here, in anonymous memory 1.6 us; a new
//! `bytes` object costs 2.0 us a page. Besides, these pages can be used again, and a fork child has a copy
//! of them.
//!
//! # Cost
//! Lending is a mapping, and a note for the merging thread. Pages are made by [`Extent::prepare`] in
//! stretches, since faults one by one take longer. (In huge pages a page cost 0.5 us, as long as the kernel
//! had just used them for something else; else this virtual machine had to ask its host for their memory,
//! and they took 8 us a page. And they would have to be split before a page of them could be shared.)

use crate::fork;
use crate::hash::{HashKey, PageHasher};
use crate::sys::kept::{Kept, Source};
use crate::sys::mapping::{Advice, AdviseStop, Mapping, Protection};
use crate::worker;
use pagemerge_core::Digest;
use std::io;
use std::mem;
use std::sync::Arc;
use std::sync::mpsc::Sender;

/// Memory for pages, known to an engine.
#[derive(Debug)]
pub struct Extent {
    engine: u64,
    number: u64,
    /// Taken only by drop.
    memory: Option<Arc<Mapping>>,
    pages: u32,
    epoch: (u64, u32),
}

impl Extent {
    pub(crate) fn new(engine: u64, number: u64, memory: Arc<Mapping>, pages: u32) -> Self {
        Self {
            engine,
            number,
            memory: Some(memory),
            pages,
            epoch: fork::epoch(),
        }
    }

    /// Memory for an extent.
    pub(crate) fn map(pages: u32) -> io::Result<Arc<Mapping>> {
        let bytes = pages as usize * crate::page_size();
        let memory = Mapping::anonymous(bytes, Protection::ReadWrite)?;
        // Pages come and go, and are shared, one by one. Where the kernel refuses a hint nothing is lost
        // but memory.
        let _ = memory.advise(Advice::NoHugePage);
        Ok(Arc::new(memory))
    }

    fn memory(&self) -> &Mapping {
        self.memory.as_ref().expect("only drop takes it")
    }

    /// How many pages it has.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// Makes pages, so that writing them takes no faults and cannot fail for want of memory.
    ///
    /// # Errors
    /// No memory for them. Some may have been made.
    ///
    /// # Panics
    /// When they are not inside.
    pub fn prepare(&self, first: u32, pages: u32) -> io::Result<()> {
        populate(self.memory(), first as usize, pages as usize)
    }

    /// Writes bytes, which [`prepare`](Self::prepare) has made room for. Whether somebody reads what was
    /// there is the caller's business.
    ///
    /// # Panics
    /// When they are not inside.
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

    /// Has the memory of some pages given back, which nobody reads any more: runs of (first page, number).
    /// When that is done `note` is sent to `done`; until then they must not be written.
    ///
    /// # Panics
    /// When they are not inside.
    pub fn discard<T>(&self, runs: Vec<(u32, u32)>, done: Sender<T>, note: T)
    where
        T: Send + 'static,
    {
        let inside =
            |(at, count): &(u32, u32)| at.checked_add(*count).is_some_and(|end| end <= self.pages);
        assert!(
            runs.iter().all(inside),
            "these pages are not of this extent"
        );
        if self.epoch != fork::epoch() {
            return;
        }
        let number = self.number;
        let memory = self.memory.clone();
        worker::post_to(self.engine, move |mut engine| {
            let registered = engine
                .as_ref()
                .is_some_and(|engine| engine.has_registered(number));
            for (first, pages) in runs {
                let Some(memory) = &memory else { break };
                let run = memory.span().page_run(first as usize, pages as usize);
                // What is refused (locked pages are) keeps its memory.
                match engine.as_deref_mut().filter(|_| registered) {
                    Some(engine) => {
                        let _ = engine.discard(run.start, run.len);
                    }
                    None => {
                        let _ = memory.advise_part(run, Advice::DontNeed);
                    }
                }
            }
            // Whoever asked may be gone.
            let _ = done.send(note);
        });
    }
}

fn populate(memory: &Mapping, first: usize, pages: usize) -> io::Result<()> {
    let part = memory.span().page_run(first, pages);
    match memory.advise_part(part, Advice::PopulateWrite) {
        // A kernel that does not know the advice: writing makes them.
        Ok(()) | Err(AdviseStop::Invalid) => Ok(()),
        Err(stop) => Err(stop.into()),
    }
}

impl Drop for Extent {
    fn drop(&mut self) {
        let memory = self.memory.take();
        if self.epoch != fork::epoch() {
            mem::forget(memory);
            return;
        }
        let number = self.number;
        worker::post_to(self.engine, move |engine| {
            if let Some(engine) = engine {
                engine.end_lot(number);
            }
            // Now nothing of it is registered any more.
            drop(memory);
        });
    }
}

/// Ordinary memory for bytes that no engine has to know of.
#[derive(Debug)]
pub struct Segment {
    /// Taken only by drop.
    memory: Option<Mapping>,
    epoch: (u64, u32),
}

impl Segment {
    /// `len` bytes, whole pages.
    ///
    /// # Errors
    /// No memory, or no mapping left.
    pub fn new(len: usize) -> io::Result<Self> {
        Ok(Self {
            memory: Some(Mapping::anonymous(len, Protection::ReadWrite)?),
            epoch: fork::epoch(),
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
        populate(self.memory(), first, (at + len).div_ceil(page) - first)
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
        if self.epoch != fork::epoch() {
            mem::forget(memory);
        }
    }
}

/// An engine's hash, for bytes of the caller's. Only in the process that made the engine.
#[derive(Clone, Debug)]
pub struct Digester {
    /// Taken only by drop.
    key: Option<Arc<HashKey>>,
    mark: u64,
}

impl Digester {
    pub(crate) fn new(key: Arc<HashKey>) -> Self {
        Self {
            key: Some(key),
            mark: fork::mark(),
        }
    }

    /// Makes ready to hash, for a short time: the secret is on the stack meanwhile.
    ///
    /// # Panics
    /// In a child of the process that made the engine, which does not get the secret.
    #[must_use]
    pub fn begin(&self) -> Hashing {
        assert!(
            self.mark == fork::mark(),
            "the secret of digests stays with the process that drew it"
        );
        Hashing(self.key.as_ref().expect("only drop takes it").hasher())
    }
}

impl Drop for Digester {
    fn drop(&mut self) {
        let key = self.key.take();
        if self.mark != fork::mark() {
            mem::forget(key);
        }
    }
}

/// Ready to hash.
#[derive(Debug)]
pub struct Hashing(PageHasher);

impl Hashing {
    /// The digest of a page: the engine's. `next` is what will be asked for next, if that is known: it is
    /// fetched meanwhile.
    ///
    /// # Panics
    /// Unless it is as long as a page.
    #[must_use]
    pub fn page(&self, page: Source<'_>, next: Option<Source<'_>>) -> Digest {
        page.digest(&self.0, next)
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
