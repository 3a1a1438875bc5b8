//! The tests' own floor: memory of theirs, and the system calls that programs make to it.
//!
//! All `unsafe` of the tests is here. Most of it is one function ([`call`]) that makes any system
//! call: what the tests do to memory (map over it, protect it, give it to a device) is done to
//! mappings that a [`Memory`] owns and nobody holds a reference into; words are read and written as
//! atomics.

#![allow(unsafe_code, reason = "see above")]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "system call arguments and results are registers"
)]

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Any system call, by number.
pub(crate) fn call(number: i64, arguments: &[usize]) -> io::Result<usize> {
    let mut a = [0; 6];
    a[..arguments.len()].copy_from_slice(arguments);
    // SAFETY: the tests pass addresses of their own mappings and of live locals only; see the head
    // of this file.
    let got = unsafe { libc::syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]) };
    if got == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(got as usize)
    }
}

pub(crate) fn page_size() -> usize {
    pagemerge_linux::page_size()
}

pub(crate) fn is_root() -> bool {
    call(libc::SYS_geteuid, &[]).is_ok_and(|id| id == 0)
}

/// `-1` as an argument.
pub(crate) const NONE: usize = usize::MAX;

pub(crate) fn die_with_parent() {
    // If it cannot be had, a killed harness leaves a scenario behind that ends by itself.
    let _ = call(
        libc::SYS_prctl,
        &[libc::PR_SET_PDEATHSIG as usize, libc::SIGKILL as usize],
    );
}

pub(crate) fn kill_group(leader: u32) {
    // Nobody may be left in it.
    let _ = call(
        libc::SYS_kill,
        &[(-i64::from(leader)) as usize, libc::SIGKILL as usize],
    );
}

pub(crate) fn kill(process: i32, signal: i32) {
    call(libc::SYS_kill, &[process as usize, signal as usize]).expect("our own child");
}

/// A number that differs from run to run, and is printed where it decides anything.
pub(crate) fn seed() -> u64 {
    let given = std::env::var("PAGEMERGE_SEED")
        .ok()
        .and_then(|text| text.parse().ok());
    given.unwrap_or_else(|| {
        let mut bytes = [0; 8];
        File::open("/dev/urandom")
            .and_then(|mut f| f.read_exact(&mut bytes))
            .expect("random bytes");
        u64::from_le_bytes(bytes) >> 16
    })
}

/// A small generator (xorshift), good enough to choose pages.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }

    /// Below `end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.next() as usize % end
    }
}

