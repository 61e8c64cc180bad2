//! `--plan`: what would be loaded, from configs and headers alone.

use crate::args::Args;
use crate::output::Output;
use dflash::Result;
use dflash::config::Stack;
use dflash::pair::Pair;
use dflash::weights::{Checkpoint, Folder};
use serde_json::{Value, json};

/// One model of the pair.
struct Part<'a> {
    role: &'static str,
    folder: &'a Folder,
    weights: &'a Checkpoint,
    stack: &'a Stack,
    tensors: Vec<(String, Vec<usize>)>,
}

/// Bytes of an element of the CPU's caches, f32.
const KV_ELEMENT: usize = 4;

pub fn print(args: &Args, pair: &Pair) -> Result<u8> {
    let target = &pair.target;
    let mut parts = vec![Part {
        role: "target",
        folder: &target.folder,
        weights: &target.weights,
        stack: &target.config.stack,
        tensors: target.config.tensors(),
    }];
    parts.extend(pair.drafter.as_ref().map(|drafter| Part {
        role: "drafter",
        folder: &drafter.folder,
        weights: &drafter.weights,
        stack: &drafter.config.stack,
        tensors: drafter.config.tensors(),
    }));
    let mut out = Output::default();
    let mut all = json!({});
    let (mut total, mut kv) = (0, 0);
    for part in &parts {
        let groups = groups(part.weights, &part.tensors)?;
        let bytes: usize = groups.iter().map(|g| g.bytes).sum();
        total += bytes;
        kv += part.stack.kv_bytes_per_token(KV_ELEMENT);
        match args.json {
            true => all[part.role] = part.json(&groups, bytes),
            false => part.lines(&mut out, &groups, bytes)?,
        }
    }
    if args.json {
        all["weight_bytes"] = total.into();
        all["kv_bytes_per_token"] = kv.into();
        out.line(&all.to_string())?;
    } else {
        out.line(&format!(
            "in all: {} of weights, used where the files have them, and {kv} bytes of KV per token",
            size(total)
        ))?;
    }
    Ok(0)
}

impl Part<'_> {
    fn json(&self, groups: &[Group], bytes: usize) -> Value {
        let files = self.weights.files();
        json!({
            "folder": self.folder.name(),
            "weight_bytes": bytes,
            "kv_bytes_per_token": self.stack.kv_bytes_per_token(KV_ELEMENT),
            "max_positions": self.stack.max_positions,
            "files": files.iter().map(|(name, bytes)| json!({"file": name, "bytes": bytes})).collect::<Vec<_>>(),
            "tensors": groups.iter().map(|g| json!({
                "name": g.name, "count": g.count, "shape": g.shape, "dtype": g.dtype, "bytes": g.bytes,
            })).collect::<Vec<_>>(),
        })
    }

    fn lines(&self, out: &mut Output, groups: &[Group], bytes: usize) -> Result<()> {
        out.line(&format!(
            "{} {}: {} of weights, {} bytes of KV per token, {} positions",
            self.role,
            self.folder.name(),
            size(bytes),
            self.stack.kv_bytes_per_token(KV_ELEMENT),
            self.stack.max_positions
        ))?;
        for (name, bytes) in self.weights.files() {
            out.line(&format!("  file {name}: {bytes} bytes"))?;
        }
        for g in groups {
            let shape = format!("{:?}", g.shape);
            out.line(&format!(
                "  {:3} x {:48} {shape:16} {:4} {:>12} bytes",
                g.count, g.name, g.dtype, g.bytes
            ))?;
        }
        Ok(())
    }
}

fn size(bytes: usize) -> String {
    match bytes >> 20 {
        0..10240 => format!("{bytes} bytes ({:.1} MiB)", bytes as f64 / (1 << 20) as f64),
        _ => format!("{bytes} bytes ({:.1} GiB)", bytes as f64 / (1 << 30) as f64),
    }
}

/// Tensors that differ only in their layer.
struct Group {
    name: String,
    count: usize,
    shape: Vec<usize>,
    dtype: String,
    bytes: usize,
}

fn groups(weights: &Checkpoint, tensors: &[(String, Vec<usize>)]) -> Result<Vec<Group>> {
    let mut groups: Vec<Group> = Vec::new();
    for (name, shape) in tensors {
        let tensor = weights.tensor(name, shape)?;
        let parts = name.split('.').map(|part| if part.parse::<usize>().is_ok() { "*" } else { part });
        let name = parts.collect::<Vec<_>>().join(".");
        let dtype = format!("{:?}", tensor.dtype).to_lowercase();
        let bytes = tensor.bytes().len();
        match groups.iter_mut().find(|g| g.name == name && g.shape == *shape && g.dtype == dtype) {
            Some(group) => {
                group.count += 1;
                group.bytes += bytes;
            }
            None => groups.push(Group { name, count: 1, shape: shape.clone(), dtype, bytes }),
        }
    }
    Ok(groups)
}
