//! Blocks that mark what a model has written: `{% generation %}` ... `{% endgeneration %}`.
//!
//! They matter for training alone. The engine has no tags but its own, so they become `{% with %}`, which renders its
//! body in a scope of its own, as the block does.

use std::borrow::Cow;

/// The template with its blocks replaced. Lines stay where they are.
pub fn without_generation_blocks(template: &str) -> Cow<'_, str> {
    if !template.contains("generation") {
        return Cow::Borrowed(template);
    }
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    let mut raw = false;
    while let Some(start) = rest.find("{%").into_iter().chain(literal(rest, raw)).min() {
        out.push_str(&rest[..start]);
        rest = &rest[start..];
        let (tag, after) = rest.split_at(length(rest, raw));
        match name(tag) {
            Some("generation") if !raw => out.push_str(&tag.replacen("generation", "with", 1)),
            Some("endgeneration") if !raw => out.push_str(&tag.replacen("endgeneration", "endwith", 1)),
            name => {
                raw = name == Some("raw") || raw && name != Some("endraw");
                out.push_str(tag);
            }
        }
        rest = after;
    }
    out.push_str(rest);
    Cow::Owned(out)
}

/// Where the next expression or comment begins.
fn literal(rest: &str, raw: bool) -> Option<usize> {
    (!raw).then(|| rest.find("{{").into_iter().chain(rest.find("{#")).min())?
}

/// The length of the tag, expression or comment that a text begins with; all of it if there is no end. In raw text
/// only the tag that ends it is one.
fn length(text: &str, raw: bool) -> usize {
    if raw {
        let tag = text.find("%}").map(|end| end + 2);
        return tag.filter(|end| name(&text[..*end]) == Some("endraw")).unwrap_or(2);
    }
    let end = match &text[..2] {
        "{#" => return text.find("#}").map_or(text.len(), |end| end + 2),
        "{%" => "%}",
        _ => "}}",
    };
    let mut quote = None;
    let mut characters = text.char_indices();
    while let Some((at, c)) = characters.next() {
        match quote {
            Some(_) if c == '\\' => _ = characters.next(),
            Some(open) if c == open => quote = None,
            Some(_) => {}
            None if c == '"' || c == '\'' => quote = Some(c),
            None if text[at..].starts_with(end) => return at + 2,
            None => {}
        }
    }
    text.len()
}

/// The name of a tag that has nothing but a name.
fn name(tag: &str) -> Option<&str> {
    let inner = tag.strip_prefix("{%")?.strip_suffix("%}")?;
    let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner);
    let inner = inner.strip_suffix(['-', '+']).unwrap_or(inner);
    Some(inner.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_become_scopes() {
        for (template, expected) in [
            (
                "a{%- generation %}b{{ '{% generation %}' }}\n{% endgeneration -%}c",
                "a{%- with %}b{{ '{% generation %}' }}\n{% endwith -%}c",
            ),
            (
                "{% raw %}{% generation %}{% endraw %}{%generation%}",
                "{% raw %}{% generation %}{% endraw %}{%with%}",
            ),
            (
                "{# {% generation %} #}{% if add_generation_prompt %}{% set x = '%}' %}{% endif %}",
                "{# {% generation %} #}{% if add_generation_prompt %}{% set x = '%}' %}{% endif %}",
            ),
            (
                "{% raw %}{% ' {% endraw %}{% generation %}",
                "{% raw %}{% ' {% endraw %}{% with %}",
            ),
            ("{{ 'generation", "{{ 'generation"),
            ("generation {%", "generation {%"),
        ] {
            assert_eq!(without_generation_blocks(template), expected);
        }
    }
}
