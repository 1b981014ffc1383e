// Tensors of devices "cuda:0" and "cuda:1" in a CPU build of PyTorch. Their memory is the host's. What creates and
// views tensors is native, and as quick as a card's; every other operation runs on CPU tensors over the same memory.
// Products of matrices are not computed: a large one takes a CPU seconds, and nobody looks at its values.
// The device and the streams are per thread, as the CUDA runtime keeps them; what would make the host wait for the card
// is counted, and refused while a stream captures or torch.cuda.set_sync_debug_mode("error") is set.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/stack.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/pybind11.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <atomic>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

extern "C" {  // libcuda.c
int dry_device(void);
void dry_set_device(int device);
void dry_set_owner(int (*owner)(uint64_t));
void dry_operation(const char *name, uint64_t stream);
}

namespace {
using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::DispatchKey, c10::DispatchKeySet, c10::Stream;
constexpr int DEVICES = 2;
const DispatchKeySet OURS(DispatchKey::CUDA);

// ---- Streams, and waiting

thread_local int64_t streams[DEVICES];  // the current one of each device: 0 is the default one
std::atomic<int64_t> made_streams{0}, capturing{-1}, waits{0};
std::atomic<int> sync_debug_mode{0};

int64_t handle(int device, int64_t stream) { return stream ? (int64_t(device + 1) << 32) | stream << 4 : 0; }
bool is_capturing() { return capturing >= 0 && capturing == handle(dry_device(), streams[dry_device()]); }
void operation(const char *name) { dry_operation(name, handle(dry_device(), streams[dry_device()])); }
void host_waits(const char *what) {
  waits++;
  TORCH_CHECK(capturing < 0, what, ": operation not permitted when stream is capturing");
  TORCH_CHECK(sync_debug_mode < 2, "called a synchronizing CUDA operation: ", what);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device d) const override {
    auto before = getDevice();
    setDevice(d);
    return before;
  }
  Device getDevice() const override { return Device(DeviceType::CUDA, dry_device()); }
  void setDevice(Device d) const override { dry_set_device(d.index()); }
  void uncheckedSetDevice(Device d) const noexcept override { dry_set_device(d.index()); }
  Stream getStream(Device d) const override { return Stream(Stream::UNSAFE, d, streams[d.index()]); }
  Stream getDefaultStream(Device d) const override { return Stream(Stream::UNSAFE, d, 0); }
  Stream getNewStream(Device d, int) const override { return Stream(Stream::UNSAFE, d, ++made_streams); }
  Stream exchangeStream(Stream s) const override {
    return Stream(Stream::UNSAFE, s.device(), std::exchange(streams[s.device_index()], s.id()));
  }
  DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  void record(void **, const Stream &, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void *, const Stream &) const override {}
  bool queryEvent(void *) const override { return true; }
  void destroyEvent(void *, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream &) const override { return true; }
  void synchronizeStream(const Stream &) const override { host_waits("synchronize"); }
  void recordDataPtrOnStream(const c10::DataPtr &, const Stream &) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

// ---- Memory: blocks of address space by size; nothing is touched unless somebody writes

struct Block {
  size_t size, asked;
  int device;
  bool live;
};
std::mutex mutex;
std::map<uint64_t, Block> blocks;
std::map<std::pair<int, size_t>, std::vector<uint64_t>> freed;
bool reuse = true;  // freed memory, as a caching allocator; without, every address is new
size_t held = 0, peak = 0;
uint64_t allocations = 0;

void release(void *address) {
  std::lock_guard<std::mutex> hold(mutex);
  auto at = reinterpret_cast<uint64_t>(address);
  auto &block = blocks.at(at);
  block.live = false;
  held -= block.asked;
  if (reuse) freed[{block.device, block.size}].push_back(at);
  else madvise(address, block.size, MADV_DONTNEED);
}

int owner(uint64_t address) {
  std::lock_guard<std::mutex> hold(mutex);
  auto after = blocks.upper_bound(address);
  if (after == blocks.begin()) return -1;
  auto &[start, block] = *--after;
  return address >= start + block.size ? -1 : block.live ? block.device : -2;
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    Device device(DeviceType::CUDA, dry_device());
    if (!n) return {nullptr, nullptr, &c10::detail::deleteNothing, device};
    size_t step = n < (1 << 20) ? 512 : 1 << 21, size = (n + step - 1) / step * step;
    std::lock_guard<std::mutex> hold(mutex);
    allocations++;
    held += n;
    peak = std::max(peak, held);
    auto &list = freed[{device.index(), size}];
    void *address;
    if (!list.empty()) {
      address = reinterpret_cast<void *>(list.back());
      list.pop_back();
    } else {
      address = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      TORCH_CHECK(address != MAP_FAILED, "CUDA out of memory");
    }
    blocks[reinterpret_cast<uint64_t>(address)] = {size, n, device.index(), true};
    return {address, address, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void *to, const void *from, size_t n) const override { memcpy(to, from, n); }
} memory;

// ---- Tensors

struct OnDevice {  // of a tensor's or an argument's device, while something is made
  int before = dry_device();
  explicit OnDevice(std::optional<Device> d) {
    if (d && d->has_index()) dry_set_device(d->index());
  }
  ~OnDevice() { dry_set_device(before); }
};
bool is_ours(const at::Tensor &t) { return t.defined() && t.device().type() == DeviceType::CUDA; }

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  OnDevice on(device);
  return at::detail::empty_generic(size, &memory, OURS, c10::dtype_or_default(dtype), format);
}
at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  OnDevice on(device);
  return at::detail::empty_strided_generic(size, stride, &memory, OURS, c10::dtype_or_default(dtype));
}

