//! Defects that a review of the finished engine found, each with the story of how it showed and the
//! shortest way to it. Each of these tests has been seen to fail, or to hang, with its defect put back.
//!
//! As in `findings`, each test is a process of its own: several of these defects hung the program or
//! destroyed a child's memory. `--features inject` adds the one that needs a kernel which refuses for
//! ever.

mod support;

use pagemerge_linux::core::{AdvisorMode, Reason, RunMode, Settings};
use pagemerge_linux::{Barrier, Engine, EngineSettings, Error, Remerge};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use support::engines::{
    assert_filled, content, engine, fill, in_frames, merge, merged, merged_pages, reasons,
    register, scan, settings, skipped, try_register,
};
use support::os::{self, Memory, Random, page_size};
use support::ring::Ring;
use support::{Need, case, scenario_with};

/// Contents in play: enough that frames are many, few enough that duplicates are everywhere.
const CONTENTS: usize = 8;
/// Longer than any test: a watch with this quiet time is never over.
const NEVER_QUIET: u32 = 600_000;

fn engine_with(change: impl FnOnce(&mut EngineSettings)) -> Engine {
    let mut settings = settings();
    change(&mut settings);
    Engine::new(settings).expect("an engine")
}

/// One page that a child shares with us, to tell it something.
fn shared_page() -> Memory {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    Memory::with(1, os::RW, flags, -1, 0).expect("shared memory")
}

/// Which flags of a userfaultfd are left on a range: (page, flag).
fn userfaultfd_flags(memory: &Memory) -> Vec<(usize, &'static str)> {
    let mut found = Vec::new();
    for vma in os::mappings_of(memory) {
        for flag in ["uw", "um"].into_iter().filter(|flag| vma.has(flag)) {
            found.push((vma.start.saturating_sub(memory.addr()) / page_size(), flag));
        }
    }
    found
}

fn pages_in_frames(memory: &Memory) -> usize {
    os::mappings_of(memory)
        .iter()
        .filter(|vma| in_frames(vma))
        .map(|vma| (vma.end.min(memory.addr() + memory.len()) - vma.start) / page_size())
        .sum()
}

// ------------------------------------------------------------------------------- fork canaries

/// A merged region, a child that maps its frames, `trouble` for the parent's own memory before and
/// after the fork, and an un-merge: may the frames be punched? Not while the child lives.
fn child_keeps_its_bytes(
    fork: fn(&mut dyn FnMut() -> i32) -> os::Child,
    before: fn(),
    after: fn(),
) {
    let memory = Memory::new(512);
    fill(&memory, CONTENTS);
    let engine = engine(Remerge::Quiet);
    let region = register(&engine, &memory);
    merge(&engine);
    assert!(merged_pages(&memory) > 500, "{}", merged_pages(&memory));
    before();
    let told = shared_page();
    let child = fork(&mut || {
        while told.load(0, 0) == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        let right = (0..512).all(|page| memory.shows(page, content(page, CONTENTS)));
        i32::from(!right)
    });
    after();
    // Each of these looks for frames that nobody shows any more.
    scan(&engine);
    engine.unregister(region).expect("un-merged");
    engine.stats().expect("stats");
    scan(&engine);
    told.store(0, 0, 1);
    assert_eq!(child.wait(), 0, "the child has lost its bytes");
    assert_filled(&memory, CONTENTS, "in the parent");
    // Without the child they go: it was the child, and nothing else, that kept them. Then nothing
    // old lies under a page.
    let stats = engine.stats().expect("stats").space;
    assert_eq!((stats.frames, stats.generations), (0, 1), "{stats:?}");
    memory
        .advise(libc::MADV_DONTNEED)
        .expect("the owner's own call");
    (0..512).for_each(|page| memory.assert_shows(page, 0, "discarded without the child"));
}

fn by_fork(body: &mut dyn FnMut() -> i32) -> os::Child {
    os::fork(body)
}

fn by_clone(body: &mut dyn FnMut() -> i32) -> os::Child {
    os::raw_fork(body)
}

fn lock_everything() {
    os::call(libc::SYS_mlockall, &[libc::MCL_CURRENT as usize]).expect("mlockall");
    os::call(libc::SYS_munlockall, &[]).expect("munlockall");
}

/// Whether a child still mapped the frames was read off a page that parent and child share. Locking
/// all memory faults private pages in for writing, so the parent got its own copy of that page: it
/// looked unshared, the frames were punched, and the child read zeroes in 512 of 512 pages.
fn canary_is_not_misled_by_locked_memory() {
    child_keeps_its_bytes(by_fork, || (), lock_everything);
}

/// The same for a fork that calls no handlers, which only the canary can notice.
fn canary_of_a_raw_fork_is_not_misled_by_locked_memory() {
    child_keeps_its_bytes(by_clone, || (), lock_everything);
}

/// The same page in swap: the parent reads it in again and is the only one to map it, since the child
/// has a mere swap entry. No privilege was needed for that, only memory pressure.
fn canary_is_not_misled_by_swap() {
    let _lock = support::os::MachineLock::take();
    let swap = os::Swap::new(64 << 20).expect("a swap device of our own");
    let ended = scenario_with("canary_in_swap", &[]).end(Duration::from_secs(60));
    // Put back before anything can panic.
    drop(swap);
    ended.expect_success();
}

fn canary_in_swap() {
    child_keeps_its_bytes(by_fork, page_everything_out, || ());
}

fn page_everything_out() {
    const MADV_PAGEOUT: i32 = 21;
    for vma in os::mappings(0, usize::MAX) {
        if vma.permissions == "rw-p" && vma.name != "[stack]" {
            // What cannot be paged out stays.
            let _ = os::advise(vma.start, vma.end - vma.start, MADV_PAGEOUT);
        }
    }
    let swapped = os::status("VmSwap");
    println!("figure: {swapped} KiB in swap");
    assert!(swapped > 0, "nothing went to swap: this proved nothing");
}

// ------------------------------------------------------------------------- after un-merging

