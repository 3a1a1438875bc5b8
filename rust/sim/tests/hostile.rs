//! Goal: no content, and no timing of writes, makes a pass endless or its memory boundless. Method: the
//! worst that is known of each kind, by the hundred thousand or the million pages, and counts of the
//! work done: comparisons, hashes, requests, nodes visited. Seconds are never judged. Each test prints
//! its figures (`--nocapture`).

mod support;

use pagemerge_core::{
    AdvisorMode, Attempt, ChangeError, Clock, PageId, Reason, Registered, Request, RunMode,
    Scanner, SettingError, Settings, Stats, Tick, TreeOrder, Work, check,
};
use pagemerge_sim::rng::mix;
use support::heap;
use support::numbers::{Asked, Numbers, When};

/// What an engine takes that does not grow with pages: windows, batches, the directory of records.
const CONSTANT: u64 = 256 << 10;
/// Clashes remembered one by one, at most.
const CLASHES: u64 = (1 << 16) * 32;

/// Our defaults, without moods.
fn settings() -> Settings {
    Settings {
        advisor_mode: AdvisorMode::None,
        smart_scan: false,
        ..Settings::default()
    }
}

/// Twice the base 2 logarithm: no red-black tree is deeper.
fn depth(nodes: u64) -> u64 {
    2 * u64::from((nodes + 1).ilog2() + 1)
}

/// What a pass took.
#[derive(Clone, Copy, Debug)]
struct Pass {
    asked: Asked,
    work: Work,
}

struct Hostile {
    scanner: Scanner,
    space: Numbers,
    now: u64,
    /// Bytes that this thread had out before there was a scanner.
    before: i64,
}

impl Hostile {
    fn new(settings: Settings, space: Numbers) -> Self {
        let before = heap::out();
        let scanner = Scanner::new(settings).expect("settings are in range");
        Self {
            scanner,
            space,
            now: 0,
            before,
        }
    }

    /// With all its pages in one region.
    fn whole(settings: Settings, space: Numbers) -> Self {
        let mut it = Self::new(settings, space);
        let pages = it.space.len();
        it.register(pages, "");
        it
    }

    fn register(&mut self, pages: usize, domain: &str) -> Registered {
        let pages = u32::try_from(pages).expect("page numbers suffice");
        self.scanner
            .register(pages, domain)
            .expect("page numbers suffice")
    }

    fn step(&mut self) -> bool {
        self.now += 1;
        let clock = Clock {
            now: Tick(self.now),
            cpu_nanos: 0,
        };
        let report = self.scanner.step(&mut self.space, clock, 10_000);
        report.expect("this memory never fails").full_scan_done
    }

    fn pass(&mut self) -> Pass {
        let (asked, work) = (self.space.asked, self.scanner.work());
        while !self.step() {}
        let (a, w) = (self.space.asked, self.scanner.work());
        let pass = Pass {
            asked: Asked {
                observed: a.observed - asked.observed,
                digests: a.digests - asked.digests,
                compares: a.compares - asked.compares,
                promotions: a.promotions - asked.promotions,
                shares: a.shares - asked.shares,
                others: a.others - asked.others,
            },
            work: Work {
                decisions: w.decisions - work.decisions,
                tree_nodes: w.tree_nodes - work.tree_nodes,
                dups: w.dups - work.dups,
            },
        };
        println!("{pass:?}");
        pass
    }

    /// Two passes: every page has been seen, and then examined.
    fn two_passes(&mut self) -> Pass {
        self.pass();
        self.pass()
    }

    fn stats(&self) -> Stats {
        self.scanner.stats()
    }

    /// (shared, sharing, unshared, volatile)
    fn counters(&self) -> (u64, u64, u64, u64) {
        let s = self.stats();
        (
            s.pages_shared,
            s.pages_sharing,
            s.pages_unshared,
            s.pages_volatile,
        )
    }

    /// The engine's memory is what it says, 20 bytes a record and 64 a frame, and nothing else grows.
    fn assert_memory(&self, more: u64) {
        let stats = self.stats();
        let real = u64::try_from(heap::out() - self.before).expect("more taken than given back");
        let said = stats.metadata_bytes;
        println!(
            "memory: {said} bytes said, {real} taken, for {} records and {} frames",
            stats.rmap_items,
            self.space.frames()
        );
        let frames = self.space.frames() as u64;
        let bound = 20 * stats.rmap_items + 64 * frames + CONSTANT + more;
        assert!(real <= bound, "{real} bytes taken of {bound}");
        assert!(
            real <= said + said / 8 + CONSTANT,
            "{real} taken, {said} said"
        );
        assert!(said <= bound, "{said} bytes said of {bound}");
    }

