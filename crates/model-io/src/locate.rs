//! Which graph a path stands for.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
};

use crate::{GENAI_CONFIG, config_files::Genai, error::Error, json};

/// Where repositories of transformers.js keep their graphs, below the configuration and the tokenizer.
const BELOW: &str = "onnx";
/// Files that make a folder a model's folder.
const CONFIGURATION: [&str; 3] = [GENAI_CONFIG, "config.json", "tokenizer.json"];
/// Folders between a graph and the genai_config.json that names it.
const MAX_ABOVE: usize = 4;
/// How transformers.js calls the types of graphs whose names say something else.
const ALIASES: [(&str, &str); 2] = [("fp32", "model"), ("q8", "model_quantized")];

/// A graph, and the folder that its configuration and tokenizer are read from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// The ONNX file.
    pub graph: PathBuf,
    /// The folder that was named, or, for a file, its own folder or the model's folder above it.
    pub folder: PathBuf,
    /// The path named is a folder.
    pub by_folder: bool,
    /// The folder holds genai_config.json, config.json or tokenizer.json.
    pub configured: bool,
}

/// Finds the graph that a file or folder stands for: in a folder, the one that `choice` names by its file or variant;
/// else the one that genai_config.json names, else model.onnx, else the only *.onnx; if it holds none, the only one of
/// its folder `onnx`.
///
/// # Errors
/// There is none, it isn't clear which, or what names it is damaged.
pub fn locate(path: &Path, choice: Option<&str>) -> Result<Located, Error> {
    let meta = fs::metadata(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => Error::NotFound(path.to_owned()),
        _ => Error::Read {
            path: path.to_owned(),
            source,
        },
    })?;
    let (graph, folder) = if meta.is_dir() {
        let graph = match choice {
            Some(choice) => choose(path, choice)?,
            None => only(path)?,
        };
        (graph, folder_of_graphs(path)?)
    } else {
        // Opening a pipe would wait for whoever writes to it.
        if !meta.is_file() {
            return Err(Error::NotAFile(path.to_owned()));
        }
        if let Some(choice) = choice {
            return Err(Error::ChoiceOfFile {
                file: path.to_owned(),
                choice: choice.to_owned(),
            });
        }
        let own = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        (path.to_owned(), folder_of_graphs(own)?)
    };
    Ok(Located {
        configured: is_configured(&folder),
        graph,
        folder,
        by_folder: meta.is_dir(),
    })
}

/// The graphs of a folder, in order of name: its own; those of its folder `onnx`; the one that its genai_config.json
/// names, and those beside that. Links to folders are not followed.
///
/// # Errors
/// The folder can't be read, or its genai_config.json is damaged or names a graph outside.
pub fn graphs(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut all = files(folder)?;
    all.extend(below(folder)?);
    if let Some(graph) = configured_graph(folder)?
        && !all.contains(&graph)
    {
        let beside = graph.parent().map(files).transpose()?.unwrap_or_default();
        all.extend(beside.into_iter().filter(|g| *g != graph));
        all.push(graph);
    }
    all.sort();
    all.dedup();
    Ok(all)
}

/// The graph of a folder where none was chosen.
fn only(folder: &Path) -> Result<PathBuf, Error> {
    if let Some(graph) = configured_graph(folder)? {
        return Ok(graph);
    }
    let usual = folder.join("model.onnx");
    if usual.is_file() {
        return Ok(usual);
    }
    let mut found = files(folder)?;
    if found.is_empty() {
        found = below(folder)?;
    }
    if found.len() > 1 {
        return Err(Error::SeveralGraphs {
            folder: folder.to_owned(),
            graphs: found,
        });
    }
    found.pop().ok_or_else(|| Error::NoGraph(folder.to_owned()))
}

/// The graph of a folder that `choice` names: its path within the folder, its file's name with or without `.onnx`, or
/// its variant, which is what stands behind the last `model_`, or behind any `_`.
fn choose(folder: &Path, choice: &str) -> Result<PathBuf, Error> {
    let all = graphs(folder)?;
    if all.is_empty() {
        return Err(Error::NoGraph(folder.to_owned()));
    }
    let stem = |graph: &PathBuf| graph.file_stem().map(|s| s.to_string_lossy().into_owned());
    let is_stem = |graph: &PathBuf, wanted: &str| stem(graph).is_some_and(|s| s == wanted);
    let exact = folder.join(choice);
    let with_suffix = folder.join(format!("{choice}.onnx"));
    let named = choice.strip_suffix(".onnx").unwrap_or(choice);
    let alias = ALIASES.iter().find(|(name, _)| *name == choice).map(|(_, stem)| *stem);
    let ways: [&dyn Fn(&PathBuf) -> bool; 6] = [
        &|g| *g == exact,
        &|g| *g == with_suffix,
        &|g| is_stem(g, named),
        &|g| is_stem(g, &format!("model_{choice}")),
        &|g| stem(g).is_some_and(|s| s.ends_with(&format!("_{choice}")) || s.ends_with(&format!("-{choice}"))),
        &|g| alias.is_some_and(|stem| is_stem(g, stem)) && g.parent().is_some_and(|p| p.ends_with(BELOW)),
    ];
    for way in ways {
        let mut found: Vec<PathBuf> = all.iter().filter(|g| way(g)).cloned().collect();
        if found.len() > 1 {
            return Err(Error::AmbiguousChoice {
                folder: folder.to_owned(),
                choice: choice.to_owned(),
                graphs: found,
            });
        }
        if let Some(graph) = found.pop() {
            return Ok(graph);
        }
    }
    Err(Error::NoSuchGraph {
        folder: folder.to_owned(),
        choice: choice.to_owned(),
        graphs: all,
    })
}