/// A region with a watched page has mappings of two userfaultfds, and the kernel takes nothing away
/// from a range that has another's. Ending them for the region as a whole did nothing: protection
/// stayed after `unregister`, debuggers got EIO for ever, and the same memory was refused
/// ("foreign userfaultfd") when it was registered again.
fn no_userfaultfd_stays_on_mixed_memory() {
    // Merged, then watched, merged, and ordinary pages.
    let memory = Memory::new(64);
    fill(&memory, 4);
    (48..64).for_each(|page| memory.fill(page, 1000 + page as u64));
    let engine = engine_with(|s| s.quiet_millisecs = NEVER_QUIET);
    let region = register(&engine, &memory);
    merge(&engine);
    assert_eq!(merged_pages(&memory), 48);
    (8..12).for_each(|page| memory.fill(page, 2000 + page as u64));
    let stats = scan(&engine);
    assert_eq!(
        skipped(&stats, Reason::NotQuiet),
        4,
        "{:?}",
        reasons(&stats)
    );
    assert!(
        (8..12).all(|page| os::entry(memory.at(page)).is_protected()),
        "no watch has begun: this proves nothing"
    );
    engine.unregister(region).expect("un-merged");
    assert_eq!(userfaultfd_flags(&memory), [], "after unregister");
    for page in [8, 9, 20, 50] {
        let bytes = os::word_of(3000, 0).to_ne_bytes();
        os::write_own_memory(&bytes, memory.at(page)).expect("a debugger's write");
    }
    let right = |page: usize| match page {
        8..12 => 2000 + page as u64,
        48.. => 1000 + page as u64,
        _ => content(page, 4),
    };
    for page in 0..64 {
        let first = match page {
            8 | 9 | 20 | 50 => 3000,
            _ => right(page),
        };
        assert_eq!(memory.load(page, 0), os::word_of(first, 0), "page {page}");
        assert_eq!(
            memory.load(page, 1),
            os::word_of(right(page), 1),
            "page {page}"
        );
    }
    // The same memory again. What was not written while it was merged merges at once.
    let region = register(&engine, &memory);
    merge(&engine);
    let merged = merged(&memory);
    for page in (0..48).filter(|page| !matches!(page, 8..12 | 20)) {
        assert!(merged[page], "page {page} does not merge again: {merged:?}");
    }
    engine.unregister(region).expect("un-merged");
    assert_eq!(
        userfaultfd_flags(&memory),
        [],
        "after the second unregister"
    );
}

/// The same with background merging, all ways of writing, and many rounds: whatever the mixture is
/// when the region ends, nothing stays.
fn no_userfaultfd_stays_after_background_merging() {
    let seed = os::seed();
    println!("seed {seed}");
    let mut random = Random::new(seed);
    let memory = Memory::new(256);
    let engine = engine_with(|s| s.quiet_millisecs = 3);
    engine.start().expect("a barrier");
    let begun = Instant::now();
    let mut rounds = 0;
    while begun.elapsed() < os::stress_time() {
        fill(&memory, CONTENTS);
        let region = register(&engine, &memory);
        for _ in 0..random.below(40) {
            memory.store(random.below(256), 7, random.next());
            thread::sleep(Duration::from_micros(random.next() % 1000));
        }
        match random.below(3) {
            0 => engine.unregister(region).expect("un-merged"),
            1 => engine.forget(region).expect("given up"),
            _ => {
                let (first, pages) = (random.below(200), 1 + random.below(56));
                engine
                    .discard(memory.at(first), pages * page_size())
                    .expect("discarded");
                (first..first + pages).for_each(|page| memory.assert_shows(page, 0, "discarded"));
                engine.unregister(region).expect("un-merged");
            }
        }
        assert_eq!(userfaultfd_flags(&memory), [], "round {rounds}");
        rounds += 1;
    }
    let stats = engine.stats().expect("stats");
    println!(
        "figure: {rounds} rounds, {} merged",
        stats.core.pages_merged
    );
    assert!(stats.core.pages_merged > 100, "this proved nothing");
    assert_eq!(stats.last_error, None);
}

/// Un-merged pages stayed in a mapping of a memfd: they could be merged again only after a quiet time,
/// and each of their mappings stayed for good. Pages that were never written go back into anonymous
/// memory, where they are like any others.
fn unmerged_memory_is_anonymous_again_and_merges_at_once() {
    let memory = Memory::new(1024);
    fill(&memory, CONTENTS);
    let engine = engine_with(|s| s.quiet_millisecs = NEVER_QUIET);
    for round in 0..5 {
        let region = register(&engine, &memory);
        merge(&engine);
        assert_eq!(merged_pages(&memory), 1024, "round {round}");
        if round % 2 == 0 {
            engine.unregister(region).expect("un-merged");
        } else {
            engine.set_run(RunMode::Unmerge).expect("un-merged");
            engine.set_run(RunMode::Stop).expect("stopped");
        }
        assert_eq!(
            pages_in_frames(&memory),
            0,
            "round {round}: pages in a memfd"
        );
        assert_filled(&memory, CONTENTS, "after un-merging");
        if round % 2 != 0 {
            merge(&engine);
            assert_eq!(
                merged_pages(&memory),
                1024,
                "after run = 2 in round {round}"
            );
            engine.unregister(region).expect("un-merged");
        }
        assert_eq!(userfaultfd_flags(&memory), [], "round {round}");
    }
}

/// `MADV_DONTNEED` shows what lies underneath a page. That was the frame, for as long as *any* other
/// page shared it: an allocator that discards and expects zeroes (jemalloc and mimalloc hand such pages
/// out as calloc'ed memory) read old bytes. First it was so for all pages; then, for one version more,
/// for those that were written while they were merged and not quiet yet.
fn discarding_after_unregister_reads_zero_while_others_share() {
    for remerge in [Remerge::Never, Remerge::Quiet] {
        let (one, other) = (Memory::new(64), Memory::new(64));
        for memory in [&one, &other] {
            (0..64).for_each(|page| memory.fill(page, 1 + (page / 32) as u64));
        }
        let engine = engine(remerge);
        let (region, others) = (register(&engine, &one), register(&engine, &other));
        merge(&engine);
        assert_eq!(merged_pages(&one) + merged_pages(&other), 128);
        // Written while it is merged: a device may hold it, so it must stay where it is.
        one.fill(7, 7);
        engine.unregister(region).expect("un-merged");
        one.assert_shows(7, 7, "written while it was merged");
        for page in (0..64).filter(|page| *page != 7) {
            one.assert_shows(page, 1 + (page / 32) as u64, "after unregister");
            if page % 2 == 0 {
                one.fill(page, 5);
            }
        }
        one.advise(libc::MADV_DONTNEED)
            .expect("the owner's own call");
        (0..64).for_each(|page| one.assert_shows(page, 0, "discarded after unregister"));
        assert_eq!(
            merged_pages(&other),
            32,
            "sharers of the frame that lay under the written page, and no others"
        );
        let whole = |when| {
            (0..64).for_each(|page| other.assert_shows(page, 1 + (page / 32) as u64, when));
        };
        whole("the other sharers");
        merge(&engine);
        assert_eq!(merged_pages(&other), 64, "the other sharers merge again");
        whole("the other sharers, merged again");
        engine.unregister(others).expect("un-merged");
        whole("the other sharers, un-merged");
    }
}

