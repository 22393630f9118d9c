//! Files that describe a model that cannot be: one clear line, and nothing written.

use retro_gguf::{TensorType, Writer};
use retro_models::Options;
use retro_tests::gguf::{SENTENCEPIECE, TINY_GGUFS};

use crate::build_file;

/// The tiny Llama with its bytes replaced, wherever they are.
fn replaced(from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let mut bytes = TINY_GGUFS[0].bytes();
    let at: Vec<usize> = (0..bytes.len() - from.len())
        .filter(|&i| bytes[i..].starts_with(from))
        .collect();
    assert!(!at.is_empty(), "{from:?}");
    for i in at {
        bytes[i..i + to.len()].copy_from_slice(to);
    }
    bytes
}

/// The bytes of a key with a u32, whose value is replaced.
fn number(key: &str, from: u32, to: u32) -> Vec<u8> {
    let entry = |value: u32| [key.as_bytes(), &4u32.to_le_bytes(), &value.to_le_bytes()].concat();
    replaced(&entry(from), &entry(to))
}

fn added(change: impl FnOnce(&mut Writer) -> &mut Writer) -> Vec<u8> {
    let mut file = TINY_GGUFS[0].writer();
    change(&mut file);
    file.finish()
}

#[test]
fn what_is_no_model_that_is_built_is_named_and_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let one = 1f32.to_le_bytes();
    for (bytes, said) in [
        (b"GGUF".to_vec(), "cut short"),
        (b"{}".to_vec(), "\"GGUF\""),
        (
            replaced(b"llama", b"gemma"),
            "\"gemma\"; those that are built are llama, mistral, qwen2",
        ),
        (number("block_count", 3, 2), "tensor blk.2.attn_k.weight that"),
        (number("block_count", 3, 4), "lack the tensor blk.3"),
        (number("block_count", 3, 0x7fff_ffff), "2147483647 layers"),
        (
            number("block_count", 3, u32::MAX),
            "block_count is missing or not a positive integer",
        ),
        (number("context_length", 512, 0x7fff_ffff), "more than 4194304"),
        (number("context_length", 512, 0), "context_length"),
        (
            number("feed_forward_length", 256, 512),
            "has shape [256, 32], the configuration makes it [512, 32]",
        ),
        (number("head_count", 2, 0), "head_count"),
        (number("head_count", 2, 3), "a part of each head"),
        (number("head_count_kv", 1, 2), "has shape"),
        (number("rope.dimension_count", 16, 8), "a part of each head"),
        (
            added(|f| f.string("llama.rope.scaling.type", "yarn")),
            "\"yarn\"; the kinds of RoPE that are built",
        ),
        (added(|f| f.f32("llama.rope.scale_linear", 0.0)), "rope.scaling.factor"),
        (added(|f| f.u32("llama.expert_count", 8)), "experts"),
        (added(|f| f.u32("split.count", 3)), "one of 3 parts"),
        (
            added(|f| f.tensor("blk.0.attn_q.bias", &[1], TensorType::F32, &one)),
            "blk.0.attn_q.bias",
        ),
        (
            added(|f| f.tensor("rope_freqs.weight", &[1], TensorType::F32, &one)),
            "rope_freqs has shape [1]",
        ),
        (
            added(|f| f.info("output.weight", &[32, 64], 10, 0)),
            "Q2_K; those that are read are F32",
        ),
        (
            replaced(b"smollm", b"amodel"),
            "\"amodel\"; those that are known are gpt-2",
        ),
        (replaced(b"gpt2", b"bert"), "\"bert\", expected"),
        (replaced("th e".as_bytes(), "th q".as_bytes()), "merge \"th q\""),
        (number("eos_token_id", 2, 64), "eos_token_id is 64, which is no token"),
        (
            replaced(b"\x03\0\0\0\0\0\0\0the", b"\x03\0\0\0\0\0\0\0th\xff"),
            "not UTF-8",
        ),
    ] {
        let error = build_file(&bytes, &out, &Options::default()).unwrap_err();
        assert!(error.contains(said) && !error.contains('\n'), "{said}: {error}");
        assert!(!out.exists(), "{said}");
    }
}

#[test]
fn a_vocabulary_that_contradicts_itself_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let whole = SENTENCEPIECE.bytes();
    let change = |from: &[u8], to: &[u8]| {
        let at = whole.windows(from.len()).position(|w| w == from).unwrap();
        let mut bytes = whole.clone();
        bytes[at..at + to.len()].copy_from_slice(to);
        bytes
    };
    for (bytes, said) in [
        (change(b"<0x41>", b"<0x42>"), "token \"<0x42>\" occurs twice"),
        (
            change(b"tokenizer.ggml.scores", b"tokenizer.ggml.scared"),
            "tokenizer.ggml.scores",
        ),
        (
            change(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokans"),
            "\"tokenizer.ggml.tokens\" is missing",
        ),
    ] {
        let error = build_file(&bytes, &out, &Options::default()).unwrap_err();
        assert!(error.contains(said) && !error.contains('\n'), "{said}: {error}");
    }
}

#[test]
fn what_is_not_there_is_named_as_it_was_given() {
    let folder = tempfile::tempdir().unwrap();
    let absent = folder.path().join("absent.gguf");
    let error = retro_models::build(&absent, &folder.path().join("out"), &Options::default()).unwrap_err();
    assert_eq!(error.to_string(), format!("cannot read {}", absent.display()));
}

/// A failure leaves an older model as it was.
#[test]
fn a_model_that_is_there_outlives_a_file_that_is_not_good() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let options = Options {
        external_threshold: 0,
        ..Options::default()
    };
    build_file(&TINY_GGUFS[0].bytes(), &out, &options).unwrap();
    let files = || {
        let entries = std::fs::read_dir(&out).unwrap().flatten();
        let mut files: Vec<_> = entries
            .map(|e| (e.file_name(), std::fs::read(e.path()).unwrap()))
            .collect();
        files.sort();
        files
    };
    let before = files();
    assert!(before.len() > 5);
    build_file(&number("block_count", 3, 4), &out, &options).unwrap_err();
    assert!(before == files());
}
