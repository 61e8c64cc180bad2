//! Small random checkpoints, written as Hugging Face folders, for every integration test.
//!
//! Weights are a fixed function of the seed and the tensor's name. A test that needs an invalid file writes a
//! valid one and changes it, with [`edit_json`] for configs, or [`target_tensors`] and [`write_tensors`] for
//! weights.

use crate::support::random;

use dflash::Result;
use dflash::checkpoint::config::{DrafterConfig, TargetConfig};
use dflash::checkpoint::folder::Folder;
use dflash::checkpoint::safetensors::{Checkpoint, Dtype};
pub use random::Random;
use serde_json::{Map, Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// A target to write. The default is a Qwen3 with tied embeddings and sizes that no tile size divides.
#[derive(Debug, Clone)]
pub struct Target {
    /// Llama instead of Qwen3, which means no q/k norm.
    pub llama: bool,
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    pub tied: bool,
    pub eos: Vec<u32>,
    pub rope_theta: f64,
    /// The value of `rope_scaling` in the config; null for none.
    pub rope_scaling: Value,
    pub max_positions: usize,
    pub dtype: Dtype,
    /// 1 writes `model.safetensors`; more write that many shards and an index file.
    pub shards: usize,
    pub seed: u64,
}

impl Default for Target {
    fn default() -> Self {
        Target {
            llama: false,
            hidden: 64,
            intermediate: 100,
            layers: 4,
            heads: 4,
            kv_heads: 2,
            head_dim: 24,
            vocab: 97,
            tied: true,
            eos: vec![0],
            rope_theta: 10_000.0,
            rope_scaling: Value::Null,
            max_positions: 256,
            dtype: Dtype::Bf16,
            shards: 1,
            seed: 1,
        }
    }
}

/// A drafter to write. The [`Target`] it is written for gives its hidden size, vocabulary and number of
/// target layers.
#[derive(Debug, Clone)]
pub struct Drafter {
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub taps: Vec<usize>,
    pub mask_token: u32,
    pub block: usize,
    /// For each layer, whether it has sliding-window attention. Empty: the config has no `layer_types`.
    pub sliding: Vec<bool>,
    pub window: Option<usize>,
    pub is_causal: Option<bool>,
    /// An object of further `dflash_config` fields, such as `input_embedding_scale`.
    pub dflash: Value,
    pub rope_theta: f64,
    pub rope_scaling: Value,
    pub max_positions: usize,
    pub dtype: Dtype,
    pub shards: usize,
    pub seed: u64,
}

impl Default for Drafter {
    fn default() -> Self {
        Drafter {
            intermediate: 72,
            layers: 2,
            heads: 6,
            kv_heads: 3,
            head_dim: 16,
            taps: vec![0, 2],
            mask_token: 1,
            block: 8,
            sliding: vec![],
            window: None,
            is_causal: None,
            dflash: json!({}),
            rope_theta: 10_000.0,
            rope_scaling: Value::Null,
            max_positions: 256,
            dtype: Dtype::Bf16,
            shards: 1,
            seed: 2,
        }
    }
}

/// A target and its drafter in a temporary folder, which is deleted when this value is dropped.
pub struct Pair {
    pub root: tempfile::TempDir,
    pub target: PathBuf,
    pub drafter: PathBuf,
}

/// Writes both models and the tokenizer to a new temporary folder.
pub fn write_pair(target: &Target, drafter: &Drafter) -> Pair {
    let root = tempfile::tempdir().unwrap();
    let (target_dir, drafter_dir) = (root.path().join("target"), root.path().join("drafter"));
    write_target(&target_dir, target);
    write_tokenizer(&target_dir, target.vocab);
    write_drafter(&drafter_dir, target, drafter);
    Pair { root, target: target_dir, drafter: drafter_dir }
}

/// Sizes small enough to write hundreds of pairs. The vocabulary has 40 tokens, so most letters have none.
pub fn small() -> (Target, Drafter) {
    let target = Target { hidden: 16, intermediate: 20, head_dim: 8, vocab: 40, ..Target::default() };
    let drafter = Drafter {
        heads: 2,
        kv_heads: 1,
        head_dim: 8,
        intermediate: 12,
        dtype: Dtype::F16,
        ..Drafter::default()
    };
    (target, drafter)
}

/// Sizes that every device runs, and that no larger tile of the kernels divides.
pub fn odd() -> (Target, Drafter) {
    let target = Target {
        hidden: 192,
        intermediate: 160,
        layers: 3,
        heads: 3,
        kv_heads: 1,
        head_dim: 64,
        vocab: 301,
        tied: false,
        ..Target::default()
    };
    let drafter = Drafter {
        intermediate: 96,
        heads: 2,
        kv_heads: 2,
        head_dim: 128,
        taps: vec![1, 0],
        ..Drafter::default()
    };
    (target, drafter)
}

/// Writes a pair of the sizes of [`small`].
pub fn small_pair() -> Pair {
    let (target, drafter) = small();
    write_pair(&target, &drafter)
}

/// The model folder at this path.
pub fn disk(path: &Path) -> Folder {
    Folder::Disk(path.to_path_buf())
}

/// Opens and checks a pair as the engine does before it runs: configs, their compatibility, and all tensors.
pub fn open_all(
    target: &Folder,
    drafter: &Folder,
) -> Result<(TargetConfig, DrafterConfig, Checkpoint, Checkpoint)> {
    let pair = dflash::checkpoint::pair::Pair::open(target.clone(), Some(drafter.clone()))?;
    let dflash::checkpoint::pair::DraftSource::Drafter(drafter) = pair.draft else { unreachable!() };
    Ok((pair.target.config, drafter.config, pair.target.weights, drafter.weights))
}

/// [`open_all`] for the folders of a written pair.
pub fn open_pair(pair: &Pair) -> Result<(TargetConfig, DrafterConfig, Checkpoint, Checkpoint)> {
    open_all(&disk(&pair.target), &disk(&pair.drafter))
}

/// Writes `config.json`, `generation_config.json` and the weights, but no tokenizer.
pub fn write_target(dir: &Path, spec: &Target) {
    fs::create_dir_all(dir).unwrap();
    write_json(dir, "config.json", &target_config(spec));
    write_json(dir, "generation_config.json", &json!({ "eos_token_id": spec.eos, "do_sample": false }));
    write_tensors(dir, &target_tensors(spec), spec.dtype, spec.shards);
}

/// Writes `config.json` and the weights of a drafter for that target.
pub fn write_drafter(dir: &Path, target: &Target, spec: &Drafter) {
    fs::create_dir_all(dir).unwrap();
    write_json(dir, "config.json", &drafter_config(target, spec));
    write_tensors(dir, &drafter_tensors(target, spec), spec.dtype, spec.shards);
}

/// The `config.json` of a target.
pub fn target_config(spec: &Target) -> Value {
    let (architecture, model_type) =
        if spec.llama { ("LlamaForCausalLM", "llama") } else { ("Qwen3ForCausalLM", "qwen3") };
    json!({
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "attention_bias": false,
        "rms_norm_eps": 1e-6,
        "rope_theta": spec.rope_theta,
        "rope_scaling": spec.rope_scaling,
        "max_position_embeddings": spec.max_positions,
        "vocab_size": spec.vocab,
        "tie_word_embeddings": spec.tied,
        "eos_token_id": spec.eos.first(),
        "torch_dtype": dtype_name(spec.dtype),
    })
}

/// The `config.json` of a drafter for that target.
pub fn drafter_config(target: &Target, spec: &Drafter) -> Value {
    let mut config = json!({
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "hidden_size": target.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers,
        "num_target_layers": target.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "attention_bias": false,
        "rms_norm_eps": 1e-6,
        "rope_theta": spec.rope_theta,
        "rope_scaling": spec.rope_scaling,
        "max_position_embeddings": spec.max_positions,
        "vocab_size": target.vocab,
        "tie_word_embeddings": false,
        "torch_dtype": dtype_name(spec.dtype),
        "block_size": spec.block,
        "dflash_config": { "mask_token_id": spec.mask_token, "target_layer_ids": spec.taps },
    });
    if !spec.sliding.is_empty() {
        let kind = |&s: &bool| if s { "sliding_attention" } else { "full_attention" };
        config["layer_types"] = spec.sliding.iter().map(kind).collect::<Vec<_>>().into();
        config["sliding_window"] = spec.window.into();
        config["use_sliding_window"] = spec.window.is_some().into();
    }
    if let Some(causal) = spec.is_causal {
        config["is_causal"] = causal.into();
    }
    for (field, value) in spec.dflash.as_object().unwrap() {
        config["dflash_config"][field] = value.clone();
    }
    config
}

/// One tensor to write. The values are in row-major order.
#[derive(Debug, Clone)]
pub struct Raw {
    pub name: String,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// All tensors of a target, with random weights.
pub fn target_tensors(spec: &Target) -> Vec<Raw> {
    let mut weights = Weights { seed: spec.seed, tensors: vec![] };
    weights.table("model.embed_tokens.weight", spec.vocab, spec.hidden);
    for i in 0..spec.layers {
        let layer = Layer {
            prefix: format!("model.layers.{i}."),
            hidden: spec.hidden,
            intermediate: spec.intermediate,
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            qk_norm: !spec.llama,
        };
        weights.layer(&layer);
    }
    weights.norm("model.norm.weight", spec.hidden);
    if !spec.tied {
        weights.table("lm_head.weight", spec.vocab, spec.hidden);
    }
    weights.tensors
}

/// All tensors of a drafter for that target, with random weights.
pub fn drafter_tensors(target: &Target, spec: &Drafter) -> Vec<Raw> {
    let mut weights = Weights { seed: spec.seed, tensors: vec![] };
    weights.linear("fc.weight", target.hidden, spec.taps.len() * target.hidden);
    weights.norm("hidden_norm.weight", target.hidden);
    for i in 0..spec.layers {
        let layer = Layer {
            prefix: format!("layers.{i}."),
            hidden: target.hidden,
            intermediate: spec.intermediate,
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            qk_norm: true,
        };
        weights.layer(&layer);
    }
    weights.norm("norm.weight", target.hidden);
    weights.tensors
}

/// Writes a model folder whose weights are zeros in a sparse file, which takes no disk space.
pub fn write_sparse(dir: &Path, config: &Value, tensors: impl FnOnce() -> Vec<(String, Vec<usize>)>) {
    fs::create_dir_all(dir).unwrap();
    write_json(dir, "config.json", config);
    let (mut header, mut end) = (Map::new(), 0);
    for (name, shape) in tensors() {
        let begin = end;
        end += shape.iter().product::<usize>() * 2;
        header.insert(name, json!({ "dtype": "BF16", "shape": shape, "data_offsets": [begin, end] }));
    }
    let head = safetensors_raw(&Value::Object(header).to_string(), &[]);
    let path = dir.join("model.safetensors");
    fs::write(&path, &head).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len((head.len() + end) as u64).unwrap();
}

/// Writes `model.safetensors` if `shards` is at most 1, otherwise that many shards and their index.
pub fn write_tensors(dir: &Path, tensors: &[Raw], dtype: Dtype, shards: usize) {
    if shards <= 1 {
        fs::write(dir.join("model.safetensors"), safetensors_file(tensors, dtype)).unwrap();
        return;
    }
    let mut map = Map::new();
    for (i, part) in tensors.chunks(tensors.len().div_ceil(shards)).enumerate() {
        let file = format!("model-{:05}-of-{shards:05}.safetensors", i + 1);
        fs::write(dir.join(&file), safetensors_file(part, dtype)).unwrap();
        map.extend(part.iter().map(|t| (t.name.clone(), Value::from(file.clone()))));
    }
    let total: usize = tensors.iter().map(|t| t.values.len() * dtype_size(dtype)).sum();
    write_json(
        dir,
        "model.safetensors.index.json",
        &json!({ "metadata": { "total_size": total }, "weight_map": map }),
    );
}

/// The bytes of one safetensors file.
pub fn safetensors_file(tensors: &[Raw], dtype: Dtype) -> Vec<u8> {
    let mut header = Map::new();
    let mut data = Vec::new();
    for tensor in tensors {
        let begin = data.len();
        for &value in &tensor.values {
            match dtype {
                Dtype::Bf16 => data.extend(half::bf16::from_f32(value).to_le_bytes()),
                Dtype::F16 => data.extend(half::f16::from_f32(value).to_le_bytes()),
                Dtype::F32 => data.extend(value.to_le_bytes()),
            }
        }
        let name = ["BF16", "F16", "F32"][dtype as usize];
        let info = json!({ "dtype": name, "shape": tensor.shape, "data_offsets": [begin, data.len()] });
        header.insert(tensor.name.clone(), info);
    }
    safetensors_raw(&Value::Object(header).to_string(), &data)
}

/// Rewrites the drafter of a written pair in the speculators layout, with a head for these ids only.
pub fn reduce_vocabulary(pair: &Pair, target: &Target, spec: &Drafter, ids: &[u32], anchor_first: bool) {
    let mut layers = drafter_config(target, spec);
    layers.as_object_mut().unwrap().remove("dflash_config");
    let config = json!({
        "architectures": ["DFlashDraftModel"],
        "speculators_model_type": "dflash",
        "block_size": spec.block,
        "mask_token_id": spec.mask_token,
        "draft_vocab_size": ids.len(),
        "aux_hidden_state_layer_ids": spec.taps.iter().map(|tap| tap + 1).collect::<Vec<_>>(),
        "sample_from_anchor": anchor_first,
        "transformer_layer_config": layers,
    });
    write_json(&pair.drafter, "config.json", &config);
    let mut weights = Weights { seed: spec.seed, tensors: drafter_tensors(target, spec) };
    weights.table("lm_head.weight", ids.len(), target.hidden);
    let file = safetensors_file(&weights.tensors, spec.dtype);
    let end = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let mut header: Map<String, Value> = serde_json::from_slice(&file[8..end]).unwrap();
    let mut data = file[end..].to_vec();
    let offsets = ids.iter().zip(0i64..).flat_map(|(&id, i)| (i64::from(id) - i).to_le_bytes()).collect();
    let marks: Vec<u8> = (0..target.vocab as u32).map(|id| u8::from(ids.contains(&id))).collect();
    for (name, dtype, len, bytes) in
        [("d2t", "I64", ids.len(), offsets), ("t2d", "BOOL", target.vocab, marks)]
    {
        let begin = data.len();
        data.extend::<Vec<u8>>(bytes);
        let info = json!({ "dtype": dtype, "shape": [len], "data_offsets": [begin, data.len()] });
        header.insert(name.into(), info);
    }
    let file = safetensors_raw(&Value::Object(header).to_string(), &data);
    fs::write(pair.drafter.join("model.safetensors"), file).unwrap();
}

/// A safetensors file with this header text, which need not be valid.
pub fn safetensors_raw(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(data);
    file
}

/// Writes a byte-level BPE `tokenizer.json` without merges, so that each byte is one token, and a
/// `tokenizer_config.json` with a chat template.
///
/// Ids: 0 is `<|endoftext|>`, 1 is `<|mask|>`, then printable ASCII from the space on (97 ids in all), then
/// the other bytes as far as `vocab` allows (258 ids cover all bytes). Encoding drops bytes without an id.
pub fn write_tokenizer(dir: &Path, vocab: usize) {
    fs::create_dir_all(dir).unwrap();
    let bytes = (0x20..=0x7e).chain(0x00..=0x1f).chain(0x7f..=0xff);
    let letters = bytes.take(vocab.saturating_sub(2)).map(byte_letter);
    let specials = ["<|endoftext|>", "<|mask|>"];
    let tokens = specials.iter().map(|s| s.to_string()).chain(letters.map(String::from));
    let ids: Map<String, Value> = tokens.enumerate().map(|(id, token)| (token, id.into())).collect();
    let added: Vec<Value> = specials
        .iter()
        .enumerate()
        .map(|(id, content)| {
            json!({
                "id": id, "content": content, "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false
            })
        })
        .collect();
    let byte_level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let model = json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
        "vocab": ids, "merges": []
    });
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level, "model": model
    });
    write_json(dir, "tokenizer.json", &tokenizer);
    let template = "{% for message in messages %}{{ message.role + ': ' + message.content + ' ' }}{% endfor %}\
                    {% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}";
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "mask_token": "<|mask|>",
        "add_bos_token": false, "clean_up_tokenization_spaces": false, "chat_template": template
    });
    write_json(dir, "tokenizer_config.json", &config);
}

