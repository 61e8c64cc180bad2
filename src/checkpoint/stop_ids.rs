//! The token ids that end an answer, and what names each of them.

use crate::{Error, Result};
use std::fmt;

/// Token ids that end an answer. Each has its sources: the files or options that name it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StopIds(Vec<(u32, Vec<String>)>);

impl StopIds {
    /// Adds an id that `source` names.
    pub fn add(&mut self, id: u32, source: &str) {
        match self.0.iter_mut().find(|(known, _)| *known == id) {
            None => self.0.push((id, vec![source.into()])),
            Some((_, sources)) if sources.iter().any(|known| known == source) => {}
            Some((_, sources)) => sources.push(source.into()),
        }
    }

    /// Adds ids that the caller chose in the option or flag `source`, for a target with `vocab` tokens.
    ///
    /// # Errors
    /// [`Error::Option`] for an id that the target does not have.
    pub fn add_chosen(&mut self, ids: &[u32], source: &str, vocab: usize) -> Result<()> {
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
            let problem = format!("is {id}, expected a token id of the target, from 0 to {}", vocab - 1);
            return Err(Error::option("stop_ids", problem));
        }
        ids.iter().for_each(|id| self.add(*id, source));
        Ok(())
    }

    /// The ids, each once, in the order in which they were added.
    pub fn ids(&self) -> Vec<u32> {
        self.0.iter().map(|(id, _)| *id).collect()
    }
}

/// The ids with their sources: `7 (generation_config.json, config.json), 5 (--stop-id)`, or `none`.
impl fmt::Display for StopIds {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let one = |(id, sources): &(u32, Vec<String>)| format!("{id} ({})", sources.join(", "));
        match self.0.is_empty() {
            true => f.write_str("none"),
            false => f.write_str(&self.0.iter().map(one).collect::<Vec<_>>().join(", ")),
        }
    }
}
