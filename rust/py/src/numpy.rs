//! numpy's own allocations (NEP 49): the data of the arrays that are made in a context lies in an allocator.
//!
//! numpy takes four functions, wrapped in a capsule, for the current context (`contextvars`); every array
//! holds the capsule that its data came from, and frees with it. So a handler lives as long as the last of
//! its arrays, and the allocator as long as the handler.
//!
//! # Which memory is whose
//! Below a threshold numpy's own functions serve. By whom a piece was served is told by its address, never by
//! its size: numpy frees some pieces with another size than it asked for, and arrays change their sizes.
//!
//! # Invariants
//! * Nothing here needs the GIL, waits for it, or calls Python: arrays are freed anywhere, also after the
//!   modules are gone.
//! * No panic leaves these functions; it is a failed allocation, or memory that stays taken.

use crate::engine::is_exiting;
use pagemerge_alloc::allocator::Allocator;
use pyo3::exceptions::PyRuntimeError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyTuple;
use std::ffi::{CStr, c_char, c_void};
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

/// The capsules' name.
const NAME: &CStr = c"mem_handler";

/// Places in numpy's table of functions, since numpy 1.22.
const SET_HANDLER: usize = 304;
const DEFAULT_HANDLER: usize = 306;

type Malloc = unsafe extern "C" fn(*mut c_void, usize) -> *mut c_void;
type Calloc = unsafe extern "C" fn(*mut c_void, usize, usize) -> *mut c_void;
type Realloc = unsafe extern "C" fn(*mut c_void, *mut c_void, usize) -> *mut c_void;
type Free = unsafe extern "C" fn(*mut c_void, *mut c_void, usize);
type SetHandler = unsafe extern "C" fn(*mut ffi::PyObject) -> *mut ffi::PyObject;

/// numpy's `PyDataMemAllocator`.
#[repr(C)]
#[derive(Clone, Copy)]
struct DataMemAllocator {
    ctx: *mut c_void,
    malloc: Malloc,
    calloc: Calloc,
    realloc: Realloc,
    free: Free,
}

/// numpy's `PyDataMem_Handler`.
#[repr(C)]
struct DataMemHandler {
    name: [c_char; 127],
    version: u8,
    allocator: DataMemAllocator,
}

const _: () = assert!(mem::offset_of!(DataMemHandler, allocator) == 128);

/// What a capsule of ours points to: numpy's part first.
#[repr(C)]
struct Handler {
    numpys: DataMemHandler,
    allocator: Allocator,
    threshold: usize,
    default: DataMemAllocator,
}

/// What numpy offers, looked up once.
struct Numpy {
    set_handler: SetHandler,
    default: DataMemAllocator,
}

// SAFETY: functions, and the context that numpy gives its own functions, which they may use on any
// thread.
#[allow(unsafe_code, reason = "addresses of numpy's functions")]
unsafe impl Send for Numpy {}
// SAFETY: as above.
#[allow(unsafe_code, reason = "addresses of numpy's functions")]
unsafe impl Sync for Numpy {}

static NUMPY: PyOnceLock<Numpy> = PyOnceLock::new();
/// Which contexts have been entered here and not left, innermost first: (context, handler before, rest).
static ENTERED: PyOnceLock<Py<PyAny>> = PyOnceLock::new();

