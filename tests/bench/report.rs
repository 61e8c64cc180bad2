//! `dflash-bench show` and the pages of `--report`, from constructed records.

use crate::support::bench;
use crate::support::program;
use crate::support::report;

use bench::{bench, refused};
use program::write;
use report::*;
use roxmltree::Node;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

// ---- pages ----

#[test]
fn a_page_has_all_rows_and_facts_of_its_records() {
    let mut records = [kernels(), round(), generate(), json!(null)];
    records[3] = serde_json::from_str(&bench(["roofline", "--batch", "1-8*2", "--json"]).done()).unwrap();
    let page = page(&records);
    // Written to a file that can be opened in a browser.
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
    assert_eq!(heads[3], "roofline of qwen3-8b with qwen3-8b-dflash on H200: predicted, not measured");
    let links = all(document.root(), "a").map(|a| a.attribute("href").unwrap().to_string());
    let targets = all(document.root(), "section").map(|s| format!("#{}", s.attribute("id").unwrap()));
    assert!(links.eq(targets));

    let facts = facts(&document);
    for (name, value) in [
        ("Command", "dflash-bench kernels --model qwen3-8b"),
        ("Card", "constructed"),
        ("Driver", "580.95"),
        ("Build", "dflash 0.1.0, commit c0ffee"),
        ("PTX targets of the build", "compute_80 compute_90 compute_90a"),
        ("PTX target that ran", "compute_90"),
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
    // Every row is in the table of its record, with its value.
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
    // The first bar of a round consists of its parts, in order and to scale.
    let timeline = figure(&document, "Where a round goes at context 1024");
    let svg = || all(timeline, "svg").next().unwrap();
    let per_ms = {
        let step = attribute_values(svg(), "rect", "var(--c9)", "width");
        // Bars of this colour are, for each batch, `round with host` and `AR step`.
        step[1] / (3.4 * (1.0 + 0.04 + 1024.0 / 4e4))
    };
    let slow = 1.0 + 0.04 + 1024.0 / 4e4;
    let mut end = None;
    for (i, (name, ms)) in PARTS.iter().enumerate() {
        let fill = format!("var(--c{})", i + 2);
        let (x, width) = (
            attribute_values(svg(), "rect", &fill, "x")[0],
            attribute_values(svg(), "rect", &fill, "width")[0],
        );
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

    // The columns are proportional to their counts.
    let heights = attribute_values(figure(&document, "Acceptance"), "rect", "var(--c2)", "height");
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
    // The bars are proportional to their percentages.
    let shares = figure(&document, "Share of the read ceiling, rows 16, context 1024");
    let texts: Vec<String> = all(shares, "text").map(|text| text_of(text).trim().to_string()).collect();
    assert!(texts.contains(&"81 %".to_string()) && texts.contains(&"target: qkv".to_string()));
    let widths = attribute_values(shares, "rect", "var(--c2)", "width");
    assert!((widths[2] / widths[0] - 0.92 / 0.81).abs() < 0.01 && widths.len() == 5, "{widths:?}");
    let marked = figure(&document, "Share of the read ceiling, rows 1, context 1024");
    assert!(all(marked, "text").any(|text| text_of(text).contains("92 %, throttled")), "{}", text_of(marked));

    // The steps of all batches are to scale, each beside its round.
    let steps = attribute_values(svg(), "rect", "var(--c9)", "width");
    let slow = |batch: f64| 1.0 + batch * 0.04 + 1024.0 / 4e4;
    for (i, batch) in [1.0, 2.0, 4.0, 8.0].into_iter().enumerate() {
        let expected = [4.6, 3.4].map(|ms| ms * slow(batch) * per_ms);
        assert!(expected.iter().zip(&steps[2 * i..]).all(|(e, w)| (e - w).abs() < 2.0), "{batch}: {steps:?}");
    }

    // The axes of a roofline are logarithmic: rows 1 and 128 of a kernel are log10(128) decades apart.
    let roofline = figure(&document, "Roofline");
    let dots = attribute_values(roofline, "circle", "var(--c2)", "cx");
    assert_eq!(all(roofline, "circle").count(), 6 * KERNELS.len());
    let decade = (dots[5 * 5] - dots[0]) / 128f64.log10();
    assert!((dots[5] - dots[0] - decade * 8f64.log10()).abs() < 3.0, "{dots:?}");
    // A weight has two bytes and two operations per row: operations per byte equal rows.
    let ten = tick(roofline, "10", "x");
    assert!((dots[5] - ten - decade * 0.8f64.log10()).abs() < 3.0, "{ten}: {dots:?}");
    let (low, high) = (tick(roofline, "1000", "y"), tick(roofline, "100000", "y"));
    let expected = low + (high - low) / 2.0 * (CEILING * 0.81 / 1000.0).log10();
    let found = attribute_values(roofline, "circle", "var(--c2)", "cy")[0];
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
    let heights = attribute_values(curve, "circle", "var(--c3)", "cy");
    assert!(heights.len() == 8 && heights.iter().all(|y| *y == heights[0]), "{heights:?}");
}

#[test]
fn measured_rates_have_the_roofline_of_their_models_beside_them() {
    let roofline = |model: &str| -> Value {
        let args = ["roofline", "--model", model, "--batch", "1-8*2", "--acceptance", "4", "--json"];
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
        "measured: autoregressive decoding",
        "measured: DFlash, synthetic acceptance of 4, 16 rows",
        "measured: DFlash, synthetic acceptance of 6.5, 16 rows",
    ];
    assert_eq!(legends(&[round()]), measured);
    assert_eq!(legends(&[round(), roofline("qwen3-4b")]), measured);
    let [ar, four, more] = measured;
    let predicted = [
        "predicted for H200: autoregressive decoding",
        "predicted for H200: DFlash, synthetic acceptance of 4, 16 rows",
    ];
    assert_eq!(legends(&[roofline("qwen3-8b"), round()])[..2], predicted);
    let page = page(&[round(), roofline("qwen3-8b")]);
    let document = parsed(&page);
    let both = figure(&document, title);
    let lines: Vec<String> = all(both, "li").map(|li| text_of(li).trim().to_string()).collect();
    assert_eq!(lines, [ar, predicted[0], four, predicted[1], more]);
    // Measured and predicted rates have the same colour, and the axis of batches is linear.
    let dots = attribute_values(both, "circle", "var(--c2)", "cx");
    assert_eq!(dots[..4], dots[4..]);
    assert!((dots[3] - dots[2] - 4.0 * (dots[1] - dots[0])).abs() < 4.0, "{dots:?}");
    assert!(
        text_of(both).contains("its length is assumed, not measured")
            && text_of(both).contains("nothing ran")
    );
    let titles: Vec<String> = all(both, "circle").map(text_of).collect();
    assert!(
        titles.iter().any(|title| title == "measured: autoregressive decoding, batch 1: 276.0 tok/s"),
        "{titles:?}"
    );
}

#[test]
fn counters_of_the_software_gpu_are_labelled() {
    let at = || json!({ "context": 64, "batch": 1 });
    let block = || json!({ "context": 64, "batch": 1, "block": 16 });
    let rows = [
        ("read ceiling", json!({})),
        ("target: qkv", json!({ "rows": 1 })),
        ("attention", json!({ "rows": 1, "context": 64, "batch": 1 })),
        ("attention", json!({ "rows": 1, "context": 64, "batch": 4 })),
    ];
    let kernels = counted("kernels", &rows);
    let mut round =
        counted("round", &[("AR step", at()), ("round", block()), ("draft", block()), ("verify", block())]);
    round["rows"][2]["median"] = json!(1.5e6);
    round["rows"][3]["median"] = json!(3.5e6);
    let mut rate = row("autoregressive decoding", at(), "bytes/tok", 4e6, json!({}));
    rate["kind"] = json!("counted");
    round["rows"].as_array_mut().unwrap().push(rate);
    let page = page(&[kernels, round]);
    let document = parsed(&page);
    let bytes = "Bytes by the software GPU's counters, rows 1, context 64";
    let rates = "Bytes per token against batch at context 64";
    assert_eq!(titles(&document), [bytes, "Where a round goes at context 64", rates]);
    let dots: Vec<String> = all(figure(&document, rates), "circle").map(text_of).collect();
    assert_eq!(dots, ["counted: autoregressive decoding, batch 1: 4 MB/tok"]);
    let heads: Vec<String> = all(document.root(), "h2").map(text_of).collect();
    assert_eq!(heads[0], "kernels of qwen3-8b with qwen3-8b-dflash on softgpu: counters, no times");
    assert!(page.contains("<li>counted by the software GPU: no times</li>") && !page.contains("measured"));
    let widths = |title, fill| attribute_values(figure(&document, title), "rect", fill, "width");
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
    // Draft and verify together equal the AR step here.
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
    assert_eq!(titled(cut(round(), &is("autoregressive decoding"))).len(), 2);
    assert_eq!(
        titled(cut(round(), &|row| row["unit"] == "ms")),
        ["Where a round goes at context 1024", "Where a round goes at context 8192"]
    );
    assert_eq!(titled(cut(generate(), &is("rounds"))), ["Acceptance"]);
    assert_eq!(titled(cut(generate(), &is("accepted at position"))), ["Acceptance by position"]);
    assert_eq!(titled(cut(generate(), &is("TTFT"))), [""; 0]);
    // There is no figure if all rows belong to a category.
    let mut one = generate();
    for row in one["rows"].as_array_mut().unwrap() {
        row["parameters"]["category"] = json!("code");
    }
    let rows = one["rows"].as_array().unwrap().clone();
    one["rows"] = rows.into_iter().filter(|row| row["name"] == "rounds").collect();
    assert_eq!(titled(one), [""; 0]);
    // Without bytes there is no roofline; without the card's state there is no table of it.
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
fn a_part_within_noise_is_named_instead_of_drawn() {
    let mut noisy = round();
    let rows = noisy["rows"].as_array_mut().unwrap();
    rows.iter_mut().find(|row| row["name"] == "gaps").unwrap()["median"] = json!(-0.002);
    let page = page(&[noisy]);
    let document = parsed(&page);
    let timeline = figure(&document, "Where a round goes at context 1024");
    assert!(text_of(timeline).contains("Not drawn: gaps at batch 1, block 16 is -0.002000 ms."), "{page}");
    assert_eq!(attribute_values(timeline, "rect", "var(--c7)", "width").len(), 3);
}

#[test]
fn markup_in_a_record_is_escaped() {
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
    // Figures look up row names, so the hostile text is in parameters and numbers.
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
    // `parsed` refuses scripts, event handlers and addresses.
    let document = parsed(&page);
    assert!(!page.contains(|c: char| c.is_control() && c != '\n'));
    let times = text_of(document.root()).matches(seen).count();
    assert!(times > 100, "{times} times {seen} in {page}");
    assert!(all(document.root(), "svg").any(|svg| text_of(svg).contains("</text></svg><script>")), "{page}");
    // Terminal output has no control characters.
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), "a.json", records[0].to_string());
    for format in ["--markdown", "--json"] {
        let out = bench(["show", &file, format]).done();
        assert!(!out.contains(|c: char| c.is_control() && c != '\n'), "{format}: {out}");
    }
    let table = bench(["show", &file]).done();
    assert!(!table.contains(|c: char| c.is_control() && c != '\n'), "{table}");
    let kernels =
        KERNELS.iter().map(|(name, ..)| table.lines().filter(|line| line.starts_with(name)).count());
    assert_eq!(kernels.collect::<Vec<_>>(), [6; KERNELS.len()], "{table}");
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
                // Rounds keep their parameters, which identify their parts.
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
    // Any number as the only parameter.
    let mut wide = generate();
    wide["rows"] = [0.5, 1e14, 2e18, -3.0]
        .map(|at| row("accepted at position", json!({ "position": at }), "share", 0.5, json!({})))
        .into_iter()
        .collect();
    let page = page(&[wide]);
    assert_eq!(titles(&parsed(&page)), ["Acceptance by position"]);
}

#[test]
fn every_colour_has_a_light_and_a_dark_value() {
    let style = include_str!("../../src/bin/dflash-bench/report.css");
    let (light, dark) = style.split_once("@media (prefers-color-scheme: dark)").unwrap();
    let page = page(&[kernels(), round(), generate()]);
    let used: std::collections::BTreeSet<&str> =
        page.split("var(--").skip(1).map(|rest| rest.split(')').next().unwrap()).collect();
    assert!(used.len() > 8, "{used:?}");
    for name in used.into_iter().filter(|name| *name != "c") {
        assert!([light, dark].iter().all(|scheme| scheme.contains(&format!("--{name}: #"))), "{name}");
    }
    // No placeholder colours are left.
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
    let at = table.find("generate of").unwrap();
    let (first, second) = table.split_at(at);
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
    // A record of compare is shown as it is.
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
    let table = bench(["roofline"]).done();
    assert_eq!(bench(["roofline", "--report", &report]).done(), table);
    let page = fs::read_to_string(&report).unwrap();
    let document = parsed(&page);
    let heads: Vec<String> = all(document.root(), "h2").map(text_of).collect();
    let flat = table.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(heads.len() == 1 && flat.starts_with(&heads[0]), "{heads:?}: {table}");
    assert!(!page.contains("an older page"));
    let record = bench(["roofline", "--json", "--report", &report]).done();
    let [a, b] = ["a.json", "b.json"].map(|name| write(dir.path(), name, &record));
    let run = bench(["--report", &report, "compare", &a, &b]);
    assert_eq!(run.code, 0, "{run:?}");
    assert!(fs::read_to_string(&report).unwrap().contains("class=\"verdict SAME\""));
    // --report does not change the exit code.
    let slow = |old: f64| {
        let samples: Vec<f64> = (0..20).map(|i| old + f64::from(i) * 1e-4).collect();
        let mut row =
            row("x", json!({}), "ms", dflash::perf::statistics::quantile(&samples, 0.5).unwrap(), json!({}));
        row["samples"] = json!(samples);
        row
    };
    let [a, b] = [("a.json", 1.0), ("b.json", 2.0)]
        .map(|(name, old)| write(dir.path(), name, self::record("round", vec![slow(old)]).to_string()));
    assert_eq!(bench(["compare", &a, &b, "--report", &report]).code, 7);
    assert!(fs::read_to_string(&report).unwrap().contains("class=\"verdict SLOWER\""));
}

#[test]
fn an_unwritable_page_is_refused_before_anything_runs() {
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
        // --model is invalid too, but --report is checked first.
        refused(bench(["roofline", "--model", "none", "--report", &report]), 2, part);
    }
    assert!(fs::read_to_string(record).unwrap().contains("constructed"));
    // A run that fails leaves an older page unchanged and no empty page.
    let (new, old) = (at("new.html"), write(dir.path(), "old.html", "old"));
    for page in [&new, &old] {
        refused(bench(["roofline", "--model", "none", "--report", page]), 2, "--model is \"none\"");
    }
    assert!(!Path::new(&new).exists() && fs::read_to_string(old).unwrap() == "old");
    if Path::new("/dev/full").exists() {
        std::os::unix::fs::symlink("/dev/full", at("full.html")).unwrap();
        let run = bench(["roofline", "--report", &at("full.html")]);
        assert!(run.code == 1 && run.err.contains("full.html cannot be written: No space left"), "{run:?}");
        assert!(run.out.contains("AR step"));
    }
}
