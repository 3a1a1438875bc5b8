//! The user's memory, with its owner's promise as a value.
//!
//! [`Live`] is made in one place, where a caller registers memory and promises to keep it mapped.
//! Whoever holds one may do to that memory what a merge needs, through safe methods that answer
//! for the floor's demands with that promise, and with two rules of this module:
//!
//! * A part of it never reaches beyond it.
//! * What replaces its pages (frames, fresh zero memory, moved pages) is only ever asked for by a
//!   window that has compared the bytes, or by the owner's own wish to lose them.
//!
//! That readers elsewhere see no difference is the windows' duty, not this module's; what is safe
//! here in Rust's sense is that no mapping but the promised one is touched.

use super::mapping::{self, Advice, AdviseStop, MapStop, Mapping};
use super::memfd::{Memfd, WriteStop};
use super::uffd::{FillStop, MoveStop, Userfaultfd, Wake};
use super::{Call, Errno, Progress, Span, asked, checked, memory, to_usize};
use crate::hash::PageHasher;
use pagemerge_core::Digest;
use std::cmp::Ordering;

/// How often the kernel is asked to let children have a page.
const INHERITING_TRIES: u32 = 100;

/// Memory that stays mapped until its region is dropped, by the promise of whoever registered it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Live(Span);

impl Live {
    /// # Safety
    /// All of `span` is private anonymous memory (or frames that this library mapped over it), and
    /// stays mapped, at this place and for this owner, for as long as any copy of the value is
    /// used.
    pub(crate) unsafe fn promised(span: Span) -> Self {
        assert!(span.is_page_aligned(), "{span} is not made of whole pages");
        Self(span)
    }

    /// Memory of our own that is lent. Whoever makes a region of it holds `memory` until the region has
    /// ended.
    pub(crate) fn lent(memory: &std::sync::Arc<Mapping>) -> Self {
        // SAFETY: private anonymous memory, mapped by `Mapping::anonymous` for an extent, and unmapped by
        // the last of its holders alone, one of which is the maker of the region (`engine::Lot`).
        unsafe { Self::promised(memory.span()) }
    }

    pub(crate) fn span(self) -> Span {
        self.0
    }

    /// `len` bytes of it from `offset` on.
    ///
    /// # Panics
    /// When that is not inside.
    pub(crate) fn part(self, offset: usize, len: usize) -> Self {
        Self(self.0.part(offset, len))
    }

    /// From the beginning of this one to the end of `last`, which lies right behind it or is it: the
    /// promise holds for both, and there is nothing between them.
    ///
    /// # Panics
    /// When they are not in this order.
    pub(crate) fn joined(self, last: Self) -> Self {
        Self(Span::between(self.0.start, last.0.end()))
    }

    /// A pointer for reading, by [`memory`] and the hash.
    pub(crate) fn as_ptr(self) -> *const u8 {
        self.0.as_ptr()
    }

    /// The digest of this page; `next` is the one that will be asked for next, if that is known.
    pub(crate) fn digest(self, hasher: &PageHasher, next: Option<Self>) -> Digest {
        // SAFETY: a page, aligned as such, and mapped by the promise; the caller has seen that it is
        // readable (see `crate::space`).
        unsafe { hasher.digest(self.as_ptr(), next.map(Self::as_ptr)) }
    }

    /// The NUMA node of its first page, if the kernel knows.
    pub(crate) fn numa_node(self) -> Option<u16> {
        let page = self.0.as_mut_ptr();
        let mut node: i32 = -1;
        let (pages, nodes) = ((&raw const page), (&raw mut node));
        let got = checked(Call::MovePages, || {
            // SAFETY: without a list of nodes the call moves nothing: it reads one address and
            // writes one number, both ours.
            unsafe {
                libc::syscall(
                    libc::SYS_move_pages,
                    0,
                    1,
                    pages,
                    std::ptr::null::<i32>(),
                    nodes,
                    0,
                )
            }
        });
        got.ok().and_then(|_| u16::try_from(node).ok())
    }

    /// Whether all of it is zero.
    pub(crate) fn is_zero(self) -> bool {
        // SAFETY: mapped by the promise; the caller has seen that it is readable (see
        // `crate::space`), and whoever takes that away meanwhile ends the program himself.
        unsafe { memory::is_zero(self.as_ptr(), self.0.len) }
    }

    /// Whether its bytes are those of `view` at `offset`.
    pub(crate) fn same_as(self, view: &Mapping, offset: usize) -> bool {
        let view = view.span().part(offset, self.0.len);
        // SAFETY: the first is mapped by the promise, the second while `view` is borrowed.
        unsafe { memory::equal(self.as_ptr(), view.as_ptr(), self.0.len) }
    }

