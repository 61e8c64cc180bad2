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
    /// Where the text in `held` begins that may still be withdrawn. It counts for stop strings, but it is not
    /// released.
    provisional: Option<usize>,
    stopped: bool,
}

impl StopStrings {
    /// An empty text. No stop string may be empty.
    pub(crate) fn new(stops: Vec<String>) -> StopStrings {
        StopStrings { stops, held: String::new(), provisional: None, stopped: false }
    }

    /// Whether a stop string is complete. Text that is pushed after that is dropped.
    pub(crate) fn stopped(&self) -> bool {
        self.stopped
    }

    /// Ends the text where it is, and drops nothing.
    pub(crate) fn stop(&mut self) {
        self.stopped = true;
    }

    /// Appends text. If a stop string is then complete, cuts the text before it.
    pub(crate) fn push(&mut self, text: &str) {
        if self.stopped {
            return;
        }
        // A stop string that is complete now ends in the new text.
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let mut from = self.held.len().saturating_sub(longest);
        while !self.held.is_char_boundary(from) {
            from -= 1;
        }
        self.held += text;
        let ends =
            self.stops.iter().filter_map(|stop| Some((from + self.held[from..].find(stop)?, stop.len())));
        if let Some((_, start)) = ends.map(|(start, len)| (start + len, start)).min() {
            self.held.truncate(start);
            self.stopped = true;
        }
    }

    /// Makes the text that follows provisional, until [`StopStrings::keep`] or [`StopStrings::withdraw`].
    pub(crate) fn begin_provisional(&mut self) {
        self.provisional = Some(self.held.len());
    }

    /// Makes the provisional text final.
    pub(crate) fn keep(&mut self) {
        self.provisional = None;
    }

    /// Drops the provisional text.
    pub(crate) fn withdraw(&mut self) {
        if let Some(start) = self.provisional.take() {
            self.held.truncate(start);
        }
    }

    /// Removes and returns the text that cannot be part of a stop string.
    pub(crate) fn release(&mut self) -> String {
        if self.stopped {
            return std::mem::take(&mut self.held);
        }
        let begins_a_stop = |tail: &str| self.stops.iter().any(|stop| stop.starts_with(tail));
        let end = self.provisional.unwrap_or(self.held.len());
        let text = &self.held[..end];
        let keep_from =
            text.char_indices().map(|(at, _)| at).find(|at| begins_a_stop(&text[*at..])).unwrap_or(end);
        self.provisional = self.provisional.map(|start| start - keep_from);
        let kept = self.held.split_off(keep_from);
        std::mem::replace(&mut self.held, kept)
    }

    /// Ends the text and returns what was held back.
    pub(crate) fn finish(self) -> String {
        self.held
    }
}
