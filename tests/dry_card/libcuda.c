// A stand-in for libcuda.so.1 (NVIDIA H100): every call that Triton's driver makes succeeds where a card's would, and
// nothing runs. It keeps a log of launches, with the bytes of every parameter, reads registers and local memory out of
// the machine code, and refuses what a card refuses: impossible grids, too much shared memory, tensor maps against the
// documented rules, streams and modules of another device, pointers to memory that was freed or is another device's.
#include <elf.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

enum { DEVICES = 2, PARAMETERS = 512, SHARED_OPTIN = 232448, REGISTERS = 65536 };

// Both structures are read by card.py, field by field.
typedef struct {
  char name[256];
  int32_t registers, local_bytes, device, parameters;
  uint16_t offsets[PARAMETERS], sizes[PARAMETERS];
  int32_t parameter_bytes, dynamic_shared;
  const unsigned char *image;
  uint64_t image_bytes;
} Function;

typedef struct {
  const Function *function;
  uint32_t grid[3], threads, shared, cluster, dependent, cooperative;
  int32_t device;
  uint64_t stream;
  unsigned char *parameters;
} Launch;

typedef struct {
  unsigned char *image;
  uint64_t bytes;
  int device;
} Module;

// What a tensor map holds here: enough to compare two, and to find the tensor.
typedef struct {
  uint64_t address, dims[5], strides[4];
  uint32_t box[5];
  uint8_t rank, type, swizzle, fill;
} TensorMap;
_Static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap), "a stand-in map fits where a map does");

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Launch *log_entries;
static uint64_t log_size, log_capacity, launches, modules, maps;
static int recording = 1;
static int contexts[DEVICES];
static _Thread_local int current;
static _Thread_local char reason[512] = "invalid argument";

// Set by the stand-in device: whose live memory an address is; -1 where it knows nothing, -2 where it was freed.
static int (*owner_of)(uint64_t);

int dry_device(void) { return current; }
void dry_set_device(int device) { current = device; }
void dry_set_owner(int (*owner)(uint64_t)) { owner_of = owner; }
void dry_record(int on) { recording = on; }
uint64_t dry_launches(void) { return launches; }
uint64_t dry_modules(void) { return modules; }
uint64_t dry_maps(void) { return maps; }
uint64_t dry_logged(void) { return log_size; }
const Launch *dry_entry(uint64_t i) { return &log_entries[i]; }

static CUresult refuse(CUresult code, const char *format, const char *name, long long value) {
  snprintf(reason, sizeof reason, format, name, value);
  return code;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = reason;
  return CUDA_SUCCESS;
}

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)&contexts[device];
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) { return cuDevicePrimaryCtxRetain(context, current); }
CUresult cuCtxSetCurrent(CUcontext context) { current = (int)((int *)context - contexts); return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = current; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction function, const CUlaunchConfig *config) {
  *n = 132;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch ((int)attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED_OPTIN; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = REGISTERS; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = 1980000; break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 2619000; break;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 5120; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    default: *value = 1;
  }
  return CUDA_SUCCESS;
}

// The address itself, where it was ever given out: of freed memory a card's driver knows no more either.
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr address) {
  int owner = owner_of ? owner_of(address) : -1;
  if (address && owner == -1)
    return refuse(CUDA_ERROR_INVALID_VALUE, "%s: not memory of a device (%llx)", "a pointer", address);
  memcpy(data, &address, sizeof address);
  return CUDA_SUCCESS;
}

// ---- Machine code: Triton's images hold one kernel

// Calls visit(attribute, value, size, to) for every sized attribute of every section whose name begins so.
static int attributes(const unsigned char *image, const char *section,
                      void (*visit)(int, const unsigned char *, int, Function *), Function *to) {
  const Elf64_Ehdr *header = (const Elf64_Ehdr *)image;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + header->e_shoff);
  const char *names = (const char *)image + sections[header->e_shstrndx].sh_offset;
  for (int i = 0; i < header->e_shnum; i++) {
    if (strcmp(names + sections[i].sh_name, section)) continue;
    const unsigned char *at = image + sections[i].sh_offset, *end = at + sections[i].sh_size;
    while (at + 4 <= end) {
      int sized = at[0] == 4, size = at[2] | at[3] << 8;  // EIFMT_SVAL; of other formats the value is the size
      if (sized) visit(at[1], at + 4, size, to);
      at += 4 + (sized ? size : 0);
    }
  }
  return 1;
}
static void resources(int attribute, const unsigned char *value, int size, Function *to) {
  int32_t found;
  memcpy(&found, value + 4, 4);
  if (attribute == 0x2f) to->registers = found;                                        // EIATTR_REGCOUNT
  if (attribute == 0x12 && found > to->local_bytes) to->local_bytes = found;           // EIATTR_MIN_STACK_SIZE
}
static void parameter(int attribute, const unsigned char *value, int size, Function *to) {
  if (attribute != 0x17) return;  // EIATTR_KPARAM_INFO: index, ordinal, offset, and the size in the highest 14 bits
  uint16_t ordinal, offset;
  uint32_t bits;
  memcpy(&ordinal, value + 4, 2), memcpy(&offset, value + 6, 2), memcpy(&bits, value + 8, 4);
  if (ordinal >= PARAMETERS) return;
  to->offsets[ordinal] = offset, to->sizes[ordinal] = bits >> 18;
  if (ordinal >= to->parameters) to->parameters = ordinal + 1;
  if (offset + to->sizes[ordinal] > to->parameter_bytes) to->parameter_bytes = offset + to->sizes[ordinal];
}

