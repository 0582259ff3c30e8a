"""The processes beside the workers that the supervisor keeps, and the loaders of programs."""
