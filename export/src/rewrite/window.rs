//! The window inside the graph: a host feeds each token once, and the graph feeds the last ones again by itself.
//!
//! w window, S tokens that the host feeds, T valid tokens of the longest sequence after the call, B sequences. In a step
//! (S = 1 < T) the graph works on k + 1 rows, k = min(w - 1, T - 1): the last k tokens of earlier calls, then the new one. Which
//! of the k count, the operator reads from its input `retro_count`, where it runs; the others it ignores. So no shape depends on
//! data, and nothing waits for the host on a GPU. A prompt, or a chunk of one, is fed as it is, and closes the window.
//!
//! State: [`PAST_WINDOW`], and [`PAST_WINDOW_EMBEDS`] where tokens come as embeddings. That a host has gone back to fewer tokens
//! shows by the number of valid tokens: then none is fed again.
//!
//! What decides shapes is computed from shapes, on the CPU; what is computed from state stays where that is. A number that crosses
//! from the CPU to a GPU would forbid to capture a CUDA graph, so that a step is told from a prompt by cutting: [`Window::counts`].

use super::{Error, operator_node::is_operator};
use crate::{
    eval::{leading_to, reads},
    logits::Logits,
    rules::{INPUT_IDS, INPUTS_EMBEDS, POSITION_IDS, gqa},
};
use retro_contract::{
    attribute,
    graph::{PAST_WINDOW, PAST_WINDOW_EMBEDS, PRESENT_WINDOW, PRESENT_WINDOW_EMBEDS, RETRO_LENGTH},
    input,
};
use retro_onnx::{
    AttributeProto, DataType, Dimension, GraphBuilder, GraphProto, NodeProto, ValueInfoProto, graph::subgraphs_mut,
};
use std::collections::HashSet;

/// Name of the dimension S: within the graph, the source's name stands for the rows that the graph works on.
const TOKENS_FED: &str = "retro_tokens_fed";
/// From here on Slice takes its bounds as inputs, Where is there, and Gather takes negative indices.
const OPSET: i64 = 11;

/// An input with a row a token.
struct TokenInput {
    name: String,
    /// The value that the graph reads instead of it: these rows, after those that are fed again.
    fed: String,
    data_type: DataType,
    dims: Vec<Dimension>,
}

impl TokenInput {
    fn is_embeds(&self) -> bool {
        self.name == INPUTS_EMBEDS
    }
}

/// A graph whose nodes read what is fed by the names that [`Self::finish`] gives it.
pub struct Window {
    size: usize,
    inputs: Vec<TokenInput>,
    /// The source's name for the dimension S.
    symbol: Option<String>,
}

impl Window {
    /// Lets all nodes that are there read rows that include those fed again. `size`: w, at least 2.
    ///
    /// # Errors
    /// The opset is too old, an attention stays that would be fed rows that don't count, or an input of tokens or positions is
    /// declared in a way that can't be kept.
    pub fn new(graph: &mut GraphProto, builder: &mut GraphBuilder, size: usize, opset: i64) -> Result<Self, Error> {
        if opset < OPSET {
            return Err(Error::WindowOpset(opset));
        }
        // It would write all rows into its cache.
        if let Some(left) = graph.node.iter().find(|n| gqa::is_one(n)) {
            return Err(Error::WindowLayerLeft(left.label()));
        }
        builder.set_prefix("retro/window/");
        let (mut inputs, mut symbol) = (Vec::new(), None);
        for (name, rank) in [(INPUT_IDS, 2), (INPUTS_EMBEDS, 3), (POSITION_IDS, 2)] {
            let Some(declared) = graph.input.iter_mut().find(|i| i.name() == name) else {
                continue;
            };
            let data_type = declared.data_type().unwrap_or(DataType::Undefined);
            let Some(dims) = declared.dims_mut().filter(|dims| dims.len() == rank) else {
                return Err(Error::WindowInput { name, rank });
            };
            if let Some(tokens) = dims.get_mut(1) {
                symbol = symbol.or_else(|| tokens.symbol().map(str::to_owned));
                *tokens = TOKENS_FED.into();
            }
            let hidden = dims.last().and_then(Dimension::fixed);
            if name == INPUTS_EMBEDS && hidden.is_none() {
                return Err(Error::WindowEmbeds);
            }
            inputs.push(TokenInput {
                name: name.to_owned(),
                fed: builder.fresh_name(name),
                data_type,
                dims: dims.clone(),
            });
        }
        if inputs.iter().all(|i| i.name == POSITION_IDS) {
            return Err(Error::NoTokens);
        }
        read_instead(&mut graph.node, &inputs);
        Ok(Self { size, inputs, symbol })
    }

