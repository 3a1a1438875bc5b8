//! Goal: over real memory, too, no content, timing or pattern of regions makes a pass endless or the
//! engine's memory boundless. (`rust/sim/tests/hostile.rs` counts what the algorithm does, by the million
//! pages.) Method: the worst cases at a size that a busy machine bears, with counts of what the merging
//! thread read from the kernel and of the heap; CPU time is printed, never judged.

#[path = "support/heap.rs"]
mod heap;
mod support;

use pagemerge_linux::core::{Reason, Settings, TreeOrder};
use pagemerge_linux::{Engine, EngineSettings, EngineStats, Remerge};
use std::fs;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use support::case;
use support::engines::{
    engine, merged_pages, reasons, register, scan, settings, skipped, try_register,
};
use support::os::{self, Memory, Random};

/// Bytes that the merging thread has read from files of the kernel so far.
fn bytes_read() -> u64 {
    let tasks = fs::read_dir("/proc/self/task").expect("our own threads");
    let mut all = 0;
    for task in tasks.flatten() {
        let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        if read("comm").trim() == "pagemerge" {
            let io = read("io");
            let line = io.lines().find_map(|line| line.strip_prefix("rchar: "));
            all += line
                .and_then(|n| n.parse::<u64>().ok())
                .expect("I/O accounting");
        }
    }
    all
}

fn max_map_count() -> u64 {
    let text = fs::read_to_string("/proc/sys/vm/max_map_count").expect("it can be read");
    text.trim().parse().expect("a number")
}

fn cpu(stats: &EngineStats) -> Duration {
    Duration::from_nanos(stats.cpu_nanos)
}

/// Pages that are equal but for their last word (Arcangeli's worst case for ksmd, which compares from
/// the front): in content order each comparison reads two pages, in digest order there is none.
fn pages_equal_but_for_the_last_word() {
    const PAGES: usize = 32_768;
    let last = os::page_size() / 8 - 1;
    let memory = Memory::new(PAGES);
    for page in 0..PAGES {
        memory.fill(page, 1);
        memory.store(page, last, page as u64);
    }
    for tree_order in [TreeOrder::Content, TreeOrder::Digest] {
        let before = heap::out();
        let engine = Engine::new(EngineSettings {
            scan: Settings {
                tree_order,
                ..settings().scan
            },
            ..settings()
        })
        .expect("an engine");
        let region = register(&engine, &memory);
        scan(&engine);
        let stats = scan(&engine);
        let shown = (stats.core.pages_unshared, stats.core.pages_shared);
        assert_eq!(shown, (PAGES as u64, 0), "{tree_order:?}");
        assert_memory(&stats, before);
        println!(
            "figure: {PAGES} pages in {tree_order:?} order: {:?} of CPU",
            cpu(&stats)
        );
        engine.unregister(region).expect("un-merged");
        engine.close().expect("closed");
    }
    for page in 0..PAGES {
        assert_eq!(memory.load(page, last), page as u64);
    }
}

/// Pages that are counted under what they were found to be.
fn known(stats: &EngineStats) -> u64 {
    let core = &stats.core;
    core.pages_shared + core.pages_sharing + core.pages_unshared + core.pages_volatile
}

/// What the engine takes is what it says, and not more than 20 bytes a page with a record, 72 a frame,
/// and a constant.
fn assert_memory(stats: &EngineStats, before: i64) {
    // Buffers of a batch, of windows and of reading the list of mappings; the thread's own.
    const CONSTANT: u64 = 4 << 20;
    let real = u64::try_from(heap::out() - before).unwrap_or(0);
    let (records, frames) = (stats.core.rmap_items, stats.space.frames);
    println!(
        "figure: {real} bytes of heap for {records} records and {frames} frames, {} said",
        stats.metadata_bytes
    );
    let bound = 20 * records + 72 * frames + CONSTANT;
    assert!(real <= bound, "{real} bytes of {bound}");
    assert!(
        real <= stats.metadata_bytes + CONSTANT,
        "{real} bytes, {} said",
        stats.metadata_bytes
    );
}

