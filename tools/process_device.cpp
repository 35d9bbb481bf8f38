// See process_device.h.
#include "tools/process_device.h"

#include <fmt/format.h>
#include <omp.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <thread>
#include <vector>

#include "core/crc32.h"
#include "core/error.h"
#include "core/files.h"
#include "train/data_record.h"

namespace longhand {

int with_processes(const std::function<int(std::unique_ptr<Communicator>&, const LocalPlace&)>& work) {
  LocalPlace place;
  std::unique_ptr<Communicator> processes = join_processes(place);
  if (processes->alone()) return work(processes, place);
  const int64_t cores = ::sysconf(_SC_NPROCESSORS_ONLN), share = std::max<int64_t>(1, cores / place.size);
  if (std::getenv("OMP_NUM_THREADS") == nullptr)
    omp_set_num_threads(static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(omp_get_num_procs(), share))));
  const bool started_by_openmpi = std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr;  // srun gives what was asked for
  if (started_by_openmpi && omp_get_num_procs() < share && processes->leads())
    fmt::print(stderr,
               "warning: the launcher lets a process use {} of the {} cores that are its share; mpirun --bind-to none gives it all\n",
               omp_get_num_procs(), share);
  try {
    return work(processes, place);
  } catch (const std::exception& problem) {
    // What is wrong for all is said once, by process 0, whose end is the end of all; what is wrong for one it says itself.
    if (!processes->leads()) std::this_thread::sleep_for(std::chrono::seconds(1));
    fmt::print(stderr, "error: {}\nprocess {} of {} ends the run\n", problem.what(), processes->rank(), processes->size());
    std::fflush(nullptr);
    processes->abort(1);
  }
}

Device device_of_process(const std::string& asked, Communicator& processes, const LocalPlace& place) {
  const int gpus = cuda_device_count();
  const std::string name = !asked.empty() ? asked : gpus > 0 ? "cuda" : "cpu";
  if (processes.alone()) return Device::parse(name);
  if (name != "cpu" && name != "cuda")
    throw ConfigError("processes: several have a GPU each: none is named",
                      {{"given", "--device " + name}, {"try", "--device cuda, and CUDA_VISIBLE_DEVICES to leave some out"}});
  char host[256] = "";
  ::gethostname(host, sizeof host - 1);
  const std::vector<std::string> names = processes.all_texts(name), hosts = processes.all_texts(host);
  for (std::size_t p = 1; p < names.size(); ++p)
    if (names[p] != names[0])
      throw ConfigError("processes: they are not all to work on the same kind of device",
                        {{"process 0", names[0] + " on " + hosts[0]},
                         {fmt::format("process {}", p), names[p] + " on " + hosts[p]},
                         {"try", "--device cpu, or as many GPUs as processes on every machine"}});
  if (name == "cpu") return Device::cpu();
  // A launcher may show each process of a machine all GPUs, or its own alone, which then has number 0 for each.
  const int index = gpus >= place.size ? static_cast<int>(place.rank) : gpus == 1 ? 0 : -1;
  const std::vector<std::string> taken =
      processes.all_texts(index < 0 ? fmt::format("{} GPUs for {} processes", gpus, place.size) : gpu_identity(index));
  for (std::size_t p = 0; p < taken.size(); ++p)
    for (std::size_t other = 0; other <= p; ++other) {
      if (taken[p].starts_with("GPU") && (other == p || taken[p] != taken[other] || hosts[p] != hosts[other])) continue;
      throw DeviceError("processes: a machine has fewer GPUs than processes",
                        {{fmt::format("process {} on {}", other, hosts[other]), taken[other]},
                         {fmt::format("process {} on {}", p, hosts[p]), taken[p]},
                         {"try", "one process a GPU, or --device cpu"}});
    }
  return Device::cuda(index);
}

std::string description_of_weights(const LanguageModel& model) {
  const Tensor host = model.parameters().flat_master().to(Device::cpu());
  return fmt::format("weights: check sum {:08x}\n", crc32(host.raw(), static_cast<std::size_t>(host.numel() * size_of(host.dtype()))));
}

std::string description_of_files(const std::vector<std::string>& files) {
  std::string text;
  for (const DataFileRecord& file : record_data(files))
    text += fmt::format("data: {}, {} bytes, check {:08x}\n", file.file, file.bytes, file.check);
  return text;
}

std::string description_of_build() {
  const MappedFile program("/proc/self/exe");
  return fmt::format("build: {:08x}, {} bytes\n", crc32(program.bytes().data(), program.size()), program.size());
}

std::string description_of_environment() {
  std::string text;
  for (char** entry = environ; *entry != nullptr; ++entry)
    if (const std::string variable = *entry; variable.starts_with("LONGHAND_")) text += "environment: " + variable + "\n";
  return text;
}

}  // namespace longhand
