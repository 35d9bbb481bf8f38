// What the machine can do, measured now: every benchmark's floor comes from here.
#pragma once
#include <functional>
#include <string>

#include "core/device.h"
#include "core/dtype.h"

namespace longhand {

/// Median milliseconds of work(i), i = 0, 1, ..., after two warm-up runs. One run is long enough that the wall clock around a synchronised
/// device is exact to a few microseconds; short work is repeated inside one measurement.
double median_ms(const Device& device, int repeats, const std::function<void(int)>& work);

struct Ceilings {
  double copy_bytes_per_s;     // read and written bytes of a device-to-device copy
  double product_flops_per_s;  // of a large matrix product in `dtype`
  double exps_per_s;           // of ex2.approx in f32, all SMs together; 0 on a CPU, where it is not measured
  std::string text(Dtype dtype) const;
};
Ceilings measure_ceilings(const Device& device, Dtype dtype, int repeats = 20);

}  // namespace longhand