// A tensor over a storage, in the place and form of another one.
at::Tensor over(c10::Storage storage, DispatchKey key, const at::Tensor &like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}
at::Tensor on_host(const at::Tensor &t) {
  if (!is_ours(t)) return t;
  auto storage = t.storage();
  c10::Storage host(c10::Storage::use_byte_size_t(), storage.nbytes(),
                    c10::DataPtr(storage.mutable_data(), Device(DeviceType::CPU)), c10::GetCPUAllocator(), true);
  return over(std::move(host), DispatchKey::CPU, t);
}
void grow(c10::Storage storage, size_t bytes, const void *from, size_t filled) {
  auto data = memory.allocate(bytes);
  if (filled) memcpy(data.get(), from, filled);
  storage.set_data_ptr_noswap(std::move(data));
  storage.set_nbytes(bytes);
}
at::Tensor copied_to_device(const at::Tensor &t) {
  at::Tensor made = at::detail::empty_strided_generic(t.sizes(), t.strides(), &memory, OURS, t.scalar_type());
  on_host(made).copy_(t);
  return made;
}

using Pairs = std::vector<std::pair<at::Tensor, at::Tensor>>;  // ours, and the CPU tensor over the same memory
at::Tensor on_device(const at::Tensor &t, const Pairs &operands) {
  if (!t.defined() || t.device().type() != DeviceType::CPU) return t;
  for (auto &[ours, cpu] : operands) {
    if (cpu.unsafeGetTensorImpl() != t.unsafeGetTensorImpl()) continue;
    if (t.storage().data() != ours.storage().data())  // out=, resized
      grow(ours.storage(), t.storage().nbytes(), t.storage().data(), t.storage().nbytes());
    ours.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    return ours;
  }
  for (auto &[ours, cpu] : operands)  // a view of an operand
    if (t.storage().data() && cpu.storage().data() == t.storage().data())
      return over(ours.storage(), DispatchKey::CUDA, t);
  return copied_to_device(t);
}
c10::IValue converted(const c10::IValue &value, const std::function<at::Tensor(const at::Tensor &)> &convert) {
  if (value.isTensor()) return convert(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor &t : value.toTensorVector()) list.push_back(convert(t));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (std::optional<at::Tensor> t : value.toOptionalTensorList()) list.push_back(t ? std::optional(convert(*t)) : t);
    return list;
  }
  return value;
}
void fallback(const c10::OperatorHandle &op, DispatchKeySet, torch::jit::Stack *stack) {
  Pairs operands;
  std::optional<Device> device;
  for (auto &value : torch::jit::last(*stack, op.schema().arguments().size())) {
    auto &argument = const_cast<c10::IValue &>(value);
    if (value.isDevice() && value.toDevice().type() == DeviceType::CUDA) {
      device = value.toDevice();
      argument = Device(DeviceType::CPU);
    } else {
      argument = converted(value, [&](const at::Tensor &t) {
        if (!is_ours(t)) return t;
        bool elsewhere = device && device->has_index() && *device != t.device();
        TORCH_CHECK(!elsewhere, "Expected all tensors to be on the same device");
        device = t.device();
        return operands.emplace_back(t, on_host(t)).second;
      });
    }
  }
  OnDevice on(device);
  operation(op.schema().name().c_str());
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  for (auto &value : torch::jit::last(*stack, op.schema().returns().size()))
    const_cast<c10::IValue &>(value) = converted(value, [&](const at::Tensor &t) { return on_device(t, operands); });
}

