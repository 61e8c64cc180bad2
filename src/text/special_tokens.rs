//! The special tokens that `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` name,
//! as Hugging Face reads them.

use crate::checkpoint::folder::Folder;
use crate::checkpoint::json::{Document, Field};
use crate::error::excerpt;
use crate::{Error, Result};
use tokenizers::{AddedToken, Tokenizer};

const CONFIG: &str = "tokenizer_config.json";
const MAP: &str = "special_tokens_map.json";
const ADDED: &str = "added_tokens.json";

/// The names of special tokens, in the order in which Hugging Face adds them.
const NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The special tokens of a target folder.
#[derive(Default)]
pub(crate) struct SpecialTokens {
    /// (name, token): the tokens that have a name, such as `bos_token`.
    pub(crate) named: Vec<(String, AddedToken)>,
    /// (file, text): every `eos_token` of both files.
    pub(crate) eos: Vec<(&'static str, String)>,
    /// (id, token) of `added_tokens_decoder` or else of `added_tokens.json`, in order of the ids.
    listed: Vec<(u32, AddedToken)>,
    /// What lists these tokens, for errors.
    list: &'static str,
    /// Special tokens without a name.
    others: Vec<AddedToken>,
}

impl SpecialTokens {
    /// Reads the files, each of which may be absent. A name in `special_tokens_map.json` overrides the same
    /// name in `tokenizer_config.json`. If the latter has an `added_tokens_decoder`, `added_tokens.json` does
    /// not count, and the map only adds to `eos`.
    ///
    /// # Errors
    /// [`Error::Model`] for a malformed file.
    pub(crate) fn open(folder: &Folder) -> Result<SpecialTokens> {
        let config = Document::open(folder, CONFIG)?;
        let map = Document::open(folder, MAP)?;
        let mut tokens =
            SpecialTokens { list: "tokenizer_config.json: added_tokens_decoder", ..Default::default() };
        let decoder = config.as_ref().and_then(|config| config.fields().get("added_tokens_decoder"));
        if let Some(field) = &decoder {
            for (id, value) in field.object("added_tokens_decoder.")?.map {
                let name = format!("added_tokens_decoder.{}", excerpt(id));
                let field = Field { file: field.file, name, value };
                let id = id.parse().map_err(|_| field.wrong("a token under a token id"))?;
                tokens.listed.push((id, token(&field, false)?));
            }
            tokens.listed.sort_by_key(|(id, _)| *id);
        }
        let map_counts = decoder.is_none();
        for name in NAMES {
            let read = |file: &Option<Document>| {
                let field = file.as_ref().and_then(|file| file.fields().get(name));
                field.map(|field| token(&field, true)).transpose()
            };
            let (ours, theirs) = (read(&config)?, read(&map)?);
            if name == "eos_token" {
                let eos = [(CONFIG, &ours), (MAP, &theirs)].into_iter();
                tokens.eos = eos.filter_map(|(file, t)| Some((file, t.as_ref()?.content.clone()))).collect();
            }
            // A null in the map removes the token.
            let overrides = map_counts && map.as_ref().is_some_and(|map| map.map.contains_key(name));
            tokens.named.extend(if overrides { theirs } else { ours }.map(|token| (name.into(), token)));
        }
        if let (true, Some(added)) = (map_counts, Document::open(folder, ADDED)?) {
            tokens.list = ADDED;
            for content in added.map.keys() {
                let id = added.fields().need(content)?.integer(0, u32::MAX as usize)? as u32;
                let special = tokens.named.iter().any(|(_, token)| token.content == *content);
                tokens.listed.push((id, AddedToken::from(content.as_str(), special)));
            }
            tokens.listed.sort_by_key(|(id, _)| *id);
        }
        for file in config.iter().chain(map.iter().filter(|_| map_counts)) {
            let fields = file.fields();
            // Names of a model, such as `image_token`. Fields like `add_bos_token` are not texts.
            for (name, value) in fields.map.iter().filter(|(name, _)| name.ends_with("_token")) {
                let field = Field { file: fields.file, name: excerpt(name), value };
                if !NAMES.contains(&&**name) && (value.is_string() || value.get("content").is_some()) {
                    tokens.named.push((name.clone(), token(&field, true)?));
                }
            }
            for name in ["additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"]
            {
                match fields.get(name) {
                    Some(field) if field.value.is_object() => {
                        for (name, value) in field.object("")?.map {
                            let field = Field { file: field.file, name: excerpt(name), value };
                            tokens.named.push((name.clone(), token(&field, true)?));
                        }
                    }
                    Some(field) => {
                        for field in field.array()? {
                            tokens.others.push(token(&field, true)?);
                        }
                    }
                    None => {}
                }
            }
        }
        Ok(tokens)
    }