static uint64_t max(uint64_t a, uint64_t b) { return a > b ? a : b; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  const Elf64_Ehdr *header = image;
  if (memcmp(header->e_ident, ELFMAG, SELFMAG))
    return refuse(CUDA_ERROR_INVALID_IMAGE, "%s%.0lld", "no machine code", 0);
  const Elf64_Shdr *sections = (const Elf64_Shdr *)((const char *)image + header->e_shoff);
  uint64_t bytes = header->e_shoff + (uint64_t)header->e_shnum * header->e_shentsize;
  if (header->e_phoff) bytes = max(bytes, header->e_phoff + (uint64_t)header->e_phnum * header->e_phentsize);
  for (int i = 0; i < header->e_shnum; i++) {
    uint64_t end = sections[i].sh_offset + (sections[i].sh_type == SHT_NOBITS ? 0 : sections[i].sh_size);
    bytes = max(bytes, end);
  }
  Module *made = malloc(sizeof *made);
  made->image = memcpy(malloc(bytes), image, bytes), made->bytes = bytes, made->device = current;
  __atomic_add_fetch(&modules, 1, __ATOMIC_RELAXED);
  *module = (CUmodule)made;
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  Function *made = calloc(1, sizeof *made);
  char section[300];
  snprintf(made->name, sizeof made->name, "%s", name);
  const Module *from = (const Module *)module;
  made->image = from->image, made->image_bytes = from->bytes, made->device = from->device;
  snprintf(section, sizeof section, ".nv.info.%s", name);
  attributes(made->image, ".nv.info", resources, made);
  if (!attributes(made->image, section, parameter, made) || !made->registers)
    return refuse(CUDA_ERROR_NOT_FOUND, "no kernel %s in the image%.0lld", name, 0);
  *function = (CUfunction)made;
  return CUDA_SUCCESS;
}
static int registers_of_a_thread(const Function *f) { return (f->registers + 7) / 8 * 8; }
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  const Function *f = (const Function *)function;
  int threads = REGISTERS / registers_of_a_thread(f) / 32 * 32;
  *value = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS               ? f->registers
           : attribute == CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES     ? f->local_bytes
           : attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? (threads > 1024 ? 1024 : threads)
                                                                 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) ((Function *)function)->dynamic_shared = value;
  return CUDA_SUCCESS;
}

// ---- Launches

// The handle of a stream says its device (device.cpp makes them): 0 is the default one of whatever device is current.
static int device_of_stream(uint64_t stream) { return stream ? (int)(stream >> 32) - 1 : current; }

static void add_to_log(Launch made) {
  pthread_mutex_lock(&lock);
  if (log_size == log_capacity)
    log_entries = realloc(log_entries, (log_capacity = 2 * log_capacity + 64) * sizeof *log_entries);
  log_entries[log_size++] = made;
  pthread_mutex_unlock(&lock);
}

// An operation of PyTorch, of which a card gets a kernel as well: its name stands in the log, and nothing else.
void dry_operation(const char *name, uint64_t stream) {
  static Function *known[1024];
  if (!recording) return;
  pthread_mutex_lock(&lock);
  int i = 0;
  while (known[i] && strcmp(known[i]->name, name)) i++;
  if (!known[i]) {
    known[i] = calloc(1, sizeof **known);
    snprintf(known[i]->name, sizeof known[i]->name, "%s", name);
  }
  pthread_mutex_unlock(&lock);
  add_to_log((Launch){.function = known[i], .device = current, .stream = stream});
}

