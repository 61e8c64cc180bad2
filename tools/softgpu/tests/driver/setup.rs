//! Settings, devices, contexts, and the launcher.

use crate::api::*;
use std::ffi::{CStr, CString};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::ptr::null;

fn attribute(cuda: &Cuda, number: i32) -> i32 {
    let mut value = -1;
    assert_eq!(cuda.cuDeviceGetAttribute(&mut value, number, 0), SUCCESS, "attribute {number}");
    value
}

#[test]
fn the_library_has_the_functions_that_are_called_and_no_others() {
    let library = Path::new(env!("CARGO_BIN_EXE_softgpu")).with_file_name("deps/libsoftgpu.so");
    let symbols =
        Command::new("nm").args(["-D", "--defined-only"]).arg(&library).output().expect("nm is installed");
    let mut symbols: Vec<_> =
        text(&symbols).lines().map(|line| line.split(' ').next_back().unwrap().to_string()).collect();
    symbols.sort_unstable();
    let mut names = NAMES.to_vec();
    names.sort_unstable();
    assert_eq!(symbols, names);
}

/// A test can load the driver in its own process, before a program's code asks the loader for it.
#[test]
fn a_library_that_is_open_is_found_by_the_drivers_name() {
    let address = |name: &Path| {
        // SAFETY: the library has no constructors, and stays loaded.
        let library = unsafe { libloading::Library::new(name) }.unwrap();
        // SAFETY: only the address is used.
        unsafe { *library.get::<extern "C" fn()>(b"softgpuCountersReset").unwrap() as usize }
    };
    let file = Path::new(env!("CARGO_BIN_EXE_softgpu")).with_file_name("deps/libsoftgpu.so");
    assert_eq!(address(&file), address(Path::new("libcuda.so.1")));
}

#[test]
fn without_a_device_the_driver_does_not_start() {
    isolated("setup::without_a_device_the_driver_does_not_start", &[("SOFTGPU_DEVICES", "0")], |cuda| {
        assert_eq!(cuda.cuInit(0), NO_DEVICE);
        assert_eq!(cuda.cuDeviceGetCount(&mut 0), NOT_INITIALIZED);
    });
}

#[test]
fn every_gpu_has_memory_of_its_own() {
    isolated("setup::every_gpu_has_memory_of_its_own", &[("SOFTGPU_DEVICES", "2")], |cuda| {
        let (mut count, mut contexts, mut address) = (0, [0; 2], 0);
        assert_eq!((cuda.cuInit(0), cuda.cuDeviceGetCount(&mut count), count), (SUCCESS, SUCCESS, 2));
        for (gpu, context) in contexts.iter_mut().enumerate() {
            assert_eq!(cuda.cuDevicePrimaryCtxRetain(context, gpu as i32), SUCCESS);
        }
        assert_eq!(cuda.cuDevicePrimaryCtxRetain(&mut 0, 2), INVALID_DEVICE);
        assert_eq!(
            (cuda.cuCtxSetCurrent(contexts[1]), cuda.cuMemAlloc_v2(&mut address, 1 << 20)),
            (SUCCESS, SUCCESS)
        );
        let used = contexts.map(|context| {
            let (mut free, mut total) = (0, 0);
            assert_eq!(
                (cuda.cuCtxSetCurrent(context), cuda.cuMemGetInfo_v2(&mut free, &mut total)),
                (SUCCESS, SUCCESS)
            );
            total - free
        });
        assert_eq!(used, [0, 1 << 20]);
        // The other context stays.
        assert_eq!(
            (cuda.cuDevicePrimaryCtxRelease_v2(1), cuda.cuCtxSetCurrent(contexts[1])),
            (SUCCESS, INVALID_CONTEXT)
        );
        assert_eq!(
            (cuda.cuDevicePrimaryCtxRelease_v2(1), cuda.cuCtxSetCurrent(contexts[0])),
            (INVALID_CONTEXT, SUCCESS)
        );
    });
}

