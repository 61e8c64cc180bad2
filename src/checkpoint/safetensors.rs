//! Tensors of a checkpoint by name: safetensors files, memory-mapped or embedded in the binary. Tensors keep
//! the bytes and types of their files; nothing is converted here.

use crate::checkpoint::config::TargetConfig;
use crate::checkpoint::folder::{Bytes, Folder};
use crate::checkpoint::identify::{Identity, foreign_tensor};
use crate::checkpoint::json::{self, LFS_POINTER};
use crate::error::excerpt;
use crate::{Error, Result};
use safetensors::tensor::{Dtype as Stored, Metadata};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io::ErrorKind;
use std::ops::Range;
use std::path::Path;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The safetensors format's own limit.
const MAX_HEADER: usize = 100_000_000;

/// Element types that this engine loads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// bfloat16: the upper 16 bits of an f32.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::F32 => 4,
        }
    }
}

/// One tensor: row-major, little-endian, at any alignment in its file. Cheap to clone.
#[derive(Clone)]
pub struct Tensor {
    file: Bytes,
    range: Range<usize>,
    path: String,
    name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Sizes of its dimensions, outermost first; `[out, in]` for linear layers.
    pub shape: Vec<usize>,
}

impl Tensor {
    /// All bytes: a slice of the mapped or embedded file.
    ///
    /// # Panics
    /// For random weights, which are not in memory. Check with [`Checkpoint::need_files`] first.
    pub fn bytes(&self) -> &[u8] {
        &self.file.slice()[self.range.clone()]
    }

    /// Copies `to.len()` bytes of the tensor, from byte `at` on, into `to`. Reads the file, not its mapping.
    ///
    /// # Errors
    /// [`Error::Model`], with file and tensor, if the bytes cannot be read or the file became shorter;
    /// [`Error::Internal`] if the tensor does not have these bytes.
    pub fn read(&self, at: usize, to: &mut [u8]) -> Result<()> {
        if at.checked_add(to.len()).is_none_or(|end| end > self.range.len()) {
            let (size, label) = (self.range.len(), self.label());
            return Err(Error::Internal(format!("{label}: {} bytes at {at} of {size}", to.len())));
        }
        self.file.read(self.range.start + at, to).map_err(|e| {
            let label = self.label();
            Error::Model(match e.kind() {
                ErrorKind::UnexpectedEof => {
                    format!("{label} has lost bytes: the file became shorter after it was opened")
                }
                _ => format!("{label} cannot be read: {e}"),
            })
        })
    }

