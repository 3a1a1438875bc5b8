//! One bit for each page of a region.

/// Bits of one leaf.
const LEAF: usize = 4096;
const WORDS: usize = LEAF / 64;

/// A fixed number of bits, all clear at first. They lie in leaves of 512 bytes, and a leaf in which no
/// bit was ever set is not there: a region of 64 GiB without any costs 32 KiB of address space, which
/// come zeroed from the kernel and are never written.
#[derive(Debug, Default)]
pub(crate) struct Bitmap {
    leaves: Vec<Option<Box<[u64; WORDS]>>>,
    /// Leaves that are there.
    there: usize,
}

impl Bitmap {
    pub(crate) fn new(bits: usize) -> Self {
        Self {
            leaves: vec![None; bits.div_ceil(LEAF)],
            there: 0,
        }
    }

    pub(crate) fn get(&self, bit: usize) -> bool {
        self.leaves[bit / LEAF]
            .as_deref()
            .is_some_and(|leaf| leaf[bit % LEAF / 64] >> (bit % 64) & 1 != 0)
    }

    pub(crate) fn set(&mut self, bit: usize, to: bool) {
        let slot = &mut self.leaves[bit / LEAF];
        if !to && slot.is_none() {
            return;
        }
        let there = &mut self.there;
        let leaf = slot.get_or_insert_with(|| {
            *there += 1;
            Box::new([0; WORDS])
        });
        let mask = 1 << (bit % 64);
        let word = &mut leaf[bit % LEAF / 64];
        if to {
            *word |= mask;
        } else {
            *word &= !mask;
        }
    }

    /// The 64 bits from `from` on, the first of them lowest; those beyond the last are clear.
    pub(crate) fn word(&self, from: usize) -> u64 {
        let aligned = |word: usize| -> u64 {
            let leaf = self.leaves.get(word / WORDS).and_then(Option::as_deref);
            leaf.map_or(0, |leaf| leaf[word % WORDS])
        };
        let (word, shift) = (from / 64, from % 64);
        if shift == 0 {
            aligned(word)
        } else {
            aligned(word) >> shift | aligned(word + 1) << (64 - shift)
        }
    }

    /// The first bit in `from..end` that equals `value`, or `end`.
    pub(crate) fn next(&self, value: bool, from: usize, end: usize) -> usize {
        let mut at = from;
        while at < end {
            let Some(leaf) = self.leaves[at / LEAF].as_deref() else {
                if !value {
                    return at;
                }
                at = (at / LEAF + 1) * LEAF;
                continue;
            };
            let word = leaf[at % LEAF / 64];
            let seen = (if value { word } else { !word }) >> (at % 64);
            if seen != 0 {
                return end.min(at + seen.trailing_zeros() as usize);
            }
            at = (at / 64 + 1) * 64;
        }
        end
    }

    pub(crate) fn any(&self, from: usize, end: usize) -> bool {
        self.next(true, from, end) < end
    }

    pub(crate) fn bytes(&self) -> usize {
        self.leaves.len() * size_of::<Option<Box<[u64; WORDS]>>>() + self.there * WORDS * 8
    }
}

#[cfg(test)]
mod tests {
    use super::Bitmap;

    #[test]
    fn next_over_word_borders_finds_each_run() {
        let mut map = Bitmap::new(200);
        for bit in (60..70).chain(127..130) {
            map.set(bit, true);
        }
        assert_eq!(map.next(true, 0, 200), 60);
        assert_eq!(map.next(false, 60, 200), 70);
        assert_eq!(map.next(true, 70, 200), 127);
        assert_eq!(map.next(false, 127, 200), 130);
        assert_eq!(map.next(true, 130, 200), 200);
        assert_eq!(map.next(true, 70, 100), 100);
        map.set(60, false);
        assert!(!map.get(60) && map.get(61));
        assert!(map.any(0, 62) && !map.any(0, 61));
    }

    #[test]
    fn word_at_any_place_is_what_the_bits_are() {
        let mut map = Bitmap::new(10_000);
        for bit in (0..10_000).filter(|bit| bit % 7 == 0 && !(4096..8192).contains(bit)) {
            map.set(bit, true);
        }
        for from in [0, 1, 63, 64, 4000, 4090, 5000, 8150, 8192, 9_990] {
            for n in 0..64 {
                let bit = from + n;
                let expected = bit < 10_000 && map.get(bit);
                assert_eq!(map.word(from) >> n & 1 != 0, expected, "{from} {n}");
            }
        }
    }

    #[test]
    fn leaves_that_were_never_set_read_as_clear() {
        let mut map = Bitmap::new(20_000);
        let empty = map.bytes();
        map.set(9_000, false);
        assert_eq!(map.bytes(), empty);
        map.set(9_000, true);
        assert!(map.get(9_000) && !map.get(100) && !map.get(19_999));
        assert_eq!(map.next(true, 0, 20_000), 9_000);
        assert_eq!(map.next(true, 9_001, 20_000), 20_000);
        assert_eq!(map.next(true, 0, 8_000), 8_000);
        assert_eq!(map.next(false, 9_000, 20_000), 9_001);
        assert_eq!(map.next(false, 0, 20_000), 0);
        assert_eq!(map.bytes(), empty + 512);
    }
}
