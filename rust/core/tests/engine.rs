//! What the engine's owner may do with it, and how memory's refusals and failures come out.

mod support {
    pub mod toy;
}

use pagemerge_core::{
    AdvisorMode, ChangeError, Clock, Event, PageId, Reason, RegisterError, RunMode, Scanner,
    SettingError, Settings, Tick, TraceSink, TreeOrder, UnmergeError, UnregisterError,
};
use std::sync::{Arc, Mutex};
use support::toy::{Shown, World, ZERO, bytes, ours, plain};

#[derive(Clone, Default)]
struct Tape(Arc<Mutex<Vec<Event>>>);

impl TraceSink for Tape {
    fn event(&mut self, event: Event) {
        self.0
            .lock()
            .expect("no test panics while it holds the tape")
            .push(event);
    }
}

impl Tape {
    fn of(world: &mut World) -> Self {
        let tape = Self::default();
        world.scanner.set_trace(Some(Box::new(tape.clone())));
        tape
    }

    fn take(&self) -> Vec<Event> {
        std::mem::take(
            &mut self
                .0
                .lock()
                .expect("no test panics while it holds the tape"),
        )
    }

    fn names(&self) -> Vec<&'static str> {
        self.take().iter().map(Event::name).collect()
    }
}

#[test]
fn events_of_a_first_merge_come_in_the_kernels_order() {
    for settings in [plain(), ours()] {
        let mut world = World::new(settings);
        let tape = Tape::of(&mut world);
        let (mm, first) = world.same(1, 3);
        assert_eq!(tape.take(), [Event::Enter { mm }]);
        world.scan();
        tape.take();
        world.scan();
        let (p, q, r) = (first, first.plus(1), first.plus(2));
        let frame = world.frame(p);
        let merge = |ksm_page, page| Event::MergeWithKsmPage {
            ksm_page,
            pfn: page,
            rmap_item: page,
            mm,
            err: 0,
        };
        let mut expected = vec![
            Event::StartScan {
                seq: 1,
                rmap_entries: 3,
            },
            merge(None, q),
            merge(frame, p),
            merge(frame, r),
        ];
        let mut events = tape.take();
        events.retain(|event| !matches!(event, Event::Advisor { .. }));
        expected.push(Event::StopScan {
            seq: 1,
            rmap_entries: 3,
        });
        assert_eq!(events, expected);
    }
}

#[test]
fn events_of_a_stale_node_name_each_sharer_but_the_last() {
    let mut world = World::new(plain());
    let (mm, first) = world.same(1, 3);
    world.scans(2);
    let pfn = world.frame(first).expect("it is merged");
    (0..3).for_each(|n| world.toy.write(first.plus(n), bytes(100 + u64::from(n))));
    let tape = Tape::of(&mut world);
    world.scan();
    let removed: Vec<Event> = tape
        .take()
        .into_iter()
        .filter(|e| {
            matches!(
                e,
                Event::RemoveRmapItem { .. } | Event::RemoveKsmPage { .. }
            )
        })
        .collect();
    let item = |n| Event::RemoveRmapItem {
        pfn,
        rmap_item: first.plus(n),
        mm,
    };
    // The list begins with the page attached last; partner and examined page came before.
    assert_eq!(removed, [item(2), item(1), Event::RemoveKsmPage { pfn }]);
}

#[test]
fn advisor_event_comes_just_before_the_end_of_the_scan() {
    let mut world = World::new(ours());
    let tape = Tape::of(&mut world);
    world.unique(0, 3);
    world.scan();
    assert_eq!(
        tape.names(),
        [
            "ksm_enter",
            "ksm_start_scan",
            "ksm_advisor",
            "ksm_stop_scan"
        ]
    );
}

