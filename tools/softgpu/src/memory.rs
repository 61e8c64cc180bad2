//! Global memory: allocations in one 64-bit address space, each with a shadow that says which bytes were
//! written.
//!
//! Addresses of device memory are this module's own numbers, above all host addresses. They are never used
//! twice and lie far apart, so an access past an allocation or after its end finds nothing. Page-locked host
//! memory is at its host address, and host and device see it at once.

use crate::card::Card;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::VecDeque;
use std::fmt;
use std::ptr::copy;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Alignment of every allocation, in bytes.
const ALIGN: usize = 256;
/// The first device address: above every host address of a user process, within the 49 bits of a GPU's
/// address space.
pub const DEVICE_MEMORY: u64 = 1 << 48;
/// Addresses between two allocations that belong to neither, at least, in bytes.
const RED_ZONE: u64 = 1 << 16;
/// How many freed allocations [`Snapshot::describe`] can name.
const REMEMBERED: usize = 1024;

/// What an allocation is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Device memory.
    Device,
    /// Page-locked host memory that the device can access.
    Host,
    /// Variables of a module.
    Module,
}

/// The memory that is left cannot hold an allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfMemory {
    /// Bytes asked for.
    pub requested: usize,
    /// Bytes left on the card.
    pub free: u64,
}

/// The address to free is not the start of an allocation of that kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadFree(pub String);

/// A copy or fill that is not inside one allocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutOfBounds {
    /// The first byte of the range.
    pub address: u64,
    pub bytes: u64,
    /// Where that is.
    pub place: String,
}

impl fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "no memory for {} bytes, {} are free", self.requested, self.free)
    }
}

impl fmt::Display for BadFree {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "not an allocation: {}", self.0)
    }
}

impl fmt::Display for OutOfBounds {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} bytes at {:#x} are out of bounds: {}", self.bytes, self.address, self.place)
    }
}

impl std::error::Error for OutOfMemory {}
impl std::error::Error for BadFree {}
impl std::error::Error for OutOfBounds {}

/// One allocation. Its bytes live as long as this value, also after [`Memory::free`].
pub struct Allocation {
    /// The device address of its first byte.
    pub start: u64,
    pub bytes: usize,
    pub kind: Kind,
    /// What messages call it.
    pub name: String,
    data: Bytes,
    initialised: Bytes,
}

/// Host memory of an allocation. It starts at a multiple of [`ALIGN`], and no other memory is within
/// [`ALIGN`] bytes of its end.
struct Bytes {
    first: *mut u8,
    base: *mut u8,
    layout: Layout,
}

impl Bytes {
    /// Zeros, which take no memory until they are written. `None` if there are no pages left.
    fn new(bytes: usize) -> Option<Bytes> {
        // A small alignment, because the system allocator writes to memory that it aligns more.
        let layout = Layout::from_size_align(bytes.checked_add(2 * ALIGN)?, 16).ok()?;
        // SAFETY: the layout is not empty.
        let base = unsafe { alloc_zeroed(layout) };
        if base.is_null() {
            return None;
        }
        // SAFETY: there are `2 * ALIGN` bytes more than asked for.
        Some(Bytes { first: unsafe { base.add(base.align_offset(ALIGN)) }, base, layout })
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.base, self.layout) };
    }
}

// SAFETY: the pointers are owned, and what they point to is accessed by raw reads and writes, as device
// memory is.
unsafe impl Send for Allocation {}
// SAFETY: as for Send.
unsafe impl Sync for Allocation {}

impl Allocation {
    /// The host address of the first byte.
    pub fn data(&self) -> *mut u8 {
        self.data.first
    }

    /// The shadow: one byte for each byte, 0 while that byte was never written.
    pub fn initialised(&self) -> *mut u8 {
        self.initialised.first
    }

    /// The first address past it.
    fn end(&self) -> u64 {
        self.start + self.bytes as u64
    }
}

/// What is left of a freed allocation.
#[derive(Clone)]
struct Freed {
    start: u64,
    bytes: usize,
    name: Arc<str>,
}

/// Allocations by address, and the last ones that were freed, oldest first.
#[derive(Clone, Default)]
struct Table {
    live: Vec<Arc<Allocation>>,
    freed: VecDeque<Freed>,
}

