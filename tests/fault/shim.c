/* A library to preload that makes the n-th system call or allocation of the program fail, or writes down what the program
 * does to its output files. Only calls made by the program itself and by the parsers it links (jansson, PCRE2) count: what MPI
 * does inside is not ours. Counting begins when the program first opens a path that ends in TRFAULT_AFTER. In front of an
 * address sanitizer's program (ASAN_OPTIONS=verify_asan_link_order=0) memory comes from the sanitizer.
 *
 *   TRFAULT=KIND:N[+][:ERRNO]  KIND is malloc, open, read, write, fsync, rename or truncate; the N-th call (from 1) fails with
 *                              that errno (a number; each kind has its own otherwise). N+: that one and all later ones.
 *   TRFAULT_STOP=END            behind the first write to a path that ends so the program gets SIGUSR1, whatever it does then
 *   TRFAULT_CLOCK=SECONDS         the wall clock is set so far forward, and back again, each time the program looks at it
 *   TRFAULT_COUNT=FILE         the counters of all kinds, 8 bytes each in the order above, kept there while the program runs
 *   TRFAULT_TIME=FILE          at the end: "CALLS SECONDS", spent in writes and syncs of paths that begin with TRFAULT_LOG_PATH
 *   TRFAULT_LOG=FILE           for tests/fault/replay.py: every change of a path that begins with TRFAULT_LOG_PATH, one
 *                              header line each ("write PATH OFFSET BYTES") and, behind a write's, the bytes
 */
#include <config.h>

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { MALLOC, OPEN, READ, WRITE, FSYNC, RENAME, TRUNCATE, N_KINDS, N_RANGES = 16, N_FDS = 1024 };

static const char *const kind_name[N_KINDS] = {"malloc", "open",   "read",    "write",
                                               "fsync",  "rename", "truncate"};
static const int kind_errno[N_KINDS] = {ENOMEM, EIO, EIO, EIO, EIO, EIO, EIO};

/* A preloaded library has nowhere else to keep its state. Written before main, then only the atomics change. */
static struct {
    bool ready;
    int kind, why, log;
    uint64_t n;
    bool later;
    const char *after, *stop, *log_path;
    atomic_int stop_fd; /* of the path that stops; -1: not open, or it has */
    atomic_bool counting;
    atomic_uint_fast64_t *count, own[N_KINDS];
    struct range {
        uintptr_t begin, end;
    } range[N_RANGES]; /* where our code lies */
    int n_ranges;
    int64_t jump_s; /* of the wall clock; 0: it goes on evenly */
    atomic_uint n_looks;
    int (*clock_gettime)(clockid_t, struct timespec *);
    pthread_mutex_t lock;
    bool tracks; /* files are logged or timed */
    const char *time_path;
    atomic_uint_fast64_t n_timed, timed_ns;
    char *fd_path[N_FDS]; /* of files that are logged or timed */
} shim = {.kind = -1, .log = -1, .stop_fd = -1, .lock = PTHREAD_MUTEX_INITIALIZER};

/* ---- who calls ------------------------------------------------------------------------------- */

static int add_range(struct dl_phdr_info *info, size_t size, void *ctx)
{
    bool program = !*(bool *)ctx; /* it comes first */
    (void)size;
    *(bool *)ctx = true;
    if (!program && !strstr(info->dlpi_name, "libjansson") && !strstr(info->dlpi_name, "libpcre2"))
        return 0;
    for (int i = 0; i < info->dlpi_phnum && shim.n_ranges < N_RANGES; i++) {
        const ElfW(Phdr) *p = &info->dlpi_phdr[i];
        if (p->p_type != PT_LOAD || !(p->p_flags & PF_X)) continue;
        uintptr_t begin = info->dlpi_addr + p->p_vaddr;
        shim.range[shim.n_ranges++] = (struct range){begin, begin + p->p_memsz};
    }
    return 0;
}

