//! Walks everything and proves the invariants that the module headers promise.
//!
//! Each check is known to fail when its invariant is broken: the tests below break each in turn.
//!
//! # Cost
//! O(n log n) in records and nodes, and as much memory: for tests, simulation and fuzzing.

use crate::forest::Forest;
use crate::rbtree::{self, Links, NIL};
use crate::regions::{Life, RING};
use crate::rmap::{ATTACHED, BROKEN, EXISTS, HASHED, RECHECK, UNSTABLE, ZERO};
use crate::stable_tree::{Noted, Role, StableNode};
use crate::{Attempt, Content, FrameId, PageId, PageSpace, RegionId, Scanner, TreeOrder};
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use thiserror::Error;

/// A promise that does not hold: a bug in this crate.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("invariant {invariant} is broken: {found}")]
pub struct Broken {
    /// Its name in the module headers.
    pub invariant: &'static str,
    /// What was found instead.
    pub found: String,
}

impl From<(&'static str, String)> for Broken {
    fn from((invariant, found): (&'static str, String)) -> Self {
        Self { invariant, found }
    }
}

type Proof = Result<(), Broken>;

macro_rules! require {
    ($holds:expr, $invariant:literal, $($found:tt)+) => {
        if !$holds {
            return Err(Broken { invariant: $invariant, found: format!($($found)+) });
        }
    };
}

/// Checks everything that can be checked without memory. Holds between two calls of the scanner.
///
/// # Errors
/// The first invariant that does not hold.
///
/// ```
/// use pagemerge_core::{Scanner, Settings, check};
/// let mut scanner = Scanner::new(Settings::default())?;
/// scanner.register(1000, "")?;
/// check::all(&scanner)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn all(scanner: &Scanner) -> Result<(), Broken> {
    scanner.regions.check()?;
    stable_trees(scanner)?;
    sharers(scanner)?;
    notes(scanner)?;
    records(scanner)?;
    unstable_trees(scanner)?;
    counters(scanner)?;
    cursor(scanner)
}

/// Like [`all`], for tests.
///
/// # Panics
/// With the invariant's name and what was found.
pub fn assert_all(scanner: &Scanner) {
    if let Err(broken) = all(scanner) {
        panic!("{broken}");
    }
}

/// Like [`all`], and also that frames are in the order of their bytes (in digest order: where hashes
/// are equal) and that dups are equal. Compares every two neighbours.
///
/// # Errors
/// The outer error is the space's, the inner one the first invariant that does not hold.
pub fn all_with_contents<S: PageSpace>(
    scanner: &Scanner,
    space: &mut S,
) -> Result<Result<(), Broken>, S::Error> {
    if let Err(broken) = all(scanner) {
        return Ok(Err(broken));
    }
    let nodes = &scanner.stable;
    for tree in &scanner.trees {
        let order = in_order(nodes, &tree.stable, |node| nodes.get(node).hash).unwrap_or_default();
        let mut before: Option<u32> = None;
        for entry in order {
            let mut frames = frames_of(scanner, entry)
                .into_iter()
                .filter(|&n| nodes.get(n).frame);
            let Some(first) = frames.next() else { continue };
            for dup in frames {
                let order = compare(space, first, dup)?;
                if order != Some(Ordering::Equal) {
                    let found = format!("dups {first} and {dup} compare as {order:?}");
                    return Ok(Err(Broken {
                        invariant: "S2",
                        found,
                    }));
                }
            }
            if let Some(before) = before {
                let by_hash = nodes.get(before).hash.cmp(&nodes.get(first).hash);
                let order = compare(space, before, first)?;
                let by_bytes = scanner.settings.tree_order == TreeOrder::Content;
                if (by_bytes || by_hash == Ordering::Equal) && order != Some(Ordering::Less) {
                    let found = format!("frames {before} and {first} compare as {order:?}");
                    return Ok(Err(Broken {
                        invariant: "S1",
                        found,
                    }));
                }
            }
            before = Some(first);
        }
    }
    Ok(Ok(()))
}

