//! Who can learn what from whom: memory that never merges, engines and domains that share nothing, and
//! what leaves an engine. `docs/safety.md` says what each of these promises is for.

mod support;

use pagemerge_linux::core::{Event, Reason, RunMode};
use pagemerge_linux::{Engine, EngineSettings, EngineStats, Error, RegionHandle, Remerge};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::ExitCode;
use support::engines::{
    assert_filled, engine, fill, in_frames, merge, merged, merged_pages, reasons, register, scan,
    settings, skipped, try_register,
};
use support::os::{self, Memory, RW, page_size};
use support::{Need, case};

const CONTENTS: usize = 8;

/// What each call of the engine is refused with.
#[track_caller]
fn assert_refused(engine: &Engine, memory: &Memory, reason: Reason) {
    match try_register(engine, memory.addr(), memory.len(), "") {
        Err(Error::NotMergeable { reason: told, .. }) if told == reason => {}
        other => panic!("{reason} memory: {other:?}"),
    }
}

/// Excludes whole pages.
fn exclude(engine: &Engine, region: RegionHandle, memory: &Memory, first: usize, pages: usize) {
    let told = engine
        .exclude(region, memory.at(first), pages * page_size())
        .expect("they can be un-merged");
    assert_eq!(told as usize, pages);
}

/// # Panics
/// Unless pages `first .. first + pages` are ordinary ones, and all others are merged.
#[track_caller]
fn assert_merged_but(memory: &Memory, (first, pages): (usize, usize), when: &str) {
    for (page, merged) in merged(memory).into_iter().enumerate() {
        let apart = (first..first + pages).contains(&page);
        assert_eq!(merged, !apart, "page {page}, {when}");
    }
}

/// Whether a word lies anywhere in a file of frames, punched places aside.
fn in_a_frame_file(word: u64) -> bool {
    let mut seen = BTreeSet::new();
    for task in fs::read_dir("/proc/self/task").expect("tasks").flatten() {
        let open = fs::read_dir(task.path().join("fd")).into_iter().flatten();
        for entry in open.flatten() {
            let target = fs::read_link(entry.path()).unwrap_or_default();
            if !target.to_string_lossy().starts_with("/memfd:pagemerge") {
                continue;
            }
            let file = File::open(entry.path()).expect("our own file");
            let meta = file.metadata().expect("its size");
            if seen.insert(meta.ino()) && file_has(&file, meta.len(), word) {
                return true;
            }
        }
    }
    assert!(!seen.is_empty(), "no file of frames was found");
    false
}

fn file_has(file: &File, len: u64, word: u64) -> bool {
    let mut page = vec![0; page_size()];
    let mut at = 0;
    let fd = usize::try_from(file.as_raw_fd()).expect("an open file has a number");
    let seek_data = usize::try_from(libc::SEEK_DATA).expect("it is 3");
    loop {
        // Where there is no data any more the call says ENXIO.
        let next = os::call(libc::SYS_lseek, &[fd, at, seek_data]);
        let Ok(data) = next else { return false };
        if data as u64 >= len {
            return false;
        }
        file.read_exact_at(&mut page, data as u64)
            .expect("data can be read");
        let needle = word.to_ne_bytes();
        if page.chunks_exact(8).any(|bytes| bytes == needle) {
            return true;
        }
        at = data + page_size();
    }
}

// ---------------------------------------------------------------------------------- zero pages only