    /// Nothing was lost, and every invariant holds.
    fn assert_sound(&self) {
        self.space.assert_reads_match();
        check::assert_all(&self.scanner);
    }
}

// ------------------------------------------------------------------------------- equal digests

/// Who knows the key of an engine's digests can make them all equal. Then bytes decide, in a tree: some
/// twenty comparisons a page, in every pass.
#[test]
fn colliding_digests_cost_a_logarithm_of_comparisons() {
    const PAGES: u64 = 100_000;
    let mut it = Hostile::whole(settings(), Numbers::new((1..=PAGES).map(mix), |_| 7));
    it.pass();
    for _ in 0..3 {
        let pass = it.pass();
        assert_eq!(pass.work.decisions, PAGES);
        let bound = PAGES * depth(PAGES);
        assert!(pass.asked.compares <= bound, "{pass:?} of {bound}");
        // Twice: pages of one hash leave the tree when a scan begins, and come back.
        assert!(pass.work.tree_nodes <= 2 * bound, "{pass:?} of {bound}");
        assert_eq!(it.counters(), (0, 0, PAGES, 0));
    }
    it.assert_memory(0);
    it.assert_sound();
}

/// The same with a twin for each page: they all merge, a batch or two in a pass, since each new frame
/// has all candidates of its hash examined again.
#[test]
fn colliding_twins_all_merge() {
    const PAGES: u64 = 16_000;
    let contents = (0..PAGES).map(|at| mix(at % (PAGES / 2) + 1));
    let mut it = Hostile::whole(settings(), Numbers::new(contents, |_| 7));
    it.pass();
    let mut passes = 0;
    while it.counters().1 < PAGES / 2 {
        passes += 1;
        let before = it.counters().1;
        let pass = it.pass();
        let gained = it.counters().1 - before;
        assert!(
            gained >= 100 || it.counters().1 == PAGES / 2,
            "{gained} in pass {passes}"
        );
        // In both trees, and in the stable tree once more for each new frame.
        let bound = 3 * PAGES * depth(PAGES);
        assert!(pass.asked.compares <= bound, "{pass:?} of {bound}");
        assert!(pass.work.decisions <= 2 * PAGES, "{pass:?}");
    }
    println!("{passes} passes");
    assert_eq!(it.counters(), (PAGES / 2, PAGES / 2, 0, 0));
    it.assert_memory(0);
    it.assert_sound();
}

/// Records keep the lowest 48 bits of a digest. Digests that differ beyond those count as equal, and then
/// bytes decide; digests that differ in a single one of the 48 are told apart without.
#[test]
fn digests_that_differ_beyond_48_bits_collide_and_no_others() {
    const PAGES: u64 = 1000;
    type Cut = fn(u64) -> u64;
    let digests: [(Cut, bool); 3] = [
        (|number| number << 48, true),
        (|number| number, false),
        (|number| number << 38, false),
    ];
    for (digest, collide) in digests {
        let mut it = Hostile::whole(settings(), Numbers::new(1..=PAGES, digest));
        let pass = it.two_passes();
        assert_eq!(pass.asked.compares > 0, collide, "{pass:?}");
        assert_eq!(it.counters(), (0, 0, PAGES, 0));
        it.assert_sound();
    }
}

// ------------------------------------------------------------------------------- bad contents

/// Pages that differ in their last word only: each comparison of ksmd's kind reads a whole page. In
/// content order there are some twenty a page, for 256 MiB; by digest there are none.
#[test]
fn pages_equal_but_for_the_last_word_cost_a_logarithm_or_nothing() {
    const PAGES: u64 = 65_536;
    for tree_order in [TreeOrder::Content, TreeOrder::Digest] {
        let settings = Settings {
            tree_order,
            ..settings()
        };
        // In ascending order, which is what makes trees without balance into lists.
        let mut it = Hostile::whole(settings, Numbers::new(1..=PAGES, mix));
        it.pass();
        for _ in 0..2 {
            let pass = it.pass();
            let bound = match tree_order {
                TreeOrder::Content => PAGES * depth(PAGES),
                TreeOrder::Digest => 0,
            };
            assert!(pass.asked.compares <= bound, "{pass:?} of {bound}");
            assert_eq!(it.counters(), (0, 0, PAGES, 0));
        }
        it.assert_memory(0);
        it.assert_sound();
    }
}

