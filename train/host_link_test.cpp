// What is called while a device is waited for. The link to the CPU has nothing to wait for; that to a GPU is used by every training test.
#include "train/host_link.h"

#include <chrono>
#include <stdexcept>

#include "core/error.h"
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

TEST("host link: values on their way to a GPU and back are not overwritten by those behind them") {
  if (cuda_device_count() == 0) SKIP("no CUDA device");
  const Device gpu = Device::cuda();
  const auto link = make_host_link(gpu);
  const Tensor work = Tensor::empty(gpu, Dtype::f32, {int64_t{1} << 26}), answer = Tensor::empty(gpu, Dtype::f64, {3});
  Tensor sent;
  std::vector<Tensor> seen;
  for (int32_t turn = 0; turn < 30; ++turn) {  // more than the link has places for
    fill(work, turn);                          // copies wait behind it, while the host goes on
    link->upload(sent, std::span<const int32_t>(std::vector<int32_t>(1000, turn)), {1000});
    seen.push_back(sent.clone());
  }
  for (int32_t turn = 0; turn < 30; ++turn) {
    fill(work, turn);
    fill(answer, turn);
    link->request(answer);
    if (turn > 0) CHECK(link->receive() == std::vector<double>(3, turn - 1));
  }
  CHECK_THROWS_AS((link->request(answer), link->request(answer)), ValueError);
  for (const double turn : {29, 29}) CHECK(link->receive() == std::vector<double>(3, turn));
  CHECK_THROWS_AS(link->receive(), ValueError);
  for (int32_t turn = 0; turn < 30; ++turn)
    CHECK(seen[static_cast<std::size_t>(turn)].to_vector<int32_t>() == std::vector<int32_t>(1000, turn));
}

}  // namespace
}  // namespace longhand
