// Products of warpgroups (sm_90a): four warps together multiply tiles that the tensor cores read from shared memory themselves, so that a
// product of 64 rows costs one instruction where tile_product.cuh needs dozens. Only where kWarpgroupInstructions says so.
//
// Tiles lie in panels: rows of 64 bf16 (128 bytes), 64 rows a panel, in which the 16-byte unit u of row r stands at u ^ (r % 8) (the
// "128-byte swizzle" of the hardware). Wider tiles are panels one behind the other. The same panel serves as an operand whose summed index
// runs along its rows or across them (Summed).
// An accumulator is acc[n / 8][4] as in tile_product.cuh; warp w of the warpgroup holds rows 16 w + .. of the 64.
#pragma once
#include "core/cuda_context.h"
#include "ops/common/tile_product.cuh"

// The compiler defines this when it builds for exactly sm_90a, where the instructions exist.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LONGHAND_WARPGROUP_INSTRUCTIONS 1
#else
#define LONGHAND_WARPGROUP_INSTRUCTIONS 0
#if defined(__CUDA_ARCH__)
#pragma nv_diag_suppress 177  // what only the bodies of these kernels use is not referenced here
#endif
#endif

namespace longhand {

/// Whether a kernel that needs these instructions can run: on this GPU, and in this build (for another architecture its body is empty,
/// which needs next to no registers; a build has the bodies of all such kernels or of none).
template <class Kernel>
bool has_warpgroup_instructions(Kernel kernel, const CudaContext& context) {
  if (context.major != 9) return false;
  static const bool built = [&] {
    cudaFuncAttributes attributes{};
    cuda_check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
    return attributes.numRegs > 32;
  }();
  return built;
}

constexpr int kWarpgroup = 128;                          // threads
constexpr unsigned kPanelColumns = 64, kPanelRow = 128;  // elements, bytes
constexpr int kPanelBytes = kChunk * 128;                // of 64 rows
constexpr int kPanelAlignment = 1024;                    // of a panel's address

/// The place of element (row, column) in panels of 64 rows. Unsigned, so that divisions are shifts.
__device__ __forceinline__ Bf16* panel_element(void* panels, unsigned row, unsigned column) {
  const unsigned unit = (column / 8 ^ row) % 8;
  return reinterpret_cast<Bf16*>(static_cast<unsigned char*>(panels) + column / kPanelColumns * kPanelBytes + row * kPanelRow + unit * 16 +
                                 column % 8 * 2);
}
__device__ __forceinline__ const Bf16* panel_element(const void* panels, unsigned row, unsigned column) {
  return panel_element(const_cast<void*>(panels), row, column);
}
/// Likewise in bytes from the beginning, for panels known by their address in shared memory.
__device__ __forceinline__ unsigned panel_place(unsigned row, unsigned column) {
  return column / kPanelColumns * kPanelBytes + row * kPanelRow + (column / 8 ^ row) % 8 * 16 + column % 8 * 2;
}

// --- barriers in shared memory that count arrivals --------------------------------------------------------------

__device__ __forceinline__ void barrier_create(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(barrier)) : "memory");
}
/// Arrives when this thread's asynchronous copies so far have arrived.
__device__ __forceinline__ void barrier_arrive_with_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
/// Waits for the end of the phase of this parity: 0 for the first, then 1, 0, ..
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n .reg .pred done;\n"
      "again:\n mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n @done bra over;\n bra again;\n"
      "over:\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

/// The same value, but computed anew where it is used: addresses in panels are cheaper to form than to keep in registers.
__device__ __forceinline__ int not_hoisted(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

/// What this thread has seen written to shared memory is visible to the tensor cores' own reads.
__device__ __forceinline__ void publish_to_tensor_cores() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// A barrier of `threads` threads; number 0 is __syncthreads'.
__device__ __forceinline__ void named_barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// --- products -----------------------------------------------------------------------------------------------------

#if LONGHAND_WARPGROUP_INSTRUCTIONS

/// Before the first product that touches registers written since, and before the first after a wait.
__device__ __forceinline__ void products_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
/// Products since the last call form a group.
__device__ __forceinline__ void products_close() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Waits for all groups but the last n.
template <int n>
__device__ __forceinline__ void products_done_but() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
}
/// All four warps of a warpgroup, each warpgroup in its own branch: from here on a thread has this many registers (a multiple of 8).
template <int registers>
__device__ __forceinline__ void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
/// Tells the compiler that an accumulator has changed under way.
template <int tiles>
__device__ __forceinline__ void touch(float (&acc)[tiles][4]) {
#pragma unroll
  for (int j = 0; j < tiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(acc[j][e])::"memory");
}

