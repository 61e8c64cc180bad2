//! Modules, the limits of a launch, and faults.

use crate::api::*;
use std::ffi::c_void;
use std::ptr::{null, null_mut};

#[test]
fn images_that_are_not_usable_ptx_are_explained() {
    isolated("launches::images_that_are_not_usable_ptx_are_explained", &[], |cuda| {
        cuda.open();
        let head = ".version 8.0\n.target sm_80\n.address_size 64\n";
        let cases: [(Vec<u8>, i32, &str); 6] = [
            (
                b"\x7fELF\x02\x01".to_vec(),
                NO_BINARY_FOR_GPU,
                "the image is machine code of a GPU (cubin or fatbin), expected PTX",
            ),
            (
                b"\x50\xed\x55\xba".to_vec(),
                NO_BINARY_FOR_GPU,
                "the image is machine code of a GPU (cubin or fatbin), expected PTX",
            ),
            (b"\xff\xfe".to_vec(), INVALID_PTX, "the PTX is not UTF-8"),
            (b"hello".to_vec(), INVALID_PTX, "ptx line 1: "),
            (
                b".version 9.9\n.target sm_80\n".to_vec(),
                UNSUPPORTED_PTX_VERSION,
                "the PTX has version 9.9, this driver knows versions up to 9.0",
            ),
            (
                format!("{head}.visible .entry k()\n{{\n    frobnicate.u32;\n    ret;\n}}\n").into_bytes(),
                INVALID_PTX,
                "frobnicate",
            ),
        ];
        for (image, expected, sentence) in cases {
            let (code, _, log) = cuda.load(image);
            assert_eq!(code, expected, "{log}");
            assert!(log.contains(sentence), "{log}");
        }
        // A short log is cut, and options are checked.
        let (mut module, mut log) = (0, [1u8; 8]);
        let mut values = [log.as_mut_ptr() as usize, 5];
        let load = |module: &mut usize, options: &[i32], values: *mut usize| {
            cuda.cuModuleLoadDataEx(
                module,
                c"hello".as_ptr().cast(),
                options.len() as u32,
                options.as_ptr(),
                values,
            )
        };
        assert_eq!(load(&mut module, &[5, 6], values.as_mut_ptr()), INVALID_PTX);
        assert_eq!((&log[..4], log[4], log[5]), (&b"ptx "[..], 0, 1));
        assert_eq!(load(&mut module, &[34, 6], values.as_mut_ptr()), INVALID_VALUE);
        assert_eq!(load(&mut module, &[5], null_mut()), INVALID_VALUE);
        assert_eq!(cuda.cuModuleLoadDataEx(&mut module, null(), 0, null(), null_mut()), INVALID_VALUE);
    });
}

#[test]
fn functions_answer_for_their_kernel() {
    isolated("launches::functions_answer_for_their_kernel", &[], |cuda| {
        cuda.open();
        let module = cuda.module();
        assert_eq!(cuda.cuModuleGetFunction(&mut 0, module, c"nothing".as_ptr()), NOT_FOUND);
        let add = cuda.function(module, c"add");
        assert_eq!(cuda.function(module, c"add"), add);
        assert_eq!(cuda.cuFuncLoad(add), SUCCESS);
        let mut parameters = Vec::new();
        let (mut offset, mut bytes) = (0, 0);
        while cuda.cuFuncGetParamInfo(add, parameters.len(), &mut offset, &mut bytes) == SUCCESS {
            parameters.push((offset, bytes));
        }
        assert_eq!(parameters, [(0, 8), (8, 4), (12, 4)]);
        let get = |number, function| {
            let mut value = -1;
            assert_eq!(cuda.cuFuncGetAttribute(&mut value, number, function), SUCCESS);
            value
        };
        assert_eq!(get(0, add), 1024);
        assert_eq!(get(0, cuda.function(module, c"narrow")), 64);
        assert_eq!((get(1, add), get(6, add), get(MAX_DYNAMIC_SHARED, add)), (0, 90, 49152));
        assert!(get(4, add) > 0);
        // A variable of the module takes shared memory of the kernels that use it.
        let shares = cuda.function(module, c"shares");
        assert_eq!((get(1, shares), get(MAX_DYNAMIC_SHARED, shares)), (512, 48640));
        assert_eq!(cuda.cuFuncGetAttribute(&mut 0, 7, add), NOT_SUPPORTED);
        assert_eq!(cuda.cuFuncGetAttribute(&mut 0, 16, add), INVALID_VALUE);
        for (number, value) in [(MAX_DYNAMIC_SHARED, 232_449), (MAX_DYNAMIC_SHARED, -1), (9, 101), (0, 32)] {
            assert_eq!(cuda.cuFuncSetAttribute(add, number, value), INVALID_VALUE, "{number}={value}");
        }
        assert_eq!(cuda.cuFuncSetAttribute(add, MAX_DYNAMIC_SHARED, 232_448), SUCCESS);
        assert_eq!(get(MAX_DYNAMIC_SHARED, add), 232_448);
    });
}

