//! At the limits: of mappings, address space, memory, threads and descriptors, and of how large or how
//! many regions may be. At each of them bytes stay right, a page that is left alone has a named reason,
//! a refusal carries its figures, and the engine goes on when the limit is out of the way.
//!
//! Copy-on-write by the program itself at a memory limit is the kernel's affair: it is what the same
//! write to a page shared by a fork would be.

mod support;

use pagemerge_linux::core::{Reason, RunMode, Settings};
use pagemerge_linux::{Engine, EngineSettings, EngineStats, Error, Remerge};
use std::fs;
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use support::engines::{
    assert_filled, engine, fill, in_frames, merge, merged_pages, reasons, register, scan, settings,
    skipped, try_register,
};
use support::os::{self, MachineLock, MachineSetting, Memory, PRIVATE, RW, page_size};
use support::{Need, case, scenario, scenario_with};

const CONTENTS: usize = 8;

// -------------------------------------------------------------------- address space

/// Few pages, the same ones, in ever more address space.
struct Sparse {
    memory: Memory,
    pages: Vec<usize>,
}

impl Sparse {
    const CLUSTERS: usize = 64;
    const EACH: usize = 4;

    fn new(gib: usize) -> Self {
        let pages = (gib << 30) / page_size();
        let flags = PRIVATE | libc::MAP_NORESERVE;
        let memory = Memory::with(pages, RW, flags, -1, 0).expect("address space");
        memory.advise(libc::MADV_NOHUGEPAGE).expect("small pages");
        let step = pages / Self::CLUSTERS;
        let pages: Vec<usize> = (0..Self::CLUSTERS)
            .flat_map(|cluster| (0..Self::EACH).map(move |n| cluster * step + n))
            .collect();
        for (n, &page) in pages.iter().enumerate() {
            memory.fill(page, Self::content(n));
        }
        Self { memory, pages }
    }

    /// Half of them twins, half of them unique.
    fn content(n: usize) -> u64 {
        if n.is_multiple_of(2) {
            1 + (n % 16) as u64
        } else {
            1000 + n as u64
        }
    }

    fn check(&self, when: &str) {
        for (n, &page) in self.pages.iter().enumerate() {
            self.memory.assert_shows(page, Self::content(n), when);
        }
    }
}

/// What a pass asked of the kernel.
#[cfg(feature = "inject")]
fn calls() -> u64 {
    pagemerge_linux::inject::calls()
        .map(pagemerge_linux::inject::seen)
        .sum()
}

#[cfg(not(feature = "inject"))]
fn calls() -> u64 {
    0
}

/// A pass went over 64 GiB in windows of 512 pages: 65,536 system calls, whatever was there. It must cost
/// by the pages that are present, in calls, in records and in page tables.
fn sparse_memory_costs_by_the_pages_that_are_there() {
    let mut costs = Vec::new();
    for gib in [1, 10, 64] {
        let sparse = Sparse::new(gib);
        let tables = os::status("VmPTE");
        let engine = engine(Remerge::Quiet);
        let region = register(&engine, &sparse.memory);
        let mut each = Vec::new();
        let mut stats = engine.stats().expect("stats");
        for _ in 0..5 {
            let before = calls();
            stats = scan(&engine);
            each.push(calls() - before);
        }
        assert_eq!(
            (
                stats.core.pages_shared,
                stats.core.pages_sharing,
                stats.core.rmap_items
            ),
            (8, 120, 256),
            "{gib} GiB: {:?}",
            reasons(&stats)
        );
        sparse.check("merged");
        let grown = os::status("VmPTE").saturating_sub(tables);
        println!(
            "figure: {gib} GiB: system calls {each:?}, {} bytes of records, page tables +{grown} KiB",
            stats.metadata_bytes
        );
        assert!(grown <= 512, "{gib} GiB: page tables grow by {grown} KiB");
        let before = calls();
        engine.unregister(region).expect("un-merged");
        let parting = calls() - before;
        sparse.check("un-merged");
        let stats = engine.stats().expect("stats");
        assert_eq!((stats.space.frames, stats.core.rmap_items), (0, 0));
        costs.push((gib, each, parting, stats.metadata_bytes));
        engine.close().expect("closed");
    }
    let (_, small, parting, _) = &costs[0];
    for (gib, each, part, bytes) in &costs {
        // A chunk of the scanner's own, and a call here and there, may fall to either side.
        for (here, there) in each.iter().zip(small).chain([(part, parting)]) {
            assert!(
                *here <= there + there / 4 + 16,
                "{gib} GiB costs {each:?} and {part} calls, 1 GiB {small:?} and {parting}"
            );
        }
        assert!(*bytes < 256 << 10, "{gib} GiB: {bytes} bytes of records");
    }
}

