// The kernels of a token against the ops that they join.
#include "ops/token_step/token_step.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "autograd/gradcheck.h"
#include "autograd/tape.h"
#include "core/error.h"
#include "ops/causal_conv1d/causal_conv1d.h"
#include "ops/gated_rmsnorm/gated_rmsnorm.h"
#include "ops/gla/gla.h"
#include "ops/linear/linear.h"
#include "ops/rmsnorm/rmsnorm.h"
#include "ops/selective_scan/selective_scan.h"
#include "ops/ssd/ssd.h"
#include "ops/token_step/token_product.h"
#include "tests/support/check.h"
#include "tests/support/parity.h"

namespace longhand {
namespace {

using namespace test;
constexpr Dtype kDtypes[] = {Dtype::f32, Dtype::bf16};

double tolerance(Dtype dtype) {
  return dtype == Dtype::f32 ? kTokenStepToleranceF32 : kTokenStepToleranceBf16;
}

// Every element within tolerance of the largest one.
void expect_near(const Tensor& found, const Tensor& expected, Dtype dtype, const std::string& what) {
  const auto values = expected.to_vector<double>();
  double largest = 0;
  for (const double v : values) largest = std::max(largest, std::abs(v));
  const auto got = found.to_vector<double>();
  REQUIRE(got.size() == values.size());
  double worst = 0;
  for (std::size_t i = 0; i < got.size(); ++i)
    worst = std::max(worst, std::isfinite(got[i]) ? std::abs(got[i] - values[i]) : std::numeric_limits<double>::infinity());
  CAPTURE(what);
  CAPTURE(name_of(dtype));
  CHECK(worst <= tolerance(dtype) * largest);
}

TEST("token step: norm and projection agree with the ops, for every number of rows and widths off the grid") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Device gpu = Device::cuda();
  const NoGrad no_grad;
  for (const Dtype dtype : kDtypes)
    for (const int64_t B : {int64_t{1}, int64_t{2}, int64_t{3}, int64_t{5}, int64_t{8}, int64_t{11}, int64_t{25}, kTokenStepRows + 1})
      for (const auto& [D, R] :
           {std::pair<int64_t, int64_t>{16, 5}, {264, 33}, {768, 50}, {1024, 4384}, {2048, 7}, {2816, 24}, {4096, 100}})
        for (const bool with_branch : {false, true}) {
          if (is_left_out()) continue;
          const Tensor residual = random_tensor(gpu, Dtype::f32, {B, D}, 1), branch = random_tensor(gpu, dtype, {B, D}, 2);
          const Tensor norm = random_tensor(gpu, Dtype::f32, {D}, 3), weight = random_tensor(gpu, dtype, {R, D}, 4, 0.05);
          const Tensor out = Tensor::empty(gpu, dtype, {B, R}), wide = Tensor::empty(gpu, Dtype::f32, {B, R});
          const Tensor sum = norm_projection({residual, with_branch ? branch : Tensor(), norm, 1e-5, weight, out});
          const Tensor window = random_tensor(gpu, dtype, {B, 3, 40}, 5), now = random_tensor(gpu, dtype, {B, 40}, 6),
                       shifted = window.clone();
          norm_projection({residual, with_branch ? branch : Tensor(), norm, 1e-5, weight, wide, window, now});
          shift_window(shifted, now);
          CHECK(window.to_vector<float>() == shifted.to_vector<float>());
          const auto normed = add_rmsnorm(with_branch ? Variable(branch) : Variable(), residual, norm, 1e-5, dtype);
          CHECK(sum.to_vector<float>() == normed.residual.value().to_vector<float>());
          const Tensor expected = linear(normed.y, weight).value();
          expect_near(out, expected, dtype, "out " + out.describe());
          expect_near(wide, expected, dtype, "wide out " + wide.describe());
        }
}

TEST("token step: a row's bits do not depend on the other rows") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Device gpu = Device::cuda();
  bool (*const fit)(const Tensor&, int64_t, int64_t) = LONGHAND_CUDA_IMPL(few_rows_fit_cuda);
  for (const Dtype dtype : kDtypes)
    // Blocks of a part of a tile, of a tile, of two, four and eight; what Mamba-2's and GLA's layers and a head of several turns have.
    for (const auto& [D, R] : {std::pair<int64_t, int64_t>{dtype == Dtype::f32 ? 4096 : 5120, 40},
                               {512, 200},
                               {2048, 1024},
                               {1024, 3088},
                               {1024, 4384},
                               {256, 9000},
                               {1024, 20000}}) {
      if (is_left_out()) continue;
      CAPTURE(D);
      CAPTURE(R);
      CAPTURE(name_of(dtype));
      constexpr int64_t kMost = kTokenStepRows;
      const Tensor residual = random_tensor(gpu, Dtype::f32, {kMost, D}, 1), norm = random_tensor(gpu, Dtype::f32, {D}, 2),
                   weight = random_tensor(gpu, dtype, {R, D}, 3), y = random_tensor(gpu, dtype, {kMost, D}, 4),
                   z = random_tensor(gpu, dtype, {kMost, D}, 5), window = random_tensor(gpu, dtype, {kMost, 3, D}, 6),
                   taps = random_tensor(gpu, Dtype::f32, {D, 1, 4}, 7);
      const bool many_fit = fit(weight, kMost, 0);
      if (D == 512) CHECK(many_fit);
      constexpr int kKinds = 4;
      std::vector<std::vector<float>> alone[kKinds];  // [kind of product][row]
      for (const int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 32}) {
        if (rows > kRowsOfGroup && !many_fit) continue;
        for (int64_t begin = 0; begin + rows <= kMost; begin += rows) {
          const auto part = [&](const Tensor& t) { return t.slice(0, begin, begin + rows); };
          const Tensor out[] = {Tensor::empty(gpu, Dtype::f32, {rows, R}), Tensor::empty(gpu, dtype, {rows, R}),
                                Tensor::empty(gpu, dtype, {rows, R}), Tensor::empty(gpu, dtype, {rows, R})};
          norm_projection({part(residual), {}, norm, 1e-5, weight, out[0]});
          gated_projection({part(y), part(z), norm, 1e-5, 1, false, weight, out[1], {}, {}});
          convolved_projection({part(y), part(window), taps, {}, weight, Tensor::empty(gpu, dtype, {rows, D}), out[2]});
          gated_projection({part(y), part(z), norm, 1e-5, 4, true, weight, out[3], {}, {}});
          for (int kind = 0; kind < kKinds; ++kind)
            for (int64_t b = 0; b < rows; ++b) {
              const auto row = out[kind].slice(0, b, b + 1).to_vector<float>();
              if (rows == 1) alone[kind].push_back(row);
              CAPTURE(kind);
              CAPTURE(rows);
              CHECK(row == alone[kind][static_cast<std::size_t>(begin + b)]);
            }
        }
      }
    }
}

