//! The unstable trees: pages that have been calm and have no twin yet, ordered by content.
//!
//! These pages are writable and change as they like, so the order may be wrong at any time. What
//! follows is a missed match, never a wrong merge, because bytes are compared once more when nobody
//! can write.
//!
//! ksmd throws the whole tree away at each scan; so do we, unless writes are tracked and the order is
//! by digest. Then the key, a hash, is a record's own and stays true until the page is seen written,
//! and so a page that nobody writes to keeps its place from one pass to the next, unexamined.
//!
//! What a kept tree would never find out by itself is brought about by *recalling* candidates: those of
//! one hash leave the tree, and the next pass examines them again.
//! * A frame with their bytes has room again, or has come to its place late.
//! * Two contents of that hash have been told apart. Mostly one of the two has been written since it was
//!   hashed, and the other, or another page, may have been sent the wrong way by it. This is settled when
//!   the next scan begins.
//!
//! A candidate of zeroes is no candidate for good, either: each pass tries the zero page again.
//!
//! # Invariants (proved by [`crate::check`])
//! * U1. The nodes of the trees are exactly the `UNSTABLE` records inserted in the running scan; all
//!   `UNSTABLE` records where the tree is kept.
//! * U2. In digest order, nodes are in the order of their hashes, and are `HASHED`.
//!
//! # Cost
//! As for the stable tree. Throwing away is O(trees): records keep their flags until visited.
//!
//! # Departures from ksmd
//! Pages shared by a fork are not met here: the memory side reports them as not eligible.

use crate::forest::Keyed;
use crate::rbtree::{Links, NIL, Place, Side};
use crate::regions::Life;
use crate::rmap::{HASHED, ODD_SCAN, UNSTABLE};
use crate::scanner::Scanner;
use crate::{Content, PageId, PageSpace};

/// Clashes remembered one by one. A writer who rewrites each page between its hashing and its
/// comparison could make as many as there are pages; beyond this, all candidates are recalled.
const CLASHES: usize = 1 << 16;

/// How a search in an unstable tree ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UnstableFound {
    /// A page with the same bytes.
    Partner(PageId),
    /// None, and the page is in the tree from now on.
    Inserted,
    /// A page could not be compared; the page is in no tree.
    Lost,
}

impl Scanner {
    /// Looks for a page with the bytes of `page`, or else makes `page` a candidate.
    pub(crate) fn unstable_search_or_insert<S: PageSpace>(
        &mut self,
        space: &mut S,
        tree: u32,
        page: PageId,
        hash: u64,
    ) -> Result<UnstableFound, S::Error> {
        let this = (Content::Page(page), hash);
        let mut place = Place::ROOT;
        let mut at = self.trees[tree as usize].unstable.root(hash);
        while at != NIL {
            let other = PageId(at);
            self.work.tree_nodes += 1;
            if self.lingering > 0
                && self.regions.get(self.regions.of(other)).life != Life::Registered
            {
                return Ok(UnstableFound::Lost);
            }
            let key = self.records.get(other).hash();
            let Some(order) = self.order(space, tree, this, (Content::Page(other), key))? else {
                return Ok(UnstableFound::Lost);
            };
            let Some(side) = Side::of(order) else {
                return Ok(UnstableFound::Partner(other));
            };
            place = Place { parent: at, side };
            at = self.records.child(at, side);
        }
        let forest = &mut self.trees[tree as usize].unstable;
        let order = self.settings.tree_order;
        forest.insert(&mut self.records, order, place, page.0);
        let odd = self.seq % 2 == 1;
        let item = self.records.get_mut(page);
        item.set(UNSTABLE);
        if odd {
            item.set(ODD_SCAN);
        } else {
            item.clear(ODD_SCAN);
        }
        self.counters.unshared += 1;
        Ok(UnstableFound::Inserted)
    }

