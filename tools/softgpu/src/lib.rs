//! A GPU in software: runs CUDA programs without a card.
//!
//! | module | owns |
//! | --- | --- |
//! | [`ptx`] | PTX text to kernels: a new opcode starts in `ptx/decode.rs` |
//! | [`machine`] | execution, schedules, checks of every access, counters |
//! | [`memory`] | the global address space |
//! | [`card`], [`settings`] | the GPUs that it can be, and the variables that choose |
//! | `driver` | the CUDA driver API, in the cdylib that takes the place of `libcuda.so.1` |

pub mod card;
mod driver;
pub mod machine;
pub mod memory;
pub mod ptx;
pub mod settings;

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

/// A folder in which the names of the CUDA driver lead to the software GPU: a program with the folder in its
/// `LD_LIBRARY_PATH` finds it, no other does. It is made beside the program that asks, which must be in a folder
/// of cargo's: `target/PROFILE`, or `target/PROFILE/deps` as tests are.
///
/// # Errors
/// The library is not there, or the folder cannot be made.
pub fn driver_folder() -> io::Result<PathBuf> {
    let program = env::current_exe()?;
    let beside = program.parent().unwrap_or(Path::new("/"));
    // Cargo builds the library in `deps`, and links it to its place beside programs only when it is asked for
    // the library.
    let places = ["deps/libsoftgpu.so", "libsoftgpu.so"].map(|name| beside.join(name));
    let Some(library) = places.iter().find(|place| place.exists()) else {
        let sentence = format!("{} does not exist", places[1].display());
        return Err(io::Error::new(io::ErrorKind::NotFound, sentence));
    };
    let folder = beside.join("softgpu-driver");
    fs::create_dir_all(&folder)?;
    for name in ["libcuda.so", "libcuda.so.1"] {
        let link = folder.join(name);
        if fs::read_link(&link).ok().as_ref() != Some(library) {
            // Another process or thread may use or make the link at this moment.
            let thread = std::thread::current().id();
            let new = folder.join(format!("{name}.{}.{thread:?}", std::process::id()));
            symlink(library, &new)?;
            fs::rename(&new, &link)?;
        }
    }
    Ok(folder)
}
