//! An independent implementation of target and drafter, the oracle for `src/cpu/model.rs`: dense f64
//! attention with an explicit mask, no cache, simple loops. It follows sections 3 and 7.2 of `docs/dflash.md`
//! and Hugging Face's RoPE formulas. It shares only the specs of the random checkpoints with the code under
//! test, and takes their values before they are written to a file.

use crate::support;
use dflash::checkpoint::safetensors::Dtype;
use serde_json::Value;
use std::collections::HashMap;
use std::f64::consts::PI;

/// Rows of one width.
pub type Rows = Vec<Vec<f64>>;

/// Tensors by name: `[out][in]` for linear layers, one row for vectors, rounded to the type of the file.
pub struct Weights(HashMap<String, Rows>);

impl Weights {
    pub fn new(tensors: &[support::Raw], dtype: Dtype) -> Weights {
        let round = |v: f32| match dtype {
            Dtype::Bf16 => half::bf16::from_f32(v).to_f64(),
            Dtype::F16 => half::f16::from_f32(v).to_f64(),
            Dtype::F32 => v as f64,
        };
        let rows = |t: &support::Raw| {
            t.values
                .chunks(*t.shape.last().unwrap())
                .map(|row| row.iter().map(|v| round(*v)).collect())
                .collect()
        };
        Weights(tensors.iter().map(|t| (t.name.clone(), rows(t))).collect())
    }

    fn get(&self, name: &str) -> &Rows {
        &self.0[&format!("{name}.weight")]
    }

    /// `y = x W^T`
    fn linear(&self, name: &str, x: &Rows) -> Rows {
        let w = self.get(name);
        x.iter().map(|x| w.iter().map(|w| dot(w, x)).collect()).collect()
    }

