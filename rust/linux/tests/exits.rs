//! Ends and beginnings: stopping, dropping, closing and exiting in the middle of work, several
//! engines at once, settings that change while pages are merged, and engines in fork children.

mod support;

use pagemerge_linux::core::{RunMode, SettingError};
use pagemerge_linux::{Barrier, Engine, EngineSettings, Error, Remerge};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use support::engines::{
    assert_filled, content, engine, fill, merge, merged, merged_pages, register, scan, settings,
    try_register,
};
use support::os::{self, Memory, Random};
use support::{case, scenario};

const CONTENTS: usize = 8;

/// Memory that never comes to rest: whoever merges it has always something to do.
fn churn(memory: &Arc<Memory>, stop: &Arc<AtomicBool>) -> thread::JoinHandle<()> {
    let (memory, stop) = (Arc::clone(memory), Arc::clone(stop));
    thread::spawn(move || {
        let mut random = Random::new(os::seed());
        while !stop.load(Ordering::Relaxed) {
            for _ in 0..64 {
                let page = random.below(memory.pages());
                let right = os::word_of(content(page, CONTENTS), 30);
                memory.store(page, 30, !right);
                memory.store(page, 30, right);
            }
            thread::sleep(Duration::from_micros(500));
        }
    })
}

/// Goal: whoever stops an engine does not wait for its pass. 100 ms are the aim; a noisy machine is
/// given ten times as much before it counts.
fn stop_at_full_speed_returns_soon() {
    let memory = Arc::new(Memory::new(64 << 10));
    fill(&memory, 1000);
    let engine = engine(Remerge::Always);
    register(&engine, &memory);
    let stop = Arc::new(AtomicBool::new(false));
    let writer = {
        let (memory, stop) = (Arc::clone(&memory), Arc::clone(&stop));
        thread::spawn(move || {
            let mut random = Random::new(os::seed());
            while !stop.load(Ordering::Relaxed) {
                let page = random.below(memory.pages());
                memory.store(page, 3, random.next());
            }
        })
    };
    let mut worst = Duration::ZERO;
    for round in 0..20_u64 {
        engine.start().expect("a barrier");
        thread::sleep(Duration::from_millis(30 + 13 * round));
        let begun = Instant::now();
        engine.stop().expect("stopped");
        worst = worst.max(begun.elapsed());
        let scanned = engine.stats().expect("stats").core.pages_scanned;
        thread::sleep(Duration::from_millis(5));
        assert_eq!(
            engine.stats().expect("stats").core.pages_scanned,
            scanned,
            "it goes on"
        );
    }
    stop.store(true, Ordering::Relaxed);
    writer.join().expect("no panic");
    assert!(
        engine.stats().expect("stats").core.pages_merged > 0,
        "this proved nothing"
    );
    println!("figure: the slowest of 20 stops took {worst:?} (aim: 100 ms)");
    assert!(worst < Duration::from_secs(1), "stop took {worst:?}");
}

/// Goal: no memory is let go merged. The last handle un-merges, also while the background works.
fn engine_dropped_in_the_background_unmerges_everything() {
    let memory = Arc::new(Memory::new(2048));
    fill(&memory, CONTENTS);
    let stop = Arc::new(AtomicBool::new(false));
    let writer = churn(&memory, &stop);
    for _ in 0..5 {
        let engine = engine(Remerge::Always);
        register(&engine, &memory);
        engine.start().expect("a barrier");
        os::wait_for("merging", || {
            engine.stats().expect("stats").core.pages_merged > 1000
        });
        let clone = engine.clone();
        drop(engine);
        assert!(clone.stats().is_ok(), "a clone keeps it alive");
        drop(clone);
        assert_eq!(merged_pages(&memory), 0, "the last handle un-merges");
    }
    stop.store(true, Ordering::Relaxed);
    writer.join().expect("no panic");
    assert_filled(&memory, CONTENTS, "after five engines");
}

