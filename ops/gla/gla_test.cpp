// GLA: the formula, its gradients, and the fast forms against the plain one.
#include "ops/gla/gla.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <functional>
#include <random>
#include <utility>

#include "autograd/gradcheck.h"
#include "autograd/tape.h"
#include "core/error.h"
#include "core/safetensors.h"
#include "core/switches.h"
#include "ops/gla/gla_kernels.h"
#include "tests/support/check.h"
#include "tests/support/draws.h"
#include "tests/support/last_row.h"
#include "tests/support/parity.h"

namespace longhand {
namespace {

using test::expect_close;

constexpr double kGradcheckTolerance = 1e-7;
constexpr double kF64Tolerance = 1e-12;  // sums of at most a few thousand products in f64
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr const char* kNames[] = {"q", "k", "v", "gate", "h0"};
const GlaOptions kLogGates{.gate = GlaOptions::Gate::log};

struct Sizes {
  int64_t B, T, H, Dk, Dv;
};

std::vector<Tensor*> members(GlaInputs& in) {
  return {&in.q, &in.k, &in.v, &in.gate, &in.h0};
}

GlaInputs random_inputs(const Sizes& s, uint64_t seed, Dtype dtype = Dtype::f64, bool h0 = true) {
  const Device cpu = Device::cpu();
  auto make = [&](Shape shape, uint64_t k) { return random_tensor(cpu, dtype, shape, seed * 100 + k); };
  GlaInputs in{
      make({s.B, s.T, s.H, s.Dk}, 1), make({s.B, s.T, s.H, s.Dk}, 2), make({s.B, s.T, s.H, s.Dv}, 3), make({s.B, s.T, s.H, s.Dk}, 4), {}};
  if (h0) in.h0 = make({s.B, s.H, s.Dk, s.Dv}, 5);
  return in;
}

/// Gives every element of the gates the value of draw(generator).
void draw_gates(Tensor& gate, uint64_t seed, const std::function<double(std::mt19937_64&)>& draw) {
  std::mt19937_64 generator(seed);
  std::vector<double> values(static_cast<std::size_t>(gate.numel()));
  for (double& value : values) value = draw(generator);
  gate = Tensor::from<double>(gate.device(), gate.shape(), values).to(gate.dtype());
}
double uniform(std::mt19937_64& generator, double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(generator);
}
/// Log gates that keep, forget softly, and forget everything, side by side.
double mixed_gate(std::mt19937_64& generator) {
  switch (generator() % 6) {
    case 0:
      return 0;
    case 1:
      return -30;
    case 2:
      return -1e4;
    case 3:
      return uniform(generator, -1e4, 0);
    default:
      return uniform(generator, -1, 0);
  }
}

std::vector<Variable> leaves_of(GlaInputs in) {
  std::vector<Variable> leaves;
  for (Tensor* t : members(in)) leaves.push_back(t->defined() ? Variable::leaf(*t) : Variable());
  return leaves;
}
GlaOutput run(const std::vector<Variable>& v, const GlaOptions& options = {}) {
  return gla(v[0], v[1], v[2], v[3], v[4], options);
}
GlaOutput run(GlaInputs in, const GlaOptions& options = {}) {
  std::vector<Variable> constants;
  for (Tensor* t : members(in)) constants.emplace_back(*t);
  return run(constants, options);
}
GlaRule rule_of(const GlaInputs& in, const GlaOptions& options = {}) {
  return {options.gate == GlaOptions::Gate::logit, options.gate_normalizer, options.gate_min,
          options.scale != 0 ? options.scale : 1 / std::sqrt(static_cast<double>(in.sizes().Dk))};
}

std::vector<double> numbers(const Tensor& t) {
  return t.to_vector<double>();
}
bool all_finite(const Tensor& t) {
  return first_non_finite(t) < 0;
}

Tensor fill(Shape shape, double alpha, double beta) {
  const Tensor t = Tensor::empty(Device::cpu(), Dtype::f64, shape);
  for (int64_t i = 0; i < t.numel(); ++i) t.data<double>()[i] = alpha * std::sin(beta * static_cast<double>(i + 1));
  return t;
}
GlaInputs spec_inputs() {
  return {fill({1, 5, 1, 2}, 1, .7), fill({1, 5, 1, 2}, 1, .5), fill({1, 5, 1, 3}, 1, 1.7), fill({1, 5, 1, 2}, 2, .3),
          fill({1, 1, 2, 3}, 1, 2.3)};
}

/// The gradients by the recurrence alone, log gates, f64: {q, k, v, gate, h0}.
std::vector<std::vector<double>> plain_gradients(const GlaInputs& in, double scale, const Tensor& grad_o, const Tensor& grad_h_T) {
  const auto [B, T, H, Dk, Dv] = in.sizes();
  const auto q = numbers(in.q), k = numbers(in.k), v = numbers(in.v), gate = numbers(in.gate), h0 = numbers(in.h0), dO = numbers(grad_o);
  std::vector<std::vector<double>> grads{q, k, v, gate, numbers(grad_h_T)};
  auto at = [](int64_t i) { return static_cast<std::size_t>(i); };
  std::fill(grads[2].begin(), grads[2].end(), 0.0);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t m = 0; m < Dk; ++m) {  // rows of the state do not meet
        const int64_t state0 = ((b * H + h) * Dk + m) * Dv;
        std::vector<double> states(h0.begin() + state0, h0.begin() + state0 + Dv);  // S_0 .. S_T
        auto key = [&](int64_t t) { return at(((b * T + t) * H + h) * Dk + m); };
        auto value = [&](int64_t t, int64_t n) { return at(((b * T + t) * H + h) * Dv + n); };
        for (int64_t t = 0; t < T; ++t)
          for (int64_t n = 0; n < Dv; ++n) states.push_back(std::exp(gate[key(t)]) * states[at(t * Dv + n)] + k[key(t)] * v[value(t, n)]);
        double* carry = grads[4].data() + state0;
        for (int64_t t = T - 1; t >= 0; --t) {
          double dq = 0, dk = 0, dg = 0;
          for (int64_t n = 0; n < Dv; ++n) {
            const double P = scale * q[key(t)] * dO[value(t, n)] + carry[n];
            dq += scale * states[at((t + 1) * Dv + n)] * dO[value(t, n)];
            dk += P * v[value(t, n)];
            dg += P * std::exp(gate[key(t)]) * states[at(t * Dv + n)];
            grads[2][value(t, n)] += P * k[key(t)];
            carry[n] = std::exp(gate[key(t)]) * P;
          }
          grads[0][key(t)] = dq;
          grads[1][key(t)] = dk;
          grads[3][key(t)] = dg;
        }
      }
  return grads;
}

GradcheckResult check_gradients(GlaInputs in, const GlaOptions& options = {}) {
  std::vector<Tensor> present;
  for (Tensor* t : members(in))
    if (t->defined()) present.push_back(*t);
  return gradcheck(
      [&](const std::vector<Variable>& given) {
        std::vector<Variable> v = given;
        v.resize(5);
        const auto [o, h_T] = run(v, options);
        return std::vector<Variable>{o, h_T};
      },
      present);
}

GlaInputs tokens(GlaInputs in, int64_t begin, int64_t end) {
  for (Tensor* t : {&in.q, &in.k, &in.v, &in.gate}) *t = t->slice(1, begin, end);
  return in;
}

SwitchScope poison() {
  return SwitchScope([](Switches& s) { s.poison = true; });
}

}  // namespace

