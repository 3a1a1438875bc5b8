//! Defects that were found by simulation, each with the shortest story that shows it. A test begins
//! with what broke and how it showed.

mod support {
    pub mod toy;
}

use pagemerge_core::{PageId, Reason, RegionId, Settings, TreeOrder, UnregisterError};
use support::toy::{Shown, World, ZERO, bytes, ours, plain};

fn full_at(max_page_sharing: u32) -> World {
    World::new(Settings {
        max_page_sharing,
        ..ours()
    })
}

/// Broke: a candidate that nobody writes to is passed over for ever, and a frame that had been full
/// when it came by did not call it back when it got room. Showed: one page of four stayed alone beside
/// a frame with two sharers of at most three.
#[test]
fn leftover_page_joins_a_full_frame_that_gets_room() {
    type Change = fn(&mut World, PageId);
    let changes: [(&str, Change); 3] = [
        ("written", |world, page| world.toy.write(page, bytes(9))),
        ("discarded", |world, page| world.toy.discard(page)),
        ("discarded and said so", |world, page| {
            world.toy.discard(page);
            let World { scanner, toy, .. } = world;
            scanner.vacated(toy, page, 1).expect("the toy works");
        }),
    ];
    for (name, change) in changes {
        for sharer in 0..3 {
            let mut world = full_at(3);
            let (_, first) = world.same(1, 4);
            world.scans(3);
            assert_eq!(world.groups(), [3]);
            assert_eq!(world.row()[..4], [1, 2, 1, 0]);
            change(&mut world, first.plus(sharer));
            world.scans(3);
            assert_eq!(world.groups(), [3], "sharer {sharer} {name}");
            assert_eq!(world.row()[0..2], [1, 2], "sharer {sharer} {name}");
        }
    }
}

/// Broke: as above, but the frame was full only by plan: a page that was to join refused, after the
/// next one had been turned away for want of room. Showed: that one stayed alone beside a frame of two
/// sharers of at most three for as long as the other refused, since each scan made the same plan.
#[test]
fn page_turned_away_by_a_plan_that_failed_joins_later() {
    for refusing in 0..4 {
        let mut world = full_at(3);
        let (_, first) = world.same(1, 4);
        world.toy.pages[first.index() + refusing].refuses = Some(Reason::Pinned);
        world.scans(3);
        assert_eq!(world.groups(), [3], "page {refusing} refuses");
        world.scan();
        assert_eq!(world.row()[..4], [1, 2, 1, 0], "page {refusing} refuses");
    }
}

/// Broke: a partner that refused to join the new frame went back among the candidates, where nobody
/// tried it again. Showed: it was counted as pinned in one scan only, and stayed out of its twins' frame
/// after it had been unpinned.
#[test]
fn partner_that_refused_is_tried_in_each_scan_until_it_joins() {
    for write_tracking in [true, false] {
        let mut world = World::new(Settings {
            write_tracking,
            ..ours()
        });
        world.toy.refuses_early = true;
        let (_, first) = world.same(1, 5);
        world.toy.pages[first.index()].refuses = Some(Reason::Pinned);
        for scan in 1..=5 {
            world.scan();
            let pinned = world.scanner.stats().skipped[Reason::Pinned as usize];
            assert_eq!(pinned, u64::from(scan > 1), "scan {scan}");
        }
        assert_eq!(world.groups(), [4]);
        world.toy.pages[first.index()].refuses = None;
        world.scans(2);
        assert_eq!(world.groups(), [5]);
    }
}

/// Broke: a page of zeroes whose attempt with the zero page was refused became a candidate, and kept
/// its place unexamined; likewise one that had become a candidate while `use_zero_pages` was off.
/// Showed: it never went to the zero page.
#[test]
fn page_of_zeroes_is_tried_with_the_zero_page_again() {
    let with = |use_zero_pages| Settings {
        use_zero_pages,
        ..ours()
    };
    let mut refused = World::new(with(true));
    refused.toy.refuses_early = true;
    let (_, first) = refused.add(&[Some(ZERO), Some(bytes(1))]);
    refused.toy.pages[first.index()].refuses = Some(Reason::Pinned);
    refused.scans(3);
    assert_eq!(refused.row()[2], 2, "both are candidates");
    refused.toy.pages[first.index()].refuses = None;
    refused.scans(2);

    let mut switched = World::new(with(false));
    switched.add(&[Some(ZERO), Some(bytes(1))]);
    switched.scans(3);
    let hashed = switched.toy.hashed;
    let World { scanner, toy, .. } = &mut switched;
    scanner
        .change_settings(toy, with(true))
        .expect("use_zero_pages may change at any time");
    switched.scans(2);
    assert_eq!(switched.toy.hashed, hashed, "for that no page is read");

    for world in [refused, switched] {
        assert_eq!(world.toy.pages[0].shown, Shown::Zeroed);
        assert_eq!(world.scanner.stats().ksm_zero_pages, 1);
        assert_eq!(world.row()[2], 1);
    }
}

