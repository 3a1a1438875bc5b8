//! What follows from how plans ended: sharers are listed, frames confirmed or taken back.
//!
//! # Plans that come to nothing
//! A page may find its twin while that twin's frame is only planned. Such a frame's node is
//! *tentative*, and the page plans to join it. If the frame is not made after all, the node is taken
//! out again, its tree partner goes back among the candidates, and the pages that wanted to join are
//! decided on once more, in their order, without the page that failed. The same goes for pages that were
//! turned away because a frame was full, when one of those that were to fill it has failed. So one page
//! that cannot be merged does not hold up its twins; and since each round leaves out at least one page,
//! or one attempt with the zero page, for good, the rounds end.
//!
//! There may be many rounds: with 500 pinned pages of equal bytes, one for each. So once a promotion has
//! failed, the twins wait for the outcome of the next one instead of planning to join it, and are neither
//! compared nor asked for again in vain: a page costs one decision, whatever fails around it.
//!
//! # Frames made in a round
//! A frame that nobody has joined but the page of which it was made is taken back. One whose page can
//! have been written between being hashed and becoming a frame is hashed again, and moved to the place
//! of its bytes.
//!
//! # Cost
//! Little for each plan. A call to take frames back, if there are any to take back, and one to hash the
//! new ones.

use super::batch::{Candidate, Made, Plan};
use crate::rbtree::NIL;
use crate::rmap::UNSTABLE;
use crate::scanner::Scanner;
use crate::{
    Attempt, Event, FrameId, PageId, PageSpace, PageState, Reason, RegionId, Request, TreeOrder,
    Written,
};

/// `EFAULT`, as trace events show a failed merge.
const FAILED: i32 = -14;

impl Scanner {
    /// Draws the conclusions from how the requests ended. When memory has failed (not `sound`), nothing
    /// more is asked of it, and what is not done is given up.
    pub(super) fn conclude<S: PageSpace>(
        &mut self,
        space: &mut S,
        sound: bool,
    ) -> Result<(), S::Error> {
        let plans = std::mem::take(&mut self.batch.plans);
        let outcomes = std::mem::take(&mut self.batch.outcomes);
        let mut ended = outcomes.iter().copied();
        let mut next = || ended.next().expect("each request has an outcome");
        let mut done = Ok(());
        for &(candidate, plan) in &plans {
            match plan {
                Plan::Zero => self.conclude_zero(candidate, next(), sound),
                Plan::Join { node } => self.conclude_join(candidate, node, next(), sound),
                Plan::Pair { partner, node } => {
                    let (promoted, shared) = (next(), next());
                    let back = self.conclude_pair(candidate, partner, node, promoted, shared);
                    if back && sound && done.is_ok() {
                        done = self.put_back(space, candidate.tree, partner);
                    }
                }
            }
        }
        (self.batch.plans, self.batch.outcomes) = (plans, outcomes);
        self.batch.plans.clear();
        if self.batch.gave_room {
            for candidate in std::mem::take(&mut self.batch.turned_away) {
                if self.records.get(candidate.page).is(UNSTABLE) {
                    self.leave_unstable(candidate.page);
                    if sound {
                        self.batch.again.push(candidate);
                    }
                }
            }
        }
        let settled = self.settle_made(space, sound);
        while let Some(node) = self.batch.failed.pop() {
            self.stable.free(node);
        }
        done.and(settled)
    }

    fn conclude_zero(&mut self, mut candidate: Candidate, outcome: Attempt<()>, sound: bool) {
        let Candidate { page, region, .. } = candidate;
        if outcome != Attempt::Refused(Reason::NotTried) {
            let err = if outcome.is_done() { 0 } else { FAILED };
            self.emit(Event::MergeOnePage {
                pfn: page,
                rmap_item: page,
                mm: region,
                err,
            });
        }
        if outcome.is_done() {
            self.counters.merged_ever += 1;
            self.mark_zero(page);
            if !self.settings.lagging_records {
                self.drop_item(page);
            }
        } else {
            self.failed(page, outcome);
            candidate.zero_tried = true;
            if sound {
                self.batch.again.push(candidate);
            }
        }
    }