/// The word number `index` of a page of content number `content`; content 0 is all zero.
pub(crate) fn word_of(content: u64, index: usize) -> u64 {
    if content == 0 {
        return 0;
    }
    (content << 16 | index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// A mapping of the test's own.
#[derive(Debug)]
pub(crate) struct Memory {
    addr: usize,
    len: usize,
}

pub(crate) const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
pub(crate) const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

impl Memory {
    /// Private anonymous memory without huge pages, between two pages that nobody can touch, so
    /// that it is a mapping of its own.
    pub(crate) fn new(pages: usize) -> Self {
        let memory = Self::with(pages, RW, PRIVATE, -1, 0).expect("memory for a test");
        // Kernels without huge pages refuse it, and need it not.
        let _ = memory.advise(libc::MADV_NOHUGEPAGE);
        memory
    }

    /// Any mapping, between two pages that nobody can touch.
    pub(crate) fn with(
        pages: usize,
        protection: i32,
        flags: i32,
        fd: RawFd,
        offset: u64,
    ) -> io::Result<Self> {
        let (page, len) = (page_size(), pages * page_size());
        let none = libc::PROT_NONE as usize;
        let around = call(
            libc::SYS_mmap,
            &[0, len + 2 * page, none, PRIVATE as usize, NONE, 0],
        )?;
        let flags = (flags | libc::MAP_FIXED) as usize;
        let at = [
            around + page,
            len,
            protection as usize,
            flags,
            fd as usize,
            offset as usize,
        ];
        Ok(Self {
            addr: call(libc::SYS_mmap, &at)?,
            len,
        })
    }

    /// Starts at a border of 2 MiB and may have huge pages.
    pub(crate) fn huge(pages: usize) -> Self {
        const HUGE: usize = 2 << 20;
        let len = pages * page_size();
        let around = [
            0,
            len + 2 * HUGE,
            libc::PROT_NONE as usize,
            PRIVATE as usize,
            NONE,
            0,
        ];
        let around = call(libc::SYS_mmap, &around).expect("address space");
        let at = [
            around.next_multiple_of(HUGE),
            len,
            RW as usize,
            (PRIVATE | libc::MAP_FIXED) as usize,
            NONE,
            0,
        ];
        let memory = Self {
            addr: call(libc::SYS_mmap, &at).expect("memory for a test"),
            len,
        };
        memory
            .advise(libc::MADV_HUGEPAGE)
            .expect("huge pages on request");
        memory
    }

    pub(crate) fn addr(&self) -> usize {
        self.addr
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn pages(&self) -> usize {
        self.len / page_size()
    }

    /// Address of a page.
    pub(crate) fn at(&self, page: usize) -> usize {
        assert!(page < self.pages(), "page {page} of {}", self.pages());
        self.addr + page * page_size()
    }

    /// A word of it. (Touching it faults its page in.)
    pub(crate) fn word(&self, page: usize, index: usize) -> &AtomicU64 {
        let at = self.at(page) + index * 8;
        assert!(
            at + 8 <= self.addr + self.len,
            "word {index} of page {page}"
        );
        // SAFETY: mapped while `self` lives, aligned, and only ever used as an atomic or by the
        // kernel. (The tests touch no memory that they have made inaccessible.)
        unsafe { AtomicU64::from_ptr(std::ptr::without_provenance_mut(at)) }
    }

    pub(crate) fn load(&self, page: usize, index: usize) -> u64 {
        self.word(page, index).load(Ordering::Relaxed)
    }

    pub(crate) fn store(&self, page: usize, index: usize, value: u64) {
        self.word(page, index).store(value, Ordering::Relaxed);
    }

    /// Writes content number `content` to a page.
    pub(crate) fn fill(&self, page: usize, content: u64) {
        for index in 0..page_size() / 8 {
            self.store(page, index, word_of(content, index));
        }
    }

    /// Whether a page is content number `content`.
    pub(crate) fn shows(&self, page: usize, content: u64) -> bool {
        (0..page_size() / 8).all(|index| self.load(page, index) == word_of(content, index))
    }

    /// # Panics
    /// Unless it does.
    pub(crate) fn assert_shows(&self, page: usize, content: u64, when: &str) {
        for index in 0..page_size() / 8 {
            let (seen, right) = (self.load(page, index), word_of(content, index));
            assert!(
                seen == right,
                "{when}: page {page} of {} word {index} is {seen:#x}, not {right:#x}; {}",
                self.pages(),
                describe(self.at(page)),
            );
        }
    }

    /// Copies bytes inside it, as a program's `memcpy` does.
    pub(crate) fn copy_in(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.len, "inside");
        let to = std::ptr::without_provenance_mut(self.addr + offset);
        // SAFETY: inside our mapping; the caller is the only one that uses these bytes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    /// Copies bytes out of it.
    pub(crate) fn copy_out(&self, offset: usize, bytes: &mut [u8]) {
        assert!(offset + bytes.len() <= self.len, "inside");
        let from = std::ptr::without_provenance(self.addr + offset);
        // SAFETY: inside our mapping; the caller is the only one that uses these bytes.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
    }

    pub(crate) fn advise(&self, advice: i32) -> io::Result<()> {
        advise(self.addr, self.len, advice)
    }

    pub(crate) fn advise_pages(&self, first: usize, pages: usize, advice: i32) -> io::Result<()> {
        advise(self.at(first), pages * page_size(), advice)
    }

    pub(crate) fn protect_pages(
        &self,
        first: usize,
        pages: usize,
        protection: i32,
    ) -> io::Result<()> {
        let at = [self.at(first), pages * page_size(), protection as usize];
        call(libc::SYS_mprotect, &at).map(drop)
    }

    pub(crate) fn lock_pages(&self, first: usize, pages: usize, locked: bool) -> io::Result<()> {
        let number = if locked {
            libc::SYS_mlock
        } else {
            libc::SYS_munlock
        };
        call(number, &[self.at(first), pages * page_size()]).map(drop)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // With the guard pages; huge memory has none, and nothing of anybody else is there either.
        // A sealed mapping stays.
        let _ = call(libc::SYS_munmap, &[self.addr, self.len]);
    }
}

pub(crate) fn advise(addr: usize, len: usize, advice: i32) -> io::Result<()> {
    call(libc::SYS_madvise, &[addr, len, advice as usize]).map(drop)
}

/// What the kernel shows for one page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry(pub(crate) u64);

impl Entry {
    pub(crate) fn is_present(self) -> bool {
        self.0 >> 63 & 1 == 1
    }

    pub(crate) fn is_swapped(self) -> bool {
        self.0 >> 62 & 1 == 1
    }

    pub(crate) fn is_file(self) -> bool {
        self.0 >> 61 & 1 == 1
    }

    pub(crate) fn is_protected(self) -> bool {
        self.0 >> 57 & 1 == 1
    }

    pub(crate) fn is_exclusive(self) -> bool {
        self.0 >> 56 & 1 == 1
    }

    /// 0 without privilege.
    pub(crate) fn frame_number(self) -> u64 {
        self.0 & ((1 << 55) - 1)
    }
}

/// The page's entry in `/proc/self/pagemap`. Opened for each look: the tests fork and close things.
pub(crate) fn entry(addr: usize) -> Entry {
    use std::os::unix::fs::FileExt;
    let mut bytes = [0; 8];
    File::open("/proc/self/pagemap")
        .and_then(|file| file.read_exact_at(&mut bytes, (addr / page_size() * 8) as u64))
        .expect("/proc/self/pagemap can be read");
    Entry(u64::from_le_bytes(bytes))
}

/// Entries of many pages at once.
pub(crate) fn entries(memory: &Memory) -> Vec<Entry> {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; memory.pages() * 8];
    File::open("/proc/self/pagemap")
        .and_then(|file| file.read_exact_at(&mut bytes, (memory.addr() / page_size() * 8) as u64))
        .expect("/proc/self/pagemap can be read");
    bytes
        .chunks_exact(8)
        .map(|b| Entry(u64::from_le_bytes(b.try_into().expect("8 bytes"))))
        .collect()
}

/// A mapping, as `/proc/self/smaps` shows it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Vma {
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) permissions: String,
    pub(crate) name: String,
    /// `VmFlags`.
    pub(crate) flags: Vec<String>,
    /// Figures in KiB by name.
    pub(crate) kib: BTreeMap<String, u64>,
}

