"""Every claim of speed as a script that anyone can run, peers in the same run."""
