//! The merging thread: one for each process, and the only place that touches registered memory.
//!
//! Synchronous calls run here too, as jobs, for three reasons:
//! * **Descriptors.** The thread has a descriptor table of its own, so that a program which closes
//!   descriptors it does not know (daemons do) cannot close a userfaultfd in a window, nor make our
//!   memfd's number its own file's (finding F12). Whatever owns a descriptor lives on this thread
//!   and is dropped on it.
//! * **No locks.** All state of all engines is confined to this thread, so none of it needs a lock
//!   that another thread may hold while it waits for a window.
//! * **Calm.** Every signal is blocked here and nobody can cancel the thread, so a window always
//!   closes. It keeps the program's own priority: at nice 19 a window stayed open for 61 ms.
//!
//! # Work
//! Jobs run in the order in which they arrive, each to its end; callers split long work into slices
//! so that others, and `stop`, get their turn. Between jobs the thread runs one slice of whichever
//! background engine is due.
//!
//! # Invariants
//! * The thread never ends while the process lives, and nothing on it waits for another thread of
//!   the program.
//! * A panic in a job is caught: windows have put their pages back while unwinding, the engine
//!   concerned is closed to further calls, and the caller gets an error.

use crate::ballast::{self, Ballast};
use crate::engine::EngineState;
use crate::error::Error;
use crate::fork::{self, Gate};
use crate::handoff::{self, Next, Serves};
use crate::sys;
use crate::sys::leaked::Leaked;
use crate::sys::phase::{Phase, enter};
use std::any::Any;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::Instant;

/// How often a broken engine tries to let those go who wait for its pages.
const LETTING_GO_TRIES: u32 = 3;

type Job = Box<dyn FnOnce(&mut Stage) + Send>;

/// The way to the thread of this process; empty before the first engine and in a fork child.
static WORKER: Leaked<Worker> = Leaked::empty();

/// The thread of one process: a raw fork's child, which no handler has told, sees that it is not its
/// own.
struct Worker {
    process: u32,
    jobs: Sender<Job>,
}

fn own() -> Option<&'static Worker> {
    WORKER
        .get()
        .filter(|worker| worker.process == std::process::id())
}

/// Held by whoever starts the thread, and across a fork, so that a child never finds it half
/// started.
static STARTING: Gate = Gate::new();

pub(crate) fn hold_start() {
    STARTING.close();
}

pub(crate) fn free_start() {
    STARTING.open();
}

/// In a fork child: the thread and all that it has are the parent's. Leaks the way to it on purpose.
pub(crate) fn detach() {
    WORKER.forget();
}

/// What lives on the merging thread.
#[derive(Default)]
pub(crate) struct Stage {
    engines: HashMap<u64, Entry>,
}

enum Entry {
    Alive(Box<EngineState>),
    /// A panic left it in an unknown state. It is kept, not dropped: pages may be merged onto its
    /// frames, and they must stay.
    Broken(
        String,
        #[allow(dead_code, reason = "kept alive, never used")] Box<EngineState>,
    ),
}

impl Stage {
    pub(crate) fn add(&mut self, id: u64, engine: EngineState) {
        self.engines.insert(id, Entry::Alive(Box::new(engine)));
    }

    pub(crate) fn remove(&mut self, id: u64) {
        if let Some(Entry::Alive(_)) = self.engines.get(&id) {
            self.engines.remove(&id);
        }
    }

    /// All engines that are in a known state.
    pub(crate) fn engines(&self) -> impl Iterator<Item = &EngineState> {
        self.engines.values().filter_map(|entry| match entry {
            Entry::Alive(engine) => Some(&**engine),
            Entry::Broken(..) => None,
        })
    }

    /// Runs `work` on one engine; a panic in it closes that engine for good.
    pub(crate) fn on<R>(
        &mut self,
        id: u64,
        work: impl FnOnce(&mut EngineState) -> R,
    ) -> Result<R, Error> {
        let engine = match self.engines.get_mut(&id) {
            None => return Err(Error::Closed),
            Some(Entry::Broken(why, _)) => return Err(Error::Worker(why.clone())),
            Some(Entry::Alive(engine)) => engine,
        };
        match catch_unwind(AssertUnwindSafe(|| work(engine))) {
            Ok(done) => Ok(done),
            Err(panic) => {
                let why = panic_text(panic.as_ref());
                if let Some(Entry::Alive(mut engine)) = self.engines.remove(&id) {
                    // What windows have left behind would make whoever touches it wait for ever.
                    let mut let_go = || catch_unwind(AssertUnwindSafe(|| engine.let_waiters_go()));
                    let _ = (0..LETTING_GO_TRIES).any(|_| let_go().is_ok());
                    self.engines.insert(id, Entry::Broken(why.clone(), engine));
                }
                Err(Error::Worker(why))
            }
        }
    }

