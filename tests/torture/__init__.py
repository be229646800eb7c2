"""What a training must survive, many times over: kills, errors for want of memory, an hour's worth of windows."""
