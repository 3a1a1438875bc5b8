//! The other lines of the findings: errors that a program can see, and facts that change plans
//! (sections 2 and 3), each that a test can show.

mod support;

use pagemerge_linux::core::Reason;
use pagemerge_linux::{Engine, EngineSettings, Error, Remerge};
use std::fs;
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;
use support::engines::{
    assert_filled, content, engine, fill, in_frames, merge, merged, merged_pages, reasons,
    register, scan, settings, skipped, try_register,
};
use support::os::{self, Memory, PRIVATE, RW, page_size};
use support::ring::Ring;
use support::{Need, case, scenario, scenario_with};

const CONTENTS: usize = 8;

#[track_caller]
fn assert_refused(engine: &Engine, memory: &Memory, reason: Reason) {
    match try_register(engine, memory.addr(), memory.len(), "") {
        Err(Error::NotMergeable { reason: told, .. }) if told == reason => {}
        other => panic!("{reason} memory: {other:?}"),
    }
}

// -------------------------------------------------------------------- refused at registration

fn read_only_memory_is_refused_by_name() {
    let engine = engine(Remerge::Quiet);
    for protection in [libc::PROT_READ, libc::PROT_NONE] {
        let memory = Memory::with(16, protection, PRIVATE, -1, 0).expect("memory");
        assert_refused(&engine, &memory, Reason::ReadOnly);
    }
}

fn shared_memory_is_refused_by_name() {
    let engine = engine(Remerge::Quiet);
    let memory =
        Memory::with(16, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0).expect("memory");
    assert_refused(&engine, &memory, Reason::SharedMapping);
}

fn file_mappings_are_refused_by_name() {
    let engine = engine(Remerge::Quiet);
    let file = os::scratch_file().expect("a file");
    file.set_len(16 * page_size() as u64).expect("room");
    let fd = file.as_raw_fd();
    let private = Memory::with(16, RW, libc::MAP_PRIVATE, fd, 0).expect("memory");
    assert_refused(&engine, &private, Reason::FileBacked);
    let shared = Memory::with(16, RW, libc::MAP_SHARED, fd, 0).expect("memory");
    assert_refused(&engine, &shared, Reason::SharedMapping);
}

fn locked_memory_is_refused_by_name() {
    let engine = engine(Remerge::Quiet);
    let memory = Memory::new(16);
    memory.lock_pages(0, 16, true).expect("mlock");
    assert_refused(&engine, &memory, Reason::Mlocked);
    memory.lock_pages(0, 16, false).expect("munlock");
    register(&engine, &memory);
}

fn sealed_memory_is_refused_by_name_or_left_alone() {
    let engine = engine(Remerge::Quiet);
    let memory = Memory::new(64);
    fill(&memory, CONTENTS);
    os::seal(memory.addr(), memory.len()).expect("looked at before");
    match try_register(&engine, memory.addr(), memory.len(), "") {
        Err(Error::NotMergeable {
            reason: Reason::Sealed,
            ..
        }) => {}
        // Where smaps does not show it, the window finds out.
        Ok(_) => {
            let stats = merge(&engine);
            assert!(skipped(&stats, Reason::Sealed) > 0, "{:?}", reasons(&stats));
            assert_eq!(merged_pages(&memory), 0);
        }
        other => panic!("{other:?}"),
    }
    assert_filled(&memory, CONTENTS, "sealed");
}

/// Sealed after it was registered: the map-over is refused and the pages go back.
fn memory_sealed_later_keeps_its_bytes() {
    let engine = engine(Remerge::Always);
    let memory = Memory::new(64);
    fill(&memory, CONTENTS);
    register(&engine, &memory);
    os::seal(memory.addr(), memory.len()).expect("looked at before");
    let stats = merge(&engine);
    assert_eq!(merged_pages(&memory), 0);
    assert!(skipped(&stats, Reason::Sealed) > 0, "{:?}", reasons(&stats));
    assert_filled(&memory, CONTENTS, "sealed");
    for vma in os::mappings_of(&memory) {
        assert!(!vma.has("um"), "a closed window left {:?}", vma.flags);
    }
}

fn memory_with_attributes_that_would_be_lost_is_refused_by_name() {
    let engine = engine(Remerge::Quiet);
    for (advice, pages, reason) in [
        (libc::MADV_DONTFORK, 4, Reason::Attributes),
        (libc::MADV_WIPEONFORK, 4, Reason::Attributes),
        (libc::MADV_DONTDUMP, 12, Reason::DontDump),
    ] {
        let memory = Memory::new(16);
        memory.advise_pages(4, pages, advice).expect("madvise");
        if reason == Reason::DontDump {
            // A part of it would be left alone (tests/isolation.rs).
            memory.advise_pages(0, 4, advice).expect("madvise");
        }
        assert_refused(&engine, &memory, reason);
    }
}

