// One MLX operation for all kernels: an array that computes itself, when it is asked for, by calling a tq_operation.
//
// Built at first use for one Python, one MLX and one nanobind (lazy.py). It knows nothing of the kernels but the
// signature that they share; their addresses come from the library that ctypes has opened.
#include <Python.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "continued.h"
#include "kernels/tq_cpu.h"
#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"
#include "mlx/stream.h"
#include "mlx/transforms.h"

namespace nb = nanobind;
namespace mx = mlx::core;

namespace {

// What Python has of both is a handle. Their contents know no Python: the last owner may be a thread that does not have
// the interpreter while another one, which has it, waits for that thread.

// Zeroed memory that begins where a cache line does, for what only kernels read and write.
struct Memory {
  explicit Memory(size_t size) {
    void *allocated = std::calloc(size + ALIGNMENT, 1);
    if (!allocated) throw std::bad_alloc();
    const uintptr_t aligned = (reinterpret_cast<uintptr_t>(allocated) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    bytes = std::shared_ptr<void>(reinterpret_cast<void *>(aligned), [allocated](void *) { std::free(allocated); });
  }
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(bytes.get()); }

  static constexpr size_t ALIGNMENT = 64;
  std::shared_ptr<void> bytes;
};

// What parameters point to.
struct Keep {
  Keep(const std::vector<mx::array> &arrays, const std::vector<Memory> &memories, const std::vector<Keep> &others)
      : contents(std::make_shared<Contents>(Contents{arrays, memories, others})) {}

  struct Contents {
    std::vector<mx::array> arrays;
    std::vector<Memory> memories;
    std::vector<Keep> others;
  };
  std::shared_ptr<const Contents> contents;
};

struct Parameters {
  tq_operation operation;
  std::vector<char> bytes;
  std::vector<int> aliases;  // of each output: the input whose buffer it continues, or -1
  bool strided;
  std::shared_ptr<const Keep::Contents> keep;
};

constexpr std::pair<mx::Dtype::Val, int> DTYPES[] = {
    {mx::Dtype::Val::float32, TQ_F32}, {mx::Dtype::Val::float16, TQ_F16}, {mx::Dtype::Val::uint32, TQ_U32},
    {mx::Dtype::Val::int32, TQ_I32},   {mx::Dtype::Val::uint8, TQ_U8},    {mx::Dtype::Val::bool_, TQ_BOOL},
};

int dtype_of(const mx::Dtype &dtype) {
  for (auto [theirs, ours] : DTYPES)
    if (dtype.val() == theirs) return ours;
  throw std::invalid_argument("kernels take float32, float16, uint32, int32, uint8 and bool");
}

// A call that waits in a stream: tq_arrays, and the shapes and strides that they point to.
struct Task {
  std::shared_ptr<const Parameters> parameters;
  std::vector<mx::Shape> shapes;
  std::vector<mx::Strides> strides;
  std::vector<tq_array> arrays;  // inputs, then outputs
  size_t n_inputs = 0;
  tq::Done done = std::make_shared<std::atomic<bool>>(false);

  explicit Task(size_t capacity) {
    shapes.reserve(capacity), strides.reserve(capacity), arrays.reserve(capacity);
  }
  void add(const mx::array &a) {
    shapes.push_back(a.shape());
    strides.push_back(a.strides());
    arrays.push_back({const_cast<char *>(a.data<char>()), shapes.back().begin(), strides.back().begin(),
                      int32_t(a.ndim()), dtype_of(a.dtype())});
  }
  void operator()() const {
    parameters->operation(parameters->bytes.data(), arrays.data(), arrays.data() + n_inputs);
    *done = true;
  }
};

bool outputs_are_kept = false;

void copy_to_rows(const mx::Shape &shape, const mx::Strides &strides, size_t itemsize, const char *from, char *to) {
  const int ndim = int(shape.size());
  size_t rows = 1;
  for (int d = 0; d + 1 < ndim; d++) rows *= shape[d];
  const size_t row = ndim ? shape[ndim - 1] : 1;
  const int64_t step = ndim ? strides[ndim - 1] * int64_t(itemsize) : 0;
  std::vector<int> index(ndim, 0);
  for (size_t r = 0; r < rows; r++) {
    const char *source = from;
    for (int d = 0; d + 1 < ndim; d++) source += index[d] * strides[d] * int64_t(itemsize);
    if (step == int64_t(itemsize))
      std::memcpy(to, source, row * itemsize), to += row * itemsize;
    else
      for (size_t i = 0; i < row; i++, to += itemsize, source += step) std::memcpy(to, source, itemsize);
    for (int d = ndim - 2; d >= 0 && ++index[d] == shape[d]; d--) index[d] = 0;
  }
}

class Call : public mx::Primitive {
 public:
  Call(mx::Stream stream, std::shared_ptr<const Parameters> parameters)
      : mx::Primitive(stream), parameters_(std::move(parameters)) {}

