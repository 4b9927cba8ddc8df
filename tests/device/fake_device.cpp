// A torch device that is not the CPU, for tests on machines without an accelerator.
//
// It takes torch's place for devices of third parties, PrivateUse1. Its memory is the CPU's, and the CPU's kernels
// compute on it. What makes it another device for those who use it:
//  - an operation on tensors of different devices is refused, with CUDA's exceptions (scalars and indices of the CPU);
//  - each of its two devices has a random state of its own, and takes no generator of another device;
//  - layers, optimizers and autocast choose the code that they have for accelerators.
// It has no streams: all that is asked of it is done at once.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;

constexpr auto kFake = c10::DeviceType::PrivateUse1;
constexpr DeviceIndex kDevices = 2;

// --- the devices, and which of them is the current one ----------------------------------------------------------

thread_local DeviceIndex current_index = 0;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kFake; }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }

  Device getDevice() const override { return Device(kFake, current_index); }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() < kDevices, "there is no ", device);
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.has_index()) current_index = device.index();
  }
  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    setDevice(device);
    return before;
  }

  // one stream, on which everything has been done by the time it is asked
  c10::Stream getStream(Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// --- memory -----------------------------------------------------------------------------------------------------

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = nullptr;
    // aligned as the CPU's memory is in torch: rounding can depend on it
    TORCH_CHECK(bytes == 0 || posix_memalign(&memory, 64, bytes) == 0, "no memory for ", bytes, " bytes");
    return {memory, memory, &std::free, Device(kFake, current_index)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

Allocator allocator;
REGISTER_ALLOCATOR(kFake, &allocator);

// --- random numbers ---------------------------------------------------------------------------------------------

// A generator of the device: it draws what a generator of the CPU with the same seed draws.
struct Generator final : c10::GeneratorImpl {
  explicit Generator(DeviceIndex index, at::Generator of_cpu = at::detail::createCPUGenerator())
      : GeneratorImpl(Device(kFake, index), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)), numbers(of_cpu) {}

  void set_current_seed(uint64_t seed) override { numbers.set_current_seed(seed); }
  uint64_t current_seed() const override { return numbers.current_seed(); }
  uint64_t seed() override { return numbers.seed(); }
  void set_offset(uint64_t offset) override { numbers.set_offset(offset); }
  uint64_t get_offset() const override { return numbers.get_offset(); }
  void set_state(const c10::TensorImpl& state) override { numbers.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return numbers.unsafeGetGeneratorImpl()->get_state();
  }
  Generator* clone_impl() const override { return new Generator(device().index(), numbers.clone()); }

  at::Generator numbers;  // of the CPU
};

Generator* own(const at::Generator& generator) { return static_cast<Generator*>(generator.unsafeGetGeneratorImpl()); }

const at::Generator& default_generator(DeviceIndex index) {
  static const std::array<at::Generator, kDevices> generators = {
      at::make_generator<Generator>(0), at::make_generator<Generator>(1)};
  return generators.at(index < 0 ? current_index : index);
}

// From now on the devices draw from the CPU's global state, or again from states of their own.
void share_random_state(bool shared) {
  for (DeviceIndex i = 0; i < kDevices; ++i)
    own(default_generator(i))->numbers =
        shared ? at::detail::getDefaultCPUGenerator() : at::detail::createCPUGenerator();
}

// The generator for a CPU kernel that draws for the device; without one, the device's own.
at::Generator numbers_for(const std::optional<at::Generator>& given, Device device) {
  const auto& generator = given.has_value() && given->defined() ? *given : default_generator(device.index());
  TORCH_CHECK(generator.device().type() == kFake, "random numbers on ", device, " need a generator of this device, got ",
              "one of ", generator.device());
  return own(generator)->numbers;
}

// --- what torch asks of a device --------------------------------------------------------------------------------

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  Device getDeviceFromPtr(void*) const override { return Device(kFake, current_index); }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<Generator>(index < 0 ? current_index : index);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto* held = storage.unsafeGetStorageImpl();
    const c10::DeviceGuard guard(held->device());
    auto memory = allocator.allocate(bytes);
    if (held->data() != nullptr) std::memcpy(memory.get(), held->data(), std::min(bytes, held->nbytes()));
    held->set_data_ptr_noswap(std::move(memory));
    held->set_nbytes(bytes);
  }
};

