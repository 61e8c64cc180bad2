//! The linear kernels at a model's shapes.

use super::values::{BenchFixtures, RandomArray, close, ends, floats_of, halves_of, longs_of, spots};
use super::{Case, PROMPT, Ready};
use dflash::checkpoint::config::{self, DrafterConfig, TargetConfig};
use dflash::checkpoint::pair::Pair;
use dflash::gpu::device::Buffer;
use dflash::gpu::kernels::PAGE;
use dflash::gpu::kernels::head::Head;
use dflash::gpu::kernels::inject::Inject;
use dflash::gpu::kernels::linear::{Input, PASS, PrefillKernel, Shape, Workspace};
use dflash::gpu::kernels::project::{Project, ProjectBuffers};
use dflash::gpu::kernels::qkv::{Qkv, QkvBuffers};
use dflash::gpu::kernels::swiglu::Swiglu;
use dflash::{Error, Result};
use serde_json::json;
use std::rc::Rc;

/// Bound of the relative error of results in bf16: rounding alone gives up to 2^-9 = 1.95e-3.
const ROUNDED: f64 = 3e-3;
/// Slot and position of the first row that goes to the cache.
const FIRST: usize = 5;

/// Bound of the relative error of results in f32: tensor cores truncate instead of rounding, once per product
/// of 16.
fn exact(k: usize) -> f64 {
    1e-5 * (k as f64 / 4096.0).max(1.0)
}

/// The linear launches of a round for each of `rows`, and those of a chunk of a prompt. Of the drafter's
/// layers, those whose shapes differ from the target's. `prompts`: the kernels for prompts that run on the
/// device.
pub fn cases(pair: &Pair, rows: &[usize], prompts: &[PrefillKernel]) -> Vec<Case> {
    let target = &pair.target.config;
    let mut all = vec![];
    for &rows in rows {
        all.extend(stack("target", &target.stack, None, rows, None));
        all.push(head("target: lm_head", target, &target.stack, (1.0, None), rows, false));
        all.push(head("target: lm_head with logits", target, &target.stack, (1.0, None), rows, true));
    }
    for &prompt in prompts {
        all.extend(stack(&prompt_name("target", prompt), &target.stack, None, PROMPT, Some(prompt)));
    }
    let Some(drafter) = pair.drafter() else { return all };
    let c = &drafter.config;
    for &rows in rows {
        all.push(inject("drafter: fc", c, rows, None));
        all.extend(stack("drafter", &c.stack, Some(&target.stack), rows, None));
        if (c.output_multiplier, c.softcap) != (1.0, None) {
            all.push(head(
                "drafter: lm_head",
                target,
                &c.stack,
                (c.output_multiplier, c.softcap),
                rows,
                false,
            ));
        }
    }
    for &prompt in prompts {
        let drafter = prompt_name("drafter", prompt);
        all.push(inject(&format!("{drafter}: fc"), c, PROMPT, Some(prompt)));
        all.push(qkv(&format!("{drafter}: keys and values"), &c.stack, PROMPT, Some(prompt), true));
    }
    all
}

/// The name of a model's layers for a prompt's rows, by kernel.
fn prompt_name(model: &str, prompt: PrefillKernel) -> String {
    match prompt {
        PrefillKernel::Mma => format!("{model} prompt"),
        PrefillKernel::Wgmma => format!("{model} prompt wgmma"),
    }
}

/// The four linear launches of a layer, except those whose shapes `known` has too.
fn stack(
    model: &str,
    c: &config::Stack,
    known: Option<&config::Stack>,
    rows: usize,
    prompt: Option<PrefillKernel>,
) -> Vec<Case> {
    let heads = |c: &config::Stack| (c.hidden, c.heads, c.kv_heads, c.head_dim, c.qk_norm);
    let shapes = |c: &config::Stack| c.shapes();
    let new = |i: usize| known.is_none_or(|known| shapes(known)[i] != shapes(c)[i]);
    let [_, o, _, down] = c.shapes();
    let mut all = vec![];
    if known.is_none_or(|known| heads(known) != heads(c)) {
        all.push(qkv(&format!("{model}: qkv"), c, rows, prompt, false));
    }
    if new(1) {
        all.push(project(&format!("{model}: o"), o, rows, prompt));
    }
    if new(2) {
        all.push(swiglu(&format!("{model}: gate_up"), c, rows, prompt));
    }
    if new(3) {
        all.push(project(&format!("{model}: down"), down, rows, prompt));
    }
    all
}

