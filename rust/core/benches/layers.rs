//! What the algorithm itself costs, over memory that costs next to nothing: the toy of the tests.
//!
//! `cargo bench -p pagemerge-core`. A page's bytes are eight of them there, so this is records, trees
//! and decisions, and some 50 ns a page of the toy's own. Criterion also says how many pages a second
//! that is, and by how much it differs from the last run.

use criterion::{
    BatchSize, BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use pagemerge_core::rbtree::{self, Links, NIL, Place, Side};
use pagemerge_core::{AdvisorMode, Clock, PageId, Settings, Tick};
use std::hint::black_box;
use std::time::Duration;

#[path = "../tests/support/toy.rs"]
mod toy;

use toy::{Bytes, Dice, World, bytes};

const PAGES: u32 = 1 << 16;

/// A world with one region of these pages.
fn world(tags: impl Iterator<Item = u64>, settings: &Settings) -> World {
    let pages: Vec<Option<Bytes>> = tags.map(|tag| Some(bytes(tag))).collect();
    let mut world = World::new(settings.clone());
    world.add(&pages);
    world
}

/// One full pass, without the proofs that the tests make after each step.
fn pass(world: &mut World) {
    loop {
        world.now = Tick(world.now.0 + 1);
        let clock = Clock {
            now: world.now,
            cpu_nanos: 0,
        };
        let report = world.scanner.step(&mut world.toy, clock, u32::MAX);
        world.toy.requests.clear();
        if report.expect("the toy works").full_scan_done {
            return;
        }
    }
}

fn settings(smart_scan: bool) -> Settings {
    Settings {
        advisor_mode: AdvisorMode::None,
        smart_scan,
        ..Settings::default()
    }
}

type Tag = fn(u64) -> u64;

/// Contents: what page n holds.
const KINDS: [(&str, Tag); 4] = [
    ("unique", |n| n),
    ("half duplicates, 4 copies", |n| {
        if n % 2 == 0 {
            n
        } else {
            n % 8 + n / 8 * 8 % 16384
        }
    }),
    ("runs of 16, 2 copies", |n| n % (1 << 15)),
    ("all equal", |_| 1),
];

fn passes(c: &mut Criterion) {
    let mut group = c.benchmark_group("pass");
    group.throughput(Throughput::Elements(u64::from(PAGES)));
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    for (name, tag) in KINDS {
        let fresh = || world((0..u64::from(PAGES)).map(tag), &settings(true));
        group.bench_function(BenchmarkId::new("until merged", name), |b| {
            b.iter_batched_ref(
                fresh,
                |world| {
                    pass(world);
                    pass(world);
                },
                BatchSize::PerIteration,
            );
        });
        group.bench_function(BenchmarkId::new("at rest", name), |b| {
            let mut world = fresh();
            (0..4).for_each(|_| pass(&mut world));
            b.iter(|| pass(&mut world));
        });
    }
    group.bench_function("1 % changed/unique", |b| {
        let mut world = world(0..u64::from(PAGES), &settings(true));
        (0..4).for_each(|_| pass(&mut world));
        let (mut dice, mut tag) = (Dice(1), u64::from(PAGES));
        b.iter(|| {
            for _ in 0..PAGES / 100 {
                tag += 1;
                let page = PageId(dice.page(PAGES as usize));
                world.toy.write(page, bytes(tag));
            }
            pass(&mut world);
        });
    });
    group.finish();
}

/// The tree alone: links in an array, keys that are numbers.
#[derive(Clone, Default)]
struct Nodes {
    keys: Vec<u64>,
    links: Vec<([u32; 2], u32, bool)>,
}

fn index(side: Side) -> usize {
    usize::from(side == Side::Right)
}

impl Links for Nodes {
    fn child(&self, at: u32, side: Side) -> u32 {
        self.links[at as usize].0[index(side)]
    }
    fn set_child(&mut self, at: u32, side: Side, to: u32) {
        self.links[at as usize].0[index(side)] = to;
    }
    fn parent(&self, at: u32) -> u32 {
        self.links[at as usize].1
    }
    fn set_parent(&mut self, at: u32, to: u32) {
        self.links[at as usize].1 = to;
    }
    fn is_red(&self, at: u32) -> bool {
        self.links[at as usize].2
    }
    fn set_red(&mut self, at: u32, red: bool) {
        self.links[at as usize].2 = red;
    }
}

impl Nodes {
    fn place(&self, root: u32, key: u64) -> Place {
        let (mut place, mut at) = (Place::ROOT, root);
        while at != NIL {
            let side = if key < self.keys[at as usize] {
                Side::Left
            } else {
                Side::Right
            };
            place = Place { parent: at, side };
            at = self.child(at, side);
        }
        place
    }
}

fn tree(c: &mut Criterion) {
    let mut group = c.benchmark_group("tree");
    group.sample_size(20);
    for count in [1 << 12, 1 << 18] {
        group.throughput(Throughput::Elements(u64::from(count)));
        let mut dice = Dice(1);
        let nodes = Nodes {
            keys: (0..count).map(|_| dice.roll(u64::MAX)).collect(),
            links: vec![([NIL; 2], NIL, false); count as usize],
        };
        let fill = |nodes: &mut Nodes| {
            let mut root = NIL;
            for at in 0..count {
                let place = nodes.place(root, nodes.keys[at as usize]);
                rbtree::insert(nodes, &mut root, place, at);
            }
            root
        };
        group.bench_function(BenchmarkId::new("fill", count), |b| {
            b.iter_batched_ref(|| nodes.clone(), fill, BatchSize::LargeInput);
        });
        group.bench_function(BenchmarkId::new("search", count), |b| {
            let mut nodes = nodes.clone();
            let root = fill(&mut nodes);
            b.iter(|| {
                for key in &nodes.keys {
                    black_box(nodes.place(root, *key));
                }
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = layers;
    config = Criterion::default().measurement_time(Duration::from_secs(3)).warm_up_time(Duration::from_millis(500));
    targets = tree, passes
}
criterion_main!(layers);
