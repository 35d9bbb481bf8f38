// NeighbourWatch: notices that another process of this machine is gone, whatever this one waits for. Neither MPI nor NCCL tells those that
// share memory; a launcher that sees it ends the job before this has anything to say.
#pragma once
#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace longhand {

struct Neighbour {
  int64_t rank = 0;
  pid_t id = 0;
};

class NeighbourWatch {
 public:
  /// gone   called once, by a thread of the watch, when the first of these has ended, be it before the watch began, and `patience_ms` have
  ///        gone by; not after the watch
  /// blind  called by that thread with the reason, "poll: Cannot allocate memory", when it can no longer wait. Nobody is watched from then
  ///        on; of one that had already ended, gone is told at once
  /// needs  Linux 5.3; a process that the system does not let be looked at is not watched: see unwatched()
  NeighbourWatch(const std::vector<Neighbour>& neighbours, std::function<void(const Neighbour&)> gone,
                 std::function<void(const std::string&)> blind, int patience_ms);
  ~NeighbourWatch();
  NeighbourWatch(const NeighbourWatch&) = delete;
  NeighbourWatch& operator=(const NeighbourWatch&) = delete;

  /// Those that are not watched, and why: "pidfd_open: Operation not permitted".
  const std::vector<std::pair<Neighbour, std::string>>& unwatched() const { return unwatched_; }

 private:
  void watch() const;

  const std::vector<Neighbour> neighbours_;
  const std::function<void(const Neighbour&)> gone_;
  const std::function<void(const std::string&)> blind_;
  const int patience_ms_;
  int end_ = -1;            // an eventfd: becomes readable at the end of the watch
  std::vector<int> files_;  // pidfds: become readable when their process ends; -1 without one
  const Neighbour* ended_before_ = nullptr;
  std::vector<std::pair<Neighbour, std::string>> unwatched_;
  std::thread thread_;
};

}  // namespace longhand