/// Found by this test: each page walked over all the full frames of its content, 370 million of them
/// for 4 million pages.
#[test]
fn four_million_equal_pages_cost_the_same_each() {
    const PAGES: u64 = 4_000_000;
    let mut it = Hostile::whole(settings(), Numbers::new((0..PAGES).map(|_| 9), mix));
    let pass = it.two_passes();
    let frames = PAGES / 256;
    assert_eq!(it.counters(), (frames, PAGES - frames, 0, 0));
    assert_eq!(pass.asked.digests, PAGES);
    assert_eq!(pass.asked.promotions + pass.asked.shares, PAGES);
    assert_eq!(pass.work.decisions, PAGES);
    assert!(pass.asked.compares <= 2 * PAGES, "{pass:?}");
    assert!(pass.work.tree_nodes <= 2 * PAGES, "{pass:?}");
    assert!(pass.work.dups <= PAGES / 100, "{pass:?}");
    let settled = it.pass();
    assert_eq!(
        settled.work.decisions + settled.asked.digests,
        0,
        "{settled:?}"
    );
    it.assert_memory(0);
    it.space.assert_reads_match();
}

/// Found by this test: with two sharers to a frame, the chain of a content grows by one frame for each
/// pair, and choosing one in it was a walk: 600 million visits for 40,000 pages, 10^11 for a million.
#[test]
fn two_sharers_a_frame_and_a_million_equal_pages_cost_the_same_each() {
    const PAGES: u64 = 1_000_000;
    for tree_order in [TreeOrder::Digest, TreeOrder::Content] {
        let settings = Settings {
            max_page_sharing: 2,
            tree_order,
            ..settings()
        };
        let mut it = Hostile::whole(settings, Numbers::new((0..PAGES).map(|_| 9), mix));
        let pass = it.two_passes();
        assert_eq!(it.counters(), (PAGES / 2, PAGES / 2, 0, 0));
        assert_eq!(it.stats().stable_node_dups, PAGES / 2);
        assert_eq!(pass.work.decisions, PAGES);
        assert!(pass.asked.compares <= 3 * PAGES, "{pass:?}");
        assert!(pass.work.tree_nodes <= 3 * PAGES, "{pass:?}");
        assert!(pass.work.dups <= PAGES / 100, "{pass:?}");
        it.assert_memory(0);

        // Now one page of each pair is written, and changed back: a million frames, all but the last
        // ones with room, wherever they are in the chain.
        for page in (0..it.space.len()).step_by(2) {
            it.space.write(page, 5);
        }
        it.pass();
        for page in (0..it.space.len()).step_by(2) {
            it.space.write(page, 9);
        }
        it.pass();
        let pass = it.pass();
        assert_eq!(it.counters(), (PAGES / 2, PAGES / 2, 0, 0));
        assert!(pass.work.dups <= PAGES, "{pass:?}");
        assert!(pass.asked.compares <= 3 * PAGES, "{pass:?}");
        // While all of them had room they were all listed.
        it.assert_memory(0);
        it.space.assert_reads_match();
    }
}

/// The choice among frames with room is the walk's: without pruning the first from the head, with it the
/// one with most sharers; and stale ones go when the walk would have passed them.
#[test]
fn frames_with_room_are_found_wherever_they_are_in_the_chain() {
    const PAGES: usize = 4_000;
    for prune in [0, 1_000_000] {
        let settings = Settings {
            max_page_sharing: 4,
            stable_node_chains_prune_millisecs: prune,
            ..settings()
        };
        let mut it = Hostile::whole(settings, Numbers::new((0..PAGES as u64).map(|_| 9), mix));
        it.two_passes();
        assert_eq!(it.counters(), (1000, 3000, 0, 0));
        let mut random = 1;
        for _ in 0..20 {
            // Every other pass pages leave their frames, wherever those are; then they come back.
            for _ in 0..1500 {
                random = mix(random);
                let page = usize::try_from(random % PAGES as u64).expect("small");
                it.space.write(page, 1000 + random % 3);
            }
            it.pass();
            for page in 0..PAGES {
                if it.space.pages.read(page) != 9 {
                    it.space.write(page, 9);
                }
            }
            it.two_passes();
            it.assert_sound();
            let (shared, sharing, unshared, volatile) = it.counters();
            assert_eq!((shared + sharing + unshared, volatile), (PAGES as u64, 0));
            assert!(unshared <= 1, "{:?}", it.counters());
        }
    }
}