/// Broke: where the unstable trees are thrown away, a record knows its tree only by whether the scan's
/// number is odd. A candidate that nobody could tell about kept its mark through a scan, and in the
/// next one seemed to be in the tree. Showed: it was taken out of a tree that it was not in, and links
/// were corrupted.
#[test]
fn candidate_that_nobody_can_tell_about_is_in_no_tree_of_a_later_scan() {
    for settings in [
        plain(),
        Settings {
            write_tracking: false,
            ..ours()
        },
    ] {
        for hidden in 0..6 {
            let mut world = World::new(settings.clone());
            let (_, first) = world.unique(0, 6);
            world.scans(2);
            assert_eq!(world.row()[2], 6);
            world.toy.pages[first.index() + hidden].hidden = true;
            for _ in 0..3 {
                world.scan();
                assert_eq!(world.row()[2..4], [5, 1]);
            }
            world.toy.pages[first.index() + hidden].hidden = false;
            world.scan();
            assert_eq!(world.row()[2..4], [6, 0]);
        }
    }
}

/// A world with merged pages of four contents in one region, four frames, and zero pages.
fn merged_world(settings: &Settings) -> (World, RegionId, PageId) {
    let mut world = World::new(Settings {
        use_zero_pages: true,
        ..settings.clone()
    });
    let pages: Vec<_> = (0..20)
        .map(|n| Some(if n % 5 == 0 { ZERO } else { bytes(n % 5) }))
        .collect();
    let (region, first) = world.add(&pages);
    world.scans(3);
    assert_eq!(world.groups(), [4; 4]);
    (world, region, first)
}

/// Broke: when memory failed in releasing a frame, the loop that drew the conclusions was left, and
/// pages that had been un-merged as well stayed recorded as sharers. Showed: memory was told that pages
/// parted from frames they had left long before.
#[test]
fn failure_in_the_midst_of_unmerging_loses_no_page() {
    for settings in [plain(), ours()] {
        for calls in 0..60 {
            let (mut world, region, first) = merged_world(&settings);
            world.toy.calls_left = Some(calls);
            let World { scanner, toy, .. } = &mut world;
            let failed = match scanner.unregister(toy, region) {
                Ok(()) => false,
                Err(UnregisterError::Space(_)) => true,
                Err(other) => panic!("{other}"),
            };
            assert_eq!(failed, calls < 24, "20 pages and 4 frames, {calls} calls");
            toy.calls_left = None;
            if failed {
                world.check();
                world.scan();
                let World { scanner, toy, .. } = &mut world;
                scanner.unregister(toy, region).expect("nothing fails now");
            }
            world.check();
            assert!(world.toy.frames.is_empty());

            // The same with memory that is discarded.
            let (mut world, _, _) = merged_world(&settings);
            (0..20).for_each(|n| world.toy.discard(first.plus(n)));
            world.toy.calls_left = Some(calls);
            let World { scanner, toy, .. } = &mut world;
            let failed = scanner.vacated(toy, first, 20).is_err();
            assert_eq!(failed, calls < 4, "4 frames, {calls} calls");
            toy.calls_left = None;
            world.check();
            assert!(world.toy.frames.is_empty());
            world.scans(2);
            assert_eq!(world.scanner.stats().rmap_items, 0);
        }
    }
}

