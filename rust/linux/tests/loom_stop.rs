//! Goal: no order of events between threads loses a write, runs a fork in a window, leaves a caller
//! without an answer, or keeps a thread from ending.
//!
//! Method: the hand-offs of `src/handoff.rs`, compiled here with loom's atomics in place of the standard
//! library's, run against a small model of the kernel's part. loom goes through every interleaving, and
//! every value that a weaker memory order allows a load to see, up to a number of preemptions
//! (`LOOM_MAX_PREEMPTIONS`, 3 unless set; `make loom` asks for more).
//!
//! Each of these tests has been seen to fail with the hand-off broken: without the gate's Acquire or its
//! Release, with a helper that does not close the gate or is woken before it is told to stop, with a gate
//! opened before the second look at what is made once, with a slice of work after a stop.
#![cfg(loom)]

#[allow(dead_code, reason = "all of it is the library's")]
#[path = "../src/handoff.rs"]
mod handoff;

/// What the library's module of this name has from the standard library.
mod sync {
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering};
}

use handoff::{Gate, Helping, Next, Serves, Shut, Shuts, Turnstile, made_once, serve};
use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use loom::sync::{Arc, Condvar, Mutex, MutexGuard};
use loom::thread;
use std::collections::VecDeque;

/// Runs `test` in all interleavings.
fn explore(test: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(3);
    builder.check(test);
}

const OURS: u32 = 2;
const PARENTS: u32 = 1;

/// A gate, and what it guards: loom notices two threads in it at once, and one that cannot see what the
/// other has written.
struct Guarded {
    gate: Gate,
    data: UnsafeCell<u32>,
}

// SAFETY: that only one thread at a time is at the data, with the gate closed, is what is tested; loom
// checks each access.
#[allow(unsafe_code, reason = "the cell under test")]
unsafe impl Sync for Guarded {}

impl Guarded {
    fn new(holder: u32) -> Arc<Self> {
        Arc::new(Self {
            gate: Gate::of(AtomicU32::new(holder)),
            data: UnsafeCell::new(0),
        })
    }

    fn pass(&self) {
        let _shut = Shut::new(self);
        self.data.with_mut(|at| {
            // SAFETY: as above.
            #[allow(unsafe_code, reason = "the cell under test")]
            unsafe {
                *at += 1;
            }
        });
    }
}

impl Shuts for Guarded {
    fn close(&self) {
        self.gate.close(OURS, |_| thread::yield_now());
    }

    fn open(&self) {
        self.gate.open();
    }
}

#[test]
fn windows_and_forks_exclude_and_see_each_other() {
    explore(|| {
        let guarded = Guarded::new(0);
        let other = Arc::clone(&guarded);
        let forks = thread::spawn(move || {
            other.pass();
            other.pass();
        });
        guarded.pass();
        guarded.pass();
        forks.join().unwrap();
        guarded.pass();
        // SAFETY: the other thread has ended.
        #[allow(unsafe_code, reason = "the cell under test")]
        let passed = guarded.data.with(|at| unsafe { *at });
        assert_eq!(passed, 5);
    });
}

#[test]
fn gate_that_a_parent_held_is_taken_over_by_one_thread_at_a_time() {
    explore(|| {
        let guarded = Guarded::new(PARENTS);
        let others: Vec<_> = (0..2)
            .map(|_| {
                let other = Arc::clone(&guarded);
                thread::spawn(move || other.pass())
            })
            .collect();
        for other in others {
            other.join().unwrap();
        }
        guarded.pass();
    });
}

/// What threads do inside is whole, and seen, when a fork copies it: also for one who comes in while the fork
/// is under way.
#[test]
fn fork_finds_nobody_inside() {
    struct Books {
        turnstile: Turnstile,
        lock: Mutex<[u32; 2]>,
        /// What a fork copies takes no lock.
        copied: UnsafeCell<[u32; 2]>,
    }

    // SAFETY: that nobody is at it while a fork copies it is what is tested; loom checks each access.
    #[allow(unsafe_code, reason = "the cell under test")]
    unsafe impl Sync for Books {}

    impl Books {
        fn change(&self) {
            self.turnstile.enter(|_| thread::yield_now());
            let mut held = self.lock.lock().unwrap();
            held[0] += 1;
            self.copied.with_mut(|at| {
                // SAFETY: as above.
                #[allow(unsafe_code, reason = "the cell under test")]
                unsafe {
                    *at = *held;
                }
            });
            held[1] += 1;
            drop(held);
            self.turnstile.leave();
        }
    }

    explore(|| {
        let books = Arc::new(Books {
            turnstile: Turnstile::of(AtomicU32::new(0)),
            lock: Mutex::new([0; 2]),
            copied: UnsafeCell::new([0; 2]),
        });
        let other = Arc::clone(&books);
        let other = thread::spawn(move || {
            other.change();
            other.change();
        });
        books.turnstile.shut(|_| thread::yield_now());
        let copied = books.copied.with(|at| {
            // SAFETY: as above.
            #[allow(unsafe_code, reason = "the cell under test")]
            unsafe {
                *at
            }
        });
        let found = *books.lock.try_lock().expect("nobody is inside");
        assert_eq!(found[0], found[1], "a change is half done");
        assert_eq!(copied[0], found[0]);
        books.turnstile.open();
        other.join().unwrap();
        assert_eq!(*books.lock.lock().unwrap(), [2; 2]);
    });
}

