"""What a run will take, from its compiled programs: python -m train_jax.plan --config=FILE."""
