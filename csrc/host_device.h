// Functions that the CPU and the CUDA kernels share.
#pragma once

#ifdef __CUDACC__
#define D2EXT_HOST_DEVICE __host__ __device__ inline
#else
#define D2EXT_HOST_DEVICE inline
#endif
