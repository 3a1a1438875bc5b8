//! Whole pages: where they lie, which digest they have, and how many values hold them.
//!
//! Pages are numbered throughout. A *stretch* is memory that the engine has lent, with the numbers of its
//! pages. What is free is listed by runs ([`free`](super::free)): *warm* ones have memory, *cold* ones have
//! none yet, or none any more.
//!
//! # Invariants
//! * P-1. A page is written before it is indexed, and never while it is. It is compared in full before it
//!   stands for another one.
//! * P-2. The references of a page are the places of living values' lists at which it stands. When the
//!   last is gone, so is the page: it leaves the index, and its place is free.
//! * P-3. A place is in one living page, in one free run, or on its way to the merging thread to be given
//!   back, and then nobody writes it before the thread has said that it is done.
//! * P-4. Zero pages have no place and no number.
//!
//! # What the engine does with them
//! It registers what it has lent, once it has other memory to compare it with. Equal pages then share a
//! frame by the ordinary scan, in the store's domain. Their bytes stay what they are, so nothing here
//! notices.
//!
//! # Cost
//! 12 bytes for each place in a stretch, 6 to 12 in the index for each page, some 40 for each free run: 0.7
//! % at most of what is held. What is free and warm stays under an eighth of what is held, or 4 MiB.

use super::error::Error;
use super::free::Free;
use super::room::Room;
use hashbrown::HashTable;
use pagemerge_linux::{Engine, Extent, Source, page_size};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

/// Page numbers are dealt out to stretches by so many.
const CHUNK: u32 = 512;
/// Pages of a large stretch: 64 MiB with pages of 4 KiB.
const LARGEST: u32 = 1 << 14;
/// Pages that are made at a time.
const AHEAD: u32 = 64;
/// Free pages that always may keep their memory.
const WARM: u64 = 1024;
const NONE: u32 = u32::MAX;

/// Memory whose pages have numbers.
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

#[derive(Clone, Copy, Debug, Default)]
struct Record {
    /// In halves: eight would be aligned to eight.
    digest: [u32; 2],
    refs: u32,
}

/// A number of 64 bits in halves, for records that would be larger if they held it whole.
pub(super) fn split(hash: u64) -> [u32; 2] {
    let bytes = hash.to_ne_bytes();
    [
        u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
    ]
}

/// The halves put together.
pub(super) fn whole([low, high]: [u32; 2]) -> u64 {
    let (low, high) = (low.to_ne_bytes(), high.to_ne_bytes());
    u64::from_ne_bytes([
        low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3],
    ])
}

#[derive(Debug)]
struct Lot {
    stretch: Arc<Stretch>,
    first: u32,
    records: Box<[Record]>,
    live: u32,
}

impl Lot {
    fn end(&self) -> u32 {
        self.first + self.stretch.extent.pages()
    }
}

/// Runs of free pages whose memory has been given back: the stretch's number, and (first, count) of each.
type Returned = (u64, Vec<(u32, u32)>);

#[derive(Debug)]
pub(super) struct Pages {
    domain: String,
    /// The lot of each chunk of numbers.
    chunks: Vec<u32>,
    lots: Vec<Option<Lot>>,
    index: HashTable<u32>,
    warm: Free,
    cold: Free,
    live: u64,
    memory: Room,
    /// Which lot a note of the merging thread is about: numbers of pages are used again.
    serial: u64,
    serials: Vec<u64>,
    done: Sender<Returned>,
    returned: Receiver<Returned>,
    on_their_way: u64,
    /// A lot that holds nothing, if one is kept.
    idle: Option<u32>,
}

impl Pages {
    pub(super) fn new(domain: &str) -> Self {
        let (done, returned) = channel();
        Self {
            domain: domain.to_owned(),
            chunks: Vec::new(),
            lots: Vec::new(),
            index: HashTable::new(),
            warm: Free::default(),
            cold: Free::default(),
            live: 0,
            memory: Room::default(),
            serial: 0,
            serials: Vec::new(),
            done,
            returned,
            on_their_way: 0,
            idle: None,
        }
    }

