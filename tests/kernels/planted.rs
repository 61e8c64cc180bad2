//! Bugs planted in the shipped PTX: for each, a test or a short generation that shows it on the software GPU, and
//! what must be reported.

use crate::support::kernel::*;
use crate::support::program;
use crate::support::software_gpu::{changed, in_parallel, path, run, run_test};

use dflash::gpu::kernels::embedding::Embedding;
use std::sync::Mutex;
use tempfile::TempDir;

/// A change of a kernel.
#[derive(Clone, Copy)]
enum Edit {
    /// Replaces a text wherever it stands.
    All(&'static str, &'static str),
    /// Replaces the occurrence with this number, from 0.
    Nth(usize, &'static str, &'static str),
    /// Any other change.
    By(fn(&str) -> String),
}

/// What is run.
#[derive(Clone, Copy)]
enum Run {
    /// The test of this name.
    Test(&'static str),
    /// `dflash-gen` with these flags.
    Generate(&'static str),
}
use Run::{Generate, Test};

struct Bug {
    name: &'static str,
    /// The source file, without its extension.
    source: &'static str,
    /// The kernel to change; `None`: all of the file.
    kernel: Option<&'static str>,
    edit: Edit,
    /// The card, and the schedule with which it shows.
    machine: (&'static str, &'static str),
    run: Run,
    /// What the report must say; empty: nothing is reported, but the test fails or the text is wrong.
    words: &'static str,
}

/// A prompt for several splits of attention.
fn long_prompt() -> String {
    "def f(x, y):\n    return x + y\n\n".repeat(14)
}

/// Deletes the stores that reset arrival counters: the first one after each atomic operation.
fn keep_counters(text: &str) -> String {
    let mut after_atomic = false;
    let mut kept = String::new();
    for line in text.lines() {
        after_atomic |= line.contains("atom.acq_rel.gpu");
        if after_atomic && line.contains("st.global.u32") {
            after_atomic = false;
            continue;
        }
        kept += line;
        kept += "\n";
    }
    kept
}

/// Stores the number of the round also before the record.
fn number_before_record(text: &str) -> String {
    let release = text.lines().find(|line| line.contains("st.release.sys")).unwrap();
    let address = release.split(['[', ']']).nth(1).unwrap();
    let value = release.trim_end_matches(';').rsplit(", ").next().unwrap();
    // Directly after the instruction that computes the address; the number is known by then.
    let mut out = String::new();
    for line in text.lines() {
        out += line;
        out += "\n";
        if line.trim_start().starts_with("add.s64") && line.contains(&format!("{address}, ")) {
            out += &format!("\tst.global.u32 [{address}], {value};\n");
        }
    }
    out
}

/// Swaps the first two registers of the A operand of every product.
fn swapped_operand(text: &str) -> String {
    let swap = |line: &str| {
        let mut parts: Vec<String> = line.split('{').map(String::from).collect();
        if let (true, Some(a)) = (line.contains("mma.sync"), parts.get_mut(2)) {
            let mut registers: Vec<&str> = a.splitn(3, ',').collect();
            registers.swap(0, 1);
            *a = registers.join(",");
        }
        parts.join("{")
    };
    text.lines().map(|line| swap(line) + "\n").collect()
}

/// Changes the first line that `fits`.
fn first_line(text: &str, fits: impl Fn(&str) -> bool, change: impl Fn(&str) -> String) -> String {
    let line = text.lines().find(|line| fits(line)).unwrap_or("no such line");
    text.replacen(line, &change(line), 1)
}

/// Moves the wait for the launch before behind the first load.
fn late_wait(text: &str) -> String {
    let text = text.replace("griddepcontrol.wait;", "");
    first_line(&text, |line| line.contains("ld.global"), |line| format!("{line}\n\tgriddepcontrol.wait;"))
}

fn misaligned(text: &str) -> String {
    first_line(
        text,
        |line| line.contains("ld.shared.v4.u32") && line.contains("+64]"),
        |line| line.replace("+64]", "+68]"),
    )
}

fn past_the_end(text: &str) -> String {
    first_line(text, |line| line.contains("ld.global.nc"), |line| line.replace(']', "+268435456]"))
}

/// Takes lane 31 out of the masks of all shuffles.
fn shuffle_without_lane(text: &str) -> String {
    let shuffles = text.lines().filter(|line| line.contains("shfl.sync.bfly"));
    let masks = shuffles.map(|line| line.trim_end_matches(';').rsplit(", ").next().unwrap());
    masks.fold(text.to_string(), |text, mask| {
        text.replace(&format!("mov.u32 \t{mask}, -1;"), &format!("mov.u32 \t{mask}, 0x7fffffff;"))
    })
}

/// Deletes what sets the first accumulator before its first product.
fn unset_accumulator(text: &str) -> String {
    let product = text.lines().find(|line| line.contains("mma.sync")).unwrap();
    let register = product.rsplit('{').next().unwrap().split(',').next().unwrap();
    let sets = |line: &str| line.contains(&format!("mov.f32 \t{register}, "));
    text.lines().filter(|line| !sets(line)).map(|line| line.to_string() + "\n").collect()
}

/// Deletes the last barrier.
fn last_barrier(text: &str) -> String {
    let (before, after) = text.rsplit_once("bar.sync \t0;").unwrap();
    format!("{before}{after}")
}

/// Moves the first `fence` that a `load` follows without a branch between them behind that load, as a compiler may if the
/// fence's `asm` does not clobber memory.
fn overtaken(text: &str, fence: &str, load: &str) -> String {
    let mut lines: Vec<&str> = text.lines().collect();
    let follows = |at: &usize| {
        let block =
            lines[*at + 1..].iter().take_while(|line| !line.starts_with("$L") && !line.contains("bra"));
        let load = block.clone().position(|line| line.contains(load));
        load.filter(|load| !block.take(*load).any(|line| line.contains(fence)))
    };
    let at = (0..lines.len()).find(|at| lines[*at].contains(fence) && follows(at).is_some()).unwrap();
    let load = at + 1 + follows(&at).unwrap();
    lines[at..=load].rotate_left(1);
    lines.join("\n") + "\n"
}

fn load_over_barrier(text: &str) -> String {
    overtaken(text, "bar.sync", "ld.shared")
}

fn load_over_wait(text: &str) -> String {
    overtaken(text, "griddepcontrol.wait;", "ld.global")
}

/// Moves the last store of the record behind the release of its number.
fn store_under_release(text: &str) -> String {
    let store = text.lines().rfind(|line| line.contains("st.global.u32") && line.contains("+24]")).unwrap();
    let text = text.replacen(store, "", 1);
    first_line(&text, |line| line.contains("st.release.sys"), |line| format!("{line}\n{store}"))
}

/// Deletes the barrier before the first arrival.
fn arrival_without_barrier(text: &str) -> String {
    let (before, after) = text.split_once("atom.acq_rel").unwrap();
    let (start, end) = before.rsplit_once("bar.sync \t0;").unwrap();
    format!("{start}{end}atom.acq_rel{after}")
}

/// Computes the first product of 64 bits in 32.
fn product_of_32_bits(text: &str) -> String {
    first_line(
        text,
        |line| line.contains("mul.lo.s64"),
        |line| {
            let to = line.split_whitespace().nth(1).unwrap().trim_end_matches(',');
            format!("{line}\n\t{{ .reg .b32 %low; cvt.u32.u64 %low, {to}; cvt.s64.s32 {to}, %low; }}")
        },
    )
}

/// Takes page 0 in place of what the table of pages says.
fn page_of_another(text: &str) -> String {
    let load = text.lines().find(|line| line.contains("ld.global.u32") && !line.contains('+')).unwrap();
    let page = load.split_whitespace().nth(1).unwrap();
    text.replacen(load, &format!("\tmov.u32 {page} 0;"), 1)
}

const BUGS: &[Bug] = &[
    Bug {
        name: "an arrival counter without release and acquire, in a linear layer",
        source: "project",
        kernel: None,
        edit: Edit::All("atom.acq_rel.gpu", "atom.relaxed.gpu"),
        machine: ("h200", "0"),
        run: Test("linear_bits::schedules_give_the_same_bits"),
        words: "a race in global memory",
    },
    Bug {
        name: "a merge of attention that does not wait for the splits",
        source: "attention",
        kernel: Some("attention_merge_64"),
        edit: Edit::All("griddepcontrol.wait;", ""),
        machine: ("h200", "0"),
        run: Generate("--ctx 1024"),
        words: "griddepcontrol.wait",
    },
    Bug {
        name: "the same in the drafter's attention",
        source: "drafter_attention",
        kernel: Some("drafter_attention_merge_64"),
        edit: Edit::All("griddepcontrol.wait;", ""),
        machine: ("h200", "1"),
        run: Generate("--ctx 1024"),
        words: "griddepcontrol.wait",
    },
    Bug {
        name: "an arrival counter without release and acquire, in the sampler",
        source: "sample",
        kernel: None,
        edit: Edit::All("atom.acq_rel.gpu", "atom.relaxed.gpu"),
        machine: ("h200", "0"),
        run: Test("sampler::sampler_equals_choose_on_a_vocabulary_of_151936"),
        words: "a race in global memory",
    },
    Bug {
        name: "the same in the distributions of rejection",
        source: "rejection",
        kernel: None,
        edit: Edit::All("atom.acq_rel.gpu", "atom.relaxed.gpu"),
        machine: ("h200", "0"),
        run: Test("rejection::drafts_are_the_same_under_every_schedule"),
        words: "a race in global memory",
    },
    Bug {
        name: "the same in block verification of chains",
        source: "chains",
        kernel: None,
        edit: Edit::All("atom.acq_rel.gpu", "atom.relaxed.gpu"),
        machine: ("h200", "0"),
        run: Test("chains::chains_are_the_same_under_every_schedule"),
        words: "a race in global memory",
    },
    Bug {
        name: "arrival without release: only the acquire side is left",
        source: "project",
        kernel: None,
        edit: Edit::All("atom.acq_rel.gpu", "atom.acquire.gpu"),
        machine: ("h200", "0"),
        run: Test("linear_bits::schedules_give_the_same_bits"),
        words: "a race in global memory",
    },
    Bug {
        name: "arrival without acquire: only the release side is left",
        source: "project",
        kernel: None,
        edit: Edit::All("atom.acq_rel.gpu", "atom.release.gpu"),
        machine: ("h200", "0"),
        run: Test("linear_bits::schedules_give_the_same_bits"),
        words: "a race in global memory",
    },
    Bug {
        name: "an arrival counter that is not reset",
        source: "rejection",
        kernel: None,
        edit: Edit::By(keep_counters),
        machine: ("h200", "0"),
        run: Test("rejection::equal_distributions_accept_every_draft"),
        words: "",
    },
    Bug {
        name: "the number of the round stored like any other word",
        source: "round",
        kernel: Some("round_finish"),
        edit: Edit::All("st.release.sys.global.u32", "st.global.u32"),
        machine: ("h200", "1"),
        run: Generate(""),
        words: "",
    },
    Bug {
        name: "the number of the round also stored before its record",
        source: "round",
        kernel: Some("round_finish"),
        edit: Edit::By(number_before_record),
        machine: ("h200", "2"),
        run: Generate(""),
        words: "",
    },
    Bug {
        name: "no wait for the launch before",
        source: "embedding",
        kernel: Some("embedding"),
        edit: Edit::All("griddepcontrol.wait;", ""),
        machine: ("h200", "1"),
        run: Generate(""),
        words: "griddepcontrol.wait",
    },
    Bug {
        name: "a wait after the first loads",
        source: "norm",
        kernel: Some("residual_norm"),
        edit: Edit::By(late_wait),
        machine: ("h200", "1"),
        run: Generate(""),
        words: "griddepcontrol.wait",
    },
    Bug {
        name: "a write that overtakes a read of the launch before",
        source: "qkv",
        kernel: None,
        edit: Edit::All("griddepcontrol.wait;", ""),
        machine: ("h200", "1"),
        run: Generate(""),
        words: "griddepcontrol.wait",
    },
    Bug {
        name: "activations through the read-only path",
        source: "project",
        kernel: None,
        edit: Edit::All("ld.global.v4.f32", "ld.global.nc.v4.f32"),
        machine: ("h200", "0"),
        run: Test("linear::project_adds_the_residual_and_prepares_the_next_norm"),
        words: "ld.global.nc",
    },
    Bug {
        name: "a wait for copies that is one group too lax",
        source: "attention",
        kernel: None,
        edit: Edit::All("cp.async.wait_group 2", "cp.async.wait_group 3"),
        machine: ("h200", "0"),
        run: Generate(""),
        words: "not waited for",
    },
    Bug {
        name: "no wait for copies at all",
        source: "qkv",
        kernel: None,
        edit: Edit::All("cp.async.wait_group 0;", ""),
        machine: ("a100", "0"),
        run: Generate(""),
        words: "not waited for",
    },
    Bug {
        name: "staged activations without a barrier",
        source: "project",
        kernel: Some("project_16"),
        edit: Edit::Nth(0, "bar.sync \t0;", ""),
        machine: ("h200", "1"),
        run: Generate(""),
        words: "shared memory",
    },
    Bug {
        name: "a result tile without a barrier",
        source: "qkv",
        kernel: Some("qkv_16"),
        edit: Edit::By(last_barrier),
        machine: ("h200", "1"),
        run: Generate(""),
        words: "shared memory",
    },
    Bug {
        name: "scores read before the barrier",
        source: "sample",
        kernel: Some("sample"),
        edit: Edit::Nth(1, "bar.sync \t0;", ""),
        machine: ("h200", "1"),
        run: Generate("--temperature 1 --seed 1"),
        words: "shared memory",
    },
    Bug {
        name: "a barrier for half of the threads",
        source: "project",
        kernel: None,
        edit: Edit::All("bar.sync \t0;", "bar.sync \t0, 33;"),
        machine: ("h200", "0"),
        run: Generate(""),
        words: "barrier",
    },
    Bug {
        name: "a misaligned vector load",
        source: "swiglu",
        kernel: Some("swiglu_16"),
        edit: Edit::By(misaligned),
        machine: ("h200", "0"),
        run: Generate(""),
        words: "misaligned",
    },
    Bug {
        name: "a load past the end",
        source: "embedding",
        kernel: Some("embedding"),
        edit: Edit::By(past_the_end),
        machine: ("h200", "0"),
        run: Generate(""),
        words: "out of bounds",
    },
    Bug {
        name: "a fused product of swapped operands",
        source: "swiglu",
        kernel: None,
        edit: Edit::By(swapped_operand),
        machine: ("h200", "0"),
        run: Generate(""),
        words: "",
    },
    Bug {
        name: "a shuffle without its lane",
        source: "qkv",
        kernel: Some("qkv_16"),
        edit: Edit::By(shuffle_without_lane),
        machine: ("h200", "0"),
        run: Generate(""),
        words: "mask",
    },
    Bug {
        name: "an accumulator that is never set",
        source: "head",
        kernel: None,
        edit: Edit::By(unset_accumulator),
        machine: ("h200", "0"),
        run: Generate(""),
        words: "never written",
    },
    Bug {
        name: "generic writes not made visible to wgmma",
        source: "prefill_wgmma",
        kernel: None,
        edit: Edit::All("fence.proxy.async.shared::cta;", ""),
        machine: ("h200", "0"),
        run: Test("prefill::wgmma_prefill_equals_skinny_kernels_if_sums_are_exact"),
        words: "fence.proxy.async",
    },
    Bug {
        name: "results of wgmma read in flight",
        source: "prefill_wgmma",
        kernel: None,
        edit: Edit::All("wgmma.wait_group.sync.aligned 0;", ""),
        machine: ("h200", "0"),
        run: Test("prefill::wgmma_prefill_equals_skinny_kernels_if_sums_are_exact"),
        words: "wgmma",
    },
    Bug {
        name: "operands of wgmma overwritten in flight",
        source: "prefill_wgmma",
        kernel: None,
        edit: Edit::All("wgmma.wait_group.sync.aligned 1;", ""),
        machine: ("h200", "0"),
        run: Test("prefill::wgmma_prefill_equals_skinny_kernels_if_sums_are_exact"),
        words: "wgmma",
    },
    Bug {
        name: "accumulators of wgmma without their fence",
        source: "prefill_wgmma",
        kernel: None,
        edit: Edit::All("wgmma.fence.sync.aligned;", ""),
        machine: ("h200", "0"),
        run: Test("prefill::wgmma_prefill_equals_skinny_kernels_if_sums_are_exact"),
        words: "wgmma",
    },
    Bug {
        name: "a wgmma descriptor with half the stride",
        source: "prefill_wgmma",
        kernel: None,
        // Bits 32 to 45 hold the stride: 64 and 32 units of 16 bytes.
        edit: Edit::All("4611686293305294848", "4611686155866341376"),
        machine: ("h200", "0"),
        run: Test("prefill::wgmma_prefill_equals_skinny_kernels_if_sums_are_exact"),
        words: "",
    },
    Bug {
        name: "a wgmma descriptor without its swizzle",
        source: "prefill_wgmma",
        kernel: None,
        edit: Edit::All("4611686293305294848", "274877906944"),
        machine: ("h200", "0"),
        run: Test("prefill::wgmma_prefill_equals_skinny_kernels_if_sums_are_exact"),
        words: "",
    },
    Bug {
        name: "a wgmma descriptor with its strides swapped",
        source: "prefill_wgmma",
        kernel: None,
        // Bits 16 to 29 hold the leading stride: 8 units, and 32 in bits 32 to 45.
        edit: Edit::All("137439477760", "34361835520"),
        machine: ("h200", "0"),
        run: Test("prefill::wgmma_prefill_equals_skinny_kernels_if_sums_are_exact"),
        words: "",
    },
    Bug {
        name: "a load that overtakes the barrier of an arrival",
        source: "project",
        kernel: Some("project_32"),
        edit: Edit::By(load_over_barrier),
        machine: ("h200", "1"),
        run: Test("linear_bits::schedules_give_the_same_bits"),
        words: "shared memory",
    },
    Bug {
        name: "a load that overtakes the barrier of a table",
        source: "sample",
        kernel: Some("sample"),
        edit: Edit::By(load_over_barrier),
        machine: ("h200", "1"),
        run: Generate("--temperature 1 --seed 1"),
        words: "shared memory",
    },
    Bug {
        name: "a load that overtakes the wait for the launch before",
        source: "round",
        kernel: Some("round_tokens"),
        edit: Edit::By(load_over_wait),
        machine: ("h200", "1"),
        run: Generate(""),
        words: "griddepcontrol.wait",
    },
    Bug {
        name: "a store to the record that sinks below the release of its number",
        source: "round",
        kernel: Some("round_finish"),
        edit: Edit::By(store_under_release),
        machine: ("h200", "1"),
        run: Generate(""),
        words: "page-locked memory",
    },
    Bug {
        name: "a record that other lanes write, released without a barrier",
        source: "round",
        kernel: Some("round_finish"),
        edit: Edit::All("bar.sync \t0;", ""),
        machine: ("h200", "0"),
        run: Generate(""),
        words: "page-locked memory",
    },
    Bug {
        name: "an arrival without the barrier before it",
        source: "project",
        kernel: Some("project_32"),
        edit: Edit::By(arrival_without_barrier),
        machine: ("h200", "0"),
        run: Test("linear_bits::schedules_give_the_same_bits"),
        words: "a race in global memory",
    },
    Bug {
        name: "costs of a draft tree without their barrier",
        source: "tree",
        kernel: None,
        edit: Edit::All("bar.warp.sync \t-1;", ""),
        machine: ("h200", "0"),
        run: Generate("--tree 8"),
        words: "a race in shared memory",
    },
    Bug {
        name: "classes of chains without their barrier",
        source: "chains",
        kernel: Some("verify_chains"),
        edit: Edit::All("bar.warp.sync \t-1;", ""),
        machine: ("h200", "0"),
        run: Generate("--temperature 1 --seed 1 --verify block --tree 20"),
        words: "a race in shared memory",
    },
    Bug {
        name: "an index of 32 bits into a large table",
        source: "embedding",
        kernel: Some("embedding"),
        edit: Edit::By(product_of_32_bits),
        machine: ("h200", "0"),
        run: Test("planted::a_row_beyond_2_to_the_31_elements_is_found"),
        words: "out of bounds",
    },
    Bug {
        name: "a page of another sequence",
        source: "attention",
        kernel: Some("attention_64x32"),
        edit: Edit::By(page_of_another),
        machine: ("h200", "0"),
        run: Test("attention::contexts_and_windows_equal_f64_in_a_ragged_batch"),
        words: "",
    },
    Bug {
        name: "a page of another sequence in a batch",
        source: "attention",
        kernel: Some("attention_64x32"),
        edit: Edit::By(page_of_another),
        machine: ("h200", "0"),
        run: Generate("--batch 2"),
        words: "never all written",
    },
];

impl Bug {
    fn plant(&self, ptx: &str) -> String {
        match self.edit {
            Edit::All(from, to) => ptx.replace(from, to),
            Edit::Nth(n, from, to) => {
                let place = ptx.match_indices(from).nth(n).map_or(ptx.len(), |(at, _)| at);
                format!("{}{}", &ptx[..place], ptx[place..].replacen(from, to, 1))
            }
            Edit::By(change) => change(ptx),
        }
    }

    fn run(&self, ptx: Option<&TempDir>) -> program::Run {
        let (card, schedule) = self.machine;
        let mut settings = vec![("SOFTGPU_CARD", card), ("SOFTGPU_SCHEDULE", schedule)];
        settings.extend(ptx.map(|folder| ("SOFTGPU_PTX", path(folder))));
        match self.run {
            Test(name) => run_test(&settings, name),
            Generate(flags) => {
                let long = long_prompt();
                let folder = tempfile::tempdir().unwrap();
                let two = program::write(
                    folder.path(),
                    "two",
                    "{\"prompt\": \"def f(x):\"}\n{\"prompt\": \"import os\\nclass A:\"}\n",
                );
                let prompt = match flags {
                    _ if flags.contains("--ctx") => vec![long.as_str()],
                    _ if flags.contains("--batch") => vec!["--prompts", two.as_str()],
                    _ => vec!["def f(x):"],
                };
                run(&settings, ["-q", "-n", "6"].into_iter().chain(flags.split_whitespace()).chain(prompt))
            }
        }
    }
}

/// Only the last row of the table is written, and read.
#[test]
fn a_row_beyond_2_to_the_31_elements_is_found() {
    on_gpu(|device| {
        let hidden = 64;
        let vocab = (1 << 31) / hidden + 1;
        let table = device.allocate(vocab * hidden * 2, "a table").unwrap();
        let row = Random::new(1).bf16(hidden, 1.0);
        let last = table.slice((vocab - 1) * hidden * 2, hidden * 2).unwrap();
        device.upload(&last, &to_bytes(&row)).unwrap();
        device.seal(&table);
        let (tokens, out) = (upload(device, &[vocab as u32 - 1]), poisoned::<f32>(device, hidden));
        let kernel = Embedding { rows: 1, hidden, vocab, packed: false, scale: 1.0 };
        kernel.launch(device, &out, &table, &tokens).unwrap();
        assert_eq!(download::<f32>(device, &out), from_bf16(&row));
    });
}

#[test]
fn every_planted_bug_is_reported() {
    let missed: Mutex<Vec<String>> = Mutex::new(Vec::new());
    // Every third one; exhaustive, as in .ci/run: all.
    let bugs: Vec<&Bug> = BUGS.iter().step_by(if exhaustive() { 1 } else { 3 }).collect();
    in_parallel(bugs.len(), |n| {
        let bug = bugs[n];
        let folder = changed(bug.machine.0, bug.source, bug.kernel, |ptx| bug.plant(ptx));
        let run = bug.run(Some(&folder));
        let report = run.err.lines().find(|line| line.starts_with("softgpu: ")).unwrap_or("no report");
        println!("{}: {report}", bug.name);
        let found = if bug.words.is_empty() {
            match bug.run {
                // A test is known to pass: it is one of this program.
                Test(_) => run.code == 101,
                Generate(_) => run.out != bug.run(None).done(),
            }
        } else {
            [1, 101].contains(&run.code) && run.err.contains("softgpu: ") && run.err.contains(bug.words)
        };
        if !found {
            missed.lock().unwrap().push(format!("{}, expected {:?}: {run:?}", bug.name, bug.words));
        }
    });
    let missed = missed.into_inner().unwrap();
    assert!(missed.is_empty(), "{}", missed.join("\n\n"));
}
