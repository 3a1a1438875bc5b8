//! userfaultfd: making threads wait at pages, and moving pages from under them.
//!
//! # What holds here
//! * A range once registered for missing pages stays so until it is **un**registered: registering
//!   it again with fewer modes changes nothing, and the first touch of an absent page would then
//!   wait for ever.
//! * Calls that work through a range can stop in the middle. They are called again for the rest
//!   until the kernel names a reason, so [`Progress::stopped`] is the reason of the very page at
//!   which it stopped.
//!
//! # Cost
//! Registering an exact run 3 us; moving 75 ns a page in long runs, 0.7 us alone.

use super::pagemap::Pagemap;
use super::{
    Call, Descriptor, Errno, IOCTL_NONE, IOCTL_READ, IOCTL_READ_WRITE, Progress, Span, asked,
    checked, checked_once, ioctl, ioctl_number, ioctl_request, outcomes, page_size, to_usize,
};
use std::cell::Cell;
use std::mem::{offset_of, size_of};
use std::ops::BitOr;
use std::os::fd::RawFd;

// The kernel's interface (uapi/linux/userfaultfd.h), which Debian's headers know only in part.
const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: i32 = 1;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}
#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}
#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}
#[repr(C)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}
#[repr(C)]
struct UffdioZeropage {
    range: UffdioRange,
    mode: u64,
    zeropage: i64,
}
#[repr(C)]
struct UffdioMove {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    moved: i64,
}
#[repr(C)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}

const fn read_write<T>(number: u8) -> u32 {
    ioctl_number(IOCTL_READ_WRITE, 0xaa, number, size_of::<T>())
}
const fn read_only<T>(number: u8) -> u32 {
    ioctl_number(IOCTL_READ, 0xaa, number, size_of::<T>())
}
const USERFAULTFD_IOC_NEW: u32 = ioctl_number(IOCTL_NONE, 0xaa, 0, 0);
const UFFDIO_REGISTER: u32 = read_write::<UffdioRegister>(0x00);
const UFFDIO_UNREGISTER: u32 = read_only::<UffdioRange>(0x01);
const UFFDIO_WAKE: u32 = read_only::<UffdioRange>(0x02);
const UFFDIO_COPY: u32 = read_write::<UffdioCopy>(0x03);
const UFFDIO_ZEROPAGE: u32 = read_write::<UffdioZeropage>(0x04);
const UFFDIO_MOVE: u32 = read_write::<UffdioMove>(0x05);
const UFFDIO_WRITEPROTECT: u32 = read_write::<UffdioWriteprotect>(0x06);
const UFFDIO_API: u32 = read_write::<UffdioApi>(0x3f);
const _: () = {
    assert!(UFFDIO_API == 0xc018_aa3f);
    assert!(UFFDIO_REGISTER == 0xc020_aa00);
    assert!(UFFDIO_UNREGISTER == 0x8010_aa01);
    assert!(UFFDIO_WAKE == 0x8010_aa02);
    assert!(UFFDIO_COPY == 0xc028_aa03 && offset_of!(UffdioCopy, copy) == 32);
    assert!(UFFDIO_ZEROPAGE == 0xc020_aa04 && offset_of!(UffdioZeropage, zeropage) == 24);
    assert!(UFFDIO_MOVE == 0xc028_aa05 && offset_of!(UffdioMove, moved) == 32);
    assert!(UFFDIO_WRITEPROTECT == 0xc018_aa06);
    assert!(size_of::<RawEvent>() == 32);
};

const REGISTER_MISSING: u64 = 1;
const REGISTER_WP: u64 = 2;
const COPY_DONTWAKE: u64 = 1;
const COPY_WP: u64 = 2;
const ZEROPAGE_DONTWAKE: u64 = 1;
const MOVE_DONTWAKE: u64 = 1;
const WRITEPROTECT_WP: u64 = 1;
const WRITEPROTECT_DONTWAKE: u64 = 2;

