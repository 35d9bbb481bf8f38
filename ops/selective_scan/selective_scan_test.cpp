// The selective scan: the formula, its gradients, and the fast forms against the plain one.
#include "ops/selective_scan/selective_scan.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <filesystem>
#include <random>
#include <utility>

#include "autograd/gradcheck.h"
#include "core/error.h"
#include "core/safetensors.h"
#include "core/switches.h"
#include "ops/common/bench_inputs.h"
#include "ops/selective_scan/selective_scan_kernels.h"
#include "tests/support/parity.h"

namespace longhand {
namespace {

using test::expect_close;

constexpr double kGradcheckTolerance = 1e-7;
constexpr double kF64Tolerance = 1e-12;  // sums of at most a few thousand products in f64
constexpr int64_t kCpuChunk = 32;        // tokens between two borders of the backward on the CPU
constexpr std::size_t kInputs = 9;
constexpr const char* kNames[kInputs] = {"x", "dt", "A_log", "B_t", "C_t", "D_skip", "z", "dt_bias", "h0"};

struct Sizes {
  int64_t B, T, D, N;
};

struct Given {
  bool D = true, z = true, h0 = true;
  double dt_shift = 0, dt_scale = 1;
};

std::vector<Tensor*> members(SelectiveScanInputs& in) {
  return {&in.x, &in.dt, &in.A_log, &in.B_t, &in.C_t, &in.D_skip, &in.z, &in.dt_bias, &in.h0};
}

SelectiveScanInputs random_inputs(const Sizes& s, uint64_t seed, const Given& given = {}, Dtype dtype = Dtype::f64) {
  auto make = [&](Shape shape, uint64_t k, double scale, double mean = 0) {
    return random_tensor(Device::cpu(), dtype, shape, seed * 100 + k, scale, mean);
  };
  SelectiveScanInputs in;
  in.x = make({s.B, s.T, s.D}, 1, 1);
  in.dt = make({s.B, s.T, s.D}, 2, given.dt_scale, given.dt_shift);
  in.A_log = make({s.D, s.N}, 3, 0.5);
  in.B_t = make({s.B, s.T, s.N}, 4, 1);
  in.C_t = make({s.B, s.T, s.N}, 5, 1);
  if (given.D) in.D_skip = make({s.D}, 6, 1);
  if (given.z) in.z = make({s.B, s.T, s.D}, 7, 1);
  in.dt_bias = make({s.D}, 8, 0.5);
  if (given.h0) in.h0 = make({s.B, s.D, s.N}, 9, 1);
  return in;
}

SelectiveScanInputs converted(SelectiveScanInputs in, Dtype dtype) {
  for (Tensor* t : members(in))
    if (t->defined()) *t = t->to(dtype);
  return in;
}

std::vector<Variable> leaves_of(SelectiveScanInputs in) {
  std::vector<Variable> leaves;
  for (Tensor* t : members(in)) leaves.push_back(t->defined() ? Variable::leaf(*t) : Variable());
  return leaves;
}

SelectiveScanOutput run(const std::vector<Variable>& v) {
  return selective_scan(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8]);
}
SelectiveScanOutput run(SelectiveScanInputs in) {
  std::vector<Variable> constants;
  for (Tensor* t : members(in)) constants.emplace_back(*t);
  return run(constants);
}

std::vector<double> numbers(const Tensor& t) {
  return t.to_vector<double>();
}

Tensor fill(Shape shape, double alpha, double beta) {
  const Tensor t = Tensor::empty(Device::cpu(), Dtype::f64, shape);
  for (int64_t i = 0; i < t.numel(); ++i) t.data<double>()[i] = alpha * std::sin(beta * static_cast<double>(i + 1));
  return t;
}

/// Gradcheck over all inputs that are there; `outputs` chooses among y and h_T.
GradcheckResult check_gradients(SelectiveScanInputs in, const std::vector<int>& outputs = {0, 1}) {
  std::vector<Tensor> present;
  std::vector<std::size_t> slots;
  const auto all = members(in);
  for (std::size_t i = 0; i < all.size(); ++i)
    if (all[i]->defined()) present.push_back(*all[i]), slots.push_back(i);
  return gradcheck(
      [&](const std::vector<Variable>& given) {
        std::vector<Variable> v(kInputs), chosen;
        for (std::size_t k = 0; k < slots.size(); ++k) v[slots[k]] = given[k];
        const auto [y, h_T] = run(v);
        for (int i : outputs) chosen.push_back(i == 0 ? y : h_T);
        return chosen;
      },
      present);
}

SelectiveScanInputs tokens(SelectiveScanInputs in, int64_t begin, int64_t end) {
  for (Tensor* t : {&in.x, &in.dt, &in.B_t, &in.C_t, &in.z}) *t = t->slice(1, begin, end);
  return in;
}

SwitchScope poison() {
  return SwitchScope([](Switches& s) { s.poison = true; });
}

}  // namespace

