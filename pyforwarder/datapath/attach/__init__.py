"""How tc programs are put on interfaces: by tcx, or by filters of clsact."""
