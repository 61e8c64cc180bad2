//! `dflash-bench show` and the pages of `--report`, from records that no card made: their card is named "constructed".

#[path = "support/bench.rs"]
mod bench;
#[path = "support/program.rs"]
mod program;
mod support;

use bench::{bench, misfit, refused};
use program::write;
use roxmltree::{Document, Node};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

// ---- records ----

fn row(name: &str, parameters: Value, unit: &str, value: f64, numbers: Value) -> Value {
    let higher = ["tok/s", "GB/s", "x", "share", "tok", "rounds"].contains(&unit);
    json!({
        "name": name, "parameters": parameters, "kind": "measured", "unit": unit,
        "better": if higher { "higher" } else { "lower" }, "samples": null, "rounds": null, "throttled": null,
        "median": value, "p10": null, "p90": null, "numbers": numbers, "verdict": null,
    })
}

fn record(command: &str, rows: Vec<Value>) -> Value {
    let state = |mhz: u32, watts: f64, throttle: Value| {
        json!({
            "sm_mhz": mhz, "memory_mhz": 3201, "celsius": 41, "watts": watts, "limit_watts": 700.0,
            "throttle": throttle, "processes": [{ "pid": 4711, "bytes": 1.5e9 as u64 }, { "pid": 12, "bytes": null }],
        })
    };
    let found = json!({
        "schema": "dflash-bench/1", "command": command, "arguments": [command, "--model", "qwen3-8b"],
        "build": { "version": "0.1.0", "commit": "c0ffee", "features": [], "ptx": ["compute_80", "compute_90a"] },
        "machine": {
            "device": "cuda", "card": "constructed", "driver": "580.95", "gigabytes_per_s": 4800.0,
            "tflops": 989.0, "memory_gigabytes": 150.0, "capability": "9.0", "multiprocessors": 132,
            "l2_bytes": 52428800, "ptx": "compute_90a", "before": state(1980, 118.5, json!([])),
            "after": state(1755, 640.0, json!(["sw_power_cap"])),
        },
        "model": { "target": "qwen3-8b", "drafter": "qwen3-8b-dflash" }, "rows": rows,
    });
    assert_eq!(misfit(&found), None);
    found
}

const CEILING: f64 = 4300.0;

/// Name, weights in MB, and the share of the ceiling it is said to reach.
const KERNELS: [(&str, f64, f64); 9] = [
    ("target: qkv", 50.3, 0.81),
    ("target: o", 33.6, 0.74),
    ("target: gate_up", 201.3, 0.92),
    ("target: down", 100.7, 0.88),
    ("target: lm_head", 1244.7, 0.95),
    ("drafter: qkv", 50.3, 0.79),
    ("drafter: fc", 167.8, 0.9),
    ("attention", 4.2, 0.35),
    ("drafter attention", 4.2, 0.31),
];

fn kernels() -> Value {
    let mut rows = vec![row("read ceiling", json!({}), "GB/s", CEILING, json!({}))];
    for n in [1, 8, 16, 32, 64, 128] {
        for (name, megabytes, share) in KERNELS {
            let us = megabytes * 1e3 / (CEILING * share);
            let numbers = json!({
                "GB/s": CEILING * share, "share of ceiling": share, "floor us": megabytes * 1e3 / CEILING,
                "MB": megabytes, "GFLOP": megabytes * 1e-3 * f64::from(n),
            });
            rows.push(row(name, json!({ "rows": n, "context": 1024 }), "us", us, numbers));
        }
    }
    rows[3]["samples"] = json!(vec![rows[3]["median"].clone(); 5]);
    rows[3]["throttled"] = json!([0, 4]);
    record("kernels", rows)
}

/// In the order of a round, at batch 1, in ms.
const PARTS: [(&str, f64); 6] =
    [("begin", 0.05), ("inject", 0.2), ("draft", 0.8), ("verify", 3.2), ("accept", 0.15), ("gaps", 0.1)];

fn round() -> Value {
    let mut rows = vec![];
    for context in [1024, 8192] {
        for batch in [1, 2, 4, 8] {
            let slow = 1.0 + f64::from(batch) * 0.04 + f64::from(context) / 4e4;
            let at = || json!({ "context": context, "batch": batch });
            let with = |name: &str, value: Value| {
                let mut all = at();
                all[name] = value;
                all
            };
            let block = || with("block", json!(16));
            rows.push(row("plain step", at(), "ms", 3.4 * slow, json!({})));
            rows.push(row("round", block(), "ms", 4.4 * slow, json!({ "floor ms": 3.9, "launches": 400 })));
            rows.extend(PARTS.map(|(name, ms)| row(name, block(), "ms", ms * slow, json!({}))));
            rows.push(row("round with host", block(), "ms", 4.6 * slow, json!({})));
            let rate = f64::from(batch) * 1e3 / slow;
            rows.push(row("plain decoding", at(), "tok/s", rate / 3.4, json!({})));
            for length in [4.0, 6.5] {
                let name = "DFlash, synthetic acceptance";
                let mut at = block();
                at["acceptance"] = json!(length);
                rows.push(row(name, at, "tok/s", rate * length / 4.5, json!({ "speed-up": 2.9 })));
            }
        }
    }
    record("round", rows)
}

