// Attention of rows that bring several new tokens each: causal, over the pool's blocks, the chunk's own tokens
// included. A NaN among a row's own values reaches its earlier tokens too (0 x NaN), and nobody else's.
//
// Keys come in tiles of KEYS; a tile of queries keeps its sums, its largest score and its total from one tile of keys
// to the next (Milakov & Gimelshein 2018; Dao et al. 2022, "FlashAttention"), so scores never leave the cache. Tiles of
// keys begin at multiples of KEYS whatever the chunk, and each query's sums are made in the same order in any company:
// a prompt in chunks gives what it gives as a whole. Arithmetic is float32 for both number formats.
#include "kernels.h"
#include <algorithm>
#include <limits>
#include <vector>

namespace {
#if defined(__AVX512F__)
constexpr int ROWS = 6, VECTORS = 4;
#else
constexpr int ROWS = 4, VECTORS = 2;
#endif
constexpr int64_t KEYS = 48, QUERIES = 96; // of a tile; queries times the heads that share a KV head

struct Matrix { // element (r, i) is at from[r * row + i * column]
    const float *from;
    int64_t row, column;
};

// c [rows, vectors of columns] += a [rows, n] times b [n, columns]; strides in floats.
template <int rows, int vectors>
void micro(Matrix a, const float *b, int64_t b_stride, int64_t n, float *c, int64_t c_stride) {
    vfloat sums[rows][vectors];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) sums[r][v] = load(c + r * c_stride + v * LANES);
    for (int64_t i = 0; i < n; i++) {
        vfloat line[vectors];
        for (int v = 0; v < vectors; v++) line[v] = load(b + i * b_stride + v * LANES);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++) sums[r][v] += a.from[r * a.row + i * a.column] * line[v];
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) store(c + r * c_stride + v * LANES, sums[r][v]);
}

template <int rows> void strip(Matrix a, const float *b, int64_t width, int64_t n, float *c) {
    int64_t at = 0;
    for (; at + VECTORS * LANES <= width; at += VECTORS * LANES)
        micro<rows, VECTORS>(a, b + at, width, n, c + at, width);
    switch ((width - at) / LANES) {
    case 1: micro<rows, 1>(a, b + at, width, n, c + at, width); break;
    case 2: micro<rows, 2>(a, b + at, width, n, c + at, width); break;
    case 3: micro<rows, 3>(a, b + at, width, n, c + at, width); break;
    }
}

// c [rows, width] += a [rows, n] times b [n, width]; width is a whole number of vectors.
void multiply(Matrix a, const float *b, int64_t width, int64_t n, int64_t rows, float *c) {
    for (; rows >= ROWS; rows -= ROWS, a.from += ROWS * a.row, c += ROWS * width) strip<ROWS>(a, b, width, n, c);
    for (; rows > 0; rows--, a.from += a.row, c += width) strip<1>(a, b, width, n, c);
}

struct Pool { // one layer's keys and values of one KV head [places, dim]
    const value *keys, *values;
    int64_t key_dim, value_dim, block;
};

int64_t whole(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

void widen(const value *from, int64_t n, float *to) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(to + i, load(from + i));
    for (; i < n; i++) to[i] = get(from + i);
}

// A tile of queries on its way through the keys. `width` rows stand side by side: row r is token r / per of the tile,
// head r % per of the group; those beyond the last are nobody's. What a thread needs is kept from one tile to the next.
struct Tile {
    int64_t rows, width, columns;
    std::vector<float> queries, keys, values, scores, sums, highest, totals, factors;
    std::vector<int32_t> begins, ends; // the keys that each row sees

    void prepare(int64_t count, const Pool &pool) {
        rows = count, width = whole(count), columns = whole(pool.value_dim);
        queries.assign(pool.key_dim * width, 0.0f);
        keys.resize(KEYS * pool.key_dim);
        values.assign(KEYS * columns, 0.0f);
        scores.resize(KEYS * width);
        sums.assign(width * columns, 0.0f);
        highest.assign(width, -std::numeric_limits<float>::infinity());
        totals.assign(width, 0.0f);
        factors.resize(width);
        begins.assign(width, 0), ends.assign(width, 0);
    }

    void gather(const Pool &pool, const Chunk &chunk, int64_t first, int64_t count) {
        for (int64_t k = 0; k < count; k++) {
            int64_t at = first + k, place = chunk.blocks[at / pool.block] * pool.block + at % pool.block;
            widen(pool.keys + place * pool.key_dim, pool.key_dim, keys.data() + k * pool.key_dim);
            widen(pool.values + place * pool.value_dim, pool.value_dim, values.data() + k * columns);
        }
    }