    /// Byte order of two pages.
    pub(crate) fn compare(self, other: Self) -> Ordering {
        assert_eq!(self.0.len, other.0.len, "two pages are of one size");
        // SAFETY: both are mapped by the promise.
        unsafe { memory::compare(self.as_ptr(), other.as_ptr(), self.0.len) }
    }

    /// Byte order of a page and a view of a frame.
    pub(crate) fn compare_with(self, view: &Mapping, offset: usize) -> Ordering {
        let view = view.span().part(offset, self.0.len);
        // SAFETY: the first is mapped by the promise, the second while `view` is borrowed.
        unsafe { memory::compare(self.as_ptr(), view.as_ptr(), self.0.len) }
    }

    /// Writes its bytes, as they are now, to fresh places of a frame store.
    pub(crate) fn write_to(self, file: &Memfd, offset: u64) -> Progress<WriteStop> {
        // SAFETY: mapped by the promise.
        unsafe { file.write_from(self.0, offset) }
    }

    /// Copies its bytes, as they are now, to a view of fresh places. The kernel does it, so that a
    /// page which cannot be read ends the copy and not the program.
    ///
    /// # Errors
    /// Of the copy; how much arrived is not told.
    pub(crate) fn copy_to(self, view: &Mapping, offset: usize) -> Result<(), Errno> {
        self.copy_to_span(view.span().part(offset, self.0.len))
    }

    /// The same, to memory of our own that nobody else uses.
    pub(super) fn copy_to_span(self, to: Span) -> Result<(), Errno> {
        assert_eq!(to.len, self.0.len, "a copy is as long as what it is of");
        let local = libc::iovec {
            iov_base: to.as_mut_ptr().cast(),
            iov_len: to.len,
        };
        let remote = libc::iovec {
            iov_base: self.0.as_mut_ptr().cast(),
            iov_len: asked(Call::ProcessVmReadv, self.0.len, 1),
        };
        let me = i32::try_from(std::process::id()).unwrap_or(0);
        let (to, from) = (&raw const local, &raw const remote);
        let got = checked(Call::ProcessVmReadv, || {
            // SAFETY: the kernel reads our own process's memory and copes with what is not
            // readable; it writes memory that our caller (a view, or staged pages) answers for, and
            // that no reference points to.
            let got = unsafe { libc::process_vm_readv(me, to, 1, from, 1, 0) };
            got as i64
        })?;
        if to_usize(got) == self.0.len {
            Ok(())
        } else {
            Err(Errno(libc::EFAULT))
        }
    }

    /// Moves its pages to staging.
    pub(crate) fn move_out(
        self,
        uffd: &Userfaultfd,
        staging: &Mapping,
        offset: usize,
    ) -> Progress<MoveStop> {
        let to = staging.span().part(offset, self.0.len);
        // SAFETY: the window has registered this run for missing pages, so whoever touches it
        // waits; staging is ours, and empty.
        unsafe { uffd.move_pages(self.0, to.start, Wake::Later) }
    }

    /// Moves its pages back from staging.
    pub(crate) fn move_back(
        self,
        uffd: &Userfaultfd,
        staging: &Mapping,
        offset: usize,
    ) -> Progress<MoveStop> {
        let from = staging.span().part(offset, self.0.len);
        // SAFETY: nobody uses staging; at their own place the pages appear to threads that wait
        // for them.
        unsafe { uffd.move_pages(from, self.0.start, Wake::Later) }
    }

    /// Fills its pages, which are absent, with a copy of staging.
    pub(crate) fn copy_back(
        self,
        uffd: &Userfaultfd,
        staging: &Mapping,
        offset: usize,
    ) -> Progress<FillStop> {
        let from = staging.span().part(offset, self.0.len);
        // SAFETY: staging is mapped while borrowed; the bytes are those that belong here.
        unsafe { uffd.copy(from, self.0.start, false, Wake::Later) }
    }

    /// Moves its pages back from staging without any userfaultfd: where that may not be called any
    /// more. They lie in a mapping of staging's kind then, which children get as they got the old one.
    ///
    /// # Errors
    /// As [`mapping::relocate_pages`].
    pub(crate) fn carry_back(self, staging: &Mapping, offset: usize) -> Result<(), MapStop> {
        let from = staging.span().part(offset, self.0.len);
        // SAFETY: the place is empty, and promised to be its owner's; nobody uses staging, which stays
        // mapped.
        unsafe { mapping::relocate_pages(from, self.0.start) }?;
        // It was the whole of a mapping a moment ago, so this needs no room. A child without the page
        // would end where it touches it.
        for _ in 0..INHERITING_TRIES {
            // SAFETY: changes no byte.
            if unsafe { mapping::advise(self.0, Advice::DoFork) }.is_ok() {
                break;
            }
        }
        Ok(())
    }