/// Pages that leave one frame may be of several regions, whose memory may be neighbours while their
/// pages have other numbers. A run of them was booked as if it were of one region: of pages that still
/// showed a frame it was written down that they do not, the next look parted them, their frames were
/// punched, and they read zero (a page in each hour or so of a stress with many regions).
///
/// The page that is booked wrongly must be the last to show its frame, or the frame lives on.
fn frames_shared_by_neighbouring_regions_come_apart_page_by_page() {
    const HALF: usize = 4;
    /// Shown by the last page of one region, the first page of its neighbour, and the one that ends.
    const SHARED: u64 = 9;
    const THEIRS: u64 = 10;
    let engine = engine(Remerge::Quiet);
    let part = |memory: &Memory, first: usize| {
        let (addr, len) = (memory.at(first), HALF * page_size());
        try_register(&engine, addr, len, "").expect("plain memory is registered")
    };
    let neighbours = Memory::new(2 * HALF);
    let (third, ends) = (Memory::new(HALF), Memory::new(HALF));
    for page in 0..2 * HALF {
        let at_the_border = page + 1 == HALF || page == HALF;
        neighbours.fill(
            page,
            if at_the_border {
                SHARED
            } else {
                20 + page as u64
            },
        );
    }
    (0..HALF).for_each(|page| third.fill(page, THEIRS));
    (0..HALF).for_each(|page| ends.fill(page, SHARED));
    // The page number behind the first one's last is that of the third one's first.
    part(&neighbours, 0);
    let of_third = part(&third, 0);
    part(&neighbours, HALF);
    let ending = part(&ends, 0);
    merge(&engine);
    let merged = [&neighbours, &third, &ends].map(merged_pages);
    assert_eq!(merged, [2, HALF, HALF]);
    // A living frame under a written page of a region that ends: the neighbours leave it, as one run.
    ends.fill(0, 50);
    engine.unregister(ending).expect("un-merged");
    // All but its first page leave the frame of the third one.
    scan(&engine);
    (1..HALF).for_each(|page| third.fill(page, 60 + page as u64));
    for _ in 0..3 {
        scan(&engine);
        third.assert_shows(0, THEIRS, "a page that nobody wrote");
    }
    engine.unregister(of_third).expect("un-merged");
    third.assert_shows(0, THEIRS, "un-merged");
    for page in [HALF - 1, HALF] {
        neighbours.assert_shows(page, SHARED, "at the border");
    }
}

/// Discarding memory that its owner had locked in part failed half done: the kernel refuses to discard
/// locked pages (`EINVAL`), but by then the merged pages of the range had been thrown away, while the
/// error said that nothing was changed. It showed in a stress whose threads lock what others discard:
/// pages read zero after a call that had failed. (Where only merged pages were locked it did not even
/// fail, and their lock was gone.)
fn locked_pages_are_not_discarded_half_done() {
    const PAGES: usize = 12;
    let engine = engine(Remerge::Quiet);
    let memory = Memory::new(PAGES);
    // The second half is unique.
    let content = |page: usize| if page < 6 { 1 } else { page as u64 };
    // Locks of merged pages, of ordinary ones, and of both.
    for (first, pages) in [(1, 2), (9, 2), (4, 4)] {
        (0..PAGES).for_each(|page| memory.fill(page, content(page)));
        let region = register(&engine, &memory);
        merge(&engine);
        assert_eq!(merged_pages(&memory), 6);
        memory
            .lock_pages(first, pages, true)
            .expect("a few pages may be locked");
        let told = engine.discard(memory.addr(), memory.len());
        match &told {
            Err(Error::Os { attempted, source }) => {
                assert_eq!(source.raw_os_error(), Some(libc::EINVAL), "{attempted}");
                let right = format!("{pages} of them are mlocked memory; nothing was discarded");
                assert!(attempted.contains(&right), "{attempted}");
            }
            other => panic!("{other:?}"),
        }
        (0..PAGES).for_each(|page| memory.assert_shows(page, content(page), "refused"));
        // What is not locked can be had.
        let (addr, len) = (memory.at(first + pages), page_size());
        engine.discard(addr, len).expect("not locked");
        memory
            .lock_pages(first, pages, false)
            .expect("our own pages");
        engine
            .discard(memory.addr(), memory.len())
            .expect("nothing is locked any more");
        (0..PAGES).for_each(|page| memory.assert_shows(page, 0, "discarded"));
        engine.unregister(region).expect("un-merged");
    }
}

// ------------------------------------------------------------------------------- raw forks

/// `_Fork` and `clone` call no handlers, so the child took the parent's merging thread for its own:
/// making an engine, or only dropping the parent's at the end of `main`, waited for ever.
fn child_of_a_raw_fork_has_a_merging_thread_of_its_own() {
    let memory = Memory::new(64);
    fill(&memory, CONTENTS);
    let mut parents = Some(engine(Remerge::Quiet));
    let engine_of_parent = parents.as_ref().expect("just made");
    let region = register(engine_of_parent, &memory);
    merge(engine_of_parent);
    let child = os::raw_fork(|| {
        let inherited = parents.take().expect("a copy of the parent's");
        let told = inherited.stats();
        assert!(matches!(told, Err(Error::Forked)), "{told:?}");
        drop(inherited);
        let own = engine(Remerge::Quiet);
        let fresh = Memory::new(64);
        fill(&fresh, CONTENTS);
        let region = register(&own, &fresh);
        merge(&own);
        assert_eq!(merged_pages(&fresh), 64);
        assert_filled(&fresh, CONTENTS, "merged by the child");
        assert_filled(&memory, CONTENTS, "the parent's memory in the child");
        own.unregister(region).expect("un-merged");
        own.start().expect("a barrier");
        drop(own);
        assert_filled(&fresh, CONTENTS, "un-merged by the child");
        0
    });
    assert_eq!(child.wait(), 0);
    let parents = parents.expect("the parent has its own");
    assert_eq!(merged_pages(&memory), 64);
    parents.unregister(region).expect("un-merged");
    assert_filled(&memory, CONTENTS, "in the parent");
}

