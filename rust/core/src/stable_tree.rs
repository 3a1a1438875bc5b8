//! The stable trees: every frame, ordered by content.
//!
//! Frames never change while they exist, so unlike the unstable tree this one can be believed: equal
//! bytes always lead to the same entry. An entry is a *plain* node, one frame; or, when a frame has
//! as many sharers as it may have and another is needed, a *chain* of *dups*: frames with the same
//! bytes. There is one stable tree for each (domain, NUMA node).
//!
//! A frame is named like its node. The node of a frame that is still to be made is *tentative*: until
//! memory has answered, the page that is to become the frame stands in for it in comparisons, and
//! equal pages of the same batch may plan to join.
//!
//! A node does not hold its frame. When the last page has left a frame it is released, and its node,
//! now *stale*, stays behind until a search passes or a sharer of old is visited, as in the kernel.
//!
//! # Invariants (proved by [`crate::check`])
//! * S1. No two entries of a tree hold equal bytes; entries are in the order of their keys.
//! * S2. All dups of a chain hold equal bytes. A chain is in a tree, its dups are in the chain only.
//! * S3. No node lists more than `max_page_sharing` sharers. It may list pages that have since been
//!   written: the scan takes them out when it next passes.
//! * S4. `len` is the number of sharers listed (of a chain: of dups), at least 1 but for chains;
//!   `mapped` is how many of those are not known to have parted.
//! * S5. A node has a frame exactly if `mapped` is not 0.
//! * S7. Which dups have room, and which are stale, is known without looking at them, in chain order.
//! * S6. Between two steps no node is tentative, and none is outside of the trees but those that *wait*:
//!   frames made just before memory failed, whose places could not be found. The next step does that.
//!
//! # Cost
//! A search compares O(log entries) pages in content order; in digest order only those whose hashes
//! are equal. Choosing a dup takes O(log dups), however many are full: with `max_page_sharing` 2 and a
//! million equal pages a walk over them for each page would take minutes (ksmd walks). Only pruning
//! visits all dups that have room. A node takes 56 bytes, besides its share of an eighth that may be free.
//!
//! # Departures from ksmd
//! Frames do not migrate, so there is no migrate list. No page belongs to a frame without being
//! recorded as its sharer, so no node goes over the limit.

use crate::forest::{Forest, Keyed};
use crate::rbtree::{Links, NIL, Place, Side};
use crate::rmap::low32;
use crate::scan::BATCH;
use crate::scanner::Scanner;
use crate::{Attempt, Content, FrameId, PageId, PageSpace, Reason, Tick, TreeOrder};
use std::cmp::Reverse;
use std::collections::BTreeMap;

/// What a node is at present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Not in use.
    Free,
    /// In use, and in no tree yet.
    Loose,
    /// One frame, in a tree.
    Plain,
    /// Several frames for the same bytes, in a tree.
    Chain,
    /// One frame, in a chain.
    Dup,
}

/// What is noted of a dup in its chain's lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Noted {
    /// Nothing: it is full, or no dup.
    Nothing,
    /// It may take one more sharer.
    Room,
    /// Its frame has no page left.
    Stale,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct StableNode {
    /// The hash of its bytes: the key in digest order.
    pub(crate) hash: u64,
    /// Of a chain: when it was last pruned. Of a dup: the number of its push, which tells its place.
    stamp: u64,
    /// Left, right and parent in a tree; or next dup, previous dup and chain.
    links: [u32; 3],
    /// The first sharer, or the first dup of a chain.
    pub(crate) head: u32,
    /// How many sharers are listed, or how many dups.
    pub(crate) len: u32,
    /// Sharers that have not parted as far as is known.
    pub(crate) mapped: u32,
    /// Pages of the running batch that plan to join.
    pub(crate) pending: u16,
    /// The page that is to become the frame, while it is tentative.
    pub(crate) stand_in: u32,
    /// Which tree it belongs to.
    pub(crate) tree: u32,
    pub(crate) role: Role,
    pub(crate) noted: Noted,
    red: bool,
    /// Whether the frame exists.
    pub(crate) frame: bool,
    /// The promotion that was to make its frame has failed.
    pub(crate) failed: bool,
    /// Where it is in its tree was found by comparing bytes that can have changed since.
    pub(crate) doubtful: bool,
}