    /// Whether type, shape and bytes equal those of `other`. Reads both, up to the first difference.
    ///
    /// # Errors
    /// As [`Tensor::read`].
    pub(crate) fn equals(&self, other: &Tensor) -> Result<bool> {
        if (self.dtype, &self.shape) != (other.dtype, &other.shape) {
            return Ok(false);
        }
        let (mut ours, mut theirs) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        for at in (0..self.range.len()).step_by(ours.len()) {
            let size = ours.len().min(self.range.len() - at);
            self.read(at, &mut ours[..size])?;
            other.read(at, &mut theirs[..size])?;
            if ours[..size] != theirs[..size] {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// A copy in memory of these rows of a matrix, in this order.
    ///
    /// # Errors
    /// [`Error::Memory`] if there is no memory for it.
    pub(crate) fn rows(&self, rows: &[usize]) -> Result<Tensor> {
        let size = self.shape[1] * self.dtype.size();
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(rows.len() * size).map_err(|_| {
            Error::Memory(format!("no memory for {}, whose rows are reordered", self.label()))
        })?;
        rows.iter().for_each(|row| bytes.extend_from_slice(&self.bytes()[row * size..][..size]));
        let range = 0..bytes.len();
        Ok(Tensor {
            file: Bytes::Owned(bytes.into()),
            range,
            shape: vec![rows.len(), self.shape[1]],
            ..self.clone()
        })
    }

    /// The tensor in errors: its file and its name.
    pub fn label(&self) -> String {
        format!("{}: tensor {}", self.path, excerpt(&self.name))
    }

    /// The file's path, and the offset of the tensor's first byte in the file.
    pub fn location(&self) -> (&str, usize) {
        (&self.path, self.range.start)
    }
}

/// All tensors of a folder: `model.safetensors`, or the shards that `model.safetensors.index.json` lists.
///
/// Tensor names are those of `docs/dflash.md` section 2 (drafter) or Hugging Face's (target).
/// [`Checkpoint::tensor`] also finds the other spellings that published drafters use.
pub struct Checkpoint {
    /// The file that a missing tensor is reported against: the single file or the index.
    source: String,
    /// (path, contents)
    shards: Vec<(String, Bytes)>,
    tensors: BTreeMap<String, Entry>,
}

/// The location of one tensor. `range` is within its shard's bytes, as checked when the header was read.
struct Entry {
    shard: usize,
    range: Range<usize>,
    dtype: Stored,
    shape: Vec<usize>,
}

#[derive(serde::Deserialize)]
struct Index {
    /// tensor name -> file name
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Maps the shards and checks every header. Reads no weights.
    ///
    /// # Errors
    /// [`Error::Model`] for a missing or malformed file, index or header.
    pub fn open(folder: &Folder) -> Result<Self> {
        if let Some(bytes) = folder.map(SINGLE)? {
            let mut single =
                Checkpoint { source: folder.path(SINGLE), shards: vec![], tensors: BTreeMap::new() };
            single.add(folder.path(SINGLE), bytes)?;
            return Ok(single);
        }
        let Some(bytes) = folder.file(INDEX)? else { return Err(folder.missing(SINGLE)) };
        let source = folder.path(INDEX);
        let index: Index = json::parse(&source, &bytes)?;
        let mut all = Checkpoint { source, shards: vec![], tensors: BTreeMap::new() };
        for file in index.weight_map.values().collect::<BTreeSet<_>>() {
            // Only a bare file name, so that an index cannot reach outside its folder, of a length that
            // systems allow.
            let bare = Path::new(file).file_name().is_some_and(|name| name == file.as_str());
            if !bare || file.len() > 255 || file.contains(|c: char| matches!(c, '/' | '\\') || c.is_control())
            {
                return Err(Error::Model(format!(
                    "{} lists the shard \"{}\": expected the plain name of a file in the same folder",
                    all.source,
                    excerpt(file)
                )));
            }
            let Some(bytes) = folder.map(file)? else {
                return Err(Error::Model(format!(
                    "{} lists the shard {}, which is not in the folder",
                    all.source,
                    excerpt(file)
                )));
            };
            all.add(folder.path(file), bytes)?;
        }
        for (name, file) in &index.weight_map {
            let path = folder.path(file);
            if all.tensors.get(name).is_none_or(|t| all.shards[t.shard].0 != path) {
                return Err(Error::Model(format!(
                    "{} lists the tensor {} in {}, which does not contain it",
                    all.source,
                    excerpt(name),
                    excerpt(&path)
                )));
            }
        }
        Ok(all)
    }

    /// Random bf16 weights with these names and shapes. They are computed when they are read, so they take no
    /// memory and no disk space ([`crate::checkpoint::random_weights`]). The same shapes and seed always give
    /// the same weights.
    pub fn random(folder: &Folder, tensors: &[(String, Vec<usize>)], seed: u64) -> Checkpoint {
        let path = folder.path("random weights");
        let mut size = 0;
        let entry = |(name, shape): &(String, Vec<usize>)| {
            let begin = size;
            size += shape.iter().product::<usize>() * Dtype::Bf16.size();
            (name.clone(), Entry { shard: 0, range: begin..size, dtype: Stored::BF16, shape: shape.clone() })
        };
        let tensors = tensors.iter().map(entry).collect();
        Checkpoint { source: path.clone(), shards: vec![(path, Bytes::Random { size, seed })], tensors }
    }

    /// Checks that the weights are mapped or embedded, as the CPU needs them. A device copies its weights and
    /// does not need this.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for random weights.
    pub fn need_files(&self) -> Result<()> {
        match self.shards.iter().any(|(_, bytes)| matches!(bytes, Bytes::Random { .. })) {
            true => Err(Error::Unsupported(format!(
                "{} are not in memory, so only a device can load them: expected a pair with weight files on the CPU",
                self.source
            ))),
            false => Ok(()),
        }
    }

    fn add(&mut self, path: String, bytes: Bytes) -> Result<()> {
        let (header, data_begin) = read_header(&path, &bytes)?;
        let shard = self.shards.len();
        for (name, info) in header.tensors() {
            let (begin, end) = info.data_offsets;
            let range = data_begin + begin..data_begin + end;
            if let Some(other) = self.tensors.get(&name) {
                return Err(Error::Model(format!(
                    "tensor {} is in both {} and {path}",
                    excerpt(&name),
                    self.shards[other.shard].0
                )));
            }
            let entry = Entry { shard, range, dtype: info.dtype, shape: info.shape.clone() };
            self.tensors.insert(name, entry);
        }
        self.shards.push((path, bytes));
        Ok(())
    }

    /// The tensor with this name, or with an accepted other spelling of it. It must have this shape.
    ///
    /// # Errors
    /// [`Error::Model`] if there is no such tensor, or if its shape differs (the error has both shapes);
    /// [`Error::Unsupported`] for an element type other than those of [`Dtype`].
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let Some((stored, entry)) = self.find(name) else {
            return Err(Error::Model(format!("{} has no tensor {name}", self.source)));
        };
        let (path, bytes) = &self.shards[entry.shard];
        let dtype = supported(entry.dtype).ok_or_else(|| {
            Error::Unsupported(format!(
                "{path}: tensor {stored} is {}, which this engine does not run: expected BF16, F16 or F32",
                entry.dtype
            ))
        })?;
        if entry.shape != shape {
            return Err(Error::Model(format!(
                "{path}: tensor {stored} has shape {:?}, expected {shape:?} from config.json",
                entry.shape
            )));
        }
        Ok(Tensor {
            file: bytes.clone(),
            range: entry.range.clone(),
            path: path.clone(),
            name: stored.to_string(),
            dtype,
            shape: shape.to_vec(),
        })
    }

    /// The shape of a tensor, if there is one of this name.
    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.find(name).map(|(_, entry)| &entry.shape[..])
    }

    /// Gives a tensor another name, if there is a tensor of the first name.
    pub(crate) fn rename(&mut self, from: &str, to: &str) {
        if let Some(stored) = self.find(from).map(|(stored, _)| stored.to_string())
            && let Some(entry) = self.tensors.remove(&stored)
        {
            self.tensors.insert(to.into(), entry);
        }
    }

    /// Renames all tensors whose names begin with `from`: `to` replaces it.
    pub(crate) fn rename_prefix(&mut self, from: &str, to: &str) {
        let renamed = |name: &str| {
            let bare = name.strip_prefix("model.").unwrap_or(name);
            bare.strip_prefix(from).map(|rest| format!("{to}{rest}"))
        };
        let names: Vec<(String, String)> =
            self.tensors.keys().filter_map(|name| Some((name.clone(), renamed(name)?))).collect();
        names.iter().for_each(|(name, new)| self.rename(name, new));
    }

    /// Replaces the tensor `name` of this shape, if there is one, by consecutive parts of it: for each index
    /// of its first dimension those that `parts` lists, name and shape.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`]; [`Error::Model`] if there is a tensor with the name of a part.
    pub(crate) fn split(
        &mut self,
        name: &str,
        shape: &[usize],
        parts: impl Fn(usize) -> Vec<(String, Vec<usize>)>,
    ) -> Result<()> {
        if self.find(name).is_none() {
            return Ok(());
        }
        let whole = self.tensor(name, shape)?;
        let Some(Entry { shard, range, dtype, .. }) = self.tensors.remove(&whole.name) else { return Ok(()) };
        let mut begin = range.start;
        for (part, shape) in (0..shape[0]).flat_map(parts) {
            if let Some((other, _)) = self.find(&part) {
                let label = whole.label();
                return Err(Error::Model(format!(
                    "{label} is there together with its part {}",
                    excerpt(other)
                )));
            }
            let end = begin + shape.iter().product::<usize>() * whole.dtype.size();
            self.tensors.insert(part, Entry { shard, range: begin..end, dtype, shape });
            begin = end;
        }
        Ok(())
    }

    /// The file, or the index of the shards, for errors.
    pub(crate) fn source(&self) -> &str {
        &self.source
    }

    /// (path, number of bytes) of every shard, in name order.
    pub fn files(&self) -> Vec<(&str, usize)> {
        self.shards.iter().map(|(path, bytes)| (path.as_str(), bytes.size())).collect()
    }

    /// (path, addresses) of every shard that is mapped from a file. A SIGBUS at one of these addresses means
    /// that the file became shorter after it was opened, or that it cannot be read. The addresses are valid
    /// while the checkpoint is open.
    pub fn mapped(&self) -> impl Iterator<Item = (&str, Range<usize>)> {
        self.shards.iter().filter_map(|(path, bytes)| match bytes {
            Bytes::Mapped(mapped) => {
                let start = mapped.map.as_ptr().addr();
                Some((path.as_str(), start..start + mapped.map.len()))
            }
            Bytes::Embedded(_) | Bytes::Owned(_) | Bytes::Random { .. } => None,
        })
    }

    /// (name, file, element type, shape) of every tensor whose type this engine loads, in name order.
    pub fn list(&self) -> Vec<(&str, &str, Dtype, &[usize])> {
        self.tensors
            .iter()
            .filter_map(|(name, t)| {
                let path = self.shards[t.shard].0.as_str();
                Some((name.as_str(), path, supported(t.dtype)?, t.shape.as_slice()))
            })
            .collect()
    }

    /// Checks a target's files against the tensors that its config implies ([`TargetConfig::tensors`]). Each
    /// must exist with its shape and a supported type. Other tensors are refused unless they cannot change
    /// the output.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`]; [`Error::Unsupported`] for a tensor that such a target does not have;
    /// [`Error::Model`] for a tensor of a layer beyond those of the config.
    pub fn check_target(&self, config: &TargetConfig) -> Result<()> {
        let expected = &config.tensors();
        for (name, entry) in self.unexpected(expected) {
            // Older exports store RoPE's inverse frequencies, position ids and masks. A tied head may be
            // stored although it is the embedding table; `Pair::open` has compared both.
            let buffer = matches!(entry.dtype, Stored::I64 | Stored::BOOL);
            let is_head = self.find("lm_head.weight").is_some_and(|(head, _)| head == name);
            // Hybrids come with layers for multi-token prediction and a vision encoder, which text does not
            // need.
            let extra = ["mtp.", "model.visual."].iter().any(|prefix| name.starts_with(prefix));
            if buffer
                || name.ends_with(".rotary_emb.inv_freq")
                || is_head
                || extra && config.family.is_hybrid()
            {
                continue;
            }
            return Err(self.unknown(name, entry, expected, "this kind of target"));
        }
        self.check_present(expected)
    }

    /// As [`Checkpoint::check_target`], for a drafter
    /// ([`DrafterConfig::tensors`](crate::checkpoint::config::DrafterConfig::tensors)). Copies of the
    /// target's embedding and head, and the ids of a reduced vocabulary, may be there.
    ///
    /// # Errors
    /// As [`Checkpoint::check_target`].
    pub fn check_drafter(&self, expected: &[(String, Vec<usize>)]) -> Result<()> {
        let ignored = ["embed_tokens.weight", "lm_head.weight", "d2t", "t2d"];
        for (name, entry) in self.unexpected(expected) {
            let bare = name.strip_prefix("model.").unwrap_or(name);
            if !name.ends_with("rotary_emb.inv_freq") && !ignored.contains(&bare) {
                return Err(self.unknown(name, entry, expected, "this kind of drafter"));
            }
        }
        self.check_present(expected)
    }

    /// Refuses tensors that drafters of this identity do not have.
    ///
    /// # Errors
    /// [`Error::Unsupported`], with the tensor, the drafters that have it, and what the config says.
    pub(crate) fn refuse_other_families(&self, identity: Identity) -> Result<()> {
        let foreign = |(name, entry): (&String, &Entry)| {
            Some((&self.shards[entry.shard].0, excerpt(name), foreign_tensor(identity, name)?))
        };
        match self.tensors.iter().find_map(foreign) {
            Some((path, name, owner)) => Err(Error::Unsupported(format!(
                "{path}: tensor {name} belongs to {owner}, but config.json describes {identity}"
            ))),
            None => Ok(()),
        }
    }

    /// Refuses an integer tensor that contradicts a field of the config.
    ///
    /// # Errors
    /// [`Error::Model`] if there is a tensor of this name.
    pub(crate) fn refuse_integers(&self, name: &str, field: &str) -> Result<()> {
        match self.find(name) {
            Some((stored, entry)) => Err(Error::Model(format!(
                "{}: tensor {stored} maps a reduced vocabulary, but {field} of config.json does not say its size",
                self.shards[entry.shard].0
            ))),
            None => Ok(()),
        }
    }

    /// The target's ids of a reduced vocabulary of `rows` tokens, ascending, from `d2t` `[rows]`, which has
    /// the offset of each. `t2d` `[vocab]`, if it is there, must mark the same ids.
    ///
    /// # Errors
    /// [`Error::Model`] for a missing tensor, another type or shape, or ids that do not ascend below `vocab`.
    pub(crate) fn draft_ids(&self, rows: usize, vocab: usize) -> Result<Vec<u32>> {
        let wrong = |what: String| Error::Model(format!("{}: {what}", self.source));
        let bytes = self.integers("d2t", Stored::I64, rows)?;
        let offsets = bytes.as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes));
        let mut ids: Vec<u32> = Vec::with_capacity(rows);
        for (i, offset) in (0i64..).zip(offsets) {
            let id = i.checked_add(offset).filter(|id| (0..vocab as i64).contains(id)).ok_or_else(|| {
                wrong(format!("d2t[{i}] is {offset}, which gives no token of the vocabulary of {vocab}"))
            })? as u32;
            if ids.last().is_some_and(|last| *last >= id) {
                return Err(wrong(format!("d2t[{i}] gives token {id}, expected ascending tokens")));
            }
            ids.push(id);
        }
        if self.find("t2d").is_some() {
            let marks = self.integers("t2d", Stored::BOOL, vocab)?;
            let marked = marks.iter().zip(0u32..).filter(|(mark, _)| **mark != 0).map(|(_, id)| id);
            if !marked.eq(ids.iter().copied()) {
                return Err(wrong("t2d marks other tokens than d2t gives".into()));
            }
        }
        Ok(ids)
    }

    /// The bytes of a vector `[len]` of this type, which has no weights.
    fn integers(&self, name: &str, dtype: Stored, len: usize) -> Result<Vec<u8>> {
        let Some((stored, entry)) = self.find(name) else {
            return Err(Error::Model(format!("{} has no tensor {name}", self.source)));
        };
        let (path, file) = &self.shards[entry.shard];
        if (entry.dtype, &entry.shape[..]) != (dtype, &[len]) {
            let (found, shape) = (entry.dtype, &entry.shape);
            return Err(Error::Model(format!(
                "{path}: tensor {stored} is {found} {shape:?}, expected {dtype} [{len}]"
            )));
        }
        let mut bytes = vec![0; entry.range.len()];
        let read = file.read(entry.range.start, &mut bytes);
        read.map_err(|e| Error::Model(format!("{path}: tensor {stored} cannot be read: {e}")))?;
        Ok(bytes)
    }

    fn check_present(&self, expected: &[(String, Vec<usize>)]) -> Result<()> {
        expected.iter().try_for_each(|(name, shape)| self.tensor(name, shape).map(drop))
    }

    /// The tensors that are not expected, in name order.
    fn unexpected(&self, expected: &[(String, Vec<usize>)]) -> impl Iterator<Item = (&str, &Entry)> {
        let used: HashSet<&str> = expected.iter().filter_map(|(name, _)| Some(self.find(name)?.0)).collect();
        self.tensors.iter().map(|(n, t)| (n.as_str(), t)).filter(move |(n, _)| !used.contains(n))
    }

    /// The error for a tensor that a model of this `kind` does not have.
    fn unknown(&self, name: &str, entry: &Entry, expected: &[(String, Vec<usize>)], kind: &str) -> Error {
        let (path, name_excerpt) = (&self.shards[entry.shard].0, excerpt(name));
        let layers = expected.iter().filter_map(|(n, _)| layer(n)).max().map_or(0, |last| last + 1);
        if layer(name).is_some_and(|i| i >= layers) {
            return Error::Model(format!(
                "{path}: tensor {name_excerpt} belongs to a layer beyond the {layers} of config.json"
            ));
        }
        let quantised = ["qweight", "qzeros", "scales", "g_idx", "absmax", "biases", "input_scale"];
        let last = name.rsplit('.').next().unwrap_or(name);
        if quantised.contains(&last) || last.starts_with("weight_") || name.contains("quant") {
            return Error::Unsupported(format!(
                "{path}: tensor {name_excerpt} belongs to a quantised checkpoint, which this engine does not run: expected BF16, F16 or F32 weights"
            ));
        }
        Error::Unsupported(format!("{path}: tensor {name_excerpt} is not part of {kind}"))
    }

    /// The stored name and the entry of a tensor. Accepted spellings are a `model.` prefix, the prefix
    /// `model.language_model.` of multimodal targets, and llama.cpp's names for `fc` and `hidden_norm`.
    fn find(&self, name: &str) -> Option<(&str, &Entry)> {
        let nested = name.strip_prefix("model.").map(|name| format!("model.language_model.{name}"));
        let other = match name {
            "fc.weight" => "encoder.fc.weight",
            "hidden_norm.weight" => "encoder.output_norm_enc.weight",
            _ => name,
        };
        [name, &format!("model.{name}"), other, &format!("model.{other}")]
            .into_iter()
            .chain(nested.as_deref())
            .find_map(|spelling| self.tensors.get_key_value(spelling))
            .map(|(stored, entry)| (stored.as_str(), entry))
    }
}