    fn norm(&self, name: &str, x: &Rows) -> Rows {
        x.iter().map(|x| rms(x, &self.get(name)[0])).collect()
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn rms(x: &[f64], weight: &[f64]) -> Vec<f64> {
    let scale = (dot(x, x) / x.len() as f64 + 1e-6f32 as f64).sqrt();
    x.iter().zip(weight).map(|(x, w)| x / scale * w).collect()
}

/// The layout of attention heads and their rotary embedding.
pub struct Heads {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub qk_norm: bool,
    /// Number of leading dimensions that are rotated.
    pub rotary: usize,
    pub theta: f64,
    /// The config's `rope_scaling`.
    pub scaling: Value,
}

impl Heads {
    /// Cosine and sine of the rotation of one pair of dimensions at a position.
    fn rotation(&self, pair: usize, position: usize) -> (f64, f64) {
        let frequency = |i: usize| 1.0 / self.theta.powf((2 * i) as f64 / self.rotary as f64);
        let number = |name: &str| self.scaling[name].as_f64().unwrap();
        let f = frequency(pair);
        let (f, magnitude) = match self.scaling["rope_type"].as_str() {
            None => (f, 1.0),
            Some("linear") => (f / number("factor"), 1.0),
            Some("llama3") => {
                let (low, high) = (number("low_freq_factor"), number("high_freq_factor"));
                let (original, wavelength) = (number("original_max_position_embeddings"), 2.0 * PI / f);
                let smooth = (original / wavelength - low) / (high - low);
                let f = if wavelength < original / high {
                    f
                } else if wavelength > original / low {
                    f / number("factor")
                } else {
                    (1.0 - smooth) * f / number("factor") + smooth * f
                };
                (f, 1.0)
            }
            Some("yarn") => {
                let dim_of = |turns: f64| {
                    let positions = number("original_max_position_embeddings");
                    self.rotary as f64 * (positions / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln())
                };
                let low = dim_of(32.0).floor().max(0.0);
                let high = dim_of(1.0).ceil().min(self.rotary as f64 - 1.0);
                let ramp = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                let factor = number("factor");
                (f / factor * ramp + f * (1.0 - ramp), 0.1 * factor.ln() + 1.0)
            }
            Some(other) => panic!("{other}"),
        };
        let angle = position as f64 * f;
        (angle.cos() * magnitude, angle.sin() * magnitude)
    }

    fn rotate(&self, head: &mut [f64], position: usize) {
        let half = self.rotary / 2;
        for i in 0..half {
            let (cos, sin) = self.rotation(i, position);
            let (a, b) = (head[i], head[i + half]);
            head[i] = a * cos - b * sin;
            head[i + half] = b * cos + a * sin;
        }
    }

    /// Splits rows into heads `[row][head][head_dim]`. Normalizes each head if there is a weight, and rotates
    /// it to its row's position if there are positions.
    fn split(&self, rows: &Rows, norm: Option<&[f64]>, positions: Option<&[usize]>) -> Vec<Rows> {
        let head = |row: &[f64], r: usize| {
            let mut head = norm.map_or(row.to_vec(), |w| rms(row, w));
            if let Some(positions) = positions {
                self.rotate(&mut head, positions[r]);
            }
            head
        };
        rows.iter()
            .enumerate()
            .map(|(r, row)| row.chunks(self.head_dim).map(|h| head(h, r)).collect())
            .collect()
    }
}

/// One layer, in place on `x`. Queries come from `x` at `positions`; keys and values from the rows of
/// `context` and then those of `x`. `attends(query row, key)` is the mask over all keys.
fn layer(
    w: &Weights,
    prefix: &str,
    heads: &Heads,
    x: &mut Rows,
    positions: &[usize],
    context: &Rows,
    attends: &dyn Fn(usize, usize) -> bool,
) {
    let name = |part: &str| format!("{prefix}.{part}");
    let y = w.norm(&name("input_layernorm"), x);
    let sources: Rows = context.iter().chain(&y).cloned().collect();
    let key_positions: Vec<usize> = (0..context.len()).chain(positions.iter().copied()).collect();
    let weight = |part: &str| heads.qk_norm.then(|| w.get(&name(part))[0].as_slice());
    let q = w.linear(&name("self_attn.q_proj"), &y);
    let q = heads.split(&q, weight("self_attn.q_norm"), Some(positions));
    let k = w.linear(&name("self_attn.k_proj"), &sources);
    let k = heads.split(&k, weight("self_attn.k_norm"), Some(&key_positions));
    let v = heads.split(&w.linear(&name("self_attn.v_proj"), &sources), None, None);

    let group = heads.heads / heads.kv_heads;
    let mixed: Rows = (0..x.len())
        .map(|row| {
            let one = |head: usize| {
                let visible: Vec<usize> = (0..k.len()).filter(|key| attends(row, *key)).collect();
                let score =
                    |key: &usize| dot(&q[row][head], &k[*key][head / group]) / (heads.head_dim as f64).sqrt();
                let scores: Vec<f64> = visible.iter().map(score).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                let total: f64 = weights.iter().sum();
                let dim = |d: usize| {
                    let terms =
                        visible.iter().zip(&weights).map(|(key, weight)| weight * v[*key][head / group][d]);
                    terms.sum::<f64>() / total
                };
                (0..heads.head_dim).map(dim).collect::<Vec<f64>>()
            };
            (0..heads.heads).flat_map(one).collect()
        })
        .collect();
    add(x, &w.linear(&name("self_attn.o_proj"), &mixed));

    let z = w.norm(&name("post_attention_layernorm"), x);
    let (gate, up) = (w.linear(&name("mlp.gate_proj"), &z), w.linear(&name("mlp.up_proj"), &z));
    let silu = |g: &f64| g / (1.0 + (-g).exp());
    let inner: Rows =
        gate.iter().zip(&up).map(|(g, u)| g.iter().zip(u).map(|(g, u)| silu(g) * u).collect()).collect();
    add(x, &w.linear(&name("mlp.down_proj"), &inner));
}

fn add(x: &mut Rows, y: &Rows) {
    for (x, y) in x.iter_mut().zip(y) {
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    }
}

/// The target model.
pub struct Target {
    pub weights: Weights,
    pub heads: Heads,
    pub layers: usize,
    tied: bool,
    /// Sliding window of each layer, if it has one.
    pub windows: Vec<Option<usize>>,
}

impl Target {
    pub fn new(spec: &support::Target) -> Target {
        Target {
            weights: Weights::new(&support::target_tensors(spec), spec.dtype),
            heads: Heads {
                heads: spec.heads,
                kv_heads: spec.kv_heads,
                head_dim: spec.head_dim,
                qk_norm: !spec.llama,
                rotary: spec.head_dim,
                theta: spec.rope_theta,
                scaling: spec.rope_scaling.clone(),
            },
            layers: spec.layers,
            tied: spec.tied,
            windows: vec![None; spec.layers],
        }
    }

    /// The residual stream after each layer, `[layer][position][hidden]`.
    pub fn states(&self, tokens: &[u32]) -> Vec<Rows> {
        let table = self.weights.get("model.embed_tokens");
        let mut x: Rows = tokens.iter().map(|t| table[*t as usize].clone()).collect();
        let positions: Vec<usize> = (0..tokens.len()).collect();
        let one = |i: usize| {
            let attends = |q: usize, k: usize| k <= q && self.windows[i].is_none_or(|w| q - k < w);
            let prefix = format!("model.layers.{i}");
            layer(&self.weights, &prefix, &self.heads, &mut x, &positions, &vec![], &attends);
            x.clone()
        };
        (0..self.layers).map(one).collect()
    }

    pub fn logits(&self, last_state: &Rows) -> Rows {
        self.head(&self.weights.norm("model.norm", last_state))
    }

    fn head(&self, normed: &Rows) -> Rows {
        self.weights.linear(if self.tied { "model.embed_tokens" } else { "lm_head" }, normed)
    }
}

/// Concatenated taps per position, `[position][taps * hidden]`.
pub fn features(states: &[Rows], taps: &[usize]) -> Rows {
    let row = |p: usize| taps.iter().flat_map(|t| states[*t][p].iter().copied()).collect();
    (0..states[0].len()).map(row).collect()
}

/// The attention mask of a drafter layer (`docs/dflash.md`, section 3.6).
#[derive(Debug, Clone, Copy)]
pub struct LayerMask {
    pub causal: bool,
    pub window: Option<usize>,
}

/// The drafter model.
pub struct Drafter {
    pub weights: Weights,
    pub heads: Heads,
    pub masks: Vec<LayerMask>,
    pub mask_token: u32,
    pub scale: f64,
    pub multiplier: f64,
    pub softcap: Option<f64>,
}

/// The result of a pass over some blocks.
pub struct Pass {
    /// `[layer][block * rows][hidden]`
    pub layers: Vec<Rows>,
    /// `[block * rows][vocab]`, row 0 of a block included
    pub logits: Rows,
}

impl Drafter {
    pub fn new(target: &support::Target, spec: &support::Drafter) -> Drafter {
        let option = |name: &str| spec.dflash[name].as_f64();
        let mask = |i: usize| {
            let sliding = spec.sliding.get(i).copied().unwrap_or(false);
            LayerMask { causal: spec.is_causal.unwrap_or(sliding), window: spec.window.filter(|_| sliding) }
        };
        Drafter {
            weights: Weights::new(&support::drafter_tensors(target, spec), spec.dtype),
            heads: Heads {
                heads: spec.heads,
                kv_heads: spec.kv_heads,
                head_dim: spec.head_dim,
                qk_norm: true,
                rotary: (spec.head_dim as f64 * option("partial_rotary_factor").unwrap_or(1.0)) as usize,
                theta: spec.rope_theta,
                scaling: spec.rope_scaling.clone(),
            },
            masks: (0..spec.layers).map(mask).collect(),
            mask_token: spec.mask_token,
            scale: option("input_embedding_scale").unwrap_or(1.0),
            multiplier: option("output_multiplier").unwrap_or(1.0),
            softcap: option("final_logit_softcapping").filter(|cap| *cap > 0.0),
        }
    }

    /// The training pass (`docs/dflash.md`, section 7.2): all blocks at once over the features of every
    /// position. The mask hides from each block the features at and after its anchor, and the other blocks.
    /// `blocks`: (anchor position, anchor token).
    pub fn blocks(&self, target: &Target, features: &Rows, blocks: &[(usize, u32)], rows: usize) -> Pass {
        let context = self.weights.norm("hidden_norm", &self.weights.linear("fc", features));
        let table = target.weights.get("model.embed_tokens");
        let row = |token: u32| table[token as usize].iter().map(|v| v * self.scale).collect::<Vec<f64>>();
        let (mut x, mut positions) = (vec![], vec![]);
        for (anchor, token) in blocks {
            for r in 0..rows {
                x.push(row(if r == 0 { *token } else { self.mask_token }));
                positions.push(anchor + r);
            }
        }
        let mut layers = vec![];
        for (i, mask) in self.masks.iter().enumerate() {
            let attends = |q: usize, k: usize| {
                let (block, p) = (q / rows, positions[q]);
                let (visible, kp) = match k.checked_sub(context.len()) {
                    None => (k < blocks[block].0, k),
                    Some(other) => (other / rows == block, positions[other]),
                };
                visible && !(mask.causal && kp > p) && mask.window.is_none_or(|w| p < kp + w && kp < p + w)
            };
            let prefix = format!("layers.{i}");
            layer(&self.weights, &prefix, &self.heads, &mut x, &positions, &context, &attends);
            layers.push(x.clone());
        }
        let mut logits = target.head(&self.weights.norm("norm", &x));
        for logit in logits.iter_mut().flatten() {
            *logit *= self.multiplier;
            if let Some(cap) = self.softcap {
                *logit = cap * (*logit / cap).tanh();
            }
        }
        Pass { layers, logits }
    }
}

/// The lowest index of the largest value.
pub fn argmax(row: &[f64]) -> u32 {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    row.iter().position(|v| *v == max).unwrap() as u32
}

/// `‖got − expected‖ / ‖expected‖` of two sequences of equal length.
pub fn distance(got: impl IntoIterator<Item = f32>, expected: impl IntoIterator<Item = f64>) -> f64 {
    let (got, expected): (Vec<f32>, Vec<f64>) = (got.into_iter().collect(), expected.into_iter().collect());
    assert_eq!(got.len(), expected.len());
    let difference: f64 = got.iter().zip(&expected).map(|(a, b)| (*a as f64 - b).powi(2)).sum();
    (difference / dot(&expected, &expected)).sqrt()
}
