"""Settings of other trainers, said in ours; what becomes of each of theirs is accounted for."""
