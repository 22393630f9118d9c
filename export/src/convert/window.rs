//! The window of a conversion that asks for none.

use super::{
    Options,
    choose::{choose_products, target},
};
use crate::{logits::Logits, rewrite::costly_share, rules::Attention};
use retro_onnx::graph::GraphView;
use retro_runtime::Device;

/// The share of the weights from which on they are most of them.
const MOST: f64 = 0.5;

/// The window of a conversion.
#[derive(Debug)]
pub struct ChosenWindow {
    pub window: usize,
    /// Why it is 1 where none was asked for, and what would make another cheap.
    pub why: Option<String>,
}

/// The window that is asked for; where none is, that of the settings, but 1 if most weights are in products in which a
/// second row is costly.
pub fn choose_window(view: &GraphView, found: &[Attention], logits: &Logits, options: &Options) -> ChosenWindow {
    let window = options.settings.window;
    if !options.choose_window || window == 1 {
        return ChosenWindow { window, why: None };
    }
    let costly = |options: &Options| {
        let products = choose_products(view, found, options);
        costly_share(view, &products, logits, target(found, options))
    };
    let share = costly(options);
    if share <= MOST {
        return ChosenWindow { window, why: None };
    }
    let devices = match options.device {
        None => &[None, Some(Device::Cuda(0)), Some(Device::Cpu)][..],
        // A model for another device is another one.
        Some(_) => &[options.device],
    };
    let other = |device: &Option<Device>| Options {
        device: *device,
        keep_matmul: false,
        ..options.clone()
    };
    let cheap = devices.iter().find(|device| costly(&other(device)) <= MOST);
    let how = cheap.map(|device| format!("; {window} is cheap {}", changes(options, *device)));
    ChosenWindow {
        window: 1,
        why: Some(format!(
            "{:.0} % of the weights are in MatMulNBits that stay ONNX Runtime's, which take far longer for two rows{}",
            100.0 * share,
            how.unwrap_or_default()
        )),
    }
}

/// What to say on the command line for products to be the operator's on this device.
fn changes(options: &Options, device: Option<Device>) -> String {
    let device = device.filter(|_| options.device.is_none()).map(|device| match device {
        Device::Cpu => "with --device cpu",
        Device::Cuda(_) => "with --device cuda",
    });
    let products = options.keep_matmul.then_some("without --no-matmul");
    device.into_iter().chain(products).collect::<Vec<_>>().join(" and ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        convert::choose::choose_logits,
        rules::{SampleCalls, find_attention},
        settings::Settings,
        testing::gqa_model,
    };
    use retro_contract::matmul_nbits;
    use retro_onnx::{AttributeProto, DataType, NodeProto, TensorProto};

    const CPU: Option<Device> = Some(Device::Cpu);
    const CUDA: Option<Device> = Some(Device::Cuda(1));
    const K: i64 = 1024;

    /// What is chosen for a model whose layer has a packed product of `columns` columns too.
    fn chosen(data_type: DataType, level: i64, columns: i64, options: &Options) -> ChosenWindow {
        let mut model = gqa_model(1);
        let graph = model.graph.as_mut().unwrap();
        let node = NodeProto::new(
            matmul_nbits::SOURCE_DOMAIN,
            matmul_nbits::OP_TYPE,
            "q",
            &["x", "codes", "scales"],
            &["z"],
        );
        let numbers = [("K", K), ("N", columns), ("block_size", 32), ("accuracy_level", level)];
        let node = numbers
            .into_iter()
            .fold(node, |n, (name, v)| n.with(AttributeProto::int(name, v)));
        graph.node.push(node);
        for (name, data_type, dims) in [
            ("codes", DataType::Uint8, &[columns, K / 32, 16][..]),
            ("scales", data_type, &[columns, K / 32]),
        ] {
            graph.initializer.push(TensorProto {
                name: Some(name.to_owned()),
                data_type: Some(data_type.into()),
                dims: dims.to_vec(),
                ..Default::default()
            });
        }
        let view = GraphView::new(model.graph.as_ref().unwrap(), 21);
        let found = find_attention(&model, &SampleCalls::new(&view, None));
        choose_window(&view, &found, &choose_logits(&view, options), options)
    }

    fn options(device: Option<Device>, keep_matmul: bool) -> Options {
        Options {
            choose_window: true,
            device,
            keep_matmul,
            ..Options::default()
        }
    }

    #[test]
    fn two_rows_where_they_cost_little_more_than_one() {
        let (single, half) = (DataType::Float, DataType::Float16);
        for (data_type, level, device) in [
            (single, 0, CPU),
            (single, 1, CPU),
            (single, 4, None),
            (single, 4, CPU),
            (half, 0, CPU),
            (half, 4, CPU),
            (half, 0, CUDA),
            (half, 4, CUDA),
        ] {
            let chosen = chosen(data_type, level, 64, &options(device, false));
            assert_eq!(chosen.window, 2, "{data_type:?} {level} {device:?}: {chosen:?}");
            assert_eq!(chosen.why, None);
        }
    }

    #[test]
    fn one_row_where_a_second_is_costly_and_what_would_change_it() {
        let (single, half) = (DataType::Float, DataType::Float16);
        for (data_type, level, device, keep, how) in [
            (single, 0, None, false, "; 2 is cheap with --device cpu"),
            (
                single,
                0,
                None,
                true,
                "; 2 is cheap with --device cpu and without --no-matmul",
            ),
            (single, 0, CPU, true, "; 2 is cheap without --no-matmul"),
            (single, 0, CUDA, false, "rows"),
            (single, 4, CUDA, false, "rows"),
            (half, 4, None, false, "; 2 is cheap with --device cuda"),
            (half, 0, CUDA, true, "; 2 is cheap without --no-matmul"),
            (DataType::Bfloat16, 4, None, false, "; 2 is cheap with --device cuda"),
        ] {
            let chosen = chosen(data_type, level, 64, &options(device, keep));
            assert_eq!(chosen.window, 1, "{data_type:?} {level} {device:?}");
            let why = chosen.why.unwrap();
            assert!(why.starts_with("97 % of the weights are in MatMulNBits"), "{why}");
            assert!(why.ends_with(how), "{data_type:?} {level} {device:?}: {why}");
        }
    }

    #[test]
    fn products_that_are_a_small_share_decide_nothing() {
        assert_eq!(chosen(DataType::Float, 0, 1, &options(None, false)).window, 2);
    }

    #[test]
    fn what_is_asked_for_is_kept() {
        let asked = Options::default();
        assert!(!asked.choose_window);
        assert_eq!(chosen(DataType::Float, 0, 64, &asked).window, 2);
        let four = Options {
            settings: Settings {
                window: 4,
                ..Settings::default()
            },
            ..options(CPU, false)
        };
        assert_eq!(chosen(DataType::Float, 0, 64, &four).window, 4);
    }

    /// What depends on the window sees the one that was chosen.
    #[test]
    fn a_window_of_one_keeps_sliding_caches_and_has_no_window_in_the_graph() {
        let settings = Settings {
            window_in_graph: true,
            ..Settings::default()
        };
        let options = Options {
            settings,
            ..options(None, false)
        };
        let at = |window| {
            let options = options.with_window(window);
            (options.keeps_sliding_caches(), options.settings.keeps_window_in_graph())
        };
        assert_eq!((at(1), at(2)), ((true, false), (false, true)));
    }
}
