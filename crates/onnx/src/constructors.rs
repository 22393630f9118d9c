//! Short ways to make messages, and to read them.

use crate::messages::*;
use bytes::Bytes;

/// The version of ONNX's operators where a model doesn't say one: that of the oldest ONNX Runtime that loads the
/// plugin.
const UNSAID_OPSET: i64 = 22;

impl ModelProto {
    /// The value of a metadata entry.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        let entry = self.metadata_props.iter().find(|e| e.key() == key);
        entry.map(StringStringEntryProto::value)
    }

    /// Sets a metadata entry, in place when the key exists.
    pub fn set_metadata(&mut self, key: &str, value: impl Into<String>) {
        let value = value.into();
        match self.metadata_props.iter_mut().find(|e| e.key() == key) {
            Some(entry) => entry.value = Some(value),
            None => self.metadata_props.push(StringStringEntryProto::new(key, value)),
        }
    }

    /// The version of a domain's operators that the model imports ("" is ONNX's own, also written "ai.onnx"). Where a
    /// model imports it more than once, ONNX Runtime takes the last.
    pub fn opset_version(&self, domain: &str) -> Option<i64> {
        let plain = |d: &str| if d == "ai.onnx" { "" } else { d }.to_owned();
        let import = self.opset_import.iter().rfind(|o| plain(o.domain()) == plain(domain));
        import.map(OperatorSetIdProto::version)
    }

    /// The version of ONNX's own operators. ONNX Runtime takes the newest that it knows where a model imports other
    /// operators only; what this program adds to a graph is written alike from that of the oldest supported ONNX
    /// Runtime on.
    pub fn onnx_opset(&self) -> i64 {
        self.opset_version("").unwrap_or(UNSAID_OPSET)
    }
}

impl OperatorSetIdProto {
    /// A domain of operators ("" is ONNX's own) and its version.
    pub fn new(domain: &str, version: i64) -> Self {
        Self {
            domain: Some(domain.to_owned()),
            version: Some(version),
        }
    }
}

impl StringStringEntryProto {
    /// An entry of a list of keys and values.
    pub fn new(key: impl Into<String>, value: impl Into<String>) -> Self {
        Self {
            key: Some(key.into()),
            value: Some(value.into()),
        }
    }
}

impl NodeProto {
    /// A node of `domain` ("" is ONNX's own). Empty names stand for absent inputs and outputs.
    pub fn new(domain: &str, op_type: &str, name: &str, inputs: &[&str], outputs: &[&str]) -> Self {
        Self {
            input: inputs.iter().map(|s| (*s).to_owned()).collect(),
            output: outputs.iter().map(|s| (*s).to_owned()).collect(),
            name: (!name.is_empty()).then(|| name.to_owned()),
            op_type: Some(op_type.to_owned()),
            domain: (!domain.is_empty()).then(|| domain.to_owned()),
            ..Default::default()
        }
    }

    /// The node with one attribute more.
    pub fn with(mut self, attribute: AttributeProto) -> Self {
        self.attribute.push(attribute);
        self
    }

    /// The operator's domain, "" for ONNX's own however it is written.
    pub fn op_domain(&self) -> &str {
        match self.domain() {
            "ai.onnx" => "",
            domain => domain,
        }
    }

    /// Whether the node calls this operator.
    pub fn is(&self, domain: &str, op_type: &str) -> bool {
        self.op_type() == op_type && self.op_domain() == domain
    }

    /// The input's name; "" when it is absent.
    pub fn input(&self, slot: usize) -> &str {
        self.input.get(slot).map_or("", String::as_str)
    }

    /// The output's name; "" when it is absent.
    pub fn output(&self, slot: usize) -> &str {
        self.output.get(slot).map_or("", String::as_str)
    }

    /// The attribute of this name.
    pub fn attribute(&self, name: &str) -> Option<&AttributeProto> {
        self.attribute.iter().find(|a| a.name() == name)
    }

    /// How a message calls the node: its name, else its operator and first output.
    pub fn label(&self) -> String {
        match self.name() {
            "" => format!("{} -> {}", self.op_type(), self.output(0)),
            name => name.to_owned(),
        }
    }
}

