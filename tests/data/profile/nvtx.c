// A profiler's end of NVTX 3, which writes what it is told to the file RANGES. With REFUSE it wants nothing.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef void (*function)(void);

struct callbacks {
    size_t bytes;
    int (*module)(unsigned number, function*** places, unsigned* count);
};

struct versions {
    size_t bytes;
    uint32_t version, reserved;
    void (*set)(uint32_t version);
};

static FILE* out;
static int depth;

static int push(const char* name) {
    fprintf(out, "%*s%s\n", 2 * depth, "", name);
    return depth++;
}

static int pop(void) {
    depth--;
    fprintf(out, "%*send\n", 2 * depth, "");
    return depth;
}

int InitializeInjectionNvtx2(const void* (*tables)(uint32_t)) {
    // Modules by number: one more than their functions.
    static const unsigned counts[] = {0, 16, 9, 15, 7, 16, 7};
    out = fopen(getenv("RANGES"), "w");
    setvbuf(out, NULL, _IOLBF, 0);
    const struct callbacks* callbacks = tables(1);
    const struct versions* versions = tables(3);
    if (callbacks->bytes != sizeof *callbacks || versions->bytes != sizeof *versions || versions->version != 3) {
        fprintf(out, "other tables\n");
    }
    versions->set(3);
    if (tables(0) || tables(2) || tables(4)) {
        fprintf(out, "more tables\n");
    }
    function** places;
    for (unsigned number = 0; number <= 7; number++) {
        unsigned count = 0;
        int known = callbacks->module(number, &places, &count);
        if (known != (number >= 1 && number <= 6) || (known && count != counts[number])) {
            fprintf(out, "module %u has %u\n", number, count);
        }
        for (unsigned i = 0; known && i <= count; i++) {
            if ((places[i] != NULL) != (i >= 1 && i < count)) {
                fprintf(out, "function %u of module %u\n", i, number);
            }
        }
    }
    callbacks->module(2, NULL, NULL);
    callbacks->module(1, &places, NULL);
    *places[9] = (function)push;
    *places[11] = (function)pop;
#ifdef REFUSE
    return 0;
#endif
    return 1;
}
