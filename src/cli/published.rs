//! DFlash drafters that are published for targets of known shape.

use crate::checkpoint::config::TargetConfig;
use crate::checkpoint::folder::PUBLISHED;

/// Targets of [`PUBLISHED`] and the Hugging Face names of their drafters.
const DRAFTERS: [(&str, &str); 3] = [
    ("qwen3-4b", "z-lab/Qwen3-4B-DFlash-b16"),
    ("qwen3-8b", "z-lab/Qwen3-8B-DFlash-b16"),
    ("llama-3.1-8b", "z-lab/LLaMA3.1-8B-Instruct-DFlash-UltraChat"),
];

/// The published drafter for a target of this shape. A shape does not identify a model: a fine-tuned target
/// has the same one, and the drafter fits it less well.
pub fn drafter_for(target: &TargetConfig) -> Option<&'static str> {
    let shape = |config: &TargetConfig| {
        let stack = &config.stack;
        let heads = (stack.heads, stack.kv_heads, stack.head_dim);
        (config.family, config.vocab, stack.hidden, stack.intermediate, heads, stack.attention.len())
    };
    let (name, ..) = PUBLISHED.iter().find(|(_, folder, _)| {
        TargetConfig::open(folder).is_ok_and(|published| shape(&published) == shape(target))
    })?;
    DRAFTERS.iter().find(|(target, _)| target == name).map(|(_, drafter)| *drafter)
}
