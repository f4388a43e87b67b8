"""The command lines of predict.py and of the installed `paligemma-jax`."""