TEST("gla gives the reference values of the specification") {
  const std::vector<double> o{1.28111955,  -1.24544983, 0.157466397,  1.37892879, -0.251279403, -0.470358435, -1.1804814,  0.0741604762,
                              0.348627934, -2.06367183, -0.154448226, 1.00315352, 1.0110234,    0.402830142,  -0.701322804},
      h_T{1.69107264, 1.23006002, -1.02183358, 2.13302598, 0.835642225, -1.48349938},
      per_token{1.59126052, 1.17211187, 0.0739482789, -0.835801719, -2.39355402};
  std::vector<double> grad_v;
  for (double value : per_token) grad_v.insert(grad_v.end(), 3, value);
  const std::vector<std::vector<double>> grads{
      {0.16301223, 0.0894218739, 0.579162644, 0.46972506, 0.844456705, 0.529468304, 0.863292518, 0.581089709, 1.34300726, 1.05017295},
      {-0.209008138, -0.239632646, 0.387647215, 0.338794278, 0.0280461118, 0.215255287, -0.032630364, -0.107024633, -0.729953295,
       -1.05649921},
      grad_v,
      {0.00789004024, 0.0055179739, 0.00160816013, 0.000600970572, 0.000267392139, 0.00173438233, 0.00329222987, 0.00918273631,
       0.0225380039, 0.0312222484},
      {1.07190228, 1.07190228, 1.07190228, 1.24135616, 1.24135616, 1.24135616}};
  const std::vector<double> grad_g{0.354214366, 0.361400251, 0.148995166, 0.0716355707, 0.0357326995,
                                   0.222348007, 0.348738765, 0.714196581, 1.20832894,   1.16201564};
  const SwitchScope scope = poison();
  const GlaResult plain = gla_recurrent(spec_inputs(), rule_of(spec_inputs()));
  expect_close(numbers(plain.o), o, 5e-9, 1e-30, "recurrent o");
  expect_close(numbers(plain.h_T), h_T, 5e-9, 1e-30, "recurrent h_T");
  for (const bool log_gates : {false, true}) {
    CAPTURE(log_gates);
    GlaInputs in = spec_inputs();
    if (log_gates)
      for (int64_t i = 0; i < in.gate.numel(); ++i) {
        double& y = in.gate.data<double>()[i];
        y = (std::min(y, 0.0) - std::log1p(std::exp(-std::abs(y)))) / 16;
      }
    const auto v = leaves_of(in);
    const auto [out, end] = run(v, log_gates ? kLogGates : GlaOptions{});
    expect_close(numbers(out.value()), o, 5e-9, 1e-30, "o");
    expect_close(numbers(end.value()), h_T, 5e-9, 1e-30, "h_T");
    backward({out, end},
             {Tensor::full(Device::cpu(), Dtype::f64, out.shape(), 1), Tensor::full(Device::cpu(), Dtype::f64, end.shape(), 1)});
    for (std::size_t i = 0; i < 5; ++i) expect_close(numbers(v[i].grad()), i == 3 && log_gates ? grad_g : grads[i], 5e-9, 1e-30, kNames[i]);
  }
}

TEST("gla agrees with the golden file: values and gradients") {
  const auto folder = test::folder_from("LONGHAND_GOLDEN");
  if (!folder || !std::filesystem::exists(*folder + "/ops.safetensors")) SKIP("LONGHAND_GOLDEN is not set");
  const auto golden = read_safetensors(*folder + "/ops.safetensors");
  auto get = [&](const std::string& name) { return golden.at("gla." + name).contiguous(); };
  const auto v = leaves_of({get("q"), get("k"), get("v"), get("gate_logit"), get("S0")});
  const auto [o, h_T] = run(v);
  expect_close(numbers(o.value()), numbers(get("o")), kF64Tolerance, 1e-30, "o");
  expect_close(numbers(h_T.value()), numbers(get("ST")), kF64Tolerance, 1e-30, "h_T");
  backward({o, h_T}, {get("grad_o"), get("grad_ST")});
  const char* names[] = {"q", "k", "v", "gate_logit", "S0"};
  for (std::size_t i = 0; i < 5; ++i)
    expect_close(numbers(v[i].grad()), numbers(get(std::string("grad_") + names[i])), kF64Tolerance, 1e-30, names[i]);
}

TEST("gla gradients agree with central differences around the borders of blocks and chunks") {
  const SwitchScope scope = poison();
  for (int64_t T : {1, 3, 15, 16, 17, 33, 63, 64, 65, 100}) {
    CAPTURE(T);
    const Sizes s = T < 20 ? Sizes{2, T, 2, 3, 2} : Sizes{1, T, 1, 2, 3};
    for (const GlaOptions& options : {GlaOptions{}, kLogGates}) {
      GlaInputs in = random_inputs(s, 10 + static_cast<uint64_t>(T));
      if (options.gate == GlaOptions::Gate::log) draw_gates(in.gate, 11, [](auto& generator) { return uniform(generator, -1.5, -0.01); });
      const auto result = check_gradients(in, options);
      CHECK_MESSAGE(result.worst < kGradcheckTolerance, result.where);
    }
  }
}

TEST("gla gradients without h0, with a scale and a normalizer of one's own") {
  const auto bare = check_gradients(random_inputs({1, 20, 2, 3, 2}, 20, Dtype::f64, false));
  CHECK_MESSAGE(bare.worst < kGradcheckTolerance, bare.where);
  const auto scaled = check_gradients(random_inputs({1, 20, 2, 3, 2}, 21), {.gate_normalizer = 3, .scale = -0.7});
  CHECK_MESSAGE(scaled.worst < kGradcheckTolerance, scaled.where);
}

