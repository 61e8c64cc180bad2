//! Checkpoint folders: on disk (memory-mapped) or embedded in the binary. Tensors stay in their files' bytes and
//! types; nothing is copied or converted here.

use crate::Result;
use std::path::PathBuf;

/// Bytes of one file: mapped, embedded, or read. Cheap to clone.
#[derive(Clone)]
pub enum Bytes {
    Mapped(std::sync::Arc<memmap2::Mmap>),
    Embedded(&'static [u8]),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Embedded(bytes) => bytes,
        }
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
        ("config.json", include_bytes!("../demo/target/config.json")),
        ("generation_config.json", include_bytes!("../demo/target/generation_config.json")),
        ("tokenizer.json", include_bytes!("../demo/target/tokenizer.json")),
        ("tokenizer_config.json", include_bytes!("../demo/target/tokenizer_config.json")),
        ("model.safetensors", include_bytes!("../demo/target/model.safetensors")),
    ],
};

/// The demo pair's drafter, embedded.
pub const DEMO_DRAFTER: Folder = Folder::Embedded {
    name: "demo/drafter",
    files: &[
        ("config.json", include_bytes!("../demo/drafter/config.json")),
        ("model.safetensors", include_bytes!("../demo/drafter/model.safetensors")),
    ],
};

impl Folder {
    /// The file as a user would name it: `DIR/file`.
    pub fn path(&self, _file: &str) -> String {
        unimplemented!()
    }

    /// The file's bytes, `None` if it is not there. A file that cannot be read is an error.
    pub fn file(&self, _file: &str) -> Result<Option<Bytes>> {
        unimplemented!()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    Bf16,
    F16,
    F32,
}

/// One tensor, row-major, little-endian, in its file's bytes (any alignment).
#[derive(Clone)]
pub struct Tensor {
    file: Bytes,
    range: std::ops::Range<usize>,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl Tensor {
    pub fn bytes(&self) -> &[u8] {
        &self.file[self.range.clone()]
    }
}

/// All tensors of a folder: `model.safetensors`, or the shards that `model.safetensors.index.json` lists.
pub struct Checkpoint {}

impl Checkpoint {
    /// Maps the shards and checks every header; reads no weights.
    pub fn open(_folder: &Folder) -> Result<Self> {
        unimplemented!()
    }

    /// The tensor of that name and shape. An error names the file, the tensor, and both shapes.
    pub fn tensor(&self, _name: &str, _shape: &[usize]) -> Result<Tensor> {
        unimplemented!()
    }

    /// Whether a tensor of that name is there.
    pub fn has(&self, _name: &str) -> bool {
        unimplemented!()
    }

    /// (name, file, dtype, shape) of every tensor, in name order; for `--plan` and for refusing unknown names.
    pub fn list(&self) -> Vec<(&str, &str, Dtype, &[usize])> {
        unimplemented!()
    }
}
