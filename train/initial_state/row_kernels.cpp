// The loops on a CPU, and the choice of the device; see row_kernels.h.
#include "train/initial_state/row_kernels.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "models/recurrent_state.h"
#include "train/initial_state/noise_rule.h"

namespace longhand {

// row_kernels_cuda.cu
void clear_rows_cuda(const Tensor& t, const Tensor& marks, const Tensor& all);
void draw_normals_cuda(const Tensor& t, const Tensor& keys, uint64_t tag, const Tensor& normals, const StateGroups& groups);
void row_moments_cuda(const Tensor& t, const StateGroups& groups, const Tensor& moments, int64_t first);
void merge_rows_cuda(const Tensor& running, const Tensor& moments);
void refresh_normals_cuda(const Tensor& running, const Tensor& normals, double decay);

namespace {

void clear_rows_cpu(const Tensor& t, const Tensor& marks, const Tensor& all) {
  const bool every = all.defined() && *all.data<double>() > 0;
  const auto row_bytes = static_cast<std::size_t>(t.numel() / t.dim(0) * size_of(t.dtype()));
  for (int64_t b = 0; b < t.dim(0); ++b)
    if (every || marks.data<int64_t>()[b] == 0)
      std::memset(static_cast<char*>(t.raw()) + static_cast<std::size_t>(b) * row_bytes, 0, row_bytes);
}

// Calls f with a pointer to the elements.
template <class F>
void visit_elements(const char* op, const Tensor& t, F&& f) {
  if (t.dtype() == Dtype::f32) return f(t.data<float>());
  if (t.dtype() == Dtype::bf16) return f(t.data<bf16>());
  if (t.dtype() == Dtype::f64) return f(t.data<double>());
  throw DtypeError(std::string(op) + ": takes f32, bf16 or f64", {{"tensor", t.describe()}});
}

void draw_normals_cpu(const Tensor& t, const Tensor& keys, uint64_t tag, const Tensor& normals, const StateGroups& groups) {
  visit_elements("draw_normals", t, [&](auto* out) {
    using T = std::remove_pointer_t<decltype(out)>;
    const int64_t rows = t.dim(0), width = t.numel() / rows, quads = (width + 3) / 4;
    const float* normal = normals.data<float>();
    std::vector<uint64_t> tensor_keys;
    for (int64_t b = 0; b < rows; ++b) tensor_keys.push_back(philox_key(static_cast<uint64_t>(keys.data<int64_t>()[b]), tag));
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t b = 0; b < rows; ++b) {
      for (int64_t quad = 0; quad < quads; ++quad) {
        float n[4] = {};
        const bool drawn = keys.data<int64_t>()[b] != 0;
        if (drawn) philox_normals(tensor_keys[static_cast<std::size_t>(b)], static_cast<uint64_t>(quad), n);
        for (int64_t e = 4 * quad; e < std::min(width, 4 * quad + 4); ++e) {
          const int64_t g = e / groups.inner % groups.count;
          out[b * width + e] = static_cast<T>(drawn ? normal[2 * g] + normal[2 * g + 1] * n[e % 4] : 0.0f);
        }
      }
    }
  });
}

void row_moments_cpu(const Tensor& t, const StateGroups& groups, const Tensor& moments, int64_t first) {
  visit_elements("row_moments", t, [&](const auto* elements) {
    const int64_t rows = t.dim(0), width = t.numel() / rows, period = groups.inner * groups.count, all = moments.dim(1);
    const auto count = static_cast<double>(width / groups.count);
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t b = 0; b < rows; ++b) {
      for (int64_t g = 0; g < groups.count; ++g) {
        auto for_each = [&](auto&& f) {
          for (int64_t begin = b * width + g * groups.inner; begin < (b + 1) * width; begin += period)
            for (int64_t e = begin; e < begin + groups.inner; ++e) f(static_cast<double>(elements[e]));
        };
        double sum = 0, m2 = 0;
        for_each([&](double v) { sum += v; });
        const double mean = sum / count;
        for_each([&](double v) { m2 += (v - mean) * (v - mean); });
        const Moments found = counted(count, mean, m2);
        double* out = moments.data<double>() + (b * all + first + g) * 3;
        out[0] = found.count, out[1] = found.mean, out[2] = found.m2;
      }
    }
  });
}

