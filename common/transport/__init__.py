"""Transports: ways in which the values of an embedding get from a sender into the file that a sink has prepared for them.

`base.py` has the seam and the negotiation; each other module is one transport. docs/transports.md explains them.
"""
