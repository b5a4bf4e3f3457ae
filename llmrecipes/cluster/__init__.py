"""Jobs for a Slurm cluster: the sbatch files of ``slurm/``, filled in from a recipe."""
