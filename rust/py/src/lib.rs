//! Python bindings of pagemerge: check arguments, release the GIL, translate errors. Nothing else.
//!
//! A branch about pages is in the wrong crate: move it to `pagemerge_core`. The documentation for
//! users is in the type stub, `python/pagemerge/_core.pyi`.
//!
//! # What every method keeps to
//! * The GIL is released around every call that may wait, and no lock of ours is held while Python
//!   code can run: releasing a buffer export or dropping a reference may run any.
//! * The module never relies on the GIL for its own safety, and says so (`gil_used = false`).
//! * In a forked child every method answers `ForkedError` before it takes any lock, because
//!   another thread of the parent may have held it when the process was copied.

mod allocator;
mod buffer;
mod capabilities;
mod engine;
mod error;
mod evaluation;
mod numpy;
mod region;
mod settings;
mod signals;
mod stats;
mod store;

use pyo3::prelude::*;

/// The compiled half of the package `pagemerge`.
#[pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use crate::allocator::{Allocator, Block};
    #[pymodule_export]
    use crate::buffer::{_owner, _span};
    #[pymodule_export]
    use crate::capabilities::{Capabilities, capabilities};
    #[pymodule_export]
    use crate::engine::{_exiting, Engine};
    #[pymodule_export]
    use crate::evaluation::{evaluate_files, evaluate_memory};
    #[pymodule_export]
    use crate::numpy::NumpyContext;
    #[pymodule_export]
    use crate::region::Region;
    #[pymodule_export]
    use crate::settings::{Settings, kernel_defaults};
    #[pymodule_export]
    use crate::stats::{AllocatorStats, RegionStats, Stats, StoreStats, memory_usage};
    #[pymodule_export]
    use crate::store::{Blob, Store};

    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("PAGE_SIZE", pagemerge_linux::page_size())?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        crate::error::remember(module.py())?;
        // From then on nothing is un-merged: the process is about to give all of it back.
        let exiting = module.getattr("_exiting")?;
        module
            .py()
            .import("atexit")?
            .call_method1("register", (exiting,))?;
        Ok(())
    }
}
