//! Arenas: memory of our own that is registered with an engine from its first byte to its last. What an
//! allocator is made of.
//!
//! An arena is private anonymous memory that nobody else can unmap, move or resize, so that no promise of
//! an owner is needed to merge it: the region has a share of the mapping. Its users get addresses and
//! write there as they like; what is here changes bytes only where its owner gives them up.
//!
//! # Who waits for whom
//! Registering, discarding and ending are jobs of the merging thread. None of them has to be waited for:
//! jobs are done in the order in which they come, so memory can be used as soon as it is mapped, what
//! is discarded comes back by a call on the merging thread, and an arena that is dropped is unmapped when
//! its turn comes. Whoever wants to wait, can.
//!
//! # When nothing merges
//! * The engine is closed: every page has its own copy again, and what is discarded is mapped afresh.
//! * In a fork child the memory is the child's, the engine the parent's: the same.
//! * The engine refused the arena (no memory for its records, another userfaultfd): the same, and
//!   [`Arena::refusal`] says why.
//!
//! # Invariants
//! * A registered arena's mapping lives until its region is gone, whoever drops what.
//! * A run reads as zero after it has been discarded, whatever else shows it: frames that a fork child
//!   still maps do not come to light. (What could not be discarded is told; it keeps its bytes.)
//!
//! # Cost
//! A mapping (3 us) and a job (20 us of the merging thread); a discarded run one or two system calls.

use crate::engine::{Engine, RegionHandle};
use crate::error::Error;
use crate::sys::mapping::{Advice, Mapping, Protection};
use crate::worker::{self, Stage};
use std::sync::{Arc, OnceLock};

/// Whole pages of an arena: the number of the first one, and how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Run {
    /// The first page.
    pub first: u32,
    /// How many there are.
    pub pages: u32,
}

/// How its registration ended, once it has.
type Told = Arc<OnceLock<Result<RegionHandle, String>>>;

/// Memory of our own, merged by an engine. See the module.
#[derive(Debug)]
pub struct Arena {
    pages: u32,
    mapping: Arc<Mapping>,
    engine: Engine,
    told: Told,
}

impl Arena {
    /// Maps `pages` pages of zeroes, and has them registered. `huge`: huge pages are welcome there.
    ///
    /// # Errors
    /// The kernel has no such memory. That the engine does not take it is not an error:
    /// [`refusal`](Self::refusal) tells.
    pub fn new(engine: &Engine, pages: u32, domain: &str, huge: bool) -> Result<Self, Error> {
        let bytes = (pages as usize).saturating_mul(crate::page_size());
        let mapping = Mapping::anonymous(bytes, Protection::ReadWrite)
            .map_err(|e| Error::os(format!("cannot map {bytes} bytes"), e.into()))?;
        if huge {
            // A hint: the kernel may have none.
            let _ = mapping.advise(Advice::HugePage);
        }
        let arena = Self {
            pages,
            mapping: Arc::new(mapping),
            engine: engine.clone(),
            told: Told::default(),
        };
        let refuse = |why: Error| {
            // Nobody else has it yet.
            let _ = arena.told.set(Err(why.to_string()));
        };
        if !engine.is_ours() {
            refuse(Error::Forked);
            return Ok(arena);
        }
        let (id, share) = (engine.id(), Arc::clone(&arena.mapping));
        let (told, domain) = (Arc::clone(&arena.told), domain.to_owned());
        let posted = worker::post(move |stage| {
            let done = stage.on(id, |engine| {
                engine.register_own(share, &domain, huge.then_some(true))
            });
            // Set here only, as this job was posted.
            let _ = told.set(done.and_then(|done| done).map_err(|why| why.to_string()));
        });
        posted.unwrap_or_else(refuse);
        Ok(arena)
    }

    /// Where it begins.
    #[must_use]
    pub fn addr(&self) -> usize {
        self.mapping.span().start
    }

    /// How many pages it has.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// Why it is not merged, if the engine has refused it. (An engine that is closed later does not change
    /// this.)
    #[must_use]
    pub fn refusal(&self) -> Option<&str> {
        match self.told.get() {
            Some(Err(why)) => Some(why),
            _ => None,
        }
    }

    /// Throws the contents of `runs` away: they read as zero when this returns, but for those that are
    /// returned. These keep some of their bytes, or all: locked memory, or no mapping left.
    ///
    /// # Panics
    /// When one is not inside.
    #[must_use]
    pub fn discard(&self, runs: Vec<Run>) -> Vec<Run> {
        let Some(work) = self.discarding(&runs) else {
            return blank(&self.mapping, runs);
        };
        let kept = runs.clone();
        worker::call(move |stage| work(stage, runs)).unwrap_or(kept)
    }

