//! A target and its drafter, opened and checked against each other before any weight is read.

use crate::checkpoint::config::{DrafterConfig, Overrides, TargetConfig, check_pair};
use crate::checkpoint::drafter::CODEBOOKS;
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

/// Drafts without a drafter: the tokens that follow an earlier occurrence of a sequence's last tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lookup {
    /// The fewest last tokens that must occur earlier, at least 1. With fewer there are no drafts.
    pub least: usize,
    /// The most tokens that are compared, at least `least`.
    pub most: usize,
}

impl Lookup {
    /// Prompt lookup: n-grams of 2 to 5 tokens.
    pub const NGRAM: Lookup = Lookup { least: 2, most: 5 };
    /// The longest repeated suffix, of 2 to 64 tokens. Longer matches count as 64.
    pub const SUFFIX: Lookup = Lookup { least: 2, most: 64 };
    /// Rows of a round, the anchor and the drafts, where nothing else is asked for.
    pub const BLOCK: usize = 8;
    /// The most rows of a round: up to 16, verification costs about as much as a step without drafts.
    pub const MAX_BLOCK: usize = 16;

    /// Its name in options and records.
    pub fn name(self) -> &'static str {
        if self == Lookup::SUFFIX { "suffix" } else { "lookup" }
    }
}

/// A target and the drafter that was trained for it. Every device loads models from it.
pub struct Pair {
    /// The model whose output is reproduced.
    pub target: Model<TargetConfig>,
    /// Its DFlash drafter; `None` for autoregressive decoding only.
    pub drafter: Option<Model<DrafterConfig>>,
    /// Drafts without a drafter; `None` with one, and for autoregressive decoding only.
    pub lookup: Option<Lookup>,
    /// What the user should know about the files: one sentence each.
    pub notes: Vec<String>,
}

impl Pair {
    /// Reads both configs, checks that they belong together, and then checks the headers of the weights. No
    /// weight is read, except that a stored head of a tied target is compared with the embedding table.
    ///
    /// # Errors
    /// [`Error::Model`] for files that are missing, malformed or do not belong together;
    /// [`Error::Unsupported`] for models that this engine does not support; [`Error::Option`] for a drafter
    /// passed as the target or a target passed as the drafter.
    pub fn open(target: Folder, drafter: Option<Folder>) -> Result<Pair> {
        Pair::open_with(target, drafter, &Overrides::default())
    }

    /// As [`Pair::open`], with overrides of the drafter's config.
    ///
    /// # Errors
    /// As [`Pair::open`]; [`Error::Option`] for taps that do not fit the target or the drafter.
    pub fn open_with(target: Folder, drafter: Option<Folder>, overrides: &Overrides) -> Result<Pair> {
        let (mut config, drafter, mut notes) = open_configs(&target, drafter, overrides)?;
        let mut weights = Checkpoint::open(&target)?;
        weights.split_experts(&config)?;
        let (head, table) = ("lm_head.weight", "model.embed_tokens.weight");
        // As in Hugging Face, either of two tied tensors may be the stored one.
        if config.tied && weights.shape(table).is_none() {
            weights.rename(head, table);
        }
        let shape = [config.vocab, config.stack.hidden];
        if config.tied
            && weights.shape(head).is_some()
            && !weights.tensor(head, &shape)?.equals(&weights.tensor(table, &shape)?)?
        {
            notes.push(format!(
                "{}: tie_word_embeddings is true, but {head} differs from {table}: the head is used, as it is stored",
                target.described_file("config.json")
            ));
            config.tied = false;
        }
        weights.check_target(&config)?;
        let drafter = drafter.map(|(folder, mut plan)| {
            let mut file = Checkpoint::open(&folder)?;
            for name in CODEBOOKS.into_iter().filter(|_| plan.selector.is_some()) {
                if file.shape(name).is_none() {
                    file.rename(&format!("{name}.weight"), name);
                }
            }
            if let Some(taps) = &overrides.taps {
                check_number_of_taps(&file, taps, plan.stack.hidden)?;
            }
            plan.complete(&file, &config, &weights)?;
            file.check_drafter(&plan.tensors())?;
            Ok(Model { folder, config: plan, weights: file })
        });
        let target = Model { folder: target, config, weights };
        Ok(Pair { target, drafter: drafter.transpose()?, lookup: None, notes })
    }

