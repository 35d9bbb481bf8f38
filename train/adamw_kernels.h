// The two passes of AdamW on each device; for adamw.cpp only.
#pragma once
#include <span>

#include "train/adamw.h"

namespace longhand {

/// Everything a step works on; flat tensors of equal length.
struct AdamWBuffers {
  Tensor master, grad, compute;  // compute is undefined when the masters are used directly
  Tensor first, second;
  Tensor control;   // [kControlSize] f64
  Tensor partials;  // [adamw_partials(n)] f64
};

/// How many partial sums of squares the norm of n elements is made of.
int64_t adamw_partials_cpu(int64_t n);
int64_t adamw_partials_cuda(int64_t n);

void adamw_step_cpu(const AdamWBuffers& buffers, const AdamWRule& rule, std::span<const DecaySegment> segments, const Tensor& loss);
void adamw_step_cuda(const AdamWBuffers& buffers, const AdamWRule& rule, std::span<const DecaySegment> segments, const Tensor& loss);

void adamw_set_rates_cpu(const Tensor& control, double lr, double weight_decay);
void adamw_set_rates_cuda(const Tensor& control, double lr, double weight_decay);

}  // namespace longhand
