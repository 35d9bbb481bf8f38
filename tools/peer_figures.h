// What others' kernels take and what longhand's are to take, for the tables of `longhand bench`.
#pragma once
#include <string>

namespace longhand {

/// Milliseconds; 0 where there is no figure. The peers' are the best of torch 2.11, mamba_ssm 2.3.2, causal_conv1d 1.6.1 and fla 0.5.2,
/// measured on one H100 80GB HBM3 (copy 3.02 TB/s, bf16 product 694 TFLOP/s) on 2026-11-23: on another device they are a guide only.
struct OpFigures {
  double peer_forward = 0, peer_both = 0, target_forward = 0, target_both = 0;
};
/// shape  as the op's benchmark writes it; all zeros for shapes that have none, and for other types than bf16
OpFigures op_figures(const std::string& op, const std::string& shape);

/// Whole models with rows of 2,048 tokens, on the same card.
struct ModelFigures {
  double peer_tokens_per_s = 0, peer_peak_gib = 0, target_tokens_per_s = 0, target_peak_gib = 0;
};
ModelFigures training_figures(const std::string& model, long batch, long length);
/// Tokens/s of decoding, all rows together; 0: none.
double decode_target(const std::string& model, long batch);

/// "met" or "missed", and the measured over the target; "" where the target is 0.
std::string verdict(double measured, double target, bool less_is_better);

}  // namespace longhand