/// The graph that model.decoder.filename of a folder's genai_config.json names; none if there is no such file or entry.
///
/// # Errors
/// The file is damaged, or names a graph that is not there or not in the folder.
pub fn configured_graph(folder: &Path) -> Result<Option<PathBuf>, Error> {
    let genai: Option<Genai> = json::read(&folder.join(GENAI_CONFIG))?;
    let Some(name) = genai.and_then(|g| g.model.decoder.filename) else {
        return Ok(None);
    };
    let folder = folder.to_owned();
    let Some(inside) = inside(&name) else {
        return Err(Error::OutsideFolder { folder, name });
    };
    let graph = folder.join(inside);
    if !graph.is_file() {
        return Err(Error::MissingGraph { folder, name });
    }
    Ok(Some(graph))
}

/// A path that goes down only.
fn inside(name: &str) -> Option<PathBuf> {
    let mut path = PathBuf::new();
    for component in Path::new(name).components() {
        match component {
            Component::Normal(part) => path.push(part),
            Component::CurDir => {}
            _ => return None,
        }
    }
    (!path.as_os_str().is_empty()).then_some(path)
}

/// The folder with the configuration of a folder's graphs: itself, unless it has none and the one above is a model's
/// folder that keeps graphs there.
fn folder_of_graphs(own: &Path) -> Result<PathBuf, Error> {
    if is_configured(own) {
        return Ok(own.to_owned());
    }
    // A bare "onnx" has its parent in the file system only.
    let Ok(resolved) = fs::canonicalize(own) else {
        return Ok(own.to_owned());
    };
    let mut above = own.to_owned();
    for folder in resolved.ancestors().skip(1).take(MAX_ABOVE) {
        above = match above.parent() {
            Some(parent) if !parent.as_os_str().is_empty() && same(parent, folder) => parent.to_owned(),
            _ => folder.to_owned(),
        };
        let direct = resolved.parent() == Some(folder);
        if direct && resolved.ends_with(BELOW) && is_configured(folder) {
            return Ok(above);
        }
        let names = |genai: Genai| {
            let mut names = genai.model.graphs().filter_map(|name| inside(&name));
            names.any(|name| folder.join(name).parent() == Some(&resolved))
        };
        // A file above that can't be read is none of this model's.
        if json::read(&folder.join(GENAI_CONFIG)).ok().flatten().is_some_and(names) {
            return Ok(above);
        }
    }
    Ok(own.to_owned())
}

fn same(a: &Path, b: &Path) -> bool {
    fs::canonicalize(a).is_ok_and(|a| a == b)
}

fn is_configured(folder: &Path) -> bool {
    CONFIGURATION.iter().any(|name| folder.join(name).is_file())
}

/// The graphs of a folder's folder `onnx`. A link to a folder is not brought along, so neither is a graph in it.
fn below(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let below = folder.join(BELOW);
    if fs::symlink_metadata(&below).is_ok_and(|m| m.is_dir()) {
        files(&below)
    } else {
        Ok(Vec::new())
    }
}

