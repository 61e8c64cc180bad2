//! Plain stores to page-locked memory, as late and in the most awkward order in which a host that looks on may see
//! them: nothing orders them before a fence or a releasing store for the whole system.

use super::fault::Trouble;
use super::shared::Who;
use std::time::Duration;

/// Time between two stores in which the host may look, in schedules other than 0, and how many stores of the first block of
/// a launch are that slow.
const PAUSE: Duration = Duration::from_micros(200);
const PAUSES: u32 = 8;

struct Store {
    to: *mut u8,
    bytes: [u8; 16],
    count: usize,
    /// The start of its allocation.
    allocation: u64,
    warp: usize,
    lane: usize,
    pc: usize,
}

/// The stores of a block.
#[derive(Default)]
pub(super) struct HostStores {
    /// What the host cannot see yet.
    waiting: Vec<Store>,
    /// The allocations in which the block has released something.
    released: Vec<u64>,
    pauses: u32,
}

impl HostStores {
    /// Prepares for a block of a launch.
    pub fn begin(&mut self, block: u32) {
        self.waiting.clear();
        self.released.clear();
        self.pauses = if block == 0 { PAUSES } else { 0 };
    }

    /// Takes a plain store of at most 16 bytes.
    pub fn store(&mut self, to: *mut u8, bytes: &[u8], allocation: u64, who: Who) {
        let mut all = [0; 16];
        all[..bytes.len()].copy_from_slice(bytes);
        let Who { warp, lane, pc } = who;
        self.waiting.push(Store { to, bytes: all, count: bytes.len(), allocation, warp, lane, pc });
    }

    /// Makes all stores visible, in order with even schedules, in reverse with odd ones.
    pub fn publish(&mut self, schedule: u64) {
        if schedule % 2 == 1 {
            self.waiting.reverse();
        }
        for store in std::mem::take(&mut self.waiting) {
            for (n, byte) in store.bytes[..store.count].iter().enumerate() {
                // SAFETY: the access was checked when it was executed, and the launch holds the memory.
                unsafe { store.to.add(n).write_volatile(*byte) };
            }
            self.pause(schedule);
        }
    }

    /// A fence for the whole system: what was stored is visible before what is stored later.
    pub fn fence(&mut self, schedule: u64) {
        self.released.extend(self.waiting.iter().map(|store| store.allocation));
        self.released.dedup();
        self.publish(schedule);
    }

    /// Something in an allocation was released, after [`HostStores::publish`].
    pub fn release(&mut self, allocation: u64, schedule: u64) {
        self.released.push(allocation);
        self.pause(schedule);
    }

    fn pause(&mut self, schedule: u64) {
        if schedule > 0 && self.pauses > 0 {
            self.pauses -= 1;
            std::thread::sleep(PAUSE);
        }
    }

    /// The block ends. The error also says which warp it is about, and its instruction.
    ///
    /// # Errors
    /// A host that has seen what was released there may see a store before or after it.
    pub fn end(&mut self, schedule: u64) -> Result<(), (Box<Trouble>, usize, usize)> {
        let late = self.waiting.iter().find(|store| self.released.contains(&store.allocation));
        if let Some(Store { warp, lane, pc, .. }) = late {
            let sentence = "a store to page-locked memory after all fences: the host, which looks on, may see it at any time";
            return Err((Trouble::new(sentence).lane(*lane), *warp, *pc));
        }
        self.publish(schedule);
        Ok(())
    }
}
