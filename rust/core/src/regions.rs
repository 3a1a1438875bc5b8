//! Regions: the scan list, and which page numbers belong to whom.
//!
//! A region is the kernel's `mm_slot` with one area. Regions form a ring in scan order, which is
//! closed by the place between two scans ([`RING`]). A region that is no longer registered may stay in
//! the ring for a while, until the scan has passed it and dropped its records.
//!
//! # Invariants (proved by [`crate::check`])
//! * G1. Following `next` from [`RING`] visits each region once and comes back; `prev` is its reverse.
//! * G2. Page ranges of regions and free ranges are disjoint and fill the numbers given out so far;
//!   neighbouring free ranges are one.
//! * G3. A region's domain exists, and counts it.
//! * G4. The scanner counts the regions that are not registered any more.
//!
//! # Cost
//! Insertion and removal in the ring are O(1); a region is found by page in O(log regions); page
//! numbers are given out first-fit over the free ranges.
//!
//! # Departures from ksmd
//! A registered region is never dropped for having no pages.

use crate::rmap::CHUNK;
use crate::{PageId, RegionId};
use std::collections::BTreeMap;

/// The place in the ring between the end of one scan and the beginning of the next.
pub(crate) const RING: u32 = u32::MAX;

/// One more than the greatest page number: a whole number of chunks, clear of `NIL`.
#[allow(clippy::cast_possible_truncation)] // 512, which fits.
const PAGE_NUMBERS: u32 = (u32::MAX / CHUNK as u32) * CHUNK as u32;

/// What has become of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    /// To be scanned.
    Registered,
    /// Un-merged; its records wait for the scan to pass. May be registered again until then.
    Unregistered,
    /// Its memory is gone; its records wait for the scan to pass.
    Dead,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Region {
    pub(crate) first: u32,
    pub(crate) pages: u32,
    pub(crate) domain: u32,
    pub(crate) life: Life,
    /// Pages with a record in the kernel's sense.
    pub(crate) items: u32,
    /// Pages attached to a stable node.
    pub(crate) merging: u32,
    /// Pages that the engine has put onto the zero page.
    pub(crate) zero: u32,
    next: u32,
    prev: u32,
}

impl Region {
    pub(crate) fn end(&self) -> u32 {
        self.first + self.pages
    }
}

#[derive(Clone, Debug)]
struct Domain {
    name: String,
    regions: u32,
}

#[derive(Clone, Debug)]
pub(crate) struct Regions {
    slots: Vec<Option<Region>>,
    vacant: Vec<u32>,
    head: u32,
    tail: u32,
    by_page: BTreeMap<u32, u32>,
    free: BTreeMap<u32, u32>,
    end: u32,
    domains: Vec<Option<Domain>>,
    vacant_domains: Vec<u32>,
    domain_by_name: BTreeMap<String, u32>,
}

impl Regions {
    pub(crate) fn new() -> Self {
        Self {
            slots: Vec::new(),
            vacant: Vec::new(),
            head: RING,
            tail: RING,
            by_page: BTreeMap::new(),
            free: BTreeMap::new(),
            end: 0,
            domains: Vec::new(),
            vacant_domains: Vec::new(),
            domain_by_name: BTreeMap::new(),
        }
    }

    /// The region of this number, if there is one.
    pub(crate) fn find(&self, region: RegionId) -> Option<&Region> {
        self.slots.get(region.index())?.as_ref()
    }

    /// The region of this number, which exists.
    pub(crate) fn get(&self, region: RegionId) -> &Region {
        self.find(region)
            .expect("the scanner keeps only ids of regions in the ring")
    }

    pub(crate) fn get_mut(&mut self, region: RegionId) -> &mut Region {
        self.slots[region.index()]
            .as_mut()
            .expect("the scanner keeps only ids of regions in the ring")
    }

    /// The region that a page belongs to.
    pub(crate) fn of(&self, page: PageId) -> RegionId {
        self.of_any(page)
            .expect("records exist for pages of regions only")
    }

