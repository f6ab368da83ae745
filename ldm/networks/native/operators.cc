// The layers of the networks as operators of MindSpore's CPU back end (ops.Custom, ahead of time), float32.
//
// Each takes its inputs, then `options` (one float32 array), and writes its answers behind them. The sums in
// an answer are always added up in the same order, whatever the number of threads.
#include <cmath>

#include "winograd.h"

namespace {

// What MindSpore gives an operator.
struct Call {
  void **p;
  int *dims;
  int64_t **shapes;
  const float *in(int i) const { return static_cast<const float *>(p[i]); }
  float *out(int i) const { return static_cast<float *>(p[i]); }
  int64_t size(int i, int axis) const { return shapes[i][axis < 0 ? dims[i] + axis : axis]; }
  int64_t size(int i) const {
    int64_t all = 1;
    for (int d = 0; d < dims[i]; ++d) all *= shapes[i][d];
    return all;
  }
};

// ---- functions of vectors

// exp(x) to 2 units in the last place: 2^n times a polynomial (Cephes).
inline Vec exponential(Vec x) {
  const Vec zero = {};
  x = x < zero - 87.0f ? zero - 87.0f : x;
  x = x > zero + 88.0f ? zero + 88.0f : x;
  Vec shifted = x * 1.44269504f + 12582912.0f;  // rounds to a whole number, in the low bits
  Ints n = (Ints)shifted - 0x4b400000;
  Vec whole = shifted - 12582912.0f, r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Vec y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  return y * (Vec)((n + 127) << 23);
}

// The normal distribution function, from erf as a quotient of polynomials (Eigen's, float32).
inline Vec normal_cdf(Vec x) {
  const Vec zero = {};
  Vec z = x * 0.70710678f;
  z = z < zero - 4.0f ? zero - 4.0f : z;
  z = z > zero + 4.0f ? zero + 4.0f : z;
  Vec s = z * z;
  Vec p = s * -2.72614225801306e-10f + 2.77068142495902e-08f;
  p = p * s + -2.10102402082508e-06f;
  p = p * s + -5.69250639462346e-05f;
  p = p * s + -7.34990630326855e-04f;
  p = p * s + -2.95459980854025e-03f;
  p = p * s + -1.60960333262415e-02f;
  Vec q = s * -1.45660718464996e-05f + -2.13374055278905e-04f;
  q = q * s + -1.68282697438203e-03f;
  q = q * s + -7.37332916720468e-03f;
  q = q * s + -1.42647390514189e-02f;
  return z * p / q * 0.5f + 0.5f;
}
inline Vec normal_density(Vec x) { return exponential(x * x * -0.5f) * 0.3989422804f; }
inline Vec logistic(Vec x) { return 1.0f / (1.0f + exponential(-x)); }

inline float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += v[i];
  return total;
}

// f(offset, how many of LANES), whole vectors first.
template <class F> inline void in_vectors(int64_t size, F f) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) f(i, LANES);
  if (i < size) f(i, static_cast<int>(size - i));
}
inline Vec load(const float *p, int count = LANES) {
  if (count == LANES) return ::load(p);
  Vec v = {};
  memcpy(&v, p, sizeof(float) * count);
  return v;
}
inline void store(float *p, Vec v, int count = LANES) {
  if (count == LANES) ::store(p, v);
  else memcpy(p, &v, sizeof(float) * count);
}
inline Vec masked(Vec v, int count) {
  for (int i = count; i < LANES; ++i) v[i] = 0;
  return v;
}

constexpr int64_t PIECE = 1 << 14;  // values of an element-wise operator a task
// f(offset, how many) over `size` values, by all threads.
template <class F> void for_values(int64_t size, F f) {
  Threads::all().for_each(parts(size, PIECE), [&](int64_t task) {
    int64_t start = task * PIECE;
    in_vectors(std::min(PIECE, size - start), [&](int64_t i, int count) { f(start + i, count); });
  });
}

// ---- float16

// What an operator of products rounds (the last of its options): nothing, the factors, or the answers.
constexpr float TO_BFLOAT16 = 1, TO_FLOAT16 = 2;

// The nearest number of float16, which is infinite from 65520 on.
inline Vec to_float16(Vec x) {
  const Vec zero = {}, most = zero + 65504.0f;
  Ints bits = (Ints)x;
  Vec y = (Vec)((bits + 0xfff + (bits >> 13 & 1)) & ~0x1fff);  // 11 bits of 24, to the nearest even
  Vec size = y < zero ? -y : y;
  y = size < zero + 6.103515625e-5f ? x + 0.75f - 0.75f : y;   // less than normal: whole multiples of 2^-24
  y = size > most ? x * INFINITY : y;
  return x == x ? y : x;
}
// Answers `first` and later ones.
void round_answers(const Call &call, int first, int count, float rounding) {
  for (; rounding == TO_FLOAT16 && first < count; ++first) {
    float *y = call.out(first);
    for_values(call.size(first), [&](int64_t i, int some) { store(y + i, to_float16(load(y + i, some)), some); });
  }
}

// ---- dense layers; channels along the last axis ("tokens") or before the places ("places")


// One side of a dense layer: samples of `places` by `channels`.
struct Side {
  int64_t samples, places, channels;
  bool is_places;
  static Side of(const Call &call, int i, bool is_places) {
    int64_t first = call.size(i, 0), size = call.size(i);
    if (is_places) return {first, size / first / call.size(i, 1), call.size(i, 1), true};
    return {1, size / call.size(i, -1), call.size(i, -1), false};
  }
  Matrix matrix(const float *p, int64_t sample) const {  // (places, channels)
    p += sample * places * channels;
    return is_places ? Matrix{p, 1, places} : Matrix{p, channels, 1};
  }
};

