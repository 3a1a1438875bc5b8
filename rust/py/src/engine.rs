//! `pagemerge.Engine`: a merge engine and the buffers that it holds.
//!
//! # Invariants
//! * A buffer's export is in `held` from before its memory can be merged until after it has been
//!   un-merged, or until [`Engine::_let_go`] has been told that the owner's end is hooked.
//! * `held` is locked only for the time of a map operation; exports are dropped outside, because
//!   dropping one may run Python code.
//! * What belongs to a parent process is never touched, only leaked.
//! * At the end of the interpreter nothing is un-merged: the process is about to give everything
//!   back, and copying gigabytes for that would only delay it. What is held is leaked instead, so
//!   that its memory outlives whoever still merges or reads it.

use crate::buffer::Export;
use crate::error::to_py;
use crate::region::Region;
use crate::settings::{Settings, enumeration, from_keywords};
use crate::signals::{detached, interruptible};
use crate::stats::Stats;
use pagemerge_core::{Event, RunMode};
use pagemerge_linux::{EngineSettings, Error, RegionHandle};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyInt};
use std::collections::HashMap;
use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Set when the interpreter begins to end.
static EXITING: AtomicBool = AtomicBool::new(false);

/// Registered with `atexit`: from now on nothing is un-merged any more.
#[pyfunction]
pub(crate) fn _exiting() {
    EXITING.store(true, Ordering::Relaxed);
}

/// Whether nothing is given back any more, since the process is about to do that.
pub(crate) fn is_exiting() -> bool {
    EXITING.load(Ordering::Relaxed)
}

/// What is registered. Without an export the owner's end is hooked.
type Held = HashMap<RegionHandle, Option<Export>>;

/// A merge engine. See the type stub for user documentation.
#[pyclass(module = "pagemerge", frozen, weakref)]
pub(crate) struct Engine {
    /// `None` only while it is being dropped.
    inner: Option<pagemerge_linux::Engine>,
    held: Mutex<Held>,
    /// The process that made it.
    process: u32,
}

impl Engine {
    /// The engine behind it.
    pub(crate) fn inner(&self) -> &pagemerge_linux::Engine {
        self.inner.as_ref().expect("only drop takes it")
    }

    /// One with the settings that are the default.
    pub(crate) fn with_defaults(py: Python<'_>) -> PyResult<Self> {
        Self::new(py, None)
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        // A map operation that panics has not happened.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_ours(&self) -> bool {
        self.process == std::process::id()
    }

    /// Refuses to work for a child of the process that made the engine.
    fn here(&self, py: Python<'_>) -> PyResult<()> {
        if self.is_ours() {
            Ok(())
        } else {
            Err(to_py(py, Error::Forked))
        }
    }

    /// Whether a region's memory is registered with this engine.
    pub(crate) fn holds(&self, region: RegionHandle) -> bool {
        self.is_ours() && self.held().contains_key(&region)
    }

    /// Ends a region by `how`, then lets its buffer go.
    pub(crate) fn part(
        &self,
        py: Python<'_>,
        region: RegionHandle,
        how: fn(&pagemerge_linux::Engine, RegionHandle) -> Result<(), Error>,
    ) -> PyResult<()> {
        self.here(py)?;
        detached(py, || how(self.inner(), region))?;
        let export = self.held().remove(&region);
        drop(export);
        Ok(())
    }

    /// Changes the settings by `change`, which sees those in force.
    pub(crate) fn change_settings(
        &self,
        py: Python<'_>,
        change: impl Send + FnOnce(&mut EngineSettings) + 'static,
    ) -> PyResult<()> {
        self.here(py)?;
        detached(py, || self.inner().update(change))
    }