    /// Adds the tokens to the tokenizer. Tokens with a name become special. Tokens that it does not have get
    /// the next ids.
    ///
    /// # Errors
    /// [`Error::Model`] if a token would not get the id that `added_tokens_decoder` gives it, or, made by
    /// `failed`, if the tokenizer refuses a token.
    pub(crate) fn add_to(
        &self,
        tokenizer: &mut Tokenizer,
        folder: &Folder,
        failed: impl Fn(String) -> Error,
    ) -> Result<()> {
        let new = |(_, token): &&(u32, AddedToken)| tokenizer.token_to_id(&token.content).is_none();
        let new: Vec<&(u32, AddedToken)> = self.listed.iter().filter(new).collect();
        let add = |tokenizer: &mut Tokenizer, tokens: Vec<AddedToken>| {
            let unknown = |token: &AddedToken| known(tokenizer, token) != Some(token);
            let tokens: Vec<AddedToken> = tokens.into_iter().filter(unknown).collect();
            match tokens.is_empty() {
                true => Ok(0),
                false => tokenizer.add_tokens(tokens).map_err(|e| failed(e.to_string())),
            }
        };
        add(tokenizer, self.listed.iter().map(|(_, token)| token.clone()).collect())?;
        let special = |(_, token): &(String, AddedToken)| {
            let token = known(tokenizer, token).unwrap_or(token);
            AddedToken { special: true, ..token.clone() }
        };
        let named = self.named.iter().map(special).collect();
        add(tokenizer, named)?;
        let others = self.others.iter().filter(|token| known(tokenizer, token).is_none());
        let others = others.cloned().collect();
        add(tokenizer, others)?;
        for (id, token) in new {
            let got = tokenizer.token_to_id(&token.content);
            if got != Some(*id) {
                return Err(Error::Model(format!(
                    "{} gives {:?} the id {id}, but its place after the tokens of tokenizer.json gives {}",
                    folder.path(self.list),
                    excerpt(&token.content),
                    got.map_or("none".into(), |got| got.to_string())
                )));
            }
        }
        Ok(())
    }
}

/// The added token of the tokenizer that has the text of `token`.
fn known<'a>(tokenizer: &'a Tokenizer, token: &AddedToken) -> Option<&'a AddedToken> {
    let added = tokenizer.get_added_vocabulary();
    added.get_added_tokens_decoder().get(added.get_vocab().get(&token.content)?)
}

/// A token as a text, or as an object with `content` and the flags of `tokenizer.json`. `special`: it is
/// special whatever its flag says.
fn token(field: &Field, special: bool) -> Result<AddedToken> {
    let wrong = || field.wrong("a special token: a text, or an object with the text `content`");
    if let Some(content) = field.value.as_str() {
        return Ok(AddedToken::from(content, true));
    }
    let fields = field.object("").map_err(|_| wrong())?;
    let content = fields.get("content").and_then(|content| content.value.as_str()).ok_or_else(wrong)?;
    let flag = |name: &str| fields.get(name).map(|flag| flag.boolean()).transpose();
    let special = flag("special")?.unwrap_or(false) || special;
    let token = AddedToken::from(content, special);
    Ok(AddedToken {
        single_word: flag("single_word")?.unwrap_or(false),
        lstrip: flag("lstrip")?.unwrap_or(false),
        rstrip: flag("rstrip")?.unwrap_or(false),
        normalized: flag("normalized")?.unwrap_or(token.normalized),
        ..token
    })
}
