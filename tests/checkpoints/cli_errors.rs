//! Invalid flags, prompts and model files given to `dflash-gen`: exit code and error message of each kind.

use crate::support;
use crate::support::program;

use dflash::checkpoint::safetensors::Dtype;
use program::{Run, command, run, with_stdin, write};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

/// Lines of `exit code | case | error message`.
fn table(text: &str) -> impl Iterator<Item = (i32, &str, &str)> {
    text.lines().filter(|line| !line.is_empty()).map(|line| {
        let [code, case, sentence] = line.splitn(3, " | ").collect::<Vec<_>>().try_into().unwrap();
        (code.parse().unwrap(), case.trim(), sentence)
    })
}

/// Compares a run with the expected exit code, an empty stdout and one line on stderr, in which `ROOT`
/// replaces the folder `root`. Returns an empty string if they are equal, otherwise the expected and the
/// found values.
fn mismatch(run: &Run, root: &str, code: i32, case: &str, sentence: &str) -> String {
    let err = run.err.replace(root, "ROOT");
    match (run.code, run.out.as_str()) == (code, "") && err == format!("dflash-gen: {sentence}\n") {
        true => String::new(),
        false => format!(
            "{case}\n  expected {code}: {sentence}\n  got      {}: {err}  stdout {:?}\n",
            run.code, run.out
        ),
    }
}

/// Runs each case of a table: a command line, in which '' is an empty argument and `ROOT` is `root`.
fn check_refusals(root: &Path, text: &str) {
    let root = root.to_str().unwrap();
    let mismatches: String = table(text)
        .map(|(code, case, sentence)| {
            let args = case
                .split_whitespace()
                .map(|a| if a == "''" { String::new() } else { a.replace("ROOT", root) });
            mismatch(&run(args), root, code, case, sentence)
        })
        .collect();
    assert!(mismatches.is_empty(), "{mismatches}");
}