macro_rules! features {
    ($($(#[$meta:meta])* $name:ident = $bit:literal),* $(,)?) => {
        /// What a kernel's userfaultfd can do, or is asked to do.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub(crate) struct Features(u64);

        impl Features {
            $($(#[$meta])* pub(crate) const $name: Self = Self(1 << $bit);)*
        }
    };
}

features! {
    /// Write protection of anonymous memory, and faults that say so.
    WP = 0,
    /// Write protection of shared and huge pages, too.
    WP_HUGETLBFS_SHMEM = 12,
    /// Absent pages can be protected.
    WP_UNPOPULATED = 13,
    /// Write faults are settled by the kernel, and only remembered (Linux 6.7).
    WP_ASYNC = 15,
    /// `UFFDIO_MOVE` (Linux 6.8).
    MOVE = 16,
}

impl Features {
    /// None.
    pub(crate) const NONE: Self = Self(0);

    /// Whether all of `other` are among them.
    pub(crate) const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for Features {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Where a userfaultfd comes from, which decides whose faults it may handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The system call: needs root, `CAP_SYS_PTRACE` or the sysctl.
    Syscall,
    /// The system call, for faults of the program's own code only. Everybody may have it.
    UserModeOnly,
    /// `/dev/userfaultfd`: needs access to that file.
    Device,
}

outcomes! {
    /// Why there is no userfaultfd.
    pub(crate) enum OpenStop {
        /// Not in this kernel, or kept away by a seccomp filter that says so.
        Missing = ENOSYS,
        /// Not without more rights.
        NotPermitted = EPERM,
        /// The device file may not be opened.
        DeviceDenied = EACCES,
        /// There is no device file.
        NoDevice = ENOENT,
        /// A feature that was asked for is not there.
        FeatureMissing = EINVAL,
        /// Too many open files in this process.
        TooManyFiles = EMFILE,
        /// Too many open files in this system.
        TooManyFilesInSystem = ENFILE,
        /// No memory.
        NoMemory = ENOMEM,
    }
}

outcomes! {
    /// Why a range could not be registered.
    pub(crate) enum RegisterStop {
        /// Another userfaultfd, ours or the program's, has part of it. Nothing was changed.
        Foreign = EBUSY,
        /// Not mapped, or memory of a kind that cannot be registered.
        Invalid = EINVAL,
        /// No memory, or too many mappings.
        NoMemory = ENOMEM,
        /// Memory that may never be written.
        NotWritable = EPERM,
        /// The process is at its end.
        Exiting = ESRCH,
    }
}

outcomes! {
    /// Why `UFFDIO_MOVE` did not move a page.
    pub(crate) enum MoveStop {
        /// Pinned for I/O, or not exclusively ours: shared with a forked child, or once so.
        Busy = EBUSY,
        /// There is a page at the destination already.
        Present = EEXIST,
        /// There is no page at the source, or one end is not registered or not mapped any more.
        Missing = ENOENT,
        /// The two mappings differ (locked, other protection, more than one mapping in the range).
        WrongMapping = EINVAL,
        /// No memory.
        NoMemory = ENOMEM,
        /// The address space is being changed by somebody who waits for an event to be read.
        Changing = EAGAIN,
        /// The process is at its end.
        Exiting = ESRCH,
        /// The kernel does not have the call.
        NotSupported = ENOTTY,
    }
}

outcomes! {
    /// Why a page was not filled, by copy or by zero page.
    pub(crate) enum FillStop {
        /// There is a page already.
        Present = EEXIST,
        /// Not registered, or not mapped any more.
        Missing = ENOENT,
        /// The range is not of a kind that can be filled.
        WrongMapping = EINVAL,
        /// The source cannot be read.
        SourceGone = EFAULT,
        /// No memory.
        NoMemory = ENOMEM,
        /// The address space is being changed by somebody who waits for an event to be read.
        Changing = EAGAIN,
        /// The process is at its end.
        Exiting = ESRCH,
    }
}

outcomes! {
    /// Why a range was not protected, or not released.
    pub(crate) enum ProtectStop {
        /// Not registered for write protection, or not mapped any more.
        Missing = ENOENT,
        /// Not aligned, or not of a kind that can be protected.
        Invalid = EINVAL,
        /// The address space is being changed by somebody who waits for an event to be read.
        Changing = EAGAIN,
        /// No memory for page tables.
        NoMemory = ENOMEM,
        /// Part of the range could not be protected.
        Fault = EFAULT,
        /// The process is at its end.
        Exiting = ESRCH,
    }
}

/// What makes a thread wait in a registered range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Modes {
    /// A write to a protected page (with [`Features::WP_ASYNC`] it does not wait).
    WriteProtect,
    /// That, and a touch of an absent page.
    Both,
}

/// Whether waiting threads go on after a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wake {
    /// They do.
    Now,
    /// They wait for [`Userfaultfd::wake`].
    Later,
}

/// A userfaultfd of this process's memory.
#[derive(Debug)]
pub(crate) struct Userfaultfd {
    fd: Descriptor,
    /// [`Userfaultfd::end`] has put something else in its place.
    ended: Cell<bool>,
}

impl Userfaultfd {
    /// Opens one with exactly the `features` asked for. Reading events never blocks.
    ///
    /// # Errors
    /// [`OpenStop`].
    pub(crate) fn open(source: Source, features: Features) -> Result<Self, OpenStop> {
        let fd = Self::bare(source)?;
        Self::handshake(&fd, features).map_err(OpenStop::decode)?;
        let ended = Cell::new(false);
        Ok(Self { fd, ended })
    }

    /// Which features this kernel has.
    ///
    /// # Errors
    /// [`OpenStop`].
    pub(crate) fn offered(source: Source) -> Result<Features, OpenStop> {
        let fd = Self::bare(source)?;
        Self::handshake(&fd, Features::NONE).map_err(OpenStop::decode)
    }

    fn bare(source: Source) -> Result<Descriptor, OpenStop> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let open = |flags: i32| {
            checked(Call::Userfaultfd, || {
                // SAFETY: makes a descriptor, nothing else.
                unsafe { libc::syscall(libc::SYS_userfaultfd, flags) }
            })
        };
        let fd = match source {
            Source::Syscall => open(flags),
            Source::UserModeOnly => open(flags | UFFD_USER_MODE_ONLY),
            Source::Device => Self::from_device(flags),
        };
        // SAFETY: the kernel has just given us this descriptor.
        fd.map(|fd| unsafe { Descriptor::own(fd) })
            .map_err(OpenStop::decode)
    }

    fn from_device(flags: i32) -> Result<i64, Errno> {
        let device = checked(Call::OpenDevice, || {
            let path = c"/dev/userfaultfd".as_ptr();
            // SAFETY: `path` is a C string.
            i64::from(unsafe { libc::open(path, libc::O_RDWR | libc::O_CLOEXEC) })
        })?;
        // SAFETY: the kernel has just given us this descriptor.
        let device = unsafe { Descriptor::own(device) };
        checked(Call::UserfaultfdOfDevice, || {
            // SAFETY: this ioctl takes the flags by value and makes a descriptor, nothing else.
            i64::from(unsafe {
                libc::ioctl(device.raw(), ioctl_request(USERFAULTFD_IOC_NEW), flags)
            })
        })
    }

    /// Agrees on the interface; gives what the kernel has.
    fn handshake(fd: &Descriptor, features: Features) -> Result<Features, Errno> {
        let mut api = UffdioApi {
            api: UFFD_API,
            features: features.0,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_API takes this structure, and names no memory.
        unsafe { ioctl(Call::UffdApi, fd.raw(), UFFDIO_API, &mut api) }?;
        Ok(Features(api.features))
    }

    fn raw(&self) -> RawFd {
        self.fd.raw()
    }

    /// Makes threads wait at `span`. Adds modes to a range that has some; takes none away.
    ///
    /// # Errors
    /// [`RegisterStop`].
    pub(crate) fn register(&self, span: Span, modes: Modes) -> Result<(), RegisterStop> {
        let mode = match modes {
            Modes::WriteProtect => REGISTER_WP,
            Modes::Both => REGISTER_MISSING | REGISTER_WP,
        };
        let mut argument = UffdioRegister {
            range: range(span),
            mode,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_REGISTER takes this structure. It changes no byte of memory.
        let got = unsafe {
            ioctl(
                Call::UffdRegister,
                self.raw(),
                UFFDIO_REGISTER,
                &mut argument,
            )
        };
        got.map(drop).map_err(RegisterStop::decode)
    }

    /// Lets `span` go: no thread waits there any more, those that wait go on, and all write
    /// protection and tracking of the range is forgotten.
    ///
    /// # Errors
    /// [`RegisterStop`]; `Invalid` also when the range is another userfaultfd's.
    pub(crate) fn unregister(&self, span: Span) -> Result<(), RegisterStop> {
        let mut argument = range(span);
        // SAFETY: UFFDIO_UNREGISTER takes this structure. It changes no byte of memory.
        let got = unsafe {
            ioctl(
                Call::UffdUnregister,
                self.raw(),
                UFFDIO_UNREGISTER,
                &mut argument,
            )
        };
        got.map(drop).map_err(RegisterStop::decode)
    }

    /// Moves the pages of `from` to `to`, where there are none. The destination is registered; the
    /// source need not be. A source page that is absent stops it.
    ///
    /// # Safety
    /// All who use either memory can live with pages that vanish at `from` and appear at `to`:
    /// threads that touch `from` meanwhile must wait (it is registered for missing pages) or not
    /// exist.
    pub(crate) unsafe fn move_pages(
        &self,
        from: Span,
        to: usize,
        wake: Wake,
    ) -> Progress<MoveStop> {
        // SAFETY: our caller's promise.
        unsafe { self.move_with(from, to, wake, 0) }
    }

    /// # Safety
    /// As [`Self::move_pages`].
    unsafe fn move_with(&self, from: Span, to: usize, wake: Wake, mode: u64) -> Progress<MoveStop> {
        let mode = mode
            | if wake == Wake::Later {
                MOVE_DONTWAKE
            } else {
                0
            };
        run_to_reason(Call::UffdMove, from.len, |done, len| {
            let (dst, src) = ((to + done) as u64, (from.start + done) as u64);
            let mut argument = UffdioMove {
                dst,
                src,
                len: len as u64,
                mode,
                moved: 0,
            };
            // SAFETY: UFFDIO_MOVE takes this structure; what it does to memory is our caller's
            // promise.
            let got = unsafe { ioctl(Call::UffdMove, self.raw(), UFFDIO_MOVE, &mut argument) };
            (got, really(argument.moved))
        })
        .map_stop(MoveStop::decode)
    }

    /// Fills absent pages at `to` with a copy of `from`; with `protect`, write-protected.
    ///
    /// # Safety
    /// `from` stays mapped during the call, and all who use `to` can live with pages that appear
    /// there.
    pub(crate) unsafe fn copy(
        &self,
        from: Span,
        to: usize,
        protect: bool,
        wake: Wake,
    ) -> Progress<FillStop> {
        let mode = if protect { COPY_WP } else { 0 }
            | if wake == Wake::Later {
                COPY_DONTWAKE
            } else {
                0
            };
        run_to_reason(Call::UffdCopy, from.len, |done, len| {
            let (dst, src) = ((to + done) as u64, (from.start + done) as u64);
            let mut argument = UffdioCopy {
                dst,
                src,
                len: len as u64,
                mode,
                copy: 0,
            };
            // SAFETY: UFFDIO_COPY takes this structure; it reads `from`, which the caller keeps
            // mapped, and fills only absent pages of `to`, as the caller allows.
            let got = unsafe { ioctl(Call::UffdCopy, self.raw(), UFFDIO_COPY, &mut argument) };
            (got, really(argument.copy))
        })
        .map_stop(FillStop::decode)
    }

    /// Fills absent pages of `span` with the zero page.
    ///
    /// # Safety
    /// All who use that memory can live with zeroes that appear there.
    pub(crate) unsafe fn zeropage(&self, span: Span, wake: Wake) -> Progress<FillStop> {
        let mode = if wake == Wake::Later {
            ZEROPAGE_DONTWAKE
        } else {
            0
        };
        run_to_reason(Call::UffdZeropage, span.len, |done, len| {
            let range = range(span.part(done, len));
            let mut argument = UffdioZeropage {
                range,
                mode,
                zeropage: 0,
            };
            // SAFETY: UFFDIO_ZEROPAGE takes this structure; it fills only absent pages, as the
            // caller allows.
            let got = unsafe {
                ioctl(
                    Call::UffdZeropage,
                    self.raw(),
                    UFFDIO_ZEROPAGE,
                    &mut argument,
                )
            };
            (got, really(argument.zeropage))
        })
        .map_stop(FillStop::decode)
    }

    /// Write-protects `span`, which is registered for it.
    ///
    /// # Errors
    /// [`ProtectStop`]; a part may be protected.
    pub(crate) fn protect(&self, span: Span) -> Result<(), ProtectStop> {
        self.writeprotect(span, WRITEPROTECT_WP)
    }

    /// Takes write protection off `span`.
    ///
    /// # Errors
    /// [`ProtectStop`]; a part may be unprotected.
    pub(crate) fn unprotect(&self, span: Span, wake: Wake) -> Result<(), ProtectStop> {
        self.writeprotect(
            span,
            if wake == Wake::Later {
                WRITEPROTECT_DONTWAKE
            } else {
                0
            },
        )
    }

    fn writeprotect(&self, span: Span, mode: u64) -> Result<(), ProtectStop> {
        let mut argument = UffdioWriteprotect {
            range: range(span),
            mode,
        };
        // SAFETY: UFFDIO_WRITEPROTECT takes this structure. It changes no byte of memory.
        let got = unsafe {
            ioctl(
                Call::UffdWriteprotect,
                self.raw(),
                UFFDIO_WRITEPROTECT,
                &mut argument,
            )
        };
        got.map(drop).map_err(ProtectStop::decode)
    }

    /// Lets the threads that wait in `span` go on.
    ///
    /// # Errors
    /// Only for a range that is not made of whole pages.
    pub(crate) fn wake(&self, span: Span) -> Result<(), RegisterStop> {
        wake(self.raw(), span)
    }

    /// Takes the events that have come, as many as fit, and says how many.
    ///
    /// # Errors
    /// Of the read; none for "nothing there".
    #[cfg(test)]
    pub(crate) fn events(&self, into: &mut [RawEvent]) -> Result<usize, Errno> {
        read_events(self.raw(), into)
    }

    /// Waits until events have come, `waker` is woken, or the time is over.
    ///
    /// # Errors
    /// Of the poll; none for a signal, which counts as a timeout.
    #[cfg(test)]
    pub(crate) fn wait(&self, waker: Option<&Waker>, millis: Option<u32>) -> Result<Ready, Errno> {
        wait(self.raw(), waker.map(|waker| waker.fd.raw()), millis)
    }

    /// The last way out, where no ioctl may be called any more: puts `other` in the descriptor's place.
    /// With that the userfaultfd is gone, which takes every range out of it and wakes everybody who
    /// waits; the number stays taken. Every later call on this value fails.
    ///
    /// # Errors
    /// When that is forbidden, too.
    pub(crate) fn end(&self, other: &Pagemap) -> Result<(), Errno> {
        checked(Call::UffdEnd, || {
            // SAFETY: both numbers are of this thread's table, and their owners are borrowed. `self`
            // closes what its number refers to in the end, which is a second handle of `other`'s file.
            i64::from(unsafe { libc::dup3(other.raw(), self.raw(), libc::O_CLOEXEC) })
        })?;
        self.ended.set(true);
        Ok(())
    }

    /// Whether [`end`](Self::end) has ended it: nothing is registered with it any more.
    pub(crate) fn is_ended(&self) -> bool {
        self.ended.get()
    }

    /// A second handle, for a helper thread.
    ///
    /// # Safety
    /// It is used only on threads that share this thread's descriptor table (they were spawned by
    /// it, after it had made that table), and only while `self` lives.
    pub(crate) unsafe fn helper(&self) -> UffdHelper {
        UffdHelper { fd: self.raw() }
    }
}

fn wake(fd: RawFd, span: Span) -> Result<(), RegisterStop> {
    let mut argument = range(span);
    // SAFETY: UFFDIO_WAKE takes this structure. It changes no byte of memory.
    let got = unsafe { ioctl(Call::UffdWake, fd, UFFDIO_WAKE, &mut argument) };
    got.map(drop).map_err(RegisterStop::decode)
}

/// A userfaultfd on a helper thread that shares the descriptor table.
#[derive(Debug)]
pub(crate) struct UffdHelper {
    fd: RawFd,
}

impl UffdHelper {
    /// Takes the events that have come, as many as fit, and says how many.
    ///
    /// # Errors
    /// Of the read; none for "nothing there".
    pub(crate) fn events(&self, into: &mut [RawEvent]) -> Result<usize, Errno> {
        read_events(self.fd, into)
    }

    /// Waits until events have come, `waker` is woken, or the time is over.
    ///
    /// # Errors
    /// Of the poll; none for a signal, which counts as a timeout.
    pub(crate) fn wait(
        &self,
        waker: Option<&WakerHelper>,
        millis: Option<u32>,
    ) -> Result<Ready, Errno> {
        wait(self.fd, waker.map(|waker| waker.fd), millis)
    }

    /// As [`Userfaultfd::wake`].
    ///
    /// # Errors
    /// As there.
    pub(crate) fn wake(&self, span: Span) -> Result<(), RegisterStop> {
        wake(self.fd, span)
    }

    /// As [`Userfaultfd::unprotect`].
    ///
    /// # Errors
    /// As there.
    pub(crate) fn unprotect(&self, span: Span, wake: Wake) -> Result<(), ProtectStop> {
        let mode = if wake == Wake::Later {
            WRITEPROTECT_DONTWAKE
        } else {
            0
        };
        let mut argument = UffdioWriteprotect {
            range: range(span),
            mode,
        };
        // SAFETY: UFFDIO_WRITEPROTECT takes this structure. It changes no byte of memory.
        let got = unsafe {
            ioctl(
                Call::UffdHelperWriteprotect,
                self.fd,
                UFFDIO_WRITEPROTECT,
                &mut argument,
            )
        };
        got.map(drop).map_err(ProtectStop::decode)
    }
}

impl UffdHelper {
    /// The last way out, where no ioctl works any more (a filter that was installed in mid life):
    /// puts `other` in the descriptor's place. With that the userfaultfd is gone for everybody, which
    /// lifts all of its protection and wakes everybody who waits; the number stays taken, so nothing
    /// else can come to be called by it.
    ///
    /// # Errors
    /// When the call is forbidden, too.
    pub(crate) fn end(&self, other: &WakerHelper) -> Result<(), Errno> {
        checked(Call::HelperDup, || {
            // SAFETY: both numbers are of this table, and their owners outlive this helper. What owns
            // the number closes `other`'s file once more in the end, which is what it refers to.
            i64::from(unsafe { libc::dup3(other.fd, self.fd, libc::O_CLOEXEC) })
        })
        .map(drop)
    }
}

/// Wakes a thread that waits in [`UffdHelper::wait`].
#[derive(Debug)]
pub(crate) struct Waker {
    fd: Descriptor,
}

impl Waker {
    /// Makes one.
    ///
    /// # Errors
    /// When descriptors or memory are used up.
    pub(crate) fn new() -> Result<Self, Errno> {
        let fd = checked(Call::Eventfd, || {
            // SAFETY: makes a descriptor, nothing else.
            i64::from(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })
        })?;
        // SAFETY: the kernel has just given us this descriptor.
        let fd = unsafe { Descriptor::own(fd) };
        Ok(Self { fd })
    }

    /// Wakes: the next wait, or the one that is under way, ends with [`Ready::Woken`].
    pub(crate) fn wake(&self) {
        let one: u64 = 1;
        let from = (&raw const one).cast();
        let wrote = checked(Call::EventfdWrite, || {
            // SAFETY: the kernel reads 8 bytes of `one`.
            let got = unsafe { libc::write(self.fd.raw(), from, 8) };
            got as i64
        });
        // The only failure left is a counter that is full, which wakes as well.
        let _ = wrote;
    }

    /// Takes a wake-up back, so that the next wait waits again.
    #[cfg(test)]
    pub(crate) fn clear(&self) {
        clear(self.fd.raw());
    }

    /// A second handle, for a helper thread.
    ///
    /// # Safety
    /// As [`Userfaultfd::helper`].
    pub(crate) unsafe fn helper(&self) -> WakerHelper {
        WakerHelper { fd: self.fd.raw() }
    }
}

/// A [`Waker`] on a helper thread that shares the descriptor table.
#[derive(Debug)]
pub(crate) struct WakerHelper {
    fd: RawFd,
}

impl WakerHelper {
    /// Takes a wake-up back, so that the next wait waits again.
    pub(crate) fn clear(&self) {
        clear(self.fd);
    }
}

fn clear(fd: RawFd) {
    let mut count: u64 = 0;
    let into = (&raw mut count).cast();
    let read = checked(Call::EventfdRead, || {
        // SAFETY: the kernel writes 8 bytes to `count`.
        let got = unsafe { libc::read(fd, into, 8) };
        got as i64
    });
    // The only failure left is that there is nothing to take back.
    let _ = read;
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ready {
    /// Events can be read. (The waker may be woken as well.)
    Events,
    /// The waker was woken, and stays so until it is cleared.
    Woken,
    /// Neither, until the time was over or a signal came.
    Timeout,
}

/// An event as the kernel delivers it.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct RawEvent {
    kind: u8,
    reserved: [u8; 7],
    arguments: [u64; 3],
}

impl RawEvent {
    /// An empty one, to be read into.
    pub(crate) const EMPTY: Self = Self {
        kind: 0,
        reserved: [0; 7],
        arguments: [0; 3],
    };

    /// What it says.
    pub(crate) fn decode(&self) -> Event {
        #[allow(clippy::cast_possible_truncation, reason = "addresses of this machine")]
        let at = |index: usize| self.arguments[index] as usize;
        match self.kind {
            0x12 => Event::Fault {
                address: at(1),
                write: self.arguments[0] & 1 != 0,
                protected: self.arguments[0] & 2 != 0,
            },
            kind => Event::Other(kind),
        }
    }
}

impl std::fmt::Debug for RawEvent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.decode().fmt(f)
    }
}

/// What happened in a registered range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A thread waits.
    Fault {
        /// At the page of this address.
        address: usize,
        /// It wants to write.
        write: bool,
        /// The page is there, but protected. Otherwise it is absent.
        protected: bool,
    },
    /// Something that was not asked for.
    Other(u8),
}

