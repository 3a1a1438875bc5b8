//! The allocator itself: the books, the arenas, and who waits for whom.
//!
//! # Who waits for whom
//! * The books are locked for a few steps at a time, by a lock that no fork finds taken, and nothing is
//!   waited for meanwhile: no job, no mapping, no memory being zeroed. So neither the merging thread nor
//!   a fork ever waits for a thread that waits for one of them.
//! * The merging thread does not touch the books. What it has discarded it puts into a box of its own
//!   ([`Returned`]), which is emptied into the books by whoever allocates or frees next.
//! * Freeing does not wait, but when more than [`AWAY_BYTES`] have been freed and are not given back yet:
//!   memory that is freed is to be there for others.
//!
//! # In a fork child
//! The books are the child's, and so is the memory. What was away at the time of the fork will not come
//! back from a thread that the child does not have: it is discarded once more, by mapping fresh memory
//! over it. New arenas do not merge.

use super::Options;
use super::book::{Book, Given, Place, Resized};
use super::classes::class_of;
use crate::allocator::{AllocatorError, AllocatorStats};
use pagemerge_linux::{Arena, Engine, ForkGuard, ForkLock, Run, fork_generation, page_size};
use std::sync::Arc;

/// Dirty memory that is kept for the next owner of its size: overwriting it takes 0.1 us a page, and having
/// the kernel take it away and give it again 3 us. malloc keeps about as much.
const DIRTY_BYTES: usize = 32 << 20;
/// Memory that has been freed and is not given back yet, before somebody waits for that. (It goes in
/// batches of [`DIRTY_BYTES`], so it may be so much more.)
const AWAY_BYTES: usize = 32 << 20;
/// Arenas that are free as a whole and kept.
const SPARE: usize = 1;

/// What the merging thread has done.
#[derive(Debug, Default)]
pub(crate) struct Returned {
    /// These read as zero.
    done: Vec<Place>,
    /// These do not: the kernel refused.
    kept: Vec<Place>,
}

#[derive(Debug)]
struct State {
    book: Book<Arc<Arena>>,
    /// The process, in the line of forks, in which the books were last used.
    generation: u64,
    /// Bytes of arenas that were dropped since somebody waited for the merging thread.
    ended: usize,
}

/// What is to be done once the books are free again.
#[derive(Default)]
#[must_use]
struct Afterwards {
    /// To be zeroed by hand, since the kernel did not.
    zero: Vec<(Arc<Arena>, Place)>,
    /// To be discarded in a child.
    again: Vec<(Arc<Arena>, Place)>,
    /// To be discarded.
    flushed: Vec<(usize, Arc<Arena>, Vec<Run>)>,
    /// To be unmapped.
    gone: Vec<Arc<Arena>>,
    wait: bool,
}

#[derive(Debug)]
pub(crate) struct Heap {
    engine: Engine,
    options: Options,
    page: usize,
    state: ForkLock<State>,
    returned: Arc<ForkLock<Returned>>,
}

