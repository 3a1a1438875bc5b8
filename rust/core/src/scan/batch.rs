//! What is done with pages: a batch is hashed, decided on page by page, and carried out, in rounds.
//!
//! A decision is a plan: to put a page onto the zero page, to have it join a frame, or to make a frame of
//! it for itself and its partner. All plans of a round are asked of memory in one call, and `conclude`
//! says what follows from its answers. Pages that have to be decided on once more make the next round.
//!
//! # Invariants (proved by [`crate::check`])
//! * P3. Between two steps no plan is left.
//!
//! # Cost
//! A call for hashing and one for each round, mostly one. Searches as the trees say; what they are going
//! to read is fetched for the whole batch side by side. Nothing is allocated once the batch has grown to
//! its size.
//!
//! # Departures from ksmd
//! No page is refused for belonging to the same huge page as its twin: memory splits those.

use crate::forest::{Forest, go_side_by_side};
use crate::rmap::{HASHED, RECHECK};
use crate::scanner::{Scanner, TreePair};
use crate::stable_tree::{Spot, StableFound};
use crate::unstable_tree::UnstableFound;
use crate::{
    Attempt, Content, Digest, FrameId, PageId, PageSpace, PageState, Reason, RegionId, Request,
    TreeOrder,
};
use std::collections::BTreeSet;

/// Searches for which it is worth while to go side by side.
const SIDE_BY_SIDE: usize = 8;

/// A page that is being examined.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) page: PageId,
    pub(super) region: RegionId,
    pub(super) tree: u32,
    /// The hash of its bytes, once it is known.
    pub(super) hash: u64,
    pub(super) hashed: bool,
    /// Calm only if the hash is that of the last look.
    pub(super) by_hash: bool,
    /// The zero page has been tried.
    pub(super) zero_tried: bool,
}

/// What has been decided for a page.
#[derive(Clone, Copy, Debug)]
pub(super) enum Plan {
    /// Put it onto the zero page.
    Zero,
    /// Put it onto the frame of a node.
    Join { node: u32 },
    /// Make a frame of it, and put its partner onto that.
    Pair { partner: PageId, node: u32 },
}

/// A frame made in this round.
#[derive(Clone, Copy, Debug)]
pub(super) struct Made {
    /// The page of which it was made.
    pub(super) page: PageId,
    pub(super) node: u32,
    /// The partner, if it refused to join: a candidate again, should the frame come to nothing.
    pub(super) refused: Option<PageId>,
}

/// What is under way in a step. Empty between steps, but keeps its room.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(super) candidates: Vec<Candidate>,
    pub(super) plans: Vec<(Candidate, Plan)>,
    pub(super) requests: Vec<Request>,
    pub(super) outcomes: Vec<Attempt<()>>,
    pub(super) to_hash: Vec<PageId>,
    pub(super) digests: Vec<Attempt<Digest>>,
    pub(super) again: Vec<Candidate>,
    /// Pages that have become candidates because the frames with their bytes are full, or will be.
    pub(super) turned_away: Vec<Candidate>,
    /// Such a frame has got room, because a page that was to join has failed.
    pub(super) gave_room: bool,
    pub(super) made: Vec<Made>,
    pub(super) failed: Vec<u32>,
    /// Trees and hashes of which the last promotion in this batch has failed.
    pub(super) failing: BTreeSet<(u32, u64)>,
    /// Those of them of which another is planned in this round.
    pub(super) trying: BTreeSet<(u32, u64)>,
    pub(super) frames: Vec<FrameId>,
    pub(super) states: Vec<PageState>,
    /// Where searches side by side have come to.
    pub(super) ways: Vec<(u64, u32)>,
}

impl Batch {
    pub(crate) fn is_empty(&self) -> bool {
        self.candidates.is_empty() && self.plans.is_empty() && self.again.is_empty()
    }

