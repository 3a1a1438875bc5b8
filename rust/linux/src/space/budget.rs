//! How many mappings may still be made: `vm.max_map_count`, less what is left to the program.
//!
//! The program makes mappings, too, while we merge, and only counting tells. So after every three eighths
//! of the reserve that we have used there is a count, and an eighth is for what is reckoned and not counted
//! (a twentieth of the reserve was missing once): what the program finds when it needs mappings is half of its
//! reserve at least, however many it has made meanwhile (but for two seconds after a count, at most, where
//! the next pass does not begin with one).
//!
//! Nearly all mappings of a process that merges much lie in what it has registered, and are known: so what is
//! counted is, as a rule, what lies outside. Everything is counted when half of what was free then has
//! been used. (A program that cuts its registered memory into pieces itself is noticed then.)
//!
//! # Cost
//! A count takes 0.4 us for each mapping, so where nobody needs room one is made at most so often that it
//! takes a hundredth of the time.

use crate::mappings;
use crate::probe::capabilities;
use std::time::{Duration, Instant};

/// So many may be made between two counts, however small the reserve.
const STEP: u64 = 500;

/// What counting one mapping takes, for counts that have not been made yet.
const EACH: Duration = Duration::from_nanos(400);

/// Counts mappings outside of what is registered, if that can be done.
pub(super) type Outside<'a> = &'a dyn Fn() -> Option<u64>;

/// How many mappings may still be made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Budget {
    max: u64,
    reserved: u64,
    /// Counted, plus what we have added since.
    pub(super) used: u64,
    /// Where `used` stood after the last count.
    counted: u64,
    /// The same, of the last count of everything.
    counted_all: u64,
    /// Mappings outside of what is registered, at the last count.
    outside: Option<u64>,
    /// A count has found no room; counting again waits for the next pass.
    exhausted: bool,
    /// The count is of an earlier pass.
    doubtful: bool,
    /// When the last count was over, and how long it took.
    at: Instant,
    took: Duration,
}

impl Budget {
    pub(super) fn new(reserved: Option<u64>) -> Self {
        let max = capabilities().max_map_count;
        let mut budget = Self {
            max,
            reserved: 0,
            used: 0,
            counted: 0,
            counted_all: 0,
            outside: None,
            exhausted: false,
            doubtful: false,
            at: Instant::now(),
            took: Duration::ZERO,
        };
        budget.reserve(reserved);
        budget.recount(&|| None);
        budget
    }

    pub(super) fn reserve(&mut self, reserved: Option<u64>) {
        self.reserved = reserved
            .unwrap_or_else(|| (self.max / 10).max(1000))
            .min(self.max);
    }

    pub(super) fn allowed(&self) -> u64 {
        self.max - self.reserved
    }

    /// The program may have made any number since: whoever needs room counts first.
    pub(super) fn doubt(&mut self) {
        self.doubtful = true;
        self.exhausted = false;
    }

    /// Whether counting now takes no more than a hundredth of the time.
    fn may_count(&self) -> bool {
        let added = self.used.saturating_sub(self.counted);
        let added = u32::try_from(added).unwrap_or(u32::MAX);
        self.at.elapsed() >= (self.took + EACH.saturating_mul(added)).saturating_mul(100)
    }

    /// Counts, unless that has just been done.
    pub(super) fn count_for_stats(&mut self, outside: Outside<'_>) {
        if self.may_count() {
            self.recount(outside);
        }
    }

    /// Something that was outside is not any more.
    pub(super) fn forget_outside(&mut self) {
        self.outside = None;
    }

    /// Counts what lies outside. Says whether that could be done, and was done before.
    fn recount_outside(&mut self, outside: Outside<'_>) -> bool {
        let Some((before, now)) = self.outside.zip(outside()) else {
            return false;
        };
        self.used = (self.used + now).saturating_sub(before);
        self.counted = self.used;
        self.outside = Some(now);
        true
    }

    fn recount(&mut self, outside: Outside<'_>) {
        let begun = Instant::now();
        // What cannot be counted is taken as it was.
        if let Ok(now) = mappings::count() {
            self.used = now;
        }
        (self.counted, self.counted_all) = (self.used, self.used);
        self.outside = outside();
        self.exhausted = false;
        self.doubtful = false;
        self.at = Instant::now();
        self.took = self.at.duration_since(begun);
    }

    /// Whether so many more may be made. `outside` counts what lies outside of what is registered.
    pub(super) fn has_room(&mut self, needed: u64, outside: Outside<'_>) -> bool {
        if self.doubtful && self.may_count() {
            self.recount(outside);
        }
        // Half of all mappings would have to be new since.
        if self.doubtful && self.used > self.allowed() / 2 {
            if !self.recount_outside(outside) {
                self.recount(outside);
            }
            self.doubtful = false;
        }
        let step = (self.reserved / 8 * 3).max(STEP);
        let fits = |budget: &Self| {
            let since_count = budget.used.saturating_sub(budget.counted);
            budget.used + needed <= budget.allowed() && since_count + needed <= step
        };
        if fits(self) {
            return true;
        }
        if self.exhausted {
            return false;
        }
        let free = self.allowed().saturating_sub(self.counted_all);
        let since_all = self.used.saturating_sub(self.counted_all);
        if since_all + needed <= free / 2 && self.recount_outside(outside) && fits(self) {
            return true;
        }
        self.recount(outside);
        self.exhausted = self.used + needed > self.allowed();
        !self.exhausted
    }
}
