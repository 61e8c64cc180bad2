//! People's side of tokens: tokenizer, chat template, streaming detokenising, stop strings.
//!
//! The `tokenizers` crate encodes. Decoding is done here, token by token, because an answer is printed while it grows:
//! the crate's own stream decodes its window again for every token and waits as long as the text ends in U+FFFD, so
//! one stray byte silences it. Here a token becomes bytes, bytes become text as soon as they are whole characters, and
//! a byte that no continuation can save becomes U+FFFD at once.
//!
//! Tokenizer and template files are untrusted programs of a kind (regular expressions, jinja): both run on a thread
//! of their own, with room for deep nesting, where a panic ends in an error; templates have an instruction budget.
//! What a template allocates is not bounded, as it is not in Hugging Face's sandbox.

use crate::weights::Folder;
use crate::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value, ValueKind};
use minijinja::{Environment, ErrorKind, State};
use serde::Deserialize;
use tokenizers::{Model, Tokenizer};

/// Instructions one rendering may take: several thousand messages.
const TEMPLATE_FUEL: u64 = 500_000;
/// Bytes of a chat template; those in use stay below 32 KiB.
const TEMPLATE_LIMIT: usize = 64 << 10;
/// Stack for parsing and rendering what a file says: address space, touched only as far as it is used. Operator
/// chains nest as deep as `TEMPLATE_LIMIT` lets them, values as deep as `TEMPLATE_FUEL`.
const DEEP_STACK: usize = 512 << 20;
const UNTRUSTED_THREAD: &str = "dflash-untrusted";

/// One turn of a conversation, as chat templates take it.
#[derive(Debug, Clone, PartialEq, Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    pub role: String,
    pub content: String,
}

/// Tokenizer and chat template of a target folder.
pub struct Text {
    tokenizer: Tokenizer,
    /// `tokenizer.json` as the user would name it.
    path: String,
    decoding: Decoding,
    /// Put before raw text; `None` where the tokenizer's post-processor does so, or nobody.
    bos: Option<u32>,
    /// Template variables: `bos_token`, `eos_token`, ... as far as `tokenizer_config.json` names them.
    specials: Vec<(&'static str, String)>,
    template: Option<Template>,
    /// Where a template was looked for, for the error that says there is none.
    template_places: String,
}

struct Template {
    /// Holds the one template, under its name in errors.
    environment: Environment<'static>,
    name: String,
    /// Given by the user, so its faults are the command line's, not the model's.
    from_user: bool,
}

/// `tokenizer_config.json`, as far as it matters here. `clean_up_tokenization_spaces` is left alone: it would take
/// spaces out of generated code.
#[derive(Deserialize, Default)]
#[serde(default)]
struct TokenizerConfig {
    chat_template: Option<Templates>,
    add_bos_token: Option<bool>,
    bos_token: Option<Special>,
    eos_token: Option<Special>,
    unk_token: Option<Special>,
    sep_token: Option<Special>,
    pad_token: Option<Special>,
    cls_token: Option<Special>,
    mask_token: Option<Special>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "`chat_template` is neither a string nor a list of {name, template}")]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a special token is neither a string nor an object with `content`")]
enum Special {
    Plain(String),
    Added { content: String },
}

/// The parts of `tokenizer.json` that are read here beside the crate.
#[derive(Deserialize)]
struct TokenizerFile {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    decoder: Option<DecoderFile>,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
}

/// A decoder as `tokenizer.json` writes it.
#[derive(Deserialize, Debug)]
#[serde(tag = "type")]
enum DecoderFile {
    ByteLevel,
    ByteFallback,
    Fuse,
    Metaspace { replacement: char, prepend_scheme: Option<String>, add_prefix_space: Option<bool> },
    Replace { pattern: PatternFile, content: String },
    Strip { content: char, start: usize, stop: usize },
    Sequence { decoders: Vec<DecoderFile> },
}

