//! The golden vectors of one layer, all sets in one form. tests/data/golden/README.md says what they are.

use std::{collections::HashMap, fs, io::Read, path::Path};

use safetensors::{Dtype as Stored, SafeTensors};
use serde_json::Value;

pub use retro_attention::method::oracle::Rows;

use crate::{attrs::Attrs, paths, tensor::Dtype};

pub struct Step {
    /// Newest position.
    pub t: usize,
    pub retro: usize,
    /// `None`: as the attributes say.
    pub budget: Option<usize>,
    pub rows: Rows,
    pub output: Vec<f32>,
    /// Log-sum-exps in the output cache after the step, from this position on.
    pub lse_first: usize,
    pub lse: Vec<f32>,
    /// One ascending list a KV head.
    pub selected: Vec<Vec<usize>>,
    /// After the step, `[kv_heads][pages]`.
    pub page_steps: Vec<Vec<i32>>,
}

pub struct Case {
    pub name: String,
    pub attrs: Attrs,
    pub capacity: usize,
    pub prompt: Rows,
    pub chunks: Vec<usize>,
    /// Outputs of the prompt's last positions.
    pub prompt_output: Vec<f32>,
    /// Log-sum-exps in the output cache after the prompt, up to its last position.
    pub prompt_lse: Vec<f32>,
    pub steps: Vec<Step>,
    /// The caches' type that the numbers are for, beside others where that makes no difference.
    pub dtype: Dtype,
    /// Page bounds, `[min, max]`, and keys at the end.
    pub final_bounds: Option<[Vec<f32>; 2]>,
    pub final_key: Option<Vec<f32>>,
    /// Inputs are exact in float16.
    pub exact: bool,
    /// Absolute, in float32.
    pub output_tolerance: f32,
    /// Relative to max(1, |log-sum-exp|), in float32.
    pub lse_tolerance: f32,
}

/// A tensor of a file, numbers widened.
struct Tensor {
    shape: Vec<usize>,
    floats: Vec<f32>,
    ints: Vec<i32>,
}

/// The tensors of a safetensors file, compressed with xz if its name says so.
pub struct Tensors(HashMap<String, Tensor>);

