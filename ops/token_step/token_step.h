// One token of a few rows on a GPU: the ops of a layer joined to a few kernels, for decoding. Every weight is read once, while the kernel
// before is still at work; without a tape.
#pragma once
#include <limits>

#include "core/tensor.h"

namespace longhand {

/// Rows that the products below read each weight once for; larger batches take matrix products instead.
constexpr int64_t kTokenStepRows = 8;

/// How far these kernels may be from the ops that they join, relative to the largest entry: sums of a few thousand products in another
/// order, and in bf16 the roundings of a few steps.
constexpr double kTokenStepToleranceF32 = 2e-5, kTokenStepToleranceBf16 = 4.0 / 256;

/// out = norm(residual + branch) weight^T, and the sum itself.
///   sum[b] = residual[b] + branch[b]        rstd[b] = 1 / sqrt(mean_i sum[b,i]^2 + eps)
///   out[b,r] = sum_i weight[r,i] * round(norm[i] * rstd[b] * sum[b,i])                     rounded to the dtype of weight, as add_rmsnorm
///   does
struct NormProjection {
  Tensor residual;  // [B, D] f32, B <= kTokenStepRows
  Tensor branch;    // [B, D] dtype of weight, or undefined
  Tensor norm;      // [D] f32
  double eps;
  Tensor weight;  // [R, D] f32 | bf16, contiguous
  Tensor sum;     // [B, D] f32; another tensor than residual
  Tensor out;     // [B, R] dtype of weight, or f32
};
/// errors  ShapeError, DtypeError, DeviceError
void norm_projection(const NormProjection&);

/// The middle of a Mamba-2 layer: convolution, one step of every head's recurrence, skip; causal_conv1d.h and ssd.h have the formulas.
struct Mamba2Token {
  Tensor projected;               // [B, d_inner + C + H], C = d_inner + 2 G N: z, the convolution's inputs, dt
  Tensor conv_weight;             // [C, 1, W] f32
  Tensor conv_bias;               // [C] f32, or undefined
  Tensor window;                  // [B, W-1, C] dtype of projected; read only: shift_window() or gated_projection() moves it on
  Tensor A_log, D_skip, dt_bias;  // f32: [H], [H] or [H, P], [H]
  double dt_min = 0, dt_max = std::numeric_limits<double>::infinity();
  int64_t groups = 1;
  Tensor state;  // [B, H, P, N] f32: replaced by the state after the token
  Tensor y;      // [B, H P] dtype of projected
};
/// limits  N <= 256 and a multiple of 4, P a multiple of 16, W <= 8
/// errors  ShapeError, DtypeError, DeviceError; ValueError beyond the limits
void mamba2_token(const Mamba2Token&);
/// Whether the sizes are within the limits of mamba2_token.
bool mamba2_token_fits(int64_t headdim, int64_t d_state);

/// window[b] = the last W-1 of (window[b], now[b])
void shift_window(const Tensor& window, const Tensor& now);  // [B, W-1, C], [B, C]

/// out = gated_rmsnorm(y, z) weight^T (gated_rmsnorm.h has the formula), and the window of the convolution moves on.
struct GatedProjection {
  Tensor y, z;  // [B, E] dtype of weight; z may be strided
  Tensor norm;  // [E] f32; undefined: the gate alone
  double eps;
  int64_t groups;
  bool norm_before_gate;
  Tensor weight;       // [R, E]
  Tensor out;          // [B, R] dtype of weight
  Tensor window, now;  // as in shift_window(); undefined: nothing to move
};
/// errors  ShapeError, DtypeError, DeviceError
void gated_projection(const GatedProjection&);

void norm_projection_cuda(const NormProjection&);
void mamba2_token_cuda(const Mamba2Token&);
void shift_window_cuda(const Tensor& window, const Tensor& now);
void gated_projection_cuda(const GatedProjection&);

}  // namespace longhand
