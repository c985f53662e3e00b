"""The paper, and rules and samplers since: knows jax and the vocabulary, nothing else."""
