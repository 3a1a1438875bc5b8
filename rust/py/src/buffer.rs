//! Buffers (PEP 3118): what may be given to an engine, and how it is held.
//!
//! A buffer is anything whose bytes lie in one piece. Writable or not makes no difference: merging
//! changes no byte. The export is held for as long as the memory is registered, which is what
//! keeps its owner from freeing it, resizing it or giving it to somebody else meanwhile.

use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::{PyBufferError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyMemoryView, PyType, PyWeakrefReference};

/// A buffer that is held.
pub(crate) struct Export {
    buffer: PyUntypedBuffer,
    /// numpy does not count exports: `ndarray.resize(refcheck=False)` would free the memory all
    /// the same. It does refuse while the array that owns the memory has a weak reference.
    _guard: Option<Py<PyWeakrefReference>>,
}

impl Export {
    /// Takes hold of `object`, for the call named `what`.
    pub(crate) fn of(object: &Bound<'_, PyAny>, what: &str) -> PyResult<Self> {
        let py = object.py();
        let buffer = PyUntypedBuffer::get(object).map_err(|cause| refusal(object, what, cause))?;
        if !buffer.is_c_contiguous() && !buffer.is_fortran_contiguous() {
            let cause = PyBufferError::new_err("the buffer is not contiguous");
            return Err(refusal(object, what, cause));
        }
        let owner = owner_of(object)?;
        // Objects without weak references (bytearray, mmap) count their exports themselves.
        let guard = PyWeakrefReference::new(&owner).ok().map(Bound::unbind);
        let _ = py;
        Ok(Self {
            buffer,
            _guard: guard,
        })
    }

    /// The same for bytes whose order matters (a matrix has to be stored by rows), and that are read at
    /// once: fewer than `guarded` are read before any other code can run.
    pub(crate) fn of_row(object: &Bound<'_, PyAny>, what: &str, guarded: usize) -> PyResult<Self> {
        let buffer = PyUntypedBuffer::get(object).map_err(|cause| refusal(object, what, cause))?;
        if !buffer.is_c_contiguous() {
            let cause = PyBufferError::new_err("the buffer is not contiguous, row by row");
            return Err(refusal(object, what, cause));
        }
        // (A free-threaded build is one without the stable interface: there, others always run.)
        if buffer.len_bytes() >= guarded || cfg!(not(feature = "abi3")) {
            drop(buffer);
            return Self::of(object, what);
        }
        Ok(Self {
            buffer,
            _guard: None,
        })
    }

    /// Where the bytes lie.
    pub(crate) fn address(&self) -> usize {
        self.buffer.buf_ptr() as usize
    }

    /// How many there are.
    pub(crate) fn bytes(&self) -> usize {
        self.buffer.len_bytes()
    }

    /// Whether the exporter forbids writing.
    pub(crate) fn readonly(&self) -> bool {
        self.buffer.readonly()
    }
}

/// Says what was wrong with `object`, keeping what its own type said as the cause.
fn refusal(object: &Bound<'_, PyAny>, what: &str, cause: PyErr) -> PyErr {
    let py = object.py();
    let kind = object
        .get_type()
        .fully_qualified_name()
        .map_or_else(|_| "an object".to_owned(), |name| name.to_string());
    let error = if cause.is_instance_of::<PyTypeError>(py) {
        PyTypeError::new_err(format!(
            "cannot {what} {kind}: it has no buffer; give an ndarray, bytearray, mmap, memoryview \
             or another object with the buffer protocol"
        ))
    } else {
        PyValueError::new_err(format!(
            "cannot {what} {kind}: its bytes do not lie in one piece ({}); give a contiguous \
             buffer, for example numpy.ascontiguousarray(...)",
            cause.value(py)
        ))
    };
    error.set_cause(py, Some(cause));
    error
}

/// The object whose end frees the memory of `object`, as far as Python can tell: through views of
/// arrays and memoryviews to what they were made from.
fn owner_of<'py>(object: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let py = object.py();
    let ndarray = ndarray(py)?;
    let mut owner = object.clone();
    loop {
        let next = if owner.is_instance_of::<PyMemoryView>() {
            owner.getattr("obj")?
        } else if let Some(ndarray) = &ndarray
            && owner.is_instance(ndarray)?
            && !owner.getattr("flags")?.getattr("owndata")?.is_truthy()?
        {
            owner.getattr("base")?
        } else {
            return Ok(owner);
        };
        if next.is_none() {
            return Ok(owner);
        }
        owner = next;
    }
}

/// `numpy.ndarray`, if numpy has been imported: nobody has an array otherwise.
fn ndarray(py: Python<'_>) -> PyResult<Option<Bound<'_, PyType>>> {
    let modules = py.import("sys")?.getattr("modules")?;
    match modules.get_item("numpy") {
        Ok(numpy) => Ok(Some(numpy.getattr("ndarray")?.cast_into()?)),
        Err(_) => Ok(None),
    }
}

/// The object whose end frees the memory of `buffer`, and whether it says so beforehand: only a
/// plain ndarray that owns its data does, through a weak reference.
#[pyfunction]
pub(crate) fn _owner<'py>(buffer: &Bound<'py, PyAny>) -> PyResult<(Bound<'py, PyAny>, bool)> {
    let owner = owner_of(buffer)?;
    let Some(ndarray) = ndarray(buffer.py())? else {
        return Ok((owner, false));
    };
    // Exactly an ndarray: an instance of a subclass can be part of a reference cycle, and then its
    // weak references are cleared while finalizers may still read it.
    let hooked =
        owner.get_type().is(&ndarray) && owner.getattr("flags")?.getattr("owndata")?.is_truthy()?;
    Ok((owner, hooked))
}

/// First and last-but-one address of the whole pages inside `buffer`.
#[pyfunction]
pub(crate) fn _span(buffer: &Bound<'_, PyAny>) -> PyResult<(usize, usize)> {
    let export = Export::of(buffer, "merge")?;
    let page = pagemerge_linux::page_size();
    let (start, end) = (export.address(), export.address() + export.bytes());
    let first = start.div_ceil(page) * page;
    Ok((first, first.max(end / page * page)))
}
