//! Passes that look only at what has changed: whatever changes is noticed, whoever changes it, and what
//! has not changed costs next to nothing.

mod support;

use pagemerge_linux::core::{RunMode, Settings};
use pagemerge_linux::{Engine, EngineSettings, EngineStats, Remerge};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::Duration;
use support::engines::{
    assert_filled, engine, fill, merge, merged_pages, reasons, register, scan, settings,
};
use support::os::{self, Memory, page_size};
use support::{Need, case};

const CONTENTS: usize = 8;
const PAGES: usize = 1000;
/// Pages from here on have no twin.
const UNIQUE: usize = 600;

fn fill_half(memory: &Memory) {
    for page in 0..PAGES {
        memory.fill(page, content(page));
    }
}

fn content(page: usize) -> u64 {
    if page < UNIQUE {
        (page % CONTENTS + 1) as u64
    } else {
        1000 + page as u64
    }
}

/// Merged, and at rest: a pass after which two more have found nothing.
fn at_rest(memory: &Memory) -> (Engine, EngineStats) {
    let engine = engine(Remerge::Quiet);
    register(&engine, memory);
    merge(&engine);
    let stats = scan(&engine);
    assert_eq!(
        (stats.core.pages_shared, stats.core.pages_sharing),
        (CONTENTS as u64, (UNIQUE - CONTENTS) as u64),
        "{:?}",
        reasons(&stats)
    );
    assert_eq!(stats.core.pages_unshared, (PAGES - UNIQUE) as u64);
    (engine, stats)
}

/// Goal: a write is noticed by the next pass: to a merged page, to one without a twin, and to one that
/// becomes a twin by it.
fn writes_are_noticed_by_the_next_pass() {
    let memory = Memory::new(PAGES);
    fill_half(&memory);
    let (engine, before) = at_rest(&memory);
    for round in 0..20 {
        let (merged, unique) = (round * 7, UNIQUE + round * 3);
        let (sharing, unshared) = (before.core.pages_sharing, before.core.pages_unshared);
        memory.fill(merged, 50_000);
        let stats = scan(&engine);
        assert_eq!(stats.core.pages_sharing, sharing - 1, "round {round}");
        memory.fill(unique, 60_000);
        let stats = scan(&engine);
        assert_eq!(stats.core.pages_unshared, unshared - 1, "round {round}");
        // Back again, and twins once more: both are looked up and found.
        memory.fill(merged, content(merged));
        memory.fill(unique, content(unique));
        os::wait_for("both to be what they were", || {
            thread::sleep(Duration::from_millis(6));
            let stats = scan(&engine).core;
            (stats.pages_sharing, stats.pages_unshared) == (sharing, unshared)
        });
    }
    let twin = UNIQUE + 100;
    memory.fill(twin, 1);
    os::wait_for("a page to join its new twins", || {
        scan(&engine).core.pages_sharing == before.core.pages_sharing + 1
    });
}

/// Writes 8 zero bytes from another process, past the page's protection.
fn write_from_outside(addr: usize) {
    let (me, at) = (std::process::id(), addr / 8);
    let done = Command::new("dd")
        .args([
            "if=/dev/zero",
            &format!("of=/proc/{me}/mem"),
            "bs=8",
            "count=1",
        ])
        .args([&format!("seek={at}"), "conv=notrunc", "status=none"])
        .status();
    assert!(done.is_ok_and(|status| status.success()), "dd");
}

/// Goal: what a debugger writes is noticed, too: at once where it parts a page from its frame, else by
/// the next look at everything.
fn writes_of_another_process_are_noticed() {
    let memory = Memory::new(PAGES);
    fill_half(&memory);
    let (engine, before) = at_rest(&memory);
    write_from_outside(memory.at(3));
    let stats = scan(&engine);
    assert_eq!(stats.core.pages_sharing, before.core.pages_sharing - 1);
    let unshared = before.core.pages_unshared + 1;
    os::wait_for("that page to be quiet, and without a twin", || {
        thread::sleep(Duration::from_millis(6));
        scan(&engine).core.pages_unshared == unshared
    });
    write_from_outside(memory.at(UNIQUE + 3));
    os::wait_for("a look at everything", || {
        thread::sleep(Duration::from_millis(6));
        scan(&engine).core.pages_unshared < unshared
    });
}

