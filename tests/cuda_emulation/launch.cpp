// Runs grids: which blocks run together, when threads go on after they have waited for others, and what is an error.
#include <algorithm>
#include <array>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "cuda_emulation.h"
#include "fibers.h"

namespace fastlayers::cuda::emulation {

constinit const ThreadIndices* indices = nullptr;

namespace {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024, kMaxThreadsZ = 64, kMaxGridYZ = 65535;
constexpr std::size_t kMaxSharedBytes = 227 * 1024;
constexpr int kMaxCluster = 8;
// The emulator's own limit. CUDA's depends on the GPU and the kernel.
constexpr std::uint64_t kMaxCooperativeBlocks = 64;

std::string text(const uint3& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}
std::string text(const Where& where) {
  const std::string file = where.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(where.line());
}
std::string hexadecimal(unsigned bits) {
  std::string digits;
  for (int shift = 28; shift >= 0; shift -= 4) digits += "0123456789abcdef"[bits >> shift & 15];
  return "0x" + digits;
}
bool same(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() && std::string_view(a.file_name()) == b.file_name();
}

struct Block;
struct Thread;

// Threads that wait for each other, all of them.
struct Barrier {
  const char* name = "";
  Thread* first = nullptr;
  std::size_t count = 0, arrived = 0;
  Where where;
};

// Lanes of one warp that take part in a shuffle, vote or __syncwarp, while not all of them have come.
struct Meeting {
  Collective kind{};
  unsigned mask = 0, arrived = 0;
  Where where;
};

struct Warp {
  Thread* first = nullptr;
  unsigned lanes = 0;  // that exist
  std::vector<Meeting> meetings;
};

enum class State : std::uint8_t { ready, at_barrier, at_meeting, done };

struct Thread : ThreadIndices {
  State state = State::ready;
  unsigned lane = 0, source = 0;
  Block* in = nullptr;
  Warp* warp = nullptr;
  Barrier* barrier = nullptr;
  Payload given, received;
  Context context;
  char* stack = nullptr;
};

// A block's shared memory, NaN at first whatever type it is read as, between two zones that nobody may write.
class SharedMemory {
 public:
  explicit SharedMemory(std::size_t bytes) : bytes_(bytes) {
    // Not cleared, and filled by a loop of our own: the thread sanitizer sees what memset does.
    for (std::size_t i = 0; i < kZone; ++i) memory_[i] = memory_[kZone + bytes_ + i] = kCanary;
    fill();
    forbid_access(memory_.get(), kZone);
    forbid_access(memory_.get() + kZone + bytes_, kZone);
  }
  ~SharedMemory() { permit_access(memory_.get(), total()); }

  unsigned char* data() const { return memory_.get() + kZone; }
  std::size_t bytes() const { return bytes_; }
  void fill() {
    volatile unsigned char* p = data();
    for (std::size_t i = 0; i < bytes_; ++i) p[i] = kNan;
  }
  bool zones_intact() const {
#ifdef __SANITIZE_ADDRESS__
    return true;  // it would have said so, and does not let us look
#else
    for (std::size_t i = 0; i < kZone; ++i)
      if (memory_[i] != kCanary || memory_[kZone + bytes_ + i] != kCanary) return false;
    return true;
#endif
  }

 private:
  static constexpr std::size_t kZone = 256;
  static constexpr unsigned char kCanary = 0xA5, kNan = 0xFF;
  struct Free {
    void operator()(unsigned char* p) const { ::operator delete[](p, std::align_val_t(kZone)); }
  };
  std::size_t total() const { return bytes_ + 2 * kZone; }

  std::size_t bytes_;
  std::unique_ptr<unsigned char[], Free> memory_{
      static_cast<unsigned char*>(::operator new[](total(), std::align_val_t(kZone)))};
};

struct Block : BlockIndices {
  std::shared_ptr<SharedMemory> shared;
  Barrier barrier;
  Barrier* cluster_barrier = nullptr;
  Block* cluster = nullptr;  // its first block
  int rank = 0;
  std::size_t running = 0;
  bool peers_started = false;  // as far as this block can know
};

struct Launch {
  dim3 grid, block;
  std::size_t shared_bytes;
  int cluster;
  bool cooperative;
  const std::function<void()>& body;

