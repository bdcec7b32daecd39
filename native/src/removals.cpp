#include "removals.hpp"

namespace kvindex {

// Room for one more key at least: the oldest run goes, or, when the open one fills everything, its first half.
bool Removals::make_room() {
  if (capacity_ == 0) return false;
  if (keys_.grow()) return true;
  if (runs_.size() > 0) {
    drop_oldest_run();
    if (!keys_.full()) return true;
  }
  open_.first = keys_.begin() + std::max<uint64_t>(1, keys_.size() / 2);
  keys_.drop_before(open_.first);
  forgot(now_, false);
  return true;
}

void Removals::keep_open() {
  if (runs_.full() && !runs_.grow()) drop_oldest_run();
  runs_.push(open_);
  open_.first = keys_.end();
}

void Removals::drop_oldest_run() {
  const Run& oldest = runs_.at(runs_.begin());
  forgot({oldest.sequence, oldest.time}, oldest.earlier);
  runs_.drop_before(runs_.begin() + 1);
  runs_.prefetch(runs_.begin() + 4);  // written long ago, too
  keys_.drop_before(runs_.size() > 0 ? runs_.at(runs_.begin()).first : open_.first);
}

void Removals::begin(const Moment& at) {
  begins_ = false;
  memory_.reach = begins_as_;
  memory_.from = at;
}

// Some of what left with this message is remembered no more.
void Removals::forgot(const Moment& last, bool earlier) {
  if (earlier) return;  // of this life, all that was remembered still is
  // Older ones may go after one of whose keys not all were noted.
  if (memory_.reach == Reach::kFull && last.sequence < memory_.from.sequence) return;
  memory_.reach = Reach::kFull;
  memory_.from = last;
}

void Removals::restart() {
  for (uint64_t at = runs_.begin(); at < runs_.end(); ++at) runs_.at(at).earlier = true;
  memory_ = {};
  now_ = {};
  begins_ = true;
  begins_as_ = Reach::kStart;
}

void Removals::restored() {
  restart();
  begins_as_ = Reach::kRestored;
}

void Removals::reset() {
  keys_.reset();
  runs_.reset();
  open_ = {};
  restart();
}

void Removals::find(uint64_t key, std::vector<Found>& out) const {
  out.clear();
  uint64_t run = runs_.end();
  for (uint64_t at = keys_.end(); at > keys_.begin(); --at) {
    if (keys_.at(at - 1) != key) continue;
    // Runs are in the order of their keys, and this goes backwards.
    while (run > runs_.begin() && (run == runs_.end() || runs_.at(run).first > at - 1)) --run;
    const Run& of = runs_.at(run);
    const auto same = [&](const Found& each) { return each.group == of.group && each.tier == of.tier; };
    if (std::none_of(out.begin(), out.end(), same))
      out.push_back({of.group, of.tier, of.left, of.earlier, {of.sequence, of.time}});
  }
}

}  // namespace kvindex
