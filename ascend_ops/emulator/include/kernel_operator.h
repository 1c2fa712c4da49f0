// The AscendC API that this project's kernels use, for a CPU: g++ compiles the same op_kernel
// sources against it. What is not here does not compile; what is here checks its callers.
#pragma once

#include "emulator/cast.h"
#include "emulator/copy.h"
#include "emulator/reduce.h"
#include "emulator/select.h"
#include "emulator/sync.h"
#include "emulator/vector.h"
#if __has_include("emulator/cube.h")
#include "emulator/cube.h"
#endif
#if __has_include("emulator/cross_core.h")
#include "emulator/cross_core.h"
#endif
