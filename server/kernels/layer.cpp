// One layer of a decoder of Llama's kind, from its input to its output, without a word of Python in between:
// hidden += out(attention(qkv(norm(hidden)))); hidden += down(silu(gate) * up), gate and up of norm(hidden).
//
// layer.py describes the same structures; what they are is said there. `apply` is where the adapters come in.
#include "kernels.h"

namespace {
constexpr int64_t MOST = 3; // linears of one input

struct Norm {
    const value *weight;
    float eps, offset;
};

struct Linears {
    const Product *products;
    int64_t count, steps, ins;
};

struct Layer {
    Norm before, after, query, key;
    Linears qkv, out, gate_up, down;
    value *keys, *values;
    int64_t heads, kv_heads, dim, pool_tokens, block, window;
    float scale;
};

struct Step {
    int64_t tokens;
    const value *cosine, *sine;
    int64_t rotary;
    const int64_t *slots;
    const int64_t *const *adapters;
    const int32_t *tables;
    int64_t width;
    const int64_t *positions, *places;
    int64_t decodes;
    const Chunk *chunks;
    int64_t chunk_count;
    value *room;
};

enum Part { LINEARS, LORA, ATTENTION, POINTWISE };

// Adds what has passed since the last mark to a part's nanoseconds; `linear` counts its own two.
struct Clock {
    int64_t *spent, last;

    explicit Clock(int64_t *spent) : spent(spent), last(now()) {}

    void mark(Part part) {
        int64_t at = now();
        spent[part] += at - last;
        last = at;
    }
};

// The outputs of all linears of `part`, one [tokens, out] after the other.
void apply(const Linears &part, const value *x, const Step &step, value *to, Clock &clock) {
    Product products[MOST];
    for (int64_t i = 0; i < part.count; i++) {
        products[i] = part.products[i];
        products[i].y = to;
        to += step.tokens * products[i].outs;
    }
    linear((const uint32_t *)x, step.tokens, part.steps, products, part.count, step.adapters, clock.spent);
    clock.last = now();
}

void normed(const Norm &norm, const value *x, value *y, int64_t rows, int64_t dim) {
    if (norm.weight) rms_norm(x, norm.weight, y, rows, dim, norm.eps, norm.offset);
}

void attend(const Layer &layer, const Step &step, const value *query, value *out) {
    int64_t heads = layer.heads, kv_heads = layer.kv_heads, dim = layer.dim;
    if (step.decodes)
        decode(query, heads * dim, dim, layer.keys, layer.values, step.tables, step.width, step.positions, step.places,
               step.decodes, heads, kv_heads, dim, dim, layer.pool_tokens, layer.block, layer.window, layer.scale, out);
    if (step.chunk_count)
        prefill(query, heads * dim, dim, layer.keys, layer.values, step.chunks, step.chunk_count, heads, kv_heads, dim,
                dim, layer.pool_tokens, layer.block, layer.window, layer.scale, out);
}
} // namespace

// hidden [tokens, hidden], in place; `spent` [4] nanoseconds.
extern "C" void layer(value *hidden, const Layer *of, const Step *during, int64_t *spent) {
    const Layer &layer = *of;
    const Step &step = *during;
    Clock clock(spent);
    int64_t tokens = step.tokens, width = layer.qkv.ins, dim = layer.dim;
    int64_t heads = layer.heads, kv_heads = layer.kv_heads;
    value *x = step.room, *query = x + tokens * width, *key = query + tokens * heads * dim;
    value *fresh = key + tokens * kv_heads * dim, *mixed = fresh + tokens * kv_heads * dim;
    normed(layer.before, hidden, x, tokens, width);
    clock.mark(POINTWISE);
    apply(layer.qkv, x, step, query, clock);
    normed(layer.query, query, query, tokens * heads, dim);
    normed(layer.key, key, key, tokens * kv_heads, dim);
    clock.mark(POINTWISE);
    rope(query, key, step.cosine, step.sine, tokens, heads, kv_heads, dim, step.rotary);
    store_kv(key, kv_heads * dim, dim, fresh, kv_heads * dim, dim, layer.keys, layer.values, step.slots, tokens,
             kv_heads, dim, dim, layer.pool_tokens);
    attend(layer, step, query, mixed);
    clock.mark(ATTENTION);
    apply(layer.out, mixed, step, x, clock);
    add(hidden, x, tokens * width);
    normed(layer.after, hidden, x, tokens, width);
    int64_t inner = layer.down.ins;
    value *gate = x + tokens * width, *up = gate + tokens * inner;
    clock.mark(POINTWISE);
    apply(layer.gate_up, x, step, gate, clock);
    silu_mul(gate, up, tokens * inner);
    clock.mark(POINTWISE);
    apply(layer.down, gate, step, x, clock);
    add(hidden, x, tokens * width);
    clock.mark(POINTWISE);
}
