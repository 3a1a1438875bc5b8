//! The kernel's own figures: each case below was run through ksmd of Linux 6.18, one full scan at a
//! time, and its counters were written down.

mod support {
    pub mod toy;
}

use pagemerge_core::{PageId, Reason, Settings};
use support::toy::{Bytes, World, ZERO, bytes, ours, plain};

fn mix() -> Vec<Option<Bytes>> {
    let mut pages = Vec::new();
    for (tag, count) in [(1000, 20), (1001, 5), (1002, 2)] {
        pages.extend(vec![Some(bytes(tag)); count]);
    }
    pages.extend((0..13).map(|tag| Some(bytes(tag))));
    pages.extend(vec![Some(ZERO); 10]);
    pages.extend(vec![None; 14]);
    pages
}

fn same(count: usize) -> Vec<Option<Bytes>> {
    vec![Some(bytes(1)); count]
}

fn zeroes(count: usize) -> Vec<Option<Bytes>> {
    vec![Some(ZERO); count]
}

fn unique(count: u64) -> Vec<Option<Bytes>> {
    (0..count).map(|tag| Some(bytes(tag))).collect()
}

/// A case: pages, regions that have them, `max_page_sharing`, `use_zero_pages`; then what came of it:
/// the row after convergence, the scan at which it was first seen, pages scanned by then, groups.
struct Case {
    name: &'static str,
    pages: Vec<Option<Bytes>>,
    regions: u32,
    max: u32,
    zero: bool,
    last: [i64; 8],
    scans: u32,
    scanned: u64,
    groups: Vec<usize>,
}

#[allow(clippy::too_many_lines)] // A table.
fn cases() -> Vec<Case> {
    let case = |name, pages, last, scanned, groups| Case {
        name,
        pages,
        regions: 1,
        max: 256,
        zero: false,
        last,
        scans: 2,
        scanned,
        groups,
    };
    let two = |count| vec![2; count];
    vec![
        case(
            "2 identical",
            same(2),
            [1, 1, 0, 0, 0, 0, 0, 3968],
            4,
            vec![2],
        ),
        case(
            "10 identical",
            same(10),
            [1, 9, 0, 0, 0, 0, 0, 36224],
            20,
            vec![10],
        ),
        case(
            "256 identical",
            same(256),
            [1, 255, 0, 0, 0, 0, 0, 1_028_096],
            512,
            vec![256],
        ),
        case(
            "257 identical",
            same(257),
            [1, 255, 1, 0, 0, 0, 0, 1_028_032],
            514,
            vec![256],
        ),
        case(
            "258 identical",
            same(258),
            [2, 256, 0, 0, 1, 2, 0, 1_032_064],
            516,
            vec![256, 2],
        ),
        case(
            "513 identical",
            same(513),
            [2, 510, 1, 0, 1, 2, 0, 2_056_128],
            1026,
            vec![256; 2],
        ),
        case(
            "600 identical",
            same(600),
            [3, 597, 0, 0, 1, 3, 0, 2_406_912],
            1200,
            vec![256, 256, 88],
        ),
        case(
            "100 zero",
            zeroes(100),
            [1, 99, 0, 0, 0, 0, 0, 399_104],
            200,
            vec![100],
        ),
        case(
            "300 zero",
            zeroes(300),
            [2, 298, 0, 0, 1, 2, 0, 1_201_408],
            600,
            vec![256, 44],
        ),
        Case {
            zero: true,
            scans: 3,
            ..case(
                "100 zero to zero",
                zeroes(100),
                [0, 0, 0, 0, 0, 0, 100, 409_600],
                200,
                vec![],
            )
        },
        Case {
            zero: true,
            scans: 3,
            ..case(
                "300 zero to zero",
                zeroes(300),
                [0, 0, 0, 0, 0, 0, 300, 1_228_800],
                600,
                vec![],
            )
        },
        case(
            "64 unique",
            unique(64),
            [0, 0, 64, 0, 0, 0, 0, -4096],
            128,
            vec![],
        ),
        case(
            "mix",
            mix(),
            [4, 33, 13, 0, 0, 0, 0, 131_968],
            100,
            vec![20, 10, 5, 2],
        ),
        Case {
            zero: true,
            scans: 3,
            ..case(
                "mix to zero",
                mix(),
                [3, 24, 13, 0, 0, 0, 10, 136_704],
                140,
                vec![20, 5, 2],
            )
        },
        Case {
            max: 2,
            ..case(
                "100, max 2",
                same(100),
                [50, 50, 0, 0, 1, 50, 0, 198_400],
                200,
                two(50),
            )
        },
        Case {
            max: 2,
            ..case(
                "101, max 2",
                same(101),
                [50, 50, 1, 0, 1, 50, 0, 198_336],
                202,
                two(50),
            )
        },
        Case {
            max: 3,
            ..case(
                "10, max 3",
                same(10),
                [3, 6, 1, 0, 1, 3, 0, 23936],
                20,
                vec![3; 3],
            )
        },
        Case {
            max: 3,
            ..case(
                "11, max 3",
                same(11),
                [4, 7, 0, 0, 1, 4, 0, 27968],
                22,
                vec![3, 3, 3, 2],
            )
        },
        Case {
            regions: 2,
            ..case(
                "2 by 10",
                same(10),
                [1, 19, 0, 0, 0, 0, 0, 76544],
                40,
                vec![20],
            )
        },
        Case {
            regions: 2,
            ..case(
                "2 by 32",
                unique(32),
                [32, 32, 0, 0, 0, 0, 0, 126_976],
                128,
                two(32),
            )
        },
        Case {
            regions: 2,
            zero: true,
            scans: 3,
            ..case("2 mixes", mix(), [16, 64, 0, 0, 0, 0, 20, 338_944], 280, {
                let mut groups = vec![40, 10, 4];
                groups.extend(two(13));
                groups
            })
        },
    ]
}

