//! Chat templates, compared with outputs of Python's jinja2; which template is used; errors and limits.

use crate::support::text;

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

/// Constructs of published templates and the output of Python's jinja2 for `CONVERSATION`, with Hugging
/// Face's settings and filters.
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
fn templates_print_the_same_as_jinja2() {
    for (source, expected) in CONSTRUCTS {
        let got = render(&with_template(source), &CONVERSATION, &[]);
        assert_eq!(got.as_deref(), Ok(expected), "{source}");
    }
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

#[test]
fn templates_have_an_instruction_and_recursion_limit() {
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
    // Deep values are valid: they are printed, serialised and dropped without a stack overflow.
    assert!(rendered(&format!("{nested}{{{{ ns.a }}}}")).unwrap().starts_with("[[[[[["));
    assert!(rendered(&format!("{nested}{{{{ ns.a | tojson }}}}")).unwrap().starts_with("[[[[[["));
    assert_eq!(rendered(&format!("{{{{ 1{} }}}}", "+1".repeat(30_000))).unwrap(), "30001");
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
