/* Plain C: every CPU can run it. The fused multiply-add is the C library's, exact everywhere. */
#include "../dtype.h"
#include "../mha.h"
#include "vocabulary.h"

#include <math.h>
#include <string.h>

#define NV 2
#define ROWS(nv) 4
#define VALUE_NV(rows) 2

#define REAL float
#define SUFFIX f32
#define VLEN 4
#define FMA fmaf
#define BITS uint32_t
#define MANTISSA 23
#include "generic_words.inc.h"

#include "../kernel.inc.h"
#undef REAL
#undef SUFFIX
#undef VLEN
#undef FMA
#undef BITS
#undef MANTISSA

#define REAL double
#define SUFFIX f64
#define VLEN 2
#define FMA fma
#define BITS uint64_t
#define MANTISSA 52
#include "generic_words.inc.h"

#include "../kernel.inc.h"

const mha_isa mha_isa_generic = {"generic", &kernels_f32, &kernels_f64};
