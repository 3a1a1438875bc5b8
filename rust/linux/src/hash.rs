//! The digest of a page: a keyed 64-bit hash of live bytes, and whether all of them are zero.
//!
//! The hash is rapidhash, version 3, with a secret of 512 random bits in place of its published
//! one. `docs/hash.md` has the measurements behind that choice. In short: it needs no vector
//! instructions (one binary runs on every x86-64 and arm64), passes `SMHasher3`, is within a few per
//! cent of the fastest at a page, and is simple enough to be written over reads that may race: a
//! library would want a slice, and so a copy of each page first, which costs as much as the hash.
//!
//! # What it may be trusted with
//! Equal bytes have equal digests. Unequal bytes have equal digests once in 2^64 by chance, and
//! since the secret is drawn anew for each engine, nobody can prepare such pages. (Who knows it can: a
//! word that equals the secret's number of its lane makes the product zero, whatever is beside it. See
//! the tests, which look for such pages without knowing it, too.) Nothing is merged
//! on a digest in any case: the bytes are compared. A page that is written while it is read has a
//! digest of some mixture, which merges nothing either.
//!
//! # Who knows the secret
//! An engine's own ([`HashKey`]) lies in a page that fork children and core dumps do not get, and
//! neither it nor a digest leaves this crate. It is copied to the stack for the time of one batch and
//! wiped there; what the compiler keeps in between is not hunted. It protects against nothing but
//! pages prepared to collide, which would make searches slow and never wrong.
//!
//! # Cost
//! 70 to 80 ns a page in the cache. From memory, fetching the next page meanwhile (`next`) takes
//! a good part off, most where the next page is somewhere else.

// Only for reading live memory through `sys::memory`.
#![allow(unsafe_code)]

use crate::error::Error;
use crate::sys::mapping::{Advice, Mapping, Protection};
use crate::sys::memory::{self, Words};
use crate::sys::process;
use pagemerge_core::Digest;

/// Bytes that the main loop takes at a time: seven lanes of two numbers.
const STRIDE: usize = 112;

/// An engine's secret: drawn from the kernel, one number for each of a hasher's.
#[derive(Debug)]
pub(crate) struct HashKey {
    place: Mapping,
    page_size: usize,
}

impl HashKey {
    /// The numbers of a secret: a seed, and eight for the lanes.
    const NUMBERS: usize = 9;

    /// A new one, for pages of this machine.
    ///
    /// # Errors
    /// No memory, or no randomness.
    pub(crate) fn draw() -> Result<Self, Error> {
        let page_size = crate::sys::page_size();
        let place = Mapping::anonymous(page_size, Protection::ReadWrite)
            .map_err(|e| Error::os("cannot map a page for the secret of digests", e.into()))?;
        for (what, advice) in [
            ("children", Advice::DontFork),
            ("core dumps", Advice::DontDump),
        ] {
            place.advise(advice).map_err(|e| {
                Error::os(
                    format!("cannot keep the secret of digests from {what} (madvise)"),
                    e.into(),
                )
            })?;
        }
        let numbers = drawn()
            .map_err(|e| Error::os("cannot draw the secret of digests (getrandom)", e.into()))?;
        for (at, number) in numbers.into_iter().enumerate() {
            place.write_u64(8 * at, number);
        }
        let key = Self { place, page_size };
        // A hasher's hash of a page of zeroes is worth keeping.
        let zero = key.hasher().hash_of_zeroes();
        key.place.write_u64(8 * Self::NUMBERS, zero);
        Ok(key)
    }

    /// A hasher with this secret, for a short time.
    pub(crate) fn hasher(&self) -> PageHasher {
        let secret = std::array::from_fn(|number| self.place.read_u64(8 * (number + 1)));
        PageHasher {
            seed: self.place.read_u64(0),
            secret,
            page_size: self.page_size,
            zero: self.place.read_u64(8 * Self::NUMBERS),
        }
    }
}

/// A random secret: seed, and eight numbers mixed into the lanes.
pub(crate) struct PageHasher {
    seed: u64,
    secret: [u64; 8],
    page_size: usize,
    /// The hash of a page of zeroes.
    zero: u64,
}

impl std::fmt::Debug for PageHasher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The secret stays one.
        f.debug_struct("PageHasher")
            .field("page_size", &self.page_size)
            .finish_non_exhaustive()
    }
}

