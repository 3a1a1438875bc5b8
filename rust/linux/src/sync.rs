//! The atomics of [`crate::handoff`]. Its loom test has a module of the same name with loom's.

pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
