#include <config.h>

#include "command/doctor_files.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "base/clock.h"

enum { NAME_MAX_BYTES = 1200, LINE_BYTES = 64 };

/* What rank 0 tells the others. */
typedef struct probe {
    char name[NAME_MAX_BYTES]; /* of the file to append to; "": there is none */
    uint64_t nonce;
} probe;

static void fault(tr_out_facts *o, const char *what, const char *path)
{
    const int why = errno;
    if (!o->fault[0])
        snprintf(o->fault, sizeof o->fault, "%s %.160s: %s", what, path, strerror(why));
}

static void folder_of(const char *path, char *folder, size_t room)
{
    const char *slash = strrchr(path, '/');

    if (!slash)
        snprintf(folder, room, ".");
    else
        snprintf(folder, room, "%.*s", slash == path ? 1 : (int)(slash - path), path);
}

static void look_at_system(tr_out_facts *o, const char *folder)
{
    static const struct {
        long magic;
        const char *name;
        bool memory;
    } known[] = {
        {0xef53, "ext", false},        {0x58465342, "xfs", false},   {0x6969, "nfs", false},
        {0x0bd00bd0, "lustre", false}, {0x9123683e, "btrfs", false}, {0x47504653, "gpfs", false},
        {0x01021994, "tmpfs", true},   {0x858458f6, "ramfs", true},  {0x794c7630, "overlay", false},
        {0x19830326, "beegfs", false}, {0x00c36400, "ceph", false}};
    struct statfs s;
    struct statvfs v;

    if (statfs(folder, &s) != 0 || statvfs(folder, &v) != 0) {
        fault(o, "cannot look at", folder);
        return;
    }
    snprintf(o->kind, sizeof o->kind, "0x%lx", (unsigned long)s.f_type);
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if ((long)s.f_type != known[i].magic) continue;
        snprintf(o->kind, sizeof o->kind, "%s", known[i].name);
        o->memory = known[i].memory;
    }
    o->free_bytes = (uint64_t)v.f_bavail * v.f_frsize;
    o->free_files = v.f_files ? (uint64_t)v.f_favail : UINT64_MAX; /* some count none */
}

static int lock(int fd)
{
    struct flock fl = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    return fcntl(fd, F_OFD_SETLK, &fl);
}

static void try_locks(tr_out_facts *o, int fd, const char *name)
{
    const int second = open(name, O_RDWR | O_CLOEXEC);

    if (second >= 0 && lock(fd) == 0)
        o->locks = lock(second) != 0 && (errno == EAGAIN || errno == EACCES);
    if (second >= 0) close(second);
}

static void try_sync(tr_out_facts *o, int fd, const char *name, const char *folder)
{
    static const char line[] = "a line, as of a record\n";
    const int dir = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    const uint64_t begun_ns = tr_now_ns();

    if (write(fd, line, sizeof line - 1) != (ssize_t)sizeof line - 1) {
        fault(o, "cannot write", name);
    } else if (fsync(fd) != 0 || dir < 0 || fsync(dir) != 0) {
        fault(o, "cannot sync", name);
    } else {
        o->syncs = true;
        o->sync_ms = (double)(tr_now_ns() - begun_ns) * 1e-6;
    }
    if (dir >= 0) close(dir);
}

static void try_rename(tr_out_facts *o, const char *name)
{
    char other[NAME_MAX_BYTES + 8];
    struct stat before, after;

    snprintf(other, sizeof other, "%s.new", name);
    const int fd = open(other, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0) {
        fault(o, "cannot make", other);
        return;
    }
    if (fstat(fd, &before) == 0 && rename(other, name) == 0 && stat(name, &after) == 0)
        o->renames = before.st_ino == after.st_ino && access(other, F_OK) != 0;
    else
        fault(o, "cannot rename", other);
    close(fd);
    unlink(other);
}

/* Does somebody hold OUT.run? Asking takes no lock. */
static bool is_taken(const char *path)
{
    char name[NAME_MAX_BYTES];
    struct flock fl = {.l_type = F_WRLCK, .l_whence = SEEK_SET};

    snprintf(name, sizeof name, "%s.run", path);
    const int fd = open(name, O_RDWR | O_CLOEXEC);
    if (fd < 0) return false;
    const bool taken = fcntl(fd, F_OFD_GETLK, &fl) == 0 && fl.l_type != F_UNLCK;
    close(fd);
    return taken;
}