/// Goal: with `zero_only` zero pages are given back and no frame is ever made, in either way of scanning.
fn zero_only_gives_zero_pages_back_and_makes_no_frame() {
    for base in [settings(), EngineSettings::kernel_defaults()] {
        let mut settings = base;
        settings.scan.smart_scan = false;
        settings.scan.use_zero_pages = true;
        settings.scan.zero_only = true;
        let memory = Memory::new(256);
        let engine = Engine::new(settings).expect("an engine");
        // Every fourth page is zero, the others have twins.
        let content = |page: usize| (page % 4) as u64;
        (0..256).for_each(|page| memory.fill(page, content(page)));
        register(&engine, &memory);
        let stats = merge(&engine);
        assert_eq!(stats.core.ksm_zero_pages, 64, "{:?}", reasons(&stats));
        assert_eq!(stats.core.pages_shared + stats.core.pages_sharing, 0);
        assert_eq!((stats.space.frames, stats.space.frames_bytes), (0, 0));
        (0..256).for_each(|page| memory.assert_shows(page, content(page), "zero only"));
        assert!(
            !in_a_frame_file(os::word_of(1, 0)),
            "a frame was made of bytes that are not zero"
        );
        memory.fill(4, 0);
        memory.fill(5, 0);
        memory.fill(8, 9);
        let stats = merge(&engine);
        assert_eq!(
            stats.core.ksm_zero_pages,
            64,
            "one has been written, one is new: {:?}",
            reasons(&stats)
        );
        memory.assert_shows(8, 9, "written after merging");
    }
}

/// Goal: whoever has switched `zero_only` on can rely on it at once.
fn zero_only_is_refused_while_frames_are_in_use() {
    let memory = Memory::new(64);
    let engine = engine(Remerge::Quiet);
    fill(&memory, CONTENTS);
    register(&engine, &memory);
    merge(&engine);
    let refused = engine.update(|settings| settings.scan.zero_only = true);
    let text = refused.expect_err("frames are in use").to_string();
    assert!(text.contains("zero_only"), "{text}");
    assert_eq!(merged_pages(&memory), 64);
    for run in [RunMode::Unmerge, RunMode::Stop] {
        engine.set_run(run).expect("there is memory");
    }
    engine
        .update(|settings| settings.scan.zero_only = true)
        .expect("no frame is in use");
    assert_eq!(merge(&engine).space.frames, 0);
    engine
        .update(|settings| settings.scan.zero_only = false)
        .expect("always");
    merge(&engine);
    assert_eq!(merged_pages(&memory), 64, "twins find one another again");
    assert_filled(&memory, CONTENTS, "after zero_only");
}

// ---------------------------------------------------------------------------------- excluded pages

/// Goal: what is excluded is un-merged at once, never merges again, is counted by name, and stays so
/// whatever else is changed; everything else merges as before.
fn excluded_pages_are_unmerged_and_never_merge_again() {
    let memory = Memory::new(128);
    let engine = engine(Remerge::Always);
    fill(&memory, CONTENTS);
    let region = register(&engine, &memory);
    merge(&engine);
    assert_eq!(merged_pages(&memory), 128);

    exclude(&engine, region, &memory, 30, 20);
    assert_merged_but(&memory, (30, 20), "excluded");
    assert_filled(&memory, CONTENTS, "excluded");
    let stats = merge(&engine);
    assert_eq!(
        skipped(&stats, Reason::Excluded),
        20,
        "{:?}",
        reasons(&stats)
    );
    assert_merged_but(&memory, (30, 20), "some passes later");

    // Written, discarded and written again: what they are does not depend on what they hold.
    memory.fill(31, 77);
    engine
        .discard(memory.at(32), page_size())
        .expect("registered memory");
    memory.fill(32, 77);
    merge(&engine);
    assert_merged_but(&memory, (30, 20), "written");
    for (page, content) in [(31, 77), (32, 77)] {
        memory.assert_shows(page, content, "written");
    }

    engine
        .update(|settings| settings.remerge = Remerge::Quiet)
        .expect("settings");
    for run in [RunMode::Unmerge, RunMode::Stop] {
        engine.set_run(run).expect("there is memory");
    }
    assert_eq!(merged_pages(&memory), 0);
    merge(&engine);
    assert!(
        merged(&memory)[30..50].iter().all(|merged| !merged),
        "the run modes and the settings have nothing to say about it"
    );
    assert!(merged_pages(&memory) > 100);

    // A region that is registered anew is another one.
    engine.unregister(region).expect("there is memory");
    for page in 0..128 {
        memory.fill(page, 5);
    }
    register(&engine, &memory);
    merge(&engine);
    assert_eq!(merged_pages(&memory), 128);
}

