//! `models/ledger` as a graph and in the forms that tests compare. `RETRO_TEST_ROOT` names the repository where a test was
//! carried to another machine.

use std::path::{Path, PathBuf};

use retro_export::Settings;
use retro_run::{Model, OpenOptions, Runtime, runtime::find_plugin};

/// The repository.
pub fn root() -> PathBuf {
    let built = || Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned();
    std::env::var_os("RETRO_TEST_ROOT").map_or_else(built, PathBuf::from)
}

/// A folder of models by their names.
pub struct Ledger {
    folder: tempfile::TempDir,
}

impl Ledger {
    /// The unconverted graph.
    pub const DENSE: &str = "dense";

    /// With [`Self::DENSE`] alone.
    pub fn new() -> Self {
        let made = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        let options = retro_models::Options::default();
        retro_models::build(&root().join("models/ledger"), &made.path(Self::DENSE), &options).unwrap();
        made
    }

    /// The folder of a model.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Makes a converted model, in place of one of this name.
    pub fn convert(&self, name: &str, settings: Settings) {
        retro_export::convert(&retro_export::Options {
            source: self.path(Self::DENSE),
            target: Some(self.path(name)),
            settings,
            ..Default::default()
        })
        .unwrap();
    }

    /// Opens a model, with the plugin that was built.
    pub fn open(&self, runtime: &Runtime, name: &str, options: OpenOptions) -> Model {
        let options = OpenOptions {
            plugin: find_plugin(None).unwrap(),
            ..options
        };
        Model::open(runtime, &self.path(name), &options).unwrap()
    }
}
