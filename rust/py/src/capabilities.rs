//! `pagemerge.capabilities()`: what this machine and these privileges allow, and why not more.

use crate::settings::enumeration;
use pyo3::prelude::*;
use std::collections::BTreeMap;

/// What is possible here. See the type stub for user documentation.
#[pyclass(module = "pagemerge", frozen)]
pub(crate) struct Capabilities(pagemerge_linux::Capabilities);

#[pymethods]
impl Capabilities {
    #[getter]
    fn barrier(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        enumeration(py, "Barrier", self.0.barrier.name())
    }

    #[getter]
    fn write_tracking(&self) -> bool {
        self.0.write_tracking
    }

    #[getter(r#move)]
    fn move_pages(&self) -> bool {
        self.0.move_pages
    }

    #[getter]
    fn max_map_count(&self) -> u64 {
        self.0.max_map_count
    }

    #[getter]
    fn kernel_ksm(&self) -> bool {
        self.0.kernel_ksm
    }

    #[getter]
    fn page_size(&self) -> usize {
        self.0.page_size
    }

    #[getter]
    fn kernel(&self) -> &str {
        &self.0.kernel
    }

    #[getter]
    fn reasons(&self) -> BTreeMap<&'static str, String> {
        self.0.reasons.clone()
    }

    fn __repr__(&self) -> String {
        format!(
            "<pagemerge.Capabilities barrier={} write_tracking={} move={} max_map_count={} \
             kernel_ksm={}>",
            self.0.barrier,
            self.0.write_tracking,
            self.0.move_pages,
            self.0.max_map_count,
            self.0.kernel_ksm
        )
    }
}

/// Probes once for each process; see the type stub for user documentation.
#[pyfunction]
pub(crate) fn capabilities(py: Python<'_>) -> Capabilities {
    Capabilities(py.detach(pagemerge_linux::capabilities))
}
