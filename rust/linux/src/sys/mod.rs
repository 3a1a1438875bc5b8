//! The floor: every system call of this crate, and every look at live memory.
//!
//! This is the crate's only place with `unsafe`. What lies above it works with names: the kernel's
//! error numbers are turned into enums here, once, and no caller ever looks at a number.
//!
//! # What holds here
//! * **Nothing that a merge window calls allocates, locks or logs**: registering, moving, copying,
//!   zeroing, protecting, waking, advising, mapping, writing frames, and looking up page states.
//!   [`Errno`] is a number until somebody prints it.
//! * **Descriptors stay on their thread.** The merging thread has a descriptor table of its own
//!   (see [`process::own_descriptor_table`]), so a number means another file elsewhere. Everything
//!   that owns a descriptor is neither `Send` nor `Sync`.
//! * **Foreign memory is a [`Span`]**, a plain pair of numbers without a promise. Functions that
//!   change such memory are `unsafe`, and say who keeps it mapped.
//! * **No Rust reference points into mapped memory**, ours or foreign. It is read through
//!   [`memory`] and written by the kernel or through raw pointers.
//!
//! With the feature `inject`, any call can be made to fail on purpose: see `inject.rs`.

#![allow(unsafe_code)]

pub(crate) mod bare;
pub(crate) mod canary;
pub(crate) mod files;
#[cfg(feature = "inject")]
pub mod inject;
pub(crate) mod kept;
pub(crate) mod leaked;
pub(crate) mod live;
pub(crate) mod mapping;
pub(crate) mod memfd;
pub(crate) mod memory;
pub(crate) mod pagemap;
pub(crate) mod phase;
pub(crate) mod process;
pub(crate) mod procmap;
pub(crate) mod sparse;
pub(crate) mod staged;
pub(crate) mod thread;
pub(crate) mod uffd;

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes in a page of this machine.
pub(crate) fn page_size() -> usize {
    static CACHED: AtomicUsize = AtomicUsize::new(0);
    let known = CACHED.load(Ordering::Relaxed);
    if known != 0 {
        return known;
    }
    // SAFETY: sysconf reads a constant of the system; any name may be asked.
    let told = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    let told = usize::try_from(told).expect("the kernel tells every process its page size");
    assert!(
        told.is_power_of_two(),
        "the page size {told} is not a power of two"
    );
    CACHED.store(told, Ordering::Relaxed);
    told
}

/// A range of addresses: numbers only. That it is mapped, and stays so, is somebody else's promise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Span {
    /// The first address.
    pub(crate) start: usize,
    /// Bytes.
    pub(crate) len: usize,
}

impl Span {
    /// `len` bytes from `start`.
    ///
    /// # Panics
    /// When the range would end beyond the address space.
    pub(crate) const fn new(start: usize, len: usize) -> Self {
        assert!(
            start.checked_add(len).is_some(),
            "a span ends beyond the address space"
        );
        Self { start, len }
    }

    /// From `start` up to and without `end`.
    ///
    /// # Panics
    /// When `end` lies before `start`.
    pub(crate) const fn between(start: usize, end: usize) -> Self {
        assert!(start <= end, "a span ends before it starts");
        Self {
            start,
            len: end - start,
        }
    }

    /// The address after the last one.
    pub(crate) const fn end(self) -> usize {
        self.start + self.len
    }

    /// Whether it holds no address.
    pub(crate) const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Whole pages in it, provided that it begins at a page.
    pub(crate) fn pages(self) -> usize {
        self.len / page_size()
    }

    /// Whether both ends are at page borders.
    pub(crate) fn is_page_aligned(self) -> bool {
        (self.start | self.len).is_multiple_of(page_size())
    }

    /// Whether `addr` lies in it.
    pub(crate) const fn contains(self, addr: usize) -> bool {
        addr >= self.start && addr < self.end()
    }

    /// Whether all of `other` lies in it.
    pub(crate) const fn covers(self, other: Span) -> bool {
        other.start >= self.start && other.end() <= self.end()
    }

    /// Whether the two have an address in common.
    pub(crate) const fn overlaps(self, other: Span) -> bool {
        self.start < other.end() && other.start < self.end() && self.len != 0 && other.len != 0
    }

    /// The addresses that both have, or `None`.
    pub(crate) fn intersection(self, other: Span) -> Option<Span> {
        let (start, end) = (self.start.max(other.start), self.end().min(other.end()));
        (start < end).then(|| Span::between(start, end))
    }

