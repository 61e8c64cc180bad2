//! Tokenization, streamed detokenization and stop strings, compared with the `tokenizers` crate, recorded
//! reference ids and a naive search; and errors for invalid tokenizer files.

use crate::support::text;

use dflash::Error;
use dflash::text::message::Message;
use dflash::text::tokenizer::{Stream, Text};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::LazyLock;
use text::*;
use tokenizers::Tokenizer;

const ORACLE: &str = include_str!("../data/oracle.json");

/// The demo pair's tokenizer in the `tokenizers` crate.
static CRATE: LazyLock<Tokenizer> = LazyLock::new(|| TOKENIZER.parse().unwrap());
static SENTENCEPIECE: LazyLock<Text> =
    LazyLock::new(|| open(&[("tokenizer.json", &sentencepiece().to_string())]).unwrap());
static SENTENCEPIECE_CRATE: LazyLock<Tokenizer> =
    LazyLock::new(|| sentencepiece().to_string().parse().unwrap());

/// The token of the demo tokenizer for this one byte.
fn byte_token(byte: u8) -> u32 {
    static BYTES: LazyLock<Vec<u32>> = LazyLock::new(|| {
        // GPT-2's table: printable bytes are their Latin-1 characters, the others count up from U+0100.
        let printable = |b: u8| (33..=126).contains(&b) || (161..=172).contains(&b) || b >= 174;
        let mut others = 0x100..;
        (0..=255u8)
            .map(|b| if printable(b) { b as u32 } else { others.next().unwrap() })
            .map(|code| CRATE.token_to_id(&char::from_u32(code).unwrap().to_string()).unwrap())
            .collect()
    });
    BYTES[byte as usize]
}

/// The text of all pushes.
fn joined(pushes: &[(String, bool)]) -> String {
    pushes.iter().map(|(text, _)| text.as_str()).collect()
}

/// Text that is hard to detokenize: characters of every length, joiners, and U+FFFD itself.
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

/// Ids of the SentencePiece tokenizer: byte tokens of characters and of parts of characters, and `others`.
fn byte_runs(others: std::ops::Range<u32>) -> impl Strategy<Value = Vec<u32>> {
    let bytes = |text: &[u8]| Just(text.iter().map(|byte| 3 + u32::from(*byte)).collect::<Vec<_>>());
    let pieces = prop_oneof![
        prop_oneof![bytes(b" "), bytes(b"a"), bytes(b"b"), bytes("€".as_bytes()), bytes("👩".as_bytes())],
        prop_oneof![bytes(b"\xe2\x82"), bytes(b"\xff"), bytes(b"\x82"), bytes(b"\xf0\x9f")],
        others.prop_map(|id| vec![id]),
    ];
    prop::collection::vec(pieces, 0..20).prop_map(|pieces| pieces.concat())
}

// ---- detokenization ----

