//! Everything that writes to memory, one actor for each way.
//!
//! A writer claims a sector or two, looks whether they are as they should be, writes, looks again,
//! and lets go. Soon afterwards it brings the page home to its class.

use crate::arena::{Claim, PINNABLE, SECTOR, WHOLE, content};
use crate::engines::QUIET_FOR_DEVICES;
use crate::support::os::{self, call, page_size};
use crate::support::raw;
use crate::support::ring::Ring;
use crate::world::Me;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::{Duration, Instant};

/// Pages that a writer has away from their class at any time, at most.
const AWAY: usize = 5;

/// Which arenas a writer may write to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    User,
    Call,
    Device,
}

/// How a write ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wrote {
    Done,
    /// It took longer than the quiet time: beyond the promise, which says that the quiet time must
    /// be longer than the longest I/O.
    Late,
}

/// Writes bytes to a claimed page, from an offset on.
type Write<'a> = &'a mut dyn FnMut(&mut Me, &Claim, usize, &[u8]) -> Wrote;

/// A random page of an arena that `by` may write to.
pub(crate) fn anywhere(me: &mut Me, by: By) -> (usize, usize) {
    let arenas = &me.world.arenas;
    loop {
        let number = me.random.below(arenas.len());
        let rules = arenas[number].rules;
        if match by {
            By::User => true,
            By::Call => rules.calls,
            By::Device => rules.devices,
        } {
            return (number, me.random.below(arenas[number].pages));
        }
    }
}

/// One visit of a writer: takes a sector away from its class, or brings the oldest one home.
pub(crate) fn visit(me: &mut Me, what: &'static str, by: By, write: Write<'_>) {
    let home = me.away.len() >= AWAY || !me.away.is_empty() && me.chance(30);
    let (number, page, sectors) = if home {
        me.away.pop_front().expect("looked at just now")
    } else {
        let (number, page) = anywhere(me, by);
        // A sector, two neighbours, or the whole page.
        let sectors = match me.random.below(8) {
            0 => WHOLE,
            1 => 3 << me.random.below(7),
            _ => 1 << me.random.below(8),
        };
        (number, page, sectors)
    };
    let Some(claim) = Claim::now(me, number, page, sectors) else {
        if home {
            me.away.push_back((number, page, sectors));
        }
        return;
    };
    me.begin(
        what,
        number,
        page,
        1,
        u64::from(sectors) | u64::from(home) << 16,
    );
    claim.verify(me, "before a write");
    let (offset, len) = claim.range();
    let mut bytes = [0; 4096];
    let (from, bytes) = if home {
        claim.homely(page, offset, &mut bytes[..len]);
        (offset, &bytes[..len])
    } else {
        // Devices write whole sectors; all others also a few bytes anywhere.
        let (from, count) = if by == By::Device || me.chance(30) {
            (0, len)
        } else {
            let from = me.random.below(len);
            (from, 1 + me.random.below(len - from))
        };
        for byte in &mut bytes[..count] {
            *byte = me.random.next().to_le_bytes()[0];
        }
        me.away.push_back((number, page, sectors));
        (offset + from, &bytes[..count])
    };
    claim.expect(from, bytes);
    match write(me, &claim, from, bytes) {
        Wrote::Done => {}
        Wrote::Late => {
            me.count("late I/O (beyond the promise)", 1);
            claim.repair();
        }
    }
    claim.verify(me, "after a write");
    if me.chance(20) {
        me.pause(300);
        me.begin("look", number, page, 1, u64::from(sectors));
        claim.verify(me, "some time after a write");
    }
    me.count("writes", 1);
    me.count("bytes written", bytes.len() as u64);
    me.done();
}

fn live(me: &mut Me, what: &'static str, by: By, write: Write<'_>) {
    while !me.is_over() {
        visit(me, what, by, write);
        me.pause(1500);
    }
}

