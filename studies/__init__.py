"""The evidence whether FAM helps: `python studies/run.py`. Results lie in studies/results."""
