// See generation_state.h.
#include "eval/generation_state.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <charconv>
#include <map>

#include "core/error.h"
#include "core/safetensors.h"

namespace longhand {
namespace {

constexpr const char *kFormat = "longhand generation state", *kVersion = "1";
constexpr const char* kStopNames[] = {"none", "max_tokens", "end_of_text", "stop_string", "interrupted"};

std::map<std::string, std::string> description_of(const LanguageModel& model) {
  const ModelConfig& c = model.config();
  return {{"family", c.family},
          {"d_model", std::to_string(c.d_model)},
          {"n_layer", std::to_string(c.n_layer)},
          {"vocab_size", std::to_string(c.vocab_size)}};
}

// A state file on its way in: every tensor must be asked for once, so that nothing in the file is left unread.
class StateFile {
 public:
  explicit StateFile(const std::string& path) : file_(read_safetensors(path)) {}

  [[noreturn]] void refuse(const std::string& sentence, std::vector<ErrorRow> rows = {}) const {
    rows.insert(rows.begin(), {"file", file_.path});
    throw FileError("generation state: " + sentence, std::move(rows));
  }

  std::string metadata(const std::string& key) const {
    const auto found = file_.metadata.find(key);
    return found == file_.metadata.end() ? "" : found->second;
  }

  Tensor take(const std::string& name, Dtype dtype, int64_t size, bool optional = false) {
    const auto found = file_.tensors.find(name);
    if (found == file_.tensors.end()) {
      if (!optional) refuse("a tensor is missing", {{"tensor", name}});
      return {};
    }
    const Tensor tensor = found->second;
    if (tensor.rank() != 1 || tensor.dtype() != dtype || (size >= 0 && tensor.dim(0) != size))
      refuse("a tensor is not of the expected kind",
             {{name, tensor.describe()},
              {"expected", fmt::format("[{}] {}", size >= 0 ? std::to_string(size) : "n", longhand::name_of(dtype))}});
    file_.tensors.erase(found);
    return tensor;
  }

  std::vector<int32_t> take_ids(const std::string& name, int64_t vocab) {
    const Tensor tensor = take(name, Dtype::i32, -1, true);
    if (!tensor) return {};
    const auto ids = tensor.to_vector<int32_t>();
    for (std::size_t i = 0; i < ids.size(); ++i)
      if (ids[i] < 0 || ids[i] >= vocab)
        refuse("an id is outside the vocabulary",
               {{fmt::format("{}[{}]", name, i), std::to_string(ids[i])}, {"vocabulary", fmt::format("{} tokens", vocab)}});
    return ids;
  }

  // What is left must be the layers' tensors.
  std::map<std::string, Tensor> take_layers() {
    for (const auto& [name, tensor] : file_.tensors) {
      if (!name.starts_with("layers.")) refuse("a tensor that belongs to no state", {{"tensor", name}});
      if (is_floating(tensor.dtype()) && first_non_finite(tensor) >= 0)
        refuse("a value is not a finite number", {{"tensor", name}, {"element", std::to_string(first_non_finite(tensor))}});
    }
    return std::move(file_.tensors);
  }

 private:
  NamedTensors file_;
};

template <class T>
Tensor vector_tensor(const std::vector<T>& values) {
  return Tensor::from(Device::cpu(), {static_cast<int64_t>(values.size())}, values);
}

std::string row_name(std::size_t row, const char* what) {
  return fmt::format("rows.{}.{}", row, what);
}

}  // namespace

const char* name_of(StopReason reason) {
  return kStopNames[static_cast<std::size_t>(reason)];
}

RecurrentState fitted_to(const LanguageModel& model, const RecurrentState& state) {
  const RecurrentState zero = model.zero_state(1);
  if (state.layers().size() != zero.layers().size())
    throw ShapeError("generation state: it has another number of layers than the model",
                     {{"state", std::to_string(state.layers().size())}, {"model", std::to_string(zero.layers().size())}});
  std::vector<LayerState> layers(zero.layers().size());
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const LayerState &given = state.layers()[i], &wanted = zero.layers()[i];
    for (const auto& [name, variable] : given)
      if (!wanted.contains(name))
        throw ShapeError("generation state: the model has no such tensor", {{"tensor", fmt::format("layers.{}.{}", i, name)}});
    for (const auto& [name, variable] : wanted) {
      const std::string full_name = fmt::format("layers.{}.{}", i, name);
      const auto found = given.find(name);
      if (found == given.end()) throw ShapeError("generation state: a tensor of the model is missing", {{"tensor", full_name}});
      const Tensor& tensor = found->second.value();
      Shape expected = variable.shape();
      expected[0] = state.rows();
      if (tensor.shape() != expected || !is_floating(tensor.dtype()))
        throw ShapeError("generation state: a tensor does not have the model's shape",
                         {{full_name, tensor.describe()}, {"expected", expected.str() + " floating point"}});
      layers[i][name] = Variable(tensor.to(variable.value().dtype()).to(model.device()));
    }
  }
  return RecurrentState(std::move(layers));
}

