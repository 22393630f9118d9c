//! The table of real exports: what each became, and how far it is from its original. `zoo [FOLDER...]`: folders that hold one
//! folder with a model.onnx for each case; without any, those of tests/data.
//!
//! Build the workspace first (make build) and set ORT_DYLIB_PATH=$(scripts/onnxruntime). RETRO_TEST_DEVICE=cuda compares on a GPU.

use std::{env, fs, path::Path, path::PathBuf, process::Command};

use retro_tests::{host, paths, zoo};
use serde_json::Value;

fn main() {
    let work = tempfile::tempdir().expect("a temporary folder");
    let named: Vec<PathBuf> = env::args().skip(1).map(PathBuf::from).collect();
    let mut cases: Vec<(String, PathBuf)> = Vec::new();
    let folders = if named.is_empty() {
        vec![paths::zoo("")]
    } else {
        named.clone()
    };
    for folder in folders {
        for entry in fs::read_dir(&folder)
            .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
            .flatten()
        {
            let model = entry.path().join("model.onnx");
            if model.is_file() {
                cases.push((entry.file_name().to_string_lossy().into_owned(), model));
            }
        }
    }
    if named.is_empty() {
        for entry in fs::read_dir(paths::data("zoo-graphs"))
            .expect("tests/data/zoo-graphs")
            .flatten()
        {
            let name = entry.file_name().to_string_lossy().replace(".onnx.xz", "");
            let folder = work.path().join(&name);
            fs::create_dir(&folder).expect("a folder");
            zoo::restore(&entry.path(), &folder.join("model.onnx"));
            cases.push((name, folder.join("model.onnx")));
        }
    }
    cases.sort();
    println!("| export | rule | result | w = 1 | w = 2 | w = 4 | greedy | --revert |");
    println!("|---|---|---|---:|---:|---:|---:|---|");
    let mut converted = 0;
    for (name, model) in &cases {
        let row = case(name, model, work.path());
        converted += usize::from(row.contains("| converted"));
        println!("{row}");
    }
    println!("\n{converted} of {} convert", cases.len());
}

fn case(name: &str, model: &Path, work: &Path) -> String {
    let target = work.join("converted.onnx");
    let folder = work.join("reverted");
    // Weights of another case there would not be replaced.
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).expect("a folder");
    let export = |args: &[&str], files: [&Path; 2]| {
        let mut command = Command::new(paths::command("retro-export"));
        let output = command
            .arg(files[0])
            .arg("-o")
            .arg(files[1])
            .args(args)
            .output()
            .expect("retro-export starts");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        (text, String::from_utf8_lossy(&output.stderr).trim().to_owned())
    };
    let device = host::device().to_string();
    let (text, error) = export(&["--device", &device, "--json", "--force"], [model, &target]);
    let Ok(report) = serde_json::from_str::<Value>(&text) else {
        let why = error.rsplit_once("model.onnx ").map_or(error.as_str(), |(_, why)| why);
        let why: String = why.chars().take(160).collect();
        return format!("| {name} | | refused: {} | | | | | |", why.replace('|', "/"));
    };
    let layers = report["layers"].as_array().cloned().unwrap_or_default();
    let rule = layers.iter().find_map(|l| l["rule"].as_str()).unwrap_or("");
    let modes: Vec<&str> = layers.iter().map(|l| l["mode"].as_str().unwrap_or("kept")).collect();
    let compared = report["verification"]["compared"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let skipped = report["verification"]["skipped"].as_array().map_or(0, Vec::len);
    let skipped = if skipped == 0 {
        String::new()
    } else {
        format!("; {skipped} comparisons skipped")
    };
    let worst = |window: u64| {
        let of = compared.iter().filter(|c| c["window"] == window);
        of.filter_map(|c| c["largest_difference"].as_f64())
            .fold(f64::NAN, f64::max)
    };
    let (mut same, mut all) = (0.0, 0.0);
    for c in &compared {
        let positions = c["positions"].as_f64().unwrap_or(0.0);
        same += c["greedy_agreement"].as_f64().unwrap_or(0.0) * positions;
        all += positions;
    }
    let back = folder.join("model.onnx");
    let (_, failed) = export(&["--revert", "--force"], [&target, &back]);
    let identical = failed.is_empty() && fs::read(&back).ok() == fs::read(model).ok();
    format!(
        "| {name} | {rule} | converted: {}{skipped} | {:.1e} | {:.1e} | {:.1e} | {:.0} % | {} |",
        modes.join(", "),
        worst(1),
        worst(2),
        worst(4),
        100.0 * same / f64::max(all, 1.0),
        if identical { "identical" } else { "DIFFERS" }
    )
}
