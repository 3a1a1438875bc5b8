//! Records: what is remembered about one page between two looks, and where records are kept.
//!
//! A record ([`RmapItem`], 20 bytes) exists for each page that has one in the kernel's sense
//! ([`EXISTS`]), and for each page that this engine has put onto the zero page ([`ZERO`]; the kernel
//! marks those by the dirty bit of their page table entry). The two are independent. Three of its
//! words have two uses, because a page is never both a candidate and a sharer: tree links while
//! [`UNSTABLE`], and node, next and previous sharer while [`ATTACHED`]. The other two hold 48 bits of
//! the page's hash, the flags, and how often the page has been looked at, of which [`smart_scan`]
//! tells apart no more than 5 bits can name.
//!
//! 48 bits of a hash are enough, since equal hashes decide nothing: bytes are compared. Of the 4 million
//! pages of 16 GiB, two of different bytes have equal ones in 3 engines of a hundred, and those two are
//! compared once in each pass. All hashes in this crate are cut alike where they come in
//! ([`Digest::kept`]), so that both trees and all records go by the same order.
//!
//! Records lie in chunks, one for each stretch of 512 page numbers, so that a region of 64 GiB with few
//! pages present costs little more than those pages: a chunk with few records is a list of them, one
//! with many an array, and those that are there are found without visiting the others.
//!
//! # Invariants (proved by [`crate::check`])
//! * R1. A record is `UNSTABLE`, `ATTACHED` or neither, never both; and either one only if it
//!   `EXISTS`.
//! * R2. `BROKEN` is set only on `ATTACHED` records, `RECHECK` only on `HASHED` ones.
//! * R3. Page numbers of registered regions do not overlap; no record lies outside of them.
//! * R4. A chunk whose records are all empty is marked to be freed when the scan ends.
//!
//! # Cost
//! Access is three array look-ups (in a list, a binary search besides). Going over all records costs by
//! the chunks that are there, and one look for each 128 MiB. Freeing empty chunks reads only chunks that
//! lost a record. A lone record takes 56 bytes, besides 1 KiB for the 128 MiB around it; many take 20
//! each.

use crate::PageId;
use crate::forest::Keyed;
use crate::rbtree::{Links, NIL, Side};
#[cfg(doc)]
use crate::{Digest, smart_scan};

/// The page has a record in the kernel's sense: it was present when last looked at.
pub(crate) const EXISTS: u16 = 1 << 0;
/// The engine has put this page onto the zero page.
pub(crate) const ZERO: u16 = 1 << 1;
/// `hash` is that of the bytes at the last look.
pub(crate) const HASHED: u16 = 1 << 2;
/// Counted as being in the unstable tree.
pub(crate) const UNSTABLE: u16 = 1 << 3;
/// In the list of a stable node.
pub(crate) const ATTACHED: u16 = 1 << 4;
/// Attached, but known not to show the frame any more.
pub(crate) const BROKEN: u16 = 1 << 5;
/// Whether the page was written since its hash was taken is not known: the engine itself has moved it
/// (then "written" need not be true), or it was looked at without being hashed.
pub(crate) const RECHECK: u16 = 1 << 6;
/// Red, as a node of the unstable tree.
const RED: u16 = 1 << 7;
/// Inserted into the unstable tree during a scan of odd number.
pub(crate) const ODD_SCAN: u16 = 1 << 8;
/// Counted in `Stats::skipped`, in a scan of even or of odd number.
pub(crate) const COUNTED_EVEN: u16 = 1 << 9;
/// See [`COUNTED_EVEN`].
pub(crate) const COUNTED_ODD: u16 = 1 << 10;

/// Where, among the flags, the number of looks lies.
const LOOKS_SHIFT: u32 = 11;
const LOOKS: u16 = u16::MAX << LOOKS_SHIFT;
/// The looks that a record can count.
pub(crate) const LOOKS_MAX: u8 = (1 << (u16::BITS - LOOKS_SHIFT)) - 1;

/// Records in a chunk.
pub(crate) const CHUNK: usize = 512;
const SHIFT: u32 = CHUNK.trailing_zeros();