    /// Adds the nodes that make what is fed, and the state that they need, to the graph: one whose attention is the operator, and
    /// whose lengths are checked. `logits`: what became of these.
    ///
    /// # Errors
    /// The lengths of sequences are computed from the tokens fed, or an output has a row for each of them.
    pub fn finish(self, graph: &mut GraphProto, builder: &mut GraphBuilder, logits: &Logits) -> Result<(), Error> {
        let operator = graph.node.iter().find(|n| is_operator(n)).ok_or(Error::NoAttention)?;
        let lengths = operator.input(input::SEQLENS_K).to_owned();
        let total = operator.input(input::TOTAL_SEQUENCE_LENGTH).to_owned();
        let front = self.lengths_first(graph, [&lengths, &total])?;
        builder.set_prefix("retro/window/");
        let rows = self.rows(builder, &total);
        let counts = self.counts(builder, &rows, &lengths);
        let mut state = vec![counts.next, counts.valid];
        for token_input in &self.inputs {
            state.extend(self.feed(builder, &rows, token_input));
        }
        let state: Vec<&str> = state.iter().map(String::as_str).collect();
        let name = builder.fresh_name("present");
        builder
            .node("Concat", &state)
            .int("axis", 1)
            .named(&name, &[PRESENT_WINDOW]);
        graph.node.splice(front..front, builder.take_nodes());
        self.cut_logits(graph, builder, &rows.tokens, logits)?;
        graph.initializer.append(&mut builder.take_initializers());
        self.declare_state(graph);
        graph.input.retain(|i| i.name() != RETRO_LENGTH);
        graph.initializer.retain(|t| t.name() != RETRO_LENGTH);
        for node in graph.node.iter_mut().filter(|n| is_operator(n)) {
            node.input.resize(input::COUNT, String::new());
            node.input[input::RETRO_LENGTH].clone_from(&rows.retro_length);
            node.input[input::RETRO_COUNT].clone_from(&counts.now);
            let rows = AttributeProto::int(attribute::STEP_ROWS, self.size as i64);
            node.attribute.push(rows);
        }
        Ok(())
    }

    /// Puts what makes these lengths before all else, and says how many nodes that is.
    fn lengths_first(&self, graph: &mut GraphProto, lengths: [&str; 2]) -> Result<usize, Error> {
        let leads = leading_to(graph, lengths, |node| reads(node).collect());
        let nodes = std::mem::take(&mut graph.node).into_iter().zip(leads);
        let (first, rest): (Vec<_>, Vec<_>) = nodes.partition(|(_, leads)| *leads);
        let fed: HashSet<&str> = self.inputs.iter().map(|i| i.fed.as_str()).collect();
        let by_tokens = first
            .iter()
            .find(|(node, _)| reads(node).any(|name| fed.contains(name)));
        if let Some((node, _)) = by_tokens {
            return Err(Error::LengthsOfTokens(node.label()));
        }
        let count = first.len();
        graph.node.extend(first.into_iter().chain(rest).map(|(node, _)| node));
        Ok(count)
    }

    /// How many rows the graph works on, from shapes alone.
    fn rows(&self, b: &mut GraphBuilder, total: &str) -> Rows {
        let most = b.int64s("most", &[1], &[self.size as i64 - 1]);
        let [zero, one, minus_one] = [("zero", 0), ("one", 1), ("minus_one", -1)].map(|(n, x)| b.int64s(n, &[1], &[x]));
        let fed = self.inputs.first().map_or("", |i| i.name.as_str());
        let shape = b.node("Shape", &[fed]).output("shape");
        let tokens = b.node("Gather", &[&shape, &one]).output("tokens");
        let total = b.cast(total, DataType::Int64, "total");
        let total = b.node("Reshape", &[&total, &minus_one]).output("total_alone");
        let single = b.node("Equal", &[&tokens, &one]).output("single");
        let past = b.node("Sub", &[&total, &one]).output("past");
        let behind = b.node("Greater", &[&past, &zero]).output("behind");
        let step = b.node("And", &[&single, &behind]).output("step");
        let short = b.node("Less", &[&past, &most]).output("short");
        let again = b.node("Where", &[&short, &past, &most]).output("again");
        let again = b.node("Where", &[&step, &again, &zero]).output("rows_again");
        let from = b.node("Sub", &[&most, &again]).output("from");
        let prompt = b.node("Where", &[&step, &zero, &minus_one]).output("prompt");
        let retro_length = b.cast(&prompt, DataType::Int32, "retro_length");
        let choice = b.node("Where", &[&step, &zero, &one]).output("choice");
        let choice_end = b.node("Add", &[&choice, &one]).output("choice_end");
        Rows {
            tokens,
            from,
            retro_length,
            choice: [choice, choice_end],
        }
    }

