//! What goes on around a program while its pages are merged: the kernel's own workers, limits and
//! privileges that change in mid life, whoever stops, freezes or traces it, and odd memory nearby.
//! `docs/surroundings.md` has the list of all that was tried, with what cannot be tried by a test.
//!
//! Most tests let a program work ([`Busy`]) and disturb it. `PAGEMERGE_STRESS_SECONDS` makes them
//! longer. Settings of the whole machine are changed under its lock by a process that does nothing
//! else, and put back by it.

mod support;

use pagemerge_linux::core::Reason;
use pagemerge_linux::{Barrier, Engine, EngineSettings, Error};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::busy::{Busy, Plan, Tally};
use support::os::{self, MachineLock, MachineSetting, Memory, Random};
use support::{case, os_thread, scenario, scenario_with};

/// Lets a program work for the time of a stress, and disturbs it every so often; longer, if so few
/// pages were merged or `disturb` has not yet said that it did what it is there for.
fn disturbed(plan: &Plan, floor: u64, mut disturb: impl FnMut(&mut Busy) -> bool) {
    let mut busy = Busy::start(plan);
    let begun = Instant::now();
    let mut done = false;
    while begun.elapsed() < time() || !done || busy.merges() < floor {
        busy.assert_alive();
        done |= disturb(&mut busy);
    }
    busy.goes_on(100, "merging after the disturbance");
    busy.finish().tell();
}

fn time() -> Duration {
    os::stress_time().mul_f64(0.4)
}

fn limit() -> Duration {
    time() * 3 + Duration::from_secs(60)
}

// ------------------------------------------------------------------- the kernel's own workers

/// Goal: khugepaged collapses what is being merged into huge pages, at its greatest speed, and
/// windows split them again; no byte is lost.
///
/// (It leaves a huge page's worth of memory alone while one page of it is write-protected or merged,
/// so it gets its turn when a region has just been let go, or is not tracked.)
fn khugepaged_works_on_the_same_memory() {
    let lock = MachineLock::take();
    let set = |name, value| MachineSetting::set(&lock, name, value);
    let _settings = [
        set(
            "/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs",
            "0",
        ),
        set(
            "/sys/kernel/mm/transparent_hugepage/khugepaged/alloc_sleep_millisecs",
            "0",
        ),
        set(
            "/sys/kernel/mm/transparent_hugepage/khugepaged/pages_to_scan",
            "65536",
        ),
        set(
            "/sys/kernel/mm/transparent_hugepage/khugepaged/max_ptes_none",
            "511",
        ),
        set(
            "/sys/kernel/mm/transparent_hugepage/khugepaged/max_ptes_shared",
            "511",
        ),
        set(
            "/sys/kernel/mm/transparent_hugepage/khugepaged/max_ptes_swap",
            "511",
        ),
    ];
    scenario("works_beside_khugepaged")
        .end(limit())
        .expect_success();
    scenario("works_beside_khugepaged_untracked")
        .end(limit())
        .expect_success();
}

fn beside_khugepaged(write_tracking: bool) {
    let before = os::vmstat("thp_collapse_alloc");
    let collapsed = || os::vmstat("thp_collapse_alloc") - before;
    let plan = Plan {
        pages: 4096,
        // So many that a huge page's worth of memory has few pages to merge at a time, and stays whole
        // for a while.
        contents: 40_000,
        write_tracking,
        ..Plan::default()
    };
    let mut random = Random::new(os::seed());
    let mut all = Tally::default();
    let begun = Instant::now();
    while begun.elapsed() < time() || all.merges < 500 || collapsed() == 0 {
        let memory = Arc::new(Memory::huge(plan.pages));
        memory
            .advise(libc::MADV_NOHUGEPAGE)
            .expect("small pages to begin with");
        let mut busy = Busy::over(&plan, memory);
        let mut make_huge = |memory: &Memory| {
            let (seen, asked) = (collapsed(), Instant::now());
            memory
                .advise(libc::MADV_HUGEPAGE)
                .expect("huge pages on request");
            while collapsed() == seen && asked.elapsed() < Duration::from_millis(500) {
                pause(&mut random, 1000);
            }
        };
        // khugepaged leaves alone what is write-protected.
        if write_tracking {
            busy.without_the_engine(make_huge);
        } else {
            make_huge(&busy.memory);
        }
        pause(&mut random, 100_000);
        all.add(&busy.finish());
    }
    all.tell();
    println!(
        "figure: {} huge pages made by khugepaged (on the whole machine)",
        collapsed()
    );
}

