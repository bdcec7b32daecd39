#include "drain.hpp"

#include <algorithm>
#include <span>
#include <thread>
#include <utility>

#include "xxh3.hpp"

namespace kvindex {

namespace {

constexpr size_t kFrames = 3;

// A message that came so soon after the wait for it began is one of many: the next ones are let gather. A pause that
// gathers fewer than kFew was not worth its wake-up.
constexpr std::chrono::milliseconds kSoon{1}, kPause{8};
constexpr uint64_t kFew = 4;

uint64_t big_endian(std::span<const uint8_t> bytes) {
  uint64_t value = 0;
  for (const uint8_t each : bytes) value = value << 8 | each;
  return value;
}

}  // namespace

Drained drain(MessageSource& source, Stream& stream, uint32_t rank, Order& order, uint64_t limit, uint64_t max_payload,
              const ZeroMq& zmq, const Waiting& waiting, const std::function<void()>& told) {
  using Clock = std::chrono::steady_clock;
  Drained drained;
  Message message;
  std::vector<ZeroMq::Item> items{source.item()};
  for (void* other : waiting.others) items.push_back({other, 0, POLLIN, 0});
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
    if (!source.receive(message)) {
      tell();
      if (source.has_news()) {
        drained.others = true;
        break;
      }
      if (wait()) continue;
      drained.empty = true;
      break;
    }
    const auto& frames = message.frames;
    const bool is_event = frames.size() == kFrames && frames[1].size() == 8 && frames[2].size() <= max_payload;
    const uint64_t sequence = is_event ? big_endian(frames[1]) : 0;
    if (!is_event || !order.is_next(sequence)) {
      drained.odd = message.texts();
      break;
    }
    const std::span<const uint8_t> payload = frames[2];
    if (drained.messages++ == 0) drained.first = sequence;
    stream.apply(payload.data(), payload.size(), rank, drained.applied, sequence);
    const uint64_t digest = xxh3_64(payload.data(), payload.size());
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
