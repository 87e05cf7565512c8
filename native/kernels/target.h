// The instruction set that the kernels are compiled for.
#pragma once

namespace layerskip {

// Its name: avx512, avx2, neon, or generic.
const char* target();

// Whether this processor has it.
bool runs_here();

}  // namespace layerskip