#[test]
fn the_drivers_version_can_be_old() {
    isolated("setup::the_drivers_version_can_be_old", &[("SOFTGPU_DRIVER_VERSION", "12040")], |cuda| {
        let mut version = 0;
        assert_eq!((cuda.cuDriverGetVersion(&mut version), version), (SUCCESS, 12040));
        cuda.open();
        let ptx = |version: &str| cuda.load(format!(".version {version}\n.target sm_80\n.address_size 64\n"));
        assert_eq!(ptx("8.4").0, SUCCESS);
        let (code, _, log) = ptx("8.5");
        assert_eq!(
            (code, log.as_str()),
            (UNSUPPORTED_PTX_VERSION, "the PTX has version 8.5, this driver knows versions up to 8.4")
        );
    });
}

#[test]
fn a_variable_without_meaning_is_named() {
    let printed =
        isolated("setup::a_variable_without_meaning_is_named", &[("SOFTGPU_CARD", "voodoo2")], |cuda| {
            assert_eq!(cuda.cuInit(0), INVALID_VALUE);
            assert_eq!(cuda.cuDriverGetVersion(&mut 0), INVALID_VALUE);
        });
    let sentence = "softgpu: SOFTGPU_CARD=voodoo2: no card has this name, expected one of t4, a100, ";
    assert_eq!(printed.matches(sentence).count(), 1, "{printed}");
}

#[test]
fn a_failure_without_a_number_is_refused() {
    let printed = isolated(
        "setup::a_failure_without_a_number_is_refused",
        &[("SOFTGPU_FAIL", "cuMemAlloc_v2")],
        |cuda| assert_eq!(cuda.cuInit(0), INVALID_VALUE),
    );
    let sentence = "softgpu: SOFTGPU_FAIL=cuMemAlloc_v2: expected FUNCTION:N, as cuMemAlloc_v2:3";
    assert_eq!(printed.matches(sentence).count(), 1, "{printed}");
}

#[test]
fn the_card_is_chosen_by_name() {
    fn check(cuda: &Cuda) {
        assert_eq!(cuda.cuInit(0), SUCCESS);
        let name = std::env::var("SOFTGPU_CARD").unwrap();
        let expected = match name.as_str() {
            "t4" => [7, 5, 40, 65_536],
            "a100" => [8, 0, 108, 166_912],
            "rtx4090" => [8, 9, 128, 101_376],
            "l40s" => [8, 9, 142, 101_376],
            "h100" | "h200" => [9, 0, 132, 232_448],
            "b200" => [10, 0, 148, 232_448],
            "rtx5090" => [12, 0, 170, 101_376],
            _ => panic!("{name}"),
        };
        assert_eq!([75, 76, 16, 97].map(|number| attribute(cuda, number)), expected, "{name}");
        let mut text = [1u8; 64];
        assert_eq!(cuda.cuDeviceGetName(text.as_mut_ptr(), 64, 0), SUCCESS);
        assert_eq!(
            CStr::from_bytes_until_nul(&text).unwrap().to_str(),
            Ok(format!("software GPU ({name})").as_str())
        );
        let mut bytes = 0;
        assert_eq!((cuda.cuDeviceTotalMem_v2(&mut bytes, 0), bytes), (SUCCESS, 1 << 30));
    }
    for card in ["t4", "a100", "rtx4090", "l40s", "h100", "h200", "b200", "rtx5090"] {
        let variables = [("SOFTGPU_CARD", card), ("SOFTGPU_MEMORY", "1073741824")];
        isolated("setup::the_card_is_chosen_by_name", &variables, check);
    }
}

#[test]
fn nothing_works_before_the_driver_is_initialized() {
    isolated("setup::nothing_works_before_the_driver_is_initialized", &[], |cuda| {
        assert_eq!(cuda.cuInit(1), INVALID_VALUE);
        assert_eq!(cuda.cuDeviceGet(&mut 0, 0), NOT_INITIALIZED);
        assert_eq!(cuda.cuDevicePrimaryCtxRetain(&mut 0, 0), NOT_INITIALIZED);
        assert_eq!(cuda.cuCtxSetCurrent(0), NOT_INITIALIZED);
        assert_eq!(cuda.cuMemAlloc_v2(&mut 0, 4), NOT_INITIALIZED);
        assert_eq!(cuda.cuStreamCreate(&mut 0, 1), NOT_INITIALIZED);
        assert_eq!(cuda.cuInit(0), SUCCESS);
        assert_eq!(cuda.cuMemAlloc_v2(&mut 0, 4), INVALID_CONTEXT);
    });
}

