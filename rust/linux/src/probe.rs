//! What this kernel and these privileges allow, found by trying, once.
//!
//! Nothing is chosen silently: whatever is not there has an entry in [`Capabilities::reasons`],
//! which says what was tried, what the kernel answered, and what to do about it.
//!
//! # Departures from guessing
//! No kernel version is compared anywhere: features are backported, and switched off by security
//! modules and by seccomp. What counts is that the thing worked on a page of our own.
//!
//! # Smaller kernels
//! The environment variable `PAGEMERGE_PRETEND` takes things away that are there, so that tests can
//! see a smaller kernel: a list, separated by commas, of the words in [`Pretend`]. What was taken
//! away like this says so in its reason.

use crate::settings::Barrier;
use crate::sys::leaked::Leaked;
use crate::sys::mapping::{Advice, MapStop, Mapping, Protection};
use crate::sys::memfd::{CreateStop, Memfd};
use crate::sys::pagemap::{Categories, PageRegion, Pagemap, Query, ScanStop};
use crate::sys::phase::{Phase, enter};
use crate::sys::process::{self, Resource};
use crate::sys::uffd::{Features, Modes, MoveStop, OpenStop, Source, Userfaultfd, Wake};
use crate::sys::{Span, files, page_size};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;

/// What can be done here. See [`capabilities`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// The best barrier to be had: `Full` or `None`. (`User` is never chosen unasked: see
    /// `user_barrier`.)
    pub barrier: Barrier,
    /// Whether `Barrier::User` may be asked for.
    pub user_barrier: bool,
    /// Whether the kernel says which pages were written since they were last looked at.
    pub write_tracking: bool,
    /// Whether pages can be moved out of the program's reach (`UFFDIO_MOVE`).
    pub move_pages: bool,
    /// Whether the kernel tells about many pages in one call (`PAGEMAP_SCAN`); else each page's
    /// entry is read.
    pub pagemap_scan: bool,
    /// Whether frames can be made at all.
    pub frames: bool,
    /// Mappings that a process may have (`vm.max_map_count`).
    pub max_map_count: u64,
    /// Whether the kernel has same-page merging of its own.
    pub kernel_ksm: bool,
    /// Bytes in a page.
    pub page_size: usize,
    /// The kernel's release.
    pub kernel: String,
    /// For each thing that is not there, by the name of its field (`move_pages` as `move`): why,
    /// and what to do.
    pub reasons: BTreeMap<&'static str, String>,
    /// Where userfaultfds for the barrier come from.
    pub(crate) full: Option<Source>,
    /// Where userfaultfds for write tracking come from.
    pub(crate) tracking: Option<Source>,
    /// What the kernel's userfaultfd can do.
    pub(crate) features: Features,
    /// Whether a page scan tells guard pages.
    pub(crate) guard_pages: bool,
}

/// Things to be taken away, by the words of `PAGEMERGE_PRETEND`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pretend {
    /// `no-uffd`: no userfaultfd at all.
    no_uffd: bool,
    /// `user-uffd`: none that stops the kernel's own accesses.
    user_uffd: bool,
    /// `no-move`.
    no_move: bool,
    /// `no-wp-async`.
    no_wp_async: bool,
    /// `no-pagemap-scan`.
    no_pagemap_scan: bool,
    /// `no-memfd`.
    no_memfd: bool,
    /// Words that mean nothing.
    unknown: Vec<String>,
}

impl Pretend {
    /// Nothing is taken away.
    #[cfg(test)]
    const NOTHING: &'static str = "";

    pub(crate) fn parse(text: &str) -> Self {
        let mut pretend = Self::default();
        for word in text
            .split(',')
            .map(str::trim)
            .filter(|word| !word.is_empty())
        {
            match word {
                "no-uffd" => pretend.no_uffd = true,
                "user-uffd" => pretend.user_uffd = true,
                "no-move" => pretend.no_move = true,
                "no-wp-async" => pretend.no_wp_async = true,
                "no-pagemap-scan" => pretend.no_pagemap_scan = true,
                "no-memfd" => pretend.no_memfd = true,
                other => pretend.unknown.push(other.to_owned()),
            }
        }
        pretend
    }
}

const PRETENDED: &str = "pretended to be missing by PAGEMERGE_PRETEND; unset that variable";

