// swiglu in the epilogues of the products in front of it and behind it (sm_90a); swiglu_mlp_kernels.h has the formulas.
//
// A tile's sums are rounded to bf16 and held, 64 registers of a thread, while the next tile's products are under way. Between those they
// are worked off part by part: exponentials, loads and stores go on beside the tensor cores, and no tile waits for the epilogue of another.
//
// swiglu_product_kernel, forward
// moves   x and both weights in (x once, weights mostly from L2), gate, up and h out: R*E * 6 bytes, R*E * 2 where h alone is wanted
// flops   4 * R*in*E; an exponential and a reciprocal for each element of h
// floor   32768 x 1024 -> 2 x 2816: 378 GFLOP / 0.99 PFLOP/s = 0.38 ms on an H100 SXM
// split   blocks stay, one an SM, and take tiles of 128 rows and 128 columns of gate and of up; tiles of the same rows follow one another.
//         One thread orders boxes of 64 features four ahead, two warpgroups multiply 64 rows each; results leave 16 rows and 64 columns at
//         a time
//
// swiglu_product_kernel, backward
// moves   grad_y and down in, gate and up in, their gradients out: R*E * 8 bytes, and 2 more where h is left once more
// flops   2 * R*out*E
// floor   32768 x 1024 -> 2816: 189 GFLOP / 0.99 PFLOP/s = 0.19 ms; the bytes, 0.81 GB / 3.0 TB/s = 0.27 ms on an H100 SXM
// split   tiles of 128 rows and 256 columns. gate and up come through the same boxes as the operands, 64 columns at a time; their gradients
//         are written over them there and leave from there
//
// needs   bf16, widths that are multiples of 8, rows that begin at multiples of 16 bytes; swiglu_products_fit_cuda() tells
// agrees  with swiglu to the bit from gate, up and the gradient of h on, which differ from cuBLAS's by the order of their sums
// order   fixed: features one after the other; no atomics
#include <algorithm>

#include "core/show_as_written_cuda.h"
#include "ops/common/box_copies.cuh"
#include "ops/common/cuda_math.cuh"
#include "ops/common/gemm.h"
#include "ops/common/launch.cuh"
#include "ops/swiglu/swiglu_mlp_kernels.h"

