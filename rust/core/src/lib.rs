//! The complete algorithm of ksmd, Linux's kernel samepage merging, over abstract memory.
//!
//! # A tour
//! A program registers regions of memory with a [`Scanner`] and calls [`Scanner::step`] again and
//! again. Each step looks at some pages, finds those with equal bytes, and asks the memory side, a
//! [`PageSpace`], to let them share one *frame*: one immutable copy, which the first write parts a
//! page from again.
//!
//! * [`mod@space`] is the door to memory. This crate never sees a byte, a clock or a thread.
//! * `rmap` holds what is remembered about each page, 20 bytes at most.
//! * `stable_tree` knows the frames, by content; `unstable_tree` the pages that may have a twin.
//! * `scan` goes over the pages; its `cmp_and_merge_page` is the heart of it all.
//! * `attach` is the book-keeping of who shares what; `unmerge` is the way back.
//! * `smart_scan` and `advisor` decide how much work is worth while.
//! * [`check`] walks everything and proves what the module headers promise.
//!
//! # The life of a page
//! Looked at for the first time, a page gets a record and is *volatile*. When it has not changed by
//! the next look, it is looked up among the frames (then it shares one), else among the candidates
//! (then the two make a frame), else it becomes a candidate itself, *unshared*. A write to a shared
//! page makes the kernel give it its own copy; the next look finds out and the page starts afresh.

#![forbid(unsafe_code)]

#[cfg(test)]
extern crate self as pagemerge_core;

mod advisor;
mod attach;
pub mod check;
mod forest;
mod id;
pub mod rbtree;
mod regions;
mod rmap;
mod scan;
mod scanner;
mod settings;
mod smart_scan;
pub mod space;
mod stable_tree;
mod stats;
mod trace;
mod unmerge;
mod unstable_tree;

#[cfg(test)]
#[path = "../tests/support/toy.rs"]
mod toy;

pub use id::{Clock, FrameId, Nid, PageId, RegionId, Tick};
pub use scanner::{
    ChangeError, RegisterError, Registered, RunMode, Scanner, StepReport, UnmergeError,
    UnregisterError,
};
pub use settings::{AdvisorMode, SettingError, Settings, TreeOrder};
pub use space::{
    Attempt, Content, Digest, Look, PageSpace, PageState, Reason, Request, Window, Written,
};
pub use stats::{RegionStats, Stats, Work};
pub use trace::{Event, TraceSink};
