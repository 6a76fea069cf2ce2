// Copies between the card and pinned host memory, each one call: order it behind a stream, copy, mark its end.
//
// The CUDA runtime is linked statically and streams come as numbers from Python, so that of PyTorch only the stable ABI
// of 2.10 is used: one binary for every torch >= 2.10, which loads without CUDA too. See rapm/memory/offload.py.

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace {

using torch::stable::Tensor;

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("offload: ") + what + ": " + cudaGetErrorString(error));
  }
}

cudaStream_t stream_of(int64_t handle) {
  return reinterpret_cast<cudaStream_t>(handle);
}

cudaEvent_t event_of(int64_t handle) {
  return reinterpret_cast<cudaEvent_t>(handle);
}

int64_t event_new() {
  cudaEvent_t event;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "event");
  return reinterpret_cast<int64_t>(event);
}

void event_free(int64_t event) {
  cudaEventDestroy(event_of(event));  // at exit the context may be gone already
}

void stream_wait(int64_t stream, int64_t event) {
  check(cudaStreamWaitEvent(stream_of(stream), event_of(event), 0), "wait");
}

// target = source, `bytes` of them, on `stream`: after what `compute` has been given so far and, unless it is 0, after
// the event `before`. `done` marks its end. Sound inside a capture, where the events become the graph's edges.
void copy_async(
    Tensor target, Tensor source, int64_t bytes, int64_t compute, int64_t stream, int64_t before, int64_t done) {
  check(cudaEventRecord(event_of(done), stream_of(compute)), "record");
  stream_wait(stream, done);
  if (before != 0) {
    stream_wait(stream, before);
  }
  check(
      cudaMemcpyAsync(target.data_ptr(), source.data_ptr(), bytes, cudaMemcpyDefault, stream_of(stream)), "copy");
  check(cudaEventRecord(event_of(done), stream_of(stream)), "record");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rapm, m) {
  m.def("event_new() -> int");
  m.def("event_free(int event) -> ()");
  m.def("stream_wait(int stream, int event) -> ()");
  m.def(
      "copy_async(Tensor(a!) target, Tensor source, int bytes, int compute, int stream, int before, int done) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rapm, CompositeExplicitAutograd, m) {
  m.impl("event_new", TORCH_BOX(&event_new));
  m.impl("event_free", TORCH_BOX(&event_free));
  m.impl("stream_wait", TORCH_BOX(&stream_wait));
  m.impl("copy_async", TORCH_BOX(&copy_async));
}
