//! The engines, and everything that is done with them while memory is in use: memory is registered and
//! unregistered, settings and run modes change, passes are asked for while the background works,
//! engines come and go.
//!
//! | engine | barrier | merges | its memory |
//! |---|---|---|---|
//! | `io` | full | in the background; written pages after 300 ms or more | devices write to it |
//! | `plain` | full | in the background; written pages at once, soon, or never | system calls write to it |
//! | `calls` | full | when it is told to, from several threads | system calls write to it |
//! | `user` | user | in the background | the program's own code alone writes to it |
//! | `still` | none | when it is told to, and nobody writes meanwhile | anybody, between its calls |

use crate::arena::{Arena, Claim, PARTS};
use crate::support::engines::{settings, try_register};
use crate::support::os::{Random, page_size};
use crate::world::{Me, World};
use pagemerge_linux::core::{AdvisorMode, RunMode, TreeOrder};
use pagemerge_linux::{Barrier, Engine, EngineSettings, EngineStats, Error, RegionHandle, Remerge};
use std::time::Duration;

/// No `O_DIRECT` read takes so long; one that does is beyond the promise, and counted.
pub(crate) const QUIET_FOR_DEVICES: Duration = Duration::from_millis(300);

pub(crate) const IO: usize = 0;
pub(crate) const PLAIN: usize = 1;
pub(crate) const CALLS: usize = 2;
pub(crate) const USER: usize = 3;
pub(crate) const STILL: usize = 4;

#[derive(Debug)]
pub(crate) struct Lead {
    pub(crate) name: &'static str,
    pub(crate) engine: Engine,
    pub(crate) background: bool,
}

fn new(name: &'static str, background: bool, change: impl FnOnce(&mut EngineSettings)) -> Lead {
    let mut wanted = settings();
    change(&mut wanted);
    let engine = Engine::new(wanted).unwrap_or_else(|error| panic!("the engine {name}: {error}"));
    Lead {
        name,
        engine,
        background,
    }
}

pub(crate) fn all() -> Vec<Lead> {
    let for_devices = u32::try_from(QUIET_FOR_DEVICES.as_millis()).expect("a short time");
    vec![
        new("io", true, |s| s.quiet_millisecs = for_devices),
        new("plain", true, |s| s.remerge = Remerge::Always),
        new("calls", false, |s| s.quiet_millisecs = 20),
        new("user", true, |s| s.barrier = Some(Barrier::User)),
        new("still", false, |s| s.barrier = Some(Barrier::None)),
    ]
}

/// Registers a part with an engine, and remembers where.
fn register_part(me: &mut Me, number: usize, part: usize, engine: usize) {
    let world = me.world;
    let arena = &world.arenas[number];
    let mut parts = arena.parts.lock().expect("nobody panics with it");
    if parts.0[part].is_some() {
        return;
    }
    let (first, pages) = arena.part(part);
    me.begin("register", number, first, pages, engine as u64);
    let domain = ["", "", "blue"][me.random.below(3)];
    let got = try_register(
        &world.engines[engine].engine,
        arena.at(first),
        pages * page_size(),
        domain,
    );
    match got {
        Ok(handle) => {
            me.count("regions registered", 1);
            parts.0[part] = Some((engine, handle));
        }
        // What the owner has locked or protected is refused, by name.
        Err(error @ Error::NotMergeable { .. }) => {
            let Error::NotMergeable { reason, .. } = error else {
                unreachable!()
            };
            me.count(&format!("error: register: {}", reason.name()), 1);
        }
        Err(error) => me.fail(number, first, &format!("cannot register: {error}")),
    }
}

/// What an engine may say to an honest request, by name; anything else fails the run.
pub(crate) fn take(me: &mut Me, what: &str, result: Result<(), Error>) -> bool {
    match result {
        Ok(()) => true,
        Err(Error::Unmerge { reason, .. }) => {
            me.count(&format!("error: {what}: {}", reason.name()), 1);
            false
        }
        Err(Error::Setting(error)) => {
            let error = error.to_string();
            let name = error
                .split_ascii_whitespace()
                .take(3)
                .collect::<Vec<_>>()
                .join(" ");
            me.count(&format!("error: {what}: {name}"), 1);
            false
        }
        Err(error) => me.fail(usize::MAX, 0, &format!("{what}: {error}")),
    }
}

fn unregister_part(me: &mut Me, number: usize, part: usize) -> bool {
    let world = me.world;
    let arena = &world.arenas[number];
    let mut parts = arena.parts.lock().expect("nobody panics with it");
    let Some((engine, handle)) = parts.0[part] else {
        return true;
    };
    let (first, pages) = arena.part(part);
    me.begin("unregister", number, first, pages, engine as u64);
    let ended = world.engines[engine].engine.unregister(handle);
    if take(me, "unregister", ended) {
        me.count("regions unregistered", 1);
        parts.0[part] = None;
    }
    parts.0[part].is_none()
}

pub(crate) fn register_all(me: &mut Me) {
    for number in 0..me.world.arenas.len() {
        for part in 0..PARTS {
            if let Some(&engine) = me.world.arenas[number].engines.first() {
                register_part(me, number, part, engine);
            }
        }
    }
}