fn running() -> (Arc<Memory>, Engine) {
    let memory = Arc::new(Memory::new(2048));
    fill(&memory, CONTENTS);
    let engine = engine(Remerge::Always);
    register(&engine, &memory);
    engine.start().expect("a barrier");
    // It stays with the process.
    let _ = churn(&memory, &Arc::new(AtomicBool::new(false)));
    os::wait_for("merging", || {
        engine.stats().expect("stats").core.pages_merged > 1000
    });
    (memory, engine)
}

fn exits_by_exit() {
    let _kept = running();
    std::process::exit(7);
}

fn exits_by_panic() {
    let _kept = running();
    panic!("on purpose");
}

fn exits_by_return() {
    let kept = running();
    // As an interpreter does that never comes to drop its objects.
    std::mem::forget(kept);
}

fn exits_by_signal() {
    let _kept = running();
    os::kill(
        i32::try_from(std::process::id()).expect("a process number"),
        libc::SIGTERM,
    );
    thread::sleep(Duration::from_secs(100));
}

/// Goal: a process can end at any moment, with its own exit code, and does not hang.
fn process_ends_while_the_background_runs() {
    use std::os::unix::process::ExitStatusExt;
    let limit = Duration::from_secs(60);
    for _ in 0..3 {
        let ended = scenario("exits_by_exit").end(limit);
        assert!(!ended.hung && ended.status.code() == Some(7), "{ended:?}");
        let ended = scenario("exits_by_panic").end(limit);
        assert!(!ended.hung && ended.status.code() == Some(101), "{ended:?}");
        let ended = scenario("exits_by_return").end(limit);
        assert!(!ended.hung && ended.status.code() == Some(0), "{ended:?}");
        let ended = scenario("exits_by_signal").end(limit);
        assert!(
            !ended.hung && ended.status.signal() == Some(libc::SIGTERM),
            "{ended:?}"
        );
    }
}

/// Goal: engines are independent: what one merges, un-merges or forgets is nothing to the other.
fn two_engines_work_side_by_side() {
    let (first, second) = (Memory::new(1024), Memory::new(1024));
    fill(&first, CONTENTS);
    fill(&second, CONTENTS);
    let (a, b) = (engine(Remerge::Always), engine(Remerge::Quiet));
    register(&a, &first);
    let region = register(&b, &second);
    a.start().expect("a barrier");
    b.start().expect("a barrier");
    os::wait_for("both to merge", || {
        merged_pages(&first) > 1000 && merged_pages(&second) > 1000
    });
    assert_eq!(
        frames_in_common(&first, &second),
        0,
        "two engines share frames"
    );
    assert!(
        try_register(&a, second.addr(), second.len(), "").is_err(),
        "the other's memory"
    );
    b.unregister(region).expect("un-merged");
    assert_eq!(merged_pages(&second), 0);
    assert!(
        merged_pages(&first) > 1000,
        "the other one's are as they were"
    );
    b.close().expect("closed");
    assert!(matches!(b.stats(), Err(Error::Closed)));
    assert!(matches!(b.unregister(region), Err(Error::Closed)));
    b.close().expect("closing twice is fine");
    assert_filled(&first, CONTENTS, "one engine");
    assert_filled(&second, CONTENTS, "the other");
    a.close().expect("closed");
    assert_filled(&first, CONTENTS, "after both");
}

fn frames_in_common(first: &Memory, second: &Memory) -> usize {
    let numbers = |memory: &Memory| -> std::collections::HashSet<u64> {
        // Frames are in the page tables of those who have read them.
        for page in 0..memory.pages() {
            let _ = memory.load(page, 0);
        }
        os::entries(memory)
            .iter()
            .filter(|e| e.is_present())
            .map(|e| e.frame_number())
            .collect()
    };
    let (first, second) = (numbers(first), numbers(second));
    assert!(
        !first.is_empty() && !first.contains(&0),
        "page frame numbers are readable"
    );
    first.intersection(&second).count()
}

