//! tools/kernel-table.py on tables in the formats of nsys and ncu 2025, and tools/profile.sh with scripts
//! that replace both profilers: output, calls and error messages. No number here is a measurement.

use crate::support::bench;
use crate::support::program;

use bench::bench;
use program::{Run, finish, write};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

const TABLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/profile");

fn tool(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tools").join(name)
}

fn kernel_table(args: &[&str]) -> Run {
    let mut command = Command::new("python3");
    command.arg(tool("kernel-table.py")).args(args).current_dir(TABLES);
    finish(command)
}

/// The cells of the Markdown table by row and column.
fn cells(args: &[&str]) -> Vec<Vec<String>> {
    let text = kernel_table(&[args, &["--markdown"]].concat()).done();
    let line = |line: &str| line.trim_matches('|').split('|').map(|cell| cell.trim().to_string()).collect();
    let mut lines: Vec<Vec<String>> = text.lines().map(line).collect();
    let separators = lines.remove(1);
    assert!(separators[1..].iter().all(|separator| separator == "---:"), "{text}");
    assert!(lines.iter().all(|cells| cells.len() == lines[0].len()), "{text}");
    lines
}

// ---- kernel-table.py ----

#[test]
fn nsys_tables_give_launches_medians_and_shares() {
    let table = cells(&["kern_sum.csv"]);
    assert_eq!(table[0], ["kernel", "launches", "median us", "% of time"]);
    assert_eq!(table[1], ["project_16", "90", "40.90", "33.4"]);
    // The CSV gives this name with parameters, which contain commas.
    assert_eq!(table[2], ["swiglu_16", "45", "49.12", "20.0"]);
    assert_eq!(table[9..], [["sample", "10", "7.50", "0.7"], ["all", "250", "", "100.0"]]);
    let trace = kernel_table(&["trace.csv"]);
    assert_eq!(trace.err, "kernel-table: 2 copies and fills are left out\n");
    assert_eq!(
        trace.out,
        "kernel           launches  median us  % of time\n\
         qkv_16                  3       3.50       85.2\n\
         attention_64x32         2       1.00       14.8\n\
         all                     5                 100.0\n"
    );
}

#[test]
fn ncu_tables_give_bandwidth() {
    let raw = cells(&["ncu_raw.csv", "--ceiling", "4400"]);
    assert_eq!(raw[0][4..], ["GB/s", "% of ceiling"]);
    // 100.863296 MB in 25 us.
    assert_eq!(raw[1], ["qkv_16", "2", "12.50", "84.7", "4035", "91.7"]);
    assert_eq!(raw[2], ["attention_64x32", "1", "4.50", "15.3", "1000", "22.7"]);
    // Other units, a number with a thousands separator, and bytes that the GPU does not count.
    let details = cells(&["ncu_details.csv"]);
    assert_eq!(details[0].len(), 5);
    assert_eq!(details[1], ["sample", "1", "1205.00", "99.0", ""]);
    assert_eq!(details[2], ["qkv_16", "1", "12.50", "1.0", "4034"]);
}