TEST("selective_scan gives the reference values of the specification") {
  const SelectiveScanInputs in{fill({1, 3, 2}, 1, .7), fill({1, 3, 2}, 1, .3),  fill({2, 2}, .5, 1.3),
                               fill({1, 3, 2}, 1, .5), fill({1, 3, 2}, 1, 1.7), fill({2}, 1, .2),
                               fill({1, 3, 2}, 1, .9), fill({2}, .5, 1.1),      fill({1, 2, 2}, 1, 2.3)};
  const std::vector<double> y{0.266145784, 0.650225963, -0.115910645, 0.028489698, 0.0849480076, 0.217111575};
  const std::vector<double> h_T{-0.256827491, 0.0615955397, -0.57900863, 0.125295968};
  const std::vector<std::vector<double>> grads{{0.293262191, 0.72950533, 0.137444229, 1.06227325, 1.00334856, 0.942091285},
                                               {-0.0155663148, 0.154263811, 0.033528747, 0.05394245, -0.452837941, -0.761485477},
                                               {-0.285187912, -0.4267696, -0.541798695, -0.526944503},
                                               {1.44277335, -0.147333529, -0.017788838, 0.517383488, -1.58143884, -2.32489083},
                                               {0.846853569, 1.03119676, 0.20318604, 0.159701762, 0.209971513, -0.0470457341},
                                               {0.663408525, 0.851387496},
                                               {0.423227559, 0.845923778, -0.316968195, -0.0470343024, -0.0251759153, -0.132424322},
                                               {-0.434875509, -0.553279216},
                                               {0.0827792793, -0.022755834, 0.335844348, -0.0259634706}};
  const SwitchScope scope = poison();
  const SelectiveScanResult plain = selective_scan_recurrent(in);
  expect_close(numbers(plain.y), y, 5e-9, 1e-30, "recurrent y");
  expect_close(numbers(plain.h_T), h_T, 5e-9, 1e-30, "recurrent h_T");
  const auto v = leaves_of(in);
  const auto [out, end] = run(v);
  expect_close(numbers(out.value()), y, 5e-9, 1e-30, "y");
  expect_close(numbers(end.value()), h_T, 5e-9, 1e-30, "h_T");
  backward({out, end}, {Tensor::full(Device::cpu(), Dtype::f64, out.shape(), 1), Tensor::full(Device::cpu(), Dtype::f64, end.shape(), 1)});
  for (std::size_t i = 0; i < kInputs; ++i) expect_close(numbers(v[i].grad()), grads[i], 5e-9, 1e-30, kNames[i]);
}

TEST("selective_scan agrees with the golden file: values and gradients, in f64 and f32") {
  const auto folder = test::folder_from("LONGHAND_GOLDEN");
  if (!folder || !std::filesystem::exists(*folder + "/ops.safetensors")) SKIP("LONGHAND_GOLDEN is not set");
  const auto golden = read_safetensors(*folder + "/ops.safetensors");
  auto get = [&](const std::string& name) { return golden.at("scan." + name).contiguous(); };
  const SelectiveScanInputs in{get("u"), get("a"), get("A_log"), get("B"), get("C"), get("D"), get("z"), get("dt_bias"), get("h0")};
  const char* names[kInputs] = {"u", "a", "A_log", "B", "C", "D", "z", "dt_bias", "h0"};
  for (Dtype dtype : {Dtype::f64, Dtype::f32}) {
    const double tolerance = dtype == Dtype::f64 ? kF64Tolerance : kSelectiveScanToleranceF32;
    const auto v = leaves_of(converted(in, dtype));
    const auto [y, h_T] = run(v);
    expect_close(numbers(y.value()), numbers(get("y")), tolerance, 1e-30, "y");
    expect_close(numbers(h_T.value()), numbers(get("hT")), tolerance, 1e-30, "h_T");
    backward({y, h_T}, {get("grad_y").to(dtype), get("grad_hT").to(dtype)});
    for (std::size_t i = 0; i < kInputs; ++i)
      expect_close(numbers(v[i].grad()), numbers(get(std::string("grad_") + names[i])), tolerance, 1e-30, names[i]);
  }
}

TEST("selective_scan gradients agree with central differences at lengths around the chunk") {
  const SwitchScope scope = poison();
  for (int64_t T : {int64_t{1}, int64_t{2}, int64_t{3}, kCpuChunk - 1, kCpuChunk, kCpuChunk + 1, 2 * kCpuChunk + 3}) {
    CAPTURE(T);
    const auto result = check_gradients(random_inputs({2, T, 3, 2}, 10 + static_cast<uint64_t>(T)));
    CHECK_MESSAGE(result.worst < kGradcheckTolerance, result.where);
  }
}

TEST("selective_scan gradients without D, z or h0, for one state entry, for channels beyond one block") {
  const SwitchScope scope = poison();
  for (const Given& given : {Given{.D = false}, Given{.z = false}, Given{.h0 = false}, Given{.D = false, .z = false, .h0 = false}}) {
    const auto result = check_gradients(random_inputs({2, 6, 3, 2}, 20, given));
    CHECK_MESSAGE(result.worst < kGradcheckTolerance, result.where);
  }
  for (const Sizes& s : {Sizes{1, 5, 2, 1}, Sizes{2, 3, 35, 3}, Sizes{1, 4, 70, 2}}) {
    const auto result = check_gradients(random_inputs(s, 21));
    CHECK_MESSAGE(result.worst < kGradcheckTolerance, result.where);
  }
}

TEST("selective_scan: only one of the two outputs may be used") {
  const SwitchScope scope = poison();
  for (int only : {0, 1}) {
    const auto result = check_gradients(random_inputs({1, 6, 3, 2}, 22), {only});
    CHECK_MESSAGE(result.worst < kGradcheckTolerance, result.where);
  }
}