/// 256 MiB of one page, two to a frame or 256: as many as there may be mappings are merged, the rest is
/// refused by name, pass after pass, without frames being made for it; and all of it comes back.
fn equal_pages_beyond_all_mappings_end_every_pass() {
    const PAGES: usize = 65_536;
    for max_page_sharing in [2, 256] {
        let memory = Memory::new(PAGES);
        (0..PAGES).for_each(|page| memory.fill(page, 1));
        let before = heap::out();
        // A budget of some thousands, so that the limit is met on a busy machine, too.
        let max = max_map_count();
        let engine = Engine::new(EngineSettings {
            scan: Settings {
                max_page_sharing,
                ..settings().scan
            },
            reserved_mappings: Some(max - (os::map_count() as u64 + 6000)),
            ..settings()
        })
        .expect("an engine");
        let region = register(&engine, &memory);
        scan(&engine);
        let mut figures = Vec::new();
        for _ in 0..3 {
            let (read, cpu_before) = (bytes_read(), engine.stats().expect("stats").cpu_nanos);
            let stats = scan(&engine);
            let cpu = Duration::from_nanos(stats.cpu_nanos - cpu_before);
            figures.push((stats.core.pages_merged, cpu, bytes_read() - read));
            let (core, known) = (&stats.core, known(&stats));
            // A frame whose second sharer was refused is taken back, and its page has to be quiet first.
            let waits = skipped(&stats, Reason::NotQuiet) + skipped(&stats, Reason::MappingBudget);
            assert!(
                known <= PAGES as u64 && known + waits >= PAGES as u64,
                "{core:?}"
            );
            println!("figure: {:?}", reasons(&stats));
            let merged = core.pages_shared + core.pages_sharing;
            assert!(
                (1000..PAGES as u64 / 2).contains(&merged),
                "{merged} merged"
            );
            assert!(
                skipped(&stats, Reason::MappingBudget) > 0,
                "{:?}",
                core.skipped
            );
            // No more frames hold memory than pages show.
            assert!(
                stats.space.frames <= merged.div_ceil(2),
                "{} frames",
                stats.space.frames
            );
            let bytes = stats.space.frames * os::page_size() as u64;
            assert!(
                stats.space.frames_bytes <= bytes + bytes / 8,
                "{:?}",
                stats.space
            );
            assert_memory(&stats, before);
        }
        println!("figure: {max_page_sharing} to a frame: (merged, CPU, bytes read) {figures:?}");
        let some = |when: &str| {
            (0..PAGES)
                .step_by(7)
                .for_each(|page| memory.assert_shows(page, 1, when));
        };
        some("merged");
        engine.unregister(region).expect("un-merged");
        let stats = engine.stats().expect("stats");
        assert_eq!((stats.space.frames, stats.core.rmap_items), (0, 0));
        assert_memory(&stats, before);
        assert_eq!(merged_pages(&memory), 0);
        some("un-merged");
        engine.close().expect("closed");
    }
}

/// A writer who turns pages to and fro as fast as he can, and pages that become something else between
/// any two passes: every pass ends, and what is read is what was written.
fn pages_rewritten_all_the_time_end_every_pass() {
    const PAGES: usize = 1024;
    const PASSES: u64 = 12;
    let memory = Memory::new(PAGES);
    (0..PAGES).for_each(|page| memory.fill(page, 1));
    let engine = engine(Remerge::Quiet);
    let region = register(&engine, &memory);
    let stop = AtomicBool::new(false);
    let last = std::thread::scope(|scope| {
        // The first half is the writer's.
        let writer = scope.spawn(|| {
            let mut random = Random::new(os::seed());
            let mut last = vec![1; PAGES / 2];
            let mut writes = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                let page = random.below(PAGES / 2);
                memory.assert_shows(page, last[page], "before a write");
                last[page] = 3 - last[page];
                memory.fill(page, last[page]);
                writes += 1;
                if writes.is_multiple_of(64) {
                    // Long enough for some pages to look calm.
                    std::thread::sleep(Duration::from_micros(300));
                }
            }
            (last, writes)
        });
        for pass in 0..PASSES {
            for page in PAGES / 2..PAGES {
                memory.fill(page, 1 + pass % 2);
            }
            let stats = scan(&engine);
            let (core, known) = (&stats.core, known(&stats));
            assert!(known <= PAGES as u64, "{core:?}");
            assert_eq!(core.full_scans, pass + 1);
            for page in PAGES / 2..PAGES {
                memory.assert_shows(page, 1 + pass % 2, "after a pass");
            }
        }
        stop.store(true, Ordering::Relaxed);
        writer.join().expect("the writer found what it wrote")
    });
    let stats = engine.stats().expect("stats");
    println!(
        "figure: {} writes, {} merges, {} lost races in {PASSES} passes",
        last.1, stats.core.pages_merged, stats.space.lost_races
    );
    for (page, content) in last.0.into_iter().enumerate() {
        memory.assert_shows(page, content, "at the end");
    }
    engine.unregister(region).expect("un-merged");
    engine.close().expect("closed");
}

