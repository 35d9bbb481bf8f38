// What is exchanged when, and how much, told from the calls that one of two processes makes; tests/scale_test.cpp has several train
// together.
#include "train/gradient_exchange.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "tests/support/check.h"
#include "tests/support/tiny_training.h"
#include "train/trainer.h"

namespace longhand {
namespace {

// One of two processes, the other of which never answers: writes down what it is asked for.
class Recorder final : public Communicator {
 public:
  explicit Recorder(int64_t rank = 0) : Communicator(2, rank) {}
  std::vector<std::string> calls;
  std::string describe() const override { return "recorder"; }
  void begin_overlap() override { calls.push_back("begin"); }
  void end_overlap() override { calls.push_back("end"); }
  void join() override { calls.push_back("join"); }
  void as_one(const std::function<void()>& f) override {
    calls.push_back("{");
    f();
    calls.push_back("}");
  }
  void all_reduce_sum(const Tensor& t) override { note("sum", t); }
  void reduce_scatter_sum(const Tensor& t, int64_t) override { note("scatter", t); }
  void all_gather(const Tensor& whole, std::span<const int64_t>) override { note("gather", whole); }
  void broadcast(const Tensor&, int64_t) override {}
  Tensor gather(const Tensor& part) override { return part; }
  std::vector<std::string> all_texts(const std::string& text) override { return {text, text}; }
  int64_t all_reduce_max(int64_t value) override { return value; }
  void barrier() override {}

 protected:
  void end_all(int code) override { std::exit(code); }