/// How the summed index runs through a panel.
enum class Summed { along_rows, across_rows };

/// The operand whose 16 values of the summed index are number k16. along_rows: of the 64 rows' columns 16 * k16 ..; across_rows: rows
/// 16 * k16 .., all columns.
template <Summed summed>
__device__ __forceinline__ uint64_t operand(unsigned panels, int k16) {  // by their address in shared memory
  const int offset = summed == Summed::along_rows ? k16 / 4 * kPanelBytes + k16 % 4 * 32 : k16 * 16 * kPanelRow;
  const uint64_t address = (panels + static_cast<unsigned>(offset)) >> 4 & 0x3fff;
  constexpr uint64_t next_panel = kPanelBytes >> 4, next_eight_rows = 8 * kPanelRow >> 4, swizzle_128 = 1;
  return address | next_panel << 16 | next_eight_rows << 32 | swizzle_128 << 62;
}
template <Summed summed>
__device__ __forceinline__ uint64_t operand(const void* panels, int k16) {
  return operand<summed>(shared_address(panels), k16);
}

#define LONGHAND_ACC_TILES(j)                                                                                                        \
  "+f"(acc[j][0]), "+f"(acc[j][1]), "+f"(acc[j][2]), "+f"(acc[j][3]), "+f"(acc[j + 1][0]), "+f"(acc[j + 1][1]), "+f"(acc[j + 1][2]), \
      "+f"(acc[j + 1][3])
#define LONGHAND_ACC_64                                                                                                                 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, " \
  "%28, %29, %30, %31}"
#define LONGHAND_ACC_128                                                                                                                \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, " \
  "%28, %29, %30, %31, "                                                                                                                \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, "  \
  "%58, %59, %60, %61, %62, %63}"
#define LONGHAND_ACC_256                                                                                                            \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, "  \
  "%27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, "   \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, "   \
  "%77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, " \
  "%102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, "  \
  "%123, %124, %125, %126, %127}"

/// acc [64, 64] (+)= a [64, 16] * b [16, 64]; accumulate false: acc is overwritten.
template <Summed summed_a, Summed summed_b>
__device__ __forceinline__ void multiply_panels(float (&acc)[8][4], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %34, 0;\n wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " LONGHAND_ACC_64
               ", %32, %33, p, 1, 1, %35, %36;\n}"
               : LONGHAND_ACC_TILES(0), LONGHAND_ACC_TILES(2), LONGHAND_ACC_TILES(4), LONGHAND_ACC_TILES(6)
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(summed_a == Summed::across_rows),
                 "n"(summed_b == Summed::across_rows));
}
/// acc [64, 128] likewise.
template <Summed summed_a, Summed summed_b>
__device__ __forceinline__ void multiply_panels(float (&acc)[16][4], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %66, 0;\n wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " LONGHAND_ACC_128
               ", %64, %65, p, 1, 1, %67, %68;\n}"
               : LONGHAND_ACC_TILES(0), LONGHAND_ACC_TILES(2), LONGHAND_ACC_TILES(4), LONGHAND_ACC_TILES(6), LONGHAND_ACC_TILES(8),
                 LONGHAND_ACC_TILES(10), LONGHAND_ACC_TILES(12), LONGHAND_ACC_TILES(14)
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(summed_a == Summed::across_rows),
                 "n"(summed_b == Summed::across_rows));
}
/// acc [64, 256] likewise; b is of 256 rows (along_rows: four panels of 64 rows, one behind the other).
template <Summed summed_a, Summed summed_b>
__device__ __forceinline__ void multiply_panels(float (&acc)[32][4], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %130, 0;\n wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " LONGHAND_ACC_256
               ", %128, %129, p, 1, 1, %131, %132;\n}"
               : LONGHAND_ACC_TILES(0), LONGHAND_ACC_TILES(2), LONGHAND_ACC_TILES(4), LONGHAND_ACC_TILES(6), LONGHAND_ACC_TILES(8),
                 LONGHAND_ACC_TILES(10), LONGHAND_ACC_TILES(12), LONGHAND_ACC_TILES(14), LONGHAND_ACC_TILES(16), LONGHAND_ACC_TILES(18),
                 LONGHAND_ACC_TILES(20), LONGHAND_ACC_TILES(22), LONGHAND_ACC_TILES(24), LONGHAND_ACC_TILES(26), LONGHAND_ACC_TILES(28),
                 LONGHAND_ACC_TILES(30)
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(summed_a == Summed::across_rows),
                 "n"(summed_b == Summed::across_rows));
}
/// The same with the left operand in registers, 16 rows of each warp.
template <Summed summed_b>
__device__ __forceinline__ void multiply_panels(float (&acc)[8][4], const Left<Bf16>& a, uint64_t b) {
  asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %37, 0;\n wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " LONGHAND_ACC_64
               ", {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}"
               : LONGHAND_ACC_TILES(0), LONGHAND_ACC_TILES(2), LONGHAND_ACC_TILES(4), LONGHAND_ACC_TILES(6)
               : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "l"(b), "r"(1), "n"(summed_b == Summed::across_rows));
}
template <Summed summed_b>
__device__ __forceinline__ void multiply_panels(float (&acc)[16][4], const Left<Bf16>& a, uint64_t b) {
  asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %69, 0;\n wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " LONGHAND_ACC_128
               ", {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}"
               : LONGHAND_ACC_TILES(0), LONGHAND_ACC_TILES(2), LONGHAND_ACC_TILES(4), LONGHAND_ACC_TILES(6), LONGHAND_ACC_TILES(8),
                 LONGHAND_ACC_TILES(10), LONGHAND_ACC_TILES(12), LONGHAND_ACC_TILES(14)
               : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "l"(b), "r"(1), "n"(summed_b == Summed::across_rows));
}

