//! `--model`: a published pair, the demo pair or folders, of which only `config.json` is read; the weights are drawn.

use dflash::checkpoint::pair::Pair;
use dflash::checkpoint::safetensors::{DEMO_DRAFTER, DEMO_TARGET, Folder, PUBLISHED};
use dflash::{Error, Result};
use std::path::{Path, PathBuf};

/// The pair by its name, or of a target's folder and `draft`, a drafter's, which replaces a named one's too.
pub fn pair(model: &str, draft: Option<PathBuf>) -> Result<Pair> {
    let draft = draft.map(Folder::Disk);
    if model == "demo" {
        return Pair::with_random_weights(DEMO_TARGET, Some(draft.unwrap_or(DEMO_DRAFTER)));
    }
    if let Some((_, target, drafter)) = PUBLISHED.into_iter().find(|pair| pair.0 == model) {
        return Pair::with_random_weights(target, Some(draft.unwrap_or(drafter)));
    }
    let dir = Path::new(model);
    if !dir.exists() {
        let known = PUBLISHED.map(|pair| pair.0).join(", ");
        return Err(Error::Usage(format!(
            "--model is {model:?}, expected {known}, demo or a target's folder"
        )));
    }
    Pair::with_random_weights(Folder::Disk(dir.to_path_buf()), draft)
}
