//! What DFlash2 adds to a DFlash drafter, in plain f32: dynamic convolutions along the rows of a block, around
//! attention and MLP of each layer, and a selector that chooses each draft among the best tokens of its row
//! by the token drafted before it (`docs/drafters.md`).

use crate::Result;
use crate::checkpoint::drafter::{Convolution as ConvolutionPlan, Selector as SelectorPlan};
use crate::checkpoint::safetensors::Checkpoint;
use crate::cpu::ops::{self, Matrix};

/// The convolutions before and after a sublayer. They are causal along the rows of a block.
pub struct Convolution {
    plan: ConvolutionPlan,
    hidden: usize,
    base: Vec<f32>,     // [2][taps][hidden]: of the convolutions before and after
    projection: Matrix, // [2 * taps * groups][hidden]
}

impl Convolution {
    /// Reads the convolutions whose tensors begin with `prefix`.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`].
    pub fn load(
        file: &Checkpoint,
        prefix: &str,
        plan: ConvolutionPlan,
        hidden: usize,
    ) -> Result<Convolution> {
        let [(base, base_shape), (projection, shape)] = plan.tensors(prefix, hidden);
        Ok(Convolution {
            plan,
            hidden,
            base: ops::to_f32(&file.tensor(&base, &base_shape)?),
            projection: Matrix::new(file.tensor(&projection, &shape)?),
        })
    }

    /// Convolves the normed input of the sublayer, `y` `[rows][hidden]`, in place. Returns the part of both
    /// kernels that depends on the rows, `[rows][2][taps][groups]`, computed from `y` as it was.
    pub fn before(&self, y: &mut [f32]) -> Vec<f32> {
        let mut dynamic = Vec::new();
        ops::linear(y, y.len() / self.hidden, [(&self.projection, &mut dynamic)]);
        self.apply(&dynamic, 0, y);
        dynamic
    }

    /// Convolves the output of the sublayer, `z` `[rows][hidden]`, in place.
    pub fn after(&self, dynamic: &[f32], z: &mut [f32]) {
        self.apply(dynamic, 1, z);
    }

    /// Row `t` becomes the sum over taps `o` of `(base + dynamic[t])[side][o]` times row `t - o`.
    fn apply(&self, dynamic: &[f32], side: usize, x: &mut [f32]) {
        let (ConvolutionPlan { taps, group }, hidden) = (self.plan, self.hidden);
        let groups = hidden / group;
        // From the last row to the first, because a row reads those before it.
        for t in (0..x.len() / hidden).rev() {
            for c in 0..hidden {
                let tap = |o: usize| {
                    let base = self.base[(side * taps + o) * hidden + c];
                    let own = dynamic[((t * 2 + side) * taps + o) * groups + c / group];
                    (base + own) * x[(t - o) * hidden + c]
                };
                x[t * hidden + c] = (0..taps.min(t + 1)).map(tap).sum();
            }
        }
    }
}

/// The candidate selector.
pub struct Selector {
    candidates: usize,
    projection: Matrix,  // [rank][hidden]
    predecessor: Matrix, // [vocab][rank]
    successor: Matrix,   // [vocab][rank]
}

impl Selector {
    /// Reads the selector of a drafter of this hidden size and vocabulary.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`].
    pub fn load(file: &Checkpoint, plan: SelectorPlan, hidden: usize, vocab: usize) -> Result<Selector> {
        let matrix = |(name, shape): &(String, Vec<usize>)| {
            Ok::<_, crate::Error>(Matrix::new(file.tensor(name, shape)?))
        };
        let [projection, predecessor, successor] = &plan.tensors(hidden, vocab);
        Ok(Selector {
            candidates: plan.candidates,
            projection: matrix(projection)?,
            predecessor: matrix(predecessor)?,
            successor: matrix(successor)?,
        })
    }

    /// Leaves the best tokens of a row its candidates: replaces their `logits` `[vocab]` by their scores after
    /// the token `previous`, and all others by -inf. Of equal logits the lower ids are candidates. `hidden`:
    /// the row after the final norm.
    pub fn select(&self, previous: u32, hidden: &[f32], logits: &mut [f32]) {
        let mut weights = Vec::new();
        ops::linear(hidden, 1, [(&self.projection, &mut weights)]);
        let mut code = vec![0.0; weights.len()];
        self.predecessor.row(previous as usize, 1.0, &mut code);
        weights.iter_mut().zip(&code).for_each(|(weight, x)| *weight *= x);

        let mut ids: Vec<usize> = (0..logits.len()).collect();
        let count = self.candidates.min(ids.len());
        // The addition makes zeros of both signs equal.
        let order = |&a: &usize, &b: &usize| (logits[b] + 0.0).total_cmp(&(logits[a] + 0.0)).then(a.cmp(&b));
        ids.select_nth_unstable_by(count - 1, order);
        let mut score = |id: usize| {
            self.successor.row(id, 1.0, &mut code);
            logits[id] + weights.iter().zip(&code).map(|(weight, x)| weight * x).sum::<f32>()
        };
        let scores: Vec<f32> = ids[..count].iter().map(|&id| score(id)).collect();
        logits.fill(f32::NEG_INFINITY);
        ids.iter().zip(scores).for_each(|(&id, score)| logits[id] = score);
    }
}
