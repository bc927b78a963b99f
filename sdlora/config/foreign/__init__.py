"""Settings of other trainers, translated into sdlora's, with an account of each one."""
