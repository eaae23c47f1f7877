// For LD_PRELOAD: what posix_memalign gives, as PyTorch does to tensors, ends where a page begins that cannot be touched.
//
// So a kernel that reads beyond its arrays stops the program, as does one that reads what was freed. An array of an odd
// size is aligned as its size allows.

#include <errno.h>
#include <sys/mman.h>

#include <atomic>
#include <cstddef>

extern "C" void __libc_free(void*);

namespace {

constexpr size_t kPage = 4096, kArena = size_t(1) << 42;  // of addresses, not of memory

char* untouchable(void* at, size_t size, int flags) {
  flags |= MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  return static_cast<char*>(mmap(at, size, PROT_NONE, flags, -1, 0));
}

char* arena() {
  static char* const begin = untouchable(nullptr, kArena, 0);
  return begin;
}

std::atomic<size_t> used{0};

}  // namespace

extern "C" {

int posix_memalign(void** result, size_t, size_t size) {
  const size_t pages = (size + sizeof(size_t) + kPage - 1) / kPage * kPage, first = used.fetch_add(pages + kPage);
  char* const begin = arena() + first;
  if (first + pages > kArena || mprotect(begin, pages, PROT_READ | PROT_WRITE)) return ENOMEM;
  *reinterpret_cast<size_t*>(begin) = pages;
  *result = begin + pages - size;
  return 0;
}

void free(void* pointer) {
  char* const at = static_cast<char*>(pointer);
  if (at < arena() || at >= arena() + kArena) return __libc_free(pointer);
  char* const begin = arena() + (at - arena() - sizeof(size_t)) / kPage * kPage;
  untouchable(begin, *reinterpret_cast<size_t*>(begin), MAP_FIXED);
}

}
