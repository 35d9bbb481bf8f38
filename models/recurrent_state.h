// RecurrentState: what a recurrent model carries from one token to the next, as a value. One layout everywhere: training, streaming
// evaluation, decoding, files.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "autograd/variable.h"

namespace longhand {

/// The state of one layer: named tensors whose first axis is the batch row. Mamba-2: "ssm" [B, H, P, N] f32 and "conv" [B, W-1, channels]
/// in the compute type (the last W-1 inputs of the convolution, oldest first). Gradients may flow into and out of them.
using LayerState = std::map<std::string, Variable>;

/// Mean, standard deviation (population), Euclidean norm and largest magnitude over elements of a state.
struct StateStatistics {
  double count = 0, mean = 0, std = 0, norm = 0, max_abs = 0;
};

/// Whether a state tensor is a convolution's window ("conv", "conv_q" ...) rather than the recurrence's own state ("ssm").
inline bool is_conv_window(const std::string& name) {
  return name.starts_with("conv");
}

class RecurrentState {
 public:
  RecurrentState() = default;  // absent: the model starts from zeros
  explicit RecurrentState(std::vector<LayerState> layers) : layers_(std::move(layers)) {}

  bool absent() const { return layers_.empty(); }
  std::vector<LayerState>& layers() { return layers_; }
  const std::vector<LayerState>& layers() const { return layers_; }
  /// Tensor `name` of layer `layer`, or undefined when the state is absent.
  Variable get(std::size_t layer, const std::string& name) const;
  int64_t rows() const;  // batch rows; 0 when absent
  int64_t size_bytes() const;

  RecurrentState detach() const;                                       // same values, no gradient
  RecurrentState clone() const;                                        // detached copy in new memory
  RecurrentState to(const Device& device) const;                       // detached
  RecurrentState select_rows(const std::vector<int64_t>& rows) const;  // row i of the result is row rows[i]; detached copy
  /// The rows of all parts, one part after the other; detached copies.
  /// errors   ShapeError when the parts do not have the same tensors with the same shapes beyond the rows; ValueError without parts
  static RecurrentState concatenate(const std::vector<RecurrentState>& parts);
  RecurrentState reset_rows(const std::vector<uint8_t>& reset) const;  // rows with reset[b] != 0 become zero; detached copy

  /// Statistics of tensor `name` in one layer; per_head gives one entry per head (axis 1 of a tensor of
  /// four axes, such as "ssm" of Mamba-2), pooled over rows; other tensors have one entry.
  std::vector<StateStatistics> statistics(std::size_t layer, const std::string& name, bool per_head) const;

  /// safetensors with names "layers.3.ssm".
  /// errors  FileError naming `source` (load: the path): a name of another form, a layer without tensors, tensors of different row counts
  void save(const std::string& path) const;
  static RecurrentState load(const std::string& path, const Device& device);
  std::map<std::string, Tensor> named_tensors() const;
  static RecurrentState from_named_tensors(const std::map<std::string, Tensor>& tensors, const Device& device,
                                           const std::string& source = "tensors in memory");

 private:
  std::vector<LayerState> layers_;
};

}  // namespace longhand
