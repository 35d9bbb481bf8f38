// LONGHAND_DUMP=folder: what every op of the first forward gave, and the gradients that its backward was given, as safetensors.
//   0012-layers.1-ssd.safetensors        output.0, output.1, ..   as many as the op has; in the order of the ops
//   0012-layers.1-ssd-grad.safetensors   grad.0, ..               gradients of those outputs, where there are any
// It ends where the first op comes again: with the second forward.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "core/tensor.h"

namespace longhand {

/// Writes the outputs of an op that has just run.
/// returns  what names its gradients; "" where nothing is written (any more)
/// errors   FileError where the folder cannot be written
std::string dump_outputs(const std::string& layer, const std::string& op, const std::vector<Tensor>& outputs);

/// Writes the gradients of the outputs of the op that got this name.
void dump_gradients(const std::string& name, const std::vector<Tensor>& gradients);

}  // namespace longhand