#[derive(Deserialize, Debug)]
enum PatternFile {
    String(String),
    Regex(#[allow(dead_code)] String),
}

/// How token strings become bytes: `tokenizer.json`'s decoder, reduced to what can be done token by token.
#[derive(Default)]
struct Decoding {
    /// Applied to every token string, in order.
    spellings: Vec<Spelling>,
    /// Characters stand for bytes (GPT-2's table).
    byte_level: bool,
    /// Tokens like `<0x0A>` stand for a byte.
    byte_fallback: bool,
    /// Up to so many of this character are dropped from the start of the text.
    strip: Option<(char, usize)>,
}

enum Spelling {
    Replace(String, String),
    /// The character stands for a space; in the first token it is dropped if the flag is set.
    Metaspace(char, bool),
}

impl Text {
    /// Reads `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`. `template`: the text of a template that
    /// overrides the folder's, with the name it is called by in errors.
    ///
    /// `Error::Model`: a file that is missing or malformed; `Error::Unsupported`: a decoder whose text cannot be
    /// streamed; `Error::Usage`: the overriding template does not parse.
    pub fn open(folder: &Folder, template: Option<(&str, String)>) -> Result<Self> {
        let path = folder.path("tokenizer.json");
        let Some(bytes) = folder.file("tokenizer.json")? else {
            return Err(Error::Model(format!("{path} is missing; a target folder needs its tokenizer")));
        };
        let malformed =
            |what: String| Error::Model(format!("{path} is not a tokenizer: {}", one_line(&what)));
        let mut tokenizer = guarded(|| Tokenizer::from_bytes(&bytes[..]).map_err(|e| e.to_string()))
            .and_then(|parsed| parsed)
            .map_err(malformed)?;
        // Prompts are neither cut nor padded, whatever the file was last used for; a fixed padding length would be an
        // allocation of any size.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| malformed(e.to_string()))?;
        let file: TokenizerFile = serde_json::from_slice(&bytes).map_err(|e| malformed(e.to_string()))?;
        // The crate numbers added tokens in order and ignores the ids in the file.
        for AddedToken { id, content } in &file.added_tokens {
            let got = tokenizer.token_to_id(content);
            if got != Some(*id) {
                let got = got.map_or("none".into(), |got| got.to_string());
                return Err(malformed(format!("added token {content:?} has id {id}, its place gives {got}")));
            }
        }
        let decoding = Decoding::new(file.decoder, &path)?;

        let config_path = folder.path("tokenizer_config.json");
        let config: TokenizerConfig = match folder.file("tokenizer_config.json")? {
            Some(bytes) => serde_json::from_slice(&bytes)
                .map_err(|e| Error::Model(format!("{config_path} is malformed: {e}")))?,
            None => TokenizerConfig::default(),
        };
        let specials: Vec<(&'static str, String)> = [
            ("bos_token", config.bos_token),
            ("eos_token", config.eos_token),
            ("unk_token", config.unk_token),
            ("sep_token", config.sep_token),
            ("pad_token", config.pad_token),
            ("cls_token", config.cls_token),
            ("mask_token", config.mask_token),
        ]
        .into_iter()
        .filter_map(|(name, token)| match token? {
            Special::Plain(content) | Special::Added { content } => Some((name, content)),
        })
        .collect();

        let template_path = folder.path("chat_template.jinja");
        let template = match (template, folder.file("chat_template.jinja")?) {
            (Some((name, source)), _) => Some(Template::parse(name.into(), source, true)?),
            (None, Some(bytes)) => {
                let source = std::str::from_utf8(&bytes)
                    .map_err(|e| Error::Model(format!("{template_path} is not UTF-8: {e}")))?;
                Some(Template::parse(template_path.clone(), source.into(), false)?)
            }
            (None, None) => {
                let source = config.chat_template.and_then(|templates| match templates {
                    Templates::One(source) => Some(source),
                    Templates::Named(list) => {
                        list.into_iter().find(|t| t.name == "default").map(|t| t.template)
                    }
                });
                let name = format!("{config_path}: chat_template");
                source.map(|source| Template::parse(name, source, false)).transpose()?
            }
        };

        let mut text = Text {
            tokenizer,
            decoding,
            bos: None,
            specials,
            template,
            template_places: format!("neither {template_path} nor {config_path} has a chat template"),
            path,
        };
        if config.add_bos_token == Some(true) {
            let bos = text.specials.iter().find(|(name, _)| *name == "bos_token");
            let id = bos.and_then(|(_, content)| text.tokenizer.token_to_id(content)).ok_or_else(|| {
                let found =
                    bos.map_or("no bos_token".into(), |(_, content)| format!("bos_token {content:?}"));
                Error::Model(format!(
                    "{config_path}: add_bos_token is true with {found}, expected a token of {}",
                    text.path
                ))
            })?;
            let post_processor_adds_it = text.ids("", true)?.first() == Some(&id);
            text.bos = (!post_processor_adds_it).then_some(id);
        }
        Ok(text)
    }