const FLAGS: &str = r#"
2 | --bogus x | unexpected argument '--bogus' found; to pass '--bogus' as a value, use '-- --bogus'
2 | --max-token 3 x | unexpected argument '--max-token' found; a similar argument exists: '--max-tokens'
2 | one two | unexpected argument 'two' found
2 | -n -1 x | invalid value '-1' for '--max-tokens <N>': expected a whole number from 0 to 18446744073709551615
2 | -n x x | invalid value 'x' for '--max-tokens <N>': expected a whole number from 0 to 18446744073709551615
2 | -n | a value is required for '--max-tokens <N>' but none was supplied
2 | --seed 18446744073709551616 x | invalid value '18446744073709551616' for '--seed <N>': expected a whole number from 0 to 18446744073709551615
2 | --temperature NaN x | --temperature is NaN, expected 0 (greedy) or 0.0001 to 10000
2 | --temperature -1 x | --temperature is -1, expected 0 (greedy) or 0.0001 to 10000
2 | --temperature hot x | invalid value 'hot' for '--temperature <T>': expected a number
2 | --top-p 0 x | --top-p is 0, expected more than 0 and at most 1
2 | --top-p 1.5 x | --top-p is 1.5, expected more than 0 and at most 1
2 | --top-k -2 x | invalid value '-2' for '--top-k <K>': expected a whole number from 0 to 18446744073709551615
2 | --min-p 1 x | --min-p is 1, expected at least 0 and less than 1
2 | --block 0 x | --block is 0, expected 1 to 16, the block that config.json of the built-in demo drafter was trained with
2 | --block 17 x | --block is 17, expected 1 to 16, the block that config.json of the built-in demo drafter was trained with
2 | --draft lookup --block 17 x | --block is 17, expected 1 to 16
2 | --draft lookup --tree 9 x | --tree needs a drafter, but drafts are those of lookup
2 | --draft suffix --coupled x | --coupled needs a drafter, but drafts are those of suffix
2 | --draft suffix --adaptive x | --adaptive needs a drafter, but drafts are those of suffix
2 | --draft lookup --confidence 0.5 x | --confidence needs a drafter, but drafts are those of lookup
2 | --draft lookup --slots fill-in x | --slots needs a drafter, but --draft is lookup
2 | --draft none --block 4 x | --block is 4 without a drafter, expected 1 (autoregressive decoding)
2 | --target ROOT --tree 9 x | --tree needs a drafter, but --draft is none
2 | --confidence 0 x | --confidence is 0, expected more than 0 and at most 1
2 | --confidence 0.5 x | --confidence needs a drafter with a confidence head, config.json of the built-in demo drafter has none
2 | --confidence 0.5 --verify block --tree 9 x | --confidence with --tree needs --verify match, but --verify is block
2 | --ctx 1 x | --ctx is 1, expected 2 to 4096, the positions that config.json of the built-in demo target has
2 | --ctx 4097 x | --ctx is 4097, expected 2 to 4096, the positions that config.json of the built-in demo target has
2 | --batch 2 x | --batch needs --prompts
2 | --batch 0 --prompts nothing.jsonl | --batch is 0, expected 1 to 16
2 | --batch 17 --prompts nothing.jsonl | --batch is 17, expected 1 to 16
2 | --gpu 0 --device cpu x | --gpu needs --device cuda or auto
2 | --gpu one x | invalid value 'one' for '--gpu <N>': expected a whole number from 0 to 4294967295
2 | --threads 0 x | invalid value '0' for '--threads <N>': expected a whole number from 1 to 1024
2 | --threads 1025 x | invalid value '1025' for '--threads <N>': expected a whole number from 1 to 1024
2 | --device tpu x | invalid value 'tpu' for '--device <DEVICE>' [possible values: auto, cpu, cuda]; a similar value exists: 'cpu'
2 | --adaptive 0.5 | --adaptive takes its value with =, as --adaptive=0.5; for the prompt "0.5", write it to -f -
2 | --color always x | --color always needs --show-accept
2 | --plan --stop '' | --stop is empty, expected at least one character
2 | --stop '' x | --stop is empty, expected at least one character
2 | --system Kind! x | --chat-template is absent and the built-in demo target has none, but --system needs one
2 | --template-arg a=1 x | --chat-template is absent and the built-in demo target has none, but --template-arg needs one
2 | --template-arg thinking x | --template-arg is "thinking", expected NAME=VALUE
2 | --template-arg =1 x | --template-arg is "=1", expected NAME=VALUE
2 | --raw --system Kind! x | the argument '--raw' cannot be used with '--system <TEXT>'
2 | --json --stream-json x | the argument '--json' cannot be used with '--stream-json'
2 | --json --show-accept x | the argument '--json' cannot be used with '--show-accept'
2 | --compare --stream-json x | the argument '--compare' cannot be used with '--stream-json'
2 | --compare --draft none x | --compare needs a drafter, but --draft is none
2 | --compare --block 1 x | --block is 1, which is autoregressive decoding: --compare expects at least 2
2 | --compare -n 0 x | --max-tokens is 0, which leaves --compare nothing to compare
2 | --chat x | the argument '--chat' cannot be used with '[PROMPT]'
2 | --chat -f ROOT/p | the argument '--chat' cannot be used with '--file <FILE>'
2 | --chat --prompts ROOT/p | the argument '--chat' cannot be used with '--prompts <FILE.jsonl>'
2 | --chat --raw | the argument '--chat' cannot be used with '--raw'
2 | --chat --plan | the argument '--chat' cannot be used with '--plan'
2 | --chat --json | the argument '--chat' cannot be used with '--json'
2 | --chat --stream-json | the argument '--chat' cannot be used with '--stream-json'
2 | --chat --compare | the argument '--chat' cannot be used with '--compare'
2 | --chat -n 0 | --max-tokens is 0, which leaves --chat nothing to say
2 | --chat --stop '' | --stop is empty, expected at least one character
2 | --chat --template-arg x | --template-arg is "x", expected NAME=VALUE
2 | --chat --draft none --block 4 | --block is 4 without a drafter, expected 1 (autoregressive decoding)
2 | --plan x | the argument '--plan' cannot be used with '[PROMPT]'
2 | --prompts ROOT/p.jsonl x | the argument '--prompts <FILE.jsonl>' cannot be used with '[PROMPT]'
2 | --prompts ROOT/p.jsonl -f ROOT/p | the argument '--prompts <FILE.jsonl>' cannot be used with '--file <FILE>'
"#;

