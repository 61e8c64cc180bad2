//! The state of the driver: settings, the primary context, and the objects behind handles.
//!
//! A handle is a number that is never used twice and is looked up in a table of its kind, so a null, stale or
//! foreign handle is an error and never an access. Objects belong to the context, and end with it.

use crate::driver::code::Code;
use crate::driver::graph::{Capture, Graph};
use crate::driver::report::Report;
use crate::driver::stream::{Worker, lock};
use crate::machine::Options;
use crate::memory::Memory;
use crate::ptx::Kernel;
use crate::settings::Settings;
use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

/// What C calls a `CUcontext`, `CUstream` and so on. Null is no object.
pub type Handle = usize;

fn new_handle() -> Handle {
    // Aligned as a pointer would be, and far from the special stream handles 1 and 2.
    static NEXT: AtomicUsize = AtomicUsize::new(0x1000);
    NEXT.fetch_add(16, Ordering::Relaxed)
}

/// The objects of one kind, by handle.
pub struct Table<T>(Mutex<HashMap<Handle, Arc<T>>>);

impl<T> Default for Table<T> {
    fn default() -> Self {
        Table(Mutex::default())
    }
}

impl<T> Table<T> {
    pub fn insert(&self, object: T) -> Handle {
        let handle = new_handle();
        lock(&self.0).insert(handle, Arc::new(object));
        handle
    }

    /// The object, or `otherwise` if the handle is null, stale or of another kind.
    pub fn get(&self, handle: Handle, otherwise: Code) -> Result<Arc<T>, Code> {
        lock(&self.0).get(&handle).cloned().ok_or(otherwise)
    }

    /// Takes the object out, as [`Table::get`].
    pub fn remove(&self, handle: Handle, otherwise: Code) -> Result<Arc<T>, Code> {
        lock(&self.0).remove(&handle).ok_or(otherwise)
    }

    /// All objects.
    pub fn all(&self) -> Vec<Arc<T>> {
        lock(&self.0).values().cloned().collect()
    }

    fn len(&self) -> usize {
        lock(&self.0).len()
    }

    fn clear(&self) {
        lock(&self.0).clear();
    }
}

/// A stream: the worker that executes it, and the graph that is captured from it.
pub struct Stream {
    pub worker: Arc<Worker>,
    /// Whether the worker also executes the null stream.
    pub shared: bool,
    pub capture: Mutex<Option<Capture>>,
}

/// A module that was loaded. Its variables are freed when it is unloaded.
pub struct LoadedModule {
    pub module: crate::ptx::Module,
    pub unloaded: AtomicBool,
    /// Handles of functions that were asked for, by name.
    pub functions: Mutex<HashMap<String, Handle>>,
}

/// A kernel of a module.
pub struct Function {
    pub kernel: Arc<Kernel>,
    pub module: Arc<LoadedModule>,
    /// Dynamic shared memory of a block at most, in bytes.
    pub max_dynamic_shared: AtomicU32,
    pub carveout: AtomicI32,
}

/// What an event waits for.
#[derive(Clone)]
pub enum Recorded {
    Never,
    /// The first `steps` steps of a stream.
    After {
        worker: Arc<Worker>,
        steps: u64,
    },
    InCapture,
}

/// An event.
pub struct Event {
    pub timed: bool,
    pub recorded: Mutex<Recorded>,
}

/// What a program must release. Modules may stay until their context ends.
const OBJECTS: [&str; 5] = ["allocations", "streams", "graphs", "executables", "events"];

/// The primary context of a GPU.
pub struct Context {
    pub handle: Handle,
    pub driver: &'static Driver,
    pub memory: Memory,
    /// The error of a kernel or copy. Every later call returns it.
    pub error: OnceLock<Code>,
    pub streams: Table<Stream>,
    pub modules: Table<LoadedModule>,
    pub functions: Table<Function>,
    pub graphs: Table<Graph>,
    pub executables: Table<Graph>,
    pub events: Table<Event>,
    /// The null stream, which also executes all streams that synchronize with it.
    default_stream: Mutex<Option<Arc<Stream>>>,
    /// The threads of all streams, also of destroyed ones that have work left.
    pub workers: Mutex<Vec<Weak<Worker>>>,
    /// The number of allocations that were asked for.
    pub allocations: AtomicU64,
}