    /// Whether [`Text::encode_chat`] has a template to work with.
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// Raw text to ids: special tokens in the text are recognised, bos is added if the tokenizer's post-processor or
    /// `add_bos_token` says so. Empty text gives no ids at all.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let ids = self.ids(text, true)?;
        Ok(self.bos.into_iter().chain(ids).collect())
    }

    /// A conversation through the chat template, generation prompt added. `args` are template variables
    /// (`enable_thinking` is false unless given). The template writes bos and the like itself, so its output is
    /// tokenised without further special tokens.
    ///
    /// `Error::Usage`: no template, a reserved variable, or the template refuses the conversation
    /// (`raise_exception`). A fault of the template itself is `Error::Usage` for the user's, `Error::Model` for the
    /// folder's.
    pub fn encode_chat(
        &self,
        messages: &[Message],
        args: &[(String, serde_json::Value)],
    ) -> Result<Vec<u32>> {
        let Some(template) = &self.template else {
            return Err(Error::Usage(format!(
                "{}: give one with --chat-template FILE, or --raw for the prompt as it is",
                self.template_places
            )));
        };
        let mut variables = serde_json::Map::new();
        for (name, content) in &self.specials {
            variables.insert(name.to_string(), content.as_str().into());
        }
        variables.insert("tools".into(), serde_json::Value::Null);
        variables.insert("documents".into(), serde_json::Value::Null);
        variables.insert("add_generation_prompt".into(), true.into());
        // Drafters are trained on answers without thinking: with it Qwen3's lose more than half of their acceptance.
        variables.insert("enable_thinking".into(), false.into());
        for (name, value) in args {
            if name == "messages" {
                return Err(Error::Usage(
                    "--template-arg messages is reserved: the conversation comes from the prompt".into(),
                ));
            }
            variables.insert(name.clone(), value.clone());
        }
        let messages = messages.iter().map(|m| serde_json::json!({"role": m.role, "content": m.content}));
        variables.insert("messages".into(), messages.collect());
        self.ids(&template.render(serde_json::Value::Object(variables))?, false)
    }

    fn ids(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        guarded(|| self.tokenizer.encode_fast(text, add_special_tokens).map_err(|e| e.to_string()))
            .and_then(|encoded| encoded)
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|e| Error::Model(format!("{} cannot tokenise this text: {}", self.path, one_line(&e))))
    }

    /// Ids to text, special tokens left out. Ids without a token (padding of the vocabulary) have no text.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let mut stream = self.stream(&[])?;
        let mut text = String::new();
        for id in ids {
            text += &stream.push(*id)?.0;
        }
        Ok(text + &stream.finish())
    }

    /// A detokeniser for one answer. `Error::Usage` if a stop string is empty.
    pub fn stream(&self, stops: &[String]) -> Result<Stream<'_>> {
        if stops.iter().any(String::is_empty) {
            return Err(Error::Usage("--stop is empty, expected at least one character".into()));
        }
        Ok(Stream {
            text: self,
            first: true,
            bytes: Vec::new(),
            strip: self.decoding.strip.map_or(0, |(_, most)| most),
            held: String::new(),
            stops: stops.to_vec(),
            stopped: false,
        })
    }

    /// The string of a token that has text: `None` for special tokens and for ids without a token.
    fn token(&self, id: u32) -> Option<String> {
        let added = self.tokenizer.get_added_vocabulary();
        let token = added.simple_id_to_token(id).or_else(|| self.tokenizer.get_model().id_to_token(id))?;
        (!added.is_special_token(&token)).then_some(token)
    }
}

