//! External data: weights in files beside the model. Where they are, and that they are really there.
//!
//! The format: <https://onnx.ai/onnx/repo-docs/ExternalData.html>.

use crate::{
    error::{Error, ExtentError},
    messages::*,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    fs,
    path::{Component, Path, PathBuf},
};

/// A file that a model takes weights from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalFile {
    /// Relative to the model's folder, inside it.
    pub location: PathBuf,
    /// The file, symbolic links resolved.
    pub source: PathBuf,
    /// Its length in bytes.
    pub len: u64,
}

/// The files that a model in `folder` takes weights from, in order of location.
///
/// # Errors
/// A location that leaves the folder, a file that is absent or not a regular file, or a tensor that reaches past the
/// end of its file or has another length than its shape says.
pub fn external_files(model: &ModelProto, folder: &Path) -> Result<Vec<ExternalFile>, Error> {
    let mut files: BTreeMap<PathBuf, ExternalFile> = BTreeMap::new();
    // How far into each file tensors reach, and the one that reaches farthest.
    let mut reaches: BTreeMap<PathBuf, (u64, String)> = BTreeMap::new();
    for_each_tensor(model, &mut |tensor| {
        if !tensor.is_external() {
            return Ok(());
        }
        let name = || tensor.name().to_owned();
        let location = tensor.external_entry("location");
        let location = location.ok_or_else(|| Error::NoLocation { tensor: name() })?;
        let relative = inside(location).ok_or_else(|| outside(tensor, location))?;
        let file = match files.get(&relative) {
            Some(file) => file,
            None => {
                let file = file_of(tensor, folder, &relative)?;
                files.entry(relative).or_insert(file)
            }
        };
        let end = end_of(tensor).map_err(|source| Error::Extent {
            tensor: name(),
            location: location.to_owned(),
            source,
        })?;
        let reach = reaches.entry(file.location.clone()).or_default();
        if end > reach.0 {
            *reach = (end, name());
        }
        Ok(())
    })?;
    for (location, (needed, tensor)) in reaches {
        let len = files.get(&location).map_or(0, |f| f.len);
        if needed > len {
            return Err(Error::ShortData {
                path: folder.join(location),
                len,
                needed,
                tensor,
            });
        }
    }
    Ok(files.into_values().collect())
}

/// The file that a tensor's location names.
fn file_of(tensor: &TensorProto, folder: &Path, location: &Path) -> Result<ExternalFile, Error> {
    let path = folder.join(location);
    let source = match fs::canonicalize(&path) {
        Ok(source) => source,
        Err(source) => {
            return Err(Error::MissingData {
                tensor: tensor.name().to_owned(),
                path,
                source,
            });
        }
    };
    match fs::metadata(&source) {
        Ok(meta) if meta.is_file() => Ok(ExternalFile {
            location: location.to_owned(),
            source,
            len: meta.len(),
        }),
        Ok(_) => Err(Error::DataNotAFile(path)),
        Err(source) => Err(Error::Read { path, source }),
    }
}

/// Makes sure that a model's weights are where ONNX Runtime reads them: in the model's folder, or in that of the file
/// that `path` is a link to. No file outside is opened. Whether the weights are there is not asked.
///
/// `path` is the model, `folder` its folder.
///
/// # Errors
/// A location that leaves the folder, by its name or by links.
pub fn stay_inside(model: &ModelProto, path: &Path, folder: &Path) -> Result<(), Error> {
    let linked = fs::canonicalize(path).ok();
    let linked = linked.as_deref().and_then(Path::parent).map(Path::to_owned);
    let allowed: Vec<PathBuf> = fs::canonicalize(folder).ok().into_iter().chain(linked).collect();
    let mut seen = BTreeSet::new();
    for_each_tensor(model, &mut |tensor| {
        let location = tensor.external_entry("location").filter(|_| tensor.is_external());
        let Some(location) = location.filter(|l| seen.insert((*l).to_owned())) else {
            return Ok(());
        };
        let relative = inside(location).ok_or_else(|| outside(tensor, location))?;
        let path = folder.join(relative);
        match fs::canonicalize(&path) {
            Ok(target) if !allowed.iter().any(|folder| target.starts_with(folder)) => Err(Error::LinkedOutside {
                tensor: tensor.name().to_owned(),
                path,
                target,
            }),
            _ => Ok(()),
        }
    })
}

fn outside(tensor: &TensorProto, location: &str) -> Error {
    Error::OutsideFolder {
        tensor: tensor.name().to_owned(),
        location: location.to_owned(),
    }
}

/// The location of external data as a plain relative path; none if it could leave the model's folder.
pub fn inside(location: &str) -> Option<PathBuf> {
    let mut relative = PathBuf::new();
    for component in Path::new(location).components() {
        match component {
            Component::Normal(part) => relative.push(part),
            Component::CurDir => {}
            _ => return None,
        }
    }
    (!relative.as_os_str().is_empty() && !location.contains('\0')).then_some(relative)
}

