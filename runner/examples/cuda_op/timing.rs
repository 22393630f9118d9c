//! Timing of runs.

use anyhow::{Result, ensure};
use retro_contract::Budget;

use crate::{
    entry::Entry,
    graph::{Feeding, NodeKind},
    group::Group,
    host::Host,
    steps::WARM_UP,
};

/// Microseconds per layer and run, after `warm_up` untimed runs.
fn micros(host: &Host<'_>, warm_up: usize, runs: usize, run: impl Fn() -> Result<()>) -> Result<f64> {
    let seconds = host.sessions.seconds(warm_up, runs, run)?;
    Ok(1e6 * seconds / host.shape.layers as f64)
}

/// Microseconds per layer and run of an entry.
pub fn time(group: &Group<'_>, entry: &Entry<'_>) -> Result<f64> {
    let (host, layout) = (group.host, &group.layout);
    let prompt = host.args.prompt();
    // The first step is at position context - 1; a prompt fills the cache up to there.
    let before = if prompt { layout.context - 1 } else { layout.context - 2 } as i32;
    // A budget of 1.0 must cover the pages of later steps, too.
    let everything = entry.budget == Some(Budget::Ratio(1.0));
    let pages = if everything {
        i32::MAX
    } else {
        group.pages_of(entry.budget) as i32
    };
    group.set_budget(pages)?;
    group.set_lengths(before)?;
    for state in &layout.state {
        // No page was loaded recently: the retrospective tokens have the most pages to catch up with.
        group.buffer.fill(state[1], state[2] - state[1], 0)?;
    }
    let (warm_up, runs) = if prompt { (1, 1) } else { (WARM_UP, host.args.runs) };
    let micros = micros(host, warm_up, runs, || {
        Ok(entry.bindings.run(&entry.variant.session, Some(&entry.options))?)
    })?;
    if !prompt {
        // The counter must have moved with every run, else nothing was measured.
        let mut bytes = [0; 4];
        group.buffer.read(layout.lengths, &mut bytes)?;
        let expected = before + (warm_up + runs) as i32;
        let got = i32::from_le_bytes(bytes);
        ensure!(
            got == expected || (entry.variant.cuda_graph && got > before + runs as i32),
            "{:?}: after {} runs the counter is {got}, expected {expected}",
            entry.variant.kind,
            warm_up + runs
        );
    }
    Ok(micros)
}

/// Microseconds of the counter and the picking of rows alone, divided by the number of layers.
pub fn overhead(group: &Group<'_>) -> Result<Vec<f64>> {
    let (host, args) = (group.host, group.host.args);
    let session = host.session(NodeKind::Gqa, Feeding::Steps, 0, false)?;
    let (bindings, _own) = group.bind_overhead(&session)?;
    group.set_lengths(0)?;
    let options = host.run_options(None)?;
    (0..args.repetitions)
        .map(|_| micros(host, 1, args.runs, || Ok(bindings.run(&session, Some(&options))?)))
        .collect()
}