impl Vma {
    pub(crate) fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|f| f == flag)
    }
}

/// The mappings that have an address in the range.
pub(crate) fn mappings(addr: usize, len: usize) -> Vec<Vma> {
    let text = fs::read_to_string("/proc/self/smaps").expect("/proc/self/smaps can be read");
    let mut found: Vec<Vma> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((start, end)) = first.split_once('-') {
            let hex = |digits| usize::from_str_radix(digits, 16).expect("an address");
            found.push(Vma {
                start: hex(start),
                end: hex(end),
                permissions: words.next().unwrap_or_default().into(),
                name: words.nth(3).unwrap_or_default().into(),
                ..Vma::default()
            });
        } else if let Some(vma) = found.last_mut() {
            let name = first.trim_end_matches(':');
            if name == "VmFlags" {
                vma.flags = words.map(Into::into).collect();
            } else if let Some(value) = words.next().and_then(|word| word.parse().ok()) {
                vma.kib.insert(name.into(), value);
            }
        }
    }
    found.retain(|vma| vma.start < addr + len && vma.end > addr);
    found
}

pub(crate) fn mappings_of(memory: &Memory) -> Vec<Vma> {
    mappings(memory.addr(), memory.len())
}

/// The sum of one figure over a range, in KiB.
pub(crate) fn kib_of(memory: &Memory, name: &str) -> u64 {
    mappings_of(memory)
        .iter()
        .filter_map(|vma| vma.kib.get(name))
        .sum()
}

/// What is mapped at a page, for messages.
pub(crate) fn describe(addr: usize) -> String {
    let vma = mappings(addr, 1).into_iter().next();
    let vma = vma.map_or("nothing mapped".into(), |vma| {
        let flags = vma.flags.join(" ");
        format!(
            "{:x}-{:x} {} {} [{flags}]",
            vma.start, vma.end, vma.permissions, vma.name
        )
    });
    format!("entry {:x?}, {vma}", entry(addr))
}

