// Real processes that are killed; tests/scale_test.cpp has one of a job killed behind the launcher's back.
#include "train/neighbour_watch.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>

#include "tests/support/check.h"

namespace longhand {
namespace {

// A process that does nothing until it is killed.
class Idler {
 public:
  Idler() : id_(::fork()) {
    REQUIRE(id_ >= 0);
    if (id_ == 0)
      for (;;) ::pause();
  }
  ~Idler() {
    ::kill(id_, SIGKILL);
    ::waitpid(id_, nullptr, 0);
  }
  Idler(const Idler&) = delete;
  Idler& operator=(const Idler&) = delete;
  pid_t id() const { return id_; }

 private:
  pid_t id_;
};

void not_blind(const std::string& reason) {
  FAIL_CHECK("the watch went blind: " << reason);
}

// While it lives this process may have files below `most` only.
class FileLimit {
 public:
  explicit FileLimit(int most) {
    REQUIRE(::getrlimit(RLIMIT_NOFILE, &before_) == 0);
    const rlimit now{static_cast<rlim_t>(most), before_.rlim_max};
    REQUIRE(::setrlimit(RLIMIT_NOFILE, &now) == 0);
  }
  ~FileLimit() { ::setrlimit(RLIMIT_NOFILE, &before_); }
  FileLimit(const FileLimit&) = delete;
  FileLimit& operator=(const FileLimit&) = delete;

 private:
  rlimit before_{};
};

bool comes_to(const std::atomic<int64_t>& value, int64_t wanted) {
  for (int tries = 0; tries < 5000 && value != wanted; ++tries) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  return value == wanted;
}

TEST("neighbour watch: the process that ends is named, once its time is over and not before") {
  const Idler first, second, third;
  std::atomic<int64_t> gone = -1;
  const std::vector<Neighbour> all{{4, first.id()}, {5, second.id()}, {7, third.id()}};
  const auto note = [&](const Neighbour& neighbour) { gone = neighbour.rank; };
  {
    const NeighbourWatch patient(all, note, not_blind, 60'000);
    const NeighbourWatch watch(all, note, not_blind, 1);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    CHECK(gone == -1);
    ::kill(second.id(), SIGKILL);
    CHECK(comes_to(gone, 5));
    gone = -1;
  }
  CHECK(gone == -1);  // the patient one was still waiting when it ended
}

TEST("neighbour watch: one that cannot be looked at is named with the reason, and the others are watched") {
  std::atomic<int64_t> gone = -1;
  const Idler other;
  const NeighbourWatch watch(
      {{0, -1}, {1, other.id()}}, [&](const Neighbour& neighbour) { gone = neighbour.rank; }, not_blind, 1);
  REQUIRE(watch.unwatched().size() == 1);
  CHECK(watch.unwatched()[0].first.rank == 0);
  CHECK(watch.unwatched()[0].second == "pidfd_open: Invalid argument");
  ::kill(other.id(), SIGKILL);
  CHECK(comes_to(gone, 1));
}

TEST("neighbour watch: one that was gone before the watch began is gone") {
  pid_t before = 0;
  { before = Idler().id(); }
  std::atomic<int64_t> gone = -1;
  const Idler other;
  const NeighbourWatch watch(
      {{1, other.id()}, {2, before}}, [&](const Neighbour& neighbour) { gone = neighbour.rank; }, not_blind, 1);
  CHECK(watch.unwatched().empty());
  CHECK(comes_to(gone, 2));
}

TEST("neighbour watch: without a file left to watch with, all are named as not watched") {
  const Idler first, second;
  const FileLimit none(0);
  const NeighbourWatch watch(
      {{4, first.id()}, {5, second.id()}}, [](const Neighbour&) {}, not_blind, 1);
  REQUIRE(watch.unwatched().size() == 2);
  CHECK(watch.unwatched()[1].first.rank == 5);
  CHECK(watch.unwatched()[1].second == "eventfd: Too many open files");
}

TEST("neighbour watch: those for whom a file was left are watched, however many are not") {
  const Idler first, second;
  std::vector<int> open;  // until two places that follow each other were free: no hole is left in front of them
  const auto take = [&] {
    open.push_back(::open("/dev/null", O_RDONLY));
    REQUIRE(open.back() >= 0);
  };
  for (take(), take(); open.back() != open[open.size() - 2] + 1;) take();
  const int next = open[open.size() - 2];  // of the watch, for its end; the one behind is the first neighbour's
  ::close(next);
  ::close(next + 1);
  open.resize(open.size() - 2);
  std::vector<Neighbour> all{{0, first.id()}};
  for (int64_t rank = 1; rank < next + 20; ++rank) all.push_back({rank, second.id()});
  std::atomic<int64_t> gone = -1;
  {
    const FileLimit few(next + 2);
    const NeighbourWatch watch(
        all, [&](const Neighbour& neighbour) { gone = neighbour.rank; }, not_blind, 1);
    CHECK(watch.unwatched().size() == all.size() - 1);
    ::kill(first.id(), SIGKILL);
    CHECK(comes_to(gone, 0));
  }
  for (const int file : open) ::close(file);
}

TEST("neighbour watch: when it can no longer wait it says so, and names who had ended") {
  const Idler other;
  std::atomic<int64_t> gone = -1;
  std::string why;  // written before gone is
  const NeighbourWatch watch(
      {{3, other.id()}}, [&](const Neighbour& neighbour) { gone = neighbour.rank; }, [&](const std::string& reason) { why = reason; },
      60'000);
  std::this_thread::sleep_for(std::chrono::milliseconds(50));  // it waits for the other
  const FileLimit none(0);
  ::kill(other.id(), SIGKILL);
  CHECK(comes_to(gone, 3));
  CHECK(why == "poll: Invalid argument");
}

}  // namespace
}  // namespace longhand
