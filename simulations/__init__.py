"""Entry points that run whole experiments on one machine, composed from ``conf/`` by Hydra."""
