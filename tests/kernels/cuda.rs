//! What every device must do, in particular a GPU: copies, graphs, events, pinned memory, use by several
//! threads.

use crate::support::kernel;

use dflash::gpu::cuda::Cuda;
use dflash::gpu::device::Device;
use dflash::gpu::kernels::embedding::Embedding;
use kernel::*;
use std::sync::Barrier;
use std::time::Instant;

/// Fails without a GPU; all other tests pass without one. A run that needs a GPU starts with this test.
#[test]
#[ignore = "needs a GPU"]
fn a_gpu_opens() {
    let start = Instant::now();
    let gpu = Cuda::open(0).unwrap();
    println!("opened in {:.2} s: {:?}", start.elapsed().as_secs_f32(), gpu.properties());
}

#[test]
fn copies_fills_and_slices_move_the_right_bytes() {
    on_gpu(|device| {
        let from: Vec<u8> = (0..1000).map(|i| i as u8).collect();
        let (a, b) = (upload(device, &from), poisoned::<u8>(device, 1000));
        assert_eq!(a.address() % 256, 0);
        device.copy(&b, &a).unwrap();
        device.fill(&b.slice(3, 5).unwrap(), 0xee).unwrap();
        device.copy(&b.slice(990, 10).unwrap(), &a.slice(1, 10).unwrap()).unwrap();
        let expected = [&from[..3], &[0xee; 5], &from[8..990], &from[1..11]].concat();
        assert_eq!(bytes_of(device, &b), expected);
        for empty in [upload::<u8>(device, &[]), b.slice(1000, 0).unwrap()] {
            device.fill(&empty, 1).unwrap();
            device.copy(&empty, &empty).unwrap();
            assert!(bytes_of(device, &empty).is_empty());
        }
        let (free, total) = device.memory().unwrap();
        assert!(0 < free && free <= total);
        let vast = device.allocate(1 << 50, "a test").unwrap_err().to_string();
        assert!(vast.contains("a test"), "{vast}");
    });
}

#[test]
fn the_host_reads_pinned_memory_written_by_the_device() {
    on_gpu(|device| {
        let pinned = device.pinned(64, "a test").unwrap();
        assert_eq!(pinned.read_u32(60).unwrap(), 0);
        let words: Vec<u32> = (100..116).collect();
        device.copy(&pinned.buffer, &upload(device, &words)).unwrap();
        device.synchronize().unwrap();
        assert!((0..16).all(|i| pinned.read_u32(i * 4).unwrap() == words[i]));
        assert_eq!(download::<u32>(device, &pinned.buffer), words);
    });
}

#[test]
fn events_are_in_order() {
    on_gpu(|device| {
        let buffer = poisoned::<u8>(device, 1 << 20);
        let start = device.record().unwrap();
        device.fill(&buffer, 1).unwrap();
        let end = device.record().unwrap();
        assert!(device.elapsed(&start, &end).unwrap() >= 0.0);
        assert_eq!(device.elapsed(&start, &start).unwrap(), 0.0);
    });
}

#[test]
fn capture_refuses_host_operations_and_stays_usable() {
    on_gpu(|device| {
        let buffer = upload(device, &[1u8; 8]);
        let refused = |what: &mut dyn FnMut() -> dflash::Result<()>| {
            let error = device.capture(what).err().unwrap().to_string();
            assert!(error.contains("while a graph is captured"), "{error}");
        };
        refused(&mut || device.upload(&buffer, &[2; 8]));
        refused(&mut || device.download(&buffer, &mut [0; 8]));
        refused(&mut || device.allocate(8, "a test").map(drop));
        refused(&mut || device.synchronize());
        refused(&mut || device.capture(&mut || Ok(())).map(drop));
        device.replay(&device.capture(&mut || Ok(())).unwrap()).unwrap();
        let graph = device.capture(&mut || device.fill(&buffer, 3)).unwrap();
        assert_eq!(bytes_of(device, &buffer), [1; 8], "a capture runs nothing");
        device.replay(&graph).unwrap();
        assert_eq!(bytes_of(device, &buffer), [3; 8]);
    });
}

/// Half of the threads capture while the other half copies and launches; they change roles every turn.
#[test]
fn threads_share_a_device_and_capture_only_their_own_work() {
    const THREADS: usize = 8;
    let (hidden, vocab) = (64, 50);
    let table = Random::new(1).bf16(vocab * hidden, 1.0);
    let barrier = Barrier::new(THREADS);
    let work = |device: &dyn Device, thread: usize| {
        let table_on = constant(device, &table);
        for turn in 0..20 {
            let rows = 1 + (thread + turn) % 7;
            let ids: Vec<u32> = (0..rows).map(|row| ((thread * 7 + turn + row) % vocab) as u32).collect();
            let tokens = poisoned::<u32>(device, rows);
            let [out, copied] = [(); 2].map(|()| poisoned::<f32>(device, rows * hidden));
            let kernel = Embedding { rows, hidden, vocab, packed: false, scale: 1.0 };
            let launch = || kernel.launch(device, &out, &table_on, &tokens);
            let set = || device.upload(&tokens, &to_bytes(&ids));
            // No panic between the two waits: the other threads would wait forever.
            if (thread + turn).is_multiple_of(2) {
                let graph = device.capture(&mut || {
                    let launched = launch();
                    barrier.wait();
                    barrier.wait();
                    launched.and_then(|()| device.copy(&copied, &out))
                });
                let graph = graph.unwrap();
                assert_eq!(graph.nodes.len(), 2);
                set().and_then(|()| device.replay(&graph)).unwrap();
            } else {
                barrier.wait();
                let done = set().and_then(|()| launch()).and_then(|()| device.copy(&copied, &out));
                let waited = device.synchronize();
                barrier.wait();
                done.and(waited).unwrap();
            }
            let expected: Vec<u16> =
                ids.iter().flat_map(|&id| table[id as usize * hidden..][..hidden].to_vec()).collect();
            let right = download::<f32>(device, &copied) == from_bf16(&expected);
            assert!(right, "thread {thread}, turn {turn}");
        }
    };
    on_gpu(|device| {
        let work = &work;
        std::thread::scope(|scope| {
            (0..THREADS).for_each(|thread| drop(scope.spawn(move || work(device, thread))))
        });
    });
}