// Tokens, which are one sample, become as many as the other side has.
inline void share_samples(Side &a, Side &b) {
  int64_t samples = std::max(a.samples, b.samples);
  for (Side *side : {&a, &b}) {
    if (!side->is_places) side->places /= samples, side->samples = samples;
  }
}

// A factor of channels over the places of all samples, one after the other.
template <int WIDTH> inline auto of_samples(const float *p, Side side) {
  return [=](float *panel, int64_t i, int64_t count, int64_t k, int64_t depth) {
    in_runs(k, depth, side.places, [&](int64_t sample, int64_t place, int64_t some, int64_t done) {
      Matrix m = side.matrix(p, sample);
      const float *from = m.p + place * m.down + i * m.across;
      copy_panel<WIDTH>(panel + done * WIDTH, from, m.across, m.down, count, some);
    });
  };
}

// By all threads where the samples go round among them, else each by all of them.
template <class F> inline void for_samples(int64_t samples, F f) {
  if (samples % Threads::all().count() == 0 || samples > 4 * Threads::all().count()) {
    Threads::all().for_each(samples, f);
  } else {
    for (int64_t sample = 0; sample < samples; ++sample) f(sample);
  }
}

// y = x w^T + bias; w is (channels of y, channels of x).
void dense(const float *x, Side of_x, Matrix w, const float *bias, float *y, Side of_y, bool rounds) {
  share_samples(of_x, of_y);
  for_samples(of_x.samples, [&](int64_t sample) {
    Matrix in = of_x.matrix(x, sample);
    Target target;
    target.p = y + sample * of_y.places * of_y.channels;
    target.bias = bias;
    if (of_y.is_places) {
      target.stride = of_y.places;
      multiply(of_y.channels, of_y.places, of_x.channels, rows_of(w), columns_of(in.transposed()), target, rounds);
    } else {
      target.stride = of_y.channels, target.bias_of_columns = true;
      multiply(of_y.places, of_y.channels, of_x.channels, rows_of(in), columns_of(w.transposed()), target, rounds);
    }
  });
}

// The sum of each channel.
void channel_sums(const float *x, Side of_x, float *sums) {
  if (of_x.is_places) {
    Threads::all().for_each(of_x.channels, [&](int64_t channel) {
      double total = 0;
      for (int64_t sample = 0; sample < of_x.samples; ++sample) {
        const float *plane = x + (sample * of_x.channels + channel) * of_x.places;
        Vec part = {};
        in_vectors(of_x.places, [&](int64_t i, int count) { part += load(plane + i, count); });
        total += sum(part);
      }
      sums[channel] = static_cast<float>(total);
    });
    return;
  }
  constexpr int64_t WIDE = 4 * LANES, HIGH = 64;
  Threads::all().for_each(parts(of_x.channels, WIDE), [&](int64_t task) {
    int64_t first = task * WIDE;
    in_vectors(std::min(WIDE, of_x.channels - first), [&](int64_t i, int count) {
      Vec total = {};
      for (int64_t top = 0; top < of_x.places; top += HIGH) {  // in parts, which rounds less
        Vec part = {};
        for (int64_t row = top; row < std::min(top + HIGH, of_x.places); ++row) {
          part += load(x + row * of_x.channels + first + i, count);
        }
        total += part;
      }
      store(sums + first + i, total, count);
    });
  });
}

// Of a dense layer's weight: dw = dy^T x, (channels of y, channels of x).
void dense_weight(const float *dy, Side of_y, const float *x, Side of_x, float *dw, bool rounds) {
  share_samples(of_x, of_y);
  multiply(of_y.channels, of_x.channels, of_x.samples * of_x.places, of_samples<ROWS>(dy, of_y),
           of_samples<COLUMNS>(x, of_x), Target{dw, of_x.channels}, rounds);
}

// ---- convolutions

// A map of (B, channels, height, width) with zeros around it, and between its values where `spread` is 2, in which
// value (ky, kx) of a weight meets place (y, x) of the answer at (y * stride + ky, x * stride + kx).
class Neighbours {
 public:
  struct Shape {
    int64_t samples, channels, height, width;         // of the map
    int64_t kernel, stride, top, left, spread;
    int64_t out_height, out_width;                    // of the answer
  };
  explicit Neighbours(const float *x, Shape shape) : s_(shape) {
    high_ = (s_.out_height - 1) * s_.stride + s_.kernel, wide_ = (s_.out_width - 1) * s_.stride + s_.kernel;
    values_ = new_array(s_.samples * s_.channels * high_ * wide_);
    Threads::all().for_each(s_.samples * s_.channels, [&](int64_t plane) {
      float *to = values_.get() + plane * high_ * wide_;
      memset(to, 0, sizeof(float) * high_ * wide_);
      for (int64_t y = 0; y < s_.height && y * s_.spread + s_.top < high_; ++y) {
        const float *line = x + (plane * s_.height + y) * s_.width;
        float *row = to + (y * s_.spread + s_.top) * wide_ + s_.left;
        int64_t count = std::min(s_.width, parts(wide_ - s_.left, s_.spread));
        if (s_.spread == 1) memcpy(row, line, sizeof(float) * count);
        else for (int64_t i = 0; i < count; ++i) row[i * s_.spread] = line[i];
      }
    });
  }
  int64_t places() const { return s_.out_height * s_.out_width; }

