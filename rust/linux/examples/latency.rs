//! What a writer feels: the time of single writes to random pages while somebody merges them.
//!
//! `benches/latency.py` drives this program, a line of standard input for each thing to be done, and
//! answered by one line; it is in Rust because in Python a write costs more than what is measured.
//!
//! ```text
//! memory MIB KIND        makes the memory (again): scattered, runs, unique
//! engine NAME=N ...      an engine of our own; max_pause_micros
//! register, unregister   with the engine
//! mergeable, unmergeable with the kernel
//! busy N                 keep N threads busy from now on
//! measure idle SECONDS   one thread writes; nothing else happens
//! measure passes SECONDS our own passes all the time
//! measure merge          our own passes until there is nothing more to merge
//! measure outside        until the next line, whatever that is
//! report                 the figures of everything measured since the last report
//! ```
//!
//! One write is due every `PERIOD`, to a word of a page chosen at random; the writer waits for that
//! time in a loop, so that no sleep and no waking is measured, and the time of the store alone is
//! taken. It costs the clock about 40 ns, which are in every figure. A preempted writer is measured
//! as well: whoever cares compares with `idle` under the same load. In the end each word written is
//! read back.

// For memory of its own that it hands to an engine and to the kernel.
#![allow(unsafe_code)]

#[path = "../benches/support/memory.rs"]
mod memory;

use memory::{Dice, Memory};
use pagemerge_linux::core::{AdvisorMode, Settings};
use pagemerge_linux::{Engine, EngineSettings, EngineStats, RegionHandle};
use std::error::Error;
use std::io::{BufRead, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Few enough that most pages stay unwritten while they are merged.
const PERIOD: Duration = Duration::from_micros(100);

/// Writes until it is told to stop; the nanoseconds of each write.
fn write(
    memory: &Memory,
    written: &mut [u64],
    dice: &mut Dice,
    stop: &AtomicBool,
    times: &mut Vec<u32>,
) {
    let mut due = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let page = dice.below(memory.pages());
        let value = dice.roll() | 1;
        while Instant::now() < due {
            std::hint::spin_loop();
        }
        let word = memory.word(page);
        let began = Instant::now();
        word.store(value, Ordering::SeqCst);
        let took = began.elapsed();
        written[page] = value;
        times.push(u32::try_from(took.as_nanos()).unwrap_or(u32::MAX));
        // Never two at once to make up for a late one.
        due = (due + PERIOD).max(began);
    }
}

struct Bench {
    memory: Option<Memory>,
    /// What was last written to a page, where anything was.
    written: Vec<u64>,
    engine: Option<Engine>,
    region: Option<RegionHandle>,
    busy: Vec<(Arc<AtomicBool>, thread::JoinHandle<()>)>,
    dice: Dice,
    times: Vec<u32>,
    wall: Duration,
    /// CPU time of the engine's own thread, by its own count.
    cpu: Duration,
    passes: u32,
    wrong: usize,
    /// Windows opened, pages given back because they were written, pages saved.
    windows: u64,
    lost_races: u64,
    saved: u64,
}

impl Bench {
    fn new() -> Self {
        Self {
            memory: None,
            written: Vec::new(),
            engine: None,
            region: None,
            busy: Vec::new(),
            dice: Dice(1),
            // Room for all, so that no measurement waits for memory.
            times: Vec::with_capacity(1 << 22),
            wall: Duration::ZERO,
            cpu: Duration::ZERO,
            passes: 0,
            wrong: 0,
            windows: 0,
            lost_races: 0,
            saved: 0,
        }
    }

    fn memory(&self) -> Result<&Memory, Box<dyn Error>> {
        self.memory.as_ref().ok_or_else(|| "no memory yet".into())
    }

    fn engine(&self) -> Result<Engine, Box<dyn Error>> {
        self.engine.clone().ok_or_else(|| "no engine yet".into())
    }