    /// Pages that are held.
    pub(super) fn live(&self) -> u64 {
        self.live
    }

    /// Pages that are held and can be shared: not those that hold the odd end of a value.
    pub(super) fn indexed(&self) -> u64 {
        self.index.len() as u64
    }

    /// Pages that have memory and hold nothing.
    pub(super) fn spare(&self) -> u64 {
        self.warm.pages()
    }

    pub(super) fn metadata_bytes(&self) -> u64 {
        let records: usize = self
            .lots
            .iter()
            .flatten()
            .map(|lot| size_of_val(&*lot.records) + size_of::<Stretch>() + 32)
            .sum();
        let bytes = records
            + self.index.allocation_size()
            + 4 * self.chunks.capacity()
            + (size_of::<Option<Lot>>() + 8) * self.lots.capacity()
            + self.warm.metadata_bytes()
            + self.cold.metadata_bytes();
        bytes as u64
    }

    fn lot(&self, page: u32) -> &Lot {
        lot_of(&self.chunks, &self.lots, page)
    }

    fn lot_mut(&mut self, page: u32) -> (&mut Lot, usize) {
        let lot = self.chunks[(page / CHUNK) as usize];
        let lot = self.lots[lot as usize]
            .as_mut()
            .expect("a page's lot is there");
        let at = (page - lot.first) as usize;
        (lot, at)
    }

    fn record(&self, page: u32) -> &Record {
        let lot = self.lot(page);
        &lot.records[(page - lot.first) as usize]
    }

    /// The stretch of a page, and its place there.
    pub(super) fn place(&self, page: u32) -> (&Arc<Stretch>, u32) {
        let lot = self.lot(page);
        (&lot.stretch, page - lot.first)
    }

    /// Places at which the page stands.
    pub(super) fn refs(&self, page: u32) -> u32 {
        self.record(page).refs
    }

    /// Whether there is a page with this digest.
    pub(super) fn may_have(&self, digest: u64) -> bool {
        let wanted = split(digest);
        let found = self
            .index
            .find(digest, |page| self.record(*page).digest == wanted);
        found.is_some()
    }

    /// A page that is equal.
    pub(super) fn find(&self, digest: u64, bytes: Source<'_>) -> Option<u32> {
        let wanted = split(digest);
        let page = self.index.find(digest, |page| {
            let lot = self.lot(*page);
            let at = (*page - lot.first) as usize;
            let record = &lot.records[at];
            record.digest == wanted
                && record.refs < NONE
                && lot
                    .stretch
                    .extent
                    .bytes(at * page_size(), bytes.len())
                    .same(bytes)
        });
        page.copied()
    }

    /// One more place at which the page stands.
    pub(super) fn hold(&mut self, page: u32) {
        let (lot, at) = self.lot_mut(page);
        lot.records[at].refs += 1;
    }

    /// Neighbouring places with memory, for `pages` new pages.
    pub(super) fn allocate(&mut self, engine: &Engine, pages: u32) -> Result<u32, Error> {
        if let Some(first) = self.warm.take(pages) {
            return Ok(first);
        }
        self.take_returned();
        let (mut first, mut count) = match self.cold.fitting(pages) {
            Some(run) => run,
            None => self.lend(engine, pages)?,
        };
        // What is warm right before it is used up first.
        if let Some((before, warm)) = self.warm.ending_at(first)
            && self.chunks[(before / CHUNK) as usize] == self.chunks[(first / CHUNK) as usize]
        {
            (first, count) = (before, count + warm);
        }
        let (cold, end) = (
            self.cold.at_or_after(first).expect("just found"),
            first + count,
        );
        // Some more than is needed is made at once.
        let lot = lot_of(&self.chunks, &self.lots, first);
        let until = (first + pages).max(cold + AHEAD).min(end);
        self.memory.take((until - cold) as usize * page_size())?;
        lot.stretch
            .extent
            .prepare(cold - lot.first, until - cold)
            .map_err(|e| Error::no_memory((until - cold) as usize * page_size(), e))?;
        self.cold.remove(cold);
        if until < end {
            self.cold.insert(until, end - until);
        }
        if first < cold {
            self.warm.remove(first);
        }
        self.give_up(first + pages, until - first - pages);
        Ok(first)
    }