TEST("selective_scan gradients where dt passes 20 and where it is very negative") {
  SelectiveScanInputs in = random_inputs({1, 7, 3, 2}, 23);
  in.A_log = Tensor::full(Device::cpu(), Dtype::f64, {3, 2}, -6.0);  // slow decay, so that large steps leave something to differentiate
  const std::pair<int, double> unusual[] = {{4, 25}, {9, 30}, {13, -15}, {17, -40}};
  for (auto [i, value] : unusual) in.dt.data<double>()[i] = value;
  const auto result = check_gradients(in);
  CHECK_MESSAGE(result.worst < kGradcheckTolerance, result.where);
}

TEST("selective_scan by blocks of channels equals the recurrence") {
  const SwitchScope scope = poison();
  for (const Sizes& s : {Sizes{2, 37, 5, 7}, Sizes{1, 130, 64, 16}, Sizes{3, 9, 33, 1}, Sizes{1, 20, 31, 100}}) {
    const SelectiveScanInputs in = random_inputs(s, 30);
    const SelectiveScanResult plain = selective_scan_recurrent(in), wide = selective_scan_fwd_cpu(in),
                              narrow = selective_scan_fwd_cpu(converted(in, Dtype::f32));
    expect_close(numbers(wide.y), numbers(plain.y), kF64Tolerance, 1e-30, "y");
    expect_close(numbers(wide.h_T), numbers(plain.h_T), kF64Tolerance, 1e-30, "h_T");
    expect_close(numbers(narrow.y), numbers(plain.y), kSelectiveScanToleranceF32, 1e-30, "f32 y");
    expect_close(numbers(narrow.h_T), numbers(plain.h_T), kSelectiveScanToleranceF32, 1e-30, "f32 h_T");
  }
}

TEST("selective_scan gradients in f32 agree with f64") {
  for (const Sizes& s : {Sizes{2, 150, 40, 16}, Sizes{9, 40, 100, 5}}) {
    const SelectiveScanInputs in = random_inputs(s, 31);
    auto grads = [&](Dtype dtype) {
      const auto v = leaves_of(converted(in, dtype));
      const auto [y, h_T] = run(v);
      backward({y, h_T}, {random_tensor(Device::cpu(), dtype, y.shape(), 1), random_tensor(Device::cpu(), dtype, h_T.shape(), 2)});
      return v;
    };
    const auto f64 = grads(Dtype::f64), f32 = grads(Dtype::f32);
    for (std::size_t i = 0; i < kInputs; ++i)
      expect_close(numbers(f32[i].grad()), numbers(f64[i].grad()), kSelectiveScanToleranceF32, 1e-30, kNames[i]);
  }
}

TEST("selective_scan in f32 keeps small steps: softplus of -12 to -80 to the last digits") {
  // With A x 0 = 0 decay and B = x = 1 the state after one token is dt itself.
  for (double raw : {-80.0, -40.0, -20.0, -17.0, -16.0, -12.0, -5.0, -1.0, 0.0, 1.0, 5.0, 19.9, 20.1, 100.0}) {
    CAPTURE(raw);
    auto one = [](Shape shape, double value) { return Tensor::full(Device::cpu(), Dtype::f32, shape, value); };
    const SelectiveScanInputs in{
        one({1, 1, 1}, 1), one({1, 1, 1}, raw), one({1, 1}, 0), one({1, 1, 1}, 1), one({1, 1, 1}, 1), {}, {}, one({1}, 0), {}};
    const auto exact = static_cast<double>(static_cast<float>(raw));
    expect_close(numbers(selective_scan_fwd_cpu(in).h_T), {exact > 20 ? exact : std::log1p(std::exp(exact))}, 1e-6);
  }
}

TEST("selective_scan of a split sequence equals the scan of the whole, gradients too") {
  const int64_t T = 37;
  const SelectiveScanInputs in = random_inputs({2, T, 4, 3}, 40);
  const auto v = leaves_of(in);
  const auto [y, h_T] = run(v);
  const Tensor grad_y = random_tensor(Device::cpu(), Dtype::f64, y.shape(), 3),
               grad_h_T = random_tensor(Device::cpu(), Dtype::f64, h_T.shape(), 4);
  backward({y, h_T}, {grad_y, grad_h_T});
  for (int64_t s : {1, 3, 16, 36}) {
    CAPTURE(s);
    auto first = leaves_of(tokens(in, 0, s)), second = leaves_of(tokens(in, s, T));
    for (std::size_t k : {2u, 5u, 7u}) second[k] = first[k];  // the same parameters
    const auto [y1, h_s] = run(first);
    second[8] = h_s;
    const auto [y2, h_e] = run(second);
    expect_close(numbers(y1.value()), numbers(y.value().slice(1, 0, s)), kF64Tolerance, 1e-30, "y before");
    expect_close(numbers(y2.value()), numbers(y.value().slice(1, s, T)), kF64Tolerance, 1e-30, "y behind");
    expect_close(numbers(h_e.value()), numbers(h_T.value()), kF64Tolerance, 1e-30, "h_T");
    backward({y1, y2, h_e}, {grad_y.slice(1, 0, s), grad_y.slice(1, s, T), grad_h_T});
    for (std::size_t k : {0u, 1u, 3u, 4u, 6u}) {
      expect_close(numbers(first[k].grad()), numbers(v[k].grad().slice(1, 0, s)), kF64Tolerance, 1e-30, kNames[k]);
      expect_close(numbers(second[k].grad()), numbers(v[k].grad().slice(1, s, T)), kF64Tolerance, 1e-30, kNames[k]);
    }
    for (std::size_t k : {2u, 5u, 7u, 8u}) expect_close(numbers(first[k].grad()), numbers(v[k].grad()), kF64Tolerance, 1e-30, kNames[k]);
  }
}

