// See adamw.h.
#include "train/adamw.h"

#include <fmt/format.h>

#include "core/error.h"
#include "core/op_scope.h"
#include "train/adamw_kernels.h"

namespace longhand {

AdamW::AdamW(ParameterSet& parameters, AdamWOptions options) : parameters_(parameters), options_(std::move(options)) {
  const Tensor& master = parameters.flat_master();
  const Device& device = master.device();
  if (device.is_cuda() && master.dtype() != Dtype::f32)
    throw DtypeError("adamw: masters on a GPU are f32", {{"master", master.describe()}});
  for (const std::string& name : options_.no_decay)
    if (parameters.find(name) == nullptr) throw ValueError("adamw: no decay asked for a parameter that is not there", {{"name", name}});
  parameters.allocate_grads();
  const int64_t n = master.numel();
  first_ = Tensor::zeros(device, master.dtype(), {n});
  second_ = Tensor::zeros(device, master.dtype(), {n});
  control_ = Tensor::zeros(device, Dtype::f64, {kControlSize});
  partials_ = Tensor::zeros(device, Dtype::f64, {on_device(device, &adamw_partials_cpu, LONGHAND_CUDA_IMPL(adamw_partials_cuda))(n)});

  // Parameters in the order of the flat buffer; gaps between them are zero and belong to the parameter before.
  std::map<int64_t, const Parameter*> by_place;
  for (const Parameter& p : parameters.all())
    if (p.shape.numel() > 0) by_place[p.master.offset()] = &p;
  for (const auto& [begin, p] : by_place) {
    if (!segments_.empty()) segments_.back().end = begin;
    if (segments_.empty() || segments_.back().decays != decays(*p)) segments_.push_back({begin, n, decays(*p)});
  }
  if (!segments_.empty()) segments_.back().end = n;
}

bool AdamW::decays(const Parameter& p) const {
  return p.options.decay && !options_.no_decay.contains(p.name);
}

void AdamW::set_rates(double lr, double weight_decay) {
  on_device(control_.device(), &adamw_set_rates_cpu, LONGHAND_CUDA_IMPL(adamw_set_rates_cuda))(control_, lr, weight_decay);
}

void AdamW::step(const Tensor& loss) {
  const OpScope op("adamw");
  const Tensor& master = parameters_.flat_master();
  if (loss.numel() != 1 || loss.dtype() != master.dtype() || !(loss.device() == master.device()))
    throw ShapeError("adamw: the loss is one number in the masters' dtype, on their device",
                     {{"loss", loss.describe()}, {"master", master.describe()}});
  const AdamWBuffers buffers{master, parameters_.flat_grad(), parameters_.flat_compute(), first_, second_, control_, partials_};
  on_device(master.device(), &adamw_step_cpu, LONGHAND_CUDA_IMPL(adamw_step_cuda))(buffers, options_.rule, segments_, loss);
}

StepReport AdamW::report_of(const std::vector<double>& control) {
  return {.loss = control.at(kControlLoss),
          .grad_norm = control.at(kControlGradNorm),
          .updates = static_cast<int64_t>(control.at(kControlUpdates)),
          .skipped = static_cast<int64_t>(control.at(kControlSkipped)),
          .skipped_in_a_row = static_cast<int64_t>(control.at(kControlSkippedInARow))};
}

Tensor AdamW::moment_of(const Tensor& flat, const Parameter& p) const {
  const int64_t begin = p.master.offset();
  return flat.slice(0, begin, begin + p.shape.numel()).reshape(p.shape);
}

std::map<std::string, Tensor> AdamW::save() const {
  std::map<std::string, Tensor> out;
  for (const Parameter& p : parameters_.all()) {
    out["first_moment." + p.name] = moment_of(first_, p);
    out["second_moment." + p.name] = moment_of(second_, p);
  }
  out["counts"] = control_.slice(0, kControlUpdates, kControlSkippedInARow + 1);
  return out;
}

void AdamW::load(const std::map<std::string, Tensor>& stored) {
  auto take = [&](const std::string& name, const Tensor& place) {
    const auto found = stored.find(name);
    if (found == stored.end())
      throw FileError("adamw: a tensor is missing in the checkpoint", {{"tensor", name}, {"expected", place.describe()}});
    if (!(found->second.shape() == place.shape()) || found->second.dtype() != place.dtype())
      throw FileError("adamw: a tensor of the checkpoint does not fit",
                      {{"tensor", name}, {"found", found->second.describe()}, {"expected", place.describe()}});
    copy(place, found->second);
  };
  for (const Parameter& p : parameters_.all()) {
    take("first_moment." + p.name, moment_of(first_, p));
    take("second_moment." + p.name, moment_of(second_, p));
  }
  take("counts", control_.slice(0, kControlUpdates, kControlSkippedInARow + 1));
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
