// Copies of a batch of graphs into one of fixed sizes, which a CUDA graph works on: C linkage, addresses, sizes, a
// stream. Functions return null, or CUDA's message.
#pragma once
#include <stdint.h>

namespace srcgcnn {

enum BatchField { kNumbers, kWeight, kDistance, kSender, kRowPtr, kCrystalPtr, kAtomFeatures, kEdgeFeatures, kBatchFields };

// The rows beyond those of the batch form a crystal, and their edges, shared out evenly, lead from each to itself; further
// crystals have no rows. Every number has 4 bytes.
struct BatchPadding {
  const uint32_t* from[kBatchFields];
  uint32_t* to[kBatchFields];            // null: the batch has no such features
  int64_t n_rows, n_edges, n_crystals;   // of the batch
  int64_t to_rows, to_edges, to_crystals;
  int64_t n_atom, n_edge;                // features of a row and of an edge
  int64_t weight;                        // of the rows beyond: the bits of a float
};

}  // namespace srcgcnn

extern "C" {
// All on the device, in one launch.
const char* srcgcnn_cuda_pad(const srcgcnn::BatchPadding* given, void* stream);
// All on the host, in pinned memory from `here` on, whose `size` bytes then go `there`. `event` was recorded on the
// stream; the copy before, which may still read what is written now, is waited for by it, and it is recorded again.
const char* srcgcnn_cuda_send(const srcgcnn::BatchPadding* given, void* there, const void* here, int64_t size, void* event,
                              void* stream);
}