fn holes_are_refused_by_name() {
    let engine = engine(Remerge::Quiet);
    let memory = Memory::new(16);
    os::call(libc::SYS_munmap, &[memory.at(7), page_size()]).expect("munmap");
    assert_refused(&engine, &memory, Reason::Unmapped);
}

/// The program's own userfaultfd: refused where it is, and fine beside it.
fn memory_with_a_foreign_userfaultfd_is_refused_and_its_neighbour_is_not() {
    let engine = engine(Remerge::Quiet);
    let memory = Memory::new(64);
    fill(&memory, CONTENTS);
    let theirs = os::foreign_userfaultfd();
    os::foreign_register(&theirs, memory.addr(), 16 * page_size(), 2).expect("registered");
    assert_refused(&engine, &memory, Reason::ForeignUserfaultfd);
    let rest = 48 * page_size();
    try_register(&engine, memory.at(16), rest, "").expect("the neighbour is free");
    merge(&engine);
    assert!(merged_pages(&memory) >= 40, "{}", merged_pages(&memory));
    // The other way round: registered memory says EBUSY to the program.
    let second = os::foreign_userfaultfd();
    let other = Memory::new(16);
    fill(&other, CONTENTS);
    register(&engine, &other);
    let busy = os::foreign_register(&second, other.addr(), other.len(), 2).expect_err("it is ours");
    assert_eq!(busy.raw_os_error(), Some(libc::EBUSY));
    merge(&engine);
    assert_filled(&other, CONTENTS, "beside a foreign userfaultfd");
    assert_filled(&memory, CONTENTS, "beside a foreign userfaultfd");
}

fn overlapping_and_too_small_ranges_are_refused() {
    let engine = engine(Remerge::Quiet);
    let memory = Memory::new(16);
    assert!(matches!(
        try_register(&engine, memory.addr() + 1, 2 * page_size() - 2, ""),
        Err(Error::TooSmall { .. })
    ));
    let region =
        try_register(&engine, memory.addr() + 1, 4 * page_size(), "").expect("three pages");
    assert_eq!((region.pages, region.addr), (3, memory.at(1)));
    assert!(matches!(
        try_register(&engine, memory.at(3), 2 * page_size(), ""),
        Err(Error::Overlaps { pages: 1 })
    ));
    try_register(&engine, memory.at(4), 2 * page_size(), "").expect("adjacent is fine");
}

/// A program that un-merges and registers again (a cache that is refilled) merges again.
fn memory_can_be_registered_again_after_unmerging() {
    let memory = Memory::new(256);
    let engine = engine(Remerge::Quiet);
    for round in 0..3 {
        fill(&memory, CONTENTS);
        let region = register(&engine, &memory);
        merge(&engine);
        os::wait_for("merging", || {
            scan(&engine);
            merged_pages(&memory) > 240
        });
        engine.unregister(region).expect("un-merged");
        assert_filled(&memory, CONTENTS, ["first", "second", "third"][round]);
    }
    engine.close().expect("closed");
    let another = support::engines::engine(Remerge::Quiet);
    register(&another, &memory);
    os::wait_for("another engine to merge", || {
        scan(&another);
        merged_pages(&memory) > 240
    });
    assert_filled(&memory, CONTENTS, "another engine");
}

// -------------------------------------------------------------------- left alone while merging

fn guard_pages_stay_and_their_neighbours_are_merged() {
    let memory = Memory::new(128);
    fill(&memory, CONTENTS);
    let engine = engine(Remerge::Always);
    register(&engine, &memory);
    os::guard(&memory, 20, 3).expect("looked at before");
    let stats = merge(&engine);
    assert_eq!(skipped(&stats, Reason::Guard), 3, "{:?}", reasons(&stats));
    let merged = merged(&memory);
    assert!(merged[19] && merged[23] && !merged[21], "{merged:?}");
    for page in (0..128).filter(|page| !(20..23).contains(page)) {
        memory.assert_shows(page, content(page, CONTENTS), "beside guard pages");
    }
    assert!(
        !os::is_readable(memory.at(21)),
        "the guard page is one still"
    );
    engine.close().expect("un-merged around guard pages");
    assert!(
        !os::is_readable(memory.at(21)),
        "the guard page is one still"
    );
}

/// The owner of registered memory may lock parts of it: those go back and are named.
fn pages_locked_later_are_left_alone() {
    let memory = Memory::new(128);
    fill(&memory, CONTENTS);
    let engine = engine(Remerge::Always);
    register(&engine, &memory);
    memory.lock_pages(32, 32, true).expect("mlock");
    let stats = merge(&engine);
    let merged = merged(&memory);
    assert!(
        merged[..32].iter().all(|m| *m) && merged[64..].iter().all(|m| *m),
        "{merged:?}"
    );
    assert!(
        merged[32..64].iter().all(|m| !*m),
        "locked pages were merged: {merged:?}"
    );
    assert_eq!(
        skipped(&stats, Reason::Mlocked),
        32,
        "{:?}",
        reasons(&stats)
    );
    assert_filled(&memory, CONTENTS, "locked in part");
}

