//! The f64 oracle of the plugin's crate, made for a test's attributes.

use retro_attention::{contract::Attributes, method::oracle::Oracle};

use crate::attrs::Attrs;

/// An empty sequence.
pub fn oracle(attrs: &Attrs, head_sink: Option<&[f32]>) -> Oracle {
    let attributes = Attributes {
        heads: attrs.heads,
        kv_heads: attrs.kv_heads,
        scale: (attrs.scale != 0.0).then_some(attrs.scale),
        softcap: attrs.softcap,
        do_rotary: false,
        rotary_interleaved: false,
        local_window: usize::try_from(attrs.local_window_size).ok(),
        page_size: attrs.page,
        window: attrs.window,
        // The decimal that the attribute was written as, not the float's own value.
        budget_ratio: attrs
            .budget_ratio
            .to_string()
            .parse()
            .expect("a float prints as a number"),
        budget_min_pages: attrs.budget_min_pages,
        sink_pages: attrs.sink_pages,
        selector: attrs.selector,
        group_score: attrs.group_score,
        selector_lambda: attrs.lambda,
        selector_correlation: attrs.correlation,
        sketch_bits: attrs.sketch_bits,
        mode: attrs.mode,
        step_rows: 0,
    };
    Oracle::new(&attributes, attrs.head_size, head_sink)
}
