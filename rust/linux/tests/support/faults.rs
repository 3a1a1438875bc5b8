//! What each call of the floor may answer, by its manual page, and how faults are planned from it.
//!
//! The names of calls are those of `Call` in `src/sys/mod.rs`. Pages: section 2 and 3 of the Linux
//! man-pages (6.9 and later have one page for each userfaultfd ioctl), and the kernel's
//! `admin-guide/mm/pagemap.rst` and `userfaultfd.rst`. Where the page does not list what the kernel is
//! known to answer (ENOMEM of a write at a cgroup's limit, ENOSYS and EPERM of seccomp filters), it is
//! added. Error numbers that only a wrong program can get (EBADF, EFAULT for our own structures) are
//! left in where the page has them: a program may close our descriptors after all.

use libc::{
    E2BIG, EACCES, EAGAIN, EBADF, EBUSY, EDQUOT, EEXIST, EFAULT, EFBIG, EHWPOISON, EINTR, EINVAL,
    EIO, EISDIR, ELOOP, EMFILE, ENAMETOOLONG, ENFILE, ENODEV, ENOENT, ENOMEM, ENOSPC, ENOSYS,
    ENOTDIR, ENOTTY, ENXIO, EOPNOTSUPP, EOVERFLOW, EPERM, ESPIPE, ESRCH, ESTALE, ETXTBSY,
};

/// A call, the page that says how it may fail, and the error numbers.
pub(crate) struct Answers {
    pub(crate) call: &'static str,
    pub(crate) page: &'static str,
    pub(crate) errnos: &'static [i32],
}

macro_rules! answers {
    ($($call:literal $page:literal: $($errno:ident)*;)*) => {
        &[$(Answers { call: $call, page: $page, errnos: &[$($errno),*] }),*]
    };
}

