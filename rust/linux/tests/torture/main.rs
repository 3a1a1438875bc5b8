//! The torture program: nothing is lost, whatever happens.
//!
//! Real memory, real threads, the real kernel: some dozens of *actors* write to memory in every way that
//! there is, look at it, give it back, lock, protect, move and unmap it, fork and live on, end
//! threads, register and unregister it with several engines at once and change their settings, all at
//! the same time and for as long as one likes. An oracle that knows nothing of the engines accounts for
//! every byte (`arena.rs`, `sequences.rs`).
//!
//! # Use
//! * `make torture SECONDS=1800` or `cargo test --release -p pagemerge-linux --test torture -- --seconds
//!   1800 [--seed N] [--only ACTOR,...] [--without ACTOR,...]`.
//! * As a part of `cargo test` it runs for 25 s (`PAGEMERGE_TORTURE_SECONDS`).
//! * `--only check,store,runs` keeps the rest at home; memory is registered and engines run in any case.
//!
//! # Seeds
//! The seed is printed first, and again with every failure together with the command that uses it. Each
//! actor makes its choices by a generator of its own, which follows from the seed and its name: the same
//! choices come again whoever else takes part. The timing of threads does not, so a failure may need
//! several runs to show again.
//!
//! # What a failure tells
//! Which bytes are wrong, what they look like, what the page tables say of the page, what has happened to
//! that page, and what every actor did lately. `PAGEMERGE_TORTURE_KEEP=1` keeps the process then.
//!
//! # Enough?
//! A run in which little was merged, broken or forked has proved nothing: it fails, too.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "system call arguments and results are registers"
)]

#[path = "../support/mod.rs"]
mod support;

mod arena;
mod children;
mod engines;
mod owners;
mod sequences;
mod world;
mod writers;

use arena::{Arena, Rules};
use engines::{CALLS, IO, PLAIN, STILL, USER};
use std::fmt::Write as _;
use std::process::ExitCode;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};
use support::os;
use support::{Need, case};
use world::{Me, World};

/// Seconds of a run that is a part of all tests.
const SHORT: u64 = 25;

/// How the program was called.
#[derive(Clone, Debug, Default)]
struct Wanted {
    seconds: Option<u64>,
    seed: Option<u64>,
    only: Vec<String>,
    without: Vec<String>,
}

impl Wanted {
    /// `None` when these are no arguments of ours, but of the test harness.
    fn parse(arguments: &[String]) -> Option<Self> {
        let mut wanted = Self::default();
        let mut rest = arguments.iter();
        while let Some(name) = rest.next() {
            let value = rest.next()?;
            let list = || value.split(',').map(ToOwned::to_owned).collect();
            match name.as_str() {
                "--seconds" => wanted.seconds = Some(value.parse().ok()?),
                "--seed" => wanted.seed = Some(value.parse().ok()?),
                "--only" => wanted.only = list(),
                "--without" => wanted.without = list(),
                _ => return None,
            }
        }
        Some(wanted)
    }

    /// The command that runs it again.
    fn again(&self, seed: u64, seconds: u64) -> String {
        let mut text = format!(
            "cargo test --release -p pagemerge-linux --test torture -- --seconds {seconds} --seed {seed}"
        );
        for (name, list) in [("--only", &self.only), ("--without", &self.without)] {
            if !list.is_empty() {
                let _ = write!(text, " {name} {}", list.join(","));
            }
        }
        text
    }

    fn takes_part(&self, name: &str) -> bool {
        let among = |list: &[String]| list.iter().any(|one| one == name);
        (self.only.is_empty() || among(&self.only)) && !among(&self.without)
    }
}

/// The memory of the whole torture: 34 MiB.
fn arenas() -> Vec<Arena> {
    let calls = Rules {
        calls: true,
        ..Rules::default()
    };
    let devices = Rules {
        calls: true,
        devices: true,
        ..Rules::default()
    };
    let moves = Rules {
        calls: true,
        moves: true,
        ..Rules::default()
    };
    vec![
        Arena::new("io", 1536, 0, devices, &[IO]),
        Arena::new("huge", 1024, 2 << 20, devices, &[IO]),
        Arena::new("plain", 1536, 0, calls, &[PLAIN, PLAIN, CALLS]),
        Arena::new("calls", 1024, 0, calls, &[CALLS, PLAIN]),
        Arena::new("user", 512, 0, Rules::default(), &[USER]),
        Arena::new("still", 256, 0, devices, &[STILL]),
        Arena::new("moves", 512, 0, moves, &[PLAIN]),
        Arena::new("guests", 512, 0, calls, &[]),
    ]
}

/// An actor: its name, how many of it, and its life.
type Part = (
    &'static str,
    usize,
    Box<dyn Fn(&mut Me, usize) + Send + Sync>,
);