// ------------------------------------------------------------------------------- lagging records

/// With the kernel's lagging records, a region that had been unregistered was never dropped from the
/// space, and page numbers are used again: half of a new region was taken for the dead one's, and
/// never merged.
fn lagging_regions_do_not_shadow_new_ones() {
    for unmerge in [false, true] {
        let (one, other, new) = (Memory::new(64), Memory::new(64), Memory::new(128));
        let kernel = EngineSettings::kernel_defaults();
        let engine = Engine::new(EngineSettings {
            scan: Settings {
                pages_to_scan: 100_000,
                sleep_millisecs: 0,
                advisor_mode: AdvisorMode::None,
                smart_scan: false,
                ..kernel.scan
            },
            ..kernel
        })
        .expect("an engine");
        for memory in [&one, &other, &new] {
            (0..memory.pages()).for_each(|page| memory.fill(page, 1));
        }
        let regions = [register(&engine, &one), register(&engine, &other)];
        merge(&engine);
        assert_eq!(merged_pages(&one), 64, "{unmerge}");
        for region in regions {
            engine.unregister(region).expect("un-merged");
        }
        if unmerge {
            engine.set_run(RunMode::Unmerge).expect("un-merged");
            engine.set_run(RunMode::Stop).expect("stopped");
        }
        (0..3).for_each(|_| drop(scan(&engine)));
        register(&engine, &new);
        let stats = merge(&engine);
        assert_eq!(merged_pages(&new), 128, "{unmerge}: {:?}", reasons(&stats));
        // The old memory is still its owner's, and may come back.
        let again = register(&engine, &one);
        merge(&engine);
        assert_eq!(merged_pages(&one), 64, "{unmerge}: registered again");
        engine.unregister(again).expect("un-merged");
        for page in 0..64 {
            one.assert_shows(page, 1, "un-merged twice");
            other.assert_shows(page, 1, "un-merged once");
        }
    }
}

// ------------------------------------------------------------------------------- no room

/// Pages whose merging takes a mapping each.
fn fill_scattered(memory: &Memory) {
    for page in 0..memory.pages() {
        memory.fill(page, scattered(page));
    }
}

fn scattered(page: usize) -> u64 {
    (page % 7 + 1) as u64 + if page.is_multiple_of(3) { 10 } else { 0 }
}

fn assert_scattered(memory: &Memory, when: &str) {
    (0..memory.pages()).for_each(|page| memory.assert_shows(page, scattered(page), when));
}

/// When the program had used up all mappings between two slices of a pass, registering a window's run
/// failed for lack of room to split a mapping, and so did taking it out again, which was tried for
/// ever: the merging thread never came back, and `fork` waited for it.
fn program_that_uses_up_all_mappings_does_not_stop_merging() {
    let memory = Arc::new(Memory::new(2048));
    fill_scattered(&memory);
    let engine = engine(Remerge::Quiet);
    let region = register(&engine, &memory);
    // The first pass of these merges some, so the mappings are split everywhere.
    scan(&engine);
    engine
        .scan(Some(64), &mut || true)
        .expect("a part of a pass");
    // Everything that takes mappings of its own is made before they are used up.
    let (go, stop) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicBool::new(false)),
    );
    let touched = Arc::new(AtomicUsize::new(0));
    let writer = {
        let (memory, go, stop) = (Arc::clone(&memory), Arc::clone(&go), Arc::clone(&stop));
        let touched = Arc::clone(&touched);
        thread::spawn(move || {
            while !go.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_micros(100));
            }
            while !stop.load(Ordering::Relaxed) {
                for page in 0..memory.pages() {
                    memory.store(page, 500, os::word_of(scattered(page), 500));
                    touched.fetch_add(1, Ordering::Relaxed);
                }
            }
        })
    };
    let mut taken: Vec<usize> = Vec::with_capacity(1 << 17);
    let last = loop {
        // Neighbours with different permissions are two mappings.
        let protection = taken.len() & 1;
        let at = [
            0,
            page_size(),
            protection,
            os::PRIVATE as usize,
            os::NONE,
            0,
        ];
        match os::call(libc::SYS_mmap, &at) {
            Ok(at) => taken.push(at),
            Err(error) => break error,
        }
        assert!(taken.len() < 1 << 17, "there is no limit of mappings");
    };
    assert_eq!(last.raw_os_error(), Some(libc::ENOMEM), "{last}");
    go.store(true, Ordering::Relaxed);
    let mut refused = 0;
    for _ in 0..4 {
        // It may say that there is no room; it must say something.
        refused += usize::from(engine.scan(None, &mut || true).is_err());
    }
    let child = os::fork(|| {
        let right = (0..2048).all(|page| memory.shows(page, scattered(page)));
        i32::from(!right)
    });
    assert_eq!(child.wait(), 0, "bytes in a child made at the limit");
    stop.store(true, Ordering::Relaxed);
    writer.join().expect("the writer is not left waiting");
    let mappings = taken.len();
    for at in taken {
        os::call(libc::SYS_munmap, &[at, page_size()]).expect("our own mapping");
    }
    println!(
        "figure: {mappings} mappings made, {refused} passes refused, {} pages touched",
        touched.load(Ordering::Relaxed)
    );
    assert_scattered(&memory, "after the limit");
    for (page, flag) in userfaultfd_flags(&memory) {
        assert_eq!(
            flag, "uw",
            "page {page} is left registered for missing pages"
        );
    }
    let stats = merge(&engine);
    assert!(
        merged_pages(&memory) > 1000,
        "it merges when there is room again: {:?}",
        reasons(&stats)
    );
    engine.unregister(region).expect("un-merged");
    assert_scattered(&memory, "after un-merging");
    assert_eq!(userfaultfd_flags(&memory), []);
}

