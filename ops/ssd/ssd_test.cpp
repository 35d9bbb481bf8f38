// SSD: the formula, its gradients, and the fast forms against the plain one.
#include "ops/ssd/ssd.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <numeric>
#include <utility>

#include "autograd/gradcheck.h"
#include "autograd/tape.h"
#include "core/error.h"
#include "core/safetensors.h"
#include "core/switches.h"
#include "tests/support/check.h"
#include "tests/support/draws.h"
#include "tests/support/last_row.h"
#include "tests/support/parity.h"

namespace longhand {
namespace {

using test::expect_close;

constexpr double kGradcheckTolerance = 1e-7;
constexpr double kF64Tolerance = 1e-12;  // sums of at most a few thousand products in f64
struct Sizes {
  int64_t B, T, H, P, G, N;
};

struct Given {
  bool D = true, D_per_channel = false, h0 = true;
  double dt_shift = 0, dt_scale = 1;
};

SsdInputs random_inputs(const Sizes& s, uint64_t seed, const Given& given = {}, Dtype dtype = Dtype::f64) {
  const Device cpu = Device::cpu();
  auto make = [&](Shape shape, uint64_t k, double scale, double mean = 0) {
    return random_tensor(cpu, dtype, shape, seed * 100 + k, scale, mean);
  };
  SsdInputs in;
  in.x = make({s.B, s.T, s.H, s.P}, 1, 1);
  in.dt = make({s.B, s.T, s.H}, 2, given.dt_scale, given.dt_shift);
  in.A_log = make({s.H}, 3, 0.5);
  in.B_t = make({s.B, s.T, s.G, s.N}, 4, 1);
  in.C_t = make({s.B, s.T, s.G, s.N}, 5, 1);
  if (given.D) in.D_skip = given.D_per_channel ? make({s.H, s.P}, 6, 1) : make({s.H}, 6, 1);
  in.dt_bias = make({s.H}, 7, 0.5);
  if (given.h0) in.h0 = make({s.B, s.H, s.P, s.N}, 8, 1);
  return in;
}

constexpr const char* kNames[] = {"x", "dt", "A_log", "B_t", "C_t", "D_skip", "dt_bias", "h0"};
std::vector<Tensor*> members(SsdInputs& in) {
  return {&in.x, &in.dt, &in.A_log, &in.B_t, &in.C_t, &in.D_skip, &in.dt_bias, &in.h0};
}

std::vector<Variable> leaves_of(SsdInputs in) {
  std::vector<Variable> leaves;
  for (Tensor* t : members(in)) leaves.push_back(t->defined() ? Variable::leaf(*t) : Variable());
  return leaves;
}

SsdOutput run(const std::vector<Variable>& v, const SsdOptions& options = {}) {
  return ssd(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], options);
}
SsdOutput run(SsdInputs in, const SsdOptions& options = {}) {
  std::vector<Variable> constants;
  for (Tensor* t : members(in)) constants.emplace_back(*t);
  return run(constants, options);
}

std::vector<double> numbers(const Tensor& t) {
  return t.to_vector<double>();
}

Tensor fill(Shape shape, double alpha, double beta) {
  const Tensor t = Tensor::empty(Device::cpu(), Dtype::f64, shape);
  for (int64_t i = 0; i < t.numel(); ++i) t.data<double>()[i] = alpha * std::sin(beta * static_cast<double>(i + 1));
  return t;
}

SsdInputs spec_inputs() {
  return {fill({1, 5, 2, 2}, 1, .7),  fill({1, 5, 2}, 1, .3), fill({2}, .5, 1.3), fill({1, 5, 1, 2}, 1, .5),
          fill({1, 5, 1, 2}, 1, 1.7), fill({2}, 1, .2),       fill({2}, .5, 1.1), fill({1, 2, 2, 2}, 1, 2.3)};
}

/// Gradcheck over all inputs that are there.
GradcheckResult check_gradients(SsdInputs in, const SsdOptions& options) {
  std::vector<Tensor> present;
  std::vector<std::size_t> slots;
  const auto all = members(in);
  for (std::size_t i = 0; i < all.size(); ++i)
    if (all[i]->defined()) present.push_back(*all[i]), slots.push_back(i);
  return gradcheck(
      [&](const std::vector<Variable>& given) {
        std::vector<Variable> v(8);
        for (std::size_t k = 0; k < slots.size(); ++k) v[slots[k]] = given[k];
        const auto [y, h_T] = run(v, options);
        return std::vector<Variable>{y, h_T};
      },
      present);
}

SsdInputs tokens(SsdInputs in, int64_t begin, int64_t end) {
  for (Tensor* t : {&in.x, &in.dt, &in.B_t, &in.C_t}) *t = t->slice(1, begin, end);
  return in;
}

SwitchScope poison() {
  return SwitchScope([](Switches& s) { s.poison = true; });
}

}  // namespace

