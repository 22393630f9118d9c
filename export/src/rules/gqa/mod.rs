//! `com.microsoft::GroupQueryAttention`: the operator's own model, so the node converts by adding state.
//! Slots and attributes as of ONNX Runtime 1.31 (ContribOperators.md); older exporters write fewer.

use super::{AttentionMatch, MatchResult, QkNorm, Rope, Rule, SampleCalls};
use crate::prove::cache_aliases;
use retro_onnx::{AttributeType, DataType, NodeProto, graph::GraphView};

mod slot {
    pub const QUERY: usize = 0;
    pub const KEY: usize = 1;
    pub const VALUE: usize = 2;
    pub const PAST_KEY: usize = 3;
    pub const PAST_VALUE: usize = 4;
    pub const SEQLENS_K: usize = 5;
    pub const TOTAL_SEQUENCE_LENGTH: usize = 6;
    pub const COS_CACHE: usize = 7;
    pub const SIN_CACHE: usize = 8;
    pub const POSITION_IDS: usize = 9;
    pub const ATTENTION_BIAS: usize = 10;
    pub const HEAD_SINK: usize = 11;
    /// Scales of a quantised cache: no counterpart in the operator.
    pub const FOREIGN: [(usize, &str); 2] = [(12, "k_scale"), (13, "v_scale")];
    pub const Q_NORM_WEIGHT: usize = 14;
    pub const K_NORM_WEIGHT: usize = 15;
    pub const COUNT: usize = 16;
}

/// The rule.
pub struct GroupQueryAttention;

/// Whether a node is what this rule is about.
pub(crate) fn is_one(node: &NodeProto) -> bool {
    node.is("com.microsoft", "GroupQueryAttention")
}

/// Measured with ONNX Runtime 1.31.1: a plain node gives the same results when w tokens are fed with the total length of
/// one step; with `sliding_window_cache` it doesn't once the cache is full and rows have shifted.
pub(super) fn takes_tokens_again(node: &NodeProto) -> bool {
    is_one(node)
        && !node.input(slot::PAST_KEY).is_empty()
        && node.input(slot::ATTENTION_BIAS).is_empty()
        && node.attribute("sliding_window_cache").is_none_or(|a| a.i() == 0)
}

impl Rule for GroupQueryAttention {
    fn name(&self) -> &'static str {
        "gqa"
    }

    fn match_node<'a>(&self, view: &GraphView<'a>, _: &SampleCalls<'a>, node: &'a NodeProto) -> MatchResult {
        if !is_one(node) {
            return MatchResult::NotMine;
        }
        match attention_match(view, node) {
            Ok(matched) => MatchResult::Match(Box::new(matched)),
            Err(why) => MatchResult::Refused(why),
        }
    }
}

fn attention_match(view: &GraphView, node: &NodeProto) -> Result<AttentionMatch, String> {
    let attributes = Attributes::of(node)?;
    inputs_are_understood(node, &attributes)?;
    let name = |slot: usize| node.input(slot).to_owned();
    let mut matched = AttentionMatch {
        query: name(slot::QUERY),
        key: name(slot::KEY),
        value: name(slot::VALUE),
        past_key: name(slot::PAST_KEY),
        past_value: name(slot::PAST_VALUE),
        seqlens_k: name(slot::SEQLENS_K),
        total_sequence_length: name(slot::TOTAL_SEQUENCE_LENGTH),
        head_sink: name(slot::HEAD_SINK),
        output: node.output(0).to_owned(),
        present_key: node.output(1).to_owned(),
        present_value: node.output(2).to_owned(),
        q_heads: attributes.num_heads,
        kv_heads: attributes.kv_num_heads,
        scale: attributes.scale,
        softcap: attributes.softcap,
        local_window_size: attributes.local_window_size,
        sliding_cache: attributes.sliding_window_cache,
        ..Default::default()
    };
    matched.data_type = cache_is_the_graphs(view, &mut matched)?;
    matched.qk_norm = qk_norm(node, &attributes)?;
    if attributes.smooth_softmax && matched.head_sink.is_empty() {
        // One more in every denominator: what a sink of 0 adds.
        matched.sinks = Some(vec![0.0; usize::try_from(matched.q_heads).unwrap_or_default()]);
    }
    activations_agree(view, &matched)?;
    matched.head_size = head_size(view, &matched)?;
    if matched.qk_norm.is_some() && matched.head_size.is_none() {
        return Err("it normalises queries and keys, but nothing in the graph tells the head size".to_owned());
    }
    matched.rope = rope(view, node, &attributes, &mut matched)?;
    Ok(matched)
}

