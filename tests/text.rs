//! Prompts to tokens and tokens to text: held against the `tokenizers` crate's own decoder, recorded reference ids,
//! outputs of Python's jinja2, and a naive search for stop strings.

use dflash::text::{Message, Stream, Text};
use dflash::weights::{DEMO_TARGET, Folder};
use dflash::{Error, Result};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::LazyLock;
use tokenizers::Tokenizer;

const TOKENIZER: &str = include_str!("../demo/target/tokenizer.json");
const ORACLE: &str = include_str!("data/oracle.json");

static DEMO: LazyLock<Text> = LazyLock::new(|| Text::open(&DEMO_TARGET, None).unwrap());
static CRATE: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::from_bytes(TOKENIZER).unwrap());
static SENTENCEPIECE: LazyLock<Text> =
    LazyLock::new(|| open(&[("tokenizer.json", &sentencepiece().to_string())]).unwrap());
static SENTENCEPIECE_CRATE: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::from_bytes(sentencepiece().to_string()).unwrap());

/// Opens a folder of these files.
fn open(files: &[(&str, &str)]) -> Result<Text> {
    open_with(files, None)
}

fn open_with(files: &[(&str, &str)], template: Option<(&str, &str)>) -> Result<Text> {
    let dir = tempfile::tempdir().unwrap();
    for (name, contents) in files {
        std::fs::write(dir.path().join(name), contents).unwrap();
    }
    Text::open(&Folder::Disk(dir.path().into()), template.map(|(name, source)| (name, source.to_string())))
}

/// The demo tokenizer with a chat template of its own.
fn with_template(source: &str) -> Text {
    open(&[("tokenizer.json", TOKENIZER), ("chat_template.jinja", source)]).unwrap()
}

/// What a template makes of a conversation, by way of the tokenizer.
fn render(text: &Text, messages: &[(&str, &str)], args: &[(&str, Value)]) -> Result<String> {
    let messages: Vec<Message> = messages
        .iter()
        .map(|(role, content)| Message { role: role.to_string(), content: content.to_string() })
        .collect();
    let args: Vec<(String, Value)> =
        args.iter().map(|(name, value)| (name.to_string(), value.clone())).collect();
    text.decode(&text.encode_chat(&messages, &args)?)
}

/// What an expression or template body prints.
fn rendered(source: &str) -> Result<String> {
    render(&with_template(source), &[("user", "hi")], &[])
}

fn tokenizer_json() -> Value {
    serde_json::from_str(TOKENIZER).unwrap()
}

/// A small tokenizer in Llama 2's layout: `▁` for spaces, byte tokens for what has no token.
fn sentencepiece() -> Value {
    let mut pieces: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).into();
    pieces.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    pieces.extend(
        ["▁", "a", "b", "t", "h", "e", "é", "▁a", "▁t", "he", "▁the", "▁▁", ".", "\n"].map(String::from),
    );
    let vocab: serde_json::Map<String, Value> =
        pieces.into_iter().enumerate().map(|(id, piece)| (piece, json!(id))).collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
            "merges": [["▁", "t"], ["h", "e"], ["▁t", "he"], ["▁", "a"], ["▁", "▁"]]},
    })
}

/// The demo token that is this one byte.
fn byte_token(byte: u8) -> u32 {
    static BYTES: LazyLock<Vec<u32>> = LazyLock::new(|| {
        // GPT-2's table, written the other way round: printable bytes are themselves, the rest follow from U+0100.
        let printable = |b: u8| (33..=126).contains(&b) || (161..=172).contains(&b) || b >= 174;
        let mut others = 0x100..;
        (0..=255u8)
            .map(|b| if printable(b) { b as u32 } else { others.next().unwrap() })
            .map(|code| CRATE.token_to_id(&char::from_u32(code).unwrap().to_string()).unwrap())
            .collect()
    });
    BYTES[byte as usize]
}

/// All pushes, and what `finish` adds.
fn streamed(mut stream: Stream, ids: &[u32]) -> (Vec<(String, bool)>, String) {
    let pushes = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
    (pushes, stream.finish())
}

fn joined(pushes: &[(String, bool)]) -> String {
    pushes.iter().map(|(text, _)| text.as_str()).collect()
}

/// Text with what makes detokenising hard: characters of every length, joiners, U+FFFD itself.
fn unicode() -> impl Strategy<Value = String> {
    let pieces = prop_oneof![
        any::<char>().prop_map(String::from),
        Just("👩‍💻".to_string()),
        Just("日本語".to_string()),
        Just("é".to_string()),
        Just(" the".to_string()),
        Just("\u{fffd}".to_string()),
        "[ -~\n]{0,6}",
    ];
    prop::collection::vec(pieces, 0..12).prop_map(|pieces| pieces.concat())
}

// Detokenising

