// The scheduler of the emulator: blocks that are alive, one after another or in turns, and their threads, as contexts of
// their own.
#include "emulator.h"

#include <limits.h>
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
const int TOGETHER = 8;  // most blocks that are alive
const int PACES = 10;    // a turn has up to 2^n reads of global memory, for a random n below this
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

struct Copy {
  char* to;
  const char* from;
  Index bytes, zeros;
  int group;
};
struct Thread {
  Context context;
  char* stack;
  State state;
  int line, exchanges, declared, groups;
  long long iterations;
  unsigned long long sent[2];
  std::vector<Copy> copies;  // in flight, in the order of their groups
};
struct Block {
  Index number;
  Thread threads[MOST];
  void* arrays[ARRAYS];
};

Index block, blocks, thread, until_pause;
int copies_in_flight;
static Block* places[TOGETHER];
static Block* current;
static Launch launched;
static Context scheduler, abandoned;
static void (*body)(const Index*, const Region*);
static const Index* arguments;
static std::vector<Region> regions;
static char message[400];
static bool failed, paused;
static unsigned long long random_state;

static unsigned next_random(unsigned below) {  // xorshift64*
  random_state ^= random_state >> 12, random_state ^= random_state << 25, random_state ^= random_state >> 27;
  return (unsigned)((random_state * 2685821657736338717ull) >> 33) % below;
}

static void wait(State state, int line) {
  Thread& self = current->threads[thread];
  self.state = state, self.line = line;
  change(self.context, scheduler);
}

void pause() {
  paused = true;
  change(current->threads[thread].context, scheduler);
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
  Thread& self = current->threads[thread];
  int turn = self.exchanges++ & 1;
  self.sent[turn] = value;
  if (from < 0 || from >= GROUP) fail("no such thread in an exchange", "thread", from, GROUP);
  wait(AT_EXCHANGE, line);
  return current->threads[thread / GROUP * GROUP + from].sent[turn];
}

void* shared(Index bytes) {
  int number = current->threads[thread].declared++;
  if (number >= ARRAYS) fail("too many shared arrays", "shared", number, ARRAYS);
  void*& array = current->arrays[number];
  if (!array) {
    size_t size = (size_t)(bytes + 127) / 128 * 128;
    array = aligned_alloc(128, size);
    memset(array, 0xff, size);
  }
  return array;
}

// Races. Blocks do not wait for each other, so no element of global memory that a block writes may be read or written by
// another one in the same launch. A cell has the accesses to the bytes of the narrowest element. In the slow form, this
// holds for threads in place of blocks.
struct Cell {
  int writer, readers[2];  // numbers of blocks from 1 on; 0 for none
};
static Index cell_bytes;
static std::vector<Cell*> allocated;

static void fail_race(const char* kind, int other, const char* did, const Access& access) {
  char text[200], by[60];
  Index width = launched.slow ? launched.threads : 1, at = other - 1;
  int length = snprintf(by, sizeof(by), "block %lld", at / width);
  if (launched.slow) snprintf(by + length, sizeof(by) - length, ", thread %lld,", at % width);
  snprintf(text, sizeof(text), "%s that %s %s in the same launch", kind, by, did);
  fail(text, access.name, access.index, access.count);
}

void record(Cell* cells, bool writes, const Access& access) {
  int self = (int)(launched.slow ? block * launched.threads + thread : block) + 1;
  for (Index n = access.offset / cell_bytes; n * cell_bytes < access.offset + access.bytes; ++n) {
    Cell& cell = cells[n];
    if (cell.writer && cell.writer != self)
      fail_race(writes ? "a write to an element" : "a read of an element", cell.writer, "wrote", access);
    if (!writes) {
      int slot = cell.readers[0] && cell.readers[0] != self;
      if (!cell.readers[slot]) cell.readers[slot] = self;
      continue;
    }
    for (int reader : cell.readers)
      if (reader && reader != self) fail_race("a write to an element", reader, "read", access);
    cell.writer = self;
  }
}