void merge_rows_cpu(const Tensor& running, const Tensor& moments) {
  const int64_t rows = moments.dim(0), groups = moments.dim(1);
  for (int64_t g = 0; g < groups; ++g) {
    double* sum = running.data<double>() + 3 * g;
    Moments all{sum[0], sum[1], sum[2]};
    for (int64_t b = 0; b < rows; ++b) {
      const double* row = moments.data<double>() + (b * groups + g) * 3;
      all = merged(all, {row[0], row[1], row[2]});
    }
    sum[0] = all.count, sum[1] = all.mean, sum[2] = all.m2;
  }
}

void refresh_normals_cpu(const Tensor& running, const Tensor& normals, double decay) {
  for (int64_t g = 0; g < running.dim(0); ++g) {
    double* sum = running.data<double>() + 3 * g;
    float* normal = normals.data<float>() + 2 * g;
    normal_of({sum[0], sum[1], sum[2]}, normal[0], normal[1]);
    sum[0] *= decay, sum[2] *= decay;
  }
}

}  // namespace

StateGroups state_groups(const std::string& name, const Shape& shape, bool by_channel) {
  const int64_t row = shape.numel() / std::max<int64_t>(shape[0], 1);
  if (shape.rank() == 4) return {shape[1], shape[2] * shape[3]};
  if (!by_channel) return {1, row};
  if (is_conv_window(name)) return {shape[shape.rank() - 1], 1};
  return {shape[1], row / shape[1]};
}

void clear_rows(const Tensor& t, const Tensor& marks, const Tensor& all) {
  const bool fits = marks.dtype() == Dtype::i64 && marks.numel() == t.dim(0) && t.is_contiguous();
  if (!fits || (all.defined() && (all.dtype() != Dtype::f64 || all.numel() != 1)))
    throw ShapeError("clear_rows: a contiguous tensor, a mark a row and one f64 for all are needed",
                     {{"marks", marks.describe()}, {"tensor", t.describe()}, {"all", all.defined() ? all.describe() : "undefined"}});
  if (t.numel() > 0) on_device(t.device(), &clear_rows_cpu, LONGHAND_CUDA_IMPL(clear_rows_cuda))(t, marks, all);
}

void draw_normals(const Tensor& t, const Tensor& keys, uint64_t tag, const Tensor& normals, const StateGroups& groups) {
  if (keys.dtype() != Dtype::i64 || keys.numel() != t.dim(0) || normals.dtype() != Dtype::f32 ||
      !(normals.shape() == Shape{groups.count, 2}) || !t.is_contiguous())
    throw ShapeError("draw_normals: a contiguous tensor, a key a row and a mean and deviation a group are needed",
                     {{"tensor", t.describe()}, {"keys", keys.describe()}, {"normals", normals.describe()}});
  if (t.numel() > 0) on_device(t.device(), &draw_normals_cpu, LONGHAND_CUDA_IMPL(draw_normals_cuda))(t, keys, tag, normals, groups);
}

void row_moments(const Tensor& t, const StateGroups& groups, const Tensor& moments, int64_t first) {
  const bool fits = moments.rank() == 3 && moments.dtype() == Dtype::f64 && moments.dim(0) == t.dim(0) && moments.dim(2) == 3 &&
                    first >= 0 && first + groups.count <= moments.dim(1);
  if (!fits)
    throw ShapeError("row_moments: [rows, groups, 3] f64 is needed",
                     {{"moments", moments.describe()}, {"tensor", t.describe()}, {"first group", std::to_string(first)}});
  if (t.numel() > 0) on_device(t.device(), &row_moments_cpu, LONGHAND_CUDA_IMPL(row_moments_cuda))(t.contiguous(), groups, moments, first);
}

void merge_rows(const Tensor& running, const Tensor& moments) {
  if (running.numel() > 0) on_device(running.device(), &merge_rows_cpu, LONGHAND_CUDA_IMPL(merge_rows_cuda))(running, moments);
}

void refresh_normals(const Tensor& running, const Tensor& normals, double decay) {
  if (running.numel() > 0)
    on_device(running.device(), &refresh_normals_cpu, LONGHAND_CUDA_IMPL(refresh_normals_cuda))(running, normals, decay);
}

}  // namespace longhand
