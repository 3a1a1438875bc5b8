//! The packed heap: values under a page, and the odd tails of larger ones, one behind the other.
//!
//! Memory is counted in granules of 16 bytes and numbered throughout: `segment * SEGMENT + offset`. No
//! block has a header, because whoever frees one knows its length; what is free is listed by exact
//! length, and neighbours are joined only when room is wanted or much is free (`coalesce`).
//!
//! # Invariants
//! * H-1. A granule is in one block, in one free run, in the bump area, or not prepared yet.
//! * H-2. A block never moves, and its bytes are not touched until it is freed.
//! * H-3. No block or run crosses the border of a segment.
//! * H-4. Memory is made ([`Segment::prepare`]) before a block is dealt out, so that writing it cannot
//!   fail.
//!
//! # Why ordinary memory
//! Blocks are used again, which frames never are: a fork child that reads one must not see its parent's
//! next value. Ordinary memory is copied for it by the kernel.
//!
//! # Cost
//! 4 bytes for each free run, 8 for each segment, and up to 15 bytes of rounding in each block. A block is
//! found in a few steps; joining sorts all free runs, at most once for each eighth of the heap that was
//! freed since.

use super::error::Error;
use super::room::Room;
use pagemerge_linux::{Segment, Source};
use std::sync::Arc;

/// Bytes in a granule.
pub(super) const GRANULE: usize = 16;
/// Granules in a segment: 1 MiB.
const SEGMENT: u32 = 1 << 16;
/// Granules whose memory is made at a time.
const AHEAD: u32 = 1 << 12;
/// An empty heap keeps a segment of which no more than this has memory.
const KEPT: u32 = 4 * AHEAD;
/// So much must have been freed since the last joining for another one.
const WORTHWHILE: u64 = SEGMENT as u64;

/// Granules for `len` bytes.
pub(super) fn granules(len: usize) -> u32 {
    u32::try_from(len.div_ceil(GRANULE)).expect("a block is smaller than a segment")
}

#[derive(Debug, Default)]
pub(super) struct Heap {
    segments: Vec<Option<Arc<Segment>>>,
    /// Free runs by their length, up to a page's.
    bins: Vec<Vec<u32>>,
    /// A bit for each bin that is not empty.
    filled: Vec<u64>,
    /// Longer free runs: (first, granules).
    long: Vec<(u32, u32)>,
    /// From here to there nothing is used, and blocks are dealt out in order.
    bump: (u32, u32),
    /// Where memory ends that has been made, in the bump area's segment.
    prepared: u32,
    used: u64,
    free: u64,
    freed_since: u64,
    room: Room,
}

impl Heap {
    /// For blocks of up to `longest` bytes.
    pub(super) fn new(longest: usize) -> Self {
        let bins = granules(longest) as usize + 1;
        Self {
            bins: vec![Vec::new(); bins],
            filled: vec![0; bins.div_ceil(64)],
            ..Self::default()
        }
    }

    /// Bytes in blocks, rounding included.
    pub(super) fn used_bytes(&self) -> u64 {
        self.used * GRANULE as u64
    }

    /// Bytes that have memory and are in no block.
    pub(super) fn free_bytes(&self) -> u64 {
        (self.free + u64::from(self.prepared.saturating_sub(self.bump.0))) * GRANULE as u64
    }

    pub(super) fn metadata_bytes(&self) -> u64 {
        let bins: usize = self.bins.iter().map(Vec::capacity).sum();
        let bytes = 4 * bins
            + size_of::<Vec<u32>>() * self.bins.capacity()
            + 8 * (self.long.capacity() + self.filled.capacity() + self.segments.capacity());
        bytes as u64
    }

    /// The segment of a block, and where it begins there.
    pub(super) fn place(&self, at: u32) -> (&Arc<Segment>, usize) {
        let segment = self.segments[(at / SEGMENT) as usize].as_ref();
        (segment.expect("a block's segment is there"), offset_of(at))
    }

    /// Keeps a copy of `bytes`.
    pub(super) fn keep(&mut self, bytes: Source<'_>) -> Result<u32, Error> {
        let at = self.allocate(granules(bytes.len()))?;
        let (segment, offset) = self.place(at);
        segment.write(offset, bytes);
        Ok(at)
    }

    fn allocate(&mut self, count: u32) -> Result<u32, Error> {
        let at = match self.reuse(count) {
            Some(at) => {
                self.free -= u64::from(count);
                at
            }
            None => self.bumped(count)?,
        };
        self.used += u64::from(count);
        Ok(at)
    }

    /// A free run, or the beginning of one.
    fn reuse(&mut self, count: u32) -> Option<u32> {
        if self.free < u64::from(count) {
            return None;
        }
        let bin = self.filled_from(count as usize)?;
        let at = self.bins[bin].pop()?;
        if self.bins[bin].is_empty() {
            self.filled[bin / 64] &= !(1 << (bin % 64));
        }
        let rest = u32::try_from(bin).expect("bins are few") - count;
        if rest > 0 {
            self.list(at + count, rest);
        }
        Some(at)
    }

