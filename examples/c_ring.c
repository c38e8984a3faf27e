/* Two processes, no Python: each puts a text into the other's memory and raises a signal.
 *
 *     cc -std=gnu11 -O2 -Icsrc -o c_ring examples/c_ring.c csrc/[a-z]*.c -pthread && ./c_ring
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "xccl.h"

enum { RANKS = 2, TEXT_BYTES = 64 };
static const char SESSION[] = "c-ring-example";

static void check(int status) {
    if (status < 0) {
        fprintf(stderr, "%s\n", xccl_error_message());
        exit(1);
    }
}

/* The shared object loses its name at once: it lives as long as somebody has it open. */
static int create_object(void) {
    char name[64];
    snprintf(name, sizeof name, "/xccl-example-%d", (int)getpid());
    int fd = shm_open(name, O_RDWR | O_CREAT | O_EXCL, 0600);
    if (fd < 0 || shm_unlink(name) != 0) {
        perror("shm_open");
        exit(1);
    }
    xccl_config_t config = {.size = RANKS};
    strcpy(config.session, SESSION);
    check(xccl_shm_format(fd, &config));
    return fd;
}

static void run_rank(int fd, int rank) {
    xccl_world_t *world;
    xccl_comm_t *comm;
    check(xccl_shm_attach(fd, rank, SESSION, &world));
    check(xccl_shm_wait_all_attached(world, XCCL_TIMEOUT_DEFAULT));
    check(xccl_comm_open(world, &comm));

    /* One block for a text and a signal, at the same offset of every rank's window. */
    uint64_t offset, seen;
    check(xccl_heap_alloc(comm, XCCL_AREA_APP, 2 * TEXT_BYTES, XCCL_HEAP_COMMIT, 1, XCCL_TIMEOUT_DEFAULT, &offset));
    char *text = xccl_gas_local(world, offset);
    uint64_t *arrived = xccl_gas_local(world, offset + TEXT_BYTES);

    char greeting[TEXT_BYTES];
    int right = (rank + 1) % RANKS;
    snprintf(greeting, sizeof greeting, "hello rank %d, this is rank %d", right, rank);
    check(xccl_gas_put_signal(comm, text, greeting, sizeof greeting, arrived, 1, XCCL_SIGNAL_SET, right));
    check(xccl_gas_wait_until(comm, arrived, XCCL_CMP_EQ, 1, XCCL_TIMEOUT_DEFAULT, &seen));
    printf("rank %d got: %s\n", rank, text);

    check(xccl_comm_close(comm, XCCL_TIMEOUT_DEFAULT));
    xccl_shm_detach(world);
    xccl_shm_unmap(world);
}

int main(void) {
    int fd = create_object();
    for (int rank = 0; rank < RANKS; rank++)
        if (fork() == 0) {
            run_rank(fd, rank);
            return 0;
        }
    int failed = 0, status;
    for (int rank = 0; rank < RANKS; rank++)
        failed |= wait(&status) < 0 || status != 0;
    return failed;
}