/// Rounds that accepted 0, 1, .. drafts.
const ACCEPTED: [f64; 8] = [40.0, 60.0, 90.0, 70.0, 50.0, 40.0, 30.0, 20.0];

fn generate() -> Value {
    let mut rows = vec![];
    for (decoding, rate) in [("plain", 290.0), ("dflash", 1010.0)] {
        for (name, unit, value) in
            [("TTFT", "ms", 22.0), ("TPOT", "ms", 1e3 / rate), ("tokens per second", "tok/s", rate)]
        {
            rows.push(row(name, json!({ "decoding": decoding }), unit, value, json!({ "p99": value * 1.3 })));
            for (category, factor) in [("code", 1.2), ("chat", 0.8)] {
                let at = json!({ "decoding": decoding, "category": category });
                rows.push(row(name, at, unit, value * factor, json!({})));
            }
        }
    }
    rows.push(row("speed-up", json!({}), "x", 3.48, json!({ "low": 3.21, "high": 3.77 })));
    rows.push(row("acceptance length", json!({ "mean": "tokens/rounds" }), "tok", 3.87, json!({})));
    rows.push(row("acceptance length", json!({ "mean": "of prompts" }), "tok", 4.02, json!({})));
    let at = json!({ "mean": "tokens/rounds", "category": "code" });
    rows.push(row("acceptance length", at, "tok", 9.99, json!({})));
    for (k, count) in ACCEPTED.iter().enumerate() {
        let mut row = row("rounds", json!({ "accepted": k }), "rounds", *count, json!({}));
        row["kind"] = json!("counted");
        rows.push(row);
        let share = 0.9f64.powi(k as i32 + 1);
        let at = json!({ "position": k + 1 });
        rows.push(self::row("accepted at position", at, "share", share, json!({ "conditional": 0.9 })));
    }
    record("generate", rows)
}

/// Of what the emulator counts.
fn counted(command: &str, rows: &[(&str, Value)]) -> Value {
    let counts = |(name, parameters): &(&str, Value)| {
        let numbers = json!({
            "launches": 3, "blocks": 64, "streamed": 4000000, "read": 900000, "written": 100000, "mma": 512,
            "conflicts": 0,
        });
        let mut row = row(name, parameters.clone(), "bytes", 5e6, numbers);
        row["kind"] = json!("counted");
        row
    };
    let mut found = record(command, rows.iter().map(counts).collect());
    found["machine"]["device"] = json!("emulator");
    found["machine"]["card"] = Value::Null;
    found
}

// ---- pages ----

/// What `show` writes of these records.
#[track_caller]
fn page(records: &[Value]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let report = dir.path().join("page.html").display().to_string();
    let files =
        records.iter().enumerate().map(|(i, r)| write(dir.path(), &format!("{i}.json"), r.to_string()));
    let args = ["show".to_string()].into_iter().chain(files).chain(["--report".into(), report.clone()]);
    let run = bench(args);
    assert!(run.code == 0 && run.err.is_empty(), "{run:?}");
    fs::read_to_string(report).unwrap()
}

/// A page is XML, too, but for its doctype. It asks for nothing: no network, no script.
#[track_caller]
fn parsed(page: &str) -> Document<'_> {
    let body = page.strip_prefix("<!DOCTYPE html>\n").expect("a doctype");
    let document = Document::parse(body).unwrap_or_else(|e| panic!("{e} in {page}"));
    let known = [
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "h2",
        "h3",
        "ul",
        "li",
        "a",
        "section",
        "dl",
        "div",
        "dt",
        "dd",
        "figure",
        "figcaption",
        "p",
        "span",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "svg",
        "rect",
        "line",
        "polyline",
        "circle",
        "polygon",
        "text",
    ];
    for node in document.descendants().filter(Node::is_element) {
        assert!(known.contains(&node.tag_name().name()), "{node:?}");
        for attribute in node.attributes() {
            let (name, value) = (attribute.name(), attribute.value());
            let inside = match name {
                "href" => value.starts_with("#record"),
                "src" => false,
                _ => !name.starts_with("on") && !value.contains("url("),
            };
            assert!(inside, "{name}={value}");
        }
    }
    assert_eq!(page.replace("xmlns=\"http://www.w3.org/2000/svg\"", "").matches("://").count(), 0);
    assert!(!include_str!("../src/bin/dflash-bench/report.css").contains("url("));
    document
}

fn text_of(node: Node) -> String {
    node.descendants().filter(Node::is_text).filter_map(|text| text.text()).collect()
}

fn all<'a>(node: Node<'a, 'a>, tag: &'a str) -> impl Iterator<Item = Node<'a, 'a>> {
    node.descendants().filter(move |node| node.tag_name().name() == tag)
}

/// The titles of the figures.
fn titles(document: &Document) -> Vec<String> {
    let figures = all(document.root(), "figure");
    figures.filter_map(|figure| figure.attribute("aria-label").map(String::from)).collect()
}