/// What is remembered about one page.
///
/// (Packed only so that five words of 32 bits are not rounded up to six: each field is read and written
/// at once, which costs the same wherever it lies.)
#[doc(alias = "ksm_rmap_item")]
#[derive(Clone, Copy, Debug)]
#[repr(C, packed(4))]
pub(crate) struct RmapItem {
    /// The hash of the page's bytes at the last look (the kernel's `oldchecksum`), if `HASHED`: the
    /// highest 48 bits. The others are flags, and looks for smart scan.
    hash_and_flags: u64,
    /// Left, right, parent; or node, next, previous.
    links: [u32; 3],
}

const _: () = assert!(
    size_of::<RmapItem>() <= 20,
    "a record costs at most 20 bytes"
);

/// Those bits of `hash_and_flags` that are flags and looks.
const FLAGS: u64 = u16::MAX as u64;

impl RmapItem {
    const EMPTY: Self = Self {
        hash_and_flags: 0,
        links: [NIL; 3],
    };

    #[expect(
        clippy::cast_possible_truncation,
        reason = "the lowest 16 bits are meant"
    )]
    fn flags(&self) -> u16 {
        self.hash_and_flags as u16
    }

    /// Whether all of `flags` are set.
    pub(crate) fn is(&self, flags: u16) -> bool {
        self.flags() & flags == flags
    }

    /// Those of `mask` that are set.
    pub(crate) fn only(&self, mask: u16) -> u16 {
        self.flags() & mask
    }

    pub(crate) fn set(&mut self, flags: u16) {
        self.hash_and_flags |= u64::from(flags);
    }

    pub(crate) fn clear(&mut self, flags: u16) {
        self.hash_and_flags &= !u64::from(flags);
    }

    /// The last hash, of use only while `HASHED`.
    pub(crate) fn hash(&self) -> u64 {
        self.hash_and_flags & !FLAGS
    }

    /// The last hash, if there is one.
    pub(crate) fn kept_hash(&self) -> Option<u64> {
        self.is(HASHED).then_some(self.hash())
    }

    /// Takes note of a hash, as [`Digest::kept`] cuts it.
    pub(crate) fn set_hash(&mut self, hash: u64) {
        debug_assert_eq!(hash & FLAGS, 0, "a kept hash has 48 bits");
        self.hash_and_flags = hash | self.hash_and_flags & FLAGS;
    }

    /// How many looks smart scan has counted.
    pub(crate) fn looks(&self) -> u8 {
        u8::try_from(self.flags() >> LOOKS_SHIFT).expect("five bits are left")
    }

    pub(crate) fn set_looks(&mut self, looks: u8) {
        debug_assert!(looks <= LOOKS_MAX, "{looks} looks cannot be counted");
        self.clear(LOOKS);
        self.set(u16::from(looks) << LOOKS_SHIFT);
    }

    /// Attached and showing its frame, as far as is known.
    pub(crate) fn shows_frame(&self) -> bool {
        self.only(ATTACHED | BROKEN) == ATTACHED
    }

    /// The stable node whose list holds it.
    pub(crate) fn node(&self) -> u32 {
        debug_assert!(self.is(ATTACHED), "only an attached record has a node");
        self.links[0]
    }

    pub(crate) fn next(&self) -> u32 {
        self.links[1]
    }

    pub(crate) fn prev(&self) -> u32 {
        self.links[2]
    }

    pub(crate) fn set_next(&mut self, page: u32) {
        self.links[1] = page;
    }

    pub(crate) fn set_prev(&mut self, page: u32) {
        self.links[2] = page;
    }

    pub(crate) fn enlist(&mut self, node: u32, next: u32) {
        self.links = [node, next, NIL];
        self.set(ATTACHED);
    }
}

static EMPTY: RmapItem = RmapItem::EMPTY;

/// Chunks of one leaf of the directory: 128 MiB of pages of 4 KiB, and the bits of a word.
const LEAF: usize = 64;
const LEAF_SHIFT: u32 = SHIFT + LEAF.trailing_zeros();
/// Records up to which a chunk is a list.
const FEW: usize = 128;

/// The records of [`CHUNK`] pages.
#[derive(Clone, Debug)]
enum Chunk {
    /// Not there.
    None,
    /// Those that are there, by their place in the chunk, in ascending order.
    Few(Box<Few>),
    /// All of them.
    Dense(Box<Dense>),
}

#[derive(Clone, Debug)]
struct Few {
    items: Vec<(u16, RmapItem)>,
    /// A record has been dropped since it was last seen whether others are left.
    lost_one: bool,
}

