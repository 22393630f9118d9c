//! Caches that exporters are known to make and the operator doesn't have.

use super::{outputs::graph_output_of, trace::Origin};
use crate::{
    prove::{CacheDimensions, CacheRefusal},
    rules::{carried_state::alike, shown::shown},
};
use retro_onnx::{DataType, NodeProto, ValueInfoProto, graph::GraphView};

/// Keys and values of a layer, or of all, in one input.
pub fn merged(view: &GraphView, origin: &Origin) -> Option<CacheRefusal> {
    let rank = view.declared_dims(origin.input)?.len();
    (rank >= 5).then(|| CacheRefusal::Merged {
        cache: shown(view, origin.input),
        of_all_layers: rank > 5,
    })
}

/// A cache in another order of dimensions than the operator's, or of compressed keys and values.
pub fn layout(view: &GraphView, origin: &Origin) -> Option<CacheRefusal> {
    let rank = view.declared_dims(origin.input)?.len();
    let cache = shown(view, origin.input);
    let append = origin.append.or(origin.written)?;
    if !comes_back(view, origin, append) {
        return None;
    }
    if let Some(by) = origin.projected_by {
        return Some(CacheRefusal::Compressed {
            cache,
            node: by.label(),
        });
    }
    if let Some(write) = origin.written {
        return Some(CacheRefusal::Static {
            cache,
            node: write.label(),
            op_type: write.op_type().to_owned(),
        });
    }
    let dimensions = match (rank, origin.axis(rank)?) {
        (4, 2) => return None,
        (4, 1) => CacheDimensions::TokensBeforeHeads,
        (4, 3) => CacheDimensions::TokensLast,
        (4, _) => CacheDimensions::TokensFirst,
        (3, 1) => CacheDimensions::Flat,
        (3, _) => CacheDimensions::Three,
        _ => return None,
    };
    Some(CacheRefusal::Dimensions {
        cache,
        dimensions,
        node: append.label(),
        op_type: append.op_type().to_owned(),
    })
}

/// Whether an input is a cache: it comes back with more in it.
fn comes_back(view: &GraphView, origin: &Origin, append: &NodeProto) -> bool {
    let mut outputs = view.graph.output.iter().map(ValueInfoProto::name);
    outputs.any(|name| alike(origin.input, name))
        || append.output.iter().any(|name| graph_output_of(view, name).is_some())
}

/// A cache of the newest tokens.
pub fn sliding(view: &GraphView, origin: &Origin) -> Option<CacheRefusal> {
    let dims = view.declared_dims(origin.input)?;
    let tokens = dims.get(2)?.fixed().filter(|_| dims.len() == 4)?;
    let cut = origin.cut?;
    Some(CacheRefusal::Sliding {
        cache: shown(view, origin.input),
        tokens,
        node: cut.label(),
        op_type: cut.op_type().to_owned(),
    })
}

/// Whether any input comes back, by its name, as a cache does.
pub fn has_cache(view: &GraphView) -> bool {
    let floats = |v: &&ValueInfoProto| {
        let float = matches!(
            v.data_type(),
            Some(DataType::Float | DataType::Float16 | DataType::Bfloat16)
        );
        float && v.dims().is_none_or(|d| d.len() >= 3)
    };
    let mut inputs = view.graph.input.iter().filter(floats);
    inputs.any(|past| {
        let mut outputs = view.graph.output.iter().filter(floats);
        outputs.any(|present| alike(past.name(), present.name()))
    })
}