impl Table {
    fn index(&self, address: u64) -> Option<usize> {
        self.live.partition_point(|allocation| allocation.start <= address).checked_sub(1)
    }

    fn find(&self, address: u64, bytes: u64) -> Option<&Arc<Allocation>> {
        let allocation = &self.live[self.index(address)?];
        let room = allocation.end().checked_sub(address)?;
        (bytes <= room && (room > 0 || allocation.bytes == 0)).then_some(allocation)
    }

    fn describe(&self, address: u64) -> String {
        let inside = |start: u64, bytes: usize| address >= start && address - start < bytes as u64;
        if let Some(freed) = self.freed.iter().rev().find(|freed| inside(freed.start, freed.bytes)) {
            return format!("byte {} of {}, which was freed", address - freed.start, freed.name);
        }
        let before = self.index(address);
        let after = self.live.get(before.map_or(0, |index| index + 1));
        let before = before.map(|index| &self.live[index]);
        let past = before.map(|allocation| address.saturating_sub(allocation.end()));
        let ahead = after.map(|allocation| allocation.start - address);
        match (before, after) {
            (Some(allocation), _) if inside(allocation.start, allocation.bytes) => {
                format!("byte {} of {}", address - allocation.start, allocation.name)
            }
            (Some(allocation), _) if ahead.is_none() || past <= ahead => {
                format!("{} bytes past the end of {}", past.unwrap_or(0), allocation.name)
            }
            (_, Some(allocation)) => format!("{} bytes before {}", ahead.unwrap_or(0), allocation.name),
            _ => "there are no allocations".to_string(),
        }
    }
}

/// The allocations at one moment. They stay accessible while the snapshot lives, even if they are freed
/// meanwhile.
#[derive(Clone)]
pub struct Snapshot(Arc<Table>);

impl Snapshot {
    /// The allocation that holds all `bytes` bytes from `address` on.
    pub fn find(&self, address: u64, bytes: u64) -> Option<&Allocation> {
        self.0.find(address, bytes).map(|allocation| &**allocation)
    }

    /// Where an address is: in which allocation, live or freed, or how far off the nearest one.
    pub fn describe(&self, address: u64) -> String {
        self.0.describe(address)
    }
}

struct State {
    table: Arc<Table>,
    /// The next device address.
    next: u64,
    /// Bytes of device memory in use.
    used: u64,
}

/// The global address space of one GPU.
pub struct Memory {
    state: Mutex<State>,
    total: u64,
}

impl Memory {
    /// The empty memory of a card.
    pub fn new(card: &Card) -> Memory {
        let state = State { table: Arc::default(), next: DEVICE_MEMORY, used: 0 };
        Memory { state: Mutex::new(state), total: card.memory }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Allocates `bytes` bytes, aligned to 256, that count as never written unless they are host memory.
    /// `name` is for messages.
    ///
    /// # Errors
    /// [`OutOfMemory`] if the card has not enough left, or the machine that this runs on.
    pub fn allocate(&self, bytes: usize, kind: Kind, name: &str) -> Result<u64, OutOfMemory> {
        let mut state = self.lock();
        let free = self.total - state.used;
        let full = OutOfMemory { requested: bytes, free };
        let charge = if kind == Kind::Host { 0 } else { bytes as u64 };
        if charge > free {
            return Err(full);
        }
        let (Some(data), Some(initialised)) = (Bytes::new(bytes), Bytes::new(bytes)) else {
            return Err(full);
        };
        let start = if kind == Kind::Host {
            // SAFETY: the shadow has this many bytes. Writes of the host are not seen, so all count as
            // written.
            unsafe { initialised.first.write_bytes(1, bytes) };
            data.first as u64
        } else {
            let start = state.next;
            state.next = (start + bytes as u64 + RED_ZONE).next_multiple_of(RED_ZONE);
            start
        };
        state.used += charge;
        let allocation = Allocation { start, bytes, kind, name: name.to_string(), data, initialised };
        let table = Arc::make_mut(&mut state.table);
        let index = table.live.partition_point(|other| other.start < start);
        table.live.insert(index, Arc::new(allocation));
        // Host memory can come back at an address that was freed before.
        table
            .freed
            .retain(|freed| freed.start + freed.bytes as u64 <= start || freed.start >= start + bytes as u64);
        Ok(start)
    }

    /// Ends an allocation. Its bytes stay until no snapshot holds them.
    ///
    /// # Errors
    /// [`BadFree`] if no allocation starts at `address`.
    pub fn free(&self, address: u64) -> Result<(), BadFree> {
        let mut state = self.lock();
        let index = state.table.index(address).filter(|index| state.table.live[*index].start == address);
        let Some(index) = index else {
            return Err(BadFree(format!("{address:#x} is {}", state.table.describe(address))));
        };
        let table = Arc::make_mut(&mut state.table);
        let allocation = table.live.remove(index);
        if table.freed.len() == REMEMBERED {
            table.freed.pop_front();
        }
        let Allocation { start, bytes, .. } = *allocation;
        table.freed.push_back(Freed { start, bytes, name: allocation.name.as_str().into() });
        if allocation.kind != Kind::Host {
            state.used -= bytes as u64;
        }
        Ok(())
    }

    /// The allocations of now.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot(self.lock().table.clone())
    }