#[test]
fn invalid_flags_give_one_sentence() {
    check_refusals(tempfile::tempdir().unwrap().path(), FLAGS);
    let run = run(["two\nlines", "and\n\nthree"]);
    assert_eq!((run.code, run.out.as_str(), run.err.lines().count()), (2, "", 1), "{run:?}");
    let run = program::run(["-f", "no\nfile"]);
    assert_eq!(run.err, "dflash-gen: no file cannot be read: No such file or directory (os error 2)\n");
}

const PROMPTS: &str = r#"
2 | '' | the prompt is empty, expected at least one token
2 |  | stdin is empty, expected at least one token
2 | -f ROOT | ROOT cannot be read: Is a directory (os error 21)
2 | -f ROOT/nothing | ROOT/nothing cannot be read: No such file or directory (os error 2)
2 | -f ROOT/latin1.txt | ROOT/latin1.txt is not UTF-8: byte 3 is not part of a character
2 | -f ROOT/empty.txt | ROOT/empty.txt is empty, expected at least one token
2 | -f ROOT/long.txt | ROOT/long.txt has 16384 tokens, but the context holds 4096, the answer included
2 | --prompts ROOT/nothing | ROOT/nothing cannot be read: No such file or directory (os error 2)
2 | --prompts ROOT/line7.jsonl | ROOT/line7.jsonl line 7: EOF while parsing a string at column 15: expected {"prompt": TEXT}, {"messages": [...]}, {"prompt_tokens": [...]} or {"turns": [...]}
2 | --prompts ROOT/number.jsonl | ROOT/number.jsonl line 1: prompt is 7, expected a text
2 | --prompts ROOT/both.jsonl | ROOT/both.jsonl line 1 has both prompt and messages: expected {"prompt": TEXT}, {"messages": [...]}, {"prompt_tokens": [...]} or {"turns": [...]}
2 | --prompts ROOT/neither.jsonl | ROOT/neither.jsonl line 2 has neither prompt nor messages: expected {"prompt": TEXT}, {"messages": [...]}, {"prompt_tokens": [...]} or {"turns": [...]}, or another field that --prompt-key names
2 | --prompts ROOT/blank.jsonl | ROOT/blank.jsonl is empty, expected JSON lines
2 | --prompts ROOT/empty.jsonl | ROOT/empty.jsonl line 2 is empty, expected at least one token
2 | --prompts ROOT/latin1.jsonl | ROOT/latin1.jsonl is not UTF-8: byte 15 is not part of a character
2 | --prompts ROOT/chat.jsonl | --chat-template is absent and the built-in demo target has none, but ROOT/chat.jsonl line 1 has messages, which need one
2 | --prompts ROOT/chat.jsonl --raw | --raw is set, but ROOT/chat.jsonl line 1 has messages, which need a chat template
2 | --prompts ROOT/tool.jsonl | --chat-template is absent and the built-in demo target has none, but ROOT/tool.jsonl line 1 has tools, which need one
2 | --prompts ROOT/system.jsonl --system b --chat-template ROOT/ok.jinja | --system is set, but ROOT/system.jsonl line 1 has a system message of its own
2 | --prompts ROOT/none.jsonl --chat-template ROOT/ok.jinja | ROOT/none.jsonl line 1 gives no tokens, expected at least one
2 | x --chat-template ROOT/nothing | ROOT/nothing cannot be read: No such file or directory (os error 2)
2 | x --chat-template ROOT/open.jinja | ROOT/open.jinja is not a template in line 1: syntax error: unexpected end of input, expected end of block
2 | x --chat-template ROOT/raise.jinja | the prompt: ROOT/raise.jinja refuses this conversation: only two
2 | x --chat-template ROOT/endless.jinja | the prompt: ROOT/endless.jinja failed in line 1: takes more than 5000000 instructions
2 | x --chat-template ROOT/ok.jinja --template-arg thinking=no | --template-arg is given thinking, which ROOT/ok.jinja does not read: expected none
2 | x --chat-template ROOT/ok.jinja --template-arg t={'a':1} | --template-arg t is not JSON: key must be a string at line 1 column 2
2 | x --chat-template ROOT/ok.jinja --template-arg messages=[] | --template-arg is given messages, which is reserved for the conversation
"#;

