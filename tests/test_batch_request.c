/* Lines of a batch into requests, refusals and invalid lines: every parameter's bounds, types
 * and rules. */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/hash.h"
#include "batch/request.h"
#include "tests/vectors.h"

enum { VOCAB = 2048, CONTEXT = 600 };

static tr_tokenizer *tokenizer; /* loaded once; immutable */

static tr_request_options options(void)
{
    return (tr_request_options){
        .tokenizer = tokenizer,
        .chat = {.format = TR_CHAT_DSV32},
        .vocab_size = VOCAB,
        .max_model_len = CONTEXT,
        .bos = 2025,
        .seed = 7,
        .defaults = {.temperature = 1, .top_p = 0.95, .min_p = 0, .repetition = 1, .top_k = 0},
    };
}

/* ' stands for " in the tables. */
static char *quoted(const char *form, const char *text)
{
    static const char *const chat =
        "{'custom_id':'a','method':'POST','url':'/v1/chat/completions','body':{"
        "'messages':[{'role':'user','content':'Hi'}]%s}}";
    static const char *const tokens =
        "{'custom_id':'a','method':'POST','url':'/v1/completions','body':{'prompt':[1,2,3]%s}}";
    static const char *const body =
        "{'custom_id':'a','method':'POST','url':'/v1/completions','body':{%s}}";
    static const char *const cbody =
        "{'custom_id':'a','method':'POST','url':'/v1/chat/completions','body':{%s}}";
    const char *f = form[0] == 'c'   ? chat
                    : form[0] == 't' ? tokens
                    : form[0] == 'b' ? body
                    : form[0] == 'm' ? cbody
                                     : "%s";
    size_t cut = strcspn(f, "%"), n = strlen(f) + strlen(text);
    char *out = malloc(n + 1);
    assert_non_null(out);
    snprintf(out, n + 1, "%.*s%s%s", (int)cut, f, text, f + cut + 2);
    for (char *p = out; *p; p++)
        if (*p == '\'') *p = '"';
    return out;
}

static void parse_bytes(const tr_request_options *o, const char *line, size_t n, tr_parsed *out,
                        tr_envelope *e)
{
    tr_parser *p = NULL;
    tr_err err;
    const tr_line l = {.number = 9, .text = line, .n = n, .bytes = n, .whole = true};
    assert_int_equal(tr_parser_create(&p, o, &err), TR_OK);
    assert_int_equal(tr_envelope_read(e, &l, &err), TR_OK);
    assert_int_equal(tr_parser_line(p, e, out, &err), TR_OK);
    tr_parser_free(p);
}

static tr_request *accepted(const tr_request_options *o, const char *form, const char *text)
{
    tr_envelope e = {0};
    tr_parsed parsed;
    char *line = quoted(form, text);
    parse_bytes(o, line, strlen(line), &parsed, &e);
    if (parsed.kind != TR_PARSED_REQUEST)
        fail_msg("%s: %s %s", line, parsed.refusal.code ? parsed.refusal.code : e.fault,
                 parsed.refusal.message);
    free(line);
    tr_envelope_free(&e);
    return parsed.request;
}

typedef struct row {
    const char *
        form; /* c: chat with members added, t: token prompt likewise, b, m: a body, l: the whole line */
    const char *text;
    const char *code;  /* NULL: accepted; "invalid_line" */
    const char *param; /* NULL: none is set */
    int number;        /* status of a refusal, 0: 400; column of an invalid line */
} row;