    /// Installs the zero page in its pages, which are absent.
    pub(crate) fn fill_zero(self, uffd: &Userfaultfd) -> Progress<FillStop> {
        // SAFETY: the window has seen that the bytes which belong here are zero.
        unsafe { uffd.zeropage(self.0, Wake::Later) }
    }

    /// Maps frames over it.
    ///
    /// # Errors
    /// As [`mapping::map_frames`].
    pub(crate) fn map_frames(self, file: &Memfd, offset: u64) -> Result<(), MapStop> {
        // SAFETY: the range is promised to be what the window opened; the bytes are equal.
        unsafe { mapping::map_frames(self.0, file, offset) }
    }

    /// Maps fresh memory over it, which reads as zero.
    ///
    /// # Errors
    /// As [`mapping::map_fresh`].
    pub(crate) fn map_fresh(self) -> Result<(), MapStop> {
        // SAFETY: its bytes are zero, or its owner wants to lose them.
        unsafe { mapping::map_fresh(self.0) }
    }

    /// Gives every page of it that shows a frame or the zero page a copy of its own, in place.
    ///
    /// # Errors
    /// As [`mapping::advise`].
    pub(crate) fn populate_write(self) -> Result<(), AdviseStop> {
        // SAFETY: changes no byte.
        unsafe { mapping::advise(self.0, Advice::PopulateWrite) }
    }

    /// Maps what is there for reading.
    ///
    /// # Errors
    /// As [`mapping::advise`].
    pub(crate) fn populate_read(self) -> Result<(), AdviseStop> {
        // SAFETY: changes no byte.
        unsafe { mapping::advise(self.0, Advice::PopulateRead) }
    }

    /// The owner's wish to lose these bytes.
    ///
    /// # Errors
    /// As [`mapping::advise`].
    pub(crate) fn dont_need(self) -> Result<(), AdviseStop> {
        // SAFETY: the owner asked for it.
        unsafe { mapping::advise(self.0, Advice::DontNeed) }
    }

    /// Whether the kernel would refuse [`dont_need`](Self::dont_need) for some of it, as for locked
    /// memory: told by an advice that does nothing to memory which is about to go. (Kernels that do not
    /// know the advice say so of all memory.)
    pub(crate) fn may_refuse_dont_need(self) -> bool {
        // SAFETY: changes no byte.
        let told = unsafe { mapping::advise(self.0, Advice::Cold) };
        told == Err(AdviseStop::Invalid)
    }

    /// Carries the owner's choice about huge pages over to a new mapping.
    ///
    /// # Errors
    /// As [`mapping::advise`].
    pub(crate) fn advise_huge(self, huge: bool) -> Result<(), AdviseStop> {
        let advice = if huge {
            Advice::HugePage
        } else {
            Advice::NoHugePage
        };
        // SAFETY: changes no byte.
        unsafe { mapping::advise(self.0, advice) }
    }
}

/// The digest of a page of a mapping of our own.
pub(crate) fn digest(a: (&Mapping, usize), hasher: &PageHasher) -> Digest {
    let page = a.0.span().part(a.1, super::page_size());
    // SAFETY: mapped while borrowed; its start is the start of a page.
    unsafe { hasher.digest(page.as_ptr(), None) }
}

/// Byte order of `len` bytes of two mappings of our own.
pub(crate) fn order(a: (&Mapping, usize), b: (&Mapping, usize), len: usize) -> Ordering {
    let (a, b) = (a.0.span().part(a.1, len), b.0.span().part(b.1, len));
    // SAFETY: both are mapped while borrowed.
    unsafe { memory::compare(a.as_ptr(), b.as_ptr(), len) }
}

/// Whether `len` bytes of two mappings of our own are equal.
pub(crate) fn same(a: (&Mapping, usize), b: (&Mapping, usize), len: usize) -> bool {
    let (a, b) = (a.0.span().part(a.1, len), b.0.span().part(b.1, len));
    // SAFETY: both are mapped while borrowed.
    unsafe { memory::equal(a.as_ptr(), b.as_ptr(), len) }
}

/// Whether `len` bytes of a mapping of our own are zero.
pub(crate) fn zero(a: (&Mapping, usize), len: usize) -> bool {
    let a = a.0.span().part(a.1, len);
    // SAFETY: mapped while borrowed.
    unsafe { memory::is_zero(a.as_ptr(), len) }
}
