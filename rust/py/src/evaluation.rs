//! `pagemerge.evaluate()`: what merging would save, without changing anything.
//!
//! Figures go to Python as dictionaries; the classes that programs see are Python's
//! (`pagemerge._evaluate`), because they do nothing but hold them.

use crate::buffer::Export;
use crate::signals::interruptible;
use pagemerge_linux::evaluate;
use pagemerge_linux::evaluate::{FileOptions, FileProgress};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// See the type stub for user documentation.
#[pyfunction]
#[allow(
    clippy::needless_pass_by_value,
    reason = "arguments from Python come by value"
)]
pub(crate) fn evaluate_memory<'py>(
    py: Python<'py>,
    buffers: Vec<Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let exports = buffers
        .iter()
        .map(|buffer| Export::of(buffer, "evaluate"))
        .collect::<PyResult<Vec<_>>>()?;
    let ranges: Vec<_> = exports
        .iter()
        .map(|export| (export.address(), export.bytes()))
        .collect();
    let found = interruptible(py, |pause| {
        // SAFETY: the ranges must stay mapped until the call returns. `exports`, which hold them,
        // are dropped after that.
        #[allow(unsafe_code, reason = "the promise that the exports are held for")]
        unsafe {
            evaluate::evaluate_memory(&ranges, &mut || pause.go_on())
        }
    })?;
    drop(exports);
    let skipped: BTreeMap<_, _> = found
        .skipped
        .iter()
        .map(|(reason, pages)| (reason.name(), *pages))
        .collect();
    let dict = PyDict::new(py);
    dict.set_item("pages", found.pages)?;
    dict.set_item("present", found.present)?;
    dict.set_item("merged", found.duplicate)?;
    dict.set_item("zero", found.zero)?;
    dict.set_item("frames", found.frames)?;
    dict.set_item("bytes_saved", found.bytes_saved)?;
    dict.set_item("skipped", skipped)?;
    Ok(dict)
}

/// See the type stub for user documentation.
#[pyfunction]
#[allow(
    clippy::needless_pass_by_value,
    reason = "arguments from Python come by value"
)]
pub(crate) fn evaluate_files(
    py: Python<'_>,
    paths: Vec<PathBuf>,
    recursive: bool,
    page_size: usize,
    keep_going: bool,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'_, PyDict>> {
    let options = FileOptions {
        page_size,
        recursive,
        keep_going,
    };
    let found = interruptible(py, |pause| {
        pause.hurry();
        evaluate::evaluate_files(&paths, &options, &mut |done: &FileProgress| {
            pause.go_on_with(|py| match &progress {
                Some(progress) => progress
                    .call1(py, (done.bytes_done, done.bytes))
                    .map(|_| ()),
                None => Ok(()),
            })
        })
    })?;
    let files = PyList::empty(py);
    for file in found.files {
        let dict = PyDict::new(py);
        dict.set_item("path", file.path.to_string_lossy())?;
        dict.set_item("bytes", file.bytes)?;
        dict.set_item("pages", file.pages)?;
        dict.set_item("zero", file.zero)?;
        dict.set_item("twin_within", file.twin_within)?;
        dict.set_item("twin_elsewhere", file.twin_elsewhere)?;
        dict.set_item("unique", file.unique)?;
        files.append(dict)?;
    }
    let left_out = PyDict::new(py);
    for file in found.left_out {
        left_out.set_item(file.path.to_string_lossy(), file.message)?;
    }
    let dict = PyDict::new(py);
    dict.set_item("pages", found.pages)?;
    dict.set_item("present", found.pages)?;
    dict.set_item("merged", found.duplicate)?;
    dict.set_item("zero", found.zero)?;
    dict.set_item("frames", found.frames)?;
    dict.set_item("bytes_saved", found.bytes_saved)?;
    dict.set_item("files", files)?;
    dict.set_item("left_out", left_out)?;
    Ok(dict)
}
