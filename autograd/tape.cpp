// Recording and walking the tape; see tape.h.
#include "autograd/tape.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <set>

#include "autograd/aligned_rows.h"
#include "autograd/gradient_arrival.h"
#include "autograd/node.h"
#include "autograd/value_dump.h"
#include "core/error.h"
#include "core/files.h"
#include "core/layer_path.h"
#include "core/op_ledger.h"
#include "core/op_scope.h"
#include "core/switches.h"

namespace longhand {
namespace {

constexpr const char *kSplitOp = "split", *kReshapeOp = "reshape";
thread_local bool recording = true;
std::atomic<uint64_t> next_order{1};

void require_finite(const Tensor& t, const std::string& op, const std::string& layer, const std::string& what) {
  if (!t.defined() || t.numel() == 0) return;
  const int64_t index = first_non_finite(t);
  if (index < 0) return;
  throw NumericError(op + ": " + what + " is not finite",
                     {{"layer", layer.empty() ? "(none)" : layer},
                      {"tensor", t.describe()},
                      {"index", std::to_string(index) + " (row-major)"},
                      {"value", std::to_string(t.contiguous().reshape({t.numel()}).slice(0, index, index + 1).item())}});
}

double size_bytes(const Shape& shape, Dtype dtype) {
  return static_cast<double>(shape.numel() * size_of(dtype));
}
double size_bytes(const Tensor& t) {
  return t.defined() ? size_bytes(t.shape(), t.dtype()) : 0;
}

// For OpLedger: every input read once, every output written once; views move nothing.
bool moves_nothing(const std::string& op) {
  return op == kSplitOp || op == kReshapeOp || op == kRecomputedOp;
}

bool same_place(const Tensor& a, const Tensor& b) {
  return a.same_storage(b) && a.offset() == b.offset();
}

}  // namespace

// --- variables ------------------------------------------------------------------------------------------------

Variable Tape::make(Tensor value, std::shared_ptr<GradEdge> edge) {
  Variable v;
  v.state_ = std::make_shared<Variable::State>(Variable::State{std::move(value), std::move(edge), nullptr, nullptr});
  return v;
}

Variable::Variable(Tensor value) {
  if (value.defined()) state_ = std::make_shared<State>(State{std::move(value), nullptr, nullptr, nullptr});
}

namespace {
std::shared_ptr<GradEdge> edge_for(const Tensor& value) {
  auto edge = std::make_shared<GradEdge>();
  edge->shape = value.shape();
  edge->dtype = value.dtype();
  edge->device = value.device();
  return edge;
}
}  // namespace

Variable Variable::leaf(Tensor value, std::string name) {
  auto edge = edge_for(value);
  edge->name = std::move(name);
  return Tape::make(std::move(value), std::move(edge));
}

Variable Variable::parameter(Tensor value, Tensor grad_sink, std::string name) {
  if (!(grad_sink.shape() == value.shape()))
    throw ShapeError("parameter: the gradient's place has another shape",
                     {{"value", value.describe()}, {"grad", grad_sink.describe()}, {"name", name}});
  Variable v = leaf(std::move(value), std::move(name));
  v.state_->edge->grad = std::move(grad_sink);
  v.state_->edge->is_parameter = true;
  return v;
}

Variable Variable::parameter(Tensor value, std::function<Tensor()> grad_sink, std::string name) {
  Variable v = leaf(std::move(value), std::move(name));
  v.state_->edge->sink = std::move(grad_sink);
  v.state_->edge->is_parameter = true;
  return v;
}

const Tensor& GradEdge::parameter_place() {
  if (!grad.defined()) grad = sink();
  return grad;
}

const Tensor& Variable::value() const {
  static const Tensor undefined;
  return state_ ? state_->value : undefined;
}
const std::string& Variable::name() const {
  static const std::string none;
  return state_ && state_->edge ? state_->edge->name : none;
}
bool Variable::requires_grad() const {
  return state_ && state_->edge;
}
const Tensor& Variable::grad() const {
  static const Tensor undefined;
  return state_ && state_->edge && state_->edge->started ? state_->edge->grad : undefined;
}
void Variable::clear_grad() const {
  if (!requires_grad()) return;
  state_->edge->started = false;
  if (!state_->edge->is_parameter) state_->edge->grad = Tensor();
}
Variable Variable::detach() const {
  return Variable(value());
}

// --- recording ------------------------------------------------------------------------------------------------

NoGrad::NoGrad() : before_(recording) {
  recording = false;
}
NoGrad::~NoGrad() {
  recording = before_;
}
WithGrad::WithGrad() : before_(recording) {
  recording = true;
}
WithGrad::~WithGrad() {
  recording = before_;
}
bool grad_enabled() {
  return recording;
}

std::vector<Variable> Tape::record(const char* op, std::vector<Tensor> outputs, const std::vector<Variable>& inputs,
                                   BackwardFunction function) {
  if (switches().check)
    for (std::size_t i = 0; i < outputs.size(); ++i) require_finite(outputs[i], op, current_layer(), "output " + std::to_string(i));
  if (OpLedger::running() && !moves_nothing(op)) {
    double bytes = 0;
    for (const Variable& input : inputs) bytes += size_bytes(input.value());
    for (const Tensor& output : outputs) bytes += size_bytes(output);
    OpLedger::note(bytes, 0);
  }
  const std::string dumped = switches().dump.empty() ? "" : dump_outputs(current_layer(), op, outputs);
  const bool wanted = recording && std::any_of(inputs.begin(), inputs.end(), [](const Variable& v) { return v.requires_grad(); });
  std::vector<Variable> results;
  if (!wanted) {
    for (Tensor& output : outputs) results.emplace_back(std::move(output));
    return results;
  }
  auto node = std::make_shared<Node>();
  node->op = op;
  node->layer = current_layer();
  node->dumped = dumped;
  node->order = next_order++;
  node->function = std::move(function);
  for (const Variable& input : inputs) node->inputs.push_back(input ? input.state()->edge : nullptr);
  for (Tensor& output : outputs) {
    if (!output.defined()) {
      node->outputs.push_back({{}, Dtype::f32, Device::cpu(), {}, false});
      results.emplace_back();
      continue;
    }
    node->outputs.push_back({output.shape(), output.dtype(), output.device(), {}, false});
    auto edge = edge_for(output);
    edge->producer = node;
    edge->output = static_cast<int>(node->outputs.size()) - 1;
    results.push_back(make(std::move(output), std::move(edge)));
  }
  return results;
}

std::vector<Variable> record(const char* op, std::vector<Tensor> outputs, const std::vector<Variable>& inputs, BackwardFunction function) {
  return Tape::record(op, std::move(outputs), inputs, std::move(function));
}
Variable record(const char* op, Tensor output, std::initializer_list<Variable> inputs, BackwardFunction function) {
  return Tape::record(op, {std::move(output)}, inputs, std::move(function))[0];
}

// --- walking --------------------------------------------------------------------------------------------------

const Tensor& BackwardCall::grad(int output) const {
  return node_.outputs.at(static_cast<std::size_t>(output)).grad;
}

Tensor BackwardCall::grad_or_zeros(int output) const {
  const Node::Slot& slot = node_.outputs.at(static_cast<std::size_t>(output));
  return slot.grad.defined() ? slot.grad : Tensor::zeros(slot.device, slot.dtype, slot.shape);
}

bool BackwardCall::needs(int input) const {
  return node_.inputs.at(static_cast<std::size_t>(input)) != nullptr;
}

Tensor BackwardCall::buffer(int input) const {
  const GradEdge& edge = node_.wanted(input);
  if (edge.place)
    if (Tensor inside = edge.place(); inside.defined()) return inside;
  node_.handed.push_back(Tensor::empty(edge.device, edge.dtype, edge.shape));
  return node_.handed.back();
}

void BackwardCall::set(int input, const Tensor& grad) {
  if (!grad.defined() || !needs(input)) return;
  node_.deliver(input, grad, false);
  Node::Slot* slot = node_.slot_of(input);
  node_.given.emplace_back(grad, slot != nullptr && slot->grad.same_storage(grad) ? slot : nullptr);
}

Accumulation BackwardCall::accumulate(int input) {
  GradEdge& edge = node_.wanted(input);
  if (edge.is_parameter) {
    const double beta = edge.started ? 1.0 : 0.0;
    edge.started = true;
    if (switches().check) node_.summed_in_place.push_back(input);
    return {edge.parameter_place(), beta};
  }
  const Node::Slot* slot = node_.slot_of(input);
  const bool sum_so_far = slot != nullptr && slot->grad.defined() && slot->owned;
  const Dtype sums = edge.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  const Tensor place = sum_so_far ? slot->grad : slot != nullptr ? buffer(input) : Tensor::empty(edge.device, sums, edge.shape);
  node_.pending.emplace_back(input, place);
  return {place, sum_so_far ? 1.0 : 0.0};
}

Node::Slot* Node::slot_of(int input) const {
  const GradEdge& edge = wanted(input);
  return edge.producer == nullptr ? nullptr : &edge.producer->outputs[static_cast<std::size_t>(edge.output)];
}

GradEdge& Node::wanted(int input) const {
  const auto& edge = inputs.at(static_cast<std::size_t>(input));
  if (edge == nullptr)
    throw ValueError(op + ": backward asked for the place of a gradient that nobody wants", {{"input", std::to_string(input)}});
  return *edge;
}

void Node::deliver(int input, const Tensor& grad, bool owned) {
  GradEdge& edge = *inputs[static_cast<std::size_t>(input)];
  if (!(grad.shape() == edge.shape))
    throw ShapeError(op + ": backward gave a gradient of the wrong shape",
                     {{"input", std::to_string(input)}, {"gradient", grad.describe()}, {"expected", edge.shape.str()}});
  if (switches().check) require_finite(grad, op, layer, "gradient of input " + std::to_string(input));
  if (edge.producer == nullptr) {
    if (edge.is_parameter) {
      edge.started ? add_scaled(edge.parameter_place(), grad) : copy(edge.parameter_place(), grad);
    } else if (edge.started) {
      edge.grad = edge.grad.clone();
      add_scaled(edge.grad, grad);
    } else {
      edge.grad = grad;
    }
    edge.started = true;
    return;
  }
  Slot& slot = *slot_of(input);
  if (slot.owned && same_place(slot.grad, grad)) return;  // accumulate() has added it there
  if (!slot.grad.defined()) {
    slot.grad = grad.to(edge.dtype);
    slot.owned = owned;
    return;
  }
  if (!slot.owned) slot.grad = slot.grad.clone();  // somebody else may hold the first contribution
  slot.owned = true;
  add_scaled(slot.grad, grad);
}

// A buffer that was handed out for one gradient and given as one alone: the op has let go of it.
void Node::own_buffers() {
  for (const auto& [grad, slot] : given) {
    const auto same = [&grad = grad](const Tensor& other) { return other.same_storage(grad); };
    const auto times = std::count_if(given.begin(), given.end(), [&same](const auto& other) { return same(other.first); });
    if (slot != nullptr && times == 1 && std::any_of(handed.begin(), handed.end(), same)) slot->owned = true;
  }
  handed.clear();
  given.clear();
}

void Node::run() {
  if (used) throw ValueError(op + ": backward over a graph that was already walked", {{"layer", layer}, {"try", "run the forward again"}});
  used = true;
  const std::string name = op + "_backward";
  const LayerPath layer_path(layer);
  {
    const auto reached = std::find_if(outputs.begin(), outputs.end(), [](const Slot& slot) { return slot.grad.defined(); });
    const Tensor incoming = reached == outputs.end() ? Tensor() : reached->grad;
    std::optional<OpScope> scope;
    if (op != kRecomputedOp) scope.emplace(name.c_str(), std::initializer_list<const Tensor*>{&incoming});
    if (OpLedger::running() && !moves_nothing(op)) {
      double bytes = 0;
      for (const auto& edge : inputs)
        if (edge != nullptr) bytes += 2 * size_bytes(edge->shape, edge->dtype);  // the value in, its gradient out
      for (const Slot& slot : outputs) bytes += size_bytes(slot.grad);
      OpLedger::note(bytes, 0);
    }
    if (!dumped.empty()) {
      std::vector<Tensor> gradients;
      for (const Slot& slot : outputs) gradients.push_back(slot.grad);
      dump_gradients(dumped, gradients);
    }
    BackwardCall call(*this);
    if (incoming.defined()) function(call);
    settle();
  }
  function = nullptr;  // frees what it kept
  if (waiting == 0) inputs.clear();
  for (Slot& slot : outputs) slot.grad = Tensor();
}

void Node::abandon() {
  used = true;
  function = nullptr;
  for (Slot& output : outputs) output.grad = {};
  pending.clear();
}

void Node::settle() {
  own_buffers();
  for (auto& [input, grad] : pending) deliver(input, grad, true);
  pending.clear();
  for (int input : summed_in_place) require_finite(wanted(input).grad, op, layer, "gradient of input " + std::to_string(input));
  summed_in_place.clear();
}

std::shared_ptr<Node> Node::wait() {
  ++waiting;
  return shared_from_this();
}

void Node::go_on(const std::function<void(BackwardCall&)>& rest) {
  {
    const std::string name = op + "_backward";
    const LayerPath layer_path(layer);
    const OpScope scope(name.c_str());
    BackwardCall call(*this);
    rest(call);
    settle();
  }
  if (--waiting > 0) return;
  inputs.clear();
  if (when_done) when_done();
}

namespace {

// The parameters whose gradients a walk still changes: how many inputs of nodes to come each one is.
class OpenParameters {
 public:
  explicit OpenParameters(const GradientArrived& arrived) : arrived_(arrived) {}
  void add(const Node& node) {
    for (const auto& edge : node.inputs)
      if (edge && edge->is_parameter) ++inputs_[edge.get()];
  }
  // Those of a node, before it runs and forgets its inputs.
  static std::vector<std::shared_ptr<GradEdge>> of(const Node& node) {
    std::vector<std::shared_ptr<GradEdge>> out;
    for (const auto& edge : node.inputs)
      if (edge && edge->is_parameter) out.push_back(edge);
    return out;
  }
  void close(const std::vector<std::shared_ptr<GradEdge>>& edges) {
    for (const auto& edge : edges) {
      if (--inputs_.at(edge.get()) > 0) continue;
      if (edge->parts.empty()) arrived_(edge->name);
      for (const std::string& part : edge->parts) arrived_(part);
    }
  }

