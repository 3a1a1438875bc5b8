//! What the tests against the live kernel share: a harness that can say "not run here, because",
//! and runs every test in a process of its own.
//!
//! # Why a process for each test
//! The engine is of its process: one merging thread, one descriptor table, one set of mappings. The
//! tests fork, exit, close all descriptors, lower limits and enter memory groups. And a *hang* is
//! one of the bugs looked for: a process can be ended from outside, and the harness then shows where
//! each of its threads was in the kernel.
//!
//! # What a result means
//! * *ok*: the scenario ran to its end and its process left with 0.
//! * *ignored*: something that it needs is not here; the line says what. With `CI=true`, for root and
//!   on Linux 6.18 or later, that is a failure for everything such a shell has ([`Need::is_of_the_machine`] says what it
//!   may lack all the same).
//! * A scenario that finds out in its middle that it cannot go on panics: not run is never green.
//!
//! # What runs beside what
//! Cases run beside each other, but for those that change what the others feel
//! ([`Need::WholeMachine`]): while one of them runs, nothing else of its binary does, and cargo runs
//! binaries one after another.
//!
//! # Use
//! `cargo test -p pagemerge-linux --test findings -- f09`; `PAGEMERGE_SHOW=1` shows all output of
//! tests that pass, too. Lines that begin with "figure:" are shown always.

#![allow(
    dead_code,
    reason = "each test binary uses its own part of this module"
)]

pub(crate) mod busy;
pub(crate) mod engines;
pub(crate) mod faults;
pub(crate) mod os;
pub(crate) mod os_thread;
pub(crate) mod raw;
pub(crate) mod ring;

use libtest_mimic::{Arguments, Failed, Trial};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::{PoisonError, RwLock};
use std::time::{Duration, Instant};

/// Names the scenario that a re-executed test binary is to run.
pub(crate) const SCENARIO: &str = "PAGEMERGE_TEST_SCENARIO";

/// Something that a test needs and a machine may not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// The barrier that stops every access.
    FullBarrier,
    /// Root: page frame numbers, limits, devices.
    Root,
    /// A memory cgroup of version 1 with `memory.oom_control`.
    MemoryGroup,
    /// A zram device of our own to swap to.
    Zram,
    /// `io_uring` with registered buffers.
    IoUring,
    /// `O_DIRECT` on the file system of the temporary directory.
    DirectIo,
    /// Transparent huge pages on request.
    HugePages,
    /// `mseal`.
    Seal,
    /// `MADV_GUARD_INSTALL`.
    Guard,
    /// The switch for huge pages in shared memory.
    ShmemHuge,
    /// A memory cgroup of version 2.
    MemoryGroup2,
    /// A group that limits how many threads there are (cgroup version 1).
    ThreadGroup,
    /// Settings of the whole machine that other programs feel: on a machine that nobody else uses, and
    /// with no other case beside it.
    WholeMachine,
    /// The kernel's own same-page merging.
    KernelKsm,
    /// `memfd_secret`.
    SecretMemory,
}

impl Need {
    /// A root shell on a current kernel may lack it for reasons of its build or its devices.
    fn is_of_the_machine(self) -> bool {
        matches!(
            self,
            Self::MemoryGroup
                | Self::Zram
                | Self::IoUring
                | Self::HugePages
                | Self::ShmemHuge
                | Self::DirectIo
                | Self::MemoryGroup2
                | Self::ThreadGroup
                | Self::KernelKsm
                | Self::SecretMemory
        )
    }

