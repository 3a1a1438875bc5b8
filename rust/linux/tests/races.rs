//! The stress that the whole crate is for: a merge is invisible.
//!
//! One region of pages that are equal again and again; a background engine that merges them, un-merges
//! them and merges them again; and everything that writes to memory at the same time, each writer
//! with an oracle of its own:
//!
//! | worker | writes by |
//! |---|---|
//! | `adder` (two) | atomic additions |
//! | `border` | `memcpy` over page borders |
//! | `zeroes` | `read(2)` from `/dev/zero` |
//! | `pipe` | `read(2)` from a pipe |
//! | `socket` | `recv(2)` |
//! | `vectors` | `readv(2)` to two pages |
//! | `remote` | `process_vm_writev(2)` |
//! | `debugger` | `pwrite` to `/proc/self/mem`, which says EIO in a window (findings, section 2) |
//! | `splicer` | nothing: gives pages to a pipe, and compares what comes out |
//! | `device` | `O_DIRECT` reads from a file |
//! | `forker` | nothing: its children compare what they see |
//!
//! Every worker owns words of every page, so a byte that changes otherwise than by its owner's hand
//! is lost or foreign, and noticed at the worker's next visit. A worker leaves its words as they
//! were before, after a short while, so that pages become equal to their twins again.
//!
//! A run without merges, broken pages and windows fails: it would have proved nothing.
//! `PAGEMERGE_STRESS_SECONDS` makes it longer, `PAGEMERGE_SEED` repeats its choices (not its timing).

mod support;

use pagemerge_linux::core::RunMode;
use pagemerge_linux::{Engine, EngineSettings, Remerge};
use std::fs;
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use support::engines::{reasons, register, settings};
use support::os::{self, Memory, Random, page_size};
use support::{Need, case};

const PAGES: usize = 1024;
/// Different contents: each page has many twins.
const CONTENTS: usize = 16;
/// Pages that a worker has changed at any time, at most.
const AWAY: usize = 6;
/// The first 8 words and the last 8 are for copies over page borders.
const BORDER_WORDS: usize = 8;
/// Words of the sector that a device writes to.
const SECTOR: (usize, usize) = (256, 64);

/// What pages hold at rest.
#[derive(Clone, Copy)]
enum Rest {
    /// Each the same as many others.
    Equal,
    /// Every second one nothing but zeroes, the others each its own: so zero pages go through windows in
    /// stretches, with the others between.
    ZeroBetween,
}

impl Rest {
    /// The number of a page's content.
    fn content(self, page: usize) -> u64 {
        match self {
            Self::Equal => (page % CONTENTS + 1) as u64,
            Self::ZeroBetween if page.is_multiple_of(2) => 0,
            Self::ZeroBetween => (page + 1) as u64,
        }
    }
}

/// Contents that no page has at rest.
const OTHERS: std::ops::RangeInclusive<u64> = PAGES as u64 + 1..=PAGES as u64 + 4;

/// What the whole stress shares.
struct World {
    memory: Memory,
    rest: Rest,
    stop: AtomicBool,
    /// Visits by all workers.
    visits: AtomicU64,
    /// Answers of EIO to the debugger.
    retries: AtomicU64,
    /// Reads that took longer than the quiet time, which are beyond the promise.
    late: AtomicU64,
}

impl World {
    /// What a page holds at rest.
    fn at_rest(&self, page: usize, index: usize) -> u64 {
        os::word_of(self.rest.content(page), index)
    }

    fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn expect(&self, who: &str, page: usize, index: usize, right: u64) {
        let seen = self.memory.load(page, index);
        assert!(
            seen == right,
            "{who}: page {page} word {index} is {seen:#x}, not {right:#x} (at rest {:#x}); {}",
            self.at_rest(page, index),
            os::describe(self.memory.at(page))
        );
    }

