// See determinism.h.
#include "train/determinism.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <map>
#include <string>
#include <vector>

#include "core/crc32.h"
#include "core/error.h"
#include "data/dataset.h"
#include "data/tokenizer.h"
#include "train/run_batches.h"
#include "train/trainer.h"
#include "train/training_loop.h"

namespace longhand {
namespace {

struct Step {
  double loss, grad_norm;
  uint32_t weights;                       // check sum
  bool operator==(const Step& o) const {  // NaN equals NaN of the same bits
    return std::bit_cast<uint64_t>(loss) == std::bit_cast<uint64_t>(o.loss) &&
           std::bit_cast<uint64_t>(grad_norm) == std::bit_cast<uint64_t>(o.grad_norm) && weights == o.weights;
  }
  std::string text() const { return fmt::format("loss {:.17g}, grad_norm {:.17g}, weights {:08x}", loss, grad_norm, weights); }
};

struct Pass {
  std::vector<Step> steps;
  std::map<std::string, std::vector<std::byte>> weights, moments, carried;
  std::string queued;
};

std::vector<std::byte> bytes_of(const Tensor& t) {
  std::vector<std::byte> out(static_cast<std::size_t>(t.numel() * size_of(t.dtype())));
  const Tensor host = t.to(Device::cpu()).contiguous();
  std::copy_n(static_cast<const std::byte*>(host.raw()), out.size(), out.data());
  return out;
}

Pass do_steps(const Recipe& recipe, const std::shared_ptr<const Tokenizer>& tokenizer, int64_t steps, LanguageModel& model) {
  BatchStream batches = training_batches(recipe, tokenizer);
  Trainer trainer(recipe, model);
  Pass pass;
  Batch batch;
  for (int64_t step = 0; step < steps; ++step) {
    if (!batches.next(batch)) throw ValueError("train: the data ended before the steps did", {{"step", std::to_string(step + 1)}});
    trainer.step(batch);
    trainer.request_report();
    const StepReport report = trainer.receive_report();
    if (report.skipped_in_a_row > 0) trainer.forget_carried_state();
    const std::vector<std::byte> weights = bytes_of(model.parameters().flat_master());
    pass.steps.push_back({report.loss, report.grad_norm, crc32(weights.data(), weights.size())});
  }
  for (const Parameter& p : model.parameters().all()) pass.weights[p.name] = bytes_of(p.master);
  for (const auto& [name, tensor] : trainer.optimizer().save()) pass.moments[name] = bytes_of(tensor);
  for (const auto& [name, tensor] : trainer.initial_state().save()) pass.carried[name] = bytes_of(tensor);
  pass.queued = trainer.queued();
  return pass;
}

// "a, b, c and 12 more": the names whose values differ.
std::string differing(const Pass& a, const Pass& b) {
  constexpr int kNamed = 3;
  std::string text;
  int count = 0;
  for (const auto part : {&Pass::weights, &Pass::moments, &Pass::carried})
    for (const auto& [name, bytes] : a.*part)
      if (bytes != (b.*part).at(name) && ++count <= kNamed) text += (text.empty() ? "" : ", ") + name;
  if (count > kNamed) text += fmt::format(" and {} more", count - kNamed);
  return text.empty() ? "none" : text;
}

}  // namespace

DeterminismReport verify_determinism(const Recipe& recipe, const std::shared_ptr<const Tokenizer>& tokenizer, int64_t steps,
                                     const std::function<std::unique_ptr<LanguageModel>()>& fresh_model) {
  DeterminismReport report;
  report.steps = steps;
  report.threads[0] = recipe.data.threads;
  report.threads[1] = recipe.data.threads + 2;
  std::vector<Pass> passes;
  for (const int pass : {0, 1}) {
    Recipe other_way = recipe;
    other_way.data.threads = report.threads[pass];
    if (pass == 1) other_way.train.graph = false;
    const auto model = fresh_model();
    passes.push_back(do_steps(other_way, tokenizer, steps, *model));
    report.queued[pass] = passes.back().queued;
    report.weights = model->parameters().count();
  }
  for (const auto& [name, bytes] : passes[0].carried) report.carried += static_cast<int64_t>(bytes.size());
  report.moments = 2 * report.weights;
  const Pass &first = passes[0], &second = passes[1];
  const std::string names = differing(first, second);
  for (std::size_t i = 0; i < first.steps.size(); ++i)
    if (!(first.steps[i] == second.steps[i]))
      throw NumericError("train: the same steps gave other numbers the second time",
                         {{"step", std::to_string(i + 1)},
                          {"first", first.steps[i].text()},
                          {"second", second.steps[i].text()},
                          {"differ", names},
                          {"try", "OMP_NUM_THREADS=1, to see whether compute threads matter"}});
  if (names != "none") throw NumericError("train: the moments or the carried states differ the second time", {{"differ", names}});
  return report;
}

}  // namespace longhand