  std::size_t threads() const { return std::size_t{block.x} * block.y * block.z; }
  std::uint64_t blocks() const { return std::uint64_t{grid.x} * grid.y * grid.z; }
  std::uint64_t together() const { return cooperative ? blocks() : static_cast<std::uint64_t>(cluster); }
};

// The order of turns; the same seed gives the same one in each launch.
class Turns {
 public:
  void set(Order order, unsigned seed) {
    order_ = order;
    seed_ = seed;
  }
  void restart() { random_.seed(seed_); }
  template <class T>
  void arrange(std::vector<T>& items) {
    std::iota(items.begin(), items.end(), T{0});
    if (order_ == Order::down) std::reverse(items.begin(), items.end());
    if (order_ == Order::random) std::shuffle(items.begin(), items.end(), random_);
  }

 private:
  Order order_ = Order::up;
  unsigned seed_ = 0;
  std::mt19937 random_;
};

// The blocks that run together: one, those of a cluster, or all of a cooperative grid.
class Machine {
 public:
  void set_order(Order order, unsigned seed) { turns_.set(order, seed); }
  void run(const Launch& launch);

  // Called by the fibers.
  Thread& current() {
    if (!current_) throw std::logic_error("a function of the emulator was called outside a kernel");
    return *current_;
  }
  void wait(Barrier& barrier, Where where);
  Payload collect(Collective kind, unsigned mask, Payload value, unsigned source, Where where);
  void grid_sync(Where where);

 private:
  void arrange(const Launch& launch);
  void begin(const Launch& launch, std::uint64_t first_block);
  void begin_block(const Launch& launch, std::size_t place, std::uint64_t linear_index);
  void run_threads();
  void resume(Thread& thread);
  void leave();
  void end_block(Block& block);
  void complete(Warp& warp, const Meeting& meeting);
  static void thread_main();
  std::string why_stuck() const;
  std::string why_waiting(const Thread& thread) const;

