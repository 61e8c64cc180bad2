//! The source of a model's files: a Hugging Face folder on disk, with memory-mapped weights, or files
//! embedded in the binary.

use crate::checkpoint::random_weights::random_bytes;
use crate::error::excerpt;
use crate::{Error, Result};
use std::borrow::Cow;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The contents of one file of weights. Cheap to clone.
#[derive(Clone)]
pub(crate) enum Bytes {
    /// A file on disk.
    Mapped(Arc<Mapped>),
    /// A file in the binary.
    Embedded(&'static [u8]),
    /// Bytes that were arranged in memory.
    Owned(Arc<[u8]>),
    /// `size` bytes that are computed whenever they are read ([`random_bytes`]).
    Random { size: usize, seed: u64 },
}

/// A mapped file. The file stays open, so this checkpoint is not affected if another file gets its name.
pub(crate) struct Mapped {
    pub(crate) map: memmap2::Mmap,
    file: File,
}

impl Bytes {
    /// Number of bytes.
    pub(crate) fn size(&self) -> usize {
        match self {
            Bytes::Mapped(mapped) => mapped.map.len(),
            Bytes::Embedded(bytes) => bytes.len(),
            Bytes::Owned(bytes) => bytes.len(),
            Bytes::Random { size, .. } => *size,
        }
    }

    /// All bytes as a slice. For random bytes the slice is empty, because they are not in memory.
    pub(crate) fn slice(&self) -> &[u8] {
        match self {
            Bytes::Mapped(mapped) => &mapped.map,
            Bytes::Embedded(bytes) => bytes,
            Bytes::Owned(bytes) => bytes,
            Bytes::Random { .. } => &[],
        }
    }

    /// Copies `to.len()` bytes from byte `at` on. Reads the file, not its mapping: if the file became
    /// shorter, this is an error, whereas reading the mapping would raise SIGBUS.
    pub(crate) fn read(&self, at: usize, to: &mut [u8]) -> io::Result<()> {
        match self {
            Bytes::Mapped(mapped) => mapped.file.read_exact_at(to, at as u64),
            Bytes::Random { seed, .. } => {
                random_bytes(*seed, at, to);
                Ok(())
            }
            Bytes::Embedded(_) | Bytes::Owned(_) => {
                match self.slice().get(at..).and_then(|rest| rest.get(..to.len())) {
                    Some(from) => {
                        to.copy_from_slice(from);
                        Ok(())
                    }
                    None => Err(ErrorKind::UnexpectedEof.into()),
                }
            }
        }
    }
}

/// A Hugging Face checkpoint folder.
#[derive(Debug, Clone)]
pub enum Folder {
    /// A folder on disk.
    Disk(PathBuf),
    /// Files compiled into the binary.
    Embedded {
        /// The folder's name in errors and records.
        name: &'static str,
        /// (file name, contents)
        files: &'static [(&'static str, &'static [u8])],
    },
}

/// The target of the demo pair, embedded in the binary: a small Qwen3-style model trained on Python source.
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

/// The DFlash drafter of the demo pair, embedded in the binary.
pub const DEMO_DRAFTER: Folder = Folder::Embedded {
    name: "demo/drafter",
    files: &[
        ("config.json", include_bytes!("../../demo/drafter/config.json")),
        ("model.safetensors", include_bytes!("../../demo/drafter/model.safetensors")),
    ],
};

/// Configs of published pairs, without weights: (name, target, drafter). They are for measurements with
/// random weights.
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

/// Maximum bytes of a text file of a model. The tokenizer is the largest one.
const MAX_TEXT: usize = 100_000_000;

impl Folder {
    /// The path of a file, for errors: `DIR/file`.
    pub fn path(&self, file: &str) -> String {
        match self {
            Folder::Disk(dir) => dir.join(file).display().to_string(),
            Folder::Embedded { name, .. } => format!("{name}/{file}"),
        }
    }

    /// A file of the folder, for sentences: its path, or for example "config.json of the built-in demo
    /// target".
    pub fn described_file(&self, file: &str) -> String {
        match self {
            Folder::Disk(_) => self.path(file),
            Folder::Embedded { .. } => format!("{file} of {}", self.described()),
        }
    }