// ------------------------------------------------------------------------------- bad timing

/// Found by this test: of equal pages that cannot be made into frames (pinned, or because no mapping is
/// left), each attempt had all twins of the batch compared and asked for once more, 128 times a page.
#[test]
fn equal_pages_that_cannot_become_frames_cost_two_decisions_each() {
    const PAGES: u64 = 50_000;
    let mut it = Hostile::whole(settings(), Numbers::new((0..PAGES).map(|_| 9), mix));
    it.space.script(|_, when| match when {
        When::Before(Request::Promote { .. }) => Some(Attempt::Refused(Reason::Pinned)),
        _ => None,
    });
    it.pass();
    for _ in 0..3 {
        let pass = it.pass();
        assert!(pass.work.decisions <= 2 * PAGES, "{pass:?}");
        assert!(pass.asked.promotions <= PAGES, "{pass:?}");
        assert!(pass.asked.shares <= 2 * PAGES, "{pass:?}");
        assert!(pass.asked.compares <= 3 * PAGES, "{pass:?}");
        let pinned = it.stats().skipped[Reason::Pinned as usize];
        assert!(
            (PAGES - PAGES / 200..=PAGES).contains(&pinned),
            "{pinned} pages pinned"
        );
        let (shared, sharing, unshared, volatile) = it.counters();
        assert_eq!((shared, sharing, unshared + volatile), (0, 0, PAGES));
    }
    it.assert_memory(0);
    it.assert_sound();
}

/// A page that always loses does not hold up its twins: whichever of them are the first, the others
/// merge in the same pass.
#[test]
fn twins_of_pages_that_always_lose_merge_in_the_same_pass() {
    const PAGES: u64 = 20_480;
    // A batch has 512 pages of 2 contents: the first 400 of each 512 can never be promoted.
    let loses = |page: PageId| page.0 % 512 < 400;
    let contents = (0..PAGES).map(|at| 9 + at % 2);
    let mut it = Hostile::whole(settings(), Numbers::new(contents, mix));
    it.space.script(move |_, when| match when {
        When::Before(Request::Promote { page, .. }) if loses(page) => Some(Attempt::Changed),
        _ => None,
    });
    let pass = it.two_passes();
    let (shared, sharing, ..) = it.counters();
    // 112 of 512 can be promoted, and whoever meets a frame with room joins it.
    assert!(shared + sharing >= PAGES / 5, "{:?}", it.counters());
    assert!(pass.work.decisions <= 3 * PAGES, "{pass:?}");
    assert!(pass.asked.compares <= 6 * PAGES, "{pass:?}");
    it.space.end_script();
    it.two_passes();
    assert_eq!(it.counters(), (80, PAGES - 80, 0, 0));
    it.assert_sound();
}

/// A writer who rewrites each page the moment it has been hashed: nothing merges, every pass ends after
/// one look at each page, and all are volatile.
#[test]
fn pages_rewritten_after_hashing_end_every_pass_and_are_volatile() {
    const PAGES: u64 = 200_000;
    // Two pages of each content, so that each second one meets the first one's old hash.
    let contents = (0..PAGES).map(|at| mix(at / 2 + 1));
    let mut it = Hostile::whole(settings(), Numbers::new(contents, mix));
    let mut next = 0;
    it.space.script(move |pages, when| {
        if let When::Hashed(page) = when {
            next += 1;
            pages.write(page.index(), mix(next + (1 << 40)));
        }
        None
    });
    it.pass();
    let pass = it.pass();
    assert_eq!((pass.asked.digests, pass.work.decisions), (PAGES, PAGES));
    assert!(pass.asked.compares <= 2 * PAGES, "{pass:?}");
    it.assert_memory(CLASHES);
    // They are seen written now, and not hashed; then hashed again.
    let pass = it.pass();
    assert_eq!((pass.asked.digests, pass.work.decisions), (0, 0));
    assert_eq!(it.counters(), (0, 0, 0, PAGES));
    let pass = it.pass();
    assert_eq!((pass.asked.digests, pass.work.decisions), (PAGES, PAGES));
    it.space.end_script();
    it.two_passes();
    let (shared, sharing, unshared, volatile) = it.counters();
    assert_eq!((shared, sharing, unshared, volatile), (0, 0, PAGES, 0));
    it.assert_sound();
}

