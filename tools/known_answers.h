// What longhand computes on this machine beside numbers that are known: the self-test of `longhand doctor`.
#pragma once
#include <string>
#include <vector>

#include "core/device.h"

namespace longhand {

/// One check: what was compared, and with what result.
struct SelfTestRow {
  std::string name;
  bool right;
  std::string text;  // the largest error beside the one allowed, or what was thrown
};

/// On a CPU: outputs and final states of the three recurrences in f64 and f32 beside reference values, computed once in f64 by an
/// independent program. On any device, for each family: the loss of a small model beside log(vocabulary), and the bits of its loss and
/// gradient computed twice; on a GPU also its gradient in f32 and bf16 beside the CPU's. Takes seconds. Never throws: a check that throws
/// has failed.
std::vector<SelfTestRow> self_test(const Device& device);

}  // namespace longhand
