//! The variants that are compared, and the order in which they run.

use anyhow::{Context, Result, ensure};
use retro_contract::{Budget, Mode, Selector};

use crate::{
    args::{Args, When},
    common::dtype::Dtype,
    entry::{Entry, Variant},
    graph::{Feeding, NodeKind},
    group::Group,
    host::Host,
    rows,
    summaries::Filling,
    table::Row,
    timing,
};

/// The sessions of all variants, and what fills their caches.
pub struct Measurement<'a> {
    host: &'a Host<'a>,
    variants: Vec<Variant>,
    filling: Filling,
    graphs_used: usize,
}

impl<'a> Measurement<'a> {
    pub fn new(host: &'a Host<'a>) -> Result<Self> {
        let args = host.args;
        let feeding = args.feeding();
        let mut kinds = Vec::new();
        // GroupQueryAttention has no float32 on CUDA.
        if args.dtype != Dtype::F32 || host.gpu().is_none() {
            kinds.push(NodeKind::Gqa);
        }
        for &mode in &args.mode {
            for &selection in &args.select {
                if mode == Mode::Retro || selection == args.select[0] {
                    kinds.extend(args.window.iter().map(|&window| NodeKind::Retro {
                        mode,
                        selection,
                        window,
                    }));
                }
            }
        }
        let graphs: &[bool] = match args.cuda_graph {
            _ if feeding == Feeding::Direct => &[false],
            When::Off => &[false],
            When::On => &[true],
            When::Both => &[false, true],
        };
        ensure!(
            host.gpu().is_some() || graphs == [false],
            "--cuda-graph: the device is not a GPU"
        );
        let mut variants = Vec::new();
        for &cuda_graph in graphs {
            for &kind in &kinds {
                let session = host
                    .session(kind, feeding, args.layers, cuda_graph)
                    .with_context(|| format!("no session for {kind:?}"))?;
                variants.push(Variant {
                    kind,
                    cuda_graph,
                    session,
                });
            }
        }
        Ok(Self {
            host,
            variants,
            filling: Filling::new(host)?,
            graphs_used: 0,
        })
    }

    pub fn measure(&mut self, group: &Group<'_>, bandwidth: f64) -> Result<Vec<Row>> {
        let args = self.host.args;
        group.refill()?;
        let mut rows = Vec::new();
        let mut selectors: Vec<Selector> = args.select.iter().map(|s| s.selector).collect();
        selectors.dedup();
        // Variants are interleaved. The summaries in memory are of one selector at a time, so each selector is measured
        // in a round of its own, always with GroupQueryAttention.
        for selector in selectors {
            if !args.prompt() {
                self.filling.fill(group, selector)?;
            }
            let mut entries = Vec::new();
            for variant in &self.variants {
                if matches!(variant.kind, NodeKind::Retro { selection, .. } if selection.selector != selector) {
                    continue;
                }
                for (tokens, budget) in lines(args, variant.kind, group) {
                    self.graphs_used += usize::from(variant.cuda_graph);
                    entries.push(Entry::new(group, variant, tokens, budget, self.graphs_used)?);
                }
            }
            for _ in 0..args.repetitions {
                for entry in &mut entries {
                    let micros = timing::time(group, entry)?;
                    entry.micros.push(micros);
                }
            }
            rows.extend(rows::of_entries(group, &entries, bandwidth));
        }
        if args.overhead && !args.prompt() {
            rows.push(rows::of_overhead(group, &timing::overhead(group)?));
        }
        Ok(rows)
    }
}

/// The rows of a kind: tokens fed and budget.
fn lines(args: &Args, kind: NodeKind, group: &Group<'_>) -> Vec<(usize, Option<Budget>)> {
    match kind {
        _ if args.prompt() => vec![(group.layout.context, None)],
        // ONNX Runtime's node takes several tokens after a past for batch 1 only.
        NodeKind::Gqa => args
            .gqa_tokens
            .iter()
            .filter(|&&t| t == 1 || group.layout.batch == 1)
            .map(|&t| (t, None))
            .collect(),
        NodeKind::Retro {
            mode: Mode::Dense,
            window,
            ..
        } => vec![(window, None)],
        NodeKind::Retro { window, .. } => args.budget.iter().map(|&b| (window, Some(b))).collect(),
    }
}
