//! What a conversion costs on models of any size: `cargo run --release -p retro-export --example scale -- [FOLDER]`.
//!
//! Makes three models in FOLDER (a temporary one; it needs about 8 GB): 16 GB of external data (a sparse file), 1.9 GB inline, and
//! one so close to 2 GiB that its weights must move to a file of their own. Prints time, peak heap, and bytes written.

use prost::Message;
use retro_export::{ExternalMode, Options, Placement, convert, revert};
use retro_onnx::{
    AttributeProto, Bytes, DataLocation, DataType, Dimension, GraphProto, MAX_MODEL_BYTES, ModelProto, NodeProto,
    OperatorSetIdProto, StringStringEntryProto, TensorProto, ValueInfoProto, write_model,
};
use std::{
    alloc::{GlobalAlloc, Layout, System},
    env, fs,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::Instant,
};

/// Counts what is on the heap.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator with the same arguments; counting touches nothing else.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(now, Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const LAYERS: usize = 32;

/// A decoder in genai's form; `weights`: tensors that nothing but a MatMul reads.
fn model(weights: Vec<TensorProto>) -> ModelProto {
    let f = DataType::Float16;
    let dims = |last: i64| [Dimension::from("batch_size"), "sequence_length".into(), last.into()];
    let mut graph = GraphProto {
        name: Some("main_graph".into()),
        ..Default::default()
    };
    graph.input.push(ValueInfoProto::tensor("hidden", f, dims(4096)));
    graph.input.push(ValueInfoProto::tensor(
        "seqlens_k",
        DataType::Int32,
        ["batch_size".into()],
    ));
    graph.input.push(ValueInfoProto::tensor("total", DataType::Int32, []));
    graph.output.push(ValueInfoProto::tensor("logits", f, dims(4096)));
    let mut hidden = "hidden".to_owned();
    for layer in 0..LAYERS {
        let [past_k, past_v] = ["key", "value"].map(|kind| format!("past_key_values.{layer}.{kind}"));
        let [key, value] = ["key", "value"].map(|kind| format!("present.{layer}.{kind}"));
        for (past, present) in [(&past_k, &key), (&past_v, &value)] {
            let cache = || ["batch_size".into(), 8.into(), "past_sequence_length".into(), 128.into()];
            graph.input.push(ValueInfoProto::tensor(past, f, cache()));
            graph.output.push(ValueInfoProto::tensor(present, f, cache()));
        }
        let qkv = format!("qkv.{layer}");
        graph.node.push(NodeProto::new(
            "",
            "MatMul",
            &qkv,
            &[&hidden, &format!("w.{layer}")],
            &[&qkv],
        ));
        let out = format!("attention.{layer}");
        let inputs = [qkv.as_str(), "", "", &past_k, &past_v, "seqlens_k", "total"];
        let node = NodeProto::new(
            "com.microsoft",
            "GroupQueryAttention",
            &out,
            &inputs,
            &[&out, &key, &value],
        );
        graph.node.push(
            node.with(AttributeProto::int("num_heads", 32))
                .with(AttributeProto::int("kv_num_heads", 8)),
        );
        hidden = out;
    }
    graph
        .node
        .push(NodeProto::new("", "MatMul", "lm_head", &[&hidden, "w.0"], &["logits"]));
    graph.initializer = weights;
    ModelProto {
        ir_version: Some(10),
        opset_import: vec![
            OperatorSetIdProto::new("", 21),
            OperatorSetIdProto::new("com.microsoft", 1),
        ],
        graph: Some(graph),
        ..Default::default()
    }
}

fn external(bytes: u64) -> Vec<TensorProto> {
    let each = bytes / LAYERS as u64;
    let tensor = |layer: usize| TensorProto {
        dims: vec![4096, (each / 8192) as i64],
        data_type: Some(DataType::Float16.into()),
        name: Some(format!("w.{layer}")),
        data_location: Some(DataLocation::External.into()),
        external_data: [
            ("location", "model.onnx.data".to_owned()),
            ("offset", (layer as u64 * each).to_string()),
            ("length", each.to_string()),
        ]
        .map(|(key, value)| StringStringEntryProto::new(key, value))
        .to_vec(),
        ..Default::default()
    };
    (0..LAYERS).map(tensor).collect()
}

fn inline(zeros: &Bytes, bytes: u64) -> Vec<TensorProto> {
    let each = bytes / LAYERS as u64 / 8192 * 8192;
    let tensor = |layer: usize| {
        let raw = zeros.slice(layer * each as usize..(layer + 1) * each as usize);
        TensorProto::raw(
            &format!("w.{layer}"),
            DataType::Float16,
            &[4096, (each / 8192) as i64],
            raw,
        )
    };
    (0..LAYERS).map(tensor).collect()
}

