// `longhand doctor`: is this machine, this build and this data in order?
#pragma once
#include <string>
#include <vector>

namespace CLI {
class App;
}

namespace longhand {

struct DoctorCommand {
  std::vector<std::string> data;  // shards, caches, folders of them
  std::string tokenizer;          // a tokenizer.json; empty: none is looked at
  std::string device;             // empty: the CPU and every GPU
};
void add_doctor_options(CLI::App& command, DoctorCommand& options);

/// A line for each check on stdout: build, processor, libraries, devices and driver, folder of runs, data, and the self-test on every
/// device. What is wrong is followed by what to do about it.
/// returns  0 when nothing is wrong, else 1
int run_doctor(const DoctorCommand& command);

}  // namespace longhand
