"""Evidence: the same calls of every operator on several instruments, and a table of which kernel was proved where.

    python tests/evidence eager | interpreter | ttsem | card      run, and compared with float64
    python tests/dry_card tests/evidence dry_card                 compiled and launched there; nothing is compared
    python tests/evidence ttsem --form experts NF4                the forms whose names begin so
    python tests/evidence ncu REPORT CASE                         what Nsight Compute saw of a layer
    python tests/evidence table                                   the table anew

A run writes benchmarks/results/evidence/<instrument>.json, after each form: the kernels that were launched, where all
of its calls were right, and nothing where one was wrong; and benchmarks/results/evidence.md from all of these files.
`scripts/test-ttsem` makes the environment that ttsem needs, and runs it.
"""
