//! `pagemerge.Allocator`, the compiled half, and `pagemerge.Block`.
//!
//! # Invariants
//! * A block's memory is freed when nothing of Python's can reach it: with the block itself, which every
//!   view holds. numpy's older ways of taking a buffer (`ndarray(buffer=...)`) give the export back and
//!   keep the address, so `release()` gives the memory back at once, but the address only with the block.
//! * No lock is held while Python code can run, and a fork finds none of them taken.
//! * At the end of the interpreter nothing is given back any more: the process is about to do that.

use crate::engine::{Engine, is_exiting};
use crate::numpy::NumpyContext;
use crate::stats::AllocatorStats;
use pagemerge_alloc::allocator as alloc;
use pagemerge_linux::ForkLock;
use pyo3::exceptions::{PyBufferError, PyMemoryError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use std::ffi::c_int;
use std::mem;

/// The Python exception for an error of the allocator.
pub(crate) fn error(err: &alloc::AllocatorError) -> PyErr {
    PyMemoryError::new_err(err.to_string())
}

/// What `pagemerge.Allocator` stands on. See there.
#[pyclass(module = "pagemerge", name = "_Allocator", frozen, weakref)]
pub(crate) struct Allocator {
    /// `None` only while it is being dropped.
    inner: Option<alloc::Allocator>,
    engine: Py<Engine>,
}

impl Allocator {
    pub(crate) fn inner(&self) -> &alloc::Allocator {
        self.inner.as_ref().expect("only drop takes it")
    }
}

impl Drop for Allocator {
    fn drop(&mut self) {
        let inner = self.inner.take();
        if is_exiting() {
            mem::forget(inner);
            return;
        }
        // Its last share waits for the merging thread.
        let mut inner = Some(inner);
        Python::try_attach(|py| {
            let inner = inner.take();
            py.detach(|| drop(inner));
        });
    }
}

#[pymethods]
impl Allocator {
    #[new]
    fn new(py: Python<'_>, engine: Option<Py<Engine>>, domain: String) -> PyResult<Self> {
        let engine = match engine {
            Some(engine) => engine,
            None => py.get_type::<Engine>().call0()?.cast_into()?.unbind(),
        };
        let options = alloc::Options {
            domain,
            ..alloc::Options::default()
        };
        let inner = alloc::Allocator::new(engine.get().inner(), options);
        Ok(Self {
            inner: Some(inner),
            engine,
        })
    }

    #[getter]
    fn engine(&self, py: Python<'_>) -> Py<Engine> {
        self.engine.clone_ref(py)
    }

    fn allocate(slf: &Bound<'_, Self>, nbytes: isize) -> PyResult<Block> {
        let nbytes = usize::try_from(nbytes).map_err(|_| {
            PyValueError::new_err(format!("cannot allocate {nbytes} bytes: less than none"))
        })?;
        let py = slf.py();
        let this = slf.get();
        let block = py.detach(|| this.inner().allocate(nbytes));
        Ok(Block {
            nbytes,
            state: ForkLock::new(State {
                block: Some(block.map_err(|e| error(&e))?),
                exports: 0,
                lent: false,
                released: false,
            }),
            _allocator: slf.clone().unbind(),
        })
    }

    fn numpy(&self, py: Python<'_>, threshold: usize) -> PyResult<NumpyContext> {
        NumpyContext::new(py, self.inner().clone(), threshold)
    }

    /// Whether a block begins there.
    fn owns(&self, address: usize) -> bool {
        self.inner().size_of(address).is_some()
    }

    fn trim(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.inner().trim()).map_err(|e| error(&e))
    }

    fn stats(&self, py: Python<'_>) -> PyResult<AllocatorStats> {
        let mut stats = py.detach(|| self.inner().stats()).map_err(|e| error(&e))?;
        if stats.not_merging.is_none() {
            // What holds for all arenas at once.
            let engine = self.engine.get().inner();
            stats.not_merging = py.detach(|| engine.run()).err().map(|why| why.to_string());
        }
        Ok(stats.into())
    }
}