/// Goal: the same for pages that have not been merged yet: a candidate is no partner from then on.
fn excluded_candidates_are_no_partners() {
    let (memory, twin) = (Memory::new(64), Memory::new(64));
    let engine = engine(Remerge::Quiet);
    for page in 0..64 {
        memory.fill(page, 1000 + page as u64);
    }
    let region = register(&engine, &memory);
    merge(&engine);
    exclude(&engine, region, &memory, 60, 1);
    twin.fill(0, 1060);
    register(&engine, &twin);
    let stats = merge(&engine);
    assert_eq!((merged_pages(&memory), merged_pages(&twin)), (0, 0));
    assert_eq!(stats.core.pages_shared, 0);
    assert!(!in_a_frame_file(os::word_of(1060, 0)));
}

/// Goal: no page merges that has one byte of what was excluded, and nothing is excluded that lies
/// elsewhere; bytes in a page that is not registered, because it is not wholly the buffer's, are fine.
fn excluded_range_is_rounded_outwards_and_must_lie_in_the_buffer() {
    let memory = Memory::new(32);
    let engine = engine(Remerge::Quiet);
    fill(&memory, 1);
    let page = page_size();
    // From the middle of the first page to the middle of the last one.
    let (addr, len) = (memory.addr() + 100, memory.len() - 200);
    let region = try_register(&engine, addr, len, "").expect("plain memory");
    assert_eq!(region.pages, 30);
    let tells = |addr: usize, len: usize| engine.exclude(region, addr, len).ok();
    assert_eq!(
        tells(memory.at(5) - 1, 2),
        Some(2),
        "the last byte of one page"
    );
    assert_eq!(tells(memory.at(9) + 7, 1), Some(1));
    assert_eq!(tells(memory.at(9) + 7, 0), Some(0), "nothing");
    assert_eq!(tells(addr, 50), Some(0), "before the first whole page");
    assert_eq!(tells(addr, page), Some(1), "into the first whole page");
    assert_eq!(tells(addr + len - 1, 1), Some(0), "behind the last one");
    for (addr, len) in [
        (addr - 1, 10),
        (addr + len - 1, 2),
        (addr + len + page, 1),
        (addr, usize::MAX),
        (memory.addr() - page, page),
    ] {
        match engine.exclude(region, addr, len) {
            Err(Error::NotInBuffer { bytes }) => assert_eq!(bytes, len),
            other => panic!("{len} bytes at {addr:x}: {other:?}"),
        }
    }
    merge(&engine);
    let apart: Vec<usize> = merged(&memory)
        .into_iter()
        .enumerate()
        .filter(|(_, merged)| !merged)
        .map(|(page, _)| page)
        .collect();
    assert_eq!(apart, [0, 1, 4, 5, 9, 31]);
    engine.unregister(region).expect("there is memory");
    assert!(matches!(
        engine.exclude(region, memory.at(5), 1),
        Err(Error::NotRegistered)
    ));
}

/// Goal: a zero page that is excluded gets memory of its own, and an excluded page that becomes zero
/// keeps it.
fn excluded_zero_pages_get_memory_of_their_own() {
    let memory = Memory::new(16);
    let engine = engine(Remerge::Quiet);
    (0..16).for_each(|page| memory.fill(page, 0));
    let region = register(&engine, &memory);
    assert_eq!(merge(&engine).core.ksm_zero_pages, 16);
    exclude(&engine, region, &memory, 4, 4);
    let stats = merge(&engine);
    assert_eq!(stats.core.ksm_zero_pages, 12, "{:?}", reasons(&stats));
    assert_eq!(skipped(&stats, Reason::Excluded), 4);
    let frames: BTreeSet<u64> = os::entries(&memory)[4..8]
        .iter()
        .map(|entry| {
            assert!(entry.is_present() && entry.is_exclusive());
            entry.frame_number()
        })
        .collect();
    assert!(frames.len() == 4 || !os::is_root(), "{frames:?}");
}

// ------------------------------------------------------- what its owner keeps where it is, or secret

