//! Launches that may overlap their predecessor, in streams and in graphs.

use crate::api::*;
use std::sync::atomic::{AtomicU32, Ordering};

/// The attribute for programmatic stream serialization, on.
const OVERLAP: Attribute = Attribute { id: 6, padding: 0, value: [1; 16] };

/// A stream and 8 bytes of memory, p, of which the first four are 0.
struct Setup<'a> {
    cuda: &'a Cuda,
    stream: usize,
    p: u64,
    module: usize,
}

impl<'a> Setup<'a> {
    fn new(cuda: &'a Cuda) -> Setup<'a> {
        cuda.open();
        let (code, module, log) = cuda.load(include_str!("dependent.ptx"));
        assert_eq!(code, SUCCESS, "{log}");
        let (stream, p) = (cuda.stream(), cuda.alloc(8));
        cuda.write(p, &[0, 9], stream);
        Setup { cuda, stream, p, module }
    }

    fn launch(&self, name: &std::ffi::CStr, attributes: &[Attribute]) {
        let config = Config::new(1, 1, self.stream);
        let config =
            Config { attributes: attributes.as_ptr(), attribute_count: attributes.len() as u32, ..config };
        let function = self.cuda.function(self.module, name);
        assert_eq!(self.cuda.launch(config, function, self.p, &[]), SUCCESS);
    }

    /// The executable graph of what `record` launches.
    fn graph(&self, record: impl FnOnce()) -> usize {
        let (mut graph, mut executable) = (0, 0);
        assert_eq!(self.cuda.cuStreamBeginCapture_v2(self.stream, RELAXED), SUCCESS);
        record();
        assert_eq!(self.cuda.cuStreamEndCapture(self.stream, &mut graph), SUCCESS);
        assert_eq!(self.cuda.cuGraphInstantiateWithFlags(&mut executable, graph, 0), SUCCESS);
        executable
    }

    /// Keeps the stream busy until all that `enqueue` launches is in its queue.
    fn together(&self, enqueue: impl FnOnce()) {
        let word = self.cuda.host(1);
        let gate = self.cuda.function(self.cuda.module(), c"gate");
        assert_eq!(self.cuda.launch(Config::new(1, 1, self.stream), gate, word as u64, &[]), SUCCESS);
        enqueue();
        // SAFETY: the process ends before the memory does, and both sides access it as a whole word.
        unsafe { AtomicU32::from_ptr(word) }.store(1, Ordering::Release);
    }

    fn check(&self, expected: [u32; 2]) {
        assert_eq!(self.cuda.read::<2>(self.p, self.stream), expected);
    }
}

/// Runs `body` where dependent launches start as early as they may.
fn early(test: &str, card: &str, body: fn(&Cuda)) -> String {
    isolated(test, &[("SOFTGPU_CARD", card), ("SOFTGPU_SCHEDULE", "1")], body)
}

#[test]
fn a_successor_that_waits_sees_what_its_predecessor_wrote() {
    early("dependent::a_successor_that_waits_sees_what_its_predecessor_wrote", "h200", |cuda| {
        let setup = Setup::new(cuda);
        let both = || {
            setup.launch(c"first", &[OVERLAP]);
            setup.launch(c"patient", &[OVERLAP]);
        };
        setup.together(both);
        setup.check([1, 1]);
        cuda.write(setup.p, &[0, 9], setup.stream);
        assert_eq!(cuda.cuGraphLaunch(setup.graph(both), setup.stream), SUCCESS);
        setup.check([1, 1]);
    });
}

#[test]
fn a_successor_that_does_not_wait_is_caught_in_a_stream() {
    early("dependent::a_successor_that_does_not_wait_is_caught_in_a_stream", "h200", |cuda| {
        let setup = Setup::new(cuda);
        setup.together(|| {
            setup.launch(c"first", &[]);
            setup.launch(c"hasty", &[OVERLAP]);
        });
        assert_eq!(cuda.cuStreamSynchronize(setup.stream), LAUNCH_FAILED);
    });
}

#[test]
fn a_successor_that_does_not_wait_is_caught_in_a_graph() {
    early("dependent::a_successor_that_does_not_wait_is_caught_in_a_graph", "h200", |cuda| {
        let setup = Setup::new(cuda);
        let graph = setup.graph(|| {
            setup.launch(c"first", &[]);
            setup.launch(c"hasty", &[OVERLAP]);
        });
        assert_eq!(cuda.cuGraphLaunch(graph, setup.stream), SUCCESS);
        assert_eq!(cuda.cuStreamSynchronize(setup.stream), LAUNCH_FAILED);
    });
}

/// Without the attribute, at the start of a graph, and after a fill, a launch begins when all before it is
/// done.
#[test]
fn other_launches_do_not_overlap() {
    early("dependent::other_launches_do_not_overlap", "h200", |cuda| {
        let setup = Setup::new(cuda);
        setup.together(|| {
            setup.launch(c"first", &[]);
            setup.launch(c"hasty", &[]);
        });
        setup.check([1, 1]);
        let graph = setup.graph(|| setup.launch(c"hasty", &[OVERLAP]));
        cuda.write(setup.p, &[0, 9], setup.stream);
        setup.together(|| {
            setup.launch(c"first", &[]);
            assert_eq!(cuda.cuGraphLaunch(graph, setup.stream), SUCCESS);
        });
        setup.check([1, 1]);
        let graph = setup.graph(|| {
            setup.launch(c"first", &[]);
            assert_eq!(cuda.cuMemsetD8Async(setup.p + 4, 0, 4, setup.stream), SUCCESS);
            setup.launch(c"hasty", &[OVERLAP]);
        });
        assert_eq!(cuda.cuGraphLaunch(graph, setup.stream), SUCCESS);
        setup.check([1, 1]);
    });
}

/// The PTX is for sm_90 or newer, so the GPU without overlap is asked with kernels for all.
#[test]
fn gpus_before_sm_90_ignore_the_attribute() {
    early("dependent::gpus_before_sm_90_ignore_the_attribute", "a100", |cuda| {
        cuda.open();
        let (code, _, log) = cuda.load(include_str!("dependent.ptx"));
        assert_eq!(code, INVALID_PTX, "{log}");
        let (stream, p, module) = (cuda.stream(), cuda.alloc(4), cuda.module());
        cuda.write(p, &[0], stream);
        let add = cuda.function(module, c"add");
        let config = Config { attributes: &OVERLAP, attribute_count: 1, ..Config::new(1, 1, stream) };
        for _ in 0..50 {
            assert_eq!(cuda.launch(config, add, p, &[1, 1]), SUCCESS);
        }
        assert_eq!(cuda.read::<1>(p, stream), [50]);
    });
}
