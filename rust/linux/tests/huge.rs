//! Huge pages: looking and tracking leave them whole, and they are split for enough duplicates only.

mod support;

use pagemerge_linux::core::{Reason, RunMode, Settings, TreeOrder};
use pagemerge_linux::{Engine, EngineSettings, EngineStats};
use std::process::ExitCode;
use support::engines::{
    assert_nothing_merged, merged, merged_pages, reasons, register, scan, settings, skipped,
    try_register,
};
use support::os::{self, Memory, page_size};
use support::{Need, case};

const MADV_COLLAPSE: i32 = 25;

/// Pages in a huge page.
fn size() -> usize {
    (2 << 20) / page_size()
}

/// How many huge pages there are whole.
fn whole(memory: &Memory) -> usize {
    let kib = os::kib_of(memory, "AnonHugePages");
    usize::try_from(kib).expect("fits") / 2048
}

/// So many huge pages, filled with what no other page has.
fn unique(blocks: usize) -> Memory {
    let memory = Memory::huge(blocks * size());
    (0..memory.pages()).for_each(|page| memory.fill(page, 1_000_000 + page as u64));
    assert_eq!(whole(&memory), blocks, "the kernel gives huge pages here");
    memory
}

/// One of each content from 1 on, in small pages.
fn small(pages: usize) -> Memory {
    let memory = Memory::new(pages);
    (0..pages).for_each(|page| memory.fill(page, 1 + page as u64));
    memory
}

fn engine(min: u32, change: impl FnOnce(&mut Settings)) -> Engine {
    let mut settings = EngineSettings {
        thp_min_duplicates: min,
        ..settings()
    };
    change(&mut settings.scan);
    Engine::new(settings).expect("an engine")
}

fn passes(engine: &Engine, count: usize) -> EngineStats {
    let stats: Vec<_> = (0..count).map(|_| scan(engine)).collect();
    stats.into_iter().next_back().expect("at least one")
}

/// A permission of one page is taken away and given back: that leaves nothing but small pages.
fn split_by_its_owner(memory: &Memory, page: usize) {
    for allowed in [libc::PROT_READ, os::RW] {
        memory.protect_pages(page, 1, allowed).expect("mprotect");
    }
}

/// Pages of block `block` that are merged.
fn merged_of(memory: &Memory, block: usize) -> usize {
    let of = &merged(memory)[block * size()..(block + 1) * size()];
    of.iter().filter(|merged| **merged).count()
}

// -------------------------------------------------------------------------------- looking

/// What broke: the first pass split every huge page, because each look protects the pages of its window,
/// and windows begin anywhere.
fn tracking_leaves_huge_pages_whole() {
    for order in [TreeOrder::Digest, TreeOrder::Content] {
        for (before, after) in [(0, 0), (100, 0), (0, 333), (511, 1)] {
            let memory = unique(12);
            let engine = engine(32, |scan| scan.tree_order = order);
            let len = memory.len() - (before + after) * page_size();
            try_register(&engine, memory.at(before), len, "").expect("registered");
            // A region's border inside of a huge page cuts it, since a mapping's attributes end there.
            let registered = whole(&memory);
            let cut = usize::from(before > 0) + usize::from(after > 0);
            assert_eq!(registered, 12 - cut);
            let pages = (memory.pages() - before - after) as u64;
            for pass in 0..5 {
                let unshared = scan(&engine).core.pages_unshared;
                assert_eq!(whole(&memory), registered, "pass {pass}, {order:?}");
                // None of them was taken for unwritten at the first look at it.
                assert_eq!(unshared, if pass == 0 { 0 } else { pages }, "pass {pass}");
            }
            // A write splits the huge page that it goes to (the kernel does that), and no other; and
            // it is noticed, wherever the page is.
            for (round, block) in [3, 4, 8].into_iter().enumerate() {
                memory.store(block * size() + 77 * (round + 1), 5, 1);
                assert_eq!(whole(&memory), registered - round - 1);
                assert_eq!(scan(&engine).core.pages_unshared, pages - 1);
                assert_eq!(passes(&engine, 3).core.pages_unshared, pages);
                assert_eq!(whole(&memory), registered - round - 1);
            }
        }
    }
}

