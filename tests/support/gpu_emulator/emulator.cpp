// The scheduler of the emulator: the threads of one block at a time, as contexts of their own.
#include "emulator.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulator {

enum State { READY, AT_BARRIER, AT_EXCHANGE, DONE };
const int MOST = 1024, GROUP = 32, ARRAYS = 256;
const size_t STACK = 256 << 10;

// A context is the top of a stack with the saved registers. `swapcontext` makes two system calls for each switch.
#ifdef __x86_64__
typedef void* Context;
extern "C" void emulator_switch(Context* from, Context to);
asm(R"(
.text
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
static void change(Context& from, Context& to) { emulator_switch(&from, to); }
static void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
  void** top = (void**)((uintptr_t)(stack + size) & ~(uintptr_t)15);
  *--top = 0;  // the stack is aligned as after a call
  *--top = (void*)entry;
  for (int i = 0; i < 6; ++i) *--top = 0;
  context = top;
}
#else
typedef ucontext_t Context;
static void change(Context& from, Context& to) { swapcontext(&from, &to); }
static void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack, context.uc_stack.ss_size = size, context.uc_link = 0;
  makecontext(&context, entry, 0);
}
#endif

struct Thread {
  Context context;
  char* stack;
  State state;
  int line, exchanges, declared;
  long long iterations;
  unsigned long long sent[2];
};

Index block, blocks, thread;
static Thread threads[MOST];
static Context scheduler, abandoned;
static void (*body)(void*);
static void* arguments;
static char message[400];
static bool failed;
static void* arrays[ARRAYS];
static unsigned long long random_state;

static unsigned next_random(unsigned below) {  // xorshift64*
  random_state ^= random_state >> 12, random_state ^= random_state << 25, random_state ^= random_state >> 27;
  return (unsigned)((random_state * 2685821657736338717ull) >> 33) % below;
}

static void wait(State state, int line) {
  Thread& self = threads[thread];
  self.state = state, self.line = line;
  change(self.context, scheduler);
}

void fail(const char* kind, const char* name, Index index, Index count) {
  snprintf(message, sizeof(message), "%s: %s, %lld of %lld, in thread %lld of block %lld", kind, name, index, count,
           thread, block);
  failed = true;
  change(abandoned, scheduler);
  abort();
}

void barrier(int line) { wait(AT_BARRIER, line); }

unsigned long long exchange(unsigned long long value, int from, int line) {
  Thread& self = threads[thread];
  int turn = self.exchanges++ & 1;
  self.sent[turn] = value;
  if (from < 0 || from >= GROUP) fail("no such thread in an exchange", "thread", from, GROUP);
  wait(AT_EXCHANGE, line);
  return threads[thread / GROUP * GROUP + from].sent[turn];
}

void* shared(Index bytes) {
  int number = threads[thread].declared++;
  if (number >= ARRAYS) fail("too many shared arrays", "shared", number, ARRAYS);
  if (!arrays[number]) {
    size_t size = (size_t)(bytes + 127) / 128 * 128;
    arrays[number] = aligned_alloc(128, size);
    memset(arrays[number], 0xff, size);
  }
  return arrays[number];
}

// Counters. An instruction is the n-th access of each thread of a group to an array at a line, in one iteration of the
// loops around it: the threads of a group take the same branches, so they are in iterations of the same number.
struct Instruction {
  int group;
  long long iteration;
  int turn;
  bool operator<(const Instruction& other) const {
    if (group != other.group) return group < other.group;
    return iteration != other.iteration ? iteration < other.iteration : turn < other.turn;
  }
};
struct Site {
  long long instructions, accesses, units, least;
  std::map<Index, std::pair<long long, int>> turns;  // of each thread: its iteration, and its accesses in it
  std::map<Instruction, std::vector<unsigned long long>> pending;  // the words that its threads access
};
static std::map<std::pair<int, std::string>, Site> sites[2];  // of global and of shared memory
static std::string counted;
const int WORD = 4, SECTOR = 32, BANKS = 32;

void note(int line, const char* name, bool shared, Index offset, Index bytes) {
  Site& site = sites[shared][{line, name}];
  std::pair<long long, int>& turn = site.turns[thread];
  long long iteration = threads[thread].iterations;
  if (turn.first != iteration) turn = {iteration, 0};
  std::vector<unsigned long long>& words = site.pending[{(int)thread / GROUP, iteration, turn.second++}];
  ++site.accesses;
  for (Index word = offset / WORD; word <= (offset + bytes - 1) / WORD; ++word) words.push_back(word);
}

void tick() { ++threads[thread].iterations; }

static void keep_unique(std::vector<unsigned long long>& numbers) {
  std::sort(numbers.begin(), numbers.end());
  numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
}

