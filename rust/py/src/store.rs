//! `pagemerge.Store` and `pagemerge.Blob`: bytes that are kept once.
//!
//! # Invariants
//! * Bytes that others may write are read under their buffer's export. Where the GIL is released
//!   meanwhile, that is the kind of export that also keeps numpy from freeing them.
//! * A pointer given out by `__getbuffer__` stays valid until `__releasebuffer__`: the view holds the
//!   blob, the blob its bytes; and where those had to be materialized, the view has them in `internal`.
//! * A part of a blob holds the whole one, so taking parts needs no lock and works in fork children.

use crate::buffer::Export;
use crate::engine::Engine;
use crate::error::store_to_py;
use crate::settings::Value;
use crate::stats::StoreStats;
use pagemerge_alloc::Window;
use pagemerge_linux::Source;
use pyo3::exceptions::{PyIndexError, PyMemoryError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes, PyList, PyMemoryView, PySlice, PyTuple};
use pyo3::{IntoPyObjectExt, ffi};
use std::ffi::c_int;
use std::sync::atomic::{AtomicIsize, Ordering};

/// From here on the GIL is released: below, releasing it costs more than it gives.
const LONG: usize = 16 << 10;

/// Keeps bytes, each content once. See the type stub for user documentation.
#[pyclass(module = "pagemerge", frozen, weakref)]
pub(crate) struct Store {
    inner: pagemerge_alloc::Store,
    engine: Py<Engine>,
}

/// Bytes that a store keeps. See the type stub for user documentation.
#[pyclass(module = "pagemerge", frozen, weakref)]
pub(crate) struct Blob {
    part: Part,
    /// What `hash()` says, once that is known; never -1.
    hash: AtomicIsize,
}

enum Part {
    Whole(pagemerge_alloc::Blob),
    Of {
        whole: Py<Blob>,
        at: usize,
        len: usize,
    },
}

impl Blob {
    fn new(part: Part) -> Self {
        Self {
            part,
            hash: AtomicIsize::new(-1),
        }
    }

    /// The whole blob, and which bytes of it these are.
    fn parts(&self) -> (&pagemerge_alloc::Blob, usize, usize) {
        match &self.part {
            Part::Whole(blob) => (blob, 0, blob.len()),
            Part::Of { whole, at, len } => match &whole.get().part {
                Part::Whole(blob) => (blob, *at, *len),
                Part::Of { .. } => unreachable!("a part is of a whole blob"),
            },
        }
    }

    fn slice(slf: &Bound<'_, Self>, at: usize, len: usize) -> PyResult<Py<Self>> {
        let (_, start, all) = slf.get().parts();
        if len == all {
            return Ok(slf.clone().unbind());
        }
        let whole = match &slf.get().part {
            Part::Whole(_) => slf.clone().unbind(),
            Part::Of { whole, .. } => whole.clone_ref(slf.py()),
        };
        Py::new(
            slf.py(),
            Self::new(Part::Of {
                whole,
                at: start + at,
                len,
            }),
        )
    }

    fn equals(&self, other: &Self) -> bool {
        let ((one, at, len), (two, there, length)) = (self.parts(), other.parts());
        len == length && one.equals_blob(at, two, there, len)
    }
}

/// `max_bytes`, with the errors that settings have.
fn limit(max_bytes: Option<&Bound<'_, PyAny>>) -> PyResult<Option<u64>> {
    max_bytes
        .map(|value| u64::from_python("max_bytes", value))
        .transpose()
}

/// Runs `work`, without the GIL if it is about many bytes.
fn lengthy<T: Send>(py: Python<'_>, bytes: usize, work: impl Send + FnOnce() -> T) -> T {
    if bytes < LONG {
        work()
    } else {
        py.detach(work)
    }
}