/// Goal: of a hundred writes between passes none is missed, wherever the borders of windows and of what the
/// kernel is asked about lie; what is split is what was written.
fn one_per_cent_of_writes_splits_what_was_written_only() {
    let memory = unique(24);
    let engine = engine(32, |_| ());
    let first = 300;
    let pages = memory.pages() - first;
    try_register(&engine, memory.at(first), pages * page_size(), "").expect("registered");
    passes(&engine, 3);
    let (before, mut random) = (whole(&memory), os::Random::new(os::seed()));
    assert_eq!(before, 23);
    for round in 1..=8 {
        // In one huge page, so that the others have nothing to do with it.
        let block = 2 * round;
        let mut written = std::collections::BTreeSet::new();
        while written.len() < size() / 50 {
            written.insert(block * size() + random.below(size()));
        }
        for &page in &written {
            memory.store(page, 9, round as u64);
        }
        let unshared = scan(&engine).core.pages_unshared;
        assert_eq!(unshared, (pages - written.len()) as u64, "round {round}");
        assert_eq!(passes(&engine, 2).core.pages_unshared, pages as u64);
        assert_eq!(whole(&memory), before - round);
    }
}

/// Goal: with a threshold that no huge page reaches, writes do not split them either: they are left alone.
fn never_leaves_huge_pages_alone() {
    let (memory, twins) = (unique(4), small(400));
    (0..400).for_each(|page| memory.fill(page, 1 + page as u64));
    let engine = engine(513, |_| ());
    register(&engine, &memory);
    register(&engine, &twins);
    for pass in 0..4 {
        (0..memory.pages())
            .step_by(100)
            .for_each(|page| memory.store(page, 3, pass));
        let stats = scan(&engine);
        assert_eq!(skipped(&stats, Reason::HugePage), memory.pages() as u64);
        assert_eq!((whole(&memory), merged_pages(&memory)), (4, 0));
    }
    // And is a matter of the setting, not of the memory.
    engine
        .update(|settings| settings.thp_min_duplicates = 32)
        .expect("changed");
    let stats = passes(&engine, 4);
    assert_eq!(
        (whole(&memory), merged_of(&memory, 0)),
        (3, 396),
        "{:?}",
        reasons(&stats)
    );
}

// -------------------------------------------------------------------------------- the threshold

/// Goal: a huge page is split when the setting says so, and for one page less it is not; what was refused
/// before the number was reached follows, and nothing is tried and undone again and again.
fn threshold_is_kept_at_both_sides() {
    for order in [TreeOrder::Digest, TreeOrder::Content] {
        const MIN: usize = 8;
        let duplicates = [0, 1, MIN - 1, MIN, MIN + 1, 300];
        let (memory, twins) = (unique(duplicates.len()), small(1000));
        let mut next = 0;
        for (block, &count) in duplicates.iter().enumerate() {
            for n in 0..count {
                // Scattered, and never in the same order as the twins.
                let page = block * size() + (n * 37 + 11) % size();
                memory.fill(page, twins.pages() as u64 - next);
                next += 1;
            }
        }
        let engine = engine(8, |scan| scan.tree_order = order);
        register(&engine, &memory);
        register(&engine, &twins);
        let stats = passes(&engine, 6);
        for (block, &count) in duplicates.iter().enumerate() {
            let expected = if count >= MIN { count } else { 0 };
            let why = reasons(&stats);
            assert_eq!(merged_of(&memory, block), expected, "{count}: {why:?}");
        }
        assert_eq!(whole(&memory), 3);
        let done: usize = duplicates.iter().filter(|&&it| it >= MIN).sum();
        assert_eq!(merged_pages(&twins), done);
        assert_eq!(stats.core.pages_sharing, done as u64);
        // Refused are both sides of a pair.
        let left = (MIN - 1 + 1) as u64;
        let refused = skipped(&stats, Reason::HugePage);
        assert!((left..=2 * left).contains(&refused), "{refused}");
        let after = passes(&engine, 5);
        assert_eq!(after.space.windows, stats.space.windows, "no more windows");
        assert_eq!(after.core.pages_sharing, stats.core.pages_sharing);
        assert_eq!(whole(&memory), 3);
        engine.set_run(RunMode::Unmerge).expect("un-merged");
        assert_nothing_merged(&memory);
        let mut next = 0;
        for (block, &count) in duplicates.iter().enumerate() {
            for n in 0..count {
                let page = block * size() + (n * 37 + 11) % size();
                memory.assert_shows(page, twins.pages() as u64 - next, "un-merged");
                next += 1;
            }
        }
    }
}

