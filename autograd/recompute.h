// Memory for time: values that a backward needs are made again instead of being kept since the forward. The bits of every gradient stay the
// same, for what is made again is made by the same kernels from the same inputs.
//
//   Variable swiglu(const Variable& gate, const Variable& up) {
//     ...
//     Variable y = record("swiglu", y_value, {gate, up}, [g = Kept(gate), u = Kept(up)](BackwardCall& call) { ... g.get() ... });
//     return remade(y, [g = Kept(gate), u = Kept(up)] { return swiglu_fwd(g.get(), u.get()); });  // whoever keeps y keeps this instead
//   }
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "autograd/variable.h"

namespace longhand {

enum class Recompute {
  none,         // everything is kept
  light,        // what costs one pass over memory is made again: convolutions, gates, narrow projections, norms in f32
  projections,  // every projection is made again as well
  full,         // a layer keeps its input alone; its forward runs once more in the backward
};
/// errors  ConfigError naming the choices
Recompute parse_recompute(const std::string& name);
const char* name_of(Recompute level);

/// The level for what is recorded while an object of this type lives, on this thread; without one it is none.
class RecomputeScope {
 public:
  explicit RecomputeScope(Recompute level);
  ~RecomputeScope();
  RecomputeScope(const RecomputeScope&) = delete;
  RecomputeScope& operator=(const RecomputeScope&) = delete;

 private:
  Recompute before_;
};
Recompute recompute_level();

/// Things are recorded while an object of this type lives, also inside of NoGrad.
class WithGrad {
 public:
  WithGrad();
  ~WithGrad();
  WithGrad(const WithGrad&) = delete;
  WithGrad& operator=(const WithGrad&) = delete;

 private:
  bool before_;
};

/// How a value is made again, and the value once that was done.
struct Remade {
  std::function<Tensor()> make;
  Tensor value;
  const Tensor& get();
};

/// What a backward function keeps of a variable: its tensor or, of a variable that can be made again, how.
class Kept {
 public:
  Kept() = default;
  explicit Kept(const Variable& variable);
  bool defined() const { return remade_ != nullptr || value_.defined(); }
  /// The tensor. One that is made again is made once for all who keep it, and lives until the last of them is gone.
  const Tensor& get() const;

 private:
  Tensor value_;
  std::shared_ptr<Remade> remade_;
};

/// From light on: whoever keeps `variable` for a backward keeps `make` instead, which gives the same bits. Views of it likewise.
Variable remade(Variable variable, std::function<Tensor()> make);

/// f(inputs), of which only the inputs are kept: the backward runs f once more, with a tape, and walks it.
/// f        gives the same bits when it is called again; parameters that it uses need not be among the inputs, other variables that want a
///          gradient must be
/// returns  the outputs of f; an undefined one stays undefined
std::vector<Variable> recomputed(const std::vector<Variable>& inputs, std::function<std::vector<Variable>(const std::vector<Variable>&)> f);

}  // namespace longhand
