//! Options that several commands share.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::{Device, OpenOptions, Runtime, decoder::session::Steps, runtime};

/// Device, threads and libraries of a session.
#[derive(Args, Clone, Debug)]
pub struct SessionArgs {
    /// Device to run on: cpu, cuda or cuda:N. On a GPU float16 models are fastest.
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    device: Device,
    /// Capture decoding steps as a CUDA graph and replay it, for less overhead on the host.
    #[arg(long)]
    cuda_graph: bool,
    /// Threads of ONNX Runtime's pool [default: one per core].
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
            steps: if self.cuda_graph { Steps::Captured } else { Steps::Plain },
            ..options
        };
        Ok((runtime, options))
    }
}

/// Paths of the libraries.
#[derive(Args, Clone, Debug)]
pub struct LibraryArgs {
    /// Path of the plugin libretro_attention.so [default: $RETRO_ATTENTION_PLUGIN, else beside this program].
    #[arg(long, value_name = "PATH")]
    plugin: Option<PathBuf>,
    /// Path of libonnxruntime.so [default: $ORT_DYLIB_PATH, else beside this program, in .cache/onnxruntime of a folder
    /// above it, or the system's].
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