/// Broke: when memory failed in the comparisons that find a new frame's place, its node was hung in
/// wherever it went by its hash. Showed: the stable tree was out of order (S1), and pages with the bytes
/// of frames beyond did not find them.
#[test]
fn frame_made_just_before_memory_failed_is_found_afterwards() {
    for order in [TreeOrder::Content, TreeOrder::Digest] {
        for hash_bits in [64, 1] {
            for calls in 0..200 {
                let mut world = World::new(Settings {
                    tree_order: order,
                    ..plain()
                });
                world.toy.hash_bits = hash_bits;
                let pages: Vec<_> = (0..24).map(|n| Some(bytes(n % 12))).collect();
                world.add(&pages);
                let (_, late) = world.add(&[None; 12]);
                world.scan();
                world.toy.calls_left = Some(calls);
                // Whether it fails or not, frames are in order after it: the step is checked.
                let _ = world.try_step(u32::MAX);
                world.toy.calls_left = None;
                world.scans(2);
                assert_eq!(world.groups(), [2; 12], "{order:?}, {calls} calls");
                for n in 0..12 {
                    world.toy.write(late.plus(n), bytes(n.into()));
                }
                world.scans(3);
                assert_eq!(world.groups(), [3; 12], "{order:?}, {calls} calls");
            }
        }
    }
}

/// Broke: a frame that turned out to have other bytes than its pages had been hashed as was moved to its
/// right place, but a candidate with those bytes was not called; and when memory failed in hashing the
/// frame, it stayed in the wrong place. Showed: a page stayed alone beside a frame with its bytes.
#[test]
fn frame_of_other_bytes_than_were_hashed_is_joined_by_their_owners() {
    for calls in (0..40).map(Some).chain([None]) {
        for early in [true, false] {
            let mut world = World::new(ours());
            let (_, first) = world.same(1, 2);
            let (_, other) = world.add(&[early.then(|| bytes(2))]);
            world.scan();
            world.toy.race = vec![(first, bytes(2)), (first.plus(1), bytes(2))];
            world.toy.calls_left = calls;
            let _ = world.try_step(u32::MAX);
            world.toy.calls_left = None;
            if !early {
                world.toy.write(other, bytes(2));
            }
            world.scans(5);
            assert_eq!(world.groups(), [3], "after {calls:?} calls, {early}");
        }
    }
}

/// Broke: a candidate that had been written since its hash was taken sent pages of that hash to
/// whichever side its new bytes said, and the tree that is kept stayed like that. Showed: two equal pages
/// on either side of it never met, though it had long left.
#[test]
fn pages_sent_apart_by_a_written_candidate_meet_in_the_next_scan() {
    let [low, mid, high] = [[1; 8], [5; 8], [9; 8]];
    let mut world = World::new(ours());
    // In windows of their own, before the other.
    let [(_, left), (_, right)] = [0; 2].map(|_| world.add(&[None]));
    let (_, between) = world.add(&[Some(mid)]);
    world.scans(2);
    assert_eq!(world.row()[2], 1, "a candidate");
    for page in [left, right] {
        world.toy.write(page, mid);
    }
    world.scan();
    for (page, written) in [(left, high), (right, low)] {
        world.toy.write(between, written);
        let compared = world.toy.compared;
        assert_eq!(world.step(1).examined, 1);
        assert!(world.toy.compared > compared, "{page:?} met the candidate");
    }
    world.scan();
    assert_eq!(world.groups(), Vec::<usize>::new());
    assert_eq!(world.row()[2..4], [2, 1], "they are candidates, apart");
    world.scan();
    assert_eq!(world.groups(), [2]);
    let (hashed, examined) = (world.toy.hashed, world.scanner.stats().pages_scanned);
    world.scans(2);
    // One clash has one consequence: afterwards, unchanged memory is left alone again.
    let after = (world.toy.hashed, world.scanner.stats().pages_scanned);
    assert_eq!(after, (hashed, examined));
}

/// Broke: a look uses up what memory knows of writes. A page that was to be hashed after its look, and
/// was not because memory failed, kept its old hash; when memory began to track it, that hash was taken
/// for the one of its bytes. Showed: it became a candidate under a hash that was not its own, where its
/// twin never met it.
#[test]
fn hash_from_before_a_look_that_came_to_nothing_is_not_believed() {
    let mut world = World::new(ours());
    world.toy.tracks = false;
    let (_, first) = world.add(&[Some(bytes(1)), Some(bytes(2))]);
    world.scan();
    world.toy.write(first, bytes(2));
    world.toy.calls_left = Some(1);
    assert!(world.try_step(u32::MAX).is_err(), "looked at, not hashed");
    world.toy.calls_left = None;
    world.toy.tracks = true;
    world.scans(3);
    assert_eq!(world.groups(), [2]);
}

