// The kernels, for those that call each other.
#pragma once
#include "vectors.h"
#include <time.h>

// One of the products of the same x: its weight, its number in the adapters' tables. `bias` may be null.
struct Product {
    const uint32_t *w;
    const float *bias;
    value *y;
    int64_t outs, module;
};

// Each token's adapter, named by its table; null: the base's.
struct Adapters {
    const int64_t *const *tables;
    int64_t tokens;
};

// What an adapter adds to one linear; rank 0: nothing.
struct Pair {
    const value *a, *b;
    int64_t rank;
};

static inline Pair pair_of(const int64_t *table, int64_t module) {
    if (!table) return {nullptr, nullptr, 0};
    const int64_t *entry = table + 3 * module;
    return {(const value *)entry[0], (const value *)entry[1], entry[2]};
}

// s [tokens, stride] of one module; stride 0: no token's adapter has it.
struct Shrunk {
    float *s;
    int64_t stride, module;
};

int64_t highest_rank(const Adapters &adapters, int64_t module);
void shrink(const value *x, int64_t in, const Adapters &adapters, const Shrunk *modules, int64_t count);

// A run of one row's prompt: packed tokens start..start+count, after `context` tokens; `blocks` hold its keys.
struct Chunk {
    int64_t start, count, context;
    const int64_t *blocks;
};

// Nanoseconds now.
static inline int64_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000 + time.tv_nsec;
}

extern "C" {
void linear(const uint32_t *x, int64_t rows, int64_t steps, const Product *products, int64_t count,
            const int64_t *const *tables, int64_t *spent);
void rope(value *query, value *key, const value *cosine, const value *sine, int64_t tokens, int64_t heads,
          int64_t kv_heads, int64_t dim, int64_t rotary);
void store_kv(const value *key, int64_t key_token, int64_t key_head, const value *fresh, int64_t fresh_token,
              int64_t fresh_head, value *keys, value *values, const int64_t *slots, int64_t tokens, int64_t kv_heads,
              int64_t key_dim, int64_t value_dim, int64_t pool_tokens);
void decode(const value *query, int64_t token_stride, int64_t head_stride, const value *keys, const value *values,
            const int32_t *tables, int64_t width, const int64_t *positions, const int64_t *tokens, int64_t rows,
            int64_t heads, int64_t kv_heads, int64_t key_dim, int64_t value_dim, int64_t pool_tokens, int64_t block,
            int64_t window, float scale, value *out);
void prefill(const value *query, int64_t token_stride, int64_t head_stride, const value *keys, const value *values,
             const Chunk *chunks, int64_t count, int64_t heads, int64_t kv_heads, int64_t key_dim, int64_t value_dim,
             int64_t pool_tokens, int64_t block, int64_t window, float scale, value *out);
void rms_norm(const value *x, const value *weight, value *y, int64_t rows, int64_t dim, float eps, float offset);
void add(value *x, const value *y, int64_t n);
void silu_mul(value *gate, const value *up, int64_t n);
}
