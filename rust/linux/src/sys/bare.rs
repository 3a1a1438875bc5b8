//! Threads made by the C library alone.
//!
//! A thread of the standard library maps a stack for signal handlers as it begins, and ends the whole
//! program when it cannot: at the limit of mappings or of memory, or under a filter that was
//! installed later, the C library may still have a used stack to give, and the program would die of a
//! thread that it did not ask for. These threads have no such stack. (An overflow of their own stack
//! ends the program without a message, then; they need little of it.)
//!
//! # Invariants
//! * A panic does not leave the body: it ends the thread, as in the standard library.

use std::ffi::{CString, c_void};
use std::io;
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

/// As the standard library has it.
const STACK_BYTES: usize = 2 << 20;

/// Whoever drops it leaves the thread to itself.
#[derive(Debug)]
pub(crate) struct Thread {
    id: libc::pthread_t,
    joined: bool,
}

struct Start {
    name: CString,
    body: Box<dyn FnOnce() + Send>,
}

extern "C" fn run(start: *mut c_void) -> *mut c_void {
    // SAFETY: made by `Box::into_raw` in `Thread::spawn`, and given to this thread alone.
    let start = unsafe { Box::from_raw(start.cast::<Start>()) };
    let Start { name, body } = *start;
    // SAFETY: asks for nothing.
    let own = unsafe { libc::pthread_self() };
    // SAFETY: a thread that is alive, and text that ends. A name that is too long is refused, and the
    // thread keeps its parent's.
    let _ = unsafe { libc::pthread_setname_np(own, name.as_ptr()) };
    // The panic has been printed already.
    let _ = catch_unwind(AssertUnwindSafe(body));
    ptr::null_mut()
}

impl Thread {
    /// Starts one.
    ///
    /// # Errors
    /// When threads, memory or mappings are used up.
    pub(crate) fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let start = Box::into_raw(Box::new(Start {
            name: CString::new(name)?,
            body: Box::new(body),
        }));
        let mut attributes = MaybeUninit::<libc::pthread_attr_t>::uninit();
        // SAFETY: initialises what it is given.
        let made = unsafe { libc::pthread_attr_init(attributes.as_mut_ptr()) };
        assert_eq!(made, 0, "thread attributes need no memory");
        // It fails only for too little; then the C library's own choice has to do.
        // SAFETY: initialised above.
        let _ = unsafe { libc::pthread_attr_setstacksize(attributes.as_mut_ptr(), STACK_BYTES) };
        let mut id = 0;
        // SAFETY: all that is pointed to is live. `start` is the new thread's from here on, if there
        // is one.
        let got = unsafe {
            libc::pthread_create(
                &raw mut id,
                attributes.as_ptr(),
                run,
                start.cast::<c_void>(),
            )
        };
        // SAFETY: initialised above, used no more.
        let _ = unsafe { libc::pthread_attr_destroy(attributes.as_mut_ptr()) };
        if got == 0 {
            return Ok(Self { id, joined: false });
        }
        // SAFETY: made above; no thread has it.
        drop(unsafe { Box::from_raw(start) });
        Err(io::Error::from_raw_os_error(got))
    }

    /// Waits for its end.
    pub(crate) fn join(mut self) {
        self.joined = true;
        // SAFETY: it was not joined before, since that takes the handle, nor detached.
        let got = unsafe { libc::pthread_join(self.id, ptr::null_mut()) };
        debug_assert_eq!(got, 0, "a thread of ours that is not this one");
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        if !self.joined {
            // SAFETY: neither joined nor detached before.
            let _ = unsafe { libc::pthread_detach(self.id) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc;

    #[test]
    fn thread_has_its_name_and_ends_before_its_join() {
        let done = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&done);
        let thread = Thread::spawn("bare-test", move || {
            let name = std::fs::read_to_string("/proc/thread-self/comm").unwrap();
            assert_eq!(name.trim(), "bare-test");
            count.fetch_add(1, Ordering::SeqCst);
        });
        thread.unwrap().join();
        assert_eq!(done.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn panic_ends_the_thread_and_nothing_else() {
        Thread::spawn("bare-panic", || panic!("on purpose"))
            .unwrap()
            .join();
    }

    #[test]
    fn dropped_thread_goes_on() {
        let (tell, told) = mpsc::channel();
        drop(Thread::spawn("bare-alone", move || tell.send(7).unwrap()));
        assert_eq!(told.recv().unwrap(), 7);
    }
}
