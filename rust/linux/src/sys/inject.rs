//! Faults on purpose: makes the calls of [`super`] fail, do half, dawdle or panic, as if the kernel (or
//! a bug of ours) had done so.
//!
//! The tests of what lies above need to see every error path; the kernel shows most of them once in
//! a million windows. Every call goes through [`super::checked`] or one of its kin, and every phase of
//! the engine's work through [`super::phase::enter`], so this is the one place that has to know.
//!
//! # Plans
//! A [`Plan`] names a call, perhaps the phase in which it is made, how many of them pass first, how
//! many are struck, and the [`Effect`]. Plans are for the whole process and made of atomics: they can be
//! armed from a test's thread while the merging thread works, and cost no lock and no allocation in a
//! window.
//!
//! # What an effect may be
//! Only what the kernel could have done. A partial result is made by shortening the request and then
//! returning the kernel's real answer to it; what fails has not been done, unless the plan says
//! [`Effect::Lie`]: then it has been done in full, and the report is false. (Linux 6.18 lies like
//! that about `UFFDIO_MOVE`, with EEXIST.)
//!
//! # The table
//! How often each call was passed in each phase, and how often it was struck there: [`table`].

use super::phase::Phase;
use super::{Call, Errno};
use std::cell::Cell;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// What happens to a call that a plan strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It is not made, and fails with this error number.
    Fail(i32),
    /// It is made, whatever comes of it is there, and it is reported to have failed like this.
    Lie(i32),
    /// It is asked for one part in so many only. (Calls without a length are not changed.)
    Short(u32),
    /// So many microseconds pass before it is made.
    DelayBefore(u32),
    /// So many microseconds pass after it was made.
    DelayAfter(u32),
    /// A panic before it is made.
    PanicBefore,
    /// A panic after it was made.
    PanicAfter,
    /// It is not made, the function armed with [`on_strike`] is called instead, and it fails like
    /// this.
    Instead(i32),
}

impl Effect {
    fn code(self) -> (u32, i32) {
        #[allow(clippy::cast_possible_wrap, reason = "the bits are what counts")]
        match self {
            Self::Fail(errno) => (1, errno),
            Self::Lie(errno) => (2, errno),
            Self::Short(parts) => (3, parts as i32),
            Self::DelayBefore(micros) => (4, micros as i32),
            Self::DelayAfter(micros) => (5, micros as i32),
            Self::PanicBefore => (6, 0),
            Self::PanicAfter => (7, 0),
            Self::Instead(errno) => (8, errno),
        }
    }

    fn decode(kind: u32, number: i32) -> Option<Self> {
        Some(match kind {
            1 => Self::Fail(number),
            2 => Self::Lie(number),
            3 => Self::Short(number.cast_unsigned()),
            4 => Self::DelayBefore(number.cast_unsigned()),
            5 => Self::DelayAfter(number.cast_unsigned()),
            6 => Self::PanicBefore,
            7 => Self::PanicAfter,
            8 => Self::Instead(number),
            _ => return None,
        })
    }
}

/// Which calls are struck, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The call's name.
    pub call: &'static str,
    /// Only in this phase, or in any.
    pub phase: Option<&'static str>,
    /// What happens.
    pub effect: Effect,
    /// Calls that pass first.
    pub skip: u32,
    /// Calls that are struck then.
    pub times: u32,
}

#[derive(Debug)]
struct Slot {
    call: AtomicUsize,
    phase: AtomicUsize,
    kind: AtomicU32,
    number: AtomicI32,
    skip: AtomicU32,
    times: AtomicU32,
}

const ANY: usize = usize::MAX;
/// Plans at once.
const SLOTS: usize = 16;
/// More than there are calls.
const CALLS: usize = 96;
/// More than there are phases.
const PHASES: usize = 48;

static SLOT: [Slot; SLOTS] = [const {
    Slot {
        call: AtomicUsize::new(ANY),
        phase: AtomicUsize::new(ANY),
        kind: AtomicU32::new(0),
        number: AtomicI32::new(0),
        skip: AtomicU32::new(0),
        times: AtomicU32::new(0),
    }
}; SLOTS];

/// Calls made and calls struck, by call and phase, since the process began.
static PASSED: [[AtomicU64; PHASES]; CALLS] =
    [const { [const { AtomicU64::new(0) }; PHASES] }; CALLS];
static STRUCK: [[AtomicU64; PHASES]; CALLS] =
    [const { [const { AtomicU64::new(0) }; PHASES] }; CALLS];
static STRIKES: AtomicU64 = AtomicU64::new(0);
static INSTEAD: AtomicPtr<()> = AtomicPtr::new(std::ptr::null_mut());

thread_local! {
    static PHASE: Cell<Phase> = const { Cell::new(Phase::Elsewhere) };
    /// The last call on this thread was reported falsely.
    static LIED: Cell<bool> = const { Cell::new(false) };
}