Hooks hooks;
[[maybe_unused]] const bool registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

// --- tensors: made, viewed, copied ------------------------------------------------------------------------------

constexpr auto kKeys = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);

Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, &allocator, kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, &allocator, kKeys, c10::dtype_or_default(dtype));
}

// The same memory as a tensor of the CPU.
Tensor on_cpu(const Tensor& tensor) {
  if (tensor.device().type() != kFake) return tensor;
  return at::from_blob(tensor.storage().mutable_data(), tensor.sizes(), tensor.strides(), tensor.storage_offset(),
                       [](void*) {}, tensor.options().device(at::kCPU), std::nullopt);
}

std::optional<Tensor> on_cpu(const std::optional<Tensor>& tensor) {
  return tensor.has_value() && tensor->defined() ? std::optional(on_cpu(*tensor)) : std::nullopt;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool /*non_blocking*/) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar item(const Tensor& tensor) { return at::_local_scalar_dense(on_cpu(tensor)); }

Tensor as_strided(const Tensor& tensor, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                  std::optional<c10::SymInt> offset) {
  const auto start = offset.has_value() ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           start);
}

Tensor view(const Tensor& tensor, c10::SymIntArrayRef size) {
  return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(size));
}

Tensor reshape_alias(const Tensor& tensor, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_storage(Tensor& tensor, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                    c10::SymIntArrayRef stride) {
  return at::native::set_storage_cpu_(tensor, std::move(storage), offset.expect_int(), C10_AS_INTARRAYREF_SLOW(size),
                                      C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_whole_storage(Tensor& tensor, at::Storage storage) {
  const auto numbers = static_cast<int64_t>(storage.nbytes() / tensor.itemsize());
  return at::native::set_storage_cpu_(tensor, std::move(storage), 0, numbers, {});
}

const Tensor& resize(const Tensor& tensor, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(tensor, C10_AS_INTARRAYREF_SLOW(size), format);
}

// --- all other operations: by the CPU, on copies ----------------------------------------------------------------

std::vector<Tensor> tensors_of(const c10::IValue& argument) {
  std::vector<Tensor> found;
  if (argument.isTensor()) found = {argument.toTensor()};
  if (argument.isTensorList()) found = argument.toTensorVector();
  if (argument.isOptionalTensorList())
    for (const std::optional<Tensor>& each : argument.toOptionalTensorList())
      if (each.has_value()) found.push_back(*each);
  return found;
}

bool is_index(const std::string& operation, size_t argument) {
  return operation.find("index") != std::string::npos && argument == 1;
}

// The device of an operation's arguments; refuses those of different devices.
Device device_of(const std::string& operation, c10::ArrayRef<c10::IValue> arguments) {
  std::optional<Device> device;
  for (const auto& argument : arguments) {
    if (argument.isDevice()) device = argument.toDevice();  // where something is made
    for (const Tensor& tensor : tensors_of(argument))
      if (!device.has_value() && tensor.defined() && !tensor.is_cpu()) device = tensor.device();
  }
  TORCH_CHECK(device.has_value(), operation, " has no tensor on the device");
  for (size_t i = 0; i < arguments.size(); ++i)
    for (const Tensor& tensor : tensors_of(arguments[i])) {
      if (!tensor.defined() || tensor.device() == *device) continue;
      const bool allowed = tensor.is_cpu() && (tensor.dim() == 0 || is_index(operation, i));
      TORCH_CHECK(allowed, "expected all tensors to be on the same device in ", operation, ", got ", *device, " and ",
                  tensor.device());
    }
  return *device;
}

void compute_on_cpu(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  static const auto generator_type = c10::OptionalType::create(c10::GeneratorType::get());
  const auto& parameters = operation.schema().arguments();
  const size_t first = stack->size() - parameters.size();
  const auto arguments = c10::ArrayRef<c10::IValue>(*stack).slice(first);
  const Device device = device_of(operation.schema().name(), arguments);
  for (size_t i = 0; i < parameters.size(); ++i)
    if (*parameters[i].type() == *generator_type)
      stack->at(first + i) = numbers_for(arguments[i].toOptional<at::Generator>(), device);
  at::native::cpu_fallback(operation, stack);
}

// --- operations that do not go that way -------------------------------------------------------------------------

// In the place of dropout's formula, which the CPU evaluates.
std::tuple<Tensor, Tensor> native_dropout(const Tensor& input, double rate, std::optional<bool> train) {
  if (!train.value_or(true)) return {input.clone(), at::ones_like(input, at::kBool)};
  // drawn as on the CPU, and rounded in the same order
  Tensor kept = at::empty_like(input).bernoulli_(1 - rate);
  return {input * (rate == 1 ? kept : kept / (1 - rate)), kept.to(at::kBool)};
}

Tensor native_dropout_backward(const Tensor& gradient, const Tensor& kept, double scale) {
  return gradient * (kept.to(gradient.scalar_type()) * scale);
}

using Three = std::tuple<Tensor, Tensor, Tensor>;

Three to_device(const Three& tensors, Device device) {
  const auto moved = [&](const Tensor& tensor) { return tensor.defined() ? tensor.to(device) : tensor; };
  return {moved(std::get<0>(tensors)), moved(std::get<1>(tensors)), moved(std::get<2>(tensors))};
}

Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                   at::IntArrayRef output_padding, int64_t groups) {
  return at::convolution(on_cpu(input), on_cpu(weight), on_cpu(bias), stride, padding, dilation, transposed,
                         output_padding, groups)
      .to(input.device());
}

Three convolution_backward(const Tensor& gradient, const Tensor& input, const Tensor& weight, at::IntArrayRef stride,
                           at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                           at::IntArrayRef output_padding, int64_t groups, std::array<bool, 3> wanted) {
  const at::IntArrayRef bias_size = gradient.sizes().slice(1, 1);
  const auto gradients =
      at::convolution_backward(on_cpu(gradient), on_cpu(input), on_cpu(weight), bias_size, stride, padding, dilation,
                               transposed, output_padding, groups, wanted);
  return to_device(gradients, input.device());
}

// Its schema does not say that it writes the running statistics: a copy of them would be written in their place.
Three native_batch_norm(const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var,
                        bool training, double momentum, double eps) {
  const auto results = at::native_batch_norm(on_cpu(input), on_cpu(weight), on_cpu(bias), on_cpu(running_mean),
                                             on_cpu(running_var), training, momentum, eps);
  return to_device(results, input.device());
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&compute_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("_local_scalar_dense", &item);
  library.impl("as_strided", &as_strided);
  library.impl("view", &view);
  library.impl("_reshape_alias", &reshape_alias);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("set_.source_Storage", &set_whole_storage);
  library.impl("resize_", &resize);
  library.impl("native_dropout", &native_dropout);
  library.impl("native_dropout_backward", &native_dropout_backward);
  library.impl("native_batch_norm", &native_batch_norm);
  library.impl("convolution_overrideable", &convolution);
  library.impl("convolution_backward_overrideable", &convolution_backward);
  // torch has formulas for these on any device, which round otherwise than the CPU's kernels
  for (const char* name : {"native_layer_norm", "native_group_norm"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&compute_on_cpu>());
}

// autocast casts as on CUDA, and leaves all other operations as they are
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) { library.fallback(torch::CppFunction::makeFallthrough()); }

#define LOWER_PRECISION(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FLOAT32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define PROMOTED(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(LOWER_PRECISION)
  AT_FORALL_FP32(FLOAT32)
  AT_FORALL_PROMOTE(PROMOTED)
}

// what Python needs beside what torch offers for every device
TORCH_LIBRARY(fake_device, library) {
  library.def("default_generator(int index) -> Generator?", [](int64_t index) -> at::Generator { return default_generator(index); });
  library.def("share_random_state(bool shared) -> ()", &share_random_state);
  library.def("device_count() -> int", []() -> int64_t { return kDevices; });
}