/// A case that multiplies weights with `rows`. `bytes`: the launcher's, which count the weights once per
/// pass. For a prompt they count once: its passes run at the same time, so that one read from memory could
/// serve them all.
fn case(
    name: &str,
    (rows, prompt): (usize, Option<PrefillKernel>),
    (weights, bytes): (usize, u64),
    make: impl for<'d> Fn(&BenchFixtures<'d>) -> Result<Ready<'d>> + 'static,
) -> Case {
    let again = if prompt.is_some() { (weights * (rows.div_ceil(PASS) - 1)) as u64 } else { 0 };
    Case {
        name: name.into(),
        parameters: json!({ "rows": rows }),
        bytes: bytes - again,
        flops: weights as f64 * rows as f64,
        make: Box::new(make),
    }
}

/// The inputs of a linear layer.
struct Layer {
    shape: Shape,
    w: RandomArray,
    weights: Vec<Buffer>,
    x: RandomArray,
    sumsq: Option<RandomArray>,
    eps: f32,
    prefill_kernel: Option<PrefillKernel>,
    workspace: Workspace,
}

impl Layer {
    fn new(
        fixtures: &BenchFixtures,
        shape: Shape,
        rows: usize,
        norm: Option<f32>,
        prefill_kernel: Option<PrefillKernel>,
    ) -> Result<Layer> {
        let Shape { k, .. } = shape;
        let scale = (k as f32).sqrt().recip();
        let (w, weights) = fixtures.cold(shape.weight_bytes() / 2, scale, shape.weight_bytes(), "weights")?;
        let sums = rows * k.div_ceil(PASS);
        let sumsq = norm.map(|_| fixtures.floats(sums, 128.0, 10.0, "sums of squares")).transpose()?;
        let x = fixtures.halves(rows * k, 1.0, "activations")?;
        let workspace = Workspace::new(fixtures.device, &[(shape, rows)])?;
        Ok(Layer { shape, w, weights, x, sumsq, eps: norm.unwrap_or(0.0), prefill_kernel, workspace })
    }

    fn input(&self, copy: usize) -> Input<'_> {
        Input {
            weights: &self.weights[copy],
            x: &self.x.buffer,
            sumsq: self.sumsq.as_ref().map(|sums| &sums.buffer),
            eps: self.eps,
            prefill_kernel: self.prefill_kernel,
            num_active: None,
            workspace: &self.workspace,
        }
    }

    /// Product of row `row` of x and packed row `packed` of the weights, scaled by the norm.
    fn product(&self, row: usize, packed: usize) -> f64 {
        let k = self.shape.k;
        // [n / 16][k / 32][half 2][kblock 4][row 8][8]
        let weight = |c: usize| {
            let group = packed / 16 * (k / 32) + c / 32;
            self.w.at(group * 512 + packed / 8 % 2 * 256 + c / 8 % 4 * 64 + packed % 8 * 8 + c % 8)
        };
        let dot: f64 = (0..k).map(|c| f64::from(weight(c)) * f64::from(self.x.at(row * k + c))).sum();
        let parts = k.div_ceil(PASS);
        let scale = self.sumsq.as_ref().map_or(1.0, |sums| {
            let sum: f64 = (0..parts).map(|part| f64::from(sums.at(row * parts + part))).sum();
            (sum / k as f64 + f64::from(self.eps)).sqrt().recip()
        });
        scale * dot
    }
}

