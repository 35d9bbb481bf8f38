// LanguageModel: embedding, a stack of pre-norm residual layers, final norm, head. A function of tokens and of a state that returns a
// state:
//   R = E[tokens];  for each sublayer: R = R + mixer(norm(R));  hidden = norm_f(R);  logits = hidden head^T
// The residual stream R is f32 (f64 in gradient checks) whatever the compute type.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "autograd/parameters.h"
#include "models/model_config.h"
#include "models/model_family.h"
#include "models/recompute_plan.h"
#include "models/recurrent_state.h"

namespace longhand {

/// What a loss is computed from, on the model's device.
struct TokenBatch {
  Tensor tokens;   // [B, T] i32
  Tensor targets;  // [B, T] i32
  Tensor mask;     // [B, T] f32, or undefined: every position counts
};

class LanguageModel {
 public:
  /// Declares and allocates every parameter; values are unset until initialize() or loading.
  /// compute_dtype  f32, bf16 (GPU), f64 (with master_dtype f64, for gradient checks on the CPU)
  LanguageModel(ModelConfig config, const Device& device, Dtype compute_dtype, Dtype master_dtype = Dtype::f32);

  /// The same model without memory for its parameters: shapes, counts and FLOPs can be asked, nothing can be computed.
  static LanguageModel plan(ModelConfig config) { return LanguageModel(std::move(config)); }

  const ModelConfig& config() const { return config_; }
  const Device& device() const { return device_; }
  Dtype compute_dtype() const { return parameters_.compute_dtype(); }
  ParameterSet& parameters() { return parameters_; }
  const ParameterSet& parameters() const { return parameters_; }
  void initialize(uint64_t seed) { parameters_.initialize(seed); }

  /// How much of each layer's forward is made again in the backward instead of being kept; the bits are the same. Nothing at first.
  /// errors  ValueError unless the plan has a level for every layer
  void set_recompute(RecomputePlan plan);

  RecurrentState zero_state(int64_t rows) const;

  struct Forward {
    Variable hidden;       // [B, T, d_model] after the final norm, compute type
    RecurrentState state;  // after the last token
  };
  /// tokens   [B, T] i32 on the model's device
  /// h0       B rows, or absent for zeros
  /// holds    forward of [0, s), then of [s, T) from that state, equals forward of [0, T) for every s
  Forward forward(const Tensor& tokens, const RecurrentState& h0 = {}) const;

  /// Whether step() is offered for as many rows on this model's device.
  bool has_step(int64_t rows) const;
  /// forward() and logits() of one token a row in few kernels, on a GPU without a tape.
  /// tokens   [B, 1] i32
  /// state    of B rows; changed in place
  /// returns  [B, padded vocabulary] f32
  /// holds    what forward() and logits() give, up to the roundings that ops/token_step/token_step.h names
  Tensor step(const Tensor& tokens, const RecurrentState& state) const;

  /// logits = hidden head^T
  /// hidden   [.., d_model]             compute type
  /// returns  [.., padded vocabulary]   f32 (f64), also of a bf16 model: rounded to 8 bits, near tokens would tie
  /// Without a gradient: training takes loss(). Use the last positions only where possible, whole logits are large.
  Tensor logits(const Tensor& hidden) const;

  /// -log softmax(logits)[target] at every position, in nats; the logits never exist as a whole.
  /// hidden   [.., d_model]   compute type
  /// targets  [..] i32        in [0, padded vocabulary)
  /// returns  [..] f32 (f64), without a gradient
  Tensor token_loss(const Tensor& hidden, const Tensor& targets) const;

  struct Loss {
    Variable loss;         // scalar: mean of -log softmax(logits)[target] over the positions that count, times loss_scale
    Tensor token_loss;     // [B, T] f32 (f64), nats; no gradient
    RecurrentState state;  // after the last token, still attached to the tape
  };
  /// The logits never exist as a whole. loss_scale multiplies loss and gradients (1 / micro-batches for accumulation).
  Loss loss(const TokenBatch& batch, const RecurrentState& h0 = {}, double loss_scale = 1.0) const;

  double forward_flops_per_token() const;                                            // with the head
  double training_flops_per_token() const { return 3 * forward_flops_per_token(); }  // backward counts twice
  int64_t parameter_count() const { return parameters_.count(); }
  int64_t non_embedding_parameter_count() const;

 private:
  explicit LanguageModel(ModelConfig config);                                                   // declares the parameters
  Dtype wide_dtype() const { return compute_dtype() == Dtype::f64 ? Dtype::f64 : Dtype::f32; }  // of the residual stream and the logits
  ModelConfig config_;
  const ModelFamily* family_;
  Device device_ = Device::cpu();
  RecomputePlan recompute_;
  ParameterSet parameters_;
  Parameter* embedding_ = nullptr;
  Parameter* head_ = nullptr;  // the embedding itself when tied
  Parameter* final_norm_ = nullptr;
  std::vector<std::vector<Sublayer>> layers_;
};

}  // namespace longhand
