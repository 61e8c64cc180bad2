//! Gated DeltaNet (arXiv 2412.06464), the linear attention of the Qwen3.5 and Qwen3-Next families: its shape
//! in `config.json`, and its tensors.

use crate::checkpoint::config::{MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS};
use crate::checkpoint::json::Fields;
use crate::{Error, Result};

/// Taps of the convolution: the token itself and the three before it.
pub const CONVOLUTION: usize = 4;
/// The value heads of a layer are a multiple of this many dimensions, the lanes of the CPU's vectors.
const VALUE_DIMS: usize = 16;

/// The shape of the Gated DeltaNet layers of a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeltaNet {
    /// Heads of queries and keys.
    pub key_heads: usize,
    /// Heads of values, a multiple of `key_heads`: consecutive value heads share a key head.
    pub value_heads: usize,
    /// Dimensions of a query and of a key.
    pub key_dim: usize,
    /// Dimensions of a value.
    pub value_dim: usize,
    /// Whether the projections are two matrices whose rows are grouped by key head, as Qwen3-Next stores
    /// them.
    pub grouped: bool,
    /// The layers that are Gated DeltaNet, `[layers]`; the others are attention.
    pub layers: Vec<bool>,
}

impl DeltaNet {
    /// Reads the fields of a hybrid config of this many layers. `grouped`: the family's layout.
    ///
    /// # Errors
    /// [`Error::Model`] for an absent or malformed field; [`Error::Unsupported`] for a variant that this
    /// engine does not run.
    pub(super) fn read(config: &Fields, layers: usize, grouped: bool) -> Result<DeltaNet> {
        let size = |name: &str, max| config.need(name)?.integer(1, max);
        let width = config.need("linear_conv_kernel_dim")?;
        if width.integer(1, MAX_HEAD_DIM)? != CONVOLUTION {
            return Err(config.unsupported("linear_conv_kernel_dim", &width.found(), "4"));
        }
        let key_heads = size("linear_num_key_heads", MAX_HEADS)?;
        let value_heads = size("linear_num_value_heads", MAX_HEADS)?;
        if !value_heads.is_multiple_of(key_heads) {
            return Err(Error::Model(format!(
                "{}: {}linear_num_value_heads is {value_heads}, expected a multiple of linear_num_key_heads, which is \
                 {key_heads}",
                config.file, config.prefix
            )));
        }
        let value_dim = size("linear_value_head_dim", MAX_HEAD_DIM)?;
        if !value_dim.is_multiple_of(VALUE_DIMS) {
            let found = value_dim.to_string();
            return Err(config.unsupported("linear_value_head_dim", &found, "a multiple of 16"));
        }
        Ok(DeltaNet {
            key_heads,
            value_heads,
            key_dim: size("linear_key_head_dim", MAX_HEAD_DIM)?,
            value_dim,
            grouped,
            layers: kinds(config, layers)?,
        })
    }

    /// Width of all queries, and of all keys.
    pub fn keys(&self) -> usize {
        self.key_heads * self.key_dim
    }

    /// Width of all values, and of the output gates.
    pub fn values(&self) -> usize {
        self.value_heads * self.value_dim
    }

    /// Channels of the convolution: queries, keys and values.
    pub fn channels(&self) -> usize {
        2 * self.keys() + self.values()
    }

    /// Elements of a layer's state, `[value_heads][key_dim][value_dim]`.
    pub fn state(&self) -> usize {
        self.value_heads * self.key_dim * self.value_dim
    }

    /// Elements of the record of one row of a layer, from which a later pass repeats the row: its input of
    /// the convolution, its keys, the corrections of its values, and the decays.
    pub fn record(&self) -> usize {
        self.channels() + self.keys() + self.values() + self.value_heads
    }

    /// Elements of all weight matrices of a layer.
    pub(crate) fn matrices(&self, hidden: usize) -> usize {
        (self.channels() + 2 * self.values() + 2 * self.value_heads) * hidden
    }

