//! The only place where bytes of live memory are read.
//!
//! Another thread, another language or a device may write these bytes at any moment. So they are
//! never lent as a slice: they are read with volatile loads, once each, into registers or into a
//! buffer of our own, and what was read may be half old and half new. No caller acts on it before
//! the bytes have been compared again while nobody can write.
//!
//! # Why volatile
//! The compiler must assume neither that a byte read twice is the same twice, nor that it may read
//! twice where we read once; volatile says both. The memory is outside every allocation that Rust
//! knows of, so no reference and no other Rust access is affected.
//!
//! # Cost
//! A page from memory about 0.1 us. The zero test ends at the first 64 bytes that are not zero,
//! which for all but zero pages is the first.

use std::cmp::Ordering;

#[cfg(target_arch = "x86_64")]
mod lane {
    use std::arch::x86_64::{
        __m128i, _mm_cmpeq_epi8, _mm_movemask_epi8, _mm_or_si128, _mm_setzero_si128,
        _mm_storeu_si128, _mm_xor_si128,
    };

    /// What is loaded at once. SSE2 is part of every x86-64.
    pub(super) type Lane = __m128i;

    pub(super) fn xor(a: Lane, b: Lane) -> Lane {
        // SAFETY: SSE2 is part of every x86-64.
        unsafe { _mm_xor_si128(a, b) }
    }

    pub(super) fn or(a: Lane, b: Lane) -> Lane {
        // SAFETY: SSE2 is part of every x86-64.
        unsafe { _mm_or_si128(a, b) }
    }

    pub(super) fn is_zero(a: Lane) -> bool {
        // SAFETY: SSE2 is part of every x86-64.
        let zero = unsafe { _mm_setzero_si128() };
        // SAFETY: as above.
        let same = unsafe { _mm_cmpeq_epi8(a, zero) };
        // SAFETY: as above.
        unsafe { _mm_movemask_epi8(same) == 0xffff }
    }

    /// # Safety
    /// `to` is valid for 16 bytes of writing.
    pub(super) unsafe fn store(to: *mut u8, a: Lane) {
        // SAFETY: the caller's promise; the store needs no alignment.
        unsafe { _mm_storeu_si128(to.cast(), a) }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod lane {
    /// What is loaded at once.
    pub(super) type Lane = u64;

    pub(super) fn xor(a: Lane, b: Lane) -> Lane {
        a ^ b
    }

    pub(super) fn or(a: Lane, b: Lane) -> Lane {
        a | b
    }

    pub(super) fn is_zero(a: Lane) -> bool {
        a == 0
    }

    /// # Safety
    /// `to` is valid for 8 bytes of writing.
    pub(super) unsafe fn store(to: *mut u8, a: Lane) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<Lane>().write_unaligned(a) }
    }
}

use lane::Lane;

const LANE: usize = size_of::<Lane>();
/// Bytes looked at between two decisions.
const BLOCK: usize = 64;
const LANES: usize = BLOCK / LANE;

/// Loads a block.
///
/// # Safety
/// `from` is aligned for a lane, and `BLOCK` bytes from it on are mapped and readable.
#[inline]
unsafe fn block(from: *const u8) -> [Lane; LANES] {
    std::array::from_fn(|i| {
        // SAFETY: inside the block, of which the caller answers for mapping and alignment.
        let at = unsafe { from.add(i * LANE) };
        #[allow(
            clippy::cast_ptr_alignment,
            reason = "the caller answers for alignment"
        )]
        let at = at.cast::<Lane>();
        // SAFETY: as above.
        unsafe { at.read_volatile() }
    })
}

fn assert_blocks(from: *const u8, len: usize) {
    assert!(
        from.addr().is_multiple_of(LANE) && len.is_multiple_of(BLOCK),
        "live memory is read in aligned blocks of {BLOCK} bytes, not {len} at {from:p}"
    );
}

/// Copies live bytes to a buffer of our own. Works at any address and length.
///
/// # Safety
/// `from` is mapped and readable for as many bytes as `into` has, until this returns.
#[inline]
pub(crate) unsafe fn copy(from: *const u8, into: &mut [u8]) {
    // SAFETY: our caller's promise; `into` is ours, and borrowed alone.
    unsafe { store(from, into.as_mut_ptr(), into.len()) };
}