/// Goal: contents of different security domains never share a frame, looked at in the page tables;
/// those of one domain do.
fn domains_never_share_frames() {
    let memories: Vec<_> = (0..3).map(|_| Memory::new(512)).collect();
    for memory in &memories {
        fill(memory, CONTENTS);
    }
    let engine = engine(Remerge::Always);
    for (memory, domain) in memories.iter().zip(["red", "blue", "red"]) {
        try_register(&engine, memory.addr(), memory.len(), domain).expect("registered");
    }
    let stats = merge(&engine);
    assert_eq!(stats.core.pages_shared, 2 * CONTENTS as u64);
    assert_eq!(
        frames_in_common(&memories[0], &memories[1]),
        0,
        "two domains share frames"
    );
    assert_eq!(
        frames_in_common(&memories[2], &memories[1]),
        0,
        "two domains share frames"
    );
    assert_eq!(
        frames_in_common(&memories[0], &memories[2]),
        CONTENTS,
        "one domain is one"
    );
    for memory in &memories {
        assert_filled(memory, CONTENTS, "merged in domains");
    }
}

/// Goal: settings may be changed at any time; what cannot be changed now is refused as a whole.
fn settings_change_while_running() {
    let memory = Arc::new(Memory::new(2048));
    fill(&memory, CONTENTS);
    let engine = engine(Remerge::Always);
    register(&engine, &memory);
    let stop = Arc::new(AtomicBool::new(false));
    let writer = churn(&memory, &stop);
    engine.start().expect("a barrier");
    os::wait_for("merging", || {
        engine.stats().expect("stats").core.pages_merged > 1000
    });
    let mut random = Random::new(os::seed());
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(3) {
        let mut new = engine.settings().expect("settings");
        new.scan.pages_to_scan = 1 + u32::try_from(random.below(5000)).expect("small");
        new.scan.sleep_millisecs = u32::try_from(random.below(3)).expect("small");
        new.scan.smart_scan = random.below(2) == 0;
        new.scan.use_zero_pages = random.below(2) == 0;
        new.remerge = [Remerge::Always, Remerge::Quiet, Remerge::Never][random.below(3)];
        new.quiet_millisecs = 1 + u32::try_from(random.below(20)).expect("small");
        new.max_pause_micros = 1 + u32::try_from(random.below(300)).expect("small");
        new.threads = 1 + u32::try_from(random.below(3)).expect("small");
        engine
            .set(new.clone())
            .expect("these can be changed at any time");
        assert_eq!(engine.settings().expect("settings"), new);
        let wrong = EngineSettings {
            max_pause_micros: 0,
            ..new.clone()
        };
        assert!(matches!(
            engine.set(wrong),
            Err(Error::Setting(SettingError::Invalid { .. }))
        ));
        let fixed = EngineSettings {
            barrier: Some(Barrier::None),
            ..new.clone()
        };
        assert!(matches!(
            engine.set(fixed),
            Err(Error::Setting(SettingError::Busy { .. }))
        ));
        let mut sharing = new.clone();
        sharing.scan.max_page_sharing = 17;
        if engine.stats().expect("stats").core.pages_shared > 0 {
            assert!(matches!(
                engine.set(sharing),
                Err(Error::Setting(SettingError::Busy { .. }))
            ));
        }
        assert_eq!(
            engine.settings().expect("settings"),
            new,
            "an error changes nothing"
        );
        thread::sleep(Duration::from_millis(5));
    }
    stop.store(true, Ordering::Relaxed);
    writer.join().expect("no panic");
    assert_eq!(engine.stats().expect("stats").last_error, None);
    assert_eq!(engine.run().expect("alive"), RunMode::Merge);
    engine.close().expect("closed");
    assert_filled(&memory, CONTENTS, "after all these settings");
}

/// Goal: without anything that keeps pages still there is no background merging, and it says so.
fn background_without_a_barrier_is_refused() {
    let none = Engine::new(EngineSettings {
        barrier: Some(Barrier::None),
        ..settings()
    });
    let none = none.expect("merging while nobody writes needs no barrier");
    assert!(matches!(none.start(), Err(Error::NeedsBarrier { .. })));
    let memory = Memory::new(256);
    fill(&memory, CONTENTS);
    let region = register(&none, &memory);
    merge(&none);
    assert!(merged_pages(&memory) > 200, "{}", merged_pages(&memory));
    assert_filled(&memory, CONTENTS, "merged by the caller's promise");
    none.unregister(region).expect("un-merged");
    assert_filled(&memory, CONTENTS, "un-merged");
}

