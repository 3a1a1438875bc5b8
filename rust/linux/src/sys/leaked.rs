//! A static that is set once in a while and never freed: for what must outlive every thread.
//!
//! A fork child inherits such a value without the thread that serves it. Dropping it there would
//! close, join or unlock things that the child does not have, so it is forgotten instead.

use std::marker::PhantomData;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Holds a leaked `T`, or nothing.
pub(crate) struct Leaked<T: 'static> {
    at: AtomicPtr<T>,
    /// It hands out shared references to a `T` on any thread.
    holds: PhantomData<&'static T>,
}

impl<T: Send + Sync> Leaked<T> {
    /// Nothing.
    pub(crate) const fn empty() -> Self {
        Self {
            at: AtomicPtr::new(ptr::null_mut()),
            holds: PhantomData,
        }
    }

    /// What it holds.
    pub(crate) fn get(&self) -> Option<&'static T> {
        let at = self.at.load(Ordering::Acquire);
        // SAFETY: `at` is null or comes from `Box::leak` in `set`: valid, shared and never freed.
        unsafe { at.as_ref() }
    }

    /// Has it hold `value`, for good. What it held before stays valid for those who have it.
    pub(crate) fn set(&self, value: T) {
        self.at.store(Box::leak(Box::new(value)), Ordering::Release);
    }

    /// Has it hold nothing. What it held is not dropped.
    pub(crate) fn forget(&self) {
        self.at.store(ptr::null_mut(), Ordering::Release);
    }
}

impl<T> std::fmt::Debug for Leaked<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let set = !self.at.load(Ordering::Relaxed).is_null();
        f.debug_struct("Leaked")
            .field("set", &set)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn value_can_be_set_seen_and_forgotten() {
        static HELD: Leaked<String> = Leaked::empty();
        assert!(HELD.get().is_none());
        HELD.set("one".into());
        let one = HELD.get().unwrap();
        HELD.set("two".into());
        assert_eq!(
            (one.as_str(), HELD.get().map(String::as_str)),
            ("one", Some("two"))
        );
        HELD.forget();
        assert!(HELD.get().is_none());
    }
}
