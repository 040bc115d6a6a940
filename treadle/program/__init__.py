"""From the argument MODEL and the options of an entry function to a program."""
