"""Turns text into token ids and back. Here are the tokenizers and chat templates of the
checkpoints, think blocks, stop strings, tool calls, and the grammars that constrain answers;
nothing here knows HTTP. It imports `exit_codes`, `config`, `wire`, `mi_runtime.config`,
`mi_runtime.request` and `mi_runtime.scheduling`. Others import everything but `chat_template` and
`string_matching`.
"""