TEST("selective_scan: a later token never changes an earlier output, rows and channels do not mix") {
  const Sizes s{2, 21, 5, 4};
  const int64_t t = 11;
  const auto before = numbers(run(random_inputs(s, 50)).y.value());
  SelectiveScanInputs changed = random_inputs(s, 50), other = random_inputs(s, 51);
  for (auto [to, from] : {std::pair{&changed.x, &other.x},
                          {&changed.dt, &other.dt},
                          {&changed.B_t, &other.B_t},
                          {&changed.C_t, &other.C_t},
                          {&changed.z, &other.z}})
    copy(to->slice(0, 0, 1).slice(1, t, s.T), from->slice(0, 0, 1).slice(1, t, s.T));  // row 0 from token 11 on is something else
  const auto after = numbers(run(changed).y.value());
  for (int64_t i = 0; i < 2 * s.T * s.D; ++i) {
    const bool may_change = i >= t * s.D && i < s.T * s.D;
    const bool same = before[static_cast<std::size_t>(i)] == after[static_cast<std::size_t>(i)];
    CHECK_MESSAGE(same != may_change, i);
  }
  SelectiveScanInputs channel = random_inputs(s, 50);
  copy(channel.x.slice(2, 3, 4), other.x.slice(2, 3, 4));
  const Tensor y = run(channel).y.value(), original = run(random_inputs(s, 50)).y.value();
  CHECK(numbers(y.slice(2, 0, 3)) == numbers(original.slice(2, 0, 3)));
  CHECK(numbers(y.slice(2, 4, 5)) == numbers(original.slice(2, 4, 5)));
  CHECK(numbers(y.slice(2, 3, 4)) != numbers(original.slice(2, 3, 4)));
}

TEST("selective_scan is linear in x and h0 together") {
  const Sizes s{2, 40, 5, 4};
  SelectiveScanInputs a = random_inputs(s, 60), b = random_inputs(s, 60), sum = random_inputs(s, 60);
  b.x = random_inputs(s, 61).x;
  b.h0 = random_inputs(s, 61).h0;
  const std::pair<Tensor, Tensor> parts[] = {{sum.x, b.x}, {sum.h0, b.h0}};
  for (const auto& [to, from] : parts) add_scaled(to, from, -2.5);  // sum = a - 2.5 b
  const auto whole = run(sum), left = run(a), right = run(b);
  const std::pair<Tensor, Tensor> outputs[] = {{left.y.value().clone(), right.y.value()}, {left.h_T.value().clone(), right.h_T.value()}};
  for (const auto& [to, from] : outputs) add_scaled(to, from, -2.5);
  expect_close(numbers(whole.y.value()), numbers(outputs[0].first), kF64Tolerance);
  expect_close(numbers(whole.h_T.value()), numbers(outputs[1].first), kF64Tolerance);
}

TEST("selective_scan: dt of minus infinity keeps the state, and passes its gradient on unchanged") {
  for (Dtype dtype : {Dtype::f64, Dtype::f32})
    for (int64_t T : {int64_t{1}, int64_t{9}, kCpuChunk + 5}) {
      SelectiveScanInputs in = random_inputs({1, T, 3, 4}, 70, {}, dtype);
      in.dt = Tensor::full(Device::cpu(), dtype, in.dt.shape(), -INFINITY);
      const auto v = leaves_of(in);
      const auto [y, h_T] = run(v);
      expect_close(numbers(h_T.value()), numbers(in.h0), 0.0);
      const Tensor ones = Tensor::full(Device::cpu(), dtype, h_T.shape(), 1);
      backward({y, h_T}, {Tensor::zeros(Device::cpu(), dtype, y.shape()), ones});
      expect_close(numbers(v[8].grad()), numbers(ones), 0.0);
      expect_close(numbers(v[1].grad()), std::vector<double>(static_cast<std::size_t>(in.dt.numel()), 0.0), 0.0);
    }
}

TEST("selective_scan stays finite for steps that leave nothing of the state, forward and backward") {
  for (Dtype dtype : {Dtype::f64, Dtype::f32}) {
    SelectiveScanInputs in = random_inputs({1, 70, 3, 4}, 71, {.dt_shift = 100, .dt_scale = 200}, dtype);
    in.A_log = Tensor::full(Device::cpu(), dtype, {3, 4}, 3.0);
    const auto v = leaves_of(in);
    const auto [y, h_T] = run(v);
    backward({y, h_T}, {random_tensor(Device::cpu(), dtype, y.shape(), 1), random_tensor(Device::cpu(), dtype, h_T.shape(), 2)});
    CHECK(first_non_finite(y.value()) < 0);
    CHECK(first_non_finite(h_T.value()) < 0);
    for (std::size_t i = 0; i < kInputs; ++i) CHECK_MESSAGE(first_non_finite(v[i].grad()) < 0, kNames[i]);
  }
}