/// Goal: locked memory, and memory that is kept out of core dumps, never merges, nor do its bytes
/// reach a file of frames (which may be swapped out, and is in core dumps); the rest of the buffer does
/// merge.
fn locked_and_undumped_parts_are_left_alone_by_name() {
    for (reason, kept) in [
        (Reason::Mlocked, None),
        (Reason::DontDump, Some(libc::MADV_DONTDUMP)),
    ] {
        let memory = Memory::new(64);
        let engine = engine(Remerge::Always);
        let secret = 99 + reason as u64;
        fill(&memory, CONTENTS);
        (20..30).for_each(|page| memory.fill(page, secret));
        match kept {
            None => memory.lock_pages(20, 10, true).expect("mlock"),
            Some(advice) => memory.advise_pages(20, 10, advice).expect("madvise"),
        }
        register(&engine, &memory);
        let stats = merge(&engine);
        assert_merged_but(&memory, (20, 10), reason.name());
        assert_eq!(skipped(&stats, reason), 10, "{:?}", reasons(&stats));
        assert!(!in_a_frame_file(os::word_of(secret, 0)), "{reason}");
        assert!(
            in_a_frame_file(os::word_of(1, 0)),
            "the search finds frames"
        );

        // Given back to merging: found out with the next passes.
        match kept {
            None => memory.lock_pages(20, 10, false).expect("munlock"),
            Some(_) => memory
                .advise_pages(20, 10, libc::MADV_DODUMP)
                .expect("madvise"),
        }
        merge(&engine);
        assert_eq!(merged_pages(&memory), 64, "{reason} no more");
    }
}

fn wholly_locked_or_undumped_memory_is_refused_by_name() {
    let memory = Memory::new(16);
    let engine = engine(Remerge::Quiet);
    memory.lock_pages(0, 16, true).expect("mlock");
    assert_refused(&engine, &memory, Reason::Mlocked);
    memory.lock_pages(0, 6, false).expect("munlock");
    memory
        .advise_pages(0, 6, libc::MADV_DONTDUMP)
        .expect("madvise");
    assert_refused(&engine, &memory, Reason::Mlocked);
    memory.lock_pages(6, 10, false).expect("munlock");
    register(&engine, &memory);
}

/// Broke: what owners had changed was looked at once a second. Showed: memory that was to be kept from
/// children or core dumps less than a second before it merged came to be in them: a mapping of frames
/// took its place, and the advice was gone. A call looks anew now.
fn advice_given_before_a_call_is_kept_by_it() {
    for (advice, flag) in [
        (libc::MADV_DONTFORK, "dc"),
        (libc::MADV_WIPEONFORK, "wf"),
        (libc::MADV_DONTDUMP, "dd"),
    ] {
        for round in 0..4 {
            let (memory, other) = (Memory::new(64), Memory::new(64));
            let engine = engine(Remerge::Always);
            fill(&other, CONTENTS);
            register(&engine, &other);
            scan(&engine);
            fill(&memory, CONTENTS);
            let region = register(&engine, &memory);
            // This pass merges the other region, so the list of mappings has just been read; the next
            // one would merge this one.
            scan(&engine);
            assert_eq!((merged_pages(&other), merged_pages(&memory)), (64, 0));
            let (first, pages) = if round % 2 == 0 { (0, 64) } else { (8, 40) };
            memory.advise_pages(first, pages, advice).expect("madvise");
            merge(&engine);
            assert_merged_but(&memory, (first, pages), flag);
            engine.unregister(region).expect("there is memory");
            for page in first..first + pages {
                assert!(has(&memory, page, flag), "page {page} lost {flag}");
            }
            assert_filled(&memory, CONTENTS, "advised");
        }
    }
}

fn has(memory: &Memory, page: usize, flag: &str) -> bool {
    let found = os::mappings(memory.at(page), page_size());
    found.first().expect("it is mapped").has(flag)
}

/// The kernel's own secret memory is a shared mapping of a file without a place.
fn memfd_secret_is_refused_by_name() {
    let fd = os::call(libc::SYS_memfd_secret, &[0]).expect("looked at before");
    let file = File::from(os::own_fd(fd));
    file.set_len(16 * page_size() as u64).expect("room");
    let memory = Memory::with(16, RW, libc::MAP_SHARED, file.as_raw_fd(), 0).expect("memory");
    let engine = engine(Remerge::Quiet);
    assert_refused(&engine, &memory, Reason::SharedMapping);
    let shared =
        Memory::with(16, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0).expect("memory");
    assert_refused(&engine, &shared, Reason::SharedMapping);
}

