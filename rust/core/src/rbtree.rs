//! A red-black tree over the links of records that somebody else keeps.
//!
//! The tree owns nothing and compares nothing: its user walks down from the root, comparing as it
//! likes, and hands in the place where it fell off. That is what the unstable tree needs, whose
//! comparison may lie because pages change while they are in it. Whatever the comparison said, the
//! shape stays a red-black tree, so a walk never takes more than about twice log2 steps.
//!
//! The shape is the textbook's (Cormen, Leiserson, Rivest, Stein), because in content order it can
//! be observed: a search notices the stale nodes that it happens to pass.
//!
//! # Invariants (proved by [`check`])
//! * T1. Every child's parent is the node above it; the root's is [`NIL`].
//! * T2. The root is black, and no red node has a red child.
//! * T3. Each way from a node down to a missing child passes equally many black nodes.
//!
//! # Cost
//! `insert` and `remove` touch O(log n) nodes, `replace` at most four. Nothing is allocated.

use std::cmp::Ordering;

/// No node.
pub const NIL: u32 = u32::MAX;

/// One of a node's two children.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The lesser.
    Left,
    /// The greater.
    Right,
}

use Side::{Left, Right};

impl Side {
    /// The side on which to look for what compares like this with a node; `None` if it is that node.
    #[must_use]
    pub fn of(order: Ordering) -> Option<Self> {
        match order {
            Ordering::Less => Some(Left),
            Ordering::Equal => None,
            Ordering::Greater => Some(Right),
        }
    }

    /// The other one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Left => Right,
            Right => Left,
        }
    }
}

/// The place where a walk fell off the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The node above, or [`NIL`] for an empty tree.
    pub parent: u32,
    /// Which of its children is missing.
    pub side: Side,
}

impl Place {
    /// The only place in an empty tree.
    pub const ROOT: Self = Self {
        parent: NIL,
        side: Left,
    };
}

/// Where the links are kept.
pub trait Links {
    /// A child of `at`, or [`NIL`].
    fn child(&self, at: u32, side: Side) -> u32;
    /// Sets a child of `at`.
    fn set_child(&mut self, at: u32, side: Side, to: u32);
    /// The parent of `at`, or [`NIL`].
    fn parent(&self, at: u32) -> u32;
    /// Sets the parent of `at`.
    fn set_parent(&mut self, at: u32, to: u32);
    /// Whether `at` is red.
    fn is_red(&self, at: u32) -> bool;
    /// Sets the colour of `at`.
    fn set_red(&mut self, at: u32, red: bool);
}

fn red<L: Links>(links: &L, at: u32) -> bool {
    at != NIL && links.is_red(at)
}

fn side_of<L: Links>(links: &L, parent: u32, child: u32) -> Side {
    if links.child(parent, Left) == child {
        Left
    } else {
        Right
    }
}

/// Puts `new` where `old` hung below `parent`.
fn hang<L: Links>(links: &mut L, root: &mut u32, parent: u32, old: u32, new: u32) {
    if parent == NIL {
        *root = new;
    } else {
        let side = side_of(links, parent, old);
        links.set_child(parent, side, new);
    }
    if new != NIL {
        links.set_parent(new, parent);
    }
}

/// Moves `at` one level down to `side`; its child on the other side takes its place.
fn rotate<L: Links>(links: &mut L, root: &mut u32, at: u32, side: Side) {
    let up = links.child(at, side.other());
    let inner = links.child(up, side);
    links.set_child(at, side.other(), inner);
    if inner != NIL {
        links.set_parent(inner, at);
    }
    let parent = links.parent(at);
    hang(links, root, parent, at, up);
    links.set_child(up, side, at);
    links.set_parent(at, up);
}

/// Hangs `node` in at `place`, which a walk from `root` has just found.
pub fn insert<L: Links>(links: &mut L, root: &mut u32, place: Place, node: u32) {
    links.set_child(node, Left, NIL);
    links.set_child(node, Right, NIL);
    links.set_parent(node, place.parent);
    links.set_red(node, true);
    if place.parent == NIL {
        *root = node;
    } else {
        links.set_child(place.parent, place.side, node);
    }

    let mut at = node;
    loop {
        let parent = links.parent(at);
        if !red(links, parent) {
            break;
        }
        // A red parent is not the root, so there is a grandparent.
        let above = links.parent(parent);
        let side = side_of(links, above, parent);
        let uncle = links.child(above, side.other());
        if red(links, uncle) {
            links.set_red(parent, false);
            links.set_red(uncle, false);
            links.set_red(above, true);
            at = above;
            continue;
        }
        let mut outer = parent;
        if links.child(parent, side.other()) == at {
            rotate(links, root, parent, side);
            outer = at;
        }
        links.set_red(outer, false);
        links.set_red(above, true);
        rotate(links, root, above, side.other());
        break;
    }
    links.set_red(*root, false);
}