/// What becomes of a block.
struct State {
    /// `None` only while it is being dropped.
    block: Option<alloc::Block>,
    exports: usize,
    /// Somebody had a buffer of it, and may still know the address.
    lent: bool,
    released: bool,
}

/// Memory of an allocator. See the type stub for user documentation.
#[pyclass(module = "pagemerge", frozen, weakref)]
pub(crate) struct Block {
    nbytes: usize,
    state: ForkLock<State>,
    /// Keeps the engine from being dropped by Python, and so released, while there are blocks.
    _allocator: Py<Allocator>,
}

fn broken() -> PyErr {
    error(&alloc::AllocatorError::Broken)
}

fn released() -> PyErr {
    PyValueError::new_err("this block has been released; allocate another one")
}

impl Block {
    /// Ends it, if nobody has a view; otherwise says how many there are.
    fn end(&self, py: Python<'_>) -> PyResult<Result<(), usize>> {
        let mut state = self.state.lock().ok_or_else(broken)?;
        if state.exports > 0 {
            return Ok(Err(state.exports));
        }
        if mem::replace(&mut state.released, true) {
            return Ok(Ok(()));
        }
        let block = state.block.take();
        let lent = state.lent;
        drop(state);
        if !lent {
            py.detach(|| drop(block));
            return Ok(Ok(()));
        }
        let emptied = py.detach(|| block.as_ref().map_or(Ok(()), alloc::Block::empty));
        self.state.lock().ok_or_else(broken)?.block = block;
        emptied.map(Ok).map_err(|e| error(&e))
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if is_exiting()
            && let Some(mut state) = self.state.lock()
        {
            mem::forget(state.block.take());
        }
    }
}

#[pymethods]
impl Block {
    #[getter]
    fn nbytes(&self) -> usize {
        self.nbytes
    }

    #[getter]
    fn released(&self) -> PyResult<bool> {
        Ok(self.state.lock().ok_or_else(broken)?.released)
    }

    fn __len__(&self) -> PyResult<usize> {
        if self.released()? {
            return Err(released());
        }
        Ok(self.nbytes)
    }

    fn release(&self, py: Python<'_>) -> PyResult<()> {
        self.end(py)?.map_err(|views| {
            PyBufferError::new_err(format!(
                "cannot release this block: {views} views of it exist; it is freed with the last of them"
            ))
        })
    }

    fn __enter__(slf: Bound<'_, Self>) -> PyResult<Bound<'_, Self>> {
        if slf.get().released()? {
            return Err(released());
        }
        Ok(slf)
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        kind: &Bound<'_, PyAny>,
        _error: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        if kind.is_none() {
            return self.release(py);
        }
        // The frames of an exception that is under way have views, as a rule; it is not to be hidden.
        self.end(py).map(drop)
    }

    #[allow(unsafe_code, reason = "the buffer protocol")]
    #[allow(
        clippy::needless_pass_by_value,
        reason = "the signature that PyO3 asks for"
    )]
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let this = slf.get();
        let mut state = this.state.lock().ok_or_else(broken)?;
        let addr = match &state.block {
            Some(block) if !state.released => block.addr(),
            _ => return Err(released()),
        };
        let len = isize::try_from(this.nbytes).expect("no memory is that large");
        state.exports += 1;
        state.lent = true;
        drop(state);
        let at = std::ptr::with_exposed_provenance_mut(addr);
        // SAFETY: the interpreter gives a view to be filled. The memory is `nbytes` long, writable, and
        // stays this block's until the block is dropped, which the view keeps from happening.
        let got = unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), at, len, 0, flags) };
        if got == 0 {
            return Ok(());
        }
        if let Some(mut state) = this.state.lock() {
            state.exports -= 1;
        }
        Err(PyErr::fetch(slf.py()))
    }

    #[allow(unsafe_code, reason = "the buffer protocol")]
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        if let Some(mut state) = self.state.lock() {
            state.exports -= 1;
        }
    }

    fn __repr__(&self) -> PyResult<String> {
        Ok(if self.released()? {
            "<pagemerge.Block released>".to_owned()
        } else {
            format!("<pagemerge.Block of {} bytes>", self.nbytes)
        })
    }
}
