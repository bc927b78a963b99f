/* Makes writing below one folder fail, or ends the process there: preloaded, and armed by the process itself.

   torture_arm(place, after, error, times): of the calls that would change something below `place`, the first
   `after` work, then `times` fail with `error` (all of them when `times` is negative); `error` 0 is SIGKILL.
   torture_seen() tells how many there were. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char place[4096];
static long after_calls, fault, fault_times;
static _Atomic long seen;

void torture_arm(const char *where, long after, long error, long times) {
    strncpy(place, where, sizeof place - 1);
    after_calls = after;
    fault = error;
    fault_times = times;
    atomic_store(&seen, 0);
}

long torture_seen(void) { return atomic_load(&seen); }

static int fails(const char *path) {
    if (!place[0] || !path || strncmp(path, place, strlen(place))) return 0;
    long count = atomic_fetch_add(&seen, 1);
    if (count < after_calls || (fault_times >= 0 && count >= after_calls + fault_times)) return 0;
    if (!fault) kill(getpid(), SIGKILL);
    errno = (int)fault;
    return 1;
}

static int fails_on(int number) {
    char name[64], path[4096];
    if (!place[0]) return 0;
    snprintf(name, sizeof name, "/proc/self/fd/%d", number);
    ssize_t length = readlink(name, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return fails(path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define ON_NUMBER(type, name, parameters, arguments)                                                         \
    type name parameters {                                                                                   \
        static type(*real) parameters;                                                                       \
        if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, #name);                                       \
        return fails_on(number) ? -1 : real arguments;                                                       \
    }
#define ON_PATH(type, name, parameters, arguments, path)                                                     \
    type name parameters {                                                                                   \
        static type(*real) parameters;                                                                       \
        if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, #name);                                       \
        return fails(path) ? -1 : real arguments;                                                            \
    }

/* a disk that becomes full takes the first half of what is written */
ssize_t write(int number, const void *data, size_t count) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = REAL(write);
    if (!fails_on(number)) return real(number, data, count);
    if (fault == ENOSPC && count > 1) return real(number, data, count / 2);
    return -1;
}
ON_NUMBER(ssize_t, pwrite, (int number, const void *data, size_t count, off_t at), (number, data, count, at))
ON_NUMBER(ssize_t, pwrite64, (int number, const void *data, size_t count, off_t at), (number, data, count, at))
ON_NUMBER(ssize_t, writev, (int number, const struct iovec *parts, int count), (number, parts, count))
ON_NUMBER(int, fsync, (int number), (number))
ON_NUMBER(int, fdatasync, (int number), (number))
ON_NUMBER(int, ftruncate, (int number, off_t length), (number, length))
ON_NUMBER(int, ftruncate64, (int number, off_t length), (number, length))
ON_PATH(int, mkdir, (const char *path, mode_t mode), (path, mode), path)
ON_PATH(int, rename, (const char *path, const char *target), (path, target), target)
ON_PATH(int, unlink, (const char *path), (path), path)
ON_PATH(int, rmdir, (const char *path), (path), path)

#define OPENING(name)                                                                                        \
    int name(const char *path, int flags, ...) {                                                             \
        static int (*real)(const char *, int, ...);                                                          \
        if (!real) real = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name);                          \
        va_list more;                                                                                        \
        va_start(more, flags);                                                                               \
        mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;                                            \
        va_end(more);                                                                                        \
        if ((flags & (O_CREAT | O_WRONLY | O_RDWR)) && fails(path)) return -1;                               \
        return real(path, flags, mode);                                                                      \
    }
OPENING(open)
OPENING(open64)

#define OPENING_AT(name)                                                                                     \
    int name(int folder, const char *path, int flags, ...) {                                                 \
        static int (*real)(int, const char *, int, ...);                                                     \
        if (!real) real = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, #name);                     \
        va_list more;                                                                                        \
        va_start(more, flags);                                                                               \
        mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;                                            \
        va_end(more);                                                                                        \
        if ((flags & (O_CREAT | O_WRONLY | O_RDWR)) && fails(path)) return -1;                               \
        return real(folder, path, flags, mode);                                                              \
    }
OPENING_AT(openat)
OPENING_AT(openat64)