/// The same, from a kernel that has no room ever again: every call must come back.
#[cfg(feature = "inject")]
fn kernel_that_never_has_room_is_not_asked_for_ever() {
    use pagemerge_linux::inject;
    let plans: [&[&str]; 3] = [
        &["UffdRegister"],
        &["UffdUnregister"],
        &["UffdRegister", "UffdUnregister"],
    ];
    for calls in plans {
        let memory = Memory::new(256);
        fill_scattered(&memory);
        let engine = engine(Remerge::Quiet);
        let region = register(&engine, &memory);
        scan(&engine);
        // A child that shares every page makes each move fail, so that windows give pages back.
        let told = shared_page();
        let sharer = os::fork(|| {
            while told.load(0, 0) == 0 {
                thread::sleep(Duration::from_millis(1));
            }
            i32::from(!(0..256).all(|page| memory.shows(page, scattered(page))))
        });
        let before: Vec<u64> = calls.iter().map(|call| inject::seen(call)).collect();
        for call in calls {
            inject::arm(call, libc::ENOMEM, 0, u32::MAX);
        }
        for _ in 0..3 {
            let _ = engine.scan(None, &mut || true);
            memory.store(9, 500, os::word_of(scattered(9), 500));
        }
        let child = os::fork(|| {
            let right = (0..256).all(|page| memory.shows(page, scattered(page)));
            i32::from(!right)
        });
        assert_eq!(child.wait(), 0, "{calls:?}: bytes in a child");
        assert_scattered(&memory, "while the kernel has no room");
        told.store(0, 0, 1);
        assert_eq!(
            sharer.wait(),
            0,
            "{calls:?}: bytes in the child that shared"
        );
        for (call, before) in calls.iter().zip(before) {
            assert!(inject::seen(call) > before, "{call} was never made");
        }
        inject::disarm_all();
        engine.unregister(region).expect("un-merged");
        assert_scattered(&memory, "after un-merging");
    }
}

// ------------------------------------------------------------------------------- waiting for ever

/// A thread that writes to a watched page waits for the helper to lift the protection. When the owner
/// discarded the range at that moment, fresh memory was mapped over it, the helper found nothing to
/// lift, and a lift that fails wakes nobody: the writer waited for ever (iteration 438).
fn writer_of_a_watched_page_that_is_discarded_goes_on() {
    const PAGE: usize = 5;
    let seed = os::seed();
    println!("seed {seed}");
    let mut random = Random::new(seed);
    let memory = Arc::new(Memory::new(8));
    let engine = engine_with(|s| s.quiet_millisecs = NEVER_QUIET);
    register(&engine, &memory);
    let (asked, done) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let delay = Arc::new(AtomicU64::new(0));
    {
        let (memory, delay) = (Arc::clone(&memory), Arc::clone(&delay));
        let (asked, done) = (Arc::clone(&asked), Arc::clone(&done));
        thread::spawn(move || {
            for round in 1_u64.. {
                while asked.load(Ordering::Acquire) < round {
                    std::hint::spin_loop();
                }
                let begun = Instant::now();
                let wait = Duration::from_nanos(delay.load(Ordering::Relaxed));
                while begun.elapsed() < wait {
                    std::hint::spin_loop();
                }
                memory.store(PAGE, 3, round);
                done.store(round, Ordering::Release);
            }
        });
    }
    let begun = Instant::now();
    let (mut round, mut watched) = (0, 0);
    while begun.elapsed() < 2 * os::stress_time() {
        round += 1;
        // The last page stays an ordinary one, which belongs to the other userfaultfd.
        (0..7).for_each(|page| memory.fill(page, 1));
        memory.fill(7, 100 + round);
        (0..3).for_each(|_| drop(scan(&engine)));
        memory.store(PAGE, 9, round);
        scan(&engine);
        watched += u64::from(os::entry(memory.at(PAGE)).is_protected());
        delay.store(random.next() % 400_000, Ordering::Relaxed);
        asked.store(round, Ordering::Release);
        engine
            .discard(memory.addr(), memory.len())
            .expect("discarded");
        os::wait_for("the writer", || done.load(Ordering::Acquire) == round);
        let word = memory.load(PAGE, 3);
        assert!(word == 0 || word == round, "round {round}: {word}");
    }
    println!("figure: {round} rounds, {watched} times under a watch");
    assert!(watched > round / 2, "no watch: this proved nothing");
    // The writer never ends; the process does.
}

// ------------------------------------------------------------------------------- pins that do not show

/// Buffer rings of `io_uring` in the program's own memory pin it for long without being counted in
/// `VmPin`. A page of one that was written after merging was merged again, and the kernel went on with
/// the old page: reads answered ENOBUFS. While such a descriptor is open, written pages stay.
fn open_io_uring_keeps_written_pages_where_they_are() {
    let memory = Memory::new(64);
    fill(&memory, CONTENTS);
    let engine = engine(Remerge::Quiet);
    register(&engine, &memory);
    merge(&engine);
    assert_eq!(merged_pages(&memory), 64);
    let ring = Ring::new().expect("looked at before");
    assert_eq!(os::status("VmPin"), 0, "nothing that the kernel counts");
    memory.fill(5, 3); // equal to others
    let frame = os::entry(memory.at(5)).frame_number();
    let stats = merge(&engine);
    assert!(!merged(&memory)[5], "merged again");
    assert_eq!(skipped(&stats, Reason::Pinned), 1, "{:?}", reasons(&stats));
    assert_eq!(
        os::entry(memory.at(5)).frame_number(),
        frame,
        "it was moved"
    );
    drop(ring);
    os::wait_for("the page to be merged without the ring", || {
        thread::sleep(Duration::from_millis(6));
        scan(&engine);
        merged(&memory)[5]
    });
    memory.assert_shows(5, 3, "merged again");
}

/// Without a barrier nothing asked for pins: a page that an `io_uring` had registered as a buffer was
/// merged while nobody wrote, as the caller had promised, and every fixed read after the call went to
/// the page that it had been before. It showed as a buffer that never changed.
fn pinned_buffer_stays_the_buffer_without_a_barrier() {
    let memory = Memory::new(64);
    fill(&memory, CONTENTS);
    let engine = engine_with(|s| s.barrier = Some(Barrier::None));
    register(&engine, &memory);
    let ring = Ring::new().expect("looked at before");
    ring.pin(&[(memory.at(5), page_size())]).expect("pinned");
    let stats = merge(&engine);
    assert!(!merged(&memory)[5], "a pinned page is merged");
    assert!(skipped(&stats, Reason::Pinned) > 0, "{:?}", reasons(&stats));
    let file = os::direct_file(&[77]).expect("looked at before");
    let got = ring.read_fixed(file.as_raw_fd(), 0, memory.at(5), 4096, 0);
    assert_eq!(got, 4096);
    memory.assert_shows(5, 77, "what the device wrote");
    drop(ring);
    memory.fill(5, content(5, CONTENTS));
    os::wait_for("everything to be merged without the ring", || {
        thread::sleep(Duration::from_millis(6));
        scan(&engine);
        merged_pages(&memory) == 64
    });
    assert_filled(&memory, CONTENTS, "merged");
}