  // The right factor of a convolution, (weights, places).
  auto by_place() const {
    return [this](float *panel, int64_t j, int64_t count, int64_t k, int64_t depth) {
      int64_t at[COLUMNS], run = COLUMNS;
      for (int i = 0; i < count; ++i) at[i] = of_place(j + i);
      while (run > 1 && !is_in_runs(at, count, run)) run /= 2;
      if (count < COLUMNS) memset(panel, 0, sizeof(float) * COLUMNS * depth);
      for (int64_t i = 0; i < depth; ++i, panel += COLUMNS) {
        const float *from = values_.get() + of_weight(k + i);
        if (run == 2 * LANES) copy<2 * LANES>(panel, from, at);
        else if (run == LANES) copy<LANES>(panel, from, at);
        else if (run == LANES / 2) copy<LANES / 2>(panel, from, at);
        else if (LANES > 4 && run == LANES / 4) copy<LANES / 4>(panel, from, at);
        else for (int64_t column = 0; column < count; ++column) panel[column] = from[at[column]];
      }
    };
  }
  // (places, weights): that of the gradient of its weight
  auto by_weight() const {
    return [this](float *panel, int64_t j, int64_t count, int64_t k, int64_t depth) {
      constexpr int64_t LINE = DEPTH + LANES;  // not a power of two
      float *lines = scratch<2>(COLUMNS * LINE);
      int64_t at[COLUMNS];
      for (int64_t i = 0; i < count; ++i) at[i] = of_weight(j + i);
      in_runs(k, depth, s_.out_width, [&](int64_t, int64_t, int64_t some, int64_t done) {
        const float *from = values_.get() + of_place(k + done);
        for (int64_t i = 0; i < count; ++i) {
          float *line = lines + i * LINE + done;
          if (s_.stride == 1) in_vectors(some, [&](int64_t x, int) { store(line + x, load(from + at[i] + x)); });
          else for (int64_t x = 0; x < some; ++x) line[x] = from[at[i] + x * s_.stride];
        }
      });
      copy_panel<COLUMNS>(panel, lines, LINE, 1, count, depth);
    };
  }

 private:
  int64_t of_place(int64_t place) const {
    int64_t sample = place / places(), y = place % places() / s_.out_width, x = place % s_.out_width;
    return (sample * s_.channels * high_ + y * s_.stride) * wide_ + x * s_.stride;
  }
  int64_t of_weight(int64_t k) const {
    int64_t square = s_.kernel * s_.kernel;
    return (k / square * high_ + k % square / s_.kernel) * wide_ + k % s_.kernel;
  }
  static bool is_in_runs(const int64_t *at, int64_t count, int64_t run) {
    if (count < COLUMNS) return false;
    for (int64_t i = 0; i < COLUMNS; ++i) {
      if (i % run && at[i] != at[i - 1] + 1) return false;
    }
    return true;
  }
  template <int RUN> static void copy(float *panel, const float *from, const int64_t *at) {
    for (int i = 0; i < COLUMNS; i += RUN) memcpy(panel + i, from + at[i], sizeof(float) * RUN);
  }

  Shape s_;
  int64_t high_, wide_;  // of the map with zeros
  Array values_;
};

// ---- attention

// All rows or columns of a factor, copied once for many products.
struct Panels {
  const float *p;
  int64_t depth;
  static int64_t size(int64_t columns, int64_t depth) { return rounded(columns, COLUMNS) * depth; }
  static Panels of(Matrix b, int64_t columns, int64_t depth, float *to) {
    auto copy = columns_of(b);
    for (int64_t j = 0; j < columns; j += COLUMNS) {
      copy(to + j * depth, j, std::min<int64_t>(COLUMNS, columns - j), 0, depth);
    }
    return {to, depth};
  }
  auto columns() const {
    return [*this](float *panel, int64_t j, int64_t, int64_t k, int64_t some) {
      memcpy(panel, p + j * depth + k * COLUMNS, sizeof(float) * COLUMNS * some);
    };
  }
};

// softmax(q k^T / sqrt(d)) v of one head: q, k, v and their gradients are columns of (N, heads * d) matrices.
struct Head {
  const float *q, *k, *v;
  int64_t rows, keys, d, stride;  // stride: heads * d
  float scale;
  bool is_causal;
  float rounding;
  bool rounds = rounding == TO_BFLOAT16;
  // queries at once: their scores stay in the cache
  int64_t step() const { return std::max<int64_t>(ROWS, std::min(rows, (1 << 18) / keys / ROWS * ROWS)); }