/// The layer number in `...layers.N...`.
fn layer(name: &str) -> Option<usize> {
    let (_, rest) = name.split_once("layers.")?;
    rest.split('.').next()?.parse().ok()
}

fn supported(dtype: Stored) -> Option<Dtype> {
    match dtype {
        Stored::BF16 => Some(Dtype::Bf16),
        Stored::F16 => Some(Dtype::F16),
        Stored::F32 => Some(Dtype::F32),
        _ => None,
    }
}

/// Reads the header of one file, and returns it with the offset of the data. Checks that the tensors fill the
/// data without gaps or overlaps, and that the length of each is that of its shape and type.
fn read_header(path: &str, file: &Bytes) -> Result<(Metadata, usize)> {
    let bad = |what: String| Error::Model(format!("{path} is not a complete safetensors file: {what}"));
    let read = |at: usize, to: &mut [u8]| {
        file.read(at, to).map_err(|e| Error::Model(format!("{path}: its header cannot be read: {e}")))
    };
    let mut start = [0; LFS_POINTER.len()];
    let available = file.size().min(start.len());
    read(0, &mut start[..available])?;
    // Only after the length was found to be wrong: its bytes may be any.
    let wrong_length = |what: String| match json::other_kind(&start[..available]) {
        Some(kind) => Error::Model(format!("{path} is {kind}, expected a safetensors file")),
        None => bad(what),
    };
    let Some(rest) = file.size().checked_sub(8) else {
        let size = file.size();
        return Err(wrong_length(format!(
            "it has {size} bytes, expected at least 8 for the header's length"
        )));
    };
    let [a, b, c, d, e, f, g, h, ..] = start;
    let size = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    let Some(size) = usize::try_from(size).ok().filter(|&size| size <= rest) else {
        let what = format!("its header's length is given as {size} bytes, but only {rest} follow");
        return Err(wrong_length(what));
    };
    if size > MAX_HEADER {
        return Err(bad(format!("its header is {size} bytes long, the limit is {MAX_HEADER}")));
    }
    let mut text = vec![0; size];
    read(8, &mut text)?;
    // Not through `SafeTensors::read_metadata`, whose sum of header and data length may overflow.
    let header: Metadata =
        serde_json::from_slice(&text).map_err(|e| bad(format!("its header: {}", excerpt(&e.to_string()))))?;
    let data = rest - size;
    if header.data_len() != data {
        return Err(bad(format!(
            "its header describes {} bytes of tensors, but {data} follow it",
            header.data_len()
        )));
    }
    Ok((header, 8 + size))
}
