/* Which instruction sets are compiled in, and which of them this CPU (and its system) can run. */
#include "cpu.h"
#include "mha.h"

#define MHA_ISA(name, needs) extern const mha_isa mha_isa_##name;
#include "isa.def"
#undef MHA_ISA

const mha_isa *mha_isa_at(int i)
{
    static const mha_isa *const isas[] = {
#define MHA_ISA(name, needs) &mha_isa_##name,
#include "isa.def"
#undef MHA_ISA
    };
    return i < (int)(sizeof isas / sizeof *isas) ? isas[i] : NULL;
}

int mha_isa_usable(int i)
{
    static const uint32_t needs[] = {
#define MHA_ISA(name, needs) needs,
#include "isa.def"
#undef MHA_ISA
    };
    return (needs[i] & ~mha_cpu_features()) == 0;
}