#[test]
fn a_launch_stays_within_the_limits_of_gpu_and_kernel() {
    isolated("launches::a_launch_stays_within_the_limits_of_gpu_and_kernel", &[], |cuda| {
        cuda.open();
        let (stream, module, p) = (cuda.stream(), cuda.module(), cuda.alloc(4));
        let [add, narrow, stop] = [c"add", c"narrow", c"stop"].map(|name| cuda.function(module, name));
        let base = Config::new(1, 1, stream);
        let wrong = [
            Config { grid: [0, 1, 1], ..base },
            Config { grid: [1 << 31, 1, 1], ..base },
            Config { grid: [1, 65536, 1], ..base },
            Config { grid: [1, 1, 65536], ..base },
            Config { block: [1, 0, 1], ..base },
            Config { block: [1025, 1, 1], ..base },
            Config { block: [32, 33, 1], ..base },
            Config { block: [1, 1, 65], ..base },
            Config { block: [1 << 31, 1 << 31, 4], ..base },
            Config { shared: 49153, ..base },
            Config { attribute_count: 1, ..base },
        ];
        for config in wrong {
            assert_eq!(
                cuda.launch(config, add, p, &[0, 0]),
                INVALID_VALUE,
                "{:?} {:?}",
                config.grid,
                config.block
            );
        }
        assert_eq!(cuda.launch(Config { block: [65, 1, 1], ..base }, narrow, p, &[]), INVALID_VALUE);
        assert_eq!(cuda.launch(Config { block: [64, 1, 1], ..base }, narrow, p, &[]), SUCCESS);
        assert_eq!(
            cuda.launch(Config { grid: [3, 2, 1], block: [32, 32, 1], ..base }, add, p, &[0, 0]),
            SUCCESS
        );
        // A cluster of blocks is not supported, and priority 8 and the ignored attribute 0 change nothing.
        let attribute = |id| Attribute { id, padding: 0, value: [1; 16] };
        let with = |attributes: &[Attribute]| {
            let config =
                Config { attributes: attributes.as_ptr(), attribute_count: attributes.len() as u32, ..base };
            cuda.launch(config, add, p, &[0, 0])
        };
        assert_eq!(with(&[attribute(0), attribute(8)]), SUCCESS);
        assert_eq!(with(&[attribute(0), attribute(4)]), NOT_SUPPORTED);
        assert_eq!(cuda.cuStreamSynchronize(stream), SUCCESS);
        // Parameters: none at all, one that is null, and a kernel that needs none.
        assert_eq!(cuda.cuLaunchKernelEx(&base, add, null(), null()), INVALID_VALUE);
        let two: [*const c_void; 3] = [(&raw const p).cast(), null(), null()];
        assert_eq!(cuda.cuLaunchKernelEx(&base, add, two.as_ptr(), null()), INVALID_VALUE);
        assert_eq!(cuda.cuLaunchKernelEx(&base, stop, null(), null()), SUCCESS);
    });
}

#[test]
fn parameters_in_one_buffer_must_have_the_kernels_size() {
    isolated("launches::parameters_in_one_buffer_must_have_the_kernels_size", &[], |cuda| {
        cuda.open();
        let (stream, module, p) = (cuda.stream(), cuda.module(), cuda.alloc(4));
        let store = cuda.function(module, c"store");
        let mut buffer = p.to_le_bytes().to_vec();
        buffer.extend(77u32.to_le_bytes());
        let launch = |bytes: usize, kind: usize| {
            let extra = [1, buffer.as_ptr() as usize, kind, &raw const bytes as usize, 0];
            cuda.cuLaunchKernelEx(&Config::new(1, 1, stream), store, null(), extra.as_ptr().cast())
        };
        assert_eq!(launch(8, 2), INVALID_VALUE);
        assert_eq!(launch(16, 2), INVALID_VALUE);
        assert_eq!(launch(12, 3), INVALID_VALUE);
        assert_eq!(launch(12, 2), SUCCESS);
        assert_eq!(cuda.read::<1>(p, stream), [77]);
    });
}

