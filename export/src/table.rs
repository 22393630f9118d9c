//! Reports for people: layers that are alike in one line, values that differ by a number in one line.

use crate::report::{Action, LayerReport};
use std::fmt::Write;

/// A table of layers. Those that are alike share a line.
pub fn layers(layers: &[LayerReport]) -> String {
    const HEAD: [&str; 6] = ["layers", "attention", "heads", "size", "mask", "becomes"];
    let mut rows: Vec<(Vec<usize>, [String; 5])> = Vec::new();
    for layer in layers {
        let cells = cells(layer);
        match rows.iter_mut().find(|(_, known)| *known == cells) {
            Some((numbers, _)) => numbers.push(layer.layer),
            None => rows.push((vec![layer.layer], cells)),
        }
    }
    if rows.is_empty() {
        return String::new();
    }
    let rows: Vec<[String; 6]> = rows
        .into_iter()
        .map(|(numbers, [a, b, c, d, e])| [ranges(&numbers), a, b, c, d, e])
        .collect();
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|c| c.chars().count());
        cells.chain(HEAD.get(column).map(|h| h.len())).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..HEAD.len()).map(width).collect();
    let mut text = String::new();
    for row in std::iter::once(HEAD.map(str::to_owned)).chain(rows) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// What was found of a layer, and what becomes of it.
fn cells(layer: &LayerReport) -> [String; 5] {
    let attention = match layer.rule {
        Some(rule) => format!("{} ({rule})", layer.op_type),
        None => layer.op_type.clone(),
    };
    let [mut heads, mut size, mut mask] = ["", "", ""].map(str::to_owned);
    if let Some(found) = &layer.found {
        heads = format!("{}/{}", found.heads, found.kv_heads);
        size = found.head_size.map_or_else(|| "?".to_owned(), |d| d.to_string());
        size += &format!(" {}", found.data_type);
        mask.clone_from(&found.mask);
        if found.softcap != 0.0 {
            mask += &format!(", softcap {}", found.softcap);
        }
        if found.head_sink {
            mask += ", head sink";
        }
        if found.sliding_cache {
            mask += ", sliding-window cache";
        }
    }
    let becomes = match &layer.action {
        Action::Converted { mode } => {
            let whole = layer.found.as_ref().is_some_and(|f| f.sliding_cache);
            let cache = if whole { ", a cache of the whole context" } else { "" };
            format!("RetroAttention, {mode}{cache}")
        }
        Action::Kept { why } => format!("kept: {why}"),
        Action::Convertible => "can be converted".to_owned(),
    };
    [attention, heads, size, mask, becomes]
}

/// 0, 1, 2, 5 -> 0-2,5
pub fn ranges(numbers: &[usize]) -> String {
    let mut runs: Vec<[usize; 2]> = Vec::new();
    for n in numbers.iter().copied() {
        match runs.last_mut() {
            Some([_, last]) if *last + 1 == n => *last = n,
            _ => runs.push([n, n]),
        }
    }
    let run = |[first, last]: &[usize; 2]| match last - first {
        0 => first.to_string(),
        _ => format!("{first}-{last}"),
    };
    runs.iter().map(run).collect::<Vec<_>>().join(",")
}

/// Names that are the same but for their first number, and all else that is said of them the same: one line each, in the order of the
/// first of them.
pub fn alike(values: &[(String, String)]) -> Vec<(String, String)> {
    let mut groups: Vec<([&str; 3], Vec<usize>)> = Vec::new();
    let mut lines = Vec::new();
    for (name, what) in values {
        let start = name.find(|c: char| c.is_ascii_digit());
        let end = start.map(|from| {
            let rest = name.get(from..).unwrap_or_default();
            from + rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len())
        });
        let parts = start.zip(end).and_then(|(from, to)| {
            let number = name.get(from..to)?.parse().ok()?;
            Some(([name.get(..from)?, name.get(to..)?, what.as_str()], number))
        });
        match parts {
            None => lines.push(Err((name.clone(), what.clone()))),
            Some((key, number)) => match groups.iter_mut().find(|(known, _)| *known == key) {
                Some((_, numbers)) => numbers.push(number),
                None => {
                    lines.push(Ok(groups.len()));
                    groups.push((key, vec![number]));
                }
            },
        }
    }
    let line = |line: Result<usize, (String, String)>| match line {
        Err(alone) => Some(alone),
        Ok(group) => {
            let ([before, after, what], numbers) = groups.get(group)?;
            Some((format!("{before}{}{after}", ranges(numbers)), (*what).to_owned()))
        }
    };
    lines.into_iter().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::FoundReport;

    fn layer(number: usize, mask: &str) -> LayerReport {
        LayerReport {
            layer: number,
            node: format!("node {number}"),
            op_type: "GroupQueryAttention".into(),
            rule: Some("gqa"),
            action: Action::Convertible,
            found: Some(FoundReport {
                heads: 32,
                kv_heads: 8,
                head_size: Some(128),
                data_type: "float16",
                inputs: "packed",
                rope: String::new(),
                mask: mask.into(),
                scale: 0.0,
                softcap: 0.0,
                head_sink: false,
                sliding_cache: false,
                past: [format!("past.{number}.key"), format!("past.{number}.value")],
            }),
        }
    }

    #[test]
    fn layers_that_are_alike_share_a_line() {
        let all: Vec<_> = (0..30)
            .map(|n| {
                layer(
                    n,
                    if n == 12 {
                        "causal, sliding window of 512"
                    } else {
                        "causal"
                    },
                )
            })
            .collect();
        let text = layers(&all);
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|l| l.split("  ").filter(|c| !c.is_empty()).collect())
            .collect();
        assert_eq!(lines.len(), 3, "{text}");
        let becomes = "can be converted";
        assert_eq!(lines[1][0], "0-11,13-29");
        assert_eq!(
            lines[2].iter().map(|c| c.trim()).collect::<Vec<_>>(),
            [
                "12",
                "GroupQueryAttention (gqa)",
                "32/8",
                "128 float16",
                "causal, sliding window of 512",
                becomes
            ]
        );
        assert!(layers(&[]).is_empty());
    }

    #[test]
    fn values_that_differ_by_a_number_share_a_line() {
        let value = |name: &str, what: &str| (name.to_owned(), what.to_owned());
        let all = [
            value("input_ids", "int64"),
            value("past.0.key", "f [2]"),
            value("past.0.value", "f [2]"),
            value("past.1.key", "f [2]"),
            value("past.1.value", "f [2]"),
            value("past.2.key", "f [3]"),
            value("past.4.key", "f [2]"),
        ];
        let lines = alike(&all);
        let names: Vec<&str> = lines.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["input_ids", "past.0-1,4.key", "past.0-1.value", "past.2.key"]);
    }
}
