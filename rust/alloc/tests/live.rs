//! The allocator on live memory: what merges, what is given back, and what threads and forks do to it.

#[path = "../../linux/tests/support/mod.rs"]
mod support;

use pagemerge_alloc::allocator::{Allocator, Block, Options};
use pagemerge_linux::core::RunMode;
use pagemerge_linux::{Engine, Error, Remerge};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use support::engines::{engine, merge, scan, settings, try_register};
use support::os::{self, Random, page_size, word_of};
use support::{Need, case};

const WORD: usize = 8;

/// Fills a block by a content's words.
fn fill(block: &Block, content: u64) {
    let words = block.len() / WORD;
    let bytes: Vec<u8> = (0..words)
        .flat_map(|at| word_of(content, at % (page_size() / WORD)).to_le_bytes())
        .collect();
    block.write(0, &bytes).expect("it is not broken");
}

/// The first word that is not that content's.
fn differs(block: &Block, content: u64) -> Option<(usize, u64)> {
    let words = block.len() / WORD;
    let mut bytes = vec![0; words * WORD];
    block.read(0, &mut bytes).expect("it is not broken");
    bytes
        .chunks_exact(WORD)
        .map(|word| u64::from_le_bytes(word.try_into().expect("a word")))
        .enumerate()
        .find(|(at, word)| *word != word_of(content, at % (page_size() / WORD)))
}

fn assert_zero(block: &Block, when: &str) {
    let mut bytes = vec![1; block.len()];
    block.read(0, &mut bytes).expect("it is not broken");
    let at = bytes.iter().position(|byte| *byte != 0);
    assert_eq!(at, None, "{when}: a new block has an old byte");
}

fn allocator(engine: &Engine) -> Allocator {
    Allocator::new(engine, Options::default())
}

/// Goal: equal values merge page by page, whatever was allocated between them, the last partial page
/// included; also values that come when others have merged already.
fn equal_values_merge_to_the_last_byte() {
    let engine = engine(Remerge::Quiet);
    let allocator = allocator(&engine);
    let size = 10_000;
    let mut between = Vec::new();
    let mut values = Vec::new();
    let random = &mut Random::new(os::seed());
    for turn in 0..60 {
        let value = allocator.allocate(size).expect("memory");
        fill(&value, 5);
        values.push(value);
        // Shorter than a page, so that none of them is its own twin.
        let other = allocator.allocate(1 + random.below(4000));
        let other = other.expect("memory");
        fill(&other, 1000 + turn);
        between.push(other);
    }
    let stats = merge(&engine);
    let pages = size.div_ceil(page_size()) as u64;
    // Two frames: the words repeat from page to page, and the last page ends early.
    assert_eq!(stats.core.pages_shared, 2);
    assert_eq!(stats.core.pages_sharing, 60 * pages - 2);
    values.push(allocator.allocate(size).expect("memory"));
    fill(&values[60], 5);
    let stats = merge(&engine);
    assert_eq!(stats.core.pages_sharing, 61 * pages - 2);
    assert!(values.iter().all(|value| differs(value, 5).is_none()));
    let wrong = between
        .iter()
        .zip(1000..)
        .find(|(other, n)| differs(other, *n).is_some());
    assert!(wrong.is_none());
}

/// Goal: whatever the last owner left, and whether it was merged, the next one finds zeroes.
fn memory_comes_zeroed() {
    let engine = engine(Remerge::Quiet);
    let allocator = allocator(&engine);
    let random = &mut Random::new(os::seed());
    for turn in 0..40 {
        let sizes: Vec<usize> = (0..30).map(|_| 1 + random.below(400_000)).collect();
        let blocks: Vec<Block> = sizes
            .iter()
            .map(|&size| allocator.allocate(size).expect("memory"))
            .collect();
        for block in &blocks {
            assert_zero(block, "among others");
            fill(block, 1 + turn % 3);
        }
        if turn % 2 == 0 {
            merge(&engine);
        }
        if turn % 4 == 0 {
            blocks[0].write(0, b"broken").expect("it is not broken");
        }
    }
}