#[test]
fn devices_answer_within_their_bounds() {
    isolated("setup::devices_answer_within_their_bounds", &[], |cuda| {
        assert_eq!(cuda.cuInit(0), SUCCESS);
        let (mut count, mut device) = (0, 7);
        assert_eq!((cuda.cuDeviceGetCount(&mut count), count), (SUCCESS, 1));
        assert_eq!((cuda.cuDeviceGet(&mut device, 0), device), (SUCCESS, 0));
        for wrong in [-1, 1, i32::MAX] {
            assert_eq!(cuda.cuDeviceGet(&mut device, wrong), INVALID_DEVICE);
            assert_eq!(cuda.cuDeviceGetAttribute(&mut device, 75, wrong), INVALID_DEVICE);
            assert_eq!(cuda.cuDevicePrimaryCtxRetain(&mut 0, wrong), INVALID_DEVICE);
        }
        assert_eq!(cuda.cuDeviceGetAttribute(&mut device, 21, 0), NOT_SUPPORTED);
        for wrong in [-1, 0, 163] {
            assert_eq!(cuda.cuDeviceGetAttribute(&mut device, wrong, 0), INVALID_VALUE);
        }
        // A name that does not fit is cut.
        let mut name = [1u8; 6];
        assert_eq!(cuda.cuDeviceGetName(name.as_mut_ptr(), 5, 0), SUCCESS);
        assert_eq!(&name, b"soft\0\x01");
        assert_eq!(cuda.cuDeviceGetName(name.as_mut_ptr(), 0, 0), INVALID_VALUE);
        let mut id = [1u8; 13];
        assert_eq!(cuda.cuDeviceGetPCIBusId(id.as_mut_ptr(), 12, 0), INVALID_VALUE);
        assert_eq!(cuda.cuDeviceGetPCIBusId(id.as_mut_ptr(), 13, 0), SUCCESS);
        assert_eq!(&id, b"0000:00:00.0\0");
    });
}

#[test]
fn errors_have_names() {
    isolated("setup::errors_have_names", &[], |cuda| {
        let mut name = null();
        assert_eq!(cuda.cuGetErrorName(700, &mut name), SUCCESS);
        // SAFETY: the driver's names last.
        assert_eq!(unsafe { CStr::from_ptr(name) }, c"CUDA_ERROR_ILLEGAL_ADDRESS");
        assert_eq!(cuda.cuGetErrorString(700, &mut name), SUCCESS);
        // SAFETY: as above.
        assert_eq!(unsafe { CStr::from_ptr(name) }, c"an illegal memory access was encountered");
        assert_eq!((cuda.cuGetErrorName(12345, &mut name), name), (INVALID_VALUE, null()));
    });
}

#[test]
fn the_context_lives_until_its_last_release() {
    isolated("setup::the_context_lives_until_its_last_release", &[], |cuda| {
        let context = cuda.open();
        assert_eq!(cuda.retain(), context);
        let (address, stream) = (cuda.alloc(16), cuda.stream());
        assert_eq!(cuda.cuDevicePrimaryCtxRelease_v2(0), SUCCESS);
        assert_eq!(cuda.cuStreamSynchronize(stream), SUCCESS);
        assert_eq!(cuda.cuDevicePrimaryCtxRelease_v2(0), SUCCESS);
        assert_eq!(cuda.cuMemFree_v2(address), CONTEXT_IS_DESTROYED);
        assert_eq!(cuda.cuCtxSetCurrent(context), INVALID_CONTEXT);
        assert_eq!(cuda.cuDevicePrimaryCtxRelease_v2(0), INVALID_CONTEXT);
        // What belonged to the old context is unknown to a new one.
        assert_ne!(cuda.retain(), context);
        assert_eq!(cuda.cuStreamSynchronize(stream), INVALID_HANDLE);
        assert_eq!(cuda.cuMemFree_v2(address), INVALID_VALUE);
        assert_eq!(cuda.cuCtxSetCurrent(0), SUCCESS);
        assert_eq!(cuda.cuMemAlloc_v2(&mut 0, 4), INVALID_CONTEXT);
    });
}

