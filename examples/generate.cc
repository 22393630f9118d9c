// Greedy generation with a converted model from C++, on the CPU: caches and state stay where they are and are updated in place.
//
//     c++ -std=c++17 -O2 examples/generate.cc -I ORT/include -L ORT/lib -lonnxruntime -o generate
//     ./generate OUT/model.onnx libretro_attention.so 100 1,2,3
//
// The arguments: a model in float32 that retro-export wrote, the plugin, how many tokens to make, and the prompt's token numbers.
// Needs the headers of ONNX Runtime 1.21 or newer (scripts/onnxruntime-headers finds or fetches them), and the library 1.22 or
// newer that is no older than the headers. Where a folder has libonnxruntime.so.1.N alone, as pip's, name that file in place of
// -lonnxruntime, and let a link libonnxruntime.so.1 lie beside it.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <iostream>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

bool starts_with(const std::string& text, const std::string& prefix) { return text.compare(0, prefix.size(), prefix) == 0; }

// past_key_values.0.key -> present.0.key, past_retro.0.lse -> present_retro.0.lse
std::string present_of(const std::string& past) {
  for (const std::string prefix : {"past_key_values", "past"}) {
    if (starts_with(past, prefix)) return "present" + past.substr(prefix.size());
  }
  throw std::runtime_error("no output is known for the input " + past);
}

std::vector<std::int64_t> shape_of(const Ort::TypeInfo& info) { return info.GetTensorTypeAndShapeInfo().GetShape(); }

class Generator {
 public:
  Generator(Ort::Session& session, std::int64_t capacity) : session_(session), binding_(session), capacity_(capacity) {
    // Some graphs keep their window and feed its tokens again by themselves: to them each step is one token.
    const auto in_graph = session_.GetModelMetadata().LookupCustomMetadataMapAllocated("retro.window_in_graph", allocator_);
    feeds_window_ = in_graph == nullptr;
    window_ = feeds_window_ ? metadata("retro.window") : 1;
    page_size_ = metadata("retro.page_size");
    for (std::size_t i = 0; i < session_.GetInputCount(); ++i) {
      names_.push_back(session_.GetInputNameAllocated(i, allocator_).get());
    }
    // The first output.
    binding_.BindOutput("logits", cpu_);
    state_.reserve(names_.size());
    for (std::size_t i = 0; i < names_.size(); ++i) {
      if (!starts_with(names_[i], "past_")) continue;
      const std::vector<std::int64_t> shape = buffer_shape(i);
      const auto type = session_.GetInputTypeInfo(i).GetTensorTypeAndShapeInfo().GetElementType();
      state_.push_back(Ort::Value::CreateTensor(allocator_, shape.data(), shape.size(), type));
      // One buffer as past and present: the operator then copies nothing. What is in it at first is never read.
      binding_.BindInput(names_[i].c_str(), state_.back());
      binding_.BindOutput(present_of(names_[i]).c_str(), state_.back());
    }
  }

  std::vector<std::int64_t> generate(std::vector<std::int64_t> ids, std::int64_t count) {
    std::vector<std::int64_t> made;
    std::int64_t retro = 0;
    for (std::int64_t token = feed(ids, ids.size(), -1);; retro = std::min(retro + 1, window_ - 1)) {
      made.push_back(token);
      ids.push_back(token);
      if (static_cast<std::int64_t>(made.size()) == count) return made;
      // The last few tokens are fed again, for the pages that the new one loads to correct them.
      token = feed({ids.end() - 1 - retro, ids.end()}, ids.size(), static_cast<std::int32_t>(retro));
    }
  }

 private:
  std::int64_t metadata(const char* key) {
    const auto value = session_.GetModelMetadata().LookupCustomMetadataMapAllocated(key, allocator_);
    if (!value) throw std::runtime_error("the model was not converted by retro-export");
    return std::stoll(value.get());
  }

  // Dimensions that are not declared: the batch, tokens, pages or blocks, and head sizes that an exporter has only named.
  std::vector<std::int64_t> buffer_shape(std::size_t input) {
    const std::string& name = names_[input];
    std::vector<std::int64_t> shape = shape_of(session_.GetInputTypeInfo(input));
    const auto type = session_.GetInputTypeInfo(input).GetTensorTypeAndShapeInfo().GetElementType();
    // Codes of keys lie in blocks of 128 tokens, all else of pages page by page.
    const std::int64_t rows = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8         ? 128
                              : name.find(".page_") != std::string::npos ? page_size_
                                                                         : 1;
    if (shape[0] < 0) shape[0] = 1;
    if (shape.size() > 2 && shape[2] < 0) shape[2] = (capacity_ + rows - 1) / rows;
    if (shape.size() > 3 && shape[3] < 0) {
      const auto layer = name.find('.') + 1;
      const std::string outputs = "past_retro." + name.substr(layer, name.find('.', layer) - layer) + ".outputs";
      const auto found = std::find(names_.begin(), names_.end(), outputs);
      if (found != names_.end()) shape[3] = shape_of(session_.GetInputTypeInfo(found - names_.begin()))[3];
    }
    if (std::any_of(shape.begin(), shape.end(), [](std::int64_t size) { return size < 0; })) {
      throw std::runtime_error("the sizes of " + name + " are not all declared");
    }
    return shape;
  }

