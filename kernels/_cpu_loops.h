/* The loops of one variant of the engine cpu, in plain C: `_cpu.c` includes this file once for each variant, with
 * NAME(x), which adds the variant's suffix to a name, and TARGET, the instructions that the compiler may use.
 *
 * This code is the exact path of every variant.  A variant with intrinsics (`_cpu_vectors.h`) takes it for the blocks
 * that have elements which are not finite, and for conversions and products of matrices. */

/* fp16 goes through a block of fp32 in the L1 cache.  Widening is exact: the exponent moves to its place in fp32, and a
 * multiplication rebiases it, for subnormals too. */
TARGET static void NAME(widen_f16_loop)(const F16 *from, float *to, Py_ssize_t n) {
    for (Py_ssize_t i = 0; i < n; i++) {
        uint32_t half = from[i], magnitude = (half & 0x7fff) << 13;
        uint32_t bits = as_bits(as_float(magnitude) * 0x1p112f);
        bits = magnitude >= 0x7c00u << 13 ? magnitude | 0x7f800000u : bits;
        to[i] = as_float(bits | (half & 0x8000) << 16);
    }
}

TARGET static void NAME(narrow_f16_loop)(const float *from, F16 *to, Py_ssize_t n) {
    for (Py_ssize_t i = 0; i < n; i++) {
        uint32_t bits = as_bits(from[i]), magnitude = bits & 0x7fffffff;
        uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1)) >> 13; /* rebias by -112, round */
        uint32_t small = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u; /* 0.5's ulp is fp16's least step */
        uint32_t half = magnitude < 0x38800000u ? small : normal;
        half = magnitude >= 0x477ff000u ? 0x7c00 : half; /* halfway past the largest finite fp16 */
        half = magnitude > 0x7f800000u ? 0x7e00 : half;
        to[i] = (F16)(half | ((bits >> 16) & 0x8000));
    }
}

#ifdef F16C
TARGET static void NAME(widen_f16)(const F16 *from, float *to, Py_ssize_t n) {
    Py_ssize_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
    NAME(widen_f16_loop)(from + i, to + i, n - i);
}

TARGET static void NAME(narrow_f16)(const float *from, F16 *to, Py_ssize_t n) {
    Py_ssize_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    NAME(narrow_f16_loop)(from + i, to + i, n - i);
}
#else
#define widen_f16 widen_f16_loop
#define narrow_f16 narrow_f16_loop
#endif

TARGET static void NAME(widen_bf16)(const BF16 *from, float *to, Py_ssize_t n) {
    for (Py_ssize_t i = 0; i < n; i++) to[i] = load_BF16(from + i);
}

TARGET static void NAME(narrow_bf16)(const float *from, BF16 *to, Py_ssize_t n) {
    for (Py_ssize_t i = 0; i < n; i++) store_BF16(to + i, from[i]);
}

static void NAME(widen)(const char *from, int dtype, float *wide, Py_ssize_t n) {
    if (dtype == CODE_BF16) NAME(widen_bf16)((const BF16 *)from, wide, n);
    else if (dtype == CODE_F16) NAME(widen_f16)((const F16 *)from, wide, n);
    else memcpy(wide, from, 4 * n);
}

static void NAME(narrow)(const float *wide, int dtype, char *to, Py_ssize_t n) {
    if (dtype == CODE_BF16) NAME(narrow_bf16)(wide, (BF16 *)to, n);
    else if (dtype == CODE_F16) NAME(narrow_f16)(wide, (F16 *)to, n);
    else memcpy(to, wide, 4 * n);
}

/* The numbers of quantised elements: a normal number's bits move to their places in fp32, with the exponent's other bias.
 * Subnormals are multiplied as integers, because an operation on fp32's own subnormals takes a hundred times as long.
 * Masks choose between the two: gcc does not vectorise a condition here. */
TARGET static void NAME(decode_e4m3)(const uint8_t *from, float *to, Py_ssize_t n) {
    for (Py_ssize_t i = 0; i < n; i++) {
        const uint32_t magnitude = from[i] & 0x7f, normal = (magnitude << 20) + (120u << 23);
        const float small = (float)(int32_t)magnitude * 0x1p-9f;
        const uint32_t is_small = -(uint32_t)(magnitude < 8), is_nan = -(uint32_t)(magnitude == 0x7f);
        const uint32_t bits = (as_bits(small) & is_small) | (normal & ~is_small) | (0x7fc00000u & is_nan);
        to[i] = as_float(bits | (uint32_t)(from[i] & 0x80) << 24);
    }
}