    /// Places that were allocated and not used.
    pub(super) fn give_up(&mut self, first: u32, pages: u32) {
        if pages > 0 {
            let (from, to) = self.borders(first);
            self.warm.insert_within(first, pages, from, to);
        }
    }

    /// The numbers of the stretch that a page is in.
    fn borders(&self, page: u32) -> (u32, u32) {
        let lot = self.lot(page);
        (lot.first, lot.end())
    }

    fn lend(&mut self, engine: &Engine, pages: u32) -> Result<(u32, u32), Error> {
        let grown = u32::try_from(self.live / 8).unwrap_or(LARGEST);
        let pages = grown
            .clamp(CHUNK, LARGEST)
            .max(pages)
            .checked_next_multiple_of(CHUNK)
            .ok_or(Error::TooMuch)?;
        let chunks = (pages / CHUNK) as usize;
        let first_chunk = self.free_numbers(chunks)?;
        let mut records = Vec::new();
        records
            .try_reserve_exact(pages as usize)
            .map_err(|e| Error::no_memory(size_of::<Record>() * pages as usize, e.into()))?;
        records.resize(pages as usize, Record::default());
        let first = u32::try_from(first_chunk).expect("just looked at") * CHUNK;
        let stretch = Arc::new(Stretch {
            extent: engine.lend_extent(pages, &self.domain)?,
            first,
        });
        let number = self.lots.iter().position(Option::is_none);
        let number = number.unwrap_or_else(|| {
            self.lots.push(None);
            self.serials.push(0);
            self.lots.len() - 1
        });
        if self.chunks.len() < first_chunk + chunks {
            self.chunks.resize(first_chunk + chunks, NONE);
        }
        let named = u32::try_from(number).map_err(|_| Error::TooMuch)?;
        self.chunks[first_chunk..first_chunk + chunks].fill(named);
        self.lots[number] = Some(Lot {
            stretch,
            first,
            records: records.into_boxed_slice(),
            live: 0,
        });
        self.serial += 1;
        self.serials[number] = self.serial;
        self.cold.insert(first, pages);
        Ok((first, pages))
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
        if first + chunks >= (NONE / CHUNK) as usize {
            return Err(Error::TooMuch);
        }
        Ok(first)
    }

