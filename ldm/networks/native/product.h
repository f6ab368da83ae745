// Matrix products: panels of both factors are copied side by side, as a small kernel in registers reads them
// (Goto & van de Geijn 2008; Van Zee & van de Geijn 2015). Whoever copies a panel decides what the factor is:
// a matrix, a transposed one, or the neighbourhoods of an image, which are then written down nowhere.
#pragma once
#include <cstring>
#include <utility>
#include <vector>

#include "parallel.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12;
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 6;
#else
constexpr int LANES = 4, ROWS = 6;
#endif
constexpr int COLUMNS = 2 * LANES;                   // ROWS x COLUMNS sums stay in registers
constexpr int DEPTH = 288;                           // of panels; a multiple of 9 and of LANES
constexpr int64_t SMALL = 1 << 18;                   // products of two numbers
constexpr int TILE_ROWS = 40 * ROWS, TILE_COLUMNS = 16 * COLUMNS;

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

inline Vec load(const float *p) { return *reinterpret_cast<const Unaligned *>(p); }
inline void store(float *p, Vec v) { *reinterpret_cast<Unaligned *>(p) = v; }
inline int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
inline int64_t rounded(int64_t whole, int64_t part) { return parts(whole, part) * part; }

// Values of two vectors at PLACE(0), PLACE(1), ... of both, one after the other.
template <int (*PLACE)(int), size_t... I> inline Vec picked(Vec a, Vec b, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, PLACE(I)...);
#else
  return __builtin_shuffle(a, b, Ints{PLACE(I)...});
#endif
}
template <int (*PLACE)(int)> inline Vec picked(Vec a, Vec b) {
  return picked<PLACE>(a, b, std::make_index_sequence<LANES>());
}
constexpr int even(int i) { return 2 * i; }
constexpr int odd(int i) { return 2 * i + 1; }
constexpr int low(int i) { return i / 2 + i % 2 * LANES; }  // of both in turn
constexpr int high(int i) { return low(i) + LANES / 2; }

// LANES x LANES values, in log2(LANES) perfect shuffles.
inline void transpose(Vec *rows) {
  Vec next[LANES];
  for (int step = 1; step < LANES; step *= 2) {
    for (int i = 0; i < LANES / 2; ++i) {
      next[2 * i] = picked<low>(rows[i], rows[i + LANES / 2]);
      next[2 * i + 1] = picked<high>(rows[i], rows[i + LANES / 2]);
    }
    for (int i = 0; i < LANES; ++i) rows[i] = next[i];
  }
}

// panel[k * WIDTH + i] = p[i * across + k * along], zero for i >= count.
template <int WIDTH>
void copy_panel(float *panel, const float *p, int64_t across, int64_t along, int64_t count, int64_t depth) {
  constexpr int STEP = WIDTH < LANES ? WIDTH : LANES;
  if (count < WIDTH) memset(panel, 0, sizeof(float) * WIDTH * depth);
  if (across == 1) {
    if (count == WIDTH) {
      for (int64_t k = 0; k < depth; ++k) memcpy(panel + k * WIDTH, p + k * along, sizeof(float) * WIDTH);
    } else {
      for (int64_t k = 0; k < depth; ++k) memcpy(panel + k * WIDTH, p + k * along, sizeof(float) * count);
    }
    return;
  }
  int64_t i = 0;
  if (along == 1) {
    for (; i + STEP <= count; i += STEP) {
      int64_t k = 0;
      for (; k + LANES <= depth; k += LANES) {
        Vec block[LANES];
        for (int j = 0; j < LANES; ++j) block[j] = j < STEP ? load(p + (i + j) * across + k) : Vec{};
        transpose(block);
        for (int j = 0; j < LANES; ++j) memcpy(panel + (k + j) * WIDTH + i, &block[j], sizeof(float) * STEP);
      }
      for (; k < depth; ++k) {
        for (int j = 0; j < STEP; ++j) panel[k * WIDTH + i + j] = p[(i + j) * across + k];
      }
    }
  }
  for (; i < count; ++i) {
    for (int64_t k = 0; k < depth; ++k) panel[k * WIDTH + i] = p[i * across + k * along];
  }
}

