/* Which instruction sets are compiled in, and which of them this CPU (and its system) can run. */
#include "mha.h"

#define CPU(feature) __builtin_cpu_supports(feature)

#define MHA_ISA(name, condition) extern const mha_isa mha_isa_##name;
#include "isa.def"
#undef MHA_ISA

const mha_isa *mha_isa_at(int i)
{
    static const mha_isa *const isas[] = {
#define MHA_ISA(name, condition) &mha_isa_##name,
#include "isa.def"
#undef MHA_ISA
    };
    return i < (int)(sizeof isas / sizeof *isas) ? isas[i] : NULL;
}

int mha_isa_usable(int i)
{
    const int usable[] = {
#define MHA_ISA(name, condition) condition,
#include "isa.def"
#undef MHA_ISA
    };
    return usable[i] != 0;
}
