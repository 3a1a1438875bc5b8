//! Forks. A child inherits everything as it was at one moment, with merged pages, windows and all, and
//! no engine. It looks at every byte that it can know, writes to memory by its own hand, and goes on
//! using it: some for a moment, some until the end of the run, some with children of their own.
//!
//! A child calls nothing that allocates or takes a lock, since a thread that it does not have may have
//! held it. What it found wrong it tells by its exit code and by words that it shares with us.
//!
//! # What a child knows
//! * A page whose claims are the same before the fork and in the child (where they are shared, and
//!   go on), with nobody in it: its bytes are its shadow's.
//! * A sequence page: a moment of its writer's work.
//! * A counter: between what was finished before the fork and what is begun after it.
//! * What it wrote itself.
//!
//! The child of a raw `clone` may have zeroes in the place of pages that were in a window just then
//! (docs/safety.md): that is counted, not refused.

use crate::arena::WHOLE;
use crate::sequences::{COUNTER_PAGES, SEQUENCE_PAGES};
use crate::support;
use crate::support::os::{self, Child, Random, page_size, word_of};
use crate::support::raw;
use crate::world::{HANGS, Me, World};
use pagemerge_linux::Error;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Children that live at the same time, of one forker.
const LIVING: usize = 4;
/// Classes of what children write begin here.
const OWN: u64 = 40_000_000;

/// What a child knows of a page: nothing, its shadow, or (from 2 on) what it wrote itself.
const UNKNOWN: u8 = 0;
const SHADOW: u8 = 1;

/// What a child tells: its failure (what, arena, page, word, seen, right) and its figures.
const WORDS: usize = 16;
const WHAT: usize = 0;
const BYTES: usize = 8;
const ZEROES: usize = 9;
const WROTE: usize = 10;
const GRANDCHILDREN: usize = 11;

const FAILURES: [&str; 8] = [
    "",
    "a page is not as it was at the fork",
    "a sequence page is not a moment of its writer's work",
    "a counter is not between its bounds",
    "what the child wrote is lost",
    "a grandchild failed",
    "the parent's engine works in the child",
    "a page that the child never wrote changed later",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Fork,
    Raw,
}

/// A child as its parent sees it.
struct Living {
    child: Child,
    report: &'static [AtomicU64],
    kind: Kind,
    began: Instant,
    /// When it is to end by itself.
    ends: Instant,
}

impl Living {
    fn tell_to_end(&mut self) {
        self.report[OVER].store(1, Ordering::Relaxed);
        self.ends = self.ends.min(Instant::now());
    }
}

/// What the parent prepares, since a child cannot allocate.
struct Knowledge {
    /// For each page of each arena, its claims before the fork.
    claims: Vec<Vec<u64>>,
    known: Vec<Vec<u8>>,
    sequences: Vec<u64>,
    counters: Vec<u64>,
    /// What the child knows of sequence pages and counters: nothing, or what it wrote.
    shared: Vec<u8>,
    kind: Kind,
    seed: u64,
    report: &'static [AtomicU64],
    depth: u32,
}

impl Knowledge {
    fn note(world: &World) -> (Vec<Vec<u64>>, Vec<u64>, Vec<u64>) {
        let claims = world.arenas.iter();
        let claims =
            claims.map(|arena| (0..arena.pages).map(|page| arena.claims_of(page)).collect());
        let finished =
            |words: &[AtomicU64]| words.iter().map(|w| w.load(Ordering::SeqCst)).collect();
        (
            claims.collect(),
            finished(world.sequences.finished),
            finished(world.counters.finished),
        )
    }

    fn new(world: &World, kind: Kind, seed: u64, report: &'static [AtomicU64]) -> Self {
        let (claims, sequences, counters) = Self::note(world);
        Self {
            known: claims
                .iter()
                .map(|pages| vec![UNKNOWN; pages.len()])
                .collect(),
            claims,
            sequences,
            counters,
            shared: vec![UNKNOWN; SEQUENCE_PAGES + COUNTER_PAGES],
            kind,
            seed,
            report,
            depth: 0,
        }
    }

