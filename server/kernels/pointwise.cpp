// What stands between the matrix products of a gated transformer layer, each in one pass over its numbers.
#include "kernels.h"
#include <algorithm>
#include <cmath>

namespace {
// What the number is once it has been stored.
[[maybe_unused]] float rounded(float x, const float *) { return x; }
[[maybe_unused]] float rounded(float x, const bfloat16 *) {
    bfloat16 y;
    set(&y, x);
    return get(&y);
}
[[maybe_unused]] vfloat rounded(vfloat x, const float *) { return x; }
[[maybe_unused]] vfloat rounded(vfloat x, const bfloat16 *) {
    return (vfloat)(__builtin_convertvector(narrow(x), vword) << 16);
}

// x[i] = f(x[i], y[i]), on several threads from `many` numbers on. The last few take the same way as all others: what
// a number becomes must not depend on where it stands, which is to say on who else is in the batch.
template <class F> void each(value *x, const value *y, int64_t n, int64_t many, F f) {
    int64_t vectors = n / LANES, done = vectors * LANES;
#pragma omp parallel for schedule(static) if (n > many)
    for (int64_t i = 0; i < vectors; i++) store(x + i * LANES, f(load(x + i * LANES), load(y + i * LANES)));
    value a[LANES] = {}, b[LANES] = {};
    std::copy(x + done, x + n, a);
    std::copy(y + done, y + n, b);
    store(a, f(load(a), load(b)));
    std::copy(a, a + (n - done), x + done);
}
} // namespace

// y = (offset + weight) * x / sqrt(mean(x^2) + eps) for each row (Zhang & Sennrich 2019). With offset 0 the quotient is
// rounded before it is multiplied, as Llama's is; with offset 1 (Gemma) it is not.
extern "C" void rms_norm(const value *x, const value *weight, value *y, int64_t rows, int64_t dim, float eps,
                         float offset) {
#pragma omp parallel for schedule(static) if (rows > 4)
    for (int64_t r = 0; r < rows; r++) {
        const value *from = x + r * dim;
        vfloat squares[4] = {};
        int64_t d = 0;
        for (; d + 4 * LANES <= dim; d += 4 * LANES)
            for (int v = 0; v < 4; v++) {
                vfloat part = load(from + d + v * LANES);
                squares[v] += part * part;
            }
        float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
        for (; d < dim; d++) total += get(from + d) * get(from + d);
        float factor = 1 / std::sqrt(total / dim + eps);
        for (d = 0; d + LANES <= dim; d += LANES) {
            vfloat quotient = load(from + d) * factor;
            if (offset == 0) quotient = rounded(quotient, from);
            store(y + r * dim + d, (load(weight + d) + offset) * quotient);
        }
        for (; d < dim; d++) {
            float quotient = get(from + d) * factor;
            if (offset == 0) quotient = rounded(quotient, from);
            set(y + r * dim + d, (get(weight + d) + offset) * quotient);
        }
    }
}

// x += y.
extern "C" void add(value *x, const value *y, int64_t n) {
    each(x, y, n, 16384, [](vfloat a, vfloat b) { return a + b; });
}

// gate = silu(gate) * up; rounded in between, as two operations would.
extern "C" void silu_mul(value *gate, const value *up, int64_t n) {
    each(gate, up, n, 4096, [&](vfloat x, vfloat y) {
        // `exponential` ends at e^88; beyond that the quotient is 0, but for -inf, which stays no number.
        vfloat activated = x < -88.0f ? x * 0.0f : x / (1.0f + exponential(-x));
        return rounded(activated, gate) * y;
    });
}