    fn make(&mut self, mib: usize, kind: &str) -> Result<(), Box<dyn Error>> {
        if self.region.is_some() {
            return Err("the memory is registered".into());
        }
        // New each time: what was merged before and written would not merge at once.
        let memory = Memory::map(mib, self.memory.as_ref())?;
        let run = match kind {
            "scattered" => 1,
            "runs" => 512,
            "unique" => 0,
            _ => return Err(format!("there is no kind {kind}").into()),
        };
        memory.fill(run, &mut self.dice);
        self.written = vec![0; memory.pages()];
        self.memory = Some(memory);
        Ok(())
    }

    fn make_engine(&mut self, settings: &[&str]) -> Result<(), Box<dyn Error>> {
        let mut made = EngineSettings {
            scan: Settings {
                advisor_mode: AdvisorMode::None,
                ..Settings::default()
            },
            ..EngineSettings::default()
        };
        for setting in settings {
            match setting.split_once('=') {
                Some(("max_pause_micros", value)) => made.max_pause_micros = value.parse()?,
                _ => return Err(format!("there is no setting {setting}").into()),
            }
        }
        self.engine = Some(Engine::new(made)?);
        Ok(())
    }

    fn register(&mut self) -> Result<(), Box<dyn Error>> {
        let engine = self.engine()?;
        let memory = self.memory()?;
        // SAFETY: the memory is never unmapped.
        let region = unsafe { engine.register(memory.addr(), memory.bytes(), "") }?;
        self.region = Some(region);
        Ok(())
    }

    fn keep_busy(&mut self, threads: usize) {
        for (stop, thread) in self.busy.drain(..) {
            stop.store(true, Ordering::Relaxed);
            thread.join().expect("it only counts");
        }
        for _ in 0..threads {
            let stop = Arc::new(AtomicBool::new(false));
            let seen = Arc::clone(&stop);
            let thread = thread::spawn(move || {
                while !seen.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
            self.busy.push((stop, thread));
        }
    }

    /// Writes on a thread of its own while `work` runs on this one.
    fn measure(
        &mut self,
        work: impl FnOnce() -> Result<(u32, Option<(EngineStats, EngineStats)>), Box<dyn Error>>,
    ) -> Result<(), Box<dyn Error>> {
        let stop = AtomicBool::new(false);
        let Self {
            memory: Some(memory),
            written,
            dice,
            times,
            ..
        } = self
        else {
            return Err("no memory yet".into());
        };
        let began = Instant::now();
        let done = thread::scope(|scope| {
            let writer = scope.spawn(|| write(memory, written, dice, &stop, times));
            let done = work();
            stop.store(true, Ordering::Relaxed);
            writer.join().expect("it only writes");
            done
        });
        let (passes, stats) = done?;
        self.wall += began.elapsed();
        if let Some((before, after)) = &stats {
            self.cpu += Duration::from_nanos(after.cpu_nanos - before.cpu_nanos);
            self.windows += after.space.windows - before.space.windows;
            self.lost_races += after.space.lost_races - before.space.lost_races;
            self.saved += after.core.pages_sharing + after.core.ksm_zero_pages;
        }
        self.passes += passes;
        let memory = self.memory()?;
        let written = self.written.iter().enumerate();
        self.wrong += written
            .filter(|&(page, &value)| {
                value != 0 && memory.word(page).load(Ordering::Relaxed) != value
            })
            .count();
        Ok(())
    }

    fn report(&mut self) -> String {
        self.times.sort_unstable();
        let at = |share: f64| {
            let last = self.times.len().saturating_sub(1);
            #[allow(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                clippy::cast_precision_loss,
                reason = "a share of a length is an index"
            )]
            let index = (last as f64 * share).ceil() as usize;
            self.times.get(index).copied().unwrap_or(0)
        };
        let sum: u64 = self.times.iter().copied().map(u64::from).sum();
        let text = format!(
            "{{\"writes\": {}, \"p50\": {}, \"p90\": {}, \"p99\": {}, \"p999\": {}, \"p9999\": {}, \
             \"max\": {}, \"sum\": {sum}, \"wall\": {}, \"cpu\": {}, \"passes\": {}, \"wrong\": {}, \
             \"saved_pages\": {}, \"windows\": {}, \"lost_races\": {}}}",
            self.times.len(),
            at(0.5),
            at(0.9),
            at(0.99),
            at(0.999),
            at(0.9999),
            at(1.0),
            self.wall.as_secs_f64(),
            self.cpu.as_secs_f64(),
            self.passes,
            self.wrong,
            self.saved,
            self.windows,
            self.lost_races
        );
        self.times.clear();
        (self.wall, self.cpu) = (Duration::ZERO, Duration::ZERO);
        (self.passes, self.wrong) = (0, 0);
        (self.windows, self.lost_races, self.saved) = (0, 0, 0);
        text
    }