fn parts() -> Vec<Part> {
    fn part(name: &'static str, count: usize, life: fn(&mut Me)) -> Part {
        (name, count, Box::new(move |me, _| life(me)))
    }
    let stranger = writers::Stranger::begin();
    vec![
        part("store", 3, writers::store),
        part("atomic", 1, writers::atomic),
        part("copy", 1, writers::copy),
        part("read", 1, writers::read),
        part("recv", 1, writers::receive),
        part("readv", 1, writers::vectors),
        part("remote", 1, writers::remote),
        part("debugger", 1, writers::debugger),
        (
            "stranger",
            1,
            Box::new(move |me, _| writers::stranger(me, &stranger)),
        ),
        part("splice", 1, writers::splice),
        part("direct", 2, writers::device),
        part("ring", 1, writers::ring),
        part("threads", 1, writers::threads),
        part("spawns", 1, writers::spawns),
        part("classes", 2, writers::classes),
        part("check", 2, writers::check),
        (
            "sequence",
            sequences::SEQUENCE_WRITERS,
            Box::new(sequences::write),
        ),
        part("sequences", 2, sequences::read),
        part("count", sequences::COUNTING, sequences::count),
        part("advise", 1, owners::advise),
        part("lock", 1, owners::lock),
        part("protect", 1, owners::protect),
        part("discard", 1, owners::discard),
        part("free", 1, owners::free),
        part("moves", 1, owners::movers),
        part("regions", 1, engines::regions),
        part("settings", 1, engines::tune),
        part("runs", 1, engines::runs),
        part("passes", 2, engines::passes),
        part("still", 1, engines::still),
        part("guests", 1, engines::guests),
        ("fork", 1, Box::new(|me, _| children::forks(me, false))),
        ("clone", 1, Box::new(|me, _| children::forks(me, true))),
    ]
}

/// For whoever is told of a fault.
static WORLD: OnceLock<&World> = OnceLock::new();

fn tell_fault(addr: usize, at: usize) -> ! {
    let world = WORLD.get().expect("set before");
    let me = thread::current();
    let mine = world.arenas.iter().position(|arena| {
        let first = arena.at(0);
        (first..first + arena.pages * os::page_size()).contains(&addr)
    });
    let page = mine.map_or(0, |number| {
        (addr - world.arenas[number].at(0)) / os::page_size()
    });
    // Where the program is loaded, to find the place by.
    let base = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let base = base.lines().next().unwrap_or_default().to_owned();
    let story = format!(
        "a fault at {addr:x} (code at {at:x}; {base}); process {} of {}; now {}",
        std::process::id(),
        os::status("PPid"),
        os::describe(addr),
    );
    world.fail(
        me.name().unwrap_or("?"),
        mine.unwrap_or(usize::MAX),
        page,
        &story,
    )
}

fn torture(wanted: &Wanted) {
    let seed = wanted.seed.unwrap_or_else(os::seed);
    let seconds = wanted.seconds.unwrap_or(SHORT);
    println!("figure: seed {seed}");
    let parts = parts();
    let must_exist = |list: &[String]| {
        let strange = list
            .iter()
            .find(|name| parts.iter().all(|(known, ..)| known != name));
        assert!(strange.is_none(), "there is no actor {strange:?}");
    };
    must_exist(&wanted.only);
    must_exist(&wanted.without);
    let world: &'static World = Box::leak(Box::new(World::new(
        seed,
        wanted.again(seed, seconds),
        Duration::from_secs(seconds),
        arenas(),
        engines::all(),
    )));
    WORLD.set(world).expect("one run in a process");
    support::raw::tell_faults(tell_fault);
    thread::spawn(|| world.watch());
    let mut me = Me::new(world, "main", 0);
    engines::register_all(&mut me);
    let shared = engines::register_shared(world);
    me.done();
    for lead in &world.engines {
        if lead.background {
            lead.engine.start().expect("a barrier");
        }
    }
    let mut actors = Vec::new();
    for (name, count, life) in parts {
        let life: &'static _ = Box::leak(life);
        for number in 0..if wanted.takes_part(name) { count } else { 0 } {
            let whole_life = move || {
                let mut me = Me::new(world, name, number);
                let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    life(&mut me, number);
                }));
                if let Err(panic) = ended {
                    let text = panic.downcast_ref::<String>().cloned();
                    let text =
                        text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
                    me.fail(usize::MAX, 0, &text.unwrap_or_default());
                }
            };
            let thread = thread::Builder::new().name(name.into()).spawn(whole_life);
            actors.push(thread.expect("a thread"));
        }
    }
    let mut told = Instant::now();
    while Instant::now() < world.ends {
        thread::sleep(Duration::from_millis(50));
        if told.elapsed() > Duration::from_secs(60) {
            told = Instant::now();
            println!(
                "{:?} of {seconds} s: {}",
                world.began.elapsed(),
                merges(world)
            );
        }
    }
    world.end();
    for actor in actors {
        actor.join().expect("an actor fails by ending the process");
    }
    finish(&mut me, wanted, &shared);
}

fn merges(world: &World) -> String {
    let mut text = String::new();
    for lead in &world.engines {
        if let Ok(stats) = lead.engine.stats() {
            let _ = write!(
                text,
                "{} {} merges {} windows; ",
                lead.name, stats.core.pages_merged, stats.space.windows
            );
        }
    }
    text
}

