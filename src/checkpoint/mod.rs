//! Model folders on disk: `config.json`, safetensors shards, and a target and its drafter opened as a pair.
//!
//! All files are untrusted input. Sizes are checked before anything is allocated. Every error is one sentence
//! that names the file and the field or tensor.
//!
//! | module | owns |
//! | --- | --- |
//! | [`folder`] | where files come from: a folder on disk, or files embedded in the binary (the demo pair) |
//! | [`config`] | `config.json` of the target, and what target and drafter share |
//! | [`delta_net`], [`moe`] | layers of hybrid and of MoE targets: shapes and tensors |
//! | [`drafter`] | the plan of a drafter, from its `config.json` and its files |
//! | [`eagle3`] | what is particular to EAGLE-3 drafters in it |
//! | [`rope`] | rotary position embedding |
//! | [`safetensors`] | tensors by name, with shape and type, memory-mapped |
//! | [`random_weights`] | weights computed from a seed, for measurements without a download |
//! | [`stop_ids`] | the token ids that end an answer |
//! | [`pair`] | target and drafter opened together and checked against each other |

pub mod config;
pub mod delta_net;
pub mod drafter;
pub mod eagle3;
pub mod folder;
mod identify;
pub(crate) mod json;
pub mod moe;
pub mod pair;
pub mod random_weights;
pub mod rope;
pub mod safetensors;
pub mod stop_ids;
