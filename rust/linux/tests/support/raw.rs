//! Memory by address, and processes as odd as the kernel makes them: what the torture program needs
//! besides [`super::os`], whose head says why `unsafe` is here.

#![allow(unsafe_code, reason = "see the head of `os`")]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "system call arguments and results are registers"
)]

use super::os::{self, Child, call, page_size};
use std::ffi::c_void;
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;

/// Anonymous memory between two pages that nobody can touch; it stays until somebody unmaps it.
pub(crate) fn map(pages: usize, align: usize) -> usize {
    let (page, len) = (page_size(), pages * page_size());
    let flags = os::PRIVATE as usize;
    let around = [0, len + 2 * align.max(page), 0, flags, os::NONE, 0];
    let around = call(libc::SYS_mmap, &around).expect("address space");
    let addr = (around + page).next_multiple_of(align.max(page));
    map_at(addr, len);
    addr
}

/// Anonymous memory, perhaps right beside somebody else's.
pub(crate) fn map_anywhere(len: usize) -> usize {
    let flags = os::PRIVATE as usize;
    let at = [0, len, os::RW as usize, flags, os::NONE, 0];
    call(libc::SYS_mmap, &at).expect("memory for a test")
}

/// Fresh anonymous memory at a place that is ours already.
fn map_at(addr: usize, len: usize) {
    let flags = (os::PRIVATE | libc::MAP_FIXED) as usize;
    let at = [addr, len, os::RW as usize, flags, os::NONE, 0];
    let got = call(libc::SYS_mmap, &at).expect("memory for a test");
    assert_eq!(got, addr, "MAP_FIXED maps where it is told to");
}

/// Words that fork children share with their parent. They stay for ever.
pub(crate) fn shared_words(count: usize) -> &'static [AtomicU64] {
    let len = (count * 8).next_multiple_of(page_size());
    let flags = (libc::MAP_SHARED | libc::MAP_ANONYMOUS) as usize;
    let at = call(
        libc::SYS_mmap,
        &[0, len, os::RW as usize, flags, os::NONE, 0],
    );
    let at = std::ptr::without_provenance(at.expect("shared memory"));
    // SAFETY: mapped for good just now, aligned, zeroed, and used as atomics only.
    unsafe { std::slice::from_raw_parts(at, count) }
}

/// A word of mapped memory. (Its mapping may be replaced, by one that shows the same.)
pub(crate) fn word(addr: usize) -> &'static AtomicU64 {
    assert_eq!(addr % 8, 0, "a word is aligned");
    // SAFETY: the torture's arenas are mapped as long as anybody has claimed a page of them, and
    // those that anybody reads without a claim are mapped for good; used as an atomic only.
    unsafe { AtomicU64::from_ptr(std::ptr::without_provenance_mut(addr)) }
}

/// Copies bytes to mapped memory, as a program's `memcpy` does.
pub(crate) fn copy_in(addr: usize, bytes: &[u8]) {
    let to = std::ptr::without_provenance_mut(addr);
    // SAFETY: the caller has claimed these bytes of an arena, or they are his own shadow of it: they
    // are mapped and nobody else uses them.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
}

/// Copies bytes out of mapped memory.
pub(crate) fn copy_out(addr: usize, bytes: &mut [u8]) {
    let from = std::ptr::without_provenance(addr);
    // SAFETY: as for `copy_in`.
    unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
}

/// The exit code of a child (or `-signal`) if it has ended.
pub(crate) fn try_wait(child: &Child) -> Option<i32> {
    let mut status = 0_i32;
    let at = (&raw mut status).addr();
    let flags = libc::WNOHANG as usize;
    match call(libc::SYS_wait4, &[child.id() as usize, at, flags, 0]) {
        Ok(0) => None,
        Ok(_) if libc::WIFEXITED(status) => Some(libc::WEXITSTATUS(status)),
        Ok(_) => Some(-libc::WTERMSIG(status)),
        Err(e) if e.kind() == io::ErrorKind::Interrupted => None,
        Err(e) => panic!("wait for a child of ours: {e}"),
    }
}

/// Ends this process at once, without anybody's destructors.
pub(crate) fn leave_now(code: i32) -> ! {
    let _ = call(libc::SYS_exit_group, &[code as usize]);
    unreachable!("it has exited");
}

/// What the child of [`vfork_store`] does, and where.
struct Store {
    addr: usize,
    value: u64,
}

extern "C" fn store_and_leave(store: *mut c_void) -> i32 {
    // SAFETY: our parent is suspended and keeps it alive until we leave.
    let store = unsafe { &*store.cast::<Store>() };
    word(store.addr).store(store.value, std::sync::atomic::Ordering::Relaxed);
    0
}

/// Has a child that shares our memory, as `vfork` makes it, store a word. Returns when it has gone.
pub(crate) fn vfork_store(addr: usize, value: u64) -> io::Result<()> {
    let mut stack = vec![0_u64; 8192];
    let mut store = Store { addr, value };
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    let top = stack.as_mut_ptr_range().end.cast();
    // SAFETY: the stack is ours and outlives the child, since we are suspended until it has left; the
    // child stores one word and leaves.
    let id = unsafe { libc::clone(store_and_leave, top, flags, (&raw mut store).cast()) };
    if id < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut status = 0_i32;
    call(
        libc::SYS_wait4,
        &[id as usize, (&raw mut status).addr(), 0, 0],
    )?;
    assert!(
        libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0,
        "a child that shares our memory ended with {status:#x}"
    );
    Ok(())
}

/// Told of a fault: the address, and where the program was.
pub(crate) type OnFault = fn(usize, usize) -> !;

static ON_FAULT: OnceLock<OnFault> = OnceLock::new();

/// From here on a fault (SIGSEGV, SIGBUS) tells its story before it ends the process.
pub(crate) fn tell_faults(tell: OnFault) {
    ON_FAULT.set(tell).expect("set once");
    // SAFETY: a structure of numbers and flags, for which zero is a value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = fault as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESETHAND;
    for signal in [libc::SIGSEGV, libc::SIGBUS] {
        // SAFETY: the handler has the signature that SA_SIGINFO asks for, and never returns.
        let set = unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
        assert_eq!(set, 0, "a handler");
    }
}

extern "C" fn fault(_signal: i32, info: *const libc::siginfo_t, context: *const libc::ucontext_t) {
    // SAFETY: the kernel gives it to a handler for as long as that runs.
    let info = unsafe { &*info };
    // SAFETY: this, too.
    let context = unsafe { &*context };
    // SAFETY: a fault's information has an address.
    let addr = unsafe { info.si_addr() }.addr();
    #[cfg(target_arch = "x86_64")]
    let at = context.uc_mcontext.gregs[libc::REG_RIP as usize] as usize;
    #[cfg(not(target_arch = "x86_64"))]
    let at = usize::from(std::ptr::eq(context, std::ptr::null()));
    // A fault is a bug or a loss: the process is not used any more, so this may allocate.
    ON_FAULT.get().expect("set before the handler")(addr, at)
}
