//! Memory that merges by construction.
//!
//! The engine finds pages that happen to be equal. What is here decides where bytes lie, so that equal
//! values become equal pages (`allocator`), or sees them on the way in, so that they are held once
//! from the start (`store`).
//!
//! No system call and no `unsafe` is in this crate: both stand on what `pagemerge_linux` offers.
#![forbid(unsafe_code)]

pub mod allocator;
pub mod store;

pub use store::{Blob, Store, StoreStats, Window};
