// SPDX-License-Identifier: Apache-2.0
// The kernels of the instruction set PYFEAT_CHECKED, under the name by which a check knows them: so
// the checks themselves are compiled once for all.
#if defined(PYFEAT_CHECKED_SAMPLING)
#include "cpu/sampling/kernels.hpp"

extern const pyfeat::SamplingTable& checked_sampling;
const pyfeat::SamplingTable& checked_sampling = pyfeat::PYFEAT_CHECKED::sampling_kernels;
#else
#include "cpu/similarity/kernels.hpp"

extern const pyfeat::Kernels& checked;
const pyfeat::Kernels& checked = pyfeat::PYFEAT_CHECKED::kernels;
#endif