    // Scores of keys first..first+count to weights, for the rows from `at` on, a vector of rows at a time; what is left
    // of the sums so far, now that the largest score may be another. A NaN among the scores makes the total NaN: the
    // row shows it.
    void weigh(int64_t at, int64_t first, int64_t count) {
        vint begin, end;
        memcpy(&begin, begins.data() + at, sizeof(begin));
        memcpy(&end, ends.data() + at, sizeof(end));
        float *score = scores.data() + at;
        vfloat before = load(highest.data() + at), most = before, part = {};
        auto seen = [&](int64_t k) { return (begin <= (int)(first + k)) & (end > (int)(first + k)); };
        for (int64_t k = 0; k < count; k++) {
            vfloat x = load(score + k * width);
            most = (seen(k) & (vint)(x > most)) ? x : most;
        }
        for (int64_t k = 0; k < count; k++) {
            vfloat e = seen(k) ? exponential(load(score + k * width) - most) : vfloat{};
            store(score + k * width, e);
            part += e;
        }
        vfloat factor = most == before ? splat(1) : exponential(before - most);
        store(factors.data() + at, factor);
        store(highest.data() + at, most);
        store(totals.data() + at, load(totals.data() + at) * factor + part);
    }

    void see(const Pool &pool, const Chunk &chunk, int64_t first, int64_t count) {
        gather(pool, chunk, first, count);
        std::fill(scores.begin(), scores.begin() + count * width, 0.0f);
        multiply({keys.data(), pool.key_dim, 1}, queries.data(), width, pool.key_dim, count, scores.data());
        for (int64_t at = 0; at < width; at += LANES) weigh(at, first, count);
        for (int64_t r = 0; r < rows; r++)
            if (factors[r] != 1)
                for (float *to = sums.data() + r * columns, *end = to + columns; to < end; to += LANES)
                    store(to, load(to) * factors[r]);
        multiply({scores.data(), 1, width}, values.data(), columns, count, rows, sums.data());
    }
};

// Tokens first..first+count of a chunk, for the query heads of one KV head.
void attend(const value *query, int64_t token_stride, int64_t head_stride, const Pool &pool, const Chunk &chunk,
            int64_t first, int64_t count, int64_t per, int64_t window, float scale, value *out, int64_t out_stride,
            Tile &tile) {
    int64_t begin = chunk.context + first, end = begin + count;
    tile.prepare(count * per, pool);
    for (int64_t r = 0; r < tile.rows; r++) {
        const value *from = query + (first + r / per) * token_stride + r % per * head_stride;
        int64_t position = begin + r / per;
        for (int64_t d = 0; d < pool.key_dim; d++) tile.queries[d * tile.width + r] = get(from + d) * scale;
        tile.begins[r] = window > 0 ? std::max<int64_t>(0, position - window + 1) : 0;
        tile.ends[r] = position + 1;
    }
    for (int64_t at = tile.begins[0] / KEYS * KEYS; at < end; at += KEYS)
        tile.see(pool, chunk, at, std::min(KEYS, end - at));
    for (int64_t r = 0; r < tile.rows; r++) {
        value *to = out + (first + r / per) * out_stride + r % per * pool.value_dim;
        const float *from = tile.sums.data() + r * tile.columns;
        for (int64_t d = 0; d < pool.value_dim; d++) set(to + d, from[d] / tile.totals[r]);
    }
}
} // namespace

// query [tokens, heads, key_dim] with strides, out [tokens, heads, value_dim] contiguous; the rest as for `decode`.
extern "C" void prefill(const value *query, int64_t token_stride, int64_t head_stride, const value *keys,
                        const value *values, const Chunk *chunks, int64_t count, int64_t heads, int64_t kv_heads,
                        int64_t key_dim, int64_t value_dim, int64_t pool_tokens, int64_t block, int64_t window,
                        float scale, value *out) {
    int64_t per = heads / kv_heads, tokens = std::max<int64_t>(1, QUERIES / per), out_stride = heads * value_dim;
    struct Part {
        const Chunk *chunk;
        int64_t first, head;
    };
    std::vector<Part> parts;
    for (const Chunk *chunk = chunks; chunk < chunks + count; chunk++)
        for (int64_t first = 0; first < chunk->count; first += tokens)
            for (int64_t head = 0; head < kv_heads; head++) parts.push_back({chunk, first, head});
#pragma omp parallel
    {
        Tile tile;
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < parts.size(); i++) {
            const Part &part = parts[i];
            const Chunk &chunk = *part.chunk;
            const Pool pool{keys + part.head * pool_tokens * key_dim, values + part.head * pool_tokens * value_dim,
                            key_dim, value_dim, block};
            attend(query + chunk.start * token_stride + part.head * per * head_stride, token_stride, head_stride, pool,
                   chunk, part.first, std::min(tokens, chunk.count - part.first), per, window, scale,
                   out + chunk.start * out_stride + part.head * per * value_dim, out_stride, tile);
        }
    }
}