TEST("gla: gate_min holds gates up, and where it does they have no gradient") {
  const GlaInputs in = random_inputs({1, 20, 2, 3, 2}, 22);
  const GlaOptions options{.gate_normalizer = 2, .gate_min = -0.4};
  const auto result = check_gradients(in, options);
  CHECK_MESSAGE(result.worst < kGradcheckTolerance, result.where);
  const auto v = leaves_of(in);
  const auto [o, h_T] = run(v, options);
  backward({o}, {random_tensor(Device::cpu(), Dtype::f64, o.shape(), 1)});
  const auto logits = numbers(in.gate), grads = numbers(v[3].grad());
  int held = 0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const bool clamped = -std::log1p(std::exp(-logits[i])) / 2 < -0.4;
    held += clamped;
    CHECK((grads[i] == 0) == clamped);
  }
  CHECK(held > 10);
  CHECK(held < static_cast<int>(logits.size()) - 10);
}

TEST("gla: only one of the two outputs may be used") {
  const SwitchScope scope = poison();
  for (int only : {0, 1}) {
    GlaInputs in = random_inputs({1, 18, 2, 3, 2}, 40);
    const auto result = gradcheck(
        [&](const std::vector<Variable>& v) {
          const auto [o, h_T] = run(v);
          return std::vector<Variable>{only == 0 ? o : h_T};
        },
        {in.q, in.k, in.v, in.gate, in.h0});
    CHECK_MESSAGE(result.worst < kGradcheckTolerance, result.where);
  }
}

TEST("gla in chunks equals the recurrence, in f64 and f32") {
  const SwitchScope scope = poison();
  for (const Sizes& s :
       {Sizes{2, 37, 3, 5, 7}, Sizes{1, 64, 2, 16, 32}, Sizes{1, 65, 2, 64, 128}, Sizes{3, 130, 1, 33, 17}, Sizes{1, 321, 1, 8, 8}})
    for (const GlaOptions& options : {GlaOptions{}, GlaOptions{.gate_normalizer = 0.5}}) {
      CAPTURE(s.T);
      const GlaInputs in = random_inputs(s, 50);
      const GlaResult plain = gla_recurrent(in, rule_of(in, options)), chunked = gla_fwd_cpu(in, rule_of(in, options));
      expect_close(numbers(chunked.o), numbers(plain.o), kF64Tolerance, 1e-30, "o");
      expect_close(numbers(chunked.h_T), numbers(plain.h_T), kF64Tolerance, 1e-30, "h_T");
      GlaInputs narrow = in;
      for (Tensor* t : members(narrow)) *t = t->to(Dtype::f32);
      const GlaResult f32 = gla_fwd_cpu(narrow, rule_of(in, options));
      expect_close(numbers(f32.o), numbers(plain.o), kGlaToleranceF32, 1e-30, "f32 o");
      expect_close(numbers(f32.h_T), numbers(plain.h_T), kGlaToleranceF32, 1e-30, "f32 h_T");
    }
}

TEST("gla values and gradients with gates of every size side by side, against the plain recurrence") {
  const SwitchScope scope = poison();
  const std::pair<const char*, std::function<double(std::mt19937_64&)>> kinds[] = {
      {"mixed", mixed_gate},
      {"mostly kept, sometimes -1e4", [](auto& g) { return g() % 24 == 0 ? -1e4 : uniform(g, -0.02, 0); }},
      {"-inf among soft gates", [](auto& g) { return g() % 24 == 0 ? -kInfinity : uniform(g, -0.1, 0); }},
      {"0 to -1e4", [](auto& g) { return uniform(g, -1e4, 0); }},
      {"all 0", [](auto&) { return 0.0; }},
      {"all -30", [](auto&) { return -30.0; }},
      {"near 1", [](auto& g) { return uniform(g, -1e-4, 0); }}};
  uint64_t seed = 60;
  for (const auto& [name, draw] : kinds) {
    GlaInputs in = random_inputs({1, 150, 2, 24, 16}, ++seed, Dtype::f32);
    draw_gates(in.gate, seed, draw);
    GlaInputs wide = in;
    for (Tensor* t : members(wide)) *t = t->to(Dtype::f64);
    const Tensor grad_o = random_tensor(Device::cpu(), Dtype::f32, in.v.shape(), 1),
                 grad_h_T = random_tensor(Device::cpu(), Dtype::f32, in.h0.shape(), 2);
    const GlaResult plain = gla_recurrent(wide, rule_of(wide, kLogGates));
    const auto grads = plain_gradients(wide, rule_of(wide).scale, grad_o, grad_h_T);
    for (const bool f64 : {true, false}) {
      const auto v = leaves_of(f64 ? wide : in);
      const auto [o, h_T] = run(v, kLogGates);
      const Dtype dtype = f64 ? Dtype::f64 : Dtype::f32;
      backward({o, h_T}, {grad_o.to(dtype), grad_h_T.to(dtype)});
      const double tolerance = f64 ? kF64Tolerance : kGlaToleranceF32;
      const std::string what = std::string(name) + (f64 ? ", f64 " : ", f32 ");
      expect_close(numbers(o.value()), numbers(plain.o), tolerance, 1e-30, what + "o");
      expect_close(numbers(h_T.value()), numbers(plain.h_T), tolerance, 1e-30, what + "h_T");
      for (std::size_t i = 0; i < 5; ++i) expect_close(numbers(v[i].grad()), grads[i], tolerance, 1e-30, what + kNames[i]);
    }
  }
}

TEST("gla of 100000 gates from 0 to -1e4 has no NaN, forward and backward, log gates and logits") {
  for (Dtype dtype : {Dtype::f32, Dtype::f64}) {
    GlaInputs in = random_inputs({2, 1000, 2, 25, 3}, 70, dtype);
    for (const bool logits : {false, true}) {
      draw_gates(in.gate, 71, [&](auto& g) { return uniform(g, -1e4, logits ? 1e4 : 0); });
      const auto v = leaves_of(in);
      const auto [o, h_T] = run(v, logits ? GlaOptions{} : kLogGates);
      backward({o, h_T}, {random_tensor(Device::cpu(), dtype, o.shape(), 1), random_tensor(Device::cpu(), dtype, h_T.shape(), 2)});
      CHECK(all_finite(o.value()));
      CHECK(all_finite(h_T.value()));
      for (std::size_t i = 0; i < 5; ++i) CHECK_MESSAGE(all_finite(v[i].grad()), kNames[i]);
    }
  }
}

TEST("gla: gates of exactly 0 sum keys and values") {
  GlaInputs in = random_inputs({1, 70, 1, 4, 3}, 72);
  draw_gates(in.gate, 0, [](auto&) { return 0.0; });
  const auto h_T = numbers(run(in, kLogGates).h_T.value());
  auto expected = numbers(in.h0);
  for (int64_t t = 0; t < 70; ++t)
    for (int64_t m = 0; m < 4; ++m)
      for (int64_t n = 0; n < 3; ++n)
        expected[static_cast<std::size_t>(3 * m + n)] += in.k.data<double>()[4 * t + m] * in.v.data<double>()[3 * t + n];
  expect_close(h_T, expected, kF64Tolerance);
}