 private:
  const GradientArrived& arrived_;
  std::map<const GradEdge*, int64_t> inputs_;
};
thread_local OpenParameters* open_parameters = nullptr;  // of the walk that runs; a walk inside of a node (recompute.h) joins it

void walk(const std::vector<Variable>& roots, const std::vector<Tensor>& grads, const GradientArrived& arrived) {
  if (roots.size() != grads.size()) throw ValueError("backward: as many gradients as roots are needed");
  std::vector<std::shared_ptr<Node>> order, stack;
  std::set<Node*> seen;
  auto visit_producer = [&](const GradEdge* edge) {
    if (edge && edge->producer && seen.insert(edge->producer.get()).second) stack.push_back(edge->producer);
  };
  const NoGrad no_grad;
  for (std::size_t i = 0; i < roots.size(); ++i) {
    if (!roots[i].requires_grad()) throw ValueError("backward: the root depends on nothing that wants a gradient");
    GradEdge& edge = *roots[i].state()->edge;
    if (!(edge.shape == grads[i].shape()))
      throw ShapeError("backward: the gradient given for a root has another shape",
                       {{"root", edge.shape.str()}, {"gradient", grads[i].describe()}});
    if (edge.producer && edge.producer->used)
      throw ValueError(edge.producer->op + ": backward over a graph that was already walked", {{"try", "run the forward again"}});
    Node seed;  // delivers the given gradient like any other node would
    seed.op = "root";
    seed.inputs = {roots[i].state()->edge};
    seed.deliver(0, grads[i], false);
    visit_producer(&edge);
  }
  while (!stack.empty()) {
    const auto node = stack.back();
    stack.pop_back();
    order.push_back(node);
    for (const auto& edge : node->inputs) visit_producer(edge.get());
  }
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) { return a->order > b->order; });
  struct Listening {
    OpenParameters* const before = open_parameters;
    ~Listening() { open_parameters = before; }
  };
  const Listening listening;
  OpenParameters own(arrived);
  if (arrived) open_parameters = &own;
  OpenParameters* const open = open_parameters;
  if (open != nullptr)
    for (const auto& node : order) open->add(*node);
  // A walk that is broken off lets go of what is left: a node that waits keeps the one that was to give the value, and is kept by it.
  struct LetGo {
    std::vector<std::shared_ptr<Node>>& left;
    ~LetGo() {
      for (const auto& node : left)
        if (node) node->abandon();
    }
  };
  const LetGo let_go{order};
  std::vector<std::shared_ptr<Node>> waited;
  for (auto& node : order) {
    const auto parameters = open != nullptr ? OpenParameters::of(*node) : std::vector<std::shared_ptr<GradEdge>>();
    node->run();
    if (node->waits()) waited.push_back(node);
    if (open != nullptr && node->waits()) node->when_done = [open, parameters] { open->close(parameters); };
    else if (open != nullptr) open->close(parameters);
    node.reset();
  }
  for (const auto& node : waited)
    if (node->waits()) throw ValueError(node->op + ": backward waited for a value that nobody gave", {{"layer", node->layer}});
}