  Turns turns_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<Block> blocks_;
  std::vector<Barrier> cluster_barriers_;
  std::vector<std::uint32_t> order_;
  // A thread comes after the one that had its stack before. Under the thread sanitizer stacks change hands, so that
  // this orders no two threads of the same number, which are the likeliest to use the same memory.
  std::vector<char*> stacks_;
  // Under the thread sanitizer every block has memory of its own until the launch ends. Blocks are then ordered by
  // nothing but what the kernel does, and no reuse of memory looks like a race.
  std::vector<std::shared_ptr<SharedMemory>> used_memory_;
  Barrier grid_barrier_;
  const Launch* launch_ = nullptr;
  Thread* current_ = nullptr;
  Context main_;
  std::exception_ptr error_;
};

Machine& machine() {
  static Machine instance;
  return instance;
}

std::string place_of(const Thread& thread) {
  return "block " + text(thread.in->index) + ", thread " + text(thread.index) + ": ";
}
[[noreturn]] void fail(const Thread& thread, const std::string& message) {
  throw std::runtime_error(place_of(thread) + message);
}

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument("launch: " + message);
}

void check(const Launch& l) {
  const uint3 grid{l.grid.x, l.grid.y, l.grid.z}, block{l.block.x, l.block.y, l.block.z};
  require(l.threads() > 0 && l.threads() <= kMaxThreads && l.block.z <= kMaxThreadsZ, "no block of " + text(block));
  require(l.blocks() > 0 && l.grid.x <= 0x7fffffff && l.grid.y <= kMaxGridYZ && l.grid.z <= kMaxGridYZ,
          "no grid of " + text(grid));
  require(l.shared_bytes <= kMaxSharedBytes, std::to_string(l.shared_bytes) + " bytes of shared memory");
  require(l.cluster >= 1 && l.cluster <= kMaxCluster && l.grid.x % static_cast<unsigned>(l.cluster) == 0,
          "no clusters of " + std::to_string(l.cluster) + " in a grid of " + text(grid));
  require(!l.cooperative || l.blocks() <= kMaxCooperativeBlocks,
          "the emulator runs at most " + std::to_string(kMaxCooperativeBlocks) + " blocks together");
}

void Machine::run(const Launch& launch) {
  check(launch);
  if (current_) throw std::logic_error("launch: kernels do not launch kernels");
  launch_ = &launch;
  error_ = nullptr;
  arrange(launch);
  turns_.restart();
  adopt_current(main_);
  std::vector<std::uint64_t> groups(launch.blocks() / launch.together());
  turns_.arrange(groups);
  for (const std::uint64_t group : groups) {
    begin(launch, group * launch.together());
    turns_.arrange(order_);
    happens_before(&launch_);
    run_threads();
    if (error_) break;
  }
  happens_after(&error_);
  used_memory_.clear();
  for (Block& block : blocks_) block.shared.reset();
  if (error_) {
    for (const Thread& thread : threads_) abandon_stack(thread.stack);
    std::rethrow_exception(error_);
  }
}

// Makes room, and ties together what stays the same for all blocks of a launch.
void Machine::arrange(const Launch& launch) {
  const std::size_t together = launch.together(), per_block = launch.threads(), count = together * per_block;
  const std::size_t warps = (per_block + kWarp - 1) / kWarp;
  while (stacks_.size() < count) {
    char* memory = allocate_stacks(kMaxThreads);
    for (unsigned i = 0; i < kMaxThreads; ++i) stacks_.push_back(memory + i * stack_bytes());
  }
  blocks_.assign(together, {});
  cluster_barriers_.assign(together / launch.cluster, {});
  warps_.assign(together * warps, {});
  order_.resize(count);
  // Threads stay as they are: the thread sanitizer has a name for each.
  threads_.resize(std::max(threads_.size(), count));
  for (std::size_t i = 0; i < count; ++i) {
    Thread& thread = threads_[i];
    const std::size_t place = i / per_block, in_block = i % per_block;
    thread.lane = in_block % kWarp;
    thread.in = &blocks_[place];
    thread.warp = &warps_[place * warps + in_block / kWarp];
    if (thread.lane == 0) thread.warp->first = &thread;
    thread.warp->lanes |= 1u << thread.lane;
    thread.block = thread.in;
    const auto linear = static_cast<unsigned>(in_block);
    const dim3& size = launch.block;
    thread.index = {linear % size.x, linear / size.x % size.y, linear / (size.x * size.y)};
  }
  grid_barrier_ = {"grid_sync", threads_.data(), count, 0, {}};
}

void Machine::begin(const Launch& launch, std::uint64_t first_block) {
  if (kThreadSanitizer) std::rotate(stacks_.begin(), stacks_.begin() + 1, stacks_.begin() + order_.size());
  for (std::size_t place = 0; place < blocks_.size(); ++place) begin_block(launch, place, first_block + place);
  for (Warp& warp : warps_) warp.meetings.clear();
  grid_barrier_.arrived = 0;
}

void Machine::begin_block(const Launch& launch, std::size_t place, std::uint64_t linear) {
  const std::size_t cluster_size = launch.cluster, per_block = launch.threads(), cluster = place / cluster_size;
  Block& block = blocks_[place];
  const dim3& grid = launch.grid;
  block.index = {static_cast<unsigned>(linear % grid.x), static_cast<unsigned>(linear / grid.x % grid.y),
                 static_cast<unsigned>(linear / (std::uint64_t{grid.x} * grid.y))};
  block.size = launch.block;
  block.grid = grid;
  Thread* first = &threads_[place * per_block];
  block.barrier = {"__syncthreads", first, per_block, 0, {}};
  block.cluster_barrier = &cluster_barriers_[cluster];
  block.cluster = &blocks_[cluster * cluster_size];
  block.rank = static_cast<int>(place % cluster_size);
  if (block.rank == 0) *block.cluster_barrier = {"cluster_sync", first, per_block * cluster_size, 0, {}};
  block.running = per_block;
  block.peers_started = false;
  if (!block.shared || kThreadSanitizer) {
    block.shared = std::make_shared<SharedMemory>(launch.shared_bytes);
    if (kThreadSanitizer) used_memory_.push_back(block.shared);
  } else {
    block.shared->fill();
  }
  for (Thread* thread = first; thread != first + per_block; ++thread) {
    thread->state = State::ready;
    thread->stack = stacks_[static_cast<std::size_t>(thread - threads_.data())];
    prepare(thread->context, thread->stack, stack_bytes(), thread_main);
  }
}

// Gives every thread that can go on a turn, again and again.
void Machine::run_threads() {
  std::size_t running = order_.size();
  while (running > 0) {
    bool any = false;
    for (const std::uint32_t i : order_) {
      Thread& thread = threads_[i];
      if (thread.state != State::ready) continue;
      any = true;
      resume(thread);
      if (thread.state == State::done) {
        --running;
        if (--thread.in->running == 0) end_block(*thread.in);
      }
      if (error_) return;
    }
    if (!any) {
      error_ = std::make_exception_ptr(std::runtime_error("deadlock: " + why_stuck()));
      return;
    }
  }
}

void Machine::resume(Thread& thread) {
  current_ = &thread;
  indices = &thread;
  switch_context(main_, thread.context);
  current_ = nullptr;
  indices = nullptr;
}

void Machine::thread_main() {
  Machine& m = machine();
  entered(m.main_);
  happens_after(&m.launch_);
  happens_after(m.current_->stack);
  try {
    m.launch_->body();
  } catch (...) {
    if (!m.error_) m.error_ = std::current_exception();
  }
  happens_before(&m.error_);
  happens_before(m.current_->stack);
  m.current_->state = State::done;
  m.leave();
}

void Machine::leave() {
  Thread& thread = *current_;
  switch_context(thread.context, main_, thread.state == State::done);
}

void Machine::end_block(Block& block) {
  if (!block.shared->zones_intact() && !error_)
    error_ =
        std::make_exception_ptr(std::runtime_error("block " + text(block.index) + ": wrote beyond its shared memory"));
  block.shared->fill();  // it is gone, also for the cluster's other blocks
}

void Machine::wait(Barrier& barrier, Where where) {
  Thread& thread = current();
  if (barrier.arrived == 0)
    barrier.where = where;
  else if (!same(barrier.where, where))
    fail(thread, std::string("divergent barrier: ") + barrier.name + " at " + text(where) +
                     ", while other threads wait at " + text(barrier.where));
  thread.state = State::at_barrier;
  thread.barrier = &barrier;
  happens_before(&barrier);
  if (++barrier.arrived == barrier.count) {
    barrier.arrived = 0;
    for (Thread* t = barrier.first; t != barrier.first + barrier.count; ++t) t->state = State::ready;
  }
  leave();
  happens_after(&barrier);
}

void Machine::grid_sync(Where where) {
  if (!launch_->cooperative) fail(current(), "grid_sync in a launch that is not cooperative");
  wait(grid_barrier_, where);
}

constexpr std::array kCollectiveNames{"a shuffle", "a vote", "__syncwarp"};
const char* name_of(Collective kind) {
  return kCollectiveNames[static_cast<std::size_t>(kind)];
}

Payload Machine::collect(Collective kind, unsigned mask, Payload value, unsigned source, Where where) {
  Thread& thread = current();
  Warp& warp = *thread.warp;
  const unsigned bit = 1u << thread.lane;
  const auto what = [&] { return std::string(name_of(kind)) + " at " + text(where); };
  mask &= warp.lanes;
  if (!(mask & bit)) fail(thread, what() + ": this lane is not in the mask " + hexadecimal(mask));
  if (kind == Collective::shuffle && !(source < kWarp && (mask >> source & 1)))
    fail(thread, what() + ": reads lane " + std::to_string(source) + ", which is not in the mask " + hexadecimal(mask));
  // Lanes with another mask are in another meeting. If they should have been in this one, both wait for ever.
  auto meeting = std::ranges::find(warp.meetings, mask, &Meeting::mask);
  if (meeting == warp.meetings.end()) meeting = warp.meetings.insert(meeting, Meeting{kind, mask, 0, where});
  if (meeting->kind != kind || !same(meeting->where, where))
    fail(thread, "divergent warp: " + what() + ", while other lanes are in " + name_of(meeting->kind) + " at " +
                     text(meeting->where));
  thread.given = value;
  thread.source = source;
  // A shuffle or a vote does not make other lanes' writes visible.
  if (kind == Collective::sync) happens_before(&warp);
  meeting->arrived |= bit;
  if (meeting->arrived == mask) {
    complete(warp, *meeting);
    warp.meetings.erase(meeting);
  } else {
    thread.state = State::at_meeting;
    leave();
  }
  if (kind == Collective::sync) happens_after(&warp);
  return thread.received;
}

void Machine::complete(Warp& warp, const Meeting& meeting) {
  const auto for_each_lane = [&](auto f) {
    for (unsigned lane = 0; lane < kWarp; ++lane)
      if (meeting.mask >> lane & 1) f(warp.first[lane]);
  };
  Payload ballot;
  if (meeting.kind == Collective::ballot)
    for_each_lane([&](const Thread& t) { ballot.words[0] |= std::uint64_t{t.given.words[0] != 0} << t.lane; });
  for_each_lane([&](Thread& t) {
    t.received = meeting.kind == Collective::shuffle ? warp.first[t.source].given : ballot;
    t.state = State::ready;
  });
}

// What the threads of one block that is stuck are waiting for, and how many of them.
std::string Machine::why_stuck() const {
  const std::span<const Thread> threads(threads_.data(), order_.size());
  const auto first = std::ranges::find_if(threads, [](const Thread& t) { return t.state != State::done; });
  std::map<std::string, int> reasons;
  for (const Thread& thread : threads)
    if (thread.in == first->in) ++reasons[why_waiting(thread)];
  std::string message = "in block " + text(first->in->index);
  const char* separator = ", ";
  for (const auto& [reason, count] : reasons) {
    message += separator + std::to_string(count) + (count == 1 ? " thread " : " threads ") + reason;
    separator = "; ";
  }
  return message;
}

std::string Machine::why_waiting(const Thread& thread) const {
  if (thread.state == State::done) return "ended";
  if (thread.state == State::at_barrier)
    return std::string("at ") + thread.barrier->name + " (" + text(thread.barrier->where) + ")";
  for (const Meeting& m : thread.warp->meetings)
    if (m.arrived >> thread.lane & 1)
      return std::string("in ") + name_of(m.kind) + " (" + text(m.where) + ") that lacks the lanes " +
             hexadecimal(m.mask & ~m.arrived);
  return "ready";
}

}  // namespace

