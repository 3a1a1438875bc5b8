//! How much memory is really used: the figures that merging lowers.
//!
//! The resident set size (RSS) is the wrong measure: it counts each mapping of a shared frame, so
//! it does not fall when pages are merged. The *proportional* set size (PSS) divides each page by
//! the number of its mappings. A memory cgroup counts each page once, and charges it to whoever
//! touched it first.
//!
//! # Cost
//! The kernel walks all page tables of the process for its PSS: some milliseconds a GiB.

use crate::sys::files;
use std::io;
use std::path::{Component, Path, PathBuf};

/// What a process uses, in bytes, as the kernel's `smaps_rollup` counts it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Pss {
    /// Proportional set size: each page divided by the number of its mappings.
    pub pss: u64,
    /// The part of it that is anonymous memory.
    pub pss_anon: u64,
    /// The part of it that shows files.
    pub pss_file: u64,
    /// The part of it that shows shared memory, which frames are.
    pub pss_shmem: u64,
    /// Resident set size: each mapping counts in full, merged or not.
    pub rss: u64,
    /// Swapped out, each page divided by the number of its users.
    pub swap_pss: u64,
}

impl Pss {
    /// Each figure added.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            pss: self.pss + other.pss,
            pss_anon: self.pss_anon + other.pss_anon,
            pss_file: self.pss_file + other.pss_file,
            pss_shmem: self.pss_shmem + other.pss_shmem,
            rss: self.rss + other.rss,
            swap_pss: self.swap_pss + other.swap_pss,
        }
    }
}

/// What this process uses.
///
/// ```
/// let used = pagemerge_linux::accounting::pss()?;
/// assert!(used.pss <= used.rss);
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// # Errors
/// When `/proc` is not there, or the kernel is older than 4.14.
pub fn pss() -> io::Result<Pss> {
    pss_in(Path::new("/proc/self/smaps_rollup"))
}

/// What another process uses.
///
/// # Errors
/// When there is no such process, or it may not be looked at.
pub fn pss_of(pid: u32) -> io::Result<Pss> {
    pss_in(&PathBuf::from(format!("/proc/{pid}/smaps_rollup")))
}

/// What several processes use together. A page that two of them share counts once, provided that
/// nobody else maps it.
///
/// A process that ends meanwhile counts as nothing.
///
/// # Errors
/// When one of them may not be looked at.
pub fn pss_of_all(pids: &[u32]) -> io::Result<Pss> {
    pids.iter()
        .try_fold(Pss::default(), |sum, &pid| match pss_of(pid) {
            Ok(one) => Ok(sum.plus(one)),
            Err(error) if is_gone(&error) => Ok(sum),
            Err(error) => Err(error),
        })
}

/// The children of a process, and theirs.
///
/// A process that ends meanwhile is left out.
///
/// # Errors
/// When `/proc` is not there, or does not show the process.
pub fn descendants(pid: u32) -> io::Result<Vec<u32>> {
    // By their parents' numbers: the lists of children in `/proc/PID/task` are told thread by thread, and
    // leave some out while other threads end.
    let mut parents: Vec<(u32, u32)> = Vec::new();
    for process in files::read_dir("/proc")? {
        let Some(child) = process?
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        match files::read_to_string(format!("/proc/{child}/stat")) {
            Ok(stat) => parents.extend(parent_of(&stat).map(|parent| (parent, child))),
            Err(error) if child != pid && is_gone(&error) => {}
            // Somebody else's, where those are hidden.
            Err(error) if child != pid && error.kind() == io::ErrorKind::PermissionDenied => {}
            Err(error) => return Err(error),
        }
    }
    if !parents.iter().any(|(_, child)| *child == pid) {
        return Err(io::ErrorKind::NotFound.into());
    }
    let mut found = Vec::new();
    let mut next = vec![pid];
    while let Some(parent) = next.pop() {
        for (_, child) in parents.iter().filter(|(of, _)| *of == parent) {
            if !found.contains(child) {
                found.push(*child);
                next.push(*child);
            }
        }
    }
    Ok(found)
}