fn pages_made_read_only_later_are_left_alone() {
    let memory = Memory::new(128);
    fill(&memory, CONTENTS);
    let engine = engine(Remerge::Always);
    register(&engine, &memory);
    memory
        .protect_pages(32, 32, libc::PROT_READ)
        .expect("mprotect");
    let stats = merge(&engine);
    assert!(
        merged(&memory)[32..64].iter().all(|m| !*m),
        "read-only pages were merged"
    );
    assert_eq!(
        skipped(&stats, Reason::ReadOnly),
        32,
        "{:?} {stats:?}",
        reasons(&stats)
    );
    assert_filled(&memory, CONTENTS, "read-only in part");
    for vma in os::mappings(memory.at(32), 32 * page_size()) {
        assert!(
            vma.permissions.starts_with("r-"),
            "{} is the owner's choice no more",
            vma.permissions
        );
    }
}

/// Huge pages full of duplicates are split by their windows, and nothing else changes.
fn huge_pages_with_duplicates_are_merged() {
    let memory = Memory::huge(1024);
    fill(&memory, CONTENTS);
    let huge = os::kib_of(&memory, "AnonHugePages");
    assert!(
        huge >= 2048,
        "{huge} KiB are huge pages: this would prove nothing"
    );
    let engine = engine(Remerge::Always);
    let region = register(&engine, &memory);
    let stats = merge(&engine);
    assert!(
        merged_pages(&memory) > 1000,
        "{} {:?}",
        merged_pages(&memory),
        reasons(&stats)
    );
    assert_filled(&memory, CONTENTS, "huge pages");
    engine.unregister(region).expect("un-merged");
    assert_filled(&memory, CONTENTS, "huge pages, un-merged");
}

/// One duplicate in a huge page, where one is worth splitting it: the other 511 keep their bytes.
fn single_duplicate_in_a_huge_page_is_merged() {
    let memory = Memory::huge(1024);
    for page in 0..1024 {
        memory.fill(page, 5000 + page as u64);
    }
    memory.fill(100, 1);
    memory.fill(900, 1);
    let engine = engine(Remerge::Always);
    engine
        .update(|settings| settings.thp_min_duplicates = 1)
        .expect("split for one");
    register(&engine, &memory);
    let stats = merge(&engine);
    assert_eq!(
        (stats.core.pages_shared, stats.core.pages_sharing),
        (1, 1),
        "{:?}",
        reasons(&stats)
    );
    for page in 0..1024 {
        let right = if matches!(page, 100 | 900) {
            1
        } else {
            5000 + page as u64
        };
        memory.assert_shows(page, right, "in split huge pages");
    }
}

/// A pinned page cannot be moved; it is named, and merged when it is pinned no more.
fn page_pinned_by_io_uring_is_left_alone_by_name() {
    let memory = Memory::new(64);
    fill(&memory, CONTENTS);
    let engine = engine(Remerge::Quiet);
    let ring = Ring::new().expect("looked at before");
    ring.pin(&[(memory.at(9), 2 * page_size())])
        .expect("pinned");
    register(&engine, &memory);
    let stats = merge(&engine);
    assert_eq!(skipped(&stats, Reason::Pinned), 2, "{:?}", reasons(&stats));
    let now = merged(&memory);
    assert!(!now[9] && !now[10] && now[8] && now[11], "{now:?}");
    let file = os::direct_file(&[7])
        .or_else(|_| os::scratch_file())
        .expect("a file");
    assert_eq!(
        ring.read_fixed(file.as_raw_fd(), 0, memory.at(9), 4096, 0),
        4096
    );
    memory.assert_shows(9, 7, "a device's write to a pinned page");
    drop(ring);
    memory.fill(9, content(9, CONTENTS));
    os::wait_for("pages that are pinned no more to be merged", || {
        scan(&engine);
        merged_pages(&memory) == 64
    });
    assert_filled(&memory, CONTENTS, "pinned no more");
}

/// Pages that went to swap show neither presence nor markers of their own; they keep their bytes.
fn swapped_pages_keep_their_bytes() {
    let _machine = os::MachineLock::take();
    let swap = os::Swap::new(256 << 20).expect("a zram device");
    let ended = scenario("in_swap").end(Duration::from_secs(60));
    drop(swap);
    ended.expect_success();
}

