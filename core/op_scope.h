// Which op, in which layer, is running: for traces, for memory by op, and for naming the first NaN. One chain of scopes per thread.
#pragma once
#include <chrono>
#include <initializer_list>
#include <string>
#include <string_view>

namespace longhand {

class Tensor;

/// Names a part of the model for as long as it lives: LayerScope scope("layers", 3);
class LayerScope {
 public:
  explicit LayerScope(std::string_view name, int index = -1);
  ~LayerScope();
  LayerScope(const LayerScope&) = delete;
  LayerScope& operator=(const LayerScope&) = delete;

 private:
  std::size_t length_before_;
};

/// Names the op that runs; with LONGHAND_TRACE it prints a line when the op ends (2: with shapes and milliseconds).
class OpScope {
 public:
  explicit OpScope(const char* op, std::initializer_list<const Tensor*> inputs = {});
  ~OpScope();
  OpScope(const OpScope&) = delete;
  OpScope& operator=(const OpScope&) = delete;

 private:
  const char* outer_;
  std::string inputs_;
  const Tensor* first_ = nullptr;
  std::chrono::steady_clock::time_point begin_;
};

/// Whether somebody looks at every op (LONGHAND_TRACE, CHECK, DUMP, an OpLedger): work that is replayed as a graph would not be seen.
bool ops_are_watched();

/// "layers.3/ssd": the layer path and the op that runs now; empty parts are left out.
std::string current_op_path();

/// The layer path alone: "layers.3".
const std::string& current_layer();

}  // namespace longhand
