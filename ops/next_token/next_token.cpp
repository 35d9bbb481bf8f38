// Argument checks; see next_token.h.
#include "ops/next_token/next_token.h"

#include <fmt/format.h>

#include "core/error.h"
#include "core/op_scope.h"

namespace longhand {
namespace {

template <class F>
F* on_gpu(const Device& device, F* cuda) {
  if (!device.is_cuda() || cuda == nullptr)
    throw DeviceError("next_token: only on a GPU", {{"device", device.name()}, {"try", "Sampler::draw"}});
  return cuda;
}

}  // namespace

void next_token(const NextToken& p) {
  const OpScope op("next_token", {&p.logits});
  const auto require = [&](const char* what, const Tensor& t, const Shape& shape, Dtype dtype) {
    const std::string expected = shape.str() + " " + name_of(dtype), found = t.defined() ? t.describe() : "undefined";
    if (!t.defined() || !(t.shape() == shape) || !t.is_contiguous())
      throw ShapeError(fmt::format("next_token: {} does not fit", what), {{what, found}, {"expected", expected}});
    if (t.dtype() != dtype)
      throw DtypeError(fmt::format("next_token: {} has the wrong dtype", what), {{what, found}, {"expected", expected}});
    if (!(t.device() == p.logits.device())) throw DeviceError("next_token: tensors are on different devices", {{what, found}});
  };
  if (!p.logits.defined() || p.logits.rank() != 2 || !p.never.defined() || p.never.rank() != 1 || p.never.dim(0) > p.logits.dim(1))
    throw ShapeError("next_token: logits and vocabulary do not fit", {{"logits", p.logits.defined() ? p.logits.describe() : "undefined"},
                                                                      {"never", p.never.defined() ? p.never.describe() : "undefined"},
                                                                      {"expected", "[B, V or more] f32, [V] u8"}});
  const int64_t B = p.logits.dim(0), V = p.never.dim(0);
  if (V < 1 || V >= int64_t{1} << 22)
    throw ValueError("next_token: a vocabulary of this size is not supported", {{"vocabulary", std::to_string(V)}, {"limit", "2^22"}});
  if (p.logits.dtype() != Dtype::f32) throw DtypeError("next_token: logits must be f32", {{"logits", p.logits.describe()}});
  require("never", p.never, {V}, Dtype::u8);
  if (p.repetition_penalty != 1) require("seen", p.seen, {B, V}, Dtype::u8);
  if (p.temperature != 0) {
    require("key", p.key, {B}, Dtype::i64);
    require("position", p.position, {B}, Dtype::i64);
  }
  require("ids", p.ids, {B}, Dtype::i32);
  on_gpu<void(const NextToken&)>(p.logits.device(), LONGHAND_CUDA_IMPL(next_token_cuda))(p);
}

}  // namespace longhand