impl Heap {
    pub(crate) fn new(engine: &Engine, options: Options) -> Self {
        let page = page_size();
        let state = State {
            book: Book::new(page, options.largest_pages()),
            generation: fork_generation(),
            ended: 0,
        };
        Self {
            engine: engine.clone(),
            options,
            page,
            state: ForkLock::new(state),
            returned: Arc::default(),
        }
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The books, with what has come back.
    fn books(&self) -> Result<(ForkGuard<'_, State>, Afterwards), AllocatorError> {
        let mut afterwards = Afterwards::default();
        let mut state = self.state.lock().ok_or(AllocatorError::Broken)?;
        let returned = match self.returned.lock_within(&state) {
            Some(mut returned) => std::mem::take(&mut *returned),
            None => Returned::default(),
        };
        let with_arena = |state: &State, place: Place| {
            let arena = state.book.arena_at(place.arena)?;
            Some((Arc::clone(arena), place))
        };
        for place in returned.done {
            state.book.back(place);
        }
        let kept = returned.kept.into_iter();
        afterwards.zero = kept.filter_map(|at| with_arena(&state, at)).collect();
        if state.generation != fork_generation() {
            state.generation = fork_generation();
            let zero = |at: &Place| afterwards.zero.iter().any(|(_, kept)| kept == at);
            let away = state.book.away().into_iter().filter(|at| !zero(at));
            afterwards.again = away.filter_map(|at| with_arena(&state, at)).collect();
        }
        afterwards.gone = state.book.drop_empty(SPARE);
        Ok((state, afterwards))
    }

    /// What could not be done while the books were locked. Nobody else has anything to do with these
    /// runs: they are away, or out of the books.
    fn finish(&self, afterwards: Afterwards) {
        let Afterwards {
            mut zero,
            again,
            flushed,
            gone,
            wait,
        } = afterwards;
        let mut back = Vec::new();
        for (arena, at) in again {
            if arena.discard(vec![at.run]).is_empty() {
                back.push(at);
            } else {
                zero.push((arena, at));
            }
        }
        for (arena, at) in zero {
            let (first, pages) = (at.run.first as usize, at.run.pages as usize);
            arena.zero(first * self.page, pages * self.page);
            back.push(at);
        }
        for (at, arena, runs) in flushed {
            let returned = Arc::clone(&self.returned);
            let place = move |run| Place { arena: at, run };
            let posted = arena.discard_later(runs, move |done, kept| {
                // Nobody panics while he has it.
                if let Some(mut returned) = returned.lock() {
                    returned.done.extend(done.into_iter().map(place));
                    returned.kept.extend(kept.into_iter().map(place));
                }
            });
            if let Err(runs) = posted {
                // No memory to hand it over: it may be the next one's as it is, once it is zero.
                for run in runs {
                    arena.zero(
                        run.first as usize * self.page,
                        run.pages as usize * self.page,
                    );
                    back.push(place(run));
                }
            }
        }
        drop(gone);
        if wait {
            Arena::wait(&self.engine);
        }
        if !back.is_empty()
            && let Some(mut state) = self.state.lock()
        {
            for place in back {
                state.book.back(place);
            }
        }
    }

    /// Memory for `bytes` bytes: its address. It reads as zero, up to the end of its last page.
    pub(crate) fn allocate(&self, bytes: usize) -> Result<usize, AllocatorError> {
        loop {
            let (mut state, afterwards) = self.books()?;
            let taken = match state.book.pages_for(bytes) {
                Some(pages) if pages <= self.options.largest_pages() => state.book.take(bytes),
                _ => None,
            };
            drop(state);
            self.finish(afterwards);
            if let Some(taken) = taken {
                if let Some((arena, offset, len)) = taken.zero {
                    arena.zero(offset, len);
                }
                return Ok(taken.addr);
            }
            if let Some(addr) = self.grow(bytes)? {
                return Ok(addr);
            }
        }
    }

    /// Makes an arena; and if the block has all of it, the block.
    fn grow(&self, bytes: usize) -> Result<Option<usize>, AllocatorError> {
        let fails = |source| AllocatorError::Memory { bytes, source };
        let Some(pages) = Book::<Arc<Arena>>::pages_in(self.page, bytes) else {
            return Err(AllocatorError::TooLarge { bytes });
        };
        let make = |pages, huge| Arena::new(&self.engine, pages, &self.options.domain, huge);
        if pages > self.options.largest_pages() {
            // As numpy has it for large arrays. Nobody else's pages lie in the same huge page.
            let arena = make(pages, true).map_err(fails)?;
            let (mut state, afterwards) = self.books()?;
            let addr = arena.addr();
            state.book.add_whole(addr, pages, bytes, Arc::new(arena));
            drop(state);
            self.finish(afterwards);
            return Ok(Some(addr));
        }
        // Near a limit of address space a smaller one may do.
        let arena = make(self.options.arena_pages, false)
            .or_else(|_| make(class_of(pages).pages, false))
            .map_err(fails)?;
        let (mut state, afterwards) = self.books()?;
        state.book.add(arena.addr(), arena.pages(), Arc::new(arena));
        drop(state);
        self.finish(afterwards);
        Ok(None)
    }

    /// Takes the block at `addr` back. `false`: there is none.
    pub(crate) fn free(&self, addr: usize) -> bool {
        // After a panic within the books nothing is given out any more, nor taken back.
        let Ok((mut state, mut afterwards)) = self.books() else {
            return false;
        };
        let Some(given) = state.book.give(addr) else {
            drop(state);
            self.finish(afterwards);
            return false;
        };
        match given {
            Given::Run if state.book.sums().dirty_pages * self.page > DIRTY_BYTES => {
                afterwards.flushed = state.book.flush();
                afterwards.wait = state.book.sums().away_pages * self.page > AWAY_BYTES;
            }
            Given::Run => {}
            Given::Whole(arena, bytes) => {
                afterwards.gone.push(arena);
                state.ended += bytes;
                if state.ended > AWAY_BYTES {
                    state.ended = 0;
                    afterwards.wait = true;
                }
            }
        }
        drop(state);
        self.finish(afterwards);
        true
    }

    /// How many bytes the block at `addr` has, if there is one.
    pub(crate) fn payload(&self, addr: usize) -> Option<usize> {
        // No page begins there.
        if !addr.is_multiple_of(self.page) {
            return None;
        }
        self.state.lock()?.book.payload(addr)
    }

    /// Gives the block at `addr` another size, if need be another place: its address.
    pub(crate) fn resize(&self, addr: usize, bytes: usize) -> Result<usize, AllocatorError> {
        let (mut state, afterwards) = self.books()?;
        let resized = state.book.resize(addr, bytes);
        drop(state);
        self.finish(afterwards);
        match resized {
            None => Err(AllocatorError::NoBlock { addr }),
            Some(Resized::InPlace(zero)) => {
                if let Some((arena, offset, len)) = zero {
                    arena.zero(offset, len);
                }
                Ok(addr)
            }
            Some(Resized::Moves(old)) => {
                let to = self.allocate(bytes)?;
                self.copy(to, addr, old.min(bytes))?;
                self.free(addr);
                Ok(to)
            }
        }
    }

    /// The arena of a block, and where in it the block begins.
    fn arena_of(&self, addr: usize) -> Result<(Arc<Arena>, usize), AllocatorError> {
        let state = self.state.lock().ok_or(AllocatorError::Broken)?;
        let found = state.book.pages_of(addr);
        let (arena, run) = found.ok_or(AllocatorError::NoBlock { addr })?;
        Ok((arena, run.first as usize * self.page))
    }

    fn copy(&self, to: usize, from: usize, len: usize) -> Result<(), AllocatorError> {
        let (to, at) = self.arena_of(to)?;
        let (from, there) = self.arena_of(from)?;
        to.copy(at, &from, there, len);
        Ok(())
    }

    /// Writes to the block at `addr`.
    pub(crate) fn write(
        &self,
        addr: usize,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), AllocatorError> {
        let (arena, at) = self.arena_of(addr)?;
        arena.write(at + offset, bytes);
        Ok(())
    }

    /// Reads from the block at `addr`.
    pub(crate) fn read(
        &self,
        addr: usize,
        offset: usize,
        into: &mut [u8],
    ) -> Result<(), AllocatorError> {
        let (arena, at) = self.arena_of(addr)?;
        arena.read(at + offset, into);
        Ok(())
    }

    /// Gives the memory of the block at `addr` back; the block stays, and reads as zero.
    pub(crate) fn empty(&self, addr: usize) -> Result<(), AllocatorError> {
        let state = self.state.lock().ok_or(AllocatorError::Broken)?;
        let found = state.book.pages_of(addr);
        drop(state);
        let (arena, run) = found.ok_or(AllocatorError::NoBlock { addr })?;
        for run in arena.discard(vec![run]) {
            arena.zero(
                run.first as usize * self.page,
                run.pages as usize * self.page,
            );
        }
        Ok(())
    }

    /// Gives everything back that no block has.
    pub(crate) fn trim(&self) -> Result<(), AllocatorError> {
        let (mut state, mut afterwards) = self.books()?;
        afterwards.flushed = state.book.flush();
        drop(state);
        afterwards.wait = true;
        self.finish(afterwards);
        let (mut state, mut afterwards) = self.books()?;
        afterwards.gone.extend(state.book.drop_empty(0));
        state.ended = 0;
        drop(state);
        afterwards.wait = true;
        self.finish(afterwards);
        Ok(())
    }

    pub(crate) fn stats(&self) -> Result<AllocatorStats, AllocatorError> {
        let (state, afterwards) = self.books()?;
        let sums = state.book.sums();
        let refused = state
            .book
            .arenas()
            .find_map(|arena| arena.refusal().map(str::to_owned));
        let counted = AllocatorStats {
            allocations: sums.allocations,
            live_bytes: sums.live_bytes,
            held_bytes: (sums.live_pages + sums.dirty_pages + sums.away_pages) * self.page,
            reserved_bytes: sums.pages * self.page,
            metadata_bytes: size_of::<Self>() + state.book.bytes(),
            arenas: state.book.arenas().count(),
            not_merging: refused,
        };
        drop(state);
        self.finish(afterwards);
        Ok(counted)
    }

    #[doc(hidden)]
    pub(crate) fn check(&self) -> Result<(), String> {
        let state = self.state.lock().ok_or("broken")?;
        state.book.check()
    }
}

impl Drop for Heap {
    fn drop(&mut self) {
        if let Some(mut state) = self.state.lock() {
            let book = std::mem::replace(&mut state.book, Book::new(self.page, 1));
            drop(state);
            drop(book);
        }
        // Whoever drops the last block finds the memory given back.
        Arena::wait(&self.engine);
    }
}
