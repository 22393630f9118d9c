//! The sessions of a shape, and the order in which they run.

use anyhow::{Context, Result, ensure};
use half::{bf16, f16};
use ort::session::{NoSelectedOutputs, RunOptions, Session};
use retro_run::decoder::device_buffers::{DeviceBindings, DeviceBuffer, DeviceTensor};

use crate::{
    args::{Args, Operator, WeightShape},
    common::{dtype::Dtype, fill, session_host::SessionHost},
    graph::{self, NodeShape},
    table::Row,
};

/// The operators to measure. Where none is asked for, the plugin's is left out if there is none.
pub fn operators(host: &SessionHost, args: &Args) -> Result<Vec<Operator>> {
    if !args.op.is_empty() {
        return Ok(args.op.clone());
    }
    let mut operators = vec![Operator::Ort];
    let mut small = NodeShape::new(args, WeightShape { k: 256, n: 256 })?;
    small.nodes = 1;
    let model = graph::model(&small, Operator::Retro);
    match host.session(&model, true, false) {
        Ok(_) => operators.push(Operator::Retro),
        Err(e) => eprintln!(
            "left out: ai.retro::MatMulNBits: {}",
            format!("{e:#}").replace('\n', " ")
        ),
    }
    Ok(operators)
}

/// The sessions of one shape.
pub struct Measurement<'a> {
    host: &'a SessionHost,
    args: &'a Args,
    shape: NodeShape,
    sessions: Vec<(Operator, Session)>,
}

/// One operator with one number of rows.
struct Entry<'a> {
    operator: Operator,
    rows: usize,
    session: &'a Session,
    bindings: DeviceBindings,
    /// Of the last node, after a run.
    output: DeviceTensor,
    options: RunOptions<NoSelectedOutputs>,
    micros: Vec<f64>,
}

impl<'a> Measurement<'a> {
    pub fn new(host: &'a SessionHost, args: &'a Args, weights: WeightShape, operators: &[Operator]) -> Result<Self> {
        let shape = NodeShape::new(args, weights)?;
        let session = |&operator: &Operator| {
            let model = graph::model(&shape, operator);
            let session = host.session(&model, operator == Operator::Retro, host.gpu.is_some());
            let session = session.with_context(|| format!("no session of {}::MatMulNBits", operator.domain()))?;
            Ok((operator, session))
        };
        Ok(Self {
            host,
            args,
            shape,
            sessions: operators.iter().map(session).collect::<Result<_>>()?,
        })
    }

    /// A row of the table for each operator.
    pub fn measure(&self) -> Result<Vec<Row>> {
        let mut entries = Vec::new();
        for &rows in &self.args.rows {
            for (operator, session) in &self.sessions {
                entries.push(self.entry(*operator, session, rows, entries.len() + 1)?);
            }
        }
        for _ in 0..self.args.repetitions {
            for entry in &mut entries {
                let run = || Ok(entry.bindings.run(entry.session, Some(&entry.options))?);
                let seconds = self.host.seconds(self.args.warm_up(), self.args.runs(), run)?;
                entry.micros.push(1e6 * seconds / self.shape.nodes as f64);
            }
        }
        self.compare(&entries)?;
        let of_operator = |(operator, _): &(Operator, Session)| {
            let own = entries.iter().filter(|e| e.operator == *operator);
            Row {
                shape: self.shape.weights,
                nodes: self.shape.nodes,
                bytes: self.shape.bytes(),
                operator: *operator,
                micros: own.map(|e| (e.rows, spread(&e.micros))).collect(),
            }
        };
        Ok(self.sessions.iter().map(of_operator).collect())
    }

    /// Checks that operators agree on the products of the last run: a time of wrong numbers is none.
    fn compare(&self, entries: &[Entry<'_>]) -> Result<()> {
        let (dtype, level) = (self.args.dtype(), self.args.accuracy_level);
        // The most that one of them may be off, beside the mean size of a product. Sums are of another order, and
        // com.microsoft's may be of half precision.
        let tolerance = match dtype {
            Dtype::F32 if level != 4 => 1e-3,
            Dtype::F32 | Dtype::F16 => 5e-2,
            Dtype::Bf16 => 2e-1,
        };
        for pair in entries.windows(2).filter(|pair| pair[0].rows == pair[1].rows) {
            let [one, other] = [numbers(&pair[0].output, dtype)?, numbers(&pair[1].output, dtype)?];
            let size = (one.iter().map(|x| x * x).sum::<f32>() / one.len() as f32).sqrt();
            let off = one.iter().zip(&other).map(|(a, b)| (a - b).abs());
            // A difference that is no number stays: max would drop it.
            let off = off.fold(0.0, |most: f32, d| if most.is_nan() || d <= most { most } else { d });
            ensure!(
                off <= tolerance * size,
                "{}, {} rows: {} and {} differ by {off:.2e}, products are of {size:.2e}",
                self.shape.weights,
                pair[0].rows,
                pair[0].operator.domain(),
                pair[1].operator.domain()
            );
        }
        Ok(())
    }

    /// Binds A and the output of `rows` rows. All nodes write to one place: one is done before the next.
    fn entry<'s>(&self, operator: Operator, session: &'s Session, rows: usize, graph_id: usize) -> Result<Entry<'s>> {
        let (dtype, WeightShape { k, n }) = (self.args.dtype(), self.shape.weights);
        let tensor = |columns: usize| {
            let bytes = rows * columns * fill::bytes_of(dtype.onnx());
            let buffer = DeviceBuffer::new(self.host.gpu.as_ref(), bytes)?;
            fill::normals(&buffer, 0, bytes, dtype.onnx())?;
            anyhow::Ok(buffer.tensor(0, dtype.element(), &[1, rows, columns])?)
        };
        let (a, output) = (tensor(k)?, tensor(n)?);
        let mut bindings = DeviceBindings::new(session)?;
        bindings.input("a", &a)?;
        for node in 0..self.shape.nodes {
            bindings.output(&graph::output_of(node), &output)?;
        }
        let captured = self.host.gpu.is_some().then_some(graph_id);
        Ok(Entry {
            operator,
            rows,
            session,
            bindings,
            output,
            options: self.host.run_options(false, captured)?,
            micros: Vec::new(),
        })
    }
}

/// The numbers of a tensor.
fn numbers(tensor: &DeviceTensor, dtype: Dtype) -> Result<Vec<f32>> {
    let mut bytes = vec![0; tensor.bytes()];
    tensor.read(0, &mut bytes)?;
    let halves = || bytes.as_chunks::<2>().0.iter();
    Ok(match dtype {
        Dtype::F32 => bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
        Dtype::F16 => halves().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
        Dtype::Bf16 => halves().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
    })
}

/// Median, minimum, maximum.
fn spread(numbers: &[f64]) -> [f64; 3] {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    [sorted[sorted.len() / 2], sorted[0], sorted[sorted.len() - 1]]
}