// ------------------------------------------------------------------------------- quiet pages

/// Where a page that was written and has been quiet was merged in its memfd mapping, it never became
/// an ordinary page again. After its quiet time, the next pass puts it back into anonymous memory.
fn quiet_page_is_anonymous_again() {
    let memory = Memory::new(64);
    fill(&memory, CONTENTS);
    let engine = engine(Remerge::Quiet);
    let region = register(&engine, &memory);
    merge(&engine);
    assert_eq!(merged_pages(&memory), 64);
    memory.fill(5, 100);
    memory.fill(40, 101);
    memory.fill(41, 102);
    scan(&engine); // the watch begins
    let watched: Vec<_> = [5, 40, 41]
        .map(|page| os::entry(memory.at(page)).is_protected())
        .into();
    assert_eq!(watched, [true; 3]);
    thread::sleep(Duration::from_millis(20)); // longer than the quiet time
    let stats = scan(&engine);
    for (page, right) in [(5, 100), (40, 101), (41, 102)] {
        let vma = os::mappings(memory.at(page), page_size()).remove(0);
        assert!(!in_frames(&vma), "{vma:?}; {:?}", reasons(&stats));
        assert!(!os::entry(memory.at(page)).is_file());
        memory.assert_shows(page, right, "back in anonymous memory");
    }
    assert_eq!(pages_in_frames(&memory), 61);
    // An ordinary page: it merges without another quiet time.
    engine
        .update(|s| s.quiet_millisecs = NEVER_QUIET)
        .expect("a setting");
    memory.fill(5, 3);
    merge(&engine);
    assert!(merged(&memory)[5], "an ordinary page is merged");
    engine.unregister(region).expect("un-merged");
    assert_eq!(userfaultfd_flags(&memory), []);
    for page in 0..64 {
        let right = match page {
            5 => 3,
            40 => 101,
            41 => 102,
            _ => content(page, CONTENTS),
        };
        memory.assert_shows(page, right, "un-merged");
    }
}

/// A watch ended only when a scan came by. In an engine that was at rest (`run = 0`, or no synchronous
/// scan any more) a debugger's writes to a watched page were refused for ever.
fn debugger_is_not_refused_for_ever_while_the_engine_is_at_rest() {
    use std::os::unix::fs::FileExt;
    let memory = Memory::new(64);
    fill(&memory, CONTENTS);
    let engine = engine_with(|s| s.quiet_millisecs = 100);
    let region = register(&engine, &memory);
    merge(&engine);
    assert_eq!(merged_pages(&memory), 64);
    for page in [5, 40, 41] {
        memory.fill(page, 100);
    }
    scan(&engine); // the watch begins
    let debugger = std::fs::OpenOptions::new()
        .write(true)
        .open("/proc/self/mem")
        .expect("our own memory");
    let begun = Instant::now();
    let mut refused = 0;
    while debugger
        .write_all_at(&[7; 8], memory.at(40) as u64 + 8)
        .is_err()
    {
        refused += 1;
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "refused for ever"
        );
        thread::sleep(Duration::from_millis(1));
    }
    println!("figure: refused {refused} times in {:?}", begun.elapsed());
    let word = memory.word(40, 1).load(std::sync::atomic::Ordering::SeqCst);
    assert_eq!(word, 0x0707_0707_0707_0707);
    // What was quiet is ordinary memory now, without another scan.
    let ordinary = |page| !in_frames(&os::mappings(memory.at(page), page_size()).remove(0));
    while !ordinary(5) || !ordinary(41) {
        assert!(begun.elapsed() < Duration::from_secs(60), "never put back");
        thread::sleep(Duration::from_millis(1));
    }
    memory.fill(40, 100);
    engine.unregister(region).expect("un-merged");
    for page in 0..64 {
        let right = if [5, 40, 41].contains(&page) {
            100
        } else {
            content(page, CONTENTS)
        };
        memory.assert_shows(page, right, "un-merged");
    }
}

/// Writers that come just when pages have become quiet: each write must be seen ever after, on
/// whatever page it lands. (The window that moves a quiet page back holds writers off; one that got in
/// between the copy and the move would be lost.)
fn writers_that_meet_pages_becoming_quiet_lose_nothing() {
    const PAGES: usize = 256;
    const WRITERS: usize = 2;
    let seed = os::seed();
    println!("seed {seed}");
    let memory = Arc::new(Memory::new(PAGES));
    fill(&memory, CONTENTS);
    let engine = engine_with(|s| s.quiet_millisecs = 1);
    let region = register(&engine, &memory);
    merge(&engine);
    engine.start().expect("a barrier");
    let stop = Arc::new(AtomicBool::new(false));
    let made = Arc::new(AtomicU64::new(0));
    let writers: Vec<_> = (0..WRITERS)
        .map(|me| {
            let (memory, stop) = (Arc::clone(&memory), Arc::clone(&stop));
            let made = Arc::clone(&made);
            thread::spawn(move || {
                let mut random = Random::new(seed + me as u64);
                // What this writer's half of each page holds; pages go back to a few contents, so that
                // they merge.
                let words = page_size() / 8 / WRITERS;
                let mut holds: Vec<u64> = (0..PAGES).map(|page| content(page, CONTENTS)).collect();
                while !stop.load(Ordering::Relaxed) {
                    let page = random.below(PAGES);
                    for index in me * words..(me + 1) * words {
                        let (found, right) =
                            (memory.load(page, index), os::word_of(holds[page], index));
                        assert_eq!(found, right, "page {page} word {index}: a write is lost");
                    }
                    let new = random.below(CONTENTS) as u64 + 1;
                    for index in me * words..(me + 1) * words {
                        memory.store(page, index, os::word_of(new, index));
                    }
                    holds[page] = new;
                    made.fetch_add(1, Ordering::Relaxed);
                    // Between "all the time" and "quiet for a few passes".
                    thread::sleep(Duration::from_micros(random.next() % 300));
                }
                holds
            })
        })
        .collect();
    let begun = Instant::now();
    while begun.elapsed() < 2 * os::stress_time() {
        engine
            .update(move |s| s.quiet_millisecs = 1 + u32::try_from(seed % 5).expect("small"))
            .expect("a setting");
        thread::sleep(Duration::from_millis(50));
    }
    stop.store(true, Ordering::Relaxed);
    let holds: Vec<Vec<u64>> = writers
        .into_iter()
        .map(|writer| writer.join().expect("a writer found its bytes"))
        .collect();
    engine.stop().expect("stopped");
    let stats = engine.stats().expect("stats");
    println!(
        "figure: {} writes, {} merged, {} broken",
        made.load(Ordering::Relaxed),
        stats.core.pages_merged,
        stats.core.cow_broken
    );
    assert_eq!(stats.last_error, None);
    assert!(
        stats.core.cow_broken > 100 && stats.core.pages_merged > 500,
        "this proved nothing"
    );
    let words = page_size() / 8 / WRITERS;
    let check = |when: &str| {
        for page in 0..PAGES {
            for (me, holds) in holds.iter().enumerate() {
                for index in me * words..(me + 1) * words {
                    let (found, right) =
                        (memory.load(page, index), os::word_of(holds[page], index));
                    assert_eq!(found, right, "{when}: page {page} word {index}");
                }
            }
        }
    };
    check("at the end");
    engine.unregister(region).expect("un-merged");
    check("un-merged");
    assert_eq!(userfaultfd_flags(&memory), []);
}

