// What the connections of engines have in common.
#pragma once

namespace kvindex {

// Sends at once, and notices within half a minute when the peer's host is gone: not every peer can be asked for a sign
// of life.
void set_up_connection(int socket);

}  // namespace kvindex
