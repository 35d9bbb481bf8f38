// random-noise: every element of a row's state is drawn anew, with one sigma for all layers and heads.
//   S_0 ~ N(0, sigma^2)     keyed by (seed, step, global row, layer and tensor, element)
// source  Buitrago Ruiz & Gu 2025, arXiv:2507.02782, section 4
#include "train/initial_state/noise.h"

namespace longhand {
namespace {

class RandomNoise final : public InitialState {
 public:
  explicit RandomNoise(const InitialStateContext& context) : noise_(context, "random-noise") {
    std::vector<float> normals;
    for (int64_t g = 0; g < noise_.groups(); ++g) normals.insert(normals.end(), {0.0f, static_cast<float>(context.options.sigma)});
    normals_ = Tensor::from(context.device, {noise_.groups(), 2}, normals);
  }

  void prepare(const BatchInfo& info) override { noise_.prepare(info); }

  RecurrentState begin(const BatchInfo& info) override { return noise_.draw(info, normals_); }
  void end(const BatchInfo&, const RecurrentState&) override {}

 private:
  Noise noise_;
  Tensor normals_;
};

}  // namespace

std::unique_ptr<InitialState> make_random_noise(const InitialStateContext& context) {
  return std::make_unique<RandomNoise>(context);
}

}  // namespace longhand