#[derive(Clone, Debug)]
struct Dense {
    items: [RmapItem; CHUNK],
    /// As in [`Few`].
    lost_one: bool,
}

impl Few {
    fn place(&self, at: usize) -> Result<usize, usize> {
        self.items
            .binary_search_by_key(&at, |(place, _)| usize::from(*place))
    }
}

impl Chunk {
    fn get(&self, at: usize) -> &RmapItem {
        match self {
            Self::Dense(dense) => &dense.items[at],
            Self::Few(few) => few.place(at).map_or(&EMPTY, |n| &few.items[n].1),
            Self::None => &EMPTY,
        }
    }

    fn get_mut(&mut self, at: usize) -> &mut RmapItem {
        self.make_room(at);
        match self {
            Self::Dense(dense) => &mut dense.items[at],
            Self::Few(few) => {
                let n = few.place(at).unwrap_or_else(|n| {
                    few.items.insert(n, (low16(at), RmapItem::EMPTY));
                    n
                });
                &mut few.items[n].1
            }
            Self::None => unreachable!("room has just been made"),
        }
    }

    /// Makes a list of nothing, and an array of a list that is full.
    fn make_room(&mut self, at: usize) {
        match self {
            Self::Dense(_) => {}
            Self::Few(few) => {
                if few.items.len() == FEW && few.place(at).is_err() {
                    let mut dense = Box::new(Dense {
                        items: [RmapItem::EMPTY; CHUNK],
                        lost_one: few.lost_one,
                    });
                    for &(place, item) in &few.items {
                        dense.items[usize::from(place)] = item;
                    }
                    *self = Self::Dense(dense);
                }
            }
            Self::None => {
                *self = Self::Few(Box::new(Few {
                    // Mostly all of a chunk's pages follow, or none.
                    items: Vec::with_capacity(1),
                    lost_one: false,
                }));
            }
        }
    }

    fn may_be_empty(&mut self) {
        match self {
            Self::Dense(dense) => dense.lost_one = true,
            Self::Few(few) => few.lost_one = true,
            Self::None => {}
        }
    }

    /// Drops empty records where one was lost. Returns whether no record is left.
    fn tidy(&mut self) -> bool {
        match self {
            Self::Dense(dense) => {
                if !std::mem::take(&mut dense.lost_one) {
                    return false;
                }
                dense.items.iter().all(|item| item.flags() == 0)
            }
            Self::Few(few) => {
                if !std::mem::take(&mut few.lost_one) {
                    return false;
                }
                few.items.retain(|(_, item)| item.flags() != 0);
                few.items.is_empty()
            }
            Self::None => true,
        }
    }

    /// Whether it would be kept for ever though all its records are empty.
    fn is_forgotten(&self) -> bool {
        match self {
            Self::Dense(dense) => {
                !dense.lost_one && dense.items.iter().all(|item| item.flags() == 0)
            }
            Self::Few(few) => !few.lost_one && few.items.iter().all(|(_, item)| item.flags() == 0),
            Self::None => false,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Dense(_) => size_of::<Dense>(),
            Self::Few(few) => {
                size_of::<Few>() + few.items.capacity() * size_of::<(u16, RmapItem)>()
            }
            Self::None => 0,
        }
    }
}

/// The chunks of a stretch of pages, and which of them are there.
#[derive(Clone, Debug)]
struct Leaf {
    there: u64,
    chunks: [Chunk; LEAF],
}

impl Leaf {
    fn new() -> Box<Self> {
        Box::new(Self {
            there: 0,
            chunks: [const { Chunk::None }; LEAF],
        })
    }

    /// The first chunk from `from` on that is there.
    fn next(&self, from: usize) -> Option<usize> {
        let seen = self.there.checked_shr(low32(from))? << from;
        (seen != 0).then_some(seen.trailing_zeros() as usize)
    }
}

/// All records, by page.
#[derive(Clone, Debug, Default)]
pub(crate) struct Records {
    leaves: Vec<Option<Box<Leaf>>>,
}

impl Records {
    /// Makes room for pages below `end`.
    pub(crate) fn reach(&mut self, end: u32) {
        let leaves = (end as usize).div_ceil(1 << LEAF_SHIFT);
        if leaves > self.leaves.len() {
            self.leaves.resize(leaves, None);
        }
    }