/// The parent's number in a line of `/proc/PID/stat`. The name before it, in brackets, may hold anything.
fn parent_of(stat: &str) -> Option<u32> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(1)?.parse().ok()
}

/// A process that has ended is not there (`ENOENT`) or, once its file is open, not found (`ESRCH`).
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

fn pss_in(path: &Path) -> io::Result<Pss> {
    parse_pss(&files::read_to_string(path)?)
        .ok_or_else(|| io::Error::other(format!("{} has no Pss line", path.display())))
}

pub(crate) fn parse_pss(text: &str) -> Option<Pss> {
    let mut found = Pss::default();
    let mut seen = false;
    for line in text.lines() {
        let Some((name, value)) = line.split_once(':') else {
            continue;
        };
        let Some(bytes) = kilobytes(value) else {
            continue;
        };
        match name {
            "Pss" => (found.pss, seen) = (bytes, true),
            "Pss_Anon" => found.pss_anon = bytes,
            "Pss_File" => found.pss_file = bytes,
            "Pss_Shmem" => found.pss_shmem = bytes,
            "Rss" => found.rss = bytes,
            "SwapPss" => found.swap_pss = bytes,
            _ => {}
        }
    }
    seen.then_some(found)
}

/// `"   12 kB"` in bytes.
fn kilobytes(value: &str) -> Option<u64> {
    value
        .trim()
        .strip_suffix(" kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

/// What a memory cgroup counts and allows.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Cgroup {
    /// 1 or 2.
    pub version: u32,
    /// Where its files are.
    pub path: PathBuf,
    /// Bytes charged to it now, file cache included.
    pub current: u64,
    /// Bytes that it may have, by its own limit; `None` for no limit.
    pub limit: Option<u64>,
    /// Bytes that may still be charged before it or one of the groups around it is at its limit and
    /// has nothing left to drop: clean file cache that is charged to it makes room. `None` where no
    /// group has a limit.
    pub headroom: Option<u64>,
}

/// The memory cgroup of this process; `None` where there is none, or its files cannot be seen.
///
/// # Errors
/// When `/proc` is not there.
pub fn cgroup() -> io::Result<Option<Cgroup>> {
    let groups = files::read_to_string("/proc/self/cgroup")?;
    let mounts = files::read_to_string("/proc/self/mountinfo")?;
    Ok(find_cgroup(&groups, &mounts).and_then(|place| read_cgroup(&place)))
}

/// Bytes of memory that the whole system could give without swapping (`MemAvailable`).
///
/// # Errors
/// When `/proc` is not there.
pub fn available() -> io::Result<u64> {
    let text = files::read_to_string("/proc/meminfo")?;
    text.lines()
        .find_map(|line| kilobytes(line.strip_prefix("MemAvailable:")?))
        .ok_or_else(|| io::Error::other("/proc/meminfo has no MemAvailable line"))
}

/// What bounds the memory of this process first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Bound {
    /// What the whole system has available.
    System,
    /// The limit of a memory cgroup.
    Cgroup,
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::System => "the system (MemAvailable)",
            Self::Cgroup => "the memory cgroup's limit",
        })
    }
}

/// Bytes that this process could still use, and what bounds them: what the system has available, or
/// what its memory cgroup and those around it allow.
///
/// # Errors
/// When `/proc` is not there.
pub fn room() -> io::Result<(u64, Bound)> {
    let system = available()?;
    let group = cgroup()?.and_then(|group| group.headroom);
    Ok(match group {
        Some(bytes) if bytes < system => (bytes, Bound::Cgroup),
        _ => (system, Bound::System),
    })
}

/// Bytes that this process could still use: those of [`room`].
///
/// # Errors
/// When `/proc` is not there.
pub fn headroom() -> io::Result<u64> {
    Ok(room()?.0)
}

