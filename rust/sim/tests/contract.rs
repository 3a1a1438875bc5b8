//! Goal: the simulated memory sees every breach of contract. Method: play a scanner that commits one,
//! and see the very panic that is meant for it. Without this, a simulator that notices nothing would
//! look like an algorithm that does nothing wrong.

use pagemerge_core::{
    Attempt, Content, FrameId, Look, PageId, PageSpace, PageState, Reason, RegionId, Request,
    Window, Written,
};
use pagemerge_sim::{Action, Condition, Faults, Habits, SimSpace};
use std::cmp::Ordering;

const A: FrameId = FrameId(0);
const B: FrameId = FrameId(1);

/// Region 0 has pages 0 to 7, region 1 of another domain pages 8 and 9. Pages 0 to 2 and 8 are equal,
/// page 3 differs from them, page 4 is all zero, the others are absent.
fn space() -> SimSpace {
    let mut space = SimSpace::new(Habits {
        tracking: true,
        ..Habits::default()
    });
    space.add_region(RegionId(0), PageId(0), 8, "");
    space.add_region(RegionId(1), PageId(8), 2, "other");
    for page in [0, 1, 2, 8] {
        space.act(PageId(page), Action::Write(5));
    }
    space.act(PageId(3), Action::Write(6));
    space.act(PageId(4), Action::Write(0));
    space
}

fn ask(space: &mut SimSpace, request: Request) -> Attempt<()> {
    let mut outcomes = [Attempt::Refused(Reason::NotTried)];
    space
        .apply(&[request], &mut outcomes)
        .expect("no failure was ordered");
    space.assert_reads_match();
    outcomes[0]
}

fn promote(page: u32, frame: FrameId) -> Request {
    Request::Promote {
        page: PageId(page),
        frame,
    }
}

fn share(page: u32, frame: FrameId) -> Request {
    Request::Share {
        page: PageId(page),
        frame,
    }
}

fn look(space: &mut SimSpace, page: u32) -> PageState {
    let window = Window {
        region: RegionId(0),
        first: PageId(page),
        pages: 1,
    };
    let mut states = [PageState::Unknown];
    space
        .observe(window, Look::Scan, &mut states)
        .expect("no failure was ordered");
    states[0]
}

/// Pages 0 and 1 share frame A.
fn merged() -> SimSpace {
    let mut space = space();
    assert_eq!(ask(&mut space, promote(0, A)), Attempt::Done(()));
    assert_eq!(ask(&mut space, share(1, A)), Attempt::Done(()));
    space
}

#[test]
fn share_of_unequal_page_changes_nothing() {
    let mut space = merged();
    assert_eq!(ask(&mut space, share(3, A)), Attempt::Changed);
    assert_eq!(space.shows(PageId(3)), None);
    assert_eq!(
        ask(&mut space, Request::Zero { page: PageId(3) }),
        Attempt::Changed
    );
    assert_eq!(
        ask(&mut space, Request::Zero { page: PageId(4) }),
        Attempt::Done(())
    );
    assert_eq!(look(&mut space, 4), PageState::ZeroPage);
}

#[test]
fn write_to_merged_page_parts_it_and_leaves_the_frame_alone() {
    let mut space = merged();
    space.act(PageId(0), Action::Poke { at: 0, byte: 9 });
    space.assert_reads_match();
    assert_eq!(look(&mut space, 0), PageState::Resident(Written::Yes));
    assert_eq!(look(&mut space, 0), PageState::Resident(Written::No));
    assert_eq!(look(&mut space, 1), PageState::Merged);
    let order = space.compare(Content::Page(PageId(2)), Content::Frame(A));
    assert_eq!(order, Ok(Attempt::Done(Ordering::Equal)));
    space.parted(PageId(0), A);
}

#[test]
fn promote_after_a_write_since_the_digest_reports_changed() {
    let mut space = space();
    let mut digests = [Attempt::Gone];
    space
        .digest(&[PageId(0)], &mut digests)
        .expect("no failure was ordered");
    space.act(PageId(0), Action::Write(6));
    assert_eq!(ask(&mut space, promote(0, A)), Attempt::Changed);
}

/// A space that does not notice such a write makes the frame of the new bytes, and says so when it is
/// asked for the frame's digest.
#[test]
fn promote_blindly_after_a_write_makes_a_frame_of_the_new_bytes() {
    let mut space = SimSpace::new(Habits {
        promotes_blindly: true,
        ..Habits::default()
    });
    space.add_region(RegionId(0), PageId(0), 2, "");
    space.act(PageId(0), Action::Write(5));
    space.act(PageId(1), Action::Write(6));
    let mut digests = [Attempt::Gone; 2];
    space
        .digest(&[PageId(0), PageId(1)], &mut digests)
        .expect("no failure was ordered");
    space.act(PageId(0), Action::Write(6));
    assert_eq!(ask(&mut space, promote(0, A)), Attempt::Done(()));
    let mut of_frame = [Attempt::Gone];
    space
        .digest_frames(&[A], &mut of_frame)
        .expect("no failure was ordered");
    assert_eq!(of_frame[0], digests[1]);
}

