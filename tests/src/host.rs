//! A real ONNX Runtime: sessions with the plugin loaded, runs through bound buffers, on the CPU or on a GPU.
//!
//! `RETRO_TEST_DEVICE=cuda` (or `cuda:N`) runs the tests on the CUDA execution provider. Tests keep their tensors on
//! the host; a run on a GPU copies them there, runs, and copies back what may have been written ([`crate::mirror`]).

use std::{
    env,
    ffi::CStr,
    ops::Deref,
    path::Path,
    ptr,
    sync::{Arc, OnceLock},
};

use ort::{
    AsPointer,
    environment::Environment,
    session::{IoBinding, Session, builder::SessionBuilder},
};
use retro_contract::Selector;
use retro_run::{Device, alone, device, gpu::Gpu};

use crate::{
    mirror, paths,
    tensor::{Dtype, Tens},
};

/// The process's environment; the first call loads ONNX Runtime.
pub fn environment() -> &'static Environment {
    static ENVIRONMENT: OnceLock<Environment> = OnceLock::new();
    ENVIRONMENT.get_or_init(|| {
        let library = paths::onnxruntime();
        if device() != Device::Cpu {
            device::preload_libraries(&library);
        }
        ort::init_from(&library)
            .map(|builder| builder.with_name("retro-tests").build())
            .unwrap_or_else(|e| panic!("{} does not load: {e}", library.display()))
            .expect("an ONNX Runtime environment")
    })
}

/// Where the tests run: `$RETRO_TEST_DEVICE`, else the CPU.
pub fn device() -> Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    *DEVICE.get_or_init(|| match env::var("RETRO_TEST_DEVICE") {
        Ok(text) => text.parse().unwrap_or_else(|e| panic!("RETRO_TEST_DEVICE: {e}")),
        Err(_) => Device::Cpu,
    })
}

pub fn on_gpu() -> bool {
    device() != Device::Cpu
}

fn gpu() -> &'static Arc<Gpu> {
    static GPU: OnceLock<Arc<Gpu>> = OnceLock::new();
    GPU.get_or_init(|| {
        environment();
        let gpu = device()
            .gpu()
            .unwrap_or_else(|e| panic!("RETRO_TEST_DEVICE={}: {e}", device()));
        gpu.expect("a GPU was asked for")
    })
}

/// The element types that the operator has on the device under test.
pub fn dtypes() -> &'static [Dtype] {
    if on_gpu() {
        &[Dtype::F32, Dtype::F16, Dtype::Bf16]
    } else {
        &[Dtype::F32, Dtype::F16]
    }
}

/// The selectors that the operator has on the device under test.
pub fn selectors() -> Vec<Selector> {
    let all = Selector::ALL.iter().copied();
    let cpu_only = |s: &Selector| match s {
        Selector::Adamas | Selector::AdamasRms => true,
        Selector::Bounds | Selector::Moments | Selector::SignedMoments | Selector::Sketch => false,
    };
    all.filter(|s| !on_gpu() || !cpu_only(s)).collect()
}

/// A session and where it runs.
pub struct Opened {
    session: Session,
    gpu: Option<&'static Arc<Gpu>>,
}

impl Deref for Opened {
    type Target = Session;

    fn deref(&self) -> &Session {
        &self.session
    }
}

fn builder(plugin: bool, device: Device) -> Result<SessionBuilder, String> {
    let builder = Session::builder(environment()).map_err(|e| e.to_string())?;
    let builder = builder.with_intra_threads(2).map_err(|e| e.to_string())?;
    let builder = device.provide(builder, false).map_err(|e| e.to_string())?;
    if plugin {
        builder
            .with_operator_library(paths::plugin())
            .map_err(|e| e.to_string())
    } else {
        Ok(builder)
    }
}

fn on(device: Device) -> Option<&'static Arc<Gpu>> {
    (device != Device::Cpu).then(gpu)
}

