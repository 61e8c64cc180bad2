//! Checkpoint folders: on disk (weights memory-mapped) or embedded in the binary. Tensors stay in their files' bytes and
//! types; nothing is converted here.

use crate::checkpoint::json::shown;
use crate::{Error, Result};
use safetensors::tensor::{Dtype as Stored, Metadata};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes of one file: mapped, embedded, or drawn whenever they are read. Cheap to clone.
#[derive(Clone)]
enum Bytes {
    Mapped(Arc<Mapped>),
    Embedded(&'static [u8]),
    Drawn { size: usize, seed: u64 },
}

/// A file that stays open, so that nobody minds another that takes its name, and its bytes.
struct Mapped {
    map: memmap2::Mmap,
    file: File,
}

impl Bytes {
    /// Copies the bytes from `at` on, from the file itself: one that became shorter is an error, where a look through
    /// its mapping would end the program.
    fn read(&self, at: usize, to: &mut [u8]) -> io::Result<()> {
        match self {
            Bytes::Mapped(mapped) => mapped.file.read_exact_at(to, at as u64),
            Bytes::Drawn { seed, .. } => {
                draw(*seed, at, to);
                Ok(())
            }
            Bytes::Embedded(bytes) => match bytes.get(at..).and_then(|rest| rest.get(..to.len())) {
                Some(from) => {
                    to.copy_from_slice(from);
                    Ok(())
                }
                None => Err(ErrorKind::UnexpectedEof.into()),
            },
        }
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];
    /// Of drawn bytes: none, which exist only while they are read.
    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(mapped) => &mapped.map,
            Bytes::Embedded(bytes) => bytes,
            Bytes::Drawn { .. } => &[],
        }
    }
}

/// Bytes `at..` of drawn weights, or of noise: eight at a time a mix of their number and the seed (splitmix64), of which
/// every two are a bf16 with random sign and fraction and a magnitude of 2^-6 up to 2^-5.
pub(crate) fn draw(seed: u64, at: usize, to: &mut [u8]) {
    let word = |number: usize| {
        // Seeds are far apart in the sequence of mixes.
        let start = seed.wrapping_mul(0xd134_2543_de82_ef95);
        let mut x = start.wrapping_add(number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ x >> 31) & 0x807f_807f_807f_807f | 0x3c80_3c80_3c80_3c80).to_le_bytes()
    };
    let first = at / 8;
    let skipped = at % 8;
    let head = if skipped == 0 { 0 } else { to.len().min(8 - skipped) };
    let (head, rest) = to.split_at_mut(head);
    head.copy_from_slice(&word(first)[skipped..][..head.len()]);
    let whole = at.div_ceil(8);
    for (i, to) in rest.chunks_mut(8).enumerate() {
        to.copy_from_slice(&word(whole + i)[..to.len()]);
    }
}

/// A Hugging Face checkpoint folder.
#[derive(Debug, Clone)]
pub enum Folder {
    Disk(PathBuf),
    /// Compiled into the binary: (file name, contents).
    Embedded {
        name: &'static str,
        files: &'static [(&'static str, &'static [u8])],
    },
}

/// The demo pair's target, embedded.
pub const DEMO_TARGET: Folder = Folder::Embedded {
    name: "demo/target",
    files: &[
        ("config.json", include_bytes!("../../demo/target/config.json")),
        ("generation_config.json", include_bytes!("../../demo/target/generation_config.json")),
        ("tokenizer.json", include_bytes!("../../demo/target/tokenizer.json")),
        ("tokenizer_config.json", include_bytes!("../../demo/target/tokenizer_config.json")),
        ("model.safetensors", include_bytes!("../../demo/target/model.safetensors")),
    ],
};

/// The demo pair's drafter, embedded.
pub const DEMO_DRAFTER: Folder = Folder::Embedded {
    name: "demo/drafter",
    files: &[
        ("config.json", include_bytes!("../../demo/drafter/config.json")),
        ("model.safetensors", include_bytes!("../../demo/drafter/model.safetensors")),
    ],
};

