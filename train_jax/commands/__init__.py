"""The command lines of train.py and eval.py."""