impl Decoding {
    fn new(file: Option<DecoderFile>, path: &str) -> Result<Self> {
        let refuse = |what: &dyn std::fmt::Debug| {
            Error::Unsupported(format!(
                "{path}: decoder {what:?} cannot be streamed, expected ByteLevel, Metaspace, or a Sequence of Replace, \
                 ByteFallback, Fuse and Strip as SentencePiece models have it"
            ))
        };
        let steps = match file {
            None => return Err(refuse(&"null")),
            Some(DecoderFile::Sequence { decoders }) => decoders,
            Some(one) => vec![one],
        };
        let mut decoding = Decoding::default();
        // Once tokens are bytes, or one text, a step that looks at token strings would see something else.
        let (mut bytes, mut fused) = (false, false);
        for step in steps {
            match step {
                DecoderFile::Replace { pattern: PatternFile::String(from), content }
                    if !bytes && !fused && !from.is_empty() =>
                {
                    decoding.spellings.push(Spelling::Replace(from, content));
                }
                DecoderFile::Metaspace { replacement, prepend_scheme, add_prefix_space }
                    if !bytes && !fused =>
                {
                    let prepends =
                        prepend_scheme.as_deref() != Some("never") && add_prefix_space != Some(false);
                    decoding.spellings.push(Spelling::Metaspace(replacement, prepends));
                }
                DecoderFile::ByteFallback if !bytes && !fused => {
                    (decoding.byte_fallback, bytes) = (true, true);
                }
                DecoderFile::ByteLevel if !bytes && !fused => {
                    (decoding.byte_level, bytes, fused) = (true, true, true);
                }
                DecoderFile::Fuse => fused = true,
                DecoderFile::Strip { content, start, stop: 0 } if fused && decoding.strip.is_none() => {
                    decoding.strip = Some((content, start));
                }
                other => return Err(refuse(&other)),
            }
        }
        Ok(decoding)
    }

    /// Appends the token's bytes: of characters, or parts of characters.
    fn append(&self, mut token: String, first: bool, bytes: &mut Vec<u8>) {
        for spelling in &self.spellings {
            token = match spelling {
                Spelling::Replace(from, to) => token.replace(from, to),
                Spelling::Metaspace(mark, true) if first => token.replace(*mark, ""),
                Spelling::Metaspace(mark, _) => token.replace(*mark, " "),
            };
        }
        if self.byte_fallback
            && token.len() == 6
            && let Some(digits) = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'))
            && let Ok(byte) = u8::from_str_radix(digits, 16)
        {
            bytes.push(byte);
            return;
        }
        // A token not written in the table, as added tokens are not, stands for itself.
        let spelled = self.byte_level.then(|| token.chars().map(byte_of).collect::<Option<Vec<u8>>>());
        bytes.extend(spelled.flatten().unwrap_or_else(|| token.into_bytes()));
    }
}

/// GPT-2's spelling of bytes: printable Latin-1 stands for itself, the other 68 bytes follow in order from U+0100.
fn byte_of(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// Tokens in, text out, piece by piece: never half a character, never text that may turn out to begin a stop string.
///
/// All text returned, with [`Stream::finish`], is what the tokenizer's decoder makes of all ids at once, up to the
/// stop. The stop that is complete first wins; of several complete at the same character the longest. Each token
/// costs its own length and that of the stop strings, however long the answer.
pub struct Stream<'a> {
    text: &'a Text,
    /// No token has had text yet.
    first: bool,
    /// The beginning of a character, at most 3 bytes.
    bytes: Vec<u8>,
    /// Characters that may still be dropped from the start of the text.
    strip: usize,
    /// Decoded, but it may begin a stop string.
    held: String,
    stops: Vec<String>,
    stopped: bool,
}

