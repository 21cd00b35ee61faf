// Quantising with AVX-512: 16 weights at a time.
#include "formats/quantise.inl"

namespace kt {
const QuantiseFn kQuantiseAvx512 = QuantiseGroups;
}  // namespace kt