fn in_swap() {
    const MADV_PAGEOUT: i32 = 21;
    let memory = Memory::new(512);
    fill(&memory, CONTENTS);
    let engine = engine(Remerge::Always);
    let region = register(&engine, &memory);
    scan(&engine);
    memory.advise(MADV_PAGEOUT).expect("reclaim on request");
    let swapped = os::entries(&memory)
        .iter()
        .filter(|e| e.is_swapped())
        .count();
    assert!(
        swapped > 400,
        "only {swapped} went to swap: this proved nothing"
    );
    for _ in 0..4 {
        scan(&engine);
    }
    let still = os::entries(&memory)
        .iter()
        .filter(|e| e.is_swapped())
        .count();
    assert!(
        still > 400,
        "a pass over swapped memory read it in: {still} of {swapped} are left"
    );
    assert_filled(&memory, CONTENTS, "read in again");
    merge(&engine);
    assert!(
        merged_pages(&memory) > 500,
        "what came back is merged: {}",
        merged_pages(&memory)
    );
    // Frames themselves in swap.
    memory.advise(MADV_PAGEOUT).expect("reclaim on request");
    scan(&engine);
    memory.fill(7, 99);
    scan(&engine);
    memory.fill(7, content(7, CONTENTS));
    assert_filled(&memory, CONTENTS, "frames from swap");
    engine.unregister(region).expect("un-merged");
    assert_filled(&memory, CONTENTS, "un-merged");
}

// -------------------------------------------------------------------- forks

/// After any fork a page refused to be moved for ever, until it was written: a pre-forking program
/// never merged again. Faulting it in for writing cures that.
fn program_that_has_forked_merges_again_when_the_child_is_gone() {
    let memory = Memory::new(256);
    fill(&memory, CONTENTS);
    let child = os::fork(|| 0);
    assert_eq!(child.wait(), 0);
    let engine = engine(Remerge::Always);
    register(&engine, &memory);
    let stats = merge(&engine);
    assert!(
        merged_pages(&memory) > 250,
        "{} {:?}",
        merged_pages(&memory),
        reasons(&stats)
    );
    for _ in 0..3 {
        let child = os::fork(|| 0);
        assert_eq!(child.wait(), 0);
        for page in (0..256).step_by(3) {
            memory.fill(page, 50);
            memory.fill(page, content(page, CONTENTS));
        }
        merge(&engine);
        assert!(
            merged_pages(&memory) > 250,
            "after another fork: {}",
            merged_pages(&memory)
        );
    }
    assert_filled(&memory, CONTENTS, "after four forks");
}

/// While a child lives, its pages are left alone, by name; afterwards they are merged.
fn pages_that_a_living_child_shares_are_left_alone_by_name() {
    let memory = Memory::new(256);
    fill(&memory, CONTENTS);
    let flag = Memory::with(1, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0).expect("shared");
    let engine = engine(Remerge::Always);
    register(&engine, &memory);
    let child = os::fork(|| {
        while flag.load(0, 0) == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        i32::from(!(0..256).all(|page| memory.shows(page, content(page, CONTENTS))))
    });
    let stats = merge(&engine);
    // All but the first of each content, which waits for a twin and is never tried itself.
    let tried = 256 - CONTENTS as u64;
    assert_eq!(
        skipped(&stats, Reason::SharedByFork),
        tried,
        "{:?}",
        reasons(&stats)
    );
    assert_eq!(merged_pages(&memory), 0);
    flag.store(0, 0, 1);
    assert_eq!(child.wait(), 0, "the child's bytes");
    os::wait_for("merging when the child is gone", || {
        scan(&engine);
        merged_pages(&memory) == 256
    });
    assert_filled(&memory, CONTENTS, "after the child");
}

// -------------------------------------------------------------------- limits

/// A memfd that grows past `RLIMIT_FSIZE` kills the program by SIGXFSZ: refused by name before.
fn file_size_limit_is_refused_by_name_and_kills_nobody() {
    os::limit(libc::RLIMIT_FSIZE, 1 << 20);
    match Engine::new(settings()) {
        Err(Error::Limit(why)) => assert!(why.contains("RLIMIT_FSIZE"), "{why}"),
        other => panic!("{other:?}"),
    }
}

/// The limit set while the engine works: merging goes on or stops by name, nobody is killed.
fn file_size_limit_set_later_kills_nobody() {
    let memory = Memory::new(2048);
    fill(&memory, CONTENTS);
    let engine = engine(Remerge::Always);
    register(&engine, &memory);
    scan(&engine);
    os::limit(libc::RLIMIT_FSIZE, 4096);
    for round in 0..3_u64 {
        for page in 0..2048 {
            memory.fill(page, 100 * round + (page % 512) as u64 + 1);
        }
        let told = engine
            .scan(None, &mut || true)
            .and_then(|_| engine.scan(None, &mut || true));
        if let Err(error) = told {
            println!("figure: {error}");
        }
        for page in 0..2048 {
            memory.assert_shows(page, 100 * round + (page % 512) as u64 + 1, "at the limit");
        }
    }
    engine.close().expect("un-merging needs no file");
}