/// Goal: in a fork child the parent's engine says so, and dropping it does nothing to anybody; the
/// child may make an engine of its own, and merge.
fn fork_child_leaves_the_parents_engine_alone_and_makes_its_own() {
    let memory = Memory::new(512);
    fill(&memory, CONTENTS);
    let engine = engine(Remerge::Always);
    let region = register(&engine, &memory);
    engine.start().expect("a barrier");
    os::wait_for("merging", || merged_pages(&memory) > 500);
    for round in 0..3 {
        let theirs = engine.clone();
        let child = os::fork(|| {
            let refused = [
                theirs.stats().err(),
                theirs.start().err(),
                theirs.unregister(region).err(),
                theirs.close().err(),
                theirs.settings().err(),
            ];
            for error in refused {
                assert!(matches!(error, Some(Error::Forked)), "{error:?}");
            }
            // Not the last handle here, so the drop of the last one is tried as well.
            drop(theirs);
            assert_filled(&memory, CONTENTS, "in the child");
            let own = support::engines::engine(Remerge::Always);
            let fresh = Memory::new(256);
            fill(&fresh, CONTENTS);
            register(&own, &fresh);
            merge(&own);
            assert!(
                merged_pages(&fresh) > 200,
                "the child merges: {}",
                merged_pages(&fresh)
            );
            assert_filled(&fresh, CONTENTS, "the child's own");
            own.start().expect("a barrier");
            own.close().expect("closed");
            assert_filled(&fresh, CONTENTS, "the child's own, un-merged");
            assert_filled(&memory, CONTENTS, "the parent's, in the child");
            0
        });
        assert_eq!(child.wait(), 0, "the child, round {round}");
        assert_filled(&memory, CONTENTS, "in the parent");
    }
    assert!(engine.stats().is_ok());
    engine.stop().expect("stopped");
    // The only handle, dropped in a child that then ends as a program does.
    let child = os::fork(move || {
        drop(engine);
        0
    });
    assert_eq!(child.wait(), 0);
    assert_filled(&memory, CONTENTS, "after a child dropped the engine");
}

/// Goal: a child's memory that its parent merged can be merged by the child's own engine, or is
/// refused by name; its bytes stay in either case.
fn fork_child_registers_what_its_parent_merged() {
    let memory = Memory::new(512);
    fill(&memory, CONTENTS);
    let engine = engine(Remerge::Always);
    register(&engine, &memory);
    merge(&engine);
    let child = os::fork(|| {
        let own = support::engines::engine(Remerge::Always);
        match try_register(&own, memory.addr(), memory.len(), "") {
            Ok(region) => {
                merge(&own);
                assert_filled(&memory, CONTENTS, "merged by the child");
                own.unregister(region).expect("un-merged");
            }
            Err(Error::NotMergeable { reason, .. }) => println!("figure: refused: {reason}"),
            Err(other) => panic!("{other}"),
        }
        own.close().expect("closed");
        assert_filled(&memory, CONTENTS, "in the child");
        0
    });
    assert_eq!(child.wait(), 0);
    assert_filled(&memory, CONTENTS, "in the parent");
    assert!(merged(&memory)[0], "the parent's pages are merged still");
}

