//! What scores are multiplied with and what bends them: scale and softcap.
//!
//! The operator computes `softcap * tanh(scale * q.k / softcap)`; a softcap of 0 is none.

use super::{
    call_shape::CallShape,
    candidate::{AttentionCandidate, ScoreSource},
    operands::Operands,
    reference::{ReferenceCall, Scale},
    refusal::{ProofRefusal, Refusal},
    sample_calls::SampleCalls,
};
use retro_onnx::NodeProto;

/// The call in which scores are tried.
const CALL: CallShape = CallShape::new(1, 1, 3, 0);
/// Sizes of queries whose scores no softcap bends, and of those that are far past any.
const TINY: f64 = 1e-3;
const HUGE: f64 = 1e4;

/// Reads scale and softcap from a node's attributes, or from scores of queries of two sizes.
///
/// # Errors
/// The scores can't be computed, or are not products with a positive scale.
pub fn find_scale<'a>(
    samples: &SampleCalls<'a>,
    candidate: &AttentionCandidate<'a>,
    operands: &Operands<'a>,
) -> Result<Scale, Refusal> {
    match candidate.scores {
        ScoreSource::Fused(node) => Ok(of_node(node, operands)),
        ScoreSource::Decomposed { masked, .. } => of_scores(samples, masked, operands),
    }
}

/// As `ai.onnx::Attention` and `com.microsoft::MultiHeadAttention` define their attributes: a scale of 0 is 1/sqrt(D).
fn of_node(node: &NodeProto, operands: &Operands) -> Scale {
    let number = |name: &str| node.attribute(name).map_or(0.0, |a| f64::from(a.f()));
    let set = number("scale");
    let scale = if set == 0.0 {
        1.0 / (operands.heads.d as f64).sqrt()
    } else {
        set
    };
    let softcap = if node.is("", "Attention") {
        number("softcap")
    } else {
        0.0
    };
    Scale {
        scale: scale * operands.qkv[0].factor,
        softcap,
    }
}

/// A product of a query and a key, and the score that became of it.
struct Score {
    dot: f64,
    score: f64,
}

/// Scale from tiny queries, softcap from huge ones.
fn of_scores<'a>(samples: &SampleCalls<'a>, masked: &'a str, operands: &Operands<'a>) -> Result<Scale, Refusal> {
    let tiny = largest_score(samples, masked, operands, TINY)?;
    let scale = tiny.score / tiny.dot;
    if !(scale.is_finite() && scale > 0.0) {
        return Err(ProofRefusal::Scale { scale }.into());
    }
    let huge = largest_score(samples, masked, operands, HUGE)?;
    // As float32 writes it: 0.17677669 for 1/sqrt(32).
    let straight = (huge.score / (scale * huge.dot) - 1.0).abs() < 1e-4;
    if straight {
        return Ok(Scale {
            scale: huge.score / huge.dot,
            softcap: 0.0,
        });
    }
    let cap = huge.score;
    if !(cap.is_finite() && cap > 0.0) {
        return Err(ProofRefusal::Softcap { cap }.into());
    }
    Ok(Scale {
        scale: (tiny.score / cap).atanh() * cap / tiny.dot,
        softcap: cap,
    })
}

/// The largest product of queries of a size with keys that the first head sees, and its score.
fn largest_score<'a>(
    samples: &SampleCalls<'a>,
    masked: &'a str,
    operands: &Operands<'a>,
    size: f64,
) -> Result<Score, Refusal> {
    let call = ReferenceCall::new(samples, operands, CALL, size)?;
    let env = samples.run(CALL)?;
    let tried = samples.program().substitute(&env, call.seeds(operands), &[masked]);
    let scores = tried
        .need(masked)?
        .data
        .as_ref()
        .ok_or(ProofRefusal::ScoresNotComputed)?;
    let total = CALL.total();
    let dots: Vec<f64> = (0..scores.len().min(operands.heads.hq * total))
        .map(|at| call.dot(0, at / total, 0, at % total))
        .collect();
    let seen = dots
        .iter()
        .enumerate()
        .filter(|(at, _)| scores[*at] > -9999.0 * size.max(1.0));
    let (at, dot) = seen
        .max_by(|a, b| a.1.total_cmp(b.1))
        .ok_or(ProofRefusal::SeesNothing)?;
    Ok(Score {
        dot: *dot,
        score: scores[at],
    })
}
