//! The tokenizer: text to token ids, and token ids to streamed text.
//!
//! The `tokenizers` crate encodes. Decoding is done here, token by token, because answers are streamed. The
//! crate's own stream decodes its window again for every token and emits nothing while the text ends in
//! U+FFFD, so one invalid byte stops its output. Here a token becomes bytes, and bytes become text as soon as
//! they are whole characters. A byte that cannot be part of a character becomes U+FFFD at once.

use crate::checkpoint::config::TargetConfig;
use crate::checkpoint::folder::Folder;
use crate::checkpoint::json;
use crate::checkpoint::stop_ids::StopIds;
use crate::error::{excerpt, one_line};
use crate::text::chat_template::{ChatTemplates, Template};
use crate::text::decoding::{DecoderFile, Decoding, Piece, byte_length};
use crate::text::message::Message;
use crate::text::special_tokens::SpecialTokens;
use crate::text::stop_strings::StopStrings;
use crate::text::untrusted::{TOKENIZER_STACKS, guarded};
use crate::{Error, Result};
use serde::Deserialize;
use serde_json::Value;
use tokenizers::models::ModelWrapper;
use tokenizers::{Model, Tokenizer};

/// Tokenizer and chat template of a target folder.
pub struct Text {
    tokenizer: Tokenizer,
    /// The path of `tokenizer.json`, for errors.
    path: String,
    decoding: Decoding,
    /// The bos token to add before raw text. `None` if the tokenizer's post-processor adds it or the model
    /// uses none.
    bos: Option<u32>,
    /// The special tokens that its other files name. Those with a name are template variables.
    specials: SpecialTokens,
    templates: ChatTemplates,
    /// The context that texts are for ([`Text::limit`]).
    context: Option<usize>,
    longest_token: Option<LongestToken>,
    /// What the user should know about the files: one sentence each.
    pub notes: Vec<String>,
}

/// The fields of `tokenizer_config.json` that are used. `clean_up_tokenization_spaces` is ignored on purpose:
/// it would remove spaces from generated code.
#[derive(Deserialize, Default)]
#[serde(default)]
struct TokenizerConfig {
    chat_template: Option<serde_json::Value>,
    add_bos_token: Option<bool>,
}

/// The parts of `tokenizer.json` that this module reads itself.
#[derive(Deserialize)]
struct TokenizerFile {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    model: ModelFile,
    decoder: Option<DecoderFile>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct ModelFile {
    #[serde(rename = "type")]
    kind: Option<String>,
    byte_fallback: Option<bool>,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
}

impl Text {
    /// Reads `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and the chat templates.
    /// `template` overrides the folder's chat templates: (name in errors, source). A fault of the folder's
    /// templates is an error only when they are used.
    ///
    /// # Errors
    /// [`Error::Model`] for a file that is missing or malformed; [`Error::Unsupported`] for a decoder whose
    /// text cannot be produced token by token; [`Error::Usage`] if the overriding template does not parse.
    pub fn open(folder: &Folder, template: Option<(&str, String)>) -> Result<Self> {
        Text::find(folder, template)?.ok_or_else(|| Text::missing(folder))
    }

    /// The error for a folder without `tokenizer.json`.
    pub fn missing(folder: &Folder) -> Error {
        let path = folder.path("tokenizer.json");
        Error::Model(format!(
            "{path} is missing: expected the tokenizer in the target's folder, or prompts of token ids"
        ))
    }

