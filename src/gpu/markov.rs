//! The Markov head of DSpark drafters on a device: the launches that correct the logits of one depth of the
//! blocks by the tokens drafted before it.

use crate::checkpoint::drafter::Markov as Plan;
use crate::gpu::device::{Buffer, Device};
use crate::gpu::kernels::RowStep;
use crate::gpu::kernels::head::Head;
use crate::gpu::kernels::linear::{Input, Shape, Workspace};
use crate::gpu::kernels::markov::{Confidence, DraftedRows, Markov};
use crate::gpu::loader::{Loader, PackedRows};
use crate::gpu::model::LmHead;
use crate::{Error, Result};

/// The weights of a Markov head of rank r and of its confidence head.
pub struct MarkovHead {
    plan: Plan,
    table: Buffer,                          // [vocab][r] bf16: of the token before
    bias: Buffer,                           // packed [outputs][r]
    joint: Option<(Shape, Buffer, Buffer)>, // shape, packed weights, and bias [shape.n] f32
    confidence: Option<[Buffer; 2]>,        // weights [hidden] or [hidden + r] f32, and bias [1] f32
    hidden: usize,
    vocab: usize,
}

/// What a walk over blocks keeps from one depth to the next, and its scratch memory.
pub struct WalkBuffers {
    input: Buffer,  // [sequences][inputs] bf16
    joint: Buffer,  // [sequences][joint.n] f32
    unused: Buffer, // [sequences][blocks of the joint layer] u64: its best logits
    latent: Buffer, // [sequences][r] bf16
    state: Buffer,  // [sequences][r] f32
    /// `[sequences][block]` f32: the confidence of each draft, from row 1 on.
    pub confidence: Buffer,
    /// `[sequences]` u32: the rows of a block that are verified at most, the anchor's included; `None`: all.
    pub kept: Option<Buffer>,
    linear: Workspace,
}

/// The drafter's rows, which a walk corrects: `[sequences][block]` each.
pub struct WalkRows<'a> {
    /// Sequences that take part.
    pub sequences: usize,
    /// Rows of a block.
    pub block: usize,
    /// The rows and what was drafted from those before.
    pub rows: DraftedRows<'a>,
    /// `[vocab]` f32.
    pub logits: &'a Buffer,
    /// `[sequences]` [`crate::gpu::kernels::round::Sequence`].
    pub states: &'a Buffer,
    /// As [`crate::gpu::model::Pass::num_active`].
    pub num_active: &'a Buffer,
}

impl MarkovHead {
    /// Allocates the weights and lists them in `loader`. `head`: the LM head whose logits it corrects.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a rank that the kernels do not support; otherwise as [`Loader::packed`].
    pub fn load(loader: &mut Loader, plan: Plan, hidden: usize, head: &LmHead) -> Result<MarkovHead> {
        let (rank, vocab) = (plan.rank, head.vocab);
        if !rank.is_multiple_of(32) {
            return Err(Error::Unsupported(format!(
                "the kernels cannot run this drafter: markov_rank is {rank}, expected a multiple of 32"
            )));
        }
        let first = PackedRows::From(0);
        let mut packed = |name: &str, shape: Shape| loader.packed(shape, &[(name.into(), shape.n, first)]);
        let bias = packed("markov_head.markov_w2.weight", Shape { n: head.shape.n, k: rank })?;
        let joint = match plan.joint(hidden) {
            Some((name, n, k)) => {
                let weights = packed(&format!("{name}.weight"), Shape { n, k })?;
                Some((Shape { n, k }, weights, loader.vector(&format!("{name}.bias"), n)?))
            }
            None => None,
        };
        let confidence = match plan.confidence(hidden) {
            Some((name, _, inputs)) => Some([
                loader.tensor(&format!("{name}.weight"), &[1, inputs])?,
                loader.vector(&format!("{name}.bias"), 1)?,
            ]),
            None => None,
        };
        let table = loader.table("markov_head.markov_w1.weight", vocab, rank)?;
        Ok(MarkovHead { plan, table, bias, joint, confidence, hidden, vocab })
    }

    /// Allocates the memory for walks over `block` rows of up to `sequences` sequences.
    ///
    /// # Errors
    /// [`Error::Memory`] if the device has too little memory.
    pub fn buffers(
        &self,
        device: &dyn Device,
        head: &LmHead,
        sequences: usize,
        block: usize,
    ) -> Result<WalkBuffers> {
        let joint = self.joint.as_ref().map(|(shape, ..)| *shape);
        let bias = Shape { n: head.shape.n, k: self.plan.rank };
        let launches: Vec<_> = joint.into_iter().chain([bias]).map(|shape| (shape, sequences)).collect();
        let get = |bytes: usize| device.allocate(sequences * bytes.max(1), "the Markov head's activations");
        let state = get(self.plan.rank * 4)?;
        device.fill(&state, 0)?;
        Ok(WalkBuffers {
            input: get(self.markov(1, block, head).inputs() * 2)?,
            joint: get(joint.map_or(0, |shape| shape.n * 4))?,
            unused: get(joint.map_or(0, |shape| shape.blocks() * 8))?,
            latent: get(self.plan.rank * 2)?,
            state,
            confidence: get(block * 4)?,
            kept: self.confidence.as_ref().map(|_| get(4)).transpose()?,
            linear: Workspace::new(device, &launches)?,
        })
    }

    fn markov(&self, sequences: usize, block: usize, head: &LmHead) -> Markov {
        let (kind, rank) = (self.plan.kind, self.plan.rank);
        let (hidden, vocab, blocks) = (self.hidden, self.vocab, head.shape.blocks());
        Markov { kind, rank, hidden, vocab, sequences, block, blocks }
    }

    /// Corrects the logits of row `depth` of each block, and their best ones, by the token before: the
    /// anchor, the draft of row `depth - 1`, or in a tree the best token of that row. Depths come in order,
    /// from 1 on.
    ///
    /// # Errors
    /// The device's error.
    pub fn step(
        &self,
        device: &dyn Device,
        depth: usize,
        w: &WalkBuffers,
        head: &LmHead,
        of: &WalkRows<'_>,
    ) -> Result<()> {
        let WalkRows { sequences, block, rows, .. } = *of;
        let markov = self.markov(sequences, block, head);
        let confidence = self.confidence.as_ref().zip(w.kept.as_ref()).map(|([weights, bias], kept)| {
            let out = &w.confidence;
            Confidence { weights, bias, out, kept }
        });
        markov.input(device, depth, &w.input, &self.table, &w.state, rows, of.states, confidence)?;
        let input = |weights, x| Input {
            weights,
            x,
            sumsq: None,
            eps: 0.0,
            prefill_kernel: None,
            num_active: Some(of.num_active),
            workspace: &w.linear,
        };
        let product =
            |Shape { n, k }| Head { rows: sequences, vocab: n, k, multiplier: 1.0, softcap: None, ids: n };
        let mut latent = &w.input;
        if let Some((shape, weights, bias)) = &self.joint {
            product(*shape).launch(device, &input(weights, &w.input), &w.unused, Some(&w.joint), None)?;
            latent = &w.latent;
            markov.latent(device, depth, latent, &w.state, &w.input, &w.joint, bias)?;
        }
        let to = RowStep { first: depth, step: block };
        product(Shape { n: head.shape.n, k: self.plan.rank }).add(
            device,
            &input(&self.bias, latent),
            rows.best,
            of.logits,
            head.target_ids(),
            to,
        )
    }
}
