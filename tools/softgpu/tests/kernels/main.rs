//! Kernels that are not this project's, from CUDA C++ through nvcc: their results under many schedules, and planted bugs,
//! each of which is reported at its line.

#[path = "../support/mod.rs"]
mod support;

use softgpu::machine::{Fault, Launch};
use support::{Arg, Gpu, Random};

const PROGRAMS: &str = include_str!("../cuda/programs.ptx");
const FAULTS: &str = include_str!("../cuda/faults.ptx");
const FAULTS_SOURCE: &str = include_str!("../cuda/faults.cu");
const SCHEDULES: u64 = 12;

#[test]
fn matrix_product_equals_the_host() {
    let n = 48usize;
    let mut random = Random(1);
    let mut draw = || (0..n * n).map(|_| (random.bits() % 1000) as f32 / 500.0 - 1.0).collect::<Vec<f32>>();
    let (a, b) = (draw(), draw());
    let mut expected = vec![0.0f32; n * n];
    for row in 0..n {
        for column in 0..n {
            expected[row * n + column] =
                (0..n).fold(0.0, |sum, k| a[row * n + k].mul_add(b[k * n + column], sum));
        }
    }
    let mut counts = Vec::new();
    for schedule in 0..SCHEDULES {
        let gpu = Gpu::new(PROGRAMS);
        let (from_a, from_b, to) = (gpu.upload("a", &a), gpu.upload("b", &b), gpu.fresh("c", n * n * 4));
        let args = [Arg::U64(to), Arg::U64(from_a), Arg::U64(from_b), Arg::U32(n as u32)];
        let launch = gpu.launch("matrix_product", (n / 16 * n / 16) as u32, 256, &args);
        counts.extend(
            gpu.run(&[launch], schedule).unwrap_or_else(|fault| panic!("schedule {schedule}: {fault}")),
        );
        assert_eq!(gpu.download::<f32>(to, n * n), expected, "schedule {schedule}");
    }
    let first = &counts[0];
    assert!(counts.iter().all(|c| c == first), "counters depend on the schedule");
    assert_eq!(first.bytes_read, (n * n * (n / 16) * 2 * 4) as u64);
    assert_eq!(first.bytes_written, (n * n * 4) as u64);
    assert!(first.instructions > 0 && first.barriers == (n / 16 * n / 16 * 8 * n / 16 * 2) as u64);
}

#[test]
fn scan_and_histogram_equal_the_host() {
    let count = 1000usize;
    let mut random = Random(2);
    let input: Vec<u32> = (0..count).map(|_| (random.bits() % 1000) as u32).collect();
    let mut sums = Vec::new();
    for block in input.chunks(256) {
        sums.extend(block.iter().scan(0u32, |sum, x| {
            *sum += x;
            Some(*sum)
        }));
    }
    let mut bins = vec![0u32; 64];
    input.iter().for_each(|x| bins[*x as usize % 64] += 1);
    for schedule in 0..SCHEDULES {
        let gpu = Gpu::new(PROGRAMS);
        let from = gpu.upload("in", &input);
        let to = gpu.fresh("out", count * 4);
        let args = [Arg::U64(to), Arg::U64(from), Arg::U32(count as u32)];
        gpu.run(&[gpu.launch("scan", 4, 256, &args)], schedule).unwrap_or_else(|f| panic!("{schedule}: {f}"));
        assert_eq!(gpu.download::<u32>(to, count), sums, "schedule {schedule}");
        let counts = gpu.upload("counts", &[0u32; 64]);
        let args = [Arg::U64(counts), Arg::U64(from), Arg::U32(count as u32)];
        gpu.run(&[gpu.launch("histogram", 3, 128, &args)], schedule)
            .unwrap_or_else(|f| panic!("{schedule}: {f}"));
        assert_eq!(gpu.download::<u32>(counts, 64), bins, "schedule {schedule}");
    }
}