/// What this kernel and these privileges allow. Found once for the process, by trying; only while
/// trying fails for want of memory or descriptors it is tried again.
///
/// ```
/// let found = pagemerge_linux::capabilities();
/// for (what, why) in &found.reasons {
///     println!("{what}: {why}");
/// }
/// ```
#[must_use]
pub fn capabilities() -> Capabilities {
    static FOUND: Leaked<Capabilities> = Leaked::empty();
    if let Some(found) = FOUND.get() {
        return found.clone();
    }
    // Two threads may both get here. They find the same, and no fork child waits for either.
    let text = std::env::var("PAGEMERGE_PRETEND").unwrap_or_default();
    let look = Look::new(Pretend::parse(&text));
    let found = probe(&look);
    if !look.passing.get() {
        FOUND.set(found.clone());
    }
    found
}

/// One look at everything.
struct Look {
    pretend: Pretend,
    /// Something failed for a reason that may be gone a moment later: no memory, no descriptors, a
    /// signal. What was found then is not for good.
    passing: Cell<bool>,
}

impl Look {
    fn new(pretend: Pretend) -> Self {
        Self {
            pretend,
            passing: Cell::new(false),
        }
    }

    /// Takes note of a failure.
    fn note(&self, why: impl Into<io::Error>) {
        const PASSING: [i32; 5] = [
            libc::EINTR,
            libc::EAGAIN,
            libc::ENOMEM,
            libc::EMFILE,
            libc::ENFILE,
        ];
        if why
            .into()
            .raw_os_error()
            .is_some_and(|errno| PASSING.contains(&errno))
        {
            self.passing.set(true);
        }
    }

    /// The same, while it is put into words.
    fn noted<E: Copy + Into<io::Error>>(&self, why: E) -> E {
        self.note(why);
        why
    }
}

/// Tries everything out once more, for tests of faults: what [`capabilities`] knows stays.
#[cfg(feature = "inject")]
#[must_use]
pub fn probe_again() -> Capabilities {
    let text = std::env::var("PAGEMERGE_PRETEND").unwrap_or_default();
    probe(&Look::new(Pretend::parse(&text)))
}

/// Tries everything out.
fn probe(look: &Look) -> Capabilities {
    let _phase = enter(Phase::Probe);
    let pretend = &look.pretend;
    let mut reasons = BTreeMap::new();
    if !pretend.unknown.is_empty() {
        reasons.insert(
            "pretend",
            format!(
                "PAGEMERGE_PRETEND holds \"{}\", which is none of no-uffd, user-uffd, no-move, \
                 no-wp-async, no-pagemap-scan, no-memfd",
                pretend.unknown.join(",")
            ),
        );
    }

    let full = find_full(look)
        .map_err(|why| reasons.insert("barrier", why))
        .ok();
    let user = find_user(look)
        .map_err(|why| reasons.insert("user_barrier", why))
        .ok();
    let features = full
        .or(user)
        .map_or(Features::NONE, |(_, features)| features);
    let source = full.or(user).map(|(source, _)| source);

    let moves = try_move(look, source, features);
    let tracked = try_tracking(look, source, features);
    let frames = try_frames(look);
    let scans = try_pagemap_scan(look);
    let (guard_pages, kernel_ksm) = (tells_guard_pages(look), try_kernel_ksm(look));
    for (what, outcome) in [
        ("move", &moves),
        ("write_tracking", &tracked),
        ("pagemap_scan", &scans),
        ("frames", &frames),
        ("kernel_ksm", &kernel_ksm),
    ] {
        if let Err(why) = outcome {
            reasons.insert(what, why.clone());
        }
    }
    let max_map_count = number_in(look, "/proc/sys/vm/max_map_count").unwrap_or_else(|| {
        let why = "/proc/sys/vm/max_map_count cannot be read; mount /proc. The kernel's default \
                   of 65530 is assumed";
        reasons.insert("max_map_count", why.to_owned());
        65_530
    });
    Capabilities {
        barrier: if full.is_some() {
            Barrier::Full
        } else {
            Barrier::None
        },
        user_barrier: user.is_some(),
        write_tracking: tracked.is_ok(),
        move_pages: moves.is_ok(),
        pagemap_scan: scans.is_ok(),
        frames: frames.is_ok(),
        max_map_count,
        kernel_ksm: kernel_ksm.is_ok(),
        page_size: page_size(),
        kernel: files::read_to_string("/proc/sys/kernel/osrelease")
            .map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned()),
        reasons,
        full: full.map(|(source, _)| source),
        tracking: source.filter(|_| tracked.is_ok()),
        features,
        guard_pages,
    }
}

fn number_in(look: &Look, path: &str) -> Option<u64> {
    let text = files::read_to_string(path).map_err(|error| look.note(error));
    text.ok()?.trim().parse().ok()
}

