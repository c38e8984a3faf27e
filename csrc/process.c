#define _GNU_SOURCE
#include "process.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

bool xccl_process_read(int pid, xccl_process_t *out) {
    char path[32], text[1024];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t length = read(fd, text, sizeof text - 1);
    close(fd);
    if (length <= 0)
        return false;
    text[length] = 0;
    /* the name may hold blanks and parentheses: fields are counted from the last ')' */
    char *after_name = strrchr(text, ')');
    unsigned long long start = 0;
    if (!after_name ||
        sscanf(after_name + 1, " %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu",
               &out->state, &start) != 2)
        return false;
    out->start_time = start;
    return true;
}

uint64_t xccl_process_namespace(void) {
    char text[32] = "";
    struct stat space;
    if (readlink("/proc/self", text, sizeof text - 1) < 0 || atoi(text) != (int)getpid())
        return 0; /* a /proc of another namespace: its numbers mean other processes */
    return stat("/proc/self/ns/pid", &space) == 0 ? (uint64_t)space.st_ino : 0;
}

int xccl_process_reopen(int fd) {
    char path[32];
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0)
        return -1;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return open(path, (flags & O_ACCMODE) | O_CLOEXEC);
}

static struct flock one_byte(short type, uint64_t byte) {
    return (struct flock){.l_type = type, .l_whence = SEEK_SET, .l_start = (off_t)byte, .l_len = 1};
}

bool xccl_process_hold(int fd, uint64_t byte) {
    struct flock lock = one_byte(F_WRLCK, byte);
    return fcntl(fd, F_OFD_SETLK, &lock) == 0;
}

bool xccl_process_is_held(int fd, uint64_t byte) {
    struct flock lock = one_byte(F_RDLCK, byte);
    return fcntl(fd, F_OFD_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}

bool xccl_process_await_release(int fd, uint64_t byte) {
    struct flock lock = one_byte(F_RDLCK, byte);
    int status;
    do
        status = fcntl(fd, F_OFD_SETLKW, &lock);
    while (status != 0 && errno == EINTR);
    return status == 0;
}
