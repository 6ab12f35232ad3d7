#pragma once

#include "kernels.h"

namespace llm_fp4 {

// The kernels in use: the best this machine runs, until `select` says otherwise.
const Kernels& kernels();

// Use the kernels of that name; false if there are none or this machine cannot run them. Null or "": the best.
bool select(const char* name);

// The kernels this machine runs, best first; null at the end.
const Kernels* available(int index);

}  // namespace llm_fp4
