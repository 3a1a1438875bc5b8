//! What can go wrong, in words that say what was attempted, on what, why, and what to do.
//!
//! A lost race or a page that must be left alone is never an error: it is an outcome, counted by
//! [`Reason`]. An error leaves everything as it was, unless its text says otherwise.

use crate::accounting::Bound;
use crate::settings::Barrier;
use pagemerge_core::{Reason, SettingError};
use std::io;

/// Every error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting is out of its range, or cannot be changed at the moment.
    #[error(transparent)]
    Setting(#[from] SettingError),
    /// The buffer holds no whole page.
    #[error(
        "cannot register {bytes} bytes: no whole page of {page_size} bytes lies inside them; \
         register a buffer of at least {} bytes", 2 * page_size
    )]
    TooSmall {
        /// Bytes in the buffer.
        bytes: usize,
        /// Bytes in a page.
        page_size: usize,
    },
    /// The memory is not of the kind that can be merged.
    #[error("cannot register {pages} pages: {refused} of them are {reason} memory; {advice}")]
    NotMergeable {
        /// Whole pages in the buffer.
        pages: usize,
        /// How many of them cannot be merged for this reason.
        refused: usize,
        /// Why.
        reason: Reason,
        /// What to do about it.
        advice: &'static str,
    },
    /// The memory is registered already, as a whole or in part.
    #[error(
        "cannot register this buffer: {pages} of its pages belong to a registered region \
         already; unregister that first"
    )]
    Overlaps {
        /// How many pages are registered already.
        pages: usize,
    },
    /// The memory is an allocator's, which has registered it itself.
    #[error(
        "cannot register this buffer: {pages} of its pages are an allocator's or a store's, and registered \
         with its engine already; merge them there: allocator.engine.settle(), or start()"
    )]
    InArena {
        /// How many pages are in arenas.
        pages: usize,
    },
    /// The region is not registered with this engine (any more).
    #[error("this region is not registered with this engine any more")]
    NotRegistered,
    /// A range given to `discard` does not lie in a registered region.
    #[error("cannot discard {bytes} bytes: they hold pages that no region of this engine has")]
    NotInRegion {
        /// Bytes in the range.
        bytes: usize,
    },
    /// A range given to `exclude` does not lie in the buffer that was registered.
    #[error(
        "cannot exclude {bytes} bytes: not all of them lie in the buffer that was registered; give a \
         part of that buffer itself"
    )]
    NotInBuffer {
        /// Bytes in the range.
        bytes: usize,
    },
    /// Pages could not be given their own copies, so none of the range is excluded.
    #[error(
        "cannot exclude these bytes: {pages} of their pages stay merged ({reason}), and none is \
         excluded; free memory or lift the restriction, then try again"
    )]
    Exclude {
        /// How many pages stay merged.
        pages: u64,
        /// Why the last of them was refused.
        reason: Reason,
    },
    /// The engine has been closed.
    #[error("this engine has been closed; make a new one")]
    Closed,
    /// The engine belongs to the parent process.
    #[error(
        "this engine belongs to the parent process: after a fork its memory stays merged and \
         readable in the child, but only the parent can use the engine; make a new one here"
    )]
    Forked,
    /// The caller asked to stop between two batches. What was merged so far stays merged.
    #[error("interrupted between two batches; what was merged so far stays merged")]
    Interrupted,
    /// The barrier that was asked for cannot be had here.
    #[error("barrier \"{wanted}\" is not available: {why}")]
    NoBarrier {
        /// The barrier.
        wanted: Barrier,
        /// Why, and what to do.
        why: String,
    },
    /// The background thread needs a barrier.
    #[error(
        "cannot merge in the background without a barrier: nothing would keep a page still while \
         it is merged ({why}); call merge() or scan() while nobody writes, or make userfaultfd \
         available"
    )]
    NeedsBarrier {
        /// Why there is none.
        why: String,
    },
    /// Memory that any thread may write at any time is not merged without a barrier.
    #[error(
        "an allocator's memory is not merged without a barrier: whatever computes writes to it, and \
         nothing would keep a page still while it is merged ({why})"
    )]
    ArenaNeedsBarrier {
        /// Why there is none.
        why: String,
    },
    /// Pages could not be given their own copies back. They stay merged and the region stays
    /// registered.
    #[error(
        "cannot un-merge: {pages} pages stay merged ({reason}) and the region stays registered; \
         free memory or lift the restriction, then try again"
    )]
    Unmerge {
        /// How many pages stay merged.
        pages: u64,
        /// Why the last of them was refused.
        reason: Reason,
    },
    /// There is not memory enough for the copies, seen before the first was made: everything stays
    /// merged and registered.
    #[error(
        "cannot un-merge: copies of {pages} pages need {needed} bytes, and {bound} leaves \
         {available}; nothing was changed: free memory or raise the limit, then try again"
    )]
    UnmergeMemory {
        /// How many pages are merged, zero pages included.
        pages: u64,
        /// Bytes that their copies need, with what making them takes.
        needed: u64,
        /// Bytes that can be had.
        available: u64,
        /// What bounds them.
        bound: Bound,
    },
    /// A limit of this process makes frames impossible.
    #[error("cannot make frames: {0}")]
    Limit(String),
    /// The kernel refused a call that everything depends on.
    #[error("{attempted}: {source}")]
    Os {
        /// What was attempted, on what.
        attempted: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The merging thread ended unexpectedly: a bug in this library. Merged memory stays readable.
    #[error("the merging thread has ended unexpectedly ({0}); merged memory stays readable")]
    Worker(String),
}

impl Error {
    /// There is no memory for our own records: nothing was done, and nothing is broken.
    pub(crate) fn no_memory(what: &str) -> Self {
        Self::os(
            format!("cannot {what}: no memory for the engine's own records; nothing was changed"),
            io::Error::from_raw_os_error(libc::ENOMEM),
        )
    }

    pub(crate) fn os(attempted: impl Into<String>, source: io::Error) -> Self {
        Self::Os {
            attempted: attempted.into(),
            source,
        }
    }
}