/// A session on a model in memory, with the plugin. On a GPU no node may fall back to the CPU.
pub fn open(model: &[u8]) -> Result<Opened, String> {
    let gpu = on(device());
    let mut builder = builder(true, device())?;
    if gpu.is_some() {
        builder = builder.with_disable_cpu_fallback().map_err(|e| e.to_string())?;
    }
    let session = alone(|| builder.commit_from_memory(model)).map_err(|e| e.to_string())?;
    Ok(Opened { session, gpu })
}

/// A session on the CPU, whatever the device under test: ONNX Runtime's own operators to compare with.
pub fn open_on_cpu(model: &[u8]) -> Result<Opened, String> {
    let mut builder = builder(true, Device::Cpu)?;
    let session = alone(|| builder.commit_from_memory(model)).map_err(|e| e.to_string())?;
    Ok(Opened { session, gpu: None })
}

/// A session on a model file. A converted one has the plugin and runs on the device under test, where attention and
/// matrix products must not fall back to the CPU; an original, there to compare with, runs on the CPU.
pub fn open_file(model: &Path, converted: bool) -> Result<Opened, String> {
    let device = if converted { device() } else { Device::Cpu };
    let gpu = on(device);
    let mut builder = builder(converted, device)?;
    let session = alone(|| builder.commit_from_file(model)).map_err(|e| e.to_string())?;
    if gpu.is_some() {
        device::left_to_cpu(&session).map_err(|e| format!("{}: {e}", model.display()))?;
    }
    Ok(Opened { session, gpu })
}

/// Runs with inputs and outputs bound to the caller's buffers. A buffer of `in_place` is bound as both.
///
/// `ort` runs a session through `&mut`; ONNX Runtime itself lets many threads run one, and so must the plugin.
pub fn run(
    opened: &Opened,
    inputs: &[(&str, &Tens)],
    outputs: &mut [(&str, &mut Tens)],
    in_place: &mut [(&str, &str, &mut Tens)],
) -> Result<(), String> {
    if let Some(gpu) = opened.gpu {
        return mirror::run(0, opened, gpu, inputs, outputs, in_place);
    }
    let mut binding = opened.create_binding().map_err(|e| e.to_string())?;
    for (name, tensor) in inputs {
        binding.bind_input(*name, tensor.value()).map_err(|e| e.to_string())?;
    }
    for (name, tensor) in outputs {
        binding
            .bind_output(*name, tensor.value_mut())
            .map_err(|e| e.to_string())?;
    }
    for (past, present, tensor) in in_place {
        binding.bind_input(*past, tensor.value()).map_err(|e| e.to_string())?;
        binding
            .bind_output(*present, tensor.value_mut())
            .map_err(|e| e.to_string())?;
    }
    run_binding(opened, &binding)
}

/// As [`run`], with every tensor so many bytes behind an address that serves any type.
pub fn run_at(
    offset: usize,
    opened: &Opened,
    inputs: &[(&str, &Tens)],
    outputs: &mut [(&str, &mut Tens)],
    in_place: &mut [(&str, &str, &mut Tens)],
) -> Result<(), String> {
    match opened.gpu {
        Some(gpu) => mirror::run(offset, opened, gpu, inputs, outputs, in_place),
        None => mirror::run_on_host(offset, opened, inputs, outputs, in_place),
    }
}

pub(crate) fn run_binding(session: &Session, binding: &IoBinding) -> Result<(), String> {
    // SAFETY: both objects are alive and belong together; OrtApi::RunWithBinding may be called from several threads on
    // one session as long as each has its own binding, and this one is borrowed here alone.
    check(unsafe { (ort::api().RunWithBinding)(session.ptr().cast_mut(), ptr::null(), binding.ptr()) })
}

/// A status of ONNX Runtime as a result.
pub(crate) fn check(status: ort_sys::OrtStatusPtr) -> Result<(), String> {
    if status.0.is_null() {
        return Ok(());
    }
    let api = ort::api();
    // SAFETY: a status that is not null is ours until released; its message lives as long as it does.
    let message = unsafe { CStr::from_ptr((api.GetErrorMessage)(status.0)) }
        .to_string_lossy()
        .into_owned();
    // SAFETY: ours, released once, not used afterwards.
    unsafe { (api.ReleaseStatus)(status.0) };
    Err(message)
}
