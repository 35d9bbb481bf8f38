// The machine instructions under the tile products: asynchronous copies, matrix loads and the bf16 tensor-core product (sm_80 and later).
#pragma once
#include <cuda_bf16.h>

#include <cstdint>

namespace longhand {

/// The dynamic shared memory of the block.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

/// 16 bytes from global to shared memory, both aligned to 16; arrives by copies_arrived() of the same thread.
__device__ __forceinline__ void copy_16_async(void* to_shared, const void* from_global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to_shared)), "l"(from_global) : "memory");
}
/// The same, or 16 zero bytes where `read` is false; then from_global is not looked at.
__device__ __forceinline__ void copy_16_or_zero_async(void* to_shared, const void* from_global, bool read) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to_shared)), "l"(from_global), "r"(read ? 16 : 0)
               : "memory");
}
/// Likewise 4, 8 or 16 bytes, both aligned to as many.
template <int bytes>
__device__ __forceinline__ void copy_or_zero_async(void* to_shared, const void* from_global, bool read) {
  if constexpr (bytes == 16) copy_16_or_zero_async(to_shared, from_global, read);
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to_shared)), "l"(from_global), "n"(bytes),
                 "r"(read ? bytes : 0)
                 : "memory");
}
__device__ __forceinline__ void copies_arrived() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

/// Copies since the last call form a group; copies_arrived_but<n> waits for all groups of this thread but the last n.
__device__ __forceinline__ void close_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int n>
__device__ __forceinline__ void copies_arrived_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

/// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8 and gets, of every matrix, the elements
/// (row l / 4, columns 2 * (l % 4) and the next). The transposed form exchanges rows and columns.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

/// An 8 x 8 matrix of 16-bit elements, lane l holding (row l / 4, columns 2 * (l % 4) and the next), with rows and columns exchanged.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t pair) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

/// c [16, 8] += a [16, 16] * b [16, 8]
__device__ __forceinline__ void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace longhand