fn works_beside_khugepaged() {
    beside_khugepaged(true);
}

fn works_beside_khugepaged_untracked() {
    beside_khugepaged(false);
}

/// Up to `micros`.
fn pause(random: &mut Random, micros: usize) {
    std::thread::sleep(Duration::from_micros(random.below(micros) as u64));
}

/// Goal: the kernel compacts memory, which moves pages about, again and again.
fn memory_is_compacted() {
    let before = os::vmstat("pgmigrate_success");
    disturbed(&Plan::default(), 1000, |_| {
        std::fs::write("/proc/sys/vm/compact_memory", "1").expect("compaction on request");
        true
    });
    let moved = os::vmstat("pgmigrate_success") - before;
    println!("figure: {moved} pages moved by compaction (on the whole machine)");
}

/// Goal: the kernel's own same-page merging works on the same memory at the same time, at its greatest
/// speed.
fn ksmd_merges_the_same_memory() {
    let lock = MachineLock::of_ksm();
    let set = |name, value| MachineSetting::set(&lock, name, value);
    let _settings = [
        set("/sys/kernel/mm/ksm/pages_to_scan", "20000"),
        set("/sys/kernel/mm/ksm/sleep_millisecs", "1"),
        set("/sys/kernel/mm/ksm/run", "1"),
    ];
    scenario("works_beside_ksmd").end(limit()).expect_success();
    scenario("works_beside_ksmd_untracked")
        .end(limit())
        .expect_success();
}

fn beside_ksmd(write_tracking: bool) {
    let plan = Plan {
        write_tracking,
        ..Plan::default()
    };
    let memory = Arc::new(Memory::new(plan.pages));
    memory
        .advise(libc::MADV_MERGEABLE)
        .expect("KSM is in this kernel");
    let mut busy = Busy::over(&plan, memory);
    let mut random = Random::new(os::seed());
    let begun = Instant::now();
    let mut theirs = 0;
    while begun.elapsed() < time() || theirs == 0 || busy.merges() < 1000 {
        busy.assert_alive();
        // The engine is fast: it must leave something to ksmd.
        busy.without_the_engine(|memory| {
            memory
                .advise(libc::MADV_MERGEABLE)
                .expect("KSM is in this kernel");
            pause(&mut random, 60_000);
        });
        theirs = theirs.max(os::merged_by_ksmd());
        pause(&mut random, 30_000);
        theirs = theirs.max(os::merged_by_ksmd());
    }
    println!("figure: {theirs} pages merged by ksmd at a time");
    busy.finish().tell();
}

fn works_beside_ksmd() {
    beside_ksmd(true);
}

fn works_beside_ksmd_untracked() {
    beside_ksmd(false);
}

/// Goal: memory goes to swap and comes back while it is merged, and the swap is taken away in
/// between.
fn memory_is_swapped_and_swap_is_taken_away() {
    let _lock = MachineLock::take();
    let swap = os::Swap::new(256 << 20).expect("swap on zram");
    let device = swap.device();
    let variables = [("PAGEMERGE_SWAP", device.as_str())];
    scenario_with("works_while_swapped", &variables)
        .end(limit())
        .expect_success();
}

fn works_while_swapped() {
    const MADV_PAGEOUT: i32 = 21;
    let device = std::env::var("PAGEMERGE_SWAP").expect("a device");
    let before = os::vmstat("pswpout");
    let mut random = Random::new(os::seed());
    let mut turns = 0;
    disturbed(&Plan::default(), 1000, |busy| {
        let first = random.below(busy.memory.pages() - 256);
        // It is refused for pages that are in a window just now.
        let _ = busy.memory.advise_pages(first, 256, MADV_PAGEOUT);
        pause(&mut random, 4000);
        turns += 1;
        if turns % 50 == 0 {
            os::swap_off(&device).expect("all of it fits into memory");
            pause(&mut random, 20_000);
            os::swap_on(&device).expect("swap again");
        }
        turns > 100
    });
    let out = os::vmstat("pswpout") - before;
    println!(
        "figure: {out} pages swapped out, swap taken away {} times",
        turns / 50
    );
    assert!(
        out > 1000,
        "this proved nothing: {out} pages were swapped out"
    );
}

// ------------------------------------------------------------------- other barriers

