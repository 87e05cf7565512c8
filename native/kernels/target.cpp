#include "kernels/target.h"

namespace layerskip {

const char* target() {
#if defined(__AVX512BF16__)
    return "avx512bf16";
#elif defined(__AVX512VNNI__)
    return "avx512vnni";
#elif defined(__AVX512F__)
    return "avx512";
#elif defined(__AVX2__)
    return "avx2";
#elif defined(__ARM_NEON)
    return "neon";
#else
    return "generic";
#endif
}

bool runs_here() {
    bool found = true;
#if defined(__AVX2__)
    found = found && __builtin_cpu_supports("avx2");
#endif
#if defined(__FMA__)
    found = found && __builtin_cpu_supports("fma");
#endif
#if defined(__F16C__)
    found = found && __builtin_cpu_supports("f16c");
#endif
#if defined(__AVX512F__)
    found = found && __builtin_cpu_supports("avx512f");
#endif
#if defined(__AVX512BW__)
    found = found && __builtin_cpu_supports("avx512bw");
#endif
#if defined(__AVX512DQ__)
    found = found && __builtin_cpu_supports("avx512dq");
#endif
#if defined(__AVX512VL__)
    found = found && __builtin_cpu_supports("avx512vl");
#endif
#if defined(__AVX512VNNI__)
    found = found && __builtin_cpu_supports("avx512vnni");
#endif
#if defined(__AVX512BF16__)
    found = found && __builtin_cpu_supports("avx512bf16");
#endif
    return found;
}

}  // namespace layerskip
