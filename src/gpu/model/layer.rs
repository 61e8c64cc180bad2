//! The weights of a decoder layer, and the shapes that the kernels support.

use crate::checkpoint::config;
use crate::checkpoint::drafter::Convolution as Plan;
use crate::gpu::device::Buffer;
use crate::gpu::kernels::attention::MAX_GROUP;
use crate::gpu::kernels::convolve::Convolve;
use crate::gpu::kernels::linear::Shape;
use crate::gpu::loader::{Loader, PackedRows};
use crate::{Error, Result};

/// The weights of one decoder layer. "Packed" is the bf16 layout of [`crate::gpu::kernels::pack::Pack`].
pub(super) struct Layer {
    pub(super) qkv: Buffer,        // packed: query heads, key heads, value heads
    pub(super) o: Buffer,          // packed
    pub(super) gate_up: Buffer,    // packed: tiles of 8 gates and 8 ups
    pub(super) down: Buffer,       // packed
    pub(super) input_gain: Buffer, // [hidden] f32
    pub(super) post_gain: Buffer,  // [hidden] f32
    pub(super) head_gains: Option<[Buffer; 2]>, // [head_dim] f32: q_norm and k_norm
    /// Of attention and MLP; only drafters have them.
    pub(super) convolutions: Option<[Convolution; 2]>,
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
    /// `inputs`: the columns of q, k and v.
    pub(super) fn load(
        loader: &mut Loader,
        prefix: &str,
        c: &config::Stack,
        inputs: usize,
        plan: Option<Plan>,
    ) -> Result<Layer> {
        let (hidden, inner, head) = (c.hidden, c.intermediate, c.head_dim);
        let (q, kv) = (c.heads * head, c.kv_heads * head);
        let [qkv, o, gate_up, down] = c.shapes();
        let qkv = Shape { k: inputs, ..qkv };
        let name = |part: &str| format!("{prefix}.{part}.weight");
        let part = |part, rows, place| (name(part), rows, place);
        let first = PackedRows::From(0);
        let queries = part("self_attn.q_proj", q, first);
        let keys = part("self_attn.k_proj", kv, PackedRows::From(q));
        let values = part("self_attn.v_proj", kv, PackedRows::From(q + kv));
        let (gates, ups) =
            (part("mlp.gate_proj", inner, PackedRows::Gates), part("mlp.up_proj", inner, PackedRows::Ups));
        let mut head_gain = |part| loader.vector(&name(part), head);
        Ok(Layer {
            head_gains: match c.qk_norm {
                true => Some([head_gain("self_attn.q_norm")?, head_gain("self_attn.k_norm")?]),
                false => None,
            },
            qkv: loader.packed(qkv, &[queries, keys, values])?,
            o: loader.packed(o, &[part("self_attn.o_proj", hidden, first)])?,
            gate_up: loader.packed(gate_up, &[gates, ups])?,
            down: loader.packed(down, &[part("mlp.down_proj", hidden, first)])?,
            input_gain: loader.vector(&name("input_layernorm"), hidden)?,
            post_gain: loader.vector(&name("post_attention_layernorm"), hidden)?,
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
    let needs = [
        (c.hidden.is_multiple_of(32), "hidden_size", c.hidden, "a multiple of 32"),
        (c.intermediate.is_multiple_of(32), "intermediate_size", c.intermediate, "a multiple of 32"),
        (c.head_dim == 64 || c.head_dim == 128, "head_dim", c.head_dim, "64 or 128"),
        (c.heads <= MAX_GROUP * c.kv_heads, "num_attention_heads", c.heads, "at most 32 per key/value head"),
        (c.rope.rotary_dims == c.head_dim, "the number of rotated dims", c.rope.rotary_dims, "all of a head"),
    ];
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
