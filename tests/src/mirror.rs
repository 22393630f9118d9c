//! A run on a GPU for tensors that tests keep on the host: all of them in one block of device memory, with guards
//! between them. After the run every byte that is no output must be what it was: inputs and guards.

use std::{cell::RefCell, ffi::CString, ops::Range, ptr, sync::Arc};

use ort::AsPointer;
use retro_run::{
    Device,
    gpu::{Gpu, GpuMemory},
};

use crate::{
    host::{self, Opened, check},
    tensor::Tens,
};

/// Values that the host computes with, or that ONNX Runtime copies to the device: bound from host memory.
const ON_HOST: [&str; 8] = [
    "total_sequence_length",
    "retro_length",
    "input_ids",
    "attention_mask",
    "position_ids",
    "retro_page_budget",
    "logits",
    "past_sequence_length",
];
/// Bytes before and after each tensor that nobody may touch; read as any float type they are NaN.
const GUARD: usize = 4096;
const GUARD_BYTE: u8 = 0xff;
const ALIGNMENT: usize = 256;

thread_local! {
    /// Grown when a run needs more, so that most runs allocate nothing.
    static MEMORY: RefCell<Option<GpuMemory>> = const { RefCell::new(None) };
}

/// A tensor made of memory that somebody else owns.
struct View(*mut ort_sys::OrtValue);

impl View {
    fn new(tensor: &Tens, device: Device, data: *mut std::ffi::c_void) -> Self {
        let shape: Vec<i64> = tensor.shape().iter().map(|&n| n as i64).collect();
        let memory = device.memory().expect("ONNX Runtime names the device");
        let mut value = ptr::null_mut();
        // SAFETY: `data` holds the tensor's bytes on that device for as long as the view lives (see `run`); shape and
        // memory description are only read during the call.
        let status = unsafe {
            (ort::api().CreateTensorWithDataAsOrtValue)(
                memory.ptr(),
                data,
                tensor.len() * tensor.dtype().bytes(),
                shape.as_ptr(),
                shape.len(),
                tensor.dtype().element().into(),
                &mut value,
            )
        };
        check(status).expect("a tensor over device memory");
        Self(value)
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: made by `new`, released once.
        unsafe { (ort::api().ReleaseValue)(self.0) };
    }
}

/// As [`host::run`], on a GPU, every tensor `offset` bytes behind a multiple of 256.
pub fn run(
    offset: usize,
    opened: &Opened,
    gpu: &Arc<Gpu>,
    inputs: &[(&str, &Tens)],
    outputs: &mut [(&str, &mut Tens)],
    in_place: &mut [(&str, &str, &mut Tens)],
) -> Result<(), String> {
    MEMORY.with_borrow_mut(|memory| {
        let lengths = (inputs.iter().map(|(_, t)| t.bytes().len()))
            .chain(outputs.iter().map(|(_, t)| t.bytes().len()))
            .chain(in_place.iter().map(|(.., t)| t.bytes().len()));
        let (places, total) = layout(offset, lengths);
        if memory.as_ref().is_none_or(|m| m.bytes() < total) {
            *memory = None;
            *memory = Some(gpu.allocate(total.next_power_of_two()).expect("memory on the GPU"));
        }
        let memory = memory.as_mut().expect("allocated above");
        run_in(memory, opened, &places, total, inputs, outputs, in_place)
    })
}

/// As [`host::run`] on the CPU, every tensor `offset` bytes behind a multiple of 64, in memory of ours.
pub fn run_on_host(
    offset: usize,
    opened: &Opened,
    inputs: &[(&str, &Tens)],
    outputs: &mut [(&str, &mut Tens)],
    in_place: &mut [(&str, &str, &mut Tens)],
) -> Result<(), String> {
    let mut held: Vec<(View, Vec<u8>, usize)> = Vec::new();
    let binding = opened.create_binding().map_err(|e| e.to_string())?;
    let mut bind = |tensor: &Tens, as_input: Option<&str>, as_output: Option<&str>| {
        let bytes = tensor.bytes();
        let mut memory = vec![0u8; bytes.len() + offset + 64];
        let start = memory.as_ptr().align_offset(64) + offset;
        memory[start..start + bytes.len()].copy_from_slice(bytes);
        let view = View::new(tensor, Device::Cpu, memory[start..].as_mut_ptr().cast());
        let (api, c_name) = (ort::api(), |name: &str| CString::new(name).expect("a name"));
        if let Some(name) = as_input {
            // SAFETY: binding and value are alive; the name is read during the call; the binding shares the value's
            // ownership.
            check(unsafe { (api.BindInput)(binding.ptr().cast_mut(), c_name(name).as_ptr(), view.0) })?;
        }
        if let Some(name) = as_output {
            // SAFETY: as above.
            check(unsafe { (api.BindOutput)(binding.ptr().cast_mut(), c_name(name).as_ptr(), view.0) })?;
        }
        held.push((view, memory, start));
        Ok::<(), String>(())
    };
    for (name, tensor) in inputs {
        bind(tensor, Some(name), None)?;
    }
    for (name, tensor) in outputs.iter() {
        bind(tensor, None, Some(name))?;
    }
    for (past, present, tensor) in in_place.iter() {
        bind(tensor, Some(past), Some(present))?;
    }
    let result = host::run_binding(opened, &binding);
    drop(binding);
    let tensors = (outputs.iter_mut().map(|(_, t)| &mut **t)).chain(in_place.iter_mut().map(|(.., t)| &mut **t));
    for (tensor, (_, memory, start)) in tensors.zip(&held[inputs.len()..]) {
        let bytes = tensor.bytes_mut();
        bytes.copy_from_slice(&memory[*start..*start + bytes.len()]);
    }
    result
}