impl Stream<'_> {
    /// Takes the next token. Returns text that is now certain (maybe empty), and whether a stop string was completed:
    /// then the text ends just before it, and whatever is pushed later has no text.
    pub fn push(&mut self, id: u32) -> Result<(String, bool)> {
        if !self.stopped
            && let Some(token) = self.text.token(id)
        {
            self.text.decoding.append(token, self.first, &mut self.bytes);
            self.first = false;
            self.characters();
        }
        Ok((self.release(), self.stopped))
    }

    /// The text held back so far; the answer is over. A character that never became whole is U+FFFD.
    pub fn finish(mut self) -> String {
        if !self.stopped && !self.bytes.is_empty() {
            self.bytes.clear();
            self.held.push(char::REPLACEMENT_CHARACTER);
            self.cut();
        }
        self.held
    }

    /// Moves whole characters from `bytes` to `held`, U+FFFD for each maximal part that can become none (the rule of
    /// `String::from_utf8_lossy` and of the Unicode standard).
    fn characters(&mut self) {
        let mut rest = &self.bytes[..];
        let mut fresh = String::new();
        while let Err(error) = std::str::from_utf8(rest) {
            let (valid, after) = rest.split_at(error.valid_up_to());
            fresh += &String::from_utf8_lossy(valid);
            rest = after;
            // Without a length the bytes may yet become a character.
            let Some(lost) = error.error_len() else { break };
            fresh.push(char::REPLACEMENT_CHARACTER);
            rest = &rest[lost..];
        }
        if let Ok(valid) = std::str::from_utf8(rest) {
            fresh += valid;
            rest = &[];
        }
        self.bytes = rest.to_vec();
        if let Some((mark, _)) = self.text.decoding.strip
            && !fresh.is_empty()
        {
            while self.strip > 0 && fresh.starts_with(mark) {
                fresh.remove(0);
                self.strip -= 1;
            }
            if !fresh.is_empty() {
                self.strip = 0;
            }
        }
        self.held += &fresh;
        self.cut();
    }

    /// Cuts `held` before the first stop string that is complete in it.
    fn cut(&mut self) {
        let ends = self.stops.iter().filter_map(|stop| Some((self.held.find(stop)?, stop.len())));
        if let Some((_, start)) = ends.map(|(start, len)| (start + len, start)).min() {
            self.held.truncate(start);
            self.stopped = true;
        }
    }

    /// Takes from `held` what can no longer be part of a stop string.
    fn release(&mut self) -> String {
        let begins_a_stop = |tail: &str| self.stops.iter().any(|stop| stop.starts_with(tail));
        let keep_from = match self.stopped {
            true => None,
            false => self.held.char_indices().map(|(at, _)| at).find(|at| begins_a_stop(&self.held[*at..])),
        };
        let kept = self.held.split_off(keep_from.unwrap_or(self.held.len()));
        std::mem::replace(&mut self.held, kept)
    }
}

impl Template {
    fn parse(name: String, source: String, from_user: bool) -> Result<Self> {
        if source.len() > TEMPLATE_LIMIT {
            let what = format!("{name} has {} bytes, expected at most {TEMPLATE_LIMIT}", source.len());
            return Err(Self::fault(from_user, what));
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| Error::Internal(e.to_string()))?);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(|out, state, value| match value.kind() {
            // Python's names, not jinja's.
            ValueKind::None => Ok(out.write_str("None")?),
            ValueKind::Bool => Ok(out.write_str(if value.is_true() { "True" } else { "False" })?),
            _ => minijinja::escape_formatter(out, state, value),
        });
        environment.set_fuel(Some(TEMPLATE_FUEL));
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        // Undefined values are called by name in errors.
        environment.set_debug(true);
        let parsed = guarded(|| {
            let result = environment.add_template_owned("chat_template", source);
            result.map_err(|e| Self::fault(from_user, Self::sentence(&name, "is not a template", &e)))
        });
        parsed.map_err(|e| Self::fault(from_user, format!("{name} is not a template: {e}")))??;
        Ok(Template { environment, name, from_user })
    }

    fn render(&self, variables: serde_json::Value) -> Result<String> {
        // An error can hold the values it is about, so it too has to end on the deep stack.
        let rendered = guarded(|| {
            let template = self.environment.get_template("chat_template");
            let result = template.and_then(|template| template.render(Value::from(Serde(variables))));
            result.map_err(|error| self.explain(&error))
        });
        rendered.map_err(|e| Self::fault(self.from_user, format!("{} failed: {e}", self.name)))?
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

/// What `raise_exception` was called with, so that it can be told from a fault of the template.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: String) -> std::result::Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, "raised").with_source(Raised(message)))
}