/// A line of `/proc/self/status`, as a number.
pub(crate) fn status(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/self/status").expect("/proc/self/status can be read");
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .and_then(|rest| rest.split_ascii_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

/// A figure of `/proc/self/smaps_rollup`, in KiB.
pub(crate) fn rollup(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/self/smaps_rollup").expect("it can be read");
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .and_then(|rest| rest.split_ascii_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

pub(crate) fn map_count() -> usize {
    fs::read_to_string("/proc/self/maps")
        .expect("/proc/self/maps can be read")
        .lines()
        .count()
}

// ------------------------------------------------------------------------- files and pipes

pub(crate) fn temporary(name: &str) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("pagemerge-{}-{number}-{name}", std::process::id()))
}

/// A file without a name.
pub(crate) fn scratch_file() -> io::Result<File> {
    let path = temporary("output");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)?;
    fs::remove_file(&path)?;
    Ok(file)
}

/// A file whose page `n` is content `contents[n]`, opened for `O_DIRECT` reading.
pub(crate) fn direct_file(contents: &[u64]) -> io::Result<File> {
    let path = temporary("direct");
    let mut file = File::create(&path)?;
    let mut bytes = Vec::new();
    for &content in contents {
        bytes.extend((0..page_size() / 8).flat_map(|index| word_of(content, index).to_ne_bytes()));
    }
    file.write_all(&bytes)?;
    file.sync_all()?;
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(&path);
    fs::remove_file(&path)?;
    let opened = opened?;
    // Some file systems accept the flag and refuse the reading.
    let memory = Memory::new(1);
    read_at(opened.as_raw_fd(), memory.addr(), page_size(), 0)?;
    Ok(opened)
}

pub(crate) fn pipe() -> (OwnedFd, OwnedFd) {
    let mut ends = [0_i32; 2];
    call(
        libc::SYS_pipe2,
        &[ends.as_mut_ptr().addr(), libc::O_CLOEXEC as usize],
    )
    .expect("a pipe");
    own(ends)
}

pub(crate) fn socket_pair() -> (OwnedFd, OwnedFd) {
    let mut ends = [0_i32; 2];
    let kind = [
        libc::AF_UNIX as usize,
        libc::SOCK_STREAM as usize,
        0,
        ends.as_mut_ptr().addr(),
    ];
    call(libc::SYS_socketpair, &kind).expect("a pair of sockets");
    own(ends)
}

fn own(ends: [i32; 2]) -> (OwnedFd, OwnedFd) {
    // SAFETY: the kernel has just given us the first,
    let first = unsafe { OwnedFd::from_raw_fd(ends[0]) };
    // SAFETY: and the second.
    let second = unsafe { OwnedFd::from_raw_fd(ends[1]) };
    (first, second)
}

pub(crate) fn own_fd(fd: usize) -> OwnedFd {
    // SAFETY: the caller has just got it from the kernel.
    unsafe { OwnedFd::from_raw_fd(fd as RawFd) }
}

/// `read(2)` straight to an address.
pub(crate) fn read_to(fd: RawFd, addr: usize, len: usize) -> io::Result<usize> {
    call(libc::SYS_read, &[fd as usize, addr, len])
}

/// `pread(2)` straight to an address.
pub(crate) fn read_at(fd: RawFd, addr: usize, len: usize, offset: u64) -> io::Result<usize> {
    call(
        libc::SYS_pread64,
        &[fd as usize, addr, len, offset as usize],
    )
}

/// `write(2)` straight from an address.
pub(crate) fn write_from(fd: RawFd, addr: usize, len: usize) -> io::Result<usize> {
    call(libc::SYS_write, &[fd as usize, addr, len])
}

pub(crate) fn receive(fd: RawFd, addr: usize, len: usize) -> io::Result<usize> {
    call(
        libc::SYS_recvfrom,
        &[fd as usize, addr, len, libc::MSG_WAITALL as usize, 0, 0],
    )
}

/// `readv(2)` to two places.
pub(crate) fn read_to_both(fd: RawFd, places: [(usize, usize); 2]) -> io::Result<usize> {
    call(libc::SYS_readv, &[fd as usize, places.as_ptr().addr(), 2])
}

/// `process_vm_writev(2)` to ourselves.
pub(crate) fn write_own_memory(value: &[u8], addr: usize) -> io::Result<usize> {
    let local = [value.as_ptr().addr(), value.len()];
    let remote = [addr, value.len()];
    let me = std::process::id() as usize;
    let (local, remote) = (local.as_ptr().addr(), remote.as_ptr().addr());
    call(libc::SYS_process_vm_writev, &[me, local, 1, remote, 1, 0])
}

/// Gives a page to a pipe without copying it.
pub(crate) fn splice_page(pipe: RawFd, addr: usize, len: usize) -> io::Result<usize> {
    let place = [addr, len];
    call(
        libc::SYS_vmsplice,
        &[pipe as usize, place.as_ptr().addr(), 1, 0],
    )
}

/// Whether an address can be read, without touching it from here.
pub(crate) fn is_readable(addr: usize) -> bool {
    static PIPE: OnceLock<(OwnedFd, OwnedFd)> = OnceLock::new();
    let (read, write) = PIPE.get_or_init(pipe);
    let mut byte = [0_u8];
    write_from(write.as_raw_fd(), addr, 1).is_ok_and(|n| n == 1)
        && read_to(read.as_raw_fd(), byte.as_mut_ptr().addr(), 1).is_ok()
}

// ------------------------------------------------------------------------- processes

/// A forked child.
#[derive(Debug)]
pub(crate) struct Child(i32);

/// `fork(2)` with handlers, as the C library makes it.
pub(crate) fn fork(body: impl FnOnce() -> i32) -> Child {
    // SAFETY: the child runs `body`, which keeps to what a child of a threaded program may do
    // (reading memory, system calls, this crate's calls that say so), and leaves by `_exit`.
    match unsafe { libc::fork() } {
        0 => leave(body),
        id => {
            assert!(id > 0, "fork: {}", io::Error::last_os_error());
            Child(id)
        }
    }
}

/// A fork that calls no handlers.
pub(crate) fn raw_fork(body: impl FnOnce() -> i32) -> Child {
    match call(libc::SYS_clone, &[libc::SIGCHLD as usize]).expect("clone") {
        0 => leave(body),
        id => Child(id as i32),
    }
}

fn leave(body: impl FnOnce() -> i32) -> ! {
    let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or(101);
    let _ = call(libc::SYS_exit_group, &[code as usize]);
    unreachable!("it has exited");
}

impl Child {
    pub(crate) fn id(&self) -> i32 {
        self.0
    }

    /// Waits; the exit code, or `-signal`.
    pub(crate) fn wait(self) -> i32 {
        let mut status = 0_i32;
        loop {
            let got = call(
                libc::SYS_wait4,
                &[self.0 as usize, (&raw mut status).addr(), 0, 0],
            );
            match got {
                Ok(_) => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => panic!("wait: {e}"),
            }
        }
        if libc::WIFEXITED(status) {
            libc::WEXITSTATUS(status)
        } else {
            -libc::WTERMSIG(status)
        }
    }
}

/// Memory for the test's own allocations on this thread, so that a limit is met by the engine and not by
/// the test: pieces that are free again, below one that is not (or they would go back to the kernel).
pub(crate) fn stock_up() -> Vec<u8> {
    let pieces: Vec<Vec<u8>> = (0..200).map(|_| Vec::with_capacity(100 << 10)).collect();
    let above = Vec::with_capacity(100 << 10);
    drop(pieces);
    above
}

/// Sets a soft limit, at most to the hard one.
pub(crate) fn limit(resource: u32, soft: u64) {
    let mut pair = [0_u64; 2];
    let at = [0, resource as usize, 0, pair.as_mut_ptr().addr()];
    call(libc::SYS_prlimit64, &at).expect("a limit of our own process");
    pair[0] = soft.min(pair[1]);
    let at = [0, resource as usize, pair.as_ptr().addr(), 0];
    call(libc::SYS_prlimit64, &at).expect("a limit of our own process");
}

/// Seconds that a stress takes.
pub(crate) fn stress_time() -> Duration {
    let seconds = std::env::var("PAGEMERGE_STRESS_SECONDS")
        .ok()
        .and_then(|text| text.parse().ok());
    Duration::from_secs_f64(seconds.unwrap_or(5.0))
}

/// Waits for something that must come; whoever waits for ever is ended by the harness.
pub(crate) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    let mut told = false;
    while !done() {
        if !told && start.elapsed() > Duration::from_secs(20) {
            println!("still waiting: {what}");
            told = true;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

// ------------------------------------------------------------------------- userfaultfd of a program's own

const UFFD_USER_MODE_ONLY: usize = 1;
const UFFDIO_API: usize = 0xc018_aa3f;
const UFFDIO_REGISTER: usize = 0xc020_aa00;

/// A userfaultfd that has nothing to do with the engine's.
pub(crate) fn foreign_userfaultfd() -> OwnedFd {
    let flags = UFFD_USER_MODE_ONLY | libc::O_CLOEXEC as usize | libc::O_NONBLOCK as usize;
    let fd = own_fd(call(libc::SYS_userfaultfd, &[flags]).expect("userfaultfd"));
    let mut api = [0xaa_u64, 0, 0];
    let at = [fd.as_raw_fd() as usize, UFFDIO_API, api.as_mut_ptr().addr()];
    call(libc::SYS_ioctl, &at).expect("UFFDIO_API");
    fd
}

/// `mode`: 1 missing, 2 write-protect.
pub(crate) fn foreign_register(fd: &OwnedFd, addr: usize, len: usize, mode: u64) -> io::Result<()> {
    let mut register = [addr as u64, len as u64, mode, 0];
    let at = [
        fd.as_raw_fd() as usize,
        UFFDIO_REGISTER,
        register.as_mut_ptr().addr(),
    ];
    call(libc::SYS_ioctl, &at).map(drop)
}

/// Serves missing pages: each is `word` all over. Ends when `stop` is set.
pub(crate) fn foreign_serve(fd: &OwnedFd, stop: &AtomicBool, word: u64) {
    const UFFDIO_COPY: usize = 0xc028_aa03;
    const ADDRESS: usize = 2;
    let content = vec![word; page_size() / 8];
    while !stop.load(Ordering::SeqCst) {
        let mut event = [0_u64; 4];
        let into = event.as_mut_ptr().addr();
        if read_to(fd.as_raw_fd(), into, size_of_val(&event)).is_err() {
            std::thread::sleep(Duration::from_micros(50));
            continue;
        }
        let to = event[ADDRESS] & !(page_size() as u64 - 1);
        let from = content.as_ptr().addr() as u64;
        let mut copy = [to, from, page_size() as u64, 0, 0];
        let at = [
            fd.as_raw_fd() as usize,
            UFFDIO_COPY,
            copy.as_mut_ptr().addr(),
        ];
        while call(libc::SYS_ioctl, &at).is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock) {}
    }
}

/// A word anywhere in memory of the test's own.
pub(crate) fn load(addr: usize) -> u64 {
    let word: *const u64 = std::ptr::with_exposed_provenance(addr);
    // SAFETY: the tests pass addresses of their own mappings only; see the head of this file.
    unsafe { word.read_volatile() }
}

pub(crate) fn protect(addr: usize, len: usize, protection: i32) -> io::Result<()> {
    call(libc::SYS_mprotect, &[addr, len, protection as usize]).map(drop)
}

// ------------------------------------------------------------------------- odd memory

const SYS_MSEAL: i64 = 462;
const MADV_GUARD_INSTALL: i32 = 102;

pub(crate) fn seal(addr: usize, len: usize) -> io::Result<()> {
    call(SYS_MSEAL, &[addr, len, 0]).map(drop)
}

pub(crate) fn seal_probe() -> io::Result<()> {
    seal(Memory::new(1).addr(), page_size())
}

pub(crate) fn guard(memory: &Memory, first: usize, pages: usize) -> io::Result<()> {
    memory.advise_pages(first, pages, MADV_GUARD_INSTALL)
}

pub(crate) fn guard_probe() -> io::Result<()> {
    guard(&Memory::new(1), 0, 1)
}

// ------------------------------------------------------------------------- memory groups

/// A memory cgroup (version 1) of our own.
#[derive(Debug)]
pub(crate) struct Group(PathBuf);

impl Group {
    pub(crate) fn new(name: &str, limit_bytes: u64) -> Self {
        let path = format!(
            "/sys/fs/cgroup/memory/pagemerge-test-{name}-{}",
            std::process::id()
        );
        fs::create_dir(&path).expect("a memory group");
        let group = Self(path.into());
        group.set("memory.limit_in_bytes", limit_bytes);
        group
    }

    pub(crate) fn path(&self) -> &str {
        self.0.to_str().expect("plain text")
    }

    pub(crate) fn set(&self, name: &str, value: u64) {
        fs::write(self.0.join(name), value.to_string()).expect("a setting of our own group");
    }

    pub(crate) fn get(&self, name: &str) -> u64 {
        let text = fs::read_to_string(self.0.join(name)).expect("a figure of our own group");
        text.trim().parse().expect("a number")
    }

    /// How often the OOM killer has been there, and how often the limit was met.
    pub(crate) fn misery(&self) -> (u64, u64) {
        let text = fs::read_to_string(self.0.join("memory.oom_control")).unwrap_or_default();
        let kills = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        let kills = kills.and_then(|text| text.trim().parse().ok());
        (kills.unwrap_or(0), self.get("memory.failcnt"))
    }

    /// The group cannot get on without more memory: its processes wait.
    pub(crate) fn is_stuck(&self) -> bool {
        let text = fs::read_to_string(self.0.join("memory.oom_control")).unwrap_or_default();
        text.lines().any(|line| line == "under_oom 1")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Processes leave it a moment after they are reaped.
        for _ in 0..200 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        println!("a memory group is left behind: {}", self.path());
    }
}

/// Moves this process into a group.
pub(crate) fn enter_group(path: &str) {
    fs::write(format!("{path}/cgroup.procs"), "0").expect("entering a memory group");
}

/// A group (cgroup version 1) that limits how many threads its processes have.
#[derive(Debug)]
pub(crate) struct ThreadGroup(PathBuf);

impl ThreadGroup {
    pub(crate) fn new(name: &str) -> Self {
        let path = format!(
            "/sys/fs/cgroup/pids/pagemerge-test-{name}-{}",
            std::process::id()
        );
        fs::create_dir(&path).expect("a group");
        Self(path.into())
    }

    pub(crate) fn path(&self) -> &str {
        self.0.to_str().expect("plain text")
    }
}

impl Drop for ThreadGroup {
    fn drop(&mut self) {
        // Processes leave it a moment after they are reaped.
        for _ in 0..200 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        println!("a group is left behind: {}", self.path());
    }
}

pub(crate) const CAP_IPC_LOCK: u32 = 14;

/// Gives up a capability of this thread, and of those it starts from now on.
pub(crate) fn drop_capability(number: u32) {
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    let mut sets = [0_u32; 6];
    let at = [header.as_ptr().addr(), sets.as_mut_ptr().addr()];
    call(libc::SYS_capget, &at).expect("our own capabilities");
    for set in &mut sets[..3] {
        *set &= !(1 << number);
    }
    call(libc::SYS_capset, &at).expect("fewer capabilities");
}

// ------------------------------------------------------------------------- zram

/// A zram device of our own that is swapped to. Everything is put back when it is dropped.
#[derive(Debug)]
pub(crate) struct Swap {
    number: u32,
}

impl Swap {
    pub(crate) fn new(bytes: u64) -> io::Result<Self> {
        let number = fs::read_to_string("/sys/class/zram-control/hot_add")?;
        let swap = Self {
            number: number.trim().parse().expect("a number"),
        };
        fs::write(
            format!("/sys/block/zram{}/disksize", swap.number),
            bytes.to_string(),
        )?;
        // The header that mkswap would write.
        let mut header = vec![0; page_size()];
        header[1024..1028].copy_from_slice(&1_u32.to_ne_bytes());
        let last = (bytes / page_size() as u64 - 1) as u32;
        header[1028..1032].copy_from_slice(&last.to_ne_bytes());
        let end = header.len();
        header[end - 10..].copy_from_slice(b"SWAPSPACE2");
        let device = swap.device();
        wait_for("the device node", || fs::metadata(&device).is_ok());
        let mut file = OpenOptions::new().write(true).open(&device)?;
        file.write_all(&header)?;
        file.sync_all()?;
        drop(file);
        swap_on(&device)?;
        Ok(swap)
    }

    pub(crate) fn device(&self) -> String {
        format!("/dev/zram{}", self.number)
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        let off = swap_off(&self.device());
        let reset = fs::write(format!("/sys/block/zram{}/reset", self.number), "1");
        let removed = fs::write(
            "/sys/class/zram-control/hot_remove",
            self.number.to_string(),
        );
        println!("swap put back: {off:?} {reset:?} {removed:?}");
    }
}

/// Shows this process, and nobody else, `text` in the place of a file.
pub(crate) fn pretend(path: &str, text: &str) {
    const NOWHERE: usize = 0;
    static ONCE: std::sync::Once = std::sync::Once::new();
    let c = |text: &str| CString::new(text).expect("no zero in it");
    ONCE.call_once(|| {
        call(libc::SYS_unshare, &[libc::CLONE_NEWNS as usize])
            .expect("a view of mounts of our own");
        let (root, flags) = (c("/"), libc::MS_REC | libc::MS_PRIVATE);
        let at = [
            NOWHERE,
            root.as_ptr().addr(),
            NOWHERE,
            flags as usize,
            NOWHERE,
        ];
        call(libc::SYS_mount, &at).expect("mounts that nobody else sees");
    });
    let file = temporary("pretended");
    fs::write(&file, text).expect("a file");
    let (from, to) = (c(file.to_str().expect("plain text")), c(path));
    let at = [
        from.as_ptr().addr(),
        to.as_ptr().addr(),
        NOWHERE,
        libc::MS_BIND as usize,
        NOWHERE,
    ];
    call(libc::SYS_mount, &at).expect("a file over another");
    fs::remove_file(&file).expect("our own file");
}

pub(crate) fn swap_on(device: &str) -> io::Result<()> {
    let path = CString::new(device).expect("no zero in it");
    call(libc::SYS_swapon, &[path.as_ptr().addr(), 0]).map(drop)
}

/// Brings everything in again first.
pub(crate) fn swap_off(device: &str) -> io::Result<()> {
    let path = CString::new(device).expect("no zero in it");
    call(libc::SYS_swapoff, &[path.as_ptr().addr()]).map(drop)
}

/// Pages of this process that the kernel's own merging shares.
pub(crate) fn merged_by_ksmd() -> u64 {
    let text = fs::read_to_string("/proc/self/ksm_merging_pages").unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

/// Held by tests that change a setting of the whole machine.
#[derive(Debug)]
pub(crate) struct MachineLock(File);

impl MachineLock {
    pub(crate) fn take() -> Self {
        Self::named("pagemerge-tests-machine.lock")
    }

    /// The one under which the Python tests change the kernel's own same-page merging.
    pub(crate) fn of_ksm() -> Self {
        Self::named("ksm.lock")
    }

    fn named(name: &str) -> Self {
        let path = std::env::temp_dir().join(name);
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path);
        let file = file.expect("a lock file");
        call(
            libc::SYS_flock,
            &[file.as_raw_fd() as usize, libc::LOCK_EX as usize],
        )
        .expect("a lock");
        Self(file)
    }
}

/// A setting of the whole machine, held under the [`MachineLock`] and put back when this is dropped.
///
/// A process of its own puts it back, whose input ends with this one: that happens also when the test
/// is killed, and whoever waits for the lock gets it only then.
#[derive(Debug)]
pub(crate) struct MachineSetting<'lock> {
    path: &'static str,
    before: String,
    keeper: std::process::Child,
    lock: PhantomData<&'lock MachineLock>,
}

impl<'lock> MachineSetting<'lock> {
    /// Notes what it is, for now.
    pub(crate) fn hold(lock: &'lock MachineLock, path: &'static str) -> Self {
        use std::os::unix::process::CommandExt;
        let before = chosen(path);
        let keeper = std::process::Command::new("sh")
            .args([
                "-c",
                "trap '' HUP INT TERM; cat > /dev/null; echo \"$0\" > \"$1\"",
            ])
            .args([&before, path])
            .stdin(std::process::Stdio::piped())
            // The lock lasts as long as its last descriptor.
            .stdout(lock.0.try_clone().expect("a second descriptor"))
            // Whoever ends this process's group does not end it.
            .process_group(0)
            .spawn()
            .expect("a keeper of the setting");
        Self {
            path,
            before,
            keeper,
            lock: PhantomData,
        }
    }

    pub(crate) fn set(lock: &'lock MachineLock, path: &'static str, value: &str) -> Self {
        let setting = Self::hold(lock, path);
        setting.change(value);
        setting
    }

    pub(crate) fn change(&self, value: &str) {
        fs::write(self.path, value).unwrap_or_else(|e| panic!("{value} to {}: {e}", self.path));
    }
}

impl Drop for MachineSetting<'_> {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        let kept = self.keeper.wait();
        let now = chosen(self.path);
        println!("{} is {now} again: {kept:?}", self.path);
        if !std::thread::panicking() {
            assert_eq!(now, self.before, "{} is not put back", self.path);
        }
    }
}

