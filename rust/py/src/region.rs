//! `pagemerge.Region`: a registered buffer.

use crate::buffer::Export;
use crate::engine::Engine;
use crate::signals::detached;
use crate::stats::RegionStats;
use pagemerge_linux::RegionHandle;
use pyo3::prelude::*;

/// Memory registered with an engine. See the type stub for user documentation.
#[pyclass(module = "pagemerge", frozen, weakref)]
pub(crate) struct Region {
    pub(crate) engine: Py<Engine>,
    pub(crate) handle: RegionHandle,
    #[pyo3(get)]
    domain: String,
}

impl Region {
    pub(crate) fn new(engine: Py<Engine>, handle: RegionHandle, domain: String) -> Self {
        Self {
            engine,
            handle,
            domain,
        }
    }
}

#[pymethods]
impl Region {
    #[getter]
    fn pages(&self) -> u32 {
        self.handle.pages
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.handle.pages as usize * pagemerge_linux::page_size()
    }

    #[getter]
    fn engine(&self, py: Python<'_>) -> Py<Engine> {
        self.engine.clone_ref(py)
    }

    #[getter]
    fn registered(&self) -> bool {
        self.engine.get().holds(self.handle)
    }

    fn stats(&self, py: Python<'_>) -> PyResult<RegionStats> {
        let engine = self.engine.get();
        detached(py, || engine.inner().region_stats(self.handle)).map(Into::into)
    }

    fn exclude(&self, py: Python<'_>, buffer: &Bound<'_, PyAny>) -> PyResult<u32> {
        let export = Export::of(buffer, "exclude")?;
        let (address, bytes) = (export.address(), export.bytes());
        let engine = self.engine.get();
        detached(py, || engine.inner().exclude(self.handle, address, bytes))
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        if !self.registered() {
            return Ok(());
        }
        self.engine
            .get()
            .part(py, self.handle, pagemerge_linux::Engine::unregister)
    }

    fn __enter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_exc))]
    fn __exit__(&self, py: Python<'_>, _exc: &Bound<'_, PyAny>) -> PyResult<()> {
        self.close(py)
    }

    fn __repr__(&self) -> String {
        format!(
            "<pagemerge.Region of {} pages, domain {:?}, {}>",
            self.handle.pages,
            self.domain,
            if self.registered() {
                "registered"
            } else {
                "not registered"
            }
        )
    }
}
