// A layer forward, a layer backward, and what a graph is asked for once: sequences of the launches above. Part of conv.cu.
#pragma once

namespace srcgcnn {
namespace {

// Hands out a block of memory; without one it counts. `used` may go back to where it was: launches come in their order.
struct Space {
  char* base;
  int64_t used = 0, most = 0;
  template <class T = float>
  T* take(int64_t n) {
    T* found = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (n * int64_t(sizeof(T)) + 255) / 256 * 256;
    if (used > most) most = used;
    return found;
  }
};

// Launches one after the other; after an error, or while the space is counted, none.
struct Sequence {
  Space space;
  void* stream;
  Device device = {};
  const char* error = nullptr;

  bool goes() const { return space.base && !error; }
  void run(const char* (*function)(const DeviceConv*, void*), const DeviceConv& g) {
    if (goes()) error = function(&g, stream);
  }
  template <class Kernel, class Given>
  void launch(Kernel kernel, int64_t blocks, int64_t bytes, const Given& given, int n_threads = kThreads) {
    if (!goes() || blocks == 0) return;
    error = allow(kernel, int(bytes));
    if (error) return;
    SRCGCNN_LAUNCH(kernel, unsigned(blocks), n_threads, int(bytes), stream, given);
    error = message(cudaGetLastError());
  }

