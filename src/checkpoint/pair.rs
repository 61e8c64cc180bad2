//! A target and its drafter, opened and checked against each other before any weight is read.

use crate::checkpoint::config::{DrafterConfig, TargetConfig, check_pair};
use crate::checkpoint::folder::Folder;
use crate::checkpoint::safetensors::Checkpoint;
use crate::{Error, Result};

/// One model: its folder, its config, and its mapped, checked checkpoint.
pub struct Model<Config> {
    /// Where its files are.
    pub folder: Folder,
    /// Its `config.json`.
    pub config: Config,
    /// Its tensors.
    pub weights: Checkpoint,
}

/// A target and the drafter that was trained for it: what every device loads.
pub struct Pair {
    /// The model whose text is generated.
    pub target: Model<TargetConfig>,
    /// Its DFlash drafter; `None` for autoregressive decoding only.
    pub drafter: Option<Model<DrafterConfig>>,
}

impl Pair {
    /// Reads the configs, then checks that they fit, then reads the headers of the weights, so the cheapest
    /// mistake is found first. No weight is read.
    ///
    /// # Errors
    /// [`Error::Model`] for files that are missing, malformed or do not fit; [`Error::Unsupported`] for
    /// models that this engine does not run; [`Error::Option`] for a drafter given as the target or the
    /// reverse.
    pub fn open(target: Folder, drafter: Option<Folder>) -> Result<Pair> {
        let (config, drafter) = configs(&target, drafter)?;
        let weights = Checkpoint::open(&target)?;
        weights.check_target(&config.tensors())?;
        let drafter = drafter.map(|(folder, config)| {
            let weights = Checkpoint::open(&folder)?;
            weights.check_drafter(&config.tensors())?;
            Ok(Model { folder, config, weights })
        });
        Ok(Pair { target: Model { folder: target, config, weights }, drafter: drafter.transpose()? })
    }

    /// A pair with the shapes of these configs and random weights ([`Checkpoint::random`]). For measuring,
    /// where shapes matter and text does not. Reads `config.json` only. Devices run it, the CPU reference
    /// does not.
    ///
    /// # Errors
    /// As [`Pair::open`], for the configs.
    pub fn with_random_weights(target: Folder, drafter: Option<Folder>) -> Result<Pair> {
        let (config, drafter) = configs(&target, drafter)?;
        let weights = Checkpoint::random(&target, &config.tensors(), 1);
        let drafter = drafter.map(|(folder, config)| {
            let weights = Checkpoint::random(&folder, &config.tensors(), 2);
            Model { folder, config, weights }
        });
        Ok(Pair { target: Model { folder: target, config, weights }, drafter })
    }

    /// Positions that a sequence may have, prompt and answer together: `context`, or all that the target has.
    ///
    /// # Errors
    /// [`Error::Option`] for a number outside 2 to the target's positions.
    pub fn context(&self, context: Option<usize>) -> Result<usize> {
        let limit = self.target.config.stack.max_positions;
        match context {
            None => Ok(limit),
            Some(n) if (2..=limit).contains(&n) => Ok(n),
            Some(n) => Err(Error::option(
                "context",
                format!(
                    "is {n}, expected 2 to {limit}, the positions that {} has",
                    self.target.folder.described_file("config.json")
                ),
            )),
        }
    }

    /// Rows of a block, anchor included: `block`, or the number that the drafter was trained with; 1 without
    /// a drafter.
    ///
    /// # Errors
    /// [`Error::Option`] for a number outside 1 to the trained one, or other than 1 without a drafter.
    pub fn block(&self, block: Option<usize>) -> Result<usize> {
        let Some(drafter) = &self.drafter else {
            return match block {
                None | Some(1) => Ok(1),
                Some(n) => Err(Error::option(
                    "block",
                    format!("is {n} without a drafter, expected 1 (autoregressive decoding)"),
                )),
            };
        };
        let trained = drafter.config.block;
        match block {
            None => Ok(trained),
            Some(n) if (1..=trained).contains(&n) => Ok(n),
            Some(n) => Err(Error::option(
                "block",
                format!(
                    "is {n}, expected 1 to {trained}, the block that {} was trained with",
                    drafter.folder.described_file("config.json")
                ),
            )),
        }
    }
}

/// Reads both configs and checks that the drafter was made for the target.
fn configs(
    target: &Folder,
    drafter: Option<Folder>,
) -> Result<(TargetConfig, Option<(Folder, DrafterConfig)>)> {
    let config = TargetConfig::open(target)?;
    let drafter = match drafter {
        None => None,
        Some(folder) => {
            let draft_config = DrafterConfig::open(&folder)?;
            check_pair(&config, target, &draft_config, &folder)?;
            Some((folder, draft_config))
        }
    };
    Ok((config, drafter))
}