fn project(name: &str, shape: Shape, rows: usize, prompt: Option<PrefillKernel>) -> Case {
    let Shape { n, k } = shape;
    let kernel = Project { rows, n, k };
    case(name, (rows, prompt), (shape.weight_bytes(), kernel.bytes()), move |fixtures| {
        let device = fixtures.device;
        let layer = Rc::new(Layer::new(fixtures, shape, rows, None, prompt)?);
        let (x, gain) = (
            fixtures.floats(rows * n, 0.0, 1.0, "the residual stream")?,
            fixtures.floats(n, 1.0, 0.1, "gains")?,
        );
        let (y, sumsq) = (fixtures.output(rows * n * 2)?, fixtures.output(rows * shape.parts() * 4)?);
        // The kernel updates it in place, so it must not be the sealed one.
        let stream = fixtures.output(rows * n * 4)?;
        device.copy(&stream, &x.buffer)?;
        let run = {
            let (layer, gain, stream, y, sumsq) =
                (layer.clone(), gain.buffer.clone(), stream.clone(), y.clone(), sumsq.clone());
            move |copy: usize| {
                let buffers =
                    ProjectBuffers { x: &stream, y: &y, sumsq: &sumsq, gain: &gain, features: None };
                kernel.launch(device, &layer.input(copy), &buffers)
            }
        };
        let check = {
            let layer = layer.clone();
            move || {
                let (streams, ys) = (floats_of(device, &stream)?, halves_of(device, &y)?);
                let sums = floats_of(device, &sumsq)?;
                let sum = |row: usize, column: usize| {
                    f64::from(x.at(row * n + column)) + layer.product(row, column)
                };
                let mut pairs = [vec![], vec![], vec![]];
                for (row, column) in spots(rows, n) {
                    let (at, sum) = (row * n + column, sum(row, column));
                    pairs[0].push((streams[at], sum));
                    pairs[1].push((ys[at], sum * f64::from(gain.at(column))));
                }
                for row in ends(rows) {
                    let part = shape.parts() - 1;
                    let squares = (part * PASS..n).map(|column| sum(row, column).powi(2)).sum();
                    pairs[2].push((sums[row * shape.parts() + part], squares));
                }
                close("x", &pairs[0], exact(k))?;
                close("y", &pairs[1], ROUNDED)?;
                close("sums of squares", &pairs[2], exact(k))
            }
        };
        Ok(Ready::new(layer.weights.len(), run, check))
    })
}

fn swiglu(name: &str, c: &config::Stack, rows: usize, prompt: Option<PrefillKernel>) -> Case {
    let (kernel, eps) = (Swiglu { rows, inner: c.intermediate, k: c.hidden }, c.eps);
    case(name, (rows, prompt), (kernel.shape().weight_bytes(), kernel.bytes()), move |fixtures| {
        let device = fixtures.device;
        let layer = Rc::new(Layer::new(fixtures, kernel.shape(), rows, Some(eps), prompt)?);
        let out = fixtures.output(rows * kernel.inner * 2)?;
        let run = {
            let (layer, out) = (layer.clone(), out.clone());
            move |copy: usize| kernel.launch(device, &layer.input(copy), &out)
        };
        let check = {
            let layer = layer.clone();
            move || {
                let found = halves_of(device, &out)?;
                let value = |(row, i): (usize, usize)| {
                    let (gate, up) = Swiglu::gate_up_rows(i);
                    let (gate, up) = (layer.product(row, gate), layer.product(row, up));
                    (found[row * kernel.inner + i], gate / (1.0 + (-gate).exp()) * up)
                };
                let pairs: Vec<_> = spots(rows, kernel.inner).into_iter().map(value).collect();
                close("out", &pairs, ROUNDED)
            }
        };
        Ok(Ready::new(layer.weights.len(), run, check))
    })
}

fn head(
    name: &str,
    target: &TargetConfig,
    c: &config::Stack,
    (multiplier, softcap): (f32, Option<f32>),
    rows: usize,
    kept: bool,
) -> Case {
    let kernel = Head { rows, vocab: target.vocab, k: c.hidden, multiplier, softcap, ids: target.vocab };
    let (shape, eps) = (kernel.shape(), c.eps);
    case(name, (rows, None), (shape.weight_bytes(), kernel.bytes(kept)), move |fixtures| {
        let device = fixtures.device;
        let layer = Rc::new(Layer::new(fixtures, shape, rows, Some(eps), None)?);
        let best = fixtures.output(rows * shape.blocks() * 8)?;
        let logits = kept.then(|| fixtures.output(rows * kernel.vocab * 4)).transpose()?;
        let run = {
            let (layer, best, logits) = (layer.clone(), best.clone(), logits.clone());
            move |copy: usize| kernel.launch(device, &layer.input(copy), &best, logits.as_ref(), None)
        };
        let check = {
            let layer = layer.clone();
            move || {
                let logit = |row: usize, id: usize| {
                    let logit = f64::from(multiplier) * layer.product(row, id);
                    softcap.map_or(logit, |cap| f64::from(cap) * (logit / f64::from(cap)).tanh())
                };
                if let Some(logits) = &logits {
                    let found = floats_of(device, logits)?;
                    let value = |(row, id): (usize, usize)| (found[row * kernel.vocab + id], logit(row, id));
                    let pairs: Vec<_> = spots(rows, kernel.vocab).into_iter().map(value).collect();
                    close("logits", &pairs, exact(shape.k))?;
                }
                let found = longs_of(device, &best)?;
                let mut pairs = vec![];
                for (row, block) in ends(rows).into_iter().zip([shape.blocks() - 1, 0, shape.blocks() / 2]) {
                    let (value, id) = decode(found[row * shape.blocks() + block]);
                    let ids = block * PASS..kernel.vocab.min((block + 1) * PASS);
                    if !ids.contains(&id) {
                        return Err(Error::Internal(format!("the best of ids {ids:?} is {id}")));
                    }
                    // Up to rounding, another id may have the same logit: compare both.
                    pairs.push((value, logit(row, id)));
                    pairs.push((value, ids.map(|id| logit(row, id)).fold(f64::NEG_INFINITY, f64::max)));
                }
                close("the best logits", &pairs, exact(shape.k))
            }
        };
        Ok(Ready::new(layer.weights.len(), run, check))
    })
}