    fn obey(
        &mut self,
        line: &str,
        wait: &mut dyn FnMut(),
    ) -> Result<Option<String>, Box<dyn Error>> {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["memory", mib, kind] => self.make(mib.parse()?, kind)?,
            ["engine", ref settings @ ..] => self.make_engine(settings)?,
            ["register"] => self.register()?,
            ["unregister"] => {
                let region = self.region.take().ok_or("nothing is registered")?;
                self.engine()?.unregister(region)?;
            }
            ["mergeable"] => self.memory()?.advise(libc::MADV_MERGEABLE)?,
            ["unmergeable"] => self.memory()?.advise(libc::MADV_UNMERGEABLE)?,
            ["busy", threads] => self.keep_busy(threads.parse()?),
            ["measure", "idle", seconds] => {
                let long = Duration::try_from_secs_f64(seconds.parse()?)?;
                self.measure(|| {
                    thread::sleep(long);
                    Ok((0, None))
                })?;
            }
            ["measure", "passes", seconds] => {
                let long = Duration::try_from_secs_f64(seconds.parse()?)?;
                let engine = self.engine()?;
                self.measure(|| {
                    let before = engine.stats()?;
                    let (began, mut passes) = (Instant::now(), 0);
                    loop {
                        let after = engine.scan(None, &mut || true)?;
                        passes += 1;
                        if began.elapsed() >= long {
                            return Ok((passes, Some((before, after))));
                        }
                    }
                })?;
            }
            ["measure", "merge"] => {
                let engine = self.engine()?;
                self.measure(|| {
                    let before = engine.stats()?;
                    let (mut passes, mut merged, mut calm) = (0, 0, 0);
                    loop {
                        let stats = engine.scan(None, &mut || true)?;
                        passes += 1;
                        let now = stats.core.pages_sharing + stats.core.ksm_zero_pages;
                        // What the writer has broken meanwhile is found, and merges no more.
                        calm = if now > merged { 0 } else { calm + 1 };
                        merged = now.max(merged);
                        if calm > 0 && (merged > 0 || calm == 2) {
                            return Ok((passes, Some((before, stats))));
                        }
                    }
                })?;
            }
            ["measure", "outside"] => self.measure(|| {
                wait();
                Ok((0, None))
            })?,
            ["report"] => return Ok(Some(self.report())),
            _ => return Err(format!("cannot understand {line:?}").into()),
        }
        Ok(None)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut bench = Bench::new();
    let mut lines = std::io::stdin().lock().lines();
    while let Some(line) = lines.next() {
        let line = line?;
        let outside = line == "measure outside";
        if outside {
            println!("writing");
            std::io::stdout().flush()?;
        }
        let answer = bench.obey(&line, &mut || {
            lines.next();
        });
        match answer {
            Ok(text) => println!("{}", text.unwrap_or_else(|| "ok".to_owned())),
            Err(error) => println!("error: {error}"),
        }
        std::io::stdout().flush()?;
    }
    Ok(())
}
