"""The workers, as their supervisor sees them: forked, told, asked, replaced, ended."""
