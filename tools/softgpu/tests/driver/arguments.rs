//! Null, stale and foreign handles; memory and its bounds.

use crate::api::*;
use std::ffi::c_void;
use std::ptr::{null, null_mut};

#[test]
fn handles_that_are_no_objects_are_errors() {
    isolated("arguments::handles_that_are_no_objects_are_errors", &[], |cuda| {
        let context = cuda.open();
        let (stream, module) = (cuda.stream(), cuda.module());
        let function = cuda.function(module, c"store");
        let (mut event, mut other, mut value, mut size, mut time) = (0, 0, 0, 0, 0f32);
        assert_eq!(cuda.cuEventCreate(&mut event, 0), SUCCESS);
        // Handles of other kinds are foreign everywhere.
        let foreign = [0, 2, 0x10, 0xdead, usize::MAX, context];
        for handle in foreign.into_iter().chain([stream, module, function]) {
            assert_eq!(cuda.cuEventRecord(handle, stream), INVALID_HANDLE);
            assert_eq!(cuda.cuEventSynchronize(handle), INVALID_HANDLE);
            assert_eq!(cuda.cuEventDestroy_v2(handle), INVALID_HANDLE);
            assert_eq!(cuda.cuEventElapsedTime_v2(&mut time, handle, event), INVALID_HANDLE);
            assert_eq!(cuda.cuGraphInstantiateWithFlags(&mut other, handle, 0), INVALID_VALUE);
            assert_eq!(cuda.cuGraphDestroy(handle), INVALID_VALUE);
            assert_eq!(cuda.cuGraphExecDestroy(handle), INVALID_VALUE);
            assert_eq!(cuda.cuGraphLaunch(handle, stream), INVALID_VALUE);
            assert_eq!(cuda.cuGraphUpload(handle, stream), INVALID_VALUE);
        }
        for handle in foreign.into_iter().chain([stream, event]) {
            assert_eq!(cuda.cuModuleGetFunction(&mut other, handle, c"store".as_ptr()), INVALID_HANDLE);
            assert_eq!(cuda.cuModuleUnload(handle), INVALID_HANDLE);
            assert_eq!(cuda.cuFuncLoad(handle), INVALID_HANDLE);
            assert_eq!(cuda.cuFuncGetAttribute(&mut value, 0, handle), INVALID_HANDLE);
            assert_eq!(cuda.cuFuncSetAttribute(handle, MAX_DYNAMIC_SHARED, 0), INVALID_HANDLE);
            assert_eq!(cuda.cuFuncGetParamInfo(handle, 0, &mut size, null_mut()), INVALID_HANDLE);
            assert_eq!(cuda.launch(Config::new(1, 1, stream), handle, 0, &[0]), INVALID_HANDLE);
        }
        // The null stream is 0 or 1.
        for handle in foreign.into_iter().skip(1).chain([event, module]) {
            assert_eq!(cuda.cuStreamSynchronize(handle), INVALID_HANDLE);
            assert_eq!(cuda.cuStreamDestroy_v2(handle), INVALID_HANDLE);
            assert_eq!(cuda.cuStreamBeginCapture_v2(handle, RELAXED), INVALID_HANDLE);
            assert_eq!(cuda.cuStreamEndCapture(handle, &mut other), INVALID_HANDLE);
            assert_eq!(cuda.cuEventRecord(event, handle), INVALID_HANDLE);
            assert_eq!(cuda.cuMemsetD8Async(0, 0, 0, handle), INVALID_HANDLE);
            assert_eq!(cuda.launch(Config::new(1, 1, handle), function, 0, &[0]), INVALID_HANDLE);
        }
        assert_eq!(cuda.cuStreamDestroy_v2(0), INVALID_HANDLE);
        assert_eq!(cuda.cuCtxSetCurrent(stream), INVALID_CONTEXT);
    });
}

#[test]
fn destroyed_objects_cannot_be_used_or_destroyed_again() {
    isolated("arguments::destroyed_objects_cannot_be_used_or_destroyed_again", &[], |cuda| {
        cuda.open();
        let (stream, module, mut event) = (cuda.stream(), cuda.module(), 0);
        let function = cuda.function(module, c"store");
        assert_eq!(cuda.cuEventCreate(&mut event, 0), SUCCESS);
        assert_eq!(cuda.cuEventDestroy_v2(event), SUCCESS);
        assert_eq!(cuda.cuEventDestroy_v2(event), INVALID_HANDLE);
        assert_eq!(cuda.cuModuleUnload(module), SUCCESS);
        assert_eq!(cuda.cuModuleUnload(module), INVALID_HANDLE);
        assert_eq!(cuda.cuFuncLoad(function), INVALID_HANDLE);
        assert_eq!(cuda.cuStreamDestroy_v2(stream), SUCCESS);
        assert_eq!(cuda.cuStreamDestroy_v2(stream), INVALID_HANDLE);
        assert_eq!(cuda.cuStreamSynchronize(stream), INVALID_HANDLE);
    });
}