/// `vm.max_map_count` is met first by merging, since each scattered page is a mapping: it must stop
/// by name, with room left, and lose nothing.
fn mapping_limit_stops_merging_by_name() {
    const PAGES: usize = 4096;
    let max: usize = fs::read_to_string("/proc/sys/vm/max_map_count")
        .expect("it can be read")
        .trim()
        .parse()
        .expect("a number");
    // Every second page, so that every merged page is a mapping of its own.
    let memory = Memory::new(PAGES);
    for page in 0..PAGES {
        memory.fill(
            page,
            if page % 2 == 0 {
                1 + page as u64 / 4
            } else {
                1 << 20 | page as u64
            },
        );
    }
    // The program's own mappings, but for 3,000.
    let own = Memory::with(max + 10, RW, PRIVATE, -1, 0).expect("address space");
    let mut page = 0;
    while os::map_count() + 3000 < max {
        for _ in 0..500 {
            own.protect_pages(page, 1, libc::PROT_READ).expect("room");
            page += 2;
        }
    }
    let reserved = 1500_u64;
    let engine = Engine::new(EngineSettings {
        reserved_mappings: Some(reserved),
        remerge: Remerge::Always,
        ..settings()
    })
    .expect("an engine");
    register(&engine, &memory);
    let stats = merge(&engine);
    println!(
        "figure: {} of {} mappings, {} merged, {:?}",
        os::map_count(),
        max,
        stats.core.pages_merged,
        reasons(&stats)
    );
    assert!(
        skipped(&stats, Reason::MappingBudget) > 0,
        "{:?}",
        reasons(&stats)
    );
    assert!(stats.core.pages_merged > 100, "it merges up to there");
    let left = max - os::map_count();
    assert!(
        left + 64 > usize::try_from(reserved).expect("small"),
        "only {left} mappings are left to the program"
    );
    let check = |when: &str| {
        for page in 0..PAGES {
            let right = if page % 2 == 0 {
                1 + page as u64 / 4
            } else {
                1 << 20 | page as u64
            };
            memory.assert_shows(page, right, when);
        }
    };
    check("at the budget");
    // And with no reserve at all: the kernel's own limit.
    engine
        .set(EngineSettings {
            reserved_mappings: Some(0),
            ..engine.settings().expect("settings")
        })
        .expect("it can be changed");
    let stats = merge(&engine);
    println!(
        "figure: no reserve: {} of {max} mappings, {:?}",
        os::map_count(),
        reasons(&stats)
    );
    check("at the kernel's limit");
    drop(own);
    engine.close().expect("un-merged");
    check("un-merged");
}

/// 60,000 mappings of the program: merging goes on, within what is left.
fn sixty_thousand_mappings_are_no_obstacle() {
    let own = Memory::with(120_000, RW, PRIVATE, -1, 0).expect("address space");
    let mut page = 0;
    while os::map_count() < 60_000 {
        for _ in 0..1000 {
            own.protect_pages(page, 1, libc::PROT_READ).expect("room");
            page += 2;
        }
    }
    let memory = Memory::new(512);
    fill(&memory, CONTENTS);
    let engine = Engine::new(EngineSettings {
        reserved_mappings: Some(1000),
        ..settings()
    })
    .expect("an engine");
    register(&engine, &memory);
    let stats = merge(&engine);
    assert!(
        merged_pages(&memory) > 500,
        "{} {:?}",
        merged_pages(&memory),
        reasons(&stats)
    );
    assert!(
        stats.space.mappings >= 60_000,
        "they are counted: {}",
        stats.space.mappings
    );
    let child =
        os::fork(|| i32::from(!(0..512).all(|page| memory.shows(page, content(page, CONTENTS)))));
    assert_eq!(child.wait(), 0, "a child among so many mappings");
    assert_filled(&memory, CONTENTS, "among so many mappings");
}

// -------------------------------------------------------------------- calls of the program meanwhile