    /// Name, without prefix, and shape of a layer's tensors.
    pub(crate) fn tensors(&self, hidden: usize) -> Vec<(&'static str, Vec<usize>)> {
        let heads = self.value_heads;
        let mut list = match self.grouped {
            true => vec![
                ("in_proj_qkvz.weight", vec![self.channels() + self.values(), hidden]),
                ("in_proj_ba.weight", vec![2 * heads, hidden]),
            ],
            false => vec![
                ("in_proj_qkv.weight", vec![self.channels(), hidden]),
                ("in_proj_z.weight", vec![self.values(), hidden]),
                ("in_proj_b.weight", vec![heads, hidden]),
                ("in_proj_a.weight", vec![heads, hidden]),
            ],
        };
        list.extend([
            ("conv1d.weight", vec![self.channels(), 1, CONVOLUTION]),
            ("A_log", vec![heads]),
            ("dt_bias", vec![heads]),
            ("norm.weight", vec![self.value_dim]),
            ("out_proj.weight", vec![hidden, self.values()]),
        ]);
        list
    }

    /// The rows of `in_proj_qkvz` that are `in_proj_qkv` and `in_proj_z` of other families, and the rows of
    /// `in_proj_ba` that are `in_proj_b` and `in_proj_a`. A key head's group holds its query, its key, then
    /// the values and the gates of its value heads, or their b and their a.
    pub(crate) fn grouped_rows(&self) -> [Vec<usize>; 4] {
        let (dim, each) = (self.key_dim, self.value_heads / self.key_heads);
        let wide = each * self.value_dim;
        let part = |group: usize, start: usize, len: usize| -> Vec<usize> {
            (0..self.key_heads).flat_map(|g| g * group + start..g * group + start + len).collect()
        };
        let of_qkvz = |start, len| part(2 * dim + 2 * wide, start, len);
        let qkv = [of_qkvz(0, dim), of_qkvz(dim, dim), of_qkvz(2 * dim, wide)].concat();
        let z = of_qkvz(2 * dim + wide, wide);
        [qkv, z, part(2 * each, 0, each), part(2 * each, each, each)]
    }
}

/// Which layers are Gated DeltaNet: by `layer_types`, or else all but every `full_attention_interval`-th.
fn kinds(config: &Fields, layers: usize) -> Result<Vec<bool>> {
    let Some(types) = config.get("layer_types") else {
        let every = config.get("full_attention_interval").map_or(Ok(4), |f| f.integer(1, MAX_LAYERS))?;
        return Ok((1..=layers).map(|i| !i.is_multiple_of(every)).collect());
    };
    let list = types.array()?;
    if list.len() != layers {
        return Err(Error::Model(format!(
            "{}: {} has {} entries, expected {layers} (num_hidden_layers)",
            config.file,
            types.name,
            list.len()
        )));
    }
    let kind = |field: &crate::checkpoint::json::Field| match field.string()? {
        "linear_attention" => Ok(true),
        "full_attention" => Ok(false),
        other => Err(Error::Unsupported(format!(
            "{}: {} is {}, which this engine does not run: expected linear_attention or full_attention",
            config.file,
            field.name,
            crate::error::excerpt(other)
        ))),
    };
    list.iter().map(kind).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grouped_rows_are_a_permutation_with_the_groups_in_order() {
        let shape = DeltaNet {
            key_heads: 2,
            value_heads: 4,
            key_dim: 3,
            value_dim: 2,
            grouped: true,
            layers: vec![true],
        };
        let [qkv, z, b, a] = shape.grouped_rows();
        // A group of in_proj_qkvz: q 0..3, k 3..6, v of two heads 6..10, z of two heads 10..14.
        assert_eq!(qkv, [0, 1, 2, 14, 15, 16, 3, 4, 5, 17, 18, 19, 6, 7, 8, 9, 20, 21, 22, 23]);
        assert_eq!(z, [10, 11, 12, 13, 24, 25, 26, 27]);
        assert_eq!((b, a), (vec![0, 1, 4, 5], vec![2, 3, 6, 7]));
    }
}
