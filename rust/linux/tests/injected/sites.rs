//! Sites (a call in a phase), what each is struck with, and the lives that do it.

use crate::life::{EVER, PAGES, Shape, WORLDS, World, descriptors, live};
use crate::support::faults::{ANSWERS, LIES, PARTIAL};
use crate::support::{Ended, os, scenario_with};
use pagemerge_linux::inject::{self, Effect, Plan};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

pub(super) type Site = (&'static str, &'static str);

pub(super) fn counts() -> BTreeMap<Site, (u64, u64)> {
    let rows = inject::table().into_iter();
    rows.map(|(call, phase, passed, struck)| ((call, phase), (passed, struck)))
        .collect()
}

pub(super) fn struck_by(plan: &Plan) -> u64 {
    let here = |site: &Site| site.0 == plan.call && plan.phase.is_none_or(|phase| phase == site.1);
    counts()
        .iter()
        .filter(|(site, _)| here(site))
        .map(|(_, count)| count.1)
        .sum()
}

pub(super) const fn fail(
    call: &'static str,
    phase: &'static str,
    errno: i32,
    skip: u32,
    times: u32,
) -> Plan {
    Plan {
        call,
        phase: Some(phase),
        effect: Effect::Fail(errno),
        skip,
        times,
    }
}

/// Faults that lead to calls which are made only then.
pub(super) const CONTEXTS: &[&[Plan]] = &[
    &[],
    &[fail("UffdMove", "WindowOpen", libc::EBUSY, 1, 3)],
    &[
        fail("MmapFrames", "WindowReplace", libc::EPERM, 0, EVER),
        fail("UffdMove", "WindowClose", libc::EBUSY, 0, EVER),
    ],
    &[
        fail("MmapFrames", "WindowReplace", libc::ENOMEM, 0, 4),
        fail("ProcmapQuery", "WindowReplace", libc::ENOTTY, 0, 4),
    ],
    &[
        fail("UffdUnregister", "WindowClose", libc::EINVAL, 0, 6),
        fail("MmapFrames", "WindowReplace", libc::EPERM, 0, 6),
    ],
    &[fail("Mremap", "RestoreWindow", libc::EINVAL, 0, EVER)],
    &[
        fail("MmapFrames", "WindowReplace", libc::EPERM, 0, 8),
        fail("UffdMove", "WindowClose", libc::EPERM, 0, 60),
        fail("UffdCopy", "WindowClose", libc::EPERM, 0, 60),
    ],
    &[fail("Userfaultfd", "Probe", libc::EPERM, 0, 1)],
    // So that the helper has to end all watches.
    &[
        fail("UffdHelperWriteprotect", "Helper", libc::EPERM, 0, EVER),
        fail("UffdWake", "Helper", libc::EPERM, 0, EVER),
    ],
];

/// What a site is struck with, given how often it is passed in a life.
pub(super) fn plans_for(site: Site, passes: u64) -> Vec<Plan> {
    let (call, phase) = site;
    let plan = |effect, skip, times| Plan {
        call,
        phase: Some(phase),
        effect,
        skip,
        times,
    };
    let passes = u32::try_from(passes).unwrap_or(u32::MAX);
    let answers = ANSWERS.iter().find(|answers| answers.call == call);
    let answers = answers.unwrap_or_else(|| panic!("{call} is not in the table of errors"));
    let mut uses = vec![(0, 1), (0, EVER)];
    uses.extend(
        [(2, 3), (10, 1), (39, 7)]
            .into_iter()
            .filter(|(skip, _)| *skip < passes),
    );
    let mut plans = Vec::new();
    for errno in answers.errnos {
        plans.extend(uses.iter().map(|(skip, times)| {
            // A call that is interrupted for ever is never made; and where the last way out is shut,
            // whoever waits waits for as long as it is.
            // And a copy that says for ever that the place is gone says that its owner gave it up.
            let gone = call == "UffdCopy" && [libc::ENOENT, libc::EINVAL].contains(errno);
            let times = if gone || site == ("MadviseFork", "WindowClose") {
                (*times).min(50)
            } else if *errno == libc::EINTR || call == "HelperDup" {
                (*times).min(5)
            } else {
                *times
            };
            plan(Effect::Fail(*errno), *skip, times)
        }));
    }
    if !answers.errnos.contains(&libc::EINTR) {
        plans.push(plan(Effect::Fail(libc::EINTR), passes / 3, 2));
    }
    plans.push(plan(Effect::DelayBefore(400), 0, 3));
    plans.push(plan(Effect::DelayAfter(400), passes / 2, 3));
    if PARTIAL.contains(&call) {
        plans.push(plan(Effect::Short(2), 0, EVER));
        plans.push(plan(Effect::Short(7), passes / 2, 3));
        plans.push(plan(Effect::Short(EVER), 0, 2));
    }
    for (_, errnos) in LIES.iter().filter(|(lying, _)| *lying == call) {
        for errno in *errnos {
            plans.push(plan(Effect::Lie(*errno), 0, 1));
            plans.push(plan(Effect::Lie(*errno), passes / 2, 3));
            plans.push(plan(Effect::Lie(*errno), 0, 40));
        }
    }
    plans
}

