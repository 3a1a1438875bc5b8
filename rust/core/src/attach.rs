//! Who shares what: the book-keeping, and with it every counter of the pages' states.
//!
//! Nothing here decides anything. Each function makes one change of state and moves every counter that
//! depends on it, so that counters are right whenever control returns to the caller.
//!
//! # Invariants (proved by [`crate::check`])
//! * C1. `pages_shared` is the number of nodes that list sharers; `pages_sharing` the number of sharers
//!   beyond the first of each.
//! * C2. `pages_unshared` is the number of `UNSTABLE` records.
//! * C3. `rmap_items` is the number of records that exist, in all and for each region; likewise
//!   `ksm_zero_pages` and `ksm_merging_pages`.
//! * C4. `stable_node_chains` and `stable_node_dups` are the numbers of chains and of nodes in chains.
//! * C5. With [`zero_only`](crate::Settings::zero_only) no frame has sharers and no page is a candidate.

use crate::rbtree::NIL;
use crate::rmap::{
    ATTACHED, BROKEN, COUNTED_EVEN, COUNTED_ODD, EXISTS, HASHED, RECHECK, UNSTABLE, ZERO,
};
use crate::scanner::Scanner;
use crate::stable_tree::{Role, StableNode};
use crate::{Event, FrameId, PageId, PageSpace, PageState, Reason};

impl Scanner {
    pub(crate) fn emit(&mut self, event: Event) {
        if let Some(sink) = &mut self.trace {
            sink.event(event);
        }
    }

    /// Gives a page a record.
    pub(crate) fn create_item(&mut self, page: PageId) {
        self.records.get_mut(page).set(EXISTS);
        self.counters.items += 1;
        let region = self.regions.of(page);
        self.regions.get_mut(region).items += 1;
    }

    /// Drops a page's record, if it has one. A zero page keeps its mark.
    pub(crate) fn drop_item(&mut self, page: PageId) {
        if !self.records.get(page).is(EXISTS) {
            return;
        }
        self.detach(page);
        self.records.drop_item(page);
        self.counters.items -= 1;
        let region = self.regions.of(page);
        self.regions.get_mut(region).items -= 1;
    }

    /// Marks a page as put onto the zero page.
    pub(crate) fn mark_zero(&mut self, page: PageId) {
        self.records.get_mut(page).set(ZERO);
        self.counters.zero += 1;
        let region = self.regions.of(page);
        self.regions.get_mut(region).zero += 1;
    }

    /// Takes that mark away: the page is not on the zero page any more.
    pub(crate) fn unmark_zero(&mut self, page: PageId) {
        self.records.clear_zero(page);
        self.counters.zero -= 1;
        let region = self.regions.of(page);
        self.regions.get_mut(region).zero -= 1;
    }

    /// Lists a page as a sharer, first in the list.
    pub(crate) fn attach(&mut self, page: PageId, node: u32) {
        let it = self.stable.get_mut(node);
        let next = std::mem::replace(&mut it.head, page.0);
        it.len += 1;
        it.mapped += 1;
        let first = it.len == 1;
        self.stable.note(node);
        self.records.get_mut(page).enlist(node, next);
        if next != NIL {
            self.records.get_mut(PageId(next)).set_prev(page.0);
        }
        if first {
            self.counters.shared += 1;
        } else {
            self.counters.sharing += 1;
        }
        self.counters.merged_ever += 1;
        let region = self.regions.of(page);
        self.regions.get_mut(region).merging += 1;
    }

    /// Notes that a sharer does not show its frame any more. It stays listed until visited. The last
    /// one to part ends the frame.
    ///
    /// # Errors
    /// When memory fails as a whole in releasing the frame. What is recorded is right all the same, so
    /// whoever parts several pages goes on to the last of them before passing an error on.
    pub(crate) fn part<S: PageSpace>(
        &mut self,
        space: &mut S,
        page: PageId,
    ) -> Result<(), S::Error> {
        debug_assert!(
            self.records.get(page).shows_frame(),
            "{page:?} has parted before"
        );
        let item = self.records.get_mut(page);
        item.set(BROKEN);
        let node = item.node();
        let it = self.stable.get_mut(node);
        it.mapped -= 1;
        if it.mapped > 0 {
            return Ok(());
        }
        it.frame = false;
        self.stable.note(node);
        space.release(FrameId(node))
    }

    /// Like [`Scanner::part`], and tells memory, which does not know yet.
    pub(crate) fn part_noticed<S: PageSpace>(
        &mut self,
        space: &mut S,
        page: PageId,
    ) -> Result<(), S::Error> {
        space.parted(page, FrameId(self.records.get(page).node()));
        self.part(space, page)
    }

    /// Draws the conclusions for what was merged from what a page is now. An error is as that of
    /// [`Scanner::part`].
    pub(crate) fn notice<S: PageSpace>(
        &mut self,
        space: &mut S,
        page: PageId,
        state: PageState,
    ) -> Result<(), S::Error> {
        let item = *self.records.get(page);
        if item.is(ZERO) && !matches!(state, PageState::ZeroPage | PageState::Unknown) {
            self.unmark_zero(page);
        }
        if item.shows_frame() && !matches!(state, PageState::Merged | PageState::Unknown) {
            if matches!(state, PageState::Resident(_) | PageState::Ineligible(_)) {
                self.counters.cow_broken += 1;
            }
            self.part_noticed(space, page)?;
        }
        Ok(())
    }