// Once a process and file: later losses have the same graph, or are not what was asked for.
void write_first_graph(const Variable& root) {
  static std::string written;
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  const std::string& path = switches().graph;
  if (written == path) return;
  write_file_atomically(path, graph_dot(root));
  written = path;
}

}  // namespace

void backward(const std::vector<Variable>& roots, const std::vector<Tensor>& grads) {
  walk(roots, grads, {});
}

void backward(const Variable& root) {
  backward(root, GradientArrived());
}

void backward(const Variable& root, const GradientArrived& arrived) {
  if (root.value().numel() != 1)
    throw ShapeError("backward: without a gradient the root must be a scalar", {{"root", root.value().describe()}});
  if (!switches().graph.empty()) write_first_graph(root);
  walk({root}, {Tensor::full(root.value().device(), root.value().dtype(), root.shape(), 1.0)}, arrived);
}

// --- views ----------------------------------------------------------------------------------------------------

std::vector<Variable> split(const Variable& x, std::initializer_list<int64_t> widths) {
  int64_t sum = 0;
  for (int64_t width : widths) sum += width;
  if (sum != x.value().dim(-1))
    throw ShapeError("split: the widths do not add up to the last axis", {{"x", x.value().describe()}, {"sum", std::to_string(sum)}});

  // The gradient of the whole: made when the first part asks for its place, filled by the parts, handed on by the node.
  struct Whole {
    Tensor grad;
    Shape shape;
    Dtype dtype;
    Device device;
    std::vector<bool> taken;  // whose place was handed out
    Tensor fresh() const { return empty_with_aligned_rows(device, dtype, shape); }
    const Tensor& get() {
      if (!grad.defined()) grad = fresh();
      return grad;
    }
  };
  auto whole = std::make_shared<Whole>(Whole{{}, x.shape(), x.value().dtype(), x.value().device(), std::vector<bool>(widths.size())});

  std::vector<Tensor> parts;
  std::vector<int64_t> begins;
  int64_t begin = 0;
  for (int64_t width : widths) {
    parts.push_back(x.value().slice(-1, begin, begin + width));
    begins.push_back(begin);
    begin += width;
  }
  std::vector<int64_t> sizes(widths);
  auto results = Tape::record(kSplitOp, std::move(parts), {x}, [whole, begins, sizes](BackwardCall& call) {
    auto part_of = [&](const Tensor& all, std::size_t i) { return all.slice(-1, begins[i], begins[i] + sizes[i]); };
    // A part with several contributions has left its place. Whoever wrote there may have handed that tensor to another input as well, so
    // the place is not overwritten: the whole is built anew.
    bool left = false;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      const Tensor& grad = call.grad(static_cast<int>(i));
      left = left || (whole->taken[i] && grad.defined() && !same_place(grad, part_of(whole->get(), i)));
    }
    const Tensor all = left ? whole->fresh() : whole->get();
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      const Tensor place = part_of(all, i);
      const Tensor& grad = call.grad(static_cast<int>(i));
      if (!grad.defined()) fill(place, 0);
      else if (!same_place(grad, place)) copy(place, grad);
    }
    call.set(0, all);
    whole->grad = Tensor();
  });
  for (std::size_t i = 0; i < results.size(); ++i) {
    if (!results[i].requires_grad()) continue;
    results[i].state()->edge->place = [whole, i, at = begins[i], size = sizes[i]] {
      if (whole->taken[i]) return Tensor();
      whole->taken[i] = true;
      return whole->get().slice(-1, at, at + size);
    };
    if (const auto all = x.state()->remade; all != nullptr)
      results[i].state()->remade =
          std::make_shared<Remade>(Remade{[all, at = begins[i], size = sizes[i]] { return all->get().slice(-1, at, at + size); }, {}});
  }
  return results;
}

