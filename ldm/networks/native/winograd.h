// Convolutions of stride 1 with fewer products (Winograd's minimal filtering, Lavin & Gray 2015, F(2x2, RxR)): a map is
// cut into tiles of (R + 1) x (R + 1) values that make 2 x 2 of the answer, and each value of the transformed tiles
// is a matrix product over the channels: 16 products instead of 36 for R = 3, 9 instead of 16 for R = 2.
// Transforms only add and halve, so that results are as exact as those of a direct convolution.
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
  for (int64_t done = 0; done < count;) {
    int64_t line = (start + done) / map.across(), column = (start + done) % map.across();
    int64_t some = std::min(count - done, map.across() - column);
    f(line / map.down(), 2 * (line % map.down()), 2 * column, some, done);
    done += some;
  }
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

constexpr int64_t BAND = 2 << 20, MOST_DEEP = 96;  // transformed values at once: they stay in the cache
constexpr int PATCH = COLUMNS + LANES;  // vectors of the last tiles of a line end behind the panel

// patch[(r * N + c) * PATCH + t]: value (r, c) of tile start + t of a plane of the map, zero for t >= count.
template <int N> inline void load_tiles(const TiledMap &map, int64_t channel, int64_t start, int64_t count,
                                        float *patch) {
  float line[2 * PATCH + 2 * LANES] = {};
  in_lines(map, start, count, [&](int64_t sample, int64_t y, int64_t x, int64_t some, int64_t done) {
    const float *plane = map.x + (sample * map.channels + channel) * map.height * map.width;
    int64_t first = x - map.left, wide = 2 * some + N - 2;
    int64_t begin = std::min(wide, std::max<int64_t>(0, -first)), end = std::min(wide, map.width - first);
    for (int r = 0; r < N; ++r) {
      int64_t row = y - map.top + r;
      if (row < 0 || row >= map.height || end <= begin) {
        memset(line, 0, sizeof(float) * wide);
      } else {
        for (int64_t i = 0; i < begin; ++i) line[i] = 0;
        memcpy(line + begin, plane + row * map.width + first + begin, sizeof(float) * (end - begin));
        for (int64_t i = end; i < wide; ++i) line[i] = 0;
      }
      float *to = patch + r * N * PATCH + done;
      for (int64_t i = 0; i < some; i += LANES) {
        for (int c = 0; c < N; c += 2) {
          Vec low = load(line + 2 * i + c), high = load(line + 2 * i + c + LANES);
          store(to + c * PATCH + i, even_values(low, high));
          if (c + 1 < N) store(to + (c + 1) * PATCH + i, odd_values(low, high));
        }
      }
    }
  });
  if (count < COLUMNS) {
    for (int i = 0; i < N * N; ++i) memset(patch + i * PATCH + count, 0, sizeof(float) * (COLUMNS - count));
  }
}