#[test]
fn a_thread_has_no_context_until_it_sets_one() {
    isolated("setup::a_thread_has_no_context_until_it_sets_one", &[], |cuda| {
        let context = cuda.open();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert_eq!(cuda.cuMemAlloc_v2(&mut 0, 4), INVALID_CONTEXT);
                assert_eq!(cuda.cuCtxSetCurrent(context), SUCCESS);
                cuda.alloc(4);
            });
        });
    });
}

#[test]
fn the_launcher_refuses_what_it_cannot_run() {
    let cases: [(&[&str], &str); 7] = [
        (&[], "expected: softgpu run"),
        (&["run"], "expected a program after --"),
        (&["run", "--card"], "--card: expected a value"),
        (
            &["run", "--card", "voodoo2", "--", "true"],
            "--card voodoo2: no card has this name, expected one of",
        ),
        (&["run", "--schedule", "fast", "--", "true"], "--schedule=fast: expected a number"),
        (
            &["run", "--sums", "sideways", "--", "true"],
            "--sums=sideways: expected ascending, pairwise or aligned",
        ),
        (&["run", "--", "/nowhere/at/all"], "cannot run /nowhere/at/all: "),
    ];
    for (arguments, sentence) in cases {
        let output = launcher().args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let printed = text(&output);
        assert!(printed.starts_with(&format!("softgpu: {sentence}")), "{arguments:?}: {printed}");
    }
    let help = launcher().arg("--help").output().unwrap();
    assert!(help.status.success() && text(&help).contains("--schedule N"));
}

#[test]
fn the_launcher_passes_arguments_settings_and_exit_status() {
    let script = "echo $SOFTGPU_CARD $SOFTGPU_SCHEDULE $1; exit 7";
    let output = launcher()
        .args(["run", "--card", "a100", "--schedule", "3", "--", "sh", "-c", script, "sh", "--card"])
        .output()
        .unwrap();
    assert_eq!((output.status.code(), text(&output).as_str()), (Some(7), "a100 3 --card\n"));
}

#[test]
fn counters_are_answered_and_written_at_exit() {
    let file = scratch("counters.json");
    let variables = [("SOFTGPU_REPORT", file.to_str().unwrap())];
    isolated("setup::counters_are_answered_and_written_at_exit", &variables, |cuda| {
        cuda.open();
        let (stream, module, p) = (cuda.stream(), cuda.module(), cuda.alloc(4));
        let store = cuda.function(module, c"store");
        let counters = || cuda.answer(|to, bytes, needed| cuda.softgpuCountersJson(to, bytes, needed));
        assert_eq!(cuda.launch(Config::new(1, 1, stream), store, p, &[1]), SUCCESS);
        assert_eq!(cuda.cuStreamSynchronize(stream), SUCCESS);
        assert!(counters().contains("\"store\": {\"launches\": 1, "), "{}", counters());
        let other = cuda.stream();
        let of = |stream| {
            cuda.answer(|to, bytes, needed| cuda.softgpuStreamCountersJson(stream, to, bytes, needed))
        };
        assert_eq!(of(stream), counters());
        assert!(!of(other).contains("store"));
        assert_eq!(cuda.softgpuCountersReset(), SUCCESS);
        assert!(!counters().contains("store"), "{}", counters());
        for _ in 0..3 {
            assert_eq!(cuda.launch(Config::new(1, 1, stream), store, p, &[1]), SUCCESS);
        }
        assert_eq!(cuda.cuStreamSynchronize(stream), SUCCESS);
    });
    let report = fs::read_to_string(&file).unwrap();
    fs::remove_file(&file).unwrap();
    assert!(
        report.starts_with("{\"card\": \"h200\"") && report.contains("\"store\": {\"launches\": 3, "),
        "{report}"
    );
}

