//! Runs the commands that README.md and docs/ show and compares their output with the pages. Also checks links,
//! widths and the length of the README.
//!
//! A fence that begins with ```` ```console ```` holds commands (`$ ...`, continued by a backslash at the end of a line),
//! each followed by its output: stdout, then stderr. Without output, only the exit code is checked, which must be 0. A
//! line `...` matches any lines. Not run: fences marked `gpu`, `slow` or `download` (```` ```console gpu ````), commands
//! that end in `# needs a GPU`, and commands of other programs (`cargo build`, tools/).
//!
//! `DFLASH_UPDATE_DOCS=1 cargo test --release --test cli docs::` writes the actual output into the pages instead of
//! comparing. Review the difference before committing it.

use crate::support::software_gpu;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const UPDATE: &str = "DFLASH_UPDATE_DOCS";

/// Programs whose commands are run, and commands that may stand before a pipe to them.
const RUN: [&str; 4] = ["dflash-gen", "dflash-bench", "printf", "head"];
/// First words of commands that the pages show and the test does not run.
const SHOWN: [&str; 12] = [
    ".ci/run",
    "cargo",
    "git",
    "hf",
    "ncu",
    "nsys",
    "pack/",
    "pip",
    "python3",
    "tar",
    "target/release/softgpu",
    "tools/",
];

/// README.md and docs/*.md, in order.
fn pages() -> Vec<PathBuf> {
    let mut pages: Vec<PathBuf> = fs::read_dir(Path::new(ROOT).join("docs"))
        .expect("docs/ exists")
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect();
    pages.push(Path::new(ROOT).join("README.md"));
    pages.sort();
    pages
}

fn read(page: &Path) -> String {
    fs::read_to_string(page).unwrap_or_else(|error| panic!("{}: {error}", page.display()))
}

/// One `$ ` line of a page and the output below it.
struct Example {
    /// Number of the command's line, from 1.
    line: usize,
    command: String,
    /// Lines of output, as `start..end` of the page's lines, from 0.
    output: std::ops::Range<usize>,
    /// Whether its fence or its comment says that it does not run everywhere.
    skipped: bool,
}

fn examples(text: &str) -> Vec<Example> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found: Vec<Example> = Vec::new();
    let mut at = 0;
    while at < lines.len() {
        let Some(info) = lines[at].strip_prefix("```") else {
            at += 1;
            continue;
        };
        let close = (at + 1..lines.len()).find(|&i| lines[i].starts_with("```")).expect("fences are closed");
        if info.split(' ').next() == Some("console") {
            let skipped = info.split(' ').any(|word| ["gpu", "slow", "download"].contains(&word));
            let mut i = at + 1;
            while i < close {
                let line = i + 1;
                let mut command = match lines[i].strip_prefix("$ ") {
                    Some(command) => command.to_string(),
                    None => panic!("line {line}: a console block begins with a `$ ` line"),
                };
                i += 1;
                while let Some(more) = command.strip_suffix('\\') {
                    command = format!("{} {}", more.trim_end(), lines[i].trim_start());
                    i += 1;
                }
                let skipped = skipped || command.ends_with("# needs a GPU");
                let end = (i..close).find(|&i| lines[i].starts_with("$ ")).unwrap_or(close);
                found.push(Example { line, command, output: i..end, skipped });
                i = end;
            }
        }
        at = close + 1;
    }
    found
}

/// How a command begins that runs on the software GPU.
const SOFTWARE_GPU: [&str; 2] = ["softgpu run -- ", "target/release/softgpu run -- "];

/// The command with `cargo run` resolved to the program that it runs, or none if the test does not run it. On the
/// software GPU it begins with the first of [`SOFTWARE_GPU`].
fn runnable(command: &str) -> Option<String> {
    if let Some(rest) = SOFTWARE_GPU.iter().find_map(|prefix| command.strip_prefix(prefix)) {
        return runnable(rest).map(|command| format!("{}{command}", SOFTWARE_GPU[0]));
    }
    let mut command = command.to_string();
    if let Some(rest) = command.strip_prefix("cargo run --release") {
        command = match rest.split_once(" --bin ").or_else(|| rest.split_once(" --example ")) {
            Some((_, named)) => {
                let folder = if rest.contains(" --example ") { "target/release/examples/" } else { "" };
                format!("{folder}{}", named.replacen(" -- ", " ", 1))
            }
            None => format!("dflash-gen {}", rest.strip_prefix(" -- ").unwrap_or(rest)),
        };
    }
    let program = |segment: &str| {
        let word = segment.trim().split(' ').next().unwrap_or_default().to_string();
        word.strip_prefix("target/release/").map(String::from).unwrap_or(word)
    };
    let runs = |name: &String| RUN.contains(&name.as_str()) || name.starts_with("examples/");
    command.split(" | ").map(program).all(|name| runs(&name)).then_some(command)
}