    fn chunk(&self, page: PageId) -> Option<&Chunk> {
        let leaf = self.leaves[page.index() >> LEAF_SHIFT].as_deref()?;
        Some(&leaf.chunks[page.index() >> SHIFT & (LEAF - 1)])
    }

    /// The record of a page; an empty one if there is none.
    pub(crate) fn get(&self, page: PageId) -> &RmapItem {
        let chunk = self.chunk(page);
        chunk.map_or(&EMPTY, |chunk| chunk.get(page.index() % CHUNK))
    }

    /// The record of a page, to be filled or changed.
    pub(crate) fn get_mut(&mut self, page: PageId) -> &mut RmapItem {
        let leaf = self.leaves[page.index() >> LEAF_SHIFT].get_or_insert_with(Leaf::new);
        let at = page.index() >> SHIFT & (LEAF - 1);
        let chunk = &mut leaf.chunks[at];
        if matches!(chunk, Chunk::None) {
            leaf.there |= 1 << at;
        }
        chunk.get_mut(page.index() % CHUNK)
    }

    /// The records from `page` on that lie in one piece, or `None` and how many would if they
    /// were there.
    pub(crate) fn stretch(&self, page: PageId) -> Result<&[RmapItem], usize> {
        let at = page.index() % CHUNK;
        match self.chunk(page) {
            Some(Chunk::Dense(dense)) => Ok(&dense.items[at..]),
            Some(Chunk::Few(few)) => match few.place(at) {
                Ok(n) => Ok(std::slice::from_ref(&few.items[n].1)),
                Err(n) => {
                    let next = few.items.get(n);
                    Err(next.map_or(CHUNK, |(place, _)| usize::from(*place)) - at)
                }
            },
            Some(Chunk::None) | None => Err(CHUNK - at),
        }
    }

    /// Forgets everything of a page but its mark as a zero page. It is in no structure by now.
    pub(crate) fn drop_item(&mut self, page: PageId) {
        let item = self.get_mut(page);
        debug_assert!(
            item.only(UNSTABLE | ATTACHED) == 0,
            "{page:?} is still linked"
        );
        let zero = item.only(ZERO);
        *item = RmapItem::EMPTY;
        item.set(zero);
        self.may_be_empty(page);
    }

    /// Takes the mark of a zero page away.
    pub(crate) fn clear_zero(&mut self, page: PageId) {
        self.get_mut(page).clear(ZERO);
        self.may_be_empty(page);
    }

    fn may_be_empty(&mut self, page: PageId) {
        if let Some(leaf) = &mut self.leaves[page.index() >> LEAF_SHIFT] {
            leaf.chunks[page.index() >> SHIFT & (LEAF - 1)].may_be_empty();
        }
    }

    /// Frees those chunks for pages of this range whose records are all empty.
    pub(crate) fn free_empty_chunks(&mut self, first: u32, end: u32) {
        let (first, end) = (first as usize / CHUNK, (end as usize).div_ceil(CHUNK));
        for number in first / LEAF..end.div_ceil(LEAF) {
            let Some(leaf) = &mut self.leaves[number] else {
                continue;
            };
            let mut from = first.saturating_sub(number * LEAF);
            while let Some(at) = leaf.next(from)
                && number * LEAF + at < end
            {
                if leaf.chunks[at].tidy() {
                    leaf.chunks[at] = Chunk::None;
                    leaf.there &= !(1 << at);
                }
                from = at + 1;
            }
            if leaf.there == 0 {
                self.leaves[number] = None;
            }
        }
    }

    /// The first page of `from..end` for which there may be a record, in a chunk that is there; with
    /// the end of that chunk, or of the range.
    pub(crate) fn next_chunk(&self, from: u32, end: u32) -> Option<(u32, u32)> {
        let mut at = from;
        while at < end {
            let place = (at >> SHIFT) as usize % LEAF;
            let leaf = self.leaves[(at >> LEAF_SHIFT) as usize].as_deref();
            if let Some(found) = leaf.and_then(|leaf| leaf.next(place)) {
                let first = at.max((at >> LEAF_SHIFT << LEAF_SHIFT) + low32(found * CHUNK));
                let after = (first >> SHIFT << SHIFT).saturating_add(low32(CHUNK));
                return (first < end).then_some((first, after.min(end)));
            }
            at = ((at >> LEAF_SHIFT) + 1).checked_mul(1 << LEAF_SHIFT)?;
        }
        None
    }