    /// The first bin from `bin` on that is not empty.
    fn filled_from(&self, bin: usize) -> Option<usize> {
        let mut word = bin / 64;
        let mut bits = self.filled.get(word)? & (u64::MAX << (bin % 64));
        while bits == 0 {
            word += 1;
            bits = *self.filled.get(word)?;
        }
        Some(word * 64 + bits.trailing_zeros() as usize)
    }

    /// Notes a free run.
    fn list(&mut self, at: u32, count: u32) {
        let bin = count as usize;
        if bin < self.bins.len() {
            let list = &mut self.bins[bin];
            if list.len() == list.capacity() {
                // Not to the double: free runs can be many.
                list.reserve_exact(list.len() / 8 + 8);
            }
            list.push(at);
            self.filled[bin / 64] |= 1 << (bin % 64);
        } else {
            self.long.push((at, count));
        }
    }

    /// The next granules of the bump area, or of a new one.
    fn bumped(&mut self, count: u32) -> Result<u32, Error> {
        if self.bump.1 - self.bump.0 < count {
            if self.free >= self.used / 8 && self.freed_since >= WORTHWHILE.max(self.used / 8) {
                self.coalesce();
                if let Some(at) = self.reuse(count) {
                    self.free -= u64::from(count);
                    return Ok(at);
                }
            }
            self.open_area()?;
        }
        let (at, end) = (self.bump.0, self.bump.0 + count);
        if end > self.prepared {
            self.prepare(self.bump.1.min(end.max(self.prepared + AHEAD)))?;
        }
        self.bump.0 = end;
        Ok(at)
    }

    /// Makes the bump area's memory up to there.
    fn prepare(&mut self, until: u32) -> Result<(), Error> {
        let bytes = (until - self.prepared) as usize * GRANULE;
        self.room.take(bytes)?;
        let (segment, from) = self.place(self.prepared);
        segment
            .prepare(from, bytes)
            .map_err(|e| Error::no_memory(bytes, e))?;
        self.prepared = until;
        Ok(())
    }

    /// Begins a new bump area: a long free run, or a new segment.
    fn open_area(&mut self) -> Result<(), Error> {
        let next = if let Some((at, count)) = self.long.pop() {
            self.free -= u64::from(count);
            (at, at + count, at + count)
        } else {
            let bytes = SEGMENT as usize * GRANULE;
            let segment = Segment::new(bytes).map_err(|e| Error::no_memory(bytes, e))?;
            let number = match self.segments.iter().position(Option::is_none) {
                Some(number) => number,
                None if self.segments.len() >= (u32::MAX / SEGMENT) as usize => {
                    return Err(Error::TooMuch);
                }
                None => {
                    self.segments.push(None);
                    self.segments.len() - 1
                }
            };
            self.segments[number] = Some(Arc::new(segment));
            let at = u32::try_from(number).expect("just checked") * SEGMENT;
            (at, at + SEGMENT, at)
        };
        if self.bump.1 > self.prepared {
            // Less than a page. A failure leaves it to the kernel when it is written.
            let _ = self.prepare(self.bump.1);
        }
        let (at, end) = std::mem::replace(&mut self.bump, (next.0, next.1));
        self.prepared = next.2;
        if at < end {
            self.list(at, end - at);
            self.free += u64::from(end - at);
        }
        Ok(())
    }

    /// A block of `len` bytes is read by nobody any more.
    pub(super) fn release(&mut self, at: u32, len: usize) {
        let count = granules(len);
        self.used -= u64::from(count);
        self.free += u64::from(count);
        self.freed_since += u64::from(count);
        self.list(at, count);
        if self.used == 0 {
            self.begin_anew();
        } else if self.free > self.used && self.freed_since >= 4 * WORTHWHILE.max(self.used / 8) {
            self.coalesce();
        }
    }

    /// Nothing is left that refers to any of it: gives everything back, but for a segment of which little
    /// has been made. (Whoever puts and drops one value after the other would make one for each.)
    fn begin_anew(&mut self) {
        let first = self.bump.1.saturating_sub(1) / SEGMENT * SEGMENT;
        let made = self.prepared.saturating_sub(first);
        let kept = (self.bump.1 == first + SEGMENT && made <= KEPT)
            .then(|| self.segments[(first / SEGMENT) as usize].take())
            .flatten();
        let bins = self.bins.len();
        *self = Self {
            bins: vec![Vec::new(); bins],
            filled: vec![0; bins.div_ceil(64)],
            room: std::mem::take(&mut self.room),
            ..Self::default()
        };
        if kept.is_some() {
            self.segments.push(kept);
            (self.bump, self.prepared) = ((0, SEGMENT), made);
        }
    }

