//! Link flags, the kernels' header params.cuh, and their machine code where nvcc is found.

/// What both sides must agree on; this file compiles it to write the kernels' half.
#[path = "../src/cuda/abi.rs"]
#[allow(dead_code, reason = "the plugin uses the rest")]
mod abi;
#[path = "../src/cuda/matmul_abi.rs"]
#[allow(dead_code, reason = "the plugin uses the rest")]
mod matmul_abi;
mod params;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const KERNELS: &str = "src/cuda/kernels";
/// Machine code for these, and PTX for what comes after.
const ARCHITECTURES: [&str; 4] = ["80", "86", "89", "90"];

fn main() {
    println!("cargo:rerun-if-changed=build");
    println!("cargo:rerun-if-changed=src/cuda/abi.rs");
    println!("cargo:rerun-if-changed=src/cuda/matmul_abi.rs");
    // ORT unloads a plugin after its last session. Code that a thread pool or a late destructor may still reach, and
    // the operator tables that we hand out for good, must outlive that.
    if env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    }

    println!("cargo:rerun-if-changed={KERNELS}");
    println!("cargo:rerun-if-env-changed=RETRO_NVCC");
    println!("cargo:rerun-if-env-changed=RETRO_CUDA_ARCH");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    println!("cargo:rustc-check-cfg=cfg(retro_fatbin)");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    write(&out.join("params.cuh"), &params::header());
    write(&out.join("selectors.cuh"), &params::selectors());
    write(&out.join("selectors.rs"), &params::selector_sources());
    match nvcc() {
        Some(nvcc) => {
            compile(&nvcc, &out);
            println!("cargo:rustc-cfg=retro_fatbin");
        }
        None => println!(
            "cargo:warning=no nvcc: the plugin's CUDA kernels will be compiled by NVRTC when first used (RETRO_NVCC names an nvcc; \
             docs/cuda.md)"
        ),
    }
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap_or_else(|e| panic!("{} cannot be written: {e}", path.display()));
}

/// `$RETRO_NVCC` ("" means none), the one on the path, `$CUDA_HOME`'s, the usual place, or one fetched into
/// .cache/cuda.
fn nvcc() -> Option<PathBuf> {
    if let Some(given) = env::var_os("RETRO_NVCC") {
        if given.is_empty() {
            return None;
        }
        let given = PathBuf::from(given);
        assert!(given.is_file(), "RETRO_NVCC names no file: {}", given.display());
        return Some(given);
    }
    let on_path = env::var_os("PATH").map(|p| env::split_paths(&p).map(|d| d.join("nvcc")).collect::<Vec<_>>());
    let home = env::var_os("CUDA_HOME").map(|h| Path::new(&h).join("bin/nvcc"));
    let fetched = Path::new("../.cache/cuda/nvidia/cu13/bin/nvcc");
    let usual = PathBuf::from("/usr/local/cuda/bin/nvcc");
    let mut all = on_path
        .unwrap_or_default()
        .into_iter()
        .chain(home)
        .chain([usual, fetched.to_owned()]);
    all.find(|p| p.is_file())
}

/// Compiles the kernels into `out`, which has params.cuh.
fn compile(nvcc: &Path, out: &Path) {
    let target = &out.join("retro.fatbin");
    let mut command = Command::new(nvcc);
    command
        .args(["-fatbin", "-O3", "-std=c++17", "--threads", "0", "-I", KERNELS, "-I"])
        .arg(out)
        .arg("-o")
        .arg(target);
    // For developers, who build often for one device.
    if let Some(only) = env::var_os("RETRO_CUDA_ARCH").and_then(|a| a.into_string().ok()) {
        command.arg(format!("-gencode=arch=compute_{only},code=sm_{only}"));
    } else {
        for architecture in ARCHITECTURES {
            command.arg(format!("-gencode=arch=compute_{architecture},code=sm_{architecture}"));
        }
        command.arg("-gencode=arch=compute_90,code=compute_90");
    }
    command.arg(Path::new(KERNELS).join("retro.cu"));
    let done = command
        .output()
        .unwrap_or_else(|e| panic!("{} does not run: {e}", nvcc.display()));
    let log = String::from_utf8_lossy(&done.stderr).into_owned() + &String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success(), "{} failed:\n{log}", nvcc.display());
    assert!(
        fs::metadata(target).is_ok_and(|m| m.len() > 0),
        "{} made nothing",
        nvcc.display()
    );
}
