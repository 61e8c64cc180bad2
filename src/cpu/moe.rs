//! MLPs of a layer: dense, or a mixture of experts (MoE) in which each row chooses some of many.

use crate::Result;
use crate::checkpoint::config::Stack;
use crate::checkpoint::moe::Moe as Shape;
use crate::checkpoint::safetensors::Checkpoint;
use crate::cpu::delta_net::sigmoid;
use crate::cpu::layer::{Probe, Scratch, matrix};
use crate::cpu::ops::{self, Matrix};

/// `(silu(y Wgate^T) * (y Wup^T)) Wdown^T`: a dense MLP, or one expert.
pub(super) struct Mlp {
    gate: Matrix, // [intermediate][hidden]
    up: Matrix,   // [intermediate][hidden]
    down: Matrix, // [hidden][intermediate]
}

impl Mlp {
    /// Reads the tensors whose names begin with `prefix`.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`].
    pub(super) fn load(file: &Checkpoint, prefix: &str, hidden: usize, intermediate: usize) -> Result<Mlp> {
        let matrix = |name: &str, rows, cols| matrix(file, &format!("{prefix}.{name}.weight"), rows, cols);
        Ok(Mlp {
            gate: matrix("gate_proj", intermediate, hidden)?,
            up: matrix("up_proj", intermediate, hidden)?,
            down: matrix("down_proj", hidden, intermediate)?,
        })
    }

    /// Writes the output for rows `y` to `z`, both `[rows][hidden]`.
    pub(super) fn forward(&self, y: &[f32], gate: &mut Vec<f32>, up: &mut Vec<f32>, z: &mut Vec<f32>) {
        let rows = y.len() / self.gate.cols;
        ops::linear(y, rows, [(&self.gate, gate), (&self.up, up)]);
        ops::swiglu(gate, up);
        ops::linear(gate, rows, [(&self.down, z)]);
    }
}

/// A mixture of experts.
pub(super) struct Moe {
    shape: Shape,
    router: Matrix,                // [experts][hidden]
    experts: Vec<Mlp>,             // [experts]
    shared: Option<(Mlp, Matrix)>, // the shared expert and its gate [1][hidden]
}

impl Moe {
    /// Reads the tensors whose names begin with `prefix`.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`].
    pub(super) fn load(file: &Checkpoint, prefix: &str, shape: &Shape, stack: &Stack) -> Result<Moe> {
        let hidden = stack.hidden;
        let mlp = |name: &str, width| Mlp::load(file, &format!("{prefix}.{name}"), hidden, width);
        let expert = |e: usize| mlp(&format!("experts.{e}"), shape.intermediate);
        let shared = match shape.shared {
            0 => None,
            width => {
                let gate = matrix(file, &format!("{prefix}.shared_expert_gate.weight"), 1, hidden)?;
                Some((mlp("shared_expert", width)?, gate))
            }
        };
        Ok(Moe {
            shape: shape.clone(),
            router: matrix(file, &format!("{prefix}.gate.weight"), shape.experts, hidden)?,
            experts: (0..shape.experts).map(expert).collect::<Result<_>>()?,
            shared,
        })
    }

    /// Writes the output for the rows of `s.y` to `s.z`, both `[rows][hidden]`. A row adds the outputs of its
    /// experts in ascending order, then the shared expert's, so its bits do not depend on the other rows.
    pub(super) fn forward(&self, s: &mut Scratch, probe: Probe) {
        let (hidden, chosen) = (self.router.cols, self.shape.chosen);
        let rows = s.y.len() / hidden;
        let mut logits = Vec::new();
        ops::linear(&s.y, rows, [(&self.router, &mut logits)]);
        probe("router", &logits);
        let routes: Vec<(usize, f32)> =
            logits.chunks(self.shape.experts).flat_map(|row| self.route(row)).collect(); // [rows][chosen]
        probe("experts", &routes.iter().map(|route| route.0 as f32).collect::<Vec<_>>());
        probe("weights", &routes.iter().map(|route| route.1).collect::<Vec<_>>());

        // The rows of each expert run together.
        let mut rows_of = vec![vec![]; self.shape.experts];
        for (i, (expert, weight)) in routes.iter().enumerate() {
            rows_of[*expert].push((i / chosen, *weight));
        }
        s.z.clear();
        s.z.resize(rows * hidden, 0.0);
        let (mut input, mut output) = (Vec::new(), Vec::new());
        for (expert, rows) in self.experts.iter().zip(&rows_of).filter(|(_, rows)| !rows.is_empty()) {
            input.clear();
            rows.iter().for_each(|(row, _)| input.extend_from_slice(&s.y[row * hidden..][..hidden]));
            expert.forward(&input, &mut s.gate, &mut s.up, &mut output);
            for ((row, weight), output) in rows.iter().zip(output.chunks(hidden)) {
                add_scaled(&mut s.z[row * hidden..][..hidden], *weight, output);
            }
        }
        if let Some((shared, gate)) = &self.shared {
            let mut gates = Vec::new();
            ops::linear(&s.y, rows, [(gate, &mut gates)]);
            shared.forward(&s.y, &mut s.gate, &mut s.up, &mut output);
            for ((z, output), gate) in s.z.chunks_mut(hidden).zip(output.chunks(hidden)).zip(gates) {
                add_scaled(z, sigmoid(gate), output);
            }
        }
    }

    /// The experts that a row with these router logits chooses and their weights: largest logit first, of
    /// equal ones the lower number first.
    fn route(&self, logits: &[f32]) -> Vec<(usize, f32)> {
        // + 0.0 makes -0 equal to 0.
        let logit = |expert: usize| logits[expert] + 0.0;
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logit(b).total_cmp(&logit(a)).then(a.cmp(&b)));
        let chosen = &order[..self.shape.chosen];
        let exp = |expert: usize| f64::from(logit(expert) - logit(order[0])).exp() as f32;
        let total: f32 = match self.shape.renormalise {
            true => chosen.iter().map(|&expert| exp(expert)).sum(),
            false => (0..logits.len()).map(exp).sum(),
        };
        chosen.iter().map(|&expert| (expert, exp(expert) / total)).collect()
    }
}

/// `z += weight x`
fn add_scaled(z: &mut [f32], weight: f32, x: &[f32]) {
    z.iter_mut().zip(x).for_each(|(z, x)| *z += weight * x);
}
