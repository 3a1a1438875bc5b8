//! `pagemerge.Settings`: the tunables of an engine as attributes, and as keywords of `Engine`.
//!
//! Every tunable is one line of the table at the end; ranges are checked where they mean something,
//! in `pagemerge_core` and `pagemerge_linux`.

use crate::engine::Engine;
use crate::signals::detached;
use pagemerge_core::{AdvisorMode, TreeOrder};
use pagemerge_linux::{Barrier, EngineSettings, Remerge};
use pyo3::IntoPyObjectExt;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyInt, PyString};

/// A value of a tunable, from Python and back. `name` is for the message.
pub(crate) trait Value: Sized {
    fn from_python(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Self>;
    fn into_python(self, py: Python<'_>) -> PyResult<Py<PyAny>>;
}

fn wrong_type(name: &str, need: &str, value: &Bound<'_, PyAny>) -> PyErr {
    let kind = value
        .get_type()
        .name()
        .map_or_else(|_| "?".to_owned(), |kind| kind.to_string());
    PyTypeError::new_err(format!("{name} must be {need}, got {kind}"))
}

fn wrong_value(name: &str, need: &str, value: &Bound<'_, PyAny>) -> PyErr {
    let shown = value
        .repr()
        .map_or_else(|_| "?".to_owned(), |text| text.to_string());
    PyValueError::new_err(format!("{name} must be {need}, got {shown}"))
}

macro_rules! unsigned {
    ($($kind:ty),*) => {$(
        impl Value for $kind {
            fn from_python(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Self> {
                // numpy's integers are integers too.
                let number = value
                    .call_method0("__index__")
                    .ok()
                    .and_then(|number| number.cast_into::<PyInt>().ok())
                    .ok_or_else(|| wrong_type(name, "an integer", value))?;
                number.extract().map_err(|_| {
                    wrong_value(name, &format!("between 0 and {}", Self::MAX), value)
                })
            }

            fn into_python(self, py: Python<'_>) -> PyResult<Py<PyAny>> {
                self.into_py_any(py)
            }
        }
    )*};
}

unsigned!(u32, u64);

impl Value for bool {
    fn from_python(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Self> {
        if let Ok(value) = value.cast::<PyBool>() {
            return Ok(value.is_true());
        }
        match value.extract::<u8>() {
            Ok(0) => Ok(false),
            Ok(1) => Ok(true),
            // 2 is of the right type.
            _ if value.is_instance_of::<PyInt>() => Err(wrong_value(name, "True or False", value)),
            _ => Err(wrong_type(name, "True or False", value)),
        }
    }

    fn into_python(self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.into_py_any(py)
    }
}

macro_rules! choices {
    ($($kind:ident { $($variant:ident = $text:literal),* })*) => {$(
        impl Value for $kind {
            fn from_python(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Self> {
                const NEED: &str = concat!("one of", $(" \"", $text, "\"",)*);
                let text = value.cast::<PyString>().map_err(|_| wrong_type(name, NEED, value))?;
                match &*text.to_cow()? {
                    $($text => Ok(Self::$variant),)*
                    _ => Err(wrong_value(name, NEED, value)),
                }
            }

            fn into_python(self, py: Python<'_>) -> PyResult<Py<PyAny>> {
                let text = match self { $(Self::$variant => $text),* };
                enumeration(py, stringify!($kind), text)
            }
        }
    )*};
}

choices! {
    TreeOrder { Digest = "digest", Content = "content" }
    AdvisorMode { None = "none", ScanTime = "scan-time" }
    Remerge { Quiet = "quiet", Never = "never", Always = "always" }
    Barrier { Full = "full", User = "user", None = "none" }
}

impl<T: Value> Value for Option<T> {
    fn from_python(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Self> {
        if value.is_none() {
            Ok(None)
        } else {
            T::from_python(name, value).map(Some)
        }
    }

    fn into_python(self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.map_or_else(|| Ok(py.None()), |value| value.into_python(py))
    }
}

/// The member of `pagemerge.<kind>` that equals `value`.
pub(crate) fn enumeration<'py>(
    py: Python<'py>,
    kind: &str,
    value: impl IntoPyObjectExt<'py>,
) -> PyResult<Py<PyAny>> {
    Ok(py
        .import("pagemerge._enums")?
        .getattr(kind)?
        .call1((value.into_py_any(py)?,))?
        .unbind())
}

/// Refuses a name that is no tunable, naming those that are nearly it.
fn unknown(py: Python<'_>, name: &str) -> String {
    let near = py
        .import("difflib")
        .and_then(|difflib| difflib.call_method1("get_close_matches", (name, NAMES.to_vec())))
        .and_then(|near| near.extract::<Vec<String>>())
        .unwrap_or_default();
    if near.is_empty() {
        format!(
            "there is no setting {name:?}; there are: {}",
            NAMES.join(", ")
        )
    } else {
        format!(
            "there is no setting {name:?}; did you mean {}?",
            near.join(" or ")
        )
    }
}

/// The settings that keywords describe, beginning with `settings`.
///
/// Asking for a number of pages takes the advisor's hands off it: `pages_to_scan` without
/// `advisor_mode` means `advisor_mode="none"`, which the kernel demands to be said.
pub(crate) fn from_keywords(
    mut settings: EngineSettings,
    keywords: Option<&Bound<'_, PyDict>>,
) -> PyResult<EngineSettings> {
    let Some(keywords) = keywords else {
        return Ok(settings);
    };
    if keywords.contains("pages_to_scan")? && !keywords.contains("advisor_mode")? {
        settings.scan.advisor_mode = AdvisorMode::None;
    }
    for (name, value) in keywords {
        let name: String = name.extract()?;
        Tunable::parse(&name, &value)?.store(&mut settings);
    }
    Ok(settings)
}

/// Exactly the kernel's settings, as keywords for `Engine`.
#[pyfunction]
pub(crate) fn kernel_defaults(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    as_dict(py, &EngineSettings::kernel_defaults())
}

/// A live view of an engine's settings. See the type stub for user documentation.
#[pyclass(module = "pagemerge", frozen)]
pub(crate) struct Settings(pub(crate) Py<Engine>);

impl Settings {
    fn read(&self, py: Python<'_>) -> PyResult<EngineSettings> {
        let engine = self.0.get();
        detached(py, || engine.inner().settings())
    }

    /// Changes one setting, without losing what another thread changes at the same time.
    fn change(&self, name: &str, value: &Bound<'_, PyAny>) -> PyResult<()> {
        // Read before the engine is asked, because reading it may run Python code.
        let parsed = Tunable::parse(name, value)?;
        self.0
            .get()
            .change_settings(value.py(), move |settings| parsed.store(settings))
    }
}

macro_rules! table {
    ($($name:ident, $setter:ident, $($field:ident).+, $kind:ty;)*) => {
        /// Every tunable by its name in Python.
        const NAMES: &[&str] = &[$(stringify!($name)),*];

        /// A value for one tunable, read but not yet stored.
        #[allow(non_camel_case_types, reason = "the names are the settings' own")]
        enum Tunable {
            $($name($kind),)*
        }

        impl Tunable {
            /// Reads the value for the tunable called `name`.
            fn parse(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Self> {
                match name {
                    $(stringify!($name) => {
                        <$kind as Value>::from_python(name, value).map(Self::$name)
                    })*
                    _ => Err(PyValueError::new_err(unknown(value.py(), name))),
                }
            }

            fn store(self, settings: &mut EngineSettings) {
                match self {
                    $(Self::$name(value) => settings.$($field).+ = value,)*
                }
            }
        }

        /// All of them, as keywords for `Engine`.
        fn as_dict<'py>(
            py: Python<'py>, settings: &EngineSettings,
        ) -> PyResult<Bound<'py, PyDict>> {
            let dict = PyDict::new(py);
            $(dict.set_item(
                stringify!($name),
                settings.$($field).+.clone().into_python(py)?,
            )?;)*
            Ok(dict)
        }

        #[pymethods]
        impl Settings {
            $(
                #[getter]
                fn $name(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
                    self.read(py)?.$($field).+.clone().into_python(py)
                }

                #[setter($name)]
                fn $setter(&self, value: &Bound<'_, PyAny>) -> PyResult<()> {
                    self.change(stringify!($name), value)
                }
            )*

            fn as_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
                let mut settings = self.read(py)?;
                settings.scan = settings.scan.for_a_new_scanner();
                as_dict(py, &settings)
            }

            fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
                let items = as_dict(py, &self.read(py)?)?
                    .iter()
                    .map(|(name, value)| Ok(format!("{name}={}", value.str()?)))
                    .collect::<PyResult<Vec<String>>>()?;
                Ok(format!("Settings({})", items.join(", ")))
            }
        }
    };
}

table! {
    pages_to_scan, set_pages_to_scan, scan.pages_to_scan, u32;
    sleep_millisecs, set_sleep_millisecs, scan.sleep_millisecs, u32;
    merge_across_nodes, set_merge_across_nodes, scan.merge_across_nodes, bool;
    max_page_sharing, set_max_page_sharing, scan.max_page_sharing, u32;
    use_zero_pages, set_use_zero_pages, scan.use_zero_pages, bool;
    smart_scan, set_smart_scan, scan.smart_scan, bool;
    stable_node_chains_prune_millisecs, set_stable_node_chains_prune_millisecs,
        scan.stable_node_chains_prune_millisecs, u32;
    advisor_mode, set_advisor_mode, scan.advisor_mode, AdvisorMode;
    advisor_max_cpu, set_advisor_max_cpu, scan.advisor_max_cpu, u32;
    advisor_min_pages_to_scan, set_advisor_min_pages_to_scan,
        scan.advisor_min_pages_to_scan, u64;
    advisor_max_pages_to_scan, set_advisor_max_pages_to_scan,
        scan.advisor_max_pages_to_scan, u64;
    advisor_target_scan_time, set_advisor_target_scan_time, scan.advisor_target_scan_time, u64;
    tree_order, set_tree_order, scan.tree_order, TreeOrder;
    write_tracking, set_write_tracking, scan.write_tracking, bool;
    lagging_records, set_lagging_records, scan.lagging_records, bool;
    zero_only, set_zero_only, scan.zero_only, bool;
    barrier, set_barrier, barrier, Option<Barrier>;
    remerge, set_remerge, remerge, Remerge;
    quiet_millisecs, set_quiet_millisecs, quiet_millisecs, u32;
    max_pause_micros, set_max_pause_micros, max_pause_micros, u32;
    reserved_mappings, set_reserved_mappings, reserved_mappings, Option<u64>;
    thp_min_duplicates, set_thp_min_duplicates, thp_min_duplicates, u32;
    threads, set_threads, threads, u32;
}