TEST("ssd gives the reference values of the specification for every chunk size") {
  const std::vector<double> y{0.476922058, 0.568780143,   0.417444318,  0.192615821,   0.158488017, 0.431862143,  0.37609922,
                              0.225877481, 0.00851963113, 0.52742722,   0.946257068,   0.830699132, -0.151667085, 0.150014308,
                              0.110469102, 0.140243492,   -0.485836591, -0.0158575671, 0.436220012, 0.709185768};
  const std::vector<double> h_T{0.714260804, 0.672362838,  -0.00625849127, 0.0208596737,
                                -0.50528283, -0.391038533, -0.80973576,    -0.670565639};
  const std::vector<std::vector<double>> grads{
      {0.489132302,  0.489132302,  0.71858297,  0.71858297,  -0.486472554, -0.486472554, -0.304783194,
       -0.304783194, 0.808269739,  0.808269739, 0.991982005, 0.991982005,  -0.583319148, -0.583319148,
       -0.399915294, -0.399915294, -1.51506092, -1.51506092, -1.01654149,  -1.01654149},
      {0.0419584082, 0.435484715, 0.471566096, 0.541749422, 0.232181591, 0.643500569, 0.0383909097, 0.833204548, 0.562255923, -1.84777942},
      {-0.260116503, -0.0121637727},
      {3.04730679, -0.704949342, 3.68970665, -1.89457058, 3.09204816, -2.33397886, 0.634301866, -2.28173804, 1.32709148, 0.0366775768},
      {1.60046286, 2.82430255, -4.17287091, -3.64232452, 2.00852816, 0.203395869, 1.21238358, 2.01565248, -0.607016278, -0.368381661},
      {0.449214084, 1.22854904},
      {1.34635293, 0.606159837},
      {0.146314549, -0.0344359514, 0.146314549, -0.0344359514, 0.166155492, -0.0376143556, 0.166155492, -0.0376143556}};
  const SwitchScope scope = poison();
  const SsdResult plain = ssd_recurrent(spec_inputs());
  expect_close(numbers(plain.y), y, 5e-9, 1e-30, "recurrent y");
  expect_close(numbers(plain.h_T), h_T, 5e-9, 1e-30, "recurrent h_T");
  for (int64_t chunk : {1, 2, 3, 4, 5, 64}) {
    CAPTURE(chunk);
    const auto v = leaves_of(spec_inputs());
    const auto [out, end] = run(v, {.chunk_size = chunk});
    expect_close(numbers(out.value()), y, 5e-9, 1e-30, "y");
    expect_close(numbers(end.value()), h_T, 5e-9, 1e-30, "h_T");
    backward({out, end},
             {Tensor::full(Device::cpu(), Dtype::f64, out.shape(), 1), Tensor::full(Device::cpu(), Dtype::f64, end.shape(), 1)});
    for (std::size_t i = 0; i < 8; ++i) expect_close(numbers(v[i].grad()), grads[i], 5e-9, 1e-30, kNames[i]);
  }
}

TEST("ssd agrees with the golden file: values and gradients of two groups") {
  const auto folder = test::folder_from("LONGHAND_GOLDEN");
  if (!folder || !std::filesystem::exists(*folder + "/ops.safetensors")) SKIP("LONGHAND_GOLDEN is not set");
  const auto golden = read_safetensors(*folder + "/ops.safetensors");
  auto get = [&](const std::string& name) { return golden.at("ssd." + name).contiguous(); };
  const SsdInputs in{get("x"), get("dt"), get("A_log"), get("B"), get("C"), get("D"), get("dt_bias"), get("S0")};
  for (int64_t chunk : {4, 8, 64}) {
    CAPTURE(chunk);
    const auto v = leaves_of(in);
    const auto [y, h_T] = run(v, {.chunk_size = chunk});
    expect_close(numbers(y.value()), numbers(get("y")), kF64Tolerance, 1e-30, "y");
    expect_close(numbers(h_T.value()), numbers(get("ST")), kF64Tolerance, 1e-30, "h_T");
    backward({y, h_T}, {get("grad_y"), get("grad_ST")});
    const char* names[] = {"x", "dt", "A_log", "B", "C", "D", "dt_bias", "S0"};
    for (std::size_t i = 0; i < 8; ++i)
      expect_close(numbers(v[i].grad()), numbers(get(std::string("grad_") + names[i])), kF64Tolerance, 1e-30, names[i]);
  }
}

TEST("ssd gradients agree with central differences") {
  const SwitchScope scope = poison();
  const int64_t chunk = 4;
  for (int64_t T : {1, 3, 4, 5, 9})
    for (int64_t G : {1, 2}) {
      CAPTURE(T);
      CAPTURE(G);
      const auto result = check_gradients(random_inputs({2, T, 4, 3, G, 2}, 10 + static_cast<uint64_t>(T)), {.chunk_size = chunk});
      CHECK_MESSAGE(result.worst < kGradcheckTolerance, result.where);
    }
}

TEST("ssd gradients without h0, without D, with D per channel, eight groups") {
  const SsdOptions options{.chunk_size = 4};
  for (const Given& given : {Given{.D = false}, Given{.h0 = false}, Given{.D = false, .h0 = false}, Given{.D_per_channel = true}}) {
    const auto result = check_gradients(random_inputs({1, 6, 2, 3, 1, 2}, 20, given), options);
    CHECK_MESSAGE(result.worst < kGradcheckTolerance, result.where);
  }
  const auto result = check_gradients(random_inputs({1, 5, 16, 2, 8, 2}, 21), options);
  CHECK_MESSAGE(result.worst < kGradcheckTolerance, result.where);
}