 private:
  void note(const char* what, const Tensor& t) {
    calls.push_back(fmt::format("{} {} at {} of {}", what, name_of(t.dtype()), t.offset(), t.numel()));
  }
};

// In flat buffers that begin with the matrices, 4,096 elements being the smallest bucket: table in four of them, then first, second and
// last; the small ones lie together behind them, whatever their weight decay.
void declare(ParameterSet& set) {
  const auto zero = init_constant(0);
  set.declare("table", {128, 128}, {.init = zero});
  set.declare("first", {64, 64}, {.init = zero});
  set.declare("first.conv", {64}, {.init = zero, .decay = true, .full_precision = true});
  set.declare("first.norm", {64}, {.init = zero, .decay = false, .full_precision = true});
  set.declare("second", {64, 64}, {.init = zero});
  set.declare("second.norm", {64}, {.init = zero, .decay = false, .full_precision = true});
  set.declare("last", {64, 64}, {.init = zero});
}

using Calls = std::vector<std::string>;

TEST(
    "gradient exchange: a bucket leaves behind those before it, when its last gradient has arrived; what is ready together leaves as one") {
  ParameterSet set;
  declare(set);
  set.allocate(Device::cpu(), Dtype::f32, Dtype::f32);
  Recorder processes;
  GradientExchange exchange(set, processes);
  REQUIRE(exchange.buckets() == 8);
  const auto told = [&] { return std::exchange(processes.calls, {}); };
  const auto arrives = [&](const char* name) {
    exchange.arrived(name);
    return told();
  };
  exchange.begin();
  CHECK(told() == Calls{"begin"});
  CHECK(arrives("second").empty());  // last is declared behind it
  CHECK(arrives("last") == Calls{"{", "scatter f32 at 24576 of 4096", "scatter f32 at 20480 of 4096", "}"});
  CHECK(arrives("second.norm").empty());
  CHECK(arrives("first").empty());
  CHECK(arrives("first.norm").empty());
  CHECK(arrives("first.conv") == Calls{"{", "scatter f32 at 28672 of 192", "scatter f32 at 16384 of 4096", "}"});
  CHECK(arrives("table") == Calls{"{", "scatter f32 at 12288 of 4096", "scatter f32 at 8192 of 4096", "scatter f32 at 4096 of 4096",
                                  "scatter f32 at 0 of 4096", "}"});
  exchange.complete();
  CHECK(told() == Calls{"end"});
  exchange.end();
  CHECK(told() == Calls{"join"});

  exchange.begin();
  CHECK(told() == Calls{"begin"});
  CHECK(arrives("last").size() == 3);
  exchange.complete();  // what backward did not come to is exchanged all the same
  CHECK(told().size() == 2 + 7 + 1);
}

TEST("gradient exchange: where one process has nothing to learn from last, all send the same groups as it") {
  for (const char* sharded : {"true", "false"})
    for (const int64_t accumulation : {1, 2}) {
      CAPTURE(sharded);
      CAPTURE(accumulation);
      const Recipe recipe = test::tiny_recipe(
          {"train.grad_accumulation=" + std::to_string(accumulation), std::string("train.shard_optimizer=") + sharded, "model.d_model=32"});
      // The calls of a process, and the groups among them, in a step on a batch whose rows count but for [first, last).
      const auto calls_of = [&](int64_t rank, int64_t first, int64_t last) {
        Recorder processes(rank);
        const auto model = test::tiny_model(recipe);
        Trainer trainer(recipe, *model, &processes);
        Batch batch = test::made_up_batch(recipe, 1);
        std::fill(batch.mask.begin() + first * batch.length, batch.mask.begin() + last * batch.length, uint8_t{0});
        trainer.step(batch);
        return std::pair(processes.calls, std::count(processes.calls.begin(), processes.calls.end(), "{"));
      };
      const int64_t rows = recipe.train.batch_size, idle = rows - rows / accumulation / 2;  // the rows that process 1 has last
      const auto [learning, few] = calls_of(0, idle, rows);
      CHECK(learning == calls_of(1, idle, rows).first);
      const auto [whole, many] = calls_of(0, 0, 0);
      CHECK(whole == calls_of(1, 0, 0).first);
      CHECK(many > few);
      if (accumulation == 1) continue;
      CHECK(calls_of(0, 1, 2).first == whole);  // nothing in the first micro-batch, which is not exchanged
      CHECK(calls_of(1, 1, 2).first == whole);
    }
}

TEST("gradient exchange: without overlap everything leaves at the end, and unsharded it is summed everywhere") {
  ParameterSet set;
  declare(set);
  set.allocate(Device::cpu(), Dtype::f32, Dtype::f32);
  Recorder processes;
  GradientExchange exchange(set, processes, {.sharded = false, .overlap = false});
  CHECK(exchange.own().empty());
  exchange.begin();
  for (const Parameter& p : set.all()) exchange.arrived(p.name);
  CHECK(processes.calls.empty());
  exchange.complete();
  REQUIRE(processes.calls.size() == 2 + 8 + 1);
  CHECK(processes.calls[1] == "sum f32 at 24576 of 4096");
  processes.calls.clear();
  exchange.share_weights();
  CHECK(processes.calls.empty());
  CHECK(exchange.traffic().gradients == 2 * 28864 * 4 / 2);
}

TEST("gradient exchange: of the masters only what products read in full precision is told in a step") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  ParameterSet set;
  declare(set);
  set.allocate(Device::cuda(0), Dtype::f32, Dtype::bf16);
  Recorder processes;
  GradientExchange exchange(set, processes);
  REQUIRE(exchange.buckets() == 8);
  exchange.share_weights();
  CHECK(std::count(processes.calls.begin(), processes.calls.end(), "gather f32 at 28672 of 192") == 1);
  const auto halves = [](const std::string& call) { return call.starts_with("gather bf16"); };
  CHECK(std::count_if(processes.calls.begin(), processes.calls.end(), halves) == 8);
  CHECK(processes.calls.size() == 2 + 8 + 1);
  CHECK(exchange.traffic().weights == (2 * 28864 + 4 * 192) / 2);
  processes.calls.clear();
  exchange.share_masters();
  CHECK(processes.calls.size() == 2 + 7);
}

}  // namespace
}  // namespace longhand
