// A stand-in for the CUDA driver. Memory of the device is memory of the host, and kernels are functions of the
// emulator, which a test registers by name.
//
// Operations on a stream are recorded and run only when the host waits for the stream, as late as a GPU may run them.
// So a copy from memory that the host has changed meanwhile, or a result that is read without a wait, is wrong.
#include <stdlib.h>
#include <string.h>

#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

typedef long long Index;
typedef unsigned long long Address;

enum { OK = 0, INVALID = 1, MEMORY = 2, NO_DEVICE = 100, BAD_DEVICE = 101, NO_CONTEXT = 201, BAD_HANDLE = 400,
       NOT_FOUND = 500, ILLEGAL_ADDRESS = 700 };

struct Buffer {
  void* data;
  Index bytes;
};
typedef const char* (*Run)(const Buffer*, const Index*, Index, unsigned, int, const int*);

struct Function {
  Run run;
  int pointers, sizes, threads;
};
struct Operation {
  enum Kind { TO_DEVICE, TO_HOST, WITHIN, FILL, LAUNCH } kind;
  Address to, from;
  size_t bytes;
  Function* function;
  Index blocks;
  std::vector<Index> words;
};
struct Stream {
  std::vector<Operation> queue, captured;
  bool captures;
};

static std::recursive_mutex lock;
static std::map<std::string, Function*> functions;
static std::map<Address, size_t> allocations;
static std::set<void*> handles, pinned;
static std::set<Stream*> streams;
static std::map<std::string, long> counts;
static std::map<std::string, std::pair<int, long>> failures;  // error number, number of calls before it
static std::string log_text, message;
static int devices, attributes[128], version, lost, context_token;
static size_t capacity, used;
static unsigned launches;
static thread_local std::vector<void*> current;  // a stack

static int begin(const char* name, bool needs_context) {
  ++counts[name];
  auto found = failures.find(name);
  if (found != failures.end() && found->second.second-- == 0) {
    int number = found->second.first;
    failures.erase(found);
    return number;
  }
  if (lost) return lost;
  return needs_context && (current.empty() || current.back() != &context_token) ? NO_CONTEXT : OK;
}
#define BEGIN(needs_context)                                       \
  std::lock_guard<std::recursive_mutex> locked(lock);              \
  if (int number = begin(__func__, needs_context)) return number

static Buffer rest_of(Address address) {  // the memory from an address to the end of its allocation
  auto found = allocations.upper_bound(address);
  if (found == allocations.begin()) return {0, 0};
  --found;
  Index left = (Index)(found->first + found->second) - (Index)address;
  return {(void*)address, left > 0 ? left : 0};
}

static bool run(const Operation& o) {
  if (o.kind != Operation::TO_HOST && o.kind != Operation::LAUNCH && rest_of(o.to).bytes < (Index)o.bytes) return false;
  if ((o.kind == Operation::TO_HOST || o.kind == Operation::WITHIN) && rest_of(o.from).bytes < (Index)o.bytes)
    return false;
  if (o.kind == Operation::FILL) return memset((void*)o.to, (int)o.from, o.bytes), true;
  if (o.kind != Operation::LAUNCH) return memcpy((void*)o.to, (void*)o.from, o.bytes), true;
  std::vector<Buffer> buffers;
  std::vector<Index> numbers;
  for (int i = 0; i < o.function->pointers; ++i) {
    buffers.push_back(rest_of(o.words[2 * i]));
    numbers.push_back(o.words[2 * i + 1]);
  }
  numbers.insert(numbers.end(), o.words.begin() + 2 * o.function->pointers, o.words.end());
  const char* error = o.function->run(buffers.data(), numbers.data(), o.blocks, ++launches, 1, nullptr);
  if (error) message = error;
  return !error;
}

static int drain(Stream* stream) {
  std::vector<Operation> queue;
  queue.swap(stream->queue);
  for (const Operation& o : queue)
    if (!run(o)) return lost = ILLEGAL_ADDRESS;
  return OK;
}

static int add(void* stream, Operation o, const char* name) {
  Stream* to = (Stream*)stream;
  if (!streams.count(to)) return BAD_HANDLE;
  log_text += std::string(name) + (to->captures ? " captured\n" : "\n");
  (to->captures ? to->captured : to->queue).push_back(o);
  return OK;
}