std::string weights_fingerprint(const LanguageModel& model) {
  constexpr int64_t kValues = 64;  // of each parameter: training changes nearly all of them
  uint64_t hash = 0xcbf29ce484222325u;
  for (const Parameter& p : model.parameters().all()) {
    const Tensor flat = p.master.reshape({p.shape.numel()});
    for (const float value : flat.slice(0, 0, std::min(kValues, flat.dim(0))).to_vector<float>())
      hash = (hash ^ std::bit_cast<uint32_t>(value)) * 0x100000001b3u;
  }
  return fmt::format("{:016x}", hash);
}

void GenerationState::save(const std::string& path, const LanguageModel& model) const {
  std::map<std::string, Tensor> tensors = recurrent.named_tensors();
  std::vector<int64_t> read;
  std::vector<int32_t> stop;
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const SequenceState& s = sequences[i];
    read.push_back(s.read);
    stop.push_back(static_cast<int32_t>(s.stop));
    if (!s.pending.empty()) tensors[row_name(i, "pending")] = vector_tensor(s.pending);
    if (!s.seen.empty()) tensors[row_name(i, "seen")] = vector_tensor(s.seen);
    if (!s.held.empty()) tensors[row_name(i, "held")] = vector_tensor(std::vector<uint8_t>(s.held.begin(), s.held.end()));
  }
  tensors["rows.read"] = vector_tensor(read);
  tensors["rows.stop"] = vector_tensor(stop);
  auto metadata = description_of(model);
  metadata.insert({{"format", kFormat}, {"version", kVersion}, {"tokenizer", tokenizer}, {"weights", weights}});
  write_safetensors(path, tensors, metadata);
}

GenerationState GenerationState::load(const std::string& path, const LanguageModel& model) {
  StateFile file(path);
  if (file.metadata("format") != kFormat || file.metadata("version") != kVersion)
    file.refuse("the file is not one", {{"format", fmt::format("\"{}\" version \"{}\"", file.metadata("format"), file.metadata("version"))},
                                        {"expected", fmt::format("\"{}\" version \"{}\"", kFormat, kVersion)},
                                        {"try", "a file that longhand generate --save-state wrote"}});
  std::vector<ErrorRow> other;
  for (const auto& [key, value] : description_of(model))
    if (file.metadata(key) != value) other.push_back({key, fmt::format("{} in the state, {} in the model", file.metadata(key), value)});
  if (!other.empty()) file.refuse("it belongs to another model", std::move(other));

  GenerationState state;
  state.tokenizer = file.metadata("tokenizer");
  state.weights = file.metadata("weights");
  const std::vector<int64_t> read = file.take("rows.read", Dtype::i64, -1).to_vector<int64_t>();
  const auto rows = static_cast<int64_t>(read.size());
  const std::vector<int32_t> stop = file.take("rows.stop", Dtype::i32, rows).to_vector<int32_t>();
  if (rows < 1) file.refuse("it has no rows");
  for (std::size_t i = 0; i < read.size(); ++i) {
    SequenceState s;
    s.pending = file.take_ids(row_name(i, "pending"), model.config().vocab_size);
    s.seen = file.take_ids(row_name(i, "seen"), model.config().vocab_size);
    if (const Tensor held = file.take(row_name(i, "held"), Dtype::u8, -1, true)) {
      const auto bytes = held.to_vector<uint8_t>();
      s.held.assign(bytes.begin(), bytes.end());
    }
    s.read = read[i];
    if (s.read < 0 || s.read > INT64_MAX / 2)
      file.refuse("a number of tokens is out of range", {{fmt::format("rows.read[{}]", i), std::to_string(s.read)}});
    if (s.pending.empty()) file.refuse("a row has no token to go on from", {{"tensor", row_name(i, "pending")}});
    if (std::adjacent_find(s.seen.begin(), s.seen.end(), std::greater_equal<>()) != s.seen.end())
      file.refuse("the ids seen do not ascend", {{"tensor", row_name(i, "seen")}});
    if (stop[i] < 0 || stop[i] >= static_cast<int32_t>(std::size(kStopNames)))
      file.refuse("a stop reason is unknown", {{fmt::format("rows.stop[{}]", i), std::to_string(stop[i])}});
    s.stop = static_cast<StopReason>(stop[i]);
    state.sequences.push_back(std::move(s));
  }
  state.recurrent = RecurrentState::from_named_tensors(file.take_layers(), Device::cpu(), path);
  if (state.recurrent.rows() != rows)
    file.refuse("its tensors do not have its number of rows",
                {{"tensors", std::to_string(state.recurrent.rows())}, {"rows.read", std::to_string(rows)}});
  try {
    state.recurrent = fitted_to(model, state.recurrent);
  } catch (const ShapeError& problem) {
    file.refuse("its tensors do not fit the model", problem.rows());
  }
  return state;
}

}  // namespace longhand