    /// Un-merges everything and ends the engine; on failure all buffers stay held.
    fn end(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.inner().close())?;
        let exports = mem::take(&mut *self.held());
        drop(exports);
        Ok(())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let inner = self.inner.take();
        let held = mem::take(self.held.get_mut().unwrap_or_else(PoisonError::into_inner));
        if !self.is_ours() || is_exiting() {
            mem::forget((inner, held));
            return;
        }
        let Some(inner) = inner else { return };
        // What arenas have stays merged: it is their users', and ends with the last of them.
        let released = Python::try_attach(|py| py.detach(|| inner.release().is_ok()));
        if released == Some(true) {
            Python::try_attach(|py| py.detach(|| drop(inner)));
            drop(held);
        } else {
            // Something stays merged, so its owner must stay too.
            mem::forget((inner, held));
        }
    }
}

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (**settings))]
    fn new(py: Python<'_>, settings: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        let settings = from_keywords(EngineSettings::default(), settings)?;
        let inner = detached(py, || pagemerge_linux::Engine::new(settings))?;
        Ok(Self {
            inner: Some(inner),
            held: Mutex::default(),
            process: std::process::id(),
        })
    }

    #[pyo3(signature = (buffer, domain = ""))]
    fn register(
        slf: &Bound<'_, Self>,
        buffer: &Bound<'_, PyAny>,
        domain: &str,
    ) -> PyResult<Region> {
        let py = slf.py();
        let engine = slf.get();
        engine.here(py)?;
        let export = Export::of(buffer, "register")?;
        let (address, bytes) = (export.address(), export.bytes());
        let handle = detached(py, || {
            // SAFETY: the memory must stay mapped as it is until un-merged. `export` holds it: its
            // owner can neither free nor resize nor close it meanwhile. The export is dropped
            // after the region has ended (`part`, `end`), or never (`drop`); `_let_go` hands the
            // duty to the caller, who has hooked the owner's end.
            #[allow(unsafe_code, reason = "the promise that an export is held for")]
            unsafe {
                engine.inner().register(address, bytes, domain)
            }
        })?;
        engine.held().insert(handle, Some(export));
        // An engine that was closed in between has un-merged it already.
        if detached(py, || engine.inner().run()).is_err() {
            let export = engine.held().remove(&handle);
            drop(export);
        }
        Ok(Region::new(slf.clone().unbind(), handle, domain.to_owned()))
    }

    fn unregister(&self, py: Python<'_>, region: &Region) -> PyResult<()> {
        if !std::ptr::eq(region.engine.get(), self) {
            return Err(to_py(py, Error::NotRegistered));
        }
        self.part(py, region.handle, pagemerge_linux::Engine::unregister)
    }

    fn discard(&self, py: Python<'_>, buffer: &Bound<'_, PyAny>) -> PyResult<()> {
        self.here(py)?;
        let export = Export::of(buffer, "discard")?;
        if export.readonly() {
            return Err(PyValueError::new_err("cannot discard a read-only buffer"));
        }
        let (address, bytes) = (export.address(), export.bytes());
        detached(py, || self.inner().discard(address, bytes))
    }

    #[pyo3(signature = (pages = None))]
    fn scan(&self, py: Python<'_>, pages: Option<u32>) -> PyResult<Stats> {
        self.here(py)?;
        interruptible(py, |pause| self.inner().scan(pages, &mut || pause.go_on())).map(Into::into)
    }

    #[pyo3(signature = (max_scans = 32))]
    fn settle(&self, py: Python<'_>, max_scans: u32) -> PyResult<Stats> {
        self.here(py)?;
        interruptible(py, |pause| {
            self.inner().settle(max_scans, &mut || pause.go_on())
        })
        .map(Into::into)
    }

    fn start(&self, py: Python<'_>) -> PyResult<()> {
        self.here(py)?;
        detached(py, || self.inner().start())
    }

    fn stop(&self, py: Python<'_>) -> PyResult<()> {
        self.here(py)?;
        detached(py, || self.inner().stop())
    }

    #[getter]
    fn run(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.here(py)?;
        let mode = match detached(py, || self.inner().run())? {
            RunMode::Stop => 0,
            RunMode::Merge => 1,
            RunMode::Unmerge => 2,
        };
        enumeration(py, "RunMode", mode)
    }

    #[setter]
    fn set_run(&self, mode: &Bound<'_, PyAny>) -> PyResult<()> {
        let py = mode.py();
        self.here(py)?;
        if !mode.is_instance_of::<PyInt>() {
            return Err(PyTypeError::new_err(format!(
                "run must be a RunMode (0, 1 or 2), got {}",
                mode.get_type().name()?
            )));
        }
        let mode = match mode.extract::<u8>() {
            Ok(0) => RunMode::Stop,
            Ok(1) => RunMode::Merge,
            Ok(2) => RunMode::Unmerge,
            _ => {
                return Err(PyValueError::new_err(format!(
                    "run must be 0 (stop), 1 (merge) or 2 (unmerge all), got {}",
                    mode.repr()?
                )));
            }
        };
        detached(py, || self.inner().set_run(mode))
    }

    #[getter]
    fn settings(slf: &Bound<'_, Self>) -> PyResult<Settings> {
        slf.get().here(slf.py())?;
        Ok(Settings(slf.clone().unbind()))
    }

    fn stats(&self, py: Python<'_>) -> PyResult<Stats> {
        self.here(py)?;
        detached(py, || self.inner().stats()).map(Into::into)
    }

    #[pyo3(signature = (on = true))]
    fn trace(&self, py: Python<'_>, on: bool) -> PyResult<()> {
        self.here(py)?;
        detached(py, || self.inner().set_events(on))
    }

    #[allow(clippy::type_complexity, reason = "the shape that Python gets")]
    fn events<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<(Vec<(&'static str, Bound<'py, PyDict>)>, u64)> {
        self.here(py)?;
        let (events, dropped) = py.detach(|| self.inner().take_events());
        let events = events
            .into_iter()
            .map(|event| Ok((event.name(), arguments(py, event)?)))
            .collect::<PyResult<_>>()?;
        Ok((events, dropped))
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.here(py)?;
        self.end(py)
    }

    #[getter]
    fn closed(&self, py: Python<'_>) -> PyResult<bool> {
        self.here(py)?;
        match py.detach(|| self.inner().run()) {
            Ok(_) => Ok(false),
            Err(Error::Closed) => Ok(true),
            Err(error) => Err(to_py(py, error)),
        }
    }

    fn __enter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_exc))]
    fn __exit__(&self, py: Python<'_>, _exc: &Bound<'_, PyAny>) -> PyResult<()> {
        // A `with` block that a child leaves too: the engine is not the child's to close.
        if self.is_ours() { self.end(py) } else { Ok(()) }
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        if !self.is_ours() {
            return "<pagemerge.Engine of the parent process>".to_owned();
        }
        match py.detach(|| self.inner().run()) {
            Ok(mode) => {
                let regions = self.held().len();
                format!("<pagemerge.Engine run={} regions={regions}>", mode as u8)
            }
            Err(_) => "<pagemerge.Engine closed>".to_owned(),
        }
    }

    /// Lets a region's buffer go while it stays registered. Only for a caller who has hooked the
    /// end of the memory's owner, and who calls `_forget` then.
    fn _let_go(&self, py: Python<'_>, region: &Region) -> PyResult<()> {
        self.here(py)?;
        let export = self.held().get_mut(&region.handle).and_then(Option::take);
        drop(export);
        Ok(())
    }

    /// Drops a region whose memory is about to be freed: its contents are lost.
    fn _forget(&self, py: Python<'_>, region: &Region) -> PyResult<()> {
        self.part(py, region.handle, pagemerge_linux::Engine::forget)
    }
}

