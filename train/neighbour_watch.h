// NeighbourWatch: notices that another process of this machine is gone, whatever this one waits for. Neither MPI nor NCCL tells those that
// share memory; a launcher that sees it ends the job before this has anything to say.
#pragma once
#include <sys/types.h>

#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace longhand {

struct Neighbour {
  int64_t rank = 0;
  pid_t id = 0;
};

class NeighbourWatch {
 public:
  /// gone  called once, by a thread of the watch, when the first of these has ended and `patience_ms` have gone by; not after the watch
  /// needs  Linux 5.3; where the system does not let a process be looked at, that one is not watched
  NeighbourWatch(const std::vector<Neighbour>& neighbours, std::function<void(const Neighbour&)> gone, int patience_ms);
  ~NeighbourWatch();
  NeighbourWatch(const NeighbourWatch&) = delete;
  NeighbourWatch& operator=(const NeighbourWatch&) = delete;

 private:
  void watch() const;

  const std::vector<Neighbour> neighbours_;
  const std::function<void(const Neighbour&)> gone_;
  const int patience_ms_;
  int end_ = -1;            // an eventfd: becomes readable at the end of the watch
  std::vector<int> files_;  // pidfds: become readable when their process ends
  std::thread thread_;
};

}  // namespace longhand
