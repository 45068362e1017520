#define QUEST_ISA avx2
#define QUEST_KERNELS kAvx2Kernels
#include "kernels_impl.h"
