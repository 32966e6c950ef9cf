"""Training of the bundled checkpoint: the stages, the losses, and the run that can be resumed."""