/// Goal: 1 is what the kernel does, and what is asked for before the threshold is reached is not forgotten
/// when duplicates come by and by.
fn one_splits_at_once_and_so_does_kernel_defaults() {
    assert_eq!(EngineSettings::kernel_defaults().thp_min_duplicates, 1);
    let (memory, twins) = (unique(2), small(10));
    memory.fill(40, 3);
    let engine = engine(1, |_| ());
    register(&engine, &memory);
    register(&engine, &twins);
    passes(&engine, 3);
    assert_eq!((whole(&memory), merged_pages(&memory)), (1, 1));
}

/// Goal: taking a huge page apart takes longer than all else in a window, so a window does it for one only, and
/// whoever writes to one of the others does not wait for it.
fn window_takes_one_huge_page_apart() {
    let blocks = 30;
    let (memory, twins) = (unique(blocks), small(blocks));
    (0..blocks).for_each(|block| memory.fill(block * size() + 99, 1 + block as u64));
    let engine = engine(1, |_| ());
    register(&engine, &memory);
    register(&engine, &twins);
    let before = scan(&engine).space.windows;
    let stats = passes(&engine, 2);
    assert_eq!((whole(&memory), merged_pages(&memory)), (0, blocks));
    let windows = stats.space.windows - before;
    assert!(windows >= blocks as u64, "{windows} windows");
}

/// Goal: zero pages count, alone and with others.
fn zero_pages_count() {
    for (zeroes, others, split) in [(7, 0, false), (8, 0, true), (5, 2, false), (5, 3, true)] {
        let (memory, twins) = (unique(2), small(10));
        for n in 0..zeroes {
            memory.fill(size() + n * 60, 0);
        }
        for n in 0..others {
            memory.fill(size() + 1 + n * 60, 1 + n as u64);
        }
        let engine = engine(8, |scan| scan.use_zero_pages = true);
        register(&engine, &memory);
        register(&engine, &twins);
        let stats = passes(&engine, 5);
        let case = format!("{zeroes} and {others}: {:?}", reasons(&stats));
        let done = if split { zeroes as u64 } else { 0 };
        assert_eq!(stats.core.ksm_zero_pages, done, "{case}");
        assert_eq!(whole(&memory), if split { 1 } else { 2 }, "{case}");
        let done = if split { others } else { 0 };
        assert_eq!(merged_pages(&memory), done, "{case}");
        for n in 0..zeroes {
            memory.assert_shows(size() + n * 60, 0, "a zero page");
        }
    }
}

/// Goal: of pages with the same bytes those merge that may, whichever is looked at first; those in a huge
/// page that is not worth it hold up nobody.
fn twins_of_refused_pages_merge_all_the_same() {
    for huge_first in [true, false] {
        // Each content: twice in the huge page that is not worth it, and so often elsewhere.
        for elsewhere in 1..4 {
            let (memory, twins) = (unique(1), Memory::new(3 * elsewhere));
            for content in 0..3 {
                memory.fill(100 + content, 1 + content as u64);
                memory.fill(300 + content, 1 + content as u64);
                for n in 0..elsewhere {
                    twins.fill(n * 3 + content, 1 + content as u64);
                }
            }
            let engine = engine(8, |_| ());
            let regions = if huge_first {
                [&memory, &twins]
            } else {
                [&twins, &memory]
            };
            for memory in regions {
                register(&engine, memory);
            }
            let stats = passes(&engine, 5);
            let case = format!("{huge_first} {elsewhere}: {:?}", reasons(&stats));
            let done = if elsewhere > 1 { 3 * elsewhere } else { 0 };
            assert_eq!(merged_pages(&twins), done, "{case}");
            assert_eq!((whole(&memory), merged_pages(&memory)), (1, 0), "{case}");
            assert_eq!(skipped(&stats, Reason::Other), 0, "{case}");
            let after = passes(&engine, 3);
            assert_eq!(after.space.windows, stats.space.windows, "{case}");
        }
    }
}

