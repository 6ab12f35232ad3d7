"""The command line ``llm-fp4``: one small file a command, each parse, one library call, render."""
