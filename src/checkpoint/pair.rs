//! A target and its drafter, opened and held against each other before any weight is read.

use crate::checkpoint::config::{DrafterConfig, TargetConfig, check_pair};
use crate::checkpoint::safetensors::{Checkpoint, Folder};
use crate::{Error, Result};

/// One model's folder: its config and its mapped, checked checkpoint.
pub struct Model<Config> {
    pub folder: Folder,
    pub config: Config,
    pub weights: Checkpoint,
}

/// What is needed to build models on any device.
pub struct Pair {
    pub target: Model<TargetConfig>,
    pub drafter: Option<Model<DrafterConfig>>,
}

impl Pair {
    /// Reads the configs, then their fit, then the headers of the weights: the cheapest mistake is found first.
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

    /// A pair with the shapes of these configs and drawn weights ([`Checkpoint::drawn`]): for measuring, where shapes
    /// matter and text does not. Only `config.json` is read. The CPU reference does not run it.
    pub fn drawn(target: Folder, drafter: Option<Folder>) -> Result<Pair> {
        let (config, drafter) = configs(&target, drafter)?;
        let weights = Checkpoint::drawn(&target, &config.tensors(), 1);
        let drafter = drafter.map(|(folder, config)| {
            let weights = Checkpoint::drawn(&folder, &config.tensors(), 2);
            Model { folder, config, weights }
        });
        Ok(Pair { target: Model { folder: target, config, weights }, drafter })
    }

    /// Positions that a sequence may have: `--ctx`, or all that the target has.
    ///
    /// # Errors
    /// [`Error::Usage`] for a number that the target does not have.
    pub fn context(&self, ctx: Option<usize>) -> Result<usize> {
        let most = self.target.config.stack.max_positions;
        match ctx {
            None => Ok(most),
            Some(n) if (2..=most).contains(&n) => Ok(n),
            Some(n) => Err(Error::Usage(format!(
                "--ctx is {n}, expected 2 to {most}, the positions that {} has",
                self.target.folder.path("config.json")
            ))),
        }
    }

    /// Rows of a block: `--block`, or what the drafter was trained with; 1 without a drafter.
    ///
    /// # Errors
    /// [`Error::Usage`] for another number than those.
    pub fn block(&self, block: Option<usize>) -> Result<usize> {
        let Some(drafter) = &self.drafter else {
            return match block {
                None | Some(1) => Ok(1),
                Some(n) => Err(Error::Usage(format!(
                    "--block is {n} without a drafter, expected 1 (autoregressive decoding)"
                ))),
            };
        };
        let trained = drafter.config.block;
        match block {
            None => Ok(trained),
            Some(n) if (1..=trained).contains(&n) => Ok(n),
            Some(n) => Err(Error::Usage(format!(
                "--block is {n}, expected 1 to {trained}, the block that {} was trained with",
                drafter.folder.path("config.json")
            ))),
        }
    }
}

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
