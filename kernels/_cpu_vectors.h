/* The fused loop of a variant with intrinsics: distance, merge and counts while the elements are in registers.
 *
 * `_cpu.c` includes this file after the variant's vector operations (load, round_and_store and others); a pair of
 * vectors holds 2 * WIDTH elements in fp32.  Where sft and aligned are bf16, the first vector has the even elements and
 * the second one the odd elements, because one shift and one mask make them; else the first vector has the first half.
 *
 * The loop takes every d and every output for finite.  Sums of d * d that are not finite, or a NaN in `flag`, show that
 * one is not: then the caller computes the block again by the loops of `_cpu_loops.h`, which leave such elements out of
 * the sums and count them.  Each sum has the elements and the order of those loops, so the bits are the same.
 */

/* What the loop keeps in registers. */
typedef struct {
    NAME(Two) dd, aa, top; /* sums of d * d and of aligned * aligned, and the largest |d| */
    NAME(Counter) changed;
    VECTOR flag; /* NaN after an output that is not finite */
} NAME(Registers);

TARGET INLINE void NAME(step)(const char *sft, int sft_dtype, const char *aligned, int aligned_dtype, char *out,
                              VECTOR alpha, int distance, int count, NAME(Registers) *registers) {
    const int interleaved = sft_dtype == CODE_BF16 && aligned_dtype == CODE_BF16;
    const NAME(Two) s = NAME(load)(sft, sft_dtype, interleaved), x = NAME(load)(aligned, aligned_dtype, interleaved);
    const NAME(Two) d = {SUB(x.first, s.first), SUB(x.second, s.second)};
    if (distance) {
        registers->dd.first = ADD(registers->dd.first, MUL(d.first, d.first));
        registers->dd.second = ADD(registers->dd.second, MUL(d.second, d.second));
        registers->aa.first = ADD(registers->aa.first, MUL(x.first, x.first));
        registers->aa.second = ADD(registers->aa.second, MUL(x.second, x.second));
        registers->top.first = MAX_ABS(registers->top.first, d.first);
        registers->top.second = MAX_ABS(registers->top.second, d.second);
    }
    const NAME(Two) r = {ADD(x.first, MUL(alpha, d.first)), ADD(x.second, MUL(alpha, d.second))};
    const NAME(Two) after = NAME(round_and_store)(out, aligned_dtype, interleaved, !count, r);
    if (count) {
        registers->changed = ADD_UNEQUAL(registers->changed, x.first, after.first);
        registers->changed = ADD_UNEQUAL(registers->changed, x.second, after.second);
        /* 0 times infinity and 0 times NaN are NaN.  This fused operation reaches no result. */
        registers->flag = MULTIPLY_ADD(after.first, ZERO, registers->flag);
        registers->flag = MULTIPLY_ADD(after.second, ZERO, registers->flag);
    }
}

/* Write a pair of vectors to the lanes of its elements. */
TARGET INLINE void NAME(spill)(NAME(Two) two, int interleaved, float *lanes) {
    float first[WIDTH], second[WIDTH];
    STORE(first, two.first);
    STORE(second, two.second);
    for (int j = 0; j < WIDTH; j++) {
        lanes[interleaved ? 2 * j : j] = first[j];
        lanes[interleaved ? 2 * j + 1 : WIDTH + j] = second[j];
    }
}

/* Compute n elements, and return 1 unless the counts or the distance need the exact path.
 *
 * A loop with sums takes the block once for each pair of vectors among SUMS lanes, so that all sums are in registers.
 * The last elements, fewer than a step, are computed in a copy that zeros fill: they add 0 to every sum and count. */
