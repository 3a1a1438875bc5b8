//! What the merging thread does to itself, and what it asks about its process.

use super::{Call, Errno, checked, numbered, outcomes};
use std::time::Duration;

outcomes! {
    /// Why this thread has no descriptor table of its own.
    pub(crate) enum TableStop {
        /// Not in this kernel (before Linux 5.11), or kept away by a seccomp filter.
        Missing = ENOSYS,
        /// A security policy forbids it.
        Forbidden = EPERM,
        /// The kernel does not know the flag.
        Invalid = EINVAL,
        /// No memory.
        NoMemory = ENOMEM,
        /// Too many open files.
        TooManyFiles = EMFILE,
    }
}

/// Gives the calling thread a descriptor table of its own, without any of the program's files.
///
/// Programs close descriptors that they do not know; a number that is reused for another file would
/// then be written to. In a table of our own nobody else can close anything. The standard streams
/// are replaced by `/dev/null`: held open here, they would keep the other end of a pipe from seeing
/// its end after the program has closed them. Threads that this one spawns share its table.
///
/// # Errors
/// [`TableStop`]. The thread must then end: its descriptors may be gone.
///
/// # Safety
/// No value that owns or borrows a descriptor may be used on this thread, or on threads spawned by
/// it, unless it was made here after this call.
pub(crate) unsafe fn own_descriptor_table() -> Result<(), TableStop> {
    let flags = libc::CLOSE_RANGE_UNSHARE;
    checked(Call::CloseRange, || {
        // SAFETY: first leaves the table that is shared with the program, then closes in the new
        // one only; that nobody relies on what is closed is our caller's promise.
        unsafe { libc::syscall(libc::SYS_close_range, 0, u32::MAX, flags) }
    })
    .map_err(TableStop::decode)?;
    for _ in 0..3 {
        // Anything will do that keeps 0, 1 and 2 from becoming one of our files, at which a stray
        // message to standard error would be written.
        let null = checked(Call::OpenNull, || {
            // SAFETY: the path is a C string.
            i64::from(unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR) })
        });
        null.or_else(|_| {
            checked(Call::MemfdNull, || {
                // SAFETY: the name is a C string.
                unsafe { libc::syscall(libc::SYS_memfd_create, c"null".as_ptr(), 0) }
            })
        })
        .map_err(TableStop::decode)?;
    }
    Ok(())
}

/// The head of a thread's list of robust mutexes, which the C library keeps beside the thread's own
/// data: on its stack's mapping, as a rule. `None` when it has none, or has ended.
///
/// # Errors
/// When it may not be asked.
pub(crate) fn robust_list_head(thread: i32) -> Result<Option<usize>, Errno> {
    let (mut head, mut size) = (0_usize, 0_usize);
    let got = checked(Call::GetRobustList, || {
        let (head, size) = (&raw mut head, &raw mut size);
        // SAFETY: the kernel writes one pointer and one size, to ours.
        unsafe { libc::syscall(libc::SYS_get_robust_list, thread, head, size) }
    });
    match got {
        Err(stop) if stop.raw() != libc::ESRCH => Err(stop),
        _ => Ok((head != 0).then_some(head)),
    }
}

/// Whether the mapping at `address` has a memory policy of its own (`mbind`). Without NUMA nothing
/// has.
pub(crate) fn has_memory_policy(address: usize) -> bool {
    const MPOL_F_ADDR: u32 = 2;
    const MPOL_DEFAULT: i32 = 0;
    let mut mode: i32 = MPOL_DEFAULT;
    let nodes = std::ptr::null_mut::<libc::c_ulong>();
    let got = checked(Call::GetMempolicy, || {
        let mode = &raw mut mode;
        // SAFETY: the kernel writes one int, to ours; no mask of nodes is asked for.
        unsafe {
            libc::syscall(
                libc::SYS_get_mempolicy,
                mode,
                nodes,
                0,
                address,
                MPOL_F_ADDR,
            )
        }
    });
    got.is_ok() && mode != MPOL_DEFAULT
}

/// A limit of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Resource {
    /// Size of a file, in bytes. Beyond it `SIGXFSZ` kills the program.
    FileSize,
    /// Bytes of the main thread's stack, and what other threads get unless they ask otherwise.
    Stack,
}

