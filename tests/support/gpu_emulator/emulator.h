// An emulator of CUDA blocks: threads are fibers. Included before a kernel's text, which it executes unchanged.
//
// One thread at a time runs as far as it can, in random order: to a barrier, to an exchange, or to its end. So a thread
// that does not wait for the others meets memory that they have not written yet. Several blocks may be alive at once:
// then a random one runs after a barrier, after an exchange, and at random accesses to global memory. Shared and private
// memory begins as NaN. Every access is checked against its array, and accesses to global memory against those of other
// blocks. With EMULATOR_COUNTS, accesses are counted by line. See emulator.cpp for the scheduler, races, asynchronous
// copies and the counters.
#pragma once
#include <string.h>

namespace emulator {

typedef long long Index;

// The memory of one argument: `bytes` bytes at `data`.
struct Buffer {
  void* data;
  Index bytes;
};
// A pointer among a kernel's parameters: the bytes of an element, and true if the kernel writes to it.
struct Parameter {
  const char* name;
  int width;
  bool written;
};
struct Cell;  // the accesses of blocks to an element of global memory
// The memory of one argument in a launch. `cells` is null if races are not checked.
struct Region {
  Buffer buffer;
  const char* name;
  Cell* cells;
};
// A launch: the number of blocks and of threads in a block, the number of blocks that are alive at once, and true if
// each thread runs a task of its own. `checked` has 1 for each pointer whose accesses are checked for races, and 0 for
// others; it is null if no races are checked.
struct Launch {
  Index blocks;
  int threads, together;
  bool slow;
  unsigned seed;
  const int* checked;
};

// End the launch with this message. Does not return.
[[noreturn]] void fail(const char* kind, const char* name, Index index, Index count);
void barrier(int line);
// Return the 8 bytes that thread `thread` of the group passes. All threads must reach the same line.
unsigned long long exchange(unsigned long long value, int thread, int line);
// Return the next shared array of the running thread: `bytes` bytes, the same for all threads of the block.
void* shared(Index bytes);
extern Index block, blocks, thread;

// Count an access of the running thread at a line of the kernel's text, `offset` bytes from the start of an array. On a
// device, arrays are aligned.
void note(int line, const char* name, bool shared, Index offset, Index bytes);
// Begin an iteration of a loop of the running thread, if accesses are counted.
void tick();

// An index, and the line of the kernel's text that has it, if accesses are counted.
#ifdef EMULATOR_COUNTS
struct Place {
  Index i;
  int line;
  Place(Index i, int line = __builtin_LINE()) : i(i), line(line) {}
};
#define EMULATOR_INDEX(place) (place).i
#define EMULATOR_NOTE(place, name, shared, offset, bytes) note((place).line, name, shared, offset, bytes)
#else
typedef Index Place;
#define EMULATOR_INDEX(place) (place)
#define EMULATOR_NOTE(place, name, shared, offset, bytes)
#endif

// An access to `bytes` bytes of an array, `offset` bytes from its start, at element `index` of `count`.
struct Access {
  const char* name;
  Index index, count, offset, bytes;
};
// Number of reads of global memory before another block runs. A write counts as several reads: a block that computes from
// what it has read shows an error if another block runs between the read and the write.
extern Index until_pause;
const int READ = 1, WRITE = 32;
void pause();
extern int copies_in_flight;  // number of asynchronous copies that have not taken effect
// Record an access to an array, whose first byte has the first cell. Fails if it conflicts with another block's.
void record(Cell* cells, bool writes, const Access& access);
// Fail if the access writes to bytes that a copy in flight reads; if races are checked, also if it accesses bytes to which
// such a copy writes.
void check_copies(const void* data, bool writes, const Access& access);
// Begin a copy from global to shared memory, of 4, 8 or 16 bytes. The last `zeros` of them become 0.
void issue_copy(void* to, const void* from, Index bytes, Index zeros);
void commit_group();
// Wait until at most `newest` groups of the thread's copies are in flight.
void wait_group(int newest);

template <class T> struct Plain { typedef T Value; };
template <class T> struct Plain<const T> { typedef T Value; };
template <class T> struct Element;

template <class T> struct Array {
  typedef typename Plain<T>::Value Value;
  T* data;
  Index count;
  const char* name;
  bool shared;
  Cell* cells;

  Element<T> operator[](Place at) const { return {*this, at}; }
  Value read(Place at) const {
    T* from = check(at, 1);
    before(from, false, sizeof(T));
    return *from;
  }
  void write(Place at, Value value) const {
    T* to = check(at, 1);
    before(to, true, sizeof(T));
    *to = value;
  }
  template <class W> W wide(Place at) const {
    T* from = check(at, sizeof(W) / sizeof(T));
    if ((unsigned long long)from % sizeof(W)) fail("address not aligned", name, from - data, count);
    before(from, false, sizeof(W));
    W word;
    memcpy(&word, from, sizeof(W));
    return word;
  }
  // Return the address of `n` elements from an index on, which are accessed next.
  T* check(Place at, Index n) const {
    Index i = EMULATOR_INDEX(at);
    if (i < 0 || i + n > count) fail("index out of range", name, i, count);
    EMULATOR_NOTE(at, name, shared, i * sizeof(T), n * sizeof(T));
    return data + i;
  }
  void before(const T* place, bool writes, Index bytes) const {
    if (!shared && (until_pause -= writes ? WRITE : READ) < 0) pause();
    if (!cells && !copies_in_flight) return;
    Access access = {name, place - data, count, (place - data) * (Index)sizeof(T), bytes};
    if (cells) record(cells, writes, access);
    if (copies_in_flight) check_copies(data, writes, access);
  }
};

// The address of an element: an operand of an asynchronous copy.
template <class T> struct Address {
  const Array<T>& array;
  Place at;
};

template <class T> struct Element {
  typedef typename Plain<T>::Value Value;
  const Array<T>& array;
  Place at;
  operator Value() const { return array.read(at); }
  void operator=(Value value) const { array.write(at, value); }
  void operator=(const Element& other) const { array.write(at, other); }
  Address<T> operator&() const { return {array, at}; }
};

template <class T> Array<T> global(const Region& region) {
  return {(T*)region.buffer.data, region.buffer.bytes / (Index)sizeof(T), region.name, false, region.cells};
}

template <class T, class S> void copy_async(Address<T> to, Address<S> from, Index bytes, Index zeros = 0) {
  const Array<T>& written = to.array;
  const Array<S>& source = from.array;
  if (!written.shared || source.shared) fail("a copy that is not from global to shared memory", written.name, 0, 0);
  if ((bytes != 4 && bytes != 8 && bytes != 16) || zeros < 0 || zeros > bytes)
    fail("an asynchronous copy of this size", written.name, bytes, zeros);
  T* place = written.check(to.at, bytes / sizeof(T));
  S* origin = source.check(from.at, (bytes - zeros) / sizeof(S));
  if ((unsigned long long)place % bytes) fail("address not aligned", written.name, place - written.data, written.count);
  if ((unsigned long long)origin % bytes) fail("address not aligned", source.name, origin - source.data, source.count);
  source.before(origin, false, bytes - zeros);
  written.before(place, true, bytes);
  issue_copy(place, origin, bytes, zeros);
}

template <class T, Index n> struct Private {
  T data[n];
  const char* name;
  Private(const char* name) : name(name) { memset((void*)data, 0xff, sizeof(data)); }
  T& operator[](Index i) {
    if (i < 0 || i >= n) fail("index out of range", name, i, n);
    return data[i];
  }
};

template <class T> T shuffled(T value, int from, int line) {
  unsigned long long sent = 0, received;
  memcpy(&sent, &value, sizeof(T));
  received = exchange(sent, from, line);
  memcpy(&value, &received, sizeof(T));
  return value;
}

template <class T> typename Plain<T>::Value shuffled(const Element<T>& value, int from, int line) {
  return shuffled((typename Plain<T>::Value)value, from, line);
}

inline Index checked_division(Index x, Index y, const char* what) {
  if (x < 0 || y <= 0) fail(what, "an index", x, y);
  return x / y;
}

}  // namespace emulator

#define TREADLE_KERNEL(n) static void
#define TREADLE_CONSTANT static const
#define TREADLE_BLOCK emulator::block
#define TREADLE_BLOCKS emulator::blocks
#define TREADLE_THREAD emulator::thread
#define TREADLE_SHUFFLE(v, t) emulator::shuffled(v, t, __LINE__)
#define TREADLE_BARRIER emulator::barrier(__LINE__)
#define TREADLE_UNROLL
// names of CUDA's <cuda_pipeline.h>
#define __pipeline_memcpy_async(...) emulator::copy_async(__VA_ARGS__)
#define __pipeline_commit() emulator::commit_group()
#define __pipeline_wait_prior(n) emulator::wait_group(n)
#include "checked_memory.h"