fn build(case: &Case, settings: &Settings) -> World {
    let mut world = World::new(Settings {
        max_page_sharing: case.max,
        use_zero_pages: case.zero,
        ..settings.clone()
    });
    for _ in 0..case.regions {
        world.add(&case.pages);
    }
    world
}

#[test]
fn static_contents_by_the_kernels_rules_give_the_kernels_counters() {
    for case in cases() {
        let mut world = build(&case, &plain());
        let present = case.pages.iter().flatten().count() * case.regions as usize;
        let present = i64::try_from(present).expect("a toy is small");
        world.scan();
        assert_eq!(
            world.row(),
            [0, 0, 0, present, 0, 0, 0, -64 * present],
            "{}",
            case.name
        );
        for scan in 2..=case.scans {
            assert_ne!(world.row(), case.last, "{} before scan {scan}", case.name);
            world.scan();
        }
        assert_eq!(world.row(), case.last, "{}", case.name);
        assert_eq!(
            world.scanner.stats().pages_scanned,
            case.scanned,
            "{}",
            case.name
        );
        assert_eq!(world.groups(), case.groups, "{}", case.name);
        world.scans(3);
        assert_eq!(world.row(), case.last, "{} later", case.name);
    }
}

#[test]
fn static_contents_by_any_rules_come_to_the_same() {
    for case in cases() {
        for settings in [
            ours(),
            Settings {
                write_tracking: false,
                ..ours()
            },
            Settings {
                tree_order: pagemerge_core::TreeOrder::Content,
                ..ours()
            },
            Settings {
                lagging_records: true,
                ..ours()
            },
            Settings {
                smart_scan: true,
                ..ours()
            },
        ] {
            let mut world = build(&case, &settings);
            world.scans(4);
            let mut expected = case.last;
            let mut row = world.row();
            if settings.smart_scan {
                // Pages that have not merged are left out at times, and are volatile then.
                for row in [&mut row, &mut expected] {
                    row[2] += std::mem::take(&mut row[3]);
                }
            }
            assert_eq!(row, expected, "{} with {settings:?}", case.name);
            assert_eq!(
                world.groups(),
                case.groups,
                "{} with {settings:?}",
                case.name
            );
        }
    }
}

#[test]
fn zero_pages_one_scan_after_merging_still_have_their_records() {
    let mut world = World::new(Settings {
        use_zero_pages: true,
        ..plain()
    });
    world.add(&zeroes(100));
    world.scans(2);
    assert_eq!(world.row(), [0, 0, 0, 100, 0, 0, 100, 403_200]);
    world.scan();
    assert_eq!(world.row(), [0, 0, 0, 0, 0, 0, 100, 409_600]);
}

