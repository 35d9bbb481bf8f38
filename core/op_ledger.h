// What the ops of a step took and what they cannot avoid, op by op.
#pragma once
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/device.h"
#include "core/time_marks.h"

namespace longhand {

class Tensor;

/// Listens to every op while it lives, of an op inside of another for itself; nothing is replayed from a graph meanwhile. On a GPU the time
/// of an op is that between two marks on its stream: nobody waits, but where the host is slower than the device its launches count. One at
/// a time.
class OpLedger {
 public:
  explicit OpLedger(const Device& device);
  ~OpLedger();
  OpLedger(const OpLedger&) = delete;
  OpLedger& operator=(const OpLedger&) = delete;

  struct Row {
    double ms = 0;
    double bytes = 0;  // inputs read once and outputs written once
    double flops = 0;  // of matrix products
    int64_t count = 0;
  };
  /// By op and shapes of the inputs that it names: "linear [4, 2048, 768] [3072, 768]". Waits for the device.
  const std::map<std::string, Row>& rows();

  static bool running();
  /// Adds to the row of the op that runs now, if there is one and somebody listens.
  static void note(double bytes, double flops);

 private:
  friend class OpScope;
  void begin(const char* op, std::initializer_list<const Tensor*> inputs);
  void end();
  struct Event {
    std::string op;  // that begins; empty: one ends
    std::size_t mark;
  };
  Device device_;
  std::unique_ptr<TimeMarks> marks_;
  std::vector<Event> events_;
  std::vector<std::string> open_;  // rows of the ops that run now, the innermost last
  std::map<std::string, Row> rows_;
};

}  // namespace longhand
