// Prepared graphs joined to one batch.
#pragma once
#include <string.h>

#include "kernels.h"

namespace srcgcnn::SRCGCNN_LEVEL {

template <class T>
static void raise_each(int32_t* __restrict out, const T* __restrict in, int64_t n, int32_t by) {
  for (int64_t k = 0; k < n; ++k) out[k] = int32_t(in[k]) + by;
}

static void pack(const Joined& out, const Stored& store, const int64_t* chosen, int64_t n_chosen) {
  int32_t edge_end = 0;
  int64_t row = 0, edge = 0, atom = 0;
  out.row_ptr[0] = out.crystal_ptr[0] = 0;
  for (int64_t c = 0; c < n_chosen; ++c) {
    const int64_t i = chosen[c];
    const int64_t row_first = store.row_first[i], rows = store.row_first[i + 1] - row_first;
    const int64_t edge_first = store.edge_first[i], edges = store.edge_first[i + 1] - edge_first;
    const int64_t atom_first = store.atom_first[i], atoms = store.atom_first[i + 1] - atom_first;
    raise_each(out.numbers + row, store.numbers + row_first, rows, 0);
    memcpy(out.weight + row, store.weight + row_first, rows * sizeof(float));
    for (int64_t k = 0; k < rows; ++k) out.row_ptr[row + k + 1] = edge_end += store.degree[row_first + k];
    raise_each(out.sender + edge, store.sender + edge_first, edges, int32_t(row));
    memcpy(out.distance + edge, store.distance + edge_first, edges * sizeof(float));
    raise_each(out.atom_class + atom, store.atom_class + atom_first, atoms, int32_t(row));
    row += rows, edge += edges, atom += atoms;
    out.crystal_ptr[c + 1] = int32_t(row);
  }
}

}  // namespace srcgcnn::SRCGCNN_LEVEL
