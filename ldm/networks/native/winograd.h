// Convolutions of stride 1 with fewer products (Winograd's minimal filtering, F(2x2, RxR), Lavin & Gray 2015): a map
// is cut into overlapping tiles of (R + 1) x (R + 1) values that make 2 x 2 of the answer, and for each value of the
// transformed tiles there is a matrix product over the channels: 16 numbers are multiplied instead of 36 for R = 3,
// and 9 instead of 16 for R = 2. The transforms only add and halve: as exact as a direct convolution.
#pragma once
#include "product.h"

// A map of (samples, channels, height, width), seen with zeros around it from (-top, -left) on, and its answer.
struct TiledMap {
  const float *x;
  int64_t samples, channels, height, width, top, left, out_height, out_width;
  int64_t across() const { return parts(out_width, 2); }
  int64_t down() const { return parts(out_height, 2); }
  int64_t tiles() const { return samples * down() * across(); }
};

// f(sample, y, x of the answer, how many tiles in this line, how many came before)
template <class F> inline void in_lines(const TiledMap &map, int64_t start, int64_t count, F f) {
  in_runs(start, count, map.across(), [&](int64_t line, int64_t column, int64_t some, int64_t done) {
    f(line / map.down(), 2 * (line % map.down()), 2 * column, some, done);
  });
}

// The transforms of one line of values: B^T of the input, A^T of the sums, G of the weights, and A and G^T, which
// are those of the gradient of the weights.
template <int R> struct Transform;
template <> struct Transform<3> {
  static void input(const Vec *d, Vec *to) {
    to[0] = d[0] - d[2], to[1] = d[1] + d[2], to[2] = d[2] - d[1], to[3] = d[1] - d[3];
  }
  static void answer(const Vec *m, Vec *to) { to[0] = m[0] + m[1] + m[2], to[1] = m[1] - m[2] - m[3]; }
  static void weight(const Vec *g, Vec *to) {
    Vec half = (g[0] + g[2]) * 0.5f, middle = g[1] * 0.5f;
    to[0] = g[0], to[1] = half + middle, to[2] = half - middle, to[3] = g[2];
  }
  static void of_answer(const Vec *d, Vec *to) {
    to[0] = d[0], to[1] = d[0] + d[1], to[2] = d[0] - d[1], to[3] = -d[1];
  }
  static void of_weight(const Vec *u, Vec *to) {
    Vec half = (u[1] + u[2]) * 0.5f;
    to[0] = u[0] + half, to[1] = (u[1] - u[2]) * 0.5f, to[2] = half + u[3];
  }
};
template <> struct Transform<2> {
  static void input(const Vec *d, Vec *to) { to[0] = d[0] - d[1], to[1] = d[1], to[2] = d[1] - d[2]; }
  static void answer(const Vec *m, Vec *to) { to[0] = m[0] + m[1], to[1] = m[1] - m[2]; }
  static void weight(const Vec *g, Vec *to) { to[0] = g[0], to[1] = g[0] + g[1], to[2] = g[1]; }
};

// to[i * M + j] = f along the lines, then along the columns, of from[r * N + c].
template <int N, int M, class F> inline __attribute__((always_inline)) void both_ways(const Vec *from, Vec *to, F f) {
  Vec lines[N * M], column[N], answers[M];
  for (int r = 0; r < N; ++r) f(from + r * N, lines + r * M);
  for (int j = 0; j < M; ++j) {
    for (int r = 0; r < N; ++r) column[r] = lines[r * M + j];
    f(column, answers);
    for (int i = 0; i < M; ++i) to[i * M + j] = answers[i];
  }
}

// The same for COLUMNS tiles, whose values are so far apart.
template <int N, int M, class F>
inline void transform(const float *from, int64_t from_stride, float *to, int64_t to_stride, F f) {
  for (int lane = 0; lane < COLUMNS; lane += LANES) {
    Vec before[N * N], after[M * M];
    for (int i = 0; i < N * N; ++i) before[i] = load(from + i * from_stride + lane);
    both_ways<N, M>(before, after, f);
    for (int i = 0; i < M * M; ++i) store(to + i * to_stride + lane, after[i]);
  }
}

constexpr int64_t BAND = 2 << 20, MOST_DEEP = 96, TILE = ROWS * COLUMNS;  // BAND: values that stay in the cache
constexpr int PATCH = COLUMNS + LANES;  // the last vector of a line ends behind the panel