/// Runs `work` on the bytes of `object`, which others may write; without the GIL if they are many.
fn with_bytes<T: Send>(
    object: &Bound<'_, PyAny>,
    what: &str,
    work: impl Send + FnOnce(Source<'_>) -> T,
) -> PyResult<T> {
    let py = object.py();
    if let Ok(bytes) = object.cast_exact::<PyBytes>() {
        let bytes = bytes.as_bytes();
        return Ok(lengthy(py, bytes.len(), || work(Source::from(bytes))));
    }
    let export = Export::of_row(object, what, LONG)?;
    let (address, len) = (export.address(), export.bytes());
    Ok(lengthy(py, len, || {
        let at = std::ptr::with_exposed_provenance(address);
        // SAFETY: `export` holds these bytes until this function returns.
        #[allow(unsafe_code, reason = "the promise that an export is held for")]
        let source = unsafe { Source::promised(at, len) };
        work(source)
    }))
}

#[pymethods]
impl Store {
    #[new]
    #[pyo3(signature = (domain = "", max_bytes = None, engine = None))]
    fn new(
        py: Python<'_>,
        domain: &str,
        max_bytes: Option<&Bound<'_, PyAny>>,
        engine: Option<Py<Engine>>,
    ) -> PyResult<Self> {
        let max_bytes = limit(max_bytes)?;
        let engine = match engine {
            Some(engine) => engine,
            None => Py::new(py, Engine::with_defaults(py)?)?,
        };
        let of = engine.get().inner().clone();
        let inner = py
            .detach(|| pagemerge_alloc::Store::new(of, domain, max_bytes))
            .map_err(|error| store_to_py(py, error))?;
        Ok(Self { inner, engine })
    }

    fn put(&self, py: Python<'_>, data: &Bound<'_, PyAny>) -> PyResult<Blob> {
        let kept = with_bytes(data, "put", |bytes| {
            if bytes.len() >= LONG {
                return Ok(self.inner.put(bytes));
            }
            // Nobody waits for another thread with the GIL: a large value may take it long.
            self.inner.try_put(bytes).ok_or_else(|| {
                let mut copy = vec![0; bytes.len()];
                bytes.copy_to(&mut copy);
                copy
            })
        })?;
        let kept = kept.unwrap_or_else(|copy| py.detach(|| self.inner.put(&copy[..])));
        let blob = kept.map_err(|error| store_to_py(py, error))?;
        Ok(Blob::new(Part::Whole(blob)))
    }

    fn stats(&self, py: Python<'_>) -> PyResult<StoreStats> {
        let stats = py.detach(|| self.inner.stats());
        stats
            .map(Into::into)
            .map_err(|error| store_to_py(py, error))
    }

    #[getter]
    fn engine(&self, py: Python<'_>) -> Py<Engine> {
        self.engine.clone_ref(py)
    }

    #[getter]
    fn domain(&self) -> &str {
        self.inner.domain()
    }

    #[getter]
    fn max_bytes(&self) -> Option<u64> {
        self.inner.max_bytes()
    }

    #[setter]
    fn set_max_bytes(&self, max_bytes: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        self.inner.set_max_bytes(limit(max_bytes)?);
        Ok(())
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        if !self.inner.is_here() {
            return Ok("<pagemerge.Store of the parent process>".to_owned());
        }
        let stats = py
            .detach(|| self.inner.stats())
            .map_err(|error| store_to_py(py, error))?;
        Ok(format!(
            "<pagemerge.Store of {} entries, {} bytes held as {}>",
            stats.entries,
            stats.logical_bytes,
            stats.unique_bytes + stats.metadata_bytes
        ))
    }
}

#[pymethods]
impl Blob {
    fn __len__(&self) -> usize {
        self.parts().2
    }

    fn __getitem__(slf: &Bound<'_, Self>, key: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        let py = slf.py();
        let (blob, start, len) = slf.get().parts();
        if let Ok(slice) = key.cast::<PySlice>() {
            let length = isize::try_from(len).map_err(|_| PyIndexError::new_err("too long"))?;
            let found = slice.indices(length)?;
            if found.step != 1 {
                return Err(PyValueError::new_err(format!(
                    "a slice of a blob has the step 1, got {}; take bytes(blob)[::{}]",
                    found.step, found.step
                )));
            }
            let at = usize::try_from(found.start).unwrap_or(0).min(len);
            return Ok(Self::slice(slf, at, found.slicelength.min(len - at))?.into_any());
        }
        let index: isize = key.extract().map_err(|_| {
            PyTypeError::new_err(format!(
                "a blob's index is an integer or a slice, not {}",
                key.get_type()
                    .name()
                    .map_or_else(|_| "that".into(), |name| name.to_string())
            ))
        })?;
        let at = if index < 0 {
            index.checked_add_unsigned(len)
        } else {
            Some(index)
        };
        let at = at
            .and_then(|at| usize::try_from(at).ok())
            .filter(|at| *at < len)
            .ok_or_else(|| PyIndexError::new_err("blob index out of range"))?;
        let mut byte = [0];
        blob.read(start + at, &mut byte);
        byte[0].into_py_any(py)
    }

    fn __bytes__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let (blob, at, len) = self.parts();
        let first = blob.pieces(at, len).next();
        if let Some(piece) = first.filter(|piece| piece.len() == len) {
            let length = ffi::Py_ssize_t::try_from(len).expect("a length fits");
            #[allow(
                unsafe_code,
                reason = "Python copies them, into an object not filled before"
            )]
            // SAFETY: as many bytes are there, and stay what they are while the blob is borrowed.
            let made = unsafe { ffi::PyBytes_FromStringAndSize(piece.as_ptr().cast(), length) };
            #[allow(unsafe_code, reason = "what Python's function returns")]
            // SAFETY: a new reference, or none and an error.
            let made = unsafe { Bound::from_owned_ptr_or_err(py, made) }?;
            return Ok(made.cast_into()?);
        }
        PyBytes::new_with(py, len, |into| {
            lengthy(py, len, || blob.read(at, into));
            Ok(())
        })
    }

    fn __hash__(slf: &Bound<'_, Self>) -> PyResult<isize> {
        let known = slf.get().hash.load(Ordering::Relaxed);
        if known != -1 {
            return Ok(known);
        }
        // That of bytes with the same content, since those are equal to it. Only Python can make it,
        // and only of bytes (a memoryview asks its exporter, which is this very blob).
        let hash = slf.get().__bytes__(slf.py())?.hash()?;
        slf.get().hash.store(hash, Ordering::Relaxed);
        Ok(hash)
    }

    fn __eq__(&self, py: Python<'_>, other: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        let (blob, at, len) = self.parts();
        let equal = if let Ok(other) = other.cast_exact::<Self>() {
            let other = other.get();
            lengthy(py, len, || self.equals(other))
        } else if other.is_exact_instance_of::<PyBytes>()
            || other.is_instance_of::<PyBytes>()
            || other.is_instance_of::<PyByteArray>()
            || other.is_instance_of::<PyMemoryView>()
        {
            // What has no bytes in one piece (any more) equals nothing, and is no error.
            let equal = with_bytes(other, "compare", |bytes| {
                bytes.len() == len && blob.equals(at, bytes)
            });
            match equal {
                Ok(equal) => equal,
                Err(_) => return Ok(py.NotImplemented()),
            }
        } else {
            return Ok(py.NotImplemented());
        };
        equal.into_py_any(py)
    }

    /// How the bytes lie in memory: one view for each piece.
    fn segments<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyList>> {
        let py = slf.py();
        let views = PyList::empty(py);
        let (blob, start, len) = slf.get().parts();
        let mut at = 0;
        for piece in blob.pieces(start, len) {
            let part = Self::slice(slf, at, piece.len())?;
            views.append(PyMemoryView::from(part.bind(py).as_any())?)?;
            at += piece.len();
        }
        Ok(views)
    }

    #[getter]
    fn charged_bytes(&self, py: Python<'_>) -> PyResult<u64> {
        let (blob, ..) = self.parts();
        py.detach(|| blob.charged_bytes())
            .map_err(|error| store_to_py(py, error))
    }

    fn __copy__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __deepcopy__(slf: Py<Self>, _memo: &Bound<'_, PyAny>) -> Py<Self> {
        slf
    }

    fn __reduce__(slf: &Bound<'_, Self>) -> PyResult<Py<PyTuple>> {
        // A store does not travel; what arrives is plain bytes.
        let py = slf.py();
        let bytes = slf.get().__bytes__(py)?;
        let made = (py.get_type::<PyBytes>(), PyTuple::new(py, [bytes])?);
        Ok(made.into_pyobject(py)?.unbind())
    }

    fn __repr__(&self) -> String {
        format!("<pagemerge.Blob of {} bytes>", self.parts().2)
    }

    /// # Safety
    /// As Python's `bf_getbuffer`: `view` is null or to be filled.
    #[allow(
        unsafe_code,
        reason = "a pointer is given out that the view keeps valid"
    )]
    unsafe fn __getbuffer__(
        slf: &Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let py = slf.py();
        let (blob, at, len) = slf.get().parts();
        let window = lengthy(py, len, || blob.window(at, len))
            .map_err(|error| PyMemoryError::new_err(error.to_string()))?;
        let from = window.as_ptr().cast_mut().cast();
        let length = ffi::Py_ssize_t::try_from(len).expect("a length fits");
        // SAFETY: `view` is Python's to be filled. The bytes stay where they are while the blob lives,
        // which the view takes a reference to, and while the window does, which goes along below. They
        // are never written: the view is read-only.
        let filled = unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), from, length, 1, flags) };
        if filled != 0 {
            return Err(PyErr::fetch(py));
        }
        if window.is_needed() {
            let kept = Box::into_raw(Box::new(window));
            // SAFETY: it has just been filled, so it is there; this field is the exporter's.
            unsafe { (*view).internal = kept.cast() };
        }
        Ok(())
    }

    /// # Safety
    /// As Python's `bf_releasebuffer`: `view` was filled by the above.
    #[allow(unsafe_code, reason = "takes back what the view has kept")]
    #[allow(clippy::unused_self, reason = "the shape that Python's slot has")]
    unsafe fn __releasebuffer__(&self, view: *mut ffi::Py_buffer) {
        // SAFETY: Python gives the view that was filled above.
        let kept: *mut Window = unsafe { (*view).internal }.cast();
        if !kept.is_null() {
            // SAFETY: boxed above, for this view alone, which is released once.
            drop(unsafe { Box::from_raw(kept) });
        }
    }
}
