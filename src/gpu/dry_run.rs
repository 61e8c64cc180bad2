//! A device without memory or kernels. It counts allocations and records graphs. [`crate::gpu::memory`] and
//! [`crate::gpu::graph_listing`] run the real loading and capturing code on it.

use crate::gpu::device::{
    Arg, Buffer, Device, Event, Graph, Kernel, Launch, Memory, Node, Pinned, Properties, check_launch,
};
use crate::{Error, Result};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

/// The device. Allocations succeed without memory, launches are checked but not run, copies and fills do
/// nothing. Downloads and events are errors.
pub struct DryRunDevice {
    properties: Properties,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Purpose and bytes of each allocation since the last [`DryRunDevice::take`].
    allocations: Vec<(String, usize)>,
    /// Address of the next allocation.
    end: u64,
    pinned: usize,
    /// Every kernel that was launched, by name.
    kernels: BTreeMap<&'static str, &'static Kernel>,
    /// The steps of each thread that captures a graph.
    recording: HashMap<ThreadId, Vec<Node>>,
}

struct NoMemory;

impl Memory for NoMemory {}

/// Pageable memory that stands in for page-locked memory.
struct HostMemory {
    _words: Vec<u64>,
}

impl Memory for HostMemory {}

impl DryRunDevice {
    /// A device of compute capability 8.0 on which nothing has been allocated.
    pub fn new() -> DryRunDevice {
        let properties = Properties {
            name: "dry run".to_string(),
            capability: (8, 0),
            multiprocessors: 1,
            memory: u64::MAX,
            l2: 0,
            shared_per_block: u32::MAX,
            driver: 0,
            pci: None,
            overlap: false,
            software: false,
        };
        DryRunDevice { properties, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Purpose and bytes of every allocation since the last call, in order, including freed ones.
    pub fn take(&self) -> Vec<(String, usize)> {
        std::mem::take(&mut self.state().allocations)
    }

    /// Total bytes of [`Device::pinned`] so far.
    pub fn pinned_bytes(&self) -> usize {
        self.state().pinned
    }

    /// Every kernel that was launched or captured, by name.
    pub fn kernels(&self) -> Vec<&'static Kernel> {
        self.state().kernels.values().copied().collect()
    }

    /// Appends a step to the graph if this thread captures one.
    fn record_step(&self, node: Node) {
        if let Some(nodes) = self.state().recording.get_mut(&thread::current().id()) {
            nodes.push(node);
        }
    }
}

impl Default for DryRunDevice {
    fn default() -> DryRunDevice {
        DryRunDevice::new()
    }
}

fn unavailable<T>(what: &str) -> Result<T> {
    Err(Error::Internal(format!("{what} on a dry run, which has no memory and runs no kernels")))
}

impl Device for DryRunDevice {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn allocate(&self, bytes: usize, what: &str) -> Result<Buffer> {
        let mut state = self.state();
        let address = state.end;
        let end = address.checked_add(bytes as u64).and_then(|end| end.checked_next_multiple_of(256));
        state.end = end.ok_or_else(|| {
            Error::Memory(format!("no memory for {what}: {bytes} bytes are more than any device has"))
        })?;
        state.allocations.push((what.to_string(), bytes));
        Ok(Buffer::new(address, bytes, Arc::new(NoMemory)))
    }

    fn pinned(&self, bytes: usize, _what: &str) -> Result<Pinned> {
        self.state().pinned += bytes;
        let mut words = vec![0u64; bytes.div_ceil(8)];
        let host = words.as_mut_ptr().cast();
        Ok(Pinned { host, buffer: Buffer::new(0, bytes, Arc::new(HostMemory { _words: words })) })
    }

    fn memory(&self) -> Result<(u64, u64)> {
        Ok((u64::MAX - self.state().end, u64::MAX))
    }

    fn upload(&self, _to: &Buffer, _bytes: &[u8]) -> Result<()> {
        Ok(())
    }

    fn download(&self, _from: &Buffer, _bytes: &mut [u8]) -> Result<()> {
        unavailable("a download")
    }

    fn copy(&self, to: &Buffer, from: &Buffer) -> Result<()> {
        self.record_step(Node::Copy { to: to.clone(), from: from.clone() });
        Ok(())
    }

    fn fill(&self, to: &Buffer, byte: u8) -> Result<()> {
        self.record_step(Node::Fill { to: to.clone(), byte });
        Ok(())
    }

    fn seal(&self, _constant: &Buffer) {}

    fn launch(&self, kernel: &'static Kernel, grid: [u32; 3], shared: u32, args: &[Arg]) -> Result<()> {
        check_launch(kernel, grid, shared)?;
        self.state().kernels.insert(kernel.name, kernel);
        self.record_step(Node::Launch(Launch { kernel, grid, shared, args: args.to_vec() }));
        Ok(())
    }

    fn capture(&self, record: &mut dyn FnMut() -> Result<()>) -> Result<Graph> {
        let thread = thread::current().id();
        self.state().recording.insert(thread, vec![]);
        let result = record();
        let nodes = self.state().recording.remove(&thread).unwrap_or_default();
        result.map(|()| Graph { nodes, replayable: Box::new(()) })
    }

    fn replay(&self, _graph: &Graph) -> Result<()> {
        Ok(())
    }

    fn record(&self) -> Result<Event> {
        unavailable("an event")
    }

    fn elapsed(&self, _from: &Event, _to: &Event) -> Result<f32> {
        unavailable("a time")
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}
