// The first half of LoRA, s = x A^T for every token by its own adapter; linear.cpp adds s B to its sums. A [rank, in],
// B [rank, out], the scaling inside B.
//
// A token's adapter is named by the address of its table: three int64 a module, the addresses of A and B, and the rank
// (0: the adapter does not have this module). Address 0 is the base: such a token has no s. So nothing is copied or
// laid out anew when the adapters of a step change, and ranks mix without padding. Tokens of one adapter follow each other:
// each adapter is read from memory once, and four tokens at a time where there are many. A token's sums are made in the
// same order either way.
#include "kernels.h"
#include <algorithm>
#include <omp.h>

namespace {
constexpr int64_t TILE = 4;

// Tokens first..end for one module; `next` is the table of the adapter that this thread comes to afterwards.
void tokens_of(const value *x, int64_t in, const Adapters &adapters, int64_t first, int64_t end, const int64_t *next,
               const Shrunk &to) {
    const Pair ahead = pair_of(next, to.module);
    for (int64_t t = first; t < end;) {
        const int64_t *table = adapters.tables[t];
        const Pair mine = pair_of(table, to.module);
        if (!mine.rank) {
            t++;
            continue;
        }
        if (ahead.rank && ahead.a != mine.a) fetch(ahead.a, ahead.rank * in * sizeof(value));
        if (t + TILE <= end && std::count(adapters.tables + t, adapters.tables + t + TILE, table) == TILE) {
            dots<TILE>(x + t * in, in, mine.a, mine.rank, in, 1, to.s + t * to.stride, to.stride);
            t += TILE;
        } else {
            dots<1>(x + t * in, in, mine.a, mine.rank, in, 1, to.s + t * to.stride, to.stride);
            t++;
        }
    }
}
} // namespace

int64_t highest_rank(const Adapters &adapters, int64_t module) {
    int64_t highest = 0;
    const int64_t *before = nullptr;
    for (int64_t t = 0; t < adapters.tokens; before = adapters.tables[t++])
        if (adapters.tables[t] != before) highest = std::max(highest, pair_of(adapters.tables[t], module).rank);
    return highest;
}

// x [tokens, in] to each module's s [tokens, stride].
void shrink(const value *x, int64_t in, const Adapters &adapters, const Shrunk *modules, int64_t count) {
    int64_t tokens = adapters.tokens;
#pragma omp parallel
    {
        int64_t threads = omp_get_num_threads(), step = tokens >= 2 * TILE * threads ? TILE : 1;
#pragma omp for schedule(static, 1)
        for (int64_t first = 0; first < tokens; first += step) {
            int64_t end = std::min(first + step, tokens), ahead = first + threads * step;
            const int64_t *next = ahead < tokens ? adapters.tables[ahead] : nullptr;
            for (int64_t i = 0; i < count; i++)
                if (modules[i].stride) tokens_of(x, in, adapters, first, end, next, modules[i]);
        }
    }
}