at::Tensor &product_out(const at::Tensor &a, const at::Tensor &b, at::Tensor &out) {
  OnDevice on(a.device());
  operation("aten::mm");
  auto size = a.sizes().vec();
  size.back() = b.size(-1);
  TORCH_CHECK(a.size(-1) == b.size(-2), "mat1 and mat2 shapes cannot be multiplied");
  at::native::resize_output(out, size);
  return out;
}
at::Tensor product(const at::Tensor &a, const at::Tensor &b) {
  auto out = at::empty({0}, a.options());
  return product_out(a, b, out);
}
at::Tensor &added_product_out(const at::Tensor &, const at::Tensor &a, const at::Tensor &b, const at::Scalar &,
                              const at::Scalar &, at::Tensor &out) {
  return product_out(a, b, out);
}
at::Tensor added_product(const at::Tensor &, const at::Tensor &a, const at::Tensor &b, const at::Scalar &,
                         const at::Scalar &) {
  return product(a, b);
}

const at::Tensor &resize_(const at::Tensor &self, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  OnDevice on(self.device());
  size_t need = (c10::multiply_integers(size) + self.storage_offset()) * self.element_size();
  auto storage = self.storage();
  if (storage.nbytes() < need) grow(storage, need, storage.data(), storage.nbytes());
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}
at::Tensor to_copy(const at::Tensor &self, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                   std::optional<Device> device, std::optional<bool>, bool non_blocking,
                   std::optional<at::MemoryFormat> format) {
  auto target = device.value_or(self.device());
  OnDevice on(target.type() == DeviceType::CUDA ? target : self.device());
  if (target.type() != self.device().type() && !non_blocking) host_waits("a copy between host and device");
  operation("aten::copy_");
  auto host = at::_to_copy(on_host(self), dtype.value_or(self.scalar_type()), std::nullopt, Device(DeviceType::CPU),
                           false, false, format);
  return target.type() == DeviceType::CPU ? host : copied_to_device(host);
}
at::Tensor &copy_(at::Tensor &self, const at::Tensor &source, bool non_blocking) {
  if (self.device().type() != source.device().type() && !non_blocking) host_waits("a copy between host and device");
  OnDevice on(is_ours(self) ? self.device() : source.device());
  operation("aten::copy_");
  on_host(self).copy_(on_host(source));
  return self;
}
at::Scalar read_number(const at::Tensor &self) {
  host_waits("a number is read");
  return at::_local_scalar_dense(on_host(self));
}
void record_stream(at::Tensor &, Stream) {}

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return DEVICES; }
  int getNumGPUs() const override { return DEVICES; }
  DeviceIndex current_device() const override { return dry_device(); }
  DeviceIndex getCurrentDevice() const override { return dry_device(); }
  void setCurrentDevice(DeviceIndex d) const override { dry_set_device(d); }
  DeviceIndex exchangeDevice(DeviceIndex d) const override {
    auto before = dry_device();
    dry_set_device(d);
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex d) const override { return exchangeDevice(d); }
  bool isPinnedPtr(const void *) const override { return true; }
  at::Allocator *getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  Device getDeviceFromPtr(void *p) const override {
    return Device(DeviceType::CUDA, std::max(0, owner(reinterpret_cast<uint64_t>(p))));
  }
  void deviceSynchronize(DeviceIndex) const override { host_waits("synchronize"); }
  const at::Generator &getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};