TEST("token step: the gate and its projection agree with the ops, in every form, and the window moves on") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Device gpu = Device::cuda();
  const NoGrad no_grad;
  struct Form {
    bool norm, before;
    int64_t groups;
  };
  for (const Dtype dtype : kDtypes)
    for (const int64_t B : {1, 3, 8, 10, 16, 31, 33})
      for (const auto& [E, R] : {std::pair<int64_t, int64_t>{64, 9}, {2048, 1024}, {1536, 768}})
        for (const Form& form : {Form{true, false, 1}, {true, true, 1}, {true, false, 4}, {false, false, 1}})
          for (const int64_t taps : {0, 1, 3, 9}) {
            if (is_left_out()) continue;
            constexpr int64_t C = 40;
            const Tensor y = random_tensor(gpu, dtype, {B, E}, 1), both = random_tensor(gpu, dtype, {B, E + C}, 2);
            const Tensor z = both.slice(1, 0, E), now = both.slice(1, E, E + C), weight = random_tensor(gpu, dtype, {R, E}, 3, 0.05);
            const Tensor norm = form.norm ? random_tensor(gpu, Dtype::f32, {E}, 4) : Tensor(), out = Tensor::empty(gpu, dtype, {B, R});
            const Tensor window = random_tensor(gpu, dtype, {B, taps, C}, 5), before = window.clone(), shifted = window.clone();
            gated_projection({y, z, norm, 1e-5, form.groups, form.before, weight, out, window, now});
            const Variable gated = gated_rmsnorm(y, z, norm, {.eps = 1e-5, .groups = form.groups, .norm_before_gate = form.before});
            expect_near(out, linear(gated, weight).value(), dtype, "out " + out.describe());
            shift_window(shifted, now);
            CHECK(window.to_vector<float>() == shifted.to_vector<float>());
            if (taps == 0) continue;
            CHECK(window.slice(1, taps - 1, taps).contiguous().to_vector<float>() == now.to_vector<float>());
            CHECK(window.slice(1, 0, taps - 1).contiguous().to_vector<float>() == before.slice(1, 1, taps).contiguous().to_vector<float>());
          }
}

