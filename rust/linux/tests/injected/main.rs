//! Faults on purpose, at every call and in every phase: whatever fails, and however, the memory reads
//! back right, nothing waits for ever, and the engine goes on or says why not.
//!
//! Needs the feature `inject`: `cargo test -p pagemerge-linux --features inject --test injected`.
//!
//! # How
//! A *life* is a whole history of an engine: probing, making it, registering, merging, writing to
//! merged pages, merging again, discarding, un-merging, forgetting, evaluating, counting, closing;
//! with another thread that reads and writes the same memory all the time. A life without faults tells
//! which call is made in which phase, and how often. Then each of these *sites* (a call in a phase)
//! is struck with every error number that its manual page lists (`support/faults.rs`), with
//! interruptions, delays, partial results and false reports, at its first, a middle and a late use,
//! once, a few times and for ever, one plan a life. Panics strike before and after each of them.
//!
//! `CONTEXTS` are faults that are there to reach calls that are made only when others fail.
//!
//! After each life the oracle looks at every byte, at the flags of every mapping, at the descriptors of
//! the merging thread, and at what the engine said: an error names its error number, and an engine that
//! merged nothing names a reason.
//!
//! # How much
//! `make test` runs a share of the plans that changes with the seed (`PAGEMERGE_SEED`, printed);
//! `make faults` (`PAGEMERGE_FAULTS=all`) runs all of them, prints the table of sites, and fails if a
//! call was never struck in any phase.

mod life;
mod named;
mod random;
mod sites;
mod sources;
#[path = "../support/mod.rs"]
mod support;

use named::{
    busy_moves_are_a_reason, closing_under_any_fault_loses_nothing, full_frame_store_is_a_reason,
    hashing_threads_that_cannot_be_started_are_done_without,
    helper_that_cannot_be_woken_ends_all_the_same, hole_that_mapping_a_frame_left_is_filled,
    hole_that_unmerging_left_is_filled, interruptions_everywhere_change_nothing,
    pages_that_nothing_else_takes_back_are_carried, panic_in_one_engine_leaves_the_others,
    panic_of_the_helper_leaves_no_writer_waiting,
    panic_while_windows_are_closed_again_leaves_none_open,
    panics_while_a_window_closes_leave_no_page_away, registering_that_fails_half_way_is_taken_back,
    starting_can_fail_and_be_tried_again, starts_in_the_end,
    window_in_which_every_ioctl_becomes_forbidden_gives_its_pages_back,
    window_that_could_not_be_closed_is_closed_before_pages_are_discarded,
};
use random::{faults_in_combination_lose_no_increment, random_faults_under_writers};
use sites::{
    any_call_that_fails_loses_nothing, any_panic_loses_nothing, every_call_has_its_errors,
    share_of_faults, share_of_panics,
};
use sources::no_call_goes_past_the_injection_point;
use std::process::ExitCode;
use support::case;

fn main() -> ExitCode {
    support::run(vec![
        case!(every_call_has_its_errors),
        case!(no_call_goes_past_the_injection_point),
        case!(any_call_that_fails_loses_nothing).seconds(3600),
        case!(any_panic_loses_nothing).seconds(3600),
        case!(faults_in_combination_lose_no_increment).seconds(3600),
        case!(full_frame_store_is_a_reason),
        case!(registering_that_fails_half_way_is_taken_back),
        case!(hole_that_mapping_a_frame_left_is_filled),
        case!(hole_that_unmerging_left_is_filled),
        case!(busy_moves_are_a_reason),
        case!(interruptions_everywhere_change_nothing),
        case!(window_that_could_not_be_closed_is_closed_before_pages_are_discarded),
        case!(window_in_which_every_ioctl_becomes_forbidden_gives_its_pages_back),
        case!(pages_that_nothing_else_takes_back_are_carried),
        case!(panic_of_the_helper_leaves_no_writer_waiting),
        case!(closing_under_any_fault_loses_nothing).seconds(600),
        case!(helper_that_cannot_be_woken_ends_all_the_same),
        case!(panic_in_one_engine_leaves_the_others),
        case!(panics_while_a_window_closes_leave_no_page_away),
        case!(panic_while_windows_are_closed_again_leaves_none_open),
        case!(hashing_threads_that_cannot_be_started_are_done_without),
        case!(starting_can_fail_and_be_tried_again),
        case!(share_of_faults).hidden(),
        case!(share_of_panics).hidden(),
        case!(random_faults_under_writers).hidden(),
        case!(starts_in_the_end).hidden(),
    ])
}