/* clang-format off */
static const row rows[] = {
    /* the line */
    {"l", "{}", "invalid_line", NULL, 1},
    {"l", "[]", "invalid_line", NULL, 1},
    {"l", "17", "invalid_line", NULL, 1},
    {"l", "'text'", "invalid_line", NULL, 1},
    {"l", "null", "invalid_line", NULL, 1},
    {"l", "not json", "invalid_line", NULL, 2},
    {"l", "{", "invalid_line", NULL, 2},
    {"l", "{'custom_id':'a'", "invalid_line", NULL, 17},
    {"l", "{'custom_id':'a'}x", "invalid_line", NULL, 18},
    {"l", "{'custom_id':'a',}", "invalid_line", NULL, 18},
    {"l", "{'custom_id' 'a'}", "invalid_line", NULL, 14},
    {"l", "{'custom_id':01}", "invalid_line", NULL, 15},
    {"l", "{'custom_id':NaN}", "invalid_line", NULL, 14},
    {"l", "{'custom_id':'\\x'}", "invalid_line", NULL, 16},
    {"l", "{'custom_id':'a\tb'}", "invalid_line", NULL, 16},
    {"l", "{custom_id:1}", "invalid_line", NULL, 2},
    {"l", "{'custom_id':7}", "invalid_line", NULL, 14},
    {"l", "{'custom_id':null}", "invalid_line", NULL, 14},
    {"l", "{'custom_id':''}", "invalid_line", NULL, 14},
    {"l", "{'custom_id':['a']}", "invalid_line", NULL, 14},
    {"l", "{'custom_id':'a','custom_id':'b'}", "invalid_line", NULL, 18},
    {"l", " {'method':'POST'}", "invalid_line", NULL, 2},
    {"l", "{'custom_id':'a'}", "missing_field", "method", 0},
    {"l", "{'custom_id':'a','method':null}", "missing_field", "method", 0},
    {"l", "{'custom_id':'a','method':1}", "invalid_type", "method", 0},
    {"l", "{'custom_id':'a','method':'GET'}", "invalid_method", "method", 405},
    {"l", "{'custom_id':'a','method':'post'}", "invalid_method", "method", 405},
    {"l", "{'custom_id':'a','method':'POST'}", "missing_field", "url", 0},
    {"l", "{'custom_id':'a','method':'POST','url':3}", "invalid_type", "url", 0},
    {"l", "{'custom_id':'a','method':'POST','url':'/v1/embeddings'}", "unknown_url", "url", 404},
    {"l", "{'custom_id':'a','method':'POST','url':''}", "unknown_url", "url", 404},
    {"l", "{'custom_id':'a','method':'POST','url':'/v1/completions'}", "missing_field", "body", 0},
    {"l", "{'custom_id':'a','method':'POST','url':'/v1/completions','body':null}", "missing_field", "body", 0},
    {"l", "{'custom_id':'a','method':'POST','url':'/v1/completions','body':[]}", "invalid_type", "body", 0},
    {"l", "{'custom_id':'a','method':'POST','url':'\\/v1/completions','body':{'prompt':[1]}}", NULL, NULL, 0},
    {"l", "  {'body':{'prompt':'x'},'url':'/v1/completions','method':'POST','custom_id':'a'}  ", NULL, NULL, 0},
    {"l", "{'custom_id':'\\ud800','method':'POST','url':'/v1/completions','body':{'prompt':'\\udc00 \\ud83d\\ude00'}}", NULL, NULL, 0},
    {"l", "{'custom_id':'a\\u0000b','method':'POST','url':'/v1/completions','body':{'prompt':'a\\u0000b'}}", NULL, NULL, 0},
    /* the body as JSON */
    {"t", ",'temperature':1,'temperature':0.5", "invalid_json", NULL, 0},
    /* numbers beyond what jansson holds are named like any other that is out of range */
    {"t", ",'seed':9223372036854775808", "out_of_range", "seed", 0},
    {"t", ",'max_tokens':100000000000000000000000", "out_of_range", "max_tokens", 0},
    {"c", ",'seed':-9223372036854775809", "out_of_range", "seed", 0},
    {"t", ",'top_p':1e999", "out_of_range", "top_p", 0},
    {"b", "'prompt':[1,100000000000000000000]", "invalid_json", "prompt", 0},
    {"t", ",'logit_bias':{'5':1e999}", "invalid_json", "logit_bias", 0},
    {"t", ",'user':'a','user':1e999", "out_of_range", "user", 0},
    {"t", ",'metadata':{'x':123456789012345678901234567890,'x':1}", NULL, NULL, 0},
    {"t", ",'unknown':{'x':123456789012345678901234567890,'x':1}", NULL, NULL, 0},
    /* prompts */
    {"b", "", "missing_field", "prompt", 0},
    {"b", "'prompt':null", "missing_field", "prompt", 0},
    {"b", "'prompt':''", "empty_prompt", "prompt", 0},
    {"b", "'prompt':[]", "empty_prompt", "prompt", 0},
    {"b", "'prompt':7", "invalid_type", "prompt", 0},
    {"b", "'prompt':{}", "invalid_type", "prompt", 0},
    {"b", "'prompt':['a','b']", "unsupported_prompt", "prompt", 0},
    {"b", "'prompt':[[1,2]]", "unsupported_prompt", "prompt", 0},
    {"b", "'prompt':[1,'a']", "unsupported_prompt", "prompt", 0},
    {"b", "'prompt':[1,2.0]", "invalid_type", "prompt[1]", 0},
    {"b", "'prompt':[1,true]", "invalid_type", "prompt[1]", 0},
    {"b", "'prompt':[1,-1]", "unknown_token", "prompt[1]", 0},
    {"b", "'prompt':[2048]", "unknown_token", "prompt[0]", 0},
    {"b", "'prompt':[0,2047]", NULL, NULL, 0},
    {"b", "'prompt':'Hello'", NULL, NULL, 0},
    {"m", "", "missing_field", "messages", 0},
    {"m", "'messages':null", "missing_field", "messages", 0},
    {"m", "'messages':'Hi'", "invalid_type", "messages", 0},
    {"m", "'messages':[]", "empty_messages", "messages", 0},
    {"m", "'messages':[{'role':'robot','content':'x'}]", "unknown_role", "messages[0].role", 0},
    {"m", "'messages':[{'role':'user','content':null}]", "missing_content", "messages[0].content", 0},
    {"m", "'messages':[{'role':'user','content':[{'type':'image_url'}]}]", "unsupported_content_part", "messages[0].content[0]", 0},
    {"m", "'messages':[{'role':'user','content':3}]", "invalid_content", "messages[0].content", 0},
    {"m", "'messages':[{'role':'system','content':'x'}]", "no_user_message", "messages", 0},
    {"m", "'messages':[{'role':'user','content':'x'},{'role':'assistant','content':'y'}]", "last_message_is_assistant", "messages[1]", 0},
    {"m", "'messages':[{'role':'user','content':'x'},{'role':'assistant','content':'y'}],'continue_final_message':true", NULL, NULL, 0},
    {"m", "'messages':[{'role':'user','content':'x'}],'continue_final_message':true", "nothing_to_continue", "continue_final_message", 0},
    /* temperature, top_p, top_k, min_p */
    {"t", ",'temperature':0", NULL, NULL, 0},
    {"t", ",'temperature':2", NULL, NULL, 0},
    {"t", ",'temperature':2.0", NULL, NULL, 0},
    {"t", ",'temperature':null", NULL, NULL, 0},
    {"t", ",'temperature':-0.1", "out_of_range", "temperature", 0},
    {"t", ",'temperature':2.01", "out_of_range", "temperature", 0},
    {"t", ",'temperature':'1'", "invalid_type", "temperature", 0},
    {"t", ",'temperature':true", "invalid_type", "temperature", 0},
    {"t", ",'temperature':[1]", "invalid_type", "temperature", 0},
    {"t", ",'top_p':0", "out_of_range", "top_p", 0},
    {"t", ",'top_p':1e-300", "out_of_range", "top_p", 0},
    {"t", ",'top_p':1e-9", NULL, NULL, 0},
    {"t", ",'top_p':1", NULL, NULL, 0},
    {"t", ",'top_p':1.001", "out_of_range", "top_p", 0},
    {"t", ",'top_p':{}", "invalid_type", "top_p", 0},
    {"t", ",'top_k':-1", NULL, NULL, 0},
    {"t", ",'top_k':0", NULL, NULL, 0},
    {"t", ",'top_k':2147483647", NULL, NULL, 0},
    {"t", ",'top_k':2147483648", "out_of_range", "top_k", 0},
    {"t", ",'top_k':-2", "out_of_range", "top_k", 0},
    {"t", ",'top_k':1.0", "invalid_type", "top_k", 0},
    {"t", ",'top_k':1e3", "invalid_type", "top_k", 0},
    {"t", ",'min_p':0", NULL, NULL, 0},
    {"t", ",'min_p':1", NULL, NULL, 0},
    {"t", ",'min_p':-0.001", "out_of_range", "min_p", 0},
    {"t", ",'min_p':1.1", "out_of_range", "min_p", 0},
    /* seed */
    {"t", ",'seed':0", NULL, NULL, 0},
    {"t", ",'seed':-9223372036854775808", NULL, NULL, 0},
    {"t", ",'seed':9223372036854775807", NULL, NULL, 0},
    {"t", ",'seed':1.5", "invalid_type", "seed", 0},
    {"t", ",'seed':'7'", "invalid_type", "seed", 0},
    /* stop */
    {"t", ",'stop':'x'", NULL, NULL, 0},
    {"t", ",'stop':[]", NULL, NULL, 0},
    {"t", ",'stop':null", NULL, NULL, 0},
    {"t", ",'stop':''", "invalid_value", "stop", 0},
    {"t", ",'stop':['a','']", "invalid_value", "stop[1]", 0},
    {"t", ",'stop':['a',3]", "invalid_type", "stop[1]", 0},
    {"t", ",'stop':3", "invalid_type", "stop", 0},
    {"t", ",'stop':['1','2','3','4','5','6','7','8','9','a','b','c','d','e','f','g']", NULL, NULL, 0},
    {"t", ",'stop':['1','2','3','4','5','6','7','8','9','a','b','c','d','e','f','g','h']", "out_of_range", "stop", 0},
    {"t", ",'stop_token_ids':[0,2047]", NULL, NULL, 0},
    {"t", ",'stop_token_ids':[2048]", "unknown_token", "stop_token_ids[0]", 0},
    {"t", ",'stop_token_ids':[-1]", "unknown_token", "stop_token_ids[0]", 0},
    {"t", ",'stop_token_ids':['a']", "invalid_type", "stop_token_ids[0]", 0},
    {"t", ",'stop_token_ids':5", "invalid_type", "stop_token_ids", 0},
    /* lengths: the context is 600, the prompt 3 */
    {"t", ",'max_tokens':1", NULL, NULL, 0},
    {"t", ",'max_tokens':597", NULL, NULL, 0},
    {"t", ",'max_tokens':598", "context_length_exceeded", "max_tokens", 0},
    {"t", ",'max_tokens':2147483647", "context_length_exceeded", "max_tokens", 0},
    {"t", ",'max_tokens':2147483648", "out_of_range", "max_tokens", 0},
    {"t", ",'max_tokens':0", "out_of_range", "max_tokens", 0},
    {"t", ",'max_tokens':-1", "out_of_range", "max_tokens", 0},
    {"t", ",'max_tokens':'5'", "invalid_type", "max_tokens", 0},
    {"t", ",'max_tokens':5.0", "invalid_type", "max_tokens", 0},
    {"t", ",'max_completion_tokens':0", "out_of_range", "max_completion_tokens", 0},
    {"t", ",'max_completion_tokens':598", "context_length_exceeded", "max_completion_tokens", 0},
    {"t", ",'max_tokens':598,'max_completion_tokens':5", NULL, NULL, 0},
    {"t", ",'min_tokens':0", NULL, NULL, 0},
    {"t", ",'min_tokens':5,'max_tokens':5", NULL, NULL, 0},
    {"t", ",'min_tokens':6,'max_tokens':5", "out_of_range", "min_tokens", 0},
    {"t", ",'min_tokens':-1", "out_of_range", "min_tokens", 0},
    {"t", ",'min_tokens':598", "context_length_exceeded", "min_tokens", 0},
    {"t", ",'echo':true,'max_tokens':0", NULL, NULL, 0},
    {"t", ",'echo':true,'max_tokens':0,'logprobs':5", NULL, NULL, 0},
    {"t", ",'echo':true,'max_tokens':0,'n':2", "invalid_value", "n", 0},
    {"c", ",'max_tokens':0", "out_of_range", "max_tokens", 0},
    /* n */
    {"t", ",'n':1", NULL, NULL, 0},
    {"t", ",'n':128", NULL, NULL, 0},
    {"t", ",'n':129", "out_of_range", "n", 0},
    {"t", ",'n':0", "out_of_range", "n", 0},
    {"t", ",'n':-3", "out_of_range", "n", 0},
    {"t", ",'n':2,'temperature':0", "invalid_value", "n", 0},
    {"t", ",'temperature':0.000001,'n':2", "invalid_value", "n", 0},
    {"t", ",'n':1,'temperature':0", NULL, NULL, 0},
    {"t", ",'best_of':1", NULL, NULL, 0},
    {"t", ",'best_of':2", "unsupported_parameter", "best_of", 0},
    {"t", ",'best_of':0", "out_of_range", "best_of", 0},
    {"t", ",'suffix':''", NULL, NULL, 0},
    {"t", ",'suffix':'x'", "unsupported_parameter", "suffix", 0},
    {"t", ",'suffix':5", "invalid_type", "suffix", 0},
    /* log-probabilities */
    {"t", ",'logprobs':0", NULL, NULL, 0},
    {"t", ",'logprobs':20", NULL, NULL, 0},
    {"t", ",'logprobs':21", "out_of_range", "logprobs", 0},
    {"t", ",'logprobs':true", "invalid_type", "logprobs", 0},
    {"c", ",'logprobs':true", NULL, NULL, 0},
    {"c", ",'logprobs':1", "invalid_type", "logprobs", 0},
    {"c", ",'logprobs':true,'top_logprobs':20", NULL, NULL, 0},
    {"c", ",'logprobs':true,'top_logprobs':21", "out_of_range", "top_logprobs", 0},
    {"c", ",'logprobs':true,'top_logprobs':-1", "out_of_range", "top_logprobs", 0},
    {"c", ",'top_logprobs':2", "invalid_value", "top_logprobs", 0},
    {"c", ",'logprobs':false,'top_logprobs':0", "invalid_value", "top_logprobs", 0},
    {"t", ",'prompt_logprobs':0", NULL, NULL, 0},
    {"t", ",'prompt_logprobs':20", NULL, NULL, 0},
    {"t", ",'prompt_logprobs':21", "out_of_range", "prompt_logprobs", 0},
    {"t", ",'prompt_logprobs':-1", "out_of_range", "prompt_logprobs", 0},
    {"t", ",'return_token_ids':true", NULL, NULL, 0},
    {"t", ",'return_token_ids':1", "invalid_type", "return_token_ids", 0},
    /* biases and penalties */
    {"t", ",'logit_bias':{}", NULL, NULL, 0},
    {"t", ",'logit_bias':{'5':-100,'6':100}", NULL, NULL, 0},
    {"t", ",'logit_bias':{'5':-100.5}", "out_of_range", "logit_bias.5", 0},
    {"t", ",'logit_bias':{'5':'1'}", "invalid_type", "logit_bias.5", 0},
    {"t", ",'logit_bias':{'05':1}", "unknown_token", "logit_bias.05", 0},
    {"t", ",'logit_bias':{'x':1}", "unknown_token", "logit_bias.x", 0},
    {"t", ",'logit_bias':{'2048':1}", "unknown_token", "logit_bias.2048", 0},
    {"t", ",'logit_bias':{'-1':1}", "unknown_token", "logit_bias.-1", 0},
    {"t", ",'logit_bias':{'99999999999999':1}", "unknown_token", "logit_bias.99999999999999", 0},
    {"t", ",'logit_bias':{'5':1,'5':2}", "invalid_json", "logit_bias", 0},
    {"t", ",'logit_bias':[1]", "invalid_type", "logit_bias", 0},
    {"t", ",'presence_penalty':2,'frequency_penalty':-2", NULL, NULL, 0},
    {"t", ",'presence_penalty':2.1", "out_of_range", "presence_penalty", 0},
    {"t", ",'presence_penalty':'a'", "invalid_type", "presence_penalty", 0},
    {"t", ",'frequency_penalty':-2.1", "out_of_range", "frequency_penalty", 0},
    {"t", ",'repetition_penalty':2", NULL, NULL, 0},
    {"t", ",'repetition_penalty':0", "out_of_range", "repetition_penalty", 0},
    {"t", ",'repetition_penalty':2.5", "out_of_range", "repetition_penalty", 0},
    /* formats and tools */
    {"c", ",'response_format':{'type':'text'}", NULL, NULL, 0},
    {"c", ",'response_format':null", NULL, NULL, 0},
    {"c", ",'response_format':{'type':'json_object'}", "unsupported_response_format", "response_format", 0},
    {"c", ",'response_format':{'type':'json_schema','json_schema':{'schema':{}}}", "unsupported_response_format", "response_format", 0},
    {"c", ",'response_format':{'type':'json_schema'}", "missing_field", "response_format.json_schema.schema", 0},
    {"c", ",'response_format':{'type':'json_schema','json_schema':{}}", "missing_field", "response_format.json_schema.schema", 0},
    {"c", ",'response_format':{'type':'xml'}", "invalid_value", "response_format.type", 0},
    {"c", ",'response_format':{}", "invalid_value", "response_format.type", 0},
    {"c", ",'response_format':'text'", "invalid_type", "response_format", 0},
    {"t", ",'response_format':{'type':'json_object'}", "unsupported_response_format", "response_format", 0},
    {"c", ",'tools':null", NULL, NULL, 0},
    {"c", ",'tools':[]", NULL, NULL, 0},
    {"c", ",'tools':[{'type':'function','function':{'name':'f','parameters':{'type':'object','maximum':123456789012345678901234567890}}}]", NULL, NULL, 0},
    {"c", ",'tools':{}", "invalid_type", "tools", 0},
    {"c", ",'tools':[3]", "invalid_type", "tools[0]", 0},
    {"c", ",'tools':[{'type':'retrieval'}]", "invalid_value", "tools[0].type", 0},
    {"c", ",'tools':[{'type':'function'}]", "invalid_type", "tools[0].function", 0},
    {"c", ",'tools':[{'type':'function','function':{}}]", "invalid_type", "tools[0].function.name", 0},
    {"c", ",'tools':[{'type':'function','function':{'name':''}}]", "invalid_tool_name", "tools[0].function.name", 0},
    {"c", ",'tools':[{'type':'function','function':{'name':'a b'}}]", "invalid_tool_name", "tools[0].function.name", 0},
    {"c", ",'tools':[{'type':'function','function':{'name':'f'}},{'type':'function','function':{'name':'f'}}]", "duplicate_tool_name", "tools[1].function.name", 0},
    {"c", ",'tools':[{'type':'function','function':{'name':'f'}}],'tool_choice':'auto'", NULL, NULL, 0},
    {"c", ",'tool_choice':'none'", NULL, NULL, 0},
    {"c", ",'tool_choice':'\\u0061uto'", NULL, NULL, 0},
    {"c", ",'tool_choice':'required'", "unsupported_response_format", "tool_choice", 0},
    {"c", ",'tool_choice':{'type':'function','function':{'name':'f'}}", "unsupported_response_format", "tool_choice", 0},
    {"c", ",'tool_choice':'maybe'", "invalid_value", "tool_choice", 0},
    {"c", ",'tool_choice':{}", "invalid_value", "tool_choice", 0},
    {"c", ",'parallel_tool_calls':false", NULL, NULL, 0},
    {"c", ",'parallel_tool_calls':0", "invalid_type", "parallel_tool_calls", 0},
    /* the rest */
    {"c", ",'stream':false", NULL, NULL, 0},
    {"c", ",'stream':true", "unsupported_parameter", "stream", 0},
    {"c", ",'stream':'no'", "invalid_type", "stream", 0},
    {"c", ",'stream_options':{'include_usage':true}", NULL, NULL, 0},
    {"c", ",'stream_options':{'include_usage':1}", "invalid_type", "stream_options.include_usage", 0},
    {"c", ",'stream_options':[]", "invalid_type", "stream_options", 0},
    {"c", ",'ignore_eos':true,'add_special_tokens':false,'include_stop_str_in_output':true,'skip_special_tokens':true", NULL, NULL, 0},
    {"c", ",'ignore_eos':0", "invalid_type", "ignore_eos", 0},
    {"c", ",'model':'gpt-4','user':'u','metadata':{},'store':true,'service_tier':'auto','reasoning_effort':'high'", NULL, NULL, 0},
    {"c", ",'model':4", "invalid_type", "model", 0},
    {"c", ",'user':4", "invalid_type", "user", 0},
    {"c", ",'reasoning_effort':4", "invalid_type", "reasoning_effort", 0},
    {"c", ",'chat_template_kwargs':{'thinking':true}", NULL, NULL, 0},
    {"c", ",'chat_template_kwargs':{'thinking':1}", "invalid_type", "chat_template_kwargs.thinking", 0},
    {"c", ",'chat_template_kwargs':[]", "invalid_type", "chat_template_kwargs", 0},
    {"c", ",'thinking':{'type':'disabled'}", NULL, NULL, 0},
    {"c", ",'thinking':true", "invalid_type", "thinking", 0},
    {"c", ",'guided_json':{}", "unsupported_parameter", "guided_json", 0},
    {"t", ",'guided_regex':'a*'", "unsupported_parameter", "guided_regex", 0},
    {"t", ",'guided_regex':null", NULL, NULL, 0},
    {"c", ",'functions':[]", "unsupported_parameter", "functions", 0},
    {"t", ",'truncate_prompt_tokens':5", "unsupported_parameter", "truncate_prompt_tokens", 0},
    {"c", ",'no_such_thing':1", NULL, NULL, 0},
    {"c", ",'echo':true", NULL, NULL, 0}, /* unknown in chat */
};
/* clang-format on */