TEST("gla: a gate of minus infinity empties the state, and has no gradient") {
  const SwitchScope scope = poison();
  for (Dtype dtype : {Dtype::f64, Dtype::f32})
    for (const GlaOptions& options : {GlaOptions{}, kLogGates})
      for (int64_t s : {0, 1, 15, 16, 40, 63, 64, 70}) {
        CAPTURE(s);
        const int64_t T = 80;
        GlaInputs in = random_inputs({1, T, 2, 4, 3}, 73, dtype);
        draw_gates(in.gate, 74, [](auto& g) { return uniform(g, -2, 0); });
        longhand::fill(in.gate.slice(1, s, s + 1), -kInfinity);
        const auto v = leaves_of(in);
        const auto [o, h_T] = run(v, options);
        GlaInputs rest = tokens(in, s, T);
        rest.h0 = Tensor();
        const auto alone = run(rest, options);
        const double tolerance = dtype == Dtype::f64 ? kF64Tolerance : kGlaToleranceF32;
        expect_close(numbers(o.value().slice(1, s, T)), numbers(alone.o.value()), tolerance, 1e-30, "o behind");
        expect_close(numbers(h_T.value()), numbers(alone.h_T.value()), tolerance, 1e-30, "h_T");
        backward({o, h_T}, {random_tensor(Device::cpu(), dtype, o.shape(), 1), random_tensor(Device::cpu(), dtype, h_T.shape(), 2)});
        for (std::size_t i = 0; i < 5; ++i) CHECK_MESSAGE(all_finite(v[i].grad()), kNames[i]);
        CHECK(numbers(v[3].grad().slice(1, s, s + 1)) == std::vector<double>(8, 0.0));
        if (s == 0) CHECK(numbers(v[4].grad()) == std::vector<double>(24, 0.0));
      }
}

TEST("gla of a split sequence equals gla of the whole, gradients too") {
  const int64_t T = 140;
  const GlaInputs in = random_inputs({2, T, 2, 3, 5}, 80);
  const auto v = leaves_of(in);
  const auto [o, h_T] = run(v);
  const Tensor grad_o = random_tensor(Device::cpu(), Dtype::f64, o.shape(), 3),
               grad_h_T = random_tensor(Device::cpu(), Dtype::f64, h_T.shape(), 4);
  backward({o, h_T}, {grad_o, grad_h_T});
  for (int64_t s : {1, 3, 16, 64, 65, 139}) {
    CAPTURE(s);
    auto first = leaves_of(tokens(in, 0, s)), second = leaves_of(tokens(in, s, T));
    const auto [o1, h_s] = run(first);
    second[4] = h_s;
    const auto [o2, h_e] = run(second);
    expect_close(numbers(o1.value()), numbers(o.value().slice(1, 0, s)), kF64Tolerance, 1e-30, "o before");
    expect_close(numbers(o2.value()), numbers(o.value().slice(1, s, T)), kF64Tolerance, 1e-30, "o behind");
    expect_close(numbers(h_e.value()), numbers(h_T.value()), kF64Tolerance, 1e-30, "h_T");
    backward({o1, o2, h_e}, {grad_o.slice(1, 0, s), grad_o.slice(1, s, T), grad_h_T});
    for (std::size_t k : {0u, 1u, 2u, 3u}) {
      expect_close(numbers(first[k].grad()), numbers(v[k].grad().slice(1, 0, s)), kF64Tolerance, 1e-30, kNames[k]);
      expect_close(numbers(second[k].grad()), numbers(v[k].grad().slice(1, s, T)), kF64Tolerance, 1e-30, kNames[k]);
    }
    expect_close(numbers(first[4].grad()), numbers(v[4].grad()), kF64Tolerance, 1e-30, "h0");
  }
}

TEST("gla: a later token never changes an earlier output, rows and heads do not mix") {
  const Sizes s{2, 90, 2, 3, 4};
  const int64_t t = 37;
  GlaInputs in = random_inputs(s, 90), other = random_inputs(s, 91);
  const Tensor before = run(in).o.value();
  for (const auto& [row, head] : {std::pair{0, 1}, std::pair{1, 0}}) {  // one head of one row is something else from token t on
    GlaInputs changed = random_inputs(s, 90);
    const auto part = [&](const Tensor& whole) { return whole.slice(0, row, row + 1).slice(1, t, s.T).slice(2, head, head + 1); };
    for (std::size_t i = 0; i < 4; ++i) copy(part(*members(changed)[i]), part(*members(other)[i]));
    const Tensor after = run(changed).o.value();
    for (int64_t b = 0; b < s.B; ++b)
      for (int64_t h = 0; h < s.H; ++h) {
        const auto piece = [&](const Tensor& o, int64_t begin, int64_t end) {
          return numbers(o.slice(0, b, b + 1).slice(1, begin, end).slice(2, h, h + 1).contiguous());
        };
        CHECK(piece(before, 0, t) == piece(after, 0, t));
        CHECK((piece(before, t, s.T) == piece(after, t, s.T)) == (b != row || h != head));
      }
  }
}

TEST("gla reads and writes views of wider rows") {
  const SwitchScope scope = poison();
  const Sizes s{2, 19, 2, 3, 5};
  const int64_t key_width = s.H * s.Dk, value_width = s.H * s.Dv;
  GlaInputs in = random_inputs(s, 94);
  const Tensor wide = Tensor::empty(Device::cpu(), Dtype::f64, {s.B, s.T, 3 * key_width + value_width});
  const std::pair<int64_t, int64_t> places[] = {
      {0, key_width}, {key_width, key_width}, {2 * key_width, value_width}, {2 * key_width + value_width, key_width}};
  for (std::size_t i = 0; i < 4; ++i)
    copy(wide.slice(2, places[i].first, places[i].first + places[i].second), members(in)[i]->reshape({s.B, s.T, places[i].second}));
  const auto plain = leaves_of(in);
  const auto [o, h_T] = run(plain);
  const Tensor grad_o = random_tensor(Device::cpu(), Dtype::f64, o.shape(), 5);
  backward({o}, {grad_o});

  const Variable whole = Variable::leaf(wide);
  const auto parts = split(whole, {key_width, key_width, value_width, key_width});
  const Shape keys{s.B, s.T, s.H, s.Dk};
  const auto out =
      gla(reshape(parts[0], keys), reshape(parts[1], keys), reshape(parts[2], {s.B, s.T, s.H, s.Dv}), reshape(parts[3], keys), in.h0);
  expect_close(numbers(out.o.value()), numbers(o.value()), 0.0);
  const Tensor padded = Tensor::empty(Device::cpu(), Dtype::f64, {s.B, s.T, s.H, s.Dv + 2});  // strides that are not packed behind T
  copy(padded.slice(3, 0, s.Dv), grad_o);
  backward({out.o}, {padded.slice(3, 0, s.Dv)});
  for (std::size_t i = 0; i < 4; ++i)
    expect_close(numbers(whole.grad().slice(2, places[i].first, places[i].first + places[i].second)), numbers(plain[i].grad()), 0.0, 1e-30,
                 kNames[i]);
}