/// Goal: with the barrier `user`, which holds only the program's own code, its writers lose nothing.
/// (What was written after merging is not merged again there, so memory is fresh each time.)
fn user_barrier_holds_the_programs_own_writers() {
    let plan = Plan {
        barrier: Some(Barrier::User),
        system_calls: false,
        ..Plan::default()
    };
    let (begun, mut all) = (Instant::now(), Tally::default());
    while begun.elapsed() < time() || all.merges < 2000 {
        let busy = Busy::start(&plan);
        busy.goes_on(200, "merging under the barrier of user mode");
        std::thread::sleep(Duration::from_millis(50));
        all.add(&busy.finish());
    }
    all.tell();
}

/// Goal: without any barrier nothing is lost as long as nobody writes during the calls.
fn no_barrier_needs_calm_during_calls_only() {
    let plan = Plan {
        barrier: Some(Barrier::None),
        ..Plan::default()
    };
    let busy = Busy::start(&plan);
    let begun = Instant::now();
    while begun.elapsed() < time() || busy.merges() < 2000 {
        busy.while_nobody_writes(|| support::engines::scan(&busy.engine));
        std::thread::sleep(Duration::from_millis(5));
    }
    // Un-merging is such a call, too.
    busy.finish().tell();
}

// ------------------------------------------------------------------- odd memory, and odd wishes

/// Memory that is no ordinary anonymous memory is refused by its name, and not touched.
fn odd_memory_is_refused_by_name() {
    let engine = Engine::new(support::engines::settings()).expect("an engine");
    let odd = [
        (libc::MAP_HUGETLB | libc::MAP_NORESERVE, Reason::Hugetlb),
        (libc::MAP_GROWSDOWN, Reason::ThreadStack),
    ];
    for (flags, right) in odd {
        let len = 4 << 20;
        let flags = usize::try_from(os::PRIVATE | flags).expect("flags of mmap");
        let addr = os::call(
            libc::SYS_mmap,
            &[0, len, os::RW as usize, flags, os::NONE, 0],
        );
        let addr = addr.expect("address space");
        match support::engines::try_register(&engine, addr, len, "") {
            Err(Error::NotMergeable { reason, .. }) => assert_eq!(reason, right),
            other => panic!("{right}: {other:?}"),
        }
        os::call(libc::SYS_munmap, &[addr, len]).expect("unmapped");
    }
}

/// Goal: whatever its owner tells the kernel about registered memory, or about all of the process's,
/// no byte is lost, and merging goes on when it is taken back.
fn owner_advises_all_kinds_of_things() {
    const ADVICE: [(i32, i32); 9] = [
        (libc::MADV_WIPEONFORK, libc::MADV_KEEPONFORK),
        (libc::MADV_DONTFORK, libc::MADV_DOFORK),
        (libc::MADV_DONTDUMP, libc::MADV_DODUMP),
        (libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE),
        (libc::MADV_MERGEABLE, libc::MADV_UNMERGEABLE),
        (libc::MADV_POPULATE_READ, libc::MADV_POPULATE_WRITE),
        (libc::MADV_COLD, libc::MADV_WILLNEED),
        (libc::MADV_SEQUENTIAL, libc::MADV_NORMAL),
        (libc::MADV_PAGEOUT, libc::MADV_RANDOM),
    ];
    let mut random = Random::new(os::seed());
    disturbed(&Plan::default(), 2000, |busy| {
        let (there, back) = ADVICE[random.below(ADVICE.len())];
        let pages = 1 + random.below(64);
        let first = random.below(busy.memory.pages() - pages);
        // What cannot be had on merged memory is refused by the kernel; that is no loss.
        let _ = busy.memory.advise_pages(first, pages, there);
        pause(&mut random, 3000);
        let _ = busy.memory.advise_pages(first, pages, back);
        let thp = |off: usize| {
            os::call(
                libc::SYS_prctl,
                &[libc::PR_SET_THP_DISABLE as usize, off, 0, 0, 0],
            )
        };
        if random.below(10) == 0 {
            thp(1).expect("no huge pages");
            pause(&mut random, 3000);
            thp(0).expect("huge pages again");
        }
        if random.below(20) == 0 {
            let future = (libc::MCL_FUTURE | libc::MCL_ONFAULT) as usize;
            os::call(libc::SYS_mlockall, &[future]).expect("all that is to come is locked");
            pause(&mut random, 5000);
            os::call(libc::SYS_munlockall, &[]).expect("unlocked");
        }
        true
    });
}