    fn conclude_join(
        &mut self,
        candidate: Candidate,
        node: u32,
        outcome: Attempt<()>,
        sound: bool,
    ) {
        let Candidate { page, region, .. } = candidate;
        let was_full = !self.has_room(node);
        let it = self.stable.get_mut(node);
        it.pending -= 1;
        let failed = it.failed;
        self.stable.note(node);
        if failed {
            if sound {
                self.batch.again.push(candidate);
            }
            return;
        }
        self.trace_merge(Some(node), page, region, outcome);
        if outcome.is_done() {
            self.attach_merged(page, node);
        } else {
            self.failed(page, outcome);
            self.distrust(page, outcome);
            self.batch.gave_room |= was_full;
        }
    }

    /// Returns whether the partner has to be put back among the candidates: when the frame has not been
    /// made. One that refuses to join a frame that stays is left out, so that the next pass tries again.
    fn conclude_pair(
        &mut self,
        candidate: Candidate,
        partner: PageId,
        node: u32,
        promoted: Attempt<()>,
        shared: Attempt<()>,
    ) -> bool {
        let Candidate {
            page,
            region,
            tree,
            hash,
            ..
        } = candidate;
        self.trace_merge(None, page, region, promoted);
        let was_full = !self.has_room(node);
        self.stable.get_mut(node).pending -= 2;
        self.stable.note(node);
        let waits = self.records.get(partner).is(UNSTABLE);
        if !promoted.is_done() {
            self.failed(page, promoted);
            self.distrust(page, promoted);
            self.unlink_tentative(node);
            self.stable.get_mut(node).failed = true;
            self.batch.failed.push(node);
            self.batch.failing.insert((tree, hash));
            return !waits;
        }

        self.stable.get_mut(node).frame = true;
        self.batch.failing.remove(&(tree, hash));
        let mm = self.regions.of(partner);
        self.trace_merge(Some(node), partner, mm, shared);
        let mut back = None;
        if shared.is_done() {
            if waits {
                self.leave_unstable(partner);
            }
            self.attach_merged(partner, node);
        } else {
            self.failed(partner, shared);
            let refused = matches!(shared, Attempt::Refused(_));
            if !waits && !refused {
                // Its bytes are not what its place among the candidates said.
                self.distrust(partner, shared);
            }
            back = (!waits && refused).then_some(partner);
            self.batch.gave_room |= was_full;
        }
        self.attach_merged(page, node);
        self.batch.made.push(Made {
            page,
            node,
            refused: back,
        });
        false
    }

    /// Confirms the frames made in this round, or takes back those that nobody joined.
    fn settle_made<S: PageSpace>(&mut self, space: &mut S, sound: bool) -> Result<(), S::Error> {
        let mut made = std::mem::take(&mut self.batch.made);
        let mut requests = std::mem::take(&mut self.batch.requests);
        requests.clear();
        for &Made { page, node, .. } in &made {
            if sound && self.stable.get(node).len < 2 {
                requests.push(Request::Unshare {
                    page,
                    frame: Some(FrameId(node)),
                });
            }
        }
        let mut outcomes = std::mem::take(&mut self.batch.outcomes);
        outcomes.clear();
        outcomes.resize(requests.len(), Attempt::Refused(Reason::NotTried));
        let mut done = Ok(());
        if !requests.is_empty() {
            done = space.apply(&requests, &mut outcomes);
        }
        let mut ended = outcomes.iter().copied();
        made.retain(
            |&Made {
                 page,
                 node,
                 refused,
             }| {
                if !sound || self.stable.get(node).len > 1 {
                    return true;
                }
                match ended.next().expect("each request has an outcome") {
                    Attempt::Refused(reason) => {
                        self.note_skip(page, reason);
                        true
                    }
                    outcome => {
                        let tree = self.stable.get(node).tree;
                        let taken = self.take_back(space, page, node, outcome);
                        if done.is_ok() {
                            done = taken;
                        }
                        if let Some(partner) = refused
                            && done.is_ok()
                        {
                            done = self.put_back(space, tree, partner);
                        }
                        false
                    }
                }
            },
        );
        for &Made { node, .. } in &made {
            self.stable.get_mut(node).stand_in = NIL;
            self.stable.note(node);
        }
        if !sound || done.is_err() {
            self.have_wait(made.iter().map(|it| it.node));
        } else if self.settings.tree_order == TreeOrder::Content {
            for &Made { node, .. } in &made {
                done = done.and(self.place(space, node));
            }
        } else if !made.is_empty() {
            done = self.verify_keys(space, &made);
        }
        (self.batch.made, self.batch.requests, self.batch.outcomes) = (made, requests, outcomes);
        self.batch.made.clear();
        done
    }