    fn fail(
        &self,
        what: usize,
        arena: usize,
        page: usize,
        word: usize,
        seen: u64,
        right: u64,
    ) -> i32 {
        let words = [
            what as u64,
            arena as u64,
            page as u64,
            word as u64,
            seen,
            right,
        ];
        for (at, value) in words.into_iter().enumerate() {
            self.report[at].store(value, Ordering::SeqCst);
        }
        10 + i32::try_from(what).unwrap_or(0)
    }

    fn add(&self, word: usize, by: u64) {
        self.report[word].fetch_add(by, Ordering::Relaxed);
    }

    /// The child's life.
    fn live(&mut self, world: &World, life: Duration) -> i32 {
        os::die_with_parent();
        match self.looks(world).and_then(|()| self.uses(world, life)) {
            Ok(()) => 0,
            Err(code) => code,
        }
    }

    /// The first looks, at everything.
    fn looks(&mut self, world: &World) -> Result<(), i32> {
        for (number, arena) in world.arenas.iter().enumerate() {
            for page in 0..arena.pages {
                let before = self.claims[number][page];
                if before & u64::from(WHOLE) == 0 && arena.claims_of(page) == before {
                    self.known[number][page] = SHADOW;
                }
            }
        }
        self.look_at_arenas(world, 1)?;
        for page in 0..SEQUENCE_PAGES {
            let begun = world.sequences.begun[page].load(Ordering::SeqCst);
            let at = world.sequences.at(page);
            let looked = world
                .sequences
                .is_a_moment(page, self.sequences[page], begun);
            if let Err((word, seen)) = looked {
                if self.kind == Kind::Raw && is_zero(at) {
                    self.add(ZEROES, 1);
                } else {
                    return Err(self.fail(2, usize::MAX, page, word, seen, begun));
                }
            }
        }
        for page in 0..COUNTER_PAGES {
            if let Some((word, seen)) = world.counters.wrong(page, self.counters[page]) {
                if self.kind == Kind::Raw && is_zero(world.counters.at(page)) {
                    self.add(ZEROES, 1);
                } else {
                    let begun = world.counters.begun[page].load(Ordering::SeqCst);
                    return Err(self.fail(3, usize::MAX, page, word, seen, begun));
                }
            }
        }
        self.add(
            BYTES,
            ((SEQUENCE_PAGES + COUNTER_PAGES) * page_size()) as u64,
        );
        for lead in &world.engines {
            if !matches!(lead.engine.run(), Err(Error::Forked)) {
                return Err(self.fail(6, usize::MAX, 0, 0, 0, 0));
            }
        }
        Ok(())
    }

    /// Looks at all that is known of the arenas.
    fn look_at_arenas(&mut self, world: &World, what: usize) -> Result<(), i32> {
        let mut bytes = 0;
        for (number, arena) in world.arenas.iter().enumerate() {
            for page in 0..arena.pages {
                let known = self.known[number][page];
                if known == UNKNOWN {
                    continue;
                }
                let (at, shadow) = (arena.at(page), arena.shadow_of(page));
                let wrong = if known == SHADOW {
                    first_difference(at, |index| {
                        raw::word(shadow + index * 8).load(Ordering::Relaxed)
                    })
                } else {
                    first_difference(at, |index| word_of(own(self.seed, known, page), index))
                };
                bytes += page_size() as u64;
                let Some((index, there, right)) = wrong else {
                    continue;
                };
                if known == SHADOW && self.kind == Kind::Raw && what == 1 && is_zero(at) {
                    self.known[number][page] = UNKNOWN;
                    self.add(ZEROES, 1);
                } else if known == SHADOW {
                    return Err(self.fail(what, number, page, index, there, right));
                } else {
                    return Err(self.fail(4, number, page, index, there, right));
                }
            }
        }
        self.add(BYTES, bytes);
        Ok(())
    }

    fn look_at_own(&self, world: &World) -> Result<(), i32> {
        for (at_all, known) in self.shared.iter().enumerate() {
            if *known == UNKNOWN {
                continue;
            }
            let (at, page) = shared_page(world, at_all);
            let right = |index| word_of(own(self.seed, *known, at_all), index);
            if let Some((word, seen, right)) = first_difference(at, right) {
                return Err(self.fail(4, usize::MAX, page, word, seen, right));
            }
        }
        Ok(())
    }

