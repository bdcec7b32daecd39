// The subscriber's side of ZMTP: what a publisher may send, in whatever pieces it comes, and what it must not.
#include "zmtp.hpp"

#include <algorithm>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"

using namespace kvindex;

namespace {

using Frames = std::vector<std::string>;
constexpr uint64_t kMaxFrame = 4096;

std::string frame(uint8_t flags, const std::string& body) {
  std::string out;
  const bool wide = body.size() > 255;
  out += static_cast<char>(flags | (wide ? 2 : 0));
  for (int byte = wide ? 7 : 0; byte >= 0; --byte) out += static_cast<char>(uint64_t{body.size()} >> (8 * byte));
  return out + body;
}

std::string message(const Frames& frames) {
  std::string out;
  for (size_t i = 0; i < frames.size(); ++i) out += frame(i + 1 < frames.size() ? 1 : 0, frames[i]);
  return out;
}

std::string command(const std::string& name, const std::string& rest) {
  return frame(4, static_cast<char>(name.size()) + name + rest);
}

std::string greeting(uint8_t minor, const std::string& mechanism = "NULL", uint8_t major = 3) {
  std::string out = std::string("\xff\0\0\0\0\0\0\0\1\x7f", 10) + static_cast<char>(major) + static_cast<char>(minor);
  out += mechanism;
  out.resize(64);
  return out;
}

std::string property(const std::string& name, const std::string& value) {
  return static_cast<char>(name.size()) + name + std::string("\0\0\0", 3) + static_cast<char>(value.size()) + value;
}

std::string ready(const std::string& kind = "XPUB") { return command("READY", property("Socket-Type", kind)); }

// What became of bytes that came in pieces.
struct Outcome {
  std::vector<Frames> messages;
  std::string out;
  bool opened = false, broken = false;
  bool operator==(const Outcome&) const = default;
};

Outcome fed(const std::string& bytes, const std::string& topic, std::mt19937_64& random, size_t piece) {
  Zmtp zmtp(topic, kMaxFrame);
  Outcome outcome;
  Message received;
  std::string held;
  for (size_t given = 0; given < bytes.size() && !outcome.broken;) {
    const size_t more = std::min(bytes.size() - given, piece == 0 ? bytes.size() : 1 + random() % piece);
    held = held + bytes.substr(given, more);  // at another place each time, as in the real buffer
    given += more;
    for (bool going = true; going;) {
      size_t used = 0;
      const Zmtp::Step step = zmtp.next(held, used, received);
      CHECK(used <= held.size());
      if (step == Zmtp::Step::kMessage) outcome.messages.push_back(received.texts());
      if (step == Zmtp::Step::kOpened) outcome.opened = true;
      if (step == Zmtp::Step::kBroken) outcome.broken = true;
      if (step == Zmtp::Step::kMore) CHECK(zmtp.needed() > held.size() - used);
      going = step == Zmtp::Step::kMessage || step == Zmtp::Step::kOpened;
      held.erase(0, used);
    }
  }
  outcome.out = zmtp.out();
  return outcome;
}

Outcome whole(const std::string& bytes, const std::string& topic = "") {
  std::mt19937_64 random(0);
  return fed(bytes, topic, random, 0);
}

const Frames kEvent{"kv@pod@m", std::string(7, '\0') + "\1", std::string(300, 'p')};

void test_handshake() {
  const std::string own = greeting(1) + command("READY", property("Socket-Type", "SUB"));
  const Outcome newer = whole(greeting(1) + ready() + message(kEvent), "kv@");
  CHECK(newer.opened && !newer.broken && newer.messages == std::vector<Frames>{kEvent});
  CHECK(newer.out == own + command("SUBSCRIBE", "kv@"));
  const Outcome older = whole(greeting(0) + ready("PUB") + message(kEvent), "kv@");
  CHECK(older.opened && older.messages.size() == 1);
  CHECK(older.out == own + frame(0, "\1kv@"));
  const std::string wide(300, 't');
  CHECK(whole(greeting(0) + ready(), wide).out == own + frame(0, '\1' + wide));
  CHECK(whole(greeting(1) + ready(), wide).out == own + command("SUBSCRIBE", wide));
  CHECK(whole(greeting(0, "NULL", 4) + ready()).opened);
  CHECK(whole(greeting(1) + command("READY", "")).opened);
  CHECK(whole(greeting(1) + command("READY", property("X", "y") + property("socket-type", "PUB"))).opened);
  CHECK(whole(greeting(1)).out == own);
}

void test_what_is_no_publisher() {
  std::vector<std::string> odd{
      "HTTP/1.1 400 Bad Request\r\n\r\n",
      std::string(64, '\xff') + "x",
      std::string("\xff\0\0\0\0\0\0\0\1\x7e", 10),
      greeting(0, "NULL", 2),
      greeting(1, "CURVE"),
      greeting(1, "NULLX"),
      greeting(1) + ready("PULL"),
      greeting(1) + command("ERROR", "\4away"),
      greeting(1) + message({"a"}),
      greeting(1) + frame(4, ""),
      greeting(1) + frame(4, "\x20READY"),
      greeting(1) + command("READY", "\x20Socket-Type"),
      greeting(1) + command("READY", std::string("\1X\0\0\1\0y", 7)),
      greeting(1) + command("READY", "\1X"),
      greeting(1) + frame(5, "\5READY"),
      greeting(1) + ready() + frame(8, "reserved"),
      greeting(1) + ready() + frame(0x80, "reserved"),
      greeting(1) + ready() + frame(5, "\4PINGxx"),
      greeting(1) + ready() + message({"", "", std::string(kMaxFrame + 1, 'x')}),
      greeting(1) + ready() + frame(1, "") + std::string("\2\xff\xff\xff\xff\xff\xff\xff\xff", 9),
      greeting(1) + ready() + std::string("\6\0\0\0\0\0\1\0\1", 9),  // a command of 64 KiB and one byte
  };
  std::string endless = greeting(1) + ready();
  for (int i = 0; i < 200; ++i) endless += frame(1, std::string(kMaxFrame, 'x'));
  odd.push_back(endless);
  std::string commands = greeting(1) + ready() + frame(1, "");
  for (int i = 0; i < 10; ++i) commands += frame(4, std::string(60'000, 'x'));
  odd.push_back(commands);
  for (const std::string& each : odd) {
    const Outcome outcome = whole(each);
    CHECK(outcome.broken && outcome.messages.empty());
    std::mt19937_64 random(each.size());
    CHECK(fed(each, "", random, 9).broken);
  }
}

void test_traffic() {
  const std::string open = greeting(1) + ready();
  const size_t before = whole(open).out.size();
  const auto answered = [&](const std::string& bytes) { return whole(open + bytes).out.substr(before); };
  CHECK(answered(command("PING", std::string("\0\5", 2) + "context")) == command("PONG", "context"));
  CHECK(answered(command("PING", std::string("\0\5", 2))) == command("PONG", ""));
  CHECK(answered(command("PING", "x")).empty() && answered(command("PONG", "")).empty());
  CHECK(answered(command("JOIN", "group")).empty() && answered(frame(4, "")).empty());
  // A heartbeat may stand between the frames of one message.
  const std::string split = frame(1, kEvent[0]) + command("PING", std::string("\0\0", 2) + "x") + frame(1, kEvent[1]) +
                            command("PONG", "") + frame(0, kEvent[2]);
  const Outcome outcome = whole(open + split + message(kEvent));
  CHECK(outcome.messages == std::vector<Frames>(2, kEvent));
  CHECK(outcome.out.substr(before) == command("PONG", "x"));
  // A publisher need not filter.
  const Frames other{"other", "x"}, shorter{"kv"}, none{""}, exact{"kv@"};
  const Outcome filtered = whole(
      open + message(other) + message(kEvent) + message(shorter) + message(none) + message(exact) + message(other),
      "kv@");
  CHECK(filtered.messages == (std::vector<Frames>{kEvent, exact}));
  CHECK(whole(open + message(none)).messages == std::vector<Frames>{none});
  // Of many frames some are kept: enough to see that it is no event.
  const Outcome many = whole(open + message(Frames(500, "f")) + message(kEvent));
  CHECK(many.messages.size() == 2 && many.messages[0].size() == 64 && many.messages[1] == kEvent);
  // What a peer may make us owe it has an end.
  std::string pings = open;
  for (int i = 0; i < 100'000; ++i) pings += command("PING", std::string("\0\0", 2) + "sixteen bytes...");
  CHECK(whole(pings).out.size() < 100'000);
  Zmtp zmtp("", kMaxFrame);
  const size_t greeted = zmtp.out().size();
  zmtp.ping();
  CHECK(zmtp.out().size() == greeted);  // not before the handshake
  Message unused;
  size_t used = 0;
  zmtp.next(open, used, unused);
  zmtp.out().clear();
  zmtp.ping();
  CHECK(zmtp.out() == command("PING", std::string("\0\0", 2)));
}

// However it is cut into pieces, the same comes out, also of bytes that were damaged.
void test_pieces(int rounds) {
  std::mt19937_64 random(7);
  size_t broken = 0, messages = 0;
  for (int round = 0; round < rounds; ++round) {
    std::string bytes = greeting(random() % 2) + ready();
    for (uint64_t i = random() % 8; i > 0; --i) {
      Frames frames;
      for (uint64_t count = 1 + random() % 4; count > 0; --count)
        frames.emplace_back(random() % (random() % 4 == 0 ? 2000 : 20), static_cast<char>('a' + random() % 3));
      bytes += message(frames);
      if (random() % 4 == 0) bytes += command(random() % 2 == 0 ? "PING" : "PONG", std::string(random() % 9, 'c'));
    }
    if (random() % 2 == 0)
      for (uint64_t i = 1 + random() % 3; i > 0; --i) bytes[random() % bytes.size()] = static_cast<char>(random());
    if (random() % 4 == 0) bytes.resize(random() % bytes.size());
    const std::string topic = random() % 2 == 0 ? "" : "a";
    const Outcome expected = whole(bytes, topic);
    for (const size_t piece : {1, 3, 40, 700}) {
      std::mt19937_64 cuts(random());
      CHECK(fed(bytes, topic, cuts, piece) == expected);
    }
    broken += expected.broken ? 1 : 0;
    messages += expected.messages.size();
  }
  CHECK(broken > 0 && messages > 0);
}

}  // namespace

int main() {
  test_handshake();
  test_what_is_no_publisher();
  test_traffic();
  test_pieces(3000);
  std::printf("zmtp: %d checks\n", checks);
  return 0;
}