#[track_caller]
fn figure<'a>(document: &'a Document<'a>, title: &str) -> Node<'a, 'a> {
    let mut figures = all(document.root(), "figure");
    let found = figures.find(|figure| figure.attribute("aria-label") == Some(title));
    found.unwrap_or_else(|| panic!("no figure {title:?} among {:?}", titles(document)))
}

/// Attributes of drawn elements, as numbers, in their order.
fn drawn(figure: Node, tag: &str, fill: &str, attribute: &str) -> Vec<f64> {
    let alike = figure.descendants().filter(|node| {
        node.tag_name().name() == tag
            && [node.attribute("fill"), node.attribute("stroke")].contains(&Some(fill))
    });
    alike.map(|node| node.attribute(attribute).unwrap().parse().unwrap()).collect()
}

/// Where an axis has the tick of this text; the first such text, which for `y` is the lowest.
#[track_caller]
fn tick(figure: Node, label: &str, attribute: &str) -> f64 {
    let at = |text: Node| text.attribute(attribute).unwrap().parse::<f64>().unwrap();
    let alike = all(figure, "text").filter(|text| text_of(*text).trim() == label);
    let anchored =
        alike.filter(|text| (text.attribute("text-anchor") == Some("middle")) == (attribute == "x"));
    anchored.map(at).next().unwrap_or_else(|| panic!("no tick {label}"))
}

/// Names and values under the headings of a page.
fn facts(document: &Document) -> Vec<(String, String)> {
    let pairs = all(document.root(), "div").filter(|div| div.children().any(|c| c.has_tag_name("dt")));
    let of = |div: Node, tag: &str| text_of(div.children().find(|c| c.has_tag_name(tag)).unwrap());
    pairs.map(|div| (of(div, "dt"), of(div, "dd"))).collect()
}

#[test]
fn one_page_holds_everything_that_the_records_say() {
    let floor = json!(null);
    let mut records = [kernels(), round(), generate(), floor];
    records[3] = serde_json::from_str(&bench(["floor", "--batch", "1-8*2", "--json"]).done()).unwrap();
    let page = page(&records);
    // Left where a person can look at it.
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("constructed.html");
    fs::write(kept, &page).unwrap();
    let document = parsed(&page);
    assert_eq!(
        titles(&document),
        [
            "Roofline",
            "Share of the read ceiling, rows 1, context 1024",
            "Share of the read ceiling, rows 8, context 1024",
            "Share of the read ceiling, rows 16, context 1024",
            "Share of the read ceiling, rows 32, context 1024",
            "Share of the read ceiling, rows 64, context 1024",
            "Share of the read ceiling, rows 128, context 1024",
            "Where a round goes at context 1024",
            "Tokens per second against batch at context 1024",
            "Where a round goes at context 8192",
            "Tokens per second against batch at context 8192",
            "Tokens per second",
            "Acceptance",
            "Acceptance by position",
            "Tokens per second against batch at context 1024",
        ]
    );
    let heads: Vec<String> = all(document.root(), "h2").map(text_of).collect();
    assert_eq!(heads[1], "round of qwen3-8b with qwen3-8b-dflash on constructed");
    assert_eq!(heads[3], "floor of qwen3-8b with qwen3-8b-dflash on H200: predicted, not measured");
    let links = all(document.root(), "a").map(|a| a.attribute("href").unwrap().to_string());
    let targets = all(document.root(), "section").map(|s| format!("#{}", s.attribute("id").unwrap()));
    assert!(links.eq(targets));

    let facts = facts(&document);
    for (name, value) in [
        ("Command", "dflash-bench kernels --model qwen3-8b"),
        ("Card", "constructed"),
        ("Driver", "580.95"),
        ("Build", "dflash 0.1.0, commit c0ffee"),
        ("PTX targets of the build", "compute_80 compute_90a"),
        ("PTX target that ran", "compute_90a"),
        ("L2", "52.43 MB"),
        ("read ceiling", "4300 GB/s"),
        ("speed-up", "3.480 x (3.210 to 3.770 at 99 %)"),
        ("acceptance length mean of prompts", "4.020 tok"),
    ] {
        assert!(facts.contains(&(name.into(), value.into())), "{name} {value}: {facts:?}");
    }
    assert!(facts.iter().all(|fact| fact.1 != "9.990 tok"), "{facts:?}");
    let states = all(document.root(), "table").next().map(text_of).unwrap();
    for line in [
        "SM clock1980 MHz1755 MHz",
        "Temperature41 °C41 °C",
        "Power118.5 W640 W",
        "Clocks held back bynonesw_power_cap",
        "Other processes4711 (1.500 GB), 124711 (1.500 GB), 12",
    ] {
        assert!(states.contains(line), "{line}: {states}");
    }
    let labels: Vec<String> = all(document.root(), "ul")
        .filter(|ul| ul.attribute("class") == Some("labels"))
        .map(text_of)
        .collect();
    assert_eq!(
        labels,
        [
            "throttled: 1 of 55 rows",
            "synthetic acceptance: assumed, not measured",
            "predicted: from bytes and operations, nothing ransynthetic acceptance: assumed, not measured",
        ]
    );
    // Every row is in its table, with its numbers.
    for (record, section) in records.iter().zip(all(document.root(), "section")) {
        let rows = record["rows"].as_array().unwrap();
        let table = all(section, "table").last().unwrap();
        let lines: Vec<Node> = all(table, "tr").collect();
        assert_eq!(lines.len(), rows.len() + 1);
        for (row, line) in rows.iter().zip(&lines[1..]) {
            let cells: Vec<String> = all(*line, "td").map(text_of).collect();
            assert_eq!(cells[0], row["name"].as_str().unwrap());
            let median = row["median"].as_f64().unwrap();
            let near =
                |cell: &String| cell.parse().is_ok_and(|x: f64| (x - median).abs() <= 1e-3 * median.abs());
            assert!(cells.iter().any(near), "{median}: {cells:?}");
        }
    }
}