#[test]
fn invalid_prompts_give_one_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| write(dir.path(), name, bytes);
    file("latin1.txt", b"caf\xe9");
    file("empty.txt", b"");
    file("long.txt", "x = 1\n".repeat(4096).as_bytes());
    let good = "{\"prompt\": \"import os\"}\n";
    file("line7.jsonl", format!("{}{{\"prompt\": \"imp\n{good}", good.repeat(6)).as_bytes());
    file("number.jsonl", b"{\"prompt\": 7}");
    file("both.jsonl", b"{\"prompt\": \"a\", \"messages\": []}");
    file("neither.jsonl", b"\n{\"text\": \"a\"}");
    file("blank.jsonl", b" \n\n");
    file("empty.jsonl", format!("{good}{{\"prompt\": \"\"}}").as_bytes());
    file("latin1.jsonl", b"{\"prompt\": \"caf\xe9\"}");
    file("chat.jsonl", b"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}");
    file("tool.jsonl", b"{\"prompt\": \"a\", \"tools\": [{\"type\": \"function\"}]}");
    file("system.jsonl", b"{\"messages\": [{\"role\": \"system\", \"content\": \"a\"}]}");
    file("none.jsonl", b"{\"messages\": [{\"role\": \"user\", \"content\": \"\"}]}");
    file("ok.jinja", b"{% for m in messages %}{{ m.content }}{% endfor %}");
    file("open.jinja", b"{% for m in messages %}");
    file("raise.jinja", b"{{ raise_exception('only\ntwo') }}");
    file(
        "endless.jinja",
        b"{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    );
    check_refusals(dir.path(), PROMPTS);
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        let run = run([std::ffi::OsStr::from_bytes(b"caf\xe9")]);
        assert_eq!((run.code, run.out.as_str()), (2, ""));
        assert_eq!(run.err, "dflash-gen: invalid UTF-8 was detected in one or more arguments\n");
        let output = command(["-q"]).stdin(fs::File::open(dir.path()).unwrap()).output().unwrap();
        assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(2), &b""[..]));
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!(err, "dflash-gen: stdin cannot be read: Is a directory (os error 21)\n");
    }
    let piped = with_stdin(&[], b"caf\xe9");
    assert_eq!((piped.code, piped.out.as_str()), (2, ""));
    assert_eq!(piped.err, "dflash-gen: stdin is not UTF-8: byte 3 is not part of a character\n");
}