struct Attributes {
    num_heads: i64,
    kv_num_heads: i64,
    scale: f32,
    softcap: f32,
    do_rotary: bool,
    rotary_interleaved: bool,
    local_window_size: i64,
    sliding_window_cache: bool,
    qk_norm_epsilon: f32,
    smooth_softmax: bool,
}

impl Attributes {
    fn of(node: &NodeProto) -> Result<Self, String> {
        let mut a = Self {
            num_heads: 0,
            kv_num_heads: 0,
            scale: 0.0,
            softcap: 0.0,
            do_rotary: false,
            rotary_interleaved: false,
            local_window_size: -1,
            sliding_window_cache: false,
            qk_norm_epsilon: 1e-6,
            smooth_softmax: false,
        };
        for attribute in &node.attribute {
            let name = attribute.name();
            let typed = |t: AttributeType| {
                let right = attribute.r#type == Some(t.into()) && attribute.ref_attr_name().is_empty();
                if right {
                    Ok(())
                } else {
                    Err(format!("attribute {name} is not a plain {t:?}"))
                }
            };
            let int = || typed(AttributeType::Int).map(|()| attribute.i());
            let flag = || int().and_then(|i| as_flag(name, i));
            let float = || {
                typed(AttributeType::Float)?;
                let f = attribute.f();
                if f.is_finite() && f >= 0.0 {
                    Ok(f)
                } else {
                    Err(format!("attribute {name} is {f}"))
                }
            };
            match name {
                "num_heads" => a.num_heads = int()?,
                "kv_num_heads" => a.kv_num_heads = int()?,
                "scale" => a.scale = float()?,
                "softcap" => a.softcap = float()?,
                "do_rotary" => a.do_rotary = flag()?,
                "rotary_interleaved" => a.rotary_interleaved = flag()?,
                "local_window_size" => a.local_window_size = int()?,
                "sliding_window_cache" => a.sliding_window_cache = flag()?,
                "qk_norm_epsilon" => a.qk_norm_epsilon = float()?,
                "causal" if int()? == 1 => {}
                "smooth_softmax" if matches!(int()?, -1..=1) => a.smooth_softmax = int()? == 1,
                "qk_output" | "kv_cache_bit_width" if int()? == 0 => {}
                "k_quant_type" | "v_quant_type" if attribute.s() == b"NONE".as_slice() => {}
                _ => {
                    return Err(format!(
                        "attribute {name} = {} is not supported by this version",
                        shown(attribute)
                    ));
                }
            }
        }
        let (q, kv) = (a.num_heads, a.kv_num_heads);
        if q < 1 || kv < 1 || q > MAX_SIZE || q % kv != 0 {
            return Err(format!("num_heads = {q} is not a multiple of kv_num_heads = {kv}"));
        }
        if a.local_window_size != -1 && !(1..=i64::from(i32::MAX)).contains(&a.local_window_size) {
            return Err(format!(
                "local_window_size = {} is neither -1 nor a number of tokens",
                a.local_window_size
            ));
        }
        Ok(a)
    }
}

/// Heads and head sizes past this are no model's.
const MAX_SIZE: i64 = 1 << 16;

fn as_flag(name: &str, value: i64) -> Result<bool, String> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(format!("attribute {name} = {other} is neither 0 nor 1")),
    }
}

fn shown(attribute: &retro_onnx::AttributeProto) -> String {
    match attribute.r#type() {
        AttributeType::Int => attribute.i().to_string(),
        AttributeType::Float => attribute.f().to_string(),
        AttributeType::String => format!("{:?}", String::from_utf8_lossy(attribute.s())),
        other => format!("{other:?}"),
    }
}