namespace longhand {
namespace {

enum class Form { hidden, hidden_and_gates, gradients, gradients_and_hidden };
template <Form form>
constexpr bool kForward = form == Form::hidden || form == Form::hidden_and_gates;

constexpr int kTileRows = 128, kTileColumns = 256, kTileFeatures = kPanelColumns;
constexpr int kStages = 4, kThreads = 3 * kWarpgroup, kWorkerWarps = 8;
constexpr int kFetcherRegisters = 24, kWorkerRegisters = 240;
constexpr int kRowsBytes = kTileRows * kPanelRow, kColumnsBytes = kTileColumns * kPanelRow, kStageBytes = kRowsBytes + kColumnsBytes;
constexpr int kResultRows = 16, kPieceBytes = kResultRows * kPanelRow;  // of 64 results that a warp sends at once
constexpr int kPiecesPlace = kStages * kStageBytes, kPieces = 2;
template <Form form>
constexpr int kBarriersPlace = kPiecesPlace + (kForward<form> ? kWorkerWarps * kPieces * kPieceBytes : 0);
template <Form form>
constexpr int kSharedBytes = kPanelAlignment + kBarriersPlace<form> + 2 * kStages * 8;

/// Columns of h in a tile, and how many parts its results are worked off in.
template <Form form>
constexpr int kHiddenColumns = kForward<form> ? kTileColumns / 2 : kTileColumns;
template <Form form>
constexpr int kParts = form == Form::hidden             ? 2
                       : form == Form::hidden_and_gates ? 6
                                                        : 4;

struct ProductArgs {
  CUtensorMap rows;                        // x or grad_y
  CUtensorMap gate_weight, up_weight;      // forward
  CUtensorMap down, gates_here, ups_here;  // backward
  CUtensorMap gates, ups, h;               // results: gate and up or their gradients
  int row_tiles, column_tiles, slices;     // slices: of 64 features that are summed
};

struct Place {
  int row, column;  // of h
};
template <Form form>
__device__ __forceinline__ Place place_of(const ProductArgs& a, int tile) {
  return {tile / a.column_tiles * kTileRows, tile % a.column_tiles * kHiddenColumns<form>};
}

/// The slices of a tile that come before a part of the one before it: the same for the thread that fetches and those that work.
template <Form form>
__device__ __forceinline__ int slices_before(int part, int slices) {
  return (part + 1) * slices / (kParts<form> + 1);
}

template <Form form>
__global__ void __launch_bounds__(kThreads, 1) swiglu_product_kernel(const __grid_constant__ ProductArgs a) {
#if LONGHAND_WARPGROUP_INSTRUCTIONS
  constexpr bool forward = kForward<form>;
  unsigned char* const memory = shared_memory() + (0u - shared_address(shared_memory())) % kPanelAlignment;
  uint64_t *const full = reinterpret_cast<uint64_t*>(memory + kBarriersPlace<form>), *const empty = full + kStages;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  create_ring<kStages>(full, empty, kWorkerWarps);

  const int tiles = a.row_tiles * a.column_tiles, first_tile = static_cast<int>(blockIdx.x), step = static_cast<int>(gridDim.x);
  unsigned n = 0;  // stages filled so far; stages worked on so far
  if (thread >= 2 * kWarpgroup) {
    give_up_registers<kFetcherRegisters>();
    if (thread == 2 * kWarpgroup) {
      const auto next_stage = [&](unsigned bytes) {
        const unsigned stage = n % kStages;
        if (n >= kStages) barrier_wait(&empty[stage], static_cast<int>(n / kStages - 1) % 2);
        barrier_expect(&full[stage], bytes);
        ++n;
        return stage;
      };
      const auto fetch_slice = [&](Place tile, int slice) {
        const unsigned stage = next_stage(kStageBytes);
        unsigned char *const rows = memory + stage * kStageBytes, *const columns = rows + kRowsBytes;
        const int feature = slice * kTileFeatures;
        copy_box_async(rows, &a.rows, tile.row, feature, &full[stage]);
        if constexpr (forward) {
          copy_box_async(columns, &a.gate_weight, tile.column, feature, &full[stage]);
          copy_box_async(columns + kColumnsBytes / 2, &a.up_weight, tile.column, feature, &full[stage]);
        } else {
#pragma unroll
          for (int panel = 0; panel < kTileColumns / static_cast<int>(kPanelColumns); ++panel)
            copy_box_async(columns + panel * kPanelBytes, &a.down, feature, tile.column + panel * static_cast<int>(kPanelColumns),
                           &full[stage]);
        }
      };
      const auto fetch_gates = [&](Place tile, int part) {
        const unsigned stage = next_stage(2 * kRowsBytes);
        unsigned char* const gates = memory + stage * kStageBytes;
        const int column = tile.column + part * static_cast<int>(kPanelColumns);
        copy_box_async(gates, &a.gates_here, tile.row, column, &full[stage]);
        copy_box_async(gates + kRowsBytes, &a.ups_here, tile.row, column, &full[stage]);
      };
      Place before{};
      for (int tile = first_tile; tile < tiles; tile += step) {
        const Place here = place_of<form>(a, tile);
        int part = tile == first_tile ? kParts<form> : 0;
        for (int slice = 0; slice < a.slices; ++slice) {
          if constexpr (!forward)
            for (; part < kParts<form> && slices_before<form>(part, a.slices) == slice; ++part) fetch_gates(before, part);
          fetch_slice(here, slice);
        }
        before = here;
      }
      if constexpr (!forward)
        for (int part = 0; part < kParts<form>; ++part) fetch_gates(before, part);
    }
  } else {
    take_registers<kWorkerRegisters>();
    const int warp = thread / kWarp;
    const auto release = [&](unsigned stage) {
      if (lane == 0) barrier_arrive(&empty[stage % kStages]);
    };
    // The 16 bytes that a lane names of two neighbouring tiles of 8 columns, number j and j + 1, of the 16 rows of a piece.
    const auto lane_place = [&](int j) {
      const unsigned matrix = static_cast<unsigned>(lane) / 8;
      return panel_place(static_cast<unsigned>(lane) % 8 + matrix % 2 * 8, (static_cast<unsigned>(j) + matrix / 2) * 8);
    };

    float acc[kTileColumns / 8][4];
    uint32_t held[kTileColumns / 8][2];  // of the tile before: columns 8 j + .., rows g and g + 8
    Place before{};

    // Forward: 64 columns of results leave through one of two places in shared memory.
    unsigned pieces_sent = 0;
    const auto send = [&](const CUtensorMap* to, int part, const uint32_t* results) {
      unsigned char* const piece = memory + kPiecesPlace + (warp * kPieces + static_cast<int>(pieces_sent++ % kPieces)) * kPieceBytes;
      if (lane == 0) boxes_read_but<kPieces - 1>();  // the one that was here before
      __syncwarp();
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        const uint32_t four[4] = {results[2 * j], results[2 * j + 1], results[2 * j + 2], results[2 * j + 3]};
        store_matrices(piece + lane_place(j), four);
      }
      publish_to_tensor_cores();
      __syncwarp();
      if (lane == 0) {
        store_box_async(to, before.row + kResultRows * warp, before.column + part * static_cast<int>(kPanelColumns), piece);
        close_boxes();
      }
    };
    const auto send_hidden = [&](int part) {
      uint32_t h[8][2];
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 gate = unpack(held[8 * part + j][half]), up = unpack(held[kTileColumns / 16 + 8 * part + j][half]);
          h[j][half] = pack(silu(gate.x) * up.x, silu(gate.y) * up.y);
        }
      send(&a.h, part, &h[0][0]);
    };