fn compare<S: PageSpace>(space: &mut S, a: u32, b: u32) -> Result<Option<Ordering>, S::Error> {
    Ok(
        match space.compare(Content::Frame(FrameId(a)), Content::Frame(FrameId(b)))? {
            Attempt::Done(order) => Some(order),
            _ => None,
        },
    )
}

/// The nodes of a tree entry that can have frames: itself, or its dups. Does not trust the links.
fn frames_of(scanner: &Scanner, entry: u32) -> Vec<u32> {
    let nodes = &scanner.stable;
    if nodes.get(entry).role != Role::Chain {
        return vec![entry];
    }
    let mut dups = Vec::new();
    let mut at = nodes.get(entry).head;
    while at != NIL && dups.len() <= nodes.get(entry).len as usize {
        dups.push(at);
        at = nodes.get(at).next_dup();
    }
    dups
}

/// S1 (by hash), S2 (structure), S6, C4.
fn stable_trees(scanner: &Scanner) -> Proof {
    let nodes = &scanner.stable;
    let mut seen = BTreeSet::new();
    let (mut chains, mut dups) = (0, 0);
    for (number, tree) in (0..).zip(&scanner.trees) {
        let order = in_order(nodes, &tree.stable, |node| nodes.get(node).hash)?;
        let mut hash = 0;
        for entry in order {
            let it = nodes.get(entry);
            require!(
                it.tree == number,
                "S1",
                "entry {entry} of tree {number} names {}",
                it.tree
            );
            let ordered = scanner.settings.tree_order == TreeOrder::Content || it.hash >= hash;
            require!(
                ordered,
                "S1",
                "entry {entry} with hash {} after {hash}",
                it.hash
            );
            hash = it.hash;
            let entry_role = matches!(it.role, Role::Plain | Role::Chain);
            require!(entry_role, "S2", "entry {entry} of a tree is {:?}", it.role);
            seen.insert(entry);
            if it.role == Role::Chain {
                chains += 1;
                dups += chain(scanner, entry, &mut seen)?;
            }
        }
    }
    for &node in &scanner.waiting {
        let it = nodes.get(node);
        require!(
            it.role == Role::Loose && seen.insert(node),
            "S6",
            "node {node} waits for a place that it has: {it:?}"
        );
    }
    for (node, it) in nodes.in_use() {
        let settled = !it.is_tentative() && it.pending == 0 && !it.failed;
        require!(settled, "S6", "node {node} is left over: {it:?}");
        require!(
            seen.contains(&node),
            "S6",
            "node {node} is in no tree: {it:?}"
        );
    }
    let (vacant, numbers) = nodes.vacancies();
    require!(
        seen.len() + vacant == numbers,
        "S6",
        "{numbers} nodes, {vacant} vacant, {} in trees",
        seen.len()
    );
    require!(
        nodes.chains == chains,
        "C4",
        "{chains} chains counted as {}",
        nodes.chains
    );
    require!(
        nodes.dups == dups,
        "C4",
        "{dups} dups counted as {}",
        nodes.dups
    );
    Ok(())
}

/// S2, S4 for one chain; returns the number of its dups.
fn chain(scanner: &Scanner, chain: u32, seen: &mut BTreeSet<u32>) -> Result<u64, Broken> {
    let nodes = &scanner.stable;
    let it = nodes.get(chain);
    let mut before = NIL;
    let dups = frames_of(scanner, chain);
    for &dup in &dups {
        let d = nodes.get(dup);
        require!(
            d.role == Role::Dup,
            "S2",
            "chain {chain} holds {dup}, which is {:?}",
            d.role
        );
        let linked = d.chain() == chain && d.prev_dup() == before;
        require!(
            linked,
            "S2",
            "dup {dup} of chain {chain} does not point back"
        );
        let same_key = d.hash == it.hash || scanner.settings.tree_order == TreeOrder::Content;
        require!(
            d.tree == it.tree && same_key,
            "S2",
            "dup {dup} has another key"
        );
        require!(seen.insert(dup), "S2", "dup {dup} is in two places");
        before = dup;
    }
    let counted = it.len as usize;
    require!(
        dups.len() == counted,
        "S4",
        "chain {chain} counts {counted} of {} dups",
        dups.len()
    );
    require!(
        !it.frame && it.mapped == 0,
        "S5",
        "chain {chain} has a frame"
    );
    Ok(dups.len() as u64)
}

