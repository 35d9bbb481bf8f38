// See interrupt.h.
#include "train/interrupt.h"

#include <signal.h>

namespace longhand {
namespace {

volatile sig_atomic_t noted = 0;

void note(int signal) {
  noted = signal;
}

void handle(void (*handler)(int)) {
  struct sigaction action {};
  action.sa_handler = handler;
  action.sa_flags = static_cast<int>(SA_RESETHAND | SA_RESTART);  // the second signal finds the default action
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

}  // namespace

InterruptGuard::InterruptGuard() {
  noted = 0;
  handle(&note);
}
InterruptGuard::~InterruptGuard() {
  handle(SIG_DFL);
}
int InterruptGuard::signal() const {
  return noted;
}

}  // namespace longhand