proptest! {
    /// Any ids, including ids without a token.
    #[test]
    fn streamed_text_equals_the_decoding_of_all_ids(ids in prop::collection::vec(0u32..2060, 0..60)) {
        let expected = CRATE.decode(&ids, true).unwrap();
        let (pushes, rest) = streamed(DEMO.stream(&[]).unwrap(), &ids);
        prop_assert_eq!(joined(&pushes) + &rest, expected.clone());
        prop_assert_eq!(DEMO.decode(&ids).unwrap(), expected);
    }

    /// Random bytes, one token each, most of which are invalid UTF-8.
    #[test]
    fn streamed_invalid_bytes_are_replaced_like_lossy_utf8(
        bytes in prop::collection::vec(prop_oneof![any::<u8>(), 0xe0u8..0xf5, 0x80u8..0xc0], 0..40),
    ) {
        let ids: Vec<u32> = bytes.iter().map(|b| byte_token(*b)).collect();
        let (pushes, rest) = streamed(DEMO.stream(&[]).unwrap(), &ids);
        prop_assert_eq!(joined(&pushes) + &rest, String::from_utf8_lossy(&bytes));
        for end in 0..=ids.len() {
            // Streaming holds back at most the start of one character.
            let held = String::from_utf8_lossy(&bytes[..end]).into_owned();
            let held = held.strip_prefix(&joined(&pushes[..end])).unwrap();
            prop_assert!(held.is_empty() || held == "\u{fffd}", "{:?}", held);
        }
    }

    /// Each byte is a token, so characters are split across tokens. Each comes out whole, with the token that
    /// completes it.
    #[test]
    fn a_character_is_streamed_with_its_last_byte(text in unicode()) {
        let ids: Vec<u32> = text.bytes().map(byte_token).collect();
        let (pushes, rest) = streamed(DEMO.stream(&[]).unwrap(), &ids);
        prop_assert_eq!(rest, "");
        for end in 0..=ids.len() {
            let whole = (0..=end).rev().find(|at| text.is_char_boundary(*at)).unwrap();
            prop_assert_eq!(joined(&pushes[..end]), &text[..whole]);
        }
    }

    #[test]
    fn text_survives_an_encode_decode_round_trip(text in unicode()) {
        prop_assume!(!text.contains("<|"));
        prop_assert_eq!(DEMO.decode(&DEMO.encode(&text).unwrap()).unwrap(), text);
    }

    /// The SentencePiece layout, with runs of byte tokens that are UTF-8 and runs that are not.
    #[test]
    fn sentencepiece_streamed_text_equals_the_decoding_of_all_ids(ids in byte_runs(0u32..280)) {
        let expected = SENTENCEPIECE_CRATE.decode(&ids, true).unwrap();
        let (pushes, rest) = streamed(SENTENCEPIECE.stream(&[]).unwrap(), &ids);
        prop_assert_eq!(joined(&pushes) + &rest, expected);
    }

    /// A stop string ends the answer at the first token at which the decoded text contains it, also inside a
    /// run of byte tokens.
    #[test]
    fn stop_strings_are_found_in_runs_of_byte_tokens(
        ids in byte_runs(259u32..273), stops in prop::collection::vec("[ab€ ]{1,3}", 1..3),
    ) {
        let decoded = |end: usize| SENTENCEPIECE_CRATE.decode(&ids[..end], true).unwrap();
        let cut = |text: String| naive_stop(&text, &stops).map(|(before, _)| before);
        let end = (1..=ids.len()).find_map(|end| Some((end, cut(decoded(end))?)));
        let (pushes, rest) = streamed(SENTENCEPIECE.stream(&stops).unwrap(), &ids);
        prop_assert_eq!(pushes.iter().position(|(_, stopped)| *stopped), end.as_ref().map(|(end, _)| end - 1));
        let expected = end.map_or_else(|| decoded(ids.len()), |(_, before)| before);
        prop_assert_eq!(joined(&pushes) + &rest, expected);
    }

    #[test]
    fn sentencepiece_text_survives_an_encode_decode_round_trip(text in unicode()) {
        prop_assume!(!["<s>", "</s>", "<unk>", "▁"].iter().any(|token| text.contains(token)));
        let ids = SENTENCEPIECE.encode(&text).unwrap();
        let (pushes, rest) = streamed(SENTENCEPIECE.stream(&[]).unwrap(), &ids);
        prop_assert_eq!(joined(&pushes) + &rest, text.clone());
        prop_assert_eq!(SENTENCEPIECE_CRATE.decode(&ids, true).unwrap(), text);
    }
}

#[test]
fn an_invalid_byte_is_streamed_as_soon_as_it_is_certain() {
    let push = |stream: &mut Stream, byte| stream.push(byte_token(byte)).unwrap().0;
    let mut stream = DEMO.stream(&[]).unwrap();
    assert_eq!(push(&mut stream, 0x80), "\u{fffd}"); // never the first byte of a character
    assert_eq!(push(&mut stream, 0xf0), ""); // may start a character
    assert_eq!(push(&mut stream, 0x9f), "");
    assert_eq!(push(&mut stream, b'a'), "\u{fffd}a"); // it does not
    assert_eq!(push(&mut stream, 0xe6), "");
    assert_eq!(stream.finish(), "\u{fffd}");
}