    /// `len` bytes of it from `offset` on.
    ///
    /// # Panics
    /// When that is not inside.
    pub(crate) const fn part(self, offset: usize, len: usize) -> Span {
        assert!(
            offset <= self.len && len <= self.len - offset,
            "a part reaches beyond its span"
        );
        Span {
            start: self.start + offset,
            len,
        }
    }

    /// `pages` pages of it from page number `first` on.
    ///
    /// # Panics
    /// When that is not inside.
    pub(crate) fn page_run(self, first: usize, pages: usize) -> Span {
        self.part(first * page_size(), pages * page_size())
    }

    /// The largest span of whole pages inside, possibly empty.
    pub(crate) fn whole_pages(self) -> Span {
        let mask = page_size() - 1;
        let start = match self.start.checked_add(mask) {
            Some(up) => up & !mask,
            None => {
                return Span {
                    start: self.start & !mask,
                    len: 0,
                };
            }
        };
        let end = self.end() & !mask;
        if start < end {
            Span::between(start, end)
        } else {
            Span { start, len: 0 }
        }
    }

    /// Its first byte, as a pointer to memory that Rust knows nothing of.
    pub(crate) fn as_ptr(self) -> *const u8 {
        ptr::with_exposed_provenance(self.start)
    }

    /// The same, for writing.
    pub(crate) fn as_mut_ptr(self) -> *mut u8 {
        ptr::with_exposed_provenance_mut(self.start)
    }

    fn as_void(self) -> *mut libc::c_void {
        ptr::with_exposed_provenance_mut(self.start)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end())
    }
}

/// An error number of the kernel, as far as it has no name among a call's outcomes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Errno(i32);

impl Errno {
    /// Of the call that failed last on this thread.
    fn last() -> Self {
        // SAFETY: the C library gives each thread an errno that lives as long as the thread.
        let place = unsafe { libc::__errno_location() };
        // SAFETY: `place` is valid for reads and belongs to this thread alone.
        Self(unsafe { *place })
    }

    /// The call itself is forbidden to this thread, by a filter that somebody installed in mid life:
    /// asking again is of no use.
    pub(crate) const fn is_forbidden(self) -> bool {
        matches!(self.0, libc::EPERM | libc::EACCES | libc::ENOSYS)
    }

    /// The number, for `OSError.errno` and the like. Decisions are made on names, not on this.
    pub(crate) const fn raw(self) -> i32 {
        self.0
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({self})")
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", io::Error::from_raw_os_error(self.0))
    }
}

impl From<Errno> for io::Error {
    fn from(errno: Errno) -> Self {
        io::Error::from_raw_os_error(errno.0)
    }
}