fn read_events(fd: RawFd, into: &mut [RawEvent]) -> Result<usize, Errno> {
    let got = checked(Call::UffdRead, || {
        // SAFETY: the kernel writes whole events to `into`, which is plain data, and no more bytes
        // than it has.
        let got = unsafe { libc::read(fd, into.as_mut_ptr().cast(), size_of_val(into)) };
        got as i64
    });
    match got {
        Ok(bytes) => Ok(to_usize(bytes) / size_of::<RawEvent>()),
        Err(Errno(libc::EAGAIN)) => Ok(0),
        Err(errno) => Err(errno),
    }
}

fn wait(fd: RawFd, waker: Option<RawFd>, millis: Option<u32>) -> Result<Ready, Errno> {
    let wanted = |fd: RawFd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // A negative descriptor is one that poll passes over.
    let mut both = [wanted(fd), wanted(waker.unwrap_or(-1))];
    let millis = millis.map_or(-1, |m| i32::try_from(m).unwrap_or(i32::MAX));
    let got = checked_once(Call::Poll, || {
        // SAFETY: `both` is an array of two, ours to write for the whole call.
        i64::from(unsafe { libc::poll(both.as_mut_ptr(), 2, millis) })
    });
    match got {
        Err(Errno(libc::EINTR)) => Ok(Ready::Timeout),
        Err(errno) => Err(errno),
        Ok(_) if both[0].revents & libc::POLLIN != 0 => Ok(Ready::Events),
        Ok(_) if both[1].revents != 0 => Ok(Ready::Woken),
        Ok(_) => Ok(Ready::Timeout),
    }
}