const _: () = assert!(
    size_of::<StableNode>() <= 56,
    "a frame's node costs at most 56 bytes"
);
const _: () = assert!(
    BATCH + 2 <= u16::MAX as usize,
    "a whole batch may plan to join one node"
);

impl StableNode {
    const FREE: Self = Self {
        hash: 0,
        stamp: 0,
        links: [NIL; 3],
        head: NIL,
        len: 0,
        mapped: 0,
        pending: 0,
        stand_in: NIL,
        tree: 0,
        role: Role::Free,
        noted: Noted::Nothing,
        red: false,
        frame: false,
        failed: false,
        doubtful: false,
    };

    pub(crate) fn is_tentative(&self) -> bool {
        self.stand_in != NIL
    }

    /// Its frame has no page left.
    pub(crate) fn is_stale(&self) -> bool {
        self.mapped == 0 && !self.is_tentative()
    }

    /// Sharers that it has, or will have if all goes well.
    fn sharers(&self) -> u32 {
        self.len + u32::from(self.pending)
    }

    /// Whether it may take one more.
    fn has_room(&self, max: u32) -> bool {
        let sharers = self.sharers();
        sharers > 0 && sharers < max
    }

    /// What there is to note of it, by rule.
    pub(crate) fn what_to_note(&self, max: u32) -> Noted {
        if self.role != Role::Dup {
            Noted::Nothing
        } else if self.is_stale() {
            Noted::Stale
        } else if self.has_room(max) {
            Noted::Room
        } else {
            Noted::Nothing
        }
    }

    /// Where a dup stands: its chain, and its place from the head on (the last pushed is the first).
    pub(crate) fn standing(&self) -> Standing {
        (self.chain(), Reverse(self.stamp))
    }

    pub(crate) fn next_dup(&self) -> u32 {
        self.links[0]
    }

    pub(crate) fn prev_dup(&self) -> u32 {
        self.links[1]
    }

    pub(crate) fn chain(&self) -> u32 {
        self.links[2]
    }
}

/// A dup's chain and place, in the order of places.
pub(crate) type Standing = (u32, Reverse<u64>);

/// Before the first place of a chain, and behind its last.
const fn places_of(chain: u32) -> (Standing, Standing) {
    ((chain, Reverse(u64::MAX)), (chain, Reverse(0)))
}

/// Where a new node goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spot {
    /// A place of its own.
    Vacant(Place),
    /// Beside this entry, which has the same bytes and no room.
    Beside(u32),
}

/// The nodes of all trees.
#[derive(Clone, Debug)]
pub(crate) struct StableNodes {
    nodes: Vec<StableNode>,
    /// The first node that is not in use, and how many are not. Each names the next as a left child.
    first_vacant: u32,
    vacant: usize,
    /// Dups that may take one more sharer, and dups whose frames have no page left.
    roomy: BTreeMap<Standing, u32>,
    stale: BTreeMap<Standing, u32>,
    /// `max_page_sharing`.
    max: u32,
    /// Dups pushed so far.
    pushed: u64,
    /// Chains, emptied ones included.
    pub(crate) chains: u64,
    /// Nodes that are in a chain.
    pub(crate) dups: u64,
}

impl StableNodes {
    pub(crate) fn new(max_page_sharing: u32) -> Self {
        Self {
            nodes: Vec::new(),
            first_vacant: NIL,
            vacant: 0,
            roomy: BTreeMap::new(),
            stale: BTreeMap::new(),
            max: max_page_sharing,
            pushed: 0,
            chains: 0,
            dups: 0,
        }
    }

    /// Takes a new limit, while no node is in use.
    pub(crate) fn set_max_page_sharing(&mut self, max: u32) {
        debug_assert_eq!(self.nodes.len(), self.vacant, "nodes are in use");
        self.max = max;
    }

    /// Whether a node may take one more sharer.
    pub(crate) fn has_room(&self, node: u32) -> bool {
        self.get(node).has_room(self.max)
    }

    /// Brings the notes about a node up to date. To be called after each change of what they are about.
    pub(crate) fn note(&mut self, node: u32) {
        let it = self.get(node);
        let (before, now, standing) = (it.noted, it.what_to_note(self.max), it.standing());
        if before == now {
            return;
        }
        if let Some(list) = self.noted(before) {
            list.remove(&standing);
        }
        if let Some(list) = self.noted(now) {
            list.insert(standing, node);
        }
        self.get_mut(node).noted = now;
    }