TEST("ssd gradients where the clamp of dt is active and where dt passes 20") {
  auto clamped = check_gradients(random_inputs({1, 7, 2, 3, 1, 2}, 30), {.chunk_size = 4, .dt_min = 0.4, .dt_max = 0.9});
  CHECK_MESSAGE(clamped.worst < kGradcheckTolerance, clamped.where);
  SsdInputs in = random_inputs({1, 7, 2, 3, 1, 2}, 31);
  in.A_log = Tensor::full(Device::cpu(), Dtype::f64, {2}, -6.0);  // slow decay, so that large steps leave something to differentiate
  in.dt.data<double>()[4] = 25;
  in.dt.data<double>()[9] = 30;
  auto large = check_gradients(in, {.chunk_size = 4});
  CHECK_MESSAGE(large.worst < kGradcheckTolerance, large.where);
}

TEST("ssd: only one of the two outputs may be used") {
  const SwitchScope scope = poison();
  for (int only : {0, 1}) {
    const auto result = gradcheck(
        [&](const std::vector<Variable>& v) {
          const auto [y, h_T] = run(v, {.chunk_size = 4});
          return std::vector<Variable>{only == 0 ? y : h_T};
        },
        [] {
          SsdInputs in = random_inputs({1, 6, 2, 3, 1, 2}, 40);
          std::vector<Tensor> all;
          for (Tensor* t : members(in)) all.push_back(*t);
          return all;
        }());
    CHECK_MESSAGE(result.worst < kGradcheckTolerance, result.where);
  }
}

TEST("ssd in chunks equals the recurrence") {
  const SwitchScope scope = poison();
  for (const Sizes& s : {Sizes{2, 37, 4, 5, 2, 7}, Sizes{1, 70, 24, 16, 1, 16}, Sizes{3, 130, 2, 64, 1, 64}, Sizes{1, 64, 6, 33, 3, 17}}) {
    const SsdInputs in = random_inputs(s, 50);
    const SsdResult plain = ssd_recurrent(in);
    for (int64_t chunk : {1, 5, 16, 63, 64, 65, 256}) {
      CAPTURE(chunk);
      const SsdResult chunked = ssd_fwd_cpu(in, {.chunk_size = chunk});
      expect_close(numbers(chunked.y), numbers(plain.y), kF64Tolerance, 1e-30, "y");
      expect_close(numbers(chunked.h_T), numbers(plain.h_T), kF64Tolerance, 1e-30, "h_T");
    }
    SsdInputs narrow = in;
    for (Tensor* t : members(narrow)) *t = t->to(Dtype::f32);
    const SsdResult f32 = ssd_fwd_cpu(narrow, {});
    expect_close(numbers(f32.y), numbers(plain.y), kSsdToleranceF32, 1e-30, "f32 y");
    expect_close(numbers(f32.h_T), numbers(plain.h_T), kSsdToleranceF32, 1e-30, "f32 h_T");
  }
}

TEST("ssd gradients in f32 agree with f64 and do not depend on the chunk size") {
  const Sizes s{2, 150, 6, 32, 2, 48};
  const SsdInputs in = random_inputs(s, 60);
  auto grads = [&](Dtype dtype, int64_t chunk) {
    SsdInputs cast = in;
    for (Tensor* t : members(cast)) *t = t->to(dtype);
    const auto v = leaves_of(cast);
    const auto [y, h_T] = run(v, {.chunk_size = chunk});
    backward({y, h_T}, {random_tensor(Device::cpu(), dtype, y.shape(), 1), random_tensor(Device::cpu(), dtype, h_T.shape(), 2)});
    return v;
  };
  const auto exact = grads(Dtype::f64, 150);
  for (int64_t chunk : {7, 32, 64}) {
    const auto f64 = grads(Dtype::f64, chunk), f32 = grads(Dtype::f32, chunk);
    for (std::size_t i = 0; i < 8; ++i) {
      expect_close(numbers(f64[i].grad()), numbers(exact[i].grad()), kF64Tolerance, 1e-30, kNames[i]);
      expect_close(numbers(f32[i].grad()), numbers(exact[i].grad()), kSsdToleranceF32, 1e-30, kNames[i]);
    }
  }
}

