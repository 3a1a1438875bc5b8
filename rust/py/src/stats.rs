//! `pagemerge.Stats` and `pagemerge.RegionStats`: counters as attributes and as a mapping.
//!
//! Counters are signed here, so that the difference of two readings needs no other type.

use crate::settings::enumeration;
use pagemerge_core::Reason;
use pagemerge_linux::EngineStats;
use pyo3::exceptions::{PyKeyError, PyOSError};
use pyo3::prelude::*;
use pyo3::types::PyList;
use std::collections::BTreeMap;

fn signed(counter: impl TryInto<i64>) -> i64 {
    counter.try_into().unwrap_or(i64::MAX)
}

/// A class of counters with the behaviour of a read-only mapping.
macro_rules! counters {
    (
        $(#[$meta:meta])* $class:ident
        counters { $($counter:ident),* $(,)? }
        others { $($other:ident: $kind:ty),* $(,)? }
    ) => {
        $(#[$meta])*
        #[pyclass(module = "pagemerge", frozen, get_all, eq, mapping)]
        #[derive(Clone, PartialEq)]
        pub(crate) struct $class {
            $($counter: i64,)*
            $($other: $kind,)*
        }

        #[pymethods]
        impl $class {
            fn keys<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
                PyList::new(py, [$(stringify!($counter),)* $(stringify!($other),)*])
            }

            fn __len__(&self) -> usize {
                [$(stringify!($counter),)* $(stringify!($other),)*].len()
            }

            fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
                Ok(self.keys(py)?.try_iter()?.into_any())
            }

            fn __contains__(&self, name: &str) -> bool {
                [$(stringify!($counter),)* $(stringify!($other),)*].contains(&name)
            }

            fn __getitem__<'py>(slf: &Bound<'py, Self>, name: &str) -> PyResult<Bound<'py, PyAny>> {
                if slf.get().__contains__(name) {
                    slf.getattr(name)
                } else {
                    Err(PyKeyError::new_err(name.to_owned()))
                }
            }

            fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
                let mut items = Vec::new();
                for name in slf.get().keys(slf.py())? {
                    let value = slf.getattr(name.extract::<&str>()?)?;
                    items.push(format!("{name}={}", value.repr()?));
                }
                Ok(format!(concat!(stringify!($class), "({})"), items.join(", ")))
            }

            /// What has changed from `earlier` to this reading.
            fn __sub__(&self, earlier: &Self) -> Self {
                Self {
                    $($counter: self.$counter - earlier.$counter,)*
                    $($other: Difference::since(&self.$other, &earlier.$other),)*
                }
            }
        }
    };
}

/// What becomes of a field that is not a plain counter when readings are subtracted.
trait Difference {
    fn since(&self, earlier: &Self) -> Self;
}

macro_rules! later_reading {
    ($($kind:ty),*) => {$(
        /// No number: the later reading stands.
        impl Difference for $kind {
            fn since(&self, _earlier: &Self) -> Self {
                self.clone()
            }
        }
    )*};
}

later_reading!(bool, Option<String>, Name);

impl Difference for BTreeMap<String, i64> {
    fn since(&self, earlier: &Self) -> Self {
        let mut changed = self.clone();
        for (name, count) in earlier {
            *changed.entry(name.clone()).or_default() -= count;
        }
        changed.retain(|_, count| *count != 0);
        changed
    }
}

/// A member of one of the package's enumerations, by class and value.
#[derive(Clone, PartialEq)]
pub(crate) struct Name(&'static str, &'static str);

impl<'py> IntoPyObject<'py> for Name {
    type Target = PyAny;
    type Output = Bound<'py, PyAny>;
    type Error = PyErr;

    fn into_pyobject(self, py: Python<'py>) -> PyResult<Self::Output> {
        Ok(enumeration(py, self.0, self.1)?.into_bound(py))
    }
}

counters! {
    /// An engine's counters at one moment. See the type stub for user documentation.
    Stats
    counters {
        pages_shared, pages_sharing, pages_unshared, pages_volatile, pages_scanned, pages_skipped,
        full_scans, stable_node_chains, stable_node_dups, ksm_zero_pages, general_profit,
        pages_to_scan, rmap_items, pages_merged, cow_broken, regions, frames, frames_bytes,
        generations, mappings, mapping_budget, windows, lost_races, metadata_bytes, cpu_nanos,
    }
    others {
        barrier: Name,
        write_tracking: bool,
        background: bool,
        skipped: BTreeMap<String, i64>,
        last_error: Option<String>,
    }
}