/// `mlockall(MCL_CURRENT)` touches every page of the process, the engine's own staging included: the
/// first prototypes hung for ever.
fn locking_everything_while_merging_does_not_hang() {
    let memory = Memory::new(512);
    fill(&memory, CONTENTS);
    let engine = engine(Remerge::Always);
    register(&engine, &memory);
    engine.start().expect("a barrier");
    for round in 0..20 {
        for page in (round % 3..512).step_by(3) {
            memory.fill(page, 77);
            memory.fill(page, content(page, CONTENTS));
        }
        os::call(libc::SYS_mlockall, &[libc::MCL_CURRENT as usize]).expect("mlockall");
        assert_filled(&memory, CONTENTS, "all locked");
        os::call(libc::SYS_munlockall, &[]).expect("munlockall");
        thread::sleep(Duration::from_millis(20));
    }
    let stats = engine.stats().expect("stats");
    assert_eq!(stats.last_error, None);
    assert!(stats.core.pages_merged > 0, "this proved nothing");
    os::wait_for("merging when nothing is locked", || {
        merged_pages(&memory) > 500
    });
    assert_filled(&memory, CONTENTS, "unlocked again");
}

/// A stray reader of the engine's own mappings (a debugger, a core dump) must not hang either.
fn reading_every_mapping_while_merging_does_not_hang() {
    use std::os::unix::fs::FileExt;
    let memory = Memory::new(512);
    fill(&memory, CONTENTS);
    let engine = engine(Remerge::Always);
    register(&engine, &memory);
    engine.start().expect("a barrier");
    let file = fs::File::open("/proc/self/mem").expect("our own memory");
    let mut byte = [0];
    for round in 0..5 {
        for vma in os::mappings(0, usize::MAX) {
            let step = page_size()
                * if vma.end - vma.start > 64 << 20 {
                    512
                } else {
                    1
                };
            if vma.permissions.starts_with('r') {
                for at in (vma.start..vma.end).step_by(step) {
                    // EIO in a window, and for what has no pages.
                    let _ = file.read_at(&mut byte, at as u64);
                    if vma.name.is_empty() {
                        let _ = os::is_readable(at);
                    }
                }
            }
        }
        for page in (round % 3..512).step_by(3) {
            memory.fill(page, 77);
            memory.fill(page, content(page, CONTENTS));
        }
    }
    assert_eq!(engine.stats().expect("stats").last_error, None);
    os::wait_for("merging", || merged_pages(&memory) > 500);
    assert_filled(&memory, CONTENTS, "read by everybody");
}

static SIGNALS: AtomicU64 = AtomicU64::new(0);

mod handler {
    #![allow(unsafe_code, reason = "a signal handler that counts")]
    use std::sync::atomic::Ordering;

    extern "C" fn count(_: i32) {
        super::SIGNALS.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn install() {
        // SAFETY: the handler does nothing but count.
        let before =
            unsafe { libc::signal(libc::SIGUSR1, count as *const () as libc::sighandler_t) };
        assert_ne!(before, libc::SIG_ERR);
    }
}

/// Signals at full rate to a process whose pages are in and out of windows: handlers run, system
/// calls that meet a window end as they should, the merging thread is not disturbed.
fn signals_while_merging_disturb_nothing() {
    handler::install();
    let memory = Arc::new(Memory::new(256));
    fill(&memory, CONTENTS);
    let engine = engine(Remerge::Always);
    register(&engine, &memory);
    engine.start().expect("a barrier");
    let stop = Arc::new(AtomicBool::new(false));
    let me = i32::try_from(std::process::id()).expect("a process number");
    let sender = {
        let stop = Arc::clone(&stop);
        thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                os::kill(me, libc::SIGUSR1);
                thread::sleep(Duration::from_micros(50));
            }
        })
    };
    let zero = fs::File::open("/dev/zero").expect("/dev/zero");
    let begun = std::time::Instant::now();
    let mut page = 0;
    while begun.elapsed() < os::stress_time().min(Duration::from_secs(4)) {
        page = (page + 1) % 256;
        let got = os::read_to(zero.as_raw_fd(), memory.at(page) + 800, 8);
        assert_eq!(got.expect("read is restarted, not refused"), 8);
        assert_eq!(memory.load(page, 100), 0);
        memory.store(page, 100, os::word_of(content(page, CONTENTS), 100));
        thread::sleep(Duration::from_micros(100));
    }
    stop.store(true, Ordering::Relaxed);
    sender.join().expect("no panic");
    let stats = engine.stats().expect("stats");
    println!(
        "figure: {} signals, {} windows",
        SIGNALS.load(Ordering::Relaxed),
        stats.space.windows
    );
    assert!(
        SIGNALS.load(Ordering::Relaxed) > 100 && stats.space.windows > 50,
        "this proved nothing"
    );
    assert_eq!(stats.last_error, None);
    assert_filled(&memory, CONTENTS, "among signals");
}

/// The owner's advice about huge pages survives merging and discarding.
fn owners_choice_about_huge_pages_is_carried_over() {
    let memory = Memory::new(64); // asks for none
    fill(&memory, CONTENTS);
    let engine = engine(Remerge::Always);
    register(&engine, &memory);
    merge(&engine);
    assert!(merged_pages(&memory) > 60);
    engine
        .discard(memory.addr(), memory.len())
        .expect("registered");
    for vma in os::mappings_of(&memory) {
        assert!(vma.has("nh"), "lost after discard: {:?}", vma.flags);
    }
}

