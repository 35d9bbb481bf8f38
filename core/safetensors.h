// safetensors files: named tensors behind a JSON header. Reading is memory-mapped and strict; writing is atomic.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "core/tensor.h"

namespace longhand {

/// What a safetensors file holds. Tensors are CPU views of the mapped file (copied only where an address is not aligned for its dtype).
struct NamedTensors {
  std::string path;  // where it came from, for messages
  std::map<std::string, Tensor> tensors;
  std::map<std::string, std::string> metadata;

  /// errors  FileError naming the file and the tensor when it is absent
  const Tensor& at(const std::string& name) const;
  bool contains(const std::string& name) const { return tensors.contains(name); }
};

/// Reads F64, F32, F16, BF16, I64, I32, U16, U8 (BOOL as U8).
/// errors  FileError naming file, tensor and rule: header not JSON, larger than the file or over 100,000,000 bytes; duplicate or unknown
/// keys; a
///         size that is not the product of the shape; gaps, overlaps or bytes after the last tensor; another dtype (by name)
NamedTensors read_safetensors(const std::string& path);

/// Writes all tensors (from any device, any strides): larger element types first, then by name; the data begins at a multiple of 64.
/// errors  FileError; the file appears only when it is whole
void write_safetensors(const std::string& path, const std::map<std::string, Tensor>& tensors,
                       const std::map<std::string, std::string>& metadata = {});

}  // namespace longhand
