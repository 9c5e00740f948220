// Grow-only memory, one per thread and use: nothing is allocated in a steady state.
#pragma once
#include <stdint.h>
#include <stdlib.h>

namespace {

template <class T> struct Buffer {
  T* data = nullptr;
  int64_t capacity = 0, size = 0;
  void reserve(int64_t n) {
    if (n <= capacity) return;
    capacity = n * 2;
    data = (T*)realloc(data, capacity * sizeof(T));
  }
  void push(const T& value) {
    reserve(size + 1);
    data[size++] = value;
  }
  ~Buffer() { free(data); }
};

}  // namespace