  // P of the queries from `top`, (count, keys)
  void probabilities(const Panels &keys_across, int64_t top, int64_t count, float *p) const {
    multiply(count, keys, d, rows_of({q + top * stride, stride, 1}), keys_across.columns(), {p, keys}, rounds);
    if (rounding == TO_FLOAT16) {  // the scores, as they are where they are kept
      in_vectors(count * keys, [&](int64_t j, int some) {
        store(p + j, to_float16(load(p + j, some) * scale) / scale, some);
      });
    }
    for (int64_t i = 0; i < count; ++i) {
      float *row = p + i * keys;
      int64_t seen = is_causal ? std::min(keys, top + i + 1) : keys;
      Vec high = Vec{} - INFINITY;
      in_vectors(seen, [&](int64_t j, int some) {
        Vec s = load(row + j, some);
        for (int lane = some; lane < LANES; ++lane) s[lane] = -INFINITY;
        high = s > high ? s : high;
      });
      float most = high[0];
      for (int lane = 1; lane < LANES; ++lane) most = std::max(most, high[lane]);
      Vec total = {};
      in_vectors(seen, [&](int64_t j, int some) {
        Vec e = exponential((load(row + j, some) - most) * scale);
        store(row + j, e, some);
        total += some < LANES ? masked(e, some) : e;
      });
      float share = 1 / sum(total);
      in_vectors(seen, [&](int64_t j, int some) { store(row + j, load(row + j, some) * share, some); });
      for (int64_t j = seen; j < keys; ++j) row[j] = 0;
    }
  }

  void answer(int64_t first, int64_t end, float *out) const {
    float *space = scratch<3>(Panels::size(keys, d) + Panels::size(d, keys) + step() * keys);
    float *p = space + Panels::size(keys, d) + Panels::size(d, keys);
    Panels across = Panels::of({k, 1, stride}, keys, d, space);
    Panels values = Panels::of({v, stride, 1}, d, keys, space + Panels::size(keys, d));
    for (int64_t top = first; top < end; top += step()) {
      int64_t count = std::min(step(), end - top);
      probabilities(across, top, count, p);
      multiply(count, d, keys, rows_of({p, keys, 1}), values.columns(), {out + top * stride, stride}, rounds);
    }
  }

  // dS = P (dP - sum of P dP) / sqrt(d), with dP = dO v^T; then dq = dS k, dk = dS^T q, dv = P^T dO
  void gradients(const float *dout, float *dq, float *dk, float *dv) const {
    int64_t size = Panels::size(keys, d);
    float *space = scratch<3>(2 * size + Panels::size(d, keys) + 2 * step() * keys);
    Panels across = Panels::of({k, 1, stride}, keys, d, space);
    Panels values = Panels::of({v, 1, stride}, keys, d, space + size);
    Panels down = Panels::of({k, stride, 1}, d, keys, space + 2 * size);
    float *p = space + 2 * size + Panels::size(d, keys), *ds = p + step() * keys;
    for (int64_t top = 0; top < rows; top += step()) {
      int64_t count = std::min(step(), rows - top);
      Matrix of_out{dout + top * stride, stride, 1}, of_q{q + top * stride, stride, 1};
      probabilities(across, top, count, p);
      multiply(count, keys, d, rows_of(of_out), values.columns(), {ds, keys}, rounds);
      for (int64_t i = 0; i < count; ++i) {
        Vec total = {};
        in_vectors(keys, [&](int64_t j, int some) {
          total += load(p + i * keys + j, some) * load(ds + i * keys + j, some);
        });
        float mean = sum(total);
        in_vectors(keys, [&](int64_t j, int some) {
          float *at = ds + i * keys + j;
          store(at, load(p + i * keys + j, some) * (load(at, some) - mean) * scale, some);
        });
      }
      multiply(count, d, keys, rows_of({ds, keys, 1}), down.columns(), {dq + top * stride, stride}, rounds);
      Target to_k{dk, stride}, to_v{dv, stride};
      to_k.adds = to_v.adds = top > 0;
      multiply(keys, d, count, rows_of({ds, 1, keys}), columns_of(of_q), to_k, rounds);
      multiply(keys, d, count, rows_of({p, 1, keys}), columns_of(of_out), to_v, rounds);
    }
  }
};

// f(head, offset of its queries, offset of its keys) for each head of each sample; q, k, v are inputs 0 to 2.
template <class F> void for_heads(const Call &call, int options, F f) {
  int64_t heads = static_cast<int64_t>(call.in(options)[0]), stride = call.size(0, 2);
  int64_t rows = call.size(0, 1), keys = call.size(1, 1), d = stride / heads;
  for_samples(call.size(0, 0) * heads, [&](int64_t task) {
    int64_t at_rows = task / heads * rows * stride + task % heads * d;
    int64_t at_keys = task / heads * keys * stride + task % heads * d;
    Head head{call.in(0) + at_rows, call.in(1) + at_keys, call.in(2) + at_keys, rows, keys, d, stride,
              1 / std::sqrt(static_cast<float>(d)), call.in(options)[1] != 0, call.in(options)[2]};
    f(head, at_rows, at_keys);
  });
}

// ---- norms

struct Moments {
  float mean, scale;  // 1 / sqrt(variance + epsilon)
  static Moments of(const float *x, int64_t size, float epsilon) {
    Vec total = {};
    in_vectors(size, [&](int64_t i, int count) { total += load(x + i, count); });
    float mean = sum(total) / size;
    total = Vec{};
    in_vectors(size, [&](int64_t i, int count) {
      Vec from_mean = load(x + i, count) - mean;
      if (count < LANES) from_mean = masked(from_mean, count);
      total += from_mean * from_mean;
    });
    return {mean, 1 / std::sqrt(sum(total) / size + epsilon)};
  }
};

}  // namespace

#define OPERATOR(name) \
  extern "C" __attribute__((visibility("default"))) int name( \
      int count, void **p, int *dims, int64_t **shapes, const char **, void *, void *)
// To be called before the first operator runs.
extern "C" __attribute__((visibility("default"))) void use_threads(int number) { Threads::wanted() = number; }
extern "C" __attribute__((visibility("default"))) int has_bfloat16() { return HAS_BFLOAT16; }