impl Drop for PageHasher {
    fn drop(&mut self) {
        (self.seed, self.secret) = (0, [0; 8]);
        // Without a reader the stores would be left out.
        std::hint::black_box(&*self);
    }
}

impl PageHasher {
    /// A hasher of pages of this machine, whose secret grows from `seed`: the same seed gives the
    /// same digests.
    #[cfg(any(test, feature = "inject"))]
    pub(crate) fn new(seed: u64) -> Self {
        Self::with_page_size(seed, crate::sys::page_size())
    }

    /// The same, for pages of `page_size` bytes: a multiple of 64, and at least 128.
    pub(crate) fn with_page_size(seed: u64, page_size: usize) -> Self {
        let mut state = seed;
        let secret = std::array::from_fn(|_| grow(&mut state));
        Self::with_secret(grow(&mut state), secret, page_size)
    }

    fn with_secret(seed: u64, secret: [u64; 8], page_size: usize) -> Self {
        assert!(
            page_size.is_multiple_of(64) && page_size >= 2 * 64,
            "no page has {page_size} bytes"
        );
        let mut hasher = Self {
            seed,
            secret,
            page_size,
            zero: 0,
        };
        hasher.zero = hasher.hash_of_zeroes();
        hasher
    }

    fn hash_of_zeroes(&self) -> u64 {
        self.hash_slice(&vec![0; self.page_size / 8])
    }

    /// The digest of the live page at `page`, as it is now. `next` is the page that will be asked
    /// for next, if that is known: it is fetched meanwhile. (It need not be mapped.)
    ///
    /// # Safety
    /// `page` is aligned to 16 bytes, and mapped and readable for a page's length until this
    /// returns.
    #[inline]
    pub(crate) unsafe fn digest(&self, page: *const u8, next: Option<*const u8>) -> Digest {
        // SAFETY: our caller's promise.
        let words = unsafe { Words::new(page, self.page_size) };
        // Almost every page that is not zero throughout says so in its first bytes, and those that
        // do not say so in the first block that is not zero: the test costs next to nothing.
        // SAFETY: our caller's promise.
        if words.pairs::<1>(0).read(0) == (0, 0) && unsafe { memory::is_zero(page, self.page_size) }
        {
            return Digest {
                hash: self.zero,
                zero: true,
            };
        }
        Digest {
            hash: self.hash(words, next.unwrap_or(page)),
            zero: false,
        }
    }

    /// The digest of a page of which only that is to be told: all others have one hash.
    pub(crate) fn zero_or_not(zero: bool) -> Digest {
        Digest {
            hash: u64::from(!zero),
            zero,
        }
    }

    /// Bytes in a page.
    pub(crate) fn page_size(&self) -> usize {
        self.page_size
    }

    /// The hash of `words`, at least 16 bytes and a multiple of that.
    pub(crate) fn hash_words(&self, words: Words) -> u64 {
        // Nothing comes next: the last of them is fetched once more.
        self.hash(words, std::ptr::null())
    }

    /// The hash of `len` bytes, of which the last, up to 15, are in `last`, and `before` is the hash of
    /// those before them (or 0 for none).
    pub(crate) fn hash_short(&self, before: u64, last: [u64; 2], len: usize) -> u64 {
        let s = &self.secret;
        let state = mix(before ^ s[3], len as u64 ^ s[4] ^ self.seed);
        mix(
            last[0] ^ s[5] ^ state,
            last[1] ^ s[6] ^ state.rotate_left(32),
        )
    }

    /// The hash of a sequence that has the hash `before`, with one more number at its end.
    pub(crate) fn hash_more(&self, before: u64, number: u64) -> u64 {
        mix(before ^ self.secret[3], number ^ self.secret[4])
    }

    /// The hash of bytes of our own, in the machine's byte order.
    ///
    /// # Panics
    /// Unless they make a page.
    pub(crate) fn hash_slice(&self, page: &[u64]) -> u64 {
        assert_eq!(
            size_of_val(page),
            self.page_size,
            "a page has another length"
        );
        // SAFETY: the slice is there until this returns.
        let words = unsafe { Words::new(page.as_ptr().cast(), self.page_size) };
        self.hash(words, page.as_ptr().cast())
    }