/// Goal: the program has a userfaultfd of its own, with a thread that serves it, on the pages right
/// before and after registered memory.
fn programs_own_userfaultfd_next_door() {
    let memory = Arc::new(Memory::new(2048));
    // In the place of the pages around it, which nobody could touch.
    let page = os::page_size();
    let doors = [memory.addr() - page, memory.addr() + memory.len()];
    let fd = Arc::new(os::foreign_userfaultfd());
    for door in doors {
        os::protect(door, page, os::RW).expect("our own page");
        os::foreign_register(&fd, door, page, 1).expect("next to what is not registered yet");
    }
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let server = {
        let (fd, stop) = (Arc::clone(&fd), Arc::clone(&stop));
        std::thread::spawn(move || os::foreign_serve(&fd, &stop, 77))
    };
    let mut busy = Busy::over(&Plan::default(), memory);
    let (begun, mut faults) = (Instant::now(), 0);
    while begun.elapsed() < time() || busy.merges() < 1000 {
        busy.assert_alive();
        for door in doors {
            assert_eq!(os::load(door), 77, "served by the program's own thread");
            os::advise(door, page, libc::MADV_DONTNEED).expect("empty again");
            faults += 1;
        }
        if faults % 500 == 0 {
            busy.without_the_engine(|_| {});
        }
    }
    println!("figure: {faults} faults served by the program's own userfaultfd");
    busy.finish().tell();
    stop.store(true, std::sync::atomic::Ordering::SeqCst);
    server.join().expect("no panic");
}

// ------------------------------------------------------------------- rights and sights that go

/// Goal: a server that gives up root's rights once it has started goes on merging, in every thread as
/// nobody; a second engine says by name what it may not open any more.
fn rights_are_dropped_in_mid_life() {
    let busy = Busy::start(&Plan::default());
    busy.goes_on(500, "merging as root");
    os::become_nobody();
    os::call(libc::SYS_prctl, &[libc::PR_SET_DUMPABLE as usize, 0]).expect("not dumpable");
    busy.goes_on(500, "merging as nobody");
    let fresh = Memory::new(64);
    support::engines::fill(&fresh, 1);
    let region = support::engines::register(&busy.engine, &fresh);
    busy.goes_on(500, "merging new memory as nobody");
    busy.engine.unregister(region).expect("un-merged");
    support::engines::assert_filled(&fresh, 1, "merged and un-merged as nobody");
    match Engine::new(support::engines::settings()) {
        Ok(_) => panic!("an engine without the right to see its own pages"),
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains("/proc/self/pagemap"), "{text}");
        }
    }
    let rest = busy.stop_writing();
    rest.check("as nobody");
    rest.engine.close().expect("closed");
    rest.check("closed as nobody");
}

/// The engine looks at `/proc` for what must not be merged: a thread's own record (finding F13), what
/// its owner has changed, pinned pages. In a process that had made another directory its root, it saw
/// nothing there, took that for "nothing to be careful of", and merged on: the tid word of a thread
/// that ended was written into a page that was gone, and whoever joined it waited for ever. What cannot
/// be looked at must not be merged, by name.
fn proc_vanishes_in_mid_life() {
    const STACK_PAGES: usize = 32;
    let busy = Busy::start(&Plan::default());
    let stacks = Memory::new(8 * STACK_PAGES);
    support::engines::fill(&stacks, 8);
    support::engines::register(&busy.engine, &stacks);
    busy.goes_on(500, "merging in sight of /proc");
    os::hide_all_files();
    // Until a pass has begun since.
    let passes = busy.engine.stats().expect("stats").core.full_scans;
    os::wait_for("another pass", || {
        busy.engine.stats().expect("stats").core.full_scans > passes + 1
    });
    let merges = busy.merges();
    let begun = Instant::now();
    while begun.elapsed() < time() {
        let threads: Vec<_> = (0..8)
            .map(|n| os_thread::spawn(stacks.at(n * STACK_PAGES), STACK_PAGES * os::page_size()))
            .collect();
        for thread in threads {
            os_thread::join(thread);
        }
        busy.assert_alive();
    }
    let fresh = Memory::new(64);
    match support::engines::try_register(&busy.engine, fresh.addr(), fresh.len(), "") {
        Err(error) => assert!(error.to_string().contains("/proc/self/smaps"), "{error}"),
        Ok(_) => panic!("nothing is known of this memory"),
    }
    let stats = busy.engine.stats().expect("stats");
    println!("figure: {:?}", support::engines::reasons(&stats));
    assert_eq!(stats.core.pages_merged, merges, "merged blindly");
    assert!(support::engines::skipped(&stats, Reason::ProcUnreadable) > 0);
    let rest = busy.stop_writing();
    rest.check("out of sight of /proc");
    rest.engine.close().expect("closed");
    rest.check("closed out of sight of /proc");
}

