// SPDX-License-Identifier: Apache-2.0
// The operating system is played by functions that answer what the test wants and count how often they were asked.
#include "common/tile_permission.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <thread>
#include <vector>

namespace dynamic_moe {
namespace {

using ::testing::HasSubstr;

std::atomic<int> requests{0};

template <int kAnswer>
int answer() {
  ++requests;
  return kAnswer;
}

// Slow enough for others to come while it is under way.
int grant_slowly() {
  ++requests;
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  return 0;
}

class TilePermissionTest : public ::testing::Test {
 protected:
  void SetUp() override { requests = 0; }
};

TEST_F(TilePermissionTest, AsksAtTheFirstCallOnly) {
  TilePermission tiles(answer<0>);
  EXPECT_EQ(tiles.state(), TilePermission::State::kNotAsked);
  EXPECT_EQ(tiles.reason(), "");
  EXPECT_EQ(requests, 0);
  for (int call = 0; call < 3; ++call) EXPECT_TRUE(tiles.ask());
  EXPECT_EQ(tiles.state(), TilePermission::State::kGranted);
  EXPECT_EQ(tiles.reason(), "");
  EXPECT_EQ(requests, 1);
}

TEST_F(TilePermissionTest, ARefusalIsRememberedWithItsReason) {
  const auto expect_refusal = [](TilePermission::Request request, int error, const char* cause) {
    requests = 0;
    TilePermission tiles(request);
    for (int call = 0; call < 3; ++call) EXPECT_FALSE(tiles.ask());
    EXPECT_EQ(tiles.state(), TilePermission::State::kRefused);
    EXPECT_EQ(requests, 1);
    EXPECT_THAT(tiles.reason(), HasSubstr("(errno " + std::to_string(error) + "): "));
    EXPECT_THAT(tiles.reason(), HasSubstr(cause));
  };
  expect_refusal(answer<ENOSPC>, ENOSPC, "alternate signal stack");
  expect_refusal(answer<EPERM>, EPERM, "seccomp");
  expect_refusal(answer<ENOSYS>, ENOSYS, "lacks the system call");
  expect_refusal(answer<EINVAL>, EINVAL, "older than Linux 5.16");
  expect_refusal(answer<EOPNOTSUPP>, EOPNOTSUPP, "hypervisor");
  expect_refusal(answer<EIO>, EIO, "no common cause");
}

TEST_F(TilePermissionTest, ThreadsThatComeTogetherAskOnce) {
  TilePermission tiles(grant_slowly);
  std::atomic<int> granted{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) threads.emplace_back([&] { granted += tiles.ask(); });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(granted, 8);
  EXPECT_EQ(requests, 1);
}

// What a child process finds, as its exit status: 0 if it may use the tiles after `expected` requests in all.
int status_of_child(TilePermission& tiles, int expected) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // a child that waits for a thread it does not have
    const bool granted = tiles.ask();
    _exit(granted && requests == expected ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  return status;
}

TEST_F(TilePermissionTest, AChildRepeatsTheAnswerThatItsParentGot) {
  TilePermission tiles(answer<0>);
  EXPECT_EQ(status_of_child(tiles, 1), 0) << "a child of a process that has not asked asks for itself";
  EXPECT_EQ(tiles.state(), TilePermission::State::kNotAsked);
  EXPECT_TRUE(tiles.ask());
  EXPECT_EQ(status_of_child(tiles, 1), 0) << "the answer is inherited";
}

TEST_F(TilePermissionTest, AForkWhileAnotherThreadAsksLosesNothing) {
  TilePermission tiles(grant_slowly);
  std::thread asking([&] { tiles.ask(); });
  while (requests == 0) std::this_thread::yield();
  EXPECT_EQ(status_of_child(tiles, 1), 0);
  asking.join();
}

}  // namespace
}  // namespace dynamic_moe
