"""What is run by hand: commands, self-test, ahead-of-time compilation, tuning. Nothing that runs a layer imports it."""
