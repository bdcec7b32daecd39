#include "zeromq.hpp"

#include <dlfcn.h>
#include <link.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace kvindex {

namespace {

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

}  // namespace kvindex
