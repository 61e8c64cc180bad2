//! The Markov head and the confidence head of DSpark drafters in plain f32 (arXiv 2607.05147): a walk over
//! the rows of a block that corrects each row's logits by the token drafted before it.

use crate::Result;
use crate::checkpoint::drafter::{Markov, MarkovKind};
use crate::checkpoint::safetensors::Checkpoint;
use crate::cpu::ops::{self, Matrix};

/// The weights of both heads. `r` is the rank.
pub struct MarkovHead {
    kind: MarkovKind,
    previous: Matrix,                       // [vocab][r]: of the token before
    bias: Matrix,                           // [outputs][r]
    joint: Option<(Matrix, Vec<f32>)>,      // gated: [r][hidden + r]; rnn: [3 r][2 r + hidden]; and its bias
    confidence: Option<(Matrix, Vec<f32>)>, // [1][hidden] or [1][hidden + r], and its bias
}

impl MarkovHead {
    /// Builds the heads of a drafter of this hidden size, `vocab` tokens, and `outputs` rows of its LM head.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`].
    pub fn load(
        file: &Checkpoint,
        plan: Markov,
        hidden: usize,
        vocab: usize,
        outputs: usize,
    ) -> Result<MarkovHead> {
        let matrix = |(name, shape): (String, Vec<usize>)| {
            Ok::<_, crate::Error>(Matrix::new(file.tensor(&name, &shape)?))
        };
        let with_bias = |(name, rows, cols): (&str, usize, usize)| {
            let weights = matrix((format!("{name}.weight"), vec![rows, cols]))?;
            Ok::<_, crate::Error>((weights, ops::to_f32(&file.tensor(&format!("{name}.bias"), &[rows])?)))
        };
        let r = plan.rank;
        Ok(MarkovHead {
            kind: plan.kind,
            previous: matrix(("markov_head.markov_w1.weight".into(), vec![vocab, r]))?,
            bias: matrix(("markov_head.markov_w2.weight".into(), vec![outputs, r]))?,
            joint: plan.joint(hidden).map(with_bias).transpose()?,
            confidence: plan.confidence(hidden).map(with_bias).transpose()?,
        })
    }

    /// A walk that begins after the anchor.
    pub fn walk(&self, anchor: u32) -> Walk<'_> {
        let mut walk = Walk { head: self, state: vec![0.0; self.previous.cols], embedding: vec![] };
        walk.follow(anchor);
        walk
    }
}

/// The state of a walk: the token before the next row, and the state of an rnn.
pub struct Walk<'a> {
    head: &'a MarkovHead,
    state: Vec<f32>,     // [r]
    embedding: Vec<f32>, // [r]: of the token before
}

impl Walk<'_> {
    /// The bias on the logits of the next row, `[outputs]`, from that row after the final norm, `[hidden]`.
    pub fn bias(&mut self, hidden: &[f32]) -> Vec<f32> {
        let (head, r) = (self.head, self.state.len());
        let joined = |joint: &(Matrix, Vec<f32>), inputs: &[&[f32]]| {
            let mut out = Vec::new();
            ops::linear(&inputs.concat(), 1, [(&joint.0, &mut out)]);
            ops::add(&mut out, &joint.1);
            out
        };
        let latent = match (head.kind, &head.joint) {
            (MarkovKind::Gated, Some(joint)) => {
                let gates = joined(joint, &[hidden, &self.embedding]);
                gates.iter().zip(&self.embedding).map(|(gate, x)| sigmoid(*gate) * x).collect()
            }
            (MarkovKind::Rnn, Some(joint)) => {
                let z = joined(joint, &[&self.state, &self.embedding, hidden]);
                for (i, state) in self.state.iter_mut().enumerate() {
                    let keep = sigmoid(z[i]);
                    *state = keep * *state + (1.0 - keep) * z[r + i].tanh();
                }
                z[2 * r..].iter().map(|x| x.tanh()).collect()
            }
            _ => self.embedding.clone(),
        };
        let mut bias = Vec::new();
        ops::linear(&latent, 1, [(&head.bias, &mut bias)]);
        bias
    }

    /// The estimated probability that the draft of the next row is accepted if those before it are; `None`
    /// without a confidence head. It does not depend on that draft.
    pub fn confidence(&self, hidden: &[f32]) -> Option<f32> {
        let (weights, bias) = self.head.confidence.as_ref()?;
        let input = [hidden, &self.embedding].concat();
        let mut out = Vec::new();
        ops::linear(&input[..weights.cols], 1, [(weights, &mut out)]);
        Some(sigmoid(out[0] + bias[0]))
    }

    /// Continues after `token`, the draft of the row.
    pub fn follow(&mut self, token: u32) {
        self.embedding.resize(self.state.len(), 0.0);
        self.head.previous.row(token as usize, 1.0, &mut self.embedding);
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}
