// Words for models and tensors that several commands print.
#pragma once
#include <cstdint>
#include <map>
#include <string>

#include "core/tensor.h"

namespace longhand {

/// "1,234,567"
std::string grouped(int64_t n);

/// "f16", or where they are mixed the number of tensors of each: "12 bf16, 8 f32".
std::string dtypes_text(const std::map<std::string, Tensor>& tensors);

/// To stdout, what a model folder that was just written holds: layout, dtypes, every file with its size.
/// errors  those of open_model()
void print_written_model(const std::string& folder);

}  // namespace longhand
