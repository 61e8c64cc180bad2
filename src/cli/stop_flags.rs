//! The flags that say which token ids end an answer, shared by every program that generates.

use crate::Result;
use crate::checkpoint::config::TargetConfig;
use crate::checkpoint::stop_ids::StopIds;
use crate::cli::terminal::whole;
use crate::text::tokenizer::{Text, stop_ids};

/// To be flattened into a program's own flags.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct StopFlags {
    /// End the answer at this token id, too; repeatable
    #[arg(long, value_name = "N", help_heading = "Generation")]
    #[arg(value_parser = whole::<u32>, allow_negative_numbers = true)]
    pub stop_id: Vec<u32>,
    /// Go on after the model's stop tokens; those of other flags still end the answer
    #[arg(long, help_heading = "Generation")]
    pub ignore_eos: bool,
}

impl StopFlags {
    /// The token ids that end an answer: the model's own unless they are ignored, those of the flags, and the
    /// special tokens among the stop strings `stop`.
    ///
    /// # Errors
    /// [`Error::Option`](crate::Error::Option) for an id that the target does not have.
    pub fn ids(&self, config: &TargetConfig, text: Option<&Text>, stop: &[String]) -> Result<StopIds> {
        let mut stops = if self.ignore_eos { StopIds::default() } else { stop_ids(config, text) };
        stops.add_chosen(&self.stop_id, "--stop-id", config.vocab)?;
        for id in stop.iter().filter_map(|stop| text?.special_id(stop)) {
            stops.add(id, "--stop");
        }
        Ok(stops)
    }
}
