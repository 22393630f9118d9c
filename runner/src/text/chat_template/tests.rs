use std::{fs, time::Instant};

use serde_json::json;

use super::*;

/// A folder with these files.
fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    dir
}

fn find(files: &[(&str, &str)]) -> Result<Option<ChatTemplate>> {
    ChatTemplate::find_in(folder(files).path())
}

fn hello() -> Value {
    json!({"role": "user", "content": "Hello"})
}

fn render(text: &str) -> Result<String> {
    render_with(text, &RenderOptions::default())
}

fn render_with(text: &str, options: &RenderOptions) -> Result<String> {
    let template = find(&[("chat_template.jinja", text)])?;
    template.unwrap().render(&[hello()], options)
}

/// The text that the templates of these files make.
fn rendered(files: &[(&str, &str)]) -> String {
    find(files)
        .unwrap()
        .unwrap()
        .render(&[hello()], &RenderOptions::default())
        .unwrap()
}

fn line<T>(result: Result<T>) -> String {
    let line = result.err().unwrap().to_string();
    assert!(!line.contains('\n'), "{line}");
    line
}

#[test]
fn a_template_is_looked_for_in_the_files_in_turn() {
    let jinja = ("chat_template.jinja", "jinja");
    let json = ("chat_template.json", r#"{"chat_template": "json"}"#);
    let config = ("tokenizer_config.json", r#"{"chat_template": "config"}"#);
    assert_eq!(rendered(&[jinja, json, config]), "jinja");
    assert_eq!(rendered(&[json, config]), "json");
    assert_eq!(rendered(&[config]), "config");
    for none in ["{}", r#"{"chat_template": null}"#] {
        assert!(find(&[("tokenizer_config.json", none)]).unwrap().is_none());
    }
    assert!(find(&[]).unwrap().is_none());
}

#[test]
fn tools_take_the_template_named_so() {
    let list = r#"{"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}"#;
    let additional = ("additional_chat_templates/tool_use.jinja", "T");
    let tools = RenderOptions {
        tools: Some(vec![json!({})]),
        ..RenderOptions::default()
    };
    for files in [
        &[("tokenizer_config.json", list)][..],
        &[("chat_template.jinja", "D"), additional],
    ] {
        let template = find(files).unwrap().unwrap();
        assert_eq!(template.render(&[hello()], &RenderOptions::default()).unwrap(), "D");
        assert_eq!(template.render(&[hello()], &tools).unwrap(), "T");
    }
    let only = r#"{"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "rag", "template": "R"}]}"#;
    let template = find(&[("tokenizer_config.json", only)]).unwrap().unwrap();
    assert_eq!(template.render(&[hello()], &tools).unwrap(), "T");
    let error = line(template.render(&[hello()], &RenderOptions::default()));
    assert!(
        error.contains("none is named \"default\", but rag, tool_use: give another template with --template FILE"),
        "{error}"
    );
}

#[test]
fn a_file_is_jinja_or_json_by_its_name() {
    let dir = folder(&[
        ("model.onnx", ""),
        ("a.txt", "{{ bos_token }}A"),
        ("b.json", r#"{"chat_template": "B"}"#),
        ("c.json", "{}"),
        ("tokenizer_config.json", r#"{"bos_token": "<s>"}"#),
    ]);
    let folder = ModelFolder::open(dir.path(), None).unwrap();
    let text = |name: &str| {
        let template = ChatTemplate::from_file(&dir.path().join(name), &folder)?;
        template.render(&[hello()], &RenderOptions::default())
    };
    assert_eq!(text("a.txt").unwrap(), "<s>A");
    assert_eq!(text("b.json").unwrap(), "B");
    assert!(line(text("c.json")).contains("c.json has no chat_template"));
    for name in ["none.json", "none.jinja"] {
        assert!(line(text(name)).contains("cannot read the chat template"), "{name}");
    }
}

#[test]
fn special_tokens_are_text_and_variables_win() {
    let text = "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}";
    let config = r#"{"bos_token": {"content": "<b>", "lstrip": false}, "eos_token": "<e>", "pad_token": null}"#;
    let files = [("chat_template.jinja", text), ("tokenizer_config.json", config)];
    assert_eq!(rendered(&files), "<b><e>");
    let variables = [("eos_token".to_owned(), json!("<x>"))].into_iter().collect();
    let options = RenderOptions {
        variables,
        ..RenderOptions::default()
    };
    let template = find(&files).unwrap().unwrap();
    assert_eq!(template.render(&[hello()], &options).unwrap(), "<b><x>");
    let llama = ("tokenizer_config.json", r#"{"tokenizer_class": "LlamaTokenizerFast"}"#);
    assert_eq!(rendered(&[files[0], llama]), "<s></s>");
}

#[test]
fn messages_are_as_transformers_gives_them() {
    let text = "{% for m in messages %}{% for k, v in m | items %}{{ k }}={{ v }};{% endfor %}{% endfor %}";
    let message = json!({"role": "assistant", "content": null, "reasoning": "R", "tool_calls": null});
    let template = find(&[("chat_template.jinja", text)]).unwrap().unwrap();
    assert_eq!(
        template.render(&[message], &RenderOptions::default()).unwrap(),
        "thinking=R;role=assistant;reasoning=R;reasoning_content=R;"
    );
}

#[test]
fn the_last_message_is_continued() {
    let text = "{% for m in messages %}<{{ m.content }}>{% endfor %}";
    let continued = RenderOptions {
        continue_final_message: true,
        ..RenderOptions::default()
    };
    assert_eq!(render_with(text, &continued).unwrap(), "<Hello");
    let trimmed = "{% for m in messages %}[ {{ m.content | trim }}]{% endfor %}";
    assert_eq!(render_with(trimmed, &continued).unwrap(), "[ Hello");
    assert!(line(render_with("{{ messages | length }}", &continued)).contains("can't be continued"));
    let template = find(&[("chat_template.jinja", text)]).unwrap().unwrap();
    let call = json!({"role": "assistant", "tool_calls": []});
    assert!(line(template.render(&[call], &continued)).contains("no text to continue"));
    let parts = json!({"role": "user", "content": [{"text": "A "}, {"text": "B "}, {"type": "image"}]});
    let text = "{% for p in messages[0].content %}{{ p.text }}|{% endfor %}";
    let template = find(&[("chat_template.jinja", text)]).unwrap().unwrap();
    assert_eq!(template.render(&[parts], &continued).unwrap(), "A |B ");
    let both = RenderOptions {
        add_generation_prompt: true,
        ..continued
    };
    assert!(line(render_with(text, &both)).contains("not both"));
}

#[test]
fn errors_say_where_and_what_to_do() {
    let remedy = "give another template with --template FILE, or none with --no-template";
    for (text, expected) in [
        ("a\n{% if x %}\n", "chat_template.jinja, line 2: syntax error: "),
        (
            "a\n\n{{ messages.x.y }}",
            "chat_template.jinja, line 3: undefined value",
        ),
        (
            "{{ 'a'.nothing() }}",
            "line 1: unknown method: string has no method named nothing",
        ),
        ("{{ 1 | nothing }}", "line 1: unknown filter: filter nothing is unknown"),
        (
            "{{ missing | tojson }}",
            "line 1: invalid operation: tojson: undefined is nothing that JSON has",
        ),
        ("{% include 'x' %}", "line 1: template not found"),
        (
            "a\n{{ raise_exception('No\n\x1b[31m ' ~ 'way') }}",
            "chat_template.jinja, line 2 refuses the conversation: No  [31m way (or ",
        ),
        (
            "{% macro m() %}{{ raise_exception('No') }}{% endmacro %}\n{{ m() }}",
            "refuses the conversation: No (or ",
        ),
        ("{{ raise_exception('long ' * 1000) }}", "long ... (or "),
        (
            "{{ strftime_now('%!') }}",
            "line 1: invalid operation: strftime_now(\"%!\"): ",
        ),
    ] {
        let error = line(render(text));
        assert!(error.contains(expected) && error.contains(remedy), "{text}: {error}");
    }
    let bad = find(&[("tokenizer_config.json", r#"{"chat_template": [{"name": 1}]}"#)]);
    assert!(line(bad).contains("tokenizer_config.json: chat_template is neither text nor a list"));
    let bad = find(&[("tokenizer_config.json", "{")]);
    assert!(line(bad).contains("tokenizer_config.json"));
    assert!(line(render(&" ".repeat(5 << 20))).contains("has 5242880 bytes, more than the 524288"));
    let template = find(&[("chat_template.jinja", "")]).unwrap().unwrap();
    assert!(line(template.render(&[], &RenderOptions::default())).contains("the conversation is empty"));
    assert!(line(template.render(&[hello(), json!("x")], &RenderOptions::default())).contains("message 2"));
}

/// Each would take minutes, or gigabytes, or the stack.
#[test]
fn hostile_templates_end() {
    let deep = |open: &str, close: &str| ["{{ ", &open.repeat(100_000), "1", &close.repeat(100_000), " }}"].concat();
    let nested = |what: &str| {
        let build = "{% set ns = namespace(x=[]) %}{% for i in range(100000) %}{% set ns.x = [ns.x] %}{% endfor %}";
        [build, what].concat()
    };
    let wide = |what: &str| {
        let build = "{% set ns = namespace(x='x') %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}";
        [build, what].concat()
    };
    let templates = [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}".to_owned(),
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}".to_owned(),
        "{% set ns = namespace(x='x' * 1000) %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
            .to_owned(),
        "{{ 'x' * 99999999 }}".to_owned(),
        "{{ 'x'.center(99999999999) }}".to_owned(),
        "{{ '1'.zfill(9223372036854775807) }}".to_owned(),
        "{{ [[[1]]] | tojson(indent=99999999999) }}".to_owned(),
        "{{ 'x\nx' | indent(99999999999) }}".to_owned(),
        "{{ '%99999999999d' | format(1) }}".to_owned(),
        "{{ '{:99999999999}'.format(1) }}".to_owned(),
        "{{ ('x' * 50000000).replace('x', 'y' * 1000) }}".to_owned(),
        "{{ ('x,' * 20000000).split(',') | length }}".to_owned(),
        "{{ ('x,' * 20000000).rsplit(',') | length }}".to_owned(),
        "{{ ('x\n' * 20000000).splitlines() | length }}".to_owned(),
        "{{ 'x'.join(range(99999)) * 9999 }}".to_owned(),
        wide("{{ ns.x | tojson }}"),
        wide("{{ ns.x | string }}"),
        nested("{{ ns.x | tojson }}"),
        deep("(", ")"),
        deep("[", "]"),
        deep("-", ""),
        deep("not ", ""),
        "{% if 1 %}".repeat(50_000),
    ];
    for text in templates {
        let shown: String = text.chars().take(100).collect();
        let start = Instant::now();
        match render(&text) {
            // Deep but legal.
            Ok(made) => assert!(text.len() > 100_000 && made.len() < 1000, "{shown}"),
            error => assert!(line(error).contains("--template FILE"), "{shown}"),
        }
        assert!(start.elapsed().as_secs() < 20, "{shown} took {:?}", start.elapsed());
    }
}

/// A list that holds another twice, and so on, is written out as far as a conversation may be long. The clock would end
/// it too, gigabytes later.
#[test]
fn text_ends_at_a_length() {
    let build = "{% set ns = namespace(x='x') %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}";
    let start = Instant::now();
    let error = line(render(&[build, "{{ ns.x }}"].concat()));
    assert!(error.contains("makes too much text"), "{error}");
    assert!(start.elapsed().as_secs() < 8, "{:?}", start.elapsed());
    // What a conversation needs is there.
    let long = "x".repeat(4 << 20);
    let message = [json!({"role": "user", "content": long})];
    let template = find(&[("chat_template.jinja", "{{ messages[0].content }}")])
        .unwrap()
        .unwrap();
    assert_eq!(
        template.render(&message, &RenderOptions::default()).unwrap().len(),
        4 << 20
    );
}

/// What is nested a long way ends too when it is only dropped.
#[test]
fn nested_values_are_dropped() {
    let text = "{% set ns = namespace(x=[]) %}{% for i in range(60000) %}{% set ns.x = [ns.x] %}{% endfor %}";
    assert_eq!(render(text).unwrap(), "");
    let written = render(&[text, "{{ ns.x }}{{ ns.x == ns.x[0] }}"].concat()).unwrap();
    assert_eq!(written.len(), 2 * 60001 + "False".len());
}

/// The engine joins lists without counting what it takes to go through them.
#[test]
fn steps_that_are_not_counted_end_by_the_clock() {
    let build = "{% set ns = namespace(x=[1]) %}{% for i in range(36) %}{% set ns.x = ns.x + ns.x %}{% endfor %}";
    let error = line(render(&[build, "{{ ns.x | last }}"].concat()));
    assert!(
        error.contains("does too much work") && error.contains("--template FILE"),
        "{error}"
    );
}