  void eval_cpu(const std::vector<mx::array> &inputs, std::vector<mx::array> &outputs) override {
    auto &encoder = mx::cpu::get_command_encoder(stream());
    auto task = std::make_shared<Task>(inputs.size() + outputs.size());
    task->parameters = parameters_;
    const auto &aliases = parameters_->aliases;
    for (size_t i = 0; i < inputs.size(); i++) {
      if (std::find(aliases.begin(), aliases.end(), int(i)) != aliases.end()) continue;
      task->add(readable(inputs[i]) ? inputs[i] : row_contiguous(inputs[i], encoder));
    }
    task->n_inputs = task->arrays.size();
    evaluated_ = tq::evaluated_for(inputs, outputs);
    tq::clear_inputs_of_others(outputs, evaluated_);
    for (size_t j = 0; j < outputs.size(); j++) {
      const bool kept = outputs_are_kept && evaluated_ != outputs.size() && evaluated_ != j;
      if (aliases[j] >= 0)
        continue_buffer(inputs[aliases[j]], outputs[j], encoder, kept ? task->done : nullptr);
      else
        outputs[j].set_data(mx::allocator::malloc(outputs[j].nbytes()));
      task->add(outputs[j]);
    }
    encoder.dispatch([task] { (*task)(); });
  }

  void eval_gpu(const std::vector<mx::array> &, std::vector<mx::array> &) override {
    throw std::runtime_error("this operation runs on the CPU only");
  }

  const char *name() const override { return "tq"; }

  size_t evaluated() const { return evaluated_; }

 private:
  bool readable(const mx::array &a) const {
    return a.flags().row_contiguous || (parameters_->strided && (a.ndim() == 0 || a.strides(-1) == 1));
  }

  static mx::array row_contiguous(const mx::array &a, mx::cpu::CommandEncoder &encoder) {
    mx::array made(a.shape(), a.dtype(), nullptr, {});
    made.set_data(mx::allocator::malloc(made.nbytes()));
    copy(a, made, encoder);
    encoder.add_temporary(made);
    return made;
  }

  static void continue_buffer(const mx::array &a, mx::array &output, mx::cpu::CommandEncoder &encoder,
                              tq::Done kept_until) {
    if (tq::may_continue(a)) {
      const auto known = tq::Registry::instance().find(a.data_shared_ptr().get());
      tq::set_continued(output, known.memory ? known.memory : a.data_shared_ptr(), a.offset(), std::move(kept_until));
    } else {
      auto memory = std::make_shared<mx::allocator::Data>(mx::allocator::malloc(output.nbytes()));
      tq::set_continued(output, std::move(memory), 0, std::move(kept_until));
      copy(a, output, encoder);
    }
  }

  static void copy(const mx::array &from, mx::array &to, mx::cpu::CommandEncoder &encoder) {
    encoder.dispatch([shape = from.shape(), strides = from.strides(), size = from.itemsize(),
                      source = from.data<char>(), target = to.data<char>()] {
      copy_to_rows(shape, strides, size, source, target);
    });
  }