#define BEGIN Call call{p, dims, shapes}; (void)count

// x, w[, bias], options (x is places, y is places, rounding): y
OPERATOR(Dense) {
  BEGIN;
  int options = count - 2;
  const float *o = call.in(options);
  Side of_x = Side::of(call, 0, o[0] != 0), of_y = Side::of(call, count - 1, o[1] != 0);
  Matrix w{call.in(1), of_x.channels, 1};
  dense(call.in(0), of_x, w, options == 3 ? call.in(2) : nullptr, call.out(count - 1), of_y, o[2] == TO_BFLOAT16);
  round_answers(call, count - 1, count, o[2]);
  return 0;
}

// dy, w, options: dx
OPERATOR(DenseInput) {
  BEGIN;
  const float *o = call.in(2);
  Side of_x = Side::of(call, 3, o[0] != 0), of_y = Side::of(call, 0, o[1] != 0);
  dense(call.in(0), of_y, Matrix{call.in(1), 1, of_x.channels}, nullptr, call.out(3), of_x, o[2] == TO_BFLOAT16);
  round_answers(call, 3, count, o[2]);
  return 0;
}

// dy, x, w, options: dw[, sums of dy: the gradient of the bias]
OPERATOR(DenseWeight) {
  BEGIN;
  const float *o = call.in(3);
  Side of_x = Side::of(call, 1, o[0] != 0), of_y = Side::of(call, 0, o[1] != 0);
  dense_weight(call.in(0), of_y, call.in(1), of_x, call.out(4), o[2] == TO_BFLOAT16);
  if (count > 5) channel_sums(call.in(0), of_y, call.out(5));
  round_answers(call, 4, count, o[2]);
  return 0;
}

namespace {
// Of a convolution of x (input `i`) by w, with options (stride, top, left, rounding), that answers `y`.
Neighbours::Shape shape_of(const Call &call, int i, int w, int options, int y) {
  const float *o = call.in(options);
  return {call.size(i, 0), call.size(i, 1), call.size(i, 2), call.size(i, 3), call.size(w, 2),
          static_cast<int64_t>(o[0]), static_cast<int64_t>(o[1]), static_cast<int64_t>(o[2]), 1,
          call.size(y, 2), call.size(y, 3)};
}

TiledMap tiled(const float *x, const Neighbours::Shape &s) {
  return {x, s.samples, s.channels, s.height, s.width, s.top, s.left, s.out_height, s.out_width};
}

// Whether tiles need less than direct products, which also have less to copy.
bool is_for_tiles(const Neighbours::Shape &s) {
  if (s.kernel != 3 || s.stride != 1 || s.spread != 1 || s.channels < LANES) return false;
  int64_t of_tiles = 16 * rounded(tiled(nullptr, s).tiles(), COLUMNS);
  return 5 * of_tiles < 4 * 9 * rounded(s.samples * s.out_height * s.out_width, COLUMNS);
}

// The answer of `channels` channels; weights are the left factor of a product, (channels, channels of x * K * K).
template <class Weights>
void convolve(const float *x, const Neighbours::Shape &s, int64_t channels, Weights weights, const float *bias,
              float *y, bool rounds) {
  if (is_for_tiles(s)) {
    auto write = [&](int64_t row, int64_t sample, int64_t top, int64_t left, int64_t count, const float *values) {
      float *to = y + ((sample * channels + row) * s.out_height + top) * s.out_width + left;
      float add = bias ? bias[row] : 0;
      for (int64_t i = 0; i < count; ++i) to[i] = values[i] + add;
    };
    convolve_tiles<3>(tiled(x, s), channels, weights, write);
    return;
  }
  Neighbours near(x, s);
  Target target{y, near.places(), near.places(), channels * near.places()};
  target.bias = bias;
  multiply(channels, s.samples * near.places(), s.channels * s.kernel * s.kernel, weights, near.by_place(), target,
           rounds);
}
}  // namespace

// x (B, C, H, W), w (N, C, K, K)[, bias], options (stride, top, left, rounding): y
OPERATOR(Convolution) {
  BEGIN;
  int options = count - 2, y = count - 1;
  Neighbours::Shape shape = shape_of(call, 0, 1, options, y);
  Matrix w{call.in(1), shape.channels * shape.kernel * shape.kernel, 1};
  convolve(call.in(0), shape, call.size(y, 1), rows_of(w), options == 3 ? call.in(2) : nullptr, call.out(y),
           call.in(options)[3] == TO_BFLOAT16);
  round_answers(call, y, count, call.in(options)[3]);
  return 0;
}

// dy, w[, x: for its size], options: dx, a convolution of dy by the weights turned round
OPERATOR(ConvolutionInput) {
  BEGIN;
  int dx = count - 1;
  const float *o = call.in(count - 2), *w = call.in(1);
  int64_t kernel = call.size(1, 2), square = kernel * kernel, channels = call.size(dx, 1), outs = call.size(0, 1);
  Neighbours::Shape shape{call.size(0, 0), outs, call.size(0, 2), call.size(0, 3), kernel, 1,
                          kernel - 1 - static_cast<int64_t>(o[1]), kernel - 1 - static_cast<int64_t>(o[2]),
                          static_cast<int64_t>(o[0]), call.size(dx, 2), call.size(dx, 3)};
  // panels of (outs and places of the weight, channels)
  auto turned = [=](float *to, int64_t i, int64_t count, int64_t k, int64_t deep) {
    for (int64_t end = k + deep; k < end; ++k, to += ROWS) {
      const float *from = w + (k / square * channels + i) * square + square - 1 - k % square;
      for (int64_t row = 0; row < ROWS; ++row) to[row] = row < count ? from[row * square] : 0;
    }
  };
  convolve(call.in(0), shape, channels, turned, nullptr, call.out(dx), o[3] == TO_BFLOAT16);
  round_answers(call, dx, count, o[3]);
  return 0;
}