#[test]
fn zero_pages_without_lag_have_no_records_at_once() {
    let mut world = World::new(Settings {
        use_zero_pages: true,
        ..ours()
    });
    let (region, _) = world.add(&zeroes(100));
    world.scans(2);
    assert_eq!(world.row(), [0, 0, 0, 0, 0, 0, 100, 409_600]);
    let stats = world
        .scanner
        .region_stats(region)
        .expect("it is registered");
    assert_eq!((stats.ksm_zero_pages, stats.ksm_rmap_items), (100, 0));
    assert_eq!(stats.ksm_process_profit, 409_600);
}

/// Ten identical pages after four scans; then an operation; then the rows of the next scans.
fn after(settings: &Settings, change: impl Fn(&mut World, PageId), rows: &[[i64; 8]]) {
    let mut world = World::new(settings.clone());
    let (_, first) = world.add(&same(10));
    world.scans(4);
    let merged = [1, 9, 0, 0, 0, 0, 0, 36224];
    assert_eq!(world.row(), merged);
    change(&mut world, first);
    assert_eq!(world.row(), merged, "counters lag");
    for (n, row) in rows.iter().enumerate() {
        world.scan();
        assert_eq!(world.row(), *row, "{} scans later", n + 1);
    }
    world.scan();
    assert_eq!(Some(&world.row()), rows.last(), "it stays so");
}

fn for_both(change: impl Fn(&mut World, PageId) + Copy, rows: &[[i64; 8]]) {
    after(&plain(), change, rows);
    after(
        &Settings {
            write_tracking: false,
            ..ours()
        },
        change,
        rows,
    );
    after(&ours(), change, rows);
}

#[test]
fn three_pages_rewritten_alike_make_a_second_frame() {
    let change = |world: &mut World, first: PageId| {
        for n in [2, 5, 9] {
            world.toy.write(first.plus(n), bytes(2));
        }
    };
    for_both(
        change,
        &[[1, 6, 0, 3, 0, 0, 0, 23936], [2, 8, 0, 0, 0, 0, 0, 32128]],
    );
}

#[test]
fn three_pages_rewritten_differently_become_unshared() {
    let change = |world: &mut World, first: PageId| {
        for n in [2, 5, 9] {
            world.toy.write(first.plus(n), bytes(100 + u64::from(n)));
        }
    };
    for_both(
        change,
        &[[1, 6, 0, 3, 0, 0, 0, 23936], [1, 6, 3, 0, 0, 0, 0, 23936]],
    );
}

#[test]
fn one_page_rewritten_with_its_old_bytes_merges_in_the_next_scan() {
    let change = |world: &mut World, first: PageId| world.toy.write(first.plus(4), bytes(1));
    after(&plain(), change, &[[1, 9, 0, 0, 0, 0, 0, 36224]]);
    // With write tracking it was written, so it waits for one scan.
    after(
        &ours(),
        change,
        &[[1, 8, 0, 1, 0, 0, 0, 32128], [1, 9, 0, 0, 0, 0, 0, 36224]],
    );
}

#[test]
fn nine_of_ten_pages_rewritten_leave_one_sharer() {
    let change = |world: &mut World, first: PageId| {
        for n in 0..9 {
            world.toy.write(first.plus(n), bytes(100 + u64::from(n)));
        }
    };
    for_both(
        change,
        &[[1, 0, 0, 9, 0, 0, 0, -640], [1, 0, 9, 0, 0, 0, 0, -640]],
    );
}

#[test]
fn ten_of_ten_pages_rewritten_leave_no_frame() {
    let change = |world: &mut World, first: PageId| {
        for n in 0..10 {
            world.toy.write(first.plus(n), bytes(100 + u64::from(n)));
        }
    };
    for_both(
        change,
        &[[0, 0, 0, 10, 0, 0, 0, -640], [0, 0, 10, 0, 0, 0, 0, -640]],
    );
}

