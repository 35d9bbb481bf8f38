// The two passes of AdamW on each device; for adamw.cpp only.
#pragma once
#include <span>

#include "train/adamw.h"

namespace longhand {

/// Everything a step works on. The flat tensors are of equal length; moments are those of the own parts.
struct AdamWBuffers {
  Tensor master, grad, compute;  // compute is undefined when the masters are used directly
  Tensor first, second;
  Tensor control;   // [kControlSize] f64
  Tensor partials;  // [sum of adamw_partials() over the own parts] f64
};

/// How many partial sums of squares the norm of a part of n elements is made of.
int64_t adamw_partials_cpu(int64_t n);
int64_t adamw_partials_cuda(int64_t n);

/// The two sums of the control block: of the loss, and of the squares of the own gradients.
void adamw_sums_cpu(const AdamWBuffers& buffers, std::span<const Part> own, const Tensor& loss);
void adamw_sums_cuda(const AdamWBuffers& buffers, std::span<const Part> own, const Tensor& loss);

/// What the sums decide, then the update of the own parts.
void adamw_update_cpu(const AdamWBuffers& buffers, const AdamWRule& rule, std::span<const AdamWPiece> pieces);
void adamw_update_cuda(const AdamWBuffers& buffers, const AdamWRule& rule, std::span<const AdamWPiece> pieces);

void adamw_set_rates_cpu(const Tensor& control, double lr, double weight_decay);
void adamw_set_rates_cuda(const Tensor& control, double lr, double weight_decay);

}  // namespace longhand
