//! The weights of a decoder layer, and the shapes that the kernels support.

use crate::checkpoint::config;
use crate::checkpoint::delta_net::{CONVOLUTION, DeltaNet as DeltaNetShape};
use crate::checkpoint::drafter::Convolution as Plan;
use crate::gpu::device::Buffer;
use crate::gpu::kernels::attention::MAX_GROUP;
use crate::gpu::kernels::convolve::Convolve;
use crate::gpu::kernels::delta_net::{DeltaNet as Kernel, HEAD_DIM};
use crate::gpu::kernels::linear::Shape;
use crate::gpu::kernels::plain::Plain;
use crate::gpu::loader::{Loader, PackedRows};
use crate::{Error, Result};

/// The weights of one decoder layer: a mixer of positions, then an MLP. "Packed" is the bf16 layout of
/// [`crate::gpu::kernels::pack::Pack`].
pub(super) struct Layer {
    pub(super) mixer: Mixer,
    /// Index of the mixer among those of its kind.
    pub(super) index: usize,
    pub(super) o: Buffer,          // packed: the mixer's output projection
    pub(super) gate_up: Buffer,    // packed: tiles of 8 gates and 8 ups
    pub(super) down: Buffer,       // packed
    pub(super) input_gain: Buffer, // [hidden] f32
    pub(super) post_gain: Buffer,  // [hidden] f32
    /// Of attention and MLP; only drafters have them.
    pub(super) convolutions: Option<[Convolution; 2]>,
}

pub(super) enum Mixer {
    Attention(Attention),
    DeltaNet(DeltaNet),
}

/// The weights of attention before its output projection.
pub(super) struct Attention {
    pub(super) qkv: Buffer, // packed: query heads, key heads, value heads, output gates of the query heads
    pub(super) head_gains: Option<[Buffer; 2]>, // [head_dim] f32: q_norm and k_norm
}

/// The weights of Gated DeltaNet before its output projection.
pub(super) struct DeltaNet {
    pub(super) projection: Buffer,  // packed: channels of q, k and v; z, b, a
    pub(super) convolution: Buffer, // [channels][4] f32
    pub(super) a_log: Buffer,       // [value_heads] f32
    pub(super) dt_bias: Buffer,     // [value_heads] f32
    pub(super) norm: Buffer,        // [128] f32
}

impl Attention {
    fn load(loader: &mut Loader, prefix: &str, c: &config::Stack, inputs: usize) -> Result<Attention> {
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let name = |part: &str| format!("{prefix}.{part}.weight");
        let queries = match c.output_gate {
            false => PackedRows::From(0),
            true => PackedRows::QueriesAndGates(c.head_dim, q + 2 * kv),
        };
        let matrices = [
            (name("q_proj"), c.query_rows(), queries),
            (name("k_proj"), kv, PackedRows::From(q)),
            (name("v_proj"), kv, PackedRows::From(q + kv)),
        ];
        let mut head_gain = |part| loader.gain(&name(part), c.head_dim, c.norm_offset);
        let head_gains = match c.qk_norm {
            true => Some([head_gain("q_norm")?, head_gain("k_norm")?]),
            false => None,
        };
        let shape = Shape { k: inputs, ..c.shapes()[0] };
        Ok(Attention { head_gains, qkv: loader.packed(shape, &matrices)? })
    }
}

impl DeltaNet {
    fn load(loader: &mut Loader, prefix: &str, shape: &DeltaNetShape, projection: Shape) -> Result<DeltaNet> {
        let (channels, values, heads) = (shape.channels(), shape.values(), shape.value_heads);
        let matrix =
            |part, rows, first| (format!("{prefix}.in_proj_{part}.weight"), rows, PackedRows::From(first));
        let matrices = [
            matrix("qkv", channels, 0),
            matrix("z", values, channels),
            matrix("b", heads, channels + values),
            matrix("a", heads, channels + values + heads),
        ];
        let name = |part: &str| format!("{prefix}.{part}");
        Ok(DeltaNet {
            projection: loader.packed(projection, &matrices)?,
            convolution: loader.tensor(&name("conv1d.weight"), &[channels, 1, CONVOLUTION])?,
            a_log: loader.vector(&name("A_log"), heads)?,
            dt_bias: loader.vector(&name("dt_bias"), heads)?,
            norm: loader.vector(&name("norm.weight"), shape.value_dim)?,
        })
    }
}

/// The launcher of Gated DeltaNet layers, for `sequences` states and rounds of `records` rows.
pub(super) fn delta_net(
    c: &config::Stack,
    shape: &DeltaNetShape,
    sequences: usize,
    records: usize,
) -> Kernel {
    Kernel {
        key_heads: shape.key_heads,
        value_heads: shape.value_heads,
        sequences,
        records,
        pitch: c.delta_net_shapes().map_or(0, |[projection, _]| Plain::pitch(projection)),
        eps: c.eps,
    }
}

/// The weights of the convolutions before and after a sublayer.
pub(super) struct Convolution {
    pub(super) projection: Buffer, // packed by Convolve::packed_row
    pub(super) base: [Buffer; 2],  // [taps][hidden] f32
}

