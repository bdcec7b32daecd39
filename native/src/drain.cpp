#include "drain.hpp"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <stdexcept>
#include <thread>
#include <utility>

#include "xxh3.hpp"

namespace kvindex {

namespace {

constexpr int kDontWait = 1;
constexpr short kPollIn = 1;
constexpr size_t kFrames = 3;

// A message that came so soon after the wait for it began is one of many: the next ones are let gather. A pause that
// gathers fewer than kFew was not worth its wake-up.
constexpr std::chrono::milliseconds kSoon{1}, kPause{8};
constexpr uint64_t kFew = 4;

int note_name(dl_phdr_info* object, size_t /*size*/, void* names) {
  if (object->dlpi_name != nullptr && object->dlpi_name[0] != '\0')
    static_cast<std::vector<std::string>*>(names)->emplace_back(object->dlpi_name);
  return 0;
}

// The handle of the first loaded object that has zmq_msg_recv; a wheel's libzmq is local to its extension module.
// Objects are opened only after their names are known: whoever walks over them holds a lock that opening takes too.
void* find_library() {
  std::vector<std::string> names;
  dl_iterate_phdr(note_name, &names);
  for (const std::string& name : names) {
    void* handle = dlopen(name.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (handle == nullptr) continue;
    if (dlsym(handle, "zmq_msg_recv") != nullptr) return handle;  // kept open for as long as the process lives
    dlclose(handle);
  }
  return nullptr;
}

template <typename Function>
void load(void* handle, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(handle, name));
  if (function == nullptr) throw std::runtime_error(std::string("libzmq has no ") + name);
}

uint64_t big_endian(const unsigned char* bytes) {
  uint64_t value = 0;
  for (int i = 0; i < 8; ++i) value = value << 8 | bytes[i];
  return value;
}

// The frames of one message. Those behind the third are received, kept only as text, and make it odd.
class Frames {
 public:
  explicit Frames(const ZeroMq& zmq) : zmq_(zmq) {
    for (ZeroMq::Message& each : frames_) zmq_.init(&each);
  }
  ~Frames() {
    for (ZeroMq::Message& each : frames_) zmq_.close(&each);
  }
  Frames(const Frames&) = delete;
  Frames& operator=(const Frames&) = delete;

  // False when there is none for now.
  bool receive(void* socket) {
    count_ = 0;
    rest_.clear();
    bool more = true;
    while (more) {
      ZeroMq::Message& into = frames_[count_ < kFrames ? count_ : kFrames];
      // The frames of one message come at once: only the first can be missing.
      if (zmq_.receive(&into, socket, kDontWait) < 0) return false;
      more = zmq_.more(&into) != 0;
      if (count_ >= kFrames) rest_.push_back(text(into));
      ++count_;
    }
    return true;
  }

  bool is_event(uint64_t max_payload) const {
    return count_ == kFrames && zmq_.size(&frames_[1]) == 8 && zmq_.size(&frames_[2]) <= max_payload;
  }
  uint64_t sequence() { return big_endian(static_cast<unsigned char*>(zmq_.data(&frames_[1]))); }
  const uint8_t* payload() { return static_cast<const uint8_t*>(zmq_.data(&frames_[2])); }
  size_t payload_size() const { return zmq_.size(&frames_[2]); }

  std::vector<std::string> texts() {
    std::vector<std::string> all;
    for (size_t i = 0; i < count_ && i < kFrames; ++i) all.push_back(text(frames_[i]));
    all.insert(all.end(), rest_.begin(), rest_.end());
    return all;
  }

 private:
  std::string text(ZeroMq::Message& frame) { return {static_cast<const char*>(zmq_.data(&frame)), zmq_.size(&frame)}; }

  const ZeroMq& zmq_;
  ZeroMq::Message frames_[kFrames + 1] = {};
  size_t count_ = 0;
  std::vector<std::string> rest_;
};

}  // namespace

ZeroMq::ZeroMq() {
  static_assert(sizeof(Message) == 64);
  void* handle = find_library();
  if (handle == nullptr) throw std::runtime_error("no libzmq is loaded");
  load(handle, "zmq_msg_init", init);
  load(handle, "zmq_msg_recv", receive);
  load(handle, "zmq_msg_close", close);
  load(handle, "zmq_msg_data", data);
  load(handle, "zmq_msg_size", size);
  load(handle, "zmq_msg_more", more);
  load(handle, "zmq_poll", poll);
}

Drained drain(const ZeroMq& zmq, void* socket, Stream& stream, uint32_t rank, Order& order, uint64_t limit,
              uint64_t max_payload, const Waiting& waiting, const std::function<void()>& told) {
  using Clock = std::chrono::steady_clock;
  Drained drained;
  Frames frames(zmq);
  std::vector<ZeroMq::Item> items{{socket, 0, kPollIn, 0}};
  for (void* other : waiting.others) items.push_back({other, 0, kPollIn, 0});
  Clock::time_point ends;
  uint64_t told_of = 0;
  const auto tell = [&] {
    if (drained.messages == told_of) return;
    if (told_of == 0) ends = Clock::now() + waiting.further;
    told_of = drained.messages;
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    const double at = drained.applied.timestamp;
    if (at > 0) drained.lags.push_back(std::max(0.0, std::chrono::duration<double>(now).count() - at));
    told();
  };
  bool busy = false, paused = false;
  uint64_t before = 0;  // messages there were at the last pause
  // False when it is time to go.
  const auto wait = [&] {
    const Clock::time_point now = Clock::now();
    const auto most = drained.messages == 0 ? waiting.idle : std::chrono::floor<std::chrono::milliseconds>(ends - now);
    if (most.count() <= 0) return false;
    if (std::exchange(paused, false)) busy = drained.messages - before >= kFew;
    if (busy && most > kPause) {
      before = drained.messages;
      paused = true;
      std::this_thread::sleep_for(kPause);
      return true;
    }
    if (zmq.poll(items.data(), static_cast<int>(items.size()), static_cast<long>(most.count())) <= 0) return false;
    busy = Clock::now() - now < kSoon;
    drained.others = std::any_of(items.begin() + 1, items.end(), [](const auto& each) { return each.revents != 0; });
    return !drained.others;
  };
  while (drained.messages < limit) {
    if (!frames.receive(socket)) {
      tell();
      if (wait()) continue;
      drained.empty = true;
      break;
    }
    if (!frames.is_event(max_payload) || !order.is_next(frames.sequence())) {
      drained.odd = frames.texts();
      break;
    }
    const uint64_t sequence = frames.sequence();
    if (drained.messages++ == 0) drained.first = sequence;
    stream.apply(frames.payload(), frames.payload_size(), rank, drained.applied, sequence);
    const uint64_t digest = xxh3_64(frames.payload(), frames.payload_size());
    if (!drained.applied.is_plain()) {
      drained.withheld = {sequence, digest};
      break;
    }
    order.applied(sequence, digest);
  }
  tell();
  return drained;
}

}  // namespace kvindex
