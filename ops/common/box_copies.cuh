// What the copy engine of sm_90 brings to shared memory by itself: one thread names a box of a matrix, or a run of bytes, and a barrier
// counts the bytes that have come. Boxes lie as panels do (warpgroup_instructions.cuh): rows of 64 bf16, units of 16 bytes at u ^ (r % 8);
// what a box has outside the matrix arrives as zeros.
#pragma once
#include <cuda.h>

#include "core/tensor.h"
#include "ops/common/warpgroup_instructions.cuh"

namespace longhand {

/// For a kernel's parameter (__grid_constant__).
/// matrix  [rows, columns] bf16; begins at a multiple of 16 bytes, and so does each row
/// errors  DeviceError when the driver refuses
CUtensorMap panel_boxes(const Tensor& matrix, int box_rows);

/// Whether a bf16 matrix lies as panel_boxes() asks, and its rows are whole units of 16 bytes.
bool fits_boxes(const Tensor& matrix);

/// Arrives, and tells the barrier how many bytes are to come in this phase.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
/// New barriers are seen by the copy engine, after the barrier of all threads that has to follow.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\n fence.proxy.async;" ::: "memory");
}
/// By a whole block: the barriers of `stages` places in shared memory that one thread has filled and `workers` warps empty.
template <int stages>
__device__ __forceinline__ void create_ring(uint64_t* full, uint64_t* empty, int workers) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < stages; ++stage) {
      barrier_create(&full[stage], 1);
      barrier_create(&empty[stage], workers);
    }
    publish_barriers();
  }
  __syncthreads();
}

/// The box whose first element is (row, column).
__device__ __forceinline__ void copy_box_async(void* to_shared, const CUtensorMap* boxes, int row, int column, uint64_t* barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                   shared_address(to_shared)),
               "l"(boxes), "r"(column), "r"(row), "r"(shared_address(barrier))
               : "memory");
}
/// A box from shared to global memory, by the thread that calls; what it has outside the matrix is left out. Boxes since the last
/// close_boxes() form a group of this thread.
__device__ __forceinline__ void store_box_async(const CUtensorMap* boxes, int row, int column, const void* from_shared) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(boxes), "r"(column), "r"(row),
               "r"(shared_address(from_shared))
               : "memory");
}
/// Both ways a run of bytes, a multiple of 16, from a multiple of 16 to another; a stored one is of the group, too.
__device__ __forceinline__ void copy_run_async(void* to_shared, const void* from, unsigned bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to_shared)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
__device__ __forceinline__ void store_run_async(void* to, const void* from_shared, unsigned bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from_shared)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void close_boxes() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
/// Waits until the groups of this thread but the last n have been read from shared memory.
template <int n>
__device__ __forceinline__ void boxes_read_but() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(n) : "memory");
}
/// Waits until all boxes of this thread have been stored.
__device__ __forceinline__ void boxes_stored() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

}  // namespace longhand
