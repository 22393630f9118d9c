//! The attributes of `com.microsoft::GroupQueryAttention`.

use crate::prove::AttributeRefusal;
use retro_onnx::{AttributeProto, AttributeType, NodeProto};

/// Heads and head sizes past this are no model's.
pub const MAX_SIZE: i64 = 1 << 16;

/// The attributes that the operator has a counterpart for.
pub struct GqaAttributes {
    pub num_heads: i64,
    pub kv_num_heads: i64,
    /// 0: 1/sqrt(D).
    pub scale: f32,
    /// 0: off.
    pub softcap: f32,
    pub do_rotary: bool,
    pub rotary_interleaved: bool,
    /// -1: none.
    pub local_window_size: i64,
    pub sliding_window_cache: bool,
    pub qk_norm_epsilon: f32,
    pub smooth_softmax: bool,
}

impl GqaAttributes {
    /// # Errors
    /// An attribute is not known here, or has a value that the operator has no counterpart for.
    pub fn of(node: &NodeProto) -> Result<Self, AttributeRefusal> {
        let mut a = Self {
            num_heads: 0,
            kv_num_heads: 0,
            scale: 0.0,
            softcap: 0.0,
            do_rotary: false,
            rotary_interleaved: false,
            local_window_size: -1,
            sliding_window_cache: false,
            qk_norm_epsilon: 1e-6,
            smooth_softmax: false,
        };
        for attribute in &node.attribute {
            a.set(attribute)?;
        }
        let (q_heads, kv_heads) = (a.num_heads, a.kv_num_heads);
        if q_heads < 1 || kv_heads < 1 || q_heads > MAX_SIZE || q_heads % kv_heads != 0 {
            return Err(AttributeRefusal::Heads { q_heads, kv_heads });
        }
        let value = a.local_window_size;
        if value != -1 && !(1..=i64::from(i32::MAX)).contains(&value) {
            return Err(AttributeRefusal::Window { value });
        }
        Ok(a)
    }

    fn set(&mut self, attribute: &AttributeProto) -> Result<(), AttributeRefusal> {
        match attribute.name() {
            "num_heads" => self.num_heads = int(attribute)?,
            "kv_num_heads" => self.kv_num_heads = int(attribute)?,
            "scale" => self.scale = float(attribute)?,
            "softcap" => self.softcap = float(attribute)?,
            "do_rotary" => self.do_rotary = flag(attribute)?,
            "rotary_interleaved" => self.rotary_interleaved = flag(attribute)?,
            "local_window_size" => self.local_window_size = int(attribute)?,
            "sliding_window_cache" => self.sliding_window_cache = flag(attribute)?,
            "qk_norm_epsilon" => self.qk_norm_epsilon = float(attribute)?,
            "causal" if int(attribute)? == 1 => {}
            "smooth_softmax" if matches!(int(attribute)?, -1..=1) => self.smooth_softmax = int(attribute)? == 1,
            "qk_output" | "kv_cache_bit_width" if int(attribute)? == 0 => {}
            "k_quant_type" | "v_quant_type" if attribute.s() == b"NONE".as_slice() => {}
            name => {
                return Err(AttributeRefusal::Value {
                    name: name.to_owned(),
                    value: shown(attribute),
                });
            }
        }
        Ok(())
    }
}

fn has_type(attribute: &AttributeProto, expected: AttributeType) -> Result<(), AttributeRefusal> {
    if attribute.r#type == Some(expected.into()) && attribute.ref_attr_name().is_empty() {
        return Ok(());
    }
    let name = attribute.name().to_owned();
    Err(AttributeRefusal::Type { name, expected })
}

fn int(attribute: &AttributeProto) -> Result<i64, AttributeRefusal> {
    has_type(attribute, AttributeType::Int).map(|()| attribute.i())
}

fn flag(attribute: &AttributeProto) -> Result<bool, AttributeRefusal> {
    match int(attribute)? {
        0 => Ok(false),
        1 => Ok(true),
        value => Err(AttributeRefusal::Flag {
            name: attribute.name().to_owned(),
            value,
        }),
    }
}

/// A number from 0 on.
fn float(attribute: &AttributeProto) -> Result<f32, AttributeRefusal> {
    has_type(attribute, AttributeType::Float)?;
    let value = attribute.f();
    if value.is_finite() && value >= 0.0 {
        return Ok(value);
    }
    let name = attribute.name().to_owned();
    Err(AttributeRefusal::Number { name, value })
}

fn shown(attribute: &AttributeProto) -> String {
    match attribute.r#type() {
        AttributeType::Int => attribute.i().to_string(),
        AttributeType::Float => attribute.f().to_string(),
        AttributeType::String => format!("{:?}", String::from_utf8_lossy(attribute.s())),
        other => format!("{other:?}"),
    }
}
