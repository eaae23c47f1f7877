// What a warp's accesses ask of shared memory and of the caches, counted where PTX is run (ptx.h, traffic.cpp).
#pragma once
#include <stdint.h>

#ifdef SRCGCNN_TRAFFIC
void traffic_access(bool shared, uint64_t at, int size, const char* where);
void traffic_barrier();
#else
inline void traffic_access(bool, uint64_t, int, const char*) {}
inline void traffic_barrier() {}
#endif
