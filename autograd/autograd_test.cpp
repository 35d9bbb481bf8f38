// The tape, views, parameters, and the gradient check itself.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "autograd/gradcheck.h"
#include "autograd/gradient_arrival.h"
#include "autograd/parameters.h"
#include "autograd/tape.h"
#include "core/allocator.h"
#include "core/error.h"
#include "core/files.h"
#include "core/op_scope.h"
#include "core/safetensors.h"
#include "core/switches.h"
#include "tests/support/check.h"

using namespace longhand;
using namespace longhand::test;

namespace {

namespace fs = std::filesystem;
const Device kCpu = Device::cpu();

// y = x^2 elementwise; `slope` is 2 when the gradient is right.
Variable square(const Variable& x, double slope = 2.0) {
  auto values = x.value().to_vector<double>();
  for (double& v : values) v *= v;
  return record("square", Tensor::from(kCpu, x.shape(), values), {x}, [x, slope](BackwardCall& call) {
    const auto in = x.value().to_vector<double>();
    auto grad = call.grad(0).to_vector<double>();
    for (std::size_t i = 0; i < grad.size(); ++i) grad[i] *= slope * in[i];
    const Tensor out = call.buffer(0);
    copy(out, Tensor::from(kCpu, x.shape(), grad));
    call.set(0, out);
  });
}

Tensor random64(Shape shape, uint64_t seed) {
  return random_tensor(kCpu, Dtype::f64, shape, seed);
}

}  // namespace

TEST("a right gradient passes the gradient check and a wrong one fails") {
  const std::vector<Tensor> inputs{random64({3, 4}, 1)};
  CHECK(gradcheck([](const auto& in) { return std::vector<Variable>{square(in[0])}; }, inputs).worst < 1e-7);
  const auto wrong = gradcheck([](const auto& in) { return std::vector<Variable>{square(in[0], 2.001)}; }, inputs);
  CHECK(wrong.worst > 1e-4);
  CHECK(wrong.where.find("input 0") != std::string::npos);
}

TEST("a variable used twice gets the sum of both gradients") {
  const Variable x = Variable::leaf(random64({5}, 2));
  const auto f = [](const auto& in) { return std::vector<Variable>{add(square(in[0]), add(in[0], in[0]))}; };
  CHECK(gradcheck(f, {random64({5}, 2)}).worst < 1e-7);
}

TEST("split and reshape pass gradients through views") {
  const auto f = [](const std::vector<Variable>& in) {
    const auto parts = split(in[0], {2, 4, 1});
    const Variable heads = reshape(parts[1], {2, 3, 2, 2});
    // parts[2] is used twice and parts[0] once, so buffers inside the whole and extra contributions both occur.
    return std::vector<Variable>{square(parts[0]), square(heads), add(square(parts[2]), parts[2])};
  };
  CHECK(gradcheck(f, {random64({2, 3, 7}, 3)}).worst < 1e-7);
}

TEST("parts of a split write into one gradient without a copy, and unused parts are zero") {
  const Variable x = Variable::leaf(random64({2, 5}, 4));
  const auto parts = split(x, {2, 3});
  const Variable y = square(parts[1]);
  backward({y}, {Tensor::full(kCpu, Dtype::f64, {2, 3}, 1.0)});
  const auto grad = x.grad().to_vector<double>();
  const auto value = x.value().to_vector<double>();
  for (std::size_t i = 0; i < grad.size(); ++i) CHECK(grad[i] == doctest::Approx(i % 5 < 2 ? 0.0 : 2 * value[i]));
}

TEST("a gradient written inside a whole may go to another input too") {
  // x + y, whose backward writes y's gradient once and hands the same tensor to both.
  const auto shared_add = [](const Variable& x, const Variable& y) {
    const Tensor sum = x.value().clone();
    add_scaled(sum, y.value());
    return record("shared_add", sum, {x, y}, [](BackwardCall& call) {
      const Tensor grad = call.buffer(1);
      copy(grad, call.grad(0));
      call.set(0, grad);
      call.set(1, grad);
    });
  };
  const auto f = [&](const std::vector<Variable>& in) {
    const Variable x = square(in[0]);  // walked after the split
    const auto parts = split(in[1], {2, 3});
    const Variable second = square(parts[0]);  // a second contribution to the part, after the shared one
    return std::vector<Variable>{shared_add(x, parts[0]), second, square(parts[1])};
  };
  CHECK(gradcheck(f, {random64({2, 2}, 12), random64({2, 5}, 13)}).worst < 1e-7);
}

