/* An acting libcuda.so.1: its version and how it starts are variables. */
#include <stdlib.h>

int cuDriverGetVersion(int *version) { *version = atoi(getenv("ACTING_CUDA") ? getenv("ACTING_CUDA") : "12080"); return 0; }
int cuInit(unsigned flags) { return atoi(getenv("ACTING_START") ? getenv("ACTING_START") : "0"); }