// Give the regions that are checked their cells: those that overlap share them, and those to which no block writes need
// none.
static void allocate_cells(const Parameter* parameters, const int* checked) {
  std::vector<int> order;
  cell_bytes = 8;
  for (int i = 0; i < (int)regions.size(); ++i) {
    if (checked[i]) order.push_back(i);
    cell_bytes = std::min(cell_bytes, (Index)parameters[i].width);
  }
  const int count = order.size();
  auto begin = [](int i) { return (char*)regions[i].buffer.data; };
  std::sort(order.begin(), order.end(), [&](int i, int j) { return begin(i) < begin(j); });
  for (int first = 0, after; first < count; first = after) {
    char *start = begin(order[first]), *end = start;
    bool written = false;
    for (after = first; after < count && (after == first || begin(order[after]) < end); ++after) {
      end = std::max(end, begin(order[after]) + regions[order[after]].buffer.bytes);
      written |= parameters[order[after]].written;
    }
    if (!written) continue;
    allocated.push_back((Cell*)calloc((end - start) / cell_bytes + 1, sizeof(Cell)));
    for (int i = first; i < after; ++i)
      regions[order[i]].cells = allocated.back() + (begin(order[i]) - start) / cell_bytes;
  }
}

// Asynchronous copies. A copy takes effect when its thread waits for its group; until then, shared memory has the old
// bytes. The hardware may read and write at any moment in between, so other accesses to these bytes are faults.
static void end_copy(const Copy& copy) {
  memcpy(copy.to, copy.from, copy.bytes - copy.zeros);
  memset(copy.to + copy.bytes - copy.zeros, 0, copy.zeros);
  --copies_in_flight;
}

void issue_copy(void* to, const void* from, Index bytes, Index zeros) {
  Thread& self = current->threads[thread];
  self.copies.push_back({(char*)to, (const char*)from, bytes, zeros, self.groups});
  ++copies_in_flight;
}

void commit_group() { ++current->threads[thread].groups; }

void wait_group(int newest) {
  Thread& self = current->threads[thread];
  size_t ended = 0;
  while (ended < self.copies.size() && self.copies[ended].group < self.groups - newest) end_copy(self.copies[ended++]);
  self.copies.erase(self.copies.begin(), self.copies.begin() + ended);
}

void check_copies(const void* data, bool writes, const Access& access) {
  const char *begin = (const char*)data + access.offset, *end = begin + access.bytes;
  auto overlaps = [&](const char* other, Index bytes) { return begin < other + bytes && other < end; };
  for (Block* each : places)
    for (int i = 0; each && i < launched.threads; ++i)
      for (const Copy& copy : each->threads[i].copies) {
        if (writes && overlaps(copy.from, copy.bytes - copy.zeros))
          fail("a write to what an asynchronous copy reads", access.name, access.index, access.count);
        if (launched.checked && overlaps(copy.to, copy.bytes))
          fail(writes ? "a write to what an asynchronous copy writes" : "a read of what an asynchronous copy writes",
               access.name, access.index, access.count);
      }
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
  long long iteration = current->threads[thread].iterations;
  if (turn.first != iteration) turn = {iteration, 0};
  std::vector<unsigned long long>& words = site.pending[{(int)thread / GROUP, iteration, turn.second++}];
  ++site.accesses;
  for (Index word = offset / WORD; word <= (offset + bytes - 1) / WORD; ++word) words.push_back(word);
}

void tick() { ++current->threads[thread].iterations; }

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
  body(arguments, regions.data());
  Thread& self = current->threads[thread];
  if (!self.copies.empty()) fail("asynchronous copies for which no one waits", "copies", self.copies.size(), 0);
  self.state = DONE;
  change(abandoned, scheduler);
}

// Let the ready threads among [begin, end) of the current block run, in random order. Return false if there is none.
static bool run_ready(int begin, int end) {
  int order[MOST], count = 0;
  for (int i = begin; i < end; ++i)
    if (current->threads[i].state == READY) order[count++] = i;
  for (int left = count; left > 0; --left) {
    int picked = next_random(left), i = order[picked];
    order[picked] = order[left - 1];
    thread = i;
    change(scheduler, current->threads[i].context);
    if (failed || paused) return false;
  }
  return count > 0;
}

static bool all_at(int begin, int end, State state) {
  const Thread* threads = current->threads;
  for (int i = begin; i < end; ++i)
    if (threads[i].state != state || threads[i].line != threads[begin].line) return false;
  return true;
}

