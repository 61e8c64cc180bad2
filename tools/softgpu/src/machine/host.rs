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
    who: Who,
    /// The time of the block's shared memory.
    time: u32,
    /// Whether the host can see it.
    visible: bool,
}

/// The stores of a block.
#[derive(Default)]
pub(super) struct HostStores {
    /// Those that no fence and no releasing store covers yet.
    open: Vec<Store>,
    /// The allocations in which the block has released something.
    released: Vec<u64>,
    pauses: u32,
}

impl HostStores {
    /// Prepares for a block of a launch.
    pub fn begin(&mut self, block: u32) {
        self.open.clear();
        self.released.clear();
        self.pauses = if block == 0 { PAUSES } else { 0 };
    }

    /// Takes a plain store of at most 16 bytes.
    pub fn store(&mut self, to: *mut u8, bytes: &[u8], allocation: u64, who: Who, time: u32) {
        let mut all = [0; 16];
        all[..bytes.len()].copy_from_slice(bytes);
        let count = bytes.len();
        self.open.push(Store { to, bytes: all, count, allocation, who, time, visible: false });
    }

    /// Makes all stores visible, in order with even schedules, in reverse with odd ones.
    pub fn publish(&mut self, schedule: u64) {
        let mut hidden: Vec<&mut Store> = self.open.iter_mut().filter(|store| !store.visible).collect();
        if schedule % 2 == 1 {
            hidden.reverse();
        }
        for store in hidden {
            for (n, byte) in store.bytes[..store.count].iter().enumerate() {
                // SAFETY: the access was checked when it was executed, and the launch holds the memory.
                unsafe { store.to.add(n).write_volatile(*byte) };
            }
            store.visible = true;
            pause(&mut self.pauses, schedule);
        }
    }

    /// A fence of some lanes for the whole system: what they stored, or know of by a barrier, is visible before what they
    /// store later. `ordered` says whether a store of a thread at a time is ordered before the fence.
    pub fn fence(&mut self, schedule: u64, ordered: impl Fn(Who, u32) -> bool) {
        self.publish(schedule);
        let covered = |store: &Store| ordered(store.who, store.time);
        self.released.extend(self.open.iter().filter(|store| covered(store)).map(|store| store.allocation));
        self.released.dedup();
        self.open.retain(|store| !covered(store));
    }

    /// Something in an allocation was released, after [`HostStores::publish`]. `ordered` as for [`HostStores::fence`].
    pub fn release(&mut self, allocation: u64, schedule: u64, ordered: impl Fn(Who, u32) -> bool) {
        self.open.retain(|store| !ordered(store.who, store.time));
        self.released.push(allocation);
        pause(&mut self.pauses, schedule);
    }

    /// The block ends. The error also says which warp it is about, and its instruction.
    ///
    /// # Errors
    /// A host that has seen what was released there may see a store before or after it.
    pub fn end(&mut self, schedule: u64) -> Result<(), (Box<Trouble>, usize, usize)> {
        if let Some(store) = self.open.iter().find(|store| self.released.contains(&store.allocation)) {
            let sentence = "a store to page-locked memory that no fence or release covers: the host, which looks on, may see it \
                            at any time";
            return Err((Trouble::new(sentence).lane(store.who.lane), store.who.warp, store.who.pc));
        }
        self.publish(schedule);
        Ok(())
    }
}

/// Lets the host look.
fn pause(left: &mut u32, schedule: u64) {
    if schedule > 0 && *left > 0 {
        *left -= 1;
        std::thread::sleep(PAUSE);
    }
}