TEST("token step: the gate of GLA's heads, which share the norm's weights, and of its network, whose two halves are strided") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Device gpu = Device::cuda();
  const NoGrad no_grad;
  for (const Dtype dtype : kDtypes)
    for (const int64_t B : {1, 2, 8, 9, 33})
      for (const auto& [H, Dv] : {std::pair<int64_t, int64_t>{4, 256}, {2, 12}, {3, 88}}) {
        if (is_left_out()) continue;
        const int64_t E = H * Dv;
        const Tensor y = random_tensor(gpu, dtype, {B, E}, 1), z = random_tensor(gpu, dtype, {B, E + 3}, 2).slice(1, 3, E + 3),
                     norm = random_tensor(gpu, Dtype::f32, {Dv}, 3), weight = random_tensor(gpu, dtype, {40, E}, 4, 0.05),
                     out = Tensor::empty(gpu, dtype, {B, 40});
        gated_projection({y, z, norm, 1e-6, H, true, weight, out, {}, {}});
        const Variable heads = gated_rmsnorm(y.reshape({B, H, Dv}), z.contiguous().reshape({B, H, Dv}), norm,
                                             {.eps = 1e-6, .groups = 1, .norm_before_gate = true});
        expect_near(out, linear(heads.value().reshape({B, E}), weight).value(), dtype, "heads " + out.describe());
        const Tensor both = random_tensor(gpu, dtype, {B, 2 * E}, 5), gate = both.slice(1, 0, E), up = both.slice(1, E, 2 * E);
        gated_projection({up, gate, {}, 0, 1, false, weight, out, {}, {}});
        const Variable gated = gated_rmsnorm(up.contiguous(), gate.contiguous(), {}, {});
        expect_near(out, linear(gated, weight).value(), dtype, "network " + out.describe());
      }
}

TEST("token step: convolution and projection agree with the ops, and the window stays") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Device gpu = Device::cuda();
  const NoGrad no_grad;
  for (const Dtype dtype : kDtypes)
    for (const int64_t B : {1, 3, 8, 9, 25, 33})
      for (const auto& [C, R] : {std::pair<int64_t, int64_t>{32, 9}, {1536, 80}, {5120, 192}})
        for (const int64_t W : {1, 2, 4}) {
          if (is_left_out()) continue;
          const int64_t begin = W == 2 ? 3 : 0;  // off the grid of packs, too
          const Tensor both = random_tensor(gpu, dtype, {B, 2 * C}, 1), now = both.slice(1, begin, begin + C),
                       window = random_tensor(gpu, dtype, {B, W - 1, C}, 2), kept = window.clone(),
                       conv_weight = random_tensor(gpu, Dtype::f32, {C, 1, W}, 3, 0.5),
                       conv_bias = W == 2 ? Tensor() : random_tensor(gpu, Dtype::f32, {C}, 4, 0.5),
                       weight = random_tensor(gpu, dtype, {R, C}, 5, 0.05), y = Tensor::empty(gpu, dtype, {B, C}),
                       out = Tensor::empty(gpu, dtype, {B, R});
          convolved_projection({now, window, conv_weight, conv_bias, weight, y, out});
          const auto conv = causal_conv1d_silu(now.contiguous().reshape({B, 1, C}), conv_weight, conv_bias, window);
          const Tensor expected = conv.y.value().reshape({B, C});
          expect_near(y, expected, dtype, "y " + y.describe());
          expect_near(out, linear(expected, weight).value(), dtype, "out " + out.describe());
          CHECK(window.to_vector<float>() == kept.to_vector<float>());
        }
}

