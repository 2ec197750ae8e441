"""What a recipe of any kind costs before it runs: FLOP, memory, hours, disk, who does what. Builds no network with weights."""
