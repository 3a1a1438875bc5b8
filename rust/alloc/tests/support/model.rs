//! The allocator against a plain model of it: a list of blocks with their bytes.
//!
//! What is done is read from bytes, any bytes, so that the property test and the fuzzer do the same. After
//! each step the books are proved, and a block that was touched must read as its model; in the end all do.

use pagemerge_alloc::allocator::{Allocator, AllocatorStats, Block, Options};
use pagemerge_linux::core::{AdvisorMode, Settings};
use pagemerge_linux::{Engine, EngineSettings, page_size};
use std::sync::OnceLock;

/// Small, so that large blocks and second arenas are met.
const ARENA_PAGES: u32 = 64;
/// So many blocks at a time are plenty.
const BLOCKS: usize = 24;
const OPS: usize = 400;

/// Reads steps from bytes; behind the end there are zeroes.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> usize {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        usize::from(*first)
    }

    /// A size: of any order of magnitude, and often at the border of a page.
    fn size(&mut self) -> usize {
        let page = page_size();
        let (kind, n) = (self.byte(), self.byte());
        match kind % 8 {
            0 => n,
            1 => n * 37,
            2 => page * (1 + n % 4) + 1,
            3 => page * (1 + n % 8),
            4 => page * (1 + n % 8) - 1,
            5 => page * (n % 20) + 100 * n,
            6 => page * (12 + n % 30),
            _ => page * (n % 90) + n,
        }
    }
}

struct World {
    engine: Engine,
    closed: bool,
    allocator: Allocator,
    blocks: Vec<(Block, Vec<u8>)>,
}

/// Contents: few of them, so that blocks are equal and merge.
fn content(which: usize, len: usize) -> Vec<u8> {
    let byte = |at: usize| match which % 5 {
        0 => 0,
        1 => 7,
        2 => at / 8 % 251,
        3 => at / page_size() % 3 + 1,
        _ => at * 31 % 255,
    };
    (0..len).map(|at| byte(at).to_le_bytes()[0]).collect()
}

/// What lies behind a block, up to the end of its page.
fn slack(block: &Block) -> Vec<u8> {
    let end = block.addr() + block.len();
    let slack = if block.is_empty() {
        page_size()
    } else {
        end.next_multiple_of(page_size()) - end
    };
    let read = |at: usize| {
        let at: *const u8 = std::ptr::with_exposed_provenance(end + at);
        // SAFETY: the block has the whole of its last page, which stays mapped while it is borrowed.
        #[allow(unsafe_code, reason = "what no safe call reaches")]
        unsafe {
            at.read_volatile()
        }
    };
    (0..slack).map(read).collect()
}

impl World {
    fn new() -> Self {
        let settings = EngineSettings {
            scan: Settings {
                pages_to_scan: 100_000,
                sleep_millisecs: 0,
                advisor_mode: AdvisorMode::None,
                smart_scan: false,
                ..Settings::default()
            },
            quiet_millisecs: 1,
            ..EngineSettings::default()
        };
        let engine = Engine::new(settings).expect("an engine");
        let options = Options {
            arena_pages: ARENA_PAGES,
            ..Options::default()
        };
        Self {
            allocator: Allocator::new(&engine, options),
            engine,
            closed: false,
            blocks: Vec::new(),
        }
    }

    fn pick(&self, input: &mut Input<'_>) -> Option<usize> {
        let at = input.byte();
        (!self.blocks.is_empty()).then(|| at % self.blocks.len())
    }