TEST("ssd of a split sequence equals ssd of the whole, gradients too") {
  const int64_t T = 37;
  const SsdInputs in = random_inputs({2, T, 4, 3, 2, 5}, 70);
  const auto v = leaves_of(in);
  const auto [y, h_T] = run(v, {.chunk_size = 8});
  const Tensor grad_y = random_tensor(Device::cpu(), Dtype::f64, y.shape(), 3),
               grad_h_T = random_tensor(Device::cpu(), Dtype::f64, h_T.shape(), 4);
  backward({y, h_T}, {grad_y, grad_h_T});
  for (int64_t s : {1, 3, 16, 36}) {
    CAPTURE(s);
    auto first = leaves_of(tokens(in, 0, s)), second = leaves_of(tokens(in, s, T));
    for (std::size_t k : {2u, 5u, 6u}) second[k] = first[k];  // the same parameters
    const auto [y1, h_s] = run(first, {.chunk_size = 8});
    second[7] = h_s;
    const auto [y2, h_e] = run(second, {.chunk_size = 8});
    expect_close(numbers(y1.value()), numbers(y.value().slice(1, 0, s)), kF64Tolerance, 1e-30, "y before");
    expect_close(numbers(y2.value()), numbers(y.value().slice(1, s, T)), kF64Tolerance, 1e-30, "y behind");
    expect_close(numbers(h_e.value()), numbers(h_T.value()), kF64Tolerance, 1e-30, "h_T");
    backward({y1, y2, h_e}, {grad_y.slice(1, 0, s), grad_y.slice(1, s, T), grad_h_T});
    for (std::size_t k : {0u, 1u, 3u, 4u}) {
      expect_close(numbers(first[k].grad()), numbers(v[k].grad().slice(1, 0, s)), kF64Tolerance, 1e-30, kNames[k]);
      expect_close(numbers(second[k].grad()), numbers(v[k].grad().slice(1, s, T)), kF64Tolerance, 1e-30, kNames[k]);
    }
    for (std::size_t k : {2u, 5u, 6u, 7u}) expect_close(numbers(first[k].grad()), numbers(v[k].grad()), kF64Tolerance, 1e-30, kNames[k]);
  }
}

TEST("ssd: a later token never changes an earlier output, and rows do not mix") {
  const Sizes s{2, 21, 2, 3, 1, 4};
  const SsdInputs in = random_inputs(s, 80);
  const auto before = numbers(run(in, {.chunk_size = 8}).y.value());
  const int64_t row = s.H * s.P, t = 11;
  SsdInputs changed = random_inputs(s, 80);  // row 0 from token 11 on is something else
  const SsdInputs other = random_inputs(s, 81);
  copy(changed.x.slice(0, 0, 1).slice(1, t, s.T), other.x.slice(0, 0, 1).slice(1, t, s.T));
  copy(changed.dt.slice(0, 0, 1).slice(1, t, s.T), other.dt.slice(0, 0, 1).slice(1, t, s.T));
  copy(changed.B_t.slice(0, 0, 1).slice(1, t, s.T), other.B_t.slice(0, 0, 1).slice(1, t, s.T));
  const auto after = numbers(run(changed, {.chunk_size = 8}).y.value());
  for (int64_t i = 0; i < 2 * s.T * row; ++i) {
    const bool may_change = i >= t * row && i < s.T * row;
    if (!may_change) CHECK(before[static_cast<std::size_t>(i)] == after[static_cast<std::size_t>(i)]);
  }
  CHECK(before[static_cast<std::size_t>(t * row)] != after[static_cast<std::size_t>(t * row)]);
}

TEST("ssd: dt of minus infinity keeps the state, and passes its gradient on unchanged") {
  for (int64_t T : {2, 9}) {
    SsdInputs in = random_inputs({1, T, 2, 3, 1, 4}, 90);
    in.dt = Tensor::full(Device::cpu(), Dtype::f64, in.dt.shape(), -INFINITY);
    const auto v = leaves_of(in);
    const auto [y, h_T] = run(v, {.chunk_size = 4});
    expect_close(numbers(h_T.value()), numbers(in.h0), 0.0);
    const Tensor ones = Tensor::full(Device::cpu(), Dtype::f64, h_T.shape(), 1);
    backward({h_T}, {ones});
    expect_close(numbers(v[7].grad()), numbers(ones), 0.0);
    expect_close(numbers(v[1].grad()), std::vector<double>(static_cast<std::size_t>(in.dt.numel()), 0.0), 0.0);
  }
}

TEST("ssd stays finite for decays that leave nothing, forward and backward") {
  for (Dtype dtype : {Dtype::f64, Dtype::f32}) {
    SsdInputs in = random_inputs({1, 40, 2, 4, 1, 4}, 91, {.dt_shift = 100, .dt_scale = 200}, dtype);
    in.A_log = Tensor::full(Device::cpu(), dtype, {2}, 3.0);
    const auto v = leaves_of(in);
    const auto [y, h_T] = run(v, {.chunk_size = 16});
    backward({y, h_T}, {random_tensor(Device::cpu(), dtype, y.shape(), 1), random_tensor(Device::cpu(), dtype, h_T.shape(), 2)});
    CHECK(first_non_finite(y.value()) < 0);
    CHECK(first_non_finite(h_T.value()) < 0);
    for (std::size_t i = 0; i < 8; ++i) CHECK_MESSAGE(first_non_finite(v[i].grad()) < 0, kNames[i]);
  }
}

TEST("ssd: heads share a group in consecutive runs") {
  const Sizes s{1, 6, 4, 2, 2, 3};
  const SsdInputs in = random_inputs(s, 92);
  SsdInputs changed = random_inputs(s, 92);
  copy(changed.B_t.slice(2, 1, 2), random_inputs(s, 93).B_t.slice(2, 1, 2));  // group 1 belongs to heads 2 and 3
  const auto before = run(in), after = run(changed);
  const std::pair<Tensor, Tensor> outputs[] = {{before.y.value(), after.y.value()},
                                               {before.h_T.value().reshape({1, 1, 4, 6}), after.h_T.value().reshape({1, 1, 4, 6})}};
  for (const auto& [a, b] : outputs) {
    CHECK(numbers(a.slice(2, 0, 2)) == numbers(b.slice(2, 0, 2)));
    CHECK(numbers(a.slice(2, 2, 4)) != numbers(b.slice(2, 2, 4)));
  }
}