    /// As [`Text::open`]; `None` if the folder has no `tokenizer.json`.
    ///
    /// # Errors
    /// As [`Text::open`]; [`Error::Option`] for a `template` without `tokenizer.json`.
    pub fn find(folder: &Folder, template: Option<(&str, String)>) -> Result<Option<Self>> {
        let path = folder.path("tokenizer.json");
        let Some(bytes) = folder.file("tokenizer.json")? else {
            return match template {
                Some(_) => Err(without_tokenizer("chat_template", folder)),
                None => Ok(None),
            };
        };
        let bytes = json::without_mark(&bytes);
        let file: TokenizerFile = json::parse(&path, bytes)?;
        let malformed =
            |what: String| Error::Model(format!("{path} is not a tokenizer: {}", one_line(&what)));
        let source = std::str::from_utf8(bytes).map_err(|e| malformed(e.to_string()))?;
        // `FromStr` is compiled in the crate, `from_bytes` would compile its whole parser again here.
        let parse = || source.parse::<Tokenizer>().map_err(|e| malformed(e.to_string()));
        let mut tokenizer = guarded(TOKENIZER_STACKS, parse, malformed)??;
        // Prompts are neither truncated nor padded, whatever the file says. A padding length in the file
        // could cause an allocation of any size.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| malformed(e.to_string()))?;
        // Dropout picks merges at random, and is for training. The same text must always have the same
        // tokens.
        let mut notes = Vec::new();
        if let ModelWrapper::BPE(model) = tokenizer.get_model()
            && let Some(dropout) = model.dropout.filter(|dropout| *dropout != 0.0)
        {
            let mut model = model.clone();
            model.dropout = None;
            tokenizer.with_model(model);
            notes.push(format!(
                "{path}: the dropout of {dropout} is ignored, so the same text has the same tokens"
            ));
        }
        // The crate numbers added tokens in order and ignores the ids in the file.
        for AddedToken { id, content, .. } in &file.added_tokens {
            let got = tokenizer.token_to_id(content);
            if got != Some(*id) {
                let got = got.map_or("none".into(), |got| got.to_string());
                return Err(malformed(format!(
                    "added token {:?} has id {id}, but its place in the list gives {got}",
                    excerpt(content)
                )));
            }
        }
        let specials = SpecialTokens::open(folder)?;
        let named_bos = specials.named.iter().find(|(name, _)| name == "bos_token").map(|(_, bos)| bos);
        let bos_id = named_bos.and_then(|bos| tokenizer.token_to_id(&bos.content));
        guarded(TOKENIZER_STACKS, || specials.add_to(&mut tokenizer, folder, malformed), malformed)??;
        let longest_token = longest_token(&tokenizer, &file);
        let decoding = Decoding::new(file.decoder, &path)?;

        let config_path = folder.path("tokenizer_config.json");
        let config: TokenizerConfig = match folder.file("tokenizer_config.json")? {
            Some(bytes) => json::parse(&config_path, &bytes)?,
            None => TokenizerConfig::default(),
        };

        let mut text = Text {
            tokenizer,
            decoding,
            bos: None,
            specials,
            templates: ChatTemplates::open(folder, config.chat_template, template)?,
            context: None,
            longest_token,
            notes,
            path,
        };
        if config.add_bos_token == Some(true) {
            let id = bos_id.ok_or_else(|| {
                Error::Model(format!(
                    "{config_path}: add_bos_token is true without a bos_token that {} has",
                    text.path
                ))
            })?;
            let post_processor_adds_it = text.ids("", true)?.first() == Some(&id);
            text.bos = (!post_processor_adds_it).then_some(id);
        }
        Ok(Some(text))
    }

