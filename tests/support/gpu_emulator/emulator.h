// An emulator of CUDA blocks: threads are fibers. Included before a kernel's text, which it executes unchanged.
//
// One thread at a time runs as far as it can, in random order: to a barrier, to an exchange, or to its end. So a thread
// that does not wait for the others meets memory that they have not written yet. Shared and private memory begins as NaN.
// Every access is checked against its array. With EMULATOR_COUNTS, accesses are counted by line. See emulator.cpp for the
// scheduler and the counters.
#pragma once
#include <string.h>

namespace emulator {

typedef long long Index;

// The memory of one argument: `bytes` bytes at `data`.
struct Buffer {
  void* data;
  Index bytes;
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

template <class T> struct Array {
  T* data;
  Index count;
  const char* name;
  bool shared;
  T& operator[](Place at) const {
    Index i = EMULATOR_INDEX(at);
    if (i < 0 || i >= count) fail("index out of range", name, i, count);
    EMULATOR_NOTE(at, name, shared, i * sizeof(T), sizeof(T));
    return data[i];
  }
  template <class W> W wide(Place at) const {
    Index i = EMULATOR_INDEX(at), n = sizeof(W) / sizeof(T);
    if (i < 0 || i + n > count) fail("index out of range", name, i, count);
    EMULATOR_NOTE(at, name, shared, i * sizeof(T), sizeof(W));
    if ((unsigned long long)(data + i) % sizeof(W)) fail("address not aligned", name, i, count);
    W word;
    memcpy(&word, data + i, sizeof(W));
    return word;
  }
};

template <class T> Array<T> global(const Buffer& buffer, const char* name) {
  return {(T*)buffer.data, buffer.bytes / (Index)sizeof(T), name, false};
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
#include "checked_memory.h"
