//! Which attention becomes the operator, in which mode, which products do, and what becomes of the logits.

use super::{Options, Unconvertible};
use crate::{
    logits::{self, KeepAll, Logits},
    report::{Action, LayerReport},
    rewrite::{Kept, PackedProducts, Target},
    rules::{Attention, Conversion, carried, none_found},
};
use retro_contract::Mode;
use retro_onnx::{DataType, graph::GraphView};
use retro_runtime::Device;

/// What becomes of each attention; an error if the model stays as it is.
pub fn choose_conversions<'a>(
    view: &GraphView,
    found: &'a [Attention],
    options: &Options,
) -> Result<Vec<Conversion<'a>>, Unconvertible> {
    if found.is_empty() {
        return Err(Unconvertible::NoAttention(none_found(view).to_string()));
    }
    let mut conversions = Vec::new();
    let mut refused = Vec::new();
    for attention in found {
        match (&attention.found, attention.node) {
            (Ok(matched), Some(node)) => {
                if matched.sliding_cache && options.keeps_sliding_caches() {
                    continue;
                }
                let dense = matched.sliding_cache || options.settings.dense_layers.contains(&attention.layer);
                let mode = if dense { Mode::Dense } else { options.settings.mode };
                conversions.push(Conversion {
                    attention,
                    matched,
                    node,
                    mode,
                });
            }
            (Ok(_), None) => {}
            (Err(why), _) => refused.push((attention, why.to_string())),
        }
    }
    check_refused(&refused, found.len(), conversions.is_empty(), options)?;
    check_sliding_caches(found, conversions.is_empty(), options)?;
    if options.settings.window > 1 {
        check_state(view, found, &refused)?;
    }
    check_dense_layers(&conversions, options)?;
    Ok(conversions)
}

/// An attention that can't be converted, and why.
type Refused<'a> = (&'a Attention, String);

fn check_refused(
    refused: &[Refused],
    all: usize,
    none_converted: bool,
    options: &Options,
) -> Result<(), Unconvertible> {
    if refused.is_empty() {
        return Ok(());
    }
    if none_converted {
        return Err(Unconvertible::AllRefused(reasons(refused)));
    }
    if !options.partial {
        return Err(Unconvertible::SomeRefused {
            refused: refused.len(),
            all,
            reasons: reasons(refused),
        });
    }
    Ok(())
}

fn check_sliding_caches(found: &[Attention], none_converted: bool, options: &Options) -> Result<(), Unconvertible> {
    let keeps = |a: &&Attention| a.found.as_ref().is_ok_and(|matched| matched.sliding_cache);
    let Some(first) = found.iter().find(keeps).filter(|_| options.keeps_sliding_caches()) else {
        return Ok(());
    };
    if options.settings.window > 1 {
        return Err(Unconvertible::KeepsSlidingCache {
            layer: first.layer,
            node: first.name.clone(),
        });
    }
    if none_converted {
        return Err(Unconvertible::OnlySlidingCaches);
    }
    Ok(())
}

/// With a window above 1, tokens are fed again. State that is no cache must not see them twice.
fn check_state(view: &GraphView, found: &[Attention], refused: &[Refused]) -> Result<(), Unconvertible> {
    if let Some((attention, _)) = refused.iter().find(|(attention, _)| !attention.takes_tokens_again) {
        return Err(Unconvertible::KeepsState {
            node: attention.name.clone(),
            op_type: attention.op_type.clone(),
        });
    }
    match carried(view, found) {
        Some([past, present]) => Err(Unconvertible::CarriesState {
            past: past.to_owned(),
            present: present.to_owned(),
        }),
        None => Ok(()),
    }
}

fn check_dense_layers(conversions: &[Conversion], options: &Options) -> Result<(), Unconvertible> {
    let is_converted = |layer: &usize| conversions.iter().any(|c| c.attention.layer == *layer);
    match options.settings.dense_layers.iter().find(|l| !is_converted(l)) {
        Some(layer) => Err(Unconvertible::NoSuchLayer {
            layer: *layer,
            layers: conversions.iter().map(|c| c.attention.layer).collect(),
        }),
        None => Ok(()),
    }
}

/// Refusals as one line: each reason once, with its first node.
fn reasons(refused: &[Refused]) -> String {
    const SHOWN: usize = 3;
    let mut reasons: Vec<(&str, Vec<&str>)> = Vec::new();
    for (attention, why) in refused {
        match reasons.iter_mut().find(|(reason, _)| reason == why) {
            Some((_, nodes)) => nodes.push(&attention.name),
            None => reasons.push((why, vec![&attention.name])),
        }
    }
    let more = reasons.len().saturating_sub(SHOWN);
    let line = |(why, nodes): &(&str, Vec<&str>)| match nodes.as_slice() {
        [one] => format!("node {one}: {why}"),
        [first, rest @ ..] => format!("node {first} and {} more: {why}", rest.len()),
        [] => (*why).to_owned(),
    };
    let mut text = reasons.iter().take(SHOWN).map(line).collect::<Vec<_>>().join("; ");
    if more > 0 {
        text += &format!("; and {more} other reasons");
    }
    text
}

/// Which products of packed weights become the operator's: those that its kernel for the model's device takes, on CUDA
/// where there is a window.
pub fn choose_products(view: &GraphView, found: &[Attention], options: &Options) -> PackedProducts {
    let target = match target(found, options) {
        _ if options.keep_matmul => Err(Kept::Asked),
        target => Ok(target),
    };
    let mut products = PackedProducts::choose(view, &target);
    if target == Ok(Some(Target::Cuda)) && options.settings.window == 1 {
        products.keep_all(Kept::OneRow);
    }
    products
}

/// What the converted model is for: as asked, else CUDA if it has caches that the operator has there alone.
pub fn target(found: &[Attention], options: &Options) -> Option<Target> {
    match options.device {
        Some(Device::Cpu) => Some(Target::Cpu),
        Some(Device::Cuda(_)) => Some(Target::Cuda),
        None => {
            let mut matched = found.iter().filter_map(|a| a.found.as_ref().ok());
            let bfloat16 = matched.any(|matched| matched.data_type == DataType::Bfloat16);
            bfloat16.then_some(Target::Cuda)
        }
    }
}

/// Of which tokens the converted model returns logits.
pub fn choose_logits(view: &GraphView, options: &Options) -> Logits {
    if options.all_logits {
        return Logits::All(KeepAll::Asked);
    }
    match logits::find_lm_head(view) {
        Logits::Newest { .. } if view.opset < logits::GATHER_OPSET => Logits::All(KeepAll::OldOpset(view.opset)),
        found => found,
    }
}

/// Every attention found, and what becomes of it.
pub fn layer_reports(found: &[Attention], conversions: &[Conversion]) -> Vec<LayerReport> {
    let action = |attention: &Attention| {
        let conversion = conversions.iter().find(|c| std::ptr::eq(c.attention, attention));
        match (conversion, &attention.found) {
            (Some(c), _) => Action::Converted { mode: c.mode },
            (None, Err(why)) => Action::Kept { why: why.to_string() },
            (None, Ok(_)) => Action::Kept {
                why: "it keeps a sliding-window cache".to_owned(),
            },
        }
    };
    found
        .iter()
        .map(|attention| LayerReport::new(attention, action(attention)))
        .collect()
}