/// Records came in arrays of 512: one page in each 2 MiB cost 12 KiB.
fn lone_pages_cost_little() {
    const STEP: usize = 512;
    let pages = 2048 * STEP;
    let flags = PRIVATE | libc::MAP_NORESERVE;
    let memory = Memory::with(pages, RW, flags, -1, 0).expect("address space");
    memory.advise(libc::MADV_NOHUGEPAGE).expect("small pages");
    let all: Vec<usize> = (0..pages).step_by(STEP).collect();
    for &page in &all {
        memory.fill(page, 1 + (page / STEP % 4) as u64);
    }
    let engine = engine(Remerge::Quiet);
    let before = engine.stats().expect("stats").metadata_bytes;
    register(&engine, &memory);
    let stats = merge(&engine);
    // Two frames for each content: no more than 256 pages share one.
    assert_eq!(stats.core.pages_sharing, 2040, "{:?}", reasons(&stats));
    let each = (stats.metadata_bytes - before) / 2048;
    println!("figure: {each} bytes of records for each lone page");
    assert!(each < 1024, "{each} bytes for a page");
    for page in all {
        memory.assert_shows(page, 1 + (page / STEP % 4) as u64, "merged");
    }
    engine.close().expect("un-merged");
}

/// Regions as large as page numbers go, and larger.
fn regions_beyond_the_page_numbers_are_refused_by_name() {
    let page = page_size();
    let huge = |pages: usize| Memory::with(pages, RW, PRIVATE | libc::MAP_NORESERVE, -1, 0);
    let engine = engine(Remerge::Quiet);
    // 8 TiB with pages of 4 KiB: half of the numbers.
    let large = huge(1 << 31).expect("address space");
    large.advise(libc::MADV_NOHUGEPAGE).expect("small pages");
    let at = [0, 1, 1 << 20, (1 << 31) - 1];
    for page in at {
        large.fill(page, 7);
    }
    let region = register(&engine, &large);
    let stats = merge(&engine);
    assert_eq!(stats.core.pages_sharing, 3, "{:?}", reasons(&stats));
    println!(
        "figure: {} bytes of records for a region of {} GiB",
        stats.metadata_bytes,
        large.len() >> 30
    );
    for page in at {
        large.assert_shows(page, 7, "merged");
    }
    // The other half and a little more: the numbers are used up.
    let more = huge(1 << 31).expect("address space");
    match try_register(&engine, more.addr(), more.len(), "") {
        Err(Error::Limit(why)) => assert!(why.contains("2147483648 pages"), "{why}"),
        other => panic!("{other:?}"),
    }
    drop(more);
    let beyond = huge((1 << 32) + 5).expect("address space");
    match try_register(&engine, beyond.addr(), beyond.len(), "") {
        Err(Error::Limit(why)) => assert!(why.contains("4294967301"), "{why}"),
        other => panic!("{other:?}"),
    }
    drop(beyond);
    for (addr, len) in [(large.addr(), 0), (large.addr() + 1, 2 * page - 2), (0, 0)] {
        let told = try_register(&engine, addr, len, "");
        assert!(matches!(told, Err(Error::TooSmall { .. })), "{told:?}");
    }
    engine.unregister(region).expect("un-merged");
    for page in at {
        large.assert_shows(page, 7, "un-merged");
    }
    let small = Memory::new(1);
    small.fill(0, 7);
    let region = register(&engine, &small);
    scan(&engine);
    engine.unregister(region).expect("a region of one page");
}

/// Ten thousand regions of a page or two: each pass, and each call, by what there is to do.
fn regions_by_the_ten_thousand() {
    const REGIONS: usize = 10_000;
    let memory = Memory::new(3 * REGIONS);
    fill(&memory, CONTENTS);
    let engine = engine(Remerge::Quiet);
    let before = Instant::now();
    let mut regions = Vec::new();
    for n in 0..REGIONS {
        let pages = 1 + n % 2;
        let region = try_register(&engine, memory.at(3 * n), pages * page_size(), "");
        regions.push(region.expect("a page or two"));
    }
    let registered = before.elapsed();
    let stats = merge(&engine);
    let merged = before.elapsed();
    println!(
        "figure: {REGIONS} regions registered in {registered:?}, 7 passes in {:?}, {:?}",
        merged.saturating_sub(registered),
        reasons(&stats)
    );
    assert_eq!(stats.core.regions, REGIONS as u64);
    assert_eq!(
        stats.core.pages_shared + stats.core.pages_sharing,
        (REGIONS + REGIONS / 2) as u64,
        "{:?}",
        reasons(&stats)
    );
    assert_filled(&memory, CONTENTS, "merged");
    for region in regions.iter().skip(5000) {
        engine.unregister(*region).expect("un-merged");
    }
    engine.close().expect("closed");
    println!(
        "figure: un-merged in {:?}",
        before.elapsed().saturating_sub(merged)
    );
    assert_filled(&memory, CONTENTS, "un-merged");
    assert_eq!(merged_pages(&memory), 0);
}

// -------------------------------------------------------------------- mappings

/// Every second page has twins far away, so each merged page is a mapping; the others are unique.
fn scattered(page: usize) -> u64 {
    if page.is_multiple_of(2) {
        1 + (page / 8) as u64
    } else {
        1 << 32 | page as u64
    }
}

fn fill_scattered(memory: &Memory) {
    (0..memory.pages()).for_each(|page| memory.fill(page, scattered(page)));
}

fn assert_scattered(memory: &Memory, when: &str) {
    (0..memory.pages()).for_each(|page| memory.assert_shows(page, scattered(page), when));
}

const MAX_MAP_COUNT: &str = "/proc/sys/vm/max_map_count";