// Of what Python asks at every launch, as cheap as PyTorch's own.
PyObject *py_device(PyObject *, PyObject *) { return PyLong_FromLong(dry_device()); }
PyObject *py_raw_stream(PyObject *, PyObject *device) {
  int d = static_cast<int>(PyLong_AsLong(device));
  return PyLong_FromLongLong(handle(d, streams[d]));
}
PyObject *py_capturing(PyObject *, PyObject *) { return PyBool_FromLong(is_capturing()); }
PyMethodDef quick[] = {{"device", py_device, METH_NOARGS, ""},
                       {"raw_stream", py_raw_stream, METH_O, ""},
                       {"is_capturing", py_capturing, METH_NOARGS, ""},
                       {nullptr, nullptr, 0, nullptr}};
}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  for (auto name : {"mm", "bmm"}) {
    m.impl(name, TORCH_FN(product));
    m.impl((std::string(name) + ".out").c_str(), TORCH_FN(product_out));
  }
  for (auto name : {"addmm", "baddbmm"}) {
    m.impl(name, TORCH_FN(added_product));
    m.impl((std::string(name) + ".out").c_str(), TORCH_FN(added_product_out));
  }
  m.impl("resize_", TORCH_FN(resize_));
  m.impl("_to_copy", TORCH_FN(to_copy));
  m.impl("copy_", TORCH_FN(copy_));
  m.impl("_local_scalar_dense", TORCH_FN(read_number));
  m.impl("record_stream", TORCH_FN(record_stream));
}
namespace at {
using ::Hooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}  // namespace at

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  PyModule_AddFunctions(m.ptr(), quick);
  c10::SetAllocator(DeviceType::CUDA, &memory);
  dry_set_owner(&owner);
  m.attr("DEVICES") = DEVICES;
  m.def("set_device", &dry_set_device);
  m.def("handle", &handle);
  m.def("stream", [](int device) { return streams[device]; });
  m.def("set_stream", [](int device, int64_t stream) { streams[device] = stream, dry_set_device(device); });
  m.def("new_stream", [] { return ++made_streams; });
  m.def("set_capturing", [](bool on) { capturing = on ? handle(dry_device(), streams[dry_device()]) : -1; });
  m.def("host_waits", &host_waits);
  m.def("waits", [] { return waits.load(); });
  m.def("sync_debug_mode", [] { return sync_debug_mode.load(); });
  m.def("set_sync_debug_mode", [](int mode) { sync_debug_mode = mode; });
  m.def("owner", &owner);
  m.def("block", [](uint64_t address) {  // the start of the block that holds the address, or 0
    std::lock_guard<std::mutex> hold(mutex);
    auto after = blocks.upper_bound(address);
    return after == blocks.begin() ? uint64_t(0) : (--after)->first;
  });
  m.def("set_reuse", [](bool on) { reuse = on; freed.clear(); });
  m.def("held", [] { return held; });
  m.def("peak", [] { return peak; });
  m.def("reset_peak", [] { peak = held; });
  m.def("allocations", [] { return allocations; });
}