// ROWS x COLUMNS sums over the depth of two panels, on top of what is there where `adds`.
inline void multiply_panels(int64_t depth, const float *a, const float *b, float *c, int64_t stride, bool adds) {
  Vec sums[ROWS][2];
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i) {
    sums[i][0] = adds ? load(c + i * stride) : Vec{};
    sums[i][1] = adds ? load(c + i * stride + LANES) : Vec{};
  }
  for (int64_t k = 0; k < depth; ++k, a += ROWS, b += COLUMNS) {
    Vec left = load(b), right = load(b + LANES);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i) sums[i][0] += a[i] * left, sums[i][1] += a[i] * right;
  }
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i) store(c + i * stride, sums[i][0]), store(c + i * stride + LANES, sums[i][1]);
}

#if defined(__AVX512BF16__)
constexpr bool HAS_BFLOAT16 = true;

// A panel of float32 in place as pairs of bfloat16 (two values of k in 32 bits), rounded to nearest even.
template <int WIDTH> void to_pairs(float *panel, int64_t depth) {
  uint32_t *bits = reinterpret_cast<uint32_t *>(panel);
  if (depth % 2) memset(panel + depth * WIDTH, 0, sizeof(float) * WIDTH);
  for (int64_t k = 0; k < depth; k += 2) {
    uint32_t *even = bits + k * WIDTH, *odd = even + WIDTH, *pair = bits + k / 2 * WIDTH;
#pragma GCC ivdep
    for (int i = 0; i < WIDTH; ++i) {
      uint32_t low = (even[i] + 0x7fff + (even[i] >> 16 & 1)) >> 16;
      pair[i] = low | ((odd[i] + 0x7fff + (odd[i] >> 16 & 1)) & 0xffff0000u);
    }
  }
}

inline void multiply_pairs(int64_t depth, const float *a, const float *b, float *c, int64_t stride, bool adds) {
  __m512 sums[ROWS][2];
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i) {
    sums[i][0] = adds ? _mm512_loadu_ps(c + i * stride) : _mm512_setzero_ps();
    sums[i][1] = adds ? _mm512_loadu_ps(c + i * stride + LANES) : _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < depth; k += 2, a += ROWS, b += COLUMNS) {
    __m512bh left = (__m512bh)_mm512_loadu_ps(b), right = (__m512bh)_mm512_loadu_ps(b + LANES);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i) {
      __m512bh value = (__m512bh)_mm512_set1_ps(a[i]);
      sums[i][0] = _mm512_dpbf16_ps(sums[i][0], value, left);
      sums[i][1] = _mm512_dpbf16_ps(sums[i][1], value, right);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i) {
    _mm512_storeu_ps(c + i * stride, sums[i][0]);
    _mm512_storeu_ps(c + i * stride + LANES, sums[i][1]);
  }
}
#else
constexpr bool HAS_BFLOAT16 = false;
template <int WIDTH> void to_pairs(float *, int64_t) {}
inline void multiply_pairs(int64_t, const float *, const float *, float *, int64_t, bool) {}
#endif

// work(0) to work(tasks - 1), by all threads unless it is done before another has woken up.
template <class F> inline void for_tasks(bool is_small, int64_t tasks, F work) {
  if (!is_small) return Threads::all().for_each(tasks, work);
  for (int64_t task = 0; task < tasks; ++task) work(task);
}

// f(group, place in it, how many, how many came before) for each group of `size` that has some of `count` from start.
template <class F> inline void in_runs(int64_t start, int64_t count, int64_t size, F f) {
  for (int64_t done = 0; done < count;) {
    int64_t group = (start + done) / size, place = (start + done) % size;
    int64_t some = std::min(count - done, size - place);
    f(group, place, some, done);
    done += some;
  }
}

// A matrix in memory: value (i, j) is p[i * down + j * across].
struct Matrix {
  const float *p;
  int64_t down, across;
  Matrix transposed() const { return {p, across, down}; }
};

// Rows of a left factor, and columns of a right one.
inline auto rows_of(Matrix a) {
  return [a](float *panel, int64_t i, int64_t count, int64_t k, int64_t depth) {
    copy_panel<ROWS>(panel, a.p + i * a.down + k * a.across, a.down, a.across, count, depth);
  };
}
inline auto columns_of(Matrix b) {
  return [b](float *panel, int64_t j, int64_t count, int64_t k, int64_t depth) {
    copy_panel<COLUMNS>(panel, b.p + k * b.down + j * b.across, b.across, b.down, count, depth);
  };
}

