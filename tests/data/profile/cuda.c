// As much of a driver as opening a card, waiting and a profiler's window take. What it is asked goes to the file RANGES.

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// A context is current on one thread.
static __thread void* bound;

static int told(const char* what) {
    FILE* out = fopen(getenv("RANGES"), "a");
    fprintf(out, "%s%s\n", what, bound ? "" : " without a context");
    return fclose(out);
}

int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
int cuInit(unsigned flags) { return (int)flags; }
int cuDeviceGetCount(int* count) { *count = 2; return 0; }
int cuDeviceGet(int* device, int number) { *device = 40 + number; return 0; }
int cuDeviceGetName(char* name, int bytes, int device) { snprintf(name, bytes, "card %d", device); return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) { *value = 9; return 0; }
int cuDeviceTotalMem_v2(size_t* bytes, int device) { *bytes = 1 << 30; return 0; }

int cuDeviceGetPCIBusId(char* text, int bytes, int device) {
    // The second card is nowhere.
    snprintf(text, bytes, "0000:%d:00.0", device + 25);
    return device == 40 ? 0 : 1;
}

int cuDevicePrimaryCtxRetain(void** context, int device) { *context = &bound; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
int cuCtxSetCurrent(void* context) { bound = context; return 0; }
int cuStreamCreate(void** stream, unsigned flags) { *stream = &bound; return 0; }
int cuStreamDestroy_v2(void* stream) { return 0; }
int cuModuleLoadDataEx(void** module, const void* image, unsigned count, void* options, void* values) {
    *module = &bound;
    return 0;
}
int cuModuleUnload(void* module) { return 0; }
int cuStreamSynchronize(void* stream) { return told("wait"); }
int cuProfilerStart(void) { return told("start") || getenv("REFUSES") ? 5 : 0; }
int cuProfilerStop(void) { return told("stop"); }
int cuGetErrorString(int error, const char** text) { *text = "it does not want to"; return 0; }
int cuGetErrorName(int error, const char** text) { *text = "CUDA_ERROR_PROFILER_DISABLED"; return 0; }
