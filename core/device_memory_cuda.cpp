// Virtual memory of a GPU: addresses are reserved once, memory is mapped behind them page by page. See device_memory_cuda.h.
#include "core/device_memory_cuda.h"

#include <cuda.h>

#include <fmt/core.h>

#include <vector>

#include "core/error.h"
#include "core/op_scope.h"

namespace longhand {
namespace {

constexpr std::size_t kPage = std::size_t{32} << 20;  // mapping costs some 50 us a page; at most one page is taken that is not needed

// The driver's functions, found at run time: the program starts on machines without a driver.
struct Driver {
  decltype(&cuMemAddressReserve) reserve = nullptr;
  decltype(&cuMemAddressFree) free_addresses = nullptr;
  decltype(&cuMemCreate) create = nullptr;
  decltype(&cuMemRelease) release = nullptr;
  decltype(&cuMemMap) map = nullptr;
  decltype(&cuMemUnmap) unmap = nullptr;
  decltype(&cuMemSetAccess) set_access = nullptr;
  decltype(&cuMemGetAllocationGranularity) granularity = nullptr;

  bool find() {
    return get("cuMemAddressReserve", reserve) && get("cuMemAddressFree", free_addresses) && get("cuMemCreate", create) &&
           get("cuMemRelease", release) && get("cuMemMap", map) && get("cuMemUnmap", unmap) && get("cuMemSetAccess", set_access) &&
           get("cuMemGetAllocationGranularity", granularity);
  }

 private:
  template <class F>
  static bool get(const char* name, F& function) {
    constexpr unsigned kVersion = 12000;
    cudaDriverEntryPointQueryResult found{};
    void* address = nullptr;
    const cudaError_t status = cudaGetDriverEntryPointByVersion(name, &address, kVersion, cudaEnableDefault, &found);
    if (status != cudaSuccess) (void)cudaGetLastError();
    function = reinterpret_cast<F>(address);
    return status == cudaSuccess && found == cudaDriverEntryPointSuccess && address != nullptr;
  }
};

class AddressSpace {
 public:
  // Whether the GPU can do this; then base() and limit() are set.
  bool open(int index) {
    properties_.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties_.location = {CU_MEM_LOCATION_TYPE_DEVICE, {index}};
    std::size_t step = 0, free_bytes = 0, total_bytes = 0;
    if (!driver_.find() || driver_.granularity(&step, &properties_, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED) != CUDA_SUCCESS || step == 0 ||
        kPage % step != 0)
      return false;
    cuda_check(cudaMemGetInfo(&free_bytes, &total_bytes), "cudaMemGetInfo");
    limit_ = (total_bytes + kPage - 1) / kPage * kPage;
    return driver_.reserve(&base_, limit_, kPage, 0, 0) == CUDA_SUCCESS && one_page_works();
  }
  ~AddressSpace() {
    if (base_ == 0) return;
    unmap_from(base_);
    (void)driver_.free_addresses(base_, limit_);
  }
  AddressSpace() = default;
  AddressSpace(const AddressSpace&) = delete;
  AddressSpace& operator=(const AddressSpace&) = delete;

  char* base() const { return reinterpret_cast<char*>(base_); }
  std::size_t limit() const { return limit_; }

  // Behind what is mapped already.
  bool map(std::size_t bytes) {
    const CUdeviceptr before = end();
    for (std::size_t done = 0; done < bytes; done += kPage) {
      CUmemGenericAllocationHandle page = 0;
      const CUresult created = driver_.create(&page, kPage, &properties_, 0);
      if (created == CUDA_ERROR_OUT_OF_MEMORY) {
        unmap_from(before);
        return false;
      }
      check(created, "cuMemCreate");
      const CUdeviceptr at = end();
      pages_.push_back(page);
      check(driver_.map(at, kPage, 0, page, 0), "cuMemMap");
      const CUmemAccessDesc access{properties_.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
      check(driver_.set_access(at, kPage, &access, 1), "cuMemSetAccess");
    }
    return true;
  }
  void unmap_from(CUdeviceptr at) {
    while (end() > at) {
      const CUmemGenericAllocationHandle page = pages_.back();
      pages_.pop_back();
      (void)driver_.unmap(end(), kPage);
      (void)driver_.release(page);
    }
  }

 private:
  // Not every GPU and driver that reserves addresses also maps memory behind them.
  bool one_page_works() {
    try {
      const bool works = map(kPage);
      unmap_from(base_);
      return works;
    } catch (const DeviceError&) {
      unmap_from(base_);
      return false;
    }
  }
  CUdeviceptr end() const { return base_ + pages_.size() * kPage; }
  static void check(CUresult status, const char* call) {
    if (status != CUDA_SUCCESS)
      throw DeviceError("cuda: a driver call failed",
                        {{"call", call}, {"code", fmt::format("CUresult {}", static_cast<int>(status))}, {"op", current_op_path()}});
  }
  Driver driver_;
  CUmemAllocationProp properties_{};
  CUdeviceptr base_ = 0;
  std::size_t limit_ = 0;
  std::vector<CUmemGenericAllocationHandle> pages_;  // mapped one behind the other from base_ on
};

}  // namespace

void* device_block(int index, std::size_t bytes) {
  void* block = nullptr;
  cuda_check(cudaSetDevice(index), "cudaSetDevice");
  const cudaError_t status = cudaMalloc(&block, bytes);
  if (status == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    return nullptr;
  }
  cuda_check(status, "cudaMalloc");
  return block;
}

std::unique_ptr<FreeMemory> make_device_memory(int index, cudaStream_t stream) {
  const auto space = std::make_shared<AddressSpace>();
  if (!space->open(index))
    return std::make_unique<SizeClasses>([index](std::size_t bytes) { return device_block(index, bytes); },
                                         [](void* block) { (void)cudaFree(block); });
  return std::make_unique<Arena>(Arena::Space{space->base(), space->limit(), kPage,
                                              [space, index](char*, std::size_t bytes) {
                                                cuda_check(cudaSetDevice(index), "cudaSetDevice");
                                                return space->map(bytes);
                                              },
                                              [space, index, stream](char* at, std::size_t) {
                                                (void)cudaSetDevice(index);
                                                (void)cudaStreamSynchronize(stream);  // queued work may still use it
                                                space->unmap_from(reinterpret_cast<CUdeviceptr>(at));
                                              }});
}

}  // namespace longhand
