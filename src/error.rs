//! The error type, its exit codes, [`Result`], and functions that make untrusted text safe for errors.

/// Everything that can go wrong. Each error is one sentence that says what is wrong, what was found and what
/// was expected. The variant decides the exit code of the command-line programs.
///
/// ```
/// use dflash::{Error, Models, Engine};
///
/// let error = Engine::open(Models::folders("no/such/folder", "nor/this")).err().unwrap();
/// assert!(matches!(error, Error::Model(_)));
/// assert_eq!(error.to_string(), "no/such/folder does not exist: expected a Hugging Face model folder");
/// ```
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// A bug, or an I/O failure that no other variant covers. Exit code 1.
    #[error("{0}")]
    Internal(String),
    /// An argument or an input text is wrong. Exit code 2.
    #[error("{0}")]
    Usage(String),
    /// A named option has an invalid value. Exit code 2. Options are fields of [`Params`](crate::Params),
    /// [`EngineOptions`](crate::EngineOptions) and the types in them; the command-line programs print the
    /// flag instead of the name.
    #[error("{name} {problem}")]
    Option {
        /// The option's name: `context`, `top_p`, ...
        name: &'static str,
        /// The rest of the sentence: `is 3, expected more than 0 and at most 1`.
        problem: String,
    },
    /// A model file is missing or malformed, or two files contradict each other. Exit code 3.
    #[error("{0}")]
    Model(String),
    /// The input is valid, but this engine does not support the model, device or option. Exit code 4.
    #[error("{0}")]
    Unsupported(String),
    /// Not enough memory. The sentence says how much is needed and for what. Exit code 5.
    #[error("{0}")]
    Memory(String),
    /// Speculative decoding and autoregressive decoding gave different output. Exit code 6.
    #[error("{0}")]
    Lossless(String),
}

impl Error {
    /// Makes an [`Error::Option`]. Its sentence is `name`, a space and `problem`.
    pub fn option(name: &'static str, problem: impl Into<String>) -> Error {
        Error::Option { name, problem: problem.into() }
    }

    /// The exit code of the command-line programs for this variant.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Internal(_) => 1,
            Error::Usage(_) | Error::Option { .. } => 2,
            Error::Model(_) => 3,
            Error::Unsupported(_) => 4,
            Error::Memory(_) => 5,
            Error::Lossless(_) => 6,
        }
    }
}

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Text from an untrusted file, for an error: control characters are escaped, and it is cut after 100
/// characters.
pub(crate) fn excerpt(text: &str) -> String {
    const LONGEST: usize = 100;
    let mut line = String::new();
    for c in text.chars().take(LONGEST) {
        match c {
            '"' | '\'' | '\\' => line.push(c),
            c => line.extend(c.escape_debug()),
        }
    }
    if text.chars().nth(LONGEST).is_some() {
        line.push_str("...");
    }
    line
}

/// A message of another library, for an error: it is put on one line, control characters are escaped, and it
/// is cut after about 400 bytes. Such messages may span lines and quote whole files.
pub(crate) fn one_line(message: &str) -> String {
    const LONGEST: usize = 400;
    let mut line = String::new();
    for word in message.split_whitespace() {
        if !line.is_empty() {
            line.push(' ');
        }
        for c in word.chars() {
            match c.is_control() {
                true => line.extend(c.escape_default()),
                false => line.push(c),
            }
            if line.len() > LONGEST {
                return line + " ...";
            }
        }
    }
    line
}