/// Adds `--device cpu` to commands that name no device, so that an example prints the same with and without a GPU.
fn on_the_cpu(command: &str) -> String {
    let bench = command.contains("dflash-bench generate");
    if command.contains("--device")
        || command.starts_with(SOFTWARE_GPU[0])
        || command.contains("--plan")
        || (command.contains("dflash-bench") && !bench)
    {
        return command.to_string();
    }
    match bench {
        true => command.replacen("dflash-bench generate", "dflash-bench generate --device cpu", 1),
        false => command.replacen("dflash-gen", "dflash-gen --device cpu", 1),
    }
}

/// Runs a command, which must succeed, in a folder with links to the repository's folders and the programs. Returns
/// stdout and stderr.
fn output(command: &str, at: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let programs = Path::new(env!("CARGO_BIN_EXE_dflash-gen")).parent().unwrap();
    fs::create_dir(folder.path().join("target")).unwrap();
    let link = |to: &Path, name: &str| std::os::unix::fs::symlink(to, folder.path().join(name)).unwrap();
    link(programs, "target/release");
    for name in ["benches", "demo", "tests", "tools"] {
        link(&Path::new(ROOT).join(name), name);
    }
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap_or_default());
    let mut shell = Command::new("sh");
    let command = match command.strip_prefix(SOFTWARE_GPU[0]) {
        None => command,
        Some(command) => {
            software_gpu::install(&mut shell);
            command
        }
    };
    shell.args(["-c", command]).current_dir(folder.path()).env("PATH", path).stdin(Stdio::null());
    // For commands that have no --device.
    shell.env("CUDA_VISIBLE_DEVICES", "");
    let done = shell.output().unwrap();
    let (out, err) = (String::from_utf8(done.stdout).unwrap(), String::from_utf8(done.stderr).unwrap());
    assert!(done.status.success(), "{at}: {command}\nended with {}:\n{out}{err}", done.status);
    // An answer need not end in a line break; statistics on stderr begin a new line.
    format!("{}\n{err}", out.trim_end_matches('\n'))
}

// ---- comparing ----

/// The lines without their machine-dependent parts: the line about the device is removed, times and rates become `#`.
fn masked(lines: &[&str]) -> Vec<String> {
    let mut timed: Option<Vec<bool>> = None;
    let mut masked = Vec::new();
    // Tables of dflash-bench: all numbers below a heading that says `measured`, and rows of the short table.
    let mut measured = false;
    let rows = ["tokens per second", "ms to the", "ms per", "speed-up"];
    for line in lines.iter().map(|line| line.trim_end()).filter(|line| !line.starts_with("device:")) {
        measured &= !line.is_empty();
        if measured || rows.iter().any(|row| line.starts_with(row)) {
            masked.push(without_numbers(line));
            continue;
        }
        measured = line.contains(", measured");
        let cells: Vec<&str> = line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect();
        let by_clock = |cell: &&str| cell.contains("tok/s") || *cell == "ratio";
        let header = cells.len() > 2 && cells.iter().any(by_clock) && !line.contains(" tok/s (");
        if header {
            timed = Some(cells.iter().map(by_clock).collect());
        } else if let Some(timed) = timed.as_ref().filter(|timed| timed.len() == cells.len()) {
            let cells = cells.iter().zip(timed).map(|(cell, timed)| if *timed { "#" } else { cell });
            masked.push(cells.collect::<Vec<_>>().join("  "));
            continue;
        }
        masked.push(without_times(line));
    }
    while masked.last().is_some_and(String::is_empty) {
        masked.pop();
    }
    let first = masked.iter().position(|line| !line.is_empty()).unwrap_or(0);
    masked.split_off(first)
}

/// The words of a line, with `#` for every number.
fn without_numbers(line: &str) -> String {
    let number = |word: &str| word.trim_end_matches(['x', ',']).parse::<f64>().is_ok();
    let words = line.split_whitespace().map(|word| if number(word) { "#" } else { word });
    words.collect::<Vec<_>>().join(" ")
}

/// A line with `#` for every number that `s`, `ms` or `tok/s` follows.
fn without_times(line: &str) -> String {
    let words: Vec<&str> = line.split(' ').collect();
    let unit = |word: &str| matches!(word.trim_end_matches([',', ')', ':']), "s" | "ms" | "tok/s");
    let number = |word: &str| word.trim_start_matches('(').parse::<f64>().is_ok();
    let mask = |(i, word): (usize, &&str)| {
        let timed = number(word) && words.get(i + 1).is_some_and(|next| unit(next));
        if timed { "#".to_string() } else { word.to_string() }
    };
    words.iter().enumerate().map(mask).collect::<Vec<_>>().join(" ")
}

