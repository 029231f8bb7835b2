// One spelling for what the host's and the device's compilers call differently.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define HYBRID_LM_FN __host__ __device__ __forceinline__
#else
#define HYBRID_LM_FN inline __attribute__((always_inline))
#endif
