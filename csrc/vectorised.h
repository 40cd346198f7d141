// Plain loops that become vectors of whatever width the machine has. Include it first.
#pragma once
#if defined(__GNUC__) && !defined(__clang__)
// These alter no value; without them loops that compare floats or take roots don't become vectors
#pragma GCC optimize("no-trapping-math", "no-math-errno")
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define SSLR1_X86 1
#endif
// A plain loop, compiled once for each width of vector; the loader takes the widest that the machine has.
#if defined(SSLR1_X86) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(SSLR1_X86) && defined(__GLIBC__) && !defined(__clang__)
#define VECTORISED __attribute__((target_clones("avx2", "default")))
#else
#define VECTORISED
#endif
#define IN_EACH_CLONE inline __attribute__((always_inline))

#ifdef SSLR1_X86
#define TARGET_VBMI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi")))
// Whether the machine moves bytes between any places of two vectors of 64 at once.
inline bool has_vbmi() {
  static const bool found = __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl");
  return found;
}
#endif