/// Goal: what is given back is: blocks, arenas, frames, mappings, memory.
fn everything_is_given_back() {
    let engine = engine(Remerge::Quiet);
    // What is made once, at the first use.
    let warm = allocator(&engine);
    drop(warm.allocate(100_000));
    drop(warm);
    scan(&engine);
    let before = (os::map_count(), os::rollup("Pss"));
    for _ in 0..3 {
        let allocator = allocator(&engine);
        let mut blocks: Vec<Block> = (0..400)
            .map(|n| allocator.allocate(1000 * (1 + n % 90)).expect("memory"))
            .collect();
        blocks.push(allocator.allocate(40 << 20).expect("memory"));
        for (n, block) in blocks.iter().enumerate() {
            fill(block, 1 + n as u64 % 7);
        }
        let stats = merge(&engine);
        assert!(stats.core.pages_sharing > 10_000, "{:?}", stats.core);
        assert!(stats.space.frames_bytes > 0);
        let last = blocks.split_off(300);
        drop(blocks);
        allocator.trim().expect("it is not broken");
        let held = allocator.stats().expect("it is not broken");
        assert!(held.held_bytes < held.live_bytes + 101 * page_size());
        drop(last);
        drop(allocator);
    }
    let stats = engine.stats().expect("an engine");
    assert_eq!(stats.core.regions, 0);
    assert_eq!((stats.space.frames, stats.space.frames_bytes), (0, 0));
    assert_eq!((stats.core.rmap_items, stats.core.pages_shared), (0, 0));
    let after = (os::map_count(), os::rollup("Pss"));
    // Rust's own heap grows and shrinks in between.
    assert!(after.0 <= before.0 + 8, "mappings: {before:?} {after:?}");
    assert!(
        after.1 <= before.1 + 4096,
        "PSS in KiB: {before:?} {after:?}"
    );
    println!("figure: mappings and PSS in KiB, before and after: {before:?}, {after:?}");
}

/// Goal: freed memory goes back in batches, by itself.
fn freed_memory_goes_back_without_being_asked() {
    let engine = engine(Remerge::Quiet);
    let allocator = allocator(&engine);
    let mut peak = 0;
    for turn in 0..40 {
        let blocks: Vec<Block> = (0..100)
            .map(|_| allocator.allocate(100_000).expect("memory"))
            .collect();
        for block in &blocks {
            fill(block, turn);
        }
        drop(blocks);
        peak = peak.max(os::rollup("Pss"));
    }
    let stats = allocator.stats().expect("it is not broken");
    assert!(stats.arenas <= 2, "{stats:?}");
    // Ten MiB live, 32 kept, and at most twice that on its way back; 400 in all.
    assert!(peak < 130 << 10, "{peak} KiB");
}

/// Goal: when the engine is closed, blocks are ordinary memory, and allocating goes on.
fn blocks_outlive_their_engine() {
    let engine = engine(Remerge::Quiet);
    let allocator = allocator(&engine);
    let blocks: Vec<Block> = (0..20)
        .map(|_| allocator.allocate(100_000).expect("memory"))
        .collect();
    for block in &blocks {
        fill(block, 3);
    }
    assert!(merge(&engine).core.pages_sharing > 400);
    engine.close().expect("there is memory for the copies");
    assert!(blocks.iter().all(|block| differs(block, 3).is_none()));
    for turn in 0..20 {
        let more: Vec<Block> = (0..40)
            .map(|n| {
                allocator
                    .allocate(200_000 * (1 + n % 2) + 20_000_000 * (n % 7 / 6))
                    .expect("memory")
            })
            .collect();
        for block in &more {
            assert_zero(block, "after the engine");
            fill(block, 10 + turn);
        }
    }
    drop(blocks);
    allocator.trim().expect("it is not broken");
    let stats = allocator.stats().expect("it is not broken");
    assert_eq!((stats.arenas, stats.held_bytes), (0, 0), "{stats:?}");
}