// ---------------------------------------------------------------------------- who shares with whom

/// The files and places that the merged pages of some memory show.
fn places(memory: &Memory) -> BTreeSet<(String, u64)> {
    let mut found = BTreeSet::new();
    let text = fs::read_to_string("/proc/self/maps").expect("the list of mappings");
    for vma in os::mappings_of(memory).iter().filter(|vma| in_frames(vma)) {
        let start = format!("{:x}-", vma.start);
        let line = text
            .lines()
            .find(|line| line.starts_with(&start))
            .expect("it is still mapped");
        let mut fields = line.split_whitespace().skip(2);
        let offset = fields.next().expect("an offset");
        let offset = u64::from_str_radix(offset, 16).expect("a number");
        let inode = fields.nth(1).expect("a file's number").to_owned();
        let end = vma.end.min(memory.addr() + memory.len());
        for page in 0..(end - vma.start) / page_size() {
            found.insert((inode.clone(), offset + (page * page_size()) as u64));
        }
    }
    found
}

/// Goal: pages of two engines, or of two domains of one, never show the same frame, whatever they hold:
/// so neither a first write, nor the cache, tells one side what the other one has.
fn engines_and_domains_share_no_frame() {
    let mut memories = Vec::new();
    let engines = [engine(Remerge::Quiet), engine(Remerge::Quiet)];
    let mut seen: Vec<BTreeSet<(String, u64)>> = Vec::new();
    for engine in &engines {
        for domain in ["", "a", "b"] {
            let memory = Memory::new(64);
            fill(&memory, CONTENTS);
            try_register(engine, memory.addr(), memory.len(), domain).expect("plain memory");
            memories.push(memory);
        }
    }
    let stats: Vec<EngineStats> = engines.iter().map(merge).collect();
    for stats in &stats {
        assert_eq!(stats.core.pages_shared, 3 * CONTENTS as u64);
    }
    for memory in &memories {
        assert_eq!(merged_pages(memory), 64);
        let places = places(memory);
        assert_eq!(places.len(), CONTENTS);
        for other in &seen {
            assert!(places.is_disjoint(other), "{places:?} and {other:?}");
        }
        seen.push(places);
    }
    if os::is_root() {
        let mut physical = BTreeSet::new();
        for memory in &memories {
            let here: BTreeSet<u64> = (0..64)
                .map(|page| {
                    memory.load(page, 0);
                    os::entry(memory.at(page)).frame_number()
                })
                .collect();
            assert_eq!(here.len(), CONTENTS);
            physical.extend(here);
        }
        assert_eq!(physical.len(), 6 * CONTENTS, "pages of memory");
    }
}

/// Goal: a page that is unique in its domain stays an ordinary one, though another domain has its twin:
/// there is nothing to be timed.
fn twin_in_another_domain_changes_nothing() {
    let (mine, theirs) = (Memory::new(16), Memory::new(16));
    let engine = engine(Remerge::Quiet);
    for page in 0..16 {
        mine.fill(page, 500 + page as u64);
        theirs.fill(page, 500 + page as u64);
    }
    try_register(&engine, mine.addr(), mine.len(), "mine").expect("plain memory");
    try_register(&engine, theirs.addr(), theirs.len(), "theirs").expect("plain memory");
    let stats = merge(&engine);
    assert_eq!(stats.core.pages_shared, 0);
    assert_eq!((merged_pages(&mine), merged_pages(&theirs)), (0, 0));
}

/// Goal: nothing that an engine tells is made from contents: no digest, no byte. Method: every field of
/// every event and counter is taken apart here by name, so a new one has to be thought about; and two
/// engines over other contents with the same pattern of equality tell the same.
fn events_and_counters_tell_no_contents() {
    let told = |offset: u64| {
        let engine = engine(Remerge::Quiet);
        engine.set_events(true).expect("an engine");
        let memory = Memory::new(64);
        for page in 0..64 {
            memory.fill(page, offset + (page % CONTENTS) as u64);
        }
        let region = register(&engine, &memory);
        (0..4).for_each(|_| drop(scan(&engine)));
        engine.unregister(region).expect("there is memory");
        let (events, dropped) = engine.take_events();
        assert_eq!(dropped, 0);
        let stats = engine.stats().expect("stats").core;
        let mut numbers: Vec<Vec<u64>> = events.into_iter().map(numbers_of).collect();
        // Which of several merges of one batch comes first may depend on the secret.
        numbers.sort_unstable();
        (numbers.len(), stats.pages_merged, format!("{stats:?}"))
    };
    let (first, second) = (told(1), told(1_000_000));
    assert_eq!(first, second);
    assert!(first.0 > 64, "events were recorded");
}