    /// Writes, waits, looks, until the end of its life.
    fn uses(&mut self, world: &World, life: Duration) -> Result<(), i32> {
        let begun = Instant::now();
        let mut random = Random::new(self.seed);
        let mut round = 2;
        // Most pages are written at once, the others show what the parent merged as long as we live.
        self.write(world, &mut random, round, 85);
        loop {
            self.look_at_arenas(world, 7)?;
            self.look_at_own(world)?;
            if begun.elapsed() >= life || world_is_over(self.report) {
                return Ok(());
            }
            if self.depth == 0 && random.below(4) == 0 {
                self.have_a_child(world, &mut random)?;
            }
            let pause = Duration::from_millis(1 + random.below(120) as u64);
            std::thread::sleep(pause.min(life));
            round = if round == 200 { 2 } else { round + 1 };
            let per_cent = [0, 1, 10][random.below(3)];
            self.write(world, &mut random, round, per_cent);
        }
    }

    /// Writes to a part of all that it may touch. A page is known to be mapped and writable if it was
    /// nobody's at the fork.
    fn write(&mut self, world: &World, random: &mut Random, round: u8, per_cent: usize) {
        let mut wrote = 0;
        for (number, arena) in world.arenas.iter().enumerate() {
            for page in 0..arena.pages {
                if self.known[number][page] != UNKNOWN && random.below(100) < per_cent {
                    fill(arena.at(page), own(self.seed, round, page));
                    self.known[number][page] = round;
                    wrote += 1;
                }
            }
        }
        for at_all in 0..self.shared.len() {
            if random.below(100) < per_cent {
                let (at, _) = shared_page(world, at_all);
                fill(at, own(self.seed, round, at_all));
                self.shared[at_all] = round;
                wrote += 1;
            }
        }
        self.add(WROTE, wrote);
    }

    /// A grandchild of the process under test sees what its parent knows, and writes it too.
    fn have_a_child(&mut self, world: &World, random: &mut Random) -> Result<(), i32> {
        // `fork()` takes the allocator's locks, which a thread that a raw child lacks may have held.
        let raw_one = self.kind == Kind::Raw || random.below(2) == 0;
        self.depth = 1;
        let life = Duration::from_millis(random.below(60) as u64);
        let seed = random.next();
        let body = || {
            os::die_with_parent();
            let looked = self
                .look_at_arenas(world, 1)
                .and_then(|()| self.look_at_own(world));
            // What was written so far was written with another seed: it is known no more.
            let mut random = Random::new(seed);
            std::thread::sleep(life);
            let again = looked.and_then(|()| self.look_at_arenas(world, 7));
            self.write(world, &mut random, 201, 50);
            match again
                .and_then(|()| self.look_at_arenas(world, 7))
                .and_then(|()| self.look_at_own(world))
            {
                Ok(()) => 0,
                Err(code) => code,
            }
        };
        let code = if raw_one {
            os::raw_fork(body)
        } else {
            os::fork(body)
        }
        .wait();
        self.depth = 0;
        self.add(GRANDCHILDREN, 1);
        if code == 0 {
            return Ok(());
        }
        if self.report[WHAT].load(Ordering::SeqCst) == 0 {
            self.fail(5, usize::MAX, 0, 0, u64::from(code.unsigned_abs()), 0);
        }
        Err(15)
    }
}

/// The parent's word that the run is over; children share it.
const OVER: usize = 15;

fn world_is_over(report: &[AtomicU64]) -> bool {
    report[OVER].load(Ordering::Relaxed) != 0
}

/// Class of what the child of `seed` writes to a page in a round.
fn own(seed: u64, round: u8, page: usize) -> u64 {
    OWN + (seed % 1000) * 1000 + u64::from(round) * 4 + page as u64 % 4
}

fn shared_page(world: &World, at_all: usize) -> (usize, usize) {
    match at_all.checked_sub(SEQUENCE_PAGES) {
        None => (world.sequences.at(at_all), at_all),
        Some(page) => (world.counters.at(page), page),
    }
}

fn fill(at: usize, class: u64) {
    for index in 0..page_size() / 8 {
        raw::word(at + index * 8).store(word_of(class, index), Ordering::Relaxed);
    }
}

