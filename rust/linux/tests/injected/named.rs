//! Faults that have a name: each its own test.

use crate::life::{EVER, PAGES, assert_reads_right, content, filled, filled_with, registered};
use crate::random::still_right;
use crate::sites::{PROCESS_ONLY, fail};
use crate::support::engines::{self, engine, merge, reasons, register, scan, settings, skipped};
use crate::support::faults::ANSWERS;
use crate::support::os::{self, Memory, page_size};
use crate::support::scenario_with;
use pagemerge_linux::core::Reason;
use pagemerge_linux::inject::{self, Effect, Plan};
use pagemerge_linux::{Engine, Remerge};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

/// Goal: a frame store that is full is a reason, not an error, and nothing is lost.
pub(super) fn full_frame_store_is_a_reason() {
    let memory = filled();
    let engine = engine(Remerge::Quiet);
    register(&engine, &memory);
    scan(&engine);
    inject::arm("Pwrite", libc::ENOSPC, 0, EVER);
    let stats = merge(&engine);
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

/// What broke: where registering failed half-way, and so did taking it back, the memory stayed with our own
/// userfaultfd, and was refused as another's for ever after. Goal: the next call takes it back.
pub(super) fn registering_that_fails_half_way_is_taken_back() {
    let memory = filled();
    let engine = engine(Remerge::Quiet);
    inject::arm_plan(&Plan {
        effect: Effect::Lie(libc::ENOMEM),
        ..fail("UffdRegister", "Register", 0, 0, 1)
    });
    inject::arm_plan(&fail("UffdUnregister", "Register", libc::EINVAL, 0, 1));
    let refused = engines::try_register(&engine, memory.addr(), memory.len(), "");
    let said = refused.expect_err("it fails").to_string();
    assert!(said.contains("UFFDIO_REGISTER"), "{said}");
    inject::disarm_all();
    register(&engine, &memory);
    assert!(merge(&engine).core.pages_sharing > 0);
    assert_reads_right(&memory, "registered after all");
}

/// What broke: a window whose pages could be put back neither by moving nor by copying (memory that
/// stays short), for as long as that lasted, went round for ever, and so did whoever touched them. Goal:
/// they are carried home by `mremap`.
pub(super) fn pages_that_nothing_else_takes_back_are_carried() {
    let memory = filled();
    let engine = engine(Remerge::Quiet);
    let region = register(&engine, &memory);
    scan(&engine);
    inject::arm("MmapFrames", libc::EPERM, 0, EVER);
    for (call, errno) in [("UffdMove", libc::EBUSY), ("UffdCopy", libc::ENOMEM)] {
        inject::arm_plan(&fail(call, "WindowClose", errno, 0, EVER));
    }
    merge(&engine);
    inject::disarm_all();
    let struck = |wanted: &str| -> u64 {
        let rows = inject::table().into_iter();
        rows.filter(|(call, phase, ..)| *call == wanted && *phase == "WindowClose")
            .map(|(_, _, _, struck)| struck)
            .sum()
    };
    assert!(struck("UffdCopy") > 0, "no copy was refused");
    assert_reads_right(&memory, "carried");
    let stats = merge(&engine);
    assert!(stats.core.pages_sharing > 0, "{:?}", reasons(&stats));
    engine.unregister(region).expect("un-merged");
    assert_reads_right(&memory, "un-merged");
}

/// The memory that [`tear_holes`] looks at.
pub(super) static TORN: (AtomicUsize, AtomicUsize) = (AtomicUsize::new(0), AtomicUsize::new(0));
pub(super) static HOLES: AtomicU64 = AtomicU64::new(0);

/// Unmaps every page of [`TORN`] that is away in a window: what the kernel leaves behind when memory
/// runs out in the middle of mapping over something.
pub(super) fn tear_holes() {
    let (start, pages) = (TORN.0.load(Ordering::SeqCst), TORN.1.load(Ordering::SeqCst));
    for page in 0..pages {
        let at = start + page * page_size();
        let entry = os::entry(at);
        if !entry.is_present() && !entry.is_swapped() {
            os::call(libc::SYS_munmap, &[at, page_size()]).expect("a hole");
            HOLES.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// Unmaps all of [`TORN`] but its first page.
pub(super) fn tear_the_rest() {
    let (start, pages) = (TORN.0.load(Ordering::SeqCst), TORN.1.load(Ordering::SeqCst));
    let len = (pages - 1) * page_size();
    os::call(libc::SYS_munmap, &[start + page_size(), len]).expect("a hole");
    HOLES.fetch_add(1, Ordering::SeqCst);
}

/// Goal: ENOMEM from `mmap` after the old mapping is gone (finding F11) loses nothing: the hole is filled
/// before anybody sees it. Method: the injected call really unmaps the pages, and then fails.
pub(super) fn hole_that_mapping_a_frame_left_is_filled() {
    for times in [1, 3, 20] {
        let memory = filled();
        let engine = engine(Remerge::Quiet);
        let region = register(&engine, &memory);
        scan(&engine);
        TORN.0.store(memory.addr(), Ordering::SeqCst);
        TORN.1.store(PAGES, Ordering::SeqCst);
        HOLES.store(0, Ordering::SeqCst);
        inject::on_strike(tear_holes);
        inject::arm_plan(&Plan {
            call: "MmapFrames",
            phase: None,
            effect: Effect::Instead(libc::ENOMEM),
            skip: 0,
            times,
        });
        let stats = merge(&engine);
        inject::disarm_all();
        assert!(
            HOLES.load(Ordering::SeqCst) > 0,
            "no hole: this proved nothing"
        );
        assert!(stats.core.pages_sharing > 0, "{:?}", reasons(&stats));
        assert_reads_right(&memory, "after holes");
        engine.unregister(region).expect("un-merged");
        assert_reads_right(&memory, "un-merged after holes");
    }
}

/// The same when un-merging: `mremap` takes the merged pages away and then finds no memory.
pub(super) fn hole_that_unmerging_left_is_filled() {
    let memory = Memory::new(9);
    memory.fill(0, 7);
    (1..9).for_each(|page| memory.fill(page, 99));
    let engine = engine(Remerge::Quiet);
    let region = register(&engine, &memory);
    merge(&engine);
    assert_eq!(engines::merged_pages(&memory), 8, "{:?}", engine.stats());
    TORN.0.store(memory.addr(), Ordering::SeqCst);
    TORN.1.store(9, Ordering::SeqCst);
    HOLES.store(0, Ordering::SeqCst);
    inject::on_strike(tear_the_rest);
    inject::arm_plan(&Plan {
        call: "Mremap",
        phase: None,
        effect: Effect::Instead(libc::ENOMEM),
        skip: 0,
        times: 3,
    });
    engine.unregister(region).expect("un-merged");
    inject::disarm_all();
    assert!(
        HOLES.load(Ordering::SeqCst) > 0,
        "no hole: this proved nothing"
    );
    memory.assert_shows(0, 7, "un-merged");
    (1..9).for_each(|page| memory.assert_shows(page, 99, "un-merged"));
}

/// Goal: moves that the kernel refuses because a page is busy, or because the address space is being
/// changed, are a reason, and end when that ends.
pub(super) fn busy_moves_are_a_reason() {
    for errno in [libc::EBUSY, libc::EAGAIN] {
        let memory = filled();
        let engine = engine(Remerge::Quiet);
        register(&engine, &memory);
        inject::arm("UffdMove", errno, 0, EVER);
        let stats = merge(&engine);
        // Zero pages need no move to stay what they are; nothing else is merged.
        assert_eq!(stats.core.pages_sharing, 0, "{errno}");
        assert!(
            skipped(&stats, Reason::Pinned) > 0,
            "{errno}: {:?}",
            reasons(&stats)
        );
        assert_reads_right(&memory, "moves are refused");
        inject::disarm_all();
        let stats = merge(&engine);
        assert!(
            stats.core.pages_sharing > 0,
            "{errno}: {:?}",
            reasons(&stats)
        );
        assert_reads_right(&memory, "moves work again");
    }
}

/// Goal: signals everywhere change nothing. Method: every call that a signal can cut short is, three
/// times, a dozen calls at a time.
pub(super) fn interruptions_everywhere_change_nothing() {
    let whole = [
        "Enter",
        "Atfork",
        "Sigmask",
        "SpawnMerging",
        "SpawnHelper",
        "SpawnHashing",
    ];
    let calls: Vec<_> = inject::calls()
        .filter(|call| !whole.contains(call))
        .collect();
    for group in calls.chunks(12) {
        let memory = filled();
        inject::disarm_all();
        for call in group {
            inject::arm_plan(&Plan {
                call,
                phase: None,
                effect: Effect::Fail(libc::EINTR),
                skip: 0,
                times: 3,
            });
        }
        let engine = engine(Remerge::Quiet);
        let region = register(&engine, &memory);
        let stats = merge(&engine);
        assert_reads_right(&memory, "interrupted");
        assert!(
            stats.core.pages_sharing > 0,
            "{group:?}: {:?}",
            reasons(&stats)
        );
        engine.unregister(region).expect("un-merged");
        engine.close().expect("closed");
        assert_reads_right(&memory, "un-merged");
        inject::disarm_all();
    }
}

/// The window left its pages registered for missing pages when `UFFDIO_UNREGISTER` failed otherwise than
/// for lack of memory: whoever touched a page there after discarding it waited for ever.
pub(super) fn window_that_could_not_be_closed_is_closed_before_pages_are_discarded() {
    let memory = filled();
    let engine = engine(Remerge::Quiet);
    let region = register(&engine, &memory);
    scan(&engine);
    // Frames cannot be mapped, so windows put their pages back, and then are not closed.
    inject::arm("MmapFrames", libc::EPERM, 0, EVER);
    inject::arm("UffdUnregister", libc::EINVAL, 0, EVER);
    merge(&engine);
    assert_ne!(
        registered(&memory, "um"),
        [""; 0],
        "nothing was left open: this proved nothing"
    );
    let refused = engine.discard(memory.addr(), memory.len());
    let said = refused.expect_err("pages would become traps").to_string();
    assert!(
        said.contains("UFFDIO_UNREGISTER") && said.contains("os error 22"),
        "{said}"
    );
    let refused = engine.unregister(region).expect_err("the same");
    assert!(refused.to_string().contains("os error 22"), "{refused}");
    assert_reads_right(&memory, "not closed");
    inject::disarm_all();
    engine
        .discard(memory.at(16), 16 * page_size())
        .expect("discarded");
    (16..32).for_each(|page| memory.assert_shows(page, 0, "discarded"));
    scan(&engine);
    assert_eq!(
        registered(&memory, "um"),
        [""; 0],
        "a pass closes what is left"
    );
    engine.unregister(region).expect("un-merged");
}

/// A filter that forbids every ioctl while a window is open: its pages were offered to their places for
/// ever, and whoever waited for them, too.
pub(super) fn window_in_which_every_ioctl_becomes_forbidden_gives_its_pages_back() {
    const IOCTLS: [&str; 7] = [
        "UffdMove",
        "UffdCopy",
        "UffdZeropage",
        "UffdRegister",
        "UffdUnregister",
        "UffdWake",
        "PagemapScan",
    ];
    for opened in [1, 4, 9] {
        let memory = Arc::new(filled());
        let engine = engine(Remerge::Never);
        let region = register(&engine, &memory);
        scan(&engine);
        let stop = Arc::new(AtomicBool::new(false));
        let reader = {
            let (memory, stop) = (Arc::clone(&memory), Arc::clone(&stop));
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    for page in 0..PAGES {
                        let _ = memory.load(page, 9);
                    }
                }
            })
        };
        // Frames cannot be mapped, so that everything has to go back; from some window on that is
        // forbidden.
        inject::arm("MmapFrames", libc::EPERM, 0, EVER);
        let strikes = inject::strikes();
        let plan = |call, phase, skip| Plan {
            call,
            phase,
            effect: Effect::Fail(libc::EPERM),
            skip,
            times: EVER,
        };
        let before = ["MremapPages", "UffdEnd"].map(inject::seen);
        inject::arm("UffdEnd", libc::EBUSY, 0, 2);
        // Not before pages have been moved out: what begins in a window's closing stays.
        inject::arm_plan(&plan("UffdMove", Some("WindowClose"), opened));
        for call in &IOCTLS[1..] {
            inject::arm_plan(&plan(call, Some("WindowClose"), 0));
        }
        (0..3).for_each(|_| drop(engine.scan(None, &mut || true)));
        assert!(
            inject::strikes() > strikes + 4,
            "it was not forbidden in time"
        );
        assert_reads_right(&memory, "forbidden in a window");
        assert_eq!(registered(&memory, "um"), [""; 0]);
        let after = ["MremapPages", "UffdEnd"].map(inject::seen);
        assert!(
            after[0] > before[0] && after[1] > before[1] + 2,
            "{before:?} {after:?}"
        );
        stop.store(true, Ordering::Relaxed);
        reader.join().expect("it only reads");
        let child = os::fork(|| i32::from(!still_right(&memory)));
        assert_eq!(child.wait(), 0, "children have the pages");
        (0..PAGES).for_each(|page| memory.fill(page, content(page)));
        for call in IOCTLS {
            inject::arm(call, libc::EPERM, 0, EVER);
        }
        engine
            .unregister(region)
            .expect("un-merged without any ioctl");
        assert_reads_right(&memory, "un-merged");
        inject::disarm_all();
    }
}

/// A panic on the helper thread left the page that was written protected for ever: its writer, and the
/// merging thread after it, waited for ever.
pub(super) fn panic_of_the_helper_leaves_no_writer_waiting() {
    std::panic::set_hook(Box::new(|_| {}));
    for (call, effect) in [
        // What broke: a helper that could not read who waits asked again and again, for ever.
        ("UffdRead", Effect::Fail(libc::EINVAL)),
        ("Enter", Effect::PanicBefore),
        ("Poll", Effect::PanicAfter),
        ("UffdRead", Effect::PanicBefore),
        ("UffdRead", Effect::PanicAfter),
        ("UffdHelperWriteprotect", Effect::PanicBefore),
        ("UffdHelperWriteprotect", Effect::PanicAfter),
        ("UffdWake", Effect::PanicBefore),
        ("UffdWake", Effect::PanicAfter),
    ] {
        let memory = filled();
        let mut settings = settings();
        settings.quiet_millisecs = 60_000;
        let engine = Engine::new(settings).expect("an engine");
        let region = register(&engine, &memory);
        merge(&engine);
        let broken: Vec<usize> = (0..PAGES)
            .filter(|page| engines::merged(&memory)[*page])
            .collect();
        assert!(broken.len() > 8, "{call}: too few merged pages");
        for &page in &broken {
            memory.fill(page, content(page));
        }
        scan(&engine); // all of them are watched from here on
        let before = inject::strikes();
        inject::arm_plan(&Plan {
            call,
            phase: Some("Helper"),
            effect,
            skip: 1,
            times: if matches!(effect, Effect::Fail(_)) {
                EVER
            } else {
                2
            },
        });
        for &page in &broken {
            memory.fill(page, content(page));
        }
        assert!(
            inject::strikes() > before,
            "{call}: no panic: this proved nothing"
        );
        inject::disarm_all();
        assert_reads_right(&memory, "written to watched pages");
        engine.unregister(region).expect("un-merged");
        engine.close().expect("closed");
    }
}

/// Goal: whatever fails while an engine is closed, or dropped, the memory reads back right, and what could
/// not be done is done when it is tried again. (Lives close when nothing fails any more.)
pub(super) fn closing_under_any_fault_loses_nothing() {
    let mut struck = 0;
    for answers in ANSWERS {
        for (errno, times) in answers.errnos.iter().zip([1, 3, 40]) {
            let memory = filled();
            let engine = engine(Remerge::Quiet);
            register(&engine, &memory);
            merge(&engine);
            (0..PAGES / 2).for_each(|page| memory.fill(page, content(page)));
            scan(&engine); // some are watched from here on
            let before = inject::strikes();
            inject::arm(answers.call, *errno, 0, times);
            let closed = engine.close();
            assert_reads_right(&memory, answers.call);
            inject::disarm_all();
            struck += u64::from(inject::strikes() > before);
            if let Err(error) = closed {
                println!("{} {errno}: {error}", answers.call);
                engine
                    .close()
                    .unwrap_or_else(|error| panic!("{}, and again: {error}", answers.call));
            }
            assert_reads_right(&memory, answers.call);
            assert_eq!(engines::merged_pages(&memory), 0, "{}", answers.call);
            assert_eq!(registered(&memory, "um"), [""; 0], "{}", answers.call);
        }
    }
    println!("figure: {struck} closings met their fault");
    assert!(struck > 50, "this proved little");
}

/// What broke: closing an engine waited for ever for a helper that could not be woken. Goal: it ends within
/// some seconds by itself; and one that cannot take the wake-up back ends at once.
pub(super) fn helper_that_cannot_be_woken_ends_all_the_same() {
    for (call, errno) in [
        ("EventfdWrite", libc::EPERM),
        ("EventfdWrite", libc::EAGAIN),
        ("EventfdRead", libc::EPERM),
        ("EventfdRead", libc::EAGAIN),
    ] {
        let struck = (0..50).any(|_| {
            let memory = filled();
            let engine = engine(Remerge::Quiet);
            let region = register(&engine, &memory);
            merge(&engine);
            (0..PAGES).for_each(|page| memory.fill(page, content(page)));
            scan(&engine); // what was merged is watched from here on
            engine.unregister(region).expect("un-merged");
            let before = inject::strikes();
            inject::arm(call, errno, 0, EVER);
            engine.close().expect("closed");
            inject::disarm_all();
            assert_reads_right(&memory, call);
            // A helper that was told to end before it came to wait takes nothing back.
            inject::strikes() > before
        });
        assert!(struck, "{call}: this proved nothing");
    }
}

/// Goal: a panic in one engine leaves the others, and new ones, as they are.
pub(super) fn panic_in_one_engine_leaves_the_others() {
    std::panic::set_hook(Box::new(|_| {}));
    let (hit, spared) = (filled(), filled());
    let (one, other) = (engine(Remerge::Quiet), engine(Remerge::Quiet));
    register(&one, &hit);
    let region = register(&other, &spared);
    scan(&one);
    inject::arm_plan(&Plan {
        call: "UffdMove",
        phase: Some("WindowOpen"),
        effect: Effect::PanicAfter,
        skip: 2,
        times: 1,
    });
    let said = (0..6).find_map(|_| one.scan(None, &mut || true).err());
    let said = said.expect("the panic is told").to_string();
    assert!(said.contains("injected panic after UffdMove"), "{said}");
    assert_reads_right(&hit, "after a panic");
    let again = one
        .stats()
        .expect_err("closed to further calls")
        .to_string();
    assert!(again.contains("injected panic"), "{again}");
    let stats = merge(&other);
    assert!(stats.core.pages_sharing > 0, "{:?}", reasons(&stats));
    assert_reads_right(&spared, "another engine");
    other.unregister(region).expect("un-merged");
    let third = engine(Remerge::Quiet);
    register(&third, &spared);
    assert!(merge(&third).core.pages_sharing > 0);
    drop(one);
    assert_reads_right(&hit, "the handle is gone");
    // In the background it is told, too.
    let fourth = engine(Remerge::Quiet);
    let memory = filled();
    register(&fourth, &memory);
    inject::arm_plan(&Plan {
        call: "Enter",
        phase: Some("WindowCompare"),
        effect: Effect::PanicBefore,
        skip: 0,
        times: 1,
    });
    fourth.start().expect("started");
    os::wait_for("the panic is told", || fourth.stats().is_err());
    assert_reads_right(&memory, "a panic in the background");
    assert!(merge(&third).core.pages_sharing > 0);
}

/// Goal: a panic while a window closes, which is itself under way because of a panic or not, leaves no
/// page away.
pub(super) fn panics_while_a_window_closes_leave_no_page_away() {
    std::panic::set_hook(Box::new(|_| {}));
    for times in 1..=3 {
        for first in [
            None,
            Some("WindowOpen"),
            Some("WindowCompare"),
            Some("WindowReplace"),
        ] {
            for call in [
                "Enter",
                "UffdMove",
                "UffdUnregister",
                "UffdRegister",
                "UffdWake",
                "MadviseDontNeed",
            ] {
                let memory = filled();
                let engine = engine(Remerge::Quiet);
                register(&engine, &memory);
                scan(&engine);
                inject::arm("MmapFrames", libc::EPERM, 0, EVER);
                if let Some(phase) = first {
                    inject::arm_plan(&Plan {
                        call: "Enter",
                        phase: Some(phase),
                        effect: Effect::PanicBefore,
                        skip: 3,
                        times: 1,
                    });
                }
                inject::arm_plan(&Plan {
                    call,
                    phase: Some("WindowClose"),
                    effect: Effect::PanicAfter,
                    skip: 1,
                    times,
                });
                (0..4).for_each(|_| drop(engine.scan(None, &mut || true)));
                inject::disarm_all();
                let when = format!("{times} panics at {call}, first in {first:?}");
                assert_reads_right(&memory, &when);
                assert_eq!(registered(&memory, "um"), [""; 0], "{when}");
                assert!(engine.stats().is_err(), "{when}: it was told");
            }
        }
    }
}

/// A panic while windows that could not be closed were closed once more lost those that were still to
/// come, and an engine that a panic has ended never tried again: pages stayed registered for missing
/// ones, and whoever discarded and touched one would have waited for ever.
pub(super) fn panic_while_windows_are_closed_again_leaves_none_open() {
    std::panic::set_hook(Box::new(|_| {}));
    for skip in 0..3 {
        let memory = filled();
        let engine = engine(Remerge::Quiet);
        register(&engine, &memory);
        scan(&engine);
        inject::arm("MmapFrames", libc::EPERM, 0, EVER);
        inject::arm_plan(&Plan {
            call: "UffdUnregister",
            phase: Some("WindowClose"),
            effect: Effect::Fail(libc::EINVAL),
            skip: 0,
            times: EVER,
        });
        // They are closed again when a pass begins.
        scan(&engine);
        let open = registered(&memory, "um");
        assert!(!open.is_empty(), "this proved nothing");
        inject::arm_plan(&Plan {
            call: "UffdUnregister",
            phase: Some("BeginPass"),
            effect: Effect::PanicBefore,
            skip,
            times: 1,
        });
        drop(engine.scan(None, &mut || true));
        inject::disarm_all();
        println!("figure: {} stretches were open, skip {skip}", open.len());
        assert!(engine.stats().is_err() || open.len() <= skip as usize);
        let when = format!("a panic at number {skip} while windows are closed again");
        assert_reads_right(&memory, &when);
        assert_eq!(registered(&memory, "um"), [""; 0], "{when}");
    }
}

/// Goal: where no thread can be started for hashing, the merging thread does it.
pub(super) fn hashing_threads_that_cannot_be_started_are_done_without() {
    let memory = filled_with(1200);
    let mut settings = settings();
    settings.threads = 2;
    let engine = Engine::new(settings).expect("an engine");
    register(&engine, &memory);
    inject::arm("SpawnHashing", libc::EAGAIN, 0, EVER);
    let before = inject::strikes();
    let stats = merge(&engine);
    assert!(
        inject::strikes() > before,
        "no thread was wanted: this proved nothing"
    );
    assert!(stats.core.pages_sharing > 0, "{:?}", reasons(&stats));
    assert_reads_right(&memory, "hashed without threads");
}

/// What is made to fail in [`starts_in_the_end`]: call, error number (or 0 for a panic), calls to skip.
pub(super) const START: &str = "PAGEMERGE_START";

/// A scenario: the first engine of a process cannot be made, the next can.
pub(super) fn starts_in_the_end() {
    let plan = std::env::var(START).expect("a plan");
    let words: Vec<&str> = plan.split(' ').collect();
    let call = inject::calls()
        .find(|call| *call == words[0])
        .expect("a call");
    let number = |at: usize| words[at].parse::<i32>().expect("a number");
    let errno = number(1);
    if words[0] == "MemfdNull" {
        inject::arm("OpenNull", libc::EMFILE, 0, EVER);
    }
    inject::arm_plan(&Plan {
        call,
        phase: None,
        effect: if errno == 0 {
            Effect::PanicBefore
        } else {
            Effect::Fail(errno)
        },
        skip: number(2).unsigned_abs(),
        times: 1,
    });
    let before = inject::strikes();
    let first = catch_unwind(AssertUnwindSafe(|| Engine::new(settings())));
    assert!(inject::strikes() > before, "never met");
    inject::disarm_all();
    // Neither forks nor other engines wait for what was not started.
    assert_eq!(os::fork(|| 0).wait(), 0);
    match &first {
        Ok(Ok(_)) => {}
        Ok(Err(error)) if errno != 0 => {
            let said = error.to_string();
            assert!(
                said.contains(&format!("os error {errno}")),
                "{plan}: {said}"
            );
        }
        Ok(Err(error)) => assert!(
            error.to_string().contains("did not start"),
            "{plan}: {error}"
        ),
        Err(_) => assert_eq!(errno, 0, "{plan}: a panic that nobody injected"),
    }
    let memory = filled();
    let engine = Engine::new(settings()).expect("an engine in the end");
    let region = register(&engine, &memory);
    assert!(merge(&engine).core.pages_sharing > 0, "{plan}");
    engine.unregister(region).expect("un-merged");
    assert_reads_right(&memory, &plan);
    let child = os::fork(|| i32::from(!still_right(&memory)));
    assert_eq!(child.wait(), 0, "{plan}: forks are watched");
}

/// Goal: what fails while the merging thread is started is an error with its number, and not for good.
pub(super) fn starting_can_fail_and_be_tried_again() {
    let mut tried = 0;
    for answers in ANSWERS.iter().filter(|answers| {
        PROCESS_ONLY.contains(&answers.call)
            && !["SpawnHashing", "UffdEnd", "EventfdRead"].contains(&answers.call)
    }) {
        let errnos = answers.errnos.iter().filter(|errno| **errno != libc::EINTR);
        for errno in errnos.chain([&0]) {
            let plan = format!("{} {errno} 0", answers.call);
            println!("start: {plan}");
            scenario_with("starts_in_the_end", &[(START, &plan)])
                .end(Duration::from_secs(60))
                .expect_success();
            tried += 1;
        }
    }
    println!("figure: {tried} failed starts");
}
