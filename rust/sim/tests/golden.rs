//! Goal: with `Settings::kernel_defaults()` the counters are those of ksmd, scan by scan.
//!
//! Method: `tests/data/golden_smart0.json` and `golden_smart1.json` hold what a live kernel (Linux 6.18,
//! one node, 4 KiB pages) reported after every full scan of 48 small programs, with `smart_scan` off and
//! on. Each program is written down here once more, for simulated memory, and replayed; every row of
//! eleven counters must be equal, and so must the figures of each process and who shares with whom.
//!
//! How the kernel's world is mapped to ours:
//! * A process is a set of regions; most have one. Where a case un-merges a half of an area, the two
//!   halves are two regions from the beginning, registered one after the other (the kernel splits the
//!   area at that moment; the pages' order is the same).
//! * exit and munmap: the memory is gone, and the scanner is told by `forget`.
//! * `MADV_DONTNEED`: the pages are absent, and the scanner finds out by itself, as ksmd does.
//! * A moving mremap un-merges, and everything starts over at the new address: `unregister`, then
//!   `register` with the same contents.
//! * Transparent huge pages and fork have no counterpart; those cases are listed with their reason.

use pagemerge_core::{
    Clock, FrameId, PageId, RegionId, Registered, RunMode, Scanner, Settings, Tick, check,
};
use pagemerge_sim::{Habits, SimSpace, content, space::Backing};
use serde_json::Value;
use std::collections::BTreeMap;

const PAGE: usize = 4096;

/// A page's content: absent, zero, or a pure function of a number.
#[derive(Clone, Copy)]
enum P {
    Absent,
    Zero,
    Of(u64),
}

type Row = [i64; 11];

/// Simulated memory, a scanner, and what it said after each scan.
struct Session {
    scanner: Scanner,
    space: SimSpace,
    now: u64,
    rows: Vec<Row>,
    before: Option<Row>,
    just_after_op: Option<Row>,
    joined: Option<String>,
    /// The regions of each process that is asked for its figures at the end.
    processes: Vec<Vec<Registered>>,
    pages: BTreeMap<RegionId, u32>,
}

impl Session {
    fn new(smart: bool, change: impl FnOnce(&mut Settings)) -> Self {
        let mut settings = Settings {
            smart_scan: smart,
            ..Settings::kernel_defaults()
        };
        change(&mut settings);
        let mut space = SimSpace::new(Habits {
            page_size: PAGE,
            ..Habits::default()
        });
        space.set_rules(settings.max_page_sharing, settings.merge_across_nodes);
        let mut scanner = Scanner::new(settings).expect("every case's settings are in range");
        scanner
            .set_run(&mut space, RunMode::Merge)
            .expect("nothing is merged yet");
        Self {
            scanner,
            space,
            now: 1_000,
            rows: Vec::new(),
            before: None,
            just_after_op: None,
            joined: None,
            processes: Vec::new(),
            pages: BTreeMap::new(),
        }
    }

    /// A new process with one region for each of `areas`.
    fn process(&mut self, areas: &[&[P]]) -> Vec<Registered> {
        let regions: Vec<Registered> = areas.iter().map(|pages| self.area(pages)).collect();
        self.processes.push(regions.clone());
        regions
    }

    fn area(&mut self, pages: &[P]) -> Registered {
        let count = u32::try_from(pages.len()).expect("cases are small");
        let new = self.scanner.register(count, "").expect("cases are small");
        self.space.add_region(new.region, new.first, count, "");
        self.pages.insert(new.region, count);
        for (page, content) in (new.first.0..).zip(pages) {
            self.fill(PageId(page), *content);
        }
        new
    }

    fn fill(&mut self, page: PageId, content: P) {
        match content {
            P::Absent => {}
            P::Zero => self.space.write(page, vec![0; PAGE].into()),
            P::Of(tag) => self.space.write(page, content::distinct(tag + 1, PAGE)),
        }
    }

    /// `scans` full scans, with a row after each.
    fn scan(&mut self, scans: usize) {
        for _ in 0..scans {
            while !self.batch(u32::MAX) {}
            let row = self.row();
            self.rows.push(row);
        }
    }

    fn batch(&mut self, budget: u32) -> bool {
        self.now += 10;
        let clock = Clock {
            now: Tick(self.now),
            cpu_nanos: 0,
        };
        let report = self
            .scanner
            .step(&mut self.space, clock, budget)
            .expect("nothing fails here");
        check::assert_all(&self.scanner);
        self.space.assert_reads_match();
        assert!(!report.idle, "there are regions to scan");
        report.full_scan_done
    }

