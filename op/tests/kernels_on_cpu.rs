//! The CUDA kernels of selector `sketch`, compiled for the CPU with as much of CUDA as they use
//! (`kernels_on_cpu/cuda_on_cpu.h`), against docs/method.md in doubles: what they compute is checked without a GPU. How
//! they behave in time is not.
//!
//! Needs a C++ compiler that has `_Float16`: `$CXX`, or `c++`.

use std::path::Path;
use std::process::Command;
use std::{env, fs};

/// Every head size of the program's list twice.
const CASES: &str = "28";

#[test]
fn sketches_are_scored_as_the_method_says() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (source, kernels) = (here.join("tests/kernels_on_cpu"), here.join("src/cuda/kernels"));
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels_on_cpu");
    fs::create_dir_all(&folder).unwrap();
    let program = folder.join("sketch");
    let compiler = env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let compiled = Command::new(&compiler)
        .args([
            "-O2",
            "-std=c++17",
            "-fno-strict-aliasing",
            "-Wno-unknown-pragmas",
            "-include",
        ])
        .arg(source.join("cuda_on_cpu.h"))
        .args([&source, &kernels].map(|folder| format!("-I{}", folder.display())))
        // params.cuh and selectors.cuh, which the build script writes.
        .arg(concat!("-I", env!("OUT_DIR")))
        .args(["sketch.cpp", "cuda_on_cpu.cpp"].map(|file| source.join(file)))
        .arg("-o")
        .arg(&program)
        .output()
        .unwrap_or_else(|e| panic!("{compiler} (set CXX to a C++ compiler): {e}"));
    assert!(
        compiled.status.success(),
        "{}",
        String::from_utf8_lossy(&compiled.stderr)
    );
    let run = Command::new(&program).args(["1", CASES]).output().unwrap();
    let lines = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success(), "{lines}{}", String::from_utf8_lossy(&run.stderr));
    assert_eq!(lines.lines().count().to_string(), CASES, "{lines}");
}
