//! Where a model runs: the CPU, or a GPU through ONNX Runtime's CUDA execution provider. Never one instead of the
//! other.

use std::{
    collections::BTreeMap,
    ffi::{CStr, c_char},
    fmt,
    path::Path,
    ptr,
    str::FromStr,
    sync::Arc,
};

use ort::{
    AsPointer,
    ep::{self, ArenaExtendStrategy, ExecutionProvider},
    memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType},
    session::{Session, builder::SessionBuilder},
};

use crate::{Error, Result, check, gpu::Gpu};

/// Where to run: `cpu`, `cuda` or `cuda:N`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// The CPU.
    #[default]
    Cpu,
    /// The GPU of that number.
    Cuda(usize),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s.split_once(':') {
            None if s == "cpu" => Ok(Self::Cpu),
            None if s == "cuda" => Ok(Self::Cuda(0)),
            Some(("cuda", n)) if n.parse::<u8>().is_ok() => Ok(Self::Cuda(n.parse().unwrap_or_default())),
            _ => Err(format!("device {s:?}: expected cpu, cuda or cuda:N")),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(id) => write!(f, "cuda:{id}"),
        }
    }
}

impl Device {
    /// The GPU, if the device is one.
    ///
    /// # Errors
    /// When ONNX Runtime was built without CUDA, or the machine has no such GPU.
    pub fn gpu(self) -> Result<Option<Arc<Gpu>>> {
        let Self::Cuda(id) = self else { return Ok(None) };
        // The kernels were never run elsewhere.
        if !cfg!(target_os = "linux") {
            return Err(Error::NotLinux);
        }
        if !ep::CUDA::is_available()? {
            return Err(Error::NoCuda);
        }
        Gpu::open(id).map(Some)
    }

    /// Memory that sessions on this device work in.
    ///
    /// # Errors
    /// When ONNX Runtime has no allocator for it.
    pub fn allocator(self, session: &Session) -> Result<Allocator> {
        match self {
            Self::Cpu => Ok(Allocator::default()),
            Self::Cuda(_) => Ok(Allocator::new(session, self.memory()?)?),
        }
    }

    /// How ONNX Runtime names that memory.
    ///
    /// # Errors
    /// When ONNX Runtime refuses it.
    pub fn memory(self) -> Result<MemoryInfo<'static>> {
        let (device, id) = match self {
            Self::Cpu => (AllocationDevice::CPU, 0),
            Self::Cuda(id) => (AllocationDevice::CUDA, number(id)?),
        };
        Ok(MemoryInfo::new(device, id, AllocatorType::Device, MemoryType::Default)?)
    }

    /// A session's options with the execution provider of this device.
    ///
    /// # Errors
    /// When the provider does not load.
    pub fn provide(self, builder: SessionBuilder, cuda_graph: bool) -> Result<SessionBuilder> {
        let builder = builder.with_config_entry("session.record_ep_graph_assignment_info", "1")?;
        let Self::Cuda(id) = self else { return Ok(builder) };
        let id = number(id)?;
        let provider = ep::CUDA::default()
            .with_device_id(id)
            // Caches are large: an arena that doubles would take twice the memory.
            .with_arena_extend_strategy(ArenaExtendStrategy::SameAsRequested)
            // float32 means float32: ONNX Runtime would round the factors of matrix products to 10 bits.
            .with_tf32(false)
            .with_cuda_graph(cuda_graph)
            .build()
            .error_on_failure();
        builder
            .with_execution_providers([provider])
            .map_err(|e| Error::Provider(e.into()))
    }
}

/// A GPU's number as ONNX Runtime takes it.
fn number(id: usize) -> Result<i32> {
    i32::try_from(id).map_err(|_| Error::DeviceNumber(id))
}

/// Loads NVIDIA's libraries from their Python packages where ONNX Runtime's library lies among them
/// (site-packages/onnxruntime/capi and site-packages/nvidia), as `onnxruntime.preload_dlls` does. What is not there is
/// left to the system's loader.
pub fn preload_libraries(runtime: &Path) {
    let Some(packages) = runtime.ancestors().nth(3).map(|p| p.join("nvidia")) else {
        return;
    };
    let folders: Vec<_> = std::fs::read_dir(packages)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path().join("lib"))
        .filter(|p| p.is_dir())
        .collect();
    for name in ep::cuda::CUDA_DYLIBS.iter().chain(ep::cuda::CUDNN_DYLIBS) {
        if let Some(file) = folders.iter().map(|f| f.join(name)).find(|f| f.is_file()) {
            // A library that does not load is missed, and named, by whoever needs it.
            let _ = ort::util::preload_dylib(&file);
        }
    }
}

/// A node of a graph and who runs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Name of the execution provider.
    pub provider: String,
    /// The node's operator.
    pub op_type: String,
    /// The node's name.
    pub name: String,
}

impl Placed {
    /// Whether the GPU runs it.
    pub fn on_gpu(&self) -> bool {
        self.provider == ep::CUDA::NAME
    }
}

