//! Whole pages: where they lie, which digest they have, and how many values hold them.
//!
//! Pages are numbered throughout. A *stretch* is an extent of the engine's frame slots with the numbers
//! of its pages; slots are dealt out in order, so that the fresh pages of one value are neighbours.
//!
//! # Invariants
//! * P-1. A page is written before it is indexed, and never after. It is compared in full before it
//!   stands for another one.
//! * P-2. The references of a page are the places of living values' lists at which it stands. When the
//!   last is gone, so is the page: it leaves the index and its slot is given back, in batches, or with its
//!   stretch.
//! * P-3. Slots are not used again; numbers are, when a whole stretch has gone.
//! * P-4. Zero pages have no slot and no number.
//!
//! # What the engine needs to share a page with merged regions
//! Its digest, by the engine's own secret, is in its record; its slot follows from its number. Nothing
//! here depends on where the bytes of a page really are: a frame of the engine's that has the same bytes
//! can be mapped over the page in its extent at any time, whoever has pointers to it (see
//! [`Stretch`]).
//!
//! # Cost
//! 12 bytes for each slot of a stretch, and 6 to 12 in the index for each page: 0.7 % at most.

use super::error::Error;
use super::room::Room;
use hashbrown::HashTable;
use pagemerge_linux::{Engine, Extent, Source, page_size};
use std::io;
use std::sync::Arc;

/// Page numbers are dealt out to stretches by so many.
const CHUNK: u32 = 512;
/// Pages of a large stretch: 64 MiB with pages of 4 KiB.
const LARGEST: u32 = 1 << 14;
/// Pages that are made at a time.
const AHEAD: u32 = 64;
/// Freed slots that are given back at a time.
const BATCH: u32 = 256;
/// Stretches with room that are kept in mind besides the current one.
const OPEN: usize = 8;
const NONE: u32 = u32::MAX;

/// An extent whose pages have numbers.
#[derive(Debug)]
pub(super) struct Stretch {
    pub(super) extent: Extent,
    /// The number of its first page.
    first: u32,
}

impl Stretch {
    pub(super) fn first_number(&self) -> u32 {
        self.first
    }
}

impl Drop for Stretch {
    fn drop(&mut self) {
        // All of it, what was given back before included: whoever has touched it since (`mlockall`
        // does) has filled the holes with pages.
        self.extent.give_back(vec![(0, self.extent.pages())]);
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Record {
    /// In halves: eight would be aligned to eight.
    digest: [u32; 2],
    refs: u32,
}

fn halves(digest: u64) -> [u32; 2] {
    let bytes = digest.to_ne_bytes();
    [
        u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
    ]
}

pub(super) fn whole([low, high]: [u32; 2]) -> u64 {
    let (low, high) = (low.to_ne_bytes(), high.to_ne_bytes());
    u64::from_ne_bytes([
        low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3],
    ])
}

pub(super) fn split(hash: u64) -> [u32; 2] {
    halves(hash)
}

#[derive(Debug)]
struct Lot {
    stretch: Arc<Stretch>,
    first: u32,
    records: Box<[Record]>,
    /// Slots dealt out, and slots that have memory.
    next: u32,
    prepared: u32,
    live: u32,
    /// Freed, and not given back yet.
    freed: Vec<(u32, u32)>,
}

impl Lot {
    fn room(&self) -> u32 {
        self.stretch.extent.pages() - self.next
    }
}

#[derive(Debug, Default)]
pub(super) struct Pages {
    /// The lot of each chunk of numbers.
    chunks: Vec<u32>,
    lots: Vec<Option<Lot>>,
    index: HashTable<u32>,
    /// Lots with room; the last one is used first.
    open: Vec<u32>,
    live: u64,
    freed: u32,
    memory: Room,
}

impl Pages {
    /// Pages that are held.
    pub(super) fn live(&self) -> u64 {
        self.live
    }

    /// Pages that have memory and hold nothing: made ahead, or not given back yet.
    pub(super) fn spare(&self) -> u64 {
        let ahead: u32 = self
            .lots
            .iter()
            .flatten()
            .map(|lot| lot.prepared - lot.next)
            .sum();
        u64::from(ahead + self.freed)
    }

    pub(super) fn metadata_bytes(&self) -> u64 {
        let records: usize = self
            .lots
            .iter()
            .flatten()
            .map(|lot| size_of_val(&*lot.records) + lot.freed.capacity() * 8 + size_of::<Stretch>())
            .sum();
        let bytes = records
            + self.index.allocation_size()
            + 4 * self.chunks.capacity()
            + size_of::<Option<Lot>>() * self.lots.capacity();
        bytes as u64
    }

    fn lot(&self, page: u32) -> &Lot {
        let lot = self.chunks[(page / CHUNK) as usize];
        self.lots[lot as usize]
            .as_ref()
            .expect("a page's lot is there")
    }

