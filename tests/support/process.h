// Programs run by a test: exit code, stdout and stderr apart, no shell in between.
#pragma once
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "tests/support/check.h"

namespace longhand::test {

inline std::string text_of(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  REQUIRE_MESSAGE(in.good(), path);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

struct ProcessResult {
  int code = -1;         // exit code, or 128 + the signal that ended it
  std::string out, err;  // all of stdout and stderr
};

struct ProcessOptions {
  std::string folder;                              // to start in; empty: this program's
  std::string input;                               // all of stdin
  std::map<std::string, std::string> environment;  // beside this program's; one compute thread unless it says otherwise
  std::chrono::seconds patience{60};               // with what is waited for
};

/// A running program. It is killed when the object goes before finish().
class Process {
 public:
  explicit Process(std::vector<std::string> words, const ProcessOptions& options = {}) : patience_(options.patience) {
    std::ofstream(scratch_.file("in"), std::ios::binary) << options.input;
    // Everything that allocates happens before fork().
    const std::string in = scratch_.file("in"), out = scratch_.file("out"), err = scratch_.file("err");
    auto environment = options.environment;
    environment.insert({{"OMP_NUM_THREADS", "1"}, {"OPENBLAS_NUM_THREADS", "1"}});
    std::vector<std::string> variables;
    for (char** entry = environ; *entry != nullptr; ++entry) {
      const std::string variable = *entry;
      if (!environment.contains(variable.substr(0, variable.find('=')))) variables.push_back(variable);
    }
    for (const auto& [name, value] : environment) variables.push_back(name + "=" + value);
    const std::vector<char*> argv = pointers(words), envp = pointers(variables);
    id_ = ::fork();
    REQUIRE(id_ >= 0);
    if (id_ > 0) return;
    const bool ready = redirect(in, O_RDONLY, STDIN_FILENO) && redirect(out, O_WRONLY | O_CREAT | O_TRUNC, STDOUT_FILENO) &&
                       redirect(err, O_WRONLY | O_CREAT | O_TRUNC, STDERR_FILENO) &&
                       (options.folder.empty() || ::chdir(options.folder.c_str()) == 0);
    if (ready) ::execve(argv[0], argv.data(), envp.data());
    ::_exit(127);
  }
  ~Process() {
    if (id_ <= 0 || ended_) return;
    ::kill(id_, SIGKILL);
    ::waitpid(id_, nullptr, 0);
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  void send(int signal) {
    REQUIRE_FALSE(ended());
    REQUIRE(::kill(id_, signal) == 0);
  }

  /// Waits until stderr holds `text`; false when the program ended or the patience was over without it.
  bool wait_for_message(const std::string& text) {
    return wait_until([&] {
      std::ifstream in(scratch_.file("err"), std::ios::binary);
      return std::string(std::istreambuf_iterator<char>(in), {}).find(text) != std::string::npos;
    });
  }

  /// Waits until `condition` holds; false when the program ended or the patience was over before.
  bool wait_until(const std::function<bool()>& condition) {
    for (const auto end = Clock::now() + patience_; Clock::now() < end; std::this_thread::sleep_for(std::chrono::milliseconds(1))) {
      if (condition()) return true;
      if (ended()) return condition();
    }
    return false;
  }

  /// Waits for the end; a program that takes longer fails the test.
  ProcessResult finish() {
    const bool in_time = wait_until([&] { return ended(); });
    REQUIRE_MESSAGE(in_time, "the program did not end in time");
    return {WIFEXITED(status_) ? WEXITSTATUS(status_) : 128 + WTERMSIG(status_), text_of(scratch_.file("out")),
            text_of(scratch_.file("err"))};
  }

 private:
  using Clock = std::chrono::steady_clock;

  static std::vector<char*> pointers(std::vector<std::string>& words) {
    std::vector<char*> out;
    for (std::string& word : words) out.push_back(word.data());
    out.push_back(nullptr);
    return out;
  }
  static bool redirect(const std::string& path, int flags, int to) {
    const int from = ::open(path.c_str(), flags, 0600);
    return from >= 0 && ::dup2(from, to) == to;
  }
  bool ended() {
    if (!ended_) ended_ = ::waitpid(id_, &status_, WNOHANG) == id_;
    return ended_;
  }

  std::chrono::seconds patience_;
  ScratchFolder scratch_;
  pid_t id_ = -1;
  int status_ = 0;
  bool ended_ = false;
};

inline ProcessResult run_process(std::vector<std::string> words, const ProcessOptions& options = {}) {
  return Process(std::move(words), options).finish();
}

}  // namespace longhand::test
