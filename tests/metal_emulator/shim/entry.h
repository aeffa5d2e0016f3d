// Calls a kernel function whatever its parameters are: msl_sources says where each comes from, an index of the buffers
// if not negative, else -1 - i for the i-th vector attribute or -101 - i for the i-th single number (wrapper.py).
#pragma once

namespace metal::emulated {

template <class A>
MSL_HOST A argument(void** buffers, const msl_ids* ids, int source) {
  if constexpr (std::is_pointer_v<A>) {
    return (A)buffers[source];
  } else if constexpr (std::is_lvalue_reference_v<A>) {
    return *(std::remove_reference_t<A>*)buffers[source];
  } else if constexpr (metal::n_components<A>::value > 1) {
    A r;
    for (int i = 0; i < metal::n_components<A>::value; i++) r[i] = ids->vectors[-1 - source][i];
    return r;
  } else {
    return A(source < -100 ? ids->numbers[-101 - source] : ids->vectors[-1 - source][0]);
  }
}

template <class... A, size_t... K>
MSL_HOST void call(void (*function)(A...), void** buffers, const msl_ids* ids, const short* sources, std::index_sequence<K...>) {
  function(argument<A>(buffers, ids, sources[K])...);
}
template <class... A>
MSL_HOST void call(void (*function)(A...), void** buffers, const msl_ids* ids, const short* sources) {
  call(function, buffers, ids, sources, std::make_index_sequence<sizeof...(A)>());
}

}  // namespace metal::emulated