TEST("token step: the middle of a Mamba-1 layer agrees with dt's projection and the scan, token after token") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Device gpu = Device::cuda();
  const NoGrad no_grad;
  struct Case {
    int64_t B, E, N, rank;
  };
  for (const Dtype dtype : kDtypes)
    for (const Case& c : {Case{1, 32, 4, 1}, {3, 40, 16, 5}, {2, 72, 20, 8}, {1, 1536, 16, 48}, {9, 160, 64, 12}}) {
      const Tensor dt_weight = random_tensor(gpu, dtype, {c.E, c.rank}, 1, 0.3), A_log = random_tensor(gpu, Dtype::f32, {c.E, c.N}, 2),
                   D_skip = random_tensor(gpu, Dtype::f32, {c.E}, 3), dt_bias = random_tensor(gpu, Dtype::f32, {c.E}, 4),
                   state = random_tensor(gpu, Dtype::f32, {c.B, c.E, c.N}, 5);
      Tensor expected_state = state.clone();
      for (uint64_t token = 0; token < 5; ++token) {
        const Tensor x = random_tensor(gpu, dtype, {c.B, c.E}, 20 + token),
                     selected = random_tensor(gpu, dtype, {c.B, c.rank + 2 * c.N}, 30 + token), y = Tensor::empty(gpu, dtype, {c.B, c.E});
        mamba1_token({x, selected, dt_weight, A_log, D_skip, dt_bias, state, y});
        const auto part = [&](int64_t begin, int64_t end) {
          return selected.slice(1, begin, end).contiguous().reshape({c.B, 1, end - begin});
        };
        const Variable dt = linear(part(0, c.rank), dt_weight);
        const auto scan = selective_scan(x.reshape({c.B, 1, c.E}), dt, A_log, part(c.rank, c.rank + c.N),
                                         part(c.rank + c.N, c.rank + 2 * c.N), D_skip, {}, dt_bias, expected_state);
        expected_state = scan.h_T.value();
        expect_near(y, scan.y.value(), dtype, "y " + y.describe());
        expect_near(state, expected_state, dtype, "state " + state.describe());
      }
    }
}

TEST("token step: the middle of a GLA layer agrees with the gates' projection and gla, token after token") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Device gpu = Device::cuda();
  const NoGrad no_grad;
  struct Case {
    int64_t B, H, Dk, Dv, rank;
    double gate_min;
  };
  constexpr double kNone = -std::numeric_limits<double>::infinity();
  for (const Dtype dtype : kDtypes)
    for (const Case& c : {Case{1, 2, 8, 4, 1, kNone}, {3, 2, 24, 20, 3, -0.05}, {1, 4, 128, 256, 16, kNone}, {9, 1, 64, 128, 16, kNone}}) {
      const int64_t K = c.H * c.Dk, V = c.H * c.Dv;
      const Tensor gate_weight = random_tensor(gpu, dtype, {K, c.rank}, 1), gate_bias = random_tensor(gpu, Dtype::f32, {K}, 2),
                   state = random_tensor(gpu, Dtype::f32, {c.B, c.H, c.Dk, c.Dv}, 3);
      Tensor expected_state = state.clone();
      for (uint64_t token = 0; token < 5; ++token) {
        const Tensor all = random_tensor(gpu, dtype, {c.B, 2 * K + V + c.rank}, 20 + token), y = Tensor::empty(gpu, dtype, {c.B, V});
        const Tensor q = all.slice(1, 0, K), k = all.slice(1, K, 2 * K), v = all.slice(1, 2 * K, 2 * K + V),
                     low = all.slice(1, 2 * K + V, 2 * K + V + c.rank);
        gla_token({q, k, v, low, gate_weight, gate_bias, 16, c.gate_min, 1 / std::sqrt(static_cast<double>(c.Dk)), state, y});
        const Shape keys{c.B, 1, c.H, c.Dk}, values{c.B, 1, c.H, c.Dv};
        const Variable gate = linear(low.contiguous(), gate_weight, gate_bias);
        const auto mixed = gla(q.contiguous().reshape(keys), k.contiguous().reshape(keys), v.contiguous().reshape(values),
                               gate.value().reshape(keys), expected_state, {.gate_normalizer = 16, .gate_min = c.gate_min});
        expected_state = mixed.h_T.value();
        expect_near(y, mixed.o.value(), dtype, "y " + y.describe());
        expect_near(state, expected_state, dtype, "state " + state.describe());
      }
    }
}