/// The kernel's part in a quiet watch of one page.
struct Kernel {
    /// Its mapping lock.
    state: Mutex<Page>,
    /// Somebody waits for a fault, a wake-up, or to write.
    moved: Condvar,
    gate: Gate,
}

struct Page {
    bytes: u32,
    protected: bool,
    /// It shows a frame: a write gets a copy of its own.
    merged: Option<u32>,
    faults: u32,
    woken: bool,
}

impl Kernel {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(Page {
                bytes: 1,
                protected: true,
                merged: None,
                faults: 0,
                woken: false,
            }),
            moved: Condvar::new(),
            gate: Gate::of(AtomicU32::new(0)),
        })
    }

    fn page(&self) -> MutexGuard<'_, Page> {
        self.state.lock().unwrap()
    }

    /// A store by the program.
    fn write(&self, bytes: u32) {
        let mut page = self.page();
        let mut told = false;
        while page.protected {
            if !told {
                page.faults += 1;
                told = true;
                self.moved.notify_all();
            }
            page = self.moved.wait(page).unwrap();
        }
        page.merged = None;
        page.bytes = bytes;
    }

    fn read(&self) -> u32 {
        let page = self.page();
        page.merged.unwrap_or(page.bytes)
    }

    fn wake(&self) {
        self.page().woken = true;
        self.moved.notify_all();
    }

    /// A window over the page, as `window.rs` has it: what has been quiet is copied and mapped over, one
    /// system call after the other.
    fn window(&self) -> bool {
        Shuts::close(self);
        let quiet = self.page().protected;
        if quiet {
            let bytes = self.page().bytes;
            let mut page = self.page();
            page.merged = Some(bytes);
            page.protected = false;
            self.moved.notify_all();
        }
        Shuts::open(self);
        quiet
    }
}

impl Shuts for Kernel {
    fn close(&self) {
        self.gate.close(OURS, |_| thread::yield_now());
    }

    fn open(&self) {
        self.gate.open();
    }
}

/// One turn of the helper, as `watch.rs` has it: settles what was taken, then waits.
fn turn(kernel: &Kernel, taken: &mut u32, panics: &mut bool) {
    while *taken > 0 {
        {
            let _shut = Shut::new(kernel);
            kernel.page().protected = false;
            if std::mem::take(panics) {
                std::panic::resume_unwind(Box::new(()));
            }
            kernel.moved.notify_all();
        }
        *taken -= 1;
    }
    let mut page = kernel.page();
    while page.faults == 0 && !page.woken {
        page = kernel.moved.wait(page).unwrap();
    }
    if page.faults > 0 {
        *taken = std::mem::take(&mut page.faults);
    } else {
        page.woken = false;
    }
}

/// A write to a watched page, with or without a window over it, and a helper that panics once or not.
fn watch(window: bool, mut panics: bool) {
    let kernel = Kernel::new();
    let never = || AtomicBool::new(false);
    let helping = Arc::new(Helping::of(never(), never()));
    let helper = {
        let (kernel, helping) = (Arc::clone(&kernel), Arc::clone(&helping));
        thread::spawn(move || {
            let mut taken = 0;
            helping.help(|| turn(&kernel, &mut taken, &mut panics));
        })
    };
    let writer = {
        let kernel = Arc::clone(&kernel);
        thread::spawn(move || kernel.write(2))
    };
    if window {
        kernel.window();
    }
    writer.join().unwrap();
    assert_eq!(kernel.read(), 2, "a write is lost");
    helping.end(|| kernel.wake());
    helper.join().unwrap();
}

#[test]
fn write_to_a_watched_page_survives_the_window_over_it() {
    explore(|| watch(true, false));
}

#[test]
fn helper_that_is_told_to_end_ends_whatever_it_does() {
    explore(|| watch(false, false));
}

#[test]
fn helper_that_panics_lets_the_writer_go_on_and_opens_the_gate() {
    explore(|| watch(true, true));
}

/// The channel of jobs: a queue that knows when its last sender is gone, as the standard library's.
struct Queue<J> {
    state: Mutex<(VecDeque<J>, usize)>,
    moved: Condvar,
}

struct Sender<J>(Arc<Queue<J>>);

impl<J> Sender<J> {
    fn of(senders: usize) -> (Vec<Self>, Arc<Queue<J>>) {
        let queue = Arc::new(Queue {
            state: Mutex::new((VecDeque::new(), senders)),
            moved: Condvar::new(),
        });
        let all = (0..senders).map(|_| Self(Arc::clone(&queue))).collect();
        (all, queue)
    }