#[allow(unsafe_code, reason = "numpy's table of functions")]
fn numpy(py: Python<'_>) -> PyResult<&'static Numpy> {
    NUMPY.get_or_try_init(py, || {
        let module = py
            .import("numpy._core._multiarray_umath")
            .or_else(|_| py.import("numpy.core._multiarray_umath"))?;
        let table = module.getattr("_ARRAY_API")?;
        // SAFETY: any object may be asked; what is no such capsule gives null and an exception.
        let table = unsafe { ffi::PyCapsule_GetPointer(table.as_ptr(), ptr::null()) };
        if table.is_null() {
            return Err(PyErr::fetch(py));
        }
        let entry = |at: usize| {
            // SAFETY: since numpy 1.22, and this package needs 1.26, the table has these entries.
            let place = unsafe { table.cast::<*mut c_void>().add(at) };
            // SAFETY: as above; nobody writes them any more.
            unsafe { place.read() }
        };
        let set_handler = entry(SET_HANDLER);
        // SAFETY: the entry is the address of this function.
        let set_handler = unsafe { mem::transmute::<*mut c_void, SetHandler>(set_handler) };
        let default = entry(DEFAULT_HANDLER).cast::<*mut ffi::PyObject>();
        // SAFETY: the entry is the address of numpy's variable, which holds its capsule for ever.
        let default = unsafe { default.read() };
        // SAFETY: as for the table.
        let default = unsafe { ffi::PyCapsule_GetPointer(default, NAME.as_ptr()) };
        if default.is_null() {
            return Err(PyErr::fetch(py));
        }
        // SAFETY: a capsule of this name points to such a structure, and numpy's own is static.
        let default = unsafe { (*default.cast::<DataMemHandler>()).allocator };
        Ok(Numpy {
            set_handler,
            default,
        })
    })
}

/// Makes `handler` the current one of this context, or numpy's own; returns the one before.
#[allow(unsafe_code, reason = "a function of numpy's")]
fn set_handler<'py>(py: Python<'py>, handler: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let numpy = numpy(py)?;
    // SAFETY: attached, and a capsule as numpy wants it: one of ours, or one that it gave us itself.
    let old = unsafe { (numpy.set_handler)(handler.as_ptr()) };
    // SAFETY: a new reference, or null with an exception.
    unsafe { Bound::from_owned_ptr_or_err(py, old) }
}

/// Runs `act` on the handler that numpy gives back to us; what panics is `otherwise`.
#[allow(unsafe_code, reason = "called by numpy with what it was given")]
unsafe fn with<R>(ctx: *mut c_void, otherwise: R, act: impl FnOnce(&Handler) -> R) -> R {
    // SAFETY: numpy gives each function the context of its handler, which the capsule keeps.
    let handler = unsafe { &*ctx.cast::<Handler>() };
    catch_unwind(AssertUnwindSafe(|| act(handler))).unwrap_or(otherwise)
}

fn pointer(addr: usize) -> *mut c_void {
    ptr::with_exposed_provenance_mut(addr)
}

impl Handler {
    /// Fresh memory, all zero if it is ours; null if there is none.
    #[allow(unsafe_code, reason = "numpy's own functions")]
    fn allocate(&self, bytes: usize, zeroed: bool) -> *mut c_void {
        if bytes >= self.threshold {
            let got = self.allocator.allocate_at(bytes);
            return got.map_or(ptr::null_mut(), pointer);
        }
        if zeroed {
            // SAFETY: numpy's function with its own context.
            unsafe { (self.default.calloc)(self.default.ctx, 1, bytes) }
        } else {
            // SAFETY: as above.
            unsafe { (self.default.malloc)(self.default.ctx, bytes) }
        }
    }

    /// Frees what this handler, or another of the same allocator, has given out.
    #[allow(unsafe_code, reason = "numpy's own functions")]
    fn free(&self, at: *mut c_void, bytes: usize) {
        let addr = at.expose_provenance();
        // No block begins within a page, so most of what is numpy's is told by that.
        if !addr.is_multiple_of(pagemerge_linux::page_size()) || !self.allocator.free(addr) {
            // SAFETY: it is not ours, so numpy's own function has given it out.
            unsafe { (self.default.free)(self.default.ctx, at, bytes) };
        }
    }