static void release(int begin, int end) {
  for (int i = begin; i < end; ++i) current->threads[i].state = READY;
}

// Return true if another block runs next: with a chance of 1 in `chances`, if several are alive.
static bool is_turn_over(unsigned chances) { return launched.together > 1 && !next_random(chances); }

static void begin_block(Index number) {
  current->number = number;
  for (int i = 0; i < launched.threads; ++i) {
    Thread& t = current->threads[i];
    if (!t.stack) t.stack = (char*)malloc(STACK);
    prepare(t.context, t.stack, STACK, run_thread);
    t.state = READY, t.line = t.exchanges = t.declared = t.groups = 0, t.iterations = 0;
  }
}

static void end_block() {
  for (int i = 0; i < ARRAYS && current->arrays[i]; ++i) free(current->arrays[i]), current->arrays[i] = 0;
  for (int i = 0; i < launched.threads; ++i) current->threads[i].copies.clear();
}

// Let the current block run, to its end or to the turn of another one. Return true if it ended.
static bool run_block() {
  const int count = launched.threads;
  paused = false;
  block = current->number;
  until_pause = launched.together > 1 ? next_random(1u << next_random(PACES)) : LLONG_MAX;
  while (true) {
    bool ran = false;
    int groups = (count + GROUP - 1) / GROUP, start = next_random(groups);
    for (int g = 0; g < groups; ++g) {
      int begin = (start + g) % groups * GROUP, end = begin + GROUP < count ? begin + GROUP : count;
      while (run_ready(begin, end)) {  // this group runs as far as it can
        ran = true;
        if (!all_at(begin, end, AT_EXCHANGE)) continue;
        release(begin, end);
        if (is_turn_over(4)) return false;
      }
      if (failed || paused) return false;
    }
    if (ran) continue;
    if (all_at(0, count, AT_BARRIER)) {
      release(0, count);
      if (is_turn_over(2)) return false;
      continue;
    }
    int done = 0, lines[2] = {0, 0};
    for (const Thread *t = current->threads; t < current->threads + count; ++t) {
      done += t->state == DONE;
      if (t->state != DONE) lines[lines[0] && t->line != lines[0]] = t->line;
    }
    if (done == count) return true;
    snprintf(message, sizeof(message), "threads of block %lld wait at different places: lines %d and %d, %d have ended",
             block, lines[0], lines[1], done);
    failed = true;
    return false;
  }
}

// Run all blocks, in an order that the seed determines: one starts when less than `together` are alive.
static void run_blocks() {
  std::vector<Index> waiting;
  std::vector<Block*> alive, idle(places, places + launched.together);
  for (Index i = 0; i < blocks; ++i) waiting.push_back(i);
  while (!failed) {
    for (; !waiting.empty() && !idle.empty(); waiting.pop_back(), idle.pop_back()) {
      std::swap(waiting[next_random(waiting.size())], waiting.back());
      alive.push_back(current = idle.back());
      begin_block(waiting.back());
    }
    if (alive.empty()) return;
    std::swap(alive[alive.size() > 1 ? next_random(alive.size()) : 0], alive.back());
    current = alive.back();
    if (!run_block()) continue;
    count_block(), end_block();
    idle.push_back(current), alive.pop_back();
  }
  for (Block* each : alive) current = each, end_block();
}

// Run a kernel. Return its error, or null.
const char* launch(void (*kernel)(const Index*, const Region*), const Index* numbers, const Buffer* buffers,
                   const Parameter* parameters, int count, const Launch& how) {
  body = kernel, arguments = numbers, launched = how, blocks = how.blocks, failed = false, copies_in_flight = 0;
  launched.together = std::max(1, std::min(how.together, TOGETHER));
  random_state = how.seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;
  for (int i = 0; i < launched.together; ++i)
    if (!places[i]) places[i] = new Block();
  regions.clear();
  for (int i = 0; i < count; ++i) regions.push_back({buffers[i], parameters[i].name, 0});
  if (how.checked) allocate_cells(parameters, how.checked);
  run_blocks();
  for (Cell* cells : allocated) free(cells);
  allocated.clear();
  return failed ? message : 0;
}

}  // namespace emulator