    pub(crate) fn bytes(&self) -> usize {
        (self.candidates.capacity() + self.again.capacity() + self.turned_away.capacity())
            * size_of::<Candidate>()
            + self.plans.capacity() * size_of::<(Candidate, Plan)>()
            + self.requests.capacity() * size_of::<Request>()
            + self.outcomes.capacity() * size_of::<Attempt<()>>()
            + self.to_hash.capacity() * size_of::<PageId>()
            + self.digests.capacity() * size_of::<Attempt<Digest>>()
            + self.made.capacity() * size_of::<Made>()
            + self.frames.capacity() * size_of::<FrameId>()
            + self.states.capacity() * size_of::<PageState>()
            + self.ways.capacity() * size_of::<(u64, u32)>()
    }
}

impl Scanner {
    /// Examines the pages collected: hashes those that need it, then decides and acts in rounds.
    pub(super) fn examine_batch<S: PageSpace>(&mut self, space: &mut S) -> Result<(), S::Error> {
        if self.batch.candidates.is_empty() {
            return Ok(());
        }
        let mut candidates = std::mem::take(&mut self.batch.candidates);
        let hashed = self.hash_and_keep_calm(space, &mut candidates);
        self.warm_up(&candidates);
        let mut done = hashed;
        while done.is_ok() && !candidates.is_empty() {
            done = self.round(space, &mut candidates);
        }
        candidates.clear();
        self.batch.candidates = candidates;
        self.batch.failing.clear();
        done
    }

    /// Goes the ways that the searches for all candidates are going to go, so that those find them in
    /// the cache.
    fn warm_up(&mut self, candidates: &[Candidate]) {
        if candidates.len() < SIDE_BY_SIDE || self.settings.tree_order == TreeOrder::Content {
            return;
        }
        let trees = &self.trees;
        let begin = |ways: &mut Vec<(u64, u32)>, which: fn(&TreePair) -> &Forest| {
            ways.clear();
            ways.extend(candidates.iter().map(|it| {
                let tree = which(&trees[it.tree as usize]);
                (it.hash, tree.root(it.hash))
            }));
        };
        let ways = &mut self.batch.ways;
        begin(ways, |trees| &trees.stable);
        go_side_by_side(&self.stable, ways);
        begin(ways, |trees| &trees.unstable);
        go_side_by_side(&self.records, ways);
    }

    /// Hashes candidates where needed, and keeps those of them that are calm.
    fn hash_and_keep_calm<S: PageSpace>(
        &mut self,
        space: &mut S,
        candidates: &mut Vec<Candidate>,
    ) -> Result<(), S::Error> {
        let Batch {
            to_hash, digests, ..
        } = &mut self.batch;
        to_hash.clear();
        to_hash.extend(candidates.iter().filter(|c| !c.hashed).map(|c| c.page));
        digests.clear();
        digests.resize(to_hash.len(), Attempt::Refused(Reason::NotTried));
        if !to_hash.is_empty() {
            space.digest(to_hash, digests)?;
        }
        let digests = std::mem::take(&mut self.batch.digests);
        let mut answers = digests.iter();
        candidates.retain_mut(|candidate| {
            if candidate.hashed {
                return true;
            }
            match answers.next() {
                Some(&Attempt::Done(digest)) => self.is_calm(candidate, digest),
                Some(&Attempt::Refused(reason)) => {
                    self.note_skip(candidate.page, reason);
                    false
                }
                _ => {
                    self.drop_hash(candidate.page);
                    false
                }
            }
        });
        self.batch.digests = digests;
        Ok(())
    }

    /// Records a page's new hash, and says whether the page has been calm.
    fn is_calm(&mut self, candidate: &mut Candidate, digest: Digest) -> bool {
        let hash = digest.kept();
        if digest.zero {
            self.zero_hash = Some(hash);
        }
        (candidate.hash, candidate.hashed) = (hash, true);
        let item = self.records.get_mut(candidate.page);
        let same = item.kept_hash() == Some(hash);
        item.set_hash(hash);
        item.set(HASHED);
        item.clear(RECHECK);
        same || !candidate.by_hash
    }

