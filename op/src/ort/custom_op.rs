//! A custom operator as ORT sees it: the table of callbacks, made once per operator type.

use std::any::TypeId;
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::{Mutex, PoisonError};

use ort_sys::{OrtCustomOp, OrtCustomOpInputOutputCharacteristic, OrtMemType, OrtStatusPtr};

use super::api::{api_version, guard, ort};
use super::{Context, DataType, Error, Info, Result, ShapeContext};

/// One input or output.
#[derive(Clone, Copy)]
pub struct Port {
    data_type: DataType,
    optional: bool,
    on_cpu: bool,
}

impl Port {
    pub const fn required(data_type: DataType) -> Self {
        Self {
            data_type,
            optional: false,
            on_cpu: false,
        }
    }

    pub const fn optional(data_type: DataType) -> Self {
        Self {
            data_type,
            optional: true,
            on_cpu: false,
        }
    }

    /// Kept in host memory whatever the execution provider.
    pub const fn on_cpu(self) -> Self {
        Self { on_cpu: true, ..self }
    }
}

/// An operator for one element type and execution provider.
pub trait Operator: 'static {
    const NAME: &'static CStr;
    /// `None`: the CPU.
    const PROVIDER: Option<&'static CStr> = None;
    const INPUTS: &'static [Port];
    const OUTPUTS: &'static [Port];
    /// Pairs (input, output) that may share a buffer.
    const IN_PLACE: &'static [(usize, usize)];
    /// A kernel: one per node and session. ORT runs it from many threads at once, hence `Sync` and `&self`.
    type Kernel: Send + Sync + 'static;

    fn create(info: &Info) -> Result<Self::Kernel>;
    fn compute(kernel: &Self::Kernel, context: &Context) -> Result<()>;
    fn infer(shapes: &ShapeContext) -> Result<()>;
}

/// ORT below 1.24 dereferences a null type for an absent optional input before it calls shape inference: a crash at
/// load. Operators with optional inputs go without it there.
const SAFE_INFERENCE_API: u32 = 24;

fn port(ports: &'static [Port], index: usize) -> Port {
    // ORT asks only for indices below the counts that we gave; a required float is the harmless answer otherwise.
    ports
        .get(index)
        .copied()
        .unwrap_or(Port::required(DataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT))
}

const fn characteristic(port: Port) -> OrtCustomOpInputOutputCharacteristic {
    use OrtCustomOpInputOutputCharacteristic::{INPUT_OUTPUT_OPTIONAL, INPUT_OUTPUT_REQUIRED};
    if port.optional {
        INPUT_OUTPUT_OPTIONAL
    } else {
        INPUT_OUTPUT_REQUIRED
    }
}

type Op = *const OrtCustomOp;