TEST("gla of no tokens and of no rows") {
  const GlaInputs none = random_inputs({2, 0, 2, 3, 4}, 95);
  const auto v = leaves_of(none);
  const auto [o, h_T] = run(v);
  expect_close(numbers(h_T.value()), numbers(none.h0), 0.0);
  const Tensor grad = random_tensor(Device::cpu(), Dtype::f64, h_T.shape(), 1);
  backward({h_T}, {grad});
  expect_close(numbers(v[4].grad()), numbers(grad), 0.0);
  CHECK(run(random_inputs({0, 5, 2, 3, 4}, 96)).o.value().numel() == 0);
}

TEST("gla says what does not fit") {
  auto message = [&](auto&& change, const GlaOptions& options = {}) -> std::string {
    GlaInputs in = random_inputs({1, 6, 2, 3, 5}, 97);
    change(in);
    try {
      run(in, options);
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  auto has = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  const std::string k = message([](GlaInputs& in) { in.k = in.k.slice(1, 0, 5); });
  CHECK_MESSAGE((has(k, "gla: k does not fit q") && has(k, "[1, 5, 2, 3]") && has(k, "[1, 6, 2, 3]")), k);
  const std::string v = message([](GlaInputs& in) { in.v = in.v.slice(2, 0, 1); });
  CHECK_MESSAGE((has(v, "gla: v does not fit q") && has(v, "[1, 6, 1, 5]")), v);
  const std::string gate = message([](GlaInputs& in) { in.gate = in.gate.slice(3, 0, 2); });
  CHECK_MESSAGE(has(gate, "gla: gate does not fit q"), gate);
  const std::string shape = message([](GlaInputs& in) { in.h0 = in.h0.reshape({1, 2, 5, 3}); });
  CHECK_MESSAGE((has(shape, "gla: h0 does not fit q and v") && has(shape, "[1, 2, 5, 3]") && has(shape, "[1, 2, 3, 5]")), shape);
  const std::string h0 = message([](GlaInputs& in) { in.h0 = in.h0.to(Dtype::f32); });
  CHECK_MESSAGE(has(h0, "gla: h0 has another dtype"), h0);
  const std::string mixed = message([](GlaInputs& in) { in.gate = in.gate.to(Dtype::f32); });
  CHECK_MESSAGE(has(mixed, "gla: gate has another dtype"), mixed);
  const std::string bf = message([](GlaInputs& in) { in.q = in.q.to(Dtype::bf16); });
  CHECK_MESSAGE(has(bf, "gla: q has a dtype that is not computed here"), bf);
  const std::string absent = message([](GlaInputs& in) { in.gate = Tensor(); });
  CHECK_MESSAGE(has(absent, "gla: gate is absent"), absent);
  const std::string flat = message([](GlaInputs& in) { in.q = in.q.reshape({1, 6, 6}); });
  CHECK_MESSAGE(has(flat, "gla: q is not [B, T, H, Dk]"), flat);
  CHECK(has(message([](GlaInputs&) {}, {.gate_normalizer = 0}), "gla: gate_normalizer must be above 0"));
  CHECK(has(message([](GlaInputs&) {}, {.gate_min = 0.5}), "gla: gate_min is above every gate"));
  CHECK(has(message([](GlaInputs&) {}, {.scale = kInfinity}), "gla: scale is not a number"));
  CHECK(message([](GlaInputs&) {}, {.gate = GlaOptions::Gate::log, .gate_normalizer = 0}) == "no error");
}

// --- CUDA -----------------------------------------------------------------------------------------------------

namespace {

/// Runs gla on views of one wide projection [q k v gate], as a model does, and collects o, h_T, then the gradients of the inputs.
std::vector<std::vector<double>> run_on(const Device& device, Dtype dtype, const Sizes& s, GlaInputs in, const GlaOptions& options,
                                        double grad_scale = 1) {
  const int64_t keys = s.H * s.Dk, values = s.H * s.Dv;
  const Tensor wide = Tensor::empty(Device::cpu(), Dtype::f32, {s.B, s.T, 3 * keys + values});
  const int64_t begins[] = {0, keys, 2 * keys, 2 * keys + values, 3 * keys + values};
  for (std::size_t i = 0; i < 4; ++i)
    copy(wide.slice(2, begins[i], begins[i + 1]), members(in)[i]->reshape({s.B, s.T, begins[i + 1] - begins[i]}));
  const Dtype sums = dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  const Variable whole = Variable::leaf(wide.to(Dtype::bf16).to(dtype).to(device));  // the same numbers in every dtype
  const Variable h0 = in.h0 ? Variable::leaf(in.h0.to(sums).to(device)) : Variable();
  const auto parts = split(whole, {keys, keys, values, keys});
  const Shape shape{s.B, s.T, s.H, s.Dk};
  const auto [o, h_T] = gla(reshape(parts[0], shape), reshape(parts[1], shape), reshape(parts[2], {s.B, s.T, s.H, s.Dv}),
                            reshape(parts[3], shape), h0, options);
  const Tensor grad_o = random_tensor(Device::cpu(), Dtype::f32, o.shape(), 7, grad_scale).to(Dtype::bf16).to(dtype).to(device);
  const Tensor grad_h_T = random_tensor(Device::cpu(), Dtype::f32, h_T.shape(), 8, grad_scale).to(sums).to(device);
  backward({o, h_T}, {grad_o, grad_h_T});
  std::vector<std::vector<double>> results{numbers(o.value()), numbers(h_T.value())};
  for (std::size_t i = 0; i < 4; ++i) results.push_back(numbers(whole.grad().slice(2, begins[i], begins[i + 1])));
  results.push_back(h0 ? numbers(h0.grad()) : std::vector<double>());
  return results;
}

constexpr const char* kResultNames[] = {"o", "h_T", "grad q", "grad k", "grad v", "grad gate", "grad h0"};

void expect_parity(const Sizes& s, const GlaInputs& in, const GlaOptions& options = {}, const std::string& kind = "",
                   double grad_scale = 1) {
  if (test::is_left_out()) return;
  const auto exact = run_on(Device::cpu(), Dtype::f64, s, in, options, grad_scale);
  for (Dtype dtype : {Dtype::f32, Dtype::bf16}) {
    const auto actual = run_on(Device::cuda(), dtype, s, in, options, grad_scale);
    for (std::size_t i = 0; i < exact.size(); ++i) {
      const std::string what = std::string(kResultNames[i]) + " " + name_of(dtype) + " B" + std::to_string(s.B) + " T" +
                               std::to_string(s.T) + " H" + std::to_string(s.H) + " Dk" + std::to_string(s.Dk) + " Dv" +
                               std::to_string(s.Dv) + " " + kind;
      expect_close(actual[i], exact[i], dtype == Dtype::f32 ? kGlaToleranceF32 : kGlaToleranceBf16, 1e-30, what);
    }
  }
}

}  // namespace

TEST("gla on CUDA agrees with the CPU at awkward lengths and widths, values and gradients") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const SwitchScope scope = poison();
  for (const Sizes& s :
       {Sizes{1, 1, 1, 1, 1}, Sizes{2, 3, 2, 3, 5}, Sizes{2, 8, 2, 16, 16}, Sizes{1, 9, 1, 17, 33}, Sizes{1, 17, 3, 24, 40},
        Sizes{3, 63, 4, 16, 32}, Sizes{2, 64, 2, 64, 64}, Sizes{2, 65, 2, 64, 128}, Sizes{1, 129, 3, 128, 256}, Sizes{1, 100, 2, 100, 72},
        Sizes{1, 70, 2, 256, 512}, Sizes{1, 130, 2, 200, 48}, Sizes{1, 90, 1, 65, 250}, Sizes{200, 1, 2, 32, 64}, Sizes{1, 3000, 1, 32, 24},
        Sizes{1, 6000, 2, 64, 64}, Sizes{2, 1500, 4, 128, 256},
        // whole chunks, with few heads and with enough of them to fill a GPU
        Sizes{2, 192, 3, 128, 256}, Sizes{1, 128, 2, 256, 64}, Sizes{24, 128, 3, 128, 256}, Sizes{1, 8192, 2, 64, 128},
        Sizes{2, 192, 3, 96, 192}, Sizes{1, 128, 2, 192, 128}, Sizes{1, 128, 3, 8, 64}, Sizes{1, 192, 2, 232, 64}})
    expect_parity(s, random_inputs(s, 300 + static_cast<uint64_t>(s.T), Dtype::f32));
}

// Together these take every path of the kernels, each with as little work as it takes: for tools under which a kernel takes minutes.
namespace {
void expect_smallest_parity(std::initializer_list<Sizes> sizes) {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const SwitchScope scope = poison();
  const test::EveryComparison every;
  for (const Sizes& s : sizes) expect_parity(s, random_inputs(s, 390 + static_cast<uint64_t>(s.Dk), Dtype::f32));
}
}  // namespace

TEST("gla on CUDA agrees with the CPU at the smallest sizes: keys of 64 and 128 columns, with copies of 16 bytes and without") {
  expect_smallest_parity({{1, 70, 1, 16, 24}, {1, 70, 1, 17, 9}, {1, 70, 1, 72, 72}, {1, 70, 1, 73, 67}});
}

TEST("gla on CUDA agrees with the CPU at the smallest sizes: keys of 256 columns, and in slices") {
  expect_smallest_parity({{1, 70, 1, 136, 16}, {1, 70, 1, 264, 8}});
}

TEST("gla on CUDA agrees with the CPU at the smallest sizes: two segments of 64 columns of keys") {
  expect_smallest_parity({{1, 460, 1, 16, 8}, {1, 460, 1, 17, 9}});
}

TEST("gla on CUDA agrees with the CPU at the smallest sizes: two segments of 128 and 256 columns of keys") {
  expect_smallest_parity({{1, 460, 1, 72, 8}, {1, 460, 1, 73, 9}, {1, 460, 1, 136, 8}});
}

TEST("gla on CUDA agrees with the CPU at the smallest sizes: whole chunks, mild and steep") {
  expect_smallest_parity({{1, 64, 1, 64, 64}, {1, 64, 1, 128, 64}, {1, 64, 1, 256, 64}, {1, 64, 2, 96, 64}, {1, 64, 1, 192, 64}});
  if (cuda_device_count() == 0) return;
  const test::EveryComparison every;
  const Sizes s{1, 64, 1, 64, 64};
  GlaInputs in = random_inputs(s, 391, Dtype::f32);
  longhand::fill(in.gate.slice(1, 31, 32), -60);
  expect_parity(s, in, kLogGates);
}

TEST("gla on CUDA agrees with the CPU at the smallest sizes: rows enough for blocks of one stage") {
  expect_smallest_parity({{270, 65, 1, 9, 9}});
}

TEST("gla on CUDA agrees with the CPU at random lengths and widths") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const SwitchScope scope = poison();
  test::Draws draws(305);
  for (uint64_t round = 0; round < 20; ++round) {
    const int64_t unit = round % 2 == 0 ? 8 : 1;  // every other round with widths that move by 16 bytes
    const Sizes s{draws.between(1, 3), draws.between(1, 300), draws.between(1, 5),
                  unit * draws.between(1, (round % 4 < 2 ? 128 : 256) / unit), unit * draws.between(1, 300 / unit)};
    expect_parity(s, random_inputs(s, 370 + round, Dtype::f32, round % 5 != 0));
  }
}