fn total(fence: u32, schedule: u64) -> Result<u32, Fault> {
    let gpu = Gpu::new(PROGRAMS);
    let input: Vec<u32> = (0..20 * 32).collect();
    let (from, to) = (gpu.upload("in", &input), gpu.fresh("out", 4));
    let (sums, arrived) = (gpu.fresh("sums", 20 * 4), gpu.upload("arrived", &[0u32]));
    let args = [Arg::U64(to), Arg::U64(sums), Arg::U64(arrived), Arg::U64(from), Arg::U32(fence)];
    gpu.run(&[gpu.launch("total", 20, 32, &args)], schedule)?;
    Ok(gpu.download::<u32>(to, 1)[0])
}

#[test]
fn blocks_exchange_data_with_a_fence_and_not_without() {
    for schedule in 0..SCHEDULES {
        let sum = total(1, schedule).unwrap_or_else(|fault| panic!("schedule {schedule}: {fault}"));
        assert_eq!(sum, (0..20 * 32).sum());
        let fault = total(0, schedule).expect_err("nothing orders the sums before the arrival");
        assert!(fault.sentence.contains("a race in global memory"), "{fault}");
    }
}

#[test]
fn an_arrival_counter_that_is_reset_serves_the_next_launch() {
    for schedule in 0..SCHEDULES {
        let gpu = Gpu::new(PROGRAMS);
        let input: Vec<u32> = (0..6 * 128).collect();
        let (from, to) = (gpu.upload("in", &input), gpu.fresh("out", 512));
        let (parts, arrived) = (gpu.fresh("parts", 6 * 512), gpu.upload("arrived", &[0u32]));
        let args = [to, parts, arrived, from].map(Arg::U64);
        let launch = gpu.launch("arrivals", 6, 128, &args);
        gpu.run(&[launch.clone(), launch], schedule).unwrap_or_else(|f| panic!("schedule {schedule}: {f}"));
        let expected: Vec<u32> = (0..128).map(|i| (0..6).map(|b| (b * 128 + i) * 2).sum()).collect();
        assert_eq!(gpu.download::<u32>(to, 128), expected);
        assert_eq!(gpu.download::<u32>(arrived, 1), [0]);
    }
}

#[test]
fn blocks_and_lanes_can_wait_for_each_other() {
    for schedule in 0..SCHEDULES {
        let gpu = Gpu::new(PROGRAMS);
        let (out, flag) = (gpu.fresh("out", 128), gpu.upload("flag", &[0u32]));
        let launch = gpu.launch("wait_in_warp", 1, 32, &[Arg::U64(out), Arg::U64(flag)]);
        gpu.run(&[launch], schedule).unwrap_or_else(|fault| panic!("schedule {schedule}: {fault}"));
        let flag = gpu.upload("flag", &[0u32]);
        let launch = gpu.launch("wait_for_last", 9, 32, &[Arg::U64(out), Arg::U64(flag)]);
        gpu.run(&[launch], schedule).unwrap_or_else(|fault| panic!("schedule {schedule}: {fault}"));
        assert_eq!(gpu.download::<u32>(out, 1), [7]);
    }
}

/// Three launches, each of which adds one to the result of the one before.
fn chain(bug: u32, schedule: u64) -> Result<Vec<u32>, Fault> {
    let gpu = Gpu::new(PROGRAMS);
    let buffers: Vec<u64> = (0..4).map(|n| gpu.upload(&format!("buffer {n}"), &[10u32; 160])).collect();
    let launches: Vec<Launch> = (0..3)
        .map(|n| {
            let args =
                [Arg::U64(buffers[n + 1]), Arg::U64(buffers[n]), Arg::U32(if n == 2 { bug } else { 0 })];
            Launch { dependent: n > 0, ..gpu.launch("dependent", 5, 32, &args) }
        })
        .collect();
    gpu.run(&launches, schedule)?;
    Ok(gpu.download(buffers[3], 160))
}

#[test]
fn dependent_launches_overlap_up_to_their_wait() {
    for schedule in 0..SCHEDULES {
        let result = chain(0, schedule).unwrap_or_else(|fault| panic!("schedule {schedule}: {fault}"));
        assert_eq!(result, [13; 160], "schedule {schedule}");
        let fault = chain(1, schedule).expect_err("it reads what an unfinished launch writes");
        assert!(fault.sentence.contains("griddepcontrol.wait"), "{fault}");
    }
}

// ---- planted bugs ----