// dy, x, w, options: dw[, sums of dy: the gradient of the bias]
OPERATOR(ConvolutionWeight) {
  BEGIN;
  Neighbours::Shape shape = shape_of(call, 1, 2, 3, 0);
  Side of_y = Side::of(call, 0, true);
  if (is_for_tiles(shape)) {
    TiledMap answers{call.in(0), shape.samples, of_y.channels, shape.out_height, shape.out_width, 0, 0,
                     shape.out_height, shape.out_width};
    weights_of_tiles(tiled(call.in(1), shape), answers, call.out(4));
  } else {
    Neighbours near(call.in(1), shape);
    int64_t depth = shape.channels * shape.kernel * shape.kernel;
    multiply(of_y.channels, depth, of_y.samples * of_y.places, of_samples<ROWS>(call.in(0), of_y), near.by_weight(),
             Target{call.out(4), depth}, call.in(3)[3] == TO_BFLOAT16);
  }
  if (count > 5) channel_sums(call.in(0), of_y, call.out(5));
  round_answers(call, 4, count, call.in(3)[3]);
  return 0;
}

// x (B, C, H, W), w (N, C, 3, 3), bias, options as above: the convolution of x made twice as large: (B, N, 2H, 2W)
// (sub-pixel convolution, Shi et al. 2016: each of a pixel's four answers is a 2x2 convolution of the small map).
OPERATOR(UpsampledConvolution) {
  BEGIN;
  int64_t channels = call.size(0, 1), height = call.size(0, 2), width = call.size(0, 3), outs = call.size(1, 0);
  // window u of the small map (rows u - 1 and u) makes rows 2u - 1 and 2u of the large one
  static const int of_row[2][3] = {{0, 0, 1}, {0, 1, 1}};  // (row of the answer, row of w): row of the window
  Array sums = new_array(16 * outs * channels);
  Threads::all().for_each(outs, [&](int64_t out) {
    for (int64_t channel = 0; channel < channels; ++channel) {
      const float *w = call.in(1) + (out * channels + channel) * 9;
      for (int phase = 0; phase < 4; ++phase) {
        float *to = sums.get() + ((phase * outs + out) * channels + channel) * 4;
        to[0] = to[1] = to[2] = to[3] = 0;
        for (int y = 0; y < 3; ++y) {
          for (int x = 0; x < 3; ++x) to[2 * of_row[phase / 2][y] + of_row[phase % 2][x]] += w[3 * y + x];
        }
      }
    }
  });
  auto write = [&](int64_t row, int64_t sample, int64_t u, int64_t v, int64_t some, const float *values) {
    int64_t phase = row / outs, out = row % outs, y = 2 * u - 1 + phase / 2, x = 2 * v - 1 + phase % 2;
    if (y < 0 || y >= 2 * height) return;
    float *to = call.out(4) + ((sample * outs + out) * 2 * height + y) * 2 * width, add = call.in(2)[out];
    for (int64_t i = x < 0; i < some && x + 2 * i < 2 * width; ++i) to[x + 2 * i] = values[i] + add;
  };
  TiledMap map{call.in(0), call.size(0, 0), channels, height, width, 1, 1, height + 1, width + 1};
  convolve_tiles<2>(map, 4 * outs, rows_of({sums.get(), 4 * channels, 1}), write);
  round_answers(call, 4, count, call.in(3)[3]);
  return 0;
}

// q (B, N, heads * d), k, v (B, M, heads * d), options (heads, causal, rounding): (B, N, heads * d)
OPERATOR(Attention) {
  BEGIN;
  for_heads(call, 3, [&](const Head &head, int64_t at, int64_t) {
    // one of few heads by all threads, some queries each
    int64_t shares = std::min<int64_t>(Threads::all().count(), parts(head.rows, head.step()));
    int64_t share = rounded(parts(head.rows, shares), ROWS);
    Threads::all().for_each(parts(head.rows, share), [&](int64_t task) {
      head.answer(task * share, std::min(head.rows, (task + 1) * share), call.out(4) + at);
    });
  });
  round_answers(call, 4, count, call.in(3)[2]);
  return 0;
}

// q, k, v, dout, options: dq, dk, dv
OPERATOR(AttentionGradient) {
  BEGIN;
  for_heads(call, 4, [&](const Head &head, int64_t at, int64_t at_keys) {
    head.gradients(call.in(3) + at, call.out(5) + at, call.out(6) + at_keys, call.out(7) + at_keys);
  });
  round_answers(call, 5, count, call.in(4)[2]);
  return 0;
}