/// S3, S4, S5, C1: the list of each node.
fn sharers(scanner: &Scanner) -> Proof {
    let (mut shared, mut sharing) = (0, 0);
    let mut listed = 0;
    let is_node = |it: &StableNode| matches!(it.role, Role::Plain | Role::Dup | Role::Loose);
    for (node, it) in scanner.stable.in_use().filter(|(_, it)| is_node(it)) {
        let (mut len, mut mapped, mut before, mut at) = (0, 0, NIL, it.head);
        while at != NIL && len <= it.len {
            let item = scanner.records.get(PageId(at));
            let linked = item.is(ATTACHED) && item.node() == node && item.prev() == before;
            require!(
                linked,
                "S4",
                "page {at} in the list of node {node} does not point back"
            );
            len += 1;
            mapped += u32::from(item.shows_frame());
            (before, at) = (at, item.next());
        }
        require!(
            len == it.len && len > 0,
            "S4",
            "node {node} counts {} of {len} sharers",
            it.len
        );
        require!(
            mapped == it.mapped,
            "S4",
            "node {node} counts {} of {mapped} mapped",
            it.mapped
        );
        let most = scanner.settings.max_page_sharing;
        require!(
            len <= most,
            "S3",
            "node {node} lists {len} sharers of at most {most}"
        );
        require!(
            it.frame == (mapped > 0),
            "S5",
            "node {node}: {mapped} mapped, frame {}",
            it.frame
        );
        shared += 1;
        sharing += u64::from(len) - 1;
        listed += len as usize;
    }
    let mut attached = 0;
    for_each_record(scanner, |_, item| {
        attached += usize::from(item.is(ATTACHED));
    });
    require!(
        attached == listed,
        "S4",
        "{attached} records attached, {listed} in lists"
    );
    let c = &scanner.counters;
    require!(
        c.shared == shared,
        "C1",
        "pages_shared is {} of {shared}",
        c.shared
    );
    require!(
        c.sharing == sharing,
        "C1",
        "pages_sharing is {} of {sharing}",
        c.sharing
    );
    Ok(())
}

/// S7.
fn notes(scanner: &Scanner) -> Proof {
    let nodes = &scanner.stable;
    let mut noted = 0;
    for (node, it) in nodes.in_use() {
        let to_note = it.what_to_note(scanner.settings.max_page_sharing);
        let right = it.noted == to_note && nodes.is_listed(node);
        require!(
            right,
            "S7",
            "node {node} is not noted as {to_note:?}: {it:?}"
        );
        noted += usize::from(it.noted != Noted::Nothing);
    }
    let listed = nodes.notes();
    require!(listed == noted, "S7", "{listed} notes about {noted} dups");
    for (chain, _) in nodes.in_use().filter(|(_, it)| it.role == Role::Chain) {
        let mut before = None;
        for dup in frames_of(scanner, chain) {
            let here = Some(nodes.get(dup).standing());
            require!(
                before < here,
                "S7",
                "dup {dup} of chain {chain} is out of order"
            );
            before = here;
        }
    }
    Ok(())
}

fn for_each_record(scanner: &Scanner, mut with: impl FnMut(PageId, &crate::rmap::RmapItem)) {
    let mut from = 0;
    while let Some(page) = scanner.records.find(from, scanner.records.end(), u16::MAX) {
        with(page, scanner.records.get(page));
        from = page.0 + 1;
    }
}

