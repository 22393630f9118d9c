//! The sessions of a shape, and the order in which they run.

use anyhow::{Context, Result};
use ort::session::{NoSelectedOutputs, RunOptions, Session};
use retro_run::decoder::device_buffers::{DeviceBindings, DeviceBuffer};

use crate::{
    args::{Args, Operator, WeightShape},
    common::{fill, session_host::SessionHost},
    graph::{self, NodeShape},
    table::Row,
};

/// Runs before the timed ones; a CUDA graph is captured in the first.
const WARM_UP: usize = 3;

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
                let seconds = self.host.seconds(WARM_UP, self.args.runs(), run)?;
                entry.micros.push(1e6 * seconds / self.shape.nodes as f64);
            }
        }
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
            options: self.host.run_options(false, captured)?,
            micros: Vec::new(),
        })
    }
}

/// Median, minimum, maximum.
fn spread(numbers: &[f64]) -> [f64; 3] {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    [sorted[sorted.len() / 2], sorted[0], sorted[sorted.len() - 1]]
}