    /// The hash of `words`; meanwhile, what is at `next` is fetched.
    #[inline]
    fn hash(&self, words: Words, next: *const u8) -> u64 {
        let s = &self.secret;
        let mut lanes = [self.seed; 7];
        let (mut at, mut left) = (0, words.len());
        while left > STRIDE {
            // Evenly spread: 64 requests at once would fill the processor's queue and stop it.
            memory::prefetch(next.wrapping_add(at));
            memory::prefetch(next.wrapping_add(at).wrapping_add(64));
            let pairs = words.pairs::<7>(at);
            for (lane, state) in lanes.iter_mut().enumerate() {
                let (a, b) = pairs.read(lane);
                *state = mix(a ^ s[lane], b ^ *state);
            }
            // An overflow check in the middle would keep the compiler from mixing loads and
            // multiplications; `pairs` checks the range.
            at = at.wrapping_add(STRIDE);
            left = left.wrapping_sub(STRIDE);
        }
        let mut state = lanes.into_iter().fold(0, |all, lane| all ^ lane);
        // What is left: 16 to 112 bytes, by 16, the last 16 of which are taken below as well.
        for (step, &which) in [2, 2, 1, 1, 2, 1].iter().enumerate() {
            if left > 16 * (step + 1) {
                let (a, b) = words.pairs::<1>(at + 16 * step).read(0);
                state = mix(a ^ s[which], b ^ state);
            }
        }
        let (a, b) = words.pairs::<1>(words.len() - 16).read(0);
        let left = left as u64;
        let (low, high) = multiply(a ^ left ^ s[1], b ^ state);
        mix(low ^ s[7], high ^ s[1] ^ left)
    }
}

/// The numbers of a fresh secret.
fn drawn() -> Result<[u64; HashKey::NUMBERS], crate::sys::Errno> {
    #[cfg(feature = "inject")]
    if let Some(known) = known::SEED.lock().ok().and_then(|seed| *seed) {
        let hasher = PageHasher::new(known);
        let mut numbers = [hasher.seed; HashKey::NUMBERS];
        numbers[1..].copy_from_slice(&hasher.secret);
        return Ok(numbers);
    }
    let mut numbers = [0; HashKey::NUMBERS];
    for number in &mut numbers {
        *number = process::random_u64()?;
    }
    Ok(numbers)
}

/// For tests of what somebody could do who knew the secret.
#[cfg(feature = "inject")]
#[doc(hidden)]
pub mod known {
    use std::sync::Mutex;

    pub(super) static SEED: Mutex<Option<u64>> = Mutex::new(None);

    /// Engines made from now on have this seed.
    pub fn seed(seed: u64) {
        if let Ok(mut known) = SEED.lock() {
            *known = Some(seed);
        }
    }

    /// A number that, as the first word of a page, makes the second one count for nothing.
    #[must_use]
    pub fn blinding(seed: u64) -> u64 {
        super::grow(&mut seed.clone())
    }
}

/// Digests page after page of `bytes` and mixes the results into one number: what the engine does
/// with a run of pages, for `examples/hash_speed.rs` to measure.
///
/// # Panics
/// When `bytes` is not aligned to 16.
pub fn digest_all(bytes: &[u8], page_size: usize, seed: u64) -> u64 {
    let hasher = PageHasher::with_page_size(seed, page_size);
    let mut pages = bytes.chunks_exact(page_size).peekable();
    let mut all = 0;
    while let Some(page) = pages.next() {
        // SAFETY: the slice is there until this returns; that it is aligned is asserted in there.
        let digest =
            unsafe { hasher.digest(page.as_ptr(), pages.peek().map(|next| next.as_ptr())) };
        all ^= digest.hash;
    }
    all
}

/// Both halves of a product.
#[inline]
fn multiply(a: u64, b: u64) -> (u64, u64) {
    let product = u128::from(a) * u128::from(b);
    #[allow(
        clippy::cast_possible_truncation,
        reason = "the two halves are what is wanted"
    )]
    (product as u64, (product >> 64) as u64)
}

/// Both halves of a product, folded into one.
#[inline]
fn mix(a: u64, b: u64) -> u64 {
    let (low, high) = multiply(a, b);
    low ^ high
}

/// The next number of a sequence that looks random (`SplitMix64`).
fn grow(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
#[allow(
    clippy::cast_possible_truncation,
    reason = "numbers that are taken modulo a few"
)]
mod tests {
    use super::*;
    use crate::mappings::Flags;
    use rapidhash::v3::{RapidSecrets, rapidhash_v3_seeded};