TEST("gla on CUDA agrees with the CPU where keys are wider than the kernels") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const SwitchScope scope = poison();
  for (const Sizes& s : {Sizes{1, 3, 1, 257, 16}, Sizes{2, 70, 2, 264, 24}, Sizes{1, 130, 2, 384, 64}, Sizes{2, 100, 1, 512, 512}}) {
    expect_parity(s, random_inputs(s, 380, Dtype::f32));
    expect_parity(s, random_inputs(s, 381, Dtype::f32, false), {.gate_normalizer = 2, .gate_min = -0.4});
  }
  const Sizes none{2, 0, 2, 300, 16};
  const GlaInputs in = random_inputs(none, 382, Dtype::f32);
  expect_close(run_on(Device::cuda(), Dtype::f32, none, in, {})[1], numbers(in.h0), 0.0);
}

TEST("gla on CUDA: without h0, log gates, a clamp, a scale") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const SwitchScope scope = poison();
  for (const int64_t T : {100, 128}) {
    const Sizes s{2, T, 2, 64, 64};
    expect_parity(s, random_inputs(s, 310, Dtype::f32, false));
    expect_parity(s, random_inputs(s, 311, Dtype::f32), {.gate_normalizer = 1, .scale = 0.3});
    GlaInputs held = random_inputs(s, 312, Dtype::f32);
    expect_parity(s, held, {.gate_normalizer = 2, .gate_min = -0.4});
    draw_gates(held.gate, 313, [](auto& g) { return uniform(g, -0.2, 0); });
    expect_parity(s, held, kLogGates);
  }
}

