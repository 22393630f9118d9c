//! Dense prefill by ORT's own GroupQueryAttention, called from inside our kernel.
//!
//! It applies to what that operator can do: one sequence (it refuses several with a past) or a batch of prompts of one
//! length, no left padding, no head sink, D a multiple of 16 and its
//! rotated half of 8. Everything else is ours ([`super::prefill`]).

use crate::contract::{Attributes, Dims, Plan};
use crate::host::{Attribute, Context, DataType, Info, OwnedScalar, Result, Standalone, Tensor};

/// The host's GroupQueryAttention with a node's attributes.
pub struct Delegate(Standalone);

/// Inputs of GroupQueryAttention that we declare, up to sin_cache.
const INPUTS: usize = 9;

impl Delegate {
    /// Creates the operator for element type `data_type`.
    pub fn new(info: &Info, attributes: &Attributes, data_type: DataType) -> Result<Self> {
        let window = attributes.local_window.map_or(-1, |w| w as i64);
        let list = [
            Attribute::Int(c"num_heads", attributes.heads as i64),
            Attribute::Int(c"kv_num_heads", attributes.kv_heads as i64),
            Attribute::Float(c"scale", attributes.scale.unwrap_or(0.0)),
            Attribute::Float(c"softcap", attributes.softcap),
            Attribute::Int(c"do_rotary", i64::from(attributes.do_rotary)),
            Attribute::Int(c"rotary_interleaved", i64::from(attributes.rotary_interleaved)),
            Attribute::Int(c"local_window_size", window),
        ];
        let create = |types: &[(&std::ffi::CStr, DataType)]| {
            Standalone::new(
                info,
                c"com.microsoft",
                c"GroupQueryAttention",
                types,
                &list,
                INPUTS as i32,
                3,
            )
        };
        // T_CACHE exists since ORT has quantised caches; an unknown name is an error on older hosts.
        create(&[(c"T", data_type), (c"T_CACHE", data_type)])
            .or_else(|_| create(&[(c"T", data_type)]))
            .map(Self)
    }

    /// Whether the operator computes what our contract asks for in this call.
    pub fn applies(dims: &Dims, plan: &Plan, has_head_sink: bool) -> bool {
        let whole_prompts = plan.sequences.iter().all(|s| s.len == dims.tokens);
        let one = dims.batch == 1 && plan.sequences.iter().all(|s| s.fed == dims.tokens);
        let shapes = dims.head_size.is_multiple_of(16) && dims.rotary_half.is_multiple_of(8);
        !has_head_sink && shapes && (whole_prompts || one)
    }

    /// Appends keys and values to the present caches (which already hold the past) and writes the output.
    pub fn run(&self, context: &Context, plan: &Plan, operands: &DelegateOperands) -> Result<()> {
        // The caller's number may be an upper bound; GroupQueryAttention tells a prompt by the exact one.
        let longest = plan.sequences.iter().map(|s| s.len).max().unwrap_or(0);
        let total = OwnedScalar::new(longest as i32)?;
        let o = operands;
        let inputs = [
            Some(o.query),
            o.key,
            o.value,
            Some(o.present_key),
            Some(o.present_value),
            Some(o.seqlens_k),
            Some(total.tensor()),
            o.cos,
            o.sin,
        ];
        self.0
            .invoke(context, &inputs, &[o.output, o.present_key, o.present_value])
    }
}

/// The tensors that the host's operator reads and writes.
pub struct DelegateOperands {
    pub query: Tensor,
    pub key: Option<Tensor>,
    pub value: Option<Tensor>,
    pub seqlens_k: Tensor,
    pub cos: Option<Tensor>,
    pub sin: Option<Tensor>,
    pub output: Tensor,
    pub present_key: Tensor,
    pub present_value: Tensor,
}