TEST("ssd reads and writes views of wider rows") {
  const SwitchScope scope = poison();
  const Sizes s{2, 11, 2, 3, 1, 4};
  const int64_t x_width = s.H * s.P, n_width = s.G * s.N;
  const SsdInputs in = random_inputs(s, 94);
  const Tensor wide = Tensor::empty(Device::cpu(), Dtype::f64, {s.B, s.T, x_width + 2 * n_width + s.H});
  copy(wide.slice(2, 0, x_width), in.x.reshape({s.B, s.T, x_width}));
  copy(wide.slice(2, x_width, x_width + n_width), in.B_t.reshape({s.B, s.T, n_width}));
  copy(wide.slice(2, x_width + n_width, x_width + 2 * n_width), in.C_t.reshape({s.B, s.T, n_width}));
  copy(wide.slice(2, x_width + 2 * n_width, x_width + 2 * n_width + s.H), in.dt);

  const auto plain = leaves_of(in);
  const auto [y, h_T] = run(plain, {.chunk_size = 4});
  const Tensor grad_y = random_tensor(Device::cpu(), Dtype::f64, y.shape(), 5);
  backward({y}, {grad_y});

  const Variable whole = Variable::leaf(wide);
  const auto parts = split(whole, {x_width, n_width, n_width, s.H});
  const auto out = ssd(reshape(parts[0], {s.B, s.T, s.H, s.P}), parts[3], in.A_log, reshape(parts[1], {s.B, s.T, s.G, s.N}),
                       reshape(parts[2], {s.B, s.T, s.G, s.N}), in.D_skip, in.dt_bias, in.h0, {.chunk_size = 4});
  expect_close(numbers(out.y.value()), numbers(y.value()), 0.0);
  backward({out.y}, {grad_y});
  auto part = [&](int64_t begin, int64_t width) { return numbers(whole.grad().slice(2, begin, begin + width)); };
  expect_close(part(0, x_width), numbers(plain[0].grad()), 0.0, 1e-30, "x");
  expect_close(part(x_width, n_width), numbers(plain[3].grad()), 0.0, 1e-30, "B_t");
  expect_close(part(x_width + n_width, n_width), numbers(plain[4].grad()), 0.0, 1e-30, "C_t");
  expect_close(part(x_width + 2 * n_width, s.H), numbers(plain[1].grad()), 0.0, 1e-30, "dt");
}

TEST("ssd of no tokens and of no rows") {
  const SsdInputs none = random_inputs({2, 0, 2, 3, 1, 4}, 95);
  const auto v = leaves_of(none);
  const auto [y, h_T] = run(v);
  expect_close(numbers(h_T.value()), numbers(none.h0), 0.0);
  const Tensor grad = random_tensor(Device::cpu(), Dtype::f64, h_T.shape(), 1);
  backward({h_T}, {grad});
  expect_close(numbers(v[7].grad()), numbers(grad), 0.0);
  CHECK(run(random_inputs({0, 5, 2, 3, 1, 4}, 96)).y.value().numel() == 0);
}

