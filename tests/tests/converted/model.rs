//! The golden set `model`: a tiny Llama built by `retro-models`, converted by `retro-export`, decoded with given
//! tokens. The only set in which deeper layers embed corrected tokens again.

use retro_contract::{budget_pages, graph};
use retro_models::Options;
use retro_tests::{
    compare,
    decoder::Decoder,
    golden::{self, Tensors},
    paths,
};

use crate::convert::convert;

#[test]
fn teacher_forced_decoding_gives_the_golden_logits_pages_and_steps() {
    let index = golden::index("model");
    let number = |key: &str| index[key].as_u64().unwrap_or_else(|| panic!("{key}")) as usize;
    let (prompt, steps, page) = (number("prompt"), number("steps"), number("page"));
    let (ratio, floor) = (
        index["budget"]["ratio"].as_f64().unwrap(),
        index["budget"]["floor"].as_u64().unwrap() as usize,
    );
    let expected = Tensors::read(&paths::data("golden/model/expected.safetensors.xz"));
    let tokens: Vec<i64> = expected.ints("tokens").iter().map(|&t| t.into()).collect();

    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    retro_models::build(&paths::data("golden/model"), &source, &Options::default()).expect("the tiny Llama");
    for window in [1usize, 2, 4, 8] {
        let target = folder.path().join(format!("w{window}"));
        let (w, p) = (window.to_string(), page.to_string());
        let options = [
            "--window",
            &w,
            "--page-size",
            &p,
            "--sink-pages",
            "1",
            "--min-pages",
            "3",
            "--budget",
            "0.2",
            "--selector",
            "bounds",
            "--group-score",
            "max",
        ];
        convert(&source, &target, &options).expect("it converts");
        let mut model = Decoder::open(&target, true, prompt + steps + 3, page, false);
        let of = |name: &str| format!("w{window}.{name}");
        let vocabulary = model.vocabulary();
        let row = |number: usize| &expected.floats(&of("logits"))[number * vocabulary..][..vocabulary];

        let logits = model.feed(&tokens[..prompt], prompt, Some(-1), None);
        compare::assert_close(&format!("w = {window}: prompt"), &logits, row(0), 1e-3);
        let &[_, layers, kv_heads, most] = expected.shape(&of("sel")) else {
            panic!("sel")
        };
        let mut largest = 0.0f32;
        for step in 0..steps {
            let t = prompt + step;
            let retro = (window - 1).min(t);
            let budget = budget_pages(ratio, floor, t + 1, page);
            // The budget of the attributes and the same one as an input, by turns.
            let budget = (t % 2 == 0).then_some(budget);
            let logits = model.feed(&tokens[t - retro..=t], t + 1, Some(retro as i32), budget);
            let at = format!("w = {window}, t = {t}");
            for layer in 0..layers {
                let page_steps = model.state(&graph::past(layer, graph::State::PageSteps));
                for (head, steps) in page_steps.ints_ref().chunks(page_steps.shape()[2]).enumerate() {
                    let selected: Vec<i32> = (0..steps.len() as i32)
                        .filter(|&p| steps[p as usize] == t as i32)
                        .collect();
                    let expected =
                        &expected.ints(&of("sel"))[((step * layers + layer) * kv_heads + head) * most..][..most];
                    let expected: Vec<i32> = expected.iter().copied().filter(|&p| p >= 0).collect();
                    assert_eq!(selected, expected, "{at}: pages of layer {layer}, head {head}");
                }
            }
            compare::assert_close(&at, &logits, row(step + 1), 1e-3);
            largest = largest.max(compare::max_difference(&logits, row(step + 1)));
        }
        println!("model set, w = {window}: largest difference of a logit {largest:.1e}");

        let length = prompt + steps;
        let pages = length.div_ceil(page);
        for layer in 0..layers {
            let page_steps = model.state(&graph::past(layer, graph::State::PageSteps));
            let got: Vec<i32> = page_steps
                .ints_ref()
                .chunks(page_steps.shape()[2])
                .flat_map(|head| head[..pages].to_vec())
                .collect();
            let wanted = &expected.ints(&of("page_step"))[layer * kv_heads * pages..][..kv_heads * pages];
            assert_eq!(got, wanted, "w = {window}: page steps of layer {layer}");
            let keys = model.state(&format!("past_key_values.{layer}.key"));
            let &[_, _, capacity, size] = keys.shape() else {
                panic!("keys")
            };
            let got: Vec<f32> = keys
                .read()
                .chunks(capacity * size)
                .flat_map(|head| head[..length * size].to_vec())
                .collect();
            let width = kv_heads * length * size;
            let wanted = &expected.floats(&of("final_k"))[layer * width..][..width];
            compare::assert_close(&format!("w = {window}: keys of layer {layer}"), &got, wanted, 1e-3);
        }
    }
}