/// The character that represents a byte in byte-level vocabularies (GPT-2's table): the Latin-1 character if
/// it is printable, otherwise the next unused character from U+0100 on.
fn byte_letter(byte: u8) -> char {
    let printable = |b: u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    match printable(byte) {
        true => char::from(byte),
        false => char::from_u32(0x100 + (0..byte).filter(|&b| !printable(b)).count() as u32).unwrap(),
    }
}

/// The number of weights in tensors of these shapes.
pub fn parameters(tensors: &[(String, Vec<usize>)]) -> u64 {
    tensors.iter().map(|(_, shape)| shape.iter().map(|&n| n as u64).product::<u64>()).sum()
}

/// Writes a JSON file into the folder.
pub fn write_json(dir: &Path, file: &str, value: &Value) {
    fs::write(dir.join(file), serde_json::to_vec_pretty(value).unwrap()).unwrap();
}

/// Reads a JSON file, applies `edit`, and writes it back.
pub fn edit_json(dir: &Path, file: &str, edit: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(dir.join(file)).unwrap()).unwrap();
    edit(&mut value);
    write_json(dir, file, &value);
}

fn dtype_size(dtype: Dtype) -> usize {
    if dtype == Dtype::F32 { 4 } else { 2 }
}

fn dtype_name(dtype: Dtype) -> &'static str {
    ["bfloat16", "float16", "float32"][dtype as usize]
}

