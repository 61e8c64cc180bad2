//! People's side of tokens: tokenizer, streaming detokenising, stop strings. How a conversation becomes one text is
//! `template`'s.
//!
//! The `tokenizers` crate encodes. Decoding is done here, token by token, because an answer is printed while it grows:
//! the crate's own stream decodes its window again for every token and waits as long as the text ends in U+FFFD, so
//! one stray byte silences it. Here a token becomes bytes, bytes become text as soon as they are whole characters, and
//! a byte that no continuation can save becomes U+FFFD at once.
//!
//! Tokenizer and template files are untrusted programs of a kind (regular expressions, jinja): they are read and run
//! on a thread of their own, with room for deep nesting, where a panic ends in an error.

use crate::checkpoint::json::shown;
use crate::checkpoint::safetensors::Folder;
use crate::text::chat_template::Template;
use crate::{Error, Result};
use serde::Deserialize;
use std::sync::{Mutex, Once};
use tokenizers::{Model, Tokenizer};

/// Stack for what a file makes us do: address space, touched only as far as it is used. Templates need it: their
/// operator chains nest as deep as they are long, values one level per instruction, up to about 1 KiB each.
const DEEP_STACK: usize = 512 << 20;
/// Stacks for templates, the first that there is room for.
pub(crate) const TEMPLATE_STACKS: &[usize] = &[DEEP_STACK];
/// The same for tokenizers, which nest far less.
const TOKENIZER_STACKS: &[usize] = &[DEEP_STACK, 64 << 20, 8 << 20];
/// Address space that has to be left beside a stack: allocations of the work, and the allocator's own arena.
const WORKING_ROOM: usize = 160 << 20;
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
        let parse = || Tokenizer::from_bytes(&bytes[..]).map_err(|e| malformed(e.to_string()));
        let mut tokenizer = guarded(TOKENIZER_STACKS, parse, malformed)??;
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
                return Err(malformed(format!(
                    "added token {:?} has id {id}, its place gives {got}",
                    shown(content)
                )));
            }
        }
        let decoding = Decoding::new(file.decoder, &path)?;

        let config_path = folder.path("tokenizer_config.json");
        let config: TokenizerConfig = match folder.file("tokenizer_config.json")? {
            Some(bytes) => serde_json::from_slice(&bytes).map_err(|e| {
                Error::Model(format!("{config_path} is malformed: {}", one_line(&e.to_string())))
            })?,
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
                let found = bos
                    .map_or("no bos_token".into(), |(_, content)| format!("bos_token {:?}", shown(content)));
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
        let failed = |what: String| {
            Error::Model(format!("{} cannot tokenise this text: {}", self.path, one_line(&what)))
        };
        let encode =
            || self.tokenizer.encode_fast(text, add_special_tokens).map_err(|e| failed(e.to_string()));
        Ok(guarded(TOKENIZER_STACKS, encode, failed)??.get_ids().to_vec())
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
            let what = one_line(&format!("{what:?}"));
            Error::Unsupported(format!(
                "{path}: decoder {what} cannot be streamed, expected ByteLevel, Metaspace, or a Sequence of Replace, \
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

/// Runs what an untrusted file can lead astray: on a deep stack, a panic's message made an error by `panicked`. The
/// panic is not printed either; hooks are global, so ours goes by the thread's name and leaves all other threads to the
/// one before. `Error::Memory`: there is room for none of the `stacks`.
pub(crate) fn guarded<T: Send>(
    stacks: &[usize],
    work: impl FnOnce() -> T + Send,
    panicked: impl FnOnce(String) -> Error,
) -> Result<T> {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if std::thread::current().name() != Some(UNTRUSTED_THREAD) {
                before(panic);
            }
        }));
    });
    // A thread that could not be started has taken nothing, and leaves the work to the next.
    let work = Mutex::new(Some(work));
    let run = || work.lock().ok().and_then(|mut work| work.take()).map(|work| work());
    std::thread::scope(|scope| {
        // The work needs room beside its stack: without it an allocation fails, and that ends the process.
        let roomy = |stack: &&usize| Vec::<u8>::new().try_reserve_exact(**stack + WORKING_ROOM).is_ok();
        let spawn = |stack: &usize| {
            let thread = std::thread::Builder::new().name(UNTRUSTED_THREAD.into()).stack_size(*stack);
            thread.spawn_scoped(scope, run).ok()
        };
        let Some(worker) = stacks.iter().filter(roomy).find_map(spawn) else {
            let least = stacks.last().map_or(0, |stack| (stack + WORKING_ROOM) >> 20);
            return Err(Error::Memory(format!(
                "not enough memory: a thread for the tokenizer or chat template needs {least} MiB of address space"
            )));
        };
        match worker.join() {
            Ok(Some(done)) => Ok(done),
            Ok(None) => Err(Error::Internal("the tokenizer's thread found no work".into())),
            Err(panic) => {
                let message = panic.downcast_ref::<String>().map(String::as_str);
                let message = message.or(panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked");
                Err(panicked(one_line(message)))
            }
        }
    })
}

/// Messages from elsewhere may span lines, quote whole files and hold control characters; here they are part of one
/// sentence.
pub fn one_line(message: &str) -> String {
    const LONGEST: usize = 400;
    let mut line = String::new();
    for word in message.split_whitespace() {
        if !line.is_empty() {
            line.push(' ');
        }
        for c in word.chars() {
            match c.is_control() {
                true => line.extend(c.escape_default()),
                false => line.push(c),
            }
            if line.len() > LONGEST {
                return line + " ...";
            }
        }
    }
    line
}