TEST("token step: the middle of a Mamba-2 layer agrees with convolution and ssd, token after token") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Device gpu = Device::cuda();
  const NoGrad no_grad;
  struct Case {
    int64_t B, H, P, N, G, W;
    bool bias, wide_skip;
  };
  for (const Dtype dtype : kDtypes)
    for (const Case& c : {Case{1, 2, 16, 8, 1, 4, true, false},
                          {3, 4, 64, 128, 2, 4, true, true},
                          {2, 4, 32, 132, 4, 2, false, false},
                          {1, 32, 64, 128, 1, 4, true, false},
                          {5, 2, 64, 132, 1, 4, true, true},
                          {6, 4, 64, 128, 2, 4, true, true},
                          {9, 2, 64, 64, 1, 1, false, false},
                          {9, 32, 64, 128, 1, 4, true, false},  // mamba2-370m's
                          {20, 32, 64, 128, 1, 4, true, false},
                          {71, 8, 64, 128, 2, 4, true, true},  // as many states as pass through shared memory
                          {150, 8, 64, 128, 1, 4, false, false}}) {
      if (dtype == Dtype::f32 && c.N > 128) continue;  // beyond what ssd takes
      const int64_t inner = c.H * c.P, C = inner + 2 * c.G * c.N;
      const Tensor conv_weight = random_tensor(gpu, Dtype::f32, {C, 1, c.W}, 1, 0.5),
                   conv_bias = c.bias ? random_tensor(gpu, Dtype::f32, {C}, 2, 0.5) : Tensor(),
                   A_log = random_tensor(gpu, Dtype::f32, {c.H}, 3), dt_bias = random_tensor(gpu, Dtype::f32, {c.H}, 4),
                   D_skip = random_tensor(gpu, Dtype::f32, c.wide_skip ? Shape{c.H, c.P} : Shape{c.H}, 5);
      const Tensor state = random_tensor(gpu, Dtype::f32, {c.B, c.H, c.P, c.N}, 6),
                   window = random_tensor(gpu, dtype, {c.B, c.W - 1, C}, 7);
      Tensor expected_state = state.clone(), expected_window = window.clone();
      for (uint64_t token = 0; token < 5; ++token) {
        if (token > 0 && is_left_out()) break;  // every case has its first token
        const Tensor projected = random_tensor(gpu, dtype, {c.B, inner + C + c.H}, 20 + token);
        const Tensor now = projected.slice(1, inner, inner + C), y = Tensor::empty(gpu, dtype, {c.B, inner}), gated_state = state.clone();
        const auto last = [&](const Tensor& t) { return t.slice(0, c.B - 1, c.B); };
        const Tensor state_alone = last(state).clone(), y_alone = Tensor::empty(gpu, dtype, {1, inner});
        Mamba2Token call{.projected = projected,
                         .conv_weight = conv_weight,
                         .conv_bias = conv_bias,
                         .window = window,
                         .A_log = A_log,
                         .D_skip = D_skip,
                         .dt_bias = dt_bias,
                         .dt_min = 0.01,
                         .dt_max = 2,
                         .groups = c.G,
                         .state = state,
                         .y = y};
        mamba2_token(call);
        call.state = gated_state;
        call.y = Tensor::empty(gpu, Dtype::f32, {c.B, inner});
        call.gate = true;
        mamba2_token(call);
        const Tensor gated = call.y;
        CHECK(gated_state.to_vector<float>() == state.to_vector<float>());
        call.gate = false;
        call.projected = last(projected);
        call.window = last(window);
        call.state = state_alone;
        call.y = y_alone;
        mamba2_token(call);
        CHECK(state_alone.to_vector<float>() == last(state).contiguous().to_vector<float>());
        CHECK(y_alone.to_vector<float>() == last(y).contiguous().to_vector<float>());
        shift_window(window, now);
        const auto conv = causal_conv1d_silu(now.contiguous().reshape({c.B, 1, C}), conv_weight, conv_bias, expected_window);
        const Tensor mixed = conv.y.value();
        const auto ssd_out = ssd(mixed.slice(2, 0, inner).reshape({c.B, 1, c.H, c.P}),
                                 projected.slice(1, inner + C, inner + C + c.H).contiguous().reshape({c.B, 1, c.H}), A_log,
                                 mixed.slice(2, inner, inner + c.G * c.N).reshape({c.B, 1, c.G, c.N}),
                                 mixed.slice(2, inner + c.G * c.N, C).reshape({c.B, 1, c.G, c.N}), D_skip, dt_bias, expected_state,
                                 {.dt_min = 0.01, .dt_max = 2});
        expected_window = conv.window.value();
        expected_state = ssd_out.h_T.value();
        expect_near(y, ssd_out.y.value(), dtype, "y " + y.describe());
        const Variable with_gate = gated_rmsnorm(ssd_out.y.value().reshape({c.B, inner}), projected.slice(1, 0, inner), {}, {});
        expect_near(gated, with_gate.value(), dtype, "gated " + gated.describe());
        expect_near(state, expected_state, dtype, "state " + state.describe());
        CHECK(window.to_vector<float>() == expected_window.to_vector<float>());
      }
    }
}