/// The arguments of a trace event under the kernel's names; ids are numbers.
fn arguments(py: Python<'_>, event: Event) -> PyResult<Bound<'_, PyDict>> {
    let dict = PyDict::new(py);
    match event {
        Event::StartScan { seq, rmap_entries } | Event::StopScan { seq, rmap_entries } => {
            dict.set_item("seq", seq)?;
            dict.set_item("rmap_entries", rmap_entries)?;
        }
        Event::Enter { mm } | Event::Exit { mm } => dict.set_item("mm", mm.0)?,
        Event::MergeOnePage {
            pfn,
            rmap_item,
            mm,
            err,
        } => {
            dict.set_item("pfn", pfn.0)?;
            dict.set_item("rmap_item", rmap_item.0)?;
            dict.set_item("mm", mm.0)?;
            dict.set_item("err", err)?;
        }
        Event::MergeWithKsmPage {
            ksm_page,
            pfn,
            rmap_item,
            mm,
            err,
        } => {
            dict.set_item("ksm_page", ksm_page.map(|frame| frame.0))?;
            dict.set_item("pfn", pfn.0)?;
            dict.set_item("rmap_item", rmap_item.0)?;
            dict.set_item("mm", mm.0)?;
            dict.set_item("err", err)?;
        }
        Event::RemoveKsmPage { pfn } => dict.set_item("pfn", pfn.0)?,
        Event::RemoveRmapItem { pfn, rmap_item, mm } => {
            dict.set_item("pfn", pfn.0)?;
            dict.set_item("rmap_item", rmap_item.0)?;
            dict.set_item("mm", mm.0)?;
        }
        Event::Advisor {
            scan_time,
            pages_to_scan,
            cpu_percent,
        } => {
            dict.set_item("scan_time", scan_time)?;
            dict.set_item("pages_to_scan", pages_to_scan)?;
            dict.set_item("cpu_percent", cpu_percent)?;
        }
    }
    Ok(dict)
}
