// Standard headers of every instruction set's file. They come before the target is chosen: a function of theirs that is
// compiled in several files must run on the oldest processor, since the linker keeps one copy.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

#include "calls.h"
#include "thread_pool.h"

// Compiles what stands between them for an instruction set.
#define DO_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define TARGET_BEGIN(set) DO_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define TARGET_END _Pragma("clang attribute pop")
#else
#define TARGET_BEGIN(set) _Pragma("GCC push_options") DO_PRAGMA(GCC target(set))
#define TARGET_END _Pragma("GCC pop_options")
#endif

namespace llama_fast {

// Uses of a thread's scratch memory that live at the same time.
enum ScratchSlot {
    kNormedRows,
    kLaidOutRows,
    kLaidOutWeight,
    kTileSums,
    kScales,
    kSecondScales,
    kAccumulators,
    kPartials,
    kRunnings,
    kPartialRunnings,
    kSplitPartials,
    kSplitRunnings,
    kQueries,
    kWidenedPage,
    kScores,
    kProcessed,
    kTokenIds,
    kSurvivors,
    kMass,
    kScratchSlots,
};

}  // namespace llama_fast