/// Goal: a child of a child, each with an engine: epochs do not get mixed up.
fn engines_over_three_generations_of_processes() {
    let child = os::fork(|| {
        let first = support::engines::engine(Remerge::Always);
        let memory = Memory::new(256);
        fill(&memory, CONTENTS);
        register(&first, &memory);
        merge(&first);
        let grandchild = os::fork(|| {
            assert!(matches!(first.stats(), Err(Error::Forked)));
            let second = support::engines::engine(Remerge::Always);
            let fresh = Memory::new(256);
            fill(&fresh, CONTENTS);
            register(&second, &fresh);
            merge(&second);
            assert!(merged_pages(&fresh) > 200);
            assert_filled(&memory, CONTENTS, "the child's memory in the grandchild");
            0
        });
        let code = grandchild.wait();
        assert!(first.stats().is_ok(), "the child's engine is alive");
        assert_filled(&memory, CONTENTS, "in the child");
        code
    });
    assert_eq!(child.wait(), 0);
}

/// Goal: synchronous passes and the background share one engine without waiting for each other, and
/// a caller can stop between slices.
fn passes_beside_the_background_can_be_interrupted() {
    let memory = Memory::new(32 << 10);
    fill(&memory, 4000);
    let engine = engine(Remerge::Always);
    let region = register(&engine, &memory);
    let mut slices = 0;
    let stopped = engine.scan(None, &mut || {
        slices += 1;
        slices < 3
    });
    assert!(matches!(stopped, Err(Error::Interrupted)), "{stopped:?}");
    engine.start().expect("a barrier");
    let others: Vec<_> = (0..3)
        .map(|_| {
            let engine = engine.clone();
            thread::spawn(move || {
                for _ in 0..5 {
                    scan(&engine);
                    engine.region_stats(region).expect("registered");
                }
            })
        })
        .collect();
    for other in others {
        other.join().expect("no panic");
    }
    engine.set_run(RunMode::Unmerge).expect("un-merged");
    assert_eq!(merged_pages(&memory), 0);
    engine.start().expect("merging again");
    os::wait_for("merging again", || merged_pages(&memory) > 30_000);
    engine.close().expect("closed");
    assert_filled(&memory, 4000, "after everything");
}

/// Goal: `forget` gives memory up at once, while everything runs: it reads as zero where it was
/// merged, and can be registered again.
fn forgotten_region_reads_zero_where_it_was_merged() {
    let (memory, other) = (Memory::new(512), Memory::new(512));
    fill(&other, CONTENTS);
    let engine = engine(Remerge::Always);
    register(&engine, &other);
    engine.start().expect("a barrier");
    for round in 0..10 {
        fill(&memory, CONTENTS);
        let region = register(&engine, &memory);
        os::wait_for("merging", || merged_pages(&memory) > 500);
        engine.forget(region).expect("registered");
        assert!(matches!(
            engine.unregister(region),
            Err(Error::NotRegistered)
        ));
        for page in 0..memory.pages() {
            let zero = memory.shows(page, 0);
            assert!(
                zero || memory.shows(page, content(page, CONTENTS)),
                "round {round}: page {page}"
            );
        }
        assert_eq!(merged_pages(&memory), 0, "round {round}");
        memory
            .advise(libc::MADV_DONTNEED)
            .expect("the owner's own call");
        for page in 0..memory.pages() {
            memory.assert_shows(page, 0, "discarded after being forgotten");
        }
    }
    assert_filled(&other, CONTENTS, "the other region");
}

fn main() -> ExitCode {
    use support::Need;
    support::run(vec![
        case!(stop_at_full_speed_returns_soon),
        case!(engine_dropped_in_the_background_unmerges_everything),
        case!(process_ends_while_the_background_runs).seconds(300),
        case!(exits_by_exit).hidden(),
        case!(exits_by_panic).hidden(),
        case!(exits_by_return).hidden(),
        case!(exits_by_signal).hidden(),
        case!(two_engines_work_side_by_side).needs(Need::Root),
        case!(domains_never_share_frames).needs(Need::Root),
        case!(settings_change_while_running),
        case!(background_without_a_barrier_is_refused),
        case!(fork_child_leaves_the_parents_engine_alone_and_makes_its_own),
        case!(fork_child_registers_what_its_parent_merged),
        case!(engines_over_three_generations_of_processes),
        case!(passes_beside_the_background_can_be_interrupted),
        case!(forgotten_region_reads_zero_where_it_was_merged),
    ])
}
