//! Dense prefill by ORT's own GroupQueryAttention, called from inside our kernel.
//!
//! Each execution provider decides where it applies ([`crate::cpu`], [`crate::cuda`]); everything else is computed by
//! our own kernels.

use retro_contract::input;

use crate::contract::Attributes;
use crate::io_spec::Operands;
use crate::ort::{Attribute, Context, DataType, Info, InvokedOp, Result, Tensor, host_version};

/// The first version of ONNX Runtime (1.x) whose GroupQueryAttention has the sliding window that our contract asks for.
/// Before, its prefill attends to one token more.
const RIGHT_WINDOWS: u32 = 24;

/// The host's GroupQueryAttention with a node's attributes.
pub struct GqaFallback {
    operator: InvokedOp,
    do_rotary: bool,
}

/// Inputs of GroupQueryAttention that we declare, up to sin_cache.
const INPUTS: usize = 9;

impl GqaFallback {
    /// Creates the operator for element type `data_type`; `None` where the host's computes something else, and, with a
    /// line in the host's log, where the host has none for it.
    pub fn new(info: &Info, attributes: &Attributes, data_type: DataType) -> Result<Option<Self>> {
        if attributes.local_window.is_some() && host_version() < RIGHT_WINDOWS {
            return Ok(None);
        }
        match Self::create(info, attributes, data_type) {
            Ok(fallback) => Ok(Some(fallback)),
            Err(e) => {
                let node = info.node_name()?;
                info.warn(&format!(
                    "RetroAttention node {node:?} computes its prefill itself: this ONNX Runtime gives no \
                     GroupQueryAttention for it ({e})"
                ))?;
                Ok(None)
            }
        }
    }

    fn create(info: &Info, attributes: &Attributes, data_type: DataType) -> Result<Self> {
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
            InvokedOp::new(
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
            .map(|operator| Self {
                operator,
                do_rotary: attributes.do_rotary,
            })
    }

    /// Appends keys and values to `present` (key and value caches, which already hold the past) and writes `output`.
    ///
    /// `total_sequence_length` stands in for the caller's, which may be an upper bound.
    pub fn run(
        &self,
        context: &Context,
        operands: &Operands,
        total_sequence_length: Tensor,
        output: Tensor,
        present: [Tensor; 2],
    ) -> Result<()> {
        let [key_cache, value_cache] = present;
        // Without do_rotary the caches may be there all the same; GroupQueryAttention must not see them.
        let rotary = |slot: usize| operands.tensors[slot].filter(|_| self.do_rotary);
        let inputs = [
            Some(operands.required(input::QUERY)?),
            operands.tensors[input::KEY],
            operands.tensors[input::VALUE],
            Some(key_cache),
            Some(value_cache),
            Some(operands.required(input::SEQLENS_K)?),
            Some(total_sequence_length),
            rotary(input::COS_CACHE),
            rotary(input::SIN_CACHE),
        ];
        self.operator
            .invoke(context, &inputs, &[output, key_cache, value_cache])
    }
}
