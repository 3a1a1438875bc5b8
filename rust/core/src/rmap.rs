//! Records: what is remembered about one page between two looks, and where records are kept.
//!
//! A record ([`RmapItem`], 24 bytes) exists for each page that has one in the kernel's sense
//! ([`EXISTS`]), and for each page that this engine has put onto the zero page ([`ZERO`]; the kernel
//! marks those by the dirty bit of their page table entry). The two are independent. Three of its
//! words have two uses, because a page is never both a candidate and a sharer: tree links while
//! [`UNSTABLE`], and node, next and previous sharer while [`ATTACHED`].
//!
//! Records lie in chunks of 512, one for each stretch of page numbers, so that a region of 64 GiB with
//! few pages present costs little more than those pages.
//!
//! # Invariants (proved by [`crate::check`])
//! * R1. A record is `UNSTABLE`, `ATTACHED` or neither, never both; and either one only if it
//!   `EXISTS`.
//! * R2. `BROKEN` is set only on `ATTACHED` records, `RECHECK` only on `HASHED` ones.
//! * R3. Page numbers of registered regions do not overlap; no record lies outside of them.
//! * R4. A chunk whose records are all empty is marked to be freed when the scan ends.
//!
//! # Cost
//! Access is two array look-ups. Freeing empty chunks reads only chunks that lost a record.

use crate::PageId;
use crate::rbtree::{Links, NIL, Side};

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

/// Records in a chunk.
pub(crate) const CHUNK: usize = 512;
const SHIFT: u32 = CHUNK.trailing_zeros();

/// What is remembered about one page.
#[doc(alias = "ksm_rmap_item")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct RmapItem {
    /// The hash of the page's bytes at the last look (the kernel's `oldchecksum`), if `HASHED`.
    pub(crate) hash: u64,
    /// Left, right, parent; or node, next, previous.
    links: [u32; 3],
    /// Looks, for smart scan.
    pub(crate) age: u8,
    /// Looks still to be left out.
    pub(crate) remaining_skips: u8,
    flags: u16,
}

const _: () = assert!(
    size_of::<RmapItem>() <= 24,
    "a record costs at most 24 bytes"
);

impl RmapItem {
    const EMPTY: Self = Self {
        hash: 0,
        links: [NIL; 3],
        age: 0,
        remaining_skips: 0,
        flags: 0,
    };

    /// Whether all of `flags` are set.
    pub(crate) fn is(&self, flags: u16) -> bool {
        self.flags & flags == flags
    }

    /// Those of `mask` that are set.
    pub(crate) fn only(&self, mask: u16) -> u16 {
        self.flags & mask
    }

    pub(crate) fn set(&mut self, flags: u16) {
        self.flags |= flags;
    }

    pub(crate) fn clear(&mut self, flags: u16) {
        self.flags &= !flags;
    }

    /// The last hash, if there is one.
    pub(crate) fn kept_hash(&self) -> Option<u64> {
        self.is(HASHED).then_some(self.hash)
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

#[derive(Clone, Debug)]
struct Chunk {
    items: Box<[RmapItem; CHUNK]>,
    /// A record has been dropped since it was last seen whether others are left.
    lost_one: bool,
}

/// All records, by page.
#[derive(Clone, Debug, Default)]
pub(crate) struct Records {
    chunks: Vec<Option<Chunk>>,
    present: usize,
}

impl Records {
    /// Makes room for pages below `end`.
    pub(crate) fn reach(&mut self, end: u32) {
        let chunks = (end as usize).div_ceil(CHUNK);
        if chunks > self.chunks.len() {
            self.chunks.resize(chunks, None);
        }
    }

    /// The record of a page; an empty one if there is none.
    pub(crate) fn get(&self, page: PageId) -> &RmapItem {
        match &self.chunks[page.index() >> SHIFT] {
            Some(chunk) => &chunk.items[page.index() % CHUNK],
            None => &EMPTY,
        }
    }

    /// The record of a page, to be filled or changed.
    pub(crate) fn get_mut(&mut self, page: PageId) -> &mut RmapItem {
        let slot = &mut self.chunks[page.index() >> SHIFT];
        let chunk = slot.get_or_insert_with(|| {
            self.present += 1;
            Chunk {
                items: Box::new([RmapItem::EMPTY; CHUNK]),
                lost_one: false,
            }
        });
        &mut chunk.items[page.index() % CHUNK]
    }

    /// The records from `page` on that lie in one piece, or `None` and how many would if they
    /// were there.
    pub(crate) fn stretch(&self, page: PageId) -> Result<&[RmapItem], usize> {
        let at = page.index() % CHUNK;
        match &self.chunks[page.index() >> SHIFT] {
            Some(chunk) => Ok(&chunk.items[at..]),
            None => Err(CHUNK - at),
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
        if let Some(chunk) = &mut self.chunks[page.index() >> SHIFT] {
            chunk.lost_one = true;
        }
    }

    /// Frees those chunks for pages of this range whose records are all empty.
    pub(crate) fn free_empty_chunks(&mut self, first: u32, end: u32) {
        let range = first as usize / CHUNK..(end as usize).div_ceil(CHUNK);
        for slot in &mut self.chunks[range] {
            let Some(chunk) = slot else { continue };
            if !chunk.lost_one {
                continue;
            }
            if chunk.items.iter().all(|item| item.flags == 0) {
                *slot = None;
                self.present -= 1;
            } else {
                chunk.lost_one = false;
            }
        }
    }

    /// The first page at or after `from`, and before `end`, whose record has any of `flags`.
    pub(crate) fn find(&self, from: u32, end: u32, flags: u16) -> Option<PageId> {
        let mut at = from;
        while at < end {
            let left = (end - at) as usize;
            match self.stretch(PageId(at)) {
                Ok(items) => {
                    let items = &items[..items.len().min(left)];
                    if let Some(n) = items.iter().position(|item| item.only(flags) != 0) {
                        return Some(PageId(at + low32(n)));
                    }
                    at += low32(items.len());
                }
                Err(missing) => at += low32(missing.min(left)),
            }
        }
        None
    }

    /// Bytes taken.
    pub(crate) fn bytes(&self) -> usize {
        self.present * size_of::<[RmapItem; CHUNK]>()
            + self.chunks.capacity() * size_of::<Option<Chunk>>()
    }

    /// The first page of a chunk that would be kept for ever though all its records are empty.
    pub(crate) fn forgotten_chunk(&self) -> Option<usize> {
        let empty = |chunk: &Chunk| chunk.items.iter().all(|item| item.flags == 0);
        let forgotten =
            |slot: &Option<Chunk>| slot.as_ref().is_some_and(|c| !c.lost_one && empty(c));
        self.chunks
            .iter()
            .position(forgotten)
            .map(|chunk| chunk * CHUNK)
    }

    /// How many pages there is room for.
    pub(crate) fn end(&self) -> u32 {
        low32(self.chunks.len() * CHUNK)
    }
}

/// A count that is known to fit, because page numbers have 32 bits.
pub(crate) fn low32(n: usize) -> u32 {
    u32::try_from(n).expect("no count of pages exceeds the page numbers")
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
