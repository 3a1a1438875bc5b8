//! Free runs of numbered places: found by size, and joined with their neighbours.
//!
//! # Invariants
//! * Fr-1. Both maps hold the same runs. No two runs overlap, and two that touch are of two stretches.
//!
//! # Cost
//! A few steps in two trees; some 40 bytes a run.

use std::collections::{BTreeMap, BTreeSet};

/// What the nodes of two trees take for a run, about.
const RUN_BYTES: usize = 40;

#[derive(Debug, Default)]
pub(super) struct Free {
    by_place: BTreeMap<u32, u32>,
    by_size: BTreeSet<(u32, u32)>,
    pages: u64,
}

impl Free {
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    pub(super) fn metadata_bytes(&self) -> usize {
        self.by_place.len() * RUN_BYTES
    }

    /// The shortest run of at least so many: (first, count).
    pub(super) fn fitting(&self, count: u32) -> Option<(u32, u32)> {
        let (count, first) = self.by_size.range((count, 0)..).next()?;
        Some((*first, *count))
    }

    /// Takes the beginning of the shortest run that has as many.
    pub(super) fn take(&mut self, count: u32) -> Option<u32> {
        let (first, all) = self.fitting(count)?;
        self.remove(first);
        if all > count {
            self.put(first + count, all - count);
        }
        Some(first)
    }

    /// Takes the longest run.
    pub(super) fn take_longest(&mut self) -> Option<(u32, u32)> {
        let (count, first) = *self.by_size.last()?;
        self.remove(first);
        Some((first, count))
    }

    /// The run that ends right before `place`.
    pub(super) fn ending_at(&self, place: u32) -> Option<(u32, u32)> {
        let (first, count) = self.by_place.range(..place).next_back()?;
        (first + count == place).then_some((*first, *count))
    }

    /// Where the first run begins that is not before `place`.
    pub(super) fn at_or_after(&self, place: u32) -> Option<u32> {
        self.by_place.range(place..).next().map(|run| *run.0)
    }

    fn put(&mut self, first: u32, count: u32) {
        self.by_place.insert(first, count);
        self.by_size.insert((count, first));
        self.pages += u64::from(count);
    }

    /// Takes the run that begins at `first`.
    pub(super) fn remove(&mut self, first: u32) {
        if let Some(count) = self.by_place.remove(&first) {
            self.by_size.remove(&(count, first));
            self.pages -= u64::from(count);
        }
    }

    /// Lists a run that touches no other one of its stretch.
    pub(super) fn insert(&mut self, first: u32, count: u32) {
        self.put(first, count);
    }

    /// Lists a run, joined with those that touch it between `from` and `to`.
    pub(super) fn insert_within(&mut self, first: u32, count: u32, from: u32, to: u32) {
        let (mut first, mut count) = (first, count);
        if first > from
            && let Some((before, more)) = self.ending_at(first)
        {
            self.remove(before);
            (first, count) = (before, count + more);
        }
        let end = first + count;
        if end < to
            && let Some(more) = self.by_place.get(&end).copied()
        {
            self.remove(end);
            count += more;
        }
        self.put(first, count);
    }

    /// Forgets all runs between `from` and `to`.
    pub(super) fn remove_within(&mut self, from: u32, to: u32) {
        while let Some(first) = self.at_or_after(from).filter(|first| *first < to) {
            self.remove(first);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_joined_within_their_stretch_only() {
        let mut free = Free::default();
        free.insert_within(10, 2, 0, 16);
        free.insert_within(14, 2, 0, 16);
        free.insert_within(12, 2, 0, 16);
        assert_eq!(free.fitting(1), Some((10, 6)));
        free.insert_within(16, 3, 16, 32);
        assert_eq!((free.pages(), free.fitting(7)), (9, None));
        assert_eq!(free.take(3), Some(16), "the shortest that fits");
        assert_eq!(free.take(2), Some(10));
        assert_eq!(free.ending_at(16), Some((12, 4)));
        assert_eq!(free.take_longest(), Some((12, 4)));
        free.insert_within(5, 1, 0, 16);
        free.insert_within(20, 1, 16, 32);
        free.remove_within(16, 32);
        assert_eq!((free.pages(), free.fitting(1)), (1, Some((5, 1))));
    }
}