/// Any `vm.max_map_count`, from what some systems have down to nearly nothing, as the engine reads it.
fn any_limit_of_mappings_is_kept() {
    for max in [1_048_576, 65_530, 20_000, 5000, 1500, 300, 60, 1] {
        println!("max_map_count {max}");
        scenario_with("under_a_limit_of_mappings", &[("MAX", &max.to_string())])
            .end(Duration::from_secs(150))
            .expect_success();
    }
}

fn under_a_limit_of_mappings() {
    let max = std::env::var("MAX").expect("the limit");
    os::pretend(MAX_MAP_COUNT, &max);
    let max: u64 = max.parse().expect("a number");
    at_a_limit_of_mappings(max);
}

fn at_a_limit_of_mappings(max: u64) {
    const PAGES: usize = 8192;
    let memory = Memory::new(PAGES);
    fill_scattered(&memory);
    let before = os::map_count() as u64;
    let engine = engine(Remerge::Quiet);
    let region = register(&engine, &memory);
    let stats = merge(&engine);
    assert_scattered(&memory, "merged");
    let (now, reserved) = (os::map_count() as u64, (max / 10).max(1000).min(max));
    assert_eq!(stats.space.mapping_budget, max - reserved);
    println!(
        "figure: of {max} mappings {before} -> {now}, {} merged, {:?}",
        stats.core.pages_merged,
        reasons(&stats)
    );
    // Views, staging and borders are ours, too.
    assert!(
        now <= (max - reserved).max(before + 16) + 16,
        "{now} mappings of {max}, {reserved} of them reserved"
    );
    if max - reserved < before + 2 * PAGES as u64 {
        assert!(
            skipped(&stats, Reason::MappingBudget) > 0,
            "{:?}",
            reasons(&stats)
        );
    } else {
        assert_eq!(
            stats.core.pages_shared + stats.core.pages_sharing,
            PAGES as u64 / 2
        );
    }
    engine.unregister(region).expect("un-merged");
    assert_scattered(&memory, "un-merged");
    assert_eq!(merged_pages(&memory), 0);
    let left = os::map_count() as u64;
    println!("figure: un-merged, {left} mappings are left");
    assert!(left <= now + 16, "{now} mappings became {left}");
    engine.close().expect("closed");
}

/// The same with the kernel's own limit.
fn limits_of_the_whole_machine_are_kept() {
    let lock = MachineLock::take();
    let setting = MachineSetting::hold(&lock, MAX_MAP_COUNT);
    for max in [1_048_576, 20_000] {
        setting.change(&max.to_string());
        scenario_with("at_the_kernels_limit", &[("MAX", &max.to_string())])
            .end(Duration::from_secs(150))
            .expect_success();
        scenario("reserved_mappings_are_there_while_merging_runs")
            .end(Duration::from_secs(400))
            .expect_success();
    }
}

fn at_the_kernels_limit() {
    let max = std::env::var("MAX").expect("the limit");
    at_a_limit_of_mappings(max.parse().expect("a number"));
}

/// A program's own mappings: neighbours with different permissions.
struct Mappings(Vec<usize>);

impl Mappings {
    /// Makes up to `count` of them; stops where the kernel does.
    fn take(&mut self, count: usize) -> usize {
        let before = self.0.len();
        while self.0.len() < before + count {
            let protection = self.0.len() & 1;
            let at = [0, page_size(), protection, PRIVATE as usize, os::NONE, 0];
            match os::call(libc::SYS_mmap, &at) {
                Ok(at) => self.0.push(at),
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(libc::ENOMEM), "{error}");
                    break;
                }
            }
        }
        self.0.len() - before
    }
}

impl Drop for Mappings {
    fn drop(&mut self) {
        for at in &self.0 {
            os::call(libc::SYS_munmap, &[*at, page_size()]).expect("our own mapping");
        }
    }
}