/// If every token decoded a growing window again, the time would be quadratic and this test would take too
/// long.
#[test]
fn a_long_run_of_invalid_bytes_streams_in_linear_time() {
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
fn a_long_run_of_byte_tokens_streams_in_linear_time() {
    for (byte, expected) in [(0x41u8, "A"), (0xff, "\u{fffd}")] {
        let mut stream = SENTENCEPIECE.stream(&["AB".to_string()]).unwrap();
        let run: String = (0..200_000).map(|_| stream.push(3 + u32::from(byte)).unwrap().0).collect();
        let text = run + &stream.finish();
        assert!(text == expected.repeat(200_000), "{byte:#x}: {} bytes", text.len());
    }
}

/// The values are those of the `tokenizers` crate's own tests.
#[test]
fn an_invalid_run_of_byte_tokens_has_one_mark_per_byte() {
    let byte = |byte: u8| 3 + u32::from(byte);
    let a = SENTENCEPIECE_CRATE.token_to_id("a").unwrap();
    for (ids, text) in [
        (vec![byte(0xe5)], "\u{fffd}"),
        (vec![byte(0xe5), byte(0x8f)], "\u{fffd}\u{fffd}"),
        (vec![byte(0xe5), byte(0x8f), byte(0xab), a], "叫a"),
        (vec![byte(0xe5), byte(0x8f), a], "\u{fffd}\u{fffd}a"),
    ] {
        assert_eq!(SENTENCEPIECE.decode(&ids).unwrap(), text);
    }
    // Text of a run is returned when the run ends, and a stop string in it is found at once.
    let newline = byte(b'\n');
    let (pushes, rest) =
        streamed(SENTENCEPIECE.stream(&["\n\n".into()]).unwrap(), &[a, newline, a, newline, newline]);
    let pushes: Vec<(&str, bool)> = pushes.iter().map(|(text, stop)| (text.as_str(), *stop)).collect();
    assert_eq!(pushes, [("a", false), ("", false), ("\na", false), ("", false), ("", true)]);
    assert_eq!(rest, "");
}

#[test]
fn the_first_space_of_a_sentencepiece_answer_is_dropped() {
    let id = |token: &str| SENTENCEPIECE_CRATE.token_to_id(token).unwrap();
    let ids = [id("▁the"), id("▁the"), id("▁▁"), id("▁a")];
    let (pushes, rest) = streamed(SENTENCEPIECE.stream(&[]).unwrap(), &ids);
    let pushes: Vec<&str> = pushes.iter().map(|(text, _)| text.as_str()).collect();
    assert_eq!((pushes, rest.as_str()), (vec!["the", " the", "  ", " a"], ""));
    // A byte token for a space is dropped in the same way.
    assert_eq!(SENTENCEPIECE.decode(&[3 + 0x20, 3 + 0x20, id("a")]).unwrap(), " a");
}

#[test]
fn metaspace_decoders_match_the_crate() {
    for scheme in ["always", "first", "never"] {
        let mut tokenizer = sentencepiece();
        tokenizer["decoder"] =
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true});
        let text = open(&[("tokenizer.json", &tokenizer.to_string())]).unwrap();
        let oracle: Tokenizer = tokenizer.to_string().parse().unwrap();
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
fn special_tokens_have_no_text_but_their_spelling_does() {
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
    let word_piece = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    for (decoder, name) in [
        (strip_the_end, "Strip"),
        (strip_each, "Strip"),
        (late_replace, "Replace"),
        (regex, "Replace"),
        (Value::Null, "null"),
        (word_piece.clone(), "WordPiece"),
        (json!({"type": "Sequence", "decoders": [{"type": "Fuse"}, word_piece]}), "WordPiece"),
        (json!({"type": "BPEDecoder", "suffix": "</w>"}), "BPEDecoder"),
        (json!({"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": true}), "CTC"),
    ] {
        let mut tokenizer = sentencepiece();
        tokenizer["decoder"] = decoder;
        let Err(Error::Unsupported(message)) = open(&[("tokenizer.json", &tokenizer.to_string())]) else {
            panic!("{name} was not refused");
        };
        assert!(message.contains("tokenizer.json") && message.contains(name), "{message}");
        assert!(message.contains("cannot be streamed"), "{message}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    /// Random decoders: one that opens gives the text of the crate.
    #[test]
    fn decoders_that_open_match_the_crate(
        ids in byte_runs(0u32..280),
        is_alone in prop::bool::weighted(0.2),
        steps in prop::collection::vec(prop::sample::select(vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "Replace", "pattern": {"String": "he"}, "content": ""}),
            json!({"type": "Replace", "pattern": {"String": "a"}, "content": "▁▁"}),
            json!({"type": "Replace", "pattern": {"String": ""}, "content": "x"}),
            json!({"type": "Replace", "pattern": {"Regex": "a|b"}, "content": "x"}),
            json!({"type": "ByteFallback"}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
            json!({"type": "Fuse"}),
            json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
            json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}),
            json!({"type": "Strip", "content": "a", "start": 3, "stop": 0}),
            json!({"type": "Strip", "content": "▁", "start": 0, "stop": 1}),
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}),
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": false}),
            json!({"type": "Metaspace", "replacement": "▁", "add_prefix_space": true}),
            json!({"type": "Metaspace", "replacement": "e", "prepend_scheme": "first"}),
            json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
            json!({"type": "BPEDecoder", "suffix": "</w>"}),
            json!({"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": true}),
            json!({"type": "Sequence", "decoders": []}),
            json!({"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}),
        ]), 0..5),
    ) {
        let mut tokenizer = sentencepiece();
        tokenizer["decoder"] = match &steps[..] {
            [one] if is_alone => one.clone(),
            _ => json!({"type": "Sequence", "decoders": steps}),
        };
        let text = match open(&[("tokenizer.json", &tokenizer.to_string())]) {
            Ok(text) => text,
            Err(error) => {
                prop_assert!(matches!(error, Error::Unsupported(_) | Error::Model(_)), "{:?}", error);
                return Ok(());
            }
        };
        let expected = tokenizer.to_string().parse::<Tokenizer>().unwrap().decode(&ids, true).unwrap();
        prop_assert_eq!(text.decode(&ids).unwrap(), expected, "{:?}", steps);
    }
}

