// The strategies in training: what a batch starts from, whatever the accumulation, and that every one of them resumes bit for bit.
#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "autograd/tape.h"
#include "core/error.h"
#include "core/safetensors.h"
#include "tests/support/parity.h"
#include "tests/support/tiny_training.h"

namespace longhand {
namespace {

using namespace test;

std::vector<std::string> settings_of(const InitialStateStrategy& strategy) {
  std::vector<std::string> settings{std::string("initial_state=") + strategy.name};
  if (strategy.arrangement != nullptr) settings.push_back(std::string("data.arrangement=") + strategy.arrangement);
  return settings;
}

struct TwoBatches {
  Recipe recipe;
  std::unique_ptr<LanguageModel> model;
  Batch first, second;
};

// Rates of zero: the weights stay, so that what a trainer computes can be repeated by hand.
TwoBatches still_model(std::vector<std::string> settings) {
  settings.insert(settings.end(), {"optimizer.lr=0", "optimizer.min_lr=0"});
  TwoBatches out{tiny_recipe(settings), nullptr, {}, {}};
  out.model = tiny_model(out.recipe);
  out.first = made_up_batch(out.recipe, 1);
  out.second = made_up_batch(out.recipe, 2);
  return out;
}

double loss_of_second(TwoBatches& t) {
  Trainer trainer(t.recipe, *t.model);
  step_and_report(trainer, t.first);
  return step_and_report(trainer, t.second).loss;
}

double loss_by_hand(const LanguageModel& model, const Batch& batch, const RecurrentState& h0) {
  const NoGrad no_grad;
  return model.loss(on_model(model, batch), h0).loss.value().item();
}

TEST("state-passing: a batch starts from the final state of the batch before; zero does not") {
  TwoBatches passing = still_model({"initial_state=state-passing"}), zero = still_model({});
  const RecurrentState h_T = [&] {
    const NoGrad no_grad;
    return passing.model->loss(on_model(*passing.model, passing.first)).state;
  }();
  const double from_state = loss_by_hand(*passing.model, passing.second, h_T), from_zero = loss_by_hand(*zero.model, zero.second, {});
  CHECK(std::abs(from_state - from_zero) > 1e-4);
  CHECK(loss_of_second(passing) == doctest::Approx(from_state).epsilon(1e-6));
  CHECK(loss_of_second(zero) == doctest::Approx(from_zero).epsilon(1e-6));

  TwoBatches halves = still_model({"initial_state=state-passing", "train.grad_accumulation=2"});
  CHECK(loss_of_second(halves) == doctest::Approx(from_state).epsilon(1e-6));

  RecurrentState ssm_only = h_T.detach();
  for (LayerState& layer : ssm_only.layers()) layer.erase("conv");
  TwoBatches ssm = still_model({"initial_state=state-passing", "initial_state_options.cover=ssm"});
  CHECK(loss_of_second(ssm) == doctest::Approx(loss_by_hand(*ssm.model, ssm.second, ssm_only)).epsilon(1e-6));
  CHECK(std::abs(loss_of_second(ssm) - from_state) > 1e-5);

  TwoBatches never = still_model({"initial_state=state-passing", "initial_state_options.probability=0"});
  CHECK(loss_of_second(never) == doctest::Approx(from_zero).epsilon(1e-6));
}

TEST("tbtt: rows that begin a new sequence start from zero, the others go on") {
  TwoBatches t = still_model({"initial_state=tbtt", "data.arrangement=streams"});
  t.second.resets = {0, 1, 1, 0};
  const RecurrentState h_T = [&] {
    const NoGrad no_grad;
    return t.model->loss(on_model(*t.model, t.first)).state;
  }();
  const double expected = loss_by_hand(*t.model, t.second, h_T.reset_rows(t.second.resets));
  CHECK(std::abs(expected - loss_by_hand(*t.model, t.second, h_T)) > 1e-4);
  CHECK(loss_of_second(t) == doctest::Approx(expected).epsilon(1e-6));
}

TEST("fitted-noise: the statistics of a run are those of all its final states, and the next batch is drawn from them") {
  TwoBatches t = still_model({"initial_state=fitted-noise", "initial_state_options.statistics_decay=1"});
  Trainer trainer(t.recipe, *t.model);
  const ScratchFolder scratch;
  CHECK(step_and_report(trainer, t.first).loss == doctest::Approx(loss_by_hand(*t.model, t.first, {})).epsilon(1e-6));  // from zeros
  trainer.save(scratch.path());
  const RecurrentState h_T = [&] {
    const NoGrad no_grad;
    return t.model->loss(on_model(*t.model, t.first)).state;
  }();
  const auto stored = read_safetensors(scratch.file("carried_state.safetensors")).tensors;
  CHECK(stored.size() == 4);
  for (const std::size_t layer : {0, 1}) {
    for (const char* name : {"ssm", "conv"}) {
      const auto expected = h_T.statistics(layer, name, true);
      const auto moments = stored.at("statistics.layers." + std::to_string(layer) + "." + name).to_vector<double>();
      REQUIRE(moments.size() == 3 * expected.size());
      for (std::size_t h = 0; h < expected.size(); ++h) {
        CHECK(moments[3 * h] == expected[h].count);
        CHECK(std::abs(moments[3 * h + 1] - expected[h].mean) < 1e-12);
        CHECK(std::sqrt(moments[3 * h + 2] / moments[3 * h]) == doctest::Approx(expected[h].std).epsilon(1e-10));
      }
    }
  }
  const double loss = step_and_report(trainer, t.second).loss;
  CHECK(std::abs(loss - loss_by_hand(*t.model, t.second, {})) > 1e-5);
}

TEST("random-noise: a batch starts from the noise of its step, and sigma 0 is the zero state") {
  TwoBatches none = still_model({"initial_state=random-noise", "initial_state_options.sigma=0"});
  const double from_zero = loss_by_hand(*none.model, none.second, {});
  CHECK(loss_of_second(none) == doctest::Approx(from_zero).epsilon(1e-6));

  TwoBatches t = still_model({"initial_state=random-noise", "initial_state_options.sigma=0.5"});
  const auto link = make_host_link(Device::cpu());
  const auto strategy = make_initial_state("random-noise", {.zero_state = [&](int64_t rows) { return t.model->zero_state(rows); },
                                                            .device = Device::cpu(),
                                                            .link = *link,
                                                            .seed = static_cast<uint64_t>(t.recipe.seed),
                                                            .options = {.sigma = 0.5}});
  const BatchInfo info{.step = 1, .micro = 0, .rows = 4, .resets = {}, .row_ids = t.second.row_ids};
  strategy->prepare(info);
  const RecurrentState h0 = strategy->begin(info);
  const double from_noise = loss_by_hand(*t.model, t.second, h0);
  CHECK(std::abs(from_noise - from_zero) > 1e-4);
  CHECK(loss_of_second(t) == doctest::Approx(from_noise).epsilon(1e-6));
}

// Documents of the given lengths in bytes; with their end-of-text id they have as many targets.
void write_documents(const std::string& path, const std::vector<std::size_t>& lengths) {
  std::ofstream out(path);
  for (std::size_t d = 0; d < lengths.size(); ++d) {
    std::string text;
    for (std::size_t i = 0; i < lengths[d]; ++i) text += static_cast<char>('a' + philox_u64(d, i) % 26);
    out << nlohmann::json{{"text", text}}.dump() << "\n";
  }
}

TEST("tbtt: documents read in rows of T tokens have the loss of the documents in one piece, in every family") {
  for (const ModelFamily* family : model_families()) {
    CAPTURE(family->name);
    const ScratchFolder scratch;
    const std::vector<std::size_t> lengths{100, 100, 60, 52};  // two rows; the last document ends 8 tokens before its row does
    write_documents(scratch.file("documents.jsonl"), lengths);
    const Recipe recipe =
        tiny_recipe({"initial_state=tbtt", "data.arrangement=streams", "data.stream_unit=document", "train.batch_size=2", "train.steps=8",
                     "train.grad_accumulation=2", "optimizer.lr=0", "optimizer.min_lr=0", "data.files=" + scratch.file("documents.jsonl")},
                    family->name);
    const auto model = tiny_model(recipe);
    double in_rows = 0;
    std::vector<double> targets(8, 40);  // of each step
    targets[7] = 32;
    const TrainingJob job{.recipe = recipe,
                          .folder = RunFolder::create(scratch.path(), "tbtt"),
                          .tokenizer = open_tokenizer("bytes"),
                          .resume = false,
                          .evaluate = {},
                          .messages = nullptr,
                          .on_step = [&](const LoggedStep& s) { in_rows += s.loss * targets[static_cast<std::size_t>(s.step - 1)]; }};
    run_training(job, *model);

    double in_one_piece = 0;
    for (std::size_t d = 0; d < lengths.size(); ++d) {
      Batch document;
      document.rows = 1;
      document.length = static_cast<int64_t>(lengths[d]);
      for (std::size_t i = 0; i < lengths[d]; ++i) document.targets.push_back(static_cast<int32_t>('a' + philox_u64(d, i + 1) % 26));
      document.targets.back() = 256;  // end of text
      for (std::size_t i = 0; i < lengths[d]; ++i) document.tokens.push_back(static_cast<int32_t>('a' + philox_u64(d, i) % 26));
      in_one_piece += loss_by_hand(*model, document, {}) * static_cast<double>(lengths[d]);
    }
    CHECK(in_rows == doctest::Approx(in_one_piece).epsilon(1e-6));
  }
}

TEST("initial states: micro-batches give the step of the whole batch, with every strategy") {
  for (const InitialStateStrategy& strategy : initial_state_strategies()) {
    CAPTURE(strategy.name);
    auto weights_after = [&](const char* accumulation) {
      auto settings = settings_of(strategy);
      settings.insert(settings.end(), {std::string("train.grad_accumulation=") + accumulation, "initial_state_options.probability=0.7"});
      const Recipe recipe = tiny_recipe(settings);
      const auto model = tiny_model(recipe);
      Trainer trainer(recipe, *model);
      for (uint64_t step = 0; step < 4; ++step) {
        Batch batch = made_up_batch(recipe, step);
        if (step > 0) batch.resets = {0, 1, 0, 0};
        step_and_report(trainer, batch);
      }
      return model->parameters().flat_master().to_vector<double>();
    };
    const auto whole = weights_after("1");
    expect_close(weights_after("2"), whole, 2e-5);
    expect_close(weights_after("4"), whole, 2e-5);
  }
}

TEST("initial states: interrupted and resumed equals uninterrupted, bit for bit, with every strategy in every family") {
  for (const ModelFamily* family : model_families()) {
    for (const InitialStateStrategy& strategy : initial_state_strategies()) {
      CAPTURE(family->name);
      CAPTURE(strategy.name);
      auto settings = settings_of(strategy);
      settings.insert(settings.end(), {"train.grad_accumulation=2", "initial_state_options.probability=0.7"});
      check_resume(settings, Device::cpu(), family->name);
    }
  }
}

TEST("a step replayed as a graph gives the bits of one that is launched, with every strategy in every family") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  for (const ModelFamily* family : model_families()) {
    for (const InitialStateStrategy& strategy : initial_state_strategies()) {
      for (const bool masked : {false, true}) {
        if (is_left_out()) continue;
        CAPTURE(family->name);
        CAPTURE(strategy.name);
        CAPTURE(masked);
        auto run = [&](bool graph) {
          auto settings = settings_of(strategy);
          settings.insert(settings.end(), {"train.dtype=bf16", "initial_state_options.probability=0.7",
                                           std::string("train.grad_accumulation=") + (masked ? "1" : "2"),
                                           std::string("train.graph=") + (graph ? "true" : "false")});
          const Recipe recipe = tiny_recipe(settings, family->name);
          const auto model = tiny_model(recipe, Device::cuda());
          Trainer trainer(recipe, *model);
          std::vector<double> numbers;
          for (uint64_t step = 0; step < 6; ++step) {
            Batch batch = made_up_batch(recipe, step);
            if (step > 0) batch.resets = {0, 1, 0, 0};
            if (masked) batch.mask[step] = batch.mask[7 + step] = 0;
            const StepReport report = step_and_report(trainer, batch);
            numbers.insert(numbers.end(), {report.loss, report.grad_norm});
            const Tensor other = Tensor::empty(Device::cuda(), Dtype::f32, {1 << 20});  // nobody else is given the graph's memory
            fill(other, NAN);
            if (step == 3) trainer.forget_carried_state();
          }
          CHECK_MESSAGE(trainer.queued().starts_with("a graph of ") == graph, trainer.queued());
          const auto weights = model->parameters().flat_master().to_vector<double>();
          numbers.insert(numbers.end(), weights.begin(), weights.end());
          return numbers;
        };
        CHECK(run(true) == run(false));
      }
    }
  }
}

TEST("initial states: interrupted and resumed equals uninterrupted, bit for bit, with every strategy on a GPU in bf16") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  for (const InitialStateStrategy& strategy : initial_state_strategies()) {
    CAPTURE(strategy.name);
    auto settings = settings_of(strategy);
    settings.insert(settings.end(), {"train.grad_accumulation=2", "initial_state_options.probability=0.7"});
    check_resume(settings, Device::cuda());
  }
}

