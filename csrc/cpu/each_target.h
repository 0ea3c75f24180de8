// Includes the file D2EXT_LOOPS once for each instruction set, in namespaces baseline, avx2 and
// avx512 of the namespace around it. Functions are declared D2EXT_INLINE (small ones) or
// D2EXT_TARGET. Not guarded: each file of loops includes it for itself.

#define D2EXT_INLINE D2EXT_TARGET inline __attribute__((always_inline))

#define D2EXT_TARGET
namespace baseline {
#include "vector_math.h"

#include D2EXT_LOOPS
}  // namespace baseline
#undef D2EXT_TARGET

#ifdef D2EXT_X86_TARGETS
#define D2EXT_TARGET __attribute__((target("avx2,fma")))
namespace avx2 {
#include "vector_math.h"

#include D2EXT_LOOPS
}  // namespace avx2
#undef D2EXT_TARGET

#define D2EXT_TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))
namespace avx512 {
#include "vector_math.h"

#include D2EXT_LOOPS
}  // namespace avx512
#undef D2EXT_TARGET
#endif

#undef D2EXT_INLINE
#undef D2EXT_LOOPS
