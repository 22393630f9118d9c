//! Weights that nobody needs any more once a model was replaced.

use super::{copied_weights::copied_weights, paths::same_path};
use crate::spill::SPILLED;
use retro_onnx::{ExternalFile, LoadedModel, folder_of, locations, read_model};
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// Weights that were written, copied or linked for the model at `target`, which is replaced by one that needs `new` and
/// has its own in `spill_name`, and that no other *.onnx of the folder names. Other files are not opened.
pub fn stale(target: &Path, new: &[ExternalFile], spill_name: &str) -> Vec<PathBuf> {
    stale_by(target, new, spill_name, &|path| read_model(path).ok())
}

fn stale_by(
    target: &Path,
    new: &[ExternalFile],
    spill_name: &str,
    read: &dyn Fn(&Path) -> Option<LoadedModel>,
) -> Vec<PathBuf> {
    let folder = folder_of(target);
    let Some(old) = read(target) else {
        return Vec::new();
    };
    let named = locations(&old.model);
    let mut own: BTreeSet<PathBuf> = copied_weights(&old.model).into_keys().collect();
    own.extend(old.model.metadata(SPILLED).map(PathBuf::from));
    own.retain(|name| named.contains(name));
    own.retain(|name| *name != Path::new(spill_name) && new.iter().all(|f| f.location != *name));
    if own.is_empty() {
        return Vec::new();
    }
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let models = entries.flatten().map(|e| e.path());
    for path in models.filter(|path| path.extension().is_some_and(|e| e == "onnx") && !same_path(path, target)) {
        match read(&path) {
            Some(model) => {
                let named = locations(&model.model);
                own.retain(|name| !named.contains(name));
            }
            // What it needs is not known.
            None => return Vec::new(),
        }
    }
    own.into_iter().map(|name| folder.join(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::gqa_model;
    use prost::Message;
    use std::cell::RefCell;

    #[test]
    fn only_models_are_opened() {
        let folder = tempfile::tempdir().unwrap();
        let mut model = gqa_model(1);
        crate::spill::spill_above(&mut model, "old.data", 9000);
        for name in ["model.onnx", "other.onnx", "model.onnx.bak", "movie.mkv", "old.data"] {
            fs::write(folder.path().join(name), model.encode_to_vec()).unwrap();
        }
        fs::write(folder.path().join("other.onnx"), gqa_model(1).encode_to_vec()).unwrap();
        let opened = RefCell::new(Vec::new());
        let read = |path: &Path| {
            opened.borrow_mut().push(path.file_name().unwrap().to_owned());
            read_model(path).ok()
        };
        let found = stale_by(&folder.path().join("model.onnx"), &[], "new.data", &read);
        assert_eq!(found, [folder.path().join("old.data")]);
        assert_eq!(*opened.borrow(), ["model.onnx", "other.onnx"]);
    }
}