    /// How many tokens are fed again, `[B]`, and what the next call has to know of it, from the state.
    fn counts(&self, b: &mut GraphBuilder, rows: &Rows, lengths: &str) -> Counts {
        let [zero, one, most] =
            [("none", 0), ("single_32", 1), ("most_32", self.size as i32 - 1)].map(|(n, x)| b.int32s(n, &[1], &[x]));
        let column = b.int64s("column", &[2], &[-1, 1]);
        let flat = b.int64s("flat", &[1], &[-1]);
        let axis = b.int64s("axis", &[1], &[1]);
        let now = cut(b, PAST_WINDOW, [0, 1], "kept_count");
        let valid = cut(b, PAST_WINDOW, [1, 2], "kept_valid");
        let newest = b.node("Reshape", &[lengths, &column]).output("newest");
        // As many tokens before this call's one as there were after the last: the host has not gone back.
        let goes_on = b.node("Equal", &[&valid, &newest]).output("goes_on");
        let now = b.node("Where", &[&goes_on, &now, &zero]).output("count_column");
        let more = b.node("Add", &[&now, &one]).output("count_and_one");
        let room = b.node("Less", &[&more, &most]).output("room");
        let more = b.node("Where", &[&room, &more, &most]).output("count_after_step");
        // After a prompt, none. A difference, so that it is made where the counts are.
        let none = b.node("Sub", &[&now, &now]).output("count_after_prompt");
        let both = b.node("Concat", &[&more, &none]).int("axis", 1).output("counts_after");
        let [start, end] = &rows.choice;
        Counts {
            next: b.node("Slice", &[&both, start, end, &axis]).output("next_count"),
            valid: b.node("Add", &[&newest, &one]).output("valid"),
            now: b.node("Reshape", &[&now, &flat]).output("count"),
        }
    }

    /// The rows of an input that the graph works on, and those to keep: a value to be added to the state, or none where they are an
    /// output of their own.
    fn feed(&self, b: &mut GraphBuilder, rows: &Rows, of: &TokenInput) -> Option<String> {
        let kept = self.size as i64 - 1;
        let what = of.name.as_str();
        let past = if of.is_embeds() {
            PAST_WINDOW_EMBEDS.to_owned()
        } else {
            let before = self.inputs.iter().take_while(|i| i.name != of.name);
            let at = 2 + kept * before.filter(|i| !i.is_embeds()).count() as i64;
            let kept = cut(b, PAST_WINDOW, [at, at + kept], &format!("kept_{what}"));
            b.cast(&kept, of.data_type, &format!("past_{what}"))
        };
        let all = b.node("Concat", &[&past, what]).int("axis", 1);
        let all = all.output(&format!("all_{what}"));
        let end = b.int64s("end", &[1], &[i64::MAX]);
        let axis = b.int64s("axis", &[1], &[1]);
        let newest = b.int64s("newest_rows", &[1], &[-kept]);
        let fed = b.node("Slice", &[&all, &rows.from, &end, &axis]);
        fed.named(&of.fed, &[&of.fed]);
        if of.is_embeds() {
            let node = b.fresh_name("present_embeds");
            let keep = b.node("Slice", &[&all, &newest, &end, &axis]);
            keep.named(&node, &[PRESENT_WINDOW_EMBEDS]);
            return None;
        }
        let keep = b.node("Slice", &[&all, &newest, &end, &axis]);
        let keep = keep.output(&format!("keep_{what}"));
        Some(b.cast(&keep, DataType::Int32, &format!("present_{what}")))
    }