/// Copies live bytes to memory of our own that no other reference points into. Works at any address
/// and length.
///
/// # Safety
/// `from` is mapped and readable, and `to` mapped and writable, for `len` bytes until this returns; they
/// do not overlap.
#[inline]
pub(crate) unsafe fn store(from: *const u8, to: *mut u8, len: usize) {
    // Vectors are loaded from their borders on; where they are stored makes no difference.
    let head = (from.addr().wrapping_neg() % LANE).min(len);
    // SAFETY: the beginning of the range of which the caller answers.
    unsafe { store_bytes(from, to, head) };
    let mut done = head;
    while done + BLOCK <= len {
        // SAFETY: inside the range of which the caller answers; aligned, since `head` made it so.
        let at = unsafe { from.add(done) };
        // SAFETY: as above.
        let lanes = unsafe { block(at) };
        for (number, lane) in lanes.into_iter().enumerate() {
            // SAFETY: inside the range of which the caller answers.
            let at = unsafe { to.add(done + number * LANE) };
            // SAFETY: as above.
            unsafe { lane::store(at, lane) };
        }
        done += BLOCK;
    }
    while done + LANE <= len {
        // SAFETY: inside the range of which the caller answers.
        let at = unsafe { from.add(done) };
        #[allow(clippy::cast_ptr_alignment, reason = "`head` made it so")]
        let at = at.cast::<Lane>();
        // SAFETY: as above; aligned, since `head` made it so.
        let lane = unsafe { at.read_volatile() };
        // SAFETY: inside the range of which the caller answers.
        let at = unsafe { to.add(done) };
        // SAFETY: as above.
        unsafe { lane::store(at, lane) };
        done += LANE;
    }
    // SAFETY: inside the range of which the caller answers.
    let from = unsafe { from.add(done) };
    // SAFETY: as above.
    let to = unsafe { to.add(done) };
    // SAFETY: the end of the range of which the caller answers.
    unsafe { store_bytes(from, to, len - done) };
}

/// # Safety
/// As [`store`].
#[inline]
unsafe fn store_bytes(from: *const u8, to: *mut u8, len: usize) {
    for at in 0..len {
        // SAFETY: inside the range of which the caller answers.
        let byte = unsafe { from.add(at) };
        // SAFETY: as above; a byte has no alignment.
        let byte = unsafe { byte.read_volatile() };
        // SAFETY: inside the range of which the caller answers.
        let place = unsafe { to.add(at) };
        // SAFETY: as above.
        unsafe { place.write(byte) };
    }
}

/// Whether all of `len` live bytes are zero.
///
/// # Panics
/// Unless `from` is aligned to 16 bytes and `len` is a multiple of 64.
///
/// # Safety
/// `from` is mapped and readable for `len` bytes until this returns.
#[inline]
pub(crate) unsafe fn is_zero(from: *const u8, len: usize) -> bool {
    assert_blocks(from, len);
    (0..len).step_by(BLOCK).all(|offset| {
        // SAFETY: inside the range of which the caller answers.
        let at = unsafe { from.add(offset) };
        // SAFETY: aligned, as just asserted, and inside the range.
        let lanes = unsafe { block(at) };
        lane::is_zero(
            lanes
                .into_iter()
                .reduce(lane::or)
                .expect("a block has lanes"),
        )
    })
}

/// Where the first block that differs begins, or `None` for equal bytes.
///
/// # Safety
/// As [`equal`].
#[inline]
unsafe fn first_difference(a: *const u8, b: *const u8, len: usize) -> Option<usize> {
    assert_blocks(a, len);
    assert_blocks(b, len);
    (0..len).step_by(BLOCK).find(|&offset| {
        // SAFETY: inside the range of which the caller answers.
        let a = unsafe { a.add(offset) };
        // SAFETY: as above.
        let b = unsafe { b.add(offset) };
        // SAFETY: aligned, as just asserted, and inside the range.
        let a = unsafe { block(a) };
        // SAFETY: as above.
        let b = unsafe { block(b) };
        let mut differences = a.into_iter().zip(b).map(|(a, b)| lane::xor(a, b));
        let first = differences.next().expect("a block has lanes");
        !lane::is_zero(differences.fold(first, lane::or))
    })
}

