"""The APIs of the gateway, a file each."""
