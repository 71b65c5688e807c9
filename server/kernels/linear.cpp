// y = x W^T + bias for a weight that never changes, laid out once in the order in which it is read; plus what each
// row's adapter adds, while the sums are still at hand.
//
// A panel is PANEL columns of W^T (outputs), row after row: step s holds, for each of its columns, one 4-byte word:
// one float32, or two neighbouring bfloat16. ROWS x PANEL sums stay in registers while both operands stream by (Goto &
// van de Geijn 2008). Every row of x goes through the same additions in the same order whatever else is in the batch,
// so a row's result does not depend on its neighbours; sums of BLOCK_STEPS are added up, which keeps rounding small.
#include "kernels.h"
#include <algorithm>
#include <omp.h>
#include <vector>

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

// The second half of LoRA (lora.cpp is the first): each row's sums [PANEL] += its s times columns of its adapter's B.
struct Expand {
    Adapters adapters;
    const Shrunk &shrunk;
    int64_t first, count, column, width, outs; // rows and columns of this panel

    template <class Visit> void rows(Visit visit) const {
        for (int64_t r = 0; r < count; r++) {
            const int64_t *table = adapters.tables[first + r];
            if (const Pair pair = pair_of(table, shrunk.module); pair.rank) visit(r, pair);
        }
    }

    // Each B's part of these columns is fetched before the product, which gives it time to come.
    void prepare() const {
        const value *before = nullptr;
        rows([&](int64_t, const Pair &pair) {
            if (pair.b != before)
                for (int64_t r = 0; r < pair.rank; r++)
                    for (int64_t c = 0; c < width; c += 64 / sizeof(value))
                        __builtin_prefetch(pair.b + r * outs + column + c, 0, 2);
            before = pair.b;
        });
    }

    void add(float *sums) const {
        rows([&](int64_t row, const Pair &pair) {
            const float *s = shrunk.s + (first + row) * shrunk.stride;
            const value *b = pair.b + column;
            float *to = sums + row * PANEL;
            if (width == PANEL) {
                vfloat part[VECTORS];
                for (int v = 0; v < VECTORS; v++) part[v] = load(to + v * LANES);
                for (int64_t r = 0; r < pair.rank; r++)
                    for (int v = 0; v < VECTORS; v++) part[v] += s[r] * load(b + r * outs + v * LANES);
                for (int v = 0; v < VECTORS; v++) store(to + v * LANES, part[v]);
            } else
                for (int64_t r = 0; r < pair.rank; r++)
                    for (int64_t c = 0; c < width; c++) to[c] += s[r] * get(b + r * outs + c);
        });
    }
};

// `count` rows of x from `first` on, times panel p; the nanoseconds of what the adapters add.
int64_t panel(const uint32_t *x, int64_t first, int64_t count, int64_t steps, const Product &product, int64_t p,
              const Adapters &adapters, const Shrunk &shrunk) {
    alignas(64) float sums[BLOCK_ROWS * PANEL], start[PANEL] = {};
    int64_t column = p * PANEL, width = std::min<int64_t>(PANEL, product.outs - column), spent = 0;
    const Expand expand{adapters, shrunk, first, count, column, width, product.outs};
    if (shrunk.stride) {
        spent -= now();
        expand.prepare();
        spent += now();
    }
    if (product.bias) memcpy(start, product.bias + column, width * sizeof(float));
    for (int64_t r = 0; r < count; r++) memcpy(sums + r * PANEL, start, sizeof(start));
    for (int64_t s = 0; s < steps; s += BLOCK_STEPS)
        tiles(x + first * steps + s, steps, product.w + (p * steps + s) * PANEL, std::min(BLOCK_STEPS, steps - s),
              count, sums);
    if (shrunk.stride) {
        spent -= now();
        expand.add(sums);
        spent += now();
    }
    for (int64_t r = 0; r < count; r++) put(product.y + (first + r) * product.outs + column, sums + r * PANEL, width);
    return spent;
}

// Room for s of all products; kept from one call to the next.
struct Room {
    std::vector<Shrunk> modules;
    std::vector<float> numbers;

    // Whether any token's adapter has any of the products' modules.
    bool prepare(const Adapters &adapters, const Product *products, int64_t count) {
        modules.resize(count);
        int64_t whole = 0;
        for (int64_t i = 0; i < count; i++) {
            int64_t rank = adapters.tables ? highest_rank(adapters, products[i].module) : 0;
            modules[i] = {nullptr, rank, products[i].module};
            whole += rank * adapters.tokens;
        }
        if ((int64_t)numbers.size() < whole) numbers.resize(whole);
        float *at = numbers.data();
        for (Shrunk &module : modules) {
            module.s = at;
            at += module.stride * adapters.tokens;
        }
        return whole > 0;
    }
};
} // namespace

extern "C" int64_t panel_width() { return PANEL; }

// Each product's y [rows, outs] of the same x [rows, steps], plus its adapter's part for each row that has one in
// `tables` [rows] (null: nobody). `spent` [2]: the nanoseconds of the products and of the adapters are added to it.
extern "C" void linear(const uint32_t *x, int64_t rows, int64_t steps, const Product *products, int64_t count,
                       const int64_t *const *tables, int64_t *spent) {
    static thread_local Room own;
    Room &room = own; // the workers below must see this thread's, not each its own
    const Adapters adapters{tables, rows};
    int64_t start = now(), lora = 0;
    if (room.prepare(adapters, products, count)) {
        shrink((const value *)x, steps * (4 / sizeof(value)), adapters, room.modules.data(), count);
        lora = now() - start;
    }
    int64_t panels = 0, blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS, expanded = 0;
    for (int64_t i = 0; i < count; i++) panels += panels_of(products[i]);
#pragma omp parallel for collapse(2) schedule(static) reduction(+ : expanded)
    for (int64_t p = 0; p < panels; p++)
        for (int64_t b = 0; b < blocks; b++) {
            int64_t i = 0, mine = p, first = b * BLOCK_ROWS;
            for (; mine >= panels_of(products[i]); i++) mine -= panels_of(products[i]);
            expanded += panel(x, first, std::min(BLOCK_ROWS, rows - first), steps, products[i], mine, adapters,
                              room.modules[i]);
        }
    lora += expanded / omp_get_max_threads(); // they worked side by side
    spent[0] += now() - start - lora;
    spent[1] += lora;
}