    /// Joins neighbouring free runs, and gives segments back that are free as a whole.
    fn coalesce(&mut self) {
        self.freed_since = 0;
        let mut runs = std::mem::take(&mut self.long);
        for (count, bin) in (0..).zip(&mut self.bins) {
            runs.extend(std::mem::take(bin).into_iter().map(|at| (at, count)));
        }
        self.filled.fill(0);
        runs.sort_unstable();
        let mut runs = runs.into_iter().peekable();
        while let Some((at, mut count)) = runs.next() {
            let end = (at / SEGMENT + 1) * SEGMENT;
            while let Some((_, more)) = runs.next_if(|(next, _)| *next == at + count && *next < end)
            {
                count += more;
            }
            if count == SEGMENT {
                self.segments[(at / SEGMENT) as usize] = None;
                self.free -= u64::from(count);
            } else {
                self.list(at, count);
            }
        }
        while let Some(None) = self.segments.last() {
            self.segments.pop();
        }
    }

    /// Adds up what is where: for tests.
    #[cfg(test)]
    fn check(&self, blocks: &[(u32, u32)]) {
        let mut runs: Vec<(u32, u32)> = self.long.clone();
        for (count, bin) in (0..).zip(&self.bins) {
            runs.extend(bin.iter().map(|at| (*at, count)));
        }
        let listed: u64 = runs.iter().map(|run| u64::from(run.1)).sum();
        assert_eq!(listed, self.free, "what is free is listed");
        let used: u64 = blocks.iter().map(|run| u64::from(run.1)).sum();
        assert_eq!(used, self.used, "what is used is in blocks");
        runs.extend(blocks);
        runs.push((self.bump.0, self.bump.1 - self.bump.0));
        runs.retain(|run| run.1 > 0);
        runs.sort_unstable();
        for pair in runs.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:?} overlap");
        }
        let all: u64 = runs.iter().map(|run| u64::from(run.1)).sum();
        let segments = self.segments.iter().flatten().count() as u64;
        assert_eq!(all, segments * u64::from(SEGMENT), "nothing is forgotten");
        assert!(
            runs.iter()
                .all(|(at, count)| at / SEGMENT == (at + count - 1) / SEGMENT)
        );
    }
}

/// Where a granule begins in its segment.
pub(super) fn offset_of(at: u32) -> usize {
    (at % SEGMENT) as usize * GRANULE
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: blocks never overlap and nothing is forgotten. Method: random blocks come and go; the books
    /// are added up after each hundred, and each block's bytes are looked at before it goes.
    #[test]
    fn random_blocks_keep_their_bytes_and_the_books_are_right() {
        let mut heap = Heap::new(4096);
        let mut state = 7_u64;
        let mut random = move |below: usize| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(state >> 33).unwrap() % below
        };
        let mut held: Vec<(u32, Vec<u8>)> = Vec::new();
        for round in 0..30_000_usize {
            // Waves: the heap fills, and empties again.
            let grows = random(100) < if round / 5000 % 2 == 0 { 70 } else { 30 };
            if grows || held.is_empty() {
                let len = 1 + random(4095);
                let bytes: Vec<u8> = vec![round.to_le_bytes()[0]; len];
                let at = heap.keep(Source::from(&bytes[..])).unwrap();
                held.push((at, bytes));
            } else {
                let (at, bytes) = held.swap_remove(random(held.len()));
                let (segment, offset) = heap.place(at);
                let kept = segment.bytes(offset, bytes.len());
                assert!(kept.same(Source::from(&bytes[..])));
                heap.release(at, bytes.len());
            }
            if round % 100 == 0 {
                let blocks: Vec<(u32, u32)> = held
                    .iter()
                    .map(|(at, bytes)| (*at, granules(bytes.len())))
                    .collect();
                heap.check(&blocks);
            }
        }
        heap.coalesce();
        let live = heap.used_bytes();
        let mapped = heap.segments.iter().flatten().count() as u64 * 16 * u64::from(SEGMENT);
        println!("figure: {live} bytes in blocks, {mapped} in segments");
        for (at, bytes) in held {
            heap.release(at, bytes.len());
        }
        assert_eq!(heap.used_bytes(), 0);
        assert!(
            heap.segments.len() <= 1 && heap.free_bytes() <= u64::from(KEPT) * GRANULE as u64,
            "all memory is given back but a little"
        );
    }

    /// Goal: one value after the other does not take a new segment each, which cost 240 us, and none shows
    /// another's bytes. Method: the segment's address.
    #[test]
    fn an_empty_heap_keeps_a_little_for_whoever_puts_next() {
        let mut heap = Heap::new(4096);
        let mut before = None;
        for (round, len) in [40_usize, 1000, 40, 4000, 17].into_iter().enumerate() {
            let bytes = vec![round.to_le_bytes()[0] + 1; len];
            let at = heap.keep(Source::from(&bytes[..])).unwrap();
            let segment = Arc::as_ptr(heap.place(at).0);
            assert_eq!(*before.get_or_insert(segment), segment, "{round}");
            assert!(
                heap.place(at)
                    .0
                    .bytes(offset_of(at), len)
                    .same(Source::from(&bytes[..]))
            );
            heap.check(&[(at, granules(len))]);
            heap.release(at, len);
            heap.check(&[]);
            assert!(heap.free_bytes() <= u64::from(KEPT) * GRANULE as u64);
        }
    }
}
