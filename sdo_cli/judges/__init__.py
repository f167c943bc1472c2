"""Judges outside this process: commands, servers and tables that score pictures. They only measure."""
