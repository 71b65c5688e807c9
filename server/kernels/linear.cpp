// y = x W^T + bias for a weight that never changes, laid out once in the order in which it is read.
//
// A panel is PANEL columns of W^T (outputs), row after row: step s holds, for each of its columns, one 4-byte word:
// one float32, or two neighbouring bfloat16. ROWS x PANEL sums stay in registers while both operands stream by (Goto &
// van de Geijn 2008). Every row of x goes through the same additions in the same order whatever else is in the batch,
// so a row's result does not depend on its neighbours; sums of BLOCK_STEPS are added up, which keeps rounding small.
#include "kernels.h"
#include <algorithm>

namespace {
#if defined(__AVX512F__)
constexpr int ROWS = 8, VECTORS = 3;
#else
constexpr int ROWS = 4, VECTORS = 3;
#endif
constexpr int PANEL = VECTORS * LANES;
constexpr int64_t BLOCK_ROWS = 64, BLOCK_STEPS = 256;

// sum + x * w, word by word.
[[maybe_unused]] vfloat fma(const float *, vfloat sum, uint32_t x, vword w) {
    float factor;
    memcpy(&factor, &x, 4);
    return sum + factor * (vfloat)w;
}
[[maybe_unused]] vfloat fma(const bfloat16 *, vfloat sum, uint32_t x, vword w) {
#if defined(__AVX512BF16__)
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)x), (__m512bh)w);
#else
    vword pair = vword{} + x;
    sum += (vfloat)(pair << 16) * (vfloat)(w << 16);
    return sum + (vfloat)(pair & 0xffff0000u) * (vfloat)(w & 0xffff0000u);
#endif
}

// sums [rows, PANEL] += x [rows, steps] times the panel w [steps, PANEL]; `stride` words lie between rows of x. With
// `ahead`, what follows these steps in memory is fetched meanwhile: w itself is in the cache, another tile has read it.
template <int rows, bool ahead = false>
void tile(const uint32_t *x, int64_t stride, const uint32_t *w, int64_t steps, float *sums) {
    vfloat acc[rows][VECTORS] = {};
    for (int64_t s = 0; s < steps; s++, w += PANEL) {
        if (ahead)
            for (int v = 0; v < VECTORS; v++) __builtin_prefetch(w + steps * PANEL + v * LANES, 0, 2);
        vword column[VECTORS];
        for (int v = 0; v < VECTORS; v++) column[v] = *(const vword_u *)(w + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < VECTORS; v++)
                acc[r][v] = fma((const value *)nullptr, acc[r][v], x[r * stride + s], column[v]);
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) {
            float *to = sums + r * PANEL + v * LANES;
            store(to, load(to) + acc[r][v]);
        }
}

void put(value *to, const float *from, int64_t width) {
    if (width == PANEL)
        for (int v = 0; v < VECTORS; v++) store(to + v * LANES, load(from + v * LANES));
    else
        for (int64_t c = 0; c < width; c++) set(to + c, from[c]);
}

void tiles(const uint32_t *x, int64_t stride, const uint32_t *w, int64_t steps, int64_t rows, float *sums) {
    for (int64_t done = 0; rows >= ROWS; rows -= ROWS, done++, x += ROWS * stride, sums += ROWS * PANEL)
        if (done == 1)
            tile<ROWS, true>(x, stride, w, steps, sums);
        else
            tile<ROWS>(x, stride, w, steps, sums);
    switch (rows) {
    case 1: tile<1>(x, stride, w, steps, sums); break;
    case 2: tile<2>(x, stride, w, steps, sums); break;
    case 3: tile<3>(x, stride, w, steps, sums); break;
#if defined(__AVX512F__)
    case 4: tile<4>(x, stride, w, steps, sums); break;
    case 5: tile<5>(x, stride, w, steps, sums); break;
    case 6: tile<6>(x, stride, w, steps, sums); break;
    case 7: tile<7>(x, stride, w, steps, sums); break;
#endif
    }
}

int64_t panels_of(const Product &product) { return (product.outs + PANEL - 1) / PANEL; }

// `count` rows of x from `first` on, times panel p.
void panel(const uint32_t *x, int64_t first, int64_t count, int64_t steps, const Product &product, int64_t p) {
    alignas(64) float sums[BLOCK_ROWS * PANEL], start[PANEL] = {};
    int64_t column = p * PANEL, width = std::min<int64_t>(PANEL, product.outs - column);
    if (product.bias) memcpy(start, product.bias + column, width * sizeof(float));
    for (int64_t r = 0; r < count; r++) memcpy(sums + r * PANEL, start, sizeof(start));
    for (int64_t s = 0; s < steps; s += BLOCK_STEPS)
        tiles(x + first * steps + s, steps, product.w + (p * steps + s) * PANEL, std::min(BLOCK_STEPS, steps - s),
              count, sums);
    for (int64_t r = 0; r < count; r++) put(product.y + (first + r) * product.outs + column, sums + r * PANEL, width);
}
} // namespace

extern "C" int64_t panel_width() { return PANEL; }

// Each product's y [rows, outs] of the same x [rows, steps].
extern "C" void linear(const uint32_t *x, int64_t rows, int64_t steps, const Product *products, int64_t count) {
    int64_t panels = 0, blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    for (int64_t i = 0; i < count; i++) panels += panels_of(products[i]);
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t p = 0; p < panels; p++)
        for (int64_t b = 0; b < blocks; b++) {
            const Product *product = products;
            int64_t mine = p, first = b * BLOCK_ROWS;
            for (; mine >= panels_of(*product); product++) mine -= panels_of(*product);
            panel(x, first, std::min(BLOCK_ROWS, rows - first), steps, *product, mine);
        }
}
