// Values that a backward needs, but not at once: the gradient of a weight can wait until the op in front, whose backward comes next, has
// left its output once more beside its gradients. That costs writing it, where making it again (recompute.h) costs a pass of its own.
//
//   const auto late = std::make_shared<LateValue>();
//   Variable y = record("swiglu", y_value, {gate, up}, [.., late](BackwardCall& call) {
//     const Tensor y_again = late->wanted() ? Tensor::empty(..) : Tensor();    // the kernel writes it where it is defined
//     ...
//     late->give(y_again);
//   });
//   return remade(y, make, late);                                              // the same bits either way
#pragma once
#include <functional>
#include <memory>
#include <vector>

#include "autograd/recompute.h"
#include "autograd/tape.h"

namespace longhand {

class LateValue {
 public:
  /// Whether somebody waits for the value: then the backward that can leave it has to.
  bool wanted() const { return !waiting_.empty(); }
  /// Does what waited for it; nothing when nobody does.
  void give(const Tensor& value);

 private:
  friend class Awaited;
  std::vector<std::function<void(const Tensor&)>> waiting_;
};

/// As remade(variable, make); those who can wait get what `late` gives instead.
Variable remade(Variable variable, std::function<Tensor()> make, std::shared_ptr<LateValue> late);

/// What a backward function keeps of a variable whose tensor it can wait for.
class Awaited {
 public:
  explicit Awaited(const Variable& variable);

  /// The rest of a backward function, which gives the gradient of one input: done at once where the tensor is there or has to be made
  /// again, else when the variable's own backward has left it. input  whose gradient `rest` gives; only that of a leaf can wait
  void then(BackwardCall& call, int input, std::function<void(BackwardCall&, const Tensor&)> rest) const;

 private:
  Kept kept_;
  std::shared_ptr<Remade> remade_;
  std::shared_ptr<LateValue> late_;
  Shape shape_;
};

}  // namespace longhand