/// The locations inside its folder that a model names, whether anything is there or not.
pub fn locations(model: &ModelProto) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let Ok(()) = for_each_tensor(model, &mut |tensor| {
        found.extend(tensor.external_entry("location").and_then(inside));
        Ok::<_, Infallible>(())
    });
    found
}

/// Changes the locations of a model's external data. `names`: old location and new one.
pub fn rename_locations(model: &mut ModelProto, names: &BTreeMap<PathBuf, PathBuf>) {
    if names.is_empty() {
        return;
    }
    let mut rename = |tensor: &mut TensorProto| {
        for entry in tensor.external_data.iter_mut().filter(|e| e.key() == "location") {
            if let Some(name) = inside(entry.value()).and_then(|old| names.get(&old)) {
                entry.value = Some(name.to_string_lossy().into_owned());
            }
        }
    };
    let training = model.training_info.iter_mut();
    let training = training.flat_map(|t| t.initialization.iter_mut().chain(&mut t.algorithm));
    model
        .graph
        .iter_mut()
        .chain(training)
        .for_each(|graph| rename_in_graph(graph, &mut rename));
    for function in &mut model.functions {
        let attributes = function.node.iter_mut().flat_map(|n| &mut n.attribute);
        attributes
            .chain(&mut function.attribute_proto)
            .for_each(|a| rename_in_attribute(a, &mut rename));
    }
}

fn rename_in_graph(graph: &mut GraphProto, rename: &mut dyn FnMut(&mut TensorProto)) {
    let sparse = graph
        .sparse_initializer
        .iter_mut()
        .flat_map(|s| s.values.iter_mut().chain(&mut s.indices));
    graph.initializer.iter_mut().chain(sparse).for_each(&mut *rename);
    graph
        .node
        .iter_mut()
        .flat_map(|n| &mut n.attribute)
        .for_each(|a| rename_in_attribute(a, rename));
}

fn rename_in_attribute(a: &mut AttributeProto, rename: &mut dyn FnMut(&mut TensorProto)) {
    a.t.as_deref_mut()
        .into_iter()
        .chain(&mut a.tensors)
        .for_each(&mut *rename);
    let sparse = a.sparse_tensor.as_deref_mut().into_iter().chain(&mut a.sparse_tensors);
    sparse
        .flat_map(|s| s.values.iter_mut().chain(&mut s.indices))
        .for_each(&mut *rename);
    a.g.as_deref_mut()
        .into_iter()
        .chain(&mut a.graphs)
        .for_each(|g| rename_in_graph(g, rename));
}

/// Where a tensor's weights end in their file, in bytes.
fn end_of(tensor: &TensorProto) -> Result<u64, ExtentError> {
    let number = |key: &'static str| {
        let parse = |text: &str| {
            text.parse::<u64>().map_err(|_| ExtentError::NotANumber {
                key,
                text: text.to_owned(),
            })
        };
        tensor.external_entry(key).map(parse).transpose()
    };
    let offset = number("offset")?.unwrap_or(0);
    let length = number("length")?;
    let data_type = DataType::try_from(tensor.data_type()).unwrap_or_default();
    let dims = || tensor.dims.clone();
    let needed = data_type.bits().and_then(|bits| {
        let mut dims = tensor.dims.iter();
        let elements = dims.try_fold(1u64, |n, d| n.checked_mul(u64::try_from(*d).ok()?))?;
        Some(elements.checked_mul(bits)?.div_ceil(8))
    });
    let needed = needed.ok_or_else(|| ExtentError::NoSize {
        data_type: data_type.label(),
        dims: dims(),
    })?;
    match length {
        Some(length) if length != needed => Err(ExtentError::OtherLength {
            length,
            data_type: data_type.label(),
            dims: dims(),
            needed,
        }),
        _ => offset
            .checked_add(needed)
            .ok_or(ExtentError::PastAnyFile { offset, length: needed }),
    }
}

/// Calls `visit` with every tensor of a model: initializers, attributes, subgraphs, functions and training graphs.
///
/// # Errors
/// The first error of `visit`, which ends the walk.
pub fn for_each_tensor<E>(model: &ModelProto, visit: &mut Visit<E>) -> Result<(), E> {
    let training = model
        .training_info
        .iter()
        .flat_map(|t| t.initialization.iter().chain(&t.algorithm));
    for graph in model.graph.iter().chain(training) {
        in_graph(graph, visit)?;
    }
    for function in &model.functions {
        in_nodes(&function.node, visit)?;
        in_attributes(&function.attribute_proto, visit)?;
    }
    Ok(())
}

/// What a walk calls for each tensor.
type Visit<'v, E> = dyn FnMut(&TensorProto) -> Result<(), E> + 'v;