/// `tojson` as Hugging Face defines it: Python's `json.dumps` with `ensure_ascii=False`, not jinja's HTML-safe filter.
fn to_json(
    value: Value,
    indent: Option<usize>,
    options: Kwargs,
) -> std::result::Result<String, minijinja::Error> {
    let indent = options.get::<Option<usize>>("indent")?.or(indent);
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    if options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false) {
        return Err(minijinja::Error::new(
            ErrorKind::InvalidOperation,
            "tojson has no ensure_ascii=true here",
        ));
    }
    options.assert_all_used()?;
    let (item, key) = match separators.as_deref() {
        None if indent.is_some() => (",", ": "),
        None => (", ", ": "),
        Some([item, key]) => (item.as_str(), key.as_str()),
        Some(_) => {
            return Err(minijinja::Error::new(ErrorKind::InvalidOperation, "separators is not a pair"));
        }
    };
    let value = serde_json::to_value(&value)
        .map_err(|e| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    let mut out = String::new();
    write_json(&value, &JsonStyle { item, key, indent, sort_keys }, 0, &mut out);
    Ok(out)
}

struct JsonStyle<'a> {
    item: &'a str,
    key: &'a str,
    indent: Option<usize>,
    sort_keys: bool,
}

fn write_json(value: &serde_json::Value, style: &JsonStyle, depth: usize, out: &mut String) {
    let line = |depth: usize, out: &mut String| {
        if let Some(indent) = style.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent.saturating_mul(depth).min(1 << 16)));
        }
    };
    match value {
        serde_json::Value::Array(items) if !items.is_empty() => {
            for (i, item) in items.iter().enumerate() {
                out.push_str(if i == 0 { "[" } else { style.item });
                line(depth + 1, out);
                write_json(item, style, depth + 1, out);
            }
            line(depth, out);
            out.push(']');
        }
        serde_json::Value::Object(map) if !map.is_empty() => {
            let mut pairs: Vec<_> = map.iter().collect();
            if style.sort_keys {
                pairs.sort_by_key(|(key, _)| key.as_str());
            }
            for (i, (key, item)) in pairs.into_iter().enumerate() {
                out.push_str(if i == 0 { "{" } else { style.item });
                line(depth + 1, out);
                out.push_str(&serde_json::Value::from(key.as_str()).to_string());
                out.push_str(style.key);
                write_json(item, style, depth + 1, out);
            }
            line(depth, out);
            out.push('}');
        }
        leaf => out.push_str(&leaf.to_string()),
    }
}

/// The current date for templates that state it, in UTC: what the local zone is, nothing in the standard library knows.
fn strftime_now(_: &State, format: String) -> std::result::Result<String, minijinja::Error> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |t| t.as_secs());
    strftime(&format, now).map_err(|what| minijinja::Error::new(ErrorKind::InvalidOperation, what))
}

/// Python's `strftime` for a UTC time in seconds since 1970: the directives that dates in prompts use, with glibc's `-`
/// for numbers without padding.
fn strftime(format: &str, seconds: u64) -> std::result::Result<String, String> {
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    const MONTHS: [(&str, u64); 12] = [
        ("January", 31),
        ("February", 28),
        ("March", 31),
        ("April", 30),
        ("May", 31),
        ("June", 30),
        ("July", 31),
        ("August", 31),
        ("September", 30),
        ("October", 31),
        ("November", 30),
        ("December", 31),
    ];
    let leap = |year: u64| year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let weekday = DAYS[(seconds / 86400 % 7) as usize];
    let (mut year, mut day) = (1970, seconds / 86400);
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let day_of_year = day + 1;
    let mut month = 0;
    while day >= MONTHS[month].1 + u64::from(month == 1 && leap(year)) {
        day -= MONTHS[month].1 + u64::from(month == 1 && leap(year));
        month += 1;
    }
    let (month_name, month, day) = (MONTHS[month].0, month as u64 + 1, day + 1);

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let padded = directive != Some('-');
        if !padded {
            directive = chars.next();
        }
        let mut number = |value: u64, width: usize, fill: char| {
            let digits = value.to_string();
            let missing = if padded { width.saturating_sub(digits.len()) } else { 0 };
            out.extend(std::iter::repeat_n(fill, missing));
            out.push_str(&digits);
        };
        match directive {
            Some('Y') => number(year, 4, '0'),
            Some('y') => number(year % 100, 2, '0'),
            Some('m') => number(month, 2, '0'),
            Some('d') => number(day, 2, '0'),
            Some('e') => number(day, 2, ' '),
            Some('j') => number(day_of_year, 3, '0'),
            Some('H') => number(hour, 2, '0'),
            Some('I') => number((hour + 11) % 12 + 1, 2, '0'),
            Some('M') => number(minute, 2, '0'),
            Some('S') => number(second, 2, '0'),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(weekday),
            Some('a') => out.push_str(&weekday[..3]),
            Some('F') => out.push_str(&strftime("%Y-%m-%d", seconds)?),
            Some('T') => out.push_str(&strftime("%H:%M:%S", seconds)?),
            Some('Z') => out.push_str("UTC"),
            Some('z') => out.push_str("+0000"),
            Some('%') => out.push('%'),
            Some(other) => return Err(format!("strftime_now does not know %{other}")),
            None => return Err("strftime_now: the format ends in %".into()),
        }
    }
    Ok(out)
}

