/* The engine cpu: out = aligned + alpha * (aligned - sft) in one pass; and the
 * cast, dequantize and low_rank of convert.py.
 *
 *   d = f32(a) - f32(s);  p = alpha * d;  r = f32(a) + p;  out = round-to-nearest-even(r -> dtype of a)
 *
 * Every fp32 operation rounds once, to nearest even: build with -ffp-contract=off and without -ffast-math.
 * The computation sets the calling thread's floating-point mode (flush-denormal, rounding) to IEEE's default and
 * restores it.  Bytes moved: one read of sft, one of aligned, and one write for each alpha.
 * Inputs and outputs may be unaligned.  With one alpha and no statistics the output may be the memory of an input;
 * memories that overlap in part give wrong results.
 *
 * One build serves every x86-64: it has four variants of the same bits, and VARIANTS lists them from the best on. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <fenv.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define MAX_ALPHAS 64
/* Both inputs and an output of a block of this many elements stay in the L1 cache between the passes over it. */
#define CACHE_ELEMENTS 2048
/* Independent fp32 sums in a block: this number fixes the order of the additions, not the width of a vector. */
#define SUMS 32
/* The fused loops ask for memory this many bytes ahead: the processor's own prefetching stops at the end of a page. */
#define AHEAD 2048
#define LINE 64 /* the bytes of a cache line */

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

enum { CODE_BF16, CODE_F16, CODE_F32, CODE_E4M3, CODE_E2M1 }; /* the last two are quantised, and have scales */
static const Py_ssize_t ITEMSIZE[5] = {2, 2, 4, 1, 1};

/* The sums of a block: element i belongs to lane i % SUMS.  Elements whose d is not finite are left out. */
typedef struct {
    float dd[SUMS], aa[SUMS]; /* of d * d and of aligned * aligned */
    float top[SUMS];          /* the largest |d| */
} Lanes;

typedef struct {
    double d_squared, aligned_squared; /* over elements whose d is finite */
    float max_abs_d;                   /* over the same elements */
} Distance;

typedef struct { int64_t changed, non_finite; } Count;

/* The scales of quantised elements, the elements of a matrix in C order: the value of an element is its number times
 * the scale of its block, rounded once. */
typedef struct {
    const float *values;                           /* one for each block, in C order */
    Py_ssize_t rows, columns, width, height, breadth; /* of the blocks; of the matrix: columns; of a block */
    Py_ssize_t first;                              /* the number of the first element in the matrix */
} Scales;

typedef struct {
    const char *sft, *aligned;
    Scales sft_scales, aligned_scales; /* used if the dtype is quantised */
    int sft_dtype, aligned_dtype, alphas, measure;
    Py_ssize_t n;
    char *out[MAX_ALPHAS];
    double alpha[MAX_ALPHAS]; /* rounded to fp32 in the floating-point mode of the computation, not of the caller */
    Distance distance;
    Count count[MAX_ALPHAS];
} Job;

static void add_lanes(Distance *total, const Lanes *lanes) {
    int32_t top = (int32_t)as_bits(total->max_abs_d); /* numbers from 0 on have the order of their bits */
    for (int l = 0; l < SUMS; l++) {
        total->d_squared += lanes->dd[l];
        total->aligned_squared += lanes->aa[l];
    }
    for (int l = 0; l < SUMS; l++) top = (int32_t)as_bits(lanes->top[l]) > top ? (int32_t)as_bits(lanes->top[l]) : top;
    total->max_abs_d = as_float((uint32_t)top);
}

/* Return 1 if no sum of d * d is infinite or NaN. */
static int are_finite(const Lanes *lanes) {
    uint32_t carry = 0;
    for (int l = 0; l < SUMS; l++) carry |= (as_bits(lanes->dd[l]) & 0x7fffffff) + 0x00800000; /* from exponent 255 */
    return !(carry >> 31);
}

/* delta = scale * left @ right, and each sum runs from the left, so the size of the tiles changes no bit of an element.
 * The sums of a tile stay in registers over all of r.  A tile has TILE_COLUMNS columns of one row, or of TILE_ROWS rows
 * that share the loads of right. */
#define TILE_ROWS 4
#define VECTOR_BYTES 64
#define TILE_VECTORS 4
typedef float V __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
enum { VECTOR_COLUMNS = VECTOR_BYTES / 4, TILE_COLUMNS = TILE_VECTORS * VECTOR_COLUMNS };
typedef void Tile(const float *, const float *, float, Py_ssize_t, Py_ssize_t, Py_ssize_t, float *);

