// An emulator of CUDA blocks: threads are fibers. Included before a kernel's text, which it executes unchanged.
//
// One thread at a time runs as far as it can, in random order: to a barrier, to an exchange, or to its end. So a thread
// that does not wait for the others meets memory that they have not written yet. Shared and private memory begins as NaN.
// Every access is checked against its array. See emulator.cpp for the scheduler.
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

template <class T> struct Array {
  T* data;
  Index count;
  const char* name;
  T& operator[](Index i) const {
    if (i < 0 || i >= count) fail("index out of range", name, i, count);
    return data[i];
  }
  template <class W> W wide(Index i) const {
    Index n = sizeof(W) / sizeof(T);
    if (i < 0 || i + n > count) fail("index out of range", name, i, count);
    if ((unsigned long long)(data + i) % sizeof(W)) fail("address not aligned", name, i, count);
    W word;
    memcpy(&word, data + i, sizeof(W));
    return word;
  }
};

template <class T> Array<T> global(const Buffer& buffer, const char* name) {
  return {(T*)buffer.data, buffer.bytes / (Index)sizeof(T), name};
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