// Where a product is written: column j, of which every `columns` are in one block, as the places of a sample.
struct Target {
  float *p;
  int64_t stride, columns = INT64_MAX, block = 0;
  bool adds = false;              // to what is there
  const float *bias = nullptr;    // of each row, or of each column
  bool bias_of_columns = false;
  float *at(int64_t i, int64_t j) const { return p + i * stride + j / columns * block + j % columns; }
};

// rows x columns = left x right over `depth`, float32 sums; factors as float32 or rounded to bfloat16.
// left(panel, i, count, k, depth) copies a panel of rows, right(panel, j, count, k, depth) one of columns.
template <class Left, class Right>
void multiply(int64_t rows, int64_t columns, int64_t depth, Left left, Right right, Target target, bool rounds) {
  int64_t tile_rows = TILE_ROWS, tile_columns = TILE_COLUMNS, wanted = 2 * Threads::all().count();
  // smaller tiles where there would be too few for all threads
  while (parts(rows, tile_rows) * parts(columns, tile_columns) < wanted) {
    if (tile_columns > 2 * COLUMNS && columns > tile_columns / 2) tile_columns /= 2;
    else if (tile_rows > 2 * ROWS) tile_rows = rounded(tile_rows / 2, ROWS);
    else if (tile_columns > 2 * COLUMNS) tile_columns /= 2;
    else break;
  }
  int64_t down = parts(rows, tile_rows), across = parts(columns, tile_columns);
  tile_rows = rounded(parts(rows, down), ROWS), tile_columns = rounded(parts(columns, across), COLUMNS);
  rounds = rounds && HAS_BFLOAT16;
  auto multiply_tile = [&](int64_t task) {
    int64_t top = task / across * tile_rows, first = task % across * tile_columns;
    int64_t bottom = std::min(rows, top + tile_rows), end = std::min(columns, first + tile_columns);
    // a row more: pairs of an odd depth
    float *lefts = scratch<0>((tile_rows + ROWS) * (DEPTH + 1) + LANES);
    float *rights = scratch<1>(COLUMNS * (DEPTH + 1) + LANES);
    for (int64_t k = 0; k < depth; k += DEPTH) {
      int64_t deep = std::min<int64_t>(DEPTH, depth - k), packed = rounds ? deep + deep % 2 : deep;
      for (int64_t i = top; i < bottom; i += ROWS) {
        float *panel = lefts + (i - top) * packed;
        left(panel, i, std::min<int64_t>(ROWS, bottom - i), k, deep);
        if (rounds) to_pairs<ROWS>(panel, deep);
      }
      for (int64_t j = first; j < end; j += COLUMNS) {
        int64_t wide = std::min<int64_t>(COLUMNS, end - j);
        right(rights, j, wide, k, deep);
        if (rounds) to_pairs<COLUMNS>(rights, deep);
        bool in_one = wide == COLUMNS && j % target.columns + COLUMNS <= target.columns;
        for (int64_t i = top; i < bottom; i += ROWS) {
          const float *panel = lefts + (i - top) * packed;
          int64_t high = std::min<int64_t>(ROWS, bottom - i);
          bool is_whole = in_one && high == ROWS, adds = k > 0 || target.adds;
          alignas(64) float tile[ROWS * COLUMNS];
          float *c = is_whole ? target.at(i, j) : tile;
          int64_t stride = is_whole ? target.stride : COLUMNS;
          if (!is_whole && adds) {
            for (int64_t y = 0; y < high; ++y) {
              for (int64_t x = 0; x < wide; ++x) tile[y * COLUMNS + x] = *target.at(i + y, j + x);
            }
          } else if (target.bias && !adds) {
            for (int64_t y = 0; y < high; ++y) {
              for (int64_t x = 0; x < wide; ++x) {
                c[y * stride + x] = target.bias[target.bias_of_columns ? j + x : i + y];
              }
            }
          }
          (rounds ? multiply_pairs : multiply_panels)(deep, panel, rights, c, stride, adds || target.bias);
          if (!is_whole) {
            for (int64_t y = 0; y < high; ++y) {
              for (int64_t x = 0; x < wide; ++x) *target.at(i + y, j + x) = tile[y * COLUMNS + x];
            }
          }
        }
      }
    }
  };
  for_tasks(rows * columns * depth < SMALL, down * across, multiply_tile);
}
