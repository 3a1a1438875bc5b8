//! What can be timed from within a program: the first write to a page, and reads of cached lines.
//!
//! `cargo run --release -p pagemerge-linux --example first_write`
//!
//! Each kind of page is written once, page after page, and the time of each store is taken. Then the
//! shared cache is used as an attacker would ("flush and reload"): a line of a page is thrown out of the
//! cache, somebody else reads his own page, and the time to load the line again tells whether that was
//! the same memory. `docs/safety.md` says what follows for whom.

// For the promise of `register`, and to throw lines out of the cache.
#![allow(unsafe_code)]

use pagemerge_linux::core::{AdvisorMode, Settings};
use pagemerge_linux::{Engine, EngineSettings, page_size};
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const PAGES: usize = 4000;

/// Whole pages of ordinary memory, never used before and never freed: what an allocator hands out again
/// would be what an earlier engine has left there.
struct Pages {
    words: &'static [AtomicU64],
    first: usize,
}

impl Pages {
    fn new() -> Self {
        let words = (PAGES + 1) * page_size() / 8;
        let words: Vec<AtomicU64> = (0..words).map(|_| AtomicU64::new(0)).collect();
        let words = words.leak();
        let start = words.as_ptr().addr();
        let first = (start.next_multiple_of(page_size()) - start) / 8;
        Self { words, first }
    }

    fn word(&self, page: usize) -> &AtomicU64 {
        &self.words[self.first + page * page_size() / 8 + 1]
    }

    /// Every page gets the content that `content` says; 0 is the zero page's.
    fn fill(&self, content: impl Fn(usize) -> u64) {
        for page in 0..PAGES {
            for word in 0..page_size() / 8 {
                let value = content(page).wrapping_mul(0x9e37_79b9 + word as u64);
                self.words[self.first + page * page_size() / 8 + word]
                    .store(value, Ordering::Relaxed);
            }
        }
    }

    fn register(&self, engine: &Engine, domain: &str) -> pagemerge_linux::RegionHandle {
        let addr = self.word(0).as_ptr().addr() - 8;
        // SAFETY: the memory is never freed.
        unsafe { engine.register(addr, PAGES * page_size(), domain) }.expect("plain memory")
    }

    /// The time of one store to each page, in order.
    fn time_writes(&self) -> Vec<Duration> {
        (0..PAGES)
            .map(|page| {
                let word = self.word(page);
                let began = Instant::now();
                word.store(u64::MAX, Ordering::SeqCst);
                began.elapsed()
            })
            .collect()
    }
}

fn print(name: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |share: usize| times[(times.len() - 1) * share / 100].as_nanos();
    println!(
        "{name:<52}{:>8} ns{:>9} ns{:>10} ns",
        at(50),
        at(90),
        at(99)
    );
}

fn engine(change: impl FnOnce(&mut EngineSettings)) -> Engine {
    let mut settings = EngineSettings {
        scan: Settings {
            advisor_mode: AdvisorMode::None,
            pages_to_scan: 100_000,
            smart_scan: false,
            ..Settings::default()
        },
        quiet_millisecs: 500,
        ..EngineSettings::default()
    };
    change(&mut settings);
    Engine::new(settings).expect("an engine")
}

fn passes(engine: &Engine, count: usize) {
    for _ in 0..count {
        engine.scan(None, &mut || true).expect("a pass");
    }
}

/// Writes to pages of one kind: prepared by `content` and by `before`, in an engine of their own.
fn one(name: &str, content: impl Fn(usize) -> u64, before: impl FnOnce(&Engine, &Pages)) {
    let pages = Pages::new();
    let engine = engine(|_| {});
    pages.fill(content);
    before(&engine, &pages);
    print(name, pages.time_writes());
}

fn main() {
    let unique = |page: usize| page as u64 + 1;
    let twins = |page: usize| page as u64 / 2 + 1;
    println!(
        "first write to a page that is{:>31}{:>12}{:>13}",
        "p50", "p90", "p99"
    );
    one("not registered", unique, |_, _| {});
    one(
        "registered, unique (write tracking)",
        unique,
        |engine, pages| {
            pages.register(engine, "");
            passes(engine, 3);
        },
    );
    one("excluded", twins, |engine, pages| {
        let region = pages.register(engine, "");
        engine
            .exclude(region, region.addr, PAGES * page_size())
            .expect("nothing is merged");
        passes(engine, 3);
    });
    one("merged with another", twins, |engine, pages| {
        pages.register(engine, "");
        passes(engine, 3);
    });
    one(
        "merged onto the zero page",
        |_| 0,
        |engine, pages| {
            pages.register(engine, "");
            passes(engine, 3);
        },
    );
    one("merged and written before", twins, |engine, pages| {
        pages.register(engine, "");
        passes(engine, 3);
        let _ = pages.time_writes();
    });
    one(
        "merged, written, and waiting to be quiet",
        twins,
        |engine, pages| {
            pages.register(engine, "");
            passes(engine, 3);
            let _ = pages.time_writes();
            passes(engine, 1);
        },
    );
    one(
        "equal to a page of another domain only",
        unique,
        |engine, pages| {
            let other = Pages::new();
            other.fill(|page| page as u64 + 1);
            pages.register(engine, "mine");
            other.register(engine, "theirs");
            passes(engine, 3);
        },
    );
    reload();
}

/// Flush and reload within a domain, and between two.
#[cfg(target_arch = "x86_64")]
fn reload() {
    use std::arch::x86_64::{_mm_clflush, _mm_mfence};

    println!(
        "\nload of a line after flushing it{:>28}{:>12}{:>13}",
        "p50", "p90", "p99"
    );
    for (name, domain, victim_reads) in [
        ("same domain, nobody has read", "", false),
        ("same domain, another has read his page", "", true),
        ("other domain, nobody has read", "theirs", false),
        ("other domain, another has read his page", "theirs", true),
    ] {
        let (mine, theirs) = (Pages::new(), Pages::new());
        let engine = engine(|_| {});
        for pages in [&mine, &theirs] {
            pages.fill(|page| page as u64 / 2 + 1);
        }
        mine.register(&engine, "");
        theirs.register(&engine, domain);
        passes(&engine, 3);
        let times = (0..PAGES)
            .map(|page| {
                let (word, his) = (mine.word(page), theirs.word(page));
                // Translations are not what is measured.
                black_box(word.load(Ordering::Relaxed) + his.load(Ordering::Relaxed));
                for word in [word, his] {
                    // SAFETY: the line is there; flushing changes no byte. (His line only where it is not
                    // the same memory, so that his read brings it in each time.)
                    unsafe { _mm_clflush(word.as_ptr().cast()) };
                }
                // SAFETY: needs no more than the processor that this is compiled for.
                unsafe { _mm_mfence() };
                if victim_reads {
                    black_box(his.load(Ordering::SeqCst));
                }
                // SAFETY: as above.
                unsafe { _mm_mfence() };
                let began = Instant::now();
                black_box(word.load(Ordering::SeqCst));
                began.elapsed()
            })
            .collect();
        print(name, times);
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn reload() {}
