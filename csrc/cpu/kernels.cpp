// Every CPU kernel of one SIMD level; this file is compiled once per level (SRCGCNN_LEVEL names it).
// No std templates in what it includes: an inline function compiled for AVX-512 must not be the copy that the linker keeps.
#include "kernels.h"

#include "conv.h"
#include "edges.h"
#include "network.h"
#include "pack.h"
#include "stack.h"

#define SRCGCNN_STRING_(x) #x
#define SRCGCNN_STRING(x) SRCGCNN_STRING_(x)
#define SRCGCNN_JOIN_(a, b) a##b
#define SRCGCNN_JOIN(a, b) SRCGCNN_JOIN_(a, b)

namespace srcgcnn {

namespace SRCGCNN_LEVEL {
template <class T>
constexpr Kernels<T> table() {
  return {kChannels<T>,     Simd<T>::width, edge_shells<T>,      edge_moments<T>, conv<T>,
          conv_backward<T>, stack<T>,       readout<T>, readout_backward<T>, network<T>, stray_edge,
          stray_shell,      pack};
}
}  // namespace SRCGCNN_LEVEL

extern const Level SRCGCNN_JOIN(level_, SRCGCNN_LEVEL);
const Level SRCGCNN_JOIN(level_, SRCGCNN_LEVEL) = {SRCGCNN_STRING(SRCGCNN_LEVEL), SRCGCNN_LEVEL::table<float>(),
                                                   SRCGCNN_LEVEL::table<double>()};

}  // namespace srcgcnn
