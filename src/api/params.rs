//! The parameters of a request.

use crate::spec::config::SpecConfig;
use crate::spec::sampling::SamplingParams;

/// Settings of one request. The default is up to 256 tokens, greedy, with drafts verified by `match`, so the
/// output is that of autoregressive decoding.
///
/// ```
/// use dflash::Params;
///
/// let params = Params::default().max_tokens(100).temperature(0.8).top_p(0.95).seed(7).stop("\n\n");
/// assert_eq!(params.sampling.top_p, 0.95);
/// assert_eq!(params.stop, ["\n\n"]);
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Params {
    /// Maximum tokens to generate. The model's context may end the answer earlier.
    pub max_tokens: usize,
    /// How tokens are sampled. Temperature 0, the default, is greedy.
    pub sampling: SamplingParams,
    /// How drafts are made and verified.
    pub spec: SpecConfig,
    /// Rows of a block, anchor included, so a block has `block - 1` drafts. `None` for the number that the
    /// drafter was trained with; 1 is autoregressive decoding.
    pub block: Option<usize>,
    /// Stop strings. The answer ends before the first one that it contains. A stop string that is a special
    /// token of the target ends it too.
    pub stop: Vec<String>,
    /// Stop ids. The answer ends after the first one that it contains. `None` for the model's own stop ids
    /// ([`Engine::stop_ids`](crate::Engine::stop_ids)), empty for no stop ids.
    pub stop_ids: Option<Vec<u32>>,
    /// Encode a text prompt as it is, even if the model has a chat template.
    pub raw: bool,
    /// A system message to put before the conversation. Needs a chat template. An empty one is none.
    pub system: Option<String>,
    /// Variables for the chat template: (name, value).
    pub template_args: Vec<(String, serde_json::Value)>,
}

impl Default for Params {
    fn default() -> Params {
        Params {
            max_tokens: 256,
            sampling: SamplingParams::default(),
            spec: SpecConfig::default(),
            block: None,
            stop: Vec::new(),
            stop_ids: None,
            raw: false,
            system: None,
            template_args: Vec::new(),
        }
    }
}

impl Params {
    /// Sets [`Params::max_tokens`].
    pub fn max_tokens(self, max_tokens: usize) -> Params {
        Params { max_tokens, ..self }
    }

    /// Sets [`Params::sampling`] as a whole.
    pub fn sampling(self, sampling: SamplingParams) -> Params {
        Params { sampling, ..self }
    }

    /// Sets the temperature of [`Params::sampling`]: 0 (greedy) or 0.0001 to 10000.
    pub fn temperature(mut self, temperature: f32) -> Params {
        self.sampling.temperature = temperature;
        self
    }

    /// Samples from the `k` most probable tokens; 0 for all.
    pub fn top_k(mut self, k: usize) -> Params {
        self.sampling.top_k = k;
        self
    }

    /// Samples from the smallest set of most probable tokens whose probabilities add up to `p` or more; `p`
    /// is more than 0 and at most 1.
    pub fn top_p(mut self, p: f64) -> Params {
        self.sampling.top_p = p;
        self
    }

    /// Samples from tokens whose probability is at least `p` times that of the most probable token; `p` is at
    /// least 0 and below 1.
    pub fn min_p(mut self, p: f64) -> Params {
        self.sampling.min_p = p;
        self
    }

    /// Sets the seed of [`Params::sampling`]. The same request with the same seed gives the same text.
    pub fn seed(mut self, seed: u64) -> Params {
        self.sampling.seed = seed;
        self
    }

    /// Sets [`Params::spec`].
    pub fn spec(self, spec: SpecConfig) -> Params {
        Params { spec, ..self }
    }

    /// Sets [`Params::block`].
    pub fn block(self, rows: usize) -> Params {
        Params { block: Some(rows), ..self }
    }

    /// Selects autoregressive decoding: sets [`Params::block`] to 1.
    pub fn autoregressive(self) -> Params {
        self.block(1)
    }

    /// Adds a stop string.
    pub fn stop(mut self, stop: impl Into<String>) -> Params {
        self.stop.push(stop.into());
        self
    }

    /// Sets [`Params::stop_ids`].
    pub fn stop_ids(self, ids: impl Into<Vec<u32>>) -> Params {
        Params { stop_ids: Some(ids.into()), ..self }
    }

    /// Sets [`Params::raw`].
    pub fn raw(self) -> Params {
        Params { raw: true, ..self }
    }

    /// Sets [`Params::system`].
    pub fn system(self, text: impl Into<String>) -> Params {
        Params { system: Some(text.into()), ..self }
    }

    /// Adds a variable for the chat template.
    pub fn template_arg(mut self, name: impl Into<String>, value: impl Into<serde_json::Value>) -> Params {
        self.template_args.push((name.into(), value.into()));
        self
    }
}