/// Where tensors of these lengths lie, and the end.
fn layout(offset: usize, lengths: impl Iterator<Item = usize>) -> (Vec<Range<usize>>, usize) {
    let mut next = GUARD;
    let place = |length: usize| {
        let place = next + offset..next + offset + length;
        next = (place.end + GUARD).next_multiple_of(ALIGNMENT);
        place
    };
    let places = lengths.map(place).collect();
    (places, next)
}

fn run_in(
    memory: &mut GpuMemory,
    opened: &Opened,
    places: &[Range<usize>],
    total: usize,
    inputs: &[(&str, &Tens)],
    outputs: &mut [(&str, &mut Tens)],
    in_place: &mut [(&str, &str, &mut Tens)],
) -> Result<(), String> {
    let (of_inputs, rest) = places.split_at(inputs.len());
    let (of_outputs, of_in_place) = rest.split_at(outputs.len());
    let mut image = vec![GUARD_BYTE; total];
    let all = (inputs.iter().map(|(_, t)| t.bytes()))
        .chain(outputs.iter().map(|(_, t)| t.bytes()))
        .chain(in_place.iter().map(|(.., t)| t.bytes()));
    for (place, bytes) in places.iter().zip(all) {
        image[place.clone()].copy_from_slice(bytes);
    }
    memory.region().write(0, &image).expect("the GPU is written");

    let binding = opened.create_binding().map_err(|e| e.to_string())?;
    let device = host::device();
    let mut views = Vec::new();
    let mut bind = |name: &str, tensor: &Tens, place: &Range<usize>, as_input: bool, as_output: Option<&str>| {
        let view = if ON_HOST.contains(&name) {
            View::new(tensor, Device::Cpu, tensor.value().data_ptr().cast_mut())
        } else {
            View::new(tensor, device, memory.address(place.start).expect("inside"))
        };
        let api = ort::api();
        let c_name = |name: &str| CString::new(name).expect("a name");
        if as_input {
            // SAFETY: binding and value are alive; the name is read during the call; the binding shares the value's
            // ownership.
            check(unsafe { (api.BindInput)(binding.ptr().cast_mut(), c_name(name).as_ptr(), view.0) })?;
        }
        if let Some(name) = as_output {
            // SAFETY: as above.
            check(unsafe { (api.BindOutput)(binding.ptr().cast_mut(), c_name(name).as_ptr(), view.0) })?;
        }
        views.push(view);
        Ok::<(), String>(())
    };
    for ((name, tensor), place) in inputs.iter().zip(of_inputs) {
        bind(name, tensor, place, true, None)?;
    }
    for ((name, tensor), place) in outputs.iter().zip(of_outputs) {
        bind(name, tensor, place, false, Some(name))?;
    }
    for ((past, present, tensor), place) in in_place.iter().zip(of_in_place) {
        bind(past, tensor, place, true, Some(present))?;
    }
    let result = host::run_binding(opened, &binding);
    drop(binding);
    drop(views);

    let before = image.clone();
    memory.region().read(0, &mut image).expect("the GPU is read");
    let mut at = 0;
    // Places ascend: between two that may be written nothing may have changed.
    let written = of_outputs.iter().chain(of_in_place);
    for gap in written.map(|p| (p.start, p.end)).chain([(total, total)]) {
        if let Some(byte) = (at..gap.0).find(|&i| image[i] != before[i]) {
            let name = inputs.iter().zip(of_inputs).find(|(_, p)| p.contains(&byte));
            match name {
                Some(((name, _), place)) => panic!("the input {name} was written, byte {}", byte - place.start),
                None => panic!("memory beside the tensors was written: {}", beside(byte, places)),
            }
        }
        at = gap.1;
    }
    for ((name, tensor), place) in outputs.iter_mut().zip(of_outputs) {
        // What is bound from host memory is there already.
        if !ON_HOST.contains(name) {
            tensor.bytes_mut().copy_from_slice(&image[place.clone()]);
        }
    }
    for ((past, _, tensor), place) in in_place.iter_mut().zip(of_in_place) {
        if !ON_HOST.contains(past) {
            tensor.bytes_mut().copy_from_slice(&image[place.clone()]);
        }
    }
    result
}

/// Which tensor a stray byte is next to.
fn beside(byte: usize, places: &[Range<usize>]) -> String {
    let nearest = places.iter().enumerate().min_by_key(|(_, p)| {
        let before = p.start.saturating_sub(byte);
        before.max((byte + 1).saturating_sub(p.end))
    });
    match nearest {
        Some((number, place)) if byte < place.start => format!("{} bytes before tensor {number}", place.start - byte),
        Some((number, place)) => format!("{} bytes after the end of tensor {number}", byte - place.end),
        None => "no tensors".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_have_guards_on_both_sides() {
        let (places, total) = layout(0, [100, 0, 4096].into_iter());
        assert!(places[0].start >= GUARD && total - places[2].end >= GUARD);
        for pair in places.windows(2) {
            assert!(pair[1].start - pair[0].end >= GUARD && pair[1].start % ALIGNMENT == 0);
        }
        assert_eq!(beside(places[0].end + 3, &places), "3 bytes after the end of tensor 0");
        assert_eq!(beside(places[1].start - 1, &places), "1 bytes before tensor 1");
    }
}
