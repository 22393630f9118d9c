//! The f64 oracle of these tests against the golden vectors: the tests' own understanding of the method, without the plugin.

use retro_tests::{compare, golden, oracle::oracle, tensor::Dtype};

#[test]
fn oracle_agrees_with_every_golden_vector() {
    for case in golden::all() {
        let name = &case.name;
        let mut reference = oracle(&case.attrs, None).storing(match case.dtype {
            Dtype::F16 => |x| f64::from(Dtype::F16.round(x as f32)),
            _ => |x| f64::from(x as f32),
        });
        let mut fed = 0;
        let mut prompt = Vec::new();
        for &chunk in &case.chunks {
            prompt.extend(reference.prefill(&case.prompt.slice(fed, fed + chunk)));
            fed += chunk;
        }
        assert_eq!(fed, case.prompt.count, "{name}: chunks");
        let tail = &prompt[prompt.len() - case.prompt_output.len()..];
        compare::assert_close(&format!("{name}: prompt"), tail, &case.prompt_output, 2e-6);
        let lse: Vec<f32> = reference
            .cached()
            .into_iter()
            .flat_map(|at| reference.lse(at))
            .collect();
        compare::assert_within(&format!("{name}: prompt lse"), &lse, &case.prompt_lse, |l| {
            2e-6 * l.abs().max(1.0)
        });
        for step in &case.steps {
            let at = format!("{name}, t = {}", step.t);
            assert_eq!(reference.len(), step.t, "{at}");
            let got = reference.step(&step.rows, step.budget);
            assert_eq!(got.selected, step.selected, "{at}: pages");
            assert_eq!(reference.page_steps(), step.page_steps, "{at}: page steps");
            compare::assert_close(&at, &got.output, &step.output, 2e-6);
            let lse: Vec<f32> = (step.lse_first..=step.t).flat_map(|at| reference.lse(at)).collect();
            compare::assert_within(&format!("{at}: lse"), &lse, &step.lse, |l| 2e-6 * l.abs().max(1.0));
        }
    }
}