/// Goal: an owner who gives pages up without a word is noticed, and so is one who maps something else
/// there; neither is shown anything but what he mapped.
fn owner_without_a_word_is_noticed() {
    let memory = Memory::new(PAGES);
    fill_half(&memory);
    let (engine, before) = at_rest(&memory);
    let part = (memory.at(UNIQUE + 50), 20 * page_size());
    os::call(
        libc::SYS_madvise,
        &[part.0, part.1, libc::MADV_DONTNEED as usize],
    )
    .expect("given up");
    let stats = scan(&engine);
    let stats = if stats.core.pages_unshared == before.core.pages_unshared - 20 {
        stats
    } else {
        scan(&engine)
    };
    assert_eq!(stats.core.pages_unshared, before.core.pages_unshared - 20);
    for page in UNIQUE + 50..UNIQUE + 70 {
        memory.assert_shows(page, 0, "given up");
    }
    // Zero pages and fresh ones since; now something else in their place, with twins among the others.
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED) as usize;
    let other = memory.at(UNIQUE + 200);
    let at = [other, 20 * page_size(), os::RW as usize, flags, os::NONE, 0];
    os::call(libc::SYS_mmap, &at).expect("something else");
    (UNIQUE + 200..UNIQUE + 220).for_each(|page| memory.fill(page, 3));
    os::wait_for("a look at everything", || {
        thread::sleep(Duration::from_millis(50));
        let stats = scan(&engine).core;
        stats.pages_sharing == before.core.pages_sharing + 20
    });
    for page in UNIQUE + 200..UNIQUE + 220 {
        memory.assert_shows(page, 3, "merged again");
    }
    engine.close().expect("un-merged");
}

/// What broke: the engine itself had given merged pages copies of their own, in place, where it could not
/// move them back, and the next passes took them for merged still: nothing was ever merged again.
fn what_the_engine_itself_parts_is_noticed() {
    // Moved back into anonymous memory, or copied in place because mappings are short.
    for reserved in [None, Some(u64::MAX)] {
        let memory = Memory::new(PAGES);
        fill(&memory, CONTENTS);
        let engine = engine(Remerge::Always);
        register(&engine, &memory);
        merge(&engine);
        assert_eq!(merged_pages(&memory), PAGES);
        let mut changed = engine.settings().expect("settings");
        changed.reserved_mappings = reserved;
        engine.set(changed).expect("a reserve");
        engine.set_run(RunMode::Unmerge).expect("un-merged");
        let mut changed = engine.settings().expect("settings");
        changed.reserved_mappings = None;
        engine.set(changed).expect("a reserve");
        assert_eq!(merged_pages(&memory), 0);
        engine.set_run(RunMode::Stop).expect("again");
        let stats = merge(&engine);
        assert_eq!(merged_pages(&memory), PAGES, "{:?}", reasons(&stats));
        assert_filled(&memory, CONTENTS, "merged again");
    }
}

/// Goal: zero pages are told from others at once, too.
fn zero_pages_are_noticed_when_they_are_written() {
    let memory = Memory::new(PAGES);
    let engine = zero_pages_just_merged(&memory);
    merge(&engine);
    let zero = || scan(&engine).core.ksm_zero_pages;
    assert_eq!(zero(), PAGES as u64 / 2);
    assert_eq!(zero(), PAGES as u64 / 2);
    memory.fill(20, 7);
    assert_eq!(zero(), PAGES as u64 / 2 - 1);
    memory.fill(20, 0);
    os::wait_for("it to be zero again", || {
        scan(&engine).core.ksm_zero_pages == PAGES as u64 / 2
    });
}

/// What broke (once in some dozens of runs): a zero page that was looked at once since it became one was not
/// known as one, and a sweep passed over it after it was written.
fn zero_pages_written_at_once_are_noticed_by_statistics() {
    for round in 0..30 {
        let memory = Memory::new(16);
        let engine = zero_pages_just_merged(&memory);
        (0..round % 4).for_each(|_| drop(scan(&engine)));
        assert_eq!(engine.stats().expect("stats").core.ksm_zero_pages, 8);
        memory.fill(2, 7);
        let zero = engine.stats().expect("stats").core.ksm_zero_pages;
        assert_eq!(zero, 7, "round {round}");
    }
}

