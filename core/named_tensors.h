// NamedTensors: what a file of tensors holds, whichever container it is.
#pragma once
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/files.h"
#include "core/tensor.h"

namespace longhand {

/// Tensors by name. They are CPU views of mapped files, copied only where an address is not aligned for its dtype or where the stored
/// strides are not row-major; names that share one storage in the file share it here.
struct NamedTensors {
  std::string path;  // where they came from, for messages: a file, or a folder of shards
  std::map<std::string, Tensor> tensors;
  std::map<std::string, std::string> metadata;
  std::vector<MappedFile> files;

  /// errors  FileError naming the file and the tensor when it is absent
  const Tensor& at(const std::string& name) const;
  bool contains(const std::string& name) const { return tensors.contains(name); }

  /// Gives the memory of a tensor's pages back to the system; they are read again when touched. Nothing happens to a tensor in other
  /// memory.
  void release_pages(const Tensor& tensor) const;
};

/// How named tensors are written.
struct TensorFileOptions {
  std::optional<Dtype> stored_as;                 // of every floating tensor; absent: each keeps its own
  std::function<void(const Tensor&)> on_written;  // called with each tensor when its bytes are in the file
  /// Called with the name of a tensor and how many of its values became 0, because `stored_as` has no number so small.
  std::function<void(const std::string& name, int64_t values)> on_zeroed = {};
};

/// The dtype in which `tensor` is stored.
Dtype stored_dtype(const Tensor& tensor, const TensorFileOptions& options);

/// `tensor` on the host, contiguous, in the dtype in which it is stored.
/// errors  NumericError naming `name` when a finite value does not fit that dtype
Tensor to_stored(const std::string& name, const Tensor& tensor, const TensorFileOptions& options);

/// Whether files may hold a tensor of this name: 1 to 4096 bytes, no control characters.
bool is_tensor_name(std::string_view name);

/// The first words of a Git LFS pointer, which stands where somebody cloned a repository without its large files.
bool is_git_lfs_pointer(std::string_view file);

}  // namespace longhand
