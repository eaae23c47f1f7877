// From the rows to a value per crystal: the mean over a crystal's atoms, then softplus and a linear map, one after the
// other: out = L_n(softplus(... L_1(softplus(mean)))). Forward and backward, a few crystals at a time.
#pragma once
#include "conv.h"

namespace srcgcnn::SRCGCNN_LEVEL {

template <class T>
SRCGCNN_INLINE int rounded_up(int n) {
  constexpr int W = Simd<T>::width;
  return (n + W - 1) / W * W;
}

// The last layer's few products have no tile to fill: summed in double, they lose nothing.
template <class T>
double dot(const T* a, const T* b, int n) {
  double sum[8] = {};
  int k = 0;
  for (; k + 8 <= n; k += 8)
    for (int l = 0; l < 8; ++l) sum[l] += double(a[k + l]) * b[k + l];
  for (; k < n; ++k) sum[0] += double(a[k]) * b[k];
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

// What the layers need, packed once per call. Rows of numbers are as wide as a vector asks; what stands in the padding
// has no weight.
template <class T>
class PackedReadout {
 public:
  PackedReadout(const Dense<T>* layers, int n_layers, bool backward) : layers_(layers), n(n_layers) {
    int64_t size = 0;
    for (int l = 0; l < n; ++l) size += (int64_t(in(l)) + 1) * wide_out(l) + (backward ? int64_t(out(l)) * wide_in(l) : 0);
    memory_.zero(size);
    T* at = memory_;
    for (int l = 0; l < n; ++l) {
      if (l + 1 < n) {
        forward_[l] = at;
        for (int o = 0; o < out(l); ++o)
          pack_column<T>(at, in(l), wide_out(l), o, layers[l].weight + int64_t(o) * in(l), T(1));
        bias_[l] = at + int64_t(in(l)) * wide_out(l);
        at = bias_[l] + wide_out(l);
        if (layers[l].bias) memcpy(bias_[l], layers[l].bias, out(l) * sizeof(T));
      }
      if (!backward) continue;
      back_[l] = at;
      constexpr int P = kPanel * Simd<T>::width;
      for (int o = 0; o < out(l); ++o)  // rows of in(l) numbers, whose last panel is padded
        for (int c = 0; c < in(l); c += P)
          memcpy(at + packed_at<T>(out(l), wide_in(l), o, c), layers[l].weight + int64_t(o) * in(l) + c,
                 (in(l) - c < P ? in(l) - c : P) * sizeof(T));
      at += int64_t(out(l)) * wide_in(l);
    }
  }

  int in(int l) const { return layers_[l].in; }
  int out(int l) const { return layers_[l].out; }
  int wide_in(int l) const { return rounded_up<T>(in(l)); }
  int wide_out(int l) const { return rounded_up<T>(out(l)); }
  // Numbers that a crystal's inputs of all softplus take: its mean, then what each layer but the last gives.
  int width() const {
    int sum = 0;
    for (int l = 0; l < n; ++l) sum += wide_in(l);
    return sum;
  }
  int widest() const {
    int most = 0;
    for (int l = 0; l < n; ++l) {
      most = wide_in(l) > most ? wide_in(l) : most;
      most = wide_out(l) > most ? wide_out(l) : most;
    }
    return most;
  }

  // values (rows, width()) begins with the means and receives what the layers give; to (rows, O); x: (rows, widest()).
  void forward(T* to, T* values, int64_t rows, T* x) const {
    T* at = values;
    for (int l = 0; l < n; ++l) {
      activate(x, at, rows, wide_in(l));
      if (l + 1 < n) {
        at += wide_in(l);
        gemm_nn<T>(x, wide_in(l), Packed<T>{forward_[l], in(l), wide_out(l)}, at, width(), rows, bias_[l], false);
        continue;
      }
      for (int64_t i = 0; i < rows; ++i)
        for (int o = 0; o < out(l); ++o)
          to[i * out(l) + o] = T(dot(x + i * wide_in(l), layers_[l].weight + int64_t(o) * in(l), in(l)) +
                                 (layers_[l].bias ? layers_[l].bias[o] : 0));
    }
  }

  // Adds to the gradients of each layer (out, wide_in), then (out); grad (rows, widest()) holds that of the output and
  // becomes that of the means; x and g: scratch of (rows, widest()).
  void backward(T* to, T* grad, const T* values, int64_t rows, T* x, T* g) const {
    using M = typename MathOf<T>::M;
    constexpr int W = Simd<T>::width;
    T* at[kMostLayers];
    for (int l = 0; l < n; ++l) {
      at[l] = to;
      to += int64_t(out(l)) * (wide_in(l) + 1);
    }
    const int all = width(), stride = widest();
    Buffer<double> sums(stride);
    const T* from = values + all;
    for (int l = n - 1; l >= 0; --l) {
      const int wide = wide_in(l), n_out = out(l);
      from -= wide;
      activate(x, from, rows, wide);
      gemm_tn<T>(grad, stride, n_out, x, wide, wide, at[l], wide, rows);
      T* bias = at[l] + int64_t(n_out) * wide;
      for (int o = 0; o < n_out; ++o) sums[o] = 0;
      for (int64_t i = 0; i < rows; ++i)
        for (int o = 0; o < n_out; ++o) sums[o] += grad[i * stride + o];
      for (int o = 0; o < n_out; ++o) bias[o] += T(sums[o]);
      gemm_nn<T>(grad, stride, Packed<T>{back_[l], n_out, wide}, g, wide, rows, nullptr, false);
      for (int64_t i = 0; i < rows; ++i)
        for (int c = 0; c < wide; c += W)
          store(grad + i * stride + c,
                load(g + i * wide + c) * softplus_slope2<M>(load(from + i * all + c) * T(kLog2e)));
    }
  }

  int64_t gradient_size() const {
    int64_t size = 0;
    for (int l = 0; l < n; ++l) size += int64_t(out(l)) * (wide_in(l) + 1);
    return size;
  }

 private:
  // x (rows, wide) = softplus of rows that are width() apart.
  void activate(T* x, const T* values, int64_t rows, int wide) const {
    using M = typename MathOf<T>::M;
    constexpr int W = Simd<T>::width;
    for (int64_t i = 0; i < rows; ++i)
      for (int c = 0; c < wide; c += W)
        store(x + i * wide + c, softplus<M>(load(values + i * width() + c)));
  }

  const Dense<T>* layers_;
  Buffer<T> memory_;
  T* forward_[kMostLayers];
  T* bias_[kMostLayers];
  T* back_[kMostLayers];

 public:
  const int n;
};

template <class T>
double atoms_of(const T* row_weight, int64_t n) {
  double atoms = 0;
  for (int64_t i = 0; i < n; ++i) atoms += row_weight[i];
  return atoms;
}

// Mean over the atoms of one crystal of rows (n, F), each counting row_weight times; the end of `to` is padding. In
// double: the rounding errors of a float sum over a large supercell, whose rows are equal, all have one sign.
template <class T>
void mean_of(T* to, const T* rows, const T* row_weight, int64_t n, int F) {
  constexpr int kBlock = 64;
  const double atoms = n ? atoms_of(row_weight, n) : 1;
  for (int c = 0; c < F; c += kBlock) {
    const int width = F - c < kBlock ? F - c : kBlock;
    double sum[kBlock] = {};
    for (int64_t i = 0; i < n; ++i) {
      const double w = row_weight[i];
      for (int k = 0; k < width; ++k) sum[k] += w * rows[i * F + c + k];
    }
    for (int k = 0; k < width; ++k) to[c + k] = T(sum[k] / atoms);
  }
  for (int c = F; c < rounded_up<T>(F); ++c) to[c] = 0;
}

constexpr int kReadoutRows = 32;  // crystals at a time, each block with gradients of its own: in order, whoever runs it

template <class T>
void readout(T* out, T* values, const T* h, const T* row_weight, const int32_t* crystal_ptr, int64_t n_crystals,
             const Dense<T>* layers, int n_layers, int threads) {
  const PackedReadout<T> packed(layers, n_layers, false);
  const int F = packed.in(0), width = packed.width();
  const int64_t blocks = (n_crystals + kReadoutRows - 1) / kReadoutRows;
#pragma omp parallel num_threads(blocks < threads ? int(blocks ? blocks : 1) : threads)
  {
    FlushDenormals flush;
    Buffer<T> x(kReadoutRows * packed.widest());
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t c0 = b * kReadoutRows, c1 = c0 + kReadoutRows < n_crystals ? c0 + kReadoutRows : n_crystals;
      for (int64_t c = c0; c < c1; ++c)
        mean_of<T>(values + c * width, h + int64_t(crystal_ptr[c]) * F, row_weight + crystal_ptr[c],
                   crystal_ptr[c + 1] - crystal_ptr[c], F);
      packed.forward(out + c0 * packed.out(n_layers - 1), values + c0 * width, c1 - c0, x);
    }
  }
}

template <class T>
void readout_backward(const DenseGradient<T>* gradients, T* d_h, const T* grad_out, const T* values, const T* row_weight,
                      const int32_t* crystal_ptr, int64_t n_crystals, const Dense<T>* layers, int n_layers, int threads) {
  const PackedReadout<T> packed(layers, n_layers, true);
  const int F = packed.in(0), width = packed.width(), widest = packed.widest(), O = packed.out(n_layers - 1);
  const int64_t blocks = (n_crystals + kReadoutRows - 1) / kReadoutRows, size = packed.gradient_size();
  const int64_t per_chunk = (blocks + 15) / 16, chunks = blocks ? (blocks + per_chunk - 1) / per_chunk : 0;
  Buffer<T> partial;
  partial.zero((chunks ? chunks : 1) * size);
#pragma omp parallel num_threads(chunks < threads ? int(chunks ? chunks : 1) : threads)
  {
    FlushDenormals flush;
    Buffer<T> grad, x(kReadoutRows * widest), g(kReadoutRows * widest);
    grad.zero(kReadoutRows * widest);
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t b = chunk * per_chunk; b < blocks && b < (chunk + 1) * per_chunk; ++b) {
        const int64_t c0 = b * kReadoutRows, c1 = c0 + kReadoutRows < n_crystals ? c0 + kReadoutRows : n_crystals;
        for (int64_t c = c0; c < c1; ++c) memcpy(grad + (c - c0) * widest, grad_out + c * O, O * sizeof(T));
        packed.backward(partial + chunk * size, grad, values + c0 * width, c1 - c0, x, g);
        for (int64_t c = c0; c < c1; ++c) {
          const T* mean = grad + (c - c0) * widest;
          const double atoms = atoms_of(row_weight + crystal_ptr[c], crystal_ptr[c + 1] - crystal_ptr[c]);
          for (int64_t i = crystal_ptr[c]; i < crystal_ptr[c + 1]; ++i) {
            const T w = T(row_weight[i] / atoms);
            for (int k = 0; k < F; ++k) d_h[i * F + k] = w * mean[k];
          }
        }
      }
  }
  T* total = partial;
  for (int64_t chunk = 1; chunk < chunks; ++chunk)
    for (int64_t x = 0; x < size; ++x) total[x] += partial[chunk * size + x];
  for (int l = 0; l < n_layers; ++l) {
    const int in = packed.in(l), wide = packed.wide_in(l);
    for (int o = 0; o < packed.out(l); ++o)
      memcpy(gradients[l].weight + int64_t(o) * in, total + int64_t(o) * wide, in * sizeof(T));
    total += int64_t(packed.out(l)) * wide;
    if (gradients[l].bias) memcpy(gradients[l].bias, total, packed.out(l) * sizeof(T));
    total += packed.out(l);
  }
}

}  // namespace srcgcnn::SRCGCNN_LEVEL