// Recursion is as deep as the file's nesting, which decoding bounds.
fn in_graph<E>(graph: &GraphProto, visit: &mut Visit<E>) -> Result<(), E> {
    graph.initializer.iter().try_for_each(&mut *visit)?;
    graph
        .sparse_initializer
        .iter()
        .flat_map(of_sparse)
        .try_for_each(&mut *visit)?;
    in_nodes(&graph.node, visit)
}

fn in_nodes<E>(nodes: &[NodeProto], visit: &mut Visit<E>) -> Result<(), E> {
    nodes.iter().try_for_each(|node| in_attributes(&node.attribute, visit))
}

fn in_attributes<E>(attributes: &[AttributeProto], visit: &mut Visit<E>) -> Result<(), E> {
    for a in attributes {
        a.t.as_deref().into_iter().chain(&a.tensors).try_for_each(&mut *visit)?;
        let sparse = a.sparse_tensor.as_deref().into_iter().chain(&a.sparse_tensors);
        sparse.flat_map(of_sparse).try_for_each(&mut *visit)?;
        a.g.as_deref()
            .into_iter()
            .chain(&a.graphs)
            .try_for_each(|graph| in_graph(graph, visit))?;
    }
    Ok(())
}

fn of_sparse(tensor: &SparseTensorProto) -> impl Iterator<Item = &TensorProto> {
    tensor.values.iter().chain(&tensor.indices)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(entries: &[(&str, &str)]) -> ModelProto {
        let tensor = TensorProto {
            name: Some("w".into()),
            dims: vec![4, 3],
            data_type: Some(DataType::Float.into()),
            data_location: Some(DataLocation::External.into()),
            external_data: entries
                .iter()
                .map(|(k, v)| StringStringEntryProto::new(*k, *v))
                .collect(),
            ..Default::default()
        };
        let inner = GraphProto {
            initializer: vec![tensor],
            ..Default::default()
        };
        let node = NodeProto::new("", "If", "if", &["c"], &["y"]).with(AttributeProto::graph("then_branch", inner));
        ModelProto {
            graph: Some(GraphProto {
                node: vec![node],
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// An error with its causes, as commands print it.
    fn text(error: &Error) -> String {
        let cause = std::error::Error::source(error).map(|why| format!(": {why}"));
        format!("{error}{}", cause.unwrap_or_default())
    }

    fn check(entries: &[(&str, &str)]) -> Result<Vec<ExternalFile>, String> {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("sub")).unwrap();
        fs::write(folder.path().join("sub/data"), [0; 64]).unwrap();
        external_files(&model(entries), folder.path()).map_err(|e| text(&e))
    }

    #[test]
    fn files_inside_the_folder_are_found_once() {
        let files = check(&[("location", "./sub/data"), ("offset", "16"), ("length", "48")]).unwrap();
        assert_eq!((files[0].location.as_path(), files[0].len), (Path::new("sub/data"), 64));
        assert_eq!(check(&[("location", "sub/data")]).unwrap().len(), 1);
    }

    #[test]
    fn locations_change_wherever_tensors_are() {
        let mut model = model(&[("location", "./sub/data"), ("offset", "16")]);
        rename_locations(&mut model, &BTreeMap::from([("sub/data".into(), "sub/data-2".into())]));
        assert_eq!(locations(&model), BTreeSet::from([PathBuf::from("sub/data-2")]));
    }

    #[test]
    fn locations_outside_the_folder_are_refused() {
        for location in ["/etc/passwd", "../data", "sub/../../data", "..", "", ".", "a\0b"] {
            let why = check(&[("location", location)]).unwrap_err();
            assert!(why.contains("not inside the model's folder"), "{location}: {why}");
        }
        assert!(check(&[]).unwrap_err().contains("names no file"));
        assert!(check(&[("location", "none")]).unwrap_err().contains("can't be read"));
        assert!(check(&[("location", "sub")]).unwrap_err().contains("is not a file"));
    }

    #[test]
    fn weights_that_do_not_fit_are_refused() {
        for (offset, length, what) in [
            (
                "17",
                "48",
                "sub/data has 64 bytes, but the model's weights in it need 65 (the last is tensor w)",
            ),
            ("18446744073709551615", "48", "end past any file"),
            ("-1", "48", "have offset \"-1\""),
            ("0", "47", "are 47 bytes long, but [4, 3] float32 needs 48"),
            ("0", "-48", "have length \"-48\""),
        ] {
            let why = check(&[("location", "sub/data"), ("offset", offset), ("length", length)]).unwrap_err();
            assert!(why.contains(what), "{what}: {why}");
        }
        let mut absurd = model(&[("location", "sub/data")]);
        let graph = absurd.graph.as_mut().unwrap().node[0].attribute[0].g.as_mut().unwrap();
        graph.initializer[0].dims = vec![i64::MAX, i64::MAX];
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("sub")).unwrap();
        fs::write(folder.path().join("sub/data"), [0; 64]).unwrap();
        let why = text(&external_files(&absurd, folder.path()).unwrap_err());
        assert!(why.contains("have no size"), "{why}");
    }
}
