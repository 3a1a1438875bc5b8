//! Un-merging into anonymous memory: pages that show frames get the kind of memory back that they had.
//!
//! `MADV_POPULATE_WRITE` un-merges in place, but leaves the pages in mappings of a memfd: they could be
//! merged again only after a quiet time, an allocator that discards them later sees what lies
//! underneath (zeroes once the frames are punched, which waits for fork children), and the mappings
//! stay. A merged page that has never been written can do better: its bytes are its frame's and
//! cannot change, and nobody can hold it for writing, since that would have given it a copy. So a
//! copy is prepared elsewhere, writers are held off for a moment, and the copy is moved over the
//! page.
//!
//! A page that has been written since it was merged may be pinned by a device, and copying it would
//! orphan the pin (findings F2, F3). It is moved back only when it has been quiet: under one
//! uninterrupted write-protection of [`crate::watch`] for the whole quiet time. From then on it is
//! an ordinary page again.
//!
//! # Invariants
//! * T1. A page is replaced only if, in the window, the kernel says that it is present and still
//!   protected. Nobody sets its write-protect bit again once the helper has lifted it, so nobody has
//!   written since the protection began; and its bytes are its frame's, if it shows one, or those that
//!   were copied after the protection began. (That it shows its frame is not enough: a writer whom
//!   the helper let go on may be about to get his copy, and would write to it after it is gone.)
//! * T2. The caller has seen that there is memory enough: `mremap` unmaps the place first, and running
//!   out of memory then would leave a hole (finding F3c). If it happens all the same, it is tried
//!   again until it works.
//! * T3. As in [`crate::window`]: no allocation, no lock and no log while pages are held.
//!
//! # Cost
//! About 10 us for a run, and 1.5 us for each page. The copies are prepared at ever other addresses, or
//! finding any of them would cost the kernel as much as finding all (`Mapping::anonymous_apart`).

use crate::fork::{Gate, NoFork};
use crate::handoff::Shut;
use crate::sys::live::Live;
use crate::sys::mapping::{Mapping, MmapLock};
use crate::sys::pagemap::{Categories, PageRegion, Pagemap, Query};
use crate::sys::phase::{Phase, enter};
use crate::sys::procmap::Procmap;
use crate::sys::staged::Staged;
use crate::watch::Watches;
use crate::window::mapped_over;
use std::rc::Rc;
use std::time::Instant;

/// What is needed for it.
pub(crate) struct Restore<'a> {
    pub(crate) page: usize,
    pub(crate) pagemap: &'a Pagemap,
    pub(crate) maps: &'a Procmap,
    pub(crate) lock: &'a MmapLock,
    pub(crate) watches: &'a mut Watches,
    /// Room for as many regions as the run has pages.
    pub(crate) scanned: &'a mut [PageRegion],
}

impl Restore<'_> {
    /// Gives pages of `run`, which show the frames seen in `views`, anonymous memory with the same
    /// bytes. Sets `done` for those that have it, and leaves the others as they are.
    pub(crate) fn unbroken(
        &mut self,
        run: Live,
        views: &[(Rc<Mapping>, usize)],
        huge: Option<bool>,
        done: &mut [bool],
    ) {
        let _phase = enter(Phase::RestorePrepare);
        let Ok(mut staged) = Staged::new(run.span().len, huge) else {
            return;
        };
        for (at, (view, offset)) in views.iter().enumerate() {
            staged.fill(at, view, *offset);
        }
        // A page that is not present could not be told from a broken one in swap.
        let _ = run.populate_read();
        if self.watches.begin(run, Instant::now()).is_err() {
            return;
        }
        // Still protected, too: the helper may have let a writer go on before the window opened, and
        // his copy may be under way although the page tables do not show it yet.
        let (shown, written) = (
            Categories::PRESENT.and(Categories::FILE),
            Categories::WRITTEN,
        );
        let unbroken = Query {
            all_of: shown.and(written),
            any_of: Categories::NONE,
            inverted: written,
            ..Query::look(shown)
        };
        self.put(&mut staged, run, &unbroken, done);
    }

    /// Gives pages of `run`, which are watched and have been quiet, anonymous memory with the same
    /// bytes. Sets `done` for those that have it; the watch of the others ends.
    pub(crate) fn quiet(&mut self, run: Live, huge: Option<bool>, done: &mut [bool]) {
        let _phase = enter(Phase::RestorePrepare);
        let filled = Staged::new(run.span().len, huge)
            .ok()
            .and_then(|mut staged| {
                // Their bytes cannot have changed since if they are still protected in the window.
                staged.fill_from(run).is_ok().then_some(staged)
            });
        let Some(mut staged) = filled else {
            self.watches.end(run);
            return;
        };
        let (present, rest) = (
            Categories::PRESENT,
            Categories::FILE.and(Categories::WRITTEN),
        );
        let still_protected = Query {
            all_of: present.and(rest),
            any_of: Categories::NONE,
            inverted: rest,
            ..Query::look(present)
        };
        self.put(&mut staged, run, &still_protected, done);
    }

    /// Holds writers off, puts what passes `query` in its place, and ends all watches.
    fn put(&mut self, staged: &mut Staged, run: Live, query: &Query, done: &mut [bool]) {
        {
            let _no_fork = NoFork::wait();
            let _held = Held::new(self.watches, run);
            let _phase = enter(Phase::RestoreWindow);
            if self.lock.wait_for_readers().is_ok()
                && let Ok(got) = self.pagemap.scan(run.span(), query, self.scanned)
            {
                let found = &self.scanned[..got.regions];
                put_found(self.page, self.maps, found, staged, run, done);
            }
        }
        let mut at = 0;
        while at < done.len() {
            let restored = done[at];
            let same = done[at..].iter().take_while(|&&d| d == restored).count();
            let part = run.part(at * self.page, same * self.page);
            if restored {
                self.watches.forget(part.span());
            } else {
                self.watches.end(part);
            }
            at += same;
        }
    }
}

/// In the window: moves the prepared pages of the stretches found to their place.
fn put_found(
    page: usize,
    maps: &Procmap,
    found: &[PageRegion],
    staged: &mut Staged,
    run: Live,
    done: &mut [bool],
) {
    for found in found {
        let first = (found.span().start - run.span().start) / page;
        let place = run.part(first * page, found.span().len);
        if mapped_over(maps, place, || staged.put(first, place)).is_err() {
            return;
        }
        done[first..first + found.span().pages()].fill(true);
    }
}

/// Watched pages that are held: the helper lifts nothing, and whoever waits is woken in the end.
struct Held<'a> {
    watches: &'a Watches,
    run: Live,
    /// Opens last, whatever becomes of the waking.
    _shut: Shut<'a, Gate>,
}

impl<'a> Held<'a> {
    fn new(watches: &'a Watches, run: Live) -> Self {
        Self {
            watches,
            run,
            _shut: watches.shut(),
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.watches.wake(self.run);
    }
}