/// Where a memory cgroup's files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) version: u32,
    /// Where the hierarchy is mounted.
    pub(crate) mount: PathBuf,
    /// The group below it.
    pub(crate) path: PathBuf,
}

/// Finds the group that counts memory, in `/proc/self/cgroup` and `/proc/self/mountinfo`. A mixed
/// system has both versions; memory then belongs to one of them, and to version 1 if it is there.
pub(crate) fn find_cgroup(groups: &str, mounts: &str) -> Option<Place> {
    let group_of = |wanted: &dyn Fn(&str, &str) -> bool| {
        groups.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (number, controllers) = (fields.next()?, fields.next()?);
            wanted(number, controllers).then(|| fields.next())?
        })
    };
    let memory = |controllers: &str| controllers.split(',').any(|name| name == "memory");
    let first = group_of(&|_, controllers| memory(controllers));
    if let Some(group) = first
        && let Some((mount, root)) = find_mount(mounts, "cgroup", &memory)
    {
        let path = below(&mount, &root, group);
        return Some(Place {
            version: 1,
            mount,
            path,
        });
    }
    let group = group_of(&|number, controllers| number == "0" && controllers.is_empty())?;
    let (mount, root) = find_mount(mounts, "cgroup2", &|_| true)?;
    let path = below(&mount, &root, group);
    Some(Place {
        version: 2,
        mount,
        path,
    })
}

/// The mount point of a file system, and which part of it is mounted there.
fn find_mount(
    mounts: &str,
    kind: &str,
    options: &dyn Fn(&str) -> bool,
) -> Option<(PathBuf, String)> {
    mounts.lines().find_map(|line| {
        let (fixed, rest) = line.split_once(" - ")?;
        let mut fixed = fixed.split(' ').skip(3);
        let (root, point) = (fixed.next()?, fixed.next()?);
        let mut rest = rest.split(' ');
        let (this, _source, option) = (rest.next()?, rest.next()?, rest.next()?);
        (this == kind && options(option)).then(|| (unescape(point).into(), unescape(root)))
    })
}

/// Takes `\040` and the like out of a path in `mountinfo`.
pub(crate) fn unescape(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        out.push_str(before);
        let byte = after
            .get(..3)
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        out.push(byte.map_or('\\', char::from));
        rest = if byte.is_some() { &after[3..] } else { after };
    }
    out.push_str(rest);
    out
}

/// The directory of `group` where the part `root` of the hierarchy is mounted at `mount`. In a
/// container the group's name may lie outside of what is mounted: then the mount is the group.
fn below(mount: &Path, root: &str, group: &str) -> PathBuf {
    let inside = Path::new(group).strip_prefix(root).unwrap_or(Path::new(""));
    let escapes = inside
        .components()
        .any(|part| matches!(part, Component::ParentDir | Component::RootDir));
    if escapes {
        mount.to_owned()
    } else {
        mount.join(inside)
    }
}

fn read_cgroup(place: &Place) -> Option<Cgroup> {
    let (used, most) = match place.version {
        1 => ("memory.usage_in_bytes", "memory.limit_in_bytes"),
        _ => ("memory.current", "memory.max"),
    };
    let number = |directory: &Path, file: &str| {
        files::read_to_string(directory.join(file))
            .ok()?
            .trim()
            .parse::<u64>()
            .ok()
    };
    // Version 1 says "no limit" by a number that no machine has; version 2 by a word.
    let limit_of = |at: &Path| number(at, most).filter(|&bytes| bytes < 1 << 60);
    // The root of version 2 has no files, and counts nothing.
    let current = number(&place.path, used)?;
    let mut headroom = None;
    for at in place
        .path
        .ancestors()
        .take_while(|at| at.starts_with(&place.mount))
    {
        if let (Some(limit), Some(used)) = (limit_of(at), number(at, used)) {
            let left = limit
                .saturating_sub(used)
                .saturating_add(droppable(at, place.version).min(used));
            headroom = Some(headroom.map_or(left, |least: u64| least.min(left)));
        }
    }
    Some(Cgroup {
        version: place.version,
        path: place.path.clone(),
        current,
        limit: limit_of(&place.path),
        headroom,
    })
}