impl Convolution {
    fn load(loader: &mut Loader, prefix: &str, plan: Plan, hidden: usize) -> Result<Convolution> {
        let [(base, shape), (projection, _)] = plan.tensors(prefix, hidden);
        let base = loader.tensor(&base, &shape)?;
        let (half, layer) = (base.bytes() / 2, convolve(plan, hidden, 1, 1).shape());
        let rows = PackedRows::Coefficients(plan.taps, hidden / plan.group);
        Ok(Convolution {
            projection: loader.packed(layer, &[(projection, layer.n, rows)])?,
            base: [base.slice(0, half)?, base.slice(half, half)?],
        })
    }
}

/// The launcher of a plan's convolutions over `sequences` blocks of `block` rows.
pub(super) fn convolve(plan: Plan, hidden: usize, sequences: usize, block: usize) -> Convolve {
    Convolve { rows: sequences * block, hidden, taps: plan.taps, group: plan.group, block }
}

impl Layer {
    /// Lists layer `i`, whose tensors' names begin with `prefix`. `inputs`: the columns of q, k and v.
    pub(super) fn load(
        loader: &mut Loader,
        prefix: &str,
        i: usize,
        c: &config::Stack,
        inputs: usize,
        plan: Option<Plan>,
    ) -> Result<Layer> {
        let (hidden, inner) = (c.hidden, c.intermediate);
        let [_, o, gate_up, down] = c.shapes();
        let name = |part: &str| format!("{prefix}.{part}.weight");
        let part = |part, rows, place| (name(part), rows, place);
        let first = PackedRows::From(0);
        let (gates, ups) =
            (part("mlp.gate_proj", inner, PackedRows::Gates), part("mlp.up_proj", inner, PackedRows::Ups));
        let before = (0..i).filter(|&i| c.delta_net(i).is_some()).count();
        let (mixer, index, o, out) = match (c.delta_net(i), c.delta_net_shapes()) {
            (Some(shape), Some([projection, out])) => {
                let mixer = DeltaNet::load(loader, &format!("{prefix}.linear_attn"), shape, projection)?;
                (Mixer::DeltaNet(mixer), before, out, "linear_attn.out_proj")
            }
            _ => {
                let mixer = Attention::load(loader, &format!("{prefix}.self_attn"), c, inputs)?;
                (Mixer::Attention(mixer), i - before, o, "self_attn.o_proj")
            }
        };
        Ok(Layer {
            mixer,
            index,
            o: loader.packed(o, &[part(out, hidden, first)])?,
            gate_up: loader.packed(gate_up, &[gates, ups])?,
            down: loader.packed(down, &[part("mlp.down_proj", hidden, first)])?,
            input_gain: loader.gain(&name("input_layernorm"), hidden, c.norm_offset)?,
            post_gain: loader.gain(&name("post_attention_layernorm"), hidden, c.norm_offset)?,
            convolutions: match plan {
                Some(plan) => Some([
                    Convolution::load(loader, &format!("{prefix}.attention_conv"), plan, hidden)?,
                    Convolution::load(loader, &format!("{prefix}.mlp_conv"), plan, hidden)?,
                ]),
                None => None,
            },
        })
    }
}

/// Refuses shapes that the kernels do not support. The error names the field of the config.
pub(super) fn check(c: &config::Stack) -> Result<()> {
    let (dims, head_dims, rotated) = (c.head_dim, [64, 128, 256], c.rope.rotary_dims);
    let (heads_of, rotation): (_, (bool, _)) = match c.output_gate {
        false => ("64 or 128", (rotated == dims, "all of a head")),
        true => ("64, 128 or 256", (rotated.is_multiple_of(16) && rotated <= dims, "a multiple of 16")),
    };
    let known = head_dims.contains(&dims) && (dims < 256 || c.output_gate);
    let mut needs = vec![
        (c.hidden.is_multiple_of(32), "hidden_size", c.hidden, "a multiple of 32"),
        (c.intermediate.is_multiple_of(32), "intermediate_size", c.intermediate, "a multiple of 32"),
        (known, "head_dim", dims, heads_of),
        (c.heads <= MAX_GROUP * c.kv_heads, "num_attention_heads", c.heads, "at most 32 per key/value head"),
        (rotation.0, "the number of rotated dims", rotated, rotation.1),
    ];
    if let Some(shape) = &c.delta_net {
        let attention = c.attention.len() - c.delta_net_layers();
        needs.extend([
            (attention > 0, "the number of layers with attention", attention, "at least 1"),
            (shape.key_dim == HEAD_DIM, "linear_key_head_dim", shape.key_dim, "128"),
            (shape.value_dim == HEAD_DIM, "linear_value_head_dim", shape.value_dim, "128"),
        ]);
    }
    for (holds, field, found, expected) in needs {
        if !holds {
            return Err(Error::Unsupported(format!(
                "the kernels cannot run this model: {field} is {found}, expected {expected}"
            )));
        }
    }
    Ok(())
}

/// As [`check`], for convolutions.
pub(super) fn check_convolution(plan: Plan) -> Result<()> {
    let (field, found, expected) = match plan {
        Plan { taps: 1 | 2 | 4 | 8, group } if group.is_multiple_of(4) => return Ok(()),
        Plan { taps: 1 | 2 | 4 | 8, group } => ("conv_group_size", group, "a multiple of 4"),
        Plan { taps, .. } => ("conv_kernel_size", taps, "1, 2, 4 or 8"),
    };
    Err(Error::Unsupported(format!(
        "the kernels cannot run this drafter: {field} is {found}, expected {expected}"
    )))
}