/// A logit and its id, from an entry of [`Head::launch`]'s `best`.
fn decode(best: u64) -> (f32, usize) {
    let (ascending, id) = ((best >> 32) as u32, !(best as u32));
    let bits = if ascending >> 31 == 1 { ascending & 0x7fff_ffff } else { !ascending };
    (f32::from_bits(bits), id as usize)
}

fn inject(name: &str, c: &DrafterConfig, rows: usize, prompt: Option<PrefillKernel>) -> Case {
    let (n, k) = (c.stack.hidden, c.taps.len() * c.stack.hidden);
    let kernel = Inject { rows, n, k, feature_rows: rows };
    let shape = kernel.shape();
    case(name, (rows, prompt), (shape.weight_bytes(), kernel.bytes()), move |fixtures| {
        let device = fixtures.device;
        let layer = Rc::new(Layer::new(fixtures, shape, rows, None, prompt)?);
        let gain = fixtures.floats(n, 1.0, 0.1, "gains")?;
        let gather = fixtures.words((0..rows as u32).rev())?;
        let (y, sumsq) = (fixtures.output(rows * n * 2)?, fixtures.output(rows * shape.parts() * 4)?);
        let run = {
            let (layer, gain, y, sumsq) = (layer.clone(), gain.buffer.clone(), y.clone(), sumsq.clone());
            move |copy: usize| kernel.launch(device, &layer.input(copy), &gather, &y, &sumsq, &gain)
        };
        let check = {
            let layer = layer.clone();
            move || {
                let (found, sums) = (halves_of(device, &y)?, floats_of(device, &sumsq)?);
                let product = |row: usize, column: usize| layer.product(rows - 1 - row, column);
                let value = |(row, column): (usize, usize)| {
                    (found[row * n + column], product(row, column) * f64::from(gain.at(column)))
                };
                let pairs: Vec<_> = spots(rows, n).into_iter().map(value).collect();
                close("y", &pairs, ROUNDED)?;
                let part = shape.parts() - 1;
                let squares = |row| (part * PASS..n).map(|column| product(row, column).powi(2)).sum();
                let sum = |row: usize| (sums[row * shape.parts() + part], squares(row));
                let pairs: Vec<_> = ends(rows).into_iter().map(sum).collect();
                close("sums of squares", &pairs, exact(k))
            }
        };
        Ok(Ready::new(layer.weights.len(), run, check))
    })
}

