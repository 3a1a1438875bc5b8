//! The red-black tree against `BTreeMap`: any sequence of operations gives the same order, and the tree
//! keeps its invariants after each.

#[path = "support/nodes.rs"]
mod nodes;

use nodes::{Node, Nodes};
use pagemerge_core::rbtree::{self, Links, NIL, Place, Side};
use proptest::prelude::*;
use std::collections::BTreeMap;

impl Nodes {
    fn new_node(&mut self, key: u16) -> u32 {
        // Links as a record's would be that has been used before.
        self.0.push(Node {
            key,
            child: [7, 7],
            parent: 7,
            red: false,
        });
        u32::try_from(self.0.len() - 1).expect("a test is small")
    }

    /// The node with this key, or where it would go.
    fn find(&self, root: u32, key: u16) -> Result<u32, Place> {
        let (mut place, mut at) = (Place::ROOT, root);
        while at != NIL {
            let side = match key.cmp(&self.0[at as usize].key) {
                std::cmp::Ordering::Less => Side::Left,
                std::cmp::Ordering::Greater => Side::Right,
                std::cmp::Ordering::Equal => return Ok(at),
            };
            place = Place { parent: at, side };
            at = self.child(at, side);
        }
        Err(place)
    }

    fn keys(&self, root: u32) -> Vec<u16> {
        let order = rbtree::check(self, root).expect("it is a red-black tree");
        order
            .into_iter()
            .map(|node| self.0[node as usize].key)
            .collect()
    }
}

#[derive(Clone, Debug)]
enum Op {
    Insert(u16),
    Remove(u16),
    Replace(u16),
}

fn op() -> impl Strategy<Value = Op> {
    let key = 0..120_u16;
    prop_oneof![
        4 => key.clone().prop_map(Op::Insert),
        3 => key.clone().prop_map(Op::Remove),
        1 => key.prop_map(Op::Replace),
    ]
}

proptest! {
    #[test]
    fn operations_in_any_sequence_agree_with_btreemap(ops in prop::collection::vec(op(), 1..400)) {
        let (mut nodes, mut root) = (Nodes::default(), NIL);
        let mut model: BTreeMap<u16, u32> = BTreeMap::new();
        for op in ops {
            match op {
                Op::Insert(key) => if let Err(place) = nodes.find(root, key) {
                    let node = nodes.new_node(key);
                    rbtree::insert(&mut nodes, &mut root, place, node);
                    prop_assert_eq!(model.insert(key, node), None);
                }
                Op::Remove(key) => {
                    let found = nodes.find(root, key).ok();
                    prop_assert_eq!(found, model.remove(&key));
                    if let Some(node) = found {
                        rbtree::remove(&mut nodes, &mut root, node);
                    }
                }
                Op::Replace(key) => if let Ok(old) = nodes.find(root, key) {
                    let new = nodes.new_node(key);
                    rbtree::replace(&mut nodes, &mut root, old, new);
                    prop_assert_eq!(model.insert(key, new), Some(old));
                }
            }
            prop_assert_eq!(nodes.keys(root), model.keys().copied().collect::<Vec<_>>());
        }
    }

    /// In the unstable tree the comparison may lie: whatever place a walk ends at, the shape holds.
    #[test]
    fn insertion_at_places_found_by_a_lying_comparison_keeps_the_shape(
        walks in prop::collection::vec(any::<u32>(), 1..300),
    ) {
        let (mut nodes, mut root) = (Nodes::default(), NIL);
        let mut inside = Vec::new();
        for walk in walks {
            if walk % 5 == 0 && !inside.is_empty() {
                let node = inside.swap_remove(walk as usize % inside.len());
                rbtree::remove(&mut nodes, &mut root, node);
            } else {
                let (mut place, mut at, mut lies) = (Place::ROOT, root, walk);
                while at != NIL {
                    let side = if lies & 1 == 0 { Side::Left } else { Side::Right };
                    lies = lies.rotate_right(1);
                    place = Place { parent: at, side };
                    at = nodes.child(at, side);
                }
                let node = nodes.new_node(0);
                rbtree::insert(&mut nodes, &mut root, place, node);
                inside.push(node);
            }
            prop_assert_eq!(rbtree::check(&nodes, root).expect("it is a red-black tree").len(), inside.len());
        }
    }
}

#[test]
fn tree_of_keys_in_ascending_order_has_the_textbooks_shape() {
    let (mut nodes, mut root) = (Nodes::default(), NIL);
    for key in 0..8 {
        let place = nodes.find(root, key).expect_err("the key is new");
        let node = nodes.new_node(key);
        rbtree::insert(&mut nodes, &mut root, place, node);
    }
    let shape = |at: u32| {
        (
            nodes.child(at, Side::Left),
            nodes.child(at, Side::Right),
            nodes.is_red(at),
        )
    };
    assert_eq!(root, 3);
    assert_eq!(shape(3), (1, 5, false));
    assert_eq!(shape(1), (0, 2, true));
    assert_eq!(shape(5), (4, 6, true));
    assert_eq!(shape(6), (NIL, 7, false));
    assert_eq!(shape(7), (NIL, NIL, true));
}

fn three() -> (Nodes, u32) {
    let (mut nodes, mut root) = (Nodes::default(), NIL);
    for key in 0..3 {
        let place = nodes.find(root, key).expect_err("the key is new");
        let node = nodes.new_node(key);
        rbtree::insert(&mut nodes, &mut root, place, node);
    }
    (nodes, root)
}

fn broken(spoil: impl FnOnce(&mut Nodes, u32)) -> &'static str {
    let (mut nodes, root) = three();
    spoil(&mut nodes, root);
    rbtree::check(&nodes, root)
        .expect_err("it has been spoilt")
        .0
}

#[test]
fn check_of_a_spoilt_tree_names_the_invariant() {
    assert_eq!(broken(|nodes, _| nodes.set_parent(0, 2)), "T1");
    assert_eq!(broken(|nodes, root| nodes.set_parent(root, 0)), "T1");
    assert_eq!(broken(|nodes, root| nodes.set_red(root, true)), "T2");
    assert_eq!(broken(|nodes, _| nodes.set_red(0, false)), "T3");
    // A loop is entered at a node with two parents.
    assert_eq!(
        broken(|nodes, root| nodes.set_child(2, Side::Right, root)),
        "T1"
    );
    let (mut nodes, mut root) = three();
    let place = nodes.find(root, 3).expect_err("the key is new");
    let node = nodes.new_node(3);
    rbtree::insert(&mut nodes, &mut root, place, node);
    nodes.set_red(0, true);
    nodes.set_red(2, true);
    assert_eq!(
        rbtree::check(&nodes, root)
            .expect_err("it has been spoilt")
            .0,
        "T2"
    );
}
