/* Runs the prepared launches of a pass: fills in the parameters that change from call to call, then launches the
   kernels one after the other. Plain C against Python and libcuda, built at first use as Triton builds its own
   launcher. `direct.py` describes the arguments; what `program.py` has checked once is not checked here again. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <stdint.h>
#include <string.h>
#include "cuda.h"

/* A number of a launch. If it follows M, `value` is an index into the call's sizes, else the number itself. */
typedef struct { int64_t value; int follows; } Number;

typedef enum { CONSTANT, POINTER, SIZE, HOST_VALUE, TENSOR_MAP } Kind;

typedef struct {
  CUtensorMap map;
  uint64_t address;
  int64_t dims[5];
} CachedMap;

#define LINE _Alignof(CUtensorMap)

#define CACHED_MAPS 64 /* per operand: so many layers that share a program can each keep the map of their W */

typedef struct {
  int swizzle, dtype, rank;
  uint32_t box[5];
  Number dims[5], strides[5]; /* outermost first; strides in bytes, the innermost unused */
  CachedMap *cached;
} Map;

typedef struct {
  Kind kind;
  int size, at, slot; /* bytes of the parameter, their place in the block; slot of its tensor */
  Number offset;      /* POINTER, TENSOR_MAP: offset in bytes; SIZE: the value */
  Map *map;
} Param;

typedef struct {
  CUfunction function;
  unsigned threads, shared;
  Number grid[3];
  int count, bytes; /* number of parameters; bytes of their block */
  Param *params;
  unsigned char *block; /* the parameters, with the constants filled in */
} Step;

typedef struct { int count, slots, bytes; Step *steps; } Pass;

static CUresult (*launch_kernel)(const CUlaunchConfig *, CUfunction, void **, void **);
static CUresult (*encode_map)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                              const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
static CUresult (*error_string)(CUresult, const char **);
static CUresult (*get_context)(CUcontext *);
static CUresult (*set_context)(CUcontext);
static CUresult (*get_device)(CUdevice *, int);
static CUresult (*retain_context)(CUcontext *, CUdevice);
static PyObject *data_ptr_name, *stride_name, *get_device_name, *dtype_name, *shape_name,
    *is_contiguous_name, *is_cpu_name;

static int64_t value_of(const Number *n, const int64_t *sizes) { return n->follows ? sizes[n->value] : n->value; }

static void number(PyObject *pair, Number *out) { /* (value, follows) */
  out->value = PyLong_AsLongLong(PyTuple_GET_ITEM(pair, 0));
  out->follows = PyObject_IsTrue(PyTuple_GET_ITEM(pair, 1));
}

static int integer(PyObject *tuple, int i) { return (int)PyLong_AsLong(PyTuple_GET_ITEM(tuple, i)); }

static Map *read_map(PyObject *t) { /* (swizzle, dtype, box, dims, strides) */
  Map *map = PyMem_Calloc(1, sizeof(Map));
  PyObject *box = PyTuple_GET_ITEM(t, 2), *dims = PyTuple_GET_ITEM(t, 3), *strides = PyTuple_GET_ITEM(t, 4);
  map->swizzle = integer(t, 0);
  map->dtype = integer(t, 1);
  map->rank = (int)PyTuple_GET_SIZE(box);
  for (int i = 0; i < map->rank; i++) {
    map->box[i] = (uint32_t)integer(box, i);
    number(PyTuple_GET_ITEM(dims, i), &map->dims[i]);
    number(PyTuple_GET_ITEM(strides, i), &map->strides[i]);
  }
  map->cached = aligned_alloc(LINE, CACHED_MAPS * sizeof(CachedMap));
  memset(map->cached, 0, CACHED_MAPS * sizeof(CachedMap));
  return map;
}

