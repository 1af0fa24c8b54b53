// SPDX-License-Identifier: Apache-2.0
// Functions that run on both sides: arithmetic of indices, bounds and interpolation.
#pragma once

#ifdef __CUDACC__
#define PYFEAT_HOST_DEVICE __host__ __device__
#else
#define PYFEAT_HOST_DEVICE
#endif