/// Runs a kernel with a planted bug.
fn planted(kernel: &str, threads: u32, blocks: u32, bug: u32, schedule: u64) -> Result<(), Fault> {
    let gpu = Gpu::new(FAULTS);
    let input = gpu.upload("in", &[1u32; 256]);
    let output = gpu.fresh("out", 2048);
    let args: &[Arg] = match kernel {
        "barrier" | "tensor" => &[Arg::U64(output), Arg::U32(bug)],
        "neighbours" => &[Arg::U64(input), Arg::U64(output), Arg::U32(bug)],
        _ => &[Arg::U64(output), Arg::U64(input), Arg::U32(bug)],
    };
    let input_words = if kernel == "memory" { gpu.upload("words", &[1u32; 64]) } else { input };
    let mut args = args.to_vec();
    if kernel == "memory" {
        args[1] = Arg::U64(input_words);
    }
    gpu.run(&[gpu.launch(kernel, blocks, threads, &args)], schedule).map(|_| ())
}

#[test]
fn planted_bugs_are_reported_at_their_line() {
    // Kernel, threads, blocks, bug, the words of the report, and of the comment at the line, if there is one.
    let bugs = [
        ("memory", 64, 1, 1, "out of bounds", "// out of bounds"),
        ("memory", 64, 1, 2, "misaligned", "// misaligned"),
        ("memory", 64, 1, 3, "never all written", "// never written"),
        ("memory", 64, 1, 4, "out of bounds", "// null"),
        ("staging", 64, 1, 1, "never written", "// never written, or a race"),
        ("staging", 64, 1, 2, "", "// never written, or a race"),
        ("staging", 64, 1, 4, "out of bounds", "// past the end"),
        ("staging", 64, 1, 5, "a race in shared memory", "// two threads write one word"),
        ("staging", 64, 1, 6, "out of bounds", "+ (bug == 6"),
        ("exchange", 32, 1, 1, "a race in shared memory", "// a race within the warp"),
        ("exchange", 32, 1, 2, "does not take part", "// reads a lane that has returned"),
        ("exchange", 32, 1, 3, "not in its own mask", "// not in its own mask"),
        ("barrier", 64, 1, 1, "wait for each other", ""),
        ("barrier", 64, 1, 2, "a deadlock", ""),
        ("copy", 32, 1, 1, "not waited for", "// not waited for, or no barrier"),
        ("copy", 32, 1, 2, "not waited for", "    // not waited for\n"),
        ("copy", 32, 1, 3, "a race in shared memory", "// not waited for, or no barrier"),
        ("tensor", 32, 1, 1, "wait for each other", "// a lane is missing"),
        ("tensor", 32, 1, 2, "without lane 5", "// a lane is missing"),
        ("tensor", 32, 1, 3, "trap", "// trap"),
        ("neighbours", 32, 3, 1, "a race in global memory", ""),
        ("neighbours", 32, 3, 2, "a race in global memory", "// all blocks write it"),
        ("constant", 32, 1, 1, "ld.global.nc", "// written"),
    ];
    let mut correct = 0;
    for (kernel, threads, blocks, bug, words, comment) in bugs {
        for schedule in 0..SCHEDULES {
            if bug == 1 || kernel == "tensor" {
                planted(kernel, threads, blocks, 0, schedule)
                    .unwrap_or_else(|f| panic!("{kernel}, no bug: {f}"));
                correct += 1;
            }
            let case = format!("{kernel}, bug {bug}, schedule {schedule}");
            let fault = planted(kernel, threads, blocks, bug, schedule).err();
            let fault = fault.unwrap_or_else(|| panic!("{case} was not found"));
            assert!(fault.sentence.contains(words), "{case}: {fault}");
            if !comment.is_empty() {
                let at = FAULTS_SOURCE.find(comment).unwrap_or_else(|| panic!("{comment} is in no line"));
                let line = FAULTS_SOURCE[..at].matches('\n').count() + 1;
                assert!(
                    fault.to_string().contains(&format!("faults.cu:{line}")),
                    "{case}, line {line}: {fault}"
                );
            }
        }
    }
    assert!(correct > 0);
}