/// Merging counts mappings now and then; a program that makes its own meanwhile must find those that
/// are kept for it.
///
/// The program follows merging: it makes as many as merging has made since it last looked, until no more
/// are left than the reserve, or merging has met its budget. Nothing may be refused to it before, and
/// what it can make then must be half of the reserve, whoever was faster.
fn reserved_mappings_are_there_while_merging_runs() {
    const RESERVED: u64 = 6000;
    /// Views of frames and the like, which are not counted beforehand.
    const SLACK: u64 = 100;
    /// With so many mappings, merging meets any budget in some seconds.
    const ENOUGH: u64 = 65_530;
    let max: u64 = fs::read_to_string(MAX_MAP_COUNT)
        .expect("the limit can be read")
        .trim()
        .parse()
        .expect("a number");
    let reserved = RESERVED + max.saturating_sub(ENOUGH);
    let memory = Memory::new(120_000);
    fill_scattered(&memory);
    let engine = Engine::new(EngineSettings {
        // In steps, so that the program gets its turns.
        scan: Settings {
            pages_to_scan: 1000,
            sleep_millisecs: 1,
            ..settings().scan
        },
        reserved_mappings: Some(reserved),
        ..settings()
    })
    .expect("an engine");
    register(&engine, &memory);
    scan(&engine);
    let count = || os::map_count() as u64;
    let small = |figure: u64| usize::try_from(figure).expect("a figure of mappings");
    let met = || skipped(&engine.stats().expect("stats"), Reason::MappingBudget) > 0;
    let mut own = Mappings(Vec::with_capacity(small(2 * ENOUGH)));
    let (mut seen, mut short, mut still) = (count(), 0, 0);
    engine.start().expect("merging runs");
    loop {
        let now = count();
        let room = (max - reserved).saturating_sub(now + SLACK);
        let bite = small(now.saturating_sub(seen).min(room));
        still = if bite > 0 { 0 } else { still + 1 };
        // Asking makes merging count, so it is asked only when it seems to stand still.
        if room == 0 || still > 100 && met() {
            break;
        }
        short += bite - own.take(bite);
        seen = now + bite as u64;
        thread::sleep(Duration::from_millis(1));
    }
    let meanwhile = own.0.len();
    os::wait_for("merging to stand still", || {
        let before = count();
        thread::sleep(Duration::from_millis(100));
        count() == before
    });
    os::wait_for("merging to have used up its budget", met);
    let at_rest = os::map_count();
    let wanted = small((reserved / 2).min(ENOUGH));
    let got = own.take(wanted);
    let stats = engine.stats().expect("stats");
    println!(
        "figure: {meanwhile} mappings made while merging took {}, then at {at_rest} of {max} another \
         {got} of {wanted}, {:?}",
        at_rest - meanwhile,
        reasons(&stats)
    );
    // A failure cannot even be told while the table is full.
    drop(own);
    assert_eq!(short, 0, "refused to the program while merging ran");
    // What merging takes between two counts comes out of the reserve.
    assert_eq!(got, wanted, "of the {reserved} that were reserved");
    assert_scattered(&memory, "at the limit");
    engine.stop().expect("stopped");
    engine.close().expect("un-merged");
    assert_scattered(&memory, "un-merged");
}

/// A program that takes every mapping there is and gives them back, all the time, while merging runs and
/// while it un-merges.
fn mappings_used_up_all_the_time_lose_nothing() {
    let _stock = os::stock_up();
    let memory = Arc::new(Memory::new(20_000));
    fill_scattered(&memory);
    let engine = Engine::new(EngineSettings {
        reserved_mappings: Some(0),
        ..settings()
    })
    .expect("an engine");
    let stop = Arc::new(AtomicBool::new(false));
    let rounds = Arc::new(AtomicU32::new(0));
    let hungry = {
        let (stop, rounds) = (Arc::clone(&stop), Arc::clone(&rounds));
        thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let mut own = Mappings(Vec::with_capacity(70_000));
                own.take(70_000);
                for _ in 0..20 {
                    thread::sleep(Duration::from_millis(1));
                    own.take(70_000);
                }
                rounds.fetch_add(1, Ordering::Relaxed);
            }
        })
    };
    let begun = Instant::now();
    let (mut refused, mut unmerged) = (Vec::new(), 0);
    let mut region = register(&engine, &memory);
    let proves = |unmerged: u32| rounds.load(Ordering::Relaxed) > 3 && unmerged > 0;
    while begun.elapsed() < os::stress_time() || !proves(unmerged) {
        for _ in 0..2 {
            if let Err(error) = engine.scan(None, &mut || true) {
                refused.push(error.to_string());
            }
        }
        assert_scattered(&memory, "while mappings are used up");
        if let Err(error) = engine.unregister(region) {
            refused.push(error.to_string());
            continue;
        }
        unmerged += 1;
        assert_scattered(&memory, "un-merged while mappings are used up");
        region = loop {
            match try_register(&engine, memory.addr(), memory.len(), "") {
                Ok(region) => break region,
                Err(error) => refused.push(error.to_string()),
            }
            assert!(refused.len() < 100_000, "{refused:?}");
        };
    }
    stop.store(true, Ordering::Relaxed);
    hungry.join().expect("it takes what it gets");
    refused.sort();
    refused.dedup();
    println!("figure: {rounds:?} times used up, {unmerged} times un-merged, refused: {refused:?}");
    let stats = merge(&engine);
    assert!(
        merged_pages(&memory) > 9000,
        "it goes on: {:?}",
        reasons(&stats)
    );
    engine.close().expect("un-merged");
    assert_scattered(&memory, "after all");
}

/// With not one mapping left, un-merging in each of its forms works, or says why not.
fn unmerging_needs_no_mapping() {
    for how in ["unregister", "run", "close", "drop", "forget", "discard"] {
        scenario_with("unmerging_at_a_full_table", &[("HOW", how)])
            .end(Duration::from_secs(150))
            .expect_success();
    }
}