impl Tensors {
    pub fn read(path: &Path) -> Self {
        let raw = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let bytes = if path.extension().is_some_and(|e| e == "xz") {
            let mut plain = Vec::new();
            lzma_rust2::XzReader::new(raw.as_slice(), false)
                .read_to_end(&mut plain)
                .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            plain
        } else {
            raw
        };
        let file = SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let tensor = |view: safetensors::tensor::TensorView<'_>| {
            let data = view.data();
            let words = || data.chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]);
            let (floats, ints) = match view.dtype() {
                Stored::F32 => (words().map(f32::from_le_bytes).collect(), Vec::new()),
                Stored::I32 => (Vec::new(), words().map(i32::from_le_bytes).collect()),
                Stored::I8 => (data.iter().map(|&b| f32::from(b as i8) / 64.0).collect(), Vec::new()),
                other => panic!("{}: unexpected {other:?}", path.display()),
            };
            Tensor {
                shape: view.shape().to_vec(),
                floats,
                ints,
            }
        };
        Self(
            file.iter()
                .map(|(name, view)| (name.to_owned(), tensor(view)))
                .collect(),
        )
    }

    fn get(&self, name: &str) -> &Tensor {
        self.0.get(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    pub fn floats(&self, name: &str) -> &[f32] {
        &self.get(name).floats
    }

    pub fn ints(&self, name: &str) -> &[i32] {
        &self.get(name).ints
    }

    pub fn shape(&self, name: &str) -> &[usize] {
        &self.get(name).shape
    }

    fn optional(&self, name: &str) -> Vec<f32> {
        self.0.get(name).map(|t| t.floats.clone()).unwrap_or_default()
    }
}

pub fn index(set: &str) -> Value {
    let path = paths::data(&format!("golden/{set}/index.json"));
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn number(value: &Value, key: &str) -> usize {
    value[key].as_u64().unwrap_or_else(|| panic!("{key} in {value}")) as usize
}

fn numbers(value: &Value) -> Vec<usize> {
    let items = value.as_array().expect("an array");
    items.iter().map(|n| n.as_u64().expect("a number") as usize).collect()
}

/// Pages of a padded list, `[kv_heads][pages]`.
fn lists(padded: &[i32], kv_heads: usize) -> Vec<Vec<usize>> {
    let row = |r: &[i32]| r.iter().filter(|&&page| page >= 0).map(|&page| page as usize).collect();
    padded.chunks(padded.len() / kv_heads).map(row).collect()
}

/// All cases of `exact/`, `offsets/` and `sketch/`.
pub fn all() -> Vec<Case> {
    [exact(), offsets(), sketch()].into_iter().flatten().collect()
}

pub fn exact() -> Vec<Case> {
    let index = index("exact");
    index["cases"]
        .as_array()
        .expect("cases")
        .iter()
        .map(exact_case)
        .collect()
}

/// The named cases of `exact/`.
pub fn exact_named(names: &[&str]) -> Vec<Case> {
    let cases = index("exact");
    let find = |name: &&str| {
        let of_name = |case: &&Value| case["name"] == *name;
        exact_case(
            cases["cases"]
                .as_array()
                .unwrap()
                .iter()
                .find(of_name)
                .unwrap_or_else(|| panic!("no case {name}")),
        )
    };
    names.iter().map(find).collect()
}

fn exact_case(meta: &Value) -> Case {
    let name = meta["name"].as_str().expect("a name").to_owned();
    let file = Tensors::read(&paths::data(&format!("golden/exact/{name}.safetensors.xz")));
    let mut attrs = Attrs::new(number(meta, "Hq"), number(meta, "Hkv"), number(meta, "D"));
    attrs.scale = meta["scale"].as_f64().expect("a scale") as f32;
    attrs.page = number(meta, "page");
    attrs.window = number(meta, "w");
    attrs.sink_pages = number(meta, "sink");
    let budget = &meta["budget"];
    attrs = match budget["ratio"].as_f64() {
        Some(ratio) => attrs.budget(ratio as f32, number(budget, "floor")),
        None => attrs
            .clone()
            .budget(0.0, attrs.pages(number(budget, "tokens")).max(number(budget, "floor"))),
    };
    let prompt = number(meta, "prompt");
    let (heads, kv_heads) = (attrs.heads, attrs.kv_heads);
    let offsets = file.ints("step.offset");
    let rows_of = |kind: &str, count: usize| Rows {
        count,
        query: file.floats(&format!("{kind}.q")).to_vec(),
        key: file.floats(&format!("{kind}.k")).to_vec(),
        value: file.floats(&format!("{kind}.v")).to_vec(),
    };
    let fed = rows_of("step", *offsets.last().unwrap() as usize);
    let pages = file.shape("step.page_step")[2];
    let steps = offsets.windows(2).enumerate().map(|(s, range)| {
        let (from, to) = (range[0] as usize, range[1] as usize);
        let (t, retro) = (prompt + s, to - from - 1);
        let lse = file.floats("step.lse");
        // The cache keeps the last window-1 positions: of window tokens fed, the first one's entry is gone.
        let lse_first = (t - retro).max((t + 2).saturating_sub(attrs.window));
        let selected = file.ints("step.sel");
        let width = selected.len() / file.shape("step.sel")[0];
        let valid = attrs.pages(t + 1);
        let row = |head: usize| file.ints("step.page_step")[(s * kv_heads + head) * pages..][..valid].to_vec();
        Step {
            t,
            retro,
            budget: None,
            rows: fed.slice(from, to),
            output: file.floats("step.out")[from * heads * attrs.head_size..to * heads * attrs.head_size].to_vec(),
            lse_first,
            lse: lse[(from + lse_first + retro - t) * heads..to * heads].to_vec(),
            selected: lists(&selected[s * width..][..width], kv_heads),
            page_steps: (0..kv_heads).map(row).collect(),
        }
    });
    let steps: Vec<Step> = steps.collect();
    for (step, &count) in steps.iter().zip(file.ints("step.kpages")) {
        assert!(
            step.selected.iter().all(|s| s.len() == count as usize),
            "{name}: kpages"
        );
    }
    Case {
        // Not a multiple of a page: the last page is never whole.
        capacity: prompt + steps.len() + 5,
        prompt: rows_of("prompt", prompt),
        chunks: numbers(&meta["chunks"]),
        prompt_output: file.optional("prompt.out_tail"),
        prompt_lse: file.optional("prompt.cache_lse"),
        dtype: Dtype::F32,
        final_bounds: Some(["final.kmin", "final.kmax"].map(|bound| file.floats(bound).to_vec())),
        final_key: Some(file.optional("final.k")).filter(|k| !k.is_empty()),
        exact: true,
        output_tolerance: 2e-5,
        lse_tolerance: 2e-5,
        name,
        attrs,
        steps,
    }
}

pub fn offsets() -> Vec<Case> {
    let index = index("offsets");
    let cases = index["cases"].as_array().expect("cases").iter();
    cases.map(|meta| offsets_case("offsets", meta)).collect()
}

/// The selector `sketch`, each case for one type of caches, which its centres are rounded to.
pub fn sketch() -> Vec<Case> {
    let index = index("sketch");
    let case = |meta: &Value| {
        let mut case = offsets_case("sketch", meta);
        let text = |key: &str| meta[key].as_str().unwrap_or_else(|| panic!("{key} in {}", case.name));
        case.attrs.selector = text("selector").parse().expect("a selector");
        case.attrs.group_score = text("group_score").parse().expect("a group score");
        case.dtype = match text("dtype") {
            "float16" => Dtype::F16,
            _ => Dtype::F32,
        };
        case.attrs.sketch_bits = number(meta, "sketch_bits");
        case.attrs.softcap = meta["softcap"].as_f64().expect("a softcap") as f32;
        case.attrs.local_window_size = meta["local_window_size"].as_i64().expect("a window");
        // Logits of 110 cost float32 digits: FORMAT.md.
        case.output_tolerance = if meta["options"]["lift"].is_number() {
            1e-4
        } else {
            2e-5
        };
        case
    };
    index["cases"].as_array().expect("cases").iter().map(case).collect()
}

/// A case of `offsets/`, or of another set with its layout.
fn offsets_case(set: &str, meta: &Value) -> Case {
    let name = meta["id"].as_str().expect("an id").to_owned();
    let file = Tensors::read(&paths::data(&format!("golden/{set}/{name}.safetensors.xz")));
    let mut attrs = Attrs::new(number(meta, "Hq"), number(meta, "Hkv"), number(meta, "D"));
    attrs.scale = meta["scale"].as_f64().expect("a scale") as f32;
    attrs.page = number(meta, "page");
    attrs.window = number(meta, "window");
    attrs.sink_pages = number(meta, "sink");
    let count = number(meta, "prompt");
    let width = attrs.heads * attrs.head_size;
    let tail = file.optional("prompt.q");
    let mut query = vec![0.0; count * width - tail.len()]; // by definition
    query.extend(tail);
    let prompt = Rows {
        count,
        query,
        key: file.optional("prompt.k"),
        value: file.optional("prompt.v"),
    };
    let kv_heads = attrs.kv_heads;
    let step = |(s, meta): (usize, &Value)| {
        let part = |kind: &str| format!("s{s:03}.{kind}");
        let rows = |kind: &str| file.floats(&part(kind)).to_vec();
        let (t, retro) = (number(meta, "t"), number(meta, "retro"));
        Step {
            t,
            retro,
            budget: Some(number(meta, "budget_pages")),
            rows: Rows {
                count: retro + 1,
                query: rows("q"),
                key: rows("k"),
                value: rows("v"),
            },
            output: rows("out"),
            lse_first: meta["cache_first_pos"].as_u64().map_or(t + 1, |first| first as usize),
            lse: rows("cache_L"),
            selected: lists(file.ints(&part("selected")), kv_heads),
            page_steps: file
                .ints(&part("A"))
                .chunks(number(meta, "pages"))
                .map(<[i32]>::to_vec)
                .collect(),
        }
    };
    let steps = meta["steps"]
        .as_array()
        .expect("steps")
        .iter()
        .enumerate()
        .map(step)
        .collect();
    // Shifted logits cost float32 digits: FORMAT.md.
    let shifted = meta["options"]["offset"].is_number();
    Case {
        capacity: number(meta, "capacity"),
        prompt,
        chunks: numbers(&meta["prompt_chunks"]),
        prompt_output: file.optional("prompt.out"),
        prompt_lse: file.optional("prompt.cache_L"),
        steps,
        dtype: Dtype::F32,
        final_bounds: (set == "offsets").then(|| ["final.kmin", "final.kmax"].map(|bound| file.floats(bound).to_vec())),
        final_key: None,
        exact: false,
        output_tolerance: if shifted { 1e-4 } else { 2e-5 },
        lse_tolerance: if shifted { 1e-6 } else { 2e-6 },
        name,
        attrs,
    }
}
