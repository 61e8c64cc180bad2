//! The engine: a pair loaded on a device.

use crate::api::device::{DeviceChoice, DeviceHandle, Placement};
use crate::api::generation::{DecoderRef, Generation};
use crate::api::params::Params;
use crate::checkpoint::config::{Overrides, Slots};
use crate::checkpoint::folder::{DEMO_DRAFTER, DEMO_TARGET, Folder};
use crate::checkpoint::pair::{DraftSource, Lookup, Pair};
use crate::checkpoint::stop_ids::StopIds;
use crate::cpu::decoder::Cpu;
use crate::engine::generate::{Backend, Decoder, Request};
use crate::gpu::batch_config::BatchConfig;
use crate::gpu::decoder::DeviceBackend;
use crate::spec::config::SpecConfig;
use crate::text::prompts::{Content, Prompt, PromptEncoder, without_template};
use crate::text::tokenizer::{Stream, Text, stop_ids, stream};
use crate::{Error, Result};
use std::path::PathBuf;

/// Which models to open.
#[derive(Debug, Clone)]
pub struct Models {
    target: Folder,
    draft: DraftSource<Folder>,
    overrides: Overrides,
}

impl Models {
    /// The demo pair, embedded in the binary: a small target trained on Python source, and its drafter. It
    /// was not trained on conversations.
    pub fn demo() -> Models {
        Models::of(DEMO_TARGET, Some(DEMO_DRAFTER))
    }

    /// Hugging Face folders of a target and of the DFlash drafter that was trained for it.
    pub fn folders(target: impl Into<PathBuf>, drafter: impl Into<PathBuf>) -> Models {
        Models::of(Folder::Disk(target.into()), Some(Folder::Disk(drafter.into())))
    }

    /// The Hugging Face folder of a target alone, for autoregressive decoding.
    pub fn target(target: impl Into<PathBuf>) -> Models {
        Models::of(Folder::Disk(target.into()), None)
    }

    fn of(target: Folder, drafter: Option<Folder>) -> Models {
        Models { target, draft: drafter.into(), overrides: Overrides::default() }
    }

    /// Looks up drafts in the text so far, in place of a drafter.
    pub fn lookup(self, lookup: Lookup) -> Models {
        Models { draft: DraftSource::Lookup(lookup), ..self }
    }

    /// The target's layers whose outputs the drafter reads, in place of the `target_layer_ids` of its config.
    pub fn taps(self, layers: impl Into<Vec<usize>>) -> Models {
        let taps = Some(layers.into());
        Models { overrides: Overrides { taps, ..self.overrides }, ..self }
    }

    /// Which position a row of the drafter's block predicts, in place of what its config says.
    pub fn slots(self, slots: Slots) -> Models {
        Models { overrides: Overrides { slots: Some(slots), ..self.overrides }, ..self }
    }
}

/// How to open an [`Engine`].
#[derive(Debug, Clone, PartialEq, Default)]
pub struct EngineOptions {
    /// Where to run. The default is a GPU if there is one that can run the pair, else the CPU.
    pub device: DeviceChoice,
    /// Which GPU, in the driver's order from 0.
    pub gpu: u32,
    /// Maximum positions of a sequence, prompt and answer together. `None` for the model's own limit, but at
    /// most 8192 on a GPU, which allocates the KV cache in advance.
    pub context: Option<usize>,
    /// A chat template (jinja) that overrides the model's.
    pub chat_template: Option<String>,
    /// The [`Params::spec`] that needs the most memory of all requests. A GPU allocates memory for it in
    /// advance; the CPU ignores it.
    pub spec: SpecConfig,
}

impl EngineOptions {
    /// Sets [`EngineOptions::device`].
    pub fn device(self, device: DeviceChoice) -> EngineOptions {
        EngineOptions { device, ..self }
    }

    /// Sets [`EngineOptions::gpu`].
    pub fn gpu(self, number: u32) -> EngineOptions {
        EngineOptions { gpu: number, ..self }
    }

    /// Sets [`EngineOptions::context`].
    pub fn context(self, positions: usize) -> EngineOptions {
        EngineOptions { context: Some(positions), ..self }
    }

    /// Sets [`EngineOptions::chat_template`].
    pub fn chat_template(self, source: impl Into<String>) -> EngineOptions {
        EngineOptions { chat_template: Some(source.into()), ..self }
    }

    /// Sets [`EngineOptions::spec`].
    pub fn spec(self, spec: SpecConfig) -> EngineOptions {
        EngineOptions { spec, ..self }
    }
}