static void test_table(void **state)
{
    const tr_request_options o = options();
    (void)state;
    assert_true(sizeof rows / sizeof *rows >= 150);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const row *r = &rows[i];
        tr_envelope e = {0};
        tr_parsed p;
        char *line = quoted(r->form, r->text);
        parse_bytes(&o, line, strlen(line), &p, &e);
        if (!r->code) {
            if (p.kind != TR_PARSED_REQUEST)
                fail_msg("%s: refused: %s %s", line, p.refusal.code, p.refusal.message);
        } else if (!strcmp(r->code, "invalid_line")) {
            if (p.kind != TR_PARSED_INVALID || (int)p.column != r->number)
                fail_msg("%s: kind %d, column %zu (%s)", line, p.kind, p.column, e.fault);
            assert_true(e.fault[0] != 0);
        } else {
            const char *param = r->param ? r->param : "";
            if (p.kind != TR_PARSED_REFUSED || strcmp(p.refusal.code, r->code) ||
                strcmp(p.refusal.param, param) ||
                p.refusal.status != (r->number ? r->number : 400) || !p.refusal.message[0])
                fail_msg("%s: kind %d: %d %s, param \"%s\": %s", line, p.kind, p.refusal.status,
                         p.refusal.code ? p.refusal.code : "-", p.refusal.param, p.refusal.message);
        }
        free(line);
        tr_request_free(p.request);
        tr_envelope_free(&e);
    }
}

