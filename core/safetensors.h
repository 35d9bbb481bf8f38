// safetensors files: named tensors behind a JSON header. Reading is memory-mapped and strict; writing is atomic.
#pragma once
#include <map>
#include <string>

#include "core/named_tensors.h"

namespace longhand {

/// Reads F64, F32, F16, BF16, I64, I32, U16, U8 (BOOL as U8).
/// errors  FileError naming file, tensor and rule: header not JSON, larger than the file or over 100,000,000 bytes; duplicate or unknown
///         keys; a size that is not the product of the shape; gaps, overlaps or bytes after the last tensor; another dtype (by name)
NamedTensors read_safetensors(const std::string& path);

/// Writes all tensors (from any device, any strides): larger element types first, then by name; the data begins at a multiple of 64.
/// errors  FileError; NumericError when a value does not fit options.stored_as; the file appears only when it is whole
void write_safetensors(const std::string& path, const std::map<std::string, Tensor>& tensors,
                       const std::map<std::string, std::string>& metadata = {}, const TensorFileOptions& options = {});

}  // namespace longhand