impl Context {
    fn new(driver: &'static Driver) -> Context {
        Context {
            handle: new_handle(),
            driver,
            memory: Memory::new(&driver.settings.card),
            error: OnceLock::new(),
            streams: Table::default(),
            modules: Table::default(),
            functions: Table::default(),
            graphs: Table::default(),
            executables: Table::default(),
            events: Table::default(),
            default_stream: Mutex::default(),
            workers: Mutex::default(),
            allocations: AtomicU64::new(0),
        }
    }

    /// Puts the context into the state of an error and prints `report`. Only the first error counts.
    pub fn fail(&self, code: Code, report: &str) {
        // The report is out before any call returns the error.
        let mut fault = lock(&self.driver.fault);
        if self.error.get().is_none() {
            eprintln!("softgpu: {report}");
            *fault = report.to_string();
            let _ = self.error.set(code);
        }
    }

    /// The error of an earlier kernel or copy, if there was one.
    pub fn check(&self) -> Result<(), Code> {
        self.error.get().map_or(Ok(()), |code| Err(*code))
    }

    /// The stream of a handle. Null and 1 mean the null stream.
    pub fn stream(self: &Arc<Self>, handle: Handle) -> Result<Arc<Stream>, Code> {
        if handle > 1 {
            return self.streams.get(handle, Code::InvalidHandle);
        }
        let mut default = lock(&self.default_stream);
        if let Some(stream) = &*default {
            return Ok(stream.clone());
        }
        let stream =
            Arc::new(Stream { worker: Worker::start(self)?, shared: true, capture: Mutex::default() });
        Ok(default.insert(stream).clone())
    }

    fn live_workers(&self) -> Vec<Arc<Worker>> {
        let mut workers = lock(&self.workers);
        workers.retain(|worker| worker.strong_count() > 0);
        workers.iter().filter_map(Weak::upgrade).collect()
    }

    /// Waits for all work of all streams.
    pub fn finish(&self) {
        for worker in self.live_workers() {
            worker.finish();
        }
    }

    /// All streams, with the null stream.
    pub fn all_streams(&self) -> Vec<Arc<Stream>> {
        let mut streams = self.streams.all();
        streams.extend(lock(&self.default_stream).clone());
        streams
    }

    /// The objects that a program has created and not destroyed, in the order of [`OBJECTS`].
    fn alive(&self) -> [usize; OBJECTS.len()] {
        let Context { memory, streams, graphs, executables, events, .. } = self;
        [memory.live(), streams.len(), graphs.len(), executables.len(), events.len()]
    }

    /// Waits for all work and ends the context: its threads, handles and memory.
    fn destroy(&self) {
        self.finish();
        for worker in self.live_workers() {
            worker.close();
        }
        // Objects hold each other; without this nothing would ever be freed.
        self.streams.clear();
        self.functions.clear();
        self.modules.clear();
        self.graphs.clear();
        self.executables.clear();
        self.events.clear();
        lock(&self.default_stream).take();
    }
}

/// The driver of a process.
pub struct Driver {
    pub settings: Settings,
    /// How kernels are executed from now on.
    pub options: Mutex<Options>,
    pub report: Mutex<Report>,
    /// The report of the last fault, empty if there was none.
    pub fault: Mutex<String>,
    initialized: AtomicBool,
    /// The number of GPUs.
    devices: AtomicI32,
    /// The primary contexts by GPU, and how often each is retained.
    primary: Mutex<BTreeMap<i32, (Arc<Context>, u32)>>,
    /// Objects that ended with their context, in the order of [`OBJECTS`].
    abandoned: Mutex<[usize; OBJECTS.len()]>,
    /// Calls of the function that the settings let fail.
    calls: AtomicU64,
}

thread_local! {
    /// The context that is current on this thread.
    static CURRENT: Cell<Handle> = const { Cell::new(0) };
}