static void test_values(void **state)
{
    tr_request_options o = options();
    (void)state;
    o.extra_eos[0] = 11;
    o.n_extra_eos = 1;
    tr_request *r = accepted(
        &o, "t",
        ",'temperature':0.25,'top_p':0.5,'top_k':9,'min_p':0.125,'seed':-1,'stop':['ab','c\\n'],"
        "'stop_token_ids':[4],'max_tokens':20,'min_tokens':2,'n':3,'logprobs':4,'prompt_logprobs':"
        "2,"
        "'logit_bias':{'9':1,'3':-2.5,'100':0},'presence_penalty':1,'frequency_penalty':-1,"
        "'repetition_penalty':1.5,'include_stop_str_in_output':true,'skip_special_tokens':true");
    const tr_params *q = &r->params;
    const tr_asked *a = r->user;
    assert_int_equal(r->id, 9);
    assert_int_equal(r->n_prompt, 3);
    assert_int_equal(r->prompt[2], 3);
    assert_true(q->temperature == 0.25f && q->top_p == 0.5f && q->min_p == 0.125f && q->top_k == 9);
    assert_true(q->key == UINT64_MAX);
    assert_int_equal(q->n_stop, 2);
    assert_string_equal(q->stop[1].s, "c\n");
    assert_int_equal(q->stop[1].n, 2);
    assert_int_equal(q->n_stop_tokens, 2); /* its own, and the second EOS of the model */
    assert_int_equal(q->stop_token[0], 4);
    assert_int_equal(q->stop_token[1], 11);
    assert_true(q->max_tokens == 20 && q->min_tokens == 2 && q->n == 3 && q->n_logprobs == 4);
    assert_int_equal(q->n_prompt_logprobs, 2);
    assert_int_equal(q->n_bias, 3);
    assert_true(q->bias[0].token == 3 && q->bias[1].token == 9 && q->bias[2].token == 100);
    assert_true(q->bias[0].bias == -2.5f);
    assert_true(q->presence == 1 && q->frequency == -1 && q->repetition == 1.5f &&
                q->include_stop && !q->ignore_eos);
    assert_true(!a->chat && a->skip_special && a->n_logprobs == 4 && a->n_prompt_logprobs == 2 &&
                !a->echo);
    assert_true(a->n_custom_id == 1 && a->custom_id[0] == 'a' && a->line == 9);
    tr_request_free(r);

    r = accepted(&o, "t", ",'ignore_eos':true");
    assert_int_equal(r->params.n_stop_tokens, 0);
    assert_true(r->params.top_p == 0.95f && r->params.temperature == 1 &&
                r->params.max_tokens == CONTEXT - 3);
    assert_true(r->params.n_logprobs == -1 && r->params.n_prompt_logprobs == -1 &&
                r->params.top_k == 0);
    assert_true(r->params.key == tr_hash64("a", 1, 7));
    tr_request_free(r);
}