/// Defines the ways in which a call can fail, one name for each error number that means something.
macro_rules! outcomes {
    (
        $(#[$meta:meta])*
        $vis:vis enum $name:ident { $($(#[$vmeta:meta])* $variant:ident = $errno:ident),* $(,)? }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        $vis enum $name {
            $($(#[$vmeta])* $variant,)*
            /// Anything else.
            Other($crate::sys::Errno),
        }

        impl $name {
            pub(super) fn decode(errno: $crate::sys::Errno) -> Self {
                match errno.0 {
                    $(libc::$errno => Self::$variant,)*
                    _ => Self::Other(errno),
                }
            }

            /// The kernel's number for it, for reports.
            pub(crate) fn errno(self) -> $crate::sys::Errno {
                match self {
                    $(Self::$variant => $crate::sys::Errno(libc::$errno),)*
                    Self::Other(errno) => errno,
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                std::fmt::Display::fmt(&self.errno(), f)
            }
        }

        impl std::error::Error for $name {}

        impl From<$name> for std::io::Error {
            fn from(stop: $name) -> Self {
                stop.errno().into()
            }
        }
    };
}
use outcomes;

/// How far a call over a range came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) struct Progress<S> {
    /// Bytes done, from the start of the range.
    pub(crate) bytes: usize,
    /// Why not all of it was done. `None` means all.
    pub(crate) stopped: Option<S>,
}

impl<S> Progress<S> {
    /// Whether all was done.
    pub(crate) fn is_complete(&self) -> bool {
        self.stopped.is_none()
    }
}

macro_rules! calls {
    ($($(#[$meta:meta])* $name:ident),* $(,)?) => {
        /// The calls that can be told to fail (feature `inject`), by name: one for each place in this
        /// module where one is made, so that a name is a site.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(usize)]
        enum Call { $($(#[$meta])* $name),* }

        #[cfg(feature = "inject")]
        impl Call {
            const NAMED: &'static [(&'static str, Self)] =
                &[$($(#[$meta])* (stringify!($name), Self::$name)),*];
        }
    };
}

calls! {
    // Mappings, by what they are for.
    MmapOwn,
    MmapFile,
    MmapFrames,
    MmapFresh,
    Munmap,
    Mremap,
    MremapPages,
    #[cfg(test)]
    Mprotect,
    #[cfg(test)]
    MmapKind,
    MadviseDontNeed,
    MadviseCold,
    MadviseFork,
    MadviseDump,
    MadviseHuge,
    MadvisePopulate,
    Mincore,
    #[cfg(test)]
    MadviseOther,
    // Frames.
    MemfdCreate,
    SealSize,
    SealWrite,
    Ftruncate,
    Fallocate,
    Fstat,
    Pwrite,
    #[cfg(test)]
    PreadFrames,
    ProcessVmReadv,
    // userfaultfd.
    Userfaultfd,
    OpenDevice,
    UserfaultfdOfDevice,
    UffdApi,
    UffdRegister,
    UffdUnregister,
    UffdMove,
    UffdCopy,
    UffdZeropage,
    UffdWriteprotect,
    UffdHelperWriteprotect,
    UffdWake,
    UffdEnd,
    UffdRead,
    Poll,
    Eventfd,
    EventfdWrite,
    EventfdRead,
    HelperDup,
    // What pages and mappings are.
    OpenPagemap,
    PagemapScan,
    PagemapRead,
    OpenProcmap,
    ProcmapQuery,
    MovePages,
    GetMempolicy,
    // The process and its threads.
    CloseRange,
    OpenNull,
    MemfdNull,
    GetRobustList,
    Getrlimit,
    ClockGettime,
    Sigmask,
    Getrandom,
    Atfork,
    SpawnMerging,
    SpawnHelper,
    SpawnHashing,
    // Files.
    FileText,
    FileLink,
    FileMetadata,
    FileOwnMetadata,
    FileOpenMetadata,
    FileOpen,
    FileRead,
    FileOpenWith,
    FileReadAt,
    Directory,
    DirectoryEntry,
    Lseek,
    // No call: the beginning of a phase.
    #[cfg(feature = "inject")]
    Enter,
    #[cfg(all(test, feature = "inject"))]
    Nothing,
}

/// The one place through which every call goes that can fail: with the feature `inject`, lets what is
/// planned for it happen.
#[inline]
fn through<T, E>(
    call: Call,
    run: impl FnOnce() -> Result<T, E>,
    failure: impl FnOnce(Errno) -> E,
) -> Result<T, E> {
    #[cfg(feature = "inject")]
    {
        inject::around(call, run, failure)
    }
    #[cfg(not(feature = "inject"))]
    {
        let _ = (call, failure);
        run()
    }
}

/// Makes a system call, and reads `errno` while it is fresh.
#[inline]
fn checked_once(call: Call, run: impl FnOnce() -> i64) -> Result<i64, Errno> {
    let run = || match run() {
        -1 => Err(Errno::last()),
        got => Ok(got),
    };
    through(call, run, |errno| errno)
}

/// The same, again for as long as a signal cuts it short.
#[inline]
fn checked(call: Call, mut run: impl FnMut() -> i64) -> Result<i64, Errno> {
    loop {
        match checked_once(call, &mut run) {
            Err(Errno(libc::EINTR)) => {}
            other => return other,
        }
    }
}

/// What the standard library calls, again for as long as a signal cuts it short.
fn fallible<T>(call: Call, mut run: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match through(call, &mut run, io::Error::from) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// For calls that tell their failure by their result: pthread functions, which no signal cuts short.
fn numbered(call: Call, run: impl FnOnce() -> i32) -> Result<(), Errno> {
    let run = || match run() {
        0 => Ok(()),
        number => Err(Errno(number)),
    };
    through(call, run, |errno| errno)
}

/// How much of `len` a call is asked for, in multiples of `unit`: all of it, unless a test has planned
/// that it does a part.
#[inline]
fn asked(call: Call, len: usize, unit: usize) -> usize {
    #[cfg(feature = "inject")]
    {
        inject::shortened(call, len, unit)
    }
    #[cfg(not(feature = "inject"))]
    {
        let _ = (call, unit);
        len
    }
}

/// A count or an offset that the kernel returned.
fn to_usize(got: i64) -> usize {
    usize::try_from(got).expect("checked() took -1 for an error, and no call returns less")
}

/// An offset for the kernel.
fn to_off(offset: u64) -> libc::off_t {
    libc::off_t::try_from(offset).expect("frame stores are far smaller than 2^63 bytes")
}

/// A descriptor that means something on the threads of one descriptor table only.
#[derive(Debug)]
struct Descriptor {
    fd: OwnedFd,
    /// Keeps it on its thread: see the module's header.
    stays: PhantomData<*mut ()>,
}

impl Descriptor {
    /// # Safety
    /// `fd` is open, and nobody else closes it.
    unsafe fn own(fd: i64) -> Self {
        let fd = RawFd::try_from(fd).expect("descriptors are ints");
        // SAFETY: passed on to our caller.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Self {
            fd,
            stays: PhantomData,
        }
    }

    fn raw(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// The number of an ioctl, by the layout that x86-64, arm64 and most others share.
const fn ioctl_number(direction: u32, group: u8, number: u8, size: usize) -> u32 {
    assert!(
        size < 1 << 14,
        "an ioctl argument has at most 14 bits of size"
    );
    #[allow(clippy::cast_possible_truncation, reason = "just checked")]
    let size = size as u32;
    (direction << 30) | (size << 16) | ((group as u32) << 8) | number as u32
}
const IOCTL_NONE: u32 = 0;
const IOCTL_READ: u32 = 2;
const IOCTL_READ_WRITE: u32 = 3;

/// The number in the type that the C library takes: signed in some, and wider in others.
fn ioctl_request(number: u32) -> libc::Ioctl {
    #[allow(
        clippy::cast_possible_wrap,
        clippy::cast_lossless,
        reason = "the bits are what counts"
    )]
    let request = number as libc::Ioctl;
    request
}

/// Calls an ioctl whose argument is a structure that it reads, and perhaps writes.
///
/// # Safety
/// `request` takes a pointer to a `T`, and whatever it does to memory that `argument` names by
/// address is allowed.
#[inline]
unsafe fn ioctl<T>(call: Call, fd: RawFd, request: u32, argument: &mut T) -> Result<i64, Errno> {
    let argument: *mut T = argument;
    checked(call, || {
        // SAFETY: `argument` is a valid `T` for the whole call, and the rest is our caller's
        // promise.
        i64::from(unsafe { libc::ioctl(fd, ioctl_request(request), argument) })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_pages_inside_odd_bounds_are_found() {
        let page = page_size();
        let odd = Span::new(page + 16, 3 * page);
        assert_eq!(odd.whole_pages(), Span::new(2 * page, 2 * page));
        assert!(Span::new(page + 16, page).whole_pages().is_empty());
        assert_eq!(Span::new(page, page).whole_pages(), Span::new(page, page));
        assert!(Span::new(usize::MAX - 5, 3).whole_pages().is_empty());
    }

    #[test]
    fn spans_that_only_touch_do_not_overlap() {
        let (a, b) = (Span::new(0x1000, 0x1000), Span::new(0x2000, 0x1000));
        assert!(!a.overlaps(b));
        assert_eq!(a.intersection(b), None);
        let c = Span::new(0x1800, 0x1000);
        assert!(a.overlaps(c));
        assert_eq!(a.intersection(c), Some(Span::new(0x1800, 0x800)));
        assert!(a.covers(a) && !a.covers(c) && a.contains(0x1000) && !a.contains(0x2000));
    }

    #[test]
    #[should_panic(expected = "reaches beyond")]
    fn part_beyond_the_span_panics() {
        let _ = Span::new(0x1000, 0x1000).part(0x800, 0x801);
    }

    #[test]
    fn errno_without_a_name_is_kept_and_named_ones_come_back() {
        use mapping::MapStop;
        assert_eq!(MapStop::decode(Errno(libc::ENOMEM)), MapStop::NoMemory);
        assert_eq!(MapStop::NoMemory.errno(), Errno(libc::ENOMEM));
        let odd = MapStop::decode(Errno(libc::EXDEV));
        assert_eq!(odd, MapStop::Other(Errno(libc::EXDEV)));
        assert_eq!(io::Error::from(odd).raw_os_error(), Some(libc::EXDEV));
    }
}
