/* What the exporters share: files, folders, quoting. */
#include <config.h>

#include "profile/export.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>

void tr_export_quote(FILE *out, const char *text)
{
    fputc('"', out);
    for (const unsigned char *p = (const unsigned char *)text; *p; p++) {
        if (*p == '"' || *p == '\\')
            fprintf(out, "\\%c", *p);
        else if (*p < 0x20)
            fprintf(out, "\\u%04x", *p);
        else
            fputc(*p, out);
    }
    fputc('"', out);
}

tr_status tr_export_folder(const char *folder, tr_err *err)
{
    struct stat sb;
    if (mkdir(folder, 0777) == 0) return TR_OK;
    if (errno == EEXIST && stat(folder, &sb) == 0 && S_ISDIR(sb.st_mode)) return TR_OK;
    return tr_fail(err, TR_E_IO, "%s: cannot make a folder: %s", folder, strerror(errno));
}

tr_status tr_export_open(FILE **out, const char *folder, const char *name, tr_err *err)
{
    char path[4096];
    *out = NULL;
    if (snprintf(path, sizeof path, "%s/%s", folder, name) >= (int)sizeof path)
        return tr_fail(err, TR_E_USAGE, "%s: too long a name", folder);
    *out = fopen(path, "we");
    return *out ? TR_OK : tr_fail(err, TR_E_IO, "%s: %s", path, strerror(errno));
}

tr_status tr_export_close(FILE *out, const char *folder, const char *name, tr_err *err)
{
    const bool failed = ferror(out) != 0;
    if (fclose(out) == 0 && !failed) return TR_OK;
    return tr_fail(err, TR_E_IO, "%s/%s: %s", folder, name, strerror(errno ? errno : EIO));
}