    /// The life of a worker that owns word `index` of every page: takes a few pages away from their
    /// contents by `write` (page, value), looks whether they stay so, and brings them back.
    fn work(&self, who: &str, index: usize, seed: u64, mut write: impl FnMut(&Self, usize, u64)) {
        let mut random = Random::new(seed ^ (index as u64) << 32);
        let mut away: Vec<(usize, u64)> = Vec::new();
        let mut number = 0;
        while !self.is_over() {
            let page = random.below(PAGES);
            if away.iter().any(|(gone, _)| *gone == page) {
                continue;
            }
            number += 1;
            self.expect(who, page, index, self.at_rest(page, index));
            let value = number << 8 | index as u64;
            write(self, page, value);
            self.expect(who, page, index, value);
            away.push((page, value));
            if away.len() >= AWAY {
                let (page, value) = away.remove(0);
                self.expect(who, page, index, value);
                write(self, page, self.at_rest(page, index));
                self.expect(who, page, index, self.at_rest(page, index));
            }
            self.visits.fetch_add(1, Ordering::Relaxed);
            thread::sleep(Duration::from_micros(random.next() % 600));
        }
        for (page, value) in away {
            self.expect(who, page, index, value);
            write(self, page, self.at_rest(page, index));
        }
        for page in 0..PAGES {
            self.expect(who, page, index, self.at_rest(page, index));
        }
    }

    fn address(&self, page: usize, index: usize) -> usize {
        self.memory.at(page) + index * 8
    }
}

fn adder(world: &World, index: usize, seed: u64) {
    world.work("adder", index, seed, |world, page, value| {
        // By as many additions as it takes; every one must be there.
        let counter = world.memory.word(page, index);
        let before = counter.load(Ordering::Relaxed);
        let steps = 5;
        let step = value.wrapping_sub(before) / steps;
        for number in 0..steps {
            let got = counter.fetch_add(step, Ordering::Relaxed);
            assert_eq!(
                got,
                before.wrapping_add(step.wrapping_mul(number)),
                "an addition is lost"
            );
        }
        let rest = value.wrapping_sub(before.wrapping_add(step.wrapping_mul(steps)));
        counter.fetch_add(rest, Ordering::Relaxed);
    });
}

fn border(world: &World, seed: u64) {
    let mut random = Random::new(seed ^ 0xb0);
    let bytes = BORDER_WORDS * 16;
    let offset = |page: usize| (page + 1) * page_size() - BORDER_WORDS * 8;
    let rest = |page: usize| -> Vec<u8> {
        let last = (512 - BORDER_WORDS..512).map(|index| world.at_rest(page, index));
        let first = (0..BORDER_WORDS).map(|index| world.at_rest(page + 1, index));
        last.chain(first).flat_map(u64::to_ne_bytes).collect()
    };
    let mut back = vec![0; bytes];
    while !world.is_over() {
        let page = random.below(PAGES - 1);
        let value: Vec<u8> = (0..bytes).map(|_| random.next().to_ne_bytes()[0]).collect();
        for (bytes, pause) in [(&value, 300), (&rest(page), 0)] {
            world.memory.copy_in(offset(page), bytes);
            thread::sleep(Duration::from_micros(pause));
            world.memory.copy_out(offset(page), &mut back);
            assert!(
                back == *bytes,
                "a copy over the border of page {page} is lost"
            );
        }
        world.visits.fetch_add(1, Ordering::Relaxed);
        thread::sleep(Duration::from_micros(random.next() % 600));
    }
}

fn zeroes(world: &World, index: usize, seed: u64) {
    let zero = fs::File::open("/dev/zero").expect("/dev/zero");
    world.work("zeroes", index, seed, |world, page, value| {
        let got = os::read_to(zero.as_raw_fd(), world.address(page, index), 8);
        assert_eq!(got.expect("read never says EFAULT"), 8);
        world.expect("zeroes", page, index, 0);
        world.memory.store(page, index, value);
    });
}

fn pipe(world: &World, index: usize, seed: u64) {
    let (read, write) = os::pipe();
    world.work("pipe", index, seed, |world, page, value| {
        os::write_from(write.as_raw_fd(), (&raw const value).addr(), 8).expect("room in the pipe");
        let got = os::read_to(read.as_raw_fd(), world.address(page, index), 8);
        assert_eq!(got.expect("read never says EFAULT"), 8);
    });
}