fn unmerging_at_a_full_table() {
    let _stock = os::stock_up();
    let how = std::env::var("HOW").expect("the way");
    let memory = Memory::new(2000);
    fill_scattered(&memory);
    let engine = engine(Remerge::Quiet);
    let region = register(&engine, &memory);
    merge(&engine);
    assert_eq!(merged_pages(&memory), 1000);
    let mut own = Mappings(Vec::with_capacity(70_000));
    own.take(70_000);
    assert_eq!(own.take(1), 0, "the table is full");
    let told = match how.as_str() {
        "unregister" => engine.unregister(region),
        "run" => engine.set_run(RunMode::Unmerge),
        "close" => engine.close(),
        "forget" => engine.forget(region),
        "discard" => engine.discard(memory.addr(), memory.len()),
        _ => {
            drop(engine);
            drop(own);
            assert_scattered(&memory, "dropped at a full table");
            assert_eq!(merged_pages(&memory), 0);
            println!("figure: drop at a full table: un-merged");
            return;
        }
    };

    let gives_up = how == "forget" || how == "discard";
    if !gives_up {
        assert_scattered(&memory, "un-merged at a full table");
    }
    // Giving up needs fresh mappings in the place of frames: that may be refused, and then some of it
    // has been given up and the rest reads as before.
    let refused = matches!(&told, Err(Error::Os { source, .. })
        if source.raw_os_error() == Some(libc::ENOMEM));
    assert!(told.is_ok() || gives_up && refused, "{how}: {told:?}");
    if gives_up && told.is_err() {
        for page in 0..memory.pages() {
            let right = memory.shows(page, scattered(page)) || memory.shows(page, 0);
            assert!(right, "page {page} reads as nobody wrote it");
        }
        drop(own);
        engine
            .discard(memory.addr(), memory.len())
            .expect("there is room again");
        (0..memory.pages()).for_each(|page| memory.assert_shows(page, 0, "given up"));
        return;
    }
    if gives_up {
        (0..memory.pages()).for_each(|page| memory.assert_shows(page, 0, "given up"));
    }
    drop(own);
    assert_eq!(merged_pages(&memory), 0);
    if gives_up {
        fill_scattered(&memory);
    }
    if how == "close" {
        return;
    }
    if how == "run" {
        engine.set_run(RunMode::Stop).expect("there is room again");
    }
    if how == "unregister" || how == "forget" {
        register(&engine, &memory);
    }
    let stats = merge(&engine);
    assert_eq!(
        merged_pages(&memory),
        1000,
        "it goes on: {:?}",
        reasons(&stats)
    );
    assert_scattered(&memory, "merged again");
    engine.close().expect("un-merged");
    assert_scattered(&memory, "un-merged");
    let left = os::mappings_of(&memory)
        .iter()
        .filter(|vma| in_frames(vma))
        .count();
    assert_eq!(left, 0, "mappings come back");
}

// -------------------------------------------------------------------- limits of the process

/// Runs a life of an engine, with `limit` set in the middle, and lifted again.
fn through_a_limit(name: &str, resource: u32, low: impl Fn() -> u64) {
    const PAGES: usize = 6000;
    let _stock = os::stock_up();
    let memory = Memory::new(PAGES);
    fill_scattered(&memory);
    let engine = engine(Remerge::Quiet);
    let region = register(&engine, &memory);
    scan(&engine);
    engine
        .scan(Some(500), &mut || true)
        .expect("a part of a pass");
    os::limit(resource, low());
    let mut told = Vec::new();
    for _ in 0..3 {
        match engine.scan(None, &mut || true) {
            Ok(stats) => told.push(format!("{:?}", reasons(&stats))),
            Err(error) => told.push(error.to_string()),
        }
    }
    assert_scattered(&memory, "at the limit");
    // Others can be made, or refused in words.
    match Engine::new(settings()) {
        Ok(other) => other.close().expect("closed"),
        Err(error) => told.push(format!("another engine: {error}")),
    }
    let more = Memory::with(64, RW, PRIVATE, -1, 0);
    if let Ok(more) = &more {
        fill(more, CONTENTS);
        match try_register(&engine, more.addr(), more.len(), "") {
            Ok(region) => {
                let _ = engine.scan(None, &mut || true);
                engine.unregister(region).expect("un-merged at the limit");
            }
            Err(error) => told.push(format!("another region: {error}")),
        }
        assert_filled(more, CONTENTS, "at the limit");
    }
    let parted = engine.unregister(region);
    assert_scattered(&memory, "un-merged at the limit");
    os::limit(resource, libc::RLIM_INFINITY);
    println!("figure: {name}: un-merged at the limit: {parted:?}, {told:?}");
    assert!(parted.is_ok(), "{parted:?}");
    assert_eq!(merged_pages(&memory), 0);
    register(&engine, &memory);
    let stats = merge(&engine);
    assert_eq!(
        merged_pages(&memory),
        PAGES / 2,
        "it goes on: {:?}",
        reasons(&stats)
    );
    engine.close().expect("un-merged");
    assert_scattered(&memory, "un-merged");
}

fn address_space_limit() {
    through_a_limit("RLIMIT_AS, 0 left", libc::RLIMIT_AS, || {
        os::status("VmSize") << 10
    });
}

fn address_space_limit_with_a_little_left() {
    through_a_limit("RLIMIT_AS, 3 MiB left", libc::RLIMIT_AS, || {
        (os::status("VmSize") << 10) + (3 << 20)
    });
}

fn data_limit() {
    through_a_limit("RLIMIT_DATA, 0 left", libc::RLIMIT_DATA, || {
        os::status("VmData") << 10
    });
}

fn locked_memory_limit() {
    through_a_limit("RLIMIT_MEMLOCK, 0", libc::RLIMIT_MEMLOCK, || 0);
}