/// Whether `actual` equals `expected`, in which a line `...` matches any lines.
fn matches(expected: &[String], actual: &[String]) -> bool {
    match expected.iter().position(|line| line == "...") {
        None => expected == actual,
        Some(at) => {
            let (before, after) = (&expected[..at], &expected[at + 1..]);
            actual.starts_with(before)
                && (before.len()..=actual.len()).any(|from| matches(after, &actual[from..]))
        }
    }
}

/// The new output for the page: `actual`, abridged where `shown` is.
fn abridged(shown: &[&str], actual: &str) -> Vec<String> {
    let actual: Vec<&str> = actual.trim_end().lines().map(str::trim_end).collect();
    let lines: Vec<&str> = match shown.iter().position(|line| *line == "...") {
        Some(at) if shown.len() <= actual.len() => {
            let after = shown.len() - at - 1;
            [&actual[..at], &["..."], &actual[actual.len() - after..]].concat()
        }
        _ => actual,
    };
    lines.into_iter().map(String::from).collect()
}

// ---- the tests ----

#[test]
fn commands_in_the_pages_print_the_output_that_is_shown() {
    let update = std::env::var_os(UPDATE).is_some();
    let (mut wrong, mut run) = (Vec::new(), 0);
    for page in pages() {
        let text = read(&page);
        let mut lines: Vec<String> = text.lines().map(String::from).collect();
        // From last to first, so that replaced output does not shift the lines of the remaining examples.
        for example in examples(&text).into_iter().rev().filter(|example| !example.skipped) {
            let Some(command) = runnable(&example.command) else { continue };
            let at = format!("{}:{}", page.strip_prefix(ROOT).unwrap().display(), example.line);
            let program = command.split(' ').next().unwrap_or_default();
            let built = Path::new(env!("CARGO_BIN_EXE_dflash-gen")).parent().unwrap();
            if let Some(name) = program.strip_prefix("target/release/examples/")
                && !built.join("examples").join(name).exists()
            {
                eprintln!("{at}: not run, {name} is not built (cargo test without --test builds examples)");
                continue;
            }
            run += 1;
            let shown: Vec<&str> = text.lines().collect::<Vec<_>>()[example.output.clone()].to_vec();
            let actual = output(&on_the_cpu(&command), &at);
            if shown.is_empty() {
                continue;
            }
            if update {
                // The output for a reader without a GPU, including the reason for the CPU.
                let actual = match command == on_the_cpu(&command)
                    || !shown.iter().any(|l| l.starts_with("device:"))
                {
                    true => actual,
                    false => output(&command, &at),
                };
                lines.splice(example.output, abridged(&shown, &actual));
                continue;
            }
            let actual: Vec<&str> = actual.lines().collect();
            let (expected, actual) = (masked(&shown), masked(&actual));
            if !matches(&expected, &actual) {
                wrong.push(format!(
                    "{at}: $ {}\n---- the page, times left out\n{}\n---- the program\n{}\n",
                    example.command,
                    expected.join("\n"),
                    actual.join("\n")
                ));
            }
        }
        if update {
            fs::write(&page, lines.join("\n") + "\n").unwrap();
        }
    }
    assert!(wrong.is_empty(), "{}\n({UPDATE}=1 writes the actual output into the pages)", wrong.join("\n"));
    assert!(run >= 6, "only {run} commands were found");
}

#[test]
fn commands_that_are_not_run_name_programs_that_exist() {
    for page in pages() {
        for example in examples(&read(&page)) {
            if runnable(&example.command).is_some() {
                continue;
            }
            for part in example.command.split(" && ").flat_map(|part| part.split(" | ")) {
                let word = part.trim().split(' ').next().unwrap_or_default();
                let known = |name: &&str| word == *name || (name.ends_with('/') && word.starts_with(*name));
                let at = format!("{}:{}", page.display(), example.line);
                assert!(
                    SHOWN.iter().any(known) || runnable(part).is_some(),
                    "{at}: the program {word:?} is unknown"
                );
                let file = |word: &&str| word.starts_with("tools/");
                for tool in part.split(' ').filter(file) {
                    assert!(Path::new(ROOT).join(tool).exists(), "{at}: there is no {tool}");
                }
            }
        }
    }
}

#[test]
fn the_readme_is_short_and_pages_are_narrow() {
    let readme = read(&Path::new(ROOT).join("README.md"));
    assert!(readme.lines().count() <= 200, "README.md has {} lines", readme.lines().count());
    for page in pages() {
        let (mut fenced, is_readme) = (false, page.ends_with("README.md"));
        for (i, line) in read(&page).lines().enumerate() {
            fenced ^= line.starts_with("```");
            let (width, at) = (line.chars().count(), format!("{}:{}", page.display(), i + 1));
            assert!(width <= 100 || !line.starts_with('|'), "{at}: a table of {width} columns");
            // Output may be as wide as the program prints it, and up to 125 columns in the README.
            let output = fenced && !line.starts_with("$ ");
            let most = [110, if is_readme { 125 } else { usize::MAX }][usize::from(output)];
            assert!(width <= most, "{at}: {width} columns, expected at most {most}");
        }
    }
}

