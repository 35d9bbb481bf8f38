// See op_scope.h.
#include "core/op_scope.h"

#include <fmt/core.h>

#include <cstdio>

#include "core/device.h"
#include "core/layer_path.h"
#include "core/op_ledger.h"
#include "core/switches.h"
#include "core/tensor.h"

namespace longhand {
namespace {
thread_local std::string layer_path;
thread_local const char* running_op = nullptr;
OpLedger* ledger = nullptr;
}  // namespace

LayerScope::LayerScope(std::string_view name, int index) : length_before_(layer_path.size()) {
  if (!layer_path.empty()) layer_path += '.';
  layer_path += name;
  if (index >= 0) layer_path += "." + std::to_string(index);
}
LayerScope::~LayerScope() {
  layer_path.resize(length_before_);
}

LayerPath::LayerPath(std::string path) : before_(std::move(path)) {
  before_.swap(layer_path);
}
LayerPath::~LayerPath() {
  before_.swap(layer_path);
}

OpScope::OpScope(const char* op, std::initializer_list<const Tensor*> inputs) : outer_(running_op) {
  running_op = op;
  if (ledger != nullptr) ledger->begin(op, inputs);
  if (switches().trace < 2) return;
  for (const Tensor* tensor : inputs) {
    if (!tensor->defined()) continue;
    if (first_ == nullptr) first_ = tensor;
    inputs_ += (inputs_.empty() ? "" : " ") + tensor->describe();
  }
  if (first_ != nullptr) first_->device().synchronize();
  begin_ = std::chrono::steady_clock::now();
}

OpScope::~OpScope() {
  try {
    if (ledger != nullptr) ledger->end();
    if (switches().trace == 1) fmt::print(stderr, "trace {}\n", current_op_path());
    if (switches().trace == 2) {
      if (first_ != nullptr) first_->device().synchronize();
      const std::chrono::duration<double, std::milli> elapsed = std::chrono::steady_clock::now() - begin_;
      fmt::print(stderr, "trace {:<40} {:9.3f} ms  {}\n", current_op_path(), elapsed.count(), inputs_);
    }
  } catch (...) {  // a failed device is reported by its next call; a stderr that takes no text has no reader
  }
  running_op = outer_;
}

OpLedger::OpLedger(const Device& device) : device_(device), marks_(make_time_marks(device)) {
  ledger = this;
}
OpLedger::~OpLedger() {
  ledger = nullptr;
}
bool ops_are_watched() {
  return switches().check || switches().trace != 0 || !switches().dump.empty() || OpLedger::running();
}

bool OpLedger::running() {
  return ledger != nullptr;
}
void OpLedger::note(double bytes, double flops) {
  if (ledger == nullptr || ledger->open_.empty()) return;
  Row& row = ledger->rows_[ledger->open_.back()];
  row.bytes += bytes;
  row.flops += flops;
}
void OpLedger::begin(const char* op, std::initializer_list<const Tensor*> inputs) {
  std::string row = op;
  for (const Tensor* tensor : inputs)
    if (tensor->defined()) row += " " + tensor->shape().str();
  events_.push_back({row, marks_->set()});
  open_.push_back(std::move(row));
}
void OpLedger::end() {
  if (open_.empty()) return;  // it began before anybody listened
  events_.push_back({"", marks_->set()});
  open_.pop_back();
}
const std::map<std::string, OpLedger::Row>& OpLedger::rows() {
  device_.synchronize();
  struct Open {
    std::string op;
    std::size_t mark;
    double inside_ms = 0;
  };
  std::vector<Open> open;
  for (const auto& [op, mark] : events_) {
    if (!op.empty()) {
      open.push_back({op, mark});
      continue;
    }
    const Open ended = open.back();
    open.pop_back();
    const double ms = marks_->milliseconds(ended.mark, mark);
    Row& row = rows_[ended.op];
    row.ms += ms - ended.inside_ms;
    ++row.count;
    if (!open.empty()) open.back().inside_ms += ms;
  }
  events_.clear();
  return rows_;
}

std::string current_op_path() {
  if (running_op == nullptr) return layer_path;
  return layer_path.empty() ? std::string(running_op) : layer_path + "/" + running_op;
}
const std::string& current_layer() {
  return layer_path;
}

}  // namespace longhand