fn socket(world: &World, index: usize, seed: u64) {
    let (read, write) = os::socket_pair();
    world.work("socket", index, seed, |world, page, value| {
        os::write_from(write.as_raw_fd(), (&raw const value).addr(), 8)
            .expect("room in the socket");
        let got = os::receive(read.as_raw_fd(), world.address(page, index), 8);
        assert_eq!(got.expect("recv never says EFAULT"), 8);
    });
}

/// Owns two words; reads both at once, the second in the next page but one.
fn vectors(world: &World, index: usize, seed: u64) {
    let (read, write) = os::pipe();
    let second = |page: usize| (page + 2) % PAGES;
    world.work("vectors", index, seed, |world, page, value| {
        let other = world.at_rest(second(page), index + 1);
        let values = [value, other ^ value];
        os::write_from(write.as_raw_fd(), values.as_ptr().addr(), 16).expect("room in the pipe");
        let places = [
            (world.address(page, index), 8),
            (world.address(second(page), index + 1), 8),
        ];
        assert_eq!(
            os::read_to_both(read.as_raw_fd(), places).expect("never EFAULT"),
            16
        );
        world.expect("vectors", second(page), index + 1, other ^ value);
        world.memory.store(second(page), index + 1, other);
    });
}

fn remote(world: &World, index: usize, seed: u64) {
    world.work("remote", index, seed, |world, page, value| {
        let got = os::write_own_memory(&value.to_ne_bytes(), world.address(page, index));
        assert_eq!(got.expect("process_vm_writev never says EFAULT"), 8);
    });
}

fn debugger(world: &World, index: usize, seed: u64) {
    use std::os::unix::fs::FileExt;
    let file = fs::File::options()
        .write(true)
        .open("/proc/self/mem")
        .expect("our own memory");
    world.work("debugger", index, seed, |world, page, value| {
        let at = world.address(page, index) as u64;
        while let Err(error) = file.write_all_at(&value.to_ne_bytes(), at) {
            assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
            world.retries.fetch_add(1, Ordering::Relaxed);
        }
    });
}

fn splicer(world: &World, index: usize, seed: u64) {
    let (read, write) = os::pipe();
    world.work("splicer", index, seed, |world, page, value| {
        world.memory.store(page, index, value);
        let got = os::splice_page(write.as_raw_fd(), world.address(page, index), 8);
        assert_eq!(got.expect("vmsplice never says EFAULT"), 8);
        thread::sleep(Duration::from_micros(200));
        let mut back = 0_u64;
        os::read_to(read.as_raw_fd(), (&raw mut back).addr(), 8).expect("the pipe");
        assert_eq!(back, value, "the pipe delivers other bytes");
    });
}

/// Reads sectors straight into memory: the file holds what each page does at rest, then four others.
fn device(world: &World, file: &fs::File, quiet: Duration, seed: u64) {
    let mut random = Random::new(seed ^ 0xde);
    let (first, words) = SECTOR;
    while !world.is_over() {
        let page = random.below(PAGES);
        let other = random.below(4);
        for (which, content) in [
            (PAGES + other, OTHERS.start() + other as u64),
            (page, world.rest.content(page)),
        ] {
            let right = |index| os::word_of(content, index);
            let offset = (which * page_size() + first * 8) as u64;
            let begun = Instant::now();
            let got = os::read_at(
                file.as_raw_fd(),
                world.address(page, first),
                words * 8,
                offset,
            );
            let took = begun.elapsed();
            assert_eq!(got.expect("O_DIRECT never says EFAULT"), words * 8);
            if took >= quiet {
                // Beyond the promise (quiet time must exceed the longest I/O): put it right.
                world.late.fetch_add(1, Ordering::Relaxed);
                for index in first..first + words {
                    world.memory.store(page, index, right(index));
                }
            }
            for index in first..first + words {
                world.expect("device", page, index, right(index));
            }
            thread::sleep(Duration::from_micros(random.next() % 3000));
        }
        world.visits.fetch_add(1, Ordering::Relaxed);
    }
}

