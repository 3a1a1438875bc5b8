//! Bytes that callers hand over to be kept, and memory of our own that keeps them.
//!
//! # Invariants
//! * No reference points into kept memory: bytes go in and out by copying, and are compared where they
//!   lie. So two threads that use the same place at once get some mixture, and nothing worse. (That
//!   nobody writes what somebody reads is the business of whoever deals out the places.)
//! * Every access is checked against the mapping that it is in, which is borrowed meanwhile.
//!
//! # Cost
//! Copying and comparing are bound by memory. What does not begin at a multiple of 16 bytes goes
//! through a buffer on the stack, at half the speed in the cache.

use super::Span;
use super::mapping::Mapping;
use super::memory::{self, Words};
use crate::hash::PageHasher;
use pagemerge_core::Digest;
use std::marker::PhantomData;

/// What goes through the stack at a time.
const BOUNCE: usize = 4096;

/// Bytes that a caller lends for a call. They may be written meanwhile, by whoever has them, too; what
/// is kept is then some mixture of the old and the new ones.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    span: Span,
    /// Nobody writes them.
    steady: bool,
    lent: PhantomData<&'a [u8]>,
}

impl<'a> From<&'a [u8]> for Source<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self {
            span: Span::new(bytes.as_ptr().expose_provenance(), bytes.len()),
            steady: true,
            lent: PhantomData,
        }
    }
}

impl Source<'_> {
    /// Bytes that others may write.
    ///
    /// # Safety
    /// `at` is mapped and readable for `len` bytes for as long as the value, or a part of it, is used.
    pub unsafe fn promised(at: *const u8, len: usize) -> Self {
        Self {
            span: Span::new(at.expose_provenance(), len),
            steady: false,
            lent: PhantomData,
        }
    }

    /// Where they lie.
    #[must_use]
    pub fn as_ptr(self) -> *const u8 {
        self.span.as_ptr()
    }

    /// How many bytes.
    #[must_use]
    pub fn len(self) -> usize {
        self.span.len
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.span.is_empty()
    }

    /// Whether nobody writes them meanwhile: what is read twice is the same.
    #[must_use]
    pub fn is_steady(self) -> bool {
        self.steady
    }

    /// `len` bytes of it from `offset` on.
    ///
    /// # Panics
    /// When that is not inside.
    #[must_use]
    pub fn part(self, offset: usize, len: usize) -> Self {
        Self {
            span: self.span.part(offset, len),
            ..self
        }
    }

    /// Copies them.
    ///
    /// # Panics
    /// Unless `into` is as long.
    pub fn copy_to(self, into: &mut [u8]) {
        assert_eq!(into.len(), self.len(), "a copy is as long as its source");
        // SAFETY: mapped for as many bytes, by the promise or by the borrow that this was made of.
        unsafe { memory::copy(self.span.as_ptr(), into) };
    }

    /// The digest of a page; `next` is what will be asked for next, if that is known.
    pub(crate) fn digest(self, hasher: &PageHasher, next: Option<Self>) -> Digest {
        let at = self.span.as_ptr();
        if at.addr().is_multiple_of(16) {
            assert_eq!(self.len(), hasher.page_size(), "a page has another length");
            // SAFETY: aligned, and mapped by the promise or the borrow.
            return unsafe { hasher.digest(at, next.map(Self::as_ptr)) };
        }
        let mut page = vec![0_u64; self.len().div_ceil(8) + 1];
        let start = usize::from(!page.as_ptr().addr().is_multiple_of(16));
        let page = &mut page[start..start + self.len() / 8];
        self.copy_to(memory::as_bytes_mut(page));
        // SAFETY: the buffer is there until this returns, and aligned.
        unsafe { hasher.digest(page.as_ptr().cast(), None) }
    }

    /// A keyed hash of any number of bytes up to a page, the number included.
    ///
    /// # Panics
    /// When there are more.
    pub(crate) fn hash(self, hasher: &PageHasher) -> u64 {
        let len = self.len();
        let whole = len / 16 * 16;
        let mut last = [0_u64; 2];
        self.part(whole, len - whole)
            .copy_to(&mut memory::as_bytes_mut(&mut last)[..len - whole]);
        let first = match whole {
            0 => 0,
            _ if self.span.start.is_multiple_of(8) => {
                // SAFETY: mapped by the promise or the borrow.
                let words = unsafe { Words::new(self.span.as_ptr(), whole) };
                hasher.hash_words(words)
            }
            _ => self.part(0, whole).hash_moved(hasher),
        };
        hasher.hash_short(first, last, len)
    }

    /// The hash of bytes that do not lie at a multiple of 8: of a copy of them.
    fn hash_moved(self, hasher: &PageHasher) -> u64 {
        let mut words = vec![0_u64; self.len() / 8];
        self.copy_to(memory::as_bytes_mut(&mut words));
        // SAFETY: the buffer is there until this returns.
        hasher.hash_words(unsafe { Words::new(words.as_ptr().cast(), self.len()) })
    }
}

/// A place in our own memory, which is borrowed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kept<'a> {
    span: Span,
    within: PhantomData<&'a Mapping>,
}