/// An engine over pages every second of which is zero, up to the pass that merged these.
fn zero_pages_just_merged(memory: &Memory) -> Engine {
    (0..memory.pages())
        .for_each(|page| memory.fill(page, if page % 2 == 0 { 0 } else { page as u64 }));
    let engine = Engine::new(EngineSettings {
        scan: Settings {
            use_zero_pages: true,
            ..settings().scan
        },
        ..settings()
    })
    .expect("an engine");
    register(&engine, memory);
    for _ in 0..3 {
        if scan(&engine).core.ksm_zero_pages > 0 {
            break;
        }
    }
    engine
}

/// Goal: pages that a window of zero pages has taken the write protection of, since they lie between those,
/// are seen when they are written, though no fault tells of it.
fn pages_between_zero_pages_are_noticed_when_they_are_written() {
    let memory = Memory::new(PAGES);
    let engine = zero_pages_just_merged(&memory);
    for (one, other) in [(21, 23), (301, 801)] {
        memory.fill(one, 70_000 + one as u64);
        memory.fill(other, 70_000 + one as u64);
        let before = engine.stats().expect("stats").core.pages_sharing;
        let sharing: Vec<u64> = (0..3).map(|_| scan(&engine).core.pages_sharing).collect();
        assert_eq!(sharing.last(), Some(&(before + 1)), "{sharing:?}");
    }
    assert_eq!(scan(&engine).core.ksm_zero_pages, PAGES as u64 / 2);
}

/// Goal: zero pages that lie close together are registered together. Method: calls are counted.
#[cfg(feature = "inject")]
fn zero_pages_close_together_are_registered_together() {
    use pagemerge_linux::inject;
    let registered = || {
        let rows = inject::table().into_iter();
        let opening =
            rows.filter(|(call, phase, ..)| (*call, *phase) == ("UffdRegister", "WindowOpen"));
        opening.map(|(.., passed, _)| passed).sum::<u64>()
    };
    let (memory, before) = (Memory::new(PAGES), registered());
    let engine = zero_pages_just_merged(&memory);
    assert_eq!(scan(&engine).core.ksm_zero_pages, PAGES as u64 / 2);
    let calls = registered() - before;
    println!("figure: {calls} registrations for {} pages", PAGES / 2);
    assert!(calls < PAGES as u64 / 2 / 8, "{calls}");
}

/// Goal: a pass over memory that nobody changes asks the kernel nothing about its pages, and one over memory
/// of which little has changed asks by what has changed. Method: calls are counted.
#[cfg(feature = "inject")]
fn passes_ask_by_what_has_changed() {
    use pagemerge_linux::inject;
    let memory = Memory::new(60_000);
    (0..memory.pages()).for_each(|page| memory.fill(page, 1 + page as u64));
    let engine = engine(Remerge::Quiet);
    register(&engine, &memory);
    let asked = |act: &dyn Fn()| {
        let before = inject::seen("PagemapScan");
        act();
        scan(&engine);
        inject::seen("PagemapScan") - before
    };
    let first = asked(&|| {});
    scan(&engine);
    let rest: Vec<u64> = (0..10).map(|_| asked(&|| {})).collect();
    let few = asked(&|| (0..50).for_each(|n| memory.fill(n * 1000, n as u64)));
    println!("figure: {first} calls for the first pass, {rest:?} at rest, {few} for 50 changes");
    let windows = memory.pages() as u64 / 512;
    assert!(first > windows, "{first}");
    assert!(rest.contains(&0), "{rest:?}");
    assert!(few < 50 * 3 + windows, "{few}");
}

fn main() -> ExitCode {
    #[allow(unused_mut, reason = "without injection there is one less")]
    let mut cases = vec![
        case!(writes_are_noticed_by_the_next_pass),
        case!(writes_of_another_process_are_noticed).needs(Need::Root),
        case!(owner_without_a_word_is_noticed),
        case!(what_the_engine_itself_parts_is_noticed),
        case!(zero_pages_are_noticed_when_they_are_written),
        case!(zero_pages_written_at_once_are_noticed_by_statistics),
        case!(pages_between_zero_pages_are_noticed_when_they_are_written),
    ];
    #[cfg(feature = "inject")]
    cases.extend([
        case!(passes_ask_by_what_has_changed),
        case!(zero_pages_close_together_are_registered_together),
    ]);
    support::run(cases)
}