static void free_pass(Pass *pass) { /* also one that is half built: its missing parts are zero */
  for (int i = 0; i < pass->count; i++) {
    for (int j = 0; pass->steps[i].params && j < pass->steps[i].count; j++)
      if (pass->steps[i].params[j].map) {
        free(pass->steps[i].params[j].map->cached);
        PyMem_Free(pass->steps[i].params[j].map);
      }
    PyMem_Free(pass->steps[i].params);
    PyMem_Free(pass->steps[i].block);
  }
  PyMem_Free(pass->steps);
  PyMem_Free(pass);
}

static void free_capsule(PyObject *capsule) { free_pass(PyCapsule_GetPointer(capsule, "glora_kernels.Pass")); }

/* prepare(steps, slots) -> capsule; a step is (function, threads, shared, grid, params), a param (kind, size, slot,
   offset, bytes, map). */
static PyObject *prepare(PyObject *self, PyObject *args) {
  PyObject *steps;
  int slots;
  if (!PyArg_ParseTuple(args, "O!i", &PyTuple_Type, &steps, &slots)) return NULL;
  Pass *pass = PyMem_Calloc(1, sizeof(Pass));
  pass->count = (int)PyTuple_GET_SIZE(steps);
  pass->slots = slots;
  pass->steps = PyMem_Calloc(pass->count, sizeof(Step));
  for (int i = 0; i < pass->count; i++) {
    Step *step = &pass->steps[i];
    PyObject *t = PyTuple_GET_ITEM(steps, i), *params = PyTuple_GET_ITEM(t, 4);
    step->function = (CUfunction)PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(t, 0));
    step->threads = (unsigned)integer(t, 1);
    step->shared = (unsigned)integer(t, 2);
    for (int j = 0; j < 3; j++) number(PyTuple_GET_ITEM(PyTuple_GET_ITEM(t, 3), j), &step->grid[j]);
    step->count = (int)PyTuple_GET_SIZE(params);
    step->params = PyMem_Calloc(step->count, sizeof(Param));
    int at = 0;
    for (int j = 0; j < step->count; j++) {
      Param *param = &step->params[j];
      PyObject *p = PyTuple_GET_ITEM(params, j);
      param->kind = (Kind)integer(p, 0);
      param->size = integer(p, 1);
      param->slot = integer(p, 2);
      number(PyTuple_GET_ITEM(p, 3), &param->offset);
      int alignment = param->kind == TENSOR_MAP ? (int)LINE : param->size;
      at = (at + alignment - 1) / alignment * alignment;
      param->at = at;
      at += param->size;
      if (param->kind == TENSOR_MAP) param->map = read_map(PyTuple_GET_ITEM(p, 5));
    }
    step->bytes = (at + (int)LINE - 1) / (int)LINE * (int)LINE;
    pass->bytes += step->bytes;
    step->block = PyMem_Calloc(1, step->bytes);
    for (int j = 0; j < step->count; j++)
      if (step->params[j].kind == CONSTANT)
        memcpy(step->block + step->params[j].at,
               PyBytes_AS_STRING(PyTuple_GET_ITEM(PyTuple_GET_ITEM(params, j), 4)), step->params[j].size);
  }
  PyObject *capsule = PyErr_Occurred() ? NULL : PyCapsule_New(pass, "glora_kernels.Pass", free_capsule);
  if (!capsule) free_pass(pass);
  return capsule;
}

static int fail(CUresult code, const char *what) {
  const char *text = NULL;
  error_string(code, &text);
  PyErr_Format(PyExc_RuntimeError, "CUDA refused %s: %s (error %d)", what, text ? text : "of no name", (int)code);
  return -1;
}

