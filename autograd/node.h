// The recorded graph behind variables; for autograd's own files only.
#pragma once
#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "autograd/late_value.h"
#include "autograd/recompute.h"
#include "autograd/tape.h"

namespace longhand {

/// Where the gradient of one variable goes: to an output slot of the node that made it, or to a leaf. Nodes keep the edges of their
/// inputs, not the inputs themselves, so that a value lives only as long as some backward function keeps it.
struct GradEdge {
  Shape shape;
  Dtype dtype = Dtype::f32;
  Device device = Device::cpu();
  std::shared_ptr<Node> producer;  // null for a leaf
  int output = 0;

  // Leaves:
  std::string name;
  Tensor grad;  // the sum so far; for a parameter, its place in the flat buffer
  bool is_parameter = false;
  std::vector<std::string> parts;   // of joined parameters: their names
  bool started = false;             // grad holds a value
  std::function<Tensor()> sink;     // of a parameter whose place is made at its first gradient
  const Tensor& parameter_place();  // grad of a parameter, made where it was not yet

  // A place inside a larger gradient (split, reshape): gives undefined when it has been taken.
  std::function<Tensor()> place;
};

struct Variable::State {
  Tensor value;
  std::shared_ptr<GradEdge> edge;   // null for a constant
  std::shared_ptr<Remade> remade;   // null for a value that is kept as it is
  std::shared_ptr<LateValue> late;  // null unless the backward of its op can leave it, in the shape that the op gave it
};

/// The op of nodes that run a part of the forward again; what they do counts for the ops inside.
inline constexpr const char* kRecomputedOp = "recomputed";

class Node : public std::enable_shared_from_this<Node> {
 public:
  static Node& of(BackwardCall& call) { return call.node_; }

  std::string op, layer;
  std::string dumped;  // what its gradients are called in LONGHAND_DUMP; "": they are not written
  uint64_t order = 0;
  std::vector<std::shared_ptr<GradEdge>> inputs;  // null where no gradient is wanted
  BackwardFunction function;
  bool used = false;

  struct Slot {
    Shape shape;
    Dtype dtype;
    Device device;
    Tensor grad;
    bool owned = false;  // grad may be added to in place
  };
  std::vector<Slot> outputs;
  std::vector<std::pair<int, Tensor>> pending;  // accumulate() results of inputs that are not parameters, delivered after the function

  // While the function runs: buffers that it was handed, and what it gave as gradients, with the slots that hold them now.
  std::vector<Tensor> handed;
  std::vector<std::pair<Tensor, Slot*>> given;

  int waiting = 0;                   // parts that have not run
  std::vector<int> summed_in_place;  // accumulate() results of parameters, with LONGHAND_CHECK=1 searched for NaN and infinity

  void run();
  void abandon();  // instead of run(): frees what the function kept
  /// A part of the backward has to wait: the node keeps its inputs until go_on() has run it, inside of the run of another node.
  std::shared_ptr<Node> wait();
  void go_on(const std::function<void(BackwardCall&)>& rest);
  bool waits() const { return waiting > 0; }
  std::function<void()> when_done;  // called after the last go_on()

  GradEdge& wanted(int input) const;  // ValueError when input wants no gradient
  Slot* slot_of(int input) const;     // where its gradient goes; null for a leaf
  void deliver(int input, const Tensor& grad, bool owned);
  void settle();       // delivers what a part of the backward has given
  void own_buffers();  // slots whose gradient nobody else can hold may be added to in place
};

/// Used by the tape to make variables that carry an edge.
class Tape {
 public:
  static Variable make(Tensor value, std::shared_ptr<GradEdge> edge);
  static std::vector<Variable> record(const char* op, std::vector<Tensor> outputs, const std::vector<Variable>& inputs,
                                      BackwardFunction function);
};

}  // namespace longhand