    /// Refuses texts before they are tokenised if they cannot have fewer tokens than `context`, as far as the
    /// tokenizer has a bound: a text has at least its bytes divided by those of the longest token.
    pub fn limit(&mut self, context: usize) {
        self.context = Some(context);
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

    /// Converts a conversation to token ids with the chat template, generation prompt included. `tools` is
    /// the JSON array of tools that the model may call. `args` are template variables (name, value);
    /// `enable_thinking` is false unless given. The template writes bos and other special tokens itself, so
    /// none are added to its output.
    ///
    /// # Errors
    /// [`Error::Option`] if there is no template, or if a variable is reserved, has a wrong type or is not
    /// read by the template; [`Error::Usage`] if the template does not read the tools or refuses the
    /// conversation (`raise_exception`). If the template itself fails: [`Error::Usage`] for an overriding
    /// template, [`Error::Model`] for the folder's.
    pub fn encode_chat(
        &self,
        messages: &[Message],
        tools: Option<&serde_json::Value>,
        args: &[(String, serde_json::Value)],
    ) -> Result<Vec<u32>> {
        let (template, tools) = self.template(tools, args)?;
        let mut variables = serde_json::Map::new();
        for (name, token) in &self.specials.named {
            variables.insert(name.clone(), token.content.as_str().into());
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
        variables.insert("messages".into(), serde_json::json!(messages));
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
        if let (Some(context), Some(longest)) = (self.context, &self.longest_token)
            && text.len() > longest.of(text).saturating_mul(context)
        {
            return Err(Error::Usage(format!(
                "a text of {} bytes has more tokens than the context, which holds {context}, the answer included",
                text.len()
            )));
        }
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

    /// The id of a special token by its spelling. Special tokens have no text, so a stop string that is one
    /// has to stop by its id.
    pub fn special_id(&self, token: &str) -> Option<u32> {
        let is_special = self.tokenizer.get_added_vocabulary().is_special_token(token);
        self.tokenizer.token_to_id(token).filter(|_| is_special)
    }

    /// Makes a detokenizer for one answer. The text ends before the first of the stop strings `stops`. One
    /// that is a special token ends the answer by its id ([`Text::special_id`]).
    ///
    /// # Errors
    /// [`Error::Option`] if a stop string is empty, or holds a special token and other text.
    pub fn stream(&self, stops: &[String]) -> Result<Stream<'_>> {
        let mut special = Vec::new();
        for stop in stops {
            if stop.is_empty() {
                return Err(Error::option("stop", "is empty, expected at least one character"));
            }
            match self.special_id(stop) {
                Some(id) => special.push(id),
                None => self.refuse_special_part(stop)?,
            }
        }
        Ok(Stream {
            text: self,
            first: true,
            special,
            bytes: Vec::new(),
            run: None,
            strip: self.decoding.strip.map_or(0, |(_, count)| count),
            out: StopStrings::new(stops.to_vec()),
        })
    }

    /// Refuses a stop string that holds a special token and other text: it would never match, because special
    /// tokens have no text.
    fn refuse_special_part(&self, stop: &str) -> Result<()> {
        let added = self.tokenizer.get_added_vocabulary().get_added_tokens_decoder();
        let parts = added.values().filter(|token| token.special && stop.contains(&token.content));
        match parts.map(|token| &token.content).min() {
            None => Ok(()),
            Some(token) => Err(Error::option(
                "stop",
                format!(
                    "is {:?}, which holds the special token {:?} and other text: special tokens have no text, so \
                     expected the token alone",
                    excerpt(stop),
                    excerpt(token)
                ),
            )),
        }
    }

    /// The string of a token; `None` for special tokens and for ids without a token, which have no text.
    fn token(&self, id: u32) -> Option<String> {
        let added = self.tokenizer.get_added_vocabulary();
        let token = added.simple_id_to_token(id).or_else(|| self.tokenizer.get_model().id_to_token(id))?;
        (!added.is_special_token(&token)).then_some(token)
    }
}

/// The stop ids that a target's files name: those of `config`, and every `eos_token` of the tokenizer's files
/// that the target can emit.
pub fn stop_ids(config: &TargetConfig, text: Option<&Text>) -> StopIds {
    let mut stops = config.eos.clone();
    let Some(Text { tokenizer, specials, .. }) = text else { return stops };
    for (file, content) in &specials.eos {
        if let Some(id) = tokenizer.token_to_id(content).filter(|id| (*id as usize) < config.vocab) {
            stops.add(id, file);
        }
    }
    stops
}

/// As [`Text::stream`]; `None` if the target's `folder` has no tokenizer.
///
/// # Errors
/// As [`Text::stream`]; [`Error::Option`] for stop strings without a tokenizer.
pub fn stream<'a>(text: Option<&'a Text>, stops: &[String], folder: &Folder) -> Result<Option<Stream<'a>>> {
    match text {
        Some(text) => text.stream(stops).map(Some),
        None if stops.is_empty() => Ok(None),
        None => Err(without_tokenizer("stop", folder)),
    }
}

/// The error for an option that is of no use without a tokenizer.
fn without_tokenizer(option: &'static str, folder: &Folder) -> Error {
    let folder = folder.described();
    Error::option(option, format!("needs a tokenizer, but {folder} has no tokenizer.json"))
}

/// The most bytes of text that become one token.
struct LongestToken {
    bytes: usize,
    /// How many times shorter normalisation can make a text that is not ASCII.
    shrinks: usize,
}

impl LongestToken {
    fn of(&self, text: &str) -> usize {
        if text.is_ascii() { self.bytes } else { self.bytes.saturating_mul(self.shrinks) }
    }
}

/// The longest token of tokenizers where it bounds the number of tokens: BPE that spells every byte, drops
/// nothing, and changes a text at most by NFC, or by writing `▁` for spaces.
fn longest_token(tokenizer: &Tokenizer, file: &TokenizerFile) -> Option<LongestToken> {
    let steps = |value: &Value, list: &str, keeps: fn(&Value) -> bool| match &value[list] {
        Value::Array(steps) => steps.iter().all(keeps),
        _ => value.is_null() || keeps(value),
    };
    let is_nfc = file.normalizer["type"] == "NFC";
    let keeps_text = steps(&file.normalizer, "normalizers", |step| {
        step["type"] == "Prepend"
            || (step["type"] == "Replace" && step["pattern"]["String"] == " " && step["content"] == "▁")
    });
    let drops_nothing = steps(&file.pre_tokenizer, "pretokenizers", |step| {
        let kinds = ["ByteLevel", "Digits", "Metaspace"];
        kinds.iter().any(|kind| step["type"] == *kind)
            || (step["type"] == "Split" && step["behavior"] != "Removed")
    });
    // An added token may take in the spaces around it.
    let added_tokens = tokenizer.get_added_vocabulary().get_added_tokens_decoder();
    if file.model.kind.as_deref() != Some("BPE")
        || !(is_nfc || keeps_text)
        || !drops_nothing
        || added_tokens.values().any(|token| token.lstrip || token.rstrip)
    {
        return None;
    }
    let vocab = tokenizer.get_vocab(false);
    let spells_bytes = match file.model.byte_fallback {
        Some(true) => (0..=255).all(|byte: u8| vocab.contains_key(&format!("<0x{byte:02X}>"))),
        _ => {
            let is_byte = |token: &&String| byte_length(token) == Some(1);
            file.pre_tokenizer.to_string().contains("\"ByteLevel\"")
                && vocab.keys().filter(is_byte).count() == 256
        }
    };
    let bytes = |token: &String| match file.model.byte_fallback {
        Some(true) => token.len(),
        _ => byte_length(token).unwrap_or(token.len()),
    };
    let added = added_tokens.values().map(|token| token.content.len());
    let bytes = vocab.keys().map(bytes).chain(added).max()?;
    // NFC makes at most three bytes one: 9 bytes of Hangul letters become a syllable of 3.
    spells_bytes.then_some(LongestToken { bytes, shrinks: if is_nfc { 3 } else { 1 } })
}

/// An incremental detokenizer. It never returns a part of a character or text that may begin a stop string.
/// It returns the text of a run of byte tokens when the run ends, because one invalid byte changes all of it.
///
/// All returned texts together, including that of [`Stream::finish`], are what the tokenizer's decoder gives
/// for all ids at once, up to the stop. The text ends at the stop string that is complete first, or at the
/// longest of several that are complete at the same character. The cost of a token does not depend on the
/// length of the answer.
pub struct Stream<'a> {
    text: &'a Text,
    /// Whether no token with text has been pushed yet.
    first: bool,
    /// Special tokens that end the text.
    special: Vec<u32>,
    /// The bytes of an incomplete character, at most 3.
    bytes: Vec<u8>,
    /// The byte tokens at the end of the text, if it ends in any.
    run: Option<Run>,
    /// How many characters may still be dropped from the start of the text.
    strip: usize,
    out: StopStrings,
}

