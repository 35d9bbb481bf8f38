// A variable as error messages name it.
#pragma once
#include <string>

#include "autograd/variable.h"

namespace longhand {

/// Shape, dtype and device of the value, and the name in quotes where there is one: [4, 6] f32 cpu "mlp.down_proj.weight".
inline std::string describe(const Variable& v) {
  return v.value().describe() + (v.name().empty() ? "" : " \"" + v.name() + "\"");
}

}  // namespace longhand
