// See adamw.h.
#include "train/adamw.h"

#include <fmt/format.h>

#include <algorithm>

#include "core/error.h"
#include "core/op_ledger.h"
#include "core/op_scope.h"
#include "train/adamw_kernels.h"

namespace longhand {

AdamW::AdamW(ParameterSet& parameters, AdamWOptions options, std::vector<Part> own)
    : parameters_(parameters), options_(std::move(options)), own_(std::move(own)) {
  const Tensor& master = parameters.flat_master();
  const Device& device = master.device();
  if (device.is_cuda() && master.dtype() != Dtype::f32)
    throw DtypeError("adamw: masters on a GPU are f32", {{"master", master.describe()}});
  for (const std::string& name : options_.no_decay)
    if (parameters.find(name) == nullptr) throw ValueError("adamw: no decay asked for a parameter that is not there", {{"name", name}});
  parameters.allocate_grads();
  const int64_t n = master.numel();
  if (own_.empty()) own_ = {{0, n}};

  // Parameters in the order of the flat buffer; gaps between them are zero and belong to the parameter before.
  std::map<int64_t, const Parameter*> by_place;
  for (const Parameter& p : parameters.all())
    if (p.shape.numel() > 0) by_place[p.master.offset()] = &p;
  for (const auto& [begin, p] : by_place) {
    if (!segments_.empty()) segments_.back().end = begin;
    if (segments_.empty() || segments_.back().decays != decays(*p)) segments_.push_back({begin, n, decays(*p)});
  }
  if (!segments_.empty()) segments_.back().end = n;

  int64_t moments = 0, partials = 0;
  for (const Part& part : own_) {
    for (const DecaySegment& segment : segments_) {
      const int64_t begin = std::max(part.begin, segment.begin), end = std::min(part.end, segment.end);
      if (begin < end) pieces_.push_back({begin, end, segment.decays, moments + begin - part.begin});
    }
    moments += part.size();
    partials += on_device(device, &adamw_partials_cpu, LONGHAND_CUDA_IMPL(adamw_partials_cuda))(part.size());
  }
  first_ = Tensor::zeros(device, master.dtype(), {moments});
  second_ = Tensor::zeros(device, master.dtype(), {moments});
  control_ = Tensor::zeros(device, Dtype::f64, {kControlSize});
  partials_ = Tensor::zeros(device, Dtype::f64, {partials});
}

bool AdamW::decays(const Parameter& p) const {
  return p.options.decay && !options_.no_decay.contains(p.name);
}

void AdamW::set_rates(double lr, double weight_decay) {
  on_device(control_.device(), &adamw_set_rates_cpu, LONGHAND_CUDA_IMPL(adamw_set_rates_cuda))(control_, lr, weight_decay);
}

void AdamW::step(const Tensor& loss, const std::function<void(const Tensor&)>& sum_over) {
  const OpScope op("adamw");
  const Tensor& master = parameters_.flat_master();
  const Device& device = master.device();
  const double copied = parameters_.flat_compute() ? 2 : 0;  // the bf16 copy; before it the gradient twice, three buffers in and out
  OpLedger::note((8 + 24 + copied) * static_cast<double>(master.numel()), 0);
  if (loss.numel() != 1 || loss.dtype() != master.dtype() || !(loss.device() == device))
    throw ShapeError("adamw: the loss is one number in the masters' dtype, on their device",
                     {{"loss", loss.describe()}, {"master", master.describe()}});
  const AdamWBuffers buffers{master, parameters_.flat_grad(), parameters_.flat_compute(), first_, second_, control_, partials_};
  on_device(device, &adamw_sums_cpu, LONGHAND_CUDA_IMPL(adamw_sums_cuda))(buffers, own_, loss);
  if (sum_over) sum_over(control_.slice(0, kControlLossSum, kControlSquareSum + 1));
  on_device(device, &adamw_update_cpu, LONGHAND_CUDA_IMPL(adamw_update_cuda))(buffers, options_.rule, pieces_);
}

Tensor AdamW::left_out() const {
  return control_.slice(0, kControlSkippedInARow, kControlSkippedInARow + 1);
}

StepReport AdamW::report_of(const std::vector<double>& control) {
  return {.loss = control.at(kControlLoss),
          .grad_norm = control.at(kControlGradNorm),
          .updates = static_cast<int64_t>(control.at(kControlUpdates)),
          .skipped = static_cast<int64_t>(control.at(kControlSkipped)),
          .skipped_in_a_row = static_cast<int64_t>(control.at(kControlSkippedInARow))};
}

template <class F>
void AdamW::for_each_own(const Tensor& moments, const Parameter& p, F&& f) const {
  const int64_t at = p.master.offset(), n = p.shape.numel();
  int64_t place = 0;
  for (const Part& part : own_) {
    const int64_t begin = std::max(part.begin, at), end = std::min(part.end, at + n);
    if (begin < end) f(begin - at, moments.slice(0, place + begin - part.begin, place + end - part.begin));
    place += part.size();
  }
}

std::map<std::string, TensorParts> AdamW::save_own(bool with_counts) const {
  std::map<std::string, TensorParts> out;
  for (const Parameter& p : parameters_.all()) {
    for (const auto& [kind, moments] : {std::pair("first_moment.", &first_), std::pair("second_moment.", &second_)}) {
      TensorParts& tensor = out[kind + p.name];
      tensor = {moments->dtype(), p.shape, {}};
      for_each_own(*moments, p, [&](int64_t begin, const Tensor& values) { tensor.runs.push_back({begin, values}); });
    }
  }
  const Tensor counts = control_.slice(0, kControlUpdates, kControlSkippedInARow + 1);
  out["counts"] = {counts.dtype(), counts.shape(), {}};
  if (with_counts) out["counts"].runs.push_back({0, counts});
  return out;
}

std::map<std::string, Tensor> AdamW::save() const {
  std::map<std::string, Tensor> out;
  for (const auto& [name, parts] : save_own(true)) {
    const int64_t n = parts.shape.numel();
    if (n > 0 && (parts.runs.size() != 1 || parts.runs[0].values.numel() != n))
      throw ValueError("adamw: only a part of these moments is here", {{"tensor", name}});
    out[name] = n > 0 ? parts.runs[0].values.reshape(parts.shape) : Tensor::zeros(control_.device(), parts.dtype, parts.shape);
  }
  return out;
}

void AdamW::load(const std::map<std::string, Tensor>& stored) {
  auto stored_tensor = [&](const std::string& name, Dtype dtype, const Shape& shape) {
    const auto found = stored.find(name);
    const auto expected = [&] { return ErrorRow{"expected", shape.str() + " " + name_of(dtype)}; };
    if (found == stored.end()) throw FileError("adamw: a tensor is missing in the checkpoint", {{"tensor", name}, expected()});
    if (!(found->second.shape() == shape) || found->second.dtype() != dtype)
      throw FileError("adamw: a tensor of the checkpoint does not fit",
                      {{"tensor", name}, {"found", found->second.describe()}, expected()});
    return found->second.contiguous().reshape({shape.numel()});
  };
  for (const Parameter& p : parameters_.all()) {
    for (const auto& [kind, moments] : {std::pair("first_moment.", &first_), std::pair("second_moment.", &second_)}) {
      const std::string name = kind + p.name;
      const Tensor from = stored_tensor(name, moments->dtype(), p.shape);
      for_each_own(*moments, p, [&](int64_t begin, const Tensor& to) {  // the rest of the file is not even read
        const Tensor values = from.slice(0, begin, begin + to.numel());
        if (const int64_t index = first_non_finite(values); index >= 0)
          throw FileError("adamw: a number of the checkpoint is not finite", {{"tensor", name}, {"index", std::to_string(begin + index)}});
        copy(to, values);
      });
    }
  }
  const Tensor counts = control_.slice(0, kControlUpdates, kControlSkippedInARow + 1);
  const Tensor stored_counts = stored_tensor("counts", counts.dtype(), counts.shape());
  for (const double count : stored_counts.to_vector<double>())
    if (!(count >= 0 && count <= 0x1p48))
      throw FileError("adamw: a count of the checkpoint that cannot be", {{"count", std::to_string(count)}});
  copy(counts, stored_counts);
}

std::vector<std::string> AdamW::describe_no_decay() const {
  struct Group {
    int64_t count = 0;
    Shape shape;
  };
  std::vector<std::pair<std::string, Group>> groups;  // in the order of declaration
  for (const Parameter& p : parameters_.all()) {
    if (decays(p)) continue;
    std::string pattern;
    for (std::size_t i = 0; i < p.name.size();) {  // a part of digits alone is a layer's number
      const auto end = std::min(p.name.find('.', i), p.name.size());
      const std::string part = p.name.substr(i, end - i);
      const bool number = !part.empty() && part.find_first_not_of("0123456789") == std::string::npos;
      pattern += (i == 0 ? "" : ".") + (number ? "*" : part);
      i = end + 1;
    }
    auto group = groups.begin();
    while (group != groups.end() && (group->first != pattern || !(group->second.shape == p.shape))) ++group;
    if (group == groups.end()) group = groups.insert(groups.end(), {pattern, {0, p.shape}});
    ++group->second.count;
  }
  std::vector<std::string> lines;
  for (const auto& [pattern, group] : groups)
    lines.push_back(group.count == 1 ? fmt::format("{}  {}", pattern, group.shape.str())
                                     : fmt::format("{}  {} x {}", pattern, group.count, group.shape.str()));
  return lines;
}

}  // namespace longhand