#[test]
fn five_of_ten_pages_discarded_lose_their_records() {
    let change = |world: &mut World, first: PageId| {
        for n in 0..5 {
            world.toy.discard(first.plus(n));
        }
    };
    for_both(change, &[[1, 4, 0, 0, 0, 0, 0, 16064]]);
    after(
        &plain(),
        |world, first| {
            change(world, first);
            world
                .scanner
                .vacated(&mut world.toy, first, 5)
                .expect("the toy works");
        },
        &[[1, 4, 0, 0, 0, 0, 0, 16064]],
    );
}

#[test]
fn half_of_the_zero_pages_unregistered_are_uncounted_at_once() {
    let mut world = World::new(Settings {
        use_zero_pages: true,
        ..plain()
    });
    let (half, _) = world.add(&zeroes(50));
    world.add(&zeroes(50));
    world.scans(4);
    world
        .scanner
        .unregister(&mut world.toy, half)
        .expect("nothing is refused");
    assert_eq!(world.row(), [0, 0, 0, 0, 0, 0, 50, 204_800]);
    world.scan();
    assert_eq!(world.row(), [0, 0, 0, 0, 0, 0, 50, 204_800]);
}

#[test]
fn half_of_the_merged_pages_unregistered_are_uncounted_by_the_next_scan() {
    for first_half in [true, false] {
        let mut world = World::new(plain());
        let (a, _) = world.add(&same(5));
        let (b, _) = world.add(&same(5));
        world.scans(4);
        let out = if first_half { a } else { b };
        world
            .scanner
            .unregister(&mut world.toy, out)
            .expect("nothing is refused");
        world.check();
        assert_eq!(world.row(), [1, 9, 0, 0, 0, 0, 0, 36224]);
        world.scan();
        assert_eq!(world.row(), [1, 4, 0, 0, 0, 0, 0, 16064]);
        assert_eq!(world.scanner.region_stats(out), None);
    }
}

#[test]
fn one_of_two_regions_forgotten_is_uncounted_by_the_next_scan() {
    let mut world = World::new(plain());
    let (a, first) = world.add(&same(10));
    world.add(&same(10));
    world.scans(3);
    assert_eq!(world.row(), [1, 19, 0, 0, 0, 0, 0, 76544]);
    for n in 0..10 {
        world.toy.discard(first.plus(n));
    }
    world
        .scanner
        .forget(&mut world.toy, a)
        .expect("the toy works");
    world.check();
    assert_eq!(world.row(), [1, 19, 0, 0, 0, 0, 0, 76544]);
    world.scan();
    assert_eq!(world.row(), [1, 9, 0, 0, 0, 0, 0, 36224]);
}

#[test]
fn all_sharers_of_all_dups_gone_leave_an_empty_chain() {
    let mut world = World::new(Settings {
        max_page_sharing: 4,
        ..plain()
    });
    let (_, first) = world.add(&same(10));
    world.scans(3);
    assert_eq!(world.row(), [3, 7, 0, 0, 1, 3, 0, 28032]);
    for n in 0..10 {
        world.toy.discard(first.plus(n));
    }
    world.scan();
    assert_eq!(world.row(), [0, 0, 0, 0, 1, 0, 0, 0]);
    world
        .scanner
        .set_run(&mut world.toy, pagemerge_core::RunMode::Unmerge)
        .expect("nothing merged");
    assert_eq!(world.row(), [0; 8]);
}

#[test]
fn twelve_equal_pages_all_rewritten_leave_an_empty_chain_until_a_search_passes() {
    let mut world = World::new(Settings {
        max_page_sharing: 4,
        ..plain()
    });
    let mut pages = same(12);
    pages.push(None);
    let (_, first) = world.add(&pages);
    world.scans(3);
    for n in 0..12 {
        world.toy.write(first.plus(n), bytes(100 + u64::from(n)));
    }
    world.scan();
    assert_eq!(world.row()[..2], [0, 0]);
    assert_eq!(world.row()[4..6], [1, 0]);
    world.toy.write(first.plus(12), bytes(1));
    world.scans(2);
    assert_eq!(world.row()[4..6], [0, 0]);
}

