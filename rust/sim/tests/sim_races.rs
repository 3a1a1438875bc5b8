//! Goal: merging is invisible, whoever gets in between. Method: random writes, discards, and other
//! acts of the program interleave with steps of the scan, also in the middle of one, on simulated
//! memory, while a plain copy remembers the last write to each page; after every event the two must
//! agree, and every invariant of the algorithm must hold. At the end of each run, and now and then
//! before, the scan must come to rest with everything merged that can be.

use pagemerge_sim::{Event, Flavour, World, asked_seed, run_seeds, seeds_or};

fn body(world: &mut World) {
    world.random_event();
    world.verify();
}

#[test]
fn scan_interleaved_with_writes_preserves_every_byte() {
    let seeds = seeds_or(0..4_000);
    let runs = seeds.end - seeds.start;
    let seen = run_seeds(Flavour::Races, seeds, body);
    println!("{runs} runs: {seen:?}");
    // A simulation in which these rarely happened would prove nothing.
    if runs >= 200 {
        assert!(seen.passes > runs && seen.merges > 10 * runs, "{seen:?}");
        assert!(seen.races > 10 * runs && seen.broken > runs, "{seen:?}");
        assert!(seen.refusals > runs, "{seen:?}");
        assert!(seen.settled > runs / 2, "{seen:?}");
        assert!(seen.chains > 2 && seen.zero_pages > 20, "{seen:?}");
    }
}

/// Runs the seed that `PAGEMERGE_SIM_SEED` names (seed 0 without it), twice: a failure shows itself
/// with its shortest event list, and two runs must not differ in anything that can be observed.
#[test]
fn replay_of_a_seed_repeats_it() {
    let seed = asked_seed().unwrap_or(0);
    println!("seed {seed}");
    for flavour in [Flavour::Races, Flavour::Faults] {
        run_seeds(flavour, seed..seed + 1, body);
        let run = || {
            let mut world = World::new(flavour, seed);
            while world.goes_on() {
                body(&mut world);
            }
            world
        };
        let (first, second) = (run(), run());
        assert_eq!(first.events(), second.events());
        assert_eq!(first.traced(), second.traced());
        assert_eq!(first.scanner().stats(), second.scanner().stats());
        assert_eq!(first.space().interference(), second.space().interference());
        assert!(!first.events().is_empty());
    }
}

/// The list of events alone determines a run: what a failure prints is enough to repeat it.
#[test]
fn script_of_a_run_repeats_it() {
    for seed in 0..20 {
        let mut world = World::new(Flavour::Faults, seed);
        while world.goes_on() {
            body(&mut world);
        }
        let events: Vec<Event> = world.events().to_vec();
        let mut again = World::scripted(Flavour::Faults, seed, &events);
        while again.goes_on() {
            body(&mut again);
        }
        assert_eq!(world.traced(), again.traced(), "seed {seed}");
        assert_eq!(
            world.scanner().stats(),
            again.scanner().stats(),
            "seed {seed}"
        );
    }
}
