//! A target and its drafter, opened and checked against each other before any weight is read.

use crate::checkpoint::config::{DrafterConfig, TargetConfig, check_pair};
use crate::checkpoint::folder::Folder;
use crate::checkpoint::safetensors::Checkpoint;
use crate::{Error, Result};

/// One model: its folder, its config and its weights.
pub struct Model<Config> {
    /// The source of its files.
    pub folder: Folder,
    /// Its `config.json`.
    pub config: Config,
    /// Its tensors.
    pub weights: Checkpoint,
}

/// A target and the drafter that was trained for it. Every device loads models from it.
pub struct Pair {
    /// The model whose output is reproduced.
    pub target: Model<TargetConfig>,
    /// Its DFlash drafter; `None` for autoregressive decoding only.
    pub drafter: Option<Model<DrafterConfig>>,
}

impl Pair {
    /// Reads both configs, checks that they belong together, and then checks the headers of the weights. No
    /// weight is read.
    ///
    /// # Errors
    /// [`Error::Model`] for files that are missing, malformed or do not belong together;
    /// [`Error::Unsupported`] for models that this engine does not support; [`Error::Option`] for a drafter
    /// passed as the target or a target passed as the drafter.
    pub fn open(target: Folder, drafter: Option<Folder>) -> Result<Pair> {
        let (config, drafter) = open_configs(&target, drafter)?;
        let weights = Checkpoint::open(&target)?;
        weights.check_target(&config.tensors())?;
        let drafter = drafter.map(|(folder, config)| {
            let weights = Checkpoint::open(&folder)?;
            weights.check_drafter(&config.tensors())?;
            Ok(Model { folder, config, weights })
        });
        Ok(Pair { target: Model { folder: target, config, weights }, drafter: drafter.transpose()? })
    }

    /// A pair with the shapes of these configs and random weights ([`Checkpoint::random`]), for measurements
    /// in which the text does not matter. Reads no weight files. Devices can run it, but the CPU reference
    /// cannot.
    ///
    /// # Errors
    /// As [`Pair::open`], for the configs.
    pub fn with_random_weights(target: Folder, drafter: Option<Folder>) -> Result<Pair> {
        let (config, drafter) = open_configs(&target, drafter)?;
        let weights = Checkpoint::random(&target, &config.tensors(), 1);
        let drafter = drafter.map(|(folder, config)| {
            let weights = Checkpoint::random(&folder, &config.tensors(), 2);
            Model { folder, config, weights }
        });
        Ok(Pair { target: Model { folder: target, config, weights }, drafter })
    }

    /// Maximum positions of a sequence, prompt and answer together: `context`, or the target's maximum.
    ///
    /// # Errors
    /// [`Error::Option`] for a number outside 2 to the target's maximum.
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

    /// Rows of a block, anchor included: `block`, or the number that the drafter was trained with, or 1
    /// without a drafter.
    ///
    /// # Errors
    /// [`Error::Option`] for a number outside 1 to the trained one, or for any number but 1 without a
    /// drafter.
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
fn open_configs(
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
