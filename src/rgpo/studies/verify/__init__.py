"""The claims of the paper, checked on this machine: one file per claim."""
