"""What users rely on: instructions, rules, policies, commands, a daemon's life."""
