//! Streams: a thread that executes work in order, and captures of that work into graphs.

use crate::driver::code::Code;
use crate::driver::context::{Context, LoadedModule};
use crate::driver::report::Report;
use crate::machine::{self, Cause, Launch};
use crate::memory::OutOfBounds;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

/// Locks a mutex also after a panic: every update under these locks is complete at each step.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One step of a stream or node of a graph. Host pointers are numbers, which makes the step `Send`; the
/// caller of the driver keeps that memory alive until the step is done.
#[derive(Clone)]
pub enum Work {
    Launch {
        launch: Launch,
        module: Arc<LoadedModule>,
    },
    /// A copy to the device from bytes that were read when it was enqueued.
    CopyBytesIn {
        to: u64,
        from: Arc<[u8]>,
    },
    /// A copy to the device that reads the host memory when it executes.
    CopyIn {
        to: u64,
        from: usize,
        bytes: usize,
    },
    CopyOut {
        to: usize,
        from: u64,
        bytes: usize,
    },
    Copy {
        to: u64,
        from: u64,
        bytes: usize,
    },
    Set {
        to: u64,
        byte: u8,
        bytes: usize,
    },
}

impl Work {
    /// Whether this is a launch that may overlap the launch before it.
    fn is_dependent(&self) -> bool {
        matches!(self, Work::Launch { launch, .. } if launch.dependent)
    }
}

#[derive(Default)]
struct Queue {
    work: VecDeque<Work>,
    /// Steps that were ever enqueued, and those of them that are done.
    submitted: u64,
    completed: u64,
    closed: bool,
}

/// A thread that executes steps in order, and its queue.
#[derive(Default)]
pub struct Worker {
    queue: Mutex<Queue>,
    /// Signals new work, completed work and the end.
    changed: Condvar,
    /// The counters of its launches.
    pub report: Mutex<Report>,
}

impl Worker {
    /// Starts the thread.
    ///
    /// # Errors
    /// [`Code::OutOfMemory`] if the system has no more threads.
    pub fn start(context: &Arc<Context>) -> Result<Arc<Worker>, Code> {
        let worker = Arc::new(Worker::default());
        let (here, context) = (worker.clone(), context.clone());
        let builder = thread::Builder::new().name("softgpu stream".to_string());
        lock(&context.workers).push(Arc::downgrade(&worker));
        builder.spawn(move || here.run(&context)).map_err(|_| Code::OutOfMemory)?;
        Ok(worker)
    }

    fn run(&self, context: &Context) {
        loop {
            let mut queue = lock(&self.queue);
            while queue.work.is_empty() && !queue.closed {
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
            let Some(first) = queue.work.pop_front() else { return };
            // Launches that may overlap are executed together.
            let mut chain = vec![first];
            if matches!(chain[0], Work::Launch { .. }) {
                while queue.work.front().is_some_and(Work::is_dependent) {
                    chain.extend(queue.work.pop_front());
                }
            }
            drop(queue);
            if context.error.get().is_none() {
                let executed = catch_unwind(AssertUnwindSafe(|| self.execute(context, &chain)));
                let failed =
                    |_| Err((Code::LaunchFailed, "the software GPU has a bug: it panicked".to_string()));
                if let Err((code, report)) = executed.unwrap_or_else(failed) {
                    context.fail(code, &report);
                }
            }
            lock(&self.queue).completed += chain.len() as u64;
            self.changed.notify_all();
        }
    }

    /// Enqueues steps, which execute in order after all earlier ones.
    pub fn submit(&self, work: impl IntoIterator<Item = Work>) {
        let mut queue = lock(&self.queue);
        let before = queue.work.len();
        queue.work.extend(work);
        queue.submitted += (queue.work.len() - before) as u64;
        self.changed.notify_all();
    }

    /// The number of steps that were enqueued so far.
    pub fn submitted(&self) -> u64 {
        lock(&self.queue).submitted
    }

    /// Whether the first `steps` steps are done.
    pub fn is_done(&self, steps: u64) -> bool {
        lock(&self.queue).completed >= steps
    }

    /// Waits until the first `steps` steps are done.
    pub fn wait(&self, steps: u64) {
        let mut queue = lock(&self.queue);
        while queue.completed < steps {
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits for all steps that were enqueued so far.
    pub fn finish(&self) {
        self.wait(self.submitted());
    }

    /// Executes a step, or a chain of launches. The error is what the context returns from now on, and a report
    /// for the user.
    fn execute(&self, context: &Context, chain: &[Work]) -> Result<(), (Code, String)> {
        let memory = &context.memory;
        let outside = |e: OutOfBounds| (Code::IllegalAddress, format!("a copy or fill in a stream: {e}"));
        match &chain[0] {
            Work::Launch { .. } => {
                let launch = |work: &Work| match work {
                    Work::Launch { launch, .. } => Some(launch.clone()),
                    _ => None,
                };
                let launches: Vec<Launch> = chain.iter().filter_map(launch).collect();
                let options = lock(&context.driver.options).clone();
                let counters = machine::run(&launches, memory, &context.driver.settings.card, &options)
                    .map_err(|fault| (code_of(&fault), fault.to_string()))?;
                for report in [&self.report, &context.driver.report] {
                    lock(report).add(&counters);
                }
                Ok(())
            }
            // SAFETY: the slice has this many bytes.
            Work::CopyBytesIn { to, from } => {
                unsafe { memory.copy_in(*to, from.as_ptr(), from.len()) }.map_err(outside)
            }
            // SAFETY: the caller of the driver vouches for the host memory until the step is done.
            Work::CopyIn { to, from, bytes } => {
                unsafe { memory.copy_in(*to, *from as *const u8, *bytes) }.map_err(outside)
            }
            // SAFETY: as for `CopyIn`.
            Work::CopyOut { to, from, bytes } => {
                unsafe { memory.copy_out(*to as *mut u8, *from, *bytes) }.map_err(outside)
            }
            Work::Copy { to, from, bytes } => memory.copy(*to, *from, *bytes).map_err(outside),
            Work::Set { to, byte, bytes } => memory.set(*to, *byte, *bytes).map_err(outside),
        }
    }

    /// Ends the thread when its work is done.
    pub fn close(&self) {
        lock(&self.queue).closed = true;
        self.changed.notify_all();
    }
}

/// The driver's error for a fault of a kernel.
fn code_of(fault: &machine::Fault) -> Code {
    match fault.cause {
        Cause::OutOfBounds => Code::IllegalAddress,
        Cause::Misaligned => Code::MisalignedAddress,
        Cause::Other => Code::LaunchFailed,
    }
}
