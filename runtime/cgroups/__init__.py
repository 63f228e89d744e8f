"""Control groups: where they are mounted, what a container's resources mean there, and one manager for all trees."""
