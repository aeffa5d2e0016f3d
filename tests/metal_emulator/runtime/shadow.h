// Check mode: every memory access of a kernel is looked up in a shadow of the buffers and of threadgroup memory.
//
// Two accesses by different threads are ordered if a barrier for that memory lies between them (a simdgroup_barrier
// within one simdgroup); threads of different threadgroups never are. A pair that is not ordered and contains a write
// is a race, whether or not the schedule at hand makes it visible.
#pragma once
#include "state.h"

enum : uint8_t { WRITTEN = 1, READ = 2, READ_BY_OTHER_SIMDGROUPS = 4, READ_BY_OTHER_LANES = 8, BY_ATOMIC = 16, READ_BY_OTHER_THREADGROUPS = 32 };
struct Cell {  // one element
  uint32_t writer, write_barriers, write_simd_barriers;
  uint32_t reader, read_barriers, read_simd_barriers;
  uint8_t flags;
};
struct ByteReads {  // who has read one byte: the last threadgroup, counted from 1, and a bit per simdgroup of it
  uint32_t threadgroup, simdgroups;
};
struct Region {
  char *begin, *end;
  uint32_t cell_shift, flags;
  int memory;
  std::string name;
  std::vector<Cell> cells;       // of what can be written
  std::vector<ByteReads> reads;  // of buffers
  Buffer* buffer;                // null for threadgroup memory
};

extern "C" __attribute__((visibility("hidden"))) char __ehdr_start, _end;  // this module's own globals lie between

namespace {
std::vector<Region> regions;
size_t n_buffer_regions, last_hit;
}  // namespace

static Region make_region(char* data, uint64_t nbytes, uint32_t cell, uint32_t flags, const char* name) {
  Region region{data, data + nbytes, 0, flags, DEVICE, name, {}, {}, nullptr};
  while (region.cell_shift < 3 && (2u << region.cell_shift) <= cell) region.cell_shift++;
  if (flags & WRITABLE) region.cells.resize((nbytes >> region.cell_shift) + 1);
  return region;
}

void add_threadgroup_region(void* data, uint64_t nbytes, uint32_t cell, const char* name) {
  regions.push_back(make_region((char*)data, nbytes, cell, WRITABLE | STARTS_UNWRITTEN, name));
  regions.back().memory = THREADGROUP;
}

void forget_threadgroup_regions() {
  regions.erase(regions.begin() + n_buffer_regions, regions.end());
  last_hit = 0;
}

static void make_buffer_regions() {
  regions.clear();
  for (uint32_t i = 0; i < launch->n_buffers; i++) {
    Buffer& b = launch->buffers[i];
    regions.push_back(make_region(b.data, b.nbytes, b.cell, b.flags, b.name));
    regions.back().buffer = &b;
    regions.back().reads.resize(b.nbytes);
    b.unwritten = b.read_bytes = b.read_once_bytes = b.read_simd_bytes = b.written_bytes = 0;
  }
  n_buffer_regions = regions.size();
  last_hit = 0;
}

static void finish_buffer_regions() {
  for (Region& r : regions) {
    if (!r.buffer || !(r.flags & STARTS_UNWRITTEN)) continue;
    for (uint64_t c = 0; c < r.buffer->nbytes >> r.cell_shift; c++) r.buffer->unwritten += !(r.cells[c].flags & WRITTEN);
  }
  regions.clear();
}

static Region* find_region(const char* a) {
  if (last_hit < regions.size() && a >= regions[last_hit].begin && a < regions[last_hit].end) return &regions[last_hit];
  for (size_t i = 0; i < regions.size(); i++)
    if (a >= regions[i].begin && a < regions[i].end) return &regions[last_hit = i];
  return nullptr;
}

static void report_out_of_bounds(const char* a, int n, bool is_write, uint64_t pc) {
  const Region* nearest = nullptr;  // overruns go further than underruns
  int64_t nearest_distance = 1 << 24;
  for (const Region& r : regions) {
    int64_t distance = a >= r.end ? a - r.end : a < r.begin ? 16 * (r.begin - a) : 0;
    if (distance < nearest_distance) nearest_distance = distance, nearest = &r;
  }
  const char* what = is_write ? "write" : "read";
  if (!nearest) return msl_fail(0, pc, "out of bounds: %s of %d bytes at a wild address", what, n);
  msl_fail(0, pc, "out of bounds: %s of %d bytes at '%s' + %lld, which has %lld bytes", what, n, nearest->name.c_str(),
           (long long)(a - nearest->begin), (long long)(nearest->end - nearest->begin));
}

static void count_read(Region& r, uint64_t offset, int n) {
  Buffer& b = *r.buffer;
  uint32_t threadgroup = threadgroup_index + 1, simdgroup = 1u << (current->index / LANES);
  b.read_bytes += n;
  for (ByteReads* byte = &r.reads[offset]; n--; byte++) {
    if (!byte->threadgroup) b.read_once_bytes++;
    if (byte->threadgroup != threadgroup) *byte = {threadgroup, 0};
    if (byte->simdgroups & simdgroup) continue;
    byte->simdgroups |= simdgroup;
    b.read_simd_bytes++;
  }
}