    /// Takes a page out of whatever structure it is in. A sharer has parted before.
    pub(crate) fn detach(&mut self, page: PageId) {
        let item = *self.records.get(page);
        if item.is(UNSTABLE) {
            self.leave_unstable(page);
        } else if item.is(ATTACHED) {
            debug_assert!(item.is(BROKEN), "{page:?} still shows its frame");
            let node = item.node();
            if self.stable.get(node).is_stale() {
                self.remove_node(node);
            } else {
                self.unlist(page, node);
            }
        }
    }

    /// Takes a page off the list of a node that has others.
    fn unlist(&mut self, page: PageId, node: u32) {
        let item = *self.records.get(page);
        if item.prev() == NIL {
            self.stable.get_mut(node).head = item.next();
        } else {
            self.records
                .get_mut(PageId(item.prev()))
                .set_next(item.next());
        }
        if item.next() != NIL {
            self.records
                .get_mut(PageId(item.next()))
                .set_prev(item.prev());
        }
        let was_full = !self.has_room(node);
        self.stable.get_mut(node).len -= 1;
        self.stable.note(node);
        if self.stable.get(node).len > 0 {
            self.counters.sharing -= 1;
        } else {
            self.counters.shared -= 1;
        }
        self.free_of_node(page);
        if was_full {
            self.room_in(node);
        }
    }

    fn free_of_node(&mut self, page: PageId) {
        self.records.get_mut(page).clear(ATTACHED | BROKEN);
        let region = self.regions.of(page);
        self.regions.get_mut(region).merging -= 1;
    }

    /// Takes everybody off the list of a node; with `trace`, in the words of the kernel's event.
    pub(crate) fn unlist_all(&mut self, node: u32, trace: bool) {
        let mut at = self.stable.get(node).head;
        while at != NIL {
            let page = PageId(at);
            at = self.records.get(page).next();
            if at == NIL {
                self.counters.shared -= 1;
            } else {
                self.counters.sharing -= 1;
                if trace {
                    let mm = self.regions.of(page);
                    self.emit(Event::RemoveRmapItem {
                        pfn: FrameId(node),
                        rmap_item: page,
                        mm,
                    });
                }
            }
            self.free_of_node(page);
        }
        let it = self.stable.get_mut(node);
        (it.head, it.len) = (NIL, 0);
        self.stable.note(node);
    }

    /// Removes a stale node. Its sharers' records survive, in no structure.
    pub(crate) fn remove_node(&mut self, node: u32) {
        debug_assert!(
            self.stable.get(node).is_stale(),
            "node {node} still has pages"
        );
        self.unlist_all(node, true);
        self.emit(Event::RemoveKsmPage { pfn: FrameId(node) });
        let tree = self.stable.get(node).tree as usize;
        self.stable.unlink(&mut self.trees[tree].stable, node);
        self.waiting.retain(|&other| other != node);
        self.stable.free(node);
    }

    /// Removes stale nodes and empty chains wherever they are.
    pub(crate) fn purge_stable_trees(&mut self) {
        let nodes = self.stable.in_use().map(|(node, _)| node).collect();
        self.purge(nodes);
    }

    /// Removes those of one tree, without looking at any other.
    pub(crate) fn purge_stable_tree(&mut self, tree: u32) {
        let waiting = self.waiting.iter().copied();
        let mut nodes: Vec<u32> = waiting
            .filter(|&node| self.stable.get(node).tree == tree)
            .collect();
        self.stable
            .for_each_in(&self.trees[tree as usize].stable, |node| nodes.push(node));
        nodes.sort_unstable();
        self.purge(nodes);
    }

    /// Removes those of `nodes`, in this order, that are stale, then those that are empty chains.
    fn purge(&mut self, nodes: Vec<u32>) {
        self.work.dups += nodes.len() as u64;
        let (chains, others): (Vec<u32>, Vec<u32>) = nodes
            .into_iter()
            .partition(|&node| self.stable.get(node).role == Role::Chain);
        for node in others {
            if self.stable.get(node).is_stale() {
                self.remove_node(node);
            }
        }
        for chain in chains {
            let &StableNode { tree, len, .. } = self.stable.get(chain);
            if len == 0 {
                self.stable
                    .remove_chain(&mut self.trees[tree as usize].stable, chain);
            }
        }
    }

    /// Drops a record's hash: its page has been written.
    pub(crate) fn drop_hash(&mut self, page: PageId) {
        self.records.get_mut(page).clear(HASHED | RECHECK);
    }

    /// Has a page's hash compared with its bytes before it is believed again.
    pub(crate) fn doubt_hash(&mut self, page: PageId) {
        let item = self.records.get_mut(page);
        if item.is(HASHED) {
            item.set(RECHECK);
        }
    }

    /// Counts a page as left alone, once in a scan. A page that has no record is met only once.
    pub(crate) fn note_skip(&mut self, page: PageId, reason: Reason) {
        if reason == Reason::NotTried {
            return;
        }
        if self.records.get(page).is(EXISTS) {
            let (now, before) = if self.seq % 2 == 1 {
                (COUNTED_ODD, COUNTED_EVEN)
            } else {
                (COUNTED_EVEN, COUNTED_ODD)
            };
            let item = self.records.get_mut(page);
            if item.is(now) {
                return;
            }
            item.set(now);
            item.clear(before);
        }
        self.counters.skipped_now[reason as usize] += 1;
    }
}