TARGET static void NAME(decode_e2m1)(const uint8_t *from, float *to, Py_ssize_t n) {
    for (Py_ssize_t i = 0; i < n; i++) {
        const uint32_t magnitude = from[i] & 7, normal = (magnitude << 22) + (126u << 23);
        const float small = (float)(int32_t)magnitude * 0.5f;
        const uint32_t is_small = -(uint32_t)(magnitude < 2);
        const uint32_t bits = (as_bits(small) & is_small) | (normal & ~is_small);
        to[i] = as_float(bits | (uint32_t)(from[i] & 8) << 28);
    }
}

static void NAME(decode)(const uint8_t *from, int dtype, float *to, Py_ssize_t n) {
    if (dtype == CODE_E4M3) NAME(decode_e4m3)(from, to, n);
    else NAME(decode_e2m1)(from, to, n);
}

/* Multiply n elements of one row, from this column on, by the scales of their blocks, which have `breadth` columns. */
TARGET static void NAME(scale)(float *x, const float *scales, Py_ssize_t breadth, Py_ssize_t column, Py_ssize_t n) {
    if (breadth == 1) {
        for (Py_ssize_t j = 0; j < n; j++) x[j] *= scales[column + j];
        return;
    }
    for (Py_ssize_t j = 0; j < n;) {
        const Py_ssize_t left = breadth - (column + j) % breadth, some = left < n - j ? left : n - j;
        const float scale = scales[(column + j) / breadth];
        for (Py_ssize_t k = 0; k < some; k++) x[j + k] *= scale;
        j += some;
    }
}

/* Each pair of input dtypes has one merge kernel and one distance kernel; fp16 elements are fp32 by now. */
#define PAIR(S, A)                                                                                          \
    TARGET static void NAME(loop_merge_##S##_##A)(const char *sft, const char *aligned, char *out, Py_ssize_t n, \
                                             float alpha) {                                                 \
        const S *s = (const S *)sft;                                                                        \
        const A *a = (const A *)aligned;                                                                    \
        A *o = (A *)out;                                                                                    \
        for (Py_ssize_t i = 0; i < n; i++) {                                                                \
            float x = load_##A(a + i), d = x - load_##S(s + i), p = alpha * d;                              \
            store_##A(o + i, x + p);                                                                        \
        }                                                                                                   \
    }                                                                                                       \
    TARGET static void NAME(loop_distance_##S##_##A)(const char *sft, const char *aligned, Py_ssize_t n,         \
                                                Lanes *lanes) {                                             \
        const S *s = (const S *)sft;                                                                        \
        const A *a = (const A *)aligned;                                                                    \
        float dd[SUMS] = {0}, aa[SUMS] = {0}, top[SUMS] = {0};                                              \
        Py_ssize_t i = 0;                                                                                   \
        for (; i + SUMS <= n; i += SUMS)                                                                    \
            for (int l = 0; l < SUMS; l++) MEASURE(S, A)                                                    \
        for (int l = 0; l < n - i; l++) MEASURE(S, A)                                                       \
        memcpy(lanes->dd, dd, sizeof dd);                                                                   \
        memcpy(lanes->aa, aa, sizeof aa);                                                                   \
        memcpy(lanes->top, top, sizeof top);                                                                \
    }

#define MEASURE(S, A)                                               \
    {                                                               \
        float x = load_##A(a + i + l), d = x - load_##S(s + i + l); \
        float size = as_float(as_bits(d) & 0x7fffffff);             \
        x = size < INFINITY ? x : 0.0f;                             \
        size = size < INFINITY ? size : 0.0f;                       \
        dd[l] += size * size;                                       \
        aa[l] += x * x;                                             \
        top[l] = size > top[l] ? size : top[l];                     \
    }