proptest! {
    /// Any ids, ids without a token among them.
    #[test]
    fn pushes_add_up_to_the_decoding_of_all_ids(ids in prop::collection::vec(0u32..2060, 0..60)) {
        let expected = CRATE.decode(&ids, true).unwrap();
        let (pushes, rest) = streamed(DEMO.stream(&[]).unwrap(), &ids);
        prop_assert_eq!(joined(&pushes) + &rest, expected.clone());
        prop_assert_eq!(DEMO.decode(&ids).unwrap(), expected);
    }

    /// Any bytes, one token each: nearly everything is invalid.
    #[test]
    fn invalid_bytes_are_replaced_as_the_whole_would_be(
        bytes in prop::collection::vec(prop_oneof![any::<u8>(), 0xe0u8..0xf5, 0x80u8..0xc0], 0..40),
    ) {
        let ids: Vec<u32> = bytes.iter().map(|b| byte_token(*b)).collect();
        let (pushes, rest) = streamed(DEMO.stream(&[]).unwrap(), &ids);
        prop_assert_eq!(joined(&pushes) + &rest, String::from_utf8_lossy(&bytes));
        for end in 0..=ids.len() {
            // Only the start of a character is ever held back.
            let held = String::from_utf8_lossy(&bytes[..end]).into_owned();
            let held = held.strip_prefix(&joined(&pushes[..end])).unwrap();
            prop_assert!(held.is_empty() || held == "\u{fffd}", "{:?}", held);
        }
    }

    /// Characters split across tokens, cut after every byte: each comes out whole, with the token that completes it.
    #[test]
    fn characters_appear_whole_with_their_last_byte(text in unicode()) {
        let ids: Vec<u32> = text.bytes().map(byte_token).collect();
        let (pushes, rest) = streamed(DEMO.stream(&[]).unwrap(), &ids);
        prop_assert_eq!(rest, "");
        for end in 0..=ids.len() {
            let whole = (0..=end).rev().find(|at| text.is_char_boundary(*at)).unwrap();
            prop_assert_eq!(joined(&pushes[..end]), &text[..whole]);
        }
    }

    #[test]
    fn text_survives_the_way_through_tokens(text in unicode()) {
        prop_assume!(!text.contains("<|"));
        prop_assert_eq!(DEMO.decode(&DEMO.encode(&text).unwrap()).unwrap(), text);
    }

    /// SentencePiece layout. A run of byte tokens that is not UTF-8 is replaced as a whole there, so only valid ones
    /// are compared.
    #[test]
    fn sentencepiece_pushes_add_up_to_the_decoding_of_all_ids(ids in prop::collection::vec(
        prop_oneof![Just(3 + 0x20u32), Just(3 + 0x41u32), 0u32..3, 259u32..276], 0..30,
    )) {
        let expected = SENTENCEPIECE_CRATE.decode(&ids, true).unwrap();
        let (pushes, rest) = streamed(SENTENCEPIECE.stream(&[]).unwrap(), &ids);
        prop_assert_eq!(joined(&pushes) + &rest, expected);
    }

    #[test]
    fn sentencepiece_text_survives_the_way_through_tokens(text in unicode()) {
        prop_assume!(!["<s>", "</s>", "<unk>", "▁"].iter().any(|token| text.contains(token)));
        let ids = SENTENCEPIECE.encode(&text).unwrap();
        let (pushes, rest) = streamed(SENTENCEPIECE.stream(&[]).unwrap(), &ids);
        prop_assert_eq!(joined(&pushes) + &rest, text.clone());
        prop_assert_eq!(SENTENCEPIECE_CRATE.decode(&ids, true).unwrap(), text);
    }
}

#[test]
fn a_lost_byte_shows_as_soon_as_it_is_certain() {
    let push = |stream: &mut Stream, byte| stream.push(byte_token(byte)).unwrap().0;
    let mut stream = DEMO.stream(&[]).unwrap();
    assert_eq!(push(&mut stream, 0x80), "\u{fffd}"); // never the first byte of a character
    assert_eq!(push(&mut stream, 0xf0), ""); // may become one
    assert_eq!(push(&mut stream, 0x9f), "");
    assert_eq!(push(&mut stream, b'a'), "\u{fffd}a"); // it did not
    assert_eq!(push(&mut stream, 0xe6), "");
    assert_eq!(stream.finish(), "\u{fffd}");
}

/// Decoding a growing window again for every token would not end here.
#[test]
fn an_endless_run_of_invalid_bytes_streams() {
    for byte in [0x80, 0xe2, 0xff] {
        let mut stream = DEMO.stream(&["\u{fffd}x".to_string()]).unwrap();
        let mut bytes = 0;
        for _ in 0..200_000 {
            bytes += stream.push(byte_token(byte)).unwrap().0.len();
        }
        assert!(bytes >= 3 * 199_998, "{byte:#x}: {bytes}");
    }
}

#[test]
fn the_first_space_of_a_sentencepiece_answer_is_not_text() {
    let id = |token: &str| SENTENCEPIECE_CRATE.token_to_id(token).unwrap();
    let ids = [id("▁the"), id("▁the"), id("▁▁"), id("▁a")];
    let (pushes, rest) = streamed(SENTENCEPIECE.stream(&[]).unwrap(), &ids);
    let pushes: Vec<&str> = pushes.iter().map(|(text, _)| text.as_str()).collect();
    assert_eq!((pushes, rest.as_str()), (vec!["the", " the", "  ", " a"], ""));
    // A byte token may be that space as well.
    assert_eq!(SENTENCEPIECE.decode(&[3 + 0x20, 3 + 0x20, id("a")]).unwrap(), " a");
}

#[test]
fn metaspace_decoders_match_the_crate() {
    for scheme in ["always", "first", "never"] {
        let mut tokenizer = sentencepiece();
        tokenizer["decoder"] =
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true});
        let text = open(&[("tokenizer.json", &tokenizer.to_string())]).unwrap();
        let oracle = Tokenizer::from_bytes(tokenizer.to_string()).unwrap();
        let ids: Vec<u32> = ["▁▁", "▁the", "a", "▁", "."].map(|t| oracle.token_to_id(t).unwrap()).into();
        assert_eq!(text.decode(&ids).unwrap(), oracle.decode(&ids, true).unwrap(), "{scheme}");
        let with_special = [&[1], &ids[..]].concat();
        assert_eq!(
            text.decode(&with_special).unwrap(),
            oracle.decode(&with_special, true).unwrap(),
            "{scheme}"
        );
    }
}

#[test]
fn special_tokens_have_no_text_and_lookalikes_do() {
    let mut tokenizer = tokenizer_json();
    let added = json!({"id": 2048, "content": "<think>", "single_word": false, "lstrip": false, "rstrip": false,
                       "normalized": false, "special": false});
    tokenizer["added_tokens"].as_array_mut().unwrap().push(added);
    let text = open(&[("tokenizer.json", &tokenizer.to_string())]).unwrap();
    assert_eq!(text.encode("<|endoftext|><think>").unwrap(), [0, 2048]);
    let spelled: Vec<u32> = "<|endoftext|>".bytes().map(byte_token).collect();
    let ids = [&[0, 2048, 1], &spelled[..], &[0]].concat();
    assert_eq!(text.decode(&ids).unwrap(), "<think><|endoftext|>");
}