    fn check(&self, at: usize, when: &str) {
        let (block, model) = &self.blocks[at];
        assert_eq!(block.len(), model.len());
        let mut bytes = vec![1; model.len()];
        block.read(0, &mut bytes).expect("it is not broken");
        if let Some(at) = (0..model.len()).find(|&at| bytes[at] != model[at]) {
            panic!("{when}: byte {at} is {}, not {}", bytes[at], model[at]);
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() % 16 {
            0..=4 if self.blocks.len() < BLOCKS => {
                let size = input.size();
                let block = self.allocator.allocate(size).expect("there is memory");
                assert!(block.addr().is_multiple_of(page_size()));
                assert_eq!(self.allocator.size_of(block.addr()), Some(size));
                assert_eq!(slack(&block), vec![0; slack(&block).len()], "slack");
                self.blocks.push((block, vec![0; size]));
                let last = self.blocks.len() - 1;
                self.check(last, "a new block");
                // What was not written reads as zero, and now it is written.
                let fill = content(input.byte(), size);
                self.write(last, 0, &fill);
            }
            0..=7 => {
                let Some(at) = self.pick(input) else { return };
                self.check(at, "a block that is freed");
                let addr = self.blocks.swap_remove(at).0.addr();
                assert_eq!(self.allocator.size_of(addr), None, "it has been freed");
                assert!(!self.allocator.free(addr), "nothing is freed twice");
            }
            8 => {
                let Some(at) = self.pick(input) else { return };
                let which = input.byte();
                let fill = content(which, self.blocks[at].1.len());
                self.write(at, 0, &fill);
            }
            9 => {
                let Some(at) = self.pick(input) else { return };
                let len = self.blocks[at].1.len();
                let offset = (input.byte() * 97).min(len);
                let bytes = content(input.byte(), input.byte().min(len - offset));
                self.write(at, offset, &bytes);
            }
            10 | 11 => {
                let Some(at) = self.pick(input) else { return };
                let size = input.size();
                let (block, model) = &mut self.blocks[at];
                block.resize(size).expect("there is memory");
                model.resize(size, 0);
                let slack = slack(&self.blocks[at].0);
                assert_eq!(slack, vec![0; slack.len()], "slack of a resized block");
                self.check(at, "a resized block");
            }
            12 => {
                let Some(at) = self.pick(input) else { return };
                let (block, model) = &mut self.blocks[at];
                block.empty().expect("it is not broken");
                model.fill(0);
                self.check(at, "an emptied block");
            }
            13 => self.allocator.trim().expect("it is not broken"),
            14 if !self.closed && input.byte() == 7 => {
                self.engine.close().expect("there is memory for the copies");
                self.closed = true;
            }
            _ if !self.closed => {
                self.engine.scan(None, &mut || true).expect("a pass");
            }
            _ => {}
        }
        // Inside of blocks nothing begins.
        if let Some((block, _)) = self.blocks.last() {
            let inside = block.addr() + 8;
            assert!(self.allocator.size_of(inside).is_none() && !self.allocator.free(inside));
        }
        self.allocator.check().expect("the books are right");
    }

    fn write(&mut self, at: usize, offset: usize, bytes: &[u8]) {
        let (block, model) = &mut self.blocks[at];
        block.write(offset, bytes).expect("it is not broken");
        model[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn check_all(&mut self) {
        for at in 0..self.blocks.len() {
            self.check(at, "at rest");
        }
        let mut ranges: Vec<_> = self
            .blocks
            .iter()
            .map(|(block, _)| {
                let end = block.addr() + block.len().max(1);
                (block.addr(), end.next_multiple_of(page_size()))
            })
            .collect();
        ranges.sort_unstable();
        assert!(
            ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0),
            "two blocks have a page in common"
        );
        let stats = self.allocator.stats().expect("it is not broken");
        let live: usize = self.blocks.iter().map(|(_, model)| model.len()).sum();
        assert_eq!(
            (stats.allocations, stats.live_bytes),
            (self.blocks.len(), live)
        );
        assert!(stats.held_bytes >= live && stats.reserved_bytes >= stats.held_bytes);
    }
}

/// Whether there can be engines here; they can do without a barrier as long as nobody writes meanwhile.
fn runs_here() -> bool {
    static HERE: OnceLock<bool> = OnceLock::new();
    *HERE.get_or_init(|| Engine::new(EngineSettings::default()).is_ok())
}

/// Does what `input` says.
///
/// # Panics
/// When something is wrong.
pub(crate) fn run(input: &[u8]) {
    assert!(runs_here(), "an engine can be made");
    let mut input = Input(input);
    let mut world = World::new();
    for _ in 0..OPS {
        if input.0.is_empty() {
            break;
        }
        world.step(&mut input);
    }
    world.check_all();
    if !world.closed {
        // Everything merges by then.
        for _ in 0..3 {
            world.engine.scan(None, &mut || true).expect("a pass");
        }
        world.check_all();
    }
    world.blocks.clear();
    world.allocator.trim().expect("it is not broken");
    let stats = world.allocator.stats().expect("it is not broken");
    let nothing = AllocatorStats {
        allocations: 0,
        live_bytes: 0,
        held_bytes: 0,
        reserved_bytes: 0,
        metadata_bytes: stats.metadata_bytes,
        arenas: 0,
        not_merging: None,
    };
    assert_eq!(stats, nothing, "something is left");
    if !world.closed {
        let stats = world.engine.stats().expect("an engine that is open").core;
        assert_eq!((stats.regions, stats.rmap_items), (0, 0));
    }
}
