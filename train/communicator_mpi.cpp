// Processes joined by MPI, which works on host memory; the one file that includes its header. See communicator.h.
#include <mpi.h>

#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>

#include "core/error.h"
#include "train/communicator.h"
#include "train/neighbour_watch.h"

namespace longhand {
namespace {

// Elements of one call: MPI counts in int.
constexpr int64_t kMost = int64_t{1} << 30;
// A launcher that sees a process die has ended the others after a second.
constexpr int kLaunchersTime_ms = 3000;

void check(int status, const char* call) {
  if (status == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = "";
  int length = 0;
  MPI_Error_string(status, text, &length);
  throw DeviceError("mpi: a call failed", {{"call", call}, {"reason", std::string(text, static_cast<std::size_t>(length))}});
}

// Tensors whose elements are summed.
MPI_Datatype sum_type_of(const Tensor& t) {
  if (t.dtype() == Dtype::f32) return MPI_FLOAT;
  if (t.dtype() == Dtype::f64) return MPI_DOUBLE;
  throw DtypeError("mpi: sums are taken of f32 or f64", {{"tensor", t.describe()}});
}

void require_host(const Tensor& t) {
  if (t.device().is_cuda() || !t.is_contiguous()) throw DeviceError("mpi: contiguous host memory is needed", {{"tensor", t.describe()}});
}

int count_of(int64_t n) {
  if (n > INT_MAX) throw ValueError("mpi: a part is larger than a call can move", {{"elements", std::to_string(n)}});
  return static_cast<int>(n);
}

int64_t row_bytes(const Tensor& t) {
  return t.dim(0) == 0 ? 0 : t.numel() / t.dim(0) * size_of(t.dtype());
}

class MpiProcesses final : public Communicator {
 public:
  MpiProcesses(int64_t size, int64_t rank, const std::vector<Neighbour>& neighbours) : Communicator(size, rank) {
    if (neighbours.empty()) return;
    watch_.emplace(
        neighbours,
        [size, rank](const Neighbour& gone) {
          fmt::print(stderr,
                     "error: processes: another one of this machine has ended, and the launcher did not end the job\n  process {}, id {}\n"
                     "  try     look for what ended it; a training goes on with longhand train --resume, all else begins again\n"
                     "process {} of {} ends the run\n",
                     gone.rank, gone.id, rank, size);
          std::_Exit(1);  // this process waits for the other one wherever it is, and cannot be made to go on
        },
        [rank](const std::string& reason) {
          fmt::print(stderr, "warning: process {} no longer watches the others of its machine ({}): if one dies, it may wait for ever\n",
                     rank, reason);
        },
        kLaunchersTime_ms);
    for (const auto& [neighbour, reason] : watch_->unwatched())
      fmt::print(stderr, "warning: process {}, id {}, is not watched ({}): if it dies, process {} may wait for it for ever\n",
                 neighbour.rank, neighbour.id, reason, rank);
  }
  ~MpiProcesses() override {
    int done = 0;
    // While an error is on its way out the others may wait in a call: MPI_Finalize would wait for them.
    if (std::uncaught_exceptions() != 0 || MPI_Finalized(&done) != MPI_SUCCESS || done != 0) return;
    MPI_Barrier(MPI_COMM_WORLD);  // nobody ends before all are here; who waits here for one that dies is told of it
    watch_.reset();               // the first to end from now on leave the others the watch's patience to come to this line
    MPI_Finalize();
  }
  std::string describe() const override { return fmt::format("{} process{}, MPI", size(), size() == 1 ? "" : "es"); }

  // A sum that is made once and handed out has the same bits everywhere, whatever way the library takes for a tensor of this size.
  void all_reduce_sum(const Tensor& t) override {
    require_host(t);
    if (t.numel() < kSmall) {
      check(MPI_Reduce(leads() ? MPI_IN_PLACE : t.raw(), t.raw(), count_of(t.numel()), sum_type_of(t), MPI_SUM, 0, MPI_COMM_WORLD),
            "MPI_Reduce");
      return broadcast(t, 0);
    }
    reduce_scatter_sum(t, 1);
    all_gather(t, cuts(t.numel()));
  }

  void reduce_scatter_sum(const Tensor& t, int64_t unit) override {
    require_host(t);
    std::vector<int> counts;
    for (int64_t p = 0; p < size(); ++p) counts.push_back(count_of(part_of(t.numel(), p, size(), unit).size()));
    const Part mine = own(t.numel(), unit);
    if (!scratch_.defined() || scratch_.numel() < mine.size() || scratch_.dtype() != t.dtype())
      scratch_ = Tensor::empty(Device::cpu(), t.dtype(), {std::max<int64_t>(mine.size(), 1)});
    check(MPI_Reduce_scatter(t.raw(), scratch_.raw(), counts.data(), sum_type_of(t), MPI_SUM, MPI_COMM_WORLD), "MPI_Reduce_scatter");
    std::memcpy(static_cast<char*>(t.raw()) + mine.begin * size_of(t.dtype()), scratch_.raw(),
                static_cast<std::size_t>(mine.size() * size_of(t.dtype())));
  }

  void all_gather(const Tensor& whole, std::span<const int64_t> at) override {
    require_host(whole);
    for (int64_t p = 0; p < size(); ++p) {  // each part from its owner: no limit on the sum of the parts
      const auto i = static_cast<std::size_t>(p);
      send_all(static_cast<char*>(whole.raw()) + at[i] * row_bytes(whole), (at[i + 1] - at[i]) * row_bytes(whole), p);
    }
  }

  void broadcast(const Tensor& whole, int64_t root) override {
    require_host(whole);
    send_all(static_cast<char*>(whole.raw()), whole.numel() * size_of(whole.dtype()), root);
  }

  Tensor gather(const Tensor& part) override {
    require_host(part);
    const int64_t bytes = part.numel() * size_of(part.dtype());
    int64_t rows = part.dim(0);
    std::vector<int64_t> all_rows(static_cast<std::size_t>(size()));
    check(MPI_Gather(&rows, 1, MPI_INT64_T, all_rows.data(), 1, MPI_INT64_T, 0, MPI_COMM_WORLD), "MPI_Gather");
    if (!leads()) {
      for (int64_t at = 0; at < bytes; at += kMost)
        check(MPI_Send(static_cast<const char*>(part.raw()) + at, count_of(std::min(kMost, bytes - at)), MPI_BYTE, 0, kTag, MPI_COMM_WORLD),
              "MPI_Send");
      return {};
    }
    Shape shape = part.shape();
    int64_t element = size_of(part.dtype());
    for (int axis = 1; axis < shape.rank(); ++axis) element *= shape[axis];
    shape[0] = 0;
    for (const int64_t n : all_rows) shape[0] += n;
    Tensor whole = Tensor::empty(Device::cpu(), part.dtype(), shape);
    auto* to = static_cast<char*>(whole.raw());
    for (int64_t p = 0; p < size(); ++p) {
      const int64_t length = all_rows[static_cast<std::size_t>(p)] * element;
      if (p == 0) std::memcpy(to, part.raw(), static_cast<std::size_t>(length));
      for (int64_t at = 0; p > 0 && at < length; at += kMost)
        check(MPI_Recv(to + at, count_of(std::min(kMost, length - at)), MPI_BYTE, static_cast<int>(p), kTag, MPI_COMM_WORLD,
                       MPI_STATUS_IGNORE),
              "MPI_Recv");
      to += length;
    }
    return whole;
  }

  std::vector<std::string> all_texts(const std::string& own_text) override {
    std::vector<std::string> out;
    for (int64_t p = 0; p < size(); ++p) {
      std::string text = p == rank() ? own_text : "";
      auto length = static_cast<int64_t>(text.size());
      check(MPI_Bcast(&length, 1, MPI_INT64_T, static_cast<int>(p), MPI_COMM_WORLD), "MPI_Bcast");
      text.resize(static_cast<std::size_t>(length));
      send_all(text.data(), length, p);
      out.push_back(std::move(text));
    }
    return out;
  }

  int64_t all_reduce_max(int64_t value) override {
    check(MPI_Allreduce(MPI_IN_PLACE, &value, 1, MPI_INT64_T, MPI_MAX, MPI_COMM_WORLD), "MPI_Allreduce");
    return value;
  }

  void barrier() override { check(MPI_Barrier(MPI_COMM_WORLD), "MPI_Barrier"); }

 protected:
  void end_all(int code) override { MPI_Abort(MPI_COMM_WORLD, code); }

 private:
  static constexpr int kTag = 1;
  static constexpr int64_t kSmall = 4096;  // elements summed on process 0 rather than in parts

  static void send_all(char* data, int64_t bytes, int64_t root) {
    for (int64_t at = 0; at < bytes; at += kMost)
      check(MPI_Bcast(data + at, count_of(std::min(kMost, bytes - at)), MPI_BYTE, static_cast<int>(root), MPI_COMM_WORLD), "MPI_Bcast");
  }

  Tensor scratch_;
  std::optional<NeighbourWatch> watch_;
};

// The other processes of a machine, as far as this one can see them by their ids.
std::vector<Neighbour> neighbours_on(MPI_Comm machine, int rank) {
  struct stat names {};
  int size = 1;
  check(MPI_Comm_size(machine, &size), "MPI_Comm_size");
  const bool known = ::stat("/proc/self/ns/pid", &names) == 0;
  const int64_t own[] = {rank, ::getpid(), known ? static_cast<int64_t>(names.st_ino) : -1 - rank};  // a container has ids of its own
  std::vector<int64_t> all(3 * static_cast<std::size_t>(size));
  check(MPI_Allgather(own, 3, MPI_INT64_T, all.data(), 3, MPI_INT64_T, machine), "MPI_Allgather");
  std::vector<Neighbour> neighbours;
  for (std::size_t at = 0; at < all.size(); at += 3)
    if (all[at] != rank && all[at + 2] == own[2]) neighbours.push_back({all[at], static_cast<pid_t>(all[at + 1])});
  return neighbours;
}

}  // namespace

std::unique_ptr<Communicator> mpi_processes(LocalPlace& place) {
  int provided = 0;
  check(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided), "MPI_Init_thread");
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  int size = 1, rank = 0, local_size = 1, local_rank = 0;
  check(MPI_Comm_size(MPI_COMM_WORLD, &size), "MPI_Comm_size");
  check(MPI_Comm_rank(MPI_COMM_WORLD, &rank), "MPI_Comm_rank");
  MPI_Comm machine = MPI_COMM_NULL;
  check(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL, &machine), "MPI_Comm_split_type");
  MPI_Comm_size(machine, &local_size);
  MPI_Comm_rank(machine, &local_rank);
  const std::vector<Neighbour> neighbours = neighbours_on(machine, rank);
  MPI_Comm_free(&machine);
  place = {local_rank, local_size};
  return std::make_unique<MpiProcesses>(size, rank, neighbours);
}

}  // namespace longhand
