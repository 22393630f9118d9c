//! `libretro_attention.so`: an ONNX Runtime plugin with the operators `ai.retro::RetroAttention` and
//! `ai.retro::MatMulNBits`.
//!
//! Hosts load it through `RegisterCustomOps` (Python: `SessionOptions.register_custom_ops_library`). As a Rust library
//! it gives the method on plain slices ([`method`], [`cpu`]).

pub mod contract;
pub mod cpu;
pub mod cuda;
mod gqa_fallback;
mod io_spec;
pub mod matmul_nbits;
pub mod method;
pub mod ort;
pub mod selector;
pub mod simd;

/// Entry point of the plugin: adds the operators to a session's options.
///
/// # Safety
/// Called by ONNX Runtime with its session options and its `OrtApiBase`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn RegisterCustomOps(
    options: *mut ort_sys::OrtSessionOptions,
    base: *const ort_sys::OrtApiBase,
) -> ort_sys::OrtStatusPtr {
    // SAFETY: ORT's promise, passed on.
    unsafe {
        ort::enter(base, || {
            ort::register(options, c"ai.retro", |ops| {
                ops.operator::<cpu::CpuOperator<f32>>()
                    .operator::<cpu::CpuOperator<half::f16>>()
                    .operator::<cpu::CpuOperator<f32, u8>>()
                    .operator::<cpu::CpuOperator<half::f16, u8>>()
                    .operator::<matmul_nbits::CpuMatMulNBits<f32, u8>>()
                    .operator::<matmul_nbits::CpuMatMulNBits<f32, f32>>()
                    .operator::<matmul_nbits::CpuMatMulNBits<half::f16, u8>>()
                    .operator::<matmul_nbits::CpuMatMulNBits<half::f16, half::f16>>()
                    .operator::<cuda::CudaOperator<f32>>()
                    .operator::<cuda::CudaOperator<half::f16>>()
                    .operator::<cuda::CudaOperator<half::bf16>>()
                    .operator::<cuda::CudaOperator<f32, u8>>()
                    .operator::<cuda::CudaOperator<half::f16, u8>>()
                    .operator::<cuda::CudaOperator<half::bf16, u8>>()
                    .operator::<cuda::CudaMatMulNBits<half::f16, u8>>()
                    .operator::<cuda::CudaMatMulNBits<half::f16, half::f16>>()
                    .operator::<cuda::CudaMatMulNBits<half::bf16, u8>>()
                    .operator::<cuda::CudaMatMulNBits<half::bf16, half::bf16>>()
            })
        })
    }
}

impl contract::AttributeSource for ort::Info {
    fn int(&self, name: &str) -> ort::Result<Option<i64>> {
        ort::Info::int(self, name)
    }

    fn float(&self, name: &str) -> ort::Result<Option<f32>> {
        ort::Info::float(self, name)
    }

    fn string(&self, name: &str) -> ort::Result<Option<String>> {
        ort::Info::string(self, name)
    }

    fn has(&self, name: &str) -> ort::Result<bool> {
        ort::Info::has_attribute(self, name)
    }
}