TEST("token step: a product is cut as the GPU demands, and its sums alike for every number of rows") {
  constexpr GpuSizes kLarge{227 * 1024, 132}, kMiddle{163 * 1024, 108}, kSmall{99 * 1024, 84};  // sm_90, sm_80, sm_86
  const auto rows = [](const GpuSizes& gpu, int64_t R, int64_t D, int64_t B = 1, Dtype dtype = Dtype::bf16) {
    const ProductCut cut = cut_product({R, D, B, size_of(dtype), D}, gpu);
    if (cut.fits) CHECK(cut.shared_bytes <= gpu.shared_memory_per_block - 2048);
    return cut.fits ? 1 << cut.rows_log2 : 0;
  };
  CHECK(rows(kLarge, 4384, 1024) == 64);   // twice the rows: too few blocks
  CHECK(rows(kLarge, 4096, 2048) == 32);   // twice the rows: too much memory
  CHECK(rows(kLarge, 50288, 1024) == 32);  // in turns: two blocks share a multiprocessor
  CHECK(rows(kLarge, 1024, 2048) == 16);   // a tile, though that leaves half of the multiprocessors idle
  CHECK(rows(kLarge, 40, 64) == 16);
  CHECK(rows(kSmall, 4384, 1024) == 16);
  CHECK(rows(kSmall, 1024, 2048) == 16);
  CHECK(rows(kSmall, 1024, 2048, 8) == 8);
  CHECK(rows(kSmall, 10576, 2560) == 8);  // half a tile
  CHECK(rows(kSmall, 2560, 5120) == 4);
  CHECK(rows(kSmall, 2560, 5120, 8) == 0);  // a matrix product then, and norms by themselves
  CHECK(rows(kLarge, 2560, 5120, 8) == 8);
  CHECK(rows(kLarge, 100, 4096, 1, Dtype::f32) == 8);
  CHECK(rows(kLarge, 100, 16384, 1, Dtype::f32) == 0);
  CHECK(rows(kLarge, 4384, 1024, 8) == 64);
  CHECK(cut_product({4384, 1024, 1, 2, 1024}, kLarge).warps == 8);
  CHECK(cut_product({4384, 1024, 2, 2, 1024}, kLarge).warps == 16);
  CHECK(cut_product({50288, 1024, 1, 2, 1024}, kLarge).blocks == 1572);
  CHECK(cut_product({50288, 1024, 1, 2, 1024}, kLarge).resident == 264);
  CHECK(cut_product({4384, 1024, 1, 2, 1024}, kLarge).resident == 69);  // all
  const auto many = [](const GpuSizes& gpu, int64_t R, int64_t D) { return cut_formed_product({R, D, kRowsOfPass, 2, 0}, gpu).fits; };
  for (const auto& [R, D] : {std::pair<int64_t, int64_t>{4384, 1024}, {1024, 2048}, {3088, 1024}, {5632, 1024}, {1024, 2816}, {3072, 768}})
    CHECK(many(kLarge, R, D));
  CHECK_FALSE(many(kLarge, 50288, 1024));  // in turns
  CHECK_FALSE(many(kLarge, 8512, 2048));
  CHECK_FALSE(many(kLarge, 2048, 4096));  // sixteen rows of x and of weight
  for (const GpuSizes& gpu : {kLarge, kMiddle, kSmall})
    for (const int64_t R : {24, 1000, 3072, 4384, 6000, 8400, 50288})
      for (const int64_t D : {64, 256, 768, 1024, 2048, 2560}) {
        const ProductCut alone = cut_product({R, D, 1, 2, D}, gpu);
        REQUIRE(alone.fits);
        for (int64_t B = 1; B <= kTokenStepRows; ++B) {
          const ProductCut formed = cut_formed_product({R, D, B, 2, 0}, gpu);
          if (!formed.fits) continue;
          CHECK(parts_log2(formed.rows_log2) == parts_log2(alone.rows_log2));
          CHECK(formed.shared_bytes <= gpu.shared_memory_per_block - 2048);
        }
        for (int64_t B = 1; B <= kRowsOfGroup; ++B)
          for (const int64_t floats_ahead : {D, (B + 1) * D}) {
            const ProductCut cut = cut_product({R, D, B, 2, floats_ahead}, gpu);
            if (cut.fits) CHECK(parts_log2(cut.rows_log2) == parts_log2(alone.rows_log2));
            else CHECK((floats_ahead > D || alone.rows_log2 <= kTileLog2));  // several tiles were chosen with eight rows of x in mind
          }
      }
}

