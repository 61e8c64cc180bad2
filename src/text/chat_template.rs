//! Chat templates: which one a conversation gets, what it reads, and its rendering.
//!
//! A template comes with a checkpoint and is untrusted. Its length and the number of instructions per
//! rendering are bounded, and so are the texts that it makes. A value may hold another one twice, and so on,
//! as in Python; comparisons of such values count as many instructions.

use crate::checkpoint::folder::Folder;
use crate::checkpoint::json::LFS_POINTER;
use crate::error::{excerpt, one_line};
use crate::text::jinja::source::Source;
use crate::text::jinja::{self, Raised};
use crate::text::untrusted::{TEMPLATE_STACKS, guarded};
use crate::{Error, Result};
use minijinja::value::{Serde, Value};
use minijinja::{Environment, ErrorKind};
use std::collections::BTreeSet;

/// The file of the template for conversations with tools.
const TOOL_USE_FILE: &str = "additional_chat_templates/tool_use.jinja";

/// The chat templates of a target.
pub(crate) struct ChatTemplates {
    /// (name, template), as Hugging Face names them: `default`, and perhaps `tool_use` and others. A fault of
    /// a template is an error only when the template is used.
    named: Vec<(String, Result<Template>)>,
    /// The end of the error for an absent template, which names the places where it could be.
    absent: String,
}

impl ChatTemplates {
    /// Finds the templates as Hugging Face does: `given` (name in errors, source), or the files of the
    /// folder, or else `field`, the field `chat_template` of `tokenizer_config.json`.
    ///
    /// # Errors
    /// [`Error::Usage`] if the given template does not parse.
    pub(crate) fn open(
        folder: &Folder,
        field: Option<serde_json::Value>,
        given: Option<(&str, String)>,
    ) -> Result<Self> {
        let config = folder.path("tokenizer_config.json");
        let files = [("default", "chat_template.jinja"), ("tool_use", TOOL_USE_FILE)];
        let absent = format!("is absent, and neither {} nor {config} has one", folder.path(files[0].1));
        if let Some((name, source)) = given {
            let template = Template::parse(name.into(), source, true)?;
            return Ok(ChatTemplates { named: vec![("default".into(), Ok(template))], absent });
        }
        let read = |file: &str| -> Result<Option<Template>> {
            let Some(bytes) = folder.file(file)? else { return Ok(None) };
            let path = folder.path(file);
            if bytes.starts_with(LFS_POINTER) {
                let what = "is a Git LFS pointer, the file itself was not fetched";
                return Err(Error::Model(format!("{path} {what}")));
            }
            let source =
                std::str::from_utf8(&bytes).map_err(|e| Error::Model(format!("{path} is not UTF-8: {e}")))?;
            Template::parse(path, source.into(), false).map(Some)
        };
        let mut named: Vec<(String, Result<Template>)> = files
            .into_iter()
            .filter_map(|(name, file)| Some((name.into(), read(file).transpose()?)))
            .collect();
        if named.is_empty() {
            let path = format!("{config}: chat_template");
            named = match field_templates(field) {
                Some(sources) => sources
                    .into_iter()
                    .map(|(name, source)| (name, Template::parse(path.clone(), source, false)))
                    .collect(),
                None => {
                    let what = format!("{path} is neither a string nor a list of {{name, template}}");
                    vec![("default".into(), Err(Error::Model(what)))]
                }
            };
        }
        Ok(ChatTemplates { named, absent })
    }

    /// Whether there are no templates at all, valid or not.
    pub(crate) fn is_empty(&self) -> bool {
        self.named.is_empty()
    }

    /// The template for a conversation: `tool_use` for one with tools if there is such a template, else
    /// `default`.
    ///
    /// # Errors
    /// [`Error::Option`] if there is no such template; the template's own fault.
    pub(crate) fn pick(&self, with_tools: bool) -> Result<&Template> {
        let find = |wanted: &str| self.named.iter().rev().find(|(name, _)| name == wanted);
        match find("tool_use").filter(|_| with_tools).or_else(|| find("default")) {
            Some((_, template)) => template.as_ref().map_err(Error::clone),
            None if self.is_empty() => Err(Error::option("chat_template", &*self.absent)),
            None => {
                let names: Vec<String> = self.named.iter().map(|(name, _)| excerpt(name)).collect();
                let names = excerpt(&names.join(", "));
                let problem =
                    format!("is absent, and the target has only the chat template {names}, expected default");
                Err(Error::option("chat_template", problem))
            }
        }
    }
}

/// The templates (name, source) of the field `chat_template`; `None` if it is malformed.
fn field_templates(field: Option<serde_json::Value>) -> Option<Vec<(String, String)>> {
    use serde_json::Value as Json;
    let text = |value: Option<&Json>| value.and_then(Json::as_str).map(String::from);
    match field {
        None | Some(Json::Null) => Some(Vec::new()),
        Some(Json::String(source)) => Some(vec![("default".into(), source)]),
        Some(Json::Array(list)) => {
            list.iter().map(|item| Some((text(item.get("name"))?, text(item.get("template"))?))).collect()
        }
        Some(Json::Object(map)) => {
            map.into_iter().map(|(name, source)| Some((name, text(Some(&source))?))).collect()
        }
        Some(_) => None,
    }
}