/// Forks; the child must see this worker's words as they were at the fork.
fn forker(world: &World, index: usize, seed: u64) {
    let mut random = Random::new(seed ^ 0xf0);
    let mut values: Vec<u64> = (0..PAGES).map(|page| world.at_rest(page, index)).collect();
    while !world.is_over() {
        for _ in 0..4 {
            let page = random.below(PAGES);
            values[page] = random.next();
            world.memory.store(page, index, values[page]);
        }
        let child = os::fork(|| {
            let untouched = |page: usize| {
                (440..480).all(|i| world.memory.load(page, i) == world.at_rest(page, i))
            };
            let wrong = (0..PAGES)
                .find(|page| world.memory.load(*page, index) != values[*page] || !untouched(*page));
            thread::sleep(Duration::from_millis(2));
            let later = (0..PAGES)
                .find(|page| world.memory.load(*page, index) != values[*page] || !untouched(*page));
            i32::from(wrong.is_some()) | i32::from(later.is_some()) << 1
        });
        assert_eq!(
            child.wait(),
            0,
            "a forked child saw other bytes (1: at once, 2: later)"
        );
        for (page, value) in values.iter_mut().enumerate() {
            world.expect("forker", page, index, *value);
            if *value != world.at_rest(page, index) {
                *value = world.at_rest(page, index);
                world.memory.store(page, index, *value);
            }
        }
        world.visits.fetch_add(1, Ordering::Relaxed);
        thread::sleep(Duration::from_millis(60 + random.next() % 60));
    }
}

fn spawn(
    world: &Arc<World>,
    name: &str,
    body: impl FnOnce(&World) + Send + 'static,
) -> (String, JoinHandle<()>) {
    let mine = Arc::clone(world);
    let guarded = move || {
        // A worker that fails ends the stress, so that its message comes first.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| body(&mine)));
        if let Err(panic) = result {
            mine.stop.store(true, Ordering::Relaxed);
            std::panic::resume_unwind(panic);
        }
    };
    let handle = thread::Builder::new()
        .name(name.into())
        .spawn(guarded)
        .expect("a thread");
    (name.into(), handle)
}