/// All mappings to come are locked, and locked memory is limited.
fn locked_memory_limit_with_everything_to_come_locked() {
    let _stock = os::stock_up();
    // Root may lock what it likes.
    os::drop_capability(os::CAP_IPC_LOCK);
    let memory = Memory::new(2000);
    fill_scattered(&memory);
    let engine = engine(Remerge::Quiet);
    let region = register(&engine, &memory);
    scan(&engine);
    os::limit(libc::RLIMIT_MEMLOCK, 4 << 20);
    let future = libc::MCL_FUTURE as usize;
    let locked = os::call(libc::SYS_mlockall, &[future]);
    let stats = merge(&engine);
    assert_scattered(&memory, "with everything to come locked");
    println!(
        "figure: MCL_FUTURE {locked:?} with 4 MiB of lockable memory: {} merged, {:?}",
        merged_pages(&memory),
        reasons(&stats)
    );
    let parted = engine.unregister(region);
    assert_scattered(&memory, "un-merged with everything to come locked");
    assert!(parted.is_ok(), "{parted:?}");
    os::call(libc::SYS_munlockall, &[]).expect("unlocked");
    register(&engine, &memory);
    let stats = merge(&engine);
    assert_eq!(
        merged_pages(&memory),
        1000,
        "it goes on: {:?}",
        reasons(&stats)
    );
    engine.close().expect("un-merged");
    assert_scattered(&memory, "un-merged");
}

fn descriptor_limit() {
    through_a_limit("RLIMIT_NOFILE, 0", libc::RLIMIT_NOFILE, || 0);
}

fn file_size_limit() {
    through_a_limit("RLIMIT_FSIZE, 64 KiB", libc::RLIMIT_FSIZE, || 64 << 10);
}

/// No thread can be started: neither the merging thread, nor the helper, nor those that hash.
fn no_thread_can_be_started() {
    let group = os::ThreadGroup::new("threads");
    let inside = scenario_with("without_threads", &[("GROUP", group.path())]);
    inside.end(Duration::from_secs(150)).expect_success();
}

fn without_threads() {
    let path = std::env::var("GROUP").expect("the group");
    let memory = Memory::new(2048);
    fill(&memory, CONTENTS);
    let limit = format!("{path}/pids.max");
    fs::write(format!("{path}/cgroup.procs"), "0").expect("entering the group");
    fs::write(&limit, "1").expect("no thread but this");
    match Engine::new(settings()) {
        Err(Error::Os { attempted, source }) => {
            println!("figure: {attempted}: {source}");
            assert_eq!(source.raw_os_error(), Some(libc::EAGAIN));
        }
        other => panic!("{other:?}"),
    }
    // The merging thread, and no other.
    fs::write(&limit, "2").expect("one more");
    let engine = Engine::new(EngineSettings {
        threads: 4,
        ..settings()
    })
    .expect("the limit has been lifted");
    let region = register(&engine, &memory);
    let stats = merge(&engine);
    assert_filled(&memory, CONTENTS, "merged without helpers");
    assert_eq!(merged_pages(&memory), 2048, "{:?}", reasons(&stats));
    // Written pages need a helper, and un-merging does without.
    (0..100).for_each(|page| memory.fill(page, support::engines::content(page, CONTENTS)));
    let stats = merge(&engine);
    println!(
        "figure: written pages without a helper: {:?}",
        reasons(&stats)
    );
    engine
        .unregister(region)
        .expect("un-merged without a helper");
    assert_filled(&memory, CONTENTS, "un-merged without a helper");
    assert_eq!(merged_pages(&memory), 0);
    fs::write(&limit, "max").expect("as many as it likes");
    register(&engine, &memory);
    let stats = merge(&engine);
    assert_eq!(
        merged_pages(&memory),
        2048,
        "it goes on: {:?}",
        reasons(&stats)
    );
    engine.close().expect("un-merged");
    assert_filled(&memory, CONTENTS, "un-merged");
}

// -------------------------------------------------------------------- memory groups

/// 64 MiB of duplicates in a group that has not room for their copies any more: every way of un-merging
/// refuses with the figures before it gives anything up, nobody is killed, nobody even meets the limit;
/// and all goes on when the limit is raised.
fn unmerging_refuses_before_a_memory_limit() {
    for how in ["unregister", "run", "close", "drop"] {
        in_a_group("refuse", "unmerging_short_of_memory", how);
    }
}

const MERGED: usize = 16 << 10;

/// Runs a scenario in a memory group of 256 MiB, where nobody may be killed.
fn in_a_group(name: &str, inside: &str, how: &str) {
    let group = os::Group::new(name, 256 << 20);
    scenario_with(inside, &[("GROUP", group.path()), ("HOW", how)])
        .end(Duration::from_secs(150))
        .expect_success();
    assert_eq!(group.misery().0, 0, "the OOM killer was there");
}

/// 64 MiB of duplicates, merged in the group that a scenario has been given.
fn merged_in_the_group() -> (Memory, Engine, pagemerge_linux::RegionHandle, String) {
    let path = std::env::var("GROUP").expect("the group");
    os::enter_group(&path);
    let memory = Memory::new(MERGED);
    fill(&memory, CONTENTS);
    let engine = engine(Remerge::Quiet);
    let region = register(&engine, &memory);
    merge(&engine);
    assert_eq!(merged_pages(&memory), MERGED);
    (memory, engine, region, path)
}