  void bind(const char* name, std::vector<std::int64_t>& numbers, std::vector<std::int32_t>& narrow,
            const std::vector<std::int64_t>& shape) {
    const auto found = std::find(names_.begin(), names_.end(), name);
    if (found == names_.end()) return;
    const Ort::TypeInfo info = session_.GetInputTypeInfo(found - names_.begin());
    const auto type = info.GetTensorTypeAndShapeInfo().GetElementType();
    if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64) {
      binding_.BindInput(name, Ort::Value::CreateTensor(cpu_, numbers.data(), numbers.size(), shape.data(), shape.size()));
    } else if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32) {
      narrow.assign(numbers.begin(), numbers.end());
      binding_.BindInput(name, Ort::Value::CreateTensor(cpu_, narrow.data(), narrow.size(), shape.data(), shape.size()));
    } else {
      throw std::runtime_error(std::string("this example feeds integers, and ") + name + " takes something else");
    }
  }

  // Feeds tokens of which the last is number `length`; returns the likeliest next one.
  std::int64_t feed(std::vector<std::int64_t> tokens, std::int64_t length, std::int32_t retro_length) {
    const std::int64_t fed = tokens.size();
    // Tokens that are fed again keep the positions they had.
    std::vector<std::int64_t> mask(length, 1), positions(fed);
    std::iota(positions.begin(), positions.end(), length - fed);
    std::vector<std::int32_t> narrow[3];  // a binding borrows what it is given
    bind("input_ids", tokens, narrow[0], {1, fed});
    bind("attention_mask", mask, narrow[1], {1, length});
    bind("position_ids", positions, narrow[2], {1, fed});
    const std::int64_t one = 1;
    if (feeds_window_) binding_.BindInput("retro_length", Ort::Value::CreateTensor(cpu_, &retro_length, 1, &one, 1));
    // Anew each time: a binding keeps the last run's output, whose shape is another where the model gives all tokens' logits.
    binding_.BindOutput("logits", cpu_);
    session_.Run(Ort::RunOptions{}, binding_);

    const Ort::Value logits = std::move(binding_.GetOutputValues().front());
    const auto info = logits.GetTensorTypeAndShapeInfo();
    if (info.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) throw std::runtime_error("the logits are not float32");
    const std::int64_t vocabulary = info.GetShape().back();
    const float* end = logits.GetTensorData<float>() + info.GetElementCount();
    return std::max_element(end - vocabulary, end) - (end - vocabulary);
  }

  Ort::AllocatorWithDefaultOptions allocator_;
  Ort::MemoryInfo cpu_ = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
  Ort::Session& session_;
  std::vector<Ort::Value> state_;
  Ort::IoBinding binding_;
  std::vector<std::string> names_;
  std::int64_t capacity_, window_ = 1, page_size_ = 16;
  bool feeds_window_ = true;
};

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 5) throw std::runtime_error("usage: generate MODEL.onnx PLUGIN N_PREDICT ID,ID,...");
  const char* model = argv[1];
  const char* plugin = argv[2];
  const std::int64_t count = std::stoll(argv[3]);
  std::vector<std::int64_t> ids;
  std::istringstream list(argv[4]);
  for (std::string id; std::getline(list, id, ',');) ids.push_back(std::stoll(id));
  if (ids.empty() || count < 1) throw std::runtime_error("give a prompt of one token or more, and ask for one or more");

  Ort::Env env;
  Ort::SessionOptions options;
  // It warns of inputs that have defaults, as converted models' have.
  options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_ERROR);
  options.RegisterCustomOpsLibrary(plugin);  // C API: RegisterCustomOpsLibrary_V2
  Ort::Session session(env, model, options);

  Generator generator(session, static_cast<std::int64_t>(ids.size()) + count);
  const char* comma = "";
  for (const std::int64_t token : generator.generate(ids, count)) {
    std::cout << comma << token;
    comma = ",";
  }
  std::cout << "\n";
  return 0;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 1;
}