    fn serve(&mut self, jobs: &Receiver<Job>) {
        let mut ballast = Ballast::default();
        handoff::serve(self, |due| {
            ballast.take();
            let job = match due {
                None => jobs.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some((at, _)) => jobs.recv_timeout(at.saturating_duration_since(Instant::now())),
            };
            ballast.spend();
            match job {
                Ok(job) => Next::Job(job),
                Err(RecvTimeoutError::Timeout) => Next::Due,
                // The sender is leaked in a static, so this does not happen.
                Err(RecvTimeoutError::Disconnected) => Next::Gone,
            }
        });
    }
}

impl Serves for Stage {
    type Due = (Instant, u64);

    /// When the next background engine is due.
    fn due(&self) -> Option<(Instant, u64)> {
        self.engines
            .iter()
            .filter_map(|(id, entry)| match entry {
                Entry::Alive(engine) => engine.due().map(|at| (at, *id)),
                Entry::Broken(..) => None,
            })
            .min()
    }

    fn slice(&mut self, (_, id): (Instant, u64)) {
        if let Err(error) = self.on(id, EngineState::background_slice) {
            tracing::error!(%error, "background merging ended");
        }
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a message".into())
}

/// Somebody starts the thread. Also a panic gives the gate free: every fork waits for it.
struct Starting(());

impl Starting {
    fn begin() -> Self {
        hold_start();
        Self(())
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        free_start();
    }
}

fn start() -> Result<Sender<Job>, Error> {
    let _phase = enter(Phase::Start);
    fork::watch_forks()?;
    let (jobs, inbox) = mpsc::channel::<Job>();
    let (ready, started) = mpsc::channel();
    sys::thread::spawn_isolated("pagemerge", move |table| {
        let go = table.is_ok();
        // The starter waits for this very message.
        let _ = ready.send(table);
        if go {
            Stage::default().serve(&inbox);
        }
    })
    .map_err(|e| Error::os("cannot start the merging thread", e))?;
    started
        .recv()
        .map_err(|_| Error::Worker("it did not start".into()))?
        .map_err(|e| {
            let what = "cannot give the merging thread a descriptor table of its own \
                        (close_range, Linux 5.9)";
            Error::os(what, e.into())
        })?;
    Ok(jobs)
}

fn sender() -> Result<Sender<Job>, Error> {
    handoff::made_once(
        || own().map(|worker| worker.jobs.clone()),
        Starting::begin,
        || {
            start().inspect(|jobs| {
                WORKER.set(Worker {
                    process: std::process::id(),
                    jobs: jobs.clone(),
                });
            })
        },
    )
}

/// Runs `work` on the merging thread and waits for its result.
pub(crate) fn call<R: Send + 'static>(
    work: impl FnOnce(&mut Stage) -> R + Send + 'static,
) -> Result<R, Error> {
    if !ballast::has_room_for_a_job() {
        return Err(Error::no_memory("hand work to the merging thread"));
    }
    let (reply, answer) = mpsc::channel();
    let job: Job = Box::new(move |stage| {
        // A panic in an engine's work has been caught already: this one was outside of it.
        let result = catch_unwind(AssertUnwindSafe(|| work(stage)));
        // The caller waits for this very message.
        let _ = reply.send(result.map_err(|panic| panic_text(panic.as_ref())));
    });
    sender()?
        .send(job)
        .map_err(|_| Error::Worker("it is gone".into()))?;
    answer
        .recv()
        .map_err(|_| Error::Worker("it is gone".into()))?
        .map_err(Error::Worker)
}

/// Has `work` done on the merging thread, and does not wait for it.
pub(crate) fn post(work: impl FnOnce(&mut Stage) + Send + 'static) -> Result<(), Error> {
    if !ballast::has_room_for_a_job() {
        return Err(Error::no_memory("hand work to the merging thread"));
    }
    sender()?
        .send(Box::new(work))
        .map_err(|_| Error::Worker("it is gone".into()))
}

/// Has `work` done on the merging thread, with the engine called `id` if there still is one that works, and
/// waits for nothing. In a child of the process that has the thread it is not done.
pub(crate) fn post_to(id: u64, work: impl FnOnce(Option<&mut EngineState>) + Send + 'static) {
    let Some(worker) = own() else { return };
    let job: Job = Box::new(move |stage| {
        let mut work = Some(work);
        let on = stage.on(id, |engine| work.take().map(|work| work(Some(engine))));
        match on {
            Ok(_) => {}
            Err(Error::Closed) => {
                if let Some(work) = work {
                    work(None);
                }
            }
            Err(error) => tracing::error!(%error, "an engine was left a note and failed"),
        }
    });
    // Nobody reads notes any more: the process is ending.
    let _ = worker.jobs.send(job);
}

/// Runs `work` on the merging thread, on the engine called `id`, and waits for its result.
pub(crate) fn call_engine<R: Send + 'static>(
    id: u64,
    work: impl FnOnce(&mut EngineState) -> Result<R, Error> + Send + 'static,
) -> Result<R, Error> {
    call(move |stage| stage.on(id, work))??
}
