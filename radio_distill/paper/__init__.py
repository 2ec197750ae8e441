"""Every table and figure of the FeatSharp paper by one command: what is run for each is in `eval/paper.yaml`."""
