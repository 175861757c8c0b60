/* The vector operations of the variant avx2, for `_cpu_vectors.h`. */
#define VECTOR __m256
#define WIDTH 8
#define ZERO _mm256_setzero_ps()
#define SET(x) _mm256_set1_ps(x)
#define ADD(x, y) _mm256_add_ps(x, y)
#define SUB(x, y) _mm256_sub_ps(x, y)
#define MUL(x, y) _mm256_mul_ps(x, y)
#define MULTIPLY_ADD(x, y, z) _mm256_fmadd_ps(x, y, z)
#define MAX_ABS(top, d) _mm256_max_ps(top, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), d))
#define STORE(to, x) _mm256_storeu_ps(to, x)
#define ADD_UNEQUAL(total, x, y) _mm256_sub_epi32(total, _mm256_castps_si256(_mm256_cmp_ps(x, y, _CMP_NEQ_UQ)))

typedef __m256i NAME(Counter);

TARGET INLINE NAME(Counter) NAME(no_count)(void) { return _mm256_setzero_si256(); }

TARGET INLINE int64_t NAME(count_total)(NAME(Counter) counter) {
    int32_t counts[WIDTH], total = 0;
    _mm256_storeu_si256((__m256i *)counts, counter);
    for (int j = 0; j < WIDTH; j++) total += counts[j];
    return total;
}

typedef struct { VECTOR first, second; } NAME(Two);

TARGET INLINE VECTOR NAME(widen_vector)(__m128i x, int dtype) {
    if (dtype == CODE_F16) return _mm256_cvtph_ps(x);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}

TARGET INLINE NAME(Two) NAME(load)(const char *from, int dtype, int interleaved) {
    if (dtype == CODE_F32)
        return (NAME(Two)){_mm256_loadu_ps((const float *)from), _mm256_loadu_ps((const float *)(from + 32))};
    if (interleaved) {
        const __m256i x = _mm256_loadu_si256((const __m256i *)from);
        return (NAME(Two)){_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)),
                           _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32((int)0xffff0000)))};
    }
    return (NAME(Two)){NAME(widen_vector)(_mm_loadu_si128((const __m128i *)from), dtype),
                       NAME(widen_vector)(_mm_loadu_si128((const __m128i *)(from + 16)), dtype)};
}

/* Return fp32 bits whose upper half is r rounded to bf16; the exact form has the NaN of the contract for every NaN. */
TARGET INLINE __m256i NAME(round_bf16)(VECTOR r, int exact) {
    const __m256i bits = _mm256_castps_si256(r), high = _mm256_set1_epi32((int)0xffff0000);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    rounded = _mm256_and_si256(rounded, high);
    if (exact)
        rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000),
                                     _mm256_castps_si256(_mm256_cmp_ps(r, r, _CMP_UNORD_Q)));
    return rounded;
}

/* Round r to a dtype once, write it, and return what was written in fp32. */
TARGET INLINE NAME(Two) NAME(round_and_store)(char *to, int dtype, int interleaved, int exact, NAME(Two) r) {
    if (dtype == CODE_F32) {
        _mm256_storeu_ps((float *)to, r.first);
        _mm256_storeu_ps((float *)(to + 32), r.second);
        return r;
    }
    if (dtype == CODE_F16) {
        const __m128i x = _mm256_cvtps_ph(r.first, _MM_FROUND_TO_NEAREST_INT);
        const __m128i y = _mm256_cvtps_ph(r.second, _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128((__m128i *)to, x);
        _mm_storeu_si128((__m128i *)(to + 16), y);
        return (NAME(Two)){_mm256_cvtph_ps(x), _mm256_cvtph_ps(y)};
    }
    const __m256i first = NAME(round_bf16)(r.first, exact), second = NAME(round_bf16)(r.second, exact);
    const __m256i low = _mm256_srli_epi32(first, 16);
    if (interleaved) {
        _mm256_storeu_si256((__m256i *)to, _mm256_or_si256(low, second));
    } else { /* the pack puts quarters of both vectors in turn */
        const __m256i packed = _mm256_packus_epi32(low, _mm256_srli_epi32(second, 16));
        _mm256_storeu_si256((__m256i *)to, _mm256_permute4x64_epi64(packed, 0xd8));
    }
    return (NAME(Two)){_mm256_castsi256_ps(first), _mm256_castsi256_ps(second)};
}