TEST("selective_scan reads and writes views of wider rows") {
  const SwitchScope scope = poison();
  const Sizes s{2, 11, 5, 3};
  const int64_t R = 2;
  const SelectiveScanInputs in = random_inputs(s, 72);
  const Tensor xz = Tensor::empty(Device::cpu(), Dtype::f64, {s.B, s.T, 2 * s.D}),
               rBC = Tensor::empty(Device::cpu(), Dtype::f64, {s.B, s.T, R + 2 * s.N});
  copy(xz.slice(2, 0, s.D), in.x);
  copy(xz.slice(2, s.D, 2 * s.D), in.z);
  fill(rBC, 7);
  copy(rBC.slice(2, R, R + s.N), in.B_t);
  copy(rBC.slice(2, R + s.N, R + 2 * s.N), in.C_t);

  const auto plain = leaves_of(in);
  const auto [y, h_T] = run(plain);
  const Tensor wide_grad = random_tensor(Device::cpu(), Dtype::f64, {s.B, s.T, s.D + 3}, 5), grad_y = wide_grad.slice(2, 3, s.D + 3);
  backward({y}, {grad_y.contiguous()});

  const Variable first = Variable::leaf(xz), second = Variable::leaf(rBC);
  const auto x_z = split(first, {s.D, s.D}), r_B_C = split(second, {R, s.N, s.N});
  const auto out = selective_scan(x_z[0], in.dt, in.A_log, r_B_C[1], r_B_C[2], in.D_skip, x_z[1], in.dt_bias, in.h0);
  expect_close(numbers(out.y.value()), numbers(y.value()), 0.0);
  backward({out.y}, {grad_y});
  expect_close(numbers(first.grad().slice(2, 0, s.D)), numbers(plain[0].grad()), 0.0, 1e-30, "x");
  expect_close(numbers(first.grad().slice(2, s.D, 2 * s.D)), numbers(plain[6].grad()), 0.0, 1e-30, "z");
  expect_close(numbers(second.grad().slice(2, R, R + s.N)), numbers(plain[3].grad()), 0.0, 1e-30, "B_t");
  expect_close(numbers(second.grad().slice(2, R + s.N, R + 2 * s.N)), numbers(plain[4].grad()), 0.0, 1e-30, "C_t");
}

TEST("selective_scan of no tokens, of no rows and of no channels") {
  const SelectiveScanInputs none = random_inputs({2, 0, 3, 4}, 73);
  const auto v = leaves_of(none);
  const auto [y, h_T] = run(v);
  expect_close(numbers(h_T.value()), numbers(none.h0), 0.0);
  const Tensor grad = random_tensor(Device::cpu(), Dtype::f64, h_T.shape(), 1);
  backward({h_T}, {grad});
  expect_close(numbers(v[8].grad()), numbers(grad), 0.0);
  CHECK(run(random_inputs({0, 5, 3, 4}, 74)).y.value().numel() == 0);
  CHECK(run(random_inputs({2, 5, 0, 4}, 75)).h_T.value().shape() == Shape{2, 0, 4});
}

