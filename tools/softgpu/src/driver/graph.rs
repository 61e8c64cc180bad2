//! Graphs: work that was captured from a stream and can be launched again and again.

use crate::driver::code::Code;
use crate::driver::context::{Context, Stream};
use crate::driver::stream::{Work, lock};
use std::sync::atomic::Ordering;
use std::thread::{self, ThreadId};

/// How a capture restricts calls that it cannot see, such as allocations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// No thread may make them.
    Global,
    /// The capturing thread may not make them.
    ThreadLocal,
    /// All threads may make them.
    Relaxed,
}

/// A capture in progress.
pub struct Capture {
    mode: Mode,
    owner: ThreadId,
    nodes: Vec<Work>,
    /// A call that was not permitted has spoiled it.
    invalidated: bool,
}

/// Nodes in the order of their stream. A launch that may overlap its predecessor says so itself.
pub struct Graph {
    pub nodes: Vec<Work>,
}

impl Graph {
    /// Checks that the modules of all kernels are still loaded.
    ///
    /// # Errors
    /// [`Code::InvalidHandle`] if one is not.
    pub fn check_modules(&self) -> Result<(), Code> {
        let gone = self.nodes.iter().find_map(|node| match node {
            Work::Launch { launch, module } if module.unloaded.load(Ordering::Acquire) => {
                Some(&launch.kernel.name)
            }
            _ => None,
        });
        match gone {
            Some(name) => {
                eprintln!("softgpu: a graph launches kernel {name}, but its module was unloaded");
                Err(Code::InvalidHandle)
            }
            None => Ok(()),
        }
    }
}

impl Stream {
    /// Enqueues steps, or adds them to the graph that is captured.
    ///
    /// # Errors
    /// [`Code::CaptureInvalidated`].
    pub fn enqueue(&self, work: impl IntoIterator<Item = Work>) -> Result<(), Code> {
        match &mut *lock(&self.capture) {
            Some(capture) if capture.invalidated => return Err(Code::CaptureInvalidated),
            Some(capture) => capture.nodes.extend(work),
            None => self.worker.submit(work),
        }
        Ok(())
    }

    pub fn is_capturing(&self) -> bool {
        lock(&self.capture).is_some()
    }

    /// Refuses a call that cannot be captured, and spoils the capture.
    ///
    /// # Errors
    /// [`Code::CaptureUnsupported`] if the stream is captured.
    pub fn forbid_capture(&self) -> Result<(), Code> {
        match &mut *lock(&self.capture) {
            Some(capture) => {
                capture.invalidated = true;
                Err(Code::CaptureUnsupported)
            }
            None => Ok(()),
        }
    }

    /// Starts a capture.
    ///
    /// # Errors
    /// [`Code::IllegalState`] if one is in progress.
    pub fn begin_capture(&self, mode: Mode) -> Result<(), Code> {
        let mut capture = lock(&self.capture);
        if capture.is_some() {
            return Err(Code::IllegalState);
        }
        *capture =
            Some(Capture { mode, owner: thread::current().id(), nodes: Vec::new(), invalidated: false });
        Ok(())
    }

    /// Ends the capture.
    ///
    /// # Errors
    /// [`Code::IllegalState`] without one, [`Code::CaptureWrongThread`], and [`Code::CaptureInvalidated`],
    /// which ends it too.
    pub fn end_capture(&self) -> Result<Graph, Code> {
        let mut slot = lock(&self.capture);
        let capture = slot.as_ref().ok_or(Code::IllegalState)?;
        if capture.mode != Mode::Relaxed && capture.owner != thread::current().id() {
            return Err(Code::CaptureWrongThread);
        }
        let Some(capture) = slot.take().filter(|capture| !capture.invalidated) else {
            return Err(Code::CaptureInvalidated);
        };
        let mut nodes = capture.nodes;
        // Only the edge between two kernels can be programmatic.
        let mut after_launch = false;
        for node in &mut nodes {
            if let Work::Launch { launch, .. } = node {
                launch.dependent &= after_launch;
            }
            after_launch = matches!(node, Work::Launch { .. });
        }
        Ok(Graph { nodes })
    }
}

impl Context {
    /// Refuses a call that a capture would not see, and spoils the captures that forbid it.
    ///
    /// # Errors
    /// [`Code::CaptureUnsupported`].
    pub fn forbid_unsafe_call(&self) -> Result<(), Code> {
        let mut result = Ok(());
        for stream in self.all_streams() {
            if let Some(capture) = &mut *lock(&stream.capture) {
                let here = capture.owner == thread::current().id();
                if capture.mode == Mode::Global || capture.mode == Mode::ThreadLocal && here {
                    capture.invalidated = true;
                    result = Err(Code::CaptureUnsupported);
                }
            }
        }
        result
    }
}