/// Goal: whoever holds only blocks keeps the engine, and what is merged stays merged.
fn engine_that_is_released_ends_with_the_last_block() {
    let engine = engine(Remerge::Quiet);
    let (one, other) = {
        let allocator = allocator(&engine);
        let made = [(); 2].map(|()| allocator.allocate(500_000).expect("memory"));
        for block in &made {
            fill(block, 4);
        }
        merge(&engine);
        made.into()
    };
    let pss = os::rollup("Pss");
    engine.start().expect("a barrier");
    engine.release().expect("nothing is registered by hand");
    assert_eq!(engine.run().expect("arenas keep it"), RunMode::Stop);
    drop(engine);
    assert!(os::rollup("Pss") < pss + 200, "it has been un-merged");
    assert!(differs(&one, 4).is_none() && differs(&other, 4).is_none());
    drop(one);
    assert!(differs(&other, 4).is_none());
}

/// Goal: an allocator's memory cannot be registered a second time, and the error says where it merges.
fn arenas_are_registered_once() {
    let engine = engine(Remerge::Quiet);
    let allocator = allocator(&engine);
    let block = allocator.allocate(100_000).expect("memory");
    let another = support::engines::engine(Remerge::Quiet);
    for engine in [&engine, &another] {
        match try_register(engine, block.addr(), block.len(), "") {
            Err(Error::InArena { pages: 24 }) => {}
            other => panic!("{other:?}"),
        }
    }
}

/// Goal: memory that is locked from the beginning is handed out zeroed all the same. Nothing of it can be
/// discarded, nor merged.
fn locked_memory_is_zeroed_by_hand() {
    const MCL_FUTURE: usize = 2;
    let engine = engine(Remerge::Quiet);
    let allocator = allocator(&engine);
    os::call(libc::SYS_mlockall, &[MCL_FUTURE]).expect("root may lock");
    for turn in 0..4 {
        // More than is kept, so that it goes away and comes back.
        let blocks: Vec<Block> = (0..400)
            .map(|_| allocator.allocate(100_000).expect("memory"))
            .collect();
        for block in &blocks {
            assert_zero(block, "locked");
            fill(block, turn);
        }
        let stats = scan(&engine);
        assert_eq!(stats.core.pages_sharing, 0);
        blocks[3].empty().expect("it is not broken");
        assert_zero(&blocks[3], "emptied");
    }
}

/// What a thread of the torture does.
fn live(
    allocator: &Allocator,
    seed: u64,
    largest: usize,
    stop: &AtomicBool,
    wrong: &AtomicU64,
) -> u64 {
    let random = &mut Random::new(seed);
    let mut blocks: Vec<(Block, u64)> = Vec::new();
    let mut turns = 0;
    while !stop.load(Ordering::Relaxed) {
        turns += 1;
        let content = if random.below(4) == 0 {
            // Nobody else has this one.
            seed ^ (turns << 8)
        } else {
            1 + random.below(6) as u64
        };
        match random.below(12) {
            0..=4 => {
                let size = match random.below(40) {
                    0 => largest,
                    1..=4 => random.below(largest / 8),
                    _ => random.below(60_000),
                };
                let block = allocator.allocate(size).expect("memory");
                assert_zero(&block, "in the torture");
                fill(&block, content);
                blocks.push((block, content));
            }
            5..=8 if !blocks.is_empty() => {
                let (block, content) = blocks.swap_remove(random.below(blocks.len()));
                if let Some(found) = differs(&block, content) {
                    wrong.fetch_add(1, Ordering::Relaxed);
                    println!("{found:?} in a block of {} bytes", block.len());
                }
            }
            9 if !blocks.is_empty() => {
                let at = random.below(blocks.len());
                fill(&blocks[at].0, content);
                blocks[at].1 = content;
            }
            10 if !blocks.is_empty() => {
                let at = random.below(blocks.len());
                let (block, content) = &mut blocks[at];
                let words = block.len() / WORD;
                block.resize(random.below(100_000)).expect("memory");
                if block.len() / WORD > words {
                    fill(block, *content);
                }
            }
            _ => {}
        }
        if blocks.len() > 60 {
            blocks.truncate(30);
        }
    }
    for (block, content) in &blocks {
        if let Some(found) = differs(block, *content) {
            wrong.fetch_add(1, Ordering::Relaxed);
            println!("{found:?} in a block of {} bytes at the end", block.len());
        }
    }
    turns
}

