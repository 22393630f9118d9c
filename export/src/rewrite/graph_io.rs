//! The graph's inputs and outputs: caches with their capacity, and each layer's state, which the graph takes and returns.

use super::Error;
use crate::{
    rules::{AttentionMatch, Conversion},
    settings::Settings,
    verify::graph_facts,
};
use retro_contract::{
    CacheSize, SKETCH_BLOCK, StateElement,
    graph::{
        PAGE_BUDGET, PAST_WINDOW, PAST_WINDOW_EMBEDS, PRESENT_WINDOW, PRESENT_WINDOW_EMBEDS, RETRO_LENGTH, State, past,
        present,
    },
    pages_for, ring_slots,
};
use retro_onnx::{DataType, Dimension, GraphProto, TensorProto, ValueInfoProto, graph::GraphView};
use std::collections::HashMap;

/// Makes sure that the names of the contract are free.
///
/// # Errors
/// One is taken.
pub fn check_names(view: &GraphView, conversions: &[Conversion]) -> Result<(), Error> {
    let layers = conversions.iter().map(|c| c.attention.layer);
    let state = layers.flat_map(|n| State::ALL.into_iter().flat_map(move |s| [past(n, s), present(n, s)]));
    let fixed = [
        RETRO_LENGTH,
        PAGE_BUDGET,
        PAST_WINDOW,
        PRESENT_WINDOW,
        PAST_WINDOW_EMBEDS,
        PRESENT_WINDOW_EMBEDS,
    ];
    let mut names = fixed.map(str::to_owned).into_iter().chain(state);
    match names.find(|name| view.mentions(name)) {
        Some(name) => Err(Error::NameTaken(name)),
        None => Ok(()),
    }
}

/// Declares all that a converted graph takes and returns beside what its source does.
///
/// # Errors
/// A cache has no declared shape.
pub fn declare(
    graph: &mut GraphProto,
    conversions: &[Conversion],
    settings: &Settings,
    opset: i64,
) -> Result<(), Error> {
    declare_sizes(graph, conversions, opset);
    // One number for all, or one a sequence; the defaults have one.
    let retro_length = ValueInfoProto::tensor(RETRO_LENGTH, DataType::Int32, ["retro_lengths".into()]);
    let page_budget = ValueInfoProto::tensor(PAGE_BUDGET, DataType::Int32, ["retro_sequences".into()]);
    graph.input.extend([retro_length, page_budget]);
    for name in [RETRO_LENGTH, PAGE_BUDGET] {
        graph.initializer.push(TensorProto::int32s(name, &[1], &[0]));
    }
    let capacity = conversions
        .iter()
        .filter(|c| !c.matched.sliding_cache)
        .find_map(|c| capacity_of(graph, &c.matched.past_key));
    let capacity = capacity.unwrap_or_else(|| "past_sequence_length".into());
    let mut pages = StateDims::new("retro_pages", settings.page_size);
    let mut blocks = StateDims::new("retro_blocks", SKETCH_BLOCK);
    for conversion in conversions {
        if conversion.matched.sliding_cache {
            grow_capacity(graph, conversion.matched, &capacity);
        }
        let state = state_of(graph, conversion.matched, settings, &mut pages, &mut blocks)?;
        let layer = conversion.attention.layer;
        for (kind, data_type, dims) in state {
            let value = |name: String| ValueInfoProto::tensor(&name, data_type, dims.clone());
            graph.input.push(value(past(layer, kind)));
            graph.output.push(value(present(layer, kind)));
        }
        keep_capacity(graph, conversion.matched);
    }
    Ok(())
}

/// Declares heads and their size where caches leave them open: hosts make their caches by what is declared.
fn declare_sizes(graph: &mut GraphProto, conversions: &[Conversion], opset: i64) {
    let mut sizes: HashMap<String, [Option<i64>; 2]> = HashMap::new();
    let view = GraphView::new(graph, opset);
    for matched in conversions.iter().map(|c| c.matched) {
        let head_size = matched
            .head_size
            .or_else(|| graph_facts::weighed_head_size(&view, matched));
        for name in [
            &matched.past_key,
            &matched.past_value,
            &matched.present_key,
            &matched.present_value,
        ] {
            sizes.insert(name.clone(), [Some(matched.kv_heads), head_size]);
        }
    }
    for value in graph.input.iter_mut().chain(&mut graph.output) {
        let Some(sizes) = sizes.get(value.name()) else { continue };
        for (axis, size) in [1, 3].into_iter().zip(sizes) {
            let dim = value.dims_mut().filter(|d| d.len() == 4).and_then(|d| d.get_mut(axis));
            if let Some((dim, size)) = dim.zip(*size).filter(|(dim, _)| dim.fixed().is_none()) {
                *dim = size.into();
            }
        }
    }
}

/// The dimension P, or the number of blocks of rows, for each kind of capacity: a number for a fixed one, a name of its own for
/// each named one.
struct StateDims {
    stem: &'static str,
    /// Tokens of a page or block.
    tokens: usize,
    named: Vec<String>,
}

impl StateDims {
    fn new(stem: &'static str, tokens: usize) -> Self {
        Self {
            stem,
            tokens,
            named: Vec::new(),
        }
    }