#[test]
fn two_of_three_dups_rewritten_dissolve_the_chain_when_a_search_passes() {
    let mut world = World::new(Settings {
        max_page_sharing: 4,
        ..plain()
    });
    let (_, first) = world.add(&same(12));
    world.scans(3);
    for n in 4..12 {
        world.toy.write(first.plus(n), bytes(100 + u64::from(n)));
    }
    world.scan();
    assert_eq!(world.row()[..6], [1, 3, 0, 8, 1, 1]);
    world.scan();
    assert_eq!(world.row()[..6], [1, 3, 8, 0, 0, 0]);
}

/// Dups A, B, C of four; A cut to 3 sharers, B to 1; then three more pages, one by one.
fn joined(settings: &Settings) -> (String, [i64; 8]) {
    let mut world = World::new(Settings {
        max_page_sharing: 4,
        ..settings.clone()
    });
    let mut pages = same(12);
    pages.extend([None; 3]);
    let (_, first) = world.add(&pages);
    world.scans(3);
    let name = |world: &World, page: u32| world.frame(first.plus(page));
    let dups = [
        (name(&world, 1), 'A'),
        (name(&world, 7), 'B'),
        (name(&world, 8), 'C'),
    ];
    for n in [0, 4, 5, 6] {
        world.toy.write(first.plus(n), bytes(100 + u64::from(n)));
    }
    world.scan();
    let mut joined = String::new();
    for n in 12..15 {
        world.toy.write(first.plus(n), bytes(1));
        world.scans(2);
        let frame = name(&world, n);
        joined.extend(dups.iter().find(|dup| dup.0 == frame).map(|dup| dup.1));
    }
    (joined, world.row())
}

#[test]
fn choice_of_dup_without_pruning_takes_the_first_with_room() {
    let never = Settings {
        stable_node_chains_prune_millisecs: u32::MAX,
        ..plain()
    };
    let (joined, row) = joined(&never);
    assert_eq!(
        (joined.as_str(), &row[..6]),
        ("BBB", &[3, 8, 4, 0, 1, 3][..])
    );
}

#[test]
fn choice_of_dup_with_pruning_takes_the_fullest_with_room() {
    let always = Settings {
        stable_node_chains_prune_millisecs: 0,
        ..plain()
    };
    let (joined, row) = joined(&always);
    assert_eq!(
        (joined.as_str(), &row[..6]),
        ("ABB", &[3, 8, 4, 0, 1, 3][..])
    );
}

#[test]
fn batches_of_30_over_100_pages_mix_two_scans() {
    let mut world = World::new(plain());
    world.unique(0, 100);
    let mut seen = Vec::new();
    for _ in 0..9 {
        let report = world.step(30);
        let stats = world.scanner.stats();
        seen.push((stats.pages_unshared, stats.pages_volatile, stats.full_scans));
        assert_eq!(
            report.full_scan_done,
            [4, 8].contains(&seen.len()) || seen.len() == 12
        );
    }
    let expected = [
        (0, 30, 0),
        (0, 60, 0),
        (0, 90, 0),
        (0, 100, 1),
        (30, 70, 1),
        (60, 40, 1),
        (90, 10, 1),
        (100, 0, 2),
        (100, 0, 2),
    ];
    assert_eq!(seen, expected);
}

#[test]
fn batches_of_50_over_100_pages_need_an_empty_one_to_close_the_scan() {
    let mut world = World::new(plain());
    world.unique(0, 100);
    let mut seen = Vec::new();
    for _ in 0..6 {
        let report = world.step(50);
        let stats = world.scanner.stats();
        seen.push((stats.pages_unshared, stats.pages_volatile, stats.full_scans));
        assert_eq!(report.examined, if seen.len() % 3 == 0 { 0 } else { 50 });
    }
    let expected = [
        (0, 50, 0),
        (0, 100, 0),
        (0, 100, 1),
        (50, 50, 1),
        (100, 0, 1),
        (100, 0, 2),
    ];
    assert_eq!(seen, expected);
}