    /// The region that a page belongs to, if any.
    pub(crate) fn of_any(&self, page: PageId) -> Option<RegionId> {
        let (_, &region) = self.by_page.range(..=page.0).next_back()?;
        let region = RegionId(region);
        (page.0 < self.get(region).end()).then_some(region)
    }

    pub(crate) fn count(&self) -> usize {
        self.slots.len() - self.vacant.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.head == RING
    }

    /// The region after `at` in the ring; the first one after [`RING`].
    pub(crate) fn after(&self, at: u32) -> u32 {
        if at == RING {
            self.head
        } else {
            self.get(RegionId(at)).next
        }
    }

    /// All regions, in scan order.
    pub(crate) fn in_order(&self) -> Vec<RegionId> {
        let mut order = Vec::with_capacity(self.count());
        let mut at = self.head;
        while at != RING {
            order.push(RegionId(at));
            at = self.after(at);
        }
        order
    }

    /// One more than the greatest page number given out so far.
    pub(crate) fn page_end(&self) -> u32 {
        self.end
    }

    /// Takes a region in, just before `before` in the ring; `None` if page numbers do not suffice.
    pub(crate) fn add(&mut self, pages: u32, domain: &str, before: u32) -> Option<RegionId> {
        let first = self.take_pages(pages)?;
        let domain = self.enter_domain(domain);
        let slot = self.vacant.pop().unwrap_or_else(|| {
            self.slots.push(None);
            crate::rmap::low32(self.slots.len() - 1)
        });
        self.slots[slot as usize] = Some(Region {
            first,
            pages,
            domain,
            life: Life::Registered,
            items: 0,
            merging: 0,
            zero: 0,
            next: RING,
            prev: RING,
        });
        self.by_page.insert(first, slot);
        self.link_before(slot, before);
        Some(RegionId(slot))
    }

    /// Drops a region that has no records left; returns its domain if no other region is in it.
    pub(crate) fn remove(&mut self, region: RegionId) -> Option<u32> {
        self.unlink(region.0);
        let gone = self.slots[region.index()]
            .take()
            .expect("only regions in the ring are removed");
        self.vacant.push(region.0);
        self.by_page.remove(&gone.first);
        self.give_pages(gone.first, gone.pages);
        self.leave_domain(gone.domain)
    }

    /// Moves a region to just after `at` in the ring.
    pub(crate) fn move_after(&mut self, region: RegionId, at: u32) {
        if at == region.0 {
            return;
        }
        self.unlink(region.0);
        let before = self.after(at);
        self.link_before(region.0, before);
    }

    fn link_before(&mut self, region: u32, before: u32) {
        let prev = if before == RING {
            self.tail
        } else {
            self.get(RegionId(before)).prev
        };
        self.set_next(prev, region);
        self.set_prev(before, region);
        let this = self.get_mut(RegionId(region));
        (this.prev, this.next) = (prev, before);
    }

    fn unlink(&mut self, region: u32) {
        let &Region { prev, next, .. } = self.get(RegionId(region));
        self.set_next(prev, next);
        self.set_prev(next, prev);
    }

    fn set_next(&mut self, at: u32, to: u32) {
        if at == RING {
            self.head = to;
        } else {
            self.get_mut(RegionId(at)).next = to;
        }
    }

    fn set_prev(&mut self, at: u32, to: u32) {
        if at == RING {
            self.tail = to;
        } else {
            self.get_mut(RegionId(at)).prev = to;
        }
    }

    fn take_pages(&mut self, pages: u32) -> Option<u32> {
        let fit = self
            .free
            .iter()
            .find(|&(_, &len)| len >= pages)
            .map(|(&at, &len)| (at, len));
        if let Some((at, len)) = fit {
            self.free.remove(&at);
            if len > pages {
                self.free.insert(at + pages, len - pages);
            }
            return Some(at);
        }
        // The last free range may reach up to the end and need only a little more.
        let open = self
            .free
            .last_key_value()
            .filter(|&(&at, &len)| at + len == self.end);
        let first = open.map_or(self.end, |(&at, _)| at);
        let end = first
            .checked_add(pages)
            .filter(|&end| end <= PAGE_NUMBERS)?;
        self.free.remove(&first);
        self.end = end;
        Some(first)
    }