    fn row(&mut self) -> Row {
        self.scanner
            .refresh(&mut self.space)
            .expect("nothing fails here");
        let stats = self.scanner.stats();
        let signed = |n: u64| i64::try_from(n).expect("cases are small");
        [
            signed(stats.pages_shared),
            signed(stats.pages_sharing),
            signed(stats.pages_unshared),
            signed(stats.pages_volatile),
            signed(stats.pages_scanned),
            signed(stats.pages_skipped),
            signed(stats.full_scans),
            signed(stats.stable_node_chains),
            signed(stats.stable_node_dups),
            signed(stats.ksm_zero_pages),
            stats.general_profit,
        ]
    }

    /// Remembers the last row as the one before the operation.
    fn before(&mut self) {
        self.before = self.rows.last().copied();
    }

    /// Takes a row without a scan.
    fn just_after(&mut self) {
        self.just_after_op = Some(self.row());
    }

    /// Scans until there are as many rows as the kernel's record has.
    fn finish(&mut self, rows: usize) {
        self.scan(rows - self.rows.len());
    }

    fn unregister(&mut self, region: RegionId) {
        self.scanner
            .unregister(&mut self.space, region)
            .expect("nothing is refused here");
        self.space.retire_region(region);
    }

    fn discard(&mut self, new: Registered, pages: u32) {
        for page in 0..pages {
            self.space
                .act(new.first.plus(page), pagemerge_sim::Action::Discard);
        }
    }

    fn exit(&mut self, regions: &[Registered]) {
        for new in regions {
            self.discard(*new, self.pages[&new.region]);
            self.scanner
                .forget(&mut self.space, new.region)
                .expect("nothing fails here");
            self.space.remove_region(new.region);
            self.pages.remove(&new.region);
        }
    }

    fn pages_of(&self, new: &Registered) -> impl Iterator<Item = PageId> + '_ {
        let first = new.first;
        let pages = self.pages.get(&new.region).copied().unwrap_or(0);
        (0..pages).map(move |page| first.plus(page))
    }

    /// Sizes of groups of mappings of one physical page, and how many groups of that size there are.
    fn groups(&self) -> BTreeMap<String, i64> {
        let mut frames: BTreeMap<FrameId, u32> = BTreeMap::new();
        let (mut zero, mut own) = (0, 0);
        for page in self
            .processes
            .iter()
            .flatten()
            .flat_map(|new| self.pages_of(new))
        {
            match self.space.backing(page) {
                Backing::Absent => {}
                Backing::Zero { .. } => zero += 1,
                Backing::Frame(frame) => *frames.entry(*frame).or_default() += 1,
                Backing::Own(_) => own += 1,
            }
        }
        let mut groups: BTreeMap<String, i64> = BTreeMap::new();
        for size in frames.into_values().chain((zero > 0).then_some(zero)) {
            *groups.entry(size.to_string()).or_default() += 1;
        }
        if own > 0 {
            *groups.entry("1".into()).or_default() += own;
        }
        groups
    }

    /// `ksm_rmap_items`, `ksm_zero_pages`, `ksm_merging_pages`, `ksm_process_profit`, and smaps' `KSM:`
    /// of a process.
    fn figures(&self, process: &[Registered]) -> [i64; 5] {
        let signed = |n: u64| i64::try_from(n).expect("cases are small");
        let mut sum = [0; 5];
        for new in process {
            let stats = self.scanner.region_stats(new.region).unwrap_or_default();
            let shown = self
                .pages_of(new)
                .filter(|page| self.space.shows(*page).is_some());
            let own = [
                signed(stats.ksm_rmap_items),
                signed(stats.ksm_zero_pages),
                signed(stats.ksm_merging_pages),
                stats.ksm_process_profit,
                signed(shown.count() as u64) * 4,
            ];
            for (sum, own) in sum.iter_mut().zip(own) {
                *sum += own;
            }
        }
        sum
    }
}

fn times(content: P, count: usize) -> Vec<P> {
    vec![content; count]
}

fn unique(count: u64) -> Vec<P> {
    (0..count).map(P::Of).collect()
}

fn mix() -> Vec<P> {
    [
        times(P::Of(100), 20),
        times(P::Of(101), 5),
        times(P::Of(102), 2),
        unique(13),
        times(P::Zero, 10),
        times(P::Absent, 14),
    ]
    .concat()
}

