// What lies between the matrix products of a block of LeanVAE on CPUs, slab by slab; `slabs.py` compiles and calls it.
//
// Loops over vectors as GCC and Clang have them for every processor. Neither PyTorch nor an intrinsic is included, so
// that it compiles within seconds. Everything is computed in float32 and rounded once, when it is stored.

#include <cstdint>
#include <cstring>

namespace {

#ifdef __AVX512F__
constexpr int lanes = 16;
#else
constexpr int lanes = 8;
#endif
constexpr int block = lanes == 16 ? 8 : 4;  // outputs at a time: as many as there are registers for
constexpr int packed_lanes = 16;  // of the weights of the convolution in memory, whatever the processor has

typedef float floats __attribute__((vector_size(4 * lanes)));
typedef int32_t ints __attribute__((vector_size(4 * lanes)));
typedef uint32_t words __attribute__((vector_size(4 * lanes)));
typedef uint16_t halves __attribute__((vector_size(2 * lanes)));

struct bfloat16 {
    uint16_t bits;
};

inline floats load(const float* from) {
    floats x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline floats load(const bfloat16* from) {
    halves bits;
    std::memcpy(&bits, from, sizeof bits);
    return (floats)(__builtin_convertvector(bits, words) << 16);
}

inline void store(float* to, floats x) { std::memcpy(to, &x, sizeof x); }

inline void store(bfloat16* to, floats x) {
    const words bits = (words)x, not_a_number = (bits | 0x400000) >> 16;
    const words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to the nearest, of two to the even one
    const halves result = __builtin_convertvector(x == x ? rounded : not_a_number, halves);
    std::memcpy(to, &result, sizeof result);
}

inline float sum(floats x) {
    float total = 0;
    for (int lane = 0; lane < lanes; ++lane) total += x[lane];
    return total;
}

// Tokens `(time, height, width, channels)`, and the part of them that is computed.
struct Geometry {
    int64_t height, width, channels, start, stop, top, bottom;
};

// The rows of inputs that one row of outputs reads, nine at most: three of the present and of each of two past steps.
template <typename Token>
struct Rows {
    const Token* row[9];
    int tap[9];  // of the first of the three weights that the row takes
    int count = 0;

    void add(const Token* pointer, int delay, int dy) {
        row[count] = pointer;
        tap[count++] = ((2 - delay) * 3 + dy + 1) * 3;
    }
};

// `num` neighbouring outputs: each weight is loaded once for all of them, each input once for three. At a border of the
// frame there is no input on that side.
template <int num, bool at_left, bool at_right, typename Token>
inline void convolve(const Rows<Token>& rows, int64_t x, int64_t channels, const float* taps, const float* bias,
                     const Token* residual, float* out) {
    for (int64_t c = 0; c < channels; c += lanes) {
        const float* weights = taps + c / packed_lanes * packed_lanes * 27 + c % packed_lanes;
        floats sums[num];
        for (int i = 0; i < num; ++i) sums[i] = load(bias + c);
        for (int k = 0; k < rows.count; ++k) {
            const Token* row = rows.row[k] + x * channels + c;
            floats inputs[num + 2];
            for (int i = 0; i < num + 2; ++i) {
                const bool is_outside = (at_left && i == 0) || (at_right && i == num + 1);
                inputs[i] = is_outside ? floats{} : load(row + (i - 1) * channels);
            }
            for (int dx = 0; dx < 3; ++dx) {
                const floats weight = load(weights + (rows.tap[k] + dx) * packed_lanes);
                for (int i = 0; i < num; ++i) sums[i] += inputs[i + dx] * weight;
            }
        }
        for (int i = 0; i < num; ++i) {
            if (residual) sums[i] += load(residual + (x + i) * channels + c);
            store(out + i * channels + c, sums[i]);
        }
    }
}

template <int num, typename Token>
inline void convolve(const Rows<Token>& rows, int64_t x, int64_t width, int64_t channels, const float* taps,
                     const float* bias, const Token* residual, float* out) {
    const bool at_left = x == 0, at_right = x + num == width;
    if (at_left && at_right)
        convolve<num, true, true>(rows, x, channels, taps, bias, residual, out);
    else if (at_left)
        convolve<num, true, false>(rows, x, channels, taps, bias, residual, out);
    else if (at_right)
        convolve<num, false, true>(rows, x, channels, taps, bias, residual, out);
    else
        convolve<num, false, false>(rows, x, channels, taps, bias, residual, out);
}

// The LayerNorm of one token.
template <typename Normed>
inline void normalize(const float* x, int64_t channels, const float* weight, const float* bias, float eps, Normed* out) {
    floats total{}, squares{};
    for (int64_t c = 0; c < channels; c += lanes) total += load(x + c);
    const float mean = sum(total) / channels;
    for (int64_t c = 0; c < channels; c += lanes) {
        const floats difference = load(x + c) - mean;
        squares += difference * difference;
    }
    const float scale = 1 / __builtin_sqrtf(sum(squares) / channels + eps);
    for (int64_t c = 0; c < channels; c += lanes)
        store(out + c, (load(x + c) - mean) * scale * load(weight + c) + load(bias + c));
}

template <typename Token, typename Normed>
void convolve_and_normalize(const Token* frames, const Token* tail, const Token* above, const Geometry& size,
                            const float* taps, const float* bias, const float* norm_weight, const float* norm_bias,
                            float eps, bool has_residual, float* convolved, Normed* normed, int num_threads) {
    const int64_t width = size.width, channels = size.channels, num_rows = size.bottom - size.top;
    const int64_t per_row = width * channels, per_frame = size.height * per_row;
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t index = 0; index < (size.stop - size.start) * num_rows; ++index) {
        const int64_t t = size.start + index / num_rows, y = size.top + index % num_rows;
        Rows<Token> rows;
        for (int delay = 0; delay < 3; ++delay) {
            const Token* past = tail ? tail + (2 + t - delay) * per_frame : nullptr;
            const Token* frame = t >= delay ? frames + (t - delay) * per_frame : past;
            for (int dy = -1; frame && dy < 2; ++dy) {
                if (y + dy < 0 || y + dy >= size.height) continue;
                const bool is_overwritten = delay == 0 && above && y + dy == size.top - 1;
                rows.add(is_overwritten ? above : frame + (y + dy) * per_row, delay, dy);
            }
        }
        const Token* residual = has_residual ? frames + t * per_frame + y * per_row : nullptr;
        for (int64_t x = 0, num; x < width; x += num) {
            const int64_t first = (index * width + x) * channels;
            num = width - x >= block ? block : width - x >= 4 ? 4 : 1;
            if (num == block)
                convolve<block>(rows, x, width, channels, taps, bias, residual, convolved + first);
            else if (num == 4)
                convolve<4>(rows, x, width, channels, taps, bias, residual, convolved + first);
            else
                convolve<1>(rows, x, width, channels, taps, bias, residual, convolved + first);
            for (int64_t token = first; token < first + num * channels; token += channels)
                normalize(convolved + token, channels, norm_weight, norm_bias, eps, normed + token);
        }
    }
}

// The exact gelu. The share of a normal distribution below x is 0.5 + x * p(x * x), with a polynomial that was fitted
// for |x| < 5.5 to an error of 1e-8; it takes its argument scaled to [-1, 1]. Beyond, it is
// within 2e-8 of 0 and of 1, and taken for them.
inline floats gelu(floats x) {
    constexpr float limit = 5.5f;
    constexpr float p[] = {0.12855193f,     -0.064172335f,   0.047737628f,  -0.038792785f,
                           0.03207026f,     -0.026048262f,   0.020364566f,  -0.014999073f,
                           0.010227829f,    -0.0068199234f,  0.0046217777f, -0.0024186308f,
                           0.00072010874f,  -0.00052914524f, 0.00063155836f, -0.00023641401f};
    const floats scaled = x * x * (2 / (limit * limit)) - 1;
    floats polynomial = floats{} + p[15];
    for (int degree = 14; degree >= 0; --degree) polynomial = polynomial * scaled + p[degree];
    floats share = x * polynomial + 0.5f;
    share = x > limit ? floats{} + 1 : share;
    share = x < -limit ? floats{} : share;
    return x * share;
}

template <typename Hidden>
void multiply_by_gelu(const Hidden* gate, Hidden* value, int64_t size, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t i = 0; i < size; i += lanes) store(value + i, load(value + i) * gelu(load(gate + i)));
}

