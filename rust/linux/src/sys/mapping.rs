//! Mappings: our own, which end when their [`Mapping`] is dropped, and calls on foreign ones.
//!
//! # Departures from what the calls offer
//! Nothing is ever mapped with `MAP_POPULATE`: populating a private writable mapping writes to it,
//! and so gives every merged page its own copy again. [`Advice::PopulateRead`] is the right call.

use super::memfd::Memfd;
use super::process::give_way;
use super::{Call, Errno, Span, checked, outcomes, page_size, to_off};
use std::cell::Cell;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicUsize, Ordering};

outcomes! {
    /// Why memory could not be mapped, moved or given another protection.
    pub(crate) enum MapStop {
        /// No memory for it, too many mappings, or no room in the address space. With `MAP_FIXED`
        /// the old mapping **may be gone** when memory is what was missing.
        NoMemory = ENOMEM,
        /// `mlockall(MCL_FUTURE)` is in force, and `RLIMIT_MEMLOCK` is used up.
        LockLimit = EAGAIN,
        /// Part of the range is sealed.
        Sealed = EPERM,
        /// The range is not what the call can work on (crosses mappings, is not mapped).
        Invalid = EINVAL,
        /// Nothing is mapped at the source.
        Unmapped = EFAULT,
        /// The file may not be mapped like this.
        Denied = EACCES,
    }
}

outcomes! {
    /// Why an advice was not taken.
    pub(crate) enum AdviseStop {
        /// Memory or mappings are used up, or part of the range is not mapped. For
        /// [`Advice::PopulateRead`] and `PopulateWrite` a part may be done.
        NoMemory = ENOMEM,
        /// Not for this kind of memory (locked, sealed, shared, without write permission), or the
        /// kernel does not know the advice.
        Invalid = EINVAL,
        /// Something of the kernel was busy for the moment.
        Busy = EAGAIN,
        /// Sealed.
        Sealed = EPERM,
        /// Reading the page from its backing failed.
        Fault = EFAULT,
        /// The hardware has lost the page.
        Poisoned = EHWPOISON,
    }
}

/// What a mapping lets its threads do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protection {
    /// Nothing.
    None,
    /// Read.
    Read,
    /// Read and write.
    ReadWrite,
}

impl Protection {
    fn bits(self) -> i32 {
        match self {
            Self::None => libc::PROT_NONE,
            Self::Read => libc::PROT_READ,
            Self::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        }
    }
}

/// Whether writes reach the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// A write gets a copy of its own.
    Private,
    /// A write goes to the file.
    Shared,
}

/// Addresses that programs hardly use, for [`Mapping::anonymous_apart`]: 32 TiB above the first 32.
const APART_START: usize = 1 << 45;
const APART_BYTES: usize = 1 << 45;
/// Bytes of them that have been given out, over and over.
static APART: AtomicUsize = AtomicUsize::new(0);

/// How often unmapping is tried.
const UNMAPPING_TRIES: u32 = 16;