TEST("selective_scan says what does not fit") {
  const Sizes s{2, 4, 3, 5};
  auto message = [&](auto&& change) -> std::string {
    SelectiveScanInputs in = random_inputs(s, 76);
    change(in);
    try {
      run(in);
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  auto has = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  const std::string dt = message([](SelectiveScanInputs& in) { in.dt = in.dt.slice(1, 0, 3); });
  CHECK_MESSAGE((has(dt, "selective_scan: dt does not fit x") && has(dt, "[2, 3, 3]") && has(dt, "[2, 4, 3]")), dt);
  const std::string C = message([](SelectiveScanInputs& in) { in.C_t = in.C_t.slice(2, 0, 4).contiguous(); });
  CHECK_MESSAGE((has(C, "selective_scan: C_t does not fit x and A_log") && has(C, "[2, 4, 5]") && has(C, "A_log")), C);
  const std::string A = message([](SelectiveScanInputs& in) { in.A_log = in.dt_bias; });
  CHECK_MESSAGE(has(A, "selective_scan: A_log is not [D, N]"), A);
  const std::string h0 = message([](SelectiveScanInputs& in) { in.h0 = in.h0.to(Dtype::f32); });
  CHECK_MESSAGE(has(h0, "selective_scan: h0 has another dtype"), h0);
  const std::string z = message([](SelectiveScanInputs& in) { in.z = in.z.slice(2, 0, 2); });
  CHECK_MESSAGE(has(z, "selective_scan: z does not fit x"), z);
  const std::string bf = message([](SelectiveScanInputs& in) { in.x = in.x.to(Dtype::bf16); });
  CHECK_MESSAGE(has(bf, "selective_scan: x has a dtype that is not computed here"), bf);
  const std::string bias = message([](SelectiveScanInputs& in) { in.dt_bias = Tensor(); });
  CHECK_MESSAGE(has(bias, "selective_scan: dt_bias is absent"), bias);
  CHECK_THROWS_AS(run([] {
                    SelectiveScanInputs in = random_inputs({2, 4, 3, 5}, 76);
                    in.D_skip = in.D_skip.slice(0, 0, 2);
                    return in;
                  }()),
                  ShapeError);
}

// --- CUDA -----------------------------------------------------------------------------------------------------

namespace {

struct CudaCase {
  Sizes s;
  Given given = {};
  int64_t padding = 0;  // unread elements in front of the rows of x, z, B_t and C_t, which are then views
  double A_log_mean = -1;
};

std::string describe(const CudaCase& c) {
  return "B" + std::to_string(c.s.B) + " T" + std::to_string(c.s.T) + " D" + std::to_string(c.s.D) + " N" + std::to_string(c.s.N) +
         " padding " + std::to_string(c.padding) + (c.given.D ? "" : " no D") + (c.given.z ? "" : " no z") + (c.given.h0 ? "" : " no h0");
}

void expect_cuda_parity(const CudaCase& c) {
  const auto [B, T, D, N] = c.s;
  for (Dtype dtype : {Dtype::f32, Dtype::bf16}) {
    const Shape wide_rows = c.given.z ? Shape{B, T, c.padding + 2 * D} : Shape{B, T, c.padding + D};
    const std::vector<test::ParityInput> inputs{{wide_rows, dtype},
                                                {{B, T, D}, dtype, c.given.dt_shift},
                                                {{D, N}, Dtype::f32, c.A_log_mean},
                                                {{B, T, c.padding + 2 * N}, dtype},
                                                {c.given.D ? Shape{D} : Shape{}, Dtype::f32},
                                                {{D}, Dtype::f32},
                                                {c.given.h0 ? Shape{B, D, N} : Shape{}, Dtype::f32}};
    const auto f = [&, pad = c.padding, D = D, N = N](const std::vector<Variable>& in) {
      const auto x_z = c.given.z ? split(in[0], {pad, D, D}) : split(in[0], {pad, D});
      const auto B_C = split(in[3], {pad, N, N});
      const auto [y, h_T] = selective_scan(x_z[1], in[1], in[2], B_C[1], B_C[2], in[4], c.given.z ? x_z[2] : Variable(), in[5], in[6]);
      return std::vector<Variable>{y, h_T};
    };
    test::expect_parity(f, inputs, Device::cuda(), kSelectiveScanToleranceF32, c.padding, describe(c) + " " + name_of(dtype));
  }
}

}  // namespace

TEST("selective_scan on CUDA agrees with the CPU at awkward lengths and widths, values and gradients") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const SwitchScope scope = poison();
  for (const Sizes& s : {Sizes{1, 1, 1, 1}, Sizes{2, 2, 3, 4}, Sizes{2, 3, 32, 16}, Sizes{1, 7, 64, 16}, Sizes{2, 8, 33, 16},
                         Sizes{1, 31, 100, 16}, Sizes{2, 32, 36, 8}, Sizes{1, 33, 65, 16}, Sizes{3, 63, 128, 16}, Sizes{1, 64, 40, 16},
                         Sizes{2, 65, 96, 16}, Sizes{1, 129, 68, 16}, Sizes{1, 50, 24, 32}, Sizes{2, 70, 17, 64}, Sizes{1, 40, 20, 100},
                         Sizes{1, 35, 12, 256}, Sizes{150, 1, 64, 16}, Sizes{1, 100, 2000, 16}})
    expect_cuda_parity({s});
}

// Together these take every path of the kernels, each with as little work as it takes: for tools under which a kernel takes minutes.
namespace {
void expect_smallest_parity(std::initializer_list<CudaCase> cases) {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const SwitchScope scope = poison();
  const test::EveryComparison every;
  for (const CudaCase& c : cases) expect_cuda_parity(c);
}
}  // namespace

TEST(
    "selective_scan on CUDA agrees with the CPU at the smallest sizes: states of 16, 64 and 256 entries, with copies of 16 bytes and not") {
  expect_smallest_parity(
      {{{1, 40, 8, 16}}, {{1, 40, 6, 5}, {}, 3}, {{1, 40, 8, 24}}, {{1, 40, 6, 25}, {}, 3}, {{1, 40, 8, 72}}, {{1, 40, 6, 73}, {}, 3}});
}

TEST("selective_scan on CUDA agrees with the CPU at the smallest sizes: two segments, and more than 16") {
  expect_smallest_parity({{{1, 520, 5, 5}}, {{1, 520, 5, 24}}, {{1, 520, 5, 70}}, {{1, 5000, 3, 4}}});
}

TEST("selective_scan on CUDA agrees with the CPU at the smallest sizes: rows and channels that fill 132 multiprocessors in three ways") {
  expect_smallest_parity({{{8, 5, 1536, 16}}, {{16, 5, 1536, 16}}, {{32, 5, 1500, 16}}});
}

TEST("selective_scan on CUDA reads and writes strided views, aligned and not") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const SwitchScope scope = poison();
  for (int64_t padding : {1, 3, 4, 8})
    for (const Sizes& s : {Sizes{2, 37, 64, 16}, Sizes{1, 66, 33, 5}, Sizes{2, 20, 12, 40}}) expect_cuda_parity({s, {}, padding});
}

