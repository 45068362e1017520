#define QUEST_ISA avx512
#define QUEST_KERNELS kAvx512Kernels
#include "kernels_impl.h"
