//! How fast hash functions digest pages: the measurement behind `docs/hash.md`.
//!
//! ```text
//! cargo run --release -p pagemerge-linux --example hash_speed
//! ```
//!
//! One thread; pages of 4 KiB from memory (512 MiB, each page once) and from the second-level cache
//! (256 KiB, again and again). All candidates take turns, and the best of many turns counts, since
//! other programs can only make a turn slower.

use std::hash::{BuildHasher, Hasher};
use std::hint::black_box;
use std::time::Instant;

const PAGE: usize = 4096;
const MEMORY: usize = 512 << 20;
const CACHE: usize = 256 << 10;
const SEED: u64 = 0x9216_d5d9_8979_fb1b;

/// A candidate: its name, and what it does to page after page.
type Candidate = (&'static str, Box<dyn Fn(&[u8]) -> u64>);

/// Each page by itself, as a library takes it: from memory that nobody writes.
fn by_slice(name: &'static str, hash: impl Fn(&[u8]) -> u64 + 'static) -> Candidate {
    let all = move |bytes: &[u8]| {
        bytes
            .chunks_exact(PAGE)
            .fold(0, |all, page| all ^ hash(page))
    };
    (name, Box::new(all))
}

/// The same after a copy: what a library needs where somebody may write.
fn by_copy(name: &'static str, hash: impl Fn(&[u8]) -> u64 + 'static) -> Candidate {
    let all = move |bytes: &[u8]| {
        let mut copy = [0; PAGE];
        bytes.chunks_exact(PAGE).fold(0, |all, page| {
            copy.copy_from_slice(page);
            // So that the copy is really made.
            all ^ hash(black_box(&copy))
        })
    };
    (name, Box::new(all))
}

fn with(state: &impl BuildHasher, page: &[u8]) -> u64 {
    let mut hasher = state.build_hasher();
    hasher.write(page);
    hasher.finish()
}

#[allow(
    clippy::cast_possible_truncation,
    reason = "one half is as good as the other"
)]
fn candidates() -> Vec<Candidate> {
    let secret: Vec<u8> = (0..192_u64)
        .map(|i| i.wrapping_mul(SEED).to_be_bytes()[1])
        .collect();
    let rapid = rapidhash::v3::RapidSecrets::seed(SEED);
    let a = ahash::RandomState::with_seeds(1, 2, 3, SEED);
    let fold = foldhash::quality::RandomState::default();
    let for_copies = secret.clone();
    let rapid_for_copies = rapidhash::v3::RapidSecrets::seed(SEED);
    vec![
        (
            "pagemerge (live memory)",
            Box::new(|bytes: &[u8]| pagemerge_linux::digest_all(bytes, PAGE, SEED)),
        ),
        by_slice("rapidhash v3", move |p| {
            rapidhash::v3::rapidhash_v3_seeded(p, &rapid)
        }),
        by_slice("twox-hash XXH3-64", move |p| {
            twox_hash::XxHash3_64::oneshot_with_secret(&secret, p).unwrap_or(0)
        }),
        by_slice("twox-hash XXH3-128", |p| {
            twox_hash::XxHash3_128::oneshot_with_seed(SEED, p) as u64
        }),
        by_slice("xxhash-rust XXH3-64", |p| {
            xxhash_rust::xxh3::xxh3_64_with_seed(p, SEED)
        }),
        by_slice("xxhash-rust XXH3-128", |p| {
            xxhash_rust::xxh3::xxh3_128_with_seed(p, SEED) as u64
        }),
        by_slice("foldhash quality", move |p| with(&fold, p)),
        by_slice("museair", |p| museair::hash(p, SEED)),
        by_slice("museair bfast", |p| museair::bfast::hash(p, SEED)),
        by_slice("komihash", |p| komihash::komihash(p, SEED)),
        by_slice("wyhash (final 3)", |p| wyhash::wyhash(p, SEED)),
        by_slice("ahash", move |p| with(&a, p)),
        by_slice("highwayhash-64", |p| {
            use highway::HighwayHash;
            highway::HighwayHasher::new(highway::Key([1, 2, 3, SEED])).hash64(p)
        }),
        by_slice("siphash 1-3", |p| {
            let mut hasher = siphasher::sip::SipHasher13::new_with_keys(1, SEED);
            hasher.write(p);
            hasher.finish()
        }),
        by_copy("copy, then rapidhash v3", move |p| {
            rapidhash::v3::rapidhash_v3_seeded(p, &rapid_for_copies)
        }),
        by_copy("copy, then twox XXH3-64", move |p| {
            twox_hash::XxHash3_64::oneshot_with_secret(&for_copies, p).unwrap_or(0)
        }),
        by_copy("copy, then twox XXH3-128", |p| {
            twox_hash::XxHash3_128::oneshot_with_seed(SEED, p) as u64
        }),
        by_copy("(copy alone)", |p| u64::from(p[0])),
    ]
}

/// Nanoseconds for each page.
#[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
fn measure(bytes: &[u8], candidate: &Candidate) -> f64 {
    let started = Instant::now();
    black_box(candidate.1(black_box(bytes)));
    started.elapsed().as_nanos() as f64 / (bytes.len() / PAGE) as f64
}

fn main() {
    let mut state = SEED;
    let bytes: Vec<u8> = (0..(MEMORY + PAGE) / 8)
        .flat_map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_041);
            state.rotate_left(32).to_ne_bytes()
        })
        .collect();
    let border = bytes.as_ptr().align_offset(PAGE);
    let memory = &bytes[border..border + MEMORY];

    let rounds = std::env::args()
        .nth(1)
        .and_then(|n| n.parse().ok())
        .unwrap_or(9);
    let candidates = candidates();
    let mut best = vec![(f64::MAX, f64::MAX); candidates.len()];
    for _ in 0..rounds {
        for (candidate, best) in candidates.iter().zip(&mut best) {
            best.0 = best.0.min(measure(memory, candidate));
            for _ in 0..100 {
                best.1 = best.1.min(measure(&memory[..CACHE], candidate));
            }
        }
    }
    // Ratios are to the best hash; the copy alone is none.
    let hashes = &best[..best.len() - 1];
    let from_memory = hashes.iter().map(|b| b.0).fold(f64::MAX, f64::min);
    let from_cache = hashes.iter().map(|b| b.1).fold(f64::MAX, f64::min);
    println!("| candidate | ns/page, memory | ratio | ns/page, L2 | ratio |");
    println!("|---|---:|---:|---:|---:|");
    for ((name, _), (memory, cache)) in candidates.iter().zip(&best) {
        println!(
            "| {name} | {memory:.0} | {:.2} | {cache:.0} | {:.2} |",
            memory / from_memory,
            cache / from_cache
        );
    }
}
