// The arithmetic of noise and of its statistics for one row or one element, the same on every device. For row_kernels_*.{cpp,cu} only.
#pragma once
#include <cmath>

#include "core/philox.h"

namespace longhand {

/// Elements 4 * quad .. 4 * quad + 3 of the sequence that philox_normal(key, index) draws one by one: a block of Philox gives four.
LONGHAND_HOST_DEVICE inline void philox_normals(uint64_t key, uint64_t quad, float normal[4]) {
  const PhiloxBlock r = philox(key, quad, 1);
  box_muller(r.word[0], r.word[1], normal[0], normal[1]);
  box_muller(r.word[2], r.word[3], normal[2], normal[3]);
}

/// Count, mean and sum of squared deviations from the mean of some elements; stored in this order.
struct Moments {
  double count = 0, mean = 0, m2 = 0;
};

/// Those of both together.
///   n = n_a + n_b    mean = mean_a + (mean_b - mean_a) n_b / n    m2 = m2_a + m2_b + (mean_b - mean_a)^2 n_a n_b / n
/// source  Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", Eq. 1.5
LONGHAND_HOST_DEVICE inline Moments merged(const Moments& a, const Moments& b) {
  if (b.count == 0) return a;
  if (a.count == 0) return b;
  const double count = a.count + b.count, apart = b.mean - a.mean;
  return {count, a.mean + apart * (b.count / count), a.m2 + b.m2 + apart * apart * (a.count * (b.count / count))};
}

/// Those of a row's elements, or nothing when one of them is not finite: such a row is not counted.
LONGHAND_HOST_DEVICE inline Moments counted(double count, double mean, double m2) {
  return std::isfinite(m2) ? Moments{count, mean, m2} : Moments{};
}

/// Mean and standard deviation to draw with; zeros, which draw zeros, where nothing was counted.
LONGHAND_HOST_DEVICE inline void normal_of(const Moments& moments, float& mean, float& deviation) {
  mean = moments.count > 0 ? static_cast<float>(moments.mean) : 0.0f;
  deviation = moments.count > 0 ? static_cast<float>(std::sqrt(moments.m2 / moments.count)) : 0.0f;
}

}  // namespace longhand