/// The order in which a scan visits regions, told by when their counts of records move on.
fn order_of_visits(steps_before: u32) -> (Vec<char>, u64) {
    let mut world = World::new(plain());
    let (a, _) = world.unique(0, 50);
    let (b, _) = world.unique(100, 50);
    for _ in 0..steps_before {
        world.step(30);
    }
    let (c, _) = world.unique(200, 10);
    let mut scanned = 0;
    while world.scanner.stats().full_scans == 0 {
        world.step(30);
        scanned = world.scanner.stats().pages_scanned;
    }
    assert_eq!(
        world
            .scanner
            .region_stats(c)
            .expect("it is registered")
            .ksm_rmap_items,
        0
    );
    // In the second scan, pages go from volatile to unshared in the order of visits.
    let mut order = Vec::new();
    let mut counted: Vec<(char, u64, u64)> = Vec::new();
    for (name, region) in [('A', a), ('B', b), ('C', c)] {
        let items = world
            .scanner
            .region_stats(region)
            .expect("it is registered")
            .ksm_rmap_items;
        counted.push((name, items, 0));
    }
    let mut first_requests = world.toy.hashed;
    while world.scanner.stats().full_scans == 1 {
        let c_before = world
            .scanner
            .region_stats(c)
            .expect("it is registered")
            .ksm_rmap_items;
        let unshared_before = world.scanner.stats().pages_unshared;
        world.step(1);
        if world.toy.hashed == first_requests {
            continue;
        }
        first_requests = world.toy.hashed;
        let c_now = world
            .scanner
            .region_stats(c)
            .expect("it is registered")
            .ksm_rmap_items;
        let name = if c_now > c_before {
            'C'
        } else {
            assert_eq!(world.scanner.stats().pages_unshared, unshared_before + 1);
            if order.iter().filter(|&&name| name != 'C').count() < 50 {
                'A'
            } else {
                'B'
            }
        };
        order.push(name);
    }
    order.dedup();
    (order, scanned)
}

#[test]
fn region_registered_while_the_first_is_scanned_comes_first_in_the_next_scan() {
    assert_eq!(order_of_visits(1), (vec!['C', 'A', 'B'], 100));
}

#[test]
fn region_registered_while_the_second_is_scanned_comes_before_it_in_the_next_scan() {
    assert_eq!(order_of_visits(2), (vec!['A', 'C', 'B'], 100));
}

#[test]
fn pinned_page_among_four_identical_ones_does_not_hold_up_the_others() {
    for settings in [
        plain(),
        Settings {
            write_tracking: false,
            ..ours()
        },
        ours(),
    ] {
        let mut world = World::new(settings.clone());
        let (_, first) = world.add(&same(4));
        world.toy.pages[first.index() + 1].refuses = Some(Reason::Pinned);
        world.scans(2);
        for _ in 0..3 {
            assert_eq!(world.row()[..4], [1, 2, 0, 1], "{settings:?}");
            assert_eq!(
                world.scanner.stats().skipped[Reason::Pinned as usize],
                1,
                "{settings:?}"
            );
            world.scan();
        }
        world.toy.pages[first.index() + 1].refuses = None;
        world.scan();
        assert_eq!(world.row()[..4], [1, 3, 0, 0], "{settings:?}");
        assert_eq!(
            world.scanner.stats().skipped,
            [0; Reason::ALL.len()],
            "{settings:?}"
        );
    }
}

#[test]
fn pinned_page_of_two_identical_ones_leaves_one_unshared_and_one_volatile() {
    for settings in [
        plain(),
        Settings {
            write_tracking: false,
            ..ours()
        },
        ours(),
    ] {
        for pinned in [0, 1] {
            let mut world = World::new(settings.clone());
            let (_, first) = world.add(&same(2));
            world.toy.pages[first.index() + pinned].refuses = Some(Reason::Pinned);
            world.scans(2);
            for _ in 0..3 {
                assert_eq!(world.row()[..4], [0, 0, 1, 1], "{pinned} {settings:?}");
                assert!(world.toy.frames.is_empty(), "no frame is left over");
                world.scan();
            }
            world.toy.pages[first.index() + pinned].refuses = None;
            world.scan();
            assert_eq!(world.row()[..4], [1, 1, 0, 0], "{pinned} {settings:?}");
        }
    }
}

