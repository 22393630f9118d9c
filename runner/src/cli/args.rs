//! Options that several commands share.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::{Device, OpenOptions, Runtime, runtime};

/// How many threads ONNX Runtime gets, and where the libraries are.
#[derive(Args, Clone, Debug)]
pub struct SessionArgs {
    /// Where to run: cpu, cuda or cuda:N, the GPU of that number. The models' element type is best float16 there.
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    device: Device,
    /// Replay decoding steps as a CUDA graph: less work for the host, where the graph allows it.
    #[arg(long)]
    cuda_graph: bool,
    /// Threads [default: one per core].
    #[arg(short, long, value_name = "N")]
    pub threads: Option<usize>,
    #[command(flatten)]
    libraries: LibraryArgs,
}

impl SessionArgs {
    pub fn load(&self) -> Result<(Runtime, OpenOptions)> {
        runtime::check_threads(self.threads)?;
        let (runtime, options) = self.libraries.load(self.device)?;
        let options = OpenOptions {
            threads: self.threads,
            cuda_graph: self.cuda_graph,
            ..options
        };
        Ok((runtime, options))
    }
}

/// Where the libraries are.
#[derive(Args, Clone, Debug)]
pub struct LibraryArgs {
    /// The plugin libretro_attention.so [default: $RETRO_ATTENTION_PLUGIN, else beside this program].
    #[arg(long, value_name = "PATH")]
    plugin: Option<PathBuf>,
    /// ONNX Runtime's library [default: $ORT_DYLIB_PATH, else beside this program, .cache/onnxruntime of its tree, the system's].
    #[arg(long, value_name = "PATH")]
    ort: Option<PathBuf>,
}

impl LibraryArgs {
    pub fn load(&self, device: Device) -> Result<(Runtime, OpenOptions)> {
        let plugin = runtime::find_plugin(self.plugin.as_deref())?;
        let runtime = Runtime::load_for(device, self.ort.as_deref())?;
        let options = OpenOptions {
            plugin,
            device,
            ..Default::default()
        };
        Ok((runtime, options))
    }
}
