//! Constructed records, with the card name "constructed", and helpers that read the pages that `--report`
//! makes from them. No number here is a measurement.

use crate::support::bench::{bench, schema_violation};
use crate::support::program::write;
use roxmltree::{Document, Node};
use serde_json::{Value, json};
use std::fs;

// ---- records ----

/// A row of a record.
pub fn row(name: &str, parameters: Value, unit: &str, value: f64, numbers: Value) -> Value {
    let better = match unit {
        "rounds" => "neither",
        "tok/s" | "GB/s" | "x" | "share" | "tok" => "higher",
        _ => "lower",
    };
    json!({
        "name": name, "parameters": parameters, "kind": "measured", "unit": unit,
        "better": better, "samples": null, "rounds": null, "throttled": null,
        "median": value, "p10": null, "p90": null, "numbers": numbers, "verdict": null,
    })
}

/// A record of this command with these rows, which fits the schema.
pub fn record(command: &str, rows: Vec<Value>) -> Value {
    let state = |mhz: u32, watts: f64, throttle: Value| {
        json!({
            "sm_mhz": mhz, "memory_mhz": 3201, "celsius": 41, "watts": watts, "limit_watts": 700.0,
            "throttle": throttle, "processes": [{ "pid": 4711, "bytes": 1.5e9 as u64 }, { "pid": 12, "bytes": null }],
        })
    };
    let record = json!({
        "schema": "dflash-bench/1", "command": command, "arguments": [command, "--model", "qwen3-8b"],
        "build": { "version": "0.1.0", "commit": "c0ffee", "ptx": ["compute_80", "compute_90", "compute_90a"] },
        "machine": {
            "device": "cuda", "card": "constructed", "driver": "580.95", "gigabytes_per_s": 4800.0,
            "tflops": 989.0, "memory_gigabytes": 150.0, "capability": "9.0", "multiprocessors": 132,
            "l2_bytes": 52428800, "ptx": "compute_90", "before": state(1980, 118.5, json!([])),
            "after": state(1755, 640.0, json!(["sw_power_cap"])),
        },
        "model": { "target": "qwen3-8b", "drafter": "qwen3-8b-dflash" }, "rows": rows,
    });
    assert_eq!(schema_violation(&record), None);
    record
}

/// The measured read bandwidth of the constructed card, in GB/s.
pub const CEILING: f64 = 4300.0;