    /// The stretch of a page, and its place there.
    pub(super) fn place(&self, page: u32) -> (&Arc<Stretch>, u32) {
        let lot = self.lot(page);
        (&lot.stretch, page - lot.first)
    }

    /// Places at which the page stands.
    pub(super) fn refs(&self, page: u32) -> u32 {
        let lot = self.lot(page);
        lot.records[(page - lot.first) as usize].refs
    }

    /// A page that may be equal: it has this digest.
    pub(super) fn candidate(&self, digest: u64) -> Option<u32> {
        let wanted = halves(digest);
        self.index
            .find(digest, |page| self.digest(*page) == wanted)
            .copied()
    }

    /// A page that is equal.
    pub(super) fn find(&self, digest: u64, bytes: Source<'_>) -> Option<u32> {
        let wanted = halves(digest);
        let page = self.index.find(digest, |page| {
            let lot = self.lot(*page);
            let record = &lot.records[(*page - lot.first) as usize];
            record.digest == wanted && record.refs < u32::MAX && {
                let at = (*page - lot.first) as usize * page_size();
                lot.stretch.extent.written(at, bytes.len()).same(bytes)
            }
        });
        page.copied()
    }

    fn digest(&self, page: u32) -> [u32; 2] {
        let lot = self.lot(page);
        lot.records[(page - lot.first) as usize].digest
    }

    /// One more place at which the page stands.
    pub(super) fn hold(&mut self, page: u32) {
        let (lot, at) = self.lot_mut(page);
        lot.records[at].refs += 1;
    }

    fn lot_mut(&mut self, page: u32) -> (&mut Lot, usize) {
        let lot = self.chunks[(page / CHUNK) as usize];
        let lot = self.lots[lot as usize]
            .as_mut()
            .expect("a page's lot is there");
        let at = (page - lot.first) as usize;
        (lot, at)
    }

    /// Makes sure that `pages` fresh slots in a row come next.
    pub(super) fn make_room(&mut self, engine: &Engine, pages: u32) -> Result<(), Error> {
        let fits = |lots: &[Option<Lot>], number: u32| {
            let lot = lots[number as usize].as_ref();
            lot.is_some_and(|lot| lot.room() >= pages && lot.stretch.extent.is_current())
        };
        if let Some(last) = self.open.last()
            && fits(&self.lots, *last)
        {
            return Ok(());
        }
        if let Some(at) = self.open.iter().rposition(|lot| fits(&self.lots, *lot)) {
            let lot = self.open.remove(at);
            self.open.push(lot);
            return Ok(());
        }
        self.lend(engine, pages)
    }

    fn lend(&mut self, engine: &Engine, pages: u32) -> Result<(), Error> {
        let grown = u32::try_from(self.live / 8).unwrap_or(LARGEST);
        let pages = grown
            .clamp(CHUNK, LARGEST)
            .max(pages)
            .checked_next_multiple_of(CHUNK)
            .ok_or(Error::TooMuch)?;
        let chunks = (pages / CHUNK) as usize;
        let first = self.free_numbers(chunks)?;
        let mut records = Vec::new();
        let none =
            |e: std::collections::TryReserveError| Error::no_memory(12 * pages as usize, e.into());
        records.try_reserve_exact(pages as usize).map_err(none)?;
        records.resize(pages as usize, Record::default());
        let first_number = u32::try_from(first).expect("just looked at") * CHUNK;
        let stretch = Arc::new(Stretch {
            extent: engine.lend_extent(pages)?,
            first: first_number,
        });
        let number = self
            .lots
            .iter()
            .position(Option::is_none)
            .unwrap_or_else(|| {
                self.lots.push(None);
                self.lots.len() - 1
            });
        let number_ = u32::try_from(number).map_err(|_| Error::TooMuch)?;
        if self.chunks.len() < first + chunks {
            self.chunks.resize(first + chunks, NONE);
        }
        self.chunks[first..first + chunks].fill(number_);
        self.lots[number] = Some(Lot {
            stretch,
            first: first_number,
            records: records.into_boxed_slice(),
            next: 0,
            prepared: 0,
            live: 0,
            freed: Vec::new(),
        });
        // After a fork nothing new goes to the old ones.
        let stale: Vec<u32> = self.open.clone();
        for lot in stale {
            let current = self.lots[lot as usize]
                .as_ref()
                .is_some_and(|lot| lot.stretch.extent.is_current());
            if !current {
                self.shut(lot);
            }
        }
        if self.open.len() == OPEN {
            // The one with least room.
            let room = |lot: &u32| self.lots[*lot as usize].as_ref().map_or(0, Lot::room);
            if let Some(fullest) = self.open.iter().min_by_key(|lot| room(lot)).copied() {
                self.shut(fullest);
            }
        }
        self.open.push(number_);
        Ok(())
    }

