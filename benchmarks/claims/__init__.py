"""Each paper's claim measured again in small; `docs/tables.py` puts what is in `results/` into docs/results.md."""
