//! Helpers of all launchers: they check arguments and put them into a list.

use super::RowStep;
use crate::gpu::device::{Arg, Buffer};
use crate::{Error, Result};
use std::fmt::Display;

/// Refuses arguments that the named kernel cannot take.
pub(super) struct Check(pub &'static str);

impl Check {
    /// Requires `bytes` bytes.
    pub fn at_least(&self, what: &str, buffer: &Buffer, bytes: usize) -> Result<()> {
        if buffer.bytes() >= bytes {
            return Ok(());
        }
        Err(self.error(format_args!("{what} has {} bytes, needs {bytes}", buffer.bytes())))
    }

    /// Requires `bytes` bytes and an address that is a multiple of 16, for buffers that a kernel accesses 16
    /// bytes at a time. The check is needed because a slice may begin anywhere.
    pub fn aligned(&self, what: &str, buffer: &Buffer, bytes: usize) -> Result<()> {
        self.at_least(what, buffer, bytes)?;
        let address = buffer.address();
        if address.is_multiple_of(16) {
            return Ok(());
        }
        Err(self.error(format_args!("{what} at {address:#x}, not a multiple of 16 bytes")))
    }

    /// As [`Check::aligned`], if there is a buffer.
    pub fn optional(&self, what: &str, buffer: Option<&Buffer>, bytes: usize) -> Result<()> {
        buffer.map_or(Ok(()), |buffer| self.aligned(what, buffer, bytes))
    }

    /// Requires that a condition holds. The error says what was found and what was expected.
    pub fn that(&self, holds: bool, found: impl Display, expected: impl Display) -> Result<()> {
        if holds { Ok(()) } else { Err(self.error(format_args!("{found}; expected {expected}"))) }
    }

    /// The limits of all kernels that work on blocks of rows: 1 to 1024 sequences, 1 to 64 rows of each.
    pub fn blocks(&self, sequences: usize, rows: usize) -> Result<()> {
        self.that(
            (1..=1024).contains(&sequences) && (1..=64).contains(&rows),
            format_args!("{sequences} sequences in blocks of {rows} rows"),
            "1 to 1024 sequences in blocks of 1 to 64 rows",
        )
    }

    /// The limit of all kernels that read logits: 1 to 2^26 tokens.
    pub fn vocab(&self, vocab: usize) -> Result<()> {
        let limits = 1..=1 << 26;
        self.that(limits.contains(&vocab), format_args!("{vocab} tokens"), "1 to 2^26")
    }

    /// As [`Check::vocab`], for kernels that also read the best logit of each block of ids: 128 consecutive ids,
    /// or those of a reduced vocabulary.
    pub fn best(&self, vocab: usize, blocks: usize, reduced: bool) -> Result<()> {
        self.vocab(vocab)?;
        let all = vocab.div_ceil(128);
        self.that(
            (1..=all).contains(&blocks) && (reduced || blocks == all),
            format_args!("{vocab} tokens in {blocks} blocks"),
            "blocks of 128",
        )
    }

    /// The number of rows of a launch, of buffers with `rows` rows. Requires at least one.
    pub fn step(&self, rows: usize, RowStep { first, step }: RowStep) -> Result<u32> {
        let expected = "at least one row";
        self.that(
            first < rows && step > 0,
            format_args!("{rows} rows from {first} in steps of {step}"),
            expected,
        )?;
        Ok((rows - first).div_ceil(step) as u32)
    }

    fn error(&self, what: impl Display) -> Error {
        Error::Internal(format!("kernel {}: {what}", self.0))
    }
}

/// The arguments of a kernel that takes pointers, followed by sizes as u32.
pub(super) fn args<'a, const N: usize>(
    buffers: impl IntoIterator<Item = &'a Buffer>,
    sizes: [usize; N],
) -> Vec<Arg> {
    buffers.into_iter().map(Arg::from).chain(u32s(sizes)).collect()
}

/// Sizes as u32 arguments. The checks keep them below 2^32.
pub(super) fn u32s<const N: usize>(sizes: [usize; N]) -> [Arg; N] {
    sizes.map(|n| Arg::U32(n as u32))
}

/// A pointer, null without a buffer.
pub(super) fn or_null(buffer: Option<&Buffer>) -> Arg {
    buffer.map_or(Arg::Null, Arg::from)
}
