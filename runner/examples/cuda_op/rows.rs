//! Rows of the table from timings.

use retro_contract::Mode;

use crate::{common::fill, entry::Entry, graph::NodeKind, group::Group, table::Row};

/// Median, minimum, maximum.
fn spread(numbers: &[f64]) -> [f64; 3] {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    [sorted[sorted.len() / 2], sorted[0], sorted[sorted.len() - 1]]
}

pub fn of_entries(group: &Group<'_>, entries: &[Entry<'_>], bandwidth: f64) -> Vec<Row> {
    let prompt = group.host.args.prompt();
    let row = |entry: &Entry<'_>| {
        let reference = entries.iter().find(|e| {
            e.variant.kind == NodeKind::Gqa
                && e.variant.cuda_graph == entry.variant.cuda_graph
                && (prompt || e.tokens == 1)
        });
        let (what, selector) = names(entry.variant.kind, prompt);
        let (micros, bytes) = (spread(&entry.micros), bytes(group, entry));
        Row {
            what,
            context: group.layout.context,
            batch: group.layout.batch,
            tokens: entry.tokens,
            budget: entry.budget.map_or_else(|| "-".to_owned(), |b| b.to_string()),
            selector,
            graph: entry.variant.cuda_graph,
            micros,
            bytes,
            share: bytes / (micros[0] * 1e-6) / bandwidth,
            speedup: reference.map(|r| spread(&r.micros)[0] / micros[0]),
        }
    };
    entries.iter().map(row).collect()
}

pub fn of_overhead(group: &Group<'_>, micros: &[f64]) -> Row {
    Row {
        what: "no attention".to_owned(),
        context: group.layout.context,
        batch: group.layout.batch,
        tokens: 1,
        budget: "-".to_owned(),
        selector: "-".to_owned(),
        graph: false,
        micros: spread(micros),
        bytes: 0.0,
        share: 0.0,
        speedup: None,
    }
}

/// Bytes of keys, values and selector state that a layer must read.
fn bytes(group: &Group<'_>, entry: &Entry<'_>) -> f64 {
    let (s, context) = (&group.host.shape, group.layout.context);
    let loaded = || group.pages_of(entry.budget) * s.page;
    let element = fill::bytes_of(s.dtype);
    let (loaded, state) = match entry.variant.kind {
        NodeKind::Retro {
            mode: Mode::Retro,
            selection,
            ..
        } => (loaded(), group.layout.read(selection.selector, element)),
        NodeKind::Retro {
            mode: Mode::Streaming | Mode::Periodic,
            ..
        } => (loaded(), 0),
        _ => (context, 0),
    };
    let state = if group.host.args.prompt() { 0 } else { state };
    let heads = group.layout.batch * s.kv_heads;
    (heads * (2 * loaded.min(context) * s.size * element + state)) as f64
}

/// Names of the node and of its page selection.
fn names(kind: NodeKind, prompt: bool) -> (String, String) {
    match kind {
        NodeKind::Gqa => ("GQA".to_owned(), "-".to_owned()),
        NodeKind::Retro { mode, selection, .. } => (
            if prompt {
                "RetroAttention".to_owned()
            } else {
                mode.to_string()
            },
            if mode == Mode::Retro {
                selection.to_string()
            } else {
                "-".to_owned()
            },
        ),
    }
}