impl AttributeProto {
    fn typed(name: &str, r#type: AttributeType) -> Self {
        Self {
            name: Some(name.to_owned()),
            r#type: Some(r#type.into()),
            ..Default::default()
        }
    }

    /// A whole number.
    pub fn int(name: &str, value: i64) -> Self {
        Self {
            i: Some(value),
            ..Self::typed(name, AttributeType::Int)
        }
    }

    /// A float32.
    pub fn float(name: &str, value: f32) -> Self {
        Self {
            f: Some(value),
            ..Self::typed(name, AttributeType::Float)
        }
    }

    /// A string.
    pub fn string(name: &str, value: &str) -> Self {
        Self {
            s: Some(Bytes::copy_from_slice(value.as_bytes())),
            ..Self::typed(name, AttributeType::String)
        }
    }

    /// A list of whole numbers.
    pub fn ints(name: &str, values: &[i64]) -> Self {
        Self {
            ints: values.to_vec(),
            ..Self::typed(name, AttributeType::Ints)
        }
    }

    /// A tensor.
    pub fn tensor(name: &str, value: TensorProto) -> Self {
        Self {
            t: Some(Box::new(value)),
            ..Self::typed(name, AttributeType::Tensor)
        }
    }

    /// A subgraph, as `If` and `Loop` have.
    pub fn graph(name: &str, value: GraphProto) -> Self {
        Self {
            g: Some(Box::new(value)),
            ..Self::typed(name, AttributeType::Graph)
        }
    }
}

impl TensorProto {
    /// A tensor from its little-endian bytes, which are not copied.
    pub fn raw(name: &str, data_type: DataType, dims: &[i64], raw_data: Bytes) -> Self {
        Self {
            dims: dims.to_vec(),
            data_type: Some(data_type.into()),
            name: Some(name.to_owned()),
            raw_data: Some(raw_data),
            ..Default::default()
        }
    }

    /// An int64 tensor, row-major.
    pub fn int64s(name: &str, dims: &[i64], values: &[i64]) -> Self {
        Self::raw(
            name,
            DataType::Int64,
            dims,
            values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        )
    }

    /// An int32 tensor, row-major.
    pub fn int32s(name: &str, dims: &[i64], values: &[i32]) -> Self {
        Self::raw(
            name,
            DataType::Int32,
            dims,
            values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        )
    }

    /// A float32 tensor, row-major.
    pub fn floats(name: &str, dims: &[i64], values: &[f32]) -> Self {
        Self::raw(
            name,
            DataType::Float,
            dims,
            values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        )
    }

    /// Whether the numbers are in another file.
    pub fn is_external(&self) -> bool {
        self.data_location == Some(DataLocation::External.into())
    }

    /// What `external_data` says under `key`; of several, the last.
    pub fn external_entry(&self, key: &str) -> Option<&str> {
        let entry = self.external_data.iter().rev().find(|e| e.key() == key);
        entry.map(|e| e.value())
    }
}

