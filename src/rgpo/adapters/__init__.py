"""The core's recipes inside the trainers people already run: one file per host trainer."""