TEST("ssd says what does not fit") {
  const Sizes s{1, 4, 4, 3, 2, 5};
  auto message = [&](auto&& change, const SsdOptions& options = {}) -> std::string {
    SsdInputs in = random_inputs(s, 97);
    change(in);
    try {
      run(in, options);
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  auto has = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  const std::string groups = message([](SsdInputs& in) { in.B_t = in.C_t = Tensor::zeros(Device::cpu(), Dtype::f64, {1, 4, 3, 5}); });
  CHECK_MESSAGE((has(groups, "ssd: the groups do not divide the heads") && has(groups, "[1, 4, 3, 5]")), groups);
  const std::string dt = message([](SsdInputs& in) { in.dt = in.dt.slice(1, 0, 3); });
  CHECK_MESSAGE((has(dt, "ssd: dt does not fit x") && has(dt, "[1, 3, 4]") && has(dt, "[1, 4, 4]")), dt);
  const std::string h0 = message([](SsdInputs& in) { in.h0 = in.h0.to(Dtype::f32); });
  CHECK_MESSAGE(has(h0, "ssd: h0 has another dtype"), h0);
  const std::string bf = message([](SsdInputs& in) { in.x = in.x.to(Dtype::bf16); });
  CHECK_MESSAGE(has(bf, "ssd: x has a dtype that is not computed here"), bf);
  const std::string bias = message([](SsdInputs& in) { in.dt_bias = Tensor(); });
  CHECK_MESSAGE(has(bias, "ssd: dt_bias is absent"), bias);
  CHECK(has(message([](SsdInputs&) {}, {.chunk_size = 0}), "at least one token"));
  CHECK(has(message([](SsdInputs&) {}, {.dt_min = 1, .dt_max = 0.5}), "out of order"));
}

// --- CUDA -----------------------------------------------------------------------------------------------------

namespace {

struct Results {
  std::vector<std::vector<double>> values;  // y, h_T, then the gradients of the inputs
};

/// Runs ssd on views of one wide projection [x B C dt], as a model does, and collects everything it gives.
Results run_on(const Device& device, Dtype dtype, const Sizes& s, SsdInputs in, const SsdOptions& options) {
  const int64_t e = s.H * s.P, gn = s.G * s.N;
  const Tensor wide = Tensor::empty(Device::cpu(), Dtype::f32, {s.B, s.T, e + 2 * gn + s.H});
  copy(wide.slice(2, 0, e), in.x.reshape({s.B, s.T, e}));
  copy(wide.slice(2, e, e + gn), in.B_t.reshape({s.B, s.T, gn}));
  copy(wide.slice(2, e + gn, e + 2 * gn), in.C_t.reshape({s.B, s.T, gn}));
  copy(wide.slice(2, e + 2 * gn, e + 2 * gn + s.H), in.dt);
  const Dtype sums = dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  auto place = [&](const Tensor& t, Dtype as) { return t.defined() ? Variable::leaf(t.to(as).to(device)) : Variable(); };
  const Variable whole = place(wide.to(Dtype::bf16), dtype);  // the same numbers in every dtype
  const Variable A_log = place(in.A_log, sums), D_skip = place(in.D_skip, sums), dt_bias = place(in.dt_bias, sums), h0 = place(in.h0, sums);
  const auto parts = split(whole, {e, gn, gn, s.H});
  const auto [y, h_T] = ssd(reshape(parts[0], {s.B, s.T, s.H, s.P}), parts[3], A_log, reshape(parts[1], {s.B, s.T, s.G, s.N}),
                            reshape(parts[2], {s.B, s.T, s.G, s.N}), D_skip, dt_bias, h0, options);
  const Tensor grad_y = random_tensor(Device::cpu(), Dtype::f32, y.shape(), 7).to(Dtype::bf16).to(dtype).to(device);
  const Tensor grad_h_T = random_tensor(Device::cpu(), Dtype::f32, h_T.shape(), 8).to(sums).to(device);
  backward({y, h_T}, {grad_y, grad_h_T});
  Results results;
  for (const Tensor& t :
       {y.value(), h_T.value(), whole.grad().slice(2, 0, e), whole.grad().slice(2, e, e + gn), whole.grad().slice(2, e + gn, e + 2 * gn),
        whole.grad().slice(2, e + 2 * gn, e + 2 * gn + s.H), A_log.grad(), dt_bias.grad()})
    results.values.push_back(t.to_vector<double>());
  results.values.push_back(D_skip ? D_skip.grad().to_vector<double>() : std::vector<double>());
  results.values.push_back(h0 ? h0.grad().to_vector<double>() : std::vector<double>());
  return results;
}

constexpr const char* kResultNames[] = {"y",       "h_T",        "grad x",       "grad B_t",    "grad C_t",
                                        "grad dt", "grad A_log", "grad dt_bias", "grad D_skip", "grad h0"};

SsdInputs slow_decay_inputs(const Sizes& s, uint64_t seed, const Given& given = {}) {
  SsdInputs in = random_inputs(s, seed, given, Dtype::f32);
  in.A_log = random_tensor(Device::cpu(), Dtype::f32, in.A_log.shape(), seed + 5, 0.5, -2.0);  // states that last over several chunks
  return in;
}

/// tolerance_f32  of everything but the gradients that sum over many tokens: A_log, dt_bias, D_skip, and dt, which has sums over a chunk
void expect_parity(const Sizes& s, const SsdInputs& in, const SsdOptions& options = {}, double tolerance_f32 = kSsdToleranceF32) {
  if (test::is_left_out()) return;
  const Results exact = run_on(Device::cpu(), Dtype::f64, s, in, options);
  for (Dtype dtype : {Dtype::f32, Dtype::bf16}) {
    if (dtype == Dtype::f32 && s.N > 128) continue;  // refused, see below
    const Results actual = run_on(Device::cuda(), dtype, s, in, options);
    for (std::size_t k = 0; k < exact.values.size(); ++k) {
      const std::string what = std::string(kResultNames[k]) + " " + name_of(dtype) + " B" + std::to_string(s.B) + " T" +
                               std::to_string(s.T) + " H" + std::to_string(s.H) + " P" + std::to_string(s.P) + " G" + std::to_string(s.G) +
                               " N" + std::to_string(s.N);
      expect_close(actual.values[k], exact.values[k],
                   dtype == Dtype::bf16 ? kSsdToleranceBf16
                   : k >= 5 && k <= 8   ? kSsdToleranceF32
                                        : tolerance_f32,
                   1e-30, what);
    }
  }
}

}  // namespace

TEST("ssd on CUDA agrees with the CPU at awkward lengths and widths, values and gradients") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const SwitchScope scope = poison();
  for (const Sizes& s :
       {Sizes{1, 1, 2, 3, 1, 5}, Sizes{2, 2, 2, 16, 1, 16}, Sizes{3, 63, 4, 16, 2, 16}, Sizes{2, 64, 4, 32, 1, 64},
        Sizes{2, 65, 8, 64, 8, 64}, Sizes{1, 129, 6, 64, 2, 128}, Sizes{1, 200, 3, 80, 1, 128}, Sizes{1, 70, 3, 128, 1, 128},
        Sizes{1, 100, 2, 33, 1, 17}, Sizes{1, 130, 2, 128, 1, 200}, Sizes{1, 90, 2, 64, 1, 256}, Sizes{200, 1, 4, 64, 1, 64},
        Sizes{1, 3000, 2, 16, 1, 24}, Sizes{2, 1500, 24, 64, 1, 128}, Sizes{1, 129, 16, 64, 2, 128}, Sizes{2, 200, 8, 32, 1, 64},
        Sizes{1, 130, 40, 48, 8, 104}, Sizes{1, 5000, 8, 64, 1, 64}})
    expect_parity(s, slow_decay_inputs(s, 300 + static_cast<uint64_t>(s.T)));
}

// Together these take every path of the kernels, each with as little work as it takes: for tools under which a kernel takes minutes.
// Where there are several heads, one alone would have a gradient of its parameters whose terms cancel.
namespace {
void expect_smallest_parity(std::initializer_list<Sizes> sizes) {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const SwitchScope scope = poison();
  const test::EveryComparison every;
  for (const Sizes& s : sizes) expect_parity(s, slow_decay_inputs(s, 390 + static_cast<uint64_t>(s.N)));
}
}  // namespace

TEST("ssd on CUDA agrees with the CPU at the smallest sizes: heads of 64 columns, with copies of 16 bytes and without") {
  expect_smallest_parity(
      {{1, 70, 1, 16, 1, 16}, {1, 70, 1, 16, 1, 72}, {1, 70, 1, 33, 1, 17}, {1, 70, 1, 33, 1, 73}, {1, 70, 5, 16, 1, 8}});
}

TEST("ssd on CUDA agrees with the CPU at the smallest sizes: heads of 128 columns, and states of 256") {
  expect_smallest_parity({{1, 70, 6, 72, 1, 16}, {1, 70, 6, 72, 1, 72}, {1, 70, 2, 16, 1, 136}});
}

TEST("ssd on CUDA agrees with the CPU at the smallest sizes: rows enough for two heads one after the other, and for two teams") {
  expect_smallest_parity({{22, 130, 4, 16, 1, 8}, {22, 130, 4, 16, 1, 72}, {22, 130, 4, 17, 1, 8}, {22, 130, 4, 17, 1, 72}});
}

TEST("ssd on CUDA agrees with the CPU at the smallest sizes: two segments of heads of 64 columns") {
  expect_smallest_parity({{1, 1000, 6, 16, 1, 16}, {1, 1000, 1, 16, 1, 72}, {1, 1000, 1, 17, 1, 17}, {1, 1000, 1, 17, 1, 73}});
}

TEST("ssd on CUDA agrees with the CPU at the smallest sizes: two segments of heads of 128 columns, and of states of 256") {
  expect_smallest_parity({{1, 1000, 1, 72, 1, 16}, {1, 1000, 1, 72, 1, 72}, {1, 1000, 1, 16, 1, 136}});
}

TEST("ssd on CUDA agrees with the CPU at random lengths and widths") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const SwitchScope scope = poison();
  test::Draws draws(350);
  for (uint64_t round = 0; round < 24; ++round) {
    const int64_t unit = round % 2 == 0 ? 8 : 1;  // every other round with widths that move by 16 bytes
    Sizes s{draws.between(1, 3),
            draws.between(1, 300),
            0,
            unit * draws.between(1, 128 / unit),
            draws.between(1, 4),
            unit * draws.between(1, (round % 4 < 2 ? 128 : 256) / unit)};
    s.H = s.G * (unit == 8 ? draws.between(1, 2) * (8 / std::gcd(int64_t{8}, s.G)) : draws.between(1, 5));
    expect_parity(s, slow_decay_inputs(s, 360 + round, {.D_per_channel = round % 3 == 0, .h0 = round % 5 != 0}));
  }
}