    /// Why it is not here, if so.
    fn missing(self) -> Option<String> {
        let there = |path: &str| (!Path::new(path).exists()).then(|| format!("{path} is missing"));
        match self {
            Self::FullBarrier => {
                let can = pagemerge_linux::capabilities();
                (can.barrier != pagemerge_linux::Barrier::Full).then(|| {
                    let why = can.reasons.get("barrier").cloned().unwrap_or_default();
                    format!("no full barrier ({why})")
                })
            }
            Self::Root => (!os::is_root()).then(|| "not root".into()),
            Self::MemoryGroup => {
                there("/sys/fs/cgroup/memory/memory.oom_control").or_else(|| Self::Root.missing())
            }
            Self::Zram => there("/sys/class/zram-control/hot_add").or_else(|| Self::Root.missing()),
            Self::IoUring => ring::Ring::new().err().map(|e| format!("io_uring: {e}")),
            Self::DirectIo => os::direct_file(&[1])
                .err()
                .map(|e| format!("O_DIRECT: {e}")),
            Self::HugePages => {
                let path = "/sys/kernel/mm/transparent_hugepage/enabled";
                let now = fs::read_to_string(path).unwrap_or_default();
                (now.is_empty() || now.contains("[never]")).then(|| "no huge pages".into())
            }
            Self::Seal => os::seal_probe().err().map(|e| format!("mseal: {e}")),
            Self::Guard => os::guard_probe()
                .err()
                .map(|e| format!("MADV_GUARD_INSTALL: {e}")),
            Self::MemoryGroup2 => {
                let path = "/sys/fs/cgroup/cgroup.controllers";
                let listed = fs::read_to_string(path).unwrap_or_default();
                let there = listed.split_whitespace().any(|name| name == "memory");
                (!there)
                    .then(|| format!("no memory controller in {path} (cgroup version 1?)"))
                    .or_else(|| Self::Root.missing())
            }
            Self::ThreadGroup => {
                there("/sys/fs/cgroup/pids/cgroup.procs").or_else(|| Self::Root.missing())
            }
            Self::WholeMachine => {
                let asked = std::env::var_os("PAGEMERGE_WHOLE_MACHINE").is_some()
                    || std::env::var("CI").is_ok_and(|value| value == "true");
                (!asked)
                    .then(|| {
                        "changes vm.* for every program: PAGEMERGE_WHOLE_MACHINE=1 allows it".into()
                    })
                    .or_else(|| Self::Root.missing())
            }
            Self::KernelKsm => there("/sys/kernel/mm/ksm/run"),
            Self::SecretMemory => os::call(libc::SYS_memfd_secret, &[0])
                .map(os::own_fd)
                .err()
                .map(|e| format!("memfd_secret: {e}")),
            Self::ShmemHuge => there("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
                .or_else(|| Self::Root.missing()),
        }
    }
}

/// A test, or (when hidden) a scenario that a test starts.
#[derive(Debug)]
pub(crate) struct Case {
    name: &'static str,
    body: fn(),
    needs: Vec<Need>,
    seconds: u64,
    hidden: bool,
}

impl Case {
    pub(crate) fn new(name: &'static str, body: fn()) -> Self {
        Self {
            name,
            body,
            needs: vec![Need::FullBarrier],
            seconds: 120,
            hidden: false,
        }
    }

    pub(crate) fn needs(mut self, need: Need) -> Self {
        self.needs.push(need);
        self
    }

    /// Longer than a noisy machine takes; after that it counts as hanging.
    pub(crate) fn seconds(mut self, seconds: u64) -> Self {
        self.seconds = seconds;
        self
    }

    /// Not a test of its own: a process that a test starts by [`scenario`].
    pub(crate) fn hidden(mut self) -> Self {
        self.hidden = true;
        self
    }
}

/// A [`Case`] named like its function.
macro_rules! case {
    ($body:ident) => {
        $crate::support::Case::new(stringify!($body), $body)
    };
}
pub(crate) use case;

/// The `main` of a test binary.
pub(crate) fn run(cases: Vec<Case>) -> ExitCode {
    if let Ok(name) = std::env::var(SCENARIO) {
        os::die_with_parent();
        let case = cases
            .iter()
            .find(|case| case.name == name)
            .expect("a scenario of this binary");
        (case.body)();
        return ExitCode::SUCCESS;
    }
    let arguments = Arguments::from_args();
    let strict =
        std::env::var("CI").is_ok_and(|value| value == "true") && os::is_root() && is_current();
    let trials = cases
        .into_iter()
        .filter(|case| !case.hidden)
        .map(|case| trial(&case, strict));
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

/// Linux 6.18 or later, where everything that is tested exists.
fn is_current() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut parts = release
        .split('.')
        .map(|part| part.parse::<u32>().unwrap_or(0));
    (parts.next(), parts.next()) >= (Some(6), Some(18))
}

fn trial(case: &Case, strict: bool) -> Trial {
    let missing = case
        .needs
        .iter()
        .find_map(|need| need.missing().map(|why| (*need, why)));
    let (name, seconds) = (case.name, case.seconds);
    let alone = case.needs.contains(&Need::WholeMachine);
    match missing {
        None => Trial::test(name, move || {
            beside_others(alone, || one(name, Duration::from_secs(seconds)))
        }),
        Some((need, why)) if strict && !need.is_of_the_machine() => Trial::test(name, move || {
            Err(Failed::from(format!(
                "could not run, and CI=true says that it must: {why}"
            )))
        }),
        Some((_, why)) => Trial::test(name, || Ok(()))
            .with_kind(format!("not run: {why}"))
            .with_ignored_flag(true),
    }
}

/// Runs `body` beside others, or with no other case beside it. (A region of 10,000 mappings read its
/// list of mappings while another case let the machine have 20,000 only: it had no room for the list.)
fn beside_others<R>(alone: bool, body: impl FnOnce() -> R) -> R {
    static MACHINE: RwLock<()> = RwLock::new(());
    // A case that panicked here has left nothing half done.
    if alone {
        let _machine = MACHINE.write().unwrap_or_else(PoisonError::into_inner);
        body()
    } else {
        let _machine = MACHINE.read().unwrap_or_else(PoisonError::into_inner);
        body()
    }
}

fn one(name: &'static str, limit: Duration) -> Result<(), Failed> {
    let ended = scenario(name).end(limit);
    for line in ended
        .output
        .lines()
        .filter(|line| line.starts_with("figure:"))
    {
        println!("    {name}: {line}");
    }
    if ended.hung {
        return Err(Failed::from(format!(
            "hangs: not done after {limit:?}\n{}\n{}",
            ended.where_it_hung, ended.output
        )));
    }
    if !ended.status.success() {
        return Err(Failed::from(format!("{}\n{}", ended.status, ended.output)));
    }
    if std::env::var_os("PAGEMERGE_SHOW").is_some() {
        println!("{}", ended.output);
    }
    Ok(())
}

/// A running scenario.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    output: File,
}

