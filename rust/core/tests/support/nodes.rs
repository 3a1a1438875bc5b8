//! Nodes of a red-black tree with a key each: for the tests of the tree, and for its fuzz target.

use pagemerge_core::rbtree::{Links, Side};

#[derive(Default)]
pub(crate) struct Nodes(pub(crate) Vec<Node>);

#[derive(Clone, Copy, Default)]
pub(crate) struct Node {
    pub(crate) key: u16,
    pub(crate) child: [u32; 2],
    pub(crate) parent: u32,
    pub(crate) red: bool,
}

impl Links for Nodes {
    fn child(&self, at: u32, side: Side) -> u32 {
        self.0[at as usize].child[side as usize]
    }
    fn set_child(&mut self, at: u32, side: Side, to: u32) {
        self.0[at as usize].child[side as usize] = to;
    }
    fn parent(&self, at: u32) -> u32 {
        self.0[at as usize].parent
    }
    fn set_parent(&mut self, at: u32, to: u32) {
        self.0[at as usize].parent = to;
    }
    fn is_red(&self, at: u32) -> bool {
        self.0[at as usize].red
    }
    fn set_red(&mut self, at: u32, red: bool) {
        self.0[at as usize].red = red;
    }
}