TEST("ssd on CUDA: without D and h0, D per channel, clamped dt, large dt") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Sizes s{2, 100, 8, 64, 2, 64};
  for (const Given& given : {Given{.D = false}, Given{.h0 = false}, Given{.D_per_channel = true}})
    expect_parity(s, slow_decay_inputs(s, 310, given));
  expect_parity(s, slow_decay_inputs(s, 311), {.dt_min = 0.4, .dt_max = 0.9});
  expect_parity(s, slow_decay_inputs(s, 312, {.dt_shift = 10, .dt_scale = 10}));
}

TEST("ssd on CUDA keeps the precision of f32 where the decays of a chunk multiply to nothing") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Sizes s{1, 130, 24, 64, 1, 128};
  SsdInputs in = random_inputs(s, 315, {.dt_shift = 1}, Dtype::f32);  // 2^-2 to 2^-45 a token, as in a fresh model of transformers
  std::vector<float> A_log;
  for (int h = 1; h <= 24; ++h) A_log.push_back(std::log(static_cast<float>(h)));
  in.A_log = Tensor::from(Device::cpu(), {24}, A_log);
  expect_parity(s, in, {}, 2e-6);
}

TEST("ssd on CUDA stays finite for decays that leave nothing, and -inf keeps the state") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Sizes s{1, 150, 8, 64, 1, 64};
  for (Dtype dtype : {Dtype::f32, Dtype::bf16}) {
    SsdInputs in = random_inputs(s, 320, {.dt_shift = 100, .dt_scale = 200}, Dtype::f32);
    in.A_log = Tensor::full(Device::cpu(), Dtype::f32, {8}, 3.0);
    for (const auto& values : run_on(Device::cuda(), dtype, s, in, {}).values)
      CHECK(std::all_of(values.begin(), values.end(), [](double v) { return std::isfinite(v); }));
    in.dt = Tensor::full(Device::cpu(), Dtype::f32, in.dt.shape(), -INFINITY);
    expect_close(run_on(Device::cuda(), dtype, s, in, {}).values[1], in.h0.to_vector<double>(), 0.0);
  }
}