/// Plain stores, word by word where they are aligned, timed: what a writer waits.
pub(crate) fn store(me: &mut Me) {
    live(me, "store", By::User, &mut |me, claim, offset, bytes| {
        store_words(me, claim, offset, bytes);
        Wrote::Done
    });
}

pub(crate) fn store_words(me: &mut Me, claim: &Claim, offset: usize, bytes: &[u8]) {
    let at = claim.at() + offset;
    let (head, rest) = bytes.split_at((at.next_multiple_of(8) - at).min(bytes.len()));
    let begun = Instant::now();
    raw::copy_in(at, head);
    let mut to = at + head.len();
    let words = rest.chunks_exact(8);
    let tail = words.remainder();
    for word in words {
        let value = u64::from_ne_bytes(word.try_into().expect("8 bytes"));
        raw::word(to).store(value, std::sync::atomic::Ordering::Relaxed);
        to += 8;
    }
    raw::copy_in(to, tail);
    let waited = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
    me.most("longest wait of a store, us", waited);
    if waited > 1000 {
        me.count("stores that waited over 1 ms", 1);
    }
}

/// Atomic exchanges and additions: each must find what was there before.
pub(crate) fn atomic(me: &mut Me) {
    use std::sync::atomic::Ordering::Relaxed;
    live(me, "atomic", By::User, &mut |me, claim, offset, bytes| {
        let mut to = claim.at() + offset;
        let head = (to.next_multiple_of(8) - to).min(bytes.len());
        raw::copy_in(to, &bytes[..head]);
        to += head;
        let words = bytes[head..].chunks_exact(8);
        let tail = words.remainder();
        for (n, word) in words.enumerate() {
            let value = u64::from_ne_bytes(word.try_into().expect("8 bytes"));
            let before = raw::word(to).load(Relaxed);
            let got = if n % 2 == 0 {
                raw::word(to).swap(value, Relaxed)
            } else {
                raw::word(to).fetch_add(value.wrapping_sub(before), Relaxed)
            };
            if got != before {
                me.fail(
                    claim.number,
                    claim.page,
                    &format!("an atomic found {got:x} and not {before:x}"),
                );
            }
            to += 8;
        }
        raw::copy_in(to, tail);
        Wrote::Done
    });
}

/// `memcpy` over page borders, up to four pages at once.
pub(crate) fn copy(me: &mut Me) {
    let mut bytes = vec![0; 4 * page_size()];
    while !me.is_over() {
        let (number, page) = anywhere(me, By::User);
        let arena = &me.world.arenas[number];
        let pages = 2 + me.random.below(3);
        if page + pages > arena.pages {
            continue;
        }
        let claim = Claim::wait(me, number, page, pages);
        me.begin("copy", number, page, pages, 0);
        claim.verify(me, "before a copy");
        let from = me.random.below(page_size());
        let to = claim.len() - me.random.below(page_size());
        let bytes = &mut bytes[..to - from];
        for byte in bytes.iter_mut() {
            *byte = me.random.next().to_le_bytes()[0];
        }
        claim.expect(from, bytes);
        raw::copy_in(claim.at() + from, bytes);
        claim.verify(me, "after a copy");
        me.pause(400);
        me.begin("copy home", number, page, pages, 0);
        claim.verify(me, "some time after a copy");
        let mut whole = vec![0; claim.len()];
        for n in 0..pages {
            content(
                arena.home(page + n),
                &mut whole[n * page_size()..(n + 1) * page_size()],
            );
        }
        claim.expect(0, &whole);
        raw::copy_in(claim.at(), &whole);
        claim.verify(me, "after a copy home");
        me.count("writes", 2);
        me.count("bytes written", (whole.len() + to - from) as u64);
        drop(claim);
        me.pause(4000);
    }
}

