"""The command line: runs, plans and comparisons, composed from ``conf/`` by Hydra and started on this machine."""