#[test]
fn figures_draw_to_scale() {
    let page = page(&[kernels(), round(), generate()]);
    let document = parsed(&page);
    // The first bar of a round: its parts side by side, as long as they take. Boxes of the legend are no drawing.
    let timeline = figure(&document, "Where a round goes at context 1024");
    let svg = || all(timeline, "svg").next().unwrap();
    let per_ms = {
        let step = drawn(svg(), "rect", "var(--c9)", "width");
        // With host, plain step, and so on.
        step[1] / (3.4 * (1.0 + 0.04 + 1024.0 / 4e4))
    };
    let slow = 1.0 + 0.04 + 1024.0 / 4e4;
    let mut end = None;
    for (i, (name, ms)) in PARTS.iter().enumerate() {
        let fill = format!("var(--c{})", i + 2);
        let (x, width) = (drawn(svg(), "rect", &fill, "x")[0], drawn(svg(), "rect", &fill, "width")[0]);
        assert!((width - ms * slow * per_ms).abs() < 2.0, "{name}: {width}, expected {}", ms * slow * per_ms);
        assert!(end.is_none_or(|end: f64| (end - x).abs() < 2.0), "{name} begins at {x}, not at {end:?}");
        end = Some(x + width);
    }
    let texts: Vec<String> = all(timeline, "text").map(|text| text_of(text).trim().to_string()).collect();
    assert!(texts.contains(&"batch 1, block 16".to_string()), "{texts:?}");
    assert!(
        texts.contains(&"4.689 ms".to_string()) && texts.contains(&"ms, measured".to_string()),
        "{texts:?}"
    );

    // Columns as high as their counts.
    let heights = drawn(figure(&document, "Acceptance"), "rect", "var(--c2)", "height");
    let tallest = heights.iter().copied().fold(0.0, f64::max);
    assert_eq!(heights.len(), ACCEPTED.len());
    for (height, count) in heights.iter().zip(ACCEPTED) {
        assert!((height / tallest - count / 90.0).abs() < 0.01, "{heights:?}");
    }
    let scale = figure(&document, "Acceptance");
    let of_twenty = tick(scale, "0", "y") - tick(scale, "20", "y");
    assert!((tallest / of_twenty - 90.0 / 400.0 / 0.2).abs() < 0.02, "{tallest} and {of_twenty}");
    for note in ["400 rounds.", "Acceptance length, tokens/rounds: 3.870."] {
        assert!(text_of(scale).contains(note), "{note}: {}", text_of(scale));
    }
    // Shares reach as far as their percentage of the line that marks 100.
    let shares = figure(&document, "Share of the read ceiling, rows 16, context 1024");
    let texts: Vec<String> = all(shares, "text").map(|text| text_of(text).trim().to_string()).collect();
    assert!(texts.contains(&"81 %".to_string()) && texts.contains(&"target: qkv".to_string()));
    let widths = drawn(shares, "rect", "var(--c2)", "width");
    assert!((widths[2] / widths[0] - 0.92 / 0.81).abs() < 0.01 && widths.len() == 5, "{widths:?}");
    let marked = figure(&document, "Share of the read ceiling, rows 1, context 1024");
    assert!(all(marked, "text").any(|text| text_of(text).contains("92 %, throttled")), "{}", text_of(marked));

    // So do the steps of other batches, each beside its round.
    let steps = drawn(svg(), "rect", "var(--c9)", "width");
    let slow = |batch: f64| 1.0 + batch * 0.04 + 1024.0 / 4e4;
    for (i, batch) in [1.0, 2.0, 4.0, 8.0].into_iter().enumerate() {
        let expected = [4.6, 3.4].map(|ms| ms * slow(batch) * per_ms);
        assert!(expected.iter().zip(&steps[2 * i..]).all(|(e, w)| (e - w).abs() < 2.0), "{batch}: {steps:?}");
    }

    // Decades of a roofline are equally far apart: rows 1 and 128 of a kernel are log10(128) of them.
    let roofline = figure(&document, "Roofline");
    let dots = drawn(roofline, "circle", "var(--c2)", "cx");
    assert_eq!(all(roofline, "circle").count(), 6 * KERNELS.len());
    let decade = (dots[5 * 5] - dots[0]) / 128f64.log10();
    assert!((dots[5] - dots[0] - decade * 8f64.log10()).abs() < 3.0, "{dots:?}");
    // As many operations per byte as rows, since a weight of two bytes makes two of each; and as high as it is fast.
    let ten = tick(roofline, "10", "x");
    assert!((dots[5] - ten - decade * 0.8f64.log10()).abs() < 3.0, "{ten}: {dots:?}");
    let (low, high) = (tick(roofline, "1000", "y"), tick(roofline, "100000", "y"));
    let expected = low + (high - low) / 2.0 * (CEILING * 0.81 / 1000.0).log10();
    let found = drawn(roofline, "circle", "var(--c2)", "cy")[0];
    assert!((found - expected).abs() < 5.0, "{found}, expected {expected}");
    let dots: Vec<String> = all(roofline, "circle").map(text_of).collect();
    let expected = format!("target: qkv (rows 1, context 1024): {:.0} GFLOP/s", CEILING * 0.81);
    assert!(dots.contains(&expected), "{expected}: {dots:?}");
    let legend = text_of(roofline);
    assert!(legend.contains("read ceiling, measured: 4300 GB/s"), "{legend}");
    assert!(legend.contains("tensor cores, nominal: 989 TFLOP/s"), "{legend}");

    let curve = figure(&document, "Acceptance by position");
    let dots: Vec<String> = all(curve, "circle").map(text_of).collect();
    assert!(dots.len() == 16 && dots[0] == "position 1: 90 %" && dots[1] == "position 2: 81 %", "{dots:?}");
    let heights = drawn(curve, "circle", "var(--c3)", "cy");
    assert!(heights.len() == 8 && heights.iter().all(|y| *y == heights[0]), "{heights:?}");
}