macro_rules! advices {
    ($($(#[$meta:meta])* $name:ident = $value:expr, $call:ident;)*) => {
        /// What the kernel is told about a range, by the name of its `MADV_` constant.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Advice { $($(#[$meta])* $name),* }

        impl Advice {
            #[allow(unused_doc_comments, reason = "what decides whether there is a variant does so here")]
            fn number(self) -> i32 {
                match self { $($(#[$meta])* Self::$name => $value),* }
            }

            #[allow(unused_doc_comments, reason = "as above")]
            fn call(self) -> Call {
                match self { $($(#[$meta])* Self::$name => Call::$call),* }
            }
        }
    };
}

advices! {
    /// Throws the pages away; the next touch finds zeroes, or the file.
    DontNeed = libc::MADV_DONTNEED, MadviseDontNeed;
    /// First to go when memory is short. Refused for just the memory for which `DontNeed` is.
    Cold = libc::MADV_COLD, MadviseCold;
    /// Children do not get it.
    DontFork = libc::MADV_DONTFORK, MadviseFork;
    /// Children get it (the default).
    DoFork = libc::MADV_DOFORK, MadviseFork;
    /// Children find zeroes.
    WipeOnFork = libc::MADV_WIPEONFORK, MadviseFork;
    /// Not in core dumps.
    DontDump = libc::MADV_DONTDUMP, MadviseDump;
    /// Huge pages welcome.
    HugePage = libc::MADV_HUGEPAGE, MadviseHuge;
    /// No huge pages.
    NoHugePage = libc::MADV_NOHUGEPAGE, MadviseHuge;
    /// Maps every page for reading.
    PopulateRead = 22, MadvisePopulate;
    /// Maps every page for writing: each gets its own copy.
    PopulateWrite = 23, MadvisePopulate;
    /// Turns the pages into guard pages (Linux 6.13).
    #[cfg(test)]
    GuardInstall = 102, MadviseOther;
}

/// Memory of our own. Unmapped when dropped.
///
/// It may be used from any thread: unlike descriptors, mappings belong to the whole process.
#[derive(Debug)]
pub(crate) struct Mapping {
    span: Span,
}

impl Mapping {
    /// Fresh private memory that reads as zero.
    ///
    /// # Errors
    /// [`MapStop`].
    pub(crate) fn anonymous(len: usize, protection: Protection) -> Result<Self, MapStop> {
        Self::anonymous_at(0, len, protection)
    }

    /// The same, at an address if that is free, or wherever the kernel likes.
    fn anonymous_at(hint: usize, len: usize, protection: Protection) -> Result<Self, MapStop> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: without MAP_FIXED a new mapping takes no room that anything else has.
        unsafe { map(Call::MmapOwn, hint, len, protection, flags, -1, 0) }.map(|span| Self { span })
    }

    /// The same, at addresses that none of these was given before, if there are such, and next to no
    /// other mapping: for pages that will be moved to another place.
    ///
    /// The kernel goes from a page to those who map it by a tree of all mappings that came out of one,
    /// ordered by where they *first* were. Prepared at one address again and again, or beside each other,
    /// a million pages would all be in one tree at the same place, and whoever has to find one of them
    /// (reclaim, compaction, migration, DAMON) would visit a million mappings under their common lock,
    /// for which everybody who maps or unmaps one of them waits.
    ///
    /// # Errors
    /// [`MapStop`].
    pub(crate) fn anonymous_apart(len: usize, protection: Protection) -> Result<Self, MapStop> {
        let taken = len + page_size();
        let next = APART.fetch_add(taken, Ordering::Relaxed) % APART_BYTES;
        // Where this is no address, or taken, the kernel chooses another.
        let hint = APART_START + next / page_size() * page_size();
        Self::anonymous_at(hint, len, protection)
    }

    /// `len` bytes of `file` from `offset` on.
    ///
    /// # Errors
    /// [`MapStop`].
    pub(crate) fn file(
        file: &Memfd,
        offset: u64,
        len: usize,
        protection: Protection,
        sharing: Sharing,
    ) -> Result<Self, MapStop> {
        file.assert_inside(offset, len);
        let flags = match sharing {
            Sharing::Private => libc::MAP_PRIVATE,
            Sharing::Shared => libc::MAP_SHARED,
        };
        // SAFETY: without MAP_FIXED a new mapping takes no room that anything else has.
        let got = unsafe {
            map(
                Call::MmapFile,
                0,
                len,
                protection,
                flags,
                file.raw(),
                offset,
            )
        };
        got.map(|span| Self { span })
    }

    /// Where it lies.
    pub(crate) fn span(&self) -> Span {
        self.span
    }

    /// Its length in bytes.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.span.len
    }

    /// Writes a number at `offset`.
    ///
    /// # Panics
    /// When that is not inside, or not at a multiple of 8.
    pub(crate) fn write_u64(&self, offset: usize, value: u64) {
        let at = self.span.part(offset, 8);
        assert!(
            at.start.is_multiple_of(8),
            "a number is written at a multiple of 8, not {offset}"
        );
        #[allow(clippy::cast_ptr_alignment, reason = "just checked")]
        let place = at.as_mut_ptr().cast::<u64>();
        // SAFETY: inside our own mapping, aligned (both just checked), and no reference points
        // into it. Where it is not writable the program ends here, as for any such store.
        unsafe { place.write_volatile(value) };
    }

    /// Reads a number at `offset`.
    ///
    /// # Panics
    /// When that is not inside, or not at a multiple of 8.
    pub(crate) fn read_u64(&self, offset: usize) -> u64 {
        let at = self.span.part(offset, 8);
        assert!(
            at.start.is_multiple_of(8),
            "a number is read at a multiple of 8, not {offset}"
        );
        #[allow(clippy::cast_ptr_alignment, reason = "just checked")]
        let place = at.as_ptr().cast::<u64>();
        // SAFETY: inside our own mapping and aligned (both just checked). Where it is not readable, or
        // in a child that did not get it, the program ends here, as for any such load.
        unsafe { place.read_volatile() }
    }

    /// Makes `len` bytes from `offset` on zero by writing them.
    ///
    /// # Panics
    /// When that is not inside; the same holds for the next three.
    pub(crate) fn zero(&self, offset: usize, len: usize) {
        let at = self.span.part(offset, len).as_mut_ptr();
        // SAFETY: inside our own mapping (just checked), which has no references into it. Where it is
        // not writable the program ends here, as for any such store.
        unsafe { at.write_bytes(0, len) };
    }

    /// Writes `bytes` at `offset`.
    pub(crate) fn copy_in(&self, offset: usize, bytes: &[u8]) {
        let at = self.span.part(offset, bytes.len()).as_mut_ptr();
        // SAFETY: as for `zero`. A slice lies elsewhere, since no reference points into a mapping.
        unsafe { bytes.as_ptr().copy_to_nonoverlapping(at, bytes.len()) };
    }

    /// Reads what is at `offset`.
    pub(crate) fn copy_out(&self, offset: usize, into: &mut [u8]) {
        let at = self.span.part(offset, into.len()).as_ptr();
        // SAFETY: inside our own mapping (just checked) and readable, or the program ends here.
        unsafe { super::memory::copy(at, into) };
    }

    /// Copies `len` bytes of `from`, beginning at `there`, to `offset`. The two places may overlap.
    pub(crate) fn copy_from(&self, offset: usize, from: &Mapping, there: usize, len: usize) {
        let to = self.span.part(offset, len).as_mut_ptr();
        let from = from.span.part(there, len).as_ptr();
        // SAFETY: both are inside mappings of our own (just checked), without references into them.
        unsafe { from.copy_to(to, len) };
    }

    /// Maps fresh zeroes over `part` of it, whatever was mapped there.
    ///
    /// # Errors
    /// [`MapStop`]; it is as it was, unless memory was what was missing.
    pub(crate) fn blank(&self, part: Span) -> Result<(), MapStop> {
        assert!(
            self.span.covers(part),
            "{part} is not inside the mapping {}",
            self.span
        );
        loop {
            // SAFETY: ours (just checked), mapped while `self` lives, and its owner wants to lose the
            // bytes.
            match unsafe { map_fresh(part) } {
                // The kernel has taken the old mapping away, and nothing but trying again fills the hole.
                Err(MapStop::NoMemory) if !is_mapped(part) => give_way(),
                other => return other,
            }
        }
    }

    /// Gives the addresses up without unmapping them: they belong to somebody else from here on.
    pub(crate) fn into_span(self) -> Span {
        let span = self.span;
        std::mem::forget(self);
        span
    }

    /// Takes over `span`.
    ///
    /// # Safety
    /// The whole of it is mapped, nobody else unmaps it, and nobody relies on its bytes.
    pub(crate) unsafe fn from_span(span: Span) -> Self {
        Self { span }
    }

    /// Tells the kernel about all of it.
    ///
    /// # Errors
    /// [`AdviseStop`].
    pub(crate) fn advise(&self, advice: Advice) -> Result<(), AdviseStop> {
        self.advise_part(self.span, advice)
    }

    /// Tells the kernel about `part`, which lies inside.
    ///
    /// # Errors
    /// [`AdviseStop`].
    pub(crate) fn advise_part(&self, part: Span, advice: Advice) -> Result<(), AdviseStop> {
        assert!(
            self.span.covers(part),
            "{part} is not inside the mapping {}",
            self.span
        );
        // SAFETY: the range is ours (just checked), stays mapped while `self` lives, and is only
        // ever reached through raw pointers, so bytes that vanish surprise no reference.
        unsafe { advise(part, advice) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.span.is_empty() {
            return;
        }
        for _ in 0..UNMAPPING_TRIES {
            // SAFETY: the range is ours alone, and nobody can name it through `self` any more.
            if unsafe { unmap(self.span) }.is_ok() {
                return;
            }
            give_way();
        }
        // It can fail for want of memory. The addresses stay taken then, which wastes them (and, where
        // it is a fork canary, the frames that die later), and harms nobody.
    }
}

/// A page of our own on which the process's mmap lock can be taken.
#[derive(Debug)]
pub(crate) struct MmapLock {
    page: Mapping,
    /// Which advice comes next: always another than the last, so that there is something to do.
    toggle: Cell<bool>,
}

impl MmapLock {
    /// Maps the page.
    ///
    /// # Errors
    /// [`MapStop`].
    pub(crate) fn new() -> Result<Self, MapStop> {
        let page = Mapping::anonymous(page_size(), Protection::None)?;
        Ok(Self {
            page,
            toggle: Cell::new(false),
        })
    }

    /// Takes the process's mmap lock for writing and gives it back: whoever already held it for
    /// reading (a debugger, a writer to `/proc/PID/mem`, which reach pages past every barrier) is
    /// finished when this returns.
    ///
    /// # Errors
    /// [`AdviseStop`]: the wait did not take place.
    pub(crate) fn wait_for_readers(&self) -> Result<(), AdviseStop> {
        let advice = if self.toggle.replace(!self.toggle.get()) {
            Advice::DoFork
        } else {
            Advice::DontFork
        };
        self.page.advise(advice)
    }
}

/// Maps `file` from `offset` over `over`, privately and writable: a write gets a copy of its own.
///
/// # Errors
/// [`MapStop`]. After `NoMemory` the old mapping may be gone, unless a mapping of the same size and
/// kind was made and unmapped right before.
///
/// # Safety
/// Whatever is mapped at `over` is lost. The caller has its bytes, keeps others from mapping there
/// during the call, and answers to all who use that memory for what they read afterwards.
pub(crate) unsafe fn map_frames(over: Span, file: &Memfd, offset: u64) -> Result<(), MapStop> {
    file.assert_inside(offset, over.len);
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
    // SAFETY: the caller's promise is what MAP_FIXED demands. The file backs every page: its size
    // is sealed, and the range lies inside (just checked), so no later access can raise SIGBUS.
    unsafe {
        map(
            Call::MmapFrames,
            over.start,
            over.len,
            Protection::ReadWrite,
            flags,
            file.raw(),
            offset,
        )
    }
    .map(drop)
}

/// Maps fresh private zeroes over `over`.
///
/// # Errors
/// [`MapStop`], as [`map_frames`].
///
/// # Safety
/// As [`map_frames`].
pub(crate) unsafe fn map_fresh(over: Span) -> Result<(), MapStop> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    let rw = Protection::ReadWrite;
    // SAFETY: the caller's promise is what MAP_FIXED demands.
    unsafe { map(Call::MmapFresh, over.start, over.len, rw, flags, -1, 0) }.map(drop)
}

/// Unmaps `span`.
///
/// # Errors
/// [`MapStop`].
///
/// # Safety
/// Nobody uses that memory any more.
pub(crate) unsafe fn unmap(span: Span) -> Result<(), MapStop> {
    checked(Call::Munmap, || {
        // SAFETY: the caller's promise.
        i64::from(unsafe { libc::munmap(span.as_void(), span.len) })
    })
    .map(drop)
    .map_err(MapStop::decode)
}

/// Sets what threads may do with `span`.
///
/// # Errors
/// [`MapStop`].
///
/// # Safety
/// All who use that memory can live with the new protection.
#[cfg(test)]
pub(crate) unsafe fn protect(span: Span, protection: Protection) -> Result<(), MapStop> {
    checked(Call::Mprotect, || {
        // SAFETY: the caller's promise.
        i64::from(unsafe { libc::mprotect(span.as_void(), span.len, protection.bits()) })
    })
    .map(drop)
    .map_err(MapStop::decode)
}

/// Moves the mappings of `from` to `to`, over whatever is mapped there; `from` is unmapped then.
///
/// # Errors
/// [`MapStop`]. What was mapped at `to` may be gone.
///
/// # Safety
/// As [`map_frames`] for `to`, and as [`unmap`] for `from`.
pub(crate) unsafe fn relocate(from: Span, to: usize) -> Result<(), MapStop> {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let to = Span::new(to, from.len);
    checked(Call::Mremap, || {
        // SAFETY: the caller's promise covers what goes at `to` and what goes away at `from`.
        let got = unsafe { libc::mremap(from.as_void(), from.len, from.len, flags, to.as_void()) };
        got as i64
    })
    .map(drop)
    .map_err(MapStop::decode)
}

/// Moves the pages of `from` to `to`, over whatever is mapped there; `from` stays mapped, and is empty
/// then. What lies at `to` is a mapping of the kind of `from`.
///
/// # Errors
/// [`MapStop`]. What was mapped at `to` may be gone.
///
/// # Safety
/// As [`map_frames`] for `to`; nobody relies on the bytes at `from`.
pub(crate) unsafe fn relocate_pages(from: Span, to: usize) -> Result<(), MapStop> {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
    let to = Span::new(to, from.len);
    checked(Call::MremapPages, || {
        // SAFETY: the caller's promise.
        let got = unsafe { libc::mremap(from.as_void(), from.len, from.len, flags, to.as_void()) };
        got as i64
    })
    .map(drop)
    .map_err(MapStop::decode)
}

/// Whether anything is mapped at the first page of `span`. What cannot be found out counts as mapped.
pub(crate) fn is_mapped(span: Span) -> bool {
    let mut resident = 0_u8;
    let got = checked(Call::Mincore, || {
        let into = &raw mut resident;
        // SAFETY: the kernel writes one byte, for one page, to ours; it touches nothing else.
        i64::from(unsafe { libc::mincore(span.as_void(), page_size(), into) })
    });
    got != Err(Errno(libc::ENOMEM))
}

/// Tells the kernel about foreign memory.
///
/// # Errors
/// [`AdviseStop`].
///
/// # Safety
/// All who use that memory can live with what the advice does to its bytes and attributes, and it
/// stays mapped during the call. ([`Advice::PopulateRead`] and `PopulateWrite` change no byte.)
pub(crate) unsafe fn advise(span: Span, advice: Advice) -> Result<(), AdviseStop> {
    checked(advice.call(), || {
        // SAFETY: the caller's promise.
        i64::from(unsafe { libc::madvise(span.as_void(), span.len, advice.number()) })
    })
    .map(drop)
    .map_err(AdviseStop::decode)
}

/// # Safety
/// With `MAP_FIXED` in `flags`, what is mapped at `start` may be lost.
unsafe fn map(
    call: Call,
    start: usize,
    len: usize,
    protection: Protection,
    flags: i32,
    file: RawFd,
    offset: u64,
) -> Result<Span, MapStop> {
    let hint = Span { start, len };
    let offset = to_off(offset);
    let got = checked(call, || {
        // SAFETY: the caller's promise. MAP_FAILED is -1, as `checked` expects.
        let got =
            unsafe { libc::mmap(hint.as_void(), len, protection.bits(), flags, file, offset) };
        got as i64
    });
    match got {
        Ok(at) => Ok(Span::new(super::to_usize(at), len)),
        Err(errno) => Err(MapStop::decode(errno)),
    }
}

/// Only for tests: kinds of memory that the engine meets but never makes.
#[cfg(test)]
pub(crate) mod kinds {
    use super::{Call, Span, checked, unmap};
    use crate::sys::Errno;

    /// Private memory with extra `mmap` flags.
    pub(crate) fn with_flags(len: usize, protection: i32, flags: i32) -> Result<Span, Errno> {
        checked(Call::MmapKind, || {
            // SAFETY: without MAP_FIXED a new mapping takes no room that anything else has.
            let got = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
            got as i64
        })
        .map(|at| Span::new(crate::sys::to_usize(at), len))
    }

    /// `mlock`.
    pub(crate) fn lock(span: Span) {
        // SAFETY: locking changes no byte.
        assert_eq!(unsafe { libc::mlock(span.as_void(), span.len) }, 0);
    }

    /// `mseal`; false where the kernel does not have it.
    pub(crate) fn seal(span: Span) -> bool {
        // SAFETY: the tests seal only memory that they leave mapped for good.
        unsafe { libc::syscall(libc::SYS_mseal, span.start, span.len, 0) == 0 }
    }

    /// A memory policy of its own: prefer the local node.
    pub(crate) fn set_policy(span: Span) -> bool {
        const MPOL_INTERLEAVE: i32 = 3;
        let nodes: libc::c_ulong = 1;
        // SAFETY: a policy changes no byte; `nodes` is a mask of 64 bits, as told.
        let got = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                span.start,
                span.len,
                MPOL_INTERLEAVE,
                &nodes,
                64,
                0,
            )
        };
        got == 0
    }

    /// Unmaps it.
    pub(crate) fn unmap_all(span: Span) {
        // SAFETY: the tests unmap only what they mapped.
        unsafe { unmap(span) }.expect("what was mapped can be unmapped");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::memory;

    fn read(at: Span) -> u8 {
        let mut byte = [0];
        // SAFETY: the tests ask only for memory that they have mapped.
        unsafe { memory::copy(at.as_ptr(), &mut byte) };
        byte[0]
    }

    fn write(at: Span, value: u8) {
        // SAFETY: the tests write only to memory that they have mapped, and hold no reference.
        unsafe { at.as_mut_ptr().write_volatile(value) };
    }

    /// Goal: memory that is moved to its place leaves no common place of birth behind, where the kernel
    /// would look for a million pages at once. Method: as when un-merging, one after the other, each gone
    /// before the next is made; the kernel gave out the same address again and again.
    #[test]
    fn memory_to_be_moved_is_never_at_or_beside_an_address_of_before() {
        let page = page_size();
        let mut before: Vec<Span> = Vec::new();
        for pages in [1, 1, 3, 1, 2, 1] {
            let memory = Mapping::anonymous_apart(pages * page, Protection::ReadWrite).unwrap();
            let span = memory.span();
            let wider = Span::new(span.start - page, span.len + 2 * page);
            assert!(
                before.iter().all(|other| !other.overlaps(wider)),
                "{span:?} {before:?}"
            );
            before.push(span);
        }
    }

    #[test]
    fn relocate_moves_the_bytes_and_leaves_a_hole() {
        let page = page_size();
        let from = Mapping::anonymous(page, Protection::ReadWrite).unwrap();
        let to = Mapping::anonymous(page, Protection::ReadWrite).unwrap();
        write(from.span(), 9);
        let hole = from.into_span();
        // SAFETY: both places are this test's own, and `from` has no owner any more.
        unsafe { relocate(hole, to.span().start) }.unwrap();
        assert_eq!(read(to.span()), 9);
        // SAFETY: nothing is mapped there; the call can only say so.
        let got = unsafe { advise(hole, Advice::PopulateRead) };
        assert_eq!(got, Err(AdviseStop::NoMemory));
    }

    #[test]
    fn anonymous_memory_reads_zero_and_keeps_what_is_written() {
        let memory = Mapping::anonymous(3 * page_size(), Protection::ReadWrite).unwrap();
        assert_eq!(read(memory.span()), 0);
        write(memory.span(), 7);
        assert_eq!(read(memory.span()), 7);
        memory.advise(Advice::DontNeed).unwrap();
        assert_eq!(read(memory.span()), 0);
    }

    #[test]
    fn frame_mapped_over_a_page_shows_the_file_and_a_write_stays_private() {
        let page = page_size();
        let frames = Memfd::create(c"test", 4 * page as u64).unwrap();
        let source = Mapping::anonymous(page, Protection::ReadWrite).unwrap();
        write(source.span(), 42);
        // SAFETY: `source` is mapped.
        let wrote = unsafe { frames.write_from(source.span(), 2 * page as u64) };
        assert!(wrote.is_complete());
        let place = Mapping::anonymous(2 * page, Protection::ReadWrite).unwrap();
        for run in [place.span().page_run(0, 1), place.span().page_run(1, 1)] {
            // SAFETY: the place is this test's own.
            unsafe { map_frames(run, &frames, 2 * page as u64) }.unwrap();
        }
        assert_eq!(read(place.span().page_run(1, 1)), 42);
        write(place.span(), 43);
        assert_eq!(read(place.span()), 43);
        assert_eq!(read(place.span().page_run(1, 1)), 42);
        // SAFETY: as above.
        unsafe { map_fresh(place.span()) }.unwrap();
        assert_eq!(read(place.span()), 0);
    }

    #[test]
    #[should_panic(expected = "beyond")]
    fn frame_beyond_the_file_panics_instead_of_mapping_a_bus_error() {
        let page = page_size();
        let frames = Memfd::create(c"test", page as u64).unwrap();
        let _ = Mapping::file(&frames, 0, 2 * page, Protection::Read, Sharing::Private);
    }

    #[test]
    fn populate_write_of_read_only_memory_is_refused_by_name() {
        let memory = Mapping::anonymous(page_size(), Protection::Read).unwrap();
        assert_eq!(
            memory.advise(Advice::PopulateWrite),
            Err(AdviseStop::Invalid)
        );
        memory.advise(Advice::PopulateRead).unwrap();
    }

    #[test]
    fn sealed_memory_cannot_be_mapped_over_and_keeps_its_bytes() {
        let memory = Mapping::anonymous(page_size(), Protection::ReadWrite).unwrap();
        write(memory.span(), 5);
        let span = memory.into_span(); // sealed memory cannot be unmapped either
        if !kinds::seal(span) {
            return; // a kernel older than 6.10 has nothing to be tested
        }
        // SAFETY: the place is this test's own.
        let got = unsafe { map_fresh(span) };
        assert_eq!(got, Err(MapStop::Sealed));
        assert_eq!(read(span), 5);
    }

    #[test]
    fn mmap_lock_can_be_taken_again_and_again() {
        let lock = MmapLock::new().unwrap();
        for _ in 0..3 {
            lock.wait_for_readers().unwrap();
        }
    }

    #[test]
    fn protection_of_foreign_memory_can_be_changed_there_and_back() {
        let memory = Mapping::anonymous(page_size(), Protection::ReadWrite).unwrap();
        write(memory.span(), 3);
        // SAFETY: the memory is this test's own.
        unsafe { protect(memory.span(), Protection::None) }.unwrap();
        // SAFETY: as above.
        unsafe { protect(memory.span(), Protection::ReadWrite) }.unwrap();
        assert_eq!(read(memory.span()), 3);
    }

    #[test]
    fn errno_of_a_wrong_address_is_invalid() {
        // SAFETY: an address that is no page border is refused before anything is done.
        let got = unsafe { unmap(Span::new(1, page_size())) };
        assert_eq!(got, Err(MapStop::Invalid));
    }
}