  std::shared_ptr<const Parameters> parameters_;
  size_t evaluated_ = 0;  // the output that asked
};

// Tries whether MLX does with the outputs of an operation what continued.h says. Otherwise caches are copied while
// earlier operations wait.
bool check_outputs_are_kept() {
  static std::atomic<bool> measured;
  measured = false;
  auto operation = [](const void *, const tq_array *, const tq_array *) {
    while (!measured) std::this_thread::yield();
  };
  auto primitive = std::make_shared<Call>(
      mx::default_stream(mx::Device(mx::Device::cpu)),
      std::make_shared<const Parameters>(Parameters{operation, {}, {-1, -1, -1}, false, nullptr}));
  auto outputs = mx::array::make_arrays({{1}, {1}, {1}}, {mx::float32, mx::float32, mx::float32}, primitive,
                                        {mx::array({0.0f})});
  mx::async_eval({outputs[1]});
  const bool kept = outputs[0].data_shared_ptr().use_count() == 2 && outputs[2].data_shared_ptr().use_count() == 2;
  measured = true;
  mx::eval(outputs);
  return outputs_are_kept = kept && primitive->evaluated() == 1;
}

// The bytes of an object with the buffer interface.
std::vector<char> bytes_of(nb::handle object) {
  Py_buffer view;
  if (PyObject_GetBuffer(object.ptr(), &view, PyBUF_SIMPLE)) throw nb::python_error();
  std::vector<char> bytes(static_cast<char *>(view.buf), static_cast<char *>(view.buf) + view.len);
  PyBuffer_Release(&view);
  return bytes;
}

std::vector<mx::array> planned(std::vector<mx::Shape> shapes, const std::vector<mx::Dtype> &dtypes, Parameters parameters,
                   const std::vector<mx::array> &inputs) {
  auto primitive = std::make_shared<Call>(mx::default_stream(mx::Device(mx::Device::cpu)),
                                          std::make_shared<const Parameters>(std::move(parameters)));
  if (shapes.size() == 1) return {mx::array(std::move(shapes[0]), dtypes[0], std::move(primitive), inputs)};
  return mx::array::make_arrays(std::move(shapes), dtypes, primitive, inputs);
}

std::vector<mx::array> call(uintptr_t operation, nb::handle params, const std::vector<mx::array> &inputs,
                            nb::sequence outputs, const std::vector<int> &aliases, const Keep *keep, bool strided) {
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
  for (nb::handle output : outputs) {
    mx::Shape &shape = shapes.emplace_back();
    for (nb::handle n : output[0]) shape.push_back(nb::cast<int>(n));
    dtypes.push_back(nb::cast<mx::Dtype>(output[1]));
    dtype_of(dtypes.back());
  }
  if (shapes.empty()) throw std::invalid_argument("an operation has at least one output");
  if (aliases.size() > shapes.size()) throw std::invalid_argument("there are more aliases than outputs");
  for (const mx::array &a : inputs) dtype_of(a.dtype());
  std::vector<int> all_aliases = aliases;
  all_aliases.resize(shapes.size(), -1);
  for (size_t j = 0; j < shapes.size(); j++) {
    if (all_aliases[j] < 0) continue;
    const mx::array &input = inputs.at(all_aliases[j]);
    size_t size = 1;
    for (int n : shapes[j]) size *= n;
    if (input.size() != size || input.dtype() != dtypes[j])
      throw std::invalid_argument("an output has another size or type than the input that it continues");
  }
  return planned(std::move(shapes), dtypes,
                 {reinterpret_cast<tq_operation>(operation), bytes_of(params), std::move(all_aliases), strided,
                  keep ? keep->contents : nullptr},
                 inputs);
}

// A kernel with its parameters, all but a few numbers, and outputs that are like inputs: what is the same in each of
// many calls is read from Python once.
class Bound {
 public:
  Bound(uintptr_t operation, nb::handle params, size_t numbers_at, std::vector<int> aliases, const Keep *keep)
      : parameters_{reinterpret_cast<tq_operation>(operation), bytes_of(params), std::move(aliases), false,
                    keep ? keep->contents : nullptr},
        numbers_at_(numbers_at) {}