Variable reshape(const Variable& x, Shape shape) {
  const Shape before = x.shape();
  Variable result = record(kReshapeOp, x.value().reshape(shape), {x}, [before](BackwardCall& call) {
    const Tensor& grad = call.grad(0);
    call.set(0, grad.reshape(before));
  });
  if (result.requires_grad() && x.state()->edge->place) {
    result.state()->edge->place = [outer = x.state()->edge, shape] {
      const Tensor place = outer->place();
      return place.defined() ? place.reshape(shape) : place;
    };
  }
  if (result.requires_grad()) result.state()->late = x.state()->late;
  if (result.requires_grad() && x.state()->remade)
    result.state()->remade = std::make_shared<Remade>(Remade{[all = x.state()->remade, shape] { return all->get().reshape(shape); }, {}});
  return result;
}

Variable add(const Variable& x, const Variable& y) {
  Tensor sum = x.value().clone();
  add_scaled(sum, y.value());
  return record("add", sum, {x, y}, [](BackwardCall& call) {
    call.set(0, call.grad(0));
    call.set(1, call.grad(0));
  });
}

std::string graph_dot(const Variable& root) {
  std::string text = "digraph longhand {\n  rankdir=BT;\n  node [shape=box, fontname=\"monospace\"];\n";
  std::set<const Node*> seen;
  std::vector<const Node*> stack;
  auto id = [](const void* p) { return "\"" + std::to_string(reinterpret_cast<std::uintptr_t>(p)) + "\""; };
  auto visit_edge = [&](const GradEdge* edge) {
    if (edge->producer) {
      if (seen.insert(edge->producer.get()).second) stack.push_back(edge->producer.get());
    } else {
      text += "  " + id(edge) + " [label=\"" + edge->name + " " + edge->shape.str() + "\", style=filled];\n";
    }
  };
  if (root.requires_grad()) visit_edge(root.state()->edge.get());
  while (!stack.empty()) {
    const Node* node = stack.back();
    stack.pop_back();
    std::string label = (node->layer.empty() ? "" : node->layer + "/") + node->op;
    for (const auto& output : node->outputs) label += "\\n" + output.shape.str() + " " + name_of(output.dtype);
    text += "  " + id(node) + " [label=\"" + label + "\"];\n";
    for (const auto& edge : node->inputs) {
      if (edge == nullptr) continue;
      visit_edge(edge.get());
      text += "  " + (edge->producer ? id(edge->producer.get()) : id(edge.get())) + " -> " + id(node) + " [label=\"" + edge->shape.str() +
              "\"];\n";
    }
  }
  return text + "}\n";
}

}  // namespace longhand