// The answer of `rows` channels for all tiles, R x R weights: write(row, sample, y, x, how many, values) gets some
// of a line of it. weights(to, i, count, k, depth) copies those of rows i and channels k on, (depth, R * R, ROWS).
template <int R, class Weights, class Write>
void convolve_tiles(const TiledMap &map, int64_t rows, Weights weights, Write write) {
  constexpr int N = R + 1, ALL = N * N;
  constexpr int64_t MOST_ROWS = 8, MOST_PANELS = 12;
  int64_t depth = map.channels, panels = parts(map.tiles(), COLUMNS), row_panels = parts(rows, ROWS);
  int64_t deep = parts(depth, parts(depth, MOST_DEEP)), band = parts(panels, parts(panels * ALL * depth * COLUMNS, BAND));
  bool is_small = ALL * COLUMNS * panels * depth * rows < SMALL;
  Array inputs = new_array(band * ALL * depth * COLUMNS);
  for (int64_t first = 0; first < panels; first += band) {
    int64_t some = std::min(band, panels - first), share = parts(depth, parts(depth, 64));
    int64_t shares = parts(depth, share);
    for_tasks(is_small, some * shares, [&](int64_t task) {
      int64_t panel = task / shares, start = (first + panel) * COLUMNS;
      int64_t count = std::min<int64_t>(COLUMNS, map.tiles() - start);
      alignas(64) float patch[ALL * PATCH];
      for (int64_t k = task % shares * share; k < std::min(depth, (task % shares + 1) * share); ++k) {
        load_tiles<N>(map, k, start, count, patch);
        for (int lane = 0; lane < COLUMNS; lane += LANES) {
          Vec d[ALL], v[ALL];
          for (int i = 0; i < ALL; ++i) d[i] = load(patch + i * PATCH + lane);
          both_ways<N, N>(d, v, Transform<R>::input);
          for (int i = 0; i < ALL; ++i) store(inputs.get() + ((panel * ALL + i) * depth + k) * COLUMNS + lane, v[i]);
        }
      }
    });
    int64_t down = parts(row_panels, MOST_ROWS), across = parts(some, MOST_PANELS);
    while (down * across < 4 * Threads::all().count() && across < some / 4) ++across;
    while (down * across < 4 * Threads::all().count() && down < row_panels / 2) ++down;
    int64_t high = parts(row_panels, down), wide = parts(some, across);
    for_tasks(is_small, parts(row_panels, high) * parts(some, wide), [&](int64_t task) {
      int64_t top = task / parts(some, wide) * high, bottom = std::min(row_panels, top + high);
      int64_t begin = task % parts(some, wide) * wide, end = std::min(some, begin + wide);
      constexpr int64_t TILE = ROWS * COLUMNS;
      float *lefts = scratch<0>(high * ALL * deep * ROWS + LANES), *given = scratch<1>((deep + 1) * R * R * ROWS + LANES);
      float *sums = scratch<2>(high * wide * ALL * TILE);
      for (int64_t k = 0; k < depth; k += deep) {
        int64_t count = std::min(deep, depth - k);
        for (int64_t i = top; i < bottom; ++i) {
          weights(given, i * ROWS, std::min<int64_t>(ROWS, rows - i * ROWS), k, count);
          float *to = lefts + (i - top) * ALL * count * ROWS;
          for (int64_t n = 0; n < count; ++n) {
            for (int lane = 0; lane < ROWS; lane += LANES) {
              Vec g[R * R], u[ALL];
              for (int t = 0; t < R * R; ++t) g[t] = load(given + (n * R * R + t) * ROWS + lane);
              both_ways<R, N>(g, u, Transform<R>::weight);
              int kept = std::min(LANES, ROWS - lane);
              for (int t = 0; t < ALL; ++t) memcpy(to + (t * count + n) * ROWS + lane, &u[t], 4 * kept);
            }
          }
        }
        for (int64_t j = begin; j < end; ++j) {
          for (int t = 0; t < ALL; ++t) {
            const float *right = inputs.get() + ((j * ALL + t) * depth + k) * COLUMNS;
            for (int64_t i = top; i < bottom; ++i) {
              float *sum = sums + (((j - begin) * high + i - top) * ALL + t) * TILE;
              multiply_panels(count, lefts + ((i - top) * ALL + t) * count * ROWS, right, sum, COLUMNS, k > 0);
            }
          }
        }
      }
      for (int64_t j = begin; j < end; ++j) {
        int64_t start = (first + j) * COLUMNS, count = std::min<int64_t>(COLUMNS, map.tiles() - start);
        for (int64_t row = top * ROWS; row < std::min(rows, bottom * ROWS); ++row) {
          const float *from = sums + ((j - begin) * high + row / ROWS - top) * ALL * TILE + row % ROWS * COLUMNS;
          alignas(64) float lines[2][2 * COLUMNS];
          for (int lane = 0; lane < COLUMNS; lane += LANES) {
            Vec m[ALL], y[4];
            for (int t = 0; t < ALL; ++t) m[t] = load(from + t * TILE + lane);
            both_ways<N, 2>(m, y, Transform<R>::answer);
            for (int below = 0; below < 2; ++below) {
              store(lines[below] + 2 * lane, low_interleaved(y[2 * below], y[2 * below + 1]));
              store(lines[below] + 2 * lane + LANES, high_interleaved(y[2 * below], y[2 * below + 1]));
            }
          }
          in_lines(map, start, count, [&](int64_t sample, int64_t y, int64_t x, int64_t tiles, int64_t done) {
            int64_t values = std::min(2 * tiles, map.out_width - x);
            for (int below = 0; below < 2 && y + below < map.out_height; ++below) {
              write(row, sample, y + below, x, values, lines[below] + 2 * done);
            }
          });
        }
      }
    });
  }
}

// Panels of WIDTH channels, (panels, values of a tile, tiles, WIDTH), of transformed tiles of E x E values.
template <int WIDTH, int E, class F>
void copy_transposed(const TiledMap &map, int64_t start, int64_t tiles, float *panels, bool is_small, F transform) {
  constexpr int ALL = 16, GROUPS = (WIDTH + LANES - 1) / LANES;
  int64_t shares = tiles / COLUMNS;
  for_tasks(is_small, parts(map.channels, WIDTH) * GROUPS * shares, [&](int64_t task) {
    int64_t panel = task / shares / GROUPS, lane = task / shares % GROUPS * LANES, at = task % shares * COLUMNS;
    int64_t first = panel * WIDTH + lane, kept = std::min<int64_t>(LANES, WIDTH - lane);
    int64_t count = std::min<int64_t>(COLUMNS, map.tiles() - start - at);
    alignas(64) float patch[E * E * PATCH];
    float *values = scratch<3>(ALL * LANES * COLUMNS);  // (values of a tile, channels, tiles)
    for (int i = 0; i < LANES; ++i) {
      if (i < kept && first + i < map.channels) load_tiles<E>(map, first + i, start + at, count, patch);
      else memset(patch, 0, sizeof patch);
      for (int part = 0; part < COLUMNS; part += LANES) {
        Vec d[E * E], v[ALL];
        for (int t = 0; t < E * E; ++t) d[t] = load(patch + t * PATCH + part);
        both_ways<E, 4>(d, v, transform);
        for (int t = 0; t < ALL; ++t) store(values + (t * LANES + i) * COLUMNS + part, v[t]);
      }
    }
    for (int t = 0; t < ALL; ++t) {
      for (int part = 0; part < COLUMNS; part += LANES) {
        Vec block[LANES];
        for (int i = 0; i < LANES; ++i) block[i] = load(values + (t * LANES + i) * COLUMNS + part);
        transpose(block);
        float *to = panels + ((panel * ALL + t) * tiles + at + part) * WIDTH + lane;
        for (int i = 0; i < LANES; ++i) memcpy(to + i * WIDTH, &block[i], sizeof(float) * kept);
      }
    }
  });
}