void set_order(Order order, unsigned seed) {
  machine().set_order(order, seed);
}

void launch(dim3 grid, dim3 block, std::size_t shared_bytes, int cluster, bool cooperative,
            const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  machine().run({grid, block, shared_bytes, cluster, cooperative, body});
}

unsigned char* dynamic_shared() {
  return machine().current().in->shared->data();
}

void block_sync(Where where) {
  machine().wait(machine().current().in->barrier, where);
}

void grid_sync(Where where) {
  machine().grid_sync(where);
}

int cluster_rank() {
  return machine().current().in->rank;
}

int cluster_size() {
  const Block& block = *machine().current().in;
  return static_cast<int>(block.cluster_barrier->count / block.barrier.count);
}

void cluster_sync(Where where) {
  Block& block = *machine().current().in;
  machine().wait(*block.cluster_barrier, where);
  block.peers_started = true;
}

void* peer_of(const void* own, int rank) {
  const Thread& thread = machine().current();
  const Block& block = *thread.in;
  const auto offset = static_cast<std::size_t>(static_cast<const unsigned char*>(own) - block.shared->data());
  if (rank < 0 || rank >= cluster_size()) fail(thread, "cluster_peer: no rank " + std::to_string(rank));
  if (offset > block.shared->bytes()) fail(thread, "cluster_peer: a place outside the shared memory of this block");
  const Block& peer = block.cluster[rank];
  if (&peer != &block && !block.peers_started)
    fail(thread, "cluster_peer before any cluster_sync: the other block may not have started");
  if (&peer != &block && peer.running < peer.barrier.count)
    fail(thread,
         "cluster_peer: the block of rank " + std::to_string(rank) + " is ending, and its shared memory with it");
  return peer.shared->data() + offset;
}

Payload collect(Collective kind, unsigned mask, Payload value, unsigned source, Where where) {
  return machine().collect(kind, mask, value, source, where);
}

unsigned lane() {
  return machine().current().lane;
}

}  // namespace fastlayers::cuda::emulation
