//! Failures on purpose: makes a system call of [`super`] fail as if the kernel had refused it.
//!
//! The tests of what lies above need to see every error path; the kernel shows most of them once
//! in a million windows. A plan is one per call name, for the whole process, in atomics: it can be
//! armed from a test's thread while the merging thread works, and costs no lock.

use super::{Call, Errno};
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};

#[derive(Debug)]
struct Plan {
    errno: AtomicI32,
    /// Calls still let through before the first failure.
    skip: AtomicU32,
    /// Calls still to fail.
    times: AtomicU32,
    /// Calls made since the process began, failed on purpose or not.
    seen: AtomicU64,
}

/// More than there are calls.
const PLACES: usize = 64;

static PLANS: [Plan; PLACES] = [const {
    Plan {
        errno: AtomicI32::new(0),
        skip: AtomicU32::new(0),
        times: AtomicU32::new(0),
        seen: AtomicU64::new(0),
    }
}; PLACES];

/// Lets the next `skip` calls of the name `call` pass, then makes `times` of them fail with `errno`.
///
/// # Panics
/// When no call has that name.
pub fn arm(call: &str, errno: i32, skip: u32, times: u32) {
    let plan = plan(call);
    plan.times.store(0, Ordering::SeqCst);
    plan.errno.store(errno, Ordering::SeqCst);
    plan.skip.store(skip, Ordering::SeqCst);
    plan.times.store(times, Ordering::SeqCst);
}

/// Takes every plan back.
pub fn disarm_all() {
    for plan in &PLANS {
        plan.times.store(0, Ordering::SeqCst);
    }
}

/// How often a call was made, so that a test can prove that its failure was really met.
///
/// # Panics
/// When no call has that name.
pub fn seen(call: &str) -> u64 {
    plan(call).seen.load(Ordering::SeqCst)
}

/// The names of all calls.
pub fn calls() -> impl Iterator<Item = &'static str> {
    Call::NAMED.iter().map(|(name, _)| *name)
}

fn plan(name: &str) -> &'static Plan {
    let call = Call::NAMED.iter().find(|(known, _)| *known == name);
    let (_, call) = call.unwrap_or_else(|| panic!("no call is named {name}"));
    &PLANS[*call as usize]
}

/// The failure that takes this call's place, if one is due.
pub(super) fn forced(call: Call) -> Option<Errno> {
    let plan = &PLANS[call as usize];
    plan.seen.fetch_add(1, Ordering::SeqCst);
    if plan.times.load(Ordering::SeqCst) == 0 {
        return None;
    }
    let passes = plan
        .skip
        .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
    if passes.is_ok() {
        return None;
    }
    plan.times
        .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1))
        .is_ok()
        .then(|| Errno(plan.errno.load(Ordering::SeqCst)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::checked;

    #[test]
    fn armed_call_fails_after_the_skipped_ones_and_then_works_again() {
        let before = seen("Nothing");
        arm("Nothing", libc::ENOSYS, 1, 1);
        let results: Vec<_> = (0..3).map(|n| checked(Call::Nothing, || n)).collect();
        assert_eq!(results, [Ok(0), Err(Errno(libc::ENOSYS)), Ok(2)]);
        assert_eq!(seen("Nothing"), before + 3);
        arm("Nothing", libc::ENOSYS, 0, 1);
        disarm_all();
        assert_eq!(checked(Call::Nothing, || 3), Ok(3));
    }
}
