//! A small seeded generator: the same seed gives the same numbers on every machine, for ever.
//!
//! Sebastiano Vigna's `SplitMix64`. Not a dependency, because a seed printed by a failure must replay
//! after every upgrade.

/// A stream of numbers that its seed determines.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The stream of `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `end`, which must not be 0.
    ///
    /// # Panics
    /// When `end` is 0.
    pub fn below(&mut self, end: u32) -> u32 {
        assert!(end > 0, "no number is below 0");
        let bits = self.bits() % u64::from(end);
        u32::try_from(bits).expect("a remainder of a u32 fits a u32")
    }

    /// True in `chance` of 256 draws. Draws even when the answer is known, so that turning a fault
    /// off does not shift the rest of the stream.
    pub fn chance(&mut self, chance: u8) -> bool {
        self.below(256) < u32::from(chance)
    }

    /// One of `choices`.
    ///
    /// # Panics
    /// When there are none.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        let count = u32::try_from(choices.len()).expect("choices are written out by hand");
        choices[self.below(count) as usize]
    }
}

/// Spreads every bit of `x` over all 64.
#[must_use]
pub fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
