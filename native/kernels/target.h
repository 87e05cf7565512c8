// The instruction set that the kernels are compiled for.
#pragma once

namespace layerskip {

// Whether this processor has it.
bool runs_here();

}  // namespace layerskip
