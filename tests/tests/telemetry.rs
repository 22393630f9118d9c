//! ONNX Runtime's wheels record telemetry in the user's cache folder. The programs forbid it before the library loads.

use std::{fs, path::Path, process::Command};

use retro_tests::{not_tested, paths, zoo};

/// ONNX Runtime records nothing where one of these says that a build server runs it.
const BUILD_SERVERS: [&str; 12] = [
    "APPVEYOR",
    "BUILDKITE",
    "BUILD_ID",
    "CI",
    "CIRCLECI",
    "CODEBUILD_BUILD_ID",
    "GITHUB_ACTIONS",
    "GITLAB_CI",
    "JENKINS_URL",
    "TEAMCITY_VERSION",
    "TF_BUILD",
    "TRAVIS",
];

/// A program that thinks that `home` is the user's, and whose environment says nothing about telemetry.
fn program(name: &str, home: &Path, telemetry: Option<&str>) -> Command {
    let mut command = Command::new(paths::command(name));
    command.env("HOME", home).env("ORT_DYLIB_PATH", paths::onnxruntime());
    let own = [
        "XDG_CACHE_HOME",
        "XDG_CONFIG_HOME",
        "XDG_DATA_HOME",
        "ORT_DISABLE_TELEMETRY",
    ];
    for variable in own.iter().chain(&BUILD_SERVERS) {
        command.env_remove(variable);
    }
    if let Some(value) = telemetry {
        command.env("ORT_DISABLE_TELEMETRY", value);
    }
    command
}

/// Runs it; gives the names of what lies in `home` afterwards.
fn left(mut command: Command, home: &Path) -> Vec<String> {
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    let entries = fs::read_dir(home).unwrap();
    entries
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .collect()
}

#[test]
fn the_users_home_stays_empty() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    zoo::runnable("optimum-llama-fp32", &path("source"));
    for telemetry in [None, Some("")] {
        let home = path(&format!("home-{}", telemetry.is_some()));
        fs::create_dir(&home).unwrap();
        let mut export = program("retro-export", &home, telemetry);
        export.arg(path("source")).arg("-o").arg(path("converted"));
        export.args(["--force", "--verify"]);
        assert_eq!(left(export, &home), [""; 0]);
        let mut inspect = program("retro-export", &home, telemetry);
        inspect.arg("inspect").arg(path("converted"));
        assert_eq!(left(inspect, &home), [""; 0]);
        let mut bench = program("retro-run", &home, telemetry);
        bench.arg("bench").arg("-m").arg(path("converted"));
        bench.args(["-p", "0", "-n", "1", "-d", "8", "-r", "1"]);
        assert_eq!(left(bench, &home), [""; 0]);
    }
}

/// Without it, the test above could not fail.
#[test]
fn a_value_of_the_users_own_stays() {
    let library = fs::read(paths::onnxruntime()).unwrap();
    let knows = |name: &[u8]| library.windows(name.len()).any(|bytes| bytes == name);
    if !knows(b"ORT_DISABLE_TELEMETRY") {
        not_tested("what ONNX Runtime records: this one records no telemetry");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::create_dir(path("home")).unwrap();
    zoo::runnable("optimum-llama-fp32", &path("source"));
    let mut export = program("retro-export", &path("home"), Some("0"));
    export
        .arg(path("source"))
        .arg("-o")
        .arg(path("converted"))
        .arg("--verify");
    let left = left(export, &path("home"));
    assert!(!left.is_empty(), "ORT_DISABLE_TELEMETRY=0 is the user's word");
}