    /// So many chunks in a row that no stretch has.
    fn free_numbers(&self, chunks: usize) -> Result<usize, Error> {
        let mut run = 0;
        for (at, lot) in self.chunks.iter().enumerate() {
            run = if *lot == NONE { run + 1 } else { 0 };
            if run == chunks {
                return Ok(at + 1 - chunks);
            }
        }
        let first = self.chunks.len() - run;
        // The last number means "none".
        if first + chunks >= (u32::MAX / CHUNK) as usize {
            return Err(Error::TooMuch);
        }
        Ok(first)
    }

    /// Nothing new goes to this lot.
    fn shut(&mut self, number: u32) {
        self.open.retain(|lot| *lot != number);
        let place = &mut self.lots[number as usize];
        let Some(lot) = place else { return };
        if lot.live == 0 {
            self.drop_lot(number);
        } else if lot.next < lot.prepared {
            let ahead = (lot.next, lot.prepared - lot.next);
            lot.stretch.extent.give_back(vec![ahead]);
            lot.prepared = lot.next;
        }
    }

    fn drop_lot(&mut self, number: u32) {
        let Some(lot) = self.lots[number as usize].take() else {
            return;
        };
        self.freed -= lot.freed.iter().map(|run| run.1).sum::<u32>();
        for chunk in &mut self.chunks {
            if *chunk == number {
                *chunk = NONE;
            }
        }
        while self.chunks.last() == Some(&NONE) {
            self.chunks.pop();
        }
        while let Some(None) = self.lots.last() {
            self.lots.pop();
        }
    }

    /// Keeps a copy of a page, in the next slot, and holds it once. Room has been made.
    pub(super) fn keep(
        &mut self,
        bytes: Source<'_>,
        digest: u64,
        digest_of: impl FnOnce(Source<'_>) -> u64,
    ) -> Result<u32, Error> {
        let number = *self.open.last().expect("room has been made");
        let (chunks, lots) = (&self.chunks, &self.lots);
        let digest_at = |page: &u32| {
            let lot = &lots[chunks[(*page / CHUNK) as usize] as usize];
            let lot = lot.as_ref().expect("a page's lot is there");
            whole(lot.records[(*page - lot.first) as usize].digest)
        };
        if self.index.try_reserve(1, digest_at).is_err() {
            let bytes = 2 * self.index.allocation_size();
            return Err(Error::no_memory(bytes, io::ErrorKind::OutOfMemory.into()));
        }
        let lot = self.lots[number as usize]
            .as_mut()
            .expect("an open lot is there");
        if lot.next == lot.prepared {
            let more = AHEAD.min(lot.room());
            self.memory.take(more as usize * page_size())?;
            lot.stretch
                .extent
                .prepare(lot.next, more)
                .map_err(|e| Error::no_memory(more as usize * page_size(), e))?;
            lot.prepared += more;
        }
        let at = lot.next;
        lot.next += 1;
        lot.live += 1;
        lot.stretch.extent.write(at, bytes);
        // What is kept has the digest of what is kept, whatever the source had.
        let digest = if bytes.is_steady() {
            digest
        } else {
            let start = at as usize * page_size();
            digest_of(lot.stretch.extent.written(start, bytes.len()))
        };
        lot.records[at as usize] = Record {
            digest: halves(digest),
            refs: 1,
        };
        let page = lot.first + at;
        if lot.room() == 0 {
            self.open.pop();
        }
        self.live += 1;
        let (chunks, lots) = (&self.chunks, &self.lots);
        self.index.insert_unique(digest, page, |page| {
            let lot = &lots[chunks[(*page / CHUNK) as usize] as usize];
            let lot = lot.as_ref().expect("a page's lot is there");
            whole(lot.records[(*page - lot.first) as usize].digest)
        });
        Ok(page)
    }

    /// One place less at which the page stands.
    pub(super) fn release(&mut self, page: u32) {
        let number = self.chunks[(page / CHUNK) as usize];
        let (lot, at) = self.lot_mut(page);
        let record = &mut lot.records[at];
        record.refs -= 1;
        if record.refs > 0 {
            return;
        }
        let digest = whole(record.digest);
        lot.live -= 1;
        let place = page - lot.first;
        match lot.freed.last_mut() {
            Some((first, count)) if *first + *count == place => *count += 1,
            _ => lot.freed.push((place, 1)),
        }
        let over = lot.live == 0 && lot.room() == 0;
        self.live -= 1;
        self.freed += 1;
        if let Ok(entry) = self.index.find_entry(digest, |other| *other == page) {
            entry.remove();
        }
        if self.live == 0 {
            *self = Self::default();
        } else if over {
            self.drop_lot(number);
        } else if self.freed >= BATCH {
            self.give_back();
        }
    }

    /// Gives freed slots back.
    fn give_back(&mut self) {
        for lot in self.lots.iter_mut().flatten() {
            if !lot.freed.is_empty() {
                lot.stretch.extent.give_back(std::mem::take(&mut lot.freed));
            }
        }
        self.freed = 0;
    }
}
