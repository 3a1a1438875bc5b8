//! What owners do to their memory: give it back, advise the kernel about it, lock, protect, move and
//! unmap it.
//!
//! While it is registered, its owner discards it by the engine alone, and does not unmap or move it
//! (docs/safety.md). All else is done whether it is registered or not.

use crate::arena::{Claim, PARTS, WHOLE};
use crate::engines::{self, PLAIN};
use crate::support::engines::try_register;
use crate::support::os::{self, call, page_size};
use crate::support::raw;
use crate::world::Me;
use crate::writers::{By, anywhere, tell};
use pagemerge_linux::Error;
use std::fs;
use std::io;

/// `MADV_COLLAPSE` and `MADV_PAGEOUT` are not in every C library.
const ADVICE: [(&str, i32); 8] = [
    ("MADV_HUGEPAGE", libc::MADV_HUGEPAGE),
    ("MADV_NOHUGEPAGE", libc::MADV_NOHUGEPAGE),
    ("MADV_COLD", 20),
    ("MADV_PAGEOUT", 21),
    ("MADV_COLLAPSE", 25),
    ("MADV_WILLNEED", libc::MADV_WILLNEED),
    ("MADV_POPULATE_READ", 22),
    ("MADV_POPULATE_WRITE", 23),
];

/// Advice that changes no byte: whoever claims the pages meanwhile must not notice.
pub(crate) fn advise(me: &mut Me) {
    while !me.is_over() {
        let (number, page) = anywhere(me, By::Call);
        let arena = &me.world.arenas[number];
        if arena.rules.moves {
            // It may be gone at this moment.
            continue;
        }
        let pages = (1 + me.random.below(128)).min(arena.pages - page);
        let (name, advice) = ADVICE[me.random.below(ADVICE.len())];
        me.begin(name, number, page, pages, 0);
        let done = os::advise(arena.at(page), pages * page_size(), advice);
        tell(me, name, &done);
        me.pause(15_000);
    }
}

/// `mlock` and `munlock`.
pub(crate) fn lock(me: &mut Me) {
    while !me.is_over() {
        let (number, page) = anywhere(me, By::Call);
        let arena = &me.world.arenas[number];
        if arena.rules.moves {
            continue;
        }
        let pages = (1 + me.random.below(32)).min(arena.pages - page);
        let at = [arena.at(page), pages * page_size()];
        me.begin("mlock", number, page, pages, 0);
        tell(me, "mlock", &call(libc::SYS_mlock, &at).map(drop));
        me.pause(20_000);
        me.begin("munlock", number, page, pages, 0);
        tell(me, "munlock", &call(libc::SYS_munlock, &at).map(drop));
        me.pause(60_000);
    }
}

