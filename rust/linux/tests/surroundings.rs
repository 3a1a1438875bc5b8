//! What goes on around a program while its pages are merged: the kernel's own workers, limits and
//! privileges that change in mid life, whoever stops, freezes or traces it, and odd memory nearby.
//! `docs/surroundings.md` has the list of all that was tried, with what cannot be tried by a test.
//!
//! Most tests let a program work ([`Busy`]) and disturb it. `PAGEMERGE_STRESS_SECONDS` makes them
//! longer. Settings of the whole machine are changed under its lock by a process that does nothing
//! else, and put back by it.

mod support;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::busy::{Busy, Plan, Tally};
use support::os::{self, MachineLock, MachineSetting, Memory, Random};
use support::{case, scenario};

/// Lets a program work for the time of a stress, and disturbs it every so often; longer, if so few
/// pages were merged or `disturb` has not yet said that it did what it is there for.
fn disturbed(plan: &Plan, floor: u64, mut disturb: impl FnMut(&mut Busy) -> bool) {
    let mut busy = Busy::start(plan);
    let begun = Instant::now();
    let mut done = false;
    while begun.elapsed() < time() || !done || busy.merges() < floor {
        busy.assert_alive();
        done |= disturb(&mut busy);
    }
    busy.goes_on(100, "merging after the disturbance");
    busy.finish().tell();
}

fn time() -> Duration {
    os::stress_time().mul_f64(0.4)
}

fn limit() -> Duration {
    time() * 3 + Duration::from_secs(60)
}

// ------------------------------------------------------------------- the kernel's own workers

/// Goal: khugepaged collapses what is being merged into huge pages, at its greatest speed, and
/// windows split them again; no byte is lost.
///
/// (It leaves a huge page's worth of memory alone while one page of it is write-protected or merged,
/// so it gets its turn when a region has just been let go, or is not tracked.)
fn khugepaged_works_on_the_same_memory() {
    let lock = MachineLock::take();
    let set = |name, value| MachineSetting::set(&lock, name, value);
    let _settings = [
        set(
            "/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs",
            "0",
        ),
        set(
            "/sys/kernel/mm/transparent_hugepage/khugepaged/alloc_sleep_millisecs",
            "0",
        ),
        set(
            "/sys/kernel/mm/transparent_hugepage/khugepaged/pages_to_scan",
            "65536",
        ),
        set(
            "/sys/kernel/mm/transparent_hugepage/khugepaged/max_ptes_none",
            "511",
        ),
        set(
            "/sys/kernel/mm/transparent_hugepage/khugepaged/max_ptes_shared",
            "511",
        ),
        set(
            "/sys/kernel/mm/transparent_hugepage/khugepaged/max_ptes_swap",
            "511",
        ),
    ];
    scenario("works_beside_khugepaged")
        .end(limit())
        .expect_success();
    scenario("works_beside_khugepaged_untracked")
        .end(limit())
        .expect_success();
}

fn beside_khugepaged(write_tracking: bool) {
    let before = os::vmstat("thp_collapse_alloc");
    let collapsed = || os::vmstat("thp_collapse_alloc") - before;
    let plan = Plan {
        pages: 4096,
        // So many that a huge page's worth of memory has few pages to merge at a time, and stays whole
        // for a while.
        contents: 40_000,
        write_tracking,
        ..Plan::default()
    };
    let mut random = Random::new(os::seed());
    let mut all = Tally::default();
    let begun = Instant::now();
    while begun.elapsed() < time() || all.merges < 500 || collapsed() == 0 {
        let memory = Arc::new(Memory::huge(plan.pages));
        memory
            .advise(libc::MADV_NOHUGEPAGE)
            .expect("small pages to begin with");
        let mut busy = Busy::over(&plan, memory);
        let mut make_huge = |memory: &Memory| {
            let (seen, asked) = (collapsed(), Instant::now());
            memory
                .advise(libc::MADV_HUGEPAGE)
                .expect("huge pages on request");
            while collapsed() == seen && asked.elapsed() < Duration::from_millis(500) {
                pause(&mut random, 1000);
            }
        };
        // khugepaged leaves alone what is write-protected.
        if write_tracking {
            busy.without_the_engine(make_huge);
        } else {
            make_huge(&busy.memory);
        }
        pause(&mut random, 100_000);
        all.add(&busy.finish());
    }
    all.tell();
    println!(
        "figure: {} huge pages made by khugepaged (on the whole machine)",
        collapsed()
    );
}

fn works_beside_khugepaged() {
    beside_khugepaged(true);
}

fn works_beside_khugepaged_untracked() {
    beside_khugepaged(false);
}

/// Up to `micros`.
fn pause(random: &mut Random, micros: usize) {
    std::thread::sleep(Duration::from_micros(random.below(micros) as u64));
}

fn main() -> ExitCode {
    use support::Need;
    support::run(vec![
        case!(khugepaged_works_on_the_same_memory)
            .needs(Need::Root)
            .needs(Need::HugePages)
            .seconds(7200),
        case!(works_beside_khugepaged).hidden(),
        case!(works_beside_khugepaged_untracked).hidden(),
    ])
}