/* A number is told so that it can be told from its bound. */
static void test_far_numbers(void **state)
{
    static const struct {
        const char *member, *said;
    } cases[] = {
        {",'temperature':2.0000001",
         "temperature is 2.0000001, it must be at least 0 and at most 2"},
        {",'repetition_penalty':3000000", "is 3000000, it must be"},
        {",'logit_bias':{'5':100.00001}", "is 100.00001, it must be -100 to 100"},
    };
    const tr_request_options o = options();
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        tr_envelope e = {0};
        tr_parsed p;
        char *line = quoted("t", cases[i].member);
        parse_bytes(&o, line, strlen(line), &p, &e);
        assert_int_equal(p.kind, TR_PARSED_REFUSED);
        if (!strstr(p.refusal.message, cases[i].said))
            fail_msg("%s: \"%s\", not \"%s\"", line, p.refusal.message, cases[i].said);
        free(line);
        tr_envelope_free(&e);
    }
}

static void test_scoring(void **state)
{
    const tr_request_options o = options();
    (void)state;
    tr_request *r = accepted(&o, "t", ",'echo':true,'max_tokens':0,'logprobs':3");
    const tr_asked *a = r->user;
    assert_true(r->params.max_tokens == 0 && r->params.n_logprobs == -1 &&
                r->params.n_prompt_logprobs == 3);
    assert_true(a->echo && a->n_logprobs == 3 && a->n_prompt_logprobs == -1 && !a->prompt_text);
    tr_request_free(r);
    r = accepted(&o, "t", ",'echo':true,'max_tokens':5,'logprobs':1,'prompt_logprobs':7");
    a = r->user;
    assert_true(r->params.n_logprobs == 1 && r->params.n_prompt_logprobs == 7 &&
                a->n_prompt_logprobs == 7);
    tr_request_free(r);
    r = accepted(&o, "t", ",'echo':true,'max_tokens':0");
    a = r->user;
    assert_true(r->params.n_prompt_logprobs == 0 && a->n_logprobs == -1);
    tr_request_free(r);
    /* A prompt that fills the context can still be scored. */
    char text[CONTEXT * 2 + 64] = "'echo':true,'max_tokens':0,'prompt':[1";
    for (int i = 1; i < CONTEXT; i++)
        strncat(text, ",1", sizeof text - strlen(text) - 1);
    strncat(text, "]", sizeof text - strlen(text) - 1);
    r = accepted(&o, "b", text);
    assert_int_equal(r->n_prompt, CONTEXT);
    tr_request_free(r);
    tr_envelope e = {0};
    tr_parsed p;
    char *line = quoted("b", text + strlen("'echo':true,'max_tokens':0,"));
    parse_bytes(&o, line, strlen(line), &p, &e);
    assert_int_equal(p.kind, TR_PARSED_REFUSED);
    assert_string_equal(p.refusal.code, "context_length_exceeded");
    assert_string_equal(p.refusal.param, "prompt");
    assert_non_null(strstr(p.refusal.message, "600"));
    free(line);
    tr_envelope_free(&e);
}

