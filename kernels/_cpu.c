/* The engine cpu: out = aligned + alpha * (aligned - sft) in one pass; and the cast and low_rank of convert.py.
 *
 *   d = f32(a) - f32(s);  p = alpha * d;  r = f32(a) + p;  out = round-to-nearest-even(r -> dtype of a)
 *
 * Every fp32 operation rounds once, to nearest even: build with -ffp-contract=off and without -ffast-math.
 * The computation sets the calling thread's floating-point mode (flush-denormal, rounding) to IEEE's default and
 * restores it.  Bytes moved: one read of sft, one of aligned, and one write for each alpha.
 * Inputs and outputs may be unaligned.  With one alpha and no statistics the output may be the memory of an input;
 * memories that overlap in part give wrong results.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <fenv.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

/* One build serves every x86-64: the loader picks the variant.  Older compilers do not know these levels. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) /* clang cannot ask the processor for f16c */
#define F16C
#endif

#define MAX_ALPHAS 64
/* Both inputs and an output of a block of this many elements stay in the L1 cache between the passes over it. */
#define CACHE_ELEMENTS 2048
/* Independent fp32 sums in a block: this number fixes the order of the additions, not the width of a vector. */
#define SUMS 32

typedef uint16_t BF16 __attribute__((aligned(1), may_alias));
typedef uint16_t F16 __attribute__((aligned(1), may_alias));
typedef float F32 __attribute__((aligned(1), may_alias));

static inline float as_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static inline uint32_t as_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }

static inline float load_BF16(const BF16 *p) { return as_float((uint32_t)*p << 16); }
static inline float load_F32(const F32 *p) { return *p; }
static inline void store_F32(F32 *p, float r) { *p = r; }

/* The test for NaN comes before the rounding: an addition to 0x7fffffff would carry into the sign and give -0. */
static inline void store_BF16(BF16 *p, float r) {
    uint32_t bits = as_bits(r);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    *p = r != r ? 0x7fc0 : (uint16_t)rounded;
}

/* fp16 goes through a block of fp32 in the L1 cache.  Widening is exact: the exponent moves to its place in fp32, and a
 * multiplication rebiases it, for subnormals too. */
CLONES static void widen_portable(const F16 *from, float *to, Py_ssize_t n) {
    for (Py_ssize_t i = 0; i < n; i++) {
        uint32_t half = from[i], magnitude = (half & 0x7fff) << 13;
        uint32_t bits = as_bits(as_float(magnitude) * 0x1p112f);
        bits = magnitude >= 0x7c00u << 13 ? magnitude | 0x7f800000u : bits;
        to[i] = as_float(bits | (half & 0x8000) << 16);
    }
}

CLONES static void narrow_portable(const float *from, F16 *to, Py_ssize_t n) {
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

static void (*widen_F16)(const F16 *, float *, Py_ssize_t) = widen_portable;
static void (*narrow_F16)(const float *, F16 *, Py_ssize_t) = narrow_portable;
/* fp16 with fp16 in one pass through the registers; NULL where the processor cannot. */
static void (*merge_F16_F16)(const F16 *, const F16 *, F16 *, Py_ssize_t, float) = NULL;

#ifdef F16C
#include <immintrin.h>

__attribute__((target("avx,f16c"))) static void widen_f16c(const F16 *from, float *to, Py_ssize_t n) {
    Py_ssize_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
    widen_portable(from + i, to + i, n - i);
}

__attribute__((target("avx,f16c"))) static void narrow_f16c(const float *from, F16 *to, Py_ssize_t n) {
    Py_ssize_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    narrow_portable(from + i, to + i, n - i);
}

__attribute__((target("avx,f16c"))) static inline void merge_eight(const F16 *sft, const F16 *aligned, F16 *out,
                                                                   __m256 alpha) {
    const __m256 x = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)aligned));
    const __m256 d = _mm256_sub_ps(x, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)sft)));
    const __m256 r = _mm256_add_ps(x, _mm256_mul_ps(alpha, d));
    _mm_storeu_si128((__m128i *)out, _mm256_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT));
}

__attribute__((target("avx,f16c"))) static void merge_f16c(const F16 *sft, const F16 *aligned, F16 *out, Py_ssize_t n,
                                                           float alpha) {
    const __m256 wide = _mm256_set1_ps(alpha);
    const Py_ssize_t whole = n / 8 * 8;
    for (Py_ssize_t i = 0; i < whole; i += 8) merge_eight(sft + i, aligned + i, out + i, wide);
    F16 last[3][8] = {{0}};
    memcpy(last[0], sft + whole, 2 * (n - whole));
    memcpy(last[1], aligned + whole, 2 * (n - whole));
    merge_eight(last[0], last[1], last[2], wide);
    memcpy(out + whole, last[2], 2 * (n - whole));
}
#endif