// x (B, C, ...), gamma, beta, options (groups, SiLU, epsilon): y
OPERATOR(GroupNorm) {
  BEGIN;
  int64_t channels = call.size(0, 1), groups = static_cast<int64_t>(call.in(3)[0]), own = channels / groups;
  int64_t places = call.size(0) / call.size(0, 0) / channels;
  bool has_silu = call.in(3)[1] != 0;
  Threads::all().for_each(call.size(0, 0) * groups, [&](int64_t task) {
    const float *x = call.in(0) + task * own * places;
    float *y = call.out(4) + task * own * places;
    Moments moments = Moments::of(x, own * places, call.in(3)[2]);
    for (int64_t c = 0; c < own; ++c) {
      float a = call.in(1)[task % groups * own + c] * moments.scale;
      float b = call.in(2)[task % groups * own + c] - a * moments.mean;
      in_vectors(places, [&](int64_t i, int some) {
        Vec v = load(x + c * places + i, some) * a + b;
        store(y + c * places + i, has_silu ? v * logistic(v) : v, some);
      });
    }
  });
  return 0;
}

// dy, x, gamma, beta, options: dx, dgamma, dbeta
OPERATOR(GroupNormGradient) {
  BEGIN;
  int64_t samples = call.size(1, 0), channels = call.size(1, 1), groups = static_cast<int64_t>(call.in(4)[0]);
  int64_t own = channels / groups, places = call.size(1) / samples / channels;
  bool has_silu = call.in(4)[1] != 0;
  Array of_samples = new_array(2 * samples * channels);
  Threads::all().for_each(samples * groups, [&](int64_t task) {
    const float *x = call.in(1) + task * own * places, *dy = call.in(0) + task * own * places;
    const float *gammas = call.in(2) + task % groups * own, *betas = call.in(3) + task % groups * own;
    float *dx = call.out(5) + task * own * places, *sums = of_samples.get() + 2 * task * own;
    Moments moments = Moments::of(x, own * places, call.in(4)[2]);
    float total = 0, with_x = 0;
    for (int64_t c = 0; c < own; ++c) {
      Vec of_beta = {}, of_gamma = {};
      in_vectors(places, [&](int64_t i, int some) {
        Vec v = (load(x + c * places + i, some) - moments.mean) * moments.scale, d = load(dy + c * places + i, some);
        if (has_silu) {
          Vec y = v * gammas[c] + betas[c], s = logistic(y);
          d = d * s * (1.0f + y * (1.0f - s));
        }
        store(dx + c * places + i, d, some);
        of_beta += d, of_gamma += d * v;  // d is 0 beyond the end
      });
      sums[2 * c] = sum(of_beta), sums[2 * c + 1] = sum(of_gamma);
      total += gammas[c] * sums[2 * c], with_x += gammas[c] * sums[2 * c + 1];
    }
    total /= own * places, with_x /= own * places;
    for (int64_t c = 0; c < own; ++c) {
      in_vectors(places, [&](int64_t i, int some) {
        Vec v = (load(x + c * places + i, some) - moments.mean) * moments.scale, d = load(dx + c * places + i, some);
        store(dx + c * places + i, (d * gammas[c] - total - v * with_x) * moments.scale, some);
      });
    }
  });
  for (int64_t c = 0; c < channels; ++c) {
    float beta = 0, gamma = 0;
    for (int64_t sample = 0; sample < samples; ++sample) {
      const float *sums = of_samples.get() + 2 * (sample * channels + c);
      beta += sums[0], gamma += sums[1];
    }
    call.out(6)[c] = gamma, call.out(7)[c] = beta;
  }
  return 0;
}

// x (..., C), gamma, beta, options (epsilon): y
OPERATOR(LayerNorm) {
  BEGIN;
  int64_t channels = call.size(0, -1), rows = call.size(0) / channels, share = std::max<int64_t>(1, PIECE / channels);
  Threads::all().for_each(parts(rows, share), [&](int64_t task) {
    for (int64_t row = task * share; row < std::min(rows, (task + 1) * share); ++row) {
      const float *x = call.in(0) + row * channels;
      Moments moments = Moments::of(x, channels, call.in(3)[0]);
      in_vectors(channels, [&](int64_t i, int some) {
        Vec v = (load(x + i, some) - moments.mean) * moments.scale;
        store(call.out(4) + row * channels + i, v * load(call.in(1) + i, some) + load(call.in(2) + i, some), some);
      });
    }
  });
  return 0;
}

// dy, x, gamma, beta, options: dx, dgamma, dbeta
OPERATOR(LayerNormGradient) {
  BEGIN;
  int64_t channels = call.size(1, -1), rows = call.size(1) / channels;
  int64_t share = std::max<int64_t>(1, parts(rows, 32)), shares = parts(rows, share);  // whatever the threads
  Array of_shares = new_array(2 * shares * channels);
  Threads::all().for_each(shares, [&](int64_t task) {
    float *of_gamma = of_shares.get() + 2 * task * channels, *of_beta = of_gamma + channels;
    std::fill(of_gamma, of_gamma + 2 * channels, 0.0f);
    for (int64_t row = task * share; row < std::min(rows, (task + 1) * share); ++row) {
      const float *x = call.in(1) + row * channels, *dy = call.in(0) + row * channels;
      float *dx = call.out(5) + row * channels;
      Moments moments = Moments::of(x, channels, call.in(4)[0]);
      Vec total = {}, with_x = {};
      in_vectors(channels, [&](int64_t i, int some) {
        Vec v = (load(x + i, some) - moments.mean) * moments.scale, d = load(dy + i, some);
        store(of_gamma + i, load(of_gamma + i, some) + d * v, some);
        store(of_beta + i, load(of_beta + i, some) + d, some);
        d *= load(call.in(2) + i, some);
        total += d, with_x += d * v;
      });
      float mean = sum(total) / channels, slope = sum(with_x) / channels;
      in_vectors(channels, [&](int64_t i, int some) {
        Vec v = (load(x + i, some) - moments.mean) * moments.scale;
        Vec d = load(dy + i, some) * load(call.in(2) + i, some);
        store(dx + i, (d - mean - v * slope) * moments.scale, some);
      });
    }
  });
  for (int64_t i = 0; i < 2 * channels; ++i) {
    float total = 0;
    for (int64_t task = 0; task < shares; ++task) total += of_shares.get()[2 * task * channels + i];
    (i < channels ? call.out(6) : call.out(7) - channels)[i] = total;
  }
  return 0;
}

