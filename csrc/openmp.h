/* The few OpenMP calls we make, what they are in a build without it, and the compiler's name. */
#ifndef MHA_OPENMP_H
#define MHA_OPENMP_H

#if defined(__clang__)
#define MHA_COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define MHA_COMPILER "gcc " __VERSION__
#else
#define MHA_COMPILER "unknown"
#endif

#ifdef _OPENMP
#include <omp.h>
#define MHA_OPENMP_VERSION _OPENMP
#else
#define MHA_OPENMP_VERSION 0
static inline int omp_get_max_threads(void) { return 1; }
static inline int omp_get_thread_num(void) { return 0; }
static inline int omp_in_parallel(void) { return 0; }
static inline int omp_get_num_procs(void) { return 1; }
static inline double omp_get_wtime(void) { return 0; }
#endif

#if defined(_OPENMP) && defined(__GNUC__) && !defined(__clang__)
#define MHA_GNU_OPENMP 1
#else
#define MHA_GNU_OPENMP 0
#endif

/* Let another thread have this core: for one that waits for what another computes. */
#if defined(_WIN32)
#include <windows.h>
static inline void mha_yield(void) { SwitchToThread(); }
#else
#include <sched.h>
static inline void mha_yield(void) { sched_yield(); }
#endif

#endif
