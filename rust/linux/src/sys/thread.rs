//! Threads of our own: the merging thread with its own descriptor table, and its helper.

use super::bare::Thread;
use super::process::{self, SignalsBlocked, TableStop};
use super::uffd::{UffdHelper, Userfaultfd, Waker, WakerHelper};
use super::{Call, Errno, through};
use std::io;
use std::thread::{Builder, Scope, ScopedJoinHandle};

/// Starts a thread that no signal interrupts, and whose descriptor table holds nothing of the
/// program's. `body` learns whether the table could be made; if not, it must return at once.
///
/// # Errors
/// When no thread can be started.
pub(crate) fn spawn_isolated(
    name: &str,
    body: impl FnOnce(Result<(), TableStop>) + Send + 'static,
) -> io::Result<Thread> {
    spawn(Call::SpawnMerging, name, move || {
        // It cannot fail; if it did, a signal handler of the program would run here now and then.
        let _signals = SignalsBlocked::new();
        // SAFETY: this thread has just begun, and `body` owns nothing that borrows a descriptor of
        // the program's: it is `Send`, and what owns descriptors in this crate is not.
        let table = unsafe { process::own_descriptor_table() };
        body(table);
    })
}

/// Starts the helper of the calling thread, with which it shares its descriptor table. The helper
/// must have ended before `uffd` and `waker` are dropped: join it.
///
/// # Errors
/// When no thread can be started.
pub(crate) fn spawn_helper(
    name: &str,
    uffd: &Userfaultfd,
    waker: &Waker,
    body: impl FnOnce(&UffdHelper, &WakerHelper) + Send + 'static,
) -> io::Result<Thread> {
    // SAFETY: used on the thread spawned below only, which shares our table; `crate::watch` joins
    // it before it drops the descriptor.
    let uffd = unsafe { uffd.helper() };
    // SAFETY: as above.
    let waker = unsafe { waker.helper() };
    spawn(Call::SpawnHelper, name, move || {
        // As above.
        let _signals = SignalsBlocked::new();
        body(&uffd, &waker);
    })
}

fn spawn(call: Call, name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<Thread> {
    through(call, || Thread::spawn(name, body), io::Error::from)
}

/// Starts a thread for a part of the calling thread's work, within `scope`.
///
/// # Errors
/// When no thread can be started.
pub(crate) fn spawn_scoped<'scope, T: Send + 'scope>(
    name: &str,
    scope: &'scope Scope<'scope, '_>,
    body: impl FnOnce() -> T + Send + 'scope,
) -> io::Result<ScopedJoinHandle<'scope, T>> {
    let start = || Builder::new().name(name.into()).spawn_scoped(scope, body);
    through(Call::SpawnHashing, start, io::Error::from)
}

/// Has three functions called around every `fork()` of this process: before it, then in the parent,
/// then in the child. Raw `clone` calls, `vfork` and `posix_spawn` do not call them.
///
/// # Errors
/// No memory.
pub(crate) fn at_fork(
    prepare: extern "C" fn(),
    parent: extern "C" fn(),
    child: extern "C" fn(),
) -> Result<(), Errno> {
    // SAFETY: the merging thread runs code of this library for as long as the process lives, so
    // nobody can unload it; the only caller's functions (`crate::fork`) touch nothing but atomic
    // numbers.
    unsafe { process::at_fork(prepare, parent, child) }
}