/// Broke: a candidate whose hash was in doubt, because memory had moved it, was settled all the same
/// when the write to it was reported by a look that led to no visit. Showed: as above.
#[test]
fn candidate_in_doubt_is_examined_though_it_is_reported_as_unwritten() {
    let mut world = World::new(ours());
    let (region, first) = world.add(&[5, 7, 7, 1, 1, 2].map(|tag| Some(bytes(tag))));
    let [busy, merged, partner, other] = [0, 1, 3, 4].map(|n| first.plus(n));
    world.toy.pages[partner.index()].refuses = Some(Reason::Pinned);
    world.scans(2);
    assert_eq!(world.groups(), [2], "the partner has refused");
    world.toy.pages[partner.index()].refuses = None;
    world.toy.pages[merged.index()].refuses = Some(Reason::Pinned);
    world.toy.write(partner, bytes(2));
    world.toy.write(busy, bytes(6));
    // Nobody else has the old hash, so that nobody meets the candidate in its old place.
    world.toy.write(other, bytes(9));
    assert_eq!(
        world.step(1).examined,
        1,
        "all are looked at, one is visited"
    );
    let World { scanner, toy, .. } = &mut world;
    let refused = scanner.unregister(toy, region);
    assert!(matches!(
        refused,
        Err(UnregisterError::Refused { pages: 1, .. })
    ));
    world.scans(4);
    assert_eq!(world.groups(), [2, 2], "those whose bytes are alike now");
}

/// Broke: pages for which nothing has changed cost no budget, so one step went over all of them, however
/// many. Showed: a request to stop waited until millions of pages had been looked at.
#[test]
fn step_over_settled_memory_returns_before_its_budget_is_used_up() {
    const PAGES: u32 = 4000;
    const LIMIT: u32 = 1000;
    for settings in [ours(), plain()] {
        let by_page = settings.tree_order == TreeOrder::Content;
        let mut world = World::new(settings);
        world.unique(0, u64::from(PAGES) / 2);
        world.same(9_999_999, PAGES as usize / 2);
        world.scans(3);
        let before = world.scanner.stats();
        world.scanner.set_look_limit(LIMIT);
        let (mut looked, mut examined, mut steps) = (0, 0, 0);
        loop {
            let seen = world.toy.observed;
            let report = world.step(u32::MAX);
            let seen = world.toy.observed - seen;
            if !by_page {
                // In content order the sweep is in one piece, and examined pages are paid for.
                assert!(seen <= u64::from(LIMIT + 512), "{seen} pages in one step");
                assert_eq!(seen, u64::from(report.looked));
            }
            looked += report.looked;
            examined += report.examined;
            steps += 1;
            if report.full_scan_done {
                break;
            }
        }
        if by_page {
            assert_eq!((looked, examined), (PAGES, PAGES));
        } else {
            // All of them, and the merged ones once more in the sweep before.
            assert_eq!((looked, examined), (PAGES + PAGES / 2, 0));
            assert!(steps >= 6, "{steps} steps");
        }
        let after = world.scanner.stats();
        assert_eq!(after.full_scans, before.full_scans + 1);
        assert_eq!(after.pages_sharing, before.pages_sharing);
        assert_eq!(after.pages_unshared, before.pages_unshared);
    }
}

/// A sweep in pieces finds every broken page, whatever comes and goes between its pieces.
#[test]
fn sweep_in_pieces_survives_regions_that_come_and_go() {
    for at in 0..12 {
        let mut world = World::new(ours());
        let regions = [0; 3].map(|_| world.same(1, 40));
        world.scans(2);
        assert_eq!(world.groups(), [120]);
        world.scanner.set_look_limit(10);
        for (_, first) in regions {
            (0..40).for_each(|n| world.toy.write(first.plus(n), bytes(2)));
        }
        // Into the sweep: nothing of the scan itself has begun.
        for _ in 0..at {
            world.step(5);
        }
        let World { scanner, toy, .. } = &mut world;
        scanner
            .unregister(toy, regions[1].0)
            .expect("nothing is refused");
        world.same(2, 5);
        world.check();
        for _ in 0..3 {
            world.scan();
        }
        assert_eq!(world.groups(), [85], "after {at} steps");
    }
}