    fn send(&self, job: J) {
        self.0.state.lock().unwrap().0.push_back(job);
        self.0.moved.notify_all();
    }
}

impl<J> Drop for Sender<J> {
    fn drop(&mut self) {
        self.0.state.lock().unwrap().1 -= 1;
        self.0.moved.notify_all();
    }
}

impl<J> Queue<J> {
    /// A job; `None` once there are none and nobody can send any.
    fn take(&self) -> Option<J> {
        let mut state = self.state.lock().unwrap();
        loop {
            if let Some(job) = state.0.pop_front() {
                return Some(job);
            }
            if state.1 == 0 {
                return None;
            }
            state = self.moved.wait(state).unwrap();
        }
    }

    /// What is there at the moment when background work is due.
    fn look(&self) -> Next<J> {
        let mut state = self.state.lock().unwrap();
        state.0.pop_front().map_or(Next::Due, Next::Job)
    }
}

/// A stage with one background engine, which is due until it is stopped.
struct Stage {
    running: bool,
    slices: Arc<AtomicUsize>,
    most: usize,
}

impl Serves for Stage {
    type Due = ();

    fn due(&self) -> Option<()> {
        let slices = self.slices.load(Ordering::Relaxed);
        (self.running && slices < self.most).then_some(())
    }

    fn slice(&mut self, (): ()) {
        assert!(self.running, "a slice of work after the stop");
        self.slices.fetch_add(1, Ordering::Relaxed);
    }
}

type Job = Box<dyn FnOnce(&mut Stage) + Send>;

/// As `worker::call`: `None` when the job panicked.
fn call<R: Send + 'static>(
    jobs: &Sender<Job>,
    work: impl FnOnce(&mut Stage) -> R + Send + 'static,
) -> Option<R> {
    let (mut reply, answer) = Sender::<R>::of(1);
    let reply = reply.pop().expect("one was made");
    jobs.send(Box::new(move |stage| reply.send(work(stage))));
    answer.take()
}

#[test]
fn every_call_is_answered_and_a_stop_stops() {
    explore(|| {
        let slices = Arc::new(AtomicUsize::new(0));
        let (mut senders, inbox) = Sender::<Job>::of(2);
        let worker = {
            let slices = Arc::clone(&slices);
            thread::spawn(move || {
                let mut stage = Stage {
                    running: true,
                    slices,
                    most: 2,
                };
                serve(&mut stage, |due| match due {
                    Some(()) => inbox.look(),
                    None => inbox.take().map_or(Next::Gone, Next::Job),
                });
            })
        };
        let first = senders.pop().expect("two were made");
        let second = senders.pop().expect("two were made");
        let other = thread::spawn(move || {
            // The job panics: its caller must not wait for ever, and the others not at all.
            let answer = call(&second, |_| -> u32 {
                std::panic::resume_unwind(Box::new(()))
            });
            assert_eq!(answer, None);
        });
        let done = call(&first, |stage| {
            stage.running = false;
            7
        });
        assert_eq!(done, Some(7));
        let then = slices.load(Ordering::Relaxed);
        drop(first);
        other.join().unwrap();
        worker.join().unwrap();
        assert_eq!(
            slices.load(Ordering::Relaxed),
            then,
            "a slice after the stop"
        );
    });
}

#[test]
fn what_is_made_once_is_made_once_and_not_during_a_fork() {
    explore(|| {
        let guarded = Guarded::new(0);
        let made = Arc::new(AtomicU32::new(0));
        let get = |made: &AtomicU32| Some(made.load(Ordering::Acquire)).filter(|&it| it != 0);
        let make = move |guarded: &Guarded, made: &AtomicU32| {
            let got = made_once(
                || get(made),
                || Shut::new(guarded),
                || {
                    guarded.data.with_mut(|at| {
                        // SAFETY: as for `pass`.
                        #[allow(unsafe_code, reason = "the cell under test")]
                        unsafe {
                            *at += 1;
                            assert_eq!(*at, 1, "made a second time");
                        }
                    });
                    made.store(1, Ordering::Release);
                    Ok::<u32, ()>(1)
                },
            );
            assert_eq!(got, Ok(1));
        };
        let other = {
            let (guarded, made) = (Arc::clone(&guarded), Arc::clone(&made));
            thread::spawn(move || make(&guarded, &made))
        };
        // A fork: nothing is half made while it holds the gate.
        guarded.gate.close(OURS, |_| thread::yield_now());
        let there = get(&made).is_some();
        // SAFETY: as for `pass`.
        #[allow(unsafe_code, reason = "the cell under test")]
        let begun = guarded.data.with(|at| unsafe { *at }) == 1;
        assert_eq!(there, begun);
        guarded.gate.open();
        make(&guarded, &made);
        other.join().unwrap();
    });
}