/// R1 to R4.
fn records(scanner: &Scanner) -> Proof {
    let mut proof = Ok(());
    for_each_record(scanner, |page, item| {
        let mut demand = |holds: bool, invariant, found: &str| {
            if !holds && proof.is_ok() {
                proof = Err(Broken {
                    invariant,
                    found: format!("{page:?} {found}: {item:?}"),
                });
            }
        };
        let linked = item.only(UNSTABLE | ATTACHED);
        demand(
            linked != UNSTABLE | ATTACHED,
            "R1",
            "is a candidate and a sharer",
        );
        demand(
            linked == 0 || item.is(EXISTS),
            "R1",
            "is linked without a record",
        );
        demand(
            item.only(EXISTS | ZERO) != 0,
            "R1",
            "has neither a record nor a mark",
        );
        demand(
            !item.is(BROKEN) || item.is(ATTACHED),
            "R2",
            "is broken and not attached",
        );
        demand(
            !item.is(RECHECK) || item.is(HASHED),
            "R2",
            "has no hash to recheck",
        );
        demand(
            scanner.regions.of_any(page).is_some(),
            "R3",
            "is in no region",
        );
    });
    proof?;
    let forgotten = scanner.records.forgotten_chunk();
    require!(
        forgotten.is_none(),
        "R4",
        "the chunk from page {forgotten:?} on is empty"
    );
    Ok(())
}

/// O1, O2, T1 to T3. The nodes of a tree, in order.
fn in_order<L: Links>(
    links: &L,
    tree: &Forest,
    key: impl Fn(u32) -> u64,
) -> Result<Vec<u32>, Broken> {
    let parts = tree.roots().len();
    require!(parts.is_power_of_two(), "O1", "{parts} parts");
    let mut order = Vec::new();
    for &root in tree.roots() {
        let part = rbtree::check(links, root)?;
        let stray = part.iter().find(|&&node| tree.root(key(node)) != root);
        require!(stray.is_none(), "O1", "{stray:?} is in another's part");
        order.extend(part);
    }
    let (found, known) = (order.len(), tree.len());
    require!(found == known, "O2", "{found} nodes, {known} known");
    Ok(order)
}

/// U1, U2.
fn unstable_trees(scanner: &Scanner) -> Proof {
    let mut in_trees = BTreeSet::new();
    for (number, tree) in scanner.trees.iter().enumerate() {
        let mut hash = 0;
        for page in in_order(&scanner.records, &tree.unstable, |page| {
            scanner.records.get(PageId(page)).hash()
        })? {
            let item = scanner.records.get(PageId(page));
            require!(in_trees.insert(page), "U1", "page {page} is in two trees");
            require!(
                scanner.in_unstable_tree(PageId(page)),
                "U1",
                "page {page} in tree {number} is not a candidate: {item:?}"
            );
            if scanner.settings.tree_order == TreeOrder::Digest {
                require!(item.is(HASHED), "U2", "candidate {page} has no hash");
                require!(
                    item.hash() >= hash,
                    "U2",
                    "candidate {page} with {} after {hash}",
                    item.hash()
                );
                hash = item.hash();
            }
        }
    }
    let mut candidates = 0;
    for_each_record(scanner, |page, _| {
        candidates += usize::from(scanner.in_unstable_tree(page));
    });
    let found = in_trees.len();
    require!(
        candidates == found,
        "U1",
        "{candidates} candidates, {found} of them in trees"
    );
    Ok(())
}

/// C2, C3.
fn counters(scanner: &Scanner) -> Proof {
    let (mut unshared, mut items, mut zero) = (0, 0, 0);
    let mut by_region: BTreeMap<RegionId, (u32, u32, u32)> = BTreeMap::new();
    for_each_record(scanner, |page, item| {
        let at = by_region.entry(scanner.regions.of(page)).or_default();
        if item.is(UNSTABLE) {
            unshared += 1;
        }
        if item.is(EXISTS) {
            items += 1;
            at.0 += 1;
        }
        if item.is(ATTACHED) {
            at.1 += 1;
        }
        if item.is(ZERO) {
            zero += 1;
            at.2 += 1;
        }
    });
    let c = &scanner.counters;
    require!(
        c.unshared == unshared,
        "C2",
        "pages_unshared is {} of {unshared}",
        c.unshared
    );
    require!(
        c.items == items,
        "C3",
        "rmap_items is {} of {items}",
        c.items
    );
    require!(
        c.zero == zero,
        "C3",
        "ksm_zero_pages is {} of {zero}",
        c.zero
    );
    for region in scanner.regions.in_order() {
        let it = scanner.regions.get(region);
        let counted = (it.items, it.merging, it.zero);
        let real = by_region.get(&region).copied().unwrap_or_default();
        require!(
            counted == real,
            "C3",
            "{region:?} counts {counted:?} of {real:?}"
        );
    }
    Ok(())
}

