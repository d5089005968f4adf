/* Preloaded: watches the system calls that touch one folder, and lets the n-th of them fail, stop half-way or kill.
 * Calls are counted from `shim_arm`; outside the folder nothing changes. With a log, each call is recorded. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, COUNT, FAIL, SHORT, KILL_BEFORE, KILL_AFTER, FULL };
static int mode = OFF, wanted, code, calls, logfd = -1;
static long room;
static char root[PATH_MAX];
static size_t length;
static char *held[4096];

void shim_arm(const char *folder, int how, int at, int error, long bytes, int log) {
    length = strlen(folder);
    memcpy(root, folder, length + 1);
    wanted = at, code = error, room = bytes, logfd = log, calls = 0, mode = how;
}
int shim_calls(void) { return calls; }
void shim_off(void) { mode = OFF; }

static const char *whole(int dir, const char *path, char *out) {
    if (path[0] == '/') return path;
    char base[PATH_MAX], link[64];
    if (dir == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) return path;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        ssize_t n = readlink(link, base, sizeof base - 1);
        if (n < 0) return path;
        base[n] = 0;
    }
    snprintf(out, PATH_MAX, "%s/%s", base, path);
    return out;
}
static int inside(const char *path) { return mode && !strncmp(path, root, length) && (!path[length] || path[length] == '/'); }
static int known(int fd) { return mode && fd >= 0 && fd < 4096 && held[fd]; }

static void put(const void *data, size_t n) { if (logfd >= 0) syscall(SYS_write, logfd, data, n); }
static void record(const char *call, const char *a, const char *b, long offset, long size, const void *data) {
    if (logfd < 0) return;
    char line[3 * PATH_MAX];
    int n = snprintf(line, sizeof line, "%s\t%s\t%s\t%ld\t%ld\n", call, a ? a : "", b ? b : "", offset, size);
    put(line, n);
    if (data && size) put(data, size);
}
static const char *number(void) { static char text[16]; snprintf(text, sizeof text, "%d", calls); return text; }
/* Before a call: 1 if it is to fail with errno set. */
static int gate(int is_write) {
    calls++;
    if (mode == KILL_BEFORE && calls == wanted) raise(SIGKILL);
    if (mode == FAIL && calls == wanted) { errno = code; return 1; }
    (void)is_write;
    return 0;
}
static void passed(void) { if (mode == KILL_AFTER && calls == wanted) { int e = errno; raise(SIGKILL); errno = e; } }
static int full(void) { if (mode == FULL && room <= 0) { errno = ENOSPC; return 1; } return 0; }

#define REAL(name, type, ...) static type (*real)(__VA_ARGS__); if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static int opened(int dir, const char *path, int flags, int permit, int (*real)(int, const char *, int, ...)) {
    char buffer[PATH_MAX];
    const char *p = whole(dir, path, buffer);
    if (!inside(p)) return real(dir, path, flags, permit);
    struct stat st;
    int fresh = (flags & O_CREAT) && stat(p, &st) != 0;
    if (gate(0) || (fresh && full())) return -1;
    int fd = real(dir, path, flags, permit);
    if (fd >= 0 && fd < 4096) {
        free(held[fd]);
        held[fd] = strdup(p);
        if (fresh) record("create", p, 0, 0, 0, 0);
        else if (flags & O_TRUNC) record("truncate", p, 0, 0, 0, 0);
    }
    passed();
    return fd;
}
#define PERMIT int permit = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list a; va_start(a, flags); permit = va_arg(a, int); va_end(a); }
static int (*real_openat)(int, const char *, int, ...);
static void bind(void) { if (!real_openat) real_openat = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, "openat64"); }
int open(const char *path, int flags, ...) { PERMIT bind(); return opened(AT_FDCWD, path, flags, permit, real_openat); }
int open64(const char *path, int flags, ...) { PERMIT bind(); return opened(AT_FDCWD, path, flags | O_LARGEFILE, permit, real_openat); }
int openat(int dir, const char *path, int flags, ...) { PERMIT bind(); return opened(dir, path, flags, permit, real_openat); }
int openat64(int dir, const char *path, int flags, ...) { PERMIT bind(); return opened(dir, path, flags, permit, real_openat); }
int creat(const char *path, mode_t permit) { bind(); return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, permit, real_openat); }