/// Whether two ranges of live bytes were equal when each byte was read.
///
/// # Panics
/// Unless both are aligned to 16 bytes and `len` is a multiple of 64.
///
/// # Safety
/// Both are mapped and readable for `len` bytes until this returns.
#[inline]
pub(crate) unsafe fn equal(a: *const u8, b: *const u8, len: usize) -> bool {
    // SAFETY: our caller's promise.
    unsafe { first_difference(a, b, len) }.is_none()
}

/// The order of two ranges of live bytes, as `memcmp` tells it.
///
/// # Panics
/// As [`equal`].
///
/// # Safety
/// As [`equal`].
pub(crate) unsafe fn compare(a: *const u8, b: *const u8, len: usize) -> Ordering {
    let mut from = 0;
    // A block that differed may be equal when it is read again, for the decision: go on then.
    loop {
        // SAFETY: `from` never passes `len`, and the caller answers for the range.
        let at_a = unsafe { a.add(from) };
        // SAFETY: as above.
        let at_b = unsafe { b.add(from) };
        // SAFETY: our caller's promise.
        let Some(offset) = (unsafe { first_difference(at_a, at_b, len - from) }) else {
            return Ordering::Equal;
        };
        from += offset;
        let (mut bytes_a, mut bytes_b) = ([0; BLOCK], [0; BLOCK]);
        // SAFETY: the block at `from` is inside the range of which the caller answers.
        let at_a = unsafe { a.add(from) };
        // SAFETY: as above.
        let at_b = unsafe { b.add(from) };
        // SAFETY: as above.
        unsafe { copy(at_a, &mut bytes_a) };
        // SAFETY: as above.
        unsafe { copy(at_b, &mut bytes_b) };
        match bytes_a.cmp(&bytes_b) {
            Ordering::Equal => from += BLOCK,
            order => return order,
        }
    }
}

/// Live bytes, to be read as 64-bit numbers. Each is read anew whenever it is asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Words {
    from: *const u64,
    len: usize,
}

impl Words {
    /// `len` live bytes from `from` on.
    ///
    /// # Panics
    /// Unless `from` is aligned to 8 bytes.
    ///
    /// # Safety
    /// `from` is mapped and readable for `len` bytes for as long as the value is used.
    pub(crate) unsafe fn new(from: *const u8, len: usize) -> Self {
        assert!(
            from.addr().is_multiple_of(8),
            "live numbers are read at multiples of 8"
        );
        #[allow(clippy::cast_ptr_alignment, reason = "just checked")]
        let from = from.cast::<u64>();
        Self { from, len }
    }

    /// How many bytes.
    pub(crate) fn len(self) -> usize {
        self.len
    }

    /// The `N` pairs of numbers from byte `offset` on, each read when it is asked for.
    ///
    /// # Panics
    /// When they are not all inside, or `offset` is no multiple of 8.
    #[inline]
    pub(crate) fn pairs<const N: usize>(self, offset: usize) -> Pairs<N> {
        assert!(
            offset.is_multiple_of(8) && offset <= self.len && N * 16 <= self.len - offset,
            "{N} pairs at {offset} are not inside {} bytes",
            self.len
        );
        // SAFETY: inside the range (just checked), for which the maker of `self` answers.
        let from = unsafe { self.from.add(offset / 8) };
        Pairs { from }
    }
}

/// `N` pairs of live numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pairs<const N: usize> {
    from: *const u64,
}

impl<const N: usize> Pairs<N> {
    /// Reads the pair number `index`, in the machine's byte order.
    ///
    /// # Panics
    /// When there is no such pair.
    #[inline]
    pub(crate) fn read(self, index: usize) -> (u64, u64) {
        assert!(index < N, "there are {N} pairs, and none is number {index}");
        // SAFETY: inside the pairs (just checked), which are inside the words they come from.
        let first = unsafe { self.from.add(2 * index) };
        // SAFETY: as above.
        let second = unsafe { self.from.add(2 * index + 1) };
        // SAFETY: as above, for reading; aligned, since the words and the offset are.
        let first = unsafe { first.read_volatile() };
        // SAFETY: as above.
        (first, unsafe { second.read_volatile() })
    }
}