fn inputs_are_understood(node: &NodeProto, attributes: &Attributes) -> Result<(), String> {
    let given = |slot: usize| !node.input(slot).is_empty();
    for (slot, what) in slot::FOREIGN {
        if given(slot) {
            return Err(format!(
                "{what} (input {slot}, {}) is not supported by this version",
                node.input(slot)
            ));
        }
    }
    if let Some(more) = node.input.iter().skip(slot::COUNT).find(|i| !i.is_empty()) {
        return Err(format!("it has more inputs than this version knows ({more})"));
    }
    if given(slot::ATTENTION_BIAS) {
        return Err(format!(
            "attention_bias (input {}, {}) is a mask that this version doesn't understand",
            slot::ATTENTION_BIAS,
            node.input(slot::ATTENTION_BIAS)
        ));
    }
    // Without rotary embedding in the node nothing reads the positions.
    if given(slot::POSITION_IDS) && attributes.do_rotary {
        return Err(format!(
            "position_ids (input {}, {}) may differ from the positions in the cache, which the operator uses",
            slot::POSITION_IDS,
            node.input(slot::POSITION_IDS)
        ));
    }
    if !given(slot::QUERY) || !given(slot::SEQLENS_K) || !given(slot::TOTAL_SEQUENCE_LENGTH) {
        return Err("a required input (query, seqlens_k or total_sequence_length) is absent".to_owned());
    }
    if given(slot::KEY) != given(slot::VALUE) {
        return Err("only one of key and value is given".to_owned());
    }
    if !given(slot::PAST_KEY) || !given(slot::PAST_VALUE) {
        return Err("it has no past_key and past_value: the model keeps no cache".to_owned());
    }
    if let Some(extra) = node.output.iter().skip(3).find(|o| !o.is_empty()) {
        return Err(format!(
            "it returns its attention scores ({extra}), which page selection doesn't compute"
        ));
    }
    if (0..3).any(|slot| node.output(slot).is_empty()) {
        return Err("an output (output, present_key or present_value) is absent".to_owned());
    }
    Ok(())
}

/// Both weights, or none.
fn qk_norm(node: &NodeProto, attributes: &Attributes) -> Result<Option<QkNorm>, String> {
    match (node.input(slot::Q_NORM_WEIGHT), node.input(slot::K_NORM_WEIGHT)) {
        ("", "") => Ok(None),
        (query, "") => Err(format!("q_norm_weight ({query}) comes without k_norm_weight")),
        ("", key) => Err(format!("k_norm_weight ({key}) comes without q_norm_weight")),
        (query, key) => Ok(Some(QkNorm {
            query: query.to_owned(),
            key: key.to_owned(),
            epsilon: attributes.qk_norm_epsilon,
        })),
    }
}