#undef LONGHAND_ACC_256
#undef LONGHAND_ACC_128
#undef LONGHAND_ACC_64
#undef LONGHAND_ACC_TILES

#endif  // LONGHAND_WARPGROUP_INSTRUCTIONS

/// What load_matrices reads, written: the elements of four 8 x 8 matrices that a lane has, and the shared address of the row it names.
__device__ __forceinline__ void store_matrices(unsigned row, const uint32_t (&r)[4]) {
#if LONGHAND_WARPGROUP_INSTRUCTIONS
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#endif
}
__device__ __forceinline__ void store_matrices(void* row, const uint32_t (&r)[4]) {
  store_matrices(shared_address(row), r);
}
/// The same with the rows of each matrix written as columns.
__device__ __forceinline__ void store_matrices_transposed(unsigned row, const uint32_t (&r)[4]) {
#if LONGHAND_WARPGROUP_INSTRUCTIONS
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]), "r"(r[1]), "r"(r[2]),
               "r"(r[3])
               : "memory");
#endif
}

/// The left operand [16 rows from `row`, 16 columns from `column`] out of panels, summed along the rows.
__device__ __forceinline__ Left<Bf16> left_from_panels(const void* panels, int row, int column) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
  Left<Bf16> left;
  load_matrices(left.r, panel_element(panels, row + lane % 8 + (matrix & 1) * 8, column + (matrix & 2) * 4));
  return left;
}

/// The left operand [16 columns from `column`, 16 rows from `row`]: rows and columns exchanged, summed across the rows.
__device__ __forceinline__ Left<Bf16> left_from_panels_transposed(const void* panels, int row, int column) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
  Left<Bf16> left;
  load_matrices_transposed(left.r, panel_element(panels, row + lane % 8 + (matrix & 2) * 4, column + (matrix & 1) * 8));
  return left;
}

/// rows x width elements from global memory (rows `row_stride` apart) into panels of 64 rows and `columns` columns, zeros around them, by
/// 16-byte copies of `threads` threads of which this is number `thread`; they arrive as copies do.
template <int columns, int threads>
__device__ __forceinline__ void load_panels(void* panels, const Bf16* from, int64_t row_stride, int rows, int width, unsigned thread) {
  constexpr int units = columns / 8, step = threads / units;  // rows at once
  static_assert(threads % units == 0 && kChunk % step == 0);
  const int first = static_cast<int>(thread / units), column = static_cast<int>(thread % units * 8);
  const int rows_here = (column < width ? rows : 0) - first;
  from += first * row_stride + column;
  const int64_t next = step * row_stride;
#pragma unroll
  for (int row = 0; row < kChunk; row += step, from += next)
    copy_16_or_zero_async(panel_element(panels, first + row, column), from, row < rows_here);
}

}  // namespace longhand