    fn noted(&mut self, as_what: Noted) -> Option<&mut BTreeMap<Standing, u32>> {
        match as_what {
            Noted::Nothing => None,
            Noted::Room => Some(&mut self.roomy),
            Noted::Stale => Some(&mut self.stale),
        }
    }

    /// The first dup of a chain that has room.
    fn first_with_room(&self, chain: u32) -> Option<u32> {
        let (first, last) = places_of(chain);
        self.roomy.range(first..=last).next().map(|(_, &dup)| dup)
    }

    /// All of them, in chain order.
    fn with_room(&self, chain: u32) -> impl Iterator<Item = u32> {
        let (first, last) = places_of(chain);
        self.roomy.range(first..=last).map(|(_, &dup)| dup)
    }

    /// The first dup of a chain that is stale; with `before`, only if it stands before that one.
    fn first_stale(&self, chain: u32, before: Option<u32>) -> Option<u32> {
        let (first, last) = places_of(chain);
        let last = before.map_or(last, |dup| self.get(dup).standing());
        self.stale.range(first..=last).next().map(|(_, &dup)| dup)
    }

    /// How many dups are noted.
    pub(crate) fn notes(&self) -> usize {
        self.roomy.len() + self.stale.len()
    }

    /// Whether a dup is listed as what is noted of it.
    pub(crate) fn is_listed(&self, node: u32) -> bool {
        let it = self.get(node);
        let list = match it.noted {
            Noted::Nothing => return true,
            Noted::Room => &self.roomy,
            Noted::Stale => &self.stale,
        };
        list.get(&it.standing()) == Some(&node)
    }

    pub(crate) fn get(&self, node: u32) -> &StableNode {
        &self.nodes[node as usize]
    }

    /// The node of a frame that exists.
    pub(crate) fn living(&self, frame: FrameId) -> Option<&StableNode> {
        self.nodes.get(frame.index()).filter(|node| node.frame)
    }

    pub(crate) fn get_mut(&mut self, node: u32) -> &mut StableNode {
        &mut self.nodes[node as usize]
    }

    /// What to compare with in order to compare with this node.
    pub(crate) fn content(&self, node: u32) -> Content {
        let it = self.get(node);
        if it.frame {
            Content::Frame(FrameId(node))
        } else {
            Content::Page(PageId(it.stand_in))
        }
    }

    fn new_node(&mut self, tree: u32, hash: u64, role: Role) -> u32 {
        let mut node = self.first_vacant;
        if node == NIL {
            self.make_room();
            self.nodes.push(StableNode::FREE);
            node = low32(self.nodes.len() - 1);
        } else {
            self.first_vacant = self.get(node).links[0];
            self.vacant -= 1;
        }
        *self.get_mut(node) = StableNode {
            hash,
            tree,
            role,
            ..StableNode::FREE
        };
        node
    }

    /// Grows by an eighth rather than to the double: room that is not used is most of what a node costs
    /// else. (A large array is not copied for that: the allocator moves its mapping.)
    fn make_room(&mut self) {
        if self.nodes.len() == self.nodes.capacity() {
            self.nodes.reserve_exact(self.nodes.len() / 8 + 64);
        }
    }

    /// A node whose frame is still to be made, of `page`.
    pub(crate) fn new_tentative(&mut self, tree: u32, hash: u64, page: PageId) -> u32 {
        let node = self.new_node(tree, hash, Role::Loose);
        let it = self.get_mut(node);
        it.stand_in = page.0;
        it.pending = 2; // The page and its partner.
        node
    }

    pub(crate) fn free(&mut self, node: u32) {
        debug_assert!(
            !self.get(node).frame,
            "the frame of node {node} has not been released"
        );
        let next = std::mem::replace(&mut self.first_vacant, node);
        let it = self.get_mut(node);
        *it = StableNode::FREE;
        it.links[0] = next;
        self.vacant += 1;
        if self.vacant == self.nodes.len() {
            // After everything has been un-merged, what it took is given back.
            (self.nodes, self.first_vacant, self.vacant) = (Vec::new(), NIL, 0);
        }
    }