/// What a case needs to know: `smart_scan` of this file, and how many rows the record has.
#[derive(Clone, Copy)]
struct Given {
    smart: bool,
    rows: usize,
}

/// Fill, register, scan.
fn converge(given: Given, pages: &[P], processes: usize, max: u32, zero: bool) -> Session {
    let mut session = Session::new(given.smart, |settings| {
        settings.max_page_sharing = max;
        settings.use_zero_pages = zero;
    });
    for _ in 0..processes {
        session.process(&[pages]);
    }
    session.finish(given.rows);
    session
}

/// Four scans, then something happens, then more scans.
fn after(
    given: Given,
    areas: &[&[P]],
    zero: bool,
    op: impl FnOnce(&mut Session, &[Registered]),
) -> Session {
    let mut session = Session::new(given.smart, |settings| settings.use_zero_pages = zero);
    let process = session.process(areas);
    session.scan(4);
    session.before();
    op(&mut session, &process);
    session.just_after();
    session.finish(given.rows);
    session
}

/// Ten equal pages are merged, then those of `changed` are rewritten.
fn rewrite(given: Given, changed: &[(u32, u64)]) -> Session {
    after(given, &[&times(P::Of(1), 10)], false, |session, process| {
        for (page, tag) in changed {
            session.fill(process[0].first.plus(*page), P::Of(*tag));
        }
    })
}

/// Twelve equal pages on three frames; two of the frames lose sharers; who gets the next three pages?
fn select_dup(given: Given, prune: u32) -> Session {
    let mut session = Session::new(given.smart, |settings| {
        settings.max_page_sharing = 4;
        settings.stable_node_chains_prune_millisecs = prune;
    });
    let pages = [times(P::Of(1), 12), times(P::Absent, 3)].concat();
    let first = session.process(&[&pages])[0].first;
    session.scan(3);
    let name = BTreeMap::from([(1, "A"), (7, "B"), (8, "C")].map(|(page, name)| {
        (
            session
                .space
                .shows(first.plus(page))
                .expect("all twelve are merged"),
            name,
        )
    }));
    for page in [0, 4, 5, 6] {
        session.fill(first.plus(page), P::Of(200 + u64::from(page)));
    }
    session.scan(1);
    let mut joined = String::new();
    for page in 12..15 {
        session.fill(first.plus(page), P::Of(1));
        session.scan(2);
        let shown = session.space.shows(first.plus(page));
        joined.push_str(shown.and_then(|frame| name.get(&frame)).unwrap_or(&"?"));
    }
    session.joined = Some(joined);
    session.finish(given.rows);
    session
}

/// Rows are per batch, not per scan.
fn batches(given: Given, pages: u32) -> Session {
    let mut session = Session::new(given.smart, |settings| settings.pages_to_scan = pages);
    session.process(&[&unique(100)]);
    for _ in 0..given.rows {
        session.batch(pages);
        let row = session.row();
        session.rows.push(row);
    }
    session
}

/// With smart scan, whatever the file says; perhaps with a page that changes before each scan.
fn smart(given: Given, pages: &[P], rewritten: bool) -> Session {
    let mut session = Session::new(true, |_| {});
    let first = session.process(&[pages])[0].first;
    for scan in 0..given.rows {
        if rewritten && scan > 0 {
            session.fill(first, P::Of(300 + scan as u64));
        }
        session.scan(1);
    }
    session
}

fn exit_of_one_of_two(given: Given) -> Session {
    let mut session = Session::new(given.smart, |_| {});
    let first = session.process(&[&times(P::Of(1), 10)]);
    session.process(&[&times(P::Of(1), 10)]);
    session.scan(3);
    session.before();
    session.exit(&first);
    session.processes.remove(0);
    session.just_after();
    session.finish(given.rows);
    session
}

fn munmap_all(given: Given) -> Session {
    let mut session = Session::new(given.smart, |settings| settings.max_page_sharing = 4);
    let process = session.process(&[&times(P::Of(1), 10)]);
    session.scan(3);
    session.before();
    session.exit(&process);
    session.just_after();
    session.finish(given.rows);
    session
}

fn mremap(given: Given) -> Session {
    let pages = [times(P::Of(1), 6), times(P::Zero, 4)].concat();
    after(given, &[&pages], true, |session, process| {
        session.unregister(process[0].region);
        session.pages.remove(&process[0].region);
        let moved = session.area(&pages);
        session.processes[0].push(moved);
    })
}