#[test]
fn tokens_against_batch_have_the_floor_of_the_same_models_beside_them() {
    let floor = |model: &str| -> Value {
        let args = ["floor", "--model", model, "--batch", "1-8*2", "--acceptance", "4", "--json"];
        serde_json::from_str(&bench(args).done()).unwrap()
    };
    let title = "Tokens per second against batch at context 1024";
    let legends = |records: &[Value]| {
        let page = page(records);
        let document = parsed(&page);
        let lines = all(figure(&document, title), "li");
        lines.map(|li| text_of(li).trim().to_string()).collect::<Vec<_>>()
    };
    let measured = [
        "measured: plain decoding",
        "measured: DFlash, synthetic acceptance of 4, 16 rows",
        "measured: DFlash, synthetic acceptance of 6.5, 16 rows",
    ];
    assert_eq!(legends(&[round()]), measured);
    assert_eq!(legends(&[round(), floor("qwen3-4b")]), measured);
    let [plain, four, more] = measured;
    let predicted = [
        "predicted for H200: plain decoding",
        "predicted for H200: DFlash, synthetic acceptance of 4, 16 rows",
    ];
    assert_eq!(legends(&[floor("qwen3-8b"), round()])[..2], predicted);
    let page = page(&[round(), floor("qwen3-8b")]);
    let document = parsed(&page);
    let both = figure(&document, title);
    let lines: Vec<String> = all(both, "li").map(|li| text_of(li).trim().to_string()).collect();
    assert_eq!(lines, [plain, predicted[0], four, predicted[1], more]);
    // The same colour for the same thing, and batches at equal distances where they are.
    let dots = drawn(both, "circle", "var(--c2)", "cx");
    assert_eq!(dots[..4], dots[4..]);
    assert!((dots[3] - dots[2] - 4.0 * (dots[1] - dots[0])).abs() < 4.0, "{dots:?}");
    assert!(
        text_of(both).contains("its length is assumed, not measured")
            && text_of(both).contains("nothing ran")
    );
    let titles: Vec<String> = all(both, "circle").map(text_of).collect();
    assert!(
        titles.iter().any(|title| title == "measured: plain decoding, batch 1: 276.0 tok/s"),
        "{titles:?}"
    );
}

