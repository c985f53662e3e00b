"""Images and labels: data sets, batches as a function of the step. Knows TFDS and Grain."""