/// Which execution provider runs which node, for sessions of [`Device::provide`].
///
/// # Errors
/// When ONNX Runtime does not say.
pub fn placement(session: &Session) -> Result<Vec<Placed>> {
    let api = ort::api();
    let check = |status| check(status).map_err(Error::Placement);
    let text = |p: *const c_char| {
        if p.is_null() {
            return String::new();
        }
        // SAFETY: ONNX Runtime's strings end with 0 and live as long as the session, which is borrowed.
        unsafe { CStr::from_ptr(p) }.to_string_lossy().into_owned()
    };
    let mut placed = Vec::new();
    let (mut graphs, mut count) = (ptr::null(), 0usize);
    // SAFETY: the session is alive, and both places are ours to write.
    check(unsafe { (api.Session_GetEpGraphAssignmentInfo)(session.ptr(), &mut graphs, &mut count) })?;
    for i in 0..count {
        // SAFETY: the array has `count` elements and lives as long as the session.
        let graph = unsafe { *graphs.add(i) };
        let mut provider = ptr::null();
        // SAFETY: as above.
        check(unsafe { (api.EpAssignedSubgraph_GetEpName)(graph, &mut provider) })?;
        let (mut nodes, mut node_count) = (ptr::null(), 0usize);
        // SAFETY: as above.
        check(unsafe { (api.EpAssignedSubgraph_GetNodes)(graph, &mut nodes, &mut node_count) })?;
        for j in 0..node_count {
            // SAFETY: as above, with `node_count` elements.
            let node = unsafe { *nodes.add(j) };
            let (mut op_type, mut name) = (ptr::null(), ptr::null());
            // SAFETY: as above.
            check(unsafe { (api.EpAssignedNode_GetOperatorType)(node, &mut op_type) })?;
            // SAFETY: as above.
            check(unsafe { (api.EpAssignedNode_GetName)(node, &mut name) })?;
            placed.push(Placed {
                provider: text(provider),
                op_type: text(op_type),
                name: text(name),
            });
        }
    }
    Ok(placed)
}

/// Operators whose place is what a GPU is asked for: attention and the matrix products.
const HEAVY: [&str; 8] = [
    retro_contract::OP_TYPE,
    "GroupQueryAttention",
    "MultiHeadAttention",
    "Attention",
    "MatMul",
    "MatMulNBits",
    "Gemm",
    "QMoE",
];

/// Checks that a session on a GPU computes there, and names what it leaves to the CPU: `None` if nothing.
///
/// # Errors
/// When a node that does the work (attention, a matrix product) was given to the CPU.
pub fn left_to_cpu(session: &Session) -> Result<Option<String>> {
    let placed = placement(session)?;
    let heavy = placed
        .iter()
        .find(|n| !n.on_gpu() && HEAVY.contains(&n.op_type.as_str()));
    if let Some(node) = heavy {
        return Err(Error::NotOnGpu {
            name: node.name.clone(),
            op_type: node.op_type.clone(),
            provider: node.provider.clone(),
            advice: if node.op_type == retro_contract::OP_TYPE {
                "the plugin was built without CUDA, or the element type is not supported"
            } else {
                "convert the model's weights to float16, or use --device cpu"
            },
        });
    }
    Ok(elsewhere(&placed))
}

/// The nodes that are not on the GPU, counted by operator, as one line: `None` if there are none.
pub fn elsewhere(placed: &[Placed]) -> Option<String> {
    let mut left: BTreeMap<&str, usize> = BTreeMap::new();
    for node in placed.iter().filter(|n| !n.on_gpu()) {
        *left.entry(&node.op_type).or_default() += 1;
    }
    let total: usize = left.values().sum();
    let list: Vec<String> = left
        .iter()
        .map(|(op, n)| if *n == 1 { (*op).to_owned() } else { format!("{n} {op}") })
        .collect();
    (total > 0).then(|| format!("{total} of {} nodes stay on the CPU: {}", placed.len(), list.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_on_the_gpu_is_counted() {
        let placed = |provider: &str, op_type: &str| Placed {
            provider: provider.into(),
            op_type: op_type.into(),
            name: String::new(),
        };
        let gpu = ep::CUDA::NAME;
        assert_eq!(elsewhere(&[placed(gpu, "MatMul")]), None);
        let cpu = "CPUExecutionProvider";
        let nodes = [
            placed(gpu, "MatMul"),
            placed(cpu, "Shape"),
            placed(cpu, "Gather"),
            placed(cpu, "Shape"),
        ];
        assert_eq!(
            elsewhere(&nodes).as_deref(),
            Some("3 of 4 nodes stay on the CPU: Gather, 2 Shape")
        );
    }

    #[test]
    fn devices_have_names() {
        for (text, device) in [
            ("cpu", Device::Cpu),
            ("cuda:0", Device::Cuda(0)),
            ("cuda:3", Device::Cuda(3)),
        ] {
            assert_eq!(text.parse(), Ok(device));
            assert_eq!(device.to_string(), text);
        }
        assert_eq!("cuda".parse(), Ok(Device::Cuda(0)));
        for bad in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "CUDA"] {
            assert!(bad.parse::<Device>().is_err(), "{bad}");
        }
    }
}
