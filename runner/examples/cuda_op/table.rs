//! What was measured, as Markdown, JSON or CSV.

use serde_json::{Value, json};

/// One line.
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
    /// Microseconds a layer: median, least, most.
    pub micros: [f64; 3],
    /// Bytes of keys, values and summaries that a layer must read.
    pub bytes: f64,
    /// Of the bandwidth of a copy.
    pub share: f64,
    /// How many times faster than GroupQueryAttention with one token (a prompt: with the same tokens).
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

pub fn markdown(rows: &[Row]) -> String {
    let lines: Vec<[String; 12]> = std::iter::once(TITLES.map(str::to_owned))
        .chain(rows.iter().map(Row::cells))
        .collect();
    let widths: Vec<usize> = (0..12)
        .map(|c| lines.iter().map(|l| l[c].chars().count()).max().unwrap_or(0))
        .collect();
    let mut out = String::new();
    for (i, line) in lines.iter().enumerate() {
        for (cell, width) in line.iter().zip(&widths) {
            out += &format!("| {cell}{} ", " ".repeat(width - cell.chars().count()));
        }
        out += "|\n";
        if i == 0 {
            widths.iter().for_each(|w| out += &format!("|{}", "-".repeat(w + 2)));
            out += "|\n";
        }
    }
    out
}

pub fn csv(rows: &[Row]) -> String {
    let mut out = TITLES.join(",") + "\n";
    for row in rows {
        out += &(row.cells().join(",") + "\n");
    }
    out
}

pub fn json(rows: &[Row], about: &Value) -> String {
    json!({ "about": about, "rows": rows.iter().map(Row::json).collect::<Vec<_>>() }).to_string() + "\n"
}