    fn give_pages(&mut self, first: u32, pages: u32) {
        let (mut at, mut len) = (first, pages);
        if let Some((&before, &n)) = self.free.range(..first).next_back()
            && before + n == first
        {
            self.free.remove(&before);
            (at, len) = (before, n + pages);
        }
        if let Some(n) = self.free.remove(&(at + len)) {
            len += n;
        }
        self.free.insert(at, len);
    }

    fn enter_domain(&mut self, name: &str) -> u32 {
        if let Some(&known) = self.domain_by_name.get(name) {
            if let Some(domain) = &mut self.domains[known as usize] {
                domain.regions += 1;
            }
            return known;
        }
        let new = Some(Domain {
            name: name.to_owned(),
            regions: 1,
        });
        let slot = self.vacant_domains.pop().unwrap_or_else(|| {
            self.domains.push(None);
            crate::rmap::low32(self.domains.len() - 1)
        });
        self.domains[slot as usize] = new;
        self.domain_by_name.insert(name.to_owned(), slot);
        slot
    }

    fn leave_domain(&mut self, domain: u32) -> Option<u32> {
        let left = self.domains[domain as usize]
            .as_mut()
            .expect("a region's domain exists");
        left.regions -= 1;
        (left.regions == 0).then_some(domain)
    }

    /// Forgets a domain in which no region is left. Its number will be used again.
    pub(crate) fn drop_domain(&mut self, domain: u32) {
        if let Some(gone) = self.domains[domain as usize].take() {
            debug_assert_eq!(gone.regions, 0, "domain {} is in use", gone.name);
            self.domain_by_name.remove(&gone.name);
            self.vacant_domains.push(domain);
        }
    }

    /// Proves G1 to G3.
    pub(crate) fn check(&self) -> Result<(), (&'static str, String)> {
        let mut seen = 0;
        let (mut at, mut before) = (self.head, RING);
        while at != RING {
            let Some(region) = self.find(RegionId(at)) else {
                return Err((
                    "G1",
                    format!("the ring holds region {at}, which does not exist"),
                ));
            };
            if region.prev != before {
                return Err(("G1", format!("region {at} does not point back to {before}")));
            }
            seen += 1;
            if seen > self.count() {
                return Err(("G1", "the ring does not close".into()));
            }
            (before, at) = (at, region.next);
        }
        if self.tail != before || seen != self.count() {
            return Err((
                "G1",
                format!("{seen} regions in the ring of {}", self.count()),
            ));
        }

        let mut ranges: Vec<(u32, u32, bool)> = self
            .free
            .iter()
            .map(|(&at, &len)| (at, len, true))
            .collect();
        for (slot, region) in self.slots.iter().enumerate() {
            if let Some(region) = region {
                if self.by_page.get(&region.first).map(|&r| r as usize) != Some(slot) {
                    return Err((
                        "G2",
                        format!("region {slot} is not found by its first page"),
                    ));
                }
                ranges.push((region.first, region.pages, false));
            }
        }
        ranges.sort_unstable();
        let (mut end, mut was_free) = (0, false);
        for (at, len, free) in ranges {
            if at != end || len == 0 {
                return Err((
                    "G2",
                    format!("{len} pages from {at} on, after those up to {end}"),
                ));
            }
            if free && was_free {
                return Err(("G2", format!("two free ranges meet at {at}")));
            }
            (end, was_free) = (at + len, free);
        }
        if end != self.end {
            return Err(("G2", format!("page numbers {end} to {} are lost", self.end)));
        }

        for (slot, domain) in self.domains.iter().enumerate() {
            let users = self
                .slots
                .iter()
                .flatten()
                .filter(|r| r.domain as usize == slot)
                .count();
            let counted = domain.as_ref().map_or(0, |d| d.regions as usize);
            if users != counted {
                return Err((
                    "G3",
                    format!("domain {slot} counts {counted} of {users} regions"),
                ));
            }
        }
        Ok(())
    }

