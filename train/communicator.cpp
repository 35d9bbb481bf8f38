// One process by itself, and the choice of how several are joined; see communicator.h.
#include "train/communicator.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <sstream>

#include "core/error.h"
#include "train/single_process.h"

namespace longhand {

std::unique_ptr<Communicator> mpi_processes(LocalPlace& place);  // communicator_mpi.cpp
// communicator_nccl_cuda.cpp
std::unique_ptr<Communicator> nccl_processes(std::unique_ptr<Communicator>& host, const Device& device);
std::string nccl_gpu_identity(int index);

namespace {

int64_t number_in(const char* variable) {
  const char* text = std::getenv(variable);
  return text == nullptr ? 0 : std::strtoll(text, nullptr, 10);
}

// How many processes a launcher says it started together with this one, and which variable says so; 0 without a launcher.
struct Launch {
  int64_t processes = 0;
  std::string variable;
};
Launch launch() {
  for (const char* variable : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS"})
    if (const int64_t n = number_in(variable); n > 0) return {n, variable};
  // A batch script has SLURM_NTASKS too; a step that srun started has a step id beside the batch step's.
  if (std::getenv("SLURM_STEP_ID") != nullptr && std::getenv("SLURM_PROCID") != nullptr)
    if (const int64_t n = number_in("SLURM_STEP_NUM_TASKS"); n > 1) return {n, "SLURM_STEP_NUM_TASKS"};
  return {};
}

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  return lines;
}

}  // namespace

Part part_of(int64_t n, int64_t part, int64_t parts, int64_t unit) {
  const int64_t units = (n + unit - 1) / unit;
  return {std::min(n, part * units / parts * unit), std::min(n, (part + 1) * units / parts * unit)};
}

std::vector<int64_t> Communicator::cuts(int64_t n, int64_t unit) const {
  std::vector<int64_t> out{0};
  for (int64_t p = 0; p < size(); ++p) out.push_back(part_of(n, p, size(), unit).end);
  return out;
}

std::unique_ptr<Communicator> single_process() {
  return std::make_unique<SingleProcess>();
}

int64_t launched_processes() {
  return std::max<int64_t>(1, launch().processes);
}

std::unique_ptr<Communicator> join_processes(LocalPlace& place) {
  const Launch started = launch();
  if (started.processes == 0) return single_process();
#if LONGHAND_WITH_MPI
  auto processes = mpi_processes(place);
  if (processes->size() != started.processes && started.variable != "MPI_LOCALNRANKS")
    throw ConfigError("processes: the launcher started several processes, but the MPI library of this build does not see them",
                      {{started.variable, std::to_string(started.processes)},
                       {"seen by MPI", std::to_string(processes->size())},
                       {"try", "the mpirun of the same MPI, or srun --mpi=pmix (srun --mpi=list shows what there is)"}});
  return processes;
#else
  place = {};
  if (started.processes == 1) return single_process();
  throw ConfigError("processes: several were started, but this build has no MPI to join them",
                    {{started.variable, std::to_string(started.processes)},
                     {"would be", fmt::format("{} equal runs", started.processes)},
                     {"try", "install an MPI (libopenmpi-dev) and configure again: the summary then says MPI"}});
#endif
}

void with_device(std::unique_ptr<Communicator>& processes, const Device& device, bool always) {
  if (!device.is_cuda() || (processes->alone() && !always)) return;
#if LONGHAND_WITH_NCCL
  processes = nccl_processes(processes, device);
#else
  throw DeviceError(
      "processes: this build has no NCCL, through which GPUs exchange gradients",
      {{"processes", std::to_string(processes->size())}, {"try", "install NCCL (libnccl-dev) and configure again, or train on one GPU"}});
#endif
}

std::string gpu_identity(int index) {
#if LONGHAND_WITH_NCCL
  return nccl_gpu_identity(index);
#else
  return "GPU " + std::to_string(index);
#endif
}

void together(Communicator& processes, const std::function<void()>& f) {
  std::string problem;
  std::exception_ptr failed;
  try {
    f();
  } catch (const std::exception& error) {
    problem = error.what();
    failed = std::current_exception();
  }
  const std::vector<std::string> problems = processes.all_texts(problem);
  if (failed) std::rethrow_exception(failed);
  for (std::size_t p = 0; p < problems.size(); ++p)
    if (!problems[p].empty())
      throw FileError("processes: another one could not do its part", {{"process", std::to_string(p)}, {"because", problems[p]}});
}

void require_same_everywhere(Communicator& processes, const std::string& text) {
  const std::vector<std::string> texts = processes.all_texts(text);
  for (std::size_t p = 1; p < texts.size(); ++p) {
    if (texts[p] == texts[0]) continue;
    const std::vector<std::string> first = lines_of(texts[0]), other = lines_of(texts[p]);
    std::vector<ErrorRow> rows;
    auto tell = [&](const std::string& who, const std::vector<std::string>& lines, const std::vector<std::string>& known) {
      constexpr std::size_t kShown = 4;
      std::size_t shown = 0;
      for (const std::string& line : lines)
        if (std::find(known.begin(), known.end(), line) == known.end() && ++shown <= kShown) rows.push_back({who, line});
    };
    tell("process 0", first, other);
    tell(fmt::format("process {}", p), other, first);
    throw ConfigError("processes: they do not agree on what to do", rows);
  }
}

}  // namespace longhand