    /// A pair with the shapes of these configs and random weights ([`Checkpoint::random`]), for measurements
    /// in which the text does not matter. Reads no weight files. Devices can run it, but the CPU reference
    /// cannot.
    ///
    /// # Errors
    /// As [`Pair::open`], for the configs.
    pub fn with_random_weights(target: Folder, drafter: Option<Folder>) -> Result<Pair> {
        Pair::with_random_weights_and(target, drafter, &Overrides::default())
    }

    /// As [`Pair::with_random_weights`], with overrides of the drafter's config.
    ///
    /// # Errors
    /// As [`Pair::open_with`], for the configs.
    pub fn with_random_weights_and(
        target: Folder,
        drafter: Option<Folder>,
        overrides: &Overrides,
    ) -> Result<Pair> {
        let (config, drafter, notes) = open_configs(&target, drafter, overrides)?;
        let weights = Checkpoint::random(&target, &config.tensors(), 1);
        let drafter = drafter.map(|(folder, mut plan)| {
            plan.complete_randomly(config.vocab);
            let weights = Checkpoint::random(&folder, &plan.tensors(), 2);
            Model { folder, config: plan, weights }
        });
        Ok(Pair { target: Model { folder: target, config, weights }, drafter, lookup: None, notes })
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

    /// Whether rounds can have drafts.
    pub fn drafts(&self) -> bool {
        self.drafter.is_some() || self.lookup.is_some()
    }

    /// The most rows of a round, the anchor and the drafts.
    pub fn max_block(&self) -> usize {
        let without = self.lookup.map_or(1, |_| Lookup::MAX_BLOCK);
        self.drafter.as_ref().map_or(without, |drafter| drafter.config.block)
    }

    /// The name of the source of drafts, for records.
    pub fn draft_name(&self) -> Option<String> {
        let lookup = self.lookup.map(|lookup| lookup.name().to_string());
        self.drafter.as_ref().map(|drafter| drafter.folder.name()).or(lookup)
    }

    /// Rows of a round, the anchor and the drafts: `block`, or the number that the drafter was trained with,
    /// or 1 without a drafter; with [`Pair::lookup`] 8, and at most 16.
    ///
    /// # Errors
    /// [`Error::Option`] for a number outside 1 to the trained one, or for any number but 1 without a
    /// drafter.
    pub fn block(&self, block: Option<usize>) -> Result<usize> {
        if self.lookup.is_some() {
            return match block.unwrap_or(Lookup::BLOCK) {
                n if (1..=Lookup::MAX_BLOCK).contains(&n) => Ok(n),
                n => Err(Error::option("block", format!("is {n}, expected 1 to {}", Lookup::MAX_BLOCK))),
            };
        }
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

/// The configs of a target and its drafter, and notes for the user.
type Configs = (TargetConfig, Option<(Folder, DrafterConfig)>, Vec<String>);

/// Reads both configs and checks that the drafter was made for the target. Also returns notes for the user.
fn open_configs(target: &Folder, drafter: Option<Folder>, overrides: &Overrides) -> Result<Configs> {
    let config = TargetConfig::open(target)?;
    let mut notes = config.notes.clone();
    let drafter = match drafter {
        None => None,
        Some(folder) => {
            let layers = config.stack.attention.len();
            let draft_config = DrafterConfig::open_for(&folder, overrides, Some(layers))?;
            check_pair(&config, target, &draft_config, &folder)?;
            notes.extend_from_slice(&draft_config.notes);
            if draft_config.vocab != config.vocab {
                notes.push(format!(
                    "{}: vocab_size is {}, the target's is {}: drafts are among the first {} ids",
                    folder.described_file("config.json"),
                    draft_config.vocab,
                    config.vocab,
                    draft_config.vocab.min(config.vocab)
                ));
            }
            Some((folder, draft_config))
        }
    };
    Ok((config, drafter, notes))
}

/// Checks that the drafter's feature projection takes as many taps as were given.
fn check_number_of_taps(weights: &Checkpoint, taps: &[usize], hidden: usize) -> Result<()> {
    match weights.shape("fc.weight") {
        Some(&[_, columns]) if columns.is_multiple_of(hidden) && columns / hidden != taps.len() => {
            let (given, expected) = (taps.len(), columns / hidden);
            let problem =
                format!("holds {given} layers, expected {expected}, as fc.weight of the drafter takes");
            Err(Error::option("taps", problem))
        }
        _ => Ok(()),
    }
}
