// What torch's C++ side asks of a CUDA device, answered without one.
//
// A CPU build of torch knows the device type "cuda" but refuses it: no guard says which device is current,
// no hooks say that CUDA is there. Both are given here. Nothing is computed: tensors on the device are fake
// (see dispatch.py), so streams and events have nothing to wait for. The current device is kept for each
// thread, as CUDA keeps it.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

int device_count = 1;
thread_local c10::DeviceIndex current = 0;

c10::DeviceIndex exchange(c10::DeviceIndex index) {
  auto previous = current;
  if (index >= 0) current = index;
  return previous;
}

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType kind = c10::DeviceType::CUDA;
  c10::DeviceType type() const override { return kind; }
  c10::Device exchangeDevice(c10::Device d) const override { return {kind, exchange(d.index())}; }
  c10::Device getDevice() const override { return {kind, current}; }
  void setDevice(c10::Device d) const override { exchange(d.index()); }
  void uncheckedSetDevice(c10::Device d) const noexcept override { exchange(d.index()); }
  c10::Stream getStream(c10::Device d) const override { return usual(d.index()); }
  c10::Stream getDefaultStream(c10::Device d) const override { return usual(d.index()); }
  c10::Stream getNewStream(c10::Device d, int) const override { return usual(d.index()); }
  c10::Stream exchangeStream(c10::Stream s) const override { return usual(s.device_index()); }
  c10::DeviceIndex deviceCount() const noexcept override { return device_count; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}

 private:
  static c10::Stream usual(c10::DeviceIndex index) {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(kind, index < 0 ? current : index));
  }
};

struct Hooks final : public at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return device_count; }
  int getNumGPUs() const override { return device_count; }
  void setCurrentDevice(c10::DeviceIndex index) const override { exchange(index); }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  c10::DeviceIndex current_device() const override { return current; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override { return exchange(index); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchange(index); }
  bool isPinnedPtr(const void*) const override { return false; }
};

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

extern "C" {
extern void* pretended_cuda_hooks;  // preload.cpp

void pretend_cuda(int count) {
  static Hooks hooks;
  device_count = count;
  pretended_cuda_hooks = static_cast<at::CUDAHooksInterface*>(&hooks);
}
int pretended_current_device() { return current; }
int pretended_exchange_device(int index) { return exchange(static_cast<c10::DeviceIndex>(index)); }
}
