//! The cache of a `com.microsoft::GroupQueryAttention`: it comes from the caller and goes back to it, and nobody else reads it.

use crate::prove::{AttentionMatch, CacheRefusal, cache_aliases};
use retro_onnx::{DataType, graph::GraphView};

/// Names in the match what the graph takes and returns, where the node sees the cache through copies: those copies, and
/// the type that the node computes in. Gives the element type of the graph's cache.
///
/// # Errors
/// The cache is not the graph's alone, or not `[B, Hkv, C, D]` of one floating point type.
pub fn find_cache(view: &GraphView, matched: &mut AttentionMatch) -> Result<DataType, CacheRefusal> {
    let kv_heads = matched.kv_heads;
    let mut node_types = Vec::new();
    for past in [&mut matched.past_key, &mut matched.past_value] {
        node_types.push(follow_past(view, past, &mut matched.cache_aliases)?);
        check_shape(view, past, kv_heads)?;
    }
    for present in [&mut matched.present_key, &mut matched.present_value] {
        follow_present(view, present, &mut matched.cache_aliases)?;
    }
    let outer = element_type(view, matched)?;
    cache_aliases::same_type(view, &matched.past_key, &matched.present_key)?;
    cache_aliases::same_type(view, &matched.past_value, &matched.present_value)?;
    if let Some(own) = node_types.into_iter().flatten().find(|t| *t != outer) {
        [matched.query_type, matched.kv_type, matched.output_type] = [own; 3];
    }
    Ok(outer)
}

/// Puts the graph's input in the place of the past that the node reads. Gives the type that the node reads it in.
fn follow_past(
    view: &GraphView,
    past: &mut String,
    copies: &mut Vec<String>,
) -> Result<Option<DataType>, CacheRefusal> {
    let names = cache_aliases::back(view, past);
    let source = names.iter().rposition(|n| view.is_input(n));
    let Some((source, between)) = source.and_then(|at| Some((*names.get(at)?, names.get(..at)?))) else {
        return Err(CacheRefusal::NotAnInput { past: past.clone() });
    };
    let between: Vec<String> = between.iter().map(|n| (*n).to_owned()).collect();
    let source = source.to_owned();
    for name in between.iter().chain([&source]) {
        if view.readers(name).count() > 1 || view.is_output(name) {
            return Err(CacheRefusal::OtherReaders { name: name.clone() });
        }
    }
    // The copy nearest the node tells.
    let cast = between
        .iter()
        .find_map(|name| view.producer(name).and_then(cache_aliases::cast_to));
    let node_type = cast.or_else(|| view.data_type(&source));
    copies.extend(between);
    *past = source;
    Ok(node_type)
}

fn check_shape(view: &GraphView, past: &str, kv_heads: i64) -> Result<(), CacheRefusal> {
    let name = || past.to_owned();
    let Some(dims) = view.declared_dims(past) else {
        return Err(CacheRefusal::NoShape { past: name() });
    };
    if dims.len() != 4 {
        let rank = dims.len();
        return Err(CacheRefusal::Rank { past: name(), rank });
    }
    match view.declared_from_end(past, 3).filter(|h| *h != kv_heads) {
        Some(heads) => Err(CacheRefusal::Heads {
            past: name(),
            heads,
            kv_heads,
        }),
        None => Ok(()),
    }
}

/// Puts the graph's output in the place of the present that the node makes.
fn follow_present(view: &GraphView, present: &mut String, copies: &mut Vec<String>) -> Result<(), CacheRefusal> {
    let Some((output, between)) = cache_aliases::output(view, present) else {
        return Err(CacheRefusal::NotAnOutput {
            present: present.clone(),
        });
    };
    let output = output.to_owned();
    let between: Vec<String> = between.into_iter().map(str::to_owned).collect();
    let read_by = |name: &str, reader: &retro_onnx::NodeProto| CacheRefusal::OtherReader {
        name: name.to_owned(),
        node: reader.label(),
    };
    // The copies read one another; the graph's output must be read by none.
    if let Some(reader) = view.readers(&output).next() {
        return Err(read_by(&output, reader));
    }
    for name in &between {
        let is_copy = |made: &str| made == output || between.iter().any(|b| b == made);
        if let Some(reader) = view.readers(name).find(|n| !is_copy(n.output(0))) {
            return Err(read_by(name, reader));
        }
    }
    if !between.is_empty() {
        copies.push(output.clone());
    }
    copies.extend(between.into_iter().filter(|name| name != present));
    *present = output;
    Ok(())
}

fn element_type(view: &GraphView, matched: &AttentionMatch) -> Result<DataType, CacheRefusal> {
    match (view.data_type(&matched.past_key), view.data_type(&matched.past_value)) {
        (Some(keys), Some(values)) if keys != values => Err(CacheRefusal::KeyAndValueTypes { keys, values }),
        (Some(t @ (DataType::Float | DataType::Float16 | DataType::Bfloat16)), _) => Ok(t),
        (Some(found), _) => Err(CacheRefusal::Type { found }),
        (None, _) => Err(CacheRefusal::NoType {
            past: matched.past_key.clone(),
        }),
    }
}