fn assert_unmerged(memory: &Memory) {
    assert_filled(memory, CONTENTS, "un-merged");
    assert_eq!(merged_pages(memory), 0);
}

/// Takes the group's limit down to 8 MiB above what is used.
fn short_of_memory() -> (Memory, Engine, pagemerge_linux::RegionHandle, String) {
    let (memory, engine, region, path) = merged_in_the_group();
    let used: u64 = fs::read_to_string(format!("{path}/memory.usage_in_bytes"))
        .expect("the group's figure")
        .trim()
        .parse()
        .expect("a number");
    fs::write(
        format!("{path}/memory.limit_in_bytes"),
        (used + (8 << 20)).to_string(),
    )
    .expect("a lower limit");
    fs::write(format!("{path}/memory.failcnt"), "0").expect("counting anew");
    (memory, engine, region, path)
}

fn failures(path: &str) -> u64 {
    let text = fs::read_to_string(format!("{path}/memory.failcnt")).expect("the group's figure");
    text.trim().parse().expect("a number")
}

fn unmerging_short_of_memory() {
    let how = std::env::var("HOW").expect("the way");
    let (memory, engine, region, path) = short_of_memory();
    let raise = || fs::write(format!("{path}/memory.limit_in_bytes"), "1G").expect("a limit");
    let go = |engine: &Engine| match how.as_str() {
        "unregister" => engine.unregister(region),
        "run" => engine.set_run(RunMode::Unmerge),
        _ => engine.close(),
    };
    engine.start().expect("merging runs on");
    let refused = |when: &str| {
        assert_eq!(merged_pages(&memory), MERGED, "nothing was given up");
        assert_eq!(failures(&path), 0, "the limit was met");
        assert_filled(&memory, CONTENTS, when);
    };
    if how == "drop" {
        // Nobody is left to be told: it stays merged, and reads right.
        drop(engine);
        return refused("dropped");
    }
    match go(&engine) {
        Err(error @ Error::UnmergeMemory { .. }) => {
            println!("figure: {how}: {error}");
            let Error::UnmergeMemory {
                pages,
                needed,
                available,
                ..
            } = error
            else {
                unreachable!("just matched")
            };
            assert_eq!(pages, MERGED as u64);
            assert!(
                needed >= 64 << 20 && available <= 9 << 20,
                "{needed} {available}"
            );
        }
        other => panic!("{other:?}"),
    }
    refused("refused");
    raise();
    let right = if how == "run" {
        RunMode::Stop
    } else {
        RunMode::Merge
    };
    assert_eq!(engine.run().expect("it is open"), right);
    engine.region_stats(region).expect("it stays registered");
    // A page that is written now is merged again, if merging still runs.
    if how != "run" {
        memory.store(7, 9, 1);
        memory.store(7, 9, os::word_of(support::engines::content(7, CONTENTS), 9));
        os::wait_for("a page to be merged again", || {
            merged_pages(&memory) == MERGED
        });
    }
    go(&engine).expect("there is memory again");
    assert_unmerged(&memory);
}

/// A group that has read files is full of what the kernel can drop: that is room.
fn file_cache_is_room_to_unmerge() {
    in_a_group("cache", "unmerging_among_file_cache", "");
}

fn unmerging_among_file_cache() {
    let (memory, engine, region, path) = merged_in_the_group();
    // 300 MiB of clean cache would fit only by dropping some of it again.
    let file = os::temporary("cache");
    let mut open = fs::File::create(&file).expect("a file");
    let bytes = vec![7; 1 << 20];
    for _ in 0..300 {
        open.write_all(&bytes).expect("room on the disk");
    }
    open.sync_all().expect("written back");
    let stat = fs::read_to_string(format!("{path}/memory.stat")).expect("figures");
    stat.lines()
        .filter(|line| line.starts_with("total_") && line.contains("file"))
        .for_each(|line| println!("figure: {line}"));
    let used = fs::read_to_string(format!("{path}/memory.usage_in_bytes")).expect("a figure");
    println!(
        "figure: the group uses {} of {} bytes",
        used.trim(),
        256 << 20
    );
    let told = engine.unregister(region);
    fs::remove_file(&file).expect("our file");
    told.expect("file cache makes room");
    assert_unmerged(&memory);
}

/// Frames are charged to the group, too: at its limit merging stops by name, and goes on later.
fn frames_that_do_not_fit_a_group_are_refused_by_name() {
    in_a_group("frames", "merging_short_of_memory", "");
}