impl ValueInfoProto {
    /// A tensor value; [`Dimension`]s convert from numbers and names.
    pub fn tensor(name: &str, data_type: DataType, dims: impl IntoIterator<Item = Dimension>) -> Self {
        let shape = TensorShapeProto {
            dim: dims.into_iter().collect(),
        };
        let tensor_type = TensorTypeProto {
            elem_type: Some(data_type.into()),
            shape: Some(shape),
        };
        Self {
            name: Some(name.to_owned()),
            r#type: Some(TypeProto {
                tensor_type: Some(tensor_type),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// A tensor value without a declared shape: ONNX Runtime then leaves every check of shapes to the operators.
    pub fn unshaped(name: &str, data_type: DataType) -> Self {
        let tensor_type = TensorTypeProto {
            elem_type: Some(data_type.into()),
            shape: None,
        };
        Self {
            name: Some(name.to_owned()),
            r#type: Some(TypeProto {
                tensor_type: Some(tensor_type),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn tensor_type(&self) -> Option<&TensorTypeProto> {
        self.r#type.as_ref()?.tensor_type.as_ref()
    }

    /// The declared element type of a tensor.
    pub fn data_type(&self) -> Option<DataType> {
        DataType::try_from(self.tensor_type()?.elem_type?).ok()
    }

    /// The declared dimensions of a tensor.
    pub fn dims(&self) -> Option<&[Dimension]> {
        Some(&self.tensor_type()?.shape.as_ref()?.dim)
    }

    /// The declared dimensions of a tensor, to change.
    pub fn dims_mut(&mut self) -> Option<&mut Vec<Dimension>> {
        Some(&mut self.r#type.as_mut()?.tensor_type.as_mut()?.shape.as_mut()?.dim)
    }
}

impl Dimension {
    /// The dimension's number. Some exporters write fixed dimensions as names: "32" is 32.
    pub fn fixed(&self) -> Option<i64> {
        self.dim_value.or_else(|| self.dim_param.as_deref()?.parse().ok())
    }

    /// The dimension's name, when it is one.
    pub fn symbol(&self) -> Option<&str> {
        match self.dim_param.as_deref() {
            Some(name) if !name.is_empty() && self.fixed().is_none() => Some(name),
            _ => None,
        }
    }
}

impl From<i64> for Dimension {
    fn from(value: i64) -> Self {
        Self {
            dim_value: Some(value),
            ..Default::default()
        }
    }
}

impl From<&str> for Dimension {
    fn from(name: &str) -> Self {
        Self {
            dim_param: Some(name.to_owned()),
            ..Default::default()
        }
    }
}

impl DataType {
    /// The type's name as ONNX Runtime and NumPy write it: "float32", "float16".
    pub fn label(self) -> &'static str {
        match self {
            Self::Float => "float32",
            Self::Double => "float64",
            Self::Float8e4m3fn => "float8e4m3fn",
            Self::Float8e4m3fnuz => "float8e4m3fnuz",
            Self::Float8e5m2 => "float8e5m2",
            Self::Float8e5m2fnuz => "float8e5m2fnuz",
            Self::Float4e2m1 => "float4e2m1",
            Self::Float8e8m0 => "float8e8m0",
            Self::Float6e2m3 => "float6e2m3",
            Self::Float6e3m2 => "float6e3m2",
            Self::Float16 => "float16",
            Self::Bfloat16 => "bfloat16",
            Self::Uint8 => "uint8",
            Self::Int8 => "int8",
            Self::Uint16 => "uint16",
            Self::Int16 => "int16",
            Self::Int32 => "int32",
            Self::Int64 => "int64",
            Self::Uint32 => "uint32",
            Self::Uint64 => "uint64",
            Self::Uint4 => "uint4",
            Self::Int4 => "int4",
            Self::Uint2 => "uint2",
            Self::Int2 => "int2",
            Self::String => "string",
            Self::Bool => "bool",
            Self::Complex64 => "complex64",
            Self::Complex128 => "complex128",
            Self::Undefined => "undefined",
        }
    }

    /// Bits of one element; none for strings and undefined.
    pub fn bits(self) -> Option<u64> {
        Some(match self {
            Self::Undefined | Self::String => return None,
            Self::Uint2 | Self::Int2 => 2,
            Self::Uint4 | Self::Int4 | Self::Float4e2m1 => 4,
            Self::Float6e2m3 | Self::Float6e3m2 => 6,
            Self::Uint8
            | Self::Int8
            | Self::Bool
            | Self::Float8e4m3fn
            | Self::Float8e4m3fnuz
            | Self::Float8e5m2
            | Self::Float8e5m2fnuz
            | Self::Float8e8m0 => 8,
            Self::Uint16 | Self::Int16 | Self::Float16 | Self::Bfloat16 => 16,
            Self::Float | Self::Int32 | Self::Uint32 => 32,
            Self::Double | Self::Int64 | Self::Uint64 | Self::Complex64 => 64,
            Self::Complex128 => 128,
        })
    }
}
