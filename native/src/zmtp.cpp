#include "zmtp.hpp"

#include <algorithm>
#include <cctype>

#include "big_endian.hpp"

namespace kvindex {

namespace {

constexpr uint8_t kMoreFlag = 1, kLongFlag = 2, kCommandFlag = 4, kFlags = 7;
constexpr size_t kGreeting = 64, kSignature = 10, kMechanism = 20;
// Frames behind these are skipped: no engine's message has more than three.
constexpr size_t kKeptFrames = 64;
// Of what is not the payload in a message, and of a command.
constexpr uint64_t kSlack = 64 * 1024;
// What a peer may make us owe it while it does not read.
constexpr size_t kMaxOut = 64 * 1024;
constexpr size_t kMaxContext = 16;

uint8_t at(std::string_view bytes, size_t place) { return static_cast<uint8_t>(bytes[place]); }

bool is_name(std::string_view given, std::string_view name) {
  return std::equal(given.begin(), given.end(), name.begin(), name.end(),
                    [](unsigned char one, unsigned char other) { return std::tolower(one) == std::tolower(other); });
}

// A command's body is its name, behind the name's length, and the rest.
bool split(std::string_view body, std::string_view& name, std::string_view& rest) {
  if (body.empty() || body.size() < size_t{1} + at(body, 0)) return false;
  name = body.substr(1, at(body, 0));
  rest = body.substr(1 + name.size());
  return true;
}

struct Frame {
  uint8_t flags = 0;
  size_t header = 2;
  uint64_t size = 0;
  bool whole = false;  // all of the header is here
};

Frame frame_at(std::string_view bytes) {
  Frame frame;
  if (bytes.empty()) return frame;
  frame.flags = at(bytes, 0);
  if ((frame.flags & kLongFlag) != 0) frame.header = 9;
  frame.whole = bytes.size() >= frame.header;
  if (frame.whole) frame.size = big_endian(bytes.substr(1, frame.header - 1));
  return frame;
}

void write_frame(std::string& out, uint8_t flags, std::string_view body) {
  const size_t width = body.size() > 255 ? 8 : 1;
  out += static_cast<char>(flags | (width == 8 ? kLongFlag : 0));
  for (size_t byte = width; byte-- > 0;) out += static_cast<char>(body.size() >> (8 * byte));
  out += body;
}

std::string own_greeting() {
  std::string greeting(kGreeting, '\0');
  greeting[0] = '\xff';
  greeting[8] = 1;
  greeting[9] = '\x7f';
  greeting[10] = 3;
  greeting[11] = 1;
  greeting.replace(12, 4, "NULL");
  return greeting;
}

}  // namespace

Zmtp::Zmtp(std::string topic, uint64_t max_frame)
    : topic_(std::move(topic)), max_frame_(max_frame), needed_(kGreeting), out_(own_greeting()) {}

Zmtp::Step Zmtp::next(std::string_view bytes, size_t& used, Message& message) {
  used = 0;
  if (phase_ == Phase::kGreeting) {
    if (const Step step = greeting(bytes, used); step != Step::kOpened) return step;
    phase_ = Phase::kReady;
  }
  while (true) {
    const std::string_view unit = bytes.substr(used);
    const Frame frame = frame_at(unit.substr(read_));
    const bool is_command = (frame.flags & kCommandFlag) != 0;
    if ((frame.flags & ~kFlags) != 0 || (is_command && (frame.flags & kMoreFlag) != 0)) return Step::kBroken;
    if (frame.size > (is_command ? kSlack : max_frame_)) return Step::kBroken;
    needed_ = read_ + frame.header + frame.size;
    if (needed_ > max_frame_ + kSlack) return Step::kBroken;
    if (!frame.whole || unit.size() < needed_) return Step::kMore;
    const size_t begin = read_ + frame.header;
    read_ = needed_;
    if (is_command) {
      const std::string_view body = unit.substr(begin, frame.size);
      // It may stand between the frames of a message; only in front of one is it done with.
      if (frames_.empty()) {
        used += read_;
        read_ = 0;
      }
      if (phase_ == Phase::kReady) {
        if (!ready(body)) return Step::kBroken;
        phase_ = Phase::kOpen;
        return Step::kOpened;
      }
      command(body);
      continue;
    }
    if (phase_ != Phase::kOpen) return Step::kBroken;
    if (frames_.size() < kKeptFrames) frames_.emplace_back(begin, frame.size);
    if ((frame.flags & kMoreFlag) != 0) continue;
    if (deliver(unit, used, message)) return Step::kMessage;
    if (insists_) return Step::kBroken;
  }
}

std::optional<std::string_view> Zmtp::topic_at(std::string_view bytes) {
  const Frame frame = frame_at(bytes);
  if (!frame.whole || (frame.flags & ~(kMoreFlag | kLongFlag)) != 0) return std::nullopt;
  if (bytes.size() - frame.header < frame.size) return std::nullopt;
  return bytes.substr(frame.header, frame.size);
}

void Zmtp::insist(std::string topic) {
  topic_ = std::move(topic);
  insists_ = true;
}

Zmtp::Step Zmtp::greeting(std::string_view bytes, size_t& used) {
  // Whoever does not begin like this would perhaps never send as much as a greeting.
  if (!bytes.empty() && at(bytes, 0) != 0xff) return Step::kBroken;
  if (bytes.size() >= kSignature && (at(bytes, kSignature - 1) & 1) == 0) return Step::kBroken;
  if (bytes.size() > kSignature && at(bytes, kSignature) < 3) return Step::kBroken;
  if (bytes.size() < kGreeting) return Step::kMore;
  std::string mechanism(kMechanism, '\0');
  mechanism.replace(0, 4, "NULL");
  if (bytes.substr(12, kMechanism) != mechanism) return Step::kBroken;
  minor_ = at(bytes, kSignature) > 3 ? 1 : at(bytes, kSignature + 1);
  used = kGreeting;
  std::string kind("\x0bSocket-Type", 12);
  kind += std::string("\0\0\0\3SUB", 7);
  send_command("READY", kind);
  return Step::kOpened;
}

bool Zmtp::deliver(std::string_view bytes, size_t& used, Message& message) {
  used += std::exchange(read_, 0);
  message.frames.clear();
  for (const auto& [begin, length] : frames_)
    message.frames.emplace_back(reinterpret_cast<const uint8_t*>(bytes.data()) + begin, length);
  const auto [begin, length] = frames_[0];
  frames_.clear();
  return bytes.substr(begin, insists_ ? length : std::min(length, topic_.size())) == topic_;
}

bool Zmtp::ready(std::string_view body) {
  std::string_view name, properties;
  if (!split(body, name, properties) || name != "READY") return false;
  while (!properties.empty()) {
    std::string_view property, rest;
    if (!split(properties, property, rest) || rest.size() < 4) return false;
    const uint64_t size = big_endian(rest.substr(0, 4));
    if (rest.size() - 4 < size) return false;
    const std::string_view value = rest.substr(4, size);
    if (is_name(property, "Socket-Type") && value != "PUB" && value != "XPUB") return false;
    properties = rest.substr(4 + size);
  }
  if (minor_ >= 1) {
    send_command("SUBSCRIBE", topic_);
  } else {
    write_frame(out_, 0, '\1' + topic_);
  }
  return true;
}

void Zmtp::command(std::string_view body) {
  std::string_view name, rest;
  constexpr size_t kTtl = 2;
  if (!split(body, name, rest) || name != "PING" || rest.size() < kTtl || out_.size() > kMaxOut) return;
  send_command("PONG", rest.substr(kTtl, kMaxContext));
}

void Zmtp::ping() {
  if (phase_ == Phase::kOpen && minor_ >= 1 && out_.size() <= kMaxOut)
    send_command("PING", std::string_view("\0\0", 2));
}

void Zmtp::send_command(std::string_view name, std::string_view rest) {
  std::string body(1, static_cast<char>(name.size()));
  body += name;
  body += rest;
  write_frame(out_, kCommandFlag, body);
}

}  // namespace kvindex
