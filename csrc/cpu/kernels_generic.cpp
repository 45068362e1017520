#define QUEST_ISA generic
#define QUEST_KERNELS kGenericKernels
#include "kernels_impl.h"