    /// The folder, for sentences: its path, or for example "the built-in demo target".
    pub fn described(&self) -> String {
        match self {
            Folder::Disk(dir) => dir.display().to_string(),
            Folder::Embedded { name, .. } => format!("the built-in {}", name.replace('/', " ")),
        }
    }

    /// The folder's name in records and titles: its path, or for example "demo/target".
    pub fn name(&self) -> String {
        match self {
            Folder::Disk(dir) => dir.display().to_string(),
            Folder::Embedded { name, .. } => name.to_string(),
        }
    }

    /// The bytes of a text file; `None` if the file does not exist.
    ///
    /// # Errors
    /// [`Error::Model`] if the file cannot be read, becomes shorter while it is read, or has more than 100
    /// MB; [`Error::Memory`] if it does not fit into memory.
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

    /// As [`Folder::file`], for a file that must exist.
    ///
    /// # Errors
    /// As [`Folder::file`]; [`Error::Model`] if the file does not exist, with what the folder holds instead.
    pub fn need(&self, file: &str) -> Result<Cow<'static, [u8]>> {
        self.file(file)?.ok_or_else(|| self.missing(file))
    }

    /// Maps a file of weights without reading it; `None` if the file does not exist.
    pub(crate) fn map(&self, file: &str) -> Result<Option<Bytes>> {
        let dir = match self {
            Folder::Disk(dir) => dir,
            Folder::Embedded { files, .. } => return Ok(embedded(files, file).map(Bytes::Embedded)),
        };
        let path = dir.join(file);
        let Some((file, size)) = open(&path)? else { return Ok(None) };
        if size == 0 {
            return Ok(Some(Bytes::Embedded(&[])));
        }
        // SAFETY: the mapping is read-only and private to this process. The file must not change while the
        // mapping is in use, as in every engine that maps its weights. If the file becomes shorter, reading
        // the missing bytes raises SIGBUS; a handler finds the file by the address (`Checkpoint::mapped`).
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| unreadable(&path, e))?;
        Ok(Some(Bytes::Mapped(Arc::new(Mapped { map, file }))))
    }

    /// The error for a missing file that must exist. It says whether the folder exists and which weights it
    /// holds instead.
    pub(crate) fn missing(&self, file: &str) -> Error {
        let Folder::Disk(dir) = self else { return Error::Model(format!("{} is missing", self.path(file))) };
        let expected = "expected a Hugging Face model folder";
        Error::Model(match fs::metadata(dir) {
            Err(e) if e.kind() == ErrorKind::NotFound => {
                format!("{} does not exist: {expected}", dir.display())
            }
            Err(e) => format!("{} cannot be read: {e}", dir.display()),
            Ok(info) if !info.is_dir() => format!("{} is a file: {expected}", dir.display()),
            Ok(_) if dir.join(file).is_symlink() => {
                format!("{} is a link to a file that does not exist: {expected}", self.path(file))
            }
            Ok(_) => {
                let found = match weights_in(dir) {
                    names if names.is_empty() => String::new(),
                    names => format!(", it holds {}", names.join(", ")),
                };
                let expected = match file {
                    "model.safetensors" => {
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

/// Opens a regular file: (file, size in bytes); `None` if it does not exist.
fn open(path: &Path) -> Result<Option<(File, u64)>> {
    let info = match fs::metadata(path) {
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(None),
        info => info.map_err(|e| unreadable(path, e))?,
    };
    // Checked before the file is opened, because opening a pipe would block until it has a writer.
    if !info.is_file() {
        return Err(Error::Model(format!("{} is not a regular file", path.display())));
    }
    Ok(Some((File::open(path).map_err(|e| unreadable(path, e))?, info.len())))
}

fn unreadable(path: &Path, e: io::Error) -> Error {
    Error::Model(format!("{} cannot be read: {e}", path.display()))
}

/// Names of files that look like weights in any format, at most five.
fn weights_in(dir: &Path) -> Vec<String> {
    let weights = ["bin", "ckpt", "gguf", "h5", "msgpack", "npz", "onnx", "pt", "pth", "safetensors"];
    let mut names: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| Path::new(&e.file_name()).extension().is_some_and(|x| weights.iter().any(|w| x == *w)))
        .map(|e| excerpt(&e.file_name().to_string_lossy()))
        .collect();
    names.sort();
    names.truncate(5);
    names
}
