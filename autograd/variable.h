// Variable: a Tensor in a recorded computation. A handle: copies are the same variable. Values are never changed by the tape.
#pragma once
#include <functional>
#include <memory>
#include <string>

#include "core/tensor.h"

namespace longhand {

class Node;

class Variable {
 public:
  Variable() = default;                                       // undefined: stands for "absent"
  Variable(Tensor value);                                     // a constant  NOLINT: a tensor may stand wherever a variable may
  static Variable leaf(Tensor value, std::string name = "");  // wants a gradient, kept in grad() after backward()

  /// A leaf whose gradient is summed into `grad_sink` (f32, or f64 for f64 values), a view of a flat buffer; see ParameterSet.
  static Variable parameter(Tensor value, Tensor grad_sink, std::string name);
  /// The same where that view is made only when the first gradient arrives, so that a model that is only run holds no gradients.
  static Variable parameter(Tensor value, std::function<Tensor()> grad_sink, std::string name);

  bool defined() const { return state_ != nullptr; }
  explicit operator bool() const { return defined(); }
  const Tensor& value() const;
  const Shape& shape() const { return value().shape(); }
  const std::string& name() const;
  bool requires_grad() const;
  const Tensor& grad() const;  // of a leaf; undefined before backward
  void clear_grad() const;     // the next backward starts this leaf's sum anew
  Variable detach() const;     // the same value as a constant

  struct State;
  const std::shared_ptr<State>& state() const { return state_; }

 private:
  friend class Tape;
  std::shared_ptr<State> state_;
};

}  // namespace longhand