/* Changed is IEEE's "not equal": -0 equals +0, NaN equals nothing. */
#define ALIGNED(A)                                                                                               \
    TARGET static void NAME(loop_count_##A)(const char *aligned, const char *out, Py_ssize_t n, Count *total) {       \
        const A *a = (const A *)aligned, *o = (const A *)out;                                                    \
        uint32_t changed = 0, non_finite = 0;                                                                    \
        for (Py_ssize_t i = 0; i < n; i++) {                                                                     \
            float before = load_##A(a + i), after = load_##A(o + i);                                             \
            changed += before != after ? 1u : 0u;                                                                \
            non_finite += ((as_bits(after) >> 23 & 0xff) + 1) >> 8; /* exponent 255 */                           \
        }                                                                                                        \
        total->changed += changed;                                                                               \
        total->non_finite += non_finite;                                                                         \
    }                                                                                                            \
    PAIR(BF16, A)                                                                                                \
    PAIR(F32, A)

ALIGNED(BF16)
ALIGNED(F32)

/* Indexed by [sft is not BF16][aligned is not BF16]. */
static const struct {
    void (*merge)(const char *, const char *, char *, Py_ssize_t, float);
    void (*distance)(const char *, const char *, Py_ssize_t, Lanes *);
    void (*count)(const char *, const char *, Py_ssize_t, Count *);
} NAME(KERNELS)[2][2] = {
    {{NAME(loop_merge_BF16_BF16), NAME(loop_distance_BF16_BF16), NAME(loop_count_BF16)},
     {NAME(loop_merge_BF16_F32), NAME(loop_distance_BF16_F32), NAME(loop_count_F32)}},
    {{NAME(loop_merge_F32_BF16), NAME(loop_distance_F32_BF16), NAME(loop_count_BF16)},
     {NAME(loop_merge_F32_F32), NAME(loop_distance_F32_F32), NAME(loop_count_F32)}},
};

/* Compute elements [i, i + n) of a job, at most CACHE_ELEMENTS if there are statistics or fp16 elements. */
static void NAME(compute)(Job *job, Py_ssize_t i, Py_ssize_t n) {
    const int half = job->aligned_dtype == CODE_F16, sft_half = job->sft_dtype == CODE_F16;
    const Py_ssize_t item = ITEMSIZE[job->aligned_dtype];
    const char *sft = job->sft + i * ITEMSIZE[job->sft_dtype], *aligned = job->aligned + i * item;
    float wide_sft[CACHE_ELEMENTS], wide_aligned[CACHE_ELEMENTS], wide_out[CACHE_ELEMENTS];
    const int row = job->sft_dtype != CODE_BF16, column = job->aligned_dtype != CODE_BF16;
    if (sft_half) NAME(widen_f16)((const F16 *)sft, wide_sft, n), sft = (const char *)wide_sft;
    if (half) NAME(widen_f16)((const F16 *)aligned, wide_aligned, n), aligned = (const char *)wide_aligned;
    if (job->measure) {
        Lanes lanes;
        NAME(KERNELS)[row][column].distance(sft, aligned, n, &lanes);
        add_lanes(&job->distance, &lanes);
    }
    for (int k = 0; k < job->alphas; k++) {
        char *out = job->out[k] + i * item, *result = half ? (char *)wide_out : out;
        NAME(KERNELS)[row][column].merge(sft, aligned, result, n, (float)job->alpha[k]);
        if (half) NAME(narrow_f16)(wide_out, (F16 *)out, n);
        if (half && job->measure) NAME(widen_f16)((const F16 *)out, wide_out, n);
        if (job->measure) NAME(KERNELS)[row][column].count(aligned, result, n, &job->count[k]);
    }
}

#define TILE(FUNCTION, M)                                                                                             \
    TARGET static void NAME(FUNCTION)(const float *left, const float *right, float scale, Py_ssize_t r,               \
                                      Py_ssize_t width, Py_ssize_t stride, float *out) {                              \
        V sum[M][TILE_VECTORS] = {{{0}}};                                                                             \
        for (Py_ssize_t k = 0; k < r; k++)                                                                            \
            for (int v = 0; v < TILE_VECTORS; v++) {                                                                  \
                const V x = *(const V *)(right + k * width + v * VECTOR_COLUMNS);                                     \
                for (int m = 0; m < M; m++) sum[m][v] += left[m * r + k] * x;                                         \
            }                                                                                                         \
        for (int m = 0; m < M; m++)                                                                                   \
            for (int v = 0; v < TILE_VECTORS; v++) *(V *)(out + m * stride + v * VECTOR_COLUMNS) = sum[m][v] * scale; \
    }
TILE(one_row, 1)
TILE(some_rows, TILE_ROWS)

#undef TILE
#undef ALIGNED
#undef MEASURE
#undef PAIR
#undef widen_f16
#undef narrow_f16