  struct Sum {
    const float* parts;
    int64_t n;
    double* exact;
    float* rounded;
  };
  // Of `parts` each.
  void add(int64_t n_parts, std::initializer_list<Sum> sums) {
    PartSums given = {};
    int64_t blocks = 0;
    int k = 0;
    for (const auto& sum : sums) {
      given.of[k++] = {sum.parts, sum.exact, sum.rounded, sum.n, n_parts};
      blocks += parts(sum.n, 32);
    }
    launch(add_parts, blocks, kPartThreads * sizeof(double), given, kPartThreads);
  }
};

bool by_four(const float* x, int64_t stride) { return stride % 4 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0; }

template <bool kHalf>
auto product_of_rows(bool held, bool relaxed) {
  return held ? relaxed ? multiply_rows<kHalf, true, true> : multiply_rows<kHalf, true, false>
              : relaxed ? multiply_rows<kHalf, false, true> : multiply_rows<kHalf, false, false>;
}

// half: of `out`, which may be `add`. Persistent blocks, one for each multiprocessor; as many columns' weights as have room are
// kept in each.
void rows_times(Sequence& s, const DeviceConv& g, const float* a, int64_t n, int64_t inner, const float* b,
                int64_t columns, const float* shift, const float* add, void* out, bool half) {
  if (!s.goes() || n == 0) return;
  constexpr int rows = 2 * kProductWarps * kPieceSize * int(sizeof(float));
  const int64_t of_block = of_columns(inner) * int64_t(sizeof(float));
  const int64_t all = parts(columns, kProductColumns), room = (s.device.shared - rows) / of_block;
  const int64_t slices = room > 0 ? parts(all, room < all ? room : all) : 1, held = room > 0 ? parts(all, slices) : 0;
  const int64_t units = parts(n, kProductRows) * (held ? held : all), most = s.device.processors / slices;
  const int64_t enough = parts(units, 4), blocks = enough < most ? enough : most > 0 ? most : 1;
  const bool aligned = by_four(add, columns) && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  const bool fours = by_four(a, inner);
  const RowProduct given{a, b, shift, add, out, n, inner, columns, int(held), fours, aligned};
  s.launch(half ? product_of_rows<true>(held, g.relaxed) : product_of_rows<false>(held, g.relaxed), blocks * slices,
           rows + held * of_block, given, 32 * kProductWarps);
}

// Parts of a^T b (programs, left, right).
const float* columns_times(Sequence& s, const DeviceConv& g, const float* a, int64_t left, const float* b, int64_t right,
                           int64_t b_stride) {
  float* sums = s.space.take(g.programs * left * right);
  const int64_t a_tiles = parts(left, kLeft), b_tiles = parts(right, kRight);
  const int64_t lefts = a_tiles < kColumnWarps ? a_tiles : kColumnWarps, room = kColumnWarps / lefts;
  const int64_t rights = parts(b_tiles, parts(b_tiles, room < 4 ? room : 4));  // equal shares
  const int64_t a_blocks = parts(a_tiles, lefts), b_blocks = parts(b_tiles, rights);
  ColumnProduct given = {};
  given.a = a;
  given.b = b;
  given.out = sums;
  given.n_rows = g.n_rows;
  given.left = given.a_stride = int(left);
  given.right = int(right);
  given.b_stride = int(b_stride);
  given.programs = int(g.programs);
  given.lefts = int(lefts);
  given.rights = int(rights);
  given.teams = 2 * lefts * rights <= kColumnWarps ? 2 : 1;
  given.a_blocks = int(a_blocks);
  given.b_blocks = int(b_blocks);
  given.steps = int(parts(g.n_rows, kStageRows));
  const bool fours = by_four(a, left) && by_four(b, b_stride) && right % 4 == 0;
  s.launch(fours ? multiply_columns<true> : multiply_columns<false>, a_blocks * b_blocks * g.programs, kColumnShared, given,
           32 * given.lefts * given.rights * given.teams);
  return sums;
}

// What the statistics of the edges follow from, besides the product: the mean that h was less, and the sum of w over edges.
struct Gram {
  const float* centre;
  const double* count;
};

// The Gram matrix of h with the ends and the vectors of the edges, to g.product.
Gram gram(Sequence& s, const DeviceConv& g) {
  const int64_t F = g.F, K = g.n_features, columns = 3 * F + 2 * K + 2, programs = parts(g.programs, 2);
  float *centre = s.space.take(F), *counts = s.space.take(counts_of(g.n_rows));
  auto* count = s.space.take<double>(1);
  float *around = s.space.take(g.n_rows * F), *sums = s.space.take(programs * F * columns);
  DeviceConv q = g;
  q.out = around;
  q.out_x = centre;
  q.out_m = counts;
  s.run(srcgcnn_cuda_neighbors, q);
  GramProduct given = {};
  given.h = g.h;
  given.around = around;
  given.by_receiver = g.by_receiver;
  given.by_sender = g.by_sender;
  given.row_weight = g.row_weight;
  given.in_degree = g.degree;
  given.centre = centre;
  given.counts = counts;
  given.e_sum = g.e_sum;
  given.ptr = g.ptr;
  given.out = sums;
  given.count = count;
  given.n_rows = g.n_rows;
  given.n_edges = g.n_edges;
  given.n_counts = int(counts_of(g.n_rows));
  given.F = int(F);
  given.K = int(K);
  given.programs = int(programs);
  given.steps = int(parts(g.n_rows, kStageRows));
  const int64_t tiles = 3 * parts(F, kRight) + 2 * parts(K + 1, kRight);
  given.lefts = F <= kLeft ? 1 : 2;
  given.rights = int(parts(tiles, parts(tiles, kMostRights)));
  given.left_blocks = int(parts(F, kRight));
  given.right_blocks = int(parts(tiles, given.rights));
  s.launch(gram_products, programs * given.left_blocks * given.right_blocks, kGramShared, given,
           32 * given.lefts * given.rights + kReaders);
  s.add(programs, {{sums, F * columns, nullptr, g.product}});
  return {centre, count};
}

// What x of an edge follows from, of the channels at hand, into g; back: the weights for the gradient at h, too. `to`: where some of it goes.
const float* linear(Sequence& s, DeviceConv& g, bool back, const DeviceConv& to = {}) {
  const int64_t F = g.F, all = g.all, W = g.width, K = g.n_features, size = g.half ? 2 : 4;
  DeviceConv q = g;
  if (g.train1) q.bias = nullptr;
  q.out = s.space.take(ordered_size(all, 4 * W));
  q.out_m = s.space.take(4 * W);
  q.out_filter = to.out_filter ? to.out_filter : s.space.take(W / kChunk * parts(K, 8) * 1024);
  q.out_x = back ? s.space.take(ordered_size(4 * F, all)) : nullptr;
  q.out_edge = g.distance ? nullptr : s.space.take(ordered_size(K, 2 * W));
  q.out_gamma = to.out_edge;
  s.launch(order_weights, parts(ordered_numbers(q), 128), 0, q);
  const float* shift = q.out_m;
  g.filter = q.out_filter;
  char* pq = to.out ? reinterpret_cast<char*>(to.out) : s.space.take<char>(g.n_rows * 4 * W * size);
  rows_times(s, g, g.h, g.n_rows, all, q.out, 4 * W, shift, nullptr, pq, g.half);
  g.pq = pq;
  if (!g.distance) {
    char* term = to.out_x ? reinterpret_cast<char*>(to.out_x) : s.space.take<char>(g.n_edges * 2 * W * size);
    rows_times(s, g, g.features, g.n_edges, K, q.out_edge, 2 * W, nullptr, nullptr, term, g.half);
    g.term = term;
  }
  return q.out_x;
}

void moments(Sequence& s, const DeviceConv& given) {
  DeviceConv g = given, q = given;
  const int64_t K = g.n_features;
  g.number = nullptr;
  q = g;
  q.row_weight = nullptr;
  q.out_degree = nullptr;
  s.run(srcgcnn_cuda_edge_sum, q);
  q = given;
  q.ptr = given.col_ptr;
  q.other = given.receiver;
  q.out = given.out_x;
  s.run(srcgcnn_cuda_edge_sum, q);
  float* products = s.space.take(g.programs * K * K);
  q = g;
  q.out = products;
  s.run(srcgcnn_cuda_edge_gram, q);
  float* sums = s.space.take(g.programs * 3 * K);
  q = g;
  q.F = K;
  q.width = parts(K, kChunk) * kChunk;
  q.x = g.out;
  q.out = sums;
  q.out_x = nullptr;
  s.run(srcgcnn_cuda_column_sums, q);
  s.add(g.programs, {{products, K * K, g.out_gram, nullptr}, {sums, 3 * K, g.out_sum, nullptr}});
}

void only_linear(Sequence& s, const DeviceConv& given) {
  DeviceConv g = given;
  linear(s, g, false, given);
}

void forward(Sequence& s, const DeviceConv& given) {
  DeviceConv g = given, q;
  if (g.train1) {
    const int64_t before = s.space.used;
    const Gram found = gram(s, g);
    q = g;
    q.totals = found.count;
    q.x = found.centre;
    q.out = g.new_mean1;
    q.out_x = g.new_var1;
    const int64_t numbers = parts(5 * g.F + 3 * g.n_features + 2, 4) * 4;
    s.launch(edge_statistics, 2 * g.F, kSums * kStatisticsThreads * sizeof(double) + numbers * sizeof(float), q,
             kStatisticsThreads);
    g.mean1 = g.new_mean1;
    g.var1 = g.new_var1;
    s.space.used = before;
  }
  linear(s, g, false);
  q = g;
  if (g.train2) q.out = nullptr;
  s.run(srcgcnn_cuda_gate_sum, q);
  if (!g.train2) return;
  float *sums = s.space.take(g.programs * 3 * g.F), *centre = s.space.take(g.F);
  auto* totals = s.space.take<double>(3 * g.F);
  q = g;
  q.x = g.out_m;
  q.out = sums;
  q.out_x = centre;
  s.run(srcgcnn_cuda_column_sums, q);
  s.add(g.programs, {{sums, 3 * g.F, totals, nullptr}});
  q = g;
  q.m = g.out_m;
  q.x = centre;
  q.totals = totals;
  q.out_m = g.new_mean2;
  q.out_x = g.new_var2;
  s.run(srcgcnn_cuda_finish, q);
}

// The channels from `first` on, as many as `width` has room for.
DeviceConv channels_of(const DeviceConv& g, int64_t first, int64_t width) {
  DeviceConv q = g;
  q.F = g.all - first < width ? g.all - first : width;
  q.width = parts(q.F, kChunk) * kChunk;
  for (const float** x : {&q.gamma1, &q.beta1, &q.mean1, &q.var1, &q.gamma2, &q.beta2, &q.mean2, &q.var2, &q.bias})
    if (*x) *x += first;
  for (float** x : {&q.d_gamma1, &q.d_beta1, &q.d_gamma2, &q.d_beta2, &q.d_bias, &q.out_edge})
    if (*x) *x += first;
  q.weight += first * (2 * g.all + g.n_features);
  if (q.d_weight) q.d_weight += first * (2 * g.all + g.n_features);
  q.d_m += first;
  return q;
}

// Of the channels at hand, with d_m: the gradients of their parameters, and their share of that at h, which is added to g.out.
// of_messages (4, all) of finish_backward, and its exact sums.
void backward_of_channels(Sequence& s, const DeviceConv& given, const float* of_messages, const double* totals) {
  DeviceConv g = given, q;
  const int64_t n = g.n_rows, F = g.F, K = g.n_features;
  g.number = nullptr;
  g.out_edge = nullptr;
  const float* back = linear(s, g, true);
  float* d_pq = s.space.take(n * 4 * F);  // whose second half has sums of x before it has the gradient at q
  // Edges by receiver.
  float *by_vector = s.space.take(g.programs * 4 * F), *by_filter = s.space.take(g.programs * K * 2 * F);
  q = g;
  q.out = d_pq;
  q.out_x = g.train1 ? d_pq + 2 * F : nullptr;
  q.out_gamma = by_vector;
  q.out_filter = by_filter;
  q.out_edge = given.out_edge;
  s.run(srcgcnn_cuda_backward_receivers, q);
  float *d_filter = s.space.take(K * 2 * F), *vectors = s.space.take(6 * F);
  q = g;
  q.a = of_messages;
  q.out = vectors;
  const ReceiverSums received{q, by_vector, {by_filter, nullptr, d_filter, K * 2 * F, g.programs}};
  s.launch(vector_gradients, parts(2 * F, 32) + parts(K * 2 * F, 32), 2 * kPartThreads * sizeof(double), received, kPartThreads);
  g.a = vectors;
  g.c1 = vectors + 2 * F;
  g.c2 = vectors + 4 * F;
  q = g;
  q.out = d_pq;
  q.grad = d_pq;
  q.x = d_pq + 2 * F;
  q.degree = nullptr;
  q.var2 = nullptr;
  q.stride = 4 * F;
  q.columns = 2 * F;
  if (!g.train1) q.c1 = q.c2 = nullptr;
  s.run(srcgcnn_cuda_correct, q);
  // Edges by sender.
  q = g;
  q.ptr = g.col_ptr;
  q.other = g.receiver;
  q.number = given.number;
  q.out = d_pq;
  if (!g.train1) q.row_weight = nullptr;
  s.run(srcgcnn_cuda_backward_senders, q);
  // Rows.
  rows_times(s, g, d_pq, n, 4 * F, back, g.all, nullptr, g.out, g.out, false);
  const float* of_rows = columns_times(s, g, d_pq, 4 * F, g.h, g.all, g.all);
  q = g;
  q.x = of_rows;
  q.grad = d_filter;
  q.totals = totals;
  s.launch(weight_gradient, 2 * F, kPartThreads * sizeof(double), q, kPartThreads);
}

// The products of all channels at once are 1 kB a row (F = 64), and so are their gradients: so in large batches chunks of
// the channels, which do not meet but in the gradient at h, take the same memory one after the other.
void backward(Sequence& s, const DeviceConv& given) {
  DeviceConv g = given, q;
  const int64_t n = g.n_rows, F = g.F, W = g.width, K = g.n_features;
  if (g.train1 && !g.product) {
    g.product = s.space.take(F * (3 * F + 2 * K + 2));
    const int64_t before = s.space.used;
    gram(s, g);
    s.space.used = before;
  }
  // The norm of the messages. The gradient before the last softplus stays in g.out.
  float *dm = s.space.take(n * W), *of_messages = s.space.take(4 * F);
  auto* totals = s.space.take<double>(4 * F);
  int64_t before = s.space.used;
  float* sums = s.space.take(g.programs * 4 * F);
  q = g;
  q.out_m = g.train2 ? nullptr : dm;
  q.out_x = sums;
  s.run(srcgcnn_cuda_finish_backward, q);
  s.add(g.programs, {{sums, 4 * F, totals, of_messages}});
  s.space.used = before;
  if (g.train2) {
    q = g;
    q.ptr = nullptr;
    q.degree = nullptr;
    q.out = dm;
    q.grad = g.out;
    q.x = g.m;
    q.c1 = of_messages;
    q.c2 = of_messages + F;
    q.count = of_messages + 2 * F;
    q.stride = W;
    q.columns = F;
    s.run(srcgcnn_cuda_correct, q);
  }
  g.d_m = dm;
  g.m_stride = W;
  const int64_t chunk = n * 4 * kChunk * (g.half ? 2 : 4), room = g.at_once / chunk;
  const int64_t passes = parts(chunks(g), room > 1 ? room : 1), width = parts(chunks(g), passes) * kChunk;
  for (int64_t first = 0; first < F; first += width) {
    before = s.space.used;
    backward_of_channels(s, channels_of(g, first, width), of_messages + first, totals);
    s.space.used = before;
  }
}

const char* sequence(const DeviceConv& g, void (*steps)(Sequence&, const DeviceConv&), void* stream) {
  Sequence s{{static_cast<char*>(g.space)}, stream};
  s.error = s.device.ask();
  steps(s, g);
  return s.error;
}

}  // namespace
}  // namespace srcgcnn

