// The instruction set that the kernels are compiled for.
#pragma once

namespace layerskip {

// Its name: avx512, avx2, neon, ..., or generic.
const char* target();

// What it needs that this processor lacks, or the system doesn't allow: names behind one another, with a space between
// them.
const char* missing();

// Whether nothing is missing.
bool runs_here();

}  // namespace layerskip