/// Name, weights in MB, and the fraction of [`CEILING`] that the record gives.
pub const KERNELS: [(&str, f64, f64); 9] = [
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

/// A record of `dflash-bench kernels`.
pub fn kernels() -> Value {
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

/// The parts of a round in their order, with their time at batch 1 in ms.
pub const PARTS: [(&str, f64); 6] =
    [("begin", 0.05), ("inject", 0.2), ("draft", 0.8), ("verify", 3.2), ("accept", 0.15), ("gaps", 0.1)];

/// A record of `dflash-bench round`.
pub fn round() -> Value {
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
            rows.push(row("AR step", at(), "ms", 3.4 * slow, json!({})));
            rows.push(row("round", block(), "ms", 4.4 * slow, json!({ "floor ms": 3.9, "launches": 400 })));
            rows.extend(PARTS.map(|(name, ms)| row(name, block(), "ms", ms * slow, json!({}))));
            rows.push(row("round with host", block(), "ms", 4.6 * slow, json!({})));
            let rate = f64::from(batch) * 1e3 / slow;
            rows.push(row("autoregressive decoding", at(), "tok/s", rate / 3.4, json!({})));
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

/// The number of rounds that accepted 0, 1, .. drafts.
pub const ACCEPTED: [f64; 8] = [40.0, 60.0, 90.0, 70.0, 50.0, 40.0, 30.0, 20.0];

/// A record of `dflash-bench generate`.
pub fn generate() -> Value {
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

/// A record of counters, one row for each name and parameters.
pub fn counted(command: &str, rows: &[(&str, Value)]) -> Value {
    let counts = |(name, parameters): &(&str, Value)| {
        let numbers = json!({
            "launches": 3, "blocks": 64, "streamed": 4000000, "read": 900000, "written": 100000, "mma": 512,
            "conflicts": 0,
        });
        let mut row = row(name, parameters.clone(), "bytes", 5e6, numbers);
        row["kind"] = json!("counted");
        row
    };
    let mut record = record(command, rows.iter().map(counts).collect());
    record["machine"]["device"] = json!("softgpu");
    record["machine"]["card"] = Value::Null;
    record
}

// ---- pages ----

/// The page that `dflash-bench show --report` writes for these records.
#[track_caller]
pub fn page(records: &[Value]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let report = dir.path().join("page.html").display().to_string();
    let files =
        records.iter().enumerate().map(|(i, r)| write(dir.path(), &format!("{i}.json"), r.to_string()));
    let args = ["show".to_string()].into_iter().chain(files).chain(["--report".into(), report.clone()]);
    let run = bench(args);
    assert!(run.code == 0 && run.err.is_empty(), "{run:?}");
    fs::read_to_string(report).unwrap()
}

/// Parses a page, which is XML after its doctype. Checks that it has only known elements, no scripts and no
/// links to other files.
#[track_caller]
pub fn parsed(page: &str) -> Document<'_> {
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
            let self_contained = match name {
                "href" => value.starts_with("#record"),
                "src" => false,
                _ => !name.starts_with("on") && !value.contains("url("),
            };
            assert!(self_contained, "{name}={value}");
        }
    }
    assert_eq!(page.replace("xmlns=\"http://www.w3.org/2000/svg\"", "").matches("://").count(), 0);
    assert!(!include_str!("../../src/bin/dflash-bench/report.css").contains("url("));
    document
}

/// All text inside a node.
pub fn text_of(node: Node) -> String {
    node.descendants().filter(Node::is_text).filter_map(|text| text.text()).collect()
}

/// All elements of this name below a node.
pub fn all<'a>(node: Node<'a, 'a>, tag: &'a str) -> impl Iterator<Item = Node<'a, 'a>> {
    node.descendants().filter(move |node| node.tag_name().name() == tag)
}

/// The titles of all figures.
pub fn titles(document: &Document) -> Vec<String> {
    let figures = all(document.root(), "figure");
    figures.filter_map(|figure| figure.attribute("aria-label").map(String::from)).collect()
}

/// The figure with this title.
#[track_caller]
pub fn figure<'a>(document: &'a Document<'a>, title: &str) -> Node<'a, 'a> {
    let mut figures = all(document.root(), "figure");
    let found = figures.find(|figure| figure.attribute("aria-label") == Some(title));
    found.unwrap_or_else(|| panic!("no figure {title:?} among {:?}", titles(document)))
}

/// One attribute, as a number, of each element of a figure with this tag and colour, in document order.
pub fn attribute_values(figure: Node, tag: &str, fill: &str, attribute: &str) -> Vec<f64> {
    let matching = figure.descendants().filter(|node| {
        node.tag_name().name() == tag
            && [node.attribute("fill"), node.attribute("stroke")].contains(&Some(fill))
    });
    matching.map(|node| node.attribute(attribute).unwrap().parse().unwrap()).collect()
}

/// The coordinate of the axis tick with this label: the first one if there are several, which on the y axis
/// is the lowest.
#[track_caller]
pub fn tick(figure: Node, label: &str, attribute: &str) -> f64 {
    let at = |text: Node| text.attribute(attribute).unwrap().parse::<f64>().unwrap();
    let labelled = all(figure, "text").filter(|text| text_of(*text).trim() == label);
    let anchored =
        labelled.filter(|text| (text.attribute("text-anchor") == Some("middle")) == (attribute == "x"));
    anchored.map(at).next().unwrap_or_else(|| panic!("no tick {label}"))
}

/// The names and values in the definition lists of a page.
pub fn facts(document: &Document) -> Vec<(String, String)> {
    let pairs = all(document.root(), "div").filter(|div| div.children().any(|c| c.has_tag_name("dt")));
    let of = |div: Node, tag: &str| text_of(div.children().find(|c| c.has_tag_name(tag)).unwrap());
    pairs.map(|div| (of(div, "dt"), of(div, "dd"))).collect()
}