static void test_bos(void **state)
{
    tr_request_options o = options();
    (void)state;
    tr_request *plain = accepted(&o, "b", "'prompt':'Hello','echo':true");
    const tr_asked *a = plain->user;
    assert_true(a->n_prompt_text == 5 && !memcmp(a->prompt_text, "Hello", 5) && !a->bos_added);
    o.add_bos = true;
    tr_request *with = accepted(&o, "b", "'prompt':'Hello'");
    assert_int_equal(with->n_prompt, plain->n_prompt + 1);
    assert_int_equal(with->prompt[0], 2025);
    assert_memory_equal(with->prompt + 1, plain->prompt, plain->n_prompt * sizeof *plain->prompt);
    tr_request_free(with);
    with = accepted(&o, "b", "'prompt':'Hello','add_special_tokens':false");
    assert_int_equal(with->n_prompt, plain->n_prompt);
    tr_request_free(with);
    with = accepted(&o, "b", "'prompt':'<｜begin▁of▁sentence｜>Hello'"); /* it is there already */
    assert_int_equal(with->n_prompt, plain->n_prompt + 1);
    tr_request_free(with);
    with = accepted(&o, "b", "'prompt':[1]"); /* as it is */
    assert_int_equal(with->n_prompt, 1);
    tr_request_free(with);
    tr_request_free(plain);
    /* An empty prompt with BOS is one token. */
    with = accepted(&o, "b", "'prompt':''");
    assert_int_equal(with->n_prompt, 1);
    tr_request_free(with);
}

