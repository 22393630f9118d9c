//! The end of a row: splits joined, the head sink or the output cache merged in, outputs written, the output cache
//! filled.

use retro_contract::Mode;

use super::call::CpuCall;
use crate::method::attend::Partial;
use crate::method::element::Element;
use crate::method::merge;
use crate::selector::PageSelector;

/// Adds the partial attention `other` to `into`.
pub(super) fn join(into: &mut Partial<'_>, other: &Partial<'_>, d: usize) {
    for row in 0..into.max.len() {
        let (a, b) = (into.max[row], other.max[row]);
        if !other.has_seen(row) {
            continue;
        }
        let m = a.max(b);
        let (ea, eb) = ((a - m).exp(), (b - m).exp());
        into.max[row] = m;
        into.sum[row] = into.sum[row] * ea + other.sum[row] * eb;
        for (x, y) in into.acc[row * d..][..d].iter_mut().zip(&other.acc[row * d..][..d]) {
            *x = *x * ea + y * eb;
        }
    }
}

/// Steps 3 to 5 for one KV head: merge the retrospective rows with the output cache, write outputs, push the newest.
///
/// Rows run from old to new: the newest position takes the ring slot of the oldest one that is still read.
pub(super) fn finish_step<E: Element, P: PageSelector>(
    call: &CpuCall<'_, E, P>,
    b: usize,
    head: usize,
    partial: &mut Partial<'_>,
) {
    let (attributes, dims, sequence) = (call.attributes, call.dims, &call.plan.sequences[b]);
    let (d, ring, heads) = (dims.head_size, attributes.ring(), attributes.heads);
    let group = call.group();
    let skipped = dims.tokens - sequence.fed;
    for i in 0..sequence.fed {
        let position = sequence.first_position() + i;
        let complete = i + 1 == sequence.fed || attributes.mode == Mode::Dense;
        for g in 0..group {
            let (row, h) = (i * group + g, head * group + g);
            if complete {
                let lse = finish_row(call, partial, row, h);
                let values = &partial.acc[row * d..][..d];
                write_output(call, b, skipped + i, h, values);
                cache_output(call, b, position, h, values, lse);
                continue;
            }
            let at = (b * ring + position % ring) * heads + h;
            // SAFETY: each query head of the ring belongs to one task.
            let (cached, lse) = unsafe {
                (
                    call.state.outputs.range_mut(at * d, d),
                    &mut call.state.lse.range_mut(at, 1)[0],
                )
            };
            if partial.has_seen(row) {
                let (old, new, merged) = merge::weights(*lse, partial.lse(row));
                // Tokens with logits of -inf alone weigh nothing; a sum of NaN goes on.
                let new = if partial.sum[row] == 0.0 {
                    0.0
                } else {
                    new / partial.sum[row]
                };
                for (o, a) in cached.iter_mut().zip(&partial.acc[row * d..][..d]) {
                    *o = old * *o + new * a;
                }
                *lse = merged;
            }
            write_output(call, b, skipped + i, h, cached);
        }
    }
}

/// Divides a row by its sum, its head sink included, and returns its log-sum-exp.
pub(super) fn finish_row<E: Element, P: PageSelector>(
    call: &CpuCall<'_, E, P>,
    partial: &mut Partial<'_>,
    row: usize,
    head: usize,
) -> f32 {
    let d = call.dims.head_size;
    let mut lse = partial.lse(row);
    let mut inverse = 1.0 / partial.sum[row];
    if let Some(sink) = call.inputs.head_sink.get(head) {
        let (seen, _, joined) = merge::weights(lse, sink.to_f32());
        // With logits of -inf alone the sink has all the weight; without a sink that is 0 / 0, as in any softmax.
        inverse = if partial.sum[row] == 0.0 { 0.0 } else { inverse * seen };
        lse = joined;
    }
    partial.acc[row * d..][..d].iter_mut().for_each(|v| *v *= inverse);
    lse
}

/// Writes one head of output row `s`.
pub(super) fn write_output<E: Element, P: PageSelector>(
    call: &CpuCall<'_, E, P>,
    b: usize,
    s: usize,
    head: usize,
    values: &[f32],
) {
    let d = call.dims.head_size;
    let at = ((b * call.dims.tokens + s) * call.attributes.heads + head) * d;
    // SAFETY: each output head belongs to one task.
    E::narrow(values, unsafe { call.output.range_mut(at, d) });
}

/// Puts (O, L) of a position into the output cache; a window of one token keeps none.
pub(super) fn cache_output<E: Element, P: PageSelector>(
    call: &CpuCall<'_, E, P>,
    b: usize,
    position: usize,
    head: usize,
    values: &[f32],
    lse: f32,
) {
    if call.attributes.window == 1 {
        return;
    }
    let (d, ring, heads) = (call.dims.head_size, call.attributes.ring(), call.attributes.heads);
    let at = (b * ring + position % ring) * heads + head;
    // SAFETY: each query head of the ring belongs to one task.
    unsafe {
        call.state.outputs.range_mut(at * d, d).copy_from_slice(values);
        call.state.lse.range_mut(at, 1)[0] = lse;
    }
}

/// Outputs of leading rows that a sequence ignores are 0.
pub(super) fn clear_ignored_rows<E: Element, P: PageSelector>(call: &CpuCall<'_, E, P>) {
    let row = call.attributes.heads * call.dims.head_size;
    for (b, sequence) in call.plan.sequences.iter().enumerate() {
        let skipped = call.dims.tokens - sequence.fed;
        // SAFETY: no task runs; these rows belong to nobody.
        unsafe { call.output.range_mut(b * call.dims.tokens * row, skipped * row) }.fill(E::default());
    }
}