/// `read(2)` from a pipe, and from `/dev/zero`.
pub(crate) fn read(me: &mut Me) {
    let (out, into) = os::pipe();
    let zero = File::open("/dev/zero").expect("/dev/zero");
    live(me, "read", By::Call, &mut |me, claim, offset, bytes| {
        let at = claim.at() + offset;
        if me.chance(20) {
            let got =
                os::read_to(zero.as_raw_fd(), at, bytes.len()).expect("read never says EFAULT");
            assert_eq!(got, bytes.len());
            let mut back = vec![1; bytes.len()];
            raw::copy_out(at, &mut back);
            if back.iter().any(|byte| *byte != 0) {
                me.fail(claim.number, claim.page, "zeroes that were read are lost");
            }
        }
        feed(&into, bytes);
        let got = os::read_to(out.as_raw_fd(), at, bytes.len()).expect("read never says EFAULT");
        assert_eq!(got, bytes.len());
        Wrote::Done
    });
}

fn feed(into: &impl AsRawFd, bytes: &[u8]) {
    let wrote = os::write_from(into.as_raw_fd(), bytes.as_ptr().addr(), bytes.len());
    assert_eq!(
        wrote.expect("room in a pipe or socket of ours"),
        bytes.len()
    );
}

/// `recv(2)` from a socket.
pub(crate) fn receive(me: &mut Me) {
    let (out, into) = os::socket_pair();
    live(me, "recv", By::Call, &mut |_, claim, offset, bytes| {
        feed(&into, bytes);
        let got = os::receive(out.as_raw_fd(), claim.at() + offset, bytes.len());
        assert_eq!(got.expect("recv never says EFAULT"), bytes.len());
        Wrote::Done
    });
}

/// `readv(2)` to two places of one page.
pub(crate) fn vectors(me: &mut Me) {
    let (out, into) = os::pipe();
    live(me, "readv", By::Call, &mut |me, claim, offset, bytes| {
        let at = claim.at() + offset;
        let half = me.random.below(bytes.len() + 1);
        feed(&into, bytes);
        let places = [(at, half), (at + half, bytes.len() - half)];
        let got = os::read_to_both(out.as_raw_fd(), places).expect("readv never says EFAULT");
        assert_eq!(got, bytes.len());
        Wrote::Done
    });
}

/// `process_vm_writev(2)` to ourselves. The kernel holds the page pinned while it copies.
pub(crate) fn remote(me: &mut Me) {
    live(me, "remote", By::Call, &mut |_, claim, offset, bytes| {
        let got = os::write_own_memory(bytes, claim.at() + offset);
        assert_eq!(
            got.expect("process_vm_writev never says EFAULT"),
            bytes.len()
        );
        Wrote::Done
    });
}

