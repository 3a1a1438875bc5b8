//! Threads on stacks of the caller's choice.

#![allow(unsafe_code, reason = "the C library's threads")]
use std::mem::MaybeUninit;
use std::ptr;

extern "C" fn body(_: *mut libc::c_void) -> *mut libc::c_void {
    std::thread::sleep(std::time::Duration::from_millis(3));
    ptr::null_mut()
}

pub(crate) fn spawn(stack: usize, len: usize) -> libc::pthread_t {
    let mut attributes = MaybeUninit::uninit();
    // SAFETY: initialised by this call.
    unsafe { libc::pthread_attr_init(attributes.as_mut_ptr()) };
    let place = ptr::without_provenance_mut(stack);
    // SAFETY: the attributes are initialised; the memory is the test's and outlives the thread.
    let set = unsafe { libc::pthread_attr_setstack(attributes.as_mut_ptr(), place, len) };
    assert_eq!(set, 0, "the stack is accepted");
    let mut thread = 0;
    // SAFETY: all arguments are live; the body uses nothing.
    let made = unsafe {
        libc::pthread_create(&raw mut thread, attributes.as_ptr(), body, ptr::null_mut())
    };
    assert_eq!(made, 0, "a thread");
    thread
}

pub(crate) fn join(thread: libc::pthread_t) {
    // SAFETY: made by `spawn`, joined once.
    let joined = unsafe { libc::pthread_join(thread, ptr::null_mut()) };
    assert_eq!(joined, 0, "joined");
}
