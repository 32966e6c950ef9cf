"""A fleet under load and faults for a long time: every request is accounted for, and memory stays flat."""
