//! What a converted model's state takes beside its key/value caches.

use retro_contract::{self as contract, CacheSize, SKETCH_BLOCK, Selector, attribute, input, limits, pages_for};
use retro_onnx::{DataType, GraphProto, NodeProto, ValueInfoProto};

/// Bytes that the operator keeps for each token, by what they are for, as shares of the bytes of keys and values.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct StateShare {
    /// What pages are scored from: page summaries, or codes of keys.
    pub selector: f64,
    /// The step that loaded a page last.
    pub page_steps: f64,
}

impl StateShare {
    /// Both together.
    pub fn total(&self) -> f64 {
        self.selector + self.page_steps
    }
}

impl std::fmt::Display for StateShare {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:.1} % of the cache's bytes: {:.1} % to score pages, {:.1} % for page steps",
            100.0 * self.total(),
            100.0 * self.selector,
            100.0 * self.page_steps
        )
    }
}

/// Of all layers that carry the operator; none where there are none, or a cache leaves its element type or the size of
/// its heads open. The output cache is left out: it does not grow with the context.
pub fn state_share(graph: &GraphProto) -> Option<StateShare> {
    let (mut cache, mut selector, mut steps) = (0, 0, 0);
    for node in &graph.node {
        if node.is(contract::DOMAIN, contract::OP_TYPE) {
            let of_layer = bytes(graph, node)?;
            cache += of_layer[0];
            selector += of_layer[1];
            steps += of_layer[2];
        }
    }
    let share = |bytes: usize| bytes as f64 / cache as f64;
    (cache > 0).then(|| StateShare {
        selector: share(selector),
        page_steps: share(steps),
    })
}

/// Bytes of a KV head's keys and values, of its selector's state and of its page steps, for a block of tokens.
fn bytes(graph: &GraphProto, node: &NodeProto) -> Option<[usize; 3]> {
    let past = node.input(input::PAST_KEY);
    let declared = graph.input.iter().find(|value| value.name() == past)?;
    let cache_element = match declared.data_type()? {
        DataType::Float => 4,
        DataType::Float16 | DataType::Bfloat16 => 2,
        _ => return None,
    };
    let head_size = head_size(declared)?;
    let number = |name: &str, default: usize| match node.attribute(name) {
        Some(value) => usize::try_from(value.i()).ok().filter(|&n| n > 0),
        None => Some(default),
    };
    let page_size = number(attribute::PAGE_SIZE, limits::PAGE_SIZE)?;
    let selector: Selector = match node.attribute(attribute::SELECTOR) {
        Some(value) => std::str::from_utf8(value.s()).ok()?.parse().ok()?,
        None => Selector::default(),
    };
    let size = CacheSize {
        capacity: SKETCH_BLOCK,
        pages: pages_for(SKETCH_BLOCK, page_size),
        page_size,
        head_size,
        sketch_bits: number(attribute::SKETCH_BITS, limits::SKETCH_BITS)?,
        cache_element,
    };
    let heads = number(attribute::KV_NUM_HEADS, 1)?;
    let of_selector = selector.layout(&size).bytes(cache_element);
    Some(
        [
            2 * SKETCH_BLOCK * head_size * cache_element,
            of_selector,
            4 * size.pages,
        ]
        .map(|bytes| heads * bytes),
    )
}

fn head_size(cache: &ValueInfoProto) -> Option<usize> {
    let size = cache.dims()?.get(3)?.fixed()?;
    usize::try_from(size).ok().filter(|&size| size > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use retro_onnx::AttributeProto;

    fn graph(data_type: DataType, selector: &str, page_size: i64) -> GraphProto {
        let dims = ["batch".into(), 8.into(), "tokens".into(), 128.into()];
        let node = NodeProto::new(
            contract::DOMAIN,
            contract::OP_TYPE,
            "",
            &["q", "k", "v", "past"],
            &["out"],
        )
        .with(AttributeProto::int(attribute::PAGE_SIZE, page_size))
        .with(AttributeProto::string(attribute::SELECTOR, selector));
        GraphProto {
            input: vec![ValueInfoProto::tensor("past", data_type, dims)],
            node: vec![node],
            ..Default::default()
        }
    }

    #[test]
    fn shares_by_hand() {
        let share = |data_type, selector, page_size| state_share(&graph(data_type, selector, page_size)).unwrap();
        // A token has 512 bytes of keys and values. Its sketch has 32 bytes of codes and 2 of factor, which is 6.6 %; a
        // block of 128 has a centre of 256 bytes; a page of 8 has a step of 4 bytes.
        let sketch = share(DataType::Float16, "sketch", 8);
        assert_eq!(sketch.selector, (34.0 + 2.0) / 512.0);
        assert_eq!(sketch.page_steps, 0.5 / 512.0);
        assert_eq!(
            sketch.to_string(),
            "7.1 % of the cache's bytes: 7.0 % to score pages, 0.1 % for page steps"
        );
        // Two vectors a page of 16 keys and 16 values.
        assert_eq!(share(DataType::Float, "bounds", 16).selector, 1.0 / 16.0);
        assert_eq!(state_share(&GraphProto::default()), None);
        assert_eq!(state_share(&graph(DataType::Int8, "sketch", 8)), None);
    }
}