/// System calls that the engine makes while it works, besides what every program makes. (Without
/// `mmap`, `malloc` itself fails now and then, and the allocation that meets it ends a Rust program.)
const NEEDED: [(&str, i64); 15] = [
    ("ioctl", libc::SYS_ioctl),
    ("munmap", libc::SYS_munmap),
    ("mremap", libc::SYS_mremap),
    ("madvise", libc::SYS_madvise),
    ("fallocate", libc::SYS_fallocate),
    ("ftruncate", libc::SYS_ftruncate),
    ("pwrite64", libc::SYS_pwrite64),
    ("memfd_create", libc::SYS_memfd_create),
    ("userfaultfd", libc::SYS_userfaultfd),
    ("fcntl", libc::SYS_fcntl),
    ("openat", libc::SYS_openat),
    ("getdents64", libc::SYS_getdents64),
    ("get_robust_list", libc::SYS_get_robust_list),
    ("clone3", libc::SYS_clone3),
    ("poll", libc::SYS_poll),
];

/// Goal: a filter that forbids one of the engine's system calls in mid life, in all threads at once,
/// costs no byte and makes nobody wait: pages stay as they are, and the engine says what it may not do.
fn system_calls_are_forbidden_in_mid_life() {
    for (name, number) in NEEDED {
        let number = number.to_string();
        let variables = [("PAGEMERGE_FORBIDDEN", number.as_str())];
        let mut told = String::new();
        for _ in 0..rounds() {
            let ended = scenario_with("works_under_a_filter", &variables).end(limit());
            assert!(
                !ended.hung,
                "{name}: hangs\n{}\n{}",
                ended.where_it_hung, ended.output
            );
            assert!(
                ended.status.success(),
                "{name}: {}\n{}",
                ended.status,
                ended.output
            );
            told = ended.output;
        }
        for line in told.lines().filter(|line| line.starts_with("figure: ")) {
            println!("figure: {name}: {}", &line[8..]);
        }
    }
}

/// More where there is time.
fn rounds() -> u32 {
    if os::stress_time() > Duration::from_secs(30) {
        20
    } else {
        1
    }
}

fn works_under_a_filter() {
    let number = std::env::var("PAGEMERGE_FORBIDDEN").expect("a system call");
    let number = number.parse().expect("its number");
    let busy = Busy::start(&Plan::default());
    busy.goes_on(500, "merging before the filter");
    os::forbid(&[number], os::Denied::Fails, true).expect("a filter");
    std::thread::sleep(Duration::from_millis(150));
    busy.assert_alive();
    let rest = busy.stop_writing();
    rest.check("under the filter");
    let told = rest
        .engine
        .stats()
        .map(|stats| (support::engines::reasons(&stats), stats.last_error));
    println!("figure: {told:?}");
    let closed = rest.engine.close();
    println!(
        "figure: close: {}",
        closed.map_or_else(|e| e.to_string(), |()| "done".into())
    );
    rest.check("when the engine was closed under the filter");
    // Nobody may rely on a destructor here.
    std::process::exit(0);
}

/// A page that is under watch until it is quiet is write-protected, and the helper lets its writer go on
/// by an ioctl. When a filter forbade ioctls in mid life the writer waited for ever.
fn watched_page_can_be_written_when_ioctl_is_forbidden() {
    let memory = Memory::new(64);
    support::engines::fill(&memory, 4);
    let engine = Engine::new(EngineSettings {
        quiet_millisecs: 600_000,
        ..support::engines::settings()
    });
    let engine = engine.expect("an engine");
    support::engines::register(&engine, &memory);
    support::engines::merge(&engine);
    for page in 0..16 {
        memory.store(page, 7, 1);
    }
    support::engines::merge(&engine);
    assert!(
        os::entry(memory.at(3)).is_protected(),
        "this proves nothing: no watch"
    );
    os::forbid(&[libc::SYS_ioctl], os::Denied::Fails, true).expect("a filter");
    for page in 0..16 {
        memory.store(page, 7, 2);
        assert_eq!(memory.load(page, 7), 2);
    }
    let _ = engine.close();
    for page in 0..16 {
        assert_eq!(memory.load(page, 7), 2);
    }
    std::process::exit(0);
}

