//! Dense prefill by ORT's own GroupQueryAttention, called from inside our kernel.
//!
//! Each execution provider decides where it applies ([`crate::cpu`], [`crate::cuda`]); everything else is computed by our
//! own kernels.

use crate::contract::Attributes;
use crate::host::{Attribute, Context, DataType, Info, Result, Standalone, Tensor};

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

    /// Appends keys and values to the present caches (which already hold the past) and writes the output.
    pub fn run(&self, context: &Context, operands: &DelegateOperands) -> Result<()> {
        let o = operands;
        let inputs = [
            Some(o.query),
            o.key,
            o.value,
            Some(o.present_key),
            Some(o.present_value),
            Some(o.seqlens_k),
            Some(o.total_sequence_length),
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
    pub total_sequence_length: Tensor,
    pub cos: Option<Tensor>,
    pub sin: Option<Tensor>,
    pub output: Tensor,
    pub present_key: Tensor,
    pub present_value: Tensor,
}
