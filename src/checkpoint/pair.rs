//! A target and its drafter, opened and checked against each other before any weight is read.

use crate::checkpoint::config::{DrafterConfig, Overrides, TargetConfig, check_pair};
use crate::checkpoint::eagle3::MAX_CHAIN;
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

/// What drafts. `D` is a drafter: the folder to open it from, or the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DraftSource<D> {
    /// Nothing: autoregressive decoding only.
    None,
    /// A drafter.
    Drafter(D),
    /// The text so far.
    Lookup(Lookup),
}

impl<D> DraftSource<D> {
    /// The drafter, if it is one.
    pub fn drafter(&self) -> Option<&D> {
        match self {
            DraftSource::Drafter(drafter) => Some(drafter),
            _ => None,
        }
    }

    /// How drafts are looked up, if they are.
    pub fn lookup(&self) -> Option<Lookup> {
        match *self {
            DraftSource::Lookup(lookup) => Some(lookup),
            _ => None,
        }
    }

    /// The same of a reference.
    pub fn as_ref(&self) -> DraftSource<&D> {
        match self {
            DraftSource::None => DraftSource::None,
            DraftSource::Drafter(drafter) => DraftSource::Drafter(drafter),
            DraftSource::Lookup(lookup) => DraftSource::Lookup(*lookup),
        }
    }

    /// The same with another kind of drafter, which `make` makes.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn try_map<E>(self, make: impl FnOnce(D) -> Result<E>) -> Result<DraftSource<E>> {
        Ok(match self {
            DraftSource::None => DraftSource::None,
            DraftSource::Drafter(drafter) => DraftSource::Drafter(make(drafter)?),
            DraftSource::Lookup(lookup) => DraftSource::Lookup(lookup),
        })
    }
}

impl<D> From<Option<D>> for DraftSource<D> {
    fn from(drafter: Option<D>) -> DraftSource<D> {
        drafter.map_or(DraftSource::None, DraftSource::Drafter)
    }
}

/// A target and what drafts for it. Every device loads models from it.
pub struct Pair {
    /// The model whose output is reproduced.
    pub target: Model<TargetConfig>,
    /// What drafts.
    pub draft: DraftSource<Model<DrafterConfig>>,
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
    pub fn open(target: Folder, draft: impl Into<DraftSource<Folder>>) -> Result<Pair> {
        Pair::open_with(target, draft, &Overrides::default())
    }

    /// As [`Pair::open`], with overrides of the drafter's config.
    ///
    /// # Errors
    /// As [`Pair::open`]; [`Error::Option`] for taps that do not fit the target or the drafter.
    pub fn open_with(
        target: Folder,
        draft: impl Into<DraftSource<Folder>>,
        overrides: &Overrides,
    ) -> Result<Pair> {
        let (mut config, draft, mut notes) = open_configs(&target, draft.into(), overrides)?;
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
        let draft = draft.try_map(|(folder, mut plan)| {
            let mut file = Checkpoint::open(&folder)?;
            plan.rename_tensors(&mut file);
            if let Some(taps) = &overrides.taps {
                check_number_of_taps(&file, taps, plan.stack.hidden)?;
            }
            plan.complete(&file, &config, &weights)?;
            file.check_drafter(&plan.tensors())?;
            Ok(Model { folder, config: plan, weights: file })
        })?;
        Ok(Pair { target: Model { folder: target, config, weights }, draft, notes })
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
        let (config, draft, notes) = open_configs(&target, drafter.into(), overrides)?;
        let weights = Checkpoint::random(&target, &config.tensors(), 1);
        let draft = draft.try_map(|(folder, mut plan)| {
            plan.complete_randomly(config.vocab);
            let weights = Checkpoint::random(&folder, &plan.tensors(), 2);
            Ok(Model { folder, config: plan, weights })
        })?;
        Ok(Pair { target: Model { folder: target, config, weights }, draft, notes })
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

    /// The drafter, if there is one.
    pub fn drafter(&self) -> Option<&Model<DrafterConfig>> {
        self.draft.drafter()
    }

    /// Whether rounds can have drafts.
    pub fn drafts(&self) -> bool {
        !matches!(self.draft, DraftSource::None)
    }

    /// The most rows of a round, the anchor and the drafts.
    pub fn max_block(&self) -> usize {
        match &self.draft {
            DraftSource::None => 1,
            DraftSource::Drafter(drafter) => match drafter.config.chain() {
                Some(_) => MAX_CHAIN,
                None => drafter.config.block,
            },
            DraftSource::Lookup(_) => Lookup::MAX_BLOCK,
        }
    }

    /// The name of the source of drafts, for records.
    pub fn draft_name(&self) -> Option<String> {
        match &self.draft {
            DraftSource::None => None,
            DraftSource::Drafter(drafter) => Some(drafter.folder.name()),
            DraftSource::Lookup(lookup) => Some(lookup.name().to_string()),
        }
    }

    /// Rows of a round, the anchor and the drafts: `block`, or the number that the drafter was trained with,
    /// or 1 without a drafter; with [`DraftSource::Lookup`] 8. At most [`Pair::max_block`].
    ///
    /// # Errors
    /// [`Error::Option`] for a number outside 1 to that, or for any number but 1 without a drafter.
    pub fn block(&self, block: Option<usize>) -> Result<usize> {
        let max = self.max_block();
        let n = block.unwrap_or(match &self.draft {
            DraftSource::None => 1,
            DraftSource::Drafter(drafter) => drafter.config.block,
            DraftSource::Lookup(_) => Lookup::BLOCK,
        });
        if (1..=max).contains(&n) {
            return Ok(n);
        }
        let problem = match &self.draft {
            DraftSource::None => {
                format!("is {n} without a drafter, expected 1 (autoregressive decoding)")
            }
            DraftSource::Drafter(drafter) if drafter.config.chain().is_none() => format!(
                "is {n}, expected 1 to {max}, the block that {} was trained with",
                drafter.folder.described_file("config.json")
            ),
            _ => format!("is {n}, expected 1 to {max}"),
        };
        Err(Error::option("block", problem))
    }
}

/// The configs of a target and its drafter, and notes for the user.
type Configs = (TargetConfig, DraftSource<(Folder, DrafterConfig)>, Vec<String>);

/// Reads both configs and checks that the drafter was made for the target. Also returns notes for the user.
fn open_configs(target: &Folder, draft: DraftSource<Folder>, overrides: &Overrides) -> Result<Configs> {
    let config = TargetConfig::open(target)?;
    let mut notes = config.notes.clone();
    let draft = draft.try_map(|folder| {
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
        Ok((folder, draft_config))
    })?;
    Ok((config, draft, notes))
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