/* A map depends only on address and sizes, so a cached one stays right when the memory has another owner. */
static int fill_map(Map *map, uint64_t address, const int64_t *sizes, void *out) {
  int64_t dims[5] = {0};
  for (int i = 0; i < map->rank; i++) dims[i] = value_of(&map->dims[i], sizes);
  CachedMap *entry = &map->cached[(address >> 9 ^ address >> 21) % CACHED_MAPS];
  if (entry->address != address || memcmp(entry->dims, dims, sizeof dims)) {
    cuuint64_t shape[5], strides[5];
    cuuint32_t box[5], ones[5] = {1, 1, 1, 1, 1};
    for (int i = 0; i < map->rank; i++) { /* the driver's dimension 0 is the innermost */
      int j = map->rank - 1 - i;
      shape[i] = (cuuint64_t)dims[j];
      box[i] = map->box[j];
      if (i + 1 < map->rank) strides[i] = (cuuint64_t)value_of(&map->strides[j - 1], sizes);
    }
    CUresult code = encode_map(&entry->map, (CUtensorMapDataType)map->dtype, map->rank, (void *)address, shape, strides,
                               box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, (CUtensorMapSwizzle)map->swizzle,
                               CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (code != CUDA_SUCCESS) {
      entry->address = 0;
      return fail(code, "a tensor map");
    }
    entry->address = address;
    memcpy(entry->dims, dims, sizeof dims);
  }
  memcpy(out, &entry->map, sizeof(CUtensorMap));
  return 0;
}

static int ensure_context(int device) { /* a thread of autograd may have no context yet */
  CUcontext context;
  CUdevice handle;
  if (get_context(&context) == CUDA_SUCCESS && context) return 0;
  CUresult code = get_device(&handle, device);
  if (code == CUDA_SUCCESS) code = retain_context(&context, handle);
  if (code == CUDA_SUCCESS) code = set_context(context);
  return code == CUDA_SUCCESS ? 0 : fail(code, "a context");
}

/* run(pass, first, last, sizes, tensors, stream, device): the launches [first, last). tensors: for each slot a
   tensor, an address or None; sizes: 64-bit numbers as bytes. */
static PyObject *run(PyObject *self, PyObject *const *args, Py_ssize_t count) {
  if (count != 7) return PyErr_Format(PyExc_TypeError, "run takes 7 arguments, got %zd", count);
  Pass *pass = PyCapsule_GetPointer(args[0], "glora_kernels.Pass");
  if (!pass) return NULL;
  int first = (int)PyLong_AsLong(args[1]), last = (int)PyLong_AsLong(args[2]);
  const int64_t *sizes = (const int64_t *)PyBytes_AS_STRING(args[3]);
  CUstream stream = (CUstream)PyLong_AsUnsignedLongLong(args[5]);
  int device = (int)PyLong_AsLong(args[6]);
  if (PyErr_Occurred()) return NULL;
  if (PyTuple_GET_SIZE(args[4]) != pass->slots)
    return PyErr_Format(PyExc_ValueError, "%d tensors are wanted, got %zd", pass->slots, PyTuple_GET_SIZE(args[4]));
  uint64_t address[pass->slots + 1];
  for (int i = 0; i < pass->slots; i++) {
    PyObject *item = PyTuple_GET_ITEM(args[4], i);
    if (item == Py_None) { address[i] = 0; continue; }
    if (PyLong_CheckExact(item)) { address[i] = PyLong_AsUnsignedLongLong(item); continue; }
    PyObject *pointer = PyObject_CallMethodNoArgs(item, data_ptr_name);
    if (!pointer) return NULL;
    address[i] = PyLong_AsUnsignedLongLong(pointer);
    Py_DECREF(pointer);
  }
  if (PyErr_Occurred() || ensure_context(device)) return NULL;
  /* Parameters are filled with the GIL held, as maps are shared; launched without it, as a full queue blocks. */
  unsigned char memory[pass->bytes + LINE], *block = memory + (LINE - (uintptr_t)memory % LINE) % LINE, *place = block;
  for (int i = first; i < last; i++) {
    Step *step = &pass->steps[i];
    memcpy(place, step->block, step->bytes);
    for (int j = 0; j < step->count; j++) {
      Param *param = &step->params[j];
      unsigned char *out = place + param->at;
      uint64_t base = param->kind == CONSTANT || param->kind == SIZE ? 0 : address[param->slot];
      int64_t number = param->kind == CONSTANT ? 0 : value_of(&param->offset, sizes);
      switch (param->kind) {
      case CONSTANT: break;
      case POINTER: base += number; memcpy(out, &base, 8); break;
      case HOST_VALUE: memcpy(out, (void *)base, 8); break;
      case TENSOR_MAP:
        if (fill_map(param->map, base + number, sizes, out)) return NULL;
        break;
      case SIZE:
        if (param->size == 4 && number != (int32_t)number)
          return PyErr_Format(PyExc_OverflowError, "a size of %lld does not fit into 32 bits", (long long)number);
        memcpy(out, &number, param->size);
      }
    }
    place += step->bytes;
  }
  CUresult code = CUDA_SUCCESS;
  Py_BEGIN_ALLOW_THREADS;
  place = block;
  for (int i = first; i < last && code == CUDA_SUCCESS; i++) {
    Step *step = &pass->steps[i];
    void *params[step->count + 1];
    for (int j = 0; j < step->count; j++) params[j] = place + step->params[j].at;
    place += step->bytes;
    CUlaunchConfig config = {0};
    config.gridDimX = (unsigned)value_of(&step->grid[0], sizes);
    config.gridDimY = (unsigned)value_of(&step->grid[1], sizes);
    config.gridDimZ = (unsigned)value_of(&step->grid[2], sizes);
    config.blockDimX = step->threads;
    config.blockDimY = config.blockDimZ = 1;
    config.sharedMemBytes = step->shared;
    config.hStream = stream;
    if (config.gridDimX && config.gridDimY && config.gridDimZ) code = launch_kernel(&config, step->function, params, NULL);
  }
  Py_END_ALLOW_THREADS;
  if (code != CUDA_SUCCESS) { fail(code, "a launch"); return NULL; }
  Py_RETURN_NONE;
}

#define MOST_DIMENSIONS 8

/* The integer or bool that a method of a tensor returns, in *out. This and `integers` return 0 on success. */
static int asked(PyObject *tensor, PyObject *method, int64_t *out) {
  PyObject *answer = PyObject_CallMethodNoArgs(tensor, method);
  if (!answer) return -1;
  *out = PyBool_Check(answer) ? answer == Py_True : (int64_t)PyLong_AsUnsignedLongLongMask(answer);
  Py_DECREF(answer);
  return PyErr_Occurred() ? -1 : 0;
}

static int integers(PyObject *tuple, int64_t **out) { /* steals the reference; NULL is an error */
  if (!tuple) return -1;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); i++) *(*out)++ = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i));
  Py_DECREF(tuple);
  return PyErr_Occurred() ? -1 : 0;
}

