// What a command that several processes run together begins and ends with.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/device.h"
#include "models/language_model.h"
#include "train/communicator.h"

namespace longhand {

/// Joins the processes that a launcher started and calls `work`. Threads are shared out among the processes of a machine. An error of one
/// ends all of them, and is told once.
int with_processes(const std::function<int(std::unique_ptr<Communicator>&, const LocalPlace&)>& work);

/// The device of this process: of several on a machine with GPUs, each has its own. All processes call it together.
/// asked   "": a GPU where there is one, else the CPU
/// errors  on every process what is wrong for one: ConfigError when not all are to use the same kind of device, or one names its GPU;
///         DeviceError when a machine has fewer GPUs than processes
Device device_of_process(const std::string& asked, Communicator& processes, const LocalPlace& place);

/// "weights: check sum 1a2b3c4d", for require_same_everywhere().
std::string description_of_weights(const LanguageModel& model);

/// "data: shard.jsonl, 123 bytes, check 1a2b3c4d" for each file, a line each.
std::string description_of_files(const std::vector<std::string>& files);

/// "build: 1a2b3c4d, 12345 bytes": of this program.
std::string description_of_build();

/// "environment: NAME=value" for each variable of longhand's: switches, some of which decide how work is queued.
std::string description_of_environment();

}  // namespace longhand
