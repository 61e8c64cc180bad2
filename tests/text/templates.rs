//! Chat templates, compared with outputs of Python's jinja2; which template is used; errors and limits.

use crate::support::text;

use dflash::checkpoint::folder::Folder;
use dflash::text::message::Message;
use dflash::text::tokenizer::Text;
use dflash::{Error, Result};
use proptest::prelude::*;
use serde_json::{Value, json};
use text::*;

/// The demo tokenizer with this chat template.
fn with_template(source: &str) -> Text {
    open(&[("tokenizer.json", TOKENIZER), ("chat_template.jinja", source)]).unwrap()
}

/// The text that a template renders for a conversation, encoded and decoded again.
fn render(text: &Text, messages: &[(&str, &str)], args: &[(&str, Value)]) -> Result<String> {
    let messages: Vec<Message> =
        messages.iter().map(|(role, content)| Message::new(role, *content)).collect();
    let args: Vec<(String, Value)> =
        args.iter().map(|(name, value)| (name.to_string(), value.clone())).collect();
    text.decode(&text.encode_chat(&messages, None, &args)?)
}

/// The text that a template renders for one user message.
fn rendered(source: &str) -> Result<String> {
    render(&with_template(source), &[("user", "hi")], &[])
}

/// A template like Qwen3's: ChatML, without the thinking blocks of earlier turns.
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

/// A template like Llama 3.1's: default variables, a system turn with the date, and tags on their own lines.
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

/// What Python's jinja2 renders for templates, without and with tools; null where it fails. Written by
/// `tools/chat-templates.py`.
const EXPECTED: &str = include_str!("../data/templates/expected.json");
/// The conversation, tools and variables of [`EXPECTED`].
const CONTEXT: &str = include_str!("../data/templates/context.json");