/// nvcc moves a load from shared memory in front of the condition under which the memory is written.
#[test]
fn an_unwritten_value_may_be_loaded_but_not_selected() {
    let text = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 to, .param .u32 n) {\n\
        .reg .pred %p<2>; .reg .b32 %r<4>; .reg .b64 %rd<2>; .shared .u32 word;\n\
        ld.param.u64 %rd0, [to]; ld.param.u32 %r0, [n]; mov.u32 %r1, %tid.x; mad.wide.u32 %rd1, %r1, 4, %rd0;\n\
        setp.lt.u32 %p0, %r1, %r0; ld.shared.u32 %r2, [word]; selp.u32 %r3, %r2, 7, %p0; st.global.u32 [%rd1], %r3; ret; }";
    let run = |selecting: u32| {
        let gpu = Gpu::new(text);
        let out = gpu.fresh("out", 128);
        let result = gpu.run(&[gpu.launch("k", 1, 32, &[Arg::U64(out), Arg::U32(selecting)])], 0);
        result.map(|_| gpu.download::<u32>(out, 32))
    };
    assert_eq!(run(0).expect("no thread selects the word"), [7; 32]);
    let fault = run(5).expect_err("five threads select the word");
    assert!(fault.sentence.contains("a register is read that was never written"), "{fault}");
}

#[test]
fn a_report_names_kernel_block_thread_and_address() {
    let fault = planted("memory", 64, 1, 1, 0).expect_err("the bug is planted");
    assert_eq!((&*fault.kernel, fault.block, fault.thread), ("memory", [0; 3], Some([63, 0, 0])));
    let text = fault.to_string();
    assert!(text.contains("0 bytes past the end of words") && text.contains("thread (63, 0, 0)"), "{text}");
}

#[test]
fn what_is_not_known_is_refused_with_its_line() {
    let header = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k() {\n.reg .b32 %r<9>; .reg .f32 %f<9>;\n";
    let cases = [
        ("frobnicate.b32 %r1, %r2;", "frobnicate"),
        ("add.u32.strange %r1, %r2, %r3;", ".strange"),
        ("add.u32 %r1, %f2, %r3;", "F32"),
        ("add.u64 %r1, %r2, %r3;", "B32"),
        ("mov.u32 %r1, %r99;", "%r99"),
        ("bra nowhere;", "nowhere"),
        ("ld.global.v4.u64 {%r1, %r2, %r3, %r4}, [%r5];", "16 bytes"),
        ("tex.2d.v4.f32.f32 %r1, %r2;", "tex"),
    ];
    let card = softgpu::card::Card::find("a100").expect("the card exists");
    for (statement, words) in cases {
        let text = format!("{header}{statement}\nret;\n}}");
        let error = softgpu::ptx::load(&text, card).expect_err(statement);
        assert!(error.line == 6 && error.message.contains(words), "{statement}: {error}");
    }
    for (version, target) in [("99.0", "sm_80"), ("8.0", "sm_90"), ("8.0", "sm_90a")] {
        let text = format!(".version {version}\n.target {target}\n.address_size 64\n");
        assert!(softgpu::ptx::load(&text, card).is_err(), "{version} {target}");
    }
}

/// ptxas may join a product and a sum to an `fma` unless one of them says how it rounds.
#[test]
fn products_that_ptxas_may_join_with_a_sum_are_listed() {
    let lines = |product: &str, sum: &str| {
        let text = format!(
            ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 p)\n{{\n.reg .f32 %f<4>;\n\
             .reg .b64 %rd<2>;\nld.param.u64 %rd1, [p];\nld.global.f32 %f1, [%rd1];\n{product} %f2, %f1, %f1;\n\
             {sum} %f3, %f2, %f1;\nst.global.f32 [%rd1], %f3;\nret;\n}}\n"
        );
        let module = softgpu::ptx::load(&text, softgpu::card::Card::find("a100").expect("the card exists"))
            .expect("PTX");
        module.kernels().flat_map(|kernel| kernel.contractible()).collect::<Vec<u32>>()
    };
    assert_eq!(lines("mul.f32", "add.f32"), [10]);
    for (product, sum) in [("mul.rn.f32", "add.f32"), ("mul.f32", "add.rn.f32"), ("add.f32", "add.f32")] {
        assert_eq!(lines(product, sum), [0; 0], "{product} {sum}");
    }
}
