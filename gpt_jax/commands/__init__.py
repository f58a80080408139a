"""The command line, one small file a command (floor 4): arguments in, printed lines and exit
codes out."""