// patch[(r * N + c) * PATCH + t]: value (r, c) of tile start + t of a plane of the map, zero for t >= count.
template <int N>
inline void load_tiles(const TiledMap &map, int64_t channel, int64_t start, int64_t count, float *patch) {
  float line[2 * PATCH + 2 * LANES] = {};
  in_lines(map, start, count, [&](int64_t sample, int64_t y, int64_t x, int64_t some, int64_t done) {
    const float *plane = map.x + (sample * map.channels + channel) * map.height * map.width;
    int64_t first = x - map.left, wide = 2 * some + N - 2;
    int64_t begin = std::min(wide, std::max<int64_t>(0, -first)), end = std::min(wide, map.width - first);
    for (int r = 0; r < N; ++r) {
      int64_t row = y - map.top + r;
      bool is_inside = row >= 0 && row < map.height && end > begin;
      int64_t from = is_inside ? begin : wide, to = is_inside ? end : wide;
      for (int64_t i = 0; i < from; ++i) line[i] = 0;
      if (is_inside) memcpy(line + from, plane + row * map.width + first + from, sizeof(float) * (to - from));
      for (int64_t i = to; i < wide; ++i) line[i] = 0;
      for (int64_t i = 0; i < some; i += LANES) {
        float *at = patch + r * N * PATCH + done + i;
        for (int c = 0; c < N; c += 2) {
          Vec left = load(line + 2 * i + c), right = load(line + 2 * i + c + LANES);
          store(at + c * PATCH, picked<even>(left, right));
          if (c + 1 < N) store(at + (c + 1) * PATCH, picked<odd>(left, right));
        }
      }
    }
  });
  if (count < COLUMNS) {
    for (int i = 0; i < N * N; ++i) memset(patch + i * PATCH + count, 0, sizeof(float) * (COLUMNS - count));
  }
}

// Some panels of rows by some of columns: sums, (columns, rows, ALL, ROWS, COLUMNS), over the depth of both.
// Panels of a value of the tiles are so far from those of the next.
template <int ALL>
inline void multiply_tiles(int64_t depth, const float *lefts, int64_t left_stride, int64_t rows, const float *rights,
                           int64_t right_stride, int64_t columns, float *sums, bool adds) {
  for (int64_t j = 0; j < columns; ++j) {
    for (int t = 0; t < ALL; ++t) {
      for (int64_t i = 0; i < rows; ++i) {
        multiply_panels(depth, lefts + (i * ALL + t) * left_stride, rights + (j * ALL + t) * right_stride,
                        sums + ((j * rows + i) * ALL + t) * TILE, COLUMNS, adds);
      }
    }
  }
}

// Of all rows and columns, in panels, those of a task.
struct Share {
  int64_t top, high, left, wide;
  static int64_t count(int64_t rows, int64_t high, int64_t columns, int64_t wide) {
    return parts(rows, high) * parts(columns, wide);
  }
  static Share of(int64_t task, int64_t rows, int64_t high, int64_t columns, int64_t wide) {
    int64_t top = task / parts(columns, wide) * high, left = task % parts(columns, wide) * wide;
    return {top, std::min(high, rows - top), left, std::min(wide, columns - left)};
  }
};