#[test]
fn advisor_in_the_scanner_rewrites_what_a_batch_should_be() {
    let settings = Settings {
        advisor_target_scan_time: 1,
        ..ours()
    };
    let mut world = World::new(settings);
    world.unique(0, 10);
    assert_eq!(world.scanner.pages_to_scan(), 500);
    let at = |now, cpu_nanos| Clock {
        now: Tick(now),
        cpu_nanos,
    };
    world
        .scanner
        .step(&mut world.toy, at(0, 0), 4)
        .expect("the toy works");
    world
        .scanner
        .step(&mut world.toy, at(1000, 37_930_000_000), 100)
        .expect("the toy works");
    assert_eq!(world.scanner.pages_to_scan(), 70);
    assert_eq!(
        world.scanner.settings().pages_to_scan,
        500,
        "where it started"
    );
}

fn change(world: &mut World, change: impl FnOnce(&mut Settings)) -> Result<(), SettingError> {
    let mut new = world.scanner.settings().clone();
    change(&mut new);
    match world.scanner.change_settings(&mut world.toy, new) {
        Ok(()) => Ok(()),
        Err(ChangeError::Setting(error)) => Err(error),
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn pages_to_scan_while_the_advisor_is_on_is_refused() {
    let error = Scanner::new(Settings {
        pages_to_scan: 4000,
        ..Settings::default()
    })
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        "pages_to_scan must be left to the advisor while advisor_mode is scan-time, got 4000"
    );
    let mut world = World::new(Settings::default());
    assert_eq!(
        change(&mut world, |s| s.pages_to_scan = 4000).unwrap_err(),
        error
    );
    change(&mut world, |s| s.advisor_mode = AdvisorMode::None).expect("it may be switched off");
    assert_eq!(world.scanner.pages_to_scan(), 100, "as in the kernel");
    change(&mut world, |s| s.pages_to_scan = 4000).expect("nobody else decides it now");
    assert_eq!(world.scanner.pages_to_scan(), 4000);
    change(&mut world, |s| {
        s.advisor_mode = AdvisorMode::ScanTime;
        s.advisor_min_pages_to_scan = 700;
    })
    .expect("it may be switched on");
    assert_eq!(world.scanner.pages_to_scan(), 700);
}

#[test]
fn settings_out_of_range_have_the_kernels_class_of_error() {
    let mut world = World::new(Settings::default());
    let invalid = |e: &SettingError| matches!(e, SettingError::Invalid { .. });
    assert!(change(&mut world, |s| s.max_page_sharing = 1).is_err_and(|e| invalid(&e)));
    assert!(change(&mut world, |s| s.advisor_target_scan_time = 0).is_err_and(|e| invalid(&e)));
    let error = change(&mut world, |s| s.max_page_sharing = 1 << 31).unwrap_err();
    assert_eq!(
        error.to_string(),
        "max_page_sharing must be at most 2147483647, got 2147483648"
    );
    assert!(matches!(error, SettingError::OutOfRange { .. }));
    assert_eq!(*world.scanner.settings(), Settings::default());
}

#[test]
fn knobs_that_shape_the_trees_are_busy_while_the_counter_says_so() {
    let mut world = World::new(Settings {
        max_page_sharing: 4,
        ..plain()
    });
    let (_, first) = world.same(1, 10);
    world.scans(2);
    let busy = |r: Result<(), SettingError>| matches!(r, Err(SettingError::Busy { .. }));
    assert!(busy(change(&mut world, |s| s.max_page_sharing = 8)));
    assert!(busy(change(&mut world, |s| s.merge_across_nodes = false)));
    assert!(busy(
        change(&mut world, |s| s.tree_order = TreeOrder::Digest)
    ));
    change(&mut world, |s| s.max_page_sharing = 4).expect("the current value is always accepted");
    (0..10).for_each(|n| world.toy.write(first.plus(n), bytes(100 + u64::from(n))));
    assert!(
        busy(change(&mut world, |s| s.max_page_sharing = 8)),
        "the counter lags"
    );
    world.scan();
    assert_eq!(world.row()[4..6], [1, 0], "an empty chain lingers");
    change(&mut world, |s| s.max_page_sharing = 8).expect("nothing is shared");
    assert_eq!(world.row()[4..6], [0, 0], "and is purged");
    world
        .scanner
        .set_run(&mut world.toy, RunMode::Unmerge)
        .expect("nothing is refused");
    change(&mut world, |s| s.tree_order = TreeOrder::Digest).expect("there are no records");
}

#[test]
fn region_without_pages_is_refused() {
    let mut scanner = Scanner::new(Settings::default()).expect("the defaults are in range");
    assert_eq!(scanner.register(0, ""), Err(RegisterError::NoPages));
    assert_eq!(
        scanner.register(u32::MAX, ""),
        Err(RegisterError::Full { pages: u32::MAX })
    );
}

#[test]
fn step_without_regions_or_while_unmerged_is_idle() {
    let mut world = World::new(ours());
    assert!(world.step(10).idle);
    world.same(1, 2);
    world
        .scanner
        .set_run(&mut world.toy, RunMode::Unmerge)
        .expect("nothing is merged");
    assert!(world.step(10).idle);
    world
        .scanner
        .set_run(&mut world.toy, RunMode::Stop)
        .expect("it un-merges nothing");
    assert!(!world.step(10).idle, "the owner may step a stopped engine");
}

#[test]
fn step_with_a_budget_of_nothing_does_nothing() {
    let mut world = World::new(ours());
    world.same(1, 2);
    let report = world.step(0);
    assert_eq!(
        (report.examined, report.full_scan_done, report.idle),
        (0, false, false)
    );
    assert_eq!(world.toy.observed, 0);
}

#[test]
fn pass_over_unchanged_memory_hashes_compares_and_examines_nothing() {
    let mut world = World::new(Settings {
        use_zero_pages: true,
        ..ours()
    });
    world.same(1, 700);
    world.unique(1000, 700);
    world.add(&[Some(ZERO), None, Some(ZERO)]);
    world.scans(3);
    let before = (
        world.scanner.stats().pages_scanned,
        world.toy.hashed,
        world.toy.compared,
    );
    let applied = world.toy.applied;
    world.scans(3);
    let after = (
        world.scanner.stats().pages_scanned,
        world.toy.hashed,
        world.toy.compared,
    );
    assert_eq!((after, world.toy.applied), (before, applied));
    assert_eq!(
        world.step(1).examined,
        0,
        "the budget is not charged either"
    );
}

#[test]
fn pages_written_between_two_passes_alone_are_examined() {
    let mut world = World::new(ours());
    let (_, first) = world.unique(0, 600);
    world.scans(3);
    let before = world.scanner.stats().pages_scanned;
    world.toy.write(first.plus(77), bytes(9000));
    let hashed = world.toy.hashed;
    world.scan();
    assert_eq!(
        world.toy.hashed, hashed,
        "written means volatile, without a hash"
    );
    assert_eq!(world.row()[..4], [0, 0, 599, 1]);
    world.scan();
    assert_eq!(world.row()[..4], [0, 0, 600, 0]);
    assert_eq!(world.toy.hashed, hashed + 1);
    assert_eq!(world.scanner.stats().pages_scanned, before + 2);
}

#[test]
fn window_seen_and_not_visited_remembers_writes_over_steps() {
    for order in [TreeOrder::Digest, TreeOrder::Content] {
        let mut world = World::new(Settings {
            tree_order: order,
            ..ours()
        });
        let (_, first) = world.unique(0, 40);
        world.scans(2);
        for n in 0..40 {
            world
                .toy
                .write(first.plus(n), bytes(500 + u64::from(n % 2)));
        }
        // All forty are looked at in the first step; their bits are used up by that.
        while !world.step(7).full_scan_done {}
        assert_eq!(
            world.row()[..4],
            [0, 0, 0, 40],
            "{order:?}: each was seen as written"
        );
        while !world.step(7).full_scan_done {}
        assert_eq!(world.row()[..4], [2, 38, 0, 0], "{order:?}");
    }
}

#[test]
fn domains_never_share_a_frame() {
    let mut world = World::new(ours());
    world.add_to("red", &[Some(bytes(1)); 3]);
    world.add_to("blue", &[Some(bytes(1)); 2]);
    world.add_to("green", &[Some(bytes(1)); 1]);
    world.scans(2);
    assert_eq!(world.groups(), [3, 2]);
    assert_eq!(world.row()[..4], [2, 3, 1, 0]);
}

#[test]
fn nodes_never_share_a_frame_unless_merging_across_them() {
    let mut world = World::new(Settings {
        merge_across_nodes: false,
        ..ours()
    });
    world.toy.nodes = 2;
    world.same(1, 10);
    world.scans(2);
    assert_eq!(world.groups(), [5, 5]);
    world
        .scanner
        .set_run(&mut world.toy, RunMode::Unmerge)
        .expect("nothing is refused");
    change(&mut world, |s| s.merge_across_nodes = true).expect("nothing is shared");
    world
        .scanner
        .set_run(&mut world.toy, RunMode::Merge)
        .expect("it un-merges nothing");
    world.scans(3);
    assert_eq!(world.groups(), [10]);
}

#[test]
fn colliding_hashes_cost_comparisons_and_no_merges() {
    let mut world = World::new(ours());
    world.toy.hash_bits = 1;
    let pages: Vec<_> = (0..60).map(|n| Some(bytes(n % 20))).collect();
    world.add(&pages);
    world.scans(2);
    assert_eq!(world.row()[..4], [20, 40, 0, 0]);
    assert_eq!(world.groups(), vec![3; 20]);
}

#[test]
fn page_written_between_hash_and_promotion_is_rolled_back_and_its_twins_merge() {
    let mut world = World::new(ours());
    let (_, first) = world.same(1, 4);
    world.scan();
    // The second page is the one to be promoted, onto which the first is to be put.
    world.toy.race = vec![(first.plus(1), bytes(2))];
    world.scan();
    assert_eq!(
        world.groups(),
        Vec::<usize>::new(),
        "the frame had other bytes than its twins"
    );
    assert!(world.toy.frames.is_empty());
    world.scans(2);
    assert_eq!(world.groups(), [3]);
    assert_eq!(world.row()[..4], [1, 2, 1, 0]);
}

#[test]
fn two_pages_written_alike_between_hash_and_promotion_make_a_frame_that_is_found_again() {
    let mut world = World::new(ours());
    let (_, first) = world.same(1, 2);
    let (_, late) = world.add(&[None; 2]);
    world.scan();
    world.toy.race = vec![(first, bytes(2)), (first.plus(1), bytes(2))];
    world.scan();
    assert_eq!(
        world.groups(),
        [2],
        "they are equal, though not what they were hashed as"
    );
    world.toy.write(late, bytes(2));
    world.toy.write(late.plus(1), bytes(1));
    world.scans(2);
    assert_eq!(
        world.groups(),
        [3],
        "the frame is in the place of its own bytes"
    );
    assert_eq!(world.row()[..4], [1, 2, 1, 0]);
}

#[test]
fn partner_that_refuses_while_others_join_leaves_the_frame_to_them() {
    let mut world = World::new(ours());
    let (_, first) = world.same(1, 5);
    world.toy.pages[first.index()].refuses = Some(Reason::SharedByFork);
    world.scans(2);
    assert_eq!(world.groups(), [4]);
    assert_eq!(
        world.row()[..4],
        [1, 3, 0, 1],
        "the partner is to be tried again, so it is no candidate"
    );
    assert_eq!(
        world.scanner.stats().skipped[Reason::SharedByFork as usize],
        1
    );
}

#[test]
fn all_pages_but_one_refusing_promotion_are_each_left_out_in_turn() {
    let mut world = World::new(ours());
    let (_, first) = world.same(1, 40);
    (1..39).for_each(|n| world.toy.pages[first.index() + n].refuses = Some(Reason::Pinned));
    world.scans(2);
    assert_eq!(
        world.groups(),
        [2],
        "the first and the last found each other"
    );
    assert_eq!(world.scanner.stats().skipped[Reason::Pinned as usize], 38);
}

#[test]
fn failure_of_memory_in_any_call_leaves_everything_consistent_and_curable() {
    for settings in [
        plain(),
        ours(),
        Settings {
            lagging_records: true,
            ..ours()
        },
    ] {
        for calls in 0..60 {
            let mut world = World::new(Settings {
                max_page_sharing: 3,
                use_zero_pages: true,
                ..settings.clone()
            });
            let pages: Vec<_> = (0..30)
                .map(|n| Some(if n % 7 == 0 { ZERO } else { bytes(n % 4) }))
                .collect();
            world.add(&pages);
            world.scan();
            world.toy.calls_left = Some(calls);
            let failed = world.try_step(u32::MAX).is_err();
            world.toy.calls_left = None;
            assert!(
                failed || calls > 10,
                "{calls} calls are not enough for a scan"
            );
            world.check();
            world.scans(4);
            let stats = world.scanner.stats();
            assert_eq!(stats.pages_volatile, 0, "after {calls} calls: {stats:?}");
            assert_eq!(stats.ksm_zero_pages, 5);
        }
    }
}

#[test]
fn unregistering_with_refusals_keeps_the_region_and_says_how_many() {
    for settings in [plain(), ours()] {
        let mut world = World::new(settings);
        let (region, first) = world.same(1, 10);
        world.scans(2);
        world.toy.pages[first.index() + 3].refuses = Some(Reason::NoMemory);
        let error = world
            .scanner
            .unregister(&mut world.toy, region)
            .expect_err("a page refuses");
        assert!(
            matches!(
                error,
                UnregisterError::Refused {
                    pages: 1,
                    reason: Reason::NoMemory
                }
            ),
            "{error}"
        );
        world.check();
        assert_eq!(world.groups(), [1]);
        world.toy.pages[first.index() + 3].refuses = None;
        world
            .scanner
            .unregister(&mut world.toy, region)
            .expect("nothing is refused");
        world.check();
        assert_eq!(world.groups(), Vec::<usize>::new());
        assert!(world.toy.frames.is_empty());
        let again = world.scanner.unregister(&mut world.toy, region);
        assert!(matches!(again, Err(UnregisterError::NotRegistered(r)) if r == region));
    }
}

#[test]
fn unregistering_without_lag_drops_everything_at_once() {
    let mut world = World::new(ours());
    let (region, _) = world.same(1, 10);
    world.scans(2);
    world.step(3);
    world
        .scanner
        .unregister(&mut world.toy, region)
        .expect("nothing is refused");
    world.check();
    assert_eq!(world.row(), [0; 8]);
    assert_eq!(world.scanner.region_stats(region), None);
    assert!(!world.scanner.revive(region));
    assert!(world.step(10).idle);
}

#[test]
fn region_revived_before_the_next_pass_still_has_its_records() {
    let mut world = World::new(plain());
    let (region, _) = world.same(1, 10);
    world.scans(3);
    world
        .scanner
        .unregister(&mut world.toy, region)
        .expect("nothing is refused");
    assert!(
        !world
            .scanner
            .region_stats(region)
            .expect("it lingers")
            .ksm_mergeable
    );
    assert!(world.scanner.revive(region));
    world.scan();
    // Checksum and age are those of before, so one scan is enough.
    assert_eq!(world.row()[..4], [1, 9, 0, 0]);
}

#[test]
fn region_forgotten_without_lag_frees_frames_that_nobody_else_shows() {
    let mut world = World::new(ours());
    let (a, _) = world.add(&[Some(bytes(1)), Some(bytes(1)), Some(bytes(2)), Some(ZERO)]);
    let (_, b) = world.add(&[Some(bytes(2))]);
    world.scans(2);
    assert_eq!(world.toy.frames.len(), 2);
    (0..4).for_each(|n| world.toy.discard(PageId(n)));
    world
        .scanner
        .forget(&mut world.toy, a)
        .expect("the toy works");
    world.check();
    assert_eq!(world.toy.frames.len(), 1);
    assert_eq!(world.row()[..4], [1, 0, 0, 0]);
    assert!(matches!(world.toy.pages[b.index()].shown, Shown::Frame(_)));
    world
        .scanner
        .forget(&mut world.toy, a)
        .expect("forgetting twice is nothing");
}

#[test]
fn run_2_unmerges_all_once_and_starts_counting_anew() {
    for settings in [plain(), ours()] {
        let mut world = World::new(Settings {
            use_zero_pages: true,
            max_page_sharing: 3,
            ..settings
        });
        let (region, first) = world.same(1, 10);
        world.add(&[Some(ZERO); 3]);
        world.scans(3);
        world.step(2);
        let scanned = world.scanner.stats().pages_scanned;
        world
            .scanner
            .set_run(&mut world.toy, RunMode::Unmerge)
            .expect("nothing is refused");
        world.check();
        let stats = world.scanner.stats();
        assert_eq!(world.row(), [0; 8]);
        assert_eq!((stats.full_scans, stats.pages_scanned), (0, scanned));
        assert_eq!(stats.regions, 2, "regions stay registered");
        assert!(world.toy.frames.is_empty());
        let requests = world.toy.requests.len();
        world
            .scanner
            .set_run(&mut world.toy, RunMode::Unmerge)
            .expect("it is 2 already");
        assert_eq!(world.toy.requests.len(), requests);

        world
            .scanner
            .set_run(&mut world.toy, RunMode::Merge)
            .expect("it un-merges nothing");
        world.scans(3);
        assert_eq!(world.row()[1], 6);
        world.toy.pages[first.index()].refuses = Some(Reason::NoMemory);
        let error = world
            .scanner
            .set_run(&mut world.toy, RunMode::Unmerge)
            .expect_err("a page refuses");
        assert!(
            matches!(error, UnmergeError::Refused { pages: 1, .. }),
            "{error}"
        );
        assert_eq!(world.scanner.run(), RunMode::Stop);
        world.check();
        assert_eq!(world.groups(), [1]);
        let stats = world
            .scanner
            .region_stats(region)
            .expect("it is registered");
        assert_eq!(stats.ksm_merging_pages, 1);
    }
}

#[test]
fn refresh_uncounts_zero_pages_and_nothing_else() {
    let mut world = World::new(Settings {
        use_zero_pages: true,
        ..plain()
    });
    let (_, first) = world.add(&[Some(ZERO), Some(ZERO), Some(bytes(1)), Some(bytes(1))]);
    world.scans(3);
    world.toy.write(first, bytes(3));
    world.toy.write(first.plus(2), bytes(4));
    let before = world.row();
    world
        .scanner
        .refresh(&mut world.toy)
        .expect("the toy works");
    world.check();
    let mut expected = before;
    expected[6] -= 1;
    expected[7] -= 4096;
    assert_eq!(world.row(), expected);
    assert_eq!(world.scanner.stats().cow_broken, 1);
}

#[test]
fn pages_left_alone_are_counted_by_reason_once_in_a_scan() {
    let mut world = World::new(ours());
    let (_, first) = world.unique(0, 10);
    (0..3).for_each(|n| world.toy.pages[first.index() + n].barred = Some(Reason::Mlocked));
    world.step(4);
    assert_eq!(
        world.scanner.stats().skipped[Reason::Mlocked as usize],
        3,
        "in the running scan"
    );
    world.scans(3);
    assert_eq!(world.scanner.stats().skipped[Reason::Mlocked as usize], 3);
    (0..3).for_each(|n| world.toy.pages[first.index() + n].barred = None);
    world.scan();
    assert_eq!(world.scanner.stats().skipped[Reason::Mlocked as usize], 0);
}

/// Two regions with the same few pages present, one of them ten times as long.
fn sparse(pages: u32) -> (World, PageId) {
    let mut world = World::new(ours());
    let mut all = vec![None; pages as usize];
    for n in (0..10_000).step_by(1000) {
        all[n] = Some(bytes(n as u64 / 5000));
    }
    let (_, first) = world.add(&all);
    (world, first)
}

#[test]
fn pass_over_sparse_pages_costs_by_those_that_are_there() {
    let looked = |pages| {
        let (mut world, first) = sparse(pages);
        let mut costs = Vec::new();
        // New pages, merging, at rest, and written again.
        for scan in 0..6 {
            if scan == 4 {
                for n in 0..10 {
                    let content = bytes(100 + u64::from(n));
                    world.toy.write(first.plus(n * 1000), content);
                }
            }
            let before = world.toy.observed;
            world.scan();
            costs.push(world.toy.observed - before);
        }
        assert_eq!(world.scanner.stats().pages_scanned, 40);
        costs
    };
    let (short, long) = (looked(20_000), looked(200_000));
    // A window over each page that is there, another that finds nothing, and as much for the sweep.
    assert!(short.iter().all(|&cost| cost <= 10 * 3 * 512), "{short:?}");
    assert_eq!(short, long);
}

#[test]
fn region_of_sparse_pages_takes_memory_for_those_only() {
    let grown = |pages| {
        let (mut world, first) = sparse(pages);
        let before = world.scanner.stats().metadata_bytes;
        world.scans(2);
        let grown = world.scanner.stats().metadata_bytes - before;
        (0..10).for_each(|n| world.toy.discard(first.plus(n * 1000)));
        world.scan();
        let left = world.scanner.stats().metadata_bytes - before;
        (grown, left)
    };
    let (short, long) = (grown(10_000), grown(100_000));
    assert_eq!(short, long);
    // Besides the directory of 128 MiB and the buffers of a batch.
    assert!(short.0 < (8 << 10) + 10 * 256, "{short:?}");
    assert!(short.1 + (1 << 10) < short.0, "{short:?}");
}

#[test]
fn chunk_that_fills_up_keeps_every_record() {
    let mut world = World::new(ours());
    let all: Vec<_> = (0..1024).map(|n| Some(bytes(n / 2))).collect();
    let (_, first) = world.add(&all);
    // Far from the order of pages, so that lists grow in the middle and turn into arrays.
    (0..1024).for_each(|n| world.toy.discard(first.plus(n)));
    for n in 0..1024_u32 {
        let page = first.plus(n * 371 % 1024);
        world.toy.write(page, bytes(u64::from(page.0 / 2)));
        if n % 64 == 0 {
            world.scan();
        }
    }
    world.scans(3);
    let stats = world.scanner.stats();
    assert_eq!((stats.rmap_items, stats.pages_shared), (1024, 512));
}

/// Goal: with `zero_only` pages of zeroes go to the zero page and nothing else ever shares, in all ways
/// of the scan; pages that are not zero are read once, and again when they have been written.
#[test]
fn zero_only_merges_zero_pages_and_nothing_else() {
    for settings in [ours(), plain(), Settings::kernel_defaults()] {
        let mut world = World::new(Settings {
            use_zero_pages: true,
            zero_only: true,
            ..settings.clone()
        });
        world.same(1, 6);
        world.add(&[Some(ZERO), Some(bytes(1)), Some(ZERO), None]);
        world.scans(6);
        let [shared, sharing, unshared, .., zero, _] = world.row();
        assert_eq!(
            [shared, sharing, unshared, zero],
            [0, 0, 0, 2],
            "{settings:?}"
        );
        let volatile = world.scanner.stats().pages_volatile;
        let kept = 2 * u64::from(settings.lagging_records);
        assert!(
            (7..=7 + kept).contains(&volatile),
            "{volatile} {settings:?}"
        );
        let asked_for_frames = world.toy.requests.iter().any(|request| {
            matches!(
                request,
                pagemerge_core::Request::Promote { .. } | pagemerge_core::Request::Share { .. }
            )
        });
        assert!(!asked_for_frames, "{:?}", world.toy.requests);
        world.check();
        if settings.tree_order == TreeOrder::Digest {
            let (hashed, scanned) = (world.toy.hashed, world.scanner.stats().pages_scanned);
            world.scans(3);
            assert_eq!(
                (world.toy.hashed, world.scanner.stats().pages_scanned),
                (hashed, scanned),
                "pages that are not zero and not written are neither read nor examined again"
            );
        }
        world.toy.write(PageId(0), ZERO);
        world.scans(20);
        assert_eq!(
            world.row()[6],
            3,
            "a page that has become zero ({settings:?})"
        );
    }
}

/// Goal: who switches `zero_only` on may rely on it at once, so it is refused while a frame is in use;
/// and when it is switched off, pages that could not be told apart until then find their twins.
#[test]
fn zero_only_is_refused_while_frames_are_in_use_and_can_be_switched_off() {
    let with = |zero_only| Settings {
        use_zero_pages: true,
        zero_only,
        ..ours()
    };
    let mut world = World::new(with(false));
    // The twins are more than one batch apart.
    world.same(1, 2);
    world.unique(10, 600);
    world.same(1, 2);
    world.scans(3);
    let World { scanner, toy, .. } = &mut world;
    let refused = scanner.change_settings(toy, with(true)).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "zero_only cannot change now: pages_shared is 1; un-merge everything first (run = 2)"
    );
    for run in [RunMode::Unmerge, RunMode::Stop] {
        scanner.set_run(toy, run).expect("nothing is refused");
    }
    toy.only_zero = true;
    scanner
        .change_settings(toy, with(true))
        .expect("nothing is shared any more");
    world.scans(4);
    assert_eq!(world.row()[..3], [0, 0, 0]);

    let World { scanner, toy, .. } = &mut world;
    toy.only_zero = false;
    scanner
        .change_settings(toy, with(false))
        .expect("it may be switched off at any time");
    world.scans(4);
    assert_eq!(world.row()[..3], [1, 3, 600]);
    world.check();
}

