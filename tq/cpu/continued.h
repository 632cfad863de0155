// Outputs that continue the buffer of an input: caches that a kernel appends to.
//
// MLX lets an operation write into an input's buffer if nobody else has that array or its data (is_donatable). That is
// never so for an operation with several outputs, each of which lists the inputs; nor while an earlier operation waits
// in the stream, because MLX keeps the data of an operation's outputs, but for the one that it was evaluated for, until
// it has run. In a pipelined generation, then, each token would copy each cache. Here both are seen through: the lists
// are cleared when they have served, and the data of an output is known to be kept by one operation until that is done.
#pragma once
#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "mlx/allocator.h"
#include "mlx/array.h"

namespace tq {

// How many refer to the array itself, which MLX does not tell. An explicit instantiation may name a private member.
long references(const mlx::core::array &a);
template <auto member>
struct References {
  friend long references(const mlx::core::array &a) { return (a.*member).use_count(); }
};
template struct References<&mlx::core::array::array_desc_>;

// Set when an operation has run; what MLX keeps for it is let go only after that.
using Done = std::shared_ptr<std::atomic<bool>>;

// The data of an output that continues, or may be continued.
struct Continued {
  std::shared_ptr<mlx::core::allocator::Data> memory;  // owns the buffer, which the data of many arrays share in turn
  Done kept_until;                                     // null if MLX keeps it for nobody
};

class Registry {
 public:
  void add(const void *data, Continued continued) {
    std::lock_guard lock(mutex_);
    known_.insert_or_assign(data, std::move(continued));
  }
  void remove(const void *data) {
    Continued removed;  // let go without the lock
    std::lock_guard lock(mutex_);
    if (auto found = known_.find(data); found != known_.end()) removed = std::move(found->second), known_.erase(found);
  }
  Continued find(const void *data) {
    std::lock_guard lock(mutex_);
    auto found = known_.find(data);
    return found == known_.end() ? Continued{} : found->second;
  }
  // Never destroyed: arrays may outlive everything.
  static Registry &instance() {
    static auto *registry = new Registry;
    return *registry;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<const void *, Continued> known_;
};

// The number of the output that an operation is evaluated for: MLX passes on its list of inputs.
inline size_t evaluated_for(const std::vector<mlx::core::array> &inputs, std::vector<mlx::core::array> &outputs) {
  size_t j = 0;
  while (j < outputs.size() && &outputs[j].inputs() != &inputs) j++;
  return j;
}

// Lets go of the lists of inputs that the other outputs have, as MLX does when the operation is evaluated.
inline void clear_inputs_of_others(std::vector<mlx::core::array> &outputs, size_t evaluated) {
  if (evaluated == outputs.size() || outputs[evaluated].is_tracer()) return;
  for (size_t j = 0; j < outputs.size(); j++)
    if (j != evaluated) outputs[j].inputs().clear();
}

// Whether a's buffer may be written, by an operation that runs after all that are in the stream.
inline bool may_continue(const mlx::core::array &a) {
  if (references(a) != 1 || !a.flags().row_contiguous) return false;
  const auto &data = a.data_shared_ptr();
  const long holders = data.use_count();
  const Continued known = Registry::instance().find(data.get());
  if (!known.memory && !data->is_owned()) return false;
  // Not done now: so it was among the holders when they were counted.
  return holders == 1 || (holders == 2 && known.kept_until && !known.kept_until->load());
}

// Gives `output` the memory from `offset` bytes on, and data of its own.
inline void set_continued(mlx::core::array &output, std::shared_ptr<mlx::core::allocator::Data> memory, int64_t offset,
                          Done kept_until) {
  auto self = std::make_shared<const void *>(nullptr);
  mlx::core::allocator::Data data(memory->buffer(), [self](auto) { Registry::instance().remove(*self); });
  const auto &shape = output.shape();
  const bool one_axis = std::count_if(shape.begin(), shape.end(), [](int n) { return n != 1; }) <= 1;
  output.set_data(std::move(data), output.size(), output.strides(), {true, true, one_axis}, offset);
  *self = output.data_shared_ptr().get();
  Registry::instance().add(*self, {std::move(memory), std::move(kept_until)});
}

}  // namespace tq
