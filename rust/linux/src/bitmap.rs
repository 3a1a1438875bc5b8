//! One bit for each page of a region.

/// A fixed number of bits, all clear at first. Memory that was never set costs nothing physical:
/// the words come zeroed from the kernel.
#[derive(Debug, Default)]
pub(crate) struct Bitmap {
    words: Vec<u64>,
}

impl Bitmap {
    pub(crate) fn new(bits: usize) -> Self {
        Self {
            words: vec![0; bits.div_ceil(64)],
        }
    }

    pub(crate) fn get(&self, bit: usize) -> bool {
        self.words[bit / 64] >> (bit % 64) & 1 != 0
    }

    pub(crate) fn set(&mut self, bit: usize, to: bool) {
        let mask = 1 << (bit % 64);
        if to {
            self.words[bit / 64] |= mask;
        } else {
            self.words[bit / 64] &= !mask;
        }
    }

    /// The first bit in `from..end` that equals `value`, or `end`.
    pub(crate) fn next(&self, value: bool, from: usize, end: usize) -> usize {
        let mut at = from;
        while at < end {
            let word = self.words[at / 64];
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
        self.words.len() * 8
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
}