fn seconds() -> Duration {
    let told = std::env::var("PAGEMERGE_STRESS_SECONDS");
    let told = told.ok().and_then(|text| text.parse().ok());
    Duration::from_secs_f64(told.unwrap_or(5.0))
}

/// Goal: while the engine merges in the background, threads that allocate, write, resize and free never see
/// a byte that is not theirs, nor lose one; and in the end everything is given back.
fn frees_during_merges_lose_and_show_nothing() {
    let seed = os::seed();
    println!("seed {seed}");
    let engine = Engine::new(settings()).expect("an engine");
    engine.start().expect("the full barrier");
    let allocator = allocator(&engine);
    let (stop, wrong) = (AtomicBool::new(false), AtomicU64::new(0));
    let turns: u64 = thread::scope(|scope| {
        let (allocator, stop, wrong) = (&allocator, &stop, &wrong);
        let threads: Vec<_> = (0..3)
            .map(|n| scope.spawn(move || live(allocator, seed + n, 17 << 20, stop, wrong)))
            .collect();
        let end = Instant::now() + seconds();
        while Instant::now() < end {
            thread::sleep(Duration::from_millis(50));
            allocator.trim().expect("it is not broken");
            allocator.check().expect("the books are right");
        }
        stop.store(true, Ordering::Relaxed);
        threads
            .into_iter()
            .map(|t| t.join().expect("it ends"))
            .sum()
    });
    let stats = engine.stats().expect("an engine");
    println!(
        "figure: {turns} turns, {} merges, {} windows, {} lost races",
        stats.core.pages_merged, stats.space.windows, stats.space.lost_races
    );
    assert_eq!(wrong.load(Ordering::Relaxed), 0);
    assert!(
        stats.core.pages_merged > 100,
        "nothing was merged meanwhile"
    );
    allocator.trim().expect("it is not broken");
    let stats = allocator.stats().expect("it is not broken");
    assert_eq!((stats.allocations, stats.arenas), (0, 0));
}

/// Goal: a child finds no lock of the allocator taken, has all the bytes, and can allocate, free and write,
/// whatever other threads did at the moment of the fork; the parent's blocks never change by it.
fn forks_find_no_lock_taken() {
    let engine = Engine::new(settings()).expect("an engine");
    engine.start().expect("the full barrier");
    let allocator = allocator(&engine);
    let kept: Vec<Block> = (0..12)
        .map(|_| allocator.allocate(100_000).expect("memory"))
        .collect();
    for block in &kept {
        fill(block, 2);
    }
    let stop = AtomicBool::new(false);
    let end = Instant::now() + seconds();
    let (mut forks, mut wrong) = (0, false);
    thread::scope(|scope| {
        let (allocator, stop) = (&allocator, &stop);
        // In the books most of the time.
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                drop(allocator.allocate(1).expect("memory"));
            }
        });
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let blocks = [(); 30].map(|()| allocator.allocate(90_000));
                drop(blocks);
            }
        });
        // Asserted when the threads have ended.
        while !wrong && Instant::now() < end {
            forks += 1;
            // SAFETY: the child does what a child of a program with threads may do (glibc's malloc is
            // usable there), and what is tested.
            #[allow(unsafe_code, reason = "a fork")]
            let child = unsafe { libc::fork() };
            if child == 0 {
                // SAFETY: ends a child that hangs.
                #[allow(unsafe_code, reason = "an alarm")]
                unsafe {
                    libc::alarm(20)
                };
                let good = in_child(allocator, &kept, forks % 16 == 1);
                // SAFETY: ends the child at once; nothing of the parent's is to be dropped there.
                #[allow(unsafe_code, reason = "the end of a child")]
                unsafe {
                    libc::_exit(i32::from(!good))
                };
            }
            let mut status = 0;
            // SAFETY: our own child, and a place of our own.
            #[allow(unsafe_code, reason = "waits for a child")]
            let got = unsafe { libc::waitpid(child, &raw mut status, 0) };
            wrong = (got, status) != (child, 0) || kept.iter().any(|it| differs(it, 2).is_some());
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(
        !wrong,
        "a child hung or saw other bytes, or its parent did, at fork {forks}"
    );
    println!("figure: {forks} forks");
    allocator.check().expect("the books are right");
}

