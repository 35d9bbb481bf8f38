// One token of a few rows on a GPU: the ops of a layer joined to a few kernels, for decoding. Every weight is read once, while the kernel
// before is still at work; without a tape. Larger batches take the same functions, which then go op by op where that is faster.
#pragma once
#include <limits>

#include "core/tensor.h"

namespace longhand {

/// Rows that the products below read each weight once for, at most; more rows take a matrix product instead, wide products sooner.
constexpr int64_t kTokenStepRows = 32;

/// How far these kernels may be from the ops that they join, relative to the largest entry: sums of a few thousand products in another
/// order, and in bf16 the roundings of a few steps.
constexpr double kTokenStepToleranceF32 = 2e-5, kTokenStepToleranceBf16 = 4.0 / 256;

// --- products, with what stands in front of them ----------------------------------------------------------------

/// out = norm(residual + branch) weight^T, and the window of a convolution may move on.
///   sum[b] = residual[b] + branch[b]        rstd[b] = 1 / sqrt(mean_i sum[b,i]^2 + eps)
///   out[b,r] = rstd[b] * sum_i weight[r,i] * round(norm[i] * sum[b,i])                 rounded to the dtype of weight
struct NormProjection {
  Tensor residual;  // [B, D] f32
  Tensor branch;    // [B, D] dtype of weight, or undefined
  Tensor norm;      // [D] f32
  double eps;
  Tensor weight;                 // [R, D] f32 | bf16, contiguous
  Tensor out;                    // [B, R] dtype of weight, or f32
  Tensor window = {}, now = {};  // as in shift_window(); undefined: nothing to move
};
/// returns sum [B, D] f32; residual itself without a branch
/// errors  ShapeError, DtypeError, DeviceError
Tensor norm_projection(const NormProjection&);

/// out = gated_rmsnorm(y, z) weight^T (gated_rmsnorm.h has the formula), and the window of a convolution moves on.
struct GatedProjection {
  Tensor y, z;  // [B, E] dtype of weight; may be strided
  Tensor norm;  // [E], or [E / groups]: the same for every group; f32; undefined: the gate alone
  double eps;
  int64_t groups;
  bool norm_before_gate;
  Tensor weight;       // [R, E]
  Tensor out;          // [B, R] dtype of weight
  Tensor window, now;  // as in shift_window(); undefined: nothing to move
};
/// errors  ShapeError, DtypeError, DeviceError
void gated_projection(const GatedProjection&);

/// y = silu(causal_conv1d(now)), out = y weight^T. The window stays as it is: gated_projection() moves it on.
struct ConvolvedProjection {
  Tensor now;          // [B, C] dtype of weight; may be strided
  Tensor window;       // [B, W-1, C] dtype of weight
  Tensor conv_weight;  // [C, 1, W] f32
  Tensor conv_bias;    // [C] f32, or undefined
  Tensor weight;       // [R, C]
  Tensor y;            // [B, C] dtype of weight
  Tensor out;          // [B, R] dtype of weight
};
/// errors  ShapeError, DtypeError, DeviceError
void convolved_projection(const ConvolvedProjection&);

/// window[b] = the last W-1 of (window[b], now[b])
void shift_window(const Tensor& window, const Tensor& now);  // [B, W-1, C], [B, C]

// --- one step of a recurrence -----------------------------------------------------------------------------------

/// The middle of a Mamba-1 layer: dt's projection and one step of every channel's scan, skip; selective_scan.h has the formulas. The gate
/// is left to gated_projection().
struct Mamba1Token {
  Tensor x;                       // [B, E]: what the convolution gave
  Tensor selected;                // [B, rank + 2 N] dtype of x: dt's input, B, C
  Tensor dt_weight;               // [E, rank] dtype of x
  Tensor A_log, D_skip, dt_bias;  // f32: [E, N], [E], [E]
  Tensor state;                   // [B, E, N] f32: replaced by the state after the token
  Tensor y;                       // [B, E] dtype of x
};
/// limits  N <= 64 and a multiple of 4; rank <= 320: dt_weight's rows of 64 channels lie in 99 KB of shared memory, which every GPU has
/// errors  ShapeError, DtypeError, DeviceError; ValueError beyond the limits
void mamba1_token(const Mamba1Token&);
bool mamba1_token_fits(int64_t d_state, int64_t rank);

/// The middle of a Mamba-2 layer: convolution, one step of every head's recurrence, skip; causal_conv1d.h and ssd.h have the formulas.
struct Mamba2Token {
  Tensor projected;               // [B, d_inner + C + H], C = d_inner + 2 G N: z, the convolution's inputs, dt
  Tensor conv_weight;             // [C, 1, W] f32
  Tensor conv_bias;               // [C] f32, or undefined
  Tensor window;                  // [B, W-1, C] dtype of projected; read only: shift_window() or gated_projection() moves it on
  Tensor A_log, D_skip, dt_bias;  // f32: [H], [H] or [H, P], [H]
  double dt_min = 0, dt_max = std::numeric_limits<double>::infinity();
  int64_t groups = 1;
  Tensor state;       // [B, H, P, N] f32: replaced by the state after the token
  Tensor y;           // [B, H P] dtype of projected; with the gate f32
  bool gate = false;  // y times silu(z): what a norm behind the gate takes
};
/// limits  N <= 256 and a multiple of 4, P a multiple of 16, W <= 8
/// errors  ShapeError, DtypeError, DeviceError; ValueError beyond the limits
void mamba2_token(const Mamba2Token&);
/// Whether the sizes are within the limits of mamba2_token.
bool mamba2_token_fits(int64_t headdim, int64_t d_state);

/// The middle of a GLA layer: the gates' second projection and one step of every head's recurrence; gla.h has the formulas.
struct GlaToken {
  Tensor q, k;                    // [B, H Dk]; may be strided, all with one stride
  Tensor v;                       // [B, H Dv] dtype of q
  Tensor gate_input;              // [B, rank] dtype of q
  Tensor gate_weight, gate_bias;  // [H Dk, rank] dtype of q, [H Dk] f32
  double gate_normalizer, gate_min, scale;
  Tensor state;  // [B, H, Dk, Dv] f32: replaced by the state after the token
  Tensor y;      // [B, H Dv] dtype of q
};
/// limits  Dk <= 256, Dk rank a multiple of 8 and at most 16,384 (64 KB of shared memory in f32), Dv a multiple of 4
/// errors  ShapeError, DtypeError, DeviceError; ValueError beyond the limits
void gla_token(const GlaToken&);
bool gla_token_fits(int64_t Dk, int64_t Dv, int64_t rank);

/// Whether the kernels take a product of so many rows: shared memory holds what it needs, of few rows beside `floats_ahead` that its blocks
/// keep, and the library's is not faster.
bool few_rows_fit_cuda(const Tensor& weight, int64_t rows, int64_t floats_ahead);
void norm_projection_cuda(const NormProjection&, const Tensor& sum);
void gated_projection_cuda(const GatedProjection&);
void convolved_projection_cuda(const ConvolvedProjection&);
void shift_window_cuda(const Tensor& window, const Tensor& now);
void mamba1_token_cuda(const Mamba1Token&);
void mamba2_token_cuda(const Mamba2Token&);
void gla_token_cuda(const GlaToken&);

}  // namespace longhand