typedef struct {
    double d_squared, aligned_squared; /* over elements whose d is finite */
    float max_abs_d;                   /* over the same elements */
} Distance;

typedef struct { int64_t changed, non_finite; } Count;

/* Each pair of input dtypes has one merge kernel and one distance kernel; fp16 elements are fp32 by now. */
#define PAIR(S, A)                                                                                    \
    CLONES static void merge_##S##_##A(const char *sft, const char *aligned, char *out, Py_ssize_t n, \
                                       float alpha) {                                                 \
        const S *s = (const S *)sft;                                                                  \
        const A *a = (const A *)aligned;                                                              \
        A *o = (A *)out;                                                                              \
        for (Py_ssize_t i = 0; i < n; i++) {                                                          \
            float x = load_##A(a + i), d = x - load_##S(s + i), p = alpha * d;                        \
            store_##A(o + i, x + p);                                                                  \
        }                                                                                             \
    }                                                                                                 \
    CLONES static void distance_##S##_##A(const char *sft, const char *aligned, Py_ssize_t n,         \
                                          Distance *total) {                                          \
        const S *s = (const S *)sft;                                                                  \
        const A *a = (const A *)aligned;                                                              \
        float dd[SUMS] = {0}, aa[SUMS] = {0}, top[SUMS] = {0};                                        \
        Py_ssize_t i = 0;                                                                             \
        for (; i + SUMS <= n; i += SUMS)                                                              \
            for (int l = 0; l < SUMS; l++) MEASURE(S, A)                                              \
        for (int l = 0; l < n - i; l++) MEASURE(S, A)                                                 \
        for (int l = 0; l < SUMS; l++) {                                                              \
            total->d_squared += dd[l];                                                                \
            total->aligned_squared += aa[l];                                                          \
            total->max_abs_d = top[l] > total->max_abs_d ? top[l] : total->max_abs_d;                 \
        }                                                                                             \
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
#define ALIGNED(A)                                                                                   \
    CLONES static void count_##A(const char *aligned, const char *out, Py_ssize_t n, Count *total) { \
        const A *a = (const A *)aligned, *o = (const A *)out;                                        \
        uint32_t changed = 0, non_finite = 0;                                                        \
        for (Py_ssize_t i = 0; i < n; i++) {                                                         \
            float before = load_##A(a + i), after = load_##A(o + i);                                 \
            changed += before != after ? 1u : 0u;                                                    \
            non_finite += ((as_bits(after) >> 23 & 0xff) + 1) >> 8; /* exponent 255 */               \
        }                                                                                            \
        total->changed += changed;                                                                   \
        total->non_finite += non_finite;                                                             \
    }                                                                                                \
    PAIR(BF16, A)                                                                                    \
    PAIR(F32, A)

ALIGNED(BF16)
ALIGNED(F32)

typedef struct {
    void (*merge)(const char *, const char *, char *, Py_ssize_t, float);
    void (*distance)(const char *, const char *, Py_ssize_t, Distance *);
    void (*count)(const char *, const char *, Py_ssize_t, Count *);
} Kernels;

enum { CODE_BF16, CODE_F16, CODE_F32 };
static const Py_ssize_t ITEMSIZE[3] = {2, 2, 4};

/* Indexed by [sft is F32][aligned is F32]. */
static const Kernels KERNELS[2][2] = {
    {{merge_BF16_BF16, distance_BF16_BF16, count_BF16}, {merge_BF16_F32, distance_BF16_F32, count_F32}},
    {{merge_F32_BF16, distance_F32_BF16, count_BF16}, {merge_F32_F32, distance_F32_F32, count_F32}},
};

typedef struct {
    const char *sft, *aligned;
    int sft_dtype, aligned_dtype, alphas, measure;
    Py_ssize_t n;
    char *out[MAX_ALPHAS];
    double alpha[MAX_ALPHAS]; /* rounded to fp32 in the floating-point mode of the computation, not of the caller */
    Distance distance;
    Count count[MAX_ALPHAS];
} Job;

/* The blocks are small, so that the fp32 copies of fp16, the second alpha and the statistics find their inputs in the
 * cache. */
