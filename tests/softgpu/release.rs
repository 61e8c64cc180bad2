//! What a device owns lives as long as it is used, whatever is dropped first, and is released with the last of it.

use crate::support::kernel::{download, upload};
use crate::support::test_gpu;

use dflash::gpu::device::Device;
use dflash::gpu::kernels::embedding::Embedding;
use libloading::Library;
use std::any::Any;

/// A text that the software GPU answers with.
fn answer(function: &str) -> String {
    type Function = extern "C" fn(*mut u8, usize, *mut usize) -> i32;
    let (mut text, mut needed) = (vec![0; 1 << 20], 0);
    // SAFETY: the driver is loaded, so that this finds it by name; the buffer has the stated size.
    let code = unsafe {
        let driver = Library::new("libcuda.so.1").unwrap();
        driver.get::<Function>(function.as_bytes()).unwrap()(text.as_mut_ptr(), text.len(), &mut needed)
    };
    assert_eq!(code, 0);
    String::from_utf8(text[..needed - 1].to_vec()).unwrap()
}

/// All orders of the numbers below `count`.
fn orders(count: usize) -> Vec<Vec<usize>> {
    (0..count).fold(vec![vec![]], |orders, n| {
        let with = |order: &Vec<usize>, at| [&order[..at], &[n], &order[at..]].concat();
        orders.iter().flat_map(|order| (0..=n).map(move |at| with(order, at))).collect()
    })
}

/// A graph holds the buffers that its steps use.
fn graph_without_buffers() {
    let gpu = test_gpu::open();
    let (one, two) = (upload(&gpu, &[1u32; 8]), upload(&gpu, &[2u32; 8]));
    let pinned = gpu.pinned(32, "a test").unwrap();
    let record = || gpu.copy(&two, &one).and_then(|()| gpu.copy(&pinned.buffer, &two));
    let graph = gpu.capture(&mut || record()).unwrap();
    drop((one, two));
    gpu.replay(&graph).unwrap();
    assert_eq!(download::<u32>(&gpu, &pinned.buffer), [1; 8]);
}

/// A device with a graph under way, its buffers, page-locked memory and an event, dropped in every order.
#[test]
fn everything_is_released_in_whatever_order_it_is_dropped() {
    const ROWS: usize = 3;
    const HIDDEN: usize = 64;
    graph_without_buffers();
    for order in orders(6) {
        let gpu = test_gpu::open();
        let table = upload(&gpu, &[0x3f80u16; 2 * HIDDEN]);
        let tokens = upload(&gpu, &[1u32; ROWS]);
        let out = gpu.allocate(ROWS * HIDDEN * 4, "a test").unwrap();
        let pinned = gpu.pinned(out.bytes(), "a test").unwrap();
        let kernel = Embedding { rows: ROWS, hidden: HIDDEN, vocab: 2, packed: false, scale: 1.0 };
        let graph = gpu.capture(&mut || {
            kernel.launch(&gpu, &out, &table, &tokens)?;
            gpu.copy(&pinned.buffer, &out)
        });
        let graph = graph.unwrap();
        gpu.replay(&graph).unwrap();
        assert_eq!(download::<f32>(&gpu, &pinned.buffer), [1.0; ROWS * HIDDEN]);
        let event = gpu.record().unwrap();
        // Still running when the first of them is dropped.
        for _ in 0..3 {
            gpu.replay(&graph).unwrap();
        }
        let all: [Box<dyn Any>; 6] = [
            Box::new(gpu),
            Box::new([table, tokens]),
            Box::new(out),
            Box::new(pinned),
            Box::new(graph),
            Box::new(event),
        ];
        let mut all = all.map(Some);
        order.iter().for_each(|&n| all[n] = None);
        assert_eq!(answer("softgpuFaultReport"), "", "dropped in order {order:?}");
        let report: serde_json::Value = serde_json::from_str(&answer("softgpuCountersJson")).unwrap();
        let counts = report["unreleased"].as_object().unwrap();
        let left: Vec<_> = counts.iter().filter(|(_, count)| **count != 0).collect();
        assert!(left.is_empty(), "dropped in order {order:?}: {left:?}");
    }
}