impl From<EngineStats> for Stats {
    fn from(stats: EngineStats) -> Self {
        let core = stats.core;
        Self {
            pages_shared: signed(core.pages_shared),
            pages_sharing: signed(core.pages_sharing),
            pages_unshared: signed(core.pages_unshared),
            pages_volatile: signed(core.pages_volatile),
            pages_scanned: signed(core.pages_scanned),
            pages_skipped: signed(core.pages_skipped),
            full_scans: signed(core.full_scans),
            stable_node_chains: signed(core.stable_node_chains),
            stable_node_dups: signed(core.stable_node_dups),
            ksm_zero_pages: signed(core.ksm_zero_pages),
            general_profit: core.general_profit,
            pages_to_scan: signed(stats.pages_to_scan),
            rmap_items: signed(core.rmap_items),
            pages_merged: signed(core.pages_merged),
            cow_broken: signed(core.cow_broken),
            regions: signed(core.regions),
            frames: signed(stats.space.frames),
            frames_bytes: signed(stats.space.frames_bytes),
            generations: signed(stats.space.generations),
            mappings: signed(stats.space.mappings),
            mapping_budget: signed(stats.space.mapping_budget),
            windows: signed(stats.space.windows),
            lost_races: signed(stats.space.lost_races),
            metadata_bytes: signed(stats.metadata_bytes),
            cpu_nanos: signed(stats.cpu_nanos),
            barrier: Name("Barrier", stats.barrier.name()),
            write_tracking: stats.write_tracking,
            background: stats.run == pagemerge_core::RunMode::Merge,
            skipped: Reason::ALL
                .iter()
                .zip(core.skipped)
                .filter(|(_, pages)| *pages != 0)
                .map(|(reason, pages)| (reason.name().to_owned(), signed(pages)))
                .collect(),
            last_error: stats.last_error,
        }
    }
}

counters! {
    /// A region's counters at one moment. See the type stub for user documentation.
    RegionStats
    counters { ksm_rmap_items, ksm_zero_pages, ksm_merging_pages, ksm_process_profit }
    others { ksm_merge_any: bool, ksm_mergeable: bool }
}

impl From<pagemerge_core::RegionStats> for RegionStats {
    fn from(stats: pagemerge_core::RegionStats) -> Self {
        Self {
            ksm_rmap_items: signed(stats.ksm_rmap_items),
            ksm_zero_pages: signed(stats.ksm_zero_pages),
            ksm_merging_pages: signed(stats.ksm_merging_pages),
            ksm_process_profit: stats.ksm_process_profit,
            ksm_merge_any: stats.ksm_merge_any,
            ksm_mergeable: stats.ksm_mergeable,
        }
    }
}

counters! {
    /// An allocator's counters at one moment. See the type stub for user documentation.
    AllocatorStats
    counters { allocations, live_bytes, held_bytes, reserved_bytes, metadata_bytes, arenas }
    others { not_merging: Option<String> }
}

impl From<pagemerge_alloc::allocator::AllocatorStats> for AllocatorStats {
    fn from(stats: pagemerge_alloc::allocator::AllocatorStats) -> Self {
        Self {
            allocations: signed(stats.allocations),
            live_bytes: signed(stats.live_bytes),
            held_bytes: signed(stats.held_bytes),
            reserved_bytes: signed(stats.reserved_bytes),
            metadata_bytes: signed(stats.metadata_bytes),
            arenas: signed(stats.arenas),
            not_merging: stats.not_merging,
        }
    }
}

counters! {
    /// What a store holds at one moment. See the type stub for user documentation.
    StoreStats
    counters {
        logical_bytes, unique_bytes, metadata_bytes, spare_bytes, entries, blobs, pages, put_bytes,
        puts, hits, copied_bytes,
    }
    others {}
}

impl From<pagemerge_alloc::StoreStats> for StoreStats {
    fn from(stats: pagemerge_alloc::StoreStats) -> Self {
        Self {
            logical_bytes: signed(stats.logical_bytes),
            unique_bytes: signed(stats.unique_bytes),
            metadata_bytes: signed(stats.metadata_bytes),
            spare_bytes: signed(stats.spare_bytes),
            entries: signed(stats.entries),
            blobs: signed(stats.blobs),
            pages: signed(stats.pages),
            put_bytes: signed(stats.put_bytes),
            puts: signed(stats.puts),
            hits: signed(stats.hits),
            copied_bytes: signed(stats.copied_bytes),
        }
    }
}

/// What this process takes, in bytes, as the kernel accounts for it.
#[pyfunction]
pub(crate) fn memory_usage(py: Python<'_>) -> PyResult<BTreeMap<&'static str, u64>> {
    let pss = py
        .detach(pagemerge_linux::accounting::pss)
        .map_err(|error| {
            PyOSError::new_err((
                error.raw_os_error().unwrap_or(0),
                format!("cannot read /proc/self/smaps_rollup: {error}"),
            ))
        })?;
    Ok(BTreeMap::from([
        ("pss", pss.pss),
        ("pss_anon", pss.pss_anon),
        ("pss_file", pss.pss_file),
        ("pss_shmem", pss.pss_shmem),
        ("rss", pss.rss),
    ]))
}
