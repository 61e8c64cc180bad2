//! Models by their name on the Hugging Face hub: folders of the local cache. Nothing is downloaded.

use crate::checkpoint::folder::Folder;
use crate::{Error, Result};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

/// The folder of a model: `path` itself, the current snapshot if it is a model's folder of the cache, or the
/// current snapshot of the model with this name if no such path exists.
///
/// # Errors
/// [`Error::Model`] for a name that the cache does not hold, and for a cache folder without a snapshot.
pub fn folder(path: &Path) -> Result<Folder> {
    if path.is_dir() {
        let resolved = fs::canonicalize(path).unwrap_or_else(|_| path.into());
        // A path to `snapshots` itself is a common slip.
        let repository = resolved.parent().filter(|_| resolved.ends_with("snapshots")).unwrap_or(&resolved);
        return match name_of(repository) {
            Some(name) if !path.join("config.json").exists() => snapshot(repository, &name),
            _ => Ok(Folder::Disk(path.into())),
        };
    }
    let Some(name) = path.to_str().filter(|name| !path.exists() && is_name(name)) else {
        return Ok(Folder::Disk(path.into()));
    };
    let cache = cache(&|variable| std::env::var_os(variable));
    let repository = cache.as_ref().map(|cache| cache.join(format!("models--{}", name.replace('/', "--"))));
    match (repository, cache) {
        (Some(repository), _) if repository.is_dir() => snapshot(&repository, name),
        // A word without a slash is a folder with a typing error rather than a model.
        (_, Some(cache)) if name.contains('/') => Err(Error::Model(format!(
            "{name} is neither a folder nor a model in the Hugging Face cache {}: `hf download {name}` downloads it",
            cache.display()
        ))),
        _ => Ok(Folder::Disk(path.into())),
    }
}

/// The model's name, if a folder is named as those of the cache are.
fn name_of(folder: &Path) -> Option<String> {
    let name = folder.file_name()?.to_str()?.strip_prefix("models--")?.replace("--", "/");
    is_name(&name).then_some(name)
}

/// Whether a text may be a model's name on the hub: `name` or `owner/name`.
fn is_name(text: &str) -> bool {
    let valid = |part: &str| {
        let edge = |c: char| matches!(c, '-' | '.');
        part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
            && !part.is_empty()
            && !part.starts_with(edge)
            && !part.ends_with(edge)
            && !part.contains("--")
            && !part.contains("..")
    };
    text.len() <= 200 && text.split('/').count() <= 2 && text.split('/').all(valid)
}

/// The current snapshot in a model's folder of the cache: the commit that `refs/main` names or, without that
/// file, the only snapshot.
fn snapshot(repository: &Path, name: &str) -> Result<Folder> {
    let snapshots = repository.join("snapshots");
    let missing = |what: &str| {
        let folder = repository.display();
        Err(Error::Model(format!("{folder} {what}: `hf download {name}` downloads it")))
    };
    let current = match main_commit(repository) {
        Some(commit) => snapshots.join(commit),
        None => {
            let mut folders = fs::read_dir(&snapshots)
                .into_iter()
                .flatten()
                .flatten()
                .map(|entry| entry.path())
                .filter(|path| path.is_dir());
            match (folders.next(), folders.next()) {
                (Some(only), None) => only,
                (None, _) => return missing("is a cache folder without a snapshot"),
                (Some(_), Some(_)) => {
                    return missing("is a cache folder with several snapshots and without refs/main");
                }
            }
        }
    };
    match current.join("config.json").is_file() {
        true => Ok(Folder::Disk(current)),
        false if current.is_dir() => missing("is a cache folder whose snapshot has no config.json"),
        false => missing("is a cache folder without the snapshot of refs/main"),
    }
}

/// The commit in `refs/main`; `None` if the file is absent or does not hold a commit.
fn main_commit(repository: &Path) -> Option<String> {
    let mut text = String::new();
    let path = repository.join("refs/main");
    if !path.is_file() {
        return None;
    }
    File::open(path).ok()?.take(100).read_to_string(&mut text).ok()?;
    let commit = text.trim();
    (!commit.is_empty() && commit.chars().all(|c| c.is_ascii_alphanumeric())).then(|| commit.to_string())
}

/// The cache's folder, by the rules of the package `huggingface_hub`. `None` without a home folder.
fn cache(variable: &dyn Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let home = || variable("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    let folder = |name: &str| {
        let path = PathBuf::from(variable(name).filter(|value| !value.is_empty())?);
        match path.strip_prefix("~") {
            Ok(rest) => Some(home()?.join(rest)),
            Err(_) => Some(path),
        }
    };
    folder("HF_HUB_CACHE")
        .or_else(|| folder("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| Some(folder("HF_HOME")?.join("hub")))
        .or_else(|| Some(folder("XDG_CACHE_HOME")?.join("huggingface/hub")))
        .or_else(|| Some(home()?.join(".cache/huggingface/hub")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_where_hugging_face_puts_it() {
        let with = |set: &[(&str, &str)]| {
            let get =
                |name: &str| set.iter().find(|(n, _)| *n == name).map(|(_, value)| OsString::from(value));
            cache(&get).map(|path| path.display().to_string())
        };
        assert_eq!(with(&[]), None);
        assert_eq!(with(&[("HOME", "/u")]).unwrap(), "/u/.cache/huggingface/hub");
        assert_eq!(with(&[("HOME", "/u"), ("XDG_CACHE_HOME", "/x")]).unwrap(), "/x/huggingface/hub");
        let all = [
            ("HF_HUB_CACHE", "~/c"),
            ("HUGGINGFACE_HUB_CACHE", "/old"),
            ("HF_HOME", "/h"),
            ("XDG_CACHE_HOME", "/x"),
            ("HOME", "/u"),
        ];
        assert_eq!(with(&all).unwrap(), "/u/c");
        assert_eq!(with(&all[1..]).unwrap(), "/old");
        assert_eq!(with(&all[2..]).unwrap(), "/h/hub");
        assert_eq!(with(&[("HF_HOME", ""), ("HOME", "/u")]).unwrap(), "/u/.cache/huggingface/hub");
    }

    #[test]
    fn names_of_the_hub_are_told_from_paths() {
        for name in ["Qwen/Qwen3-4B", "z-lab/Qwen3-4B-DFlash-b16", "gpt2", "a/b_c.d"] {
            assert!(is_name(name), "{name}");
        }
        for path in
            ["", "/a/b", "./a", "../a", "a/b/c", "a//b", "a/", "a/b--c", "a/-b", "a b/c", "a/..", "~/a"]
        {
            assert!(!is_name(path), "{path}");
        }
    }
}
