//! What can happen in a simulated run, one value for each happening.
//!
//! An event carries everything it needs: its own seed for whatever goes wrong during it, and numbers
//! that are taken modulo whatever exists when it is carried out. So any event can be left out and the
//! rest is still a valid run, and what the rest does changes as little as possible. That is what makes
//! a failing run shrink.

use crate::fault::{Action, Condition, Faults};
use crate::rng::Rng;
use pagemerge_core::{Reason, RunMode};

/// One happening.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Decides what goes wrong meanwhile, and every choice within the event.
    pub seed: u64,
    /// What happens.
    pub op: Op,
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// The program does something to a page, while the scanner is at rest.
    Act {
        /// Which page.
        page: u32,
        /// What.
        action: Action,
    },
    /// The program writes a run of pages, with contents of the palette.
    Fill {
        /// The first page.
        page: u32,
        /// How many.
        pages: u8,
        /// The first content.
        value: u8,
        /// How much the content's number grows from page to page.
        stride: u8,
    },
    /// The program does something later, in the middle of whatever goes on then.
    Race {
        /// Points until then.
        points: u32,
        /// Which page.
        page: u32,
        /// What.
        action: Action,
    },
    /// One step of the scan.
    Step {
        /// At most so many pages.
        budget: u32,
    },
    /// Steps until a full scan is done.
    Pass,
    /// A region is registered.
    Register {
        /// Its pages.
        pages: u32,
        /// Its domain.
        domain: u8,
    },
    /// A region is un-merged and let go.
    Unregister {
        /// Which.
        region: u32,
    },
    /// A region that was let go comes back.
    Revive {
        /// Which.
        region: u32,
    },
    /// A region's memory is freed.
    Forget {
        /// Which.
        region: u32,
    },
    /// A run of pages is discarded.
    Discard {
        /// The first page.
        page: u32,
        /// How many.
        pages: u8,
        /// Whether the scanner is told.
        tell: bool,
    },
    /// The frames that a run of pages shows are taken apart, and one that there is not.
    Dissolve {
        /// The first page.
        page: u32,
        /// How many.
        pages: u8,
    },
    /// Settings are changed; the event's seed says which and how.
    Settings,
    /// `run` is written.
    Run(RunMode),
    /// The zero-page counter is made current.
    Refresh,
    /// Time passes.
    Wait {
        /// So long.
        millisecs: u32,
    },
    /// From now on things go wrong like this.
    Faults(Faults),
    /// All faults end and the scan runs until nothing changes any more. Then the counters must be
    /// what the contents say.
    Settle,
}

/// How often each kind of event is drawn, and from what values: a temper for one seed.
#[derive(Clone, Debug)]
pub struct Temper {
    weights: [u32; KINDS],
    /// How many contents the program uses.
    contents: u8,
    /// Domains in use.
    domains: u8,
    /// Pages of a new region, at most.
    region_pages: u32,
    /// Pages of all regions together, at most.
    pub(crate) all_pages: u32,
    /// Points within which a race is armed.
    race_points: u32,
    /// Reasons that pages have for being left alone.
    conditions: bool,
    faults: bool,
    /// Events in a run.
    pub(crate) events: usize,
}

const KINDS: usize = 17;

/// What a run is mostly about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// Writers get in between; nothing fails.
    Races,
    /// Requests are refused and the space fails, too.
    Faults,
}

impl Temper {
    /// A temper drawn from `rng`.
    #[must_use]
    pub fn draw(flavour: Flavour, rng: &mut Rng) -> Self {
        //  Act Fill Race Step Pass Reg Unreg Revive Forget Discard Sett Run Refresh Wait Faults Dissolve Settle
        let usual = [12, 8, 12, 16, 6, 2, 1, 1, 1, 3, 2, 1, 1, 2, 2, 1, 1];
        let mut weights = usual;
        for weight in &mut weights {
            *weight = match rng.below(6) {
                0 => 0,
                1 => *weight * 4,
                _ => *weight,
            };
        }
        // A run without writes, steps, or regions proves nothing.
        for needed in [0, 3, 5] {
            weights[needed] = weights[needed].max(2);
        }
        if flavour == Flavour::Races {
            weights[2] = weights[2].max(6);
            weights[14] = 0;
        }
        // Some runs have windows and batches that do not fit into one call.
        let large = rng.below(10) == 0;
        Self {
            weights,
            contents: rng.pick(&[2, 4, 6, 9, 15]),
            domains: rng.pick(&[1, 1, 2, 3]),
            region_pages: if large {
                1300
            } else {
                rng.pick(&[3, 8, 24, 40])
            },
            all_pages: if large { 2400 } else { 120 },
            race_points: rng.pick(&[4, 30, 200]),
            conditions: rng.below(2) == 0,
            faults: flavour == Flavour::Faults,
            events: if large {
                25
            } else {
                rng.pick(&[20_usize, 60, 120])
            },
        }
    }

