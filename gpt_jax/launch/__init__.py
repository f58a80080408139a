"""How jobs start: `local` runs the processes of a machine, `slurm` and `kubernetes` write what
those engines want."""