/// Maximum instructions of one rendering, enough for several thousand messages. 64 bytes of a text that an
/// instruction makes count as one more, so a rendering makes at most 320 MB.
const TEMPLATE_FUEL: u64 = 5_000_000;
/// Maximum bytes of a chat template. Published ones have less than 32 KiB.
const TEMPLATE_LIMIT: usize = 64 << 10;

/// A parsed chat template.
pub(crate) struct Template {
    /// Holds the template under the name `chat_template`.
    environment: Environment<'static>,
    /// The template's name in errors.
    name: String,
    /// Whether it overrides the model's own template. Its faults are then [`Error::Usage`], not
    /// [`Error::Model`].
    from_user: bool,
    /// The variables that it reads without setting them first.
    reads: BTreeSet<String>,
}

impl Template {
    /// Parses `source`. `name` is the template's name in errors.
    pub(crate) fn parse(name: String, source: String, from_user: bool) -> Result<Self> {
        if source.len() > TEMPLATE_LIMIT {
            let what = format!("{name} has {} bytes, expected at most {TEMPLATE_LIMIT}", source.len());
            return Err(Self::fault(from_user, what));
        }
        let internal = |e: minijinja::Error| Error::Internal(e.to_string());
        let mut environment = jinja::environment().map_err(internal)?;
        environment.set_fuel(Some(TEMPLATE_FUEL));
        let Source { text, reads } =
            Source::new(&source).map_err(|what| Self::fault(from_user, format!("{name} {what}")))?;
        let parse = || {
            let result = environment.add_template_owned("chat_template", text);
            result.map_err(|e| Self::fault(from_user, Self::sentence(&name, "is not a template", &e)))
        };
        let panicked = |what| Self::fault(from_user, format!("{name} is not a template: {what}"));
        guarded(TEMPLATE_STACKS, parse, panicked)??;
        Ok(Template { environment, name, from_user, reads })
    }

    /// Checks that the template reads the tools and the variables that are given to it.
    ///
    /// # Errors
    /// [`Error::Usage`] for tools, [`Error::Option`] for a variable.
    pub(crate) fn check(&self, with_tools: bool, args: &[(String, serde_json::Value)]) -> Result<()> {
        if with_tools && !self.reads.contains("tools") {
            return Err(Error::Usage(format!("there are tools, but {} does not mention tools", self.name)));
        }
        let Some((name, _)) = args.iter().find(|(name, _)| !self.reads.contains(name)) else {
            return Ok(());
        };
        const SHOWN: usize = 20;
        let others: Vec<&str> =
            self.reads.iter().map(String::as_str).filter(|name| *name != "messages").collect();
        let shown: Vec<String> = others.iter().take(SHOWN).map(|name| excerpt(name)).collect();
        let more = if others.len() > SHOWN { ", ..." } else { "" };
        let expected = match shown.is_empty() {
            true => "none".to_string(),
            false => format!("one of {}{more}", shown.join(", ")),
        };
        let name = excerpt(name);
        let problem = format!("is given {name}, which {} does not read: expected {expected}", self.name);
        Err(Error::option("template_arg", problem))
    }

    /// Renders the template. `variables` is a JSON object.
    pub(crate) fn render(&self, variables: serde_json::Value) -> Result<String> {
        // An error can hold deeply nested values, so it is also formatted and dropped on the deep stack.
        let render = || {
            let template = self.environment.get_template("chat_template");
            let result = template.and_then(|template| template.render(Value::from(Serde(variables))));
            result.map_err(|error| self.explain(&error))
        };
        let panicked = |what| Self::fault(self.from_user, format!("{} failed: {what}", self.name));
        guarded(TEMPLATE_STACKS, render, panicked)?
    }

    fn explain(&self, error: &minijinja::Error) -> Error {
        let mut cause: Option<&dyn std::error::Error> = Some(error);
        while let Some(one) = cause {
            if let Some(Raised(message)) = one.downcast_ref() {
                let message = one_line(message);
                return Error::Usage(format!("{} refuses this conversation: {message}", self.name));
            }
            cause = one.source();
        }
        Self::fault(self.from_user, Self::sentence(&self.name, "failed", error))
    }

    fn fault(from_user: bool, sentence: String) -> Error {
        if from_user { Error::Usage(sentence) } else { Error::Model(sentence) }
    }

    fn sentence(name: &str, verb: &str, error: &minijinja::Error) -> String {
        let place = error.line().map_or(String::new(), |line| format!(" in line {line}"));
        let detail = match (error.kind(), error.detail()) {
            (ErrorKind::OutOfFuel, _) => format!("takes more than {TEMPLATE_FUEL} instructions"),
            (kind, Some(detail)) => format!("{kind}: {}", one_line(detail)),
            (kind, None) => kind.to_string(),
        };
        format!("{name} {verb}{place}: {detail}")
    }
}
