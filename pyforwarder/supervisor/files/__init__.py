"""The files of an instance that show and steer: the view in bpffs, and the pseudo-/proc."""