    /// Moves those of the new frames to their right places whose pages can have been written between
    /// being hashed or compared and becoming a frame.
    fn verify_keys<S: PageSpace>(&mut self, space: &mut S, made: &[Made]) -> Result<(), S::Error> {
        let mut digests = std::mem::take(&mut self.batch.digests);
        digests.clear();
        digests.resize(made.len(), Attempt::Refused(Reason::NotTried));
        let mut frames = std::mem::take(&mut self.batch.frames);
        frames.clear();
        frames.extend(made.iter().map(|it| FrameId(it.node)));
        let mut done = space.digest_frames(&frames, &mut digests);
        if done.is_err() {
            self.have_wait(made.iter().map(|it| it.node));
            digests.clear();
        }
        // All out before the first is put in again: those that stay are in the right order.
        frames.clear();
        for (&Made { node, .. }, &digest) in made.iter().zip(&digests) {
            let it = *self.stable.get(node);
            let hash = match digest {
                Attempt::Done(digest) => digest.kept(),
                _ => it.hash,
            };
            if hash != it.hash || it.doubtful {
                self.unlink_tentative(node);
                let it = self.stable.get_mut(node);
                (it.hash, it.doubtful) = (hash, false);
                frames.push(FrameId(node));
            }
        }
        for frame in &frames {
            done = done.and(self.place(space, frame.0));
        }
        self.batch.frames = frames;
        self.batch.digests = digests;
        done
    }

    /// Forgets a frame that only the page has joined of which it was made, and which has its own copy
    /// again.
    fn take_back<S: PageSpace>(
        &mut self,
        space: &mut S,
        page: PageId,
        node: u32,
        outcome: Attempt<()>,
    ) -> Result<(), S::Error> {
        let parted = if outcome.is_done() {
            self.part(space, page)
        } else {
            self.part_noticed(space, page)
        };
        self.unlist_all(node, false);
        self.unlink_tentative(node);
        self.stable.free(node);
        self.counters.merged_ever -= 1;
        self.doubt_hash(page);
        self.cursor
            .rewrite(page.0, page.0 + 1, PageState::Resident(Written::Yes));
        parted
    }

    fn attach_merged(&mut self, page: PageId, node: u32) {
        self.attach(page, node);
        self.cursor.rewrite(page.0, page.0 + 1, PageState::Merged);
    }

    fn trace_merge(&mut self, node: Option<u32>, page: PageId, mm: RegionId, outcome: Attempt<()>) {
        if outcome != Attempt::Refused(Reason::NotTried) {
            self.emit(Event::MergeWithKsmPage {
                ksm_page: node.map(FrameId),
                pfn: page,
                rmap_item: page,
                mm,
                err: if outcome.is_done() { 0 } else { FAILED },
            });
        }
    }

    /// Notes that something was not done to a page.
    fn failed(&mut self, page: PageId, outcome: Attempt<()>) {
        if let Attempt::Refused(reason) = outcome {
            self.note_skip(page, reason);
        }
        self.doubt_hash(page);
    }

    /// Where writes are tracked, drops the hash of a page whose bytes turned out to be others: nothing
    /// else might ever have it hashed again. (By the kernel's rule the next look hashes it anyway.)
    fn distrust(&mut self, page: PageId, outcome: Attempt<()>) {
        if self.settings.write_tracking && !matches!(outcome, Attempt::Refused(_)) {
            self.drop_hash(page);
        }
    }

    /// Puts a partner back among the candidates.
    fn put_back<S: PageSpace>(
        &mut self,
        space: &mut S,
        tree: u32,
        page: PageId,
    ) -> Result<(), S::Error> {
        let hash = self.records.get(page).hash();
        // If another candidate has its bytes by now, it waits for the next scan.
        let _ = self.unstable_search_or_insert(space, tree, page, hash)?;
        Ok(())
    }
}
