//! Stop strings: ends a text that grows piece by piece before the first stop string in it, and holds back
//! text that may turn out to begin one.

/// A growing text and its stop strings.
///
/// The stop string that is complete first wins; of several complete at the same character, the longest. The
/// cost of a piece depends on its length and that of the stop strings, not on the length of the text.
pub(crate) struct StopStrings {
    stops: Vec<String>,
    /// Text that may begin a stop string and is not released yet.
    held: String,
    stopped: bool,
}

impl StopStrings {
    /// An empty text. None of the `stops` is empty.
    pub(crate) fn new(stops: Vec<String>) -> StopStrings {
        StopStrings { stops, held: String::new(), stopped: false }
    }

    /// Whether a stop string was completed. Text pushed after that is dropped.
    pub(crate) fn stopped(&self) -> bool {
        self.stopped
    }

    /// Appends text, and cuts it before the first stop string that is complete.
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

    /// Takes the text that cannot be part of a stop string any more.
    pub(crate) fn release(&mut self) -> String {
        let begins_a_stop = |tail: &str| self.stops.iter().any(|stop| stop.starts_with(tail));
        let keep_from = match self.stopped {
            true => None,
            false => self.held.char_indices().map(|(at, _)| at).find(|at| begins_a_stop(&self.held[*at..])),
        };
        let kept = self.held.split_off(keep_from.unwrap_or(self.held.len()));
        std::mem::replace(&mut self.held, kept)
    }

    /// The text that was held back; the text is over.
    pub(crate) fn finish(self) -> String {
        self.held
    }
}
