// Ctrl-C and SIGTERM as a request: while a guard lives, the first signal is only noted, the second ends the program at once.
#pragma once

namespace longhand {

class InterruptGuard {  // one at a time
 public:
  InterruptGuard();
  ~InterruptGuard();
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;

  /// The signal that came since the guard was made, or 0.
  int signal() const;
};

}  // namespace longhand
