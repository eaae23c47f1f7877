// Races between the threads of an emulated kernel. The compiler's -fsanitize=thread announces every access to memory;
// races.cpp answers it, and holds each byte's last accesses against what orders them on a GPU: __syncthreads within a block,
// __syncwarp within a warp, the wait for a copy within a thread, the end of a kernel between blocks. Shuffles, votes and
// products on tensor cores order nothing, and a copy may come at any time before its thread has waited for it.
#pragma once
#include <stddef.h>

#ifdef SRCGCNN_RACES
#define SRCGCNN_UNSEEN __attribute__((noinline, no_sanitize("thread")))
extern "C" {
void races_launch(const char* shared, size_t size);
void races_block(unsigned block);
void races_thread(int thread, const void* stack, size_t size);  // -1: the emulation itself
void races_at_warp(int warp);
void races_at_block();
void races_copy(void* to, const void* from, bool arrives, const void* code);  // of 16 bytes; without `from`: zeros
void races_atomic(const void* at, size_t size, const void* code);
void races_not_of_kernels(const void* at, size_t size);
}
#else
#define SRCGCNN_UNSEEN
inline void races_launch(const char*, size_t) {}
inline void races_block(unsigned) {}
inline void races_thread(int, const void*, size_t) {}
inline void races_at_warp(int) {}
inline void races_at_block() {}
inline void races_copy(void*, const void*, bool, const void*) {}
inline void races_atomic(const void*, size_t, const void*) {}
inline void races_not_of_kernels(const void*, size_t) {}
#endif
