// See token_ids.h.
#include "ops/common/token_ids.h"

#include "core/error.h"

namespace longhand {

std::string position_text(const Shape& shape, int64_t flat) {
  std::string text = "]";
  for (int axis = shape.rank() - 1; axis >= 0; --axis) {
    text.insert(0, (axis > 0 ? ", " : "") + std::to_string(flat % shape[axis]));
    flat /= shape[axis];
  }
  return "[" + text;
}

void require_ids(const std::string& op, const Tensor& ids, int64_t limit, const Tensor& weights) {
  const auto values = ids.to_vector<int32_t>();
  const auto counted = weights.defined() ? weights.to_vector<float>() : std::vector<float>();
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (values[i] >= 0 && values[i] < limit) continue;
    if (!counted.empty() && counted[i] == 0) continue;
    throw ValueError(op + ": a token id is outside the vocabulary", {{"position", position_text(ids.shape(), static_cast<int64_t>(i))},
                                                                     {"id", std::to_string(values[i])},
                                                                     {"expected", "0 <= id < " + std::to_string(limit)},
                                                                     {"try", "check that the tokens were made by this model's tokenizer"}});
  }
}

}  // namespace longhand
