// The tape: ops record one node each with exactly what their backward needs; backward() walks the nodes in reverse order of recording,
// and frees each as it goes.
//
//   Variable rmsnorm(const Variable& x, const Variable& weight, double eps) {
//     OpScope op("rmsnorm", {&x.value(), &weight.value()});
//     auto [y, rstd] = rmsnorm_fwd(x.value(), weight.value(), eps);
//     return record("rmsnorm", y, {x, weight}, [=](BackwardCall& call) {          // keeps x, weight, rstd; y is not kept
//       auto [grad_x, grad_weight] = rmsnorm_bwd(call.grad(0), x.value(), weight.value(), rstd);
//       call.set(0, grad_x);
//       call.set(1, grad_weight);
//     });
//   }
#pragma once
#include <functional>
#include <initializer_list>
#include <vector>

#include "autograd/variable.h"

namespace longhand {

/// Where a gradient is to be summed: destination = beta * destination + contribution.
struct Accumulation {
  Tensor destination;
  double beta;  // 0 for the first contribution (the destination holds nothing yet), 1 afterwards
};

/// What a node's backward function works with: gradients of the outputs come in, gradients of the inputs go out.
class BackwardCall {  // valid only during the call
 public:
  /// Gradient of output i; undefined when nothing flowed into it (then it is zero).
  const Tensor& grad(int output) const;
  /// Gradient of output i, with zeros like that output when nothing flowed into it.
  Tensor grad_or_zeros(int output) const;
  /// Whether input i wants a gradient; work for others may be left out.
  bool needs(int input) const;
  /// A tensor with the shape, dtype and device of input i in which to write its gradient; hand it to set() afterwards. For a
  /// view made by split() it lies inside the gradient of the whole, so that no copy is made: its rows may be strided. Holds no values yet.
  /// errors  ValueError where input wants no gradient (see needs())
  Tensor buffer(int input) const;
  /// Hands over the gradient of input i: same shape; f32 is welcome for parameters of any dtype.
  void set(int input, const Tensor& grad);
  /// For products that can sum in place: where to put the gradient of input i. A parameter gives its place in the flat buffer; an
  /// activation the gradient that it has had from other ops so far, where nobody else holds that, or else what buffer() gives.
  /// After writing it, nothing more is to be done (no set()).
  /// errors  ValueError where input wants no gradient
  Accumulation accumulate(int input);

 private:
  friend class Node;
  explicit BackwardCall(Node& node) : node_(node) {}
  Node& node_;
};

using BackwardFunction = std::function<void(BackwardCall&)>;

/// Records an op with one or several outputs; without a gradient to compute (no input wants one, or inside NoGrad) nothing is recorded and
/// the outputs are constants. With LONGHAND_CHECK=1 the outputs are searched for NaN and infinity.
/// errors  NumericError naming op, layer, output and index (LONGHAND_CHECK=1)
Variable record(const char* op, Tensor output, std::initializer_list<Variable> inputs, BackwardFunction backward);
std::vector<Variable> record(const char* op, std::vector<Tensor> outputs, const std::vector<Variable>& inputs, BackwardFunction backward);

/// Computes d(sum_i <roots[i], grads[i]>)/d(leaf) for every leaf that wants it. Without grads, the single root is a scalar with gradient 1.
/// The graph is freed as it is walked; a second backward over it throws ValueError.
void backward(const Variable& root);
void backward(const std::vector<Variable>& roots, const std::vector<Tensor>& grads);

/// Nothing is recorded while an object of this type lives.
class NoGrad {
 public:
  NoGrad();
  ~NoGrad();
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_;
};
bool grad_enabled();

/// Splits the last axis into views of the given widths, without a copy. In backward the parts write their gradients into one buffer.
/// x        [.., sum of widths]
/// returns  views [.., widths[i]]
/// errors   ShapeError when the widths do not add up to the last axis
std::vector<Variable> split(const Variable& x, std::initializer_list<int64_t> widths);

/// The same elements under another shape, as a view; the gradient is a view likewise.
/// errors   ShapeError when the strides allow no view (see Tensor::reshape)
Variable reshape(const Variable& x, Shape shape);

/// x + y elementwise, same shape and dtype.
Variable add(const Variable& x, const Variable& y);

/// The graph behind `root` as Graphviz text: one box per node with op, layer, output shapes. LONGHAND_GRAPH=file.dot writes that of the
/// first scalar root that is walked.
std::string graph_dot(const Variable& root);

}  // namespace longhand