static bool same_threadgroup(uint32_t a, uint32_t b) { return a / MAX_THREADS == b / MAX_THREADS; }
static bool same_simdgroup(uint32_t a, uint32_t b) { return a / LANES == b / LANES; }

// Whether what thread `id` did after so many barriers comes before what the current thread does now.
static bool ordered(uint32_t id, uint32_t barriers, uint32_t simd_barriers, int memory) {
  if (id == current->id) return true;
  if (!same_threadgroup(id, current->id)) return false;
  if (barriers < current->barriers[memory]) return true;
  return same_simdgroup(id, current->id) && simd_barriers < current->simd_barriers[memory];
}

static bool ordered_after_reads(const Cell& c, int memory) {
  if (c.flags & READ_BY_OTHER_THREADGROUPS) return false;
  if (!ordered(c.reader, c.read_barriers, c.read_simd_barriers, memory)) return false;
  if (c.read_barriers != current->barriers[memory] || !same_threadgroup(c.reader, current->id)) return true;
  if (c.flags & READ_BY_OTHER_SIMDGROUPS) return false;
  bool before = same_simdgroup(c.reader, current->id) && c.read_simd_barriers < current->simd_barriers[memory];
  return !(c.flags & READ_BY_OTHER_LANES) || before;
}

static void note_read(Cell& c, int memory) {
  const Thread& me = *current;
  bool joins = (c.flags & READ) && c.read_barriers == me.barriers[memory] && same_threadgroup(c.reader, me.id);
  if (joins && c.reader == me.id) return void(c.read_simd_barriers = me.simd_barriers[memory]);
  if (joins) {
    c.flags |= same_simdgroup(c.reader, me.id) ? READ_BY_OTHER_LANES : READ_BY_OTHER_SIMDGROUPS;
    if (me.simd_barriers[memory] > c.read_simd_barriers) c.read_simd_barriers = me.simd_barriers[memory];
  } else {
    if ((c.flags & READ) && !same_threadgroup(c.reader, me.id)) c.flags |= READ_BY_OTHER_THREADGROUPS;
    c.flags = (c.flags & ~(READ_BY_OTHER_LANES | READ_BY_OTHER_SIMDGROUPS)) | READ;
    c.read_barriers = me.barriers[memory];
    c.read_simd_barriers = me.simd_barriers[memory];
  }
  c.reader = me.id;
}

static void check_cell(const Region& r, Cell& c, uint64_t offset, bool is_write, bool is_atomic, uint64_t pc) {
  const char* name = r.name.c_str();
  const char* what = is_write ? "write" : "read";
  bool both_atomic = is_atomic && (c.flags & BY_ATOMIC);
  if (!is_write && (r.flags & STARTS_UNWRITTEN) && !(c.flags & WRITTEN))
    return msl_fail(0, pc, "uninitialised: read of '%s' + %llu, which nothing wrote", name, (unsigned long long)offset);
  if ((c.flags & WRITTEN) && !both_atomic && !ordered(c.writer, c.write_barriers, c.write_simd_barriers, r.memory))
    return msl_fail(0, pc, "race: %s of '%s' + %llu and a write by thread %u of threadgroup %u, with no barrier between", what, name,
                    (unsigned long long)offset, c.writer % MAX_THREADS, c.writer / MAX_THREADS);
  if (!is_write) return note_read(c, r.memory);
  if ((c.flags & READ) && !both_atomic && !ordered_after_reads(c, r.memory))
    return msl_fail(0, pc, "race: write of '%s' + %llu and a read by thread %u of threadgroup %u, with no barrier between", name,
                    (unsigned long long)offset, c.reader % MAX_THREADS, c.reader / MAX_THREADS);
  c.writer = current->id;
  c.write_barriers = current->barriers[r.memory];
  c.write_simd_barriers = current->simd_barriers[r.memory];
  c.flags = WRITTEN | (is_atomic ? BY_ATOMIC : 0);
}

static void check_access(void* address, uint64_t n, bool is_write, bool is_atomic, uint64_t pc) {
  char* a = (char*)address;
  if (!current || (uint64_t)(a - current->stack) < STACK_BYTES) return;  // the host, or the thread's own memory
  Region* r = find_region(a);
  if (!r && a >= &__ehdr_start && a < &_end) return;
  if (!r || a + n > r->end) return report_out_of_bounds(a, (int)n, is_write, pc);
  uint64_t offset = a - r->begin;
  if (is_write && !(r->flags & WRITABLE))
    return msl_fail(0, pc, "read-only: write to input '%s' + %llu", r->name.c_str(), (unsigned long long)offset);
  if (r->buffer && is_write) r->buffer->written_bytes += n;
  if (r->buffer && (!is_write || is_atomic)) count_read(*r, offset, (int)n);
  if (r->cells.empty()) return;
  for (uint64_t c = offset >> r->cell_shift; c <= (offset + n - 1) >> r->cell_shift; c++)
    check_cell(*r, r->cells[c], offset, is_write, is_atomic, pc);
}