fn range(span: Span) -> UffdioRange {
    UffdioRange {
        start: span.start as u64,
        len: span.len as u64,
    }
}

impl Progress<Errno> {
    fn map_stop<S>(self, decode: impl FnOnce(Errno) -> S) -> Progress<S> {
        Progress {
            bytes: self.bytes,
            stopped: self.stopped.map(decode),
        }
    }
}

/// Calls `once` for what is left of `len` bytes until all is done or the kernel names a reason.
///
/// A call that has done a part says EAGAIN, whatever stopped it; only the next call, which does
/// nothing, says why. EAGAIN without a part done means that the address space is being changed:
/// that is worth a few tries, not more.
fn run_to_reason(
    call: Call,
    len: usize,
    mut once: impl FnMut(usize, usize) -> (Result<i64, Errno>, i64),
) -> Progress<Errno> {
    let (mut done, mut tries) = (0, 0);
    while done < len {
        let part = asked(call, len - done, page_size());
        let (result, told) = once(done, part);
        match result {
            Ok(_) => done += part,
            Err(errno) => match usize::try_from(told) {
                Ok(part) if part > 0 => done += part,
                _ if errno.0 == libc::EAGAIN && tries < 3 => tries += 1,
                _ => {
                    return Progress {
                        bytes: done,
                        stopped: Some(errno),
                    };
                }
            },
        }
    }
    Progress {
        bytes: done,
        stopped: None,
    }
}

