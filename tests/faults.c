/* Faults of a disk and of a machine, for any library of a process: LD_PRELOAD, then faults_plan() in the process to be tried.
 *
 * Every operation that changes files beneath one folder is counted. At one of them the process dies, in a write after half of its bytes;
 * or the disk is full once so many bytes were written. memory: int64[1], shared with the process that watches, counts operations.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char beneath[PATH_MAX];
static long dies_at, room = -1;
static long *operations;

/* folder: absolute, without links; at: the operation to die at, 0 for none; bytes: room on the disk, -1 for enough. */
void faults_plan(const char *folder, long at, long bytes, long *memory) {
    strncpy(beneath, folder, sizeof beneath - 1);
    dies_at = at;
    room = bytes;
    operations = memory;
}

static int meant(int folder, const char *path) {
    char link[64], whole[PATH_MAX];
    if (!operations)
        return 0;
    if (path && path[0] == '/')
        return !strncmp(path, beneath, strlen(beneath));
    if (folder == AT_FDCWD)
        return 0; /* the tests name files in full */
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t size = readlink(link, whole, sizeof whole - 1);
    whole[size > 0 ? size : 0] = 0;
    return !strncmp(whole, beneath, strlen(beneath));
}

static int due(int folder, const char *path) {
    return meant(folder, path) && __atomic_add_fetch(operations, 1, __ATOMIC_SEQ_CST) == dies_at;
}

static int die(void) {
    kill(getpid(), SIGKILL);
    return 0;
}

static int full(int folder, const char *path) {
    if (room != 0 || !meant(folder, path))
        return 0;
    errno = ENOSPC;
    return 1;
}

#define REAL(name, ...) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))(__VA_ARGS__)
#define CALL(name, folder, path, ...) ((void)(due(folder, path) && die()), REAL(name, __VA_ARGS__))
#define MAKE(name, folder, path, ...) ((void)(due(folder, path) && die()), full(folder, path) ? -1 : REAL(name, __VA_ARGS__))

/* How many of the bytes of a write fit; -1 if none. */
static ssize_t fitting(int file, size_t size) {
    if (room < 0 || !meant(file, NULL))
        return size;
    if (full(file, NULL))
        return -1;
    ssize_t part = size < (size_t)room ? (ssize_t)size : room;
    room -= part;
    return part;
}

ssize_t write(int file, const void *bytes, size_t size) {
    if (due(file, NULL)) {
        REAL(write, file, bytes, size / 2);
        die();
    }
    ssize_t part = fitting(file, size);
    return part < 0 ? -1 : REAL(write, file, bytes, part);
}

ssize_t pwrite64(int file, const void *bytes, size_t size, off64_t at) {
    if (due(file, NULL)) {
        REAL(pwrite64, file, bytes, size / 2, at);
        die();
    }
    ssize_t part = fitting(file, size);
    return part < 0 ? -1 : REAL(pwrite64, file, bytes, part, at);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    size_t size = 0;
    for (int i = 0; i < count; i++)
        size += parts[i].iov_len;
    return count && meant(file, NULL) ? write(file, parts[0].iov_base, parts[0].iov_len) : size ? REAL(writev, file, parts, count) : 0;
}

int fsync(int file) { return CALL(fsync, file, NULL, file); }
int fdatasync(int file) { return CALL(fdatasync, file, NULL, file); }
int ftruncate64(int file, off64_t size) { return CALL(ftruncate64, file, NULL, file, size); }
int rename(const char *from, const char *to) { return CALL(rename, AT_FDCWD, to, from, to); }
int renameat(int a, const char *from, int b, const char *to) { return CALL(renameat, b, to, a, from, b, to); }
int unlink(const char *path) { return CALL(unlink, AT_FDCWD, path, path); }
int unlinkat(int folder, const char *path, int flags) { return CALL(unlinkat, folder, path, folder, path, flags); }
int rmdir(const char *path) { return CALL(rmdir, AT_FDCWD, path, path); }
int mkdir(const char *path, mode_t mode) { return MAKE(mkdir, AT_FDCWD, path, path, mode); }
int symlink(const char *to, const char *path) { return MAKE(symlink, AT_FDCWD, path, to, path); }

int open64(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;
    va_end(more);
    return flags & (O_CREAT | O_TRUNC) ? CALL(open64, AT_FDCWD, path, path, flags, mode) : REAL(open64, path, flags, mode);
}

int open(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;
    va_end(more);
    return flags & (O_CREAT | O_TRUNC) ? CALL(open, AT_FDCWD, path, path, flags, mode) : REAL(open, path, flags, mode);
}
