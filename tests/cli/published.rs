//! docs/checkpoints.md against `dflash-gen --plan` for the shapes of published checkpoints, in sparse files.
//! Numbers of parameters are those that the Hugging Face Hub and `docs/dflash.md` state.

use crate::support;
use crate::support::program::{self, Run};

use dflash::checkpoint::config::{DrafterConfig, TargetConfig};
use dflash::checkpoint::folder::{DEMO_TARGET, Folder, PUBLISHED};
use dflash::cli::published::drafter_for;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use support::disk;

/// The `config.json` of a published target: sizes are hidden, MLP, layers, heads, key/value heads, head size,
/// vocabulary, positions.
fn config(llama: bool, tied: bool, sizes: [usize; 8], rope_theta: f64, rope_scaling: Value) -> Value {
    let [hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, max_positions] = sizes;
    support::target_config(&support::Target {
        llama,
        tied,
        hidden,
        intermediate,
        layers,
        heads,
        kv_heads,
        head_dim,
        vocab,
        max_positions,
        rope_theta,
        rope_scaling,
        ..Default::default()
    })
}

fn qwen3(tied: bool, hidden: usize, intermediate: usize, layers: usize, heads: usize) -> Value {
    config(false, tied, [hidden, intermediate, layers, heads, 8, 128, 151_936, 40_960], 1e6, Value::Null)
}

/// Llama 3.1 and 3.2: 8 key/value heads and scaled RoPE.
fn llama3(tied: bool, hidden: usize, intermediate: usize, layers: usize, heads: usize, dim: usize) -> Value {
    let factor = if tied { 32.0 } else { 8.0 };
    let scaling = json!({
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192
    });
    config(true, tied, [hidden, intermediate, layers, heads, 8, dim, 128_256, 131_072], 5e5, scaling)
}

fn targets() -> Vec<(&'static str, Value)> {
    let smollm2 =
        |sizes: [usize; 5]| config(true, true, small_vocabulary(sizes, 49_152, 8192), 1e5, Value::Null);
    vec![
        ("Qwen/Qwen3-0.6B", qwen3(true, 1024, 3072, 28, 16)),
        ("Qwen/Qwen3-1.7B", qwen3(true, 2048, 6144, 28, 16)),
        ("Qwen/Qwen3-4B", qwen3(true, 2560, 9728, 36, 32)),
        ("Qwen/Qwen3-8B", qwen3(false, 4096, 12_288, 36, 32)),
        (
            "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B",
            config(
                false,
                false,
                [4096, 12_288, 36, 32, 8, 128, 151_936, 131_072],
                1e6,
                json!({
                    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
                    "attn_factor": 0.8782488562869419
                }),
            ),
        ),
        ("Qwen/Qwen3-14B", qwen3(false, 5120, 17_408, 40, 40)),
        ("Qwen/Qwen3-32B", qwen3(false, 5120, 25_600, 64, 64)),
        ("meta-llama/Llama-3.1-8B-Instruct", llama3(false, 4096, 14_336, 32, 32, 128)),
        ("meta-llama/Llama-3.1-70B-Instruct", llama3(false, 8192, 28_672, 80, 64, 128)),
        ("meta-llama/Llama-3.1-405B-Instruct", llama3(false, 16_384, 53_248, 126, 128, 128)),
        ("meta-llama/Llama-3.2-1B-Instruct", llama3(true, 2048, 8192, 16, 32, 64)),
        ("meta-llama/Llama-3.2-3B-Instruct", llama3(true, 3072, 8192, 28, 24, 128)),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", smollm2([576, 1536, 30, 9, 3])),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", smollm2([960, 2560, 32, 15, 5])),
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", smollm2([2048, 8192, 24, 32, 32])),
        (
            "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
            config(true, false, small_vocabulary([2048, 5632, 22, 32, 4], 32_000, 2048), 1e4, Value::Null),
        ),
    ]
}

/// Sizes of a model with heads of 64.
fn small_vocabulary(sizes: [usize; 5], vocab: usize, positions: usize) -> [usize; 8] {
    let [hidden, intermediate, layers, heads, kv_heads] = sizes;
    [hidden, intermediate, layers, heads, kv_heads, 64, vocab, positions]
}

