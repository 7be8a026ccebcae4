/* The words an ISA file must define, twice: once with REAL float, once with REAL double.
 *
 *   vec                     VLEN numbers
 *   v_load v_store          unaligned
 *   v_load_n v_store_n      the first n of VLEN, n <= VLEN; loads fill up with zeros
 *   v_load_f16 v_load_bf16  VLEN numbers stored in 16 bits, exactly
 *   v_set1                  the same number in every lane
 *   v_add v_sub v_mul v_div
 *   v_fma(a, b, c)          a * b + c, rounded once
 *   v_max(a, b)             b where either is NaN
 *   v_if_equal(a, b, x, y)  x where a == b, else y
 *   v_if_less(a, b, x, y)   x where a < b, else y
 *   v_pow2(t)               the number whose exponent field is the low bits of t's encoding
 *   v_transpose(v)          of VLEN vectors, in place
 *
 * NV is the number of vectors in a tile; ROWS(nv) the rows of the register tile beside nv vectors:
 * accumulators + nv + 1 must fit the register file. VALUE_NV(rows) is the same for tiles of 1, 2
 * or 4 query rows: the vectors of head dims beside them.
 *
 * Every word below is pasted with SUFFIX, so one text serves both dtypes in one object file. */
#define MHA_PASTE_(a, b) a##_##b
#define MHA_PASTE(a, b) MHA_PASTE_(a, b)
#define FN(name) MHA_PASTE(name, SUFFIX)

#define vec FN(vec)
#define v_load FN(v_load)
#define v_store FN(v_store)
#define v_load_n FN(v_load_n)
#define v_store_n FN(v_store_n)
#define v_load_f16 FN(v_load_f16)
#define v_load_bf16 FN(v_load_bf16)
#define v_set1 FN(v_set1)
#define v_add FN(v_add)
#define v_sub FN(v_sub)
#define v_mul FN(v_mul)
#define v_div FN(v_div)
#define v_fma FN(v_fma)
#define v_max FN(v_max)
#define v_if_equal FN(v_if_equal)
#define v_if_less FN(v_if_less)
#define v_pow2 FN(v_pow2)
#define v_transpose FN(v_transpose)

#if defined(_MSC_VER) && !defined(__clang__)
#define ALWAYS_INLINE __forceinline
#define NOINLINE __declspec(noinline)
#define UNROLL
#define PREFETCH(p) ((void)(p))
#else
#define ALWAYS_INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define PREFETCH(p) __builtin_prefetch(p, 0, 2)
#endif

#define WORD static ALWAYS_INLINE

/* A loop unrolled whole: n is a constant after inlining. */
#define EACH(i, n)                                                                                 \
    UNROLL                                                                                         \
    for (int i = 0; i < (n); i++)