/// Found by this test: each region had the list of all mappings read for itself in each pass and in
/// un-merging, so 2,000 regions of one page took 24 s for a pass and 50 s to close. A pass reads that
/// list once or twice, however many regions there are.
fn many_regions_of_one_page_read_the_list_of_mappings_once() {
    const REGIONS: usize = 300;
    let memory = Memory::new(2 * REGIONS);
    (0..2 * REGIONS).for_each(|page| memory.fill(page, page as u64 % 7 + 1));
    let engine = engine(Remerge::Quiet);
    for at in 0..REGIONS {
        try_register(&engine, memory.at(2 * at), os::page_size(), "").expect("plain memory");
    }
    // What was known when they were registered is not fresh any more.
    std::thread::sleep(Duration::from_millis(1100));
    let mut figures = Vec::new();
    let mut list = 0;
    for pass in 0..4 {
        let before = bytes_read();
        let stats = scan(&engine);
        let read = bytes_read() - before;
        figures.push(read);
        list = list.max(fs::read("/proc/self/smaps").expect("our own").len() as u64);
        let bound = 3 * list + 512 * REGIONS as u64;
        assert!(read <= bound, "pass {pass} read {read} bytes of {bound}");
        if pass > 0 {
            assert_eq!(stats.core.pages_sharing, REGIONS as u64 - 7);
        }
        std::thread::sleep(Duration::from_millis(300));
    }
    let before = bytes_read();
    engine.close().expect("un-merged and closed");
    let closing = bytes_read() - before;
    println!("figure: passes read {figures:?} bytes, closing {closing}; the list has {list}");
    // Un-merging asks for the memory that is left, before each region.
    assert!(
        closing <= 5 * list + 4096 * REGIONS as u64,
        "closing read {closing} bytes"
    );
    (0..2 * REGIONS).for_each(|page| memory.assert_shows(page, page as u64 % 7 + 1, "closed"));
}

/// Pages made with knowledge of the key, all of one digest: they cost comparisons, in every pass, and
/// merge a batch or so at a time. Nobody has that knowledge: the key is the kernel's random number.
#[cfg(feature = "inject")]
fn pages_of_one_digest_under_a_known_key_merge_all_the_same() {
    const PAGES: usize = 4000;
    const SEED: u64 = 4711;
    let memory = Memory::new(PAGES);
    let blinding = pagemerge_linux::known::blinding(SEED);
    let show = |page: usize, when: &str| {
        let number = (page % (PAGES / 2)) as u64;
        assert_eq!(
            (memory.load(page, 0), memory.load(page, 1)),
            (blinding, number),
            "{when}"
        );
    };
    for page in 0..PAGES {
        memory.fill(page, 1);
        memory.store(page, 0, blinding);
        memory.store(page, 1, (page % (PAGES / 2)) as u64);
    }
    pagemerge_linux::known::seed(SEED);
    let engine = engine(Remerge::Quiet);
    let region = register(&engine, &memory);
    let mut passes = 0;
    let mut stats = scan(&engine);
    while stats.core.pages_sharing < PAGES as u64 / 2 {
        passes += 1;
        assert!(passes < 60, "{:?}", stats.core);
        let before = stats.core.pages_sharing;
        stats = scan(&engine);
        let gained = stats.core.pages_sharing - before;
        assert!(
            gained > 0,
            "nothing merged in pass {passes}: {:?}",
            stats.core
        );
    }
    // With digests of their own they would all have merged in the first of these.
    assert!(passes > 2, "these pages do not collide");
    println!(
        "figure: {PAGES} pages of one digest in {passes} passes, {:?} of CPU",
        cpu(&stats)
    );
    assert_eq!(stats.core.pages_shared, PAGES as u64 / 2);
    (0..PAGES).for_each(|page| show(page, "merged"));
    engine.unregister(region).expect("un-merged");
    (0..PAGES).for_each(|page| show(page, "un-merged"));
    engine.close().expect("closed");
}

fn main() -> ExitCode {
    let cases = vec![
        case!(pages_equal_but_for_the_last_word),
        case!(equal_pages_beyond_all_mappings_end_every_pass),
        case!(pages_rewritten_all_the_time_end_every_pass),
        case!(many_regions_of_one_page_read_the_list_of_mappings_once),
        #[cfg(feature = "inject")]
        case!(pages_of_one_digest_under_a_known_key_merge_all_the_same),
    ];
    support::run(cases)
}
