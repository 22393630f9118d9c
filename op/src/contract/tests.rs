use std::collections::HashMap;

use retro_contract::{GroupScore, Mode, Selector, input};
use smallvec::smallvec;

use super::*;
use crate::ort::Result;

#[derive(Default)]
struct Node {
    ints: HashMap<&'static str, i64>,
    floats: HashMap<&'static str, f32>,
    strings: HashMap<&'static str, &'static str>,
}

impl Node {
    fn names(&self) -> impl Iterator<Item = &str> {
        let names = self.ints.keys().chain(self.floats.keys()).chain(self.strings.keys());
        names.copied()
    }
}

impl AttributeSource for Node {
    fn int(&self, name: &str) -> Result<Option<i64>> {
        Ok(self.ints.get(name).copied())
    }
    fn float(&self, name: &str) -> Result<Option<f32>> {
        Ok(self.floats.get(name).copied())
    }
    fn string(&self, name: &str) -> Result<Option<String>> {
        Ok(self.strings.get(name).map(|s| (*s).to_owned()))
    }
    fn has(&self, name: &str) -> Result<bool> {
        Ok(self.names().any(|n| n == name))
    }
}

#[test]
fn attributes_of_other_operators_and_slips_are_named() {
    let bad = |i: &[(&'static str, i64)]| message(Attributes::read(&node(i)));
    assert!(bad(&[("smooth_softmax", 1)]).contains("attribute smooth_softmax is not one of RetroAttention's"));
    for (slip, meant) in [
        ("page_sze", "page_size"),
        ("widnow", "window"),
        ("sink_page", "sink_pages"),
        ("num_headss", "num_heads"),
    ] {
        let error = bad(&[(slip, 1)]);
        assert!(
            error.contains(&format!("attribute {slip} is not")) && error.contains(&format!("is {meant} meant?")),
            "{error}"
        );
    }
}

fn node(ints: &[(&'static str, i64)]) -> Node {
    let mut n = Node::default();
    n.ints.extend([("num_heads", 4), ("kv_num_heads", 2)]);
    n.ints.extend(ints.iter().copied());
    n
}

fn attributes(ints: &[(&'static str, i64)]) -> Attributes {
    Attributes::read(&node(ints)).unwrap()
}

fn message<T: std::fmt::Debug>(r: Result<T>) -> String {
    r.unwrap_err().message().to_owned()
}

#[test]
fn defaults_are_the_papers() {
    let a = attributes(&[]);
    assert_eq!((a.page_size, a.window, a.budget_min_pages, a.sink_pages), (16, 2, 4, 1));
    assert_eq!(
        (a.selector, a.group_score, a.mode),
        (Selector::Bounds, GroupScore::Max, Mode::Retro)
    );
    assert_eq!((a.scale, a.softcap, a.local_window, a.ring()), (None, 0.0, None, 1));
    assert_eq!(a.budget_ratio, 0.15, "the decimal, not the float's value");
}

#[test]
fn each_bad_attribute_is_named() {
    let bad = |i: &[(&'static str, i64)]| message(Attributes::read(&node(i)));
    assert!(bad(&[("page_size", 12)]).contains("page_size is 12"));
    assert!(bad(&[("page_size", 2)]).contains("page_size is 2, expected 4..128"));
    assert!(bad(&[("sketch_bits", 0)]).contains("sketch_bits is 0, expected 1..2"));
    assert!(bad(&[("sketch_bits", 3)]).contains("sketch_bits is 3, expected 1..2"));
    assert!(bad(&[("window", 0)]).contains("window is 0, expected 1..64"));
    assert!(bad(&[("window", 65)]).contains("window is 65"));
    assert!(bad(&[("kv_num_heads", 3)]).contains("multiple of kv_num_heads (3)"));
    assert!(bad(&[("local_window_size", 0)]).contains("local_window_size is 0"));
    assert!(bad(&[("do_rotary", 2)]).contains("do_rotary is 2"));
    assert!(message(Attributes::read(&Node::default())).contains("num_heads is missing"));
    let mut n = node(&[]);
    n.strings.insert("selector", "median");
    assert_eq!(
        message(Attributes::read(&n)),
        format!(
            "attribute selector is \"median\", expected one of: {}",
            Selector::VALUES.join(", ")
        )
    );
    let sketch = |page_size| {
        let mut n = node(&[("page_size", page_size)]);
        n.strings.insert("selector", "sketch");
        Attributes::read(&n)
    };
    assert_eq!(sketch(1).unwrap().sketch_bits, 2);
    assert!(message(sketch(256)).contains("page_size is 256, expected 1..128"));
    let mut n = node(&[]);
    n.floats.insert("budget_ratio", f32::NAN);
    assert!(message(Attributes::read(&n)).contains("budget_ratio is NaN"));
}

fn shapes() -> InputShapes {
    let mut s: InputShapes = Default::default();
    s[input::QUERY] = Some(smallvec![2, 3, 4 * 8]);
    s[input::KEY] = Some(smallvec![2, 3, 2 * 8]);
    s[input::VALUE] = Some(smallvec![2, 3, 2 * 8]);
    s[input::PAST_KEY] = Some(smallvec![2, 2, 40, 8]);
    s[input::PAST_VALUE] = Some(smallvec![2, 2, 40, 8]);
    s[input::SEQLENS_K] = Some(smallvec![2]);
    s[input::TOTAL_SEQUENCE_LENGTH] = Some(smallvec![]);
    s[input::RETRO_LENGTH] = Some(smallvec![1]);
    s[input::PAST_PAGE_SUMMARY] = Some(smallvec![2, 2, 3, 2, 8]);
    s[input::PAST_PAGE_STEPS] = Some(smallvec![2, 2, 3]);
    s[input::PAST_OUTPUTS] = Some(smallvec![2, 3, 4, 8]);
    s[input::PAST_LSE] = Some(smallvec![2, 3, 4]);
    s
}

#[test]
fn shapes_are_read_and_each_wrong_one_is_named() {
    let a = attributes(&[("window", 4)]);
    let d = Dims::read(&a, &shapes(), 4).unwrap();
    assert_eq!(
        (d.batch, d.tokens, d.capacity, d.pages, d.head_size, d.packed),
        (2, 3, 40, 3, 8, false)
    );
    for slot in 0..input::COUNT {
        let mut s = shapes();
        if s[slot].is_none() {
            continue;
        }
        s[slot] = Some(smallvec![7, 7, 7, 7]);
        let m = message(Dims::read(&a, &s, 4));
        assert!(m.contains(&format!("input {}", input::NAMES[slot])), "slot {slot}: {m}");
        assert!(m.contains("[7, 7, 7, 7]") && m.contains("expected"), "{m}");
    }
    let mut s = shapes();
    s[input::VALUE] = None;
    assert!(message(Dims::read(&a, &s, 4)).contains("input value is missing"));
    let rotary = attributes(&[("window", 4), ("do_rotary", 1)]);
    assert!(message(Dims::read(&rotary, &shapes(), 4)).contains("input cos_cache is missing"));
}

#[test]
fn sketches_are_bytes_a_block() {
    let mut n = node(&[("window", 4), ("sketch_bits", 1)]);
    n.strings.insert("selector", "sketch");
    let a = Attributes::read(&n).unwrap();
    let mut s = shapes();
    s[input::PAST_PAGE_SUMMARY] = Some(smallvec![2, 2, 1, 128 * 3 + 16]);
    Dims::read(&a, &s, 2).unwrap();
    let wrong = message(Dims::read(&a, &s, 4));
    assert!(
        wrong.contains("expected [B, Hkv, ceil(C/128), Z = 128*(D*sketch_bits/8 + 2) + D*sizeof(T)] = [2, 2, 1, 416]"),
        "{wrong}"
    );
    // A head of 12 elements is no whole number of bytes in one bit each.
    for (slot, sizes) in [(input::PAST_KEY, [2, 2, 40, 12]), (input::PAST_VALUE, [2, 2, 40, 12])] {
        s[slot] = Some(sizes.into_iter().collect());
    }
    s[input::QUERY] = Some(smallvec![2, 3, 48]);
    s[input::KEY] = Some(smallvec![2, 3, 24]);
    s[input::VALUE] = Some(smallvec![2, 3, 24]);
    let wrong = message(Dims::read(&a, &s, 2));
    assert!(
        wrong.contains("head size 12") && wrong.contains("sketch_bits is 1") && wrong.contains("multiple of 8"),
        "{wrong}"
    );
}

fn plan(retro: &[i32], seqlens: &[i32], tokens: usize, total: i32, budget: Option<&[i32]>) -> Result<CallPlan> {
    let a = attributes(&[("window", 4)]);
    let dims = Dims {
        tokens,
        ..Dims::read(&a, &shapes(), 4).unwrap()
    };
    let lengths = CallLengths {
        seqlens_k: seqlens,
        total_sequence_length: total,
        retro_length: retro,
        page_budget: budget,
        retro_count: None,
    };
    CallPlan::read(&a, &dims, &lengths)
}

/// A call of a node with room for a window of four, which reads how many tokens are retrospective from retro_count.
fn counted(retro: i32, counts: &[i32], seqlens: &[i32], tokens: usize) -> Result<CallPlan> {
    let a = attributes(&[("window", 4), ("step_rows", 4)]);
    let dims = Dims {
        tokens,
        ..Dims::read(&a, &shapes(), 4).unwrap()
    };
    let lengths = CallLengths {
        seqlens_k: seqlens,
        total_sequence_length: 40,
        retro_length: &[retro],
        page_budget: None,
        retro_count: Some(counts),
    };
    CallPlan::read(&a, &dims, &lengths)
}

#[test]
fn a_step_may_feed_more_rows_than_count() {
    let fed = |p: CallPlan| {
        let rows = p.sequences.iter().map(|s| (s.fed, s.first_position()));
        (p.phase, rows.collect::<Vec<_>>())
    };
    let step = |counts: &[i32]| fed(counted(0, counts, &[9, 20], 4).unwrap());
    assert_eq!(step(&[0]), (Phase::Decode, vec![(1, 9), (1, 20)]));
    assert_eq!(step(&[3, 1]), (Phase::Decode, vec![(4, 6), (2, 19)]));
    // A text shorter than the window feeds fewer rows.
    let short = fed(counted(0, &[0, 1], &[1, 2], 2).unwrap());
    assert_eq!(short, (Phase::Decode, vec![(1, 1), (2, 1)]));
    // A prompt's counts are left over from steps, and a text of one token has no step before it.
    let prompt = fed(counted(-1, &[3, 99], &[3, 3], 4).unwrap());
    assert_eq!(prompt, (Phase::Prefill, vec![(4, 0), (4, 0)]));
    assert_eq!(counted(0, &[0], &[0, 0], 4).unwrap().phase, Phase::Prefill);
    // Without counts retro_length says it, for any number of rows up to step_rows.
    let a = attributes(&[("window", 4), ("step_rows", 6)]);
    assert_eq!(Phase::of_call(&a, 6, &[2, 0], false).unwrap(), Phase::Decode);
    assert!(message(Phase::of_call(&a, 7, &[2, 0], false)).contains("feeds 3 tokens, but query has 7"));

    let wrong = |counts: &[i32], seqlens: &[i32], tokens| message(counted(0, counts, seqlens, tokens));
    assert!(wrong(&[4], &[9, 9], 4).contains("retro_count[0] is 4, expected 0..3 (window 4, 4 tokens fed)"));
    assert!(wrong(&[0, 2], &[9, 9], 2).contains("retro_count[1] is 2, expected 0..1"));
    assert!(wrong(&[-1], &[9, 9], 4).contains("retro_count[0] is -1"));
    assert!(wrong(&[0, 3], &[9, 2], 4).contains("retro_count[1] is 3, but the cache of the sequence holds 2 tokens"));
    assert!(message(Attributes::read(&node(&[("window", 4), ("step_rows", 3)]))).contains("step_rows is 3"));
    let mut s = shapes();
    s[input::RETRO_COUNT] = Some(smallvec![2]);
    let plain = attributes(&[("window", 4)]);
    assert!(message(Dims::read(&plain, &s, 4)).contains("retro_count is there, and attribute step_rows is 0"));
    s[input::RETRO_COUNT] = Some(smallvec![3]);
    assert!(message(Dims::read(&a, &s, 4)).contains("input retro_count has shape [3]"));
}

#[test]
fn state_may_be_sized_and_shaped_by_its_host() {
    let a = attributes(&[("window", 4)]);
    let with = |slot: usize, shape: &[i64]| {
        let mut s = shapes();
        s[input::PAST_PAGE_STEPS] = Some(smallvec![2, 2, 5]);
        s[input::PAST_PAGE_SUMMARY] = Some(smallvec![2, 2, 5, 2, 8]);
        s[slot] = Some(shape.iter().copied().collect());
        Dims::read(&a, &s, 4)
    };
    for (slot, shape) in [
        (input::PAST_PAGE_STEPS, &[2, 1, 10][..]),
        (input::PAST_PAGE_STEPS, &[2, 10]),
        (input::PAST_PAGE_STEPS, &[2, 2, 5, 1]),
        (input::PAST_PAGE_SUMMARY, &[2, 2, 10, 8]),
        (input::PAST_PAGE_SUMMARY, &[2, 1, 160]),
        (input::PAST_OUTPUTS, &[2, 1, 3 * 4 * 8]),
        (input::PAST_OUTPUTS, &[2, 3, 32]),
        (input::PAST_LSE, &[2, 1, 12]),
    ] {
        assert_eq!(with(slot, shape).unwrap().pages, 5, "{shape:?}");
    }
    for (slot, shape) in [
        (input::PAST_PAGE_STEPS, &[2, 2, 2][..]),
        (input::PAST_PAGE_STEPS, &[1, 2, 10]),
        (input::PAST_PAGE_STEPS, &[2, 5, 2]),
        (input::PAST_PAGE_STEPS, &[2, 9]),
        (input::PAST_PAGE_STEPS, &[2]),
        (input::PAST_PAGE_STEPS, &[2, -2, -5]),
        (input::PAST_PAGE_SUMMARY, &[2, 2, 6, 2, 8]),
        (input::PAST_PAGE_SUMMARY, &[2, 2, 16, 5]),
        (input::PAST_OUTPUTS, &[2, 4, 4, 8]),
        (input::PAST_OUTPUTS, &[2, 4, 3, 8]),
        (input::PAST_LSE, &[2, 4, 3]),
    ] {
        let m = message(with(slot, shape));
        assert!(
            m.contains(&format!("input {} has shape", input::NAMES[slot])),
            "{shape:?}: {m}"
        );
    }
    // Sketches have blocks of their own number.
    let mut n = node(&[("window", 4), ("sketch_bits", 1)]);
    n.strings.insert("selector", "sketch");
    let a = Attributes::read(&n).unwrap();
    let mut s = shapes();
    s[input::PAST_PAGE_SUMMARY] = Some(smallvec![2, 2, 7, 128 * 3 + 16]);
    let dims = Dims::read(&a, &s, 2).unwrap();
    assert_eq!((dims.pages, dims.blocks, dims.cache_size(&a).capacity), (3, 7, 7 * 128));
    s[input::PAST_PAGE_SUMMARY] = Some(smallvec![2, 2, 7, 128 * 3 + 15]);
    assert!(message(Dims::read(&a, &s, 2)).contains("or more of its third dimension"));
}

#[test]
fn a_call_is_prefill_or_a_step_or_an_error() {
    assert_eq!(plan(&[-1], &[2, 9], 3, 10, None).unwrap().phase, Phase::Prefill);
    assert_eq!(plan(&[0], &[2, 9], 3, 10, None).unwrap().phase, Phase::Prefill);
    assert_eq!(
        plan(&[0], &[0, 0], 1, 1, None).unwrap().phase,
        Phase::Prefill,
        "an empty cache"
    );
    assert_eq!(plan(&[0], &[4, 9], 1, 40, None).unwrap().phase, Phase::Decode);
    let p = plan(&[2, 0], &[9, 9], 3, 10, None).unwrap();
    assert_eq!(
        p.sequences
            .iter()
            .map(|s| (s.fed, s.first_position()))
            .collect::<Vec<_>>(),
        [(3, 7), (1, 9)]
    );
    let p = plan(&[-1], &[1, 9], 3, 10, None).unwrap();
    assert_eq!(p.sequences[0].fed, 2, "a prompt shorter than S is padded on the left");

    assert!(message(plan(&[2], &[9, 9], 2, 10, None)).contains("feeds 3 tokens, but query has 2"));
    assert!(message(plan(&[4], &[9, 9], 5, 10, None)).contains("retro_length is 4, expected -1 (prefill) or 0..3"));
    assert!(message(plan(&[-1, 1], &[9, 9], 2, 10, None)).contains("mixes -1 (prefill) with 1"));
    assert!(message(plan(&[2], &[1, 9], 3, 10, None)).contains("holds 1 tokens before"));
    assert!(message(plan(&[0], &[40, 9], 1, 50, None)).contains("seqlens_k[0] is 40, expected 0..39"));
    assert!(message(plan(&[0], &[-1, 9], 1, 50, None)).contains("seqlens_k[0] is -1"));
    assert!(message(plan(&[0], &[4, 9], 1, 9, None)).contains("total_sequence_length is 9, expected at least 10"));
    assert!(message(plan(&[0], &[4, 9], 1, 10, Some(&[1, -2]))).contains("page_budget[1] is -2"));
}

#[test]
fn budgets_come_from_the_input_or_the_attributes() {
    let k = |b: Option<&[i32]>| {
        plan(&[0], &[39, 9], 1, 40, b)
            .unwrap()
            .sequences
            .iter()
            .map(|s| s.budget)
            .collect::<Vec<_>>()
    };
    assert_eq!(k(None), [3, 1], "the floor of 4 pages is cut at the valid pages");
    assert_eq!(k(Some(&[0, 0])), [3, 1]);
    assert_eq!(k(Some(&[2, 9])), [2, 1]);
    assert_eq!(k(Some(&[2])), [2, 1]);
}