/* A loop over n elements of one pair of dtypes; the last two return 1 unless the block needs the exact path. */
typedef struct {
    void (*merge)(const char *sft, const char *aligned, char *out, Py_ssize_t n, float alpha);
    int (*count)(const char *sft, const char *aligned, char *out, Py_ssize_t n, float alpha, Lanes *, int64_t *changed);
    int (*measure)(const char *sft, const char *aligned, char *out, Py_ssize_t n, float alpha, Lanes *,
                   int64_t *changed);
} Fused;

typedef struct {
    const char *name;
    int (*supported)(void);
    void (*compute)(Job *, Py_ssize_t, Py_ssize_t);
    void (*widen)(const char *, int, float *, Py_ssize_t);
    void (*narrow)(const float *, int, char *, Py_ssize_t);
    void (*decode)(const uint8_t *, int, float *, Py_ssize_t);                /* the numbers of quantised elements */
    void (*scale)(float *, const float *, Py_ssize_t, Py_ssize_t, Py_ssize_t); /* by the scales of a line of blocks */
    void (*count)(const char *, const char *, Py_ssize_t, Count *); /* of fp32 elements */
    Tile *one_row, *some_rows;
    const Fused (*fused)[3]; /* indexed by [dtype of sft][dtype of aligned]; NULL where there is no such loop */
} Variant;

#define JOIN(x, y) x##_##y
#define EXPAND_AND_JOIN(x, y) JOIN(x, y)
#define NAME(x) EXPAND_AND_JOIN(x, SUFFIX)
#define INLINE static inline __attribute__((always_inline))
#define VARIANT(NAME_, SUPPORTED, FUSED_)                                                                       \
    {                                                                                                           \
        #NAME_, SUPPORTED, JOIN(compute, NAME_), JOIN(widen, NAME_), JOIN(narrow, NAME_), JOIN(decode, NAME_), \
            JOIN(scale, NAME_), JOIN(loop_count_F32, NAME_), JOIN(one_row, NAME_), JOIN(some_rows, NAME_), FUSED_                                                \
    }

static int always(void) { return 1; }

#define SUFFIX portable
#define TARGET
#include "_cpu_loops.h"
#undef SUFFIX
#undef TARGET

#if defined(__x86_64__) && defined(__GNUC__)
#define X86
#include <cpuid.h>
#include <immintrin.h>

