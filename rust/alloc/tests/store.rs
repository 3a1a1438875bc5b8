//! The store beside a plain map, with no Python in between.

use pagemerge_alloc::store::{Blob, Error, Store};
use pagemerge_linux::{Engine, EngineSettings, page_size};
use proptest::prelude::*;
use std::collections::{HashMap, HashSet};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

fn engine() -> Engine {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    ENGINE
        .get_or_init(|| Engine::new(EngineSettings::default()).expect("an engine"))
        .clone()
}

fn store() -> Store {
    Store::new(engine(), "", None).expect("a store")
}

/// `len` bytes that look random, without any page of zeroes.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        bytes.extend((state ^ (state >> 29)).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

#[derive(Clone, Debug)]
enum Step {
    Put { pages: Vec<u8>, tail: usize },
    Drop(usize),
    Read(usize),
    Part(usize, usize, usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (prop::collection::vec(0_u8..5, 0..6), prop_oneof![Just(0), 0_usize..70, 0..page_size()])
            .prop_map(|(pages, tail)| Step::Put { pages, tail }),
        2 => any::<usize>().prop_map(Step::Drop),
        1 => any::<usize>().prop_map(Step::Read),
        1 => any::<(usize, usize, usize)>().prop_map(|(which, at, len)| Step::Part(which, at, len)),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Goal: the store is a map of handles to bytes, with each content once. Method: random puts, drops
    /// and reads of values made of few different pages, beside a vector that holds the bytes themselves.
    #[test]
    fn store_agrees_with_a_plain_vector(steps in steps()) {
        let store = store();
        let page = page_size();
        let mut held: Vec<(Blob, Vec<u8>)> = Vec::new();
        for step in steps {
            match step {
                Step::Put { pages, tail } => {
                    let mut bytes = Vec::new();
                    for kind in pages {
                        if kind == 0 {
                            bytes.resize(bytes.len() + page, 0);
                        } else {
                            bytes.extend(noise(page, kind.into()));
                        }
                    }
                    bytes.extend(noise(tail, tail as u64 % 3));
                    let blob = store.put(&bytes[..]).unwrap();
                    held.push((blob, bytes));
                }
                Step::Drop(which) if !held.is_empty() => {
                    drop(held.swap_remove(which % held.len()));
                }
                Step::Read(which) if !held.is_empty() => {
                    let (blob, bytes) = &held[which % held.len()];
                    prop_assert_eq!(&blob.to_vec(), bytes);
                }
                Step::Part(which, at, len) if !held.is_empty() => {
                    let (blob, bytes) = &held[which % held.len()];
                    let at = at % (bytes.len() + 1);
                    let len = len % (bytes.len() - at + 1);
                    let mut part = vec![0; len];
                    blob.read(at, &mut part);
                    prop_assert_eq!(&part, &bytes[at..at + len]);
                    prop_assert!(blob.equals(at, (&part[..]).into()));
                    blob.window(at, len).unwrap();
                }
                _ => {}
            }
            let stats = store.stats().unwrap();
            let values: HashSet<&[u8]> = held
                .iter()
                .map(|(_, bytes)| &bytes[..])
                .filter(|bytes| bytes.len() >= 33)
                .collect();
            prop_assert_eq!(stats.entries, values.len() as u64);
            let pages: HashSet<&[u8]> = held
                .iter()
                .flat_map(|(_, bytes)| bytes.chunks_exact(page))
                .filter(|page| page.iter().any(|byte| *byte != 0))
                .collect();
            prop_assert_eq!(stats.pages, pages.len() as u64);
            let logical: usize = held.iter().map(|(_, bytes)| bytes.len()).sum();
            prop_assert_eq!(stats.logical_bytes, logical as u64);
            prop_assert_eq!(stats.blobs, held.len() as u64);
        }
        for (blob, bytes) in &held {
            prop_assert_eq!(&blob.to_vec(), bytes);
        }
        drop(held);
        let stats = store.stats().unwrap();
        prop_assert_eq!((stats.unique_bytes, stats.entries, stats.blobs), (0, 0, 0));
    }
}

#[test]
fn threads_that_put_the_same_share_it_and_lose_nothing() {
    let store = store();
    let values: Vec<Vec<u8>> = [40, 900, 4096, 10_000, 70_000]
        .into_iter()
        .map(|len| noise(len, len as u64))
        .collect();
    std::thread::scope(|scope| {
        for thread in 0..4_usize {
            let (store, values) = (&store, &values);
            scope.spawn(move || {
                let mut held: HashMap<usize, (Blob, Vec<u8>)> = HashMap::new();
                for round in 0..2000_usize {
                    let pick = round * 7 + thread * 3;
                    let bytes = if round % 3 == 0 {
                        noise(pick % 9000, (round << 8 | thread) as u64)
                    } else {
                        values[pick % values.len()].clone()
                    };
                    held.insert(round % 50, (store.put(&bytes[..]).unwrap(), bytes));
                    if let Some((blob, bytes)) = held.get(&(round * 31 % 50)) {
                        assert_eq!(&blob.to_vec(), bytes);
                    }
                }
            });
        }
    });
    let stats = store.stats().unwrap();
    assert_eq!((stats.blobs, stats.entries, stats.unique_bytes), (0, 0, 0));
}

#[test]
fn full_store_takes_what_it_has_and_nothing_else() {
    let store = Store::new(engine(), "", Some(100_000)).unwrap();
    let one = store.put(&noise(50_000, 1)[..]).unwrap();
    let before = store.stats().unwrap();
    let full = store.put(&noise(80_000, 2)[..]).unwrap_err();
    let Error::Full { asked, held, max } = full else {
        panic!("{full}");
    };
    assert!(asked >= 76_000 && held >= 50_000 && max == 100_000);
    assert_eq!(store.stats().unwrap(), before);
    assert!(store.put(&noise(50_000, 1)[..]).unwrap().is_same(&one));
    store.set_max_bytes(None);
    assert_eq!(store.put(&noise(80_000, 2)[..]).unwrap().len(), 80_000);
}

/// Goal: the store's pages and the engine's frames do not disturb each other. Method: values come and go
/// while the engine merges and un-merges memory that holds the same pages.
#[test]
fn engine_merges_beside_a_store_with_the_same_pages() {
    let engine = Engine::new(EngineSettings::default()).unwrap();
    let store = Store::new(engine.clone(), "", None).unwrap();
    let page = page_size();
    let pages: Vec<Vec<u8>> = (1..5).map(|kind| noise(page, kind)).collect();
    let mut memory: Vec<u8> = Vec::new();
    for round in 0..400 {
        memory.extend(&pages[round % pages.len()]);
    }
    #[allow(
        unsafe_code,
        reason = "the memory is the test's own, and outlives its region"
    )]
    // SAFETY: `memory` is neither grown nor dropped before the region has ended.
    let region = unsafe { engine.register(memory.as_ptr().addr(), memory.len(), "") }.unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                engine.scan(None, &mut || true).unwrap();
            }
        });
        let mut held = Vec::new();
        for round in 0..3000_usize {
            let mut bytes = pages[round % 4].clone();
            bytes.extend(noise(round % 6000, round as u64));
            held.push((store.put(&bytes[..]).unwrap(), bytes));
            if held.len() > 60 {
                let (blob, bytes) = held.swap_remove(round % 60);
                assert_eq!(blob.to_vec(), bytes);
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    let stats = engine.stats().unwrap();
    assert!(stats.core.pages_sharing > 300, "{stats:?}");
    for (at, found) in memory.chunks_exact(page).enumerate() {
        assert_eq!(found, pages[at % pages.len()], "page {at}");
    }
    engine.unregister(region).unwrap();
    assert_eq!(store.stats().unwrap().blobs, 0);
    drop(store);
    let stats = engine.stats().unwrap();
    assert_eq!(stats.space.frames_bytes, 0, "nothing is left in the file");
    assert_eq!(stats.core.regions, 0, "nothing is left registered");
}