/// Lets the next `skip` calls of the name `call` pass, then makes `times` of them fail with `errno`.
/// Takes the place of a failure that was armed for that call before.
///
/// # Panics
/// When no call has that name.
pub fn arm(call: &'static str, errno: i32, skip: u32, times: u32) {
    let number = number(call);
    for slot in &SLOT {
        if slot.call.load(Ordering::SeqCst) == number {
            slot.times.store(0, Ordering::SeqCst);
        }
    }
    let effect = Effect::Fail(errno);
    arm_plan(&Plan {
        call,
        phase: None,
        effect,
        skip,
        times,
    });
}

/// Arms a plan beside those that are armed already.
///
/// # Panics
/// When no call or phase has that name, or too many plans are under way.
pub fn arm_plan(plan: &Plan) {
    let (kind, value) = plan.effect.code();
    let phase = plan.phase.map_or(ANY, |name| Phase::named(name) as usize);
    let free = SLOT
        .iter()
        .find(|slot| slot.times.load(Ordering::SeqCst) == 0);
    let slot = free.expect("fewer plans than slots are under way");
    slot.call.store(number(plan.call), Ordering::SeqCst);
    slot.phase.store(phase, Ordering::SeqCst);
    slot.kind.store(kind, Ordering::SeqCst);
    slot.number.store(value, Ordering::SeqCst);
    slot.skip.store(plan.skip, Ordering::SeqCst);
    slot.times.store(plan.times, Ordering::SeqCst);
}

/// What a call struck by [`Effect::Instead`] does in its place. Called on the engine's thread, perhaps
/// inside a window.
pub fn on_strike(act: fn()) {
    INSTEAD.store(act as *mut (), Ordering::SeqCst);
}

/// Takes every plan back.
pub fn disarm_all() {
    for slot in &SLOT {
        slot.times.store(0, Ordering::SeqCst);
        slot.call.store(ANY, Ordering::SeqCst);
    }
}

/// How often a call was made, so that a test can prove that its failure was really met.
///
/// # Panics
/// When no call has that name.
pub fn seen(call: &str) -> u64 {
    PASSED[number(call)]
        .iter()
        .map(|n| n.load(Ordering::SeqCst))
        .sum()
}

/// How many calls were struck since the process began.
pub fn strikes() -> u64 {
    STRIKES.load(Ordering::SeqCst)
}

/// The names of all calls.
pub fn calls() -> impl Iterator<Item = &'static str> {
    Call::NAMED.iter().map(|(name, _)| *name)
}

/// The names of all phases.
pub fn phases() -> impl Iterator<Item = &'static str> {
    Phase::NAMED.iter().map(|(name, _)| *name)
}

/// Every call and phase that were met together: (call, phase, passed, struck).
pub fn table() -> Vec<(&'static str, &'static str, u64, u64)> {
    let mut rows = Vec::new();
    for (call, number) in Call::NAMED {
        for (phase, at) in Phase::NAMED {
            let count = |of: &[[AtomicU64; PHASES]; CALLS]| {
                of[*number as usize][*at as usize].load(Ordering::SeqCst)
            };
            if count(&PASSED) > 0 {
                rows.push((*call, *phase, count(&PASSED), count(&STRUCK)));
            }
        }
    }
    rows
}

fn number(name: &str) -> usize {
    let call = Call::NAMED.iter().find(|(known, _)| *known == name);
    let (_, call) = call.unwrap_or_else(|| panic!("no call is named {name}"));
    *call as usize
}

/// From here on this thread works in `phase`. Returns the one before.
pub(super) fn set_phase(phase: Phase) -> Phase {
    PHASE.replace(phase)
}

/// Whether a plan for `call`, here and now, strikes; `wanted` says which effects are meant.
fn due(call: Call, wanted: impl Fn(Effect) -> bool) -> Option<Effect> {
    let phase = PHASE.get() as usize;
    SLOT.iter().find_map(|slot| {
        if slot.times.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let here = slot.phase.load(Ordering::SeqCst);
        if slot.call.load(Ordering::SeqCst) != call as usize || here != ANY && here != phase {
            return None;
        }
        let (kind, number) = (
            slot.kind.load(Ordering::SeqCst),
            slot.number.load(Ordering::SeqCst),
        );
        let effect = Effect::decode(kind, number).filter(|effect| wanted(*effect))?;
        let less = |n: u32| n.checked_sub(1);
        if slot
            .skip
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, less)
            .is_ok()
        {
            return None;
        }
        // For ever means for ever.
        let forever = slot.times.load(Ordering::SeqCst) == u32::MAX;
        if !forever
            && slot
                .times
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, less)
                .is_err()
        {
            return None;
        }
        STRUCK[call as usize][phase].fetch_add(1, Ordering::SeqCst);
        STRIKES.fetch_add(1, Ordering::SeqCst);
        Some(effect)
    })
}