#[test]
fn null_results_are_errors() {
    isolated("arguments::null_results_are_errors", &[], |cuda| {
        assert_eq!(cuda.cuDriverGetVersion(null_mut()), INVALID_VALUE);
        assert_eq!(cuda.cuGetErrorName(0, null_mut()), INVALID_VALUE);
        cuda.open();
        let (stream, module) = (cuda.stream(), cuda.module());
        let function = cuda.function(module, c"store");
        let results = [
            cuda.cuDeviceGetCount(null_mut()),
            cuda.cuDeviceGet(null_mut(), 0),
            cuda.cuDeviceGetName(null_mut(), 9, 0),
            cuda.cuDeviceTotalMem_v2(null_mut(), 0),
            cuda.cuDeviceGetPCIBusId(null_mut(), 20, 0),
            cuda.cuDeviceGetAttribute(null_mut(), 1, 0),
            cuda.cuDevicePrimaryCtxRetain(null_mut(), 0),
            cuda.cuMemGetInfo_v2(null_mut(), null_mut()),
            cuda.cuMemAlloc_v2(null_mut(), 4),
            cuda.cuMemHostAlloc(null_mut(), 4, 0),
            cuda.cuMemHostGetDevicePointer_v2(null_mut(), cuda.host(1).cast(), 0),
            cuda.cuModuleLoadDataEx(null_mut(), c"".as_ptr().cast(), 0, null(), null_mut()),
            cuda.cuModuleGetFunction(null_mut(), module, c"store".as_ptr()),
            cuda.cuModuleGetFunction(&mut 0, module, null()),
            cuda.cuFuncGetAttribute(null_mut(), 0, function),
            cuda.cuFuncGetParamInfo(function, 0, null_mut(), null_mut()),
            cuda.cuLaunchKernelEx(null(), function, null(), null()),
            cuda.cuStreamCreate(null_mut(), 0),
            cuda.cuStreamEndCapture(stream, null_mut()),
            cuda.cuGraphInstantiateWithFlags(null_mut(), 0, 0),
            cuda.cuEventCreate(null_mut(), 0),
            cuda.cuEventElapsedTime_v2(null_mut(), 0, 0),
            cuda.softgpuCountersJson(null_mut(), 1, null_mut()),
            cuda.softgpuFaultReport(null_mut(), 0, null_mut()),
        ];
        assert_eq!(results, [INVALID_VALUE; 24]);
    });
}

#[test]
fn flags_that_do_not_exist_are_errors() {
    isolated("arguments::flags_that_do_not_exist_are_errors", &[], |cuda| {
        cuda.open();
        let host = cuda.host(1).cast::<c_void>();
        assert_eq!(cuda.cuStreamCreate(&mut 0, 2), INVALID_VALUE);
        assert_eq!(cuda.cuEventCreate(&mut 0, 8), INVALID_VALUE);
        assert_eq!(cuda.cuMemHostAlloc(&mut null_mut(), 4, 8), INVALID_VALUE);
        assert_eq!(cuda.cuMemHostGetDevicePointer_v2(&mut 0, host, 1), INVALID_VALUE);
        assert_eq!(cuda.cuGraphInstantiateWithFlags(&mut 0, 0, 16), INVALID_VALUE);
        assert_eq!(cuda.cuStreamBeginCapture_v2(cuda.stream(), 3), INVALID_VALUE);
    });
}

#[test]
fn memory_is_freed_once_by_its_own_address_and_function() {
    isolated("arguments::memory_is_freed_once_by_its_own_address_and_function", &[], |cuda| {
        cuda.open();
        let (device, host) = (cuda.alloc(64), cuda.host(16));
        for wrong in [0, device + 4, device - 1, host as u64, u64::MAX] {
            assert_eq!(cuda.cuMemFree_v2(wrong), INVALID_VALUE, "{wrong:#x}");
        }
        for wrong in [null_mut(), host.wrapping_add(1).cast(), device as *mut c_void] {
            assert_eq!(cuda.cuMemFreeHost(wrong), INVALID_VALUE, "{wrong:?}");
        }
        assert_eq!(cuda.cuMemFree_v2(device), SUCCESS);
        assert_eq!(cuda.cuMemFree_v2(device), INVALID_VALUE);
        assert_eq!(cuda.cuMemFreeHost(host.cast()), SUCCESS);
        assert_eq!(cuda.cuMemFreeHost(host.cast()), INVALID_VALUE);
        assert_eq!(cuda.cuMemAlloc_v2(&mut 0, 0), INVALID_VALUE);
        assert_eq!(cuda.cuMemHostAlloc(&mut null_mut(), 0, 0), INVALID_VALUE);
    });
}

#[test]
fn memory_runs_out_at_the_cards_size() {
    let variables = [("SOFTGPU_MEMORY", "1000")];
    isolated("arguments::memory_runs_out_at_the_cards_size", &variables, |cuda| {
        cuda.open();
        let info = || {
            let (mut free, mut total) = (0, 0);
            assert_eq!(cuda.cuMemGetInfo_v2(&mut free, &mut total), SUCCESS);
            (free, total)
        };
        assert_eq!(info(), (1000, 1000));
        let one = cuda.alloc(900);
        assert_eq!(info(), (100, 1000));
        assert_eq!(cuda.cuMemAlloc_v2(&mut 0, 101), OUT_OF_MEMORY);
        cuda.host(1000);
        assert_eq!(cuda.cuMemFree_v2(one), SUCCESS);
        assert_eq!(info(), (1000, 1000));
        assert_eq!(cuda.cuMemAlloc_v2(&mut 0, usize::MAX), OUT_OF_MEMORY);
        cuda.alloc(1000);
    });
}

