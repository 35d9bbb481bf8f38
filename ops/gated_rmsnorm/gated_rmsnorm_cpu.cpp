// The reference of gated_rmsnorm in f32 and f64; see gated_rmsnorm.h for the formulas.
#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/common/activations.h"
#include "ops/common/strided_rows.h"
#include "ops/gated_rmsnorm/gated_rmsnorm_kernels.h"

namespace longhand {
namespace {

constexpr int64_t kRowsPerChunk = 64;  // weight gradients are summed chunk by chunk: the same bits for any number of threads

template <class T>
void forward(const GatedRmsnormForward& f) {
  const StridedRows y_rows = strided_rows_of(f.y), z_rows = strided_rows_of(f.z);
  const int64_t E = y_rows.width, group_size = E / f.groups;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < y_rows.count; ++row) {
    const T* y = f.y.data<T>() + y_rows.begin(row);
    const T* z = f.z.data<T>() + z_rows.begin(row);
    T* out = f.out.data<T>() + row * E;
    if (f.form == GatedNorm::norm_first) std::copy(y, y + E, out);
    else
      for (int64_t c = 0; c < E; ++c) out[c] = y[c] * silu(z[c]);
    if (f.form == GatedNorm::gate_only) continue;

    for (int64_t group = 0; group < f.groups; ++group) {  // out holds what is normalised
      T* a = out + group * group_size;
      const T* weight = f.weight.data<T>() + group * group_size;
      T squares = 0;
#pragma omp simd reduction(+ : squares)
      for (int64_t c = 0; c < group_size; ++c) squares += a[c] * a[c];
      const T rstd = T(1) / std::sqrt(squares / static_cast<T>(group_size) + static_cast<T>(f.eps));
      f.rstd.data<T>()[row * f.groups + group] = rstd;
      for (int64_t c = 0; c < group_size; ++c) a[c] = weight[c] * (rstd * a[c]);
    }
    if (f.form == GatedNorm::norm_first)
      for (int64_t c = 0; c < E; ++c) out[c] *= silu(z[c]);
  }
}

template <class T>
void backward(const GatedRmsnormBackward& b) {
  const StridedRows y_rows = strided_rows_of(b.y), z_rows = strided_rows_of(b.z), grad_out_rows = strided_rows_of(b.grad_out),
                    grad_y_rows = strided_rows_of(b.grad_y), grad_z_rows = strided_rows_of(b.grad_z);
  const int64_t E = y_rows.width, group_size = E / b.groups, chunks = (y_rows.count + kRowsPerChunk - 1) / kRowsPerChunk;
  std::vector<T> partials(static_cast<std::size_t>(b.grad_weight ? chunks * E : 0));

#pragma omp parallel for schedule(static)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const auto size = static_cast<std::size_t>(group_size);
    std::vector<T> gate(size), ahat(size), u(size);
    for (int64_t row = chunk * kRowsPerChunk; row < std::min(y_rows.count, (chunk + 1) * kRowsPerChunk); ++row) {
      for (int64_t group = 0; group < b.groups; ++group) {
        const int64_t first = group * group_size;
        const T* y = b.y.data<T>() + y_rows.begin(row) + first;
        const T* z = b.z.data<T>() + z_rows.begin(row) + first;
        const T* grad_out = b.grad_out.data<T>() + grad_out_rows.begin(row) + first;
        T* grad_y = b.grad_y.defined() ? b.grad_y.data<T>() + grad_y_rows.begin(row) + first : nullptr;
        T* grad_z = b.grad_z.defined() ? b.grad_z.data<T>() + grad_z_rows.begin(row) + first : nullptr;
        T* out = b.out ? b.out.data<T>() + row * E + first : nullptr;
        T* grad_weight = b.grad_weight ? partials.data() + chunk * E + first : nullptr;
        const auto n = static_cast<int64_t>(size);

        if (b.form == GatedNorm::gate_only) {
          if (grad_y != nullptr)
            for (int64_t c = 0; c < n; ++c) grad_y[c] = grad_out[c] * silu(z[c]);
          if (grad_z != nullptr)
            for (int64_t c = 0; c < n; ++c) grad_z[c] = grad_out[c] * y[c] * silu_slope(z[c]);
          if (out != nullptr)
            for (int64_t c = 0; c < n; ++c) out[c] = y[c] * silu(z[c]);
          continue;
        }

        const bool gate_first = b.form == GatedNorm::gate_first;
        const T* weight = b.weight.data<T>() + first;
        const T rstd = b.rstd.data<T>()[row * b.groups + group];
        T *g = gate.data(), *a = ahat.data(), *v = u.data();
        for (int64_t c = 0; c < n; ++c) g[c] = silu(z[c]);
        for (int64_t c = 0; c < n; ++c) a[c] = rstd * (gate_first ? y[c] * g[c] : y[c]);
        for (int64_t c = 0; c < n; ++c) v[c] = weight[c] * (gate_first ? grad_out[c] : grad_out[c] * g[c]);
        if (out != nullptr)
          for (int64_t c = 0; c < n; ++c) out[c] = weight[c] * a[c] * (gate_first ? T(1) : g[c]);
        T dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t c = 0; c < n; ++c) dot += a[c] * v[c];
        const T mean = dot / static_cast<T>(group_size);
        if (grad_weight != nullptr)
          for (int64_t c = 0; c < n; ++c) grad_weight[c] += grad_out[c] * (gate_first ? a[c] : a[c] * g[c]);
        if (grad_y != nullptr)
          for (int64_t c = 0; c < n; ++c) grad_y[c] = rstd * (v[c] - a[c] * mean) * (gate_first ? g[c] : T(1));
        if (grad_z != nullptr)
          for (int64_t c = 0; c < n; ++c)
            grad_z[c] = silu_slope(z[c]) * (gate_first ? rstd * (v[c] - a[c] * mean) * y[c] : grad_out[c] * weight[c] * a[c]);
      }
    }
  }

  if (!b.grad_weight) return;
  T* grad_weight = b.grad_weight->destination.data<T>();
  for (int64_t c = 0; c < E; ++c) {
    T sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partials[static_cast<std::size_t>(chunk * E + c)];
    grad_weight[c] = b.grad_weight->beta == 0 ? sum : static_cast<T>(b.grad_weight->beta) * grad_weight[c] + sum;
  }
}

}  // namespace

void gated_rmsnorm_fwd_cpu(const GatedRmsnormForward& f) {
  f.y.dtype() == Dtype::f64 ? forward<double>(f) : forward<float>(f);
}
void gated_rmsnorm_bwd_cpu(const GatedRmsnormBackward& b) {
  b.y.dtype() == Dtype::f64 ? backward<double>(b) : backward<float>(b);
}

}  // namespace longhand
