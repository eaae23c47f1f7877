// What -fsanitize=thread calls, in place of its own library, which knows neither lanes nor blocks (races.h).
#define SRCGCNN_RACES
#include "races.h"

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>

namespace {

constexpr int kPage = 4096;

// The last accesses to a byte, as far as they could still race with another one. Times count the barriers of a block,
// and of a warp, so far.
struct Byte {
  uint64_t scope = 0;  // the launch, or of shared memory the block, that all of this is about
  bool written = false, atomic = false, pending = false, read = false, read_by_blocks = false;
  unsigned writer_block, reader_block;
  int writer, reader_warp;
  unsigned written_at_block, written_at_warp, read_at_block, read_at_warp;
  uint32_t warps, lanes;  // that read since the block's last barrier; of `reader_warp`, since its last
  const void *write_from, *read_from;
};

struct Word {  // four bytes, which have the same accesses until one touches some of them alone
  Byte all;
  std::unique_ptr<Byte[]> each;
};

std::unordered_map<uintptr_t, std::unique_ptr<Word[]>> pages;
std::set<std::tuple<const char*, const void*, const void*>> found;
std::string report;
uint64_t scopes = 0, launch = 0, block_scope = 0;
uintptr_t shared_at, shared_size, stack_at, stack_size;
struct Range {
  uintptr_t at, size;
} others[8];
struct Twice {  // a race, unless the second write brings what is there
  uintptr_t at;
  size_t size;
  unsigned char before[64];
  const void *one, *other;
} twice;
int n_others = 0, thread = -1;
unsigned block, block_time, warp_time[32];

Word& word_at(uintptr_t at) {
  static uintptr_t last_page = ~uintptr_t(0);
  static Word* last = nullptr;
  if (at / kPage != last_page) {
    auto& page = pages[at / kPage];
    if (!page) page.reset(new Word[kPage / 4]);
    last = page.get();
    last_page = at / kPage;
  }
  Word& word = last[at % kPage / 4];
  const uint64_t scope = at - shared_at < shared_size ? block_scope : launch;
  if (word.all.scope != scope) {
    word.all = Byte();
    word.all.scope = scope;
    word.each.reset();
  }
  return word;
}

std::string place(const void* code) {
  Dl_info info;
  char line[64] = "?";
  if (dladdr(code, &info))
    snprintf(line, sizeof line, "0x%zx", size_t(static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase)));
  return line;
}

void race(const char* what, uintptr_t at, const void* one, const void* other) {
  if (!found.insert({what, one, other}).second || found.size() > 100) return;
  char where[128];
  const bool shared = at - shared_at < shared_size;
  snprintf(where, sizeof where, " (%s %zu, block %u, thread %d)\n", shared ? "shared byte" : "global byte",
           size_t(shared ? at - shared_at : at), block, thread);
  report += std::string(what) + " " + place(one) + " " + place(other) + where;
}

void settle() {
  if (twice.size && memcmp(reinterpret_cast<const void*>(twice.at), twice.before, twice.size))
    race("written, written:", twice.at, twice.one, twice.other);
  twice.size = 0;
}

enum Kind { kRead, kWrite, kAtomic, kIssue, kArrive };