    /// The published secret, of which the last number serves as `aaaa...`.
    const PUBLISHED: [u64; 8] = [
        0x2d35_8dcc_aa6c_78a5,
        0x8bb8_4b93_962e_acc9,
        0x4b33_a62e_d433_d4a3,
        0x4d5a_2da5_1de1_aa47,
        0xa076_1d64_78bd_642f,
        0xe703_7ed1_a0b4_28db,
        0x90ed_1765_281c_388c,
        0xaaaa_aaaa_aaaa_aaaa,
    ];

    fn random_page(seed: u64, bytes: usize) -> Vec<u64> {
        let mut state = seed;
        (0..bytes / 8).map(|_| grow(&mut state)).collect()
    }

    fn bytes(page: &[u64]) -> Vec<u8> {
        page.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn hash_is_rapidhash_v3_for_every_remainder() {
        let seed = 0x1234_5678_9abc_def0;
        let (p, q) = (PUBLISHED[2], PUBLISHED[1]);
        let mixed = seed ^ mix(seed ^ p, q);
        for size in (128..=16 * 1024).step_by(64) {
            let hasher = PageHasher::with_secret(mixed, PUBLISHED, size);
            let page = random_page(size as u64, size);
            let wanted = rapidhash_v3_seeded(&bytes(&page), &RapidSecrets::seed_cpp(seed));
            assert_eq!(hasher.hash_slice(&page), wanted, "{size} bytes");
        }
    }

    #[test]
    fn digest_of_live_memory_is_the_hash_of_its_bytes() {
        let hasher = PageHasher::new(7);
        let page = random_page(1, crate::sys::page_size() + 16);
        let start = page.as_ptr().addr() % 16 / 8; // the first 16-byte border in it
        let page = &page[start..start + crate::sys::page_size() / 8];
        // SAFETY: the slice is there, and aligned.
        let digest = unsafe { hasher.digest(page.as_ptr().cast(), None) };
        assert_eq!(
            digest,
            Digest {
                hash: hasher.hash_slice(page),
                zero: false
            }
        );
    }

    #[test]
    fn zero_is_exact_and_its_hash_is_that_of_zero_bytes() {
        let hasher = PageHasher::new(7);
        let memory = crate::sys::mapping::Mapping::anonymous(
            crate::sys::page_size(),
            crate::sys::mapping::Protection::ReadWrite,
        )
        .unwrap();
        let page = memory.span().as_ptr();
        // SAFETY: the mapping is there until the end of the test.
        let zero = unsafe { hasher.digest(page, Some(page)) };
        assert!(zero.zero);
        assert_eq!(
            zero.hash,
            hasher.hash_slice(&vec![0; crate::sys::page_size() / 8])
        );
        memory.write_u64(crate::sys::page_size() - 8, 1 << 63);
        // SAFETY: as above.
        let other = unsafe { hasher.digest(page, None) };
        assert!(!other.zero);
        assert_ne!(other.hash, zero.hash);
    }

    #[test]
    fn every_bit_of_a_page_changes_the_hash() {
        let hasher = PageHasher::with_page_size(3, 256);
        for mut page in [random_page(5, 256), vec![0; 32]] {
            let before = hasher.hash_slice(&page);
            let mut seen = std::collections::HashSet::from([before]);
            for bit in 0..256 * 8 {
                page[bit / 64] ^= 1 << (bit % 64);
                assert!(seen.insert(hasher.hash_slice(&page)), "bit {bit}");
                page[bit / 64] ^= 1 << (bit % 64);
            }
        }
    }

    /// The family's weakness, for who knows the secret: pages without end that have one hash.
    #[test]
    fn pages_of_one_hash_can_be_made_with_the_secret() {
        let bytes = crate::sys::page_size();
        let hasher = PageHasher::new(99);
        // In each lane, and in the steps behind the main loop.
        let tail = (bytes - 1) / STRIDE * (STRIDE / 8);
        for (at, secret) in [(0, 0), (2, 1), (12, 6), (14, 0), (tail, 2)] {
            let mut page = random_page(5, bytes);
            page[at] = hasher.secret[secret];
            let seen: std::collections::HashSet<u64> = (0..1000)
                .map(|number| {
                    page[at + 1] = number;
                    hasher.hash_slice(&page)
                })
                .collect();
            assert_eq!(seen.len(), 1, "word {at}");
        }
    }

    /// Goal: the same cannot be done without it. Method: families of pages that differ in the ways that
    /// products and exclusive ors are known to be weak in, under many secrets: if one of these made
    /// pages collide as a rule, or once in a million, it would show.
    #[test]
    fn families_of_pages_made_without_the_secret_do_not_collide() {
        type Change = fn(&mut [u64], u64, &mut u64);
        let families: [(&str, Change); 8] = [
            ("one word counts", |page, n, _| page[14] = n),
            ("one word has one bit, or all from one on", |page, n, _| {
                page[n as usize / 128] = if n % 2 == 0 {
                    1 << (n / 2 % 64)
                } else {
                    u64::MAX << (n / 2 % 64)
                };
            }),
            ("two words of a product change alike", |page, n, _| {
                page[28] ^= n << 40;
                page[29] ^= n << 40;
            }),
            ("the same change in two lanes", |page, n, _| {
                page[28] ^= n;
                page[30] ^= n;
            }),
            ("the same change in two steps of a lane", |page, n, _| {
                page[28] ^= n << 32;
                page[42] ^= n << 32;
            }),
            ("pairs of a step change places", |page, _, random| {
                for at in (1..7).rev() {
                    let other = grow(random) as usize % (at + 1);
                    page.swap(70 + 2 * at, 70 + 2 * other);
                    page.swap(71 + 2 * at, 71 + 2 * other);
                }
            }),
            ("words that are 0, 1 or all ones", |page, _, random| {
                for word in &mut page[100..140] {
                    *word = [0, 1, u64::MAX, 1 << 63][grow(random) as usize % 4];
                }
            }),
            ("complements", |page, n, _| {
                for bit in 0..14 {
                    if n >> bit & 1 == 1 {
                        page[200 + bit] = !page[200 + bit];
                    }
                }
            }),
        ];
        let bytes = crate::sys::page_size();
        let mut random = 1;
        for (name, change) in families {
            // (Not a page that grew from a seed which is tried: its first word would be the secret's.)
            for start in [vec![0; bytes / 8], random_page(1 << 40, bytes)] {
                let mut pages = std::collections::HashSet::new();
                for n in 0..2000 {
                    let mut page = start.clone();
                    change(&mut page, n, &mut random);
                    pages.insert(page);
                }
                for seed in 0..12 {
                    let hasher = PageHasher::new(seed);
                    let seen: std::collections::HashSet<u64> =
                        pages.iter().map(|page| hasher.hash_slice(page)).collect();
                    assert_eq!(seen.len(), pages.len(), "{name}, seed {seed}");
                }
            }
        }
    }

    /// Goal: nobody can learn from one engine how another one's digests come out.
    #[test]
    fn two_keys_digest_the_same_page_differently() {
        let (one, other) = (HashKey::draw().unwrap(), HashKey::draw().unwrap());
        for page in [
            random_page(9, crate::sys::page_size()),
            vec![0; crate::sys::page_size() / 8],
        ] {
            let hash = one.hasher().hash_slice(&page);
            assert_ne!(hash, other.hasher().hash_slice(&page));
            assert_eq!(hash, one.hasher().hash_slice(&page), "it stays the same");
        }
        assert_ne!(one.hasher().zero, other.hasher().zero);
    }

    /// Goal: neither children nor core dumps get the secret. Method: what the kernel says of its page.
    #[test]
    fn key_lies_where_children_and_core_dumps_do_not_get_it() {
        let key = HashKey::draw().unwrap();
        let found = crate::mappings::read(key.place.span()).unwrap();
        let flags = found.first().expect("it is mapped").flags;
        for kept in [Flags::DONT_FORK, Flags::DONT_DUMP] {
            assert!(flags.any(kept), "{found:?}");
        }
    }

    #[test]
    fn secret_is_not_shown() {
        let key = HashKey::draw().unwrap();
        let shown = format!("{key:?} {:?}", key.hasher());
        for number in 0..=HashKey::NUMBERS {
            let secret = key.place.read_u64(8 * number);
            for text in [format!("{secret}"), format!("{secret:x}")] {
                assert!(!shown.contains(&text), "{shown}");
            }
        }
    }

    #[test]
    fn another_seed_gives_another_hash() {
        let page = random_page(9, crate::sys::page_size());
        assert_ne!(
            PageHasher::new(1).hash_slice(&page),
            PageHasher::new(2).hash_slice(&page)
        );
        assert_eq!(
            PageHasher::new(1).hash_slice(&page),
            PageHasher::new(1).hash_slice(&page)
        );
    }
}
