//! What the fuzz targets do with an input. Each is a function of bytes that panics when something is
//! wrong, so that the committed inputs can be replayed by an ordinary test, without libFuzzer.

pub mod alloc_ops;
pub mod core_model;
mod naive;
pub mod proc_text;
pub mod rbtree;
#[cfg(feature = "python")]
pub mod settings;

#[path = "../../rust/core/tests/support/toy.rs"]
mod toy;

/// Makes a program of a target: the fuzzer under cargo-fuzz, else one that replays the files named as
/// its arguments.
#[macro_export]
macro_rules! target {
    ($run:path) => {
        #[cfg(fuzzing)]
        libfuzzer_sys::fuzz_target!(|input: &[u8]| $run(input));

        #[cfg(not(fuzzing))]
        fn main() -> std::io::Result<()> {
            for path in std::env::args_os().skip(1) {
                $run(&std::fs::read(&path)?);
                println!("{}: nothing wrong", path.display());
            }
            Ok(())
        }
    };
}