fn measure(what: &str, source: &Path, target: &Path, external_data: Option<ExternalMode>) {
    let options = Options {
        source: source.to_owned(),
        target: Some(target.to_owned()),
        external_data,
        force: true,
        ..Options::default()
    };
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    let started = Instant::now();
    let report = convert(&options).expect("it converts");
    let (seconds, heap) = (started.elapsed().as_secs_f64(), PEAK.load(Relaxed) - before);
    let moved: u64 = report
        .external_data
        .iter()
        .filter(|e| e.how == Placement::MovedOut)
        .map(|e| e.bytes)
        .sum();
    println!(
        "| {what} | {seconds:.2} s | {:.1} MB | {:.1} MB | {:.1} MB |",
        heap as f64 / 1e6,
        report.bytes.unwrap_or(0) as f64 / 1e6,
        moved as f64 / 1e6
    );
}

fn main() {
    let own = tempfile::tempdir().expect("a temporary folder");
    let folder = env::args().nth(1).map_or_else(|| own.path().to_owned(), Into::into);
    let zeros_path = folder.join("zeros");
    let zeros = fs::File::create_new(&zeros_path).expect("a new file");
    zeros.set_len(1 << 31).expect("a sparse file");
    drop(zeros);
    let zeros = fs::File::open(&zeros_path).expect("the file");
    // SAFETY: the file is this program's own, and nobody writes to it.
    let zeros = Bytes::from_owner(unsafe { memmap2::Mmap::map(&zeros) }.expect("a mapping"));
    println!("| model | time | peak heap | model file | weights moved out |\n|---|---:|---:|---:|---:|");

    let source = folder.join("model.onnx");
    let data = fs::File::create_new(folder.join("model.onnx.data")).expect("a new file");
    data.set_len(16 << 30).expect("a sparse file");
    write_model(&model(external(16 << 30)), &source, true).expect("a model");
    measure(
        "16 GiB of external data, referred to",
        &source,
        &folder.join("out.onnx"),
        Some(ExternalMode::Reference),
    );
    fs::remove_file(folder.join("model.onnx.data")).expect("removed");

    write_model(&model(inline(&zeros, 1_900_000_000)), &source, true).expect("a model");
    let out = folder.join("out.onnx");
    // Written past the page cache, the model is on the disk only; the second time it is in memory.
    for what in ["1.9 GB inline, read from the disk", "1.9 GB inline, in the page cache"] {
        let _ = fs::remove_file(&out);
        measure(what, &source, &out, None);
    }
    // What the disk and the kernel need for as many bytes: the standard library's copy, synced.
    let _ = fs::remove_file(&out);
    let started = Instant::now();
    fs::copy(&source, &out).expect("a copy");
    let copied = fs::File::open(&out).and_then(|f| f.sync_all());
    copied.expect("synced");
    println!(
        "| that file copied and synced, for comparison | {:.2} s | | | |",
        started.elapsed().as_secs_f64()
    );

    // As large as protobuf allows: what a conversion adds is too much.
    write_model(&model(inline(&zeros, (1 << 31) - 400_000)), &source, true).expect("a model");
    measure("2 GiB inline less 0.4 MB", &source, &out, None);
    let mut larger = model(inline(&zeros, (1 << 31) - 300_000));
    let room = MAX_MODEL_BYTES - larger.encoded_len() - 16;
    larger.doc_string = Some("x".repeat(room));
    write_model(&larger, &source, true).expect("a model");
    measure("2 GiB inline less a few bytes", &source, &out, None);
    let back = folder.join("back.onnx");
    let started = Instant::now();
    revert(&out, None, &back, None, true).expect("it goes back");
    let (a, b) = (
        fs::metadata(&source).expect("the source").len(),
        fs::metadata(&back).expect("the original").len(),
    );
    println!(
        "\nthe last one's original restored in {:.2} s: {}",
        started.elapsed().as_secs_f64(),
        same(&source, &back, a, b)
    );
    for name in ["zeros", "model.onnx", "out.onnx", "out.onnx.data", "back.onnx"] {
        let _ = fs::remove_file(folder.join(name));
    }
}

fn same(a: &Path, b: &Path, a_len: u64, b_len: u64) -> &'static str {
    let map = |p: &Path| {
        let file = fs::File::open(p).expect("a file");
        // SAFETY: both files are this program's own, and nobody writes to them now.
        unsafe { memmap2::Mmap::map(&file) }.expect("a mapping")
    };
    if a_len == b_len && map(a)[..] == map(b)[..] {
        "identical"
    } else {
        "DIFFERENT"
    }
}
