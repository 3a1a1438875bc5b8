//! Faults at random, several at a time, while others write and fork.

use crate::life::{PAGES, WORLDS, World, content, filled, registered};
use crate::sites::check_leaks;
use crate::support::engines::register;
use crate::support::faults::{ANSWERS, LIES, PARTIAL};
use crate::support::os::{self, Memory, Random, page_size};
use crate::support::scenario_with;
use pagemerge_linux::core::RunMode;
use pagemerge_linux::inject::{self, Effect, Plan};
use pagemerge_linux::{Engine, EngineSettings, Remerge};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// A scenario: writers, readers and forks while random plans, several at a time, strike wherever they
/// strike. Every increment must be there in the end, and every child must see right bytes.
pub(super) fn random_faults_under_writers() {
    const WRITERS: usize = 2;
    let world = World::of_environment();
    let seed = os::seed();
    println!("figure: seed {seed} in world {world:?}");
    let mut random = Random::new(seed);
    let memory = Arc::new(filled());
    let start: Vec<Vec<u64>> = (0..WRITERS)
        .map(|who| (0..PAGES).map(|page| memory.load(page, who)).collect())
        .collect();
    let engine = Engine::new(EngineSettings {
        remerge: Remerge::Quiet,
        ..world.settings()
    });
    let engine = engine.expect("an engine");
    let region = register(&engine, &memory);
    engine.start().expect("merging in the background");
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..WRITERS)
        .map(|who| {
            let (stop, memory) = (Arc::clone(&stop), Arc::clone(&memory));
            let random = Random::new(seed ^ (who as u64 + 1));
            thread::spawn(move || write(&memory, who, &stop, random))
        })
        .collect();
    let (begun, struck) = (Instant::now(), inject::strikes());
    let (mut plans, mut forks, mut recovered) = (0, 0, 0);
    while begun.elapsed() < os::stress_time() {
        inject::disarm_all();
        for _ in 0..=random.below(4) {
            inject::arm_plan(&random_plan(&mut random));
            plans += 1;
        }
        thread::sleep(Duration::from_micros(500 + random.next() % 6000));
        match random.below(12) {
            0 => drop(engine.set_run(RunMode::Unmerge)),
            1 => drop(engine.stats()),
            2 => {
                forks += 1;
                let child = if random.below(2) == 0 && world != World::User {
                    os::fork(|| i32::from(!still_right(&memory)))
                } else {
                    // Only what no window can hide from it: a raw fork inside one sees zeroes.
                    os::raw_fork(|| 0)
                };
                assert_eq!(child.wait(), 0, "seed {seed}: bytes in a child");
            }
            _ => {}
        }
        // Errors end background merging; it is begun again.
        inject::disarm_all();
        recovered += u32::from(engine.run().expect("an open engine") != RunMode::Merge);
        engine.start().expect("merging again");
    }
    inject::disarm_all();
    stop.store(true, Ordering::Relaxed);
    let counts: Vec<Vec<u64>> = writers
        .into_iter()
        .map(|w| w.join().expect("it counted"))
        .collect();
    engine.stop().expect("stopped");
    let stats = engine.stats().expect("stats");
    println!(
        "figure: {world:?}: {plans} plans, {} strikes, {} merges, {forks} forks, {recovered} new starts, {} increments",
        inject::strikes() - struck,
        stats.core.pages_merged,
        counts.iter().flatten().sum::<u64>()
    );
    assert!(
        stats.core.pages_merged > 0,
        "nothing merged: this proved nothing"
    );
    assert!(
        inject::strikes() > struck,
        "nothing was struck: this proved nothing"
    );
    let check = |when: &str| {
        for (who, counts) in counts.iter().enumerate() {
            for (page, count) in counts.iter().enumerate() {
                let now = memory.load(page, who);
                let added = now.wrapping_sub(start[who][page]);
                assert_eq!(
                    added, *count,
                    "seed {seed}, {when}: page {page} of writer {who}"
                );
            }
        }
        assert!(
            still_right(&memory),
            "seed {seed}, {when}: words that nobody wrote"
        );
    };
    check("merged");
    engine.unregister(region).expect("un-merged");
    check("un-merged");
    engine.close().expect("closed");
    assert_eq!(registered(&memory, "uw"), [""; 0], "after close");
    drop(memory);
    check_leaks();
}

/// Increments word `who` of pages until `stop`; says how often it did, by page.
fn write(memory: &Memory, who: usize, stop: &AtomicBool, mut random: Random) -> Vec<u64> {
    let mut counts = vec![0_u64; PAGES];
    while !stop.load(Ordering::Relaxed) {
        // Mostly a few pages, so that others become equal and are merged.
        let among = if random.below(10) == 0 { PAGES } else { 8 };
        let page = random.below(among);
        memory.word(page, who).fetch_add(1, Ordering::Relaxed);
        counts[page] += 1;
        if counts[page].is_multiple_of(4) {
            thread::sleep(Duration::from_micros(50));
        }
    }
    counts
}

/// Whether all words that no writer counts in are as they were.
pub(super) fn still_right(memory: &Memory) -> bool {
    (0..PAGES).all(|page| {
        (2..page_size() / 8)
            .step_by(3)
            .all(|index| memory.load(page, index) == os::word_of(content(page), index))
    })
}

pub(super) fn random_plan(random: &mut Random) -> Plan {
    let answers = &ANSWERS[random.below(ANSWERS.len())];
    let number = |random: &mut Random, end: usize| u32::try_from(random.below(end)).expect("small");
    let lies = LIES.iter().find(|(call, _)| *call == answers.call);
    let effect = match (random.below(10), lies) {
        (0, _) if PARTIAL.contains(&answers.call) => Effect::Short(2 + number(random, 5)),
        (1 | 2, Some((_, errnos))) => Effect::Lie(errnos[random.below(errnos.len())]),
        (3, _) => Effect::DelayBefore(number(random, 400)),
        (4, _) => Effect::DelayAfter(number(random, 400)),
        (5, _) => Effect::Fail(libc::EINTR),
        _ => Effect::Fail(answers.errnos[random.below(answers.errnos.len())]),
    };
    Plan {
        call: answers.call,
        phase: None,
        effect,
        skip: number(random, 6),
        times: 1 + number(random, 4),
    }
}

/// Goal: faults in combination, at any moment, under writers and forks, lose no increment.
pub(super) fn faults_in_combination_lose_no_increment() {
    for (world, name, pretend) in WORLDS {
        if world != World::Bare {
            let variables = [("PAGEMERGE_WORLD", name), ("PAGEMERGE_PRETEND", pretend)];
            let limit = os::stress_time() * 4 + Duration::from_secs(120);
            scenario_with("random_faults_under_writers", &variables)
                .end(limit)
                .expect_success();
        }
    }
}