    /// The next event.
    pub fn event(&self, rng: &mut Rng) -> Event {
        let total: u32 = self.weights.iter().sum();
        let mut left = rng.below(total);
        let mut kind = 0;
        while left >= self.weights[kind] {
            left -= self.weights[kind];
            kind += 1;
        }
        Event {
            seed: rng.bits(),
            op: self.op(kind, rng),
        }
    }

    fn op(&self, kind: usize, rng: &mut Rng) -> Op {
        let page = rng.below(1 << 16);
        let region = rng.below(1 << 8);
        let byte = |rng: &mut Rng, end: u32| {
            u8::try_from(rng.below(end)).expect("no more than 256 values were asked for")
        };
        match kind {
            0 => Op::Act {
                page,
                action: self.action(rng),
            },
            1 => Op::Fill {
                page,
                pages: byte(rng, 32),
                value: byte(rng, self.contents.into()),
                stride: byte(rng, 3),
            },
            2 => Op::Race {
                points: rng.below(self.race_points),
                page,
                action: self.action(rng),
            },
            3 => {
                let budget = rng.pick(&[1, 2, 7, 30, 512, 100_000]);
                Op::Step {
                    budget: budget + rng.below(2),
                }
            }
            4 => Op::Pass,
            5 => Op::Register {
                pages: 1 + rng.below(self.region_pages),
                domain: byte(rng, self.domains.into()),
            },
            6 => Op::Unregister { region },
            7 => Op::Revive { region },
            8 => Op::Forget { region },
            9 => Op::Discard {
                page,
                pages: 1 + byte(rng, 12),
                tell: rng.below(2) == 0,
            },
            10 => Op::Settings,
            11 => Op::Run(rng.pick(&[
                RunMode::Stop,
                RunMode::Merge,
                RunMode::Merge,
                RunMode::Unmerge,
            ])),
            12 => Op::Refresh,
            13 => Op::Wait {
                millisecs: rng.pick(&[1, 500, 1999, 2000, 60_000]),
            },
            14 => Op::Faults(self.draw_faults(rng)),
            15 => Op::Dissolve {
                page,
                pages: 1 + byte(rng, 4),
            },
            _ => Op::Settle,
        }
    }

    fn action(&self, rng: &mut Rng) -> Action {
        let end = u32::from(self.contents);
        match rng.below(if self.conditions { 16 } else { 12 }) {
            0..=4 => Action::Write(u8::try_from(rng.below(end)).expect("contents is a u8")),
            5 | 6 => Action::Poke {
                at: rng.pick(&[0, 0, 31, 63]),
                byte: rng.pick(&[0, 1, 2]),
            },
            7 | 8 => Action::Rewrite,
            9 | 10 => Action::Discard,
            11 => Action::Touch,
            12 | 13 => Action::Become(Condition::Fine),
            14 => Action::Become(Condition::Swapped),
            _ => {
                let reason = rng.pick(&[
                    Reason::Pinned,
                    Reason::SharedByFork,
                    Reason::Mlocked,
                    Reason::DontDump,
                    Reason::NetworkDirectIo,
                ]);
                Action::Become(if rng.below(2) == 0 {
                    Condition::Ineligible(reason)
                } else {
                    Condition::Refusing(reason)
                })
            }
        }
    }

    fn draw_faults(&self, rng: &mut Rng) -> Faults {
        let mut level = |often: &[u8]| {
            if rng.below(3) == 0 {
                rng.pick(often)
            } else {
                0
            }
        };
        let faults = Faults {
            promote: level(&[10, 80, 200]),
            share: level(&[10, 80, 200]),
            partner: level(&[30, 128, 255]),
            zero: level(&[30, 128]),
            unshare: level(&[10, 128]),
            race: level(&[10, 80]),
            look: level(&[5, 60]),
            spurious: level(&[20, 128]),
            apply_error: level(&[3, 20]),
            look_error: level(&[2, 10]),
            release_error: level(&[20, 100]),
        };
        if self.faults {
            faults
        } else {
            Faults::default()
        }
    }
}