/// File cache charged to the group at `at` that the kernel can drop at once: what is neither dirty nor
/// being written. Without it a group that has read files would seem to be full for ever.
fn droppable(at: &Path, version: u32) -> u64 {
    let text = files::read_to_string(at.join("memory.stat")).unwrap_or_default();
    // Version 1 counts the groups inside under names of their own.
    let names = match version {
        1 => [
            "total_inactive_file",
            "total_active_file",
            "total_dirty",
            "total_writeback",
        ],
        _ => [
            "inactive_file",
            "active_file",
            "file_dirty",
            "file_writeback",
        ],
    };
    let [inactive, active, dirty, writeback] = names.map(|name| {
        text.lines()
            .find_map(|line| {
                line.strip_prefix(name)?
                    .strip_prefix(' ')?
                    .parse::<u64>()
                    .ok()
            })
            .unwrap_or(0)
    });
    (inactive + active).saturating_sub(dirty + writeback)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::mapping::{Advice, Mapping, Protection};
    use std::fs;

    #[test]
    fn every_figure_of_the_rollup_is_read_in_bytes() {
        let text = "55-7f ---p 00000000 00:00 0 [rollup]\nRss:    1720 kB\nPss:     258 kB\n\
                    Pss_Dirty: 1 kB\nPss_Anon: 112 kB\nPss_File: 145 kB\nPss_Shmem: 1 kB\n\
                    SwapPss: 7 kB\n";
        let wanted = Pss {
            pss: 258 << 10,
            pss_anon: 112 << 10,
            pss_file: 145 << 10,
            pss_shmem: 1 << 10,
            rss: 1720 << 10,
            swap_pss: 7 << 10,
        };
        assert_eq!(parse_pss(text), Some(wanted));
        assert_eq!(parse_pss("Rss: 1 kB\n"), None);
        assert_eq!(wanted.plus(wanted).pss, 516 << 10);
    }

    #[test]
    fn memory_in_use_shows_in_our_own_figures() {
        // Other tests allocate and free at the same time, but nothing of this size.
        let bytes = 256 << 20;
        let before = pss().unwrap();
        let memory = Mapping::anonymous(bytes, Protection::ReadWrite).unwrap();
        memory.advise(Advice::PopulateWrite).unwrap();
        let during = pss_of(std::process::id()).unwrap();
        assert!(
            during.pss_anon > before.pss_anon + bytes as u64 / 2,
            "{before:?} {during:?}"
        );
        assert!(during.rss >= during.pss);
    }

    #[test]
    fn parent_is_found_behind_any_name() {
        assert_eq!(parent_of("17 (sleep) S 5 17 5 0"), Some(5));
        assert_eq!(parent_of("17 (a) R 9 (b)) S 5 17 5 0"), Some(5));
        assert_eq!(parent_of("17 (a"), None);
    }

    /// Broke, seldom: children were left out while other threads of their parent ended.
    #[test]
    fn children_are_found_while_threads_come_and_go() {
        let ends = std::sync::atomic::AtomicBool::new(false);
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !ends.load(std::sync::atomic::Ordering::Relaxed) {
                        std::thread::spawn(|| {}).join().unwrap();
                    }
                });
            }
            let missed = (0..200)
                .filter(|_| {
                    !descendants(std::process::id())
                        .unwrap()
                        .contains(&child.id())
                })
                .count();
            ends.store(true, std::sync::atomic::Ordering::Relaxed);
            child.kill().unwrap();
            child.wait().unwrap();
            assert_eq!(missed, 0);
        });
    }

    #[test]
    fn process_that_is_gone_counts_as_nothing_and_one_that_is_there_counts() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let all = descendants(std::process::id()).unwrap();
        assert!(all.contains(&child.id()));
        assert!(pss_of_all(&[child.id()]).unwrap().rss > 0);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(pss_of_all(&[child.id()]).unwrap(), Pss::default());
        assert!(pss_of(child.id()).is_err());
    }

    #[test]
    fn group_is_found_in_either_version_and_in_a_container() {
        let v1 = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                  35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
                  41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let mixed = "4:memory:/a/b\n1:cpu:/\n0::/\n";
        let place = find_cgroup(mixed, v1).unwrap();
        assert_eq!(
            (place.version, place.path.to_str()),
            (1, Some("/sys/fs/cgroup/memory/a/b"))
        );

        let v2 = "29 22 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        let place = find_cgroup("0::/user.slice/x.scope\n", v2).unwrap();
        assert_eq!(place.version, 2);
        assert_eq!(place.path, Path::new("/sys/fs/cgroup/user.slice/x.scope"));

        let bound = "9 1 0:1 /docker/abc /sys/fs/odd\\040name ro - cgroup2 cgroup2 rw\n";
        let place = find_cgroup("0::/docker/abc/in\n", bound).unwrap();
        assert_eq!(place.path, Path::new("/sys/fs/odd name/in"));
        let place = find_cgroup("0::/../elsewhere\n", v2).unwrap();
        assert_eq!(place.path, Path::new("/sys/fs/cgroup"));
        assert_eq!(find_cgroup("", v2), None);
        assert_eq!(find_cgroup("0::/\n", ""), None);
    }

    #[test]
    fn headroom_is_that_of_the_tightest_group_around() {
        let top = std::env::temp_dir().join(format!("pagemerge-cgroup-{}", std::process::id()));
        let inner = top.join("outer/inner");
        fs::create_dir_all(&inner).unwrap();
        let write = |at: &Path, current: &str, max: &str| {
            fs::write(at.join("memory.current"), current).unwrap();
            fs::write(at.join("memory.max"), max).unwrap();
        };
        write(&inner, "100\n", "max\n");
        write(&top.join("outer"), "700\n", "1000\n");
        let place = Place {
            version: 2,
            mount: top.clone(),
            path: inner.clone(),
        };
        let group = read_cgroup(&place).unwrap();
        assert_eq!(
            (group.current, group.limit, group.headroom),
            (100, None, Some(300))
        );
        write(&inner, "100\n", "150\n");
        let group = read_cgroup(&place).unwrap();
        assert_eq!((group.limit, group.headroom), (Some(150), Some(50)));

        // 40 bytes of its file cache can be dropped, 30 of which are dirty.
        fs::write(
            inner.join("memory.stat"),
            "anon 60\ninactive_file 25\nactive_file 15\nfile_dirty 30\n",
        )
        .unwrap();
        assert_eq!(read_cgroup(&place).unwrap().headroom, Some(60));
        fs::remove_file(inner.join("memory.stat")).unwrap();

        fs::write(inner.join("memory.usage_in_bytes"), "5\n").unwrap();
        fs::write(inner.join("memory.limit_in_bytes"), "9223372036854771712\n").unwrap();
        let group = read_cgroup(&Place {
            version: 1,
            ..place
        })
        .unwrap();
        assert_eq!(
            (group.current, group.limit, group.headroom),
            (5, None, None)
        );
        fs::remove_dir_all(&top).unwrap();
    }

    #[test]
    fn this_system_has_memory_available_and_the_group_allows_no_more() {
        assert!(available().unwrap() > 0);
        assert!(headroom().unwrap() <= u64::MAX / 2);
        if let Some(group) = cgroup().unwrap() {
            assert!(group.current > 0 && group.path.is_dir());
        }
    }
}