/// The limit now in force, or `None` for none.
///
/// # Errors
/// None that is known.
pub(crate) fn limit(resource: Resource) -> Result<Option<u64>, Errno> {
    let which = match resource {
        Resource::FileSize => libc::RLIMIT_FSIZE,
        Resource::Stack => libc::RLIMIT_STACK,
    };
    let mut got = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    checked(Call::Getrlimit, || {
        // SAFETY: the kernel writes one `rlimit`, to ours.
        i64::from(unsafe { libc::getrlimit(which, &raw mut got) })
    })?;
    Ok((got.rlim_cur != libc::RLIM_INFINITY).then_some(got.rlim_cur))
}

/// The calling thread's number.
#[cfg(test)]
pub(crate) fn thread_id() -> i32 {
    // SAFETY: asks for a number.
    let got = unsafe { libc::syscall(libc::SYS_gettid) };
    i32::try_from(got).expect("thread numbers are ints")
}

/// CPU time that the calling thread has used.
pub(crate) fn thread_cpu_time() -> Duration {
    clock(libc::CLOCK_THREAD_CPUTIME_ID)
}

fn clock(which: libc::clockid_t) -> Duration {
    let mut got = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let done = checked(Call::ClockGettime, || {
        // SAFETY: the kernel writes one `timespec`, to ours.
        i64::from(unsafe { libc::clock_gettime(which, &raw mut got) })
    });
    // The clocks named above exist in every kernel, so the call cannot fail; zero would be harmless.
    let _ = done;
    Duration::new(
        u64::try_from(got.tv_sec).unwrap_or(0),
        u32::try_from(got.tv_nsec).unwrap_or(0),
    )
}

/// While it lives, no signal is delivered to the calling thread; afterwards all is as before.
#[derive(Debug)]
pub(crate) struct SignalsBlocked {
    before: libc::sigset_t,
    /// The mask belongs to one thread.
    stays: std::marker::PhantomData<*mut ()>,
}

impl SignalsBlocked {
    /// Blocks all signals that can be blocked.
    ///
    /// # Errors
    /// None that is known.
    pub(crate) fn new() -> Result<Self, Errno> {
        // SAFETY: all zero is a valid signal set, which is plain data.
        let mut all: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: writes one signal set, to ours.
        unsafe { libc::sigfillset(&raw mut all) };
        let before = mask(libc::SIG_SETMASK, &all)?;
        Ok(Self {
            before,
            stays: std::marker::PhantomData,
        })
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // It can fail only for a wrong first argument.
        let _ = mask(libc::SIG_SETMASK, &self.before);
    }
}

fn mask(how: i32, set: &libc::sigset_t) -> Result<libc::sigset_t, Errno> {
    // SAFETY: all zero is a valid signal set, which is plain data.
    let mut before: libc::sigset_t = unsafe { std::mem::zeroed() };
    numbered(Call::Sigmask, || {
        // SAFETY: reads one signal set and writes one, both ours.
        unsafe { libc::pthread_sigmask(how, set, &raw mut before) }
    })?;
    Ok(before)
}

/// A number that nobody can guess.
///
/// # Errors
/// None that is known, once the system has started.
pub(crate) fn random_u64() -> Result<u64, Errno> {
    let mut number: u64 = 0;
    checked(Call::Getrandom, || {
        let into = (&raw mut number).cast::<libc::c_void>();
        // SAFETY: the kernel writes 8 bytes, to `number`. (So few come all at once or not at all.)
        unsafe { libc::syscall(libc::SYS_getrandom, into, 8, 0) }
    })?;
    Ok(number)
}

/// Lets another thread run.
pub(crate) fn give_way() {
    // SAFETY: has no arguments and does not fail on Linux.
    let _ = unsafe { libc::sched_yield() };
}

