//! A conversion from beginning to end. [`convert`] is the list of its phases:
//!
//! 1. **find** the model and check the place of the output (`source`, `files`);
//! 2. **read** it, mapped (`retro_onnx`);
//! 3. **convert** it in memory (`in_memory.rs`): validate, find attention (`rules`), choose what is converted (`choose.rs`),
//!    rewrite (`rewrite`), check the result;
//! 4. **write** it with a record of its original (`files`, `revert`);
//! 5. **compare** it with its original (`compare.rs`, `verify`).

mod choose;
mod compare;
mod error;
mod facts;
mod host;
mod in_memory;
mod options;
mod window;

pub use error::{Error, Unconvertible};
pub use host::{HostError, undo as undo_host};
pub use options::{Options, SlidingCache, Verify};

use crate::{
    files::{FolderFiles, Output, Parts, record_copied_weights, write},
    report::Report,
    revert,
    source::{Source, find_source},
    spill::spill,
};
use compare::{WrittenModel, compare_written, runtime_asked_for};
use in_memory::{ConvertedModel, convert_in_memory};
use prost::Message;
use retro_onnx::{Bytes, Content, ExternalFile, external_files, read_bytes, read_model, rename_locations};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// Converts a model and says what was done.
///
/// ```no_run
/// use retro_export::{Options, Settings, Verify, convert};
///
/// let report = convert(&Options {
///     source: "model".into(),
///     target: Some("retro".into()),
///     settings: Settings { window: 4, ..Settings::default() },
///     verify: Verify::IfPossible,
///     ..Options::default()
/// })?;
/// println!("{report}");
/// # Ok::<(), retro_export::Error>(())
/// ```
///
/// # Errors
/// The settings are out of range; the source can't be read, is an invalid ONNX model or is converted already; none of its
/// attention can be converted, or not all and `partial` is not set; the output can't be written. Nothing is written then.
/// Or a comparison that was asked for can't be made; its result is in the report, not an error.
pub fn convert(options: &Options) -> Result<Report, Error> {
    options.check()?;
    let source = find_source(&options.source, options.graph.as_deref(), options.target.as_deref())?;
    let (settings, mut host) = host::prepare(options, &source)?;
    let options = &Options {
        settings,
        ..options.clone()
    };
    let output = plan_output(&source, options)?;
    let runtime = runtime_asked_for(options)?;

    let loaded = read_model(&source.model)?;
    let mut converted = convert_in_memory(loaded, source.folder(), options)?;
    let options = &options.with_window(converted.window);
    host.add_config(options.keeps_sliding_caches())?;
    let mut external = external_files(&converted.model, source.folder())?;

    let Some(output) = output else {
        return Ok(converted.report);
    };
    converted.report.target = Some(output.model_path());
    if options.dry_run {
        return Ok(converted.report);
    }
    host.record(&mut converted.model);
    let renamed = write_output(&source, &output, &mut converted, &mut external, &host.files)?;

    let written = WrittenModel {
        source: &source,
        output: &output,
        renamed: &renamed,
        facts: &converted.facts,
        bytes: converted.bytes.len() as u64 + external.iter().map(|e| e.len).sum::<u64>(),
    };
    compare_written(&written, runtime, options, &mut converted.report)?;
    Ok(converted.report)
}

/// Converts a model that is in memory, as [`convert`] does, without a comparison. `folder` may hold files of its weights.
/// Gives the converted model's file.
///
/// # Errors
/// As [`convert`].
pub fn convert_bytes(bytes: Bytes, folder: &Path, options: &Options) -> Result<Vec<u8>, Error> {
    options.settings.check()?;
    if options.settings.host.is_some() {
        return Err(HostError::NoFolder.into());
    }
    let loaded = read_bytes(bytes, Path::new("the model"))?;
    let path = loaded.path.clone();
    let mut converted = convert_in_memory(loaded, folder, options)?;
    external_files(&converted.model, folder)?;
    record_original(&mut converted, &path)?;
    Ok(converted.model.encode_to_vec())
}

/// The place of the output; none in a dry run that names none.
fn plan_output<'s>(source: &'s Source, options: &Options) -> Result<Option<Output<'s>>, Error> {
    match &options.target {
        Some(target) => Ok(Some(Output::plan(
            source,
            target,
            options.external_data,
            options.force,
        )?)),
        None if options.dry_run => Ok(None),
        None => Err(Error::NoOutput),
    }
}

/// Writes the converted model with its record and its weights. Gives the files of weights that got another name.
fn write_output(
    source: &Source,
    output: &Output,
    converted: &mut ConvertedModel,
    external: &mut [ExternalFile],
    folder: &FolderFiles,
) -> Result<BTreeMap<PathBuf, PathBuf>, Error> {
    let renamed = output.rename_taken(external)?;
    rename_locations(&mut converted.model, &renamed);
    record_copied_weights(&mut converted.model, output, external, &renamed);
    record_original(converted, &source.model)?;
    let spilled = spill(&mut converted.model, output.spill_name(), 0);
    let parts = Parts {
        model: &Content::Model(&converted.model),
        external,
        spilled: &spilled,
        folder,
    };
    let written = write(output, &parts)?;
    let report = &mut converted.report;
    report.bytes = Some(written.bytes);
    report.external_data = written.external;
    report.files = written.files;
    report.skipped = written.skipped;
    report.graph = output.to_choose();
    Ok(renamed)
}

