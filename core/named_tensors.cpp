// See named_tensors.h.
#include "core/named_tensors.h"

#include <algorithm>

#include "core/error.h"

namespace longhand {

namespace {

// How many values that are not 0 are 0 in `stored`.
int64_t zeroed_values(const Tensor& values, const Tensor& stored) {
  constexpr int64_t kBlock = int64_t{1} << 20;  // elements that are looked at together
  const int64_t n = values.numel();
  const Tensor before = values.contiguous().reshape({n}), after = stored.reshape({n});
  int64_t count = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(n, begin + kBlock);
    const auto x = before.slice(0, begin, end).to_vector<double>(), y = after.slice(0, begin, end).to_vector<double>();
    for (std::size_t i = 0; i < x.size(); ++i) count += x[i] != 0 && y[i] == 0 ? 1 : 0;
  }
  return count;
}

}  // namespace

const Tensor& NamedTensors::at(const std::string& name) const {
  const auto found = tensors.find(name);
  if (found == tensors.end()) throw FileError("file: a tensor is missing", {{"file", path}, {"tensor", name}});
  return found->second;
}

void NamedTensors::release_pages(const Tensor& tensor) const {
  if (tensor.numel() == 0 || tensor.device().is_cuda() || !tensor.is_contiguous()) return;
  for (const MappedFile& file : files)
    file.release_pages(static_cast<const std::byte*>(tensor.raw()), static_cast<std::size_t>(tensor.numel() * size_of(tensor.dtype())));
}

Dtype stored_dtype(const Tensor& tensor, const TensorFileOptions& options) {
  return options.stored_as && is_floating(tensor.dtype()) ? *options.stored_as : tensor.dtype();
}

Tensor to_stored(const std::string& name, const Tensor& tensor, const TensorFileOptions& options) {
  const Tensor host = tensor.to(Device::cpu());
  const Dtype dtype = stored_dtype(tensor, options);
  const Tensor stored = host.to(dtype).contiguous();
  if (dtype == tensor.dtype()) return stored;
  if (const int64_t index = first_non_finite(stored); index >= 0 && first_non_finite(host) < 0)
    throw NumericError("file: a value does not fit the type in which it is to be stored",
                       {{"tensor", name},
                        {"index", std::to_string(index) + " (row-major)"},
                        {"value", std::to_string(host.contiguous().reshape({host.numel()}).slice(0, index, index + 1).item())},
                        {"type", name_of(dtype)},
                        {"try", "bf16, which has the range of f32"}});
  if (options.on_zeroed)
    if (const int64_t values = zeroed_values(host, stored); values > 0) options.on_zeroed(name, values);
  return stored;
}

bool is_tensor_name(std::string_view name) {
  constexpr std::size_t kLongest = 4096;
  return !name.empty() && name.size() <= kLongest &&
         std::none_of(name.begin(), name.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; });
}

bool is_git_lfs_pointer(std::string_view file) {
  return file.starts_with("version https://git-lfs");
}

}  // namespace longhand