/// The cache comes from the caller and goes back to it, and nobody else looks at it. Gives its element type; where the node sees it
/// through copies, the match then names what the graph takes and returns, the copies, and the type that the node computes in.
fn cache_is_the_graphs(view: &GraphView, matched: &mut AttentionMatch) -> Result<DataType, String> {
    let mut inner = Vec::new();
    for past in [&mut matched.past_key, &mut matched.past_value] {
        let names = cache_aliases::back(view, past);
        let source = names.iter().rposition(|n| view.is_input(n));
        let Some((source, between)) = source.and_then(|at| Some((*names.get(at)?, names.get(..at)?))) else {
            return Err(format!("its cache {past} is not an input of the graph"));
        };
        let (source, between): (String, Vec<String>) =
            (source.to_owned(), between.iter().map(|n| (*n).to_owned()).collect());
        for name in between.iter().chain([&source]) {
            if view.readers(name).count() > 1 || view.is_output(name) {
                return Err(format!("its cache {name} is read by other nodes too"));
            }
        }
        inner.push(type_after(view, &source, between.iter().rev()));
        matched.copies.extend(between);
        *past = source;
        let Some(dims) = view.declared_dims(past) else {
            return Err(format!("{past} has no declared shape"));
        };
        if dims.len() != 4 {
            return Err(format!(
                "{past} has {} dimensions, not 4 (batch, heads, tokens, head size)",
                dims.len()
            ));
        }
        if let Some(heads) = view.declared_from_end(past, 3).filter(|h| *h != matched.kv_heads) {
            return Err(format!(
                "{past} has {heads} heads, but kv_num_heads is {}",
                matched.kv_heads
            ));
        }
    }
    for present in [&mut matched.present_key, &mut matched.present_value] {
        let Some((output, between)) = cache_aliases::output(view, present) else {
            return Err(format!("its cache {present} is not an output of the graph"));
        };
        let (output, between): (String, Vec<String>) =
            (output.to_owned(), between.into_iter().map(str::to_owned).collect());
        // The copies read one another; the graph's output must be read by none.
        if let Some(reader) = view.readers(&output).next() {
            return Err(format!("its cache {output} is read by node {} too", reader.label()));
        }
        for name in &between {
            let own = |n: &&NodeProto| n.output(0) == output || between.iter().any(|b| b == n.output(0));
            if let Some(reader) = view.readers(name).find(|n| !own(n)) {
                return Err(format!("its cache {name} is read by node {} too", reader.label()));
            }
        }
        if !between.is_empty() {
            matched.copies.push(output.clone());
        }
        matched
            .copies
            .extend(between.into_iter().filter(|name| name != present));
        *present = output;
    }
    let outer = match (view.data_type(&matched.past_key), view.data_type(&matched.past_value)) {
        (Some(k), Some(v)) if k != v => {
            return Err(format!("its cache holds {} keys and {} values", k.label(), v.label()));
        }
        (Some(t @ (DataType::Float | DataType::Float16 | DataType::Bfloat16)), _) => t,
        (Some(t), _) => {
            return Err(format!(
                "its cache holds {}, not float32, float16 or bfloat16",
                t.label()
            ));
        }
        (None, _) => return Err(format!("{} has no declared element type", matched.past_key)),
    };
    cache_aliases::same_type(view, &matched.past_key, &matched.present_key)?;
    cache_aliases::same_type(view, &matched.past_value, &matched.present_value)?;
    let own = inner.into_iter().flatten().find(|t| *t != outer);
    if let Some(own) = own {
        [matched.query_type, matched.kv_type, matched.output_type] = [own; 3];
    }
    Ok(outer)
}

/// The type of a value that is a copy of another, whose copies are given in order.
fn type_after<'n>(view: &GraphView, source: &str, names: impl Iterator<Item = &'n String>) -> Option<DataType> {
    let casts = names.filter_map(|name| view.producer(name).and_then(cache_aliases::cast_to));
    casts.last().or_else(|| view.data_type(source))
}

fn activations_agree(view: &GraphView, matched: &AttentionMatch) -> Result<(), String> {
    for (what, name) in [
        ("query", &matched.query),
        ("key", &matched.key),
        ("value", &matched.value),
    ] {
        if let Some(dims) = view.declared_dims(name).filter(|d| d.len() != 3) {
            return Err(format!(
                "{what} ({name}) has {} dimensions, not 3 (batch, tokens, heads * size)",
                dims.len()
            ));
        }
    }
    let own = matched.typed(matched.query_type);
    let norm = matched.qk_norm.as_ref();
    for (what, name) in [
        ("query", Some(&matched.query)),
        ("head_sink", Some(&matched.head_sink)),
        ("q_norm_weight", norm.map(|n| &n.query)),
        ("k_norm_weight", norm.map(|n| &n.key)),
    ] {
        if let (Some(name), Some(t)) = (name, name.and_then(|n| view.data_type(n)).filter(|t| *t != own)) {
            return Err(format!(
                "{what} ({name}) is {}, its cache is {}",
                t.label(),
                own.label()
            ));
        }
    }
    match view.tensor_dims(&matched.head_sink) {
        Some(dims) if dims != [matched.q_heads] => {
            Err(format!("head_sink has shape {dims:?}, not [{}]", matched.q_heads))
        }
        _ => Ok(()),
    }
}

