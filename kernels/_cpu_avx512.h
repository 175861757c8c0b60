/* The vector operations of the variant avx512, for `_cpu_vectors.h`. */
#define VECTOR __m512
#define WIDTH 16
#define ZERO _mm512_setzero_ps()
#define SET(x) _mm512_set1_ps(x)
#define ADD(x, y) _mm512_add_ps(x, y)
#define SUB(x, y) _mm512_sub_ps(x, y)
#define MUL(x, y) _mm512_mul_ps(x, y)
#define MULTIPLY_ADD(x, y, z) _mm512_fmadd_ps(x, y, z)
#define MAX_ABS(top, d) _mm512_range_ps(top, d, 0x0b) /* the larger magnitude, without its sign */
#define STORE(to, x) _mm512_storeu_ps(to, x)
#define ADD_UNEQUAL(total, x, y) \
    _mm512_mask_add_epi32(total, _mm512_cmp_ps_mask(x, y, _CMP_NEQ_UQ), total, _mm512_set1_epi32(1))

typedef __m512i NAME(Counter);

TARGET INLINE NAME(Counter) NAME(no_count)(void) { return _mm512_setzero_si512(); }
TARGET INLINE int64_t NAME(count_total)(NAME(Counter) counter) { return _mm512_reduce_add_epi32(counter); }

typedef struct { VECTOR first, second; } NAME(Two);

TARGET INLINE NAME(Two) NAME(load)(const char *from, int dtype, int interleaved) {
    if (dtype == CODE_F32) return (NAME(Two)){_mm512_loadu_ps(from), _mm512_loadu_ps(from + 64)};
    if (interleaved) {
        const __m512i x = _mm512_loadu_si512(from);
        return (NAME(Two)){_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                           _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000)))};
    }
    const __m256i x = _mm256_loadu_si256((const __m256i *)from), y = _mm256_loadu_si256((const __m256i *)(from + 32));
    if (dtype == CODE_F16) return (NAME(Two)){_mm512_cvtph_ps(x), _mm512_cvtph_ps(y)};
    return (NAME(Two)){_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)),
                       _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(y), 16))};
}

/* Return fp32 bits whose upper half is r rounded to bf16; the exact form has the NaN of the contract for every NaN. */
TARGET INLINE __m512i NAME(round_bf16)(VECTOR r, int exact) {
    const __m512i bits = _mm512_castps_si512(r), high = _mm512_set1_epi32((int)0xffff0000);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    rounded = _mm512_and_si512(rounded, high);
    if (exact)
        rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(r, r, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    return rounded;
}

/* Round r to a dtype once, write it, and return what was written in fp32. */
TARGET INLINE NAME(Two) NAME(round_and_store)(char *to, int dtype, int interleaved, int exact, NAME(Two) r) {
    if (dtype == CODE_F32) {
        _mm512_storeu_ps(to, r.first);
        _mm512_storeu_ps(to + 64, r.second);
        return r;
    }
    if (dtype == CODE_F16) {
        const __m256i x = _mm512_cvtps_ph(r.first, _MM_FROUND_TO_NEAREST_INT);
        const __m256i y = _mm512_cvtps_ph(r.second, _MM_FROUND_TO_NEAREST_INT);
        _mm256_storeu_si256((__m256i *)to, x);
        _mm256_storeu_si256((__m256i *)(to + 32), y);
        return (NAME(Two)){_mm512_cvtph_ps(x), _mm512_cvtph_ps(y)};
    }
    const __m512i first = NAME(round_bf16)(r.first, exact), second = NAME(round_bf16)(r.second, exact);
    if (interleaved) {
        _mm512_storeu_si512(to, _mm512_or_si512(_mm512_srli_epi32(first, 16), second));
    } else {
        _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(first, 16)));
        _mm256_storeu_si256((__m256i *)(to + 32), _mm512_cvtepi32_epi16(_mm512_srli_epi32(second, 16)));
    }
    return (NAME(Two)){_mm512_castsi512_ps(first), _mm512_castsi512_ps(second)};
}
