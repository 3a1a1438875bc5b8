//! A search tree in many parts: by the highest bits of the key, each part a small red-black tree.
//!
//! In digest order the keys are hashes, so they are spread evenly, and the part is known without a
//! comparison. With some eight nodes to a part, a search passes four of them instead of twenty, each of
//! which would be a cache line from memory. In content order there is one part, the kernel's tree.
//!
//! # Invariants (proved by [`crate::check`])
//! * O1. There are a power of two of parts; a node is in the part that the highest bits of its key name, so
//!   the parts one after the other are in order.
//! * O2. `len` is the number of nodes in all parts.
//!
//! # Cost
//! Four bytes for each part, of which there are at most a quarter as many as there have been nodes at
//! once. A forest that grows takes each part apart once for every doubling.

use crate::TreeOrder;
use crate::rbtree::{self, Links, NIL, Place, Side};

/// Nodes for each part, on average, before there are twice as many parts.
const NODES: usize = 8;

/// Links of nodes that have keys.
pub(crate) trait Keyed: Links {
    /// The key of `at`, which stays what it is while `at` is in a tree.
    fn key(&self, at: u32) -> u64;
}

#[derive(Clone, Debug)]
pub(crate) struct Forest {
    roots: Vec<u32>,
    len: usize,
}

impl Default for Forest {
    fn default() -> Self {
        Self {
            roots: vec![NIL],
            len: 0,
        }
    }
}

impl Forest {
    fn part(&self, key: u64) -> usize {
        let bits = self.roots.len().trailing_zeros();
        // (A shift by all 64 bits would be none.)
        let part = key >> 1 >> (63 - bits);
        usize::try_from(part).expect("there are so many parts")
    }

    /// Where a search for this key begins.
    pub(crate) fn root(&self, key: u64) -> u32 {
        self.roots[self.part(key)]
    }

