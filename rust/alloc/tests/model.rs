//! The allocator against a plain model: any sequence of allocating, writing, resizing, freeing, trimming and
//! merging gives each block its own bytes, and nothing else.

#[path = "support/model.rs"]
mod model;

use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn blocks_read_as_their_model(input in proptest::collection::vec(any::<u8>(), 0..900)) {
        model::run(&input);
    }
}

/// Mostly allocating, then mostly freeing: runs of all sizes come together again.
#[test]
fn waves_come_and_go() {
    for seed in 0..8_u8 {
        let wave = |ops: [u8; 2]| {
            (0..120_u16).flat_map(move |n| {
                let n = n.to_le_bytes()[0].wrapping_mul(seed.wrapping_mul(2) + 1);
                [ops[usize::from(n % 4 == 0)], n, n / 3, n % 5]
            })
        };
        let input: Vec<u8> = wave([0, 6])
            .chain(wave([5, 0]))
            .chain(wave([1, 15]))
            .collect();
        model::run(&input);
    }
}