struct Layer {
    prefix: String,
    hidden: usize,
    intermediate: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    qk_norm: bool,
}

struct Weights {
    seed: u64,
    tensors: Vec<Raw>,
}

impl Weights {
    /// Adds a tensor whose elements are `value` of uniform random numbers in [-1, 1).
    fn push(&mut self, name: &str, shape: Vec<usize>, value: impl Fn(f32) -> f32) {
        // The name is part of the seed, so a tensor's values do not depend on which tensors come before it.
        let hash = name.bytes().fold(self.seed, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        let mut random = Random::new(hash);
        let values = (0..shape.iter().product()).map(|_| value(random.signed())).collect();
        self.tensors.push(Raw { name: name.into(), shape, values });
    }

    /// Variance 1 / inputs, so that activations keep their scale.
    fn linear(&mut self, name: &str, outputs: usize, inputs: usize) {
        let scale = (3.0 / inputs as f32).sqrt();
        self.push(name, vec![outputs, inputs], |u| u * scale);
    }

    /// An embedding or head, with twice the standard deviation of a linear layer, so that logits are well
    /// separated.
    fn table(&mut self, name: &str, rows: usize, hidden: usize) {
        let scale = 2.0 * (3.0 / hidden as f32).sqrt();
        self.push(name, vec![rows, hidden], |u| u * scale);
    }

    fn norm(&mut self, name: &str, size: usize) {
        self.push(name, vec![size], |u| 1.0 + 0.25 * u);
    }

    fn layer(&mut self, l: &Layer) {
        let name = |part: &str| format!("{}{part}.weight", l.prefix);
        let (query, kv) = (l.heads * l.head_dim, l.kv_heads * l.head_dim);
        self.norm(&name("input_layernorm"), l.hidden);
        self.linear(&name("self_attn.q_proj"), query, l.hidden);
        self.linear(&name("self_attn.k_proj"), kv, l.hidden);
        self.linear(&name("self_attn.v_proj"), kv, l.hidden);
        self.linear(&name("self_attn.o_proj"), l.hidden, query);
        if l.qk_norm {
            self.norm(&name("self_attn.q_norm"), l.head_dim);
            self.norm(&name("self_attn.k_norm"), l.head_dim);
        }
        self.norm(&name("post_attention_layernorm"), l.hidden);
        self.linear(&name("mlp.gate_proj"), l.intermediate, l.hidden);
        self.linear(&name("mlp.up_proj"), l.intermediate, l.hidden);
        self.linear(&name("mlp.down_proj"), l.hidden, l.intermediate);
    }
}
