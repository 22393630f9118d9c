// Fibers, and what they wait for.
#include "cuda_on_cpu.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

dim3 blockIdx, blockDim, gridDim;

namespace {

constexpr size_t STACK = 1 << 17;

struct Fiber {
  ucontext_t start;
  jmp_buf place;
  std::unique_ptr<char[]> stack;
  bool started, ended;
};

// What so many threads come to before any goes on.
struct Barrier {
  unsigned here, round;
};

struct Exchanges {
  Lanes lanes[2];
  unsigned next[32];
};

std::vector<Fiber> fibers;
unsigned threads, turn, alive;
const std::function<void()>* body;
ucontext_t launcher;
Barrier of_block;
std::vector<Barrier> of_warps;
std::vector<Exchanges> exchanges;

void run_fiber();

// Leaves this fiber until it is its turn again.
void give_turn(unsigned next) {
  Fiber& mine = fibers[turn];
  if (!mine.ended && _setjmp(mine.place)) return;
  turn = next;
  Fiber& other = fibers[next];
  if (other.started) _longjmp(other.place, 1);
  other.started = true;
  setcontext(&other.start);
}

// The next thread of begin..end that has not ended.
unsigned after(unsigned thread, unsigned begin, unsigned end) {
  unsigned next = thread;
  do next = next + 1 < end ? next + 1 : begin;
  while (fibers[next].ended && next != thread);
  return next;
}

void run_fiber() {
  (*body)();
  fibers[turn].ended = true;
  alive--;
  if (alive == 0) setcontext(&launcher);
  if (of_block.here == alive) of_block = {0, of_block.round + 1};
  give_turn(after(turn, 0, threads));
}

void wait_at(Barrier& barrier, unsigned all, unsigned begin, unsigned end) {
  const unsigned round = barrier.round;
  if (++barrier.here == all) {
    barrier = {0, round + 1};
    return;
  }
  while (barrier.round == round) {
    const unsigned next = after(turn, begin, end);
    if (next == turn) {
      fprintf(stderr, "thread %u waits for threads that have ended\n", turn);
      exit(2);
    }
    give_turn(next);
  }
}

}  // namespace

unsigned this_thread() { return turn; }

void __syncthreads() { wait_at(of_block, alive, 0, threads); }

void wait_for_warp() {
  const unsigned warp = turn / 32;
  wait_at(of_warps[warp], 32, 0, threads);
}

Lanes& next_exchange() {
  Exchanges& of_warp = exchanges[turn / 32];
  unsigned& next = of_warp.next[turn % 32];
  next ^= 1;
  return of_warp.lanes[next];
}

unsigned launched = 0;
unsigned blocks_launched() { return launched; }

void launch_block(unsigned count, const std::function<void()>& kernel) {
  launched++;
  threads = alive = count;
  body = &kernel;
  blockDim = {count, 1, 1};
  of_block = {0, 0};
  of_warps.assign(count / 32, Barrier{0, 0});
  exchanges.assign(count / 32, Exchanges{});
  if (fibers.size() < count) fibers.resize(count);
  for (unsigned i = 0; i < count; i++) {
    Fiber& fiber = fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[STACK]);
    fiber.started = fiber.ended = false;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = STACK;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_fiber, 0);
  }
  volatile bool ended = false;
  getcontext(&launcher);
  if (ended) return;
  ended = true;
  turn = 0;
  fibers[0].started = true;
  setcontext(&fibers[0].start);
}
