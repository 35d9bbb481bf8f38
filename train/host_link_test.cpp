// What is called while a device is waited for. The link to the CPU has nothing to wait for; that to a GPU is used by every training test.
#include "train/host_link.h"

#include <chrono>
#include <stdexcept>

#include "tests/support/check.h"

namespace longhand {
namespace {

// A device that is done after a number of questions; 0: never.
class SlowLink final : public HostLink {
 public:
  explicit SlowLink(int64_t questions) : HostLink(Device::cpu()), left_(questions) {}
  void request(const Tensor&) override {}
  std::vector<double> receive() override { return {}; }
  void wait() override {
    watch([&] { return --left_ == 0; });
  }

 protected:
  void copy_up(const Tensor&, const void*, std::size_t) override {}

 private:
  int64_t left_;
};

TEST("host link: whoever waits for a device that is never done is asked again and again") {
  SlowLink link(0);
  int calls = 0;
  link.while_waiting([&] {
    if (++calls == 3) throw std::runtime_error("a link is broken");
  });
  const auto start = std::chrono::steady_clock::now();
  CHECK_THROWS_AS(link.wait(), std::runtime_error);
  CHECK(calls == 3);
  CHECK(std::chrono::steady_clock::now() - start >= std::chrono::milliseconds(300));
}

TEST("host link: nothing is called where the device is done, and nothing is watched where nothing is to be called") {
  SlowLink done(1), unwatched(0);
  done.while_waiting([] { throw std::runtime_error("called"); });
  CHECK_NOTHROW(done.wait());
  CHECK_NOTHROW(unwatched.wait());
}

}  // namespace
}  // namespace longhand