/// Goal: pages with twins in huge pages only, of which one is worth it and the other is not, wait; once the
/// other is worth it, too, they merge.
fn pairs_of_huge_pages_wait_for_the_second() {
    let (memory, twins) = (unique(2), small(10));
    let other = size() + 17;
    // Five pairs between both, and three more in the first.
    for n in 0..5 {
        memory.fill(n * 20, 50_000 + n as u64);
        memory.fill(other + n * 20, 50_000 + n as u64);
    }
    (5..8).for_each(|n| memory.fill(n * 20, n as u64));
    // Its writes are told by digests, so that writing splits nothing.
    let engine = engine(8, |scan| scan.write_tracking = false);
    register(&engine, &memory);
    register(&engine, &twins);
    passes(&engine, 5);
    assert_eq!((merged_of(&memory, 0), merged_of(&memory, 1)), (3, 0));
    assert_eq!(whole(&memory), 1);
    (0..3).for_each(|n| memory.fill(other + 200 + n, 1 + n as u64));
    let stats = passes(&engine, 5);
    let why = reasons(&stats);
    assert_eq!(
        (merged_of(&memory, 0), merged_of(&memory, 1)),
        (8, 8),
        "{why:?}"
    );
    assert_eq!(whole(&memory), 0);
}

/// Goal: pages that become huge while they are registered are judged as a huge page from then on, and as
/// small pages once somebody has split it.
fn huge_pages_that_come_and_go_are_followed() {
    let (memory, twins) = (Memory::huge(2 * size()), small(100));
    memory.advise(libc::MADV_NOHUGEPAGE).expect("small pages");
    (0..memory.pages()).for_each(|page| memory.fill(page, 1_000_000 + page as u64));
    // (The kernel makes no huge page of what is protected.)
    let engine = engine(8, |scan| scan.write_tracking = false);
    register(&engine, &memory);
    register(&engine, &twins);
    passes(&engine, 3);
    assert_eq!(whole(&memory), 0);
    memory.advise(libc::MADV_HUGEPAGE).expect("huge pages");
    memory.advise(MADV_COLLAPSE).expect("collapsed");
    let duplicate = |block: usize, n: usize| memory.fill(block * size() + n * 3, 1 + n as u64);
    for block in 0..2 {
        (0..7).for_each(|n| duplicate(block, n));
    }
    passes(&engine, 4);
    assert_eq!((whole(&memory), merged_pages(&memory)), (2, 0));
    duplicate(0, 7);
    passes(&engine, 4);
    assert_eq!((whole(&memory), merged_pages(&memory)), (1, 8));
    // Its owner's doing.
    split_by_its_owner(&memory, size() + 400);
    assert_eq!(whole(&memory), 0);
    passes(&engine, 4);
    assert_eq!((merged_of(&memory, 0), merged_of(&memory, 1)), (8, 7));
    for (block, n) in (0..8).map(|n| (0, n)).chain((0..7).map(|n| (1, n))) {
        memory.assert_shows(block * size() + n * 3, 1 + n as u64, "merged");
    }
}

/// Goal: what the kernel makes a huge page of, after all of it has been written, stays one where writes are
/// tracked, wherever the borders of what the kernel is asked about lie.
fn tracked_pages_that_become_huge_stay_so() {
    let memory = Memory::huge(24 * size());
    memory.advise(libc::MADV_NOHUGEPAGE).expect("small pages");
    let fill = |with| (0..memory.pages()).for_each(|page| memory.fill(page, with + page as u64));
    fill(1_000_000);
    let engine = engine(32, |_| ());
    let first = 300;
    let pages = memory.pages() - first;
    try_register(&engine, memory.at(first), pages * page_size(), "").expect("registered");
    passes(&engine, 3);
    fill(2_000_000);
    for (part, len) in [(0, first), (first, pages)] {
        memory
            .advise_pages(part, len, libc::MADV_HUGEPAGE)
            .expect("huge pages");
    }
    memory
        .advise_pages(size(), memory.pages() - size(), MADV_COLLAPSE)
        .expect("collapsed");
    assert_eq!(whole(&memory), 23);
    for pass in 0..4 {
        let unshared = scan(&engine).core.pages_unshared;
        assert_eq!(unshared, if pass == 0 { 0 } else { pages as u64 });
        assert_eq!(whole(&memory), 23, "pass {pass}");
    }
}

