//! Stop strings: ends a streamed text before the first stop string in it, and holds back text that may be the
//! beginning of one.

/// A streamed text and its stop strings.
///
/// The text ends at the stop string that is complete first, or at the longest of several that are complete at
/// the same character. The cost of appending depends on the lengths of the appended text and of the stop
/// strings, not on the length of the whole text.
pub(crate) struct StopStrings {
    stops: Vec<String>,
    /// Text that may begin a stop string and is not released yet.
    held: String,
    stopped: bool,
}

impl StopStrings {
    /// An empty text. No stop string may be empty.
    pub(crate) fn new(stops: Vec<String>) -> StopStrings {
        StopStrings { stops, held: String::new(), stopped: false }
    }

    /// Whether a stop string is complete. Text that is pushed after that is dropped.
    pub(crate) fn stopped(&self) -> bool {
        self.stopped
    }

    /// Appends text. If a stop string is then complete, cuts the text before it.
    pub(crate) fn push(&mut self, text: &str) {
        if self.stopped {
            return;
        }
        self.held += text;
        let ends = self.stops.iter().filter_map(|stop| Some((self.held.find(stop)?, stop.len())));
        if let Some((_, start)) = ends.map(|(start, len)| (start + len, start)).min() {
            self.held.truncate(start);
            self.stopped = true;
        }
    }

    /// Removes and returns the text that cannot be part of a stop string.
    pub(crate) fn release(&mut self) -> String {
        let begins_a_stop = |tail: &str| self.stops.iter().any(|stop| stop.starts_with(tail));
        let keep_from = match self.stopped {
            true => None,
            false => self.held.char_indices().map(|(at, _)| at).find(|at| begins_a_stop(&self.held[*at..])),
        };
        let kept = self.held.split_off(keep_from.unwrap_or(self.held.len()));
        std::mem::replace(&mut self.held, kept)
    }

    /// Ends the text and returns what was held back.
    pub(crate) fn finish(self) -> String {
        self.held
    }
}
