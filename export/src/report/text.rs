//! The report as text.

use super::{PackedProductsReport, Report};
use crate::table;
use retro_contract::Selector;
use std::fmt;

impl fmt::Display for PackedProductsReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if self.replaced > 0 {
            parts.push(format!("{} MatMulNBits become ai.retro::MatMulNBits", self.replaced));
        }
        let kept = |k: &super::KeptProducts| format!("{} MatMulNBits stay: {}", k.count, k.why);
        parts.extend(self.kept.iter().map(kept));
        f.write_str(&parts.join("; "))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (m, s) = (&self.model, &self.settings);
        writeln!(f, "model    {}", self.source.display())?;
        writeln!(f, "         by {m}")?;
        let plural = |n: usize| if n == 1 { "" } else { "s" };
        let parameters = match s.selector {
            Selector::Moments => format!(" (lambda {})", s.selector_lambda),
            Selector::SignedMoments => format!(
                " (lambda {}, correlation {})",
                s.selector_lambda, s.selector_correlation
            ),
            Selector::Sketch => format!(" ({} bit{})", s.sketch_bits, plural(s.sketch_bits)),
            // Without parameters.
            _ => String::new(),
        };
        writeln!(
            f,
            "settings window {}, budget {} (at least {} page{}), pages of {} tokens, {} sink page{}, selector {}{parameters}, \
             group score {}",
            s.window,
            s.budget,
            s.min_pages,
            plural(s.min_pages),
            s.page_size,
            s.sink_pages,
            plural(s.sink_pages),
            s.selector,
            s.group_score
        )?;
        if let Some(why) = &self.window_why {
            writeln!(f, "window   {}: {why}", s.window)?;
        }
        if s.window_in_graph {
            writeln!(f, "window   in the graph: a host feeds each token once")?;
        }
        if let (Some(host), Some(context)) = (s.host, s.context) {
            writeln!(f, "host     {host}, for up to {context} tokens of prompt and output")?;
        }
        if let Some(merged) = &self.merged {
            writeln!(f, "merged   {merged}")?;
        }
        f.write_str(&table::layers(&self.layers))?;
        if let Some(share) = &self.state_share {
            writeln!(f, "state    {share}")?;
        }
        if let Some(products) = &self.packed_products {
            writeln!(f, "products {products}")?;
        }
        writeln!(f, "logits   {}", self.logits.detail)?;
        for e in &self.external_data {
            writeln!(f, "weights  {} {}, {} bytes", e.location.display(), e.how, e.bytes)?;
        }
        for file in &self.files {
            writeln!(f, "file     {}", file.display())?;
        }
        for skipped in &self.skipped {
            writeln!(f, "skipped  {skipped}")?;
        }
        if let Some(verification) = &self.verification {
            write!(f, "{verification}")?;
        }
        if let Some(why) = &self.unverified {
            writeln!(f, "verify   NOT VERIFIED: {why}")?;
        }
        let total = self.layers.len();
        let share = format!(
            "{} of {total} attention layer{} converted",
            self.converted_layers,
            plural(total)
        );
        match (&self.target, self.bytes) {
            (Some(target), Some(bytes)) => writeln!(f, "wrote    {} ({bytes} bytes): {share}", target.display())?,
            _ => writeln!(f, "dry run  nothing is written; {share} otherwise")?,
        }
        match &self.graph {
            Some(graph) => writeln!(
                f,
                "graph    the folder has others too: run it with --graph {}",
                graph.display()
            ),
            None => Ok(()),
        }
    }
}
