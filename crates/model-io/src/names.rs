//! Names of what a graph takes from one call to the next.

/// Words by which the names of a past and of its present differ, each with its counterpart.
const DIRECTIONS: [(&str, &str); 9] = [
    ("past", "present"),
    ("inputs", "outputs"),
    ("input", "output"),
    ("in", "out"),
    ("prev", "next"),
    ("previous", "next"),
    ("old", "new"),
    ("prev", "cur"),
    ("previous", "current"),
];

/// Names that exporters give the output which a past input comes back as: `past_key_values.0.key` -> `present.0.key`,
/// `input.past_key_values.layers.0.keys` -> `output.past_key_values.layers.0.keys`.
///
/// These alone are certain enough to hold a graph's nodes against its names: a word such as `in` or `old` may stand in a name for
/// another reason. A program that looks for the output to feed back tries more, see [`present_names`].
pub fn exporters_present_names(past: &str) -> Vec<String> {
    let mut names = vec![
        past.replacen("past_key_values", "present", 1),
        past.replacen("past", "present", 1),
    ];
    names.extend(past.strip_prefix("input.").map(|rest| format!("output.{rest}")));
    names.retain(|name| name != past);
    names
}

/// Names that the output may have which a past input comes back as, likelier ones first: those of the templates,
/// [`exporters_present_names`], then those that differ by a word of direction.
/// `templates`: pairs of past and present with `%d` for the layer, as genai_config.json has them.
pub fn present_names(past: &str, templates: &[(String, String)]) -> Vec<String> {
    let mut names = Vec::new();
    for (template, present) in templates {
        if let Some((before, after)) = template.split_once("%d") {
            let layer = past.strip_prefix(before).and_then(|n| n.strip_suffix(after));
            if let Some(layer) = layer.filter(|l| !l.is_empty() && l.bytes().all(|b| b.is_ascii_digit())) {
                names.push(present.replace("%d", layer));
            }
        } else if template == past {
            names.push(present.clone());
        }
    }
    names.extend(exporters_present_names(past));
    for (word, counterpart) in DIRECTIONS {
        names.extend(replace_word(past, word, counterpart));
    }
    names.push(format!("present_{past}"));
    names.push(format!("{past}_out"));
    let mut seen: Vec<String> = Vec::new();
    for name in names {
        if name != past && !seen.contains(&name) {
            seen.push(name);
        }
    }
    seen
}

/// Replaces the first whole word `word` of a name, words being what stands between dots, underscores and other marks.
fn replace_word(name: &str, word: &str, by: &str) -> Option<String> {
    let edge = |c: Option<char>| c.is_none_or(|c| !c.is_ascii_alphanumeric());
    let whole = |&(at, _): &(usize, &str)| {
        let (before, rest) = name.split_at(at);
        edge(before.chars().next_back()) && edge(rest.get(word.len()..).and_then(|r| r.chars().next()))
    };
    let (at, _) = name.match_indices(word).find(whole)?;
    Some(format!("{}{by}{}", name.get(..at)?, name.get(at + word.len()..)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exporters_names_are_few() {
        assert_eq!(
            exporters_present_names("past_key_values.3.key"),
            ["present.3.key", "present_key_values.3.key"]
        );
        assert_eq!(exporters_present_names("input.state"), ["output.state"]);
        assert_eq!(
            exporters_present_names("conv_state_in.2"),
            [""; 0],
            "a word of direction alone"
        );
    }

    #[test]
    fn exporters_names_find_their_outputs() {
        let templates = [("kv.%d.k".to_owned(), "out.%d.k".to_owned())];
        assert_eq!(present_names("kv.12.k", &templates)[0], "out.12.k");
        assert!(!present_names("kv.x.k", &templates).contains(&"out.x.k".to_owned()));
        for (past, present) in [
            ("past_key_values.3.key", "present.3.key"),
            ("past_key_values.3.key", "present_key_values.3.key"),
            ("past_0", "present_0"),
            ("past.0.conv", "present.0.conv"),
            ("past_conv.0", "present_conv.0"),
            ("past_key_values.0.recurrent_state", "present.0.recurrent_state"),
            (
                "input.past_key_values.layers.1.keys",
                "output.past_key_values.layers.1.keys",
            ),
            ("conv_state_in.2", "conv_state_out.2"),
            ("prev_state", "next_state"),
            ("input_state.0", "output_state.0"),
            ("cache.0.key", "present_cache.0.key"),
        ] {
            assert!(present_names(past, &[]).contains(&present.to_owned()), "{past}");
        }
        // "in" inside a word is none.
        assert!(!present_names("min_state", &[]).iter().any(|n| n.contains("mout")));
    }
}
