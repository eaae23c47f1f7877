// Lanes run one after the other here, so a warp's access is put together afterwards: of the lanes' accesses by one instruction
// between two barriers of the block the first ones, the second ones, and so on. Where lanes go round a loop a different number
// of times this may put other rounds together than a GPU does.
//
// Shared memory: 32 banks of a word; vectors of 8 or 16 bytes are served for a half or a quarter of the lanes at a time. A
// wavefront serves one word of each bank. Other memory: sectors of 32 bytes, in lines of 128.
#include "traffic.h"

#include <algorithm>
#include <set>
#include <unordered_map>

#include "emulation.h"

namespace {

constexpr int kLanes = 32, kBanks = 32;
using Key = uint64_t;  // an instruction, and whether it is shared memory's part: a copy has both
struct Access {
  Key key;
  uint64_t at;
  int size;
};
struct WarpAccess {
  uint64_t at[kLanes];
  uint32_t lanes = 0;
  int size;
};
struct Sum {
  int size;
  int64_t accesses = 0, lanes = 0, wavefronts = 0, conflicts = 0, sectors = 0, least_sectors = 0, lines = 0;
};
std::vector<Access> seen[emulation::kMostThreads];
std::unordered_map<Key, Sum> sums;
std::string text;
unsigned block;
int launch = -1;
int64_t barriers[emulation::kMostThreads], barriers_of_block;

bool is_shared(Key key) { return key & 1; }

void add(Key key, const WarpAccess& access) {
  Sum& sum = sums[key];
  sum.size = access.size;
  ++sum.accesses;
  sum.lanes += __builtin_popcount(access.lanes);
  const auto there = [&](int lane) { return access.lanes >> lane & 1; };
  if (is_shared(key)) {
    const int parts = std::max(access.size / 4, 1), each = kLanes / parts;
    for (int part = 0; part < parts; ++part) {
      std::set<uint64_t> words[kBanks];
      size_t most = 0;
      for (int lane = part * each; lane < (part + 1) * each; ++lane)
        for (uint64_t word = access.at[lane] / 4; there(lane) && word <= (access.at[lane] + access.size - 1) / 4; ++word) {
          auto& bank = words[word % kBanks];
          bank.insert(word);
          most = std::max(most, bank.size());
        }
      sum.wavefronts += most;
      sum.conflicts += most ? most - 1 : 0;
    }
    return;
  }
  std::set<uint64_t> places, sectors, lines;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!there(lane)) continue;
    places.insert(access.at[lane]);  // of equal size and alignment, so that they are the same or apart
    sectors.insert(access.at[lane] / 32);
    lines.insert(access.at[lane] / 128);
  }
  sum.sectors += sectors.size();
  sum.least_sectors += (places.size() * access.size + 31) / 32;
  sum.lines += lines.size();
}

void put_together() {
  for (int first = 0; first < emulation::kMostThreads; first += kLanes) {
    std::unordered_map<Key, std::vector<WarpAccess>> of_warp;
    for (int lane = 0; lane < kLanes; ++lane) {
      std::unordered_map<Key, size_t> counts;
      for (const Access& access : seen[first + lane]) {
        auto& found = of_warp[access.key];
        const size_t number = counts[access.key]++;
        if (found.size() <= number) found.resize(number + 1);
        WarpAccess& all = found[number];
        all.at[lane] = access.at;
        all.lanes |= 1u << lane;
        all.size = access.size;
      }
      seen[first + lane].clear();
    }
    for (const auto& [key, found] : of_warp)
      for (const WarpAccess& access : found) add(key, access);
  }
}

void in_this_block() {
  if (block == blockIdx.x && launch == emulation::launches) return;
  put_together();
  block = blockIdx.x;
  launch = emulation::launches;
  std::fill(barriers, barriers + emulation::kMostThreads, 0);
  barriers_of_block = 0;
}

}  // namespace

void traffic_access(bool shared, uint64_t at, int size, const char* where) {
  in_this_block();
  seen[emulation::current].push_back({reinterpret_cast<Key>(where) * 2 + shared, at, size});
}

// After the barrier: what all threads did before it is complete when the first of them goes on.
void traffic_barrier() {
  in_this_block();
  if (++barriers[emulation::current] <= barriers_of_block) return;
  barriers_of_block = barriers[emulation::current];
  put_together();
}

// Since the last call, a line an instruction: what it is, whether it is of shared memory, bytes a lane, and the sums.
extern "C" const char* emulated_traffic() {
  put_together();
  text.clear();
  for (const auto& [key, sum] : sums) {
    text += reinterpret_cast<const char*>(key / 2);
    for (const int64_t x : {int64_t(is_shared(key)), int64_t(sum.size), sum.accesses, sum.lanes, sum.wavefronts, sum.conflicts, sum.sectors,
                            sum.least_sectors, sum.lines})
      text += "\t" + std::to_string(x);
    text += "\n";
  }
  sums.clear();
  return text.c_str();
}