fn missing_uffd() -> String {
    "userfaultfd is not in this kernel, or is hidden by a seccomp filter: Function not \
     implemented (os error 38); use a kernel with CONFIG_USERFAULTFD, or allow the system call \
     in the container's seccomp profile"
        .to_owned()
}

/// A source of userfaultfds that stop the kernel's own accesses, too.
fn find_full(look: &Look) -> Result<(Source, Features), String> {
    if look.pretend.no_uffd {
        return Err(format!("userfaultfd is {PRETENDED}"));
    }
    if look.pretend.user_uffd {
        return Err(format!("userfaultfd with kernel faults is {PRETENDED}"));
    }
    let by_call = match Userfaultfd::offered(Source::Syscall) {
        Ok(features) => return with_write_protection(Source::Syscall, features),
        Err(stop) => look.noted(stop),
    };
    let by_device = match Userfaultfd::offered(Source::Device) {
        Ok(features) => return with_write_protection(Source::Device, features),
        Err(stop) => look.noted(stop),
    };
    let device = match by_device {
        OpenStop::NoDevice => "there is no /dev/userfaultfd".to_owned(),
        other => format!("/dev/userfaultfd: {other}"),
    };
    Err(match by_call {
        OpenStop::NotPermitted => {
            let setting = number_in(look, "/proc/sys/vm/unprivileged_userfaultfd");
            let now = setting.map_or(String::new(), |value| format!(" (now {value})"));
            format!(
                "userfaultfd with kernel faults is not permitted: {by_call} ({device}); run as \
                 root, grant CAP_SYS_PTRACE, give access to /dev/userfaultfd, or set \
                 vm.unprivileged_userfaultfd=1{now}; in a container, allow the system call in \
                 the seccomp profile as well"
            )
        }
        OpenStop::Missing => missing_uffd(),
        OpenStop::TooManyFiles | OpenStop::TooManyFilesInSystem => {
            format!("cannot open a userfaultfd: {by_call}; close files or raise ulimit -n")
        }
        _ => format!("cannot open a userfaultfd: {by_call} ({device})"),
    })
}

fn with_write_protection(source: Source, features: Features) -> Result<(Source, Features), String> {
    if features.has(Features::WP) {
        return Ok((source, features));
    }
    Err(
        "this kernel's userfaultfd cannot write-protect memory; use Linux 5.7 on x86-64, or 6.16 \
         on other machines, with CONFIG_HAVE_ARCH_USERFAULTFD_WP"
            .to_owned(),
    )
}

/// A source of userfaultfds for the program's own accesses.
fn find_user(look: &Look) -> Result<(Source, Features), String> {
    if look.pretend.no_uffd {
        return Err(format!("userfaultfd is {PRETENDED}"));
    }
    match Userfaultfd::offered(Source::UserModeOnly) {
        Ok(features) => with_write_protection(Source::UserModeOnly, features),
        Err(OpenStop::Missing) => Err(missing_uffd()),
        Err(OpenStop::NotPermitted) => Err(format!(
            "userfaultfd in user mode is not permitted: {}; allow the system call in the \
             container's seccomp profile",
            OpenStop::NotPermitted
        )),
        Err(stop) => Err(format!(
            "cannot open a userfaultfd in user mode: {}",
            look.noted(stop)
        )),
    }
}

/// Two pages of our own, the first with something in it.
fn scratch() -> Result<Mapping, MapStop> {
    let memory = Mapping::anonymous(2 * page_size(), Protection::ReadWrite)?;
    // Where there are no huge pages this is refused, and there is nothing to refuse.
    let _ = memory.advise(Advice::NoHugePage);
    memory.write_u64(0, 0x6d65_7267_6564);
    Ok(memory)
}

fn without_uffd() -> String {
    "needs userfaultfd, which is not available (see \"barrier\")".to_owned()
}

/// Moves a page to and fro.
fn try_move(look: &Look, source: Option<Source>, features: Features) -> Result<(), String> {
    if look.pretend.no_move {
        return Err(format!("UFFDIO_MOVE is {PRETENDED}"));
    }
    let source = source.ok_or_else(without_uffd)?;
    if !features.has(Features::MOVE) {
        return Err(
            "this kernel's userfaultfd cannot move pages: UFFDIO_MOVE came with Linux \
                    6.8. Pages are merged in place, under write protection"
                .to_owned(),
        );
    }
    let failed = |what: &str, why: &dyn std::fmt::Display| {
        format!("UFFDIO_MOVE did not work on a page of our own: {what}: {why}")
    };
    let uffd = Userfaultfd::open(source, Features::WP | Features::MOVE)
        .map_err(|stop| failed("opening a userfaultfd for it", &look.noted(stop)))?;
    let memory = scratch().map_err(|stop| failed("mapping a page", &look.noted(stop)))?;
    uffd.register(memory.span(), Modes::Both)
        .map_err(|stop| failed("registering", &look.noted(stop)))?;
    let (home, away) = (memory.span().page_run(0, 1), memory.span().page_run(1, 1));
    for (from, to) in [(home, away), (away, home)] {
        if let Some(stop) = move_scratch(&uffd, from, to) {
            return Err(failed("moving", &look.noted(stop)));
        }
    }
    Ok(())
}

