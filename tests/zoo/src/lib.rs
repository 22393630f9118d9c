//! Real exports for the tests: `tests/data/zoo.tar.xz`, unpacked once.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use lzma_rust2::XzReader;

/// The folder with one folder a case. `root` is the repository.
///
/// It lies in `target/`, named by the archive's checksum, so that another archive is another folder, and is there in
/// whole or not at all: tests run in parallel, as threads and as processes.
///
/// # Panics
///
/// The archive cannot be read, or `target/` not be written to.
pub fn folder(root: &Path) -> PathBuf {
    let archive = root.join("tests/data/zoo.tar.xz");
    unpacked(&archive, &root.join("target")).unwrap_or_else(|e| panic!("{}: {e}", archive.display()))
}

fn unpacked(archive: &Path, into: &Path) -> io::Result<PathBuf> {
    let packed = fs::read(archive)?;
    let mut checksum = flate2::Crc::new();
    checksum.update(&packed);
    let folder = into.join(format!("zoo-{:08x}", checksum.sum()));
    if folder.is_dir() {
        return Ok(folder);
    }
    fs::create_dir_all(into)?;
    let whole = tempfile::Builder::new().prefix("zoo-").tempdir_in(into)?;
    tar::Archive::new(XzReader::new(packed.as_slice(), false)).unpack(whole.path())?;
    match fs::rename(whole.path().join("zoo"), &folder) {
        // Another test was faster.
        Err(_) if folder.is_dir() => {}
        other => other?,
    }
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> &'static Path {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .unwrap()
            .parent()
            .unwrap()
    }

    #[test]
    fn many_at_once_get_one_whole_folder() {
        let target = tempfile::tempdir().unwrap();
        let archive = root().join("tests/data/zoo.tar.xz");
        let folders: Vec<PathBuf> = std::thread::scope(|scope| {
            let one = || {
                let folder = unpacked(&archive, target.path()).unwrap();
                assert!(folder.join("genai-llama-fp32-cpu/model.onnx").is_file());
                folder
            };
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(one)).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert!(folders.iter().all(|f| *f == folders[0]));
        let left = fs::read_dir(target.path()).unwrap().count();
        assert_eq!(left, 1, "nothing but the folder is left");
    }

    #[test]
    fn a_broken_archive_leaves_nothing() {
        let target = tempfile::tempdir().unwrap();
        let packed = fs::read(root().join("tests/data/zoo.tar.xz")).unwrap();
        let broken = target.path().join("broken.tar.xz");
        fs::write(&broken, &packed[..packed.len() / 2]).unwrap();
        let into = target.path().join("target");
        assert!(unpacked(&broken, &into).is_err());
        assert_eq!(fs::read_dir(&into).unwrap().count(), 0);
    }
}