// The second gradient of a variable is added to the first in its place, unless that place is somebody else's gradient too.
TEST("a second gradient is added to the first without a copy, but not where two variables share it") {
  const auto passed_on = [](const Variable& x) { return add(x, Variable(Tensor::zeros(kCpu, Dtype::f64, x.shape()))); };
  const auto sum_in_buffers = [](const Variable& x, const Variable& y, bool shared) {
    Tensor sum = x.value().clone();
    add_scaled(sum, y.value());
    return record("sum", sum, {x, y}, [shared](BackwardCall& call) {
      const Tensor of_x = call.buffer(0), of_y = shared ? of_x : call.buffer(1);
      for (const Tensor& grad : {of_x, of_y}) copy(grad, call.grad(0));
      call.set(0, of_x);
      call.set(1, of_y);
    });
  };
  for (const bool shared : {false, true}) {
    CAPTURE(shared);
    const auto f = [&](const std::vector<Variable>& in) {
      const Variable x = square(in[0]), y = square(in[1]);
      const Variable again = square(x);  // walked behind the sum: adds to the gradient that the sum has given to x
      return std::vector<Variable>{again, sum_in_buffers(x, y, shared)};
    };
    CHECK(gradcheck(f, {random64({2, 3}, 20), random64({2, 3}, 21)}).worst < 1e-7);
  }
  constexpr int64_t kLarge = 1 << 16;
  const auto peak = [&](bool shared) {
    const Variable x = passed_on(Variable::leaf(random64({kLarge}, 1))), y = passed_on(Variable::leaf(random64({kLarge}, 2)));
    const Variable again = passed_on(x), sum = sum_in_buffers(x, y, shared);
    const Tensor ones = Tensor::full(kCpu, Dtype::f64, {kLarge}, 1.0);
    kCpu.allocator().reset_peak();
    const int64_t before = kCpu.allocator().use().live_bytes;
    backward({again, sum}, {ones, ones});
    return (kCpu.allocator().use().peak_bytes - before) / (kLarge * 8);
  };
  CHECK(peak(false) == 2);  // both gradients of the sum, one of which takes the second in
  CHECK(peak(true) == 2);   // their one gradient, and the copy of it that takes the second in
}

TEST("an op that can sum in place adds to the gradient that an activation has so far, but not where somebody else holds that") {
  const auto passed_on = [](const Variable& x) { return add(x, Variable(Tensor::zeros(kCpu, Dtype::f64, x.shape()))); };
  std::vector<double> betas;
  const auto three_times = [&betas](const Variable& x) {
    Tensor y = x.value().clone();
    multiply(y, 3);
    return record("three_times", y, {x}, [&betas](BackwardCall& call) {
      const auto [grad, beta] = call.accumulate(0);
      if (beta == 0) fill(grad, 0);
      add_scaled(grad, call.grad(0), 3);
      betas.push_back(beta);
    });
  };
  for (const bool shared : {false, true}) {
    CAPTURE(shared);
    const auto f = [&](const std::vector<Variable>& in) {
      const Variable x = square(in[0]), again = three_times(x);
      return std::vector<Variable>{shared ? passed_on(x) : three_times(x), again};
    };
    CHECK(gradcheck(f, {random64({2, 3}, 22)}).worst < 1e-7);
    const std::vector<double> expected = shared ? std::vector<double>{0} : std::vector<double>{0, 1};
    CHECK(std::vector<double>(betas.end() - std::ssize(expected), betas.end()) == expected);
  }
  const auto parts = [&](const std::vector<Variable>& in) {
    const auto halves = split(square(in[0]), {2, 3});
    return std::vector<Variable>{three_times(halves[0]), three_times(halves[0]), three_times(halves[1])};
  };
  CHECK(gradcheck(parts, {random64({2, 5}, 23)}).worst < 1e-7);
  const Variable x = Variable::leaf(random64({3}, 24));
  backward({three_times(x)}, {Tensor::full(kCpu, Dtype::f64, {3}, 1.0)});
  CHECK(x.grad().to_vector<double>() == std::vector<double>{3, 3, 3});
}

TEST("nothing is recorded under NoGrad, and constants want no gradient") {
  const Variable x = Variable::leaf(random64({3}, 5));
  {
    const NoGrad no_grad;
    CHECK_FALSE(square(x).requires_grad());
  }
  CHECK(square(x).requires_grad());
  CHECK_FALSE(square(x.detach()).requires_grad());
  CHECK_THROWS_AS(backward({square(x.detach())}, {Tensor::zeros(kCpu, Dtype::f64, {3})}), ValueError);
}

