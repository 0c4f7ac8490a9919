/* What makes a dataset readable without us: attributes, labels and scales; and HDF5's errors in our words. */
#include <config.h>

#include "profile/h5_priv.h"

#include <stdio.h>
#include <string.h>

#include <hdf5_hl.h>

typedef struct innermost {
    char text[256];
} innermost;

static herr_t keep_message(unsigned n, const H5E_error2_t *e, void *ctx)
{
    innermost *in = ctx;
    if (n == 0 && e->desc) snprintf(in->text, sizeof in->text, "%s", e->desc);
    return 0;
}

tr_status tr_h5_failed(const char *call, tr_err *err)
{
    innermost in = {.text = "no message"};

    H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, keep_message, &in);
    H5Eclear2(H5E_DEFAULT);
    return tr_fail(err, TR_E_IO, "%.*s: %s", (int)strcspn(call, "("), call, in.text);
}

void tr_h5_quiet(void)
{
    H5dont_atexit(); /* too late where HDF5 was used before: then it stays as it is */
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
}

hid_t tr_h5_link_list(void)
{
    hid_t list = H5Pcreate(H5P_LINK_CREATE);
    if (list >= 0) H5Pset_create_intermediate_group(list, 1);
    return list;
}

static tr_status set_attribute(hid_t object, const char *name, hid_t type, hid_t space,
                               const void *value, tr_err *err)
{
    tr_status st = TR_OK;
    hid_t attribute = -1;

    if (H5Aexists(object, name) > 0) TR_H5(H5Adelete(object, name));
    TR_H5(attribute = H5Acreate2(object, name, type, space, H5P_DEFAULT, H5P_DEFAULT));
    TR_H5(H5Awrite(attribute, type, value));

done:
    if (attribute >= 0) H5Aclose(attribute);
    return st;
}

static hid_t string_type(void)
{
    const tr_field f = {.kind = TR_FIELD_TEXT};
    return tr_schema_field_type(&f, true);
}

tr_status tr_h5_text(hid_t object, const char *name, const char *value, tr_err *err)
{
    tr_status st = TR_OK;
    hid_t type = string_type(), space = H5Screate(H5S_SCALAR);

    TR_H5(type);
    TR_H5(space);
    st = set_attribute(object, name, type, space, &value, err);

done:
    if (space >= 0) H5Sclose(space);
    if (type >= 0) H5Tclose(type);
    return st;
}

tr_status tr_h5_number(hid_t object, const char *name, int64_t value, tr_err *err)
{
    tr_status st = TR_OK;
    hid_t space = H5Screate(H5S_SCALAR);

    TR_H5(space);
    st = set_attribute(object, name, H5T_NATIVE_INT64, space, &value, err);

done:
    if (space >= 0) H5Sclose(space);
    return st;
}

/* field_units: one string for each field of a record. */
static tr_status field_units(hid_t dataset, const tr_record_type *r, tr_err *err)
{
    enum { FIELDS_MAX = 32 };
    const char *units[FIELDS_MAX];
    tr_status st = TR_OK;
    const hsize_t n = (hsize_t)r->n_fields;
    hid_t type = string_type(), space = -1;

    for (int i = 0; i < r->n_fields && i < FIELDS_MAX; i++)
        units[i] = r->field[i].units;
    TR_H5(type);
    TR_H5(space = H5Screate_simple(1, &n, NULL));
    st = set_attribute(dataset, "field_units", type, space, units, err);

done:
    if (space >= 0) H5Sclose(space);
    if (type >= 0) H5Tclose(type);
    return st;
}

static tr_status attach_scale(hid_t file, hid_t dataset, int i, const char *axis, tr_err *err)
{
    tr_status st = TR_OK;
    char path[64];
    hid_t scale = -1;

    snprintf(path, sizeof path, "/scales/%s", axis);
    if (H5Lexists(file, "/scales", H5P_DEFAULT) <= 0 || H5Lexists(file, path, H5P_DEFAULT) <= 0)
        return TR_OK;
    TR_H5(scale = H5Dopen2(file, path, H5P_DEFAULT));
    TR_H5(H5DSattach_scale(dataset, scale, (unsigned)i));

done:
    if (scale >= 0) H5Dclose(scale);
    return st;
}

tr_status tr_h5_dress(hid_t file, hid_t dataset, const tr_dataset *d, tr_err *err)
{
    tr_status st = tr_h5_text(dataset, "long_name", d->long_name, err);

    if (st == TR_OK && d->record)
        st = field_units(dataset, d->record, err);
    else if (st == TR_OK)
        st = tr_h5_text(dataset, "units", d->units, err);
    for (int i = 0; i < tr_dataset_axes(d) && st == TR_OK; i++) {
        const char *axis = tr_axis_name(d->axis[i]);
        TR_H5(H5DSset_label(dataset, (unsigned)i, axis));
        st = attach_scale(file, dataset, i, axis, err);
    }

done:
    return st;
}