static int form(PyObject *tensor, int has_rows, int64_t **out) {
  PyObject *dtype = PyObject_GetAttr(tensor, dtype_name), *shape = dtype ? PyObject_GetAttr(tensor, shape_name) : NULL;
  Py_XDECREF(dtype); /* each dtype is one object that is never freed */
  if (!shape) return -1;
  Py_ssize_t dims = PyTuple_GET_SIZE(shape);
  int64_t last = dims ? PyLong_AsLongLong(PyTuple_GET_ITEM(shape, dims - 1)) : 0, address, device, has_strides = dims < 3;
  if (has_rows) Py_CLEAR(shape);
  if (has_rows ? dims == 0 : dims > MOST_DIMENSIONS) {
    Py_XDECREF(shape);
    PyErr_Format(PyExc_IndexError, "a tensor of %zd dimensions has no form", dims);
    return -1;
  }
  *(*out)++ = (int64_t)(intptr_t)Py_TYPE(tensor);
  *(*out)++ = (int64_t)(intptr_t)dtype;
  *(*out)++ = has_rows && dims > 3 ? 3 : dims;
  if (has_rows) *(*out)++ = last;
  else if (integers(shape, out)) return -1;
  if (asked(tensor, data_ptr_name, &address) || asked(tensor, get_device_name, &device)) return -1;
  if (device < 0) { /* a CPU tensor differs from others without a device index: its memory can be read */
    PyObject *is_cpu = PyObject_GetAttr(tensor, is_cpu_name);
    if (!is_cpu) return -1;
    device -= is_cpu != Py_True;
    Py_DECREF(is_cpu);
  }
  *(*out)++ = address & 15;
  *(*out)++ = device;
  if (!has_rows) { /* asking is_contiguous is quicker than asking for strides */
    if (asked(tensor, is_contiguous_name, &has_strides)) return -1;
    has_strides = *(*out)++ = !has_strides;
  }
  return has_strides ? integers(PyObject_CallMethodNoArgs(tensor, stride_name), out) : 0;
}