/// The table of folders in src/lib.rs, lowest layer first: a folder's code uses only folders above it.
#[test]
fn folders_use_only_the_layers_below_them() {
    let root = Path::new(ROOT).join("src");
    let front = read(&root.join("lib.rs"));
    let table = front
        .split("//! | folder | owns |")
        .nth(1)
        .expect("src/lib.rs has the table")
        .split("\n//!\n")
        .next();
    let layers: Vec<&str> =
        table.unwrap().split("//! | ").skip(1).filter_map(|row| row.split('`').nth(1)).collect();
    let mut folders: Vec<_> = fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.retain(|path| path.is_dir() && !path.ends_with("bin"));
    let of = |name: &str| {
        layers.iter().position(|layer| *layer == name).unwrap_or_else(|| panic!("{name} is no row"))
    };
    assert_eq!(folders.len(), layers.len(), "{folders:?} {layers:?}");
    for folder in folders {
        let own = of(folder.file_name().unwrap().to_str().unwrap());
        let mut open = vec![folder];
        while let Some(path) = open.pop() {
            if path.is_dir() {
                open.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
                continue;
            }
            for (i, line) in read(&path).lines().enumerate() {
                let code = line.split("//").next().unwrap();
                for rest in code.split("crate::").skip(1) {
                    let name = rest.split(|c: char| !c.is_ascii_lowercase() && c != '_').next().unwrap();
                    let at = format!("{}:{}", path.display(), i + 1);
                    assert!(layers[..=own].contains(&name) || !layers.contains(&name), "{at} uses {name}");
                }
            }
        }
    }
}

/// GitHub's anchor of a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().to_lowercase();
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn relative_links_lead_to_files_and_headings() {
    let more = ["CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benches/README.md"];
    let more = more.iter().map(|name| Path::new(ROOT).join(name)).filter(|path| path.exists());
    for page in pages().into_iter().chain(more) {
        let text = read(&page);
        let targets = text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(link, _)| link);
        for link in targets.filter(|link| !link.contains("://") && !link.starts_with("mailto:")) {
            let (file, section) = link.split_once('#').unwrap_or((link, ""));
            let file = if file.is_empty() { page.clone() } else { page.parent().unwrap().join(file) };
            assert!(file.exists(), "{}: the link to {link} leads to no file", page.display());
            let headings =
                || read(&file).lines().filter(|l| l.starts_with('#')).map(String::from).collect::<Vec<_>>();
            let is = |heading: &String| anchor(heading.trim_start_matches('#')) == section;
            assert!(
                section.is_empty() || headings().iter().any(is),
                "{}: {link} has no such section",
                page.display()
            );
        }
    }
}

#[test]
fn comparison_ignores_only_elisions_and_times() {
    let line = "24 tokens in 1.17 s, 21 tok/s (prompt: 7 tokens, 167 ms), 11 rounds";
    assert_eq!(without_times(line), "24 tokens in # s, # tok/s (prompt: 7 tokens, # ms), 11 rounds");
    let table = ["prompt  tokens  AR tok/s  ratio   tau", "     1     128         3093   0.42  4.45"];
    assert_eq!(masked(&table)[1], "1  128  #  #  4.45");
    let table = ["ms, measured; batch 1", "        median", "round    2.237", "", "MB, counted", "fc  167.8"];
    assert_eq!(masked(&table)[..3], ["ms, measured; batch 1", "median", "round #"]);
    assert_eq!(masked(&table)[3..], ["", "MB, counted", "fc  167.8"]);
    assert_eq!(masked(&["speed-up  0.44x  0.41 to 0.47, 99 %"]), ["speed-up # # to # # %"]);
    let lines = |text: &str| text.split(' ').map(String::from).collect::<Vec<_>>();
    assert!(matches(&lines("a ... d"), &lines("a b c d")) && matches(&lines("a ... d"), &lines("a d")));
    assert!(!matches(&lines("a ... d"), &lines("a b c")) && !matches(&lines("a b"), &lines("a b c")));
    assert_eq!(runnable("cargo run --release -- x -n 3").as_deref(), Some("dflash-gen x -n 3"));
    let example = runnable("cargo run --release --example stream -- x");
    assert_eq!(example.as_deref(), Some("target/release/examples/stream x"));
    assert_eq!(runnable("cargo build --release"), None);
}
