//! From Rust errors to Python exceptions.
//!
//! Wrong arguments are `ValueError` or `TypeError`, refusals of the kernel are `OSError` with
//! `errno` set, and all that is ours derives from `pagemerge.Error`. The classes themselves are
//! Python's (`pagemerge._errors`), because several of them have two bases.

use pagemerge_core::{Reason, SettingError};
use pagemerge_linux::Error;
use pyo3::call::PyCallArgs;
use pyo3::exceptions::{PyMemoryError, PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyDict;

// The kernel's numbers, the same on every architecture that Linux has.
const ENOMEM: i32 = 12;
const EBUSY: i32 = 16;
const EFBIG: i32 = 27;
const EOPNOTSUPP: i32 = 95;

/// The names in `pagemerge._errors`. Held, because nothing can be imported any more when modules are
/// taken down, and objects that end then may still use an engine.
static CLASSES: PyOnceLock<Py<PyDict>> = PyOnceLock::new();

fn classes(py: Python<'_>) -> PyResult<&Bound<'_, PyDict>> {
    let found = CLASSES.get_or_try_init(py, || {
        let errors = py.import("pagemerge._errors")?;
        PyResult::Ok(errors.dict().copy()?.unbind())
    });
    Ok(found?.bind(py))
}

/// Finds the classes while that can be done: when the module is made.
pub(crate) fn remember(py: Python<'_>) -> PyResult<()> {
    classes(py).map(drop)
}

/// An instance of the class `name` of `pagemerge._errors`, or why there can be none.
fn ours<'py>(py: Python<'py>, name: &str, arguments: impl PyCallArgs<'py>) -> PyErr {
    let made = classes(py)
        .and_then(|classes| classes.as_any().get_item(name))
        .and_then(|class| class.call1(arguments));
    match made {
        Ok(instance) => PyErr::from_value(instance),
        Err(error) => error,
    }
}

/// The Python exception for an error of a store.
pub(crate) fn store_to_py(py: Python<'_>, err: pagemerge_alloc::store::Error) -> PyErr {
    use pagemerge_alloc::store::Error as E;
    let message = err.to_string();
    match err {
        E::Engine(Error::Os { source, .. }) if source.raw_os_error() == Some(ENOMEM) => {
            PyMemoryError::new_err(message)
        }
        E::Engine(error) => to_py(py, error),
        E::Forked => ours(py, "ForkedError", (message,)),
        E::Full { asked, held, max } => ours(py, "StoreFullError", (message, asked, held, max)),
        E::NoMemory { .. } => PyMemoryError::new_err(message),
        _ => ours(py, "Error", (message,)),
    }
}

/// The Python exception for an error of the engine.
pub(crate) fn to_py(py: Python<'_>, err: Error) -> PyErr {
    let message = err.to_string();
    match err {
        Error::Setting(SettingError::Busy { .. }) => ours(py, "BusyError", (EBUSY, message)),
        Error::Setting(_)
        | Error::TooSmall { .. }
        | Error::Overlaps { .. }
        | Error::InArena { .. }
        | Error::NotRegistered
        | Error::NotInRegion { .. }
        | Error::NotInBuffer { .. } => PyValueError::new_err(message),
        Error::NotMergeable { reason, .. } => {
            ours(py, "NotMergeableError", (message, reason.name()))
        }
        Error::Closed => ours(py, "ClosedError", (message,)),
        Error::Forked => ours(py, "ForkedError", (message,)),
        Error::NoBarrier { .. } | Error::NeedsBarrier { .. } | Error::ArenaNeedsBarrier { .. } => {
            ours(py, "UnavailableError", (EOPNOTSUPP, message))
        }
        Error::Limit(_) => ours(py, "UnavailableError", (EFBIG, message)),
        Error::Unmerge { pages, reason } | Error::Exclude { pages, reason } => {
            ours(py, "UnmergeError", (message, pages, reason.name()))
        }
        Error::UnmergeMemory { pages, .. } => ours(
            py,
            "UnmergeError",
            (message, pages, Reason::NoMemory.name()),
        ),
        // Built by hand: the blanket conversion of io::Error would drop `errno`.
        Error::Os { source, .. } => match source.raw_os_error() {
            Some(number) => PyOSError::new_err((number, message)),
            None => PyOSError::new_err(message),
        },
        _ => ours(py, "Error", (message,)),
    }
}
