//! `ai.retro::MatMulNBits` on CUDA as ORT runs it.

use std::ffi::{CStr, c_void};
use std::marker::PhantomData;
use std::sync::Arc;

use retro_contract::matmul_nbits::limits::CUDA_MAX_ROWS;
use retro_contract::matmul_nbits::{input, output};

use super::device::Device;
use super::kernel_set::CudaElement;
use super::launch::{LaunchMode, Stream};
use super::matmul_abi::{MATMUL_ROW_THREADS, MatmulParams, ZeroPoints};
use super::matmul_kernels::{self, MatmulKernels};
use super::scratch::lock;
use crate::matmul_nbits::{
    Attributes, NAME, Operands, check_weights, infer, inputs, output_shape, outputs, read_attributes,
};
use crate::ort::{
    Attribute, Context, DeviceTensor, Error, Info, InvokedOp, Operator, Plain, Port, Result, ShapeContext, Tensor,
    require,
};

/// `ai.retro::MatMulNBits` on CUDA for activations of type `T` and zero points of type `Z`, which is `T` or uint8.
pub struct CudaMatMulNBits<T, Z>(PhantomData<(T, Z)>);

/// One node of one session.
pub struct MatMulKernel {
    attributes: Attributes,
    device: Arc<Device>,
    kernels: Arc<MatmulKernels>,
    params: MatmulParams,
    /// Whether the kernels for few rows can read the weights.
    reads_packed: bool,
    /// All inputs but A are weights, and their shapes are checked.
    constant: bool,
    /// The host's product with dequantised weights.
    product: InvokedOp,
}

impl<T: CudaElement, Z: Plain> Operator for CudaMatMulNBits<T, Z> {
    const NAME: &'static CStr = NAME;
    const PROVIDER: Option<&'static CStr> = Some(c"CUDAExecutionProvider");
    const INPUTS: &'static [Port] = &inputs(T::DATA_TYPE, Z::DATA_TYPE);
    const OUTPUTS: &'static [Port] = &outputs(T::DATA_TYPE);
    const IN_PLACE: &'static [(usize, usize)] = &[];
    type Kernel = MatMulKernel;

    fn create(info: &Info) -> Result<MatMulKernel> {
        let attributes = read_attributes(info)?;
        let mut operands = Operands::default();
        let mut constant = true;
        for slot in [input::B, input::SCALES, input::ZERO_POINTS, input::G_IDX, input::BIAS] {
            operands.tensors[slot] = info.constant_input(slot)?;
            constant &= operands.tensors[slot].is_some() || !info.has_input(slot)?;
        }
        check_weights(&attributes, &operands.shapes()?, packed::<Z>())?;
        let has_zeros = info.has_input(input::ZERO_POINTS)?;
        let zero_points = match (has_zeros, packed::<Z>()) {
            (false, _) => ZeroPoints::None,
            (true, true) => ZeroPoints::Packed,
            (true, false) => ZeroPoints::Float,
        };
        let device = Device::get(info.device()?)?;
        Ok(MatMulKernel {
            attributes,
            params: matmul_kernels::node_params(&attributes, zero_points)?,
            reads_packed: matmul_kernels::reads_packed(&attributes) && !info.has_input(input::G_IDX)?,
            kernels: matmul_kernels::find::<T>(&device, &attributes, has_zeros)?,
            device,
            constant,
            product: InvokedOp::new(
                info,
                c"com.microsoft",
                c"FusedMatMul",
                &[(c"T", T::DATA_TYPE)],
                &[Attribute::Int(c"transB", 1)],
                2,
                1,
            )?,
        })
    }

    fn compute(kernel: &MatMulKernel, context: &Context) -> Result<()> {
        kernel.compute::<T, Z>(context)
    }

    fn infer(shapes: &ShapeContext) -> Result<()> {
        infer(shapes)
    }
}

fn packed<Z: Plain>() -> bool {
    Z::DATA_TYPE == u8::DATA_TYPE
}

