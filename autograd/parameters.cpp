// See parameters.h.
#include "autograd/parameters.h"

#include <algorithm>
#include <set>

#include "autograd/node.h"
#include "autograd/parameter_alignment.h"
#include "core/error.h"
#include "core/philox.h"

namespace longhand {

Initializer init_constant(double value) {
  return [value](uint64_t, uint64_t) { return value; };
}
Initializer init_uniform(double low, double high) {
  return [low, high](uint64_t key, uint64_t index) { return low + (high - low) * philox_uniform(key, index); };
}
Initializer init_normal(double standard_deviation) {
  return [standard_deviation](uint64_t key, uint64_t index) { return standard_deviation * static_cast<double>(philox_normal(key, index)); };
}

ParameterSet::~ParameterSet() {
  if (grad_ != nullptr) grad_->parameters.clear();  // a variable may outlive its set
}

Parameter* ParameterSet::declare(std::string name, Shape shape, ParameterOptions options) {
  if (master_.defined()) throw ValueError("parameters: declared after allocate()", {{"name", name}});
  if (find(name) != nullptr) throw ValueError("parameters: a name declared twice", {{"name", name}});
  parameters_.push_back({std::move(name), shape, std::move(options), {}, {}, {}});
  return &parameters_.back();
}

JoinedParameters* ParameterSet::join(std::vector<Parameter*> parts) {
  for (const Parameter* part : parts)
    if (part->shape.rank() != 2 || part->shape[1] != parts[0]->shape[1])
      throw ShapeError("parameters: only matrices of one width can be joined",
                       {{parts[0]->name, parts[0]->shape.str()}, {part->name, part->shape.str()}});
  joined_.push_back({std::move(parts), {}});
  return &joined_.back();
}

const Parameter* ParameterSet::find(const std::string& name) const {
  for (const Parameter& p : parameters_)
    if (p.name == name) return &p;
  return nullptr;
}

int64_t ParameterSet::count() const {
  int64_t n = 0;
  for (const Parameter& p : parameters_) n += p.shape.numel();
  return n;
}

void ParameterSet::allocate(const Device& device, Dtype master_dtype, Dtype compute_dtype) {
  if (master_dtype != Dtype::f32 && master_dtype != Dtype::f64)
    throw DtypeError("parameters: masters are f32 or f64", {{"asked", name_of(master_dtype)}});
  if (compute_dtype != master_dtype && !(compute_dtype == Dtype::bf16 && device.is_cuda()))
    throw DtypeError("parameters: this compute type is not available here",
                     {{"asked", name_of(compute_dtype)},
                      {"device", device.name()},
                      {"try", "f32 on the CPU, f32 or bf16 on a GPU; it is train.dtype of a recipe (auto: as the device has it)"}});
  std::vector<Parameter*> order;
  for (Parameter& p : parameters_) order.push_back(&p);
  const auto place_of = [](const Parameter* p) {  // the decayed before the others, and those of full precision on either side of the border
    if (p->options.decay) return p->options.full_precision ? 1 : 0;
    return p->options.full_precision ? 2 : 3;
  };
  std::stable_sort(order.begin(), order.end(), [&](const Parameter* a, const Parameter* b) { return place_of(a) < place_of(b); });
  int64_t total = 0;
  for (const Parameter* p : order) {
    total += aligned_elements(p->shape.numel());
    if (p->options.decay) decayed_ = total;
  }
  compute_dtype_ = compute_dtype;
  master_ = Tensor::zeros(device, master_dtype, {total});
  grad_ = std::make_shared<FlatGrad>(FlatGrad{{}, master_, {}});
  if (compute_dtype != master_dtype) compute_ = Tensor::zeros(device, compute_dtype, {total});
  int64_t at = 0;
  for (Parameter* p : order) {
    auto place = [&](const Tensor& flat) { return flat.slice(0, at, at + p->shape.numel()).reshape(p->shape); };
    p->master = place(master_);
    grad_->parameters.push_back(p);
    const bool copied = compute_.defined() && !p->options.full_precision;
    const auto sink = [grad = grad_, begin = at, shape = p->shape] {
      grad->make();
      return grad->flat.slice(0, begin, begin + shape.numel()).reshape(shape);
    };
    p->variable = Variable::parameter(copied ? place(compute_) : p->master, sink, p->name);
    at += aligned_elements(p->shape.numel());
  }
  for (JoinedParameters& joined : joined_) {
    const int64_t begin = joined.parts[0]->master.offset();
    int64_t end = begin, rows = 0;
    bool neighbours = true;
    std::string name;
    for (const Parameter* p : joined.parts) {
      neighbours = neighbours && p->master.offset() == end && p->options.full_precision == joined.parts[0]->options.full_precision;
      end += p->shape.numel();
      rows += p->shape[0];
      name += (name.empty() ? "" : " | ") + p->name;
    }
    if (!neighbours) continue;
    const Shape shape{rows, joined.parts[0]->shape[1]};
    const Tensor& values = compute_.defined() && !joined.parts[0]->options.full_precision ? compute_ : master_;
    const auto sink = [grad = grad_, begin, end, shape] {
      grad->make();
      return grad->flat.slice(0, begin, end).reshape(shape);
    };
    joined.variable = Variable::parameter(values.slice(0, begin, end).reshape(shape), sink, name);
    for (const Parameter* p : joined.parts) joined.variable.state()->edge->parts.push_back(p->name);
  }
}

void ParameterSet::FlatGrad::make() {
  if (flat.defined()) return;
  flat = Tensor::zeros(master.device(), master.dtype(), master.shape());
  for (Parameter* p : parameters) p->grad = flat.slice(0, p->master.offset(), p->master.offset() + p->shape.numel()).reshape(p->shape);
}

void ParameterSet::allocate_grads() const {
  if (grad_ == nullptr) throw ValueError("parameters: gradients asked for before allocate()");
  grad_->make();
}

const Tensor& ParameterSet::flat_grad() const {
  allocate_grads();
  return grad_->flat;
}

void ParameterSet::initialize(uint64_t seed) {
  for (Parameter& p : parameters_) {
    if (!p.options.init) throw ValueError("parameters: no initializer", {{"name", p.name}});
    const uint64_t key = philox_key(philox_key(seed, hash_name("init")), hash_name(p.name.c_str()));
    const int64_t n = p.shape.numel();
    const Tensor host = Tensor::empty(Device::cpu(), p.master.dtype(), p.shape);
    visit(host.dtype(), [&](auto element) {
      using T = decltype(element);
      if constexpr (std::is_floating_point_v<T>) {
        T* values = host.data<T>();
#pragma omp parallel for schedule(static) if (n > 4096)
        for (int64_t i = 0; i < n; ++i) values[i] = static_cast<T>(p.options.init(key, static_cast<uint64_t>(i)));
      }
    });
    copy(p.master, host);
  }
  refresh_compute();
}

void ParameterSet::refresh_compute() {
  if (compute_.defined()) copy(compute_, master_);
}

void ParameterSet::clear_grads() {
  for (Parameter& p : parameters_) p.variable.clear_grad();
  for (const JoinedParameters& joined : joined_) joined.variable.clear_grad();
}

void ParameterSet::complete_grads() {
  allocate_grads();
  std::set<const Parameter*> reached;
  for (const JoinedParameters& joined : joined_) {
    if (!joined.variable.grad().defined()) continue;
    for (const Parameter* part : joined.parts) {
      if (part->variable.grad().defined())
        throw ValueError("parameters: a gradient came both for a parameter and for the matrix that it is joined to",
                         {{"name", part->name}});
      reached.insert(part);
    }
  }
  for (const Parameter& p : parameters_)
    if (!p.variable.grad().defined() && !reached.contains(&p)) fill(p.grad, 0);
}

}  // namespace longhand
