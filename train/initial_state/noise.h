// What random-noise and fitted-noise share: the tensors that take noise, and the drawing.
#pragma once
#include "train/initial_state/row_kernels.h"
#include "train/initial_state/treatment.h"

namespace longhand {

class Noise {
 public:
  /// A covered tensor of the state, and where its groups stand among those of all tensors.
  struct Part {
    std::size_t layer;
    std::string name, full_name;  // "ssm", "layers.3.ssm"
    StateGroups groups;
    int64_t first;
  };

  Noise(const InitialStateContext& context, const char* strategy);

  const std::vector<Part>& parts() const { return parts_; }
  int64_t groups() const { return groups_; }  // of all parts

  void prepare(const BatchInfo& info) { treatment_.upload(info.micro, treatment_.row_keys(info)); }

  /// New noise for a batch, after prepare(). normals [groups(), 2] f32: mean and standard deviation of each group
  RecurrentState draw(const BatchInfo& info, const Tensor& normals) const;

 private:
  Treatment treatment_;
  RecurrentState one_row_;  // covered; for shapes and dtypes
  std::vector<Part> parts_;
  int64_t groups_ = 0;
};

}  // namespace longhand
