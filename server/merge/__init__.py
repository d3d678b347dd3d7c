"""`mi-server merge`: writes one λ, or a baseline merge, as a checkpoint that any engine can load.

    mi-server merge --lambda 0.6 --out DIR
    mi-server merge --lambda '{"default": 0.6, "layers": {"0-1": 0}}' --out DIR
    mi-server merge --method ties --base BASE --density 0.2 --scale 0.5 --out DIR

`merge_command` parses the arguments, `merge_plan` checks them, and `merged_checkpoint` writes the
files with the model card of `model_card`. A child process (`mi_runtime.model.merge_weights`) writes
the weights.

It imports `exit_codes`, `config`, `wire`, `text`, `routing`, `mi_runtime.embedded_pair` and
`mi_runtime.request`. Others import only `merge_command`.
"""
