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

NeighbourWatch::NeighbourWatch(const std::vector<Neighbour>& neighbours, std::function<void(const Neighbour&)> gone,
                               std::function<void(const std::string&)> blind, int patience_ms)
    : neighbours_(neighbours),
      gone_(std::move(gone)),
      blind_(std::move(blind)),
      patience_ms_(patience_ms),
      end_(::eventfd(0, EFD_CLOEXEC)) {
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
  std::vector<const Neighbour*> whose{nullptr};
  for (std::size_t i = 0; i < neighbours_.size(); ++i) {
    if (files_[i] < 0) continue;  // poll counts what it passes over against the files that a process may have
    looked_at.push_back({files_[i], POLLIN, 0});
    whose.push_back(&neighbours_[i]);
  }
  const auto wait = [&](std::size_t files, int patience_ms) {
    int ready = 0;
    do ready = ::poll(looked_at.data(), files, patience_ms);
    while (ready < 0 && errno == EINTR);
    if (ready < 0) blind_(failure_of("poll"));
    return ready;
  };
  const Neighbour* ended = ended_before_;
  if (ended == nullptr) {
    if (wait(looked_at.size(), -1) < 0 || looked_at[0].revents != 0) return;
    for (std::size_t i = looked_at.size(); --i > 0;)
      if (looked_at[i].revents != 0) ended = whose[i];
  }
  if (wait(1, patience_ms_) <= 0) gone_(*ended);  // else the watch has ended
}

}  // namespace longhand
