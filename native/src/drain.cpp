#include "drain.hpp"

#include <sys/prctl.h>

#include <algorithm>
#include <span>
#include <utility>

#include "big_endian.hpp"
#include "xxh3.hpp"

namespace kvindex {

namespace {

constexpr size_t kFrames = 3;

// A message that came so soon after the wait for it began is one of many: the next ones are let gather. As long as
// pauses gather kFew, each wait is followed by one; others were not worth their wake-up. And as long as messages do not
// cease between pauses either, there are only pauses: a wait for the next message would be a wake-up more.
constexpr std::chrono::milliseconds kSoon{1}, kPause{8};
constexpr uint64_t kFew = 4;

// Waits of many threads that would end within so long of each other end together: each end by itself is an interrupt
// and, where a processor was idle, costs more than what is then read.
constexpr std::chrono::nanoseconds kTogether = std::chrono::milliseconds(2);

// In a flood: so many messages after one another before anything else.
constexpr uint64_t kMany = 256;

int poll_items(const ZeroMq& zmq, std::vector<ZeroMq::Item>& items, std::chrono::milliseconds most) {
  const auto count = static_cast<int>(items.size());
  const auto timeout = static_cast<int>(most.count());
  if (std::any_of(items.begin(), items.end(), [](const auto& each) { return each.socket != nullptr; }))
    return zmq.poll(items.data(), count, timeout);
  // Without a socket of its own, ZeroMQ's poll only asks what the system is asked here.
  std::vector<pollfd> plain;
  plain.reserve(items.size());
  for (const auto& each : items) plain.push_back({each.fd, each.events, 0});
  const int ready = poll(plain.data(), plain.size(), timeout);
  for (size_t i = 0; i < items.size(); ++i) items[i].revents = plain[i].revents;
  return ready;
}

}  // namespace

Drained drain(MessageSource& source, Stream& stream, uint32_t rank, Order& order, uint64_t limit, uint64_t max_payload,
              uint64_t mark_every, const ZeroMq& zmq, const Waiting& waiting, const std::function<void()>& told) {
  using Clock = std::chrono::steady_clock;
  if (waiting.idle.count() > 0) prctl(PR_SET_TIMERSLACK, static_cast<unsigned long>(kTogether.count()), 0, 0, 0);
  Drained drained;
  Message message;
  std::vector<ZeroMq::Item> others = waiting.others, all{source.item()};
  all.insert(all.end(), others.begin(), others.end());
  Clock::time_point ends = Clock::now() + waiting.idle;  // whatever else wakes it meanwhile
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
  bool paused = false, ceaseless = false;
  uint64_t before = 0;  // messages there were at the last pause
  // Both are false when it is time to go.
  const auto pause = [&] {
    before = drained.messages;
    paused = true;
    drained.others = poll_items(zmq, others, kPause) > 0;
    return !drained.others;
  };
  const auto wait = [&] {
    const Clock::time_point now = Clock::now();
    const auto most = std::chrono::ceil<std::chrono::milliseconds>(ends - now);
    if (most.count() <= 0) return false;
    if (std::exchange(paused, false)) {
      source.comes_in_bursts = drained.messages - before >= kFew;
      if (source.comes_in_bursts && ceaseless && most > kPause) return pause();
    }
    if (poll_items(zmq, all, most) <= 0) return false;
    drained.others = std::any_of(all.begin() + 1, all.end(), [](const auto& each) { return each.revents != 0; });
    if (drained.others) return false;
    ceaseless = Clock::now() - now < kSoon;
    return most <= kPause || (!source.comes_in_bursts && !ceaseless) || pause();
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
    if (mark_every != 0 && sequence % mark_every == 0)
      drained.marks.push_back({sequence, digest, stream.digest(), stream.claims()});
    if (drained.messages % kMany == 0) {
      tell();
      if (Clock::now() >= ends) break;
    }
  }
  tell();
  return drained;
}

}  // namespace kvindex
