//! Models by their name on the Hugging Face hub: `dflash-gen` with caches of its own.

use crate::support;
use crate::support::program::{Run, command, finish};

use std::fs;
use std::path::{Path, PathBuf};

/// A cache with a snapshot of each model, as `huggingface_hub` writes it, in `ROOT/hub`.
struct Cache {
    root: PathBuf,
    _pair: support::Pair,
}

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

impl Cache {
    fn new() -> Cache {
        let pair = support::write_pair(&Default::default(), &Default::default());
        let root = pair.root.path().to_path_buf();
        for (from, name) in
            [(&pair.target, "models--org--Small-1.5B"), (&pair.drafter, "models--lab--small_dflash")]
        {
            let repository = root.join("hub").join(name);
            fs::create_dir_all(repository.join("snapshots")).unwrap();
            fs::create_dir_all(repository.join("refs")).unwrap();
            fs::write(repository.join("refs/main"), COMMIT).unwrap();
            fs::rename(from, repository.join("snapshots").join(COMMIT)).unwrap();
        }
        Cache { root, _pair: pair }
    }

    fn repository(&self) -> PathBuf {
        self.root.join("hub/models--org--Small-1.5B")
    }

    fn run_with(&self, variable: (&str, &Path), target: &str, draft: &str) -> Run {
        let mut command = command(["--target", target, "--draft", draft, "--raw", "-q", "-n", "4", "def f"]);
        for other in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"] {
            command.env_remove(other);
        }
        command.env(variable.0, variable.1).current_dir(&self.root);
        finish(command)
    }

    fn run(&self, target: &str, draft: &str) -> Run {
        self.run_with(("HF_HUB_CACHE", &self.root.join("hub")), target, draft)
    }

    /// The exit code and the sentence of a refusal, with `ROOT` in place of the folder.
    fn refusal(&self, target: &str) -> (i32, String) {
        let run = self.run(target, "none");
        (run.code, run.err.replace(self.root.to_str().unwrap(), "ROOT"))
    }
}

#[test]
fn names_are_found_in_the_cache_of_every_variable() {
    let cache = Cache::new();
    let expected =
        cache.run("hub/models--org--Small-1.5B/snapshots/0123456789abcdef0123456789abcdef01234567", "none");
    let expected = expected.done();
    assert!(!expected.is_empty());
    fs::create_dir_all(cache.root.join("xdg")).unwrap();
    fs::create_dir_all(cache.root.join("home/.cache")).unwrap();
    std::os::unix::fs::symlink(&cache.root, cache.root.join("xdg/huggingface")).unwrap();
    std::os::unix::fs::symlink(&cache.root, cache.root.join("home/.cache/huggingface")).unwrap();
    for (variable, path) in [
        ("HF_HUB_CACHE", "hub"),
        ("HUGGINGFACE_HUB_CACHE", "hub"),
        ("HF_HOME", ""),
        ("XDG_CACHE_HOME", "xdg"),
        ("HOME", "home"),
    ] {
        let run = cache.run_with((variable, &cache.root.join(path)), "org/Small-1.5B", "lab/small_dflash");
        assert_eq!(run.done(), expected, "{variable}");
    }
}

#[test]
fn a_cache_folder_stands_for_its_current_snapshot() {
    let cache = Cache::new();
    let expected = cache.run("org/Small-1.5B", "none").done();
    let repository = cache.repository();
    let path = repository.to_str().unwrap();
    let same = |target: &str| assert_eq!(cache.run(target, "none").done(), expected, "{target}");
    same(path);
    same(&format!("{path}/"));
    same(&format!("{path}/snapshots"));
    same(&format!("{path}/snapshots/{COMMIT}/.."));
    // refs/main decides among several snapshots.
    fs::create_dir(repository.join("snapshots/aaaa")).unwrap();
    same(path);
    fs::write(repository.join("refs/main"), format!("{COMMIT}\n")).unwrap();
    same(path);
    // Without it, only one snapshot is no question.
    fs::remove_file(repository.join("refs/main")).unwrap();
    let several = "dflash-gen: ROOT/hub/models--org--Small-1.5B is a cache folder with several snapshots and without \
                   refs/main: `hf download org/Small-1.5B` downloads it\n";
    assert_eq!(cache.refusal("org/Small-1.5B"), (3, several.into()));
    fs::remove_dir(repository.join("snapshots/aaaa")).unwrap();
    same("org/Small-1.5B");
    // A folder of the same name comes first.
    fs::create_dir_all(cache.root.join("org/Small-1.5B")).unwrap();
    let local = "dflash-gen: org/Small-1.5B has no config.json: expected a Hugging Face model folder\n";
    assert_eq!(cache.refusal("org/Small-1.5B"), (3, local.into()));
}

#[test]
fn absent_models_are_refused_with_the_command_that_downloads_them() {
    let cache = Cache::new();
    let repository = cache.repository();
    let expect = |target: &str, sentence: &str| {
        assert_eq!(cache.refusal(target), (3, format!("dflash-gen: {sentence}\n")), "{target}");
    };
    expect(
        "Qwen/Qwen3-4B",
        "Qwen/Qwen3-4B is neither a folder nor a model in the Hugging Face cache ROOT/hub: `hf download Qwen/Qwen3-4B` \
         downloads it",
    );
    expect("nothing", "nothing does not exist: expected a Hugging Face model folder");
    expect("./a/b", "./a/b does not exist: expected a Hugging Face model folder");
    let downloads = "`hf download org/Small-1.5B` downloads it";
    let folder = "ROOT/hub/models--org--Small-1.5B is a cache folder";
    let path = repository.to_str().unwrap();
    // A commit is a plain name: a file of the cache cannot lead to another folder.
    for (commit, what) in [
        ("ffff", "without the snapshot of refs/main"),
        ("v1.0", "without the snapshot of refs/main"),
        ("../../elsewhere", "whose refs/main names no snapshot"),
        ("..", "whose refs/main names no snapshot"),
        ("\n", "whose refs/main names no snapshot"),
    ] {
        fs::write(repository.join("refs/main"), commit).unwrap();
        expect("org/Small-1.5B", &format!("{folder} {what}: {downloads}"));
    }
    fs::write(repository.join("refs/main"), COMMIT).unwrap();
    fs::remove_file(repository.join("snapshots").join(COMMIT).join("config.json")).unwrap();
    expect(path, &format!("{folder} whose snapshot has no config.json: {downloads}"));
    let snapshot = repository.join("snapshots").join(COMMIT);
    std::os::unix::fs::symlink("nowhere", snapshot.join("config.json")).unwrap();
    let link =
        format!("ROOT/hub/models--org--Small-1.5B/snapshots/{COMMIT}/config.json is a link to a file that");
    expect(
        snapshot.to_str().unwrap(),
        &format!("{link} does not exist: expected a Hugging Face model folder"),
    );
    fs::remove_dir_all(repository.join("snapshots")).unwrap();
    fs::remove_dir_all(repository.join("refs")).unwrap();
    expect(path, &format!("{folder} without a snapshot: {downloads}"));
    expect("org/Small-1.5B", &format!("{folder} without a snapshot: {downloads}"));
}