static void run(Job *job) {
    const int half = job->aligned_dtype == CODE_F16, sft_half = job->sft_dtype == CODE_F16;
    const Kernels kernels = KERNELS[job->sft_dtype != CODE_BF16][job->aligned_dtype != CODE_BF16];
    const Py_ssize_t sft_item = ITEMSIZE[job->sft_dtype], item = ITEMSIZE[job->aligned_dtype];
    const Py_ssize_t block = job->measure || job->alphas > 1 || half || sft_half ? CACHE_ELEMENTS : job->n;
    float wide_sft[CACHE_ELEMENTS], wide_aligned[CACHE_ELEMENTS], wide_out[CACHE_ELEMENTS];
    if (half && sft_half && merge_F16_F16 && job->alphas == 1 && !job->measure) {
        merge_F16_F16((const F16 *)job->sft, (const F16 *)job->aligned, (F16 *)job->out[0], job->n, (float)job->alpha[0]);
        return;
    }
    for (Py_ssize_t i = 0; i < job->n; i += block) {
        const Py_ssize_t n = job->n - i < block ? job->n - i : block;
        const char *sft = job->sft + i * sft_item, *aligned = job->aligned + i * item;
        if (sft_half) widen_F16((const F16 *)sft, wide_sft, n), sft = (const char *)wide_sft;
        if (half) widen_F16((const F16 *)aligned, wide_aligned, n), aligned = (const char *)wide_aligned;
        if (job->measure) kernels.distance(sft, aligned, n, &job->distance);
        for (int k = 0; k < job->alphas; k++) {
            char *out = job->out[k] + i * item, *result = half ? (char *)wide_out : out;
            kernels.merge(sft, aligned, result, n, (float)job->alpha[k]);
            if (half) narrow_F16(wide_out, (F16 *)out, n);
            if (half && job->measure) widen_F16((const F16 *)out, wide_out, n);
            if (job->measure) kernels.count(aligned, result, n, &job->count[k]);
        }
    }
}

/* Return the memory of a buffer, or the address that an int is: cpu.py has checked the size of the memory there.
 * After a success view->obj is NULL if there is nothing to release. */
static char *memory(PyObject *object, Py_ssize_t bytes, int writable, Py_buffer *view) {
    view->obj = NULL;
    if (PyLong_Check(object)) return PyLong_AsVoidPtr(object);
    if (PyObject_GetBuffer(object, view, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) < 0) return NULL;
    if (view->len < bytes) {
        PyErr_Format(PyExc_ValueError, "buffer of %zd bytes where %zd are needed", view->len, bytes);
        return NULL;
    }
    return view->buf;
}

static PyObject *statistics(const Job *job) {
    PyObject *counts = PyTuple_New(job->alphas);
    if (!counts) return NULL;
    for (int k = 0; k < job->alphas; k++) {
        PyObject *pair = Py_BuildValue("(LL)", (long long)job->count[k].changed, (long long)job->count[k].non_finite);
        if (!pair) { Py_DECREF(counts); return NULL; }
        PyTuple_SET_ITEM(counts, k, pair);
    }
    return Py_BuildValue("(dddN)", job->distance.d_squared, job->distance.aligned_squared,
                         (double)job->distance.max_abs_d, counts);
}

static PyObject *extrapolate(PyObject *module, PyObject *args) {
    Job job = {0};
    PyObject *sft, *aligned, *outs, *alphas;
    Py_buffer views[MAX_ALPHAS + 2] = {{0}};
    int used = 0;
    PyObject *result = NULL;
    fenv_t mode;
    (void)module;
    if (!PyArg_ParseTuple(args, "OiOinO!O!p", &sft, &job.sft_dtype, &aligned, &job.aligned_dtype, &job.n, &PyTuple_Type,
                          &outs, &PyTuple_Type, &alphas, &job.measure))
        return NULL;
    if (job.sft_dtype < 0 || job.sft_dtype > 2 || job.aligned_dtype < 0 || job.aligned_dtype > 2 || job.n < 0 ||
        job.n > PY_SSIZE_T_MAX / 4 || PyTuple_GET_SIZE(outs) != PyTuple_GET_SIZE(alphas) ||
        PyTuple_GET_SIZE(outs) < 1 || PyTuple_GET_SIZE(outs) > MAX_ALPHAS) {
        PyErr_SetString(PyExc_ValueError, "dtype codes are 0 to 2, n >= 0, and as many outputs as alphas, 1 to 64");
        return NULL;
    }
    job.alphas = (int)PyTuple_GET_SIZE(outs);
    const Py_ssize_t bytes = job.n * ITEMSIZE[job.aligned_dtype];
    job.sft = memory(sft, job.n * ITEMSIZE[job.sft_dtype], 0, &views[used++]);
    if (PyErr_Occurred()) goto release;
    job.aligned = memory(aligned, bytes, 0, &views[used++]);
    if (PyErr_Occurred()) goto release;
    for (int k = 0; k < job.alphas; k++) {
        job.alpha[k] = PyFloat_AsDouble(PyTuple_GET_ITEM(alphas, k));
        if (PyErr_Occurred()) goto release;
        job.out[k] = memory(PyTuple_GET_ITEM(outs, k), bytes, 1, &views[used++]);
        if (PyErr_Occurred()) goto release;
    }
    Py_BEGIN_ALLOW_THREADS
    fegetenv(&mode);
    fesetenv(FE_DFL_ENV);
    run(&job);
    fesetenv(&mode);
    Py_END_ALLOW_THREADS
    if (job.measure)
        result = statistics(&job);
    else
        result = Py_NewRef(Py_None);
release:
    for (int v = 0; v < used; v++) PyBuffer_Release(&views[v]);
    return result;
}

