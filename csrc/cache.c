#include "cache.h"

#include <stdio.h>
#include <unistd.h>

static const uint64_t USUAL = 8 << 20; /* where the system does not tell */

/* The kernel's figure first: the C library multiplies it by the threads that share it on some processors. */
static uint64_t ask(void) {
    unsigned long long kilobytes = 0;
    FILE *file = fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "re");
    if (file) {
        if (fscanf(file, "%lluK", &kilobytes) != 1)
            kilobytes = 0;
        fclose(file);
    }
    if (kilobytes)
        return (uint64_t)kilobytes << 10;
    long bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
    return bytes > 0 ? (uint64_t)bytes : USUAL;
}

uint64_t xccl_cache_bytes(void) {
    static uint64_t known; /* two threads that ask at once get the same answer */
    if (!known)
        known = ask();
    return known;
}
