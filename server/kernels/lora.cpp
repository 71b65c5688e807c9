// y += (x A^T) B for every token by its own adapter; A [rank, in], B [rank, out], the scaling inside B.
//
// A token's adapter is named by the address of its table: three int64 a module, the addresses of A and B, and the rank
// (0: the adapter does not have this module). Address 0 is the base: such a token is not touched. So nothing is copied
// or laid out anew when the adapters of a step change, and ranks mix without padding. Tokens of one adapter follow each
// other: each adapter is read from memory once, and four tokens at a time where there are many. A token's sums are made
// in the same order either way.
#include "kernels.h"
#include <algorithm>
#include <omp.h>
#include <vector>

namespace {
constexpr int64_t TILE = 4;

// y[t] += s[t] [rank] times b [rank, out], for a few vectors of columns.
template <int tokens, int vectors> void expand(const float *s, const value *b, int64_t rank, int64_t out, value *y) {
    vfloat sums[tokens][vectors] = {};
    for (int64_t r = 0; r < rank; r++)
        for (int v = 0; v < vectors; v++) {
            vfloat row = load(b + r * out + v * LANES);
            for (int t = 0; t < tokens; t++) sums[t][v] += s[t * rank + r] * row;
        }
    for (int t = 0; t < tokens; t++)
        for (int v = 0; v < vectors; v++) store(y + t * out + v * LANES, load(y + t * out + v * LANES) + sums[t][v]);
}

template <int tokens>
void add(const value *x, const value *a, const value *b, int64_t rank, int64_t in, int64_t out, float *s, value *y) {
    int64_t o = 0;
    dots<tokens>(x, in, a, rank, in, 1, s, rank);
    for (; o + 4 * LANES <= out; o += 4 * LANES) expand<tokens, 4>(s, b + o, rank, out, y + o);
    for (; o + LANES <= out; o += LANES) expand<tokens, 1>(s, b + o, rank, out, y + o);
    for (; o < out; o++)
        for (int t = 0; t < tokens; t++) {
            float total = 0;
            for (int64_t r = 0; r < rank; r++) total += s[t * rank + r] * get(b + r * out + o);
            set(y + t * out + o, get(y + t * out + o) + total);
        }
}

// Tokens first..end for one target; `next` is the table of the adapter that this thread comes to afterwards.
void tokens_of(const value *x, int64_t in, const int64_t *const *tables, int64_t first, int64_t end,
               const int64_t *next, const Target &target, std::vector<float> &s) {
    auto entry = [&](const int64_t *table) {
        return table && table[3 * target.module + 2] ? table + 3 * target.module : nullptr;
    };
    const int64_t *ahead = entry(next);
    for (int64_t t = first; t < end;) {
        const int64_t *mine = entry(tables[t]);
        if (!mine) {
            t++;
            continue;
        }
        int64_t rank = mine[2], out = target.out;
        const value *a = (const value *)mine[0], *b = (const value *)mine[1];
        if (ahead && ahead != mine) fetch((const void *)ahead[0], ahead[2] * in * sizeof(value));
        if ((int64_t)s.size() < TILE * rank) s.resize(TILE * rank);
        if (t + TILE <= end && std::count(tables + t, tables + t + TILE, tables[t]) == TILE) {
            add<TILE>(x + t * in, a, b, rank, in, out, s.data(), target.y + t * out);
            t += TILE;
        } else {
            fetch(b, rank * out * sizeof(value));
            add<1>(x + t * in, a, b, rank, in, out, s.data(), target.y + t * out);
            t++;
        }
    }
}
} // namespace

// For each target, y [tokens, out] += (x [tokens, in] A^T) B; tables [tokens].
extern "C" void lora(const value *x, int64_t in, const int64_t *const *tables, int64_t tokens, const Target *targets,
                     int64_t count) {
#pragma omp parallel
    {
        std::vector<float> s;
        int64_t threads = omp_get_num_threads(), step = tokens >= 2 * TILE * threads ? TILE : 1;
#pragma omp for schedule(static, 1)
        for (int64_t first = 0; first < tokens; first += step) {
            int64_t end = std::min(first + step, tokens), ahead = first + threads * step;
            const int64_t *next = ahead < tokens ? tables[ahead] : nullptr;
            for (int64_t i = 0; i < count; i++) tokens_of(x, in, tables, first, end, next, targets[i], s);
        }
    }
}
