//! The index of values: which are held, how often, and where their bytes are.
//!
//! # Invariants
//! * V-1. A living value has at least one handle; equal values at or above [`FLOOR`] are one entry, and
//!   are compared in full before they count as equal.
//! * V-2. A value's number stays its own while it lives.
//!
//! # Cost
//! 20 bytes a value and 6 to 12 in the table; room is taken by an eighth more at a time.

use super::error::Error;
use super::pages::{split, whole};
use hashbrown::HashTable;
use std::io;

/// Shorter values are kept plainly. Measured with 100,000 values: an entry takes 27 bytes and doubles the
/// time of a put (120 to 215 ns), so that up to here all values would have to occur twice to gain anything.
pub(super) const FLOOR: usize = 33;

/// What an entry has in place of a length when its bytes are in pages.
const LARGE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Entry {
    /// In halves: eight would be aligned to eight.
    hash: [u32; 2],
    /// Where it is in the heap; or its number among the large ones; or the next free entry.
    place: u32,
    /// Handles; 0 for a free entry.
    refs: u32,
    len: u32,
}

/// Where a value's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Where {
    /// In the heap: the first granule, and the length.
    Heap(u32, u32),
    /// In pages: the number among the large values.
    Large(u32),
}

#[derive(Debug)]
pub(super) struct Values {
    entries: Vec<Entry>,
    free: u32,
    table: HashTable<u32>,
}

const NONE: u32 = u32::MAX;

impl Values {
    pub(super) fn new() -> Self {
        Self {
            entries: Vec::new(),
            free: NONE,
            table: HashTable::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    pub(super) fn metadata_bytes(&self) -> u64 {
        (self.entries.capacity() * size_of::<Entry>() + self.table.allocation_size()) as u64
    }

    /// The value with this hash for which `same` holds, and that can have one more handle.
    pub(super) fn find(&self, hash: u64, same: impl Fn(Where) -> bool) -> Option<u32> {
        let wanted = split(hash);
        let found = self.table.find(hash, |number| {
            let entry = &self.entries[*number as usize];
            entry.hash == wanted && entry.refs < u32::MAX && same(entry.place())
        });
        found.copied()
    }

    pub(super) fn place(&self, number: u32) -> Where {
        self.entries[number as usize].place()
    }

    pub(super) fn refs(&self, number: u32) -> u32 {
        self.entries[number as usize].refs
    }

    /// One more handle.
    pub(super) fn hold(&mut self, number: u32) {
        self.entries[number as usize].refs += 1;
    }

    /// Makes room for one more, so that [`insert`](Self::insert) cannot fail.
    pub(super) fn make_room(&mut self) -> Result<(), Error> {
        let none = |bytes| Error::no_memory(bytes, io::ErrorKind::OutOfMemory.into());
        if self.free == NONE && self.entries.len() == self.entries.capacity() {
            if self.entries.len() >= LARGE as usize {
                return Err(Error::TooMuch);
            }
            let more = self.entries.len() / 8 + 16;
            let bytes = (self.entries.len() + more) * size_of::<Entry>();
            self.entries
                .try_reserve_exact(more)
                .map_err(|_| none(bytes))?;
        }
        let entries = &self.entries;
        let bytes = 2 * self.table.allocation_size();
        self.table
            .try_reserve(1, |number| whole(entries[*number as usize].hash))
            .map_err(|_| none(bytes))
    }

    /// A new value with one handle. Room has been made.
    pub(super) fn insert(&mut self, hash: u64, place: Where) -> u32 {
        let (place, len) = match place {
            Where::Heap(at, len) => (at, len),
            Where::Large(number) => (number, LARGE),
        };
        let entry = Entry {
            hash: split(hash),
            place,
            refs: 1,
            len,
        };
        let number = if self.free == NONE {
            self.entries.push(entry);
            u32::try_from(self.entries.len() - 1).expect("looked at when room was made")
        } else {
            let number = self.free;
            let old = std::mem::replace(&mut self.entries[number as usize], entry);
            self.free = old.place;
            number
        };
        let entries = &self.entries;
        self.table
            .insert_unique(hash, number, |number| whole(entries[*number as usize].hash));
        number
    }

    /// One handle less; the last one takes the value with it, and tells where its bytes were.
    pub(super) fn release(&mut self, number: u32) -> Option<Where> {
        let entry = &mut self.entries[number as usize];
        entry.refs -= 1;
        if entry.refs > 0 {
            return None;
        }
        let was = entry.place();
        let hash = whole(entry.hash);
        entry.place = std::mem::replace(&mut self.free, number);
        if let Ok(found) = self.table.find_entry(hash, |other| *other == number) {
            found.remove();
        }
        if self.table.is_empty() {
            *self = Self::new();
        }
        Some(was)
    }
}

impl Entry {
    fn place(&self) -> Where {
        if self.len == LARGE {
            Where::Large(self.place)
        } else {
            Where::Heap(self.place, self.len)
        }
    }
}