/// Takes `node` out.
pub fn remove<L: Links>(links: &mut L, root: &mut u32, node: u32) {
    let (left, right) = (links.child(node, Left), links.child(node, Right));
    // `hole` is what moves up into the gap (perhaps nothing), `above` the node that it hangs from.
    let (hole, mut above, lost_black);
    if left == NIL || right == NIL {
        hole = if left == NIL { right } else { left };
        above = links.parent(node);
        lost_black = !links.is_red(node);
        hang(links, root, above, node, hole);
    } else {
        let mut next = right;
        while links.child(next, Left) != NIL {
            next = links.child(next, Left);
        }
        hole = links.child(next, Right);
        lost_black = !links.is_red(next);
        above = links.parent(next);
        if above == node {
            above = next;
        } else {
            hang(links, root, above, next, hole);
            links.set_child(next, Right, right);
            links.set_parent(right, next);
        }
        let parent = links.parent(node);
        hang(links, root, parent, node, next);
        links.set_child(next, Left, left);
        links.set_parent(left, next);
        let colour = links.is_red(node);
        links.set_red(next, colour);
    }
    if lost_black {
        rebalance(links, root, hole, above);
    }
}

/// Restores T3 after the ways through `at` have lost a black node.
fn rebalance<L: Links>(links: &mut L, root: &mut u32, mut at: u32, mut above: u32) {
    while at != *root && !red(links, at) {
        // The ways on the other side have one black node more than ours, so there is a sibling.
        let side = side_of(links, above, at);
        let mut sibling = links.child(above, side.other());
        if red(links, sibling) {
            links.set_red(sibling, false);
            links.set_red(above, true);
            rotate(links, root, above, side);
            sibling = links.child(above, side.other());
        }
        let near = links.child(sibling, side);
        let far = links.child(sibling, side.other());
        if !red(links, near) && !red(links, far) {
            links.set_red(sibling, true);
            at = above;
            above = links.parent(at);
            continue;
        }
        if !red(links, far) {
            links.set_red(near, false);
            links.set_red(sibling, true);
            rotate(links, root, sibling, side.other());
            sibling = near;
        }
        let colour = links.is_red(above);
        links.set_red(sibling, colour);
        links.set_red(above, false);
        let far = links.child(sibling, side.other());
        links.set_red(far, false);
        rotate(links, root, above, side);
        at = *root;
        break;
    }
    if at != NIL {
        links.set_red(at, false);
    }
}

/// Puts `new` into the place and colour of `old`.
pub fn replace<L: Links>(links: &mut L, root: &mut u32, old: u32, new: u32) {
    let parent = links.parent(old);
    hang(links, root, parent, old, new);
    for side in [Left, Right] {
        let child = links.child(old, side);
        links.set_child(new, side, child);
        if child != NIL {
            links.set_parent(child, new);
        }
    }
    let colour = links.is_red(old);
    links.set_red(new, colour);
}

/// The nodes from least to greatest, and proof that they form a red-black tree.
///
/// # Errors
/// Which of T1, T2 and T3 does not hold, and where. A link out of range is the caller's to notice.
pub fn check<L: Links>(links: &L, root: u32) -> Result<Vec<u32>, (&'static str, String)> {
    let mut order = Vec::new();
    if root == NIL {
        return Ok(order);
    }
    if links.parent(root) != NIL {
        return Err(("T1", format!("root {root} has a parent")));
    }
    if links.is_red(root) {
        return Err(("T2", format!("root {root} is red")));
    }
    // Nodes whose left side has been entered, each with the black nodes from the root to it. A loop
    // in the links cannot keep us here: where it is entered, some node has two parents (T1).
    let mut way: Vec<(u32, u32)> = Vec::new();
    let mut blacks_to_bottom = None;
    let (mut at, mut above, mut blacks) = (root, NIL, 0);
    loop {
        while at != NIL {
            if links.parent(at) != above {
                return Err((
                    "T1",
                    format!("node {at} below {above} names another parent"),
                ));
            }
            if links.is_red(at) && red(links, above) {
                return Err(("T2", format!("red node {at} below red node {above}")));
            }
            blacks += u32::from(!links.is_red(at));
            way.push((at, blacks));
            (above, at) = (at, links.child(at, Left));
        }
        if *blacks_to_bottom.get_or_insert(blacks) != blacks {
            return Err(("T3", format!("{blacks} black nodes on the way to {above}")));
        }
        // At a bottom: on to the nearest node above whose right side has not been seen.
        let Some((node, seen)) = way.pop() else {
            return Ok(order);
        };
        order.push(node);
        (above, at, blacks) = (node, links.child(node, Right), seen);
    }
}
