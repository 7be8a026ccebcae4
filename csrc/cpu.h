/* The features of a CPU that instruction sets are chosen by, as bits of one number. */
#ifndef MHA_CPU_H
#define MHA_CPU_H

#include <stdint.h>

enum {
#define MHA_CPU(name, leaf, reg, bit, state) MHA_CPU_##name,
#include "cpu.def"
#undef MHA_CPU
};

#define CPU(name) (1u << MHA_CPU_##name)

uint32_t mha_cpu_features(void);

#endif