#[test]
fn zero_only_needs_zero_pages() {
    let refused = Settings {
        zero_only: true,
        use_zero_pages: false,
        ..Settings::default()
    }
    .validate()
    .unwrap_err();
    assert_eq!(
        refused.to_string(),
        "zero_only must be off while use_zero_pages is off, got on"
    );
}

/// Goal: pages set aside show their own copies at once, and nothing merges with them: neither by the
/// scan's next look nor, before that, as partners that it remembers.
#[test]
fn pages_set_aside_are_unmerged_and_no_partners_any_more() {
    for settings in [ours(), plain(), Settings::kernel_defaults()] {
        let mut world = World::new(Settings {
            use_zero_pages: true,
            ..settings
        });
        let (_, other) = world.unique(50, 1);
        let (_, first) = world.add(&[
            Some(bytes(1)),
            Some(bytes(1)),
            Some(bytes(1)),
            Some(ZERO),
            Some(bytes(2)),
            Some(bytes(3)),
        ]);
        world.scans(4);
        assert_eq!(world.row()[..2], [1, 2]);
        // It becomes a twin of the candidate, and comes first in the next pass.
        world.toy.write(other, bytes(2));
        world.scan();
        let World { scanner, toy, .. } = &mut world;
        // A merged page, a zero page, a candidate.
        scanner
            .set_aside(toy, first.plus(2), 3)
            .expect("nothing is refused");
        // The twin is examined before memory is asked about the others again.
        world.step(1);
        for n in 2..5 {
            let it = &mut world.toy.pages[first.index() + n];
            assert_eq!(it.shown, Shown::Own);
            it.barred = Some(Reason::Excluded);
        }
        world.check();
        world.scans(3);
        assert!((2..5).all(|n| world.toy.pages[first.index() + n].shown == Shown::Own));
        assert_eq!(world.row()[..2], [1, 1]);
        assert_eq!(
            world.scanner.stats().skipped[Reason::Excluded as usize],
            3,
            "each is counted in each pass"
        );
        world.check();
    }
}

#[test]
fn pages_that_cannot_be_unmerged_are_not_set_aside() {
    let mut world = World::new(ours());
    let (_, first) = world.same(1, 4);
    world.scans(3);
    world.toy.pages[first.index() + 1].refuses = Some(Reason::NoMemory);
    let World { scanner, toy, .. } = &mut world;
    let refused = scanner.set_aside(toy, first, 2);
    assert!(
        matches!(
            refused,
            Err(UnmergeError::Refused {
                pages: 1,
                reason: Reason::NoMemory
            })
        ),
        "{refused:?}"
    );
    assert_eq!(
        world.toy.pages[first.index() + 1].shown,
        Shown::Frame(world.frame(first.plus(2)).expect("the others stay merged"))
    );
    world.check();
    world.toy.pages[first.index() + 1].refuses = None;
    world.scans(3);
    assert_eq!(world.groups(), [4]);
}
