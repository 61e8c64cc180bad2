//! `--model`: a published pair, the demo pair or folders. Only `config.json` is read; the weights are random.

use dflash::checkpoint::config::Overrides;
use dflash::checkpoint::folder::{DEMO_DRAFTER, DEMO_TARGET, Folder, PUBLISHED};
use dflash::checkpoint::pair::{Model, Pair};
use dflash::checkpoint::safetensors::Checkpoint;
use dflash::cli::spec_flags::DrafterFlags;
use dflash::cli::{hub, terminal};
use dflash::{Error, Result};
use rayon::prelude::*;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// The pair named `model`, or that of a target's folder. `draft` is a drafter's folder and replaces a named
/// pair's own; `flags` replace parts of its config.
///
/// # Errors
/// [`Error::Usage`] for an unknown name; otherwise those of [`Pair::with_random_weights`].
pub fn pair(model: &str, draft: Option<PathBuf>, flags: &DrafterFlags) -> Result<Pair> {
    let draft = draft.map(|dir| hub::folder(&dir)).transpose()?;
    let named = PUBLISHED.into_iter().find(|pair| pair.0 == model);
    let (target, drafter) = match named.map(|(_, target, drafter)| (target, drafter)) {
        Some((target, drafter)) => (target, Some(draft.unwrap_or(drafter))),
        None if model == "demo" => (DEMO_TARGET, Some(draft.unwrap_or(DEMO_DRAFTER))),
        None if Path::new(model).exists() || model.contains('/') => (hub::folder(Path::new(model))?, draft),
        None => {
            let known = PUBLISHED.map(|pair| pair.0).join(", ");
            return Err(Error::Usage(format!(
                "--model is {model:?}, expected {known}, demo or a target's folder"
            )));
        }
    };
    flags.need_drafter(drafter.is_none().then_some("none"))?;
    let pair = Pair::with_random_weights_and(target, drafter, &flags.overrides())?;
    terminal::notes(&pair.notes);
    Ok(pair)
}

/// A pair in titles: `target with drafter`.
pub fn title(pair: &Pair) -> String {
    let with = drafter_title(pair).map(|name| format!(" with {name}"));
    named(&pair.target.folder) + &with.unwrap_or_default()
}

/// What drafts, in titles.
pub fn drafter_title(pair: &Pair) -> Option<String> {
    let drafter = pair.drafter().map(|drafter| named(&drafter.folder));
    drafter.or(pair.draft_name())
}

fn named(folder: &Folder) -> String {
    match folder {
        // A folder of the same name may exist.
        Folder::Embedded { name, .. } if name.starts_with("demo/") => folder.described(),
        _ => folder.name(),
    }
}

/// `--taps` and `--slots` as settings of a record.
pub fn drafter_settings(flags: &DrafterFlags) -> Map<String, Value> {
    let Overrides { taps, slots } = flags.overrides();
    let text = |taps: Vec<usize>| taps.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    let taps = taps.map(|taps| ("taps".to_string(), text(taps).into()));
    taps.into_iter().chain(slots.map(|slots| ("slots".to_string(), slots.to_string().into()))).collect()
}

/// Bytes of the random weights of `pair`.
pub fn bytes(pair: &Pair) -> usize {
    let drafter = pair.drafter().into_iter().flat_map(|drafter| drafter.weights.files());
    pair.target.weights.files().into_iter().chain(drafter).map(|(_, bytes)| bytes).sum()
}

/// The same pair with its random weights in memory, where the CPU reads them: a device copies weights while
/// it loads, the CPU reads them in place. The memory is never freed; a program measures one pair and ends.
///
/// # Errors
/// [`Error::Memory`] where the weights do not fit.
pub fn in_memory(pair: &Pair) -> Result<Pair> {
    let target = folder(&pair.target, &pair.target.config.tensors())?;
    let drafter = pair.drafter().map(|drafter| folder(drafter, &drafter.config.tensors()));
    let overrides = pair.drafter().map(|drafter| {
        let plan = &drafter.config;
        Overrides { taps: Some(plan.taps.clone()), slots: Some(plan.slots) }
    });
    Pair::open_with(target, drafter.transpose()?, &overrides.unwrap_or_default())
}

