// Keys and values into the pool's blocks, and attention of rows that bring one new token each (decode).
//
// The pool is [kv_heads, pool_tokens, dim] of each layer. A row's keys 0..position lie in the blocks of its table; no
// other token of the pool is read, so what stands there is nobody's business. Each byte of K and V is read once and
// serves all query heads of its group (grouped-query attention).
#include "kernels.h"
#include <algorithm>
#include <vector>

namespace {
// sums[h * dim] += sum over t of weights[h * apart + t] * v[t], for a few heads h; v [tokens, dim] is loaded once for
// all.
template <int heads, int vectors>
void columns(float *sums, const float *weights, int64_t apart, const value *v, int64_t tokens, int64_t dim) {
    vfloat part[heads][vectors];
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < vectors; i++) part[h][i] = load(sums + h * dim + i * LANES);
    for (int64_t t = 0; t < tokens; t++)
        for (int i = 0; i < vectors; i++) {
            vfloat line = load(v + t * dim + i * LANES);
            for (int h = 0; h < heads; h++) part[h][i] += weights[h * apart + t] * line;
        }
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < vectors; i++) store(sums + h * dim + i * LANES, part[h][i]);
}

template <int heads>
void accumulate(float *sums, const float *weights, int64_t apart, const value *v, int64_t tokens, int64_t dim) {
    int64_t d = 0;
    for (; d + 4 * LANES <= dim; d += 4 * LANES) columns<heads, 4>(sums + d, weights, apart, v + d, tokens, dim);
    for (; d + LANES <= dim; d += LANES) columns<heads, 1>(sums + d, weights, apart, v + d, tokens, dim);
    for (; d < dim; d++)
        for (int h = 0; h < heads; h++)
            for (int64_t t = 0; t < tokens; t++) sums[h * dim + d] += weights[h * apart + t] * get(v + t * dim + d);
}

// Turns scores into weights, which add up to what is returned. A NaN among the scores makes that NaN: the row shows it.
float softmax(float *scores, int64_t n) {
    int64_t whole = n / LANES * LANES;
    vfloat most = splat(scores[0]), total = {};
    for (int64_t i = 0; i < whole; i += LANES) most = load(scores + i) > most ? load(scores + i) : most;
    float highest = scores[0];
    for (int i = 0; i < LANES; i++) highest = std::max(highest, most[i]);
    for (int64_t i = whole; i < n; i++) highest = std::max(highest, scores[i]);
    for (int64_t i = 0; i < whole; i += LANES) {
        vfloat e = exponential(load(scores + i) - highest);
        store(scores + i, e);
        total += e;
    }
    float tail[LANES] = {};
    std::copy(scores + whole, scores + n, tail);
    store(tail, exponential(load(tail) - highest));
    std::copy(tail, tail + (n - whole), scores + whole);
    float sums = sum(total);
    for (int64_t i = whole; i < n; i++) sums += scores[i];
    return sums;
}

constexpr int64_t AHEAD = 4; // blocks

struct Shape {
    int64_t heads, kv_heads, key_dim, value_dim, block;
};

// One row's query heads of one KV head. `room` is kept from one call to the next.
struct Group {
    const Shape &shape;
    const int32_t *table; // the row's blocks
    int64_t first, position; // the keys that are seen
    std::vector<float> &room;

    // Asks for the first line of block `number`, if there is one: a block lies in a page of its own, whose address
    // takes longer to find than its bytes to come.
    void touch(const value *pool, int64_t dim, int64_t number) const {
        if (number <= position / shape.block) __builtin_prefetch(pool + table[number] * shape.block * dim);
    }

    // Visits the tokens block by block: the first one's number, how many, and their keys or values.
    template <class Visit> void blocks(const value *pool, int64_t dim, int64_t few, Visit visit) const {
        int64_t size = shape.block;
        for (int64_t at = first; at <= position;) {
            int64_t end = std::min({position + 1, (at / size + 1) * size, (at / few + 1) * few}), then = at + size;
            if (then <= position)
                fetch(pool + (table[then / size] * size + then % size) * dim, (end - at) * dim * sizeof(value));
            visit(at - first, end - at, pool + (table[at / size] * size + at % size) * dim);
            at = end;
        }
    }