#[test]
fn more_than_48_kib_of_shared_memory_needs_the_attribute() {
    let variables = [("SOFTGPU_CARD", "rtx4090")];
    isolated("launches::more_than_48_kib_of_shared_memory_needs_the_attribute", &variables, |cuda| {
        cuda.open();
        let (stream, module, p) = (cuda.stream(), cuda.module(), cuda.alloc(8));
        let carry = cuda.function(module, c"carry");
        let launch =
            |bytes| cuda.launch(Config { shared: bytes, ..Config::new(1, 1, stream) }, carry, p, &[bytes]);
        cuda.write(p, &[5, 0], stream);
        assert_eq!(launch(49152), SUCCESS);
        assert_eq!(launch(49156), INVALID_VALUE);
        assert_eq!(cuda.cuFuncSetAttribute(carry, MAX_DYNAMIC_SHARED, 101_377), INVALID_VALUE);
        assert_eq!(cuda.cuFuncSetAttribute(carry, MAX_DYNAMIC_SHARED, 101_376), SUCCESS);
        cuda.write(p, &[6, 0], stream);
        assert_eq!(launch(101_376), SUCCESS);
        assert_eq!(cuda.read::<2>(p, stream), [6, 6]);
        assert_eq!(launch(101_377), INVALID_VALUE);
    });
}

#[test]
fn module_variables_last_as_long_as_their_module() {
    isolated("launches::module_variables_last_as_long_as_their_module", &[], |cuda| {
        cuda.open();
        let (stream, p) = (cuda.stream(), cuda.alloc(4));
        let run = |module| {
            let count = cuda.function(module, c"count");
            assert_eq!(cuda.launch(Config::new(1, 1, stream), count, p, &[]), SUCCESS);
            cuda.read::<1>(p, stream)[0]
        };
        let (one, two) = (cuda.module(), cuda.module());
        assert_eq!([run(one), run(one), run(two)], [1, 2, 1]);
        assert_eq!(cuda.cuModuleUnload(one), SUCCESS);
        assert_eq!([run(two), run(cuda.module())], [2, 1]);
    });
}

/// What every call returns after a fault of `kernel`, launched with `offset` bytes added to the address of 16
/// bytes.
fn fault(cuda: &Cuda, kernel: &std::ffi::CStr, offset: u64, expected: i32) {
    let context = cuda.open();
    let (stream, module, p, host) = (cuda.stream(), cuda.module(), cuda.alloc(16), cuda.host(1));
    let function = cuda.function(module, kernel);
    let launch = || cuda.launch(Config::new(1, 1, stream), function, p + offset, &[1]);
    assert_eq!(launch(), SUCCESS);
    assert_eq!(cuda.cuStreamSynchronize(stream), expected);
    let mut word = [0u32];
    let sticky = [
        launch(),
        cuda.cuStreamSynchronize(stream),
        cuda.cuMemAlloc_v2(&mut 0, 4),
        cuda.cuMemFree_v2(p),
        cuda.cuMemFreeHost(host.cast()),
        cuda.cuMemcpyDtoHAsync_v2(word.as_mut_ptr().cast(), p, 4, stream),
        cuda.cuMemsetD8Async(p, 0, 4, stream),
        cuda.cuStreamCreate(&mut 0, 1),
        cuda.cuStreamBeginCapture_v2(stream, RELAXED),
        cuda.cuEventCreate(&mut 0, 0),
        cuda.cuModuleGetFunction(&mut 0, module, c"add".as_ptr()),
        cuda.cuCtxSetCurrent(context),
        cuda.cuProfilerStart(),
        cuda.cuProfilerStop(),
    ];
    assert_eq!(sticky, [expected; 14]);
    let report = cuda.answer(|to, bytes, needed| cuda.softgpuFaultReport(to, bytes, needed));
    assert!(report.contains(kernel.to_str().unwrap()), "{report}");
    // The next context works.
    assert_eq!(cuda.cuDevicePrimaryCtxRelease_v2(0), SUCCESS);
    cuda.retain();
    assert_eq!(cuda.cuStreamSynchronize(cuda.stream()), SUCCESS);
}

#[test]
fn an_access_out_of_bounds_is_the_answer_to_every_later_call() {
    let printed =
        isolated("launches::an_access_out_of_bounds_is_the_answer_to_every_later_call", &[], |cuda| {
            fault(cuda, c"store", 16, ILLEGAL_ADDRESS);
        });
    assert_eq!(
        printed.matches("0 bytes past the end of allocation 1 (16 bytes, cuMemAlloc)").count(),
        1,
        "{printed}"
    );
}

#[test]
fn a_misaligned_access_is_the_answer_to_every_later_call() {
    isolated("launches::a_misaligned_access_is_the_answer_to_every_later_call", &[], |cuda| {
        fault(cuda, c"store", 2, MISALIGNED_ADDRESS);
    });
}

#[test]
fn a_trap_is_the_answer_to_every_later_call() {
    isolated("launches::a_trap_is_the_answer_to_every_later_call", &[], |cuda| {
        fault(cuda, c"stop", 0, LAUNCH_FAILED);
    });
}
