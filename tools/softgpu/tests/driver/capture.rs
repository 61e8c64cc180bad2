//! Capture of a stream into a graph, and launches of graphs.

use crate::api::*;
use std::ffi::c_void;
use std::ptr::{null, null_mut};
use std::thread;

fn instantiate(cuda: &Cuda, graph: usize) -> usize {
    let mut executable = 0;
    assert_eq!(cuda.cuGraphInstantiateWithFlags(&mut executable, graph, 0), SUCCESS);
    executable
}

/// Captures what `record` enqueues.
fn capture(cuda: &Cuda, stream: usize, record: impl FnOnce()) -> usize {
    let mut graph = 0;
    assert_eq!(cuda.cuStreamBeginCapture_v2(stream, RELAXED), SUCCESS);
    record();
    assert_eq!(cuda.cuStreamEndCapture(stream, &mut graph), SUCCESS);
    graph
}

#[test]
fn a_graph_repeats_kernels_copies_and_fills_in_order() {
    isolated("capture::a_graph_repeats_kernels_copies_and_fills_in_order", &[], |cuda| {
        cuda.open();
        let (stream, module, p, q, host) =
            (cuda.stream(), cuda.module(), cuda.alloc(8), cuda.alloc(8), cuda.host(4));
        let add = cuda.function(module, c"add");
        cuda.write(p, &[0, 0], stream);
        // Read when the graph runs, not when it is captured.
        let source = [100u32, 200];
        let graph = capture(cuda, stream, || {
            assert_eq!(cuda.launch(Config::new(1, 32, stream), add, p, &[1, 2]), SUCCESS);
            assert_eq!(cuda.cuMemcpyDtoDAsync_v2(q, p, 8, stream), SUCCESS);
            assert_eq!(cuda.cuMemsetD8Async(q + 4, 0, 4, stream), SUCCESS);
            assert_eq!(cuda.launch(Config::new(1, 32, stream), add, q, &[10, 2]), SUCCESS);
            assert_eq!(cuda.cuMemcpyDtoHAsync_v2(host.cast(), q, 8, stream), SUCCESS);
            assert_eq!(cuda.cuMemcpyHtoDAsync_v2(q, source.as_ptr().cast(), 8, stream), SUCCESS);
        });
        // Nothing has run, and the executable does not need the graph.
        assert_eq!(cuda.read::<2>(p, stream), [0, 0]);
        let executable = instantiate(cuda, graph);
        assert_eq!(cuda.cuGraphDestroy(graph), SUCCESS);
        assert_eq!(cuda.cuGraphDestroy(graph), INVALID_VALUE);
        assert_eq!(cuda.cuGraphUpload(executable, stream), SUCCESS);
        for _ in 0..3 {
            assert_eq!(cuda.cuGraphLaunch(executable, stream), SUCCESS);
        }
        assert_eq!((cuda.read::<2>(p, stream), cuda.read::<2>(q, stream)), ([3, 3], source));
        // SAFETY: the allocation has 4 words, and no work is left.
        assert_eq!(unsafe { std::slice::from_raw_parts(host, 2) }, [13, 10]);
        assert_eq!(cuda.cuGraphExecDestroy(executable), SUCCESS);
        assert_eq!(cuda.cuGraphExecDestroy(executable), INVALID_VALUE);
        assert_eq!(cuda.cuGraphLaunch(executable, stream), INVALID_VALUE);
    });
}

#[test]
fn a_graph_can_be_part_of_another() {
    isolated("capture::a_graph_can_be_part_of_another", &[], |cuda| {
        cuda.open();
        let (stream, module, p) = (cuda.stream(), cuda.module(), cuda.alloc(4));
        let add = cuda.function(module, c"add");
        cuda.write(p, &[0], stream);
        let launch = || assert_eq!(cuda.launch(Config::new(1, 1, stream), add, p, &[1, 1]), SUCCESS);
        let inner = instantiate(cuda, capture(cuda, stream, launch));
        let outer = capture(cuda, stream, || {
            assert_eq!(cuda.cuGraphLaunch(inner, stream), SUCCESS);
            launch();
        });
        let outer = instantiate(cuda, outer);
        assert_eq!(cuda.cuGraphExecDestroy(inner), SUCCESS);
        assert_eq!(cuda.cuGraphLaunch(outer, stream), SUCCESS);
        assert_eq!(cuda.read::<1>(p, stream), [2]);
    });
}

