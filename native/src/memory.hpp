// Zeroed memory for tables: large ones are mapped on their own, so that giving them back gives them to the system.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace kvindex {

inline constexpr size_t kMappedFrom = size_t{64} << 10;

// What an allocation of so many bytes takes from the system.
inline size_t footprint(size_t bytes) {
  constexpr size_t kPage = 4096, kHeapUnit = 16;
  if (bytes >= kMappedFrom) return (bytes + kPage - 1) / kPage * kPage;
  return (bytes + sizeof(size_t) + kHeapUnit - 1) / kHeapUnit * kHeapUnit;
}

// `whole`: all of it will be used soon, so that one call maps it; else each page is mapped when it is touched.
inline void* take_memory(size_t bytes, bool whole = true) {
  if (bytes >= kMappedFrom) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | (whole ? MAP_POPULATE : 0);
    void* made = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (made == MAP_FAILED) throw std::bad_alloc();
    return made;
  }
  void* made = std::calloc(1, bytes);
  if (made == nullptr) throw std::bad_alloc();
  return made;
}

inline void give_memory(void* memory, size_t bytes) {
  if (memory == nullptr) return;
  if (bytes >= kMappedFrom) {
    munmap(memory, bytes);
  } else {
    std::free(memory);
  }
}

// Another size of the same memory, its first bytes kept and what is added zeroed; nothing is done when there is none.
// Mapped memory keeps its pages: nothing is copied.
inline void* resize_memory(void* memory, size_t from, size_t to) {
  if (from >= kMappedFrom && to >= kMappedFrom) {
    void* const moved = mremap(memory, footprint(from), footprint(to), MREMAP_MAYMOVE);
    if (moved == MAP_FAILED) throw std::bad_alloc();
    // The system zeroes whole pages, and of the last one a part may have been in use, of a size before.
    const size_t page_end = std::min(to, footprint(from));
    if (page_end > from) std::memset(static_cast<char*>(moved) + from, 0, page_end - from);
    return moved;
  }
  void* const made = take_memory(std::max<size_t>(to, 1));
  std::memcpy(made, memory, std::min(from, to));
  give_memory(memory, from);
  return made;
}

inline constexpr size_t kHugePage = size_t{2} << 20;

// One huge page where the system has them, else as many small ones: random reads in it cost no page walk each.
inline void* take_huge_page() {
  void* made = mmap(nullptr, kHugePage * 2, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (made == MAP_FAILED) throw std::bad_alloc();
  const auto begin = reinterpret_cast<uintptr_t>(made);
  const uintptr_t aligned = (begin + kHugePage - 1) / kHugePage * kHugePage;
  if (aligned > begin) munmap(made, aligned - begin);
  if (begin + kHugePage > aligned) munmap(reinterpret_cast<void*>(aligned + kHugePage), begin + kHugePage - aligned);
  auto* page = reinterpret_cast<void*>(aligned);
  madvise(page, kHugePage, MADV_HUGEPAGE);
  return page;
}

}  // namespace kvindex