#[test]
fn counters_of_the_emulator_are_called_so() {
    let at = || json!({ "context": 64, "batch": 1 });
    let block = || json!({ "context": 64, "batch": 1, "block": 16 });
    let rows = [
        ("read ceiling", json!({})),
        ("target: qkv", json!({ "rows": 1 })),
        ("attention", json!({ "rows": 1, "context": 64, "batch": 1 })),
        ("attention", json!({ "rows": 1, "context": 64, "batch": 4 })),
    ];
    let kernels = counted("kernels", &rows);
    let mut round = counted(
        "round",
        &[("plain step", at()), ("round", block()), ("draft", block()), ("verify", block())],
    );
    round["rows"][2]["median"] = json!(1.5e6);
    round["rows"][3]["median"] = json!(3.5e6);
    let mut rate = row("plain decoding", at(), "bytes/tok", 4e6, json!({}));
    rate["kind"] = json!("counted");
    round["rows"].as_array_mut().unwrap().push(rate);
    let page = page(&[kernels, round]);
    let document = parsed(&page);
    let bytes = "Bytes by the emulator's counters, rows 1, context 64";
    let rates = "Bytes per token against batch at context 64";
    assert_eq!(titles(&document), [bytes, "Where a round goes at context 64", rates]);
    let dots: Vec<String> = all(figure(&document, rates), "circle").map(text_of).collect();
    assert_eq!(dots, ["counted: plain decoding, batch 1: 4 MB/tok"]);
    let heads: Vec<String> = all(document.root(), "h2").map(text_of).collect();
    assert_eq!(heads[0], "kernels of qwen3-8b with qwen3-8b-dflash on emulator: counters, no times");
    assert!(page.contains("<li>counted by the emulator: no times</li>") && !page.contains("measured"));
    let widths = |title, fill| drawn(figure(&document, title), "rect", fill, "width");
    let labels: Vec<String> =
        all(figure(&document, bytes), "text").map(|text| text_of(text).trim().into()).collect();
    let labels: Vec<&str> = labels.iter().map(String::as_str).filter(|label| label.contains("a")).collect();
    assert_eq!(
        labels,
        ["MB that cross the bus, counted", "target: qkv", "attention batch 1", "attention batch 4"]
    );
    assert!(facts(&document).iter().all(|fact| fact.0 != "read ceiling"));
    let texts: Vec<String> =
        all(figure(&document, bytes), "text").map(|text| text_of(text).trim().into()).collect();
    for text in
        ["target: qkv", "attention batch 1", "attention batch 4", "MB that cross the bus, counted", "5 MB"]
    {
        assert!(texts.contains(&text.to_string()), "{text}: {texts:?}");
    }
    assert!(
        !texts.contains(&"read ceiling".into())
            && facts(&document).iter().all(|fact| fact.0 != "read ceiling")
    );
    let bytes = |fill| widths(bytes, fill)[0];
    assert!((bytes("var(--c2)") / bytes("var(--c3)") - 40.0 / 9.0).abs() < 0.05);
    assert!((bytes("var(--c3)") / bytes("var(--c4)") - 9.0).abs() < 1.0);
    let round = |fill| widths("Where a round goes at context 64", fill)[0];
    assert!((round("var(--c5)") / round("var(--c4)") - 3.5 / 1.5).abs() < 0.02);
    // Here both together are what the plain step takes.
    assert!((round("var(--c5)") + round("var(--c4)") - round("var(--c9)")).abs() < 2.0);
    assert!(text_of(figure(&document, "Where a round goes at context 64")).contains("5 MB"));
}

#[test]
fn figures_without_rows_are_left_out() {
    let titled = |record: Value| {
        let page = page(&[record]);
        titles(&parsed(&page))
    };
    let cut = |mut record: Value, keep: &dyn Fn(&Value) -> bool| {
        record["rows"].as_array_mut().unwrap().retain(keep);
        record
    };
    let is = |name: &'static str| move |row: &Value| row["name"] == name;
    assert_eq!(titled(record("round", vec![])), [""; 0]);
    assert_eq!(titled(cut(kernels(), &is("read ceiling"))), [""; 0]);
    assert_eq!(titled(cut(round(), &is("plain decoding"))).len(), 2);
    assert_eq!(
        titled(cut(round(), &|row| row["unit"] == "ms")),
        ["Where a round goes at context 1024", "Where a round goes at context 8192"]
    );
    assert_eq!(titled(cut(generate(), &is("rounds"))), ["Acceptance"]);
    assert_eq!(titled(cut(generate(), &is("accepted at position"))), ["Acceptance by position"]);
    assert_eq!(titled(cut(generate(), &is("TTFT"))), [""; 0]);
    // Nothing but rows of one category: they are no whole.
    let mut one = generate();
    for row in one["rows"].as_array_mut().unwrap() {
        row["parameters"]["category"] = json!("code");
    }
    let rows = one["rows"].as_array().unwrap().clone();
    one["rows"] = rows.into_iter().filter(|row| row["name"] == "rounds").collect();
    assert_eq!(titled(one), [""; 0]);
    // Without bytes a kernel has a share and no place in a roofline; without its instruments a card has no state.
    let mut bare = kernels();
    for row in bare["rows"].as_array_mut().unwrap() {
        row["numbers"].as_object_mut().unwrap().remove("MB");
    }
    (bare["machine"]["before"], bare["machine"]["after"]) = (Value::Null, Value::Null);
    let page = page(&[bare]);
    let document = parsed(&page);
    assert!(!titles(&document).contains(&"Roofline".into()) && titles(&document).len() == 6);
    assert_eq!(all(document.root(), "table").count(), 1);
    assert!(!page.contains("Other processes") && !page.contains("class=\"contents\""));
}

#[test]
fn a_part_that_is_lost_in_noise_is_named_instead_of_drawn() {
    let mut noisy = round();
    let rows = noisy["rows"].as_array_mut().unwrap();
    rows.iter_mut().find(|row| row["name"] == "gaps").unwrap()["median"] = json!(-0.002);
    let page = page(&[noisy]);
    let document = parsed(&page);
    let timeline = figure(&document, "Where a round goes at context 1024");
    assert!(text_of(timeline).contains("Not drawn: gaps at batch 1, block 16 is -0.002000 ms."), "{page}");
    assert_eq!(drawn(timeline, "rect", "var(--c7)", "width").len(), 3);
}