    /// Whether an `UNSTABLE` record is a node of a tree, not left over from a tree thrown away.
    pub(crate) fn in_unstable_tree(&self, page: PageId) -> bool {
        let item = self.records.get(page);
        item.is(UNSTABLE)
            && (self.settings.keeps_unstable() || item.is(ODD_SCAN) == (self.seq % 2 == 1))
    }

    /// Takes a page out of the unstable tree, or only its flags if that tree is history.
    pub(crate) fn leave_unstable(&mut self, page: PageId) {
        if self.in_unstable_tree(page) {
            let tree = self.unstable_tree_of(page);
            let forest = &mut self.trees[tree].unstable;
            forest.remove(&mut self.records, page.0);
        }
        self.records.get_mut(page).clear(UNSTABLE | ODD_SCAN);
        self.counters.unshared -= 1;
    }

    /// Takes all candidates with this hash out of a tree that is kept. Their hashes stay as they are.
    pub(crate) fn recall(&mut self, tree: u32, hash: u64) {
        if !self.settings.keeps_unstable() {
            return;
        }
        let mut at = self.trees[tree as usize].unstable.root(hash);
        while at != NIL {
            self.work.tree_nodes += 1;
            at = if let Some(side) = Side::of(hash.cmp(&self.records.key(at))) {
                self.records.child(at, side)
            } else {
                self.leave_unstable(PageId(at));
                self.trees[tree as usize].unstable.root(hash)
            };
        }
    }

    /// Takes note that two contents with this hash have been told apart.
    pub(crate) fn clash(&mut self, tree: u32, hash: u64) {
        if self.clashes.len() < CLASHES {
            self.clashes.insert((tree, hash));
        } else {
            self.many_clashes = true;
        }
    }

    /// Recalls those candidates that may be in a wrong place: see the module header.
    pub(crate) fn recall_clashes(&mut self) {
        let clashes = std::mem::take(&mut self.clashes);
        if std::mem::take(&mut self.many_clashes) {
            return self.recall_all();
        }
        for (tree, hash) in clashes {
            self.recall(tree, hash);
        }
    }

    /// Takes all candidates out of trees that are kept. Their hashes stay as they are.
    fn recall_all(&mut self) {
        self.discard_unstable_trees();
        let (mut from, end) = (0, self.records.end());
        while let Some(page) = self.records.find(from, end, UNSTABLE) {
            self.records.get_mut(page).clear(UNSTABLE | ODD_SCAN);
            from = page.0 + 1;
        }
        self.counters.unshared = 0;
    }

    /// Which tree holds a page: the one of its domain that has the same root. A record has no room
    /// for the NUMA node.
    fn unstable_tree_of(&self, page: PageId) -> usize {
        let domain = self.regions.get(self.regions.of(page)).domain;
        let mut in_domain = self.tree_of.range((domain, 0)..=(domain, u16::MAX));
        if self.settings.merge_across_nodes {
            let (_, &tree) = in_domain.next().expect("a page in a tree has a tree");
            return tree as usize;
        }
        let (mut root, hash) = (page.0, self.records.get(page).hash());
        while self.records.parent(root) != NIL {
            root = self.records.parent(root);
        }
        let (_, &tree) = in_domain
            .find(|&(_, &tree)| self.trees[tree as usize].unstable.root(hash) == root)
            .expect("a page in a tree leads up to that tree's root");
        tree as usize
    }

    /// Throws the trees away. Records keep their flags, and count as unshared, until visited.
    pub(crate) fn discard_unstable_trees(&mut self) {
        for tree in &mut self.trees {
            tree.unstable.clear();
        }
    }

    /// Makes every candidate an ordinary page, for a change of the ways of the trees or of knowing
    /// what was written.
    pub(crate) fn disband_unstable_trees(&mut self) {
        self.discard_unstable_trees();
        let mut from = 0;
        while let Some(page) = self
            .records
            .find(from, self.records.end(), UNSTABLE | HASHED)
        {
            self.records.get_mut(page).clear(UNSTABLE | ODD_SCAN);
            self.doubt_hash(page);
            from = page.0 + 1;
        }
        self.counters.unshared = 0;
    }
}