  std::vector<mx::array> operator()(const std::vector<mx::array> &inputs, const std::vector<int32_t> &numbers) const {
    const size_t size = numbers.size() * sizeof(int32_t);
    if (numbers_at_ + size > parameters_.bytes.size()) throw std::invalid_argument("there are too many numbers");
    Parameters parameters = parameters_;
    std::memcpy(parameters.bytes.data() + numbers_at_, numbers.data(), size);
    for (const mx::array &a : inputs) dtype_of(a.dtype());
    std::vector<mx::Shape> shapes;
    std::vector<mx::Dtype> dtypes;
    for (int alias : parameters_.aliases) {
      const mx::array &like = inputs.at(std::max(alias, 0));
      shapes.push_back(like.shape());
      dtypes.push_back(like.dtype());
    }
    return planned(std::move(shapes), dtypes, std::move(parameters), inputs);
  }

  // The call of a layer for one token x (1, 1, hidden), which goes behind those that an mlx-lm KVCache holds; numbers
  // are position, row and rows. Nothing happens if the cache has no room or holds another form of keys and values.
  std::optional<mx::array> append(const mx::array &x, nb::handle cache, int n_kv_heads, int key_dim,
                                  int value_dim) const {
    static PyObject *const KEYS = PyUnicode_InternFromString("keys"), *const VALUES = PyUnicode_InternFromString("values"),
                    *const OFFSET = PyUnicode_InternFromString("offset");
    const auto attribute = [&](PyObject *name) { return nb::object(cache.attr(nb::handle(name))); };
    std::vector<mx::array> inputs{x};
    const auto fits = [&](PyObject *name, int dim) {
      mx::array *found;
      if (!nb::try_cast(attribute(name), found) || !found) return false;
      inputs.push_back(*found);
      return found->ndim() == 4 && found->shape(0) == 1 && found->shape(1) == n_kv_heads && found->shape(3) == dim &&
             found->dtype() == inputs[1].dtype();
    };
    if (x.ndim() != 3 || x.shape(0) != 1 || x.shape(1) != 1 || x.dtype() != mx::float32) return {};
    if (!fits(KEYS, key_dim) || !fits(VALUES, value_dim)) return {};
    if (inputs[1].dtype() != mx::float16 && inputs[1].dtype() != mx::float32) return {};
    const int offset = nb::cast<int>(attribute(OFFSET)), end = offset + 1;
    if (end > inputs[1].shape(2) || end > inputs[2].shape(2)) return {};
    auto outputs = (*this)(inputs, {offset, offset, end});
    nb::setattr(cache, nb::handle(KEYS), nb::cast(outputs[1]));
    nb::setattr(cache, nb::handle(VALUES), nb::cast(outputs[2]));
    nb::setattr(cache, nb::handle(OFFSET), nb::cast(end));
    return outputs[0];
  }

 private:
  Parameters parameters_;
  size_t numbers_at_;
};

}  // namespace

NB_MODULE(extension, m) {
  nb::class_<Memory>(m, "Memory").def(nb::init<size_t>()).def_prop_ro("address", &Memory::address);
  nb::class_<Keep>(m, "Keep").def(
      nb::init<const std::vector<mx::array> &, const std::vector<Memory> &, const std::vector<Keep> &>());
  nb::class_<Bound>(m, "Bound")
      .def(nb::init<uintptr_t, nb::handle, size_t, std::vector<int>, const Keep *>(), nb::arg("operation"),
           nb::arg("params"), nb::arg("numbers_at"), nb::arg("aliases"), nb::arg("keep").none())
      .def("__call__", &Bound::operator())
      .def("append", &Bound::append);
  m.def("check_outputs_are_kept", &check_outputs_are_kept);
  m.def("call", &call, nb::arg("operation"), nb::arg("params"), nb::arg("inputs"), nb::arg("outputs"),
        nb::arg("aliases"), nb::arg("keep").none(), nb::arg("strided"));
}
