// The state as a value: rows, statistics, files.
#include "models/recurrent_state.h"

#include <cmath>

#include "core/error.h"
#include "core/safetensors.h"
#include "tests/support/check.h"

using namespace longhand;
using namespace longhand::test;

namespace {
RecurrentState example() {
  const Device cpu = Device::cpu();
  const Tensor ssm = Tensor::from(cpu, {2, 2, 1, 2}, std::vector<float>{1, 3, 5, 5, 2, 4, -7, 7});
  return RecurrentState({{{"ssm", ssm}, {"conv", Tensor::full(cpu, Dtype::f32, {2, 3, 4}, 1)}}, {{"ssm", ssm.clone()}}});
}
}  // namespace

TEST("rows can be selected and reset") {
  const RecurrentState state = example();
  CHECK(state.rows() == 2);
  CHECK(state.select_rows({1, 1, 0}).get(0, "ssm").value().to_vector<float>() == std::vector<float>{2, 4, -7, 7, 2, 4, -7, 7, 1, 3, 5, 5});
  const RecurrentState reset = state.reset_rows({1, 0});
  CHECK(reset.get(0, "ssm").value().to_vector<float>() == std::vector<float>{0, 0, 0, 0, 2, 4, -7, 7});
  CHECK(state.get(0, "ssm").value().to_vector<float>()[0] == 1);  // the original is untouched
  CHECK_THROWS_AS(state.reset_rows({1}), ShapeError);
}

TEST("states can be joined row after row, if they have the same tensors") {
  const RecurrentState state = example();
  const RecurrentState joined = RecurrentState::concatenate({state.select_rows({1}), state, state.select_rows({0})});
  CHECK(joined.rows() == 4);
  const auto expected = state.select_rows({1, 0, 1, 0});
  for (std::size_t layer = 0; layer < 2; ++layer)
    for (const auto& [name, variable] : expected.layers()[layer])
      CHECK(joined.get(layer, name).value().to_vector<float>() == variable.value().to_vector<float>());
  CHECK(joined.layers()[1].size() == 1);
  CHECK_THROWS_AS(RecurrentState::concatenate({}), ValueError);
  const Device cpu = Device::cpu();
  const Tensor ssm = Tensor::zeros(cpu, Dtype::f32, {1, 2, 1, 2}), conv = Tensor::zeros(cpu, Dtype::f32, {1, 3, 4});
  const auto joins = [&](std::vector<LayerState> layers) { RecurrentState::concatenate({state, RecurrentState(std::move(layers))}); };
  CHECK_NOTHROW(joins({{{"ssm", ssm}, {"conv", conv}}, {{"ssm", ssm}}}));
  CHECK_THROWS_AS(joins({{{"ssm", ssm}, {"conv", conv}}}), ShapeError);
  CHECK_THROWS_AS(joins({{{"ssm", ssm}, {"conv", conv}}, {{"conv", conv}}}), ShapeError);
  CHECK_THROWS_AS(joins({{{"ssm", ssm}, {"conv", conv}}, {{"ssm", ssm}, {"conv", conv}}}), ShapeError);
  CHECK_THROWS_AS(joins({{{"ssm", ssm}, {"conv", ssm}}, {{"ssm", ssm}}}), ShapeError);
  CHECK_THROWS_AS(joins({{{"ssm", Tensor::zeros(cpu, Dtype::f64, {1, 2, 1, 2})}, {"conv", conv}}, {{"ssm", ssm}}}), ShapeError);
}

TEST("statistics are per head over rows and elements") {
  const auto heads = example().statistics(0, "ssm", true);
  REQUIRE(heads.size() == 2);
  CHECK(heads[0].mean == doctest::Approx(2.5));
  CHECK(heads[0].std == doctest::Approx(std::sqrt(1.25)));
  CHECK(heads[1].max_abs == 7);
  CHECK(heads[1].norm == doctest::Approx(std::sqrt(25.0 + 25 + 49 + 49)));
  CHECK(example().statistics(0, "ssm", false)[0].count == 8);
}

TEST("a saved state is the same state") {
  const ScratchFolder scratch;
  const RecurrentState state = example();
  state.save(scratch.file("state.safetensors"));
  const RecurrentState read = RecurrentState::load(scratch.file("state.safetensors"), Device::cpu());
  REQUIRE(read.layers().size() == 2);
  CHECK(read.get(1, "ssm").value().to_vector<float>() == state.get(1, "ssm").value().to_vector<float>());
  CHECK(read.get(0, "conv").shape() == Shape{2, 3, 4});
  CHECK(read.size_bytes() == state.size_bytes());
}

TEST("an absent state has no rows and no tensors") {
  const RecurrentState none;
  CHECK(none.absent());
  CHECK(none.rows() == 0);
  CHECK_FALSE(none.get(3, "ssm").defined());
}

TEST("a file that is not a whole state is refused with its path") {
  const ScratchFolder scratch;
  const std::string path = scratch.file("state.safetensors");
  const Tensor t = Tensor::zeros(Device::cpu(), Dtype::f32, {2, 3});
  auto refusal = [&](const std::map<std::string, Tensor>& tensors) {
    write_safetensors(path, tensors);
    try {
      RecurrentState::load(path, Device::cpu());
    } catch (const FileError& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  CHECK(refusal({{"layers.0.ssm", t}, {"layers.1.ssm", t}}).empty());
  for (const auto& [tensors, reason] : std::vector<std::pair<std::map<std::string, Tensor>, std::string>>{
           {{{"ssm", t}}, "layers.<number>.<tensor>"},
           {{{"layers.0.", t}}, "layers.<number>.<tensor>"},
           {{{"layers.0.ssm", t}, {"layers.1.ssm", t}, {"layers.01.ssm", t}}, "layers.<number>.<tensor>"},
           {{{"layers.0.ssm", t}, {"layers.2.ssm", t}}, "a layer is missing"},
           {{{"layers.0.ssm", t}, {"layers.1.ssm", t.slice(0, 0, 1)}}, "rows"}}) {
    CHECK_MESSAGE(refusal(tensors).find(reason) != std::string::npos, reason);
    CHECK(refusal(tensors).find(path) != std::string::npos);
  }
}