/// The published drafters, and the configs that the bench embeds.
const DRAFTERS: [(&str, &str); 3] = [
    ("z-lab/Qwen3-4B-DFlash-b16", include_str!("../../benches/models/qwen3-4b.drafter.json")),
    ("z-lab/Qwen3-8B-DFlash-b16", include_str!("../../benches/models/qwen3-8b.drafter.json")),
    (
        "z-lab/LLaMA3.1-8B-Instruct-DFlash-UltraChat",
        include_str!("../../benches/models/llama-3.1-8b.drafter.json"),
    ),
];

/// The cells of a section's table in docs/checkpoints.md.
fn table(section: &str) -> Vec<Vec<String>> {
    table_of(include_str!("../../docs/checkpoints.md"), section)
}

/// The cells of a section's table, without backticks. The first cell of a row is a name.
pub fn table_of(page: &str, section: &str) -> Vec<Vec<String>> {
    let (_, rest) = page.split_once(&format!("## {section}\n")).expect(section);
    let rows =
        rest.lines().take_while(|line| !line.starts_with("## ")).filter(|line| line.starts_with("| `"));
    let cell = |cell: &str| cell.trim().replace('`', "");
    let rows: Vec<_> = rows.map(|row| row.trim_matches('|').split('|').map(cell).collect()).collect();
    assert!(!rows.is_empty(), "{section} has no table");
    rows
}

/// The number in a cell such as `1,720,574,976` or `3.2 GiB`.
pub fn number(cell: &str) -> f64 {
    cell.replace(',', "").split(' ').next().unwrap().parse().unwrap_or_else(|_| panic!("{cell:?}"))
}

fn names(rows: &[Vec<String>], column: usize) -> BTreeSet<&str> {
    rows.iter().map(|row| row[column].as_str()).collect()
}

fn write_target(dir: &Path, config: &Value) {
    support::write_sparse(dir, config, || TargetConfig::open(&disk(dir)).unwrap().tensors());
}

pub fn plan(folders: &[&Path], more: &[&str]) -> Run {
    let flags = ["--target", "--draft"];
    let models =
        flags.iter().zip(folders).flat_map(|(flag, dir)| [flag.to_string(), dir.display().to_string()]);
    let alone = if folders.len() == 1 { vec!["--draft".into(), "none".into()] } else { vec![] };
    let more = more.iter().map(|arg| arg.to_string());
    program::run(models.chain(alone).chain(["--plan".to_string()]).chain(more))
}

/// The plan for a GPU: `need` is the memory that must be free, as the page writes it.
fn on_a_gpu(folders: &[&Path]) -> (Value, String) {
    let record = plan(folders, &["--device", "cuda", "--json"]).json().remove(0);
    let need = record["memory"]["gpu_bytes"].as_u64().unwrap() as f64 / f64::from(1 << 30);
    (record, format!("{need:.1} GiB"))
}

#[test]
fn plans_of_published_targets_say_what_the_page_says() {
    let rows = table("Targets");
    assert_eq!(names(&rows, 0), targets().iter().map(|(name, _)| *name).collect());
    for (name, config) in targets() {
        let row = rows.iter().find(|row| row[0] == name).unwrap();
        let dir = tempfile::tempdir().unwrap();
        write_target(dir.path(), &config);
        let (record, need) = on_a_gpu(&[dir.path()]);
        let found = (record["weight_bytes"].as_f64().unwrap() / 2.0, record["kv_bytes_per_token"].as_f64());
        assert_eq!(found, (number(&row[1]), Some(number(&row[2]))), "{name}");
        assert_eq!(need, row[3], "{name}");
        let round = plan(&[dir.path()], &["--launches", "--json"]).json().remove(0);
        assert_eq!(round["layers"], config["num_hidden_layers"], "{name}: the kernels run every layer");
    }
}