// A convolution with R x R weights as `rows` channels of its answer.
// weights(to, i, count, k, depth) copies a panel of the left factor of a product: (rows, channels * R * R);
// write(row, sample, y, x, count, values) gets some of a line of the answer.
template <int R, class Weights, class Write> class TiledConvolution {
 public:
  TiledConvolution(const TiledMap &map, int64_t rows, Weights weights, Write write)
      : map_(map), rows_(rows), weights_(weights), write_(write) {}

  void run() const {
    int64_t depth = map_.channels, panels = parts(map_.tiles(), COLUMNS), row_panels = parts(rows_, ROWS);
    int64_t band = parts(panels, parts(panels * ALL * depth * COLUMNS, BAND));
    bool is_small = ALL * COLUMNS * panels * depth * rows_ < SMALL;
    Array inputs = new_array(band * ALL * depth * COLUMNS);
    for (int64_t first = 0; first < panels; first += band) {
      int64_t some = std::min(band, panels - first), share = parts(depth, parts(depth, 64));
      for_tasks(is_small, some * parts(depth, share), [&](int64_t task) {
        int64_t panel = task / parts(depth, share), k = task % parts(depth, share) * share;
        float *to = inputs.get() + panel * ALL * depth * COLUMNS;
        copy_inputs((first + panel) * COLUMNS, k, std::min(depth, k + share), to);
      });
      // few panels a task, but where their weights are used again and again
      int64_t down = parts(row_panels, 8), across = parts(some, 12), wanted = 4 * Threads::all().count();
      while (down * across < wanted && across < some / 4) ++across;
      while (down * across < wanted && down < row_panels / 2) ++down;
      int64_t high = parts(row_panels, down), wide = parts(some, across);
      for_tasks(is_small, Share::count(row_panels, high, some, wide), [&](int64_t task) {
        answer(Share::of(task, row_panels, high, some, wide), first, inputs.get());
      });
    }
  }

 private:
  static constexpr int N = R + 1, ALL = N * N;

  // (ALL, depth, COLUMNS) of a panel of tiles, channels k to end
  void copy_inputs(int64_t start, int64_t k, int64_t end, float *to) const {
    alignas(64) float patch[ALL * PATCH];
    for (; k < end; ++k) {
      load_tiles<N>(map_, k, start, std::min<int64_t>(COLUMNS, map_.tiles() - start), patch);
      transform<N, N>(patch, PATCH, to + k * COLUMNS, map_.channels * COLUMNS, Transform<R>::input);
    }
  }

  // (ALL, depth, ROWS) of a panel of rows, channels from k on
  void copy_weights(int64_t panel, int64_t k, int64_t depth, float *to) const {
    float *given = scratch<1>((depth + 1) * R * R * ROWS + LANES);
    weights_(given, panel * ROWS, std::min<int64_t>(ROWS, rows_ - panel * ROWS), k * R * R, depth * R * R);
    for (int64_t n = 0; n < depth; ++n) {
      for (int lane = 0; lane < ROWS; lane += LANES) {
        Vec g[R * R], u[ALL];
        for (int t = 0; t < R * R; ++t) g[t] = load(given + (n * R * R + t) * ROWS + lane);
        both_ways<R, N>(g, u, Transform<R>::weight);
        for (int t = 0; t < ALL; ++t) {
          memcpy(to + (t * depth + n) * ROWS + lane, &u[t], sizeof(float) * std::min(LANES, ROWS - lane));
        }
      }
    }
  }

  void answer(Share share, int64_t first, const float *inputs) const {
    int64_t depth = map_.channels, deep = parts(depth, parts(depth, MOST_DEEP));
    float *lefts = scratch<0>(share.high * ALL * deep * ROWS), *sums = scratch<2>(share.high * share.wide * ALL * TILE);
    for (int64_t k = 0; k < depth; k += deep) {
      int64_t count = std::min(deep, depth - k);
      for (int64_t i = 0; i < share.high; ++i) copy_weights(share.top + i, k, count, lefts + i * ALL * count * ROWS);
      multiply_tiles<ALL>(count, lefts, count * ROWS, share.high, inputs + (share.left * ALL * depth + k) * COLUMNS,
                          depth * COLUMNS, share.wide, sums, k > 0);
    }
    for (int64_t j = 0; j < share.wide; ++j) {
      int64_t start = (first + share.left + j) * COLUMNS;
      for (int64_t i = 0; i < share.high * ROWS && share.top * ROWS + i < rows_; ++i) {
        const float *from = sums + (j * share.high + i / ROWS) * ALL * TILE + i % ROWS * COLUMNS;
        write_lines(share.top * ROWS + i, start, from);
      }
    }
  }

  void write_lines(int64_t row, int64_t start, const float *sums) const {
    alignas(64) float lines[2][2 * COLUMNS];
    for (int lane = 0; lane < COLUMNS; lane += LANES) {
      Vec m[ALL], y[4];
      for (int t = 0; t < ALL; ++t) m[t] = load(sums + t * TILE + lane);
      both_ways<N, 2>(m, y, Transform<R>::answer);
      for (int below = 0; below < 2; ++below) {
        store(lines[below] + 2 * lane, picked<low>(y[2 * below], y[2 * below + 1]));
        store(lines[below] + 2 * lane + LANES, picked<high>(y[2 * below], y[2 * below + 1]));
      }
    }
    int64_t count = std::min<int64_t>(COLUMNS, map_.tiles() - start);
    in_lines(map_, start, count, [&](int64_t sample, int64_t y, int64_t x, int64_t some, int64_t done) {
      for (int below = 0; below < 2 && y + below < map_.out_height; ++below) {
        write_(row, sample, y + below, x, std::min(2 * some, map_.out_width - x), lines[below] + 2 * done);
      }
    });
  }

  const TiledMap map_;
  int64_t rows_;
  Weights weights_;
  Write write_;
};

template <int R, class Weights, class Write>
void convolve_tiles(const TiledMap &map, int64_t rows, Weights weights, Write write) {
  TiledConvolution<R, Weights, Write>(map, rows, weights, write).run();
}