TEST("a graph is walked once") {
  const Variable x = Variable::leaf(random64({1}, 6));
  const Variable y = square(x);
  backward(y);
  CHECK_THROWS_AS(backward(y), ValueError);
}

TEST("backward frees what nodes kept") {
  const Variable x = Variable::leaf(random64({4}, 7));
  auto kept = std::make_shared<int>(1);
  const Variable y = record("keeps", x.value().clone(), {x}, [kept](BackwardCall& call) { call.set(0, call.grad(0)); });
  CHECK(kept.use_count() == 2);
  backward({y}, {Tensor::zeros(kCpu, Dtype::f64, {4})});
  CHECK(kept.use_count() == 1);
}

TEST("parameters add into one flat buffer, and accumulation starts anew after clear_grads") {
  ParameterSet set;
  Parameter* a = set.declare("a", {3}, {.init = init_constant(2), .decay = false});
  Parameter* b = set.declare("b", {2, 2}, {.init = init_normal(1)});
  set.allocate(kCpu, Dtype::f64, Dtype::f64);
  set.initialize(1);
  CHECK(set.count() == 7);
  CHECK(set.decayed_elements() == 64);  // b stands first because it decays
  CHECK(b->master.offset() == 0);
  auto run = [&] { backward({square(a->variable)}, {Tensor::full(kCpu, Dtype::f64, {3}, 1.0)}); };
  set.clear_grads();
  run();
  run();
  set.complete_grads();
  CHECK(a->grad.to_vector<double>() == std::vector<double>(3, 8.0));
  CHECK(b->grad.to_vector<double>() == std::vector<double>(4, 0.0));
  CHECK(set.flat_grad().to_vector<double>()[64] == 8.0);
  set.clear_grads();
  run();
  CHECK(a->grad.to_vector<double>() == std::vector<double>(3, 4.0));
  CHECK_THROWS_AS(set.declare("c", {1}, {}), ValueError);
}

TEST("parameters of full precision lie side by side, the decayed before the others, and the rest keep their order") {
  ParameterSet set;
  const auto add = [&](const char* name, bool decay, bool full) {
    return set.declare(name, {64}, {.init = init_constant(0), .decay = decay, .full_precision = full});
  };
  const std::vector<Parameter*> wanted = [&] {
    Parameter *norm = add("norm", false, true), *a = add("a", true, false), *conv = add("conv", true, true),
              *bias = add("bias", false, false), *b = add("b", true, false);
    return std::vector<Parameter*>{a, b, conv, norm, bias};
  }();
  set.allocate(kCpu, Dtype::f32, Dtype::f32);
  for (std::size_t i = 0; i < wanted.size(); ++i) CHECK(wanted[i]->master.offset() == static_cast<int64_t>(64 * i));
  CHECK(set.decayed_elements() == 3 * 64);
}

TEST("a gradient's arrival is told once, when it is whole, in the order of the walk") {
  ParameterSet set;
  Parameter* twice = set.declare("twice", {1}, {.init = init_constant(3)});
  Parameter* late = set.declare("late", {1}, {.init = init_constant(2)});
  Parameter* early = set.declare("early", {1}, {.init = init_constant(5)});
  set.declare("unused", {1}, {.init = init_constant(1)});
  set.allocate(kCpu, Dtype::f64, Dtype::f64);
  set.initialize(1);
  // twice^2 (recorded first, reached last) + late^2 + (early^2 + (twice + twice)); reached: early, late, twice
  const Variable first = square(twice->variable), second = square(late->variable), doubled = add(twice->variable, twice->variable);
  const Variable root = add(add(first, second), add(square(early->variable), doubled));
  std::vector<std::string> order;
  backward(root, [&](const std::string& name) {
    order.push_back(name);
    CHECK(set.find(name)->grad.to_vector<double>()[0] == (name == "twice" ? 2 * 3 + 2 : name == "late" ? 4 : 10));
  });
  CHECK(order == std::vector<std::string>{"early", "late", "twice"});
}

TEST("gradients take memory from the first backward on, not before") {
  ParameterSet set;
  Parameter* a = set.declare("a", {1000}, {.init = init_constant(2)});
  set.allocate(kCpu, Dtype::f64, Dtype::f64);
  set.initialize(1);
  const int64_t before = kCpu.allocator().use().live_bytes;
  set.clear_grads();
  square(a->variable);
  CHECK_FALSE(a->grad.defined());
  CHECK(kCpu.allocator().use().live_bytes == before);
  ParameterSet moved = std::move(set);
  backward({square(a->variable)}, {Tensor::full(kCpu, Dtype::f64, {1000}, 1.0)});
  CHECK(a->grad.to_vector<double>() == std::vector<double>(1000, 4.0));
  CHECK(kCpu.allocator().use().live_bytes >= before + 8000);
  CHECK(moved.flat_grad().same_storage(a->grad));
}