ssize_t write(int fd, const void *data, size_t n) {
    REAL("write", ssize_t, int, const void *, size_t);
    if (!known(fd)) return real(fd, data, n);
    if (gate(1) || full()) return -1;
    size_t take = n;
    if (mode == SHORT && calls == wanted && n > 1) take = n / 2;
    if (mode == FULL && (long)take > room) take = room;
    long at = lseek(fd, 0, SEEK_CUR);
    ssize_t done = real(fd, data, take);
    if (done > 0) {
        if (mode == FULL) room -= done;
        if (fcntl(fd, F_GETFL) & O_APPEND) at = lseek(fd, 0, SEEK_CUR) - done;
        record("write", held[fd], number(), at, done, data);
    }
    passed();
    return done;
}
ssize_t pwrite64(int fd, const void *data, size_t n, off_t at) {
    REAL("pwrite64", ssize_t, int, const void *, size_t, off_t);
    if (!known(fd)) return real(fd, data, n, at);
    if (gate(1) || full()) return -1;
    ssize_t done = real(fd, data, mode == SHORT && calls == wanted && n > 1 ? n / 2 : n, at);
    if (done > 0) { if (mode == FULL) room -= done; record("write", held[fd], number(), at, done, data); }
    passed();
    return done;
}
ssize_t writev(int fd, const struct iovec *v, int n) {
    REAL("writev", ssize_t, int, const struct iovec *, int);
    if (!known(fd) || n == 0) return real(fd, v, n);
    return write(fd, v[0].iov_base, v[0].iov_len); /* a legal short count */
}
#define ON_FD(name) \
    int name(int fd) { REAL(#name, int, int); if (!known(fd)) return real(fd); if (gate(0)) return -1; \
        int done = real(fd); if (!done) record("fsync", held[fd], 0, 0, 0, 0); passed(); return done; }
ON_FD(fsync)
ON_FD(fdatasync)
int close(int fd) {
    REAL("close", int, int);
    if (!known(fd)) return real(fd);
    int bad = gate(0), e = errno;
    free(held[fd]);
    held[fd] = 0;
    int done = real(fd);
    if (bad) { errno = e; return -1; }
    passed();
    return done;
}
int ftruncate64(int fd, off_t n) {
    REAL("ftruncate64", int, int, off_t);
    if (!known(fd)) return real(fd, n);
    if (gate(0)) return -1;
    int done = real(fd, n);
    if (!done) record("truncate", held[fd], 0, n, 0, 0);
    passed();
    return done;
}
int ftruncate(int fd, off_t n) { return ftruncate64(fd, n); }

static int moved(int da, const char *a, int db, const char *b, unsigned flags) {
    char x[PATH_MAX], y[PATH_MAX];
    const char *p = whole(da, a, x), *q = whole(db, b, y);
    if (!inside(p) && !inside(q)) return syscall(SYS_renameat2, da, a, db, b, flags);
    if (gate(0)) return -1;
    int done = syscall(SYS_renameat2, da, a, db, b, flags);
    if (!done) record(flags & 2 ? "exchange" : "rename", p, q, 0, 0, 0);
    passed();
    return done;
}
int rename(const char *a, const char *b) { return moved(AT_FDCWD, a, AT_FDCWD, b, 0); }
int renameat(int da, const char *a, int db, const char *b) { return moved(da, a, db, b, 0); }
int renameat2(int da, const char *a, int db, const char *b, unsigned flags) { return moved(da, a, db, b, flags); }

#define ON_PATH(name, call, does, extra_type, extra, log) \
    int name(const char *path extra_type) { char x[PATH_MAX]; const char *p = whole(AT_FDCWD, path, x); \
        if (!inside(p)) return does; if (gate(0)) return -1; int done = does; if (!done) record(log, p, 0, 0, 0, 0); passed(); return done; }
#define COMMA ,
ON_PATH(unlink, , syscall(SYS_unlinkat, AT_FDCWD, path, 0), , , "unlink")
ON_PATH(rmdir, , syscall(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR), , , "rmdir")
ON_PATH(mkdir, , syscall(SYS_mkdirat, AT_FDCWD, path, permit), COMMA mode_t permit, , "mkdir")
ON_PATH(chmod, , syscall(SYS_fchmodat, AT_FDCWD, path, permit), COMMA mode_t permit, , "chmod")
int mkdirat(int dir, const char *path, mode_t permit) {
    char x[PATH_MAX];
    const char *p = whole(dir, path, x);
    if (!inside(p)) return syscall(SYS_mkdirat, dir, path, permit);
    if (gate(0)) return -1;
    int done = syscall(SYS_mkdirat, dir, path, permit);
    if (!done) record("mkdir", p, 0, 0, 0, 0);
    passed();
    return done;
}
int unlinkat(int dir, const char *path, int flags) {
    char x[PATH_MAX];
    const char *p = whole(dir, path, x);
    if (!inside(p)) return syscall(SYS_unlinkat, dir, path, flags);
    if (gate(0)) return -1;
    int done = syscall(SYS_unlinkat, dir, path, flags);
    if (!done) record(flags ? "rmdir" : "unlink", p, 0, 0, 0, 0);
    passed();
    return done;
}
int link(const char *a, const char *b) {
    char x[PATH_MAX], y[PATH_MAX];
    const char *p = whole(AT_FDCWD, a, x), *q = whole(AT_FDCWD, b, y);
    if (!inside(q)) return syscall(SYS_linkat, AT_FDCWD, a, AT_FDCWD, b, 0);
    if (gate(0)) return -1;
    int done = syscall(SYS_linkat, AT_FDCWD, a, AT_FDCWD, b, 0);
    if (!done) record("link", p, q, 0, 0, 0);
    passed();
    return done;
}