    /// The same without waiting: `done` is called on the merging thread, with the runs that were discarded
    /// and those that were not. It must not wait for anything, nor call an engine. Where nothing is merged it
    /// is called before this returns.
    ///
    /// # Errors
    /// The runs, untouched, when there is no memory to hand them over.
    ///
    /// # Panics
    /// When one is not inside.
    pub fn discard_later(
        &self,
        runs: Vec<Run>,
        done: impl FnOnce(Vec<Run>, Vec<Run>) + Send + 'static,
    ) -> Result<(), Vec<Run>> {
        let Some(work) = self.discarding(&runs) else {
            let kept = blank(&self.mapping, runs.clone());
            done(without(runs, &kept), kept);
            return Ok(());
        };
        let untouched = runs.clone();
        worker::post(move |stage| {
            let kept = work(stage, runs.clone());
            done(without(runs, &kept), kept);
        })
        .map_err(|_| untouched)
    }

    /// What discards runs on the merging thread; `None` where that is not its business.
    fn discarding(
        &self,
        runs: &[Run],
    ) -> Option<impl FnOnce(&mut Stage, Vec<Run>) -> Vec<Run> + Send + use<>> {
        for run in runs {
            // Panics where it is not inside.
            let _ = self
                .mapping
                .span()
                .page_run(run.first as usize, run.pages as usize);
        }
        if self.refusal().is_some() || !self.engine.is_ours() {
            return None;
        }
        let (id, mapping) = (self.engine.id(), Arc::clone(&self.mapping));
        Some(move |stage: &mut Stage, runs: Vec<Run>| {
            let mut kept = Vec::new();
            for run in runs {
                let span = mapping
                    .span()
                    .page_run(run.first as usize, run.pages as usize);
                let done = stage.on(id, |engine| engine.discard(span.start, span.len));
                match done.and_then(|done| done) {
                    Ok(()) => {}
                    // The engine has given it back, or never had it.
                    Err(Error::Closed | Error::NotInRegion { .. }) => {
                        kept.extend(blank(&mapping, vec![run]));
                    }
                    Err(why) => {
                        tracing::debug!(%why, "pages of an arena are not discarded");
                        kept.push(run);
                    }
                }
            }
            kept
        })
    }

    /// Waits until everything that was handed over before is done: registrations, discards, the end of
    /// arenas.
    pub fn wait(engine: &Engine) {
        if engine.is_ours() {
            // Whatever keeps it from being waited for, there is nothing to do about it.
            let _ = worker::call(|_| ());
        }
    }

    /// Makes bytes zero by writing them.
    ///
    /// # Panics
    /// When they are not inside; likewise for the next three.
    pub fn zero(&self, offset: usize, len: usize) {
        self.mapping.zero(offset, len);
    }

    /// Writes `bytes`.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        self.mapping.copy_in(offset, bytes);
    }

    /// Reads as many bytes as `into` has.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        self.mapping.copy_out(offset, into);
    }

    /// Copies `len` bytes of `from`, which may be this arena, beginning at `there`.
    pub fn copy(&self, offset: usize, from: &Arena, there: usize, len: usize) {
        self.mapping.copy_from(offset, &from.mapping, there, len);
    }
}

/// Maps fresh memory over runs; returns those for which that failed.
fn blank(mapping: &Mapping, runs: Vec<Run>) -> Vec<Run> {
    let fails = |run: &Run| {
        let part = mapping
            .span()
            .page_run(run.first as usize, run.pages as usize);
        mapping.blank(part).is_err()
    };
    runs.into_iter().filter(fails).collect()
}

fn without(runs: Vec<Run>, kept: &[Run]) -> Vec<Run> {
    if kept.is_empty() {
        return runs;
    }
    runs.into_iter().filter(|run| !kept.contains(run)).collect()
}

impl Drop for Arena {
    fn drop(&mut self) {
        if self.refusal().is_some() {
            // Nobody else has a share.
            return;
        }
        if !self.engine.is_ours() {
            // The region's share is the parent's, and its copy here is never given back. So the memory is,
            // by itself; the addresses stay taken.
            let _ = self.mapping.blank(self.mapping.span());
            return;
        }
        let (id, told) = (self.engine.id(), Arc::clone(&self.told));
        let share = Arc::clone(&self.mapping);
        let posted = worker::post(move |stage| {
            if let Some(Ok(handle)) = told.get() {
                // A closed engine has let it go already; one that a panic has broken keeps it.
                let _ = stage.on(id, |engine| engine.end_own(*handle));
            }
            drop(share);
        });
        if let Err(why) = posted {
            // It stays mapped, and registered.
            tracing::warn!(%why, "an arena that nobody uses any more cannot be given back");
        }
    }
}
