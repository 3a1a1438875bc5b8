//! Simulated memory for the pagemerge algorithm, and the proof that a merge is invisible.
//!
//! # A tour
//! * [`space`] is memory made of vectors: the second implementation of
//!   [`PageSpace`](pagemerge_core::PageSpace). It panics when the scanner breaks its side of the
//!   contract.
//! * [`fault`] is what can go wrong: conditions of pages, refusals, lost races, failures.
//! * [`event`] is what can happen, and how often; [`world`] makes it happen and says what must hold.
//! * [`model`] says what the counters must be once nothing changes any more.
//! * [`run`] runs many seeds, and shrinks a failure to the shortest list of events that still fails.
//!
//! # Use
//! ```
//! use pagemerge_sim::{Flavour, run_seeds};
//! let seen = run_seeds(Flavour::Races, 0..3, |world| {
//!     world.random_event();
//!     world.verify();
//! });
//! assert!(seen.passes > 0);
//! ```
//! A failure prints its seed; `PAGEMERGE_SIM_SEED=n cargo test -p pagemerge-sim replay` runs that one
//! again. `PAGEMERGE_SIM_SEEDS=0..100000` makes the tests run other seeds than their own.

#![forbid(unsafe_code)]

pub mod content;
pub mod event;
pub mod fault;
pub mod model;
pub mod rng;
pub mod run;
pub mod space;
pub mod world;

pub use event::{Event, Flavour, Op};
pub use fault::{Action, Condition, Faults, Remerge, SimError};
pub use run::{asked_seed, run_seeds, seeds_or};
pub use space::{Habits, SimSpace};
pub use world::{Coverage, World};
