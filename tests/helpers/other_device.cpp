// A device that is not the CPU, for tests without one: its memory is the host's, every operation is the CPU's, but a tensor of it
// beside one of the CPU is the error that it is on a GPU, and what would wait for a GPU (a number read by the host) is counted.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <set>
#include <string>
#include <vector>

namespace {

using at::IntArrayRef;
using at::Tensor;
using c10::DeviceType;

constexpr auto kOther = DeviceType::PrivateUse1;
std::atomic<int64_t> reads{0};

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = std::malloc(bytes);
    return {data, data, &std::free, c10::Device(kOther, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

Allocator allocator;
const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);

// The CPU's generator under this device's name, which its kernels do not take: they see it as the CPU's own.
struct Generator final : at::CPUGeneratorImpl {
  Generator() { name(kOther); }
  void name(DeviceType type) { device_ = type == kOther ? c10::Device(kOther, 0) : c10::Device(type); }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(); }
};

c10::Stream only_stream() { return c10::Stream(c10::Stream::DEFAULT, c10::Device(kOther, 0)); }

// One stream, on which everything is done when it is called: events have nothing to say.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<kOther> {
  c10::Device exchangeDevice(c10::Device) const override { return {kOther, 0}; }
  c10::Device getDevice() const override { return {kOther, 0}; }
  c10::Stream getStream(c10::Device) const noexcept override { return only_stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return only_stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};

// The same memory as a tensor of the CPU.
Tensor on_host(const Tensor& t) {
  return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), at::TensorOptions().dtype(t.dtype()));
}

Tensor empty(IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, keys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, keys, c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  const Tensor source = from.device().type() == kOther ? on_host(from) : from;
  (to.device().type() == kOther ? on_host(to) : to).copy_(source);
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

const Tensor& resize(const Tensor& self, IntArrayRef size, std::optional<at::MemoryFormat>) {
  const Tensor fresh = at::empty(size, self.options());
  self.unsafeGetTensorImpl()->set_storage_and_dtype(fresh.storage(), fresh.dtype());
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage source, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_storage_offset(offset);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return self;
}

Tensor& set_whole_storage(Tensor& self, at::Storage source) {
  const int64_t numbers = static_cast<int64_t>(source.nbytes()) / self.element_size();
  return set_storage(self, std::move(source), 0, {numbers}, {1});
}

at::Scalar read_number(const Tensor& self) {
  ++reads;
  return at::_local_scalar_dense(on_host(self));
}

Tensor to_other(const Tensor& t) { return t.defined() ? t.to(c10::Device(kOther, 0)) : t; }

Tensor convolution(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias, at::SymIntArrayRef stride,
                   at::SymIntArrayRef padding, at::SymIntArrayRef dilation, bool transposed,
                   at::SymIntArrayRef output_padding, c10::SymInt groups) {
  std::optional<Tensor> b;
  if (bias && bias->defined()) b = on_host(*bias);
  return to_other(
      at::convolution_symint(on_host(x), on_host(w), b, stride, padding, dilation, transposed, output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& w,
                                                        at::SymIntArrayRef stride, at::SymIntArrayRef padding,
                                                        at::SymIntArrayRef dilation, bool transposed,
                                                        at::SymIntArrayRef output_padding, c10::SymInt groups,
                                                        std::array<bool, 3> wanted) {
  const c10::SymInt neurons[] = {grad.sym_size(1)};
  const auto [dx, dw, db] =
      at::convolution_backward_symint(on_host(grad), on_host(x), on_host(w), at::SymIntArrayRef(neurons), stride,
                                      padding, dilation, transposed, output_padding, groups, wanted);
  return {to_other(dx), to_other(dw), to_other(db)};
}

// Indices may come from the host on a GPU, too, and so may numbers.
const std::set<std::string> kIndexing = {"aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_"};

void fall_back(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t count = op.schema().arguments().size(), begin = stack->size() - count;
  const bool indexing = kIndexing.count(op.schema().name() + (op.schema().overload_name().empty() ? "" : ".") +
                                        op.schema().overload_name()) != 0;
  const auto check = [&](const Tensor& t) {
    TORCH_CHECK(!t.defined() || !t.is_cpu() || t.dim() == 0 || indexing, op.schema().name(),
                ": a tensor of the CPU, of shape ", t.sizes(), ", beside tensors of another device");
  };
  for (size_t k = begin; k < stack->size(); ++k) {
    const c10::IValue& value = (*stack)[k];
    if (value.isTensor()) check(value.toTensor());
    if (value.isTensorList()) {
      for (const Tensor& t : value.toTensorVector()) check(t);
    }
  }
  std::vector<Generator*> generators;
  for (const c10::IValue& value : *stack) {
    if (!value.isGenerator()) continue;
    if (auto* own = dynamic_cast<Generator*>(value.toGenerator().unsafeGetGeneratorImpl())) generators.push_back(own);
  }
  for (Generator* generator : generators) generator->name(DeviceType::CPU);
  at::native::cpu_fallback(op, stack);
  for (Generator* generator : generators) generator->name(kOther);
}

const int registered = [] {
  c10::SetAllocator(kOther, &allocator);
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return 0;
}();

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("resize_", &resize);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  m.impl("_local_scalar_dense", &read_number);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fall_back>()); }

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("reads", [] { return reads.load(); }, "How many numbers the host has read from the device.");
}
