//! Streams and events: what runs when, and what host and device see of each other meanwhile.

use crate::api::*;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// A word of page-locked memory, by which kernels and the test wait for each other.
fn word(pointer: *mut u32, index: usize) -> &'static AtomicU32 {
    // SAFETY: the process ends before the memory does, and both sides access it as whole words.
    unsafe { AtomicU32::from_ptr(pointer.add(index)) }
}

/// Waits up to a minute.
fn wait_for(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}");
        thread::yield_now();
    }
}

#[test]
fn calls_return_while_the_device_works() {
    isolated("streams::calls_return_while_the_device_works", &[], |cuda| {
        cuda.open();
        let (stream, module, p, host) = (cuda.stream(), cuda.module(), cuda.alloc(4), cuda.host(2));
        let [gate, add] = [c"gate", c"add"].map(|name| cuda.function(module, name));
        let (mut start, mut end, mut time) = (0, 0, 1f32);
        assert_eq!([cuda.cuEventCreate(&mut start, 0), cuda.cuEventCreate(&mut end, 0)], [SUCCESS; 2]);
        cuda.write(p, &[1], stream);
        assert_eq!(cuda.cuEventRecord(start, stream), SUCCESS);
        assert_eq!(cuda.launch(Config::new(1, 1, stream), gate, host as u64, &[]), SUCCESS);
        // A pageable source is read at once, a page-locked one when the copy executes.
        let mut pageable = [10u32];
        assert_eq!(cuda.cuMemcpyHtoDAsync_v2(p, pageable.as_ptr().cast(), 4, stream), SUCCESS);
        pageable[0] = 99;
        assert_eq!(cuda.launch(Config::new(1, 32, stream), add, p, &[5, 1]), SUCCESS);
        assert_eq!(cuda.cuMemcpyDtoHAsync_v2(host.wrapping_add(1).cast(), p, 4, stream), SUCCESS);
        assert_eq!(cuda.cuEventRecord(end, stream), SUCCESS);
        assert_eq!(cuda.cuEventElapsedTime_v2(&mut time, start, end), NOT_READY);
        assert_eq!(word(host, 1).load(Ordering::Acquire), 0);
        word(host, 0).store(1, Ordering::Release);
        assert_eq!(cuda.cuEventSynchronize(end), SUCCESS);
        assert_eq!(word(host, 1).load(Ordering::Acquire), 15);
        assert_eq!((cuda.cuEventElapsedTime_v2(&mut time, start, end), time), (SUCCESS, 0.0));
        assert_eq!(pageable, [99]);
    });
}

#[test]
fn events_without_a_time_or_a_record_have_no_elapsed_time() {
    isolated("streams::events_without_a_time_or_a_record_have_no_elapsed_time", &[], |cuda| {
        cuda.open();
        let (stream, mut timed, mut untimed, mut time) = (cuda.stream(), 0, 0, 0f32);
        assert_eq!([cuda.cuEventCreate(&mut timed, 0), cuda.cuEventCreate(&mut untimed, 2)], [SUCCESS; 2]);
        assert_eq!(cuda.cuEventSynchronize(timed), SUCCESS);
        assert_eq!(cuda.cuEventElapsedTime_v2(&mut time, timed, timed), INVALID_HANDLE);
        assert_eq!([cuda.cuEventRecord(timed, stream), cuda.cuEventRecord(untimed, stream)], [SUCCESS; 2]);
        assert_eq!(cuda.cuEventElapsedTime_v2(&mut time, timed, timed), SUCCESS);
        assert_eq!(cuda.cuEventElapsedTime_v2(&mut time, timed, untimed), INVALID_HANDLE);
    });
}

#[test]
fn host_and_device_answer_each_other_through_page_locked_memory() {
    isolated("streams::host_and_device_answer_each_other_through_page_locked_memory", &[], |cuda| {
        cuda.open();
        let (stream, module, ring) = (cuda.stream(), cuda.module(), cuda.host(2));
        let echo = cuda.function(module, c"echo");
        assert_eq!(cuda.launch(Config::new(1, 1, stream), echo, ring as u64, &[1000]), SUCCESS);
        for i in 1..=1000 {
            word(ring, 0).store(i, Ordering::Release);
            wait_for("the kernel answers", || word(ring, 1).load(Ordering::Acquire) == i);
        }
        assert_eq!(cuda.cuStreamSynchronize(stream), SUCCESS);
    });
}

/// A loop without any effect counts as hung, but not while it reads what the host can change.
#[test]
fn a_kernel_may_wait_for_the_host_for_long() {
    isolated("streams::a_kernel_may_wait_for_the_host_for_long", &[], |cuda| {
        cuda.open();
        let (stream, module, host, p) = (cuda.stream(), cuda.module(), cuda.host(1), cuda.alloc(4));
        let gate = cuda.function(module, c"gate");
        assert_eq!(cuda.launch(Config::new(1, 1, stream), gate, host as u64, &[]), SUCCESS);
        thread::sleep(Duration::from_secs(4));
        word(host, 0).store(1, Ordering::Release);
        assert_eq!(cuda.cuStreamSynchronize(stream), SUCCESS);
        // No other stream runs, so nothing can change device memory.
        cuda.write(p, &[0], stream);
        assert_eq!(cuda.launch(Config::new(1, 1, stream), gate, p, &[]), SUCCESS);
        assert_eq!(cuda.cuStreamSynchronize(stream), LAUNCH_FAILED);
    });
}