/// Writes all of it, again where a window says EIO. How often that was, and whether it gave up: a page
/// under a quiet watch says EIO until an engine looks at it again, and perhaps none does.
fn insist(file: &File, bytes: &[u8], at: usize) -> (u64, bool) {
    let begun = Instant::now();
    let (mut done, mut refused) = (0, 0);
    while done < bytes.len() {
        if begun.elapsed() > Duration::from_secs(3) {
            return (refused, true);
        }
        match file.write_at(&bytes[done..], (at + done) as u64) {
            Ok(wrote) => done += wrote,
            Err(error) => {
                assert_eq!(
                    error.raw_os_error(),
                    Some(libc::EIO),
                    "/proc/PID/mem: {error}"
                );
                refused += 1;
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }
    (refused, false)
}

/// Books what [`insist`] says; what it gave up is written by hand.
fn insisted(me: &mut Me, at: usize, bytes: &[u8], (refused, gave_up): (u64, bool)) {
    me.count("EIO from /proc/PID/mem (tried again)", refused);
    if gave_up {
        me.count("EIO from /proc/PID/mem for 3 s (given up)", 1);
        raw::copy_in(at, bytes);
    }
}

/// `/proc/self/mem`, which says EIO in a window.
pub(crate) fn debugger(me: &mut Me) {
    let file = OpenOptions::new()
        .write(true)
        .open("/proc/self/mem")
        .expect("our own memory");
    live(me, "debugger", By::Call, &mut |me, claim, offset, bytes| {
        let at = claim.at() + offset;
        insisted(me, at, bytes, insist(&file, bytes, at));
        Wrote::Done
    });
}

/// The same from another process. It is forked before anything else happens, has nothing of ours
/// but a socket, and answers each request with how often it was refused.
pub(crate) struct Stranger {
    wire: std::os::fd::OwnedFd,
}

impl Stranger {
    pub(crate) fn begin() -> Self {
        let (ours, theirs) = os::socket_pair();
        let parent = std::process::id();
        let _child = os::fork(|| {
            os::die_with_parent();
            serve(parent, theirs.as_raw_fd());
            0
        });
        Self { wire: ours }
    }

    fn ask(&self, by_debugger: bool, at: usize, bytes: &[u8]) -> (u64, bool) {
        let mut request = Vec::with_capacity(24 + bytes.len());
        for word in [u64::from(by_debugger), at as u64, bytes.len() as u64] {
            request.extend(word.to_ne_bytes());
        }
        request.extend(bytes);
        feed(&self.wire, &request);
        let mut reply = [0_u64; 2];
        let got = os::receive(self.wire.as_raw_fd(), reply.as_mut_ptr().addr(), 16);
        assert_eq!(got.expect("the helper process answers"), 16);
        (reply[0], reply[1] == 1)
    }
}

/// The helper process: no threads, so it may do anything.
fn serve(parent: u32, wire: RawFd) {
    let file = OpenOptions::new()
        .write(true)
        .open(format!("/proc/{parent}/mem"));
    let file = file.expect("our parent's memory");
    let mut bytes = [0_u8; 4096];
    loop {
        let mut head = [0_u64; 3];
        match os::receive(wire, head.as_mut_ptr().addr(), 24) {
            Ok(24) => {}
            _ => return,
        }
        let [by_debugger, at, len] = head;
        let (at, bytes) = (at as usize, &mut bytes[..len as usize]);
        let got = os::receive(wire, bytes.as_mut_ptr().addr(), bytes.len());
        assert_eq!(got.expect("the request's bytes"), bytes.len());
        let (refused, gave_up) = if by_debugger == 1 {
            insist(&file, bytes, at)
        } else {
            let (local, remote) = ([bytes.as_ptr().addr(), bytes.len()], [at, bytes.len()]);
            let (local, remote) = (local.as_ptr().addr(), remote.as_ptr().addr());
            let got = call(
                libc::SYS_process_vm_writev,
                &[parent as usize, local, 1, remote, 1, 0],
            );
            assert_eq!(got.expect("never EFAULT"), bytes.len());
            (0, false)
        };
        let reply = [refused, u64::from(gave_up)];
        if os::write_from(wire, reply.as_ptr().addr(), 16).is_err() {
            return;
        }
    }
}

/// Another process writes our memory, by both ways.
pub(crate) fn stranger(me: &mut Me, stranger: &Stranger) {
    live(me, "stranger", By::Call, &mut |me, claim, offset, bytes| {
        let by_debugger = me.chance(50);
        let at = claim.at() + offset;
        insisted(me, at, bytes, stranger.ask(by_debugger, at, bytes));
        Wrote::Done
    });
}

/// Gives pages to a pipe without copying them. What comes out is what was there; or, if it is written
/// meanwhile, the old or the new byte: the pipe may hold the very page, or what was the page before a
/// copy was made.
pub(crate) fn splice(me: &mut Me) {
    let (out, into) = os::pipe();
    let mut old = [0; 4096];
    live(me, "splice", By::Call, &mut |me, claim, offset, bytes| {
        let at = claim.at() + offset;
        let old = &mut old[..bytes.len()];
        let before = me.chance(50);
        if before {
            raw::copy_in(at, bytes);
        }
        raw::copy_out(at, old);
        let got = os::splice_page(into.as_raw_fd(), at, bytes.len());
        assert_eq!(got.expect("vmsplice never says EFAULT"), bytes.len());
        if me.chance(50) {
            std::thread::sleep(Duration::from_micros(me.random.below(3000) as u64));
        }
        if !before {
            raw::copy_in(at, bytes);
            if me.chance(30) {
                std::thread::sleep(Duration::from_micros(me.random.below(1000) as u64));
            }
        }
        let mut back = vec![0; bytes.len()];
        let mut got = 0;
        while got < back.len() {
            let rest = &mut back[got..];
            let more = os::read_to(out.as_raw_fd(), rest.as_mut_ptr().addr(), rest.len());
            got += more.expect("the pipe has what was given to it");
        }
        let wrong = (0..bytes.len()).find(|&n| back[n] != old[n] && back[n] != bytes[n]);
        if let Some(n) = wrong {
            me.fail(claim.number, claim.page, &format!(
                "a pipe delivers {:x}, neither the old byte {:x} nor the new one {:x}, {n} bytes from the first",
                back[n], old[n], bytes[n]
            ));
        }
        Wrote::Done
    });
}

/// A file for `O_DIRECT`: one page for each writer's bytes.
fn direct(len: usize) -> File {
    let path = os::temporary("torture");
    let mut file = File::create(&path).expect("a temporary file");
    file.write_all(&vec![0; len]).expect("a temporary file");
    file.sync_all().expect("a temporary file");
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(&path);
    std::fs::remove_file(&path).expect("a temporary file");
    opened.expect("O_DIRECT, looked at before")
}

/// Puts bytes into a file past the memory under test.
fn put(file: &File, bounce: usize, bytes: &[u8]) {
    raw::copy_in(bounce, bytes);
    let at = [file.as_raw_fd() as usize, bounce, bytes.len(), 0];
    let wrote = call(libc::SYS_pwrite64, &at).expect("O_DIRECT writing");
    assert_eq!(wrote, bytes.len());
}

/// `O_DIRECT`: reads from a file to memory, and writes from memory to a file.
pub(crate) fn device(me: &mut Me) {
    let file = direct(page_size());
    let bounce = raw::map(2, 0);
    live(me, "direct", By::Device, &mut |me, claim, offset, bytes| {
        let at = claim.at() + offset;
        put(&file, bounce, bytes);
        let begun = Instant::now();
        let got = os::read_at(file.as_raw_fd(), at, bytes.len(), 0);
        let took = begun.elapsed();
        assert_eq!(got.expect("O_DIRECT never says EFAULT"), bytes.len());
        me.most("longest O_DIRECT read, us", took.as_micros() as u64);
        if took >= QUIET_FOR_DEVICES {
            return Wrote::Late;
        }
        claim.verify(me, "after an O_DIRECT read");
        // And out again.
        put(&file, bounce, &[0; 4096][..bytes.len()]);
        let wrote = call(
            libc::SYS_pwrite64,
            &[file.as_raw_fd() as usize, at, bytes.len(), 0],
        );
        assert_eq!(wrote.expect("O_DIRECT never says EFAULT"), bytes.len());
        let got = os::read_at(file.as_raw_fd(), bounce, bytes.len(), 0).expect("O_DIRECT");
        assert_eq!(got, bytes.len());
        let mut back = vec![0; bytes.len()];
        raw::copy_out(bounce, &mut back);
        if back != bytes {
            me.fail(
                claim.number,
                claim.page,
                "O_DIRECT wrote other bytes to a file",
            );
        }
        Wrote::Done
    });
}

/// `io_uring` with fixed buffers: pages stay pinned for a while, and the kernel writes to them.
pub(crate) fn ring(me: &mut Me) {
    let file = direct(page_size());
    let bounce = raw::map(2, 0);
    let mut bytes = [0; 4096];
    while !me.is_over() {
        let Ok(ring) = Ring::new() else {
            me.count("no ring", 1);
            me.rest(500);
            continue;
        };
        let (number, _) = anywhere(me, By::Device);
        let arena = &me.world.arenas[number];
        let first = arena.pages - PINNABLE + me.random.below(PINNABLE - 8);
        // Claimed, because a merge without a barrier must not meet it half done.
        let claim = Claim::wait(me, number, first, 8);
        me.begin("pin", number, first, 8, 0);
        let pinned = ring.pin(&[(arena.at(first), 8 * page_size())]);
        drop(claim);
        if let Err(error) = pinned {
            me.count(&format!("error: pinning: {error}"), 1);
            me.rest(500);
            continue;
        }
        for _ in 0..40 + me.random.below(200) {
            if me.is_over() {
                break;
            }
            let page = first + me.random.below(8);
            let sectors = if me.chance(20) {
                WHOLE
            } else {
                1 << me.random.below(8)
            };
            let Some(claim) = Claim::now(me, number, page, sectors) else {
                me.pause(300);
                continue;
            };
            me.begin("ring", number, page, 1, u64::from(sectors));
            claim.verify(me, "before a fixed read");
            let (offset, len) = claim.range();
            let bytes = &mut bytes[..len];
            if me.chance(50) {
                claim.homely(page, offset, bytes);
            } else {
                for byte in bytes.iter_mut() {
                    *byte = me.random.next().to_le_bytes()[0];
                }
            }
            put(&file, bounce, bytes);
            claim.expect(offset, bytes);
            let got = ring.read_fixed(file.as_raw_fd(), 0, claim.at() + offset, len as u32, 0);
            assert_eq!(usize::try_from(got), Ok(len), "a fixed read");
            claim.verify(me, "after a fixed read");
            me.count("writes", 1);
            me.count("bytes written", len as u64);
            drop(claim);
            me.pause(2000);
        }
        drop(ring);
        me.count("rings", 1);
        // Without any ring, written pages may be merged again.
        me.rest(4000);
    }
}

/// Looks at everything, in many ways, all the time.
pub(crate) fn check(me: &mut Me) {
    let file = os::scratch_file().expect("a temporary file");
    while !me.is_over() {
        let by_call = me.chance(30);
        let (number, page) = anywhere(me, if by_call { By::Call } else { By::User });
        let arena = &me.world.arenas[number];
        for page in page..(page + 64).min(arena.pages) {
            let Some(claim) = Claim::now(me, number, page, WHOLE) else {
                continue;
            };
            me.begin("check", number, page, 1, 0);
            if by_call {
                claim.verify_by_call(me, &file, "looked at by a system call");
            } else {
                claim.verify(me, "looked at");
            }
        }
        me.count("looks", 1);
        me.pause(6000);
    }
}

/// Gives runs of pages another class: a class of their own, or one that they share with many.
pub(crate) fn classes(me: &mut Me) {
    let mut bytes = vec![0; page_size()];
    while !me.is_over() {
        let (number, page) = anywhere(me, By::User);
        let arena = &me.world.arenas[number];
        let pages = (1 + me.random.below(48)).min(arena.pages - page);
        let kind = me.random.below(10);
        let class = me.random.next();
        for n in 0..pages {
            let claim = Claim::wait(me, number, page + n, 1);
            me.begin("class", number, page + n, 1, kind as u64);
            claim.verify(me, "before another class");
            let class = match kind {
                0 => 1_000_000 + me.random.next() % 1_000_000,
                1 | 2 => 0,
                3 | 4 => class % crate::arena::CLASSES,
                // As any twin of it: runs equal runs.
                _ => (page + n) as u64 % crate::arena::CLASSES,
            };
            claim.set_home(claim.page, class);
            content(class, &mut bytes);
            claim.expect(0, &bytes);
            store_words(me, &claim, 0, &bytes);
            claim.verify(me, "after another class");
            me.count("writes", 1);
            me.count("bytes written", bytes.len() as u64);
        }
        me.pause(20_000);
    }
}

/// Threads that write and end at once, in the middle of whatever goes on.
pub(crate) fn threads(me: &mut Me) {
    while !me.is_over() {
        let (world, seed) = (me.world, me.random.next());
        let log = me.name.clone();
        me.begin("threads", usize::MAX, 0, 0, 0);
        let made: Vec<_> = (0..2)
            .map(|n| {
                let name = format!("{log}-{n}-");
                std::thread::spawn(move || {
                    let mut it = Me::brief(world, &name, seed ^ n);
                    for _ in 0..6 {
                        visit(
                            &mut it,
                            "brief store",
                            By::User,
                            &mut |me, claim, offset, bytes| {
                                store_words(me, claim, offset, bytes);
                                Wrote::Done
                            },
                        );
                    }
                    // Its last write, then its end; others bring the pages home.
                    std::mem::take(&mut it.away)
                })
            })
            .collect();
        for thread in made {
            let away = thread.join().expect("it fails by ending the process");
            me.count("threads ended", 1);
            for (number, page, sectors) in away {
                me.away.push_back((number, page, sectors));
            }
        }
        me.done();
        while !me.away.is_empty() {
            bring_home(me);
        }
        me.pause(8000);
    }
}

/// Brings the oldest page home.
fn bring_home(me: &mut Me) {
    let Some((number, page, sectors)) = me.away.pop_front() else {
        return;
    };
    let Some(claim) = Claim::now(me, number, page, sectors) else {
        me.away.push_back((number, page, sectors));
        me.pause(100);
        return;
    };
    me.begin("home", number, page, 1, u64::from(sectors));
    claim.verify(me, "before it comes home");
    let (offset, len) = claim.range();
    let mut bytes = [0; 4096];
    claim.homely(page, offset, &mut bytes[..len]);
    claim.expect(offset, &bytes[..len]);
    store_words(me, &claim, offset, &bytes[..len]);
    claim.verify(me, "home");
    me.done();
}

/// `vfork` children, which share our memory and write to it; and programs started by `posix_spawn`.
pub(crate) fn spawns(me: &mut Me) {
    while !me.is_over() {
        for _ in 0..10 {
            visit(me, "vfork", By::User, &mut |me, claim, offset, bytes| {
                let at = claim.at() + offset;
                raw::copy_in(at, bytes);
                // The first whole word of it once more, by a child.
                let skip = at.next_multiple_of(8) - at;
                if let Some(word) = bytes.get(skip..skip + 8) {
                    raw::word(at + skip).store(0x5151_5151, std::sync::atomic::Ordering::Relaxed);
                    let value = u64::from_ne_bytes(word.try_into().expect("8 bytes"));
                    raw::vfork_store(at + skip, value).expect("a child");
                    me.count("vforks", 1);
                }
                Wrote::Done
            });
            me.pause(3000);
        }
        me.begin("spawn", usize::MAX, 0, 0, 0);
        let status = std::process::Command::new("true").status();
        assert!(status.expect("`true` can be started").success());
        me.count("programs started", 1);
        me.pause(30_000);
    }
}

/// The errors of system calls that may well fail are told, not hidden.
pub(crate) fn tell(me: &mut Me, what: &str, result: &io::Result<()>) {
    match result {
        Ok(()) => me.count(what, 1),
        Err(error) => {
            let number = error.raw_os_error().unwrap_or(0);
            me.count(&format!("error: {what}: {}", errno_name(number)), 1);
        }
    }
}

pub(crate) fn errno_name(number: i32) -> String {
    match number {
        libc::EINVAL => "EINVAL".into(),
        libc::EAGAIN => "EAGAIN".into(),
        libc::ENOMEM => "ENOMEM".into(),
        libc::EBUSY => "EBUSY".into(),
        libc::EFAULT => "EFAULT".into(),
        libc::EPERM => "EPERM".into(),
        other => format!("errno {other}"),
    }
}

/// A sector's length, for readers of this file.
const _: () = assert!(SECTOR * 8 == 4096);