    /// Hangs a loose node in at a spot that a search has just found.
    pub(crate) fn link(
        &mut self,
        (tree, order): (&mut Forest, TreeOrder),
        spot: Spot,
        node: u32,
        now: Tick,
    ) {
        match spot {
            Spot::Vacant(place) => {
                self.get_mut(node).role = Role::Plain;
                tree.insert(self, order, place, node);
            }
            Spot::Beside(top) => {
                let chain = if self.get(top).role == Role::Chain {
                    top
                } else {
                    self.make_chain(tree, top, now)
                };
                self.push_dup(chain, node);
            }
        }
    }

    /// Puts a chain into the place of a plain node, which becomes its first dup.
    fn make_chain(&mut self, tree: &mut Forest, plain: u32, now: Tick) -> u32 {
        let it = *self.get(plain);
        let chain = self.new_node(it.tree, it.hash, Role::Chain);
        self.get_mut(chain).stamp = now.0;
        tree.replace(self, plain, chain);
        self.chains += 1;
        self.push_dup(chain, plain);
        chain
    }

    fn push_dup(&mut self, chain: u32, node: u32) {
        let head = self.get(chain).head;
        self.pushed += 1;
        let pushed = self.pushed;
        let it = self.get_mut(node);
        it.stamp = pushed;
        it.role = Role::Dup;
        it.links = [head, NIL, chain];
        if head != NIL {
            self.get_mut(head).links[1] = node;
        }
        let chain = self.get_mut(chain);
        chain.head = node;
        chain.len += 1;
        self.dups += 1;
        self.note(node);
    }

    fn take_dup(&mut self, node: u32) {
        let [next, prev, chain] = self.get(node).links;
        if prev == NIL {
            self.get_mut(chain).head = next;
        } else {
            self.get_mut(prev).links[0] = next;
        }
        if next != NIL {
            self.get_mut(next).links[1] = prev;
        }
        self.get_mut(chain).len -= 1;
        self.get_mut(node).role = Role::Loose;
        self.dups -= 1;
        self.note(node);
    }

    /// Takes a node out of its tree or chain. A chain that has lost its last dup stays.
    pub(crate) fn unlink(&mut self, tree: &mut Forest, node: u32) {
        match self.get(node).role {
            Role::Dup => self.take_dup(node),
            Role::Plain => {
                tree.remove(self, node);
                self.get_mut(node).role = Role::Loose;
            }
            Role::Chain | Role::Loose | Role::Free => {}
        }
    }

    /// Takes an empty chain out of its tree.
    pub(crate) fn remove_chain(&mut self, tree: &mut Forest, chain: u32) {
        debug_assert_eq!(self.get(chain).len, 0, "chain {chain} still has dups");
        tree.remove(self, chain);
        self.chains -= 1;
        self.free(chain);
    }

    /// Puts the only dup of a chain into the chain's place.
    pub(crate) fn dissolve(&mut self, tree: &mut Forest, chain: u32) -> u32 {
        let only = self.get(chain).head;
        self.take_dup(only);
        tree.replace(self, chain, only);
        self.get_mut(only).role = Role::Plain;
        self.chains -= 1;
        self.free(chain);
        only
    }

    /// Calls `with` for each node of a tree, the dups of its chains included.
    pub(crate) fn for_each_in(&self, tree: &Forest, mut with: impl FnMut(u32)) {
        let mut above = tree.roots().to_vec();
        while let Some(node) = above.pop() {
            if node == NIL {
                continue;
            }
            with(node);
            above.extend([Side::Left, Side::Right].map(|side| self.child(node, side)));
            if self.get(node).role == Role::Chain {
                let mut dup = self.get(node).head;
                while dup != NIL {
                    with(dup);
                    dup = self.get(dup).next_dup();
                }
            }
        }
    }

    /// All nodes in use, by number.
    pub(crate) fn in_use(&self) -> impl Iterator<Item = (u32, &StableNode)> {
        (0..)
            .zip(&self.nodes)
            .filter(|(_, node)| node.role != Role::Free)
    }

    /// Puts a dup out of its place, for the tests of `check`.
    #[cfg(test)]
    pub(crate) fn forget_place(&mut self, dup: u32) {
        let head = self.get(self.get(dup).chain()).head;
        self.get_mut(head).stamp = 0;
    }

    /// Lists what there is no more, for the tests of `check`.
    #[cfg(test)]
    pub(crate) fn add_note(&mut self, dup: u32) {
        self.stale.insert((u32::MAX, Reverse(0)), dup);
    }

    /// Loses numbers, for the tests of `check`.
    #[cfg(test)]
    pub(crate) fn forget_vacancies(&mut self) {
        self.nodes.push(StableNode::FREE);
    }