/// The *.onnx of a folder, in order of name.
fn files(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let failed = |source| Error::Read {
        path: folder.to_owned(),
        source,
    };
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|e| e == "onnx") && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for name in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, if name.ends_with("json") { "{}" } else { "" }).unwrap();
        }
        dir
    }

    fn chosen(dir: &tempfile::TempDir, choice: Option<&str>) -> Result<String, String> {
        let found = locate(dir.path(), choice).map_err(|e| e.to_string())?;
        assert_eq!(found.folder, dir.path());
        Ok(found.graph.strip_prefix(dir.path()).unwrap().display().to_string())
    }

    const JS: [&str; 6] = [
        "config.json",
        "onnx/model.onnx",
        "onnx/model_fp16.onnx",
        "onnx/model_q4.onnx",
        "onnx/model_q4f16.onnx",
        "onnx/model_quantized.onnx",
    ];

    #[test]
    fn a_graph_is_chosen_by_file_or_variant() {
        let dir = folder(&JS);
        for (choice, graph) in [
            ("model_q4f16.onnx", "onnx/model_q4f16.onnx"),
            ("onnx/model_q4f16.onnx", "onnx/model_q4f16.onnx"),
            ("onnx/model_q4", "onnx/model_q4.onnx"),
            ("model_q4", "onnx/model_q4.onnx"),
            ("q4", "onnx/model_q4.onnx"),
            ("q4f16", "onnx/model_q4f16.onnx"),
            ("fp16", "onnx/model_fp16.onnx"),
            ("quantized", "onnx/model_quantized.onnx"),
            ("q8", "onnx/model_quantized.onnx"),
            ("fp32", "onnx/model.onnx"),
            ("model", "onnx/model.onnx"),
        ] {
            assert_eq!(chosen(&dir, Some(choice)).unwrap(), graph, "{choice}");
        }
        let several = chosen(&dir, None).unwrap_err();
        assert!(
            several.contains("there are 5 ONNX models") && several.contains("onnx/model_q4.onnx, onnx/model_q4f16")
        );
        for none in [
            "int8",
            "../model.onnx",
            "/model.onnx",
            "",
            "f16",
            "model_q4f16.onnx.onnx",
        ] {
            let error = chosen(&dir, Some(none)).unwrap_err();
            assert!(
                error.contains("has no such graph") && error.contains("model_q4f16.onnx"),
                "{none}: {error}"
            );
        }
    }

    #[test]
    fn what_fits_several_is_said() {
        let dir = folder(&[
            "config.json",
            "onnx/decoder_model_merged_q4.onnx",
            "onnx/embed_tokens_q4.onnx",
            "model.onnx",
            "onnx/model.onnx",
        ]);
        let error = chosen(&dir, Some("q4")).unwrap_err();
        assert!(error.contains("onnx/decoder_model_merged_q4.onnx, onnx/embed_tokens_q4.onnx; name the file"));
        assert_eq!(
            chosen(&dir, Some("merged_q4")).unwrap(),
            "onnx/decoder_model_merged_q4.onnx"
        );
        // A path within the folder comes before a file's name.
        assert_eq!(chosen(&dir, Some("model.onnx")).unwrap(), "model.onnx");
        assert_eq!(chosen(&dir, Some("onnx/model.onnx")).unwrap(), "onnx/model.onnx");
        assert_eq!(chosen(&dir, None).unwrap(), "model.onnx");
    }

    #[test]
    fn a_file_has_its_configuration_beside_or_above() {
        let dir = folder(&JS);
        let found = locate(&dir.path().join("onnx/model_q4.onnx"), None).unwrap();
        assert_eq!(
            (found.folder.as_path(), found.configured, found.by_folder),
            (dir.path(), true, false)
        );
        assert_eq!(locate(&dir.path().join("onnx"), Some("q4")).unwrap().folder, dir.path());
        let error = locate(&dir.path().join("onnx/model_q4.onnx"), Some("q4")).unwrap_err();
        assert!(error.to_string().contains("is a file: name the folder"));
        fs::write(dir.path().join("onnx/config.json"), "{}").unwrap();
        let found = locate(&dir.path().join("onnx/model_q4.onnx"), None).unwrap();
        assert_eq!(found.folder, dir.path().join("onnx"));
        // Only a folder of that name is one for graphs.
        let dir = folder(&["config.json", "other/model.onnx"]);
        let found = locate(&dir.path().join("other/model.onnx"), None).unwrap();
        assert_eq!((found.folder, found.configured), (dir.path().join("other"), false));
    }

    #[test]
    fn genai_config_may_name_a_graph_in_a_subfolder() {
        let dir = folder(&[
            "decoder/model.onnx",
            "decoder/other.onnx",
            "vision/model.onnx",
            "embedding/e.onnx",
        ]);
        let config = |decoder: &str| {
            let text = format!(
                r#"{{"model": {{"decoder": {{"filename": "{decoder}"}}, "vision": {{"filename": "vision/model.onnx"}},
                "embedding": 3}}}}"#
            );
            fs::write(dir.path().join(GENAI_CONFIG), text).unwrap();
        };
        config("decoder/model.onnx");
        assert_eq!(chosen(&dir, None).unwrap(), "decoder/model.onnx");
        assert_eq!(chosen(&dir, Some("other")).unwrap(), "decoder/other.onnx");
        for graph in ["decoder/model.onnx", "vision/model.onnx"] {
            assert_eq!(locate(&dir.path().join(graph), None).unwrap().folder, dir.path());
        }
        // Nothing names that one.
        let embedding = dir.path().join("embedding");
        assert_eq!(locate(&embedding.join("e.onnx"), None).unwrap().folder, embedding);
        config("./decoder/model.onnx");
        assert_eq!(chosen(&dir, None).unwrap(), "decoder/model.onnx");
        for outside in [
            "../model.onnx",
            "/m/model.onnx",
            "decoder/../../m.onnx",
            "",
            ".",
            "decoder/..",
        ] {
            config(outside);
            for choice in [None, Some("other")] {
                let error = chosen(&dir, choice).unwrap_err();
                assert!(error.contains("is not a file of that folder"), "{outside:?}: {error}");
            }
        }
        config("decoder/none.onnx");
        assert!(
            chosen(&dir, None)
                .unwrap_err()
                .contains("names the model decoder/none.onnx, which is not there")
        );
        config("decoder");
        assert!(chosen(&dir, None).unwrap_err().contains("which is not there"));
    }
}