/// P1 to P4, and the number of lingering regions (G4).
fn cursor(scanner: &Scanner) -> Proof {
    let cursor = &scanner.cursor;
    if cursor.region != RING {
        let region = scanner.regions.find(RegionId(cursor.region));
        let Some(region) = region else {
            return Err((
                "P1",
                format!("region {} is not in the scan list", cursor.region),
            )
                .into());
        };
        let inside = (region.first..=region.end()).contains(&cursor.at);
        require!(
            inside && scanner.in_scan,
            "P1",
            "page {} outside of its region",
            cursor.at
        );
        let (first, rest) = cursor.rest();
        let left = (region.end() - first) as usize;
        require!(
            rest.len() <= left,
            "P2",
            "{} pages looked at of {left}",
            rest.len()
        );
    }
    if let Some((region, page)) = scanner.sweeping {
        let it = scanner.regions.find(RegionId(region));
        let inside = it.is_some_and(|it| (it.first..it.end()).contains(&page));
        require!(
            inside || region == RING,
            "P4",
            "the sweep is to go on at page {page} of region {region}"
        );
        require!(!scanner.in_scan, "P4", "a sweep goes on in mid-scan");
    }
    require!(
        scanner.batch.is_empty(),
        "P3",
        "plans are left: {:?}",
        scanner.batch
    );
    let lingering = scanner
        .regions
        .in_order()
        .iter()
        .filter(|&&region| scanner.regions.get(region).life != Life::Registered)
        .count();
    let counted = scanner.lingering as usize;
    require!(
        lingering == counted,
        "G4",
        "{lingering} regions linger, counted as {counted}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Settings;
    use crate::rmap::ODD_SCAN;
    use crate::toy::{self, World, bytes, ours, plain};

    /// A bit of everything: a chain of two dups, a plain node, candidates, a volatile page, zero
    /// pages, two domains, a free range of page numbers; in digest order.
    fn world() -> World {
        let mut world = World::new(Settings {
            max_page_sharing: 4,
            use_zero_pages: true,
            ..ours()
        });
        let (gone, _) = world.same(50, 20);
        world.same(1, 8);
        world.same(2, 3);
        world.unique(100, 5);
        world.add_to(
            "other",
            &[Some(bytes(1)), Some(toy::ZERO), Some(toy::ZERO), None],
        );
        world.scans(2);
        world
            .scanner
            .unregister(&mut world.toy, gone)
            .expect("nothing is refused");
        world.scan();
        world.check();
        world
    }

    fn broken(spoil: impl FnOnce(&mut Scanner)) -> &'static str {
        let mut world = world();
        spoil(&mut world.scanner);
        all(&world.scanner)
            .expect_err("it has been spoilt")
            .invariant
    }

    fn node_of(scanner: &Scanner, role: Role) -> u32 {
        let (node, _) = scanner
            .stable
            .in_use()
            .find(|(_, it)| it.role == role)
            .expect("the world has one");
        node
    }

    fn page_of(scanner: &Scanner, flags: u16) -> PageId {
        scanner
            .records
            .find(0, scanner.records.end(), flags)
            .expect("the world has one")
    }

    #[test]
    fn check_of_an_untouched_world_finds_nothing() {
        assert_eq!(all(&world().scanner), Ok(()));
    }

    #[test]
    fn check_of_spoilt_regions_names_the_invariant() {
        assert_eq!(broken(|s| s.regions.spoil("back link")), "G1");
        assert_eq!(broken(|s| s.regions.spoil("lost region")), "G1");
        assert_eq!(broken(|s| s.regions.spoil("lost pages")), "G2");
        assert_eq!(broken(|s| s.regions.spoil("overlap")), "G2");
        assert_eq!(broken(|s| s.regions.spoil("split free range")), "G2");
        assert_eq!(broken(|s| s.regions.spoil("uncounted domain")), "G3");
        assert_eq!(broken(|s| s.lingering = 1), "G4");
    }

    #[test]
    fn check_of_spoilt_stable_trees_names_the_invariant() {
        use crate::rbtree::Links;
        let stale_key = |s: &mut Scanner| {
            let (low, high) = {
                let order = in_order(&s.stable, &s.trees[0].stable, |_| 0).expect("it is in order");
                (order[0], order[1])
            };
            s.stable.get_mut(low).hash = s.stable.get(high).hash + 1;
            if s.stable.get(low).role == Role::Chain {
                for dup in frames_of(s, low) {
                    s.stable.get_mut(dup).hash = s.stable.get(low).hash;
                }
            }
        };
        assert_eq!(broken(stale_key), "S1");
        assert_eq!(
            broken(|s| s.stable.set_red(s.trees[0].stable.root(0), true)),
            "T2"
        );
        assert_eq!(
            broken(|s| s.stable.set_parent(s.trees[0].stable.root(0), 0)),
            "T1"
        );
        let plain = |s: &mut Scanner| node_of(s, Role::Plain);
        let dup = |s: &mut Scanner| node_of(s, Role::Dup);
        let chain = |s: &mut Scanner| node_of(s, Role::Chain);
        assert_eq!(
            broken(|s| {
                let n = plain(s);
                s.stable.get_mut(n).tree = 1;
            }),
            "S1"
        );
        assert_eq!(
            broken(|s| {
                let n = plain(s);
                s.stable.get_mut(n).role = Role::Dup;
            }),
            "S2"
        );
        assert_eq!(
            broken(|s| {
                let n = dup(s);
                s.stable.get_mut(n).role = Role::Plain;
            }),
            "S2"
        );
        assert_eq!(
            broken(|s| {
                let n = dup(s);
                s.stable.get_mut(n).hash ^= 1;
            }),
            "S2"
        );
        assert_eq!(
            broken(|s| {
                let n = chain(s);
                s.stable.get_mut(n).len += 1;
            }),
            "S4"
        );
        assert_eq!(
            broken(|s| {
                let n = chain(s);
                s.stable.get_mut(n).frame = true;
            }),
            "S5"
        );
        assert_eq!(
            broken(|s| {
                let n = plain(s);
                s.stable.get_mut(n).stand_in = 3;
            }),
            "S6"
        );
        assert_eq!(
            broken(|s| {
                let n = plain(s);
                s.stable.get_mut(n).pending = 1;
            }),
            "S6"
        );
        assert_eq!(
            broken(|s| {
                let _ = s.stable.new_tentative(0, 1, PageId(0));
            }),
            "S6"
        );
        assert_eq!(
            broken(|s| {
                let n = plain(s);
                s.waiting.push(n);
            }),
            "S6"
        );
        assert_eq!(broken(|s| s.stable.forget_vacancies()), "S6");
        assert_eq!(broken(|s| s.stable.chains += 1), "C4");
        assert_eq!(broken(|s| s.stable.dups -= 1), "C4");
    }

    #[test]
    fn check_of_spoilt_notes_about_dups_names_the_invariant() {
        use crate::stable_tree::StableNodes;
        for other in 1..3 {
            let spoil = |s: &mut Scanner| {
                let node = node_of(s, Role::Dup);
                let all = [Noted::Nothing, Noted::Room, Noted::Stale];
                let it = s.stable.get_mut(node);
                let at = all.iter().position(|noted| *noted == it.noted);
                it.noted = all[(at.expect("one of them") + other) % 3];
            };
            assert_eq!(broken(spoil), "S7", "{other}");
        }
        for spoil in [StableNodes::forget_place, StableNodes::add_note] {
            let spoil = |s: &mut Scanner| {
                let node = node_of(s, Role::Dup);
                spoil(&mut s.stable, node);
            };
            assert_eq!(broken(spoil), "S7");
        }
    }

    #[test]
    fn check_of_spoilt_lists_of_sharers_names_the_invariant() {
        assert_eq!(broken(|s| s.settings.max_page_sharing = 3), "S3");
        let plain = |s: &mut Scanner| node_of(s, Role::Plain);
        assert_eq!(
            broken(|s| {
                let n = plain(s);
                s.stable.get_mut(n).len -= 1;
            }),
            "S4"
        );
        assert_eq!(
            broken(|s| {
                let n = plain(s);
                s.stable.get_mut(n).mapped -= 1;
            }),
            "S4"
        );
        assert_eq!(
            broken(|s| {
                let n = plain(s);
                s.stable.get_mut(n).frame = false;
            }),
            "S5"
        );
        assert_eq!(
            broken(|s| {
                let head = PageId(s.stable.get(node_of(s, Role::Plain)).head);
                s.records.get_mut(head).set_prev(1);
            }),
            "S4"
        );
        assert_eq!(
            broken(|s| {
                let candidate = page_of(s, UNSTABLE);
                s.leave_unstable(candidate);
                s.records.get_mut(candidate).enlist(0, NIL);
            }),
            "S4"
        );
        assert_eq!(broken(|s| s.counters.shared += 1), "C1");
        assert_eq!(broken(|s| s.counters.sharing += 1), "C1");
    }

    #[test]
    fn check_of_spoilt_records_names_the_invariant() {
        let on = |flags: u16, set: u16| {
            broken(|s| {
                let page = page_of(s, flags);
                s.records.get_mut(page).set(set);
            })
        };
        let off = |flags: u16, clear: u16| {
            broken(|s| {
                let page = page_of(s, flags);
                s.records.get_mut(page).clear(clear);
            })
        };
        assert_eq!(on(ATTACHED, UNSTABLE), "R1");
        assert_eq!(off(UNSTABLE, EXISTS), "R1");
        assert_eq!(off(ZERO, ZERO), "C3");
        assert_eq!(on(UNSTABLE, BROKEN), "R2");
        assert_eq!(on(ZERO, RECHECK), "R2");
        // A page of the region that has gone.
        assert_eq!(broken(|s| s.records.get_mut(PageId(3)).set(EXISTS)), "R3");
        assert_eq!(broken(|s| s.records.get_mut(PageId(3)).set(HASHED)), "R1");
    }

    #[test]
    fn check_of_an_empty_chunk_that_nobody_will_free_names_the_invariant() {
        let mut world = world();
        world.unique(1000, 2000);
        let _ = world.scanner.records.get_mut(PageId(1500));
        assert_eq!(
            all(&world.scanner)
                .expect_err("it has been spoilt")
                .invariant,
            "R4"
        );
    }

    #[test]
    fn check_of_spoilt_unstable_trees_names_the_invariant() {
        use crate::rbtree::Links;
        assert_eq!(
            broken(super::super::scanner::Scanner::discard_unstable_trees),
            "U1"
        );
        assert_eq!(
            broken(|s| {
                let page = page_of(s, UNSTABLE);
                s.records.get_mut(page).clear(HASHED);
            }),
            "U2"
        );
        assert_eq!(
            broken(|s| {
                let order =
                    in_order(&s.records, &s.trees[0].unstable, |_| 0).expect("it is in order");
                let last = s.records.get(PageId(order[1])).hash();
                let beyond = last + (1 << 16);
                s.records.get_mut(PageId(order[0])).set_hash(beyond);
            }),
            "U2"
        );
        assert_eq!(
            broken(|s| {
                let root = s.trees[0].unstable.root(0);
                s.records.set_red(root, true);
            }),
            "T2"
        );
        assert_eq!(
            broken(|s| {
                let root = s.trees[0].unstable.root(0);
                s.records.get_mut(PageId(root)).clear(UNSTABLE);
            }),
            "U1"
        );
        // By the kernel's rule, a candidate of an earlier scan is not in the tree.
        let mut world = World::new(plain());
        world.unique(0, 5);
        world.scans(2);
        world.step(3);
        let candidate = page_of(&world.scanner, UNSTABLE);
        let item = world.scanner.records.get_mut(candidate);
        if item.is(ODD_SCAN) {
            item.clear(ODD_SCAN);
        } else {
            item.set(ODD_SCAN);
        }
        assert_eq!(
            all(&world.scanner)
                .expect_err("it has been spoilt")
                .invariant,
            "U1"
        );
    }

    #[test]
    fn check_of_spoilt_counters_names_the_invariant() {
        assert_eq!(broken(|s| s.counters.unshared += 1), "C2");
        assert_eq!(broken(|s| s.counters.items += 1), "C3");
        assert_eq!(broken(|s| s.counters.zero += 1), "C3");
        for spoil in [
            |r: &mut crate::regions::Region| r.items += 1,
            |r: &mut crate::regions::Region| r.merging += 1,
            |r: &mut crate::regions::Region| r.zero += 1,
        ] {
            assert_eq!(
                broken(|s| {
                    let region = s.regions.in_order()[0];
                    spoil(s.regions.get_mut(region));
                }),
                "C3"
            );
        }
    }

    #[test]
    fn check_of_a_spoilt_cursor_names_the_invariant() {
        assert_eq!(broken(|s| s.cursor.region = 77), "P1");
        assert_eq!(
            broken(|s| {
                let region = s.regions.in_order()[0];
                s.enter_region(region.0);
            }),
            "P1"
        );
        let mut world = world();
        world.unique(2000, 20);
        world.scan();
        world.unique(3000, 20);
        while world.scanner.cursor.rest().1.is_empty() {
            world.step(1);
        }
        let at = world.scanner.cursor.at;
        let region = crate::RegionId(world.scanner.cursor.region);
        let first = world.scanner.regions.get(region).first;
        let looked = world.scanner.cursor.rest().1.len();
        world.scanner.regions.get_mut(region).pages = at - first;
        assert!(looked > 0);
        assert_eq!(
            cursor(&world.scanner)
                .expect_err("it has been spoilt")
                .invariant,
            "P2"
        );
        assert_eq!(broken(crate::scan::leave_a_plan), "P3");
        assert_eq!(broken(|s| s.sweeping = Some((77, 0))), "P4");
        let inside = |s: &Scanner| {
            let region = s.regions.in_order()[0];
            Some((region.0, s.regions.get(region).first))
        };
        assert_eq!(
            broken(|s| {
                (s.in_scan, s.sweeping) = (true, inside(s));
            }),
            "P4"
        );
    }

    #[test]
    fn check_with_contents_of_frames_out_of_order_names_the_invariant() {
        let spoilt = |tag| {
            let mut world = world();
            let frame = FrameId(node_of(&world.scanner, Role::Dup));
            world.toy.frames.insert(frame, bytes(tag));
            let proof = all_with_contents(&world.scanner, &mut world.toy);
            proof
                .expect("the toy works")
                .expect_err("it has been spoilt")
                .invariant
        };
        assert_eq!(spoilt(9), "S2");
        let mut world = World::new(plain());
        world.same(1, 2);
        world.same(2, 2);
        world.scans(2);
        let frames: Vec<FrameId> = world.toy.frames.keys().copied().collect();
        let of_first = world.toy.frames[&frames[0]];
        world.toy.frames.insert(frames[1], of_first);
        let proof = all_with_contents(&world.scanner, &mut world.toy).expect("the toy works");
        assert_eq!(proof.expect_err("it has been spoilt").invariant, "S1");
    }
}