/// Gives every page its own copy back; at the end of a run, when only the engines are left.
pub(crate) fn unregister_all(me: &mut Me) {
    for number in 0..me.world.arenas.len() {
        for part in 0..PARTS {
            let mut tries = 0;
            while !unregister_part(me, number, part) {
                tries += 1;
                assert!(tries < 100, "a part cannot be unregistered at the end");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

/// The memory that nobody claims: registered for the whole run.
pub(crate) fn register_shared(world: &World) -> [(usize, RegionHandle); 2] {
    use crate::sequences::{COUNTER_PAGES, SEQUENCE_PAGES};
    let engine = &world.engines[PLAIN].engine;
    [
        (world.sequences.base, SEQUENCE_PAGES),
        (world.counters.base, COUNTER_PAGES),
    ]
    .map(|(base, pages)| {
        let handle = try_register(engine, base, pages * page_size(), "");
        (PLAIN, handle.expect("plain memory is registered"))
    })
}

/// Registers and unregisters parts of arenas, also with another engine than before.
pub(crate) fn regions(me: &mut Me) {
    while !me.is_over() {
        let number = me.random.below(me.world.arenas.len());
        let arena = &me.world.arenas[number];
        if arena.rules.moves || arena.engines.is_empty() {
            me.pause(100);
            continue;
        }
        let part = me.random.below(PARTS);
        if unregister_part(me, number, part) {
            me.pause(100_000);
            let engines = me.world.arenas[number].engines;
            let engine = engines[me.random.below(engines.len())];
            register_part(me, number, part, engine);
        }
        me.rest(400);
    }
}

/// Another value for a setting or two.
fn change(random: &mut Random, engine: usize, s: &mut EngineSettings) {
    let scan = &mut s.scan;
    match random.below(15) {
        0 => scan.pages_to_scan = [50, 500, 5000, 100_000][random.below(4)],
        1 => scan.sleep_millisecs = [0, 0, 1, 5][random.below(4)],
        2 => scan.max_page_sharing = [2, 3, 16, 256, 1000][random.below(5)],
        3 => scan.use_zero_pages = !scan.use_zero_pages,
        4 => scan.smart_scan = random.below(4) == 0,
        5 => scan.stable_node_chains_prune_millisecs = [0, 10, 2000][random.below(3)],
        6 => {
            scan.advisor_mode = if random.below(4) == 0 {
                AdvisorMode::ScanTime
            } else {
                AdvisorMode::None
            };
        }
        7 => {
            scan.tree_order = if random.below(2) == 0 {
                TreeOrder::Content
            } else {
                TreeOrder::Digest
            };
        }
        8 => s.threads = 1 + u32::try_from(random.below(3)).expect("small"),
        9 => s.max_pause_micros = [1, 20, 100, 1000][random.below(4)],
        10 => scan.lagging_records = random.below(3) == 0,
        14 => s.thp_min_duplicates = [1, 8, 32, 1000][random.below(4)],
        11 => {
            s.reserved_mappings = [None, None, Some(60_000), Some(65_000)][random.below(4)];
        }
        12 if engine == IO => {
            s.remerge = [Remerge::Quiet, Remerge::Quiet, Remerge::Never][random.below(3)];
        }
        12 => {
            s.remerge = [
                Remerge::Quiet,
                Remerge::Always,
                Remerge::Always,
                Remerge::Never,
            ][random.below(4)];
        }
        _ if engine == IO => s.quiet_millisecs = [300, 400, 700][random.below(3)],
        _ => s.quiet_millisecs = [1, 3, 10, 40][random.below(4)],
    }
}

pub(crate) fn tune(me: &mut Me) {
    while !me.is_over() {
        let number = me.random.below(me.world.engines.len());
        me.begin("settings", usize::MAX, 0, 0, number as u64);
        let seed = me.random.next();
        let done = me.world.engines[number].engine.update(move |s| {
            let mut random = Random::new(seed);
            for _ in 0..=random.below(3) {
                change(&mut random, number, s);
            }
        });
        if take(me, "settings", done) {
            me.count("settings changed", 1);
        }
        me.rest(120);
    }
}

fn merged_now(stats: &EngineStats) -> u64 {
    stats.core.pages_shared + stats.core.pages_sharing + stats.core.ksm_zero_pages
}

/// `run` 0, 1 and 2.
pub(crate) fn runs(me: &mut Me) {
    for lead in &me.world.engines {
        if lead.background {
            lead.engine.start().expect("a barrier");
        }
    }
    while !me.is_over() {
        me.rest(600);
        let number = me.random.below(me.world.engines.len());
        let lead = &me.world.engines[number];
        let mode = [RunMode::Stop, RunMode::Unmerge][me.random.below(2)];
        me.begin("run", usize::MAX, 0, 0, number as u64 | (mode as u64) << 8);
        let before = lead.engine.stats().map_or(0, |stats| merged_now(&stats));
        let done = lead.engine.set_run(mode);
        if take(me, "run", done) {
            me.count("run modes set", 1);
            if mode == RunMode::Unmerge {
                me.count("pages un-merged", before);
            }
        }
        me.pause(30_000);
        me.begin("run", usize::MAX, 0, 0, number as u64 | 1 << 8);
        let next = if lead.background {
            RunMode::Merge
        } else {
            RunMode::Stop
        };
        let done = lead.engine.set_run(next);
        take(me, "run", done);
    }
}

/// Passes on request, beside the background's.
pub(crate) fn passes(me: &mut Me) {
    while !me.is_over() {
        // The barrier-less engine wants nobody to write: `still` sees to that.
        let number = [CALLS, CALLS, CALLS, PLAIN, IO, USER][me.random.below(6)];
        let engine = &me.world.engines[number].engine;
        me.begin("pass", usize::MAX, 0, 0, number as u64);
        let world = me.world;
        let mut go_on = || !world.is_over();
        let kind = me.random.below(4);
        let done = match kind {
            0 => {
                let pages = u32::try_from(1 + me.random.below(2000)).expect("small");
                engine.scan(Some(pages), &mut go_on)
            }
            1 => engine.settle(4, &mut go_on),
            _ => engine.scan(None, &mut go_on),
        };
        match done {
            Ok(_) => me.count("passes on request", 1),
            Err(Error::Interrupted) => {}
            Err(error) => me.fail(usize::MAX, 0, &format!("a pass: {error}")),
        }
        me.pause(60_000);
    }
}

/// Merges without a barrier: all of its memory is claimed meanwhile.
pub(crate) fn still(me: &mut Me) {
    let numbers: Vec<usize> = (0..me.world.arenas.len())
        .filter(|&number| me.world.arenas[number].engines == [STILL])
        .collect();
    while !me.is_over() {
        let claims: Vec<Claim> = numbers
            .iter()
            .map(|&number| Claim::wait(me, number, 0, me.world.arenas[number].pages))
            .collect();
        me.begin("still", numbers[0], 0, me.world.arenas[numbers[0]].pages, 0);
        for _ in 0..3 {
            let done = me.world.engines[STILL].engine.scan(None, &mut || true);
            if let Err(error) = done {
                me.fail(numbers[0], 0, &format!("a pass without a barrier: {error}"));
            }
            me.count("passes on request", 1);
        }
        for claim in claims {
            claim.verify(me, "after a pass without a barrier");
        }
        me.rest(300);
    }
}

/// Engines that come and go, some by closing and some by dropping their last handle, over memory of
/// their own that is equal to everybody's.
pub(crate) fn guests(me: &mut Me) {
    let number = me
        .world
        .arenas
        .iter()
        .position(|arena| arena.engines.is_empty());
    let number = number.expect("an arena for guests");
    let arena = &me.world.arenas[number];
    while !me.is_over() {
        let mut wanted = settings();
        wanted.remerge = [Remerge::Quiet, Remerge::Always, Remerge::Never][me.random.below(3)];
        if me.chance(20) {
            wanted = EngineSettings::kernel_defaults();
            wanted.scan.sleep_millisecs = 0;
            wanted.scan.pages_to_scan = 5000;
        }
        wanted.scan.write_tracking &= me.chance(80);
        me.begin("guest", number, 0, arena.pages, 0);
        let guest = match Engine::new(wanted) {
            Ok(guest) => guest,
            Err(error) => me.fail(number, 0, &format!("a guest engine: {error}")),
        };
        let handle = try_register(&guest, arena.at(0), arena.pages * page_size(), "");
        let handle = match handle {
            Ok(handle) => handle,
            Err(Error::NotMergeable { reason, .. }) => {
                me.count(&format!("error: register: {}", reason.name()), 1);
                me.pause(20_000);
                continue;
            }
            Err(error) => me.fail(number, 0, &format!("a guest's region: {error}")),
        };
        if me.chance(70) {
            guest.start().expect("a barrier");
            me.rest(400);
        } else {
            for _ in 0..3 {
                guest.scan(None, &mut || true).expect("a pass");
            }
        }
        me.begin("guest goes", number, 0, arena.pages, 0);
        match guest.stats() {
            Ok(stats) => {
                me.count("merges of guests", stats.core.pages_merged);
                me.count("windows of guests", stats.space.windows);
                me.count("pages un-merged", merged_now(&stats));
            }
            Err(error) => me.fail(number, 0, &format!("a guest's counters: {error}")),
        }
        match me.random.below(3) {
            0 => drop(guest),
            1 => {
                let ended = guest.unregister(handle);
                take(me, "unregister", ended);
                drop(guest);
            }
            _ => {
                let closed = guest.close();
                take(me, "close", closed);
            }
        }
        me.count("engines come and gone", 1);
        me.pause(50_000);
    }
}

/// Whether a range is registered at this moment, and where. For owners, who hold the lock meanwhile.
pub(crate) fn registered(arena: &Arena, parts: &crate::arena::Parts, page: usize) -> Option<usize> {
    let part = page / (arena.pages / PARTS);
    parts
        .0
        .get(part)
        .copied()
        .flatten()
        .map(|(engine, _)| engine)
}