TEST("gla on CUDA with gates of every size side by side") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const SwitchScope scope = poison();
  const std::pair<const char*, std::function<double(std::mt19937_64&)>> kinds[] = {
      {"mixed", mixed_gate},
      {"mostly kept, sometimes -1e4", [](auto& g) { return g() % 24 == 0 ? -1e4 : uniform(g, -0.02, 0); }},
      {"-inf among soft gates", [](auto& g) { return g() % 24 == 0 ? -kInfinity : uniform(g, -0.1, 0); }},
      {"soft, in a few columns of some chunks -1e4", [](auto& g) { return g() % 4000 == 0 ? -1e4 : uniform(g, -0.1, 0); }},
      // around 2^-64 over a chunk, where the GPU begins to treat chunks by squares
      {"all just mild", [](auto&) { return -0.6914; }},
      {"all just steep", [](auto&) { return -0.6953; }},
      {"columns on both sides", [](auto& g) { return uniform(g, -1.4, 0); }},
      {"all 0", [](auto&) { return 0.0; }}};
  for (const Sizes& s : {Sizes{1, 200, 2, 64, 64}, Sizes{1, 256, 2, 128, 64}, Sizes{1, 256, 2, 160, 64}}) {
    GlaInputs in = random_inputs(s, 320, Dtype::f32);
    for (const auto& [name, draw] : kinds) {
      draw_gates(in.gate, 321, draw);
      expect_parity(s, in, kLogGates, name);
    }
    for (const double alone : {-44.0, -45.0}) {
      longhand::fill(in.gate, -0.001);
      longhand::fill(in.gate.slice(1, 31, 32), alone);
      expect_parity(s, in, kLogGates, "one gate of " + std::to_string(alone));
    }
    for (Dtype dtype : {Dtype::f32, Dtype::bf16})
      for (const bool logits : {false, true}) {
        draw_gates(in.gate, 322, [&](auto& g) { return uniform(g, -1e4, logits ? 1e4 : 0); });
        for (const auto& values : run_on(Device::cuda(), dtype, s, in, logits ? GlaOptions{} : kLogGates))
          CHECK(std::all_of(values.begin(), values.end(), [](double v) { return std::isfinite(v); }));
      }
  }
}

TEST("gla on CUDA: gradients of the size that training has keep their digits beside gates on both sides of the border") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const SwitchScope scope = poison();
  // A reciprocal of 2^-94 or 2^-120 would still be a number, but small gradients would be lost beside it.
  for (const double alone : {-44.0, -45.0, -65.0, -83.0}) {
    const Sizes s{1, 128, 2, 128, 64};
    GlaInputs in = random_inputs(s, 323, Dtype::f32);
    longhand::fill(in.gate, -0.001);
    longhand::fill(in.gate.slice(1, 31, 32), alone);
    expect_parity(s, in, kLogGates, "one gate of " + std::to_string(alone), 0x1p-30);
  }
}

TEST("gla on CUDA: whole chunks of bf16 are told apart by how much they decay, others are not") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const auto tells = [](const Sizes& s, Dtype dtype, int64_t padding) {
    const auto keys = [&] { return Tensor::zeros(Device::cuda(), dtype, {s.B, s.T, s.H * s.Dk + padding}).slice(2, 0, s.H * s.Dk); };
    const Shape shape{s.B, s.T, s.H, s.Dk};
    const GlaInputs in{keys().reshape(shape),
                       keys().reshape(shape),
                       Tensor::zeros(Device::cuda(), dtype, {s.B, s.T, s.H, s.Dv}),
                       keys().reshape(shape),
                       {}};
    return on_device<bool(const GlaInputs&, const GlaRule&)>(Device::cuda(), nullptr, LONGHAND_CUDA_IMPL(gla_tells_mild_chunks_cuda))(
        in, GlaRule{true, 16, -1, 1});
  };
  if (!tells({1, 64, 1, 64, 64}, Dtype::bf16, 0)) SKIP("this build or GPU has no products of warpgroups");
  CHECK(tells({2, 128, 3, 128, 64}, Dtype::bf16, 8));
  CHECK(tells({1, 64, 1, 256, 64}, Dtype::bf16, 0));
  CHECK_FALSE(tells({1, 64, 1, 64, 64}, Dtype::f32, 0));
  CHECK_FALSE(tells({1, 100, 1, 64, 64}, Dtype::bf16, 0));
  CHECK(tells({1, 64, 1, 96, 64}, Dtype::bf16, 0));  // heads of gla-125m
  CHECK_FALSE(tells({1, 64, 1, 100, 64}, Dtype::bf16, 0));
  CHECK_FALSE(tells({1, 64, 1, 64, 64}, Dtype::bf16, 3));
}

