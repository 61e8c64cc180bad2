// Stands in for NVML: some cards, in no order, and what each says of itself.

#include <stdint.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };
enum { SM = 1, MEMORY = 2 };
enum { IDLE = 1, SET = 2, POWER_CAP = 4, HW = 8, SYNC = 16, THERMAL = 32, HW_THERMAL = 64, BRAKE = 128, DISPLAY = 256 };

struct card {
    const char* place;
    int silent;
    unsigned sm, memory, celsius, milliwatts, limit;
    unsigned long long reasons;
};

static struct card cards[] = {
    {"0000:ca:00.0", 0, 990, 3201, 88, 700125, 700000, POWER_CAP | HW | SYNC | THERMAL | HW_THERMAL | BRAKE},
    {"0000:65:00.0", 0, 1755, 3201, 61, 523250, 700000, SET | DISPLAY},
    {"0000:c0:00.0", 0, 0, 0, 0, 0, 0, POWER_CAP},
    {"0000:c1:00.0", 0, 0, 0, 0, 0, 0, HW | IDLE},
    {"0000:c2:00.0", 0, 0, 0, 0, 0, 0, HW_THERMAL | SET},
    {"0000:c3:00.0", 0, 0, 0, 0, 0, 0, BRAKE},
    {"0000:c4:00.0", 0, 0, 0, 0, 0, 0, THERMAL},
    {"0000:c5:00.0", 0, 0, 0, 0, 0, 0, SYNC},
    {"0000:e1:00.0", 1, 0, 0, 0, 0, 0, 0},
    {"0000:17:00.0", 0, 345, 1593, 30, 70000, 700000, IDLE},
};

struct process {
    unsigned pid;
    unsigned long long bytes;
    unsigned gpu_instance, compute_instance;
};

// This program's own entry is in the midst of them; ~0 bytes: unknown.
static const struct process processes[] = {
    {1000001, 3ull << 30, ~0u, ~0u}, {OWN, 1ull << 30, ~0u, ~0u}, {1000002, ~0ull, ~0u, ~0u}};

int nvmlInit_v2(void) { return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }

int nvmlSystemGetDriverVersion(char* text, unsigned bytes) {
    strncpy(text, "580.95.05", bytes);
    return SUCCESS;
}

int nvmlDeviceGetHandleByPciBusId_v2(const char* place, struct card** card) {
    for (unsigned i = 0; i < sizeof cards / sizeof *cards; i++) {
        if (!strcmp(cards[i].place, place)) {
            *card = &cards[i];
            return SUCCESS;
        }
    }
    return NOT_FOUND;
}

static int answer(const struct card* card, unsigned* to, unsigned value) {
    *to = value;
    return card->silent ? NOT_SUPPORTED : SUCCESS;
}

int nvmlDeviceGetClockInfo(struct card* card, int clock, unsigned* mhz) {
    return clock == SM ? answer(card, mhz, card->sm)
        : clock == MEMORY ? answer(card, mhz, card->memory) : INVALID_ARGUMENT;
}

int nvmlDeviceGetTemperature(struct card* card, int sensor, unsigned* celsius) {
    return sensor ? INVALID_ARGUMENT : answer(card, celsius, card->celsius);
}

int nvmlDeviceGetPowerUsage(struct card* card, unsigned* milliwatts) { return answer(card, milliwatts, card->milliwatts); }

int nvmlDeviceGetEnforcedPowerLimit(struct card* card, unsigned* milliwatts) { return answer(card, milliwatts, card->limit); }

int nvmlDeviceGetCurrentClocksThrottleReasons(struct card* card, unsigned long long* reasons) {
    *reasons = card->reasons;
    return card->silent ? NOT_SUPPORTED : SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(struct card* card, unsigned* count, struct process* to) {
    unsigned all = card->sm == 1755 ? 3 : 0, room = *count;
    *count = all;
    if (card->silent) {
        return NOT_SUPPORTED;
    }
    if (room < all) {
        return INSUFFICIENT_SIZE;
    }
    memcpy(to, processes, all * sizeof *processes);
    return SUCCESS;
}
