// See neighbour_watch.h.
#include "train/neighbour_watch.h"

#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace longhand {
namespace {

std::string failure_of(const char* call) {
  return std::string(call) + ": " + std::generic_category().message(errno);
}

}  // namespace

NeighbourWatch::NeighbourWatch(const std::vector<Neighbour>& neighbours, std::function<void(const Neighbour&)> gone, int patience_ms)
    : neighbours_(neighbours), gone_(std::move(gone)), patience_ms_(patience_ms), end_(::eventfd(0, EFD_CLOEXEC)) {
  if (end_ < 0) {
    const std::string reason = failure_of("eventfd");
    for (const Neighbour& neighbour : neighbours_) unwatched_.emplace_back(neighbour, reason);
    return;
  }
  for (const Neighbour& neighbour : neighbours_) {
    files_.push_back(static_cast<int>(::syscall(SYS_pidfd_open, neighbour.id, 0)));
    if (files_.back() >= 0) continue;
    if (errno != ESRCH) unwatched_.emplace_back(neighbour, failure_of("pidfd_open"));
    else if (ended_before_ == nullptr) ended_before_ = &neighbour;
  }
  sigset_t all, before;  // signals are for the other threads, and would end a wait early
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread([this] { watch(); });
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

NeighbourWatch::~NeighbourWatch() {
  if (thread_.joinable()) {
    const uint64_t one = 1;
    while (::write(end_, &one, sizeof one) < 0) continue;  // a signal came between
    thread_.join();
  }
  for (const int file : files_)
    if (file >= 0) ::close(file);
  if (end_ >= 0) ::close(end_);
}

void NeighbourWatch::watch() const {
  std::vector<pollfd> looked_at{{end_, POLLIN, 0}};
  for (const int file : files_) looked_at.push_back({file, POLLIN, 0});  // -1 is passed over
  if (ended_before_ == nullptr && ::poll(looked_at.data(), looked_at.size(), -1) < 0) return;
  if (looked_at[0].revents != 0) return;
  if (::poll(looked_at.data(), 1, patience_ms_) != 0) return;
  if (ended_before_ != nullptr) return gone_(*ended_before_);
  for (std::size_t i = 0; i < neighbours_.size(); ++i)
    if (looked_at[i + 1].revents != 0) return gone_(neighbours_[i]);
}

}  // namespace longhand
