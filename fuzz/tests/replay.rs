//! Goal: what the fuzzer has met before is met in every test run. Method: each committed input is run, as
//! libFuzzer would run it, and then many made from a seed, so that something new is met as well.
//! (The inputs of `settings` are run by `tests/test_settings_bytes.py`, with the built module.)

use std::fs;
use std::path::Path;

/// Inputs made from a seed, for each target.
const MORE: u64 = 600;

fn replay(target: &str, run: fn(&[u8])) {
    replay_with(target, MORE, run);
}

fn replay_with(target: &str, more: u64, run: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target);
    let files =
        fs::read_dir(&corpus).unwrap_or_else(|error| panic!("{}: {error}", corpus.display()));
    let mut inputs: Vec<(String, Vec<u8>)> = files
        .map(|file| {
            let path = file.expect("a directory that is there").path();
            let input = fs::read(&path).expect("a file that is there");
            (path.display().to_string(), input)
        })
        .collect();
    assert!(!inputs.is_empty(), "{} is empty", corpus.display());
    inputs.sort();
    for seed in 0..more {
        inputs.push((format!("seed {seed}"), made(seed)));
    }
    for (name, input) in &inputs {
        if std::panic::catch_unwind(|| run(input)).is_err() {
            panic!("{target}: {name} has found something");
        }
    }
}

fn made(seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    let bytes = 20 + next() % 400;
    (0..bytes).map(|_| next().to_le_bytes()[0]).collect()
}

#[test]
fn scanner_agrees_with_the_naive_model() {
    replay("core_model", pagemerge_fuzz::core_model::run);
}

#[test]
fn tree_agrees_with_an_ordered_list() {
    replay("rbtree", pagemerge_fuzz::rbtree::run);
}

#[test]
fn texts_of_proc_are_read_without_panics() {
    replay("proc_text", pagemerge_fuzz::proc_text::run);
}

/// Each input has an engine of its own, on live memory: fewer of those from seeds.
#[test]
fn allocator_agrees_with_its_model() {
    replay_with("alloc_ops", MORE / 12, pagemerge_fuzz::alloc_ops::run);
}