impl MatMulKernel {
    fn compute<T: CudaElement, Z: Plain>(&self, context: &Context) -> Result<()> {
        let operands = Operands::read(context)?;
        if !self.constant {
            check_weights(&self.attributes, &operands.shapes()?, packed::<Z>())?;
        }
        let a = operands.required(input::A)?;
        let out = output_shape(&self.attributes, &a.shape()?)?;
        let y = context.output(output::Y, &out.shape)?;
        if out.rows == 0 {
            return Ok(());
        }
        self.device.make_current()?;
        let stream = self.device.stream(context)?;
        let mut p = self.params.clone();
        self.set_addresses(&mut p, &operands, a, y)?;
        let in_sixteens = |address: *const c_void| address.addr().is_multiple_of(16);
        let reads_packed = self.reads_packed && [p.a, p.b, p.scales, p.zeros].into_iter().all(in_sixteens);
        if !reads_packed || out.rows > CUDA_MAX_ROWS {
            return self.multiply_dequantised::<T>(context, stream, p, (a, y), out.rows);
        }
        p.b_is_constant = i32::from(self.constant);
        let launch = matmul_kernels::launch(&self.device, &self.kernels, out.rows, &mut p);
        stream.launch(&launch.kernel, launch.grid, launch.shared, LaunchMode::PdlMaxShared, &p)
    }

    fn set_addresses(&self, p: &mut MatmulParams, operands: &Operands, a: Tensor, y: Tensor) -> Result<()> {
        let address = |slot: usize| -> Result<*const c_void> {
            let tensor = operands.tensors[slot];
            tensor.map_or(Ok(std::ptr::null()), |t| t.address().map(<*mut c_void>::cast_const))
        };
        p.a = a.address()?;
        p.b = address(input::B)?;
        p.scales = address(input::SCALES)?;
        p.zeros = address(input::ZERO_POINTS)?;
        p.block_of = address(input::G_IDX)?.cast();
        p.bias = address(input::BIAS)?;
        p.y = y.address()?;
        require!(
            p.zeros.is_null() == (self.params.zero_points == ZeroPoints::None),
            "input {} comes and goes",
            input::NAMES[input::ZERO_POINTS]
        );
        let elements = [p.a, p.scales, p.bias, p.y.cast_const()];
        let in_twos = |address: &*const c_void| address.addr().is_multiple_of(2);
        let zeros_fit = self.params.zero_points == ZeroPoints::Packed || in_twos(&p.zeros);
        require!(
            elements.iter().all(in_twos) && zeros_fit && p.block_of.addr().is_multiple_of(4),
            "an input or the output lies at an address that is no multiple of its elements' size, on CUDA one is expected"
        );
        Ok(())
    }

    /// Dequantises the weights and lets the host multiply.
    fn multiply_dequantised<T: CudaElement>(
        &self,
        context: &Context,
        stream: Stream,
        mut p: MatmulParams,
        (a, y): (Tensor, Tensor),
        rows: usize,
    ) -> Result<()> {
        let (k, n) = (self.attributes.k, self.attributes.n);
        let bytes = n
            .checked_mul(k)
            .and_then(|elements| elements.checked_mul(size_of::<T>()));
        let bytes = bytes.ok_or_else(|| Error::invalid("the weights are too large to be dequantised"))?;
        let buffer = self.device.dequantised.of_stream(stream.raw.addr());
        let mut buffer = lock(&buffer);
        p.dequantised = buffer.get(bytes, stream)?;
        let grid = [n, k.div_ceil(8 * MATMUL_ROW_THREADS), 1];
        stream.launch(&self.kernels.dequantise, grid, 0, LaunchMode::Plain, &p)?;
        // SAFETY: the buffer has these bytes, and is this call's until the guard is dropped; what runs after on the stream
        // runs after the product.
        let weights =
            unsafe { DeviceTensor::new(p.dequantised, self.device.ordinal, T::DATA_TYPE, &[n as i64, k as i64])? };
        self.product
            .invoke(context, &[Some(a), Some(weights.tensor())], &[y])
            .map_err(|e| Error::runtime(format!("ONNX Runtime's own FusedMatMul failed: {e}")))?;
        if p.bias.is_null() {
            return Ok(());
        }
        let grid = [rows, n.div_ceil(MATMUL_ROW_THREADS), 1];
        stream.launch(&self.kernels.add_bias, grid, 0, LaunchMode::Plain, &p)
    }
}