static void test_chat(void **state)
{
    const tr_request_options o = options();
    (void)state;
    tr_request *r = accepted(&o, "c", ",'logprobs':true,'top_logprobs':2,'echo':1");
    const tr_asked *a = r->user;
    assert_true(a->chat && a->n_logprobs == 2 && a->start == TR_START_CONTENT && !a->echo);
    assert_int_equal(r->prompt[0], 2025); /* exactly one BOS */
    assert_true(r->n_prompt > 3 && r->prompt[1] != 2025);
    tr_request_free(r);
    r = accepted(&o, "c", ",'chat_template_kwargs':{'thinking':true}");
    a = r->user;
    assert_int_equal(a->start, TR_START_REASONING);
    tr_request_free(r);
}

static void test_no_tokenizer(void **state)
{
    tr_request_options o = options();
    const char *const form[] = {"b", "c", "t"};
    const char *const text[] = {"'prompt':'x'", "", ",'stop':'x'"};
    const char *const param[] = {"prompt", "messages", "stop"};
    (void)state;
    o.tokenizer = NULL;
    for (int i = 0; i < 3; i++) {
        tr_envelope e = {0};
        tr_parsed p;
        char *line = quoted(form[i], text[i]);
        parse_bytes(&o, line, strlen(line), &p, &e);
        assert_int_equal(p.kind, TR_PARSED_REFUSED);
        assert_string_equal(p.refusal.code, "no_tokenizer");
        assert_string_equal(p.refusal.param, param[i]);
        free(line);
        tr_envelope_free(&e);
    }
    tr_request *r = accepted(&o, "t", ",'logit_bias':{'2047':1}");
    assert_true(((tr_asked *)r->user)->return_token_ids);
    tr_request_free(r);
}

static void test_strict(void **state)
{
    tr_request_options o = options();
    const char *const lines[] = {
        "{'custom_id':'a','method':'POST','url':'/v1/completions','body':{'prompt':[1],'foo':1}}",
        "{'custom_id':'a','method':'POST','foo':1,'url':'/v1/completions','body':{'prompt':[1]}}",
        ("{'custom_id':'a','method':'POST','url':'/v1/"
         "completions','body':{'prompt':[1],'foo\\u0000':1}}"),
        "{'custom_id':'a','method':'POST','url':'/v1/chat/completions','body':{"
        "'messages':[{'role':'user','content':'Hi'},{'role':'user','foo':1,'content':'x'}]}}",
        "{'custom_id':'a','method':'POST','url':'/v1/chat/completions','body':{"
        "'messages':[{'role':'user','content':'Hi'}],'chat_template_kwargs':{'foo':true}}}",
    };
    (void)state;
    o.strict_params = true;
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++) {
        tr_envelope e = {0};
        tr_parsed p;
        char *line = quoted("l", lines[i]);
        parse_bytes(&o, line, strlen(line), &p, &e);
        assert_int_equal(p.kind, TR_PARSED_REFUSED);
        assert_true(!strcmp(p.refusal.code, "unknown_field")
                        ? !strcmp(p.refusal.param, "foo")
                        : !strcmp(p.refusal.code, "invalid_json"));
        free(line);
        tr_envelope_free(&e);
    }
}

/* What clients send that means nothing here, or is null, is no reason to refuse. */
static void test_strict_takes(void **state)
{
    tr_request_options o = options();
    (void)state;
    o.strict_params = true;
    tr_request_free(accepted(&o, "m",
                             "'messages':[{'role':'user','name':'me','content':'Hi','foo':null}],"
                             "'chat_template_kwargs':{'thinking':false,'bar':null}"));
}

