// Quantising with AVX2: 8 weights at a time.
#include "formats/quantise.inl"

namespace kt {
const QuantiseFn kQuantiseAvx2 = QuantiseGroups;
}  // namespace kt