unsafe extern "system" fn name<O: Operator>(_: Op) -> *const c_char {
    O::NAME.as_ptr()
}
unsafe extern "system" fn provider<O: Operator>(_: Op) -> *const c_char {
    O::PROVIDER.map_or(ptr::null(), CStr::as_ptr)
}
unsafe extern "system" fn input_count<O: Operator>(_: Op) -> usize {
    O::INPUTS.len()
}
unsafe extern "system" fn output_count<O: Operator>(_: Op) -> usize {
    O::OUTPUTS.len()
}
unsafe extern "system" fn input_type<O: Operator>(_: Op, i: usize) -> DataType {
    port(O::INPUTS, i).data_type
}
unsafe extern "system" fn output_type<O: Operator>(_: Op, i: usize) -> DataType {
    port(O::OUTPUTS, i).data_type
}
unsafe extern "system" fn input_kind<O: Operator>(_: Op, i: usize) -> OrtCustomOpInputOutputCharacteristic {
    characteristic(port(O::INPUTS, i))
}
unsafe extern "system" fn output_kind<O: Operator>(_: Op, i: usize) -> OrtCustomOpInputOutputCharacteristic {
    characteristic(port(O::OUTPUTS, i))
}
unsafe extern "system" fn input_memory<O: Operator>(_: Op, i: usize) -> OrtMemType {
    if port(O::INPUTS, i).on_cpu {
        OrtMemType::OrtMemTypeCPUInput
    } else {
        OrtMemType::OrtMemTypeDefault
    }
}
unsafe extern "system" fn one(_: Op) -> c_int {
    1
}
unsafe extern "system" fn newest(_: Op) -> c_int {
    c_int::MAX
}
unsafe extern "system" fn create<O: Operator>(
    _: Op,
    _: *const ort_sys::OrtApi,
    info: *const ort_sys::OrtKernelInfo,
    out: *mut *mut c_void,
) -> OrtStatusPtr {
    guard(|| {
        let kernel = O::create(&Info(info))?;
        // SAFETY: ORT passes a place for the kernel.
        unsafe { *out = Box::into_raw(Box::new(kernel)).cast() };
        Ok(())
    })
}
unsafe extern "system" fn compute<O: Operator>(
    kernel: *mut c_void,
    context: *mut ort_sys::OrtKernelContext,
) -> OrtStatusPtr {
    // SAFETY: ORT passes the kernel that `create` made, alive until `destroy`; it is Sync.
    guard(|| O::compute(unsafe { &*kernel.cast::<O::Kernel>() }, &Context(context)))
}
unsafe extern "system" fn destroy<O: Operator>(kernel: *mut c_void) {
    let _ = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: ORT passes the kernel that `create` made, once, after its last run.
        drop(unsafe { Box::from_raw(kernel.cast::<O::Kernel>()) });
    }));
}
unsafe extern "system" fn infer<O: Operator>(_: Op, shapes: *mut ort_sys::OrtShapeInferContext) -> OrtStatusPtr {
    guard(|| O::infer(&ShapeContext(shapes)))
}
unsafe extern "system" fn in_place<O: Operator>(inputs: *mut *mut c_int, outputs: *mut *mut c_int) -> usize {
    // ORT hands the two lists back to `release`; they are boxed slices of the same, known length.
    let list = |pick: fn(&(usize, usize)) -> usize| -> *mut c_int {
        let v: Vec<c_int> = O::IN_PLACE.iter().map(|p| pick(p) as c_int).collect();
        Box::into_raw(v.into_boxed_slice()).cast()
    };
    // SAFETY: ORT passes two places for the lists.
    unsafe {
        *inputs = list(|p| p.0);
        *outputs = list(|p| p.1);
    }
    O::IN_PLACE.len()
}
unsafe extern "system" fn release_in_place<O: Operator>(inputs: *mut c_int, outputs: *mut c_int) {
    for list in [inputs, outputs] {
        if !list.is_null() {
            // SAFETY: `in_place` made both lists as boxed slices of this length; ORT returns each once.
            drop(unsafe { Box::from_raw(ptr::slice_from_raw_parts_mut(list, O::IN_PLACE.len())) });
        }
    }
}
unsafe extern "system" fn no_alias(inputs: *mut *mut c_int, outputs: *mut *mut c_int) -> usize {
    // SAFETY: ORT passes two places for the lists.
    unsafe {
        *inputs = ptr::null_mut();
        *outputs = ptr::null_mut();
    }
    0
}
unsafe extern "system" fn release_no_alias(_: *mut c_int, _: *mut c_int) {}