/// Goal: a filter that kills for one of the engine's system calls ends the program as such a filter
/// says, with nobody left waiting; installed for the program's own threads only it harms nothing.
fn filter_that_kills() {
    use std::os::unix::process::ExitStatusExt;
    let ended = scenario("dies_by_a_filter").end(limit());
    assert!(!ended.hung, "hangs\n{}", ended.where_it_hung);
    assert_eq!(ended.status.signal(), Some(libc::SIGSYS), "{ended:?}");
    scenario("works_beside_a_filter")
        .end(limit())
        .expect_success();
}

fn dies_by_a_filter() {
    let busy = Busy::start(&Plan::default());
    busy.goes_on(500, "merging before the filter");
    os::forbid(&[libc::SYS_ioctl], os::Denied::Kills, true).expect("a filter");
    loop {
        busy.assert_alive();
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn works_beside_a_filter() {
    let busy = Busy::start(&Plan::default());
    busy.goes_on(500, "merging before the filter");
    let engines = [
        libc::SYS_ioctl,
        libc::SYS_userfaultfd,
        libc::SYS_memfd_create,
    ];
    os::forbid(&engines, os::Denied::Kills, false).expect("a filter");
    busy.goes_on(500, "merging while this thread is filtered");
    busy.finish().tell();
    // Another one: everything that it needs is done by the merging thread.
    let busy = Busy::start(&Plan::default());
    busy.goes_on(500, "merging by a new engine of a filtered thread");
    busy.finish().tell();
}

/// Goal: a thread that locks itself in (Landlock) takes no sight from a merging thread that runs
/// already; an engine that is started behind the lock says by name what it may not open.
fn landlock_in_mid_life() {
    scenario("engine_begins_behind_landlock")
        .end(limit())
        .expect_success();
    let busy = Busy::start(&Plan::default());
    busy.goes_on(500, "merging");
    os::lock_in().expect("Landlock");
    busy.goes_on(500, "merging while its owner is locked in");
    let rest = busy.stop_writing();
    rest.check("locked in");
    rest.engine.close().expect("closed");
    rest.check("closed, locked in");
}

fn engine_begins_behind_landlock() {
    os::lock_in().expect("Landlock");
    match Engine::new(support::engines::settings()) {
        Ok(engine) => println!("figure: it works: {engine:?}"),
        Err(error) => println!("figure: {error}"),
    }
}

fn main() -> ExitCode {
    use support::Need;
    support::run(vec![
        case!(khugepaged_works_on_the_same_memory)
            .needs(Need::Root)
            .needs(Need::HugePages)
            .seconds(7200),
        case!(memory_is_compacted).needs(Need::Root).seconds(7200),
        case!(ksmd_merges_the_same_memory)
            .needs(Need::Root)
            .needs(Need::KernelKsm)
            .seconds(7200),
        case!(works_beside_ksmd).hidden(),
        case!(works_beside_ksmd_untracked).hidden(),
        case!(memory_is_swapped_and_swap_is_taken_away)
            .needs(Need::Zram)
            .seconds(7200),
        case!(works_while_swapped).hidden(),
        case!(user_barrier_holds_the_programs_own_writers).seconds(7200),
        case!(no_barrier_needs_calm_during_calls_only).seconds(7200),
        case!(odd_memory_is_refused_by_name),
        case!(owner_advises_all_kinds_of_things).seconds(7200),
        case!(programs_own_userfaultfd_next_door).seconds(7200),
        case!(rights_are_dropped_in_mid_life).needs(Need::Root),
        case!(proc_vanishes_in_mid_life).needs(Need::Root),
        case!(system_calls_are_forbidden_in_mid_life).seconds(7200),
        case!(works_under_a_filter).hidden(),
        case!(watched_page_can_be_written_when_ioctl_is_forbidden).seconds(20),
        case!(filter_that_kills),
        case!(dies_by_a_filter).hidden(),
        case!(works_beside_a_filter).hidden(),
        case!(landlock_in_mid_life),
        case!(engine_begins_behind_landlock).hidden(),
        case!(works_beside_khugepaged).hidden(),
        case!(works_beside_khugepaged_untracked).hidden(),
    ])
}