TEST("selective_scan on CUDA: without D, z or h0, large steps, very small steps") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const SwitchScope scope = poison();
  const Sizes s{2, 100, 72, 16};
  for (const Given& given : {Given{.D = false}, Given{.z = false}, Given{.h0 = false}, Given{.D = false, .z = false, .h0 = false},
                             Given{.dt_shift = 22}, Given{.dt_shift = -14}})
    expect_cuda_parity({s, given});
}

TEST("selective_scan on CUDA: gradients that nobody wants are left out, and the others are the same") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const SwitchScope scope = poison();
  const SelectiveScanInputs in = random_inputs({1, 70, 64, 16}, 84, {}, Dtype::f32);
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16}) {
    const auto gradients = [&](std::size_t unwanted) {
      SelectiveScanInputs all = in;
      std::vector<Variable> v;
      for (Tensor* t : members(all)) {
        const bool activation = t == &all.x || t == &all.dt || t == &all.B_t || t == &all.C_t || t == &all.z;
        const Tensor there = (activation ? t->to(dtype) : *t).to(Device::cuda());
        v.push_back(v.size() == unwanted ? Variable(there) : Variable::leaf(there));
      }
      const auto [y, h_T] = run(v);
      backward({y}, {random_tensor(Device::cuda(), dtype, y.shape(), 1)});
      return v;
    };
    const auto whole = gradients(kInputs);
    for (std::size_t unwanted = 0; unwanted < kInputs; ++unwanted) {
      const auto part = gradients(unwanted);
      for (std::size_t i = 0; i < kInputs; ++i)
        if (i != unwanted)
          expect_close(numbers(part[i].grad()), numbers(whole[i].grad()),
                       dtype == Dtype::f32 ? kSelectiveScanToleranceF32 : test::kBf16Rounding, 1e-30,
                       std::string(kNames[i]) + " without " + kNames[unwanted] + " " + name_of(dtype));
    }
  }
}

TEST("selective_scan on CUDA in segments: a long sequence of few channels") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const SwitchScope scope = poison();
  // The last has more segments than are connected at a time.
  for (const Sizes& s :
       {Sizes{1, 3000, 16, 16}, Sizes{2, 1025, 70, 16}, Sizes{1, 5000, 5, 24}, Sizes{1, 2048, 8, 130}, Sizes{1, 70'000, 3, 4}})
    expect_cuda_parity({s, {}, 0, -0.5});
  // Whole blocks of channels, whose inputs and gradients travel 16 bytes at a time; from wider rows, too.
  for (int64_t padding : {0, 8, 3}) expect_cuda_parity({Sizes{2, 1100, 192, 16}, {}, padding, -0.5});
}

TEST("selective_scan on CUDA agrees with the CPU whether rows and channels fill the GPU or not") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const SwitchScope scope = poison();
  // On a GPU of 132 multiprocessors: four lanes for each channel, for two channels, two lanes for two channels; and segments of several
  // pieces.
  for (const Sizes& s : {Sizes{8, 21, 1536, 16}, Sizes{16, 33, 1536, 16}, Sizes{32, 17, 1500, 16}, Sizes{8, 1024, 1536, 2}})
    expect_cuda_parity({s, {}, 0, -0.5});
}

TEST("selective_scan on CUDA agrees with the CPU at sixty shapes drawn at random") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const SwitchScope scope = poison();
  std::mt19937 draw(20261130);
  const auto up_to = [&](int64_t most) {  // small numbers as often as large ones
    const auto bits = static_cast<int64_t>(draw() % static_cast<unsigned>(std::bit_width(static_cast<uint64_t>(most))));
    return std::min(most, (int64_t{1} << bits) + static_cast<int64_t>(draw()) % (int64_t{1} << bits));
  };
  for (int i = 0; i < 60; ++i) {
    const int64_t N = i % 3 == 0 ? up_to(256) : 1 + static_cast<int64_t>(draw() % 20), D = up_to(200);
    const Sizes s{up_to(5), std::max<int64_t>(1, std::min<int64_t>(up_to(700), 3'000'000 / (D * N))), D, N};
    const Given given{.D = draw() % 4 != 0, .z = draw() % 4 != 0, .h0 = draw() % 2 != 0, .dt_shift = -static_cast<double>(draw() % 3)};
    expect_cuda_parity({s, given, static_cast<int64_t>(draw() % 3 * (draw() % 5)), -0.5});
  }
}