/// Phases in which panics end an engine and nobody else: its thread's, and its helper's.
pub(super) fn may_panic(phase: &str) -> bool {
    !["Elsewhere", "Probe", "Evaluate", "Start"].contains(&phase)
}

pub(super) fn panics_for(site: Site, passes: u64) -> Vec<Plan> {
    if !may_panic(site.1) {
        return Vec::new();
    }
    let passes = u32::try_from(passes).unwrap_or(u32::MAX);
    let mut skips = vec![0, passes / 2, passes - 1];
    skips.dedup();
    let effects = [Effect::PanicBefore, Effect::PanicAfter];
    effects
        .into_iter()
        .flat_map(|effect| skips.iter().map(move |skip| (effect, *skip)))
        .map(|(effect, skip)| Plan {
            call: site.0,
            phase: Some(site.1),
            effect,
            skip,
            times: 1,
        })
        .collect()
}

/// Whether all plans are to run, or a share that changes with the seed.
pub(super) fn wants_all() -> bool {
    std::env::var("PAGEMERGE_FAULTS").is_ok_and(|value| value == "all")
}

/// The plans of this world in a fixed order: those that are made of `make`.
pub(super) fn all_plans(
    shape: Shape,
    make: impl Fn(Site, u64) -> Vec<Plan>,
) -> Vec<(&'static [Plan], Plan)> {
    let mut known = BTreeSet::new();
    let mut found = Vec::new();
    for context in CONTEXTS {
        let before = counts();
        // Twice, since what another thread does makes some calls rare.
        for _ in 0..2 {
            live_in_context(shape, context);
        }
        let after = counts();
        for (site, (passed, _)) in after {
            let passes = passed - before.get(&site).map_or(0, |(passed, _)| *passed);
            if passes > 0 && known.insert(site) && site.0 != "Enter" {
                found.extend(
                    make(site, passes.div_ceil(2))
                        .into_iter()
                        .map(|plan| (*context, plan)),
                );
            }
        }
    }
    found
}

/// A life in which only the context's own faults strike.
pub(super) fn live_in_context(shape: Shape, context: &[Plan]) {
    // Judged like a plan: the first of the context is.
    let (first, rest) = context
        .split_first()
        .map_or((None, context), |(f, r)| (Some(f), r));
    drop(live(shape, rest, first));
}

/// What lives came to.
#[derive(Default)]
struct Lived {
    lived: u64,
    met: u64,
    told: u64,
}

impl Lived {
    fn live(&mut self, shape: Shape, context: &[Plan], plan: &Plan) {
        // The last line says what hangs, if anything does.
        println!("life: {plan:?} in {context:?}");
        let started = Instant::now();
        let before = (descriptors_left(), frames_left());
        let life = live(shape, context, Some(plan));
        let plans = || context.iter().chain([plan]);
        // An engine that has panicked is kept, and what cannot be unmapped is left.
        // A panic right after a descriptor or a mapping was made leaves it to nobody.
        if !life.broken && plans().all(|plan| plan.effect != Effect::PanicAfter) {
            assert_eq!(descriptors_left(), before.0, "descriptors after {plan:?}");
            if plans().all(|plan| plan.call != "Munmap") {
                assert_eq!(frames_left(), before.1, "mappings of frames after {plan:?}");
            }
        }
        println!("lived for {:?}, struck {}", started.elapsed(), life.struck);
        self.lived += 1;
        self.met += u64::from(life.struck > 0);
        self.told += u64::from(!life.errors.is_empty() || !life.reasons.is_empty());
    }
}