/// How a scenario ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) hung: bool,
    pub(crate) where_it_hung: String,
    pub(crate) output: String,
}

impl Ended {
    /// # Panics
    /// Unless it left with 0.
    pub(crate) fn expect_success(&self) {
        let Self {
            status,
            hung,
            where_it_hung,
            output,
        } = self;
        assert!(!hung, "the scenario hangs\n{where_it_hung}\n{output}");
        assert!(
            status.success(),
            "the scenario ended with {status}\n{output}"
        );
        print!("{output}");
    }
}

/// Starts a scenario of this binary in a process (and process group) of its own.
pub(crate) fn scenario(name: &str) -> Running {
    scenario_with(name, &[])
}

/// The same, with variables in its environment.
pub(crate) fn scenario_with(name: &str, variables: &[(&str, &str)]) -> Running {
    // Not a pipe: a grandchild that outlives the scenario would keep the reader waiting.
    let output = os::scratch_file().expect("a file for the output");
    let (out, err) = (output.try_clone(), output.try_clone());
    let me = std::env::current_exe().expect("a test binary knows its own path");
    let child = Command::new(me)
        .env(SCENARIO, name)
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .stdout(out.expect("a second descriptor"))
        .stderr(err.expect("a third descriptor"))
        .process_group(0)
        .spawn()
        .expect("the test binary can be started again");
    Running { child, output }
}

impl Running {
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn is_over(&mut self) -> bool {
        self.child.try_wait().expect("our own child").is_some()
    }

    /// Waits; ends it by force when it takes longer than `limit`.
    pub(crate) fn end(mut self, limit: Duration) -> Ended {
        let start = Instant::now();
        let mut hung = false;
        let mut where_it_hung = String::new();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("our own child") {
                break status;
            }
            if start.elapsed() > limit {
                hung = true;
                where_it_hung = threads_of(self.child.id());
                os::kill_group(self.child.id());
                break self.child.wait().expect("our own child");
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        // Grandchildren that it left behind.
        os::kill_group(self.child.id());
        let mut output = String::new();
        let read = self
            .output
            .seek(SeekFrom::Start(0))
            .and_then(|_| self.output.read_to_string(&mut output));
        if let Err(error) = read {
            output = format!("(its output cannot be read: {error})");
        }
        if let Some(signal) = status.signal() {
            let _ = writeln!(output, "(ended by signal {signal})");
        }
        Ended {
            status,
            hung,
            where_it_hung,
            output,
        }
    }
}

/// What each thread of a process does in the kernel.
pub(crate) fn threads_of(process: u32) -> String {
    let mut text = String::new();
    let tasks = PathBuf::from(format!("/proc/{process}/task"));
    for entry in fs::read_dir(&tasks).into_iter().flatten().flatten() {
        let read = |name: &str| fs::read_to_string(entry.path().join(name)).unwrap_or_default();
        let (name, stack) = (read("comm"), read("stack"));
        let stack: Vec<_> = stack
            .lines()
            .take(8)
            .map(|l| l.trim_start_matches("[<0>] "))
            .collect();
        let _ = writeln!(
            text,
            "  thread {} in {}: {}",
            name.trim(),
            read("wchan"),
            stack.join(" < ")
        );
    }
    text
}
