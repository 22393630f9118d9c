//! Attributes that are not the operator's. A host gives a plugin no list of a node's attributes, it only answers for a
//! name; so the names are asked for that somebody could have meant something by.

use super::AttributeSource;
use crate::ort::{Error, Result};

/// What an operator has, and what is looked for besides.
pub(crate) struct Names<'a> {
    pub operator: &'a str,
    pub known: &'a [&'static str],
    /// Attributes of other operators that this one does not have.
    pub foreign: &'a [&'static str],
}

/// Attributes of GroupQueryAttention, MultiHeadAttention and ai.onnx Attention that change what they compute and that
/// this operator does not have, and names that other libraries use for what it has.
pub(super) const OF_ATTENTION: [&str; 41] = [
    "smooth_softmax",
    "qk_output",
    "qk_norm_epsilon",
    "k_quant_type",
    "v_quant_type",
    "kv_cache_bit_width",
    "kv_quant_type",
    "unidirectional",
    "is_unidirectional",
    "mask_filter_value",
    "past_present_share_buffer",
    "rotary_embedding_dim",
    "rotary_dim",
    "rotary_base",
    "theta",
    "qkv_hidden_sizes",
    "is_causal",
    "causal",
    "q_num_heads",
    "num_kv_heads",
    "num_key_value_heads",
    "num_attention_heads",
    "heads",
    "kv_heads",
    "head_size",
    "head_dim",
    "hidden_size",
    "qk_matmul_output_mode",
    "softmax_precision",
    "left_window_size",
    "right_window_size",
    "window_size",
    "sliding_window",
    "local_window",
    "budget",
    "page_budget",
    "retro_length",
    "sinks",
    "lambda",
    "correlation",
    "rho",
];

/// What a common slip makes of `name`: a character left out or doubled, two neighbours swapped, a plural, words joined
/// in another way. Every name costs about a microsecond of each node when a session is made, so not all that are one
/// edit away.
fn slips(name: &str) -> impl Iterator<Item = String> + '_ {
    let left_out = (0..name.len()).map(move |i| format!("{}{}", &name[..i], &name[i + 1..]));
    let doubled = (0..name.len()).map(move |i| format!("{}{}", &name[..=i], &name[i..]));
    let swapped = (1..name.len()).map(move |i| {
        let (a, b) = (&name[i - 1..i], &name[i..=i]);
        format!("{}{b}{a}{}", &name[..i - 1], &name[i + 1..])
    });
    let camel = name.split('_').enumerate().map(|(i, word)| match i {
        0 => word.to_owned(),
        _ => word[..1].to_uppercase() + &word[1..],
    });
    let joined = [
        format!("{name}s"),
        name.replace('_', ""),
        name.replace('_', "-"),
        name.to_uppercase(),
        camel.collect(),
    ];
    left_out.chain(doubled).chain(swapped).chain(joined)
}

/// An error for an attribute that is not the operator's.
pub(crate) fn refuse(source: &impl AttributeSource, names: &Names<'_>) -> Result<()> {
    let Names {
        operator,
        known,
        foreign,
    } = names;
    let of_slips = known
        .iter()
        .flat_map(|&name| slips(name).map(move |slip| (slip, Some(name))));
    let foreign = foreign.iter().map(|&name| (name.to_owned(), None));
    for (name, meant) in foreign.chain(of_slips) {
        if !name.is_empty() && !known.contains(&name.as_str()) && source.has(&name)? {
            let meant = meant.map_or(String::new(), |meant| format!(" (is {meant} meant?)"));
            return Err(Error::invalid(format!(
                "attribute {name} is not one of {operator}'s{meant}: they are {}",
                known.join(", ")
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_of_a_name() {
        let all: Vec<String> = slips("page_size").collect();
        for slip in [
            "page_siz",
            "pagesize",
            "paage_size",
            "pgae_size",
            "page_sizes",
            "page-size",
            "PAGE_SIZE",
            "pageSize",
        ] {
            assert!(all.iter().any(|s| s == slip), "{slip}");
        }
    }
}