TEST("initial values depend on seed and name only") {
  auto values = [](bool swapped, uint64_t seed) {
    ParameterSet set;
    if (swapped) set.declare("other", {7}, {.init = init_constant(0)});
    const Parameter* p = set.declare("w", {5}, {.init = init_uniform(-1, 1)});
    set.allocate(kCpu, Dtype::f32, Dtype::f32);
    set.initialize(seed);
    return p->master.to_vector<float>();
  };
  CHECK(values(false, 1) == values(true, 1));
  CHECK(values(false, 1) != values(false, 2));
}

TEST("LONGHAND_CHECK names op, layer, output and index of the first NaN") {
  const SwitchScope scope([](Switches& s) { s.check = true; });
  const LayerScope layer("layers", 2);
  const Variable x = Variable::leaf(Tensor::from(kCpu, {3}, std::vector<double>{1, NAN, 2}));
  try {
    square(x);
    FAIL("a NaN passed");
  } catch (const NumericError& error) {
    const std::string text = error.what();
    CHECK(text.find("square: output 0") != std::string::npos);
    CHECK(text.find("layers.2") != std::string::npos);
    CHECK(text.find("1 (row-major)") != std::string::npos);
  }
}

TEST("LONGHAND_CHECK sees a NaN that appears in backward") {
  const SwitchScope scope([](Switches& s) { s.check = true; });
  const Variable x = Variable::leaf(random64({2}, 8));
  const Variable y =
      record("breaks", x.value().clone(), {x}, [](BackwardCall& call) { call.set(0, Tensor::full(kCpu, Dtype::f64, {2}, NAN)); });
  CHECK_THROWS_AS(backward({y}, {Tensor::zeros(kCpu, Dtype::f64, {2})}), NumericError);
}

TEST("the graph is printed with ops and shapes") {
  const Variable x = Variable::leaf(random64({2}, 9), "weight");
  const std::string dot = graph_dot(square(x));
  CHECK(dot.find("square") != std::string::npos);
  CHECK(dot.find("weight [2]") != std::string::npos);
}

TEST("LONGHAND_GRAPH writes the graph of the first loss that is walked, and of no other") {
  const ScratchFolder scratch;
  const std::string file = scratch.file("graph.dot");
  const SwitchScope scope([&](Switches& s) { s.graph = file; });
  const Variable first = Variable::leaf(random64({1}, 9), "first"), second = Variable::leaf(random64({1}, 9), "second");
  const std::string expected = graph_dot(square(first));
  backward(square(first));
  backward(square(second));
  const std::string written = read_text_file(file);
  CHECK(written.find("first [1]") != std::string::npos);
  CHECK(written.find("second") == std::string::npos);
  CHECK(std::count(written.begin(), written.end(), '\n') == std::count(expected.begin(), expected.end(), '\n'));  // addresses differ
}

TEST("LONGHAND_DUMP writes what the ops of the first forward gave and were given, and ends with the second") {
  const ScratchFolder scratch;
  const SwitchScope scope([&](Switches& s) { s.dump = scratch.file("dump"); });
  const Variable x = Variable::leaf(Tensor::from<double>(kCpu, {1}, std::vector<double>{3}));
  for (const double times : {1.0, 2.0}) {
    const LayerScope layer("layers", 1);
    const Variable squared = square(x);
    backward({add(squared, squared)}, {Tensor::full(kCpu, Dtype::f64, {1}, times)});
  }
  const auto value = [&](const std::string& file, const std::string& name) {
    return read_safetensors(scratch.file("dump/" + file + ".safetensors")).at(name).to_vector<double>();
  };
  CHECK(value("0000-layers.1-square", "output.0") == std::vector<double>{9});
  CHECK(value("0000-layers.1-square-grad", "grad.0") == std::vector<double>{2});  // two uses, of the first walk
  CHECK(value("0001-layers.1-add", "output.0") == std::vector<double>{18});
  CHECK(value("0001-layers.1-add-grad", "grad.0") == std::vector<double>{1});
  CHECK(std::distance(fs::directory_iterator(scratch.file("dump")), {}) == 4);
}

