/* What this CPU and its system can run, asked of the CPU itself: __builtin_cpu_supports needs a
 * constructor of the compiler's library, which not every linker keeps, and then finds nothing. */
#include "cpu.h"

#if defined(__x86_64__) || defined(_M_X64)
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif

enum { EAX, EBX, ECX, EDX };

/* Kinds of registers, as the bits of XCR0 that say that the system saves them: SSE and AVX; then
 * also masks, upper halves and the upper 16. */
enum { YMM = 0x06, ZMM = 0xe6 };

static void cpuid(uint32_t leaf, uint32_t *r)
{
#if defined(_MSC_VER)
    __cpuidex((int *)r, (int)leaf, 0);
#else
    __cpuid_count(leaf, 0, r[EAX], r[EBX], r[ECX], r[EDX]);
#endif
}

static uint64_t xcr0(void)
{
#if defined(_MSC_VER)
    return _xgetbv(0);
#else
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
#endif
}

uint32_t mha_cpu_features(void)
{
    enum { LEAVES = 8, OSXSAVE = 27 }; /* a bit of leaf 1: there is an XCR0 to ask */
    uint32_t r[LEAVES][4] = {{0}}, found = 0;
    cpuid(0, r[0]);
    const uint32_t last = r[0][EAX];
    for (uint32_t leaf = 1; leaf < LEAVES && leaf <= last; leaf++)
        cpuid(leaf, r[leaf]);
    const uint64_t saved = r[1][ECX] >> OSXSAVE & 1 ? xcr0() : 0;
#define MHA_CPU(name, leaf, reg, bit, state)                                                       \
    if (r[leaf][reg] >> (bit) & 1 && (saved & (state)) == (state))                                 \
        found |= CPU(name);
#include "cpu.def"
#undef MHA_CPU
    return found;
}
#else
uint32_t mha_cpu_features(void) { return 0; }
#endif