    #[allow(
        unsafe_code,
        reason = "numpy's own functions, and copies between the two kinds of memory"
    )]
    fn resize(&self, at: *mut c_void, bytes: usize) -> *mut c_void {
        let addr = at.expose_provenance();
        let Some(old) = self.allocator.size_of(addr) else {
            // SAFETY: not ours, so numpy's.
            let grown = unsafe { (self.default.realloc)(self.default.ctx, at, bytes) };
            if bytes < self.threshold || grown.is_null() {
                return grown;
            }
            // How large it was nobody tells; now it is at least as large as it has to be.
            let Ok(addr) = self.allocator.allocate_at(bytes) else {
                return grown;
            };
            let to = pointer(addr);
            // SAFETY: both have `bytes` bytes, and are different memory.
            unsafe { ptr::copy_nonoverlapping(grown.cast::<u8>(), to.cast::<u8>(), bytes) };
            // SAFETY: numpy's function has just given it out.
            unsafe { (self.default.free)(self.default.ctx, grown, bytes) };
            return to;
        };
        if bytes >= self.threshold {
            let got = self.allocator.resize(addr, bytes);
            return got.map_or(ptr::null_mut(), pointer);
        }
        // SAFETY: numpy's function with its own context.
        let to = unsafe { (self.default.malloc)(self.default.ctx, bytes) };
        if !to.is_null() {
            // SAFETY: the one has `old` bytes, the other `bytes`, and they are different memory.
            unsafe { ptr::copy_nonoverlapping(at.cast::<u8>(), to.cast::<u8>(), old.min(bytes)) };
            self.allocator.free(addr);
        }
        to
    }
}

#[allow(unsafe_code, reason = "called by numpy")]
unsafe extern "C" fn data_malloc(ctx: *mut c_void, bytes: usize) -> *mut c_void {
    // SAFETY: numpy gives the handler's own context.
    unsafe {
        with(ctx, ptr::null_mut(), |handler| {
            handler.allocate(bytes, false)
        })
    }
}

#[allow(unsafe_code, reason = "called by numpy")]
unsafe extern "C" fn data_calloc(ctx: *mut c_void, count: usize, each: usize) -> *mut c_void {
    let Some(bytes) = count.checked_mul(each) else {
        return ptr::null_mut();
    };
    // SAFETY: numpy gives the handler's own context.
    unsafe {
        with(ctx, ptr::null_mut(), |handler| {
            handler.allocate(bytes, true)
        })
    }
}

#[allow(unsafe_code, reason = "called by numpy")]
unsafe extern "C" fn data_realloc(ctx: *mut c_void, at: *mut c_void, bytes: usize) -> *mut c_void {
    // SAFETY: numpy gives the handler's own context.
    unsafe {
        with(ctx, ptr::null_mut(), |handler| {
            if at.is_null() {
                handler.allocate(bytes, false)
            } else {
                handler.resize(at, bytes)
            }
        })
    }
}

#[allow(unsafe_code, reason = "called by numpy")]
unsafe extern "C" fn data_free(ctx: *mut c_void, at: *mut c_void, bytes: usize) {
    if !at.is_null() {
        // SAFETY: numpy gives the handler's own context.
        unsafe { with(ctx, (), |handler| handler.free(at, bytes)) };
    }
}

/// The end of a capsule: its last array, and the last context that would have come back to it, are gone.
#[allow(unsafe_code, reason = "called by the interpreter")]
unsafe extern "C" fn end(capsule: *mut ffi::PyObject) {
    // SAFETY: the interpreter gives the capsule that this is the destructor of.
    let at = unsafe { ffi::PyCapsule_GetPointer(capsule, NAME.as_ptr()) };
    // At the end of the interpreter nothing is given back any more.
    if !at.is_null() && !is_exiting() {
        // SAFETY: made by `Box::into_raw` in `capsule`, and given up once, here.
        drop(unsafe { Box::from_raw(at.cast::<Handler>()) });
    }
}

