//! Every system call made to fail on purpose, one at a time: whatever fails, and however, the memory
//! reads back right, nothing waits for ever, and the engine goes on or says why not.
//!
//! Needs the feature `inject`: `cargo test -p pagemerge-linux --features inject --test injected`.

mod support;

use pagemerge_linux::core::{Reason, RunMode};
use pagemerge_linux::{Remerge, inject};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use support::case;
use support::engines::{self, engine, merge, reasons, register, scan, skipped};
use support::os::Memory;

const PAGES: usize = 96;

/// Equal pages in runs and alone, zero pages, strangers.
fn content(page: usize) -> u64 {
    match page % 8 {
        0 => 0,
        1 | 2 => 1_000 + (page % 16) as u64,
        7 => page as u64 + 100_000,
        _ => (page % 24) as u64 + 1,
    }
}

fn filled() -> Memory {
    let memory = Memory::new(PAGES);
    (0..PAGES).for_each(|page| memory.fill(page, content(page)));
    memory
}

fn assert_reads_right(memory: &Memory, when: &str) {
    (0..PAGES).for_each(|page| memory.assert_shows(page, content(page), when));
}

/// A merge, a write to a merged page, a second merge, an un-merge of everything, a third merge: with
/// one plan of failures under way. Returns whether the failure was met.
fn live_through(call: &str, errno: i32, skip: u32, times: u32) -> bool {
    let memory = filled();
    let engine = engine(Remerge::Quiet);
    let region = register(&engine, &memory);
    let when = format!("{call} fails with {errno}, after {skip}, {times} times");
    let before = inject::seen(call);
    inject::arm(call, errno, skip, times);
    // Errors are allowed, wrong bytes are not.
    let pass = || drop(engine.scan(None, &mut || true));
    (0..3).for_each(|_| pass());
    assert_reads_right(&memory, &when);
    // The same bytes again, so that the oracle stays as it is; the page is broken all the same.
    (0..PAGES)
        .step_by(5)
        .for_each(|page| memory.fill(page, content(page)));
    (0..2).for_each(|_| pass());
    drop(engine.set_run(RunMode::Unmerge));
    assert_reads_right(&memory, &when);
    drop(engine.set_run(RunMode::Stop));
    (0..3).for_each(|_| pass());
    assert_reads_right(&memory, &when);
    let met = inject::seen(call) > before + u64::from(skip);
    inject::disarm_all();
    // Without failures it goes on, and lets everything go.
    pass();
    assert_reads_right(&memory, &when);
    assert!(
        engine.unregister(region).is_ok(),
        "{when}: cannot be un-merged although nothing fails any more"
    );
    assert_reads_right(&memory, &when);
    engine
        .close()
        .unwrap_or_else(|error| panic!("{when}: {error}"));
    met
}

/// Goal: no single failure of any call loses a byte or hangs. Method: each call by name fails with
/// each errno that such calls have, at its first, a later and a much later use, once and for ever.
fn any_call_that_fails_loses_nothing() {
    let errnos = [
        libc::ENOMEM,
        libc::EBUSY,
        libc::EAGAIN,
        libc::EINVAL,
        libc::EPERM,
        libc::ENOSPC,
    ];
    let (mut tried, mut met) = (0, 0);
    for call in inject::calls() {
        // What starts a thread, or reads the clock, is not what a merge may survive.
        if ["ClockGettime", "CloseRange", "Sigmask"].contains(&call) {
            continue;
        }
        for errno in errnos {
            for (skip, times) in [(0, 1), (3, 2), (11, 1), (40, 7)] {
                tried += 1;
                met += u32::from(live_through(call, errno, skip, times));
            }
        }
    }
    println!("figure: {tried} plans, {met} of them met");
    assert!(
        met > tried / 4,
        "most failures were never met: this proved little"
    );
}

/// Goal: the same while somebody writes. Method: a thread increments words all over the memory while
/// moves, registrations and mappings fail now and then, in turns.
fn failures_under_a_writer_lose_no_increment() {
    let memory = Arc::new(filled());
    let start: Vec<u64> = (0..PAGES)
        .map(|page| memory.word(page, 1).load(Ordering::Relaxed))
        .collect();
    let engine = engine(Remerge::Quiet);
    let region = register(&engine, &memory);
    engine.start().expect("merging in the background");
    let stop = Arc::new(AtomicBool::new(false));
    let writer = {
        let (stop, memory) = (Arc::clone(&stop), Arc::clone(&memory));
        std::thread::spawn(move || {
            let mut counts = vec![0_u64; PAGES];
            let mut at = 0;
            while !stop.load(Ordering::Relaxed) {
                at = (at * 5 + 7) % PAGES;
                memory.word(at, 1).fetch_add(1, Ordering::Relaxed);
                counts[at] += 1;
                if counts[at].is_multiple_of(16) {
                    std::thread::yield_now();
                }
            }
            counts
        })
    };
    let calls = [
        "UffdMove",
        "UffdRegister",
        "Mmap",
        "Pwrite",
        "UffdZeropage",
        "Madvise",
        "Mremap",
    ];
    let begun = std::time::Instant::now();
    let mut round = 0;
    while begun.elapsed() < support::os::stress_time() {
        let call = calls[round % calls.len()];
        let errno = [libc::ENOMEM, libc::EBUSY, libc::EINVAL][round % 3];
        inject::arm(call, errno, u32::try_from(round % 9).expect("small"), 2);
        std::thread::sleep(std::time::Duration::from_millis(5));
        if round % 10 == 9 {
            drop(engine.set_run(RunMode::Unmerge));
            drop(engine.set_run(RunMode::Merge));
        }
        round += 1;
    }
    inject::disarm_all();
    stop.store(true, Ordering::Relaxed);
    let counts = writer.join().expect("the writer counted");
    engine.stop().expect("stopped");
    let stats = engine.stats().expect("stats");
    println!(
        "figure: {round} failures, {} merges, {:?}",
        stats.core.pages_merged,
        reasons(&stats)
    );
    assert!(
        stats.core.pages_merged > 0,
        "nothing merged: this proved nothing"
    );
    for (page, count) in counts.iter().enumerate() {
        let now = memory.word(page, 1).load(Ordering::Relaxed);
        assert_eq!(
            now.wrapping_sub(start[page]),
            *count,
            "increments of page {page}"
        );
    }
    engine.unregister(region).expect("un-merged");
}

/// Goal: a frame store that is full is a reason, not an error, and nothing is lost.
fn full_frame_store_is_a_reason() {
    let memory = filled();
    let engine = engine(Remerge::Quiet);
    register(&engine, &memory);
    scan(&engine);
    inject::arm("Pwrite", libc::ENOSPC, 0, u32::MAX);
    let stats = engines::merge(&engine);
    assert_eq!(stats.core.pages_shared, 0, "no frame can be made");
    assert!(
        skipped(&stats, Reason::FramesFull) > 0,
        "{:?}",
        reasons(&stats)
    );
    assert_reads_right(&memory, "the memfd is full");
    inject::disarm_all();
    let stats = merge(&engine);
    assert!(stats.core.pages_sharing > 0, "{:?}", reasons(&stats));
    assert_reads_right(&memory, "the memfd has room again");
}

fn main() -> ExitCode {
    support::run(vec![
        case!(any_call_that_fails_loses_nothing),
        case!(failures_under_a_writer_lose_no_increment),
        case!(full_frame_store_is_a_reason),
    ])
}