/// `mprotect` to read-only and back. Nobody else may write meanwhile, but everybody may read.
pub(crate) fn protect(me: &mut Me) {
    while !me.is_over() {
        let (number, page) = anywhere(me, By::Call);
        let arena = &me.world.arenas[number];
        // A guest engine is dropped when it likes, and could not un-merge read-only pages then.
        if page >= arena.free_pages() || arena.rules.moves || arena.engines.is_empty() {
            me.pause(100);
            continue;
        }
        let pages = (1 + me.random.below(16)).min(arena.free_pages() - page);
        let claim = Claim::wait(me, number, page, pages);
        let protection = |bits: i32| {
            call(
                libc::SYS_mprotect,
                &[claim.at(), claim.len(), bits as usize],
            )
            .map(drop)
        };
        me.begin("mprotect", number, page, pages, 0);
        let done = protection(libc::PROT_READ);
        tell(me, "mprotect", &done);
        claim.verify(me, "read-only");
        me.pause(10_000);
        me.begin("mprotect back", number, page, pages, 0);
        // It may lack room for a mapping for a moment; without it nobody could go on.
        while let Err(error) = protection(os::RW) {
            me.count(&format!("error: mprotect back: {error}"), 1);
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        claim.verify(me, "writable again");
        drop(claim);
        me.pause(60_000);
    }
}

/// Gives pages back: by the engine while they are registered, by `madvise` while they are not.
pub(crate) fn discard(me: &mut Me) {
    while !me.is_over() {
        let (number, page) = anywhere(me, By::User);
        let arena = &me.world.arenas[number];
        if page >= arena.free_pages() || arena.rules.moves || arena.engines.is_empty() {
            me.pause(100);
            continue;
        }
        // Inside one part, which is registered as a whole or not at all.
        let part = arena.pages / PARTS;
        let end = (page / part + 1) * part;
        let pages = (1 + me.random.below(24)).min(end.min(arena.free_pages()) - page);
        let parts = arena.parts.lock().expect("nobody panics with it");
        let claim = Claim::wait(me, number, page, pages);
        claim.verify(me, "before it is given back");
        let zeroes = vec![0; claim.len()];
        if let Some(engine) = engines::registered(arena, &parts, page) {
            me.begin("discard", number, page, pages, engine as u64);
            let done = me.world.engines[engine]
                .engine
                .discard(claim.at(), claim.len());
            match done {
                Ok(()) => {
                    me.count("discards", 1);
                    me.count("pages discarded", pages as u64);
                    claim.expect(0, &zeroes);
                }
                // The kernel discards nothing that is locked, and somebody locks pages here.
                Err(Error::Os { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {
                    me.count("error: discard: EINVAL", 1);
                    adopt_zeroes(me, &claim);
                }
                Err(error) => me.fail(number, page, &format!("discard: {error}")),
            }
            claim.verify(me, "discarded");
        } else {
            // What was written after merging may still lie over a frame's place, and then shows that
            // (docs/design.md): so nothing is known until it is written.
            me.begin("MADV_DONTNEED", number, page, pages, 0);
            let done = os::advise(claim.at(), claim.len(), libc::MADV_DONTNEED);
            tell(me, "MADV_DONTNEED", &done);
            claim.expect(0, &zeroes);
            raw::copy_in(claim.at(), &zeroes);
            claim.verify(me, "given back and cleared");
        }
        for page in page..page + pages {
            claim.set_home(page, 0);
        }
        drop(claim);
        drop(parts);
        me.pause(40_000);
    }
}

/// After a discard that failed half done: each page has its bytes, or is zero.
fn adopt_zeroes(me: &mut Me, claim: &Claim) {
    let zeroes = vec![0; page_size()];
    let mut seen = zeroes.clone();
    for n in 0..claim.pages {
        raw::copy_out(claim.at() + n * page_size(), &mut seen);
        if seen == zeroes {
            claim.expect(n * page_size(), &zeroes);
        }
    }
    claim.verify(me, "after half a discard");
}

/// `MADV_FREE`: the old bytes or zeroes, until something is written, which must stay.
pub(crate) fn free(me: &mut Me) {
    while !me.is_over() {
        let (number, page) = anywhere(me, By::User);
        let arena = &me.world.arenas[number];
        if page >= arena.free_pages() || arena.rules.moves {
            me.pause(100);
            continue;
        }
        let Some(claim) = Claim::now(me, number, page, WHOLE) else {
            continue;
        };
        claim.verify(me, "before MADV_FREE");
        me.begin("MADV_FREE", number, page, 1, 0);
        let done = os::advise(claim.at(), claim.len(), libc::MADV_FREE);
        tell(me, "MADV_FREE", &done);
        if done.is_ok() {
            if me.chance(50) {
                // Now it really goes.
                let done = os::advise(claim.at(), claim.len(), 21);
                tell(me, "MADV_PAGEOUT after MADV_FREE", &done);
            }
            me.pause(3000);
            me.begin("write after MADV_FREE", number, page, 1, 0);
            // From the first byte written on the page stays as it was at that moment.
            let word = [0x77; 8];
            raw::copy_in(claim.at() + 1024, &word);
            let (mut old, mut seen) = ([0; 4096], [0; 4096]);
            claim.expected(0, &mut old);
            raw::copy_out(claim.at(), &mut seen);
            old[1024..1032].copy_from_slice(&word);
            let mut empty = [0; 4096];
            empty[1024..1032].copy_from_slice(&word);
            if seen == empty {
                me.count("pages that MADV_FREE took", 1);
                claim.expect(0, &empty);
            } else {
                claim.expect(1024, &word);
            }
            claim.verify(me, "written after MADV_FREE");
            me.pause(2000);
            claim.verify(me, "some time after MADV_FREE");
            let mut bytes = [0; 4096];
            claim.homely(page, 0, &mut bytes);
            claim.expect(0, &bytes);
            raw::copy_in(claim.at(), &bytes);
            claim.verify(me, "home after MADV_FREE");
        }
        drop(claim);
        me.pause(20_000);
    }
}

/// The mappings of a range: (start, length), in order.
fn pieces(addr: usize, len: usize) -> Vec<(usize, usize)> {
    let text = fs::read_to_string("/proc/self/maps").expect("/proc/self/maps can be read");
    text.lines()
        .filter_map(|line| {
            let (start, rest) = line.split_once('-')?;
            let end = rest.split_once(' ')?.0;
            let start = usize::from_str_radix(start, 16).ok()?.max(addr);
            let end = usize::from_str_radix(end, 16).ok()?.min(addr + len);
            (start < end).then(|| (start, end - start))
        })
        .collect()
}

/// Moves memory elsewhere, mapping by mapping.
fn move_to(from: usize, len: usize, to: usize) -> io::Result<()> {
    for (start, piece) in pieces(from, len) {
        let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as usize;
        call(
            libc::SYS_mremap,
            &[start, piece, piece, flags, to + (start - from)],
        )?;
    }
    Ok(())
}

/// Owns an arena whose memory does not stay: it is unregistered, then moved, unmapped, discarded or
/// replaced, and registered again.
pub(crate) fn movers(me: &mut Me) {
    let number = me.world.arenas.iter().position(|arena| arena.rules.moves);
    let number = number.expect("an arena that moves");
    let arena = &me.world.arenas[number];
    let len = arena.pages * page_size();
    while !me.is_over() {
        me.rest(500);
        let mut parts = arena.parts.lock().expect("nobody panics with it");
        let claim = Claim::wait(me, number, 0, arena.pages);
        me.begin("unregister to move", number, 0, arena.pages, 0);
        let how = me.random.below(5);
        let mut cleared = false;
        let engine = &me.world.engines[PLAIN].engine;
        claim.verify(me, "before it moves");
        for part in 0..PARTS {
            let Some((_, handle)) = parts.0[part] else {
                continue;
            };
            let (first, pages) = arena.part(part);
            let done = match how {
                3 => engine.forget(handle),
                4 => engine
                    .discard(arena.at(first), pages * page_size())
                    .and_then(|()| engine.unregister(handle)),
                _ => engine.unregister(handle),
            };
            if engines::take(me, "unregister to move", done) {
                parts.0[part] = None;
            }
        }
        if parts.0.iter().any(Option::is_some) {
            // Some other time. (Discarded and forgotten memory is never refused.)
            assert!(how < 3, "discarded or forgotten memory cannot be refused");
            continue;
        }
        if how < 3 {
            claim.verify(me, "un-merged, to move");
        }
        match how {
            0 | 1 => {
                let there = raw::map_anywhere(len);
                me.begin("mremap", number, 0, arena.pages, there as u64);
                // What lay there goes with the move; the place it left is anybody's.
                let done = move_to(arena.at(0), len, there);
                if let Err(error) = &done {
                    me.fail(number, 0, &format!("mremap of un-merged memory: {error}"));
                }
                me.count("mremap", 1);
                arena.moved_to(there);
                claim.verify(me, "moved");
            }
            2 | 3 => {
                me.begin("munmap", number, 0, arena.pages, 0);
                call(libc::SYS_munmap, &[arena.at(0), len]).expect("our own memory");
                arena.moved_to(raw::map_anywhere(len));
                me.count("munmap", 1);
                cleared = true;
            }
            _ => {
                // It was discarded before it was unregistered: so `madvise` gives zeroes.
                me.begin("write, MADV_DONTNEED", number, 0, arena.pages, 0);
                for page in 0..arena.pages {
                    raw::word(arena.at(page)).store(7, std::sync::atomic::Ordering::Relaxed);
                }
                let done = os::advise(arena.at(0), len, libc::MADV_DONTNEED);
                tell(me, "MADV_DONTNEED", &done);
                cleared = true;
            }
        }
        if cleared {
            let zeroes = vec![0; page_size()];
            for page in 0..arena.pages {
                raw::copy_in(arena.shadow_of(page), &zeroes);
            }
            claim.verify(me, "fresh memory is zero");
            for page in 0..arena.pages {
                claim.set_home(page, if me.chance(30) { 0 } else { page as u64 % 20 });
            }
        }
        if how == 1 {
            let advice = [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE][me.random.below(2)];
            tell(
                me,
                "advice before registering",
                &os::advise(arena.at(0), len, advice),
            );
        }
        for part in 0..PARTS {
            let (first, pages) = arena.part(part);
            me.begin("register after a move", number, first, pages, 0);
            match try_register(engine, arena.at(first), pages * page_size(), "") {
                Ok(handle) => parts.0[part] = Some((PLAIN, handle)),
                Err(Error::NotMergeable { reason, .. }) => {
                    me.count(&format!("error: register: {}", reason.name()), 1);
                }
                Err(error) => me.fail(number, first, &format!("after a move: {error}")),
            }
        }
        me.count("moves of memory", 1);
    }
}