#[allow(unsafe_code)]
fn move_scratch(uffd: &Userfaultfd, from: Span, to: Span) -> Option<MoveStop> {
    // SAFETY: both are pages of the scratch mapping of our only caller, which nobody else knows of.
    unsafe { uffd.move_pages(from, to.start, Wake::Now) }.stopped
}

/// Protects a page, writes to it, and asks whether it was written.
fn try_tracking(look: &Look, source: Option<Source>, features: Features) -> Result<(), String> {
    if look.pretend.no_wp_async {
        return Err(format!("asynchronous write protection is {PRETENDED}"));
    }
    if look.pretend.no_pagemap_scan {
        return Err(format!("PAGEMAP_SCAN is {PRETENDED}"));
    }
    let source = source.ok_or_else(without_uffd)?;
    let wanted = tracking_features();
    if !features.has(wanted) {
        return Err(
            "this kernel's userfaultfd cannot track writes: that came with Linux 6.7. \
                    Changed pages are found by their checksums, as ksmd finds them"
                .to_owned(),
        );
    }
    let failed = |what: &str, why: &dyn std::fmt::Display| {
        format!("write tracking did not work on a page of our own: {what}: {why}")
    };
    let map =
        Pagemap::own().map_err(|errno| failed("opening /proc/self/pagemap", &look.noted(errno)))?;
    let uffd = Userfaultfd::open(source, wanted)
        .map_err(|stop| failed("opening a userfaultfd for it", &look.noted(stop)))?;
    let memory = scratch().map_err(|stop| failed("mapping a page", &look.noted(stop)))?;
    uffd.register(memory.span(), Modes::WriteProtect)
        .map_err(|stop| failed("registering", &look.noted(stop)))?;
    let written = || -> Result<usize, String> {
        let mut found = [PageRegion::EMPTY; 4];
        let query = Query::written_and_protect(Categories::WRITTEN);
        match map.scan(memory.span(), &query, &mut found) {
            Ok(scanned) => Ok(found[..scanned.regions]
                .iter()
                .map(|r| r.span().pages())
                .sum()),
            Err(ScanStop::Missing) => {
                Err("PAGEMAP_SCAN is not in this kernel: it came with Linux 6.7".to_owned())
            }
            Err(stop) => Err(failed("PAGEMAP_SCAN", &look.noted(stop))),
        }
    };
    let first = written()?;
    let quiet = written()?;
    memory.write_u64(8, 1);
    let again = written()?;
    if (first, quiet, again) != (1, 0, 1) {
        let why = format!("it reported {first}, {quiet} and {again} written pages, not 1, 0, 1");
        return Err(failed("PAGEMAP_SCAN", &why));
    }
    Ok(())
}

/// What a userfaultfd for write tracking is opened with.
pub(crate) fn tracking_features() -> Features {
    Features::WP | Features::WP_UNPOPULATED | Features::WP_ASYNC
}

/// Looks at a page of our own.
fn try_pagemap_scan(look: &Look) -> Result<(), String> {
    if look.pretend.no_pagemap_scan {
        return Err(format!("PAGEMAP_SCAN is {PRETENDED}"));
    }
    let failed = |why: &dyn std::fmt::Display| {
        format!("PAGEMAP_SCAN did not work on a page of our own: {why}; it came with Linux 6.7")
    };
    let map = Pagemap::own().map_err(|errno| failed(&look.noted(errno)))?;
    let memory = scratch().map_err(|stop| failed(&look.noted(stop)))?;
    let mut found = [PageRegion::EMPTY; 4];
    let query = Query::look(Categories::PRESENT);
    map.scan(memory.span(), &query, &mut found)
        .map(drop)
        .map_err(|stop| failed(&look.noted(stop)))
}