/// Looks at everything, un-merges everything, looks again, closes the engines, and looks a last time.
fn finish(me: &mut Me, wanted: &Wanted, shared: &[(usize, pagemerge_linux::RegionHandle)]) {
    let world = me.world;
    let look = |me: &mut Me, when: &'static str| {
        me.begin(when, usize::MAX, 0, 0, 0);
        for number in 0..world.arenas.len() {
            me.begin("last look", number, 0, world.arenas[number].pages, 0);
            arena::Claim::wait(me, number, 0, world.arenas[number].pages).verify(me, when);
        }
        world.sequences.check_end(me);
        world.counters.check_end(me);
    };
    look(me, "at the end");
    let mut figures: Vec<(String, u64)> = Vec::new();
    let mut total =
        |name: &str, value: u64| match figures.iter_mut().find(|(known, _)| known == name) {
            Some((_, sum)) => *sum += value,
            None => figures.push((name.to_owned(), value)),
        };
    for lead in &world.engines {
        let stats = match lead.engine.stats() {
            Ok(stats) => stats,
            Err(error) => me.fail(usize::MAX, 0, &format!("the engine {}: {error}", lead.name)),
        };
        if let Some(error) = &stats.last_error {
            me.fail(
                usize::MAX,
                0,
                &format!("the engine {} ended by itself: {error}", lead.name),
            );
        }
        println!(
            "figure: {}: {} merged, {} broken, {} windows, {} lost races, {} scans, {} generations, left alone {:?}",
            lead.name,
            stats.core.pages_merged,
            stats.core.cow_broken,
            stats.space.windows,
            stats.space.lost_races,
            stats.core.full_scans,
            stats.space.generations,
            support::engines::reasons(&stats),
        );
        total("merges", stats.core.pages_merged);
        total("merged pages that were written", stats.core.cow_broken);
        total("windows", stats.space.windows);
        total("lost races", stats.space.lost_races);
        total(
            "pages un-merged",
            stats.core.pages_shared + stats.core.pages_sharing,
        );
    }
    engines::unregister_all(me);
    for (engine, handle) in shared {
        let done = world.engines[*engine].engine.unregister(*handle);
        engines::take(me, "the last unregister", done);
    }
    look(me, "un-merged, at the end");
    for lead in &world.engines {
        let done = lead.engine.close();
        engines::take(me, "close", done);
    }
    look(me, "after the engines were closed");
    me.done();
    for (name, value) in figures {
        me.count(&name, value);
    }
    let mut totals = world.totals.lock().expect("nobody panics with it").clone();
    for (name, value) in &me.counts {
        *totals.entry(name.clone()).or_default() += value;
    }
    for (name, value) in &totals {
        println!("figure: {value:>14} {name}");
    }
    let seconds = (world.ends - world.began).as_secs().max(1);
    let of = |name: &str| totals.get(name).copied().unwrap_or(0);
    println!(
        "figure: seed {}: {seconds} s, {} writes, {} MiB verified, {} merges ({} a second), {} forks and clones survived: nothing lost",
        world.seed,
        of("writes"),
        of("bytes verified") >> 20,
        of("merges") + of("merges of guests"),
        (of("merges") + of("merges of guests")) / seconds,
        of("forks survived") + of("raw clones survived"),
    );
    if wanted.only.is_empty() && wanted.without.is_empty() {
        enough(&of, seconds);
    }
}

/// # Panics
/// When so little happened that nothing is proved. The floors are far below what an idle machine does,
/// since tests run beside other work.
fn enough(of: &dyn Fn(&str) -> u64, seconds: u64) {
    for (name, in_ten_seconds) in [
        ("writes", 1000),
        ("merges", 500),
        ("merged pages that were written", 30),
        ("windows", 100),
        ("forks survived", 4),
        ("raw clones survived", 4),
        ("discards", 2),
        ("settings changed", 2),
        ("run modes set", 1),
        ("regions registered", 1),
        ("moves of memory", 1),
        ("engines come and gone", 1),
    ] {
        let floor = in_ten_seconds * (seconds / 10);
        let seen = of(name);
        assert!(
            seen >= floor,
            "too little happened in {seconds} s, so nothing is proved: {name}: {seen}, not {floor}"
        );
    }
}

/// The run that is a part of all tests.
fn nothing_is_lost_under_torture() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    torture(&Wanted {
        seconds: number("PAGEMERGE_TORTURE_SECONDS"),
        seed: number("PAGEMERGE_SEED"),
        ..Wanted::default()
    });
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.is_empty() || std::env::var_os(support::SCENARIO).is_some() {
        return support::run(vec![
            case!(nothing_is_lost_under_torture)
                .needs(Need::DirectIo)
                .needs(Need::IoUring)
                .seconds(600),
        ]);
    }
    match Wanted::parse(&arguments) {
        Some(wanted) => {
            torture(&wanted);
            ExitCode::SUCCESS
        }
        None => support::run(vec![
            case!(nothing_is_lost_under_torture)
                .needs(Need::DirectIo)
                .needs(Need::IoUring)
                .seconds(600),
        ]),
    }
}
