//! The red-black tree against an ordered list. After each operation the tree's own check must hold, the
//! order must be the list's, and a walk must be no longer than a red-black tree allows.

#[path = "../../rust/core/tests/support/nodes.rs"]
mod nodes;

use arbitrary::{Arbitrary, Unstructured};
use nodes::{Node, Nodes};
use pagemerge_core::rbtree::{self, Links, NIL, Place, Side};

/// Keys and numbers: so many nodes are plenty to meet every case of rebalancing.
const NODES: u8 = 64;

#[derive(Arbitrary, Debug)]
enum Op {
    /// Hang a node in at its key's place, unless it is there. A key that is there already goes right
    /// or left of its equals.
    Insert { node: u8, key: u8, after: bool },
    /// Take one out.
    Remove { node: u8 },
    /// Put a node that is outside into the place of one that is inside.
    Replace { old: u8, new: u8 },
}

impl Nodes {
    /// Where `key` belongs, and how many nodes the walk passed.
    fn place(&self, root: u32, key: u16, after: bool) -> (Place, usize) {
        let (mut place, mut at, mut passed) = (Place::ROOT, root, 0);
        while at != NIL {
            let other = self.0[at as usize].key;
            let side = if key < other || (key == other && !after) {
                Side::Left
            } else {
                Side::Right
            };
            place = Place { parent: at, side };
            at = self.child(at, side);
            passed += 1;
        }
        (place, passed)
    }
}

/// Runs the operations that `input` describes.
///
/// # Panics
/// When the tree is not what the list says.
pub fn run(input: &[u8]) {
    let mut input = Unstructured::new(input);
    let mut tree = Nodes(vec![Node::default(); usize::from(NODES)]);
    let mut root = NIL;
    // The nodes in order: what the tree must be. Each is found by looking at all of them.
    let mut list: Vec<u32> = Vec::new();
    // (What is asked of an empty input is a zero, not an error.)
    while !input.is_empty()
        && let Ok(op) = Op::arbitrary(&mut input)
    {
        match op {
            Op::Insert { node, key, after } => {
                let (node, key) = (u32::from(node % NODES), u16::from(key));
                if list.contains(&node) {
                    continue;
                }
                let (place, passed) = tree.place(root, key, after);
                let most = 2 * (list.len() + 1).next_power_of_two().ilog2() + 2;
                assert!(
                    passed <= most as usize,
                    "{passed} steps for {} nodes",
                    list.len()
                );
                tree.0[node as usize].key = key;
                rbtree::insert(&mut tree, &mut root, place, node);
                let before = |other: &u32| {
                    let other = tree.0[*other as usize].key;
                    other < key || (other == key && after)
                };
                list.insert(list.iter().take_while(|other| before(other)).count(), node);
            }
            Op::Remove { node } => {
                let node = u32::from(node % NODES);
                if let Some(at) = list.iter().position(|&other| other == node) {
                    rbtree::remove(&mut tree, &mut root, node);
                    list.remove(at);
                }
            }
            Op::Replace { old, new } => {
                let (old, new) = (u32::from(old % NODES), u32::from(new % NODES));
                if let Some(at) = list.iter().position(|&other| other == old)
                    && !list.contains(&new)
                {
                    tree.0[new as usize].key = tree.0[old as usize].key;
                    rbtree::replace(&mut tree, &mut root, old, new);
                    list[at] = new;
                }
            }
        }
        assert_eq!(rbtree::check(&tree, root), Ok(list.clone()));
        assert!(black_height(&tree, root).is_some(), "not a red-black tree");
    }
}

/// The number of black nodes on each way down, if it is one number and no red node has a red child:
/// said again in the shortest words, so as not to rely on the tree's own check.
fn black_height(tree: &Nodes, at: u32) -> Option<u32> {
    if at == NIL {
        return Some(0);
    }
    let below = [Side::Left, Side::Right].map(|side| tree.child(at, side));
    let red = |node: u32| node != NIL && tree.is_red(node);
    if red(at) && below.into_iter().any(red) {
        return None;
    }
    let [left, right] = below.map(|child| black_height(tree, child));
    (left? == right?).then_some(left? + u32::from(!red(at)))
}
