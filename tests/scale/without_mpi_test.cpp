// How processes are joined in a build without MPI and NCCL, whatever this build has: it says so, instead of training several times.
#define LONGHAND_WITH_MPI 0
#define LONGHAND_WITH_NCCL 0
#include "train/communicator.cpp"

#include "tests/support/check.h"

namespace longhand::test {
namespace {

// An environment variable for a scope.
class Variable {
 public:
  Variable(const char* name, const char* value) : name_(name) { ::setenv(name, value, 1); }
  ~Variable() { ::unsetenv(name_); }
  Variable(const Variable&) = delete;
  Variable& operator=(const Variable&) = delete;

 private:
  const char* name_;
};

TEST("without MPI, one process is one by itself, and several of any launcher are refused with what to do") {
  LocalPlace place;
  CHECK(join_processes(place)->alone());
  CHECK(launched_processes() == 1);
  {
    const Variable mpirun("OMPI_COMM_WORLD_SIZE", "1");
    CHECK(join_processes(place)->alone());
  }
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS"}) {
    CAPTURE(name);
    const Variable launcher(name, "2");
    CHECK(launched_processes() == 2);
    CHECK_THROWS_WITH_AS(join_processes(place), doctest::Contains("this build has no MPI"), ConfigError);
    CHECK_THROWS_WITH_AS(join_processes(place), doctest::Contains("2 equal runs"), ConfigError);
  }
  {
    const Variable tasks("SLURM_STEP_NUM_TASKS", "4"), process("SLURM_PROCID", "0");  // as in a batch script, which starts no step
    CHECK(join_processes(place)->alone());
    const Variable step("SLURM_STEP_ID", "0");
    CHECK_THROWS_AS(join_processes(place), ConfigError);
  }
}

TEST("without NCCL, processes on a GPU are refused and stay as they were") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  std::unique_ptr<Communicator> processes = single_process();
  with_device(processes, Device::cuda(0));
  CHECK(processes->alone());
  CHECK_THROWS_AS(with_device(processes, Device::cuda(0), true), DeviceError);
  REQUIRE(processes != nullptr);
  CHECK(processes->describe() == "1 process");
}

}  // namespace
}  // namespace longhand::test
