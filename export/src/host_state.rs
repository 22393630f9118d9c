//! Names of state in onnxruntime-genai's recurrent form: two tensors a layer, `past_key_values.N.KIND`, which come back as
//! `present.N.KIND`.

/// The tensor of rank 3.
pub const CONV: &str = "conv_state";
/// The tensor of rank 4.
pub const RECURRENT: &str = "recurrent_state";

const PAST: &str = "past_key_values.";
const PRESENT: &str = "present.";

/// A layer's tensor, as it comes in and as it goes out.
pub fn names(layer: usize, kind: &str) -> [String; 2] {
    [PAST, PRESENT].map(|direction| format!("{direction}{layer}.{kind}"))
}

/// Whether a value has such a name, whatever stands before the kind.
pub fn is_state(name: &str) -> bool {
    let kind = name.rsplit_once('.').map(|(_, kind)| kind);
    kind.is_some_and(|kind| [CONV, RECURRENT].contains(&kind))
}

/// Whether an input is such state.
pub fn is_past(name: &str) -> bool {
    name.starts_with(PAST) && is_state(name)
}

/// The input that an output comes back as, if it is such state.
pub fn past_of(present: &str) -> Option<String> {
    let rest = present.strip_prefix(PRESENT).filter(|rest| is_state(rest))?;
    Some(format!("{PAST}{rest}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_directions_are_one_tensor() {
        for kind in [CONV, RECURRENT] {
            let [past, present] = names(7, kind);
            assert!(is_past(&past) && is_state(&present) && !is_past(&present));
            assert_eq!(past_of(&present), Some(past));
        }
        assert!(!is_state("present.0.conv_states") && !is_state("conv_state"));
        assert_eq!(past_of("present.0.key"), None);
    }
}