/// The head size from the cache's declared shape, else from the width of the query, which exporters declare more often.
fn head_size(view: &GraphView, matched: &AttentionMatch) -> Result<Option<i64>, String> {
    let of_cache = |name: &str| view.declared_from_end(name, 1);
    let packed = matched.key.is_empty();
    let heads = if packed {
        matched.q_heads + 2 * matched.kv_heads
    } else {
        matched.q_heads
    };
    let of_width = |name: &str, heads: i64| {
        view.declared_from_end(name, 1)
            .filter(|w| w % heads == 0)
            .map(|w| w / heads)
    };
    let of_weight = |name: &str| match view.tensor_dims(name) {
        Some([size]) => Some(*size),
        _ => None,
    };
    let weights = matched.qk_norm.iter().flat_map(|norm| [&norm.query, &norm.key]);
    let known = [
        (&matched.past_key, of_cache(&matched.past_key)),
        (&matched.past_value, of_cache(&matched.past_value)),
        (&matched.query, of_width(&matched.query, heads)),
        (&matched.output, of_width(&matched.output, matched.q_heads)),
    ];
    let known: Vec<_> = known
        .into_iter()
        .chain(weights.map(|name| (name, of_weight(name))))
        .collect();
    let mut size: Option<(i64, &str)> = None;
    for (name, d) in known.iter().filter_map(|(name, d)| Some((name.as_str(), (*d)?))) {
        match size {
            _ if !(1..=MAX_SIZE).contains(&d) => return Err(format!("{name} has a head size of {d}")),
            Some((first, of)) if first != d => {
                return Err(format!("{of} has a head size of {first}, but {name} has {d}"));
            }
            _ => size = Some((d, name)),
        }
    }
    Ok(size.map(|(d, _)| d))
}

