//! `libretro_attention.so`: an ONNX Runtime plugin with the operator `ai.retro::RetroAttention`.
//!
//! Hosts load it through `RegisterCustomOps` (Python: `SessionOptions.register_custom_ops_library`). As a Rust library it
//! gives the method on plain slices ([`method`], [`cpu`]).

pub mod contract;
pub mod cpu;
pub mod cuda;
mod delegate;
pub mod host;
pub mod method;
mod ports;
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
        host::enter(base, || {
            host::register(options, c"ai.retro", |ops| {
                ops.operator::<cpu::CpuOperator<f32>>()
                    .operator::<cpu::CpuOperator<half::f16>>()
                    .operator::<cuda::CudaOperator<f32>>()
                    .operator::<cuda::CudaOperator<half::f16>>()
                    .operator::<cuda::CudaOperator<half::bf16>>()
            })
        })
    }
}

impl contract::AttributeSource for host::Info {
    fn int(&self, name: &str) -> host::Result<Option<i64>> {
        host::Info::int(self, name)
    }

    fn float(&self, name: &str) -> host::Result<Option<f32>> {
        host::Info::float(self, name)
    }

    fn string(&self, name: &str) -> host::Result<Option<String>> {
        host::Info::string(self, name)
    }

    fn has(&self, name: &str) -> host::Result<bool> {
        host::Info::has_attribute(self, name)
    }
}
