// Rows of queries that share a kv head, walking over its keys and values together: an online softmax.
//
// Row r is query first_query + r / group and head r % group of its kv head. A walk takes the tokens in chunks: scores of
// a chunk, `weigh`, then the weighted sum of its values is added to `sums`.
#pragma once
#include "activations.h"
#include "attention.h"

namespace tq {

constexpr int CHUNK_TOKENS = 256;  // that a row has scores of at once

// Cuts one piece of memory into arrays; without memory it finds out how much is needed.
class Cutter {
 public:
  explicit Cutter(void *memory) : memory_(static_cast<char *>(memory)) {}
  template <class T>
  T *take(size_t count) {
    T *array = memory_ ? reinterpret_cast<T *>(memory_ + bytes_) : nullptr;
    bytes_ += (count * sizeof(T) + 63) / 64 * 64;
    return array;
  }
  size_t bytes() const { return bytes_; }

 private:
  char *memory_;
  size_t bytes_ = 0;
};

// What is left of a walk: for each row the largest score, the sum of e^(score - largest), and as many sums of values.
struct Partial {
  float *largest, *weight;
  float *sums;     // [rows][value_width]
  float *rotated;  // the same of packed values, in their basis
};

struct Rows {
  const tq_attend_params *params;
  const Mask *mask;    // or NULL
  int batch, kv_head;
  int first_query, count;
  int group;           // query heads per kv head
  int head_width, value_width;  // of a key and a value in whole vectors, in either basis; what is beyond is 0
  bool packed;         // there are packed tokens: what belongs to them is set
  bool blind;          // some row may see nothing at all, and then takes the mean of all tokens

  float *queries;      // [count][head_width], times params.scale
  float *turned;       // the same in the basis of packed keys
  RowGroup codes;      // of those
  Partial state;
  float *scores;       // [count][CHUNK_TOKENS]: of a chunk, then their weights

  void cut(Cutter &memory);
  // For the first chunk of a walk.
  void begin();
  // Turns `n` scores of row r, of tokens from `position` on, into weights; what came before is scaled to fit them. Nobody
  // sees the first `hidden` tokens.
  void weigh(int r, float *scores, int n, int position, int hidden = 0);
  // Whether rows [r, r + n) need not look at these tokens.
  bool unseen(int r, int n, int position, int tokens) const;
  int query(int r) const { return first_query + r / group; }
  int head(int r) const { return kv_head * group + r % group; }
};

void cut(Partial &partial, int count, int value_width, bool packed, Cutter &memory);

// Adds what another walk of the same rows found.
void merge(const Partial &from, int count, int value_width, Partial &into);

}  // namespace tq