/// Runs this process's share of `plans`.
pub(super) fn run_plans(shape: Shape, plans: &[(&'static [Plan], Plan)]) {
    let every: usize = number("PAGEMERGE_SHARE").unwrap_or(1);
    let offset: usize = number("PAGEMERGE_OFFSET").unwrap_or(0);
    let mut sums = Lived::default();
    let planned: BTreeSet<Site> = plans
        .iter()
        .filter_map(|(_, plan)| Some((plan.call, plan.phase?)))
        .collect();
    // Sites that are passed only while something else fails, and by what.
    let mut reached: BTreeMap<Site, Vec<Plan>> = BTreeMap::new();
    for (context, plan) in plans.iter().skip(offset % every).step_by(every) {
        let before = counts();
        sums.live(shape, context, plan);
        if matches!(plan.effect, Effect::PanicBefore | Effect::PanicAfter) {
            continue;
        }
        for (site, (passed, _)) in counts() {
            let was = before.get(&site).map_or(0, |(passed, _)| *passed);
            if passed > was && site.0 != "Enter" && !planned.contains(&site) {
                let way = || context.iter().chain([plan]).copied().collect();
                reached.entry(site).or_insert_with(way);
            }
        }
    }
    let shape = Shape {
        combined: true,
        ..shape
    };
    // Those are struck on the way on which they were met. (Another thread may make it another way.)
    for (site, way) in &reached {
        let answers = ANSWERS.iter().find(|answers| answers.call == site.0);
        let Some(errno) = answers.and_then(|answers| answers.errnos.first()) else {
            continue;
        };
        for times in [1, 5] {
            sums.live(shape, way, &fail(site.0, site.1, *errno, 0, times));
        }
    }
    let Lived { lived, met, told } = sums;
    println!("sum: {} {lived} {met} {told}", plans.len());
    for (call, phase, passed, struck) in inject::table() {
        println!("row: {call} {phase} {passed} {struck}");
    }
}

pub(super) fn number(name: &str) -> Option<usize> {
    std::env::var(name).ok()?.parse().ok()
}

/// A scenario: this process's share of all faults but panics.
pub(super) fn share_of_faults() {
    let shape = Shape {
        world: World::of_environment(),
        pages: number("PAGEMERGE_PAGES").unwrap_or(PAGES),
        combined: false,
    };
    let plans = all_plans(shape, plans_for);
    run_plans(shape, &plans);
}

/// A scenario: this process's share of panics. Engines that have panicked are kept, so nothing is said
/// about what is left.
pub(super) fn share_of_panics() {
    // Thousands of panics on purpose; those of the test itself are on its main thread.
    std::panic::set_hook(Box::new(|info| {
        if thread::current().name() == Some("main") {
            println!("{info}");
        }
    }));
    let shape = Shape {
        world: World::of_environment(),
        pages: PAGES,
        combined: false,
    };
    let plans = all_plans(shape, panics_for);
    run_plans(shape, &plans);
}

/// Mappings of the engine's files that are left.
pub(super) fn frames_left() -> Vec<String> {
    os::mappings(0, usize::MAX / 2)
        .into_iter()
        .filter(|vma| vma.name.contains("memfd:pagemerge"))
        .map(|vma| format!("{:x} {}", vma.start, vma.name))
        .collect()
}

/// Descriptors of the merging thread other than what stands for its standard streams.
pub(super) fn descriptors_left() -> Vec<(String, usize)> {
    descriptors()
        .into_iter()
        .filter(|(what, _)| what != "/dev/null")
        .collect()
}

/// When all engines are closed, and all memory is unmapped, nothing of theirs is left.
pub(super) fn check_leaks() {
    assert_eq!(descriptors_left(), [], "descriptors of the merging thread");
    assert_eq!(frames_left(), [""; 0], "mappings of frames are left");
}

/// Shares that one run of `make test` divides the plans into.
const SHARES: usize = 60;

/// Longer than one process takes for its share; after that it counts as hanging.
fn limit() -> Duration {
    Duration::from_secs(if wants_all() { 3000 } else { 600 })
}

/// Processes for each world that run all of them: engines that have panicked are kept, so one process
/// cannot have too many.
const PIECES: usize = 8;

/// What shares of plans came to, in all.
#[derive(Default)]
struct Sums {
    /// (call, phase): passed, struck.
    table: BTreeMap<(String, String), (u64, u64)>,
    /// Plans that there are, by world.
    plans: BTreeMap<&'static str, u64>,
    lived: u64,
    met: u64,
    told: u64,
}

impl Sums {
    /// Adds what a scenario in `world` has printed.
    fn add(&mut self, world: &'static str, output: &str) {
        for line in output.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let number = |at: usize| words[at].parse::<u64>().expect("a number");
            match words[0] {
                "row:" if words[1] != "Enter" => {
                    let row = self
                        .table
                        .entry((words[1].into(), words[2].into()))
                        .or_default();
                    *row = (row.0 + number(3), row.1 + number(4));
                }
                "sum:" => {
                    self.plans.insert(world, number(1));
                    self.lived += number(2);
                    self.met += number(3);
                    self.told += number(4);
                }
                _ => {}
            }
        }
    }

    fn unstruck(&self) -> Vec<&(String, String)> {
        let rows = self.table.iter();
        // What only tests of their own reach may be met here by chance. In lives nothing fails any more
        // when engines are closed: see [`crate::named::closing_under_any_fault_loses_nothing`].
        let closing = |site: &(String, String)| ["Close", "Elsewhere"].contains(&site.1.as_str());
        rows.filter(|(site, count)| count.1 == 0 && !closing(site))
            .filter(|(site, _)| !PROCESS_ONLY.contains(&site.0.as_str()))
            .map(|(site, _)| site)
            .collect()
    }

    /// # Panics
    /// When a call was never struck, or never made.
    fn print_table_and_check(&self) {
        println!(
            "figure: {:<24} {:<16} {:>9} {:>8}",
            "call", "phase", "passed", "struck"
        );
        for ((call, phase), (passed, struck)) in &self.table {
            println!("figure: {call:<24} {phase:<16} {passed:>9} {struck:>8}");
        }
        // Each call stands in one place of the crate. That it is struck in every phase in which it may be
        // made is more than can be had: some are met by chance only.
        println!("figure: never struck in this phase: {:?}", self.unstruck());
        let mut struck: BTreeMap<&str, u64> = BTreeMap::new();
        for ((call, _), (_, times)) in &self.table {
            *struck.entry(call).or_default() += times;
        }
        let spared: Vec<_> = struck
            .iter()
            .filter(|(call, times)| **times == 0 && !PROCESS_ONLY.contains(call))
            .collect();
        assert!(
            spared.is_empty(),
            "calls that were never struck: {spared:?}"
        );
        let never: Vec<_> = inject::calls()
            .filter(|call| !self.table.keys().any(|(known, _)| known == call))
            .filter(|call| !PROCESS_ONLY.contains(call) && *call != "Enter")
            .collect();
        assert!(never.is_empty(), "calls that were never made: {never:?}");
    }
}

/// Runs shares of `scenario`, (world, what it pretends, shares, which one), two at a time.
fn run_shares(
    scenario: &'static str,
    shares: Vec<(&'static str, &'static str, usize, usize)>,
    limit: Duration,
) -> Vec<(&'static str, Ended)> {
    let (shares, results) = (Mutex::new(shares), Mutex::new(Vec::new()));
    let work = || {
        loop {
            let next = shares.lock().expect("nobody panics with it").pop();
            let Some((world, pretend, every, offset)) = next else {
                return;
            };
            let (every, offset) = (every.to_string(), offset.to_string());
            let variables = [
                ("PAGEMERGE_WORLD", world),
                ("PAGEMERGE_PRETEND", pretend),
                ("PAGEMERGE_SHARE", &every),
                ("PAGEMERGE_OFFSET", &offset),
            ];
            let ended = scenario_with(scenario, &variables).end(limit);
            let mut results = results.lock().expect("nobody panics with it");
            results.push((world, ended));
        }
    };
    thread::scope(|scope| {
        scope.spawn(work);
        scope.spawn(work);
    });
    results.into_inner().expect("nobody panics with it")
}

/// Starts shares of `scenario` in all worlds, and sums up.
fn in_all_worlds(scenario: &'static str, limit: Duration) {
    let seed = os::seed();
    println!("figure: seed {seed}");
    let mut shares = Vec::new();
    for (_, world, pretend) in WORLDS {
        if wants_all() {
            shares.extend((0..PIECES).map(|offset| (world, pretend, PIECES, offset)));
        } else {
            let offset = usize::try_from(seed % SHARES as u64).expect("small");
            shares.push((world, pretend, SHARES, offset));
        }
    }
    let mut sums = Sums::default();
    for (world, ended) in run_shares(scenario, shares, limit) {
        if ended.hung || !ended.status.success() {
            let lines: Vec<_> = ended.output.lines().collect();
            panic!(
                "{scenario} in world {world}: {}{}\n{}\n{}",
                ended.status,
                if ended.hung { ", hangs" } else { "" },
                ended.where_it_hung,
                lines[lines.len().saturating_sub(40)..].join("\n")
            );
        }
        sums.add(world, &ended.output);
    }
    let (lived, met, told) = (sums.lived, sums.met, sums.told);
    println!(
        "figure: {scenario}: {} sites (call and phase), {} plans in {} worlds; {lived} lived through, \
         {met} met, {told} of them told of; {} sites struck",
        sums.table.len(),
        sums.plans.values().sum::<u64>(),
        sums.plans.len(),
        sums.table.len() - sums.unstruck().len()
    );
    assert!(
        met > lived / 2,
        "most plans were never met: this proved little"
    );
    if wants_all() && scenario == "share_of_faults" {
        sums.print_table_and_check();
    }
}

/// Calls that are made once in the life of a process, at its start: see
/// [`crate::named::starting_can_fail_and_be_tried_again`]. And others that only tests of their own reach.
pub(super) const PROCESS_ONLY: &[&str] = &[
    "CloseRange",
    "OpenNull",
    "MemfdNull",
    "Sigmask",
    "Atfork",
    "SpawnMerging",
    // Needs more pages: see [`hashing_threads_that_cannot_be_started_are_done_without`].
    "SpawnHashing",
    // Ends what an engine could go on with: see
    // [`crate::named::window_in_which_every_ioctl_becomes_forbidden_gives_its_pages_back`].
    "UffdEnd",
    // See [`crate::named::helper_that_cannot_be_woken_ends_all_the_same`].
    "EventfdRead",
];

/// Goal: no single fault at any site loses a byte, hangs, leaks, or is kept silent.
pub(super) fn any_call_that_fails_loses_nothing() {
    in_all_worlds("share_of_faults", limit());
}

/// Goal: a panic of ours at any site, in every phase of windows and of everything else, loses nothing:
/// the engine says so and is closed to further calls, and the program runs on.
pub(super) fn any_panic_loses_nothing() {
    in_all_worlds("share_of_panics", limit());
}

/// Goal: every name of a call is in the table of errors, and every entry is a call.
pub(super) fn every_call_has_its_errors() {
    let known: BTreeSet<_> = ANSWERS.iter().map(|answers| answers.call).collect();
    let calls: BTreeSet<_> = inject::calls().filter(|call| *call != "Enter").collect();
    assert_eq!(known, calls);
    for answers in ANSWERS {
        assert!(
            !answers.errnos.is_empty() && answers.page.contains('('),
            "{}",
            answers.call
        );
    }
    let errnos: usize = ANSWERS.iter().map(|answers| answers.errnos.len()).sum();
    println!(
        "figure: {} calls, {errnos} pairs of call and error number",
        calls.len()
    );
}