TEST("ssd on CUDA gives the same bits twice, and refuses states that do not fit") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  for (const Sizes& s :
       {Sizes{2, 300, 6, 64, 1, 128}, Sizes{2, 300, 8, 64, 1, 128}, Sizes{1, 3000, 16, 64, 2, 64}, Sizes{1, 200, 4, 128, 1, 256}}) {
    if (test::is_left_out()) continue;
    const SsdInputs in = slow_decay_inputs(s, 330);
    for (Dtype dtype : {Dtype::f32, Dtype::bf16})
      if (dtype == Dtype::bf16 || s.N <= 128)
        CHECK(run_on(Device::cuda(), dtype, s, in, {}).values == run_on(Device::cuda(), dtype, s, in, {}).values);
  }
  const Sizes large{1, 3, 1, 64, 1, 200};
  CHECK_THROWS_AS(run_on(Device::cuda(), Dtype::f32, large, slow_decay_inputs(large, 331), {}), ValueError);
  const Sizes tall{1, 3, 1, 160, 1, 16};
  CHECK_THROWS_AS(run_on(Device::cuda(), Dtype::bf16, tall, slow_decay_inputs(tall, 332), {}), ValueError);
}

TEST("ssd on CUDA of more than 2^31 elements") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Sizes s{5470, 256, 24, 64, 1, 128};  // x has 2.15e9 elements
  const Device cuda = Device::cuda();
  if (!test::has_room(cuda, int64_t{40} << 30)) SKIP("less than 40 GiB of free GPU memory");
  // All rows but the last are zeros; the last is that of a small problem.
  const Sizes one{1, s.T, s.H, s.P, s.G, s.N};
  const SsdInputs small = slow_decay_inputs(one, 370, {.h0 = false});
  const auto last_row = [&](const Tensor& t) { return test::zeros_with_last_row(t, s.B, cuda); };
  const auto small_bf16 = [&](const Tensor& t) { return t.to(Dtype::bf16).to(Dtype::f64); };
  const auto f64 = [](const Tensor& t) { return t.to(Dtype::f64); };
  const auto run = [](const SsdInputs& in, const Tensor& grad_y) {
    std::vector<Variable> leaves;
    for (const Tensor& t : {in.x, in.dt, in.A_log, in.B_t, in.C_t, in.D_skip, in.dt_bias}) leaves.push_back(Variable::leaf(t));
    const auto& v = leaves;
    const SsdOutput out = ssd(v[0], v[1], v[2], v[3], v[4], v[5], v[6], Variable());
    backward({out.y}, {grad_y});
    std::vector<Tensor> results{out.y.value()};
    for (const Variable& leaf : leaves) results.push_back(leaf.grad());
    return results;  // y, then gradients of x, dt, A_log, B_t, C_t, D_skip, dt_bias
  };
  const Tensor grad_y = random_tensor(Device::cpu(), Dtype::f32, small.x.shape(), 371);
  const auto exact = run({small_bf16(small.x),
                          small_bf16(small.dt),
                          f64(small.A_log),
                          small_bf16(small.B_t),
                          small_bf16(small.C_t),
                          f64(small.D_skip),
                          f64(small.dt_bias),
                          {}},
                         small_bf16(grad_y));
  const auto actual = run({last_row(small.x),
                           last_row(small.dt),
                           small.A_log.to(cuda),
                           last_row(small.B_t),
                           last_row(small.C_t),
                           small.D_skip.to(cuda),
                           small.dt_bias.to(cuda),
                           {}},
                          last_row(grad_y));
  for (const std::size_t k : {0, 1, 2, 4, 5})
    expect_close(actual[k].slice(0, s.B - 1, s.B).to_vector<double>(), exact[k].to_vector<double>(), kSsdToleranceBf16, 1e-30,
                 "result " + std::to_string(k));
  for (const std::size_t k : {3, 6, 7})  // sums over all rows, of which only the last is not 0
    expect_close(actual[k].to_vector<double>(), exact[k].to_vector<double>(), kSsdToleranceBf16, 1e-30, "result " + std::to_string(k));
}

TEST("ssd on CUDA of no tokens and of no rows") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Sizes none{2, 0, 2, 16, 1, 16};
  const SsdInputs in = slow_decay_inputs(none, 340);
  const Results results = run_on(Device::cuda(), Dtype::f32, none, in, {});
  expect_close(results.values[1], in.h0.to_vector<double>(), 0.0);
  const Sizes empty{0, 5, 2, 16, 1, 16};
  CHECK(run_on(Device::cuda(), Dtype::f32, empty, slow_decay_inputs(empty, 341), {}).values[0].empty());
}

}  // namespace longhand
