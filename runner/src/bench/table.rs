//! Result tables as Markdown, JSON or CSV.

use clap::ValueEnum;
use serde_json::{Map, Value};

use crate::tables::{Alignment, Result, csv, markdown};

/// Output format of a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Markdown.
    #[default]
    Md,
    /// One JSON object.
    Json,
    /// Comma-separated values.
    Csv,
}

/// A cell: a value for JSON and CSV, a text for Markdown.
#[derive(Clone, Debug)]
pub struct Cell {
    value: Value,
    text: String,
}

impl Cell {
    /// A text cell.
    pub fn text(text: impl Into<String>) -> Self {
        let text = text.into();
        Self {
            value: text.clone().into(),
            text,
        }
    }

    /// A number, with so many decimals in Markdown.
    pub fn number(value: f64, decimals: usize) -> Self {
        Self {
            value: value.into(),
            text: format!("{value:.decimals$}"),
        }
    }

    /// A count.
    pub fn count(value: usize) -> Self {
        Self {
            value: value.into(),
            text: value.to_string(),
        }
    }

    /// An optional number.
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

/// A column. Mean and deviation are two columns in JSON and CSV, and one in Markdown: the deviation's heading is empty.
#[derive(Clone, Copy, Debug)]
pub struct Column {
    /// Key in JSON and CSV.
    pub key: &'static str,
    /// Heading in Markdown; empty where the column joins the one before it.
    pub heading: &'static str,
}

/// A table of rows that all have the same columns.
#[derive(Debug)]
pub struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<Cell>>,
}

impl Table {
    /// A table without rows.
    pub fn new(columns: &[Column]) -> Self {
        Self {
            columns: columns.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Adds a row of one cell per column.
    pub fn push(&mut self, row: Vec<Cell>) {
        debug_assert_eq!(row.len(), self.columns.len());
        self.rows.push(row);
    }

    /// The table as text; `facts`: JSON values beside the rows.
    ///
    /// # Errors
    /// When rows differ in length.
    pub fn print(&self, format: Format, facts: &[(&str, Value)]) -> Result<String> {
        match format {
            Format::Md => Ok(markdown(&self.readable(), Alignment::Right)),
            Format::Json => Ok(self.json(facts)),
            Format::Csv => csv(&self.plain()),
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

    /// Keys and values, for CSV.
    fn plain(&self) -> Vec<Vec<String>> {
        let text = |v: &Value| match v {
            Value::String(s) => s.clone(),
            Value::Null => String::new(),
            other => other.to_string(),
        };
        let header = self.columns.iter().map(|c| c.key.to_owned()).collect();
        let rows = self.rows.iter().map(|row| row.iter().map(|c| text(&c.value)).collect());
        std::iter::once(header).chain(rows).collect()
    }

    /// Headings and texts, for Markdown; a deviation joins the cell before it.
    fn readable(&self) -> Vec<Vec<String>> {
        let headings = self.columns.iter().map(|c| c.heading);
        let header = headings.filter(|h| !h.is_empty()).map(str::to_owned).collect();
        let rows = self.rows.iter().map(|row| {
            let mut cells: Vec<String> = Vec::new();
            for (column, cell) in self.columns.iter().zip(row) {
                match cells.last_mut().filter(|_| column.heading.is_empty()) {
                    None => cells.push(cell.text.clone()),
                    Some(_) if cell.text.is_empty() => {}
                    Some(last) => *last += &format!(" ± {}", cell.text),
                }
            }
            cells
        });
        std::iter::once(header).chain(rows).collect()
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
            t.print(Format::Md, &[]).unwrap(),
            "|   what |        ms |\n|-------:|----------:|\n| a, \"b\" | 1.2 ± 0.5 |\n|      c |           |\n"
        );
        assert_eq!(
            t.print(Format::Csv, &[]).unwrap(),
            "what,ms,ms_deviation\n\"a, \"\"b\"\"\",1.25,0.5\nc,,\n"
        );
        let json: Value = serde_json::from_str(&t.print(Format::Json, &[("threads", 2.into())]).unwrap()).unwrap();
        assert_eq!(json["threads"], 2);
        assert_eq!(json["rows"][0]["ms"], 1.25);
        assert!(json["rows"][1]["ms"].is_null());
        assert_eq!(Format::from_str("md", false), Ok(Format::Md));
        assert!(Format::from_str("xml", false).is_err());
    }
}