const MODELS: &str = r#"
3 | no target folder | ROOT/target does not exist: expected a Hugging Face model folder
3 | no config | ROOT/target has no config.json, it holds model.safetensors: expected a Hugging Face model folder
3 | half a config | ROOT/target/config.json is cut off: EOF while parsing a value at line 1 column 6
3 | no weights | ROOT/target has no model.safetensors: expected safetensors, in one file or in shards with model.safetensors.index.json
3 | no tokenizer | ROOT/target/tokenizer.json is missing: expected the tokenizer in the target's folder, or prompts of token ids
3 | empty tokenizer | ROOT/target/tokenizer.json is not a tokenizer: Model missing. at line 1 column 2
3 | cut in the header | ROOT/target/model.safetensors is not a complete safetensors file: its header's length is given as 4711 bytes, but only 92 follow
3 | cut in the length | ROOT/target/model.safetensors is not a complete safetensors file: it has 5 bytes, expected at least 8 for the header's length
3 | empty weights | ROOT/target/model.safetensors is empty, expected a safetensors file
3 | cut in the data | ROOT/target/model.safetensors is not a complete safetensors file: its header describes 315008 bytes of tensors, but 95281 follow it
3 | overlapping offsets | ROOT/target/model.safetensors is not a complete safetensors file: its header: invalid offset for tensor `model.embed_tokens.weight`
3 | shape overflow | ROOT/target/model.safetensors is not a complete safetensors file: its header: overflow computing buffer size from shape and/or element type
3 | wrong shape | ROOT/target/model.safetensors: tensor model.norm.weight has shape [32, 2], expected [64] from config.json
4 | wrong dtype | ROOT/target/model.safetensors: tensor model.norm.weight is I16, which this engine does not run: expected BF16, F16 or F32
3 | data of no tensor | ROOT/target/model.safetensors is not a complete safetensors file: its header describes 314880 bytes of tensors, but 315008 follow it
4 | another architecture | ROOT/target/config.json: architectures is MambaForCausalLM, which this engine does not run: expected the text model of a Qwen3, Qwen3-MoE, Qwen3.5, Qwen3-Next or Llama checkpoint
3 | uneven heads | ROOT/target/config.json: num_attention_heads is 3, expected a multiple of num_key_value_heads, which is 2
3 | text for a number | ROOT/target/config.json: hidden_size is "64", expected a whole number from 1 to 65536
3 | too many positions | ROOT/target/config.json: max_position_embeddings is 1099511627776, expected a whole number from 1 to 16777216
3 | deeper target | ROOT/drafter/config.json was not made for ROOT/target/config.json: its number of target layers is 4, the target's is 5
3 | tap out of range | ROOT/drafter/config.json: dflash_config.target_layer_ids holds 4, expected layers from 0 to 3 (its target has 4 layers)
3 | mask beyond the vocabulary | ROOT/drafter/config.json: dflash_config.mask_token_id is 97, expected a whole number from 0 to 96
3 | drafter of a wider target | ROOT/drafter/config.json was not made for ROOT/target/config.json: its hidden size is 128, the target's is 64
3 | drafter of a deeper target | ROOT/drafter/config.json was not made for ROOT/target/config.json: its number of target layers is 36, the target's is 4
3 | block of one | ROOT/drafter/config.json: block_size is 1, expected a whole number from 2 to 1024
4 | another kind of drafter | ROOT/drafter/config.json: architectures is MedusaModel, which makes it a Medusa drafter: this engine does not run it
3 | no drafter folder | ROOT/drafter does not exist: expected a Hugging Face model folder
2 | target as drafter | --draft is given ROOT/drafter/config.json, which describes a target (Qwen3ForCausalLM): expected a DFlash drafter
3 | cut drafter | ROOT/drafter/model.safetensors is not a complete safetensors file: its header's length is given as 2344 bytes, but only 22 follow
3 | a NaN | the target's logits for position 8 hold a NaN or infinity, or nothing but -inf: its weights or its config are damaged
3 | tokenizer of another model | the prompt holds token id 106, but the target has 97 rows: its tokenizer belongs to another model
3 | missing shard | ROOT/target/model.safetensors.index.json lists the shard model-00002-of-00003.safetensors, which is not in the folder
"#;