template <typename Base, typename Product, typename Token>
void add(const Base* base, const Product* product, const float* threshold, Token* out, int64_t size, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t i = 0; i < size; i += lanes) {
        floats x = load(product + i);
        if (base) x += load(base + i);
        if (threshold) {
            floats rest = (x < 0 ? -x : x) - *threshold;
            rest = rest > 0 ? rest : floats{};
            x = x > 0 ? rest : x < 0 ? -rest : x;
        }
        store(out + i, x);
    }
}

// Calls a function with a null pointer of the type that a tensor's elements have.
template <typename Function>
void with_type(int is_bfloat16, Function function) {
    if (is_bfloat16)
        function((bfloat16*)nullptr);
    else
        function((float*)nullptr);
}

}  // namespace

extern "C" {

void leanvae_convolve_and_normalize(const void* frames, const void* tail, const void* above, int is_token_bfloat16,
                                    const int64_t* size, const float* taps, const float* bias, const float* norm_weight,
                                    const float* norm_bias, float eps, int has_residual, float* convolved, void* normed,
                                    int is_normed_bfloat16, int num_threads) {
    with_type(is_token_bfloat16, [&](auto* token) {
        using Token = decltype(token);
        with_type(is_normed_bfloat16, [&](auto* type) {
            convolve_and_normalize((const Token)frames, (const Token)tail, (const Token)above, *(const Geometry*)size,
                                   taps, bias, norm_weight, norm_bias, eps, has_residual, convolved,
                                   (decltype(type))normed, num_threads);
        });
    });
}

void leanvae_multiply_by_gelu(const void* gate, void* value, int is_bfloat16, int64_t size, int num_threads) {
    with_type(is_bfloat16, [&](auto* type) {
        using Hidden = decltype(type);
        multiply_by_gelu((Hidden)gate, (Hidden)value, size, num_threads);
    });
}

void leanvae_add(const void* base, int is_base_bfloat16, const void* product, int is_product_bfloat16,
                 const float* threshold, void* out, int is_out_bfloat16, int64_t size, int num_threads) {
    with_type(is_base_bfloat16, [&](auto* base_type) {
        with_type(is_product_bfloat16, [&](auto* product_type) {
            with_type(is_out_bfloat16, [&](auto* out_type) {
                add((decltype(base_type))base, (decltype(product_type))product, threshold, (decltype(out_type))out,
                    size, num_threads);
            });
        });
    });
}
}