/// A capsule for numpy.
#[allow(unsafe_code, reason = "a capsule with a structure of numpy's")]
fn capsule(py: Python<'_>, allocator: Allocator, threshold: usize) -> PyResult<Py<PyAny>> {
    let mut name = [0; 127];
    for (to, from) in name.iter_mut().zip(c"pagemerge".to_bytes()) {
        *to = c_char::from_ne_bytes([*from]);
    }
    let handler = Box::into_raw(Box::new(Handler {
        numpys: DataMemHandler {
            name,
            version: 1,
            allocator: DataMemAllocator {
                ctx: ptr::null_mut(),
                malloc: data_malloc,
                calloc: data_calloc,
                realloc: data_realloc,
                free: data_free,
            },
        },
        allocator,
        threshold,
        default: numpy(py)?.default,
    }));
    // SAFETY: just made, and known to nobody else.
    unsafe { (*handler).numpys.allocator.ctx = handler.cast() };
    // SAFETY: attached; the name is static, and the destructor is of this very type.
    let made = unsafe { ffi::PyCapsule_New(handler.cast(), NAME.as_ptr(), Some(end)) };
    if made.is_null() {
        // SAFETY: nobody has it.
        drop(unsafe { Box::from_raw(handler) });
    }
    // SAFETY: a new reference, or null with an exception.
    unsafe { Bound::from_owned_ptr_or_err(py, made).map(Bound::unbind) }
}

fn entered(py: Python<'_>) -> PyResult<&Bound<'_, PyAny>> {
    let var = ENTERED.get_or_try_init(py, || {
        let kind = py.import("contextvars")?.getattr("ContextVar")?;
        let none = [("default", py.None())];
        let keywords = pyo3::types::IntoPyDict::into_py_dict(none, py)?;
        let var = kind.call(("pagemerge.numpy",), Some(&keywords))?;
        PyResult::Ok(var.unbind())
    })?;
    Ok(var.bind(py))
}

/// `with allocator.numpy():`. See the type stub for user documentation.
///
/// Entering and leaving are one call into here each, so that no signal handler's exception comes in
/// between numpy's handler and our record of it.
#[pyclass(module = "pagemerge", frozen, weakref)]
pub(crate) struct NumpyContext {
    handler: Py<PyAny>,
    #[pyo3(get)]
    threshold: usize,
}

impl NumpyContext {
    pub(crate) fn new(py: Python<'_>, allocator: Allocator, threshold: usize) -> PyResult<Self> {
        Ok(Self {
            handler: capsule(py, allocator, threshold)?,
            threshold,
        })
    }
}

#[pymethods]
impl NumpyContext {
    fn __enter__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, Self>> {
        let py = slf.py();
        let var = entered(py)?;
        let rest = var.call_method0("get")?;
        let before = set_handler(py, slf.get().handler.bind(py))?;
        let record = PyTuple::new(py, [slf.as_any(), &before, &rest])?;
        if let Err(error) = var.call_method1("set", (record,)) {
            set_handler(py, &before)?;
            return Err(error);
        }
        Ok(slf.clone())
    }

    #[pyo3(signature = (*_exc))]
    fn __exit__(slf: &Bound<'_, Self>, _exc: &Bound<'_, PyTuple>) -> PyResult<()> {
        let py = slf.py();
        let var = entered(py)?;
        let record = var.call_method0("get")?;
        let ours = match record.cast::<PyTuple>() {
            Ok(record) => record.get_item(0)?.is(slf),
            Err(_) => false,
        };
        if !ours {
            return Err(PyRuntimeError::new_err(
                "cannot leave allocator.numpy(): it was not the last one to be entered in this context; \
                 leave such contexts in reverse order, and in the thread or task that entered them",
            ));
        }
        let record = record.cast_into::<PyTuple>()?;
        var.call_method1("set", (record.get_item(2)?,))?;
        set_handler(py, &record.get_item(1)?)?;
        Ok(())
    }

    /// Calls `function` within the context, for arrays that are asked for by name.
    #[pyo3(signature = (function, *arguments))]
    fn _call<'py>(
        &self,
        function: &Bound<'py, PyAny>,
        arguments: &Bound<'py, PyTuple>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = function.py();
        let before = set_handler(py, self.handler.bind(py))?;
        let made = function.call1(arguments);
        set_handler(py, &before)?;
        made
    }

    fn __repr__(&self) -> String {
        format!(
            "<pagemerge.NumpyContext for arrays of {} bytes and more>",
            self.threshold
        )
    }
}