// ------------------------------------------------------------------------------- barrier "user"

/// In user mode a system call that writes to a protected page fails with EFAULT. A quiet watch held the
/// protection for seconds, not for a window: `read(2)` into a page failed for 5.05 s. There, written
/// pages are left alone.
fn user_barrier_lets_system_calls_write_to_broken_pages() {
    let memory = Memory::new(64);
    fill(&memory, CONTENTS);
    let engine = engine_with(|s| s.barrier = Some(Barrier::User));
    let region = register(&engine, &memory);
    merge(&engine);
    assert_eq!(merged_pages(&memory), 64);
    memory.fill(3, 2); // equal to others
    let zero = File::open("/dev/zero").expect("/dev/zero");
    for round in 0..20 {
        let stats = scan(&engine);
        assert_eq!(skipped(&stats, Reason::Broken), 1, "{:?}", reasons(&stats));
        assert!(!os::entry(memory.at(3)).is_protected(), "a watch has begun");
        // No pass runs, so no window is open.
        let got = os::read_to(zero.as_raw_fd(), memory.at(3), 8);
        assert_eq!(got.expect("no EFAULT"), 8, "round {round}");
        memory.fill(3, 2);
        thread::sleep(Duration::from_millis(6));
    }
    assert!(!merged(&memory)[3], "merged again");
    // Beside a thread that merges it may meet a window, which is over in a moment.
    engine.start().expect("a barrier");
    let begun = Instant::now();
    let (mut reads, mut refused) = (0, 0);
    while begun.elapsed() < os::stress_time().min(Duration::from_secs(3)) {
        os::wait_for("a read(2) to get through", || {
            match os::read_to(zero.as_raw_fd(), memory.at(3), 8) {
                Ok(_) => return true,
                Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EFAULT), "{error}"),
            }
            refused += 1;
            false
        });
        reads += 1;
    }
    engine.stop().expect("stopped");
    println!("figure: {reads} reads, {refused} refused");
    engine.unregister(region).expect("un-merged");
    assert_eq!(userfaultfd_flags(&memory), []);
    let got = os::read_to(zero.as_raw_fd(), memory.at(10), 8);
    assert_eq!(got.expect("no EFAULT after unregister"), 8);
    assert_eq!(memory.load(10, 0), 0);
    assert_eq!(memory.load(10, 1), os::word_of(content(10, CONTENTS), 1));
}

// ------------------------------------------------------------------------------- the owner's own calls

/// A page goes back into anonymous memory by mapping over it, and whatever its owner had done to the
/// mapping since was undone: read-only pages became writable, locked pages could go to swap.
fn quiet_page_keeps_the_permissions_that_its_owner_gave_it() {
    let memory = Memory::new(64);
    fill(&memory, CONTENTS);
    let engine = engine(Remerge::Quiet);
    register(&engine, &memory);
    merge(&engine);
    memory.fill(5, 100);
    memory
        .protect_pages(5, 1, libc::PROT_READ)
        .expect("mprotect");
    let stats = merge(&engine);
    let vma = os::mappings(memory.at(5), page_size()).remove(0);
    assert!(vma.permissions.starts_with("r--"), "{vma:?}");
    assert_eq!(
        skipped(&stats, Reason::ReadOnly),
        1,
        "{:?}",
        reasons(&stats)
    );
    memory.assert_shows(5, 100, "read-only");
}

fn locked_pages_stay_locked() {
    let memory = Memory::new(64);
    fill(&memory, CONTENTS);
    let engine = engine(Remerge::Quiet);
    let region = register(&engine, &memory);
    merge(&engine);
    // Locking faults them in for writing, so they are written pages that become quiet.
    memory.lock_pages(5, 4, true).expect("mlock");
    for when in ["after passes", "after unregister"] {
        if when == "after passes" {
            merge(&engine);
        } else {
            engine.unregister(region).expect("un-merged");
        }
        for vma in os::mappings(memory.at(5), 4 * page_size()) {
            assert!(vma.has("lo"), "{when}: {vma:?}");
        }
        assert_eq!(os::status("VmLck") * 1024, 4 * page_size() as u64, "{when}");
    }
    assert_filled(&memory, CONTENTS, "locked");
}

fn unregistering_keeps_the_permissions_that_the_owner_gave() {
    let memory = Memory::new(64);
    fill(&memory, CONTENTS);
    let engine = engine(Remerge::Quiet);
    let region = register(&engine, &memory);
    merge(&engine);
    memory
        .protect_pages(20, 4, libc::PROT_READ)
        .expect("mprotect");
    // It may refuse, by name, or find another way.
    match engine.unregister(region) {
        Ok(()) | Err(Error::Unmerge { .. }) => {}
        other => panic!("{other:?}"),
    }
    for vma in os::mappings(memory.at(20), 4 * page_size()) {
        assert!(vma.permissions.starts_with("r--"), "{vma:?}");
    }
    memory.protect_pages(20, 4, os::RW).expect("mprotect");
    assert_filled(&memory, CONTENTS, "read-only for a while");
}

// ------------------------------------------------------------------------------------ moves