    /// Decides on each candidate, has the decisions carried out, and leaves those candidates that
    /// have to be decided on again.
    fn round<S: PageSpace>(
        &mut self,
        space: &mut S,
        candidates: &mut Vec<Candidate>,
    ) -> Result<(), S::Error> {
        self.batch.plans.clear();
        self.batch.requests.clear();
        self.batch.turned_away.clear();
        self.batch.trying.clear();
        self.batch.gave_room = false;
        let mut done = Ok(());
        for candidate in candidates.drain(..) {
            if done.is_ok() {
                done = self.cmp_and_merge_page(space, candidate);
            }
        }
        let Batch {
            requests, outcomes, ..
        } = &mut self.batch;
        outcomes.clear();
        outcomes.resize(requests.len(), Attempt::Refused(Reason::NotTried));
        if done.is_ok() && !requests.is_empty() {
            done = space.apply(requests, outcomes);
        }
        let sound = done.is_ok();
        let concluded = self.conclude(space, sound);
        candidates.append(&mut self.batch.again);
        done.and(concluded)
    }

    /// Decides what becomes of one page: the kernel's function of this name, but for the hash, which
    /// has been taken, and the acting, which [`Scanner::conclude`] sees to.
    ///
    /// The page is in no structure. It ends in one, or in a plan, or in neither and is volatile.
    fn cmp_and_merge_page<S: PageSpace>(
        &mut self,
        space: &mut S,
        candidate: Candidate,
    ) -> Result<(), S::Error> {
        let Candidate {
            page, tree, hash, ..
        } = candidate;
        if self.batch.trying.contains(&(tree, hash)) {
            self.batch.again.push(candidate);
            return Ok(());
        }
        self.work.decisions += 1;

        // A page of zeroes needs no frame.
        let zero = self.zero_hash == Some(hash);
        if self.settings.use_zero_pages && zero && !candidate.zero_tried {
            self.plan(candidate, Plan::Zero, &[Request::Zero { page }]);
            return Ok(());
        }

        if self.settings.zero_only {
            return Ok(());
        }

        // Is there a frame with its bytes, or one planned?
        let wanted = (Content::Page(page), hash);
        let (spot, tied) = match self.stable_search(space, tree, wanted, true)? {
            StableFound::Lost => return Ok(()),
            StableFound::Room { node, .. } => {
                self.stable.get_mut(node).pending += 1;
                self.stable.note(node);
                let share = Request::Share {
                    page,
                    frame: FrameId(node),
                };
                self.plan(candidate, Plan::Join { node }, &[share]);
                return Ok(());
            }
            StableFound::No { spot, tied } => (spot, tied),
        };

        // Is there a candidate with its bytes? If not, it is one now.
        let partner = match self.unstable_search_or_insert(space, tree, page, hash)? {
            UnstableFound::Lost => return Ok(()),
            UnstableFound::Inserted => {
                if matches!(spot, Spot::Beside(_)) {
                    self.batch.turned_away.push(candidate);
                }
                return Ok(());
            }
            UnstableFound::Partner(partner) => partner,
        };
        self.batch.turned_away.retain(|it| it.page != partner);
        let node = self.stable.new_tentative(tree, hash, page);
        if self.settings.tree_order == TreeOrder::Digest {
            // Later pages of this batch are to find the node, and not to find the partner.
            self.link_node(node, spot);
            self.stable.get_mut(node).doubtful = tied;
            self.leave_unstable(partner);
        }
        if self.batch.failing.contains(&(tree, hash)) {
            self.batch.trying.insert((tree, hash));
        }
        let frame = FrameId(node);
        self.plan(
            candidate,
            Plan::Pair { partner, node },
            &[
                Request::Promote { page, frame },
                Request::Share {
                    page: partner,
                    frame,
                },
            ],
        );
        Ok(())
    }

    fn plan(&mut self, candidate: Candidate, plan: Plan, requests: &[Request]) {
        self.batch.plans.push((candidate, plan));
        self.batch.requests.extend_from_slice(requests);
    }
}

/// Breaks a promise, for the tests of `check`.
#[cfg(test)]
pub(crate) fn leave_a_plan(scanner: &mut Scanner) {
    scanner.batch.candidates.push(Candidate {
        page: PageId(0),
        region: RegionId(0),
        tree: 0,
        hash: 0,
        hashed: false,
        by_hash: false,
        zero_tried: false,
    });
}