/// A writer who rewrites each page right before it is merged: every merge is lost, none is tried twice
/// in a pass, no frame is left over.
#[test]
fn pages_rewritten_before_merging_lose_every_merge_and_end_every_pass() {
    const PAGES: u64 = 50_000;
    for contents in [1, PAGES / 2, PAGES / 100] {
        let numbers = (0..PAGES).map(move |at| mix(at % contents + 1));
        let mut it = Hostile::whole(settings(), Numbers::new(numbers, mix));
        let mut next = 0;
        it.space.script(move |pages, when| match when {
            When::Before(Request::Promote { page, .. } | Request::Share { page, .. }) => {
                next += 1;
                let old = pages.read(page.index());
                pages.write(page.index(), mix(next + (1 << 40)));
                // Back at once: whoever looks again finds the same bytes, and a written page.
                pages.write(page.index(), old);
                Some(Attempt::Changed)
            }
            _ => None,
        });
        it.pass();
        for _ in 0..4 {
            let pass = it.pass();
            assert!(pass.work.decisions <= 2 * PAGES, "{pass:?}");
            assert!(pass.asked.promotions <= PAGES, "{pass:?}");
            assert!(pass.asked.shares <= 2 * PAGES, "{pass:?}");
            let (shared, sharing, unshared, volatile) = it.counters();
            assert_eq!((shared, sharing, unshared + volatile), (0, 0, PAGES));
            assert_eq!(it.space.frames(), 0);
        }
        it.space.end_script();
        it.two_passes();
        it.pass();
        let (shared, sharing, ..) = it.counters();
        assert_eq!(shared + sharing, PAGES, "{:?}", it.counters());
        it.assert_sound();
    }
}

/// Pages that are something else in each pass are volatile by either rule, and cost one look.
#[test]
fn pages_that_flip_in_each_pass_are_volatile_and_cost_one_look() {
    const PAGES: u64 = 50_000;
    for write_tracking in [true, false] {
        let settings = Settings {
            write_tracking,
            ..settings()
        };
        let mut it = Hostile::whole(settings, Numbers::new((0..PAGES).map(|_| 3), mix));
        it.pass();
        for turn in 0..6 {
            for page in 0..it.space.len() {
                it.space.write(page, 4 + turn % 2);
            }
            let pass = it.pass();
            assert_eq!(pass.work.decisions, 0);
            assert_eq!(pass.asked.digests, if write_tracking { 0 } else { PAGES });
            assert_eq!(it.counters(), (0, 0, 0, PAGES));
        }
        it.assert_memory(0);
        it.assert_sound();
    }
}

// ------------------------------------------------------------------------------- bad patterns

/// Ten thousand regions of one page, coming and going.
#[test]
fn ten_thousand_regions_of_one_page_cost_by_their_pages() {
    const REGIONS: usize = 10_000;
    let contents = (0..REGIONS as u64).map(|at| at % 100 + 1);
    let mut it = Hostile::new(settings(), Numbers::new(contents, mix));
    for turn in 0..3 {
        let regions: Vec<Registered> = heap::aside(|| Vec::with_capacity(REGIONS));
        let mut regions = regions;
        for _ in 0..REGIONS {
            regions.push(it.register(1, ""));
        }
        let pass = it.two_passes();
        let pages = REGIONS as u64;
        assert_eq!(it.counters(), (100, pages - 100, 0, 0), "turn {turn}");
        assert!(
            pass.work.decisions <= pages && pass.asked.observed <= 2 * pages,
            "{pass:?}"
        );
        // A region takes some 150 bytes of its own.
        it.assert_memory(200 * pages);
        let work = it.scanner.work();
        // Every other one first, so that page numbers are as scattered as can be.
        for start in [0, 1] {
            for got in regions.iter().skip(start).step_by(2) {
                let done = it.scanner.unregister(&mut it.space, got.region);
                done.expect("nothing refuses here");
            }
        }
        let now = it.scanner.work();
        assert!(now.dups - work.dups <= pages, "{work:?} to {now:?}");
        assert_eq!((it.counters(), it.space.merged()), ((0, 0, 0, 0), 0));
        it.assert_sound();
        heap::aside(|| drop(regions));
        it.assert_memory(200 * pages);
    }
}

