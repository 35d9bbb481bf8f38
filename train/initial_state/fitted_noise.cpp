// fitted-noise: noise that looks like the states in which rows end, by the mean and standard deviation of each layer and head.
//   S_0[l, h] ~ N(mean[l, h], std[l, h]^2)     over all elements of head h of the final states seen so far; zeros until there are any
// A final state's weight in mean and std falls by statistics_decay with every step: 1 keeps the whole run, 0 the last step alone, and
// 1 - 1/n about the last n steps. Within a step all micro-batches draw from the statistics of the steps before, and rows are counted one
// after the other, whatever process they are on, so neither gradient accumulation nor the number of processes changes anything. A row whose
// state is not finite is not counted. source  Buitrago Ruiz & Gu 2025, arXiv:2507.02782, section 4
#include <cmath>

#include "core/error.h"
#include "train/communicator.h"
#include "train/initial_state/noise.h"

namespace longhand {
namespace {

constexpr const char* kPrefix = "statistics.";

class FittedNoise final : public InitialState {
 public:
  explicit FittedNoise(const InitialStateContext& context)
      : noise_(context, "fitted-noise"),
        decay_(context.options.statistics_decay),
        processes_(context.processes),
        running_(Tensor::zeros(context.device, Dtype::f64, {noise_.groups(), 3})),
        normals_(Tensor::zeros(context.device, Dtype::f32, {noise_.groups(), 2})) {}

  void prepare(const BatchInfo& info) override { noise_.prepare(info); }

  RecurrentState begin(const BatchInfo& info) override {
    if (info.micro == 0) refresh_normals(running_, normals_, decay_);
    return noise_.draw(info, normals_);
  }

  void end(const BatchInfo& info, const RecurrentState& h_T) override {
    const int64_t rows = info.all_rows > 0 ? info.all_rows : info.rows;
    const Tensor moments = Tensor::zeros(running_.device(), Dtype::f64, {rows, noise_.groups(), 3});
    const Part own = processes_ != nullptr ? processes_->own(rows) : Part{0, rows};
    const Tensor own_moments = moments.slice(0, own.begin, own.end);
    for (const Noise::Part& part : noise_.parts())
      row_moments(h_T.get(part.layer, part.name).value(), part.groups, own_moments, part.first);
    if (processes_ != nullptr) processes_->all_gather(moments, processes_->cuts(rows));
    merge_rows(running_, moments);
  }

  // "statistics.layers.3.ssm" [groups, 3] f64: count, mean and squared deviations from the mean.
  std::map<std::string, Tensor> save() const override {
    std::map<std::string, Tensor> out;
    for (const Noise::Part& part : noise_.parts()) out[kPrefix + part.full_name] = place(part);
    return out;
  }

  bool carries() const override { return true; }

  void load(const std::map<std::string, Tensor>& stored, int64_t) override {
    fill(running_, 0);
    if (stored.empty()) return;
    for (const Noise::Part& part : noise_.parts()) {
      const auto found = stored.find(kPrefix + part.full_name);
      const bool there = found != stored.end();
      if (!there || stored.size() != noise_.parts().size() || !(found->second.shape() == place(part).shape()) ||
          found->second.dtype() != Dtype::f64)
        throw FileError("fitted-noise: the stored statistics are not this model's",
                        {{"tensor", kPrefix + part.full_name},
                         {"found", there ? found->second.describe() : "(absent)"},
                         {"expected", place(part).describe()}});
      const std::vector<double> numbers = found->second.to_vector<double>();
      for (std::size_t i = 0; i < numbers.size(); ++i)
        if (!std::isfinite(numbers[i]) || (i % 3 != 1 && numbers[i] < 0))  // count and squared deviations are never negative
          throw FileError("fitted-noise: a stored number is no statistic", {{"tensor", kPrefix + part.full_name},
                                                                            {"index", std::to_string(i)},
                                                                            {"found", std::to_string(numbers[i])},
                                                                            {"try", "an older checkpoint, or copy it again"}});
      copy(place(part), found->second);
    }
  }

 private:
  Tensor place(const Noise::Part& part) const { return running_.slice(0, part.first, part.first + part.groups.count); }

  Noise noise_;
  double decay_;
  Communicator* processes_;
  Tensor running_;  // [groups, 3] f64  of the steps so far, the one in hand included
  Tensor normals_;  // [groups, 2] f32  mean and std that the step in hand draws from
};

}  // namespace

std::unique_ptr<InitialState> make_fitted_noise(const InitialStateContext& context) {
  return std::make_unique<FittedNoise>(context);
}

}  // namespace longhand