fn try_frames(look: &Look) -> Result<(), String> {
    if look.pretend.no_memfd {
        return Err(format!("memfd_create is {PRETENDED}"));
    }
    let page = page_size() as u64;
    // The limit first: a file that grows past it ends the program by a signal.
    if let Ok(Some(limit)) = process::limit(Resource::FileSize) {
        return Err(format!(
            "RLIMIT_FSIZE is {limit} bytes, and the file that holds frames would end the program \
             by SIGXFSZ when it grows past that; raise the limit (ulimit -f unlimited)"
        ));
    }
    let made = Memfd::create(c"pagemerge-probe", page).map_err(|stop| look.noted(stop));
    let file = made.map_err(|stop| match stop {
        CreateStop::Missing => format!(
            "memfd_create is not in this kernel, or is hidden by a seccomp filter: {stop}; allow \
             the system call"
        ),
        CreateStop::Forbidden => format!(
            "memfd_create is not permitted: {stop}; allow it in the security policy (seccomp, \
             vm.memfd_noexec)"
        ),
        _ => format!("cannot create a memfd for frames: {stop}"),
    })?;
    file.punch(0, page).map_err(|stop| {
        let stop = look.noted(stop);
        format!("cannot punch holes into a memfd (fallocate): {stop}; allow the system call")
    })
}

/// Whether a page scan may be asked about guard pages (Linux 6.15).
fn tells_guard_pages(look: &Look) -> bool {
    let (map, memory) = (
        Pagemap::own().map_err(|errno| look.note(errno)),
        scratch().map_err(|stop| look.note(stop)),
    );
    let (Ok(map), Ok(memory)) = (map, memory) else {
        return false;
    };
    let query = Query::look(Categories::PRESENT | Categories::GUARD);
    map.scan(memory.span(), &query, &mut [PageRegion::EMPTY])
        .map_err(|stop| look.note(stop))
        .is_ok()
}

fn try_kernel_ksm(look: &Look) -> Result<(), String> {
    match files::metadata("/sys/kernel/mm/ksm/run") {
        Ok(_) => Ok(()),
        Err(error) => {
            let why = format!(
                "the kernel has no same-page merging of its own (/sys/kernel/mm/ksm/run: \
                 {error}); pagemerge does not need it"
            );
            look.note(error);
            Err(why)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pretend(words: &str) -> Capabilities {
        probe(&Look::new(Pretend::parse(words)))
    }

    #[test]
    fn whatever_is_missing_has_a_reason_and_nothing_else_has() {
        for words in [
            Pretend::NOTHING,
            "no-uffd",
            "user-uffd",
            "no-move,no-memfd",
            "no-wp-async",
        ] {
            let found = pretend(words);
            for (there, name) in [
                (found.barrier == Barrier::Full, "barrier"),
                (found.user_barrier, "user_barrier"),
                (found.write_tracking, "write_tracking"),
                (found.move_pages, "move"),
                (found.frames, "frames"),
                (found.kernel_ksm, "kernel_ksm"),
            ] {
                let reason = found.reasons.get(name);
                assert_eq!(there, reason.is_none(), "{name} with {words:?}: {reason:?}");
            }
            assert!(found.page_size.is_power_of_two() && found.max_map_count > 0);
        }
    }

    #[test]
    fn pretended_things_are_missing_and_say_so() {
        let found = pretend("no-move, no-wp-async");
        assert!(!found.move_pages && !found.write_tracking);
        assert!(found.reasons["move"].contains("PAGEMERGE_PRETEND"));
        assert!(found.reasons["write_tracking"].contains("PAGEMERGE_PRETEND"));
        let found = pretend("no-uffd");
        assert_eq!(
            (found.barrier, found.full, found.tracking),
            (Barrier::None, None, None)
        );
        assert!(!found.user_barrier);
        let found = pretend("no-pagemap-scan,no-memfd");
        assert!(!found.write_tracking && !found.frames);
    }

    #[test]
    fn tracking_works_without_privileges_wherever_user_mode_does() {
        let (all, user) = (pretend(Pretend::NOTHING), pretend("user-uffd"));
        assert_eq!(user.barrier, Barrier::None);
        assert_eq!(user.write_tracking, all.write_tracking);
        if user.write_tracking {
            assert_eq!(user.tracking, Some(Source::UserModeOnly));
        }
    }

    #[test]
    fn word_that_means_nothing_is_reported() {
        let found = pretend("no-move,no-brain");
        assert!(found.reasons["pretend"].contains("no-brain"));
        assert!(!found.move_pages);
    }

    #[test]
    fn capabilities_are_found_once_and_stay() {
        assert_eq!(capabilities(), capabilities());
    }
}
