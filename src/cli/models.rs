//! `--target` and `--draft`.

use crate::Result;
use crate::checkpoint::folder::{DEMO_DRAFTER, DEMO_TARGET, Folder};
use crate::checkpoint::pair::{DraftSource, Lookup, Pair};
use crate::cli::terminal::note;
use crate::cli::{hub, published};
use std::path::Path;

/// Whether these flags leave no drafter: `--draft none`, or a target without `--draft`.
pub fn no_drafter(target: Option<&Path>, draft: Option<&Path>) -> bool {
    draft.map_or(target.is_some(), |draft| draft.as_os_str() == "none")
}

/// The drafts without a drafter that `--draft` names.
fn lookup(draft: Option<&Path>) -> Option<Lookup> {
    let all = [Lookup::NGRAM, Lookup::SUFFIX];
    all.into_iter().find(|lookup| draft.is_some_and(|draft| draft.as_os_str() == lookup.name()))
}

/// What `--draft` is where no drafter is loaded: none, or the name of drafts without one.
pub fn without_drafter(target: Option<&Path>, draft: Option<&Path>) -> Option<&'static str> {
    let none = no_drafter(target, draft).then_some("none");
    none.or_else(|| lookup(draft).map(Lookup::name))
}

/// The folder of the target and what drafts: the demo pair without flags.
///
/// # Errors
/// As [`hub::folder`].
pub fn folders(target: Option<&Path>, draft: Option<&Path>) -> Result<(Folder, DraftSource<Folder>)> {
    let source = match (lookup(draft), draft) {
        (Some(lookup), _) => DraftSource::Lookup(lookup),
        _ if no_drafter(target, draft) => DraftSource::None,
        (None, Some(draft)) => DraftSource::Drafter(hub::folder(draft)?),
        (None, None) => DraftSource::Drafter(DEMO_DRAFTER),
    };
    Ok((target.map_or(Ok(DEMO_TARGET), hub::folder)?, source))
}

/// Says on stderr that nothing is drafted, and which published drafter fits the target's shape.
pub fn note_missing_drafter(pair: &Pair) {
    let fits = match published::drafter_for(&pair.target.config) {
        Some(name) => format!("{name} is published for targets of this shape, others are in docs/cli.md"),
        None => "docs/cli.md lists published drafters".into(),
    };
    note(&format!("no --draft, so autoregressive decoding: {fits}"));
}
