"""Tools that are run by hand: commands, self-test, ahead-of-time compilation, tuning. No layer imports them.

| module | answers |
|---|---|
| `planned` | which launches does a call make on a card that is not here? |
| `shipped`, `elsewhere`, `aot` | do their kernels compile for every card, without spills? (`python -m ….tools.aot`) |
| `candidates`, `trials`, `timing`, `tune` | what is fastest for these shapes? (`python -m glora_kernels tune`) |
| `selftest` | are the results on this machine right? (`python -m glora_kernels check`) |
| `commands` | the commands themselves; `outputs`: the files that they write |
"""
