//! The kernels' code: machine code that nvcc made when the plugin was built, or, in a plugin built without nvcc, the source
//! compiled by NVRTC when the first node is created.

#[cfg(not(retro_fatbin))]
use std::ffi::{CStr, CString};

use crate::ort::Result;

/// Machine code for sm_80, 86, 89 and 90, and PTX for what comes after.
#[cfg(retro_fatbin)]
pub fn code(_capability: (i32, i32)) -> Result<Vec<u8>> {
    Ok(include_bytes!(concat!(env!("OUT_DIR"), "/retro.fatbin")).to_vec())
}

#[cfg(not(retro_fatbin))]
const SOURCE: &CStr = {
    match CStr::from_bytes_with_nul(concat!(include_str!("kernels/retro.cu"), "\0").as_bytes()) {
        Ok(source) => source,
        Err(_) => panic!("the kernels' source holds a NUL byte"),
    }
};

#[cfg(not(retro_fatbin))]
macro_rules! headers {
    (from $folder:expr, $($name:literal),+) => {
        &[$(($name, include_str!(concat!($folder, $name)))),+]
    };
}

/// What the kernels include, by the names that they include it by.
#[cfg(not(retro_fatbin))]
const HEADERS: [&[(&str, &str)]; 3] = [
    headers!(
        from "kernels/",
        "ptx.cuh",
        "common.cuh",
        "mma.cuh",
        "page_rows.cuh",
        "score_output.cuh",
        "page_vectors.cuh",
        "sketch_rows.cuh",
        "sketch_score.cuh",
        "score_kernel.cuh",
        "cluster.cuh",
        "select_shared.cuh",
        "select_scores.cuh",
        "select.cuh",
        "finish.cuh",
        "attend_rows.cuh",
        "attend.cuh",
        "attend_f32.cuh",
        "merge.cuh",
        "prefill.cuh",
        "matmul_codes.cuh",
        "matmul_nbits.cuh",
        "matmul_dequantised.cuh"
    ),
    headers!(from concat!(env!("OUT_DIR"), "/"), "params.cuh", "selectors.cuh"),
    include!(concat!(env!("OUT_DIR"), "/selectors.rs")),
];

/// Compiles the kernels for a device of compute capability `major.minor`.
#[cfg(not(retro_fatbin))]
pub fn code((major, minor): (i32, i32)) -> Result<Vec<u8>> {
    use crate::ort::Error;
    use cudarc::nvrtc::sys::{
        is_culib_present, nvrtcCompileProgram, nvrtcCreateProgram, nvrtcDestroyProgram, nvrtcGetCUBIN,
        nvrtcGetCUBINSize, nvrtcGetProgramLog, nvrtcGetProgramLogSize, nvrtcProgram, nvrtcResult,
    };
    use std::ptr;

    // SAFETY: only looks for the library.
    if !unsafe { is_culib_present() } {
        return Err(Error::runtime(
            "this RetroAttention plugin was built without nvcc, and NVRTC (libnvrtc.so), which would compile its CUDA \
             kernels now, is not installed: install it, or build the plugin where nvcc is found",
        ));
    }
    let check = |what: &str, result: nvrtcResult| match result {
        nvrtcResult::NVRTC_SUCCESS => Ok(()),
        e => Err(Error::runtime(format!("{what} failed: {e:?}"))),
    };
    let texts: Vec<CString> = HEADERS
        .into_iter()
        .flatten()
        .flat_map(|(name, text)| [*text, *name])
        .map(|s| CString::new(s).map_err(|_| Error::runtime("the kernels' source holds a NUL byte")))
        .collect::<Result<_>>()?;
    let texts_of = |offset: usize| -> Vec<_> { texts.iter().skip(offset).step_by(2).map(|t| t.as_ptr()).collect() };
    let (bodies, names) = (texts_of(0), texts_of(1));
    let options = [
        format!("--gpu-architecture=sm_{major}{minor}"),
        "--std=c++17".to_owned(),
        // Lambdas with `auto` parameters count as host functions otherwise.
        "-default-device".to_owned(),
    ]
    .map(|o| CString::new(o).unwrap_or_default());
    let options = options.each_ref().map(|o| o.as_ptr());
    let mut program: nvrtcProgram = ptr::null_mut();
    // SAFETY: every string outlives the calls; the program is destroyed once, after its last use.
    unsafe {
        check(
            "nvrtcCreateProgram",
            nvrtcCreateProgram(
                &mut program,
                SOURCE.as_ptr(),
                c"retro.cu".as_ptr(),
                names.len() as i32,
                bodies.as_ptr(),
                names.as_ptr(),
            ),
        )?;
        let compiled = check(
            "nvrtcCompileProgram",
            nvrtcCompileProgram(program, options.len() as i32, options.as_ptr()),
        );
        let result = compiled
            .map_err(|e| {
                let mut size = 0;
                let mut log = Vec::new();
                if nvrtcGetProgramLogSize(program, &mut size) == nvrtcResult::NVRTC_SUCCESS {
                    log.resize(size, 0u8);
                    nvrtcGetProgramLog(program, log.as_mut_ptr().cast());
                }
                Error::runtime(format!("{e}\n{}", String::from_utf8_lossy(&log).trim_end_matches('\0')))
            })
            .and_then(|()| {
                let mut size = 0;
                check("nvrtcGetCUBINSize", nvrtcGetCUBINSize(program, &mut size))?;
                let mut image = vec![0u8; size];
                check("nvrtcGetCUBIN", nvrtcGetCUBIN(program, image.as_mut_ptr().cast()))?;
                Ok(image)
            });
        nvrtcDestroyProgram(&mut program);
        result
    }
}

#[cfg(all(test, not(retro_fatbin)))]
mod tests {
    use super::super::kernel_set::names;

    /// `.ci/run` fetches NVRTC, which needs no GPU, and runs this.
    #[test]
    #[ignore = "needs libnvrtc.so"]
    fn nvrtc_compiles_the_kernels() {
        for capability in [(8, 0), (9, 0)] {
            let code = super::code(capability).unwrap_or_else(|e| panic!("{capability:?}: {e}"));
            assert!(code.starts_with(b"\x7fELF"), "{capability:?}: no machine code");
            for name in names() {
                let symbol = [name.as_bytes(), b"\0"].concat();
                assert!(
                    code.windows(symbol.len()).any(|w| w == symbol),
                    "{capability:?}: no kernel {name}"
                );
            }
        }
    }
}