impl Driver {
    /// The driver of this process.
    ///
    /// # Errors
    /// [`Code::InvalidValue`] if an environment variable has no meaning, which is printed once.
    pub fn get() -> Result<&'static Driver, Code> {
        static DRIVER: OnceLock<Option<Driver>> = OnceLock::new();
        let driver = DRIVER.get_or_init(|| match Settings::from_env() {
            Ok(settings) => Some(Driver {
                options: Mutex::new(settings.options.clone()),
                devices: AtomicI32::new(settings.devices),
                settings,
                report: Mutex::default(),
                fault: Mutex::default(),
                initialized: AtomicBool::new(false),
                primary: Mutex::default(),
                abandoned: Mutex::default(),
                calls: AtomicU64::new(0),
            }),
            Err(sentence) => {
                eprintln!("softgpu: {sentence}");
                None
            }
        });
        driver.as_ref().ok_or(Code::InvalidValue)
    }

    /// The driver, once `cuInit` has succeeded.
    pub fn initialized() -> Result<&'static Driver, Code> {
        let driver = Driver::get()?;
        if driver.initialized.load(Ordering::Acquire) { Ok(driver) } else { Err(Code::NotInitialized) }
    }

    /// Initializes the driver. Returns whether this is the first time.
    pub fn initialize(&self) -> Result<bool, Code> {
        if self.devices() == 0 {
            return Err(Code::NoDevice);
        }
        Ok(!self.initialized.swap(true, Ordering::AcqRel))
    }

    /// Counts a call of a function. Returns whether the settings let it fail.
    pub fn fails(&self, function: &str) -> bool {
        let Some((name, first)) = &self.settings.fail else { return false };
        name == function && self.calls.fetch_add(1, Ordering::Relaxed) + 1 >= *first
    }

    /// Objects that the program has not released until now, or not until their context ended, by kind.
    pub fn unreleased(&self) -> Vec<(&'static str, usize)> {
        let (mut counts, mut users) = (*lock(&self.abandoned), 0);
        for (context, retained) in lock(&self.primary).values() {
            counts.iter_mut().zip(context.alive()).for_each(|(count, alive)| *count += alive);
            users += *retained as usize;
        }
        [("contexts", users)].into_iter().chain(OBJECTS.into_iter().zip(counts)).collect()
    }

    /// The number of GPUs.
    pub fn devices(&self) -> i32 {
        self.devices.load(Ordering::Relaxed)
    }

    /// Sets the number of GPUs.
    pub fn set_devices(&self, devices: i32) {
        self.devices.store(devices, Ordering::Relaxed);
    }

    /// Checks a device's number.
    pub fn device(number: i32) -> Result<&'static Driver, Code> {
        let driver = Driver::initialized()?;
        if (0..driver.devices()).contains(&number) { Ok(driver) } else { Err(Code::InvalidDevice) }
    }

    /// Takes a share in the primary context of a GPU, which is created for the first.
    pub fn retain(&'static self, device: i32) -> Handle {
        let mut primary = lock(&self.primary);
        let (context, users) = primary.entry(device).or_insert_with(|| (Arc::new(Context::new(self)), 0));
        *users += 1;
        context.handle
    }

    /// Gives a share back. The context ends with the last.
    pub fn release(&self, device: i32) -> Result<(), Code> {
        let mut primary = lock(&self.primary);
        let (_, users) = primary.get_mut(&device).ok_or(Code::InvalidContext)?;
        *users -= 1;
        let last = if *users == 0 { primary.remove(&device) } else { None };
        drop(primary);
        if let Some((context, _)) = last {
            for (ended, alive) in lock(&self.abandoned).iter_mut().zip(context.alive()) {
                *ended += alive;
            }
            context.destroy();
        }
        Ok(())
    }

    fn live(&self, handle: Handle) -> Option<Arc<Context>> {
        let primary = lock(&self.primary);
        primary.values().find(|(context, _)| context.handle == handle).map(|(context, _)| context.clone())
    }
}

/// Makes a context current on this thread; null for none.
///
/// # Errors
/// [`Code::InvalidContext`] if there is no such context; its sticky error.
pub fn set_current(handle: Handle) -> Result<(), Code> {
    let driver = Driver::initialized()?;
    if handle == 0 {
        CURRENT.set(0);
        return Ok(());
    }
    let context = driver.live(handle).ok_or(Code::InvalidContext)?;
    CURRENT.set(handle);
    context.check()
}

/// The context that is current on this thread.
///
/// # Errors
/// [`Code::NotInitialized`], [`Code::InvalidContext`] if there is none, [`Code::ContextIsDestroyed`], and the
/// context's sticky error.
pub fn current() -> Result<Arc<Context>, Code> {
    let driver = Driver::initialized()?;
    let handle = CURRENT.get();
    if handle == 0 {
        return Err(Code::InvalidContext);
    }
    let context = driver.live(handle).ok_or(Code::ContextIsDestroyed)?;
    context.check()?;
    Ok(context)
}