/// Numbers of our own, as bytes to be filled.
pub(crate) fn as_bytes_mut(numbers: &mut [u64]) -> &mut [u8] {
    let (from, bytes) = (numbers.as_mut_ptr().cast::<u8>(), size_of_val(numbers));
    // SAFETY: the same memory under the same exclusive borrow; bytes have no alignment, and any
    // bytes make valid numbers.
    unsafe { std::slice::from_raw_parts_mut(from, bytes) }
}

/// Asks the processor to fetch what is at `at`, some 64 bytes, ahead of its use. Never faults, and
/// may do nothing.
#[inline]
pub(crate) fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, allowed for any address whatever; SSE is part of every x86-64.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a hint, allowed for any address whatever; it changes nothing.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{}]", in(reg) at, options(nostack, readonly, preserves_flags));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = at;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(align(64))]
    struct Page([u8; 4096]);

    fn page(seed: u32) -> Page {
        let mut state = seed;
        Page(std::array::from_fn(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_be_bytes()[0]
        }))
    }

    #[test]
    fn one_bit_anywhere_makes_a_page_not_zero() {
        let mut page = Page([0; 4096]);
        // SAFETY: the array is there, and aligned.
        assert!(unsafe { is_zero(page.0.as_ptr(), 4096) });
        for at in (0..4096).step_by(61).chain([4095]) {
            page.0[at] = 0x80;
            // SAFETY: as above.
            assert!(!unsafe { is_zero(page.0.as_ptr(), 4096) }, "byte {at}");
            page.0[at] = 0;
        }
    }

    #[test]
    fn compare_agrees_with_slices_wherever_the_difference_lies() {
        let a = page(1);
        let mut b = page(1);
        // SAFETY: both arrays are there, and aligned.
        assert!(unsafe { equal(a.0.as_ptr(), b.0.as_ptr(), 4096) });
        for at in (0..4096).step_by(53).chain([4095]) {
            for change in [1, 0x80, 0xff] {
                b.0[at] ^= change;
                b.0[4095 - at / 2] ^= 1;
                // SAFETY: as above.
                let order = unsafe { compare(a.0.as_ptr(), b.0.as_ptr(), 4096) };
                assert_eq!(order, a.0.cmp(&b.0), "byte {at}");
                // SAFETY: as above.
                let same = unsafe { equal(a.0.as_ptr(), b.0.as_ptr(), 4096) };
                assert_eq!(same, a.0 == b.0);
                b.0[4095 - at / 2] ^= 1;
                b.0[at] ^= change;
            }
        }
    }

    #[test]
    fn copy_works_at_any_place_and_length() {
        let source = page(2);
        for (offset, len) in [(0, 4096), (0, 100), (1, 130), (16, 64), (7, 0), (4095, 1)] {
            let mut copied = vec![0; len];
            // SAFETY: the range is inside the array.
            unsafe { copy(source.0[offset..].as_ptr(), &mut copied) };
            assert_eq!(copied, source.0[offset..offset + len]);
        }
    }

    #[test]
    fn words_are_what_the_slice_holds_and_nothing_beyond() {
        let page = page(3);
        // SAFETY: the array is there for as long as `words` is used.
        let words = unsafe { Words::new(page.0.as_ptr(), 4096) };
        let (a, b) = words.pairs::<2>(4064).read(1);
        assert_eq!(a.to_ne_bytes(), page.0[4080..4088]);
        assert_eq!(b.to_ne_bytes(), page.0[4088..]);
        assert!(std::panic::catch_unwind(|| words.pairs::<2>(4072)).is_err());
        assert!(std::panic::catch_unwind(|| words.pairs::<2>(0).read(2)).is_err());
        prefetch(std::ptr::null()); // a hint about nothing harms nobody
    }

    #[test]
    #[should_panic(expected = "aligned blocks")]
    fn zero_test_of_half_a_block_panics() {
        let page = Page([0; 4096]);
        // SAFETY: the array is there.
        let _ = unsafe { is_zero(page.0.as_ptr(), 100) };
    }
}