static int has_f16c(void) { /* clang's __builtin_cpu_supports does not know f16c, and "avx" asks the system too */
    unsigned a, b, c = 0, d;
    return __builtin_cpu_supports("avx") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

static int has_avx2(void) {
    return has_f16c() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#define F16C
#define SUFFIX f16c
#define TARGET __attribute__((target("avx,f16c")))
#include "_cpu_loops.h"
#undef SUFFIX
#undef TARGET

#define SUFFIX avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#include "_cpu_loops.h"
#include "_cpu_avx2.h"
#include "_cpu_vectors.h"
#undef SUFFIX
#undef TARGET

#define SUFFIX avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#include "_cpu_loops.h"
#include "_cpu_avx512.h"
#include "_cpu_vectors.h"
#undef SUFFIX
#undef TARGET
#endif

static const Variant VARIANTS[] = {
#ifdef X86
    VARIANT(avx512, has_avx512, FUSED_avx512),
    VARIANT(avx2, has_avx2, FUSED_avx2),
    VARIANT(f16c, has_f16c, NULL),
#endif
    VARIANT(portable, always, NULL),
};
enum { VARIANT_COUNT = sizeof VARIANTS / sizeof VARIANTS[0] };

static int has[VARIANT_COUNT]; /* asked once, because a virtual machine takes 20 microseconds to answer */

/* Return the variant of a name, or the best one for NULL; NULL with an exception if this processor has none. */
static const Variant *find_variant(const char *name) {
    for (int i = 0; i < VARIANT_COUNT; i++)
        if (has[i] && (!name || !strcmp(name, VARIANTS[i].name))) return &VARIANTS[i];
    PyErr_Format(PyExc_ValueError, "this processor has no variant %s", name);
    return NULL;
}

/* Compute a block of a job in one pass for each alpha, and return 1; or return 0 if the block needs the exact path, with
 * no statistics added. */
static int compute_fused(const Fused *fused, Job *job, Py_ssize_t i, Py_ssize_t n) {
    const Py_ssize_t item = ITEMSIZE[job->aligned_dtype];
    const char *sft = job->sft + i * ITEMSIZE[job->sft_dtype], *aligned = job->aligned + i * item;
    int64_t changed[MAX_ALPHAS];
    Lanes lanes;
    for (int k = 0; k < job->alphas; k++) {
        char *out = job->out[k] + i * item;
        const float alpha = (float)job->alpha[k];
        if (!job->measure)
            fused->merge(sft, aligned, out, n, alpha);
        else if (!(k ? fused->count : fused->measure)(sft, aligned, out, n, alpha, &lanes, &changed[k]))
            return 0;
    }
    if (!job->measure) return 1;
    if (!are_finite(&lanes)) return 0;
    add_lanes(&job->distance, &lanes);
    for (int k = 0; k < job->alphas; k++) job->count[k].changed += changed[k];
    return 1;
}

/* Return the number of elements before the first one of an output that starts a cache line, at most n: stores that cross
 * lines take a third more time. */
static Py_ssize_t elements_to_line(const char *out, Py_ssize_t item, Py_ssize_t n) {
    const Py_ssize_t bytes = (Py_ssize_t)(-(uintptr_t)out % LINE);
    return bytes % item ? 0 : bytes / item < n ? bytes / item : n;
}

/* The blocks are small, so that the fp32 copies of fp16, the second alpha and the statistics find their inputs in the
 * cache. */
static void run(const Variant *variant, Job *job) {
    const int one_pass = job->alphas == 1 && !job->measure;
    const int half = job->aligned_dtype == CODE_F16 || job->sft_dtype == CODE_F16;
    const Fused *fused = variant->fused ? &variant->fused[job->sft_dtype][job->aligned_dtype] : NULL;
    const Py_ssize_t block = one_pass && (fused || !half) ? job->n : CACHE_ELEMENTS;
    const Py_ssize_t head = fused && one_pass ? elements_to_line(job->out[0], ITEMSIZE[job->aligned_dtype], job->n) : 0;
    if (head) compute_fused(fused, job, 0, head);
    for (Py_ssize_t i = head; i < job->n; i += block) {
        const Py_ssize_t n = job->n - i < block ? job->n - i : block;
        if (!fused || !compute_fused(fused, job, i, n)) variant->compute(job, i, n);
    }
}

/* Write the values of n quantised elements from number i of an operand on. */
static void dequantize(const Variant *variant, const char *elements, int dtype, const Scales *scales, Py_ssize_t i,
                       Py_ssize_t n, float *out) {
    variant->decode((const uint8_t *)elements + i, dtype, out, n);
    for (Py_ssize_t at = scales->first + i, done = 0; done < n;) {
        const Py_ssize_t row = (at + done) / scales->width, column = (at + done) % scales->width;
        const Py_ssize_t some = scales->width - column < n - done ? scales->width - column : n - done;
        variant->scale(out + done, scales->values + row / scales->height * scales->columns, scales->breadth, column, some);
        done += some;
    }
}

/* Run a job with quantised inputs: the values of a block of elements stay in the L1 cache. */
static void run_quantized(const Variant *variant, Job *job) {
    float sft[CACHE_ELEMENTS], aligned[CACHE_ELEMENTS];
    for (Py_ssize_t i = 0; i < job->n; i += CACHE_ELEMENTS) {
        Job part = *job; /* with the statistics so far */
        part.n = job->n - i < CACHE_ELEMENTS ? job->n - i : CACHE_ELEMENTS;
        part.sft += i * ITEMSIZE[job->sft_dtype], part.aligned += i * ITEMSIZE[job->aligned_dtype];
        if (job->sft_dtype > CODE_F32) {
            dequantize(variant, job->sft, job->sft_dtype, &job->sft_scales, i, part.n, sft);
            part.sft = (const char *)sft, part.sft_dtype = CODE_F32;
        }
        if (job->aligned_dtype > CODE_F32) {
            dequantize(variant, job->aligned, job->aligned_dtype, &job->aligned_scales, i, part.n, aligned);
            part.aligned = (const char *)aligned, part.aligned_dtype = CODE_F32;
        }
        for (int k = 0; k < job->alphas; k++) part.out[k] += i * ITEMSIZE[part.aligned_dtype];
        run(variant, &part);
        job->distance = part.distance;
        memcpy(job->count, part.count, sizeof part.count);
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

/* Read the scales (values, rows, columns, width, height, breadth, first) of n elements of a dtype; nothing for a dtype
 * without scales.  Return -1 with an exception if they do not cover the elements.  convert.py has checked the shapes. */
static int read_scales(PyObject *tuple, int dtype, Py_ssize_t n, Scales *scales, Py_buffer *view) {
    PyObject *values;
    view->obj = NULL;
    if (dtype <= CODE_F32) return 0;
    if (!PyTuple_Check(tuple)) return PyErr_SetString(PyExc_ValueError, "quantised elements need scales"), -1;
    if (!PyArg_ParseTuple(tuple, "Onnnnnn", &values, &scales->rows, &scales->columns, &scales->width, &scales->height,
                          &scales->breadth, &scales->first)) return -1;
    const Py_ssize_t most = PY_SSIZE_T_MAX / 8;
    if (scales->rows < 0 || scales->width < 1 || scales->height < 1 || scales->breadth < 1 || scales->first < 0 ||
        scales->columns < 1 || scales->columns != (scales->width - 1) / scales->breadth + 1 || scales->first > most - n ||
        scales->rows > most / scales->columns ||
        (n && (scales->first + n - 1) / scales->width / scales->height >= scales->rows))
        return PyErr_SetString(PyExc_ValueError, "the scales do not cover the elements"), -1;
    scales->values = (const float *)memory(values, 4 * scales->rows * scales->columns, 0, view);
    return PyErr_Occurred() ? -1 : 0;
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
    PyObject *sft, *aligned, *outs, *alphas, *sft_scales = Py_None, *aligned_scales = Py_None;
    Py_buffer views[MAX_ALPHAS + 4] = {{0}};
    const char *name = NULL;
    int used = 0;
    PyObject *result = NULL;
    fenv_t mode;
    (void)module;
    if (!PyArg_ParseTuple(args, "OiOinO!O!p|zOO", &sft, &job.sft_dtype, &aligned, &job.aligned_dtype, &job.n, &PyTuple_Type,
                          &outs, &PyTuple_Type, &alphas, &job.measure, &name, &sft_scales, &aligned_scales))
        return NULL;
    if (job.sft_dtype < 0 || job.sft_dtype > 4 || job.aligned_dtype < 0 || job.aligned_dtype > 4 || job.n < 0 ||
        job.n > PY_SSIZE_T_MAX / 4 || PyTuple_GET_SIZE(outs) != PyTuple_GET_SIZE(alphas) ||
        PyTuple_GET_SIZE(outs) < 1 || PyTuple_GET_SIZE(outs) > MAX_ALPHAS) {
        PyErr_SetString(PyExc_ValueError, "dtype codes are 0 to 4, n >= 0, and as many outputs as alphas, 1 to 64");
        return NULL;
    }
    const Variant *variant = find_variant(name);
    if (!variant) return NULL;
    job.alphas = (int)PyTuple_GET_SIZE(outs);
    const Py_ssize_t bytes = job.n * ITEMSIZE[job.aligned_dtype];
    const Py_ssize_t out_bytes = job.n * ITEMSIZE[job.aligned_dtype > CODE_F32 ? CODE_F32 : job.aligned_dtype];
    if (read_scales(sft_scales, job.sft_dtype, job.n, &job.sft_scales, &views[used++]) < 0) goto release;
    if (read_scales(aligned_scales, job.aligned_dtype, job.n, &job.aligned_scales, &views[used++]) < 0) goto release;
    job.sft = memory(sft, job.n * ITEMSIZE[job.sft_dtype], 0, &views[used++]);
    if (PyErr_Occurred()) goto release;
    job.aligned = memory(aligned, bytes, 0, &views[used++]);
    if (PyErr_Occurred()) goto release;
    for (int k = 0; k < job.alphas; k++) {
        job.alpha[k] = PyFloat_AsDouble(PyTuple_GET_ITEM(alphas, k));
        if (PyErr_Occurred()) goto release;
        job.out[k] = memory(PyTuple_GET_ITEM(outs, k), out_bytes, 1, &views[used++]);
        if (PyErr_Occurred()) goto release;
    }
    Py_BEGIN_ALLOW_THREADS
    fegetenv(&mode);
    fesetenv(FE_DFL_ENV);
    (job.sft_dtype > CODE_F32 || job.aligned_dtype > CODE_F32 ? run_quantized : run)(variant, &job);
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

/* Conversions from dtype to dtype round once, through a block of fp32 in the L1 cache.  The argument before is fp32 to
 * compare the result with, for the counts, or NULL. */
static void convert(const Variant *variant, const char *from, int source, char *to, int target, Py_ssize_t n,
                    const char *before, Count *count) {
    float wide[CACHE_ELEMENTS];
    for (Py_ssize_t i = 0; i < n; i += CACHE_ELEMENTS) {
        const Py_ssize_t some = n - i < CACHE_ELEMENTS ? n - i : CACHE_ELEMENTS;
        const char *x = from + i * ITEMSIZE[source];
        char *out = to + i * ITEMSIZE[target];
        variant->widen(x, source, wide, some);
        variant->narrow(wide, target, out, some);
        if (before) {
            variant->widen(out, target, wide, some);
            variant->count(before + 4 * i, (const char *)wide, some, count);
        }
    }
}

static PyObject *cast(PyObject *module, PyObject *args) {
    PyObject *source, *out, *before, *result = NULL;
    int from, to;
    Py_ssize_t n;
    Py_buffer views[3] = {{0}};
    Count count = {0};
    const char *name = NULL;
    fenv_t mode;
    (void)module;
    if (!PyArg_ParseTuple(args, "OiOinO|z", &source, &from, &out, &to, &n, &before, &name)) return NULL;
    if (from < 0 || from > 2 || to < 0 || to > 2 || n < 0 || n > PY_SSIZE_T_MAX / 4) {
        PyErr_SetString(PyExc_ValueError, "dtype codes are 0 to 2, and n >= 0");
        return NULL;
    }
    const Variant *variant = find_variant(name);
    if (!variant) return NULL;
    const char *x = memory(source, n * ITEMSIZE[from], 0, &views[0]);
    if (PyErr_Occurred()) goto release;
    char *y = memory(out, n * ITEMSIZE[to], 1, &views[1]);
    if (PyErr_Occurred()) goto release;
    const char *against = before == Py_None ? NULL : memory(before, 4 * n, 0, &views[2]);
    if (PyErr_Occurred()) goto release;
    Py_BEGIN_ALLOW_THREADS
    fegetenv(&mode);
    fesetenv(FE_DFL_ENV);
    convert(variant, x, from, y, to, n, against, &count);
    fesetenv(&mode);
    Py_END_ALLOW_THREADS
    result = against ? Py_BuildValue("(LL)", (long long)count.changed, (long long)count.non_finite) : Py_NewRef(Py_None);
release:
    for (int v = 0; v < 3; v++) PyBuffer_Release(&views[v]);
    return result;
}

static PyObject *dequantize_elements(PyObject *module, PyObject *args) {
    PyObject *elements, *tuple, *out, *result = NULL;
    int dtype;
    Py_ssize_t n;
    Scales scales;
    Py_buffer views[3] = {{0}};
    const char *name = NULL;
    fenv_t mode;
    (void)module;
    if (!PyArg_ParseTuple(args, "OinOO|z", &elements, &dtype, &n, &tuple, &out, &name)) return NULL;
    if (dtype <= CODE_F32 || dtype > CODE_E2M1 || n < 0 || n > PY_SSIZE_T_MAX / 8) {
        PyErr_SetString(PyExc_ValueError, "dtype codes are 3 and 4, and n >= 0");
        return NULL;
    }
    const Variant *variant = find_variant(name);
    if (!variant || read_scales(tuple, dtype, n, &scales, &views[0]) < 0) goto release;
    const char *x = memory(elements, n, 0, &views[1]);
    if (PyErr_Occurred()) goto release;
    float *y = (float *)memory(out, 4 * n, 1, &views[2]);
    if (PyErr_Occurred()) goto release;
    Py_BEGIN_ALLOW_THREADS
    fegetenv(&mode);
    fesetenv(FE_DFL_ENV);
    for (Py_ssize_t i = 0; i < n; i += CACHE_ELEMENTS)
        dequantize(variant, x, dtype, &scales, i, n - i < CACHE_ELEMENTS ? n - i : CACHE_ELEMENTS, y + i);
    fesetenv(&mode);
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);
release:
    for (int v = 0; v < 3; v++) PyBuffer_Release(&views[v]);
    return result;
}

static void few_columns(const float *left, const float *right, float scale, Py_ssize_t r, Py_ssize_t width,
                        Py_ssize_t n, float *out) {
    for (Py_ssize_t l = 0; l < n; l++) {
        float sum = 0.0f;
        for (Py_ssize_t k = 0; k < r; k++) sum += left[k] * right[k * width + l];
        out[l] = sum * scale;
    }
}

static void product(const Variant *variant, const float *left, const float *right, float scale, Py_ssize_t r, Py_ssize_t width,
                    Py_ssize_t first, Py_ssize_t n, float *out) {
    while (n > 0) {
        const Py_ssize_t row = first / width, column = first % width;
        const Py_ssize_t rows = column == 0 && n >= TILE_ROWS * width ? TILE_ROWS : 1;
        const Py_ssize_t some = width - column < n ? width - column : n; /* of each row */
        const float *a = left + row * r;
        Py_ssize_t j = 0;
        for (; j + TILE_COLUMNS <= some; j += TILE_COLUMNS)
            (rows == 1 ? variant->one_row : variant->some_rows)(a, right + column + j, scale, r, width, width, out + j);
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
    const char *name = NULL;
    fenv_t mode;
    (void)module;
    if (!PyArg_ParseTuple(args, "OOdnnnnnO|z", &left, &right, &scale, &rows, &r, &width, &first, &n, &out,
                          &name)) return NULL;
    const Py_ssize_t most = PY_SSIZE_T_MAX / 8;
    if (rows < 0 || r < 0 || width < 0 || first < 0 || n < 0 || (width && (rows > most / width || r > most / width)) ||
        (r && rows > most / r) || first > rows * width || n > rows * width - first) {
        PyErr_SetString(PyExc_ValueError, "elements [first, first + n) lie in a matrix of rows times width");
        return NULL;
    }
    const Variant *variant = find_variant(name);
    if (!variant) return NULL;
    const float *a = (const float *)memory(left, 4 * rows * r, 0, &views[0]);
    if (PyErr_Occurred()) goto release;
    const float *b = (const float *)memory(right, 4 * r * width, 0, &views[1]);
    if (PyErr_Occurred()) goto release;
    float *o = (float *)memory(out, 4 * n, 1, &views[2]);
    if (PyErr_Occurred()) goto release;
    Py_BEGIN_ALLOW_THREADS
    fegetenv(&mode);
    fesetenv(FE_DFL_ENV);
    product(variant, a, b, (float)scale, r, width, first, n, o);
    fesetenv(&mode);
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);
release:
    for (int v = 0; v < 3; v++) PyBuffer_Release(&views[v]);
    return result;
}

static PyObject *variants(PyObject *module, PyObject *args) {
    (void)module, (void)args;
    PyObject *names = PyList_New(0);
    for (int i = 0; names && i < VARIANT_COUNT; i++) {
        if (!has[i]) continue;
        PyObject *name = PyUnicode_FromString(VARIANTS[i].name);
        if (!name || PyList_Append(names, name) < 0) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyMethodDef methods[] = {
    {"extrapolate", extrapolate, METH_VARARGS,
     "extrapolate(sft, sft_dtype, aligned, aligned_dtype, n, outs, alphas, measure, variant=None, sft_scales=None,\n"
     "aligned_scales=None)\n--\n\n"
     "Write aligned + alpha * (aligned - sft) into outs[k] for each alphas[k]; n elements; dtype codes 0 BF16, 1 F16,\n"
     "2 F32; an output has aligned's dtype.  Codes 3 F8_E4M3 and 4 F4 need scales (values in fp32, rows, columns, columns\n"
     "of the matrix, rows and columns of a block, first element), and count as F32.  Each memory is a contiguous buffer or an address.  Returns None, or with\n"
     "measure (sum of d*d, sum of aligned*aligned, max |d|, ((changed, non-finite), ...))."},
    {"cast", cast, METH_VARARGS,
     "cast(source, source_dtype, out, out_dtype, n, before, variant=None)\n--\n\n"
     "Write n elements in another dtype, rounded once.  Returns None, or with fp32 elements to compare the result with\n"
     "(changed, non-finite)."},
    {"dequantize", dequantize_elements, METH_VARARGS,
     "dequantize(elements, dtype, n, scales, out, variant=None)\n--\n\n"
     "Write the values of n quantised elements in fp32: their numbers times their scales, rounded once."},
    {"low_rank", low_rank, METH_VARARGS,
     "low_rank(left, right, scale, rows, rank, width, first, n, out, variant=None)\n--\n\n"
     "Write elements [first, first + n) of scale * left @ right, all fp32; every sum runs from the left."},
    {"variants", variants, METH_NOARGS,
     "variants()\n--\n\n"
     "Return the names of the variants that this processor has, the best first.  The other functions take one of them;\n"
     "all variants give the same bits."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__cpu(void) {
    for (int i = 0; i < VARIANT_COUNT; i++) has[i] = VARIANTS[i].supported();
    return PyModule_Create(&module);
}
