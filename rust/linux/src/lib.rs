//! Live memory for pagemerge: the merging thread, windows, frames, and an [`Engine`] over them.
//!
//! The algorithm is in `pagemerge-core` and has never seen a byte. This crate is its memory: it
//! observes pages, hashes them, and merges them so that no thread of the program, no system call
//! and no device ever sees a difference.
//!
//! # The rooms
//! * `engine`: what callers hold. Every call that touches memory becomes a job of
//! * `worker`: the one merging thread of the process, with a descriptor table of its own.
//! * `arena`: memory of our own, registered from its first byte to its last, for allocators.
//! * `space`: the algorithm's door to memory: observes pages, and carries out requests in
//! * `window`: the short time in which pages are held still, compared and mapped over.
//! * `restore`: un-merging, back into anonymous memory.
//! * `frames`: where frames lie in their memfds, and when a place may be punched.
//! * `watch`: write-protection of pages that were written after merging, and the helper thread.
//! * `extent`: memory that is lent to whoever keeps bytes of its own.
//! * `fork`: what a fork ends.
//! * `handoff`: how threads wait for each other, apart from what they do.
//! * `sys`: every system call, and all `unsafe` but the promise in [`Engine::register`].

pub mod accounting;
mod arena;
mod ballast;
mod barrier;
mod bitmap;
mod eligible;
mod engine;
mod error;
pub mod evaluate;
mod extent;
mod fork;
mod frames;
#[cfg(feature = "fuzz")]
#[doc(hidden)]
pub mod fuzzing;
mod handoff;
mod hash;
mod mappings;
mod probe;
mod restore;
mod settings;
mod space;
mod survey;
mod sync;
mod sys;
mod watch;
mod window;
mod worker;

pub use arena::{Arena, Run};
pub use engine::{Engine, EngineStats, RegionHandle};
pub use error::Error;
pub use extent::{Digester, Extent, Hashing, Segment};
pub use fork::{ForkGuard, ForkLock, generation as fork_generation};
#[doc(hidden)]
pub use hash::digest_all;
#[cfg(feature = "inject")]
#[doc(hidden)]
pub use hash::known;
pub use pagemerge_core as core;
#[cfg(feature = "inject")]
#[doc(hidden)]
pub use probe::probe_again;
pub use probe::{Capabilities, capabilities};
pub use settings::{Barrier, EngineSettings, Remerge};
#[cfg(feature = "inject")]
#[doc(hidden)]
pub use sys::inject;
pub use sys::kept::Source;

/// Bytes in a page of this machine.
#[must_use]
pub fn page_size() -> usize {
    sys::page_size()
}