static CUresult check_pointers(const Function *f, const unsigned char *bytes) {
  for (int i = 0; i < f->parameters; i++) {
    if (f->sizes[i] != 8 && f->sizes[i] != sizeof(CUtensorMap)) continue;
    uint64_t address;
    memcpy(&address, bytes + f->offsets[i], 8);  // a stand-in map begins with its address
    int owner = owner_of(address);
    if (owner == -2) return refuse(CUDA_ERROR_ILLEGAL_ADDRESS, "%s: parameter %lld points to freed memory", f->name, i);
    if (owner >= 0 && owner != f->device)
      return refuse(CUDA_ERROR_ILLEGAL_ADDRESS, "%s: parameter %lld points to another device", f->name, i);
  }
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **parameters, void **extra) {
  const Function *f = (const Function *)function;
  uint64_t stream = (uint64_t)c->hStream;
  int device = device_of_stream(stream);
  unsigned x = c->gridDimX, y = c->gridDimY, z = c->gridDimZ;
  if (f->device != device)
    return refuse(CUDA_ERROR_INVALID_HANDLE, "%s: loaded on another device than %lld", f->name, device);
  if (!x || !y || !z || x > 2147483647u || y > 65535 || z > 65535)
    return refuse(CUDA_ERROR_INVALID_VALUE, "%s: no such grid (y is %lld)", f->name, y);
  if (c->sharedMemBytes > SHARED_OPTIN || (c->sharedMemBytes > 49152 && (int)c->sharedMemBytes > f->dynamic_shared))
    return refuse(CUDA_ERROR_INVALID_VALUE, "%s: %lld bytes of shared memory", f->name, c->sharedMemBytes);
  if (registers_of_a_thread(f) * c->blockDimX > REGISTERS)
    return refuse(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "%s: too many registers for %lld threads", f->name, c->blockDimX);
  if (!parameters) return refuse(CUDA_ERROR_NOT_SUPPORTED, "%s: parameters in one block%.0lld", f->name, 0);
  __atomic_add_fetch(&launches, 1, __ATOMIC_RELAXED);
  if (!recording) return CUDA_SUCCESS;

  Launch made = {.function = f, .grid = {x, y, z}, .threads = c->blockDimX, .shared = c->sharedMemBytes, .cluster = 1,
                 .device = device, .stream = stream, .parameters = calloc(1, f->parameter_bytes + 1)};
  for (unsigned i = 0; i < c->numAttrs; i++) {
    const CUlaunchAttribute *a = &c->attrs[i];
    if (a->id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) made.cluster = a->value.clusterDim.x;
    if (a->id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION) made.dependent = 1;
    if (a->id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE) made.cooperative = 1;
  }
  for (int i = 0; i < f->parameters; i++) memcpy(made.parameters + f->offsets[i], parameters[i], f->sizes[i]);
  CUresult wrong = owner_of ? check_pointers(f, made.parameters) : CUDA_SUCCESS;
  if (wrong) return free(made.parameters), wrong;

  add_to_log(made);
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                        unsigned bz, unsigned shared, CUstream stream, void **parameters, void **extra) {
  CUlaunchConfig config = {gx, gy, gz, bx, by, bz, shared, stream, NULL, 0};
  return cuLaunchKernelEx(&config, function, parameters, extra);
}

// ---- Tensor maps

static int bytes_of(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64:
      return 8;
    default:
      return 4;
  }
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  const char *why = NULL;
  uint64_t size = bytes_of(type), inner = box[0] * size;
  if (rank < 1 || rank > 5) return refuse(CUDA_ERROR_INVALID_VALUE, "tensor map: %s %lld", "rank", rank);
  if ((uint64_t)address % 16) why = "the address is no multiple of 16";
  for (unsigned i = 0; i < rank; i++) {
    if (dims[i] == 0 || dims[i] > 1ull << 32) why = "a size of 0 or above 2^32";
    if (box[i] == 0 || box[i] > 256) why = "a box of 0 or above 256";
    if (steps[i] < 1 || steps[i] > 8) why = "a step outside 1 to 8";
    if (i + 1 == rank) break;
    if (strides[i] % 16 || strides[i] >= 1ull << 40) why = "a stride that is no multiple of 16 or above 2^40";
    if (strides[i] < dims[i] * (i ? strides[i - 1] : size)) why = "a stride below the row";
  }
  if (inner % 16) why = "an inner box that is no multiple of 16 bytes";
  if (swizzle == CU_TENSOR_MAP_SWIZZLE_32B && inner > 32) why = "an inner box wider than the swizzle";
  if (swizzle == CU_TENSOR_MAP_SWIZZLE_64B && inner > 64) why = "an inner box wider than the swizzle";
  if (swizzle == CU_TENSOR_MAP_SWIZZLE_128B && inner > 128) why = "an inner box wider than the swizzle";
  if (why) return refuse(CUDA_ERROR_INVALID_VALUE, "tensor map: %s (rank %lld)", why, rank);
  TensorMap made = {.address = (uint64_t)address, .rank = rank, .type = type, .swizzle = swizzle, .fill = fill};
  memcpy(made.dims, dims, rank * 8), memcpy(made.strides, strides, (rank - 1) * 8), memcpy(made.box, box, rank * 4);
  memset(map, 0, sizeof *map), memcpy(map, &made, sizeof made);
  __atomic_add_fetch(&maps, 1, __ATOMIC_RELAXED);
  return CUDA_SUCCESS;
}
CUresult cuTensorMapReplaceAddress(CUtensorMap *map, void *address) {
  if ((uint64_t)address % 16)
    return refuse(CUDA_ERROR_INVALID_VALUE, "tensor map: %s%.0lld", "the address is no multiple of 16", 0);
  memcpy(map, &address, sizeof address);
  return CUDA_SUCCESS;
}