TEST("LONGHAND_CHECK sees a NaN in a gradient that is summed in place") {
  const SwitchScope scope([](Switches& s) { s.check = true; });
  ParameterSet set;
  Parameter* weight = set.declare("weight", {2}, {.init = init_constant(1)});
  set.allocate(kCpu, Dtype::f64, Dtype::f64);
  set.initialize(1);
  const Variable y = record("sums", Tensor::zeros(kCpu, Dtype::f64, {2}), {weight->variable},
                            [](BackwardCall& call) { fill(call.accumulate(0).destination, NAN); });
  CHECK_THROWS_AS(backward({y}, {Tensor::zeros(kCpu, Dtype::f64, {2})}), NumericError);
}

TEST("a place for a gradient that nobody wants is refused") {
  const Variable x = Variable::leaf(random64({2}, 10));
  for (const bool sum : {false, true}) {
    const Variable y = record("asks", x.value().clone(), {x, Variable()},
                              [sum](BackwardCall& call) { sum ? (void)call.accumulate(1) : (void)call.buffer(1); });
    CHECK_THROWS_AS(backward({y}, {Tensor::zeros(kCpu, Dtype::f64, {2})}), ValueError);
  }
}

TEST("the trace of a backward shows the gradient that came in") {
  const ScratchFolder scratch;
  const std::string path = scratch.file("trace.txt");
  const Variable y = square(Variable::leaf(random64({3, 2}, 11)));
  const int kept = dup(2), file = open(path.c_str(), O_WRONLY | O_CREAT, 0600);
  dup2(file, 2);
  {
    const SwitchScope scope([](Switches& s) { s.trace = 2; });
    backward({y}, {Tensor::zeros(kCpu, Dtype::f64, {3, 2})});
  }
  dup2(kept, 2);
  close(kept), close(file);
  const std::string trace = read_text_file(path);
  CHECK(trace.find("square_backward") != std::string::npos);
  CHECK(trace.find("[3, 2] f64 cpu") != std::string::npos);
}

TEST("a trace that cannot be written does not end the program") {
  const int kept = dup(2), full = open("/dev/full", O_WRONLY);
  dup2(full, 2);
  {
    const SwitchScope scope([](Switches& s) { s.trace = 1; });
    const OpScope op("traced");
  }
  dup2(kept, 2);
  close(kept), close(full);
  CHECK(current_op_path().empty());
}

TEST("joined parameters are one matrix over the same values and gradients") {
  ParameterSet set;
  auto declare = [&](const char* name, int64_t rows, int64_t width) { return set.declare(name, {rows, width}, {.init = init_normal(1)}); };
  Parameter *a = declare("a", 3, 64), *b = declare("b", 2, 64), *c = declare("c", 2, 48), *d = declare("d", 1, 48),
            *e = declare("e", 1, 48);
  const JoinedParameters *ab = set.join({a, b}), *cd = set.join({c, d}), *de = set.join({d, e});
  CHECK_THROWS_WITH_AS(set.join({b, c}), doctest::Contains("[2, 48]"), ShapeError);
  set.allocate(kCpu, Dtype::f64, Dtype::f64);
  set.initialize(1);
  REQUIRE(ab->variable.shape() == Shape{5, 64});
  CHECK_FALSE(cd->variable.defined());  // c has 96 elements: a gap follows
  CHECK_FALSE(de->variable.defined());
  CHECK(ab->variable.value().slice(0, 3, 5).to_vector<double>() == b->master.to_vector<double>());

  set.flat_grad();
  fill(set.flat_grad(), 7);  // what was there before
  const Tensor grad = random64({5, 64}, 12);
  auto contribute = [](const Variable& to, const Tensor& value) {
    const Variable y =
        record("contributes", Tensor::zeros(kCpu, Dtype::f64, {}), {to}, [value](BackwardCall& call) { call.set(0, value); });
    backward(y);
  };
  for (int step = 0; step < 2; ++step) {
    set.clear_grads();
    contribute(ab->variable, grad);
    contribute(ab->variable, grad);
    contribute(c->variable, random64({2, 48}, 13));
    set.complete_grads();
    CHECK(a->grad.to_vector<double>()[5] == 2 * grad.to_vector<double>()[5]);
    CHECK(b->grad.to_vector<double>()[70] == 2 * grad.to_vector<double>()[3 * 64 + 70]);
    CHECK(c->grad.to_vector<double>() == random64({2, 48}, 13).to_vector<double>());
    CHECK(d->grad.to_vector<double>() == std::vector<double>(48, 0));
  }
  contribute(b->variable, random64({2, 64}, 14));
  CHECK_THROWS_WITH_AS(set.complete_grads(), doctest::Contains("b"), ValueError);
}