#[test]
fn captures_begin_and_end_once_and_not_on_the_null_stream() {
    isolated("capture::captures_begin_and_end_once_and_not_on_the_null_stream", &[], |cuda| {
        cuda.open();
        let (stream, mut graph) = (cuda.stream(), 5);
        assert_eq!(cuda.cuStreamBeginCapture_v2(0, RELAXED), CAPTURE_UNSUPPORTED);
        assert_eq!((cuda.cuStreamEndCapture(stream, &mut graph), graph), (ILLEGAL_STATE, 0));
        assert_eq!(cuda.cuStreamBeginCapture_v2(stream, RELAXED), SUCCESS);
        assert_eq!(cuda.cuStreamBeginCapture_v2(stream, RELAXED), ILLEGAL_STATE);
        assert_eq!(cuda.cuStreamEndCapture(stream, &mut graph), SUCCESS);
        assert_eq!(cuda.cuStreamEndCapture(stream, &mut graph), ILLEGAL_STATE);
    });
}

#[test]
fn waiting_for_a_captured_stream_spoils_the_capture() {
    isolated("capture::waiting_for_a_captured_stream_spoils_the_capture", &[], |cuda| {
        cuda.open();
        let (stream, p, mut graph, mut executable) = (cuda.stream(), cuda.alloc(4), 5, 0);
        let empty = instantiate(cuda, capture(cuda, stream, || {}));
        let spoilers: [&dyn Fn() -> i32; 2] =
            [&|| cuda.cuStreamSynchronize(stream), &|| cuda.cuGraphUpload(empty, stream)];
        for spoil in spoilers {
            assert_eq!(cuda.cuStreamBeginCapture_v2(stream, RELAXED), SUCCESS);
            assert_eq!(spoil(), CAPTURE_UNSUPPORTED);
            assert_eq!(cuda.cuMemsetD8Async(p, 0, 4, stream), CAPTURE_INVALIDATED);
            assert_eq!((cuda.cuStreamEndCapture(stream, &mut graph), graph), (CAPTURE_INVALIDATED, 0));
            // The stream works again.
            assert_eq!(cuda.cuStreamSynchronize(stream), SUCCESS);
        }
        assert_eq!(cuda.cuGraphInstantiateWithFlags(&mut executable, graph, 0), INVALID_VALUE);
    });
}

#[test]
fn calls_that_a_capture_does_not_see_are_forbidden_by_its_mode() {
    isolated("capture::calls_that_a_capture_does_not_see_are_forbidden_by_its_mode", &[], |cuda| {
        let context = cuda.open();
        let (stream, p, host, module) = (cuda.stream(), cuda.alloc(4), cuda.host(1) as usize, cuda.module());
        let calls: [&(dyn Fn() -> i32 + Sync); 6] = [
            &|| cuda.cuMemAlloc_v2(&mut 0, 4),
            &|| cuda.cuMemHostAlloc(&mut null_mut(), 4, 0),
            &|| cuda.cuMemFree_v2(p),
            &|| cuda.cuMemFreeHost(host as *mut c_void),
            &|| cuda.cuModuleLoadDataEx(&mut 0, c"".as_ptr().cast(), 0, null(), null_mut()),
            &|| cuda.cuModuleUnload(module),
        ];
        let mut graph = 0;
        for call in calls {
            for mode in [GLOBAL, THREAD_LOCAL] {
                assert_eq!(cuda.cuStreamBeginCapture_v2(stream, mode), SUCCESS);
                assert_eq!(call(), CAPTURE_UNSUPPORTED);
                assert_eq!(cuda.cuStreamEndCapture(stream, &mut graph), CAPTURE_INVALIDATED);
            }
        }
        // Another thread is restricted by a global capture only.
        for (mode, expected) in [(GLOBAL, CAPTURE_UNSUPPORTED), (THREAD_LOCAL, SUCCESS), (RELAXED, SUCCESS)] {
            assert_eq!(cuda.cuStreamBeginCapture_v2(stream, mode), SUCCESS);
            let other = thread::scope(|scope| {
                let thread = scope.spawn(|| {
                    assert_eq!(cuda.cuCtxSetCurrent(context), SUCCESS);
                    cuda.cuMemAlloc_v2(&mut 0, 4)
                });
                thread.join().unwrap()
            });
            assert_eq!(other, expected);
            let end = if mode == GLOBAL { CAPTURE_INVALIDATED } else { SUCCESS };
            assert_eq!(cuda.cuStreamEndCapture(stream, &mut graph), end);
        }
        assert_eq!(cuda.cuStreamBeginCapture_v2(stream, RELAXED), SUCCESS);
        cuda.alloc(4);
        assert_eq!(cuda.cuStreamEndCapture(stream, &mut graph), SUCCESS);
    });
}