    /// The roots of all parts, in order.
    pub(crate) fn roots(&self) -> &[u32] {
        &self.roots
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn bytes(&self) -> usize {
        self.roots.capacity() * size_of::<u32>()
    }

    /// Puts a node where a search for its key has come to an end. Where nodes are in the order of their
    /// keys, parts that have become large are divided.
    pub(crate) fn insert<L: Keyed>(
        &mut self,
        links: &mut L,
        order: TreeOrder,
        place: Place,
        node: u32,
    ) {
        let part = self.part(links.key(node));
        rbtree::insert(links, &mut self.roots[part], place, node);
        self.len += 1;
        if order == TreeOrder::Digest && self.len > NODES * self.roots.len() {
            self.grow(links);
        }
    }

    pub(crate) fn remove<L: Keyed>(&mut self, links: &mut L, node: u32) {
        let part = self.part(links.key(node));
        rbtree::remove(links, &mut self.roots[part], node);
        self.len -= 1;
    }

    /// Puts `new`, of the same key, in the place of `old`.
    pub(crate) fn replace<L: Keyed>(&mut self, links: &mut L, old: u32, new: u32) {
        let part = self.part(links.key(old));
        rbtree::replace(links, &mut self.roots[part], old, new);
    }

    /// Forgets all nodes.
    pub(crate) fn clear(&mut self) {
        self.roots.fill(NIL);
        self.len = 0;
    }

    /// Forgets all nodes and how they were divided, for keys of another kind.
    pub(crate) fn begin_anew(&mut self) {
        *self = Self::default();
    }

    /// Divides each part into two.
    fn grow<L: Keyed>(&mut self, links: &mut L) {
        let parts = 2 * self.roots.len();
        let old = std::mem::replace(&mut self.roots, vec![NIL; parts]);
        let (mut nodes, mut above) = (Vec::new(), Vec::new());
        for root in old {
            // In their order, which also nodes of equal keys have.
            let mut at = root;
            loop {
                while at != NIL {
                    above.push(at);
                    at = links.child(at, Side::Left);
                }
                let Some(next) = above.pop() else { break };
                nodes.push(next);
                at = links.child(next, Side::Right);
            }
            let mut last = NIL;
            let mut part = usize::MAX;
            for node in nodes.drain(..) {
                let of = self.part(links.key(node));
                let parent = if of == part { last } else { NIL };
                let side = if parent == NIL {
                    Side::Left
                } else {
                    Side::Right
                };
                // Right of the last one, which has no child there: it is the greatest so far.
                rbtree::insert(links, &mut self.roots[of], Place { parent, side }, node);
                (part, last) = (of, node);
            }
        }
    }
}

/// Goes the ways of searches by key, a step of each at a time: of each, the key, and where it stands.
///
/// What lies on these ways is in no cache, as a rule. One search after the other waits for each step;
/// side by side their waits are one.
pub(crate) fn go_side_by_side<L: Keyed>(links: &L, ways: &mut [(u64, u32)]) {
    let mut steps = true;
    while std::mem::take(&mut steps) {
        for (key, at) in &mut *ways {
            if *at != NIL {
                let side = Side::of(Ord::cmp(key, &links.key(*at)));
                *at = side.map_or(NIL, |side| links.child(*at, side));
                steps |= *at != NIL;
            }
        }
    }
    // So that it is not left out.
    std::hint::black_box(ways);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy, Default)]
    struct Node {
        links: [u32; 3],
        red: bool,
        key: u64,
    }

    #[derive(Default)]
    struct Nodes(Vec<Node>);

    impl Links for Nodes {
        fn child(&self, at: u32, side: Side) -> u32 {
            self.0[at as usize].links[side as usize]
        }
        fn set_child(&mut self, at: u32, side: Side, to: u32) {
            self.0[at as usize].links[side as usize] = to;
        }
        fn parent(&self, at: u32) -> u32 {
            self.0[at as usize].links[2]
        }
        fn set_parent(&mut self, at: u32, to: u32) {
            self.0[at as usize].links[2] = to;
        }
        fn is_red(&self, at: u32) -> bool {
            self.0[at as usize].red
        }
        fn set_red(&mut self, at: u32, red: bool) {
            self.0[at as usize].red = red;
        }
    }

    impl Keyed for Nodes {
        fn key(&self, at: u32) -> u64 {
            self.0[at as usize].key
        }
    }

    fn all(forest: &Forest, nodes: &Nodes) -> Vec<u32> {
        let parts = forest.roots().iter();
        parts
            .flat_map(|&root| rbtree::check(nodes, root).expect("a red-black tree"))
            .collect()
    }

    /// Goal: however keys come and go, nodes are in the order of their keys, equal keys in the order in
    /// which they were put, and each is found from its part's root. Method: a sorted list beside it.
    #[test]
    fn nodes_are_in_order_however_the_forest_grows() {
        let (mut forest, mut nodes) = (Forest::default(), Nodes::default());
        let mut expected: Vec<(u64, u32)> = Vec::new();
        let mut random = 1_u64;
        for round in 0..4000_u32 {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            // Every fifth key is one of few, every seventh at an end of the range.
            let key = match (round % 5, round % 7) {
                (0, _) => u64::from(round / 5 % 3) << 62,
                (_, 0) => u64::MAX - u64::from(round % 2),
                _ => random,
            };
            let node = round;
            nodes.0.push(Node {
                key,
                ..Node::default()
            });
            let (mut place, mut at) = (Place::ROOT, forest.root(key));
            while at != NIL {
                let side = if key < nodes.0[at as usize].key {
                    Side::Left
                } else {
                    Side::Right
                };
                place = Place { parent: at, side };
                at = nodes.child(at, side);
            }
            forest.insert(&mut nodes, TreeOrder::Digest, place, node);
            expected.push((key, node));
            if round % 3 == 0 {
                let (_, gone) = expected.swap_remove(round as usize * 7919 % expected.len());
                forest.remove(&mut nodes, gone);
            }
            if round % 50 == 0 || round > 3990 {
                expected.sort_unstable();
                let order: Vec<u32> = expected.iter().map(|(_, node)| *node).collect();
                assert_eq!(all(&forest, &nodes), order);
                assert_eq!(forest.len(), order.len());
            }
        }
        assert!(forest.roots().len() > 100, "{}", forest.roots().len());
        forest.clear();
        assert!(all(&forest, &nodes).is_empty());
    }
}