TARGET INLINE int NAME(fused)(const char *sft, int sft_dtype, const char *aligned, int aligned_dtype, char *out,
                              Py_ssize_t n, float alpha, int distance, int count, Lanes *lanes, int64_t *changed) {
    enum { PAIR_ELEMENTS = 2 * WIDTH };
    const int interleaved = sft_dtype == CODE_BF16 && aligned_dtype == CODE_BF16;
    const Py_ssize_t sft_item = ITEMSIZE[sft_dtype], item = ITEMSIZE[aligned_dtype];
    const Py_ssize_t stride = distance ? SUMS : PAIR_ELEMENTS, whole = n / stride * stride;
    const VECTOR wide = SET(alpha);
    NAME(Registers) registers;
    registers.changed = NAME(no_count)();
    registers.flag = ZERO;
    char last_sft[SUMS * 4], last_aligned[SUMS * 4], last_out[SUMS * 4];
    if (whole < n) {
        memset(last_sft, 0, sizeof last_sft);
        memset(last_aligned, 0, sizeof last_aligned);
        memcpy(last_sft, sft + whole * sft_item, (n - whole) * sft_item);
        memcpy(last_aligned, aligned + whole * item, (n - whole) * item);
    }
    for (Py_ssize_t q = 0; q < stride; q += PAIR_ELEMENTS) {
        registers.dd = registers.aa = registers.top = (NAME(Two)){ZERO, ZERO};
        for (Py_ssize_t i = q; i < whole; i += stride) {
            for (Py_ssize_t b = 0; q == 0 && b < stride * sft_item; b += LINE)
                _mm_prefetch(sft + i * sft_item + AHEAD + b, _MM_HINT_T0);
            for (Py_ssize_t b = 0; q == 0 && b < stride * item; b += LINE)
                _mm_prefetch(aligned + i * item + AHEAD + b, _MM_HINT_T0);
            NAME(step)(sft + i * sft_item, sft_dtype, aligned + i * item, aligned_dtype, out + i * item, wide, distance,
                       count, &registers);
        }
        if (whole < n)
            NAME(step)(last_sft + q * sft_item, sft_dtype, last_aligned + q * item, aligned_dtype, last_out + q * item,
                       wide, distance, count, &registers);
        if (distance) {
            NAME(spill)(registers.dd, interleaved, lanes->dd + q);
            NAME(spill)(registers.aa, interleaved, lanes->aa + q);
            NAME(spill)(registers.top, interleaved, lanes->top + q);
        }
    }
    if (whole < n) memcpy(out + whole * item, last_out, (n - whole) * item);
    if (!count) return 1;
    *changed = NAME(count_total)(registers.changed);
    float flags[WIDTH], flag = 0;
    STORE(flags, registers.flag);
    for (int j = 0; j < WIDTH; j++) flag += flags[j];
    return flag == 0;
}

#define FUSED_PAIR(S, A)                                                                                              \
    TARGET static void NAME(fused_merge_##S##_##A)(const char *sft, const char *aligned, char *out, Py_ssize_t n,           \
                                             float alpha) {                                                           \
        NAME(fused)(sft, CODE_##S, aligned, CODE_##A, out, n, alpha, 0, 0, NULL, NULL);                               \
    }                                                                                                                 \
    TARGET static int NAME(fused_count_##S##_##A)(const char *sft, const char *aligned, char *out, Py_ssize_t n,            \
                                            float alpha, Lanes *lanes, int64_t *changed) {                            \
        return NAME(fused)(sft, CODE_##S, aligned, CODE_##A, out, n, alpha, 0, 1, lanes, changed);                    \
    }                                                                                                                 \
    TARGET static int NAME(fused_measure_##S##_##A)(const char *sft, const char *aligned, char *out, Py_ssize_t n,          \
                                              float alpha, Lanes *lanes, int64_t *changed) {                          \
        return NAME(fused)(sft, CODE_##S, aligned, CODE_##A, out, n, alpha, 1, 1, lanes, changed);                    \
    }

#define FUSED_ROW(A) FUSED_PAIR(BF16, A) FUSED_PAIR(F16, A) FUSED_PAIR(F32, A)
FUSED_ROW(BF16)
FUSED_ROW(F16)
FUSED_ROW(F32)

/* Indexed by [dtype of sft][dtype of aligned]. */
#define FUSED_ENTRY(S, A) {NAME(fused_merge_##S##_##A), NAME(fused_count_##S##_##A), NAME(fused_measure_##S##_##A)}
static const Fused NAME(FUSED)[3][3] = {
    {FUSED_ENTRY(BF16, BF16), FUSED_ENTRY(BF16, F16), FUSED_ENTRY(BF16, F32)},
    {FUSED_ENTRY(F16, BF16), FUSED_ENTRY(F16, F16), FUSED_ENTRY(F16, F32)},
    {FUSED_ENTRY(F32, BF16), FUSED_ENTRY(F32, F16), FUSED_ENTRY(F32, F32)},
};

#undef FUSED_ENTRY
#undef FUSED_ROW
#undef FUSED_PAIR
#undef VECTOR
#undef WIDTH
#undef ZERO
#undef SET
#undef ADD
#undef SUB
#undef MUL
#undef MULTIPLY_ADD
#undef MAX_ABS
#undef ADD_UNEQUAL
#undef STORE
