//! The page allocator of the KV cache.
//!
//! A slot keeps its pages after its sequence ends, because the next sequence may share a prefix with it. It
//! loses them when another slot needs them.

/// The pages of a batch, each free or owned by one slot.
pub(super) struct PageAllocator {
    /// Free pages; the last one is allocated next.
    free: Vec<u32>,
    /// Pages of each slot, in order of position.
    owned: Vec<Vec<u32>>,
}

impl PageAllocator {
    /// `pages` pages, all free, and `slots` slots.
    pub fn new(pages: usize, slots: usize) -> PageAllocator {
        PageAllocator { free: (0..pages as u32).rev().collect(), owned: vec![vec![]; slots] }
    }

    /// The pages of `slot`, in order of position.
    pub fn of(&self, slot: usize) -> &[u32] {
        &self.owned[slot]
    }

    /// Pages that are free or owned by an idle slot.
    pub fn available(&self, idle: impl Fn(usize) -> bool) -> usize {
        let reclaimable = self.owned.iter().enumerate().filter(|(slot, _)| idle(*slot));
        self.free.len() + reclaimable.map(|(_, pages)| pages.len()).sum::<usize>()
    }

    /// Makes `slot`, which is idle, own exactly `count` pages. It keeps its first pages and gets free ones.
    /// If too few are free, other idle slots lose all of their pages, the lowest slot first. Returns these
    /// slots; `None` if too few pages are available, and then nothing changes.
    pub fn resize(&mut self, slot: usize, count: usize, idle: impl Fn(usize) -> bool) -> Option<Vec<usize>> {
        if count > self.available(&idle) {
            return None;
        }
        let kept = self.owned[slot].len();
        let mut evicted = vec![];
        for other in (0..self.owned.len()).filter(|&other| other != slot && idle(other)) {
            if kept + self.free.len() >= count {
                break;
            }
            self.free.append(&mut self.owned[other]);
            evicted.push(other);
        }
        let pages = &mut self.owned[slot];
        while pages.len() < count
            && let Some(page) = self.free.pop()
        {
            pages.push(page);
        }
        self.free.extend(pages.drain(count..));
        Some(evicted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resize_keeps_pages_then_takes_free_ones_then_evicts() {
        let mut pages = PageAllocator::new(6, 3);
        let all_idle = |_| true;
        assert_eq!(pages.resize(0, 2, all_idle), Some(vec![]));
        assert_eq!(pages.resize(1, 2, all_idle), Some(vec![]));
        assert_eq!((pages.of(0), pages.of(1)), (&[0, 1][..], &[2, 3][..]));
        // Slot 0 runs, so slot 2 can get the free pages and those of slot 1.
        let idle = |slot| slot != 0;
        assert_eq!(pages.available(idle), 4);
        assert_eq!(pages.resize(2, 5, idle), None);
        assert_eq!(pages.resize(2, 3, idle), Some(vec![1]));
        assert_eq!((pages.of(0), pages.of(1)), (&[0, 1][..], &[][..]));
        assert_eq!(pages.of(2).len(), 3);
        // Shrinking keeps the first pages.
        let first = pages.of(2)[0];
        assert_eq!(pages.resize(2, 1, idle), Some(vec![]));
        assert_eq!(pages.of(2), [first]);
        assert_eq!(pages.available(idle), 4);
        // Every page has one owner or is free.
        let mut all: Vec<u32> = pages.owned.iter().flatten().chain(&pages.free).copied().collect();
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3, 4, 5]);
    }
}