fn merging_short_of_memory() {
    let path = std::env::var("GROUP").expect("the group");
    os::enter_group(&path);
    let memory = Memory::new(8192);
    // Pairs: each takes a frame before it gives a page back.
    let content = |page: usize| 1 + (page / 2) as u64;
    (0..8192).for_each(|page| memory.fill(page, content(page)));
    let engine = engine(Remerge::Quiet);
    register(&engine, &memory);
    scan(&engine);
    let used = fs::read_to_string(format!("{path}/memory.usage_in_bytes")).expect("a figure");
    let used: u64 = used.trim().parse().expect("a number");
    let limit = format!("{path}/memory.limit_in_bytes");
    fs::write(&limit, (used + (2 << 20)).to_string()).expect("a lower limit");
    let stats = scan(&engine);
    println!(
        "figure: 2 MiB below the limit: {} merged, {:?}",
        stats.core.pages_merged,
        reasons(&stats)
    );
    (0..8192).for_each(|page| memory.assert_shows(page, content(page), "at the limit"));
    let no_room = skipped(&stats, Reason::NoMemory) + skipped(&stats, Reason::FramesFull);
    assert!(
        no_room > 0 || stats.core.pages_sharing > 4000,
        "{:?}",
        reasons(&stats)
    );
    fs::write(&limit, "1G").expect("a limit");
    let stats = merge(&engine);
    assert_eq!(
        stats.core.pages_sharing,
        4096,
        "it goes on: {:?}",
        reasons(&stats)
    );
    (0..8192).for_each(|page| memory.assert_shows(page, content(page), "merged"));
    engine.close().expect("un-merged");
}

/// `vm.overcommit_memory = 2` and nothing left to promise: merging and un-merging need no more of it
/// than they give back, or say so.
fn strict_overcommit_loses_nothing() {
    let lock = MachineLock::take();
    let _strict = MachineSetting::set(&lock, "/proc/sys/vm/overcommit_memory", "2");
    scenario("under_strict_overcommit")
        .end(Duration::from_secs(150))
        .expect_success();
}

fn under_strict_overcommit() {
    let _stock = os::stock_up();
    let figure = |name: &str| -> u64 {
        let text = fs::read_to_string("/proc/meminfo").expect("it can be read");
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let value = line.and_then(|rest| rest.trim_start_matches(':').trim().strip_suffix(" kB"));
        value
            .and_then(|text| text.trim().parse::<u64>().ok())
            .expect("a figure")
            << 10
    };
    let memory = Memory::new(6000);
    fill_scattered(&memory);
    let engine = engine(Remerge::Quiet);
    let region = register(&engine, &memory);
    scan(&engine);
    engine
        .scan(Some(500), &mut || true)
        .expect("a part of a pass");
    // Promise all that is left, in smaller and smaller pieces.
    let mut taken = Vec::new();
    let mut bytes = 1 << 34;
    while bytes >= 64 << 10 {
        match Memory::with(bytes / page_size(), RW, PRIVATE, -1, 0) {
            Ok(memory) => taken.push(memory),
            Err(_) => bytes /= 2,
        }
    }
    println!(
        "figure: {} of {} bytes promised",
        figure("Committed_AS"),
        figure("CommitLimit")
    );
    let stats = engine.scan(None, &mut || true).map(|stats| reasons(&stats));
    assert_scattered(&memory, "with nothing left to promise");
    let parted = engine.unregister(region);
    println!("figure: nothing left to promise: {stats:?}, un-merging {parted:?}");
    assert_scattered(&memory, "un-merged with nothing left to promise");
    drop(taken);
    if parted.is_ok() {
        register(&engine, &memory);
    }
    let stats: EngineStats = merge(&engine);
    assert_eq!(
        merged_pages(&memory),
        3000,
        "it goes on: {:?}",
        reasons(&stats)
    );
    engine.close().expect("un-merged");
    assert_scattered(&memory, "un-merged");
}

fn main() -> ExitCode {
    support::run(vec![
        case!(sparse_memory_costs_by_the_pages_that_are_there),
        case!(lone_pages_cost_little),
        case!(regions_beyond_the_page_numbers_are_refused_by_name),
        case!(regions_by_the_ten_thousand).seconds(400),
        case!(any_limit_of_mappings_is_kept)
            .seconds(400)
            .needs(Need::Root),
        case!(under_a_limit_of_mappings).hidden(),
        case!(limits_of_the_whole_machine_are_kept)
            .seconds(1200)
            .needs(Need::WholeMachine),
        case!(at_the_kernels_limit).hidden(),
        case!(reserved_mappings_are_there_while_merging_runs).seconds(400),
        case!(mappings_used_up_all_the_time_lose_nothing).seconds(300),
        case!(unmerging_needs_no_mapping).seconds(400),
        case!(unmerging_at_a_full_table).hidden(),
        case!(address_space_limit),
        case!(address_space_limit_with_a_little_left),
        case!(data_limit),
        case!(locked_memory_limit),
        case!(locked_memory_limit_with_everything_to_come_locked).needs(Need::Root),
        case!(descriptor_limit),
        case!(file_size_limit),
        case!(no_thread_can_be_started).needs(Need::ThreadGroup),
        case!(without_threads).hidden(),
        case!(unmerging_refuses_before_a_memory_limit)
            .seconds(400)
            .needs(Need::MemoryGroup),
        case!(unmerging_short_of_memory).hidden(),
        case!(file_cache_is_room_to_unmerge)
            .seconds(400)
            .needs(Need::MemoryGroup),
        case!(unmerging_among_file_cache).hidden(),
        case!(frames_that_do_not_fit_a_group_are_refused_by_name).needs(Need::MemoryGroup),
        case!(merging_short_of_memory).hidden(),
        case!(strict_overcommit_loses_nothing).needs(Need::WholeMachine),
        case!(under_strict_overcommit).hidden(),
    ])
}
