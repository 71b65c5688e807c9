// What all kernels share: vectors of floats, the two number formats, and how many threads a loop is worth.
//
// Vectors are GCC's own extension, so the same text becomes AVX-512 or AVX2 code, whichever the machine has.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float vfloat __attribute__((vector_size(LANES * 4)));
typedef float vfloat_u __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint32_t vword __attribute__((vector_size(LANES * 4)));
typedef uint32_t vword_u __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t vint __attribute__((vector_size(LANES * 4)));
typedef uint16_t vhalf_u __attribute__((vector_size(LANES * 2), aligned(2)));

struct bfloat16 {
    uint16_t bits;
};

// The number format that this build computes with; sums are float32 always.
typedef VALUE value;

static inline vfloat splat(float x) { return vfloat{} + x; }

static inline vfloat load(const float *from) { return *(const vfloat_u *)from; }
static inline vfloat load(const bfloat16 *from) {
    return (vfloat)(__builtin_convertvector(*(const vhalf_u *)from, vword) << 16);
}

// Rounds to the nearest, ties to even; a NaN stays one.
static inline vhalf_u narrow(vfloat x) {
#if defined(__AVX512BF16__)
    return (vhalf_u)_mm512_cvtneps_pbh((__m512)x);
#else
    vword bits = (vword)x;
    vword rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vword kept = (vword)(x == x);
    return __builtin_convertvector((rounded & kept) | (0x7fc0 & ~kept), vhalf_u);
#endif
}

static inline void store(float *to, vfloat x) { *(vfloat_u *)to = x; }
static inline void store(bfloat16 *to, vfloat x) { *(vhalf_u *)to = narrow(x); }

static inline float get(const float *from) { return *from; }
static inline float get(const bfloat16 *from) {
    uint32_t bits = (uint32_t)from->bits << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static inline void set(float *to, float x) { *to = x; }
static inline void set(bfloat16 *to, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    to->bits = x == x ? (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : 0x7fc0;
}

typedef float vquad __attribute__((vector_size(16)));

static inline vquad quarter(vfloat x) { // sums of every fourth lane
    vquad parts[LANES / 4];
    memcpy(parts, &x, sizeof(x));
#if defined(__AVX512F__)
    return (parts[0] + parts[2]) + (parts[1] + parts[3]);
#else
    return parts[0] + parts[1];
#endif
}

static inline float sum(vfloat x) {
    vquad part = quarter(x);
    return (part[0] + part[2]) + (part[1] + part[3]);
}

// The sums of four vectors.
static inline vquad sum4(const vfloat x[4]) {
    vquad a = quarter(x[0]), b = quarter(x[1]), c = quarter(x[2]), d = quarter(x[3]);
    vquad ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    vquad cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

// How many numbers `madd` takes at once, and sum + a * b for that many; products of bfloat16 are added in pairs.
constexpr int64_t STRIDE = LANES * (4 / sizeof(value));
static inline vfloat madd(vfloat sum, const float *a, const float *b) { return sum + load(a) * load(b); }
static inline vfloat madd(vfloat sum, const bfloat16 *a, const bfloat16 *b) {
#if defined(__AVX512BF16__)
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_loadu_si512(b));
#else
    return sum + load(a) * load(b) + load(a + LANES) * load(b + LANES);
#endif
}

// to[l * apart + r] = (line l of a) . (row r of b) * factor, for a few lines [lines, n], `stride` apart, and rows
// [rows, n], one after the other: each row is loaded once for all lines.
template <int lines>
static inline void dots(const value *a, int64_t stride, const value *b, int64_t rows, int64_t n, float factor,
                        float *to, int64_t apart) {
    int64_t whole = n / STRIDE * STRIDE, r = 0;
    for (; r + 4 <= rows; r += 4) {
        vfloat totals[lines][4] = {};
        for (int64_t i = 0; i < whole; i += STRIDE)
            for (int k = 0; k < 4; k++)
                for (int l = 0; l < lines; l++) totals[l][k] = madd(totals[l][k], a + l * stride + i, b + (r + k) * n + i);
        for (int l = 0; l < lines; l++) {
            vquad four = sum4(totals[l]);
            memcpy(to + l * apart + r, &four, sizeof(four));
        }
    }
    for (; r < rows; r++)
        for (int l = 0; l < lines; l++) {
            vfloat total = {};
            for (int64_t i = 0; i < whole; i += STRIDE) total = madd(total, a + l * stride + i, b + r * n + i);
            to[l * apart + r] = sum(total);
        }
    for (int l = 0; l < lines; l++)
        for (r = 0; r < rows; r++) {
            float &total = to[l * apart + r];
            for (int64_t i = whole; i < n; i++) total += get(a + l * stride + i) * get(b + r * n + i);
            total *= factor;
        }
}

// Calls f(first, how many), the latter a constant, for n things four at a time.
template <class F> static inline void by_four(int64_t n, F f) {
    int64_t at = 0;
    for (; at + 4 <= n; at += 4) f(at, std::integral_constant<int, 4>());
    switch (n - at) {
    case 1: f(at, std::integral_constant<int, 1>()); break;
    case 2: f(at, std::integral_constant<int, 2>()); break;
    case 3: f(at, std::integral_constant<int, 3>()); break;
    }
}

// Asks for memory that is read soon: the processor does not foresee a jump from one allocation to the next.
static inline void fetch(const void *from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char *)from + at);
}

// e^x to 2 units in the last place for x <= 88 (Cody & Waite 1980: x = n ln2 + r, a polynomial in r); a NaN stays one.
static inline vfloat exponential(vfloat x) {
    x = x < -87.3f ? splat(-87.3f) : x;
    x = x > 88.0f ? splat(88.0f) : x;
    vfloat shifted = x * 1.44269504f + 12582912.0f; // 1.5 * 2^23: the sum's low bits are the rounded n
    vfloat n = shifted - 12582912.0f;
    vfloat r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vfloat p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vfloat power = (vfloat)((vword)p + ((vword)shifted << 23));
    return x == x ? power : x;
}