// Panels of WIDTH channels, (panels, 16 values, tiles, WIDTH), of transformed tiles of E x E values.
template <int WIDTH, int E, class F>
void copy_transposed(const TiledMap &map, int64_t start, int64_t tiles, float *panels, bool is_small, F f) {
  constexpr int ALL = 16, GROUPS = (WIDTH + LANES - 1) / LANES;
  int64_t shares = tiles / COLUMNS;
  for_tasks(is_small, parts(map.channels, WIDTH) * GROUPS * shares, [&](int64_t task) {
    int64_t panel = task / shares / GROUPS, lane = task / shares % GROUPS * LANES, at = task % shares * COLUMNS;
    int64_t first = panel * WIDTH + lane, kept = std::min<int64_t>(LANES, WIDTH - lane);
    int64_t count = std::min<int64_t>(COLUMNS, map.tiles() - start - at);
    alignas(64) float patch[E * E * PATCH];
    float *values = scratch<3>(ALL * LANES * COLUMNS);  // (16, channels, tiles)
    for (int i = 0; i < LANES; ++i) {
      if (i < kept && first + i < map.channels) load_tiles<E>(map, first + i, start + at, count, patch);
      else memset(patch, 0, sizeof patch);
      transform<E, 4>(patch, PATCH, values + i * COLUMNS, LANES * COLUMNS, f);
    }
    for (int t = 0; t < ALL; ++t) {
      float *to = panels + ((panel * ALL + t) * tiles + at) * WIDTH + lane;
      for (int part = 0; part < COLUMNS; part += LANES) {
        Vec block[LANES];
        for (int i = 0; i < LANES; ++i) block[i] = load(values + (t * LANES + i) * COLUMNS + part);
        transpose(block);
        for (int i = 0; i < LANES; ++i) memcpy(to + (part + i) * WIDTH, &block[i], sizeof(float) * kept);
      }
    }
  });
}

// The gradient of 3 x 3 weights, (rows, columns, 3, 3): `answers` is the map of the gradient of the answer.
inline void weights_of_tiles(const TiledMap &map, const TiledMap &answers, float *dw) {
  constexpr int R = 3, N = 4, ALL = 16;
  int64_t rows = answers.channels, columns = map.channels, panels = parts(map.tiles(), COLUMNS);
  int64_t down = parts(rows, ROWS), across = parts(columns, COLUMNS);
  // in bands of tiles where there is more of them than of the sums, which are kept from band to band
  int64_t values = panels * COLUMNS * (down * ROWS + across * COLUMNS);
  int64_t bands = down * across * TILE < values ? parts(ALL * values, BAND) : 1;
  int64_t band = parts(panels, bands) * COLUMNS;
  bool is_small = ALL * panels * COLUMNS * rows * columns < SMALL;
  Array lefts = new_array(down * ALL * band * ROWS), rights = new_array(across * ALL * band * COLUMNS);
  int64_t high = parts(down, parts(down, 8)), wide = parts(across, parts(across, 8));
  while (Share::count(down, high, across, wide) < 4 * Threads::all().count() && (high > 2 || wide > 1)) {
    if (high > 2) high = parts(high, 2);
    else wide = parts(wide, 2);
  }
  int64_t tasks = Share::count(down, high, across, wide), own = high * wide * ALL * TILE;
  Array kept = new_array(bands > 1 ? tasks * own : 0);
  for (int64_t start = 0; start < map.tiles(); start += band) {
    int64_t deep = rounded(std::min(band, map.tiles() - start), COLUMNS);
    copy_transposed<ROWS, 2>(answers, start, deep, lefts.get(), is_small, Transform<R>::of_answer);
    copy_transposed<COLUMNS, N>(map, start, deep, rights.get(), is_small, Transform<R>::input);
    for_tasks(is_small, tasks, [&](int64_t task) {
      Share share = Share::of(task, down, high, across, wide);
      float *sums = bands > 1 ? kept.get() + task * own : scratch<2>(own);
      const float *left = lefts.get() + share.top * ALL * deep * ROWS;
      const float *right = rights.get() + share.left * ALL * deep * COLUMNS;
      for (int64_t k = 0; k < deep; k += MOST_DEEP) {
        multiply_tiles<ALL>(std::min(MOST_DEEP, deep - k), left + k * ROWS, deep * ROWS, share.high,
                            right + k * COLUMNS, deep * COLUMNS, share.wide, sums, start + k > 0);
      }
      if (start + band < map.tiles()) return;
      for (int64_t j = 0; j < share.wide; ++j) {
        for (int64_t i = 0; i < share.high * ROWS && share.top * ROWS + i < rows; ++i) {
          const float *from = sums + (j * share.high + i / ROWS) * ALL * TILE + i % ROWS * COLUMNS;
          alignas(64) float w[R * R * COLUMNS];
          transform<N, R>(from, TILE, w, COLUMNS, Transform<R>::of_weight);
          int64_t first = (share.left + j) * COLUMNS, some = std::min<int64_t>(COLUMNS, columns - first);
          float *to = dw + ((share.top * ROWS + i) * columns + first) * R * R;
          for (int64_t c = 0; c < some; ++c) {
            for (int t = 0; t < R * R; ++t) to[c * R * R + t] = w[t * COLUMNS + c];
          }
        }
      }
    });
  }
}
