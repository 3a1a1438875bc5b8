//! Running many seeds, and what to do when one fails: print it, and the shortest list of events that
//! fails as well.

use crate::event::{Event, Flavour, Op};
use crate::world::{Coverage, World};
use std::cell::RefCell;
use std::fmt::Write as _;
use std::ops::Range;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

/// The variable that names the seed that a `replay` test is to run.
pub const SEED_VARIABLE: &str = "PAGEMERGE_SIM_SEED";

/// The variable that replaces a test's own range of seeds, as `FIRST..END`, for long runs.
pub const SEEDS_VARIABLE: &str = "PAGEMERGE_SIM_SEEDS";

/// Replays of shrinking that are worth the wait.
const SHRINK_ATTEMPTS: usize = 3_000;

thread_local! {
    /// What the last panic of a quiet thread said; `None` while panics are not kept quiet.
    static KEPT_QUIET: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// The seed that [`SEED_VARIABLE`] asks for.
///
/// # Panics
/// When the variable holds something else than a number.
#[must_use]
pub fn asked_seed() -> Option<u64> {
    let text = std::env::var(SEED_VARIABLE).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{SEED_VARIABLE} must be a number, got {text:?}")),
    )
}

/// The seeds to run: `usual`, unless [`SEEDS_VARIABLE`] asks for others.
///
/// # Panics
/// When the variable is not of the form `FIRST..END`.
#[must_use]
pub fn seeds_or(usual: Range<u64>) -> Range<u64> {
    let Ok(text) = std::env::var(SEEDS_VARIABLE) else {
        return usual;
    };
    text.split_once("..")
        .and_then(|(first, end)| Some(first.parse().ok()?..end.parse().ok()?))
        .unwrap_or_else(|| panic!("{SEEDS_VARIABLE} must be FIRST..END, got {text:?}"))
}

/// Runs `body` for each event of each seed's run, and says what all the runs have been through.
///
/// `body` lets an event happen ([`World::random_event`]) and then asserts whatever must hold.
///
/// # Panics
/// At the first seed that fails: with the seed, what failed, and the shortest event list found that
/// fails too.
pub fn run_seeds(flavour: Flavour, seeds: Range<u64>, body: impl Fn(&mut World)) -> Coverage {
    let mut coverage = Coverage::default();
    for seed in seeds {
        let mut world = World::new(flavour, seed);
        match attempt(&mut world, &body) {
            Ok(()) => coverage += world.coverage(),
            Err(why) => panic!("{}", report(flavour, seed, world.events(), &why, &body)),
        }
    }
    coverage
}

/// Runs the world to its end. The error is what the panic said.
fn attempt(world: &mut World, body: &impl Fn(&mut World)) -> Result<(), String> {
    keep_quiet(|| {
        while world.goes_on() {
            body(world);
        }
    })
}

/// Runs `what` and returns what its panic said, without printing it.
fn keep_quiet(what: impl FnOnce()) -> Result<(), String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let quiet = KEPT_QUIET.with_borrow_mut(|kept| match kept {
                Some(text) => {
                    *text = info.to_string();
                    true
                }
                None => false,
            });
            if !quiet {
                usual(info);
            }
        }));
    });
    KEPT_QUIET.set(Some(String::new()));
    let outcome = panic::catch_unwind(AssertUnwindSafe(what));
    let said = KEPT_QUIET.take().unwrap_or_default();
    outcome.map_err(|_| said)
}

fn report(
    flavour: Flavour,
    seed: u64,
    events: &[Event],
    why: &str,
    body: &impl Fn(&mut World),
) -> String {
    let fails = |script: &[Event]| attempt(&mut World::scripted(flavour, seed, script), body).err();
    let mut text = format!(
        "seed {seed} ({flavour:?}) fails after {} events: {why}\n",
        events.len()
    );
    if fails(events).is_some() {
        let (shortest, why) = shrink(events, fails);
        let mut world = World::scripted(flavour, seed, &shortest);
        let first = world.scanner().settings().clone();
        let _ = writeln!(text, "{} events are enough: {why}", shortest.len());
        let _ = writeln!(text, "  {first:?}");
        let _ = writeln!(text, "  {:?}", world.space().habits());
        let _ = attempt(&mut world, body);
        if *world.scanner().settings() != first {
            let _ = writeln!(text, "  in the end: {:?}", world.scanner().settings());
        }
        for event in &shortest {
            let _ = writeln!(text, "  {event:?},");
        }
    } else {
        text.push_str("the same events do NOT fail when they are replayed: look for state\n");
    }
    let _ = writeln!(
        text,
        "replay: {SEED_VARIABLE}={seed} cargo test -p pagemerge-sim replay"
    );
    text
}