/// Core dumps leave file mappings out, so merged pages would be missing: either the filter has the
/// bit, or the documentation says so. Here: the engine's own choice is visible and does not change
/// the program's other bits.
fn core_dump_filter_keeps_its_other_bits() {
    let read = || {
        let text = fs::read_to_string("/proc/self/coredump_filter").expect("it can be read");
        u32::from_str_radix(text.trim(), 16).expect("a number")
    };
    let before = read();
    let memory = Memory::new(64);
    fill(&memory, CONTENTS);
    let engine = engine(Remerge::Always);
    register(&engine, &memory);
    merge(&engine);
    let during = read();
    println!("figure: coredump_filter {before:#x} -> {during:#x}");
    assert_eq!(during | 4, before | 4, "other bits were changed");
    engine.close().expect("closed");
}

// -------------------------------------------------------------------- accounting and costs

/// With `shmem_enabled=always` eight scattered frames took 16 MiB. Frames are then written through
/// a mapping that refuses huge pages.
fn frames_stay_small_when_shared_memory_gets_huge_pages() {
    let lock = os::MachineLock::take();
    let path = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    let _always = os::MachineSetting::set(&lock, path, "always");
    scenario_with("frames_with_huge_shmem", &[])
        .end(Duration::from_secs(60))
        .expect_success();
}

fn frames_with_huge_shmem() {
    let memory = Memory::new(4096);
    for page in 0..4096 {
        // Long runs and single pages.
        memory.fill(
            page,
            if page < 1024 {
                1 + page as u64 % 512
            } else {
                1 + (page as u64 * 37) % 512
            },
        );
    }
    let engine = engine(Remerge::Always);
    register(&engine, &memory);
    let stats = merge(&engine);
    println!(
        "figure: {} frames in {} KiB",
        stats.space.frames,
        stats.space.frames_bytes >> 10
    );
    assert!(stats.space.frames >= 512, "{:?}", reasons(&stats));
    let needed = stats.space.frames * page_size() as u64;
    assert!(
        stats.space.frames_bytes <= 2 * needed,
        "{} bytes for {needed}",
        stats.space.frames_bytes
    );
    for page in 0..4096_usize {
        let right = if page < 1024 {
            1 + page as u64 % 512
        } else {
            1 + (page as u64 * 37) % 512
        };
        memory.assert_shows(page, right, "frames written through a mapping");
    }
}

/// RSS counts every mapping of a frame; PSS tells the truth, summed over parent and child, too.
fn pss_falls_by_what_was_merged() {
    let memory = Memory::new(8192);
    fill(&memory, CONTENTS);
    let (before, rss) = (os::rollup("Pss"), os::rollup("Rss"));
    let engine = engine(Remerge::Quiet);
    register(&engine, &memory);
    merge(&engine);
    assert_filled(&memory, CONTENTS, "merged, and read by everybody");
    let (after, rss_after) = (os::rollup("Pss"), os::rollup("Rss"));
    println!("figure: PSS {before} -> {after} KiB, RSS {rss} -> {rss_after} KiB");
    assert!(after + 24_000 < before, "PSS {before} -> {after} KiB");
    let told = (page_size() as u64 * (8192 - CONTENTS as u64)) >> 10;
    assert!(
        before - after <= told + 1024,
        "no more than what was merged"
    );
}

/// Sparse memory costs no page tables: the protecting scan asks for present pages only.
fn passes_over_sparse_memory_build_no_page_tables() {
    let pages = (8_usize << 30) / page_size();
    let flags = PRIVATE | libc::MAP_NORESERVE;
    let memory = Memory::with(pages, RW, flags, -1, 0).expect("address space");
    memory.advise(libc::MADV_NOHUGEPAGE).expect("small pages");
    for page in (0..pages).step_by(pages / 16) {
        memory.fill(page, 1);
    }
    let before = os::status("VmPTE");
    let engine = engine(Remerge::Quiet);
    register(&engine, &memory);
    let stats = merge(&engine);
    let after = os::status("VmPTE");
    println!(
        "figure: page tables {before} -> {after} KiB for {} GiB of nothing",
        (pages * page_size()) >> 30
    );
    assert!(
        after < before + 4096,
        "page tables grew from {before} to {after} KiB"
    );
    assert_eq!(stats.core.pages_sharing, 15, "{:?}", reasons(&stats));
}

