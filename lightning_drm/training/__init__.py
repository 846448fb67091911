"""Lightning's side: the callback, the Trainer of all tasks, and the run folder that remembers what is done."""