/// The callback table of `O`.
fn table<O: Operator>() -> OrtCustomOp {
    let infers = api_version() >= SAFE_INFERENCE_API || O::INPUTS.iter().all(|p| !p.optional);
    OrtCustomOp {
        // ORT rejects an operator that is newer than itself.
        version: api_version(),
        CreateKernel: None,
        GetName: Some(name::<O>),
        GetExecutionProviderType: Some(provider::<O>),
        GetInputType: Some(input_type::<O>),
        GetInputTypeCount: Some(input_count::<O>),
        GetOutputType: Some(output_type::<O>),
        GetOutputTypeCount: Some(output_count::<O>),
        KernelCompute: None,
        KernelDestroy: Some(destroy::<O>),
        GetInputCharacteristic: Some(input_kind::<O>),
        GetOutputCharacteristic: Some(output_kind::<O>),
        GetInputMemoryType: Some(input_memory::<O>),
        GetVariadicInputMinArity: Some(one),
        GetVariadicInputHomogeneity: Some(one),
        GetVariadicOutputMinArity: Some(one),
        GetVariadicOutputHomogeneity: Some(one),
        CreateKernelV2: Some(create::<O>),
        KernelComputeV2: Some(compute::<O>),
        InferOutputShapeFn: if infers { Some(infer::<O>) } else { None },
        GetStartVersion: Some(one),
        GetEndVersion: Some(newest),
        GetMayInplace: Some(in_place::<O>),
        ReleaseMayInplace: Some(release_in_place::<O>),
        GetAliasMap: Some(no_alias),
        ReleaseAliasMap: Some(release_no_alias),
    }
}

/// A table that lives for the rest of the process, like the sessions that may keep it.
struct Shareable(OrtCustomOp);

// SAFETY: functions and numbers, which nobody writes after they are made.
unsafe impl Send for Shareable {}
// SAFETY: as above.
unsafe impl Sync for Shareable {}

/// The table of `O`: made once a process.
fn table_of<O: Operator>() -> *const OrtCustomOp {
    static TABLES: Mutex<BTreeMap<TypeId, &'static Shareable>> = Mutex::new(BTreeMap::new());
    let mut tables = TABLES.lock().unwrap_or_else(PoisonError::into_inner);
    let made = tables
        .entry(TypeId::of::<O>())
        .or_insert_with(|| Box::leak(Box::new(Shareable(table::<O>()))));
    &raw const made.0
}

/// Collects operators of one domain and adds them to a session's options.
pub struct Registry(Vec<*const OrtCustomOp>);

impl Registry {
    pub fn operator<O: Operator>(mut self) -> Self {
        self.0.push(table_of::<O>());
        self
    }
}

/// Adds the operators that `fill` collects to `options` under `domain`.
///
/// # Safety
/// `options` is the session options that ONNX Runtime passes to `RegisterCustomOps`.
pub unsafe fn register(
    options: *mut ort_sys::OrtSessionOptions,
    domain: &'static CStr,
    fill: impl FnOnce(Registry) -> Registry,
) -> Result<()> {
    if options.is_null() {
        return Err(Error::invalid("RegisterCustomOps got null session options"));
    }
    let mut made = ptr::null_mut();
    // The domain is never released: sessions keep pointing at it.
    ort!(CreateCustomOpDomain(domain.as_ptr(), &mut made))?;
    for op in fill(Registry(Vec::new())).0 {
        ort!(CustomOpDomain_Add(made, op))?;
    }
    ort!(AddCustomOpDomain(options, made))
}

#[cfg(test)]
mod tests {
    use super::super::Plain;
    use super::*;

    struct Nothing<const N: usize>;

    impl<const N: usize> Operator for Nothing<N> {
        const NAME: &'static CStr = c"Nothing";
        const INPUTS: &'static [Port] = &[Port::required(f32::DATA_TYPE)];
        const OUTPUTS: &'static [Port] = &[Port::required(f32::DATA_TYPE)];
        const IN_PLACE: &'static [(usize, usize)] = &[];
        type Kernel = ();

        fn create(_: &Info) -> Result<()> {
            Ok(())
        }
        fn compute((): &(), _: &Context) -> Result<()> {
            Ok(())
        }
        fn infer(_: &ShapeContext) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_table_is_made_once_for_an_operator() {
        assert_eq!(table_of::<Nothing<1>>(), table_of::<Nothing<1>>());
        assert_ne!(table_of::<Nothing<1>>(), table_of::<Nothing<2>>());
    }
}