#[test]
fn decoders_that_cannot_be_streamed_are_refused_by_name() {
    let strip_the_end = json!({"type": "Sequence", "decoders": [
        {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 0, "stop": 1}]});
    let strip_each =
        json!({"type": "Sequence", "decoders": [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
    let late_replace = json!({"type": "Sequence", "decoders": [
        {"type": "Fuse"}, {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]});
    let regex = json!({"type": "Replace", "pattern": {"Regex": "a|b"}, "content": " "});
    for (decoder, name) in [
        (strip_the_end, "Strip"),
        (strip_each, "Strip"),
        (late_replace, "Replace"),
        (regex, "Replace"),
        (Value::Null, "null"),
    ] {
        let mut tokenizer = sentencepiece();
        tokenizer["decoder"] = decoder;
        let Err(Error::Unsupported(message)) = open(&[("tokenizer.json", &tokenizer.to_string())]) else {
            panic!("{name} was not refused");
        };
        assert!(message.contains("tokenizer.json") && message.contains(name), "{message}");
    }
    let mut tokenizer = sentencepiece();
    tokenizer["decoder"] = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    let Err(Error::Model(message)) = open(&[("tokenizer.json", &tokenizer.to_string())]) else { panic!() };
    assert!(message.contains("WordPiece"), "{message}");
}

// Stop strings

/// (text before the stop, bytes up to and with the stop), by looking at every prefix of the text, char by char.
fn naive_stop(text: &str, stops: &[String]) -> Option<(String, usize)> {
    let ends = text.char_indices().map(|(at, c)| at + c.len_utf8());
    ends.filter_map(|end| {
        let complete = stops.iter().filter(|stop| text[..end].ends_with(stop.as_str()));
        complete.map(|stop| end - stop.len()).min().map(|start| (text[..start].to_string(), end))
    })
    .next()
}

/// How much of the end of `text` could be the start of a stop string.
fn naive_held(text: &str, stops: &[String]) -> usize {
    let starts = text.char_indices().map(|(at, _)| at);
    starts
        .map(|at| text.len() - at)
        .find(|len| stops.iter().any(|s| s.starts_with(&text[text.len() - len..])))
        .unwrap_or(0)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn stops_cut_where_a_naive_search_finds_them(
        pieces in prop::collection::vec(
            prop::sample::select(vec!["a", "b", "€", "👩", "self", "se", " return", "l", "ab"]), 0..12),
        stops in prop::collection::vec(prop_oneof!["[ab]{1,4}", "[ab€👩]{1,3}", "[self]{1,5}"], 0..3),
        parts in prop::collection::vec((any::<prop::sample::Index>(), 1usize..7), 0..3),
        whole_tokens in any::<bool>(),
    ) {
        let text = pieces.concat();
        let chars: Vec<char> = text.chars().collect();
        let mut stops = stops;
        for (at, length) in parts {
            if !chars.is_empty() {
                stops.push(chars[at.index(chars.len())..].iter().take(length).collect());
            }
        }
        let ids: Vec<u32> = if whole_tokens {
            DEMO.encode(&text).unwrap()
        } else {
            text.bytes().map(byte_token).collect()
        };
        // One character of a token's spelling is one byte.
        let lengths = ids.iter().map(|id| CRATE.id_to_token(*id).unwrap().chars().count());
        let (pushes, rest) = streamed(DEMO.stream(&stops).unwrap(), &ids);
        let stop = naive_stop(&text, &stops);
        let expected = stop.as_ref().map_or(&text, |(before, _)| before);
        prop_assert_eq!(&(joined(&pushes) + &rest), expected);
        prop_assert_eq!(pushes.iter().any(|(_, stopped)| *stopped), stop.is_some());
        // Nothing is told late: neither a stop nor text that cannot belong to one.
        let mut end = 0;
        for (i, length) in lengths.enumerate() {
            end += length;
            let stopped = stop.as_ref().is_some_and(|(_, complete)| end >= *complete);
            prop_assert_eq!(pushes[i].1, stopped);
            if !stopped {
                let whole = (0..=end).rev().find(|at| text.is_char_boundary(*at)).unwrap();
                let released = whole - naive_held(&text[..whole], &stops);
                prop_assert_eq!(joined(&pushes[..=i]), &text[..released]);
            }
        }
    }
}

#[test]
fn the_stop_that_is_complete_first_wins() {
    let stop = |text: &str, stops: &[&str]| {
        let stops: Vec<String> = stops.iter().map(|s| s.to_string()).collect();
        let (pushes, rest) = streamed(DEMO.stream(&stops).unwrap(), &DEMO.encode(text).unwrap());
        joined(&pushes) + &rest
    };
    assert_eq!(stop("one two three", &["two three", "wo"]), "one t");
    assert_eq!(stop("one two three", &["o", "two"]), "");
    assert_eq!(stop("say two", &["wo", "two"]), "say "); // both complete at once: the earlier start
    assert_eq!(DEMO.encode(" return").unwrap().len(), 1);
    assert_eq!(stop("x return", &["return", "etu"]), "x r"); // in one token as well
    assert_eq!(stop("aaab", &["aab"]), "a"); // a failed attempt is the start of the next
    assert_eq!(stop("an unfinished sto", &["stop"]), "an unfinished sto");
    assert_eq!(stop("price: 3€!", &["€"]), "price: 3");
}

#[test]
fn nothing_follows_a_stop() {
    let ids = DEMO.encode("one two three four").unwrap();
    let (pushes, rest) = streamed(DEMO.stream(&[" two".into()]).unwrap(), &ids);
    assert_eq!((joined(&pushes).as_str(), rest.as_str()), ("one", ""));
    let first = pushes.iter().position(|(_, stopped)| *stopped).unwrap();
    assert!(pushes[first + 1..].iter().all(|(text, stopped)| text.is_empty() && *stopped));
}

#[test]
fn special_tokens_do_not_break_a_stop_string() {
    let ids = [byte_token(b'a'), byte_token(b'b'), 0, byte_token(b'c'), byte_token(b'd')];
    let (pushes, rest) = streamed(DEMO.stream(&["bc".into()]).unwrap(), &ids);
    assert_eq!(joined(&pushes) + &rest, "a");
}

#[test]
fn an_empty_stop_string_is_refused() {
    let Err(Error::Usage(message)) = DEMO.stream(&["x".into(), String::new()]) else { panic!() };
    assert!(message.contains("--stop"), "{message}");
}

// Raw prompts

#[test]
fn raw_prompts_have_the_ids_of_the_reference() {
    let oracle: Value = serde_json::from_str(ORACLE).unwrap();
    let prompts = oracle["prompts"].as_array().unwrap();
    assert_eq!(prompts.len(), 40);
    for prompt in prompts {
        let text = prompt["prompt"].as_str().unwrap();
        let ids: Vec<u32> = serde_json::from_value(prompt["prompt_ids"].clone()).unwrap();
        assert_eq!(DEMO.encode(text).unwrap(), ids, "{text}");
        assert_eq!(DEMO.decode(&ids).unwrap(), text);
    }
}

#[test]
fn raw_text_recognises_special_tokens() {
    assert_eq!(DEMO.encode("<|endoftext|>").unwrap(), [0]);
    assert!(DEMO.encode("").unwrap().is_empty());
}

#[test]
fn bos_is_added_once() {
    let plain = DEMO.encode("import os").unwrap();
    let bos = [&[1], &plain[..]].concat();
    let config = r#"{"add_bos_token": true, "bos_token": {"content": "<|mask|>", "special": true}}"#;
    let text = open(&[("tokenizer.json", TOKENIZER), ("tokenizer_config.json", config)]).unwrap();
    assert_eq!(text.encode("import os").unwrap(), bos);
    // What is in the text is the text's.
    assert_eq!(text.encode("<|mask|>import os").unwrap(), [&[1], &bos[..]].concat());

    let sentencepiece = sentencepiece().to_string();
    let expected = SENTENCEPIECE_CRATE.encode("the", true).unwrap().get_ids().to_vec();
    assert_eq!(expected[0], 1);
    for config in ["{}", r#"{"add_bos_token": true, "bos_token": "<s>"}"#] {
        let text = open(&[("tokenizer.json", &sentencepiece), ("tokenizer_config.json", config)]).unwrap();
        assert_eq!(text.encode("the").unwrap(), expected, "{config}");
        assert!(text.encode("").unwrap().is_empty(), "{config}");
    }
    for config in [r#"{"add_bos_token": true}"#, r#"{"add_bos_token": true, "bos_token": "<nowhere>"}"#] {
        let result = open(&[("tokenizer.json", TOKENIZER), ("tokenizer_config.json", config)]);
        let Err(Error::Model(message)) = result else { panic!("{config}") };
        assert!(message.contains("tokenizer_config.json") && message.contains("bos_token"), "{message}");
    }
}

// Chat templates

/// In the manner of Qwen3's: ChatML, thinking blocks of earlier turns dropped.
const CHATML: &str = r#"
{%- if messages[0].role == 'system' %}
    {{- '[system]\n' + messages[0].content + '[end]\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string and not (message.content.startswith('<result>') and message.content.endswith('</result>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '[' + message.role + ']\n' + message.content + '[end]' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set thought = '' %}
        {%- if message.thought is defined and message.thought is not none %}
            {%- set thought = message.thought %}
        {%- elif '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
            {%- set thought = message.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '[assistant]\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content }}
        {%- else %}
            {{- '[assistant]\n' + content }}
        {%- endif %}
        {{- '[end]\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '[assistant]\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"#;

/// In the manner of Llama 3.1's: variables set once, a dated system turn, plain tags with their own lines.
const HEADERS: &str = r#"{{- eos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- macro header(role, note='') -%}
    (({{ role }}{{ note }}))
{%- endmacro %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- header("system") + "\n\n" }}
{%- if tools is not none %}
    {{- "Tools: " + tools | tojson + "\n" }}
{%- endif %}
{{- "Today: " + date_string + "\n" }}
{{- system_message }}
{% for message in messages %}
    {% if message.role in ['user', 'assistant'] %}
{{ header(message.role, note=' ' ~ loop.index) }}: {{ message['content'] | trim }}
    {% else %}
        {% continue %}
    {% endif %}
{% endfor %}
{%- if add_generation_prompt %}
    {{- header("assistant") }}
{%- endif %}
"#;

const CONVERSATION: [(&str, &str); 6] = [
    ("system", " Be brief. "),
    ("user", "What is <2+2> & \"3\"?"),
    ("assistant", "<think>\nEasy.\n</think>\n\nFour."),
    ("tool", "unused"),
    ("user", "  And 3+3?\n"),
    ("user", "<result>7</result>"),
];

/// What the constructs of published templates print, from Python's jinja2 with Hugging Face's settings and filters, for
/// `CONVERSATION`.
const CONSTRUCTS: [(&str, &str); 46] = [
    (
        "{{ none }}|{{ true }}|{{ 1.0 }}|{{ nothing }}|{{ [1, 'a'] }}|{{ {'a': none} }}",
        "None|True|1.0||[1, 'a']|{'a': None}",
    ),
    ("{{ messages[0].nothing }}|{{ messages[0]['nothing'] is defined }}|{{ none.x }}", "|False|"),
    (
        "{{ messages | length }} {{ messages[-1].role }} {{ messages[1:3] | map(attribute='role') | join(',') }}",
        "6 user user,assistant",
    ),
    ("{{ messages[::-1] | map(attribute='role') | join(',') }}", "user,user,tool,assistant,user,system"),
    (r#"{{ 'a</think>b</think>\n\nc'.split('</think>')[-1].lstrip('\n') }}"#, "c"),
    ("{{ 'a b  c'.split() | join('|') }}|{{ 'a,b,c'.split(',', 1) }}", "a|b|c|['a', 'b,c']"),
    ("{{ 'abc'[1:] }}{{ 'abc'[-1] }}{{ 'abc'[::-1] }}", "bcccba"),
    (r#"{{ '<a>&"\'' | tojson }}"#, r#""<a>&\"'""#),
    (
        "{{ {'b': 1, 'a': [1, 2, {}], 'c': []} | tojson(indent=2) }}",
        "{\n  \"b\": 1,\n  \"a\": [\n    1,\n    2,\n    {}\n  ],\n  \"c\": []\n}",
    ),
    (
        "{{ {'b': 1, 'a': [1, 2, {}], 'c': []} | tojson(sort_keys=true) }}",
        r#"{"a": [1, 2, {}], "b": 1, "c": []}"#,
    ),
    ("{{ {'b': 1, 'a': [1, 2]} | tojson(separators=(',', ':')) }}", r#"{"b":1,"a":[1,2]}"#),
    ("{{ {'b': 1, 'a': [1, 2]} | tojson(ensure_ascii=False, indent=none) }}", r#"{"b": 1, "a": [1, 2]}"#),
    (
        r#"{{ [1.5, 1.0, -3, none, true, 'é\n\t\u2028'] | tojson }}"#,
        "[1.5, 1.0, -3, null, true, \"é\\n\\t\u{2028}\"]",
    ),
    ("{{ 'x' in 'xyz' }} {{ 'role' in messages[0] }} {{ 3 not in [1, 2] }}", "True True True"),
    (
        "{{ messages[0].items() | list | length }} {{ messages[0].get('role') }} {{ messages[0].get('zip', 'none') }}",
        "2 system none",
    ),
    (
        "{%- for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}={{ v }}{{ ',' if not loop.last }}{% endfor %}",
        "a=1,b=2",
    ),
    (
        "{%- for m in messages if m.role == 'user' %}{{ loop.index }}/{{ loop.length }} {% endfor %}",
        "1/3 2/3 3/3 ",
    ),
    (
        "{%- for m in messages %}{% if loop.previtem is defined and loop.previtem.role == m.role %}same {% endif %}{% if m.role == 'tool' %}{% break %}{% endif %}{% endfor %}",
        "",
    ),
    (
        "{%- for m in messages %}{% if loop.nextitem is defined %}{{ loop.nextitem.role[0] }}{% endif %}{% endfor %}",
        "uatuu",
    ),
    ("{%- for x in [] %}x{% else %}empty{% endfor %}", "empty"),
    (
        "{{ messages is sequence }} {{ messages[0] is mapping }} {{ 'a' is string }} {{ 1 is number }} {{ none is none }} {{ true is boolean }} {{ messages is iterable }} {{ tools is none }} {{ tools is defined }}",
        "True True True True True True True True True",
    ),
    (
        "{{ false is false }} {{ enable_thinking is false }} {{ add_generation_prompt is true }}",
        "True True True",
    ),
    (
        "{%- set ns = namespace(a=1, b='') %}{% for i in range(4) %}{% set ns.a = ns.a * 2 %}{% set ns.b = ns.b ~ i %}{% endfor %}{{ ns.a }}{{ ns.b }}",
        "160123",
    ),
    (
        "{%- macro m(x, y=2) %}{{ x }}{{ y }}{% if x > 0 %}{{ m(x - 1) }}{% endif %}{% endmacro %}{{ m(2, y=5) }}",
        "251202",
    ),
    ("{%- macro outer() %}<{{ caller() }}>{% endmacro %}{% call outer() %}in{% endcall %}", "<in>"),
    ("{%- set x %}block {{ 1 + 1 }}{% endset %}{{ x | upper }}", "BLOCK 2"),
    ("{{ '%s is %d' | format('x', 3) }}", "x is 3"),
    (
        "{{ 'Hello World'.lower() }} {{ 'hello world' | title }} {{ 'hello'.capitalize() }} {{ 'a-b'.replace('-', '+') }} {{ ' x '.strip() }}.",
        "hello world Hello World Hello a+b x.",
    ),
    ("{{ 7 // 2 }} {{ 7 / 2 }} {{ 7 % 3 }} {{ 2 ** 3 }} {{ -7 // 2 }} {{ 6 / 2 }}", "3 3.5 1 8 -4 3.0"),
    (r#"{{ ['a', 'b'] | join('\n') }} {{ 'x' * 3 }} {{ [1] + [2] }}"#, "a\nb xxx [1, 2]"),
    (
        "{{ 'a' if nothing else 'b' }} {{ nothing | default('d') }} {{ none | default('d', true) }} {{ '' or 'z' }}",
        "b d d z",
    ),
    (
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ messages | rejectattr('role', 'in', ['user', 'tool']) | list | length }}",
        "3 2",
    ),
    ("{{ {'a': 1} | items | list }} {{ {'b': 1, 'a': 2} | dictsort }}", "[('a', 1)] [('a', 2), ('b', 1)]"),
    (
        "{{ [3, 1, 2] | sort | first }} {{ [1, 2] | last }} {{ 'abc' | reverse }} {{ [1,1,2] | unique | list }}",
        "1 2 cba [1, 2]",
    ),
    (
        r#"{{ 'text' | string }} {{ '5' | int + 1 }} {{ 'abc' | length }} {{ 'a\nb' | indent(2) }} {{ ' a ' | trim }}"#,
        "text 6 3 a\n  b a",
    ),
    ("{{ dict(a=1)['a'] }} {{ ('a', 'b')[1] }} {{ 'a' ~ 1 ~ none ~ true }}", "1 b a1NoneTrue"),
    ("{{ 'abc'.startswith(('x', 'a')) }} {{ 'abc'.find('c') }} {{ 'a b'.splitlines() }}", "True 2 ['a b']"),
    ("{% if true %}\n   kept\n{% endif %}\nend", "   kept\nend"),
    ("a {# comment #} b {{ '{{' }} {% raw %}{% x %}{% endraw %}", "a  b {{ {% x %}"),
    (r#"{{ "it's" }} {{ '<b>' | safe }}"#, "it's <b>"),
    ("{{- '  x' }}   ", "  x   "),
    ("{{ [1, 2, 3] | sum }} {{ [1, 2, 3] | max }} {{ 3.7 | round }} {{ 3 | float }}", "6 3 4.0 3.0"),
    ("{{ messages[0].content | safe | trim }} {{ messages[1].content[:7] }}", "Be brief. What is"),
    ("{%- for a in 'abc' %}{{ a }}.{% endfor %}", "a.b.c."),
    ("{{ messages[0].role == 'system' and messages | length > 1 }}", "True"),
    ("{{ loop_var is not defined and not (tools and documents) }}", "True"),
];

#[test]
fn templates_print_what_jinja2_prints() {
    for (source, expected) in CONSTRUCTS {
        let got = render(&with_template(source), &CONVERSATION, &[]);
        assert_eq!(got.as_deref(), Ok(expected), "{source}");
    }
}

/// The conversations of these two are from jinja2 as well.
#[test]
fn chatml_templates_render() {
    let text = with_template(CHATML);
    assert!(text.has_template());
    assert_eq!(
        render(&text, &CONVERSATION, &[]).unwrap(),
        "[system]\n Be brief. [end]\n[user]\nWhat is <2+2> & \"3\"?[end]\n[assistant]\nFour.[end]\n\
         [user]\n  And 3+3?\n[end]\n[user]\n<result>7</result>[end]\n[assistant]\n<think>\n\n</think>\n\n"
    );
    assert_eq!(
        render(&text, &CONVERSATION[1..3], &[("enable_thinking", json!(true))]).unwrap(),
        "[user]\nWhat is <2+2> & \"3\"?[end]\n[assistant]\n<think>\nEasy.\n</think>\n\nFour.[end]\n[assistant]\n"
    );
}

#[test]
fn header_templates_render() {
    let config = r#"{"eos_token": {"content": "[eos]"}}"#;
    let files =
        [("tokenizer.json", TOKENIZER), ("chat_template.jinja", HEADERS), ("tokenizer_config.json", config)];
    let text = open(&files).unwrap();
    assert_eq!(
        render(&text, &CONVERSATION, &[]).unwrap(),
        "[eos]((system))\n\nToday: 26 Jul 2024\nBe brief.\n((user 1)): What is <2+2> & \"3\"?\n\
         ((assistant 2)): <think>\nEasy.\n</think>\n\nFour.\n((user 4)): And 3+3?\n\
         ((user 5)): <result>7</result>\n((assistant))"
    );
    let tools = json!([{"name": "f<g>", "n": [1, 2.5, null, true, "é'"]}]);
    let args = [("custom_tools", tools), ("date_string", json!("1 May 2030"))];
    assert_eq!(
        render(&text, &CONVERSATION[1..2], &args).unwrap(),
        "[eos]((system))\n\nTools: [{\"name\": \"f<g>\", \"n\": [1, 2.5, null, true, \"é'\"]}]\n\
         Today: 1 May 2030\n\n((user 1)): What is <2+2> & \"3\"?\n((assistant))"
    );
}

#[test]
fn thinking_is_off_unless_asked_for() {
    let text = with_template("{{ enable_thinking }} {{ add_generation_prompt }} {{ effort }}");
    assert_eq!(render(&text, &[], &[]).unwrap(), "False True ");
    let args = [("enable_thinking", json!(true)), ("effort", json!("low"))];
    assert_eq!(render(&text, &[], &args).unwrap(), "True True low");
    assert_eq!(render(&text, &[], &[("add_generation_prompt", json!(false))]).unwrap(), "False False ");
    let Err(Error::Usage(message)) = render(&text, &[], &[("messages", json!([]))]) else { panic!() };
    assert!(message.contains("--template-arg") && message.contains("messages"), "{message}");
}

#[test]
fn the_template_given_wins_over_the_file_and_the_file_over_the_field() {
    let field = json!({"chat_template": "field"}).to_string();
    let named = json!({"chat_template": [
        {"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]})
    .to_string();
    let tokenizer = ("tokenizer.json", TOKENIZER);
    let file = ("chat_template.jinja", "file");
    let says = |text: Result<Text>| render(&text.unwrap(), &[], &[]).unwrap();
    assert_eq!(says(open(&[tokenizer, ("tokenizer_config.json", &field)])), "field");
    assert_eq!(says(open(&[tokenizer, ("tokenizer_config.json", &named)])), "named");
    assert_eq!(says(open(&[tokenizer, file, ("tokenizer_config.json", &field)])), "file");
    assert_eq!(says(open_with(&[tokenizer, file], Some(("mine", "given")))), "given");
    // A broken template that is not used does no harm.
    assert_eq!(
        says(open_with(&[tokenizer, ("chat_template.jinja", "{% if %}")], Some(("mine", "given")))),
        "given"
    );
}

#[test]
fn a_chat_without_a_template_is_refused() {
    for config in ["{}", r#"{"chat_template": []}"#, r#"{"chat_template": null}"#] {
        let text = open(&[("tokenizer.json", TOKENIZER), ("tokenizer_config.json", config)]).unwrap();
        assert!(!text.has_template());
        let Err(Error::Usage(message)) = text.encode_chat(&[], &[]) else { panic!() };
        assert!(message.contains("--chat-template") && message.contains("--raw"), "{message}");
    }
    assert!(!DEMO.has_template());
}

#[test]
fn templates_write_their_own_special_tokens() {
    let config = r#"{"bos_token": "<|mask|>", "add_bos_token": true}"#;
    let template = ("chat_template.jinja", "{{ bos_token }}a");
    let text = open(&[("tokenizer.json", TOKENIZER), ("tokenizer_config.json", config), template]).unwrap();
    let a = DEMO.encode("a").unwrap();
    assert_eq!(text.encode_chat(&[], &[]).unwrap(), [&[1], &a[..]].concat());
    let sentencepiece = sentencepiece().to_string();
    let text = open(&[("tokenizer.json", &sentencepiece), ("chat_template.jinja", "<s>a")]).unwrap();
    assert_eq!(text.encode_chat(&[], &[]).unwrap()[0], 1);
    assert_ne!(text.encode_chat(&[], &[]).unwrap()[1], 1);
}

#[test]
fn what_a_template_raises_is_told_in_its_words() {
    for source in [
        "{{ raise_exception('roles must alternate') }}",
        "{% macro m() %}{{ raise_exception('roles must\n alternate') }}{% endmacro %}{% for m2 in messages %}{{ m() }}{% endfor %}",
    ] {
        let Err(Error::Usage(message)) = rendered(source) else { panic!("{source}") };
        assert!(
            message.ends_with("chat_template.jinja refuses this conversation: roles must alternate"),
            "{message}"
        );
    }
}

#[test]
fn faults_of_a_template_name_it_and_the_line() {
    for (source, line, what) in [
        ("a\n{% if %}", 2, "syntax error"),
        ("a\nb\n{{ messages[0].nothing.more }}", 3, "messages[0].nothing"),
        ("{{ 'a' | no_such_filter }}", 1, "no_such_filter"),
        ("{{ strftime_now('%Q') }}", 1, "%Q"),
        ("\n{{ nothing() }}", 2, "nothing"),
    ] {
        let Err(Error::Model(message)) =
            open(&[("tokenizer.json", TOKENIZER), ("chat_template.jinja", source)])
                .and_then(|text| render(&text, &[("user", "hi")], &[]))
        else {
            panic!("{source}")
        };
        let place = format!("in line {line}");
        assert!(message.contains("chat_template.jinja") && message.contains(&place), "{message}");
        assert!(message.contains(what) && !message.contains('\n'), "{message}");
        // The user's own template is the user's fault.
        let given = open_with(&[("tokenizer.json", TOKENIZER)], Some(("my.jinja", source)))
            .and_then(|text| render(&text, &[("user", "hi")], &[]));
        let Err(Error::Usage(message)) = given else { panic!("{source}") };
        assert!(message.starts_with("my.jinja") && message.contains(&place), "{message}");
    }
}

#[test]
fn templates_end_within_their_budget() {
    let nested = "{% set ns = namespace(a=1) %}{% for i in range(12000) %}\
                  {% set ns.a = [[[[[[[[[[[[[[[[[[[[ns.a]]]]]]]]]]]]]]]]]]]] %}{% endfor %}";
    for (source, what) in [
        (
            "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
            "500000 instructions",
        ),
        ("{% macro m(x) %}{{ m(x + 1) }}{% endmacro %}{{ m(1) }}", "recursion limit"),
        (&format!("{nested}{{{{ ns.a.b.c }}}}"), "undefined"),
        (&format!("{{{{ {}", "[".repeat(20_000)), "recursion limit"),
        (&"a".repeat(65 << 10), "at most 65536"),
    ] {
        let files = [("tokenizer.json", TOKENIZER), ("chat_template.jinja", source)];
        let Err(Error::Model(message)) = open(&files).and_then(|text| render(&text, &[], &[])) else {
            panic!()
        };
        assert!(message.contains(what), "{message}");
    }
    // Depth alone is no fault: printed, serialised and dropped without running out of stack.
    assert!(rendered(&format!("{nested}{{{{ ns.a }}}}")).unwrap().starts_with("[[[[[["));
    assert!(rendered(&format!("{nested}{{{{ ns.a | tojson }}}}")).unwrap().starts_with("[[[[[["));
    assert_eq!(rendered(&format!("{{{{ 1{} }}}}", "+1".repeat(30_000))).unwrap(), "30001");
}

#[test]
fn the_current_date_is_todays() {
    let date = || {
        let output =
            std::process::Command::new("date").args(["-u", "+%d %b %Y, %j %A"]).env("LC_ALL", "C").output();
        String::from_utf8(output.unwrap().stdout).unwrap().trim().to_string()
    };
    let text = with_template("{{ strftime_now('%d %b %Y, %j %A') }}");
    // Midnight may fall between two of the three.
    let (before, got, after) = (date(), render(&text, &[], &[]).unwrap(), date());
    assert!(got == before || got == after, "{got}");
}

// Files that are wrong

#[test]
fn missing_and_malformed_files_are_named() {
    let template = ("chat_template.jinja", "x");
    for (files, file, what) in [
        (&[template][..], "tokenizer.json", "missing"),
        (&[("tokenizer.json", "{")], "tokenizer.json", "EOF"),
        (&[("tokenizer.json", "[1, 2]")], "tokenizer.json", "not a tokenizer"),
        (
            &[("tokenizer.json", TOKENIZER), ("tokenizer_config.json", "{]")],
            "tokenizer_config.json",
            "column 2",
        ),
        (
            &[("tokenizer.json", TOKENIZER), ("tokenizer_config.json", r#"{"chat_template": 3}"#)],
            "tokenizer_config.json",
            "chat_template",
        ),
        (
            &[("tokenizer.json", TOKENIZER), ("tokenizer_config.json", r#"{"eos_token": [1]}"#)],
            "tokenizer_config.json",
            "special token",
        ),
    ] {
        let Err(Error::Model(message)) = open(files) else { panic!("{file}: {what}") };
        assert!(message.contains(file) && message.contains(what) && !message.contains('\n'), "{message}");
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), TOKENIZER).unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), b"\xff{{ x }}").unwrap();
    let Err(Error::Model(message)) = Text::open(&Folder::Disk(dir.path().into()), None) else { panic!() };
    assert!(message.contains("chat_template.jinja") && message.contains("UTF-8"), "{message}");
}

#[test]
fn added_tokens_that_would_get_another_id_are_refused() {
    let mut tokenizer = tokenizer_json();
    let added = json!({"id": 5000, "content": "<late>", "single_word": false, "lstrip": false, "rstrip": false,
                       "normalized": false, "special": true});
    tokenizer["added_tokens"].as_array_mut().unwrap().push(added);
    let Err(Error::Model(message)) = open(&[("tokenizer.json", &tokenizer.to_string())]) else { panic!() };
    assert!(message.contains("<late>") && message.contains("5000") && message.contains("2048"), "{message}");
}

#[test]
fn the_file_cannot_cut_or_pad_prompts() {
    let mut tokenizer = tokenizer_json();
    tokenizer["truncation"] =
        json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    tokenizer["padding"] = json!({"strategy": {"Fixed": 1u64 << 50}, "direction": "Right", "pad_to_multiple_of": null,
                                  "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"});
    let text = open(&[("tokenizer.json", &tokenizer.to_string())]).unwrap();
    assert_eq!(text.encode("import os, sys").unwrap(), DEMO.encode("import os, sys").unwrap());
}

#[test]
fn panics_of_the_crate_are_errors() {
    let deep = format!("{}a{}", "(?:".repeat(100_000), ")".repeat(100_000));
    for (part, value) in [
        // The crate unwraps its parse of this map.
        ("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"})),
        (
            "pre_tokenizer",
            json!({"type": "Split", "pattern": {"Regex": deep}, "behavior": "Isolated", "invert": false}),
        ),
    ] {
        let mut tokenizer = tokenizer_json();
        tokenizer[part] = value;
        let Err(Error::Model(message)) = open(&[("tokenizer.json", &tokenizer.to_string())]) else {
            panic!("{part}")
        };
        assert!(
            message.contains("tokenizer.json is not a tokenizer") && !message.contains('\n'),
            "{message}"
        );
        assert!(message.len() < 500, "{} bytes", message.len());
    }
}

/// Everything a folder's text files can be asked for; whatever fails is one short sentence.
fn exercise(files: &[(&str, &[u8])], template: Option<&str>) {
    let dir = tempfile::tempdir().unwrap();
    for (name, contents) in files {
        std::fs::write(dir.path().join(name), contents).unwrap();
    }
    let template = template.map(|source| ("t", source.to_string()));
    let Some(text) = or_sentence(Text::open(&Folder::Disk(dir.path().into()), template)) else { return };
    for prompt in ["", "the the  é日本\u{0}👩‍💻 <s>\n", " a"] {
        let ids = or_sentence(text.encode(prompt)).unwrap_or_default();
        let user = Message { role: "user".into(), content: prompt.into() };
        or_sentence(text.encode_chat(&[user], &[]));
        text.decode(&ids).unwrap();
    }
    let (_, _) =
        streamed(text.stream(&["\n".into()]).unwrap(), &(0..300).chain([u32::MAX]).collect::<Vec<_>>());
}

fn or_sentence<T>(result: Result<T>) -> Option<T> {
    result
        .map_err(|error| {
            let sentence = error.to_string();
            assert!(sentence.len() < 1000, "{} bytes: {:.200}", sentence.len(), sentence);
            assert!(!sentence.contains(char::is_control), "{sentence:?}");
        })
        .ok()
}

#[test]
fn long_texts_of_a_file_do_not_make_long_errors() {
    let long = "\u{1b}[31m 日本\n".repeat(20_000);
    for config in [
        json!({"add_bos_token": long}),
        json!({"add_bos_token": true, "bos_token": long}),
        json!({"chat_template": {&long: 1}}),
    ] {
        let config = config.to_string();
        let result = open(&[("tokenizer.json", TOKENIZER), ("tokenizer_config.json", &config)]);
        assert!(or_sentence(result).is_none());
    }
    let added = json!({"id": 5000, "content": &long, "single_word": false, "lstrip": false, "rstrip": false,
                       "normalized": false, "special": true});
    let regex = json!({"type": "Replace", "pattern": {"Regex": "a|b|".repeat(25_000)}, "content": long});
    for (place, value) in [("/decoder", regex), ("/added_tokens/0", added), ("/model/type", json!(long))] {
        let mut tokenizer = sentencepiece();
        *tokenizer.pointer_mut(place).unwrap() = value;
        assert!(or_sentence(open(&[("tokenizer.json", &tokenizer.to_string())])).is_none(), "{place}");
    }
}

/// All places in a JSON value, as pointers.
fn places(value: &Value, at: String, out: &mut Vec<String>) {
    match value {
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(i, item)| places(item, format!("{at}/{i}"), out));
        }
        Value::Object(map) => map.iter().for_each(|(key, item)| {
            places(item, format!("{at}/{}", key.replace('~', "~0").replace('/', "~1")), out)
        }),
        _ => {}
    }
    out.push(at);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// The crate panics on some of these; none may reach the caller.
    #[test]
    fn a_tokenizer_with_any_value_replaced_does_not_panic(
        place in any::<prop::sample::Index>(),
        outside_vocabulary in any::<bool>(),
        value in prop::sample::select(vec![
            json!(null), json!(true), json!(0), json!(-1), json!(4294967295u32), json!(1u64 << 60), json!(0.5),
            json!(""), json!("▁"), json!("<s>"), json!("é"), json!("("), json!("(?!a)*"), json!("a{9999}{9999}"),
            json!([]), json!({}), json!(["a", "b"]), json!({"String": ""}), json!({"Regex": ""}),
            json!({"type": "Sequence", "decoders": []}), json!({"type": "BPEDecoder", "suffix": ""}),
            json!({"type": "Split", "pattern": {"Regex": "(a*)*b"}, "behavior": "Isolated", "invert": true}),
            json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
            json!({"type": "Unigram", "unk_id": 7, "vocab": [["a", 0.0]]}),
            json!({"type": "WordPiece", "unk_token": "no", "continuing_subword_prefix": "", "max_input_chars_per_word": 1, "vocab": {}}),
            json!({"type": "FixedLength", "length": 0}),
            json!({"type": "Digits", "individual_digits": true}),
            json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
        ]),
    ) {
        let mut tokenizer = sentencepiece();
        let mut all = Vec::new();
        places(&tokenizer, String::new(), &mut all);
        // Half of the cases leave the vocabulary alone, or it would get most of them.
        all.retain(|place| outside_vocabulary != place.starts_with("/model/vocab/"));
        *tokenizer.pointer_mut(&all[place.index(all.len())]).unwrap() = value;
        exercise(&[("tokenizer.json", tokenizer.to_string().as_bytes())], Some("{{ messages[0].content }}"));
    }

    #[test]
    fn a_tokenizer_with_any_byte_changed_does_not_panic(
        place in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<bool>(),
    ) {
        let mut bytes = sentencepiece().to_string().into_bytes();
        let at = place.index(bytes.len());
        bytes[at] = byte;
        if cut {
            bytes.truncate(at);
        }
        exercise(&[("tokenizer.json", &bytes)], Some("{{ messages[0].content }}"));
    }

}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn a_tokenizer_config_with_any_value_replaced_or_byte_changed_does_not_panic(
        place in any::<prop::sample::Index>(),
        value in prop::sample::select(vec![
            json!(null), json!(true), json!(-1), json!(1e300), json!(""), json!("<s>"), json!("{% if"), json!([]), json!({}),
            json!("x\n".repeat(50_000)), json!({"content": "\u{1b}".repeat(500)}), json!([{"name": "default"}]),
            json!("{{ messages * 100 }}"), json!("{{ bos_token.no.such }}"),
        ]),
        byte in any::<Option<u8>>(),
    ) {
        let mut config = json!({
            "add_bos_token": true, "bos_token": {"content": "<s>", "special": true}, "eos_token": "</s>", "pad_token": null,
            "chat_template": [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "{{ messages }}"}],
        });
        let mut all = Vec::new();
        places(&config, String::new(), &mut all);
        if byte.is_none() {
            *config.pointer_mut(&all[place.index(all.len())]).unwrap() = value;
        }
        let mut bytes = config.to_string().into_bytes();
        let at = place.index(bytes.len());
        bytes[at] = byte.unwrap_or(bytes[at]);
        let tokenizer = sentencepiece().to_string();
        exercise(&[("tokenizer.json", tokenizer.as_bytes()), ("tokenizer_config.json", &bytes)], None);
    }

    #[test]
    fn a_chat_template_with_any_part_replaced_does_not_panic(
        source in prop::sample::select(vec![CHATML, HEADERS]),
        place in any::<prop::sample::Index>(),
        replaced in 0usize..20,
        put in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..3),
            prop::sample::select(vec!["{{", "%}", "{%- endif %}", "{{ raise_exception(messages) }}", "messages", " * 9999999 "])
                .prop_map(|text| text.as_bytes().to_vec()),
            Just(b"(".repeat(10_000)),
            Just(b"x".repeat(20_000)),
        ],
    ) {
        let mut bytes = source.as_bytes().to_vec();
        let at = place.index(bytes.len());
        let end = bytes.len().min(at + replaced);
        bytes.splice(at..end, put);
        exercise(&[("tokenizer.json", TOKENIZER.as_bytes()), ("chat_template.jinja", &bytes)], None);
    }
}