#[test]
fn only_a_relaxed_capture_may_end_in_another_thread() {
    isolated("capture::only_a_relaxed_capture_may_end_in_another_thread", &[], |cuda| {
        let context = cuda.open();
        let (stream, mut graph) = (cuda.stream(), 0);
        for (mode, expected) in
            [(GLOBAL, CAPTURE_WRONG_THREAD), (THREAD_LOCAL, CAPTURE_WRONG_THREAD), (RELAXED, SUCCESS)]
        {
            assert_eq!(cuda.cuStreamBeginCapture_v2(stream, mode), SUCCESS);
            let other = thread::scope(|scope| {
                let thread = scope.spawn(|| {
                    assert_eq!(cuda.cuCtxSetCurrent(context), SUCCESS);
                    cuda.cuStreamEndCapture(stream, &mut 0)
                });
                thread.join().unwrap()
            });
            assert_eq!(other, expected);
            let end = if mode == RELAXED { ILLEGAL_STATE } else { SUCCESS };
            assert_eq!(cuda.cuStreamEndCapture(stream, &mut graph), end);
        }
    });
}

#[test]
fn an_event_of_a_capture_cannot_be_waited_for() {
    isolated("capture::an_event_of_a_capture_cannot_be_waited_for", &[], |cuda| {
        cuda.open();
        let (stream, mut event, mut time) = (cuda.stream(), 0, 0f32);
        assert_eq!(cuda.cuEventCreate(&mut event, 0), SUCCESS);
        capture(cuda, stream, || assert_eq!(cuda.cuEventRecord(event, stream), SUCCESS));
        assert_eq!(cuda.cuEventSynchronize(event), CAPTURED_EVENT);
        assert_eq!(cuda.cuEventElapsedTime_v2(&mut time, event, event), CAPTURED_EVENT);
        assert_eq!(cuda.cuEventRecord(event, stream), SUCCESS);
        assert_eq!(cuda.cuEventSynchronize(event), SUCCESS);
    });
}

#[test]
fn a_graph_whose_module_is_unloaded_is_refused() {
    let printed = isolated("capture::a_graph_whose_module_is_unloaded_is_refused", &[], |cuda| {
        cuda.open();
        let (stream, module, p) = (cuda.stream(), cuda.module(), cuda.alloc(4));
        let store = cuda.function(module, c"store");
        let graph = capture(cuda, stream, || {
            assert_eq!(cuda.launch(Config::new(1, 1, stream), store, p, &[1]), SUCCESS);
        });
        let executable = instantiate(cuda, graph);
        assert_eq!(cuda.cuModuleUnload(module), SUCCESS);
        assert_eq!(cuda.cuGraphLaunch(executable, stream), INVALID_HANDLE);
        assert_eq!(cuda.cuGraphInstantiateWithFlags(&mut 0, graph, 0), INVALID_HANDLE);
        assert_eq!(cuda.cuStreamSynchronize(stream), SUCCESS);
    });
    assert!(printed.contains("a graph launches kernel store, but its module was unloaded"), "{printed}");
}

#[test]
fn a_graph_that_uses_freed_memory_fails_where_it_does() {
    const NAME: &str = "capture::a_graph_that_uses_freed_memory_fails_where_it_does";
    fn check(cuda: &Cuda, record: impl Fn(usize, u64)) {
        cuda.open();
        let (stream, p) = (cuda.stream(), cuda.alloc(4));
        let executable = instantiate(cuda, capture(cuda, stream, || record(stream, p)));
        assert_eq!(cuda.cuGraphLaunch(executable, stream), SUCCESS);
        assert_eq!(cuda.cuStreamSynchronize(stream), SUCCESS);
        assert_eq!(cuda.cuMemFree_v2(p), SUCCESS);
        assert_eq!(cuda.cuGraphLaunch(executable, stream), SUCCESS);
        assert_eq!(cuda.cuStreamSynchronize(stream), ILLEGAL_ADDRESS);
    }
    for kind in ["kernel", "fill"] {
        let printed = isolated(NAME, &[("KIND", kind)], |cuda| match std::env::var("KIND").as_deref() {
            Ok("kernel") => check(cuda, |stream, p| {
                let store = cuda.function(cuda.module(), c"store");
                assert_eq!(cuda.launch(Config::new(1, 1, stream), store, p, &[1]), SUCCESS);
            }),
            _ => check(cuda, |stream, p| assert_eq!(cuda.cuMemsetD8Async(p, 1, 4, stream), SUCCESS)),
        });
        let sentence = "byte 0 of allocation 1 (4 bytes, cuMemAlloc), which was freed";
        assert_eq!(printed.matches(sentence).count(), 1, "{printed}");
    }
}