/// Goal: where writes are tracked, a write splits the huge page that it goes to, and what was refused because
/// of that merges in the next pass; as it does when something else has split it, of which no look tells.
fn huge_pages_that_were_split_are_small_pages_at_once() {
    let (memory, twins) = (unique(4), small(100));
    for block in 0..4 {
        (0..7).for_each(|n| memory.fill(block * size() + n * 3, 1 + n as u64));
    }
    let engine = engine(8, |_| ());
    register(&engine, &memory);
    register(&engine, &twins);
    passes(&engine, 5);
    assert_eq!((whole(&memory), merged_pages(&memory)), (4, 0));
    memory.store(size() + 300, 0, 1);
    split_by_its_owner(&memory, 2 * size() + 300);
    assert_eq!(whole(&memory), 2);
    passes(&engine, 2);
    let done = [0, 1, 2, 3].map(|block| merged_of(&memory, block));
    assert_eq!((whole(&memory), done), (2, [0, 7, 7, 0]));
}

/// Goal: a region that begins and ends inside of huge pages: what is left of those is small pages, and merges
/// as such; the rest is judged.
fn borders_of_a_region_cut_what_lies_across_them() {
    let (memory, twins) = (unique(3), small(20));
    for block in 0..3 {
        (0..3).for_each(|n| memory.fill(block * size() + 200 + n, 1 + (block * 3 + n) as u64));
    }
    let engine = engine(8, |_| ());
    let (at, len) = (memory.at(100), memory.len() - 200 * page_size());
    try_register(&engine, at, len, "").expect("registered");
    register(&engine, &twins);
    assert_eq!(whole(&memory), 1);
    let stats = passes(&engine, 4);
    let done = [0, 1, 2].map(|block| merged_of(&memory, block));
    assert_eq!(done, [3, 0, 3], "{:?}", reasons(&stats));
    assert_eq!(whole(&memory), 1);
}

/// Goal: where a part of a huge page is set aside, that is never protected for the sake of the rest, nor
/// merged; the rest is judged as what it is by then.
fn parts_set_aside_are_not_protected_with_their_huge_page() {
    let (memory, twins) = (unique(2), small(20));
    (0..4).for_each(|n| memory.fill(n * 100, 1 + n as u64));
    let engine = engine(8, |_| ());
    let region = register(&engine, &memory);
    engine
        .exclude(region, memory.at(50), 10 * page_size())
        .expect("set aside");
    register(&engine, &twins);
    passes(&engine, 4);
    for (page, entry) in os::entries(&memory).iter().enumerate() {
        let aside = (50..60).contains(&page);
        assert!(!aside || !entry.is_protected(), "page {page}");
    }
    assert_eq!((whole(&memory), merged_pages(&memory)), (1, 4));
}

fn main() -> ExitCode {
    let cases = vec![
        case!(tracking_leaves_huge_pages_whole),
        case!(one_per_cent_of_writes_splits_what_was_written_only),
        case!(never_leaves_huge_pages_alone),
        case!(threshold_is_kept_at_both_sides),
        case!(one_splits_at_once_and_so_does_kernel_defaults),
        case!(window_takes_one_huge_page_apart),
        case!(zero_pages_count),
        case!(twins_of_refused_pages_merge_all_the_same),
        case!(pairs_of_huge_pages_wait_for_the_second),
        case!(huge_pages_that_come_and_go_are_followed),
        case!(tracked_pages_that_become_huge_stay_so),
        case!(huge_pages_that_were_split_are_small_pages_at_once),
        case!(borders_of_a_region_cut_what_lies_across_them),
        case!(parts_set_aside_are_not_protected_with_their_huge_page),
    ];
    let needed = cases.into_iter().map(|case| case.needs(Need::HugePages));
    support::run(needed.collect())
}