#[test]
fn what_a_record_names_stays_text() {
    let hostile =
        "</text></svg><script>alert(1)</script>\"' onload=\"x\" {{ 7*7 }} {% raw %} &amp; \u{1b}[2J\u{0}]]>";
    let seen = "</text></svg><script>alert(1)</script>\"' onload=\"x\" {{ 7*7 }} {% raw %} &amp;";
    let mut records = [kernels(), round(), generate()];
    for record in &mut records {
        for place in ["card", "driver", "ptx", "capability"] {
            record["machine"][place] = json!(hostile);
        }
        record["machine"]["after"]["throttle"] = json!([hostile]);
        (record["model"]["target"], record["model"]["drafter"]) = (json!(hostile), json!(hostile));
        (record["build"]["version"], record["build"]["commit"]) = (json!(hostile), json!(hostile));
        record["arguments"] = json!([hostile]);
        record["build"]["ptx"] = json!([hostile]);
    }
    // Names that figures look for have it behind them; others are all of it.
    for record in &mut records[..2] {
        for row in record["rows"].as_array_mut().unwrap() {
            row["parameters"][hostile] = json!(hostile);
            row["numbers"][hostile] = json!(1.5);
        }
    }
    for row in records[2]["rows"].as_array_mut().unwrap() {
        if row["parameters"]["category"] == "code" {
            row["parameters"]["category"] = json!(hostile);
        }
        row["unit"] = json!(if row["unit"] == "x" { hostile } else { row["unit"].as_str().unwrap() });
    }
    let mut odd = row(
        hostile,
        json!({ "rows": 4 }),
        "us",
        1.0,
        json!({ "share of ceiling": 0.5, "MB": 1, "GFLOP": 1 }),
    );
    odd["verdict"] = json!("\"><script>");
    records[0]["rows"].as_array_mut().unwrap().push(odd);
    let page = page(&records);
    // `parsed` refuses a script, an attribute that acts, and every address.
    let document = parsed(&page);
    assert!(!page.contains(|c: char| c.is_control() && c != '\n'));
    let times = text_of(document.root()).matches(seen).count();
    assert!(times > 100, "{times} times {seen} in {page}");
    assert!(all(document.root(), "svg").any(|svg| text_of(svg).contains("</text></svg><script>")), "{page}");
    // Nor does it move a terminal's cursor.
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), "a.json", records[0].to_string());
    for format in ["--markdown", "--json"] {
        let out = bench(["show", &file, format]).done();
        assert!(!out.contains(|c: char| c.is_control() && c != '\n'), "{format}: {out}");
    }
    let table = bench(["show", &file]).done();
    let harmless = write(dir.path(), "b.json", kernels().to_string());
    assert_eq!(table.lines().count(), bench(["show", &harmless]).done().lines().count() + 1);
    assert!(!table.contains('\u{1b}'));
}

#[test]
fn any_number_makes_a_page() {
    for number in [0.0, -1.0, 5e-324, 1e-14, 1e14, 1e300, f64::MAX, f64::MIN] {
        let mut records = [kernels(), round(), generate()];
        for (i, record) in records.iter_mut().enumerate() {
            for row in record["rows"].as_array_mut().unwrap().iter_mut().skip(i) {
                (row["median"], row["samples"], row["throttled"]) = (json!(number), json!(null), json!(null));
                for (_, value) in row["numbers"].as_object_mut().unwrap().iter_mut() {
                    *value = json!(number);
                }
                // Rounds keep theirs, by which their parts are found.
                if i != 1 {
                    let (name, place) = (row["name"].to_string(), row["parameters"].to_string());
                    row["parameters"] = json!({ "rows": number, "position": number, "of": name + &place });
                }
            }
        }
        let page = page(&records);
        parsed(&page);
        assert!(page.len() < 1_000_000, "{number}: {} bytes", page.len());
    }
    // All kinds of shapes as the only parameter of a share.
    let mut wide = generate();
    wide["rows"] = [0.5, 1e14, 2e18, -3.0]
        .map(|at| row("accepted at position", json!({ "position": at }), "share", 0.5, json!({})))
        .into_iter()
        .collect();
    let page = page(&[wide]);
    assert_eq!(titles(&parsed(&page)), ["Acceptance by position"]);
}

#[test]
fn every_colour_of_a_page_has_both_schemes() {
    let style = include_str!("../src/bin/dflash-bench/report.css");
    let (light, dark) = style.split_once("@media (prefers-color-scheme: dark)").unwrap();
    let page = page(&[kernels(), round(), generate()]);
    let used: std::collections::BTreeSet<&str> =
        page.split("var(--").skip(1).map(|rest| rest.split(')').next().unwrap()).collect();
    assert!(used.len() > 8, "{used:?}");
    for name in used.into_iter().filter(|name| *name != "c") {
        assert!([light, dark].iter().all(|scheme| scheme.contains(&format!("--{name}: #"))), "{name}");
    }
    // Placeholders are gone.
    let body = page.split("</style>").nth(1).unwrap();
    assert!(!body.contains("=\"#0D") && !body.contains("#000000"), "{body}");
}

// ---- the command line ----