extern "C" {
const char* srcgcnn_cuda_edge_moments(const DeviceConv* given, void* stream) { return sequence(*given, moments, stream); }
const char* srcgcnn_cuda_linear(const DeviceConv* given, void* stream) { return sequence(*given, only_linear, stream); }
const char* srcgcnn_cuda_layer(const DeviceConv* given, void* stream) { return sequence(*given, forward, stream); }
const char* srcgcnn_cuda_layer_backward(const DeviceConv* given, void* stream) {
  return sequence(*given, backward, stream);
}
const char* srcgcnn_cuda_transpose(const DeviceConv* given, void* stream) {
  Sequence s{{reinterpret_cast<char*>(given->out_col_ptr)}, stream};  // takes no space
  const int64_t more = given->n_edges > given->n_rows ? given->n_edges : given->n_rows + 1;
  s.launch(transpose_index, threads(more), 0, *given);
  return s.error;
}
const char* srcgcnn_cuda_features(const DeviceConv* given, void* stream) {
  Sequence s{{reinterpret_cast<char*>(given->out)}, stream};  // takes no space
  s.launch(features_of_rows, chunks(*given) * given->programs, 0, *given);
  return s.error;
}
const char* srcgcnn_cuda_table_sums(const DeviceConv* given, void* stream) {
  Sequence s{{reinterpret_cast<char*>(given->out)}, stream};  // takes no space
  const int64_t rows = given->n_edges, blocks = parts(given->F, 32) * table_slices(rows) * given->programs;
  s.launch(table_sums, blocks, 4 * table_share(rows) * 32 * sizeof(float), *given);
  s.add(given->programs, {{given->out_x, rows * given->F, nullptr, given->out}});
  return s.error;
}
const char* srcgcnn_cuda_mean(const DeviceConv* given, void* stream) {
  Sequence s{{reinterpret_cast<char*>(given->out)}, stream};  // takes no space
  s.launch(crystal_mean, given->n_rows, 128 * sizeof(float), *given);
  return s.error;
}
const char* srcgcnn_cuda_mean_backward(const DeviceConv* given, void* stream) {
  Sequence s{{reinterpret_cast<char*>(given->out)}, stream};
  s.launch(crystal_mean_backward, given->n_rows, 0, *given);
  return s.error;
}
int64_t srcgcnn_cuda_space(const DeviceConv* given, int which) {
  DeviceConv g = *given;
  g.space = nullptr;
  Sequence s{{nullptr}, nullptr};
  (which == 0 ? moments : which == 1 ? forward : which == 2 ? backward : only_linear)(s, g);
  return s.space.most;
}
}