impl<'a> Kept<'a> {
    /// `len` bytes of `mapping`, which is readable, from `offset` on.
    ///
    /// # Panics
    /// When that is not inside.
    pub(crate) fn within(mapping: &'a Mapping, offset: usize, len: usize) -> Self {
        Self {
            span: mapping.span().part(offset, len),
            within: PhantomData,
        }
    }

    /// Copies `source` there. The mapping is writable, and what is copied has memory already.
    ///
    /// # Panics
    /// Unless both are of one length.
    pub(crate) fn write(self, source: Source<'_>) {
        assert_eq!(
            source.len(),
            self.span.len,
            "a copy is as long as its source"
        );
        // SAFETY: mapped by the promise or the borrow of the source, and by the borrow of the mapping,
        // for this many bytes; no reference points into either, and whoever has fresh memory from us
        // has it nowhere else.
        unsafe { memory::store(source.span.as_ptr(), self.span.as_mut_ptr(), self.span.len) };
    }

    /// Copies the bytes out.
    #[cfg(test)]
    pub(crate) fn read(self, into: &mut [u8]) {
        self.as_source().copy_to(into);
    }

    /// The bytes, to be read.
    pub(crate) fn as_source(self) -> Source<'a> {
        Source {
            span: self.span,
            steady: true,
            lent: PhantomData,
        }
    }
}

impl Source<'_> {
    /// Whether all bytes of both are equal.
    #[must_use]
    pub fn same(self, other: Source<'_>) -> bool {
        if self.len() != other.len() {
            return false;
        }
        let (a, b) = (self.span.as_ptr(), other.span.as_ptr());
        let blocks = if a.addr().is_multiple_of(16) && b.addr().is_multiple_of(16) {
            self.len() / 64 * 64
        } else {
            0
        };
        // SAFETY: both are mapped, by promises or borrows, and aligned.
        if blocks > 0 && !unsafe { memory::equal(a, b, blocks) } {
            return false;
        }
        let rest = self.len() - blocks;
        let (a, b) = (self.part(blocks, rest), other.part(blocks, rest));
        if rest < 64 {
            a.same_copies::<64>(b)
        } else {
            a.same_copies::<BOUNCE>(b)
        }
    }

    /// The same, of copies of `N` bytes at a time.
    fn same_copies<const N: usize>(self, other: Source<'_>) -> bool {
        let (mut one, mut two) = ([0; N], [0; N]);
        (0..self.len()).step_by(N).all(|at| {
            let len = N.min(self.len() - at);
            self.part(at, len).copy_to(&mut one[..len]);
            other.part(at, len).copy_to(&mut two[..len]);
            one[..len] == two[..len]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::mapping::Protection;
    use crate::sys::page_size;

    fn bytes(len: usize, seed: u8) -> Vec<u8> {
        (0..len)
            .map(|at| seed.wrapping_add((at % 251).to_le_bytes()[0]))
            .collect()
    }

    #[test]
    fn what_was_written_reads_back_and_compares_at_any_place_and_length() {
        let place = Mapping::anonymous(4 * page_size(), Protection::ReadWrite).unwrap();
        for (offset, len) in [
            (0, 0),
            (0, 1),
            (3, 61),
            (16, 64),
            (32, 4096),
            (5, 9001),
            (48, 8191),
        ] {
            for skew in [0, 1, 8] {
                let data = bytes(len + skew, 7);
                let source = Source::from(&data[skew..]);
                let kept = Kept::within(&place, offset, len);
                kept.write(source);
                let mut back = vec![0; len];
                kept.read(&mut back);
                assert_eq!(back, data[skew..]);
                assert!(source.same(kept.as_source()));
                for at in [0, len / 2, len.saturating_sub(1)]
                    .into_iter()
                    .filter(|at| *at < len)
                {
                    back[at] ^= 1;
                    assert!(!kept.as_source().same(Source::from(&back[..])), "byte {at}");
                    back[at] ^= 1;
                }
            }
        }
    }

    #[test]
    fn hash_depends_on_every_byte_and_the_length_and_not_on_the_place() {
        let hasher = PageHasher::new(5);
        let mut seen = std::collections::HashSet::new();
        for len in 0..300 {
            let data = vec![0; len + 1];
            let hash = Source::from(&data[..len]).hash(&hasher);
            assert!(seen.insert(hash), "{len} zeroes");
            assert_eq!(Source::from(&data[1..]).hash(&hasher), hash);
        }
        let mut data = bytes(4096, 1);
        let before = Source::from(&data[..]).hash(&hasher);
        for at in (0..4096).step_by(37) {
            data[at] ^= 0x10;
            assert_ne!(Source::from(&data[..]).hash(&hasher), before, "byte {at}");
            data[at] ^= 0x10;
        }
    }

    #[test]
    fn digest_of_a_page_does_not_depend_on_its_alignment() {
        let hasher = PageHasher::new(5);
        let page = page_size();
        let data = bytes(2 * page, 3);
        let mut digests = std::collections::HashSet::new();
        for skew in 0..17 {
            let mut moved = vec![0; skew];
            moved.extend_from_slice(&data[..page]);
            digests.insert(Source::from(&moved[skew..]).digest(&hasher, None).hash);
        }
        assert_eq!(digests.len(), 1);
    }
}
