//! The one error type, its exit codes, and [`Result`].

/// Everything that can go wrong, as one sentence that names the file, field or flag, what was found and what was
/// expected. The kind decides the exit code of the binaries.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// A bug or an I/O failure that no other kind fits. Exit code 1.
    #[error("{0}")]
    Internal(String),
    /// A flag, an argument or an input text is wrong. Exit code 2.
    #[error("{0}")]
    Usage(String),
    /// A model file is missing or malformed, or two files contradict each other. Exit code 3.
    #[error("{0}")]
    Model(String),
    /// The file is fine, but this engine does not run such a model, device or option. Exit code 4.
    #[error("{0}")]
    Unsupported(String),
    /// Not enough memory: says how much is needed and for what. Exit code 5.
    #[error("{0}")]
    Memory(String),
    /// Speculative output differed from plain output. Exit code 6.
    #[error("{0}")]
    Lossless(String),
}

impl Error {
    /// The documented exit code of the binaries for this kind.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Internal(_) => 1,
            Error::Usage(_) => 2,
            Error::Model(_) => 3,
            Error::Unsupported(_) => 4,
            Error::Memory(_) => 5,
            Error::Lossless(_) => 6,
        }
    }
}

/// What every fallible function of this crate returns.
pub type Result<T> = std::result::Result<T, Error>;