#[test]
fn templates_print_the_same_as_jinja2() {
    let context: Value = serde_json::from_str(CONTEXT).unwrap();
    let cases: Vec<Value> = serde_json::from_str(EXPECTED).unwrap();
    let messages = context["messages"].as_array().unwrap();
    let messages: Vec<Message> = messages.iter().map(|m| Message::from_json("context", m).unwrap()).collect();
    let variables = &context["variables"];
    let config =
        json!({"bos_token": variables["bos_token"], "eos_token": variables["eos_token"]}).to_string();
    let mut wrong = Vec::new();
    for case in &cases {
        let (name, source) = (&case["name"], case["template"].as_str().unwrap());
        let files = [
            ("tokenizer.json", TOKENIZER),
            ("chat_template.jinja", source),
            ("tokenizer_config.json", &config),
        ];
        let text = open(&files).unwrap();
        let echo = open(&[files[0], ("chat_template.jinja", "{{ expected }}"), files[2]]).unwrap();
        let reads_data = source.contains("{{ data") || source.contains("data.");
        let args = reads_data.then(|| ("data".to_string(), variables["data"].clone()));
        let args: Vec<(String, Value)> = args.into_iter().collect();
        let with_tools = source.contains("tools").then_some((Some(&context["tools"]), "tools"));
        for (tools, key) in [Some((None, "plain")), with_tools].into_iter().flatten() {
            let got = text.encode_chat(&messages, tools, &args);
            // Ids, because special tokens have no text.
            let expected = case[key].as_str();
            let expected = expected.map(|_| {
                echo.encode_chat(&messages, None, &[("expected".into(), case[key].clone())]).unwrap()
            });
            if got.as_deref().ok() != expected.as_deref() {
                let got = got.and_then(|ids| text.decode(&ids));
                wrong.push(format!("{name} {key}\n  expected {}\n  got      {got:?}", case[key]));
            }
        }
    }
    assert!(cases.len() > 200 && wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The expected texts here and in `header_templates_render` also come from jinja2.
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
    // The special token that the text begins with has no text.
    let config = r#"{"eos_token": {"content": "[eos]"}}"#;
    let files =
        [("tokenizer.json", TOKENIZER), ("chat_template.jinja", HEADERS), ("tokenizer_config.json", config)];
    let text = open(&files).unwrap();
    assert_eq!(
        render(&text, &CONVERSATION, &[]).unwrap(),
        "((system))\n\nToday: 26 Jul 2024\nBe brief.\n((user 1)): What is <2+2> & \"3\"?\n\
         ((assistant 2)): <think>\nEasy.\n</think>\n\nFour.\n((user 4)): And 3+3?\n\
         ((user 5)): <result>7</result>\n((assistant))"
    );
    let tools = json!([{"name": "f<g>", "n": [1, 2.5, null, true, "é'"]}]);
    let args = [("custom_tools", tools), ("date_string", json!("1 May 2030"))];
    assert_eq!(
        render(&text, &CONVERSATION[1..2], &args).unwrap(),
        "((system))\n\nTools: [{\"name\": \"f<g>\", \"n\": [1, 2.5, null, true, \"é'\"]}]\n\
         Today: 1 May 2030\n\n((user 1)): What is <2+2> & \"3\"?\n((assistant))"
    );
}

#[test]
fn thinking_is_off_by_default() {
    let text = with_template("{{ enable_thinking }} {{ add_generation_prompt }} {{ effort }}");
    assert_eq!(render(&text, &[], &[]).unwrap(), "False True ");
    let args = [("enable_thinking", json!(true)), ("effort", json!("low"))];
    assert_eq!(render(&text, &[], &args).unwrap(), "True True low");
    assert_eq!(render(&text, &[], &[("add_generation_prompt", json!(false))]).unwrap(), "False False ");
    let reserved = render(&text, &[], &[("messages", json!([]))]);
    let expected = Error::option("template_arg", "is given messages, which is reserved for the conversation");
    assert_eq!(reserved, Err(expected));
}

#[test]
fn a_given_template_overrides_the_file_and_the_config_field() {
    let field = json!({"chat_template": "field"}).to_string();
    let named = json!({"chat_template": [
        {"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]})
    .to_string();
    let tokenizer = ("tokenizer.json", TOKENIZER);
    let file = ("chat_template.jinja", "file");
    let renders = |text: Result<Text>| render(&text.unwrap(), &[], &[]).unwrap();
    assert_eq!(renders(open(&[tokenizer, ("tokenizer_config.json", &field)])), "field");
    assert_eq!(renders(open(&[tokenizer, ("tokenizer_config.json", &named)])), "named");
    assert_eq!(renders(open(&[tokenizer, file, ("tokenizer_config.json", &field)])), "file");
    assert_eq!(renders(open_with(&[tokenizer, file], Some(("mine", "given")))), "given");
    // An invalid template that is not used causes no error.
    assert_eq!(
        renders(open_with(&[tokenizer, ("chat_template.jinja", "{% if %}")], Some(("mine", "given")))),
        "given"
    );
}

#[test]
fn conversations_with_tools_get_the_tool_use_template() {
    let tokenizer = ("tokenizer.json", TOKENIZER);
    let tools = json!([{"name": "f"}]);
    let list = |names: &[&str]| {
        let named =
            names.iter().map(|name| json!({"name": name, "template": format!("{name} {{{{ tools }}}}")}));
        json!({"chat_template": named.collect::<Vec<_>>()}).to_string()
    };
    let both = |text: &Text| {
        [None, Some(&tools)].map(|tools| text.encode_chat(&[], tools, &[]).and_then(|ids| text.decode(&ids)))
    };
    let (default, used) = (Ok("default None".to_string()), Ok("tool_use [{'name': 'f'}]".to_string()));
    let text = open(&[tokenizer, ("tokenizer_config.json", &list(&["tool_use", "default"]))]).unwrap();
    assert_eq!(both(&text), [default.clone(), used.clone()]);
    // Tools as a template variable are the same.
    let args = [("tools".to_string(), tools.clone())];
    assert_eq!(text.decode(&text.encode_chat(&[], None, &args).unwrap()), used);
    assert!(text.encode_chat(&[], Some(&tools), &args).is_err());
    // A file of its own for each; the field in the config then counts for nothing.
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("additional_chat_templates")).unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    write("tokenizer.json", TOKENIZER);
    write("tokenizer_config.json", &list(&["default"]));
    write("additional_chat_templates/tool_use.jinja", "tool_use {{ tools }}");
    let folder = Folder::Disk(dir.path().into());
    let [without, with] = both(&Text::open(&folder, None).unwrap());
    assert_eq!(with, used);
    let Err(Error::Option { name: "chat_template", problem }) = without else { panic!("{without:?}") };
    assert_eq!(problem, "is absent, and the target has only the chat template tool_use, expected default");
    write("chat_template.jinja", "default {{ tools }}");
    assert_eq!(both(&Text::open(&folder, None).unwrap()), [default, used]);
}

#[test]
fn tools_and_variables_that_no_template_reads_are_refused() {
    let text = with_template(
        "{% set a = a or b %}{% for c in d[e:] if c.f | g(h=i) is j %}{{ loop.k }}{% endfor %}{{ 'l' }}",
    );
    let message = |tools: Option<Value>, name: &str| {
        let args = [(name.to_string(), json!(1))];
        let args = if name.is_empty() { &args[..0] } else { &args[..] };
        text.encode_chat(&[], tools.as_ref(), args).unwrap_err().to_string()
    };
    for unread in ["c", "f", "g", "h", "j", "k", "l", "loop", "enable_thinking", "messages2"] {
        let message = message(None, unread);
        let start = format!("template_arg is given {unread}, which ");
        let end = "chat_template.jinja does not read: expected one of a, b, d, e, i";
        assert!(message.starts_with(&start) && message.ends_with(end), "{message}");
    }
    let called = with_template(
        "{% with w = f(x, y) %}{{ w }}{% endwith %}{% macro m(p, q=[r, s]) %}{{ p }}{{ q }}{% endmacro %}\
         {% set t | replace('a', b=u) %}{{ v }}{% endset %}{{ t }}{% call(z) m() %}{{ z }}{% endcall %}",
    );
    let error = called.check_template(&[("none".into(), json!(1))]).unwrap_err().to_string();
    assert!(error.ends_with("expected one of f, r, s, u, v, x, y"), "{error}");
    for read in ["a", "b", "i"] {
        assert_eq!(text.check_template(&[(read.to_string(), json!(1))]), Ok(()));
    }
    let unread = message(Some(json!([{"name": "f"}])), "");
    assert!(
        unread.starts_with("there are tools, but ") && unread.ends_with(" does not mention tools"),
        "{unread}"
    );
    assert_eq!(message(Some(json!({"a": 1})), ""), "tools is {\"a\":1}, expected a JSON array of objects");
    assert_eq!(message(Some(json!(["a"])), ""), "tools is [\"a\"], expected a JSON array of objects");
    let none = with_template("x").check_template(&[("x".into(), json!(1))]).unwrap_err().to_string();
    assert!(none.ends_with("chat_template.jinja does not read: expected none"), "{none}");
}

#[test]
fn the_programs_own_switches_are_booleans() {
    let text = with_template("{{ enable_thinking is true }} {{ enable_thinking is false }}");
    for (value, expected) in [
        (json!(true), "True False"),
        (json!(1), "True False"),
        (json!(false), "False True"),
        (json!(0), "False True"),
        (json!(null), "False True"),
    ] {
        assert_eq!(render(&text, &[], &[("enable_thinking", value)]).unwrap(), expected);
    }
    for value in [json!("False"), json!(2), json!(0.5), json!([])] {
        let problem = format!("is given enable_thinking={value}, expected true or false");
        let got = render(&text, &[], &[("enable_thinking", value)]);
        assert_eq!(got, Err(Error::option("template_arg", problem)));
    }
}

#[test]
fn raw_text_never_needs_the_template() {
    let config = r#"{"chat_template": 3}"#;
    let broken = [
        ("chat_template.jinja", &b"{% if %}"[..]),
        ("chat_template.jinja", b"\xff"),
        ("tokenizer_config.json", config.as_bytes()),
    ];
    for (file, bytes) in broken {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), TOKENIZER).unwrap();
        std::fs::write(dir.path().join(file), bytes).unwrap();
        let text = Text::open(&Folder::Disk(dir.path().into()), None).unwrap();
        assert_eq!(text.encode("a"), DEMO.encode("a"));
        assert!(text.has_template());
        let Err(Error::Model(message)) = text.check_template(&[]) else { panic!("{file}") };
        assert!(message.contains(file), "{message}");
        assert_eq!(text.encode_chat(&[], None, &[]), Err(Error::Model(message)));
    }
}

#[test]
fn a_chat_without_a_template_is_refused() {
    for config in ["{}", r#"{"chat_template": []}"#, r#"{"chat_template": null}"#] {
        let text = open(&[("tokenizer.json", TOKENIZER), ("tokenizer_config.json", config)]).unwrap();
        assert!(!text.has_template());
        let Err(Error::Option { name, problem }) = text.encode_chat(&[], None, &[]) else { panic!() };
        assert!(name == "chat_template" && problem.starts_with("is absent, and neither "), "{problem}");
    }
    assert!(!DEMO.has_template());
}

#[test]
fn chat_prompts_get_no_special_tokens_beyond_the_template() {
    let config = r#"{"bos_token": "<|mask|>", "add_bos_token": true}"#;
    let template = ("chat_template.jinja", "{{ bos_token }}a");
    let text = open(&[("tokenizer.json", TOKENIZER), ("tokenizer_config.json", config), template]).unwrap();
    let a = DEMO.encode("a").unwrap();
    assert_eq!(text.encode_chat(&[], None, &[]).unwrap(), [&[1], &a[..]].concat());
    let sentencepiece = sentencepiece().to_string();
    let text = open(&[("tokenizer.json", &sentencepiece), ("chat_template.jinja", "<s>a")]).unwrap();
    assert_eq!(text.encode_chat(&[], None, &[]).unwrap()[0], 1);
    assert_ne!(text.encode_chat(&[], None, &[]).unwrap()[1], 1);
}

#[test]
fn raise_exception_messages_are_reported_verbatim() {
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
fn template_errors_name_the_template_and_the_line() {
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
        let position = format!("in line {line}");
        assert!(message.contains("chat_template.jinja") && message.contains(&position), "{message}");
        assert!(message.contains(what) && !message.contains('\n'), "{message}");
        // An error in a template given by the user is a usage error.
        let given = open_with(&[("tokenizer.json", TOKENIZER)], Some(("my.jinja", source)))
            .and_then(|text| render(&text, &[("user", "hi")], &[]));
        let Err(Error::Usage(message)) = given else { panic!("{source}") };
        assert!(message.starts_with("my.jinja") && message.contains(&position), "{message}");
    }
}

/// A template that makes a value 240,000 lists deep.
const NESTED: &str = "{% set ns = namespace(a=1) %}{% for i in range(12000) %}\
                      {% set ns.a = [[[[[[[[[[[[[[[[[[[[ns.a]]]]]]]]]]]]]]]]]]]] %}{% endfor %}";

#[test]
fn templates_have_an_instruction_and_recursion_limit() {
    for (source, what) in [
        (
            "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
            "5000000 instructions",
        ),
        (
            "{% set r = range(90000) %}{% for i in r %}{% set x = r | map('abs') %}{% endfor %}",
            "5000000 instructions",
        ),
        ("{% macro m(x) %}{{ m(x + 1) }}{% endmacro %}{{ m(1) }}", "recursion limit"),
        (&format!("{NESTED}{{{{ ns.a.b.c }}}}"), "undefined"),
        (&format!("{{{{ {}", "[".repeat(20_000)), "recursion limit"),
        (&"a".repeat(65 << 10), "at most 65536"),
    ] {
        let files = [("tokenizer.json", TOKENIZER), ("chat_template.jinja", source)];
        let Err(Error::Model(message)) = open(&files).and_then(|text| render(&text, &[], &[])) else {
            panic!()
        };
        assert!(message.contains(what), "{message}");
    }
}

/// Values that hold another one twice, 40 times over.
#[test]
fn large_values_of_a_template_reach_a_limit() {
    let twice =
        "{% set ns = namespace(a=[1]) %}{% for i in range(40) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}";
    for printed in ["ns.a", "ns.a | tojson", "'%s' | format(ns.a)", "'{}'.format(ns.a)", "'a' ~ ns.a"] {
        let error = rendered(&format!("{twice}{{{{ {printed} }}}}")).unwrap_err().to_string();
        assert!(error.contains("a text has more than 16777216 bytes"), "{error}");
    }
    let pair = format!("{twice}{}", twice.replace("ns", "other"));
    let compared = [
        "ns.a == other.a",
        "1 + 1 != 2 or [ns.a] < [other.a]",
        "ns.a in [other.a]",
        "(1, ns.a) not in [(1, other.a)]",
        "ns.a in {}",
        "ns.a is eq other.a",
        "[ns.a] | select('in', [[other.a]]) | list",
        "[ns.a, other.a] | sort",
        "[[ns.a, other.a]] | map('unique') | list",
        "[ns.a, other.a] | max",
        "[{'x': ns.a}, {'x': other.a}] | groupby('x')",
        "{1: ns.a, 2: other.a} | dictsort(by='value')",
        "[ns.a].index(other.a)",
        "{}.get(ns.a)",
        "{}[ns.a]",
        "{ns.a: 1}",
        "[ns.a, other.a] | map('upper') | list",
        "{} | attr(ns.a)",
        "[1] | select(ns.a) | list",
        "[{}] | rejectattr(ns.a, ns.a) | list",
        "ns.a | safe",
        "ns.a in 'abc'",
    ];
    // Two threads: this is the longest test of the program.
    std::thread::scope(|scope| {
        for half in compared.chunks(compared.len().div_ceil(2)) {
            let pair = &pair;
            scope.spawn(move || {
                for compared in half {
                    let error = rendered(&format!("{pair}{{{{ {compared} }}}}")).unwrap_err().to_string();
                    let limited = error.contains("5000000 instructions") || error.contains("16777216");
                    assert!(limited, "{compared}: {error}");
                }
            });
        }
    });
    let changed = "{% for x in [ns.a, other.a] if x == x %}{{ loop.changed(1, x) }}{% endfor %}";
    assert!(rendered(&format!("{pair}{changed}")).unwrap_err().to_string().contains("instructions"));
}

#[test]
fn long_texts_and_deep_values_of_a_template_are_limited() {
    for long in [
        "'a' * 10 ** 9",
        "('a' * 10 ** 7) | replace('a', 'a' * 10 ** 7)",
        "('a' * 10 ** 6).join(['a'] * 10 ** 6)",
        "('a\n' * 10 ** 6) | indent(60000)",
        "range(10 ** 12) | list",
        "'%1000000000d' | format(1)",
        "'a' | center(10 ** 9)",
    ] {
        let error = rendered(&format!("{{{{ {long} }}}}")).err();
        assert!(matches!(error, Some(Error::Model(_))), "{long}: {error:?}");
    }
    // Deep values are valid: they are printed, serialised and dropped without a stack overflow.
    assert!(rendered(&format!("{NESTED}{{{{ ns.a }}}}")).unwrap().starts_with("[[[[[["));
    assert!(rendered(&format!("{NESTED}{{{{ ns.a | tojson }}}}")).unwrap().starts_with("[[[[[["));
    assert_eq!(rendered(&format!("{{{{ 1{} }}}}", "+1".repeat(30_000))).unwrap(), "30001");
}

/// jinja2 tests each item when its turn comes; minijinja tests all of them first. Its macros have no
/// `varargs` and `kwargs`, and a value in a tag sees other names of the tag.
#[test]
fn loops_and_macros_that_jinja2_renders_differently_are_refused() {
    let counting =
        "has a loop with a condition in line 1 that is recursive or reads what the body may change";
    let varargs = "reads varargs in a macro in line 1, which is not supported";
    let kwargs = "reads kwargs in a macro in line 1, which is not supported";
    let own = "reads a in the tag that sets it in line 1, which is not supported";
    let set = "{% set ns = namespace(n=0) %}{% set other = namespace(n=0) %}";
    for (source, refusal) in [
        ("{% for x in [1] if ns.n < 2 %}{{ loop.index }}{% endfor %}", counting),
        ("\n{% for x in [1] if x %}{{ loop.index }}{% endfor %}", ""),
        ("{% for x in [1] if ns.n < 2 %}{% for y in [2] %}{{ loop.last }}{% endfor %}{% endfor %}", ""),
        ("{% for x in [1] if ns.n < 2 %}x{% else %}y{% endfor %}", counting),
        ("{% for x in [1] if ns.n < 2 %}{% if x %}x{% else %}y{% endif %}{% endfor %}", ""),
        ("{% for x in [1] if x recursive %}{{ loop(x) if loop.last }}{% endfor %}", counting),
        ("{% set a = ns %}{% for x in [1] if a.n %}{{ loop.length }}{% endfor %}", counting),
        (
            "{% macro m() %}{{ ns.n }}{% endmacro %}{% for x in [1] if m() %}{{ loop.first }}{% endfor %}",
            counting,
        ),
        ("{% for x in [1] if x.ns %}{{ loop.first }}{% endfor %}", ""),
        ("{% for x in [1] if x %}{% set outer = loop %}{% endfor %}", ""),
        (
            "{% macro m(a) %}{{ a }}{% for x in varargs %}{{ x }}{% endfor %}{% endmacro %}{{ m(1, 2) }}",
            varargs,
        ),
        ("{% set kwargs = 1 %}{% macro m() %}{% if true %}{{ kwargs }}{% endif %}{% endmacro %}", kwargs),
        ("{% macro m() %}{{ caller() }}{% endmacro %}{% call m() %}{{ kwargs.x }}{% endcall %}", kwargs),
        ("{% macro m(kwargs, varargs=none) %}{{ kwargs }}{{ varargs }}{{ a.kwargs }}{% endmacro %}", ""),
        ("{% macro m(a) %}{{ a }}{% endmacro %}{{ m(kwargs) }}{{ varargs }}", ""),
        ("{% macro m(a, b=[1, a]) %}{{ b }}{% endmacro %}", own),
        ("{% with a = 1, b = {'k': a} %}{{ b }}{% endwith %}", own),
        ("{% with a = a, b = x.a | a, c = ['a', {1: 2}] %}{{ a }}{% endwith %}{{ a }}", ""),
    ] {
        let files = [("tokenizer.json", TOKENIZER), ("chat_template.jinja", &format!("{set}{source}"))];
        match open(&files).unwrap().check_template(&[]) {
            Ok(()) => assert_eq!(refusal, "", "{source}"),
            Err(Error::Model(message)) => {
                assert!(!refusal.is_empty() && message.contains(refusal), "{message}");
            }
            other => panic!("{source}: {other:?}"),
        }
    }
}

#[test]
fn strftime_now_is_the_current_date() {
    let date = || {
        let output =
            std::process::Command::new("date").args(["-u", "+%d %b %Y, %j %A"]).env("LC_ALL", "C").output();
        String::from_utf8(output.unwrap().stdout).unwrap().trim().to_string()
    };
    let text = with_template("{{ strftime_now('%d %b %Y, %j %A') }}");
    // Midnight may fall between two of the three calls.
    let (before, got, after) = (date(), render(&text, &[], &[]).unwrap(), date());
    assert!(got == before || got == after, "{got}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn a_changed_chat_template_does_not_panic(
        source in prop::sample::select(vec![CHATML, HEADERS]),
        position in any::<prop::sample::Index>(),
        replaced in 0usize..20,
        inserted in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..3),
            prop::sample::select(vec!["{{", "%}", "{%- endif %}", "{{ raise_exception(messages) }}", "messages", " * 9999999 "])
                .prop_map(|text| text.as_bytes().to_vec()),
            Just(b"(".repeat(10_000)),
            Just(b"x".repeat(20_000)),
        ],
    ) {
        let mut bytes = source.as_bytes().to_vec();
        let at = position.index(bytes.len());
        let end = bytes.len().min(at + replaced);
        bytes.splice(at..end, inserted);
        exercise(&[("tokenizer.json", TOKENIZER.as_bytes()), ("chat_template.jinja", &bytes)], None);
    }
}
