/* Runs of the trained checkpoint models/tiny on the cases of tests/vectors/tiny, on any device. Whatever cannot be read or run
 * fails the test. */
#ifndef TR_TESTS_TINY_CASES_H
#define TR_TESTS_TINY_CASES_H

#include "fixture.h"

enum {
    TR_TINY_MAX = 4096,  /* tokens of a case */
    TR_TINY_FAR = 7552,  /* of the text that stands before a prompt in runs at 8K context */
    TR_TINY_LONG = 8448, /* of a sequence: that, a prompt and its answer */
    TR_TINY_CHUNK = 200  /* rows of a step */
};

/* Two slots of max_model_len tokens; device NULL: cpu. */
void tr_tiny_open(tr_fixture *f, const char *device, tr_dtype cache, int max_model_len);

/* Numbers of a JSON array, 1 to max; how many. */
int tr_tiny_ids(const json_t *array, int32_t *ids, int max);

/* The n ids of nll.json, again and again. */
void tr_tiny_text(int32_t *ids, int n);

/* Tokens [begin, n) of a prompt in slot 0, `chunk` rows a step, behind those that an earlier call has left there; the first sampled
 * token, with TR_MAX_LOGPROBS alternatives in f->step. */
int32_t tr_tiny_prompt(tr_fixture *f, const int32_t *prompt, int begin, int n, int chunk, int form);

/* Whether the greedy tokens behind a prompt of n tokens, of which `token` is the first, are these. */
bool tr_tiny_goes_on(tr_fixture *f, int n, int32_t token, const int32_t *want, int n_want);

/* The recall and tool cases of generation.json behind `far` tokens of text (0: as they are): each answer is the reference's, whose
 * prompts have no text before them. */
void tr_tiny_answers(tr_fixture *f, int far);

/* Log-probabilities [n - 1] of the tokens that follow ids[0], `chunk` rows a step. */
void tr_tiny_score(const char *device, tr_dtype cache, const int32_t *ids, int n, int chunk,
                   int form, float *logprob);

/* Mean negative log-likelihood. */
double tr_tiny_nll(const float *logprob, int n);

#endif