/// Makes a valid pair invalid, as the name of the case says.
fn corrupt(pair: &support::Pair, case: &str) {
    const NORM: &str = "model.norm.weight";
    let (target, drafter) = (pair.target.as_path(), pair.drafter.as_path());
    match case {
        "no target folder" => fs::remove_dir_all(target).unwrap(),
        "no config" => fs::remove_file(target.join("config.json")).unwrap(),
        "half a config" => fs::write(target.join("config.json"), "{\"a\": ").unwrap(),
        "no weights" => fs::remove_file(target.join("model.safetensors")).unwrap(),
        "no tokenizer" => fs::remove_file(target.join("tokenizer.json")).unwrap(),
        "empty tokenizer" => fs::write(target.join("tokenizer.json"), "{}").unwrap(),
        "cut in the header" => truncate(target, 100),
        "cut in the length" => truncate(target, 5),
        "empty weights" => truncate(target, 0),
        "cut in the data" => truncate(target, 100_000),
        "overlapping offsets" => edit_header(target, |h| h[NORM]["data_offsets"] = json!([0, 128])),
        "shape overflow" => edit_header(target, |h| h[NORM]["shape"] = json!([1u64 << 63, 4])),
        "wrong shape" => edit_header(target, |h| h[NORM]["shape"] = json!([32, 2])),
        "wrong dtype" => edit_header(target, |h| h[NORM]["dtype"] = json!("I16")),
        "data of no tensor" => edit_header(target, |h| drop(h.as_object_mut().unwrap().shift_remove(NORM))),
        "another architecture" => edit_config(target, |c| c["architectures"] = json!(["MambaForCausalLM"])),
        "uneven heads" => edit_config(target, |c| c["num_attention_heads"] = json!(3)),
        "text for a number" => edit_config(target, |c| c["hidden_size"] = json!("64")),
        "too many positions" => edit_config(target, |c| c["max_position_embeddings"] = json!(1u64 << 40)),
        "deeper target" => edit_config(target, |c| c["num_hidden_layers"] = json!(5)),
        "tap out of range" => {
            edit_config(drafter, |c| c["dflash_config"]["target_layer_ids"] = json!([0, 4]))
        }
        "mask beyond the vocabulary" => {
            edit_config(drafter, |c| c["dflash_config"]["mask_token_id"] = json!(97))
        }
        "drafter of a wider target" => edit_config(drafter, |c| c["hidden_size"] = json!(128)),
        "drafter of a deeper target" => edit_config(drafter, |c| c["num_target_layers"] = json!(36)),
        "block of one" => edit_config(drafter, |c| c["block_size"] = json!(1)),
        "another kind of drafter" => edit_config(drafter, |c| {
            c["architectures"] = json!(["MedusaModel"]);
            c["dflash_config"] = json!(null);
        }),
        "no drafter folder" => fs::remove_dir_all(drafter).unwrap(),
        "target as drafter" => {
            fs::copy(target.join("config.json"), drafter.join("config.json")).map(drop).unwrap()
        }
        "cut drafter" => truncate(drafter, 30),
        "a NaN" => write_nan(target, support::target_tensors(&Default::default())),
        "tokenizer of another model" => support::write_tokenizer(target, 258),
        "missing shard" => fs::remove_file(target.join("model-00002-of-00003.safetensors")).unwrap(),
        _ => panic!("unknown case {case}"),
    }
}

/// Changes the config.
fn edit_config(dir: &Path, change: impl FnOnce(&mut Value)) {
    support::edit_json(dir, "config.json", change);
}

/// Changes the header of the weights file but not its data.
fn edit_header(dir: &Path, change: impl FnOnce(&mut Value)) {
    let path = dir.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let (size, rest) = bytes.split_first_chunk::<8>().unwrap();
    let (head, data) = rest.split_at(u64::from_le_bytes(*size) as usize);
    let mut head: Value = serde_json::from_slice(head).unwrap();
    change(&mut head);
    fs::write(&path, support::safetensors_raw(&head.to_string(), data)).unwrap();
}

/// Shortens the weights file to this many bytes.
fn truncate(dir: &Path, bytes: u64) {
    fs::File::options().write(true).open(dir.join("model.safetensors")).unwrap().set_len(bytes).unwrap();
}

/// Writes the tensors with a NaN in the final norm.
fn write_nan(dir: &Path, mut tensors: Vec<support::Raw>) {
    tensors.last_mut().unwrap().values[3] = f32::NAN;
    support::write_tensors(dir, &tensors, Dtype::Bf16, 1);
}

#[test]
fn invalid_model_files_give_one_sentence() {
    let mismatches: String = table(MODELS)
        .map(|(code, case, sentence)| {
            let shards = if case == "missing shard" { 3 } else { 1 };
            let pair =
                support::write_pair(&support::Target { shards, ..Default::default() }, &Default::default());
            corrupt(&pair, case);
            let run = program::run_pair(&pair, &["--raw", "hello\tyou"]);
            mismatch(&run, pair.root.path().to_str().unwrap(), code, case, sentence)
        })
        .collect();
    assert!(mismatches.is_empty(), "{mismatches}");
}