/// Published pairs without their weights, to be drawn: name, target, drafter.
pub const PUBLISHED: [(&str, Folder, Folder); 3] = [
    (
        "qwen3-4b",
        Folder::Embedded {
            name: "qwen3-4b",
            files: &[("config.json", include_bytes!("../../benches/models/qwen3-4b.target.json"))],
        },
        Folder::Embedded {
            name: "qwen3-4b-dflash",
            files: &[("config.json", include_bytes!("../../benches/models/qwen3-4b.drafter.json"))],
        },
    ),
    (
        "qwen3-8b",
        Folder::Embedded {
            name: "qwen3-8b",
            files: &[("config.json", include_bytes!("../../benches/models/qwen3-8b.target.json"))],
        },
        Folder::Embedded {
            name: "qwen3-8b-dflash",
            files: &[("config.json", include_bytes!("../../benches/models/qwen3-8b.drafter.json"))],
        },
    ),
    (
        "llama-3.1-8b",
        Folder::Embedded {
            name: "llama-3.1-8b",
            files: &[("config.json", include_bytes!("../../benches/models/llama-3.1-8b.target.json"))],
        },
        Folder::Embedded {
            name: "llama-3.1-8b-dflash",
            files: &[("config.json", include_bytes!("../../benches/models/llama-3.1-8b.drafter.json"))],
        },
    ),
];

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The safetensors format's own limit.
const MAX_HEADER: usize = 100_000_000;
/// More than any tokenizer, which is the largest of a model's text files.
const MAX_TEXT: usize = 100_000_000;

impl Folder {
    /// The file as a user would name it: `DIR/file`.
    pub fn path(&self, file: &str) -> String {
        match self {
            Folder::Disk(dir) => dir.join(file).display().to_string(),
            Folder::Embedded { name, .. } => format!("{name}/{file}"),
        }
    }

    /// The folder as a user would name it.
    pub fn name(&self) -> String {
        match self {
            Folder::Disk(dir) => dir.display().to_string(),
            Folder::Embedded { name, .. } => name.to_string(),
        }
    }

    /// The bytes of a text file, `None` if it is not there.
    ///
    /// # Errors
    /// [`Error::Model`] for a file that cannot be read, becomes shorter meanwhile or is larger than any such file;
    /// [`Error::Memory`].
    pub fn file(&self, file: &str) -> Result<Option<Cow<'static, [u8]>>> {
        let dir = match self {
            Folder::Disk(dir) => dir,
            Folder::Embedded { files, .. } => return Ok(embedded(files, file).map(Cow::Borrowed)),
        };
        let path = dir.join(file);
        let Some((mut open, size)) = open(&path)? else { return Ok(None) };
        let Some(size) = usize::try_from(size).ok().filter(|&size| size <= MAX_TEXT) else {
            return Err(Error::Model(format!(
                "{} has {size} bytes, expected at most {MAX_TEXT}",
                path.display()
            )));
        };
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(size).map_err(|_| {
            Error::Memory(format!("not enough memory: reading {} needs {size} bytes", path.display()))
        })?;
        bytes.resize(size, 0);
        open.read_exact(&mut bytes).map_err(|e| unreadable(&path, e))?;
        Ok(Some(bytes.into()))
    }

    /// As [`Folder::file`], but its absence is an error that says what the folder holds instead.
    pub fn need(&self, file: &str) -> Result<Cow<'static, [u8]>> {
        self.file(file)?.ok_or_else(|| self.missing(file))
    }

    /// A file of weights, of which nothing is read; `None` if it is not there.
    fn map(&self, file: &str) -> Result<Option<Bytes>> {
        let dir = match self {
            Folder::Disk(dir) => dir,
            Folder::Embedded { files, .. } => return Ok(embedded(files, file).map(Bytes::Embedded)),
        };
        let path = dir.join(file);
        let Some((file, size)) = open(&path)? else { return Ok(None) };
        if size == 0 {
            return Ok(Some(Bytes::Embedded(&[])));
        }
        // SAFETY: the map is read-only and private to this process. Whoever changes a checkpoint's bytes while it is in
        // use breaks it, as with every engine that maps its weights; a look at bytes that are gone is a SIGBUS, whose
        // handler finds the file in [`Checkpoint::mapped`].
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| unreadable(&path, e))?;
        Ok(Some(Bytes::Mapped(Arc::new(Mapped { map, file }))))
    }

    fn missing(&self, file: &str) -> Error {
        let Folder::Disk(dir) = self else { return Error::Model(format!("{} is missing", self.path(file))) };
        let expected = "expected a Hugging Face model folder";
        Error::Model(match fs::metadata(dir) {
            Err(e) if e.kind() == ErrorKind::NotFound => {
                format!("{} does not exist: {expected}", dir.display())
            }
            Err(e) => format!("{} cannot be read: {e}", dir.display()),
            Ok(info) if !info.is_dir() => format!("{} is a file: {expected}", dir.display()),
            Ok(_) => {
                let found = match weights_in(dir) {
                    names if names.is_empty() => String::new(),
                    names => format!(", it holds {}", names.join(", ")),
                };
                let expected = match file {
                    SINGLE => {
                        "expected safetensors, in one file or in shards with model.safetensors.index.json"
                    }
                    _ => expected,
                };
                format!("{} has no {file}{found}: {expected}", dir.display())
            }
        })
    }
}