#[test]
fn streams_run_beside_each_other_and_finish_after_they_are_destroyed() {
    isolated("streams::streams_run_beside_each_other_and_finish_after_they_are_destroyed", &[], |cuda| {
        cuda.open();
        let (one, two, module, host) = (cuda.stream(), cuda.stream(), cuda.module(), cuda.host(2));
        let [gate, store] = [c"gate", c"store"].map(|name| cuda.function(module, name));
        assert_eq!(cuda.launch(Config::new(1, 1, one), gate, host as u64, &[]), SUCCESS);
        assert_eq!(cuda.launch(Config::new(1, 1, one), store, host as u64 + 4, &[3]), SUCCESS);
        assert_eq!(cuda.cuStreamDestroy_v2(one), SUCCESS);
        // Only the second stream can open the gate of the first.
        assert_eq!(cuda.launch(Config::new(1, 1, two), store, host as u64, &[1]), SUCCESS);
        wait_for("the destroyed stream finishes", || word(host, 1).load(Ordering::Acquire) == 3);
    });
}

#[test]
fn blocking_streams_and_the_null_stream_keep_their_order() {
    isolated("streams::blocking_streams_and_the_null_stream_keep_their_order", &[], |cuda| {
        cuda.open();
        let (module, p, mut blocking) = (cuda.module(), cuda.alloc(4), 0);
        let add = cuda.function(module, c"add");
        assert_eq!(cuda.cuStreamCreate(&mut blocking, 0), SUCCESS);
        cuda.write(p, &[0], 0);
        for _ in 0..100 {
            for stream in [0, blocking, 1] {
                assert_eq!(cuda.launch(Config::new(1, 1, stream), add, p, &[1, 1]), SUCCESS);
            }
        }
        assert_eq!(cuda.cuStreamDestroy_v2(blocking), SUCCESS);
        assert_eq!(cuda.read::<1>(p, 0), [300]);
    });
}

/// Every thread has streams, memory, events and graphs of its own, and all share one module.
#[test]
fn many_threads_and_streams_do_not_disturb_each_other() {
    const THREADS: u32 = 4;
    const ROUNDS: u32 = 60;
    isolated("streams::many_threads_and_streams_do_not_disturb_each_other", &[], |cuda| {
        let context = cuda.open();
        let module = cuda.module();
        let add = cuda.function(module, c"add");
        thread::scope(|scope| {
            for number in 0..THREADS {
                scope.spawn(move || {
                    assert_eq!(cuda.cuCtxSetCurrent(context), SUCCESS);
                    let streams = [cuda.stream(), cuda.stream(), cuda.stream()];
                    for round in 0..ROUNDS {
                        let results = streams.map(|stream| {
                            let (p, mut graph, mut executable) = (cuda.alloc(256), 0, 0);
                            cuda.write(p, &[number; 64], stream);
                            assert_eq!(cuda.cuStreamBeginCapture_v2(stream, RELAXED), SUCCESS);
                            for _ in 0..3 {
                                assert_eq!(
                                    cuda.launch(Config::new(2, 32, stream), add, p, &[round, 63]),
                                    SUCCESS
                                );
                            }
                            assert_eq!(cuda.cuStreamEndCapture(stream, &mut graph), SUCCESS);
                            assert_eq!(cuda.cuGraphInstantiateWithFlags(&mut executable, graph, 0), SUCCESS);
                            assert_eq!(cuda.cuGraphDestroy(graph), SUCCESS);
                            assert_eq!(cuda.cuGraphLaunch(executable, stream), SUCCESS);
                            assert_eq!(cuda.launch(Config::new(2, 32, stream), add, p, &[1, 64]), SUCCESS);
                            assert_eq!(cuda.cuGraphLaunch(executable, stream), SUCCESS);
                            assert_eq!(cuda.cuGraphExecDestroy(executable), SUCCESS);
                            p
                        });
                        for (stream, p) in streams.into_iter().zip(results) {
                            let words: [u32; 64] = cuda.read(p, stream);
                            assert_eq!(words[..63], [number + 6 * round + 1; 63]);
                            assert_eq!(words[63], number + 1);
                            assert_eq!(cuda.cuMemFree_v2(p), SUCCESS);
                        }
                    }
                });
            }
        });
        let (mut free, mut total) = (0, 0);
        assert_eq!(cuda.cuModuleUnload(module), SUCCESS);
        assert_eq!(cuda.cuMemGetInfo_v2(&mut free, &mut total), SUCCESS);
        assert_eq!(free, total);
        assert_eq!(cuda.cuDevicePrimaryCtxRelease_v2(0), SUCCESS);
    });
}