static void count_block() {
  for (int shared = 0; shared < 2; ++shared)
    for (auto& found : sites[shared]) {
      Site& site = found.second;
      for (auto& each : site.pending) {
        std::vector<unsigned long long>& words = each.second;
        keep_unique(words);
        ++site.instructions;
        if (shared) {
          int of_bank[BANKS] = {}, most = 0;
          for (unsigned long long word : words) most = std::max(most, ++of_bank[word % BANKS]);
          int least = ((int)words.size() + BANKS - 1) / BANKS;
          site.units += most, site.least += least;
        } else {
          site.least += (words.size() * WORD + SECTOR - 1) / SECTOR;
          for (unsigned long long& word : words) word /= SECTOR / WORD;
          keep_unique(words);
          site.units += words.size();
        }
      }
      site.pending.clear(), site.turns.clear();
    }
}

// Return the counters as lines of "shared line name instructions accesses units least", and set them to 0. A unit is a
// sector of global memory, or a cycle of shared memory.
const char* counters() {
  counted.clear();
  for (int shared = 0; shared < 2; ++shared) {
    for (auto& found : sites[shared]) {
      const Site& s = found.second;
      char text[300];
      snprintf(text, sizeof(text), "%d %d %s %lld %lld %lld %lld\n", shared, found.first.first,
               found.first.second.c_str(), s.instructions, s.accesses, s.units, s.least);
      counted += text;
    }
    sites[shared].clear();
  }
  return counted.c_str();
}

static void run_thread() {
  body(arguments);
  threads[thread].state = DONE;
  change(abandoned, scheduler);
}

// Let the ready threads among [begin, end) run, in random order. Return false if there is none.
static bool run_ready(int begin, int end) {
  int order[MOST], count = 0;
  for (int i = begin; i < end; ++i)
    if (threads[i].state == READY) order[count++] = i;
  for (int left = count; left > 0; --left) {
    int picked = next_random(left), i = order[picked];
    order[picked] = order[left - 1];
    thread = i;
    change(scheduler, threads[i].context);
    if (failed) return false;
  }
  return count > 0;
}

static bool all_at(int begin, int end, State state) {
  for (int i = begin; i < end; ++i)
    if (threads[i].state != state || threads[i].line != threads[begin].line) return false;
  return true;
}

static void release(int begin, int end) {
  for (int i = begin; i < end; ++i) threads[i].state = READY;
}

static void run_block(int count) {
  for (int i = 0; i < ARRAYS && arrays[i]; ++i) free(arrays[i]), arrays[i] = 0;
  for (int i = 0; i < count; ++i) {
    Thread& t = threads[i];
    if (!t.stack) t.stack = (char*)malloc(STACK);
    prepare(t.context, t.stack, STACK, run_thread);
    t.state = READY, t.line = t.exchanges = t.declared = 0, t.iterations = 0;
  }
  while (true) {
    bool ran = false;
    int groups = (count + GROUP - 1) / GROUP, start = next_random(groups);
    for (int g = 0; g < groups && !failed; ++g) {
      int begin = (start + g) % groups * GROUP, end = begin + GROUP < count ? begin + GROUP : count;
      while (run_ready(begin, end) && !failed) {  // this group runs as far as it can
        ran = true;
        if (all_at(begin, end, AT_EXCHANGE)) release(begin, end);
      }
    }
    if (failed) return;
    if (ran) continue;
    if (all_at(0, count, AT_BARRIER)) {
      release(0, count);
      continue;
    }
    int done = 0, lines[2] = {0, 0};
    for (int i = 0; i < count; ++i) {
      done += threads[i].state == DONE;
      if (threads[i].state != DONE) lines[lines[0] && threads[i].line != lines[0]] = threads[i].line;
    }
    if (done == count) return;
    snprintf(message, sizeof(message), "threads of block %lld wait at different places: lines %d and %d, %d have ended",
             block, lines[0], lines[1], done);
    failed = true;
    return;
  }
}

// Run a kernel on `count` blocks of `width` threads, in an order that `seed` determines. Return its error, or null.
const char* launch(void (*kernel)(void*), void* given, Index count, int width, unsigned seed) {
  body = kernel, arguments = given, blocks = count, failed = false;
  random_state = seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;
  Index* order = (Index*)malloc(sizeof(Index) * count);
  for (Index i = 0; i < count; ++i) order[i] = i;
  for (Index left = count; left > 0 && !failed; --left) {
    unsigned picked = next_random(left);
    block = order[picked];
    order[picked] = order[left - 1];
    run_block(width);
    count_block();
  }
  free(order);
  return failed ? message : 0;
}

}  // namespace emulator