/// A model's folder in memory: its config, and its weights as a safetensors file.
fn folder<Config>(model: &Model<Config>, tensors: &[(String, Vec<usize>)]) -> Result<Folder> {
    let name: &'static str = Box::leak(model.folder.name().into_boxed_str());
    let config: &'static [u8] = Vec::leak(model.folder.need("config.json")?.into_owned());
    let weights: &'static [u8] = Vec::leak(file(&model.weights, tensors, name)?);
    let files = Box::leak(Box::new([("config.json", config), ("model.safetensors", weights)]));
    Ok(Folder::Embedded { name, files })
}

/// Bytes of a tensor that one task fills.
const PIECE: usize = 1 << 20;

fn file(weights: &Checkpoint, tensors: &[(String, Vec<usize>)], name: &str) -> Result<Vec<u8>> {
    let (mut header, mut end) = (Map::new(), 0);
    for (name, shape) in tensors {
        let begin = end;
        end += shape.iter().product::<usize>() * size_of::<half::bf16>();
        header.insert(name.clone(), json!({ "dtype": "BF16", "shape": shape, "data_offsets": [begin, end] }));
    }
    let mut header = serde_json::json!(header).to_string();
    // Data begins at a multiple of 8 bytes.
    header += &" ".repeat(header.len().next_multiple_of(8) - header.len());
    let start = 8 + header.len();
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(start + end).map_err(|_| {
        Error::Memory(format!("not enough memory: the random weights of {name} need {} bytes", start + end))
    })?;
    bytes.extend((header.len() as u64).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.resize(start + end, 0);
    let mut rest = &mut bytes[start..];
    for (name, shape) in tensors {
        let tensor = weights.tensor(name, shape)?;
        let size = shape.iter().product::<usize>() * size_of::<half::bf16>();
        let (own, after) = std::mem::take(&mut rest).split_at_mut(size);
        rest = after;
        let fill = |(i, piece): (usize, &mut [u8])| tensor.read(i * PIECE, piece);
        own.par_chunks_mut(PIECE).enumerate().try_for_each(fill)?;
    }
    Ok(bytes)
}

/// Bytes of memory that this process can still use, as Linux reports it. None: unknown.
pub fn available() -> Option<usize> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let meminfo = read("/proc/meminfo")?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kilobytes: usize = line.trim().trim_end_matches(" kB").parse().ok()?;
    let limit = container_limit().unwrap_or(usize::MAX);
    Some((kilobytes * 1024).min(limit))
}

/// Bytes that the container's limit leaves, where it has one. File pages count as used there, but can be
/// dropped.
fn container_limit() -> Option<usize> {
    let read = |file: &str| std::fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok();
    let number = |file: &str| read(file)?.trim().parse::<usize>().ok();
    let stat = read("memory.stat")?;
    let pages = stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.parse::<usize>().ok())?;
    let used = number("memory.current")?.saturating_sub(pages);
    Some(number("memory.max")?.saturating_sub(used))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_in_memory_equal_those_that_devices_load() {
        let random = pair("demo", None, &DrafterFlags::default()).unwrap();
        let held = in_memory(&random).unwrap();
        assert_eq!(held.target.folder.name(), random.target.folder.name());
        let drafter = |pair: &'static Pair| pair.drafter().unwrap();
        let (random, held): (&'static Pair, &'static Pair) =
            (Box::leak(Box::new(random)), Box::leak(Box::new(held)));
        for (tensors, from, to) in [
            (random.target.config.tensors(), &random.target.weights, &held.target.weights),
            (drafter(random).config.tensors(), &drafter(random).weights, &drafter(held).weights),
        ] {
            for (name, shape) in tensors {
                let mut expected = vec![0; shape.iter().product::<usize>() * 2];
                from.tensor(&name, &shape).unwrap().read(0, &mut expected).unwrap();
                assert!(to.tensor(&name, &shape).unwrap().bytes() == expected, "{name}");
            }
        }
        assert!(bytes(held) >= bytes(random) && bytes(held) < bytes(random) + (1 << 20));
    }
}