static void* handle(void* made) {
  handles.insert(made);
  return made;
}

extern "C" {

void stand_in_reset(int count, int major, int minor, size_t bytes, int supported) {
  std::lock_guard<std::recursive_mutex> locked(lock);
  functions.clear(), allocations.clear(), handles.clear(), pinned.clear(), streams.clear(), counts.clear();
  failures.clear(), log_text.clear(), message.clear();
  devices = count, capacity = bytes, used = lost = 0, version = supported, launches = 0;
  memset(attributes, 0, sizeof(attributes));
  attributes[5] = 2147483647, attributes[8] = 49152, attributes[10] = 32, attributes[75] = major, attributes[76] = minor;
}
void stand_in_register(const char* name, Run run, int pointers, int sizes, int threads) {
  functions[name] = new Function{run, pointers, sizes, threads};
}
void stand_in_fail(const char* name, int number, long after) { failures[name] = {number, after}; }
long stand_in_count(const char* name) { return counts[name]; }
long stand_in_used() { return (long)used; }
long stand_in_handles() { return (long)(handles.size() + pinned.size()); }
long stand_in_depth() { return (long)current.size(); }
const char* stand_in_log() { return log_text.c_str(); }
const char* stand_in_message() { return message.c_str(); }

int cuInit(unsigned) { BEGIN(false); return devices ? OK : NO_DEVICE; }
int cuDriverGetVersion(int* made) { BEGIN(false); *made = version; return OK; }
int cuGetErrorName(int number, const char** text) {
  static std::map<int, const char*> names = {{2, "CUDA_ERROR_OUT_OF_MEMORY"}, {100, "CUDA_ERROR_NO_DEVICE"},
      {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"}, {700, "CUDA_ERROR_ILLEGAL_ADDRESS"}, {719, "CUDA_ERROR_LAUNCH_FAILED"}};
  if (!names.count(number)) return INVALID;
  *text = names[number];
  return OK;
}
int cuGetErrorString(int number, const char** text) {
  *text = number == 700 ? "an illegal memory access was encountered" : 0;
  return *text ? OK : INVALID;
}
int cuDeviceGetCount(int* made) { BEGIN(false); *made = devices; return OK; }
int cuDeviceGet(int* made, int number) { BEGIN(false); *made = 70 + number; return number < devices ? OK : BAD_DEVICE; }
int cuDeviceGetName(char* text, int size, int device) {
  BEGIN(false);
  strncpy(text, "stand-in GPU", size);
  return device == 70 ? OK : BAD_DEVICE;
}
int cuDeviceGetAttribute(int* made, int which, int device) {
  BEGIN(false);
  *made = attributes[which];
  return device == 70 && *made ? OK : which == 76 ? OK : INVALID;
}
int cuDevicePrimaryCtxRetain(void** made, int device) {
  BEGIN(false);
  *made = &context_token;
  return device == 70 ? OK : BAD_DEVICE;
}
int cuCtxPushCurrent_v2(void* context) {
  BEGIN(false);
  if (context != &context_token) return NO_CONTEXT;
  current.push_back(context);
  return OK;
}
int cuCtxPopCurrent_v2(void** context) {  // works after a loss, too
  if (current.empty()) return NO_CONTEXT;
  *context = current.back();
  current.pop_back();
  return OK;
}
int cuMemGetInfo_v2(size_t* free, size_t* total) {
  BEGIN(true);
  *free = capacity - used, *total = capacity;
  return OK;
}
int cuMemAlloc_v2(Address* made, size_t bytes) {
  BEGIN(true);
  if (!bytes) return INVALID;
  if (bytes > capacity - used) return MEMORY;
  void* data = aligned_alloc(256, (bytes + 255) / 256 * 256);
  memset(data, 0xa5, bytes);
  allocations[*made = (Address)data] = bytes;
  used += bytes;
  return OK;
}
int cuMemFree_v2(Address address) {
  BEGIN(true);
  auto found = allocations.find(address);
  if (found == allocations.end()) return INVALID;
  for (Stream* stream : streams) drain(stream);  // the driver waits for the device
  used -= found->second;
  free((void*)address);
  allocations.erase(found);
  return OK;
}
int cuMemAllocHost_v2(void** made, size_t bytes) {
  BEGIN(true);
  pinned.insert(*made = malloc(bytes));
  return OK;
}
int cuMemFreeHost(void* data) {
  BEGIN(true);
  if (!pinned.erase(data)) return INVALID;
  free(data);
  return OK;
}
int cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, void* stream) {
  BEGIN(true);
  return add(stream, {Operation::TO_DEVICE, to, (Address)from, bytes}, "to device");
}
int cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, void* stream) {
  BEGIN(true);
  return add(stream, {Operation::TO_HOST, (Address)to, from, bytes}, "to host");
}
int cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, void* stream) {
  BEGIN(true);
  return add(stream, {Operation::WITHIN, to, from, bytes}, "within");
}
int cuMemsetD8Async(Address to, unsigned char value, size_t bytes, void* stream) {
  BEGIN(true);
  return add(stream, {Operation::FILL, to, value, bytes}, "fill");
}
int cuStreamCreate(void** made, unsigned) {
  BEGIN(true);
  Stream* stream = new Stream();
  streams.insert(stream);
  *made = handle(stream);
  return OK;
}
int cuStreamDestroy_v2(void* stream) {
  BEGIN(true);
  if (!handles.erase(stream)) return BAD_HANDLE;
  streams.erase((Stream*)stream);
  return OK;
}
int cuStreamSynchronize(void* stream) {
  BEGIN(true);
  if (!streams.count((Stream*)stream) || ((Stream*)stream)->captures) return BAD_HANDLE;
  log_text += "wait\n";
  return drain((Stream*)stream);
}
int cuStreamBeginCapture_v2(void* stream, int) {
  BEGIN(true);
  if (!streams.count((Stream*)stream)) return BAD_HANDLE;
  ((Stream*)stream)->captures = true;
  return OK;
}
int cuStreamEndCapture(void* stream, void** graph) {
  BEGIN(true);
  Stream* of = (Stream*)stream;
  if (!streams.count(of) || !of->captures) return BAD_HANDLE;
  of->captures = false;
  *graph = handle(new std::vector<Operation>(of->captured));
  of->captured.clear();
  return OK;
}
int cuGraphInstantiateWithFlags(void** made, void* graph, unsigned long long) {
  BEGIN(true);
  if (!handles.count(graph)) return BAD_HANDLE;
  *made = handle(new std::vector<Operation>(*(std::vector<Operation>*)graph));
  return OK;
}
int cuGraphLaunch(void* graph, void* stream) {
  BEGIN(true);
  if (!handles.count(graph) || !streams.count((Stream*)stream)) return BAD_HANDLE;
  log_text += "graph\n";
  for (const Operation& o : *(std::vector<Operation>*)graph) ((Stream*)stream)->queue.push_back(o);
  return OK;
}
int cuGraphDestroy(void* graph) { BEGIN(true); return handles.erase(graph) ? OK : BAD_HANDLE; }
int cuGraphExecDestroy(void* graph) { BEGIN(true); return handles.erase(graph) ? OK : BAD_HANDLE; }
int cuModuleLoadData(void** made, const void* image) {
  BEGIN(true);
  *made = handle(new std::string((const char*)image));
  return OK;
}
int cuModuleUnload(void* module) { BEGIN(true); return handles.erase(module) ? OK : BAD_HANDLE; }
int cuModuleGetFunction(void** made, void* module, const char* name) {
  BEGIN(true);
  if (!handles.count(module)) return BAD_HANDLE;
  const std::string& image = *(std::string*)module;  // machine code, or text that has the kernel
  bool has = image.compare(0, 4, "\x7f" "ELF") == 0 || image.find(std::string(name) + "(") != std::string::npos;
  if (!has || !functions.count(name)) return NOT_FOUND;
  *made = functions[name];
  return OK;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned width, unsigned height, unsigned depth,
                   unsigned shared, void* stream, void** words, void** extra) {
  BEGIN(true);
  Function* f = (Function*)function;
  if (!x || y != 1 || z != 1 || width != (unsigned)f->threads || height != 1 || depth != 1 || shared || extra)
    return INVALID;
  Operation o = {Operation::LAUNCH, 0, 0, 0, f, (Index)x};
  for (int i = 0; i < 2 * f->pointers + f->sizes; ++i) o.words.push_back(*(Index*)words[i]);
  return add(stream, o, "launch");
}

}  // extern "C"