// The gradient of the weights, (rows, channels of the map, 3, 3), from the map and the gradient of its answer, of
// which `answers` is a map of its own with as many tiles.
inline void weights_of_tiles(const TiledMap &map, const TiledMap &answers, float *dw) {
  constexpr int R = 3, N = 4, ALL = 16;
  constexpr int64_t TILE = ROWS * COLUMNS;
  int64_t rows = answers.channels, columns = map.channels, panels = parts(map.tiles(), COLUMNS);
  int64_t down = parts(rows, ROWS), across = parts(columns, COLUMNS);
  // in bands of tiles where the sums, which are kept from band to band, are less than the tiles
  int64_t values = panels * COLUMNS * (down * ROWS + across * COLUMNS), sums_kept = down * ROWS * across * COLUMNS;
  int64_t bands = sums_kept < values ? parts(ALL * values, BAND) : 1;
  int64_t band = parts(panels, bands) * COLUMNS;
  bool is_small = ALL * panels * COLUMNS * rows * columns < SMALL;
  Array lefts = new_array(down * ALL * band * ROWS), rights = new_array(across * ALL * band * COLUMNS);
  // some of the blocks of sums to each task
  int64_t high = parts(down, parts(down, 8)), wide = parts(across, parts(across, 8));
  while (parts(down, high) * parts(across, wide) < 4 * Threads::all().count() && (high > 2 || wide > 1)) {
    if (high > 2) high = parts(high, 2);
    else wide = parts(wide, 2);
  }
  int64_t tasks = parts(down, high) * parts(across, wide), own = high * wide * ALL * TILE;
  Array kept = new_array(bands > 1 ? tasks * own : 0);
  for (int64_t start = 0; start < map.tiles(); start += band) {
    int64_t count = std::min(band, map.tiles() - start), deep = rounded(count, COLUMNS);
    copy_transposed<ROWS, 2>(answers, start, deep, lefts.get(), is_small, Transform<R>::of_answer);
    copy_transposed<COLUMNS, N>(map, start, deep, rights.get(), is_small, Transform<R>::input);
    for_tasks(is_small, tasks, [&](int64_t task) {
      int64_t top = task / parts(across, wide) * high, bottom = std::min(down, top + high);
      int64_t begin = task % parts(across, wide) * wide, end = std::min(across, begin + wide);
      float *sums = bands > 1 ? kept.get() + task * own : scratch<2>(own);
      for (int64_t k = 0; k < deep; k += MOST_DEEP) {
        for (int64_t j = begin; j < end; ++j) {
          for (int t = 0; t < ALL; ++t) {
            const float *right = rights.get() + ((j * ALL + t) * deep + k) * COLUMNS;
            for (int64_t i = top; i < bottom; ++i) {
              const float *left = lefts.get() + ((i * ALL + t) * deep + k) * ROWS;
              float *sum = sums + (((j - begin) * high + i - top) * ALL + t) * TILE;
              multiply_panels(std::min(MOST_DEEP, deep - k), left, right, sum, COLUMNS, start + k > 0);
            }
          }
        }
      }
      if (start + count < map.tiles()) return;
      for (int64_t j = begin; j < end; ++j) {
        for (int64_t row = top * ROWS; row < std::min(rows, bottom * ROWS); ++row) {
          const float *from = sums + ((j - begin) * high + row / ROWS - top) * ALL * TILE + row % ROWS * COLUMNS;
          for (int lane = 0; lane < COLUMNS; lane += LANES) {
            Vec u[ALL], w[R * R];
            for (int t = 0; t < ALL; ++t) u[t] = load(from + t * TILE + lane);
            both_ways<N, R>(u, w, Transform<R>::of_weight);
            int64_t first = j * COLUMNS + lane, some = std::min<int64_t>(LANES, columns - first);
            float *to = dw + (row * columns + first) * R * R;
            for (int64_t c = 0; c < some; ++c) {
              for (int i = 0; i < R * R; ++i) to[c * R * R + i] = w[i][c];
            }
          }
        }
      }
    });
  }
}
