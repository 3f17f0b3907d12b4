// What library.py asks before it calls anything else.

#include "simd.h"

int version(void) { return VERSION; }

// Whether this processor has the instructions.
int supported(void) {
#ifdef MIXTRAL_NATIVE
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
#else
    return 0;
#endif
}