    pub(crate) fn bytes(&self) -> usize {
        // Tree maps keep their entries in nodes that are at least about half full.
        self.nodes.capacity() * size_of::<StableNode>()
            + self.notes() * 2 * size_of::<(Standing, u32)>()
    }

    /// Numbers not in use, and how many numbers there are.
    pub(crate) fn vacancies(&self) -> (usize, usize) {
        let mut listed = 0;
        let mut at = self.first_vacant;
        while at != NIL && self.get(at).role == Role::Free && listed < self.nodes.len() {
            listed += 1;
            at = self.get(at).links[0];
        }
        (listed, self.nodes.len())
    }
}

impl Keyed for StableNodes {
    fn key(&self, at: u32) -> u64 {
        self.get(at).hash
    }
}

/// Plain nodes and chains are the nodes of a tree.
impl Links for StableNodes {
    fn child(&self, at: u32, side: Side) -> u32 {
        self.get(at).links[side as usize]
    }

    fn set_child(&mut self, at: u32, side: Side, to: u32) {
        self.get_mut(at).links[side as usize] = to;
    }

    fn parent(&self, at: u32) -> u32 {
        self.get(at).links[2]
    }

    fn set_parent(&mut self, at: u32, to: u32) {
        self.get_mut(at).links[2] = to;
    }

    fn is_red(&self, at: u32) -> bool {
        self.get(at).red
    }

    fn set_red(&mut self, at: u32, red: bool) {
        self.get_mut(at).red = red;
    }
}

/// How a search in a stable tree ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StableFound {
    /// A frame with the same bytes and room for a sharer.
    Room {
        /// Its entry in the tree.
        top: u32,
        /// Its node.
        node: u32,
    },
    /// None; a new one would go here.
    No {
        /// Where.
        spot: Spot,
        /// Bytes were compared on the way, with pages or frames of the same hash if by digest.
        tied: bool,
    },
    /// Something could not be compared.
    Lost,
}

impl Scanner {
    /// Whether a node may take one more sharer.
    pub(crate) fn has_room(&self, node: u32) -> bool {
        self.stable.has_room(node)
    }

    /// Has candidates with the bytes of a node examined again, because it has got room.
    pub(crate) fn room_in(&mut self, node: u32) {
        let &StableNode { tree, hash, .. } = self.stable.get(node);
        self.recall(tree, hash);
    }

    /// Chooses the frame that stands for a tree entry: the entry as it is from now on, and the node.
    /// `None` if the entry was stale and is gone.
    fn pick(&mut self, entry: u32, may_prune: bool) -> Option<(u32, u32)> {
        if self.stable.get(entry).role == Role::Plain {
            if self.stable.get(entry).is_stale() {
                self.remove_node(entry);
                return None;
            }
            return Some((entry, entry));
        }

        let interval = u64::from(self.settings.stable_node_chains_prune_millisecs);
        let due = self.stable.get(entry).stamp.saturating_add(interval);
        let prune = may_prune && self.now.0 >= due;
        if prune {
            self.stable.get_mut(entry).stamp = self.now.0;
        }
        // A walk from the head would end at the first dup with room, unless it prunes; and would remove
        // the stale ones that it passes. The lists tell all that without a walk.
        let first = self.stable.first_with_room(entry);
        while let Some(dup) = self.stable.first_stale(entry, first.filter(|_| !prune)) {
            self.work.dups += 1;
            self.remove_node(dup);
        }
        let mut best = first.unwrap_or(self.stable.get(entry).head);
        if prune {
            let sharers = |dup: u32| self.stable.get(dup).sharers();
            for dup in self.stable.with_room(entry) {
                self.work.dups += 1;
                if sharers(dup) > sharers(best) {
                    best = dup;
                }
            }
        }

        let tree = self.stable.get(entry).tree as usize;
        if best == NIL {
            self.stable
                .remove_chain(&mut self.trees[tree].stable, entry);
            return None;
        }
        if self.stable.get(entry).len == 1 {
            let only = self.stable.dissolve(&mut self.trees[tree].stable, entry);
            return Some((only, only));
        }
        // To the front only if it could take one more after the sharer that is coming now.
        let sharers = self.stable.get(best).sharers();
        if self.stable.get(entry).head != best
            && sharers > 0
            && sharers + 1 < self.settings.max_page_sharing
        {
            self.stable.take_dup(best);
            self.stable.push_dup(entry, best);
        }
        Some((entry, best))
    }

