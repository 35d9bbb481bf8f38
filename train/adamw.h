// AdamW with clipping by the global norm, over the flat buffers of a ParameterSet: two passes over contiguous memory.
#pragma once
#include <array>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "autograd/parameters.h"
#include "core/safetensors_parts.h"
#include "train/adamw_rule.h"
#include "train/part.h"

namespace longhand {

struct AdamWOptions {
  AdamWRule rule;
  std::set<std::string> no_decay;  // parameters without weight decay beside those declared so
};

/// What the optimizer says about its last step.
struct StepReport {
  double loss = 0;
  double grad_norm = 0;          // before clipping
  int64_t updates = 0;           // steps that changed the parameters, over the whole run
  int64_t skipped = 0;           // steps left out because loss or grad_norm was not finite, over the whole run
  int64_t skipped_in_a_row = 0;  // 0: the last step was applied
};

/// A range of the flat buffers.
struct DecaySegment {
  int64_t begin, end;
  bool decays;
};

/// What one pass of the update goes over: a range of the flat buffers, and where its moments begin.
struct AdamWPiece {
  int64_t begin, end;
  bool decays;
  int64_t moments;
};

/// One step, with g the summed gradient of all micro-batches and t the number of applied steps:
///   grad_norm = sqrt(sum g^2)        g <- g * min(1, clip / grad_norm)
///   m <- beta1 m + (1 - beta1) g     v <- beta2 v + (1 - beta2) g^2
///   w <- w - lr * weight_decay * w - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
/// Moments are kept in the masters' dtype; where there is a compute copy it is written in the same pass, rounded to nearest. If the loss or
/// grad_norm is not finite, nothing changes but the counts of skipped steps. Everything that changes from step to step is read from device
/// memory, so the launches of step() are the same every time.
/// holds    the sum has a fixed order: the same gradients give the same bits, on any number of threads
/// errors   DtypeError for f64 masters on a GPU
/// source   Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2 (decay scaled by the learning rate); clipping: Pascanu et al. 2013
///
/// Several optimizers can share a set's copies, each with its own parts of the flat buffers: it keeps moments of those alone, and changes
/// no weight elsewhere.
class AdamW {
 public:
  /// own  parts of the flat buffers, ascending, at multiples of 4 elements; none: all of them
  AdamW(ParameterSet& parameters, AdamWOptions options, std::vector<Part> own = {});

  /// For the next step(); takes effect in the order of the device's work.
  void set_rates(double lr, double weight_decay);

  /// Uses the own parts of flat_grad(), which must be whole: see ParameterSet::complete_grads().
  /// loss      scalar f32 (f64) on the parameters' device: only looked at for being finite, and copied into the report
  /// sum_over  of those that share the work: replaces each of a few f64 numbers on the device by the sum of everybody's
  void step(const Tensor& loss, const std::function<void(const Tensor&)>& sum_over = {});

  /// [1] f64 of control(): how many steps in a row were left out, up to the last one.
  Tensor left_out() const;
  /// Of the last step, on the device: kControlSize f64 numbers; report_of() gives them names.
  const Tensor& control() const { return control_; }
  static StepReport report_of(const std::vector<double>& control);
  StepReport report() const { return report_of(control_.to_vector<double>()); }  // waits for the device

  /// "first_moment.<name>", "second_moment.<name>" and "counts", of an optimizer whose own parts are all there is.
  std::map<std::string, Tensor> save() const;
  /// The same tensors as far as they are its own: what several write into one file. The counts, which all have, are part of `with_counts`.
  std::map<std::string, TensorParts> save_own(bool with_counts) const;
  /// Takes the own parts of what all have saved together. errors  FileError naming a tensor that is missing or of another shape
  void load(const std::map<std::string, Tensor>& stored);

  const std::vector<DecaySegment>& segments() const { return segments_; }

  /// The parameters without weight decay, layers grouped: "backbone.layers.*.mixer.A_log  12 x [16]".
  std::vector<std::string> describe_no_decay() const;

 private:
  // Calls f(first element within the parameter, its moments) for every range of a parameter that is this optimizer's own.
  template <class F>
  void for_each_own(const Tensor& moments, const Parameter& p, F&& f) const;
  bool decays(const Parameter& p) const;

  ParameterSet& parameters_;
  AdamWOptions options_;
  std::vector<DecaySegment> segments_;
  std::vector<Part> own_;
  std::vector<AdamWPiece> pieces_;  // segments_ as far as they are its own
  Tensor first_, second_;           // moments of the own parts, one after the other
  Tensor control_;                  // [kControlSize] f64
  Tensor partials_;                 // partial sums of squares, f64
};

}  // namespace longhand