    fn drop_lot(&mut self, number: u32) {
        let Some(lot) = self.lots[number as usize].take() else {
            return;
        };
        self.warm.remove_within(lot.first, lot.end());
        self.cold.remove_within(lot.first, lot.end());
        self.serials[number as usize] = 0;
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
            self.serials.pop();
        }
    }

    /// Makes sure that [`keep`](Self::keep) cannot fail for so many pages.
    pub(super) fn make_room(&mut self, pages: usize) -> Result<(), Error> {
        let (chunks, lots) = (&self.chunks, &self.lots);
        let digest = |page: &u32| digest_of(chunks, lots, *page);
        self.index.try_reserve(pages, digest).map_err(|_| {
            let bytes = 2 * self.index.allocation_size();
            Error::no_memory(bytes, io::ErrorKind::OutOfMemory.into())
        })
    }

    /// Keeps a copy of a page at a place that was allocated, and holds it once. Room has been made. Says
    /// which digest it has: that of what is kept, whatever the source had.
    pub(super) fn keep(
        &mut self,
        page: u32,
        bytes: Source<'_>,
        digest: u64,
        digest_now: impl FnOnce(Source<'_>) -> u64,
    ) -> u64 {
        let (lot, at) = self.lot_mut(page);
        let start = at * page_size();
        lot.stretch.extent.write(start, bytes);
        let digest = if bytes.is_steady() {
            digest
        } else {
            digest_now(lot.stretch.extent.bytes(start, bytes.len()))
        };
        lot.records[at] = Record {
            digest: split(digest),
            refs: 1,
        };
        lot.live += 1;
        self.live += 1;
        let (chunks, lots) = (&self.chunks, &self.lots);
        self.index
            .insert_unique(digest, page, |page| digest_of(chunks, lots, *page));
        digest
    }

    /// Keeps a part of a page, which nothing else will ever share.
    pub(super) fn keep_part(&mut self, page: u32, bytes: Source<'_>) {
        let (lot, at) = self.lot_mut(page);
        lot.stretch.extent.write(at * page_size(), bytes);
        lot.records[at] = Record {
            digest: [0, 0],
            refs: 1,
        };
        lot.live += 1;
        self.live += 1;
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
        let (empty, first, end) = (lot.live == 0, lot.first, lot.end());
        self.live -= 1;
        if let Ok(entry) = self.index.find_entry(digest, |other| *other == page) {
            entry.remove();
        }
        self.warm.insert_within(page, 1, first, end);
        if empty {
            self.retire(number);
        }
    }

    /// A stretch holds nothing any more. One such stretch is kept, so that a value which comes and goes
    /// does not take a mapping each time; of a store that holds nothing, a small one.
    fn retire(&mut self, number: u32) {
        let pages = |pages: &Self, number: u32| {
            let lot = pages.lots.get(number as usize).and_then(Option::as_ref);
            lot.filter(|lot| lot.live == 0)
                .map(|lot| lot.stretch.extent.pages())
        };
        let other = self.idle.filter(|other| *other != number);
        self.idle = Some(number);
        if let Some(other) = other
            && let Some(there) = pages(self, other)
        {
            let smaller = pages(self, number).is_some_and(|here| here <= there);
            let (kept, dropped) = if smaller {
                (number, other)
            } else {
                (other, number)
            };
            self.idle = Some(kept);
            self.drop_lot(dropped);
        }
        if self.live == 0
            && let Some(last) = self.idle
            && pages(self, last).is_some_and(|pages| pages > CHUNK)
        {
            self.idle = None;
            self.drop_lot(last);
        }
    }

    /// Gives memory back if much of it is free. To be called when something has been released.
    pub(super) fn settle(&mut self) {
        let enough = match self.live {
            0 => AHEAD.into(),
            live => WARM.max(live / 8),
        };
        if self.warm.pages() <= enough + enough / 2 {
            return;
        }
        self.take_returned();
        let mut runs: Vec<Vec<(u32, u32)>> = vec![Vec::new(); self.lots.len()];
        while self.warm.pages() > enough / 2 {
            // The longest first: fewest calls.
            let Some((first, count)) = self.warm.take_longest() else {
                break;
            };
            let lot = self.chunks[(first / CHUNK) as usize] as usize;
            runs[lot].push((first, count));
        }
        for (number, runs) in runs.into_iter().enumerate() {
            if let Some(lot) = &self.lots[number]
                && !runs.is_empty()
            {
                let places = runs
                    .iter()
                    .map(|(first, count)| (first - lot.first, *count))
                    .collect();
                self.on_their_way += 1;
                let note = (self.serials[number], runs);
                lot.stretch.extent.discard(places, self.done.clone(), note);
            }
        }
    }

    /// Lists what has been given back.
    fn take_returned(&mut self) {
        while self.on_their_way > 0 {
            let Ok((serial, runs)) = self.returned.try_recv() else {
                return;
            };
            self.on_their_way -= 1;
            if !self.serials.contains(&serial) {
                continue;
            }
            for (first, count) in runs {
                let (from, to) = self.borders(first);
                self.cold.insert_within(first, count, from, to);
            }
        }
    }
}

fn lot_of<'a>(chunks: &[u32], lots: &'a [Option<Lot>], page: u32) -> &'a Lot {
    let lot = lots[chunks[(page / CHUNK) as usize] as usize].as_ref();
    lot.expect("a page's lot is there")
}

fn digest_of(chunks: &[u32], lots: &[Option<Lot>], page: u32) -> u64 {
    let lot = lot_of(chunks, lots, page);
    whole(lot.records[(page - lot.first) as usize].digest)
}