__attribute__((constructor)) static void start(void)
{
    const char *fault = getenv("TRFAULT"), *count = getenv("TRFAULT_COUNT"),
               *log = getenv("TRFAULT_LOG");
    bool seen = false;

    shim.after = getenv("TRFAULT_AFTER");
    shim.stop = getenv("TRFAULT_STOP");
    shim.log_path = getenv("TRFAULT_LOG_PATH");
    const char *jump = getenv("TRFAULT_CLOCK");
    if (jump) shim.jump_s = atoll(jump);
    *(void **)&shim.clock_gettime = dlsym(RTLD_NEXT, "clock_gettime");
    shim.count = shim.own;
    for (int k = 0; fault && k < N_KINDS; k++) {
        size_t n = strlen(kind_name[k]);
        char *end;
        if (strncmp(fault, kind_name[k], n) != 0 || fault[n] != ':') continue;
        shim.kind = k;
        shim.n = strtoull(fault + n + 1, &end, 10);
        shim.later = *end == '+';
        end += shim.later;
        shim.why = *end == ':' ? atoi(end + 1) : kind_errno[k];
    }
    int fd =
        count ? (int)syscall(SYS_openat, AT_FDCWD, count, O_RDWR | O_CREAT | O_CLOEXEC, 0666) : -1;
    if (fd >= 0 && ftruncate(fd, N_KINDS * 8) == 0) {
        void *p = mmap(NULL, N_KINDS * 8, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (p != MAP_FAILED) shim.count = p;
    }
    if (log && shim.log_path)
        shim.log = (int)syscall(SYS_openat, AT_FDCWD, log,
                                O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    shim.time_path = getenv("TRFAULT_TIME");
    shim.tracks = shim.log >= 0 || (shim.time_path && shim.log_path);
    dl_iterate_phdr(add_range, &seen);
    shim.ready = true;
}

/* Counting begins with main: what libraries linked into the program do before it (CUDA's runtime registers its kernels) is
 * theirs. */
typedef int main_function(int, char **, char **);
typedef int start_function(main_function *, int, char **, void (*)(void), void (*)(void),
                           void (*)(void), void *);
static main_function *program_main;

static int counted_main(int argc, char **argv, char **environment)
{
    atomic_store(&shim.counting, !shim.after);
    return program_main(argc, argv, environment);
}

start_function __libc_start_main;
int __libc_start_main(main_function *program, int argc, char **argv, void (*init)(void),
                      void (*fini)(void), void (*linker_fini)(void), void *stack_end)
{
    start_function *next = (start_function *)dlsym(RTLD_NEXT, "__libc_start_main");
    program_main = program;
    return next(counted_main, argc, argv, init, fini, linker_fini, stack_end);
}

__attribute__((destructor)) static void finish(void)
{
    FILE *f = shim.time_path && shim.tracks ? fopen(shim.time_path, "we") : NULL;
    if (!f) return;
    fprintf(f, "%ju %.9f\n", (uintmax_t)atomic_load(&shim.n_timed),
            (double)atomic_load(&shim.timed_ns) / 1e9);
    fclose(f);
}

static bool is_ours(const void *caller)
{
    for (int i = 0; i < shim.n_ranges; i++)
        if ((uintptr_t)caller >= shim.range[i].begin && (uintptr_t)caller < shim.range[i].end)
            return true;
    return false;
}

/* Does this call fail? errno is set then. */
static bool fails(int kind, const void *caller)
{
    if (!shim.ready || !atomic_load(&shim.counting) || !is_ours(caller)) return false;
    uint64_t n = atomic_fetch_add(&shim.count[kind], 1) + 1;
    if (kind != shim.kind || (shim.later ? n < shim.n : n != shim.n)) return false;
    errno = shim.why;
    return true;
}

#define CALLER      __builtin_return_address(0)
#define FAILS(kind) __builtin_expect(fails(kind, CALLER), 0)

/* ---- memory: glibc has its own functions under these names, the address sanitizer under others ---- */

extern void *__libc_malloc(size_t n), *__libc_calloc(size_t n, size_t size),
    *__libc_realloc(void *p, size_t n);
extern void *__libc_memalign(size_t align, size_t n);
extern void *__interceptor_malloc(size_t n) __attribute__((weak));
extern void *__interceptor_calloc(size_t n, size_t size) __attribute__((weak));
extern void *__interceptor_realloc(void *p, size_t n) __attribute__((weak));
extern void *__interceptor_memalign(size_t align, size_t n) __attribute__((weak));
void *malloc(size_t n);
void *calloc(size_t n, size_t size);
void *realloc(void *p, size_t n);
void *aligned_alloc(size_t align, size_t n);
int posix_memalign(void **out, size_t align, size_t n);
char *strdup(const char *s);
char *strndup(const char *s, size_t n);
int asprintf(char **out, const char *fmt, ...);
int vasprintf(char **out, const char *fmt, va_list args);
int __asprintf_chk(char **out, int flag, const char *fmt, ...);
int __vasprintf_chk(char **out, int flag, const char *fmt, va_list args);

static void *real_malloc(size_t n)
{
    return __interceptor_malloc ? __interceptor_malloc(n) : __libc_malloc(n);
}

static void *real_memalign(size_t align, size_t n)
{
    return __interceptor_memalign ? __interceptor_memalign(align, n) : __libc_memalign(align, n);
}

void *malloc(size_t n)
{
    return FAILS(MALLOC) ? NULL : real_malloc(n);
}

void *calloc(size_t n, size_t size)
{
    if (FAILS(MALLOC)) return NULL;
    return __interceptor_calloc ? __interceptor_calloc(n, size) : __libc_calloc(n, size);
}

void *realloc(void *p, size_t n)
{
    if (FAILS(MALLOC)) return NULL;
    return __interceptor_realloc ? __interceptor_realloc(p, n) : __libc_realloc(p, n);
}

void *aligned_alloc(size_t align, size_t n)
{
    return FAILS(MALLOC) ? NULL : real_memalign(align, n);
}

int posix_memalign(void **out, size_t align, size_t n)
{
    if (FAILS(MALLOC)) return ENOMEM;
    *out = real_memalign(align, n);
    return *out ? 0 : ENOMEM;
}

char *strndup(const char *s, size_t n)
{
    if (FAILS(MALLOC)) return NULL;
    n = strnlen(s, n);
    char *p = real_malloc(n + 1);
    if (!p) return NULL;
    memcpy(p, s, n);
    p[n] = 0;
    return p;
}

char *strdup(const char *s)
{
    if (FAILS(MALLOC)) return NULL;
    size_t n = strlen(s) + 1;
    char *p = real_malloc(n);
    return p ? memcpy(p, s, n) : NULL;
}

static int format(char **out, const char *fmt, va_list args)
{
    va_list again;
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, fmt, again);
    va_end(again);
    *out = n < 0 ? NULL : real_malloc((size_t)n + 1);
    return *out ? vsnprintf(*out, (size_t)n + 1, fmt, args) : -1;
}

int vasprintf(char **out, const char *fmt, va_list args)
{
    return FAILS(MALLOC) ? -1 : format(out, fmt, args);
}

int __vasprintf_chk(char **out, int flag, const char *fmt, va_list args)
{
    (void)flag;
    return FAILS(MALLOC) ? -1 : format(out, fmt, args);
}

int asprintf(char **out, const char *fmt, ...)
{
    va_list args;
    if (FAILS(MALLOC)) return -1;
    va_start(args, fmt);
    int n = format(out, fmt, args);
    va_end(args);
    return n;
}

int __asprintf_chk(char **out, int flag, const char *fmt, ...)
{
    va_list args;
    (void)flag;
    if (FAILS(MALLOC)) return -1;
    va_start(args, fmt);
    int n = format(out, fmt, args);
    va_end(args);
    return n;
}

/* ---- the log --------------------------------------------------------------------------------- */

static void put(const void *data, size_t n)
{
    for (size_t done = 0; done < n;) {
        long got = syscall(SYS_write, shim.log, (const char *)data + done, n - done);
        if (got <= 0) _exit(99); /* half a log is none */
        done += (size_t)got;
    }
}

/* data NULL: a line without bytes behind it. */
static void note(const char *what, const char *path, const char *other, int64_t at,
                 const void *data, size_t n)
{
    char line[2048];
    if (shim.log < 0) return;
    int len =
        snprintf(line, sizeof line, "%s\t%s\t%s\t%jd\t%zu\n", what, path, other, (intmax_t)at, n);
    if (len < 0 || (size_t)len >= sizeof line) _exit(99);
    pthread_mutex_lock(&shim.lock);
    put(line, (size_t)len);
    if (data) put(data, n);
    pthread_mutex_unlock(&shim.lock);
}

static bool is_logged(const char *path)
{
    return shim.tracks && strncmp(path, shim.log_path, strlen(shim.log_path)) == 0;
}

static const char *path_of(int fd)
{
    return shim.tracks && fd >= 0 && fd < N_FDS ? shim.fd_path[fd] : NULL;
}

/* The folder that holds the logged files counts as a path of its own: its syncs matter. */
static bool is_folder(const char *path)
{
    size_t n = strlen(path);
    return shim.tracks && strncmp(path, shim.log_path, n) == 0 && shim.log_path[n] == '/' &&
           !strchr(shim.log_path + n + 1, '/');
}

static void opened(int fd, const char *path, int flags, bool existed)
{
    if (fd < 0 || fd >= N_FDS || (!is_logged(path) && !is_folder(path))) return;
    size_t n = strlen(path) + 1;
    char *p = __libc_malloc(n);
    if (!p) _exit(99);
    shim.fd_path[fd] = memcpy(p, path, n); /* kept: a closed descriptor's name is overwritten */
    if (!existed && (flags & O_CREAT)) note("create", path, "", 0, NULL, 0);
    if (existed && (flags & O_TRUNC)) note("truncate", path, "", 0, NULL, 0);
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void timed(int fd, uint64_t begun)
{
    if (!begun || !path_of(fd)) return;
    atomic_fetch_add(&shim.n_timed, 1);
    atomic_fetch_add(&shim.timed_ns, now_ns() - begun);
}

static void written(int fd, const void *data, int64_t at, int64_t n)
{
    const char *path = path_of(fd);
    struct stat sb;
    if (!path || n <= 0) return;
    if (at < 0) at = fstat(fd, &sb) == 0 ? sb.st_size - n : 0; /* all our writes append */
    note("write", path, "", at, data, (size_t)n);
}

/* ---- the wall clock -------------------------------------------------------------------------- */

static int64_t jump(const void *caller)
{
    if (!shim.ready || !shim.jump_s || !is_ours(caller)) return 0;
    return atomic_fetch_add(&shim.n_looks, 1) % 2 ? 0 : shim.jump_s;
}

int clock_gettime(clockid_t clock, struct timespec *t)
{
    const int got = shim.clock_gettime ? shim.clock_gettime(clock, t)
                                       : (int)syscall(SYS_clock_gettime, clock, t);
    if (got == 0 && clock == CLOCK_REALTIME) t->tv_sec += jump(CALLER);
    return got;
}

time_t time(time_t *to)
{
    struct timespec t = {0};
    syscall(SYS_clock_gettime, CLOCK_REALTIME, &t);
    t.tv_sec += jump(CALLER);
    if (to) *to = t.tv_sec;
    return t.tv_sec;
}

/* ---- files ----------------------------------------------------------------------------------- */

static bool ends_in(const char *path, const char *end)
{
    const size_t n = strlen(path), k = strlen(end);
    return n >= k && strcmp(path + n - k, end) == 0;
}

static int do_open(const char *path, int flags, mode_t mode, const void *caller)
{
    if (shim.ready && shim.after && !atomic_load(&shim.counting) && ends_in(path, shim.after))
        atomic_store(&shim.counting, true);
    if (fails(OPEN, caller)) return -1;
    bool existed = shim.tracks && syscall(SYS_faccessat, AT_FDCWD, path, F_OK) == 0;
    int fd = (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
    if (fd >= 0 && fd < N_FDS) shim.fd_path[fd] = NULL;
    if (shim.tracks) opened(fd, path, flags, existed);
    if (fd >= 0 && shim.stop && ends_in(path, shim.stop)) atomic_store(&shim.stop_fd, fd);
    return fd;
}

static mode_t mode_of(int flags, va_list args)
{
    return flags & (O_CREAT | O_TMPFILE) ? va_arg(args, mode_t) : 0;
}

#define OPEN_LIKE(name)                                                                            \
    int name(const char *path, int flags, ...);                                                    \
    int name(const char *path, int flags, ...)                                                     \
    {                                                                                              \
        va_list args;                                                                              \
        va_start(args, flags);                                                                     \
        mode_t mode = mode_of(flags, args);                                                        \
        va_end(args);                                                                              \
        return do_open(path, flags, mode, CALLER);                                                 \
    }

OPEN_LIKE(open)
OPEN_LIKE(open64)
OPEN_LIKE(__open_2)
OPEN_LIKE(__open64_2)

int close(int fd)
{
    int open_fd = fd;
    if (fd >= 0 && fd < N_FDS) shim.fd_path[fd] = NULL;
    if (fd >= 0) atomic_compare_exchange_strong(&shim.stop_fd, &open_fd, -1);
    return (int)syscall(SYS_close, fd);
}

ssize_t read(int fd, void *buf, size_t n)
{
    return FAILS(READ) ? -1 : syscall(SYS_read, fd, buf, n);
}

ssize_t pread(int fd, void *buf, size_t n, off_t at)
{
    return FAILS(READ) ? -1 : syscall(SYS_pread64, fd, buf, n, at);
}

ssize_t pread64(int fd, void *buf, size_t n, off_t at)
{
    return FAILS(READ) ? -1 : syscall(SYS_pread64, fd, buf, n, at);
}

ssize_t write(int fd, const void *buf, size_t n)
{
    if (FAILS(WRITE)) return -1;
    uint64_t begun = shim.time_path ? now_ns() : 0;
    ssize_t put_n = syscall(SYS_write, fd, buf, n);
    timed(fd, begun);
    written(fd, buf, -1, put_n);
    int stop_fd = fd;
    if (put_n > 0 && fd >= 0 && atomic_compare_exchange_strong(&shim.stop_fd, &stop_fd, -1)) {
        shim.stop = NULL; /* once */
        raise(SIGUSR1);
    }
    return put_n;
}

static ssize_t do_pwrite(int fd, const void *buf, size_t n, off_t at, const void *caller)
{
    if (fails(WRITE, caller)) return -1;
    ssize_t put_n = syscall(SYS_pwrite64, fd, buf, n, at);
    written(fd, buf, at, put_n);
    return put_n;
}

ssize_t pwrite(int fd, const void *buf, size_t n, off_t at)
{
    return do_pwrite(fd, buf, n, at, CALLER);
}

ssize_t pwrite64(int fd, const void *buf, size_t n, off_t at)
{
    return do_pwrite(fd, buf, n, at, CALLER);
}

static int do_sync(int fd, long number, const void *caller)
{
    if (fails(FSYNC, caller)) return -1;
    uint64_t begun = shim.time_path ? now_ns() : 0;
    int got = (int)syscall(number, fd);
    timed(fd, begun);
    if (got == 0 && path_of(fd)) note("sync", path_of(fd), "", 0, NULL, 0);
    return got;
}

int fsync(int fd)
{
    return do_sync(fd, SYS_fsync, CALLER);
}

int fdatasync(int fd)
{
    return do_sync(fd, SYS_fdatasync, CALLER);
}

static int do_truncate(int fd, off_t size, const void *caller)
{
    if (fails(TRUNCATE, caller)) return -1;
    int got = (int)syscall(SYS_ftruncate, fd, size);
    if (got == 0 && path_of(fd)) note("truncate", path_of(fd), "", size, NULL, 0);
    return got;
}

int ftruncate(int fd, off_t size)
{
    return do_truncate(fd, size, CALLER);
}

int ftruncate64(int fd, off_t size)
{
    return do_truncate(fd, size, CALLER);
}

int rename(const char *from, const char *to)
{
    if (FAILS(RENAME)) return -1;
    int got = (int)syscall(SYS_rename, from, to);
    if (got != 0 || !is_logged(from)) return got;
    note("rename", from, to, 0, NULL, 0);
    for (int fd = 0; fd < N_FDS; fd++) { /* descriptors follow the file */
        if (!shim.fd_path[fd]) continue;
        if (strcmp(shim.fd_path[fd], to) == 0)
            shim.fd_path[fd] = NULL;
        else if (strcmp(shim.fd_path[fd], from) == 0)
            opened(fd, to, 0, true);
    }
    return got;
}

int unlink(const char *path)
{
    int got = (int)syscall(SYS_unlink, path);
    if (got == 0 && is_logged(path)) note("unlink", path, "", 0, NULL, 0);
    return got;
}