pub(crate) const ANSWERS: &[Answers] = answers! {
    "MmapOwn" "mmap(2)": EACCES EAGAIN EBADF EINVAL ENFILE ENODEV ENOMEM EOVERFLOW EPERM;
    "MmapFile" "mmap(2)": EACCES EAGAIN EBADF EINVAL ENFILE ENODEV ENOMEM EOVERFLOW EPERM ETXTBSY;
    "MmapFrames" "mmap(2)": EACCES EAGAIN EBADF EINVAL ENFILE ENODEV ENOMEM EOVERFLOW EPERM ETXTBSY;
    "MmapFresh" "mmap(2)": EACCES EAGAIN EINVAL ENFILE ENODEV ENOMEM EOVERFLOW EPERM;
    "Munmap" "munmap(2)": EINVAL ENOMEM EPERM;
    "Mremap" "mremap(2)": EAGAIN EFAULT EINVAL ENOMEM EPERM;
    "MremapPages" "mremap(2)": EAGAIN EFAULT EINVAL ENOMEM EPERM;
    "MadviseDontNeed" "madvise(2)": EACCES EAGAIN EBADF EINVAL EIO ENOMEM EPERM;
    "MadviseCold" "madvise(2)": EACCES EAGAIN EBADF EINVAL EIO ENOMEM EPERM;
    "MadviseFork" "madvise(2)": EACCES EAGAIN EINVAL EIO ENOMEM EPERM;
    "MadviseDump" "madvise(2)": EACCES EAGAIN EINVAL EIO ENOMEM EPERM;
    "MadviseHuge" "madvise(2)": EACCES EAGAIN EINVAL EIO ENOMEM EPERM;
    "MadvisePopulate" "madvise(2)": EACCES EAGAIN EFAULT EINVAL EIO ENOMEM EPERM EHWPOISON;
    "Mincore" "mincore(2)": EAGAIN EFAULT EINVAL;
    "MemfdCreate" "memfd_create(2)": EFAULT EINVAL EMFILE ENFILE ENOMEM EPERM ENOSYS EACCES;
    "SealSize" "F_ADD_SEALS(2const)": EBUSY EINVAL EPERM EBADF;
    "SealWrite" "F_ADD_SEALS(2const)": EBUSY EINVAL EPERM EBADF;
    "Ftruncate" "ftruncate(2)": EBADF EFBIG EINTR EINVAL EIO EPERM ETXTBSY ENOMEM;
    "Fallocate" "fallocate(2)": EBADF EFBIG EINTR EINVAL EIO ENODEV ENOSPC ENOSYS EOPNOTSUPP EPERM ESPIPE ETXTBSY;
    "Fstat" "fstat(2)": EBADF EFAULT ENOMEM EOVERFLOW;
    "Pwrite" "write(2)": EAGAIN EBADF EDQUOT EFAULT EFBIG EINTR EINVAL EIO ENOSPC EPERM ENOMEM;
    "ProcessVmReadv" "process_vm_readv(2)": EFAULT EINVAL ENOMEM EPERM ESRCH ENOSYS;
    "Userfaultfd" "userfaultfd(2)": EINVAL EMFILE ENFILE ENOMEM EPERM ENOSYS;
    "OpenDevice" "open(2)": EACCES EINTR EMFILE ENFILE ENODEV ENOENT ENOMEM ENXIO EPERM;
    "UserfaultfdOfDevice" "userfaultfd(2)": EINVAL EMFILE ENFILE ENOMEM EPERM ENOTTY;
    "UffdApi" "UFFDIO_API(2const)": EFAULT EINVAL EPERM;
    "UffdRegister" "UFFDIO_REGISTER(2const)": EBUSY EFAULT EINVAL ENOMEM EPERM;
    "UffdUnregister" "UFFDIO_UNREGISTER(2const)": EINVAL EFAULT ENOMEM;
    "UffdMove" "UFFDIO_MOVE(2const)": EAGAIN EBUSY EEXIST EINVAL ENOENT ENOMEM ESRCH EFAULT;
    "UffdCopy" "UFFDIO_COPY(2const)": EAGAIN EEXIST EFAULT EINVAL ENOENT ENOMEM ENOSPC ESRCH;
    "UffdZeropage" "UFFDIO_ZEROPAGE(2const)": EAGAIN EEXIST EFAULT EINVAL ENOENT ENOMEM ESRCH;
    "UffdWriteprotect" "UFFDIO_WRITEPROTECT(2const)": EAGAIN EFAULT EINVAL ENOENT ENOMEM ESRCH;
    "UffdHelperWriteprotect" "UFFDIO_WRITEPROTECT(2const)": EAGAIN EFAULT EINVAL ENOENT ENOMEM ESRCH;
    "UffdWake" "UFFDIO_WAKE(2const)": EFAULT EINVAL;
    "UffdEnd" "dup(2)": EBADF EBUSY EINTR EINVAL EMFILE;
    "UffdRead" "userfaultfd(2), read(2)": EAGAIN EFAULT EINTR EINVAL EIO;
    "Poll" "poll(2)": EFAULT EINTR EINVAL ENOMEM EAGAIN;
    "Eventfd" "eventfd(2)": EINVAL EMFILE ENFILE ENODEV ENOMEM;
    "EventfdWrite" "eventfd(2), write(2)": EAGAIN EINTR;
    "EventfdRead" "eventfd(2), read(2)": EAGAIN EINTR EINVAL;
    // The last way out: where it is refused for good there is none, so that is not tried.
    "HelperDup" "dup(2)": EBADF EBUSY EINTR EINVAL EMFILE;
    "OpenPagemap" "open(2)": EACCES EINTR EMFILE ENFILE ENOENT ENOMEM EPERM;
    "PagemapScan" "PAGEMAP_SCAN(2const)": E2BIG EFAULT EINTR EINVAL ENOMEM ENOTTY EPERM;
    "PagemapRead" "read(2)": EAGAIN EFAULT EINTR EINVAL EIO ENOMEM ESRCH;
    "OpenProcmap" "open(2)": EACCES EINTR EMFILE ENFILE ENOENT ENOMEM EPERM;
    "ProcmapQuery" "PROCMAP_QUERY(2const)": E2BIG EFAULT EINTR EINVAL ENAMETOOLONG ENOTTY ESRCH;
    "MovePages" "move_pages(2)": E2BIG EACCES EFAULT EINVAL ENODEV ENOENT ENOMEM EPERM ESRCH ENOSYS;
    "GetMempolicy" "get_mempolicy(2)": EFAULT EINVAL ENOSYS EPERM;
    "CloseRange" "close_range(2)": EINVAL EMFILE ENOMEM ENOSYS EPERM;
    "OpenNull" "open(2)": EACCES EINTR EMFILE ENFILE ENODEV ENOENT ENOMEM ENXIO EPERM;
    "MemfdNull" "memfd_create(2)": EINVAL EMFILE ENFILE ENOMEM EPERM ENOSYS;
    "GetRobustList" "get_robust_list(2)": EFAULT EINVAL EPERM ESRCH ENOSYS;
    "Getrlimit" "getrlimit(2)": EFAULT EINVAL;
    "ClockGettime" "clock_gettime(2)": EACCES EFAULT EINVAL EPERM;
    "Sigmask" "pthread_sigmask(3)": EINVAL;
    "Getrandom" "getrandom(2)": EAGAIN EFAULT EINTR EINVAL ENOSYS;
    "Atfork" "pthread_atfork(3)": ENOMEM;
    "SpawnMerging" "pthread_create(3)": EAGAIN EINVAL EPERM;
    "SpawnHelper" "pthread_create(3)": EAGAIN EINVAL EPERM;
    "SpawnHashing" "pthread_create(3)": EAGAIN EINVAL EPERM;
    "FileText" "open(2), read(2)": EACCES EINTR EMFILE ENFILE ENOENT ENOMEM EIO EPERM ESRCH;
    "FileLink" "readlink(2)": EACCES EINVAL EIO ELOOP ENOENT ENOMEM ENOTDIR ESTALE;
    "FileMetadata" "stat(2)": EACCES ELOOP ENOENT ENOMEM ENOTDIR EOVERFLOW EIO;
    "FileOwnMetadata" "stat(2)": EACCES ELOOP ENOENT ENOMEM ENOTDIR EOVERFLOW EIO;
    "FileOpenMetadata" "stat(2)": EBADF ENOMEM EOVERFLOW EIO ESTALE;
    "FileOpen" "open(2)": EACCES EINTR EMFILE ENFILE ENOENT ENOMEM EPERM;
    "FileRead" "read(2)": EAGAIN EBADF EFAULT EINTR EINVAL EIO EISDIR ENOMEM ESRCH;
    "FileOpenWith" "open(2)": EACCES EINTR EMFILE ENFILE ENOENT ENOMEM EPERM ELOOP ESTALE;
    "FileReadAt" "read(2)": EAGAIN EBADF EFAULT EINTR EINVAL EIO EISDIR ESTALE;
    "Directory" "open(2), opendir(3)": EACCES EMFILE ENFILE ENOENT ENOMEM ENOTDIR EPERM;
    "DirectoryEntry" "getdents(2)": EBADF EFAULT EINVAL ENOENT ENOTDIR EIO;
    "Lseek" "lseek(2)": EBADF EINVAL ENXIO EOVERFLOW ESPIPE EIO;
};

/// Calls that may do a part of what they were asked for.
pub(crate) const PARTIAL: &[&str] = &[
    "UffdMove",
    "UffdCopy",
    "UffdZeropage",
    "Pwrite",
    "ProcessVmReadv",
    "PagemapScan",
    "PagemapRead",
    "FileRead",
    "FileReadAt",
];

/// Calls that may have done all or a part and still report a failure. Linux 6.18 answers EEXIST for
/// moves that it has made; the others work through a range, and fail in its middle.
pub(crate) const LIES: &[(&str, &[i32])] = &[
    ("UffdMove", &[EEXIST, EAGAIN, EBUSY, ENOENT, ENOMEM]),
    ("UffdCopy", &[EEXIST, EAGAIN]),
    ("UffdRegister", &[ENOMEM]),
    ("UffdUnregister", &[ENOMEM]),
    ("UffdWriteprotect", &[EAGAIN, EFAULT, ENOMEM]),
    ("UffdHelperWriteprotect", &[EAGAIN]),
    ("MadvisePopulate", &[ENOMEM, EAGAIN]),
    ("MadviseDontNeed", &[ENOMEM]),
    ("MadviseFork", &[ENOMEM]),
    ("MadviseHuge", &[ENOMEM]),
];
