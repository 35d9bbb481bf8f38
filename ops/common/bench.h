// What an op's benchmark file tells `longhand bench ops`: cases to time, with the bytes and the work that they cannot avoid.
#pragma once
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "core/device.h"
#include "core/dtype.h"

namespace longhand {

/// One shape of one op. run(i, backward) computes the op on input set i (several sets, so that caches do not help), and when `backward` is
/// true also the gradients of every input.
struct BenchCase {
  std::string shape;  // "B32 T2048 H24 P64 N128"
  int input_sets = 1;
  std::function<void(int input_set, bool backward)> run;
  double forward_bytes = 0, backward_bytes = 0;  // each input read once, each output written once
  double forward_flops = 0, backward_flops = 0;
  double forward_exps = 0, backward_exps = 0;  // exponentials, where an op is bound by them
  bool products = false;                       // the flops are those of matrix products, and count for the floor
  bool backward_is_all = false;                // there is no backward to tell apart: run() does everything
};

/// Sizes that a user asks for instead of the cases of the models: "B=4,T=4096".
class BenchSizes {
 public:
  BenchSizes() = default;
  /// errors  ConfigError for a text of another form
  explicit BenchSizes(const std::string& text);
  bool given() const { return !sizes_.empty(); }
  int64_t get(const std::string& name, int64_t otherwise) const;
  /// errors  ConfigError naming the sizes that were asked for, when one was given that nobody asked for
  void require_all_known(const std::string& op) const;

 private:
  std::map<std::string, int64_t> sizes_;
  mutable std::set<std::string> known_;
};

/// Makes the cases for a device; sizes there may differ between CPU and GPU. With sizes given: one case, of these sizes.
using BenchFactory = std::function<std::vector<BenchCase>(const Device& device, Dtype activations, const BenchSizes& sizes)>;

struct BenchEntry {
  std::string op;
  BenchFactory cases;
};
std::vector<BenchEntry>& bench_table();

/// At namespace scope of <op>_bench.cpp: static const BenchRegistration registration("rmsnorm", cases);
struct BenchRegistration {
  BenchRegistration(std::string op, BenchFactory cases) { bench_table().push_back({std::move(op), std::move(cases)}); }
};

/// "B32 T2048": names and numbers of a shape.
std::string shape_text(const std::vector<std::pair<const char*, int64_t>>& sizes);

}  // namespace longhand