/// What the kernel says that it has done: nothing, where a test makes it lie.
#[inline]
fn really(told: i64) -> i64 {
    #[cfg(feature = "inject")]
    {
        super::inject::told(told)
    }
    #[cfg(not(feature = "inject"))]
    {
        told
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::mapping::{Advice, Mapping, Protection};
    use crate::sys::{memory, page_size};
    use std::sync::mpsc;
    use std::time::Duration;

    /// With kernel faults where that is permitted; these tests touch their pages themselves, so
    /// without will do.
    fn source() -> Source {
        match Userfaultfd::offered(Source::Syscall) {
            Ok(_) => Source::Syscall,
            Err(_) => Source::UserModeOnly,
        }
    }

    fn open(features: Features) -> Userfaultfd {
        // That a smaller kernel is told apart is tested in `probe`.
        Userfaultfd::open(source(), features)
            .expect("these tests need the userfaultfd of Linux 6.8 or newer")
    }

    fn memory(pages: usize) -> Mapping {
        let memory = Mapping::anonymous(pages * page_size(), Protection::ReadWrite).unwrap();
        memory.advise(Advice::NoHugePage).unwrap();
        memory
    }

    fn fill(at: Span, value: u8) {
        // SAFETY: the tests write only to memory that they have mapped, and hold no reference.
        unsafe { at.as_mut_ptr().write_bytes(value, at.len) };
    }

    fn byte(at: usize) -> u8 {
        let mut byte = [0];
        // SAFETY: the tests ask only for memory that they have mapped.
        unsafe { memory::copy(Span::new(at, 1).as_ptr(), &mut byte) };
        byte[0]
    }

    #[test]
    fn offered_features_can_all_be_asked_for() {
        let offered = Userfaultfd::offered(source()).unwrap();
        assert!(offered.has(Features::WP));
        let wanted = Features::WP | Features::WP_UNPOPULATED | Features::WP_ASYNC | Features::MOVE;
        if offered.has(wanted) {
            drop(open(wanted));
        }
        let none = Features(1 << 60);
        let got = Userfaultfd::open(source(), none).map(drop);
        assert_eq!(got, Err(OpenStop::FeatureMissing));
    }

    #[test]
    fn moved_page_arrives_whole_and_the_reader_waits_for_it() {
        let uffd = open(Features::WP | Features::MOVE | Features::WP_UNPOPULATED);
        let (place, staging) = (memory(4), memory(4));
        fill(place.span(), 0x5a);
        uffd.register(place.span(), Modes::Both).unwrap();
        uffd.register(staging.span(), Modes::WriteProtect).unwrap();
        // SAFETY: both are this test's own, and nobody else touches them yet.
        let out = unsafe { uffd.move_pages(place.span(), staging.span().start, Wake::Now) };
        assert_eq!(
            out,
            Progress {
                bytes: 4 * page_size(),
                stopped: None
            }
        );
        assert_eq!(byte(staging.span().start), 0x5a);
        let (tell, told) = mpsc::channel();
        let at = place.span().start;
        let reader = std::thread::spawn(move || tell.send(byte(at)).unwrap());
        // The reader's fault is an event; it is answered only after it has been seen.
        let mut events = [RawEvent::EMPTY; 2];
        assert_eq!(uffd.wait(None, Some(10_000)).unwrap(), Ready::Events);
        assert_eq!(uffd.events(&mut events).unwrap(), 1);
        assert_eq!(
            events[0].decode(),
            Event::Fault {
                address: at,
                write: false,
                protected: false
            }
        );
        assert!(told.try_recv().is_err());
        // SAFETY: as above; the reader waits for exactly this.
        let back = unsafe { uffd.move_pages(staging.span(), at, Wake::Now) };
        assert!(back.is_complete());
        assert_eq!(told.recv_timeout(Duration::from_secs(60)).unwrap(), 0x5a);
        reader.join().unwrap();
    }

    #[test]
    fn move_that_stops_in_the_middle_says_how_far_and_why() {
        let page = page_size();
        let uffd = open(Features::WP | Features::MOVE);
        let (place, staging) = (memory(4), memory(4));
        fill(place.span(), 1);
        fill(staging.span().page_run(2, 1), 2);
        uffd.register(staging.span(), Modes::Both).unwrap();
        // SAFETY: both are this test's own, and nobody else touches them.
        let out = unsafe { uffd.move_pages(place.span(), staging.span().start, Wake::Now) };
        assert_eq!(
            out,
            Progress {
                bytes: 2 * page,
                stopped: Some(MoveStop::Present)
            }
        );
        // SAFETY: as above.
        let again = unsafe {
            uffd.move_pages(
                place.span().page_run(1, 1),
                staging.span().start + 3 * page,
                Wake::Now,
            )
        };
        assert_eq!(
            again,
            Progress {
                bytes: 0,
                stopped: Some(MoveStop::Missing)
            }
        );
    }

    #[test]
    fn page_of_another_kind_is_not_moved() {
        let uffd = open(Features::WP | Features::MOVE);
        let (place, staging) = (memory(1), memory(1));
        fill(place.span(), 1);
        uffd.register(staging.span(), Modes::Both).unwrap();
        // SAFETY: the memory is this test's own.
        unsafe { crate::sys::mapping::protect(place.span(), Protection::Read) }.unwrap();
        // SAFETY: both are this test's own, and nobody else touches them.
        let out = unsafe { uffd.move_pages(place.span(), staging.span().start, Wake::Now) };
        assert_eq!(
            out,
            Progress {
                bytes: 0,
                stopped: Some(MoveStop::WrongMapping)
            }
        );
        assert_eq!(byte(place.span().start), 1);
    }

    #[test]
    fn range_of_another_userfaultfd_is_foreign() {
        let (one, two) = (open(Features::WP), open(Features::WP));
        let memory = memory(2);
        one.register(memory.span(), Modes::WriteProtect).unwrap();
        assert_eq!(
            two.register(memory.span(), Modes::WriteProtect),
            Err(RegisterStop::Foreign)
        );
        assert_eq!(two.unregister(memory.span()), Err(RegisterStop::Invalid));
        one.unregister(memory.span()).unwrap();
        two.register(memory.span(), Modes::WriteProtect).unwrap();
    }

    #[test]
    fn absent_pages_are_filled_by_copy_and_by_zero_and_only_once() {
        let page = page_size();
        let uffd = open(Features::WP);
        let (place, source) = (memory(3), memory(3));
        fill(source.span(), 9);
        uffd.register(place.span(), Modes::Both).unwrap();
        // SAFETY: both are this test's own.
        let out = unsafe {
            uffd.copy(
                source.span().page_run(0, 1),
                place.span().start,
                false,
                Wake::Now,
            )
        };
        assert!(out.is_complete());
        // SAFETY: as above.
        let out = unsafe { uffd.zeropage(place.span().page_run(1, 1), Wake::Now) };
        assert!(out.is_complete());
        assert_eq!(
            (byte(place.span().start), byte(place.span().start + page)),
            (9, 0)
        );
        // SAFETY: as above.
        let out = unsafe { uffd.copy(source.span(), place.span().start, false, Wake::Now) };
        assert_eq!(
            out,
            Progress {
                bytes: 0,
                stopped: Some(FillStop::Present)
            }
        );
    }

    #[test]
    fn writer_at_a_protected_page_waits_until_it_is_unprotected() {
        let uffd = open(Features::WP);
        let place = memory(1);
        fill(place.span(), 3);
        uffd.register(place.span(), Modes::WriteProtect).unwrap();
        uffd.protect(place.span()).unwrap();
        let at = place.span();
        let writer = std::thread::spawn(move || fill(at, 4));
        let mut events = [RawEvent::EMPTY; 1];
        assert_eq!(uffd.wait(None, Some(10_000)).unwrap(), Ready::Events);
        assert_eq!(uffd.events(&mut events).unwrap(), 1);
        assert!(matches!(
            events[0].decode(),
            Event::Fault {
                write: true,
                protected: true,
                ..
            }
        ));
        assert_eq!(byte(at.start), 3);
        uffd.unprotect(at, Wake::Now).unwrap();
        writer.join().unwrap();
        assert_eq!(byte(at.start), 4);
    }

    #[test]
    fn waker_ends_a_wait_until_it_is_cleared() {
        let uffd = open(Features::WP);
        let waker = Waker::new().unwrap();
        assert_eq!(uffd.wait(Some(&waker), Some(1)).unwrap(), Ready::Timeout);
        waker.wake();
        assert_eq!(uffd.wait(Some(&waker), None).unwrap(), Ready::Woken);
        waker.clear();
        assert_eq!(uffd.wait(Some(&waker), Some(1)).unwrap(), Ready::Timeout);
    }

    #[test]
    fn device_gives_the_same_where_it_may_be_opened() {
        match Userfaultfd::offered(Source::Device) {
            Ok(features) => assert_eq!(Ok(features), Userfaultfd::offered(source())),
            Err(stop) => assert!(
                matches!(stop, OpenStop::NoDevice | OpenStop::DeviceDenied),
                "/dev/userfaultfd says {stop}"
            ),
        }
    }
}
