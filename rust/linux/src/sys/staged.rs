//! Memory that is prepared elsewhere and then moved, whole pages at a time, to its place.

use super::live::Live;
use super::mapping::{self, Advice, MapStop, Mapping, Protection};
use super::{Errno, Span, page_size};
use std::ptr;

/// Fresh private memory whose pages will take the place of others.
///
/// A page that has been moved away leaves an address that may be anybody's a moment later, so it is
/// remembered which pages are still here, and only those are unmapped in the end.
#[derive(Debug)]
pub(crate) struct Staged {
    span: Span,
    here: Vec<bool>,
}

impl Staged {
    /// Maps `len` bytes. `huge` is the owner's choice about huge pages at the place to be.
    ///
    /// # Errors
    /// [`MapStop`].
    pub(crate) fn new(len: usize, huge: Option<bool>) -> Result<Self, MapStop> {
        let mapping = Mapping::anonymous_apart(len, Protection::ReadWrite)?;
        if let Some(huge) = huge {
            let advice = if huge {
                Advice::HugePage
            } else {
                Advice::NoHugePage
            };
            // A hint: without it only the speed of later use may differ.
            let _ = mapping.advise(advice);
        }
        Ok(Self {
            span: mapping.into_span(),
            here: vec![true; len / page_size()],
        })
    }

    /// Fills page number `at` with the page of `view` at `offset`, which nobody writes.
    ///
    /// # Panics
    /// When one of them is not inside, or the page has been moved away.
    pub(crate) fn fill(&mut self, at: usize, view: &Mapping, offset: usize) {
        assert!(self.here[at], "page {at} has been moved away");
        let (from, to) = (
            view.span().part(offset, page_size()),
            self.span.page_run(at, 1),
        );
        // SAFETY: copies one page between two mappings of our own.
        // * `from` is mapped while `view` is borrowed, and shows a frame, whose bytes never change.
        // * `to` is mapped, writable, still here (just checked), and known to nobody else.
        // * They are different mappings, so they do not overlap, and no reference points into them.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to.as_mut_ptr(), page_size()) };
    }

    /// Fills all pages with those of `from`, as they are now. The kernel does it, so that a page which
    /// cannot be read ends the copy and not the program.
    ///
    /// # Errors
    /// Of the copy; how much arrived is not told.
    pub(crate) fn fill_from(&mut self, from: Live) -> Result<(), Errno> {
        assert!(self.here.iter().all(|&here| here), "moved away before");
        from.copy_to_span(self.span)
    }

    /// Moves pages from number `at` on to `place`, over whatever is mapped there.
    ///
    /// # Errors
    /// As [`mapping::relocate`]: after `NoMemory` the place may be unmapped. They are still here then.
    pub(crate) fn put(&mut self, at: usize, place: Live) -> Result<(), MapStop> {
        let pages = place.span().pages();
        let from = self.span.page_run(at, pages);
        let here = &self.here[at..at + pages];
        assert!(here.iter().all(|&here| here), "moved away before");
        // Before the call: should anything panic in between, addresses that may be somebody else's
        // are not unmapped.
        self.here[at..at + pages].fill(false);
        // SAFETY: the place is its owner's by his promise, and its bytes are equal to these, as the
        // caller has seen while nobody could write; `from` is ours, whole, and given up here.
        let moved = unsafe { mapping::relocate(from, place.span().start) };
        if moved.is_err() {
            self.here[at..at + pages].fill(true);
        }
        moved
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        let mut at = 0;
        while at < self.here.len() {
            let left = self.here[at..].iter().take_while(|&&here| here).count();
            if left > 0 {
                // SAFETY: these pages are mapped, ours, and nobody can name them any more.
                drop(unsafe { Mapping::from_span(self.span.page_run(at, left)) });
            }
            at += left.max(1);
        }
    }
}