// x: x times the normal distribution function at x
OPERATOR(Gelu) {
  BEGIN;
  for_values(call.size(0), [&](int64_t i, int some) {
    Vec x = load(call.in(0) + i, some);
    store(call.out(1) + i, x * normal_cdf(x), some);
  });
  return 0;
}

// dy, x: dx
OPERATOR(GeluGradient) {
  BEGIN;
  for_values(call.size(1), [&](int64_t i, int some) {
    Vec x = load(call.in(1) + i, some);
    store(call.out(2) + i, load(call.in(0) + i, some) * (normal_cdf(x) + x * normal_density(x)), some);
  });
  return 0;
}

// x (..., 2 n): (..., n), the first half times the GELU of the second
OPERATOR(GatedGelu) {
  BEGIN;
  int64_t n = call.size(1, -1), rows = call.size(1) / n;
  Threads::all().for_each(rows, [&](int64_t row) {
    const float *x = call.in(0) + 2 * row * n;
    in_vectors(n, [&](int64_t i, int some) {
      Vec gate = load(x + n + i, some);
      store(call.out(1) + row * n + i, load(x + i, some) * gate * normal_cdf(gate), some);
    });
  });
  return 0;
}

// dy (..., n), x (..., 2 n): dx
OPERATOR(GatedGeluGradient) {
  BEGIN;
  int64_t n = call.size(0, -1), rows = call.size(0) / n;
  Threads::all().for_each(rows, [&](int64_t row) {
    const float *x = call.in(1) + 2 * row * n, *dy = call.in(0) + row * n;
    float *dx = call.out(2) + 2 * row * n;
    in_vectors(n, [&](int64_t i, int some) {
      Vec value = load(x + i, some), gate = load(x + n + i, some), d = load(dy + i, some), cdf = normal_cdf(gate);
      store(dx + i, d * gate * cdf, some);
      store(dx + n + i, d * value * (cdf + gate * normal_density(gate)), some);
    });
  });
  return 0;
}

// Any number of arrays: (1,), the sum of the squares of all their values
OPERATOR(SquareSum) {
  BEGIN;
  std::vector<double> sums(count - 1, 0);
  for (int array = 0; array < count - 1; ++array) {
    int64_t size = call.size(array), pieces = parts(size, PIECE);
    std::vector<double> of_pieces(pieces);
    Threads::all().for_each(pieces, [&](int64_t piece) {
      const float *x = call.in(array) + piece * PIECE;
      Vec total = {};
      in_vectors(std::min(PIECE, size - piece * PIECE), [&](int64_t i, int some) {
        Vec v = load(x + i, some);
        total += v * v;
      });
      of_pieces[piece] = sum(total);
    });
    for (double value : of_pieces) sums[array] += value;
  }
  double total = 0;
  for (double value : sums) total += value;
  call.out(count - 1)[0] = static_cast<float>(total);
  return 0;
}

// Adam in place (Kingma & Ba 2015), of n arrays: all weights, all first and second moments, all gradients, then
// the gradients' factor, rate and epsilon, in which the bias correction is, decay, and options (beta1, beta2, factor
// of the weights that is added to the gradient, then of each array, whether weights decay): (1,), nothing.
OPERATOR(AdamW) {
  BEGIN;
  const int n = (count - 6) / 4;
  const float factor = *call.in(4 * n), rate = *call.in(4 * n + 1), epsilon = *call.in(4 * n + 2);
  const float decay = *call.in(4 * n + 3), *o = call.in(4 * n + 4);
  std::vector<std::pair<int, int64_t>> pieces;  // array, start
  for (int array = 0; array < n; ++array) {
    for (int64_t start = 0; start < call.size(array); start += PIECE) pieces.push_back({array, start});
  }
  Threads::all().for_each(pieces.size(), [&](int64_t task) {
    auto [array, start] = pieces[task];
    float *w = call.out(array) + start, *m = call.out(n + array) + start, *v = call.out(2 * n + array) + start;
    const float *gradient = call.in(3 * n + array) + start;
    float kept = o[3 + array] ? 1 - decay : 1, added = o[3 + array] ? o[2] : 0;
    in_vectors(std::min(PIECE, call.size(array) - start), [&](int64_t i, int some) {
      Vec weight = load(w + i, some), g = load(gradient + i, some) * factor + weight * added;
      Vec first = load(m + i, some), second = load(v + i, some), root;
      first += (g - first) * (1 - o[0]), second += (g * g - second) * (1 - o[1]);
      for (int lane = 0; lane < LANES; ++lane) root[lane] = std::sqrt(second[lane]);
      store(m + i, first, some), store(v + i, second, some);
      store(w + i, weight * kept - first * rate / (root + epsilon), some);
    });
  });
  *call.out(count - 1) = 0;
  return 0;
}