#[test]
fn the_report_counts_what_was_not_released() {
    isolated("setup::the_report_counts_what_was_not_released", &[], |cuda| {
        let expect = |counts: [u32; 6]| {
            let [contexts, allocations, streams, graphs, executables, events] = counts;
            let report = cuda.answer(|to, bytes, needed| cuda.softgpuCountersJson(to, bytes, needed));
            let expected = format!(
                "\"unreleased\": {{\"contexts\": {contexts}, \"allocations\": {allocations}, \"streams\": {streams}, \
                 \"graphs\": {graphs}, \"executables\": {executables}, \"events\": {events}}}"
            );
            assert!(report.contains(&expected), "expected {expected}: {report}");
        };
        cuda.open();
        let (stream, p, mut graph, mut executable, mut event) = (cuda.stream(), cuda.alloc(4), 0, 0, 0);
        cuda.host(1);
        assert_eq!(cuda.cuStreamBeginCapture_v2(stream, RELAXED), SUCCESS);
        assert_eq!(cuda.cuMemsetD8Async(p, 0, 4, stream), SUCCESS);
        assert_eq!(cuda.cuStreamEndCapture(stream, &mut graph), SUCCESS);
        assert_eq!(cuda.cuGraphInstantiateWithFlags(&mut executable, graph, 0), SUCCESS);
        assert_eq!(cuda.cuEventCreate(&mut event, 0), SUCCESS);
        expect([1, 2, 1, 1, 1, 1]);
        assert_eq!(cuda.cuGraphDestroy(graph), SUCCESS);
        assert_eq!(cuda.cuMemFree_v2(p), SUCCESS);
        assert_eq!(cuda.cuStreamDestroy_v2(stream), SUCCESS);
        expect([1, 1, 0, 0, 1, 1]);
        // What ends with its context stays on the list.
        assert_eq!(cuda.cuDevicePrimaryCtxRelease_v2(0), SUCCESS);
        expect([0, 1, 0, 0, 1, 1]);
    });
}

#[test]
fn options_of_the_machine_can_change_between_launches() {
    isolated("setup::options_of_the_machine_can_change_between_launches", &[], |cuda| {
        let set = |name: &str, value: &str| {
            let [name, value] = [name, value].map(|text| CString::new(text).unwrap());
            cuda.softgpuSetOption(name.as_ptr(), value.as_ptr())
        };
        for (name, value) in [
            ("schedule", "5"),
            ("sums", "aligned"),
            ("sums", "pairwise"),
            ("perturb", "1"),
            ("races", "0"),
            ("vectors", "base"),
            ("devices", "16"),
        ] {
            assert_eq!(set(name, value), SUCCESS, "{name}={value}");
        }
        for (name, value) in [
            ("schedule", "-1"),
            ("sums", ""),
            ("perturb", "yes"),
            ("vectors", "sse"),
            ("speed", "1"),
            ("devices", "17"),
        ] {
            assert_eq!(set(name, value), INVALID_VALUE, "{name}={value}");
        }
        assert_eq!(cuda.softgpuSetOption(null(), null()), INVALID_VALUE);
    });
}

#[test]
fn a_module_can_be_replaced_by_a_file() {
    let folder = scratch("ptx");
    fs::create_dir_all(&folder).unwrap();
    let variables = [("SOFTGPU_PTX", folder.to_str().unwrap())];
    isolated("setup::a_module_can_be_replaced_by_a_file", &variables, |cuda| {
        cuda.open();
        cuda.module();
        let folder = std::env::var("SOFTGPU_PTX").unwrap();
        let files: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        let [file] = &files[..] else { panic!("one module is written: {files:?}") };
        let text = fs::read_to_string(file).unwrap();
        assert!(text.contains(".entry store("), "{text}");
        fs::write(file, text.replace(".entry store(", ".entry other(")).unwrap();
        let module = cuda.module();
        let mut function = 0;
        assert_eq!(cuda.cuModuleGetFunction(&mut function, module, c"store".as_ptr()), NOT_FOUND);
        assert_eq!(cuda.cuModuleGetFunction(&mut function, module, c"other".as_ptr()), SUCCESS);
    });
    fs::remove_dir_all(&folder).unwrap();
}