    // Backward: 64 columns of gate and up become their gradients where they lie, in a stage that is released when these have been read.
    constexpr unsigned kNone = ~0u;
    unsigned leaving = kNone;
    const auto release_leaving = [&] {
      if (forward || leaving == kNone) return;
      if (lane == 0) boxes_read_but<0>();
      release(leaving);
      leaving = kNone;
    };
    const auto form_gradients = [&](int part) {
      release_leaving();
      const unsigned stage = n % kStages;
      unsigned char *const gates = memory + stage * kStageBytes + warp * kPieceBytes, *const ups = gates + kRowsBytes,
                           *const hidden = ups + kRowsBytes;
      barrier_wait(&full[stage], static_cast<int>(n / kStages) % 2);
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        const unsigned place = lane_place(j);
        uint32_t gate[4], up[4], h[4];
        load_matrices(gate, gates + place);
        load_matrices(up, ups + place);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float2 grad = unpack(held[8 * part + j + r / 2][r % 2]), g = unpack(gate[r]), u = unpack(up[r]);
          const float2 s = make_float2(sigmoid(g.x), sigmoid(g.y));
          gate[r] = pack(grad.x * u.x * silu_slope(g.x, s.x), grad.y * u.y * silu_slope(g.y, s.y));
          up[r] = pack(grad.x * (g.x * s.x), grad.y * (g.y * s.y));
          h[r] = pack(g.x * s.x * u.x, g.y * s.y * u.y);
        }
        store_matrices(gates + place, gate);
        store_matrices(ups + place, up);
        if constexpr (form == Form::gradients_and_hidden) store_matrices(hidden + place, h);
      }
      publish_to_tensor_cores();
      __syncwarp();
      if (lane == 0) {
        const int row = before.row + kResultRows * warp, column = before.column + part * static_cast<int>(kPanelColumns);
        store_box_async(&a.gates, row, column, gates);
        store_box_async(&a.ups, row, column, ups);
        if constexpr (form == Form::gradients_and_hidden) store_box_async(&a.h, row, column, hidden);
        close_boxes();
      }
      leaving = n++;
    };

    const auto work_off = [&](int part) {
      if constexpr (!forward) {
        form_gradients(part);
      } else if constexpr (form == Form::hidden) {
        send_hidden(part);
      } else {
        const int columns = part / 3;  // first all 64 of gate, then of up, then of h
        if (part % 3 == 0) send(&a.gates, columns, &held[8 * columns][0]);
        else if (part % 3 == 1) send(&a.ups, columns, &held[kTileColumns / 16 + 8 * columns][0]);
        else send_hidden(columns);
      }
    };

    unsigned multiplied = 0;  // the last stage with a slice
    const auto multiply = [&](int from, int to) {
      constexpr Summed summed = forward ? Summed::along_rows : Summed::across_rows;
      for (int slice = from; slice < to; ++slice) {
        const unsigned char* const rows = memory + n % kStages * kStageBytes;
        barrier_wait(&full[n % kStages], static_cast<int>(n / kStages) % 2);
        products_begin();
#pragma unroll
        for (int k16 = 0; k16 < kTileFeatures / 16; ++k16)
          multiply_panels<Summed::along_rows, summed>(acc, operand<Summed::along_rows>(rows + warp / 4 * kPanelBytes, k16),
                                                      operand<summed>(rows + kRowsBytes, k16), slice > 0 || k16 > 0);
        products_close();
        products_done_but<1>();
        if (slice > 0) release(multiplied);
        release_leaving();
        multiplied = n++;
      }
    };

    for (int tile = first_tile; tile < tiles; tile += step) {
      int done = 0;
#pragma unroll
      for (int part = 0; part < kParts<form>; ++part) {
        const int slices = slices_before<form>(part, a.slices);
        multiply(done, slices);
        done = slices;
        if (tile != first_tile) work_off(part);
      }
      multiply(done, a.slices);
      products_done_but<0>();
      release(multiplied);
      touch(acc);
#pragma unroll
      for (int j = 0; j < kTileColumns / 8; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) held[j][half] = pack(acc[j][2 * half], acc[j][2 * half + 1]);
      before = place_of<form>(a, tile);
    }