/// Makes the call by `run`, or does to it what is planned. `errno_of` makes a failure of a number.
pub(super) fn around<T, E>(
    call: Call,
    run: impl FnOnce() -> Result<T, E>,
    failure: impl FnOnce(Errno) -> E,
) -> Result<T, E> {
    PASSED[call as usize][PHASE.get() as usize].fetch_add(1, Ordering::SeqCst);
    LIED.set(false);
    let pause = |micros: u32| std::thread::sleep(Duration::from_micros(micros.into()));
    match due(call, |effect| !matches!(effect, Effect::Short(_))) {
        None | Some(Effect::Short(_)) => run(),
        Some(Effect::Fail(errno)) => Err(failure(Errno(errno))),
        Some(Effect::Lie(errno)) => {
            let _ = run();
            LIED.set(true);
            Err(failure(Errno(errno)))
        }
        Some(Effect::DelayBefore(micros)) => {
            pause(micros);
            run()
        }
        Some(Effect::DelayAfter(micros)) => {
            let got = run();
            pause(micros);
            got
        }
        Some(Effect::PanicBefore) => panic!("injected panic before {call:?} in {:?}", PHASE.get()),
        Some(Effect::PanicAfter) => {
            let _ = run();
            panic!("injected panic after {call:?} in {:?}", PHASE.get())
        }
        Some(Effect::Instead(errno)) => {
            let act = INSTEAD.load(Ordering::SeqCst);
            assert!(
                !act.is_null(),
                "a function is armed for what happens instead"
            );
            // SAFETY: `on_strike` stores functions of this very type, and nothing else is ever
            // stored but null, which has just been ruled out.
            let act: fn() = unsafe { std::mem::transmute::<*mut (), fn()>(act) };
            act();
            Err(failure(Errno(errno)))
        }
    }
}

/// How much of `len` the call is to be asked for, in multiples of `unit`; at least one.
pub(super) fn shortened(call: Call, len: usize, unit: usize) -> usize {
    match due(call, |effect| matches!(effect, Effect::Short(_))) {
        Some(Effect::Short(parts)) => {
            let part = len / (parts as usize).max(1);
            (part / unit * unit).max(unit.min(len))
        }
        _ => len,
    }
}

/// What the last call on this thread says that it has done: nothing, if its failure is a lie.
pub(super) fn told(part: i64) -> i64 {
    if LIED.get() { part.min(0) } else { part }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{checked, phase};

    #[test]
    fn armed_call_is_struck_after_the_skipped_ones_and_then_works_again() {
        let before = seen("Nothing");
        arm("Nothing", libc::ENOSYS, 1, 1);
        let results: Vec<_> = (0..3).map(|n| checked(Call::Nothing, || n)).collect();
        assert_eq!(results, [Ok(0), Err(Errno(libc::ENOSYS)), Ok(2)]);
        assert_eq!(seen("Nothing"), before + 3);
        arm("Nothing", libc::ENOSYS, 0, 1);
        disarm_all();
        assert_eq!(checked(Call::Nothing, || 3), Ok(3));

        // In its phase only.
        let plan = |effect| Plan {
            call: "Nothing",
            phase: Some("Stats"),
            effect,
            skip: 0,
            times: 1,
        };
        arm_plan(&plan(Effect::Fail(libc::EIO)));
        assert_eq!(checked(Call::Nothing, || 4), Ok(4));
        let inside = phase::enter(Phase::Stats);
        assert_eq!(checked(Call::Nothing, || 5), Err(Errno(libc::EIO)));

        // A lie is told after the deed.
        let mut done = false;
        arm_plan(&plan(Effect::Lie(libc::EEXIST)));
        let got = checked(Call::Nothing, || {
            done = true;
            0
        });
        assert_eq!((got, done), (Err(Errno(libc::EEXIST)), true));
        assert_eq!((told(4096), told(-17)), (0, -17));

        arm_plan(&plan(Effect::Short(3)));
        assert_eq!(shortened(Call::Nothing, 1000, 8), 328);
        assert_eq!(shortened(Call::Nothing, 1000, 8), 1000);

        arm_plan(&plan(Effect::PanicAfter));
        let caught = std::panic::catch_unwind(|| checked(Call::Nothing, || 0));
        assert!(caught.is_err());
        drop(inside);
        arm_plan(&plan(Effect::Fail(libc::EIO)));
        assert_eq!(checked(Call::Nothing, || 6), Ok(6));
        disarm_all();
        let row = table()
            .into_iter()
            .find(|row| row.0 == "Nothing" && row.1 == "Stats");
        assert_eq!(row.map(|row| row.3), Some(4));
    }
}