TEST("selective_scan on CUDA beyond 2^31 elements: the last tokens of the last row are those of a short sequence") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Device device = Device::cuda();
  const int64_t B = 2, T = 702'000, D = 1536, N = 16, kRemembered = 20'000, kCompared = 300;
  static_assert(2 * 702'000ll * 1536 > (1ll << 31));
  try {
    const auto make = [&](Dtype dtype, Shape shape, uint64_t seed, double scale, double mean = 0) {
      return repeated_random_tensor(device, dtype, shape, seed, scale, mean);
    };
    const Dtype bf16 = Dtype::bf16, f32 = Dtype::f32;
    const SelectiveScanInputs whole{make(bf16, {B, T, D}, 1, 1), make(bf16, {B, T, D}, 2, 1), make(f32, {D, N}, 3, 0.5),
                                    make(bf16, {B, T, N}, 4, 1), make(bf16, {B, T, N}, 5, 1), make(f32, {D}, 6, 1),
                                    make(bf16, {B, T, D}, 7, 1), make(f32, {D}, 8, 0.5),      {}};
    const Tensor grad_y = make(bf16, {B, T, D}, 9, 1);
    // Decays of about 1/2 a token: what was kRemembered tokens ago has no effect on the last kCompared.
    const auto gradients = [&](SelectiveScanInputs in, const Tensor& grad) {
      const auto v = leaves_of(in);
      const auto [y, h_T] = run(v);
      backward({y}, {grad});
      const int64_t tokens = in.x.dim(1), row = in.x.dim(0) - 1;
      std::vector<std::vector<double>> ends{numbers(h_T.value().slice(0, row, row + 1))};
      const auto last = [&](const Tensor& t) {
        return numbers(t.slice(0, row, row + 1).slice(1, tokens - kCompared, tokens).contiguous());
      };
      ends.push_back(last(y.value()));
      for (std::size_t k : {0u, 1u, 3u, 4u, 6u}) ends.push_back(last(v[k].grad()));
      return ends;
    };
    SelectiveScanInputs part = whole;
    for (Tensor* t : {&part.x, &part.dt, &part.B_t, &part.C_t, &part.z})
      *t = t->slice(0, B - 1, B).slice(1, T - kRemembered, T).contiguous();
    const auto expected = gradients(part, grad_y.slice(0, B - 1, B).slice(1, T - kRemembered, T).contiguous());
    const auto actual = gradients(whole, grad_y);
    constexpr const char* kWhat[] = {"h_T", "y", "x", "dt", "B_t", "C_t", "z"};
    for (std::size_t i = 0; i < actual.size(); ++i)
      expect_close(actual[i], expected[i], i == 0 ? kSelectiveScanToleranceF32 : test::kBf16Rounding, 1e-30, kWhat[i]);
  } catch (const MemoryError& error) {
    SKIP(std::string("the GPU has too little memory: ") + error.what());
  }
}

TEST("selective_scan on CUDA: -inf keeps the state, decays that leave nothing stay finite") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  for (Dtype dtype : {Dtype::f32, Dtype::bf16})
    for (double raw : {-HUGE_VAL, 300.0}) {
      SelectiveScanInputs in = random_inputs({1, 700, 40, 16}, 80, {}, Dtype::f32);
      fill(in.dt, raw);
      std::vector<Variable> v;
      for (Tensor* t : members(in)) {
        const bool activation = t == &in.x || t == &in.dt || t == &in.B_t || t == &in.C_t || t == &in.z;
        v.push_back(Variable::leaf((activation ? t->to(dtype) : *t).to(Device::cuda())));
      }
      const auto [y, h_T] = run(v);
      const Tensor ones = Tensor::full(Device::cuda(), Dtype::f32, h_T.shape(), 1);
      backward({y, h_T},
               {raw > 0 ? Tensor::full(Device::cuda(), dtype, y.shape(), 1) : Tensor::zeros(Device::cuda(), dtype, y.shape()), ones});
      CHECK(first_non_finite(y.value()) < 0);
      for (std::size_t i = 0; i < kInputs; ++i) CHECK_MESSAGE(first_non_finite(v[i].grad()) < 0, kNames[i]);
      if (raw > 0) continue;
      expect_close(numbers(h_T.value()), numbers(in.h0), 0.0);
      expect_close(numbers(v[8].grad()), numbers(ones), 0.0);
    }
}

TEST("selective_scan on CUDA gives the same bits twice, and refuses states that do not fit") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const auto results = [](const Sizes& s) {
    SelectiveScanInputs in = random_inputs(s, 81, {}, Dtype::f32);
    std::vector<Variable> v;
    for (Tensor* t : members(in)) v.push_back(Variable::leaf(t->to(Device::cuda())));
    const auto [y, h_T] = run(v);
    backward({y, h_T}, {Tensor::full(Device::cuda(), Dtype::f32, y.shape(), 1), Tensor::full(Device::cuda(), Dtype::f32, h_T.shape(), 1)});
    std::vector<std::vector<double>> all{numbers(y.value()), numbers(h_T.value())};
    for (const Variable& leaf : v) all.push_back(numbers(leaf.grad()));
    return all;
  };
  for (const Sizes& s :
       {Sizes{2, 300, 200, 16}, Sizes{1, 4000, 24, 16}, Sizes{30, 300, 700, 16}, Sizes{2, 200, 40, 60}, Sizes{1, 90, 20, 200}})
    if (!test::is_left_out()) CHECK(results(s) == results(s));
  CHECK_THROWS_AS(results({1, 3, 2, 257}), ValueError);
  SelectiveScanInputs far = random_inputs({1, 2, 4, 3}, 83, {}, Dtype::f32);
  for (Tensor* t : members(far)) *t = t->to(Device::cuda());
  far.x = Tensor::zeros(Device::cuda(), Dtype::f32, {1, 2, 20'000'000}).slice(2, 0, 4);
  CHECK_THROWS_AS(run(far), ValueError);
}

TEST("selective_scan on CUDA of no tokens and of no rows") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  for (const Sizes& s : {Sizes{2, 0, 3, 4}, Sizes{0, 5, 3, 4}}) {
    SelectiveScanInputs in = random_inputs(s, 82, {}, Dtype::f32);
    for (Tensor* t : members(in)) *t = t->to(Device::cuda());
    CHECK(numbers(run(in).h_T.value()) == numbers(in.h0));
  }
}

}  // namespace longhand
