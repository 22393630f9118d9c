//! On a GPU (`RETRO_TEST_DEVICE=cuda`): the same text as on the CPU.

use crate::support::*;

fn device() -> Option<String> {
    if on_gpu() {
        return std::env::var("RETRO_TEST_DEVICE").ok();
    }
    println!("not tested: RETRO_TEST_DEVICE does not name a GPU");
    None
}

#[test]
fn cpu_and_gpu_write_the_same_text() {
    let Some(device) = device() else { return };
    let doc = document(3);
    // Dense attention, Quest, retrospective.
    for (window, budget) in [("1", "1.0"), ("1", "0.15"), ("2", "0.15"), ("8", "0.15")] {
        let args = ["--document", &doc, "-n", "200", "--budget", budget, "--window", window];
        let on_cpu = json(&ledger_retro(), &args);
        // Steps are captured in the first two.
        for graph in [&[][..], &["--cuda-graph"], &["--no-cuda-graph"]] {
            let extra = [&["--device", device.as_str()], graph].concat();
            let on_gpu = json(&ledger_retro(), &[&args[..], &extra].concat());
            assert_eq!(
                on_cpu["tokens"], on_gpu["tokens"],
                "window {window}, budget {budget}, {extra:?}"
            );
        }
    }
}

/// Several sequences at once, in chunks, with their states laid side by side.
#[test]
fn cpu_and_gpu_answer_documents_alike() {
    let Some(device) = device() else { return };
    let spec = format!("retro={},window=4,budget=0.2", ledger_retro().display());
    let args = [
        "eval",
        "--data",
        &documents(),
        "--docs",
        "3",
        "-n",
        "60",
        "--json",
        "--run",
        &spec,
    ];
    let rows = |extra: &[&str]| -> serde_json::Value {
        let output = run(&[&args[..], extra].concat());
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{extra:?}: {errors}");
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let on_cpu = rows(&[]);
    for extra in [&["--device", &device][..], &["--device", &device, "--cuda-graph"]] {
        let on_gpu = rows(extra);
        for key in ["right", "documents"] {
            assert_eq!(on_cpu["rows"][0][key], on_gpu["rows"][0][key], "{extra:?}: {key}");
        }
        for key in ["pages_per_step", "effective_exposure"] {
            let number = |v: &serde_json::Value| v["rows"][0][key].as_f64().unwrap();
            // Where two pages score alike but for rounding, either may be read.
            let (cpu, gpu) = (number(&on_cpu), number(&on_gpu));
            assert!(
                (cpu - gpu).abs() < 2e-3 * cpu,
                "{extra:?}: {key} is {gpu} on the GPU, {cpu} on the CPU"
            );
        }
    }
}
