// The node of embedding: it keeps the ids only.
#include "ops/embedding/embedding.h"

#include "autograd/tape.h"
#include "core/error.h"
#include "core/op_scope.h"
#include "core/switches.h"
#include "ops/common/gemm.h"
#include "ops/common/token_ids.h"
#include "ops/embedding/embedding_kernels.h"

namespace longhand {
namespace {

void require_embedding_args(const Tensor& tokens, const Tensor& weight, Dtype y_dtype) {
  if (weight.rank() != 2)
    throw ShapeError("embedding: weight must be a table of rows", {{"weight", weight.describe()}, {"expected", "weight [V, d]"}});
  if (tokens.rank() < 1 || tokens.rank() >= Shape::kMaxRank)
    throw ShapeError("embedding: tokens must have a leading shape such as [B, T]", {{"tokens", tokens.describe()}});
  const bool gpu = weight.device().is_cuda();
  auto offered = [gpu](Dtype dtype) { return dtype == Dtype::f32 || dtype == (gpu ? Dtype::bf16 : Dtype::f64); };
  if (tokens.dtype() != Dtype::i32 || !offered(weight.dtype()) || !offered(y_dtype) || (!gpu && y_dtype != weight.dtype()))
    throw DtypeError("embedding: these element types are not offered",
                     {{"tokens", tokens.describe()},
                      {"weight", weight.describe()},
                      {"y", name_of(y_dtype)},
                      {"expected", gpu ? "tokens i32, weight and y f32 or bf16" : "tokens i32, weight and y both f32 or both f64"}});
  if (!(tokens.device() == weight.device()))
    throw DeviceError("embedding: tokens and weight are on different devices",
                      {{"tokens", tokens.describe()}, {"weight", weight.describe()}});
  if (!gpu || switches().check) require_ids("embedding", tokens, weight.dim(0));
}

}  // namespace

Variable embedding(const Tensor& tokens, const Variable& weight, Dtype y_dtype) {
  const OpScope op("embedding", {&tokens, &weight.value()});
  require_embedding_args(tokens, weight.value(), y_dtype);
  const int64_t rows = tokens.numel(), width = weight.value().dim(1);
  const Tensor ids = tokens.contiguous().reshape({rows});
  Shape shape = tokens.shape();
  shape.push_back(width);
  const Tensor y = Tensor::empty(weight.value().device(), y_dtype, shape);
  if (y.numel() > 0)
    on_device(y.device(), &embedding_fwd_cpu, LONGHAND_CUDA_IMPL(embedding_fwd_cuda))(ids, weight.value().contiguous(),
                                                                                      y.reshape({rows, width}));
  return record("embedding", y, {weight}, [ids](BackwardCall& call) {
    const Tensor grad_y = as_matrix(call.grad(0));
    const auto [grad_weight, beta] = call.accumulate(0);
    if (grad_y.numel() == 0) {
      if (beta == 0) fill(grad_weight, 0);
      return;
    }
    on_device(grad_y.device(), &embedding_bwd_cpu, LONGHAND_CUDA_IMPL(embedding_bwd_cuda))(ids, grad_y, grad_weight, beta);
  });
}

}  // namespace longhand
