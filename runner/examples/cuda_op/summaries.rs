//! The selector's state for a context: random, or computed from the cache by a prefill.

use anyhow::{Result, ensure};
use ort::session::Session;
use retro_contract::{Mode, Selector};
use retro_run::bench::selector_state::StatePattern;

use crate::{
    args::Summaries,
    common::fill,
    graph::{Feeding, NodeKind},
    group::Group,
    host::Host,
    steps::PREFILL_CHUNK,
};

/// How the state of each selector is made.
pub struct Filling(Vec<(Selector, Source)>);

enum Source {
    /// By a prefill of the caches' own tokens.
    Prefill(NodeKind, Session),
    /// From a pattern that a prefill of other tokens has left.
    Pattern(StatePattern),
}

impl Filling {
    pub fn new(host: &Host<'_>) -> Result<Self> {
        let args = host.args;
        let mut sources: Vec<(Selector, Source)> = Vec::new();
        if args.prompt() {
            return Ok(Self(sources));
        }
        for selection in &args.select {
            let selector = selection.selector;
            if sources.iter().any(|(s, _)| *s == selector) {
                continue;
            }
            let source = match args.summaries {
                Summaries::Random => Source::Pattern(host.state_pattern(selector)?),
                Summaries::Prefill => {
                    let kind = NodeKind::Retro {
                        mode: Mode::Retro,
                        selection: *selection,
                        window: args.widest_window(),
                    };
                    Source::Prefill(kind, host.session(kind, Feeding::Direct, args.layers, false)?)
                }
            };
            sources.push((selector, source));
        }
        Ok(Self(sources))
    }

    pub fn fill(&self, group: &Group<'_>, selector: Selector) -> Result<()> {
        match self.0.iter().find(|(s, _)| *s == selector) {
            Some((_, Source::Prefill(kind, session))) => prefill(group, *kind, session),
            Some((_, Source::Pattern(pattern))) => {
                for state in &group.layout.state {
                    fill::tile(group.buffer, state[0], state[1] - state[0], pattern.bytes())?;
                }
                Ok(())
            }
            None => Ok(()),
        }
    }
}

/// Prefills random tokens in chunks, so that summaries match the cache.
fn prefill(group: &Group<'_>, kind: NodeKind, session: &Session) -> Result<()> {
    let (s, layout) = (&group.host.shape, &group.layout);
    ensure!(layout.batch == 1, "--summaries prefill: for --batch 1");
    let mut done = 0;
    while done < layout.context {
        let count = PREFILL_CHUNK.min(layout.context - done);
        done += count;
        group.set_lengths(done as i32 - 1)?;
        group.set_budget(0)?;
        let (bindings, _own) = group.bind(session, kind, Feeding::Direct, count, done)?;
        bindings.run(session, None)?;
        // The next chunk has other tokens.
        let bytes = layout.batch * PREFILL_CHUNK * s.packed() * fill::bytes_of(s.dtype);
        let from = layout.caches[done / PREFILL_CHUNK % s.layers][1];
        if bytes <= layout.caches[0][1] {
            group.buffer.copy(layout.bank, from, bytes)?;
        }
    }
    Ok(())
}