/// Rows of one sequence, whose pages are in descending order.
fn qkv(name: &str, c: &config::Stack, rows: usize, prompt: Option<PrefillKernel>, keys_only: bool) -> Case {
    let &config::Stack { hidden, heads, kv_heads, head_dim, qk_norm, eps, .. } = c;
    let positions = FIRST + rows;
    let pages = positions.div_ceil(PAGE);
    let kernel = Qkv {
        rows,
        k: hidden,
        heads,
        kv_heads,
        head_dim,
        query_rows: rows,
        pages,
        sequences: 1,
        sequence_pages: pages,
        positions,
        keys_only,
    };
    let shape = kernel.shape();
    // Blocks of 128 rows that hold only queries are left out.
    let skipped = if keys_only { heads * head_dim / PASS * PASS * hidden * 2 } else { 0 };
    case(name, (rows, prompt), (shape.weight_bytes() - skipped, kernel.bytes()), move |fixtures| {
        let device = fixtures.device;
        let layer = Rc::new(Layer::new(fixtures, shape, rows, Some(eps), prompt)?);
        let table = fixtures.words((0..pages as u32).rev())?;
        let row = |row: usize| [0, (FIRST + row) as u32, (FIRST + row) as u32, row as u32];
        let rows_table = fixtures.words((0..rows).flat_map(row))?;
        let gains = match qk_norm {
            true => Some([
                fixtures.floats(head_dim, 1.0, 0.1, "gains")?,
                fixtures.floats(head_dim, 1.0, 0.1, "gains")?,
            ]),
            false => None,
        };
        let rope = fixtures.floats(positions * head_dim, 0.0, 0.7, "the RoPE table")?;
        let queries = fixtures.output(rows * heads * head_dim * 2)?;
        let page_bytes = pages * kv_heads * PAGE * head_dim * 2;
        let (keys, values) = (fixtures.output(page_bytes)?, fixtures.output(page_bytes)?);
        let run = {
            let (layer, gains, rope) = (layer.clone(), gains.clone(), rope.buffer.clone());
            let [queries, keys, values] = [&queries, &keys, &values].map(Buffer::clone);
            move |copy: usize| {
                let buffers = QkvBuffers {
                    rows: &rows_table,
                    queries: &queries,
                    keys: &keys,
                    values: &values,
                    table: &table,
                    q_gain: gains.as_ref().map(|g| &g[0].buffer),
                    k_gain: gains.as_ref().map(|g| &g[1].buffer),
                    rope: &rope,
                };
                kernel.launch(device, &layer.input(copy), &buffers)
            }
        };
        let copies = layer.weights.len();
        let check = move || {
            let [queries, keys, values] = [&queries, &keys, &values].map(|b| halves_of(device, b));
            let (queries, keys, values) = (queries?, keys?, values?);
            let all = heads + 2 * kv_heads;
            let mut checked_heads = vec![heads, heads + kv_heads - 1, heads + kv_heads, all - 1];
            if !keys_only {
                checked_heads.extend([0, heads - 1]);
            }
            let mut pairs = vec![];
            for row in ends(rows) {
                for &head in &checked_heads {
                    let gain = match &gains {
                        Some([q, _]) if head < heads => Some(q),
                        Some([_, k]) if head < heads + kv_heads => Some(k),
                        _ => None,
                    };
                    let rotate = head < heads + kv_heads;
                    let mut expected: Vec<f64> =
                        (0..head_dim).map(|d| layer.product(row, head * head_dim + d)).collect();
                    if let Some(gain) = gain {
                        expected = normed(&expected, gain, eps);
                    }
                    if rotate {
                        expected = rotated(&expected, &rope, FIRST + row);
                    }
                    for (d, expected) in expected.into_iter().enumerate() {
                        let slot = FIRST + row;
                        let at = |head: usize| {
                            in_pages(pages - 1 - slot / PAGE, head, kv_heads, slot, d, head_dim)
                        };
                        let found = match head {
                            _ if head < heads => queries[(row * heads + head) * head_dim + d],
                            _ if rotate => keys[at(head - heads)],
                            _ => values[at(head - heads - kv_heads)],
                        };
                        pairs.push((found, expected));
                    }
                }
            }
            close("queries, keys and values", &pairs, ROUNDED)
        };
        Ok(Ready::new(copies, run, check))
    })
}

fn normed(head: &[f64], gain: &RandomArray, eps: f32) -> Vec<f64> {
    let mean = head.iter().map(|x| x * x).sum::<f64>() / head.len() as f64;
    let scale = (mean + f64::from(eps)).sqrt().recip();
    head.iter().enumerate().map(|(d, x)| x * scale * f64::from(gain.at(d))).collect()
}

fn rotated(head: &[f64], rope: &RandomArray, position: usize) -> Vec<f64> {
    let (dim, half) = (head.len(), head.len() / 2);
    let element = |d: usize| {
        let angle = |part: usize| f64::from(rope.at(position * dim + part * half + d % half));
        let other = if d < half { -head[d + half] } else { head[d - half] };
        head[d] * angle(0) + other * angle(1)
    };
    (0..dim).map(element).collect()
}

/// Index of an element of keys or values: chunks of 8 dims are permuted by token, as `page_offset` of
/// `cuda/common/rows.cuh` defines it.
pub fn in_pages(page: usize, head: usize, kv_heads: usize, slot: usize, d: usize, head_dim: usize) -> usize {
    let token = slot % PAGE;
    ((page * kv_heads + head) * PAGE + token) * head_dim + ((d / 8) ^ (token % 8)) * 8 + d % 8
}