    /// Domains in which no region is left.
    pub(crate) fn deserted_domains(&self) -> Vec<u32> {
        let deserted = |domain: &Option<Domain>| domain.as_ref().is_some_and(|d| d.regions == 0);
        (0..)
            .zip(&self.domains)
            .filter(|(_, d)| deserted(d))
            .map(|(n, _)| n)
            .collect()
    }

    pub(crate) fn bytes(&self) -> usize {
        // Tree maps keep their entries in nodes that are at least about half full.
        let entry = 2 * size_of::<(u32, u32)>();
        let names: usize = self.domain_by_name.keys().map(String::len).sum();
        self.slots.capacity() * size_of::<Option<Region>>()
            + (self.vacant.capacity() + self.vacant_domains.capacity()) * size_of::<u32>()
            + (self.by_page.len() + self.free.len()) * entry
            + self.domains.capacity() * size_of::<Option<Domain>>()
            + self.domain_by_name.len() * 2 * size_of::<(String, u32)>()
            + 2 * names
    }
}

#[cfg(test)]
impl Regions {
    /// Breaks a promise, for the tests of [`Regions::check`].
    pub(crate) fn spoil(&mut self, what: &str) {
        match what {
            "back link" => self.slots[1].as_mut().expect("the test has a region").prev = 0,
            "lost region" => (self.head, self.tail) = (RING, RING),
            "lost pages" => self.end += 1,
            "overlap" => self.slots[1].as_mut().expect("the test has a region").pages += 1,
            "split free range" => {
                let (&at, &len) = self.free.iter().next().expect("the test has a free range");
                self.free.insert(at, 1);
                self.free.insert(at + 1, len - 1);
            }
            "uncounted domain" => {
                self.domains[0]
                    .as_mut()
                    .expect("the test has a domain")
                    .regions += 1;
            }
            other => panic!("nobody knows how to spoil {other}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(regions: &Regions, region: RegionId) -> (u32, u32) {
        let it = regions.get(region);
        (it.first, it.end())
    }

    #[test]
    fn page_numbers_given_back_are_joined_and_given_out_again() {
        let mut regions = Regions::new();
        let [a, b, c, d] =
            [10, 20, 30, 40].map(|n| regions.add(n, "", RING).expect("there is room"));
        assert_eq!(pages(&regions, d), (60, 100));
        for region in [a, c, b] {
            regions.remove(region);
            regions.check().expect("free ranges are in order");
        }
        let whole = regions.add(60, "", RING).expect("there is room");
        assert_eq!(pages(&regions, whole), (0, 60));
        regions.remove(d);
        // The last free range reaches the end and grows from there.
        let long = regions.add(50, "", RING).expect("there is room");
        assert_eq!(pages(&regions, long), (60, 110));
        regions.check().expect("all is in order");
    }

    #[test]
    fn page_numbers_used_up_are_refused() {
        let mut regions = Regions::new();
        assert_eq!(regions.add(u32::MAX, "", RING), None);
        assert!(regions.add(PAGE_NUMBERS, "", RING).is_some());
        assert_eq!(regions.add(1, "", RING), None);
        regions.check().expect("all is in order");
    }

    #[test]
    fn region_moved_behind_another_keeps_the_ring_closed() {
        let mut regions = Regions::new();
        let [a, b, c] = [1, 1, 1].map(|n| regions.add(n, "", RING).expect("there is room"));
        regions.move_after(c, a.0);
        assert_eq!(regions.in_order(), [a, c, b]);
        regions.move_after(b, RING);
        assert_eq!(regions.in_order(), [b, a, c]);
        regions.move_after(a, a.0);
        assert_eq!(regions.in_order(), [b, a, c]);
        regions.check().expect("the ring is closed");
    }
}