fn embedded(files: &[(&str, &'static [u8])], file: &str) -> Option<&'static [u8]> {
    files.iter().find(|(name, _)| *name == file).map(|&(_, bytes)| bytes)
}

/// A regular file and its bytes' number, `None` if it is not there.
fn open(path: &Path) -> Result<Option<(File, u64)>> {
    let info = match fs::metadata(path) {
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(None),
        info => info.map_err(|e| unreadable(path, e))?,
    };
    // Asked before opening, because opening a pipe would wait for its writer.
    if !info.is_file() {
        return Err(Error::Model(format!("{} is not a regular file", path.display())));
    }
    Ok(Some((File::open(path).map_err(|e| unreadable(path, e))?, info.len())))
}

fn unreadable(path: &Path, e: io::Error) -> Error {
    Error::Model(format!("{} cannot be read: {e}", path.display()))
}

/// Files that look like weights in any format, up to five.
fn weights_in(dir: &Path) -> Vec<String> {
    let weights = ["bin", "ckpt", "gguf", "h5", "msgpack", "npz", "onnx", "pt", "pth", "safetensors"];
    let mut names: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| Path::new(&e.file_name()).extension().is_some_and(|x| weights.iter().any(|w| x == *w)))
        .map(|e| shown(&e.file_name().to_string_lossy()))
        .collect();
    names.sort();
    names.truncate(5);
    names
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    Bf16,
    F16,
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

/// One tensor, row-major, little-endian, in its file's bytes (any alignment).
#[derive(Clone)]
pub struct Tensor {
    file: Bytes,
    range: Range<usize>,
    path: String,
    name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl Tensor {
    /// All bytes, where the file has them.
    ///
    /// # Panics
    /// For drawn weights, which [`Checkpoint::need_files`] is there to find.
    pub fn bytes(&self) -> &[u8] {
        &self.file[self.range.clone()]
    }

    /// Copies the bytes from byte `at` on, reading the file.
    ///
    /// # Errors
    /// [`Error::Model`] with file and tensor where they cannot be read, or the file has become shorter.
    pub fn read(&self, at: usize, to: &mut [u8]) -> Result<()> {
        if at.checked_add(to.len()).is_none_or(|end| end > self.range.len()) {
            let (size, label) = (self.range.len(), self.label());
            return Err(Error::Internal(format!("{label}: {} bytes at {at} of {size}", to.len())));
        }
        self.file.read(self.range.start + at, to).map_err(|e| {
            let label = self.label();
            Error::Model(match e.kind() {
                ErrorKind::UnexpectedEof => {
                    format!("{label} is no longer all there: the file became shorter after it was opened")
                }
                _ => format!("{label} cannot be read: {e}"),
            })
        })
    }

    /// The tensor as a user would name it.
    pub fn label(&self) -> String {
        format!("{}: tensor {}", self.path, shown(&self.name))
    }

    /// The file, and the first byte in it.
    pub fn place(&self) -> (&str, usize) {
        (&self.path, self.range.start)
    }
}

/// All tensors of a folder: `model.safetensors`, or the shards that `model.safetensors.index.json` lists.
///
/// Names are asked for as in dflash.md section 2 (drafter) or as Hugging Face writes them (target); a drafter's other
/// spellings are resolved in [`Checkpoint::tensor`].
pub struct Checkpoint {
    /// What a missing tensor is missing from: the single file or the index.
    source: String,
    /// (path, contents)
    shards: Vec<(String, Bytes)>,
    tensors: BTreeMap<String, Entry>,
}

/// Where one tensor lies; `range` is within its shard's bytes, checked when the header was read.
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
    /// Maps the shards and checks every header; reads no weights.
    pub fn open(folder: &Folder) -> Result<Self> {
        if let Some(bytes) = folder.map(SINGLE)? {
            let mut whole =
                Checkpoint { source: folder.path(SINGLE), shards: vec![], tensors: BTreeMap::new() };
            whole.add(folder.path(SINGLE), bytes)?;
            return Ok(whole);
        }
        let Some(bytes) = folder.file(INDEX)? else { return Err(folder.missing(SINGLE)) };
        let source = folder.path(INDEX);
        let index: Index = serde_json::from_slice(&bytes).map_err(|e| {
            Error::Model(format!("{source} is not an index of shards: {}", shown(&e.to_string())))
        })?;
        let mut all = Checkpoint { source, shards: vec![], tensors: BTreeMap::new() };
        for file in index.weight_map.values().collect::<BTreeSet<_>>() {
            // A plain name, so that an index cannot reach outside its folder.
            let plain = Path::new(file).file_name().is_some_and(|name| name == file.as_str());
            if !plain || file.contains(|c: char| matches!(c, '/' | '\\') || c.is_control()) {
                return Err(Error::Model(format!(
                    "{} lists the shard \"{}\": expected the plain name of a file in the same folder",
                    all.source,
                    shown(file)
                )));
            }
            let Some(bytes) = folder.map(file)? else {
                return Err(Error::Model(format!(
                    "{} lists the shard {}, which is not in the folder",
                    all.source,
                    shown(file)
                )));
            };
            all.add(folder.path(file), bytes)?;
        }
        for (name, file) in &index.weight_map {
            let path = folder.path(file);
            if all.tensors.get(name).is_none_or(|t| all.shards[t.shard].0 != path) {
                return Err(Error::Model(format!(
                    "{} says that {} holds the tensor {}, which it does not",
                    all.source,
                    shown(&path),
                    shown(name)
                )));
            }
        }
        Ok(all)
    }

    /// Weights that no file holds: tensors of these names and shapes, bf16, one after the other, whose bytes are drawn
    /// when they are read. The same for the same shapes and seed, however they are read; they take no memory.
    pub fn drawn(folder: &Folder, tensors: &[(String, Vec<usize>)], seed: u64) -> Checkpoint {
        let path = folder.path("drawn weights");
        let mut size = 0;
        let entry = |(name, shape): &(String, Vec<usize>)| {
            let begin = size;
            size += shape.iter().product::<usize>() * Dtype::Bf16.size();
            (name.clone(), Entry { shard: 0, range: begin..size, dtype: Stored::BF16, shape: shape.clone() })
        };
        let tensors = tensors.iter().map(entry).collect();
        Checkpoint { source: path.clone(), shards: vec![(path, Bytes::Drawn { size, seed })], tensors }
    }

    /// # Errors
    /// [`Error::Unsupported`] for drawn weights: only a device, which copies its weights, can have them.
    pub fn need_files(&self) -> Result<()> {
        match self.shards.iter().any(|(_, bytes)| matches!(bytes, Bytes::Drawn { .. })) {
            true => Err(Error::Unsupported(format!(
                "{} are made for devices and are nowhere in memory: expected a pair with files on the CPU",
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
                    shown(&name),
                    self.shards[other.shard].0
                )));
            }
            let entry = Entry { shard, range, dtype: info.dtype, shape: info.shape.clone() };
            self.tensors.insert(name, entry);
        }
        self.shards.push((path, bytes));
        Ok(())
    }

    /// The tensor of that name, or one of its other spellings, and shape. An error names the file, the tensor, and both shapes.
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

    /// (path, bytes) of every shard, in name order.
    pub fn files(&self) -> Vec<(&str, usize)> {
        let size = |bytes: &Bytes| match bytes {
            Bytes::Drawn { size, .. } => *size,
            bytes => bytes.len(),
        };
        self.shards.iter().map(|(path, bytes)| (path.as_str(), size(bytes))).collect()
    }

    /// (path, addresses) of every shard that is mapped from a file. While the checkpoint is open, a fault at one of these
    /// addresses is that file's.
    pub fn mapped(&self) -> impl Iterator<Item = (&str, Range<usize>)> {
        self.shards.iter().filter_map(|(path, bytes)| match bytes {
            Bytes::Mapped(mapped) => {
                let start = mapped.map.as_ptr().addr();
                Some((path.as_str(), start..start + mapped.map.len()))
            }
            Bytes::Embedded(_) | Bytes::Drawn { .. } => None,
        })
    }

    /// (name, file, dtype, shape) of every tensor in a type that can be used, in name order; for `--plan`.
    pub fn list(&self) -> Vec<(&str, &str, Dtype, &[usize])> {
        self.tensors
            .iter()
            .filter_map(|(name, t)| {
                let path = self.shards[t.shard].0.as_str();
                Some((name.as_str(), path, supported(t.dtype)?, t.shape.as_slice()))
            })
            .collect()
    }

    /// Holds a target's files against the tensors its config implies ([`crate::checkpoint::config::TargetConfig::tensors`]): each is
    /// there in its shape and a usable type, and nothing else is but what cannot change the output.
    pub fn check_target(&self, expected: &[(String, Vec<usize>)]) -> Result<()> {
        for (name, entry) in self.beside(expected) {
            // Older exports keep RoPE's inverse frequencies, position ids and masks; a tied head may be stored twice.
            let buffer = matches!(entry.dtype, Stored::I64 | Stored::BOOL);
            if buffer || name.ends_with(".rotary_emb.inv_freq") || name == "lm_head.weight" {
                continue;
            }
            return Err(self.unknown(name, entry, expected, "this kind of target"));
        }
        self.check_present(expected)
    }

    /// The same for a drafter ([`crate::checkpoint::config::DrafterConfig::tensors`]); other formats that share the container are
    /// recognised by their tensors.
    pub fn check_drafter(&self, expected: &[(String, Vec<usize>)]) -> Result<()> {
        for (name, entry) in self.beside(expected) {
            if name.ends_with("rotary_emb.inv_freq") {
                continue;
            }
            let is = |parts: &[&str]| parts.iter().any(|p| name.split('.').any(|part| part == *p));
            let what = if is(&["candidate_selector", "attention_conv", "mlp_conv"]) {
                "a DFlash2 drafter"
            } else if is(&["embed_tokens", "lm_head", "d2t", "t2d"]) {
                "a drafter with an embedding, head or vocabulary of its own"
            } else {
                return Err(self.unknown(name, entry, expected, "a DFlash drafter"));
            };
            return Err(Error::Unsupported(format!(
                "{}: tensor {} belongs to {what}: this engine runs plain DFlash drafters",
                self.shards[entry.shard].0,
                shown(name)
            )));
        }
        self.check_present(expected)
    }

    fn check_present(&self, expected: &[(String, Vec<usize>)]) -> Result<()> {
        expected.iter().try_for_each(|(name, shape)| self.tensor(name, shape).map(drop))
    }

    /// Tensors that none of the expected names resolves to, in name order.
    fn beside(&self, expected: &[(String, Vec<usize>)]) -> impl Iterator<Item = (&str, &Entry)> {
        let used: HashSet<&str> = expected.iter().filter_map(|(name, _)| Some(self.find(name)?.0)).collect();
        self.tensors.iter().map(|(n, t)| (n.as_str(), t)).filter(move |(n, _)| !used.contains(n))
    }

    fn unknown(&self, name: &str, entry: &Entry, expected: &[(String, Vec<usize>)], who: &str) -> Error {
        let (path, shown_name) = (&self.shards[entry.shard].0, shown(name));
        let layers = expected.iter().filter_map(|(n, _)| layer(n)).max().map_or(0, |last| last + 1);
        if layer(name).is_some_and(|i| i >= layers) {
            return Error::Model(format!(
                "{path}: tensor {shown_name} is of a layer beyond the {layers} of config.json"
            ));
        }
        let quantised = ["qweight", "qzeros", "scales", "g_idx", "absmax", "biases", "input_scale"];
        let last = name.rsplit('.').next().unwrap_or(name);
        if quantised.contains(&last) || last.starts_with("weight_") || name.contains("quant") {
            return Error::Unsupported(format!(
                "{path}: tensor {shown_name} is of a quantised checkpoint, which this engine does not run: expected BF16, F16 or F32 weights"
            ));
        }
        Error::Unsupported(format!("{path}: tensor {shown_name} is not one that {who} has"))
    }

    /// The stored name and place of a tensor. Beside dflash.md's names, drafters are seen with a `model.` prefix and
    /// with llama.cpp's names for the two tensors that make context features.
    fn find(&self, name: &str) -> Option<(&str, &Entry)> {
        let other = match name {
            "fc.weight" => "encoder.fc.weight",
            "hidden_norm.weight" => "encoder.output_norm_enc.weight",
            _ => name,
        };
        [name, &format!("model.{name}"), other, &format!("model.{other}")]
            .into_iter()
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

/// The header of one file and where its data begins. Every tensor lies within the file, without holes or overlaps, and
/// is as long as its shape and type say.
fn read_header(path: &str, file: &Bytes) -> Result<(Metadata, usize)> {
    let bad = |what: String| Error::Model(format!("{path} is not a whole safetensors file: {what}"));
    let read = |at: usize, to: &mut [u8]| {
        file.read(at, to).map_err(|e| Error::Model(format!("{path}: its header cannot be read: {e}")))
    };
    const POINTER: &[u8] = b"version https://git-lfs";
    let mut start = [0; POINTER.len()];
    let most = file.len().min(start.len());
    read(0, &mut start[..most])?;
    if start == POINTER {
        return Err(bad("it is a Git LFS pointer, the weights were not fetched".into()));
    }
    let Some(rest) = file.len().checked_sub(8) else {
        return Err(bad(format!("it has {} bytes, and 8 of header length come first", file.len())));
    };
    let [a, b, c, d, e, f, g, h, ..] = start;
    let size = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    let Some(size) = usize::try_from(size).ok().filter(|&size| size <= rest) else {
        return Err(bad(format!("its header is to be {size} bytes long, and {rest} follow")));
    };
    if size > MAX_HEADER {
        return Err(bad(format!("its header is {size} bytes long, the limit is {MAX_HEADER}")));
    }
    let mut text = vec![0; size];
    read(8, &mut text)?;
    // Not through `SafeTensors::read_metadata`, whose sum of header and data length may overflow.
    let header: Metadata =
        serde_json::from_slice(&text).map_err(|e| bad(format!("its header: {}", shown(&e.to_string()))))?;
    let data = rest - size;
    if header.data_len() != data {
        return Err(bad(format!(
            "its header describes {} bytes of tensors, and {data} follow it",
            header.data_len()
        )));
    }
    Ok((header, 8 + size))
}