/// A target, its drafter and its tokenizer if it has one, loaded on a device.
///
/// ```
/// use dflash::{Engine, Models, Params};
///
/// # fn main() -> dflash::Result<()> {
/// let engine = Engine::open(Models::demo())?;
/// let mut text = String::new();
/// for token in engine.generate("def f(x):", Params::default().max_tokens(32))? {
///     text += &token?.text;
/// }
/// assert!(text.starts_with("\n    "));
/// # Ok(())
/// # }
/// ```
pub struct Engine {
    pair: Pair,
    /// `None` if the target's folder has no tokenizer.
    text: Option<Text>,
    backend: Loaded,
    /// Maximum positions of a sequence.
    context: usize,
    fallback: Option<Error>,
}

/// The loaded pair. It is an enum instead of a trait object, so that `Engine` is `Send` and `Sync`.
enum Loaded {
    Cpu(Box<Cpu>),
    Device(Box<DeviceBackend>, BatchConfig),
}

impl Engine {
    /// Opens the models with default options: on a GPU if one can run them, else on the CPU
    /// ([`Engine::fallback`] says why).
    ///
    /// Weights on disk are memory-mapped. Do not truncate these files while the engine is open: reading the
    /// missing part raises SIGBUS on the CPU.
    ///
    /// # Errors
    /// As [`Engine::open_with`].
    pub fn open(models: Models) -> Result<Engine> {
        Engine::open_with(models, EngineOptions::default())
    }

    /// Opens the models.
    ///
    /// # Errors
    /// [`Error::Model`] for files that are missing, malformed or do not belong together;
    /// [`Error::Unsupported`] for a model or device that this engine or this build does not support;
    /// [`Error::Memory`]; [`Error::Option`] for an invalid option; [`Error::Usage`] for a chat template in
    /// the options that does not parse.
    pub fn open_with(models: Models, options: EngineOptions) -> Result<Engine> {
        let EngineOptions { device, gpu, context, chat_template, spec } = options;
        spec.check()?;
        let mut pair = Pair::open_with(models.target, models.draft, &models.overrides)?;
        let block = pair.max_block();
        let capacity = with_capacity_for(BatchConfig::for_pair(&pair, 1, block, context, 0)?, &spec);
        let template = chat_template.map(|source| ("the chat template", source));
        let mut text = Text::find(&pair.target.folder, template)?;
        let (backend, context, fallback) = match DeviceHandle::for_pair(device, gpu, &pair, capacity)? {
            Placement::Cpu { fallback } => {
                let context = pair.context(context)?;
                (Loaded::Cpu(Box::new(Cpu::load(&pair, 1, context)?)), context, fallback)
            }
            Placement::Device(handle) => {
                handle.memory_plan(&pair, capacity)?.1?;
                let DeviceHandle { name, device, .. } = handle;
                let loaded = DeviceBackend::load(name, device, &pair, capacity, &mut |_| ())?;
                (Loaded::Device(Box::new(loaded), capacity), capacity.positions, None)
            }
        };
        if let Some(text) = &mut text {
            text.limit(context);
            pair.notes.extend_from_slice(&text.notes);
        }
        Ok(Engine { pair, text, backend, context, fallback })
    }