#[test]
fn plans_of_published_pairs_say_what_the_page_says() {
    let rows = table("Pairs");
    let pairs = table_of(include_str!("../../docs/cli.md"), "Published drafters");
    let drafters: BTreeSet<&str> = DRAFTERS.iter().map(|(name, _)| *name).collect();
    assert_eq!((names(&rows, 0), names(&pairs, 1)), (drafters.clone(), drafters));
    for (name, config) in DRAFTERS {
        let [_, parameters, block, memory, launches] = &rows.iter().find(|row| row[0] == name).unwrap()[..]
        else {
            panic!("{rows:?}")
        };
        let pair = pairs.iter().find(|pair| pair[1] == name).unwrap();
        assert_eq!(*block, pair[2], "{name}: docs/cli.md");
        let root = tempfile::tempdir().unwrap();
        let (target, drafter) = (root.path().join("target"), root.path().join("drafter"));
        write_target(&target, &targets().iter().find(|(name, _)| *name == pair[0]).expect(&pair[0]).1);
        let shape = TargetConfig::open(&disk(&target)).unwrap();
        assert_eq!(drafter_for(&shape), Some(name), "src/cli/published.rs");
        let config: Value = serde_json::from_str(config).unwrap();
        support::write_sparse(&drafter, &config, || DrafterConfig::open(&disk(&drafter)).unwrap().tensors());
        let (record, need) = on_a_gpu(&[&target, &drafter]);
        assert_eq!(record["drafter"]["weight_bytes"].as_f64().unwrap() / 2.0, number(parameters), "{name}");
        assert_eq!(record["memory"]["room"]["block"], number(block) as u64, "{name}");
        assert_eq!(need, *memory, "{name}");
        let round = plan(&[&target, &drafter], &["--launches", "--json"]).json().remove(0);
        assert_eq!(round["launches"], number(launches) as u64, "{name}");
    }
}

/// The config of an EAGLE-3 drafter in DeepSpec's layout, with the shapes of a layer of its target.
fn eagle3(target: &Value) -> Value {
    let mut config = target.clone();
    let more = json!({
        "architectures": ["Qwen3Eagle3Model"], "num_hidden_layers": 1, "num_target_layers": target["num_hidden_layers"],
        "ttt_length": 7, "target_layer_ids": [1, 9, 17, 25, 33]
    });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

#[test]
fn plans_of_chains_say_what_the_page_says() {
    for row in table("Chains") {
        let [name, of, parameters, block, memory, launches] = &row[..] else { panic!("{row:?}") };
        let root = tempfile::tempdir().unwrap();
        let (target, drafter) = (root.path().join("target"), root.path().join("drafter"));
        let config = &targets().into_iter().find(|(name, _)| name == of).expect(of).1;
        write_target(&target, config);
        let shapes = || DrafterConfig::open(&disk(&drafter)).unwrap().tensors();
        support::write_sparse(&drafter, &eagle3(config), shapes);
        let (record, need) = on_a_gpu(&[&target, &drafter]);
        assert_eq!(record["drafter"]["weight_bytes"].as_f64().unwrap() / 2.0, number(parameters), "{name}");
        assert_eq!(record["drafter"]["plan"]["drafts"], number(block) as u64 - 1, "{name}");
        let round = plan(&[&target, &drafter], &["--launches", "--json"]).json().remove(0);
        assert_eq!((&need, round["launches"].as_u64()), (memory, Some(number(launches) as u64)), "{name}");
        let refused = plan(&[&target, &drafter], &["--device", "cuda", "--tree", "16"]);
        assert_eq!(refused.code, 4, "{name}: {}", refused.err);
        assert!(refused.err.contains("EAGLE-3 trees run on the CPU"), "{name}: {}", refused.err);
    }
}

#[test]
fn published_checkpoints_of_other_families_are_refused_by_name() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("target");
    let refused = |name: &str, dir: &Path, word: &str, run: Run| {
        assert_eq!((run.code, run.out.as_str(), run.err.lines().count()), (4, "", 1), "{name}: {}", run.err);
        let file = dir.join("config.json").display().to_string();
        assert!(run.err.contains(word) && run.err.contains(&file), "{name}: no {word} in {:?}", run.err);
    };
    for row in table("Refused targets") {
        fs::create_dir_all(&target).unwrap();
        let mut config = qwen3(false, 2048, 768, 48, 32);
        config["architectures"] = json!([row[1]]);
        config["text_config"] = config.clone();
        support::write_json(&target, "config.json", &config);
        refused(&row[0], &target, &row[1], plan(&[&target], &[]));
    }
}

#[test]
fn every_built_in_shape_has_its_drafter_and_the_demo_has_none() {
    let drafter = |folder: &Folder| drafter_for(&TargetConfig::open(folder).unwrap());
    let published: Vec<_> = PUBLISHED.iter().map(|(_, target, _)| drafter(target).unwrap()).collect();
    assert_eq!(published, DRAFTERS.map(|(name, _)| name));
    assert_eq!(drafter(&DEMO_TARGET), None);
}
