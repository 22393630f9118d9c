//! The result table as Markdown, JSON or CSV.

use anyhow::Result;
use retro_run::{
    bench::table::Format,
    tables::{Alignment, csv, markdown},
};
use serde_json::{Value, json};

/// One row.
#[derive(Clone, Debug)]
pub struct Row {
    pub what: String,
    pub context: usize,
    pub batch: usize,
    /// Tokens fed.
    pub tokens: usize,
    pub budget: String,
    pub selector: String,
    pub graph: bool,
    /// Microseconds per layer: median, minimum, maximum.
    pub micros: [f64; 3],
    /// Bytes of keys, values and summaries that a layer must read.
    pub bytes: f64,
    /// Fraction of the bandwidth of a copy.
    pub share: f64,
    /// Speedup over GroupQueryAttention with one token (for prefills: with the same tokens).
    pub speedup: Option<f64>,
}

const TITLES: [&str; 12] = [
    "context",
    "batch",
    "node",
    "tokens",
    "budget",
    "selector",
    "graph",
    "us/layer",
    "min..max",
    "MB/layer",
    "bandwidth",
    "faster than GQA",
];

impl Row {
    fn cells(&self) -> [String; 12] {
        [
            self.context.to_string(),
            self.batch.to_string(),
            self.what.clone(),
            self.tokens.to_string(),
            self.budget.clone(),
            self.selector.clone(),
            if self.graph { "yes" } else { "no" }.to_owned(),
            format!("{:.1}", self.micros[0]),
            format!("{:.1}..{:.1}", self.micros[1], self.micros[2]),
            format!("{:.1}", self.bytes / 1e6),
            format!("{:.0} %", 100.0 * self.share),
            self.speedup.map_or_else(|| "-".to_owned(), |s| format!("{s:.2}")),
        ]
    }

    fn json(&self) -> Value {
        json!({
            "context": self.context, "batch": self.batch, "node": self.what, "tokens": self.tokens, "budget": self.budget,
            "selector": self.selector, "cuda_graph": self.graph, "microseconds_per_layer": self.micros[0],
            "least": self.micros[1], "most": self.micros[2], "bytes_per_layer": self.bytes, "share_of_copy_bandwidth": self.share,
            "times_faster_than_gqa": self.speedup,
        })
    }
}

/// The table as text; `about`: device and sizes.
pub fn print(rows: &[Row], format: Format, about: &Value) -> Result<String> {
    let titles = TITLES.map(str::to_owned).to_vec();
    let lines: Vec<Vec<String>> = std::iter::once(titles)
        .chain(rows.iter().map(|row| row.cells().to_vec()))
        .collect();
    match format {
        Format::Md => {
            let title = about["text"].as_str().unwrap_or_default();
            Ok(format!("{title}\n\n{}", markdown(&lines, Alignment::Left)))
        }
        Format::Csv => Ok(csv(&lines)?),
        Format::Json => {
            let rows: Vec<Value> = rows.iter().map(Row::json).collect();
            Ok(json!({ "about": about, "rows": rows }).to_string() + "\n")
        }
    }
}