    /// Starts generating an answer to a text, a conversation or token ids. No model runs until the first
    /// token is requested.
    ///
    /// A text is a user's message if the model has a chat template. Otherwise, and with [`Params::raw`], the
    /// answer continues the text. Without a `tokenizer.json` in the target's folder, prompts are token ids,
    /// and answers have token ids but no text.
    ///
    /// Each call allocates a decoder of its own. To answer many requests, use a [`Session`].
    ///
    /// # Errors
    /// [`Error::Usage`] for a prompt that is empty, too long or refused by the chat template;
    /// [`Error::Option`] for invalid parameters; [`Error::Model`] for token ids that the target does not
    /// have, and for a text without a tokenizer; [`Error::Memory`].
    pub fn generate(&self, prompt: impl Into<Content>, params: Params) -> Result<Generation<'_>> {
        let request = self.request(prompt.into(), &params)?;
        let stream = self.stream(&params)?;
        Generation::start(DecoderRef::Owned(self.backend.get().decoder()?), request, stream, false)
    }

    /// Opens a session, which answers one request after another with one decoder.
    ///
    /// # Errors
    /// [`Error::Memory`] if there is too little for its caches.
    pub fn session(&self) -> Result<Session<'_>> {
        Ok(Session { engine: self, decoder: self.backend.get().decoder()? })
    }

    /// The device that runs the pair: `cpu`, `cuda` or `softgpu`.
    pub fn device(&self) -> &'static str {
        self.backend.get().name()
    }

    /// Why the pair runs on the CPU, if the device was chosen automatically.
    pub fn fallback(&self) -> Option<&Error> {
        self.fallback.as_ref()
    }

    /// What the user should know about the model files: one sentence each.
    pub fn notes(&self) -> &[String] {
        &self.pair.notes
    }

    /// Maximum positions of a sequence, prompt and answer together.
    pub fn context(&self) -> usize {
        self.context
    }

    /// The models' configs and checkpoints.
    pub fn pair(&self) -> &Pair {
        &self.pair
    }

    /// The tokenizer and chat template; `None` if the target's folder has no `tokenizer.json`.
    pub fn text(&self) -> Option<&Text> {
        self.text.as_ref()
    }

    /// The model's own stop ids: every end-of-sequence token that a file of the target names.
    pub fn stop_ids(&self) -> StopIds {
        stop_ids(&self.pair.target.config, self.text())
    }

    /// A detokenizer for one answer; `None` without a tokenizer.
    fn stream(&self, params: &Params) -> Result<Option<Stream<'_>>> {
        stream(self.text(), &params.stop, &self.pair.target.folder)
    }

    /// Checks a prompt and its parameters, and turns them into a request of token ids.
    fn request(&self, content: Content, params: &Params) -> Result<Request> {
        let Params { sampling, spec, template_args, .. } = params;
        let system = params.system.as_deref().filter(|text| !text.trim().is_empty());
        let block = self.pair.block(params.block)?;
        spec.check_drafter(&self.pair)?;
        if !self.text().is_some_and(Text::has_template) && (system.is_some() || !template_args.is_empty()) {
            let option = if system.is_some() { "system needs" } else { "template_args need" };
            return Err(without_template(option, &self.pair.target.folder.described()));
        }
        let encoder = PromptEncoder {
            pair: &self.pair,
            text: self.text(),
            raw: params.raw,
            system,
            variables: template_args,
            context: self.context,
        };
        let stop_ids = match &params.stop_ids {
            None => self.stop_ids(),
            Some(ids) => {
                let mut chosen = StopIds::default();
                chosen.add_chosen(ids, "stop_ids", self.pair.target.config.vocab)?;
                chosen
            }
        };
        let request = Request {
            prompt: encoder.encode(&Prompt::new("the prompt", content))?,
            max_tokens: params.max_tokens,
            sampling: sampling.clone(),
            stop_ids: stop_ids.ids(),
            block,
            spec: spec.clone(),
        };
        request.check(self.pair.target.config.vocab, self.context)?;
        if let Loaded::Device(_, capacity) = &self.backend
            && with_capacity_for(*capacity, spec) != *capacity
            && block > 1
        {
            return Err(Error::option(
                "spec",
                "needs more memory than the engine was opened with: expected the same spec in EngineOptions",
            ));
        }
        Ok(request)
    }
}

impl Loaded {
    fn get(&self) -> &dyn Backend {
        match self {
            Loaded::Cpu(cpu) => &**cpu,
            Loaded::Device(device, _) => &**device,
        }
    }
}

/// `capacity`, enlarged so that it covers rounds with this `spec`.
fn with_capacity_for(capacity: BatchConfig, spec: &SpecConfig) -> BatchConfig {
    let BatchConfig { draft_probs, adaptive, .. } = capacity.for_spec(spec);
    let enlarged = BatchConfig {
        draft_probs: draft_probs || capacity.draft_probs,
        adaptive: adaptive || capacity.adaptive,
        ..capacity
    };
    match spec.tree_rows() {
        Some(rows) if rows > capacity.tree => enlarged.with_trees(rows),
        _ => enlarged,
    }
}

/// Answers one request after another with one decoder. It reuses the KV cache of the prefix that a prompt
/// shares with the previous sequence, so a turn of a conversation runs only its new tokens.
///
/// ```
/// use dflash::{Engine, Models, Params};
///
/// # fn main() -> dflash::Result<()> {
/// let engine = Engine::open(Models::demo())?;
/// let mut session = engine.session()?;
/// let params = Params::default().max_tokens(8);
/// let first = session.generate("import os\nimport ", params.clone())?.finish()?;
/// let again = session.generate("import os\nimport ", params)?.finish()?;
/// assert_eq!((first.outcome.kept, again.text), (0, first.text));
/// assert!(again.outcome.kept > 0);
/// # Ok(())
/// # }
/// ```
pub struct Session<'a> {
    engine: &'a Engine,
    decoder: Box<dyn Decoder + 'a>,
}

impl Session<'_> {
    /// As [`Engine::generate`].
    ///
    /// # Errors
    /// As [`Engine::generate`].
    pub fn generate(&mut self, prompt: impl Into<Content>, params: Params) -> Result<Generation<'_>> {
        let request = self.engine.request(prompt.into(), &params)?;
        let stream = self.engine.stream(&params)?;
        Generation::start(DecoderRef::Borrowed(&mut *self.decoder), request, stream, true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_can_be_shared_between_threads() {
        fn shared<T: Send + Sync>() {}
        shared::<Engine>();
    }
}