    fn of(&mut self, capacity: &Dimension) -> Dimension {
        if let Some(tokens) = capacity.fixed().and_then(|c| usize::try_from(c).ok()) {
            return (pages_for(tokens, self.tokens) as i64).into();
        }
        let name = capacity.symbol().unwrap_or_default();
        let known = self.named.iter().position(|n| n == name);
        let place = known.unwrap_or_else(|| {
            self.named.push(name.to_owned());
            self.named.len() - 1
        });
        match place {
            0 => self.stem.into(),
            more => format!("{}_{}", self.stem, more + 1).as_str().into(),
        }
    }
}

/// The declared capacity of a cache.
fn capacity_of(graph: &GraphProto, past: &str) -> Option<Dimension> {
    graph.input.iter().find(|i| i.name() == past)?.dims()?.get(2).cloned()
}

/// Declares a sliding-window cache as large as the others: the operator's caches hold the whole context.
fn grow_capacity(graph: &mut GraphProto, matched: &AttentionMatch, capacity: &Dimension) {
    for past in [&matched.past_key, &matched.past_value] {
        let declared = graph
            .input
            .iter_mut()
            .find(|i| i.name() == past)
            .and_then(ValueInfoProto::dims_mut);
        if let Some(tokens) = declared.and_then(|d| d.get_mut(2)) {
            *tokens = capacity.clone();
        }
    }
}

/// Types and dimensions of a layer's state.
fn state_of(
    graph: &GraphProto,
    matched: &AttentionMatch,
    settings: &Settings,
    pages: &mut StateDims,
    blocks: &mut StateDims,
) -> Result<[(State, DataType, Vec<Dimension>); 4], Error> {
    let cache = graph
        .input
        .iter()
        .find(|i| i.name() == matched.past_key)
        .and_then(ValueInfoProto::dims);
    let Some([batch, _, capacity, size]) = cache else {
        return Err(Error::CacheShape(matched.past_key.clone()));
    };
    let plain = |d: &Dimension| Dimension {
        denotation: None,
        ..d.clone()
    };
    let (b, p) = (plain(batch), pages.of(capacity));
    let d = matched.head_size.map_or_else(|| plain(size), Dimension::from);
    let r = Dimension::from(ring_slots(settings.window) as i64);
    let (hq, hkv) = (Dimension::from(matched.q_heads), Dimension::from(matched.kv_heads));
    let (element, of_selector) = match settings.selector.state_element() {
        StateElement::Cache => (matched.data_type, vec![p.clone(), 2.into(), d.clone()]),
        StateElement::Byte => {
            let head_size = d.fixed().and_then(|d| usize::try_from(d).ok());
            let (cache, selector, bits) = (matched.past_key.clone(), settings.selector, settings.sketch_bits);
            let Some(head_size) = head_size else {
                return Err(Error::UnknownHeadSize { cache, selector });
            };
            let multiple = selector.head_size_multiple(bits);
            if !head_size.is_multiple_of(multiple) {
                return Err(Error::HeadSize {
                    cache,
                    head_size,
                    selector,
                    bits,
                    multiple,
                });
            }
            let layout = settings.selector.layout(&CacheSize {
                capacity: SKETCH_BLOCK,
                pages: pages_for(SKETCH_BLOCK, settings.page_size),
                page_size: settings.page_size,
                head_size,
                sketch_bits: settings.sketch_bits,
                cache_element: if matched.data_type == DataType::Float { 4 } else { 2 },
            });
            (DataType::Uint8, vec![blocks.of(capacity), (layout.len() as i64).into()])
        }
    };
    Ok([
        (
            State::PageSummary,
            element,
            [vec![b.clone(), hkv.clone()], of_selector].concat(),
        ),
        (State::PageSteps, DataType::Int32, vec![b.clone(), hkv, p]),
        (
            State::Outputs,
            DataType::Float,
            vec![b.clone(), r.clone(), hq.clone(), d],
        ),
        (State::Lse, DataType::Float, vec![b, r, hq]),
    ])
}

/// The operator's cache keeps its capacity, so the present one is declared as the past one.
fn keep_capacity(graph: &mut GraphProto, matched: &AttentionMatch) {
    for (past, present) in [
        (&matched.past_key, &matched.present_key),
        (&matched.past_value, &matched.present_value),
    ] {
        let dims = graph
            .input
            .iter()
            .find(|i| i.name() == past)
            .and_then(|i| i.dims().map(<[_]>::to_vec));
        let declared = graph
            .output
            .iter_mut()
            .find(|o| o.name() == present)
            .and_then(ValueInfoProto::dims_mut);
        if let (Some(dims), Some(declared)) = (dims, declared) {
            *declared = dims;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capacities_decide_the_pages() {
        let mut pages = StateDims::new("retro_pages", 16);
        assert_eq!(pages.of(&33.into()), 3.into());
        assert_eq!(pages.of(&"a".into()), "retro_pages".into());
        assert_eq!(pages.of(&"b".into()), "retro_pages_2".into());
        assert_eq!(pages.of(&"a".into()), "retro_pages".into());
        assert_eq!(pages.of(&Dimension::default()), "retro_pages_3".into());
    }
}