// ---- stop strings ----

/// The text before the first stop string and the number of bytes up to its end, found by testing every prefix
/// of the text.
fn naive_stop(text: &str, stops: &[String]) -> Option<(String, usize)> {
    let ends = text.char_indices().map(|(at, c)| at + c.len_utf8());
    ends.filter_map(|end| {
        let complete = stops.iter().filter(|stop| text[..end].ends_with(stop.as_str()));
        complete.map(|stop| end - stop.len()).min().map(|start| (text[..start].to_string(), end))
    })
    .next()
}

/// The number of bytes at the end of `text` that may be the start of a stop string.
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
    fn stop_strings_match_a_naive_search(
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
        // Each character of a token in the vocabulary represents one byte.
        let lengths = ids.iter().map(|id| CRATE.id_to_token(*id).unwrap().chars().count());
        let (pushes, rest) = streamed(DEMO.stream(&stops).unwrap(), &ids);
        let stop = naive_stop(&text, &stops);
        let expected = stop.as_ref().map_or(&text, |(before, _)| before);
        prop_assert_eq!(&(joined(&pushes) + &rest), expected);
        prop_assert_eq!(pushes.iter().any(|(_, stopped)| *stopped), stop.is_some());
        // A stop is reported, and text that cannot belong to a stop string is released, as early as possible.
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
fn the_stop_string_that_is_complete_first_wins() {
    let stop = |text: &str, stops: &[&str]| {
        let stops: Vec<String> = stops.iter().map(|s| s.to_string()).collect();
        let (pushes, rest) = streamed(DEMO.stream(&stops).unwrap(), &DEMO.encode(text).unwrap());
        joined(&pushes) + &rest
    };
    assert_eq!(stop("one two three", &["two three", "wo"]), "one t");
    assert_eq!(stop("one two three", &["o", "two"]), "");
    assert_eq!(stop("say two", &["wo", "two"]), "say "); // both are complete at once, so the earlier start wins
    assert_eq!(DEMO.encode(" return").unwrap().len(), 1);
    assert_eq!(stop("x return", &["return", "etu"]), "x r"); // also inside one token
    assert_eq!(stop("aaab", &["aab"]), "a"); // a failed match overlaps the next one
    assert_eq!(stop("an unfinished sto", &["stop"]), "an unfinished sto");
    assert_eq!(stop("price: 3€!", &["€"]), "price: 3");
}

#[test]
fn no_text_follows_a_stop_string() {
    let ids = DEMO.encode("one two three four").unwrap();
    let (pushes, rest) = streamed(DEMO.stream(&[" two".into()]).unwrap(), &ids);
    assert_eq!((joined(&pushes).as_str(), rest.as_str()), ("one", ""));
    let first = pushes.iter().position(|(_, stopped)| *stopped).unwrap();
    assert!(pushes[first + 1..].iter().all(|(text, stopped)| text.is_empty() && *stopped));
}

#[test]
fn special_tokens_do_not_interrupt_a_stop_string() {
    let ids = [byte_token(b'a'), byte_token(b'b'), 0, byte_token(b'c'), byte_token(b'd')];
    let (pushes, rest) = streamed(DEMO.stream(&["bc".into()]).unwrap(), &ids);
    assert_eq!(joined(&pushes) + &rest, "a");
}

#[test]
fn an_empty_stop_string_is_refused() {
    let error = DEMO.stream(&["x".into(), String::new()]).err();
    assert_eq!(error, Some(Error::option("stop", "is empty, expected at least one character")));
}

#[test]
fn a_stop_string_that_is_a_special_token_stops_at_its_id() {
    let mask = CRATE.token_to_id("<|mask|>").unwrap();
    assert_eq!((DEMO.special_id("<|mask|>"), DEMO.special_id("def")), (Some(mask), None));
    // Text that may begin another stop string is released, and an incomplete character is marked.
    let ids = [&DEMO.encode("one tw").unwrap()[..], &[byte_token(0xe6), mask, byte_token(b'x')]].concat();
    let (pushes, rest) = streamed(DEMO.stream(&["two".into(), "<|mask|>".into()]).unwrap(), &ids);
    assert_eq!(joined(&pushes) + &rest, "one tw\u{fffd}");
    assert_eq!(pushes.iter().position(|(_, stopped)| *stopped), Some(ids.len() - 2));
    // Another special token does not stop, and the spelling in ordinary tokens does.
    let spelled: Vec<u32> = "a<|mask|>b".bytes().map(byte_token).collect();
    let (pushes, rest) = streamed(DEMO.stream(&["<|mask|>".into()]).unwrap(), &[&[0], &spelled[..]].concat());
    assert_eq!((joined(&pushes) + &rest, pushes.last().unwrap().1), ("a".into(), true));
}

#[test]
fn a_stop_string_with_a_special_token_inside_is_refused() {
    for stop in ["<|mask|>\n", "x<|mask|>", "<|endoftext|><|mask|>"] {
        let Err(Error::Option { name: "stop", problem }) = DEMO.stream(&[stop.into()]) else { panic!() };
        assert!(
            problem.contains("special token \"<|") && problem.contains("expected the token alone"),
            "{problem}"
        );
    }
    assert!(DEMO.stream(&["<|mask".into()]).is_ok());
}

// ---- special tokens ----

/// The special tokens of `tokenizer_config.json` and `special_tokens_map.json` in template variables, in
/// encoded text and in decoded text, compared with recorded results of transformers.
#[test]
fn special_tokens_are_those_of_hugging_face() {
    let recorded: Value = serde_json::from_str(include_str!("../data/special_tokens.json")).unwrap();
    let text_of = |value: &Value| value.as_str().unwrap().to_string();
    let ids_of = |value: &Value| serde_json::from_value::<Vec<u32>>(value.clone()).unwrap();
    let (template, sample) = (text_of(&recorded["template"]), text_of(&recorded["text"]));
    let cases = recorded["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 26);
    for case in cases {
        let mut tokenizer = tokenizer_json();
        let added = case["added_tokens"].as_array().unwrap().clone();
        tokenizer["added_tokens"].as_array_mut().unwrap().extend(added);
        let mut files = vec![("tokenizer.json", tokenizer.to_string())];
        for (name, key) in [
            ("tokenizer_config.json", "tokenizer_config"),
            ("special_tokens_map.json", "special_tokens_map"),
            ("added_tokens.json", "added_tokens_file"),
        ] {
            files.extend((!case[key].is_null()).then(|| (name, case[key].to_string())));
        }
        let files: Vec<(&str, &str)> = files.iter().map(|(name, file)| (*name, file.as_str())).collect();
        let text = open_with(&files, Some(("t", &template))).unwrap();
        let name = &case["case"];
        assert_eq!(text.encode(&sample).unwrap(), ids_of(&case["encoded"]), "{name}");
        assert_eq!(text.decode(&ids_of(&recorded["ids"])).unwrap(), text_of(&case["decoded"]), "{name}");
        let user = Message::new("user", "x");
        let rendered = text.encode(&text_of(&case["rendered"])).unwrap();
        assert_eq!(text.encode_chat(&[user], None, &[]).unwrap(), rendered, "{name}");
    }
}

#[test]
fn additional_tokens_may_be_objects() {
    let map = r#"{"additional_special_tokens": ["<|a|>", {"content": "<|b|>", "lstrip": true}]}"#;
    let text = open(&[("tokenizer.json", TOKENIZER), ("special_tokens_map.json", map)]).unwrap();
    assert_eq!(text.encode("<|a|> <|b|>").unwrap(), [2048, 2049]);
    assert_eq!((text.special_id("<|b|>"), text.decode(&[2048, 2049]).unwrap()), (Some(2049), String::new()));
}

#[test]
fn malformed_special_tokens_are_named() {
    for (file, contents, what) in [
        ("special_tokens_map.json", "[]", "not a JSON object"),
        ("added_tokens.json", "[]", "not a JSON object"),
        (
            "added_tokens.json",
            r#"{"<a>": "2048"}"#,
            "added_tokens.json: <a> is \"2048\", expected a whole number",
        ),
        (
            "added_tokens.json",
            r#"{"<a>": 2050}"#,
            "added_tokens.json gives \"<a>\" the id 2050, but its place after the tokens of tokenizer.json gives 2048",
        ),
        ("special_tokens_map.json", r#"{"eos_token": 3}"#, "eos_token is 3, expected a special token"),
        ("special_tokens_map.json", r#"{"eos_token": {"content": 3}}"#, "expected a special token"),
        ("special_tokens_map.json", r#"{"pad_token": {"content": "x", "lstrip": 1}}"#, "lstrip is 1"),
        ("special_tokens_map.json", r#"{"additional_special_tokens": "x"}"#, "expected a list"),
        (
            "special_tokens_map.json",
            r#"{"additional_special_tokens": [4]}"#,
            "additional_special_tokens[0] is 4",
        ),
        ("tokenizer_config.json", r#"{"added_tokens_decoder": {"x": "<|a|>"}}"#, "added_tokens_decoder.x"),
        ("tokenizer_config.json", r#"{"added_tokens_decoder": {"5000": "<|a|>"}}"#, "the id 5000, but"),
    ] {
        let Err(Error::Model(message)) = open(&[("tokenizer.json", TOKENIZER), (file, contents)]) else {
            panic!("{contents}")
        };
        assert!(message.contains(file) && message.contains(what), "{message}");
    }
}

// ---- raw prompts ----

#[test]
fn raw_prompts_have_the_reference_ids() {
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
    let without_bos = DEMO.encode("import os").unwrap();
    let bos = [&[1], &without_bos[..]].concat();
    let config = r#"{"add_bos_token": true, "bos_token": {"content": "<|mask|>", "special": true}}"#;
    let text = open(&[("tokenizer.json", TOKENIZER), ("tokenizer_config.json", config)]).unwrap();
    assert_eq!(text.encode("import os").unwrap(), bos);
    // A BOS token in the text is encoded too.
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

// ---- invalid files ----

#[test]
fn missing_and_malformed_files_are_named() {
    let template = ("chat_template.jinja", "x");
    for (files, file, what) in [
        (&[template][..], "tokenizer.json", "missing"),
        (&[("tokenizer.json", "{")], "tokenizer.json", "EOF"),
        (&[("tokenizer.json", "[1, 2]")], "tokenizer.json", "not a JSON object"),
        (
            &[("tokenizer.json", TOKENIZER), ("tokenizer_config.json", "{]")],
            "tokenizer_config.json",
            "column 2",
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
}

#[test]
fn added_tokens_whose_id_would_change_are_refused() {
    let mut tokenizer = tokenizer_json();
    let added = json!({"id": 5000, "content": "<late>", "single_word": false, "lstrip": false, "rstrip": false,
                       "normalized": false, "special": true});
    tokenizer["added_tokens"].as_array_mut().unwrap().push(added);
    let Err(Error::Model(message)) = open(&[("tokenizer.json", &tokenizer.to_string())]) else { panic!() };
    assert!(message.contains("<late>") && message.contains("5000") && message.contains("2048"), "{message}");
}

#[test]
fn truncation_padding_and_dropout_of_the_file_are_ignored() {
    let mut tokenizer = tokenizer_json();
    tokenizer["truncation"] =
        json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    tokenizer["padding"] = json!({"strategy": {"Fixed": 1u64 << 50}, "direction": "Right", "pad_to_multiple_of": null,
                                  "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"});
    for (dropout, notes) in [(json!(null), 0), (json!(0.0), 0), (json!(0.5), 1), (json!(1), 1)] {
        tokenizer["model"]["dropout"] = dropout;
        let text = open(&[("tokenizer.json", &tokenizer.to_string())]).unwrap();
        assert_eq!(text.encode("import os, sys").unwrap(), DEMO.encode("import os, sys").unwrap());
        assert_eq!(text.notes.len(), notes);
        assert!(text.notes.iter().all(|note| note.contains("tokenizer.json: the dropout of ")));
    }
}

#[test]
fn panics_of_the_tokenizers_crate_become_errors() {
    let deep = format!("{}a{}", "(?:".repeat(100_000), ")".repeat(100_000));
    for (part, value) in [
        // The crate unwraps the result of parsing this map.
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

#[test]
fn long_values_in_a_file_give_short_errors() {
    let long = "\u{1b}[31m 日本\n".repeat(20_000);
    for config in [
        json!({"add_bos_token": long}),
        json!({"add_bos_token": true, "bos_token": long}),
        json!({"chat_template": {&long: 1}}),
        json!({"chat_template": {&long: "x"}}),
    ] {
        let config = config.to_string();
        let result = open(&[("tokenizer.json", TOKENIZER), ("tokenizer_config.json", &config)])
            .and_then(|text| text.check_template(&[(long.clone(), json!(1))]));
        assert!(or_sentence(result).is_none());
    }
    let added = json!({"id": 5000, "content": &long, "single_word": false, "lstrip": false, "rstrip": false,
                       "normalized": false, "special": true});
    let regex = json!({"type": "Replace", "pattern": {"Regex": "a|b|".repeat(25_000)}, "content": long});
    for (pointer, value) in [("/decoder", regex), ("/added_tokens/0", added), ("/model/type", json!(long))] {
        let mut tokenizer = sentencepiece();
        *tokenizer.pointer_mut(pointer).unwrap() = value;
        assert!(or_sentence(open(&[("tokenizer.json", &tokenizer.to_string())])).is_none(), "{pointer}");
    }
}

/// The JSON pointers of all values inside a JSON value.
fn pointers(value: &Value, at: String, out: &mut Vec<String>) {
    match value {
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(i, item)| pointers(item, format!("{at}/{i}"), out));
        }
        Value::Object(map) => map.iter().for_each(|(key, item)| {
            pointers(item, format!("{at}/{}", key.replace('~', "~0").replace('/', "~1")), out)
        }),
        _ => {}
    }
    out.push(at);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// The crate panics on some of these files. No panic may reach the caller.
    #[test]
    fn a_tokenizer_with_a_replaced_value_does_not_panic(
        position in any::<prop::sample::Index>(),
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
        pointers(&tokenizer, String::new(), &mut all);
        // Half of the cases do not change the vocabulary, which has most of the values.
        all.retain(|pointer| outside_vocabulary != pointer.starts_with("/model/vocab/"));
        *tokenizer.pointer_mut(&all[position.index(all.len())]).unwrap() = value;
        exercise(&[("tokenizer.json", tokenizer.to_string().as_bytes())], Some("{{ messages[0].content }}"));
    }

    #[test]
    fn a_tokenizer_with_a_changed_byte_does_not_panic(
        position in any::<prop::sample::Index>(), byte in any::<u8>(), truncate in any::<bool>(),
    ) {
        let mut bytes = sentencepiece().to_string().into_bytes();
        let at = position.index(bytes.len());
        bytes[at] = byte;
        if truncate {
            bytes.truncate(at);
        }
        exercise(&[("tokenizer.json", &bytes)], Some("{{ messages[0].content }}"));
    }

}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn a_changed_tokenizer_config_does_not_panic(
        position in any::<prop::sample::Index>(),
        value in prop::sample::select(vec![
            json!(null), json!(true), json!(-1), json!(1e300), json!(""), json!("<s>"), json!("{% if"), json!([]), json!({}),
            json!("x\n".repeat(50_000)), json!({"content": "\u{1b}".repeat(500)}), json!([{"name": "default"}]),
            json!("{{ messages * 100 }}"), json!("{{ bos_token.no.such }}"),
        ]),
        byte in any::<Option<u8>>(), is_map in any::<bool>(),
    ) {
        let mut config = json!({
            "add_bos_token": true, "bos_token": {"content": "<s>", "special": true}, "eos_token": "</s>", "pad_token": null,
            "additional_special_tokens": ["<x>", {"content": "<y>"}], "extra_special_tokens": {"image_token": "<z>"},
            "chat_template": [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "{{ messages }}"}],
        });
        let mut all = Vec::new();
        pointers(&config, String::new(), &mut all);
        if byte.is_none() {
            *config.pointer_mut(&all[position.index(all.len())]).unwrap() = value;
        }
        let mut bytes = config.to_string().into_bytes();
        let at = position.index(bytes.len());
        bytes[at] = byte.unwrap_or(bytes[at]);
        let tokenizer = sentencepiece().to_string();
        let file = if is_map { "special_tokens_map.json" } else { "tokenizer_config.json" };
        exercise(&[("tokenizer.json", tokenizer.as_bytes()), (file, &bytes)], None);
    }
}