    /// The allocation that holds a range.
    ///
    /// # Errors
    /// [`OutOfBounds`] if there is none.
    pub fn range(&self, address: u64, bytes: u64) -> Result<Arc<Allocation>, OutOfBounds> {
        let table = self.lock().table.clone();
        table.find(address, bytes).cloned().ok_or_else(|| {
            // Name the first byte that is missing.
            let held = table.find(address, 1).map_or(0, |allocation| allocation.end() - address);
            OutOfBounds { address, bytes, place: table.describe(address + held) }
        })
    }

    /// The number of allocations, without those of modules.
    pub fn live(&self) -> usize {
        self.lock().table.live.iter().filter(|allocation| allocation.kind != Kind::Module).count()
    }

    /// Bytes of device memory that are left, and in all.
    pub fn info(&self) -> (u64, u64) {
        (self.total - self.lock().used, self.total)
    }

    /// Writes host bytes.
    ///
    /// # Errors
    /// [`OutOfBounds`].
    ///
    /// # Safety
    /// `from` is valid for reads of `bytes` bytes.
    pub unsafe fn copy_in(&self, to: u64, from: *const u8, bytes: usize) -> Result<(), OutOfBounds> {
        let (allocation, offset) = self.place(to, bytes)?;
        // SAFETY: the range is in the allocation, and the caller vouches for the source.
        unsafe {
            copy(from, allocation.data().add(offset), bytes);
            allocation.initialised().add(offset).write_bytes(1, bytes);
        }
        Ok(())
    }

    /// Reads bytes for the host, whether they were ever written or not.
    ///
    /// # Errors
    /// [`OutOfBounds`].
    ///
    /// # Safety
    /// `to` is valid for writes of `bytes` bytes.
    pub unsafe fn copy_out(&self, to: *mut u8, from: u64, bytes: usize) -> Result<(), OutOfBounds> {
        let (allocation, offset) = self.place(from, bytes)?;
        // SAFETY: the range is in the allocation, and the caller vouches for the destination.
        unsafe { copy(allocation.data().add(offset), to, bytes) };
        Ok(())
    }