/// All that an event says: numbers of passes, pages, frames and regions, none of contents.
fn numbers_of(event: Event) -> Vec<u64> {
    let of = |n: u32| u64::from(n);
    match event {
        Event::StartScan { seq, rmap_entries } | Event::StopScan { seq, rmap_entries } => {
            vec![seq, rmap_entries]
        }
        Event::Enter { mm } | Event::Exit { mm } => vec![of(mm.0)],
        Event::MergeOnePage {
            pfn,
            rmap_item,
            mm,
            err: _,
        } => vec![of(pfn.0), of(rmap_item.0), of(mm.0)],
        Event::MergeWithKsmPage {
            ksm_page,
            pfn,
            rmap_item,
            mm,
            err: _,
        } => {
            let frame = ksm_page.map_or(u64::MAX, |frame| of(frame.0));
            vec![frame, of(pfn.0), of(rmap_item.0), of(mm.0)]
        }
        Event::RemoveKsmPage { pfn } => vec![of(pfn.0)],
        Event::RemoveRmapItem { pfn, rmap_item, mm } => {
            vec![of(pfn.0), of(rmap_item.0), of(mm.0)]
        }
        Event::Advisor {
            scan_time,
            pages_to_scan,
            cpu_percent,
        } => vec![scan_time, pages_to_scan, of(cpu_percent)],
    }
}

/// Goal: a child has nothing of the engine but the merged memory: no call works, and no descriptor of the
/// merging thread is its own.
fn child_gets_memory_and_nothing_of_the_engine() {
    let memory = Memory::new(64);
    let engine = engine(Remerge::Quiet);
    fill(&memory, CONTENTS);
    let region = register(&engine, &memory);
    merge(&engine);
    let child = os::fork(|| {
        let reads = (0..64).all(|page| memory.shows(page, (page % CONTENTS + 1) as u64));
        let refused = matches!(engine.stats(), Err(Error::Forked))
            && matches!(engine.exclude(region, memory.addr(), 1), Err(Error::Forked))
            && engine.take_events().0.is_empty();
        let ours = fs::read_dir("/proc/self/fd")
            .expect("descriptors")
            .flatten()
            .filter_map(|entry| fs::read_link(entry.path()).ok())
            .filter(|path| {
                let path = path.to_string_lossy();
                path.contains("memfd:pagemerge") || path.contains("userfaultfd")
            })
            .count();
        i32::from(!reads) + 2 * i32::from(!refused) + 4 * i32::from(ours > 0)
    });
    assert_eq!(child.wait(), 0);
}

fn main() -> ExitCode {
    support::run(vec![
        case!(zero_only_gives_zero_pages_back_and_makes_no_frame),
        case!(zero_only_is_refused_while_frames_are_in_use),
        case!(excluded_pages_are_unmerged_and_never_merge_again),
        case!(excluded_candidates_are_no_partners),
        case!(excluded_range_is_rounded_outwards_and_must_lie_in_the_buffer),
        case!(excluded_zero_pages_get_memory_of_their_own),
        case!(locked_and_undumped_parts_are_left_alone_by_name),
        case!(wholly_locked_or_undumped_memory_is_refused_by_name),
        case!(advice_given_before_a_call_is_kept_by_it),
        case!(memfd_secret_is_refused_by_name).needs(Need::SecretMemory),
        case!(engines_and_domains_share_no_frame),
        case!(twin_in_another_domain_changes_nothing),
        case!(events_and_counters_tell_no_contents),
        case!(child_gets_memory_and_nothing_of_the_engine),
    ])
}