/// Found by this test: each domain that ended had every frame of the engine looked at, 20 million for
/// these.
#[test]
fn two_thousand_domains_cost_by_their_own_pages() {
    const DOMAINS: usize = 2_000;
    const EACH: usize = 20;
    // Ten contents, twice in each domain, the same in all of them.
    let contents = (0..(DOMAINS * EACH) as u64).map(|at| at % 10 + 1);
    let mut it = Hostile::new(settings(), Numbers::new(contents, mix));
    let mut regions = Vec::with_capacity(DOMAINS);
    for domain in 0..DOMAINS {
        regions.push(it.register(EACH, &domain.to_string()));
    }
    let pass = it.two_passes();
    let pages = (DOMAINS * EACH) as u64;
    // Nothing is shared between domains.
    assert_eq!(it.counters(), (pages / 2, pages / 2, 0, 0));
    assert!(pass.work.tree_nodes <= 8 * pages, "{pass:?}");
    let work = it.scanner.work();
    for got in regions {
        let done = it.scanner.unregister(&mut it.space, got.region);
        done.expect("nothing refuses here");
    }
    let now = it.scanner.work();
    assert!(now.dups - work.dups <= pages, "{work:?} to {now:?}");
    assert_eq!((it.counters(), it.space.merged()), ((0, 0, 0, 0), 0));
    it.assert_sound();
    it.assert_memory(400 * DOMAINS as u64);
}

/// Settings turned to and fro in every pass, and everything un-merged in every third: each is refused by
/// name or done, and the cost is that of the pages.
#[test]
fn settings_flipping_in_every_pass_cost_one_pass_each() {
    const PAGES: u64 = 20_000;
    let contents = (0..PAGES).map(|at| at % 1000 + 1);
    let mut it = Hostile::whole(settings(), Numbers::new(contents, mix));
    let mut refused = 0;
    for turn in 0..30_u32 {
        let (asked, work) = (it.space.asked, it.scanner.work());
        if turn % 3 == 2 {
            for run in [RunMode::Unmerge, RunMode::Merge] {
                it.scanner
                    .set_run(&mut it.space, run)
                    .expect("nothing refuses here");
            }
            assert_eq!(it.counters(), (0, 0, 0, 0));
        }
        let new = Settings {
            merge_across_nodes: turn % 2 == 0,
            max_page_sharing: 2 + turn % 5,
            use_zero_pages: turn % 4 < 2,
            smart_scan: turn % 7 == 0,
            write_tracking: turn % 3 != 0,
            ..settings()
        };
        match it.scanner.change_settings(&mut it.space, new) {
            Ok(()) => {}
            Err(ChangeError::Setting(SettingError::Busy { .. })) => refused += 1,
            Err(error) => panic!("{error}"),
        }
        it.two_passes();
        let (a, w) = (it.space.asked, it.scanner.work());
        assert!(w.decisions - work.decisions <= 2 * PAGES, "turn {turn}");
        assert!(w.dups - work.dups <= 2 * PAGES, "turn {turn}");
        assert!(a.digests - asked.digests <= 2 * PAGES, "turn {turn}");
        assert!(a.others - asked.others <= PAGES, "turn {turn}");
        it.assert_sound();
        it.assert_memory(0);
    }
    assert!(refused > 0, "nothing was busy");
}

/// What has been unregistered costs nothing any more: the worst case of frames, given back.
#[test]
fn memory_comes_back_when_everything_is_unregistered() {
    const PAGES: u64 = 1_000_000;
    let settings = Settings {
        max_page_sharing: 2,
        ..settings()
    };
    let mut it = Hostile::new(settings, Numbers::new((0..PAGES).map(|_| 9), mix));
    let pages = it.space.len();
    let got = it.register(pages, "");
    it.two_passes();
    it.assert_memory(0);
    let done = it.scanner.unregister(&mut it.space, got.region);
    done.expect("nothing refuses here");
    // No records, no frames: only the constant is left.
    assert_eq!((it.stats().rmap_items, it.space.frames()), (0, 0));
    it.assert_memory(0);
    it.assert_sound();
}