/* Rank 0: everything one process can find out, and the file the others shall append to. */
static void begin(tr_out_facts *o, probe *p, const char *path)
{
    char folder[NAME_MAX_BYTES], line[LINE_BYTES];

    snprintf(o->path, sizeof o->path, "%s", path);
    if (strlen(path) >= sizeof o->path) {
        errno = ENAMETOOLONG;
        fault(o, "cannot use", path);
        return;
    }
    folder_of(path, folder, sizeof folder);
    look_at_system(o, folder);
    o->taken = is_taken(path);
    snprintf(p->name, sizeof p->name, "%s.doctor.%ld", path, (long)getpid());
    int fd = open(p->name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0) {
        fault(o, "cannot make", p->name);
        p->name[0] = '\0';
        return;
    }
    try_locks(o, fd, p->name);
    try_sync(o, fd, p->name, folder);
    try_rename(o, p->name);
    close(fd);
    p->nonce = tr_now_ns() ^ (uint64_t)getpid() << 40;
    const int n = snprintf(line, sizeof line, "%016llx\n", (unsigned long long)p->nonce);
    fd = open(p->name, O_WRONLY | O_TRUNC | O_CLOEXEC);
    if (fd < 0 || write(fd, line, (size_t)n) != n || fsync(fd) != 0)
        fault(o, "cannot write", p->name);
    if (fd >= 0) close(fd);
}

/* A rank's lines: fixed length, so that one that was written over or into shows. */
static int line_of(char *line, uint64_t nonce, int rank, int i)
{
    return snprintf(line, LINE_BYTES, "%016llx %010d %03d abcdefghijklmnopqrst\n",
                    (unsigned long long)nonce, rank, i);
}

/* Every rank: is it the same file, and are lines appended to it? */
static int32_t append(const probe *p, int rank)
{
    char line[LINE_BYTES] = "", want[LINE_BYTES];
    const int fd = open(p->name, O_RDWR | O_APPEND | O_CLOEXEC);

    if (fd < 0) return 0;
    const int n = snprintf(want, sizeof want, "%016llx\n", (unsigned long long)p->nonce);
    bool good = pread(fd, line, (size_t)n, 0) == n && memcmp(line, want, (size_t)n) == 0;
    for (int i = 0; i < TR_PROBE_LINES && good; i++) {
        const int bytes = line_of(line, p->nonce, rank, i);
        good = write(fd, line, (size_t)bytes) == bytes;
    }
    if (good) good = fsync(fd) == 0;
    close(fd);
    return good;
}

static void count_lines(tr_out_facts *o, const probe *p, const tr_world *world)
{
    char line[LINE_BYTES * 4], want[LINE_BYTES];
    FILE *f = fopen(p->name, "re");

    if (!f) return;
    if (!fgets(line, sizeof line, f)) line[0] = '\0'; /* the nonce */
    while (fgets(line, sizeof line, f)) {
        int rank = -1, i = -1;
        o->lines++;
        if (sscanf(line, "%*16x %10d %3d", &rank, &i) != 2 || rank < 0 || rank >= world->size ||
            i < 0 || i >= TR_PROBE_LINES)
            continue;
        line_of(want, p->nonce, rank, i);
        o->whole_lines += strcmp(line, want) == 0;
    }
    fclose(f);
}

tr_status tr_out_probe(tr_out_facts *out, int32_t *sees, const tr_world *world, const char *path,
                       tr_err *err)
{
    probe *p = calloc(1, sizeof *p);
    tr_status st = p ? TR_OK : tr_fail(err, TR_E_MEMORY, "out of memory");

    *out = (tr_out_facts){0};
    *sees = -1;
    st = tr_agree(world, st, err);
    if (st == TR_OK && world->rank == 0 && path) begin(out, p, path);
    if (st == TR_OK) st = tr_world_tell(world, p, (int)sizeof *p, err);
    if (st == TR_OK && p->name[0]) *sees = append(p, world->rank);
    if (st == TR_OK) st = tr_agree(world, TR_OK, err); /* all have written */
    if (st == TR_OK && world->rank == 0 && p->name[0]) count_lines(out, p, world);
    if (world->rank == 0 && p && p->name[0]) unlink(p->name);
    free(p);
    return st;
}
