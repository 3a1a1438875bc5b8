//! What the layers over live memory cost: digests, registering, passes, merging and un-merging.
//!
//! `cargo bench -p pagemerge-linux`. Times are on the wall and for all pages together; whole runs in
//! CPU time, beside the kernel's, are in `benches/rivals.py`. Scattered merging takes two mappings a
//! page, so memory is small enough for the usual `vm.max_map_count`.

// For the promise of `register`.
#![allow(unsafe_code)]

use criterion::{
    BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use pagemerge_linux::core::{AdvisorMode, Settings};
use pagemerge_linux::{Engine, EngineSettings, RegionHandle, digest_all, page_size};
use std::hint::black_box;
use std::time::{Duration, Instant};

#[path = "support/memory.rs"]
mod memory;

use memory::{Dice, Memory};

const MIB: usize = 64;

fn engine() -> Engine {
    Engine::new(EngineSettings {
        scan: Settings {
            advisor_mode: AdvisorMode::None,
            ..Settings::default()
        },
        ..EngineSettings::default()
    })
    .expect("an engine")
}

fn register(engine: &Engine, memory: &Memory) -> RegionHandle {
    // SAFETY: the memory is never unmapped, and replaced only after it has been unregistered.
    unsafe { engine.register(memory.addr(), memory.bytes(), "") }.expect("plain memory")
}

fn pass(engine: &Engine) {
    engine.scan(None, &mut || true).expect("a pass");
}

fn digests(c: &mut Criterion) {
    let mut group = c.benchmark_group("digest");
    let (page, mut dice) = (page_size(), Dice(1));
    for (name, pages) in [("of cached pages", 16), ("from memory", (MIB << 20) / page)] {
        // A page more, so that there is a place in it where a page begins.
        let words: Vec<u64> = (0..(pages + 1) * page / 8).map(|_| dice.roll()).collect();
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let lead = bytes.as_ptr().addr().next_multiple_of(page) - bytes.as_ptr().addr();
        group.throughput(Throughput::Bytes((pages * page) as u64));
        group.bench_function(name, |b| {
            b.iter(|| black_box(digest_all(&bytes[lead..lead + pages * page], page, 1)));
        });
    }
    group.finish();
}

/// Runs of how many pages have four copies; 0 for none.
const RUNS: [(&str, usize); 4] = [("unique", 0), ("runs of 1", 1), ("16", 16), ("512", 512)];

/// Which part of an engine's life is timed.
#[derive(Clone, Copy)]
enum Part {
    Merge,
    Rest,
    Unregister,
}

/// One life: new memory (what was merged before and written would be another thing to merge),
/// registered, merged by two passes, looked at again, un-merged.
fn life(memory: &mut Memory, run: usize, dice: &mut Dice, part: Part) -> Duration {
    *memory = Memory::map(MIB, Some(memory)).expect("memory");
    memory.fill(run, dice);
    let engine = engine();
    let timed = |part_of: &mut dyn FnMut()| {
        let began = Instant::now();
        part_of();
        began.elapsed()
    };
    let mut region = None;
    let merge = timed(&mut || {
        region = Some(register(&engine, memory));
        pass(&engine);
        pass(&engine);
    });
    pass(&engine);
    let rest = timed(&mut || pass(&engine));
    let region = region.expect("it is registered");
    let unregister = timed(&mut || engine.unregister(region).expect("there is memory"));
    match part {
        Part::Merge => merge,
        Part::Rest => rest,
        Part::Unregister => unregister,
    }
}

fn lives(c: &mut Criterion) {
    let mut group = c.benchmark_group("engine");
    group.throughput(Throughput::Elements(((MIB << 20) / page_size()) as u64));
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    let (mut memory, mut dice) = (Memory::map(MIB, None).expect("memory"), Dice(1));
    for (kind, run) in RUNS {
        for (name, part) in [
            ("register and merge", Part::Merge),
            ("pass at rest", Part::Rest),
            ("unregister", Part::Unregister),
        ] {
            group.bench_function(BenchmarkId::new(name, kind), |b| {
                b.iter_custom(|times| {
                    (0..times)
                        .map(|_| life(&mut memory, run, &mut dice, part))
                        .sum()
                });
            });
        }
    }
    group.finish();
}

criterion_group! {
    name = layers;
    config = Criterion::default().measurement_time(Duration::from_secs(3)).warm_up_time(Duration::from_millis(500));
    targets = digests, lives
}
criterion_main!(layers);
