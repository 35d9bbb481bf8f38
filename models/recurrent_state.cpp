// See recurrent_state.h.
#include "models/recurrent_state.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "core/error.h"
#include "core/safetensors.h"

namespace longhand {
namespace {

// Applies f to every tensor; the result is detached.
template <class F>
RecurrentState map_tensors(const RecurrentState& state, F&& f) {
  std::vector<LayerState> layers;
  for (const LayerState& layer : state.layers()) {
    LayerState mapped;
    for (const auto& [name, variable] : layer) mapped[name] = Variable(f(variable.value()));
    layers.push_back(std::move(mapped));
  }
  return RecurrentState(std::move(layers));
}

}  // namespace

Variable RecurrentState::get(std::size_t layer, const std::string& name) const {
  if (absent()) return {};
  const auto found = layers_.at(layer).find(name);
  return found == layers_[layer].end() ? Variable() : found->second;
}

int64_t RecurrentState::rows() const {
  for (const LayerState& layer : layers_)
    for (const auto& [name, variable] : layer) return variable.value().dim(0);
  return 0;
}

int64_t RecurrentState::size_bytes() const {
  int64_t bytes = 0;
  for (const LayerState& layer : layers_)
    for (const auto& [name, variable] : layer) bytes += variable.value().numel() * size_of(variable.value().dtype());
  return bytes;
}

RecurrentState RecurrentState::detach() const {
  return map_tensors(*this, [](const Tensor& t) { return t; });
}
RecurrentState RecurrentState::clone() const {
  return map_tensors(*this, [](const Tensor& t) { return t.clone(); });
}
RecurrentState RecurrentState::to(const Device& device) const {
  return map_tensors(*this, [&](const Tensor& t) { return t.to(device); });
}

RecurrentState RecurrentState::select_rows(const std::vector<int64_t>& rows) const {
  return map_tensors(*this, [&](const Tensor& t) {
    Shape shape = t.shape();
    shape[0] = static_cast<int64_t>(rows.size());
    const Tensor selected = Tensor::empty(t.device(), t.dtype(), shape);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const auto to = static_cast<int64_t>(i);
      copy(selected.slice(0, to, to + 1), t.slice(0, rows[i], rows[i] + 1));
    }
    return selected;
  });
}

RecurrentState RecurrentState::concatenate(const std::vector<RecurrentState>& parts) {
  if (parts.empty()) throw ValueError("state: there is nothing to join");
  const RecurrentState& first = parts.front();
  int64_t rows = 0;
  for (const RecurrentState& part : parts) {
    rows += part.rows();
    bool fits = part.layers().size() == first.layers().size();
    for (std::size_t i = 0; fits && i < first.layers().size(); ++i) {
      fits = part.layers()[i].size() == first.layers()[i].size();
      for (const auto& [name, variable] : first.layers()[i]) {
        const Variable other = part.get(i, name);
        Shape expected = variable.shape();
        if (other) expected[0] = other.shape()[0];
        if (!other || other.shape() != expected || other.value().dtype() != variable.value().dtype())
          throw ShapeError("state: only states of the same layers can be joined", {{"tensor", "layers." + std::to_string(i) + "." + name},
                                                                                   {"first", variable.value().describe()},
                                                                                   {"other", other ? other.value().describe() : "absent"}});
      }
    }
    if (!fits) throw ShapeError("state: only states of the same layers can be joined", {{"layers", std::to_string(part.layers().size())}});
  }
  std::vector<LayerState> layers(first.layers().size());
  for (std::size_t i = 0; i < layers.size(); ++i) {
    for (const auto& [name, variable] : first.layers()[i]) {
      Shape shape = variable.shape();
      shape[0] = rows;
      const Tensor joined = Tensor::empty(variable.value().device(), variable.value().dtype(), shape);
      int64_t begin = 0;
      for (const RecurrentState& part : parts) {
        const Tensor rows_of_part = part.get(i, name).value();
        copy(joined.slice(0, begin, begin + rows_of_part.dim(0)), rows_of_part);
        begin += rows_of_part.dim(0);
      }
      layers[i][name] = Variable(joined);
    }
  }
  return RecurrentState(std::move(layers));
}