fn in_child(allocator: &Allocator, kept: &[Block], large: bool) -> bool {
    let mut good = kept.iter().all(|block| differs(block, 2).is_none());
    let mut blocks = Vec::new();
    for n in 0..30 {
        let size = if n == 20 && large {
            20 << 20
        } else {
            5000 * (1 + n % 40)
        };
        let block = allocator.allocate(size).expect("memory");
        let mut bytes = vec![1; block.len()];
        block.read(0, &mut bytes).expect("it is not broken");
        good &= bytes.iter().all(|byte| *byte == 0);
        fill(&block, 9);
        blocks.push(block);
    }
    good &= blocks.iter().all(|block| differs(block, 9).is_none());
    fill(&kept[0], 8);
    good &= differs(&kept[0], 8).is_none() && differs(&kept[1], 2).is_none();
    drop(blocks);
    good &= allocator.trim().is_ok() && allocator.check().is_ok();
    let stats = allocator.stats().expect("it is not broken");
    good && stats.arenas > 0
}

/// Goal: a long random trace leaves no more than a little beside what is live.
fn long_random_trace_does_not_fragment() {
    let engine = engine(Remerge::Quiet);
    let allocator = allocator(&engine);
    let random = &mut Random::new(os::seed());
    let mut blocks: Vec<Block> = Vec::new();
    let mut live = 0;
    let size = |random: &mut Random| match random.below(10) {
        0 => random.below(4 << 20),
        1..=3 => random.below(300_000),
        _ => random.below(30_000),
    };
    for _ in 0..60_000 {
        if live < 200 << 20 && random.below(100) < 60 {
            let block = allocator.allocate(size(random)).expect("memory");
            live += block.len();
            blocks.push(block);
        } else if !blocks.is_empty() {
            live -= blocks.swap_remove(random.below(blocks.len())).len();
        }
    }
    // What is on its way back has arrived when the engine has answered.
    engine.stats().expect("an engine");
    let stats = allocator.stats().expect("it is not broken");
    allocator.check().expect("the books are right");
    #[allow(clippy::cast_precision_loss, reason = "figures to be read")]
    let (held, reserved) = (
        stats.held_bytes as f64 / live as f64,
        stats.reserved_bytes as f64 / live as f64,
    );
    println!("figure: held / live {held:.3}, address space / live {reserved:.3}");
    assert_eq!(stats.live_bytes, live);
    // Of 200 MiB; 32 are kept for the next owner at most.
    assert!(held < 1.25, "held {held}");
    assert!(reserved < 2.5, "address space {reserved}");
}

fn main() -> ExitCode {
    support::run(vec![
        case!(equal_values_merge_to_the_last_byte),
        case!(memory_comes_zeroed),
        case!(everything_is_given_back),
        case!(freed_memory_goes_back_without_being_asked),
        case!(blocks_outlive_their_engine),
        case!(engine_that_is_released_ends_with_the_last_block),
        case!(arenas_are_registered_once),
        case!(locked_memory_is_zeroed_by_hand).needs(Need::Root),
        case!(frees_during_merges_lose_and_show_nothing).seconds(3600),
        case!(forks_find_no_lock_taken).seconds(3600),
        case!(long_random_trace_does_not_fragment),
    ])
}
