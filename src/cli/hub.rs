//! Models by their name on the Hugging Face hub: folders of the local cache. Nothing is downloaded.

use crate::checkpoint::folder::Folder;
use crate::error::excerpt;
use crate::{Error, Result};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

/// The folder of a model: `path` itself, the current snapshot if it is a model's folder of the cache, or the
/// current snapshot of the model with this name if no such path exists.
///
/// # Errors
/// [`Error::Model`] for a name that the cache does not hold, and for a cache folder without a snapshot;
/// [`Error::Usage`] for a variable that gives no path of a cache.
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
    let cache = cache(&|variable| std::env::var_os(variable))?;
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
        part.len() <= 96
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
            && !part.is_empty()
            && !part.starts_with(edge)
            && !part.ends_with(edge)
            && !part.contains("--")
            && !part.contains("..")
    };
    text.split('/').count() <= 2 && text.split('/').all(valid) && !text.ends_with(".git")
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
        Some(commit) if is_name(&commit) && !commit.contains('/') => snapshots.join(commit),
        Some(_) => return missing("is a cache folder whose refs/main names no snapshot"),
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

/// The text of `refs/main`, empty if it cannot be read; `None` if there is no such file.
fn main_commit(repository: &Path) -> Option<String> {
    let path = repository.join("refs/main");
    let info = fs::metadata(&path).ok()?;
    let mut text = Vec::new();
    if info.is_file() {
        File::open(path).and_then(|file| file.take(200).read_to_end(&mut text)).ok();
    }
    Some(String::from_utf8_lossy(&text).trim().to_string())
}

/// The cache's folder, by the rules of the package `huggingface_hub`, except that an empty variable counts as
/// absent. `None` without a home folder.
///
/// # Errors
/// [`Error::Usage`] for a path that begins with `~` and a user's name.
fn cache(variable: &dyn Fn(&str) -> Option<OsString>) -> Result<Option<PathBuf>> {
    let value = |name: &str| Some(PathBuf::from(variable(name).filter(|value| !value.is_empty())?));
    let home = value("HF_HOME")
        .or_else(|| Some(value("XDG_CACHE_HOME")?.join("huggingface")))
        .or_else(|| Some(value("HOME")?.join(".cache/huggingface")))
        .map(|path| expanded(path, variable))
        .transpose()?;
    value("HF_HUB_CACHE")
        .or_else(|| value("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| Some(home?.join("hub")))
        .map(|path| expanded(path, variable))
        .transpose()
}

/// The path with the home folder for `~` at its start, and with values for `$NAME` and `${NAME}`. Unknown
/// variables stay as they are, and values are not expanded again, as in Python.
fn expanded(path: PathBuf, variable: &dyn Fn(&str) -> Option<OsString>) -> Result<PathBuf> {
    let Some(text) = path.to_str() else { return Ok(path) };
    let mut out = OsString::new();
    let mut rest = text;
    if let Some(after) = text.strip_prefix('~') {
        let home = variable("HOME").filter(|_| after.is_empty() || after.starts_with('/'));
        let home = home.ok_or_else(|| {
            let what = "this engine finds a home folder only by HOME and ~/, expected a whole path";
            Error::Usage(format!("the Hugging Face cache is {}, but {what}", excerpt(text)))
        })?;
        out.push(home);
        rest = after;
    }
    while let Some((before, after)) = rest.split_once('$') {
        out.push(before);
        let word = after.find(|c: char| c != '_' && !c.is_ascii_alphanumeric()).unwrap_or(after.len());
        let (name, end) = match after.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
            Some((name, _)) => (name, name.len() + 2),
            None => (&after[..word], word),
        };
        match variable(name).filter(|_| !name.is_empty()) {
            Some(value) => out.push(value),
            None => out.push(&rest[before.len()..before.len() + 1 + end]),
        }
        rest = &after[end..];
    }
    out.push(rest);
    Ok(out.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_where_hugging_face_puts_it() {
        // From Python: huggingface_hub.constants.HF_HUB_CACHE with these variables.
        let cases: &[(&str, &[(&str, &str)])] = &[
            ("/u/.cache/huggingface/hub", &[("HOME", "/u")]),
            ("/x/huggingface/hub", &[("HOME", "/u"), ("XDG_CACHE_HOME", "/x")]),
            ("/h/hub", &[("HF_HOME", "/h"), ("XDG_CACHE_HOME", "/x"), ("HOME", "/u")]),
            ("/old", &[("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HOME", "/h"), ("HOME", "/u")]),
            ("/c", &[("HF_HUB_CACHE", "/c"), ("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HOME", "/h")]),
            ("/u/c", &[("HF_HUB_CACHE", "~/c"), ("HOME", "/u")]),
            ("/u/old", &[("HUGGINGFACE_HUB_CACHE", "~/old"), ("HOME", "/u")]),
            ("/u/hub", &[("HF_HOME", "~"), ("HOME", "/u")]),
            ("/u/x/huggingface/hub", &[("XDG_CACHE_HOME", "~/x"), ("HOME", "/u")]),
            ("a~/hub", &[("HF_HOME", "a~"), ("HOME", "/u")]),
            ("/d/a/hub", &[("HF_HOME", "$A_1/a"), ("A_1", "/d")]),
            ("/d/ax-/d/hub", &[("HF_HOME", "${A}/ax-$A"), ("A", "/d")]),
            ("/dé/hub", &[("HF_HOME", "$Aé"), ("A", "/d")]),
            ("/dhub", &[("HF_HUB_CACHE", "/d${A}hub"), ("A", "")]),
            ("$B/${A/$/${}/x-b", &[("HF_HUB_CACHE", "$B/${A/$/${}/$A-b"), ("A", "x")]),
            ("${}/$/$q}${A/hub", &[("HF_HOME", "${}/$/$${A}}${A"), ("A", "q")]),
            ("$B/c", &[("HF_HUB_CACHE", "$A/c"), ("A", "$B"), ("B", "x")]),
            // The default of HF_HUB_CACHE is expanded again.
            ("/u/x/hub", &[("HF_HOME", "$A"), ("A", "~/$B"), ("B", "x"), ("HOME", "/u")]),
            // Not as in Python, which takes the working folder.
            ("/u/.cache/huggingface/hub", &[("HF_HOME", ""), ("HF_HUB_CACHE", ""), ("HOME", "/u")]),
        ];
        for (expected, set) in cases {
            let get =
                |name: &str| set.iter().find(|(n, _)| *n == name).map(|(_, value)| OsString::from(value));
            assert_eq!(cache(&get).unwrap(), Some(expected.into()), "{set:?}");
        }
        assert_eq!(cache(&|_| None).unwrap(), None);
        for path in ["~", "~/a", "~bob/a"] {
            let sentence = format!(
                "the Hugging Face cache is {path}, but this engine finds a home folder only by HOME and ~/, expected \
                 a whole path"
            );
            let get = |name: &str| (name == "HF_HOME").then(|| path.into());
            assert_eq!(cache(&get), Err(Error::Usage(sentence)));
        }
    }

    #[test]
    fn names_of_the_hub_are_told_from_paths() {
        for name in ["Qwen/Qwen3-4B", "z-lab/Qwen3-4B-DFlash-b16", "gpt2", "a/b_c.d"] {
            assert!(is_name(name), "{name}");
        }
        let long = "x".repeat(97);
        for path in [
            &*long, "", "/a/b", "a.git", "a/b.git", "./a", "../a", "a/b/c", "a//b", "a/", "a/b--c", "a/-b",
            "a b/c", "a/..", "~/a",
        ] {
            assert!(!is_name(path), "{path}");
        }
    }
}
