//! The result table as Markdown or JSON.

use anyhow::Result;
use retro_run::tables::{Alignment, markdown};
use serde_json::{Value, json};

use crate::args::{Args, Operator, WeightShape};

/// One operator with weights of one shape.
pub struct Row {
    pub shape: WeightShape,
    /// Nodes of the session.
    pub nodes: usize,
    /// Bytes of a node's weights.
    pub bytes: usize,
    pub operator: Operator,
    /// By rows of A: microseconds of a product, median, minimum, maximum.
    pub micros: Vec<(usize, [f64; 3])>,
}

/// What was measured, as a line.
pub fn about(args: &Args, device: &str, bandwidth: f64) -> String {
    let threads = args.threads.map_or_else(String::new, |n| format!(", {n} threads"));
    format!(
        "{device}{threads}; MatMulNBits, {} bits, blocks of {}, {:?}, zero points: {:?}, accuracy_level {}; \
         a copy moves {:.0} GB/s (read and written)",
        args.bits,
        args.block,
        args.dtype(),
        args.zero_points,
        args.accuracy_level,
        bandwidth / 1e9
    )
}

/// The figure of median, minimum and maximum that the table has.
fn reported(args: &Args, micros: &[f64; 3]) -> f64 {
    micros[usize::from(args.best)]
}

/// What other products are compared with: com.microsoft's of one row, or else the operator's own of the fewest rows.
fn reference(args: &Args, rows: &[Row], row: &Row) -> Option<f64> {
    let same = rows
        .iter()
        .find(|r| r.shape == row.shape && r.operator == Operator::Ort);
    let fewest = same.unwrap_or(row).micros.iter().min_by_key(|(rows, _)| *rows);
    fewest.map(|(_, micros)| reported(args, micros))
}

pub fn print(args: &Args, rows: &[Row], about: &str, bandwidth: f64) -> Result<String> {
    if args.json {
        let rows: Vec<Value> = rows.iter().flat_map(|row| json_rows(args, rows, row)).collect();
        let all = json!({ "about": about, "copy_bytes_per_second": bandwidth, "rows": rows });
        return Ok(format!("{all}\n"));
    }
    let titles = ["K x N", "MB", "nodes", "operator"].map(str::to_owned);
    let counts = args.rows.iter().map(|rows| format!("{rows} rows, us (ratio)"));
    let mut lines = vec![
        titles
            .into_iter()
            .chain(counts)
            .chain(["GB/s".to_owned()])
            .collect::<Vec<_>>(),
    ];
    for row in rows {
        let reference = reference(args, rows, row);
        let cell = |(_, micros): &(usize, [f64; 3])| {
            let micros = reported(args, micros);
            let ratio = reference.map_or(1.0, |one| micros / one);
            format!("{micros:.1} ({ratio:.2})")
        };
        let mut line = vec![
            row.shape.to_string(),
            format!("{:.1}", row.bytes as f64 / 1e6),
            row.nodes.to_string(),
            row.operator.domain().to_owned(),
        ];
        line.extend(row.micros.iter().map(cell));
        let first = row
            .micros
            .first()
            .map_or(f64::NAN, |(_, micros)| reported(args, micros));
        line.push(format!("{:.0}", row.bytes as f64 / first / 1e3));
        lines.push(line);
    }
    Ok(format!("{about}\n\n{}", markdown(&lines, Alignment::Right)))
}

fn json_rows(args: &Args, rows: &[Row], row: &Row) -> Vec<Value> {
    let reference = reference(args, rows, row);
    let one = |(count, micros): &(usize, [f64; 3])| {
        let [median, least, most] = micros;
        json!({
            "k": row.shape.k, "n": row.shape.n, "nodes": row.nodes, "bytes": row.bytes,
            "operator": row.operator.domain(), "rows": count, "microseconds": median, "least": least, "most": most,
            "ratio": reference.map(|one| reported(args, micros) / one),
        })
    };
    row.micros.iter().map(one).collect()
}