fn is_zero(at: usize) -> bool {
    first_difference(at, |_| 0).is_none()
}

fn first_difference(at: usize, right: impl Fn(usize) -> u64) -> Option<(usize, u64, u64)> {
    (0..page_size() / 8)
        .map(|index| {
            (
                index,
                raw::word(at + index * 8).load(Ordering::Relaxed),
                right(index),
            )
        })
        .find(|(_, seen, right)| seen != right)
}

/// Takes the end of a child, if it has ended.
fn reap(me: &mut Me, living: &Living) -> bool {
    let Some(code) = raw::try_wait(&living.child) else {
        let too_long = Instant::now() > living.ends + HANGS;
        if too_long {
            let where_it_is = support::threads_of(u32::try_from(living.child.id()).unwrap_or(0));
            me.fail(usize::MAX, 0, &format!("a child hangs\n{where_it_is}"));
        }
        return false;
    };
    let read = |word: usize| living.report[word].load(Ordering::SeqCst);
    if code != 0 {
        let what = FAILURES
            .get(usize::try_from(read(WHAT)).unwrap_or(0))
            .copied()
            .unwrap_or("");
        let arena = usize::try_from(read(1)).unwrap_or(usize::MAX);
        let page = usize::try_from(read(2)).unwrap_or(0);
        me.fail(arena, page, &format!(
            "a child ({:?}, {:?} old) ended with {code}: {what}: page {page} word {} was {:x}, right is {:x}",
            living.kind, living.began.elapsed(), read(3), read(4), read(5),
        ));
    }
    me.count(
        if living.kind == Kind::Raw {
            "raw clones survived"
        } else {
            "forks survived"
        },
        1,
    );
    me.count("children: bytes verified", read(BYTES));
    me.count("children: pages written", read(WROTE));
    me.count("children: grandchildren", read(GRANDCHILDREN));
    me.count("raw clones: zeroes of a window (documented)", read(ZEROES));
    true
}

/// Forks, as the C library does it or by a raw system call.
pub(crate) fn forks(me: &mut Me, raw_ones: bool) {
    let kind = if raw_ones { Kind::Raw } else { Kind::Fork };
    let reports = raw::shared_words(WORDS * (LIVING + 1));
    let mut living: Vec<(usize, Living)> = Vec::new();
    while !me.is_over() {
        // Now and then all of them die out, so that what forks kept from merging merges again.
        let calm = me.world.began.elapsed().as_secs() % 8 >= 4;
        if !calm && living.len() <= LIVING {
            let slot = (0..=LIVING).find(|slot| living.iter().all(|(used, _)| used != slot));
            let slot = slot.expect("fewer live than there are slots");
            let report = &reports[slot * WORDS..(slot + 1) * WORDS];
            for word in report {
                word.store(0, Ordering::SeqCst);
            }
            let life = match me.random.below(20) {
                0 => Duration::from_secs(3600),
                1..=3 => Duration::from_millis(me.random.below(2000) as u64),
                _ => Duration::from_millis(me.random.below(30) as u64),
            };
            let world = me.world;
            me.begin("fork", usize::MAX, 0, 0, life.as_millis() as u64);
            let began = Instant::now();
            let mut knowledge = Knowledge::new(world, kind, me.random.next(), report);
            let child = if raw_ones {
                os::raw_fork(|| knowledge.live(world, life))
            } else {
                os::fork(|| knowledge.live(world, life))
            };
            me.most("longest fork, us", began.elapsed().as_micros() as u64);
            living.push((
                slot,
                Living {
                    child,
                    report,
                    kind,
                    began,
                    ends: began + life,
                },
            ));
        }
        let young = living
            .iter()
            .position(|(_, one)| one.ends > Instant::now() + Duration::from_secs(60));
        if let Some(at) = young
            && (calm && me.chance(3) || living.len() > LIVING)
        {
            living[at].1.tell_to_end();
        }
        living.retain(|(_, one)| !reap(me, one));
        me.pause(60_000);
    }
    for (_, one) in &mut living {
        one.tell_to_end();
    }
    me.begin("last children", usize::MAX, 0, 0, 0);
    while !living.is_empty() {
        living.retain(|(_, one)| !reap(me, one));
        std::thread::sleep(Duration::from_millis(2));
    }
}
