// SingleProcess: the communicator of a process by itself, whose parts are the whole.
#pragma once
#include <cstdlib>

#include "train/communicator.h"

namespace longhand {

class SingleProcess : public Communicator {
 public:
  SingleProcess() : Communicator(1, 0) {}
  std::string describe() const override { return "1 process"; }
  void all_reduce_sum(const Tensor&) override {}
  void reduce_scatter_sum(const Tensor&, int64_t) override {}
  void all_gather(const Tensor&, std::span<const int64_t>) override {}
  void broadcast(const Tensor&, int64_t) override {}
  Tensor gather(const Tensor& part) override { return part; }
  std::vector<std::string> all_texts(const std::string& own_text) override { return {own_text}; }
  int64_t all_reduce_max(int64_t value) override { return value; }
  void barrier() override {}

 protected:
  void end_all(int code) override { std::exit(code); }
};

}  // namespace longhand
