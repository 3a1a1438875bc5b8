//! Goal: merging is invisible, and nothing is lost or leaked, whatever fails. Method: as in
//! `sim_races`, and besides, requests are refused for every reason, partners are lost after the
//! examined page has become a frame, digests cannot be had, and the whole space fails in the middle of
//! a batch. After every event all pages must read as written and all invariants hold; once the trouble
//! ends, everything must merge as if it had never been.

use pagemerge_sim::{Flavour, run_seeds, seeds_or};

#[test]
fn scan_with_injected_failures_preserves_every_byte() {
    let seeds = seeds_or(0..4_000);
    let runs = seeds.end - seeds.start;
    let seen = run_seeds(Flavour::Faults, seeds, |world| {
        world.random_event();
        world.verify();
    });
    println!("{runs} runs: {seen:?}");
    if runs >= 200 {
        assert!(seen.merges > 10 * runs && seen.races > runs, "{seen:?}");
        assert!(seen.broken > runs && seen.settled > runs / 2, "{seen:?}");
        assert!(
            seen.refusals > 10 * runs && seen.errors > runs / 5,
            "{seen:?}"
        );
    }
}