/// A worker, by name.
type Part = (&'static str, Box<dyn FnOnce(&World) + Send>);

/// Which workers take part.
#[derive(Clone, Copy)]
struct Cast {
    device: bool,
    forker: bool,
}

fn workers_of(
    rest: Rest,
    cast: Cast,
    (remerge, quiet_millisecs): (Remerge, u32),
    seed: u64,
) -> Vec<Part> {
    let mut parts: Vec<Part> = vec![
        ("adder", Box::new(move |w| adder(w, 16, seed))),
        ("adder", Box::new(move |w| adder(w, 17, seed))),
        ("border", Box::new(move |w| border(w, seed))),
        ("zeroes", Box::new(move |w| zeroes(w, 20, seed))),
        ("pipe", Box::new(move |w| pipe(w, 21, seed))),
        ("socket", Box::new(move |w| socket(w, 22, seed))),
        ("vectors", Box::new(move |w| vectors(w, 24, seed))),
        ("remote", Box::new(move |w| remote(w, 26, seed))),
        ("debugger", Box::new(move |w| debugger(w, 27, seed))),
        ("splicer", Box::new(move |w| splicer(w, 28, seed))),
    ];
    if cast.device {
        let contents: Vec<u64> = (0..PAGES)
            .map(|page| rest.content(page))
            .chain(OTHERS)
            .collect();
        let file = os::direct_file(&contents).expect("O_DIRECT, looked at before");
        let quiet = Duration::from_millis(quiet_millisecs.into());
        let quiet = if remerge == Remerge::Quiet {
            quiet
        } else {
            Duration::from_secs(3600)
        };
        parts.push(("device", Box::new(move |w| device(w, &file, quiet, seed))));
    }
    if cast.forker {
        parts.push(("forker", Box::new(move |w| forker(w, 30, seed))));
    }
    parts
}

/// What a test pretends must be so, or it is another test than it says.
fn check_what_is_pretended() {
    let pretended = std::env::var("PAGEMERGE_PRETEND").unwrap_or_default();
    let can = pagemerge_linux::capabilities();
    assert!(
        !pretended.contains("no-move") || !can.move_pages,
        "pages can be moved"
    );
    assert!(
        !pretended.contains("no-wp-async") || !can.write_tracking,
        "writes are tracked"
    );
}

fn stress(rest: Rest, remerge: Remerge, quiet_millisecs: u32, cast: Cast) {
    let seed = os::seed();
    println!("figure: seed {seed}");
    let world = Arc::new(World {
        memory: Memory::new(PAGES),
        rest,
        stop: AtomicBool::new(false),
        visits: AtomicU64::new(0),
        retries: AtomicU64::new(0),
        late: AtomicU64::new(0),
    });
    for page in 0..PAGES {
        world.memory.fill(page, rest.content(page));
    }
    let mut chosen = settings();
    chosen.scan.use_zero_pages = matches!(rest, Rest::ZeroBetween);
    let engine = Engine::new(EngineSettings {
        remerge,
        quiet_millisecs,
        ..chosen
    })
    .expect("an engine");
    check_what_is_pretended();
    let region = register(&engine, &world.memory);
    engine.start().expect("a barrier");
    let parts = workers_of(rest, cast, (remerge, quiet_millisecs), seed);
    let mut workers = Vec::new();
    // For hunting: leaves workers out by name.
    let without = std::env::var("PAGEMERGE_STRESS_WITHOUT").unwrap_or_default();
    for (name, body) in parts {
        if !without.split(',').any(|left_out| left_out == name) {
            workers.push(spawn(&world, name, body));
        }
    }
    let begun = Instant::now();
    let mut unmerged = 0;
    while begun.elapsed() < os::stress_time() && !world.is_over() {
        thread::sleep(Duration::from_millis(400));
        if world.is_over() {
            break;
        }
        // With `never`, what was un-merged is never merged again: that would end the stress.
        if remerge != Remerge::Never {
            engine
                .set_run(RunMode::Unmerge)
                .expect("everything can be un-merged");
            unmerged += 1;
            thread::sleep(Duration::from_millis(20));
            engine.start().expect("merging again");
        }
    }
    let failed_early = world.is_over();
    let before_end = engine.stats().expect("stats");
    world.stop.store(true, Ordering::Relaxed);
    let mut failed: Vec<String> = Vec::new();
    for (name, worker) in workers {
        if worker.join().is_err() {
            failed.push(name);
        }
    }
    let stats = engine.stats().expect("stats");
    println!(
        "figure: {} visits, {} windows, {} merged, {} broken, {} lost races, {unmerged} times un-merged, \
         {} EIO, {} late reads, {} generations",
        world.visits.load(Ordering::Relaxed),
        stats.space.windows,
        stats.core.pages_merged,
        stats.core.cow_broken,
        stats.space.lost_races,
        world.retries.load(Ordering::Relaxed),
        world.late.load(Ordering::Relaxed),
        stats.space.generations,
    );
    println!("figure: left alone: {:?}", reasons(&before_end));
    assert!(
        failed.is_empty() && !failed_early,
        "lost or foreign bytes: {failed:?}"
    );
    assert_eq!(stats.last_error, None);
    for page in 0..PAGES {
        for index in 0..512 {
            world.expect("the end", page, index, world.at_rest(page, index));
        }
    }
    engine.unregister(region).expect("un-merged");
    for page in 0..PAGES {
        for index in 0..512 {
            world.expect("un-merged", page, index, world.at_rest(page, index));
        }
    }
    // With `never` each page is merged once, in few and long runs. Copies of zero pages are not counted.
    let (windows, merged, broken) = match (rest, remerge) {
        (Rest::ZeroBetween, _) => (100, 1000, 0),
        (_, Remerge::Never) => (0, 500, 21),
        _ => (100, 1000, 21),
    };
    assert!(
        stats.space.windows > windows
            && stats.core.pages_merged > merged
            && stats.core.cow_broken >= broken,
        "too little happened: this proved nothing"
    );
}

/// Pages written after merging are merged again at once. (No device: that is what `always` is not
/// for, finding F2.)
fn stress_always_loses_nothing() {
    stress(
        Rest::Equal,
        Remerge::Always,
        5,
        Cast {
            device: false,
            forker: false,
        },
    );
}

/// Pages written after merging are merged again after 5 ms without a write.
fn stress_quiet_loses_nothing() {
    stress(
        Rest::Equal,
        Remerge::Quiet,
        5,
        Cast {
            device: false,
            forker: false,
        },
    );
}

/// With a device that writes, the quiet time is longer than its reads.
fn stress_quiet_with_a_device_loses_nothing() {
    stress(
        Rest::Equal,
        Remerge::Quiet,
        60,
        Cast {
            device: true,
            forker: false,
        },
    );
}

/// Pages written after merging stay as they are until they are un-merged.
fn stress_never_with_a_device_loses_nothing() {
    stress(
        Rest::Equal,
        Remerge::Never,
        5,
        Cast {
            device: true,
            forker: false,
        },
    );
}

/// Everything, while children come and go.
fn stress_with_forks_loses_nothing() {
    stress(
        Rest::Equal,
        Remerge::Always,
        5,
        Cast {
            device: false,
            forker: true,
        },
    );
}

/// The default way of merging, with children and a device.
fn stress_quiet_with_everything_loses_nothing() {
    stress(
        Rest::Equal,
        Remerge::Quiet,
        60,
        Cast {
            device: true,
            forker: true,
        },
    );
}

/// Zero pages with others between them, which go through windows in stretches, with children and a device.
fn stress_zero_pages_between_others_loses_nothing() {
    stress(
        Rest::ZeroBetween,
        Remerge::Quiet,
        60,
        Cast {
            device: true,
            forker: true,
        },
    );
}

/// The same on a kernel that cannot move pages (before 6.8): all merging is done in place, under a
/// synchronous write-protection.
fn stress_in_place_loses_nothing() {
    let pretend = [("PAGEMERGE_PRETEND", "no-move")];
    let limit = Duration::from_secs(60) + 2 * os::stress_time();
    for name in [
        "stress_quiet_with_everything_loses_nothing",
        "stress_always_loses_nothing",
    ] {
        support::scenario_with(name, &pretend)
            .end(limit)
            .expect_success();
    }
}

/// The same without write tracking: changes are found by digests alone.
fn stress_without_tracking_loses_nothing() {
    let pretend = [("PAGEMERGE_PRETEND", "no-wp-async")];
    let limit = Duration::from_secs(60) + 2 * os::stress_time();
    support::scenario_with("stress_with_forks_loses_nothing", &pretend)
        .end(limit)
        .expect_success();
}

fn main() -> ExitCode {
    let long = 120 + 3 * os::stress_time().as_secs();
    support::run(vec![
        case!(stress_always_loses_nothing).seconds(long),
        case!(stress_quiet_loses_nothing).seconds(long),
        case!(stress_quiet_with_a_device_loses_nothing)
            .needs(Need::DirectIo)
            .seconds(long),
        case!(stress_never_with_a_device_loses_nothing)
            .needs(Need::DirectIo)
            .seconds(long),
        case!(stress_with_forks_loses_nothing).seconds(long),
        case!(stress_zero_pages_between_others_loses_nothing)
            .needs(Need::DirectIo)
            .seconds(long),
        case!(stress_in_place_loses_nothing)
            .needs(Need::DirectIo)
            .seconds(2 * long),
        case!(stress_without_tracking_loses_nothing).seconds(long),
        case!(stress_quiet_with_everything_loses_nothing)
            .needs(Need::DirectIo)
            .seconds(long),
    ])
}