TEST("token step: what does not fit is named, and a CPU has none") {
  const Device cpu = Device::cpu();
  const Tensor x = Tensor::zeros(cpu, Dtype::f32, {1, 16}), w = Tensor::zeros(cpu, Dtype::f32, {4, 16}),
               norm = Tensor::zeros(cpu, Dtype::f32, {16}), out = Tensor::zeros(cpu, Dtype::f32, {1, 4});
  CHECK_THROWS_AS(norm_projection({x, {}, norm, 1e-5, w, out}), DeviceError);
  CHECK_THROWS_WITH_AS(norm_projection({x, {}, norm, 1e-5, w, x}), doctest::Contains("[1, 4]"), ShapeError);
  CHECK_THROWS_AS(gated_projection({x, x, norm, 1e-5, 16, false, w, out, {}, {}}), ValueError);  // groups of a single column
  CHECK_FALSE(mamba1_token_fits(6, 48));
  CHECK_FALSE(mamba1_token_fits(68, 48));
  CHECK_FALSE(mamba1_token_fits(16, 321));
  CHECK(mamba1_token_fits(16, 320));
  CHECK_FALSE(mamba2_token_fits(24, 128));
  CHECK_FALSE(mamba2_token_fits(64, 260));
  CHECK(mamba2_token_fits(64, 128));
  CHECK_FALSE(gla_token_fits(257, 256, 16));
  CHECK_FALSE(gla_token_fits(128, 6, 16));
  CHECK_FALSE(gla_token_fits(4, 8, 1));
  CHECK_FALSE(gla_token_fits(256, 256, 72));
  CHECK(gla_token_fits(256, 256, 64));
}

}  // namespace
}  // namespace longhand