/// Runs the case of that name, or says why it has no counterpart here. `None`: no such case.
#[allow(clippy::too_many_lines)] // A table.
fn run(name: &str, given: Given) -> Option<Result<Session, &'static str>> {
    let one = P::Of(1);
    let same = |count| times(one, count);
    let plain = |pages: &[P]| Some(Ok(converge(given, pages, 1, 256, false)));
    let with_zero = |pages: &[P]| Some(Ok(converge(given, pages, 1, 256, true)));
    let limited = |count, max| Some(Ok(converge(given, &same(count), 1, max, false)));
    match name {
        "a_identical_2" => plain(&same(2)),
        "a_identical_10" => plain(&same(10)),
        "a_identical_256" => plain(&same(256)),
        "a_identical_257" => plain(&same(257)),
        "a_identical_258" => plain(&same(258)),
        "b_513_identical_max256" => plain(&same(513)),
        "b_600_identical_max256" => plain(&same(600)),
        "c_zero_100_use0" => plain(&times(P::Zero, 100)),
        "c_zero_300_use0" => plain(&times(P::Zero, 300)),
        "c_zero_100_use1" => with_zero(&times(P::Zero, 100)),
        "c_zero_300_use1" => with_zero(&times(P::Zero, 300)),
        "d_unique_64" => plain(&unique(64)),
        "d_unique_64_smart" => Some(Ok(converge(
            Given {
                smart: true,
                ..given
            },
            &unique(64),
            1,
            256,
            false,
        ))),
        "e_mix_use0" => plain(&mix()),
        "e_mix_use1" => with_zero(&mix()),
        "f_write_3_of_10_same_value" => Some(Ok(rewrite(given, &[(2, 2), (5, 2), (9, 2)]))),
        "f_write_3_of_10_distinct" => Some(Ok(rewrite(given, &[(2, 102), (5, 105), (9, 109)]))),
        "f_rewrite_same_content" => Some(Ok(rewrite(given, &[(4, 1)]))),
        "f_write_all_but_one" | "f_write_all" => {
            let count = if name == "f_write_all" { 10 } else { 9 };
            let all: Vec<_> = (0..count)
                .map(|page| (page, 100 + u64::from(page)))
                .collect();
            Some(Ok(rewrite(given, &all)))
        }
        "g_unmergeable_first_half" | "g_unmergeable_second_half" => {
            let half = usize::from(name == "g_unmergeable_second_half");
            Some(Ok(after(
                given,
                &[&same(5), &same(5)],
                false,
                |session, process| {
                    session.unregister(process[half].region);
                },
            )))
        }
        "g_unmergeable_zero_half" => {
            let half = times(P::Zero, 50);
            Some(Ok(after(
                given,
                &[&half, &half],
                true,
                |session, process| {
                    session.unregister(process[0].region);
                },
            )))
        }
        "h_100_identical_max2" => limited(100, 2),
        "h_101_identical_max2" => limited(101, 2),
        "h_10_identical_max3" => limited(10, 3),
        "h_11_identical_max3" => limited(11, 3),
        "i_two_procs_10_identical" => Some(Ok(converge(given, &same(10), 2, 256, false))),
        "i_two_procs_unique_pairs" => Some(Ok(converge(given, &unique(32), 2, 256, false))),
        "i_two_procs_mix_use1" => Some(Ok(converge(given, &mix(), 2, 256, true))),
        "k_exit_of_one_of_two" => Some(Ok(exit_of_one_of_two(given))),
        "l_mremap_moves_6_merged_4_zero" => Some(Ok(mremap(given))),
        "l_dontneed_half" => Some(Ok(after(given, &[&same(10)], false, |session, process| {
            session.discard(process[0], 5);
        }))),
        "l_munmap_all" => Some(Ok(munmap_all(given))),
        "m_select_dup_no_prune" => Some(Ok(select_dup(given, 1_000_000_000))),
        "m_select_dup_prune_always" => Some(Ok(select_dup(given, 0))),
        "p_batches_of_30_over_100_unique" => Some(Ok(batches(given, 30))),
        "p_batches_of_50_over_100_unique" => Some(Ok(batches(given, 50))),
        "n_smart_one_unique_page_45_scans" => Some(Ok(smart(given, &same(1), false))),
        "n_smart_always_changing_page_24_scans" => Some(Ok(smart(given, &same(1), true))),
        "n_smart_257_identical_12_scans" => Some(Ok(smart(given, &same(257), false))),
        "j_fork_child_of_merged" | "j_fork_child_of_zero" | "j_fork_child_of_unique" => Some(Err(
            "fork: a child's engine is detached, its pages are never scanned",
        )),
        "q_thp_512_identical"
        | "q_thp_512_unique"
        | "q_thp_512_zero_use0"
        | "q_thp_512_zero_use1" => Some(Err("huge pages: the memory side splits them, if at all")),
        _ => None,
    }
}

