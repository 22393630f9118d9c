//! The selector's state for a context: random, or computed from the cache by a prefill.

use anyhow::{Result, ensure};
use ort::session::Session;
use retro_contract::{Mode, Selector};

use crate::{
    args::Summaries,
    fill,
    graph::{Feeding, NodeKind},
    group::Group,
    host::Host,
    steps::PREFILL_CHUNK,
};

/// The sessions that compute summaries: none where they are random.
pub struct Filling(Vec<(Selector, NodeKind, Session)>);

impl Filling {
    pub fn new(host: &Host<'_>) -> Result<Self> {
        let args = host.args;
        let mut sessions: Vec<(Selector, NodeKind, Session)> = Vec::new();
        if args.summaries == Summaries::Prefill && !args.prompt() {
            for selection in &args.select {
                if sessions.iter().all(|(s, ..)| *s != selection.selector) {
                    let kind = NodeKind::Retro {
                        mode: Mode::Retro,
                        selection: *selection,
                        window: args.widest_window(),
                    };
                    let session = host.session(kind, Feeding::Direct, args.layers, false)?;
                    sessions.push((selection.selector, kind, session));
                }
            }
        }
        Ok(Self(sessions))
    }

    pub fn fill(&self, group: &Group<'_>, selector: Selector) -> Result<()> {
        if let Some((_, kind, session)) = self.0.iter().find(|(s, ..)| *s == selector) {
            return prefill(group, *kind, session);
        }
        let (s, element) = (&group.host.shape, group.layout.of(selector).element);
        for state in &group.layout.state {
            fill::state(group.buffer, state[0], state[1] - state[0], s.dtype, element)?;
        }
        Ok(())
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