    void attend(const value *query, int64_t head_stride, const value *keys, const value *values, float scale,
                value *out) const {
        int64_t per = shape.heads / shape.kv_heads, count = position + 1 - first;
        int64_t key_dim = shape.key_dim, value_dim = shape.value_dim, begin = first / shape.block;
        room.assign(per * (count + value_dim + 1), 0.0f);
        float *scores = room.data(), *sums = scores + per * count;
        for (int64_t ahead = 0; ahead < AHEAD; ahead++) touch(keys, key_dim, begin + ahead);
        blocks(keys, key_dim, 4, [&](int64_t at, int64_t tokens, const value *k) {
            touch(keys, key_dim, (first + at) / shape.block + AHEAD);
            touch(values, value_dim, (first + at) / shape.block);
            by_four(per, [&](int64_t h, auto heads) {
                dots<heads>(query + h * head_stride, head_stride, k, tokens, key_dim, scale, scores + h * count + at,
                            count);
            });
        });
        float *totals = sums + per * value_dim;
        for (int64_t h = 0; h < per; h++) totals[h] = softmax(scores + h * count, count);
        blocks(values, value_dim, 8, [&](int64_t at, int64_t tokens, const value *v) {
            by_four(per, [&](int64_t h, auto heads) {
                accumulate<heads>(sums + h * value_dim, scores + h * count + at, count, v, tokens, value_dim);
            });
        });
        for (int64_t h = 0; h < per; h++)
            for (int64_t d = 0; d < value_dim; d++) set(out + h * value_dim + d, sums[h * value_dim + d] / totals[h]);
    }
};

// Rotates pairs (i, i + half) of the first `rotary` numbers of each head by the token's angles (Su et al. 2021).
void rotate(value *x, int64_t heads, int64_t dim, const value *cosine, const value *sine, int64_t rotary) {
    int64_t half = rotary / 2;
    for (int64_t h = 0; h < heads; h++, x += dim) {
        int64_t d = 0;
        for (; d + LANES <= half; d += LANES) {
            vfloat a = load(x + d), b = load(x + half + d);
            store(x + d, a * load(cosine + d) - b * load(sine + d));
            store(x + half + d, b * load(cosine + half + d) + a * load(sine + half + d));
        }
        for (; d < half; d++) {
            float a = get(x + d), b = get(x + half + d);
            set(x + d, a * get(cosine + d) - b * get(sine + d));
            set(x + half + d, b * get(cosine + half + d) + a * get(sine + half + d));
        }
    }
}

} // namespace

// query and key [tokens, heads, dim], contiguous, in place; cosine and sine [tokens, rotary].
extern "C" void rope(value *query, value *key, const value *cosine, const value *sine, int64_t tokens, int64_t heads,
                     int64_t kv_heads, int64_t dim, int64_t rotary) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        rotate(query + t * heads * dim, heads, dim, cosine + t * rotary, sine + t * rotary, rotary);
        rotate(key + t * kv_heads * dim, kv_heads, dim, cosine + t * rotary, sine + t * rotary, rotary);
    }
}

// key and fresh [tokens, kv_heads, dim], any strides, to their tokens' slots of the pool's keys and values.
extern "C" void store_kv(const value *key, int64_t key_token, int64_t key_head, const value *fresh,
                         int64_t fresh_token, int64_t fresh_head, value *keys, value *values, const int64_t *slots,
                         int64_t tokens, int64_t kv_heads, int64_t key_dim, int64_t value_dim, int64_t pool_tokens) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < kv_heads; h++) {
            int64_t place = h * pool_tokens + slots[t];
            memcpy(keys + place * key_dim, key + t * key_token + h * key_head, key_dim * sizeof(value));
            memcpy(values + place * value_dim, fresh + t * fresh_token + h * fresh_head, value_dim * sizeof(value));
        }
}

// Row r is packed token tokens[r] and sees keys max(0, positions[r] - window + 1)..positions[r] (window 0: all from 0);
// query [tokens, heads, key_dim] with strides, out [tokens, heads, value_dim] contiguous, tables [rows, width].
extern "C" void decode(const value *query, int64_t token_stride, int64_t head_stride, const value *keys,
                       const value *values, const int32_t *tables, int64_t width, const int64_t *positions,
                       const int64_t *tokens, int64_t rows, int64_t heads, int64_t kv_heads, int64_t key_dim,
                       int64_t value_dim, int64_t pool_tokens, int64_t block, int64_t window, float scale, value *out) {
    const Shape shape{heads, kv_heads, key_dim, value_dim, block};
    int64_t per = heads / kv_heads;
#pragma omp parallel
    {
        std::vector<float> room;
#pragma omp for collapse(2) schedule(dynamic, 1)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t g = 0; g < kv_heads; g++) {
                int64_t first = window > 0 ? std::max<int64_t>(0, positions[r] - window + 1) : 0;
                const value *q = query + tokens[r] * token_stride + g * per * head_stride;
                Group{shape, tables + r * width, first, positions[r], room}.attend(
                    q, head_stride, keys + g * pool_tokens * key_dim, values + g * pool_tokens * value_dim, scale,
                    out + (tokens[r] * heads + g * per) * value_dim);
            }
    }
}