/* forms(tensors, flags) -> bytes that are equal whenever the results of `direct.forms_of` are. */
static PyObject *forms(PyObject *self, PyObject *const *args, Py_ssize_t count) {
  if (count != 2) return PyErr_Format(PyExc_TypeError, "forms takes 2 arguments, got %zd", count);
  PyObject *tensors = PySequence_Fast(args[0], "forms takes a sequence of tensors");
  if (!tensors) return NULL;
  Py_ssize_t n = PySequence_Fast_GET_SIZE(tensors), flagged = PyBytes_GET_SIZE(args[1]);
  int64_t found[n * (2 * MOST_DIMENSIONS + 6) + 1], *out = found;
  int failed = 0;
  for (Py_ssize_t i = 0; i < n && !failed; i++) {
    PyObject *tensor = PySequence_Fast_GET_ITEM(tensors, i);
    if (tensor == Py_None) *out++ = 0;
    else failed = form(tensor, i < flagged && PyBytes_AS_STRING(args[1])[i], &out);
  }
  Py_DECREF(tensors);
  return failed ? NULL : PyBytes_FromStringAndSize((char *)found, (char *)out - (char *)found);
}

static PyMethodDef methods[] = {
  {"prepare", prepare, METH_VARARGS, "The launches of a pass, as a capsule."},
  {"run", (PyCFunction)(void (*)(void))run, METH_FASTCALL, "Launch some of them."},
  {"forms", (PyCFunction)(void (*)(void))forms, METH_FASTCALL, "What launches depend on in tensors, as bytes."},
  {NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "glora_kernels_direct", NULL, -1, methods};

PyMODINIT_FUNC PyInit_glora_kernels_direct(void) {
  void *cuda = dlopen("libcuda.so.1", RTLD_LAZY);
  if (!cuda) return PyErr_Format(PyExc_ImportError, "libcuda.so.1 cannot be opened: %s", dlerror());
  struct { const char *name; void **into; } symbols[] = {
    {"cuLaunchKernelEx", (void **)&launch_kernel}, {"cuTensorMapEncodeTiled", (void **)&encode_map},
    {"cuGetErrorString", (void **)&error_string}, {"cuCtxGetCurrent", (void **)&get_context},
    {"cuCtxSetCurrent", (void **)&set_context}, {"cuDeviceGet", (void **)&get_device},
    {"cuDevicePrimaryCtxRetain", (void **)&retain_context}};
  for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
    *symbols[i].into = dlsym(cuda, symbols[i].name);
    if (!*symbols[i].into) return PyErr_Format(PyExc_ImportError, "libcuda has no %s", symbols[i].name);
  }
  struct { const char *name; PyObject **into; } names[] = {
    {"data_ptr", &data_ptr_name}, {"stride", &stride_name}, {"get_device", &get_device_name}, {"dtype", &dtype_name},
    {"shape", &shape_name},
    {"is_contiguous", &is_contiguous_name}, {"is_cpu", &is_cpu_name}};
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) *names[i].into = PyUnicode_InternFromString(names[i].name);
  return PyModule_Create(&definition);
}
