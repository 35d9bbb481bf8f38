// Communicator: the processes that train one model together, each with a part of every batch. Three implementations: a process by itself
// (single_process.h), MPI between CPUs (communicator_mpi.cpp) and NCCL between GPUs (communicator_nccl_cuda.cpp). docs/scale.md says how
// processes are started.
//
// Every call but size(), rank() and abort() is one that all processes make, in the same order, with tensors of the same size and dtype.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/tensor.h"
#include "train/part.h"

namespace longhand {

class Communicator {
 public:
  virtual ~Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  int64_t size() const { return size_; }  // processes
  int64_t rank() const { return rank_; }  // this one's number, from 0
  bool alone() const { return size_ == 1; }
  bool leads() const { return rank_ == 0; }
  /// This process's part of n things; `unit` as in part_of().
  Part own(int64_t n, int64_t unit = 1) const { return part_of(n, rank_, size_, unit); }
  /// "1 process", "4 processes, MPI", "8 processes, NCCL".
  virtual std::string describe() const = 0;

  // Tensors are contiguous. On a GPU the calls are queued like kernels and can be part of a captured step. They are made one after the
  // other, each behind the work that was queued before it, and what is queued afterwards waits for them. What is queued between
  // begin_overlap() and end_overlap() does not: only join() makes the work behind it wait for the calls in between.

  virtual void begin_overlap() {}
  virtual void end_overlap() {}
  virtual void join() {}

  /// t = sum over processes, in place. f32, f64
  /// holds  every process has the same bits; the same number of processes gives the same bits in every run
  virtual void all_reduce_sum(const Tensor& t) = 0;

  /// The part own(n, unit) of t [n] becomes the sum over processes; the rest of t holds no meaning afterwards. f32, f64
  virtual void reduce_scatter_sum(const Tensor& t, int64_t unit) = 0;

  /// Every process gives its part of whole [n, ..]; all have all of it afterwards. Any dtype.
  /// cuts  [size + 1] first row of each process's part, and n
  virtual void all_gather(const Tensor& whole, std::span<const int64_t> cuts) = 0;

  /// Makes the calls that `calls` makes, of one kind and none behind another's result: one exchange where that is faster.
  virtual void as_one(const std::function<void()>& calls) { calls(); }

  /// whole = the one of process `root`. Any dtype.
  virtual void broadcast(const Tensor& whole, int64_t root) = 0;

  // On the host, whatever the device.

  /// The parts of all processes, one after the other, on process 0; undefined on the others.
  /// part  on the CPU, contiguous, [rows, ..]; processes may have different numbers of rows
  virtual Tensor gather(const Tensor& part) = 0;
  /// The text of every process, by rank.
  virtual std::vector<std::string> all_texts(const std::string& own) = 0;
  /// The largest of all processes' numbers.
  virtual int64_t all_reduce_max(int64_t value) = 0;
  virtual void barrier() = 0;

  /// Ends all processes with a message where the link to another one is known to be broken: to be called now and then while waiting for a
  /// device that waits for the others. What waits there could not be waited for any more, so nothing is thrown.
  virtual void require_links() {}

  /// Ends all processes at once, with this exit code: what one that cannot go on does, so that the others do not wait for it.
  [[noreturn]] void abort(int code) {
    end_all(code);
    std::abort();
  }

  /// First rows of the parts of n rows, and n: what all_gather() takes.
  std::vector<int64_t> cuts(int64_t n, int64_t unit = 1) const;

 protected:
  Communicator(int64_t size, int64_t rank) : size_(size), rank_(rank) {}
  virtual void end_all(int code) = 0;  // does not come back
  static void end_all_of(Communicator& other, int code) { other.end_all(code); }

 private:
  int64_t size_, rank_;
};

/// One process by itself.
std::unique_ptr<Communicator> single_process();

/// Where a launcher (mpirun, srun) put this process on its machine.
struct LocalPlace {
  int64_t rank = 0, size = 1;
};

/// How many processes mpirun or srun says it started together with this one; 1 without a launcher.
int64_t launched_processes();

/// The processes that mpirun or srun started this one with, joined on the host; without a launcher, one by itself.
/// place   filled with this process's place on its machine
/// errors  ConfigError when a launcher started several processes but this build has no MPI, or a launcher and the MPI library do not
///         understand each other
std::unique_ptr<Communicator> join_processes(LocalPlace& place);

/// The same processes with tensors of `device` in reach: on a GPU through NCCL, where there are several processes or `always` says so.
/// errors  DeviceError when that takes NCCL and this build has none, or NCCL fails; `processes` stays as it was then
void with_device(std::unique_ptr<Communicator>& processes, const Device& device, bool always = false);

/// What tells a GPU from the others of its machine, whatever number a process knows it by; only its number in a build without NCCL.
std::string gpu_identity(int index);

/// Does something of which all processes must know whether it went well: where it throws for one, this throws on all.
/// errors  those of f; FileError naming the process and its error on the others
void together(Communicator& processes, const std::function<void()>& f);

/// Compares a text that describes a process ("key: value" lines) over all processes.
/// errors  ConfigError naming the first process that differs from process 0, and the lines in which it does; on every process
void require_same_everywhere(Communicator& processes, const std::string& text);

}  // namespace longhand
