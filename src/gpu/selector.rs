//! The candidate selector of DFlash2 drafters on a device: the launches that choose the drafts of a block among the
//! best tokens of each row.

use crate::checkpoint::drafter::Selector as Plan;
use crate::gpu::device::{Buffer, Device};
use crate::gpu::kernels::head::Head;
use crate::gpu::kernels::linear::{Input, Shape, Workspace};
use crate::gpu::kernels::selector::{Codebooks, MAX_CANDIDATES, Selector as Kernels, SelectorRows};
use crate::gpu::loader::{Loader, PackedRows};
use crate::gpu::model::LmHead;
use crate::{Error, Result};
use std::ops::Range;

/// The weights of a selector of rank r.
pub struct Selector {
    plan: Plan,
    projection: Buffer,  // packed [r][hidden]
    predecessor: Buffer, // [vocab][r] bf16
    successor: Buffer,   // [vocab][r] bf16
    hidden: usize,
    vocab: usize,
}

/// What a selector keeps from round to round, and its scratch memory. `rows` = sequences x block.
pub struct SelectorBuffers {
    candidates: Buffer, // [rows][k] u32
    logits: Buffer,     // [rows][k] f32
    weights: Buffer,    // [rows][r] f32: the projected rows
    unused: Buffer,     // [rows][blocks of the projection] u64: its best outputs
    /// `[rows]` u64: the best score of each row.
    pub best: Buffer,
    linear: Workspace,
}

/// The rows of the drafter's blocks, `[sequences][block]` each.
pub struct SelectedRows<'a> {
    /// Sequences that take part.
    pub sequences: usize,
    /// Rows of a block.
    pub block: usize,
    /// `[hidden]` bf16: the input of the LM head.
    pub y: &'a Buffer,
    /// `[ceil(hidden / 128)]` f32: its partial sums of squares.
    pub sumsq: &'a Buffer,
    /// Epsilon of the final norm.
    pub eps: f32,
    /// `Row`: the sequence of each row.
    pub table: &'a Buffer,
    /// `[vocab]` f32: the logits.
    pub logits: &'a Buffer,
    /// `[blocks of the LM head]` u64: the best logits.
    pub best: &'a Buffer,
    /// `[vocab]` f32: -inf before the first round, and kept between rounds.
    pub scores: &'a Buffer,
    /// u32.
    pub drafts: &'a Buffer,
    /// `[sequences]` [`crate::gpu::kernels::round::Sequence`].
    pub states: &'a Buffer,
    /// As [`crate::gpu::model::Pass::num_active`].
    pub num_active: &'a Buffer,
}

impl Selector {
    /// Allocates the weights and lists them in `loader`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a rank or a number of candidates that the kernels do not support; otherwise as
    /// [`Loader::packed`].
    pub fn load(loader: &mut Loader, plan: Plan, hidden: usize, vocab: usize) -> Result<Selector> {
        let most = format!("at most {MAX_CANDIDATES}");
        for (holds, field, found, expected) in [
            (plan.rank.is_multiple_of(32), "selector_rank", plan.rank, "a multiple of 32"),
            (plan.candidates <= MAX_CANDIDATES, "selector_top_k", plan.candidates, &most),
        ] {
            if !holds {
                return Err(Error::Unsupported(format!(
                    "the kernels cannot run this drafter: {field} is {found}, expected {expected}"
                )));
            }
        }
        let [(projection, _), (predecessor, _), (successor, _)] = plan.tensors(hidden, vocab);
        let shape = Shape { n: plan.rank, k: hidden };
        Ok(Selector {
            plan,
            projection: loader.packed(shape, &[(projection, shape.n, PackedRows::From(0))])?,
            predecessor: loader.table(&predecessor, vocab, plan.rank)?,
            successor: loader.table(&successor, vocab, plan.rank)?,
            hidden,
            vocab,
        })
    }

    fn projection(&self, rows: usize) -> Head {
        let (n, k) = (self.plan.rank, self.hidden);
        Head { rows, vocab: n, k, multiplier: 1.0, softcap: None, ids: n }
    }

    /// Allocates the memory for blocks of `block` rows of up to `sequences` sequences.
    ///
    /// # Errors
    /// [`Error::Memory`] if the device has too little memory.
    pub fn buffers(&self, device: &dyn Device, sequences: usize, block: usize) -> Result<SelectorBuffers> {
        let (Plan { rank, candidates }, rows) = (self.plan, sequences * block);
        let get = |bytes: usize| device.allocate(rows * bytes, "the candidate selector's rows");
        let shape = self.projection(rows).shape();
        let buffers = SelectorBuffers {
            candidates: get(candidates * 4)?,
            logits: get(candidates * 4)?,
            weights: get(rank * 4)?,
            unused: get(shape.blocks() * 8)?,
            best: get(8)?,
            linear: Workspace::new(device, &[(shape, rows)])?,
        };
        device.fill(&buffers.candidates, 0xff)?;
        device.fill(&buffers.best, 0)?;
        Ok(buffers)
    }

    fn kernels(&self, head: &LmHead, of: &SelectedRows<'_>) -> Kernels {
        let (Plan { rank, candidates }, SelectedRows { sequences, block, .. }) = (self.plan, of);
        let (sequences, block, blocks) = (*sequences, *block, head.shape.blocks());
        Kernels { sequences, block, vocab: self.vocab, blocks, candidates, rank }
    }

    fn codebooks(&self) -> Codebooks<'_> {
        Codebooks { predecessor: &self.predecessor, successor: &self.successor }
    }

    /// Projects the rows and finds their candidates.
    ///
    /// # Errors
    /// The device's error.
    pub fn find(
        &self,
        device: &dyn Device,
        b: &SelectorBuffers,
        head: &LmHead,
        of: &SelectedRows<'_>,
    ) -> Result<()> {
        let input = Input {
            weights: &self.projection,
            x: of.y,
            sumsq: Some(of.sumsq),
            eps: of.eps,
            prefill_kernel: None,
            num_active: Some(of.num_active),
            workspace: &b.linear,
        };
        let projection = self.projection(of.sequences * of.block);
        projection.launch(device, &input, &b.unused, Some(&b.weights), None)?;
        let rows = b.rows(of.scores);
        self.kernels(head, of).find(device, rows, of.best, of.logits, of.table, self.codebooks())
    }

    /// Scores the candidates of these `depths` and drafts the best one of each. Depths come in order, from 1 on. For
    /// drafts that are sampled after a depth, a call has one depth.
    ///
    /// # Errors
    /// The device's error.
    pub fn walk(
        &self,
        device: &dyn Device,
        depths: Range<usize>,
        b: &SelectorBuffers,
        head: &LmHead,
        of: &SelectedRows<'_>,
    ) -> Result<()> {
        let (kernels, rows, codebooks) = (self.kernels(head, of), b.rows(of.scores), self.codebooks());
        kernels.walk(device, depths, rows, &b.best, of.drafts, &b.weights, codebooks, of.states)
    }
}

impl SelectorBuffers {
    fn rows<'a>(&'a self, scores: &'a Buffer) -> SelectorRows<'a> {
        SelectorRows { candidates: &self.candidates, logits: &self.logits, scores }
    }
}