    /// Where all rows' logits come back, those of the rows that the host fed. Other outputs that have a row a token are refused.
    fn cut_logits(
        &self,
        graph: &mut GraphProto,
        b: &mut GraphBuilder,
        tokens: &str,
        logits: &Logits,
    ) -> Result<(), Error> {
        let all = matches!(logits, Logits::All(_));
        for output in &graph.output {
            let is_logits = output.name() == LOGITS;
            let dims = output.dims().unwrap_or_default();
            let rows = dims.get(1).and_then(Dimension::symbol).filter(|s| !s.is_empty());
            let has_rows = rows.is_some() && rows == self.symbol.as_deref();
            if (is_logits && all && dims.len() != 3) || (!is_logits && has_rows) {
                return Err(Error::WindowOutput(output.name().to_owned()));
            }
        }
        if !all {
            return Ok(());
        }
        let Some(place) = graph.node.iter().position(|n| n.output.iter().any(|o| o == LOGITS)) else {
            return Err(Error::WindowOutput(LOGITS.to_owned()));
        };
        let every = b.fresh_name("every_logits");
        for name in graph
            .node
            .iter_mut()
            .flat_map(|n| n.input.iter_mut().chain(&mut n.output))
        {
            if name == LOGITS {
                name.clone_from(&every);
            }
        }
        let zero = b.int64s("zero", &[1], &[0]);
        let end = b.int64s("end", &[1], &[i64::MAX]);
        let axis = b.int64s("axis", &[1], &[1]);
        let from = b.node("Sub", &[&zero, tokens]).output("from_end");
        let name = b.fresh_name("logits");
        let slice = b.node("Slice", &[&every, &from, &end, &axis]);
        slice.named(&name, &[LOGITS]);
        graph.node.splice(place + 1..place + 1, b.take_nodes());
        let declared = graph.output.iter_mut().find(|o| o.name() == LOGITS);
        if let Some(tokens) = declared.and_then(ValueInfoProto::dims_mut).and_then(|d| d.get_mut(1)) {
            *tokens = TOKENS_FED.into();
        }
        Ok(())
    }

    /// Declares the state.
    fn declare_state(&self, graph: &mut GraphProto) {
        let kept = self.size as i64 - 1;
        let batch = self
            .inputs
            .first()
            .and_then(|i| i.dims.first().cloned())
            .unwrap_or_default();
        let ints = self.inputs.iter().filter(|i| !i.is_embeds()).count() as i64;
        let dims = [batch.clone(), (2 + kept * ints).into()];
        graph
            .input
            .push(ValueInfoProto::tensor(PAST_WINDOW, DataType::Int32, dims.clone()));
        graph
            .output
            .push(ValueInfoProto::tensor(PRESENT_WINDOW, DataType::Int32, dims));
        if let Some(embeds) = self.inputs.iter().find(|i| i.is_embeds()) {
            let hidden = embeds.dims.last().cloned().unwrap_or_default();
            let value =
                |name| ValueInfoProto::tensor(name, embeds.data_type, [batch.clone(), kept.into(), hidden.clone()]);
            graph.input.push(value(PAST_WINDOW_EMBEDS));
            graph.output.push(value(PRESENT_WINDOW_EMBEDS));
        }
    }
}

const LOGITS: &str = "logits";

/// Values that are made from shapes.
struct Rows {
    /// S, `[1]`.
    tokens: String,
    /// The first row that is fed, of those kept and those that the host feeds: int64 `[1]`.
    from: String,
    /// 0 in a step, else -1: int32 `[1]`.
    retro_length: String,
    /// Bounds of the first of two columns in a step, else of the second.
    choice: [String; 2],
}

/// Values that are made from the state.
struct Counts {
    /// Tokens that this call feeds again, if it is a step: int32 `[B]`.
    now: String,
    /// The same of the next call: `[B, 1]`.
    next: String,
    /// Valid tokens after this call: `[B, 1]`.
    valid: String,
}

/// Columns of a value `[B, N]`.
fn cut(b: &mut GraphBuilder, from: &str, [start, end]: [i64; 2], base: &str) -> String {
    let [start, end, axis] =
        [("column_start", start), ("column_end", end), ("column_axis", 1)].map(|(n, x)| b.int64s(n, &[1], &[x]));
    b.node("Slice", &[from, &start, &end, &axis]).output(base)
}

/// Lets nodes, and those of their subgraphs, read what is fed instead of the inputs.
fn read_instead(nodes: &mut [NodeProto], inputs: &[TokenInput]) {
    for node in nodes {
        for name in &mut node.input {
            if let Some(input) = inputs.iter().find(|i| i.name == *name) {
                name.clone_from(&input.fed);
            }
        }
        for graph in subgraphs_mut(node) {
            read_instead(&mut graph.node, inputs);
        }
    }
}
