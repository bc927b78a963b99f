// Loaded before torch (LD_PRELOAD): makes torch find the pretended device and its hooks.
//
// torch asks these two functions what accelerator there is. In a CPU build they answer "none", and cannot be
// given another answer from outside, so they are replaced by name before they are first looked up. Until
// guard.cpp gives its hooks, torch's own answer is passed on.
#include <dlfcn.h>

#include <cstdint>
#include <optional>

namespace c10 {
enum class DeviceType : int8_t;
}
namespace at {
struct CUDAHooksInterface;
}

extern "C" {
void* pretended_cuda_hooks = nullptr;
}

namespace at::accelerator {
__attribute__((visibility("default"))) std::optional<c10::DeviceType> getAccelerator(bool) {
  return static_cast<c10::DeviceType>(1);  // CUDA
}
}  // namespace at::accelerator

namespace at::detail {
__attribute__((visibility("default"))) const CUDAHooksInterface& getCUDAHooks() {
  if (pretended_cuda_hooks) return *static_cast<const CUDAHooksInterface*>(pretended_cuda_hooks);
  using Original = const CUDAHooksInterface& (*)();
  static auto original = reinterpret_cast<Original>(
      dlsym(dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY), "_ZN2at6detail12getCUDAHooksEv"));
  return original();
}
}  // namespace at::detail