fn rope(
    view: &GraphView,
    node: &NodeProto,
    attributes: &Attributes,
    matched: &mut AttentionMatch,
) -> Result<Rope, String> {
    if !attributes.do_rotary {
        let before = view
            .producer(&matched.query)
            .is_some_and(|n| n.op_type() == "RotaryEmbedding");
        return Ok(if before { Rope::Before } else { Rope::None });
    }
    let (cos, sin) = (node.input(slot::COS_CACHE), node.input(slot::SIN_CACHE));
    if cos.is_empty() || sin.is_empty() {
        return Err("do_rotary = 1 without cos_cache and sin_cache".to_owned());
    }
    let width = view
        .tensor_dims(cos)
        .and_then(|d| d.last().copied())
        .or_else(|| view.declared_from_end(cos, 1));
    let dims = width.and_then(|w| w.checked_mul(2));
    if let (Some(dims), Some(size)) = (dims, matched.head_size)
        && (dims < 2 || dims > size)
    {
        return Err(format!("cos_cache rotates {dims} elements of a head of {size}"));
    }
    matched.cos_cache = cos.to_owned();
    matched.sin_cache = sin.to_owned();
    Ok(Rope::Inside {
        interleaved: attributes.rotary_interleaved,
        dims,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{gqa_graph, gqa_node_mut};
    use retro_onnx::{AttributeProto, GraphProto, TensorProto};

    fn look(graph: &GraphProto) -> Result<AttentionMatch, String> {
        let view = GraphView::new(graph, 21);
        let samples = SampleCalls::new(&view, None);
        let mut results = graph
            .node
            .iter()
            .map(|n| GroupQueryAttention.match_node(&view, &samples, n));
        results
            .find_map(|v| match v {
                MatchResult::NotMine => None,
                MatchResult::Match(matched) => Some(Ok(*matched)),
                MatchResult::Refused(why) => Some(Err(why)),
            })
            .unwrap()
    }

    fn refusal(change: impl FnOnce(&mut GraphProto)) -> String {
        let mut graph = gqa_graph(1);
        change(&mut graph);
        look(&graph).expect_err("it should be refused")
    }

    fn set_input(graph: &mut GraphProto, slot: usize, name: &str) {
        let input = &mut gqa_node_mut(graph, 0).input;
        input.resize(input.len().max(slot + 1), String::new());
        input[slot] = name.to_owned();
    }

    fn set_attribute(graph: &mut GraphProto, attribute: AttributeProto) {
        let node = gqa_node_mut(graph, 0);
        node.attribute.retain(|a| a.name() != attribute.name());
        node.attribute.push(attribute);
    }

    #[test]
    fn a_plain_packed_node_matches() {
        let matched = look(&gqa_graph(1)).unwrap();
        assert_eq!((matched.q_heads, matched.kv_heads, matched.head_size), (4, 2, Some(8)));
        assert_eq!(
            (matched.query.as_str(), matched.key.as_str(), matched.value.as_str()),
            ("qkv.0", "", "")
        );
        assert_eq!(
            matched.rope,
            Rope::Inside {
                interleaved: false,
                dims: Some(8)
            }
        );
        assert_eq!(
            (matched.data_type, matched.local_window_size, matched.sliding_cache),
            (DataType::Float, -1, false)
        );
        assert_eq!(
            (matched.past_key.as_str(), matched.present_value.as_str()),
            ("past_key_values.0.key", "present.0.value")
        );
    }

    #[test]
    fn separate_keys_head_sinks_windows_and_softcaps_match() {
        let mut graph = gqa_graph(1);
        set_input(&mut graph, slot::KEY, "k");
        set_input(&mut graph, slot::VALUE, "v");
        set_input(&mut graph, slot::HEAD_SINK, "sink");
        set_input(&mut graph, slot::COS_CACHE, "");
        set_input(&mut graph, slot::SIN_CACHE, "");
        set_input(&mut graph, slot::POSITION_IDS, "position_ids");
        set_attribute(&mut graph, AttributeProto::int("do_rotary", 0));
        set_attribute(&mut graph, AttributeProto::int("local_window_size", 8));
        set_attribute(&mut graph, AttributeProto::int("sliding_window_cache", 1));
        set_attribute(&mut graph, AttributeProto::float("softcap", 50.0));
        set_attribute(&mut graph, AttributeProto::int("kv_cache_bit_width", 0));
        set_attribute(&mut graph, AttributeProto::string("k_quant_type", "NONE"));
        graph.value_info.clear();
        let matched = look(&graph).unwrap();
        assert_eq!(
            (matched.key.as_str(), matched.head_sink.as_str(), matched.rope),
            ("k", "sink", Rope::None)
        );
        assert_eq!(
            (matched.local_window_size, matched.softcap, matched.sliding_cache),
            (8, 50.0, true)
        );
    }

    #[test]
    fn norms_of_queries_and_keys_match() {
        let mut graph = gqa_graph(1);
        set_input(&mut graph, slot::Q_NORM_WEIGHT, "q_norm");
        set_input(&mut graph, slot::K_NORM_WEIGHT, "k_norm");
        let norm = |epsilon: f32| QkNorm {
            query: "q_norm".into(),
            key: "k_norm".into(),
            epsilon,
        };
        assert_eq!(look(&graph).unwrap().qk_norm, Some(norm(1e-6)));
        set_attribute(&mut graph, AttributeProto::float("qk_norm_epsilon", 1e-5));
        assert_eq!(look(&graph).unwrap().qk_norm, Some(norm(1e-5)));
        // The weights tell the head size where nothing else does.
        graph.value_info.clear();
        for cache in graph.input.iter_mut().filter(|i| i.name().starts_with("past")) {
            cache.dims_mut().unwrap()[3] = "head_size".into();
        }
        let why = look(&graph).expect_err("no head size");
        assert!(why.contains("nothing in the graph tells the head size"), "{why}");
        let weight = |name: &str, size: i64| TensorProto::floats(name, &[size], &vec![1.0; size as usize]);
        graph.initializer.extend([weight("q_norm", 8), weight("k_norm", 8)]);
        assert_eq!(look(&graph).unwrap().head_size, Some(8));
        graph.initializer.pop();
        graph.initializer.push(weight("k_norm", 4));
        let why = look(&graph).expect_err("two head sizes");
        assert!(why.contains("q_norm has a head size of 8, but k_norm has 4"), "{why}");
    }

    #[test]
    fn a_smooth_softmax_is_a_sink_of_0_unless_sinks_are_given() {
        let mut graph = gqa_graph(1);
        set_attribute(&mut graph, AttributeProto::int("smooth_softmax", 1));
        assert_eq!(look(&graph).unwrap().sinks, Some(vec![0.0; 4]));
        set_input(&mut graph, slot::HEAD_SINK, "sink");
        let matched = look(&graph).unwrap();
        assert_eq!((matched.head_sink.as_str(), matched.sinks), ("sink", None));
    }

    /// Puts a copy between a graph's cache and the node.
    fn put_behind(graph: &mut GraphProto, op: &str, to: Option<DataType>) {
        let attribute = to.map(|t| AttributeProto::int("to", i64::from(i32::from(t))));
        let copy = |from: &str, to: &str| {
            let mut node = NodeProto::new("", op, to, &[from], &[to]);
            node.attribute.extend(attribute.clone());
            node
        };
        let node = gqa_node_mut(graph, 0);
        let mut copies = Vec::new();
        for name in &mut node.input[3..5] {
            let inner = format!("inner.{name}");
            copies.push(copy(name, &inner));
            *name = inner;
        }
        for name in &mut node.output[1..3] {
            let inner = format!("inner.{name}");
            copies.push(copy(&inner, name));
            *name = inner;
        }
        graph.node.extend(copies);
    }

    #[test]
    fn a_cache_behind_copies_matches() {
        let mut graph = gqa_graph(1);
        put_behind(&mut graph, "Identity", None);
        let matched = look(&graph).unwrap();
        assert_eq!(
            [
                &matched.past_key,
                &matched.past_value,
                &matched.present_key,
                &matched.present_value
            ]
            .map(String::as_str),
            [
                "past_key_values.0.key",
                "past_key_values.0.value",
                "present.0.key",
                "present.0.value"
            ]
        );
        assert_eq!(matched.copies.len(), 4, "{:?}", matched.copies);
        assert_eq!(
            (matched.data_type, matched.query_type),
            (DataType::Float, DataType::Undefined)
        );
    }

    #[test]
    fn a_cache_of_another_type_matches_where_both_ends_agree() {
        let mut graph = gqa_graph(1);
        put_behind(&mut graph, "Cast", Some(DataType::Float16));
        let why = look(&graph).expect_err("queries are float32");
        assert!(why.contains("query (qkv.0) is float32, its cache is float16"), "{why}");
        graph.value_info.clear();
        let matched = look(&graph).unwrap();
        assert_eq!(
            (matched.data_type, matched.query_type),
            (DataType::Float, DataType::Float16)
        );
        let output = graph.output.iter_mut().find(|o| o.name() == "present.0.key").unwrap();
        let dims = output.dims().unwrap().to_vec();
        *output = retro_onnx::ValueInfoProto::tensor("present.0.key", DataType::Float16, dims);
        let why = look(&graph).expect_err("one type in, another out");
        assert!(
            why.contains("comes in as float32 (past_key_values.0.key) and goes out as float16 (present.0.key)"),
            "{why}"
        );
    }

    #[test]
    fn a_cache_whose_copy_others_read_is_refused() {
        for name in ["inner.past_key_values.0.key", "inner.present.0.value", "present.0.key"] {
            let mut graph = gqa_graph(1);
            put_behind(&mut graph, "Identity", None);
            graph.node.push(NodeProto::new("", "Neg", "other", &[name], &["read"]));
            let why = look(&graph).expect_err("another reader");
            assert!(why.contains(name) && why.contains("too"), "{why}");
        }
    }

    #[test]
    fn every_input_without_a_counterpart_is_refused_by_name() {
        for (slot, what) in [
            (9, "position_ids"),
            (10, "attention_bias"),
            (12, "k_scale"),
            (13, "v_scale"),
            (14, "comes without k_norm_weight"),
            (15, "comes without q_norm_weight"),
            (16, "more inputs"),
        ] {
            let why = refusal(|g| set_input(g, slot, "extra"));
            assert!(why.contains(what) && why.contains("extra"), "{slot}: {why}");
        }
        for (slot, what) in [
            (3, "no past_key"),
            (1, "only one of"),
            (7, "without cos_cache"),
            (5, "required"),
        ] {
            let why = refusal(|g| set_input(g, slot, if slot == 1 { "k" } else { "" }));
            assert!(why.contains(what), "{slot}: {why}");
        }
    }

    #[test]
    fn every_attribute_without_a_counterpart_is_refused_with_its_value() {
        for (attribute, what) in [
            (AttributeProto::int("smooth_softmax", 2), "smooth_softmax = 2"),
            (AttributeProto::int("causal", 0), "causal = 0"),
            (AttributeProto::int("qk_output", 2), "qk_output = 2"),
            (AttributeProto::int("kv_cache_bit_width", 8), "kv_cache_bit_width = 8"),
            (
                AttributeProto::string("k_quant_type", "PER_TENSOR"),
                "k_quant_type = \"PER_TENSOR\"",
            ),
            (AttributeProto::int("brand_new", 3), "brand_new = 3"),
            (
                AttributeProto::int("num_heads", 3),
                "num_heads = 3 is not a multiple of kv_num_heads = 2",
            ),
            (AttributeProto::int("kv_num_heads", 0), "kv_num_heads = 0"),
            (AttributeProto::int("num_heads", i64::MIN), "num_heads"),
            (AttributeProto::int("local_window_size", 0), "local_window_size = 0"),
            (AttributeProto::int("do_rotary", 2), "do_rotary = 2"),
            (AttributeProto::float("scale", f32::NAN), "scale is NaN"),
            (AttributeProto::float("num_heads", 4.0), "num_heads is not a plain Int"),
        ] {
            let why = refusal(|g| set_attribute(g, attribute));
            assert!(why.contains(what), "{what}: {why}");
        }
    }

    #[test]
    fn a_cache_that_is_not_the_callers_alone_is_refused() {
        let why = refusal(|g| g.input.retain(|i| i.name() != "past_key_values.0.key"));
        assert!(why.contains("not an input of the graph"), "{why}");
        let why = refusal(|g| g.output.retain(|o| o.name() != "present.0.value"));
        assert!(why.contains("not an output of the graph"), "{why}");
        let why = refusal(|g| {
            g.node
                .push(NodeProto::new("", "Shape", "s", &["past_key_values.0.key"], &["n"]))
        });
        assert!(why.contains("read by other nodes"), "{why}");
        let why = refusal(|g| {
            g.node
                .push(NodeProto::new("", "Shape", "s", &["present.0.key"], &["n"]))
        });
        assert!(why.contains("read by node s"), "{why}");
        let why = refusal(|g| gqa_node_mut(g, 0).output.push("scores".into()));
        assert!(why.contains("attention scores (scores)"), "{why}");
    }

    #[test]
    fn shapes_and_types_that_disagree_are_refused() {
        fn declare(g: &mut GraphProto, name: &str, t: DataType, dims: &[i64]) {
            let values = g.input.iter_mut().chain(&mut g.value_info);
            let value = values.into_iter().find(|v| v.name() == name).unwrap();
            *value = retro_onnx::ValueInfoProto::tensor(name, t, dims.iter().map(|d| (*d).into()));
        }
        let key = "past_key_values.0.key";
        for (name, t, dims, what) in [
            (
                key,
                DataType::Int8,
                &[1, 2, 9, 8][..],
                "its cache holds int8 keys and float32",
            ),
            (
                key,
                DataType::Float,
                &[1, 3, 9, 8],
                "has 3 heads, but kv_num_heads is 2",
            ),
            (key, DataType::Float, &[1, 2, 8], "has 3 dimensions, not 4"),
            (key, DataType::Float, &[1, 2, 9, 16], "head size of 16"),
            (key, DataType::Float, &[1, 2, 9, -8], "head size of -8"),
            ("qkv.0", DataType::Float16, &[1, 1, 64], "query (qkv.0) is float16"),
            ("qkv.0", DataType::Float, &[1, 64], "query (qkv.0) has 2 dimensions"),
        ] {
            let why = refusal(|g| declare(g, name, t, dims));
            assert!(why.contains(what), "{what}: {why}");
        }
        let why = refusal(|g| {
            declare(g, key, DataType::Int8, &[1, 2, 9, 8]);
            declare(g, "past_key_values.0.value", DataType::Int8, &[1, 2, 9, 8]);
        });
        assert!(why.contains("its cache holds int8, not"), "{why}");
    }

    #[test]
    fn tokens_fed_again_suit_plain_nodes_only() {
        let mut graph = gqa_graph(1);
        assert!(takes_tokens_again(gqa_node_mut(&mut graph, 0)));
        set_attribute(&mut graph, AttributeProto::int("sliding_window_cache", 1));
        assert!(!takes_tokens_again(gqa_node_mut(&mut graph, 0)));
    }
}
