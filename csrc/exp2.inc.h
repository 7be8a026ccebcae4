/* exp2 for x <= 0: n = round(x), f = x - n in [-1/2, 1/2], 2^f = 1 + f p(f), times 2^n; and tanh.
 *
 * Adding MAGIC rounds x to an integer and leaves n + exponent bias in the low bits of the sum,
 * which v_pow2 shifts into place. x is held at -(bias), where that field is 0 and the result +0,
 * so -inf gives 0; NaN passes v_max as its second operand.
 * Coefficients: minimax for the relative error of 2^f, fitted in 40 digits. float: degree 5, error
 * 2^-23.4, then the rounding of the coefficients searched for the least error, 1.91 ulp over all
 * floats, where neighbours can be out of order by one ulp. double: degree 11, error 2^-58. */
static const double FN(exp2_double)[] = {
    4.4347712982003767083e-10, 7.0737832485031332991e-9, 1.0178199571842137974e-7,
    1.3215435282308487999e-6,  1.5252733493127489347e-5, 1.5403530457112090860e-4,
    1.3333558146774620517e-3,  9.6181291075941201896e-3, 5.5504108664820083227e-2,
    0.2402265069591013126,     0.69314718055994532581};
static const double FN(exp2_single)[] = {0x1.5bb714p-10, 0x1.3ce988p-7, 0x1.c6b772p-5,
                                         0x1.ebf9b8p-3, 0x1.62e428p-1};

/* f, where `power` is 2^n. */
static ALWAYS_INLINE vec FN(fraction)(vec x, vec *power)
{
    const int bias = IS_FLOAT ? 127 : 1023;
    const vec magic = v_set1((REAL)((IS_FLOAT ? 0x1.8p23 : 0x1.8p52) + bias));
    x = v_max(v_set1((REAL)-bias), x);
    const vec t = v_add(x, magic);
    *power = v_pow2(t);
    return v_sub(x, v_sub(t, magic));
}

static ALWAYS_INLINE vec FN(horner)(vec f, const double *c, int terms)
{
    vec p = v_set1((REAL)c[0]);
    UNROLL
    for (int i = 1; i < terms; i++)
        p = v_fma(p, f, v_set1((REAL)c[i]));
    return p;
}

static ALWAYS_INLINE vec FN(exp2_vec)(vec x)
{
    vec power;
    const vec f = FN(fraction)(x, &power);
    const vec p = IS_FLOAT ? FN(horner)(f, FN(exp2_single), 5) : FN(horner)(f, FN(exp2_double), 11);
    return v_mul(v_fma(p, f, v_set1(1)), power);
}

/* tanh(x) of z = 2 log2(e) x. With E = 2^-|z| - 1 it is E / (-2 - E), with the sign of x; E is
 * exact near 0, where exp2 - 1 would be all rounding. So float has coefficients of its own, fitted
 * for the relative error of 2^f - 1, 2^-26.1. Within 2.6 ulp over all floats, 3.1 over the doubles
 * tried; NaN in NaN out. */
static ALWAYS_INLINE vec FN(tanh_vec)(vec z)
{
    static const double single[] = {0x1.426feep-13, 0x1.5ef4a2p-10, 0x1.3b2c6p-7,
                                    0x1.c6af9ep-5,  0x1.ebfbdep-3,  0x1.62e43p-1};
    const vec zero = v_set1(0), minus = v_sub(zero, z);
    vec power;
    const vec f = FN(fraction)(v_sub(zero, v_max(minus, z)), &power);
    const vec p = IS_FLOAT ? FN(horner)(f, single, 6) : FN(horner)(f, FN(exp2_double), 11);
    const vec e = v_fma(power, v_mul(p, f), v_sub(power, v_set1(1)));
    const vec size = v_div(e, v_sub(v_set1(-2), e));
    return v_if_less(z, zero, v_sub(zero, size), size);
}