/// Writes into the converted model how to get its original back.
fn record_original(converted: &mut ConvertedModel, path: &Path) -> Result<(), Error> {
    revert::record(&mut converted.model, &converted.bytes).map_err(|source| Error::Record {
        path: path.to_owned(),
        source: Box::new(source),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{error::chain, settings::Settings, testing::gqa_model};
    use retro_contract::matmul_nbits;
    use retro_onnx::{AttributeProto, DataType, ModelProto, NodeProto, TensorProto, ValueInfoProto};
    use retro_runtime::Device;

    /// A decoder of one layer with caches of this type, and a product of packed weights for its lm_head.
    fn packed_model(data_type: DataType) -> Bytes {
        let mut model = gqa_model(1);
        let graph = model.graph.as_mut().unwrap();
        for value in graph
            .input
            .iter_mut()
            .chain(&mut graph.output)
            .chain(&mut graph.value_info)
        {
            if value.data_type() == Some(DataType::Float) {
                let dims = value.dims().unwrap_or_default().to_vec();
                *value = ValueInfoProto::tensor(value.name(), data_type, dims);
            }
        }
        for tensor in &mut graph.initializer {
            let count = tensor.dims.iter().product::<i64>() as usize;
            *tensor = TensorProto::raw(tensor.name(), data_type, &tensor.dims, vec![0; 2 * count].into());
        }
        let head = graph.node.last_mut().unwrap();
        head.domain = Some(matmul_nbits::SOURCE_DOMAIN.to_owned());
        head.op_type = Some(matmul_nbits::OP_TYPE.to_owned());
        head.input = [head.input(0), "codes", "scales"].map(str::to_owned).to_vec();
        let numbers = [("K", 32), ("N", 10), ("block_size", 32)];
        head.attribute = numbers.map(|(name, v)| AttributeProto::int(name, v)).to_vec();
        let tensors = [
            ("codes", DataType::Uint8, [10, 1, 16], 160),
            ("scales", data_type, [10, 1, 1], 20),
        ];
        graph.initializer.extend(tensors.map(|(name, t, dims, bytes)| {
            let dims = if name == "scales" { &dims[..2] } else { &dims };
            TensorProto::raw(name, t, dims, vec![0; bytes].into())
        }));
        model.encode_to_vec().into()
    }

    /// The operator has bfloat16 on CUDA alone, so such a model is for CUDA unless another device is named.
    #[test]
    fn a_model_of_bfloat16_is_for_cuda() {
        let replaced = |data_type, device| {
            let options = Options {
                device,
                ..Options::default()
            };
            let bytes = convert_bytes(packed_model(data_type), Path::new("."), &options).unwrap();
            let model = ModelProto::decode(bytes.as_slice()).unwrap();
            let nodes = model.graph.unwrap().node;
            nodes
                .iter()
                .any(|n| n.is(retro_contract::DOMAIN, matmul_nbits::OP_TYPE))
        };
        let (half, brain) = (DataType::Float16, DataType::Bfloat16);
        assert!(!replaced(half, None) && replaced(half, Some(Device::Cuda(1))));
        assert!(replaced(brain, None) && !replaced(brain, Some(Device::Cpu)));
    }

    #[test]
    fn a_model_with_other_state_is_fed_every_token_once() {
        let mut model = gqa_model(1);
        let graph = model.graph.as_mut().unwrap();
        let state = |name: &str| {
            let dims = ["batch_size".into(), 32.into()];
            ValueInfoProto::tensor(name, DataType::Float, dims)
        };
        graph.input.push(state("past.1.conv"));
        graph.output.push(state("present.1.conv"));
        for (op, inputs, output) in [
            ("ReduceSum", &["x"][..], "sum"),
            ("Add", &["past.1.conv", "sum"], "present.1.conv"),
        ] {
            graph.node.push(NodeProto::new("", op, output, inputs, &[output]));
        }
        let bytes = Bytes::from(model.encode_to_vec());
        let with = |window: usize| {
            let settings = Settings {
                window,
                ..Settings::default()
            };
            let options = Options {
                settings,
                ..Options::default()
            };
            convert_bytes(bytes.clone(), Path::new("."), &options)
        };
        assert!(with(1).is_ok());
        let why = chain(&with(2).expect_err("two are fed again"));
        assert!(
            why.contains("carries past.1.conv on to present.1.conv") && why.contains("convert with --window 1"),
            "{why}"
        );
    }
}