// An access to the bytes from `first` on, as one of them, or the word that is at `at`, sees it.
void touch(Byte& b, uintptr_t at, uintptr_t first, size_t size, Kind kind, const void* from) {
  const int warp = thread / 32, lane = thread % 32;
  const unsigned warp_now = warp_time[warp];
  const bool writes = kind != kRead;
  if (b.written) {
    const bool unordered = b.writer_block != block ||
                           (b.written_at_block == block_time && b.writer != thread &&
                            (b.writer / 32 != warp || b.written_at_warp == warp_now));
    if (b.pending && !(kind == kArrive && b.writer == thread && b.writer_block == block))
      race("touched while a copy is on its way:", at, b.write_from, from);
    else if (unordered && !writes)
      race("written, read:", at, b.write_from, from);
    else if (unordered && kind == kWrite && size <= sizeof twice.before) {
      twice = {first, size, {}, b.write_from, from};
      memcpy(twice.before, reinterpret_cast<const void*>(first), size);
    } else if (unordered && !(b.atomic && kind == kAtomic))
      race("written, written:", at, b.write_from, from);
  }
  if (writes && b.read) {
    const bool in_block = b.read_at_block == block_time &&
                          ((b.warps & ~(1u << warp)) ||
                           (b.reader_warp == warp && b.read_at_warp == warp_now && (b.lanes & ~(1u << lane))));
    if (b.read_by_blocks || b.reader_block != block || in_block) race("read, written:", at, b.read_from, from);
  }
  if (writes) {
    b.written = true;
    b.atomic = kind == kAtomic;
    b.pending = kind == kIssue;
    b.writer = thread;
    b.writer_block = block;
    b.written_at_block = block_time;
    b.written_at_warp = warp_now;
    b.write_from = from;
    return;
  }
  const bool same_block = b.read && b.reader_block == block, same_time = same_block && b.read_at_block == block_time;
  if (b.read && !same_block) b.read_by_blocks = true;
  if (!same_time) b.warps = 0;
  if (!same_time || b.reader_warp != warp || b.read_at_warp != warp_now) b.lanes = 0;
  b.read = true;
  b.reader_block = block;
  b.read_at_block = block_time;
  b.reader_warp = warp;
  b.read_at_warp = warp_now;
  b.warps |= 1u << warp;
  b.lanes |= 1u << lane;
  b.read_from = from;
}

void touch(uintptr_t at, size_t size, Kind kind, const void* from) {
  if (thread < 0 || at - stack_at < stack_size) return;
  for (int k = 0; k < n_others; ++k)
    if (at - others[k].at < others[k].size) return;
  settle();
  const uintptr_t first = at, end = at + size;
  while (at < end) {
    Word& word = word_at(at);
    const bool whole = at % 4 == 0 && end - at >= 4;
    if (!whole && !word.each) {
      word.each.reset(new Byte[4]);
      for (int k = 0; k < 4; ++k) word.each[k] = word.all;
    }
    touch(word.each ? word.each[at % 4] : word.all, at, first, size, kind, from);
    at += word.each ? 1 : 4;
  }
}

}  // namespace

extern "C" {

void races_launch(const char* shared, size_t size) {
  shared_at = uintptr_t(shared);
  shared_size = size;
  launch = ++scopes;
}
void races_block(unsigned number) {
  block = number;
  block_scope = ++scopes;
  block_time = 0;
  for (unsigned& time : warp_time) time = 0;
}
void races_thread(int number, const void* stack, size_t size) {
  settle();
  thread = number;
  stack_at = uintptr_t(stack);
  stack_size = size;
}
void races_at_warp(int warp) { ++warp_time[warp]; }
void races_at_block() { ++block_time; }
void races_copy(void* to, const void* from, bool arrives, const void* code) {
  if (from) touch(uintptr_t(from), 16, kRead, code);
  touch(uintptr_t(to), 16, arrives ? kArrive : kIssue, code);
}
void races_atomic(const void* at, size_t size, const void* code) { touch(uintptr_t(at), size, kAtomic, code); }
void races_not_of_kernels(const void* at, size_t size) { others[n_others++] = {uintptr_t(at), size}; }

// Lines "kind, code, code (place)", of all races since the last call.
const char* emulated_races() {
  static std::string last;
  last.swap(report);
  report.clear();
  found.clear();
  return last.c_str();
}

#define ACCESS(name, size, kind) \
  void __tsan_##name(void* at) { touch(uintptr_t(at), size, kind, __builtin_return_address(0)); }
#define ACCESSES(size)                 \
  ACCESS(read##size, size, kRead)      \
  ACCESS(write##size, size, kWrite)    \
  ACCESS(unaligned_read##size, size, kRead) \
  ACCESS(unaligned_write##size, size, kWrite)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* at, size_t size) { touch(uintptr_t(at), size, kRead, __builtin_return_address(0)); }
void __tsan_write_range(void* at, size_t size) { touch(uintptr_t(at), size, kWrite, __builtin_return_address(0)); }
void __tsan_vptr_update(void*, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
unsigned char __tsan_atomic8_load(const volatile unsigned char* at, int) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
}