/// The table holds five rounds of the demo pair.
#[test]
fn nsys_tables_get_weight_bytes_from_the_roofline() {
    let folder = tempfile::tempdir().unwrap();
    let launches = program::run(["--plan", "--launches", "--json"]).done();
    let launches = write(folder.path(), "launches.json", launches);
    let roofline = bench(["roofline", "--model", "demo", "--json"]).done();
    let roofline = write(folder.path(), "roofline.json", roofline);
    let flags = ["kern_sum.csv", "--launches", &launches, "--record", &roofline];
    let table = cells(&[&flags[..], &["--ceiling", "8"]].concat());
    let shown: Vec<[&str; 3]> = table[1..].iter().map(|row| [&*row[0], &row[4], &row[5]]).collect();
    let expected = [
        ["project_16", "2", "25.0"],
        ["swiglu_16", "4", "50.0"],
        ["qkv_16", "2", "25.0"],
        ["head_16", "4", "50.0"],
        ["attention_64x32", "", ""],
        ["inject_16", "1", "12.5"],
        ["qkv_32", "5", "62.5"],
        ["drafter_attention_64x32", "", ""],
        ["sample", "", ""],
        ["all", "", ""],
    ];
    assert_eq!(shown, expected);
    // The ceiling can also come from a record. --ceiling overrides it.
    let ceiling = |value| format!(r#"{{"rows": [{{"name": "read ceiling", "median": {value}}}]}}"#);
    let sixteen = write(folder.path(), "ceiling.json", ceiling("16.0"));
    let with = |more: &[&str]| cells(&[&flags[..], &["--record", &sixteen], more].concat())[1][5].clone();
    assert_eq!((with(&[]), with(&["--ceiling", "4"])), ("12.5".into(), "50.0".into()));

    let summary = fs::read_to_string(format!("{TABLES}/kern_sum.csv")).unwrap();
    let profile = |change: [&str; 2]| {
        let path = write(folder.path(), "other.csv", summary.replace(change[0], change[1]));
        kernel_table(&[&[&*path], &flags[1..]].concat())
    };
    let unknown_kernel = profile([",sample", ",read"]);
    assert!(
        unknown_kernel.err.contains("read ran 10 times, and 0 times in a round of"),
        "{unknown_kernel:?}"
    );
    let incomplete_round = profile([",90,40960.0", ",89,40960.0"]);
    assert!(
        incomplete_round.err.contains("project_16 ran 89 times, and 18 times in a round of"),
        "{incomplete_round:?}"
    );
    assert!(
        incomplete_round.out.lines().any(|line| line.starts_with("project_16") && line.ends_with("33.4")),
        "{incomplete_round:?}"
    );
    let two_counts = profile([",5,98304.0", ",6,98304.0"]);
    assert!(
        two_counts.code == 2 && two_counts.err.contains("whose kernels ran in 5 or 6 such rounds"),
        "{two_counts:?}"
    );
}

#[test]
fn invalid_profiles_are_refused_with_one_error_line() {
    let folder = tempfile::tempdir().unwrap();
    let read = |name: &str| fs::read_to_string(format!("{TABLES}/{name}.csv")).unwrap();
    let refused = |csv: &str, more: &[&str], part: &str| {
        let path = write(folder.path(), "profile.csv", csv);
        let run = kernel_table(&[&[&*path], more].concat());
        let last = run.err.lines().last().unwrap_or_default();
        assert!(run.code == 2 && run.out.is_empty() && last.contains(part), "{part}: {run:?}");
        assert!(!run.err.contains("Traceback"), "{run:?}");
    };
    refused("", &[], "has no table of nsys stats");
    refused(
        "Time (%),Num Calls,Name\n1,2,x\n",
        &[],
        "has a table with unknown columns: Time (%), Num Calls, Name",
    );
    let head = read("kern_sum").lines().nth(5).unwrap().to_string() + "\n";
    refused(&head, &[], "no rows: nothing ran in the profiler's window");
    refused(&format!("{head}1,2,3\n"), &[], "profile.csv:2 has 3 cells, its header has 9");
    for (from, to, part) in [
        (",90,", ",many,", "profile.csv:7, Instances is 'many', expected a number"),
        (",90,", ",0,", "expected a whole number from 1 on"),
        (",90,", ",1.5,", "expected a whole number from 1 on"),
        ("40900.0", "-1", "Med (ns) is '-1'"),
        ("40900.0", "nan", "Med (ns) is 'nan'"),
        ("3686400", "1e999", "Total Time (ns) is '1e999'"),
        ("Med (ns)", "Med (days)", "is in 'days', expected one of ns"),
        ("Med (ns)", "Median", "has no column 'Med' with a unit"),
        (",qkv_16\n", ",project_16\n", "is project_16 again"),
    ] {
        refused(&read("kern_sum").replace(from, to), &[], part);
    }
    refused(&read("trace").replace(",4,1,1,", ",,,,").replace(",32,2,1,", ",,,,"), &[], "has no kernels");
    let no_time =
        read("trace").replace(",3000,11", ",0,11").replace(",900,", ",0,").replace(",5000,14", ",0,14");
    let no_time = no_time.replace(",3500,16", ",0,16").replace(",1100,", ",0,");
    refused(&no_time, &[], "the total time of the kernels is 0");
    refused(
        &read("ncu_raw").replace("gpu__time_duration.sum", "gpu__time"),
        &[],
        "has no gpu__time_duration.sum",
    );
    refused(&read("ncu_raw").replace("\"ns\"", "\"cycle\""), &[], "is in 'cycle'");
    refused(&read("ncu_raw").replace("\"\",\"\",\"\"", "\"3\",\"\",\"\""), &[], "has no units");
    refused(&read("ncu_details").replace("12.50", "fast"), &[], "'fast', expected a number");

    let good = read("kern_sum");
    for wrong in ["0", "-1", "nan", "inf", "x"] {
        refused(&good, &[&format!("--ceiling={wrong}")], "argument --ceiling: invalid");
    }
    let json = |name, text: &str| write(folder.path(), name, text);
    let low = json("low.json", r#"{"rows": [{"name": "read ceiling", "median": -4}]}"#);
    let roofline =
        json("roofline.json", r#"{"rows": [{"name": "drafter: fc", "unit": "MB", "median": 1.5}]}"#);
    let empty = json("empty.json", r#"{"rows": [7]}"#);
    let list =
        json("list.json", r#"{"sections": [{"groups": [{"layers": null, "times": 1, "launches": [1]}]}]}"#);
    refused(&good, &["--record", &low], "has the read ceiling -4");
    refused(&good, &["--record", &empty], "is not a JSON object with a list of rows");
    refused(&good, &["--record", "/none.json"], "cannot be read");
    refused(&good, &["--launches", &list], "--launches needs the sizes of the weights");
    refused(&good, &["--launches", &list, "--record", &roofline], "is not a list of launches");
    refused(
        &good,
        &["--launches", &roofline, "--record", &roofline],
        "is not a JSON object with a list of sections",
    );
    let none = kernel_table(&["/none.csv"]);
    assert_eq!(
        (none.code, &*none.err),
        (2, "kernel-table: /none.csv cannot be read: No such file or directory\n")
    );
}

// ---- profile.sh ----

/// Replacements for the profilers: they append their arguments to `calls` and write files with the names of
/// the real reports, and the tables.
const NSYS: &str = r#"#!/bin/bash
echo "nsys $*" >>"$HERE/calls"
[[ $FAILS != "nsys $1" ]] || { echo "no GPU"; exit 3; }
while [ $# -gt 0 ]; do
    case $1 in
        --output=*) : >"${1#--output=}.nsys-rep" ;;
        --report) reports=$2 ;;
        --output) for report in ${reports//,/ }; do cat "$TABLES/kern_sum.csv" >"$2_$report.csv"; done ;;
    esac
    shift
done
"#;
const NCU: &str = r#"#!/bin/bash
echo "ncu $*" >>"$HERE/calls"
[[ $FAILS != "ncu $1" ]] || { echo "no counters" >&2; exit 9; }
while [ $# -gt 0 ]; do
    case $1 in
        --export) : >"$2.ncu-rep" ;;
        --import) cat "$TABLES/ncu_raw.csv" ;;
    esac
    shift
done
"#;

/// A folder to use as PATH: the programs that the script needs, these profilers and a dflash-bench that does
/// nothing.
fn path_with(profilers: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    // Link the interpreter itself, because a python3 on PATH may be a script that searches PATH for others.
    let mut python = Command::new("python3");
    python.args(["-c", "import sys; print(sys.executable)"]);
    symlink(finish(python).done().trim(), folder.path().join("python3")).unwrap();
    for name in ["bash", "cat", "dirname", "mkdir"] {
        let path = std::env::var_os("PATH").unwrap();
        let mut paths = std::env::split_paths(&path).map(|folder| folder.join(name));
        symlink(paths.find(|path| path.exists()).unwrap(), folder.path().join(name)).unwrap();
    }
    for (name, text) in profilers.iter().chain(&[("dflash-bench", "#!/bin/bash\n")]) {
        let path = write(folder.path(), name, text);
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    folder
}

/// Runs profile.sh in the folder. Returns the run and the calls of the profilers.
fn profile(machine: &Path, args: &[&str], settings: &[(&str, &str)]) -> (Run, Vec<String>) {
    let mut command = Command::new("bash");
    command.arg(tool("profile.sh")).args(args).current_dir(machine);
    let own = [("PATH", machine), ("HERE", machine), ("TABLES", Path::new(TABLES))];
    command.envs(own).env("BENCH", machine.join("dflash-bench"));
    for name in ["KERNELS", "RECORD", "FAILS"] {
        command.env_remove(name);
    }
    command.envs(settings.iter().copied());
    let run = finish(command);
    let calls = fs::read_to_string(machine.join("calls")).unwrap_or_default();
    (run, calls.lines().map(String::from).collect())
}

#[test]
fn profile_sh_runs_nsys_and_ncu_with_the_right_flags() {
    let machine = path_with(&[("nsys", NSYS), ("ncu", NCU)]);
    let record = r#"{"rows": [{"name": "read ceiling", "median": 4400.0}]}"#;
    let record = write(machine.path(), "record.json", record);
    let flags = ["out", "--model", "a b"];
    let settings = [("RECORD", &*record), ("KERNELS", "^qkv")];
    let (run, calls) = profile(machine.path(), &flags, &settings);
    assert_eq!((run.code, calls.len()), (0, 8), "{run:?}");
    let has = |call: usize, parts: &[&str]| {
        for part in parts {
            assert!(calls[call].contains(part), "{part:?}: {}", calls[call]);
        }
    };
    let nsys = "nsys profile --trace=cuda,nvtx --sample=none --cpuctxsw=none";
    has(
        0,
        &[
            nsys,
            "--capture-range=cudaProfilerApi --capture-range-end=stop",
            "round --device cuda --rounds 1 --samples 1 --profile 5 --model a b",
        ],
    );
    has(
        1,
        &[
            "nsys stats",
            "--format csv",
            "cuda_gpu_kern_sum,cuda_gpu_trace,nvtx_pushpop_sum",
            "out/eager.nsys-rep",
        ],
    );
    has(2, &[nsys, "--cuda-graph-trace=graph", "round --device cuda --rounds 1 --samples 5 --model a b"]);
    has(4, &[nsys, "--cuda-graph-trace=node"]);
    // These runs have no window, so with --capture-range nsys would never start recording.
    assert!(!calls[2].contains("--capture-range") && !calls[4].contains("--capture-range"));
    has(
        6,
        &[
            "--clock-control none --profile-from-start off",
            "--kernel-name regex:^qkv",
            "dram__bytes_read.sum",
        ],
    );
    has(6, &["gpu__time_duration.sum", "dram__bytes_write.sum", "dram__throughput"]);
    has(6, &["round --device cuda --rounds 1 --samples 1 --profile 1 --model a b"]);
    has(7, &["ncu --import out/ncu.ncu-rep --csv --page raw --print-units base"]);
    let kernels = fs::read_to_string(machine.path().join("out/kernels.txt")).unwrap();
    assert_eq!(run.out, kernels);
    assert_eq!(kernels.matches("project_16").count(), 2);
    assert!(kernels.contains("4035          91.7"), "{kernels}");
}

#[test]
fn profile_sh_reports_what_is_missing_and_what_failed() {
    let refused = |machine: &Path, args: &[&str], settings: &[(&str, &str)], part: &str| {
        let (run, calls) = profile(machine, args, settings);
        assert!(run.code == 2 && run.out.is_empty() && run.err.lines().count() == 1, "{run:?}");
        assert!(run.err.contains(part) && calls.is_empty(), "{part}: {run:?}");
    };
    let none = path_with(&[]);
    refused(none.path(), &["out"], &[], "neither nsys nor ncu is on PATH");
    let both = path_with(&[("nsys", NSYS), ("ncu", NCU)]);
    refused(both.path(), &[], &[], "expected a folder to write to");
    refused(both.path(), &["--model", "demo"], &[], "expected a folder to write to");
    refused(both.path(), &["out"], &[("BENCH", "/none")], "no dflash-bench at /none");
    refused(both.path(), &["out"], &[("RECORD", "/none.json")], "RECORD is /none.json, which cannot be read");

    let (run, calls) = profile(both.path(), &["out"], &[("FAILS", "nsys profile")]);
    assert_eq!((run.code, calls.len()), (1, 5), "{run:?} {calls:?}");
    assert!(run.err.contains("failed (exit code 3); its output is at the end of out/log"), "{run:?}");
    assert!(fs::read_to_string(both.path().join("out/log")).unwrap().contains("no GPU"));
    // The results of ncu are printed although nsys failed.
    assert!(run.out.contains("4035") && !run.out.contains("project_16"), "{run:?}");
    let (run, _) = profile(both.path(), &["out"], &[("FAILS", "ncu --import")]);
    assert!(
        run.code == 1 && run.err.contains("failed (exit code 9)") && !run.out.contains("4035"),
        "{run:?}"
    );

    for (there, absent) in [(("ncu", NCU), "nsys"), (("nsys", NSYS), "ncu")] {
        let one = path_with(&[there]);
        let (run, calls) = profile(one.path(), &["out"], &[]);
        assert!(run.code == 0 && run.err.contains(&format!("{absent} is not on PATH")), "{run:?}");
        assert!(!calls.is_empty() && calls.iter().all(|call| call.starts_with(there.0)), "{calls:?}");
    }
}