    /// The first page at or after `from`, and before `end`, whose record has any of `flags`.
    pub(crate) fn find(&self, from: u32, end: u32, flags: u16) -> Option<PageId> {
        let mut from = from;
        while let Some((first, after)) = self.next_chunk(from, end) {
            let (at, count) = (first as usize % CHUNK, (after - first) as usize);
            let found = match self.chunk(PageId(first)) {
                Some(Chunk::Dense(dense)) => dense.items[at..at + count]
                    .iter()
                    .position(|item| item.only(flags) != 0),
                Some(Chunk::Few(few)) => few.items[few.place(at).unwrap_or_else(|n| n)..]
                    .iter()
                    .find(|(_, item)| item.only(flags) != 0)
                    .map(|(place, _)| usize::from(*place) - at)
                    .filter(|&n| n < count),
                Some(Chunk::None) | None => None,
            };
            if let Some(n) = found {
                return Some(PageId(first + low32(n)));
            }
            from = after;
        }
        None
    }

    /// Bytes taken.
    pub(crate) fn bytes(&self) -> usize {
        let leaves = self.leaves.iter().flatten();
        let chunks: usize = leaves
            .map(|leaf| size_of::<Leaf>() + leaf.chunks.iter().map(Chunk::bytes).sum::<usize>())
            .sum();
        chunks + self.leaves.capacity() * size_of::<Option<Box<Leaf>>>()
    }

    /// The first page of a chunk that would be kept for ever though all its records are empty.
    pub(crate) fn forgotten_chunk(&self) -> Option<usize> {
        let mut from = 0;
        while let Some((first, after)) = self.next_chunk(from, self.end()) {
            if self.chunk(PageId(first)).is_some_and(Chunk::is_forgotten) {
                return Some(first as usize);
            }
            from = after;
        }
        None
    }

    /// How many pages there is room for.
    pub(crate) fn end(&self) -> u32 {
        u32::try_from(self.leaves.len() << LEAF_SHIFT).unwrap_or(u32::MAX)
    }
}

fn low16(place: usize) -> u16 {
    u16::try_from(place).expect("a place in a chunk")
}

/// A count that is known to fit, because page numbers have 32 bits.
pub(crate) fn low32(n: usize) -> u32 {
    u32::try_from(n).expect("no count of pages exceeds the page numbers")
}

impl Keyed for Records {
    fn key(&self, at: u32) -> u64 {
        self.get(PageId(at)).hash()
    }
}

/// While `UNSTABLE`, records are the nodes of a tree.
impl Links for Records {
    fn child(&self, at: u32, side: Side) -> u32 {
        self.get(PageId(at)).links[side as usize]
    }

    fn set_child(&mut self, at: u32, side: Side, to: u32) {
        self.get_mut(PageId(at)).links[side as usize] = to;
    }

    fn parent(&self, at: u32) -> u32 {
        self.get(PageId(at)).links[2]
    }

    fn set_parent(&mut self, at: u32, to: u32) {
        self.get_mut(PageId(at)).links[2] = to;
    }

    fn is_red(&self, at: u32) -> bool {
        self.get(PageId(at)).is(RED)
    }

    fn set_red(&mut self, at: u32, red: bool) {
        let item = self.get_mut(PageId(at));
        if red { item.set(RED) } else { item.clear(RED) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: what lies in one word does not get into one another's way. Method: each is set to its
    /// greatest and its least value while the others are at the opposite end.
    #[test]
    fn hash_looks_and_flags_keep_apart() {
        const ALL: u16 = !LOOKS;
        const HASH: u64 = !FLAGS;
        for (hash, looks, flags) in [(HASH, 0, 0), (0, LOOKS_MAX, 0), (0, 0, ALL)] {
            let mut item = RmapItem::EMPTY;
            item.set_hash(hash);
            item.set_looks(looks);
            item.set(flags);
            assert_eq!((item.hash(), item.looks()), (hash, looks));
            assert_eq!(item.only(ALL), flags);

            item.set_hash(HASH ^ hash);
            item.set_looks(LOOKS_MAX - looks);
            item.clear(flags);
            item.set(ALL ^ flags);
            assert_eq!(
                (item.hash(), item.looks()),
                (HASH ^ hash, LOOKS_MAX - looks)
            );
            assert_eq!(item.only(ALL), ALL ^ flags);
        }
    }
}