#pragma unroll
    for (int part = 0; part < kParts<form>; ++part) work_off(part);
    if (lane == 0) boxes_stored();
  }
#endif
}

int tiles_of(int64_t size, int of) {
  return static_cast<int>((size + of - 1) / of);
}

template <Form form>
void run(const Tensor& h_like, int64_t features, ProductArgs args) {
  const CudaContext& cuda = h_like.device().cuda_context();
  args.row_tiles = tiles_of(h_like.dim(0), kTileRows);
  args.column_tiles = tiles_of(h_like.dim(1), kHiddenColumns<form>);
  args.slices = tiles_of(features, kTileFeatures);
  launch(&swiglu_product_kernel<form>, "swiglu_product_kernel",
         static_cast<unsigned>(std::min(args.row_tiles * args.column_tiles, cuda.sm_count)), kThreads, kSharedBytes<form>, cuda, args);
}

/// Where a kernel's warps send their results.
CUtensorMap result_boxes(const Tensor& result) {
  show_as_written(result);
  return panel_boxes(result, kResultRows);
}

}  // namespace

bool swiglu_products_fit_cuda(const Tensor& x, const Tensor& gate_up, const Tensor& down) {
  if (x.dtype() != Dtype::bf16 || x.rank() < 1 || x.numel() == 0) return false;
  const Tensor rows = as_matrix(x);
  const CudaContext& cuda = x.device().cuda_context();
  const int64_t R = rows.dim(0), E = down.dim(1), most = INT32_MAX / 4;
  const bool copied = fits_boxes(rows) && fits_boxes(gate_up) && fits_boxes(down) && down.dim(0) % 8 == 0 && down.dim(0) > 0;
  const int64_t tiles = R < most && E < most ? int64_t{tiles_of(R, kTileRows)} * tiles_of(E, kTileColumns / 2) : INT64_MAX;
  return copied && tiles >= cuda.sm_count && tiles < most && has_warpgroup_instructions(&swiglu_product_kernel<Form::hidden>, cuda);
}

void swiglu_product_cuda(const SwigluProduct& p) {
  ProductArgs args{};
  args.rows = panel_boxes(p.x, kTileRows);
  args.gate_weight = panel_boxes(p.gate_weight, kTileColumns / 2);
  args.up_weight = panel_boxes(p.up_weight, kTileColumns / 2);
  args.h = result_boxes(p.h);
  if (!p.gate.defined()) return run<Form::hidden>(p.h, p.x.dim(1), args);
  args.gates = result_boxes(p.gate);
  args.ups = result_boxes(p.up);
  run<Form::hidden_and_gates>(p.h, p.x.dim(1), args);
}

void swiglu_product_bwd_cuda(const SwigluProductBackward& p) {
  ProductArgs args{};
  args.rows = panel_boxes(p.grad_y, kTileRows);
  args.down = panel_boxes(p.down, kTileFeatures);
  args.gates_here = panel_boxes(p.gate, kTileRows);
  args.ups_here = panel_boxes(p.up, kTileRows);
  args.gates = result_boxes(p.grad_gate);
  args.ups = result_boxes(p.grad_up);
  if (!p.h.defined()) return run<Form::gradients>(p.gate, p.down.dim(0), args);
  args.h = result_boxes(p.h);
  run<Form::gradients_and_hidden>(p.gate, p.down.dim(0), args);
}

}  // namespace longhand
