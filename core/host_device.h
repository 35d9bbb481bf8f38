// Marks functions that run on the CPU and in kernels alike.
#pragma once

#ifdef __CUDACC__
#define LONGHAND_HOST_DEVICE __host__ __device__
#else
#define LONGHAND_HOST_DEVICE
#endif
