//! Settings as Python sets them: the bindings' own code, in an interpreter of our own. What is done and
//! what is checked is in `settings_driver.py`, which runs with the built module, too.
#![allow(
    unsafe_code,
    reason = "the bindings are put into an interpreter's table before it starts"
)]

use pyo3::ffi;
use pyo3::prelude::*;
use std::sync::OnceLock;

// The bindings: only their entry point is used, by its name.
use ::_core as _;

unsafe extern "C" {
    fn PyInit__core() -> *mut ffi::PyObject;
}

/// Finds the bindings under the name that the package has for them, which is one inside of it: built-in
/// modules are looked for by themselves only.
const FINDER: &std::ffi::CStr = c"
import importlib.machinery, importlib.util, sys
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == 'pagemerge._core':
            return importlib.util.spec_from_loader(name, importlib.machinery.BuiltinImporter)
sys.meta_path.insert(0, Finder)
";

fn driver() -> &'static Py<PyAny> {
    static RUN: OnceLock<Py<PyAny>> = OnceLock::new();
    RUN.get_or_init(|| {
        // SAFETY: no interpreter has started; the name lives for ever, and the function is what
        // an interpreter wants to find behind such a name: the bindings' own macro made it.
        let status =
            unsafe { ffi::PyImport_AppendInittab(c"pagemerge._core".as_ptr(), Some(PyInit__core)) };
        assert_eq!(status, 0, "no room in the table of built-in modules");
        Python::initialize();
        Python::attach(start).unwrap_or_else(|error| panic!("cannot start: {error}"))
    })
}

fn start(py: Python<'_>) -> PyResult<Py<PyAny>> {
    let sys = py.import("sys")?;
    let here = env!("CARGO_MANIFEST_DIR");
    for (at, more) in [here.to_owned(), format!("{here}/../python")]
        .iter()
        .enumerate()
    {
        sys.getattr("path")?.call_method1("insert", (at, more))?;
    }
    py.run(FINDER, None, None)?;
    Ok(py.import("settings_driver")?.getattr("run")?.unbind())
}

/// Does to engines what `input` describes.
///
/// # Panics
/// When settings are not what they must be.
pub fn run(input: &[u8]) {
    let run = driver();
    Python::attach(|py| {
        if let Err(error) = run.call1(py, (input,)) {
            error.print(py);
            panic!("the driver has found something");
        }
    });
}
