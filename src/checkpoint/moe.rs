//! Mixture-of-experts (MoE) MLPs of targets: their shape in `config.json`, and their tensors in both layouts:
//! one tensor per expert, or the tensors of all experts stacked.

use crate::checkpoint::config::{Family, MAX_INTERMEDIATE, MAX_LAYERS, TargetConfig};
use crate::checkpoint::json::Fields;
use crate::checkpoint::safetensors::Checkpoint;
use crate::{Error, Result};

const MAX_EXPERTS: usize = 1 << 12;
/// The most experts in all layers: several times those of any published model, and few enough to list their
/// tensors.
const MAX_ALL_EXPERTS: usize = 1 << 17;

/// The shape of the MoE MLPs of a target. Every layer has one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moe {
    /// Experts of a layer.
    pub experts: usize,
    /// Experts that each row chooses.
    pub chosen: usize,
    /// Width of an expert.
    pub intermediate: usize,
    /// Width of the shared expert, which every row uses; 0 if there is none.
    pub shared: usize,
    /// Whether the weights of the chosen experts are divided by their sum.
    pub renormalise: bool,
}

impl Moe {
    /// Reads the fields of a config of this many layers.
    ///
    /// # Errors
    /// [`Error::Model`] for an absent or malformed field; [`Error::Unsupported`] for a variant that this
    /// engine does not run.
    pub(super) fn read(config: &Fields, family: Family, layers: usize) -> Result<Moe> {
        let size = |name: &str, min| config.need(name)?.integer(min, MAX_INTERMEDIATE);
        let (hub, newer) = (config.get("num_experts"), config.get("num_local_experts"));
        if let (Some(a), Some(b)) = (&hub, &newer)
            && a.value != b.value
        {
            return Err(Error::Model(format!(
                "{}: {} is {} and {} is {}, expected one value",
                config.file,
                a.name,
                a.found(),
                b.name,
                b.found()
            )));
        }
        let field = hub.or(newer).ok_or_else(|| config.absent("num_experts"))?;
        let experts = field.integer(1, MAX_EXPERTS)?;
        if experts * layers > MAX_ALL_EXPERTS {
            return Err(field.wrong(&format!("at most {MAX_ALL_EXPERTS} in all of the {layers} layers")));
        }
        // Layers without experts.
        if let Some(list) = config.get("mlp_only_layers").filter(|f| !f.is_neutral("")) {
            return Err(config.unsupported("mlp_only_layers", &list.found(), "an empty list"));
        }
        if let Some(step) = config.get("decoder_sparse_step")
            && step.integer(0, MAX_LAYERS)? != 1
        {
            return Err(config.unsupported("decoder_sparse_step", &step.found(), "1"));
        }
        let given = config.get("norm_topk_prob").map(|f| f.boolean()).transpose()?;
        if family == Family::Qwen3_5Moe && given == Some(false) {
            return Err(config.unsupported("norm_topk_prob", "false", "true"));
        }
        let shared = match family {
            // The class has no shared expert; Qwen3-Coder writes 0.
            Family::Qwen3Moe => {
                if let Some(field) =
                    config.get("shared_expert_intermediate_size").filter(|f| !f.is_neutral(""))
                {
                    return Err(config.unsupported("shared_expert_intermediate_size", &field.found(), "0"));
                }
                0
            }
            _ => size("shared_expert_intermediate_size", 0)?,
        };
        Ok(Moe {
            experts,
            chosen: config.need("num_experts_per_tok")?.integer(1, experts)?,
            intermediate: size("moe_intermediate_size", 1)?,
            shared,
            renormalise: given.unwrap_or(family != Family::Qwen3Moe),
        })
    }

    /// Elements of the matrices of `experts` experts of a layer, with the router and the shared expert.
    pub(crate) fn matrices(&self, hidden: usize, experts: f64) -> f64 {
        let shared_gate = f64::from(u8::from(self.shared > 0));
        let rows = 3.0 * experts * self.intermediate as f64 + (3 * self.shared + self.experts) as f64;
        (rows + shared_gate) * hidden as f64
    }

    /// Name, without prefix, and shape of a layer's tensors, one per expert.
    pub(crate) fn tensors(&self, hidden: usize) -> Vec<(String, Vec<usize>)> {
        let mut list = vec![("gate.weight".into(), vec![self.experts, hidden])];
        let mut mlp = |at: String, width: usize| {
            list.push((format!("{at}.gate_proj.weight"), vec![width, hidden]));
            list.push((format!("{at}.up_proj.weight"), vec![width, hidden]));
            list.push((format!("{at}.down_proj.weight"), vec![hidden, width]));
        };
        (0..self.experts).for_each(|e| mlp(format!("experts.{e}"), self.intermediate));
        if self.shared > 0 {
            mlp("shared_expert".into(), self.shared);
            list.push(("shared_expert_gate.weight".into(), vec![1, hidden]));
        }
        list
    }
}

impl Checkpoint {
    /// Lists stacked experts by expert, so that both layouts have the same names. Moves no bytes.
    ///
    /// # Errors
    /// [`Error::Model`] for a stacked tensor of another shape, and for a layer that has both layouts;
    /// [`Error::Unsupported`] for an element type other than those of
    /// [`Dtype`](crate::checkpoint::safetensors::Dtype).
    pub(crate) fn split_experts(&mut self, config: &TargetConfig) -> Result<()> {
        let Some(moe) = &config.stack.moe else { return Ok(()) };
        let (hidden, wide) = (config.stack.hidden, moe.intermediate);
        for layer in 0..config.stack.attention.len() {
            let at = format!("model.layers.{layer}.mlp.experts");
            let both = [moe.experts, 2 * wide, hidden];
            self.split(&format!("{at}.gate_up_proj"), &both, |expert| {
                let name = |part: &str| format!("{at}.{expert}.{part}.weight");
                vec![(name("gate_proj"), vec![wide, hidden]), (name("up_proj"), vec![wide, hidden])]
            })?;
            self.split(&format!("{at}.down_proj"), &[moe.experts, hidden, wide], |expert| {
                vec![(format!("{at}.{expert}.down_proj.weight"), vec![hidden, wide])]
            })?;
        }
        Ok(())
    }
}
