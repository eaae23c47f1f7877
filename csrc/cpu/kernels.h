// The CPU kernels as the binding sees them: pointers, sizes, threads. One table per SIMD level and scalar type.
#pragma once
#include <cstdint>

namespace srcgcnn {

// A batch of graphs, edges sorted by receiver. Edge vectors are `features` (n_edges, n_features), or, where that is
// null, the Gaussians exp(-((distance - dmin - k step) / step)^2).
template <class T>
struct Edges {
  const T* distance;
  const T* features;
  const int32_t* sender;
  const int32_t* row_ptr;
  const int32_t* crystal_ptr;
  // Edges of a crystal with the same distance share a shell: shell_of (n_edges) counts within the crystal,
  // shell_distance holds those of crystal c from its first edge on, shell_count (n_crystals).
  const int32_t* shell_of;
  const T* shell_distance;
  const int32_t* shell_count;
  int64_t n_rows, n_edges, n_crystals;
  int n_features;
  T dmin, step;
};

// What follows from the graph and the rows' weights alone; only batch statistics need it.
template <class T>
struct Moments {
  const T* row_weight;   // (N)
  const T* in_degree;    // (N) sum of the receivers' weights, by sender
  const T* by_receiver;  // (N, K) sum_j e_ij
  const T* by_sender;    // (N, K) sum_i w_i e_ij
  const double* sum;     // (K) sum_ij w_i e_ij
  const double* gram;    // (K, K) sum_ij w_i e_ij^T e_ij
};

// One gated convolution. Vectors of a batch norm that uses batch statistics are outputs, else inputs.
template <class T>
struct Layer {
  const T* weight;  // (2F, 2F + K)
  const T* bias;    // (2F) or null
  const T* gamma1;  // (2F)
  const T* beta1;
  const T* gamma2;  // (F)
  const T* beta2;
  T* mean1;  // (2F)
  T* var1;
  T* mean2;  // (F)
  T* var2;
  T eps1, eps2;
  bool train1, train2;
};

// Running statistics that move towards those of the batch, as torch.lerp moves them; null where they do not.
template <class T>
struct Running {
  T* mean1;  // (2F), of z with its bias
  T* var1;   // unbiased
  T* mean2;  // (F)
  T* var2;
  T momentum1, momentum2;
};

// Features of the rows: (N, F), or, with `species` (N), a table (n_table, F) of which row i takes row species[i].
template <class T>
struct Features {
  const T* data;
  const int32_t* species;
  int64_t n_table;
};

template <class T>
struct Gradients {
  T* h;       // as the features
  T* weight;  // (2F, 2F + K)
  T* bias;    // (2F)
  T* gamma1;
  T* beta1;
  T* gamma2;
  T* beta2;
  T* edge;  // (E), (E, K) for given features, or null
};

// Batch norms whose batch several processes share. Between its passes a kernel puts into message[norm] (1 + 2C numbers for
// C channels; null where a norm is this process's own) what this process knows, and exchange(context, norm), called by
// the thread that called the kernel, makes of it what all processes know together. Forward: the count, means, and sums of
// squares about them; of these the count, means and biased variances. Backward: the gradients of means and variances
// behind the count, which is that of all and stays.
struct Joint {
  double* message[2];
  bool (*exchange)(void* context, int norm);
  void* context;
};

// A linear map of the readout or the embedding: y = x weight^T + bias.
template <class T>
struct Dense {
  const T* weight;  // (out, in)
  const T* bias;    // (out) or null
  int in, out;
};
template <class T>
struct DenseGradient {
  T* weight;
  T* bias;
};
constexpr int kMostLayers = 16;  // of a readout

// The arrays of a store of prepared graphs, and where each begins in them.
struct Stored {
  const int64_t *row_first, *edge_first, *atom_first;  // (n + 1)
  const uint8_t* numbers;
  const float* weight;
  const int32_t *degree, *sender;  // sender and atom_class count within the crystal
  const float* distance;
  const int32_t* atom_class;
};

// Some of them as one batch.
struct Joined {
  int32_t* numbers;
  float* weight;
  int32_t *row_ptr, *crystal_ptr, *sender;
  float* distance;
  int32_t* atom_class;
};

template <class T>
struct Kernels {
  // F must be a multiple of this many numbers.
  int width;
  // Numbers of a vector: what a readout keeps of a crystal is as wide as its layers' inputs, each rounded up to this.
  int lanes;
  // Distinct distances per crystal.
  void (*edge_shells)(int32_t* shell_of, T* shell_distance, int32_t* shell_count, const Edges<T>& edges, int threads);
  // Fills the arrays of Moments (all but row_weight), which it takes as outputs.
  void (*edge_moments)(T* in_degree, T* by_receiver, T* by_sender, double* sum, double* gram, const T* row_weight,
                       const Edges<T>& edges, int threads);
  // out, m (N, F): the layer's output, and the summed messages that its backward needs; products (N, 4F), or null: the
  // rows' products in an order of their own, which spare the backward forming them again.
  void (*conv)(T* out, T* m, T* products, const Features<T>& h, const Layer<T>& layer, const Running<T>& running,
               const Edges<T>& edges, const Moments<T>& moments, const Joint& joint, int width, int threads);
  void (*conv_backward)(const Gradients<T>& gradients, const T* grad_out, const Features<T>& h, const T* m,
                        const T* products, const Layer<T>& layer, const Edges<T>& edges, const Moments<T>& moments,
                        const Joint& joint, int width, int threads);
  // out (N, F): `n_steps` convolutions with fixed statistics, crystal by crystal. With `shared` all steps have one
  // weight (and bias).
  void (*stack)(T* out, const Features<T>& h, const Layer<T>* layers, int n_steps, bool shared, const Edges<T>& edges, int width,
                int threads);
  // out (B, O): the mean of h (N, F) over each crystal's atoms, then softplus and a linear map, n_layers times. values
  // as wide as the layers' inputs (see lanes): what the backward
  // needs.
  void (*readout)(T* out, T* values, const T* h, const T* row_weight, const int32_t* crystal_ptr, int64_t n_crystals,
                  const Dense<T>* layers, int n_layers, int threads);
  void (*readout_backward)(const DenseGradient<T>* gradients, T* d_h, const T* grad_out, const T* values,
                           const T* row_weight, const int32_t* crystal_ptr, int64_t n_crystals, const Dense<T>* layers,
                           int n_layers, int threads);
  // out (B, O): stack and readout in one. With `embedding`, h is a table (n_table, A) that is embedded first. Edges may
  // come without shells.
  void (*network)(T* out, const Features<T>& h, const Dense<T>* embedding, const Layer<T>* layers, int n_steps, bool shared,
                  const Edges<T>& edges, const T* row_weight, const Dense<T>* readout, int n_readout, int width, int threads);
  // First edge whose sender is no row of its receiver's crystal, or -1; pointers must be in order.
  int64_t (*stray_edge)(const int32_t* sender, const int32_t* row_ptr, const int32_t* crystal_ptr, int64_t n_crystals);
  // First crystal with more shells than edges, or an edge of no shell of it, or -1; pointers must be in order.
  int64_t (*stray_shell)(const int32_t* shell_of, const int32_t* shell_count, const int32_t* row_ptr,
                         const int32_t* crystal_ptr, int64_t n_crystals);
  void (*pack)(const Joined& out, const Stored& store, const int64_t* chosen, int64_t n_chosen);
};

struct Level {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
};

#if defined(__x86_64__)
extern const Level level_v2, level_v3, level_v4;
#else
extern const Level level_portable;
#endif

}  // namespace srcgcnn