TEST("gla on CUDA: squares do the chunks in which a column decays by more than 2^-64, and no others") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Device gpu = Device::cuda();
  // Seen by bits: one token more, or a gradient less, and squares do all chunks. There are more chunks than blocks that look for steep
  // ones.
  constexpr int64_t kChunks = 37, T = 64 * kChunks, H = 9, Dv = 64;
  for (const int64_t Dk : {128, 160, 192}) {
    const int64_t slices = (Dk + 63) / 64;
    CAPTURE(Dk);
    GlaInputs in = random_inputs({1, T + 1, H, Dk, Dv}, 395, Dtype::bf16, false);
    std::mt19937_64 generator(396);
    std::vector<double> gates(static_cast<std::size_t>(in.gate.numel()));
    for (double& gate : gates) gate = uniform(generator, -0.05, -0.001);
    std::vector<bool> steep;  // [chunks, H, slices]
    for (int64_t chunk = 0; chunk < kChunks; ++chunk)
      for (int64_t h = 0; h < H; ++h) {
        const auto kind = generator() % 5, column = generator() % static_cast<uint64_t>(Dk), token = generator() % 64;
        for (uint64_t slice = 0; slice < static_cast<uint64_t>(slices); ++slice)
          steep.push_back(kind % 2 == 0 && kind > 0 && slice == column / 64);
        for (uint64_t i = 0; kind > 0 && i < 64; ++i) {  // one column decays by 2^-63.8 or 2^-64.2, evenly or at once
          double& gate =
              gates[((static_cast<uint64_t>(chunk) * 64 + i) * H + static_cast<uint64_t>(h)) * static_cast<uint64_t>(Dk) + column];
          if (kind <= 2) gate = kind == 1 ? -0.69140625 : -0.6953125;
          else gate = i != token ? 0 : kind == 3 ? -44.25 : -44.5;
        }
      }
    in.gate = Tensor::from<double>(Device::cpu(), in.gate.shape(), gates).to(Dtype::bf16);
    for (Tensor* t : {&in.q, &in.k, &in.v, &in.gate}) *t = t->to(gpu);
    const GlaInputs whole = tokens(in, 0, T);
    const GlaRule rule = rule_of(whole, kLogGates);
    if (!on_device<decltype(gla_tells_mild_chunks_cuda)>(gpu, nullptr, LONGHAND_CUDA_IMPL(gla_tells_mild_chunks_cuda))(whole, rule))
      SKIP("this build or GPU has no products of warpgroups");

    const auto forward = on_device<decltype(gla_fwd_cuda)>(gpu, nullptr, LONGHAND_CUDA_IMPL(gla_fwd_cuda));
    const GlaPrepared prepared = forward(whole, rule).prepared;
    const auto scores = numbers(prepared.scores), by_squares = numbers(forward(in, rule).prepared.scores);
    const auto backward_cuda = on_device<decltype(gla_bwd_cuda)>(gpu, nullptr, LONGHAND_CUDA_IMPL(gla_bwd_cuda));
    const Tensor grad_o = random_tensor(gpu, Dtype::bf16, whole.v.shape(), 397);
    const auto gradients = [&](bool of_gates) {
      const auto make = [&] { return Tensor::empty(gpu, Dtype::bf16, whole.q.shape()); };
      const GlaGradients out{make(), make(), {}, of_gates ? make() : Tensor(), {}};
      backward_cuda(whole, rule, prepared, grad_o, {}, out);
      return std::pair{numbers(out.q), numbers(out.k)};
    };
    const auto [grad_q, grad_k] = gradients(true);
    const auto [grad_q_by_squares, grad_k_by_squares] = gradients(false);
    const auto same = [](const std::vector<double>& a, const std::vector<double>& b, int64_t first, int64_t rows, int64_t row,
                         int64_t width) {
      bool all = true;
      for (int64_t i = first; i < first + rows * row; i += row)
        all = all && std::equal(a.begin() + i, a.begin() + i + width, b.begin() + i);
      return all;
    };
    for (int64_t chunk = 0; chunk < kChunks; ++chunk)
      for (int64_t h = 0; h < H; ++h) {
        CAPTURE(chunk);
        CAPTURE(h);
        const int64_t unit = chunk * H + h;
        const auto slice_is_steep = [&](int64_t slice) { return bool{steep[static_cast<std::size_t>(unit * slices + slice)]}; };
        bool any_slice_is_steep = false;
        for (int64_t slice = 0; slice < slices; ++slice) any_slice_is_steep = any_slice_is_steep || slice_is_steep(slice);
        CHECK(same(scores, by_squares, unit * 64 * 64, 64, 64, 64) == any_slice_is_steep);
        for (int64_t slice = 0; slice < slices; ++slice) {
          const int64_t first = (chunk * 64 * H + h) * Dk + slice * 64, width = std::min<int64_t>(64, Dk - slice * 64);
          CHECK(same(grad_q, grad_q_by_squares, first, 64, H * Dk, width) == slice_is_steep(slice));
          CHECK(same(grad_k, grad_k_by_squares, first, 64, H * Dk, width) == slice_is_steep(slice));
        }
      }
  }
}

TEST("gla on CUDA: a gate of minus infinity has no gradient and lets nothing through") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  for (const Sizes& s : {Sizes{1, 100, 1, 32, 32}, Sizes{1, 128, 1, 64, 64}})
    for (Dtype dtype : {Dtype::f32, Dtype::bf16}) {
      GlaInputs in = random_inputs(s, 330, Dtype::f32);
      longhand::fill(in.gate.slice(1, 70, 71), -kInfinity);
      const auto whole = run_on(Device::cuda(), dtype, s, in, {});
      for (int64_t m = 0; m < s.Dk; ++m) CHECK(whole[5][static_cast<std::size_t>(70 * s.Dk + m)] == 0);
      CHECK(std::all_of(whole[6].begin(), whole[6].end(), [](double v) { return std::isfinite(v); }));
      in.h0 = random_inputs(s, 331, Dtype::f32).h0;  // another beginning, the same end
      CHECK(run_on(Device::cuda(), dtype, s, in, {})[1] == whole[1]);
    }
}

TEST("gla on CUDA gives the same bits twice") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  for (const Sizes& s : {Sizes{2, 300, 4, 128, 256}, Sizes{1, 3000, 2, 64, 64}, Sizes{1, 200, 2, 256, 100}, Sizes{24, 128, 4, 128, 256}}) {
    if (test::is_left_out()) continue;
    const GlaInputs in = random_inputs(s, 340, Dtype::f32);
    for (Dtype dtype : {Dtype::f32, Dtype::bf16})
      CHECK(run_on(Device::cuda(), dtype, s, in, {}) == run_on(Device::cuda(), dtype, s, in, {}));
  }
}

TEST("gla on CUDA of more than 2^31 elements") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Sizes s{8200, 256, 4, 128, 256};  // v has 2.15e9 elements
  const Device cuda = Device::cuda();
  if (!test::has_room(cuda, int64_t{60} << 30)) SKIP("less than 60 GiB of free GPU memory");
  // All rows but the last are zeros; the last is that of a small problem.
  const GlaInputs small = random_inputs({1, s.T, s.H, s.Dk, s.Dv}, 360, Dtype::f32, false);
  const Tensor grad_o = random_tensor(Device::cpu(), Dtype::f32, small.v.shape(), 361);
  const auto last_row = [&](const Tensor& t) { return test::zeros_with_last_row(t, s.B, cuda); };
  const auto alone = [](const Tensor& t) { return t.to(Dtype::bf16).to(Dtype::f64); };
  const auto run = [&](const auto& place) {
    std::vector<Variable> leaves;
    for (const Tensor& t : {small.q, small.k, small.v, small.gate}) leaves.push_back(Variable::leaf(place(t)));
    const GlaOutput out = gla(leaves[0], leaves[1], leaves[2], leaves[3], Variable(), {});
    backward({out.o}, {place(grad_o)});
    std::vector<std::vector<double>> results;
    for (const Tensor& t : {out.o.value(), leaves[0].grad(), leaves[1].grad(), leaves[2].grad(), leaves[3].grad()})
      results.push_back(numbers(t.slice(0, t.dim(0) - 1, t.dim(0))));
    return results;
  };
  const auto exact = run(alone), actual = run(last_row);
  for (std::size_t i = 0; i < exact.size(); ++i) expect_close(actual[i], exact[i], kGlaToleranceBf16, 1e-30, "result " + std::to_string(i));
}

TEST("gla on CUDA of no tokens and of no rows") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Sizes none{2, 0, 2, 16, 16};
  const GlaInputs in = random_inputs(none, 350, Dtype::f32);
  const auto results = run_on(Device::cuda(), Dtype::f32, none, in, {});
  expect_close(results[1], numbers(in.h0), 0.0);
  CHECK(results[6].size() == numbers(in.h0).size());
  const Sizes empty{0, 5, 2, 16, 16};
  CHECK(run_on(Device::cuda(), Dtype::f32, empty, random_inputs(empty, 351, Dtype::f32), {})[0].empty());
}

}  // namespace longhand