/// Has `prepare` called before each fork of the program, then `parent` in the parent and `child` in
/// the child. There is no way to take it back.
///
/// # Errors
/// No memory.
///
/// # Safety
/// The functions stay where they are for as long as the process lives (the library is never
/// unloaded), and `child` does only what is allowed between fork and exec in a program with
/// threads: no allocation, no lock that another thread may hold.
pub(crate) unsafe fn at_fork(
    prepare: extern "C" fn(),
    parent: extern "C" fn(),
    child: extern "C" fn(),
) -> Result<(), Errno> {
    unsafe extern "C" {
        fn pthread_atfork(
            prepare: extern "C" fn(),
            parent: extern "C" fn(),
            child: extern "C" fn(),
        ) -> i32;
    }
    numbered(Call::Atfork, || {
        // SAFETY: our caller's promise.
        unsafe { pthread_atfork(prepare, parent, child) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::memfd::Memfd;
    use std::os::fd::AsRawFd;
    use std::sync::mpsc;

    #[test]
    fn own_table_hides_our_files_from_the_program_and_its_from_us() {
        let theirs = std::fs::File::open("/proc/self/stat").unwrap();
        let number = theirs.as_raw_fd();
        let (go, going) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            // SAFETY: this thread owns no descriptor yet.
            unsafe { own_descriptor_table() }.unwrap();
            // SAFETY: asks for the flags of a number, open or not.
            let open = unsafe { libc::fcntl(number, libc::F_GETFD) } != -1;
            let ours = Memfd::create(c"pagemerge-own-table", 4096).unwrap();
            tell.send((ours.raw(), open)).unwrap();
            going.recv().unwrap();
            assert_eq!((ours.len(), ours.allocated_bytes().unwrap()), (4096, 0));
        });
        let (ours, theirs_open) = told.recv().unwrap();
        assert!(
            !theirs_open,
            "the program's file {number} is open in our table"
        );
        assert!(ours > 2, "a standard stream became one of our files");
        let visible = std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .flatten()
            .any(|entry| {
                std::fs::read_link(entry.path())
                    .is_ok_and(|target| target.to_string_lossy().contains("pagemerge-own-table"))
            });
        assert!(!visible, "the program can see, and so close, our file");
        go.send(()).unwrap();
        thread.join().unwrap();
    }

    #[test]
    fn robust_list_of_a_thread_is_found_and_of_a_wrong_one_is_an_error() {
        let own = robust_list_head(thread_id()).unwrap();
        assert!(
            own.is_some_and(|head| head != 0),
            "the C library gives each thread a list"
        );
        assert_eq!(robust_list_head(i32::MAX), Ok(None));
    }

    #[test]
    fn blocked_signals_are_delivered_afterwards_only() {
        let pending = || {
            // SAFETY: all zero is a valid signal set.
            let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
            // SAFETY: writes one signal set, to ours.
            assert_eq!(unsafe { libc::sigpending(&raw mut set) }, 0);
            // SAFETY: reads one signal set, ours.
            unsafe { libc::sigismember(&raw const set, libc::SIGURG) == 1 }
        };
        std::thread::spawn(move || {
            let blocked = SignalsBlocked::new().unwrap();
            // SAFETY: SIGURG is ignored unless somebody handles it.
            unsafe { libc::raise(libc::SIGURG) };
            let blocked_now = pending();
            drop(blocked);
            // An ignored signal is not even kept pending, unless it is blocked when it comes.
            assert!(blocked_now && !pending());
        })
        .join()
        .unwrap();
    }

    #[test]
    fn thread_time_grows_with_work_and_not_with_sleep() {
        let (started, before) = (std::time::Instant::now(), thread_cpu_time());
        std::thread::sleep(Duration::from_millis(50));
        let slept = thread_cpu_time().saturating_sub(before);
        assert!(
            slept < started.elapsed() / 2,
            "{slept:?} of CPU time for a sleep"
        );
        let mut x = 1_u64;
        for _ in 0..10_000_000 {
            x = std::hint::black_box(x.wrapping_mul(3));
        }
        assert!(thread_cpu_time() > before + slept);
    }

    #[test]
    fn random_numbers_differ() {
        assert_ne!(random_u64().unwrap(), random_u64().unwrap());
    }

    #[test]
    fn limits_are_read() {
        assert!(
            limit(Resource::Stack)
                .unwrap()
                .is_none_or(|bytes| bytes > 0)
        );
        assert!(
            limit(Resource::FileSize)
                .unwrap()
                .is_none_or(|bytes| bytes > 0)
        );
    }
}