#[test]
fn a_function_fails_from_a_chosen_call_on() {
    let variables = [("SOFTGPU_FAIL", "cuMemAlloc_v2:2")];
    isolated("arguments::a_function_fails_from_a_chosen_call_on", &variables, |cuda| {
        cuda.open();
        cuda.alloc(4);
        for _ in 0..2 {
            assert_eq!(cuda.cuMemAlloc_v2(&mut 0, 4), OUT_OF_MEMORY);
        }
        // Other functions and the context work on.
        cuda.host(1);
        assert_eq!(cuda.cuStreamSynchronize(cuda.stream()), SUCCESS);
    });
}

#[test]
fn a_call_that_fails_by_choice_does_nothing() {
    let variables = [("SOFTGPU_FAIL", "cuMemsetD8Async:1")];
    isolated("arguments::a_call_that_fails_by_choice_does_nothing", &variables, |cuda| {
        cuda.open();
        let (stream, p) = (cuda.stream(), cuda.alloc(4));
        cuda.write(p, &[5], stream);
        assert_eq!(cuda.cuMemsetD8Async(p, 0, 4, stream), OUT_OF_MEMORY);
        assert_eq!(cuda.read::<1>(p, stream), [5]);
    });
}

#[test]
fn copies_and_fills_move_bytes_and_stay_in_bounds() {
    isolated("arguments::copies_and_fills_move_bytes_and_stay_in_bounds", &[], |cuda| {
        cuda.open();
        let (stream, one, two) = (cuda.stream(), cuda.alloc(16), cuda.alloc(16));
        cuda.write(one, &[1, 2, 3, 4], stream);
        assert_eq!(cuda.cuMemcpyDtoDAsync_v2(two + 4, one, 12, stream), SUCCESS);
        assert_eq!(cuda.cuMemsetD8Async(two, 0xab, 4, stream), SUCCESS);
        assert_eq!(cuda.read::<4>(two, stream), [0xabab_abab, 1, 2, 3]);
        let mut words = [0u32; 8];
        let host = words.as_mut_ptr().cast::<c_void>();
        for (address, bytes) in
            [(one, 17), (one + 16, 1), (one - 1, 1), (0, 4), (host as u64, 4), (u64::MAX, 4)]
        {
            assert_eq!(
                cuda.cuMemcpyHtoDAsync_v2(address, host, bytes, stream),
                INVALID_VALUE,
                "{address:#x}"
            );
            assert_eq!(
                cuda.cuMemcpyDtoHAsync_v2(host, address, bytes, stream),
                INVALID_VALUE,
                "{address:#x}"
            );
            assert_eq!(cuda.cuMemcpyDtoDAsync_v2(two, address, bytes, stream), INVALID_VALUE, "{address:#x}");
            assert_eq!(cuda.cuMemcpyDtoDAsync_v2(address, two, bytes, stream), INVALID_VALUE, "{address:#x}");
            assert_eq!(cuda.cuMemsetD8Async(address, 0, bytes, stream), INVALID_VALUE, "{address:#x}");
            // No bytes are nowhere out of bounds.
            assert_eq!(cuda.cuMemsetD8Async(address, 0, 0, stream), SUCCESS);
        }
        assert_eq!(cuda.cuMemcpyHtoDAsync_v2(one, null(), 4, stream), INVALID_VALUE);
        assert_eq!(cuda.cuMemcpyDtoHAsync_v2(null_mut(), one, 4, stream), INVALID_VALUE);
        assert_eq!(cuda.cuStreamSynchronize(stream), SUCCESS);
    });
}

#[test]
fn page_locked_memory_has_its_own_address_on_the_device() {
    isolated("arguments::page_locked_memory_has_its_own_address_on_the_device", &[], |cuda| {
        cuda.open();
        let (stream, host, mut address) = (cuda.stream(), cuda.host(4), 0);
        let inner = host.wrapping_add(1);
        assert_eq!(cuda.cuMemHostGetDevicePointer_v2(&mut address, inner.cast(), 0), SUCCESS);
        assert_eq!(address, inner as u64);
        assert_eq!(cuda.cuMemsetD8Async(address, 7, 4, stream), SUCCESS);
        assert_eq!(cuda.cuStreamSynchronize(stream), SUCCESS);
        // SAFETY: the allocation has 4 words, and no work is left.
        assert_eq!(unsafe { std::slice::from_raw_parts(host, 4) }, [0, 0x0707_0707, 0, 0]);
        for wrong in [null_mut(), host.wrapping_add(4).cast(), (&raw mut address).cast()] {
            assert_eq!(cuda.cuMemHostGetDevicePointer_v2(&mut 0, wrong, 0), INVALID_VALUE);
        }
    });
}