/* One warning per name, whatever the number of lines. */
static void test_warnings(void **state)
{
    tr_request_options o = options();
    tr_parser *p = NULL;
    tr_err err;
    int count = 0;
    (void)state;
    FILE *sink = tmpfile(); /* the log wants a descriptor */
    assert_non_null(sink);
    o.log = tr_log_create(sink, false, false);
    assert_int_equal(tr_parser_create(&p, &o, &err), TR_OK);
    for (int i = 0; i < 100; i++) {
        tr_envelope e = {0};
        tr_parsed parsed;
        char *line = quoted("t", i % 2 ? ",'foo':1" : ",'bar':{'x':[1,2]}");
        const tr_line l = {.number = 1, .text = line, .n = strlen(line)};
        assert_int_equal(tr_envelope_read(&e, &l, &err), TR_OK);
        assert_int_equal(tr_parser_line(p, &e, &parsed, &err), TR_OK);
        assert_int_equal(parsed.kind, TR_PARSED_REQUEST);
        tr_request_free(parsed.request);
        tr_envelope_free(&e);
        free(line);
    }
    rewind(sink);
    char line[256];
    while (fgets(line, sizeof line, sink))
        count += strstr(line, "unknown field") != NULL;
    assert_int_equal(count, 2);
    tr_parser_free(p);
    tr_log_free(o.log);
    fclose(sink);
}

static void test_utf8(void **state)
{
    const tr_request_options o = options();
    static const struct {
        const char *line;
        tr_parsed_kind kind;
        size_t column;
    } t[] = {
        {"{\"custom_id\":\"a\",\"method\":\"POST\",\"url\":\"/v1/"
         "completions\",\"body\":{\"prompt\":\"x\xff\"}}",
         TR_PARSED_REFUSED, 0},
        {"{\"custom_id\":\"a\xff\"}", TR_PARSED_INVALID, 16},
        {"{\"custom_id\":\"a\" \xc0\xaf}", TR_PARSED_INVALID, 18},
        {"\xed\xa0\x80", TR_PARSED_INVALID, 1},
    };
    (void)state;
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        tr_envelope e = {0};
        tr_parsed p;
        parse_bytes(&o, t[i].line, strlen(t[i].line), &p, &e);
        assert_int_equal(p.kind, t[i].kind);
        assert_int_equal(p.column, t[i].column);
        if (p.kind == TR_PARSED_REFUSED) assert_string_equal(p.refusal.code, "invalid_utf8");
        tr_envelope_free(&e);
    }
    /* NUL bytes */
    tr_envelope e = {0};
    tr_parsed p;
    parse_bytes(&o, "{\"custom_id\":\"a\0b\"}", 19, &p, &e);
    assert_int_equal(p.kind, TR_PARSED_INVALID);
    assert_int_equal(p.column, 16);
    tr_envelope_free(&e);
}

static void test_surrogates(void **state)
{
    static const char *const t[][2] = {
        {"\\ud800", "\\ufffd"},
        {"\\udc00x", "\\ufffdx"},
        {"\\ud83d\\ude00", "\\ud83d\\ude00"},
        {"\\ud83d\\ud83d\\ude00", "\\ufffd\\ud83d\\ude00"},
        {"\\\\ud800", "\\\\ud800"},
        {"\\\\\\uDBFFz", "\\\\\\ufffdz"},
        {"\\ud800\\u0041", "\\ufffd\\u0041"},
        {"\\ud80", "\\ud80"},
        {"\\", "\\"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        char text[64];
        snprintf(text, sizeof text, "%s", t[i][0]);
        tr_surrogates_replace(text, strlen(text));
        assert_string_equal(text, t[i][1]);
    }
}

/* Every prefix and every one-byte change of a good line: an answer of some kind, and no number
 * out of its range. */
static void test_damage(void **state)
{
    tr_request_options o = options();
    (void)state;
    char *line = quoted(
        "c",
        ",'temperature':0.5,'logit_bias':{'7':1},'stop':['x'],'n':2,'top_k':5,'tools':[{'type':"
        "'function','function':{'name':'f'}}]");
    size_t n = strlen(line);
    o.tokenizer = NULL; /* a fast way through the parameters */
    for (size_t i = 0; i < n; i++) {
        tr_envelope e = {0};
        tr_parsed p;
        parse_bytes(&o, line, i, &p, &e);
        assert_int_equal(p.kind, TR_PARSED_INVALID);
        assert_true(p.column >= 1 && p.column <= i + 1);
        char was = line[i];
        for (int c = 0; c < 256; c += 5) {
            line[i] = (char)c;
            parse_bytes(&o, line, n, &p, &e);
            tr_request_free(p.request);
        }
        line[i] = was;
        tr_envelope_free(&e);
    }
    free(line);
}

int main(void)
{
    char path[1024];
    tr_err err;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_table),        cmocka_unit_test(test_values),
        cmocka_unit_test(test_scoring),      cmocka_unit_test(test_bos),
        cmocka_unit_test(test_far_numbers),  cmocka_unit_test(test_chat),
        cmocka_unit_test(test_no_tokenizer), cmocka_unit_test(test_strict),
        cmocka_unit_test(test_warnings),     cmocka_unit_test(test_strict_takes),
        cmocka_unit_test(test_utf8),         cmocka_unit_test(test_surrogates),
        cmocka_unit_test(test_damage),
    };
    if (tr_tokenizer_open(&tokenizer,
                          tr_source_path(path, sizeof path, "models/tiny/tokenizer.json"), NULL,
                          NULL, &err)) {
        fprintf(stderr, "skipped: %s\n", err.text);
        return 77;
    }
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    tr_tokenizer_free(tokenizer);
    return failed;
}
