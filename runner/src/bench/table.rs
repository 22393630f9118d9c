//! Tables as Markdown, JSON or CSV.

use std::{fmt::Write as _, str::FromStr};

use serde_json::{Map, Value};

/// How a table is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    #[default]
    Md,
    Json,
    Csv,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "md" => Ok(Self::Md),
            "json" => Ok(Self::Json),
            "csv" => Ok(Self::Csv),
            _ => Err(format!("{s:?} is none of md, json, csv")),
        }
    }
}

/// One cell: the value for programs, and the text for people.
#[derive(Clone, Debug)]
pub struct Cell {
    value: Value,
    text: String,
}

impl Cell {
    pub fn text(text: impl Into<String>) -> Self {
        let text = text.into();
        Self {
            value: text.clone().into(),
            text,
        }
    }

    /// A number with so many decimals for people.
    pub fn number(value: f64, decimals: usize) -> Self {
        Self {
            value: value.into(),
            text: format!("{value:.decimals$}"),
        }
    }

    pub fn count(value: usize) -> Self {
        Self {
            value: value.into(),
            text: value.to_string(),
        }
    }

    /// A number if there is one.
    pub fn maybe(value: Option<f64>, decimals: usize) -> Self {
        value.map_or_else(
            || Self {
                value: Value::Null,
                text: String::new(),
            },
            |v| Self::number(v, decimals),
        )
    }
}

/// A column: its name for programs and its heading for people. Mean and deviation are two columns for programs and one for
/// people: the second of them has no heading.
#[derive(Clone, Copy, Debug)]
pub struct Column {
    pub key: &'static str,
    pub heading: &'static str,
}

/// A table of rows that all have the same columns.
#[derive(Debug)]
pub struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<Cell>>,
}

impl Table {
    pub fn new(columns: &[Column]) -> Self {
        Self {
            columns: columns.to_vec(),
            rows: Vec::new(),
        }
    }

    pub fn push(&mut self, row: Vec<Cell>) {
        debug_assert_eq!(row.len(), self.columns.len());
        self.rows.push(row);
    }

    /// The whole text; `facts` are what holds for all rows.
    pub fn print(&self, format: Format, facts: &[(&str, Value)]) -> String {
        match format {
            Format::Md => self.markdown(),
            Format::Json => self.json(facts),
            Format::Csv => self.csv(),
        }
    }

    fn json(&self, facts: &[(&str, Value)]) -> String {
        let row = |cells: &Vec<Cell>| {
            let pairs = self.columns.iter().zip(cells);
            Value::Object(pairs.map(|(c, cell)| (c.key.to_owned(), cell.value.clone())).collect())
        };
        let mut all: Map<String, Value> = facts.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect();
        all.insert("rows".to_owned(), self.rows.iter().map(row).collect());
        format!("{}\n", Value::Object(all))
    }

    fn csv(&self) -> String {
        let quoted = |v: &Value| match v {
            Value::String(s) if s.contains(['"', ',', '\n']) => format!("\"{}\"", s.replace('"', "\"\"")),
            Value::String(s) => s.clone(),
            Value::Null => String::new(),
            other => other.to_string(),
        };
        let keys: Vec<&str> = self.columns.iter().map(|c| c.key).collect();
        let mut out = format!("{}\n", keys.join(","));
        for row in &self.rows {
            let cells: Vec<String> = row.iter().map(|c| quoted(&c.value)).collect();
            let _ = writeln!(out, "{}", cells.join(","));
        }
        out
    }

    /// With columns wide enough to be read as they are; a deviation joins the cell before it.
    fn markdown(&self) -> String {
        let mut lines: Vec<Vec<String>> = vec![Vec::new(); self.rows.len() + 1];
        for (i, column) in self.columns.iter().enumerate() {
            let texts = self.rows.iter().map(|r| r.get(i).map_or("", |c| c.text.as_str()));
            if column.heading.is_empty() {
                for (line, text) in lines.iter_mut().skip(1).zip(texts) {
                    if let Some(last) = line.last_mut().filter(|_| !text.is_empty()) {
                        let _ = write!(last, " ± {text}");
                    }
                }
            } else {
                let all = std::iter::once(column.heading).chain(texts);
                lines
                    .iter_mut()
                    .zip(all)
                    .for_each(|(line, text)| line.push(text.to_owned()));
            }
        }
        let width = |i: usize| {
            lines
                .iter()
                .filter_map(|l| l.get(i))
                .map(|t| t.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..lines.first().map_or(0, Vec::len)).map(width).collect();
        let mut out = String::new();
        for (n, line) in lines.iter().enumerate() {
            let cells: Vec<String> = line.iter().zip(&widths).map(|(t, w)| format!("{t:>w$}")).collect();
            let _ = writeln!(out, "| {} |", cells.join(" | "));
            if n == 0 {
                let rules: Vec<String> = widths
                    .iter()
                    .map(|&w| format!("{}:", "-".repeat(w.max(2) - 1)))
                    .collect();
                let _ = writeln!(out, "| {} |", rules.join(" | "));
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let column = |key, heading| Column { key, heading };
        let mut t = Table::new(&[column("what", "what"), column("ms", "ms"), column("ms_deviation", "")]);
        t.push(vec![
            Cell::text("a, \"b\""),
            Cell::number(1.25, 1),
            Cell::number(0.5, 1),
        ]);
        t.push(vec![Cell::text("c"), Cell::maybe(None, 1), Cell::maybe(None, 1)]);
        t
    }

    #[test]
    fn three_formats() {
        let t = table();
        assert_eq!(
            t.print(Format::Md, &[]),
            "|   what |        ms |\n| -----: | --------: |\n| a, \"b\" | 1.2 ± 0.5 |\n|      c |           |\n"
        );
        assert_eq!(
            t.print(Format::Csv, &[]),
            "what,ms,ms_deviation\n\"a, \"\"b\"\"\",1.25,0.5\nc,,\n"
        );
        let json: Value = serde_json::from_str(&t.print(Format::Json, &[("threads", 2.into())])).unwrap();
        assert_eq!(json["threads"], 2);
        assert_eq!(json["rows"][0]["ms"], 1.25);
        assert!(json["rows"][1]["ms"].is_null());
        assert_eq!("md".parse(), Ok(Format::Md));
        assert!("xml".parse::<Format>().is_err());
    }
}
