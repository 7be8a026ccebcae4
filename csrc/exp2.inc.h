/* exp2 for x <= 0: n = round(x), f = x - n in [-1/2, 1/2], 2^f by a polynomial, times 2^n.
 *
 * Adding MAGIC rounds x to an integer and leaves n + exponent bias in the low bits of the sum,
 * which v_pow2 shifts into place. x is held at -(bias), where that field is 0 and the result +0,
 * so -inf gives 0; NaN passes v_max as its second operand.
 * Coefficients: minimax for the relative error with constant term 1, fitted in 40 digits. float:
 * degree 5, error 2^-23.4, then the rounding of the coefficients searched for the least error,
 * 1.91 ulp over all floats, where neighbours can be out of order by one ulp. double: degree 11,
 * error 2^-58. */
static ALWAYS_INLINE vec FN(exp2_vec)(vec x)
{
    static const double single[] = {0x1.5bb714p-10, 0x1.3ce988p-7, 0x1.c6b772p-5,
                                    0x1.ebf9b8p-3,  0x1.62e428p-1, 1};
    static const double twice[] = {
        4.4347712982003767083e-10, 7.0737832485031332991e-9, 1.0178199571842137974e-7,
        1.3215435282308487999e-6,  1.5252733493127489347e-5, 1.5403530457112090860e-4,
        1.3333558146774620517e-3,  9.6181291075941201896e-3, 5.5504108664820083227e-2,
        0.2402265069591013126,     0.69314718055994532581,   1};
    const double *c = IS_FLOAT ? single : twice;
    const int degree = IS_FLOAT ? 5 : 11, bias = IS_FLOAT ? 127 : 1023;
    const vec magic = v_set1((REAL)((IS_FLOAT ? 0x1.8p23 : 0x1.8p52) + bias));

    x = v_max(v_set1((REAL)-bias), x);
    const vec t = v_add(x, magic), f = v_sub(x, v_sub(t, magic));
    vec p = v_set1((REAL)c[0]);
    UNROLL
    for (int i = 1; i <= degree; i++)
        p = v_fma(p, f, v_set1((REAL)c[i]));
    return v_mul(p, v_pow2(t));
}