/// What a setting is; of a choice, the one in brackets is in force.
fn chosen(path: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("reading {path}: {e}"));
    let chosen = text
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'));
    chosen
        .map_or(text.trim(), |(chosen, _)| chosen.trim())
        .to_owned()
}

/// A figure of `/proc/vmstat`.
pub(crate) fn vmstat(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/vmstat").expect("/proc/vmstat can be read");
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
        .and_then(|value| value.parse().ok())
        .unwrap_or(0)
}

// ------------------------------------------------------------------------- rights taken away

/// What happens at a system call that a filter does not allow.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Denied {
    /// It fails with `EPERM`.
    Fails,
    /// The process is killed.
    Kills,
}

/// Forbids system calls from now on (seccomp), to this thread or to all of them.
pub(crate) fn forbid(calls: &[i64], denied: Denied, all_threads: bool) -> io::Result<()> {
    const LOAD_NUMBER: u16 = 0x20;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let filter = |code, jump, value| libc::sock_filter {
        code,
        jt: jump,
        jf: 0,
        k: value,
    };
    let mut program = vec![filter(LOAD_NUMBER, 0, 0)];
    for (at, number) in calls.iter().enumerate() {
        // Over those that follow, and the permission.
        let jump = u8::try_from(calls.len() - at).expect("a short list");
        program.push(filter(JUMP_IF_EQUAL, jump, *number as u32));
    }
    program.push(filter(RETURN, 0, libc::SECCOMP_RET_ALLOW));
    let action = match denied {
        Denied::Fails => libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
        Denied::Kills => libc::SECCOMP_RET_KILL_PROCESS,
    };
    program.push(filter(RETURN, 0, action));
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    call(
        libc::SYS_prctl,
        &[libc::PR_SET_NO_NEW_PRIVS as usize, 1, 0, 0, 0],
    )?;
    let flags = if all_threads {
        libc::SECCOMP_FILTER_FLAG_TSYNC
    } else {
        0
    };
    let mode = libc::SECCOMP_SET_MODE_FILTER as usize;
    call(
        libc::SYS_seccomp,
        &[mode, flags as usize, (&raw const program).addr()],
    )
    .map(drop)
}