#[test]
fn share_after_its_promotion_failed_reports_gone() {
    let mut space = space();
    space.act(
        PageId(0),
        Action::Become(Condition::Refusing(Reason::Pinned)),
    );
    let mut outcomes = [Attempt::Refused(Reason::NotTried); 2];
    space
        .apply(&[promote(0, A), share(1, A)], &mut outcomes)
        .expect("no failure was ordered");
    assert_eq!(outcomes, [Attempt::Refused(Reason::Pinned), Attempt::Gone]);
}

#[test]
fn armed_writer_comes_between_digest_and_apply() {
    let mut space = space();
    space.arm(1, 0, Action::Write(6));
    let before = space.interference().0;
    let mut digests = [Attempt::Gone];
    space
        .digest(&[PageId(0)], &mut digests)
        .expect("no failure was ordered");
    assert!(digests[0].is_done());
    assert_eq!(
        space.interference().0,
        before + 1,
        "the writer had its turn"
    );
    assert_eq!(ask(&mut space, promote(0, A)), Attempt::Changed);
}

#[test]
fn failure_in_mid_batch_leaves_the_rest_untried() {
    let mut space = space();
    space.set_faults(
        Faults {
            apply_error: 255,
            ..Faults::default()
        },
        3,
    );
    let mut outcomes = [Attempt::Refused(Reason::NotTried); 2];
    let failed = space.apply(&[promote(0, A), promote(3, B)], &mut outcomes);
    assert!(failed.is_err() && space.errors_injected() == 1);
    assert_eq!(outcomes[1], Attempt::Refused(Reason::NotTried));
}

macro_rules! breach {
    ($($name:ident: $said:literal, $with:expr, |$space:ident| $breach:expr;)*) => {$(
        #[test]
        #[should_panic(expected = $said)]
        fn $name() {
            let mut $space = $with;
            let _ = $breach;
        }
    )*};
}

breach! {
    promote_to_a_used_name_panics: "though it exists", merged(), |s| ask(&mut s, promote(3, A));
    promote_of_a_merged_page_panics: "already", merged(), |s| ask(&mut s, promote(0, B));
    share_of_a_merged_page_panics: "already", merged(), |s| ask(&mut s, share(0, A));
    share_onto_no_frame_panics: "does not exist", space(), |s| ask(&mut s, share(0, A));
    share_across_domains_panics: "another domain", merged(), |s| ask(&mut s, share(8, A));
    share_beyond_the_limit_panics: "the limit is 2", merged(), |s| {
        s.set_rules(2, true);
        ask(&mut s, share(2, A))
    };
    release_of_a_shown_frame_panics: "shows it", merged(), |s| s.release(A);
    release_before_parting_panics: "never reported as parted", merged(), |s| {
        s.act(PageId(0), Action::Write(1));
        s.act(PageId(1), Action::Write(1));
        s.release(A)
    };
    parting_of_a_shown_page_panics: "but shows", merged(), |s| s.parted(PageId(0), A);
    parting_twice_panics: "where it is not", merged(), |s| {
        s.act(PageId(0), Action::Write(1));
        s.parted(PageId(0), A);
        s.parted(PageId(0), A);
    };
    request_for_unregistered_page_panics: "not registered", space(), |s| {
        s.retire_region(RegionId(0));
        ask(&mut s, promote(0, A))
    };
    letting_go_of_merged_pages_panics: "left merged", merged(), |s| s.retire_region(RegionId(0));
    window_beyond_its_region_panics: "leaves its region", space(), |s| {
        let window = Window { region: RegionId(0), first: PageId(7), pages: 2 };
        s.observe(window, Look::Scan, &mut [PageState::Absent; 2])
    };
    numbers_given_out_twice_panic: "which is registered", space(), |s| {
        s.add_region(RegionId(2), PageId(7), 1, "");
    };
    compare_with_no_frame_panics: "does not exist", space(), |s| {
        s.compare(Content::Frame(A), Content::Page(PageId(0)))
    };
}

/// The oracle itself: memory that does not read as written is found out.
#[test]
#[should_panic(expected = "was written")]
fn oracle_notices_a_page_that_reads_differently() {
    let mut space = space();
    space.corrupt(PageId(2));
    space.assert_reads_match();
}
