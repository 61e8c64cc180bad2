//! The tokenizer: text to token ids, and token ids to streamed text.
//!
//! The `tokenizers` crate encodes. Decoding is done here, token by token, because answers are streamed. The
//! crate's own stream decodes its window again for every token and emits nothing while the text ends in
//! U+FFFD, so one invalid byte stops its output. Here a token becomes bytes, and bytes become text as soon as
//! they are whole characters. A byte that cannot be part of a character becomes U+FFFD at once.

use crate::checkpoint::folder::Folder;
use crate::error::{excerpt, one_line};
use crate::text::chat_template::{ChatTemplates, Template};
use crate::text::decoding::{DecoderFile, Decoding};
use crate::text::stop_strings::StopStrings;
use crate::text::untrusted::{TOKENIZER_STACKS, guarded};
use crate::{Error, Result};
use serde::Deserialize;
use tokenizers::{Model, Tokenizer};

/// One turn of a conversation, as chat templates read it.
#[derive(Debug, Clone, PartialEq, Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// `system`, `user`, `assistant`, or another role that the template supports.
    pub role: String,
    /// The text of the message.
    pub content: String,
}

/// Tokenizer and chat template of a target folder.
pub struct Text {
    tokenizer: Tokenizer,
    /// The path of `tokenizer.json`, for errors.
    path: String,
    decoding: Decoding,
    /// The bos token to add before raw text. `None` if the tokenizer's post-processor adds it or the model
    /// uses none.
    bos: Option<u32>,
    /// Template variables (name, text): those of `bos_token`, `eos_token`, ... that `tokenizer_config.json`
    /// has.
    specials: Vec<(&'static str, String)>,
    templates: ChatTemplates,
}

/// The fields of `tokenizer_config.json` that are used. `clean_up_tokenization_spaces` is ignored on purpose:
/// it would remove spaces from generated code.
#[derive(Deserialize, Default)]
#[serde(default)]
struct TokenizerConfig {
    chat_template: Option<serde_json::Value>,
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
#[serde(untagged, expecting = "a special token is neither a string nor an object with `content`")]
enum Special {
    Plain(String),
    Added { content: String },
}

/// The parts of `tokenizer.json` that this module reads itself.
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

impl Text {
    /// Reads `tokenizer.json`, `tokenizer_config.json` and the chat templates. `template` overrides the folder's
    /// chat templates: (name in errors, source). A fault of the folder's templates is an error only when they
    /// are used.
    ///
    /// # Errors
    /// [`Error::Model`] for a file that is missing or malformed; [`Error::Unsupported`] for a decoder whose
    /// text cannot be produced token by token; [`Error::Usage`] if the overriding template does not parse.
    pub fn open(folder: &Folder, template: Option<(&str, String)>) -> Result<Self> {
        let path = folder.path("tokenizer.json");
        let Some(bytes) = folder.file("tokenizer.json")? else {
            return Err(Error::Model(format!(
                "{path} is missing: expected the tokenizer in the target's folder"
            )));
        };
        let malformed =
            |what: String| Error::Model(format!("{path} is not a tokenizer: {}", one_line(&what)));
        let parse = || Tokenizer::from_bytes(&bytes[..]).map_err(|e| malformed(e.to_string()));
        let mut tokenizer = guarded(TOKENIZER_STACKS, parse, malformed)??;
        // Prompts are neither truncated nor padded, whatever the file says. A padding length in the file
        // could cause an allocation of any size.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| malformed(e.to_string()))?;
        let file: TokenizerFile = serde_json::from_slice(&bytes).map_err(|e| malformed(e.to_string()))?;
        // The crate numbers added tokens in order and ignores the ids in the file.
        for AddedToken { id, content } in &file.added_tokens {
            let got = tokenizer.token_to_id(content);
            if got != Some(*id) {
                let got = got.map_or("none".into(), |got| got.to_string());
                return Err(malformed(format!(
                    "added token {:?} has id {id}, but its place in the list gives {got}",
                    excerpt(content)
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

        let mut text = Text {
            tokenizer,
            decoding,
            bos: None,
            specials,
            templates: ChatTemplates::open(folder, config.chat_template, template)?,
            path,
        };
        if config.add_bos_token == Some(true) {
            let bos = text.specials.iter().find(|(name, _)| *name == "bos_token");
            let id = bos.and_then(|(_, content)| text.tokenizer.token_to_id(content)).ok_or_else(|| {
                let found = bos.map_or("no bos_token".into(), |(_, content)| {
                    format!("bos_token {:?}", excerpt(content))
                });
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

    /// Whether there is a chat template, which [`Text::encode_chat`] needs. It may be invalid.
    pub fn has_template(&self) -> bool {
        !self.templates.is_empty()
    }

    /// Checks what [`Text::encode_chat`] can check without messages: that there is a valid chat template, and
    /// that it reads the variables `args`.
    ///
    /// # Errors
    /// As [`Text::encode_chat`].
    pub fn check_template(&self, args: &[(String, serde_json::Value)]) -> Result<()> {
        self.template(None, args).map(|_| ())
    }

    /// Converts raw text to token ids. Special tokens in the text are recognised. The bos token is added if
    /// the tokenizer's post-processor or `add_bos_token` says so. Empty text gives no ids.
    ///
    /// # Errors
    /// [`Error::Model`] if the tokenizer fails on this text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let ids = self.ids(text, true)?;
        Ok(self.bos.into_iter().chain(ids).collect())
    }

    /// Converts a conversation to token ids with the chat template, generation prompt included. `tools` is the
    /// JSON array of tools that the model may call. `args` are template variables (name, value);
    /// `enable_thinking` is false unless given. The template writes bos and other special tokens itself, so
    /// none are added to its output.
    ///
    /// # Errors
    /// [`Error::Option`] if there is no template, or if a variable is reserved, has a wrong type or is not read
    /// by the template; [`Error::Usage`] if the template does not read the tools or refuses the conversation
    /// (`raise_exception`). If the template itself fails: [`Error::Usage`] for an overriding template,
    /// [`Error::Model`] for the folder's.
    pub fn encode_chat(
        &self,
        messages: &[Message],
        tools: Option<&serde_json::Value>,
        args: &[(String, serde_json::Value)],
    ) -> Result<Vec<u32>> {
        let (template, tools) = self.template(tools, args)?;
        let mut variables = serde_json::Map::new();
        for (name, content) in &self.specials {
            variables.insert(name.to_string(), content.as_str().into());
        }
        variables.insert("tools".into(), tools.cloned().into());
        variables.insert("documents".into(), serde_json::Value::Null);
        variables.insert("add_generation_prompt".into(), true.into());
        // Published drafters are trained on answers without thinking. With thinking, the acceptance of those
        // of Qwen3 falls by more than half.
        variables.insert("enable_thinking".into(), false.into());
        for (name, value) in args {
            // The program's own switches must be what `is true` and `is false` in templates compare with.
            let is_switch = ["add_generation_prompt", "enable_thinking"].contains(&&**name);
            let value = match value {
                serde_json::Value::Null if is_switch => continue,
                serde_json::Value::Number(number) if is_switch && number.as_u64().is_some_and(|n| n < 2) => {
                    (number.as_u64() == Some(1)).into()
                }
                value if is_switch && !value.is_boolean() => {
                    let value = excerpt(&value.to_string());
                    return Err(Error::option(
                        "template_arg",
                        format!("is given {name}={value}, expected true or false"),
                    ));
                }
                value => value.clone(),
            };
            variables.insert(name.clone(), value);
        }
        let messages = messages.iter().map(|m| serde_json::json!({"role": m.role, "content": m.content}));
        variables.insert("messages".into(), messages.collect());
        self.ids(&template.render(serde_json::Value::Object(variables))?, false)
    }

    /// The template for a conversation with these tools and variables, after checks of both; and the tools.
    fn template<'a>(
        &self,
        tools: Option<&'a serde_json::Value>,
        args: &'a [(String, serde_json::Value)],
    ) -> Result<(&Template, Option<&'a serde_json::Value>)> {
        let given = |wanted: &str| args.iter().rev().find(|(name, _)| name == wanted).map(|(_, value)| value);
        if given("messages").is_some() {
            let problem = "is given messages, which is reserved for the conversation";
            return Err(Error::option("template_arg", problem));
        }
        let tools = match (tools, given("tools").filter(|tools| !tools.is_null())) {
            (Some(_), Some(_)) => {
                return Err(Error::option(
                    "template_arg",
                    "is given tools, but the conversation has tools of its own",
                ));
            }
            (tools, given) => tools.or(given),
        };
        if let Some(tools) = tools
            && !tools.as_array().is_some_and(|list| list.iter().all(serde_json::Value::is_object))
        {
            return Err(Error::Usage(format!(
                "tools is {}, expected a JSON array of objects",
                excerpt(&tools.to_string())
            )));
        }
        let template = self.templates.pick(tools.is_some())?;
        template
            .check(tools.and_then(|tools| tools.as_array()).is_some_and(|list| !list.is_empty()), args)?;
        Ok((template, tools))
    }

    fn ids(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let failed = |what: String| {
            Error::Model(format!("{} cannot tokenise this text: {}", self.path, one_line(&what)))
        };
        let encode =
            || self.tokenizer.encode_fast(text, add_special_tokens).map_err(|e| failed(e.to_string()));
        Ok(guarded(TOKENIZER_STACKS, encode, failed)??.get_ids().to_vec())
    }

    /// Converts token ids to text, without special tokens. Ids without a token (padding of the vocabulary)
    /// have no text.
    ///
    /// # Errors
    /// As [`Stream::push`].
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let mut stream = self.stream(&[])?;
        let mut text = String::new();
        for id in ids {
            text += &stream.push(*id)?.0;
        }
        Ok(text + &stream.finish())
    }

    /// Makes a detokenizer for one answer. The text ends before the first of the stop strings `stops`.
    ///
    /// # Errors
    /// [`Error::Option`] if a stop string is empty.
    pub fn stream(&self, stops: &[String]) -> Result<Stream<'_>> {
        if stops.iter().any(String::is_empty) {
            return Err(Error::option("stop", "is empty, expected at least one character"));
        }
        Ok(Stream {
            text: self,
            first: true,
            bytes: Vec::new(),
            strip: self.decoding.strip.map_or(0, |(_, count)| count),
            out: StopStrings::new(stops.to_vec()),
        })
    }

    /// The string of a token; `None` for special tokens and for ids without a token, which have no text.
    fn token(&self, id: u32) -> Option<String> {
        let added = self.tokenizer.get_added_vocabulary();
        let token = added.simple_id_to_token(id).or_else(|| self.tokenizer.get_model().id_to_token(id))?;
        (!added.is_special_token(&token)).then_some(token)
    }
}

/// An incremental detokenizer. It never returns a part of a character or text that may begin a stop string.
///
/// All returned texts together, including that of [`Stream::finish`], are what the tokenizer's decoder gives
/// for all ids at once, up to the stop. The text ends at the stop string that is complete first, or at the
/// longest of several that are complete at the same character. The cost of a token does not depend on the
/// length of the answer.
pub struct Stream<'a> {
    text: &'a Text,
    /// Whether no token with text has been pushed yet.
    first: bool,
    /// The bytes of an incomplete character, at most 3.
    bytes: Vec<u8>,
    /// How many characters may still be dropped from the start of the text.
    strip: usize,
    out: StopStrings,
}

impl Stream<'_> {
    /// Appends a token. Returns the new text, which may be empty, and whether a stop string is complete. The
    /// text ends just before the stop string, and later tokens have no text.
    ///
    /// # Errors
    /// This version returns none.
    pub fn push(&mut self, id: u32) -> Result<(String, bool)> {
        if !self.out.stopped()
            && let Some(token) = self.text.token(id)
        {
            self.text.decoding.append(token, self.first, &mut self.bytes);
            self.first = false;
            self.decode_bytes();
        }
        Ok((self.out.release(), self.out.stopped()))
    }

    /// Ends the answer. Returns the text that was held back. An incomplete character becomes U+FFFD.
    pub fn finish(mut self) -> String {
        if !self.bytes.is_empty() {
            self.out.push("\u{fffd}");
        }
        self.out.finish()
    }

    /// Moves whole characters from `bytes` to `out`, with U+FFFD for each maximal part that cannot become a
    /// character (the rule of `String::from_utf8_lossy` and of the Unicode standard).
    fn decode_bytes(&mut self) {
        let mut rest = &self.bytes[..];
        let mut new = String::new();
        while let Err(error) = std::str::from_utf8(rest) {
            let (valid, after) = rest.split_at(error.valid_up_to());
            new += &String::from_utf8_lossy(valid);
            rest = after;
            // No length means that the bytes may still become a character.
            let Some(invalid) = error.error_len() else { break };
            new.push(char::REPLACEMENT_CHARACTER);
            rest = &rest[invalid..];
        }
        if let Ok(valid) = std::str::from_utf8(rest) {
            new += valid;
            rest = &[];
        }
        self.bytes = rest.to_vec();
        if let Some((mark, _)) = self.text.decoding.strip
            && !new.is_empty()
        {
            while self.strip > 0 && new.starts_with(mark) {
                new.remove(0);
                self.strip -= 1;
            }
            if !new.is_empty() {
                self.strip = 0;
            }
        }
        self.out.push(&new);
    }
}
