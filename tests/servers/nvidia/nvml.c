/* An acting libnvidia-ml.so.1: GPUs of $ACTING_GPUS, all alike, whose facts are variables. Only what the worker asks. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static unsigned long long told(const char *name, unsigned long long otherwise) {
  const char *value = getenv(name);
  return value && *value ? strtoull(value, NULL, 0) : otherwise;
}

int nvmlInitWithFlags(unsigned flags) { return (int)told("ACTING_INIT", 0); }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return "an error"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = (unsigned)told("ACTING_GPUS", 1); return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
  if (index == told("ACTING_LOST", ~0u)) return 15; /* fell off the bus */
  *device = (void *)(size_t)(index + 1);
  return 0;
}

int nvmlDeviceGetName(void *device, char *name, unsigned length) {
  const char *told = getenv("ACTING_NAME");
  snprintf(name, length, "%s", told ? told : "NVIDIA H100 80GB HBM3");
  return 0;
}

int nvmlDeviceGetUUID(void *device, char *uuid, unsigned length) {
  snprintf(uuid, length, "GPU-%08zu-0000", (size_t)device);
  return 0;
}

int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *memory) { /* total, free, used */
  if (getenv("ACTING_SLICE")) return 4; /* no permission */
  memory[0] = 80ull << 30;
  memory[1] = told("ACTING_FREE", 79ull << 30);
  memory[2] = memory[0] - memory[1];
  return 0;
}

int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) { *major = 9; *minor = 0; return 0; }

int nvmlDeviceGetTotalEccErrors(void *device, int kind, int counter, unsigned long long *count) {
  if (getenv("ACTING_NO_ECC")) return 3; /* not supported, as on a GeForce */
  *count = kind == 1 && counter == 0 ? told("ACTING_UNCORRECTED", 0) : 7;
  return 0;
}

int nvmlDeviceGetRemappedRows(void *device, unsigned *right, unsigned *wrong, unsigned *pending, unsigned *failed) {
  if (getenv("ACTING_NO_ECC")) return 3;
  *right = *wrong = 0;
  *pending = (unsigned)told("ACTING_PENDING", 0);
  *failed = (unsigned)told("ACTING_FAILED", 0);
  return 0;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, unsigned long long *reasons) {
  *reasons = told("ACTING_REASONS", 1); /* idle */
  return 0;
}

int nvmlDeviceGetUtilizationRates(void *device, unsigned *use) { use[0] = 87; use[1] = 40; return 0; } /* gpu, memory */
int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) { *milliwatts = 512500; return 0; }
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *degrees) { *degrees = 41; return 0; }
