"""Jobs of many units of work, done on this machine, over Slurm or over Ray, and resumed after a kill."""