#[test]
fn token_ids_are_checked_before_the_first_prompt_runs() {
    let pair = support::write_pair(&Default::default(), &Default::default());
    support::write_tokenizer(&pair.target, 258);
    let file = write(pair.root.path(), "p.jsonl", "{\"prompt\": \"HELLO\"}\n{\"prompt\": \"hello\\tyou\"}\n");
    let run = program::run_pair(&pair, &["--raw", "--prompts", &file]);
    let sentence = "holds token id 106, but the target has 97 rows: its tokenizer belongs to another model";
    assert_eq!((run.code, run.out.as_str()), (3, ""));
    assert_eq!(run.err, format!("dflash-gen: {file} line 2 {sentence}\n"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_json_line_is_a_prompt_or_one_sentence(
        line in prop::sample::select(vec![
            r#"{"prompt": "import os", "id": [1, {"a": null}]}"#,
            r#"{"messages": [{"role": "system", "content": "é"}, {"role": "user", "content": "\ud83d\ude00"}]}"#,
        ]),
        position in any::<prop::sample::Index>(),
        inserted in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..3),
            prop::sample::select(vec!["\"", "{", "[[", "\n", "\u{feff}", "\u{1b}", "1e999", "\\ud800"])
                .prop_map(|text| text.as_bytes().to_vec()),
            Just(vec![b'x'; 100_000]),
            Just(vec![b'['; 10_000]),
        ],
        replaced in 0usize..12,
    ) {
        let mut bytes = line.as_bytes().to_vec();
        let at = position.index(bytes.len());
        let end = bytes.len().min(at + replaced);
        bytes.splice(at..end, inserted);
        bytes.splice(0..0, *b"{\"prompt\": \"a\"}\n");
        let dir = tempfile::tempdir().unwrap();
        let file = write(dir.path(), "p.jsonl", bytes);
        let template = write(dir.path(), "t.jinja", "{% for m in messages %}{{ m.content }}{% endfor %}");
        let run = run(["-q", "-n", "1", "--prompts", &file, "--chat-template", &template]);
        prop_assert!(run.code == 0 && run.err.is_empty() || run.code == 2, "{:?}", run);
        if run.code == 2 {
            let sentence = run.err.strip_suffix('\n').unwrap();
            prop_assert!(run.out.is_empty() && sentence.len() < 1000, "{:?}", run);
            prop_assert!(!sentence.contains(char::is_control), "{:?}", run);
        }
    }
}

const OTHER_FOLDERS: &str = r#"
3 | --target ROOT/target/config.json --draft none x | ROOT/target/config.json is a file: expected a Hugging Face model folder
3 | --target ROOT/target --draft ROOT/target/config.json x | ROOT/target/config.json is a file: expected a Hugging Face model folder
2 | --target ROOT/drafter --draft none x | --target is given ROOT/drafter/config.json, which describes a drafter (DFlashDraftModel): expected a target
3 | --draft ROOT/drafter x | ROOT/drafter/config.json was not made for config.json of the built-in demo target: its hidden size is 64, the target's is 128
"#;

#[test]
fn invalid_folders_give_one_sentence() {
    let pair = support::write_pair(&Default::default(), &Default::default());
    check_refusals(pair.root.path(), OTHER_FOLDERS);
}

#[test]
fn an_error_after_text_starts_on_its_own_line() {
    let pair = support::write_pair(&Default::default(), &Default::default());
    // The first round finds the NaN, when the token of the prefill is already printed.
    write_nan(&pair.drafter, support::drafter_tensors(&Default::default(), &Default::default()));
    let run = program::run_pair(&pair, &["--raw", "hello\tyou"]);
    assert_eq!((run.code, run.out.len(), run.out.ends_with('\n')), (3, 2, true), "{run:?}");
    let damaged = "the drafter's logits for position 9 hold a NaN or infinity, or nothing but -inf: its weights or its config are damaged";
    assert_eq!(run.err, format!("dflash-gen: {damaged}\n"));
}