#[test]
fn show_prints_records_again() {
    let dir = tempfile::tempdir().unwrap();
    let [a, b] = [("a.json", kernels()), ("b.json", generate())]
        .map(|(name, r)| write(dir.path(), name, r.to_string()));
    let table = bench(["show", &a, &b]).done();
    let (first, second) = table.split_once("\n\n").unwrap();
    assert!(first.starts_with("kernels of qwen3-8b with qwen3-8b-dflash on constructed\n"), "{table}");
    assert!(second.starts_with("generate of qwen3-8b with qwen3-8b-dflash on constructed\n"), "{table}");
    assert!(second.contains("speed-up") && second.contains("3.480"));
    let lines = bench(["show", &a, &b, "--json"]).done();
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines, [kernels(), generate()]);
    let markdown = bench(["show", &a, &b, "--markdown"]).done();
    assert_eq!(markdown.lines().filter(|line| line.starts_with("| ---")).count(), 2);
    assert!(bench(["show", &a, "--csv"]).done().starts_with("name,rows,context,median,"));
    refused(bench(["show", &a, &b, "--csv"]), 2, "--csv has one head and 2 records, expected one record");
    refused(bench(["show"]), 2, "RECORD.json");
    let none = dir.path().join("none.json").display().to_string();
    refused(bench(["show", &a, &none]), 2, "none.json cannot be read");
    let cut = write(dir.path(), "cut.json", "{\"schema\": 1}");
    refused(bench(["show", &cut, &a]), 2, "cut.json has the schema 1, expected \"dflash-bench/1\"");
    // What compare found is shown, and judged no second time.
    let mut slower = record("compare", vec![row("x", json!({}), "x", 0.5, json!({}))]);
    (slower["rows"][0]["kind"], slower["rows"][0]["verdict"]) = (json!("compared"), json!("SLOWER"));
    let page = page(&[slower]);
    let document = parsed(&page);
    let verdict = all(document.root(), "td").find(|td| td.attribute("class") == Some("verdict SLOWER"));
    assert_eq!(verdict.map(text_of).as_deref(), Some("SLOWER"));
}

#[test]
fn every_subcommand_can_report_and_prints_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let report = write(dir.path(), "page.html", "an older page, longer than nothing");
    let plain = bench(["floor"]).done();
    assert_eq!(bench(["floor", "--report", &report]).done(), plain);
    let page = fs::read_to_string(&report).unwrap();
    let document = parsed(&page);
    let heads: Vec<String> = all(document.root(), "h2").map(text_of).collect();
    assert_eq!(heads, [plain.lines().next().unwrap()]);
    assert!(!page.contains("an older page"));
    let record = bench(["floor", "--json", "--report", &report]).done();
    let [a, b] = ["a.json", "b.json"].map(|name| write(dir.path(), name, &record));
    let run = bench(["--report", &report, "compare", &a, &b]);
    assert_eq!(run.code, 0, "{run:?}");
    assert!(fs::read_to_string(&report).unwrap().contains("class=\"verdict SAME\""));
    // Exit codes stay those of the run.
    let slow = |old: f64| {
        let samples: Vec<f64> = (0..20).map(|i| old + f64::from(i) * 1e-4).collect();
        let mut row = row("x", json!({}), "ms", dflash::measure::quantile(&samples, 0.5).unwrap(), json!({}));
        row["samples"] = json!(samples);
        row
    };
    let [a, b] = [("a.json", 1.0), ("b.json", 2.0)]
        .map(|(name, old)| write(dir.path(), name, self::record("round", vec![slow(old)]).to_string()));
    assert_eq!(bench(["compare", &a, &b, "--report", &report]).code, 7);
    assert!(fs::read_to_string(&report).unwrap().contains("class=\"verdict SLOWER\""));
}

#[test]
fn a_page_that_cannot_be_written_is_refused_before_anything_runs() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    fs::create_dir(at("folder.html")).unwrap();
    let file = write(dir.path(), "file", "");
    let record = write(dir.path(), "record.json", kernels().to_string());
    for (report, part) in [
        (at("none/page.html"), "page.html, which cannot be written: No such file or directory"),
        (format!("{file}/page.html"), "page.html, which cannot be written: Not a directory"),
        (at("folder.html"), "folder.html, which is a folder, expected a file"),
        (record.clone(), "record.json, expected a name that ends in .html"),
        (at("page"), "page, expected a name that ends in .html"),
        (String::new(), "a value is required for '--report"),
    ] {
        // Also the error of the run itself comes later.
        refused(bench(["floor", "--model", "none", "--report", &report]), 2, part);
    }
    assert!(fs::read_to_string(record).unwrap().contains("constructed"));
    // A run that fails leaves an older page as it was, and no empty one.
    let (new, old) = (at("new.html"), write(dir.path(), "old.html", "old"));
    for page in [&new, &old] {
        refused(bench(["floor", "--model", "none", "--report", page]), 2, "--model is \"none\"");
    }
    assert!(!Path::new(&new).exists() && fs::read_to_string(old).unwrap() == "old");
    if Path::new("/dev/full").exists() {
        std::os::unix::fs::symlink("/dev/full", at("full.html")).unwrap();
        let run = bench(["floor", "--report", &at("full.html")]);
        assert!(run.code == 1 && run.err.contains("full.html cannot be written: No space left"), "{run:?}");
        assert!(run.out.contains("plain step"));
    }
}
