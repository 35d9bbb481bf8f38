// safetensors files that several processes write together, each the part of the tensors that it holds.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "core/tensor.h"

namespace longhand {

/// What one of several processes holds of a tensor.
struct TensorParts {
  struct Run {
    int64_t begin;  // first element, row-major
    Tensor values;  // on any device
  };
  Dtype dtype;
  Shape shape;  // of the whole
  std::vector<Run> runs;
};

/// Several processes write one file, the same bytes that write_safetensors() would: one makes it, then each writes the elements that it
/// holds. All give the same names, dtypes, shapes and metadata. The file is whole when all have returned, so it belongs into a folder that
/// gets its name afterwards; each has its elements on the disk when it returns.
/// errors  FileError, also when the file that is opened has another size than the one to be made: a folder that is not the same for all
void make_safetensors(const std::string& path, const std::map<std::string, TensorParts>& tensors,
                      const std::map<std::string, std::string>& metadata);
void write_safetensors_part(const std::string& path, const std::map<std::string, TensorParts>& tensors,
                            const std::map<std::string, std::string>& metadata);

}  // namespace longhand
