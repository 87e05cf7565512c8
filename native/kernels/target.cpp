// Compiled without the library's instruction set, whatever that is: this asks whether the processor has it.
//
// Nothing of the standard library is used here: the linker could take such a function from a source that is compiled
// for the instruction set.
#include "kernels/target.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// What the other sources are compiled for: names of instruction sets as compilers have them, each behind a space.
// hatch_build.py gives it; where all sources are compiled alike, the compiler's own macros say it.
#if !defined(LAYERSKIP_NEEDS)
#if defined(__AVX2__)
#define LAYERSKIP_NEEDS_AVX2 " avx2 fma f16c"
#else
#define LAYERSKIP_NEEDS_AVX2 ""
#endif
#if defined(__AVX512F__)
#define LAYERSKIP_NEEDS_AVX512 " avx512f avx512bw avx512vl avx512dq"
#else
#define LAYERSKIP_NEEDS_AVX512 ""
#endif
#if defined(__AVX512VNNI__)
#define LAYERSKIP_NEEDS_VNNI " avx512vnni"
#else
#define LAYERSKIP_NEEDS_VNNI ""
#endif
#if defined(__AVX512BF16__)
#define LAYERSKIP_NEEDS_BF16 " avx512bf16"
#else
#define LAYERSKIP_NEEDS_BF16 ""
#endif
#if defined(__AMX_TILE__)
#define LAYERSKIP_NEEDS_AMX " amx-tile amx-int8 amx-bf16"
#else
#define LAYERSKIP_NEEDS_AMX ""
#endif
#if defined(__ARM_FEATURE_DOTPROD)
#define LAYERSKIP_NEEDS_DOTPROD " dotprod"
#else
#define LAYERSKIP_NEEDS_DOTPROD ""
#endif
#define LAYERSKIP_NEEDS                                                                           \
    LAYERSKIP_NEEDS_AVX2 LAYERSKIP_NEEDS_AVX512 LAYERSKIP_NEEDS_VNNI LAYERSKIP_NEEDS_BF16         \
        LAYERSKIP_NEEDS_AMX LAYERSKIP_NEEDS_DOTPROD
#endif

namespace layerskip {
namespace {

constexpr char kNeeds[] = LAYERSKIP_NEEDS;

// Length of the word at `text`, which ends at a space or at the end.
int word_length(const char* text) {
    int length = 0;
    while (text[length] != '\0' && text[length] != ' ') ++length;
    return length;
}

bool same_word(const char* word, int length, const char* name) {
    for (int i = 0; i < length; ++i)
        if (word[i] != name[i]) return false;
    return name[length] == '\0';
}

bool needs(const char* name) {
    for (const char* at = kNeeds; *at != '\0';) {
        const int length = word_length(at);
        if (length > 0 && same_word(at, length, name)) return true;
        at += length > 0 ? length : 1;
    }
    return false;
}

#if defined(__x86_64__)

constexpr uint64_t kNoState = 0, kAvxState = 0x6, kAvx512State = 0xe6, kTileState = 0x60000;

// Where CPUID says that the processor has an instruction set, and what the system has to save when it switches threads.
struct Feature {
    const char* name;
    uint32_t leaf, subleaf;
    int place;  // of the register among eax, ebx, ecx and edx
    int bit;
    uint64_t state;
};

constexpr Feature kFeatures[] = {
    {"fma", 1, 0, 2, 12, kAvxState},
    {"f16c", 1, 0, 2, 29, kAvxState},
    {"avx2", 7, 0, 1, 5, kAvxState},
    {"avx512f", 7, 0, 1, 16, kAvx512State},
    {"avx512dq", 7, 0, 1, 17, kAvx512State},
    {"avx512bw", 7, 0, 1, 30, kAvx512State},
    {"avx512vl", 7, 0, 1, 31, kAvx512State},
    {"avx512vnni", 7, 0, 2, 11, kAvx512State},
    {"avx512bf16", 7, 1, 0, 5, kAvx512State},
    {"amx-tile", 7, 0, 3, 24, kTileState},
    {"amx-int8", 7, 0, 3, 25, kTileState},
    {"amx-bf16", 7, 0, 3, 22, kTileState},
};

bool cpuid_bit(uint32_t leaf, uint32_t subleaf, int place, int bit) {
    uint32_t found[4] = {0, 0, 0, 0};
    if (!__get_cpuid_count(leaf, subleaf, &found[0], &found[1], &found[2], &found[3])) return false;
    return found[place] >> bit & 1;
}

// The registers that the system saves (XGETBV), 0 if it saves none of those that are asked for here.
uint64_t saved_state() {
    if (!cpuid_bit(1, 0, 2, 27)) return 0;
    uint32_t low, high;
    __asm__ __volatile__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<uint64_t>(high) << 32 | low;
}

// Whether the system lets this process use tile registers, which Linux wants to be asked for.
bool may_use_tiles() {
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

bool has(const char* word, int length) {
    for (const Feature& feature : kFeatures) {
        if (!same_word(word, length, feature.name)) continue;
        if (!cpuid_bit(feature.leaf, feature.subleaf, feature.place, feature.bit)) return false;
        if ((saved_state() & feature.state) != feature.state) return false;
        return feature.state != kTileState || may_use_tiles();
    }
    return false;
}

#elif defined(__aarch64__) && defined(__linux__)

struct Feature {
    const char* name;
    unsigned long kind;
    int bit;
};

constexpr Feature kFeatures[] = {{"dotprod", AT_HWCAP, 20}, {"i8mm", AT_HWCAP2, 13}, {"bf16", AT_HWCAP2, 14}};

bool has(const char* word, int length) {
    for (const Feature& feature : kFeatures)
        if (same_word(word, length, feature.name)) return getauxval(feature.kind) >> feature.bit & 1;
    return false;
}

#elif defined(__aarch64__) && defined(__APPLE__)

struct Feature {
    const char *name, *key;
};

constexpr Feature kFeatures[] = {{"dotprod", "hw.optional.arm.FEAT_DotProd"},
                                 {"i8mm", "hw.optional.arm.FEAT_I8MM"},
                                 {"bf16", "hw.optional.arm.FEAT_BF16"}};

bool has(const char* word, int length) {
    for (const Feature& feature : kFeatures) {
        if (!same_word(word, length, feature.name)) continue;
        int32_t found = 0;
        size_t size = sizeof found;
        return sysctlbyname(feature.key, &found, &size, nullptr, 0) == 0 && found != 0;
    }
    return false;
}

#else

bool has(const char*, int) { return false; }

#endif

}  // namespace

const char* target() {
    if (needs("amx-tile")) return "amx";
    if (needs("avx512bf16")) return "avx512bf16";
    if (needs("avx512vnni")) return "avx512vnni";
    if (needs("avx512f")) return "avx512";
    if (needs("avx2")) return "avx2";
    if (needs("i8mm")) return "i8mm";
    if (needs("dotprod")) return "dotprod";
#if defined(__aarch64__)
    return "neon";
#else
    return "generic";
#endif
}

const char* missing() {
    static char names[sizeof kNeeds + 1];
    char* to = names;
    for (const char* at = kNeeds; *at != '\0';) {
        const int length = word_length(at);
        if (length > 0 && !has(at, length)) {
            if (to != names) *to++ = ' ';
            for (int i = 0; i < length; ++i) *to++ = at[i];
        }
        at += length > 0 ? length : 1;
    }
    *to = '\0';
    return names;
}

bool runs_here() { return missing()[0] == '\0'; }

}  // namespace layerskip