/// A page read back as zero: Linux 6.18 answers EEXIST now and then for pages that `UFFDIO_MOVE` has
/// moved all the same, and such a page was taken for a stray one in staging and thrown away. It took four
/// writers that toggle a word (so that pages merge and part all the time) and about a minute, as
/// many short lives of an engine as fit.
fn moves_that_the_kernel_denies_lose_no_page() {
    const PAGES: usize = 960;
    let begun = std::time::Instant::now();
    let (mut lives, mut merged) = (0, 0);
    while begun.elapsed() < os::stress_time() * 2 {
        let memory = Arc::new(Memory::new(PAGES));
        for page in 0..PAGES {
            memory.fill(page, 77);
            memory.store(page, 100, 1);
        }
        let engine = engine(Remerge::Quiet);
        let region = register(&engine, &memory);
        engine.start().expect("merging in the background");
        let stop = Arc::new(AtomicBool::new(false));
        let writers: Vec<_> = (0..4_usize)
            .map(|id| {
                let (memory, stop) = (Arc::clone(&memory), Arc::clone(&stop));
                thread::spawn(move || {
                    let mut last = vec![1_u64; PAGES / 4];
                    let mut seed = id as u64 * 7919 + 1;
                    while !stop.load(Ordering::Relaxed) {
                        seed = seed
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(1_442_695_040_888_963_407);
                        let at = usize::try_from(seed >> 33).expect("31 bits") % last.len();
                        let page = at * 4 + id;
                        assert_eq!(memory.load(page, 100), last[at], "page {page}");
                        last[at] = if seed >> 60 == 0 { 2 } else { 1 };
                        memory.store(page, 100, last[at]);
                        if (seed >> 50).is_multiple_of(64) {
                            thread::sleep(Duration::from_micros(50));
                        }
                    }
                })
            })
            .collect();
        thread::sleep(Duration::from_millis(400));
        stop.store(true, Ordering::Relaxed);
        for writer in writers {
            writer
                .join()
                .expect("every word was what its writer wrote last");
        }
        merged += engine.stats().expect("stats").core.pages_merged;
        engine.unregister(region).expect("un-merged");
        for page in 0..PAGES {
            memory.store(page, 100, os::word_of(77, 100));
            memory.assert_shows(page, 77, "beside a word that was toggled");
        }
        lives += 1;
    }
    println!("figure: {lives} lives, {merged} merges");
    assert!(merged > 1000, "hardly anything merged: this proved nothing");
}

/// What broke: zero pages that were busy, and were tried once more, still said that what lay between them and
/// the page before could be registered with them; but that page was another one by then. A window took in all
/// that lay between, frames and foreign memory as well. And frames that were mapped right before such zero
/// pages, in one run with the first of them, were registered with them when the window closed. Goal: only
/// zero pages, and what has been looked at between them, are registered together.
fn zero_pages_tried_again_are_registered_by_themselves() {
    let is_zero = |page: usize| page.is_multiple_of(2) && !(40..140).contains(&page);
    let busy = [20, 160];
    let memory = Memory::new(180);
    for page in 0..memory.pages() {
        let content = match page {
            _ if is_zero(page) => 0,
            40..140 => 7,
            _ => 1000 + page as u64,
        };
        memory.fill(page, content);
    }
    // What a fork has shared once refuses to be moved until it is written.
    assert_eq!(os::fork(|| 0).wait(), 0);
    for page in (0..memory.pages()).filter(|page| !busy.contains(page)) {
        memory.store(page, 0, memory.load(page, 0));
    }
    let engine = engine_with(|settings| settings.scan.use_zero_pages = true);
    register(&engine, &memory);
    let mut stats = scan(&engine);
    for _ in 0..2 {
        // Two passes: afterwards nobody is busy any more.
        stats = scan(&engine);
    }
    let zero = (0..memory.pages()).filter(|page| is_zero(*page)).count();
    assert_eq!(
        stats.core.ksm_zero_pages,
        zero as u64,
        "{:?}",
        reasons(&stats)
    );
    assert_eq!(pages_in_frames(&memory), 100);
    let frames = os::mappings_of(&memory).into_iter().filter(in_frames);
    for vma in frames {
        assert!(
            !vma.has("uw"),
            "{:x} is registered: {:?}",
            vma.start,
            vma.flags
        );
    }
    let waiting: Vec<_> = userfaultfd_flags(&memory)
        .into_iter()
        .filter(|(_, flag)| *flag == "um")
        .collect();
    assert_eq!(waiting, [], "still waits for missing pages");
    engine.close().expect("un-merged");
}

fn main() -> ExitCode {
    support::run(vec![
        case!(canary_is_not_misled_by_locked_memory).needs(Need::Root),
        case!(canary_of_a_raw_fork_is_not_misled_by_locked_memory).needs(Need::Root),
        case!(canary_is_not_misled_by_swap).needs(Need::Zram),
        case!(canary_in_swap).hidden(),
        case!(no_userfaultfd_stays_on_mixed_memory),
        case!(no_userfaultfd_stays_after_background_merging),
        case!(unmerged_memory_is_anonymous_again_and_merges_at_once),
        case!(discarding_after_unregister_reads_zero_while_others_share),
        case!(frames_shared_by_neighbouring_regions_come_apart_page_by_page),
        case!(locked_pages_are_not_discarded_half_done),
        case!(child_of_a_raw_fork_has_a_merging_thread_of_its_own).seconds(60),
        case!(lagging_regions_do_not_shadow_new_ones),
        case!(program_that_uses_up_all_mappings_does_not_stop_merging),
        #[cfg(feature = "inject")]
        case!(kernel_that_never_has_room_is_not_asked_for_ever),
        case!(writer_of_a_watched_page_that_is_discarded_goes_on),
        case!(open_io_uring_keeps_written_pages_where_they_are).needs(Need::IoUring),
        case!(pinned_buffer_stays_the_buffer_without_a_barrier)
            .needs(Need::IoUring)
            .needs(Need::DirectIo),
        case!(quiet_page_is_anonymous_again),
        case!(debugger_is_not_refused_for_ever_while_the_engine_is_at_rest)
            .needs(Need::FullBarrier),
        case!(writers_that_meet_pages_becoming_quiet_lose_nothing),
        case!(user_barrier_lets_system_calls_write_to_broken_pages),
        case!(quiet_page_keeps_the_permissions_that_its_owner_gave_it),
        case!(locked_pages_stay_locked),
        case!(unregistering_keeps_the_permissions_that_the_owner_gave),
        case!(moves_that_the_kernel_denies_lose_no_page).seconds(120),
        case!(zero_pages_tried_again_are_registered_by_themselves),
    ])
}
