/* src/profile/schema.c: its tables agree with the structs, with themselves and with the names used elsewhere. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "mpi/comm.h"
#include "profile/schema.h"

/* Every byte of a struct belongs to one field or is a gap shorter than the alignment of the next field. */
static void fields_cover_their_struct(void **state)
{
    (void)state;
    for (int i = 0; i < TR_N_DATASETS; i++) {
        const tr_record_type *r = tr_datasets[i].record;
        size_t at = 0;
        if (!r) continue;
        for (int k = 0; k < r->n_fields; k++) {
            const tr_field *f = &r->field[k];
            assert_true(f->offset >= at && f->offset - at < 8);
            assert_true(f->kind != TR_FIELD_ENUM || f->names);
            assert_non_null(f->units);
            assert_non_null(f->long_name);
            at = f->offset + f->bytes;
        }
        assert_true(r->bytes >= at && r->bytes - at < 8);
    }
}

static void types_have_the_structs_sizes(void **state)
{
    (void)state;
    for (int i = 0; i < TR_N_DATASETS; i++) {
        const tr_dataset *d = &tr_datasets[i];
        hid_t memory = tr_schema_memory_type(d), file = tr_schema_file_type(d);
        assert_true(memory >= 0 && file >= 0);
        if (d->record) {
            size_t packed = 0;
            for (int k = 0; k < d->record->n_fields; k++)
                packed += d->record->field[k].bytes;
            assert_int_equal(H5Tget_size(memory), d->record->bytes);
            assert_int_equal(H5Tget_size(file), packed);
        }
        H5Tclose(memory);
        H5Tclose(file);
    }
}

static void paths_are_found(void **state)
{
    int phase = 7;
    char path[80];

    (void)state;
    for (int i = 0; i < TR_N_DATASETS; i++) {
        const tr_dataset *d = &tr_datasets[i];
        if (strchr(d->path, '*')) continue;
        if (!(d->flags & TR_DATASET_NAMED)) assert_ptr_equal(tr_dataset_find(d->path, &phase), d);
        if (d->flags & TR_DATASET_NAMED) assert_null(tr_dataset_find(d->path, &phase));
        assert_int_equal(phase, -1);
        if (!(d->flags & TR_DATASET_PHASES)) continue;
        tr_dataset_phase_path(path, sizeof path, d, TR_PHASE_DECODE);
        assert_ptr_equal(tr_dataset_find(path, &phase), d);
        assert_int_equal(phase, TR_PHASE_DECODE);
    }
    assert_ptr_equal(tr_dataset_find("/trace/main", NULL), &tr_datasets[TR_D_TRACE]);
    assert_ptr_equal(tr_dataset_find("/comm/matrix/MOE", NULL), &tr_datasets[TR_D_COMM_MATRIX]);
    assert_ptr_equal(tr_dataset_find("/counters/papi/perf::TASK-CLOCK", NULL),
                     &tr_datasets[TR_D_COUNTER]);
    assert_ptr_equal(tr_dataset_find("/counters/papi/time", NULL), &tr_datasets[TR_D_COUNTER_TIME]);
    assert_ptr_equal(tr_dataset_find("/phase/idle/counters/papi/PAPI_TOT_CYC", &phase),
                     &tr_datasets[TR_D_PHASE_COUNTER]);
    assert_int_equal(phase, TR_PHASE_IDLE);
    const char *const foreign[] = {"",        "/", "/steps2",       "/phase/decode",
                                   "/trace/", "x", "/phase/x/count"};
    for (size_t i = 0; i < sizeof foreign / sizeof *foreign; i++)
        assert_null(tr_dataset_find(foreign[i], &phase));
}

static void numbers_have_the_names_used_elsewhere(void **state)
{
    (void)state;
    assert_int_equal(tr_comm_op_names.n, TR_COMM_N_OPS);
    for (int i = 0; i < TR_COMM_N_OPS; i++)
        assert_string_equal(tr_comm_op_names.name[i], tr_comm_op_name((tr_comm_op)i));
    assert_int_equal(tr_kind_names.n, TR_N_KINDS);
    assert_int_equal(tr_phase_names.n, TR_N_PHASES);
    assert_string_equal(tr_axis_name(TR_AXIS_PAIR), "pair");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(fields_cover_their_struct),
        cmocka_unit_test(types_have_the_structs_sizes),
        cmocka_unit_test(paths_are_found),
        cmocka_unit_test(numbers_have_the_names_used_elsewhere),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