/// Runs what an untrusted file can lead astray: on a deep stack, a panic turned into its message. The panic is not
/// printed either; hooks are global, so ours goes by the thread's name and leaves all other threads to the one before.
fn guarded<T: Send>(work: impl FnOnce() -> T + Send) -> std::result::Result<T, String> {
    static QUIET: std::sync::Once = std::sync::Once::new();
    QUIET.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if std::thread::current().name() != Some(UNTRUSTED_THREAD) {
                before(panic);
            }
        }));
    });
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name(UNTRUSTED_THREAD.into()).stack_size(DEEP_STACK);
        let worker = thread.spawn_scoped(scope, work).map_err(|e| format!("no thread for it: {e}"))?;
        worker.join().map_err(|panic| {
            let message = panic.downcast_ref::<String>().map(String::as_str);
            message.or(panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked").to_string()
        })
    })
}

/// Messages from elsewhere may span lines and quote whole files; here they are part of one sentence.
fn one_line(message: &str) -> String {
    let line = message.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(400) {
        Some((end, _)) => format!("{} ...", &line[..end]),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::strftime;

    #[test]
    fn dates_are_those_of_the_calendar() {
        // From Python: datetime.fromtimestamp(t, timezone.utc).strftime(...)
        let format = "%Y-%m-%d %H:%M:%S %j %a %b|%A %B %-d %e %I%p %y %F %T %Z%z 100%%";
        for (seconds, expected) in [
            (
                0,
                "1970-01-01 00:00:00 001 Thu Jan|Thursday January 1  1 12AM 70 1970-01-01 00:00:00 UTC+0000 100%",
            ),
            (
                946684799,
                "1999-12-31 23:59:59 365 Fri Dec|Friday December 31 31 11PM 99 1999-12-31 23:59:59 UTC+0000 100%",
            ),
            (
                951825601,
                "2000-02-29 12:00:01 060 Tue Feb|Tuesday February 29 29 12PM 00 2000-02-29 12:00:01 UTC+0000 100%",
            ),
            (
                978224523,
                "2000-12-31 01:02:03 366 Sun Dec|Sunday December 31 31 01AM 00 2000-12-31 01:02:03 UTC+0000 100%",
            ),
            (
                1709211909,
                "2024-02-29 13:05:09 060 Thu Feb|Thursday February 29 29 01PM 24 2024-02-29 13:05:09 UTC+0000 100%",
            ),
            (
                1772323200,
                "2026-03-01 00:00:00 060 Sun Mar|Sunday March 1  1 12AM 26 2026-03-01 00:00:00 UTC+0000 100%",
            ),
            (
                4107585599,
                "2100-03-01 11:59:59 060 Mon Mar|Monday March 1  1 11AM 00 2100-03-01 11:59:59 UTC+0000 100%",
            ),
        ] {
            assert_eq!(strftime(format, seconds).unwrap(), expected);
        }
        assert!(strftime("%Q", 0).unwrap_err().contains("%Q"));
        assert!(strftime("100%", 0).is_err());
    }
}