/* Conversions from dtype to dtype round once, through a block of fp32 in the L1 cache. */
CLONES static void widen_BF16(const BF16 *from, float *to, Py_ssize_t n) {
    for (Py_ssize_t i = 0; i < n; i++) to[i] = load_BF16(from + i);
}

CLONES static void narrow_BF16(const float *from, BF16 *to, Py_ssize_t n) {
    for (Py_ssize_t i = 0; i < n; i++) store_BF16(to + i, from[i]);
}

static void widen(const char *from, int dtype, float *wide, Py_ssize_t n) {
    if (dtype == CODE_BF16) widen_BF16((const BF16 *)from, wide, n);
    else if (dtype == CODE_F16) widen_F16((const F16 *)from, wide, n);
    else memcpy(wide, from, 4 * n);
}

/* The argument before is fp32 to compare the result with, for the counts, or NULL. */
static void convert(const char *from, int source, char *to, int target, Py_ssize_t n, const char *before, Count *count) {
    float wide[CACHE_ELEMENTS];
    for (Py_ssize_t i = 0; i < n; i += CACHE_ELEMENTS) {
        const Py_ssize_t some = n - i < CACHE_ELEMENTS ? n - i : CACHE_ELEMENTS;
        const char *x = from + i * ITEMSIZE[source];
        char *out = to + i * ITEMSIZE[target];
        widen(x, source, wide, some);
        if (target == CODE_BF16) narrow_BF16(wide, (BF16 *)out, some);
        else if (target == CODE_F16) narrow_F16(wide, (F16 *)out, some);
        else memcpy(out, wide, 4 * some);
        if (before) {
            widen(out, target, wide, some);
            count_F32(before + 4 * i, (const char *)wide, some, count);
        }
    }
}

static PyObject *cast(PyObject *module, PyObject *args) {
    PyObject *source, *out, *before, *result = NULL;
    int from, to;
    Py_ssize_t n;
    Py_buffer views[3] = {{0}};
    Count count = {0};
    fenv_t mode;
    (void)module;
    if (!PyArg_ParseTuple(args, "OiOinO", &source, &from, &out, &to, &n, &before)) return NULL;
    if (from < 0 || from > 2 || to < 0 || to > 2 || n < 0 || n > PY_SSIZE_T_MAX / 4) {
        PyErr_SetString(PyExc_ValueError, "dtype codes are 0 to 2, and n >= 0");
        return NULL;
    }
    const char *x = memory(source, n * ITEMSIZE[from], 0, &views[0]);
    if (PyErr_Occurred()) goto release;
    char *y = memory(out, n * ITEMSIZE[to], 1, &views[1]);
    if (PyErr_Occurred()) goto release;
    const char *against = before == Py_None ? NULL : memory(before, 4 * n, 0, &views[2]);
    if (PyErr_Occurred()) goto release;
    Py_BEGIN_ALLOW_THREADS
    fegetenv(&mode);
    fesetenv(FE_DFL_ENV);
    convert(x, from, y, to, n, against, &count);
    fesetenv(&mode);
    Py_END_ALLOW_THREADS
    result = against ? Py_BuildValue("(LL)", (long long)count.changed, (long long)count.non_finite) : Py_NewRef(Py_None);
release:
    for (int v = 0; v < 3; v++) PyBuffer_Release(&views[v]);
    return result;
}

/* delta = scale * left @ right, and each sum runs from the left, so the size of the tiles changes no bit of an element.
 * The sums of a tile stay in registers over all of r.  A tile has TILE_COLUMNS columns of one row, or of TILE_ROWS rows
 * that share the loads of right. */
#define TILE_ROWS 4
#define VECTOR_BYTES 64
#define TILE_VECTORS 4
typedef float V __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
enum { VECTOR_COLUMNS = VECTOR_BYTES / 4, TILE_COLUMNS = TILE_VECTORS * VECTOR_COLUMNS };