    /// Looks for a frame with these bytes.
    pub(crate) fn stable_search<S: PageSpace>(
        &mut self,
        space: &mut S,
        tree: u32,
        (wanted, hash): (Content, u64),
        may_prune: bool,
    ) -> Result<StableFound, S::Error> {
        'from_the_root: loop {
            let mut place = Place::ROOT;
            let mut tied = false;
            let mut at = self.trees[tree as usize].stable.root(hash);
            while at != NIL {
                self.work.tree_nodes += 1;
                let Some((top, node)) = self.pick(at, may_prune) else {
                    continue 'from_the_root;
                };
                let key = self.stable.get(node).hash;
                let content = self.stable.content(node);
                tied |= hash == key;
                let Some(order) = self.order(space, tree, (wanted, hash), (content, key))? else {
                    return Ok(StableFound::Lost);
                };
                let Some(side) = Side::of(order) else {
                    if self.has_room(node) {
                        return Ok(StableFound::Room { top, node });
                    }
                    let spot = Spot::Beside(top);
                    return Ok(StableFound::No { spot, tied });
                };
                place = Place { parent: top, side };
                at = self.stable.child(top, side);
            }
            return Ok(StableFound::No {
                spot: Spot::Vacant(place),
                tied,
            });
        }
    }

    /// Hangs a loose node into its tree by the bytes of its frame, which exists; or has it wait for the
    /// next step, when memory cannot compare now.
    pub(crate) fn place<S: PageSpace>(&mut self, space: &mut S, node: u32) -> Result<(), S::Error> {
        let &StableNode { tree, hash, .. } = self.stable.get(node);
        let found = self.stable_search(space, tree, (self.stable.content(node), hash), false);
        let spot = match &found {
            Ok(StableFound::No { spot, .. }) => *spot,
            Ok(StableFound::Room { top, .. }) => Spot::Beside(*top),
            Ok(StableFound::Lost) | Err(_) => {
                self.waiting.push(node);
                return found.map(|_| ());
            }
        };
        self.link_node(node, spot);
        self.recall(tree, hash);
        Ok(())
    }

    /// Takes new nodes out of their trees, to be placed when memory works again.
    pub(crate) fn have_wait(&mut self, nodes: impl IntoIterator<Item = u32>) {
        for node in nodes {
            self.unlink_tentative(node);
            self.waiting.push(node);
        }
    }

    /// Finds the places of the nodes that wait.
    pub(crate) fn place_waiting<S: PageSpace>(&mut self, space: &mut S) -> Result<(), S::Error> {
        for node in self.waiting.clone() {
            if self.stable.get(node).is_stale() {
                self.remove_node(node);
            }
        }
        if self.settings.tree_order == TreeOrder::Digest {
            let frames: Vec<FrameId> = self.waiting.iter().map(|&node| FrameId(node)).collect();
            let mut digests = vec![Attempt::Refused(Reason::NotTried); frames.len()];
            space.digest_frames(&frames, &mut digests)?;
            for (frame, digest) in frames.iter().zip(digests) {
                if let Attempt::Done(digest) = digest {
                    self.stable.get_mut(frame.0).hash = digest.kept();
                }
            }
        }
        let mut done = Ok(());
        for node in std::mem::take(&mut self.waiting) {
            if done.is_ok() {
                done = self.place(space, node);
            } else {
                self.waiting.push(node);
            }
        }
        done
    }

    /// Hangs a loose node into its tree.
    pub(crate) fn link_node(&mut self, node: u32, spot: Spot) {
        let tree = self.stable.get(node).tree as usize;
        let tree = &mut self.trees[tree].stable;
        let tree = (tree, self.settings.tree_order);
        self.stable.link(tree, spot, node, self.now);
    }

    /// Takes a node whose frame came to nothing out again, as if it had never been in.
    pub(crate) fn unlink_tentative(&mut self, node: u32) {
        let it = *self.stable.get(node);
        let tree = &mut self.trees[it.tree as usize].stable;
        self.stable.unlink(tree, node);
        // As it was before this node made it a chain.
        if it.role == Role::Dup && self.stable.get(it.chain()).len == 1 {
            self.stable.dissolve(tree, it.chain());
        }
    }
}