#[test]
fn pinned_page_of_three_zero_pages_becomes_unshared() {
    for settings in [
        plain(),
        Settings {
            lagging_records: true,
            ..ours()
        },
    ] {
        let mut world = World::new(Settings {
            use_zero_pages: true,
            ..settings.clone()
        });
        let (_, first) = world.add(&zeroes(3));
        world.toy.pages[first.index() + 1].refuses = Some(Reason::Pinned);
        world.scans(2);
        assert_eq!(world.row()[..7], [0, 0, 1, 2, 0, 0, 2], "{settings:?}");
        world.scan();
        assert_eq!(world.row()[..7], [0, 0, 1, 0, 0, 0, 2], "{settings:?}");
    }
}

#[test]
fn use_zero_pages_switched_on_and_off_converts_nothing() {
    let mut world = World::new(plain());
    let mut pages = zeroes(10);
    pages.extend([None; 8]);
    let (_, first) = world.add(&pages);
    world.scans(3);
    let switch = |world: &mut World, on| {
        let new = Settings {
            use_zero_pages: on,
            ..world.scanner.settings().clone()
        };
        world
            .scanner
            .change_settings(&mut world.toy, new)
            .expect("it may change at any time");
    };
    switch(&mut world, true);
    world.scans(2);
    assert_eq!(world.row()[..7], [1, 9, 0, 0, 0, 0, 0]);
    (10..14).for_each(|n| world.toy.write(first.plus(n), ZERO));
    world.scans(3);
    assert_eq!(world.row()[..7], [1, 9, 0, 0, 0, 0, 4]);
    switch(&mut world, false);
    (14..18).for_each(|n| world.toy.write(first.plus(n), ZERO));
    world.scans(3);
    assert_eq!(world.row()[..7], [1, 13, 0, 0, 0, 0, 4]);
}

#[test]
fn smart_scan_of_one_unique_page_follows_the_kernels_sequence() {
    let mut world = World::new(Settings {
        smart_scan: true,
        ..plain()
    });
    world.unique(0, 1);
    let mut trace = String::new();
    for _ in 0..45 {
        world.scan();
        trace.push_str(&world.scanner.stats().pages_unshared.to_string());
    }
    assert_eq!(trace, "011101001000010000000010000000010000000010000");
}

#[test]
fn smart_scan_after_rewrites_goes_on_with_the_age_of_the_merged_pages() {
    let mut world = World::new(Settings {
        smart_scan: true,
        ..plain()
    });
    let (_, first) = world.add(&same(10));
    world.scans(4);
    for n in [2, 5, 9] {
        world.toy.write(first.plus(n), bytes(100 + u64::from(n)));
    }
    let (mut unshared, mut skipped) = (Vec::new(), Vec::new());
    for _ in 5..=16 {
        world.scan();
        unshared.push(world.scanner.stats().pages_unshared);
        skipped.push(world.scanner.stats().pages_skipped);
    }
    assert_eq!(unshared, [0, 3, 0, 3, 0, 0, 3, 0, 0, 0, 0, 3]);
    assert_eq!(skipped, [0, 0, 3, 3, 6, 9, 9, 12, 15, 18, 21, 21]);
}

#[test]
fn smart_scan_of_a_late_comer_waits_as_long_as_in_the_kernel() {
    let expected = [
        (3, Some(3)),
        (4, Some(2)),
        (5, Some(4)),
        (6, Some(3)),
        (7, Some(2)),
        (8, Some(6)),
        (9, Some(14)),
        (10, Some(4)),
        (11, Some(3)),
        (12, Some(2)),
        (13, None),
        (14, Some(9)),
        (15, None),
        (16, None),
        (17, Some(6)),
        (18, Some(14)),
        (19, Some(4)),
        (20, Some(3)),
        (21, Some(2)),
        (22, None),
        (23, Some(9)),
        (24, None),
        (25, None),
        (26, Some(6)),
        (27, Some(14)),
        (28, Some(4)),
        (29, Some(3)),
        (30, Some(2)),
        (31, None),
    ];
    for (alone, waits) in expected {
        let mut world = World::new(Settings {
            smart_scan: true,
            ..plain()
        });
        world.same(1, 1);
        world.scans(alone);
        world.same(1, 1);
        let merged = (1..40).find(|_| {
            world.scan();
            world.scanner.stats().pages_sharing == 1
        });
        assert_eq!(merged, waits, "alone for {alone} scans");
    }
}
