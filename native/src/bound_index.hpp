// The index as Python holds it: with the standings of its streams.
#pragma once

#include "index.hpp"
#include "standings.hpp"

namespace kvindex {

struct BoundIndex : Index {
  using Index::Index;
  const std::shared_ptr<Standings> standings = std::make_shared<Standings>(names());
};

}  // namespace kvindex