fn numbers(value: &Value) -> Vec<i64> {
    let number = |n: &Value| n.as_i64().expect("golden rows hold numbers");
    value
        .as_array()
        .expect("golden rows are lists")
        .iter()
        .map(number)
        .collect()
}

/// Every difference between the kernel's record and ours.
fn differences(golden: &Value, session: &Session) -> Vec<String> {
    let mut all = Vec::new();
    let rows = golden["rows"].as_array().expect("every case has rows");
    for (number, (want, got)) in rows.iter().zip(&session.rows).enumerate() {
        let want = numbers(want);
        if want != got {
            all.push(format!("row {}: kernel {want:?}, here {got:?}", number + 1));
        }
    }
    if rows.len() != session.rows.len() {
        all.push(format!("{} rows, here {}", rows.len(), session.rows.len()));
    }
    for (name, got) in [
        ("before", session.before),
        ("just_after_op", session.just_after_op),
    ] {
        let want = golden.get(name).map(numbers);
        if want != got.map(Vec::from) {
            all.push(format!("{name}: kernel {want:?}, here {got:?}"));
        }
    }
    let want = golden
        .get("joined")
        .map(|text| text.as_str().expect("a text").to_owned());
    if want != session.joined {
        all.push(format!(
            "joined: kernel {want:?}, here {:?}",
            session.joined
        ));
    }
    let want: BTreeMap<String, i64> = golden["groups"]
        .as_object()
        .expect("groups are a table")
        .iter()
        .map(|(size, count)| (size.clone(), count.as_i64().expect("a number")))
        .collect();
    // Some cases recorded no groups.
    if !want.is_empty() && want != session.groups() {
        all.push(format!(
            "groups: kernel {want:?}, here {:?}",
            session.groups()
        ));
    }
    let processes = golden["proc"].as_array().expect("every case has processes");
    assert_eq!(
        processes.len(),
        session.processes.len(),
        "processes of the case"
    );
    for (index, (process, own)) in processes.iter().zip(&session.processes).enumerate() {
        let field = |name: &str| process[name].as_i64().expect("ksm_stat holds numbers");
        let want = [
            field("ksm_rmap_items"),
            field("ksm_zero_pages"),
            field("ksm_merging_pages"),
            field("ksm_process_profit"),
            golden["smaps_KSM_kB"][index]
                .as_i64()
                .expect("a number of kB"),
        ];
        let got = session.figures(own);
        if want != got {
            all.push(format!("process {index}: kernel {want:?}, here {got:?}"));
        }
    }
    all
}

fn compare_with_kernel(smart: bool, text: &str) {
    let golden: Value = serde_json::from_str(text).expect("the golden file is JSON");
    assert_eq!(golden["smart_scan"].as_i64(), Some(i64::from(smart)));
    let cases = golden["cases"].as_object().expect("cases are a table");
    assert_eq!(cases.len(), 48, "the golden file has 48 cases");
    let (mut compared, mut rows, mut wrong) = (0, 0, Vec::new());
    for (name, case) in cases {
        let given = Given {
            smart,
            rows: case["rows"].as_array().expect("rows").len(),
        };
        match run(name, given) {
            None => wrong.push(format!(
                "{name}: nobody has written down what this case does"
            )),
            Some(Err(reason)) => println!("{name}: not compared; {reason}"),
            Some(Ok(session)) => {
                compared += 1;
                rows += session.rows.len();
                for difference in differences(case, &session) {
                    wrong.push(format!("{name}: {difference}"));
                }
            }
        }
    }
    println!(
        "smart_scan={}: {compared} of 48 cases compared, {rows} rows",
        u8::from(smart)
    );
    assert!(
        wrong.is_empty(),
        "differs from the kernel:\n{}",
        wrong.join("\n")
    );
    assert_eq!(compared, 41, "cases that have a counterpart");
}

#[test]
fn golden_cases_without_smart_scan_match_the_kernel() {
    compare_with_kernel(
        false,
        include_str!("../../../tests/data/golden_smart0.json"),
    );
}

#[test]
fn golden_cases_with_smart_scan_match_the_kernel() {
    compare_with_kernel(true, include_str!("../../../tests/data/golden_smart1.json"));
}