RecurrentState RecurrentState::reset_rows(const std::vector<uint8_t>& reset) const {
  if (!absent() && static_cast<int64_t>(reset.size()) != rows())
    throw ShapeError("state: one reset flag per row is needed",
                     {{"flags", std::to_string(reset.size())}, {"rows", std::to_string(rows())}});
  return map_tensors(*this, [&](const Tensor& t) {
    const Tensor result = t.clone();
    for (std::size_t b = 0; b < reset.size(); ++b)
      if (reset[b] != 0) fill(result.slice(0, static_cast<int64_t>(b), static_cast<int64_t>(b) + 1), 0);
    return result;
  });
}

std::vector<StateStatistics> RecurrentState::statistics(std::size_t layer, const std::string& name, bool per_head) const {
  const Variable variable = get(layer, name);
  if (!variable) throw ValueError("state: no such tensor", {{"layer", std::to_string(layer)}, {"name", name}});
  const Tensor& t = variable.value();
  const auto values = t.to_vector<double>();
  const std::size_t heads = per_head && t.rank() == 4 ? static_cast<std::size_t>(t.dim(1)) : 1;
  const std::size_t rows = static_cast<std::size_t>(t.dim(0));
  const std::size_t inner = rows * heads == 0 ? 0 : values.size() / (rows * heads);
  std::vector<StateStatistics> result(heads);
  for (std::size_t h = 0; h < heads; ++h) {
    StateStatistics& s = result[h];
    double sum = 0, squares = 0;
    auto for_each = [&](auto&& f) {
      for (std::size_t b = 0; b < rows; ++b)
        for (std::size_t i = 0; i < inner; ++i) f(values[(b * heads + h) * inner + i]);
    };
    for_each([&](double v) { sum += v, squares += v * v, s.max_abs = std::max(s.max_abs, std::abs(v)); });
    s.count = static_cast<double>(rows * inner);
    if (s.count == 0) continue;
    s.mean = sum / s.count;
    double deviations = 0;
    for_each([&](double v) { deviations += (v - s.mean) * (v - s.mean); });
    s.std = std::sqrt(deviations / s.count);
    s.norm = std::sqrt(squares);
  }
  return result;
}

std::map<std::string, Tensor> RecurrentState::named_tensors() const {
  std::map<std::string, Tensor> tensors;
  for (std::size_t i = 0; i < layers_.size(); ++i)
    for (const auto& [name, variable] : layers_[i]) tensors["layers." + std::to_string(i) + "." + name] = variable.value();
  return tensors;
}

RecurrentState RecurrentState::from_named_tensors(const std::map<std::string, Tensor>& tensors, const Device& device,
                                                  const std::string& source) {
  constexpr std::string_view kPrefix = "layers.";
  std::vector<LayerState> layers;
  for (const auto& [name, tensor] : tensors) {
    std::size_t layer = 0;
    const char* end = name.data() + name.size();
    const auto parsed = std::from_chars(name.data() + std::min(kPrefix.size(), name.size()), end, layer);
    // Each slot has one name: "layers.03.ssm" would be a second one for "layers.3.ssm".
    if (parsed.ec != std::errc{} || end - parsed.ptr < 2 || !name.starts_with(std::string(kPrefix) + std::to_string(layer) + "."))
      throw FileError("state: a name that is not layers.<number>.<tensor>", {{"file", source}, {"name", name}});
    if (layer >= tensors.size())  // each layer has one at least; no room is made for those between
      throw FileError("state: a layer is missing", {{"file", source}, {"name", name}, {"tensors", std::to_string(tensors.size())}});
    const Tensor& first = tensors.begin()->second;
    if (tensor.rank() < 1 || tensor.dim(0) != first.dim(0))
      throw FileError("state: the tensors do not have the same number of rows",
                      {{"file", source}, {tensors.begin()->first, first.describe()}, {name, tensor.describe()}});
    if (layers.size() <= layer) layers.resize(layer + 1);
    layers[layer][std::string(parsed.ptr + 1, end)] = Variable(tensor.to(device).clone());
  }
  for (std::size_t i = 0; i < layers.size(); ++i)
    if (layers[i].empty())
      throw FileError("state: a layer is missing",
                      {{"file", source}, {"layer", std::to_string(i)}, {"layers", std::to_string(layers.size())}});
  return RecurrentState(std::move(layers));
}

void RecurrentState::save(const std::string& path) const {
  write_safetensors(path, named_tensors(), {{"format", "longhand recurrent state"}});
}

RecurrentState RecurrentState::load(const std::string& path, const Device& device) {
  return from_named_tensors(read_safetensors(path).tensors, device, path);
}

}  // namespace longhand
