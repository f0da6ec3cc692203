/* A libcuda.so.1 of one GPU that runs no kernel: it tells on stderr what it is asked to launch.

   Numba CUDA and NVIDIA's Python packages below it run on it as on a driver: contexts, memory, copies,
   modules, and launches with their grid, stream and first arguments. What they ask for and it lacks
   returns CUDA_ERROR_NOT_SUPPORTED.
       cc -shared -fPIC -o FOLDER/libcuda.so.1 pretended_driver.c -ldl; LD_LIBRARY_PATH=FOLDER ...  */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
typedef uint64_t Address;
typedef void *Handle;

enum { NOT_SUPPORTED = 801, INVALID_CONTEXT = 201, ATTRIBUTE_MULTIPROCESSORS = 16 };
static const Handle context = (Handle)0xC0DE;
static __thread Handle stack[64];
static __thread int depth;

static Handle number(void) {
  static uintptr_t last = 0x1000;
  return (Handle)__atomic_add_fetch(&last, 16, __ATOMIC_SEQ_CST);
}

Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int *version) { return *version = 13000, 0; }
Result cuDeviceGetCount(int *count) { return *count = 1, 0; }
Result cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
Result cuDeviceGetName(char *name, int size, int device) {
  return snprintf(name, size, "a pretended GPU"), 0;
}
Result cuDeviceGetUuid_v2(char *uuid, int device) { return memset(uuid, 7, 16), 0; }
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == ATTRIBUTE_MULTIPROCESSORS ? 132 : 1;
  return 0;
}

Result cuDevicePrimaryCtxRetain(Handle *made, int device) { return *made = context, 0; }
Result cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
Result cuCtxGetCurrent(Handle *current) { return *current = depth ? stack[depth - 1] : 0, 0; }
Result cuCtxPushCurrent_v2(Handle pushed) { return stack[depth++] = pushed, 0; }
Result cuCtxSetCurrent(Handle wanted) {
  depth += !depth;
  return stack[depth - 1] = wanted, 0;
}
Result cuCtxPopCurrent_v2(Handle *popped) {
  if (!depth) return INVALID_CONTEXT;
  Handle top = stack[--depth];
  if (popped) *popped = top;
  return 0;
}
Result cuCtxGetDevice(int *device) { return *device = 0, depth ? 0 : INVALID_CONTEXT; }
Result cuCtxSynchronize(void) { return 0; }
Result cuStreamGetCtx(Handle stream, Handle *of) { return *of = context, 0; }
Result cuStreamSynchronize(Handle stream) { return 0; }

Result cuMemGetInfo_v2(size_t *left, size_t *all) { return *left = *all = (size_t)1 << 36, 0; }
Result cuMemAlloc_v2(Address *made, size_t size) {
  return *made = (Address)aligned_alloc(256, (size + 255) / 256 * 256), 0;
}
Result cuMemFree_v2(Address memory) { return free((void *)memory), 0; }
Result cuMemcpyHtoD_v2(Address to, const void *from, size_t size) {
  return depth ? (memcpy((void *)to, from, size), 0) : INVALID_CONTEXT;
}
Result cuMemcpyDtoH_v2(void *to, Address from, size_t size) {
  return depth ? (memcpy(to, (void *)from, size), 0) : INVALID_CONTEXT;
}
Result cuMemcpyHtoDAsync_v2(Address to, const void *from, size_t size, Handle stream) {
  return fprintf(stderr, "copy in on %p\n", stream), cuMemcpyHtoD_v2(to, from, size);
}
Result cuMemcpyDtoHAsync_v2(void *to, Address from, size_t size, Handle stream) {
  return fprintf(stderr, "copy out on %p\n", stream), cuMemcpyDtoH_v2(to, from, size);
}

Result cuLinkCreate_v2(unsigned n, Handle options, Handle values, Handle *made) {
  return *made = number(), 0;
}
Result cuLinkAddData_v2(Handle link, int kind, const char *data, size_t size, const char *name,
                        unsigned n, Handle options, Handle values) {
  return strstr(data, ".maxntid") ? 0 : NOT_SUPPORTED; /* PTX with launch bounds */
}
Result cuLinkComplete(Handle link, void **code, size_t *size) {
  static char elf[64] = "\177ELF";
  return *code = elf, *size = sizeof elf, 0;
}
Result cuLinkDestroy(Handle link) { return 0; }
Result cuLibraryLoadData(Handle *made, const void *code, Handle a, Handle b, unsigned n, Handle c,
                         Handle d, unsigned m) {
  return fprintf(stderr, "module\n"), *made = number(), 0;
}
Result cuLibraryUnload(Handle library) { return 0; }
Result cuLibraryGetKernel(Handle *made, Handle library, const char *name) {
  return *made = number(), 0;
}
Result cuKernelGetFunction(Handle *made, Handle kernel) { return *made = kernel, 0; }
Result cuKernelGetAttribute(int *value, int attribute, Handle kernel, int device) {
  return *value = 1, 0;
}

struct Config { /* CUlaunchConfig */
  unsigned grid[3], block[3], shared;
  Handle stream, attributes;
  unsigned count;
};
Result cuLaunchKernelEx(const struct Config *how, Handle kernel, void **arguments, void **extra) {
  const long long *first = arguments[0], *second = arguments[1], *third = arguments[2];
  if (!depth) return INVALID_CONTEXT;
  fprintf(stderr, "launch %u x %u on %p: %lld %lld %lld\n", how->grid[0], how->block[0], how->stream,
          *first, *second, *third);
  return 0;
}

Result cuGetErrorName(int error, const char **text) {
  return *text = error == INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT" : "CUDA_ERROR", 0;
}
Result cuGetErrorString(int error, const char **text) { return cuGetErrorName(error, text); }

static Result lacking(void) { return NOT_SUPPORTED; }

Result cuGetProcAddress_v2(const char *name, void **found, int version, uint64_t flags, int *status) {
  static const char *const suffixes[] = {"_v3", "_v2", ""};
  static void *self;
  char full[128];
  Dl_info about;
  if (!self && dladdr((void *)cuInit, &about)) self = dlopen(about.dli_fname, RTLD_NOW);
  *found = 0;
  for (int i = 0; i < 3 && !*found; i++) {
    snprintf(full, sizeof full, "%s%s", name, suffixes[i]);
    *found = dlsym(self, full);
  }
  if (!*found) *found = (void *)lacking;
  if (status) *status = 0;
  return 0;
}
