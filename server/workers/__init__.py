"""The gateway's view of its workers: clients, pools, discovery, probes."""