/// Gives up all of root's rights, in every thread, as a server does once it has its port.
pub(crate) fn become_nobody() {
    const NOBODY: u32 = 65534;
    // SAFETY: the C library makes every thread do so; it touches no memory of ours.
    let done = unsafe { libc::setresuid(NOBODY, NOBODY, NOBODY) };
    assert_eq!(done, 0, "setresuid: {}", io::Error::last_os_error());
}

/// Makes an empty directory the root of this process: `/proc` is gone.
pub(crate) fn hide_all_files() {
    let path = temporary("empty-root");
    fs::create_dir(&path).expect("a directory");
    let name = CString::new(path.to_str().expect("plain text")).expect("no zero in it");
    call(libc::SYS_chdir, &[name.as_ptr().addr()]).expect("chdir");
    // It goes with its last user.
    fs::remove_dir(&path).expect("an empty directory");
    call(libc::SYS_chroot, &[c".".as_ptr().addr()]).expect("chroot");
}

/// Forbids this thread, and whatever it starts from now on, all files (Landlock).
pub(crate) fn lock_in() -> io::Result<()> {
    const CREATE_RULESET: i64 = 444;
    const RESTRICT_SELF: i64 = 446;
    // Execute, write, read, list: bits 0 to 3, of the first version.
    let handled = 0b1111_u64;
    let rules = own_fd(call(CREATE_RULESET, &[(&raw const handled).addr(), 8, 0])?);
    call(
        libc::SYS_prctl,
        &[libc::PR_SET_NO_NEW_PRIVS as usize, 1, 0, 0, 0],
    )?;
    call(RESTRICT_SELF, &[rules.as_raw_fd() as usize, 0]).map(drop)
}