/// A run of tokens like `<0x0A>`. It is text if all its bytes together are UTF-8; otherwise each of its
/// tokens is U+FFFD, as in the `tokenizers` crate. Its text is provisional until the run ends.
struct Run {
    tokens: usize,
    /// [`Stream::strip`] before the run.
    strip: usize,
    /// Whether its bytes cannot become UTF-8.
    invalid: bool,
}

impl Stream<'_> {
    /// Appends a token. Returns the new text, which may be empty, and whether a stop string is complete. The
    /// text ends just before the stop string, and later tokens have no text.
    ///
    /// # Errors
    /// This version returns none.
    pub fn push(&mut self, id: u32) -> Result<(String, bool)> {
        if self.special.contains(&id) {
            self.flush();
            self.out.stop();
        }
        if !self.out.stopped()
            && let Some(token) = self.text.token(id)
        {
            match self.text.decoding.piece(token, self.first) {
                Piece::Fallback(byte) => self.push_fallback(byte),
                Piece::Bytes(bytes) => {
                    self.end_run();
                    self.bytes.extend(bytes);
                    self.decode_bytes();
                }
            }
            self.first = false;
        }
        Ok((self.out.release(), self.out.stopped()))
    }

    /// Ends the answer. Returns the text that was held back. An incomplete character becomes U+FFFD.
    pub fn finish(mut self) -> String {
        self.flush();
        self.out.finish()
    }

    /// Ends a run of byte tokens. An incomplete character becomes U+FFFD.
    fn flush(&mut self) {
        self.end_run();
        if !self.bytes.is_empty() {
            self.bytes.clear();
            self.out.push("\u{fffd}");
        }
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
        self.append(new);
    }

    /// Appends the byte of a fallback token.
    fn push_fallback(&mut self, byte: u8) {
        let run = self.run.get_or_insert_with(|| {
            self.out.begin_provisional();
            Run { tokens: 0, strip: self.strip, invalid: false }
        });
        run.tokens += 1;
        if run.invalid {
            return self.append("\u{fffd}".into());
        }
        self.bytes.push(byte);
        match std::str::from_utf8(&self.bytes).map(String::from) {
            Ok(text) => {
                self.bytes.clear();
                self.append(text);
            }
            Err(error) if error.error_len().is_some() => self.replace_run(),
            Err(_) => {}
        }
    }

    /// Ends a run of byte tokens, if there is one.
    fn end_run(&mut self) {
        if self.run.is_some() && !self.bytes.is_empty() {
            self.replace_run();
        }
        self.run = None;
        self.out.keep();
    }

    /// Replaces every token of the run by U+FFFD.
    fn replace_run(&mut self) {
        let Some(run) = &mut self.run else { return };
        run.invalid = true;
        self.strip = run.strip;
        let marks = "\u{fffd}".repeat(run.tokens);
        self.bytes.clear();
        self.out.withdraw();
        self.append(marks);
    }

    /// Appends text to the answer, without what the decoder strips from its start.
    fn append(&mut self, mut new: String) {
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