    /// Copies bytes on the device, with their shadow.
    ///
    /// # Errors
    /// [`OutOfBounds`].
    pub fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), OutOfBounds> {
        let (source, at) = self.place(from, bytes)?;
        let (target, offset) = self.place(to, bytes)?;
        // SAFETY: both ranges are in their allocations; `copy` allows an overlap.
        unsafe {
            copy(source.data().add(at), target.data().add(offset), bytes);
            copy(source.initialised().add(at), target.initialised().add(offset), bytes);
        }
        Ok(())
    }

    /// Fills bytes.
    ///
    /// # Errors
    /// [`OutOfBounds`].
    pub fn set(&self, to: u64, byte: u8, bytes: usize) -> Result<(), OutOfBounds> {
        let (allocation, offset) = self.place(to, bytes)?;
        // SAFETY: the range is in the allocation.
        unsafe {
            allocation.data().add(offset).write_bytes(byte, bytes);
            allocation.initialised().add(offset).write_bytes(1, bytes);
        }
        Ok(())
    }

    /// The allocation that holds a range, and the offset of the range in it.
    fn place(&self, address: u64, bytes: usize) -> Result<(Arc<Allocation>, usize), OutOfBounds> {
        let allocation = self.range(address, bytes as u64)?;
        let offset = (address - allocation.start) as usize;
        Ok((allocation, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> Memory {
        Memory::new(Card::find("h200").unwrap())
    }

    #[test]
    fn an_address_finds_its_allocation_and_no_byte_beside_it() {
        let memory = memory();
        let one = memory.allocate(100, Kind::Device, "one").unwrap();
        let two = memory.allocate(1, Kind::Module, "two").unwrap();
        assert!(one.is_multiple_of(256) && two.is_multiple_of(256));
        let seen = memory.snapshot();
        assert_eq!(seen.find(one + 96, 4).map(|a| a.start), Some(one));
        assert_eq!(seen.find(two, 1).map(|a| a.start), Some(two));
        for (address, bytes) in [(one + 97, 4), (one + 100, 1), (one - 1, 1), (two, 2), (0, 1), (u64::MAX, 1)]
        {
            assert!(seen.find(address, bytes).is_none(), "{bytes} bytes at {address:#x}");
        }
        assert_eq!(seen.describe(one + 100), "0 bytes past the end of one");
        assert_eq!(seen.describe(two - 8), "8 bytes before two");
        assert_eq!(seen.describe(one + 5), "byte 5 of one");
    }

    #[test]
    fn freed_memory_is_found_by_older_snapshots_only_and_is_named() {
        let memory = memory();
        let address = memory.allocate(64, Kind::Device, "weights").unwrap();
        let before = memory.snapshot();
        memory.free(address).unwrap();
        assert!(before.find(address, 64).is_some());
        let after = memory.snapshot();
        assert!(after.find(address, 1).is_none());
        assert_eq!(after.describe(address + 3), "byte 3 of weights, which was freed");
        let error = memory.free(address).unwrap_err().to_string();
        assert!(error.ends_with("is byte 0 of weights, which was freed"), "{error}");
        assert_ne!(memory.allocate(64, Kind::Device, "other").unwrap(), address);
    }

    #[test]
    fn copies_carry_the_shadow_and_stay_in_bounds() {
        let memory = memory();
        let one = memory.allocate(16, Kind::Device, "one").unwrap();
        let two = memory.allocate(16, Kind::Device, "two").unwrap();
        // SAFETY: the array has 4 bytes.
        unsafe { memory.copy_in(one + 4, [1u8, 2, 3, 4].as_ptr(), 4).unwrap() };
        memory.copy(two, one, 16).unwrap();
        let mut bytes = [9u8; 16];
        // SAFETY: the array has 16 bytes.
        unsafe { memory.copy_out(bytes.as_mut_ptr(), two, 16).unwrap() };
        assert_eq!(bytes[4..8], [1, 2, 3, 4]);
        let copied = memory.range(two, 16).unwrap();
        // SAFETY: the shadow has 16 bytes.
        let shadow = unsafe { std::slice::from_raw_parts(copied.initialised(), 16) };
        assert_eq!(shadow, [[0; 4], [1; 4], [0; 4], [0; 4]].concat());
        let error = memory.set(two + 8, 0, 9).unwrap_err();
        assert_eq!(error.place, "0 bytes past the end of two");
        assert!(memory.copy(one, two + 1, 16).is_err() && memory.copy(one + 1, two, 16).is_err());
    }

    #[test]
    fn host_memory_is_at_its_address_and_counts_as_written() {
        let memory = memory();
        let address = memory.allocate(8, Kind::Host, "ring").unwrap();
        let host = memory.range(address, 8).unwrap();
        assert_eq!(host.data() as u64, address);
        // SAFETY: the shadow has 8 bytes.
        assert_eq!(unsafe { std::slice::from_raw_parts(host.initialised(), 8) }, [1; 8]);
        assert_eq!(memory.info().0, memory.info().1);
    }

    #[test]
    fn a_card_holds_no_more_than_its_memory() {
        let memory = memory();
        let total = memory.info().1;
        let error = memory.allocate(total as usize + 1, Kind::Device, "all").unwrap_err();
        assert_eq!(error, OutOfMemory { requested: total as usize + 1, free: total });
        let address = memory.allocate(1 << 20, Kind::Device, "some").unwrap();
        assert_eq!(memory.info().0, total - (1 << 20));
        memory.free(address).unwrap();
        assert_eq!(memory.info().0, total);
    }
}
