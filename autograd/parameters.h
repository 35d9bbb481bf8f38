// ParameterSet: all parameters of a model in flat buffers, so that clipping, AdamW, accumulation and reduction over processes are each one
// pass over contiguous memory.
//
//   master   f32 (f64 for gradient checks): what the optimizer changes and checkpoints hold
//   grad     like master: the sum of gradients; every parameter's Variable adds into its own slice. Made when it is first needed: a
//            model that is only run holds none
//   compute  only when the compute type is bf16: the copy that products read; the others read the master itself
#pragma once
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "autograd/variable.h"

namespace longhand {

/// Value of element `index` (row-major) of a parameter, from a key that belongs to this parameter alone.
using Initializer = std::function<double(uint64_t key, uint64_t index)>;

Initializer init_constant(double value);
Initializer init_uniform(double low, double high);
Initializer init_normal(double standard_deviation);

struct ParameterOptions {
  Initializer init;
  bool decay = true;            // takes weight decay
  bool full_precision = false;  // used in the master's type even when the compute type is bf16
};

struct Parameter {
  std::string name;
  Shape shape;
  ParameterOptions options;
  Tensor master;      // a view of the flat buffer, after allocate()
  Tensor grad;        // likewise, after allocate_grads() or the first backward; undefined before
  Variable variable;  // what ops take: the compute copy where there is one, else the master
};

/// Neighbouring matrices of one width as the one matrix that they are in the flat buffers: [R1 + R2 + .., width]. One product with it does
/// what a product with each would do.
struct JoinedParameters {
  std::vector<Parameter*> parts;
  Variable variable;  // after allocate(); undefined where the parts do not lie one behind the other
};

class ParameterSet {
 public:
  ParameterSet() = default;
  ParameterSet(ParameterSet&&) = default;
  ParameterSet& operator=(ParameterSet&&) = delete;  // variables of the set that is replaced would ask for its gradients
  ~ParameterSet();

  /// Announces a parameter; the pointer stays valid. Names are unique.
  Parameter* declare(std::string name, Shape shape, ParameterOptions options);

  /// Announces that parameters are also used together; the pointer stays valid. They lie one behind the other where they were declared one
  /// after the other and each has a multiple of 64 elements. In one step either the parts or the whole take part, never both.
  JoinedParameters* join(std::vector<Parameter*> parts);

  /// Lays out the flat buffers, all but the gradients: decayed parameters before the others, those of full precision where the two meet;
  /// each begins at a multiple of 64 elements, gaps are zero. master_dtype f32, or f64 for gradient checks; compute_dtype bf16, or the same
  void allocate(const Device& device, Dtype master_dtype, Dtype compute_dtype);

  /// Every parameter from its initializer, keyed by (seed, name): the same values on any device and in any order of declaration.
  void initialize(uint64_t seed);

  /// Writes the compute copies from the masters; after loading or changing masters other than through the optimizer.
  void refresh_compute();

  /// Makes the gradients' buffer, if it is not there: an optimizer does so at once, so that a lack of memory shows before the first step;
  /// otherwise the first backward does. Zeros at first.
  void allocate_grads() const;

  /// Forgets the gradients: the next contribution to each parameter overwrites.
  void clear_grads();

  /// After backward: zeroes the gradient of every parameter that no contribution reached, so that flat_grad() is whole.
  void complete_grads();

  std::deque<Parameter>& all() { return parameters_; }
  const std::deque<Parameter>& all() const { return parameters_; }
  const Parameter* find(const std::string& name) const;  // null when absent
  int64_t count() const;                                 // elements of all parameters, without gaps

  const Tensor& flat_master() const { return master_; }    // [n]
  const Tensor& flat_grad() const;                         // [n]; made by this call where it was not yet
  const Tensor& flat_compute() const { return compute_; }  // [n] bf16; undefined when the compute type is the master's
  int64_t decayed_elements() const { return decayed_; }    // flat elements [0, decayed) take weight decay
  const Device& device() const { return master_.device(); }
  Dtype compute_dtype() const { return compute_dtype_; }

 private:
  // Shared with the parameters' variables, which ask for it when a gradient arrives; a set may move, its parameters stay where they are.
  struct FlatGrad {
    Tensor flat;
    Tensor master;  // whose layout the gradients have
    std::vector<Parameter*> parameters;
    void make();
  };
  std::deque<Parameter> parameters_;
  std::deque<JoinedParameters> joined_;
  Tensor master_, compute_;
  std::shared_ptr<FlatGrad> grad_;
  int64_t decayed_ = 0;
  Dtype compute_dtype_ = Dtype::f32;
};

}  // namespace longhand