/// Merging and un-merging again and again leaves nothing behind.
fn many_rounds_leave_nothing_behind() {
    let memory = Memory::new(128);
    let engine = engine(Remerge::Always);
    let mut first = None;
    for round in 0..300 {
        fill(&memory, CONTENTS);
        let region = register(&engine, &memory);
        scan(&engine);
        scan(&engine);
        engine.unregister(region).expect("un-merged");
        if round % 100 == 99 {
            let stats = engine.stats().expect("stats");
            assert_eq!(
                (stats.space.frames, stats.space.frames_bytes),
                (0, 0),
                "frames are left"
            );
            let now = (os::map_count(), stats.metadata_bytes);
            let (maps, bytes) = *first.get_or_insert(now);
            println!("figure: after {round} rounds {now:?}");
            assert!(now.0 <= maps + 8, "mappings grow: {now:?}");
            assert!(
                now.1 <= 2 * bytes + 4096,
                "metadata grows: {now:?} from {bytes}"
            );
        }
    }
    assert_filled(&memory, CONTENTS, "after so many rounds");
    assert!(os::mappings_of(&memory).iter().any(in_frames) || merged_pages(&memory) == 0);
}

/// A frame's place is used once, so over time an engine sees many places: the mappings by which it
/// looks at those that hold nothing any more must go, or they use up the limit.
fn views_of_dead_frames_are_given_up() {
    let memory = Memory::new(4096);
    let engine = engine(Remerge::Always);
    let views = || {
        let all = os::mappings(0, usize::MAX);
        all.iter()
            .filter(|vma| in_frames(vma) && vma.permissions.ends_with('s'))
            .count()
    };
    for round in 0..60_u64 {
        for page in 0..4096 {
            // Twins far apart: 2,048 frames.
            memory.fill(page, 1 + round * 2048 + page as u64 % 2048);
        }
        let region = register(&engine, &memory);
        (0..3).for_each(|_| drop(scan(&engine)));
        let stats = engine.stats().expect("stats");
        assert!(
            stats.space.frames > 2000,
            "round {round}: {:?}",
            reasons(&stats)
        );
        engine.unregister(region).expect("un-merged");
        if round % 20 == 19 {
            println!(
                "figure: {} views after {} frames",
                views(),
                2048 * (round + 1)
            );
        }
    }
    assert!(
        views() <= 3,
        "{} views of places that hold nothing are left",
        views()
    );
}

fn main() -> ExitCode {
    support::run(vec![
        case!(read_only_memory_is_refused_by_name),
        case!(shared_memory_is_refused_by_name),
        case!(file_mappings_are_refused_by_name),
        case!(locked_memory_is_refused_by_name),
        case!(sealed_memory_is_refused_by_name_or_left_alone).needs(Need::Seal),
        case!(memory_sealed_later_keeps_its_bytes).needs(Need::Seal),
        case!(memory_with_attributes_that_would_be_lost_is_refused_by_name),
        case!(holes_are_refused_by_name),
        case!(memory_with_a_foreign_userfaultfd_is_refused_and_its_neighbour_is_not),
        case!(overlapping_and_too_small_ranges_are_refused),
        case!(memory_can_be_registered_again_after_unmerging),
        case!(guard_pages_stay_and_their_neighbours_are_merged).needs(Need::Guard),
        case!(pages_locked_later_are_left_alone),
        case!(pages_made_read_only_later_are_left_alone),
        case!(huge_pages_with_duplicates_are_merged).needs(Need::HugePages),
        case!(single_duplicate_in_a_huge_page_is_merged).needs(Need::HugePages),
        case!(page_pinned_by_io_uring_is_left_alone_by_name).needs(Need::IoUring),
        case!(swapped_pages_keep_their_bytes).needs(Need::Zram),
        case!(in_swap).hidden(),
        case!(program_that_has_forked_merges_again_when_the_child_is_gone),
        case!(pages_that_a_living_child_shares_are_left_alone_by_name),
        case!(file_size_limit_is_refused_by_name_and_kills_nobody),
        case!(file_size_limit_set_later_kills_nobody),
        case!(mapping_limit_stops_merging_by_name).seconds(400),
        case!(sixty_thousand_mappings_are_no_obstacle),
        case!(locking_everything_while_merging_does_not_hang).needs(Need::Root),
        case!(reading_every_mapping_while_merging_does_not_hang),
        case!(signals_while_merging_disturb_nothing),
        case!(owners_choice_about_huge_pages_is_carried_over),
        case!(core_dump_filter_keeps_its_other_bits),
        case!(frames_stay_small_when_shared_memory_gets_huge_pages).needs(Need::ShmemHuge),
        case!(frames_with_huge_shmem).hidden(),
        case!(pss_falls_by_what_was_merged),
        case!(passes_over_sparse_memory_build_no_page_tables),
        case!(many_rounds_leave_nothing_behind),
        case!(views_of_dead_frames_are_given_up),
    ])
}