/// The shortest list found that still fails, and how: leaves out ranges, halves, single events, and
/// then makes what is left simpler.
fn shrink(events: &[Event], fails: impl Fn(&[Event]) -> Option<String>) -> (Vec<Event>, String) {
    let mut shortest = events.to_vec();
    let mut why = fails(&shortest).expect("the caller has seen this list fail");
    let mut attempts = 0;
    let mut try_out = |candidate: &[Event], shortest: &mut Vec<Event>, why: &mut String| {
        attempts += 1;
        if attempts > SHRINK_ATTEMPTS {
            return false;
        }
        if let Some(new) = fails(candidate) {
            *shortest = candidate.to_vec();
            *why = new;
            return true;
        }
        false
    };
    loop {
        let before = shortest.clone();
        let mut chunk = shortest.len().div_ceil(2).max(1);
        loop {
            // From the end, so that what is still to come keeps its place.
            let mut end = shortest.len();
            while end > 0 {
                let start = end.saturating_sub(chunk);
                let mut candidate = shortest.clone();
                candidate.drain(start..end);
                try_out(&candidate, &mut shortest, &mut why);
                end = start;
            }
            if chunk == 1 {
                break;
            }
            chunk = chunk.div_ceil(2);
        }
        for index in 0..shortest.len() {
            for simpler in simpler(shortest[index].op) {
                let mut candidate = shortest.clone();
                candidate[index].op = simpler;
                if try_out(&candidate, &mut shortest, &mut why) {
                    break;
                }
            }
        }
        if shortest == before {
            return (shortest, why);
        }
    }
}

/// Simpler things that might fail as well, the simplest first.
fn simpler(op: Op) -> Vec<Op> {
    let smaller = |n: u32, least: u32| {
        let mut all = vec![least, n / 2, n.saturating_sub(1)];
        all.retain(|m| *m < n && *m >= least);
        all
    };
    match op {
        Op::Register { pages, domain } => {
            let mut all: Vec<Op> = smaller(pages, 1)
                .into_iter()
                .map(|pages| Op::Register { pages, domain })
                .collect();
            if domain > 0 {
                all.push(Op::Register { pages, domain: 0 });
            }
            all
        }
        Op::Fill {
            page,
            pages,
            value,
            stride,
        } => smaller(pages.into(), 1)
            .into_iter()
            .filter_map(|pages| u8::try_from(pages).ok())
            .map(|pages| Op::Fill {
                page,
                pages,
                value,
                stride,
            })
            .collect(),
        Op::Race {
            points,
            page,
            action,
        } => smaller(points, 0)
            .into_iter()
            .map(|points| Op::Race {
                points,
                page,
                action,
            })
            .collect(),
        Op::Act { page, action } => smaller(page, 0)
            .into_iter()
            .map(|page| Op::Act { page, action })
            .collect(),
        Op::Settle => vec![Op::Pass],
        Op::Pass => vec![Op::Step { budget: u32::MAX }],
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::Action;

    /// A failure that needs two certain events in a long list shrinks to just these two, in order.
    #[test]
    fn shrink_long_list_leaves_the_needed_events() {
        let event = |n: u32| Event {
            seed: u64::from(n),
            op: if n == 17 || n == 60 {
                Op::Act {
                    page: n,
                    action: Action::Touch,
                }
            } else {
                Op::Wait { millisecs: n }
            },
        };
        let events: Vec<Event> = (0..100).map(event).collect();
        let needed = |script: &[Event]| {
            let touches = script
                .iter()
                .filter(|event| matches!(event.op, Op::Act { .. }))
                .count();
            (touches == 2).then(|| "two touches".to_owned())
        };
        let (shortest, why) = shrink(&events, needed);
        assert_eq!(why, "two touches");
        assert_eq!(
            shortest.iter().map(|event| event.seed).collect::<Vec<_>>(),
            [17, 60]
        );
    }

    #[test]
    fn keep_quiet_panicking_returns_what_was_said() {
        let said = keep_quiet(|| panic!("on purpose")).unwrap_err();
        assert!(said.contains("on purpose"), "{said}");
        assert_eq!(keep_quiet(|| ()), Ok(()));
    }
}