TEST("initial states: what a strategy stored is refused by another one, and by another model") {
  const ScratchFolder scratch;
  auto trainer_with = [](const LanguageModel& model, const Recipe& recipe) {
    return std::make_unique<Trainer>(recipe, const_cast<LanguageModel&>(model));
  };
  auto stored_by = [&](const char* name) {
    const Recipe recipe = tiny_recipe({std::string("initial_state=") + name});
    const auto model = tiny_model(recipe);
    const auto trainer = trainer_with(*model, recipe);
    step_and_report(*trainer, made_up_batch(recipe, 1));
    const std::string folder = scratch.file(name);
    std::filesystem::create_directories(folder);
    trainer->save(folder);
    return folder;
  };
  const std::string passing = stored_by("state-passing"), fitted = stored_by("fitted-noise"), random = stored_by("random-noise");
  CHECK_FALSE(std::filesystem::exists(random + "/carried_state.safetensors"));
  auto refusal = [&](const char* name, const std::string& folder, std::vector<std::string> settings = {}) {
    settings.push_back(std::string("initial_state=") + name);
    const Recipe recipe = tiny_recipe(settings);
    const auto model = tiny_model(recipe);
    try {
      trainer_with(*model, recipe)->load(folder, 1);
    } catch (const FileError& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  CHECK(refusal("state-passing", passing).empty());
  CHECK(refusal("fitted-noise", fitted).empty());
  CHECK(refusal("fitted-noise", passing).find("not this model's") != std::string::npos);
  CHECK(refusal("state-passing", fitted).find("not this model's") != std::string::npos);
  CHECK(refusal("random-noise", fitted).find("does not keep") != std::string::npos);
  for (const char* carrying : {"state-passing", "fitted-noise"})  // a file that is gone, not a run that starts
    CHECK(refusal(carrying, random).find("lacks the states that its strategy carries on") != std::string::npos);
  CHECK(refusal("zero", random).empty());
  CHECK(refusal("fitted-noise", fitted, {"initial_state_options.cover=ssm"}).find("not this model's") != std::string::npos);
  CHECK(refusal("fitted-noise", fitted, {"initial_state_options.statistics_per=channel"}).find("not this model's") != std::string::npos);
}

}  // namespace
}  // namespace longhand
