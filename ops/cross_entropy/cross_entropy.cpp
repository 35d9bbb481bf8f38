// linear_cross_entropy: the loop over row chunks, the same for every device, and the node.
#include "ops/cross_entropy/cross_entropy.h"

#include <algorithm>

#include "autograd/tape.h"
#include "core/error.h"
#include "core/op_scope.h"
#include "core/switches.h"
#include "ops/common/gemm.h"
#include "ops/common/token_ids.h"
#include "ops/cross_entropy/cross_entropy_kernels.h"

namespace longhand {
namespace {

// How much memory the logits of a chunk may take. Large chunks spare passes over grad_weight, which every chunk adds to.
constexpr int64_t kLogitsBytesCpu = int64_t{64} << 20;
constexpr int64_t kLogitsBytesGpu = int64_t{544} << 20;    // 5632 rows of 50304 in bf16
constexpr int64_t kRowsInCache = 8192;                     // whose x a GPU's cache holds; where no memory for logits sets a limit
constexpr int64_t kRowMultiple = 128, kTileColumns = 256;  // the tile of the matrix products
constexpr int64_t kTilesAtOnce = 132;                      // on an H100 or H200: one an SM
constexpr int64_t kRowAlignment = 128;                     // bytes: one memory transaction
constexpr int64_t kPackBytes = 16;                         // of a GPU; cuBLASLt takes four times as long for columns that do not fill packs

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

/// The first `vocab` rows of the weight, and zeros behind them up to `columns`.
Tensor head_of(const Tensor& weight, int64_t vocab, int64_t columns) {
  const Tensor valid = weight.slice(0, 0, vocab);
  if (columns == vocab) return valid;
  const Tensor head = Tensor::empty(weight.device(), weight.dtype(), {columns, weight.dim(1)});
  copy(head.slice(0, 0, vocab), valid);
  fill(head.slice(0, vocab, columns), 0);
  return head;
}

/// Chunks of about equal size that fit the budget; on a GPU in as many rows as fill it with tiles of grad_x once, or some times over.
int64_t choose_chunk_rows(int64_t rows, int64_t row_bytes, int64_t width, bool gpu) {
  int64_t tiles = std::max<int64_t>(1, (gpu ? kLogitsBytesGpu : kLogitsBytesCpu) / row_bytes / kRowMultiple);
  if (gpu) {
    const int64_t at_once = std::max<int64_t>(1, kTilesAtOnce / std::max<int64_t>(1, (width + kTileColumns - 1) / kTileColumns));
    if (tiles > at_once) tiles -= tiles % at_once;
  }
  const int64_t most = tiles * kRowMultiple, chunks = std::max<int64_t>(1, (rows + most - 1) / most);
  return std::min(most, round_up((rows + chunks - 1) / chunks, kRowMultiple));
}

void require_same_leading_shape(const char* name, const Tensor& t, const Tensor& x) {
  bool same = t.rank() == x.rank() - 1;
  for (int axis = 0; same && axis < t.rank(); ++axis) same = t.dim(axis) == x.dim(axis);
  if (!same)
    throw ShapeError(std::string("cross_entropy: ") + name + " must have the shape of x without its last axis",
                     {{name, t.describe()}, {"x", x.describe()}});
  if (!(t.device() == x.device()))
    throw DeviceError(std::string("cross_entropy: ") + name + " and x are on different devices",
                      {{name, t.describe()}, {"x", x.describe()}});
}

void require_cross_entropy_args(const Tensor& x, const Tensor& weight, const Tensor& targets, const Tensor& mask,
                                const CrossEntropyOptions& options) {
  if (x.rank() < 1 || weight.rank() != 2 || weight.dim(1) != x.dim(-1) || weight.dim(0) == 0)
    throw ShapeError("cross_entropy: weight does not fit the last axis of x",
                     {{"x", x.describe()}, {"weight", weight.describe()}, {"expected", "x [.., d], weight [V, d]"}});
  if (weight.dtype() != x.dtype())
    throw DtypeError("cross_entropy: x and weight must have one dtype", {{"x", x.describe()}, {"weight", weight.describe()}});
  require_same_leading_shape("targets", targets, x);
  if (targets.dtype() != Dtype::i32) throw DtypeError("cross_entropy: targets must be i32", {{"targets", targets.describe()}});
  if (mask.defined()) {
    require_same_leading_shape("mask", mask, x);
    if (mask.dtype() != Dtype::f32) throw DtypeError("cross_entropy: mask must be f32", {{"mask", mask.describe()}});
  }
  if (options.valid_vocab < 0 || options.valid_vocab > weight.dim(0))
    throw ValueError("cross_entropy: valid_vocab is not between 0 and the rows of weight",
                     {{"valid_vocab", std::to_string(options.valid_vocab)}, {"weight", weight.describe()}});
  if (options.chunk_rows < 0)
    throw ValueError("cross_entropy: chunk_rows is negative", {{"chunk_rows", std::to_string(options.chunk_rows)}});
}

}  // namespace

CrossEntropyOutput linear_cross_entropy(const Variable& x, const Variable& weight, const Tensor& targets, const Tensor& mask,
                                        const CrossEntropyOptions& options) {
  const OpScope op("cross_entropy", {&x.value(), &weight.value()});
  require_cross_entropy_args(x.value(), weight.value(), targets, mask, options);
  const Device& device = x.value().device();
  const Dtype dtype = x.value().dtype(), wide = dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  const bool wants_x = grad_enabled() && x.requires_grad(), wants_weight = grad_enabled() && weight.requires_grad();
  const bool gradient = wants_x || wants_weight;

  // Masked columns take no part at all: the head is cut to its valid rows. On a GPU whole packs of columns are computed: those behind the
  // vocabulary are zeros in the head, and the gradient of their logits is zero.
  const int64_t vocab = options.valid_vocab > 0 ? options.valid_vocab : weight.value().dim(0);
  const int64_t columns = device.is_cuda() ? round_up(vocab, kPackBytes / size_of(dtype)) : vocab;
  const Tensor head = head_of(weight.value(), vocab, columns);  // [columns, d]
  const Tensor rows = as_matrix(x.value());                     // [R, d]
  const int64_t count = rows.dim(0);
  const Tensor ids = targets.contiguous().reshape({count});
  const Tensor weights = mask.defined() ? mask.contiguous().reshape({count}) : mask;
  if (!device.is_cuda() || switches().check) require_ids("cross_entropy", targets, vocab, mask);

  const Tensor token_loss = Tensor::empty(device, wide, targets.shape());
  const Tensor losses = token_loss.reshape({count});
  const Tensor loss = Tensor::empty(device, wide, {}), factor = Tensor::empty(device, wide, {});
  if (weights.defined()) on_device(device, &loss_factor_cpu, LONGHAND_CUDA_IMPL(loss_factor_cuda))(weights, options.loss_scale, factor);
  else fill(factor, count > 0 ? options.loss_scale / static_cast<double>(count) : 0.0);

  Tensor grad_x, grad_weight, grad_head;
  if (wants_x) grad_x = Tensor::empty(device, dtype, {count, rows.dim(1)});
  if (wants_weight) {
    const int64_t all = weight.value().dim(0);
    const Tensor memory = Tensor::empty(device, wide, {std::max(all, columns), weight.value().dim(1)});
    grad_weight = memory.slice(0, 0, all);
    grad_head = memory.slice(0, 0, columns);
    fill(count > 0 ? memory.slice(0, std::min(all, columns), all) : grad_weight, 0);
  }

  // Two ways through a chunk of rows: exponentials straight out of the product, or logits and a pass over them.
  const auto forms_exponentials =
      on_device<bool(const Tensor&, const Tensor&)>(device, nullptr, LONGHAND_CUDA_IMPL(forms_exponentials_cuda));
  const bool exponentials = forms_exponentials != nullptr && forms_exponentials(rows, head);
  const Dtype logits_dtype = gradient ? dtype : wide;
  const int64_t stride = round_up(vocab, kRowAlignment / size_of(logits_dtype));
  const int64_t chosen_rows =
      exponentials && !gradient ? kRowsInCache : choose_chunk_rows(count, stride * size_of(logits_dtype), rows.dim(1), device.is_cuda());
  const int64_t chunk_rows = std::min(count, options.chunk_rows > 0 ? options.chunk_rows : chosen_rows);
  const auto empty_f32 = [&](bool wanted, Shape shape) { return wanted ? Tensor::empty(device, Dtype::f32, shape) : Tensor(); };
  const Tensor target_logits = empty_f32(exponentials, {count}), row_factors = empty_f32(exponentials && gradient, {count});
  // What multiplies grad_logits, or exponentials, to give grad_weight, where that is not x itself.
  const bool changes_x = wants_weight && (exponentials || weights.defined());
  const Tensor changed_x = changes_x ? Tensor::empty(device, dtype, {chunk_rows, rows.dim(1)}) : Tensor();
  const Tensor chunk_memory = exponentials && !gradient ? Tensor() : Tensor::empty(device, logits_dtype, {chunk_rows, stride});
  if (exponentials)
    on_device<decltype(target_logits_cuda)>(device, nullptr, LONGHAND_CUDA_IMPL(target_logits_cuda))(rows, head, ids, vocab, target_logits);
  for (int64_t begin = 0; begin < count; begin += chunk_rows) {
    const int64_t end = std::min(begin + chunk_rows, count);
    const auto rows_of = [&](const Tensor& t) { return t.defined() ? t.slice(0, begin, end) : t; };
    const Tensor chunk_x = rows_of(rows);  // [chunk, d]
    const Tensor all_logits = chunk_memory.defined() ? chunk_memory.slice(0, 0, end - begin).slice(1, 0, columns) : Tensor();
    const Tensor chunk_changed_x = changes_x ? changed_x.slice(0, 0, end - begin) : Tensor();
    if (exponentials) {
      on_device<decltype(exponentials_chunk_cuda)>(device, nullptr, LONGHAND_CUDA_IMPL(exponentials_chunk_cuda))(
          {all_logits, chunk_x, head, vocab, rows_of(ids), rows_of(weights), factor, rows_of(losses), rows_of(target_logits),
           rows_of(row_factors), chunk_changed_x, begin});
    } else {
      gemm(false, chunk_x, true, head, all_logits);
      on_device(device, &loss_chunk_cpu,
                LONGHAND_CUDA_IMPL(loss_chunk_cuda))({all_logits.slice(1, 0, vocab), chunk_x, head, chunk_changed_x, rows_of(ids),
                                                      rows_of(weights), factor, rows_of(losses), begin, gradient});
    }
    if (wants_x) gemm(false, all_logits, false, head, grad_x.slice(0, begin, end));
    if (wants_weight) gemm(true, all_logits, false, changes_x ? chunk_changed_x : chunk_x, grad_head, 1.0, begin == 0 ? 0.0 : 1.0);
  }
  on_device(device, &mean_loss_cpu, LONGHAND_CUDA_IMPL(mean_loss_cuda))(losses, weights, factor, loss);

  const Shape x_shape = x.shape();
  Variable result = record("cross_entropy", loss, {x, weight}, [grad_x, grad_weight, row_factors, x_shape](BackwardCall& call) {
    const auto scale = on_device(call.grad(0).device(), &scale_gradient_cpu, LONGHAND_CUDA_IMPL(scale_gradient_cuda));
    if (call.needs(0)) {
      scale(grad_x, call.grad(0), row_factors, grad_x, 0.0);
      call.set(0, grad_x.reshape(x_shape));
    }
    if (call.needs(1)) {
      const auto [destination, beta] = call.accumulate(1);
      scale(grad_weight, call.grad(0), Tensor(), destination, beta);
    }
  });
  return {result, token_loss};
}

}  // namespace longhand