#define TILE(NAME, M)                                                                                                 \
    CLONES static void NAME(const float *left, const float *right, float scale, Py_ssize_t r, Py_ssize_t width,       \
                            Py_ssize_t stride, float *out) {                                                          \
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

static void few_columns(const float *left, const float *right, float scale, Py_ssize_t r, Py_ssize_t width,
                        Py_ssize_t n, float *out) {
    for (Py_ssize_t l = 0; l < n; l++) {
        float sum = 0.0f;
        for (Py_ssize_t k = 0; k < r; k++) sum += left[k] * right[k * width + l];
        out[l] = sum * scale;
    }
}

static void product(const float *left, const float *right, float scale, Py_ssize_t r, Py_ssize_t width,
                    Py_ssize_t first, Py_ssize_t n, float *out) {
    while (n > 0) {
        const Py_ssize_t row = first / width, column = first % width;
        const Py_ssize_t rows = column == 0 && n >= TILE_ROWS * width ? TILE_ROWS : 1;
        const Py_ssize_t some = width - column < n ? width - column : n; /* of each row */
        const float *a = left + row * r;
        Py_ssize_t j = 0;
        for (; j + TILE_COLUMNS <= some; j += TILE_COLUMNS)
            (rows == 1 ? one_row : some_rows)(a, right + column + j, scale, r, width, width, out + j);
        for (Py_ssize_t m = 0; m < rows; m++)
            few_columns(a + m * r, right + column + j, scale, r, width, some - j, out + m * width + j);
        first += rows * some, out += rows * some, n -= rows * some;
    }
}

static PyObject *low_rank(PyObject *module, PyObject *args) {
    PyObject *left, *right, *out, *result = NULL;
    double scale;
    Py_ssize_t rows, r, width, first, n;
    Py_buffer views[3] = {{0}};
    fenv_t mode;
    (void)module;
    if (!PyArg_ParseTuple(args, "OOdnnnnnO", &left, &right, &scale, &rows, &r, &width, &first, &n, &out)) return NULL;
    const Py_ssize_t most = PY_SSIZE_T_MAX / 8;
    if (rows < 0 || r < 0 || width < 0 || first < 0 || n < 0 || (width && (rows > most / width || r > most / width)) ||
        (r && rows > most / r) || first > rows * width || n > rows * width - first) {
        PyErr_SetString(PyExc_ValueError, "elements [first, first + n) lie in a matrix of rows times width");
        return NULL;
    }
    const float *a = (const float *)memory(left, 4 * rows * r, 0, &views[0]);
    if (PyErr_Occurred()) goto release;
    const float *b = (const float *)memory(right, 4 * r * width, 0, &views[1]);
    if (PyErr_Occurred()) goto release;
    float *o = (float *)memory(out, 4 * n, 1, &views[2]);
    if (PyErr_Occurred()) goto release;
    Py_BEGIN_ALLOW_THREADS
    fegetenv(&mode);
    fesetenv(FE_DFL_ENV);
    product(a, b, (float)scale, r, width, first, n, o);
    fesetenv(&mode);
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);
release:
    for (int v = 0; v < 3; v++) PyBuffer_Release(&views[v]);
    return result;
}

static PyMethodDef methods[] = {
    {"extrapolate", extrapolate, METH_VARARGS,
     "extrapolate(sft, sft_dtype, aligned, aligned_dtype, n, outs, alphas, measure)\n--\n\n"
     "Write aligned + alpha * (aligned - sft) into outs[k] for each alphas[k]; n elements; dtype codes 0 BF16, 1 F16,\n"
     "2 F32; an output has aligned's dtype.  Each memory is a contiguous buffer or an address.  Returns None, or with\n"
     "measure (sum of d*d, sum of aligned*aligned, max |d|, ((changed, non-finite), ...))."},
    {"cast", cast, METH_VARARGS,
     "cast(source, source_dtype, out, out_dtype, n, before)\n--\n\n"
     "Write n elements in another dtype, rounded once.  Returns None, or with fp32 elements to compare the result with\n"
     "(changed, non-finite)."},
    {"low_rank", low_rank, METH_VARARGS,
     "low_rank(left, right, scale, rows, rank, width, first, n, out)\n--\n\n"
     "Write elements [first, first + n) of scale * left @ right, all fp32; every sum runs from the left."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__cpu(void) {
#ifdef F16C
    if (__builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c")) {
        widen_F16 = widen_f16c;
        narrow_F16 = narrow_f16c;
        merge_F16_F16 = merge_f16c;
    }
#endif
    return PyModule_Create(&module);
}
