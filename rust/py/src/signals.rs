//! Long calls: the GIL is released, and Ctrl-C is honoured between batches, never inside one.

use crate::error::to_py;
use pagemerge_linux::Error;
use pyo3::prelude::*;
use std::time::{Duration, Instant};

/// How often a long call looks for signals. Attaching may wait for a busy thread's turn to end
/// (5 ms by default), so it must not happen after every batch.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What a long call does between two batches.
pub(crate) struct Pause {
    /// `None`: the next look is due at once.
    last: Option<Instant>,
    raised: Option<PyErr>,
}

impl Pause {
    /// Looks for signals now and then; `false` ends the call, because a handler has raised.
    pub(crate) fn go_on(&mut self) -> bool {
        self.go_on_with(|_| Ok(()))
    }

    /// Makes the next look due, so that even a short call shows that it has begun.
    pub(crate) fn hurry(&mut self) {
        self.last = None;
    }

    /// The same as [`go_on`](Self::go_on), with something to do on the way, which may raise, too.
    pub(crate) fn go_on_with(&mut self, also: impl FnOnce(Python<'_>) -> PyResult<()>) -> bool {
        if self.last.is_some_and(|last| last.elapsed() < LOOK_EVERY) {
            return true;
        }
        self.last = Some(Instant::now());
        // `None`: the interpreter is ending, and nobody waits for the result any more.
        match Python::try_attach(|py| py.check_signals().and_then(|()| also(py))) {
            Some(Ok(())) => true,
            Some(Err(error)) => {
                self.raised = Some(error);
                false
            }
            None => false,
        }
    }
}

/// Runs `call` without the GIL. When the call was ended by an exception raised between two batches,
/// that is what the caller gets.
pub(crate) fn interruptible<T: Send>(
    py: Python<'_>,
    call: impl Send + FnOnce(&mut Pause) -> Result<T, Error>,
) -> PyResult<T> {
    let (result, raised) = py.detach(move || {
        let mut pause = Pause {
            last: Some(Instant::now()),
            raised: None,
        };
        (call(&mut pause), pause.raised)
    });
    match raised {
        Some(error) => Err(error),
        None => result.map_err(|error| to_py(py, error)),
    }
}

/// Runs `call` without the GIL.
pub(crate) fn detached<T: Send>(
    py: Python<'_>,
    call: impl Send + FnOnce() -> Result<T, Error>,
) -> PyResult<T> {
    py.detach(call).map_err(|error| to_py(py, error))
}
